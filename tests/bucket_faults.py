"""What a bucket's server that is away makes of any access, when gcsfs has given up."""

from __future__ import annotations

from typing import Any, NoReturn


def away(*_: Any, **__: Any) -> NoReturn:
  """Raises what gcsfs does, which is no OSError."""
  from gcsfs import retry

  raise retry.HttpError({"code": 503, "message": "no backend"})
