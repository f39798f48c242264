"""Answers the tabs' requests, as values of Gradio's components: first a line of text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import special

from diffdis_jax.app.limits import Limits, last_within, read_names, read_square, read_template, read_text, read_whole
from diffdis_jax.app.limits import within as within_time
from diffdis_jax.app.search import SEED, Index
from diffdis_jax.app.step_sampler import Estimate, Frame, StepSampler
from diffdis_jax.config.section import check_number
from diffdis_jax.evals import prompts

MOST_STEPS, MOST_INSIDE_STEPS = 200, 50
MOST_GUIDANCE = 30
MOST_SEED = 2**31 - 1
MOST_SAMPLES, MOST_INSIDE_SAMPLES = 64, 16
FRAMES = 20  # shown of one image; decoding a latent costs about as much as a step
FOUND = 12  # images of a search
BEST = 6  # names of which `inside` shows the scores
THUMBNAIL = 64  # pixels, at least

Path = str | os.PathLike[str] | None
Captioned = tuple[np.ndarray, str]


class Generated(NamedTuple):
  """A line, the image with the emptied and the guided prediction, and both predictions over the steps."""

  line: str
  images: list[Captioned]
  strip: list[Captioned]


class Classified(NamedTuple):
  line: str
  shares: dict[str, float]


class Found(NamedTuple):
  line: str
  images: list[Captioned]


class Inside(NamedTuple):
  """A line, the names' scores over the steps, and the paths of the noise samples on a plane."""

  line: str
  scores: pd.DataFrame
  paths: pd.DataFrame


def generate(
  sampler: StepSampler, limits: Limits, prompt: str | None, seed: Any, steps: Any, guidance_scale: Any
) -> Iterator[Generated]:
  """Yield the steps that are shown, the image last. Raises UserError: a field out of its range, or no time."""
  prompt = read_text(prompt, "prompt", limits)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_STEPS)
  check_number("guidance", guidance_scale, ge=0, le=MOST_GUIDANCE)
  scale = float(guidance_scale)
  # At once: the first step may still wait for its program to be compiled.
  yield Generated(f"Step 0 of {whole_steps}", [], [])
  left, shown = sampler.cut(prompt), []
  too_long = "" if left is None else f" The prompt is too long for this model, which reads: {left}"
  frames = sampler.generate(prompt, seed=whole_seed, steps=whole_steps, guidance_scale=scale, frames=FRAMES)
  for frame in within_time(limits.seconds, frames):
    shown.append(frame)
    done = frame.step == frame.steps
    line = f"{frame.steps} steps" if done else f"Step {frame.step} of {frame.steps}, t = {frame.t}"
    images = [
      (frame.noisy, prompt if done else "z at the next t, decoded"),
      (frame.emptied, "emptied: what the network makes of z_t without the prompt"),
      (frame.guided, "guided: what it makes of z_t with the prompt and guidance"),
    ]
    yield Generated(line + "." + too_long, images, [*_strip(shown)])


def _strip(frames: Sequence[Frame]) -> Iterator[Captioned]:
  for frame in frames:
    every = max(1, len(frame.emptied) // THUMBNAIL)
    yield np.concatenate([frame.emptied[::every, ::every], frame.guided[::every, ::every]]), f"t = {frame.t}"


def classify(
  sampler: StepSampler, limits: Limits, path: Path, names: str | None, template: str | None, samples: Any, seed: Any
) -> Iterator[Classified]:
  """Yield each name's share. Raises UserError: no usable image, a field out of its range, or no time."""
  # All fields before the model: what is wrong with them is said without waiting for a turn.
  classes, filled = read_names(names, limits), read_template(template, limits)
  whole_samples = read_whole("noise samples", samples, at_least=1, at_most=MOST_SAMPLES)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square, begun = read_square(path, limits, sampler.network.image_size), time.monotonic()
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  queries = sampler.image_queries(square, seed=whole_seed, num_noise_samples=whole_samples)
  yield guess(classes, texts, last_within(limits.seconds, queries, begun=begun), sampler.temperature)


def guess(
  names: Sequence[str], texts: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "k d"], temperature: float
) -> Classified:
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
  return Classified(line, dict(zip(names, share.tolist(), strict=True)))


