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
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax import inference
from diffdis_jax.app.limits import within
from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import COMPARING, DENOISING, GENERATIVE
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.method import algorithms, encode, losses, samplers, schedules
from diffdis_jax.method.algorithms import GenerationStep
from diffdis_jax.method.samplers import DdimCoefficients, DdimStep
from diffdis_jax.method.schedules import Process, Timesteps
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.parallel import programs
from diffdis_jax.structs import AnyArray

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
  found = tuple(
    name for name, needed in TABS.items() if {*needed} & {*objectives} and (aligned or needed == GENERATIVE)
  )
  if not found:
    served = ", ".join(dict.fromkeys(name for needed in TABS.values() for name in needed))
    raise UserError(f"this run's objectives are {', '.join(objectives)}; a page takes a run of any of {served}")
  return found


@dataclasses.dataclass(frozen=True)
class Frame:
  """An image after a step of Algorithm 2, decoded; all three u8[H W 3].

  Attributes:
    step, steps: this one, from 1, of how many.
    t: the timestep at which the network was asked.
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
  """The text query of an image after a step of Algorithm 3.

  Attributes:
    step, steps: this one, from 1, of how many.
    t: the timestep at which the network was asked.
    queries: ê_0 of each noise sample, L2-normalised.
  """

  step: int
  steps: int
  t: int
  queries: Float[np.ndarray, "k d"]


@struct.dataclass
class Conditions:
  """The condition c of the prompt, and of the empty one."""

  c: Float[AnyArray, "1 l d"]
  c_null: Float[AnyArray, "1 l d"]


class StepSampler:
  """A run's model on one device, one program at a time.

  Args:
    model: its batch size is that of texts, and of images of a search.
    params: of the same run.
    seconds: that all texts of a request may take.
  """

  def __init__(self, model: inference.Inference, params: Params, *, seconds: float):
    self.model, self._params = model, params
    self._seconds = seconds
    self.network = model.network
    self.tabs = tabs(self.network.objectives, aligned=model.aligned)
    self._tokenizer = Tokenizer(model.max_length)
    # The device runs one program at a time: requests wait in the page's queue, images to search are embedded between.
    self._turn = threading.Lock()
    self.closed = threading.Event()
    # As the model's own, by the run's precision and form of attention.
    self._conditions = model.compiled("a prompt's condition", self._encode_prompt)
    self._generation_step = model.compiled("a generation step", self._generate_once)
    self._preview = model.compiled("previews", self._decode)
    self._latent = model.compiled("an image's latent", self._encode_image)
    self._query_step = model.compiled("a step of the text query", self._denoise_once)
    # τ = min(exp(logit_scale), 100) of the contrastive loss; none in a run of generation alone.
    scale = params.get("logit_scale")
    self.temperature = 1.0 if scale is None else float(losses.temperature(jnp.asarray(scale)))

  def call(self, f: Callable[..., Any], *args: Any) -> Any:
    """Return f(*args), as numpy arrays, when it is this call's turn. Raises UserError: the page has ended."""
    with self._turn:
      if self.closed.is_set():
        raise UserError("the page has ended")
      # As numpy within the turn: JAX returns before the device is done, and the next turn would begin too early.
      return jax.tree.map(np.asarray, f(*args))

  def close(self) -> None:
    """End what still waits for its turn."""
    self.closed.set()

  def _tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """Tokenize in a turn, too: two threads may not use the tokenizer at a time."""
    return self.call(self._tokenizer, texts)

  def cut(self, text: str) -> str | None:
    """Return what the network reads of a text that is too long for it; None of any other."""
    left = self.call(self._tokenizer.cut, text)
    return None if left is None else str(left)

  def text_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Embed texts: e of each, L2-normalised. Raises UserError: not in time, or not finite."""
    tokens, size = self._tokens(texts), self.model.batch_size
    starts = range(0, len(tokens), size)
    parts = (self.call(self.model.embed_texts, self._params, tokens[start : start + size]) for start in starts)
    return _finite(np.concatenate([*within(self._seconds, parts)]))

  def embed_images(self, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int) -> Float[np.ndarray, "n d"]:
    """Embed a batch of images: the query of each of images, by the run's own protocol, L2-normalised."""
    return _finite(self.call(lambda: self.model.embed_images(self._params, images, seed=seed)))

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
    conditions = self.call(self._conditions, self._params, self._tokens([prompt]))
    timesteps, z_T = schedules.leading(steps), self.model.noise(1, seed)
    every = math.ceil(steps / frames)
    # The scale is an argument, an array: as a constant each scale would be a program of its own.
    given = conditions, np.float32(guidance_scale)
    for i, step in enumerate(self._denoise(self._generation_step, z_T, self.network.image_process, timesteps, *given)):
      # Decoding costs about as much as a step, so not each is shown, but always the last.
      if (steps - 1 - i) % every == 0:
        shown = np.concatenate([step.z_prev, step.z_0_null, step.z_0])
        yield Frame(i + 1, steps, int(timesteps.t[i]), *self.call(self._preview, self._params, shown))

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
    e_T, timesteps = np.asarray(noise)[:, 0], schedules.trailing(steps)
    z = self.call(self._latent, self._params, image[None])
    for i, step in enumerate(self._denoise(self._query_step, e_T, self.network.text_process, timesteps, z)):
      yield Estimate(i + 1, steps, int(timesteps.t[i]), step.x_0[:num_noise_samples])

  def _denoise(
    self, program: programs.Program, x_t: Float[np.ndarray, "n ..."], process: Process, timesteps: Timesteps, *args: Any
  ) -> Iterator[Any]:
    """Yield what each of DDIM's steps gives, from x_T on, ROWS rows a call.

    Args:
      program: (params, x_t, coefficients, *args) -> GenerationStep or DdimStep.
    """
    for now in samplers.ddim_coefficients(process, timesteps).each():
      # A turn for each block, so that another request need not wait for all of them.
      parts = [
        self.call(program, self._params, x_t[start : start + ROWS], now, *args) for start in range(0, len(x_t), ROWS)
      ]
      step: Any = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
      x_t = _finite(np.asarray(step.z_prev if isinstance(step, GenerationStep) else step.x_prev))
      yield step

  def warm_up(self) -> None:
    """Run every program that an answer takes once, so that it is compiled."""
    side = self.network.image_size
    blank = np.zeros((side, side, 3), np.uint8)
    # One step compiles what any number of steps takes, since coefficients are arguments.
    if "draw" in self.tabs:
      list(self.generate("a", seed=0, steps=1, guidance_scale=2.0, frames=1))
    if "classify" in self.tabs:
      self.call(self.model.embed_texts, self._params, self._tokens(["a"]))
      list(self.image_queries(blank, seed=0, num_noise_samples=1))

  def _decode(self, params: Params, z: Float[Array, "n h w c"]) -> UInt8[Array, "n H W 3"]:
    model: Any = self.network.with_params(params)
    return model.decode_image(z)

  def _encode_image(self, params: Params, image: UInt8[Array, "1 H W 3"]) -> Float[Array, "1 h w c"]:
    model: Any = self.network.with_params(params)
    return model.encode_image(image)

  def _encode_prompt(self, params: Params, tokens: Int[Array, "1 l"]) -> Conditions:
    model: Any = self.network.with_params(params)
    return Conditions(c=model.encode_text(tokens).c, c_null=encode.null_condition(model, tokens.shape[1]))

  def _generate_once(
    self,
    params: Params,
    z_t: Float[Array, "1 h w c"],
    now: DdimCoefficients,
    conditions: Conditions,
    guidance_scale: Float[Array, ""],
  ) -> GenerationStep:
    model: Any = self.network.with_params(params)
    given = dict(c=conditions.c, c_null=conditions.c_null, guidance_scale=guidance_scale)
    return algorithms.generation_step(model, z_t, now, network=self.network, **given)

  def _denoise_once(
    self, params: Params, e_t: Float[Array, "k d"], now: DdimCoefficients, z: Float[Array, "1 h w c"]
  ) -> DdimStep:
    """Take one step. Its x_0 is L2-normalised, to be shown; x_prev, from which the next step starts, is not."""
    model: Any = self.network.with_params(params)
    how = self.model.sampling
    step = algorithms.text_query_step(
      model,
      e_t,
      now,
      z=jnp.broadcast_to(z, (len(e_t), *z.shape[1:])),
      c_null=encode.null_condition(model, self.network.max_length),
      network=self.network,
      guidance_scale=how.guidance,
      normalize_query=how.normalize_query,
    )
    return DdimStep(x_prev=step.x_prev, x_0=losses.unit_norm(step.x_0))


def _finite(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """Return x. Raises UserError: it has numbers that are not finite, of which there is nothing to show."""
  if not np.isfinite(x).all():
    raise UserError(
      "the model gives numbers that are not finite, as after training that diverged; take an earlier checkpoint, --step"
    )
  return x
