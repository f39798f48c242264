"""The sizes of networks: `sd_v1` is the paper's, and the others are smaller sizes for the same code."""

import dataclasses

from ml_collections import ConfigDict

from diffdis_jax.config.model import ClipModel, Model


def sd_v1() -> ConfigDict:
  """Return Stable Diffusion v1 with CLIP ViT-L/14's text tower: 859,520,964 + 83,653,863 + 123,060,480 parameters."""
  return _section_of(Model())


def small() -> ConfigDict:
  """Return a network of a few million parameters, f32, for 32 px images on a CPU."""
  model = sd_v1()
  model.dtype = "float32"
  model.unet.update(widths=(32, 64), attention=(True, True), depth=1, num_heads=4, groups=8)
  model.alignment.update(width=96, depth=2, num_heads=4)
  model.text_encoder.update(max_length=16, width=96, depth=2, num_heads=4, mlp_width=384)
  model.autoencoder.update(
    widths=(64,), depth=1, patch=4, latent_channels=8, groups=8, attention=False, shift=0.0, scale=1.0
  )
  return model


def medium() -> ConfigDict:
  """Return a network for detailed 32 px images on a CPU, with finer latents (16 x 16) and a third level."""
  model = small()
  model.unet.update(widths=(32, 64, 128), attention=(False, True, True))
  model.alignment.update(width=128, depth=2)
  model.text_encoder.update(width=128, mlp_width=512)
  model.autoencoder.update(widths=(24, 48), patch=1, latent_channels=4)
  return model


def clip_vit_l14() -> ConfigDict:
  """Return the CLIP baseline of the paper's Table 1, ViT-L/14: 303,966,208 + 123,650,304 + 1 parameters, as
  OpenAI's."""
  return _section_of(ClipModel())


def clip_vit_b32() -> ConfigDict:
  """Return the smaller CLIP baseline of Table 1, ViT-B/32: 87,849,216 + 63,428,096 + 1 parameters."""
  model = clip_vit_l14()
  model.text_encoder.update(width=512, num_heads=8, mlp_width=2048, projection=512)
  model.vision_encoder.update(patch=32, width=768, depth=12, num_heads=12, mlp_width=3072, projection=512)
  return model


def clip_small() -> ConfigDict:
  """Return a CLIP model of a few million parameters, f32, for 32 px images on a CPU; its text tower is that of
  `small`."""
  model = clip_vit_b32()
  model.dtype = "float32"
  model.text_encoder.update(small().text_encoder, projection=96)
  model.vision_encoder.update(image_size=32, patch=8, width=96, depth=2, num_heads=4, mlp_width=384, projection=96)
  return model


def clip_medium() -> ConfigDict:
  """Return a CLIP model with the text tower of `medium`, and smaller patches."""
  model = clip_small()
  model.text_encoder.update(medium().text_encoder, projection=128)
  model.vision_encoder.update(patch=4, width=128, depth=4, mlp_width=512, projection=128)
  return model


def _section_of(model: Model | ClipModel) -> ConfigDict:
  """Return a model's section without the fields of few runs: a long-tailed run's head, an extension's text stream."""
  few = ("head", "text_stream")
  return ConfigDict({name: value for name, value in dataclasses.asdict(model).items() if name not in few})
