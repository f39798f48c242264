"""Measures a trained run by zero-shot accuracy, retrieval, FID and other tasks.

  diffdis evaluate --workdir=runs/demo/diffdis --tasks=zero_shot --out=zero_shot.json

Without --data it measures the `evals` of the run's config. The JSON file holds {task: {data set: record}}, each record
in CLIP_benchmark's schema with its protocol; a figure that is not finite is null. With --tasks=long_tail a Markdown
file beside it has the paper's Table 8.

A prepared data set, with class names and templates of your own; fid also takes --inception=WEIGHTS.pth:

  diffdis evaluate --workdir=RUN --tasks=zero_shot,retrieval --data=PREPARED_DIR \\
      --split=test --classnames=NAMES.json --templates=TEMPLATES.json --out=F.json

The paper's benchmarks, each found under ROOT in a published layout. F.json is written after each data set, and the
same command resumes there; F.md has the means beside the paper's. A suite also takes --num_images, --seed,
--shuffle_labels and the flags of fid:

  diffdis evaluate --workdir=RUN --suite=paper --data_root=ROOT --out=F.json

--compare=A.json,B.json --out=F.md writes several results side by side, with the differences between their protocols.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.common import cli
from diffdis_jax.config.objectives import ALIGNED
from diffdis_jax.config.sections import Sampling
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, suites, tables, tasks
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import ResultFile, Results
from diffdis_jax.evals.tasks import Section
from diffdis_jax.parallel import processes
from diffdis_jax.run import checkpoint, digests, provenance, restore

FLAGS = flags.FLAGS
LOADING = ("step", "ema", "image_size", "batch_size")  # arguments of inference.load
# Flag -> field of Sampling. Steps of the text query have a name of their own, or would be taken for the images'.
SAMPLING = {"query_steps" if one.name == "steps" else one.name: one for one in dataclasses.fields(Sampling)}
OF_A_SUITE = ("seed", "num_images", "shuffle_labels", *tasks.settings_of("fid"))  # all else a suite has of its own


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model")
  flags.DEFINE_string("out", None, "JSON file to write; with --compare a Markdown file", required=True)
  by_default = "by default those of the config's data sets, with --data zero_shot and retrieval"
  flags.DEFINE_list("tasks", None, f"any of {', '.join(tasks.TASKS)}; {by_default}")
  flags.DEFINE_string("data", None, "folder written by prepare_data; by default the data sets of the run's config")
  flags.DEFINE_string("split", None, "split of --data")
  flags.DEFINE_integer("step", None, "the checkpoint's step; by default the newest")
  flags.DEFINE_boolean("best", False, "the checkpoint with the best checkpoint.best_metric of the run")
  flags.DEFINE_boolean("ema", None, "averaged weights, where the run keeps them")
  flags.DEFINE_integer("image_size", None, "image size in pixels; by default the run's own")
  flags.DEFINE_integer("batch_size", None, "rows per compiled call; by default 64 a chip, on CPUs 64 in all")
  tasks.define_flags(SAMPLING)
  flags.DEFINE_string("suite", None, f"benchmarks to measure: one of {', '.join(suites.SUITES)}")
  flags.DEFINE_string("data_root", None, "folder of a suite's data sets in published layouts")
  flags.DEFINE_boolean("incomplete", False, "measure data sets whose number of images is not the published one, too")
  flags.DEFINE_list("compare", None, "JSON files of results to compare; takes --out and no --workdir")
  cli.process_flags()


def main(argv: Sequence[str]) -> None:
  if FLAGS.compare:
    cli.refuse(("workdir", "tasks", "data", "suite"), "beside --compare, which reads results alone")
    return tables.compare(FLAGS.compare, FLAGS.out)
  if not FLAGS.workdir:  # not required of the flag itself, since --compare reads no run
    raise UserError("--workdir=DIR is missing, the folder of the run to measure")
  processes.start()
  run = run_config.load(FLAGS.workdir)
  sections = tasks.override(read_sections(run), _given(tasks.all_settings()))
  sampling = _given(SAMPLING)
  check_sampling(sections, run.objectives, sampling)
  protocol = {**{SAMPLING[name].name: value for name, value in sampling.items()}, **_given(LOADING)}
  if FLAGS.best:
    cli.refuse(("step",), "beside --best")
    if (best := checkpoint.best(FLAGS.workdir, run.checkpoint)) is None:
      metric = run.checkpoint.best_metric
      raise UserError(f"--best: no checkpoint in {FLAGS.workdir} was saved with checkpoint.best_metric={metric!r}")
    protocol["step"] = best.step
  if processes.is_first():  # before hours of work
    result_files.check_out(FLAGS.out)
  if FLAGS.suite:
    measure_suite(FLAGS.workdir, sections, FLAGS.out, incomplete=FLAGS.incomplete, **protocol)
  else:
    results = evaluate(FLAGS.workdir, sections, kept=ResultFile(FLAGS.out, resumes=False), **protocol)
    if "long_tail" in results:
      tables.write(FLAGS.workdir, results, FLAGS.out)
  logging.info("results in %s; compare: diffdis evaluate --compare=%s,OTHER.json", FLAGS.out, FLAGS.out)


def evaluate(
  run: str,
  sections: Sequence[Section],
  *,
  step: int | None = None,
  ema: bool = True,
  kept: ResultFile | None = None,
  check: Callable[[str, base.Evaluation], None] = lambda dataset, evaluation: None,
  **protocol: Any,
) -> Results:
  """Measure the run of a workdir by tasks on data sets, and return {task: {data set: record}}.

  `inference.load` takes `step`, `ema` and `protocol`. The file `kept` gets each record as soon as it is there. `check`
  is called with each data set and its evaluation. Raises UserError, before anything is measured: bad settings, data or
  checkpoint, or kept records of other weights.
  """
  provenance.code()  # now: the checkout may change while data and weights are read
  # Everything is opened and checked before the model is loaded: the last of many sets must not fail after hours.
  evaluations = [(section, section.create()) for section in sections]
  for section, evaluation in evaluations:
    check(section.dataset, evaluation)
  # With other sets, one process would wait for the others for ever; with other records, each would read its own.
  sets = {f"{section.task} on {section.dataset}": _records(section) for section in sections}
  processes.check_same(sets, "give every host the same data sets")
  step, ema = restore.choose(run, step, ema=ema)
  model, params = inference.load(run, step=step, ema=ema, **protocol)
  common: dict[str, Any] = {"image_size": model.image_size, "checkpoint": step, "ema": ema}
  origin = provenance.provenance(provenance.of_run(run, step=step))
  results: Results = {} if kept is None else kept.results
  if kept is not None and kept.resumes:
    common["weights"] = result_files.fingerprint(params)
    is_there = lambda section, how: kept.has(section.task, section.dataset, how.protocol(model) | common)
    evaluations = [(section, how) for section, how in evaluations if not is_there(section, how)]
  for place, (section, evaluation) in enumerate(evaluations, 1):
    logging.info("%s: %s, %d of %d", section.task, section.dataset, place, len(evaluations))
    metrics = evaluation.run(model, params)
    figures = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    logging.info("%s, %s: %s", section.task, section.dataset, figures)
    results.setdefault(section.task, {})[section.dataset] = result_files.make_record(
      dataset=section.dataset,
      model="diffdis_jax",
      pretrained=provenance.public(run),
      task=evaluation.task,
      metrics=metrics,
      protocol={**evaluation.protocol(model), **common},  # after the run: of FID's reference it is known only then
      provenance=origin,
    )
    if kept is not None:
      kept.write()
  return results


def measure_suite(run: str, sections: Sequence[Section], out: str, *, incomplete: bool, **protocol: Any) -> None:
  """Measure what of a suite is not in `out` yet, and write the whole with its means, and a table beside it. Raises
  UserError: as `evaluate`, or a data set that is not the published one."""
  kept, check = ResultFile(out), functools.partial(suites.check, incomplete=incomplete)
  results = evaluate(run, sections, kept=kept, check=check, **protocol)
  # Means come last: a suite that was killed has none that later sets would belie.
  for task, means in suites.means(results).items():
    results[task] |= means
  kept.write()
  tables.write(run, results, out)


def _records(section: Section) -> str:
  """Return a digest of the records that a task reads of prepared data."""
  path = str((section.settings.get("data") or {}).get("path") or "")
  return digests.fingerprint(path, part=digests.RECORDS) if path else ""


def read_sections(run: Any) -> list[Section]:
  """Return the tasks and sets that the flags ask for. Raises UserError: flags that do not go together, or a task that
  measures what the run was not trained for."""
  image_size = FLAGS.image_size or run.image_size
  if FLAGS.suite:
    if not FLAGS.out.endswith(".json"):
      raise UserError(f"--out={FLAGS.out} should end in .json; the suite's table is written beside it, as .md")
    others = {"data", "split", "tasks", *tasks.all_settings()} - {*OF_A_SUITE}
    cli.refuse(sorted(others), "on a suite, which has its own")
    sections = suites.sections(FLAGS.suite, FLAGS.data_root, objectives=run.objectives, image_size=image_size)
  elif FLAGS.data_root or FLAGS.incomplete:
    raise UserError("--data_root and --incomplete belong to --suite; give it too")
  elif FLAGS.data:
    asked = FLAGS.tasks or ["zero_shot", "retrieval"]
    sections = tasks.of_folder(FLAGS.data, FLAGS.split, tasks=asked, image_size=image_size)
  elif FLAGS.split:
    how = "give --data too, or, for long_tail, add the split by --eval of train, also to a finished run"
    raise UserError(f"--split is a split of --data; {how}")
  else:
    sections = tasks.of_config(tasks.resized(run.evals, run.image_size, image_size), tasks=FLAGS.tasks)
  for section in sections:  # here, since a task may take hours before the next one fails
    tasks.check_objectives(section.dataset, section.task, run.objectives)
  return sections


def check_sampling(sections: Sequence[Section], objectives: Sequence[str], given: Mapping[str, Any]) -> None:
  """Raise UserError where one of the given flags of Sampling is out of its range, or changes nothing."""
  rows = [tasks.get(section.task) for section in sections]
  generates, compares = any(row.generates for row in rows), any(row.compares for row in rows)
  compares &= bool({*ALIGNED} & {*objectives})
  for name, value in given.items():
    if check := SAMPLING[name].metadata.get("check"):
      check(f"--{name}", value)
    if not (generates if name.startswith("generation_") else compares):
      what = "images are generated" if name.startswith("generation_") else "text queries are denoised"
      raise UserError(f"--{name} has no effect: no {what} for these tasks of this run; leave it out")


def _given(names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
  return {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}


if __name__ == "__main__":
  define_flags()
  cli.run(main)
