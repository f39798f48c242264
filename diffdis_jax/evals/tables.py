"""Write results as Markdown in the paper's layout, of one file or of several side by side."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import suites
from diffdis_jax.evals.results import OF_A_MODEL, Results, differences, is_mean
from diffdis_jax.parallel import processes

NONE = "–"
# From the paper's appendix, Tables 1, 4 and 6; of no other cell is its figure known. Its models are trained on CC3M.
PAPER: dict[str, dict[str, str]] = {
  "the paper's DiffDis": {"imagenet1k": "25.92", "mean R@1": "33.60", "fid": "9.80"},
  "the paper's Stable Diffusion": {"fid": "10.8"},
  "the paper's CLIP ViT-B/32": {"imagenet1k": "16.7"},
  "the paper's CLIP ViT-L/14": {"imagenet1k": "21.1"},
}
# Table 8: VL-LTR on Places-LT, in per cent.
LONG_TAIL = {
  "the paper's CLIP ViT-L/14": ("31.4", "38.1", "35.5", "40.5"),
  "the paper's DiffDis": ("37.0", "52.5", "40.5", "44.4"),
}
LONG_TAIL_COLUMNS = {
  **{"Image-Acc": "image_acc", "Text-Acc": "text_acc", "KNN-Acc": "knn_acc", "Acc": "acc"},
  **{"Acc, many": "acc_many", "median": "acc_median", "low": "acc_low"},
}
PAPER_NOTE = (
  "The paper's models are trained on CC3M. Of its means over twelve sets only differences are known: DiffDis is 1.65"
  " points above single-task models, and 4.7 above CLIP. It does not say which twelve sets, splits and prompts."
)
LONG_TAIL_NOTE = (
  "Accuracy on test images in per cent. The first three columns are of the backbone, after stage 1 where there was"
  " one; Acc is the head's, after stage 2. Many, median and low: classes with more than 99, 21 to 99, and at most 20"
  " training images. The paper's rows are of Places-LT."
)
FID_NOTE = "The paper says of its FID that it is of images generated from MSCOCO's captions, and not how many."
# The fields of a protocol that say how an image's text query is denoised: those of config.sections.Sampling.
OF_DENOISING = ("steps", "num_noise_samples", "guidance", "normalize_query")
Row = tuple[str, list[str]]


class Column(NamedTuple):
  """A column of a table: a metric of a task on a set, written as `shown` times `factor`."""

  head: str
  task: str
  dataset: str
  metric: str
  factor: float = 100
  shown: str = "{:.2f}"

  def cell(self, results: Results) -> str:
    value = results.get(self.task, {}).get(self.dataset, {}).get("metrics", {}).get(self.metric)
    return NONE if value is None else self.shown.format(self.factor * value)


def compare(paths: Sequence[str], out: str) -> None:
  """Write the results of several files as one table.

  Raises:
    UserError: a file that holds no results, one that is named twice, or a table that is not named .md.
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
  """Return one row a file of results, with the paper's row under them; what is measured by different protocols is
  marked.

  Args:
    by_name: a row's title -> its results.
  """
  notes: list[str] = []
  parts = [make(by_name, notes) for make in (_zero_shot, _retrieval, _fid, _long_tail, _others)]
  text = "\n\n".join(part for part in parts if part)
  if notes:
    notes = ["† Measured by different protocols, and so not to be compared as they stand:", "", *notes]
    text += "\n\n" + "\n".join(notes)
  return text + "\n"


def _measured(task: str, by_name: Mapping[str, Results]) -> list[str]:
  """Return the sets on which a task is measured, in any of the files, without means."""
  names = dict.fromkeys(name for results in by_name.values() for name in results.get(task, {}))
  return [name for name in names if not is_mean(name)]


