"""Diffusion Classifier: an image's class is that whose prompt lets the network predict the noise best.

Source: Li et al., 2023, and Clark and Jaini, 2023; timesteps and stages as in Li et al.'s code. No head takes part, so
that a Stable Diffusion which was never trained here has a zero-shot figure too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.common.progress import Progress
from diffdis_jax.config.objectives import GENERATIVE
from diffdis_jax.config.section import field
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.method import losses, schedules
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import sharding

STAGES = ("10:5", "50:1")
IMAGES = 1024  # whose latents are kept at a time


@dataclasses.dataclass(frozen=True)
class Stage:
  """The number of evaluations that each remaining class has had at a stage's end, and how many classes are then
  kept."""

  evaluations: int
  kept: int


@base.settings()
class DiffusionClassifier(ZeroShot):
  """Task `diffusion_classifier`: argmin over classes of E‖ε − ε̂(z_t, t, c)‖², by the generation pass alone.

  Timesteps are evenly spaced. Each has its own noise, which all classes share. In stages, classes with large errors are
  left out, and the others evaluated further. One prompt is used, the single template's. Source: Li et al., 2023.
  """

  stages: Sequence[str] = field(
    STAGES, help="EVALUATIONS:KEPT of each stage: the classes that are kept after so many evaluations each"
  )

  def open(self) -> None:
    self.parsed_stages = read_stages(self.stages)  # before the data, which take longer
    self.templates = (self.single_template or prompts.resolve_templates(self.templates)[0],)
    super().open()

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **super().protocol(inference),
      "stages": [f"{stage.evaluations}:{stage.kept}" for stage in self.parsed_stages],
      "timesteps": timesteps(self.parsed_stages[-1].evaluations).tolist(),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, acc5 and recalls as zero_shot has them, and evaluations_per_image, of the UNet.

    Raises UserError: a run that was not trained for generation.
    """
    if not inference.network.task.generates:
      raise UserError(f"diffusion_classifier measures {' or '.join(GENERATIVE)}, for which this run was not trained")
    noise_errors = NoiseErrors(inference)
    texts = [prompts.fill(self.single, name) for name in self.names]
    prompts.warn_of_long(tuple(texts), inference.max_length)
    c = noise_errors.conditions(params, Tokenizer(inference.max_length)(texts))
    # How many classes of an image are left in each stage, and how often each of them is evaluated.
    left = [len(texts), *(min(len(texts), stage.kept) for stage in self.parsed_stages[:-1])]
    counts = [len(t) for t in new_timesteps(self.parsed_stages)]
    progress, places = Progress("compared", len(self.labels) * sum(left), "images and classes"), []
    for start in range(0, len(self.labels), IMAGES):
      rows = np.arange(start, min(start + IMAGES, len(self.labels)))
      z = noise_errors.latents(params, base.Images(self.source, self.order[rows], inference.image_size))
      errors = functools.partial(noise_errors, params, c, z, seed=self.seed, places=rows, done=progress.add)
      outcome = classify(errors, self.parsed_stages, num_images=len(z), num_classes=len(texts))
      places.append(ranks(outcome, self.labels[rows]))
    return self.metrics(np.concatenate(places)) | {"evaluations_per_image": float(np.dot(left, counts))}


def read_stages(stages: Sequence[str]) -> tuple[Stage, ...]:
  """Read the stages, EVALUATIONS:KEPT each. Raises UserError: other ones."""
  try:
    parsed = tuple(Stage(*(int(number) for number in text.split(":"))) for text in stages)
    counts, kept = [stage.evaluations for stage in parsed], [stage.kept for stage in parsed]
    # Else two stages would be one, or the timesteps of a stage none of the last one's evenly spaced ones.
    in_order = counts == sorted({*counts}) and kept == sorted({*kept}, reverse=True) and kept[-1] == 1
    if in_order and all(0 < n <= NUM_TIMESTEPS and counts[-1] % n == 0 for n in counts):
      return parsed
  except (ValueError, TypeError, AttributeError, IndexError):  # of what is no text, or no stage
    pass
  raise UserError(
    f"stages is {','.join(map(str, stages))}; it should be EVALUATIONS:KEPT of each stage, such as 10:5,50:1."
    f" Evaluations increase, up to {NUM_TIMESTEPS}, and each number of them divides the last; fewer classes are kept"
    " after each stage, and one after the last"
  )


