"""Measures a trained run by zero-shot accuracy, retrieval, FID and other tasks.

  diffdis evaluate --workdir=runs/demo/diffdis --tasks=zero_shot --out=zero_shot.json

Without --data it measures the `evals` of the run's config. The JSON file holds {task: {data set: record}}, each record
in CLIP_benchmark's schema with its protocol; a figure that is not finite is null. With --tasks=long_tail a Markdown
file beside it has the paper's Table 8.

A prepared data set, with class names and templates of your own:

  diffdis evaluate --workdir=RUN --tasks=zero_shot,retrieval --data=PREPARED_DIR \\
      --split=test --classnames=NAMES.json --templates=TEMPLATES.json --out=F.json

FID and KID. Generated images are kept in F.parts, or in --parts, and the same command resumes from them:

  diffdis evaluate --workdir=RUN --tasks=fid --data=PREPARED_DIR --split=val \\
      --inception=WEIGHTS.pth --out=F.json

The paper's benchmarks, each found under ROOT in a published layout. F.json is written after each data set, and the
same command resumes there; F.md has the means in the paper's layout. A suite also takes --num_images, --seed,
--shuffle_labels and the flags of fid:

  diffdis evaluate --workdir=RUN --suite=paper --data_root=ROOT --out=F.json

Several results side by side, with the differences between their protocols:

  diffdis evaluate --compare=A.json,B.json --out=F.md
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.common import cli, one_file
from diffdis_jax.config.model import ClipModel
from diffdis_jax.config.objectives import ALIGNED
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, registry, suites, tables
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import sections as eval_sections
from diffdis_jax.evals import settings as eval_settings
from diffdis_jax.evals.results import ResultFile, Results
from diffdis_jax.evals.sections import Section
from diffdis_jax.parallel import processes
from diffdis_jax.run import checkpoint, digests, provenance, restore, writers

FLAGS = flags.FLAGS
# The arguments of each evaluation's constructor, and of a run's sampling and loading.
SETTINGS_OF = {task: registry.settings_of(task) for task in registry.EVALS}
SETTINGS = eval_settings.merged(SETTINGS_OF)
SAMPLING = eval_settings.of(inference.Sampling)
LOADING = eval_settings.of(inference.load)
RENAMED = {"steps": "query_steps"}  # field of Sampling -> its flag, which would else be taken for the images' steps
OF_A_SUITE = {"seed", "num_images", "shuffle_labels", *registry.settings_of("fid")}  # all else a suite has of its own


def define_flags() -> None:
  """Define the command line, by group. Defined on call, so that two verbs can be imported side by side."""
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model")
  flags.DEFINE_string("out", None, "JSON file to write; with --compare a Markdown file", required=True)
  by_default = "by default those of the config's data sets, with --data zero_shot and retrieval"
  flags.DEFINE_list("tasks", None, f"any of {', '.join(registry.EVALS)}; {by_default}")
  flags.DEFINE_string("data", None, "folder written by prepare_data; by default the data sets of the run's config")
  flags.DEFINE_string("split", None, "split of --data")
  flags.DEFINE_enum("tracker", None, list(writers.TRACKERS), "the run's tracker, which gets the figures too")
  flags.DEFINE_boolean("best", False, "the checkpoint with the best checkpoint.best_metric of the run")
  for name, setting in (LOADING | SAMPLING).items():
    setting.define(RENAMED.get(name, name))
  for name, setting in SETTINGS.items():
    setting.define(name)
  flags.DEFINE_string("suite", None, f"benchmarks to measure: one of {', '.join(suites.SUITES)}")
  flags.DEFINE_string("data_root", None, "folder of a suite's data sets in published layouts")
  flags.DEFINE_boolean("incomplete", False, "measure data sets whose number of images is not the published one, too")
  flags.DEFINE_list("compare", None, "JSON files of results to compare; takes --out and no --workdir")
  cli.process_flags()


def main(argv: Sequence[str]) -> None:
  del argv
  if FLAGS.compare:
    for name in ("workdir", "tasks", "data", "suite", "tracker"):
      if FLAGS[name].present:
        raise UserError(f"--{name} has no effect beside --compare, which reads results alone; leave it out")
    tables.compare(FLAGS.compare, FLAGS.out)
    return
  # Not required of the flag itself, since --compare reads no run.
  if not FLAGS.workdir:
    raise UserError("--workdir=DIR is missing, the folder of the run to measure")
  if FLAGS.tracker and one_file.at(FLAGS.workdir) is not None:  # which keeps no id of the run there
    raise UserError(f"--tracker={FLAGS.tracker} takes a run's workdir, and {FLAGS.workdir} is one file; leave it out")
  writers.check_tracker(FLAGS.tracker or "")
  cli.compilation_cache()
  cli.use_all_cores()
  processes.start()
  # Hours of work are not to end in an --out that cannot be written.
  if processes.is_first():
    result_files.check_out(FLAGS.out)
    writers.sign_in(FLAGS.tracker or "")
  record = run_config.load(FLAGS.workdir)
  asked = _sections(record.evals, objectives=record.objectives, image_size=record.image_size)
  # In this order: flags may name --parts, and what has none of its own gets one.
  sections = eval_sections.with_parts(eval_sections.override(asked, _given(SETTINGS)), FLAGS.out)
  sampling = _sampling()
  _check_effect(sections, record.objectives, [*sampling], is_clip=isinstance(record.model, ClipModel))
  protocol = {**sampling, **_given(LOADING)}
  if FLAGS.best:
    protocol["step"] = _best_step(FLAGS.workdir, record.checkpoint)
  if FLAGS.suite:
    results = measure_suite(FLAGS.workdir, sections, FLAGS.out, incomplete=FLAGS.incomplete, **protocol)
  else:
    if processes.is_first():  # here, before hours that a user would rather write elsewhere
      result_files.warn_of_lost(FLAGS.out, {(section.task, section.dataset) for section in sections})
    results = evaluate(FLAGS.workdir, sections, measured=functools.partial(result_files.write, FLAGS.out), **protocol)
    if "long_tail" in results:
      tables.write(FLAGS.workdir, results, FLAGS.out)
  if processes.is_first():
    track(FLAGS.tracker or "", FLAGS.workdir, record.to_dict(), results)


def track(kind: str, run: str, config: Mapping[str, Any], results: Results) -> None:
  """Report figures to the run's tracker, as TASK/DATASET/METRIC at the step of their checkpoint; `kind` empty: to
  none."""
  if not kind:
    return
  tracker = writers.Tracker(kind, run, config)
  with contextlib.ExitStack() as stack:
    stack.callback(tracker.close)
    for task, records in results.items():
      for dataset, record in records.items():
        finite = {name: value for name, value in record["metrics"].items() if math.isfinite(value)}
        # The means of a suite have no protocol of their own; all its sets are of one checkpoint.
        step = next(each["protocol"]["checkpoint"] for each in records.values() if "checkpoint" in each["protocol"])
        tracker.log(step, {f"{task}/{dataset}/{name}": value for name, value in finite.items()})


def evaluate(
  run: str,
  sections: Sequence[Section],
  *,
  step: int | None = None,
  ema: bool = True,
  kept: ResultFile | None = None,
  measured: Callable[[Results], None] = lambda results: None,
  check: Callable[[str, base.Eval], None] = lambda dataset, evaluation: None,
  **protocol: Any,
) -> Results:
  """Measure a run, and return {task: {data set: record}}.

  Args:
    run: its workdir.
    sections: what to measure.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    kept: where each record is kept as soon as it is there; what it has is not measured again.
    measured: is called with the results so far after each data set, so that an interruption loses none of them.
    check: of each data set and its evaluation, before anything is measured.
    protocol: as `inference.load` takes it.

  Raises:
    UserError: bad settings, data or checkpoint, or kept records of other weights; before anything is measured.
  """
  provenance.code()  # now: the checkout may change while data and weights are read
  # Everything is opened and checked before the model is loaded: the last of many sets must not fail after hours.
  made = [(section, section.create()) for section in sections]
  for section, evaluation in made:
    check(section.dataset, evaluation)
  _check_same_on_all(sections)
  step, ema = restore.choose(run, step, ema=ema)
  model, params = inference.load(run, step=step, ema=ema, **protocol)
  common = {"image_size": model.image_size, "checkpoint": step, "ema": ema}
  origin = provenance.provenance(provenance.of_run(run, step=step))
  if kept is not None:
    common["weights"] = base.fingerprint(params)
    made = [(each, how) for each, how in made if not kept.has(each.task, each.dataset, how.protocol(model) | common)]
  results: Results = {} if kept is None else kept.results
  for place, (section, evaluation) in enumerate(made, 1):
    logging.info("%s: %s, %d of %d", section.task, section.dataset, place, len(made))
    record = _measure(section, evaluation, model, params, common, pretrained=provenance.public(run), provenance=origin)
    results.setdefault(section.task, {})[section.dataset] = record
    measured(results)
    if kept is not None:
      kept.write()
  return results


def _check_same_on_all(sections: Sequence[Section]) -> None:
  """Raise UserError, on every process, where they measure different sets: one would wait for the others for ever; or
  different records, of which each would read its rows and know the labels of its own."""
  if jax.process_count() == 1:
    return
  names = ", ".join(f"{section.task} on {section.dataset}{_records_of(section)}" for section in sections)
  if hosts := processes.differing(names):
    raise UserError(
      f"these hosts find other data sets than host 0: {', '.join(map(str, hosts))}; this host finds {names}; put the"
      " same ones where every host finds them"
    )


def _records_of(section: Section) -> str:
  """Return a note that tells a prepared data set's records from others."""
  path = (section.settings.get("data") or {}).get("path")
  digest = digests.fingerprint(str(path), part=digests.RECORDS) if path else ""
  return f" ({digest})" if digest else ""


