"""The suite of emoji: a prepared data set's held-out artists and concepts, and OpenMoji where it is there."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

from absl import logging

from diffdis_jax.data import records
from diffdis_jax.errors import UserError
from diffdis_jax.evals.base import Eval
from diffdis_jax.evals.hog import Hog
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.sections import Section
from diffdis_jax.evals.zero_shot import ZeroShot

TEMPLATES = ("an emoji of {}", "{}", "icon of {}")
# Split -> images of it.
COUNTS = {"test_vendor": 1_364, "val_vendor": 895, "val_concepts": 757, "openmoji": 1_364}
OPTIONAL = "openmoji"
# Whose artists training saw. Every other split is of an artist who is not in it.
OF_TRAINING = ("train", "val_concepts")
CHOSEN_ON = "val_vendor"  # settings are, and so it is no part of the mean over held-out artists
SETS = {f"emoji/{split}": count for split, count in COUNTS.items()}
AGAIN = "prepare it again with diffdis prepare_data emoji"


def sections(root: pathlib.Path, *, image_size: int) -> list[Section]:
  """Zero-shot classification and retrieval on each split that is there, those of further artists included; of each
  artist who is not in training also the baseline `hog`, on the same images.

  Of retrieval, whatever bears the query's caption is right: in `val_concepts` several artists' images have the same.

  Args:
    root: the prepared folder, or one that holds it as `emoji`.
    image_size: of the run.

  Raises:
    UserError: there is none, or it lacks a split.
  """
  # As the other suites look under ROOT/NAME; but the prepared folder itself is what a user has at hand.
  path = next((each for each in (root, root / "emoji") if (each / "dataset_info.json").exists()), None)
  if path is None:
    raise UserError(
      f"no emoji in --data_root={root}, neither in it nor in its folder emoji; write them there by"
      " diffdis prepare_data emoji"
    )
  there = records.read_info(path).splits
  # A partial set would give a partial table without a word; only OpenMoji is a package of its own.
  if missing := [split for split in ("train", *COUNTS) if split not in there and split != OPTIONAL]:
    raise UserError(f"{path} has no split {missing[0]}, which the suite emoji needs; {AGAIN}")
  splits = [*(split for split in COUNTS if split in there), *sorted({*there} - {"train", *COUNTS})]
  if OPTIONAL not in splits:
    logging.info("%s has no split %s, and so it is not measured", path, OPTIONAL)
  found = []
  for split in splits:
    data = {"name": "pairs", "path": str(path), "split": split, "image_size": image_size}
    zero_shot: dict[str, Any] = {"data": data, "label_field": "concept", "templates": TEMPLATES}
    # Its icons have concepts that training saw in other styles, and concepts that it never saw.
    if split not in OF_TRAINING:
      zero_shot["seen_split"] = "train"
    found.append(Section(f"emoji/{split}", "zero_shot", zero_shot))
    found.append(Section(f"emoji/{split}", "retrieval", {"data": data, "duplicate_captions": True}))
    if split not in OF_TRAINING:
      found.append(Section(f"emoji/{split}", "hog", {"data": data, "label_field": "concept"}))
  return found


def held_out(names: Iterable[str]) -> list[str]:
  """Those of these data sets that are of an artist who is not in training."""
  return [name for name in names if name.startswith("emoji/") and name.split("/")[1] not in OF_TRAINING]


def check(name: str, evaluation: Eval, *, incomplete: bool) -> None:
  """Raises UserError: the split has not as many images as published, unless that may be."""
  assert isinstance(evaluation, ZeroShot | Retrieval | Hog)
  count, expected = len(evaluation.source), SETS[name]
  if count != expected and not incomplete:
    raise UserError(
      f"{name} has {count:,} images, and should have {expected:,}; {AGAIN}, or give --incomplete to measure what is"
      " there"
    )
