"""Choose the anchor sentences (AnSS) of each class, to which the language-guided head attends.

They have the smallest linear loss on the validation images, as in VL-LTR's shipped configs.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float, Int

from diffdis_jax.common import buckets, files
from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.data import long_tail, sources
from diffdis_jax.data.build import open_tokens
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.evals.long_tail import linear_loss
from diffdis_jax.method.network import HEAD_PREFIX
from diffdis_jax.parallel import processes, sharding

ANCHORS = f"{HEAD_PREFIX}anchors"  # this parameter is chosen before the first step


class Selection:
  """Choose the anchors by a backbone after stage 1.

  Args:
    run: the run of stage 2. Its seed is that of the query's noise, one sample for each image.

  Attributes:
    corpus: all sentences.

  Raises:
    UserError: data are damaged, a class has no image, or the head has another number of classes.
  """

  def __init__(self, run: Run):
    head, section, where = run.model.head, run.long_tail, run.data.source
    assert head is not None and section is not None  # checked in config/run.py
    self._crop_pct, self._count, self._seed = section.crop_pct, head.anchors, run.seed
    self.corpus = long_tail.SETS[where["name"]].open_corpus(**where)
    if len(self.corpus.classnames) != head.classes:
      raise UserError(
        f"model.head.classes is {head.classes}, and the text corpus has {len(self.corpus.classnames)} classes"
      )
    self._tokens = open_tokens(run.data)
    source = sources.open_source(**{**where, "split": "val"}, image_size=run.image_size)
    assert isinstance(source, long_tail.LabelledSource)
    self._source = source
    # The loss of a sentence is a mean over the images of its class, which would be 0 / 0 without an image.
    if (absent := np.setdiff1d(np.arange(head.classes), source.labels)).size:
      raise UserError(f"no image of {self.corpus.classnames[absent[0]]!r} to choose its sentences by, in split val")

  def params(self, inference: Any, path: epath.PathLike, params: Params) -> Params:
    """Choose the head's anchors by the backbone in `params`: [k, s, d], the best first, and zeros if a class has fewer.
    Write their sentences to anchors.json in the workdir `path`.

    Args:
      inference: the inference of a network that may have a head.
      params: the network's parameters.

    Raises:
      Preempted: the processes stop meanwhile; the same command begins again.
    """
    ids = self._tokens.ids
    shown = base.Images(self._source, np.arange(len(self._source)), inference.image_size, self._crop_pct)
    losses = linear_loss(
      inference.embed_texts(params, ids),
      inference.embed_images(params, shown, seed=self._seed),
      text_labels=self.corpus.labels,
      image_labels=self._source.labels,
      logit_scale=float(params["logit_scale"]),
    )
    places = choose(losses, self._tokens.starts, count=self._count)
    logging.info("anchors: %d of %d sentences", (places >= 0).sum(), len(ids))
    if processes.is_first():
      of = lambda place: {"sentence": self.corpus.flat[place], "loss": float(losses[place])}
      rows = zip(self.corpus.classnames, places.tolist(), strict=True)
      named = [{"class": name, "sentences": [of(place) for place in row if place >= 0]} for name, row in rows]
      files.write_json(buckets.path(path) / "anchors.json", named)
    # Features are not normalised, unlike those of the loss, since VL-LTR's head attends over raw features.
    features = inference.text_features(params, ids[places[places >= 0]])
    # A class with fewer sentences has zeros, which the head's attention ignores (models/lgr.py).
    embeddings = np.zeros((*places.shape, features.shape[-1]), np.float32)
    embeddings[places >= 0] = features
    return sharding.replicated({ANCHORS: embeddings}, inference.mesh)


def choose(losses: Float[np.ndarray, " m"], starts: Int[np.ndarray, " k1"], *, count: int) -> Int[np.ndarray, "k s"]:
  """Return the indices of each class's sentences with the smallest losses, and -1 if it has no more.

  Args:
    losses: the losses of all sentences. Of equal losses, the earlier sentence comes first.
    starts: the index of each class's first sentence, and last the number of all sentences.
  """
  places = np.full((len(starts) - 1, count), -1, np.int64)
  for label, (start, end) in enumerate(itertools.pairwise(starts)):
    best = start + np.argsort(losses[start:end], kind="stable")[:count]
    places[label, : len(best)] = best
  return places
