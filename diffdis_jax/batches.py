"""The batches that a config's `data` section asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import grain
from ml_collections import ConfigDict

from diffdis_jax import optim
from diffdis_jax.data import loader, sources
from diffdis_jax.data.latents import Latents
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.models import build, latents
from diffdis_jax.structs import Batch, LatentBatch, UserError
from diffdis_jax.tree import Params

# Fields of `data` that are not the source's.
LOADING = ("max_length", "augment", "discrimination_view", "discrimination_augment", "mixture", "loader")


def make_loader(config: ConfigDict, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
  """Endless batches; of `rows`, the places of this process's rows in the global batch, or of all of them."""
  data = config.data
  if data.discrimination_view not in ("shared", "own"):
    raise UserError(f"data.discrimination_view is {data.discrimination_view!r}; it is 'shared' or 'own'")
  own_view = data.discrimination_view == "own"
  sections = source_sections(config)
  if data.mixture:
    source = sources.make_mixture(sections, image_size=config.image_size)
  else:
    source = sources.make(**sections["data"], image_size=config.image_size)
  if batch_type(config) is LatentBatch:
    _check_latents(config, source.sources if data.mixture else (source,))
  return loader.train_loader(
    source,
    tokenizer=Tokenizer(data.max_length),
    batch_size=config.batch_size,
    image_size=config.image_size,
    seed=config.seed,
    augmentation=_make_augmentation(config, "augment"),
    discrimination_augmentation=_make_augmentation(config, "discrimination_augment") if own_view else None,
    rows=rows,
    **data.loader,
  )


def source_sections(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Of the sources that the run reads: those of `data.mixture`, by name, or the one that `data` itself names."""
  data = config.data.to_dict()
  own = {field: data[field] for field in data if field not in LOADING}
  return dict(sorted(data["mixture"].items())) or {"data": own}


def batch_type(config: ConfigDict) -> type[Batch] | type[LatentBatch]:
  """What the loader's arrays are fields of. Raises UserError for a mixture of latents and images."""
  kinds = {section.get("name", "pairs") == "latents" for section in source_sections(config).values()}
  if len(kinds) > 1:
    raise UserError("data.mixture has latents and images; take either")
  return LatentBatch if kinds.pop() else Batch


def describe(config: ConfigDict) -> list[str]:
  """A line for each source, with what its preparation counted."""
  lines = []
  for section in source_sections(config).values():
    weight = section.pop("weight", None)
    lines.append(sources.describe(**section) + ("" if weight is None else f", weight {weight}"))
  return lines


def _check_latents(config: ConfigDict, cached: Sequence[Latents]) -> None:
  """Raises UserError unless the config can train from these latents."""
  if "reconstruction" in config.objectives or config.data.discrimination_view != "shared":
    raise UserError("objective reconstruction and data.discrimination_view='own' need images; take another data.name")
  side = config.image_size // build.latent_factor(config.model)
  expected = (side, side, 2 * config.model.autoencoder.latent_channels)
  if len({"text" in each.facts for each in cached}) > 1:
    raise UserError("data.mixture has latents with text conditions and without; take either")
  for each in cached:
    _check_text(config, each)
    if each.shape != expected or each.facts["image_size"] != config.image_size:
      raise UserError(
        f"these latents are of {each.facts['image_size']} px images and of shape {each.shape}; the config's are of"
        f" {config.image_size} px and {expected}; prepare them with the same image_size and autoencoder"
      )


def _check_text(config: ConfigDict, cached: Latents) -> None:
  """Raises UserError for stored text conditions of another length or width."""
  if "text" not in cached.facts:
    return
  length, width = cached.facts["text"]["shape"]
  if (length, width) != (config.data.max_length, config.model.text_encoder.width):
    raise UserError(
      f"these text conditions are of {length} tokens and {width} wide; the config's are of {config.data.max_length}"
      f" and {config.model.text_encoder.width}; prepare them with the same data.max_length and text encoder"
    )


def check_encoders(config: ConfigDict, params: Params) -> None:
  """Raises UserError where the run trains from latents or text conditions of other encoders than its own, or trains an
  encoder that stored conditions would not follow."""
  if batch_type(config) is not LatentBatch:
    return
  groups = optim.groups_of(params, config.optim.groups)
  for section in source_sections(config).values():
    facts = (sources.read_info(section["path"]).metadata or {}).get("latents", {})
    stored = [("latents", "autoencoder", facts["fingerprint"], latents.ENCODER)]
    if "text" in facts:
      if any(group != optim.FROZEN for path, group in groups.items() if latents.TEXT_ENCODER.match(path)):
        raise UserError(
          "the text encoder is trained, and stored text conditions would not follow it; freeze it in optim.groups, or"
          " prepare the latents without --text"
        )
      stored.append(("text conditions", "text encoder", facts["text"]["fingerprint"], latents.TEXT_ENCODER))
    for what, encoder, fingerprint, which in stored:
      if not math.isclose(fingerprint, latents.fingerprint(params, which), rel_tol=1e-4):
        raise UserError(
          f"the {what} in {section['path']} were made by another {encoder}; set init_from to the workdir that they"
          " were made with"
        )


def _make_augmentation(config: ConfigDict, field: str) -> Augmentation:
  """Raises UserError for a wrong field or value."""
  try:
    return Augmentation(**config.data[field])
  except (TypeError, ValueError) as error:
    raise UserError(f"data.{field}: {error}") from error