def _measure(
  section: Section,
  evaluation: base.Eval,
  model: Any,
  params: Mapping[str, Any],
  common: Mapping[str, Any],
  **of_run: Any,
) -> dict[str, Any]:
  """Return the record of a data set. `common` stands in every set's protocol, `of_run` in every record."""
  metrics = evaluation.run(model, params)
  shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
  logging.info("%s, %s: %s", section.task, section.dataset, shown)
  return base.make_record(
    dataset=section.dataset,
    model="diffdis_jax",
    task=evaluation.task,
    metrics=metrics,
    # After the run: of FID's reference it is known only then.
    protocol={**evaluation.protocol(model), **common},
    **of_run,
  )


def measure_suite(run: str, sections: Sequence[Section], out: str, *, incomplete: bool, **protocol: Any) -> Results:
  """Measure what of a suite is not in `out` yet, and write the whole with its means, and a table beside it.

  Raises:
    UserError: as `evaluate`, or a data set that is not the published one.
  """
  kept, check = ResultFile(out), functools.partial(suites.check, incomplete=incomplete)
  results = evaluate(run, sections, kept=kept, check=check, **protocol)
  # Means come last: a suite that was killed has none that later sets would belie.
  for task, means in suites.means(results).items():
    results[task] |= means
  kept.write()
  tables.write(run, results, out)
  return results


