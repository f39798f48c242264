"""Diffusion Classifier: an image's class is that whose prompt lets the network predict the noise best.

Source: Li et al., 2023, and Clark and Jaini, 2023; timesteps and stages as in Li et al.'s code. No head takes part, so
that a Stable Diffusion which was never trained here has a zero-shot figure too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffdis_jax.common.progress import Progress
from diffdis_jax.config.objectives import GENERATIVE
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.noise_errors import NoiseErrors
from diffdis_jax.evals.zero_shot import ZeroShot

STAGES = ("10:5", "50:1")
IMAGES = 1024  # whose latents are kept at a time


@dataclasses.dataclass(frozen=True)
class Stage:
  """The number of evaluations that each remaining class has had at a stage's end, and how many classes are then
  kept."""

  evaluations: int
  kept: int


class DiffusionClassifier:
  """Task `diffusion_classifier`: argmin over classes of E‖ε − ε̂(z_t, t, c)‖², by the generation pass alone.

  Timesteps are evenly spaced. Each has its own noise, which all classes share. In stages, classes with large errors are
  left out, and the others evaluated further. Source: Li et al., 2023.

  Args:
    data: section of a data source, as `data.sources.open_source` takes it.
    classnames: as for zero_shot.
    templates: as for zero_shot; of them one is used, see single_template.
    single_template: the template of the prompts; empty for the first of the templates.
    label_field: as for zero_shot.
    only_classes_present: leave out the class names that no record has.
    seen_classes: as for zero_shot.
    seen_split: as for zero_shot.
    stages: EVALUATIONS:KEPT of each, such as 10:5,50:1: the best 5 classes after 10 evaluations each are kept, and of
      these the best one after 50 is the answer.
    num_images: how many images to measure, the same ones each time; None for all.
    seed: seed of the noise, and of the shuffle.
    reduced_decoding: as for zero_shot.
    shuffle_labels: the leak test, as for zero_shot.

  Raises:
    UserError: as zero_shot, or stages that are none.
  """

  task = "zeroshot_classification"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    classnames: Sequence[str] | Mapping[str, str] | str = "",
    templates: Sequence[str] | str = "",
    single_template: str = "",
    label_field: str = "label",
    only_classes_present: bool = False,
    seen_classes: Sequence[str] | str = "",
    seen_split: str = "",
    stages: Sequence[str] = STAGES,
    num_images: int | None = None,
    seed: int = 0,
    reduced_decoding: bool = False,
    shuffle_labels: bool = False,
  ):
    self._stages = read_stages(stages)  # before the data, which take longer
    template = single_template or prompts.resolve_templates(templates)[0]
    # The head's own measurement, of the same images and the same prompt: it reads classes and labels for both.
    self.zero_shot = ZeroShot(
      data=data,
      classnames=classnames,
      templates=(template,),
      label_field=label_field,
      only_classes_present=only_classes_present,
      seen_classes=seen_classes,
      seen_split=seen_split,
      num_images=num_images,
      seed=seed,
      reduced_decoding=reduced_decoding,
      shuffle_labels=shuffle_labels,
    )
    self._template, self._seed, self._reduced_decoding = template, seed, reduced_decoding
    self._errors_of = functools.lru_cache(1)(NoiseErrors)  # in a run the inference is one, and compiled once

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    return {
      **self.zero_shot.protocol(inference),
      "stages": [f"{stage.evaluations}:{stage.kept}" for stage in self._stages],
      "timesteps": timesteps(self._stages[-1].evaluations).tolist(),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, acc5 and recalls as zero_shot has them, and evaluations_per_image, of the UNet; then head_acc1 and
    so on, and head_evaluations_per_image, where there is a trained head.

    Raises:
      UserError: a run that was not trained for generation.
    """
    if not inference.network.task.generates:
      raise UserError(f"diffusion_classifier measures {' or '.join(GENERATIVE)}, for which this run was not trained")
    names = self.zero_shot.classnames
    noise_errors = self._errors_of(inference)
    texts = [prompts.fill(self._template, name) for name in names]
    prompts.warn_of_long(tuple(texts), inference.max_length)
    c = noise_errors.conditions(params, Tokenizer(inference.max_length)(texts))
    labels, found = self.zero_shot.labels, []
    # How many classes of an image are left in each stage, and how often each of them is evaluated.
    left = [len(names), *(min(len(names), stage.kept) for stage in self._stages[:-1])]
    counts = [len(t) for t in new_timesteps(self._stages)]
    progress = Progress("compared", len(labels) * sum(left), "images and classes")
    for start in range(0, len(labels), IMAGES):
      rows = np.arange(start, min(start + IMAGES, len(labels)))
      shown = base.Images(
        self.zero_shot.source,
        self.zero_shot.order[rows],
        inference.image_size,
        reduced_decoding=self._reduced_decoding,
      )
      z = noise_errors.latents(params, shown)
      errors = functools.partial(noise_errors, params, c, z, seed=self._seed, places=rows, done=progress.add)
      found.append(ranks(classify(errors, self._stages, num_images=len(z), num_classes=len(names)), labels[rows]))
    metrics = self.zero_shot.metrics(np.concatenate(found))
    metrics["evaluations_per_image"] = float(np.dot(left, counts))
    if inference.aligned:
      head = self.zero_shot.run(inference, params)
      how = inference.sampling
      cheap = how.steps * how.num_noise_samples * (1 if how.guidance == 1 else 2)
      metrics |= {f"head_{name}": head[name] for name in metrics if name in head}
      metrics["head_evaluations_per_image"] = float(cheap)
    return metrics


