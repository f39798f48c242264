"""The tab *classify*: an image among class names that the user types."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy import special

from diffdis_jax.app import charts
from diffdis_jax.app.draw import MOST_SEED
from diffdis_jax.app.limits import Limits, last_within, read_image, read_names, read_template, read_whole
from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.data import transforms
from diffdis_jax.evals import prompts

MOST_DRAWS = 64
SHOWN = 12  # names, of which the likeliest come first


def guesses(
  names: Sequence[str],
  texts: Float[np.ndarray, "n d"],
  queries: Float[np.ndarray, "k d"],
  temperature: float,
) -> list[charts.Bar]:
  """Each name's share of the softmax over τ ⟨ê_0, e⟩, likeliest first, of the query averaged over the noise samples.

  Beside it the least and the most among the samples, each alone, and for how many of several it is the likeliest.

  Args:
    names: of the classes.
    texts: their text queries e, L2-normalised.
    queries: ê_0 of each noise sample, L2-normalised.
    temperature: τ of the contrastive loss.
  """
  alone = special.softmax(temperature * queries @ texts.T, axis=-1)
  mean = queries.mean(axis=0)
  # τ is for unit vectors, and the mean of several is shorter.
  share = special.softmax(temperature * (mean / np.linalg.norm(mean)) @ texts.T)
  firsts = np.bincount(alone.argmax(axis=1), minlength=len(names))
  # Stable, so that equal names stay in the order in which they were typed.
  order = np.argsort(-share, kind="stable")
  columns = share, alone.min(axis=0), alone.max(axis=0)
  shares = np.stack(columns, axis=1).tolist()
  notes = [f"first in {first}/{len(queries)}" if len(queries) > 1 else "" for first in firsts]
  return [charts.Bar(names[int(i)], *shares[int(i)], note=notes[int(i)]) for i in order]


def read_square(
  path: str | os.PathLike[str] | None, sampler: StepSampler, limits: Limits
) -> UInt8[np.ndarray, "s s 3"]:
  """An upload's central square, as evaluations cut it. Raises UserError: as `read_image`."""
  return np.asarray(transforms.resize(read_image(path, limits), sampler.network.image_size))


def answer(
  sampler: StepSampler,
  limits: Limits,
  path: str | os.PathLike[str] | None,
  names: str | None,
  template: str | None,
  draws: Any,
  seed: Any,
) -> Iterator[str]:
  """HTML with the bars.

  Raises:
    UserError: no usable image, a field out of its range, or no more time.
  """
  # All fields before the model: what is wrong with them is said without waiting for a turn.
  classes = read_names(names, limits)
  filled = read_template(template, limits)
  whole_draws = read_whole("noise samples", draws, at_least=1, at_most=MOST_DRAWS)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square, begun = read_square(path, sampler, limits), time.monotonic()
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  found = sampler.image_queries(square, seed=whole_seed, num_noise_samples=whole_draws)
  queries = last_within(limits.seconds, found, begun=begun)
  yield show(guesses(classes, texts, queries, sampler.temperature), draws=len(queries))


def show(found: Sequence[charts.Bar], *, draws: int) -> str:
  """The likeliest names as bars, with the spread over the noise samples."""
  whiskers = f" The whiskers show the least and the most of {draws} noise samples, each alone." if draws > 1 else ""
  rest = f" {len(found) - SHOWN} less likely names are left out." if len(found) > SHOWN else ""
  said = f"{found[0].name}: {found[0].share:.1%}."
  return charts.block(charts.line(said + whiskers + rest), charts.bars(found[:SHOWN]))
