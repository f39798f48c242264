"""Batches for one host: a Grain pipeline for training."""

from __future__ import annotations

import abc
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from jaxtyping import Int

from diffdis_jax.common import signals
from diffdis_jax.config.data import Augmentation, Loading
from diffdis_jax.data import records, shards
from diffdis_jax.data.latents import Latents
from diffdis_jax.data.long_tail import LabelledSource, Tokens
from diffdis_jax.data.sources import Mixture, Ordered, Source
from diffdis_jax.data.transforms import augment, needed_side
from diffdis_jax.errors import UserError

ROWS = "rows"  # of a batch: str[b], the key of each row's record, or its place in the source
SUBSTITUTED = "substituted"  # of a batch: i32[b r], by how many records of each of records.REASONS a row was missed
ATTEMPTS = 100  # records in a row that may be unusable
_AS_STORED, _LOADING = Augmentation(), Loading()
Tokenizer = Callable[[Sequence[str]], Int[np.ndarray, "n l"]]


def train_loader(
  source: Source | Mixture,
  *,
  tokenizer: Tokenizer,
  batch_size: int,
  image_size: int,
  seed: int,
  augmentation: Augmentation = _AS_STORED,
  discrimination_augmentation: Augmentation | None = None,
  rows: Sequence[int] | None = None,
  loading: Loading = _LOADING,
) -> grain.DatasetIterator:
  """Return endless batches of this host, shuffled each epoch: {'image': u8[b h w 3], 'tokens': i32[b l], SUBSTITUTED,
  ROWS}.

  Of latents: {'mean': bf16[b h w c], 'log_variance': bf16[b h w c], 'tokens', ...}, a random view each time.

  Global batch k is made of the same records and augmentations for any number of hosts, of which each takes its `rows`.
  The position is saved by `grain.checkpoint.CheckpointSave(iterator)` and does not depend on the number of hosts or
  threads, but on `num_workers`. The next usable record replaces one that cannot be used: neither the number of batches
  nor the other rows depend on it.

  Args:
    source: or several with weights; each is shuffled and begun again on its own.
    batch_size: global.
    discrimination_augmentation: of a second view of each image, 'discrimination_image': u8[b h w 3]; None for none.
    rows: places in the global batch of this host's rows, as many on each host; None for all.
    loading: how records are read ahead. Each process that prepares batches has as many threads of its own.
  """
  parts = source.sources if isinstance(source, Mixture) else (source,)
  datasets = []
  for i, part in enumerate(parts):
    images = (image_size, augmentation, discrimination_augmentation)
    example = _LatentExample(part) if isinstance(part, Latents) else _ImageExample(part, *images)
    # A seed a source: two of one length would be shuffled alike.
    if isinstance(part, shards.Sharded) and shards.is_large(part.lengths):
      order = shards.Order(part.lengths, seed + i, prefetch=part.prefetch)
      datasets.append(grain.MapDataset.source(order).seed(seed + i).random_map(example))
    else:
      is_ordered = isinstance(part, Ordered)
      order = part.order(seed + i) if is_ordered else grain.MapDataset.range(len(part)).seed(seed + i).shuffle()
      # `repeat` last: each epoch it gives new seeds to what stands before it, the order and the augmentation.
      datasets.append(order.random_map(example).repeat())
  dataset = grain.MapDataset.mix(datasets, source.weights) if isinstance(source, Mixture) else datasets[0]
  return _read_ahead(dataset, rows, batch_size, functools.partial(_collate, tokenizer=tokenizer), loading)


def labelled_loader(
  source: LabelledSource,
  *,
  tokens: Tokens | None,
  sampling_exponent: float,
  batch_size: int,
  image_size: int,
  seed: int,
  augmentation: Augmentation = _AS_STORED,
  rows: Sequence[int] | None = None,
  loading: Loading = _LOADING,
) -> grain.DatasetIterator:
  """Return endless batches {'image': u8[b h w 3], 'label': i32[b], SUBSTITUTED, ROWS}, and 'tokens': i32[b l], a
  sentence of each image's class, where `tokens` has them. Images are sampled with replacement.

  What stands at each place of each global batch follows from (seed, place) alone; for all else see `train_loader`. A
  class of n images has the share n^sampling_exponent of the samples, each of its images alike: 0.5 is VL-LTR's
  square-root sampling; 1 samples all images alike, 0 all classes.
  """
  example = _LabelledExample(source, image_size, augmentation, tokens)
  return _read_ahead(_ByClass(example, source.labels, sampling_exponent, seed), rows, batch_size, _collate, loading)


