"""Webdataset tars of image-caption pairs -> a TFDS folder of ArrayRecord shards."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from diffdis_jax.data.transforms import decode
from diffdis_jax.data.webdataset import RawPair, TarReader, split_of
from diffdis_jax.structs import UserError

_CHUNK = 256  # pairs decoded at a time to check them
_FIRST = 10  # skipped pairs named in the report, of each reason


@dataclasses.dataclass
class SplitReport:
  """What became of the tars of one split. A reason is one of those that `defect` gives."""

  pairs: int = 0
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  first_skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  truncated_tars: list[str] = dataclasses.field(default_factory=list)

  def skip(self, key: str, reason: str) -> None:
    self.skipped[reason] = self.skipped.get(reason, 0) + 1
    first = self.first_skipped.setdefault(reason, [])
    if len(first) < _FIRST:
      first.append(key)

  def reasons(self) -> str:
    """ "2 with corrupt image, 1 with missing caption"; empty if none was skipped."""
    return ", ".join(f"{count} with {reason}" for reason, count in self.skipped.items())


def prepare(source: pathlib.Path, out: pathlib.Path) -> dict[str, SplitReport]:
  """Writes folder `out`, whole or not at all.

  Returns:
    What became of the tars of each split; `out/report.json` says the same.

  Raises:
    UserError: no tars, a tar of unknown split, `out` not an empty folder, or a split without one usable pair.
  """
  tars = find_tars(source)
  out = out.resolve()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists and is not an empty folder; name a new one")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the folder of --out={out}: {error.strerror}; name one that can be written") from error
  with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
    builder = Pairs(tars=tars, data_dir=temporary)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download there
      builder.download_and_prepare()
    folder = pathlib.Path(builder.data_dir)
    report = {split: dataclasses.asdict(report) for split, report in builder.reports.items()}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    folder.replace(out)
  return builder.reports


def find_tars(source: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Split -> its tars, by name.

  Raises:
    UserError: no folder, no tars in it, or a tar whose name gives no split.
  """
  if not source.is_dir():
    raise UserError(f"no folder {source}; --source is a folder of webdataset tars")
  tars = collections.defaultdict(list)
  for path in sorted(source.glob("*.tar")):
    split = split_of(path)
    if split is None or split == "all":
      raise UserError(f"cannot tell the split of {path.name}; name tars SPLIT-00000.tar, SPLIT not 'all', or 00000.tar")
    tars[split].append(path)
  if not tars:
    raise UserError(f"no .tar files in {source}; --source is a folder of webdataset tars, such as img2dataset writes")
  return dict(tars)


def defect(pair: RawPair) -> str | None:
  """Why a pair cannot be used, or None. Decodes the whole image; json may be absent, but must be an object."""
  if pair.image is None:
    return "missing image"
  if pair.caption is None or not pair.caption.strip():
    return "missing caption"
  try:
    pair.caption.decode()
  except UnicodeDecodeError:
    return "caption that is not UTF-8"
  try:
    if not isinstance(json.loads(pair.metadata or b"{}"), dict):
      return "json that is no object"
  except ValueError:
    return "corrupt json"
  try:
    decode(pair.image)
  except Exception:  # PIL's readers raise whatever a broken file leads them into
    return "corrupt image"
  return None


class Pairs(tfds.core.GeneratorBasedBuilder):
  """Image-caption pairs, every image's bytes unchanged.

  A record is {image: encoded bytes, caption, key: "TAR/KEY", metadata: the json beside the image, as text}. Their order
  is that of the tars. A pair that cannot be used is skipped and counted.

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
        caption, metadata = pair.caption.decode().strip(), (pair.metadata or b"{}").decode()
        yield report.pairs, {"image": pair.image, "caption": caption, "key": key, "metadata": metadata}
        report.pairs += 1
      if reader.truncated:
        report.truncated_tars.append(tar.name)
      logging.info("%s: %d pairs of %s so far, %d skipped", tar.name, report.pairs, split, sum(report.skipped.values()))
    if not report.pairs:
      raise UserError(f"no usable pair in the tars of split {split}: {report.reasons() or 'no files of pairs in them'}")
    self.info.metadata[split] = dataclasses.asdict(report)


def _checked(reader: TarReader) -> Iterator[tuple[RawPair, str | None]]:
  pairs = iter(reader)
  with ThreadPoolExecutor() as pool:
    while chunk := list(itertools.islice(pairs, _CHUNK)):
      yield from zip(chunk, pool.map(defect, chunk), strict=True)
