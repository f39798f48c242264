"""Use a trained model: embed texts, embed images by denoising their text query, generate images. CLIP only embeds.

`Inference` compiles the paper's Algorithms 2 and 3 (method/algorithms.py). It takes numpy arrays of any length, whose
rows are padded to one batch shape. With several processes each computes its rows of every batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, Int, UInt8, UInt32

from diffdis_jax import config as run_config
from diffdis_jax.common.params import Params
from diffdis_jax.common.progress import Progress
from diffdis_jax.config.objectives import ALIGNED, GENERATIVE, WITH_HEAD
from diffdis_jax.config.section import check_number
from diffdis_jax.config.sections import Loss, Sampling
from diffdis_jax.errors import UserError
from diffdis_jax.method import algorithms, features, losses
from diffdis_jax.method.diffdis import to_signed
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.parallel import batches, programs, sharding
from diffdis_jax.run import restore

MOST_ROWS = 2**16  # of a compiled call
ONE_SEED = 1024  # images in a row, from the first on, whose noise has one key; the next have the next one


class Inference:
  """A network with its settings for both kinds of sampling, compiled.

  All devices share the rows of a call, unless a mesh is given. `batch_size` and `after_batch` are as `batches.Batches`
  has them.
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
    self.aligned = network.task.aligned  # whether it compares images with texts, by a head that was trained
    self.duplicate_captions = Loss.duplicate_captions  # what equal captions are to each other in its contrastive loss
    self.image_size, self.max_length, self.shapes = network.image_size, network.max_length, network.shapes
    # With every figure goes what decides on it, in effect: CLIP denoises nothing, and noise targets are not normalised.
    precision = dict(matmul_precision=network.matmul_precision)
    denoising = {
      name: getattr(sampling, name) for name in ("steps", "num_noise_samples", "guidance", "normalize_query")
    }
    denoising["normalize_query"] &= network.text_process.target == "data"
    self.protocol: dict[str, Any] = ({} if network.is_clip else denoising) | precision
    self.generation_protocol = dict(steps=sampling.generation_steps, guidance=sampling.generation_guidance, **precision)
    # Whole on each device by default: sampling keeps no optimizer state, and no weights then travel at each step.
    self.mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1) if mesh is None else mesh
    if batch_size is not None:
      check_number("batch_size", batch_size, ge=1, le=MOST_ROWS)
    self.after_batch = after_batch
    self._batched = batches.Batches(self.mesh, batch_size, after_batch)
    self.batch_size = self._batched.size
    self.programs: dict[str, programs.Program] = {}

  def compiled(self, name: str, f: Callable[..., Any]) -> programs.Program:
    """Return f(model, *arrays) as a program of parameters and arrays, which compiles for the mesh at its first call. A
    second call with the same name, which the log shows, returns the same program."""

    # Parameters are arguments and no constants: an evaluation during training takes the newest without compiling again.
    def of_params(params: Params, *arrays: Any) -> Any:
      # Where the mesh splits parameters: before a loop over steps, each of which would gather them again.
      whole = sharding.gathered(params, self.mesh, dtype=self.network.dtype)
      return f(self.network.with_params(whole), *arrays)

    program = programs.Program(name, jax.jit(self.network.tracing(self.mesh)(of_params)))
    return self.programs.setdefault(name, program)

  def over_rows(
    self, name: str, f: Callable[..., Any], params: Params, *rows: Any, whole: Sequence[Any] = (), **how: Any
  ) -> np.ndarray:
    """Return f(model, *whole, *rows) of rows of any number, compiled as `compiled` has it; `how` is for the calls of
    `batches.Batches`."""
    return self._batched(functools.partial(self.compiled(name, f), params, *whole), *rows, **how)

  def embed_texts(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Return text embeddings e, L2-normalised. Raises UserError: no text encoder, or tokens of another length."""
    return self.over_rows("text embeddings", lambda model, x: model.encode_text(x).e, params, self._tokens(tokens))

  def text_features(self, params: Params, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Return sentences as the language-guided head takes them (method/features.py). Raises as `embed_texts`."""
    return self.over_rows("text features", features.text_features, params, self._tokens(tokens))

  def embed_images(self, params: Params, images: Any, *, seed: int) -> Float[np.ndarray, "n d"]:
    """Return denoised text queries ê_0 from e_T ~ N(0, I), averaged over noise samples, L2-normalised (Algorithm 3).

    `images` are u8[n H W 3], squares of `image_size`, or give such rows by index. The noise of each depends on the seed
    and its place alone. Raises UserError: a run that was not trained to compare images with texts, or other images.
    """
    self._require(*ALIGNED)
    if not self.aligned:
      logging.warning("this run's head was initialised at random and never trained: whatever it compares is at chance")
    return self._of_images("image queries", self._image_query, params, images, seed, progress="embedded")

  def class_logits(self, params: Params, images: Any, *, seed: int) -> Float[np.ndarray, "n 2 k"]:
    """Return the language-guided head's logits of each image: the visual branch, then the language branch. As in its
    training an image is denoised once, in one step, from the first noise of `embed_images`, and it raises the same."""
    self._require(*WITH_HEAD)
    return self._of_images("class logits", self._class_logits, params, images, seed, progress="classified")

  def generate(
    self,
    params: Params,
    tokens: Int[np.ndarray, "n l"],
    noise: Float[np.ndarray, "n h w c"],
    *,
    done: Callable[[int], object] | None = None,
  ) -> UInt8[np.ndarray, "n H W 3"]:
    """Generate images by DDIM with η = 0 from the given initial noise, the whole loop one program (Algorithm 2).

    `done` gets the number of new images of each call; None logs the progress. Raises UserError: a run that was not
    trained for generation, or tokens or noise of another shape.
    """
    self._require(*GENERATIVE)
    shape, expected = tuple(np.shape(noise)), (len(self._tokens(tokens)), *self.network.latent_shape)
    if shape != expected:  # many networks would make an image of another size of it
      raise UserError(f"the noise has shape {shape}; these texts and this run need {expected}, [n, h, w, c]")
    noise = np.asarray(noise, np.float32)  # of bf16, or of rows in a list, too
    done = done or self._progress("generated", len(noise))
    return self.over_rows("generation", self._generate, params, tokens, noise, done=done)

  def moments(self, params: Params, images: UInt8[np.ndarray, "n H W 3"]) -> BFloat16[np.ndarray, "n h w d"]:
    """Return the autoencoder's posterior, before shift and scale: d = 2c channels, mean, then log-variance. Raises
    UserError: CLIP, which has no autoencoder, or images as `embed_images` refuses them."""
    if self.network.is_clip:
      raise UserError("this run is a CLIP model, which encodes no latents; take a run of DiffDis")

    def moments(model: Any, images: Array) -> BFloat16[Array, "b h w d"]:
      posterior = model.autoencoder.encode(to_signed(images))
      # In bf16, which halves what a set of stored latents takes.
      return jnp.concatenate([posterior.mean, posterior.log_variance], axis=-1).astype(jnp.bfloat16)

    return self.over_rows("moments", moments, params, self._images(images))

  def noise(self, n: int, seed: int, *, first: int = 0) -> Float[np.ndarray, "n h w c"]:
    """Return initial noise of the images first, first + 1, ...; image i's depends on the seed and i alone."""
    # A key an image, not one for all: asking for more images changes none of those before.
    key, places = jax.random.key(seed), jnp.arange(first, first + n)
    sample = lambda place: jax.random.normal(jax.random.fold_in(key, place), self.network.latent_shape)
    return np.asarray(jax.vmap(sample)(places))

  def abstract_params(self) -> Params:
    """Return shapes of the parameters, each with its place on the mesh, onto which a checkpoint is then read."""
    places = sharding.shardings(self.shapes, self.mesh, self.shapes)
    return {path: x.update(sharding=places[path]) for path, x in self.shapes.items()}

  def trace(self, name: str) -> jax.stages.Traced:
    """Trace one compiled call of "generation" (generate) or "discrimination" (embed_images), from shapes alone."""
    place = sharding.batch_sharding(self.mesh)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((self.batch_size, *shape), dtype, sharding=place)
    if name == "generation":
      arrays = rows(jnp.int32, self.max_length), rows(jnp.float32, *self.network.latent_shape)
    else:
      arrays = rows(jnp.uint8, self.image_size, self.image_size, 3), rows(jnp.uint32), rows(jnp.int32)
    f = self._generate if name == "generation" else self._image_query
    return self.compiled(name, f).trace(self.abstract_params(), *arrays)

  def _of_images(
    self, name: str, f: Callable[..., Any], params: Params, images: Any, seed: int, *, progress: str
  ) -> np.ndarray:
    """Run a function of images, of the seed of each one's key, and of its place among those of that key. All are rows,
    so that padding and the split over devices leave each image its own noise."""
    places = np.arange(len(self._images(images)))
    seeds = (seed + places - places % ONE_SEED).astype(np.uint32)
    rows = images, seeds, (places % ONE_SEED).astype(np.int32)
    return self.over_rows(name, f, params, *rows, done=self._progress(progress, len(places)))

  def _progress(self, what: str, count: int) -> Callable[[int], object]:
    """Return what counts the images of each call. A single call shows no progress: the app makes one after another."""
    return Progress(what, count, "images").add if count > self.batch_size else lambda count: None

  def _noise(self, seeds: UInt32[Array, "b"], places: Int[Array, "b"], count: int) -> Float[Array, "k b d"]:
    keys = jax.vmap(jax.random.key)(seeds)
    return query_noise(keys, num_noise_samples=count, places=places, width=self.network.model.query_width)

  def _image_query(self, model: Any, images: Array, seeds: Array, places: Array) -> Float[Array, "b d"]:
    if self.network.is_clip:
      return model.encode_image(images)
    # z = V(x), by the posterior's mode, so that an image's score has no noise but e_T's.
    how, z = self.sampling, model.encode_image(images)
    noise = self._noise(seeds, places, how.num_noise_samples)
    given: dict[str, Any] = dict(steps=how.steps, guidance_scale=how.guidance, normalize_query=how.normalize_query)
    return algorithms.denoise_text_query(model, z, noise, network=self.network, **given)

  def _class_logits(self, model: Any, images: Array, seeds: Array, places: Array) -> Float[Array, "b 2 k"]:
    # In training each step has new noise; here it is of the image's place, so that an evaluation can be repeated.
    noise = features.FeatureNoise(noise_e=self._noise(seeds, places, 1)[0])
    logits = model.head(features.image_features(model, images, noise, network=self.network), model.logit_scale[...])
    return jnp.stack([logits.visual, logits.language], axis=1)

  def _generate(self, model: Any, tokens: Int[Array, "b l"], noise: Float[Array, "b h w c"]) -> UInt8[Array, "b H W 3"]:
    given: dict[str, Any] = dict(steps=self.sampling.generation_steps, guidance_scale=self.sampling.generation_guidance)
    return algorithms.generate(model, tokens, noise, network=self.network, **given)

  def _require(self, *objectives: str) -> None:
    """Raise UserError for a run that was trained for none of them."""
    if not {*objectives} & {*(own := self.network.objectives)}:
      raise UserError(f"this run was not trained for {objectives[0]}; its objectives are {', '.join(own)}")

  def _tokens(self, tokens: Any) -> Any:
    """Return tokens. Raise UserError for texts, and for tokens of another length: generation reads the padding too."""
    if self.network.task.network == "autoencoder":
      raise UserError("this run is an autoencoder alone, which reads no text; take a run of DiffDis or of CLIP")
    if (shape := getattr(tokens, "shape", ()))[1:] != (self.max_length,):
      what = shape or f"a {type(tokens).__name__}"
      raise UserError(f"tokens are {what}; give (n, {self.max_length}), as Tokenizer({self.max_length}) makes them")
    return tokens

  def _images(self, images: Any) -> Any:
    """Return images. Raise UserError for numbers of 0 to 1, which would be black, and for another size, which many
    networks embed badly. What decodes its rows when they are asked for has neither dtype nor shape, and passes."""
    form = (self.image_size, self.image_size, 3)
    dtype, shape = getattr(images, "dtype", np.uint8), getattr(images, "shape", (0, *form))
    gives_rows = hasattr(images, "__getitem__") and not isinstance(images, (list, tuple))
    if not gives_rows or dtype != np.uint8 or shape[1:] != form:
      what = f"{dtype} {shape}" if hasattr(images, "dtype") else f"a {type(images).__name__}"
      raise UserError(f"images are {what}; give one array of uint8 {('n', *form)}")
    return images


def temperature(params: Params) -> float:
  """Return τ of the contrastive loss, by which cosines become logits; 1 for a run of generation alone."""
  scale = params.get("logit_scale")
  return 1.0 if scale is None else float(losses.temperature(jnp.asarray(jax.device_get(scale))))


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
  """Load a run's model and parameters from its workdir; or a run in one file, by its path or its name.

  None takes the newest checkpoint and the run's own image size in pixels; `ema` takes averaged weights, where the run
  keeps them. `sampling` are fields of Sampling that replace the run's own. `Inference` takes the rest. Raises
  UserError: no run or checkpoint there, one that does not fit its config, or settings that the run cannot take.
  """
  run = run_config.load(path)
  changes: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
  run = run.replace(changes | {f"inference.{name}": value for name, value in sampling.items()})
  network, names = Network.of(run), ", ".join(sampling)
  if sampling and network.is_clip:
    raise UserError(f"this run is a CLIP model, which samples nothing; {names} has no effect, leave it out")
  inference = Inference(network, run.inference, batch_size=batch_size, mesh=mesh)
  inference.duplicate_captions = run.loss.duplicate_captions
  # An imported Stable Diffusion has DiffDis' head as it was initialised.
  inference.aligned &= not any(name.startswith("alignment.") for name in restore.initialised(path))
  return inference, restore.restore_params(path, step=step, ema=ema, abstract=inference.abstract_params())
