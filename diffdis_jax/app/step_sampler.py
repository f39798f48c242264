"""A trained model that answers requests step by step, each of its programs in one shape, so that none compiles again.

A step is that of Algorithm 2 or 3 (method/algorithms.py), one a call: what is shown after the last step is what
`Inference` gives.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffdis_jax import inference
from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import COMPARING, DENOISING, GENERATIVE
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.method import algorithms, encode, losses, samplers, schedules
from diffdis_jax.method.algorithms import GenerationStep
from diffdis_jax.method.samplers import DdimCoefficients, DdimStep
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.parallel import programs

ROWS = 8  # rows of a compiled step, at most: an image's z is one, noise samples of its text query are as many as asked
TABS = {  # what each needs a run to be trained for, any of these
  "draw": GENERATIVE,
  "classify": COMPARING,
  "search": COMPARING,
  "inside": DENOISING,
}


def tabs(objectives: Sequence[str], *, aligned: bool = True) -> tuple[str, ...]:
  """Return the tabs that a run with these objectives can serve. Raises UserError: none.

  `aligned`: it compares images with texts, as an import that nobody trained does not.
  """
  trained = {*objectives}
  found = tuple(name for name, needed in TABS.items() if {*needed} & trained and (aligned or needed == GENERATIVE))
  if not found:
    served = ", ".join(dict.fromkeys(name for needed in TABS.values() for name in needed))
    raise UserError(f"this run's objectives are {', '.join(objectives)}; a page takes a run of any of {served}")
  return found


@dataclasses.dataclass(frozen=True)
class Frame:
  """An image after a step of Algorithm 2, decoded: step `step` of `steps`, at which the network was asked at t.

  Attributes:
    noisy: z at the next timestep; after the last step, the image.
    emptied: ẑ_0 as the network predicts it under the empty prompt.
    guided: ẑ_0 under the prompt, with guidance.
  """

  step: int
  steps: int
  t: int
  noisy: UInt8[np.ndarray, "H W 3"]
  emptied: UInt8[np.ndarray, "H W 3"]
  guided: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The text query of an image after a step of Algorithm 3: ê_0 of each noise sample, L2-normalised."""

  step: int
  steps: int
  t: int
  queries: Float[np.ndarray, "k d"]


