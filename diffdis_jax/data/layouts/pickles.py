"""CIFAR's pickles, read without running what a pickle may ask for.

A pickle is a program: it may name any function and call it. Here it may name those that make numpy arrays.
"""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from diffdis_jax.errors import UserError

_reconstruct: Any = np.empty(0).__reduce__()[0]


def _latin1(text: str, encoding: str) -> bytes:
  """Decode bytes that Python 3 wrote in the protocol of Python 2, by `_codecs.encode(text, "latin1")`."""
  if encoding != "latin1":
    raise pickle.UnpicklingError(f"it encodes to {encoding}")
  return text.encode("latin1")


# numpy's own moved to `_core` in 2.0.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
  ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
  ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
  ("_codecs", "encode"): _latin1,
}


class _Refused(Exception):
  """A name that a pickle may not use."""


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise _Refused(f"{module}.{name}")
    return _ALLOWED[module, name]


def read(path: pathlib.Path) -> dict[str, Any]:
  """A pickled dict of lists, texts, whole numbers and numpy arrays; bytes of Python 2 are texts in latin-1.

  Raises:
    UserError: no such file, one that would run something else, or one that is no such pickle.
  """
  try:
    with open(path, "rb") as file:
      # Python 2's bytes as latin-1, which maps each of them to one character and back.
      found = _Unpickler(file, encoding="latin1").load()
  except _Refused as refused:
    raise UserError(
      f"{path} is a pickle that would call {refused}, which CIFAR's files do not; it was not run, download it again"
    ) from refused
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # a damaged pickle raises whatever its bytes lead into
    raise UserError(f"{path} is no pickle of CIFAR ({error!r}); download it again") from error
  if not isinstance(found, dict):
    raise UserError(f"{path} holds a {type(found).__name__}, not the dict of CIFAR's files; download it again")
  return found
