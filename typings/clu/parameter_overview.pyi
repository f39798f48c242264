from collections.abc import Mapping
from typing import Any

def get_parameter_overview(params: Mapping[str, Any], *, include_stats: bool = ...) -> str: ...
