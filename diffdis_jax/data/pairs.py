"""TFDS builder that turns webdataset tars of image-caption pairs into ArrayRecord shards."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from diffdis_jax.data.transforms import decode
from diffdis_jax.data.webdataset import RawPair, TarReader

_CHUNK = 256  # pairs decoded at a time to check them
_FIRST = 10  # skipped pairs named in the report, of each reason


@dataclasses.dataclass
class SplitReport:
  """What became of the tars of one split. A reason is one of those that `defect` gives."""

  pairs: int = 0
  skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  first_skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  truncated_tars: list[str] = dataclasses.field(default_factory=list)

  def skip(self, key: str, reason: str) -> None:
    self.skipped[reason] += 1
    first = self.first_skipped.setdefault(reason, [])
    if len(first) < _FIRST:
      first.append(key)


def defect(pair: RawPair) -> str | None:
  """Why a pair cannot be used, or None. Decodes the whole image; json may be absent, but must be an object."""
  if pair.image is None:
    return "missing image"
  if pair.caption is None or not pair.caption.strip():
    return "missing caption"
  try:
    pair.caption.decode()
  except UnicodeDecodeError:
    return "caption is not UTF-8"
  try:
    if not isinstance(json.loads(pair.metadata or b"{}"), dict):
      return "json is not an object"
  except ValueError:
    return "corrupt json"
  try:
    decode(pair.image)
  except Exception:  # PIL's readers raise whatever a broken file leads them into
    return "corrupt image"
  return None


class Pairs(tfds.core.GeneratorBasedBuilder):
  """Image-caption pairs, every image's bytes unchanged.

  A record is {image: encoded bytes, caption, key: "TAR/KEY", metadata: the json beside the image, as text}. Order is that
  of the tars. A pair that cannot be used is skipped and counted.

  Attributes:
    reports: split -> SplitReport, complete once the data set is written.
  """

  name = "pairs"
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First version."}

  def __init__(self, *, tars: Mapping[str, Sequence[pathlib.Path]], **kwargs: Any):
    self._tars = tars
    self.reports = {split: SplitReport() for split in tars}
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Image-caption pairs prepared from webdataset tars in img2dataset's layout.",
      citation="@misc{beaumont2021img2dataset, author = {Romain Beaumont}, year = {2021}, title = {img2dataset: Easily "
      "turn large sets of image urls to an image dataset}, url = {https://github.com/rom1504/img2dataset}}",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(),
          "caption": tfds.features.Text(),
          "key": tfds.features.Text(),
          "metadata": tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
    return {split: self._generate_examples(split) for split in self._tars}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    report = self.reports[split]
    for tar in self._tars[split]:
      reader = TarReader(tar)
      for pair, reason in _checked(reader):
        key = f"{tar.stem}/{pair.key}"
        if reason:
          report.skip(key, reason)
          continue
        metadata = (pair.metadata or b"{}").decode()
        yield report.pairs, {"image": pair.image, "caption": pair.caption.decode().strip(), "key": key, "metadata": metadata}
        report.pairs += 1
      if reader.truncated:
        report.truncated_tars.append(tar.name)
      logging.info("%s: %d pairs of %s so far, %d skipped", tar.name, report.pairs, split, report.skipped.total())
    self.info.metadata[split] = dataclasses.asdict(report)


def _checked(reader: TarReader) -> Iterator[tuple[RawPair, str | None]]:
  pairs = iter(reader)
  with ThreadPoolExecutor() as pool:
    while chunk := list(itertools.islice(pairs, _CHUNK)):
      yield from zip(chunk, pool.map(defect, chunk), strict=True)
