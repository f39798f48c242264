"""Measure the choice between an image's caption and hard negatives, false captions that differ from it in one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts

TIES = "the truth has its share"


@base.settings()
class Choice(base.OfImages):
  """Task `choice`: measure how often an image is nearer to its caption than to all its hard negatives, and to each
  kind.

  Source: none; it follows the probes of word order in ARO (Yuksekgonul et al., 2023) and SugarCrepe (Hsieh et al.,
  2023). Each record of `data` has `negatives`, {kind: false caption}, with the same kinds.
  """

  task = "choice"

  def open(self) -> None:
    super().open()
    self.kinds, self.texts = _read(self.source, self.indices.tolist())

  def protocol(self, inference: Any) -> dict[str, Any]:
    own = {"split": self.data.get("split", "train"), "kinds": list(self.kinds), "ties": TIES}
    return {**super().protocol(inference), **own}

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, the accuracy among the caption and a negative of each kind, and acc1_KIND, the accuracy between the
    caption and the negative of this kind."""
    images = self.embed_images(inference, params)
    # The same few texts recur, so each is embedded once.
    places = {text: i for i, text in enumerate(dict.fromkeys(text for texts in self.texts for text in texts))}
    # A caption and a negative that differ only beyond the maximum length are a tie.
    prompts.warn_of_long(tuple(places), inference.max_length, what="captions")
    embedded = base.embed_texts(inference, params, [*places])
    chosen = embedded[np.array([[places[text] for text in texts] for texts in self.texts])]
    scores = np.einsum("nd,nkd->nk", images, chosen)
    own, others = scores[:, :1], scores[:, 1:]
    by_kind = {f"acc1_{kind}": share_right(own, others[:, i : i + 1]) for i, kind in enumerate(self.kinds)}
    return {"acc1": share_right(own, others), **by_kind}


def share_right(own: Float[np.ndarray, "n 1"], others: Float[np.ndarray, "n k"]) -> float:
  """Return how often a row's own score is the highest. A tie of m scores counts 1/m, as chance would; NaN is wrong."""
  # Test "not smaller" instead of "equal or larger", because both are false for NaN.
  above = ~(others <= own)
  return float(np.where(above.any(axis=1), 0.0, 1 / (1 + (others == own).sum(axis=1))).mean())


def _read(source: Any, indices: Sequence[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Read the kinds of negatives, and the caption and a negative of each kind from every record."""
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