def _read_ahead(
  dataset: Any, rows: Sequence[int] | None, batch_size: int, collate: Callable[..., Any], how: Loading
) -> grain.DatasetIterator:
  places = tuple(range(batch_size) if rows is None else rows)
  iterable: grain.IterDataset = _Batches(dataset, places, batch_size, collate, how)
  if how.num_workers:
    if not flags.FLAGS.is_parsed():  # by a program that has none, such as a notebook; Grain asks for its own
      flags.FLAGS.mark_as_parsed()
    # Ctrl-C in a terminal reaches the workers too; when they end their parent decides, also by being killed.
    iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=how.num_workers), signals.begin_worker)
  return iter(iterable)


def _collate(examples: Sequence[dict[str, Any]], tokenizer: Tokenizer | None = None) -> dict[str, np.ndarray]:
  """Stack examples. Captions are tokenized all at once, at a fraction of the cost."""
  arrays = {name: np.stack([example[name] for example in examples]) for name in examples[0] if name != "caption"}
  return arrays if tokenizer is None else {**arrays, "tokens": tokenizer([example["caption"] for example in examples])}


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The examples at these places of every `stride`-th batch of an endless dataset from `first` on, one after another:
  rows of the global order, so that batches are the same for any number of hosts."""

  dataset: Any  # grain.MapDataset | _ByClass
  places: tuple[int, ...]
  batch_size: int
  first: int = 0
  stride: int = 1

  def __len__(self) -> int:
    # To Grain an endless dataset is one whose last index still fits 64 bits.
    return sys.maxsize // (self.batch_size * self.stride) * len(self.places) - self.first * len(self.places)

  def __getitem__(self, index: int) -> dict[str, Any]:
    batch, row = divmod(index, len(self.places))
    # Nothing filters the dataset: no example is None.
    return self.dataset[(self.first + batch * self.stride) * self.batch_size + self.places[row]]


class _Batches(grain.IterDataset):
  """Batches of rows that threads read one by one. The position is a number of batches, so it fits any number of
  hosts."""

  def __init__(self, dataset: Any, places: tuple[int, ...], batch_size: int, collate: Any, how: Loading):
    super().__init__()
    self._rows, self._collate, self._how = _Rows(dataset, places, batch_size), collate, how

  def set_slice(self, part: slice, sequential_slice: bool = False) -> None:
    """Take every so many-th batch. Grain asks for it in each process that prepares batches."""
    del sequential_slice
    self._rows = dataclasses.replace(self._rows, first=part.start or 0, stride=part.step or 1)

  def __iter__(self) -> grain.DatasetIterator:
    count = len(self._rows.places)
    options = grain.ReadOptions(num_threads=self._how.num_threads, prefetch_buffer_size=self._how.prefetch * count)
    return _BatchIterator(iter(grain.MapDataset.source(self._rows).to_iter_dataset(options)), count, self._collate)


class _BatchIterator(grain.DatasetIterator):
  def __init__(self, rows: grain.DatasetIterator, count: int, collate: Any):
    super().__init__(rows)
    self._rows, self._count, self._collate = rows, count, collate

  def __next__(self) -> dict[str, np.ndarray]:
    return self._collate([next(self._rows) for _ in range(self._count)])

  def get_state(self) -> dict[str, int]:
    return {"next_index": self._rows.get_state()["next_index"] // self._count}

  def set_state(self, state: dict[str, int]) -> None:
    self._rows.set_state({"next_index": state["next_index"] * self._count})


@dataclasses.dataclass(frozen=True)
class _Example(grain.transforms.RandomMap):
  """A place in the source -> an example, or that of the next record that can be used."""

  source: Source

  def random_map(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
    missed = np.zeros(len(records.REASONS), np.int32)
    # The next by place, which every host finds alike; a small source is not asked twice for the same one.
    for attempt in range(min(ATTEMPTS, len(self.source))):
      try:
        # Counted in the batch, since workers of other processes share no counter with this one.
        return {**self.make((place + attempt) % len(self.source), rng), SUBSTITUTED: missed}
      except records.Unusable as error:
        missed[records.REASONS.index(str(error))] += 1
    raise UserError(f"{missed.sum()} records in a row cannot be used: {listed(missed)}; prepare the data set again")

  @abc.abstractmethod
  def make(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
    """Make the example of a record. Raises records.Unusable."""


def name_of(record: Mapping[str, Any], place: int) -> str:
  """Return a record's name in the log: its key, or its place in the source, from 0."""
  return str(record.get("key", place))


