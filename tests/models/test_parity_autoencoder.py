"""Compare our autoencoder with diffusers' AutoencoderKL, with the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffdis_jax.config.model import AutoencoderSize
from diffdis_jax.models import autoencoder
from diffdis_jax.models.autoencoder import Autoencoder
from diffdis_jax.structs import Posterior
from tests.models import from_torch, networks

STATISTICS = {"shift": np.full(4, 0.5, np.float32), "scale": np.full(4, 0.18215, np.float32)}


def ours(*, patch: int) -> networks.Network:
  section = networks.tiny_model()["autoencoder"] | dict(widths=(8, 16, 24), depth=2, patch=patch)
  size = AutoencoderSize(**section)
  return networks.Network.of(lambda rngs: Autoencoder(size, dtype=np.float32, rngs=rngs))


def diffusers_autoencoder(*, patch: int) -> AutoencoderKL:
  return AutoencoderKL(
    in_channels=3 * patch**2,
    out_channels=3 * patch**2,
    block_out_channels=(8, 16, 24),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=4,
  )


def to_ours(theirs: AutoencoderKL, network: networks.Network) -> dict[str, np.ndarray]:
  shapes = {f"autoencoder.{path}": leaf for path, leaf in network.shapes.items() if path not in STATISTICS}
  params = from_torch.to_ours(theirs, shapes)
  return {path.removeprefix("autoencoder."): value for path, value in params.items()} | STATISTICS


# With patches, it is Stable Diffusion's autoencoder on rearranged pixels, PyTorch's pixel_unshuffle.
@pytest.mark.parametrize("patch", [1, 2])
def test_autoencoder_equals_diffusers(patch):
  theirs = from_torch.randomise(diffusers_autoencoder(patch=patch), seed=patch)
  network = ours(patch=patch)
  params = to_ours(theirs, network)
  rng = np.random.default_rng(3)
  x = rng.uniform(-1, 1, (2, 16 * patch, 24 * patch, 3)).astype(np.float32)
  latent = rng.standard_normal((2, 4, 6, 4)).astype(np.float32)

  posterior, image = network.jit(lambda model, x, latent: (model.encode(x), model.decode(latent)))(params, x, latent)

  with torch.no_grad():
    expected = theirs.encode(torch.nn.functional.pixel_unshuffle(from_torch.nchw(x), patch)).latent_dist
    expected_image = theirs.decode(from_torch.nchw(latent)).sample
  assert networks.relative_error(posterior.mean, from_torch.nhwc(expected.mean)) < 1e-5
  assert networks.relative_error(posterior.log_variance, from_torch.nhwc(expected.logvar)) < 1e-5
  expected_image = from_torch.nhwc(torch.nn.functional.pixel_shuffle(expected_image, patch))
  assert networks.relative_error(image, expected_image) < 1e-5


def test_log_variance_is_clipped():
  theirs = from_torch.randomise(diffusers_autoencoder(patch=1), seed=0)
  with torch.no_grad():
    theirs.quant_conv.bias[4:6], theirs.quant_conv.bias[6:] = 1000.0, -1000.0
  network = ours(patch=1)
  posterior = network.jit(lambda model, x: model.encode(x))(
    to_ours(theirs, network), np.zeros((1, 8, 8, 3), np.float32)
  )
  assert np.asarray(posterior.log_variance)[..., :2].min() == 20.0
  assert np.asarray(posterior.log_variance)[..., 2:].max() == -30.0


def test_latents_are_shifted_then_scaled():
  network = ours(patch=1)
  params = networks.random_params(network.shapes, seed=0) | STATISTICS
  latent = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
  z = network.pure(lambda model, x: model.to_z(x))(params, jnp.asarray(latent))
  np.testing.assert_allclose(z, (latent - 0.5) * 0.18215, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(network.pure(lambda model, z: model.from_z(z))(params, z), latent, rtol=1e-5, atol=1e-6)


def test_samples_have_the_posteriors_mean_and_deviation():
  mean, log_variance = np.full((1000, 2, 2, 4), 3.0, np.float32), np.full((1000, 2, 2, 4), np.log(4.0), np.float32)
  posterior = Posterior(mean=jnp.asarray(mean), log_variance=jnp.asarray(log_variance))
  draws = np.asarray(autoencoder.sample_posterior(posterior, jax.random.key(0)))
  assert abs(draws.mean() - 3.0) < 0.06 and abs(draws.std() - 2.0) < 0.05
  np.testing.assert_array_equal(autoencoder.sample_posterior(posterior, None), mean)
