"""Answer the tabs' requests by tuples of values for Gradio's components, the first of which is a line of text.

The contents of a request are checked here: uploads, texts, numbers, and the time that it takes.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from scipy import special

from diffdis_jax.app.step_sampler import StepSampler
from diffdis_jax.config.section import check_number
from diffdis_jax.data import image_files, records
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts

MOST_STEPS = 200
MOST_GUIDANCE = 30
MOST_SEED = 2**31 - 1
DECODING = 5  # seconds of CPU time for decoding an image
MOST_CHARACTERS = 500  # limit for a prompt, a class name or a template
MOST_NAMES = 200  # limit for the class names of a request
MOST_MEGAPIXELS = 25  # limit for an uploaded image; decoded, a pixel takes up to 4 bytes
MOST_IMAGES = 8
FRAMES = 20  # steps that an answer shows; decoding a latent costs about as much as a step
FOUND = 12  # images in the result of a search
SEARCH_SEED = 0  # seed of the noise for embedding the searched images

T = TypeVar("T")
Path = str | os.PathLike[str] | None
Captioned = tuple[np.ndarray, str]

# Decode in a process of its own, which the kernel ends after this many seconds of CPU time: a thread cannot be ended.
_DECODER = """
import math, resource, sys
from diffdis_jax.data import records, transforms
used = math.ceil(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
resource.setrlimit(resource.RLIMIT_CPU, (used + int(sys.argv[2]),) * 2)
try:
  image = transforms.resize(records.read_image(sys.stdin.buffer.read()), int(sys.argv[1]))
except records.Unusable as error:
  sys.exit(str(error))
sys.stdout.buffer.write(image.convert("RGB").tobytes())
"""


def generate(
  sampler: StepSampler, prompt: str | None, images: Any, seed: Any, steps: Any, guidance_scale: Any
) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line of text and the images so far, one after another, after each step that is shown.

  Raises UserError: a field out of its range, or the time is over.
  """
  prompt = read_text(prompt, "prompt")
  number = read_whole("images", images, at_least=1, at_most=MOST_IMAGES)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_STEPS)
  check_number("guidance", guidance_scale, ge=0, le=MOST_GUIDANCE)
  remaining = sampler.tokenizer.cut(prompt)
  too_long = "" if remaining is None else f" The prompt is too long for this model, which reads: {remaining}"
  how: Any = dict(steps=whole_steps, guidance_scale=float(guidance_scale), frames=-(-FRAMES // number))
  frames = (frame for place in range(number) for frame in sampler.generate(prompt, seed=whole_seed, place=place, **how))
  done: list[Captioned] = []
  for frame in within(sampler.seconds, frames):
    line = f"Image {len(done) + 1} of {number}, step {frame.step} of {whole_steps}, t = {frame.t}."
    shown = [*done, (frame.image, prompt)]
    if frame.step == whole_steps:
      done, line = shown, f"{len(shown)} of {number}, seed {whole_seed}, {whole_steps} steps."
    yield line + too_long, shown


def classify(
  sampler: StepSampler, path: Path | np.ndarray, names: str | None, template: str | None, seed: Any
) -> Iterator[tuple[str, dict[str, float]]]:
  """Yield the likeliest name and each name's share, the softmax over τ ⟨ê_0, e⟩. `path` is an upload, or the image
  itself.

  Raises UserError: no usable image, or a field out of its range.
  """
  classes, filled = read_names(names), read_template(template)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  square = path if isinstance(path, np.ndarray) else read_square(path, sampler.network.image_size)
  texts = sampler.text_queries([prompts.fill(filled, name) for name in classes])
  query = sampler.embed_images(square[None], seed=whole_seed)[0]
  shares = special.softmax(sampler.temperature * query @ texts.T)
  best = int(shares.argmax())
  yield f"{classes[best]}: {shares[best]:.1%}.", dict(zip(classes, shares.tolist(), strict=True))


def likeliest(answer: Any, template: str | None) -> str:
  """Return the prompt of the likeliest name, of an answer as the page shows it. Raises UserError: there is none."""
  if not isinstance(answer, dict) or not isinstance(answer.get("label"), str):
    raise UserError("there is no likeliest name yet; classify an image")
  return prompts.fill(read_template(template), answer["label"])


class Index:
  """The first `num_images` of a data source, or all, with their queries, which `fill` embeds while the page runs.

  Raises UserError: the source has no record.
  """

  def __init__(self, sampler: StepSampler, source: Any, num_images: int | None):
    self._sampler, self._source = sampler, source
    self._indices = base.subset(len(source), num_images)
    self._images = base.Images(source, self._indices, sampler.network.image_size)
    self._parts: list[Float[np.ndarray, "b d"]] = []
    self._error = ""

  def fill(self) -> None:
    """Embed all images, batch by batch, until the page ends. Searches report images that cannot be read."""
    size = self._sampler.model.batch_size
    try:
      for start in range(0, len(self._images), size):
        batch = self._images[np.arange(start, min(start + size, len(self._images)))]
        self._parts.append(self._sampler.embed_images(batch, seed=SEARCH_SEED + start))
      logging.info("%d images can be searched", len(self._images))
    except (UserError, OSError, RuntimeError) as error:
      self._error = str(error)
      if not self._sampler.closed.is_set():
        logging.warning("the search ends after %d images: %s", sum(map(len, self._parts)), error)

  def nearest(self, query: Float[np.ndarray, " d"], count: int) -> dict[int, float]:
    """Return {index: inner product} of the embedded images with the highest inner products, best first. Raises
    UserError: no image is embedded yet."""
    if not self._parts:
      raise UserError(self._error or "no image is embedded yet; try again in a moment")
    scores = np.concatenate([*self._parts]) @ query
    return {int(place): float(scores[place]) for place in np.argsort(-scores, kind="stable")[:count]}

  def read(self, place: int) -> Captioned:
    """Read an image's central square, and its caption, class or key. Raises UserError: it cannot be read."""
    try:
      fields, image = base.fields(self._source, self._indices[place]), self._images[np.array([place])][0]
    except OSError as error:  # the storage was there when the page began
      raise UserError(f"an image cannot be read: {error}; try again later") from error
    names = (value for name in ("caption", "class", "key") if isinstance(value := fields.get(name), str))
    return image, next(names, "")

  def state(self) -> str:
    """Say how many images are embedded."""
    done, total = sum(map(len, self._parts)), len(self._indices)
    if done == total:
      return f"{total:,} images are searched."
    return f"{done:,} of {total:,} images are searched so far. {self._error}".strip()


def search_text(sampler: StepSampler, index: Index, text: str | None) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line of text and the images that fit a search text best. Raises UserError: no text, or nothing embedded
  yet."""
  yield _nearest(index, sampler.text_queries([read_text(text, "text")])[0])


def search_image(sampler: StepSampler, index: Index, path: Path) -> Iterator[tuple[str, list[Captioned]]]:
  """Yield a line of text and the images nearest to an upload. Raises UserError: no usable image, or nothing embedded
  yet."""
  square = read_square(path, sampler.network.image_size)
  yield _nearest(index, sampler.embed_images(square[None], seed=SEARCH_SEED)[0])


def _nearest(index: Index, query: Float[np.ndarray, " d"]) -> tuple[str, list[Captioned]]:
  captioned = [(*index.read(place), score) for place, score in index.nearest(query, FOUND).items()]
  return index.state(), [(image, f"{name} ({score:.3f})") for image, name, score in captioned]


def read_square(path: str | os.PathLike[str] | None, side: int) -> UInt8[np.ndarray, "s s 3"]:
  """Return the central square of an uploaded image, upright, as evaluations crop it.

  Raises UserError: no file, too many pixels, not an image, or too slow to decode.
  """
  if path is None:
    raise UserError("there is no image yet; upload one, or pick one where some are shown")
  try:
    data = pathlib.Path(path).read_bytes()
  except FileNotFoundError as error:  # it was deleted while its request waited
    raise UserError("the upload has been deleted; upload it again") from error
  if not data:
    raise UserError("the file is empty; upload an image, such as a PNG or a JPEG")
  limit = f"at most {MOST_MEGAPIXELS} million"
  # Count pixels before decoding: a file of a few kB can decode to gigabytes (a decompression bomb).
  try:
    header = records.read_header(data)
  except records.Unusable as error:
    formats = f"{', '.join(image_files.FORMATS[:-1])} or {image_files.FORMATS[-1]}"
    raise UserError(f"the file shows no image that can be read: {error}; {limit} pixels of {formats} can be") from error
  if header.width * header.height > MOST_MEGAPIXELS * 1e6:
    raise UserError(f"the image has {header.width:,} x {header.height:,} pixels; {limit} can be")
  command = [sys.executable, "-c", _DECODER, str(side), str(DECODING)]
  done = subprocess.run(command, input=data, capture_output=True)
  if done.returncode == 1:
    reason = done.stderr.decode(errors="replace").strip().splitlines()[-1]
    raise UserError(f"the file cannot be used: {reason}; upload an image, such as a PNG or a JPEG")
  if done.returncode:
    raise UserError(f"the image takes more than {DECODING} s to decode; save it again, such as a plain PNG or JPEG")
  return np.frombuffer(done.stdout, np.uint8).reshape(side, side, 3)


def read_text(text: str | None, what: str) -> str:
  """Return a text without surrounding white space; `what` names it in messages. Raises UserError: none, or too long."""
  text = (text or "").strip()
  if not text:
    raise UserError(f"there is no {what} yet; type one")
  if len(text) > MOST_CHARACTERS:
    raise UserError(f"the {what} has {len(text):,} characters; at most {MOST_CHARACTERS} are read")
  return text


def read_names(text: str | None) -> tuple[str, ...]:
  """Split class names at commas or line ends. Raises UserError: too few or too many names, a repeated name, or a long
  one."""
  names = tuple(name.strip() for name in re.split(r"[,\n]", text or "") if name.strip())
  if not 2 <= len(names) <= MOST_NAMES:
    raise UserError(f"there are {len(names)} class names; type 2 to {MOST_NAMES}, with commas between them")
  for name in names:
    read_text(name, "class name")
  # Names that differ only in case have the same text query, and would halve each other's share.
  if repeated := prompts.repeated_names([prompts.comparable(name) for name in names]):
    raise UserError(f"class names occur more than once: {prompts.listed(repeated)}; type each once")
  return names


def read_template(text: str | None) -> str:
  """Return a prompt template. Raises UserError: none, too long, or without a place for the class name."""
  return prompts.resolve_templates((read_text(text, "template"),))[0]


def read_whole(name: str, value: Any, *, at_least: int, at_most: int) -> int:
  """Return the whole number of a slider or a field. Raises UserError: not a whole number, or out of its range."""
  check_number(name, value, ge=at_least, le=at_most)
  if value != int(value):  # Gradio sends 3.0 for 3
    raise UserError(f"{name} is {value}; it must be a whole number")
  return int(value)


def within(seconds: float, items: Iterable[T]) -> Iterator[T]:
  """Yield items until the time is over. Raises UserError then."""
  end = time.monotonic() + seconds
  for item in items:
    yield item
    # Check between items: a running step cannot be stopped, and its result is shown.
    if time.monotonic() > end:
      raise UserError(f"this took longer than {seconds:g} s and was stopped; take fewer steps")
