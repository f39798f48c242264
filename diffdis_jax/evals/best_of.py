"""Generated images as the model's own head ranks them: the best of several, and the worst of all.

One network generates and compares, so that it can choose among its own images. Not the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from diffdis_jax.common import files
from diffdis_jax.common.params import Params
from diffdis_jax.common.progress import Progress
from diffdis_jax.config.section import check_number
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import samples
from diffdis_jax.method import algorithms, encode, samplers, schedules
from diffdis_jax.method.samplers import DdimCoefficients
from diffdis_jax.method.step_noise import query_noise
from diffdis_jax.parallel import processes

MOST = 64  # images of a prompt; and worst ones that are kept
FAILURES = "PNG to write: the generated images that the run's own head ranks lowest, with their scores and prompts"


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A generated image, its prompt as the network reads it, and the head's score of the two."""

  score: float
  prompt: str
  image: UInt8[np.ndarray, "H W 3"]


class BestOf:
  """An inference whose `generate` makes several images of each prompt and keeps the one that the head ranks first.

  All else is the inference's own. Images are ranked by the similarity of their denoised query and the prompt's
  embedding; equal ones by the order in which they are made, of which the first is what is made without this.

  Args:
    inference: of a run with a head.
    best_of: images of each prompt, of which the best by the run's own head is kept.
    best_at: share of the sampling steps after which the best is chosen, and only that one is finished; 1 chooses
      among finished images.

  Attributes:
    lowest: the images that rank lowest among those that were kept, the lowest first.

  Raises:
    UserError: a number out of its range, or a run without a trained head.
  """

  def __init__(self, inference: Any, best_of: int = 1, best_at: float = 1.0):
    check_number("best_of", best_of, ge=1, le=MOST)
    check_number("best_at", best_at, gt=0.0, le=1.0)
    if best_of == 1 and best_at != 1:
      raise UserError(f"best_at is {best_at}, and of one image none is chosen; give --best_of too")
    if not inference.aligned:
      raise UserError("this run has no trained head, which ranks its images; leave out --best_of and --failures")
    self._inference, self._count, self.lowest = inference, best_of, []
    steps = inference.sampling.generation_steps
    self._begun = max(1, round(best_at * steps))  # steps after which the best is chosen
    self.is_early = best_of > 1 and self._begun < steps
    chosen = {"best_of": best_of, "best_at": self._begun / steps if self.is_early else 1.0}
    chosen["ranked_by"] = inference.protocol  # another way to embed images chooses others
    # Without a choice the protocol is the inference's, and so are the images.
    self.generation_protocol = inference.generation_protocol | (chosen if best_of > 1 else {})
    if self.is_early:
      logging.warning("--best_at=%s: the head was trained on clean images, and ranks half-way ones less well", best_at)
      self._halves = _Halves(inference, self._begun)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inference, name)

  def noise_shape(self) -> tuple[int, ...]:
    """Of one prompt's initial noise: [h, w, c], or [k, h, w, c] for the best of k."""
    shape = self._inference.noise_shape()
    return shape if self._count == 1 else (self._count, *shape)

  def noise(self, n: int, seed: int, *, first: int = 0) -> Float[np.ndarray, "n *k h w c"]:
    """Initial noise, of which the first for each prompt is the inference's own."""
    return self._inference.noise(n, seed, first=first, candidates=self._count)

  def generate(
    self,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n l"],
    noise: Float[np.ndarray, "n *k h w c"],
    *,
    done: Callable[[int], object] | None = None,
    places: Int[np.ndarray, " n"] | None = None,
  ) -> UInt8[np.ndarray, "n H W 3"]:
    """As the inference's, of each prompt the best image. `done` is called with the numbers of all that are made;
    `places` decide the noise by which images are compared with their prompts, as in `similarity`."""
    done = done or Progress("generated", len(tokens) * self._count, "images").add
    places = np.arange(len(tokens)) if places is None else places
    score = functools.partial(similarity, self._inference, params, tokens=tokens, places=places)
    if self.is_early:
      images = self._halves(params, tokens, noise, places, done=done)
      scores = score(images)
    else:
      # One after the other, so that two images of a prompt are in memory, however many there are.
      first, *others = [noise] if self._count == 1 else np.moveaxis(noise, 1, 0)
      images = self._inference.generate(params, tokens, first, done=done)
      scores = score(images)
      for each in others:
        further = self._inference.generate(params, tokens, each, done=done)
        of_further = score(further)
        better = of_further > scores
        images = np.where(better[:, None, None, None], further, images)
        scores = np.where(better, of_further, scores)
    self._keep(images, tokens, scores)
    return images

  def _keep(
    self, images: UInt8[np.ndarray, "n H W 3"], tokens: Int[np.ndarray, "n l"], scores: Float[np.ndarray, " n"]
  ) -> None:
    decode = Tokenizer(self._inference.max_length).decode
    worst = np.argsort(scores, kind="stable")[:MOST]
    found = [Ranked(float(scores[i]), decode(tokens[i]), images[i]) for i in worst]
    self.lowest = sorted([*self.lowest, *found], key=lambda ranked: ranked.score)[:MOST]

  def write_lowest(self, path: str) -> None:
    """A grid of them as a PNG, each with its score and prompt, on process 0. Raises UserError: it cannot be written."""
    if not self.lowest:
      logging.warning("nothing was generated, and so there is no --failures=%s", path)
    if not self.lowest or not processes.is_first():
      return
    captions = [f"{ranked.score:.3f} {ranked.prompt}" for ranked in self.lowest]
    samples.save_grid(np.stack([ranked.image for ranked in self.lowest]), captions, path)


