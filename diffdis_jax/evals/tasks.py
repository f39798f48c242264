"""The table of tasks: what a run can be measured by, what each needs, and its settings, of which evaluate has flags."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import flags

from diffdis_jax.common.guesses import did_you_mean
from diffdis_jax.config.objectives import ALIGNED, COMPARING, DENOISING, GENERATIVE
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals.base import Evaluation
from diffdis_jax.evals.diffusion_classifier import DiffusionClassifier
from diffdis_jax.evals.fid import Fid
from diffdis_jax.evals.generation_accuracy import GenerationAccuracy
from diffdis_jax.evals.held_out_loss import HeldOutLoss
from diffdis_jax.evals.linear_probe import LinearProbe
from diffdis_jax.evals.long_tail import LongTail
from diffdis_jax.evals.query_use import QueryUse
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.zero_shot import ZeroShot


@dataclasses.dataclass(frozen=True)
class Task:
  """A row of TASKS."""

  evaluation: type[Evaluation]  # its fields are the settings of the task, those that a flag can give its flags
  needs: Sequence[str]  # objectives, of which a run must have been trained for one; none: any run will do
  generates: bool = False  # it generates images, on which `generation_steps` and `generation_guidance` have an effect
  compares: bool = True  # it denoises text queries, on which the other fields of Sampling have an effect
  on_sets_of: str = ""  # another task, on whose sets of a config it is measured where the config has none for it

  def fits(self, objectives: Collection[str]) -> bool:
    """Return whether a run with these objectives can be measured."""
    return not self.needs or bool({*self.needs} & {*objectives})


TASKS = {
  "zero_shot": Task(ZeroShot, ALIGNED),
  "retrieval": Task(Retrieval, ALIGNED),
  "generation_accuracy": Task(GenerationAccuracy, GENERATIVE, generates=True),
  "fid": Task(Fid, GENERATIVE, generates=True),
  "held_out_loss": Task(HeldOutLoss, (*GENERATIVE, *COMPARING), compares=False),
  "long_tail": Task(LongTail, ALIGNED),
  "diffusion_classifier": Task(DiffusionClassifier, GENERATIVE, compares=False, on_sets_of="zero_shot"),
  "query_use": Task(QueryUse, DENOISING, on_sets_of="zero_shot"),
  "linear_probe": Task(LinearProbe, (*GENERATIVE, *ALIGNED)),  # an autoencoder alone has no features
}

# The name of a type in a field's annotation -> the types of a value, in words, and its flag.
KINDS: dict[str, tuple[Any, str, Any]] = {
  "str": (str, "a text", flags.DEFINE_string),
  "int": (int, "a whole number", flags.DEFINE_integer),
  "float": (int | float, "a number", flags.DEFINE_float),
  "bool": (bool, "True or False", flags.DEFINE_boolean),
  "Sequence": (list | tuple, "a list", flags.DEFINE_list),
  "Mapping": (Mapping, "a section of fields", None),
  "None": (types.NoneType, "None", None),
}


def get(task: str) -> Task:
  """Return the row of a task. Raises UserError: there is none of this name."""
  if task not in TASKS:
    raise UserError(f"unknown task {task!r}; {did_you_mean(task, TASKS)}")
  return TASKS[task]


def settings_of(task: str) -> dict[str, dataclasses.Field[Any]]:
  """Return the settings of a task that a flag can give. Raises UserError: no such task."""
  return {setting.name: setting for setting in dataclasses.fields(get(task).evaluation) if _define(setting)}


def _kinds(setting: dataclasses.Field[Any]) -> list[str]:
  """Return the keys of KINDS that a setting's annotation has."""
  return [part.partition("[")[0] for part in str(setting.type).split(" | ")]


def _define(setting: dataclasses.Field[Any]) -> Any:
  """Return what defines the flag of a setting; None for an object, which no flag can give."""
  # A text is how a flag gives whatever can be a text: the path of a JSON file instead of a list, say.
  return next((define for kind, (_, _, define) in KINDS.items() if define and kind in _kinds(setting)), None)


def all_settings() -> list[str]:
  """Return the names of the settings of all tasks that a flag can give."""
  return [*dict.fromkeys(name for task in TASKS for name in settings_of(task))]


def define_flags(others: Mapping[str, dataclasses.Field[Any]] = types.MappingProxyType({})) -> None:
  """Define a flag for each setting, and for these `others`. It is None where it is not given; its help says what it is
  for each task."""
  for name, setting in others.items():
    _define(setting)(name, None, setting.metadata["help"])
  for name in all_settings():
    settings = {task: known[name] for task in TASKS if name in (known := settings_of(task))}
    helps: dict[str, list[str]] = {}
    for task, setting in settings.items():
      helps.setdefault(setting.metadata["help"], []).append(task)
    text = "; ".join(help if len(helps) == 1 else f"{', '.join(names)}: {help}" for help, names in helps.items())
    _define(next(iter(settings.values())))(name, None, text)


