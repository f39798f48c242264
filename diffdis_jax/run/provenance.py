"""Where a figure comes from: the code, the versions, the machine, and the run with all that it began from.

Every record of evaluate, ablate, benchmark and demo carries it. It names no path of a machine.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import jax

import diffdis_jax
from diffdis_jax.common import buckets, files, machine, one_file
from diffdis_jax.config import read_fields
from diffdis_jax.errors import UserError
from diffdis_jax.run import committed, history, workdir

ROOT = pathlib.Path(__file__).parents[2]  # of the checkout; of an installed package the folder that it lies in
# The folders of an absolute path or of a bucket's address, wherever in a text it stands. They may have blanks where a
# value begins with them; behind a blank they end at the next one, since words may follow.
_WORD = r"[^\s,:;=/'\"]+"
_FOLDERS = re.compile(
  rf"(?:(?<![^,:;='\"(\[])(?:\w+:/)?/(?:{_WORD}(?: +{_WORD})*/)*|(?<![\w.)}}])(?:\w+:/)?/(?:{_WORD}/)*)(?=[^\s/])"
)


def provenance(run: Mapping[str, Any]) -> dict[str, Any]:
  """Describe what made a record, as JSON.

  Args:
    run: `of_run` of a trained one, or `of_config`; of several models, name -> one of these.

  Returns:
    commit: of the package's checkout; None where it is installed from a wheel.
    clean: whether the checkout's files were those of the commit; None without one.
    versions: of diffdis_jax, jax and numpy.
    device: its `kind`, and the `count` over all processes.
    processors: that this process may use.
    run: as given.
  """
  device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
  return {**code(), "device": device, "processors": machine.processors(), "run": dict(run)}


@functools.cache
def code() -> dict[str, Any]:
  """Return `commit`, `clean` and `versions`, as they are when this is first called."""
  commit, clean = _checkout(ROOT)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
  return {"commit": commit, "clean": clean, "versions": {"diffdis_jax": diffdis_jax.__version__, **versions}}


def of_run(path: str, *, step: int | None) -> dict[str, Any]:
  """Describe a trained run.

  Args:
    path: its workdir.
    step: of the checkpoint that is used; None where there is none.

  Returns:
    config_hash: of the fields that its numbers depend on, of paths the last name alone; None of a folder without a
      config that can be read, and so are seed and objectives.
    seed, objectives: of the config.
    steps: finished, in the checkpoint.
    commits: of the code that trained it, in order, as far as its history tells; `clean` as in `provenance`.
    imported: only of a run that import_weights made, from what.
    init_from: the run that it began from, that one's own, and so on, each with these fields.
  """
  if (file := one_file.at(path)) is not None:
    return one_file.read_record(file).provenance
  try:
    config = read_fields(path)
  except (UserError, OSError):
    config = None
  events = history.read(path)
  starts = [event for event in events if "commit" in event]
  cleans = [event.get("clean") for event in starts]
  source = history.parse(" ".join(files.lines(buckets.path(path) / "import.json"))).get("source")
  # From the end: a run whose first start never saved begins again, and may then begin from another one.
  began_from = (event["init_from"] for event in reversed(events) if "init_from" in event)
  return {
    **_fields(config),
    "steps": step,
    "commits": [*dict.fromkeys(event["commit"] for event in starts)],
    "clean": None if not cleans or None in cleans else all(cleans),
    **({"imported": public(source)} if source else {}),
    "init_from": next(began_from, []),  # an import has no history
  }


def of_config(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Describe a network that is not trained, as `of_run` does a run."""
  return {**_fields(dict(fields)), "steps": 0, "commits": [], "clean": None, "init_from": []}


def behind(init_from: str) -> list[dict[str, Any]]:
  """List the runs from which a run starts that begins in this workdir, the nearest first; none for "".

  Recorded when the run begins, it is known also when the folders are gone.
  """
  if not init_from:
    return []
  found = of_run(init_from, step=None if one_file.at(init_from) else committed.latest_step(init_from))
  return [{name: value for name, value in found.items() if name != "init_from"}, *found["init_from"]]


def together(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """Describe what made a figure of several records: each value of `commits`, `versions`, `devices`, `processors` once,
  null for a record that has none; and `clean`, whether all were."""
  found = [record.get("provenance") or {} for record in records]

  def values(name: str) -> list[Any]:
    # As text, since dicts have no hash; sorted, so that the same records give the same bytes.
    return [json.loads(text) for text in sorted({json.dumps(each.get(name), sort_keys=True) for each in found})]

  return {
    "commits": values("commit"),
    "clean": all(each.get("clean") is True for each in found) if found else None,
    "versions": values("versions"),
    "devices": values("device"),
    "processors": values("processors"),
  }


def public(value: Any) -> Any:
  """Take the folders of absolute paths and of buckets' addresses out of JSON: `/data/sd/v1.ckpt` becomes `v1.ckpt`."""
  if isinstance(value, Mapping):
    return {name: public(each) for name, each in value.items()}
  if isinstance(value, list | tuple):
    return [public(each) for each in value]
  return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _fields(config: dict[str, Any] | None) -> dict[str, Any]:
  """Describe a config; its hash is the same wherever the run and its data lie."""
  if config is None:
    return {"config_hash": None, "seed": None, "objectives": None}
  fields = {
    field: str(value).rstrip("/").rpartition("/")[2] if field.split(".")[-1] == "path" else value
    for field, value in workdir.identity(config).items()
    if field != "init_from"
  }
  return {"config_hash": workdir.digest(fields), "seed": config.get("seed"), "objectives": [*config["objectives"]]}


def _checkout(root: pathlib.Path) -> tuple[str | None, bool | None]:
  """Ask git for the commit, and whether the files are its own. Untracked ones count in the package alone."""
  untracked = ""
  # As the Dockerfile writes it, and launch/tpu_pod.sh, which adds the extras that it has installed.
  if (root / ".commit").is_file():
    described = (root / ".commit").read_text().partition(" ")[0].strip()
  # Only the root itself: a wheel may lie inside of somebody's own repository.
  elif not (root / ".git").exists():
    return None, None
  else:
    try:
      described = _git(root, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
      untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "diffdis_jax")
    except (OSError, subprocess.SubprocessError):  # no git, no commit, or one that refuses
      return None, None
  commit, changed, _ = described.strip().partition("-dirty")
  return commit, not changed and not untracked


def _git(root: pathlib.Path, *arguments: str) -> str:
  """Run git in this folder, whoever owns it, and whichever repository the environment names, as in a hook."""
  command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
  environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
  return done.stdout
