"""Names that a user types, and what they are answered with."""

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
OF_EVALUATE = ("workdir", "out", "tasks", "data", "split", "query_steps", "num_noise_samples", "guidance", "step")
OF_EVALUATE += ("normalize_query", "generation_steps", "generation_guidance", "image_size", "batch_size", "num_images")
OF_GENERATE = ("workdir", "out", "prompt", "prompts_file", "num_images", "seed", "noise", "steps", "guidance")


@pytest.mark.parametrize(
  "key, answer",
  [
    ("optim.lr", "did you mean optim.rates.new?"),
    ("lr", "did you mean optim.rates.new?"),
    ("learning_rate", "did you mean optim.rates.new?"),
    ("epochs", "did you mean num_steps?"),
    ("steps", "did you mean num_steps?"),
    ("max_steps", "did you mean num_steps?"),
    ("wandb", "did you mean --tracker?"),
    ("precision", "did you mean model.dtype?"),
    ("grad_accum", "did you mean optim.accumulate?"),
    ("optim.gradient_accumulation_steps", "did you mean optim.accumulate?"),
    ("resume", "did you mean --workdir?"),
    ("weight_decay", "did you mean optim.weight_decay?"),
    ("ema", "did you mean optim.ema_decay?"),
    ("output_dir", "did you mean --workdir?"),
    ("Resolution", "did you mean image_size?"),
    ("lr_scheduler", "did you mean optim.schedule_kind?"),
    ("schedule", "did you mean image_diffusion.schedule or text_diffusion.schedule?"),
    ("optim.weight_deacy", "did you mean optim.weight_decay?"),
    ("data.lodaer.prefetch", "did you mean data.loader.prefetch?"),
    ("seed.x", "did you mean seed?"),
    ("data.foo", "known: data.augment, data.caption_fields, data.discrimination_augment, data.discrimination_view,"),
    ("foo", "known: batch_size, checkpoint, condition_timestep, data, eval_every, evals, image_diffusion,"),
  ],
)
def test_a_config_key(key, answer):
  with pytest.raises(UserError, match=re.escape(f"unknown config key {key}; {answer}")) as error:
    guesses.check_key(CONFIG.to_dict(), key, OF_TRAIN)
  assert len(str(error.value)) < 450


def test_a_rate_is_of_a_group_that_the_config_has():
  config = shapes.get_config()
  config.optim.rates = dict(backbone=1e-3)
  with pytest.raises(UserError, match=r"did you mean optim.rates.backbone\?"):
    guesses.check_key(config.to_dict(), "optim.lr")


@pytest.mark.parametrize(
  "flags, config, name, answer",
  [
    (OF_TRAIN, CONFIG, "lr", "did you mean --config.optim.rates.new?"),
    (OF_TRAIN, CONFIG, "epochs", "did you mean --config.num_steps?"),
    (OF_TRAIN, CONFIG, "batch_size", "did you mean --config.batch_size?"),
    (OF_TRAIN, CONFIG, "seed", "did you mean --config.seed?"),
    (OF_TRAIN, CONFIG, "num_steps", "did you mean --config.num_steps?"),
    (OF_TRAIN, CONFIG, "workdirs", "did you mean --workdir?"),
    (OF_GENERATE, None, "guidance_scale", "did you mean --guidance?"),
    (OF_GENERATE, None, "num_inference_steps", "did you mean --steps?"),
    (OF_GENERATE, None, "num_samples", "did you mean --num_images?"),
    (OF_GENERATE, None, "output_dir", "did you mean --out?"),
    (OF_GENERATE, None, "ckpt", "did you mean --workdir?"),
    (OF_GENERATE, None, "promt", "did you mean --prompt?"),
    (OF_GENERATE, None, "height", "see --help"),
    (OF_EVALUATE, None, "steps", "did you mean --query_steps?"),
    (OF_EVALUATE, None, "num_inference_steps", "did you mean --generation_steps?"),
  ],
)
def test_a_flag(flags, config, name, answer):
  assert guesses.guess_flag(name, flags, guesses.fields_of(config.to_dict()) if config else ()) == answer


def test_every_answer_is_a_field_or_a_flag_that_there_is():
  made = (shapes.get_config(), diffdis_cc3m.get_config("path=DIR"), clip_cc3m.get_config("path=DIR"))
  fields = {path for config in made for path in guesses.fields_of(config.to_dict())} | {*run.known_fields()}
  package = pathlib.Path(diffdis_jax.__file__).parent
  text = "".join(path.read_text() for path in package.rglob("*.py"))
  flags = set(re.findall(r"""DEFINE_\w+\(\s*"(\w+)\"""", text))
  flags |= {*evaluate.SAMPLING, *tasks.all_settings()}  # derived
  targets = {target for targets in guesses._TARGETS.values() for target in targets}
  assert len(targets) > 20 and "workdir" in flags
  assert not {target for target in targets if not target.startswith("--")} - fields
  assert not {target[2:] for target in targets if target.startswith("--")} - flags
