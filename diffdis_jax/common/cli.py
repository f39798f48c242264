"""The parts that every command line shares: flags, one-line errors, logging, compilation cache.

A command ends with `if __name__ == "__main__": cli.run(main)`. Bad input exits with code 2 and one line on stderr; a
full disk, or storage that cannot be reached, with one line and code 1, on which launchers try again; a bug with its
traceback and code 1; a preemption with code 75; Ctrl-C with one line and code 130; and SIGTERM or SIGHUP, where there
is nothing to save, with one line and code 143.

jax is imported where it is used: it takes two seconds, which commands that compute nothing have no need of.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import io
import logging as python_logging
import math
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffdis_jax.common import buckets, files, guesses, machine, signals
from diffdis_jax.errors import FULL_DISK, Diverged, Preempted, UserError, full_disk, may_pass

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
_MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")  # absl's words
CACHE_BYTES = 4 * 2**30  # of compiled programs; a full-size step is a few hundred MB
# Flags that an unset variable of a shell leaves empty, which would be this folder.
_FOLDERS = {"workdir", "out"}
# With what Orbax warns at each save between two evaluations, where the best checkpoints are kept.
_UNMEASURED = "Requested `tracked_metric`"


def run(main: Callable[[list[str]], Any], *, positional: int = 0) -> NoReturn:
  """Parse the flags and call `main(argv)`; never return. `positional` arguments may follow the program's name.

  With several processes, or while a thread compiles, an error ends this process at once: waiting for the others, or for
  the compiler, in Python's clean-up would take minutes.
  """
  # Garbage is looked for among all that jax has traced, which stays: by default that is a fifth of a start's time.
  gc.set_threshold(100_000, 50, 50)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of XLA, which has it from TensorFlow
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # of a terminal that knows ASCII alone
  sys.excepthook = _excepthook
  signals.end_on_signals()
  logging.get_absl_handler().addFilter(_is_ours)
  if sys.stderr.isatty():
    logging.get_absl_handler().setFormatter(_Plain())
  logging.set_verbosity(logging.INFO)  # already for what a config file logs, before the flags are parsed
  flags.DEFINE_boolean("quiet", False, "write warnings and errors only, no progress")
  if {"--help", "-h"} & {*sys.argv[1:]}:
    _help()
  if "--version" in sys.argv[1:]:
    write(f"diffdis_jax {sys.modules['diffdis_jax'].__version__}\n")
    sys.exit(0)

  def guarded(argv: list[str]) -> Any:
    if flags.FLAGS.quiet:
      logging.set_verbosity(logging.WARNING)
    try:
      if extra := argv[1 + positional :]:
        raise UserError(f"unexpected argument {extra[0]!r}; every argument is a flag, --name=value")
      _check_values()
      return main(argv)
    except Preempted as stopped:
      _exit(stopped.code)
    except Exception as error:
      _stop_for(error)

  app.run(guarded, flags_parser=_parse_flags)


def write(content: str) -> None:
  """Write to stdout. A reader that has gone, such as head or a pager that was closed, ends no command."""
  try:
    sys.stdout.write(content)
    sys.stdout.flush()
  except BrokenPipeError:
    # Or else Python, which flushes again at its end, says that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> NoReturn:
  """Write the command's docstring and all flags of its own, those too that the package defines in other files."""
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    for flag in defined:
      if module.startswith("diffdis_jax.") or flag.name == "config":
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  described = flags.FLAGS.main_module_help().partition(":\n")[2]  # without the file's name
  write(f"{sys.modules['__main__'].__doc__}\nFlags:\n{described}\n")
  sys.exit(0)  # where absl exits with 1


def _check_values() -> None:
  """Raise UserError: a folder's flag is empty, a number is nan, or an address in any flag or field cannot be read."""
  for name in {*flags.FLAGS} - {"prompt", "eval"}:  # which may hold any text
    value = flags.FLAGS[name].value
    if name in _FOLDERS and value == "" and flags.FLAGS[name].present:
      raise UserError(f"--{name}= is empty; give a path")
    if isinstance(value, float) and math.isnan(value):  # which is within any bounds for absl
      raise UserError(f"--{name}={value} is no number; give one")
    for field in guesses.fields_of(value.to_dict()).values() if isinstance(value, ConfigDict) else [value]:
      for text in field if isinstance(field, list) else [field]:
        if isinstance(text, str):
          buckets.check(text)


