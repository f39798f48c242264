"""Prepared data sets: raw image-caption pairs -> a TFDS folder of ArrayRecord files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_data_source

from diffdis_jax.common import files
from diffdis_jax.data.prepare import staging
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.data.prepare.staging import Report, Stage
from diffdis_jax.errors import UserError

DUPLICATE = "duplicate image"
LICENSES = "LICENSES.md"  # a notice beside the records
UNIQUE = ".unique"  # ending of a part's records without duplicates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The settings of a preparation.

  Attributes:
    short_side: images whose short side is longer are stored as JPEG of this short side; None keeps every image's bytes.
    reduced_decoding: JPEGs of twice that short side or more are decoded at 1/2, 1/4 or 1/8 of their size.
    drop_duplicates: of images with the same bytes keep the first one: of the splits but `train` in their order, then of
      `train`, so that no held-out image is trained on.
    num_processes, beam_options: as staging.write_all takes them. They change nothing in what is written.
  """

  short_side: int | None = None
  reduced_decoding: bool = True
  drop_duplicates: bool = False
  num_processes: int = 1
  beam_options: tuple[str, ...] = ()


class _Shard(NamedTuple):
  """A file of records, and how many it has."""

  path: pathlib.Path
  length: int


class _Shards(NamedTuple):
  """The report of a split's parts, and their files of records. Files without records are left out."""

  report: Report
  files: list[_Shard]


class CaptionedImages(tfds.core.GeneratorBasedBuilder):
  """Image-caption pairs, a file of records for each part of the raw data, in the order of the parts.

  A record is {image: encoded bytes, caption, key: where the pair comes from, metadata: the json beside it, as text}. A
  pair that cannot be used is skipped and counted. The reports of the splits are the data set's metadata.

  Attributes:
    reports: split -> Report, complete once the data set is written.
  """

  VERSION = tfds.core.Version("1.1.0")
  DESCRIPTION = ""
  CITATION = ""
  HOMEPAGE = ""

  def __init__(self, *, parts: Sequence[Part], stage: Stage, settings: Settings, **kwargs: Any):
    self._stage, self._settings = stage, settings
    self._parts: dict[str, list[Part]] = {}
    for part in parts:
      self._parts.setdefault(part.split, []).append(part)
    self.reports: dict[str, Report] = {}
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      citation=self.CITATION,
      homepage=self.HOMEPAGE or None,
      features=self._stage.features(),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def notices(self) -> dict[str, str]:
    """Text files that belong beside the records, such as licences: name -> content."""
    return {}

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Any]:
    return self._parts

  def _generate_examples(self, *args: Any) -> Any:
    raise NotImplementedError("_download_and_prepare writes the files of all splits at once")

  def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
    """Has every part written, and makes the parts' files the shards of the splits."""
    del dl_manager, download_config
    parts = [part for parts in self._parts.values() for part in parts]
    settings = self._settings
    staging.write_all(self._stage, parts, num_processes=settings.num_processes, beam_options=settings.beam_options)
    # After all parts are written: which one has an image first depends on no process's speed.
    duplicates = self._find_duplicates() if settings.drop_duplicates else {}
    shards = {split: self._shards(parts, duplicates) for split, parts in self._parts.items()}
    self.reports = {split: each.report for split, each in shards.items()}
    if not settings.drop_duplicates:  # which leaves none
      self._count_shared()
    if lacking := [split for split, each in shards.items() if not each.files]:
      kept = [split for split in shards if split not in lacking]
      raise UserError(
        f"no usable pair in split {lacking[0]}: {_none_usable(self.reports[lacking[0]])}"
        + (f"; what is finished of {' and '.join(kept)} is kept" if kept else "")
      )
    infos, metadata = [], cast(dict[str, Any], self.info.metadata)
    for split, each in shards.items():
      infos.append(self._link(split, each.files))
      metadata[split] = dataclasses.asdict(each.report)
    metadata.update(self._stage.facts())
    self.info.set_splits(tfds.core.SplitDict(infos))

  def _shards(self, parts: Sequence[Part], duplicates: Mapping[str, list[int]]) -> _Shards:
    total, shards = Report(), []
    # In the order of the parts, so that killed and whole preparations end in the same records.
    for part in parts:
      report, path = self._stage.report_of(part), self._stage.records_of(part)
      if dropped := duplicates.get(part.name, []):
        # Beside the part's own file, which stays as its report says it is.
        path = path.with_suffix(UNIQUE)
        keys = _copy_without(self._stage.records_of(part), path, set(dropped))
        report.pairs -= len(dropped)
        for key in keys:
          report.skip(key, DUPLICATE)
      total.add(report)
      if report.pairs:
        shards.append(_Shard(path, report.pairs))
    return _Shards(total, shards)

  def _find_duplicates(self) -> dict[str, list[int]]:
    """Part -> places of records whose image came before. Memory: 16 bytes and an index for each record."""
    # `train` last, so that of an image in two splits the held-out one stays.
    order = sorted(self._parts, key=lambda split: split == "train")
    parts = [part for split in order for part in self._parts[split]]
    digests = [self._stage.digests_of(part) for part in parts]
    _, first = np.unique(np.concatenate(digests), return_index=True)
    repeated = np.ones(sum(map(len, digests)), bool)
    repeated[first] = False
    borders = np.cumsum([len(array) for array in digests])[:-1]
    return {part.name: np.flatnonzero(own).tolist() for part, own in zip(parts, np.split(repeated, borders))}

  def _count_shared(self) -> None:
    """Count the images that two splits have, by their bytes, and say how many there are in one line."""
    digests = {
      split: np.concatenate([self._stage.digests_of(part) for part in parts]) for split, parts in self._parts.items()
    }
    held_out_first, lines = sorted(digests, key=lambda split: split == "train"), []
    for split, other in itertools.combinations(held_out_first, 2):
      if count := int(np.isin(digests[split], digests[other]).sum()):
        self.reports[split].shared[other] = count
        lines.append(f"{count:,} of {len(digests[split]):,} images of {split} have the same bytes as images of {other}")
    if lines:
      logging.warning("%s; --drop_duplicates keeps those of held-out splits alone", "; ".join(lines))

  def _link(self, split: str, shards: Sequence[_Shard]) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(
      data_dir=self.data_path, dataset_name=self.name, split=split, filetype_suffix="array_record"
    )
    for i, shard in enumerate(shards):
      _link_or_copy(shard.path, pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=len(shards))))
    return tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard.length for shard in shards],
      num_bytes=sum(shard.path.stat().st_size for shard in shards),
      filename_template=template,
    )


