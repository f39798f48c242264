"""Define the record of a run: every section of its config, read and checked once, at the start of each command."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffdis_jax.common import guesses
from diffdis_jax.config import section
from diffdis_jax.config.data import Data
from diffdis_jax.config.model import ClipModel, Model, network_of
from diffdis_jax.config.objectives import LABELLED, TABLE, WITH_HEAD, Objective, task_of
from diffdis_jax.config.section import Section, check_type, choice, field, number
from diffdis_jax.config.sections import (
  CheckpointPolicy,
  ImageDiffusion,
  LongTail,
  Loss,
  MeshShape,
  Optim,
  Sampling,
  TextDiffusion,
)
from diffdis_jax.errors import UserError

MOST_STEPS = 2**31 - 1  # a step's number is an int32
MOST_ROWS = 2**22  # rows of a global batch, far above any known training
MOST_PIXELS = 8192  # pixels a side of an image; one row of a batch then takes 0.2 GB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Section):
  """The config of a run, field by field. Defaults are the paper's values, or this project's if the paper states none.

  Raises:
    UserError: a number is out of its range, or fields contradict each other.
  """

  seed: int = number(0, ge=0, le=2**32 - 1, help="seed of all random choices")  # TrainState.seed is a u32
  image_size: int = number(ge=1, le=MOST_PIXELS, help="side of the square images, pixels")
  batch_size: int = number(64, ge=1, le=MOST_ROWS, help="images of a step, over all devices")
  num_steps: int = number(1000, ge=1, le=MOST_STEPS, help="training steps of the whole run")
  objectives: tuple[str, ...] = choice(("generation", "discrimination"), TABLE, help="what the run is trained for")
  init_from: str = field(
    "", help="workdir of the run to take matching parameters from, or config:NAME:args to train that first; or empty"
  )
  model: Model | ClipModel = field(kind=network_of)
  image_diffusion: ImageDiffusion = field(ImageDiffusion())
  text_diffusion: TextDiffusion = field(TextDiffusion())
  condition_timestep: int = number(
    1000, ge=0, le=1000, help="t_z of the clean image in discrimination (appendix, Table 7)"
  )
  sample_posterior: bool = field(True, help="latents are a sample of the autoencoder's posterior, or else its mode")
  loss: Loss = field(Loss())
  long_tail: LongTail | None = field(None, kind=LongTail)
  optim: Optim = field(Optim())
  mesh: MeshShape = field(MeshShape())
  data: Data = field(Data())
  checkpoint: CheckpointPolicy = field(CheckpointPolicy())
  # All of these also happen at the last step.
  log_every: int = number(50, ge=1, le=MOST_STEPS, help="steps between two lines of metrics")
  save_every: int = number(1000, ge=1, le=MOST_STEPS, help="steps between two checkpoints")
  eval_every: int = number(1000, ge=1, le=MOST_STEPS, help="steps between two evaluations while training")
  sample_every: int = number(1000, ge=1, le=MOST_STEPS, help="steps between two grids of generated images")
  evals: Mapping[str, Mapping[str, Any]] = field({}, help="data set -> task and its settings")
  train_evals: Sequence[str] = field((), help="the data sets of `evals` that run every `eval_every` steps")
  sample_prompts: Sequence[str] = field((), help="prompts of the images generated every `sample_every` steps")
  inference: Sampling = field(Sampling())

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_task(self)
    _check_sizes(self)
    for name, settings in self.evals.items():
      if "task" not in settings:
        raise UserError(f"evals.{name}.task is missing; every config of a run has it")
      check_type(f"evals.{name}.task", settings["task"], "")
    if missing := {*self.train_evals} - {*self.evals}:
      raise UserError(f"train_evals names {', '.join(sorted(missing))}; evals has {', '.join(self.evals) or 'none'}")
    # A metric is named EVALUATION/METRIC (training/evaluator.py).
    evaluation, _, metric = (best := self.checkpoint.best_metric).partition("/")
    if best and not (evaluation in self.train_evals and metric):
      raise UserError(f"checkpoint.best_metric={best} should be NAME/METRIC, of one of train_evals, {self.train_evals}")

  @classmethod
  def of(cls, config: ConfigDict | Mapping[str, Any]) -> Run:
    """Return the record of a config.

    Raises:
      UserError: a field is unknown, missing, of another type, or out of its range; or fields contradict each other.
    """
    fields = config.copy_and_resolve_references().to_dict() if isinstance(config, ConfigDict) else config
    run = section.read_section(cls, fields, "", whole=True, known=known_fields)
    for path, value in guesses.fields_of(fields).items():
      try:
        json.dumps(value)
      except (TypeError, ValueError) as error:
        raise UserError(
          f"{path} has {value!r}, which config.json cannot hold; give texts, numbers, True, False, None and sequences"
        ) from error
    return run

  def to_dict(self) -> dict[str, Any]:
    """Return what `of` reads, as in config.json: without the sections that this run does not have."""
    return copy.deepcopy(section.to_dict(self))

  def replace(self, changes: Mapping[str, Any]) -> Run:
    """Return a record with other values of some fields, by their dotted paths. Raises UserError as `of` does."""
    # Go through the fields, so that the changes are checked together with all others.
    fields = self.to_dict()
    for path, value in changes.items():
      *sections, name = path.split(".")
      # Also a section that this run does not have: `of` checks whether it may have one.
      functools.reduce(lambda inner, name: inner.setdefault(name, {}), sections, fields)[name] = value
    return Run.of(fields)

  def trained_for(self, *names: str) -> Run:
    """Return a record with these objectives, without switches of other objectives. Raises UserError as `of` does."""
    off = {} if "generation" in names else {"loss.snr_gamma": 0.0}
    return self.replace({"objectives": names, **off})

  @property
  def task(self) -> Objective:
    """Return what the objectives require together."""
    return task_of(self.objectives)


def _check_task(run: Run) -> None:
  """Check that the objectives fit each other and the other sections."""
  task, names, is_clip = run.task, ", ".join(run.objectives), isinstance(run.model, ClipModel)
  if task.network == "clip" and not is_clip:
    raise UserError(
      f"model has no vision_encoder, which objective {names} trains; take a config of CLIP, such as clip_cc3m"
    )
  if is_clip and task.network not in ("clip", "either"):
    raise UserError("model has a vision_encoder, which is CLIP's; its one objective is objectives=('contrastive',)")
  if task.network == "clip" and run.data.discrimination_view != "shared":
    raise UserError(
      f"data.discrimination_view is {run.data.discrimination_view!r}; objective {names} has one view of an image, by"
      " data.augment, so leave it at 'shared'"
    )
  for name, value, needed, owners in (
    ("model.head", run.model.head, task.head, WITH_HEAD),
    ("long_tail", run.long_tail, task.labelled, LABELLED),
    ("data.sampling", run.data.sampling, task.labelled, LABELLED),
  ):
    if (value is not None) != needed:
      raise UserError(
        f"objectives is {names}, and {name} is {'missing' if needed else 'there'}; it belongs to"
        f" {' and '.join(owners)}: take configs/places_lt.py"
      )
  if run.data.sampling is not None and run.data.sampling.sentences != task.sentences:
    raise UserError(
      f"data.sampling.sentences is {run.data.sampling.sentences}; class_contrastive needs sentences, and long_tail_head"
      " has its anchors instead"
    )
  # Without its loss, the switch would be on and change nothing.
  if run.loss.snr_gamma and "generation" not in run.objectives:
    raise UserError(
      f"loss.snr_gamma is {run.loss.snr_gamma}; it changes generation alone, which objectives lacks: leave it at 0"
    )
  if run.optim.accumulate > 1 and run.optim.contrastive_batch == "whole" and task.contrasts and not task.grad_cache:
    raise UserError(
      f"optim.accumulate is {run.optim.accumulate}; objective {names} takes a batch whole: leave it at 1, or let each"
      " microbatch be a batch of its own by optim.contrastive_batch='microbatch'"
    )


def _check_sizes(run: Run) -> None:
  """Check that the network can take the images and the texts."""
  model = run.model
  if isinstance(model, ClipModel):
    stride, part, parts, what = model.vision_encoder.stride, "vision_encoder", model.vision_encoder.spatial_pool, "map"
    why = f"patches of {stride} px do not tile it"
  else:
    # An autoencoder alone has no UNet, whose levels halve the latent further.
    levels = 1 if run.task.network == "autoencoder" else len(model.unet.widths)
    stride = model.autoencoder.factor * 2 ** (levels - 1)
    part, parts, what = "alignment", model.alignment.spatial_pool * run.task.aligned, "middle feature map"
    why = f"autoencoder and UNet together halve it down by {stride}"
  if run.image_size % stride:
    near = max(1, round(run.image_size / stride)) * stride
    raise UserError(f"image_size is {run.image_size}; {why}, so it must be a multiple of {stride}, such as {near}")
  side = run.image_size // stride
  if parts and side % parts:
    raise UserError(f"model.{part}.spatial_pool is {parts}; the {what} is {side} x {side}, so it must divide {side}")
  longest = model.text_encoder.max_length
  if not 2 <= run.data.max_length <= longest:
    raise UserError(
      f"data.max_length is {run.data.max_length}; it must be from 2 to model.text_encoder.max_length, {longest}"
    )


def known_fields() -> list[str]:
  """List the dotted paths of all fields that DiffDis' configs have."""
  return [*guesses.fields_of(Run(image_size=512, model=Model()).to_dict())]


def default_fields() -> dict[str, Any]:
  """Return all fields of a run's config with their defaults, but `model` and `image_size`, which have none."""
  # Any values will do for these two, which are removed again.
  fields = Run(image_size=512, model=Model()).to_dict()
  return {name: value for name, value in fields.items() if name not in ("image_size", "model")}
