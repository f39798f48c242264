"""Compare the whole network with float64 PyTorch in discrimination; the text stream never touches generation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffdis_jax.method import diffdis, joint
from diffdis_jax.structs import DiscriminationPass, GenerationPass
from tests.models import from_torch, networks, oracle
from tests.models.networks import QUERY_WIDTH
from tests.models.test_parity_unet import diffusers_unet

DEFAULT = dict(fusion=True, share_attention=True, modality_ffn=True)
NEW = ("text_stream.", "alignment.", "logit_scale")
UP_PATH = ("unet.up.", "unet.norm_out.", "unet.conv_out.")


TWO_LEVELS = dict(widths=(8, 16), attention=(True, False), depth=1)
THREE_LEVELS = dict(widths=(8, 16, 24), attention=(True, True, False), depth=1)


def discriminate(model, e_t, t_e, z, t_z, c_null):
  return model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c_null)


def generate(model, z_t, t_z, c):
  return model.generation(z_t=z_t, t_z=t_z, c=c)


@functools.cache
def two_levels(*objectives: str, **changes) -> networks.Network:
  """Make the shortest network in which a block hands a text query to the next: gradients compile slowly."""
  unet = networks.tiny_model()["unet"] | TWO_LEVELS
  return networks.diffdis(objectives or networks.BOTH, unet=unet, **changes)


@functools.cache
def compiled(f, **switches):
  """Compile f for this two-level network, once for all tests."""
  return two_levels(**switches).jit(f)


@functools.cache
def three_levels() -> networks.Network:
  return networks.diffdis(unet=networks.tiny_model()["unet"] | THREE_LEVELS)


@functools.cache
def discrimination():
  """Compile discrimination of the paper's model, once for all tests."""
  return three_levels().jit(discriminate)


@functools.cache
def params() -> dict[str, np.ndarray]:
  return networks.random_params(three_levels().shapes, seed=0)


def make_inputs() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  return dict(
    e_t=rng.standard_normal((4, QUERY_WIDTH)).astype(np.float32),
    t_e=np.array([0, 1, 500, 999], np.int32),
    z=rng.standard_normal((4, 8, 12, 4)).astype(np.float32),
    t_z=np.full(4, 1000, np.int32),
    c_null=rng.standard_normal((4, 7, 16)).astype(np.float32),
  )


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
  return make_inputs()


def changed(params: dict[str, np.ndarray], where: tuple[str, ...]) -> dict[str, np.ndarray]:
  return {path: value + np.float32(0.5) if path.startswith(where) else value for path, value in params.items()}


@pytest.mark.parametrize("switches", [{}, dict(fusion=False), dict(share_attention=False, modality_ffn=False)])
def test_discrimination_equals_the_papers(switches, inputs):
  net = two_levels(**switches) if switches else three_levels()
  theirs = from_torch.randomise(diffusers_unet(**TWO_LEVELS if switches else THREE_LEVELS), seed=1)
  unet = from_torch.to_ours(theirs, {path: leaf for path, leaf in net.shapes.items() if path.startswith("unet.")})
  weights = networks.random_params(net.shapes, seed=2) | unet
  ours = (compiled(discriminate, **switches) if switches else discrimination())(weights, **inputs)

  double = {name: torch.from_numpy(inputs[name]).double() for name in ("e_t", "c_null")}
  model = networks.tiny_model()
  with torch.no_grad():
    expected = oracle.discrimination(
      theirs.double(),
      weights,
      **double,
      z=from_torch.nchw(inputs["z"]).double(),
      t_e=torch.from_numpy(inputs["t_e"]),
      t_z=torch.from_numpy(inputs["t_z"]),
      num_heads=model["unet"]["num_heads"],
      alignment_depth=model["alignment"]["depth"],
      alignment_heads=model["alignment"]["num_heads"],
      **DEFAULT | switches,
    )
  assert networks.relative_error(ours, expected) < 1e-5


def test_switches_decide_the_parameters():
  paths = lambda *objectives, **switches: set(two_levels(*objectives, **switches).shapes)
  full = paths()
  blocks = {path for path in full if path.startswith("text_stream.blocks.")}
  own_ffn = {path for path in blocks if ".ff." in path or ".norm." in path}
  assert paths(fusion=False) == full - blocks
  assert paths(modality_ffn=False) == full - own_ffn
  own_attention = paths(share_attention=False) - full
  assert full < paths(share_attention=False)
  assert len(own_attention) == 2 * 5 and all(path.split(".")[3] == "attn" for path in own_attention)
  assert paths("generation") == {path for path in full if not path.startswith(NEW)}
  up_path = {path for path in full if path.startswith(("unet.up.", "unet.norm_out.", "unet.conv_out."))}
  assert paths("discrimination") == full - up_path and len(up_path) > 4
  autoencoder = {path for path in full if path.startswith("autoencoder.")}
  assert paths("reconstruction") == autoencoder


