"""Measures a trained run.

  python -m diffdis_jax.evaluate --workdir=DIR --tasks=zero_shot,retrieval --out=F.json
      [--data=PREPARED_DIR --split=S --classnames=F.json --templates=F.json --label_field=FIELD]

Without --data it measures on the sets that the run's config names under `evals`. F.json holds
{task: {data set: record}}, each record in CLIP_benchmark's schema with the protocol beside it. Of --tasks=long_tail,
F.md has the layout of the paper's Table 8.

  python -m diffdis_jax.evaluate --workdir=DIR --tasks=fid --data=PREPARED_DIR --split=S --inception=W.pth --out=F.json
      [--reference=STATISTICS.npz --num_images=N --parts=DIR2 --keep_images]

What fid has sampled is kept in F.parts, or in --parts: the same command goes on from there.

  python -m diffdis_jax.evaluate --workdir=DIR --suite=zero_shot12|retrieval|fid|paper --data_root=ROOT --out=F.json
      [--incomplete --num_images=N --seed=N --shuffle_labels, and what fid takes]

measures the paper's benchmarks, each where it lies under ROOT in one of the layouts in which it is published, gives
their means, and writes F.md, a table in the paper's layout, beside F.json. F.json is written after each set, and the
same command goes on from there. --suite=emoji measures what prepare_data emoji wrote, in ROOT itself or in ROOT/emoji.

  python -m diffdis_jax.evaluate --compare=A.json,B.json --out=F.md

puts the results of several files side by side, and says where their protocols differ.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.common import buckets, cli, files, guesses
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, suites, tables
from diffdis_jax.evals import registry as evals
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.results import ResultFile, Results
from diffdis_jax.evals.text_cache import CachedTexts
from diffdis_jax.parallel import processes
from diffdis_jax.parallel.fingerprint import fingerprint
from diffdis_jax.run import checkpoint, provenance

FLAGS = flags.FLAGS
Section = tuple[str, dict[str, Any]]  # data set, and {task, what that evaluation takes}
SETTINGS = {  # of an evaluation, that a flag of the same name may set
  "zero_shot": ("seed", "num_images", "shuffle_labels", "classnames", "templates", "label_field", "seen_split"),
  "retrieval": ("seed", "num_images", "shuffle_labels", "caption_field"),
  "agreement": ("seed",),
  "recognition": ("seed", "label_field"),
  "long_tail": ("seed",),
  "fid": (
    *("seed", "num_images", "inception", "captions", "prompts_seed", "resize", "resampling"),
    *("reference", "reference_images", "parts", "keep_images"),
  ),
}
NOT_OF_A_SUITE = ("classnames", "templates", "label_field", "seen_split", "caption_field")  # which has its own
# As inference.load takes them.
PROTOCOL = (
  "num_noise_samples",
  "guidance",
  "normalize_query",
  "generation_steps",
  "generation_guidance",
  "batch_size",
  "image_size",
)


def define_flags() -> None:
  """The command line. Defined on call, so that two verbs can be imported side by side."""
  cli.process_flags()
  flags.DEFINE_string("workdir", None, "folder of the run")
  flags.DEFINE_string("out", None, "JSON file to write; with --compare a Markdown file", required=True)
  flags.DEFINE_list("tasks", None, f"any of {', '.join(SETTINGS)}; by default those of the config's sets")
  flags.DEFINE_string("data", None, "folder written by prepare_data; by default the sets of the run's config")
  flags.DEFINE_string("split", None, "split of --data")
  flags.DEFINE_string(
    "classnames", None, "JSON list of class names, or object {name in the data: name}; by default the labels"
  )
  flags.DEFINE_string("templates", None, "JSON list of prompt templates, {} for the class name")
  flags.DEFINE_string("label_field", None, "field of a record with its class name")
  flags.DEFINE_string("caption_field", None, "field of a record with its caption or captions; by default all captions")
  flags.DEFINE_string("seen_split", None, "split whose classes count as seen; accuracy is given on the others apart")
  flags.DEFINE_integer("num_images", None, "measure on this many images; by default on all", lower_bound=1)
  flags.DEFINE_boolean("shuffle_labels", None, "leak test: images shuffled against labels; accuracy must be chance")
  flags.DEFINE_integer("seed", None, "of the noise", lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_integer("query_steps", None, "denoising steps of the text query", lower_bound=1, upper_bound=1000)
  flags.DEFINE_integer("num_noise_samples", None, "draws of the query's noise to average", lower_bound=1)
  flags.DEFINE_float("guidance", None, "guidance scale of the text query; 1 is none")
  flags.DEFINE_boolean("normalize_query", None, "of several steps, normalise each step's query before it is fed back")
  flags.DEFINE_integer("generation_steps", None, "sampling steps of images", lower_bound=1, upper_bound=1000)
  flags.DEFINE_float("generation_guidance", None, "guidance scale of images; 1 is none")
  flags.DEFINE_integer("image_size", None, "side of the images, pixels; by default the run's", lower_bound=1)
  flags.DEFINE_integer("batch_size", None, "rows a compiled call", lower_bound=1)
  define_fid_flags()
  define_suite_flags()
  flags.DEFINE_string(
    "text_cache", None, "folder of embedded texts, empty for none; by default in the user's cache directory"
  )
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("best", False, "the checkpoint with the best checkpoint.best_metric of the run")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")


def define_fid_flags() -> None:
  """What `Fid` takes."""
  flags.DEFINE_string("inception", None, "weights of FID's network: torch-fidelity's or pytorch-fid's file, or a copy")
  flags.DEFINE_string("reference", None, "statistics of real images, .npz; made of --data where there is none yet")
  flags.DEFINE_string("reference_images", None, "what they are of: all of --data, prompted, or a folder of images")
  flags.DEFINE_string("captions", None, "that are drawn: per_image, one of each record; or all, whatever their record")
  flags.DEFINE_integer("prompts_seed", None, "of the drawn captions")
  flags.DEFINE_string("resize", None, "to FID's network: tensorflow (torch-fidelity's) or clean (clean-fid's)")
  flags.DEFINE_string("resampling", None, "of real images to the model's size: lanczos or bicubic")
  flags.DEFINE_string("parts", None, "folder in which features of sampled images are kept; by default beside --out")
  flags.DEFINE_boolean("keep_images", None, "keep the sampled images there, too")


def define_suite_flags() -> None:
  """The paper's benchmarks, and tables of results."""
  flags.DEFINE_string("suite", None, f"benchmarks, the paper's or emoji: one of {', '.join(suites.SUITES)}")
  flags.DEFINE_string("data_root", None, "folder of a suite's data sets in published layouts; of emoji prepared")
  flags.DEFINE_boolean("incomplete", False, "measure a suite's sets even with another number of images than published")
  flags.DEFINE_list("compare", None, "JSON files of results to put side by side; takes --out alone")