def _none_usable(report: Report) -> str:
  if not report.first_skipped and report.truncated:
    more = f", and {len(report.truncated) - 1} more" if len(report.truncated) > 1 else ""
    return f"no pairs in it; {report.truncated[0]} is cut off, damaged, or no uncompressed tar{more}: download it again"
  if not report.first_skipped:
    return "no pairs in it"
  key = next(iter(report.first_skipped.values()))[0]
  return f"{report.reasons()}, the first {key!r:.100}; mend these, or take them out of --source"


def _copy_without(path: pathlib.Path, out: pathlib.Path, dropped: set[int]) -> list[str]:
  """Copy the other records; return the keys of those that are dropped."""
  source = array_record_data_source.ArrayRecordDataSource([str(path)])
  staging.write_records(out, (source[i] for i in range(len(source)) if i not in dropped))
  skip = {"image": tfds.decode.SkipDecoding()}
  read: Any = functools.partial(staging.features().deserialize_example_np, decoders=skip)
  return [read(source[i])["key"].decode() for i in sorted(dropped)]


def _link_or_copy(path: pathlib.Path, link: pathlib.Path) -> None:
  # Not moved: a preparation that is killed here has to find it again. Some file systems have no links.
  try:
    os.link(path, link)
  except OSError as error:
    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
      raise
    shutil.copyfile(path, link)


class Pairs(CaptionedImages):
  """Pairs of any origin."""

  name = "pairs"
  DESCRIPTION = "Image-caption pairs prepared from webdataset tars in img2dataset's layout."
  CITATION = (
    "@misc{beaumont2021img2dataset, author = {Romain Beaumont}, year = {2021}, title = {img2dataset: Easily turn large "
    "sets of image urls to an image dataset}, url = {https://github.com/rom1504/img2dataset}}"
  )
  HOMEPAGE = "https://github.com/rom1504/img2dataset"


