"""Write results as a Markdown table: a row a figure, a column a file, and the paper's figures beside them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import suites
from diffdis_jax.evals.results import OF_A_MODEL, Results, differences, is_mean
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


def compare(paths: Sequence[str], out: str) -> None:
  """Write the results of several files as one table.

  Raises UserError: a file that holds no results, one that is named twice, or a table that is not named .md.
  """
  if not out.endswith(".md"):
    raise UserError(f"--out={out} should name the Markdown table to write, such as F.md")
  if len(set(paths)) < len(paths):
    raise UserError(f"--compare={','.join(paths)} names a file twice")
  # Short names where they differ.
  names = [pathlib.PurePath(path).stem for path in paths]
  titles = names if len(set(names)) == len(names) else paths
  results = {title: result_files.read(path) for title, path in zip(titles, paths, strict=True)}
  result_files.write_text(out, table(results))


def write(run: str, results: Results, out: str) -> None:
  """Write a run's results as a table beside the JSON file `out`, on process 0. Raises UserError: it cannot be."""
  if processes.is_first():
    title = pathlib.PurePath(run).name
    result_files.write_text(f"{out.removesuffix('.json')}.md", table({title: results}))


def table(by_name: Mapping[str, Results]) -> str:
  """Return a row a figure and a column a file; what is measured by different protocols is marked.

  Args:
    by_name: a column's title -> its results.
  """
  rows: list[list[str]] = []
  known: set[str] = set()
  notes: list[str] = []
  for task in dict.fromkeys(task for results in by_name.values() for task in results):
    names = dict.fromkeys(name for results in by_name.values() for name in results.get(task, {}))
    marks = {name: _mark(task, name, by_name, notes) for name in names if not is_mean(name)}
    # Means stand in one row, whatever they are over: they are marked if one of their sets is.
    for name in [*marks, *([MEAN] if len(marks) < len(names) else ())]:
      records = {title: _record(results.get(task, {}), name) for title, results in by_name.items()}
      for metric in _metrics(task, name, records.values()):
        cells = [_cell(record, metric) for record in records.values()]
        key = (task if task == "long_tail" else name, metric)
        of_paper = {title: figures[key] for title, figures in PAPER.items() if key in figures}
        known |= of_paper.keys()
        shown = suites.SETS[name].title if name in suites.SETS else name
        mark = max(marks.values(), default="") if name == MEAN else marks[name]
        rows.append([f"{task}, {shown}, {metric}{mark}", *cells, *(of_paper.get(title, NONE) for title in PAPER)])
  columns = [i for i, title in enumerate(PAPER) if title in known]
  keep = lambda row: [*row[: 1 + len(by_name)], *(row[1 + len(by_name) + i] for i in columns)]
  lines = [["", *by_name, *PAPER], ["---"] * (1 + len(by_name) + len(PAPER)), *rows]
  parts = ["\n".join("| " + " | ".join(keep(line)) + " |" for line in lines), NOTE]
  if notes:
    parts.append("† Measured by different protocols, and so not to be compared as they stand:")
    parts.append("\n".join(notes))
  return "\n\n".join(parts) + "\n"


def _record(records: Mapping[str, Any], name: str) -> Any:
  """Return the record of a set, or of the mean over sets; None where there is none."""
  return next((record for key, record in records.items() if is_mean(key)), None) if name == MEAN else records.get(name)


def _metrics(task: str, name: str, records: Any) -> Sequence[str]:
  if task == "zero_shot" and name in suites.SETS:
    return suites.SETS[name].metric, f"{suites.SETS[name].metric}_single_template"
  if task in METRICS and name != MEAN:
    return METRICS[task]
  return [*dict.fromkeys(metric for record in records if record for metric in record["metrics"])]


def _cell(record: Mapping[str, Any] | None, metric: str) -> str:
  value = record["metrics"].get(metric) if record else None
  if record is None or value is None:
    return NONE
  if metric.startswith(AS_THEY_ARE):
    return format(value, {"fid": ".2f", "num_images": ".0f"}.get(metric, ".4f"))
  text = f"{1000 * value:.3f}" if metric.startswith("kid") else f"{100 * value:.2f}"
  if "whole" not in record["protocol"] or record["protocol"]["whole"]:
    return text
  # A mean over fewer sets, or over parts of them, has another name.
  return f"{record['dataset'].replace('_', ' ')}: {text}"


def _mark(task: str, name: str, by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return a dagger where the protocols of the files differ for this set, and note how they differ."""
  protocols = {
    title: results[task][name]["protocol"] for title, results in by_name.items() if name in results.get(task, {})
  }
  lines = []
  for field, values in differences(protocols.values()).items():
    texts = [json.dumps(value) for value in values]
    # Models differ by nature. What one lacks is no other way of measuring: CLIP has no settings of denoising.
    if field not in OF_A_MODEL and len({*texts} - {"null"}) > 1:
      text = "; ".join(f"{title}: {value[:80]}" for title, value in zip(protocols, texts, strict=True))
      lines.append(f"- {task}, {name}, {field}: {text}")
  notes += lines
  return " †" if lines else ""
