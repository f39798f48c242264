"""Choose anchor sentences (AnSS): those of each class that the language-guided head attends to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from diffdis_jax.common import buckets, files
from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.data import long_tail, sources
from diffdis_jax.data.build import open_tokens
from diffdis_jax.data.corpus import Corpus
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.evals.long_tail import linear_loss
from diffdis_jax.inference import Inference
from diffdis_jax.method.network import HEAD_PREFIX
from diffdis_jax.parallel import processes, sharding

ANCHORS = f"{HEAD_PREFIX}anchors"  # chosen before the first step
TRAINING_IMAGES = 50  # of a class, where they are taken of the training split


@dataclasses.dataclass(frozen=True)
class Anchors:
  """The anchors of all classes.

  Attributes:
    embeddings: of each class's anchors, the best first; where a class has fewer, zeros at the end.
    places: of these in the whole corpus, -1 where there is none.
    losses: their linear loss; infinite where there is none, or it was not asked for.
  """

  embeddings: Float[np.ndarray, "k s d"]
  places: Int[np.ndarray, "k s"]
  losses: Float[np.ndarray, "k s"]

  def describe(self, corpus: Corpus) -> dict[str, Any]:
    """Return each class's sentences with their losses, for people to read. Classes that share a name, such as
    ImageNet's two cranes, have their number behind it."""
    flat, shared = corpus.flat, Counter(corpus.classnames)
    return {
      name if shared[name] == 1 else f"{name} ({number})": [
        # None, since JSON has no infinity.
        {"sentence": flat[place], "loss": float(loss) if np.isfinite(loss) else None}
        for place, loss in zip(places.tolist(), losses.tolist(), strict=True)
        if place >= 0
      ]
      for number, (name, places, losses) in enumerate(zip(corpus.classnames, self.places, self.losses, strict=True))
    }


class Selection:
  """Chooses the anchors of a backbone after stage 1.

  Args:
    run: of stage 2. Its `long_tail` says how they are chosen, and by which images; its seed is that of random choices,
      and of the query's noise, which is one for each image.

  Attributes:
    corpus: all sentences.

  Raises:
    UserError: damaged data, a class of which no image is there, or another number of classes than the head has.
  """

  def __init__(self, run: Run):
    head, section, where = run.model.head, run.long_tail, run.data.source
    assert head is not None and section is not None  # config/run.py
    self._section, self._count, self._seed = section, head.anchors, run.seed
    self.corpus = long_tail.open_corpus(**where)
    if len(self.corpus.classnames) != head.classes:
      raise UserError(
        f"model.head.classes is {head.classes}, and the text corpus has {len(self.corpus.classnames)} classes"
      )
    self._tokens = open_tokens(run.data)
    split = "val" if section.anchor_images == "val" else "train"
    source = sources.open_source(**{**where, "split": split}, image_size=run.image_size)
    assert isinstance(source, long_tail.LabelledSource)
    self._source, self._indices = source, np.arange(len(source))
    if split == "train":
      self._indices = base.first_of_each(source.labels, TRAINING_IMAGES)
    self._labels = source.labels[self._indices]
    # The loss of a sentence is a mean over its class's images: of none it would be 0 / 0.
    if (absent := np.setdiff1d(np.arange(head.classes), self._labels)).size:
      raise UserError(f"no image of {self.corpus.classnames[absent[0]]!r} to choose its sentences by, in split {split}")

  def params(self, inference: Inference, path: str, params: Params) -> Params:
    """Choose the head's anchors by the backbone among `params`, and name them in anchors.json in the workdir `path`.

    Raises:
      Preempted: the processes stop in the middle of it; the same command begins it again.
    """
    chosen = self.run(inference, params)
    if processes.is_first():
      files.write_json(buckets.path(path) / "anchors.json", chosen.describe(self.corpus))
    return sharding.replicated({ANCHORS: chosen.embeddings}, inference.mesh)

  def run(self, inference: Any, params: Params) -> Anchors:
    """Choose by this backbone: a network, which may have a head, and its parameters."""
    ids, choice = self._tokens.ids, self._section.anchor_choice
    losses = np.full(len(ids), np.inf, np.float32)  # of the other choices, which look at no image
    if choice == "linear_loss":
      images = base.embed_images(
        inference, params, self._source, self._indices, seed=self._seed, crop_pct=self._section.crop_pct
      )
      losses = linear_loss(
        inference.embed_texts(params, ids),
        images,
        text_labels=self.corpus.labels,
        image_labels=self._labels,
        logit_scale=float(params["logit_scale"]),
      )
    places = choose(losses, self._tokens.starts, choice, count=self._count, seed=self._seed)
    logging.info("anchors: %d of %d sentences, by %s", (places >= 0).sum(), len(ids), choice)
    # Of any length, unlike the normalised ones of the loss: VL-LTR's head attends over raw features.
    chosen = inference.text_features(params, ids[places[places >= 0]])
    # Where a class has fewer, zeros, which the head's attention leaves out (models/lgr.py).
    embeddings = np.zeros((*places.shape, chosen.shape[-1]), np.float32)
    embeddings[places >= 0] = chosen
    return Anchors(embeddings, places, np.where(places >= 0, losses[places], np.inf).astype(np.float32))


def choose(
  losses: Float[np.ndarray, " m"], starts: Int[np.ndarray, " k1"], choice: str, *, count: int, seed: int
) -> Int[np.ndarray, "k s"]:
  """Return the places of each class's anchors, -1 where it has no more sentences.

  Args:
    losses: of all sentences.
    starts: where each class's begin; last, how many there are.
    choice: of LongTail.anchor_choice. Of equal losses the sentence that stands first comes first.
  """
  rng, places = np.random.default_rng(seed), np.full((len(starts) - 1, count), -1, np.int64)
  for label, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
    order = np.arange(end - start)
    if choice == "linear_loss":
      order = np.argsort(losses[start:end], kind="stable")
    elif choice == "random":
      order = np.sort(rng.permutation(order)[:count])
    places[label, : len(order[:count])] = start + order[:count]
  return places
