"""Share what all evaluations need: the protocol, reading images, ranks, and the result's record.

An evaluation is constructed from its own config section, where bad settings and bad data fail, and measures when `run`
is called; when to run it is the caller's affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8
from PIL import Image

from diffdis_jax.common.progress import Progress
from diffdis_jax.data import records, sources, transforms
from diffdis_jax.data.layouts.labelled import Captioned, Labelled, Lazy
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import resize
from diffdis_jax.parallel import processes

TEXTS = 8192  # embedded at a time, of which a progress line is
BLOCK = 1024  # rows of a score matrix in memory at a time
TIES = "count as wrong"  # of equal scores; an argmax would take the first


@runtime_checkable
class Eval(Protocol):
  """An evaluation; `task` names the kind of measurement, in CLIP_benchmark's words where it has one."""

  task: str

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference: steps, noise samples, guidance, seed, number of images, ..."""
    ...

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the model that `inference` runs with `params`."""
    ...


def subset(length: int, num_images: int | None) -> Int[np.ndarray, " n"]:
  """Return the indices, in order, of `num_images` records of a source of `length`; of all of them for None.

  A random subset, since sources often list their classes in turn, but always the same one.

  Raises:
    UserError: the source is empty, or fewer than one image is asked for.
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


def get_field(record: Mapping[str, Any], field: str) -> Any:
  """Return a field of a record.

  Raises:
    UserError: the record has no such field; the message lists those it has.
  """
  if field not in record:
    raise UserError(f"records have no field {field!r}; they have {', '.join(sorted(record))}")
  return record[field]


def captions(record: Mapping[str, Any], field: str = "") -> Sequence[str]:
  """Return the captions in this field of a record; without one, all of its captions, of which training samples one.

  Raises:
    UserError: no such field, or no caption in it.
  """
  # A field that was asked for by name counts alone, also where the record lists its captions.
  if not field and (several := records.captions_of(record)):
    return tuple(several)
  field = field or "caption"
  value = get_field(record, field)
  found = (value,) if isinstance(value, str) else value
  if not isinstance(found, (list, tuple)) or not found or not all(isinstance(c, str) and c for c in found):
    raise UserError(f"field {field!r} holds {value!r}; it should be a caption or a list of captions")
  return tuple(found)


def read(source: Any, index: SupportsIndex) -> dict[str, Any]:
  """Read a record of a source. Raises UserError where it is damaged: a figure is of all records or of none."""
  with _usable(source, index):
    return source[int(index)]


def fields(source: Any, index: SupportsIndex) -> dict[str, Any]:
  """Read a record of a source, without its image where the source can spare reading it. Raises as `read` does."""
  with _usable(source, index):
    return source.fields(int(index)) if isinstance(source, sources.Described) else source[int(index)]


def text_labels(source: Any, field: str) -> Shaped[np.ndarray, " n"]:
  """Return each record's class by its name. Raises UserError: one that is no text."""
  labels = [get_field(fields(source, i), field) for i in range(len(source))]
  if wrong := [label for label in labels if not isinstance(label, str)]:
    raise UserError(f"field {field!r} holds {wrong[0]!r}; a label should be a class's name: give another label_field")
  return np.array(labels)


def origin(source: Any) -> dict[str, Any]:
  """Return the layout and the split of a published set, for the protocol; of other sources nothing."""
  if not isinstance(source, Captioned | Labelled):
    return {}
  return {"data": {"layout": source.origin.layout, "split": source.origin.split}}


def open_split(data: Mapping[str, Any], split: str) -> sources.Source:
  """Open another split of the same data.

  Raises:
    UserError: there is none; of a published set there is only the one that it is measured on.
  """
  source = sources.open_source(**{**data, "split": split})
  # It is opened as one split whatever is asked for, and what is measured would be trained on.
  if isinstance(source, Captioned | Labelled) and source.origin.split != split:
    raise UserError(
      f"{data['name']} in {source.origin.path} is the split {source.origin.split} alone, and has no split {split};"
      " prepare both with diffdis prepare_data"
    )
  return source


@contextlib.contextmanager
def _usable(source: Any, index: SupportsIndex, what: str = "the data set") -> Iterator[None]:
  try:
    yield
  except records.Unusable as error:
    images = source.images if isinstance(source, Captioned | Labelled) else None
    # A published set was not prepared: it is the file that is mended, and a number would not say which.
    # Only for a list: another source would read the record again, which cannot be read.
    items = images.items if isinstance(images, Lazy) and isinstance(images.items, Sequence) else None
    if items is not None and isinstance(file := items[int(index)], pathlib.Path):
      raise UserError(f"{file} cannot be used: {error}; download it again") from error
    raise UserError(f"record {index} of {what} cannot be used: {error}; prepare the data set again") from error


def read_image(source: Any, index: SupportsIndex) -> Image.Image:
  """Return the image of a record of a source. Raises as `read` does."""
  with _usable(source, index):
    return records.read_image(source[int(index)]["image"])


