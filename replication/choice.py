"""Measure the choice among an image's caption and hard negatives, false captions that differ from it in one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts

TIES = "the truth has its share"


class Choice:
  """Task `choice`: how often an image is nearer to its caption than to all of its hard negatives, and to each kind.

  Source: none; after the probes of word order in ARO (Yuksekgonul et al., 2023) and SugarCrepe (Hsieh et al., 2023).

  Args:
    data: section of a data source, as `data.sources.open_source` takes it, whose records have `negatives`, {kind: false
      caption}, of the same kinds each.
    num_images: how many images to measure, the same ones each time; None for all.
    seed: seed of the query's noise, and of the shuffle.
    reduced_decoding: decode JPEGs of at least twice the side that is seen at 1/2, 1/4 or 1/8 of their size. It is
      faster, and figures then differ slightly from published protocols.
    shuffle_labels: the leak test. Each record keeps its place and its captions but shows another one's image, so
      accuracy must fall to chance.

  Raises:
    UserError: a record without negatives, or with other kinds than the first.
  """

  task = "choice"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    num_images: int | None = None,
    seed: int = 0,
    reduced_decoding: bool = False,
    shuffle_labels: bool = False,
  ):
    self.source = sources.open_source(**data)
    self._indices = base.subset(len(self.source), num_images)
    self._split = data.get("split", "train")
    self._seed, self._reduced_decoding, self._shuffle_labels = seed, reduced_decoding, shuffle_labels
    self.kinds, self.texts = _read(self.source, self._indices.tolist())

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    return {
      **inference.protocol,
      "seed": self._seed,
      "split": self._split,
      "num_images": len(self._indices),
      "kinds": list(self.kinds),
      "ties": TIES,
      "reduced_decoding": self._reduced_decoding,
      "shuffle_labels": self._shuffle_labels,
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, among the caption and a negative of each kind, and acc1_KIND, between the caption and the one of
    this kind."""
    order = base.shuffled(self._indices, seed=self._seed) if self._shuffle_labels else self._indices
    images = base.embed_images(
      inference, params, self.source, order, seed=self._seed, reduced_decoding=self._reduced_decoding
    )
    # Texts are few and recur: each is embedded once.
    places = {text: i for i, text in enumerate(dict.fromkeys(text for texts in self.texts for text in texts))}
    # A caption and its negative that differ only beyond what is read are a tie.
    prompts.warn_of_long(tuple(places), inference.max_length, what="captions")
    embedded = base.embed_texts(inference, params, [*places])
    chosen = embedded[np.array([[places[text] for text in texts] for texts in self.texts])]
    scores = np.einsum("nd,nkd->nk", images, chosen)
    own, others = scores[:, :1], scores[:, 1:]
    by_kind = {f"acc1_{kind}": share_right(own, others[:, i : i + 1]) for i, kind in enumerate(self.kinds)}
    return {"acc1": share_right(own, others), **by_kind}


def share_right(own: Float[np.ndarray, "n 1"], others: Float[np.ndarray, "n k"]) -> float:
  """Return how often a row's own score is the highest. One of m equal ones counts 1/m, so ties are chance; NaN is
  wrong."""
  # "Not smaller" instead of "equal or larger": a NaN is neither.
  above = ~(others <= own)
  return float(np.where(above.any(axis=1), 0.0, 1 / (1 + (others == own).sum(axis=1))).mean())


def _read(source: Any, indices: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Read the kinds of negatives, and of each record the caption, then a negative of each kind."""
  kinds: tuple[str, ...] = ()
  texts = []
  for i in indices:
    record = base.fields(source, i)
    negatives = base.get_field(record, "negatives")
    if not isinstance(negatives, Mapping) or not all(isinstance(text, str) and text for text in negatives.values()):
      raise UserError(f"field 'negatives' of record {i} holds {negatives!r}; it should be kind -> false caption")
    kinds = kinds or tuple(negatives)
    if not kinds or {*negatives} != {*kinds}:
      raise UserError(f"record {i} has negatives of kinds {', '.join(negatives) or 'none'}, not {', '.join(kinds)}")
    texts.append((base.get_field(record, "caption"), *(negatives[kind] for kind in kinds)))
  return kinds, texts
