"""The config of a run: every field that it has, as its workdir's config.json holds it. No jax, as in the configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from diffdis_jax.common import buckets
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.errors import UserError, check_type, parse_json
from diffdis_jax.models import sizes
from diffdis_jax.run import workdir

NO_AUGMENTATION = dataclasses.asdict(Augmentation())


def base(model: ConfigDict, *, image_size: int) -> ConfigDict:
  """Every field that a run has, with the paper's values, or this project's where the paper is silent.

  Both objectives; autoencoder frozen, everything else trained at one rate from random parameters.
  """
  return ConfigDict(
    dict(
      seed=0,
      image_size=image_size,
      batch_size=64,  # global
      num_steps=1000,
      # Or one of them; or ("reconstruction",), the autoencoder alone; or ("contrastive",), CLIP with its own model; or
      # ("class_contrastive",) and ("long_tail_head",), the stages of long-tailed recognition (configs/places_lt.py).
      objectives=("generation", "discrimination"),
      init_from="",  # workdir to take matching parameters from
      model=model,
      image_diffusion=dict(schedule="scaled_linear"),  # scaled_linear, linear, cosine
      text_diffusion=dict(schedule="cosine", target="data", gamma=0.3),  # target: data, noise
      condition_timestep=1000,  # t_z of the clean image in discrimination
      sample_posterior=True,  # latents: a sample of the autoencoder's posterior, or its mode
      loss=dict(
        ita_weight=1.0, condition_dropout=0.1, image_dropout=0.1, kl_weight=1e-4, duplicate_captions="mask"
      ),  # objectives.Loss says what its fields are
      optim=dict(
        groups=(("^autoencoder", "frozen"), (".*", "new")),  # (regex over parameter paths, group); the first match wins
        rates=dict(new=1e-3),  # peak learning rate of each group but `frozen`
        allow_uninitialized="^$",  # regex of the frozen parameters that stay random on purpose; this one: of none
        schedule_kind="constant",  # constant, cosine, linear; epoch_cosine, of long-tailed runs
        warmup_steps=1000,
        final_fraction=0.0,
        epoch_steps=0,  # of epoch_cosine: steps of an epoch, and the rate at which the warm-up begins
        warmup_rate=0.0,
        weight_decay=1e-4,
        no_decay=r"bias$|norm|positions|logit_scale",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        first_moment="float32",  # float32, bfloat16: in which AdamW's is kept
        clip_norm=1.0,
        ema_decay=0.9999,
        accumulate=1,  # microbatches a step
        contrastive_batch="whole",  # whole: of all microbatches together; microbatch: each is one of its own
      ),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      data=dict(
        name="shapes",
        path="",
        split="train",
        caption_fields=(),  # of a record, whose texts are its captions; none: those that it came with
        max_length=77,
        augment=dict(NO_AUGMENTATION),  # transforms.Augmentation says what its fields are
        discrimination_view="shared",  # of an image: shared by both objectives, or "own" by discrimination_augment
        discrimination_augment=dict(NO_AUGMENTATION),
        mixture=dict(),  # name -> weight, name, path, split: several sources instead of the one above
        loader=dict(num_threads=4, num_workers=0, prefetch=8),
      ),
      checkpoint=dict(
        keep_last=2,
        keep_every=0,
        keep_best=0,  # so many more, by a metric of train_evals at the step of the save
        best_metric="",  # such as "test/acc1"
        best_is="max",  # max, min
      ),
      log_every=50,
      save_every=1000,
      eval_every=1000,
      sample_every=1000,
      evals=dict(),  # data set -> task and its settings
      train_evals=(),  # which of them to run every eval_every steps
      sample_prompts=(),
      inference=dict(
        steps=1, num_noise_samples=1, guidance=1.0, normalize_query=True, generation_steps=50, generation_guidance=7.5
      ),  # inference.Sampling says what its fields are
    )
  )


def defaults(*, accumulate: int) -> dict[str, Any]:
  """The fields that every run has alike, with their defaults: in a run that an earlier version wrote, each field that
  it lacks has its default.

  A new field's default is what runs did before there was one. Of the network, those are how it multiplies and attends,
  and τ at the start.

  Args:
    accumulate: the run's `optim.accumulate`. Only with more than one does `optim.contrastive_batch` mean anything.
  """
  fields = base(
    ConfigDict(dict(matmul_precision="auto", attention_kernel="auto", temperature=sizes.TEMPERATURE)), image_size=0
  ).to_dict()
  del fields["image_size"]
  if accumulate > 1:
    fields["optim"]["contrastive_batch"] = "microbatch"
  return fields


def load(path: epath.PathLike) -> ConfigDict:
  """The config of the run in a workdir, locked. Raises UserError: as `workdir.load_config` and `check_types`."""
  config = workdir.load_config(path)
  try:
    check_types(config.to_dict())
  except UserError as error:
    raise UserError(f"{buckets.path(path) / 'config.json'}: {error}") from error
  return config


def check_types(config: Mapping[str, Any]) -> None:
  """Checks what a config consists of; the ranges of its numbers are checked by what uses them.

  Raises:
    UserError: it lacks a field that every version has written, or one is of another type than its default.
  """
  model = {**sizes.clip_vit_l14().to_dict(), **sizes.sd_v1().to_dict()}
  like = base(ConfigDict(model), image_size=0).to_dict()
  _check_has(config, like, "")
  check_type("", config, like)
  _check_has(config["data"], ("name", "max_length", "mixture", "augment"), "data.")
  for name, section in config["evals"].items():
    _check_has(section, ("task",), f"evals.{name}.")
    check_type(f"evals.{name}.task", section["task"], "")


def _check_has(section: Mapping[str, Any], fields: Iterable[str], prefix: str) -> None:
  if missing := [field for field in fields if field not in section]:
    raise UserError(f"{prefix}{missing[0]} is missing; every config of a run has it")


def with_evals(config: ConfigDict, texts: Sequence[str]) -> ConfigDict:
  """The config with more evaluations in `evals` and `train_evals`, locked.

  Args:
    config: a run's.
    texts: each a JSON object: `name` of the data set, `task`, and what the evaluation takes. Where it has `data`, their
      `name` is `pairs` and their `image_size` the run's, unless it says otherwise.

  Raises:
    UserError: no such object, or a name that is missing, taken, or no word.
  """
  config = config.copy_and_resolve_references().unlock()
  for text in texts:
    section = _read_eval(text)
    name = section.pop("name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
      raise UserError(f"--eval={text} has the name {name!r}; it should be a word of letters, digits, - and _")
    if name in config.evals:
      raise UserError(f"--eval={text}: the config has an evaluation {name} already; take another name")
    if isinstance(section.get("data"), dict):
      buckets.check(str(section["data"].get("path", "")))
      section["data"] = {"name": "pairs", "image_size": config.image_size} | section["data"]
    config.evals[name] = section
    config.train_evals = (*config.train_evals, name)
  return config.lock()


def _read_eval(text: str) -> dict[str, Any]:
  example = '{"name": "coco", "task": "retrieval", "data": {"path": "DIR", "split": "test"}}'
  try:
    section = parse_json(text, f"--eval={text}")
  except UserError as error:
    raise UserError(f"{error}; write it as '{example}'") from error
  if not isinstance(section, dict) or not isinstance(section.get("task"), str):
    raise UserError(f"--eval={text} should be an object with a name and a task, such as '{example}'")
  return section
