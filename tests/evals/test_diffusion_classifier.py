"""Compare the Diffusion Classifier with Bayes' rule, for an exact denoiser, and its errors with diffusers'."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from diffdis_jax import evaluate, inference
from diffdis_jax.config import Run
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import diffusion_classifier
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals.diffusion_classifier import NoiseErrors
from diffdis_jax.method.network import Network
from tests import pipelines, steps, tiny
from tests.models.from_torch import nchw

pytest_plugins = ("tests.untrained", "tests.pipelines")

NAMES = ("red fox", "grey cat", "brown dog", "black crow", "white swan", "green frog", "blue whale")
SHAPE, SPREAD, APART, SEED = (8, 8, 3), 0.15, 0.03, 4
COUNT = 84
ALPHA_BAR = steps.ALPHA_BAR["scaled_linear"]


def mean_of(word: jax.Array) -> jax.Array:
  """Return the mean of the latents of the class whose name begins with this token."""
  return APART * jax.random.normal(jax.random.fold_in(jax.random.key(11), word), SHAPE)


class Gaussian:
  """The optimal denoiser for classes whose latents have the distribution N(mean, SPREAD² I)."""

  def encode_image(self, images):
    return images.astype(jnp.float32) / 127.5 - 1

  def encode_text(self, tokens):
    return types.SimpleNamespace(c=tokens[..., None].astype(jnp.float32))

  def generation(self, *, z_t, t_z, c):
    alpha_bar = jnp.asarray(ALPHA_BAR, jnp.float32)[t_z][:, None, None, None]
    mean = jax.vmap(mean_of)(c[:, 1, 0].astype(jnp.int32))
    return jnp.sqrt(1 - alpha_bar) * (z_t - jnp.sqrt(alpha_bar) * mean) / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


class GaussianNetwork(Network):
  latent_shape = SHAPE

  def with_params(self, params):
    return Gaussian()


def model(batch_size: int = 64) -> inference.Inference:
  """Return an Inference with the optimal denoiser and without a discrimination head."""
  config = tiny.get_config()
  config.objectives = ("generation",)
  run = Run.of(config)
  network = GaussianNetwork(**vars(Network.of(run)))
  ours = inference.Inference(network, run.inference, mesh=steps.make_mesh(), batch_size=batch_size)
  ours.image_size, ours.max_length = 8, 6
  return ours


def latents() -> np.ndarray:
  """Draw COUNT latents; their classes take turns."""
  words = Tokenizer(6)(NAMES)[:, 1]
  rng = np.random.default_rng(0)
  return np.stack([np.asarray(mean_of(words[i % len(NAMES)])) + SPREAD * rng.normal(size=SHAPE) for i in range(COUNT)])


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
  """Store the latents as images, and return the latents after rounding to bytes."""
  images = np.round((latents().clip(-1, 1) + 1) * 127.5).astype(np.uint8)
  records = [{"image": image, "label": NAMES[i % len(NAMES)]} for i, image in enumerate(images)]
  monkeypatch.setattr(sources, "open_source", lambda **section: records)
  return images / 127.5 - 1


def make(stages: Sequence[str], **settings: object) -> diffusion_classifier.DiffusionClassifier:
  how = dict(data={"split": "test"}, classnames=NAMES, templates=("{}",), seed=SEED, stages=stages)
  return evals.create("diffusion_classifier", **how, **settings)  # pyright: ignore[reportReturnType]


@jax.jit
def noise_of(t: jax.Array, places: jax.Array) -> jax.Array:
  """Return the noise of each image, which depends only on the seed, the timestep and the image's place."""
  key = jax.random.fold_in(jax.random.key(SEED), t)
  return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), SHAPE))(places)


def expected_errors(z: np.ndarray, t: np.ndarray) -> np.ndarray:
  """Return the errors [n k s] by the closed form, in float64: ε − ε̂ = a ε − b (z − mean)."""
  means = np.stack([mean_of(word) for word in Tokenizer(6)(NAMES)[:, 1]]).astype(np.float64)
  errors = np.empty((len(z), len(NAMES), len(t)))
  for j, timestep in enumerate(t):
    noise = np.asarray(noise_of(timestep, np.arange(len(z))), np.float64)
    alpha_bar = ALPHA_BAR[timestep]
    total = alpha_bar * SPREAD**2 + 1 - alpha_bar
    a, b = alpha_bar * SPREAD**2 / total, np.sqrt(alpha_bar * (1 - alpha_bar)) / total
    errors[:, :, j] = ((a * noise[:, None] - b * (z[:, None] - means)) ** 2).mean((2, 3, 4))
  return errors


