"""Records of prepared data sets: what a usable one is, which a preparation checks by the same functions, and reading
them back from a folder that prepare_data wrote."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffdis_jax.common import buckets, storage
from diffdis_jax.data import image_files, shards
from diffdis_jax.data.image_files import Unusable
from diffdis_jax.data.transforms import Decoded, decode
from diffdis_jax.errors import Gone, UserError, may_pass, parse_json
from diffdis_jax.run import digests

MIN_SIDE = 2  # pixels: dead links are often answered by an image of one pixel
INFO = "dataset_info.json"  # by which a prepared folder is known
DESCRIPTION = (INFO, "features.json", "metadata.json")  # what TFDS reads beside the records
NOT_FINITE = "numbers that are not finite"  # of latents; an image's are whole numbers
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

# Every reason of Unusable, in the order of the loader's counts.
REASONS = (
  "missing image",
  "missing caption",
  "caption that is not UTF-8",
  "corrupt json",
  "json that is no object",
  "corrupt image",
  image_files.TOO_MANY_PIXELS,
  "image of one pixel's width",
  "unreadable record",
  NOT_FINITE,
  image_files.NO_HEIC,
)


def read_file(path: pathlib.Path) -> bytes:
  """Read an image's file, or a text's. Raises Unusable: there is none; OSError: it cannot be read."""
  try:
    return path.read_bytes()
  except OSError as error:
    if error.errno in _NOT_THERE:
      raise Unusable("missing image") from error
    raise


def read_header(data: bytes) -> Image.Image:
  """Open an image, of which the header alone is read. Raises Unusable: the bytes begin no image, or one of too many
  pixels."""
  with _unusable():
    return image_files.open_image(data)


def read_image(image: bytes | UInt8[np.ndarray, "h w 3"] | None | Any, *, at_least: int | None = None) -> Decoded:
  """Decode an image to its end as `transforms.decode` does; of an animation the first frame. An array stays as it is.
  Raises Unusable: no bytes, or none that show an image; UserError: neither bytes nor such an array."""
  if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
    return decode(image)
  if not isinstance(image, bytes | None):  # which is the source's mistake and no damage
    raise UserError(
      f"a record's image is of type {type(image).__name__}; a source gives the bytes of an image's file, or a numpy"
      " array uint8[height, width, 3], such as numpy.asarray(image.convert('RGB')) of one of Pillow's"
    )
  if not image:
    raise Unusable("missing image")
  with _unusable():
    decoded = decode(image, at_least=at_least)
  if min(decoded.width, decoded.height) < MIN_SIDE:
    raise Unusable("image of one pixel's width")
  return decoded


@contextlib.contextmanager
def _unusable() -> Iterator[None]:
  try:
    yield
  except Unusable:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise Unusable(image_files.TOO_MANY_PIXELS) from error
  except Exception as error:  # PIL's readers raise whatever a broken file leads them into
    raise Unusable("corrupt image") from error


def read_caption(data: bytes | None) -> str:
  """Read a caption of UTF-8, without surrounding white space. Raises Unusable: there is none, or it is not UTF-8."""
  try:
    caption = (data or b"").decode("utf-8-sig").strip()  # without the mark that Windows puts before a text
  except UnicodeDecodeError as error:
    raise Unusable("caption that is not UTF-8") from error
  if not caption:
    raise Unusable("missing caption")
  return caption


def read_metadata(data: bytes | None) -> dict[str, Any]:
  """Read the json beside an image; empty where there is none. Raises Unusable: not JSON, or no object."""
  try:
    metadata = parse_json(data or b"{}", "metadata")
  except UserError as error:
    raise Unusable("corrupt json") from error
  if not isinstance(metadata, dict):
    raise Unusable("json that is no object")
  return metadata


def captions_of(metadata: Mapping[str, Any]) -> list[str]:
  """Return the captions of an image, as `texts_of` does, where its metadata has more than one; else none."""
  captions = texts_of(metadata, ("captions",))
  return captions if len(captions) > 1 else []


def texts_of(record: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
  """Return the texts in these fields, each a text or a list of them, stripped, without empty ones."""
  values = [record.get(field) for field in fields]
  texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
  return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


class Recaptioned:
  """A source whose records' captions are the texts in other fields. Reading a record raises Unusable: there is none."""

  def __init__(self, source: Any, caption_fields: Sequence[str]):
    self.source, self.caption_fields = source, caption_fields
    self.lengths: list[int] = getattr(source, "lengths", [])
    self.prefetch: Any = getattr(source, "prefetch", None)

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.source[index]
    if not (texts := texts_of(record, self.caption_fields)):
      raise Unusable("missing caption")
    return {**record, "caption": texts[0], "captions": texts}