def timesteps(count: int) -> Int[np.ndarray, " s"]:
  """Return the middles of `count` equal parts of 0 ... T-1: those of Li et al.'s code, where `count` divides T."""
  return ((2 * np.arange(count) + 1) * NUM_TIMESTEPS // (2 * count)).astype(np.int32)


def new_timesteps(stages: Sequence[Stage]) -> list[Int[np.ndarray, " s"]]:
  """Return the timesteps that each stage adds: evenly spaced among the last stage's, without those that an earlier one
  had."""
  every, had, added = timesteps(stages[-1].evaluations), np.zeros(0, np.int32), []
  for stage in stages:
    apart = len(every) // stage.evaluations
    added.append(np.setdiff1d(every[apart // 2 :: apart], had))
    had = np.union1d(had, added[-1])
  return added


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The errors of each stage, image and class, and the stage in which each image left a class out. An error is the mean
  over the timesteps that the pair had by the end of the stage, infinite where the class was left out before."""

  error: Float[np.ndarray, "m n k"]
  stage: Int[np.ndarray, "n k"]


def classify(
  errors: Callable[..., Float[np.ndarray, "m s"]], stages: Sequence[Stage], *, num_images: int, num_classes: int
) -> Outcome:
  """Evaluate all images adaptively, as Li et al. do.

  Args:
    errors: (images=, classes=, t=) -> the error of each pair of an image and a class, by their numbers, at each t.
  """
  total = np.zeros((num_images, num_classes))
  outcome = Outcome(np.full((len(stages), *total.shape), np.inf), np.zeros(total.shape, np.int32))
  left = np.tile(np.arange(num_classes), (num_images, 1))
  count = 0
  for number, (stage, t) in enumerate(zip(stages, new_timesteps(stages), strict=True)):
    images = np.repeat(np.arange(num_images), left.shape[1])
    total[images, left.ravel()] += errors(images=images, classes=left.ravel(), t=t).sum(axis=1, dtype=np.float64)
    count += len(t)
    outcome.error[number, images, left.ravel()] = total[images, left.ravel()] / count
    outcome.stage[images, left.ravel()] = number
    # The best of a stage, in the classes' order. A NaN is the worst, as argsort has it.
    best = np.argsort(np.take_along_axis(outcome.error[number], left, axis=1), axis=1, kind="stable")[:, : stage.kept]
    left = np.take_along_axis(left, np.sort(best, axis=1), axis=1)
  return outcome


def ranks(outcome: Outcome, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Count the classes that come before each image's own, 0 is right: those that were kept longer, then those of less
  error.

  A tie counts against the image's own, and so does a NaN, as in `base.ranks`: also where the order of the classes kept
  it and left the other one out.
  """
  rows = np.arange(len(labels))
  stage = outcome.stage[rows, labels][:, None]
  # Both errors at the end of the stage in which the other class was left out.
  error = np.take_along_axis(outcome.error, outcome.stage[None], axis=0)[0]
  own = np.take_along_axis(outcome.error[:, rows, labels].T, outcome.stage, axis=1)
  kept_longer = (outcome.stage < stage) & (error != own) & ~np.isnan(own)
  worse = kept_longer | ((outcome.stage == stage) & (error > own))
  return (~worse).sum(axis=1) - 1  # itself is not worse than itself


class NoiseErrors:
  """‖ε − ε̂(z_t, t, c)‖² of pairs of an image and a class, and what it takes: three programs of an inference."""

  def __init__(self, inference: Any):
    self._inference = inference

  def latents(
    self, params: Mapping[str, Any], images: UInt8[np.ndarray, "n H W 3"] | Any
  ) -> Float[np.ndarray, "n h w c"]:
    """Return z of each image, by the posterior's mode."""
    latents = lambda model, images: model.encode_image(images).astype(jnp.float32)
    return self._inference.over_rows("latents", latents, params, images)

  def conditions(self, params: Mapping[str, Any], tokens: Int[np.ndarray, "k l"]) -> Float[Array, "k l d"]:
    """Return c of each prompt, whole on every device."""
    c = self._inference.over_rows("prompts", lambda model, tokens: model.encode_text(tokens).c, params, tokens)
    return sharding.replicated({"c": c}, self._inference.mesh)["c"]

  def __call__(
    self,
    params: Mapping[str, Any],
    c: Float[Array, "k l d"],
    z: Float[np.ndarray, "n h w c"],
    *,
    seed: int,
    places: Int[np.ndarray, " n"],
    images: Int[np.ndarray, " m"],
    classes: Int[np.ndarray, " m"],
    t: Int[np.ndarray, " s"],
    done: Callable[[int], object] = lambda count: None,
  ) -> Float[np.ndarray, "m s"]:
    """Return the mean square error at each t for each pair of an image and a class, given by their numbers in z and c.

    Noise is of seed, the image's place in its data set and t alone: neither of the class nor of the batch.
    """
    f = functools.partial(noise_errors, self._inference.network)
    whole = c, jax.random.key(seed), t.astype(np.int32)
    # z[images] would be as many copies of each latent as there are classes.
    latents = base.Rows(len(images), lambda rows: z[images[rows]])
    pairs = latents, places[images].astype(np.int32), classes.astype(np.int32)
    return self._inference.over_rows("noise errors", f, params, *pairs, whole=whole, done=done)


def noise_of(
  key: PRNGKeyArray, t: Int[Array, ""], *, places: Int[Array, "b"], network: Network
) -> Float[Array, "b h w c"]:
  """Return ε ~ N(0, I) of the images at these places in their data set."""
  at_t = jax.random.fold_in(key, t)
  return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(at_t, place), network.latent_shape))(places)


def noise_errors(
  network: Network,
  model: Any,
  c: Float[Array, "k l d"],
  key: PRNGKeyArray,
  t: Int[Array, "s"],
  z: Float[Array, "b h w c"],
  places: Int[Array, "b"],
  classes: Int[Array, "b"],
) -> Float[Array, "b s"]:
  """Return the mean of (ε − ε̂(z_t, t, c))² over an image's latent, at each t, f32. The label is nowhere in it."""
  condition = c[classes]

  def at(t: Int[Array, ""]) -> Float[Array, "b"]:
    # z_t = √ᾱ(t) z + √(1 − ᾱ(t)) ε
    noise, t_z = noise_of(key, t, places=places, network=network), jnp.full(len(z), t)
    z_t = schedules.add_noise(network.image_process, z, noise=noise, t=t_z)
    return losses.denoising(noise, model.generation(z_t=z_t, t_z=t_z, c=condition))

  # One after the other: all at once would take s times the memory.
  return jax.lax.map(at, t).T
