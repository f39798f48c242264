"""What a trained model does: text queries, image queries by denoising, images by denoising. Of a CLIP, text and image
embeddings.

`draw_images` and `denoise_queries` are the paper's Algorithms 2 and 3. `Inference` compiles them: evaluation and
generation call it with numpy arrays of any length, whose rows are padded to one batch shape. With several processes
each computes its rows of every batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax import config as run_config
from diffdis_jax.common.params import Params
from diffdis_jax.common.progress import Progress
from diffdis_jax.errors import UserError, check_number, read_section
from diffdis_jax.method import encode, guidance, losses, samplers, schedules
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.network import ALIGNED, Network
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import batches, programs, sharding
from diffdis_jax.run import checkpoint

MOST_ROWS = 2**16  # of a compiled call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How to sample; a config's `inference` section.

  Attributes:
    steps: denoising steps of the text query. One, from noise, is the paper's norm (Algorithm 3, Table 6).
    num_noise_samples: draws of the text query's noise to average (not stated by the paper).
    guidance: s of the text query's guidance, where the null condition is the image z = 0; 1 is none.
    normalize_query: of several steps and target `data`, whether each step's ê_0 is normalised before it is fed back:
      the
      process is defined on vectors of length 1, and the loss never sees a length (not stated by the paper). With one
      step, or with target `noise`, it changes nothing.
    generation_steps: DDIM steps of an image.
    generation_guidance: s = 1 + w of an image's guidance.

  Raises:
    UserError: a value out of its range.
  """

  steps: int = 1
  num_noise_samples: int = 1
  guidance: float = 1.0
  normalize_query: bool = True
  generation_steps: int = 50
  generation_guidance: float = 7.5

  def __post_init__(self) -> None:
    check_number("steps", self.steps, at_least=1, at_most=1000)
    check_number("num_noise_samples", self.num_noise_samples, at_least=1)
    check_number("guidance", self.guidance, at_least=0.0)
    check_number("generation_steps", self.generation_steps, at_least=1, at_most=999)
    check_number("generation_guidance", self.generation_guidance, at_least=0.0)


def draw_images(
  model: DiffDis,
  network: Network,
  tokens: Int[Array, "b l"],
  z_T: Float[Array, "b h w c"],
  *,
  steps: int,
  guidance_scale: float,
) -> UInt8[Array, "b H W 3"]:
  """The paper's Algorithm 2: from noise to an image under a caption, by DDIM with η = 0 and guidance."""
  c = model.encode_text(tokens).c
  c_null = model.encode_text(model.text_encoder.null_tokens(tokens.shape[1])).c
  denoise = lambda z_t, t_z, c: model.generation(z_t=z_t, t_z=t_z, c=c)
  z = samplers.sample(
    guidance.guided(denoise, condition=c, null=c_null, scale=guidance_scale),
    z_T,
    schedule=network.image_process.noise,
    timesteps=schedules.leading(steps),
    target=network.image_process.target,
  )
  return model.decode_image(z)


def query_denoiser(
  model: DiffDis,
  network: Network,
  z: Float[Array, "b h w c"],
  *,
  guidance_scale: float,
  normalize_query: bool,
) -> samplers.Denoise:
  """(e_t, t_e) -> ê_0, or with target `noise` ε̂_e, under the condition of the clean latents z. No caption goes in.

  With `normalize_query` and target `data`, ê_0 has length 1 at every step, as e has. With target `noise` it follows
  from e_t and the predicted noise, and stays what it is.
  """
  c_null = model.encode_text(model.text_encoder.null_tokens(network.max_length)).c

  def denoise(e_t: Float[Array, "b d"], t_e: Int[Array, "b"], z: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
    t_z = jnp.full(t_e.shape, network.condition_timestep, jnp.int32)
    c = jnp.broadcast_to(c_null, (len(e_t), *c_null.shape[1:]))
    return model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c)

  predict = guidance.guided(denoise, condition=z, null=jnp.zeros_like(z), scale=guidance_scale)
  if not normalize_query or network.text_process.target != "data":
    return predict
  # After guidance, whose mix of two vectors has any length.
  return lambda e_t, t_e: losses.unit_norm(predict(e_t, t_e))


