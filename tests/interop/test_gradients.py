"""Compare the gradient of L_IG with respect to every parameter of Stable Diffusion with PyTorch's autograd."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ml_collections import ConfigDict
from transformers import CLIPTextConfig, CLIPTextModel

from diffdis_jax.config import Run
from diffdis_jax.config.sections import Loss
from diffdis_jax.interop import mapping, sections
from diffdis_jax.method import algorithms
from diffdis_jax.method.diffdis import to_signed
from diffdis_jax.structs import Batch
from diffdis_jax.training.losses import noise_of
from diffdis_jax.training.step import step_keys
from tests import steps
from tests.models import from_torch, networks
from tests.steps import network_of

BOS, EOS = steps.BOS, steps.EOS
TOKENS = np.array([[BOS, 5, 6, EOS, EOS, EOS, EOS, EOS], [BOS, 1, 2, 3, 4, EOS, EOS, EOS], [BOS] + [EOS] * 7] * 2)
NULL = np.array([[BOS] + [EOS] * 7])


def make_config() -> ConfigDict:
  config = steps.make_config("generation", sample_posterior=False, **{"loss.condition_dropout": 0.5})
  config.model.unet.update(widths=(8, 16), attention=(True, False))
  config.model.autoencoder.update(widths=(8, 8), patch=1, attention=True, scale=0.5)
  return config


def stable_diffusion(model: ConfigDict) -> dict[str, torch.nn.Module]:
  """Return diffusers' or transformers' modules of the same sizes, by component, with random weights."""
  unet = sections.write_unet(
    model.unet.to_dict(), latent_channels=4, context_width=model.text_encoder.width, sample_size=8
  )
  modules = dict(
    unet=UNet2DConditionModel.from_config(unet),
    vae=AutoencoderKL.from_config(sections.write_vae(model.autoencoder.to_dict(), scaling_factor=0.5, sample_size=16)),
    text_encoder=CLIPTextModel(CLIPTextConfig(**sections.write_text(model.text_encoder.to_dict()))),
  )
  return {name: from_torch.randomise(module, seed) for seed, (name, module) in enumerate(modules.items())}


def expected_gradients(
  modules: dict[str, torch.nn.Module], images: np.ndarray, keys: dict[str, jax.Array], dropout: float
) -> dict[str, np.ndarray]:
  """Return PyTorch's gradients by our paths, for the timesteps, noise and dropped conditions of the step's keys."""
  z = modules["vae"].encode(from_torch.nchw(np.asarray(to_signed(jnp.asarray(images))))).latent_dist.mode() * 0.5
  shape = (len(z), *z.shape[2:], 4)
  t = np.array(jax.random.randint(keys["t_z"], (len(z),), 0, 1000))
  noise = from_torch.nchw(np.asarray(jax.random.normal(keys["noise_z"], shape)))
  dropped = torch.from_numpy(np.array(jax.random.bernoulli(keys["drop_condition"], dropout, (len(z), 1, 1))))
  assert 0 < dropped.sum() < len(z)

  condition = lambda tokens: modules["text_encoder"](torch.from_numpy(tokens)).last_hidden_state
  c = torch.where(dropped, condition(NULL), condition(TOKENS))
  alpha_bar = torch.from_numpy(steps.ALPHA_BAR["scaled_linear"][t][:, None, None, None])
  z_t = alpha_bar.sqrt().float() * z + (1 - alpha_bar).sqrt().float() * noise
  prediction = modules["unet"](z_t, torch.from_numpy(t), encoder_hidden_states=c).sample
  torch.mean((noise - prediction) ** 2).backward()

  gradients = {}
  for component, module in modules.items():
    prefix = "text_model." if component == "text_encoder" else ""
    for name, parameter in module.named_parameters():
      entry = mapping.from_name(component, prefix + name)
      gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
      gradients[entry.path] = entry.to_ours(gradient.numpy())
  return gradients


@pytest.mark.slow
def test_gradients_equal_those_of_pytorch():
  config = make_config()
  modules = stable_diffusion(config.model)
  network = networks.Network.of(networks.builder(config.model, config.objectives))
  params = {"autoencoder.shift": np.zeros(4, np.float32), "autoencoder.scale": np.full(4, 0.5, np.float32)}
  for prefix, module in (("unet", "unet"), ("autoencoder", "vae"), ("text_encoder", "text_encoder")):
    own = {path: leaf for path, leaf in network.shapes.items() if path.startswith(f"{prefix}.") and path not in params}
    params |= from_torch.to_ours(modules[module], own)
  assert params.keys() == network.shapes.keys()
  images = np.random.default_rng(0).integers(0, 256, (len(TOKENS), 16, 16, 3), np.uint8)
  keys = step_keys(0, jnp.int32(1), jnp.int32(0))

  run = Run.of(config)

  def loss(model, images):
    batch = Batch(image=jnp.asarray(images), tokens=jnp.asarray(TOKENS, jnp.int32))
    full_network = network_of(config)
    noise = noise_of(run, keys, batch, full_network)
    return algorithms.training_losses(model, batch, noise, network=full_network, loss=Loss()).total

  ours = jax.jit(jax.grad(network.pure(loss)))(params, images)
  theirs = expected_gradients(modules, images, keys, config.loss.condition_dropout)

  assert theirs.keys() == ours.keys() - set(mapping.STATISTICS)
  largest = max(np.linalg.norm(gradient) for gradient in theirs.values())
  errors, vanishing = {}, []
  for path, expected in theirs.items():
    if np.linalg.norm(expected) < 1e-6 * largest:  # softmax cancels a key's bias, and the decoder takes no part
      vanishing.append(path)
      assert np.linalg.norm(ours[path]) < 1e-6 * largest, path
    else:
      errors[path] = np.linalg.norm(ours[path] - expected) / np.linalg.norm(expected)
  assert np.isfinite([*errors.values()]).all()  # `max` could miss a NaN
  worst = max(errors, key=errors.get)
  assert errors[worst] < 1e-4, f"{worst}: {errors[worst]:.2e}"
  without = ("autoencoder.post_quant", "autoencoder.decoder", "autoencoder.up", "autoencoder.conv_out")
  assert not [path for path in vanishing if not path.endswith("attn.k.bias") and not path.startswith(without)]
