"""What this project uses of a module whose classes are made by decorators that no checker sees through."""

from typing import Any

class Average:
  total: Any
  count: Any
  def __init__(self, *, total: Any, count: Any) -> None: ...
