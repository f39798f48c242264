"""Random access sources of captioned images: `len(source)`, `source[i]` -> {'image', 'caption', metadata fields...}.

`image` is a u8[h w 3] array, or bytes still to be decoded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from etils import epath

from diffdis_jax.data import records, shapes

NAMES = ("shapes", "pairs", "latents")


class Source(Protocol):
  """What `make` returns."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def make(
  *,
  name: str,
  image_size: int,
  split: str = "train",
  path: str | os.PathLike[str] = "",
  seed: int = 0,
  num_images: int | None = None,
  caption_fields: Sequence[str] = (),
) -> Source:
  """The source of this name.

  Args:
    name: `shapes`, rendered by index; `pairs`, a folder written by prepare_data; `latents`, one of encoded images.
    image_size: side in pixels at which shapes are rendered. Stored images keep theirs until the loader resizes them.
    split: of `shapes`: train, test, unseen, all. Of `pairs`: what the folder has.
    path: the prepared folder, local or any that etils.epath reads; unused by `shapes`.
    seed: of the rendered shapes.
    num_images: number of shapes; by default shapes.SPLITS. Of `pairs`: only the first so many.
    caption_fields: fields of a record whose texts are its captions; none for the captions that it came with.

  Raises:
    UserError: unknown name, unknown split, a path that holds no prepared data set or one of the other kind, or fields
      that its first record does not have.
  """
  if name not in NAMES:
    refuse(f"unknown data source {name!r}; there are {', '.join(NAMES)}")
  if num_images is not None and num_images < 1:
    refuse(f"num_images is {num_images}; at least 1, or None for all")
  if name == "pairs":
    if "latents" in (read_info(path).metadata or {}):
      refuse(f"{path} holds latents, not images; train from it with data.name=latents, and measure on images")
    return open_pairs(path, split=split, num_images=num_images, caption_fields=caption_fields)
  if name == "latents":
    from diffdis_jax.data import latents  # here, since it builds on this file

    return latents.open_latents(path, split=split, num_images=num_images, caption_fields=caption_fields)
  if caption_fields:
    refuse("shapes has no caption_fields; leave them out")
  if split not in shapes.SPLITS:
    refuse(f"shapes has no split {split!r}; there are {', '.join(shapes.SPLITS)}")
  return shapes.Shapes(split=split, image_size=image_size, seed=seed, num_images=num_images)


class Mixture(NamedTuple):
  """Several sources, of which each example is drawn in turn so that their shares are those of the weights."""

  sources: tuple[Source, ...]
  weights: tuple[float, ...]


def make_mixture(sections: Mapping[str, Mapping[str, Any]], *, image_size: int) -> Mixture:
  """The sources of these sections: what `make` takes, and a `weight`.

  Raises:
    UserError: as `make`, or a weight that is not positive.
  """
  made, weights = [], []
  for name, section in sections.items():
    section = {"name": "pairs", **section}
    weight = section.pop("weight", 1.0)
    if not weight > 0:
      refuse(f"data.mixture.{name}.weight is {weight}; it must be positive, or leave {name} out")
    try:
      made.append(make(**section, image_size=image_size))
    except TypeError as error:
      refuse(f"data.mixture.{name}: {error}")
    weights.append(float(weight))
  return Mixture(tuple(made), tuple(weights))


def describe(*, path: str | os.PathLike[str] = "", split: str = "train", **section: Any) -> str:
  """One line about a section's source, with what its preparation counted."""
  if not str(path):
    return f"{section.get('name')}, split {split}"
  info = read_info(path)
  report = (info.metadata or {}).get(split, {})
  counts = [
    f"{what} {', '.join(f'{n:,} with {reason}' for reason, n in report[what].items())}"
    for what in ("skipped", "changed")
    if report.get(what)
  ]
  return "; ".join(
    [f"{info.name} {info.version} in {path}, split {split}: {info.splits[split].num_examples:,} records", *counts]
  )


class Pairs:
  """Captioned images as prepare_data stored them; the fields of the json beside an image become metadata fields.

  With `caption_fields`, a record's captions are all the texts in those fields. Reading a record raises records.Unusable
  where it is damaged or has no caption, and UserError where its file is no longer there.
  """

  def __init__(
    self,
    stored: Any,
    num_images: int | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    caption_fields: Sequence[str] = (),
  ):
    self._records, self._files = stored, files
    self._num_images = len(stored) if num_images is None else min(num_images, len(stored))
    self._caption_fields = tuple(caption_fields)

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._num_images:
      raise IndexError(f"index {index} outside of {self._num_images} pairs")
    record = self.stored(index)
    metadata = records.read_metadata(record.pop("metadata"))
    caption = records.read_caption(record.pop("caption"))
    record = {**metadata, "caption": caption, "key": record.pop("key").decode(errors="replace"), **record}
    return records.with_captions(record, self._caption_fields) if self._caption_fields else record

  def stored(self, index: int) -> dict[str, Any]:
    """A record's fields as they are stored. Raises records.Unusable("unreadable record")."""
    try:
      return dict(self._records[index])
    except Exception as error:  # ArrayRecord, protobuf and TFDS each raise their own
      self._check_files()
      raise records.Unusable("unreadable record") from error

  def _check_files(self) -> None:
    for file in self._files:
      if not epath.Path(file).exists():
        refuse(f"{file} has vanished; put it back and run the same command again, which goes on")


def open_pairs(
  path: str | os.PathLike[str], *, split: str, num_images: int | None, caption_fields: Sequence[str] = ()
) -> Pairs:
  """A split of a prepared data set. Raises UserError: none there, no such split, a file is missing, or its first record
  lacks a caption field."""
  info = read_info(path)
  if split not in info.splits:
    refuse(f"{path} has no split {split!r}; there are {', '.join(sorted(info.splits))}")
  stored, files = _open(path, split)
  if caption_fields:
    first = _first_usable(Pairs(stored, num_images, files))
    if missing := [field for field in caption_fields if field not in first]:
      refuse(
        f"{path} has no caption field {missing[0]!r}; the fields of its first record are {', '.join(sorted(first))}"
      )
  return Pairs(stored, num_images, files, caption_fields)


def _first_usable(pairs: Pairs) -> dict[str, Any]:
  for index in range(len(pairs)):
    try:
      return pairs[index]
    except records.Unusable:
      continue
  return {}


def read_info(path: str | os.PathLike[str]) -> Any:
  """The tfds.core.DatasetInfo of a prepared data set.

  Raises:
    UserError: there is none at this path, which etils.epath reads.
  """
  if not str(path) or not (epath.Path(path) / "dataset_info.json").exists():
    refuse(f"no prepared data set in {str(path)!r}; write one with python -m diffdis_jax.prepare_data pairs")
  return _builder(path).info


def _builder(path: str | os.PathLike[str]) -> Any:
  import tensorflow_datasets as tfds  # here, since it takes half a second and `shapes` does without

  return tfds.builder_from_directory(path)


def _open(path: str | os.PathLike[str], split: str) -> tuple[Any, Sequence[Any]]:
  """The records of a split, images undecoded, and their files."""
  import tensorflow_datasets as tfds

  builder = _builder(path)
  files = builder.info.splits[split].filepaths
  if missing := [file for file in files if not epath.Path(file).exists()]:
    more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
    refuse(f"{missing[0]} is missing{more}; put it back and run the same command again, or prepare the data set again")
  undecoded = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
  return builder.as_data_source(split=split, decoders=undecoded), files


def refuse(message: str) -> NoReturn:
  """Raises UserError."""
  from diffdis_jax.structs import UserError  # here, since it imports jax, which data workers go without

  raise UserError(message)
