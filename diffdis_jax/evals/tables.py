"""Write results as Markdown in the paper's layout, of one file or of several side by side."""

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
# The fields of a protocol that say how an image's text query is denoised: those of config.sections.Sampling.
OF_DENOISING = ("steps", "num_noise_samples", "guidance", "normalize_query")
Row = tuple[str, list[str]]


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
  found = {title: result_files.read(path) for title, path in zip(titles, paths, strict=True)}
  result_files.write_text(out, table(found))


def write(run: str, results: Results, out: str) -> None:
  """Write a run's results as a table beside the JSON file `out`, on process 0. Raises UserError: it cannot be."""
  if processes.is_first():
    title = pathlib.PurePath(run).name
    result_files.write_text(f"{out.removesuffix('.json')}.md", table({title: results}))


def table(by_name: Mapping[str, Results]) -> str:
  """Return one row a file of results, with the paper's row under them; what is measured by different protocols is
  marked.

  Args:
    by_name: what a row is called -> its results.
  """
  notes: list[str] = []
  parts = [make(by_name, notes) for make in (_zero_shot, _retrieval, _fid, _long_tail, _others)]
  text = "\n\n".join(part for part in parts if part)
  if notes:
    notes = ["† Measured by different protocols, and so not to be compared as they stand:", "", *notes]
    text += "\n\n" + "\n".join(notes)
  return text + "\n"


