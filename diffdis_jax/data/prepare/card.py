"""The card of a prepared data set: how many pairs it has, of what size, with captions how long, and 64 of them."""

from __future__ import annotations

import contextlib
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.data import records, sources
from diffdis_jax.data.transforms import resize

SAMPLE = 5000  # records of each split that sizes and lengths are taken from
SHEET = 64  # pairs of the contact sheet
TILE = 128  # pixels, of a picture in it


class Card(NamedTuple):
  """A data set in numbers and pictures.

  Attributes:
    splits: split -> what `_describe` gives.
    images, captions: of the contact sheet; of the first split, evenly spread.
  """

  splits: dict[str, dict[str, Any]]
  images: UInt8[np.ndarray, "n h w 3"]
  captions: list[str]

  def lines(self) -> list[str]:
    """Return a line for each split, for the log."""
    return [
      f"{split}: {facts['pairs']:,} pairs, short side {_range(facts['short_side'])} px"
      f" ({', '.join(f'{kind} {share:.0%}' for kind, share in facts['formats'].items())}), captions of"
      f" {_range(facts['caption_characters'])} characters, {facts['distinct_captions']:.0%} of them distinct"
      for split, facts in self.splits.items()
    ]


def describe(path: pathlib.Path) -> Card:
  """Describe a folder that prepare_data wrote. Sizes and lengths are of at most SAMPLE records a split.

  Raises:
    UserError: no prepared data set there.
  """
  splits, sheet = {}, []
  for split in records.read_info(path).splits:
    source = sources.open_source(name="pairs", path=path, split=split, image_size=TILE)
    splits[split] = _describe(source)
    if not sheet:  # of the first split that has images
      for place in spread(len(source), SHEET):
        with contextlib.suppress(records.Unusable):
          record = source[int(place)]
          sheet.append((np.asarray(resize(records.read_image(record["image"]), TILE)), record["caption"]))
  images, captions = zip(*sheet, strict=True) if sheet else ((), ())
  return Card(splits, np.asarray(images, np.uint8).reshape(-1, TILE, TILE, 3), list(captions))


def spread(n: int, count: int) -> Int[np.ndarray, " k"]:
  """Return at most `count` of n places, evenly apart, from the first on."""
  # Not at random, so that the same folder has the same card.
  return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def _describe(source: sources.Source) -> dict[str, Any]:
  """Return quantiles of the stored images' sides and of the captions' lengths, and shares."""
  sides, formats, captions = [], Counter(), []
  for place in spread(len(source), SAMPLE):
    with contextlib.suppress(records.Unusable):
      record = source[int(place)]
      header = records.read_header(record["image"])
      sides.append(min(header.width, header.height))
      formats[header.format] += 1
      captions += records.captions_of(record) or [record["caption"]]
  return {
    "pairs": len(source),
    "short_side": _quantiles(sides),
    "formats": {kind: count / len(sides) for kind, count in formats.most_common()},
    "caption_characters": _quantiles([len(caption) for caption in captions]),
    "distinct_captions": len(set(captions)) / max(1, len(captions)),
  }


def _quantiles(values: Sequence[int]) -> dict[str, int]:
  quantiles = {"least": 0.0, "median": 0.5, "most": 1.0}
  return {name: int(np.quantile(values or [0], q, method="nearest")) for name, q in quantiles.items()}


def _range(quantiles: dict[str, int]) -> str:
  return f"{quantiles['least']}-{quantiles['most']} (median {quantiles['median']})"
