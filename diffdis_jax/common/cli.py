"""Define what all commands share: flags, one-line errors, logging, compilation cache.

A command ends with `if __name__ == "__main__": cli.run(main)`. Bad input exits with code 2 and one line on stderr. A
full disk or unreachable storage exits with one line and code 1, after which launchers retry; a bug with its traceback
and code 1; a preemption with code 75; Ctrl-C with one line and code 130; SIGTERM or SIGHUP, if there is nothing to
save, with one line and code 143.

jax is imported where it is used: it takes two seconds, which commands that compute nothing can save.
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
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffdis_jax.common import buckets, files, guesses, machine, signals
from diffdis_jax.errors import FULL_DISK, Diverged, Preempted, UserError, full_disk, may_pass

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
_MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")  # absl's words
CACHE_BYTES = 4 * 2**30  # limit of the compiled programs; a full-size step is a few hundred MB
# Flags of folders: an unset shell variable leaves them empty, which would mean the current folder.
_FOLDERS = {"workdir", "out"}
# Orbax warns like this at each save between two evaluations, if the best checkpoints are kept.
_UNMEASURED = "Requested `tracked_metric`"


def run(main: Callable[[list[str]], Any], *, positional: int = 0) -> NoReturn:
  """Parse the flags and call `main(argv)`; never return. `positional` arguments may follow the program's name.

  With several processes, or while a thread compiles, an error ends this process at once: Python's clean-up would wait
  minutes for the others or for the compiler.
  """
  # The default garbage collection searches all that jax has traced, which takes a fifth of the time of a start.
  gc.set_threshold(100_000, 50, 50)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA has this variable from TensorFlow
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # for a terminal that only knows ASCII
  sys.excepthook = _excepthook
  signals.end_on_signals()
  logging.get_absl_handler().addFilter(_is_ours)
  if sys.stderr.isatty():
    logging.get_absl_handler().setFormatter(_Plain())
  logging.set_verbosity(logging.INFO)  # before the flags are parsed, since a config file may already log
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
  """Write to stdout. A closed reader, such as head or a pager, does not end the command."""
  try:
    sys.stdout.write(content)
    sys.stdout.flush()
  except BrokenPipeError:
    # Otherwise Python, which flushes at exit, would report an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(names: Iterable[str], why: str) -> None:
  """Raise UserError for the first of these flags that is given, since it has no effect, and say why."""
  for name in names:
    if flags.FLAGS[name].present:
      raise UserError(f"--{name} has no effect {why}; leave it out")


def _help() -> NoReturn:
  """Write the command's docstring and all of its flags, also those defined in other files of the package."""
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    for flag in defined:
      if module.startswith("diffdis_jax.") or flag.name == "config":
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  described = flags.FLAGS.main_module_help().partition(":\n")[2]  # without the file's name
  write(f"{sys.modules['__main__'].__doc__}\nFlags:\n{described}\n")
  sys.exit(0)  # absl would exit with 1


def _check_values() -> None:
  """Raise UserError for an empty folder flag, a number that is nan, or an unreadable address in any flag or field."""
  for name in {*flags.FLAGS} - {"prompt", "eval"}:  # these may hold any text
    value = flags.FLAGS[name].value
    if name in _FOLDERS and value == "" and flags.FLAGS[name].present:
      raise UserError(f"--{name}= is empty; give a path")
    if isinstance(value, float) and math.isnan(value):  # absl accepts nan within any bounds
      raise UserError(f"--{name}={value} is no number; give one")
    for field in guesses.fields_of(value.to_dict()).values() if isinstance(value, ConfigDict) else [value]:
      for text in field if isinstance(field, list) else [field]:
        if isinstance(text, str):
          buckets.check(text)


