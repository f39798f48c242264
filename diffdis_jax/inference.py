"""What a trained model does, compiled: text queries, image queries by denoising, images by denoising.

Evaluation and generation call it with numpy arrays of any length; rows are padded to one batch shape. With several
processes each computes its rows of every batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, UInt8
from ml_collections import ConfigDict

from diffdis_jax import checkpoint, distributed, losses, sharding, tree, workdir
from diffdis_jax.diffusion import guidance, samplers, schedules
from diffdis_jax.models import build
from diffdis_jax.models.diffdis import to_signed
from diffdis_jax.structs import UserError
from diffdis_jax.tree import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How to sample; a config's `inference` section.

  Attributes:
    steps: denoising steps of the text query. One, from noise, is the paper's norm (Algorithm 3, Table 6).
    draws: draws of the text query's noise to average (not stated by the paper).
    guidance: s of the text query's guidance, where the null condition is the image z = 0; 1 is none.
    generation_steps: DDIM steps of an image.
    generation_guidance: s = 1 + w of an image's guidance.

  Raises:
    UserError: a number of steps or draws out of range.
  """

  steps: int = 1
  draws: int = 1
  guidance: float = 1.0
  generation_steps: int = 50
  generation_guidance: float = 7.5

  def __post_init__(self):
    if self.draws < 1:
      raise UserError(f"inference.draws is {self.draws}; it must be at least 1")
    schedules.trailing(self.steps)
    schedules.leading(self.generation_steps)


