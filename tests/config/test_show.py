"""`config show`: every field with its value, its range and its meaning."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from diffdis_jax import config
from diffdis_jax.common import cli, guesses, one_file
from diffdis_jax.config import __main__ as command
from diffdis_jax.config import section
from diffdis_jax.errors import UserError
from tests.command_runs import ROOT

# One of each kind of network and of each optional section.
CONFIGS = ("shapes", "diffdis_cc3m", "clip_cc3m", "shapes_lt:stage=2", "shapes:objectives=contrastive")


def found(given: str) -> dict[str, section.Line]:
  return {field.path: field for field in section.describe(config.Run.of(cli.read_config(given)))}


def test_a_run_in_one_file_is_read_as_a_workdir_is(tmp_path):
  file = shutil.copy(one_file.models()["shapes"], tmp_path / "mine.safetensors")
  assert command.read(str(file)) == config.load("shapes")


@pytest.mark.parametrize("given", CONFIGS)
def test_each_field_of_a_config_is_there_with_its_value_and_a_meaning(given):
  fields = guesses.fields_of(config.Run.of(cli.read_config(given)).to_dict())
  shown = found(given)
  assert {path: field.value for path, field in shown.items()} == fields
  assert [path for path, field in shown.items() if not field.meaning] == []
  assert [field for field in shown.values() if len(field.meaning) > 240] == []


def test_ranges_are_those_of_the_checks():
  shown = found("shapes")
  assert shown["optim.b1"].range == "at least 0 and below 1"
  assert shown["text_diffusion.gamma"].range == "above 0 and at most 1"
  assert shown["optim.schedule_kind"].range == "constant, cosine, linear, epoch_cosine"
  assert shown["optim.rates.unet"].range == "at least 0" and shown["model.unet.widths"].range == "at least 1"
  assert shown["objectives"].range.startswith("generation, discrimination, ") and shown["data.augment.flip"].range == ""


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
    ((), "config : write config show CONFIG"),
    (("show",), "write config show CONFIG"),
    (("show", "shapes", "emoji"), "unexpected argument 'emoji'"),
    (("list", "shapes"), "write config show CONFIG"),
    (("show", "shaps"), "no config shaps; did you mean shapes?"),
    (("show", "shapes", "--fields=optm"), "--fields=optm is the beginning of no field; did you mean optim?"),
    (("show", "tests"), "no config.json in tests"),
  ],
)
def test_bad_input_is_one_line(args, message):
  done = run(*args)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr


def test_each_config_that_comes_with_the_package_is_shown_but_for_what_needs_arguments():
  refused = {
    "own": "argument path=DIR is missing",
    "table6": "unknown config key classified",
  }
  assert refused.keys() < {*cli.config_names()}
  for name in cli.config_names():
    if name in refused:
      with pytest.raises(UserError, match=refused[name]) as error:
        command.read(name)
      assert "\n" not in str(error.value)
    else:
      lines = [*command.show(command.read(name), prefix="")]
      assert len(lines) > 100 and not any("\n" in line for line in lines), name
