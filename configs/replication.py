"""Experiments that docs/replication/protocol.md has planned, as `ablate` takes them.

  diffdis ablate plan --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1
  diffdis ablate run --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1
  diffdis ablate table --base=scenes:measured=test --arms=replication:e1 --seeds=0,1,2,3,4 --out=runs/e1

The same command resumes. What is chosen is chosen on val, the default of configs/scenes.py.

e1: do the two tasks help each other? e3: which parts matter? Both are of scenes, some 6 hours of one core each. With
one --out for both, e3 finds its base runs among those of e1; `table` then writes over the other's tables.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

STEPS = 900  # of 64 images; equal samples
# Seconds of a step on one core of which nothing else ran, by objectives: medians of 15 rounds in turns, by
# `diffdis benchmark --config=scenes --rounds=15 --out=F.json`, before the first run.
STEP_SECONDS = {"generation": 0.251, "discrimination": 0.157, "generation+discrimination": 0.356}
# A run is measured when it has ended, and reports nothing before.
QUIET = dict(train_evals=(), sample_prompts=(), save_every=450, sample_every=100_000, eval_every=100_000)


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, **dict.fromkeys(EXPERIMENTS, False))
  asked = [name for name in EXPERIMENTS if args[name]]
  if len(asked) != 1:
    raise ValueError(f"argument should be one of {', '.join(EXPERIMENTS)}")
  return ConfigDict(EXPERIMENTS[asked[0]]())


def e1() -> dict[str, Any]:
  """Do the tasks help each other, at equal samples and at equal minutes?"""
  minutes = STEPS * STEP_SECONDS["generation+discrimination"] / 60
  half = STEPS // 2
  arms = [
    _arm("generation", "generation", num_steps=STEPS),
    _arm("discrimination", "discrimination", num_steps=STEPS),
    _arm("both", "both", num_steps=STEPS),
    _arm("generation as long as both", "generation", minutes=minutes),
    _arm("discrimination as long as both", "discrimination", minutes=minutes),
    _arm("first half generation", "generation", measured=False, num_steps=half),
    _arm("generation, then both", "both", start="first half generation", num_steps=half),
    _arm("first half of the time generation", "generation", measured=False, minutes=minutes / 2),
    _arm("generation, then both, as long as both", "both", start="first half of the time generation", num_steps=half),
  ]
  claims = [
    _claim("both", "discrimination", "test_unseen/acc1"),
    _claim("both", "discrimination as long as both", "test_unseen/acc1"),
    _claim("both", "generation", "test_unseen_generated/acc1_attributes"),
    _claim("both", "generation as long as both", "test_unseen_generated/acc1_attributes"),
  ]
  return dict(title="Do the tasks help each other?", arms=tuple(arms), step_seconds=STEP_SECONDS, claims=tuple(claims))


def e3() -> dict[str, Any]:
  """Which parts matter? The timestep t_z of the clean image needs both objectives, or nothing else has a timestep."""
  parts: dict[str, dict[str, Any]] = {
    "without fusion": dict(model=dict(fusion=False)),
    "own attention": dict(model=dict(share_attention=False)),
    "shared FFN": dict(model=dict(modality_ffn=False)),
    "target noise": dict(text_diffusion=dict(target="noise")),
    "gamma 1.0": dict(text_diffusion=dict(gamma=1.0)),
    "gamma 0.1": dict(text_diffusion=dict(gamma=0.1)),
    "schedule cosine": dict(text_diffusion=dict(schedule="cosine")),
    "schedule linear": dict(text_diffusion=dict(schedule="linear")),
  }
  timesteps: dict[str, dict[str, Any]] = {
    "timestep 0": dict(condition_timestep=0),
    "timestep 999": dict(condition_timestep=999),
  }
  arms, claims = [], []
  for base, changes in (("discrimination", parts), ("both", timesteps)):
    arms.append(_arm(base, base, num_steps=STEPS))
    arms += [_arm(name, base, num_steps=STEPS, **change) for name, change in changes.items()]
    claims += [_claim(name, base, "test/acc1") for name in changes]
  return dict(title="Which parts matter?", arms=tuple(arms), claims=tuple(claims))


EXPERIMENTS = {"e1": e1, "e3": e3}


def _arm(
  name: str,
  objectives: str,
  *,
  start: str = "",
  minutes: float | None = None,
  measured: bool = True,
  **changes: Any,
) -> dict[str, Any]:
  """An arm with other values of some fields."""
  changes = dict(**QUIET, **changes)
  args = f"objectives={objectives}"
  return dict(name=name, args=args, changes=changes, start=start, minutes=minutes, measured=measured)


def _claim(row: str, base: str, column: str, bound: float = 3.0) -> dict[str, Any]:
  """In points."""
  return dict(row=row, base=base, column=column, bound=bound)