class Inference:
  """A config's network with a protocol for its two kinds of sampling.

  Args:
    config: of the run.
    mesh: devices that share the rows of a call; all of them by default.
    batch_size: rows a compiled call; rounded up to a multiple of the devices.
    after_batch: called after each compiled call, on every process equally often; what it raises ends the sampling.
    protocol: fields of Protocol that replace those of `config.inference`.
  """

  def __init__(
    self,
    config: ConfigDict,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    after_batch: Callable[[], None] = lambda: None,
    **protocol: Any,
  ):
    build.check(
      config.model, objectives=config.objectives, image_size=config.image_size, max_length=config.data.max_length
    )
    self.config = config
    self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1) if mesh is None else mesh
    self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
    self._rows = np.array(sharding.local_rows(self.mesh, self.batch_size))
    self._after_batch = after_batch
    self.image_size = config.image_size
    self.max_length = config.data.max_length
    how = Protocol(**{**config.inference, **protocol})
    self.protocol = dict(steps=how.steps, draws=how.draws, guidance=how.guidance)
    self.generation_protocol = dict(steps=how.generation_steps, guidance=how.generation_guidance)
    model = ConfigDict(config.model.to_dict() | {"remat": "none"})  # without a backward pass there is nothing to spare
    self.graphdef, self.abstract = build.abstract(build.make(model, objectives=config.objectives))
    self.shapes = tree.flatten(self.abstract)
    compiled = lambda f: jax.jit(sharding.traced_for(self.mesh, f))
    self._embed_texts = compiled(self._texts)
    self._embed_images = compiled(self._images)
    self._generate = compiled(self._sample)
    self._reconstruct = compiled(self._through_autoencoder)
    self._encode = compiled(self._posterior)
    self._condition = compiled(self._text_condition)

  def embed_texts(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Text queries e, L2-normalised."""
    return self._batched(functools.partial(self._embed_texts, params), tokens)

  def embed_images(
    self, params: Params, images: UInt8[np.ndarray, "n H W 3"], *, seed: int
  ) -> Float[np.ndarray, "n d"]:
    """Denoised text queries ê_0 from e_T ~ N(0, I), averaged over the draws, L2-normalised (the paper's Algorithm 3).

    No caption goes in. Each image's noise depends on the seed and its place alone, not on the batch size.
    """
    self._require("discrimination")
    places = np.arange(len(images), dtype=np.int32)
    return self._batched(functools.partial(self._embed_images, params, jax.random.key(seed)), images, places)

  def generate(
    self, params: Params, tokens: Int[np.ndarray, "n l"], noise: Float[np.ndarray, "n h w c"]
  ) -> UInt8[np.ndarray, "n H W 3"]:
    """Images by DDIM with η = 0 from the given initial noise, the whole loop one program."""
    self._require("generation")
    return self._batched(functools.partial(self._generate, params), tokens, noise)

  def reconstruct(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Images through the autoencoder, by the posterior's mode."""
    return self._batched(functools.partial(self._reconstruct, params), images)

  def moments(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> BFloat16[np.ndarray, "n h w d"]:
    """The autoencoder's posterior, before shift and scale: d = 2c channels, mean, then log-variance."""
    return self._batched(functools.partial(self._encode, params), images)

  def trace(self, name: str) -> jax.stages.Traced:
    """One compiled call of "generation" (generate) or "discrimination" (embed_images), from shapes alone."""
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct(
      (self.batch_size, *shape), dtype, sharding=sharding.batch_sharding(self.mesh)
    )
    params = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      self.shapes,
      sharding.shardings(self.shapes, self.mesh, self.shapes),
    )
    if name == "generation":
      return self._generate.trace(params, rows(jnp.int32, self.max_length), rows(jnp.float32, *self.noise_shape()))
    images = rows(jnp.uint8, self.image_size, self.image_size, 3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return self._embed_images.trace(params, key, images, rows(jnp.int32))

  def conditions(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> BFloat16[np.ndarray, "n l d"]:
    """The text condition c of every token."""
    return self._batched(functools.partial(self._condition, params), tokens)

  def noise_shape(self) -> tuple[int, int, int]:
    """[h, w, c] of one image's initial noise."""
    side = self.image_size // build.latent_factor(self.config.model)
    return side, side, self.config.model.autoencoder.latent_channels

  def noise(self, n: int, seed: int) -> Float[np.ndarray, "n h w c"]:
    """Initial noise of images; image i's depends on the seed and i alone."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, self.noise_shape()))(keys))

  def _require(self, objective: str) -> None:
    if objective not in self.config.objectives:
      trained = ", ".join(self.config.objectives)
      raise UserError(f"this run was not trained for {objective}; its objectives are {trained}")

  def _batched(self, f: Callable[..., Array], *arrays: np.ndarray) -> np.ndarray:
    """f over rows in chunks of one shape, the last one padded by repeating its last row.

    Every process has the same arrays, of which it takes its own rows, and gets the whole result.
    """
    n, size = len(arrays[0]), self.batch_size
    outputs = []
    for start in range(0, n, size):
      rows = np.minimum(start + self._rows, n - 1)
      local = {str(i): array[rows] for i, array in enumerate(arrays)}
      outputs.append(distributed.whole(f(*sharding.to_global(local, self.mesh).values())))
      self._after_batch()
    if not outputs:
      raise UserError("nothing to run on: give at least one row")
    return np.concatenate(outputs)[:n]

  def _model(self, params: Params) -> Any:
    return tree.merge(self.graphdef, self.abstract, params)

  def _through_autoencoder(self, params: Params, images: UInt8[Array, "b H W 3"]) -> UInt8[Array, "b H W 3"]:
    model = self._model(params)
    return model.decode_image(model.encode_image(images))

  def _posterior(self, params: Params, images: UInt8[Array, "b H W 3"]) -> BFloat16[Array, "b h w d"]:
    posterior = self._model(params).autoencoder.encode(to_signed(images))
    return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1).astype(jnp.bfloat16)

  def _text_condition(self, params: Params, tokens: Int[Array, "b l"]) -> BFloat16[Array, "b l d"]:
    return self._model(params).encode_text(tokens).c.astype(jnp.bfloat16)

  def _texts(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b d"]:
    return self._model(params).encode_text(tokens).e

  def _images(
    self, params: Params, key: jax.Array, images: UInt8[Array, "b H W 3"], places: Int[Array, "b"]
  ) -> Float[Array, "b d"]:
    model, text = self._model(params), self.config.text_diffusion
    z = model.encode_image(images)
    c_null = model.encode_text(model.text_encoder.null_tokens(self.max_length)).c
    schedule = schedules.make(text.schedule)
    timesteps = schedules.trailing(self.protocol["steps"])

    def denoise(e_t: Float[Array, "b d"], t_e: Int[Array, "b"], z: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
      t_z = jnp.full(t_e.shape, self.config.condition_timestep, jnp.int32)
      c = jnp.broadcast_to(c_null, (len(e_t), *c_null.shape[1:]))
      return model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c)

    guided = guidance.guided(denoise, condition=z, null=jnp.zeros_like(z), scale=self.protocol["guidance"])

    def draw(index: Int[Array, ""]) -> Float[Array, "b d"]:
      keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, index)))(places)
      e_T = jax.vmap(lambda key: jax.random.normal(key, (build.query_width(self.config.model),)))(keys)
      query = samplers.sample(guided, e_T, schedule=schedule, timesteps=timesteps, target=text.target, gamma=text.gamma)
      return losses.unit_norm(query)

    return losses.unit_norm(jax.lax.map(draw, jnp.arange(self.protocol["draws"])).mean(axis=0))

  def _sample(
    self, params: Params, tokens: Int[Array, "b l"], noise: Float[Array, "b h w c"]
  ) -> UInt8[Array, "b H W 3"]:
    model = self._model(params)
    denoise = lambda z_t, t_z, c: model.generation(z_t=z_t, t_z=t_z, c=c)
    guided = guidance.guided(
      denoise,
      condition=model.encode_text(tokens).c,
      null=model.encode_text(model.text_encoder.null_tokens(tokens.shape[1])).c,
      scale=self.generation_protocol["guidance"],
    )
    z = samplers.sample(
      guided,
      noise,
      schedule=schedules.make(self.config.image_diffusion.schedule),
      timesteps=schedules.leading(self.generation_protocol["steps"]),
      target="noise",
    )
    return model.decode_image(z)


def load(
  path: str, *, step: int | None = None, ema: bool = True, image_size: int | None = None, **protocol: Any
) -> tuple[Inference, Params]:
  """A run's model and parameters from its workdir, for its own image size or another; `protocol` as Inference takes it.

  Raises:
    UserError: no run or no checkpoint there, one that does not fit its config, or an image size that the network cannot
      take.
  """
  config = workdir.load_config(path)
  config.image_size = config.image_size if image_size is None else image_size
  inference = Inference(config, **protocol)
  shapes = tree.flatten(inference.abstract)
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    sharding.shardings(shapes, inference.mesh, shapes),
  )
  return inference, checkpoint.restore_params(path, step=step, ema=ema, abstract=abstract)
