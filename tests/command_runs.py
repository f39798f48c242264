"""Runs of the tiny config through the command line, as a user types it, shared by the test files that look at them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.once import made_once

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVE_EVERY = 16, 4
MEASURED, GENERATED = ("--tasks=zero_shot",), ("--prompt=a red star", "--prompt=a blue ring", "--seed=1")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """Return the commands' environment variables: they compile for one device, quickly rather than well."""
  quick = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return {**os.environ, **quick, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def start(
  command: Sequence[str],
  environment: Mapping[str, str],
  *,
  folder: pathlib.Path = ROOT,
  output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
  """Start a command with nothing to read, whose output is text."""
  options: Any = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
  return subprocess.Popen(command, **options)


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
  """Run a command to its end."""
  options: Any = dict(cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
  return subprocess.run(command, **options)


def call(verb: str, environment: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
  """Run a command of the package."""
  return run([sys.executable, "-m", f"diffdis_jax.{verb}", *flags], environment)


def joint_flags(autoencoder: str) -> list[str]:
  """Return the flags of the joint run, except for its workdir."""
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "init_from": autoencoder}
  return ["--config=tests/tiny.py", *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="session")
def autoencoder_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> str:
  """Return the workdir of a finished run of the autoencoder."""

  def train(workdir: pathlib.Path) -> None:
    done = call("train", environment, "--config=tests/tiny.py:autoencoder", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr

  return str(made_once(tmp_path_factory, "autoencoder", train))


@pytest.fixture(scope="session")
def joint_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], autoencoder_run: str) -> str:
  """Return the workdir of a finished joint run on that autoencoder, with sample images and TensorBoard's events."""

  def train(workdir: pathlib.Path) -> None:
    prompts = "--config.sample_prompts=('a red star', 'a blue ring')"
    done = call("train", environment, *joint_flags(autoencoder_run), f"--workdir={workdir}", prompts)
    assert done.returncode == 0, done.stderr

  return str(made_once(tmp_path_factory, "joint", train))


@pytest.fixture(scope="session")
def joint_results(
  tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], joint_run: str
) -> pathlib.Path:
  """Return the file that evaluate writes for the joint run, with the flags MEASURED."""

  def evaluate(out: pathlib.Path) -> None:
    done = call("evaluate", environment, f"--workdir={joint_run}", *MEASURED, f"--out={out}")
    assert done.returncode == 0, done.stderr

  return made_once(tmp_path_factory, "joint.json", evaluate)


@pytest.fixture(scope="session")
def joint_images(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], joint_run: str) -> pathlib.Path:
  """Return the folder of images that the joint run generates, with the flags GENERATED."""

  def generate(out: pathlib.Path) -> None:
    done = call("generate", environment, f"--workdir={joint_run}", *GENERATED, f"--out={out}")
    assert done.returncode == 0, done.stderr

  return made_once(tmp_path_factory, "joint_images", generate)


@pytest.fixture(scope="session")
def exportable_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> str:
  """Return the workdir of a finished run of both objectives on an untrained autoencoder without patches."""

  def train(workdir: pathlib.Path) -> None:
    fields = {"num_steps": 2, "model.autoencoder.widths": (8, 8), "model.autoencoder.patch": 1}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    done = call("train", environment, "--config=tests/tiny.py", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr

  return str(made_once(tmp_path_factory, "exportable", train))