def denoise_queries(
  model: DiffDis,
  network: Network,
  images: UInt8[Array, "b H W 3"],
  e_T: Float[Array, "k b d"],
  *,
  steps: int,
  guidance_scale: float,
  normalize_query: bool,
) -> Float[Array, "b d"]:
  """The paper's Algorithm 3: from noise to the text query of an image, L2-normalised. No caption goes in.

  Its inner product with a caption's e is their score. One step is one evaluation of the network, at t_e = T - 1. Of k
  draws of the noise the mean is taken (not stated by the paper, which draws once). `normalize_query`: as
  `query_denoiser` takes it.
  """
  z = model.encode_image(images)
  denoise = query_denoiser(model, network, z, guidance_scale=guidance_scale, normalize_query=normalize_query)

  def from_noise(e_T: Float[Array, "b d"]) -> Float[Array, "b d"]:
    e_0 = samplers.sample(
      denoise,
      e_T,
      schedule=network.text_process.noise,
      timesteps=schedules.trailing(steps),
      target=network.text_process.target,
      gamma=network.text_process.gamma,
    )
    return losses.unit_norm(e_0)

  return losses.unit_norm(jax.lax.map(from_noise, e_T).mean(axis=0))


def query_noise(
  key: PRNGKeyArray, *, draws: int, places: Int[Array, "b"], width: int
) -> Float[Array, "{draws} b {width}"]:
  """e_T ~ N(0, I) of the images at these places; each depends on the key, the number of its draw and its place."""

  def noise(draw: Int[Array, ""], place: Int[Array, ""]) -> Float[Array, "d"]:
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, draw), place), (width,))

  return jax.vmap(lambda draw: jax.vmap(functools.partial(noise, draw))(places))(jnp.arange(draws))