def _stop_for(error: Exception) -> NoReturn:
  """Stop with one line for what a user can mend: input, a disk, a network or a right. Raise a bug again."""
  path, number = getattr(error, "filename", None), getattr(error, "errno", None)
  reason = getattr(error, "strerror", None) or error
  where, again = f" ({path})" if path else "", "and run the same command again"
  if isinstance(error, (UserError, Diverged)):
    _stop(error, code=error.code)
  if full := number if number in FULL_DISK else full_disk(error):  # the latter of TensorStore's errors
    _stop(f"{os.strerror(full)}{where}; make room, {again}", code=1)
  if may_pass(error) or (isinstance(error, OSError) and number is None):  # without a number: a bucket's server
    login = "log in by gcloud auth application-default login"  # gcloud auth login is for gcloud alone
    how = login if "Anonymous caller" in str(error) else "check the network and your permissions"
    _stop(f"{reason}{where}; {how}, {again}", code=1)
  if isinstance(error, OSError) and (path or isinstance(error, PermissionError)):
    _stop(f"cannot use {path or 'a file'}: {reason}")
  raise error


def config_flag(alias: str = "config") -> flags.FlagHolder[ConfigDict]:
  """Define the flag --config=NAME[:args] or FILE.py[:args], with --config.a.b=value for single fields.

  `alias` is another name of the flag, by which the file is asked for; its fields stay --config.a.b.
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "configuration: NAME[:args] of one that comes with the package, or FILE.py[:args]"
  )
  flags.FLAGS["config"].parser = _ConfigFile(alias)
  if alias != "config":
    flags.DEFINE_alias(alias, "config")
    flags.FLAGS[alias].help = flags.FLAGS["config"].help
    flags.FLAGS["config"].help = f"the same as --{alias}; --config.a.b=value sets a field of it"
  flags.mark_flag_as_required(alias)
  return holder


def process_flags() -> None:
  """Define the flags that every command with a network has, for where the environment does not set them."""
  flags.DEFINE_string("coordinator_address", None, "host:port of process 0")
  flags.DEFINE_integer("num_processes", None, "processes of the run", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "this process's number, from 0", lower_bound=0)
  flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the other processes", lower_bound=1)
  flags.DEFINE_integer(
    "heartbeat_timeout",
    None,
    "seconds after which a silent process is taken for dead, and the others end; by default 10, over a bucket 100",
    lower_bound=1,
  )


def config_given() -> tuple[str, dict[str, Any]]:
  """Return FILE.py[:args] of the flag --config, and the values that --config.a.b=value gave to single fields."""
  flag = flags.FLAGS["config"]
  return config_flags.get_config_filename(flag), config_flags.get_override_values(flag)


def config_names() -> dict[str, pathlib.Path]:
  """Return the file of each config that comes with the package, by its name, such as `shapes`."""
  files_there = sorted(pathlib.Path(_PACKAGE, "configs").glob("*.py"))  # a link to the repository's folder
  return {path.stem: path for path in files_there if path.stem not in ("__init__", "common")}


def read_config(path: str, flag: str = "config") -> ConfigDict:
  """Return the config of NAME[:args] or FILE.py[:args], not locked.

  Args:
    path: name of a config that comes with the package, such as `shapes`, or any Python file with a `get_config`.
    flag: that named it, for the message.

  Raises:
    UserError: every mistake in the path, the file or its arguments.
  """
  given, colon, argument = path.partition(":")
  file = str(config_names().get(given, given))
  if not os.path.isfile(file):
    near = [*config_names(), *map(str, pathlib.Path(given).parent.glob("*.py"))]
    raise UserError(f"no config {given}; {guesses.did_you_mean(given, near)}")
  if not file.endswith(".py"):
    raise UserError(f"--{flag}={path} should name a config such as shapes, or a Python file")
  try:
    spec: Any = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass in the file looks up its annotations
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
      sys.path.append(os.getcwd())  # as `python -m` does and `diffdis` does not; last, so that it is in nobody's way
    spec.loader.exec_module(module)
    fields = module.get_config(*([argument] if colon else []))
    if fields is None:
      raise ValueError("get_config returned None; it should end with `return config`")
    return ConfigDict(fields)
  except ValueError as error:  # which get_config raises of its arguments, in a sentence of its own
    raise UserError(f"--{flag}={path}: {error}") from error
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
    where = f" (line {lines[-1]})" if lines else ""
    raise UserError(f"--{flag}={path}: {type(error).__name__}: {error}{where}") from error


def compilation_cache() -> None:
  """Keep compiled programs between runs: in $JAX_COMPILATION_CACHE_DIR, or else in the user's cache directory."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", files.user_cache("jax"))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
      jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def use_all_cores() -> None:
  """Take as many CPU devices as cores, rounded down to a power of two, at most 8: one device leaves cores idle.

  It has no effect on accelerators, or where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many.
  """
  chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
    import jax

    # A power of two, so that batches can be split evenly.
    jax.config.update("jax_num_cpu_devices", min(8, 2 ** (machine.cores().bit_length() - 1)))


