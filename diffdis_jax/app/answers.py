"""Answers the tabs' requests, as tuples of values for Gradio's components: first a line of text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special

from diffdis_jax.app.limits import read_names, read_square, read_template, read_text, read_whole, within
from diffdis_jax.app.search import SEED, Index
from diffdis_jax.app.step_sampler import Estimate, StepSampler
from diffdis_jax.config.section import check_number
from diffdis_jax.evals import prompts

MOST_STEPS, MOST_INSIDE_STEPS = 200, 50
MOST_GUIDANCE = 30
MOST_SEED = 2**31 - 1
MOST_SAMPLES, MOST_INSIDE_SAMPLES = 64, 16
FRAMES = 20  # shown of one image; decoding a latent costs about as much as a step
FOUND = 12  # images of a search
BEST = 6  # names of which `inside` shows the scores

Path = str | os.PathLike[str] | None
Captioned = tuple[np.ndarray, str]


def generate(
  sampler: StepSampler, prompt: str | None, seed: Any, steps: Any, guidance_scale: Any
) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line, and the image with both predictions, after each step that is shown.

  Raises UserError: a field out of its range, or no time.
  """
  prompt = read_text(prompt, "prompt")
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_STEPS)
  check_number("guidance", guidance_scale, ge=0, le=MOST_GUIDANCE)
  left = sampler.cut(prompt)
  too_long = "" if left is None else f" The prompt is too long for this model, which reads: {left}"
  scale = float(guidance_scale)
  frames = sampler.generate(prompt, seed=whole_seed, steps=whole_steps, guidance_scale=scale, frames=FRAMES)
  for frame in within(sampler.seconds, frames):
    done = frame.step == frame.steps
    line = f"{frame.steps} steps" if done else f"Step {frame.step} of {frame.steps}, t = {frame.t}"
    images = [
      (frame.noisy, prompt if done else "z at the next t, decoded"),
      (frame.emptied, "emptied: the network's prediction from z_t without the prompt"),
      (frame.guided, "guided: its prediction from z_t with the prompt and guidance"),
    ]
    yield line + "." + too_long, images


def classify(
  sampler: StepSampler, path: Path, names: str | None, template: str | None, samples: Any, seed: Any
) -> Iterator[tuple[str, dict[str, float]]]:
  """Yield a line and each name's share. Raises UserError: no usable image, a field out of its range, or no time."""
  classes, filled = read_names(names), read_template(template)
  whole_samples = read_whole("noise samples", samples, at_least=1, at_most=MOST_SAMPLES)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square = read_square(path, sampler.network.image_size)
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  queries = sampler.image_queries(square, seed=whole_seed, num_noise_samples=whole_samples)
  *_, last = within(sampler.seconds, queries)
  yield guess(classes, texts, last, sampler.temperature)


def guess(
  names: Sequence[str], texts: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "k d"], temperature: float
) -> tuple[str, dict[str, float]]:
  """Return the softmax over τ ⟨ê_0, e⟩ of the query averaged over the noise samples, and how far these agree."""
  mean = queries.mean(axis=0)
  # τ is for unit vectors, and the mean of several is shorter.
  share = special.softmax(temperature * (mean / np.linalg.norm(mean)) @ texts.T)
  best, count = int(share.argmax()), len(queries)
  line = f"{names[best]}: {share[best]:.1%}."
  if count > 1:
    alone = special.softmax(temperature * queries @ texts.T, axis=-1)
    first, (low, high) = (alone.argmax(axis=1) == best).sum(), (alone[:, best].min(), alone[:, best].max())
    line += f" Of {count} noise samples {first} have it first, with {low:.1%} to {high:.1%}."
  return line, dict(zip(names, share.tolist(), strict=True))


def search_text(sampler: StepSampler, index: Index, text: str | None) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line and the images that fit the text best. Raises UserError: no text, or nothing embedded yet."""
  yield _nearest(index, sampler.text_queries([read_text(text, "text")])[0])


def search_image(sampler: StepSampler, index: Index, path: Path) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line and the images nearest to an upload. Raises UserError: no usable image, or nothing embedded yet."""
  square, count = read_square(path, sampler.network.image_size), sampler.model.sampling.num_noise_samples
  *_, queries = within(sampler.seconds, sampler.image_queries(square, seed=SEED, num_noise_samples=count))
  # As `Inference.embed_images` does for the images that are searched.
  mean = queries.mean(axis=0)
  yield _nearest(index, mean / np.linalg.norm(mean))


def _nearest(index: Index, query: Float[np.ndarray, " d"]) -> tuple[str, list[Captioned]]:
  records = [(index.record(place), score) for place, score in index.nearest(query, FOUND).items()]
  return index.state(), [(record.image, f"{record.name} ({score:.3f})") for record, score in records]


def inside(
  sampler: StepSampler,
  path: Path,
  names: str | None,
  template: str | None,
  steps: Any,
  samples: Any,
  seed: Any,
) -> Iterator[tuple[str, pd.DataFrame]]:
  """Yield a line and the best names' scores over the steps, after each step. Raises UserError: as `classify`."""
  classes, filled = read_names(names), read_template(template)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_INSIDE_STEPS)
  whole_samples = read_whole("noise samples", samples, at_least=1, at_most=MOST_INSIDE_SAMPLES)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square = read_square(path, sampler.network.image_size)
  texts, shown = sampler.text_queries([prompts.fill(filled, name) for name in classes]), []
  estimates = sampler.estimates(square, seed=whole_seed, steps=whole_steps, num_noise_samples=whole_samples)
  for estimate in within(sampler.seconds, estimates):
    shown.append(estimate)
    yield look(shown, classes, texts)


def look(
  estimates: Sequence[Estimate], names: Sequence[str], texts: Float[np.ndarray, "n d"]
) -> tuple[str, pd.DataFrame]:
  """Return a line and the mean scores ⟨ê_0, e⟩ of the names that are best after the last step."""
  last, scores = estimates[-1], np.stack([estimate.queries.mean(axis=0) for estimate in estimates]) @ texts.T
  best = [int(i) for i in np.argsort(-scores[-1], kind="stable")[:BEST]]
  rows = [(each.step, names[i], float(scores[s, i])) for s, each in enumerate(estimates) for i in best]
  line = f"Step {last.step} of {last.steps}, t = {last.t}: {names[best[0]]}, {scores[-1, best[0]]:.3f}."
  return line, pd.DataFrame(rows, columns=["step", "name", "score"])
