"""Make open_clip's CLIP of the same sizes as ours, and its parameters in our layout."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from ml_collections import ConfigDict
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from diffdis_jax.interop import mapping, openclip
from diffdis_jax.interop.tensor_files import Tensor


def make(model: ConfigDict) -> CLIP:
  """Make the open_clip model of a config's `model` section, with new parameters."""
  config = openclip.write_config(model.to_dict())["model_cfg"]
  vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
  return CLIP(config["embed_dim"], vision, text, quick_gelu=config["quick_gelu"])


def to_ours(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
  """Return named parameters or gradients by our paths and in our layout."""
  arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
  unread = {name: Tensor(x.shape, lambda x=x: x) for name, x in arrays.items()}
  params = {}
  for name, tensor in openclip.convert(unread).items():
    entry = mapping.from_name("clip", name)
    assert entry is not None, name
    params[entry.path] = np.array(entry.to_ours(tensor.read()))
  return params


def to_theirs(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Invert `to_ours`; open_clip has q, k and v in one array."""
  entries = {path: mapping.from_path(path, mapping.CLIP) for path in params}
  return openclip.restore({entry.name: entry.to_theirs(np.asarray(params[path])) for path, entry in entries.items()})