def test_with_the_optimal_denoiser_the_classifier_is_bayes_rule(data):
  """With equal variances, the most likely class has the nearest mean and, in expectation, the smallest error."""
  means = np.stack([mean_of(word) for word in Tokenizer(6)(NAMES)[:, 1]]).astype(np.float64)
  labels = np.arange(COUNT) % len(NAMES)
  nearest = ((data[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
  errors = expected_errors(data, np.arange(10, 1000, 20))
  by_error = errors.mean(2).argmin(1)
  assert (by_error == nearest).mean() >= 0.9 and 0.5 < (nearest == labels).mean() < 1  # the classes overlap
  metrics = make(("50:1",)).run(model(), {})
  assert metrics["acc1"] == (by_error == labels).mean() and metrics["evaluations_per_image"] == 7 * 50
  assert not [name for name in metrics if name.startswith("head")]

  # Two stages: keep the best three classes after ten timesteps, and the best of these after fifty.
  first = errors[:, :, 2::5].mean(2)
  kept = np.where(first.argsort(1).argsort(1) < 3, errors.mean(2), np.inf)
  metrics = make(("10:3", "50:1")).run(model(), {})
  assert metrics["acc1"] == (kept.argmin(1) == labels).mean()
  assert metrics["evaluations_per_image"] == 7 * 10 + 3 * 40


def test_errors_equal_the_closed_form_for_any_batches_and_order(data):
  z, t = data[:6].astype(np.float32), np.array([7, 430, 999])
  pairs = dict(images=np.repeat(np.arange(6), 7), classes=np.tile(np.arange(7), 6))
  for batch_size, order in ((64, np.arange(42)), (5, np.random.default_rng(1).permutation(42))):
    errors = NoiseErrors(model(batch_size))
    c = errors.conditions({}, Tokenizer(6)(NAMES))
    mixed = {name: numbers[order] for name, numbers in pairs.items()}
    by_pair = errors({}, c, z, seed=SEED, places=np.arange(6), t=t, **mixed)
    np.testing.assert_allclose(by_pair[order.argsort()].reshape(6, 7, 3), expected_errors(z, t), rtol=1e-4, atol=1e-6)


def test_ties_and_nans_are_wrong_and_kept_classes_rank_first():
  error = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 3.0], [np.nan, 1.0, 2.0], [0.5, 2.0, 3.0]])
  stage = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1]])
  # Both stages have these errors.
  outcome = diffusion_classifier.Outcome(np.stack([error, error]), stage)
  np.testing.assert_array_equal(diffusion_classifier.ranks(outcome, np.array([0, 0, 0, 0])), [0, 1, 2, 2])
  np.testing.assert_array_equal(diffusion_classifier.ranks(outcome, np.array([2, 2, 2, 1])), [2, 2, 2, 0])


@pytest.mark.parametrize("counts", [(10, 50), (50, 500), (25, 250), (50, 100, 500), (1000,)])
def test_the_timesteps_of_the_stages_equal_those_of_li_et_al(counts):
  """Li et al. space as many timesteps as the last stage has evenly; each stage takes every n-th of them."""
  spacing = 1000 // counts[-1]
  grid = [*range(spacing // 2, 1000, spacing)]
  used: set[int] = set()
  stages = [diffusion_classifier.Stage(count, 1) for count in counts]
  for count, added in zip(counts, diffusion_classifier.new_timesteps(stages), strict=True):
    step = len(grid) // count
    unused = [t for t in grid[step // 2 :: step] if t not in used]
    assert added.tolist() == unused
    used |= {*unused}


@pytest.mark.parametrize(
  "stages", [(), ("10",), ("10:5",), ("50:5", "10:1"), ("20:5", "50:1"), ("5:5", "10:5", "x:1"), (10, 5)]
)
def test_invalid_stages_are_refused(stages):
  with pytest.raises(UserError, match="should be EVALUATIONS:KEPT of each stage, such as 10:5,50:1"):
    inspect.unwrap(diffusion_classifier.read_stages)(stages)


@pytest.mark.slow
def test_errors_equal_diffusers(sd, imported):
  """Compute eval_error of Li et al. with diffusers' UNet2DConditionModel, and the same weights, timesteps and
  noise."""
  ours, params = inference.load(imported, batch_size=4)
  assert not ours.aligned  # the head of an import is untrained
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 4, 4, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
  tokens, t = Tokenizer(ours.max_length)(pipelines.PROMPTS), np.array([1, 333, 980])
  errors = NoiseErrors(ours)
  c, z = errors.conditions(params, tokens), errors.latents(params, images)
  pairs = dict(images=np.repeat(np.arange(3), 2), classes=np.tile(np.arange(2), 3))
  ours_by_pair = errors(params, c, z, seed=SEED, places=np.arange(3), t=t, **pairs).reshape(3, 2, 3)

  scheduler, unet = DDIMScheduler.from_pretrained(sd / "scheduler"), UNet2DConditionModel.from_pretrained(sd / "unet")
  vae, text = AutoencoderKL.from_pretrained(sd / "vae"), CLIPTextModel.from_pretrained(sd / "text_encoder")
  with torch.no_grad():
    pixels = nchw(images.astype(np.float32) / 127.5 - 1)
    latent = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    states = text(torch.from_numpy(tokens).long()).last_hidden_state
    for n, k, j in itertools.product(range(3), range(2), range(3)):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), t[j]), n)
      noise = nchw(np.asarray(jax.random.normal(key, z.shape[1:]))[None])
      alpha_bar = scheduler.alphas_cumprod[t[j]]
      noised = latent[n : n + 1] * alpha_bar**0.5 + noise * (1 - alpha_bar) ** 0.5
      predicted = unet(noised, torch.tensor([t[j]]), encoder_hidden_states=states[k : k + 1]).sample
      assert abs(ours_by_pair[n, k, j] - float(((noise - predicted) ** 2).mean())) <= 1e-4
  assert np.ptp(ours_by_pair, axis=1).min() > 1e-3  # the prompt has an effect


@pytest.mark.slow
def test_the_classifier_is_measured_on_the_sets_of_zero_shot(run):
  evaluations = evals.of_config(
    {"few": {"task": "zero_shot", "data": dict(name="shapes", split="test", image_size=32, num_images=6)}},
    tasks=["diffusion_classifier"],
  )
  results = evaluate.evaluate(run, evals.override(evaluations, {"stages": ["1:2", "2:1"]}), batch_size=8)
  record = results["diffusion_classifier"]["few"]
  classes = record["protocol"]["num_classes"]
  assert record["metrics"]["evaluations_per_image"] == classes * 1 + 2 * 1
  assert record["protocol"]["stages"] == ["1:2", "2:1"] and record["protocol"]["timesteps"] == [250, 750]
