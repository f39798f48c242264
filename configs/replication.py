"""Experiments that docs/replication/protocol.md has planned, as `ablate` takes them.

  diffdis ablate plan --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1
  diffdis ablate run --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1
  diffdis ablate table --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1

The same command resumes. What is chosen is chosen on val, the default of configs/scenes.py.

e1, do the two tasks help each other? Scenes, some 6 hours of one core.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

STEPS = 900  # of 64 images; equal samples
# Seconds of a step on one core, by objectives.
STEP_SECONDS = {"generation": 0.40, "discrimination": 0.30, "generation+discrimination": 0.60}
# A run is measured when it has ended, and reports nothing before.
QUIET = dict(train_evals=(), sample_prompts=(), save_every=450, sample_every=100_000, eval_every=100_000)


def get_config(arg: str = "e1") -> ConfigDict:
  args = common.parse_arg(arg, e1=False)
  if not args.e1:
    raise ValueError("write e1, the name of an experiment")
  return ConfigDict(e1())


def e1() -> dict[str, Any]:
  """Do the tasks help each other, at equal samples and at equal minutes?"""
  minutes = STEPS * STEP_SECONDS["generation+discrimination"] / 60
  half = dict(num_steps=STEPS // 2)
  arms = [
    _arm("generation", "generation", num_steps=STEPS),
    _arm("discrimination", "discrimination", num_steps=STEPS),
    _arm("both", "both", num_steps=STEPS),
    _arm("generation as long as both", "generation", minutes=minutes),
    _arm("discrimination as long as both", "discrimination", minutes=minutes),
    _arm("first half generation", "generation", measured=False, **half),
    _arm("generation, then both", "both", start="first half generation", **half),
    _arm("first half of the time generation", "generation", measured=False, minutes=minutes / 2),
    _arm("generation, then both, as long as both", "both", start="first half of the time generation", **half),
  ]
  claims = [
    _claim("both", "discrimination", "test_unseen/acc1"),
    _claim("both", "discrimination as long as both", "test_unseen/acc1"),
    _claim("both", "generation", "test_unseen_generated/acc1_attributes"),
    _claim("both", "generation as long as both", "test_unseen_generated/acc1_attributes"),
  ]
  return dict(title="Do the tasks help each other?", arms=tuple(arms), step_seconds=STEP_SECONDS, claims=tuple(claims))


def _arm(name: str, objectives: str, *, num_steps: int | None = None, **fields: Any) -> dict[str, Any]:
  steps = {} if num_steps is None else dict(num_steps=num_steps)
  return dict(name=name, args=f"objectives={objectives}", changes=dict(**QUIET, **steps), **fields)


def _claim(row: str, base: str, column: str, bound: float = 3.0) -> dict[str, Any]:
  """In points."""
  return dict(row=row, base=base, column=column, bound=bound)
