"""Writes our parameters to a folder that diffusers loads, without PyTorch: a StableDiffusionPipeline, and beside it the
component `diffdis` with what DiffDis adds, and the code of both (torch_pipeline.py, torch_diffdis.py, torch_parts.py).

diffusers' custom components have their class in their own folder, in the file that model_index.json names.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from diffdis_jax.common.one_file import check_written
from diffdis_jax.common.params import Params
from diffdis_jax.common.progress import Progress
from diffdis_jax.interop import mapping, sections, tensor_files
from diffdis_jax.structs import AnyArray

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Of the library whose layout this is; every later version reads it.
VERSION = {"_diffusers_version": "0.35.0"}
FILES = {
  "unet": "unet/diffusion_pytorch_model.safetensors",
  "vae": "vae/diffusion_pytorch_model.safetensors",
  "text_encoder": "text_encoder/model.safetensors",
  "diffdis": "diffdis/diffusion_pytorch_model.safetensors",
}
PIPELINE = "pipeline.py"  # as diffusers calls it
INDEX = dict(
  _class_name="StableDiffusionPipeline",
  **VERSION,
  feature_extractor=(None, None),
  image_encoder=(None, None),
  requires_safety_checker=False,
  safety_checker=(None, None),
  scheduler=("diffusers", "DDIMScheduler"),
  text_encoder=("transformers", "CLIPTextModel"),
  tokenizer=("transformers", "CLIPTokenizer"),
  unet=("diffusers", "UNet2DConditionModel"),
  vae=("diffusers", "AutoencoderKL"),
)
# What a run of an autoencoder alone has not.
BEYOND_VAE = ("scheduler", "text_encoder", "tokenizer", "unet")


def write(
  folder: pathlib.Path,
  params: Params,
  *,
  model: Mapping[str, Any],
  image_size: int,
  schedule: str,
  diffdis: Mapping[str, Any],
  dtype: str = "float32",
) -> None:
  """Write weights and configs of the pipeline, its tokenizer excepted; of an autoencoder alone one with `vae` alone.

  Args:
    folder: empty.
    params: all of a run's parameters; used up, so that they are in memory once.
    model: the config's section.
    image_size: of the run's images.
    schedule: of the image process.
    diffdis: content of diffdis/config.json, written if the run has the parameters that it is about.
    dtype: of the files, a key of DTYPES.

  Raises:
    UserError: values beyond the dtype's range.
  """
  # First, since it changes two convolutions, and takes away the parameters that the table has no row for.
  scaling_factor = fold_statistics(params)
  has_unet = "unet.conv_in.kernel" in params
  configs = _configs(model, image_size=image_size, schedule=schedule, scaling_factor=scaling_factor)
  index: dict[str, Any] = dict(INDEX)
  if not has_unet:
    index |= dict.fromkeys(BEYOND_VAE, (None, None))
    configs = {file: content for file, content in configs.items() if file.split("/")[0] not in BEYOND_VAE}
  configs["model_index.json"] = index
  entries = [mapping.from_path(path) for path in params]
  is_aligned = "logit_scale" in params
  progress = Progress("converted", len(entries), "arrays")
  own_classes = {}
  if model["autoencoder"]["patch"] > 1:
    own_classes["vae"] = ("torch_parts", "PatchAutoencoderKL")
  if has_unet and "unet.conv_out.kernel" not in params:  # of discrimination alone
    own_classes["unet"] = ("torch_parts", "DownUNet2DConditionModel")
  for component, file in (*FILES.items(), ("head", tensor_files.HEAD)):
    own = [entry for entry in entries if entry.component == component]
    # Of generation alone a projection of the text query may be there, which nothing then uses.
    if own and (component != "diffdis" or is_aligned):
      (folder / file).parent.mkdir(exist_ok=True)
      arrays = {}
      for entry in own:
        # Popped, so that each array is in memory once: converted, or not yet.
        arrays[entry.name] = convert(entry, params.pop(entry.path), dtype)
        progress.add(1)
      tensor_files.save(arrays, folder / file)
      if component == "diffdis":
        own_classes[component] = ("torch_diffdis", "DiffDis")
        configs["diffdis/config.json"] = VERSION | dict(diffdis)

  here = pathlib.Path(__file__)
  for component, (module, name) in own_classes.items():
    index[component] = (module, name)
    configs[f"{component}/config.json"] = {**configs[f"{component}/config.json"], "_class_name": name}
    shutil.copyfile(here.with_name(f"{module}.py"), folder / component / f"{module}.py")
  shutil.copyfile(here.with_name("torch_pipeline.py"), folder / PIPELINE)
  write_configs(folder, configs)


def _configs(
  model: Mapping[str, Any], *, image_size: int, schedule: str, scaling_factor: float
) -> dict[str, Mapping[str, Any]]:
  """Return the configs of diffusers' and transformers' components by their files."""
  folded_size = image_size // model["autoencoder"]["patch"]
  sample_size = folded_size // 2 ** (len(model["autoencoder"]["widths"]) - 1)
  return {
    "scheduler/scheduler_config.json": sections.write_scheduler(schedule) | VERSION,
    "unet/config.json": VERSION
    | sections.write_unet(
      model["unet"],
      latent_channels=model["autoencoder"]["latent_channels"],
      context_width=model["text_encoder"]["width"],
      sample_size=sample_size,
    ),
    "vae/config.json": VERSION
    | sections.write_vae(model["autoencoder"], scaling_factor=scaling_factor, sample_size=folded_size),
    # What it computes in where nobody asks for another: else transformers 5 takes that of its file, and diffusers f32.
    "text_encoder/config.json": sections.write_text(model["text_encoder"]) | {"torch_dtype": "float32"},
  }


def write_configs(folder: pathlib.Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
  """Write JSON files, by their path in the folder."""
  for file, content in configs.items():
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fold_statistics(params: Params) -> float:
  """Take the latents' shift and scale out of the parameters, and return diffusers' scaling factor.

  Ours are z = (latent - shift) · scale, by channel. Diffusers has z = latent' · s with one s for all, so that
  latent' = (latent - shift) · r, r = scale / s: both 1x1 convolutions beside the latent take that in, exactly, and
  log-variances grow by 2 log r. Nothing changes where the shift is 0 and all scales are equal, as in Stable Diffusion.
  """
  shift, scale = (np.asarray(params.pop(path), np.float64) for path in mapping.STATISTICS)
  if (scale == scale[0]).all() and (shift == 0).all():
    return float(str(np.float32(scale[0])))  # 0.18215 as it is written, not as f32 has it: 0.18215000629
  # Which s is taken is free: the geometric mean keeps each r near 1.
  factor = float(np.exp(np.log(scale).mean()))
  r = scale / factor

  # The encoder's last convolution: of its 2c outputs the means are moved and scaled, the log-variances only moved.
  ones, zeros = np.ones_like(r), np.zeros_like(r)
  kernel, bias = (np.asarray(params[f"autoencoder.quant.{part}"], np.float64) for part in ("kernel", "bias"))
  bias = (bias - np.concatenate([shift, zeros])) * np.concatenate([r, ones]) + np.concatenate([zeros, 2 * np.log(r)])
  params["autoencoder.quant.kernel"] = (kernel * np.concatenate([r, ones])).astype(np.float32)
  params["autoencoder.quant.bias"] = bias.astype(np.float32)
  # The decoder's first undoes both: latent = latent' / r + shift.
  kernel, bias = (np.asarray(params[f"autoencoder.post_quant.{part}"], np.float64) for part in ("kernel", "bias"))
  params["autoencoder.post_quant.kernel"] = (kernel / r[:, None]).astype(np.float32)
  params["autoencoder.post_quant.bias"] = (bias + shift @ kernel[0, 0]).astype(np.float32)
  return factor


def convert(entry: mapping.Entry, value: np.floating | Float[AnyArray, "..."], dtype: str) -> np.ndarray:
  """Copy a parameter to their layout and dtype."""
  with np.errstate(over="ignore"):
    # Half precision may overflow without a word; what became of it is looked at below.
    array = np.array(entry.to_theirs(np.asarray(value)), DTYPES[dtype], order="C")
  check_written(entry.path, np.asarray(value), array)
  return array
