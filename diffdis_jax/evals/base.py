"""Share what all evaluations need: their settings, reading images, and ranks.

An evaluation is a dataclass. A new one checks its settings and opens its data, and measures when `run` is called; when
to run it is the caller's affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.config.section import field, number
from diffdis_jax.data import records, sources, transforms
from diffdis_jax.data.layouts.labelled import Published
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError

BLOCK = 1024  # rows of a score matrix in memory at a time
TIES = "count as wrong"  # of equal scores; an argmax would take the first
MOST_SEED = 2**32 - 1  # of jax's random keys
settings = functools.partial(dataclasses.dataclass, kw_only=True, eq=False, repr=False)


@settings()
class Evaluation:
  """A measurement of a trained run. Its fields are its settings, in a config and as flags of evaluate.

  Raises UserError: a setting out of its range, or data that it cannot take.
  """

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
  task: ClassVar[str]  # the kind of measurement, in CLIP_benchmark's words where it has one

  seed: int = number(0, ge=0, le=MOST_SEED, help="seed of all that is random")

  def __post_init__(self) -> None:
    for setting in dataclasses.fields(self):
      value = getattr(self, setting.name)
      if value is not None and (check := setting.metadata.get("check")):
        check(setting.name, value)
    self.open()

  def open(self) -> None:
    """Open the data. Raises UserError: they cannot be used."""

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference: steps, noise samples, guidance, seed, number of images, ..."""
    raise NotImplementedError

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the model that `inference` runs with `params`."""
    raise NotImplementedError


@settings()
class OfImages(Evaluation):
  """An evaluation of a data source's images by their text queries.

  Attributes:
    source: the open data source.
    order: the index of the record whose image is shown, for each record that is measured.
  """

  data: Mapping[str, Any] = field(help="section of a data source")
  num_images: int | None = field(None, help="images to measure, the same ones each time; by default all")
  shuffle_labels: bool = field(
    False, help="test for leaks: each record shows the image of another one, so that accuracy must fall to chance"
  )

  def open(self) -> None:
    self.source = sources.open_source(**self.data)
    self.indices = subset(len(self.source), self.num_images)
    # The leak test changes which image is shown, and nothing else: labels, places and noise stay.
    self.order = np.random.default_rng(self.seed).permutation(self.indices) if self.shuffle_labels else self.indices

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.protocol,
      "seed": self.seed,
      "num_images": len(self.indices),
      "ties": TIES,
      **origin(self.source),
      "shuffle_labels": self.shuffle_labels,
    }

  def embed_images(self, inference: Any, params: Mapping[str, Any]) -> Float[np.ndarray, "n d"]:
    """Return ê_0 of the image that is shown for each record, L2-normalised."""
    return inference.embed_images(params, Images(self.source, self.order, inference.image_size), seed=self.seed)


def subset(length: int, num_images: int | None) -> Int[np.ndarray, " n"]:
  """Return the indices, in order, of `num_images` records of a source of `length`; of all of them for None.

  A random subset, since sources often list their classes in turn, but always the same one.

  Raises UserError: the source is empty, or fewer than one image is asked for.
  """
  if length < 1:
    raise UserError("the data set has no records; an evaluation needs at least one")
  if num_images is None:
    return np.arange(length)
  if num_images < 1:
    raise UserError(f"num_images is {num_images}; it should be at least 1, or None for all")
  # Sorted, so that a source that is read from a disk is read from its beginning to its end.
  return np.sort(np.random.default_rng(0).permutation(length)[:num_images])


def first_of_each(labels: Int[np.ndarray, " n"], count: int, *, seed: int | None = None) -> Int[np.ndarray, " m"]:
  """Return the places, in order, of the first `count` of each class, or of `count` random ones by `seed`; of all of a
  smaller class. A larger count has those of a smaller one."""
  order = np.arange(len(labels)) if seed is None else np.random.default_rng(seed).permutation(len(labels))
  by_class = order[np.argsort(labels[order], kind="stable")]
  starts = np.searchsorted(labels[by_class], labels[by_class])
  return np.sort(by_class[np.arange(len(labels)) - starts < count])


def get_field(record: Mapping[str, Any], name: str) -> Any:
  """Return a field of a record. Raises UserError: the record has no such field."""
  if name not in record:
    raise UserError(f"records have no field {name!r}; they have {', '.join(sorted(record))}")
  return record[name]


def captions(record: Mapping[str, Any], name: str = "") -> Sequence[str]:
  """Return the captions in this field of a record; without one, all of its captions, of which training samples one.

  Raises UserError: no such field, or no caption in it.
  """
  # A field that was asked for by name counts alone, also where the record lists its captions.
  if not name and (several := records.captions_of(record)):
    return tuple(several)
  name = name or "caption"
  value = get_field(record, name)
  texts = (value,) if isinstance(value, str) else value
  if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(c, str) and c for c in texts):
    raise UserError(f"field {name!r} holds {value!r}; it should be a caption or a list of captions")
  return tuple(texts)


def read(source: Any, index: SupportsIndex) -> dict[str, Any]:
  """Read a record of a source. Raises UserError where it is damaged: a figure is of all records or of none."""
  with _usable(source, index):
    return source[int(index)]


def fields(source: Any, index: SupportsIndex) -> dict[str, Any]:
  """Read a record of a source, without its image where the source can spare reading it. Raises as `read` does."""
  with _usable(source, index):
    return source.fields(int(index)) if isinstance(source, sources.Described) else source[int(index)]


def origin(source: Any) -> dict[str, Any]:
  """Return the layout and the split of a published set, for the protocol; of other sources nothing."""
  if not isinstance(source, Published):
    return {}
  return {"data": {"layout": source.origin.layout, "split": source.origin.split}}


def open_split(data: Mapping[str, Any], split: str) -> sources.Source:
  """Open another split of the same data.

  Raises UserError: there is none; of a published set there is only the one that it is measured on.
  """
  source = sources.open_source(**{**data, "split": split})
  # It is opened as one split whatever is asked for, and what is measured would be trained on.
  if isinstance(source, Published) and source.origin.split != split:
    raise UserError(
      f"{data['name']} in {source.origin.path} is the split {source.origin.split} alone, and has no split {split};"
      " prepare both with diffdis prepare_data"
    )
  return source


@contextlib.contextmanager
def _usable(source: Any, index: SupportsIndex) -> Iterator[None]:
  try:
    yield
  except records.Unusable as error:
    # Of a set whose files are read in place a number would not say which.
    files: Any = getattr(source, "images", None)
    is_file = isinstance(files, Sequence) and isinstance(files[int(index)], pathlib.Path)
    what = files[int(index)] if is_file else f"record {index} of the data set"
    raise UserError(f"{what} cannot be used: {error}; download or prepare it again") from error


def to_square(
  image: bytes | UInt8[np.ndarray, "h w 3"], image_size: int, crop_pct: float = 1.0
) -> UInt8[np.ndarray, "s s 3"]:
  """Return the image's central square, resized. Raises records.Unusable: bytes that show no image.

  Args:
    crop_pct: share of the square's side that is kept, its middle; 0.875 is 224 px of 256.
  """
  # Resized first and cut then, as torchvision and timm do it.
  side = int(image_size / crop_pct)
  start = (side - image_size) // 2
  decoded = records.read_image(image)
  return np.asarray(transforms.resize(decoded, side))[start : start + image_size, start : start + image_size]


@functools.cache
def decoders() -> ThreadPoolExecutor:
  """Return threads that decode images, a core each."""
  # Decoding and resizing leave the interpreter to the others.
  return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decoder")


@dataclasses.dataclass(frozen=True)
class Images:
  """Images of a source as squares, u8[n h w 3], decoded when they are asked for: a host decodes its own rows alone, on
  all of its cores.
  """

  source: Any  # its records have `image`, encoded or as u8[h w 3]
  indices: Int[np.ndarray, " n"]  # which of them, in which order
  image_size: int  # side of the squares, pixels
  crop_pct: float = 1.0  # as `to_square` takes it
  square: Any = None  # (PIL image, image_size) -> square, in the place of `to_square`

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w 3"]:
    return np.stack(list(decoders().map(self._read, self.indices[places].tolist())))

  def _read(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
    with _usable(self.source, index):
      image = self.source[index]["image"]
      if self.square:
        return self.square(records.read_image(image).image, self.image_size)
      return to_square(image, self.image_size, self.crop_pct)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows that are made when they are asked for: a host makes its own ones alone, and none is kept."""

  count: int
  make: Callable[[Int[np.ndarray, " b"]], np.ndarray]  # places -> rows

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> np.ndarray:
    return self.make(places)