def _zero_shot(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = [*suites.ZERO_SHOT12]
  if not {*names} & {*_measured("zero_shot", by_name)}:
    return ""
  marks = {name: _mark("zero_shot", name, by_name, notes) for name in names}
  rows: list[Row] = []
  for title, results in by_name.items():
    for suffix, metric in (("", ""), (", single template", "_single_template")):
      columns = [Column("", "zero_shot", name, f"{suites.SETS[name].metric}{metric}") for name in names]
      cells = [column.cell(results) for column in columns]
      rows.append((f"{title}{suffix}", [*cells, _mean(results.get("zero_shot", {}), f"mean{metric}")]))
  for title, known in PAPER.items():
    if "imagenet1k" in known:
      rows.append((title, [*(known.get(name, NONE) for name in names), NONE]))
  # The mean is marked if one of its columns is.
  heads = [*(suites.SETS[name].title + marks[name] for name in names), f"mean over 12{max(marks.values())}"]
  per_class = ", ".join(suites.SETS[name].title for name in names if suites.SETS[name].metric == suites.PER_CLASS)
  note = f"Top-1 accuracy in per cent, the mean over classes for {per_class}. {PAPER_NOTE}"
  return f"## Zero-shot classification\n\n{_markdown(heads, rows)}\n\n{note}"


def _mean(records: Mapping[str, Any], metric: str) -> str:
  """Return the mean over 12 or, where fewer sets are there, the mean over these, marked with their number."""
  name, record = next(((name, record) for name, record in records.items() if is_mean(name)), ("", None))
  if record is None:
    return NONE
  value = f"{100 * record['metrics'][metric]:.2f}"
  if record["protocol"]["whole"]:
    return value
  sets = record["protocol"]["sets"]
  whole = all(each in suites.SETS and each in records and suites.is_whole(each, records[each]) for each in sets)
  return f"{name.replace('_', ' ')}{'' if whole else ', not whole'}: {value}"


def _retrieval(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = [*suites.RETRIEVAL]
  if not {*names} & {*_measured("retrieval", by_name)}:
    return ""
  ways = {"text → image": "image_retrieval_recall@1", "image → text": "text_retrieval_recall@1"}
  marks = {name: _mark("retrieval", name, by_name, notes) for name in names}
  columns = [
    Column(f"{suites.SETS[name].title} {way}{marks[name]}", "retrieval", name, metric)
    for name in names
    for way, metric in ways.items()
  ]
  rows: list[Row] = [
    (title, [*(column.cell(results) for column in columns), _mean(results.get("retrieval", {}), "mean_recall@1")])
    for title, results in by_name.items()
  ]
  rows += [
    (title, [NONE] * len(columns) + [known["mean R@1"]]) for title, known in PAPER.items() if "mean R@1" in known
  ]
  heads = [*(column.head for column in columns), f"mean R@1{max(marks.values())}"]
  return f"## Retrieval\n\n{_markdown(heads, rows)}\n\nRecall at 1 in per cent."


def _fid(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = _measured("fid", by_name)
  if not names:
    return ""
  columns = []
  for name in names:
    mark, title = _mark("fid", name, by_name, notes), suites.SETS[name].title if name in suites.SETS else name
    columns += [
      Column(f"{title} FID{mark}", "fid", name, "fid", 1),
      Column(f"{title} KID × 1000{mark}", "fid", name, "kid", 1000, "{:.3f}"),
      Column(f"{title} images{mark}", "fid", name, "num_images", 1, "{:.0f}"),
    ]
  rows: list[Row] = [(title, [column.cell(results) for column in columns]) for title, results in by_name.items()]
  text = f"## FID\n\n{_markdown([column.head for column in columns], rows)}"
  # The paper's figures are of MSCOCO; under another set they would ask to be compared.
  if not suites.FID.keys() & {*names}:
    return text
  for title, known in PAPER.items():
    if "fid" in known:
      is_known = lambda column: column.dataset in suites.FID and column.metric == "fid"
      rows.append((title, [known["fid"] if is_known(column) else NONE for column in columns]))
  return f"## FID\n\n{_markdown([column.head for column in columns], rows)}\n\n{FID_NOTE}"


def _long_tail(by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return Table 8's columns of each set, and the groups of the last."""
  parts = []
  for name in _measured("long_tail", by_name):
    columns = [Column(head, "long_tail", name, metric) for head, metric in LONG_TAIL_COLUMNS.items()]
    rows: list[Row] = [(title, [column.cell(results) for column in columns]) for title, results in by_name.items()]
    rows += [(title, [*known, *[NONE] * (len(columns) - len(known))]) for title, known in LONG_TAIL.items()]
    mark = _mark("long_tail", name, by_name, notes)
    parts.append(f"## Long-tailed recognition, {name}{mark}\n\n{_markdown([*LONG_TAIL_COLUMNS], rows)}")
  return "\n\n".join([*parts, LONG_TAIL_NOTE]) if parts else ""


def _others(by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return the sets that are no part of a suite: every metric a line."""
  tasks = dict.fromkeys(task for results in by_name.values() for task in results)
  columns = []
  for task in tasks:
    for name in _measured(task, by_name):
      if task in ("fid", "long_tail") or (name in suites.SETS and suites.SETS[name].task == task):
        continue  # which have a table of their own
      records = [results[task][name] for results in by_name.values() if name in results.get(task, {})]
      mark = _mark(task, name, by_name, notes)
      for metric in dict.fromkeys(metric for record in records for metric in record["metrics"]):
        columns.append(Column(f"{task}, {name}, {metric}{mark}", task, name, metric, 1, "{:.4f}"))
  rows: list[Row] = [(column.head, [column.cell(results) for results in by_name.values()]) for column in columns]
  return f"## Other sets\n\n{_markdown([*by_name], rows)}" if rows else ""


def _mark(task: str, name: str, by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return a dagger where the protocols of the files differ for this set, and note how they differ."""
  protocols = {
    title: results[task][name]["protocol"] for title, results in by_name.items() if name in results.get(task, {})
  }
  # Models differ in these by nature, and may still be measured alike.
  different = differences(protocols.values(), ignored=OF_A_MODEL)
  # So they do in whether they denoise: CLIP has none of these settings, and is no other way of denoising.
  denoising = differences(each for each in protocols.values() if not {*OF_DENOISING}.isdisjoint(each))
  different = {field: values for field, values in different.items() if field not in OF_DENOISING or field in denoising}
  for field, values in different.items():
    text = "; ".join(f"{title}: {_short(value)}" for title, value in zip(protocols, values, strict=True))
    notes.append(f"- {task}, {name}, {field}: {text}")
  return " †" if different else ""


def _short(value: Any) -> str:
  text = "none" if value is None else json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _markdown(heads: Sequence[str], rows: Sequence[Row]) -> str:
  lines = [["", *heads], ["---"] * (len(heads) + 1), *([title, *cells] for title, cells in rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
