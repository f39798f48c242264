"""Test how config.json of diffusers and transformers is read and written."""

from __future__ import annotations

import inspect
import json

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPVisionConfig

from diffdis_jax.errors import UserError
from diffdis_jax.interop import sections
from diffdis_jax.models import sizes
from tests import pipelines

SD = sizes.sd_v1().to_dict()


def through_json(config: dict) -> dict:
  return json.loads(json.dumps(config))


def test_written_configs_are_read_back():
  unet = sections.write_unet(SD["unet"], latent_channels=4, context_width=768, sample_size=64)
  assert sections.read_unet(through_json(unet), "here") == SD["unet"]
  vae = sections.write_vae(SD["autoencoder"], scaling_factor=0.18215, sample_size=512)
  assert sections.read_vae(through_json(vae), "here") == SD["autoencoder"]
  not_theirs = ("bos_id", "eos_id", "projection", "token_embedding_weight")
  expected = {name: value for name, value in SD["text_encoder"].items() if name not in not_theirs}
  assert sections.read_text(through_json(sections.write_text(SD["text_encoder"])), "here") == expected
  for schedule in sections.SCHEDULES:
    assert sections.read_scheduler(sections.write_scheduler(schedule), "here") == schedule


def test_libraries_know_every_field_that_is_written():
  config = sections.write_unet(SD["unet"], latent_channels=4, context_width=768, sample_size=64)
  fields = set(dict(UNet2DConditionModel(**pipelines.UNET).config))
  assert set(config) - fields == {"_class_name"}
  config = sections.write_vae(SD["autoencoder"], scaling_factor=0.18215, sample_size=512)
  assert set(config) - set(dict(AutoencoderKL(**pipelines.VAE).config)) == {"_class_name"}
  scheduler = DDIMScheduler.from_config(sections.write_scheduler("linear"))
  assert (scheduler.config.steps_offset, scheduler.config.set_alpha_to_one) == (1, False)
  text = CLIPTextConfig(**sections.write_text(SD["text_encoder"]))
  assert (text.hidden_size, text.num_hidden_layers, text.eos_token_id) == (768, 12, 49407)


def test_the_published_config_of_stable_diffusion_1_is_read():
  """The autoencoder's config of 2022 lacks fields that were added later."""
  config = dict(act_fn="silu", block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512)
  config |= dict(in_channels=3, latent_channels=4, out_channels=3)
  config |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
  assert sections.read_vae(config, "here") == SD["autoencoder"]


def test_a_field_that_is_missing_has_the_librarys_default():
  for library, fixed in (
    (UNet2DConditionModel, sections.FIXED_UNET),
    (AutoencoderKL, sections.FIXED_VAE),
    (DDIMScheduler, sections.FIXED_SCHEDULER | sections.DIFFUSERS_BETAS),
    (CLIPTextConfig, sections.FIXED_TEXT),
    (CLIPVisionConfig, sections.FIXED_VISION),
  ):
    parameters = inspect.signature(library.__init__).parameters
    assert {name: parameters[name].default for name in fixed} == fixed
  assert sections.read_scheduler({"beta_schedule": "squaredcos_cap_v2"}, "here") == "cosine"


@pytest.mark.parametrize(
  "read, changes, message",
  [
    (sections.read_unet, {"act_fn": "mish"}, "act_fn is 'mish'; .* have 'silu'"),
    (sections.read_unet, {"block_out_channels": 320}, "block_out_channels is 320; it should be a value such as"),
    (sections.read_unet, {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
    (sections.read_unet, {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types is"),
    (sections.read_vae, {"latents_mean": [0.0]}, "latents_mean is"),
    (sections.read_text, {"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of quick_gelu, gelu"),
    (sections.read_text, {"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001"),
    (sections.read_vision, {"num_channels": 1}, "num_channels is 1"),
    (sections.read_scheduler, {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
    (sections.read_scheduler, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
    (sections.read_scheduler, sections.BETAS | {"beta_schedule": "linear", "beta_end": 0.02}, "beta_end is 0.02"),
    # The refused values are diffusers' defaults, which no schedule here uses.
    (sections.read_scheduler, {"beta_schedule": "scaled_linear"}, "beta_start is 0.0001; .* have 0.00085"),
    (sections.read_scheduler, {"beta_schedule": "linear", "beta_start": 0.00085}, "beta_end is 0.02; .* have 0.012"),
  ],
)
def test_unsupported_fields_are_refused(read, changes, message):
  with pytest.raises(UserError, match=f"^x/config.json: {message}"):
    read(changes, "x/config.json")
