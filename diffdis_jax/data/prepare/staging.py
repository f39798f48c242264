"""Parts of a raw data set -> one ArrayRecord file each, by several processes, resumable after a kill at any point.

A part's file counts once its report, PART.json, lies beside it, the last thing written, and as long as the raw data are
those that the report names. A part depends on nothing but itself, so that any number of processes, or Apache Beam's
workers, write the same files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import pathlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer

from diffdis_jax.common import files, progress, signals, storage
from diffdis_jax.data import records
from diffdis_jax.data.prepare import pairs, webdataset
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.errors import UserError

DIGEST = 16  # bytes of an image's digest
FIRST = 10  # skipped pairs named in a report, of each reason


@dataclasses.dataclass
class Report:
  """The counts of a part, or of all parts of a split.

  Attributes:
    pairs: that are stored.
    skipped: reason, one of records.REASONS or "duplicate image", -> how many.
    first_skipped: reason -> keys of the first few.
    changed: what was changed in pairs that are stored -> in how many.
    truncated: parts that end before their end.
    shared: another split -> how many images of this split have the same bytes as images there.
    passed_over: ending of files in tars that are no part of a pair -> how many.
  """

  pairs: int = 0
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  first_skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  changed: dict[str, int] = dataclasses.field(default_factory=dict)
  truncated: list[str] = dataclasses.field(default_factory=list)
  shared: dict[str, int] = dataclasses.field(default_factory=dict)
  passed_over: dict[str, int] = dataclasses.field(default_factory=dict)

  def skip(self, key: str, reason: str) -> None:
    self.skipped[reason] = self.skipped.get(reason, 0) + 1
    first = self.first_skipped.setdefault(reason, [])
    if len(first) < FIRST:
      first.append(key)

  def add(self, other: Report) -> None:
    self.pairs += other.pairs
    for field in ("skipped", "changed", "shared", "passed_over"):
      mine = getattr(self, field)
      for reason, count in getattr(other, field).items():
        mine[reason] = mine.get(reason, 0) + count
    for reason, keys in other.first_skipped.items():
      self.first_skipped[reason] = (self.first_skipped.get(reason, []) + keys)[:FIRST]
    self.truncated += other.truncated

  def reasons(self) -> str:
    """ "2 with corrupt image, 1 with missing caption"; empty if none was skipped."""
    return listed(self.skipped)


def listed(counts: dict[str, int]) -> str:
  return ", ".join(f"{count} with {reason}" for reason, count in counts.items())


def features() -> tfds.features.FeaturesDict:
  """Return the features of a record: encoded image, caption, key (the place of the pair), and the json as text."""
  text = tfds.features.Text
  return tfds.features.FeaturesDict(
    {"image": tfds.features.Image(), "caption": text(), "key": text(), "metadata": text()}
  )


@dataclasses.dataclass(frozen=True)
class Stage:
  """A folder of parts' files. Picklable: a worker gets it and a part.

  Attributes:
    folder: of the files.
    short_side, reduced_decoding: as `pairs.to_record` takes them.
  """

  folder: pathlib.Path
  short_side: int | None = None
  reduced_decoding: bool = True

  def features(self) -> tfds.features.FeaturesDict:
    """Return the features of a record."""
    return features()

  def identity(self) -> dict[str, Any]:
    """Return what a preparation must have in common with the one that it resumes."""
    return {"short side": self.short_side, "reduced decoding": self.reduced_decoding}

  def facts(self) -> dict[str, Any]:
    """Return what belongs into the data set's metadata beside the reports."""
    return {}

  def records_of(self, part: Part) -> pathlib.Path:
    return self.folder / f"{part.name}.array_record"

  def report_of(self, part: Part) -> Report:
    """Read what became of a part that is written."""
    return Report(**files.read_object(self.folder / f"{part.name}.json")["report"])

  def is_written(self, part: Part) -> bool:
    """Say whether the part is written, of the same raw data. A power cut may leave an empty report, which is none."""
    return files.read_object(self.folder / f"{part.name}.json").get("part") == part.identity()

  def digests_of(self, part: Part) -> np.ndarray:
    """One digest for each record, as void of 16 bytes."""
    return np.fromfile(self.folder / f"{part.name}.digests", f"V{DIGEST}")

  def write(self, part: Part) -> Report:
    """Writes one part, unless it is written.

    Raises:
      UserError: the part cannot be read, or its file not be written, such as to a full disk.
    """
    if self.is_written(part):
      return self.report_of(part)
    # Before anything is read: of a file that changes meanwhile the next start makes the part again.
    report, digests, identity = Report(), [], part.identity()
    report_file = self.folder / f"{part.name}.json"
    with writing(self.folder):
      # The report goes first and comes last: it is what says that the other two files are whole, and of one source.
      report_file.unlink(missing_ok=True)
      write_records(self.records_of(part), self.serialized(part, report, digests))
      files.write_whole(self.folder / f"{part.name}.digests", b"".join(digests))
      content = {"part": identity, "report": dataclasses.asdict(report)}
      files.write_whole(report_file, json.dumps(content).encode())
    return report

  def serialized(self, part: Part, report: Report, digests: list[bytes]) -> Iterator[bytes]:
    """The records of a part; fills in its report and the digests."""
    serialize = serializer(self.features())
    for pair in _reading(part):
      try:
        record, changed = pairs.to_record(pair, short_side=self.short_side, reduced_decoding=self.reduced_decoding)
      except records.Unusable as error:
        report.skip(pair.key, str(error))
        continue
      for what in changed:
        report.changed[what] = report.changed.get(what, 0) + 1
      digests.append(pairs.digest(pair.image))
      report.pairs += 1
      # A name that is not UTF-8 comes from the file system with surrogates, which cannot be stored.
      yield serialize({**record, "key": pair.key.encode("utf-8", "backslashreplace")})
    if part.truncated:
      report.truncated.append(part.name)
    if isinstance(part, webdataset.TarPart):
      report.passed_over = part.passed_over


