"""A wrong name that a user types is answered with the nearest right one."""

from __future__ import annotations

import pathlib
import re

import pytest

import diffdis_jax
from configs import clip_cc3m, diffdis_cc3m, shapes
from diffdis_jax import evaluate
from diffdis_jax.common import guesses
from diffdis_jax.config import run
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks

CONFIG = shapes.get_config()
OF_TRAIN = ("config", "workdir", "eval", "tracker", "profile", "num_processes", "process_id", "quiet")
OF_GENERATE = ("workdir", "out", "prompt", "prompts_file", "num_images", "seed", "noise", "steps", "guidance")


@pytest.mark.parametrize(
  "key, nearest",
  [
    ("optim.lr", "did you mean optim.rates.new?"),
    ("learning_rate", "did you mean optim.rates.new?"),
    ("steps", "did you mean num_steps?"),
    ("wandb", "did you mean --tracker?"),
    ("grad_accum", "did you mean optim.accumulate?"),
    ("resume", "did you mean --workdir?"),
    ("Resolution", "did you mean image_size?"),
    ("schedule", "did you mean image_diffusion.schedule or text_diffusion.schedule?"),
    ("optim.weight_deacy", "did you mean optim.weight_decay?"),
    ("data.lodaer.prefetch", "did you mean data.loader.prefetch?"),
    ("foo", "known: batch_size, checkpoint, condition_timestep, data, eval_every, evals, image_diffusion,"),
  ],
)
def test_a_config_key(key, nearest):
  with pytest.raises(UserError, match=re.escape(f"unknown config key {key}; {nearest}")) as error:
    guesses.check_key(CONFIG.to_dict(), key, OF_TRAIN)
  assert len(str(error.value)) < 450


def test_a_flag():
  fields = guesses.fields_of(CONFIG.to_dict())
  assert guesses.guess_flag("lr", OF_TRAIN, fields) == "did you mean --config.optim.rates.new?"
  assert guesses.guess_flag("workdirs", OF_TRAIN, fields) == "did you mean --workdir?"
  assert guesses.guess_flag("guidance_scale", OF_GENERATE, ()) == "did you mean --guidance?"
  assert guesses.guess_flag("height", OF_GENERATE, ()) == "see --help"


def test_every_answer_is_a_field_or_a_flag_that_there_is():
  configs = (shapes.get_config(), diffdis_cc3m.get_config("path=DIR"), clip_cc3m.get_config("path=DIR"))
  fields = {path for config in configs for path in guesses.fields_of(config.to_dict())} | {*run.known_fields()}
  package = pathlib.Path(diffdis_jax.__file__).parent
  text = "".join(path.read_text() for path in package.rglob("*.py"))
  flags = set(re.findall(r"""DEFINE_\w+\(\s*"(\w+)\"""", text))
  flags |= {*evaluate.SAMPLING, *tasks.all_settings()}  # computed defaults
  targets = {target for targets in guesses._TARGETS.values() for target in targets}
  assert len(targets) > 20 and "workdir" in flags
  assert not {target for target in targets if not target.startswith("--")} - fields
  assert not {target[2:] for target in targets if target.startswith("--")} - flags
