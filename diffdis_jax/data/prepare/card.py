"""The card of a prepared data set: how many pairs, of what size, with captions how long, and what was left out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.data import records, sources
from diffdis_jax.data.transforms import resize
from diffdis_jax.errors import UserError

SAMPLE = 5000  # records of each split that sizes and lengths are taken from
SHEET = 64  # pairs of the contact sheet
EXAMPLES = 16  # captions of it that card.json has
TILE = 128  # pixels, of a picture in it
QUANTILES = {"least": 0.0, "median": 0.5, "most": 1.0}


@dataclasses.dataclass(frozen=True)
class Card:
  """A data set in numbers and pictures.

  Attributes:
    splits: split -> what `_describe` gives, and its report of the preparation.
    images, captions: of the contact sheet, u8[n, TILE, TILE, 3]; of the first split, evenly spread.
  """

  name: str
  version: str
  splits: dict[str, dict[str, Any]]
  images: np.ndarray
  captions: list[str]

  def lines(self) -> list[str]:
    """Return the lines for the log: one for each split, and one for what its preparation left out or changed."""
    lines = [f"{self.name} {self.version}, pairs of {', '.join(self.splits)}"]
    for split, facts in self.splits.items():
      sides, characters = facts["short_side"], facts["caption_characters"]
      kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in facts["formats"].items())
      lines.append(
        f"{split}: {facts['pairs']:,} pairs, {facts['bytes'] / 1e6:,.1f} MB, short side {_range(sides)} px ({kinds}), "
        f"captions of {_range(characters)} characters, {facts['distinct_captions']:.0%} of them distinct"
      )
      for what in ("skipped", "changed"):
        if counts := facts["report"].get(what):
          lines.append(f"{split}: {what} " + ", ".join(f"{n:,} with {reason}" for reason, n in counts.items()))
      if truncated := facts["report"].get("truncated"):
        lines.append(f"{split}: truncated or damaged, read as far as possible: {', '.join(truncated)}")
    return lines

  def to_json(self) -> str:
    shown = list(dict.fromkeys(self.captions))[:EXAMPLES]
    facts = {"name": self.name, "version": self.version, "splits": self.splits, "captions": shown}
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def describe(path: pathlib.Path) -> Card:
  """Describe a folder that prepare_data wrote. Sizes and lengths are of at most SAMPLE records a split.

  Raises:
    UserError: no prepared data set there, or one of which nothing can be read.
  """
  info = records.read_info(path)
  splits, sheet = {}, []
  for split, split_info in info.splits.items():
    source = sources.open_source(name="pairs", path=path, split=split, image_size=TILE)
    facts = _describe(source, spread(len(source), SAMPLE))
    report = (info.metadata or {}).get(split, {})
    splits[split] = {"pairs": len(source), "bytes": int(split_info.num_bytes), **facts, "report": report}
    if not sheet:  # of the first split that has images
      for place in spread(len(source), SHEET):
        with contextlib.suppress(records.Unusable):
          record = source[int(place)]
          sheet.append((np.asarray(resize(records.read_image(record["image"]), TILE)), record["caption"]))
  images, captions = zip(*sheet, strict=True) if sheet else ((), ())
  return Card(info.name, str(info.version), splits, np.asarray(images, np.uint8), list(captions))


def spread(n: int, count: int) -> Int[np.ndarray, " k"]:
  """Return at most `count` of n places, evenly apart, from the first on."""
  # Not at random, so that the same folder has the same card.
  return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def _describe(source: sources.Source, places: Int[np.ndarray, " k"]) -> dict[str, Any]:
  """Return quantiles of the stored images' sides and of the captions' lengths, and shares."""
  sides, formats, captions = [], Counter(), []
  for place in places:
    try:
      record = source[int(place)]
      # The header alone: no pixel is needed for what is said here.
      header = records.read_header(record["image"])
    except records.Unusable:
      formats["unreadable"] += 1
      continue
    sides.append((header.width, header.height))
    formats[header.format] += 1
    captions += records.captions_of(record) or [record["caption"]]
  if len(places) and not sides:
    raise UserError(f"none of {len(places)} records can be read; copy the data set again, or prepare it again")
  widths_heights = np.asarray(sides or [(0, 0)])
  return {
    "sampled": len(places),
    "short_side": _quantiles(widths_heights.min(axis=1)),
    "long_side": _quantiles(widths_heights.max(axis=1)),
    "formats": {kind: count / len(places) for kind, count in formats.most_common()},
    "caption_characters": _quantiles([len(caption) for caption in captions]),
    "caption_words": _quantiles([len(caption.split()) for caption in captions]),
    "captions_an_image": len(captions) / max(1, len(sides)),
    "distinct_captions": len(set(captions)) / max(1, len(captions)),
  }


def _quantiles(values: Sequence[int] | Int[np.ndarray, " n"]) -> dict[str, int]:
  values = values if len(values) else [0]
  return {name: int(np.quantile(values, q, method="nearest")) for name, q in QUANTILES.items()}


def _range(quantiles: dict[str, int]) -> str:
  return f"{quantiles['least']}-{quantiles['most']} (median {quantiles['median']})"