def serializer(spec: tfds.features.FeaturesDict) -> Any:
  """Record -> bytes as TFDS stores them."""
  info: Any = spec.get_serialized_info()
  to_bytes = example_serializer.ExampleSerializer(info).serialize_example
  return lambda record: to_bytes(spec.encode_example(record))


def write_records(path: pathlib.Path, serialized: Iterator[bytes]) -> None:
  """Writes an ArrayRecord file whole or not at all. Raises OSError where it cannot be written."""
  # A name of its own: after a kill another process may write the same part while the first still ends.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    with _os_errors():
      writer = ArrayRecordWriter(str(temporary), "group_size:1")
    # Around each write by itself: an error of the records' own source is not this file's.
    for record in serialized:
      with _os_errors():
        writer.write(record)
    with _os_errors():
      writer.close()
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Make an OSError of what ArrayRecord raises for a full disk and the like."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(" ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
  """Turns a failure to write into one clear line. What is read meanwhile and does not come back is none."""
  try:
    yield
  except storage.Away:
    raise
  except OSError as error:
    raise UserError(
      f"cannot write to {folder}: {error.strerror or error}; nothing is lost: make room and run the same command again"
    ) from error


def _reading(part: Part) -> Iterator[Any]:
  try:
    yield from part
  except OSError as error:
    raise UserError(
      f"cannot read part {part.name} of --source: {error.strerror or error}{_of(error)}; nothing is lost: put it right"
      " and run the same command again"
    ) from error


def _of(error: OSError) -> str:
  """Name the file of an error, where it says one."""
  return f" ({str(error.filename)!r})" if error.strerror and error.filename else ""


def write_all(stage: Stage, parts: Sequence[Part], *, num_processes: int, beam_options: Sequence[str] = ()) -> None:
  """Writes every part that is not written yet.

  Args:
    stage: where to.
    parts: which.
    num_processes: on this machine; 1 does without further processes.
    beam_options: options of an Apache Beam pipeline, as `name=value`, that does it instead. Its workers must see the
      folders of the source and of the stage.

  Raises:
    UserError: as Stage.write, or no Apache Beam.
  """
  # By their reports, which are written last; Beam's workers and this machine's processes go by the same files.
  missing = [part for part in parts if not stage.is_written(part)]
  if len(missing) < len(parts):
    logging.info("resuming: %d of %d parts are written", len(parts) - len(missing), len(parts))
  if beam_options:
    _write_by_beam(stage, missing, beam_options)
    return
  done = len(parts) - len(missing)
  with progress.Progress("preparing", len(parts), "parts", done=done, every=None) as bar:
    for part, report in _write_by_processes(stage, missing, num_processes):
      done += 1
      bar.update(1)
      skipped = sum(report.skipped.values())
      logging.info("%s: %d pairs, %d skipped (part %d of %d)", part.name, report.pairs, skipped, done, len(parts))


def _write_by_processes(stage: Stage, parts: Sequence[Part], num_processes: int) -> Iterator[tuple[Part, Report]]:
  if num_processes == 1 or len(parts) <= 1:
    for part in parts:
      yield part, stage.write(part)
    return
  # Spawned: TFDS has threads by now, of which a fork would copy the locks and not the threads.
  context = multiprocessing.get_context("spawn")
  workers = min(num_processes, len(parts))
  with contextlib.ExitStack() as stack:
    with _starting(workers):
      pool = stack.enter_context(
        concurrent.futures.ProcessPoolExecutor(workers, context, initializer=signals.begin_worker)
      )
    try:
      with _starting(workers), signals.starting_workers():  # as the first parts are handed in
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


@contextlib.contextmanager
def _starting(count: int) -> Iterator[None]:
  """Say in one line that no more processes can be started, or that what they share, /dev/shm on Linux, is full. Raises
  UserError."""
  try:
    yield
  except OSError as error:
    signals.kill_workers()  # those that were started, for whose end Python would wait
    raise UserError(
      f"cannot start {count} processes: {error.strerror or error}; nothing is lost: run the same command again with a"
      " smaller --num_processes, such as 1, which starts none"
    ) from error


def check_beam() -> None:
  """Refuse options of Apache Beam where it is not installed. Raises UserError."""
  try:
    importlib.import_module("apache_beam.options.pipeline_options")
  except ImportError as error:
    raise UserError(f"--beam_pipeline_options needs Apache Beam ({error}); pip install apache-beam") from error


def _write_by_beam(stage: Stage, parts: Sequence[Part], options: Sequence[str]) -> None:
  beam: Any = importlib.import_module("apache_beam")
  pipeline_options: Any = importlib.import_module("apache_beam.options.pipeline_options")
  # Reshuffled, since Beam would else fuse both steps and write every part on one worker.
  flags = [f"--{option}" for option in options]
  with beam.Pipeline(options=pipeline_options.PipelineOptions(flags)) as pipeline:
    _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(stage.write)
