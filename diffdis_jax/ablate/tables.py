"""Hold the ablation tables of the paper's appendix as data, any grid in the same form, and the columns of a table.

A row is what it changes in a base config. Rows name every field that their table is about, also where the value is the
base's, so that a table means the same on any base. Columns follow from the evaluations that the base config has.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffdis_jax.common import guesses
from diffdis_jax.config.section import check_type
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks
from diffdis_jax.evals.fid import FEW
from diffdis_jax.evals.results import Results

GAMMA, SCHEDULE, TARGET = "text_diffusion.gamma", "text_diffusion.schedule", "text_diffusion.target"
PAPER_METRICS = {"fid": "FID ↓", "imagenet/acc1": "ImageNet top-1 ↑", "recall@1": "mean R@1 ↑"}
"""What the paper's tables report: FID on MSCOCO, zero-shot top-1 in per cent, mean R@1 of MSCOCO and Flickr30k in per
cent. The keys are the columns' names, as `columns_of` gives them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A row, or what the runs of one start from."""

  label: str
  changes: Mapping[str, Any]  # dotted path of a field -> its value
  paper: tuple[float, ...] = ()  # figures of PAPER_METRICS, in its order
  own_base: Mapping[str, Any] | None = None  # the config that is changed, where it is not that of all rows
  start: Row | None = None  # whose run of the same seed its runs start from; None for what the base starts from
  measured: bool = True  # False where its runs are starts alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table of rows, which are compared with one of them."""

  name: str
  title: str
  rows: tuple[Row, ...]
  base: int | None  # the number of the row that the others are compared with; None for no comparison


def paper_tables(*, schedule: str) -> dict[str, Table]:
  """Return Tables 2, 3, 4, 5 and 7 of the appendix, by number; their base rows are those of the final model.

  `schedule` is the text schedule of Tables 2 and 7, which the paper does not state. γ of Table 7 is not stated either;
  here it is 1, as in Tables 2 and 3, since that table's row of t_z = 1000 differs from the final model's. "linear" is
  Stable Diffusion's schedule of that name, here `scaled_linear`.
  """

  def table(name: str, title: str, base: int, *rows: tuple[str, Mapping[str, Any], tuple[float, ...]]) -> Table:
    rows_of_it = tuple(Row(label=label, changes=changes, paper=paper) for label, changes, paper in rows)
    return Table(name=name, title=title, rows=rows_of_it, base=base)

  query = lambda field, value: {GAMMA: 1.0, SCHEDULE: schedule, field: value}
  block = lambda share, own: {"model.fusion": True, "model.share_attention": share, "model.modality_ffn": own}
  tables = (
    table(
      *("2", "Target of the text diffusion, γ = 1", 1),
      ("noise", query(TARGET, "noise"), (10.78, 22.62, 29.38)),
      ("data", query(TARGET, "data"), (11.52, 23.44, 28.64)),
    ),
    table(
      # The base row has the schedule of the other tables.
      *("3", "Schedule of the text diffusion, γ = 1", 0 if schedule == "cosine" else 1),
      ("cosine", {GAMMA: 1.0, SCHEDULE: "cosine"}, (11.90, 22.35, 28.59)),
      ("linear", {GAMMA: 1.0, SCHEDULE: "scaled_linear"}, (11.52, 22.70, 31.07)),
    ),
    table(
      *("4", "Dual-stream deep fusion", 1),
      ("disabled", {"model.fusion": False}, (10.05, 24.53, 32.97)),
      ("enabled", {"model.fusion": True}, (9.80, 25.92, 33.60)),
    ),
    table(
      *("5", "Attention and feed-forward of the fusion block", 2),
      ("shared attention, shared FFN", block(True, False), (10.26, 25.92, 33.75)),
      ("own attention, own FFN", block(False, True), (10.19, 26.25, 33.07)),
      ("shared attention, own FFN", block(True, True), (9.80, 25.92, 33.60)),
    ),
    table(
      *("7", "Timestep t_z of the clean image, γ = 1", 2),
      ("0", query("condition_timestep", 0), (12.35, 21.97, 27.20)),
      ("999", query("condition_timestep", 999), (12.02, 21.73, 27.56)),
      ("1000", query("condition_timestep", 1000), (11.35, 22.13, 27.56)),
    ),
  )
  return {one.name: one for one in tables}


