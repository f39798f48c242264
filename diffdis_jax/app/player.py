"""A trained model that answers requests step by step, each of its programs in one shape, so that none compiles anew.

The sampler's maths are those of Algorithms 2 and 3 (inference.py), one step a call: what is shown after the last step
is what `Inference` gives.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax import inference
from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import COMPARING, DENOISING, GENERATIVE
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.method import guidance, losses, samplers, schedules
from diffdis_jax.parallel import programs, sharding

ROWS = 8  # noise draws a compiled step
TABS = {  # what each needs a run to be trained for, any of these
  "draw": GENERATIVE,
  "classify": COMPARING,
  "search": COMPARING,
  "inside": DENOISING,
}


def tabs(objectives: Sequence[str]) -> tuple[str, ...]:
  """Those that a run with these objectives can serve. Raises UserError: none."""
  found = tuple(name for name, needed in TABS.items() if {*needed} & {*objectives})
  if not found:
    raise UserError(f"this run's objectives are {', '.join(objectives)}; a page takes a run of DiffDis or CLIP")
  return found


@dataclasses.dataclass(frozen=True)
class Drawing:
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
    queries: ê_0 of each draw of the noise, L2-normalised.
  """

  step: int
  steps: int
  t: int
  queries: Float[np.ndarray, "k d"]