def _zero_shot(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = [*suites.ZERO_SHOT12]
  if not any(name in results.get("zero_shot", {}) for results in by_name.values() for name in names):
    return ""
  marks = {name: _mark("zero_shot", name, by_name, notes) for name in names}
  rows: list[Row] = []
  for title, results in by_name.items():
    found = results.get("zero_shot", {})
    for suffix, single in (("", False), (", single template", True)):
      cells = [_percent(suites.figure(name, found[name], single=single) if name in found else None) for name in names]
      rows.append((f"{title}{suffix}", [*cells, _mean(found, "mean_single_template" if single else "mean")]))
  rows += [
    (title, [*(known.get(name, NONE) for name in names), NONE])
    for title, known in PAPER.items()
    if "imagenet1k" in known
  ]
  # The mean is marked if one of its columns is.
  heads = [*(suites.SETS[name].title + marks[name] for name in names), f"mean over 12{max(marks.values())}"]
  per_class = ", ".join(suites.SETS[name].title for name in names if suites.SETS[name].metric == suites.PER_CLASS)
  note = f"Top-1 accuracy in per cent, the mean over classes for {per_class}. {PAPER_NOTE}"
  return f"## Zero-shot classification\n\n{_markdown(heads, rows)}\n\n{note}"


def _mean(found: Mapping[str, Any], metric: str) -> str:
  """Return the mean over 12 or, where fewer sets are there, the mean over these, marked with their number."""
  name, record = next(((name, record) for name, record in found.items() if is_mean(name)), ("", None))
  if record is None:
    return NONE
  value = f"{100 * record['metrics'][metric]:.2f}"
  if record["protocol"]["whole"]:
    return value
  sets = record["protocol"]["sets"]
  whole = all(each in suites.SETS and each in found and suites.is_whole(each, found[each]) for each in sets)
  return f"{name.replace('_', ' ')}{'' if whole else ', not whole'}: {value}"


def _retrieval(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = [*suites.RETRIEVAL]
  if not any(name in results.get("retrieval", {}) for results in by_name.values() for name in names):
    return ""
  ways = {"text → image": "image_retrieval_recall@1", "image → text": "text_retrieval_recall@1"}
  marks = {name: _mark("retrieval", name, by_name, notes) for name in names}
  heads = [f"{suites.SETS[name].title} {way}{marks[name]}" for name in names for way in ways]
  rows: list[Row] = []
  for title, results in by_name.items():
    found = results.get("retrieval", {})
    cells = [
      _percent(found[name]["metrics"][metric] if name in found else None) for name in names for metric in ways.values()
    ]
    rows.append((title, [*cells, _mean(found, "mean_recall@1")]))
  rows += [(title, [*[NONE] * len(heads), known["mean R@1"]]) for title, known in PAPER.items() if "mean R@1" in known]
  return f"## Retrieval\n\n{_markdown([*heads, f'mean R@1{max(marks.values())}'], rows)}\n\nRecall at 1 in per cent."


def _fid(by_name: Mapping[str, Results], notes: list[str]) -> str:
  names = [*dict.fromkeys(name for results in by_name.values() for name in results.get("fid", {}))]
  if not names:
    return ""
  heads, columns = [], []
  for name in names:
    mark = _mark("fid", name, by_name, notes)
    title = suites.SETS[name].title if name in suites.SETS else name
    for metric, shown, digits in (("fid", "FID", 2), ("kid", "KID × 1000", 3), ("num_images", "images", 0)):
      heads.append(f"{title} {shown}{mark}")
      columns.append((name, metric, digits))
  rows: list[Row] = []
  for title, results in by_name.items():
    metrics = {name: record["metrics"] for name, record in results.get("fid", {}).items()}
    cells = []
    for name, metric, digits in columns:
      value = metrics.get(name, {}).get(metric)
      cells.append(NONE if value is None else f"{value * (1000 if metric == 'kid' else 1):.{digits}f}")
    rows.append((title, cells))
  # The paper's figures are of MSCOCO; under another set they would ask to be compared.
  if not suites.FID.keys() & {*names}:
    return f"## FID\n\n{_markdown(heads, rows)}"
  for title, known in PAPER.items():
    if "fid" in known:
      cells = [known["fid"] if name in suites.FID and metric == "fid" else NONE for name, metric, _ in columns]
      rows.append((title, cells))
  note = "The paper says of its FID that it is of images generated from MSCOCO's captions, and not how many."
  return f"## FID\n\n{_markdown(heads, rows)}\n\n{note}"


def _long_tail(by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return Table 8's columns of each set, and the groups of the last."""
  names = [*dict.fromkeys(name for results in by_name.values() for name in results.get("long_tail", {}))]
  parts = []
  for name in names:
    rows: list[Row] = []
    for title, results in by_name.items():
      metrics = results.get("long_tail", {}).get(name, {}).get("metrics", {})
      rows.append((title, [_percent(metrics.get(column)) for column in LONG_TAIL_COLUMNS.values()]))
    rows += [(title, [*known, *[NONE] * (len(LONG_TAIL_COLUMNS) - len(known))]) for title, known in LONG_TAIL.items()]
    mark = _mark("long_tail", name, by_name, notes)
    parts.append(f"## Long-tailed recognition, {name}{mark}\n\n{_markdown([*LONG_TAIL_COLUMNS], rows)}")
  if not parts:
    return ""
  note = (
    "Accuracy on test images in per cent. The first three columns are of the backbone, after stage 1 where there was"
    " one; Acc is the head's, after stage 2. Many, median and low: classes with more than 99, 21 to 99, and at most 20"
    " training images. The paper's rows are of Places-LT."
  )
  return "\n\n".join([*parts, note])


def _others(by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return the sets that are no part of a suite: every metric a line."""
  keys = dict.fromkeys(
    (task, name, metric)
    for results in by_name.values()
    for task, records in results.items()
    for name, record in records.items()
    if not is_mean(name) and not _has_column(task, name)
    for metric in record["metrics"]
  )
  if not keys:
    return ""
  marks = {key[:2]: _mark(*key[:2], by_name, notes) for key in keys}
  rows: list[Row] = []
  for task, name, metric in keys:
    values = [results.get(task, {}).get(name, {}).get("metrics", {}).get(metric) for results in by_name.values()]
    shown = [NONE if value is None else f"{value:.4f}" for value in values]
    rows.append((f"{task}, {name}, {metric}{marks[task, name]}", shown))
  return f"## Other sets\n\n{_markdown([*by_name], rows)}"


def _has_column(task: str, name: str) -> bool:
  """Return whether the set's figures of this task stand in a table of their own."""
  return task in ("fid", "long_tail") or (name in suites.SETS and suites.SETS[name].task == task)


def _mark(task: str, name: str, by_name: Mapping[str, Results], notes: list[str]) -> str:
  """Return a dagger where the protocols of the files differ for this set, and note how they differ."""
  found = {title: results[task][name] for title, results in by_name.items() if name in results.get(task, {})}
  protocols = [record["protocol"] for record in found.values()]
  # Models differ in these by nature, and may still be measured alike.
  different = differences(protocols, ignored=OF_A_MODEL)
  # So they do in whether they denoise: CLIP has none of these settings, and is no other way of denoising.
  denoising = differences(protocol for protocol in protocols if not {*OF_DENOISING}.isdisjoint(protocol))
  different = {name: each for name, each in different.items() if name not in OF_DENOISING or name in denoising}
  for field, values in different.items():
    said = "; ".join(f"{title}: {_short(value)}" for title, value in zip(found, values, strict=True))
    notes.append(f"- {task}, {name}, {field}: {said}")
  return " †" if different else ""


def _short(value: Any) -> str:
  text = "none" if value is None else json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _percent(value: float | None) -> str:
  return NONE if value is None else f"{100 * value:.2f}"


def _markdown(heads: Sequence[str], rows: Sequence[Row]) -> str:
  lines = [["", *heads], ["---"] * (len(heads) + 1), *([title, *cells] for title, cells in rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
