"""Two parts of an exported pipeline that diffusers lacks: an autoencoder on patches, and a UNet without its up path.

export_weights copies this file to the folder of such a part. It needs only torch and diffusers.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

SOURCE = pathlib.Path(__file__).read_text(encoding="utf-8")


class PatchAutoencoderKL(AutoencoderKL):
  """AutoencoderKL that first folds patches of pixels into channels, and finally unfolds them.

  Its arguments are AutoencoderKL's; `in_channels` and `out_channels` are 3 p² for patches of p × p pixels.
  """

  source = SOURCE

  @property
  def patch(self) -> int:
    return math.isqrt(self.config["in_channels"] // 3)

  def encode(self, x: Tensor, return_dict: bool = True) -> Any:
    """Return the posterior over the latents of images [b, 3, H, W] in [-1, 1], as AutoencoderKL does."""
    # The pixels of a colour in a patch are adjacent, rows first, as in training.
    return super().encode(F.pixel_unshuffle(x, self.patch), return_dict=return_dict)

  def decode(self, z: Any, return_dict: bool = True, generator: Any = None) -> Any:
    """Decode latents to images [b, 3, H, W], as AutoencoderKL does."""
    (folded,) = super().decode(z, return_dict=False, generator=generator)
    sample = F.pixel_shuffle(folded, self.patch)
    return DecoderOutput(sample=sample) if return_dict else (sample,)


class DownUNet2DConditionModel(UNet2DConditionModel):
  """The down path and the middle of a UNet2DConditionModel, which suffice for discrimination, with its arguments."""

  source = SOURCE

  # `wraps` also copies the signature, from which diffusers reads the fields of config.json.
  @functools.wraps(UNet2DConditionModel.__init__)
  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    del self.up_blocks, self.conv_norm_out, self.conv_act, self.conv_out