class Inference:
  """A network with a protocol for its two kinds of sampling, compiled.

  Args:
    network: of a run.
    sampling: how.
    mesh: devices that share the rows of a call; all of them by default.
    batch_size: rows a compiled call; rounded up to a multiple of the devices.
    after_batch: called after each compiled call, on every process equally often; what it raises ends the sampling.

  Attributes:
    protocol: how images are embedded: of a DiffDis, how text queries are denoised.
    generation_protocol: how images are.
    image_size: of images, in and out.
    max_length: tokens of a caption.
    shapes: of the parameters.
    mesh, after_batch: as given, for what goes on to compute with the images.
  """

  def __init__(
    self,
    network: Network,
    sampling: Sampling,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    after_batch: Callable[[], None] = lambda: None,
  ):
    self.network, self.sampling = network, sampling
    self.image_size, self.max_length, self.shapes = network.image_size, network.max_length, network.shapes
    precision = dict(matmul_precision=network.matmul_precision)
    self._normalize_query = sampling.normalize_query and network.text_process.target == "data"
    denoising = dict(
      steps=sampling.steps,
      num_noise_samples=sampling.num_noise_samples,
      guidance=sampling.guidance,
      normalize_query=self._normalize_query,
    )
    self.protocol: dict[str, Any] = ({} if network.is_clip else denoising) | precision
    self.generation_protocol = dict(steps=sampling.generation_steps, guidance=sampling.generation_guidance, **precision)
    self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1) if mesh is None else mesh
    check_number("batch_size", batch_size, at_least=1, at_most=MOST_ROWS)
    self.after_batch = after_batch
    self._batched = batches.Batches(self.mesh, batch_size, after_batch)
    self.batch_size = self._batched.size
    compiled = lambda name, f: programs.Program(name, jax.jit(network.traced_for(self.mesh, f)))
    self._compiled_embed_texts = compiled("text embeddings", self._embed_texts)
    self._compiled_images = compiled("image queries", self._image_queries)
    self._compiled_text_features = compiled("text features", self._text_features)
    self._compiled_classes = compiled("class logits", self._class_logits)
    self._compiled_drawing = compiled("drawing", self._drawn)
    self._compiled_reconstruction = compiled("reconstruction", self._reconstructed)
    self._compiled_moments = compiled("the autoencoder's moments", self._moments)
    self._compiled_conditions = compiled("text conditions", self._conditions)

  def embed_texts(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Text embeddings e, L2-normalised."""
    return self._batched(functools.partial(self._compiled_embed_texts, params), tokens)

  def embed_images(
    self, params: Params, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int
  ) -> Float[np.ndarray, "n d"]:
    """Denoised text queries ê_0 from e_T ~ N(0, I), averaged over the draws, L2-normalised (Algorithm 3).

    No caption goes in. Each image's noise depends on the seed and its place alone, not on the batch size. Of a CLIP,
    what its vision tower gives, L2-normalised; the seed has no part in it.
    """
    self._require(*ALIGNED)
    places = np.arange(len(images), dtype=np.int32)
    return self._batched(functools.partial(self._compiled_images, params, jax.random.key(seed)), images, places)

  def text_features(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Sentences as the language-guided head takes them (method/encode.py)."""
    return self._batched(functools.partial(self._compiled_text_features, params), tokens)

  def class_logits(
    self, params: Params, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int
  ) -> Float[np.ndarray, "n 2 k"]:
    """What the language-guided head says of each image: the visual branch, then the language branch.

    As in its training an image is denoised once, in one step. Its noise is the first draw's of `embed_images`.
    """
    self._require("long_tail_head")
    places = np.arange(len(images), dtype=np.int32)
    return self._batched(functools.partial(self._compiled_classes, params, jax.random.key(seed)), images, places)

  def generate(
    self,
    params: Params,
    tokens: Int[np.ndarray, "n l"],
    noise: Float[np.ndarray, "n h w c"],
    *,
    done: Callable[[int], object] | None = None,
  ) -> UInt8[np.ndarray, "n H W 3"]:
    """Images by DDIM with η = 0 from the given initial noise, the whole loop one program (Algorithm 2).

    `done` is called with the number of new images after each call of it; None shows how far it is.
    """
    self._require("generation")
    done = done or Progress("drawn", len(tokens), "images").add
    return self._batched(functools.partial(self._compiled_drawing, params), tokens, noise, done=done)

  def reconstruct(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Images through the autoencoder, by the posterior's mode."""
    return self._batched(functools.partial(self._compiled_reconstruction, params), images)

  def moments(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> BFloat16[np.ndarray, "n h w d"]:
    """The autoencoder's posterior, before shift and scale: d = 2c channels, mean, then log-variance."""
    return self._batched(functools.partial(self._compiled_moments, params), images)

  def conditions(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> BFloat16[np.ndarray, "n l d"]:
    """The text condition c of every token."""
    return self._batched(functools.partial(self._compiled_conditions, params), tokens)

  def noise_shape(self) -> tuple[int, int, int]:
    """[h, w, c] of one image's initial noise."""
    return self.network.latent_shape

  def noise(self, n: int, seed: int, *, first: int = 0) -> Float[np.ndarray, "n h w c"]:
    """Initial noise of the images first, first + 1, ...; image i's depends on the seed and i alone."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(first, first + n))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, self.noise_shape()))(keys))

  def abstract_params(self) -> Params:
    """Shapes of the parameters, each with its place on the mesh."""
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      self.shapes,
      sharding.shardings(self.shapes, self.mesh, self.shapes),
    )

  def trace(self, name: str) -> jax.stages.Traced:
    """One compiled call of "generation" (generate) or "discrimination" (embed_images), from shapes alone."""
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct(
      (self.batch_size, *shape), dtype, sharding=sharding.batch_sharding(self.mesh)
    )
    params = self.abstract_params()
    if name == "generation":
      tokens, noise = rows(jnp.int32, self.max_length), rows(jnp.float32, *self.network.latent_shape)
      return self._compiled_drawing.trace(params, tokens, noise)
    images = rows(jnp.uint8, self.image_size, self.image_size, 3)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return self._compiled_images.trace(params, key, images, rows(jnp.int32))

  def _require(self, *objectives: str) -> None:
    """Raises UserError for a run that was trained for none of them."""
    if not {*objectives} & {*self.network.objectives}:
      trained = ", ".join(self.network.objectives)
      raise UserError(f"this run was not trained for {objectives[0]}; its objectives are {trained}")

  def _diffdis(self, params: Params) -> DiffDis:
    """Raises UserError for a CLIP."""
    model = self.network.with_params(params)
    if isinstance(model, Clip):
      raise UserError("this run is a CLIP, which neither draws nor encodes images to latents; take a run of DiffDis")
    return model

  def _embed_texts(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b d"]:
    return self.network.with_params(params).encode_text(tokens).e

  def _image_queries(
    self, params: Params, key: PRNGKeyArray, images: UInt8[Array, "b H W 3"], places: Int[Array, "b"]
  ) -> Float[Array, "b d"]:
    model = self.network.with_params(params)
    if isinstance(model, Clip):
      return model.encode_image(images)
    how = self.sampling
    e_T = query_noise(key, draws=how.num_noise_samples, places=places, width=self.network.model.query_width)
    return denoise_queries(
      model,
      self.network,
      images,
      e_T,
      steps=how.steps,
      guidance_scale=how.guidance,
      normalize_query=self._normalize_query,
    )

  def _text_features(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b d"]:
    return encode.text_features(self.network.with_params(params), tokens)

  def _class_logits(
    self, params: Params, key: PRNGKeyArray, images: UInt8[Array, "b H W 3"], places: Int[Array, "b"]
  ) -> Float[Array, "b 2 k"]:
    model = self.network.with_params(params)
    noise_e = query_noise(key, draws=1, places=places, width=self.network.model.query_width)[0]
    draws = encode.FeatureDraws(noise_e=noise_e)
    f = encode.image_features(model, images, draws, network=self.network)
    logits = model.head(f, model.logit_scale[...])
    return jnp.stack([logits.visual, logits.language], axis=1)

  def _drawn(
    self, params: Params, tokens: Int[Array, "b l"], noise: Float[Array, "b h w c"]
  ) -> UInt8[Array, "b H W 3"]:
    how = self.sampling
    return draw_images(
      self._diffdis(params),
      self.network,
      tokens,
      noise,
      steps=how.generation_steps,
      guidance_scale=how.generation_guidance,
    )

  def _reconstructed(self, params: Params, images: UInt8[Array, "b H W 3"]) -> UInt8[Array, "b H W 3"]:
    model = self._diffdis(params)
    return model.decode_image(model.encode_image(images))

  def _moments(self, params: Params, images: UInt8[Array, "b H W 3"]) -> BFloat16[Array, "b h w d"]:
    posterior = self._diffdis(params).autoencoder.encode(to_signed(images))
    return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1).astype(jnp.bfloat16)

  def _conditions(self, params: Params, tokens: Int[Array, "b l"]) -> BFloat16[Array, "b l d"]:
    return self.network.with_params(params).encode_text(tokens).c.astype(jnp.bfloat16)


def read_sampling(section: Mapping[str, Any], **changes: Any) -> Sampling:
  """A config's `inference` section, with some fields replaced. Raises UserError: a value out of its range."""
  return read_section(Sampling, {**section, **changes}, "inference")


def load(
  path: str,
  *,
  step: int | None = None,
  ema: bool = True,
  image_size: int | None = None,
  batch_size: int = 64,
  mesh: Mesh | None = None,
  **sampling: Any,
) -> tuple[Inference, Params]:
  """A run's model and parameters from its workdir.

  Args:
    path: the workdir.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    image_size: pixels; None takes the run's own.
    batch_size: rows a compiled call.
    mesh: devices that share the rows of a call; all of them by default.
    sampling: fields of Sampling that replace the run's own.

  Raises:
    UserError: no run or no checkpoint there, one that does not fit its config, an image size that the network cannot
      take, or fields of Sampling for a CLIP.
  """
  config = run_config.load(path)
  config.image_size = config.image_size if image_size is None else image_size
  network = Network.of(config)
  if sampling and network.is_clip:
    raise UserError(f"this run is a CLIP, which samples nothing; {', '.join(sampling)} has no effect, leave it out")
  how = read_sampling(config.inference.to_dict(), **sampling)
  inference = Inference(network, how, batch_size=batch_size, mesh=mesh)
  return inference, checkpoint.restore_params(path, step=step, ema=ema, abstract=inference.abstract_params())
