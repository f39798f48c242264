"""Runs the paper's ablation tables, or any grid of config fields.

  diffdis ablate plan --base=shapes --tables=2,3,4,5,7 --out=runs/ablations

The same flags then go to `ablate run` and `ablate table`:

  plan    lists the runs: number, progress, hours
  run     trains those that are not finished, one after another; --only=K just run K, for job arrays
  table   writes tables.json and tables.md into --out

--grid="loss.ita_weight=0.01,0.03;text_diffusion.gamma=0.1,1.0" replaces --tables, or is added to them.
--config.a.b=value sets a field of the base; the autoencoder takes those of image size, mesh, data and its own model.
Runs can be stopped at any time and resume: SIGTERM saves and exits with code 75, Ctrl-C with code 130.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from diffdis_jax import config as run_config
from diffdis_jax import evaluate
from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import run as running
from diffdis_jax.ablate import summary, tables
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.ablate.run import Folder
from diffdis_jax.common import cli, files
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import tasks
from diffdis_jax.evals.results import ResultFile
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import workdir
from diffdis_jax.training import loop

FLAGS = flags.FLAGS
VERBS = ("plan", "run", "table")


def define_flags() -> None:
  cli.config_flag("base")
  flags.DEFINE_string("out", None, "folder of the runs, their results and the tables", required=True)
  flags.DEFINE_list("tables", [], "tables of the paper's appendix, any of 2,3,4,5,7")
  flags.DEFINE_string("grid", None, "field=value,value;field=value: a table of every combination")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of every row")
  flags.DEFINE_integer("only", None, "number of the one run, as plan lists it, that `run` does", lower_bound=0)
  cli.process_flags()


def main(argv: Sequence[str]) -> None:
  perform(argv, plan_of_flags)


def perform(
  argv: Sequence[str],
  make_plan: Callable[[], Plan],
  *,
  module: str = "diffdis_jax.ablate",
  tabulate: Callable[[Plan, Folder], None] | None = None,
) -> None:
  """Do what the first argument names with a plan. `module` is the command that each run of several is started by, and
  `tabulate` does the verb `table`."""
  verb = argv[1] if argv[1:] else ""
  if verb not in VERBS:
    raise UserError(f"diffdis ablate {verb or '...'}: the first argument is one of {', '.join(VERBS)}")
  plan, folder = make_plan(), Folder(FLAGS.out)
  # For every verb: `plan` and `table` would else show runs of another base as these.
  folder.check(plan)
  if verb == "plan":
    cli.write("\n".join(running.lines(plan, folder)) + "\n")
  elif verb == "run":
    run_selected(plan, folder, module)
  else:
    (tabulate or write_tables)(plan, folder)


def plan_of_flags() -> Plan:
  """Return the plan of --tables and --grid. Raises UserError: flags that make none."""
  base = run_config.Run.of(FLAGS.base).to_dict()
  asked = []
  if FLAGS.tables:
    asked += tables.choose(FLAGS.tables, schedule=base["text_diffusion"]["schedule"])
  if FLAGS.grid is not None:
    asked.append(tables.grid(FLAGS.grid, base))
  if not asked:
    raise UserError('there is nothing to run; give --tables=2,3,4,5,7, or --grid="field=value,value"')
  return make_plan(asked)


def make_plan(asked: Sequence[tables.Table], *, own_starts: bool = False) -> Plan:
  """Return the plan of these tables by --base and --seeds. Raises UserError: flags, or a base, that make none."""
  path, overrides = cli.config_given()
  if "seed" in overrides:
    raise UserError("--config.seed has no effect on an ablation, whose rows have each of --seeds=0,1,2; give those")
  # By itself first: a mistake in the base should not read as one of a row.
  base = run_config.Run.of(FLAGS.base).to_dict()
  check_evaluations(base)
  try:
    seeds = [int(seed) for seed in FLAGS.seeds]
  except ValueError:
    raise UserError(f"--seeds={','.join(FLAGS.seeds)} should be whole numbers, such as 0,1,2") from None
  autoencoder = planning.find_autoencoder(path, overrides, base)
  plan = planning.make(base, autoencoder, asked, seeds, own_starts=own_starts)
  _check_overrides(plan, overrides)
  # All of them before any is started: a row that no run can have should not fail after hours.
  for run in plan.runs:
    try:
      run_config.Run.of(run.config)
      check_evaluations(run.config)
    except UserError as error:
      raise UserError(f"run {run.name}: {error}") from error
  return plan


def _check_overrides(plan: Plan, overrides: Mapping[str, Any]) -> None:
  """Raise UserError for an override that no run has, since every row or arm has a value of its own."""
  fields = {run: workdir.flatten(run.config) for run in plan.runs}
  of_rows = [fields[run] for runs in plan.rows.values() for run in runs]
  for field, value in workdir.flatten(overrides).items():
    own = ", ".join(dict.fromkeys(repr(of_run[field]) for of_run in of_rows if field in of_run))
    # Also of a start, such as the autoencoder. Of `train_evals` those of what a run does not train are left out.
    if own and field != "train_evals" and value not in [of_run.get(field) for of_run in fields.values()]:
      raise UserError(f"--config.{field}={value} has no effect on these rows, whose own values are {own}; leave it out")


def check_evaluations(config: Mapping[str, Any]) -> None:
  """Raise UserError for an evaluation that could not be run, before hours of training."""
  for name, section in config["evals"].items():
    try:
      tasks.check(**section)
    except UserError as error:
      raise UserError(f"evals.{name}: {error}") from error


def run_selected(plan: Plan, folder: Folder, module: str) -> None:
  """Do all runs, each in a process of its own, or the one that --only names in this process, which gets a job's signals
  and may be one of several that train together."""
  if FLAGS.only is not None:
    if FLAGS.only >= len(plan.runs):
      raise UserError(f"--only={FLAGS.only}: the plan has runs 0 to {len(plan.runs) - 1}")
    run_one(plan.runs[FLAGS.only], plan, folder)
    return
  folder.open(plan)
  command = lambda number: [sys.executable, "-m", module, *sys.argv[1:], f"--only={number}"]
  if code := running.run_all(plan, folder, command):
    sys.exit(code)


def run_one(one: Run, plan: Plan, folder: Folder) -> None:
  """Train and measure a run in this process, or with others as one of its processes."""
  # As `train` has it: two dtypes that meet are an error, and no silent conversion.
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  processes.start()
  processes.on_first(lambda: folder.open(plan))
  # While it trains, train hears SIGTERM and Ctrl-C and saves. Else what is there is on the disk: it ends at once.
  with processes.PreemptionHandler(sharding.batch_sharding(sharding.make_mesh(**one.config["mesh"]))).listening():
    running.run(one, folder, train=loop.train_and_evaluate, measure=measure)


def measure(one: Run, path: str, out: str) -> None:
  """Run the evaluations of a run that `out` lacks, by the newest checkpoint's averaged weights."""
  # CLIP takes no steps of denoising, so that `inference` says nothing of it. Long-tailed objectives are of either.
  protocol = {} if "vision_encoder" in one.config["model"] else one.config["inference"]
  asked = tasks.of_config(one.evals, tasks=None)
  evaluate.evaluate(path, asked, kept=ResultFile(out), **protocol)


def write_tables(plan: Plan, folder: Folder, *, more: Mapping[str, Any] | None = None, text: str = "") -> None:
  """Write tables.json and tables.md for the runs that are finished, with `more` and `text` at their ends."""
  base, _ = cli.config_given()
  content = summary.summarise(plan, folder, base=base)
  text = summary.markdown(content) + text
  result_files.write_text(str(folder.path / "tables.json"), files.as_json({**content, **(more or {})}))
  result_files.write_text(str(folder.path / "tables.md"), text)
  cli.write(text)


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1)
