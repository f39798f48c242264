"""Write our parameters, without PyTorch, to folders that PyTorch's libraries load.

DiffDis: a StableDiffusionPipeline of diffusers, the component `diffdis` with the parts that DiffDis adds, and the code
of both (torch_pipeline.py, torch_diffdis.py, torch_parts.py). The class of a custom component is in the component's
folder, in the file that model_index.json names.

CLIP: the files of transformers' CLIPModel and of open_clip in one folder, like published ones.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from diffdis_jax.common.params import Params
from diffdis_jax.interop import mapping, openclip, sections, tensor_files
from diffdis_jax.interop.packed import check_written
from diffdis_jax.models.clip import PIXEL_MEAN, PIXEL_STD, resize_positions
from diffdis_jax.structs import AnyArray

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The version of diffusers that has this layout; every later version reads it.
VERSION = {"_diffusers_version": "0.35.0"}
FILES = {part: f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae", "diffdis")}
FILES |= {"text_encoder": "text_encoder/model.safetensors"}
# Files in half precision have the names by which diffusers finds them: from_pretrained(..., variant="fp16").
VARIANTS = {"float32": "", "float16": "fp16", "bfloat16": "bf16"}
PIPELINE = "pipeline.py"  # the name that diffusers expects
INDEX = dict(
  _class_name="StableDiffusionPipeline",
  **VERSION,
  **dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), (None, None)),
  requires_safety_checker=False,
  scheduler=("diffusers", "DDIMScheduler"),
  text_encoder=("transformers", "CLIPTextModel"),
  tokenizer=("transformers", "CLIPTokenizer"),
  unet=("diffusers", "UNet2DConditionModel"),
  vae=("diffusers", "AutoencoderKL"),
)
BEYOND_VAE = ("scheduler", "text_encoder", "tokenizer", "unet")  # the parts that an autoencoder alone lacks
TRANSFORMERS, OPEN_CLIP = "model.safetensors", "open_clip_model.safetensors"
POSITIONS, TEXT_POSITIONS = "vision_encoder.positions", "text_encoder.positions"


def write(folder: pathlib.Path, params: Params, own: Mapping[str, Any], *, dtype: str = "float32") -> None:
  """Write the weights and configs of a pipeline except the tokenizer; of an autoencoder alone it has only `vae`.

  Args:
    folder: an empty folder.
    params: all parameters of a run. The dictionary is emptied, so that they are in memory once.
    own: the content of diffdis/config.json, which is the run's config and `max_length` of its captions.
    dtype: of the files, a key of DTYPES. Raises UserError: values beyond its range.
  """
  # Do this first: it changes two convolutions, and removes the parameters without a row in the table.
  scaling_factor = fold_statistics(params)
  has_unet, is_aligned = "unet.conv_in.kernel" in params, "logit_scale" in params
  own_classes = {}
  if own["model"]["autoencoder"]["patch"] > 1:
    own_classes["vae"] = ("torch_parts", "PatchAutoencoderKL")
  if has_unet and "unet.conv_out.kernel" not in params:  # a run of discrimination alone
    own_classes["unet"] = ("torch_parts", "DownUNet2DConditionModel")
  configs, index = _configs(own, scaling_factor=scaling_factor), dict(INDEX)
  if not has_unet:
    index |= dict.fromkeys(BEYOND_VAE, (None, None))
    configs = {file: content for file, content in configs.items() if file.split("/")[0] not in BEYOND_VAE}
  if is_aligned:
    own_classes["diffdis"] = ("torch_diffdis", "DiffDis")
    configs["diffdis/config.json"] = VERSION | dict(own)

  entries = [mapping.from_path(path) for path in params]
  for component, file in (*FILES.items(), ("head", tensor_files.HEAD)):
    # Pop each array, so that it is in memory once.
    parts = [entry for entry in entries if entry.component == component]
    arrays = {entry.name: convert(entry, params.pop(entry.path), dtype) for entry in parts}
    # Generation alone may have a projection of the text query, which is not used.
    if arrays and (component != "diffdis" or is_aligned):
      path = folder / (file if component == "head" else file_of(component, dtype))
      path.parent.mkdir(exist_ok=True)
      tensor_files.save(arrays, path)

  here = pathlib.Path(__file__)
  for component, (module, name) in own_classes.items():
    index[component] = (module, name)
    configs[f"{component}/config.json"] = {**configs[f"{component}/config.json"], "_class_name": name}
    shutil.copyfile(here.with_name(f"{module}.py"), folder / component / f"{module}.py")
  shutil.copyfile(here.with_name("torch_pipeline.py"), folder / PIPELINE)
  _write_configs(folder, {**configs, "model_index.json": index})


def file_of(component: str, dtype: str) -> str:
  """Return the file of a component's weights, such as unet/diffusion_pytorch_model.fp16.safetensors for float16."""
  return FILES[component].replace(".safetensors", f".{VARIANTS[dtype]}.safetensors").replace("..", ".")


