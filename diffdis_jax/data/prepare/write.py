"""Raw pairs -> a TFDS folder of ArrayRecord files, written whole or not at all, and resumable after a kill.

Each part becomes a file in the folder `.NAME.partial` beside `out`, whoever writes it: this process, several, or Apache
Beam's workers. It counts once its report, PART.json, lies beside it, the last thing written, and as long as the raw
data and the settings are those that the report names. When all parts are there, their files become the data set's
shards.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import example_serializer

from diffdis_jax.common import files, progress, signals, storage
from diffdis_jax.data import records
from diffdis_jax.data.prepare import parts as raw_parts
from diffdis_jax.data.prepare.parts import Part, TarPart, reading
from diffdis_jax.errors import UserError

VERSION = "1.1.0"
LICENSES = "LICENSES.md"
FIRST = 10  # skipped pairs that a report names, of each reason
TEXTS = {name: tfds.features.Text() for name in ("caption", "key", "metadata")}  # features of every record


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A data set as its folder describes it. `licenses` is the text of LICENSES.md, which lies beside the records."""

  name: str
  description: str
  homepage: str = ""
  licenses: str = ""


PAIRS = DataSet(
  "pairs",
  "Image-caption pairs prepared from webdataset tars in img2dataset's layout.",
  "https://github.com/rom1504/img2dataset",
)


@dataclasses.dataclass
class Report:
  """The counts of a part, or of all parts of a split."""

  pairs: int = 0  # that are stored
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)  # reason, of records.REASONS -> how many
  first_skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason -> keys of the first few
  truncated: list[str] = dataclasses.field(default_factory=list)  # parts that end before their end
  # Another split -> how many images of this split have the same bytes as images there.
  shared: dict[str, int] = dataclasses.field(default_factory=dict)
  # The first 8 bytes of each image's digest, until `shared` is counted.
  images: list[int] = dataclasses.field(default_factory=list)

  def skip(self, key: str, reason: str) -> None:
    """Count a pair that is not stored."""
    self.add(Report(skipped={reason: 1}, first_skipped={reason: [key]}))

  def add(self, other: Report) -> None:
    """Add the counts of another part."""
    self.pairs += other.pairs
    for reason, count in other.skipped.items():
      self.skipped[reason] = self.skipped.get(reason, 0) + count
      self.first_skipped[reason] = (self.first_skipped.get(reason, []) + other.first_skipped[reason])[:FIRST]
    self.truncated += other.truncated
    self.images += other.images

  def reasons(self) -> str:
    """Say "2 with corrupt image, 1 with missing caption"; empty if none was skipped."""
    return ", ".join(f"{count} with {reason}" for reason, count in self.skipped.items())


@dataclasses.dataclass(frozen=True)
class Stage:
  """A folder of parts' files. It can be pickled: a worker gets it and a part."""

  folder: pathlib.Path
  short_side: int | None = None  # as `parts.to_record` takes it

  def features(self) -> tfds.features.FeaturesDict:
    """Return the features of a record: encoded image, caption, key (the place of the pair), and the json as text."""
    return tfds.features.FeaturesDict({"image": tfds.features.Image(), **TEXTS})

  def identity(self) -> dict[str, Any]:
    """Return JSON of all settings that change what is written."""
    return {"short side": self.short_side}

  def facts(self) -> dict[str, Any]:
    """Return what belongs into the data set's metadata beside the reports."""
    return {}

  def file(self, part: Part, ending: str) -> pathlib.Path:
    """Name a part's file: `array_record`, or `json` with its report."""
    return self.folder / f"{part.name}.{ending}"

  def report_of(self, part: Part) -> Report | None:
    """Return what became of a part that is written, of the same raw data and settings; None of another."""
    known = files.read_object(self.file(part, "json"))  # which a power cut may leave empty
    is_written = known.get("of") == self._identity(part) and self.file(part, "array_record").exists()
    return Report(**known["report"]) if is_written else None

  def _identity(self, part: Part) -> Any:
    return json.loads(json.dumps([self.identity(), part.identity()]))

  def write(self, part: Part) -> Report:
    """Write one part, unless it is written. Raises UserError: the part cannot be read, or its file not be written."""
    if written := self.report_of(part):
      return written
    # Before anything is read: of a file that changes meanwhile the next start makes the part again.
    report, identity = Report(), self._identity(part)
    with writing(self.folder):
      # The report goes first and comes last: it says that the records are whole, and of one source.
      self.file(part, "json").unlink(missing_ok=True)
      write_records(self.file(part, "array_record"), self.serialized(part, report))
      content = {"of": identity, "report": dataclasses.asdict(report)}
      files.write_whole(self.file(part, "json"), json.dumps(content).encode())
    return report

  def serialized(self, part: Part, report: Report) -> Iterator[bytes]:
    """Yield the records of a part, and fill in its report."""
    serialize = serializer(self.features())
    for pair in reading(part):
      try:
        record = raw_parts.to_record(pair, short_side=self.short_side)
      except records.Unusable as error:
        report.skip(pair.key, str(error))
        continue
      report.pairs += 1
      report.images.append(int.from_bytes(raw_parts.digest(pair.image)[:8], "big"))
      # A name that is not UTF-8 comes from the file system with surrogates, which cannot be stored.
      yield serialize({**record, "key": pair.key.encode("utf-8", "backslashreplace")})
    if isinstance(part, TarPart) and part.truncated:
      report.truncated.append(part.name)


