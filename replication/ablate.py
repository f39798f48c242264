"""Plan, run or tabulate a preregistered experiment, whose arms may start from each other.

  python -m replication.ablate plan --base=replication/configs/scenes.py:measured=test \\
      --arms=replication/configs/experiments.py:e1 --seeds=0,1,2,3,4 --out=runs/e1

`run` and `table` take the same flags and work like those of `diffdis ablate`. Each seed trains its own starting runs.
"""

from __future__ import annotations

from absl import flags

from diffdis_jax.ablate import __main__ as ablate
from diffdis_jax.ablate import summary
from diffdis_jax.ablate.plan import Plan
from diffdis_jax.ablate.run import Folder
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from replication import arms, claims, extensions

FLAGS = flags.FLAGS


def read() -> arms.Read:
  """Return the experiment of --arms."""
  if FLAGS.tables or FLAGS.grid is not None:
    raise UserError("--arms is an experiment of its own; leave out --tables and --grid")
  path, overrides = cli.config_given()
  return arms.read(FLAGS.arms, base=path, overrides=overrides)


def main(argv: list[str]) -> None:
  extensions.add()
  make_plan = lambda: ablate.make_plan([read().table], own_starts=True)
  ablate.perform(argv, make_plan, module="replication.ablate", tabulate=write_tables)


def write_tables(plan: Plan, folder: Folder) -> None:
  """Write the tables, with the verdicts on the experiment's claims."""
  judged = claims.judge(read().claims, plan, summary.read_results(plan, folder))
  ablate.write_tables(plan, folder, more={"claims": judged}, text="\n" + claims.markdown(judged) if judged else "")


if __name__ == "__main__":
  ablate.define_flags()
  flags.DEFINE_string("arms", None, "FILE.py[:args] of the experiment", required=True)
  cli.run(main, positional=1)
