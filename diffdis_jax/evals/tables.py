"""Write results as a Markdown table: a row a figure, and the paper's figures beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import suites
from diffdis_jax.evals.results import Results, is_mean
from diffdis_jax.parallel import processes

NONE = "–"
MEAN = "mean"  # the data set of a row of means
# From the paper's appendix, Tables 1, 4, 6 and 8 (VL-LTR on Places-LT), by set and metric. No other figure is known.
LONG_TAIL = ("image_acc", "text_acc", "knn_acc", "acc")
PAPER: dict[str, dict[tuple[str, str], str]] = {
  "the paper's DiffDis": {
    ("imagenet1k", "acc1"): "25.92",
    (MEAN, "mean_recall@1"): "33.60",
    ("mscoco_val2014", "fid"): "9.80",
    **{("long_tail", name): figure for name, figure in zip(LONG_TAIL, ("37.0", "52.5", "40.5", "44.4"), strict=True)},
  },
  "the paper's CLIP ViT-L/14": {
    ("imagenet1k", "acc1"): "21.1",
    **{("long_tail", name): figure for name, figure in zip(LONG_TAIL, ("31.4", "38.1", "35.5", "40.5"), strict=True)},
  },
  "the paper's CLIP ViT-B/32": {("imagenet1k", "acc1"): "16.7"},
  "the paper's Stable Diffusion": {("mscoco_val2014", "fid"): "10.8"},
}
NOTE = (
  "Accuracy and recall in per cent, KID times 1000. The paper's models are trained on CC3M, its long-tailed figures are"
  " of Places-LT. It does not say which sets, splits and prompts its means are over, nor how many images its FID is of."
)
# The metrics of a task that stand in the table; of other tasks all do.
METRICS = {
  "retrieval": ("image_retrieval_recall@1", "text_retrieval_recall@1"),
  "fid": ("fid", "kid", "num_images"),
  "long_tail": (*LONG_TAIL, "acc_many", "acc_median", "acc_low"),
}
AS_THEY_ARE = ("loss", "l2_", "evaluations", "head_similarity", "fid", "num_images")


def write(run: str, results: Results, out: str) -> None:
  """Write a run's results as a table beside the JSON file `out`, on process 0. Raises UserError: it cannot be."""
  if processes.is_first():
    result_files.write_text(f"{out.removesuffix('.json')}.md", table(pathlib.PurePath(run).name, results))


def table(title: str, results: Results) -> str:
  """Return a row a figure: that of these results, whose column has this title, and those of the paper's models."""
  rows: dict[str, list[str]] = {}
  for task, records in results.items():
    # Means come last, in one row whatever they are over.
    for name in sorted(records, key=is_mean):
      shown = MEAN if is_mean(name) else suites.SETS[name].title if name in suites.SETS else name
      for metric in _metrics(task, name, records[name]):
        key = (task if task == "long_tail" else MEAN if is_mean(name) else name, metric)
        of_paper = [figures.get(key, NONE) for figures in PAPER.values()]
        rows[f"{task}, {shown}, {metric}"] = [_cell(records[name], metric), *of_paper]
  known = [i for i in range(1, 1 + len(PAPER)) if any(row[i] != NONE for row in rows.values())]
  lines = [["", title, *PAPER], ["---"] * (2 + len(PAPER)), *([name, *row] for name, row in rows.items())]
  kept = ([*line[:2], *(line[1 + i] for i in known)] for line in lines)
  return "\n".join("| " + " | ".join(line) + " |" for line in kept) + f"\n\n{NOTE}\n"


def _metrics(task: str, name: str, record: Mapping[str, Any]) -> Sequence[str]:
  if task == "zero_shot" and name in suites.SETS:
    return suites.SETS[name].metric, f"{suites.SETS[name].metric}_single_template"
  return METRICS[task] if task in METRICS and not is_mean(name) else [*record["metrics"]]


def _cell(record: Mapping[str, Any], metric: str) -> str:
  value = record["metrics"].get(metric)
  if value is None:
    return NONE
  if metric.startswith(AS_THEY_ARE):
    return format(value, {"fid": ".2f", "num_images": ".0f"}.get(metric, ".4f"))
  text = f"{1000 * value:.3f}" if metric.startswith("kid") else f"{100 * value:.2f}"
  # A mean over fewer sets, or over parts of them, has another name.
  return text if record["protocol"].get("whole", True) else f"{record['dataset'].replace('_', ' ')}: {text}"