def _configs(own: Mapping[str, Any], *, scaling_factor: float) -> dict[str, Mapping[str, Any]]:
  """Return the configs of diffusers' and transformers' components by their files."""
  model = own["model"]
  folded_size = own["image_size"] // model["autoencoder"]["patch"]
  sample_size = folded_size // 2 ** (len(model["autoencoder"]["widths"]) - 1)
  unet = sections.write_unet(
    model["unet"],
    latent_channels=model["autoencoder"]["latent_channels"],
    context_width=model["text_encoder"]["width"],
    sample_size=sample_size,
  )
  vae = sections.write_vae(model["autoencoder"], scaling_factor=scaling_factor, sample_size=folded_size)
  return {
    "scheduler/scheduler_config.json": sections.write_scheduler(own["image_diffusion"]["schedule"]) | VERSION,
    "unet/config.json": VERSION | unet,
    "vae/config.json": VERSION | vae,
    # The default dtype: without it transformers 5 would use the dtype of the file, but diffusers float32.
    "text_encoder/config.json": sections.write_text(model["text_encoder"]) | {"torch_dtype": "float32"},
  }


def _write_configs(folder: pathlib.Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
  """Write JSON files, given by their path in the folder."""
  for file, content in configs.items():
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_clip(model: Mapping[str, Any]) -> None:
  """Raise UserError for a CLIP that transformers or open_clip cannot represent."""
  text, vision = model["text_encoder"], model["vision_encoder"]
  wanted = {
    "vision_encoder.spatial_pool": (vision.get("spatial_pool", 0), 0),
    "vision_encoder.tower": (vision.get("tower", "transformer"), "transformer"),
    "text_encoder.token_embedding_weight": (text.get("token_embedding_weight", 0.0), 0.0),
    # transformers has an activation for each tower, but open_clip's switch `quick_gelu` is for both.
    "text_encoder.activation": (text["activation"], vision["activation"]),
    # In open_clip, the largest token is the end of a text.
    "text_encoder.eos_id": (text["eos_id"], text["vocab_size"] - 1),
  }
  for field, (value, supported) in wanted.items():
    if value != supported:
      why = f"transformers and open_clip hold such a CLIP only with {supported!r}"
      raise sections.unsupported("the run's config", f"model.{field}", value, why)


def write_clip(folder: pathlib.Path, params: Params, own: Mapping[str, Any], *, dtype: str = "float32") -> None:
  """Write the weights and configs of transformers' CLIPModel and of open_clip, except the tokenizer.

  Args:
    folder: an empty folder.
    params: all of a run's parameters.
    own: the run's config, which `check_clip` has accepted, and `max_length` of its captions. Position embeddings for
      images of another size are interpolated; those of text beyond `max_length`, never trained, are left out.
    dtype: of the files, a key of DTYPES. Raises UserError: values beyond its range.
  """
  image_size, max_length = own["image_size"], own["max_length"]
  side = image_size // own["model"]["vision_encoder"]["patch"]
  vision = {**own["model"]["vision_encoder"], "image_size": image_size}
  text = {**own["model"]["text_encoder"], "max_length": max_length}
  positions = resize_positions(jnp.asarray(params[POSITIONS]), rows=side, columns=side)
  params = {**params, POSITIONS: positions, TEXT_POSITIONS: params[TEXT_POSITIONS][:max_length]}
  arrays: dict[str, dict[str, Any]] = {"clip": {}, "head": {}}
  for entry in (mapping.from_path(path, mapping.CLIP) for path in params):
    arrays[entry.component][entry.name] = convert(entry, params[entry.path], dtype)
  # The head has its own file: transformers and open_clip have no place for it, and warn of unknown names.
  if arrays["head"]:
    tensor_files.save(arrays["head"], folder / tensor_files.HEAD)
  tensor_files.save(arrays["clip"], folder / TRANSFORMERS)
  # f32, since bf16 would change its exponential by up to 1.6 %. Not so for transformers, some versions of which use the
  # first parameter's dtype for all.
  arrays["clip"]["logit_scale"] = np.asarray(params["logit_scale"], np.float32)
  tensor_files.save(openclip.restore(arrays["clip"]), folder / OPEN_CLIP)
  # transformers' CLIPImageProcessor resizes the short side, bicubic, and crops the central square.
  preprocessor = dict(
    image_processor_type="CLIPImageProcessor",
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    size=dict(shortest_edge=image_size),
    resample=3,
    crop_size=dict(height=image_size, width=image_size),
    rescale_factor=1 / 255,
    image_mean=PIXEL_MEAN,
    image_std=PIXEL_STD,
  )
  # Configs are written last: no library loads an interrupted export, which lacks them.
  configs = {
    "config.json": sections.write_clip(text, vision),
    "preprocessor_config.json": preprocessor,
    "open_clip_config.json": openclip.write_config({"text_encoder": text, "vision_encoder": vision}),
  }
  _write_configs(folder, configs)


def fold_statistics(params: Params) -> float:
  """Fold the latents' shift and scale into the autoencoder's convolutions, and return diffusers' scaling factor.

  Our z is (latent - shift) · scale, by channel. diffusers' z is latent' · s, with one s for all channels. So latent' is
  (latent - shift) · r with r = scale / s, which the two 1x1 convolutions beside the latent can absorb exactly, and
  log-variances grow by 2 log r. If the shift is 0 and all scales are equal, as in Stable Diffusion, nothing changes.
  """
  shift, scale = (np.asarray(params.pop(path), np.float64) for path in mapping.STATISTICS)
  if (scale == scale[0]).all() and (shift == 0).all():
    return float(str(np.float32(scale[0])))  # 0.18215, and not its f32 value 0.18215000629
  # Any s is possible; the geometric mean keeps each r near 1.
  factor = float(np.exp(np.log(scale).mean()))
  r = scale / factor

  # The encoder's last convolution has 2c outputs: the means are shifted and scaled, the log-variances only shifted.
  ones, zeros = np.ones_like(r), np.zeros_like(r)
  kernel, bias = (np.asarray(params[f"autoencoder.quant.{part}"], np.float64) for part in ("kernel", "bias"))
  bias = (bias - np.concatenate([shift, zeros])) * np.concatenate([r, ones]) + np.concatenate([zeros, 2 * np.log(r)])
  params["autoencoder.quant.kernel"] = (kernel * np.concatenate([r, ones])).astype(np.float32)
  params["autoencoder.quant.bias"] = bias.astype(np.float32)
  # The decoder's first convolution undoes both: latent = latent' / r + shift.
  kernel, bias = (np.asarray(params[f"autoencoder.post_quant.{part}"], np.float64) for part in ("kernel", "bias"))
  params["autoencoder.post_quant.kernel"] = (kernel / r[:, None]).astype(np.float32)
  params["autoencoder.post_quant.bias"] = (bias + shift @ kernel[0, 0]).astype(np.float32)
  return factor


def convert(entry: mapping.Entry, value: np.floating | Float[AnyArray, "..."], dtype: str) -> np.ndarray:
  """Copy a parameter to PyTorch's layout and this dtype."""
  with np.errstate(over="ignore"):
    # Half precision may overflow silently; the result is checked below.
    array = np.array(entry.to_theirs(np.asarray(value)), DTYPES[dtype], order="C")
  check_written(entry.path, np.asarray(value), array)
  return array