def test_generation_is_bit_identical_without_and_with_the_new_parameters(inputs):
  args = dict(z_t=inputs["z"], t_z=np.array([0, 250, 500, 999], np.int32), c=inputs["c_null"])
  plain, net = two_levels("generation"), two_levels()
  params = networks.random_params(net.shapes, seed=0)
  baseline = plain.jit(generate)({path: params[path] for path in plain.shapes}, **args)
  run = compiled(generate)
  np.testing.assert_array_equal(run(params, **args), baseline)
  np.testing.assert_array_equal(run(changed(params, NEW), **args), baseline)
  assert not np.array_equal(run(changed(params, UP_PATH), **args), baseline)


def run_jointly(model, generation, discrimination):
  return joint.both_passes(model, GenerationPass(**generation), DiscriminationPass(**discrimination))


@pytest.mark.parametrize(
  "switches", [{}, {"fusion": False}, {"share_attention": False, "modality_ffn": False}], ids=str
)
def test_both_passes_as_one_batch_give_what_each_gives(switches, inputs):
  net = two_levels(**switches)
  params = networks.random_params(net.shapes, seed=0)
  rng = np.random.default_rng(3)
  c = rng.standard_normal(inputs["c_null"].shape).astype(np.float32)
  z_t = rng.standard_normal(inputs["z"].shape).astype(np.float32)
  generation = dict(z_t=z_t, t_z=np.array([0, 250, 500, 999], np.int32), c=c)
  joint = net.jit(run_jointly)
  together = joint(params, generation=generation, discrimination=inputs)
  assert networks.relative_error(together.noise_z, compiled(generate, **switches)(params, **generation)) < 1e-5
  assert networks.relative_error(together.prediction_e, compiled(discriminate, **switches)(params, **inputs)) < 1e-5

  # Text token, clean image and their parameters do not influence generation.
  others = inputs | {name: inputs[name] + np.float32(1) for name in ("z", "e_t", "c_null")}
  other = joint(changed(params, NEW), generation=generation, discrimination=others)
  np.testing.assert_array_equal(other.noise_z, together.noise_z)
  assert np.abs(other.prediction_e - together.prediction_e).max() > 1e-3
  # Captions do not influence discrimination.
  same = joint(params, generation=generation | dict(c=c + 1, z_t=z_t + 1), discrimination=inputs).prediction_e
  np.testing.assert_array_equal(same, together.prediction_e)


@pytest.fixture(scope="module")
def gradient_of_discrimination():
  """Return a function of `remat` that gives the gradient of each parameter."""

  @functools.cache
  def gradient(remat: str) -> dict[str, np.ndarray]:
    net = two_levels(remat=remat)
    total = net.pure(lambda model, inputs: jnp.sum(jnp.sin(discriminate(model, **inputs))))
    params = networks.random_params(net.shapes, seed=0)
    return jax.jit(jax.grad(total))(params, make_inputs())

  return gradient


def test_discrimination_teaches_all_but_the_up_path(gradient_of_discrimination):
  for path, value in gradient_of_discrimination("none").items():
    largest = np.abs(value).max()
    if path.startswith(("text_stream.", "alignment.", "unet.")) and not path.startswith(UP_PATH):
      # A bias on keys shifts all scores of a softmax equally.
      assert (largest > 1e-5) != path.endswith("attn.k.bias"), path
    else:
      assert largest == 0, path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention"])
def test_rematerialisation_changes_no_gradient(gradient_of_discrimination, remat):
  expected = gradient_of_discrimination("none")
  for path, value in gradient_of_discrimination(remat).items():
    np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_pixels_survive_the_way_to_signed_and_back():
  pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
  signed = np.asarray(diffdis.to_signed(jnp.asarray(pixels)))
  assert (signed.min(), signed.max()) == (-1, 1)
  np.testing.assert_array_equal(diffdis.to_pixels(jnp.asarray(signed)), pixels)
  np.testing.assert_array_equal(
    diffdis.to_pixels(jnp.array([-7.0, 7.0]).reshape(1, 1, 2, 1).repeat(3, axis=-1)).ravel(), [0, 0, 0, 255, 255, 255]
  )