def read_stages(stages: Sequence[str]) -> tuple[Stage, ...]:
  """Read the stages, EVALUATIONS:KEPT each.

  Raises:
    UserError: no stage, another form, counts that do not increase or of which the last is no multiple, or a last stage
      that keeps more than one class.
  """
  try:
    found = tuple(Stage(*(int(number) for number in text.split(":"))) for text in stages)
  except (ValueError, TypeError, AttributeError):  # the last of what is no text
    found = ()
  form = f"stages is {','.join(map(str, stages))}; it should be EVALUATIONS:KEPT of each stage, such as 10:5,50:1"
  if not found:
    raise UserError(form)
  counts, kept = [stage.evaluations for stage in found], [stage.kept for stage in found]
  # Else two stages would be one, and the timesteps of a stage none of the last one's evenly spaced ones.
  if counts != sorted({*counts}) or counts[0] < 1 or any(counts[-1] % count for count in counts):
    raise UserError(f"{form}: evaluations increase, and each number of them divides the last")
  if kept != sorted({*kept}, reverse=True) or kept[-1] != 1:
    raise UserError(f"{form}: fewer classes are kept after each stage, and one after the last")
  if counts[-1] > NUM_TIMESTEPS:
    raise UserError(f"{form}, with at most {NUM_TIMESTEPS} evaluations, one a timestep")
  return found


def timesteps(count: int) -> Int[np.ndarray, " s"]:
  """Return the middles of `count` equal parts of 0 ... T-1: those of Li et al.'s code, where `count` divides T."""
  return ((2 * np.arange(count) + 1) * NUM_TIMESTEPS // (2 * count)).astype(np.int32)


def new_timesteps(stages: Sequence[Stage]) -> list[Int[np.ndarray, " s"]]:
  """Return the timesteps that each stage adds: evenly spaced among the last stage's, without those that an earlier one
  had."""
  every, had, found = timesteps(stages[-1].evaluations), np.zeros(0, np.int32), []
  for stage in stages:
    apart = len(every) // stage.evaluations
    found.append(np.setdiff1d(every[apart // 2 :: apart], had))
    had = np.union1d(had, found[-1])
  return found


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
  found = Outcome(np.full((len(stages), *total.shape), np.inf), np.zeros(total.shape, np.int32))
  left = np.tile(np.arange(num_classes), (num_images, 1))
  count = 0
  for number, (stage, t) in enumerate(zip(stages, new_timesteps(stages), strict=True)):
    images = np.repeat(np.arange(num_images), left.shape[1])
    total[images, left.ravel()] += errors(images=images, classes=left.ravel(), t=t).sum(axis=1, dtype=np.float64)
    count += len(t)
    found.error[number, images, left.ravel()] = total[images, left.ravel()] / count
    found.stage[images, left.ravel()] = number
    # The best of a stage, in the classes' order. A NaN is the worst, as argsort has it.
    best = np.argsort(np.take_along_axis(found.error[number], left, axis=1), axis=1, kind="stable")[:, : stage.kept]
    left = np.take_along_axis(left, np.sort(best, axis=1), axis=1)
  return found


def ranks(found: Outcome, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Count the classes that come before each image's own, 0 is right: those that were kept longer, then those of less
  error.

  A tie counts against the image's own, and so does a NaN, as in `base.ranks`: also where the order of the classes kept
  it and left the other one out.
  """
  rows = np.arange(len(labels))
  stage = found.stage[rows, labels][:, None]
  # Both errors at the end of the stage in which the other class was left out.
  error = np.take_along_axis(found.error, found.stage[None], axis=0)[0]
  own = np.take_along_axis(found.error[:, rows, labels].T, found.stage, axis=1)
  kept_longer = (found.stage < stage) & (error != own) & ~np.isnan(own)
  worse = kept_longer | ((found.stage == stage) & (error > own))
  return (~worse).sum(axis=1) - 1  # itself is not worse than itself
