"""Embedded texts, kept on disk: the same weights and prompts give them again in another evaluation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from diffdis_jax.common import code_digest
from diffdis_jax.common.store import Store
from diffdis_jax.parallel import processes

# What embeds texts.
CODE = ("models", "method", "inference.py", "common/params.py", "parallel/batches.py", "parallel/sharding.py")
PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
LIMIT = 4 * 2**30  # bytes that a folder may hold before the oldest files go; ImageNet's 81 prompts have 249 MB


class CachedTexts:
  """An inference, of which `embed_texts` looks into a folder first. All else is the inference's own.

  The key is the weights, the tokens, and what else decides the result: the text encoder's config, the network's
  precision, the kind of device, and the code that embeds. With several processes the first one reads and writes.

  Args:
    inference: what embeds.
    folder: as `Store` has it.
    weights: fingerprint of the parameters that `embed_texts` gets.
  """

  def __init__(self, inference: Any, folder: pathlib.Path, weights: str):
    self._inference = inference
    self._store = Store(folder, "embedded texts", limit=LIMIT)
    model = inference.network.model
    network = f"{model.text_encoder} {model.dtype} {model.matmul_precision}"
    self._known = f"{weights} {network} {jax.default_backend()} {code_digest.of(*CODE, packages=PACKAGES)}"

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inference, name)

  def embed_texts(self, params: Mapping[str, Any], tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Text embeddings e, L2-normalised."""
    # The key is of the bytes, which an array of another type or order would change.
    tokens = np.ascontiguousarray(tokens, np.int32)
    key = f"{self._known} {tokens.shape}".encode() + tokens.tobytes()
    found = self._store.read_array(key, rows=len(tokens), dtype=np.float32) if processes.is_first() else None
    # First the shape, by which every process learns whether there is something: embedding is done by all or by none.
    shape = processes.from_first(np.array((0, 0) if found is None else found.shape))
    if shape.any():
      return processes.from_first(np.zeros(shape, np.float32) if found is None else found)
    found = self._inference.embed_texts(params, tokens)
    if processes.is_first():
      self._store.write_array(key, found)
    return found