def _stop_for(error: Exception) -> NoReturn:
  """Stop with one line for what a user can fix: input, disk, network or permissions. Raise a bug again."""
  path, number = getattr(error, "filename", None), getattr(error, "errno", None)
  reason = getattr(error, "strerror", None) or error
  where, again = f" ({path})" if path else "", "and run the same command again"
  if isinstance(error, (UserError, Diverged)):
    _stop(error, code=error.code)
  if full := number if number in FULL_DISK else full_disk(error):  # the second is for TensorStore's errors
    _stop(f"{os.strerror(full)}{where}; make room, {again}", code=1)
  if may_pass(error) or (isinstance(error, OSError) and number is None):  # errors of a bucket's server have no number
    login = "log in by gcloud auth application-default login"  # gcloud auth login alone is not enough
    how = login if "Anonymous caller" in str(error) else "check the network and your permissions"
    _stop(f"{reason}{where}; {how}, {again}", code=1)
  if isinstance(error, OSError) and (path or isinstance(error, PermissionError)):
    _stop(f"cannot use {path or 'a file'}: {reason}")
  raise error


def config_flag(alias: str = "config") -> flags.FlagHolder[ConfigDict]:
  """Define the flag --config=NAME[:args] or --config=FILE.py[:args], with --config.a.b=value for single fields.

  `alias` is another name of the flag for the file; single fields stay --config.a.b.
  """
  meaning = "configuration: NAME[:args] of one that comes with the package, or FILE.py[:args]"
  holder = config_flags.DEFINE_config_file("config", None, meaning)
  flags.FLAGS["config"].parser = _ConfigFile(alias)
  if alias != "config":
    flags.DEFINE_alias(alias, "config")
    flags.FLAGS[alias].help = flags.FLAGS["config"].help
    flags.FLAGS["config"].help = f"the same as --{alias}; --config.a.b=value sets a field of it"
  flags.mark_flag_as_required(alias)
  return holder


def process_flags() -> None:
  """Define the flags for several processes, which every command with a network has."""
  flags.DEFINE_string("coordinator_address", None, "host:port of process 0")
  flags.DEFINE_integer("num_processes", None, "processes of the run", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "this process's number, from 0", lower_bound=0)
  flags.DEFINE_integer("coordinator_timeout", 300, "seconds to wait for the other processes", lower_bound=1)
  silent = "seconds after which a silent process is dead, and the others end; by default 10, over a bucket 100"
  flags.DEFINE_integer("heartbeat_timeout", None, silent, lower_bound=1)


def config_given() -> tuple[str, dict[str, Any]]:
  """Return FILE.py[:args] of the flag --config, and the values that --config.a.b=value set."""
  flag = flags.FLAGS["config"]
  return config_flags.get_config_filename(flag), config_flags.get_override_values(flag)


def config_names() -> dict[str, pathlib.Path]:
  """Return {name: file} of the configs that come with the package, such as `shapes`."""
  files_there = sorted(pathlib.Path(_PACKAGE, "configs").glob("*.py"))  # a link to the repository's folder
  return {path.stem: path for path in files_there if path.stem not in ("__init__", "common")}


def read_config(path: str, flag: str = "config") -> ConfigDict:
  """Return the config of NAME[:args] or FILE.py[:args], not locked.

  Args:
    path: name of a config that comes with the package, such as `shapes`, or any Python file with a `get_config`.
    flag: the flag that named it, for messages.

  Raises:
    UserError: any mistake in the path, the file or its arguments.
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
    sys.modules[spec.name] = module  # a dataclass in the file looks up its annotations there
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
      sys.path.append(os.getcwd())  # as `python -m` does; last, so that it hides no other module
    spec.loader.exec_module(module)
    fields = module.get_config(*([argument] if colon else []))
    if fields is None:
      raise ValueError("get_config returned None; it should end with `return config`")
    return ConfigDict(fields)
  except ValueError as error:  # get_config raises it with a sentence about its arguments
    raise UserError(f"--{flag}={path}: {error}") from error
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
    where = f" (line {lines[-1]})" if lines else ""
    raise UserError(f"--{flag}={path}: {type(error).__name__}: {error}{where}") from error


def compilation_cache() -> None:
  """Store compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or in the user's cache directory."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", files.user_cache("jax"))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
      jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def use_all_cores() -> None:
  """Use as many CPU devices as cores, rounded down to a power of two, at most 8: one device leaves cores idle.

  It has no effect on accelerators, or if XLA_FLAGS or JAX_NUM_CPU_DEVICES set the number.
  """
  chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
    import jax

    # A power of two, so that batches can be split evenly.
    jax.config.update("jax_num_cpu_devices", min(8, 2 ** (machine.cores().bit_length() - 1)))


