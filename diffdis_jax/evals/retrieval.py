"""Image-text retrieval: recall at 1, 5 and 10 both ways, counted as CLIP_benchmark counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.data import sources
from diffdis_jax.evals import base, prompts

RECALL_AT = (1, 5, 10)


class Retrieval:
  """Task `retrieval`: the share of queries with at least one right answer among the first k, both ways.

  Source: the paper's retrieval on MSCOCO and Flickr30k; recall as CLIP_benchmark's zeroshot_retrieval.py counts it.

  Args:
    data: section of a data source, as `data.sources.open_source` takes it.
    caption_field: the record's field with the caption, or with several captions of the same image; empty for all the
      captions that training samples from.
    duplicate_captions: images whose captions are all the same, in the same order, are one target: any of them is right
      for such a caption. CLIP_benchmark, and we by default, count only the query's own image or own captions.
    num_images: how many images to measure, the same ones each time; None for all.
    seed: seed of the query's noise, and of the shuffle.
    reduced_decoding: decode JPEGs of at least twice the side that is seen at 1/2, 1/4 or 1/8 of their size. It is
      faster, and figures then differ slightly from published protocols.
    shuffle_labels: the leak test. Each record keeps its place and its captions but shows another one's image, so recall
      must fall to chance.

  Raises:
    UserError: a record has no caption.
  """

  task = "zeroshot_retrieval"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    caption_field: str = "",
    duplicate_captions: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    reduced_decoding: bool = False,
    shuffle_labels: bool = False,
  ):
    self.source = sources.open_source(**data)
    self._indices = base.subset(len(self.source), num_images)
    self._duplicate_captions = duplicate_captions
    self._seed, self._reduced_decoding = seed, reduced_decoding
    self._shuffle_labels = shuffle_labels
    captions = [base.captions(base.fields(self.source, i), caption_field) for i in self._indices]
    self.texts = [text for texts in captions for text in texts]
    # Groups decide what is right: an image's own captions, or those of all images with the same ones.
    self.image_groups = _group(captions) if duplicate_captions else np.arange(len(captions))
    self.text_groups = np.repeat(self.image_groups, [len(texts) for texts in captions])

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    return {
      **inference.protocol,
      "seed": self._seed,
      "num_images": len(self._indices),
      "num_texts": len(self.texts),
      "duplicate_captions": self._duplicate_captions,
      "ties": base.TIES,
      **base.origin(self.source),
      "reduced_decoding": self._reduced_decoding,
      "shuffle_labels": self._shuffle_labels,
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return image_retrieval_recall@k, a text finds its image, and text_retrieval_recall@k, an image finds one of its
    texts.

    Without a recall among more images, or texts, than there are, which is 1 of any model.
    """
    prompts.warn_of_long(tuple(self.texts), inference.max_length, what="captions")
    order = base.shuffled(self._indices, seed=self._seed) if self._shuffle_labels else self._indices
    # The leak test shuffles what is shown and not what is asked: places, and with them the noise, stay.
    images = base.embed_images(
      inference, params, self.source, order, seed=self._seed, reduced_decoding=self._reduced_decoding
    )
    texts = base.embed_texts(inference, params, self.texts)
    found = {
      "image": base.ranks(texts, images, query_groups=self.text_groups, key_groups=self.image_groups),
      "text": base.ranks(images, texts, query_groups=self.image_groups, key_groups=self.text_groups),
    }
    targets = {"image": len(images), "text": len(texts)}
    return {
      f"{way}_retrieval_recall@{k}": float((found[way] < k).mean())
      for k in RECALL_AT
      for way in found
      if k <= targets[way]
    }


def _group(captions: Sequence[Sequence[str]]) -> Int[np.ndarray, " n"]:
  """Return the same number for images whose captions are the same."""
  numbers: dict[Sequence[str], int] = {}
  return np.array([numbers.setdefault(tuple(texts), len(numbers)) for texts in captions])
