"""Long-tailed sets by name: images with labels, and the sentences of their classes as tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import buckets, code_digest
from diffdis_jax.common.store import Store
from diffdis_jax.data import shapes_lt
from diffdis_jax.data.corpus import Corpus, Tokenizer, Tokens
from diffdis_jax.data.layouts import long_tailed

NAMES = ("shapes_lt", *long_tailed.SETS)
TOKENIZER = ("data/tokenizer.py", "data/clip_merges.txt.gz")
TOKENIZER_PACKAGES = ("transformers", "tokenizers", "ftfy")


@runtime_checkable
class LabelledSource(Protocol):
  """A source whose classes are known without reading an image."""

  @property
  def labels(self) -> Int[np.ndarray, " n"]: ...

  @property
  def classnames(self) -> Sequence[str]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def is_sampled(*, name: str, split: str = "train", **_: Any) -> bool:
  """Whether a split is trained on by classes: of a long-tailed set, but not as pairs, as what a run starts from is."""
  return name in NAMES and not (name == "shapes_lt" and split in shapes_lt.STARTS)


def open_corpus(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Corpus:
  """The sentences of the set's classes; takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.make_corpus(seed)
  return long_tailed.open_corpus(buckets.local(path, "data.path"), name)


def train_counts(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Int[np.ndarray, " k"]:
  """Training images of each class; takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.counts(seed)
  labels = long_tailed.train_labels(buckets.local(path, "data.path"), name)
  # As long as there are classes: the last ones may have no image.
  return np.bincount(labels, minlength=long_tailed.SETS[name].classes)


def kept_tokens(corpus: Corpus, tokenizer: Tokenizer, *, max_length: int, folder: str) -> Tokens:
  """The corpus as tokens, made once: Places-LT's take a minute or two. A long sentence is cut, and its end token stays
  last.

  Args:
    tokenizer: to sentences of `max_length` tokens.
    folder: where they are kept, by a hash of the sentences and of what makes tokens of them.
  """
  made_by = code_digest.of(*TOKENIZER, packages=TOKENIZER_PACKAGES)
  key = "\0".join([made_by, str(max_length), *corpus.flat]).encode()
  # The key has what makes the tokens too: another version of a package may make others.
  store = Store(folder, "tokens")
  ids = store.read_array(key, rows=len(corpus.flat), dtype=np.int32)
  if ids is None:
    ids = tokenizer(corpus.flat)
    store.write_array(key, ids)
  return Tokens(ids, np.cumsum([0, *map(len, corpus.sentences)]))
