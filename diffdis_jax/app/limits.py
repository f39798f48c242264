"""Limits of requests: sizes of uploads and texts, and time. Neither jax nor Gradio is imported here."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import ipaddress
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from diffdis_jax.common import files
from diffdis_jax.config.section import check_number
from diffdis_jax.data import image_files, records
from diffdis_jax.errors import UserError
from diffdis_jax.evals import prompts

T = TypeVar("T")
DECODING = 5  # seconds of computing that an image may take
FOLDER = "GRADIO_TEMP_DIR"  # the variable that tells Gradio, which reads it when it is imported, and again later
BEGIN = "diffdis-page"  # of a folder's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Limits of one request, and of how many there may be.

  Attributes:
    upload_mb: of an uploaded file, 10^6 bytes.
    megapixels: of an uploaded image, 10^6. Decoded, one takes up to 4 bytes.
    characters: of a prompt, a class name or a template.
    names: class names of a request.
    seconds: after which a request is ended.
    waiting: requests that wait for their turn; further ones are refused.

  Raises:
    UserError: a value out of its range.
  """

  upload_mb: float = 10.0
  megapixels: float = 25.0
  characters: int = 500
  names: int = 200
  seconds: float = 120.0
  waiting: int = 64

  def __post_init__(self) -> None:
    for name in ("upload_mb", "megapixels", "seconds"):
      check_number(name, getattr(self, name), gt=0)
    for name in ("characters", "names", "waiting"):
      check_number(name, getattr(self, name), ge=1)


def read_square(path: str | os.PathLike[str] | None, limits: Limits, side: int) -> UInt8[np.ndarray, "s s 3"]:
  """Return an uploaded image's upright central square, as evaluations cut it. Pixels are counted before decoding.

  Raises:
    UserError: no file, too many bytes or pixels, one that shows no image, or that takes too long to decode.
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
    # It may have been deleted while its request waited.
    raise UserError(f"the upload cannot be read ({error.strerror or error}); upload it again") from error
  if not data:
    raise UserError("the file is empty; upload an image, such as a PNG or a JPEG")
  # A file of some kB can decode to gigabytes (a decompression bomb): the header says so before.
  _check_pixels(data, limits)
  return _decode(data, side, limits)


# In a process of its own, which the kernel ends after so many seconds of computing: no thread can be ended.
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


def _decode(data: bytes, side: int, limits: Limits) -> UInt8[np.ndarray, "s s 3"]:
  command = [sys.executable, "-c", _DECODER, str(side), str(DECODING)]
  try:
    done = subprocess.run(command, input=data, capture_output=True, timeout=limits.seconds)
  except subprocess.TimeoutExpired as error:
    raise UserError(f"the image was not decoded within {limits.seconds:g} s; try again later") from error
  if done.returncode == 1:
    reason = done.stderr.decode(errors="replace").strip().splitlines()[-1]
    raise UserError(f"the file cannot be used: {reason}; upload an image, such as a PNG or a JPEG")
  if done.returncode:
    raise UserError(f"the image takes more than {DECODING} s to decode; save it again, such as a plain PNG or JPEG")
  return np.frombuffer(done.stdout, np.uint8).reshape(side, side, 3)


def _check_pixels(data: bytes, limits: Limits) -> None:
  """Raise UserError by the file's header alone."""
  most = f"at most {limits.megapixels:g} million"
  try:
    header = records.read_header(data)
  except records.Unusable as error:
    formats = f"{', '.join(image_files.FORMATS[:-1])} or {image_files.FORMATS[-1]}"
    raise UserError(f"the file shows no image that can be read: {error}; {most} pixels of {formats} can be") from error
  if header.width * header.height > limits.megapixels * 1e6:
    raise UserError(f"the image has {header.width:,} x {header.height:,} pixels; {most} can be")


def read_text(text: str | None, what: str, limits: Limits) -> str:
  """Return the text without surrounding white space; `what` names it in the message.

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
  """Split class names, between commas or on lines of their own.

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
  """Return a prompt template. Raises UserError: none, too long, or without a place for the class name."""
  return prompts.resolve_templates((read_text(text, "template", limits),))[0]


def read_whole(name: str, value: Any, *, at_least: int, at_most: int) -> int:
  """Return the number of a slider or a field. Raises UserError: no whole number, or out of its range."""
  check_number(name, value, ge=at_least, le=at_most)
  # After the range, which NaN is outside of: int() raises for it. Gradio sends 3.0 for 3.
  if value != int(value):
    raise UserError(f"{name} is {value}; it must be a whole number")
  return int(value)


def within(seconds: float, items: Iterable[T], *, begun: float | None = None) -> Iterator[T]:
  """Yield the items for as long as there is time. Raises UserError once that is over.

  `begun`: when it began, by time.monotonic(); None for now.
  """
  end = (time.monotonic() if begun is None else begun) + seconds
  for item in items:
    yield item
    # Between items: a step that is under way cannot be stopped, and what it gave is shown.
    if time.monotonic() > end:
      raise UserError(f"this took longer than {seconds:g} s and was stopped; take fewer steps, noise samples or names")


def last_within(seconds: float, items: Iterable[T], *, begun: float | None = None) -> T:
  """Return the last of the items, of which there is at least one. Raises UserError: not within this time."""
  return collections.deque(within(seconds, items, begun=begun), maxlen=1)[0]


def listen(host: str, port: int) -> socket.socket:
  """Take the port; 0 for any that is free. Raises UserError: nobody can listen there, such as beside another page."""
  name = host.strip("[]")  # with or without, as addresses have them
  listener = socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET)
  try:
    # As servers ask for it: a port whose last connections are not forgotten yet is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((name, port))
  except (OSError, TypeError, UnicodeError) as error:  # the latter two of what is no name of a host
    listener.close()
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot listen at {host}, port {port}: {reason}; take another --port or --host") from error
  return listener


def check_names(names: Collection[str]) -> None:
  """Raise UserError: one is no name that a request could ask for, as with a scheme or a port it is none."""
  for name in names:
    if not re.fullmatch("[a-z0-9._-]+", name.lower()) and not is_address(name.strip("[]")):
      raise UserError(f"--allowed_hosts={name} is no host's name; give it alone, such as page.example")


def is_address(name: str) -> bool:
  """Say whether a host's name is a number of IPv4 or IPv6."""
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


@contextlib.contextmanager
def uploads() -> Iterator[None]:
  """Give Gradio a new folder, in $GRADIO_TEMP_DIR or the system's for temporary files, and remove it at the end.

  What a killed page has left there is removed.
  """
  before = os.environ.get(FOLDER)
  if before:
    os.makedirs(before, exist_ok=True)
  # Requests may still write into it while the page ends.
  with files.temporary_folder(BEGIN, before or None) as made:
    os.environ[FOLDER] = os.fspath(made)
    try:
      yield
    finally:
      os.environ.pop(FOLDER)
      if before is not None:
        os.environ[FOLDER] = before
