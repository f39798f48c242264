"""Test that `config show` prints every field with its value, its range and its meaning."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffdis_jax import config
from diffdis_jax.common import cli, guesses
from diffdis_jax.config import section
from tests.command_runs import ROOT

# These configs cover each kind of network and each optional section.
CONFIGS = ("shapes", "diffdis_cc3m", "clip_cc3m", "places_lt:stage=2", "shapes:objectives=contrastive")


@pytest.mark.parametrize("config_flag", CONFIGS)
def test_each_field_of_a_config_is_there_with_its_value_and_a_meaning(config_flag):
  run_config = config.Run.of(cli.read_config(config_flag))
  fields = {field.path: field for field in section.describe(run_config)}
  assert {path: field.value for path, field in fields.items()} == guesses.fields_of(run_config.to_dict())
  assert [path for path, field in fields.items() if not field.meaning] == []
  if config_flag == "shapes":
    assert fields["optim.b1"].range == "at least 0 and below 1"
    assert fields["optim.schedule_kind"].range == "constant, cosine, linear, epoch_cosine"


def run(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "diffdis_jax", "config", *args], cwd=ROOT, capture_output=True, text=True
  )


def test_show_prints_the_fields_that_are_asked_for():
  done = run("show", "shapes", "--fields=optim.rates")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines() == [
    line
    for group, rate in (("new", 0.0015), ("text", 0.0005), ("unet", 0.0035))
    for line in (f"optim.rates.{group} = {rate}    (at least 0)", "    peak learning rate of each group but `frozen`")
  ]


@pytest.mark.parametrize(
  "args, message",
  [
    (("show",), "write config show CONFIG"),
    (("show", "own"), "argument path=DIR is missing"),
    (("show", "shaps"), "no config shaps; did you mean shapes?"),
    (("show", "shapes", "--fields=optm"), "--fields=optm is the beginning of no field; did you mean optim?"),
    (("show", "tests"), "no config.json in tests"),
  ],
)
def test_bad_input_is_one_line(args, message):
  done = run(*args)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr
