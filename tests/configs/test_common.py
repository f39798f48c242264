from __future__ import annotations

import subprocess
import sys

import pytest

from configs import common

DEFAULTS = dict(runlocal=False, fusion=True, gamma=1.0, steps=10, schedule="cosine")


@pytest.mark.parametrize("arg", [None, ""])
def test_defaults(arg):
  assert common.parse_arg(arg, **DEFAULTS).to_dict() == DEFAULTS


def test_values_have_the_type_of_their_default():
  values = common.parse_arg("runlocal,fusion=False,gamma=3,steps=7,schedule=linear", **DEFAULTS)
  assert values.to_dict() == dict(runlocal=True, fusion=False, gamma=3.0, steps=7, schedule="linear")
  assert isinstance(values.gamma, float) and isinstance(values.steps, int) and values.runlocal is True


@pytest.mark.parametrize(
  "arg, message",
  [
    ("fuson=1", r"unknown argument 'fuson'; known: fusion, gamma, runlocal, schedule, steps; did you mean fusion\?"),
    ("runlocl", r"unknown argument 'runlocl'; .*; did you mean runlocal\?"),
    ("steps=1.5", "steps=1.5 should be of type int"),
    ("steps", "steps=True should be of type int"),
    ("schedule", "argument 'schedule' has no value; write it as schedule=VALUE"),
    ("fusion=maybe", "fusion=maybe should be of type bool"),
    ("gamma=1,gamma=2", "'gamma' is given twice"),
  ],
)
def test_mistakes_are_named(arg, message):
  with pytest.raises(ValueError, match=message):
    common.parse_arg(arg, **DEFAULTS)


def test_does_not_import_jax():
  code = "import sys, configs.common; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
