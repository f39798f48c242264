"""What this project uses of ml_collections, with a field of a ConfigDict as Any: its own annotations infer a union."""

from ml_collections.config_dict import ConfigDict as ConfigDict