def serializer(spec: tfds.features.FeaturesDict) -> Any:
  """Return the function from a record to its bytes, as TFDS stores them."""
  info: Any = spec.get_serialized_info()
  to_bytes = example_serializer.ExampleSerializer(info).serialize_example
  return lambda record: to_bytes(spec.encode_example(record))


def write_records(path: pathlib.Path, serialized: Iterable[bytes]) -> None:
  """Write an ArrayRecord file. Raises OSError: it cannot be written."""
  temporary = path.with_name(f".{path.name}.tmp")
  writer = ArrayRecordWriter(str(temporary), "group_size:1")
  try:
    for record in serialized:
      writer.write(record)
    writer.close()
  except RuntimeError as error:  # of a full disk and the like
    raise OSError(" ".join(str(error).split())[:200]) from error
  temporary.replace(path)


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
  """Turn a failure to write into one clear line."""
  try:
    yield
  except storage.Away:  # of what is read meanwhile
    raise
  except OSError as error:
    raise UserError(
      f"cannot write to {folder}: {error.strerror or error}; nothing is lost: make room and run the same command again"
    ) from error


def _write_all(
  stage: Stage, parts: Sequence[Part], num_processes: int, beam_options: Sequence[str]
) -> dict[str, Report]:
  """Write every part that is not written yet. Return the parts' reports by their names."""
  reports = {part.name: report for part in parts if (report := stage.report_of(part))}
  missing = [part for part in parts if part.name not in reports]
  if reports:
    logging.info("resuming: %d of %d parts are written", len(reports), len(parts))
  if beam_options:
    _write_by_beam(stage, missing, beam_options)
    return {part.name: stage.write(part) for part in parts}  # which are written
  with progress.Progress("preparing", len(parts), "parts", done=len(reports), every=None) as bar:
    for part, report in _write_by_processes(stage, missing, num_processes):
      reports[part.name] = report
      bar.update(1)
  return reports


