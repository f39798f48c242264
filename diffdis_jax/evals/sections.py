"""Choose the sections of evaluations to measure, out of a run's config or a prepared folder, and change them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.errors import UserError
from diffdis_jax.evals import registry
from diffdis_jax.evals.base import Eval


@dataclasses.dataclass(frozen=True)
class Section:
  """An evaluation on a data set.

  Attributes:
    dataset: the name under which its record is kept.
    task: of the evaluation, one of `registry.EVALS`.
    settings: what the evaluation takes.
  """

  dataset: str
  task: str
  settings: Mapping[str, Any]

  def create(self) -> Eval:
    """Create the evaluation. Raises UserError: no such task, or settings or data that it refuses."""
    return registry.create(self.task, **self.settings)

  def changed(self, **settings: Any) -> Section:
    """Return the same section with other settings."""
    return dataclasses.replace(self, settings={**self.settings, **settings})


def of_config(sets: Mapping[str, Any], *, tasks: Sequence[str] | None) -> list[Section]:
  """Return those sets of a run's config, its `evals`, that are of `tasks`, or all.

  Raises:
    UserError: there is none, or none for one of the tasks.
  """
  found = [
    Section(dataset, section["task"], {name: value for name, value in section.items() if name != "task"})
    for dataset, section in sets.items()
  ]
  named = sorted({section.task for section in found})
  if not found:
    raise UserError("the run's config names no data set to measure on; give --data and --split")
  for task in tasks or ():
    registry.check_task(task)
    if task not in named and (lender := registry.ON_THE_SETS_OF.get(task)) in named:
      found += [_lent(section, task) for section in found if section.task == lender]
  named = sorted({section.task for section in found})
  for task in tasks or named:
    registry.check_task(task)
    if task not in named:
      raise UserError(f"the run's config has no data set for {task}, only for {', '.join(named)}; give --data, --split")
  return [section for section in found if section.task in (tasks or named)]


def resized(sets: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
  """Return a config's `evals` for images of another size: data of the run's own size before have the new one."""
  found = {}
  for name, section in sets.items():
    data = section.get("data")
    is_own = isinstance(data, Mapping) and data.get("image_size") == before
    found[name] = {**section, "data": {**data, "image_size": after}} if is_own else section
  return found


def _lent(section: Section, task: str) -> Section:
  """Return another task on the same set, with those of its settings that this task has too."""
  known = {"data", *registry.settings_of(task)}
  return Section(section.dataset, task, {name: value for name, value in section.settings.items() if name in known})


def of_folder(folder: str, split: str | None, *, tasks: Sequence[str], image_size: int) -> list[Section]:
  """Return each task on one split of a prepared folder.

  Raises:
    UserError: no split, or a task that there is not or that takes no such data.
  """
  if not split:
    raise UserError("--data needs --split, the name of one of its splits")
  for task in tasks:
    registry.check_task(task)
  # It needs sentences and training counts, which no prepared folder has.
  if "long_tail" in tasks:
    raise UserError("long_tail is measured on the set that the run's config names; leave out --data")
  data = {"name": "pairs", "path": folder, "split": split, "image_size": image_size}
  return [Section(f"{pathlib.Path(folder).name}/{split}", task, {"data": data}) for task in tasks]


def override(sections: Sequence[Section], settings: Mapping[str, Any]) -> list[Section]:
  """Return the sections with these settings in place, wherever the task has them.

  Raises:
    UserError: a task is unknown, or a setting has no effect on any section.
  """
  of_tasks = {section.task: registry.settings_of(section.task) for section in sections}
  # A flag that no evaluation takes is a slip; one that some take and others do not is meant for those.
  for name in settings:
    if not any(name in known for known in of_tasks.values()):
      raise UserError(f"--{name} has no effect on these tasks; leave it out")
  return [
    section.changed(**{name: value for name, value in settings.items() if name in of_tasks[section.task]})
    for section in sections
  ]


def with_parts(sections: Sequence[Section], out: str) -> list[Section]:
  """Return the sections with a folder for what fid samples: its own `parts`, or else one beside `out`, or none where
  `parts` is empty; of several sets, each has a folder in it.

  Raises:
    UserError: several sets, but one file of statistics.
  """
  of_fid = [section.settings for section in sections if section.task == "fid"]
  # Statistics are of one set's real images. A second set would be compared with the first one's.
  references = [settings["reference"] for settings in of_fid if settings.get("reference")]
  if len(set(references)) < len(references):
    raise UserError(f"--reference={references[0]} is of one data set, and fid is measured on several; give --data")
  several, changed = len(of_fid) > 1, []
  for section in sections:
    if section.task == "fid":
      folder = section.settings.get("parts", f"{out.removesuffix('.json')}.parts")
      # One folder would mix the parts of two sets, which begin with the same numbers.
      name = re.sub(r"[^\w.-]+", "-", section.dataset)
      section = section.changed(parts=f"{folder}/{name}" if several and folder else folder)
    changed.append(section)
  return changed
