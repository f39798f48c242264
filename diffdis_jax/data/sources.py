"""Random access sources of captioned images: `len(source)`, `source[i]` -> {'image', 'caption', metadata fields...}.

`image` is a u8[h w 3] array, or bytes still to be decoded.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from diffdis_jax.common import buckets
from diffdis_jax.common.guesses import did_you_mean
from diffdis_jax.config.section import check_number, check_type
from diffdis_jax.data import latents, long_tail, records, shapes
from diffdis_jax.data.layouts import find
from diffdis_jax.data.layouts.labelled import Source
from diffdis_jax.errors import UserError


@runtime_checkable
class Described(Protocol):
  """A source that gives a record without reading its image."""

  def fields(self, index: int) -> dict[str, Any]: ...


@runtime_checkable
class Ordered(Protocol):
  """A source with its own order of an epoch: places of its records."""

  def order(self, seed: int) -> Any: ...  # grain.MapDataset


# Values of the types that fields have which nobody has checked yet: a mixture's, and those of some sources alone.
_LIKE = {"split": "", "seed": 0, "num_images": 0, "caption_fields": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """The section of a config for a source. A kind of source says how it is opened, and which of these fields it lacks.
  Raises UserError: a number out of its range, or a field that this kind lacks."""

  LACKS: ClassVar[tuple[str, ...]] = ()
  IS_RENDERED: ClassVar[bool] = False

  name: str  # one of KINDS
  image_size: int  # side in pixels at which shapes are rendered; the loader resizes stored images
  split: str = "train"  # of `pairs`, what the folder has; a published set is measured on one split alone
  path: str | os.PathLike[str] = ""  # the prepared folder, or that of all published sets; empty for what is rendered
  seed: int = 0  # of the rendered images
  num_images: int | None = None  # to render, or the first so many of `pairs` and `latents`; by default all
  caption_fields: Sequence[str] = ()  # fields of a record whose texts are its captions; by default those it came with

  def __post_init__(self) -> None:
    # Before a file is opened: what is wrong with the fields themselves is reported first.
    if self.seed < 0:
      raise UserError(f"seed is {self.seed}; at least 0")
    if self.num_images is not None and self.num_images < 1:
      raise UserError(f"num_images is {self.num_images}; at least 1, or None for all")
    if self.IS_RENDERED and (path := str(self.path)):  # images there would be left out in silence
      raise UserError(
        f"data.path is {path!r}, and data.name {self.name!r}, whose images are rendered, from no file: leave the path"
        " empty, or give data.name='pairs' to take what prepare_data wrote there"
      )
    if given := [field for field in self.LACKS if getattr(self, field)]:
      raise UserError(f"{self.name} has no {given[0]}; it is opened as a whole")

  def open(self) -> Source:
    """Open the source. Raises UserError: no such split or data, or fields that its first record does not have."""
    raise NotImplementedError

  def describe(self) -> str:
    """Describe it in one line."""
    return f"{self.name}{f' in {path}' if (path := str(self.path)) else ''}, split {self.split}"

  def _recaptioned(self, source: Source) -> Source:
    return records.recaptioned(source, self.caption_fields, self.name)


class _Rendered(Section):
  """Shapes, rendered by index."""

  IS_RENDERED = True

  def open(self) -> Source:
    if self.split not in shapes.SPLITS:
      raise UserError(f"shapes has no split {self.split!r}; there are {', '.join(shapes.SPLITS)}")
    fields: Any = dict(split=self.split, image_size=self.image_size, seed=self.seed, num_images=self.num_images)
    return self._recaptioned(shapes.Shapes(**fields))


class _Prepared(Section):
  """A folder of images, or of latents, that prepare_data wrote."""

  def open(self) -> Source:
    fields: Any = dict(split=self.split, num_images=self.num_images, caption_fields=self.caption_fields)
    if self.name == "latents":
      return latents.open_latents(self.path, **fields)
    # Without this the first batch would fail, and not say of what.
    if "latents" in (records.read_info(self.path).metadata or {}):
      raise UserError(
        f"{self.path} holds latents, not images; train from it with data.name=latents, and measure on images"
      )
    return records.open_pairs(self.path, **fields)

  def describe(self) -> str:
    if not str(self.path):
      return super().describe()
    info = records.read_info(self.path)
    # A record is a view: a number of steps follows from the images.
    views = info.metadata["latents"]["views"] if self.name == "latents" else 0
    count = info.splits[self.split].num_examples
    what = f"{count // views:,} images, views of each: {views}" if views else f"{count:,} records"
    return f"{info.name} {info.version} in {self.path}, split {self.split}: {what}"


class _LongTailed(Section):
  """A set of `data.long_tail`."""

  LACKS = ("num_images", "caption_fields")

  def open(self) -> Source:
    return long_tail.SETS[self.name].open_split(buckets.local(self.path, "data.path"), self.split)


class _Published(Section):
  """A set in place, wherever under `path` it lies in a layout that `data.layouts` reads."""

  LACKS = ("num_images",)

  def open(self) -> Source:
    return self._recaptioned(find.open_set(buckets.local(self.path, "data.path"), self.name))


KINDS: dict[str, type[Section]] = {
  "shapes": _Rendered,
  **dict.fromkeys(("pairs", "latents"), _Prepared),
  **dict.fromkeys(long_tail.SETS, _LongTailed),
  **dict.fromkeys(find.NAMES, _Published),
}


def read(*, name: str, **fields: Any) -> Section:
  """Make the section of this kind, of KINDS, with the rest of `Section`'s fields. Raises UserError: an unknown name or
  field, a value of another type, or as `Section`."""
  if name not in KINDS:
    raise UserError(f"unknown data source {name!r}; there are {', '.join(KINDS)}")
  known = {field.name for field in dataclasses.fields(KINDS[name])}
  if unknown := sorted(fields.keys() - known):
    raise UserError(f"a data source has no field {unknown[0]!r}; {did_you_mean(unknown[0], {*known, 'weight'})}")
  for field in filter(fields.__contains__, _LIKE):
    value = fields[field]
    if value is not None or field != "num_images":
      check_type(field, int(value) if isinstance(value, numbers.Integral) else value, _LIKE[field])  # numpy's too
  return KINDS[name](name=name, **fields)


def open_source(*, name: str, image_size: int, **fields: Any) -> Source:
  """Open the source of these fields. Raises UserError: as `read` and `Section.open`."""
  return read(name=name, image_size=image_size, **fields).open()


# What it may be called with is what a section has, so that a misspelt field is refused before anything is opened.
vars(open_source)["__signature__"] = inspect.signature(Section)


class Mixture(NamedTuple):
  """Several sources, whose shares of the examples are those of the weights, to 1 % of each: Grain counts in hundredths
  of the smallest weight, and drops the rest."""

  sources: tuple[Source, ...]
  weights: tuple[float, ...]


def open_mixture(sections: Mapping[str, Mapping[str, Any]], *, image_size: int) -> Mixture:
  """Open the sources of these sections: what `open_source` takes, and a `weight`. Raises UserError: as `open_source`,
  or a weight that is not positive."""
  opened, weights = [], []
  for name, section in sections.items():
    section = {"name": "pairs", "weight": 1.0, **section}  # a copy, since the weight is taken out of it
    check_number(f"data.mixture.{name}.weight", weight := section.pop("weight"), gt=0)
    weights.append(float(weight))
    try:
      opened.append(open_source(**section, image_size=image_size))
    except UserError as error:  # of several sources it says which one
      raise UserError(f"data.mixture.{name}: {error}") from error
  return Mixture(tuple(opened), tuple(weights))