def to_square(
  image: bytes | UInt8[np.ndarray, "h w 3"], image_size: int, crop_pct: float = 1.0, *, reduced_decoding: bool = False
) -> UInt8[np.ndarray, "s s 3"]:
  """Return the image's central square, resized. Raises records.Unusable: bytes that show no image.

  Args:
    crop_pct: of the square's side that is kept, its middle; 0.875 is 224 px of 256.
    reduced_decoding: whether a JPEG of twice that side or more is decoded at 1/2, 1/4 or 1/8 of its size.
  """
  # Resized first and cut then, as torchvision and timm do it.
  side = int(image_size / crop_pct)
  start = (side - image_size) // 2
  decoded = records.read_decoded(image, at_least=side if reduced_decoding else None)
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

  Attributes:
    source: its records have `image`, encoded or as u8[h w 3].
    indices: which of them, in which order.
    image_size: side of the squares, pixels.
    crop_pct, reduced_decoding: as `to_square` takes them.
    resampling: one of `resize.RESAMPLING`, for squares as FID's reference takes them; empty for those of `to_square`.
    what: the source is, for messages.
  """

  source: Any
  indices: Int[np.ndarray, " n"]
  image_size: int
  crop_pct: float = 1.0
  resampling: str = ""
  what: str = "the data set"
  reduced_decoding: bool = False

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, places: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w 3"]:
    return np.stack(list(decoders().map(self._square, self.indices[places].tolist())))

  def _square(self, index: int) -> UInt8[np.ndarray, "s s 3"]:
    with _usable(self.source, index, self.what):
      image = self.source[index]["image"]
      if self.resampling:
        return resize.square(records.read_image(image), self.image_size, self.resampling)
      return to_square(image, self.image_size, self.crop_pct, reduced_decoding=self.reduced_decoding)


def embed_images(
  inference: Any,
  params: Mapping[str, Any],
  source: Any,
  indices: Int[np.ndarray, " n"],
  *,
  seed: int,
  crop_pct: float = 1.0,
  reduced_decoding: bool = False,
) -> Float[np.ndarray, "n d"]:
  """Return ê_0 of each image, L2-normalised, in the order of `indices`; settings as `to_square` has them."""
  images = Images(source, indices, inference.image_size, crop_pct, reduced_decoding=reduced_decoding)
  return inference.embed_images(params, images, seed=seed)


def embed_texts(inference: Any, params: Mapping[str, Any], texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
  """Return e of each text, L2-normalised."""
  # Text by text there is no noise, and so no seed. The pieces are for the progress line and the memory of tokens.
  tokenizer = Tokenizer(inference.max_length)
  found, progress = [], Progress("embedded", len(texts), "texts")
  for start in range(0, len(texts), TEXTS):
    part = texts[start : start + TEXTS]
    found.append(inference.embed_texts(params, tokenizer(part)))
    progress.add(len(part))
  return np.concatenate(found)


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
  size, on_device = min(BLOCK, len(queries)), jnp.asarray(keys)
  found = []
  for start in range(0, len(queries), BLOCK):
    # The last block is filled with its last query, so that all have one shape.
    rows = np.minimum(np.arange(start, start + size), len(queries) - 1)
    found.append(_ranks(queries[rows], on_device, query_groups[rows], key_groups))
  return np.concatenate(found)[: len(queries)]


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


def fingerprint(params: Mapping[str, Any]) -> str:
  """Hash the values of all parameters: the same on every process, whatever the mesh. It takes seconds a gigabyte."""
  digest = hashlib.sha256()
  for name in sorted(params):
    value = processes.whole(params[name])
    digest.update(f"{name} {value.shape} {value.dtype}\n".encode() + value.tobytes())
  return digest.hexdigest()


def make_record(
  *,
  dataset: str,
  model: str,
  pretrained: str,
  task: str,
  metrics: Mapping[str, float],
  protocol: Mapping[str, Any],
  provenance: Mapping[str, Any],
) -> dict[str, Any]:
  """Return one result in CLIP_benchmark's schema, which users' tools read, and our `protocol` and `provenance` beside
  it."""
  return {
    "dataset": dataset,
    "model": model,
    "pretrained": pretrained,
    "task": task,
    "metrics": dict(metrics),
    "language": "en",
    "protocol": dict(protocol),
    "provenance": dict(provenance),
  }


def shuffled(indices: Int[np.ndarray, " n"], *, seed: int) -> Int[np.ndarray, " n"]:
  """Return a random order of `indices`: the leak test shows the image of one record in the place of another's."""
  return np.random.default_rng(seed).permutation(indices)


def similarity(
  inference: Any,
  params: Mapping[str, Any],
  images: UInt8[np.ndarray, "n H W 3"],
  tokens: Int[np.ndarray, "n l"],
  places: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
  """Return ⟨ê_0, e⟩ of each image and its own prompt: what the run's head says of its own images.

  Noise depends on an image's place alone, as in `Inference.embed_images`.
  """
  q = inference.embed_images(params, images, seed=0, places=places)
  different, rows = np.unique(tokens, axis=0, return_inverse=True)
  return (q * inference.embed_texts(params, different)[rows.ravel()]).sum(axis=1)