def _sections(sets: Mapping[str, Any], *, objectives: Sequence[str], image_size: int) -> list[Section]:
  """Return the evaluations that the flags ask for, of a run with these `evals`, which was trained for these objectives.

  Raises:
    UserError: flags that do not go together, or a task that measures what the run was not trained for.
  """
  asked_size = FLAGS.image_size or image_size
  sections = _asked(eval_sections.resized(sets, image_size, asked_size), objectives=objectives, image_size=asked_size)
  # Here, since a task may take hours before the next one fails.
  for section in sections:
    registry.check_objectives(section.dataset, section.task, objectives)
  return sections


def _asked(sets: Mapping[str, Any], *, objectives: Sequence[str], image_size: int) -> list[Section]:
  if FLAGS.suite:
    return sections_of_suite(objectives=objectives, image_size=image_size)
  if FLAGS.data_root or FLAGS.incomplete:
    raise UserError("--data_root and --incomplete belong to --suite; give it too")
  if FLAGS.data:
    tasks = FLAGS.tasks or ["zero_shot", "retrieval"]
    return eval_sections.of_folder(FLAGS.data, FLAGS.split, tasks=tasks, image_size=image_size)
  if FLAGS.split and "long_tail" in (FLAGS.tasks or ()):  # which takes no --data
    raise UserError(
      "long_tail is measured on the sets that the run's config names; leave out --split, or add one of another split by"
      " --eval of train, also to a finished run"
    )
  if FLAGS.split:
    raise UserError("--split is a split of --data; give --data too")
  return eval_sections.of_config(sets, tasks=FLAGS.tasks)


