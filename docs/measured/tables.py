"""The tables of paired differences in results.md and emoji.md, from the results in this folder.

  python -m docs.measured.tables

writes them into the pages, each between its two comments. `ablate table` makes the tables of runs that lie in an --out;
these were trained by former configs, whose runs today's code would name otherwise. Statistics and layout are the same.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from absl import app

from diffdis_jax.ablate import columns, render, summary
from diffdis_jax.ablate import tables as ablation_tables
from diffdis_jax.ablate.columns import Column
from diffdis_jax.ablate.tables import Row
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results

HERE = pathlib.Path(__file__).parent
SHAPES_TITLES = (
  "generated images, seen pairs ↑",
  "generated images, unseen pairs ↑",
  "top-1, seen pairs ↑",
  "top-1, unseen pairs ↑",
  "R@1 ↑",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """A table.

  Attributes:
    page: in docs/.
    folder: of the results, in docs/measured.
    rows: label -> how the names of its files begin, before `-seed_N`.
    base: label of the row that the others are compared with.
    columns: figures.
  """

  page: str
  folder: str
  rows: dict[str, str]
  base: str
  columns: Sequence[Column]


def shapes(rows: dict[str, str], *, base: str) -> Measured:
  """Of rendered shapes: accuracy of generated images, zero-shot top-1 and the mean of both R@1."""
  evaluations = json.loads((HERE / "shapes_tables/base.json").read_text())["evals"]
  # Today's names are generation_accuracy and acc1_seen. The results have the names of their day.
  former = [
    columns.Column(name=f"generated/{metric}", title="", cells=(("agreement", "generated", metric),), scale=100.0)
    for metric in ("agreement_seen", "agreement_unseen")
  ]
  found = [*former, *columns.columns_of(evaluations)]
  titled = [dataclasses.replace(each, title=title) for each, title in zip(found, SHAPES_TITLES, strict=True)]
  return Measured(page="results.md", folder="shapes_tables/results", rows=rows, base=base, columns=titled)


def emoji(page: str, rows: dict[str, str], *, base: str, most: int = 5) -> Measured:
  """Of the emoji: zero-shot top-1, and the mean of both R@1; the first `most` columns."""
  top1 = lambda split, metric, title: columns.Column(
    name=f"{split}/{metric}", title=f"{title} ↑", cells=(("zero_shot", split, metric),), scale=100.0
  )
  recall = tuple(("retrieval", "test_vendor_retrieval", metric) for metric in columns.RECALL)
  found = (
    top1("val_vendor", "acc1", "`val_vendor`, 895 concepts"),
    top1("test_vendor", "acc1", "`test_vendor`, 1,364 concepts"),
    top1("test_vendor", "acc1_seen", "its 1,206 seen concepts"),
    columns.Column(name="recall@1", title="its R@1 ↑", cells=recall, scale=100.0),
    top1("val_concepts", "acc1", "`val_concepts`, 158 unseen concepts"),
  )
  return Measured(page=page, folder="emoji", rows=rows, base=base, columns=found[:most])


NOISE, UNIT = "gamma_1.0-target_noise", "gamma_1.0"
TABLES = {
  "table 2": shapes({"noise": NOISE, "data": UNIT}, base="data"),
  "table 3": shapes({"cosine": "gamma_1.0-schedule_cosine", "linear": UNIT}, base="linear"),
  "table 4": shapes({"disabled": "fusion_False", "enabled": "base"}, base="enabled"),
  "table 5": shapes(
    {
      "shared attention, shared FFN": "modality_ffn_False",
      "own attention, own FFN": "share_attention_False",
      "shared attention, own FFN": "base",
    },
    base="shared attention, own FFN",
  ),
  "table 7": shapes(
    {"0": "condition_timestep_0-gamma_1.0", "999": "condition_timestep_999-gamma_1.0", "1000": UNIT}, base="1000"
  ),
  "joint training": shapes(
    {
      "generation alone": "objectives_generation",
      "discrimination alone": "objectives_discrimination",
      "both": "base",
    },
    base="both",
  ),
  "gamma": shapes(
    {
      "0.3, linear": "base",
      "0.1, linear": "gamma_0.1",
      "1.0, linear": UNIT,
      "0.1, cosine": "gamma_0.1-schedule_cosine",
      "0.3, cosine": "schedule_cosine",
      "1.0, cosine": "gamma_1.0-schedule_cosine",
    },
    base="0.3, linear",
  ),
  "clip": emoji(
    "results.md",
    {
      "CLIP": "held_temperature_clip_1800",
      "DiffDis, discrimination alone, with CLIP's switches": "token_query_alone_1800",
      "DiffDis, discrimination alone": "held_temperature_discrimination_1800",
      "DiffDis, both objectives": "held_temperature_both_1800",
    },
    base="CLIP",
  ),
  "both objectives": emoji(
    "results.md",
    {"discrimination alone": "held_temperature_discrimination_1800", "both objectives": "held_temperature_both_1800"},
    base="discrimination alone",
  ),
  "generation first": emoji(
    "results.md",
    {
      "0 steps": "held_temperature_discrimination_1800_epyc",
      "1,800 steps": "generation_first_discrimination_1800",
      "3,600 steps (seed 0)": "generation_3600_first_discrimination_1800",
    },
    base="0 steps",
  ),
  "one change": emoji(
    "emoji.md",
    {
      "nothing, the config": "held_temperature_discrimination_1800_epyc",
      "`spatial_pool` alone, no `token_embedding_weight`": "map_parts_alone_1800",
      "`token_embedding_weight` alone, no `spatial_pool`": "token_query_alone_1800",
      "token vectors frozen as they begin": "tokens_frozen_1800",
      "learning rate of the text tower × 0.35, its token vectors included": "text_slow_1800",
      "both at once, as in former configs": "text_frozen_1800",
      "batches of 128 for 900 steps, the same samples": "batch_128_900",
      "all pairs of one concept are positives of each other": "positives_1800",
      "stronger views": "strong_views_1800",
      "icons cut to what is drawn, with 3 % of margin": "cut_to_drawing_1800",
    },
    base="nothing, the config",
    most=3,
  ),
  "without the switches": emoji(
    "emoji.md",
    {"CLIP": "clip", "discrimination alone": "discrimination", "both objectives": "both"},
    base="discrimination alone",
  ),
}


def figures_of(measured: Measured, start: str) -> dict[str, dict[int, float]]:
  """Column -> seed -> figure, of the files of a row.

  Raises:
    UserError: there is none, a seed has two, or one lacks a figure.
  """
  found: dict[str, dict[int, float]] = {column.name: {} for column in measured.columns}
  files = sorted((HERE / measured.folder).glob(f"{start}-seed_*.json"))
  if not files:
    raise UserError(f"docs/measured/{measured.folder} has no results {start}-seed_*.json")
  for file in files:
    seed = int(file.name.removeprefix(f"{start}-seed_").split("-")[0].removesuffix(".json"))
    if any(seed in values for values in found.values()):
      raise UserError(f"{file.name} is a second file of seed {seed}; leave one of them in docs/measured")
    read = results.read(str(file))
    for column in measured.columns:
      if (value := column.read(read)) is not None:
        found[column.name][seed] = value
  return found


def table(name: str) -> dict:
  """What tables.json would hold of it."""
  measured = TABLES[name]
  rows = tuple(Row(label=label, changes={}) for label in measured.rows)
  asked = ablation_tables.Table(name=name, title=name, rows=rows, base=[*measured.rows].index(measured.base))
  figures = [figures_of(measured, start) for start in measured.rows.values()]
  seeds = [sorted({seed for values in row.values() for seed in values}) for row in figures]
  runs = [[f"{start}-seed_{seed}" for seed in each] for start, each in zip(measured.rows.values(), seeds, strict=True)]
  return summary.table_of(asked, figures, runs)


def written(page: str, text: str) -> str:
  """The text of a page with its tables replaced. Raises UserError: it has no place for one."""
  for name, measured in TABLES.items():
    if measured.page == page:
      made = render.table_of(table(name), columns={each.name: each.title for each in measured.columns}, paper={})
      begin, end = f"<!-- {name}, by docs/measured/tables.py -->", f"<!-- end of {name} -->"
      text, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, new=f"{begin}\n\n{made}\n\n{end}": new, text, flags=re.S
      )
      if count != 1:
        raise UserError(f"docs/{page} should hold {begin} and {end} once, between which the table is written")
  return text


def main(_: Sequence[str]) -> None:
  for page in sorted({measured.page for measured in TABLES.values()}):
    path = HERE.parent / page
    path.write_text(written(page, path.read_text()))


if __name__ == "__main__":
  app.run(main)
