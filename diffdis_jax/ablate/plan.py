"""Plan the runs that a list of tables needs: one for each resolved config, by its hash, however many rows share it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.ablate import tables
from diffdis_jax.common import cli
from diffdis_jax.config.objectives import task_of
from diffdis_jax.config.section import check_number
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as evals
from diffdis_jax.run import workdir
from diffdis_jax.run.workdir import digest, identity

Config = Mapping[str, Any]  # nested dicts
WITH_AUTOENCODER = ("diffdis", "either")  # the networks that need one
# What the training of the autoencoder takes over from the base and from a row. All else is as its config file has it,
# its seed too: one autoencoder serves the runs of every seed.
OF_AUTOENCODER = r"^(image_size$|mesh\.|model\.autoencoder\.|data\.(name|path|split|mixture|loader)(\.|$))"


# By identity, so that runs can be keys: a dict, such as the config, has no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A training, and how it is measured."""

  name: str  # of its workdir: what it changes in the base, its seed, and its hash
  config: dict[str, Any]  # nested; its `init_from` is empty where `start` says what the run starts from
  start: Run | None  # the run that has to end before this one starts; it may have one itself
  evals: dict[str, Any]  # of its config, those that measure what its objectives train; none of a start alone

  @property
  def measurement(self) -> str:
    """Return a hash of how it is measured, which may change without a new training."""
    return digest({"evals": self.evals, "inference": self.config["inference"]})

  @property
  def depth(self) -> int:
    """Return how many runs it has behind it."""
    return self.start.depth + 1 if self.start else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Tables, and the runs of their rows."""

  base: dict[str, Any]  # the config that the rows change, without a seed
  tables: tuple[tables.Table, ...]
  seeds: tuple[int, ...]  # of every row
  rows: Mapping[tuple[str, int], tuple[Run, ...]]  # (name of a table, number of a row) -> its runs, by seed
  runs: tuple[Run, ...]  # each once, in the order in which they are done: starts first, then seed by seed


def make(
  base: Config,
  autoencoder: Config | None,
  asked: Sequence[tables.Table],
  seeds: Sequence[int],
  *,
  own_starts: bool = False,
) -> Plan:
  """Make the plan of the tables that are `asked` for, whose rows change `base`.

  `autoencoder` is the config of the one that the runs start from; None where they start from something else. With
  `own_starts` each seed has one of its own. Raises UserError: the base has no evaluation for a column of the rows, or
  lacks a field that a row changes; or a seed is given twice.
  """
  if not seeds or len(set(seeds)) < len(seeds):
    raise UserError(f"--seeds={','.join(map(str, seeds))} should be different numbers, such as 0,1,2")
  for seed in seeds:
    check_number("--seeds", seed, ge=0, le=2**32 - 1)
  known: dict[tuple[str, str], Run] = {}
  rows: dict[tuple[str, int], list[Run]] = {}
  for seed in seeds:
    # Seed by seed: an ablation that is stopped has all rows of some seeds, which can be compared.
    for table in asked:
      for number, row in enumerate(table.rows):
        run = _make_run(base, autoencoder, row, seed, known, own_starts=own_starts)
        rows.setdefault((table.name, number), []).append(run)
  if not tables.measured(tables.columns_of(base["evals"]), (run.evals for run in known.values())):
    raise UserError(
      f"of the base's evaluations, {', '.join(base['evals']) or 'none'}, these rows measure none that has a column in a"
      f" table; columns are of {', '.join((*tables.TITLES_OF, 'retrieval'))}"
    )
  # `sorted` is stable: starts first, and all others in the order above.
  order = lambda run: (seeds.index(run.config["seed"]) if own_starts else 0, run.depth)
  return Plan(
    # --seeds may grow later: rows of more seeds belong to the same ablation.
    base={field: value for field, value in base.items() if field != "seed"},
    tables=tuple(asked),
    seeds=tuple(seeds),
    rows={key: tuple(runs) for key, runs in rows.items()},
    runs=tuple(sorted(known.values(), key=order)),
  )


def find_autoencoder(path: str, overrides: Mapping[str, Any], base: Config) -> dict[str, Any] | None:
  """Return the config of the autoencoder that belongs to a base, by the argument `autoencoder` of its file, with the
  overrides of OF_AUTOENCODER; None where the base starts from a run, needs no autoencoder, or its file knows none."""
  if base["init_from"] or task_of(base["objectives"]).network not in WITH_AUTOENCODER:
    return None
  file, _, argument = path.partition(":")
  try:
    # A file that does not know the argument, or has another use for it, has no autoencoder.
    config = cli.read_config(f"{file}:{','.join(filter(None, ('autoencoder', argument)))}").to_dict()
  except UserError:
    return None
  if task_of(config["objectives"]).network != "autoencoder":
    return None
  return tables.changed(config, _of_autoencoder(overrides))


def _of_autoencoder(changes: Mapping[str, Any]) -> dict[str, Any]:
  return {field: value for field, value in changes.items() if re.search(OF_AUTOENCODER, field)}


def _make_run(
  base: Config,
  autoencoder: Config | None,
  row: tables.Row,
  seed: int,
  known: dict[tuple[str, str], Run],
  *,
  own_starts: bool,
) -> Run:
  """Return the run of a row, from `known`, or new and put there with what it starts from."""
  config = tables.changed(row.own_base or base, {**row.changes, "seed": seed})
  objectives, trained = config["objectives"], measured(config) if row.measured else {}
  if row.measured and not trained:
    raise UserError(f"row {row.label}: no evaluation of the base measures objectives {', '.join(objectives)}")
  config["train_evals"] = tuple(name for name in config["train_evals"] if name in trained)
  first = None
  if row.start is not None:
    first = _make_run(base, autoencoder, row.start, seed, known, own_starts=own_starts)
  elif autoencoder is not None and task_of(objectives).network in WITH_AUTOENCODER and not config["init_from"]:
    plain = tables.changed(autoencoder, _of_autoencoder(row.changes) | ({"seed": seed} if own_starts else {}))
    of_seed = f"-seed_{seed}" if own_starts else ""
    start = Run(f"autoencoder{of_seed}-{digest(identity(plain))}", plain, None, {})
    first = known.setdefault((start.name, start.measurement), start)
  # The start's name, which ends in its hash, and not its path: wherever the folder lies, the run has one name.
  fields = identity(config) | ({"init_from": first.name} if first else {})
  # Arms are named; else what is changed is the name.
  name = _part_of_name(row.label) if own_starts else _describe(base, config)
  # Rows that train the same and are measured differently are two runs in one workdir.
  run = Run(f"{name}-seed_{seed}-{digest(fields)}", config, first, trained)
  return known.setdefault((run.name, run.measurement), run)


def measured(config: Config) -> dict[str, Any]:
  """Return the evaluations of what is trained; others would measure chance, and their cells stay blank instead."""
  # An unknown task stays, so that its check can name the run.
  measures = lambda task: task not in evals.TASKS or evals.get(task).fits(config["objectives"])
  return {name: section for name, section in config["evals"].items() if measures(section["task"])}


def _describe(base: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """Describe what a training changes in the base, as part of a file's name: `gamma_1.0-target_noise`."""
  there, here = workdir.flatten(base), identity(config).items()
  changed = [(name, value) for name, value in here if name not in ("seed", "init_from") and there.get(name) != value]
  words = [f"{name.split('.')[-1]}_{tables.shown(value)}" for name, value in changed]
  return _part_of_name("-".join(words)) or "base"


def _part_of_name(text: str) -> str:
  # 80 characters: a folder's name may have 255 bytes, and seed and hash are still to come.
  return re.sub(r"[^\w.+-]+", "_", text)[:80]