class _ConfigFile(flags.ArgumentParser):
  """Load a config file; every mistake in the path, the file or the overrides is a UserError."""

  def __init__(self, flag: str):
    self._flag = flag

  def parse(self, path: str) -> ConfigDict:
    config = read_config(path, self._flag)
    for override in filter(None, map(_OVERRIDE.match, sys.argv[1:])):
      guesses.check_key(config.to_dict(), key := override[1], list(flags.FLAGS))
      *sections, name = key.partition("[")[0].split(".")
      # A value is read by the type of what is there.
      if functools.reduce(lambda section, name: section[name], sections, config).get_type(name) is type(None):
        file = path.partition(":")[0]
        raise UserError(f"--config.{key} cannot be set: the config has None there; set it in {file}")
    return config.lock()  # so that no code adds a field by misspelling one


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    guess = guesses.guess_flag(error.flagname, list(flags.FLAGS), guesses.fields_of(config.to_dict()) if config else ())
    _stop(f"unknown flag --{error.flagname}; {guess}")
  # Flags of our own raise UserError, absl's its own, and ConfigDict the others, of single fields.
  except (UserError, flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
    missing = _MISSING.findall(str(error))
    described = " and ".join(f"--{name} ({flags.FLAGS[name].help})" for name in missing)
    _stop(f"{described} {'is' if len(missing) == 1 else 'are'} missing" if missing else error)


def _stop(error: Exception | str, *, code: int = 2) -> NoReturn:
  """Exit with one line, in which nothing is left that a terminal would take for orders."""
  line = " ".join(str(error).split())
  shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
  sys.stderr.write(f"error: {''.join(shown)}\n")
  _exit(code)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  if issubclass(kind, KeyboardInterrupt):
    sys.stdout.flush()
    signals.end_interrupted(kind)
  sys.__excepthook__(kind, error, trace)
  _exit(1)


def _exit(code: int) -> NoReturn:
  """Exit; at once where Python's clean-up would wait for other processes, or for a compiler."""
  distributed: Any = sys.modules.get("jax.distributed")  # where jax was not imported, nobody waits
  compiles = any(thread.name.startswith("compiler") for thread in threading.enumerate())  # of parallel/programs.py
  if compiles or (distributed and distributed.is_initialized()):
    sys.stdout.flush()  # which os._exit does not do
    signals.exit_at_once(code)
  sys.exit(code)


class _Plain(python_logging.Formatter):
  """Format a line for a person at a terminal: the time and the text. A file gets the process and the place too."""

  def format(self, record: python_logging.LogRecord) -> str:
    warns = "" if record.levelno < python_logging.WARNING else f"{record.levelname.lower()}: "
    return f"{self.formatTime(record, '%H:%M:%S')}  {warns}{super().format(record)}"


def _is_ours(record: python_logging.LogRecord) -> bool:
  """Let our own progress through, and only warnings of libraries; with --verbosity=1 everything."""
  if logging.get_verbosity() > 0 or record.pathname.startswith(_PACKAGE):
    return True
  error = record.exc_info[1] if record.exc_info else None
  # Ctrl-C and a full disk are one line of ours: what a library logs of them, with a traceback, it raises too.
  is_known = isinstance(error, KeyboardInterrupt) or full_disk(error) is not None
  return record.levelno >= python_logging.WARNING and not is_known and not str(record.msg).startswith(_UNMEASURED)
