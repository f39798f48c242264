"""Compiled programs on disk, found again without tracing them.

jax's compilation cache is asked with the program itself, and tracing and lowering a train step takes most of a warm
start. Here a key names what the program is made from: config, source, packages, devices, settings. A part too many
costs a compilation; a part too few would train by another program.

To load a file is to run what is in it: whoever can write the folder can run code here, as with jax's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from jax._src import compilation_cache
from jax.experimental import serialize_executable

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError, may_pass
from diffdis_jax.parallel import program_keys

ENDING = ".program"
LIMIT = 4 * 2**30  # bytes of a folder that nobody chose; a full-size step is a few hundred MB


@dataclasses.dataclass(frozen=True)
class Folder:
  """Of compiled programs.

  Attributes:
    path: local, or in a bucket.
    given: whether someone chose it, by --compiled or --save: then it holds one run's programs by their names, and a
      program of another run, version or machine is refused. Otherwise it holds those of any number of runs, and what is
      not found or cannot be read is compiled.
  """

  path: epath.Path
  given: bool = False


def of_user() -> Folder | None:
  """Beside jax's compilation cache; None where that keeps nothing."""
  folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  kept = folder and jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
  return Folder(buckets.path(folder) / "programs") if kept else None


@dataclasses.dataclass(frozen=True)
class Kept:
  """The programs of one run in a folder.

  Attributes:
    folder: of programs.
    made_from: the fields of the run that a program depends on.
    devices: of the mesh, in its order.
  """

  folder: Folder
  made_from: Mapping[str, Any]
  devices: Sequence[Any]

  def check(self, name: str, args: Any) -> None:
    """Raises UserError where the folder was given and has not this program, or one that was made from something
    else; a damaged one passes."""
    if self.folder.given:
      wanted = program_keys.key(name, args, self.made_from, self.devices)
      file = self._file(name, wanted)
      try:
        with file.open("rb") as opened:
          _refuse_other(file, wanted, _key_of(opened.readline()))
      except OSError as error:
        raise _unreadable(file, error) from error
      except ValueError:
        pass  # read() says so

  def read(self, name: str, args: Any) -> jax.stages.Compiled | None:
    """The program of this name for these arguments. None where there is none, or a damaged one, of which a given
    folder warns. Raises UserError: as `check`."""
    wanted = program_keys.key(name, args, self.made_from, self.devices)
    file = self._file(name, wanted)
    try:
      content = file.read_bytes()
    except OSError as error:
      if not self.folder.given:
        return None
      raise _unreadable(file, error) from error
    except Exception as error:  # of a bucket that is away
      if self.folder.given or not may_pass(error):
        raise
      return None
    try:
      head, _, body = content.partition(b"\n")
      found = _key_of(head)
      if self.folder.given:
        _refuse_other(file, wanted, found)
      if hashlib.sha256(body).hexdigest() != json.loads(head)["sha256"] or found != wanted:
        raise ValueError("its digest is another")
      program = _loaded(body, args, self.devices)
    except UserError:
      raise
    except Exception as error:  # of pickle, of jax, of its backend: none may end a run that can compile
      logging.log(
        logging.WARNING if self.folder.given else logging.DEBUG,
        "%s cannot be loaded (%s), and is compiled again",
        file,
        " ".join(str(error).split())[:200],
      )
      return None
    if not (self.folder.given or buckets.is_url(file)):
      with contextlib.suppress(OSError):
        os.utime(file)  # a file's date says when it was used last, which is how room is made
    return program

  def write(self, name: str, args: Any, fresh: Fresh) -> epath.Path:
    """Keeps a program, whole or not at all; where. Raises UserError: it cannot be kept in the folder that was given."""
    key = program_keys.key(name, args, self.made_from, self.devices)
    file = self._file(name, key)
    try:
      body = _dumped(fresh)
      head = json.dumps({"key": key, "sha256": hashlib.sha256(body).hexdigest()}).encode()
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, head + b"\n" + body)
      if not self.folder.given:
        _make_room(file.parent)
    except Exception as error:  # of a program or a backend that cannot be serialised, or of a disk
      if not self.folder.given:
        logging.debug("%s is not kept: %s", name, error)
        return file
      if may_pass(error):
        raise
      said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
      raise UserError(f"cannot keep {name} in {file}: {said}") from error
    return file

  def _file(self, name: str, key: Mapping[str, Any]) -> epath.Path:
    if self.folder.given:
      return self.folder.path / f"{name.removeprefix('the ').replace(' ', '_')}{ENDING}"
    return self.folder.path / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}{ENDING}"