def main(argv: Sequence[str]) -> None:
  del argv
  if FLAGS.compare:
    tables.compare(FLAGS.compare, FLAGS.out)
    return
  if not FLAGS.workdir:
    raise UserError("--workdir=DIR is missing, the folder of the run to measure")
  cli.compilation_cache(FLAGS.workdir)
  cli.use_all_cores()
  processes.start()
  if processes.is_first() and buckets.path(FLAGS.out).parent.is_dir():
    files.check_out(FLAGS.out)
  record = run_config.load(FLAGS.workdir)
  settings = _given(name for names in SETTINGS.values() for name in names)
  asked = _sections(record.evals, objectives=record.objectives, image_size=record.image_size)
  sections = with_parts(override(asked, settings), FLAGS.out)
  step = _best_step(FLAGS.workdir, record.checkpoint) if FLAGS.best else FLAGS.step
  texts = files.user_cache("texts") if FLAGS.text_cache is None else FLAGS.text_cache
  protocol = {"step": step, "ema": FLAGS.ema, "text_cache": texts, **_given(PROTOCOL)}
  if FLAGS.query_steps is not None:
    protocol["steps"] = FLAGS.query_steps
  if FLAGS.suite:
    measure_suite(FLAGS.workdir, sections, FLAGS.out, incomplete=FLAGS.incomplete, **protocol)
  else:
    results = evaluate(FLAGS.workdir, sections, measured=functools.partial(result_files.write, FLAGS.out), **protocol)
    if "long_tail" in results:
      write_table(FLAGS.workdir, results, FLAGS.out)


