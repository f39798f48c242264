"""Test that shipped configs have the parameters, optimizer groups and partitions of their golden listings.

After a deliberate change, write the listings again, and review the difference:

  python -m tests.test_configs
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

import configs
from diffdis_jax.config import Run
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.errors import UserError
from diffdis_jax.evals import suites
from diffdis_jax.evals import tasks as evals
from diffdis_jax.method import schedules
from diffdis_jax.parallel import sharding
from tests.steps import build_trainer

pytest_plugins = ("tests.bucket_server",)
GOLDEN = pathlib.Path(__file__).parent / "golden"
NOT_ONE_MODEL = {"__init__", "common", "own", "table6"}  # own needs a data set
NAMES = sorted(path.stem for path in pathlib.Path(configs.__path__[0]).glob("*.py") if path.stem not in NOT_ONE_MODEL)
# Arguments of each config that change parameters, groups or partitions.
ARGS = {
  "clip_cc3m": ("model=vit_l14", "runlocal"),
  "diffdis_cc3m": (
    "objectives=generation",
    "objectives=discrimination",
    "fusion=False",
    "share_attention=False",
    "modality_ffn=False",
    "runlocal",
  ),
  "places_lt": ("stage=2", "backbone=clip", "stage=2,backbone=clip"),
  "shapes": ("autoencoder", "objectives=contrastive"),
}
CASES = [(name, arg) for name in NAMES for arg in ("", *ARGS.get(name, ()))]
LISTED = [
  *(("diffdis_cc3m", arg) for arg in ("", "runlocal")),
  ("clip_cc3m", "model=vit_l14"),
  *(("places_lt", arg) for arg in ("", "stage=2")),
  ("shapes", ""),
]


def get_config(name: str, arg: str = "") -> ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(arg)


@functools.cache
def listing(name: str, arg: str) -> list[str]:
  """Return a line for each parameter, path dtype[shape] group (axes), on a mesh with two devices on each axis."""
  step = build_trainer(get_config(name, arg), sharding.make_mesh(data=2, fsdp=2, tensor=2))
  axes = lambda path: ",".join(axis or "-" for axis in step.param_shardings[path].spec)
  return [
    f"{path} {leaf.dtype.name}[{','.join(map(str, leaf.shape))}] {step.groups[path]} ({axes(path)})"
    for path, leaf in step.shapes.items()
  ]


def golden_file(name: str, arg: str) -> pathlib.Path:
  return GOLDEN / (f"{name}.{arg}.txt" if arg else f"{name}.txt")


@pytest.mark.parametrize("name, arg", LISTED)
def test_parameters_equal_the_golden_listing(name, arg):
  expected, actual = golden_file(name, arg).read_text().splitlines(), listing(name, arg)
  differing = sorted(set(expected) ^ set(actual))
  assert not differing, f"{len(differing)} lines differ; if they should, run python -m tests.test_configs"
  assert actual == expected


@pytest.mark.parametrize(
  "arg, changes",
  [
    ("gamma=1.0,target=noise", {"text_diffusion.gamma": 1.0, "text_diffusion.target": "noise"}),
    ("schedule=scaled_linear", {"text_diffusion.schedule": "scaled_linear"}),
    ("fusion=False", {"model.fusion": False}),
    ("share_attention=False", {"model.share_attention": False}),
    ("modality_ffn=False", {"model.modality_ffn": False}),
    ("condition_timestep=0", {"condition_timestep": 0}),
    ("objectives=generation", {"objectives": ("generation",)}),
    ("objectives=discrimination", {"objectives": ("discrimination",)}),
    ("path=somewhere", {"data.path": "somewhere"}),
    ("latents=somewhere", {"data.path": "somewhere", "data.name": "latents"}),
  ],
)
def test_an_argument_changes_its_own_fields_alone(arg, changes):
  default, ablation = flat(get_config("diffdis_cc3m")), flat(get_config("diffdis_cc3m", arg))
  assert default.keys() == ablation.keys()
  assert {key: value for key, value in ablation.items() if value != default[key]} == changes
  schedules.noise_schedule(ablation["text_diffusion.schedule"])


def test_the_papers_run_evaluates_the_sets_that_arguments_name():
  config = get_config("diffdis_cc3m", "imagenet=I,imagenet_names=names.json,coco=C,flickr=F")
  assert config.train_evals == ("coco", "flickr", "imagenet") == tuple(config.evals)
  for name, path, split in (("imagenet", "I", "val"), ("coco", "C", "test"), ("flickr", "F", "test")):
    assert config.evals[name].data.to_dict() == dict(name="pairs", path=path, split=split, image_size=256)
    with pytest.raises(UserError, match=f"no prepared data set in '{path}'|from names.json"):
      evals.create(**config.evals[name].to_dict())  # its settings are known; the folder is not there
  imagenet = config.evals.imagenet
  assert (imagenet.classnames, imagenet.label_field, imagenet.num_images) == ("names.json", "label", 5000)
  assert get_config("diffdis_cc3m", "imagenet=I").evals.imagenet.label_field == "caption"
  assert get_config("diffdis_cc3m").train_evals == () and not get_config("diffdis_cc3m").evals
  fid = get_config("diffdis_cc3m", "objectives=generation,fid=C,inception=W").evals.fid
  assert (fid.inception, fid.num_images, fid.data.split, fid.reference) == ("W", 1000, "val", "")
  with pytest.raises(UserError, match="no file W"):
    evals.create(**fid.to_dict())
  # The prompts equal the suite's, so that a run's curve agrees with `evaluate --suite`.
  assert imagenet.templates == class_lists.load()["imagenet1k"].templates and len(imagenet.templates) == 80
  assert imagenet.single_template == suites.SINGLE_TEMPLATE
  held_out = get_config("diffdis_cc3m", "held_out=H").evals.held_out
  assert (held_out.task, held_out.data.path, held_out.data.split) == ("held_out_loss", "H", "val")
  toy = get_config("diffdis_cc3m", "runlocal,coco=C")
  assert toy.train_evals == ("coco",) and toy.evals.coco.data.image_size == toy.image_size == 32


@pytest.mark.parametrize(
  "name, arg, message",
  [
    ("diffdis_cc3m", "objectives=generation,coco=C", "imagenet, coco and flickr measure discrimination"),
    ("diffdis_cc3m", "imagenet_names=F.json", "imagenet_names has no effect without imagenet"),
    ("diffdis_cc3m", "objectives=discrimination,fid=C,inception=W", "fid measures generation"),
    ("diffdis_cc3m", "fid=C", "fid=DIR and inception=FILE go together"),
    ("diffdis_cc3m", "latents=somewhere,path=elsewhere", "latents=DIR stands in the place of path=DIR; leave out one"),
    ("diffdis_cc3m", "runlocal,latents=somewhere", "runlocal has a small network"),
    ("clip_cc3m", "model=rn50", "argument model=rn50 should be"),
    ("shapes", "objectives=x", "argument objectives=x should be"),
    ("places_lt", "set=x", "argument set=x should be"),
    ("places_lt", "stage=3", "argument stage=3 should be"),
  ],
)
def test_wrong_arguments_are_refused(name, arg, message):
  with pytest.raises(ValueError, match=message):
    get_config(name, arg)


@pytest.mark.parametrize("model, parameters", [("vit_b32", 151_277_313), ("vit_l14", 427_616_513)])
@pytest.mark.parametrize("recipe", ["paper", "openclip"])
def test_the_four_clip_baselines_share_their_schedule(model, parameters, recipe):
  config = get_config("clip_cc3m", f"model={model},recipe={recipe},path=somewhere")
  step = build_trainer(config, sharding.make_mesh(data=8, fsdp=1, tensor=1))
  assert sum(math.prod(leaf.shape) for leaf in step.shapes.values()) == parameters
  assert (config.batch_size, config.num_steps, config.optim.rates.new, config.optim.weight_decay) == (
    1024,
    56_756,
    1e-3,
    0.1,
  )
  assert -(-config.num_steps // config.eval_every) == 20 and config.eval_every % config.save_every == 0
  augmentation = Run.of(config).data.augment
  assert bool(augmentation.randaugment_operations) == (recipe == "paper") and not augmentation.flip
  assert {config.model.text_encoder.activation, config.model.vision_encoder.activation} == {"gelu"}


@pytest.mark.parametrize("arg", ["backbone=diffdis", "backbone=clip"])
def test_long_tailed_runs_have_the_rates_of_vl_ltr(arg):
  first, second = (get_config("places_lt", f"stage={stage},{arg}") for stage in (1, 2))
  assert (first.batch_size, first.num_steps, first.optim.epoch_steps, first.optim.warmup_steps) == (1024, 3050, 61, 305)
  assert (first.optim.rates.backbone, first.optim.warmup_rate, first.optim.weight_decay) == (1e-5, 1e-6, 0.05)
  assert second.optim.rates.to_dict() == dict(visual=5e-5, language=1e-6) and second.optim.warmup_steps == 0
  assert second.model.head.to_dict() == dict(classes=365, anchors=64)
  augmentation = Run.of(first).data.augment
  assert (augmentation.crop_scale, augmentation.flip, augmentation.erase) == ((0.08, 1.0), True, 0.25)
  assert get_config("places_lt", "set=imagenet").optim.rates.backbone == 3.5e-5
  imagenet = get_config("places_lt", "stage=2,set=imagenet")
  assert imagenet.optim.rates.visual == 1e-3 and imagenet.model.head.classes == 1000
  # All parameters decay, also the scalar logit_scale, except one-dimensional ones.
  for config in (first, second):
    step = build_trainer(config, sharding.make_mesh(data=8, fsdp=1, tensor=1))
    for path in step.trainable:
      assert bool(re.search(config.optim.no_decay, path)) == (len(step.shapes[path].shape) == 1), path


def test_a_long_tailed_run_takes_the_network_of_its_start(tmp_path):
  clip = get_config("shapes", "objectives=contrastive")
  (tmp_path / "config.json").write_text(json.dumps(clip.to_dict()))
  config = get_config("places_lt", f"init={tmp_path}")
  # The start computes in float32 without rematerialisation; batches of 1024 would not fit so.
  assert config.model.to_dict() == clip.model.to_dict() | {"dtype": "bfloat16", "remat": "full"}
  assert config.init_from == str(tmp_path)
  assert (config.image_size, config.evals.test.data.image_size, config.data.max_length) == (32, 32, 16)
  message = "init=nowhere should be the workdir of a run: no folder nowhere; give the folder of a training run$"
  with pytest.raises(ValueError, match=message):
    get_config("places_lt", "init=nowhere")
  (tmp_path / "config.json").write_text('{"objectives": [], "model": {}, "data": {}, "optim": {}}')
  with pytest.raises(ValueError, match=f"init={tmp_path} should be the workdir of a run: KeyError"):
    get_config("places_lt", f"init={tmp_path}")


def test_a_long_tailed_run_of_clip_starts_from_a_clip(tmp_path):
  """Otherwise DiffDis would be trained, and its results would be reported as CLIP's."""
  for objectives, is_clip in (("", False), ("objectives=contrastive", True)):
    (tmp_path / "config.json").write_text(json.dumps(get_config("shapes", objectives).to_dict()))
    if is_clip:
      assert "vision_encoder" in get_config("places_lt", f"backbone=clip,init={tmp_path}").model
    else:
      with pytest.raises(ValueError, match=f"backbone=clip: init={tmp_path} is a run of DiffDis; give one of CLIP"):
        get_config("places_lt", f"backbone=clip,init={tmp_path}")


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  leaves = {}
  for key, value in config.items():
    leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
  return leaves


def test_configs_do_not_import_jax():
  code = "; ".join(["import sys", *(f"import configs.{name} as c; c.get_config()" for name in NAMES)])
  assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('jax' in sys.modules)"]).returncode == 0


def write() -> None:
  GOLDEN.mkdir(exist_ok=True)
  for path in GOLDEN.iterdir():
    path.unlink()
  for case in LISTED:
    golden_file(*case).write_text("".join(f"{line}\n" for line in listing(*case)))


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  write()
