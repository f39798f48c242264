"""Sizes of the network: `sd_v1` is the paper's, the others are the same code with smaller numbers."""

from ml_collections import ConfigDict

TEMPERATURE = 1 / 0.07  # CLIP's τ at the start


def sd_v1() -> ConfigDict:
  """Stable Diffusion v1 with CLIP ViT-L/14's text tower: 859,520,964 + 83,653,863 + 123,060,480 parameters."""
  return ConfigDict(
    dict(
      fusion=True,
      share_attention=True,
      modality_ffn=True,
      query_init=1.0,
      temperature=TEMPERATURE,
      dtype="bfloat16",
      matmul_precision="auto",
      attention_kernel="auto",
      remat="none",
      unet=dict(
        widths=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        depth=2,
        num_heads=8,
        groups=32,
      ),
      alignment=dict(width=768, depth=6, num_heads=12, spatial_pool=0),
      text_encoder=dict(
        vocab_size=49408,
        max_length=77,
        width=768,
        depth=12,
        num_heads=12,
        mlp_width=3072,
        activation="quick_gelu",
        bos_id=49406,
        eos_id=49407,
        projection=0,
        token_embedding_weight=0.0,
      ),
      autoencoder=dict(
        widths=(128, 256, 512, 512),
        depth=2,
        patch=1,
        latent_channels=4,
        groups=32,
        attention=True,
        shift=0.0,
        scale=0.18215,
      ),
    )
  )


def small() -> ConfigDict:
  """A few million parameters, f32, for 32 px images on a CPU."""
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
  """For 32 px images with detail, still on a CPU: finer latents (16 x 16) and a third level."""
  model = small()
  model.unet.update(widths=(32, 64, 128), attention=(False, True, True))
  model.alignment.update(width=128, depth=2)
  model.text_encoder.update(width=128, mlp_width=512)
  model.autoencoder.update(widths=(24, 48), patch=1, latent_channels=4)
  return model


def clip_vit_l14() -> ConfigDict:
  """The CLIP baseline of the paper's Table 1, ViT-L/14: 303,966,208 + 123,650,304 + 1 parameters, as OpenAI's."""
  return ConfigDict(
    dict(
      temperature=TEMPERATURE,
      dtype="bfloat16",
      matmul_precision="auto",
      attention_kernel="auto",
      remat="none",
      text_encoder=dict(sd_v1().text_encoder, projection=768),
      vision_encoder=dict(
        image_size=224,
        patch=14,
        width=1024,
        depth=24,
        num_heads=16,
        mlp_width=4096,
        activation="quick_gelu",
        projection=768,
      ),
    )
  )


def clip_vit_b32() -> ConfigDict:
  """The smaller CLIP baseline of Table 1, ViT-B/32: 87,849,216 + 63,428,096 + 1 parameters."""
  model = clip_vit_l14()
  model.text_encoder.update(width=512, num_heads=8, mlp_width=2048, projection=512)
  model.vision_encoder.update(patch=32, width=768, depth=12, num_heads=12, mlp_width=3072, projection=512)
  return model


def clip_small() -> ConfigDict:
  """A CLIP of a few million parameters, f32, for 32 px images on a CPU; its text tower is that of `small`."""
  model = clip_vit_b32()
  model.dtype = "float32"
  model.text_encoder.update(small().text_encoder, projection=96)
  model.vision_encoder.update(image_size=32, patch=8, width=96, depth=2, num_heads=4, mlp_width=384, projection=96)
  return model


def clip_medium() -> ConfigDict:
  """With the text tower of `medium`, and smaller patches."""
  model = clip_small()
  model.text_encoder.update(medium().text_encoder, projection=128)
  model.vision_encoder.update(patch=4, width=128, depth=4, mlp_width=512, projection=128)
  return model