def evaluate(
  run: str,
  sections: Sequence[Section],
  *,
  step: int | None = None,
  ema: bool = True,
  kept: ResultFile | None = None,
  measured: Callable[[Results], None] = lambda results: None,
  check: Callable[[str, base.Eval], None] = lambda dataset, evaluation: None,
  text_cache: str = "",
  **protocol: Any,
) -> dict[str, dict[str, Any]]:
  """{task: {data set: record}} of a run.

  Args:
    run: its workdir.
    sections: what to measure.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    kept: where each record is kept as soon as it is there; what it has is not measured again.
    measured: is called with the results so far after each data set, so that an interruption loses none of them.
    check: of each data set and its evaluation, before anything is measured.
    text_cache: folder of embedded texts; empty for none.
    protocol: as `inference.load` takes it.

  Raises:
    UserError: bad settings, data or checkpoint, or kept records of other weights; before anything is measured.
  """
  made = [(dataset, section["task"], evals.create(**section)) for dataset, section in sections]
  for dataset, _, evaluation in made:
    check(dataset, evaluation)
  step, ema = checkpoint.choose(run, step, ema=ema)
  model, params = inference.load(run, step=step, ema=ema, **protocol)
  common = {"image_size": model.image_size, "checkpoint": step, "ema": ema}
  origin = provenance.provenance(provenance.of_run(run, step=step))
  weights = fingerprint(params) if kept is not None or text_cache else ""
  if text_cache:
    model = CachedTexts(model, pathlib.Path(text_cache), weights)
  if kept is not None:
    common["weights"] = weights
    made = [each for each in made if not kept.has(each[1], each[0], {**each[2].protocol(model), **common})]
  results: dict[str, dict[str, Any]] = {} if kept is None else kept.results
  for place, (dataset, task, evaluation) in enumerate(made, 1):
    logging.info("%s: %s, %d of %d", task, dataset, place, len(made))
    metrics = evaluation.run(model, params)
    logging.info("%s, %s: %s", task, dataset, ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    record = base.make_record(
      dataset=dataset,
      model="diffdis_jax",
      pretrained=provenance.public(run),
      task=evaluation.task,
      metrics=metrics,
      protocol={**evaluation.protocol(model), **common},
      provenance=origin,
    )
    results.setdefault(task, {})[dataset] = record
    measured(results)
    if kept is not None:
      kept.write()
  return results


def measure_suite(run: str, sections: Sequence[Section], out: str, *, incomplete: bool, **protocol: Any) -> None:
  """Measures what of a suite is not in `out` yet, and writes the whole with its means, and a table beside it.

  Raises:
    UserError: as `evaluate`, or a data set that is not the published one.
  """
  kept = ResultFile(out)
  check = functools.partial(suites.check, incomplete=incomplete)
  results = evaluate(run, sections, kept=kept, check=check, **protocol)
  for task, record in [*suites.means(results)]:
    results[task][record["dataset"]] = record
  kept.write()
  write_table(run, results, out)


def write_table(run: str, results: Results, out: str) -> None:
  """Writes the results as a table in the paper's layout beside the JSON file `out`, on process 0."""
  if processes.is_first():
    title = pathlib.PurePath(run).name
    result_files.write_text(f"{out.removesuffix('.json')}.md", tables.table({title: results}))


def _sections(sets: Mapping[str, Any], *, objectives: Sequence[str], image_size: int) -> list[Section]:
  """What the flags ask for of a run with these `evals`. Raises UserError: flags that do not go together."""
  if FLAGS.suite:
    return sections_of_suite(objectives=objectives, image_size=image_size)
  if FLAGS.data_root or FLAGS.incomplete:
    raise UserError("--data_root and --incomplete belong to --suite; give it too")
  if FLAGS.data:
    tasks = FLAGS.tasks or ["zero_shot", "retrieval"]
    return sections_of_folder(FLAGS.data, FLAGS.split, tasks=tasks, image_size=image_size)
  if FLAGS.split:
    raise UserError("--split is a split of --data; give --data too")
  return sections_of_config(sets, tasks=FLAGS.tasks)


def sections_of_suite(*, objectives: Sequence[str], image_size: int) -> list[Section]:
  """The sets of --suite that lie under --data_root. Raises UserError: no such suite, none there, or other flags."""
  if FLAGS.suite not in suites.SUITES:
    raise UserError(f"unknown suite {FLAGS.suite!r}; {guesses.did_you_mean(FLAGS.suite, suites.SUITES)}")
  if not FLAGS.data_root:
    raise UserError("--suite needs --data_root=DIR, the folder of its data sets")
  if not FLAGS.out.endswith(".json"):
    raise UserError(f"--out={FLAGS.out} should end in .json; the suite's table is written beside it, as .md")
  if given := [name for name in ("data", "split", "tasks", *NOT_OF_A_SUITE) if FLAGS[name].value is not None]:
    raise UserError(f"--{given[0]} has no effect on a suite, which has its own; leave it out")
  return suites.sections(FLAGS.suite, FLAGS.data_root, objectives=objectives, image_size=image_size)


def sections_of_folder(folder: str, split: str | None, *, tasks: Sequence[str], image_size: int) -> list[Section]:
  """Each task on one split of a prepared folder.

  Raises:
    UserError: no split, or a task that takes no data.
  """
  if not split:
    raise UserError("--data needs --split, the name of one of its splits")
  if "agreement" in tasks:
    raise UserError("agreement judges generated shapes and takes no --data; leave one of the two out")
  if "long_tail" in tasks:
    raise UserError("long_tail is measured on the set that the run's config names; leave out --data")
  data = {"name": "pairs", "path": folder, "split": split, "image_size": image_size}
  return [(f"{pathlib.Path(folder).name}/{split}", {"task": task, "data": data}) for task in tasks]


def sections_of_config(sets: Mapping[str, Any], *, tasks: Sequence[str] | None) -> list[Section]:
  """Of the sets that a run's config names, its `evals`, those of `tasks`, or all.

  Raises:
    UserError: there is none, or none for one of the tasks.
  """
  sections = list(sets.items())
  named = sorted({section["task"] for _, section in sections})
  if not sections:
    raise UserError("the run's config names no data set to measure on; give --data and --split")
  for task in tasks or named:
    if task not in named:
      raise UserError(f"the run's config has no data set for {task}, only for {', '.join(named)}; give --data, --split")
  return [(dataset, section) for dataset, section in sections if section["task"] in (tasks or named)]


def override(sections: Sequence[Section], settings: Mapping[str, Any]) -> list[Section]:
  """Sections with these settings in place, wherever the task has them.

  Raises:
    UserError: a task is unknown, or a setting has no effect on any section.
  """
  for _, section in sections:
    if section["task"] not in SETTINGS:
      raise UserError(f"unknown task {section['task']!r}; {guesses.did_you_mean(section['task'], SETTINGS)}")
  for name in settings:
    if not any(name in SETTINGS[section["task"]] for _, section in sections):
      raise UserError(f"--{name} has no effect on these tasks; leave it out")
  return [
    (dataset, section | {name: value for name, value in settings.items() if name in SETTINGS[section["task"]]})
    for dataset, section in sections
  ]


def _best_step(run: str, kept: CheckpointPolicy) -> int:
  """Raises UserError where the run keeps no best checkpoint, or --step names one too."""
  if FLAGS.step is not None:
    raise UserError("--best and --step are both given; give one of them")
  found = checkpoint.best(run, kept)
  if found is None:
    raise UserError(f"--best: no checkpoint in {run} was saved with checkpoint.best_metric={kept.best_metric!r}")
  return found.step


def with_parts(sections: Sequence[Section], out: str) -> list[Section]:
  """Sections with a folder for what fid samples: its own `parts`, or else one beside `out`; of several sets, each has a
  folder in it.

  Raises:
    UserError: several sets, but one file of statistics.
  """
  of_fid = [section for _, section in sections if section["task"] == "fid"]
  references = [section["reference"] for section in of_fid if section.get("reference")]
  if len(set(references)) < len(references):
    raise UserError(f"--reference={references[0]} is of one data set, and fid is measured on several; give --data")
  several, changed = len(of_fid) > 1, []
  for dataset, section in sections:
    if section["task"] == "fid":
      folder = section.get("parts") or f"{out.removesuffix('.json')}.parts"
      name = re.sub(r"[^\w.-]+", "-", dataset)
      section = section | {"parts": f"{folder}/{name}" if several else folder}
    changed.append((dataset, section))
  return changed


def _given(names: Iterable[str]) -> dict[str, Any]:
  return {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}


if __name__ == "__main__":
  define_flags()
  cli.run(main)
