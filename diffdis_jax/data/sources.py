"""Random access sources of captioned images: `len(source)`, `source[i]` -> {'image', 'caption', metadata fields...}.

`image` is a u8[h w 3] array, or bytes still to be decoded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from diffdis_jax.common import buckets
from diffdis_jax.data import latents, long_tail, records, shapes
from diffdis_jax.data.layouts import find
from diffdis_jax.errors import UserError, check_number

NAMES = ("shapes", "pairs", "latents", *long_tail.NAMES, *find.NAMES)


@runtime_checkable
class Source(Protocol):
  """What `open_source` returns."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


@runtime_checkable
class Described(Protocol):
  """A source that gives a record without reading its image."""

  def fields(self, index: int) -> dict[str, Any]: ...


def open_source(
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
    name: `shapes`, rendered by index; `pairs`, a folder written by prepare_data; `latents`, one of encoded images; a
      long-tailed set of `data.long_tail`; or a published set, such as `cifar10`, in place, wherever under `path` it
      lies in a layout that `data.layouts` reads.
    image_size: side in pixels at which shapes are rendered. Stored images keep theirs until the loader resizes them.
    split: of `shapes`: train, test, unseen, all. Of `pairs`: what the folder has. A published set is measured on one
      split alone, whatever this says.
    path: the prepared folder, local or any that etils.epath reads; unused by `shapes`. Of a published set, the folder
      of all of them.
    seed: of the rendered shapes.
    num_images: number of shapes; by default shapes.SPLITS. Of `pairs`: only the first so many. Not of a published set.
    caption_fields: fields of a record whose texts are its captions; none for the captions that it came with.

  Raises:
    UserError: unknown name, unknown split, a path that holds no prepared data set or one of the other kind, or fields
      that its first record does not have.
  """
  if name not in NAMES:
    raise UserError(f"unknown data source {name!r}; there are {', '.join(NAMES)}")
  if num_images is not None and num_images < 1:
    raise UserError(f"num_images is {num_images}; at least 1, or None for all")
  if name in long_tail.NAMES:
    if num_images is not None or caption_fields:
      raise UserError(f"{name} has no fields num_images and caption_fields; it is opened as a whole")
    return long_tail.open_labelled(name=name, path=path, split=split, image_size=image_size, seed=seed)
  if name in find.NAMES:
    if num_images is not None:
      raise UserError(f"{name} has no field num_images; it is opened as a whole")
    published = find.open_set(buckets.local(path, "data.path"), name)
    return records.Recaptioned(published, caption_fields) if caption_fields else published
  if name == "pairs":
    if "latents" in (records.read_info(path).metadata or {}):
      raise UserError(f"{path} holds latents, not images; train from it with data.name=latents, and measure on images")
    return records.open_pairs(path, split=split, num_images=num_images, caption_fields=caption_fields)
  if name == "latents":
    return latents.open_latents(path, split=split, num_images=num_images, caption_fields=caption_fields)
  if split not in shapes.SPLITS:
    raise UserError(f"shapes has no split {split!r}; there are {', '.join(shapes.SPLITS)}")
  rendered = shapes.Shapes(split=split, image_size=image_size, seed=seed, num_images=num_images)
  if missing := [field for field in caption_fields if field not in rendered[0]]:
    raise UserError(f"shapes has no caption field {missing[0]!r}; its records have {', '.join(sorted(rendered[0]))}")
  return records.Recaptioned(rendered, caption_fields) if caption_fields else rendered


class Mixture(NamedTuple):
  """Several sources, of which each example is drawn in turn so that their shares are those of the weights."""

  sources: tuple[Source, ...]
  weights: tuple[float, ...]


def open_mixture(sections: Mapping[str, Mapping[str, Any]], *, image_size: int) -> Mixture:
  """The sources of these sections: what `open_source` takes, and a `weight`.

  Raises:
    UserError: as `open_source`, or a weight that is not positive.
  """
  made, weights = [], []
  for name, section in sections.items():
    section = {"name": "pairs", **section}
    weight = section.pop("weight", 1.0)
    check_number(f"data.mixture.{name}.weight", weight, above=0)
    try:
      made.append(open_source(**section, image_size=image_size))
    except TypeError as error:
      raise UserError(f"data.mixture.{name}: {error}") from error
    weights.append(float(weight))
  return Mixture(tuple(made), tuple(weights))


def describe(*, path: str | os.PathLike[str] = "", split: str = "train", **section: Any) -> str:
  """One line about a section's source, with what its preparation counted."""
  if not str(path) or section.get("name") in long_tail.NAMES:
    return f"{section.get('name')}{f' in {path}' if str(path) else ''}, split {split}"
  info = records.read_info(path)
  report = (info.metadata or {}).get(split, {})
  counts = [
    f"{what} {', '.join(f'{n:,} with {reason}' for reason, n in report[what].items())}"
    for what in ("skipped", "changed")
    if report.get(what)
  ]
  return "; ".join(
    [f"{info.name} {info.version} in {path}, split {split}: {info.splits[split].num_examples:,} records", *counts]
  )