def choose(names: Sequence[str], *, schedule: str) -> list[Table]:
  """Return the paper's tables of these numbers. Raises UserError: one is unknown or named twice."""
  known = paper_tables(schedule=schedule)
  for i, name in enumerate(names):
    if name not in known or name in names[:i]:
      raise UserError(f"--tables has {name!r}; it takes each of {','.join(known)} once, the tables of the appendix")
  return [known[name] for name in names]


def grid(text: str, base: Mapping[str, Any]) -> Table:
  """Return the table of every combination of values of some fields, which are Python's, or words.

  The base row is the base's own combination, if it is among them, else the first one. Raises UserError: no such field,
  no value, one of another type or twice, or `seed`.
  """
  axes: dict[str, list[Any]] = {}
  for entry in filter(None, (part.strip() for part in text.split(";"))):
    field, equals, values = (part.strip() for part in entry.partition("="))
    if not equals or not values:
      raise UserError(f"--grid has {entry!r}; write it as field=value,value;field=value, such as loss.ita_weight=0.1,1")
    if field in axes:
      raise UserError(f"--grid has {field} twice; give all of its values in one list")
    axes[field] = _read_values(field, values, base)
  if not axes:
    raise UserError("--grid is empty; write it as field=value,value, such as loss.ita_weight=0.03,0.1")
  combined = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
  label = lambda changes: ", ".join(f"{name} = {shown(value)}" for name, value in changes.items())
  rows = [Row(label=label(changes), changes=changes) for changes in combined]
  own = {field: field_of(base, field) for field in axes}
  first = combined.index(own) if own in combined else 0
  return Table(name="grid", title=" × ".join(axes), rows=tuple(rows), base=first)


def shown(value: Any) -> str:
  """Return a value as a label has it."""
  return " + ".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def field_of(config: Mapping[str, Any], field: str) -> Any:
  """Return the value of a field, or its section, by its dotted path. Raises UserError: there is none of this name."""
  guesses.check_key(config, field)
  return functools.reduce(lambda section, name: section[name], field.split("."), config)


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  """Return a copy with other values of some fields, by their dotted paths; data that are measured have a new image_size
  too. Raises UserError: it has no such field."""
  config = copy.deepcopy(dict(config))
  if "image_size" in changes:  # first: a change of theirs counts
    config["evals"] = tasks.resized(config["evals"], config["image_size"], changes["image_size"])
  for field, value in changes.items():
    field_of(config, field)
    section, _, name = field.rpartition(".")
    (field_of(config, section) if section else config)[name] = value
  return config


def _read_values(field: str, text: str, base: Mapping[str, Any]) -> list[Any]:
  present = field_of(base, field)
  if isinstance(present, Mapping):
    raise UserError(f"--grid: {field} is a section, not a field; it has {', '.join(present) or 'no field'}")
  if field == "seed":
    raise UserError("--grid has seed; the seeds of every row are --seeds=0,1,2")
  try:
    # As a list's items, since a tuple has commas of its own: ('generation',),('discrimination',). Words, such as
    # cosine, are no literals; they are split at commas.
    values = list(ast.literal_eval(f"[{text}]"))
  except (ValueError, SyntaxError):
    values = [part.strip() for part in text.split(",")]
  values = [_of_type(value, present) for value in values]
  for value in values:
    check_type(f"--grid: {field}", value, present)
  if len({repr(value) for value in values}) < len(values):
    raise UserError(f"--grid: {field} has a value twice, which would be two runs of one name; give each once")
  return values


