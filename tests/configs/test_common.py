from __future__ import annotations

import importlib

import pytest

from configs import common

DEFAULTS = dict(runlocal=False, fusion=True, gamma=1.0, steps=10, schedule="cosine")


def test_values_have_the_type_of_their_default():
  assert common.parse_arg(None, **DEFAULTS).to_dict() == common.parse_arg("", **DEFAULTS).to_dict() == DEFAULTS
  values = common.parse_arg("runlocal,fusion=False,gamma=3,steps=7,schedule=linear", **DEFAULTS)
  assert values.to_dict() == dict(runlocal=True, fusion=False, gamma=3.0, steps=7, schedule="linear")
  assert isinstance(values.gamma, float) and isinstance(values.steps, int) and values.runlocal is True


@pytest.mark.parametrize(
  "arg, message",
  [
    ("fuson=1", r"unknown argument 'fuson'; known: fusion, gamma, runlocal, schedule, steps; did you mean fusion\?"),
    ("steps=1.5", "steps=1.5 should be of type int"),
    ("steps=3,schedule=", "argument 'schedule' has no value; write it as schedule=VALUE"),
    ("fusion=maybe", "fusion=maybe should be of type bool"),
    ("gamma=1,gamma=2", "'gamma' is given twice"),
  ],
)
def test_mistakes_are_named(arg, message):
  with pytest.raises(ValueError, match=message):
    common.parse_arg(arg, **DEFAULTS)


@pytest.mark.parametrize(
  "name, arg",
  [
    *(("shapes", arg) for arg in ("", "objectives=contrastive")),
    ("places_lt", ""),
    ("clip_cc3m", "runlocal"),
    ("diffdis_cc3m", "imagenet=I,coco=C,flickr=F,held_out=H,fid=C,inception=W"),
  ],
)
def test_evaluations_have_the_runs_image_size_unless_they_set_another(name, arg):
  """Otherwise shapes and scenes would be rendered at the config's own size and enlarged."""
  config = importlib.import_module(f"configs.{name}").get_config(arg)
  sizes = lambda: {key: section.data.image_size for key, section in config.evals.items() if "data" in section}
  before, first = config.image_size, next(iter(sizes()))
  assert {*sizes().values()} == {before}
  config.image_size = 2 * before
  assert {*sizes().values()} == {2 * before}
  config.evals[first].data.image_size = 3 * before
  assert sizes() == dict.fromkeys(sizes(), 2 * before) | {first: 3 * before} and config.image_size == 2 * before
