"""Long-tailed recognition: the columns of the paper's Table 8, measured as VL-LTR's code measures them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from diffdis_jax.config import sections
from diffdis_jax.config.section import check_number
from diffdis_jax.data import long_tail, sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, nearest
from diffdis_jax.models import lgr

# Classes by their training images, more than the first number and no more than the second.
GROUPS = {
  "many": (99, np.inf),
  "median": (20, 99),
  "low": (-1, 20),
  "10shot": (-1, 10),
  "5shot": (-1, 5),
}


class LongTail:
  """Task `long_tail`: Image-, Text- and KNN-Acc of a backbone; of a run with a head its accuracy too, each by groups of
  classes.

  Source: the paper's Table 8; VL-LTR (Tian et al., ECCV 2022) for what its columns are.

  Args:
    data: section of a long-tailed set's split, as `data.sources.open_source` takes it.
    neighbours: sentences that vote in KNN-Acc.
    visual_share: weight of the visual branch in the head's prediction: VL-LTR's 0.2; for iNaturalist 0.7.
    crop_pct: share of the side of an image's central square that is cropped; VL-LTR's 0.875.
    seed: seed of the query's noise, one for each image.
    reduced_decoding: decode JPEGs of at least twice the side that is seen at 1/2, 1/4 or 1/8 of their size. It is
      faster, and figures then differ slightly from published protocols.

  Raises:
    UserError: other data, or damaged ones.
  """

  task = "long_tail"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    neighbours: int = 5,
    visual_share: float = 0.2,
    crop_pct: float = sections.LongTail.crop_pct,
    seed: int = 0,
    reduced_decoding: bool = False,
  ):
    if data.get("name") not in long_tail.NAMES:
      raise UserError(f"task long_tail is measured on {', '.join(long_tail.NAMES)}, not on {data.get('name')!r}")
    check_number("neighbours", neighbours, ge=1)
    check_number("visual_share", visual_share, ge=0.0, le=1.0)
    check_number("crop_pct", crop_pct, gt=0.0, le=1.0)
    source = sources.open_source(**data)
    assert isinstance(source, long_tail.LabelledSource)
    self.source, self.labels, self._data = source, source.labels, data
    # The sentences and the training counts are the set's, whatever split is measured.
    where = {name: value for name, value in data.items() if name not in ("split", "image_size")}
    self.corpus = long_tail.open_corpus(**where)
    self.train_counts = long_tail.train_counts(**where)
    self._neighbours, self._visual_share, self._seed = neighbours, visual_share, seed
    self._squares: dict[str, Any] = dict(crop_pct=crop_pct, reduced_decoding=reduced_decoding)

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    group = lambda name: int(in_group(self.train_counts, name).sum())
    return {
      **inference.protocol,
      "seed": self._seed,
      "data": self._data["name"],
      "split": self._data.get("split"),
      "num_images": len(self.labels),
      "num_sentences": len(self.corpus.labels),
      "num_classes": len(self.corpus.classnames),
      "classes_of_groups": {name: group(name) for name in GROUPS},
      "neighbours": self._neighbours,
      "visual_share": self._visual_share,
      **self._squares,
      "ties": "the first counts",
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return image_acc, text_acc, knn_acc and, of a run with a head, acc. image_acc: an image's nearest sentence is of
    its class. text_acc: a sentence's nearest image is of its class. knn_acc: the most frequent class of its nearest
    sentences is its own. acc: the head's prediction, and acc_summed_GROUP by the sum of its branches' logits, by which
    VL-LTR gives its groups."""
    # All of a split: groups of rare classes have few images, and a part of them would be noise.
    indices = np.arange(len(self.labels))
    images = base.embed_images(inference, params, self.source, indices, seed=self._seed, **self._squares)
    texts, of_text = base.embed_texts(inference, params, self.corpus.flat), self.corpus.labels
    classes = of_text[nearest.nearest(images, texts, count=self._neighbours)]
    found = self.labels[nearest.nearest(texts, images, count=1)[:, 0]]
    metrics = {"text_acc": float((found == of_text).mean())}
    metrics |= self._by_group("image_acc", classes[:, 0] == self.labels)
    metrics |= self._by_group("knn_acc", nearest.vote(classes) == self.labels)
    # Stage 1 has a backbone alone; the head comes with stage 2.
    if inference.network.model.head is not None:
      shown = base.Images(self.source, indices, inference.image_size, **self._squares)
      # By the seed of base.embed_images, so that the head sees the noise by which its backbone is measured.
      logits = inference.class_logits(params, shown, seed=self._seed)
      # The mix of the branches' softmax is VL-LTR's prediction. By the sum of logits, below, its code gives the groups.
      predicted = np.asarray(lgr.mixed_prediction(jnp.asarray(logits).swapaxes(0, 1), self._visual_share))
      metrics |= self._by_group("acc", predicted.argmax(axis=1) == self.labels)
      for number, branch in enumerate(("visual", "language")):
        metrics |= self._by_group(f"acc_{branch}", logits[:, number].argmax(axis=1) == self.labels)
      metrics |= self._by_group("acc_summed", logits.sum(axis=1).argmax(axis=1) == self.labels)
    return metrics

  def _by_group(self, name: str, right: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """Return the share of right answers, and that among the images of each group that has any."""
    metrics = {name: float(right.mean())}
    for group in GROUPS:
      of_group = in_group(self.train_counts, group)[self.labels]
      if of_group.any():
        metrics[f"{name}_{group}"] = float(right[of_group].mean())
    return metrics


def in_group(train_counts: Int[np.ndarray, " k"], group: str) -> Bool[np.ndarray, " k"]:
  """Return whether each class is in one of GROUPS."""
  above, at_most = GROUPS[group]
  return (train_counts > above) & (train_counts <= at_most)
