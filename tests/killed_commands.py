"""Define the commands that tests kill: their flags, and what they write."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from diffdis_jax.data import records
from diffdis_jax.evals import results
from diffdis_jax.run import digests, restore, workdir
from tests import benchmark_sets
from tests.command_runs import call, joint_flags
from tests.data.prepare import test_own_pictures
from tests.raw_pairs import picture, write_tar
from tests.report import written_run
from tests.test_ablate import BASE
from tests.test_resume import metrics, restore_training, steps_logged

COUNT = 40


class Case(NamedTuple):
  """A command that the tests kill.

  Attributes:
    kills: how many of the schedule's it gets.
    command: with OUT in place of what it writes.
    written: what a reader finds at that path at the end: name -> content, which the next run must find again.
    there: the same at any moment. Each of its contents is that of the end.
    later: names that may still lack while others are there.
    code: of SIGTERM, beside that of a command which has nothing to save.
    name: of what it writes.
  """

  kills: int
  command: Sequence[str]
  written: Callable[[pathlib.Path], dict[str, Any]]
  there: Callable[[pathlib.Path], dict[str, Any]]
  later: Callable[[str], bool] = lambda name: False
  code: int = 143
  name: str = "out"


OUT = "{out}"


def module(name: str, *flags: str) -> list[str]:
  return [sys.executable, "-m", f"diffdis_jax.{name}", *flags]


def files_of(out: pathlib.Path) -> dict[str, bytes]:
  """Return the files of a folder, or the file itself."""
  if out.is_file():
    return {out.name: out.read_bytes()}
  return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def simple(kills: int, command: Sequence[str], name: str = "out") -> Case:
  return Case(kills, command, files_of, files_of, name=name)


# --- prepare_data: raw data are written into a folder, and the command's words are returned ---


def files_beside(raw: pathlib.Path) -> list[str]:
  test_own_pictures.beside(raw)
  return ["files"]


def files_parquet(raw: pathlib.Path) -> list[str]:
  for shard in ("00000", "00001"):
    test_own_pictures.write_table(raw / f"{shard}.parquet", "img2dataset")
  return ["files"]


def pairs(raw: pathlib.Path) -> list[str]:
  for tar in range(6):
    content = {f"{i}.{end}": picture(i) if end == "png" else b"x" for i in range(COUNT) for end in ("png", "txt")}
    write_tar(raw / f"{'val' if tar == 5 else 'train'}-{tar:05d}.tar", content)
  return ["pairs"]


def torchvision_dtd(raw: pathlib.Path) -> list[str]:
  benchmark_sets.dtd(raw)
  return ["torchvision", "dtd"]


READERS = [files_beside, files_parquet, pairs, torchvision_dtd]  # one of each kind; all write by prepare/write.py


def prepared(kills: int, command: Sequence[str]) -> Case:
  # The card and the digests are made of the data set that is there.
  return Case(kills, command, data_set, data_set, later=lambda name: name.startswith(("card.", "digests.")))


def data_set(out: pathlib.Path) -> dict[str, Any]:
  """Files, but of records, whose bytes differ from run to run, what they hold."""
  found: dict[str, Any] = files_of(out)
  if "digests.json" in found:
    found["digests.json"] = digests.damage(out)
  for split in records.read_info(out).splits if found else ():
    stored = records._open(out, split).stored
    found[split] = [{name: np.asarray(each).tobytes() for name, each in stored[i].items()} for i in range(len(stored))]
  return {name: each for name, each in found.items() if "array_record" not in name}


def of_reader(write: Callable[[pathlib.Path], list[str]]) -> Callable[[pytest.FixtureRequest, pathlib.Path], Case]:
  def make(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
    del request
    words = [*write(raw), f"--source={raw}", f"--out={OUT}"]
    words.append("--num_processes=2" if write is pairs else "--num_processes=1")
    return prepared(6, module("prepare_data", *words))

  return make


# --- the other commands: of the tests' fixtures and a folder for what they need ---


def latents(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  (raw / "tars").mkdir()
  pairs(raw / "tars")
  done = call("prepare_data", request.getfixturevalue("environment"), "pairs", f"--source={raw}/tars", f"--out={raw}/d")
  assert done.returncode == 0, done.stderr
  run = request.getfixturevalue("autoencoder_run")
  return prepared(6, module("prepare_data", "latents", f"--workdir={run}", f"--data={raw}/d", f"--out={OUT}"))


def export_weights(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run = request.getfixturevalue("exportable_run")
  return simple(4, module("export_weights", f"--workdir={run}", f"--out={OUT}"))


def one_file(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run = request.getfixturevalue("exportable_run")
  return simple(4, module("export_weights", f"--workdir={run}", f"--out={OUT}"), name="out.safetensors")


def imported(out: pathlib.Path) -> dict[str, Any]:
  if not out.exists():
    return {}
  found = {name: (out / name).read_bytes() for name in ("config.json", "import.json")}
  params = restore.restore_params(str(out), step=None, ema=True)
  return found | {name: np.asarray(each).tobytes() for name, each in params.items()}


def import_weights(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run, environment = request.getfixturevalue("exportable_run"), request.getfixturevalue("environment")
  assert call("export_weights", environment, f"--workdir={run}", f"--out={raw}/exported").returncode == 0
  return Case(6, module("import_weights", f"--source={raw}/exported", f"--out={OUT}"), imported, imported)


def report(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run = written_run.write(raw / "run")
  command = module("report", f"--workdir={run}", f"--out={OUT}")
  # Without the time at which it was written.
  page = lambda out: {name: re.sub(rb'"written": ?[\d.]+', b"", text) for name, text in files_of(out).items()}
  return Case(4, command, page, page, name="out.html")


def generate(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run = request.getfixturevalue("joint_run")
  return simple(4, module("generate", f"--workdir={run}", "--prompt=a red star", "--num_images=4", f"--out={OUT}"))


def measured(out: pathlib.Path) -> dict[str, Any]:
  found = results.read(str(out)) if out.exists() else {}
  return {f"{task}/{name}": record for task, records in found.items() for name, record in records.items()}


def evaluate(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  run = request.getfixturevalue("joint_run")
  command = module("evaluate", f"--workdir={run}", "--tasks=zero_shot,retrieval", f"--out={OUT}")
  return Case(6, command, measured, measured, later=lambda name: True, name="out.json")


def trained(out: pathlib.Path) -> dict[str, Any]:
  state, batch = restore_training(out)
  leaves = {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree.leaves_with_path(state)}
  return {"metrics": metrics(out), "next batch": batch.tobytes(), **leaves}


def training(out: pathlib.Path) -> dict[str, Any]:
  """Check that the newest checkpoint can be read, and that the lines belong to steps. Return nothing to compare."""
  if workdir.latest_step(str(out)):
    restore.restore_params(str(out), step=None, ema=True)
  steps_logged(out)
  return {}


def train(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  flags = joint_flags(request.getfixturevalue("autoencoder_run"))
  flags += ["--config.eval_every=4", "--config.train_evals=('test',)", "--config.sample_prompts=('a red star',)"]
  command = module("train", *flags, f"--workdir={OUT}")
  return Case(24, command, trained, training, later=lambda name: True, code=75)


def ablated(out: pathlib.Path) -> dict[str, Any]:
  runs = {path.name: metrics(path) for path in out.glob("runs/*")}
  return runs | ablating(out)


def ablating(out: pathlib.Path) -> dict[str, Any]:
  for path in out.glob("runs/*"):
    training(path)
  return {
    f"{path.name}/{name}": record for path in out.glob("results/*.json") for name, record in measured(path).items()
  }


def ablate(request: pytest.FixtureRequest, raw: pathlib.Path) -> Case:
  flags = joint_flags(request.getfixturevalue("autoencoder_run"))[1:]
  command = module("ablate", "run", BASE, "--grid=loss.ita_weight=0.01", "--seeds=0", *flags, f"--out={OUT}")
  return Case(8, command, ablated, ablating, later=lambda name: True, code=75)


OTHERS = [train, ablate, latents, import_weights, export_weights, one_file, report, evaluate, generate]
MAKERS = {each.__name__: each for each in OTHERS} | {each.__name__: of_reader(each) for each in READERS}
