"""What a request may ask for: sizes of uploads and texts, and for how long. No jax."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from PIL import Image

from diffdis_jax.config.section import check_number
from diffdis_jax.data import image_files, records
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Of one request, and of how many there may be.

  Attributes:
    upload_mb: of an uploaded file, 10^6 bytes.
    uploads_mb: of all uploads that are kept, 10^6 bytes; the oldest are deleted. As many may be received at a time.
    megapixels: of an uploaded image, 10^6. Decoded, one takes up to 4 bytes.
    characters: of a prompt, a class name or a template.
    names: class names of a request.
    seconds: after which a request is ended.
    at_once: requests that are answered at a time; the model takes turns between them.
    waiting: requests that wait for that; further ones are refused.

  Raises:
    UserError: a value out of its range.
  """

  upload_mb: float = 10.0
  uploads_mb: float = 100.0
  megapixels: float = 25.0
  characters: int = 500
  names: int = 200
  seconds: float = 120.0
  at_once: int = 4
  waiting: int = 64

  def __post_init__(self) -> None:
    for name in ("upload_mb", "megapixels", "seconds"):
      check_number(name, getattr(self, name), gt=0)
    # Else the quota would delete an upload before its request reads it.
    check_number("uploads_mb", self.uploads_mb, ge=self.upload_mb)
    for name in ("characters", "names", "at_once", "waiting"):
      check_number(name, getattr(self, name), ge=1)


def read_image(path: str | os.PathLike[str] | None, limits: Limits) -> Image.Image:
  """An uploaded file as an upright RGB image. Its pixels are counted before they are decoded.

  Raises:
    UserError: no file, too many bytes or pixels, or one that shows no image.
  """
  if path is None:
    raise UserError("there is no image yet; upload one, or pick one where some are shown")
  try:
    # Before it is read, whatever the server has refused already: its limit is of a form, not of the file in it.
    size = os.path.getsize(path)
    if size > limits.upload_mb * 1e6:
      raise UserError(f"the file has {size / 1e6:.1f} MB; at most {limits.upload_mb:g} MB can be uploaded")
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    # The quota may have deleted it while its request waited.
    raise UserError(f"the upload cannot be read ({error.strerror or error}); upload it again") from error
  if not data:
    raise UserError("the file is empty; upload an image, such as a PNG or a JPEG")
  # A file of some kB can decode to gigabytes (a decompression bomb): the header says so before.
  _check_pixels(data, limits)
  try:
    return records.read_image(data)
  except records.Unusable as error:
    raise UserError(f"the file cannot be used: {error}; upload an image, such as a PNG or a JPEG") from error


def _check_pixels(data: bytes, limits: Limits) -> None:
  """Raises UserError by the file's header alone."""
  most = f"at most {limits.megapixels:g} million"
  try:
    header = records.read_header(data)
  except records.Unusable as error:
    formats = f"{', '.join(image_files.FORMATS[:-1])} or {image_files.FORMATS[-1]}"
    raise UserError(f"the file shows no image that can be read: {error}; {most} pixels of {formats} can be") from error
  if header.width * header.height > limits.megapixels * 1e6:
    raise UserError(f"the image has {header.width:,} x {header.height:,} pixels; {most} can be")


def read_text(text: str | None, what: str, limits: Limits) -> str:
  """The text without surrounding white space; `what` names it in the message.

  Raises:
    UserError: none, or too long.
  """
  text = (text or "").strip()
  if not text:
    raise UserError(f"there is no {what} yet; type one")
  if len(text) > limits.characters:
    raise UserError(f"the {what} has {len(text):,} characters; at most {limits.characters} are read")
  return text


def read_names(text: str | None, limits: Limits, *, at_least: int = 2) -> tuple[str, ...]:
  """Class names, between commas or on lines of their own.

  Raises:
    UserError: too few, too many, one twice, or one too long.
  """
  text = text or ""
  # Before it is split: a million characters may be half a million names.
  if len(text) > limits.names * limits.characters:
    raise UserError(f"the class names have {len(text):,} characters; type shorter ones, or fewer")
  names = tuple(name.strip() for name in re.split(r"[,\n]", text) if name.strip())
  for name in names:
    read_text(name, "class name", limits)
  # Names that differ in case alone have one text query, and would halve each other's share.
  if repeated := prompts.repeated([prompts.comparable(name) for name in names]):
    raise UserError(f"class names occur more than once: {repeated}; type each once")
  if not at_least <= len(names) <= limits.names:
    raise UserError(f"there are {len(names)} class names; type {at_least} to {limits.names}, with commas between them")
  return names


def read_template(text: str | None, limits: Limits) -> str:
  """A prompt template. Raises UserError: none, too long, or without a place for the class name."""
  return prompts.resolve_templates((read_text(text, "template", limits),))[0]


def read_whole(name: str, value: Any, *, at_least: int, at_most: int) -> int:
  """A number of a slider or a field. Raises UserError: no whole number, or out of its range."""
  check_number(name, value, ge=at_least, le=at_most)
  # After the range, which NaN is outside of: int() raises for it. Gradio sends 3.0 for 3.
  if value != int(value):
    raise UserError(f"{name} is {value}; it must be a whole number")
  return int(value)


def within(seconds: float, items: Iterable[T], *, begun: float | None = None) -> Iterator[T]:
  """The items for as long as there is time. Raises UserError once that is over.

  `begun`: when it began, by time.monotonic(); None for now.
  """
  end = (time.monotonic() if begun is None else begun) + seconds
  for item in items:
    yield item
    # Between items: a step that is under way cannot be stopped, and what it gave is shown.
    if time.monotonic() > end:
      raise UserError(f"this took longer than {seconds:g} s and was stopped; take fewer steps, noise samples or names")


def last_within(seconds: float, items: Iterable[T], *, begun: float | None = None) -> T:
  """The last of the items, of which there is at least one. Raises UserError: not within this time."""
  return collections.deque(within(seconds, items, begun=begun), maxlen=1)[0]