def prepare(
  parts: Sequence[Part],
  out: pathlib.Path,
  *,
  builder: type[CaptionedImages] = Pairs,
  settings: Settings | None = None,
  make_stage: Callable[..., Stage] | None = None,
) -> dict[str, Report]:
  """Write folder `out`, whole or not at all. Killed at any point and called again, it resumes, with the same records.

  What is finished of it lies in the folder `.NAME.partial` beside it until then. Parts whose raw data have changed are
  made again.

  Args:
    parts: of the raw data.
    out: absent or empty.
    builder: of the data set.
    settings: how.
    make_stage: folder -> what writes a part; by default images and captions.

  Returns:
    What became of the pairs of each split; `out/report.json` says the same.

  Raises:
    UserError: `out` is not an empty folder, not in UTF-8 or cannot be written, no part, a split without one usable
      pair or a name that it can have, or an unfinished preparation there of another data set or with other settings.
  """
  settings = settings or Settings()
  if settings.beam_options:
    staging.check_beam()
  if not parts:
    raise UserError("--source has no pair")
  _check_splits(parts)
  out = out.resolve()
  try:
    os.fspath(out).encode()
  except UnicodeEncodeError as error:
    where = f"--out={os.fspath(out)!r} has a path that is not in UTF-8, where no record can be written"
    raise UserError(f"{where}; take another folder") from error
  partial = partial_of(out)
  if partial.exists() and (out / "report.json").exists():  # killed between the last two steps
    reports = {name: Report(**report) for name, report in files.read_json(out / "report.json").items()}
    shutil.rmtree(partial)
    return reports
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists and is not an empty folder; name a new one")
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the folder of --out={out}: {error.strerror}; name one that can be written") from error
  # The lock first: two processes would write over each other's parts.
  with _only_process(partial), staging.writing(partial):
    make_stage = make_stage or functools.partial(
      Stage, short_side=settings.short_side, reduced_decoding=settings.reduced_decoding
    )
    stage = make_stage(partial / "parts")
    _check_same(partial, builder, stage)
    stage.folder.mkdir(exist_ok=True)
    files.sweep(stage.folder, age=0)  # this process holds the lock
    # TFDS reuses a folder that is there.
    shutil.rmtree(partial / "tfds", ignore_errors=True)
    made = builder(parts=parts, stage=stage, settings=settings, data_dir=partial / "tfds")
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download there
        made.download_and_prepare()
    except UserError:
      if made.reports and not any(report.pairs for report in made.reports.values()):
        shutil.rmtree(partial)  # nothing in it is worth keeping
      raise
    # By one rename, so that `out` is whole or not there; what is left of the preparation goes after it.
    _described(made).replace(out)
    shutil.rmtree(partial)
  logging.info("wrote %s", out)
  return made.reports


def _check_splits(parts: Iterable[Part]) -> None:
  for split in {part.split for part in parts}:
    # `all` is TFDS's own name for the union of splits. A path would lead out of the folder.
    if not re.fullmatch(r"\w+", split) or split == "all":
      raise UserError(f"a split cannot be called {split!r:.100}; letters, digits and _ make its name, but not 'all'")


def _described(made: CaptionedImages) -> pathlib.Path:
  """Write the notices and the report of a data set into its folder, and return the folder."""
  folder = pathlib.Path(made.data_dir)
  for name, text in made.notices().items():
    files.write_whole(folder / name, text.encode())
  report = {split: dataclasses.asdict(report) for split, report in made.reports.items()}
  files.write_json(folder / "report.json", report)
  return folder


def partial_of(out: pathlib.Path) -> pathlib.Path:
  """Return the folder in which the finished parts of `out` lie until all are finished."""
  out = out.resolve()
  return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def _only_process(partial: pathlib.Path) -> Iterator[None]:
  with open(partial / "lock", "w") as lock:
    try:
      files.lock(lock, wait=False)
    except BlockingIOError as error:
      raise UserError(f"another process is writing {partial}; wait for it, or name another --out") from error
    yield


def _check_same(partial: pathlib.Path, builder: type[CaptionedImages], stage: Stage) -> None:
  """Write down how the data set is prepared, or compare it with how that was begun.

  Raises:
    UserError: it was begun otherwise.
  """
  plan, path = {"data set": builder.name, **stage.identity()}, partial / "plan.json"
  if path.exists():
    begun = files.read_object(path)
    if differing := [key for key in plan if begun.get(key) != plan[key]]:
      raise UserError(
        f"{partial} holds an unfinished preparation with another {' and '.join(differing)}; give the same, or delete it"
      )
  files.write_whole(path, json.dumps(plan).encode())
