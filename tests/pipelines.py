"""Make a Stable Diffusion in PyTorch with random weights, tiny or at full size, in the form that users have on disk."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffdis_jax import import_weights
from diffdis_jax.data.tokenizer import Tokenizer
from tests.models import from_torch
from tests.once import made_once

LENGTH = 12
# A single-file checkpoint implies 8 heads and 32 groups. The latents of 32 px images are 16 px wide.
UNET = dict(
  block_out_channels=(32, 64),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  cross_attention_dim=64,
  sample_size=16,
)
VAE = dict(
  block_out_channels=(32, 64),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=1,
)
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1)
TEXT |= dict(max_position_embeddings=LENGTH)
SAMPLER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SAMPLER |= dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
PROMPTS = ["a red star", "a very long caption of a blue ring, which is cut before it ends"]


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Return the folder of a tiny Stable Diffusion."""
  make = lambda folder: stable_diffusion(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
  return made_once(tmp_path_factory, "sd", make)


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory, sd: pathlib.Path) -> str:
  """Import that Stable Diffusion, and return the workdir."""
  make = lambda folder: import_weights.import_weights(str(sd), str(folder))
  return str(made_once(tmp_path_factory, "imported", make))


def tokenizer(folder: pathlib.Path, length: int) -> CLIPTokenizer:
  folder.mkdir(parents=True, exist_ok=True)
  Tokenizer(length).save(folder)
  return CLIPTokenizer.from_pretrained(folder)


def stable_diffusion(
  scratch: pathlib.Path, *, unet: dict[str, Any] = UNET, vae: dict[str, Any] = VAE, text: dict[str, Any] = TEXT
) -> StableDiffusionPipeline:
  """Make a pipeline of these sizes, which are tiny by default."""
  modules = dict(
    unet=UNet2DConditionModel(**unet),
    vae=AutoencoderKL(**vae),
    text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
  )
  for seed, module in enumerate(modules.values()):
    from_torch.randomise(module, seed)
  # Give images some contrast, and make them neither black nor white.
  with torch.no_grad():
    modules["vae"].decoder.conv_out.weight *= 0.3
  return StableDiffusionPipeline(
    **modules,
    tokenizer=tokenizer(scratch, text["max_position_embeddings"]),
    scheduler=DDIMScheduler(**SAMPLER),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )


def draw(pipeline: StableDiffusionPipeline, noise: np.ndarray, *, steps: int, guidance: float = 7.5) -> np.ndarray:
  """Generate images of PROMPTS, u8[n h w 3], from the given initial noise, [n h w c]."""
  pipeline.set_progress_bar_config(disable=True)
  images = pipeline(
    PROMPTS[: len(noise)],
    latents=from_torch.nchw(noise),
    num_inference_steps=steps,
    guidance_scale=guidance,
    output_type="np",
  ).images
  return np.round(images * 255).astype(np.uint8)


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
  """Return the PSNR of u8 images in dB, infinity for equal images."""
  assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.uint8
  error = np.mean((actual.astype(np.float64) - expected) ** 2)
  return float(10 * np.log10(255**2 / error)) if error else float("inf")
