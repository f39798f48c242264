"""Plan, run or tabulate an experiment of arms that start from each other, planned before its runs.

  python -m replication.ablate plan --base=replication/configs/scenes.py:measured=test \\
      --arms=replication/configs/experiments.py:e1 --seeds=0,1,2,3,4 --out=runs/e1

`run` and `table` take the same flags, and work as those of `diffdis ablate`. Each seed has its own starts.
"""

from __future__ import annotations

from absl import flags

from diffdis_jax.ablate import __main__ as ablate
from diffdis_jax.ablate.plan import Plan
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from replication import arms, extensions

FLAGS = flags.FLAGS


def make_plan() -> Plan:
  """Return the plan of --arms."""
  if FLAGS.tables or FLAGS.grid is not None:
    raise UserError("--arms is an experiment of its own; leave out --tables and --grid")
  path, overrides = cli.config_given()
  experiment = arms.read(FLAGS.arms, base=path, overrides=overrides)
  return ablate.make_plan([experiment.table], own_starts=True, claims=experiment.claims)


def main(argv: list[str]) -> None:
  extensions.add()
  ablate.perform(argv, make_plan, module="replication.ablate")


if __name__ == "__main__":
  ablate.define_flags()
  flags.DEFINE_string("arms", None, "FILE.py[:args] of the experiment", required=True)
  cli.run(main, positional=1)