class Player:
  """A run's model on one device, whose programs run in turns: requests side by side each get every so-manieth step.

  Args:
    model: its batch size is that of texts, and of images of a search.
    params: of the same run.
    seconds: that a call may wait for its turn and its result.
  """

  def __init__(self, model: inference.Inference, params: Params, *, seconds: float):
    self.model, self._params, self._seconds = model, params, seconds
    self.network = model.network
    self.tabs = tabs(self.network.objectives)
    self._tokenizer = Tokenizer(model.max_length)
    self._turns = ThreadPoolExecutor(1, thread_name_prefix="model")
    self.closed = threading.Event()
    precision = self.network.matmul_precision
    compiled = lambda name, f: programs.Program(
      name, jax.jit(sharding.traced_for(model.mesh, f, matmul_precision=precision))
    )
    self._conditions = compiled("a prompt's condition", self._encode_prompt)
    self._drawing_step = compiled("a drawing step", self._draw_once)
    self._preview = compiled("previews", self._decode)
    self._latent = compiled("an image's latent", self._encode_image)
    self._query_step = compiled("a step of the text query", self._denoise_once)
    # τ = min(exp(logit_scale), 100) of the contrastive loss; none in a run of generation alone.
    scale = params.get("logit_scale")
    self.temperature = 1.0 if scale is None else float(losses.temperature(jnp.asarray(scale)))

  def call(self, f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), as numpy arrays, when it is this call's turn. Raises UserError: the turn did not come in time."""
    job = self._turns.submit(lambda: jax.tree.map(np.asarray, f(*args)))
    try:
      return job.result(timeout=self._seconds)
    except TimeoutError as error:
      job.cancel()
      raise UserError(f"the model was busy for more than {self._seconds:g} s; try again later") from error

  def close(self) -> None:
    """Ends what still waits for its turn."""
    self.closed.set()
    self._turns.shutdown(wait=True, cancel_futures=True)

  def _tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """In a turn, too: two threads may not use the tokenizer at a time."""
    return self.call(self._tokenizer, texts)

  def text_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """e of each text, L2-normalised."""
    tokens, size = self._tokens(texts), self.model.batch_size
    parts = range(0, len(tokens), size)
    return np.concatenate(
      [self.call(self.model.embed_texts, self._params, tokens[start : start + size]) for start in parts]
    )

  def embed_images(self, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int) -> Float[np.ndarray, "n d"]:
    """The query of each of a batch of images, by the run's own protocol, L2-normalised."""
    return self.call(lambda: self.model.embed_images(self._params, images, seed=seed))

  def image_queries(
    self, image: UInt8[np.ndarray, "H W 3"], *, seed: int, draws: int
  ) -> Iterator[Float[np.ndarray, "k d"]]:
    """After each of the run's own number of steps, ê_0 of each draw of the noise; of a CLIP, its one embedding."""
    if self.network.is_clip:
      yield self.embed_images(image[None], seed=seed)
    else:
      for estimate in self.estimates(image, seed=seed, steps=self.model.sampling.steps, draws=draws):
        yield estimate.queries

  def draw(self, prompt: str, *, seed: int, steps: int, guidance_scale: float, frames: int) -> Iterator[Drawing]:
    """Algorithm 2, shown after the last step and, evenly spread, after `frames` - 1 of the others.

    Raises:
      UserError: a run without generation, no such number of steps, or no turn in time.
    """
    c, c_null = self.call(self._conditions, self._params, self._tokens([prompt]))
    z_t = self.model.noise(1, seed)
    timesteps = schedules.leading(steps)
    process = self.network.image_process
    plan = _rows(samplers.plan(process.noise, timesteps, target=process.target))
    every = math.ceil(steps / frames)
    for i, t in enumerate(timesteps.t):
      z_t, emptied, guided = self.call(
        self._drawing_step, self._params, z_t, t, plan[i], c, c_null, np.float32(guidance_scale)
      )
      if (steps - 1 - i) % every == 0:
        shown = self.call(self._preview, self._params, np.concatenate([z_t, emptied, guided]))
        yield Drawing(i + 1, steps, int(t), *shown)

  def estimates(self, image: UInt8[np.ndarray, "H W 3"], *, seed: int, steps: int, draws: int) -> Iterator[Estimate]:
    """Algorithm 3 from several draws of the noise, after each step. Their mean is what `Inference.embed_images` gives.

    Raises:
      UserError: a run without discrimination, no such number of steps, or no turn in time.
    """
    width = self.network.model.query_width
    blocks = math.ceil(draws / ROWS)
    noise = inference.query_noise(jax.random.key(seed), draws=blocks * ROWS, places=jnp.arange(1), width=width)
    e_t = np.asarray(noise)[:, 0]
    z = self.call(self._latent, self._params, image[None])
    timesteps = schedules.trailing(steps)
    process = self.network.text_process
    plan = _rows(samplers.plan(process.noise, timesteps, target=process.target, gamma=process.gamma))
    for i, t in enumerate(timesteps.t):
      parts = [self.call(self._query_step, self._params, z, rows, t, plan[i]) for rows in np.split(e_t, blocks)]
      e_t, e_0 = (np.concatenate(part) for part in zip(*parts, strict=True))
      yield Estimate(i + 1, steps, int(t), e_0[:draws])

  def warm_up(self) -> None:
    """Runs every program that an answer takes once, so that it is compiled."""
    side = self.network.image_size
    blank = np.zeros((side, side, 3), np.uint8)
    if "draw" in self.tabs:
      list(self.draw("a", seed=0, steps=1, guidance_scale=2.0, frames=1))
    if "classify" in self.tabs:
      self.text_queries(["a"])
      list(self.image_queries(blank, seed=0, draws=1))

  def _decode(self, params: Params, z: Float[Array, "n h w c"]) -> UInt8[Array, "n H W 3"]:
    model: Any = self.network.with_params(params)
    return model.decode_image(z)

  def _encode_image(self, params: Params, image: UInt8[Array, "1 H W 3"]) -> Float[Array, "1 h w c"]:
    model: Any = self.network.with_params(params)
    return model.encode_image(image)

  def _encode_prompt(
    self, params: Params, tokens: Int[Array, "1 l"]
  ) -> tuple[Float[Array, "1 l d"], Float[Array, "1 l d"]]:
    """c of the prompt, and of the empty one."""
    model: Any = self.network.with_params(params)
    null = model.text_encoder.null_tokens(tokens.shape[1])
    return model.encode_text(tokens).c, model.encode_text(null).c

  def _draw_once(
    self,
    params: Params,
    z_t: Float[Array, "1 h w c"],
    t_z: Int[Array, ""],
    now: Float[Array, "3"],
    c: Float[Array, "1 l d"],
    c_null: Float[Array, "1 l d"],
    scale: Float[Array, ""],
  ) -> tuple[Float[Array, "1 h w c"], Float[Array, "1 h w c"], Float[Array, "1 h w c"]]:
    """z at the next timestep; ẑ_0 under the empty prompt; ẑ_0 with guidance."""
    model: Any = self.network.with_params(params)
    process = self.network.image_process
    denoise = lambda z_t, t_z, c: model.generation(z_t=z_t, t_z=t_z, c=c)
    both = guidance.branches(denoise, condition=c, null=c_null)
    t = jnp.full(len(z_t), t_z)
    emptied, conditional = (prediction.astype(z_t.dtype) for prediction in both(z_t, t))
    guided = guidance.mix(emptied, conditional, scale)
    to_data = lambda prediction: schedules.to_data(
      process.noise, z_t, prediction=prediction, target=process.target, t=t, gamma=process.gamma
    )
    return samplers.step(samplers.Coefficients(*now), z_t, prediction=guided), to_data(emptied), to_data(guided)

  def _denoise_once(
    self,
    params: Params,
    z: Float[Array, "1 h w c"],
    e_t: Float[Array, "k d"],
    t_e: Int[Array, ""],
    now: Float[Array, "3"],
  ) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
    """e at the next timestep, and ê_0 by this step, L2-normalised."""
    model: Any = self.network.with_params(params)
    process, how = self.network.text_process, self.model.sampling
    denoise = inference.query_denoiser(
      model,
      self.network,
      jnp.broadcast_to(z, (len(e_t), *z.shape[1:])),
      guidance_scale=how.guidance,
      normalize_query=how.normalize_query,
    )
    t = jnp.full(len(e_t), t_e)
    prediction = denoise(e_t, t).astype(e_t.dtype)
    e_0 = schedules.to_data(process.noise, e_t, prediction=prediction, target=process.target, t=t, gamma=process.gamma)
    return samplers.step(samplers.Coefficients(*now), e_t, prediction=prediction), losses.unit_norm(e_0)


def _rows(plan: samplers.Coefficients) -> Float[np.ndarray, "s 3"]:
  """The three coefficients of each step."""
  return np.stack([plan.x_t, plan.prediction, plan.noise], axis=1)
