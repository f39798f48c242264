"""A trained model's uses: text queries, image queries by denoising, images by denoising. For CLIP, text and image
embeddings.

`Inference` compiles the paper's Algorithms 2 and 3 (method/algorithms.py): evaluation and generation call it with numpy
arrays of any length, whose rows are padded to one batch shape. With several processes each computes its rows of every
batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, Key, UInt8, UInt32

from diffdis_jax import config as run_config
from diffdis_jax.common.params import Params
from diffdis_jax.common.progress import Progress
from diffdis_jax.config.model import ClipModel
from diffdis_jax.config.objectives import ALIGNED, GENERATIVE, WITH_HEAD
from diffdis_jax.config.section import check_number
from diffdis_jax.config.sections import Loss, Sampling
from diffdis_jax.errors import UserError
from diffdis_jax.method import algorithms, features
from diffdis_jax.method.diffdis import DiffDis, to_signed
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.models.clip import Clip
from diffdis_jax.parallel import batches, programs, sharding
from diffdis_jax.run import restore

MOST_ROWS = 2**16  # of a compiled call
ONE_SEED = 1024  # images in a row, from the first on, whose noise has one key; the next have the next one


class Inference:
  """A network with a protocol for its two kinds of sampling, compiled.

  Args:
    network: of a run.
    sampling: how.
    mesh: devices that share the rows of a call, as `sharding.make_mesh` arranges them; all of them by default.
    batch_size: rows a compiled call, as `batches.Batches` has it; by default 64 a chip, on CPUs 64 in all.
    after_batch: called after each compiled call, on every process equally often; what it raises ends the sampling.

  Attributes:
    protocol: how images are embedded: of a DiffDis, how text queries are denoised.
    generation_protocol: how images are.
    image_size: of images, in and out.
    max_length: tokens of a caption.
    shapes: of the parameters.
    aligned: whether it compares images with texts, by a head that was trained.
    duplicate_captions: what equal captions are to each other in its contrastive loss, as config.sections.Loss has it.
    mesh, after_batch: as given.
    batched: runs what `compiled` gives over rows of any number, as `batches.Batches` has it.

  Raises:
    UserError: a batch_size out of its range.
  """

  def __init__(
    self,
    network: Network,
    sampling: Sampling,
    *,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
  ):
    self.network, self.sampling = network, sampling
    self.aligned = network.task.aligned
    self.duplicate_captions = Loss.duplicate_captions
    self.image_size, self.max_length, self.shapes = network.image_size, network.max_length, network.shapes
    # With every figure goes what decides on it, in effect: CLIP denoises nothing, and noise targets are not normalised.
    precision = dict(matmul_precision=network.matmul_precision)
    denoising = dict(
      steps=sampling.steps,
      num_noise_samples=sampling.num_noise_samples,
      guidance=sampling.guidance,
      normalize_query=sampling.normalize_query and network.text_process.target == "data",
    )
    self.protocol: dict[str, Any] = ({} if network.is_clip else denoising) | precision
    self.generation_protocol = dict(steps=sampling.generation_steps, guidance=sampling.generation_guidance, **precision)
    # Whole on each device by default: sampling keeps no optimizer state, and no weights then travel at each step.
    self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1) if mesh is None else mesh
    if batch_size is not None:
      check_number("batch_size", batch_size, ge=1, le=MOST_ROWS)
    self.after_batch = after_batch
    self.batched = batches.Batches(self.mesh, batch_size, after_batch)
    self.batch_size = self.batched.size
    # One program for each public function, compiled at its first call. Parameters are arguments and no constants, so
    # that an evaluation during training takes the newest ones without compiling again.
    self._compiled_embed_texts = self.compiled("text embeddings", self._embed_texts)
    self._compiled_embed_images = self.compiled("image queries", self._embed_images)
    self._compiled_text_features = self.compiled("text features", self._text_features)
    self._compiled_class_logits = self.compiled("class logits", self._class_logits)
    self._compiled_generate = self.compiled("generation", self._generate)
    self._compiled_reconstruct = self.compiled("reconstruction", self._reconstruct)
    self._compiled_moments = self.compiled("the autoencoder's moments", self._moments)
    self._compiled_conditions = self.compiled("text conditions", self._conditions)

  def compiled(self, name: str, f: Callable[..., Any]) -> programs.Program:
    """Return a function of parameters and rows, compiled for the mesh at its first call; `name` is for the log."""

    @functools.wraps(f)
    def of_whole(params: Params, *rows: Any) -> Any:
      # Where the mesh splits parameters: before a loop over steps, each of which would gather them again.
      return f(sharding.gathered(params, self.mesh, dtype=self.network.dtype), *rows)

    return programs.Program(name, jax.jit(self.network.traced_for(self.mesh, of_whole)))

  def embed_texts(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Return text embeddings e, L2-normalised.

    Raises:
      UserError: an autoencoder alone, which reads no text, or tokens that are not `max_length` a row.
    """
    self._require_text(tokens)
    return self.batched(functools.partial(self._compiled_embed_texts, params), tokens)

  def embed_images(
    self,
    params: Params,
    images: UInt8[np.ndarray, "n H W 3"] | Any,
    *,
    seed: int,
    places: Int[np.ndarray, " n"] | None = None,
  ) -> Float[np.ndarray, "n d"]:
    """Return denoised text queries ê_0 from e_T ~ N(0, I), averaged over the noise samples, L2-normalised (Algorithm
    3).

    No caption goes in. Each image's noise depends on the seed and its place alone, not on the batch size or the mesh;
    places are 0, 1, ... by default. For CLIP, what its image encoder gives, L2-normalised, whatever the seed.

    Raises:
      UserError: a run that was not trained to compare images with texts, images that are not one array of uint8 and
        squares of `image_size`, or another number of places than of images.
    """
    self._require(*ALIGNED)
    self._check_images(images)
    if not self.aligned:
      logging.warning("this run's head was initialised at random and never trained: whatever it compares is at chance")
    done = self._progress("embedded", len(images))
    noise = _noise_rows(np.arange(len(images)) if places is None else places, seed)
    return self.batched(functools.partial(self._compiled_embed_images, params), images, *noise, done=done)

  def text_features(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Return sentences as the language-guided head takes them (method/features.py). Raises as `embed_texts`."""
    self._require_text(tokens)
    return self.batched(functools.partial(self._compiled_text_features, params), tokens)

  def class_logits(
    self, params: Params, images: UInt8[np.ndarray, "n H W 3"] | Any, *, seed: int
  ) -> Float[np.ndarray, "n 2 k"]:
    """Return the language-guided head's logits of each image: the visual branch, then the language branch.

    As in its training an image is denoised once, in one step. Its noise is the first sample of `embed_images`.

    Raises:
      UserError: a run without that head, or images as `embed_images` refuses them.
    """
    self._require(*WITH_HEAD)
    self._check_images(images)
    done = self._progress("classified", len(images))
    noise = _noise_rows(np.arange(len(images)), seed)
    return self.batched(functools.partial(self._compiled_class_logits, params), images, *noise, done=done)

  def generate(
    self,
    params: Params,
    tokens: Int[np.ndarray, "n l"],
    noise: Float[np.ndarray, "n h w c"],
    *,
    done: Callable[[int], object] | None = None,
  ) -> UInt8[np.ndarray, "n H W 3"]:
    """Generate images by DDIM with η = 0 from the given initial noise, the whole loop one program (Algorithm 2).

    `done` is called with the number of new images after each call of it; None shows how far it is.

    Raises:
      UserError: a run that was not trained for generation, tokens that are not `max_length` a row, or noise that is not
        of `noise_shape` for each row of them.
    """
    self._require(*GENERATIVE)
    self._check_tokens(tokens)
    self._check_noise(noise, len(tokens))
    noise = np.asarray(noise, np.float32)  # of bf16, or of rows in a list, too
    done = done or Progress("generated", len(tokens), "images").add
    return self.batched(functools.partial(self._compiled_generate, params), tokens, noise, done=done)

  def reconstruct(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Send images through the autoencoder, by the posterior's mode. Raises as `moments`."""
    self._check_images(images)
    return self.batched(functools.partial(self._compiled_reconstruct, params), images)

  def moments(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> BFloat16[np.ndarray, "n h w d"]:
    """Return the autoencoder's posterior, before shift and scale: d = 2c channels, mean, then log-variance.

    Raises:
      UserError: CLIP, which has no autoencoder, or images as `embed_images` refuses them.
    """
    self._check_images(images)
    return self.batched(functools.partial(self._compiled_moments, params), images)

  def conditions(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> BFloat16[np.ndarray, "n l d"]:
    """Return the text condition c of every token. Raises as `embed_texts`."""
    self._require_text(tokens)
    return self.batched(functools.partial(self._compiled_conditions, params), tokens)

  def noise_shape(self) -> tuple[int, int, int]:
    """Return [h, w, c] of one image's initial noise."""
    return self.network.latent_shape

  def noise(self, n: int, seed: int, *, first: int = 0) -> Float[np.ndarray, "n h w c"]:
    """Return initial noise of the images first, first + 1, ...; image i's depends on the seed and i alone."""
    # A key an image, not one for all: asking for more images changes none of those before.
    key, places = jax.random.key(seed), jnp.arange(first, first + n)
    sample = lambda place: jax.random.normal(jax.random.fold_in(key, place), self.noise_shape())
    return np.asarray(jax.vmap(sample)(places))

  def abstract_params(self) -> Params:
    """Return shapes of the parameters, each with its place on the mesh."""
    # With their places, so that a checkpoint is read straight onto the devices, each its own part.
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      self.shapes,
      sharding.shardings(self.shapes, self.mesh, self.shapes),
    )

  def trace(self, name: str) -> jax.stages.Traced:
    """Trace one compiled call of "generation" (generate) or "discrimination" (embed_images), from shapes alone."""
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct(
      (self.batch_size, *shape), dtype, sharding=sharding.batch_sharding(self.mesh)
    )
    params = self.abstract_params()
    if name == "generation":
      tokens, noise = rows(jnp.int32, self.max_length), rows(jnp.float32, *self.network.latent_shape)
      return self._compiled_generate.trace(params, tokens, noise)
    images = rows(jnp.uint8, self.image_size, self.image_size, 3)
    return self._compiled_embed_images.trace(params, images, rows(jnp.uint32), rows(jnp.int32))

  def _progress(self, what: str, n: int) -> Callable[[int], object]:
    """Return what shows the progress of several calls, and nothing of a single one: a page in the browser makes one
    after another, of an image each."""
    return Progress(what, n, "images").add if n > self.batch_size else lambda count: None

  def _require(self, *objectives: str) -> None:
    """Raise UserError for a run that was trained for none of them."""
    if not {*objectives} & {*self.network.objectives}:
      trained = ", ".join(self.network.objectives)
      raise UserError(f"this run was not trained for {objectives[0]}; its objectives are {trained}")

  def _require_text(self, tokens: Any) -> None:
    if self.network.task.is_autoencoder:
      raise UserError("this run is an autoencoder alone, which reads no text; take a run of DiffDis or of CLIP")
    self._check_tokens(tokens)

  def _check_tokens(self, tokens: Any) -> None:
    """Raise UserError for texts, and for tokens of another length: generation reads the padding too."""
    shape, n = getattr(tokens, "shape", None), self.max_length
    if shape is None or tuple(shape[1:]) != (n,):
      what = f"are a {type(tokens).__name__}" if shape is None else f"have shape {tuple(shape)}"
      raise UserError(f"tokens {what}; give (n, {n}), as data.tokenizer.Tokenizer({n}) makes them of a list of texts")

  def _check_noise(self, noise: Any, n: int) -> None:
    """Raise UserError for noise of another shape, of which many networks make an image of another size."""
    shape, expected = tuple(np.shape(noise)), (n, *self.noise_shape())
    if shape != expected:
      raise UserError(f"noise has shape {shape}; these tokens take {expected}, as Inference.noise({n}, seed) gives it")

  def _check_images(self, images: Any) -> None:
    """Raise UserError for numbers of 0 to 1, or of -1 to 1, all of which would be black, and for another size, which
    many networks take and embed badly. What decodes its rows when they are asked for has no dtype, and passes."""
    if isinstance(images, (list, tuple)) or not hasattr(images, "__getitem__"):  # such as one of Pillow's
      raise UserError(f"images are a {type(images).__name__}; give one array, such as numpy.stack of a list of arrays")
    if (dtype := getattr(images, "dtype", np.uint8)) != np.uint8:
      raise UserError(f"images are {dtype}; give uint8 pixels, 0 to 255")
    shape, side = tuple(getattr(images, "shape", ())), self.image_size
    if shape and shape[1:] != (side, side, 3):
      raise UserError(
        f"images have shape {shape}; give (n, {side}, {side}, 3), each as"
        f" data.transforms.resize(data.transforms.decode(bytes of its file), {side}) makes it"
      )

  def _diffdis(self, params: Params) -> DiffDis:
    """Return the DiffDis with these parameters. Raise UserError for CLIP."""
    model = self.network.with_params(params)
    if isinstance(model, Clip):
      raise UserError(
        "this run is a CLIP model, which neither generates images nor encodes them to latents; take a run of DiffDis"
      )
    return model

  def _embed_texts(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b d"]:
    return self.network.with_params(params).encode_text(tokens).e

  def _embed_images(
    self, params: Params, images: UInt8[Array, "b H W 3"], seeds: UInt32[Array, "b"], places: Int[Array, "b"]
  ) -> Float[Array, "b d"]:
    model = self.network.with_params(params)
    if isinstance(model, Clip):
      return model.encode_image(images)
    how, width = self.sampling, self.network.model.query_width
    return algorithms.denoise_text_query(
      model,
      # z = V(x), by the posterior's mode, so that an image's score has no noise but e_T's.
      model.encode_image(images),
      query_noise(_keys(seeds), num_noise_samples=how.num_noise_samples, places=places, width=width),
      network=self.network,
      steps=how.steps,
      guidance_scale=how.guidance,
      normalize_query=how.normalize_query,
    )

  def _text_features(self, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b d"]:
    return features.text_features(self.network.with_params(params), tokens)

  def _class_logits(
    self, params: Params, images: UInt8[Array, "b H W 3"], seeds: UInt32[Array, "b"], places: Int[Array, "b"]
  ) -> Float[Array, "b 2 k"]:
    model = self.network.with_params(params)
    # In training each step has new noise; here it is of the image's place, so that an evaluation can be repeated.
    width = self.network.model.query_width
    noise_e = query_noise(_keys(seeds), num_noise_samples=1, places=places, width=width)[0]
    f = features.image_features(model, images, features.FeatureNoise(noise_e=noise_e), network=self.network)
    logits = model.head(f, model.logit_scale[...])
    return jnp.stack([logits.visual, logits.language], axis=1)

  def _generate(
    self, params: Params, tokens: Int[Array, "b l"], noise: Float[Array, "b h w c"]
  ) -> UInt8[Array, "b H W 3"]:
    how: dict[str, Any] = dict(steps=self.sampling.generation_steps, guidance_scale=self.sampling.generation_guidance)
    return algorithms.generate(self._diffdis(params), tokens, noise, network=self.network, **how)

  def _reconstruct(self, params: Params, images: UInt8[Array, "b H W 3"]) -> UInt8[Array, "b H W 3"]:
    model = self._diffdis(params)
    return model.decode_image(model.encode_image(images))

  def _moments(self, params: Params, images: UInt8[Array, "b H W 3"]) -> BFloat16[Array, "b h w d"]:
    posterior = self._diffdis(params).autoencoder.encode(to_signed(images))
    # In bf16, which halves what a set of stored latents takes.
    return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1).astype(jnp.bfloat16)

  def _conditions(self, params: Params, tokens: Int[Array, "b l"]) -> BFloat16[Array, "b l d"]:
    return self.network.with_params(params).encode_text(tokens).c.astype(jnp.bfloat16)


def _noise_rows(places: Int[np.ndarray, " n"], seed: int) -> tuple[UInt32[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Return for each image the seed of its key, and its place among the images of that key.

  They go in as rows, so that padding and the split over devices leave each image its own noise.
  """
  first = places - places % ONE_SEED
  return (seed + first).astype(np.uint32), (places - first).astype(np.int32)


def _keys(seeds: UInt32[Array, "b"]) -> Key[Array, "b"]:
  return jax.vmap(jax.random.key)(seeds)


def load(
  path: str,
  *,
  step: int | None = None,
  ema: bool = True,
  image_size: int | None = None,
  batch_size: int | None = None,
  mesh: Mesh | None = None,
  **sampling: Any,
) -> tuple[Inference, Params]:
  """Load a run's model and parameters from its workdir.

  Args:
    path: the workdir; or a run in one file, by its path or its name, such as `emoji-small`.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    image_size: image size in pixels; None takes the run's own.
    batch_size: rows per compiled call; by default 64 a chip, on CPUs 64 in all.
    mesh: devices that share the rows of a call, as `parallel.sharding.make_mesh` arranges them; all of them by default.
    sampling: fields of Sampling that replace the run's own.

  Raises:
    UserError: no run or no checkpoint there, one that does not fit its config, an image size that the network cannot
      take, or fields of Sampling for CLIP.
  """
  # From the network's shapes to its parameters in this order: nothing is allocated before the config has been checked.
  run = run_config.load(path)
  changes = {} if image_size is None else {"image_size": image_size}
  if sampling and isinstance(run.model, ClipModel):
    raise UserError(
      f"this run is a CLIP model, which samples nothing; {', '.join(sampling)} has no effect, leave it out"
    )
  run = run.replace(changes | {f"inference.{name}": value for name, value in sampling.items()})
  inference = Inference(Network.of(run), run.inference, batch_size=batch_size, mesh=mesh)
  inference.duplicate_captions = run.loss.duplicate_captions
  # An imported Stable Diffusion has DiffDis' head as it was initialised.
  inference.aligned &= not any(name.startswith("alignment.") for name in restore.initialised(path))
  return inference, restore.restore_params(path, step=step, ema=ema, abstract=inference.abstract_params())
