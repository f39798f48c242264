"""Convert PyTorch checkpoints of Stable Diffusion v1 and CLIP, in all forms in which users share them.

`open_source` finds the tensors of a path and the sizes of their network, `match` assigns each tensor to a parameter,
and `read` reads them one by one, so that at most one of them is in memory twice.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from diffdis_jax.common.params import Params
from diffdis_jax.config.sections import Sampling
from diffdis_jax.errors import UserError
from diffdis_jax.interop import compvis, mapping, openclip, sections, tensor_files
from diffdis_jax.interop.tensor_files import Tensor, Tensors, read_json
from diffdis_jax.models.clip import PIXEL_MEAN, PIXEL_STD

WITH_WEIGHTS = ("unet", "vae", "text_encoder")
PARTS = (*WITH_WEIGHTS, "tokenizer")
# Stable Diffusion's images and its autoencoder's scale, where a checkpoint has no config.json.
IMAGE_SIZE, SCALE = 512, 0.18215
BICUBIC = 3  # Pillow's number for bicubic resizing, which transformers writes


@dataclasses.dataclass(frozen=True)
class Source:
  """The content of a checkpoint."""

  components: dict[str, Tensors]  # unread tensors by component and name, as in mapping.py
  model: dict[str, Any]  # the fields of our config's `model` section that the checkpoint determines
  fields: dict[str, Any]  # other fields of the config by their dotted paths
  tokenizer: pathlib.Path | None = None  # its folder
  others: list[str] = dataclasses.field(default_factory=list)  # tensors that belong to no component

  @property
  def is_clip(self) -> bool:
    return "clip" in self.components


@dataclasses.dataclass(frozen=True)
class Matched:
  """Unread parameters in our layout, the name of each in the checkpoint, and the names that have no parameter."""

  tensors: Tensors
  names: dict[str, str]
  ignored: list[str]


def open_source(path: pathlib.Path) -> Source:
  """Find the tensors of a checkpoint and the sizes of its network. Only config files and headers are read.

  The path is a folder of diffusers, of transformers' CLIPModel or of open_clip, or a file of Stable Diffusion with
  CompVis' names or of open_clip. Raises UserError: it is of another kind, or incomplete.
  """
  if path.is_file():
    return _open_single_file(path)
  if not path.is_dir():
    raise UserError(f"no file or folder {path}; --source names a checkpoint, on the Hugging Face hub hf:ORG/NAME")
  if (kind := check_kind(path)) == "open_clip":
    source = _open_openclip(tensor_files.open_folder(path), path / "open_clip_config.json")
  else:
    source = _open_diffusers(path) if kind == "diffusers" else _open_clip_model(path)
  if (head := path / tensor_files.HEAD).exists():  # the head's classes are not those of a new run
    source.others.extend(f"head/{name}" for name in tensor_files.open_file(head))
  return source


def check_kind(path: pathlib.Path) -> str:
  """Return the library that wrote a folder, diffusers, transformers or open_clip, by its config files.
  Raises UserError: none of these, or a pipeline that is not Stable Diffusion v1."""
  # One part's folder is enough, so that a pipeline without its index gets an error about the index.
  if (path / "model_index.json").exists() or any((path / part).is_dir() for part in PARTS):
    name = read_json(path / "model_index.json").get("_class_name")
    for part in PARTS:
      if not (path / part).is_dir():
        raise UserError(f"{path}, a {name}, has no folder {part}; a Stable Diffusion v1 has {', '.join(PARTS)}")
    _read_configs(path)
    return "diffusers"
  # An exported folder has the configs of both libraries. transformers' goes first, since it states every size.
  if (path / "config.json").exists() and read_json(path / "config.json").get("model_type") == "clip":
    return "transformers"
  if (path / "open_clip_config.json").exists():
    return "open_clip"
  raise UserError(f"{path} has neither a model_index.json of Stable Diffusion nor a config.json of CLIP")


def match(source: Source, network: Mapping[str, jax.ShapeDtypeStruct]) -> Matched:
  """Find the tensors of a network, which is given as shapes by path, in a source. It empties `source.components`.

  Raises UserError: a tensor is missing, has another shape, or holds no floats.
  """
  matched = Matched({}, {}, list(source.others))
  for component, tensors in source.components.items():
    for name in list(tensors):
      # Pop each tensor, since it keeps its file open.
      tensor, entry = tensors.pop(name), mapping.from_name(component, name)
      # Files have buffers without a row in the table, and parts that this network lacks, such as an up path.
      if entry is None or entry.path not in network:
        matched.ignored.append(f"{component}/{name}")
        continue
      # Numbers of 8 bits need their scales; without them they would be meaningless weights.
      if tensor.kind:
        what = f"{component} parameter {entry.name} holds {tensor.kind}, as quantized weights do"
        raise UserError(f"{what}; take a checkpoint in F32, F16 or BF16")
      matched.tensors[entry.path] = _in_our_layout(tensor, entry, network[entry.path].shape)
      matched.names[entry.path] = f"{component}/{name}"

  known = mapping.CLIP if source.is_clip else mapping.DIFFDIS
  there = {*mapping.STATISTICS, *matched.names}
  absent = [mapping.from_path(path, known) for path in network if path not in there]
  if missing := [entry for entry in absent if entry.component in source.components]:
    what = f"{missing[0].component} lacks {len(missing)} of its model's parameters, such as {missing[0].name}"
    raise UserError(f"{what}; its config and its weights should be of one model")
  return matched


def read(matched: Matched) -> Params:
  """Read the parameters in f32. It empties `matched.tensors`, which closes the files."""
  # Copy to C order: a transposed view would keep the array of the file in memory.
  load = lambda path: jnp.asarray(np.array(matched.tensors.pop(path).read(), np.float32, order="C"))
  return {path: load(path) for path in list(matched.tensors)}


def _in_our_layout(tensor: Tensor, entry: mapping.Entry, shape: tuple[int, ...]) -> Tensor:
  """Return a tensor in our layout. A 1x1 convolution is reshaped if our parameter is a matrix, or the reverse."""
  expected = entry.shape_in_theirs(shape)
  if [n for n in tensor.shape if n != 1] != [n for n in expected if n != 1]:
    what = f"{entry.component} parameter {entry.name} has shape {tensor.shape} in the checkpoint"
    raise UserError(f"{what}; its model has {expected}")
  # Reshape before transposing: the axes of the table are those of the expected shape.
  return tensor.map(lambda x: entry.to_ours(x.reshape(expected)), shape)


def _read_configs(folder: pathlib.Path) -> dict[str, Any]:
  """Return the `model` section of a diffusers folder, and refuse versions of Stable Diffusion other than 1."""
  files = [folder / part / "config.json" for part in WITH_WEIGHTS]
  unet, vae, text = map(read_json, files)
  model = {
    "unet": sections.read_unet(unet, str(files[0])),
    "autoencoder": sections.read_vae(vae, str(files[1])),
    "text_encoder": sections.read_text(text, str(files[2])),
  }
  # The fields of each part may be valid but not fit the other parts.
  sections.check_widths(unet, model, str(files[0]))
  return model


def _open_diffusers(folder: pathlib.Path) -> Source:
  model = _read_configs(folder)
  factor = model["autoencoder"]["patch"] * 2 ** (len(model["autoencoder"]["widths"]) - 1)
  sample_size = read_json(folder / "unet" / "config.json").get("sample_size")
  fields = {"image_size": sample_size * factor if isinstance(sample_size, int) else IMAGE_SIZE}
  fields["data.max_length"] = _token_length(folder / "tokenizer", model["text_encoder"]["max_length"])
  if (scheduler := folder / "scheduler" / "scheduler_config.json").exists():
    fields["image_diffusion.schedule"] = sections.read_scheduler(read_json(scheduler), str(scheduler))

  components = {part: _canonical(part, tensor_files.open_folder(folder / part)) for part in WITH_WEIGHTS}
  if (folder / "diffdis").is_dir():  # the folder is an export of this package
    components["diffdis"] = tensor_files.open_folder(folder / "diffdis")
    _add_diffdis(folder / "diffdis" / "config.json", model, fields)
    if "conv_out.weight" not in components["unet"]:  # a run of discrimination alone has no up path
      fields["objectives"] = ("discrimination",)
  return Source(components, model, fields, tokenizer=folder / "tokenizer")


def _add_diffdis(path: pathlib.Path, model: dict[str, Any], fields: dict[str, Any]) -> None:
  own = read_json(path)
  try:
    model |= {name: own["model"][name] for name in ("fusion", "share_attention", "modality_ffn", "alignment")}
    model["text_encoder"]["projection"] = own["model"]["text_encoder"]["projection"]
    model["text_encoder"]["token_embedding_weight"] = own["model"]["text_encoder"].get("token_embedding_weight", 0.0)
    fields |= {f"text_diffusion.{name}": own["text_diffusion"][name] for name in ("schedule", "target", "gamma")}
    fields["condition_timestep"] = own["condition_timestep"]
    fields |= {f"inference.{field.name}": own["inference"][field.name] for field in dataclasses.fields(Sampling)}
  except (KeyError, TypeError) as error:
    raise UserError(f"{path} lacks {error}; it should be what export_weights wrote") from error


def _token_length(tokenizer: pathlib.Path, positions: int) -> int:
  config = tokenizer / "tokenizer_config.json"
  length = read_json(config).get("model_max_length") if config.exists() else None
  # Some tokenizers have a huge number or infinity in the place of a limit.
  return int(min(length, positions)) if isinstance(length, int | float) else positions


# Names that older or newer libraries write differently: part -> (regex of their name, replacement of mapping.py).
_SPELLINGS = {
  "text_encoder": ((r"^(?!text_model\.|text_projection\.)", "text_model."),),  # transformers 5 omits the prefix
  "vae": (  # names of diffusers before 0.13
    (r"(attentions\.0\.)(?:(q)uery|(k)ey|(v)alue)\.", r"\1to_\2\3\4."),
    (r"attentions\.0\.proj_attn\.", "attentions.0.to_out.0."),
  ),
}


def _canonical(part: str, tensors: Tensors) -> Tensors:
  for pattern, name in _SPELLINGS.get(part, ()):
    tensors = {re.sub(pattern, name, theirs): tensor for theirs, tensor in tensors.items()}
  return tensors


def _open_single_file(path: pathlib.Path) -> Source:
  tensors = tensor_files.open_file(path)
  has = lambda prefix: any(name.startswith(prefix) for name in tensors)
  if has("visual."):
    return _open_openclip(tensors, path.parent / "open_clip_config.json")
  if any(name.endswith(".kernel") for name in tensors):  # a name of this package
    raise UserError(f"{path} is a run in one file, which takes no import: give it as --workdir or --config.init_from")
  for prefix in compvis.PREFIXES.values():
    if not has(prefix):
      wanted = f"a Stable Diffusion v1 has {', '.join(compvis.PREFIXES.values())}, and open_clip's weights visual."
      raise UserError(f"{path} has no {prefix}*: {wanted}; its tensors: {', '.join(list(tensors)[:3]) or 'none'}")

  components, others = compvis.split(tensors)
  components["text_encoder"] = _canonical("text_encoder", components["text_encoder"])
  with sections.of_shapes(str(path)):
    model = {
      "unet": sections.unet_of(components["unet"]),
      "autoencoder": dict(sections.vae_of(components["vae"]), scale=SCALE),
      # v1's text tower is OpenAI's ViT-L/14. The file does not show which GELU it has.
      "text_encoder": dict(sections.text_of(components["text_encoder"]), activation="quick_gelu"),
    }
    in_channels = components["unet"]["conv_in.weight"].shape[1]
  sections.check_widths({"in_channels": in_channels}, model, str(path))
  fields = {"image_size": IMAGE_SIZE, "data.max_length": model["text_encoder"]["max_length"]}
  return Source(components, model, fields, others=others)


def _open_clip_model(folder: pathlib.Path) -> Source:
  where, config = str(folder / "config.json"), read_json(folder / "config.json")
  if (preprocessor := folder / "preprocessor_config.json").exists():
    how = read_json(preprocessor)
    size = how.get("size")
    squashes = isinstance(size, Mapping) and "shortest_edge" not in size
    is_other = squashes or how.get("resample", BICUBIC) != BICUBIC
    _check_pixels(str(preprocessor), how.get("image_mean"), how.get("image_std"), is_other=is_other)
  projection = config.get("projection_dim", 512)
  if not isinstance(projection, int):
    raise sections.unsupported(where, "projection_dim", projection, "it should be a number such as 512")
  text = sections.read_text(_object(config, "text_config", where), where)
  vision = sections.read_vision(_object(config, "vision_config", where), where)
  tensors = tensor_files.open_folder(folder)
  if openclip.MARK in tensors:  # open_clip's file may be beside transformers' config
    tensors = openclip.convert(tensors)
  length = _token_length(folder, text["max_length"])
  return _clip(tensors, text | {"projection": projection}, vision | {"projection": projection}, length)


def _open_openclip(tensors: Tensors, config: pathlib.Path) -> Source:
  where, model_cfg = "open_clip checkpoint", {}
  if config.exists():
    where, content = str(config), read_json(config)
    model_cfg: Any = content.get("model_cfg")
    openclip.check_config(model_cfg, where)  # before the tensors: the config gives a clearer error
    how = _object(content, "preprocess_cfg", where)
    is_other = (how.get("resize_mode", "shortest"), how.get("interpolation", "bicubic")) != ("shortest", "bicubic")
    _check_pixels(where, how.get("mean"), how.get("std"), is_other=is_other)
  else:
    need = 'OpenAI\'s weights need one with {"model_cfg": {"quick_gelu": true}}'
    logging.warning("no %s, so the activation is gelu, and the heads are those of published towers; %s", config, need)
  tensors = openclip.convert(tensors)
  with sections.of_shapes(where, openclip.SUPPORTED):
    vision = sections.vision_of(tensors)
    text = sections.text_of(tensors) | {"projection": vision["projection"]}
  model = openclip.read_config(model_cfg, {"text_encoder": text, "vision_encoder": vision}, where)
  length = model["text_encoder"]["max_length"]
  # Without a config, a tokenizer in the same folder may belong to something else.
  length = _token_length(config.parent, length) if config.exists() else length
  return _clip(tensors, model["text_encoder"], model["vision_encoder"], length)


def _object(config: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
  """Return a section of a config file, empty if there is none. Raises UserError: it is no object."""
  section = config.get(field) or {}
  if not isinstance(section, Mapping):
    raise sections.unsupported(where, field, section, "it should be an object")
  return section


def _check_pixels(where: str, mean: Any, std: Any, *, is_other: bool) -> None:
  """Raise UserError unless images are normalised by OpenAI's numbers; warn if their resizing `is_other`."""
  for name, numbers, expected in (("mean", mean, PIXEL_MEAN), ("std", std, PIXEL_STD)):
    given = numbers if isinstance(numbers, list) and len(numbers) == 3 else []
    near = [isinstance(x, float | int) and abs(x - y) < 1e-4 for x, y in zip(given, expected, strict=False)]
    if numbers is not None and near != [True] * 3:
      raise sections.unsupported(where, name, numbers, f"only OpenAI's, {expected}, is supported")
  if is_other:
    how = "here the short side is resized and the middle cut out, so that figures differ a little from published ones"
    logging.warning("%s squashes images, or resizes them otherwise than bicubically; %s", where, how)


def _clip(tensors: Tensors, text: dict[str, Any], vision: dict[str, Any], max_length: int) -> Source:
  fields = {"image_size": vision["image_size"], "data.max_length": max_length}
  return Source({"clip": tensors}, {"text_encoder": text, "vision_encoder": vision}, fields)
