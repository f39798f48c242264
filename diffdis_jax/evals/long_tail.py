"""Long-tailed recognition: the columns of the paper's Table 8, measured as VL-LTR's code measures them.

Of equal scores the first counts, as in an argmax. Scores are computed on the device, a block of them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from diffdis_jax.config import sections
from diffdis_jax.config.section import field, number
from diffdis_jax.data import long_tail, sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.method.long_tail import sentence_losses
from diffdis_jax.models import lgr

SCORES = 2**26  # on the device at a time
# Classes by their training images, more than the first number and no more than the second.
GROUPS = {
  "many": (99, np.inf),
  "median": (20, 99),
  "low": (-1, 20),
  "10shot": (-1, 10),
  "5shot": (-1, 5),
}


@base.settings()
class LongTail(base.Evaluation):
  """Task `long_tail`: Image-, Text- and KNN-Acc of a backbone; of a run with a head its accuracy too, each by groups of
  classes.

  Source: the paper's Table 8; VL-LTR (Tian et al., ECCV 2022) for what its columns are.
  """

  task = "long_tail"

  data: Mapping[str, Any] = field(help="section of a long-tailed set's split")
  neighbours: int = number(5, ge=1, help="sentences that vote in KNN-Acc")
  visual_share: float = number(
    0.2, ge=0.0, le=1.0, help="weight of the visual branch in the head's prediction: VL-LTR's 0.2; for iNaturalist 0.7"
  )
  crop_pct: float = number(
    sections.LongTail.crop_pct, gt=0.0, le=1.0, help="share of the side of an image's central square that is cropped"
  )

  def open(self) -> None:
    data = self.data
    if data.get("name") not in long_tail.SETS:
      raise UserError(f"task long_tail is measured on {', '.join(long_tail.SETS)}, not on {data.get('name')!r}")
    source = sources.open_source(**data)
    assert isinstance(source, long_tail.LabelledSource)
    self.source, self.labels = source, source.labels
    # The sentences and the training counts are the set's, whatever split is measured.
    where = {name: value for name, value in data.items() if name not in ("split", "image_size")}
    kind = long_tail.SETS[where["name"]]
    self.corpus, self.train_counts = kind.open_corpus(**where), kind.train_counts(**where)

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.protocol,
      "seed": self.seed,
      "data": self.data["name"],
      "split": self.data.get("split"),
      "num_images": len(self.labels),
      "num_sentences": len(self.corpus.labels),
      "num_classes": len(self.corpus.classnames),
      "classes_of_groups": {name: int(in_group(self.train_counts, name).sum()) for name in GROUPS},
      "neighbours": self.neighbours,
      "visual_share": self.visual_share,
      "crop_pct": self.crop_pct,
      "ties": "the first counts",
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return image_acc, text_acc, knn_acc and, of a run with a head, acc. image_acc: an image's nearest sentence is of
    its class. text_acc: a sentence's nearest image is of its class. knn_acc: the most frequent class of its nearest
    sentences is its own. acc: the head's prediction, and acc_summed_GROUP by the sum of its branches' logits, by which
    VL-LTR gives its groups."""
    # All of a split: groups of rare classes have few images, and a part of them would be noise.
    shown = base.Images(self.source, np.arange(len(self.labels)), inference.image_size, self.crop_pct)
    images = inference.embed_images(params, shown, seed=self.seed)
    texts, of_text = base.embed_texts(inference, params, self.corpus.flat), self.corpus.labels
    classes = of_text[nearest(images, texts, count=self.neighbours)]
    nearest_class = self.labels[nearest(texts, images, count=1)[:, 0]]
    metrics = {"text_acc": float((nearest_class == of_text).mean())}
    metrics |= self._by_group("image_acc", classes[:, 0] == self.labels)
    metrics |= self._by_group("knn_acc", vote(classes) == self.labels)
    # Stage 1 has a backbone alone; the head comes with stage 2.
    if inference.network.model.head is not None:
      # By the same seed, so that the head sees the noise by which its backbone is measured.
      logits = inference.class_logits(params, shown, seed=self.seed)
      # The mix of the branches' softmax is VL-LTR's prediction. By the sum of logits, below, its code gives the groups.
      predicted = np.asarray(lgr.mixed_prediction(jnp.asarray(logits).swapaxes(0, 1), self.visual_share))
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


def nearest(queries: Float[np.ndarray, "q d"], keys: Float[np.ndarray, "m d"], *, count: int) -> Int[np.ndarray, "q n"]:
  """Return the places of the `count` keys of the largest inner products with each query, the best first."""
  on_device, count = jnp.asarray(keys), min(count, len(keys))
  # Scores of all images with all sentences of Places-LT would not fit.
  size = max(1, min(base.BLOCK, SCORES // len(keys)))
  return base.by_blocks(lambda rows: _nearest(rows, on_device, count=count), queries, size=size)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(queries: Float[Array, "q d"], keys: Float[Array, "m d"], *, count: int) -> Int[Array, "q n"]:
  scores = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
  # A NaN must never win. Of equal values top_k takes the first.
  return jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), count)[1]


def vote(classes: Int[np.ndarray, "q n"]) -> Int[np.ndarray, " q"]:
  """Return the most frequent class of each row; of equally frequent ones that which is met first."""
  # argmax takes the first of equal counts, which is the class of the better sentence.
  counts = (classes[:, :, None] == classes[:, None, :]).sum(axis=2)
  return classes[np.arange(len(classes)), counts.argmax(axis=1)]


def linear_loss(
  texts: Float[np.ndarray, "m d"],
  images: Float[np.ndarray, "n d"],
  *,
  text_labels: Int[np.ndarray, " m"],
  image_labels: Int[np.ndarray, " n"],
  logit_scale: float,
) -> Float[np.ndarray, " m"]:
  """Return AnSS's loss of each sentence. Every class of a text has an image.

  A small loss means that a sentence tells its class's images from all others.
  """
  on_device, compiled = jnp.asarray(images), jax.jit(sentence_losses)
  loss = lambda rows, labels: compiled(rows, on_device, labels, image_labels, logit_scale)
  return base.by_blocks(loss, texts, text_labels)