def check_failures(path: str | None) -> None:
  """Raises UserError for a --failures that is no PNG, or that cannot be written; nothing for none."""
  if not path:
    return
  if not path.endswith(".png"):
    raise UserError(f"--failures={path} should name the picture to write, such as failures.png")
  if processes.is_first():
    files.check_out(path, "failures")


def similarity(
  inference: Any,
  params: Mapping[str, Any],
  images: UInt8[np.ndarray, "n H W 3"],
  tokens: Int[np.ndarray, "n l"],
  places: Int[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " n"]:
  """⟨ê_0, e⟩ of each image and its own prompt, as Algorithm 3 gives it: what the run's head says of its own images.

  Noise is of an image's place alone, so that all images of a prompt have the same; as `Inference.embed_images` has it.
  """
  q = inference.embed_images(params, images, seed=0, places=places)
  return _inner(q, _embed_prompts(inference, params, tokens))


def _embed_prompts(
  inference: Any, params: Mapping[str, Any], tokens: Int[np.ndarray, "n l"]
) -> Float[np.ndarray, "n d"]:
  different, places = np.unique(tokens, axis=0, return_inverse=True)
  return inference.embed_texts(params, different)[places.ravel()]


def _inner(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
  return (a * b).sum(axis=1)


def _steps(coefficients: DdimCoefficients, part: slice) -> DdimCoefficients:
  """Some of a sampler's steps."""
  return jax.tree.map(lambda x: x[part], coefficients)


class _Halves:
  """Algorithm 2 in two parts, between which the best of several is chosen: three programs of an inference.

  The head reads ẑ_0, what the last step took the image for, as if it were clean.
  """

  def __init__(self, inference: Any, begun: int):
    self._inference, network, how = inference, inference.network, inference.sampling
    self._batched = inference.batched
    all_steps = samplers.ddim_coefficients(network.image_process, schedules.leading(how.generation_steps))
    first, rest = (_steps(all_steps, slice(*part)) for part in ((begun - 1,), (begun, None)))
    (last,) = _steps(all_steps, slice(begun - 1, begun)).each()
    guidance = dict(network=network, guidance_scale=how.generation_guidance)

    def begin(params: Params, tokens: Int[Array, "b l"], z_T: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
      model: Any = network.with_params(params)
      z_t = algorithms.denoise_latents(model, tokens, z_T, first, **guidance)
      c, c_null = model.encode_text(tokens).c, encode.null_condition(model, tokens.shape[1])
      step = algorithms.generation_step(model, z_t, last, c=c, c_null=c_null, **guidance)
      return jnp.concatenate([step.z_prev, step.z_0], axis=-1)

    def finish(params: Params, tokens: Array, z_t: Array) -> UInt8[Array, "b H W 3"]:
      model: Any = network.with_params(params)
      return model.decode_image(algorithms.denoise_latents(model, tokens, z_t, rest, **guidance))

    def query(params: Params, key: PRNGKeyArray, z: Array, places: Int[Array, "b"]) -> Float[Array, "b d"]:
      model: Any = network.with_params(params)
      e_T = query_noise(key, num_noise_samples=how.num_noise_samples, places=places, width=network.model.query_width)
      settings = dict(steps=how.steps, guidance_scale=how.guidance, normalize_query=how.normalize_query)
      return algorithms.denoise_text_query(model, z, e_T, network=network, **settings)

    self._begin, self._finish = inference.compiled("first steps", begin), inference.compiled("last steps", finish)
    self._query = inference.compiled("half-way queries", query)

  def __call__(
    self,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "n l"],
    noise: Float[np.ndarray, "n k h w c"],
    places: Int[np.ndarray, " n"],
    *,
    done: Callable[[int], object],
  ) -> UInt8[np.ndarray, "n H W 3"]:
    n, k, *shape = noise.shape
    every = np.repeat(tokens, k, axis=0), noise.reshape(n * k, *shape)
    z = self._batched(functools.partial(self._begin, params), *every, done=done)
    z_t, z_0 = np.split(z, 2, axis=-1)
    rows = z_0, np.repeat(places.astype(np.int32), k)
    q = self._batched(functools.partial(self._query, params, jax.random.key(0)), *rows)
    e = np.repeat(_embed_prompts(self._inference, params, tokens), k, axis=0)
    best = _inner(q, e).reshape(n, k).argmax(axis=1)
    chosen = z_t.reshape(n, k, *shape)[np.arange(n), best]
    return self._batched(functools.partial(self._finish, params), tokens, chosen)
