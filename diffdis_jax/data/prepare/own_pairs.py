"""The common part of the layouts of one's own pictures: the flags, and how captions make a pair."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from diffdis_jax.data import records
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.errors import UserError

CAPTIONS = ("caption", "text")  # columns, of which the first that is there counts
SEVERAL = "captions"  # the field of a record whose texts are its captions, whatever else it has
HELD_OUT = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """The flags by which a folder is read.

  Attributes:
    caption_fields: columns, or endings of files, whose texts are the captions; empty for the usual ones.
    held_out: share of `train` that becomes `val`; 0 for none.
  """

  caption_fields: tuple[str, ...] = ()
  held_out: float = HELD_OUT


@runtime_checkable
class Pairs(Protocol):
  """Pairs of one split of the source, by their places."""

  @property
  def split(self) -> str:
    """The name that the source gives to the split."""
    ...

  @property
  def keys(self) -> Sequence[str]:
    """Unique in the data set."""
    ...

  @property
  def whole(self) -> Sequence[int]:
    """Places of the pairs that seem to have image and caption."""
    ...

  def digests(self) -> Iterator[bytes]:
    """Yield the digest of each place's image file, empty where there is none that can be read."""
    ...

  def captions(self, places: Sequence[int]) -> Iterator[list[str]]:
    """Yield the captions that training would draw from for each of these places, none where they cannot be used."""
    ...

  def part(self, name: str, split: str, places: Sequence[int], joined: Mapping[int, tuple[str, ...]]) -> Part:
    """Return these of them. `joined` maps a place to its captions, where they are those of several rows."""
    ...


def pair_of(key: str, image: bytes | None, captions: Sequence[bytes | str], fields: Mapping[str, Any]) -> RawPair:
  """A pair with these captions, of which empty ones do not count; several are its metadata's field `captions`.

  Raises:
    Unusable: one that is not UTF-8.
  """
  raw = [text if isinstance(text, bytes) else parts.encode(text) for text in captions]
  raw = [text for text in raw if text.strip()]
  fields = dict(fields)
  if len(raw) > 1:
    fields[SEVERAL] = [records.read_caption(text) for text in raw]
  metadata = parts.encode(json.dumps(fields, ensure_ascii=False))
  return RawPair(key, image, raw[0] if raw else None, metadata)


def usable_captions(pairs: Iterable[RawPair]) -> Iterator[list[str]]:
  """Yield the captions of each pair, whose image is not looked at; none where they cannot be used."""
  for pair in pairs:
    try:
      if pair.refused:
        raise records.Unusable(pair.refused)
      metadata = records.read_metadata(pair.metadata)
      yield records.captions_of(metadata) or [records.read_caption(pair.caption)]
    except records.Unusable:
      yield []


def caption_fields(where: str, columns: Mapping[str, Any] | Sequence[str], asked: Asked) -> tuple[str, ...]:
  """The columns with the captions. Raises UserError: they are not among these."""
  usual = [name for name in CAPTIONS if name in columns][:1]
  missing = [name for name in asked.caption_fields if name not in columns]
  if missing or not (asked.caption_fields or usual):
    what = f"column {missing[0]}" if missing else f"column {' or '.join(CAPTIONS)}"
    raise UserError(f"{where} has no {what}; name those with captions by --caption_fields, of {', '.join(columns)}")
  return asked.caption_fields or tuple(usual)


def other_fields(names: Iterable[str], captions: Sequence[str], asked: Asked) -> tuple[str, ...]:
  """The fields that become metadata: without the captions, and without what training would take instead of those that
  were asked for."""
  left_out = {*captions, SEVERAL} if asked.caption_fields else {*captions}
  return tuple(name for name in names if name not in left_out)


def is_plain(value: Any) -> bool:
  """Say whether JSON and a reader of records have such a value: a text, a number, or a list of texts."""
  return isinstance(value, (str, int, float)) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