def draw_caption(record: Mapping[str, Any], rng: np.random.Generator) -> str:
  """Return the record's caption, or a random one where it has several."""
  captions = records.captions_of(record)
  return captions[rng.integers(len(captions))] if captions else record["caption"]


@dataclasses.dataclass(frozen=True)
class _ImageExample(_Example):
  """{'image': u8[h w 3], 'caption'}, and 'discrimination_image': u8[h w 3] where that has a view of its own."""

  image_size: int
  augmentation: Augmentation
  discrimination_augmentation: Augmentation | None

  def make(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
    record, views = self.source[place], {"image": self.augmentation}
    if self.discrimination_augmentation is not None:
      views["discrimination_image"] = self.discrimination_augmentation
    # Decoded once, with pixels enough for both views.
    image = records.read_image(record["image"], at_least=needed_side(self.image_size, *views.values()))
    example = {name: augment(image, rng, size=self.image_size, how=how) for name, how in views.items()}
    return {**example, ROWS: name_of(record, place), "caption": draw_caption(record, rng)}


class _ByClass:
  """An endless dataset that samples a class, then one of its images: a function of (seed, place)."""

  def __init__(self, example: _LabelledExample, labels: Int[np.ndarray, " n"], sampling_exponent: float, seed: int):
    self._example, self._seed = example, seed
    self._order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    self._ends = np.cumsum(counts)
    # 0 ** 0 is 1: with exponent 0 a class without images would have a share.
    shares = np.where(counts > 0, counts.astype(np.float64) ** sampling_exponent, 0.0)
    self._shares = np.cumsum(shares) / shares.sum()
    self._starts = self._ends - counts

  def __getitem__(self, place: int) -> dict[str, Any]:
    # A generator a place, so that it makes no difference which host, thread or start asks for it.
    rng = np.random.default_rng((self._seed, place))
    # The last sum may be rounded to below 1, and the sample lie above it.
    label = min(np.searchsorted(self._shares, rng.random(), side="right"), len(self._ends) - 1)
    return self._example.random_map(int(self._order[rng.integers(self._starts[label], self._ends[label])]), rng)


@dataclasses.dataclass(frozen=True)
class _LabelledExample(_Example):
  """{'image': u8[h w 3], 'label': i32[]}, and 'tokens': i32[l], a sentence of the class, where there are any."""

  image_size: int
  augmentation: Augmentation
  tokens: Tokens | None

  def make(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
    record = self.source[place]
    image = records.read_image(record["image"], at_least=needed_side(self.image_size, self.augmentation))
    seen = augment(image, rng, size=self.image_size, how=self.augmentation)
    example = {"image": seen, "label": np.int32(record["label"]), ROWS: name_of(record, place)}
    return example if self.tokens is None else {**example, "tokens": self.tokens.draw(record["label"], rng)}


@dataclasses.dataclass(frozen=True)
class _LatentExample(_Example):
  """{'mean': bf16[h w c], 'log_variance': bf16[h w c], 'caption'} of one of the views."""

  source: Latents

  def make(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
    record = self.source.read(place, int(rng.integers(self.source.views)))
    mean, log_variance = np.split(record["moments"], 2, axis=-1)
    named = {ROWS: name_of(record, place), "caption": draw_caption(record, rng)}
    return {"mean": mean, "log_variance": log_variance, **named}


def listed(missed: Int[np.ndarray, " r"]) -> str:
  """Say "2 corrupt image, 1 missing caption"."""
  return ", ".join(f"{n} {reason}" for n, reason in zip(missed, records.REASONS) if n)


class Substitutions:
  """Counts, by reason, the records of this host's batches in whose place another one came."""

  def __init__(self) -> None:
    self.new = np.zeros(len(records.REASONS), np.int64)  # for each of records.REASONS those that were not yet reported
    self.total = self.new.copy()  # those that were
    self.rows = np.empty(0, np.str_)  # what names the records of the last batch

  def take(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Count those of a batch, and return it without them."""
    rest = dict(batch)
    self.new += rest.pop(SUBSTITUTED).sum(axis=0)
    self.rows = rest.pop(ROWS)
    return rest

  def report(self, over_hosts: Callable[[np.ndarray], np.ndarray] = lambda own: own) -> dict[str, int]:
    """Log the new ones, and return their number as `substituted`. `over_hosts` adds up those of all hosts."""
    new = over_hosts(self.new)
    self.total, self.new = self.total + new, np.zeros_like(new)
    if new.any():
      logging.warning("records that cannot be used: %s; since the start: %s", listed(new), listed(self.total))
    return {SUBSTITUTED: int(new.sum())}
