"""Two arms of tests/tiny_ablation.py, one of which starts from generation: --arms=tests/replication/tiny_arms.py"""

from ml_collections import ConfigDict

ARMS = (
  dict(name="alone"),
  dict(name="generation", changes=dict(objectives=("generation",)), minutes=0.5, measured=False),
  dict(name="generation first", start="generation"),
)
CLAIM = dict(row="generation first", base="alone", column="test/acc1", bound=3.0)


def get_config() -> ConfigDict:
  return ConfigDict(dict(title="Which?", arms=ARMS, step_seconds={"generation": 5.0}, claims=(CLAIM,)))
