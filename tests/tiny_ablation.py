"""Leave only two short evaluations in tests/tiny.py, for the tests of ablate: --base=tests/tiny_ablation.py"""

from ml_collections import ConfigDict

from tests import tiny


def get_config(arg: str = "") -> ConfigDict:
  config = tiny.get_config(arg)
  if config.objectives != ("reconstruction",):
    config.evals = {name: config.evals[name].to_dict() for name in ("test", "test_retrieval")}
  return config
