"""Run the tiny config by command lines, as a user types them. Several test files share these runs."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tests.once import made_once

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVE_EVERY = 16, 4
MEASURED, GENERATED = ("--tasks=zero_shot",), ("--prompt=a red star", "--prompt=a blue ring", "--seed=1")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """Return the environment variables of the commands: one device, and quick compilation without optimisation."""
  fast_compilation = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return {**os.environ, **fast_compilation, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def start(
  command: Sequence[str],
  environment: Mapping[str, str],
  *,
  folder: pathlib.Path = ROOT,
  output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
  """Start a command with an empty stdin; its output is text."""
  options: Any = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True)
  return subprocess.Popen(command, **options)


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
  """Run a command until it ends."""
  options: Any = dict(cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
  return subprocess.run(command, **options)


def call(verb: str, environment: Mapping[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
  """Run a command of the package, named by its verb."""
  return run([sys.executable, "-m", f"diffdis_jax.{verb}", *flags], environment)


def joint_flags(autoencoder: str) -> list[str]:
  """Return the flags of the joint run, except for its workdir."""
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "init_from": autoencoder}
  return ["--config=tests/tiny.py", *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Callable[..., pathlib.Path]:
  """Return a function that runs a command once for all test processes, and returns the path that it writes."""

  def run_once(name: str, verb: str, *flags: str) -> pathlib.Path:
    def make(path: pathlib.Path) -> None:
      done = call(verb, environment, *flags, f"--{'workdir' if verb == 'train' else 'out'}={path}")
      assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, name, make)

  return run_once


@pytest.fixture(scope="session")
def autoencoder_run(run_once: Callable[..., pathlib.Path]) -> str:
  """Return the workdir of a finished run of the autoencoder."""
  return str(run_once("autoencoder", "train", "--config=tests/tiny.py:autoencoder"))


@pytest.fixture(scope="session")
def joint_run(run_once: Callable[..., pathlib.Path], autoencoder_run: str) -> str:
  """Return the workdir of a finished joint run on that autoencoder, with sample images and TensorBoard's events."""
  prompts = "--config.sample_prompts=('a red star', 'a blue ring')"
  return str(run_once("joint", "train", *joint_flags(autoencoder_run), prompts))


@pytest.fixture(scope="session")
def joint_results(run_once: Callable[..., pathlib.Path], joint_run: str) -> pathlib.Path:
  """Return the results that evaluate writes for the joint run, with the flags MEASURED."""
  return run_once("joint.json", "evaluate", f"--workdir={joint_run}", *MEASURED)


@pytest.fixture(scope="session")
def joint_images(run_once: Callable[..., pathlib.Path], joint_run: str) -> pathlib.Path:
  """Return the images that the joint run generates with the flags GENERATED."""
  return run_once("joint_images", "generate", f"--workdir={joint_run}", *GENERATED)


@pytest.fixture(scope="session")
def exportable_run(run_once: Callable[..., pathlib.Path]) -> str:
  """Return the workdir of a finished joint run, whose untrained autoencoder has no patches, as in diffusers."""
  fields = {"num_steps": 2, "model.autoencoder.widths": (8, 8), "model.autoencoder.patch": 1}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  return str(run_once("exportable", "train", "--config=tests/tiny.py", *flags))
