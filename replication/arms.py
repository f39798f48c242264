"""Read a preregistered experiment: its arms, which may start from each other, and their comparisons.

Its file has a `get_config`, like the config of a run. replication/configs/experiments.py is one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.ablate import plan, tables
from diffdis_jax.ablate.tables import Row, Table
from diffdis_jax.common import cli
from diffdis_jax.config.section import check_number, read_section
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from replication.claims import Claim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One of the `arms` of such a file.

  Attributes:
    name: name of the row, and part of the names of its runs.
    args: arguments that are appended to those of the base, such as `objectives=generation`.
    changes: fields of the config that differ, nested as they are there.
    start: the arm whose run of the same seed is the start; by default the base's own start.
    minutes: minutes of training on one core, which give `num_steps` by `step_seconds`; None for the config's steps.
    speed: key of `step_seconds`; by default its objectives, joined with "+".
    measured: True for a row of the table, False for a start only.
  """

  name: str
  args: str = ""
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  start: str = ""
  minutes: float | None = None
  speed: str = ""
  measured: bool = True

  def __post_init__(self) -> None:
    if self.minutes is not None:
      check_number("minutes", self.minutes, gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """The experiment that such a file describes.

  Attributes:
    title: the question.
    arms: the arms, each with the fields of `Arm`.
    step_seconds: seconds of a training step on one core, by the arms' `speed`; needed if an arm has `minutes`.
    claims: the comparisons, each with the fields of `claims.Claim`.
  """

  title: str
  arms: Sequence[Mapping[str, Any]]
  step_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  claims: Sequence[Mapping[str, Any]] = ()

  def __post_init__(self) -> None:
    for speed, seconds in self.step_seconds.items():
      check_number(f"step_seconds.{speed}", seconds, gt=0)


@dataclasses.dataclass(frozen=True)
class Read:
  """The table of the arms, and the comparisons in it."""

  table: Table
  claims: tuple[Claim, ...]


def read(path: str, *, base: str, overrides: Mapping[str, Any]) -> Read:
  """Read the experiment of FILE.py[:args].

  Args:
    path: path of the experiment.
    base: FILE.py[:args] of the config that all arms change.
    overrides: dotted path -> value of the base's fields that the command line sets.

  Raises:
    UserError: no such file; an unknown field, arm, row or column; arms that start from each other in a circle; or no
      speed for an arm with minutes.
  """
  fields = cli.read_config(path, "arms").to_dict()
  experiment = read_section(Experiment, fields, f"--arms={path}")
  arms = {arm.name: arm for arm in (read_section(Arm, fields, "arms") for fields in experiment.arms)}
  if len(arms) < len(experiment.arms):
    raise UserError(f"--arms={path} has arms of one name; there are {', '.join(arms)}")
  rows: dict[str, Row] = {}

  def row(name: str, behind: tuple[str, ...] = ()) -> Row:
    if name not in arms:
      raise UserError(f"arm {behind[-1]} starts from {name!r}; there are {', '.join(arms)}")
    if name in behind:
      raise UserError(f"arms start from each other: {' from '.join((*behind, name))}; one has to be the first")
    if name not in rows:
      arm = arms[name]
      start = row(arm.start, (*behind, name)) if arm.start else None
      rows[name] = _row(arm, start, base=base, overrides=overrides, step_seconds=experiment.step_seconds)
    return rows[name]

  measured = tuple(line for line in map(row, arms) if line.measured)
  if not measured:
    raise UserError(f"--arms={path} has no arm that is measured")
  claims = tuple(read_section(Claim, fields, "claims") for fields in experiment.claims)
  _check(claims, measured)
  file, _, argument = path.partition(":")  # the form that `read_config` reads
  # Use the name instead of the path, since tables.json is published.
  name = argument or pathlib.PurePath(file).stem
  return Read(Table(name=name, title=experiment.title, rows=measured, base=None), claims)


def _row(
  arm: Arm, start: Row | None, *, base: str, overrides: Mapping[str, Any], step_seconds: Mapping[str, float]
) -> Row:
  file, _, args = base.partition(":")
  config = cli.read_config(f"{file}:{','.join(filter(None, (args, arm.args)))}").to_dict()
  changes = workdir.flatten(arm.changes)
  if "seed" in changes:
    raise UserError(f"arm {arm.name} has a seed, which has no effect: all arms have those of --seeds; leave it out")
  if arm.minutes is not None:
    if "num_steps" in changes:
      raise UserError(f"arm {arm.name} has minutes and num_steps; leave out one of them")
    speed = arm.speed or "+".join(changes.get("objectives", config["objectives"]))
    if speed not in step_seconds:
      raise UserError(f"arm {arm.name} has minutes, and step_seconds has no {speed!r}; measure and add it")
    changes["num_steps"] = round(60 * arm.minutes / step_seconds[speed])
  own = tables.changed(config, overrides)
  return Row(label=arm.name, changes=changes, own_base=own, start=start, measured=arm.measured)


def _check(claims: Sequence[Claim], rows: Sequence[Row]) -> None:
  by_label = {row.label: row for row in rows}
  for claim in claims:
    check_number("claims: bound", claim.bound, gt=0)
    if claim.row == claim.base:
      raise UserError(f"a claim compares arm {claim.row!r} with itself; name two")
    for label in (claim.row, claim.base):
      if label not in by_label:
        raise UserError(f"a claim names arm {label!r}; measured are {', '.join(by_label)}")
      # Only what the arm's runs measure: evaluations of objectives that the arm does not train are left out.
      config = tables.changed(by_label[label].own_base or {}, by_label[label].changes)
      column_names = [column.name for column in tables.columns_of(plan.measured(config))]
      if claim.column not in column_names:
        raise UserError(
          f"a claim names column {claim.column!r}, which arm {label} lacks; it has {', '.join(column_names)}"
        )
