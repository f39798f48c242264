"""The batches that a config's `data` section asks for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from diffdis_jax.config.data import Data
from diffdis_jax.config.run import Run
from diffdis_jax.data import loader, long_tail, records, sources
from diffdis_jax.data.latents import Latents
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.structs import Batch, LabelledBatch, LatentBatch


def batch_type(data: Data) -> type[Batch] | type[LatentBatch] | type[LabelledBatch]:
  """Return the type whose fields are the loader's arrays. Raises UserError for a mixture of latents and images."""
  if data.sampling is not None:
    return LabelledBatch
  kinds = {section.get("name", "pairs") == "latents" for section in data.sources.values()}
  if len(kinds) > 1:
    raise UserError("data.mixture has latents and images; take either")
  return LatentBatch if kinds.pop() else Batch


def describe(data: Data) -> list[str]:
  """Return a line for each source."""
  lines = []
  for section in data.sources.values():
    # Nothing is opened or rendered for a description, so that any size will do.
    fields = {"name": "pairs", "image_size": 0, **section}
    weight = f", weight {fields.pop('weight')}" if "weight" in fields else ""
    lines.append(sources.read(**fields).describe() + weight)
  return lines


def latent_facts(data: Data) -> dict[str, Mapping[str, Any]]:
  """Return, by path, what the preparation of latents wrote of them; nothing for images."""
  if batch_type(data) is not LatentBatch:
    return {}
  paths = [str(section["path"]) for section in data.sources.values()]
  return {path: (records.read_info(path).metadata or {}).get("latents", {}) for path in paths}


def doubts(run: Run) -> list[str]:
  """Return a sentence for latents of other views than data.augment, which has no effect on them, asks for."""
  asked = json.loads(json.dumps(dataclasses.asdict(run.data.augment)))  # as in the folder, lists for tuples
  sentences = []
  for path, facts in latent_facts(run.data).items():
    stored = facts.get("augmentation", {})
    if other := [name for name in asked if stored.get(name, asked[name]) != asked[name] and name != "reduced_decoding"]:
      there, here = (", ".join(f"{name}={fields[name]}" for name in other) for fields in (stored, asked))
      sentences.append(f"{path}: its views were made by {there}; data.augment, {here}, has no effect on latents")
  return sentences


def open_loader(
  run: Run, *, rows: Sequence[int] | None = None, latent_shape: tuple[int, int, int] | None = None
) -> grain.DatasetIterator:
  """Open endless batches. Raises UserError: data that cannot be read or do not fit.

  Args:
    run: says what of, how many rows they have, and the seed of order and augmentation.
    rows: places of this process's rows in the global batch; None for all of them.
    latent_shape: [h, w, c], which stored latents must have; None for a run that cannot train from any.
  """
  data, is_sampled = run.data, run.data.sampling is not None
  if long_tail.is_sampled(**data.source) != is_sampled or (is_sampled and data.mixture):
    raise UserError(
      f"data.name is {data.source['name']!r}, and data.sampling {'is' if is_sampled else 'is not'} there; it belongs to"
      f" the long-tailed sets alone, {', '.join(long_tail.SETS)}, without a mixture: take configs/places_lt.py"
    )
  common: dict[str, Any] = dict(
    batch_size=run.batch_size,
    image_size=run.image_size,
    seed=run.seed,
    augmentation=data.augment,
    rows=rows,
    loading=data.loader,
  )
  if data.mixture:
    source = sources.open_mixture(data.sources, image_size=run.image_size)
  else:
    source = sources.open_source(**data.source, image_size=run.image_size)
  if data.sampling is not None:
    assert isinstance(source, long_tail.LabelledSource)  # by the check above
    tokens = open_tokens(data) if data.sampling.sentences else None
    # A label is a place in both: sentences of another list of classes would be wrong in silence.
    if tokens and len(tokens.starts) - 1 != len(source.classnames):
      raise UserError(f"the text corpus has {len(tokens.starts) - 1} classes, and the images {len(source.classnames)}")
    exponent = data.sampling.sampling_exponent
    return loader.labelled_loader(source, tokens=tokens, sampling_exponent=exponent, **common)
  if batch_type(data) is LatentBatch:
    # The shapes stand in the folder's description: what does not fit ends here, before a step is compiled for it.
    opened = source.sources if isinstance(source, sources.Mixture) else (source,)
    _check_latents(run, [cache for cache in opened if isinstance(cache, Latents)], latent_shape)
  tokenizer = Tokenizer(data.max_length)
  return loader.train_loader(source, tokenizer=tokenizer, discrimination_augmentation=data.own_augment, **common)


def open_tokens(data: Data) -> long_tail.Tokens:
  """Read the sentences of a long-tailed set's classes, in tokens. Raises UserError: damaged data."""
  return long_tail.tokens_of(long_tail.SETS[data.source["name"]].open_corpus(**data.source), Tokenizer(data.max_length))


def _check_latents(run: Run, caches: Sequence[Latents], shape: tuple[int, int, int] | None) -> None:
  """Refuse latents that a run cannot train from. Raises UserError."""
  # A stored latent is of one view, and has no pixels to take another one of.
  if shape is None or run.data.own_augment is not None:
    raise UserError(
      "objectives reconstruction and contrastive, and data.discrimination_view='own', need images; take another"
      " data.name"
    )
  h, w, c = shape
  for cache in caches:
    # The last axis has the mean, then the log variance.
    if cache.shape != (h, w, 2 * c) or cache.facts["image_size"] != run.image_size:
      raise UserError(
        f"these latents are of {cache.facts['image_size']} px images and of shape {cache.shape}; the config's are of"
        f" {run.image_size} px and {(h, w, 2 * c)}; prepare them with the same image_size and autoencoder"
      )
