from typing import Any

from absl import flags
from ml_collections.config_dict import ConfigDict

def DEFINE_config_file(
  name: str, default: str | None = None, help_string: str = ..., **kwargs: Any
) -> flags.FlagHolder[ConfigDict]: ...
def get_config_filename(config_flag: Any) -> str: ...
def get_override_values(config_flag: Any) -> dict[str, Any]: ...
