"""Batches for one host: a Grain pipeline for training, a plain generator for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.data.sources import Source
from diffdis_jax.data.transforms import Augmentation, augment, decode, resize

_AS_STORED = Augmentation()


def train_loader(
  source: Source,
  *,
  tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n l"]],
  batch_size: int,
  image_size: int,
  seed: int,
  augmentation: Augmentation = _AS_STORED,
  shard_index: int = 0,
  shard_count: int = 1,
  num_threads: int = 16,
  num_workers: int = 0,
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Endless batches {'image': u8[b h w 3], 'tokens': i32[b l]} of this host, shuffled anew each epoch.

  Global batch k is made of the same records and augmentations for any number of hosts: host p of n takes every n-th,
  from the p-th on. The position is saved by `grain.checkpoint.CheckpointSave(iterator)` and does not depend on the
  number of hosts or threads, but on `num_workers`.

  Args:
    batch_size: global; each host gets `batch_size // shard_count` rows.
    seed: of order and augmentation.
    shard_index: this host, of `shard_count`.
    num_threads: that read ahead, 0 to do everything in the calling thread.
    num_workers: processes that prepare batches, 0 for none. They inherit `num_threads`.
    prefetch: batches read ahead by the threads.

  Raises:
    UserError: a batch size that the hosts do not divide.
  """
  if batch_size % shard_count:
    from diffdis_jax.structs import UserError  # here, since it imports jax, which data workers go without

    raise UserError(f"batch_size {batch_size} does not divide by {shard_count} hosts; take a multiple of {shard_count}")
  dataset = grain.MapDataset.source(source).seed(seed).shuffle()
  dataset = dataset.random_map(_TrainExample(tokenizer, image_size, augmentation)).repeat()
  batches = dataset[shard_index::shard_count].batch(batch_size // shard_count)
  iterable = batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
  if num_workers:
    iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return iter(iterable)


@dataclasses.dataclass(frozen=True)
class _TrainExample(grain.transforms.RandomMap):
  """A source's record -> {'image': u8[h w 3], 'tokens': i32[l]}."""

  tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n l"]]
  image_size: int
  augmentation: Augmentation

  def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    image = augment(decode(element["image"]), rng, size=self.image_size, how=self.augmentation)
    return {"image": image, "tokens": self.tokenizer([element["caption"]])[0]}


class EvalBatch(NamedTuple):
  """Images, and beside each its record without the image."""

  image: UInt8[np.ndarray, "b h w 3"]
  records: list[dict[str, Any]]


def eval_batches(source: Source, *, image_size: int, batch_size: int) -> Iterator[EvalBatch]:
  """Every record once, in order, resized and centrally cropped; the last batch may be short."""
  for start in range(0, len(source), batch_size):
    records = [source[i] for i in range(start, min(start + batch_size, len(source)))]
    images = [np.asarray(resize(decode(record.pop("image")), image_size)) for record in records]
    yield EvalBatch(np.stack(images), records)
