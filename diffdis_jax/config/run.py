"""One record of a run: every section of its config, read and checked once, at the top of each command."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffdis_jax.common import guesses
from diffdis_jax.config.data import ClassSampling, Data
from diffdis_jax.config.model import ClipModel, HeadSize, Model, read_model
from diffdis_jax.config.objectives import LABELLED, Objectives
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
from diffdis_jax.errors import UserError, check_number, check_type, read_section

MOST_STEPS = 2**31 - 1  # which a step's number, an int32, counts to
MOST_ROWS = 2**22  # of a global batch, far above any that was trained with
MOST_PIXELS = 8192  # a side of an image, of which one row of a batch then has 0.2 GB
_OF_ONE_TASK = dict(snr_gamma="generation", noised_image_share="discrimination", dispersive_weight="generation")
STEPS = ("num_steps", "log_every", "save_every", "eval_every", "sample_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run's config, field for field. Defaults are the paper's values, or this project's where the paper is silent.

  Attributes:
    seed: of all random choices.
    image_size: side of the square images, pixels.
    batch_size: images of a step, over all devices.
    num_steps: training steps of the whole run.
    objectives: what it is trained for, of objectives.TABLE.
    init_from: workdir of the run to take matching parameters from; empty for none.
    condition_timestep: t_z of the clean image in discrimination (appendix, Table 7), 0 to 1000.
    sample_posterior: latents are a sample of the autoencoder's posterior, or else its mode.
    long_tail: of a long-tailed run alone.
    log_every: steps between two lines of metrics; the last step has one too.
    save_every: steps between two checkpoints; the last step has one too.
    eval_every: steps between two evaluations while training; the last step has one too.
    sample_every: steps between two grids of generated images; the last step has one too.
    evals: data set -> task and its settings.
    train_evals: which of them to run every `eval_every` steps.
    sample_prompts: of the images that are generated every `sample_every` steps.

  Raises:
    UserError: a number out of its range, or fields that do not go together.
  """

  seed: int = 0
  image_size: int
  batch_size: int = 64
  num_steps: int = 1000
  objectives: Objectives = Objectives(("generation", "discrimination"))
  init_from: str = ""
  model: Model | ClipModel
  image_diffusion: ImageDiffusion = ImageDiffusion()
  text_diffusion: TextDiffusion = TextDiffusion()
  condition_timestep: int = 1000
  sample_posterior: bool = True
  loss: Loss = Loss()
  long_tail: LongTail | None = None
  optim: Optim = Optim()
  mesh: MeshShape = MeshShape()
  data: Data = Data()
  checkpoint: CheckpointPolicy = CheckpointPolicy()
  log_every: int = 50
  save_every: int = 1000
  eval_every: int = 1000
  sample_every: int = 1000
  evals: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  train_evals: Sequence[str] = ()
  sample_prompts: Sequence[str] = ()
  inference: Sampling = Sampling()

  def __post_init__(self) -> None:
    # Numbers first: what does not go together is said with numbers that are right by themselves.
    check_number("seed", self.seed, at_least=0, at_most=2**32 - 1)  # TrainState.seed is a u32
    for name in STEPS:
      check_number(name, getattr(self, name), at_least=1, at_most=MOST_STEPS)
    check_number("batch_size", self.batch_size, at_least=1, at_most=MOST_ROWS)
    check_number("condition_timestep", self.condition_timestep, at_least=0, at_most=1000)
    self._check_objectives()
    self._check_labelled()
    self._check_sizes()
    self._check_evals()

  @classmethod
  def of(cls, config: ConfigDict | Mapping[str, Any]) -> Run:
    """The record of a config.

    Raises:
      UserError: a field that is unknown or missing, of another type, or out of its range; or fields that do not go
        together.
    """
    fields = config.copy_and_resolve_references().to_dict() if isinstance(config, ConfigDict) else config
    # Fields and types first: of a missing field a dataclass would say what Python says of a missing argument.
    check_fields(fields)
    parts: dict[str, Any] = {name: read_section(kind, fields[name], name) for name, kind in _SECTIONS.items()}
    parts["objectives"] = Objectives(fields["objectives"])
    parts["objectives"].check()
    # After the objectives, which say whose network it has to be.
    parts["model"] = read_model(fields["model"], parts["objectives"])
    parts["data"] = Data.of(fields["data"])
    if "long_tail" in fields:
      parts["long_tail"] = read_section(LongTail, fields["long_tail"], "long_tail")
    return cls(**{**fields, **parts})

  def to_dict(self) -> dict[str, Any]:
    """The inverse of `of`, as config.json has it: without sections that this run does not have."""
    return _to_dict({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

  def replace(self, changes: Mapping[str, Any]) -> Run:
    """This with other values of some fields, by their dotted paths. Raises UserError: as `of`."""
    # By way of the fields, so that the changes are checked with all the rest.
    fields = self.to_dict()
    for path, value in changes.items():
      *sections, name = path.split(".")
      # One that this run does not have as well: whether there may be one is checked with the rest.
      section = functools.reduce(lambda section, each: section.setdefault(each, {}), sections, fields)
      section[name] = value
    return Run.of(fields)

  def trained_for(self, *names: str) -> Run:
    """This with these objectives alone, and what changes another one alone switched off. Raises UserError: as `of`."""
    lacking = {name for name, objective in _OF_ONE_TASK.items() if objective not in names}
    off: dict[str, Any] = {f"loss.{name}": 0.0 for name in lacking}
    return self.replace({"objectives": names, **off})

  def _check_objectives(self) -> None:
    """They go together, and with the other sections."""
    self.objectives.check()
    if self.objectives.is_clip and self.data.discrimination_view != "shared":
      raise UserError(
        f"data.discrimination_view is {self.data.discrimination_view!r}; objective {self.objectives[0]} has one view of"
        " an image, by data.augment, so leave it at 'shared'"
      )
    # Of a loss that is not there, a switch would be on and change nothing.
    for name, objective in _OF_ONE_TASK.items():
      if (value := getattr(self.loss, name)) and objective not in self.objectives:
        raise UserError(f"loss.{name} is {value}; it changes {objective} alone, which objectives lacks: leave it at 0")
    in_parts = self.optim.accumulate > 1 and self.optim.contrastive_batch == "whole"
    if in_parts and self.objectives.contrasts and not self.objectives.grad_cache:
      raise UserError(
        f"optim.accumulate is {self.optim.accumulate}; objective {self.objectives[0]} takes a batch whole: leave it at"
        " 1, or let each microbatch be a batch of its own by optim.contrastive_batch='microbatch'"
      )

    if in_parts and self.loss.dispersive_weight:
      raise UserError(
        f"optim.accumulate is {self.optim.accumulate}; loss.dispersive_weight takes a batch whole: leave it at 0, or"
        " let each microbatch be a batch of its own by optim.contrastive_batch='microbatch'"
      )

  def _check_labelled(self) -> None:
    """A run on labels has what it needs, and no other has it."""
    asked, sampling = self.objectives.labelled, self.data.sampling
    for name, section in (("long_tail", self.long_tail), ("data.sampling", sampling)):
      if (section is not None) != asked:
        raise UserError(
          f"objectives is {', '.join(self.objectives)}, and {name} is {'missing' if section is None else 'there'}; it"
          f" belongs to {' and '.join(LABELLED)}: take configs/places_lt.py or configs/shapes_lt.py"
        )
    if sampling is not None and sampling.sentences != self.objectives.first.sentences:
      raise UserError(
        f"data.sampling.sentences is {sampling.sentences}; class_contrastive needs sentences, and long_tail_head has"
        " its anchors instead"
      )

  def _check_sizes(self) -> None:
    """The network can take the images and the texts."""
    model = self.model
    check_number("image_size", self.image_size, at_least=1, at_most=MOST_PIXELS)
    if isinstance(model, ClipModel):
      tower = model.vision_encoder
      stride, pooled = tower.stride, ("vision_encoder", tower.spatial_pool, "tower's map")
      why = f"patches of {stride} px do not tile it"
    else:
      factor = model.autoencoder.factor
      # An autoencoder alone has no UNet, whose levels halve the latent further.
      stride = factor if self.objectives.is_autoencoder else factor * 2 ** (len(model.unet.widths) - 1)
      pooled = ("alignment", model.alignment.spatial_pool * self.objectives.aligned, "middle feature map")
      why = f"autoencoder and UNet together halve it down by {stride}"
    if self.image_size % stride:
      near = max(1, round(self.image_size / stride)) * stride
      raise UserError(f"image_size is {self.image_size}; {why}, so it must be a multiple of {stride}, such as {near}")
    (part, parts, what), side = pooled, self.image_size // stride
    if parts and side % parts:
      raise UserError(f"model.{part}.spatial_pool is {parts}; the {what} is {side} x {side}, so it must divide {side}")
    if not 2 <= self.data.max_length <= model.text_encoder.max_length:
      raise UserError(
        f"data.max_length is {self.data.max_length}; it must be from 2 to model.text_encoder.max_length,"
        f" {model.text_encoder.max_length}"
      )

  def _check_evals(self) -> None:
    """What is measured while it trains is there."""
    if missing := {*self.train_evals} - {*self.evals}:
      there = ", ".join(self.evals) or "none"
      raise UserError(f"train_evals names {', '.join(sorted(missing))}; evals has {there}")
    best = self.checkpoint.best_metric
    # A metric is named EVALUATION/METRIC (training/evaluator.py).
    if best and best.split("/")[0] not in self.train_evals:
      raise UserError(f"checkpoint.best_metric={best} should begin with one of train_evals, {self.train_evals}")
    if best and not best.partition("/")[2]:
      raise UserError(f"checkpoint.best_metric={best} names no metric; write it as {best.partition('/')[0]}/METRIC")


_SECTIONS = {
  "image_diffusion": ImageDiffusion,
  "text_diffusion": TextDiffusion,
  "loss": Loss,
  "optim": Optim,
  "mesh": MeshShape,
  "checkpoint": CheckpointPolicy,
  "inference": Sampling,
}
_ABSENT = {"long_tail", "sampling", "head"}  # sections that only some runs have, where this one has not
_FREE = "optim.rates"  # whose fields are named by optim.groups


def default_fields() -> dict[str, Any]:
  """Every field that a run has but those that it has to be given, `model` and `image_size`, with its default."""
  defaults = {}
  for field in dataclasses.fields(Run):
    if field.default is not dataclasses.MISSING:
      defaults[field.name] = field.default
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
  return _to_dict(defaults)


def check_fields(fields: Mapping[str, Any]) -> None:
  """Checks which fields there are, and their types; ranges are the sections' affair.

  Raises:
    UserError: a field is missing, unknown, of another type than its default, or of one that JSON does not have.
  """
  like = _like(fields)
  check_type("", fields, like)
  _check_there(fields, like, "", like)
  for name, section in fields["evals"].items():
    if "task" not in section:
      raise UserError(f"evals.{name}.task is missing; every config of a run has it")
    check_type(f"evals.{name}.task", section["task"], "")
  # Last: of a field whose type is known, its own check says more.
  for path, value in guesses.fields_of(fields).items():
    _check_plain(path, value)


def _check_plain(path: str, value: Any) -> None:
  """Raises UserError for what config.json cannot hold, as a config file may have it in `evals` and `data`."""
  if isinstance(value, Mapping):
    value = tuple(value.values())
  if isinstance(value, (tuple, list)):
    for each in value:
      _check_plain(path, each)
  elif not isinstance(value, (str, int, float, type(None))):
    raise UserError(
      f"{path} has {value!r}, which config.json cannot hold; give texts, numbers, True, False, None and sequences of"
      " them, such as str(...) of a path"
    )


def _like(fields: Mapping[str, Any]) -> dict[str, Any]:
  """A run's fields with their defaults: of the kind of network that these have, and with the optional sections that
  they have."""

  def there(section: str, name: str) -> bool:
    found = fields.get(section)
    return isinstance(found, Mapping) and name in found

  model = ClipModel() if there("model", "vision_encoder") else Model()
  # What has no default gets any value of its type, which is all that is compared.
  like = {**default_fields(), "image_size": 0, "model": _to_dict(model)}
  if there("model", "head"):
    like["model"]["head"] = _to_dict(HeadSize(classes=2, anchors=1))
  if there("data", "sampling"):
    like["data"]["sampling"] = _to_dict(ClassSampling(sentences=True))
  if "long_tail" in fields:
    like["long_tail"] = _to_dict(LongTail())
  return like


def _check_there(fields: Mapping[str, Any], like: Mapping[str, Any], prefix: str, whole: Mapping[str, Any]) -> None:
  """Every field of `like`, and no other. A section that is empty there has any, and `data` those of its source too.

  `whole`: what `like` is a section of, in which an unknown field is looked for.
  """
  for name, value in like.items():
    if name not in fields:
      raise UserError(f"{prefix}{name} is missing; every config of a run has it")
    if isinstance(value, Mapping) and value and f"{prefix}{name}" != _FREE:
      _check_there(fields[name], value, f"{prefix}{name}.", whole)
  for name in fields.keys() - like.keys() if prefix != "data." else ():
    guesses.check_key(whole, f"{prefix}{name}")


def _to_dict(value: Any) -> Any:
  """Sections as nested dicts, without the optional ones that are not there."""
  if isinstance(value, Data):
    return value.to_dict()
  if dataclasses.is_dataclass(value):
    value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {name: _to_dict(each) for name, each in value.items() if each is not None or name not in _ABSENT}
  # A ConfigDict lets no plain tuple take the place of an Objectives.
  return tuple(value) if isinstance(value, Objectives) else value
