"""Test how the latents' shift and scale are folded into diffusers' autoencoder, which has no fields for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file

from diffdis_jax.interop import mapping, to_torch
from tests.models import from_torch, networks

SHIFT, SCALE = np.float32([0.5, -1.0, 0.0, 2.0]), np.float32([0.2, 1.0, 3.0, 0.7])


def own_of(model, schedule="scaled_linear"):
  return {"model": model, "image_size": 16, "image_diffusion": {"schedule": schedule}}


def export(tmp_path, objectives=networks.BOTH, dtype="float32", shift=SHIFT, scale=SCALE):
  """Write random parameters as an export, and return them."""
  model = networks.tiny_model()
  network = networks.Network.of(networks.builder(model, objectives))
  params = networks.random_params(network.shapes, seed=0)
  params |= {"autoencoder.shift": shift, "autoencoder.scale": scale}
  to_torch.write(tmp_path, dict(params), own_of(model), dtype=dtype)
  return params


@pytest.fixture(scope="module")
def autoencode():
  """Return a function of (params, x, z) that encodes x to a mean and a log-variance, and decodes z."""

  def run(model, x, z):
    ours = model.autoencoder
    posterior = ours.encode(x)
    return ours.to_z(posterior.mean), posterior.log_variance, ours.decode(ours.from_z(z))

  return networks.diffdis().jit(run)


@pytest.mark.parametrize("shift, scale", [(SHIFT, SCALE), (SHIFT, np.full(4, 0.3, np.float32)), (0 * SHIFT, SCALE)])
def test_shift_and_scale_are_folded_into_the_convolutions(autoencode, tmp_path, shift, scale):
  params = export(tmp_path, shift=shift, scale=scale)
  theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  z = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)

  mean, log_variance, image = autoencode(params, x, z)
  with torch.no_grad():
    posterior = theirs.encode(from_torch.nchw(x)).latent_dist
    decoded = theirs.decode(from_torch.nchw(z) / theirs.config.scaling_factor).sample
  assert networks.relative_error(mean, theirs.config.scaling_factor * from_torch.nhwc(posterior.mean)) < 1e-5
  # Compare in units of z: the log-variance of scale · latent is larger by 2 log scale.
  exported = from_torch.nhwc(posterior.logvar) + 2 * np.log(theirs.config.scaling_factor)
  assert np.abs(exported - (log_variance + 2 * np.log(scale))).max() < 1e-4
  assert networks.relative_error(image, from_torch.nhwc(decoded)) < 1e-5


def test_equal_scales_without_a_shift_change_no_weight(tmp_path):
  params = export(tmp_path, shift=np.zeros(4, np.float32), scale=np.full(4, 0.18215, np.float32))
  weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
  for path in (path for path in params if path.startswith("autoencoder.") and path not in mapping.STATISTICS):
    entry = mapping.from_path(path)
    np.testing.assert_array_equal(entry.to_ours(weights[entry.name]), params[path])
  assert AutoencoderKL.load_config(tmp_path / "vae")["scaling_factor"] == 0.18215


def test_all_parameters_are_written_and_removed_from_the_dictionary(tmp_path):
  network = networks.diffdis()
  params = networks.random_params(network.shapes, seed=0) | {"autoencoder.scale": np.ones(4, np.float32)}
  to_torch.write(tmp_path, params, own_of(networks.tiny_model(), "cosine"))
  assert not params
  written = {
    mapping.from_name(component, name).path
    for component, file in to_torch.FILES.items()
    for name in load_file(tmp_path / file)
  }
  assert written == network.shapes.keys() - set(mapping.STATISTICS)


@pytest.mark.parametrize("dtype, variant", [("bfloat16", "bf16"), ("float16", "fp16")])
def test_half_precision_has_the_names_of_a_variant(tmp_path, dtype, variant):
  export(tmp_path, dtype=dtype)
  files = [*tmp_path.rglob("*.safetensors")]
  assert {path.name for path in files} == {
    f"{name}.{variant}.safetensors" for name in ("diffusion_pytorch_model", "model")
  }
  assert {str(array.dtype) for path in files for array in load_file(path).values()} == {dtype}