def sections_of_suite(*, objectives: Sequence[str], image_size: int) -> list[Section]:
  """Return the sets of --suite that lie under --data_root. Raise UserError: no such suite, none there, or other
  flags."""
  suites.check_name(FLAGS.suite)
  if not FLAGS.data_root:
    raise UserError("--suite needs --data_root=DIR, the folder of its data sets")
  if not FLAGS.out.endswith(".json"):
    raise UserError(f"--out={FLAGS.out} should end in .json; the suite's table is written beside it, as .md")
  for name in ("data", "split", "tasks", *SETTINGS):
    if name not in OF_A_SUITE and FLAGS[name].value is not None:
      raise UserError(f"--{name} has no effect on a suite, which has its own; leave it out")
  return suites.sections(FLAGS.suite, FLAGS.data_root, objectives=objectives, image_size=image_size)


def _best_step(run: str, kept: CheckpointPolicy) -> int:
  """Return the step of the best checkpoint. Raise UserError where the run keeps none, or --step names one too."""
  if FLAGS.step is not None:
    raise UserError("--best and --step are both given; give one of them")
  found = checkpoint.best(run, kept)
  if found is None:
    raise UserError(f"--best: no checkpoint in {run} was saved with checkpoint.best_metric={kept.best_metric!r}")
  return found.step


def _sampling() -> dict[str, Any]:
  """Return the fields of Sampling that flags give. Raise UserError: one is out of its range."""
  given = _given(SAMPLING)
  try:
    inference.Sampling(**given)
  except UserError as error:
    # Its message begins with the field, which is a flag here.
    field, _, rest = str(error).partition(" ")
    raise UserError(f"--{RENAMED.get(field, field)} {rest}") from error
  return given


def _check_effect(
  sections: Sequence[Section], objectives: Sequence[str], given: Sequence[str], *, is_clip: bool = False
) -> None:
  """Raise UserError where one of these fields of Sampling changes nothing."""
  of_queries = [name for name in given if name in SAMPLING and not name.startswith("generation_")]
  of_images = [name for name in given if name not in of_queries]
  if of_images and not any(section.task in registry.GENERATING for section in sections):
    raise UserError(f"--{of_images[0]} has no effect on these tasks, which generate nothing; leave it out")
  flag = f"--{RENAMED.get(of_queries[0], of_queries[0])}" if of_queries else ""
  if flag and is_clip:  # here: what loads the model knows fields alone, and comes after the data
    raise UserError(f"{flag} has no effect: this run is a CLIP model, which denoises nothing; leave it out")
  if flag and all(section.task in registry.WITHOUT_QUERIES for section in sections):
    raise UserError(f"{flag} has no effect on these tasks, for which no text query is denoised; leave it out")
  if flag and not {*ALIGNED} & {*objectives}:
    raise UserError(
      f"{flag} is of text queries, and this run has no head that compares them;"
      " leave it out, or give --generation_steps or --generation_guidance of its images"
    )


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
  found = {name: FLAGS[RENAMED.get(name, name)].value for name in settings}
  return {name: value for name, value in found.items() if value is not None}


if __name__ == "__main__":
  define_flags()
  cli.run(main)
