"""Evaluate a run on the emoji's held-out artists and concepts, and on OpenMoji if it is there, with a baseline.

  python -m replication.measure_emoji --workdir=RUN --data_root=data --out=suite.json

suite.md compares the run on artists who are not in training with `hog` on the same images. Run it again to resume.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

from absl import flags, logging

from diffdis_jax import config, evaluate
from diffdis_jax.common import cli
from diffdis_jax.data import records
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import tables
from diffdis_jax.evals.base import Evaluation
from diffdis_jax.evals.results import Results
from diffdis_jax.evals.tasks import Section
from replication import extensions

FLAGS = flags.FLAGS
TEMPLATES = ("an emoji of {}", "{}", "icon of {}")
# The published number of images of each split.
COUNTS = {"test_vendor": 1_364, "val_vendor": 895, "val_concepts": 757, "openmoji": 1_364}
OPTIONAL = "openmoji"
# Training saw the artists of these splits. All other splits have artists who are not in training.
OF_TRAINING = ("train", "val_concepts")
CHOSEN_ON = "val_vendor"  # settings are chosen on it, so the mean over held-out artists excludes it
SETS = {f"emoji/{split}": count for split, count in COUNTS.items()}
AGAIN = "prepare it again with python -m replication.prepare_emoji"


def sections(root: pathlib.Path, *, image_size: int) -> list[Section]:
  """Return the evaluations: zero-shot classification and retrieval on each split that is there, and the baseline `hog`
  on the same images for each artist who is not in training.

  In retrieval, every image with the query's caption is correct: in `val_concepts` images by several artists share one.

  Args:
    root: the prepared folder, or a folder that has it as `emoji`.
    image_size: image size of the run.

  Raises:
    UserError: no prepared folder there, or a missing split.
  """
  path = next((folder for folder in (root, root / "emoji") if (folder / "dataset_info.json").exists()), None)
  if path is None:
    raise UserError(f"no emoji in --data_root={root}, neither in it nor in its folder emoji; {AGAIN}")
  available = records.read_info(path).splits
  # A partial set would silently give a partial table. Only OpenMoji, a package of its own, may be absent.
  if missing := [split for split in ("train", *COUNTS) if split not in available and split != OPTIONAL]:
    raise UserError(f"{path} has no split {missing[0]}; {AGAIN}")
  splits = [*(split for split in COUNTS if split in available), *sorted({*available} - {"train", *COUNTS})]
  if OPTIONAL not in splits:
    logging.info("%s has no split %s, and so it is not measured", path, OPTIONAL)
  chosen = []
  for split in splits:
    data = {"name": "pairs", "path": str(path), "split": split, "image_size": image_size}
    zero_shot: dict[str, Any] = {"data": data, "label_field": "concept", "templates": TEMPLATES}
    # Training saw some concepts of its icons in other styles, and never saw others.
    if split not in OF_TRAINING:
      zero_shot["seen_split"] = "train"
    chosen.append(Section(f"emoji/{split}", "zero_shot", zero_shot))
    chosen.append(Section(f"emoji/{split}", "retrieval", {"data": data, "duplicate_captions": True}))
    if split not in OF_TRAINING:
      chosen.append(Section(f"emoji/{split}", "hog", {"data": data, "label_field": "concept"}))
  return chosen


def held_out(names: Iterable[str]) -> list[str]:
  """Return the data sets by artists who are not in training."""
  return [name for name in names if name.startswith("emoji/") and name.split("/")[1] not in OF_TRAINING]


def check(name: str, evaluation: Evaluation, *, incomplete: bool) -> None:
  """Raise UserError if the split has another number of images than published, unless `--incomplete` allows it."""
  count, expected = len(evaluation.source), SETS.get(name)  # pyright: ignore[reportAttributeAccessIssue]
  if expected is not None and count != expected and not incomplete:
    raise UserError(
      f"{name} has {count:,} images, and should have {expected:,}; {AGAIN}, or give --incomplete to measure what is"
      " there"
    )


def table(title: str, results: Results) -> str:
  """Return a table in per cent, with a column for each artist not in training, and the baseline below the run."""
  names = held_out(results.get("zero_shot", {}))
  lines = [["", *(name.removeprefix("emoji/") for name in names), "mean of the test artists"]]
  lines.append(["---"] * len(lines[0]))
  for suffix, task in (("", "zero_shot"), (", HOG", "hog")):
    accuracy = {name: 100 * results[task][name]["metrics"]["acc1_seen"] for name in names}
    tested = [accuracy[name] for name in names if name != f"emoji/{CHOSEN_ON}"]
    cells = [f"{value:.2f}" for value in (*(accuracy[name] for name in names), sum(tested) / len(tested))]
    lines.append([f"{title}{suffix}", *cells])
  note = (
    "Top-1 in per cent on icons of concepts that training saw in other artists' styles. HOG is the nearest training"
    " icon's concept by edges and colours, which learns nothing. The mean leaves out "
    f"{CHOSEN_ON}, on which settings are chosen."
  )
  rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  return f"## Emoji of artists who are not in training\n\n{rows}\n\n{note}\n"


def main(argv: object) -> None:
  extensions.add()
  cli.compilation_cache()
  cli.use_all_cores()
  result_files.check_out(FLAGS.out)
  evaluations = sections(pathlib.Path(FLAGS.data_root), image_size=config.load(FLAGS.workdir).image_size)
  result_file = result_files.ResultFile(FLAGS.out)
  of_count = functools.partial(check, incomplete=FLAGS.incomplete)
  measured = evaluate.evaluate(FLAGS.workdir, evaluations, kept=result_file, check=of_count)
  result_file.write()
  title = pathlib.PurePath(FLAGS.workdir).name
  text = f"{table(title, measured)}\n{tables.table({title: measured})}"
  result_files.write_text(f"{FLAGS.out.removesuffix('.json')}.md", text)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string("data_root", None, "the prepared emoji, or the folder that holds them as emoji", required=True)
  flags.DEFINE_string("out", None, "JSON file to write", required=True)
  flags.DEFINE_boolean("incomplete", False, "measure splits whose number of images is not the published one, too")
  cli.run(main)