def _write_by_processes(stage: Stage, parts: Sequence[Part], num_processes: int) -> Iterator[tuple[Part, Report]]:
  workers = min(num_processes, len(parts))
  if workers <= 1:
    for part in parts:
      yield part, stage.write(part)
    return
  # Spawned: TFDS has threads by now, of which a fork would copy the locks and not the threads.
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=signals.begin_worker)
  try:
    with signals.starting_workers():  # as the first parts are handed in
      futures = {pool.submit(stage.write, part): part for part in parts}
    for future in concurrent.futures.as_completed(futures):
      yield futures[future], future.result()
  except KeyboardInterrupt:  # or SIGTERM: a part that is half done is done again; the shutdown would wait for it
    signals.kill_workers()
    raise
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError(
      "a process of the preparation was killed, perhaps for memory; nothing is lost: run the same command again,"
      f" with --num_processes below {workers} if memory is short"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _write_by_beam(stage: Stage, parts: Sequence[Part], options: Sequence[str]) -> None:
  beam: Any = importlib.import_module("apache_beam")
  pipeline_options: Any = importlib.import_module("apache_beam.options.pipeline_options")
  flags = [f"--{option}" for option in options]
  with beam.Pipeline(options=pipeline_options.PipelineOptions(flags)) as pipeline:
    # Reshuffled, since Beam would else fuse both steps and write every part on one worker.
    _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(stage.write)


def prepare(
  parts: Sequence[Part],
  out: pathlib.Path,
  *,
  data_set: DataSet = PAIRS,
  make_stage: Callable[[pathlib.Path], Stage] = Stage,
  num_processes: int = 1,
  beam_options: Sequence[str] = (),
  finish: Callable[[pathlib.Path], object] = lambda folder: None,
) -> dict[str, Report]:
  """Write folder `out`, whole or not at all. Killed at any point and called again, it resumes, with the same records.
  Return what became of the pairs of each split, as `out/report.json` says.

  Args:
    parts: of the raw data. Those that have changed since they were written are made again.
    out: absent or empty.
    make_stage: folder -> what writes a part; by default images and captions.
    num_processes: on this machine. It changes nothing in what is written.
    beam_options: options of an Apache Beam pipeline, `name=value`, which writes the parts instead. Its workers must see
      the folders of the source and of `out`.
    finish: writes more files into the folder, before that takes its name.

  Raises UserError: `out` is not an empty folder or cannot be written, no part, a split without a usable pair or name.
  """
  _check(parts, beam_options)
  files.empty_folder(out := out.resolve())
  partial = out.with_name(f".{out.name}.partial")
  stage = make_stage(partial / "parts")
  with files.writing(f"--out={out}"):
    stage.folder.mkdir(parents=True, exist_ok=True)
  with _only_process(partial):
    for left in stage.folder.glob(".*.tmp"):  # of a killed process, since this one holds the lock
      left.unlink()
    of_parts = _write_all(stage, parts, num_processes, beam_options)
    with writing(partial):
      reports = _fill(partial / "whole", data_set, stage, parts, of_parts)
      finish(partial / "whole")
      # By one rename, so that `out` is whole or not there; what is left of the preparation goes after it.
      (partial / "whole").replace(out)
      shutil.rmtree(partial)
  logging.info("wrote %s", out)
  return reports


def _check(parts: Sequence[Part], beam_options: Sequence[str]) -> None:
  """Raise UserError where there is no part, a split's name is none, or Apache Beam is not installed."""
  if not parts:
    raise UserError("--source has no pair")
  for split in {part.split for part in parts}:
    # `all` is TFDS's own name for the union of splits. A path would lead out of the folder.
    if not re.fullmatch(r"\w+", split) or split == "all":
      raise UserError(f"a split cannot be called {split!r:.100}; letters, digits and _ make its name, but not 'all'")
  if beam_options:
    try:
      importlib.import_module("apache_beam.options.pipeline_options")
    except ImportError as error:
      raise UserError(f"--beam_pipeline_options needs Apache Beam ({error}); pip install apache-beam") from error


@contextlib.contextmanager
def _only_process(partial: pathlib.Path) -> Iterator[None]:
  """Hold the lock of a preparation. Raise UserError: another process holds it."""
  with open(partial / "lock", "w") as lock:
    try:
      files.lock(lock, wait=False)
    except BlockingIOError as error:
      raise UserError(f"another process is writing {partial}; wait for it, or name another --out") from error
    yield


def _fill(
  folder: pathlib.Path, data_set: DataSet, stage: Stage, parts: Sequence[Part], of_parts: Mapping[str, Report]
) -> dict[str, Report]:
  """Make a folder of TFDS of the parts that are written, and return the reports of its splits. Raises UserError: a
  split without a usable pair."""
  by_split: dict[str, list[Part]] = {}
  reports: dict[str, Report] = {}
  for part in parts:  # in their order, so that killed and whole preparations end in the same records
    by_split.setdefault(part.split, []).append(part)
    reports.setdefault(part.split, Report()).add(of_parts[part.name])
  if lacking := [split for split, report in reports.items() if not report.pairs]:
    if len(lacking) == len(reports):
      shutil.rmtree(folder.parent)  # nothing in it is worth keeping
    raise UserError(f"no usable pair in split {lacking[0]}: {_none_usable(reports[lacking[0]])}")
  shutil.rmtree(folder, ignore_errors=True)  # of a killed process: a part's file that it moved is made again
  folder.mkdir()
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(folder), dataset_name=data_set.name, filetype_suffix="array_record"
  )
  infos = []
  for split, own in by_split.items():
    of_split, size = template.replace(split=split), 0
    own = [part for part in own if of_parts[part.name].pairs]
    for i, part in enumerate(own):
      shard = pathlib.Path(of_split.sharded_filepath(shard_index=i, num_shards=len(own)))
      stage.file(part, "array_record").replace(shard)
      size += shard.stat().st_size
    lengths = [of_parts[part.name].pairs for part in own]
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=of_split))
  _count_shared(reports)
  as_json = {split: dataclasses.asdict(report) for split, report in reports.items()}
  for report in as_json.values():
    del report["images"]
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=stage.features(),
    split_infos=infos,
    version=VERSION,
    filename_template=template,
    check_data=False,  # by TensorFlow
    description=data_set.description,
    homepage=data_set.homepage or None,
    disable_shuffling=True,
    metadata=tfds.core.MetadataDict({**as_json, **stage.facts()}),
  )
  if data_set.licenses:
    files.write_whole(folder / LICENSES, data_set.licenses.encode())
  files.write_json(folder / "report.json", as_json)
  return reports


def _count_shared(reports: Mapping[str, Report]) -> None:
  """Count the images that two splits have, by their bytes, and say how many there are in one line."""
  lines, held_out_first = [], sorted(reports, key=lambda split: split == "train")
  for split, other in itertools.combinations(held_out_first, 2):
    images, others = reports[split].images, {*reports[other].images}
    if count := sum(image in others for image in images):
      reports[split].shared[other] = count
      lines.append(f"{count:,} of {len(images):,} images of {split} have the same bytes as images of {other}")
  if lines:
    logging.warning("%s", "; ".join(lines))


def _none_usable(report: Report) -> str:
  if report.first_skipped:
    key = next(iter(report.first_skipped.values()))[0]
    return f"{report.reasons()}, the first {key!r:.100}; mend these, or take them out of --source"
  if not report.truncated:
    return "no pairs in it"
  return f"no pairs in it; {report.truncated[0]} is cut off, damaged, or no uncompressed tar: download it again"
