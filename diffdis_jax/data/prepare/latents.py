"""The latent cache: the autoencoder's posterior over several augmented views of each image, in place of the image.

A record is one view: {moments: bf16[h w 2c], mean then log-variance, as u16; caption; key; metadata}. The views of an
image follow one another, so that training reads no more than the view it samples.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import BFloat16, UInt8

from diffdis_jax.common import buckets
from diffdis_jax.data import records
from diffdis_jax.data.latents import is_finite
from diffdis_jax.data.prepare import write
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.data.transforms import Augmentation, augment, needed_side
from diffdis_jax.errors import UserError

NAME = "latents"
IMAGES = 1024  # of a part
CHUNK = 256  # views encoded at a time
Encode = Callable[[UInt8[np.ndarray, "n H W 3"]], BFloat16[np.ndarray, "n h w d"]]


@dataclasses.dataclass
class RecordsPart:
  """A range of a prepared data set's split; iterates over places."""

  name: str
  split: str
  data: str
  start: int
  stop: int

  def identity(self) -> list[Any]:
    data = self.data if buckets.is_url(self.data) else os.path.realpath(self.data)
    return [data, self.name, self.start, self.stop]

  def __iter__(self) -> Iterator[int]:
    yield from range(self.start, self.stop)


def find_parts(data: str | os.PathLike[str]) -> list[Part]:
  """Cut every split into parts. Raises UserError: no prepared data set there, or one that holds latents itself."""
  info = records.read_info(data)
  if info.name == NAME:
    raise UserError(f"--data={data} holds latents already; name the data set of images")
  return [
    RecordsPart(f"{split}-{start // IMAGES:05d}", split, os.fspath(data), start, min(start + IMAGES, of.num_examples))
    for split, of in info.splits.items()
    for start in range(0, of.num_examples, IMAGES)
  ]


def data_set(data: str | os.PathLike[str]) -> write.DataSet:
  """Describe the latents of a data set, whose images' licences are theirs too."""
  about = "The posteriors of an autoencoder over augmented views of captioned images; its metadata says which."
  file = buckets.path(data) / write.LICENSES
  return write.DataSet(NAME, about, licenses=file.read_text(encoding="utf-8") if file.exists() else "")


@functools.lru_cache(maxsize=1)  # for all parts of a split: CC3M has 2,838, and each opening looks for all of its files
def _open(data: str, split: str) -> Any:
  return records.open_pairs(data, split=split, num_images=None)


class _Views(NamedTuple):
  """The views of one image, and what else is in its record."""

  images: UInt8[np.ndarray, "k H W 3"]
  record: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStage(write.Stage):
  """Writes parts of latents. Not for other processes: it holds the network."""

  encode: Encode  # squares of `image_size` pixels -> moments of shape `shape`
  shape: tuple[int, int, int]
  image_size: int
  views: int
  augmentation: Augmentation  # of a view; view k of image i is the same each time
  fingerprint: str  # the digest of the autoencoder, by which training tells whether it has the same one
  images: str = ""  # tells the data set's records from those that were in its folder before; empty where nothing does

  def features(self) -> tfds.features.FeaturesDict:
    # The u16 of bf16's bits, as bytes: TFDS's records hold numbers as int64 else.
    moments = tfds.features.Tensor(shape=self.shape, dtype=np.uint16, encoding="bytes")
    return tfds.features.FeaturesDict({"moments": moments, **write.TEXTS})

  def identity(self) -> dict[str, Any]:
    return {**self.facts(), "images": self.images}

  def facts(self) -> dict[str, Any]:
    facts = dict(views=self.views, image_size=self.image_size, shape=self.shape, fingerprint=self.fingerprint)
    return {"latents": {**facts, "augmentation": dataclasses.asdict(self.augmentation)}}

  def serialized(self, part: Part, report: write.Report) -> Iterator[bytes]:
    assert isinstance(part, RecordsPart)
    source, serialize = _open(part.data, part.split), write.serializer(self.features())
    places, size = range(part.start, part.stop), max(1, CHUNK // self.views)
    chunks = [places[start : start + size] for start in range(0, len(places), size)]
    # Threads decode and augment a chunk; the network then gets it as one batch, in the records' order, while they are
    # at the next one.
    with ThreadPoolExecutor() as pool:
      read = functools.partial(pool.map, functools.partial(self._views, source))
      ahead = read(chunks[0])
      for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
        results, ahead = list(ahead), read(following)
        usable = []
        for place, views in zip(chunk, results, strict=True):
          if isinstance(views, records.Unusable):
            report.skip(f"{part.split}/{place}", str(views))
          else:
            usable.append(views)
        if not usable:
          continue  # nothing to stack
        # One call for the views of all images of the chunk: the network has a batch of its own.
        moments = self.encode(np.concatenate([views.images for views in usable]))
        # All of an image's views or none, since they are found by their number.
        for views, of_image in zip(usable, np.split(np.asarray(moments), len(usable)), strict=True):
          if is_finite(of_image):
            report.pairs += self.views
            yield from (serialize({"moments": view.view(np.uint16), **views.record}) for view in of_image)
          else:
            report.skip(views.record["key"].decode(errors="replace"), records.NOT_FINITE)

  def _views(self, source: Any, place: int) -> _Views | records.Unusable:
    try:
      record = source.stored(place)
      image = records.read_image(record.pop("image"), at_least=needed_side(self.image_size, self.augmentation))
      record["caption"] = records.read_caption(record["caption"])
    except records.Unusable as error:
      return error
    # Seeded by place and view, so that it makes no difference which thread, process or attempt samples it.
    rngs = [np.random.default_rng((place, k)) for k in range(self.views)]
    views = [augment(image, rng, size=self.image_size, how=self.augmentation) for rng in rngs]
    return _Views(np.stack(views), record)
