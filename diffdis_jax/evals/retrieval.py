"""Image-text retrieval: recall at 1, 5 and 10 both ways, counted as CLIP_benchmark counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.config.section import field
from diffdis_jax.evals import base, prompts

RECALL_AT = (1, 5, 10)


@base.settings()
class Retrieval(base.OfImages):
  """Task `retrieval`: the share of queries with at least one right answer among the first k, both ways.

  Source: the paper's retrieval on MSCOCO and Flickr30k; recall as CLIP_benchmark's zeroshot_retrieval.py counts it.
  """

  task = "zeroshot_retrieval"

  caption_field: str = field("", help="record's field with the caption or captions; by default all that training has")
  # CLIP_benchmark, and we by default, count only the query's own image or own captions.
  duplicate_captions: bool = field(
    False, help="images whose captions are all the same are one target: any of them is right for such a caption"
  )

  def open(self) -> None:
    super().open()
    captions = [base.captions(base.fields(self.source, i), self.caption_field) for i in self.indices]
    self.texts = [text for texts in captions for text in texts]
    # Groups decide what is right: an image's own captions, or those of all images with the same ones.
    self.image_groups = _group(captions) if self.duplicate_captions else np.arange(len(captions))
    self.text_groups = np.repeat(self.image_groups, [len(texts) for texts in captions])

  def protocol(self, inference: Any) -> dict[str, Any]:
    own = {"num_texts": len(self.texts), "duplicate_captions": self.duplicate_captions}
    return {**super().protocol(inference), **own}

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return image_retrieval_recall@k, a text finds its image, and text_retrieval_recall@k, an image finds one of its
    texts.

    Without a recall among more images, or texts, than there are, which is 1 of any model.
    """
    prompts.warn_of_long(tuple(self.texts), inference.max_length, what="captions")
    images, texts = self.embed_images(inference, params), base.embed_texts(inference, params, self.texts)
    ranks = {
      "image": base.ranks(texts, images, query_groups=self.text_groups, key_groups=self.image_groups),
      "text": base.ranks(images, texts, query_groups=self.image_groups, key_groups=self.text_groups),
    }
    targets = {"image": len(images), "text": len(texts)}
    return {
      f"{way}_retrieval_recall@{k}": float((ranks[way] < k).mean())
      for k in RECALL_AT
      for way in ranks
      if k <= targets[way]
    }


def _group(captions: Sequence[Sequence[str]]) -> Int[np.ndarray, " n"]:
  """Return the same number for images whose captions are the same."""
  numbers: dict[Sequence[str], int] = {}
  return np.array([numbers.setdefault(tuple(texts), len(numbers)) for texts in captions])