def _key_of(head: bytes) -> dict[str, Any]:
  """Raises ValueError: this is not the first line of such a file."""
  try:
    return dict(json.loads(head)["key"])
  except (TypeError, KeyError) as error:
    raise ValueError("it is no compiled program") from error


def _refuse_other(file: epath.Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  """Raises UserError naming the first thing that differs."""
  if differs := program_keys.difference(wanted, found):
    raise UserError(
      f"--compiled: {file} was compiled for other {differs}; compile it again with preflight --save, or leave the flag"
      " out"
    )


def _unreadable(file: epath.Path, error: OSError) -> Exception:
  if may_pass(error):
    return error
  return UserError(
    f"--compiled: cannot read {file}: {error.strerror or error}; it should be a folder of preflight --save"
  )


def _loaded(body: bytes, args: Any, devices: Sequence[Any]) -> jax.stages.Compiled:
  serialized, results = pickle.loads(zlib.decompress(body))
  # Of the arguments jax has the tree; a tree of our own structs it cannot pickle, so that one stands for the results'.
  trees = jax.tree.structure((args, {})), jax.tree.structure(results)
  return serialize_executable.deserialize_and_load(serialized, *trees, execution_devices=list(devices))


def _dumped(fresh: Fresh) -> bytes:
  if fresh.entry is None:
    serialized, _, tree = serialize_executable.serialize(fresh.program)
  else:
    serialized, tree = _serialized(fresh.program, fresh.entry), fresh.program.out_tree
  results = jax.tree.unflatten(tree, range(tree.num_leaves))
  return zlib.compress(pickle.dumps((serialized, results)), 1)  # a fifth of the size, in no time


class _WithEntry(serialize_executable._JaxPjrtPickler):
  """Takes the executable's bytes from the compilation cache: XLA's CPU backend gives those of one that it has read back
  itself without its machine code."""

  def __init__(self, file: io.BytesIO, entry: bytes):
    super().__init__(file)
    self._entry = entry

  def persistent_id(self, obj: Any) -> Any:
    jaxlib: Any = serialize_executable.xc  # pyright: ignore[reportPrivateImportUsage]
    found = isinstance(obj, jaxlib.LoadedExecutable)
    return ("exec", self._entry) if found else super().persistent_id(obj)


def _serialized(program: Any, entry: bytes) -> bytes:
  """As serialize_executable.serialize, with these bytes of the executable."""
  if program._params.const_args:
    raise ValueError("constants are arguments of it")
  with io.BytesIO() as file:
    parts = program._executable._unloaded_executable, jax.tree.leaves(program.args_info), program._no_kwargs
    _WithEntry(file, entry).dump(parts)
    return file.getvalue()


class _Entry(threading.local):
  """What this thread last put into the compilation cache, or found there: the bytes of an executable."""

  content: bytes | None = None


_entry = _Entry()


@dataclasses.dataclass(frozen=True)
class Fresh:
  """A program that was compiled here, and the bytes of its executable where they went through jax's cache."""

  program: jax.stages.Compiled
  entry: bytes | None = dataclasses.field(repr=False)


def compile(lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None) -> Fresh:
  """Compiles, or takes from jax's compilation cache. `options`: of the compiler."""
  _entry.content = None
  try:
    return Fresh(lowered.compile(compiler_options=dict(options) if options else None), _entry.content)
  finally:
    _entry.content = None


def _remember_entries() -> None:
  """Once in a process. What another version of jax lacks is not remembered."""
  extract = getattr(compilation_cache, "extract_executable_and_time", None)
  combine = getattr(compilation_cache, "combine_executable_and_time", None)
  if extract is None or combine is None:
    return

  @functools.wraps(extract)
  def extracted(content: bytes) -> Any:
    found = extract(content)
    _entry.content = found[0]
    return found

  @functools.wraps(combine)
  def combined(executable: bytes, *args: Any, **kwargs: Any) -> bytes:
    _entry.content = executable
    return combine(executable, *args, **kwargs)

  compilation_cache.extract_executable_and_time = extracted
  compilation_cache.combine_executable_and_time = combined


_remember_entries()


def _make_room(folder: epath.Path) -> None:
  """Beyond LIMIT goes what was not used for longest; in a bucket, what was not written for longest."""
  kept = [(each.stat(), each) for each in folder.glob(f"*{ENDING}")]
  size = 0
  for stat, each in sorted(kept, key=lambda pair: -pair[0].mtime):
    size += stat.length
    if size > LIMIT:
      each.unlink(missing_ok=True)  # another process may make room too