class _ConfigFile(flags.ArgumentParser):
  """Loads a config file; every mistake in the path, the file or the overrides is a UserError."""

  def __init__(self, flag: str):
    self._flag = flag

  def parse(self, path: str) -> ConfigDict:
    config = read_config(path, self._flag)
    for override in filter(None, map(_OVERRIDE.match, sys.argv[1:])):
      guesses.check_key(config.to_dict(), key := override[1], list(flags.FLAGS))
      *sections, name = key.partition("[")[0].split(".")
      # A value is read by the type of the field's present value.
      if functools.reduce(lambda section, name: section[name], sections, config).get_type(name) is type(None):
        file = path.partition(":")[0]
        raise UserError(f"--config.{key} cannot be set: the config has None there; set it in {file}")
    return config.lock()  # so that no code adds a field by a misspelt name


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    guess = guesses.guess_flag(error.flagname, list(flags.FLAGS), guesses.fields_of(config.to_dict()) if config else ())
    _stop(f"unknown flag --{error.flagname}; {guess}")
  # Our own flags raise UserError, absl's raise absl's error, and ConfigDict raises the others, about single fields.
  except (UserError, flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
    missing = _MISSING.findall(str(error))
    described = " and ".join(f"--{name} ({flags.FLAGS[name].help})" for name in missing)
    _stop(f"{described} {'is' if len(missing) == 1 else 'are'} missing" if missing else error)


def _stop(error: Exception | str, *, code: int = 2) -> NoReturn:
  """Exit with one line, without characters that a terminal would take for commands."""
  line = " ".join(str(error).split())
  printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
  sys.stderr.write(f"error: {''.join(printable)}\n")
  _exit(code)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  if issubclass(kind, KeyboardInterrupt):
    sys.stdout.flush()
    signals.end_interrupted(kind)
  sys.__excepthook__(kind, error, trace)
  _exit(1)


def _exit(code: int) -> NoReturn:
  """Exit; at once if Python's clean-up would wait for other processes or for a compiler."""
  distributed: Any = sys.modules.get("jax.distributed")  # without jax, nothing waits
  compiles = any(thread.name.startswith("compiler") for thread in threading.enumerate())  # see parallel/programs.py
  if compiles or (distributed and distributed.is_initialized()):
    sys.stdout.flush()  # os._exit does not flush
    signals.exit_at_once(code)
  sys.exit(code)


class _Plain(python_logging.Formatter):
  """Formats a line for a terminal: time and text. In a file a line also has the process and the place."""

  def format(self, record: python_logging.LogRecord) -> str:
    warns = "" if record.levelno < python_logging.WARNING else f"{record.levelname.lower()}: "
    return f"{self.formatTime(record, '%H:%M:%S')}  {warns}{super().format(record)}"


def _is_ours(record: python_logging.LogRecord) -> bool:
  """Pass our own progress and warnings of libraries; with --verbosity=1 pass everything."""
  if logging.get_verbosity() > 0 or record.pathname.startswith(_PACKAGE):
    return True
  error = record.exc_info[1] if record.exc_info else None
  # Ctrl-C and a full disk are one line of ours; libraries that log them with a traceback also raise them.
  is_known = isinstance(error, KeyboardInterrupt) or full_disk(error) is not None
  return record.levelno >= python_logging.WARNING and not is_known and not str(record.msg).startswith(_UNMEASURED)
