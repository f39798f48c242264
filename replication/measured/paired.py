"""Make tables of paired differences from the runs in emoji.json and shapes.json.

`ablate table` makes the tables of runs in an --out folder. The runs here were trained by earlier configs, so their
names differ from today's. Statistics and layout are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from diffdis_jax.ablate import summary
from diffdis_jax.ablate import tables as ablation_tables
from diffdis_jax.ablate.tables import Column, Row
from diffdis_jax.errors import UserError
from replication.measured import records

SHAPES_LOG, EMOJI_LOG = "replication/log/shapes.md", "replication/log/emoji.md"
SHAPES_TITLES = (
  "generated images, seen pairs ↑",
  "generated images, unseen pairs ↑",
  "top-1, seen pairs ↑",
  "top-1, unseen pairs ↑",
  "R@1 ↑",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The description of a table.

  Attributes:
    page: path of the page from the repository's root.
    topic: topic of the records.
    rows: label -> beginning of the names of its runs, before `-seed_N`.
    base: label of the row that the others are compared with.
    columns: metrics of the table.
  """

  page: str
  topic: str
  rows: dict[str, str]
  base: str
  columns: Sequence[Column]


def shapes(rows: dict[str, str], *, base: str) -> Measured:
  """Return a table of rendered shapes: accuracy of generated images, zero-shot top-1, and mean R@1."""
  percent = lambda task, dataset, metric: ablation_tables.Column(
    name=f"{dataset}/{metric}", title="", cells=((task, dataset, metric),), scale=100.0
  )
  recall = tuple(("retrieval", "test_retrieval", metric) for metric in ablation_tables.RECALL)
  columns = (
    percent("generation_accuracy", "generated", "acc1_seen"),
    percent("generation_accuracy", "generated", "acc1_unseen"),
    percent("zero_shot", "test", "acc1"),
    percent("zero_shot", "unseen", "acc1"),
    ablation_tables.Column(name="recall@1", title="", cells=recall, scale=100.0),
  )
  titled = [dataclasses.replace(column, title=title) for column, title in zip(columns, SHAPES_TITLES, strict=True)]
  return Measured(page=SHAPES_LOG, topic="shapes", rows=rows, base=base, columns=titled)


def emoji(rows: dict[str, str], *, base: str, most: int = 5) -> Measured:
  """Return a table of the emoji with the first `most` columns: zero-shot top-1 accuracies, and mean R@1."""
  top1 = lambda split, metric, title: ablation_tables.Column(
    name=f"{split}/{metric}", title=f"{title} ↑", cells=(("zero_shot", split, metric),), scale=100.0
  )
  recall = tuple(("retrieval", "test_vendor_retrieval", metric) for metric in ablation_tables.RECALL)
  listed = (
    top1("val_vendor", "acc1", "`val_vendor`, 895 concepts"),
    top1("test_vendor", "acc1", "`test_vendor`, by which settings were chosen, 1,364 concepts"),
    top1("test_vendor", "acc1_seen", "its 1,206 seen concepts"),
    ablation_tables.Column(name="recall@1", title="its R@1 ↑", cells=recall, scale=100.0),
    top1("val_concepts", "acc1", "`val_concepts`, 158 unseen concepts"),
  )
  return Measured(page=EMOJI_LOG, topic="emoji", rows=rows, base=base, columns=listed[:most])


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
    {
      "CLIP": "held_temperature_clip_1800",
      "DiffDis, discrimination alone, with CLIP's additions alone": "token_query_alone_1800",
      "DiffDis, discrimination alone": "held_temperature_discrimination_1800",
      "DiffDis, both objectives": "held_temperature_both_1800",
    },
    base="CLIP",
  ),
  "both objectives": emoji(
    {"discrimination alone": "held_temperature_discrimination_1800", "both objectives": "held_temperature_both_1800"},
    base="discrimination alone",
  ),
  "generation first": emoji(
    {
      "0 steps": "held_temperature_discrimination_1800_epyc",
      "1,800 steps": "generation_first_discrimination_1800",
      "3,600 steps (seed 0)": "generation_3600_first_discrimination_1800",
    },
    base="0 steps",
  ),
  "one change": emoji(
    {
      "nothing, the config": "held_temperature_discrimination_1800_epyc",
      "`spatial_pool` alone, no `token_embedding_weight`": "map_parts_alone_1800",
      "`token_embedding_weight` alone, no `spatial_pool`": "token_query_alone_1800",
      "token vectors frozen as they begin": "tokens_frozen_1800",
      "learning rate of the text tower × 0.35, its token vectors included": "text_slow_1800",
      "both at once, as in earlier configs": "text_frozen_1800",
      "batches of 128 for 900 steps, the same samples": "batch_128_900",
      "all pairs of one concept are positives of each other": "positives_1800",
      "stronger views": "strong_views_1800",
      "icons cut to their content, with 3 % of margin": "cut_to_drawing_1800",
    },
    base="nothing, the config",
    most=3,
  ),
  "without the additions": emoji(
    {"CLIP": "clip", "discrimination alone": "discrimination", "both objectives": "both"},
    base="discrimination alone",
  ),
}


def figures_of(measured: Measured, start: str) -> dict[str, dict[int, float]]:
  """Return column -> seed -> value for the runs of a row.

  Raises:
    UserError: the row has no run.
  """
  figures: dict[str, dict[int, float]] = {column.name: {} for column in measured.columns}
  runs = {name: run for name, run in records.results(measured.topic).items() if name.rpartition("-seed_")[0] == start}
  if not runs:
    raise UserError(f"replication/measured/{measured.topic}.json has no runs {start}-seed_N")
  for name, run in runs.items():
    seed = int(name.rpartition("-seed_")[2])
    for column in measured.columns:
      if (value := column.read(run)) is not None:
        figures[column.name][seed] = value
  return figures


@functools.cache
def table(name: str) -> dict:
  """Return the table in the form of tables.json."""
  measured = TABLES[name]
  rows = tuple(Row(label=label, changes={}) for label in measured.rows)
  layout = ablation_tables.Table(name=name, title=name, rows=rows, base=[*measured.rows].index(measured.base))
  figures = [figures_of(measured, start) for start in measured.rows.values()]
  seeds = [sorted({seed for values in row.values() for seed in values}) for row in figures]
  runs = [
    [f"{start}-seed_{seed}" for seed in row_seeds]
    for start, row_seeds in zip(measured.rows.values(), seeds, strict=True)
  ]
  return summary.table_of(layout, figures, runs)


def whole(name: str) -> str:
  """Return one of TABLES with all of its columns, in the log's format."""
  titles = {column.name: column.title for column in TABLES[name].columns}
  return summary.render_table(table(name), columns=titles, paper={})