def search_text(sampler: StepSampler, index: Index, limits: Limits, text: str | None) -> Iterator[Found]:
  """Yield the images that fit the text best. Raises UserError: no text, too long, or nothing embedded yet."""
  yield _nearest(index, sampler.text_queries([read_text(text, "text", limits)])[0], limits)


def search_image(sampler: StepSampler, index: Index, limits: Limits, path: Path) -> Iterator[Found]:
  """Yield the images nearest to an upload. Raises UserError: no usable image, or nothing embedded yet."""
  square, count = read_square(path, limits, sampler.network.image_size), sampler.model.sampling.num_noise_samples
  queries = last_within(limits.seconds, sampler.image_queries(square, seed=SEED, num_noise_samples=count))
  # As `Inference.embed_images` does for the images that are searched.
  mean = queries.mean(axis=0)
  yield _nearest(index, mean / np.linalg.norm(mean), limits)


def _nearest(index: Index, query: Float[np.ndarray, " d"], limits: Limits) -> Found:
  hits = index.nearest(query, FOUND, seconds=limits.seconds)
  records = [(index.record(hit.place), hit.score) for hit in hits]
  return Found(index.state(), [(record.image, f"{record.name} ({score:.3f})") for record, score in records])


def inside(
  sampler: StepSampler,
  limits: Limits,
  path: Path,
  names: str | None,
  template: str | None,
  steps: Any,
  samples: Any,
  seed: Any,
) -> Iterator[Inside]:
  """Yield how the estimate moves, after each step. Raises UserError: as `classify`."""
  classes, filled = read_names(names, limits), read_template(template, limits)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_INSIDE_STEPS)
  whole_samples = read_whole("noise samples", samples, at_least=1, at_most=MOST_INSIDE_SAMPLES)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square, begun = read_square(path, limits, sampler.network.image_size), time.monotonic()
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  estimates, shown = sampler.estimates(square, seed=whole_seed, steps=whole_steps, num_noise_samples=whole_samples), []
  for estimate in within_time(limits.seconds, estimates, begun=begun):
    shown.append(estimate)
    yield look(shown, classes, texts)


def look(estimates: Sequence[Estimate], names: Sequence[str], texts: Float[np.ndarray, "n d"]) -> Inside:
  """Return the scores ⟨ê_0, e⟩ of the best names, and estimates and names on the two directions of most difference."""
  last, queries = estimates[-1], np.stack([estimate.queries for estimate in estimates])
  scores = queries @ texts.T
  best = [int(i) for i in np.argsort(-scores[-1].mean(axis=0), kind="stable")[:BEST]]
  line = f"Step {last.step} of {last.steps}, t = {last.t}: {names[best[0]]}, {scores[-1, :, best[0]].mean():.3f}."
  if queries.shape[1] > 1:
    line += f" Estimates of two noise samples have a cosine of {agreement(last.queries):.3f} on average."
  means = [(each.step, names[i], float(scores[s, :, i].mean())) for s, each in enumerate(estimates) for i in best]
  directions = plane(texts[best], queries[0])
  points = [(*place, "on the way") for place in (queries[:-1] @ directions).reshape(-1, 2).tolist()]
  points += [(*place, "noise sample") for place in (queries[-1] @ directions).tolist()]
  points += [(*place, names[i]) for i, place in zip(best, (texts[best] @ directions).tolist(), strict=True)]
  return Inside(
    line, pd.DataFrame(means, columns=["step", "name", "score"]), pd.DataFrame(points, columns=["x", "y", "of"])
  )


def agreement(queries: Float[np.ndarray, "k d"]) -> float:
  """Return the mean cosine of the estimates of two different noise samples, which are unit vectors; at least two."""
  k = len(queries)
  # For unit vectors |Σ q|² is k plus the inner products of all ordered pairs, of which there are k (k - 1).
  return float((np.square(queries.sum(axis=0)).sum() - k) / (k * (k - 1)))


def plane(texts: Float[np.ndarray, "n d"], first: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "d 2"]:
  """Return the two orthonormal directions in which names and first estimates differ most, so that steps turn none."""
  points = np.concatenate([texts, first])
  directions = np.linalg.svd(points - texts.mean(axis=0), full_matrices=False)[2][:2].T
  # The sign of a singular vector is arbitrary. The largest entry is made positive, so that no machine mirrors the
  # picture.
  return directions * np.where(directions[np.abs(directions).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0).astype(np.float32)