def embed_texts(inference: Any, params: Mapping[str, Any], texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
  """Return e of each text, L2-normalised. There is no noise in it, and so no seed."""
  return inference.embed_texts(params, Tokenizer(inference.max_length)(texts))


def ranks(
  queries: Float[np.ndarray, "q d"],
  keys: Float[np.ndarray, "k d"],
  *,
  query_groups: Int[np.ndarray, " q"],
  key_groups: Int[np.ndarray, " k"],
) -> Int[np.ndarray, " q"]:
  """Return how many keys of other groups come before each query's best key of its own group, by inner product; 0 is
  right.

  A tie counts against the query, and so does a NaN: a model that maps everything to one point ranks last, not first.
  Scores are computed on the device, `BLOCK` queries at a time.
  """
  # Keys go to the device once; queries in blocks, since all scores of MSCOCO are 25,000 x 5,000.
  on_device = jnp.asarray(keys)
  return by_blocks(lambda rows, groups: _ranks(rows, on_device, groups, key_groups), queries, query_groups)


def by_blocks(f: Callable[..., Array], *rows: np.ndarray, size: int | None = None) -> np.ndarray:
  """Run f over blocks of rows, of one shape: the last block is filled with its last row."""
  n, results = len(rows[0]), []
  size = min(size or BLOCK, n)
  for start in range(0, n, size):
    places = np.minimum(np.arange(start, start + size), n - 1)
    results.append(np.asarray(f(*(array[places] for array in rows))))
  return np.concatenate(results)[:n]


@jax.jit
def _ranks(
  queries: Float[Array, "q d"], keys: Float[Array, "k d"], query_groups: Int[Array, " q"], key_groups: Int[Array, " k"]
) -> Int[Array, " q"]:
  # The default precision of a TPU rounds to bf16, in which distinct scores become ties.
  scores = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
  own = query_groups[:, None] == key_groups[None]
  best = jnp.where(own, scores, -jnp.inf).max(axis=1, keepdims=True)
  # "Not smaller" instead of "larger or equal": a NaN is neither, and so counts against the query.
  return (~own & ~(scores < best)).sum(axis=1)
