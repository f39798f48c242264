"""A config's `data` section, and the batches that it asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
from ml_collections import ConfigDict

from diffdis_jax.common import files
from diffdis_jax.data import loader, long_tail, records, sources
from diffdis_jax.data.corpus import Tokens
from diffdis_jax.data.latents import Latents
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.errors import UserError, check_choice, check_number, read_section
from diffdis_jax.structs import Batch, LabelledBatch, LatentBatch

MOST_READERS = 1024  # threads, or processes: more than any host has cores
MOST_AHEAD = 10_000  # batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
  """How batches are read ahead; a config's `data.loader`.

  Attributes:
    num_threads: that read ahead, 0 to do everything in the calling thread.
    num_workers: processes that prepare batches, 0 for none.
    prefetch: batches read ahead by the threads, at least 1.
  """

  num_threads: int
  num_workers: int
  prefetch: int

  def __post_init__(self) -> None:
    check_number("num_threads", self.num_threads, at_least=0, at_most=MOST_READERS)
    check_number("num_workers", self.num_workers, at_least=0, at_most=MOST_READERS)
    check_number("prefetch", self.prefetch, at_least=1, at_most=MOST_AHEAD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How images of a long-tailed set are drawn; a config's `data.sampling`.

  Attributes:
    sampling_exponent: a class of n images has the share n^sampling_exponent of the draws; 0.5 is VL-LTR's square-root
      sampling.
    sentences: whether a sentence of its class comes with each image.
  """

  sampling_exponent: float
  sentences: bool

  def __post_init__(self) -> None:
    check_number("sampling_exponent", self.sampling_exponent, at_least=0.0, at_most=1.0)
    check_choice("sentences", self.sentences, (True, False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run trains on: a config's `data` section and the two fields beside it that decide what a batch is.

  Attributes:
    sources: name -> what `sources.open_source` takes, and `weight` where there are several.
    is_mixture: whether there are.
    image_size: side of the square images, pixels.
    max_length: tokens of a caption.
    augmentation: of an image.
    discrimination_augmentation: of discrimination's own view of it; None where both objectives share one.
    loading: how batches are read ahead.
    sampling: of a long-tailed set, whose batches have labels; None of any other.
  """

  sources: Mapping[str, Mapping[str, Any]]
  is_mixture: bool
  image_size: int
  max_length: int
  augmentation: Augmentation
  discrimination_augmentation: Augmentation | None
  loading: Loading
  sampling: Sampling | None = None

  @property
  def batch_type(self) -> type[Batch] | type[LatentBatch] | type[LabelledBatch]:
    """What the loader's arrays are fields of. Raises UserError for a mixture of latents and images."""
    if self.sampling is not None:
      return LabelledBatch
    kinds = {section.get("name", "pairs") == "latents" for section in self.sources.values()}
    if len(kinds) > 1:
      raise UserError("data.mixture has latents and images; take either")
    return LatentBatch if kinds.pop() else Batch

  @property
  def paths(self) -> list[str]:
    """Where the sources are that are on a disk or in a bucket."""
    return [str(section["path"]) for section in self.sources.values() if section.get("path")]

  def describe(self) -> list[str]:
    """A line for each source, with what its preparation counted."""
    lines = []
    for section in self.sources.values():
      rest = {"name": "pairs", "image_size": self.image_size, **section}
      weight = f", weight {rest.pop('weight')}" if "weight" in rest else ""
      lines.append(sources.read(**rest).describe() + weight)
    return lines

  def latent_facts(self) -> dict[str, Mapping[str, Any]]:
    """Path -> what the preparation of the latents there wrote of them; empty for images."""
    if self.batch_type is not LatentBatch:
      return {}
    paths = [str(section["path"]) for section in self.sources.values()]
    return {path: (records.read_info(path).metadata or {}).get("latents", {}) for path in paths}


def read_data(config: ConfigDict) -> Data:
  """The `data` section of a config.

  Raises:
    UserError: a wrong field or value.
  """
  fields = config.data.to_dict()
  mixture, loading = fields.pop("mixture"), fields.pop("loader")
  max_length, view = fields.pop("max_length"), fields.pop("discrimination_view")
  sampling = fields.pop("sampling", None)
  _check_sampling(fields["name"], sampling, is_mixture=bool(mixture))
  check_choice("data.discrimination_view", view, ("shared", "own"))
  augmentation, own = (
    read_section(Augmentation, fields.pop(name), f"data.{name}") for name in ("augment", "discrimination_augment")
  )
  return Data(
    sources=dict(sorted(mixture.items())) or {"data": fields},
    is_mixture=bool(mixture),
    image_size=config.image_size,
    max_length=max_length,
    augmentation=augmentation,
    discrimination_augmentation=own if view == "own" else None,
    loading=read_section(Loading, loading, "data.loader"),
    sampling=None if sampling is None else read_section(Sampling, sampling, "data.sampling"),
  )


def _check_sampling(name: str, sampling: Any, *, is_mixture: bool) -> None:
  """Raises UserError where a long-tailed set has no sampling, or another set has one."""
  if (name in long_tail.NAMES) != (sampling is not None) or (sampling is not None and is_mixture):
    raise UserError(
      f"data.name is {name!r}, and data.sampling {'is not' if sampling is None else 'is'} there; it belongs to the"
      f" long-tailed sets alone, {', '.join(long_tail.NAMES)}, without a mixture: take configs/places_lt.py or"
      " configs/shapes_lt.py"
    )


def open_loader(
  data: Data, *, batch_size: int, seed: int, rows: Sequence[int] | None = None, latents: LatentShapes | None = None
) -> grain.DatasetIterator:
  """Endless batches.

  Args:
    data: what of.
    batch_size: global.
    seed: of order and augmentation.
    rows: places of this process's rows in the global batch; None for all of them.
    latents: what stored latents must fit; None for a run that cannot train from any.

  Raises:
    UserError: bad settings, or data that cannot be read or do not fit.
  """
  if data.sampling is not None:
    return _open_labelled(data, batch_size=batch_size, seed=seed, rows=rows)
  if data.is_mixture:
    source = sources.open_mixture(data.sources, image_size=data.image_size)
  else:
    source = sources.open_source(**data.sources["data"], image_size=data.image_size)
  if data.batch_type is LatentBatch:
    opened = source.sources if isinstance(source, sources.Mixture) else (source,)
    _check_latents(data, [each for each in opened if isinstance(each, Latents)], latents)
  return loader.train_loader(
    source,
    tokenizer=Tokenizer(data.max_length),
    batch_size=batch_size,
    image_size=data.image_size,
    seed=seed,
    augmentation=data.augmentation,
    discrimination_augmentation=data.discrimination_augmentation,
    rows=rows,
    **dataclasses.asdict(data.loading),
  )


def _open_labelled(data: Data, *, batch_size: int, seed: int, rows: Sequence[int] | None) -> grain.DatasetIterator:
  assert data.sampling is not None
  section = data.sources["data"]
  source = sources.open_source(**section, image_size=data.image_size)
  assert isinstance(source, long_tail.LabelledSource)
  tokens = None
  if data.sampling.sentences:
    tokens = open_tokens(section, max_length=data.max_length)
    if len(tokens.starts) - 1 != len(source.classnames):
      raise UserError(f"the text corpus has {len(tokens.starts) - 1} classes, and the images {len(source.classnames)}")
  return loader.labelled_loader(
    source,
    tokens=tokens,
    sampling_exponent=data.sampling.sampling_exponent,
    batch_size=batch_size,
    image_size=data.image_size,
    seed=seed,
    augmentation=data.augmentation,
    rows=rows,
    **dataclasses.asdict(data.loading),
  )


def open_tokens(section: Mapping[str, Any], *, max_length: int) -> Tokens:
  """The sentences of a long-tailed set's classes, as its `data` section says, in tokens. Raises UserError: damaged
  data."""
  corpus = long_tail.open_corpus(**section)
  return long_tail.kept_tokens(corpus, Tokenizer(max_length), max_length=max_length, folder=files.user_cache("tokens"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentShapes:
  """Of what a network's encoders give.

  Attributes:
    latent: [h, w, c] of a latent.
    text_width: of the text condition.
  """

  latent: tuple[int, int, int]
  text_width: int


def _check_latents(data: Data, cached: Sequence[Latents], expected: LatentShapes | None) -> None:
  """Raises UserError unless a run can train from these latents."""
  if expected is None or data.discrimination_augmentation is not None:
    raise UserError(
      "objectives reconstruction and contrastive, and data.discrimination_view='own', need images; take another"
      " data.name"
    )
  if len({"text" in each.facts for each in cached}) > 1:
    raise UserError("data.mixture has latents with text conditions and without; take either")
  h, w, c = expected.latent
  for each in cached:
    _check_text(data, each, expected.text_width)
    if each.shape != (h, w, 2 * c) or each.facts["image_size"] != data.image_size:
      raise UserError(
        f"these latents are of {each.facts['image_size']} px images and of shape {each.shape}; the config's are of"
        f" {data.image_size} px and {(h, w, 2 * c)}; prepare them with the same image_size and autoencoder"
      )


def _check_text(data: Data, cached: Latents, text_width: int) -> None:
  """Raises UserError for stored text conditions of another length or width."""
  if "text" not in cached.facts:
    return
  length, width = cached.facts["text"]["shape"]
  if (length, width) != (data.max_length, text_width):
    raise UserError(
      f"these text conditions are of {length} tokens and {width} wide; the config's are of {data.max_length}"
      f" and {text_width}; prepare them with the same data.max_length and text encoder"
    )
