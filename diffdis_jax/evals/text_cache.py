"""Embedded texts, kept on disk: the same weights and prompts give them again in another evaluation."""

from __future__ import annotations

import hashlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int

from diffdis_jax.common import code_digest, files
from diffdis_jax.parallel import processes

# What embeds texts.
CODE = ("models", "method", "inference.py", "common/params.py", "parallel/batches.py", "parallel/sharding.py")
PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
LIMIT = 4 * 2**30  # bytes that a folder may hold before the oldest files go; ImageNet's 81 prompts have 249 MB


class CachedTexts:
  """An inference, of which `embed_texts` looks into a folder first. All else is the inference's own.

  A file's name is a hash of the weights, the tokens, and what else decides the result: the text encoder's config, the
  network's precision, the kind of device, and the code that embeds. With several processes the first one reads and
  writes.

  Args:
    inference: what embeds.
    folder: made when something is kept in it. One that cannot be written is warned of, and nothing is kept.
    weights: fingerprint of the parameters that `embed_texts` gets.
  """

  def __init__(self, inference: Any, folder: pathlib.Path, weights: str):
    self._inference, self._folder = inference, folder
    model = inference.network.model
    network = f"{model.text_encoder} {model.dtype} {model.matmul_precision}"
    self._known = f"{weights} {network} {jax.default_backend()} {code_digest.of(*CODE, packages=PACKAGES)}"

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inference, name)

  def embed_texts(self, params: Mapping[str, Any], tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n d"]:
    """Text queries e, L2-normalised."""
    tokens = np.ascontiguousarray(tokens, np.int32)
    digest = hashlib.sha256(f"{self._known} {tokens.shape}".encode() + tokens.tobytes()).hexdigest()
    path = self._folder / f"{digest}.npy"
    found = _read(path, len(tokens)) if processes.is_first() else None
    shape = processes.from_first(np.array((0, 0) if found is None else found.shape))
    if shape.any():
      return processes.from_first(np.zeros(shape, np.float32) if found is None else found)
    found = self._inference.embed_texts(params, tokens)
    if processes.is_first():
      _write(path, found)
    return found


def _read(path: pathlib.Path, length: int) -> Float[np.ndarray, "n d"] | None:
  """What is kept there; nothing where that is damaged."""
  try:
    found = np.load(path, allow_pickle=False)
    path.touch()  # the oldest are those that were not used for longest
  except (OSError, ValueError, EOFError):
    return None
  return found if found.dtype == np.float32 and found.ndim == 2 and len(found) == length else None


def _write(path: pathlib.Path, embedded: Float[np.ndarray, "n d"]) -> None:
  content = io.BytesIO()
  np.save(content, embedded)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, content.getvalue())
    _make_room(path.parent)
  except OSError as error:
    logging.warning("embedded texts are not kept in %s: %s", path.parent, error.strerror or error)


def _make_room(folder: pathlib.Path) -> None:
  kept = sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime, reverse=True)
  size = 0
  for path in kept:
    size += path.stat().st_size
    if size > LIMIT:
      path.unlink(missing_ok=True)
