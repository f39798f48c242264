"""Choose the columns of a table, which follow from the evaluations that the base config has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from diffdis_jax.common.guesses import did_you_mean
from diffdis_jax.errors import UserError
from diffdis_jax.evals.fid import FEW
from diffdis_jax.evals.results import Results

RECALL = ("image_retrieval_recall@1", "text_retrieval_recall@1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A figure of each run: the mean of one metric or of several.

  Attributes:
    name: data set and metric, as in metrics.jsonl; `recall@1` is the mean over MSCOCO and Flickr30k.
    title: with an arrow to the better side.
    cells: (task, data set, metric).
    scale: by which the metric is multiplied; 100 for per cent.
  """

  name: str
  title: str
  cells: tuple[tuple[str, str, str], ...]
  scale: float

  def read(self, results: Results) -> float | None:
    """Return the figure of these results, or None where they lack it."""
    values = [results.get(task, {}).get(name, {}).get("metrics", {}).get(metric) for task, name, metric in self.cells]
    # Never a mean over some of them: in that row the column would mean something else.
    if any(value is None for value in values):
      return None
    return self.scale * sum(values) / len(values)


def columns_of(evaluations: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
  """Return the columns of a config's `evals`, task by task in the order of COLUMNS_OF, and then R@1.

  With a set `coco` and a set `flickr` of retrieval, as in the paper, the mean of their four R@1 is one column. R@1 of
  any other set is the mean of both ways.
  """
  found: list[Column] = []
  for task, make in COLUMNS_OF.items():
    for name, section in evaluations.items():
      if section["task"] == task:
        found += make(name, section)
  retrieval = [name for name, section in evaluations.items() if section["task"] == "retrieval"]
  paper = [name for name in ("coco", "flickr") if name in retrieval]
  # Both or neither: over one of them the mean would not be the paper's.
  if len(paper) == 2:
    cells = tuple(("retrieval", name, metric) for name in paper for metric in RECALL)
    found.append(Column(name="recall@1", title="mean R@1 ↑", cells=cells, scale=100.0))
  for name in retrieval:
    if len(paper) < 2 or name not in paper:
      cells = tuple(("retrieval", name, metric) for metric in RECALL)
      title = f"R@1 {name.removesuffix('_retrieval')} ↑"
      found.append(Column(name=f"{name}/recall@1", title=title, cells=cells, scale=100.0))
  return tuple(found)


def of_generated_images(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return the columns of generated images. Rendered shapes have pairs that training never saw, which are a figure of
  their own; labelled images have none."""
  titles = {"acc1": name} if "data" in section else {"acc1_seen": "seen pairs", "acc1_unseen": "unseen pairs"}
  return [
    percent("generation_accuracy", name, metric, f"generated images, {title}") for metric, title in titles.items()
  ]


def of_fid(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return the paper's column, which is that of a set named as its task, of no fewer than FEW images."""
  count = section.get("num_images")
  is_papers = name == "fid" and (count is None or count >= FEW)
  column = "fid" if is_papers else f"{name}/fid"
  return [Column(name=column, title="FID ↓", cells=(("fid", name, "fid"),), scale=1.0)]


def of_zero_shot(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return top-1, and that of seen classes where there is a split of them."""
  found = [percent("zero_shot", name, "acc1", "ImageNet top-1" if name == "imagenet" else f"top-1 {name}")]
  if section.get("seen_split"):
    found.append(percent("zero_shot", name, "acc1_seen", f"top-1 {name}, seen classes"))
  return found


def of_long_tail(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return the accuracy on all classes and on the low ones."""
  del section
  found = percent("long_tail", name, "acc", f"accuracy {name}")
  return [found, percent("long_tail", name, "acc_low", f"accuracy {name}, low classes")]


def percent(task: str, name: str, metric: str, title: str) -> Column:
  """Return the column of a share, in per cent."""
  return Column(name=f"{name}/{metric}", title=f"{title} ↑", cells=((task, name, metric),), scale=100.0)


# Task -> the columns of one of its data sets, by its name and section.
COLUMNS_OF: dict[str, Callable[[str, Mapping[str, Any]], list[Column]]] = {
  "generation_accuracy": of_generated_images,
  "fid": of_fid,
  "zero_shot": of_zero_shot,
  "long_tail": of_long_tail,
}


def measured(columns: Sequence[Column], evaluations: Iterable[Mapping[str, Mapping[str, Any]]]) -> tuple[Column, ...]:
  """Return the columns that one of these runs has, by the `evals` of each: what no run is trained for gets no blank
  column."""
  # By what they are of: a row that changes how many images it generates may name its column otherwise.
  cells = {column.cells for each in evaluations for column in columns_of(each)}
  return tuple(column for column in columns if column.cells in cells)


def choose(columns: Sequence[Column], names: Sequence[str]) -> tuple[Column, ...]:
  """Return the columns of these names, in their order; all for none. Raises UserError: one is unknown."""
  known = {column.name: column for column in columns}
  for name in names:
    if name not in known:
      raise UserError(f"--columns has {name!r}; {did_you_mean(name, known)}")
  return tuple(known[name] for name in names or known)