class StepSampler:
  """A run's model on one device.

  Args:
    model: its batch size is that of texts, and of images of a search.
    params: of the same run.
    seconds: that a request may take.
  """

  def __init__(self, model: inference.Inference, params: Params, *, seconds: float):
    self.model, self._params, self.seconds = model, params, seconds
    self.network = network = model.network
    self.tabs = tabs(network.objectives, aligned=model.aligned)
    self._tokenizer = Tokenizer(model.max_length)
    self.closed = threading.Event()

    def compiled(name: str, f: Callable[..., Any]) -> programs.Program:
      # As the model's own, by the run's precision and form of attention.
      return model.compiled(name, lambda params, *rows: f(network.with_params(params), *rows))

    # The condition c of the prompt, and of the empty one.
    conditions = lambda net, tokens: (net.encode_text(tokens).c, encode.null_condition(net, tokens.shape[1]))
    self._conditions = compiled("a prompt's condition", conditions)
    self._generation_step = compiled("a generation step", self._generation)
    self._preview = compiled("previews", lambda net, z: net.decode_image(z))
    self._latent = compiled("an image's latent", lambda net, image: net.encode_image(image))
    self._query_step = compiled("a step of the text query", self._denoising)
    # τ = min(exp(logit_scale), 100) of the contrastive loss; none in a run of generation alone.
    scale = params.get("logit_scale")
    self.temperature = 1.0 if scale is None else float(losses.temperature(jnp.asarray(scale)))

  def close(self) -> None:
    """End requests, and the embedding of images, at their next step."""
    self.closed.set()

  def call(self, f: Callable[..., Any], *args: Any) -> Any:
    """Return f(params, *args) as numpy arrays. Raises UserError: the page has ended."""
    if self.closed.is_set():
      raise UserError("the page has ended")
    return jax.tree.map(np.asarray, f(self._params, *args))

  def cut(self, text: str) -> str | None:
    """Return what the network reads of a text that is too long for it; None of any other."""
    return self._tokenizer.cut(text)

  def text_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Embed texts: e of each, L2-normalised. Raises UserError: not finite."""
    return _finite(self.call(self.model.embed_texts, self._tokenizer(texts)))

  def embed_images(self, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int) -> Float[np.ndarray, "n d"]:
    """Embed a batch of images: the query of each of images, by the run's own protocol, L2-normalised."""
    return _finite(self.call(lambda params: self.model.embed_images(params, images, seed=seed)))

  def image_queries(
    self, image: UInt8[np.ndarray, "H W 3"], *, seed: int, num_noise_samples: int
  ) -> Iterator[Float[np.ndarray, "k d"]]:
    """Yield, after each of the run's own number of steps, ê_0 of each noise sample; for CLIP, its one embedding."""
    if self.network.is_clip:
      yield self.embed_images(image[None], seed=seed)
      return
    how = dict(steps=self.model.sampling.steps, num_noise_samples=num_noise_samples)
    for estimate in self.estimates(image, seed=seed, **how):
      yield estimate.queries

  def generate(self, prompt: str, *, seed: int, steps: int, guidance_scale: float, frames: int) -> Iterator[Frame]:
    """Run Algorithm 2, shown after the last step and, evenly spread, after `frames` - 1 of the others.

    Raises:
      UserError: a run without generation, no such number of steps.
    """
    conditions = self.call(self._conditions, self._tokenizer([prompt]))
    timesteps, z_t = schedules.leading(steps), self.model.noise(1, seed)
    every, scale = math.ceil(steps / frames), np.float32(guidance_scale)
    for i, now in enumerate(samplers.ddim_coefficients(self.network.image_process, timesteps).each()):
      # The scale is an argument, an array: as a constant each scale would be a program of its own.
      step = self.call(self._generation_step, z_t, now, *conditions, scale)
      z_t = _finite(step.z_prev)
      # Decoding costs about as much as a step, so not each is shown, but always the last.
      if (steps - 1 - i) % every == 0:
        shown = np.concatenate([step.z_prev, step.z_0_null, step.z_0])
        yield Frame(i + 1, steps, int(timesteps.t[i]), *self.call(self._preview, shown))

  def estimates(
    self, image: UInt8[np.ndarray, "H W 3"], *, seed: int, steps: int, num_noise_samples: int
  ) -> Iterator[Estimate]:
    """Run Algorithm 3 from several noise samples, after each step. Their mean is what `Inference.embed_images` gives.

    Raises:
      UserError: a run without discrimination, no such number of steps.
    """
    # Whole blocks of ROWS: a shorter last one would be another program to compile. What is too much is left out below.
    width, rows = self.network.model.query_width, math.ceil(num_noise_samples / ROWS) * ROWS
    noise = query_noise(jax.random.key(seed), num_noise_samples=rows, places=jnp.arange(1), width=width)
    blocks, timesteps = [*np.asarray(noise)[:, 0].reshape(-1, ROWS, width)], schedules.trailing(steps)
    z = self.call(self._latent, image[None])
    for i, now in enumerate(samplers.ddim_coefficients(self.network.text_process, timesteps).each()):
      taken = [self.call(self._query_step, e_t, now, z) for e_t in blocks]
      blocks = [_finite(step.x_prev) for step in taken]
      queries = np.concatenate([step.x_0 for step in taken])
      yield Estimate(i + 1, steps, int(timesteps.t[i]), queries[:num_noise_samples])

  def warm_up(self) -> None:
    """Run every program that an answer takes once, so that it is compiled."""
    # One step compiles what any number of steps takes, since coefficients are arguments.
    if "draw" in self.tabs:
      list(self.generate("a", seed=0, steps=1, guidance_scale=2.0, frames=1))
    if "classify" in self.tabs:
      self.text_queries(["a"])
      side = self.network.image_size
      list(self.image_queries(np.zeros((side, side, 3), np.uint8), seed=0, num_noise_samples=1))

  def _generation(self, model: Any, z_t: Any, now: DdimCoefficients, c: Any, c_null: Any, scale: Any) -> GenerationStep:
    given = dict(c=c, c_null=c_null, guidance_scale=scale)
    return algorithms.generation_step(model, z_t, now, network=self.network, **given)

  def _denoising(self, model: Any, e_t: Float[Array, "k d"], now: DdimCoefficients, z: Any) -> DdimStep:
    """Take one step. Its x_0 is L2-normalised, to be shown; x_prev, from which the next step starts, is not."""
    how, z = self.model.sampling, jnp.broadcast_to(z, (len(e_t), *z.shape[1:]))
    given: Any = dict(guidance_scale=how.guidance, normalize_query=how.normalize_query)
    c_null = encode.null_condition(model, self.network.max_length)
    step = algorithms.text_query_step(model, e_t, now, z=z, c_null=c_null, network=self.network, **given)
    return DdimStep(x_prev=step.x_prev, x_0=losses.unit_norm(step.x_0))


def _finite(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """Return x. Raises UserError: it has numbers that are not finite, of which there is nothing to show."""
  if not np.isfinite(x).all():
    raise UserError(
      "the model gives numbers that are not finite, as after training that diverged; take an earlier checkpoint, --step"
    )
  return x