def check_objectives(what: str, task: str, objectives: Collection[str]) -> None:
  """Raise UserError for an evaluation, named by `what`, of what these objectives do not train."""
  if not get(task).fits(objectives):
    raise UserError(
      f"{what}, whose task {task} measures {' or '.join(dict.fromkeys(TASKS[task].needs))}; the run's objectives are"
      f" {', '.join(objectives)}: leave it out"
    )


def check(task: str, **settings: Any) -> None:
  """Check the name and the settings of a task; no data are opened. Raises UserError: an unknown name, or a setting of
  another type."""
  known = {setting.name: setting for setting in dataclasses.fields(get(task).evaluation)}
  for name, value in settings.items():
    if name not in known:
      raise UserError(f"evaluation {task} has no setting {name!r}; {did_you_mean(name, known)}")
    kinds = _kinds(known[name])
    # A whole number is no bool, though Python says so.
    if not any(isinstance(value, KINDS[kind][0]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds):
      words = " or ".join(KINDS[kind][1] for kind in kinds)
      raise UserError(f"evaluation {task}: {name} is {value!r}; it must be {words}")
  if "data" not in settings and "data" in known and "None" not in _kinds(known["data"]):
    raise UserError(f"evaluation {task} has no data; give the section of a data source")
  if settings.get("data") is not None:
    try:
      inspect.signature(sources.open_source).bind(**settings["data"])
    except TypeError as error:
      raise UserError(f"data of evaluation {task}: {error}") from error


def create(task: str, **settings: Any) -> Evaluation:
  """Create the evaluation of this name. Raises UserError: no such task, or settings or data that it refuses."""
  check(task, **settings)
  return TASKS[task].evaluation(**settings)


@dataclasses.dataclass(frozen=True)
class Section:
  """A task on a data set."""

  dataset: str  # the name under which its record is kept
  task: str  # one of TASKS
  settings: Mapping[str, Any]  # of the task

  def create(self) -> Evaluation:
    """Create the evaluation. Raises UserError: no such task, or settings or data that it refuses."""
    return create(self.task, **self.settings)


def of_config(sets: Mapping[str, Any], *, tasks: Sequence[str] | None) -> list[Section]:
  """Return those sets of a run's config, its `evals`, that are of `tasks`, or all.

  Raises UserError: there is none, or none for one of the tasks.
  """
  sections = [
    Section(dataset, section["task"], {name: value for name, value in section.items() if name != "task"})
    for dataset, section in sets.items()
  ]
  if not sections:
    raise UserError("the run's config names no data set to measure on; give --data and --split")
  own = sorted({section.task for section in sections})
  for task in tasks or own:
    lender = get(task).on_sets_of
    if task not in own and lender in own:
      taken = {"data", *settings_of(task)}
      sections += [
        Section(section.dataset, task, {name: value for name, value in section.settings.items() if name in taken})
        for section in sections
        if section.task == lender
      ]
    elif task not in own:
      raise UserError(f"the run's config has no data set for {task}, only for {', '.join(own)}; give --data, --split")
  return [section for section in sections if section.task in (tasks or own)]


def of_folder(folder: str, split: str | None, *, tasks: Sequence[str], image_size: int) -> list[Section]:
  """Return each task on one split of a prepared folder. Raises UserError: no split, or a task that takes no such
  data."""
  if not split:
    raise UserError("--data needs --split, the name of one of its splits")
  # It needs sentences and training counts, which no prepared folder has.
  if "long_tail" in [task for task in tasks if get(task)]:
    raise UserError("long_tail is measured on the set that the run's config names; leave out --data")
  data = {"name": "pairs", "path": folder, "split": split, "image_size": image_size}
  return [Section(f"{pathlib.Path(folder).name}/{split}", task, {"data": data}) for task in tasks]


def resized(sets: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
  """Return a config's `evals` for images of another size: data of the run's own size before have the new one."""
  changed = {}
  for name, section in sets.items():
    data = section.get("data")
    is_own = isinstance(data, Mapping) and data.get("image_size") == before
    changed[name] = {**section, "data": {**data, "image_size": after}} if is_own else section
  return changed


def override(sections: Sequence[Section], settings: Mapping[str, Any]) -> list[Section]:
  """Return the sections with these settings in place, wherever the task has them.

  Raises UserError: a task is unknown, a setting has no effect on any section, or one reference is given for several
  sets.
  """
  taken = {section.task: settings_of(section.task) for section in sections}
  # A flag that no evaluation takes is a slip; one that some take and others do not is meant for those.
  for name in settings:
    if not any(name in known for known in taken.values()):
      raise UserError(f"--{name} has no effect on these tasks; leave it out")
  own = lambda task: {name: value for name, value in settings.items() if name in taken[task]}
  changed = [dataclasses.replace(section, settings={**section.settings, **own(section.task)}) for section in sections]
  # Statistics are of one set's real images. A second set would be compared with the first one's.
  references = [section.settings["reference"] for section in changed if section.settings.get("reference")]
  if len(set(references)) < len(references):
    raise UserError(f"--reference={references[0]} is of one data set, and fid is measured on several; give --data")
  return changed
