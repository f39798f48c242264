"""A trained model in one object: it generates, classifies, ranks and embeds, on PIL images, arrays or files.

  model = diffdis_jax.load("shapes")
  image = model.generate("a purple star")[0]
  model.classify(image, ["purple star", "blue ring"]).labels

The words are those of the PyTorch pipeline that export_weights writes. `inference.load` has more settings.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from scipy import special

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.common import cli
from diffdis_jax.data import transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts as prompt_texts

MOST_ROWS = 32  # of a compiled call
Images = Any  # a PIL image, the path of a file, u8[h w 3] or floats in [0, 1]; an array [n h w 3], or a list of those


class Classification(NamedTuple):
  """The likeliest name of each image, and the softmax over the names of τ ⟨ê_0, e⟩."""

  labels: list[str]
  scores: Float[np.ndarray, "n k"]


class Ranking(NamedTuple):
  """Places of the images in what was given, the nearest to the text first, and their cosines in that order."""

  order: list[int]
  scores: Float[np.ndarray, " n"]


class Pipeline:
  """A trained model with its parameters. `load` makes one of a workdir, or of the name of an included model."""

  def __init__(self, path: str):
    self._model, self._params = inference.load(path, batch_size=1)
    self._tokenize = Tokenizer(self._model.max_length)
    evals = run_config.load(path).evals.values()
    templates = [section.get("templates") for section in evals if section["task"] == "zero_shot"]
    # A text is the path of a file, which may lie on another machine.
    own = (each for each in templates if each and not isinstance(each, str))
    self._templates: Sequence[str] = next(own, prompt_texts.TEMPLATES)
    self._compiled: dict[Any, inference.Inference] = {}  # by rows and settings

  def generate(
    self, prompts: str | Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
  ) -> list[Image.Image]:
    """Generate an image of each prompt (Algorithm 2). Image i's noise depends on the seed and i alone.

    Sampling steps and guidance scale, of which 1 is none, are the run's where they are None. Raises UserError: a run
    that was not trained for generation, or no prompt.
    """
    tokens, own = self._tokenize(_listed("prompts", prompts)), self._model.sampling
    how = own.generation_steps if steps is None else steps, own.generation_guidance if guidance is None else guidance
    model = self._for_rows(len(tokens), generation_steps=how[0], generation_guidance=how[1])
    return [*map(Image.fromarray, model.generate(self._params, tokens, model.noise(len(tokens), seed)))]

  def classify(
    self, images: Images, names: Sequence[str], templates: Sequence[str] | None = None, *, seed: int = 0
  ) -> Classification:
    """Find the likeliest of these class names for each image, by its embedding averaged over templates.

    Templates are prompts with `{}` where the name goes. None takes those of the run's zero-shot evaluation, or else
    CLIP's eight. Raises UserError: as `embed_images`, no name, or a template without a place for it.
    """
    if isinstance(names, str):
      raise UserError(f"names is {names!r}; give a list")
    names = _listed("names", names)
    templates = self._templates if templates is None else _listed("templates", templates)
    prompts = prompt_texts.of_classes(prompt_texts.resolve_templates(templates), names)
    queries = self.embed_images(images, seed=seed)
    classes = prompt_texts.mean_embedding(self.embed_texts(prompts).reshape(-1, len(names), queries.shape[1]))
    scores = special.softmax(inference.temperature(self._params) * queries @ classes.T, axis=-1)
    return Classification([names[i] for i in scores.argmax(axis=-1)], scores)

  def rank(self, images: Images, text: str, *, seed: int = 0) -> Ranking:
    """Order images by how near they are to a text. Raises UserError: as `embed_images`."""
    cosines = self.embed_images(images, seed=seed) @ self.embed_texts(text)[0]
    order = np.argsort(-cosines, kind="stable")
    return Ranking(order.tolist(), cosines[order])

  def embed_images(self, images: Images, *, seed: int = 0) -> Float32[np.ndarray, "n d"]:
    """Return denoised text queries ê_0 of length 1 (Algorithm 3).

    An image of any size is scaled so that its short side fits, and its central square is taken. Its initial noise e_T
    depends on the seed and its place alone. Raises UserError: a run that was not trained for it, or what is no image.
    """
    single = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) == 3
    squares = np.stack([self._square(image) for image in ([images] if single else _listed("images", images))])
    return self._for_rows(len(squares)).embed_images(self._params, squares, seed=seed)

  def embed_texts(self, texts: str | Sequence[str]) -> Float32[np.ndarray, "n d"]:
    """Return text embeddings e of length 1. Raises UserError: no text, or a run that reads none."""
    tokens = self._tokenize(_listed("texts", texts))
    return self._for_rows(len(tokens)).embed_texts(self._params, tokens)

  def _for_rows(self, n: int, **sampling: Any) -> inference.Inference:
    # A call is computed whole, however few its rows are; powers of two, so that few sizes are compiled.
    rows, how = min(MOST_ROWS, 1 << (n - 1).bit_length()), dataclasses.replace(self._model.sampling, **sampling)
    if (rows, how) not in self._compiled:
      model = inference.Inference(self._model.network, how, mesh=self._model.mesh, batch_size=rows)
      model.aligned = self._model.aligned
      self._compiled[rows, how] = model
    return self._compiled[rows, how]

  def _square(self, image: Any) -> UInt8[np.ndarray, "s s 3"]:
    try:
      return np.asarray(transforms.resize(_rgb(image), self._model.image_size))
    except Exception as error:  # Pillow raises whatever a damaged file leads it into
      what = f"the image {image}" if isinstance(image, (str, os.PathLike)) else "an image"
      raise UserError(f"{what} cannot be used: {error}") from error


def load(path: str | os.PathLike[str]) -> Pipeline:
  """Load a trained model from the workdir of a run, or by the name of an included one, such as `shapes`. Raises
  UserError: no run there."""
  cli.compilation_cache()
  return Pipeline(os.fspath(path))


def _listed(what: str, values: Any) -> list[Any]:
  if not (listed := [values] if isinstance(values, str) else [*values]):
    raise UserError(f"{what} is empty; give at least one")
  return listed


def _rgb(image: Any) -> Image.Image:
  if isinstance(image, (str, os.PathLike)):
    return transforms.decode(pathlib.Path(image).read_bytes()).image
  if isinstance(image, Image.Image):
    return transforms.upright_rgb(image)
  array = np.asarray(image)
  if array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(f"its shape is {array.shape}; give an array [h, w, 3]")
  if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
    array = np.rint(array * 255).astype(np.uint8)
  if array.dtype != np.uint8:
    raise ValueError(f"its numbers are {array.dtype}; give uint8, or floats from 0 to 1")
  return Image.fromarray(np.ascontiguousarray(array))