class Pairs:
  """Captioned images as prepare_data stored them, undecoded; fields of the json beside an image become fields.

  Reading a record raises Unusable where it is damaged or has no caption. A file that is away is tried again, by
  `storage.patiently`. `lengths` are the records of each shard; `prefetch` opens shards that are read soon.
  """

  def __init__(self, path: str | os.PathLike[str], split: str, num_images: int | None = None):
    import tensorflow_datasets as tfds

    info = builder(path).info
    lengths = info.splits[split].shard_lengths
    self._files = [os.fspath(file) for file in info.splits[split].filepaths]
    names = [os.path.basename(file) for file in self._files]
    if shards.is_large(lengths) and buckets.is_url(path):
      self._stored = shards.Reader(names, lengths, shards.Copies(os.fspath(buckets.path(path))))
    else:
      self._stored = shards.Reader(self._files, lengths)
      there = {*os.listdir(shards.folder_of(path, split=split))}
      if missing := [file for file, name in zip(self._files, names, strict=True) if name not in there]:
        raise UserError(f"{missing[0]} is missing; put it back, or prepare the data set again")
    _open_many_files()
    self.prefetch = self._stored.prefetch
    # Images are decoded by the loader's threads, in `image_files`' formats and bounds.
    undecoded = {"image": tfds.decode.SkipDecoding()} if "image" in info.features else None
    self._deserialize = functools.partial(info.features.deserialize_example_np, decoders=undecoded)
    ends = np.minimum(np.cumsum(lengths, dtype=np.int64), sys.maxsize if num_images is None else num_images)
    self.lengths: list[int] = np.diff(ends, prepend=0).tolist()
    self._num_images = sum(self.lengths)

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self.stored(index)
    metadata = read_metadata(record.pop("metadata"))
    caption = read_caption(record.pop("caption"))
    # In this order: a json may have fields of the same names, and what the preparation has checked wins.
    return {**metadata, "caption": caption, "key": record.pop("key").decode(errors="replace"), **record}

  def stored(self, index: int) -> dict[str, Any]:
    """Read a record's fields as they are stored. Raises Unusable("unreadable record")."""
    if not 0 <= index < self._num_images:
      raise IndexError(f"index {index} outside of {self._num_images} records")
    return storage.patiently(lambda: self._read(index), "the data")

  def _read(self, index: int) -> dict[str, Any]:
    try:
      record = dict(self._deserialize(self._stored[index]))
      # Of a file that became shorter ArrayRecord reads nothing, and says nothing.
      if record and all(value is None for value in record.values()):
        raise Unusable("unreadable record")
      return record
    except Exception as error:  # ArrayRecord, protobuf and TFDS each raise their own
      if not (away := _away(error, self._files)):
        raise Unusable("unreadable record") from error
      self._stored.forget(index)
      raise away from error


def open_pairs(
  path: str | os.PathLike[str], *, split: str, num_images: int | None, caption_fields: Sequence[str] = ()
) -> Pairs | Recaptioned:
  """Open a split of a prepared data set. Raises UserError: none there, no such split, a file is missing, or its first
  record lacks a caption field."""
  info = read_info(path)
  if "metadata" not in info.features:
    raise UserError(
      f"{path} was not written by prepare_data: its records have {', '.join(sorted(info.features))}; write one by it"
    )
  if split not in info.splits:
    raise UserError(f"{path} has no split {split!r}; there are {', '.join(sorted(info.splits))}")
  return recaptioned(Pairs(path, split, num_images), caption_fields, str(path))


def recaptioned(source: Any, caption_fields: Sequence[str], name: str) -> Any:
  """Give a source the captions in these fields, if there are any. Raise UserError: its first record lacks one."""
  if not caption_fields:
    return source
  first: dict[str, Any] = {}
  for index in range(len(source)):
    with contextlib.suppress(Unusable):
      first = source.fields(index) if hasattr(source, "fields") else source[index]
      break
  if missing := [field for field in caption_fields if field not in first]:
    raise UserError(
      f"{name} has no caption field {missing[0]!r}; the fields of its first record are {', '.join(sorted(first))}"
    )
  return Recaptioned(source, caption_fields)


def read_info(path: str | os.PathLike[str]) -> Any:
  """Read the tfds.core.DatasetInfo of a prepared data set. Raises UserError: there is none at this path."""
  if not str(path) or not (buckets.path(path) / INFO).exists():
    how = "" if str(path) else ", and name its folder, as in --config=FILE.py:path=DIR or --config.data.path=DIR"
    raise UserError(f"no prepared data set in {str(path)!r}; write one with diffdis prepare_data{how}")
  return builder(path).info


def builder(path: str | os.PathLike[str]) -> Any:
  """Open the tfds.core.DatasetBuilder of a prepared data set. Raises UserError: its description is damaged."""
  import tensorflow_datasets as tfds  # here, since it takes half a second and `shapes` does without
  from google.protobuf import json_format

  folder = shards.folder_of(path)
  if damage := digests.damage(folder, ending=DESCRIPTION):  # a changed bit there may mean other records
    raise UserError(f"{folder}: {damage.file} {damage.what}; copy the data set again, or prepare it again")
  try:
    return tfds.builder_from_directory(folder)
  except (FileNotFoundError, ValueError, json_format.ParseError) as error:  # a bucket's errors may pass
    reason = f"{' '.join(str(error).split()):.200}"
    raise UserError(f"{path} is no whole data set: {reason}; copy it again, or prepare it again") from error


def _open_many_files() -> None:
  """Let this process open as many files as the system allows, up to 10,240. A shell's own limit is often 1,024."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = 10_240 if hard == resource.RLIM_INFINITY else min(10_240, hard)
  if soft < most and soft != resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _away(error: Exception, files: Sequence[str]) -> Exception | None:
  """Turn what a reader of these files has raised into an error that may pass; None where it is not storage's."""
  if may_pass(error):
    return error
  if absent := next((file for file in files if not buckets.path(file).exists()), None):
    return Gone(f"{absent} is not there")
  # How ArrayRecord words what a system call answered: "open() failed: No such file or directory; opening FILE".
  return Gone(str(error)) if re.search(r"\b\w+\(\) failed: ", str(error)) else None