def _of_type(value: Any, present: Any) -> Any:
  """Return a value in the type of the base's, where it is another one's writing of it."""
  if isinstance(present, bool) and str(value).lower() in ("true", "false"):
    return str(value).lower() == "true"
  # 1 and 1.0 train the same, but would be two hashes and so two runs. True is an int to Python, and no number here.
  if isinstance(present, float) and type(value) is int:
    return float(value)
  return tuple(value) if isinstance(present, tuple) and isinstance(value, list) else value


RECALL = ("image_retrieval_recall@1", "text_retrieval_recall@1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A figure of each run: the mean of one metric or of several, times `scale`."""

  name: str  # data set and metric, as in metrics.jsonl; `recall@1` is the mean over MSCOCO and Flickr30k
  title: str  # with an arrow to the better side
  cells: tuple[tuple[str, str, str], ...]  # (task, data set, metric)
  scale: float

  def read(self, results: Results) -> float | None:
    """Return the figure of these results, or None where they lack it."""
    values = [results.get(task, {}).get(name, {}).get("metrics", {}).get(metric) for task, name, metric in self.cells]
    # Never a mean over some of them: in that row the column would mean something else.
    if any(value is None for value in values):
      return None
    return self.scale * sum(values) / len(values)


def columns_of(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
  """Return the columns of a config's `evals`, task by task in the order of TITLES_OF, and then R@1, the mean of both
  ways. With sets `coco` and `flickr` of retrieval, as in the paper, the mean of their four R@1 is one column."""
  columns: list[Column] = []
  for task, titles_of in TITLES_OF.items():
    for name, section in evaluations.items():
      for metric, title in titles_of(name, section).items() if section["task"] == task else ():
        # FID is the paper's where the set is named as the task, and of no fewer than FEW images.
        is_papers = name == metric == "fid" and (section.get("num_images") or FEW) >= FEW
        column, cells = "fid" if is_papers else f"{name}/{metric}", ((task, name, metric),)
        columns.append(Column(name=column, title=title, cells=cells, scale=1.0 if metric == "fid" else 100.0))
  retrieval = [name for name, section in evaluations.items() if section["task"] == "retrieval"]
  paper = [name for name in ("coco", "flickr") if name in retrieval]
  cells_of = lambda *names: tuple(("retrieval", name, metric) for name in names for metric in RECALL)
  # Both or neither: over one of them the mean would not be the paper's.
  if len(paper) == 2:
    columns.append(Column(name="recall@1", title="mean R@1 ↑", cells=cells_of(*paper), scale=100.0))
  for name in retrieval:
    if len(paper) < 2 or name not in paper:
      title = f"R@1 {name.removesuffix('_retrieval')} ↑"
      columns.append(Column(name=f"{name}/recall@1", title=title, cells=cells_of(name), scale=100.0))
  return tuple(columns)


def of_zero_shot(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the titles of top-1, and of that of seen classes where there is a split of them."""
  title = "ImageNet top-1" if name == "imagenet" else f"top-1 {name}"
  seen = {"acc1_seen": f"top-1 {name}, seen classes ↑"} if section.get("seen_split") else {}
  return {"acc1": f"{title} ↑", **seen}


# Task -> the columns of one of its data sets, by its name and section: metric -> title. All but FID are in per cent.
TITLES_OF: dict[str, Callable[[str, Mapping[str, Any]], dict[str, str]]] = {
  "generation_accuracy": lambda name, section: {
    f"acc1_{pairs}": f"generated images, {pairs} pairs ↑" for pairs in ("seen", "unseen")
  },
  "fid": lambda name, section: {"fid": "FID ↓"},
  "zero_shot": of_zero_shot,
  "long_tail": lambda name, section: {"acc": f"accuracy {name} ↑", "acc_low": f"accuracy {name}, low classes ↑"},
}


def measured(columns: Sequence[Column], evaluations: Iterable[Mapping[str, Mapping[str, Any]]]) -> tuple[Column, ...]:
  """Return the columns that one of these runs has, by the `evals` of each, so that none is blank."""
  # By what they are of: a row that changes how many images it generates may name its column otherwise.
  cells = {column.cells for evals in evaluations for column in columns_of(evals)}
  return tuple(column for column in columns if column.cells in cells)
