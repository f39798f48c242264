"""The tab *inside*: how the estimate of an image's text query moves over steps and noise samples."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffdis_jax.app import charts
from diffdis_jax.app.classify import read_square
from diffdis_jax.app.draw import MOST_SEED
from diffdis_jax.app.limits import Limits, read_names, read_template, read_whole, within
from diffdis_jax.app.step_sampler import Estimate, StepSampler
from diffdis_jax.evals import prompts

MOST_STEPS = 50
MOST_DRAWS = 16
SHOWN = 6  # names, those that score best at the end


def answer(
  sampler: StepSampler,
  limits: Limits,
  path: str | os.PathLike[str] | None,
  names: str | None,
  template: str | None,
  steps: Any,
  draws: Any,
  seed: Any,
) -> Iterator[str]:
  """HTML after each step.

  Raises:
    UserError: no usable image, a field out of its range, or no more time.
  """
  classes = read_names(names, limits)
  filled = read_template(template, limits)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_STEPS)
  whole_draws = read_whole("noise samples", draws, at_least=1, at_most=MOST_DRAWS)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square, begun = read_square(path, sampler, limits), time.monotonic()
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  found: list[Estimate] = []
  estimates = sampler.estimates(square, seed=whole_seed, steps=whole_steps, num_noise_samples=whole_draws)
  for estimate in within(limits.seconds, estimates, begun=begun):
    found.append(estimate)
    yield show(found, classes, texts)


def show(estimates: Sequence[Estimate], names: Sequence[str], texts: Float[np.ndarray, "n d"]) -> str:
  """Scores of the best names over the steps, and the paths of the noise samples on a plane."""
  last = estimates[-1]
  queries = np.stack([estimate.queries for estimate in estimates])
  scores = queries @ texts.T
  best = np.argsort(-scores[-1].mean(axis=0), kind="stable")[:SHOWN]
  chosen = [names[int(i)] for i in best]
  said = f"Step {last.step} of {last.steps}, t = {last.t}: {chosen[0]}, {scores[-1, :, best[0]].mean():.3f}."
  if queries.shape[1] > 1:
    said += f" Estimates of two noise samples have a cosine of {agreement(last.queries):.3f} on average."
  charted = [
    score_chart([estimate.t for estimate in estimates], scores[:, :, best], last.steps),
    plane_chart(queries, texts[best], chosen),
  ]
  return charts.block(
    charts.line(said), charts.progress(last.step, last.steps), charts.legend(chosen), charts.row(charted), least=340
  )


def agreement(queries: Float[np.ndarray, "k d"]) -> float:
  """Mean cosine of the estimates of two different noise samples, which are unit vectors; at least two."""
  k = len(queries)
  # For unit vectors |Σ q|² is k plus the inner products of all ordered pairs, of which there are k (k - 1).
  return float((np.square(queries.sum(axis=0)).sum() - k) / (k * (k - 1)))


def score_chart(t: Sequence[int], scores: Float[np.ndarray, "s k n"], steps: int) -> str:
  """⟨ê_0, e⟩ of each name after each step: the mean of the noise samples, and each of them thinly."""
  low, high = float(scores.min()), float(scores.max())
  # As wide as all steps from the first one on: the curves grow, and the axis stays.
  frame = charts.Frame((1, max(steps, 2)), (low, high))
  for value in charts.ticks(low, high):
    frame.y_tick(float(value), f"{value:g}")
  # About six labels have room side by side.
  every = max(1, steps // 6)
  for i, at in enumerate(t):
    if i % every == 0:
      frame.x_tick(i + 1, str(at))
  # From the last name on, so that the best one lies on top.
  for name in reversed(range(scores.shape[2])):
    paint = charts.colour(name)
    for draw in range(scores.shape[1]):
      frame.curve([(i + 1, float(x)) for i, x in enumerate(scores[:, draw, name])], paint, width=1, opacity=0.3)
    means = scores[:, :, name].mean(axis=1)
    frame.curve([(i + 1, float(x)) for i, x in enumerate(means)], paint, width=2.5)
    frame.dot(len(means), float(means[-1]), paint, radius=3.5, title=f"{means[-1]:.3f}")
  return frame.html("Score of each name", "inner product of the estimate and the name's text query, by timestep t")


def plane(texts: Float[np.ndarray, "n d"], first: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "d 2"]:
  """The two directions, orthonormal, in which names and first estimates differ most: later steps do not turn them."""
  points = np.concatenate([texts, first])
  directions = np.linalg.svd(points - texts.mean(axis=0), full_matrices=False)[2][:2].T
  # The sign of a singular vector is arbitrary. The largest entry is made positive, so that no machine mirrors the
  # picture.
  return directions * np.where(directions[np.abs(directions).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0).astype(np.float32)


def plane_chart(queries: Float[np.ndarray, "s k d"], texts: Float[np.ndarray, "n d"], names: Sequence[str]) -> str:
  """The path of each noise sample from its first estimate to its last, as points, and the names' text queries."""
  directions = plane(texts, queries[0])
  moved, fixed = queries @ directions, texts @ directions
  everything = np.concatenate([moved.reshape(-1, 2), fixed])
  (left, low), (right, high) = everything.min(axis=0).tolist(), everything.max(axis=0).tolist()
  frame = charts.Frame((left, right), (low, high))
  for draw in range(moved.shape[1]):
    path = [(float(x), float(y)) for x, y in moved[:, draw]]
    frame.curve(path, "var(--body-text-color-subdued)", width=1.2, opacity=0.7)
    frame.dot(*path[0], "var(--body-text-color-subdued)", radius=1.8)
    frame.dot(*path[-1], "var(--body-text-color)", radius=3, title=f"noise sample {draw + 1}")
  for i, (name, (x, y)) in enumerate(zip(names, fixed.tolist(), strict=True)):
    frame.dot(x, y, charts.colour(i), radius=6, title=name)
    frame.label(x, y, name)
  return frame.html(
    "Paths of the noise samples", "estimates and text queries, on the two directions in which they differ most"
  )
