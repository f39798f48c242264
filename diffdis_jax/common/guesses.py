"""Guess what an unknown name was meant for: misspellings, and names that other projects use."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diffdis_jax.errors import UserError

MOST_LISTED = 12  # a message lists up to this many names one by one, and otherwise those of a section
# Common names, and the fields and flags (with --) that they mean here. The first that exists is suggested.
_COMMON = """
lr learning_rate = optim.rates.new
epochs num_train_epochs = num_steps --epochs
steps max_steps max_train_steps = num_steps --steps --query_steps
train_batch_size = batch_size --batch_size
wandb report_to = --tracker
precision mixed_precision = model.dtype --dtype
grad_accum gradient_accumulation_steps = optim.accumulate
gradient_checkpointing = model.remat
max_grad_norm = optim.clip_norm
ema = optim.ema_decay --ema
lr_warmup_steps = optim.warmup_steps
lr_scheduler = optim.schedule_kind
resume ckpt checkpoint = --workdir
pretrained = init_from --workdir
output_dir = --out --workdir
resolution = image_size --image_size
guidance_scale = --guidance inference.generation_guidance
num_inference_steps = --steps --generation_steps inference.generation_steps
num_samples = --num_images
"""
_TARGETS = {
  name: targets.split()
  for names, targets in (line.split(" = ") for line in _COMMON.strip().splitlines())
  for name in names.split()
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Suggest the nearest of the known names, or list them all."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  return _ask(near) if near else f"known: {', '.join(known) or 'none'}"


def check_key(config: Mapping[str, Any], key: str, flags: Collection[str] = ()) -> None:
  """Raise UserError unless a key names a field, an element of one such as `a.b[0]`, or a section."""
  known = fields_of(config)
  if key.split("[")[0] not in {*known, *_sections(known)}:
    raise UserError(f"unknown config key {key}; {guess_field(key, known, flags)}")


def guess_field(key: str, known: Collection[str], flags: Collection[str] = ()) -> str:
  """Suggest which of the known fields, or of the command's flags, a config key may mean, or list the fields near it."""
  section, _, leaf = key.rpartition(".")
  near = [section] if section in known else _same(leaf, known, flags)  # a field has no subfields
  paths, leaves = {path: path for path in [*known, *_sections(known)]}, {path.split(".")[-1]: path for path in known}
  for name, candidates in ((key, paths), (leaf, leaves)):
    near = near or [candidates[x] for x in difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)]
  if near:
    return _ask(near)
  prefix = f"{section}." if section in _sections(known) else ""
  inside = {prefix + path[len(prefix) :].split(".")[0] for path in known if path.startswith(prefix)}
  return f"known: {', '.join(sorted(known if len(known) <= MOST_LISTED else inside))}"


def guess_flag(name: str, flags: Collection[str], fields: Collection[str]) -> str:
  """Suggest which flag an unknown one may mean; `fields` are those that --config.a.b=value sets."""
  near = _same(name, fields, flags, flags_first=True)
  near = near or [f"--{flag}" for flag in difflib.get_close_matches(name, flags, n=1)]
  return _ask(path if path.startswith("--") else f"--config.{path}" for path in near) if near else "see --help"


def fields_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return a config's fields by their dotted paths. A section without fields is an entry itself."""
  fields: dict[str, Any] = {}
  for key, value in config.items():
    is_section = isinstance(value, Mapping) and value
    fields |= fields_of(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
  return fields


def _sections(known: Iterable[str]) -> set[str]:
  return {".".join(path.split(".")[:n]) for path in known for n in range(1, path.count(".") + 1)}


def _same(leaf: str, fields: Collection[str], flags: Collection[str], *, flags_first: bool = False) -> list[str]:
  """Return what a common name of other projects means here, or else up to three fields of this very name with the
  fewest sections above them."""
  targets = _TARGETS.get(leaf.lower().replace("-", "_"), [])
  if "optim.rates.new" in targets:  # each config has its own groups
    targets = [path for path in fields if path.startswith("optim.rates.")]
  known = [target for target in targets if target in fields or target.removeprefix("--") in {*flags}]
  if known:
    return sorted(known, key=lambda target: target.startswith("--") != flags_first)[:1]
  same = [path for path in fields if path.split(".")[-1] == leaf]
  return [path for path in same if path.count(".") == min(other.count(".") for other in same)][:3]


def _ask(names: Iterable[str]) -> str:
  return f"did you mean {' or '.join(names)}?"
