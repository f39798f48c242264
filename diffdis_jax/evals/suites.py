"""Define the paper's benchmarks: the sets that they are of, what has to be there before they are measured, and their
means.

The paper says that zero-shot classification is measured on twelve sets, not which; these are FILIP's and NLIP's twelve.
Their splits, prompts and metrics are not stated by the paper: OpenAI's templates, and the metric that is usual for the
set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from diffdis_jax.common import buckets
from diffdis_jax.common.guesses import did_you_mean
from diffdis_jax.data.layouts import class_lists, find
from diffdis_jax.data.layouts.labelled import Published
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals import tasks
from diffdis_jax.evals.base import Evaluation
from diffdis_jax.evals.results import Results, make_record
from diffdis_jax.evals.tasks import Section

SINGLE_TEMPLATE = "a photo of a {}."


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
  """A data set of a suite."""

  title: str  # of its column
  task: str  # that is measured on it
  sizes: Sequence[int]  # the numbers of images of the split that is measured; several where copies differ
  metric: str = "acc1"  # of zero-shot classification, the figure that counts


def _labelled(title: str, *sizes: int, metric: str = "acc1") -> BenchmarkSet:
  return BenchmarkSet(title, "zero_shot", sizes, metric)


PER_CLASS = "mean_per_class_recall"
# Where a set has no split of its own, `all` of it is measured, or, of a copy that has one, VTAB's or TFDS' `test`. Of
# Caltech-101 that is what TFDS leaves of 9,144 images when it has taken 30 random files of each class. A file `tmp` of
# the background is no image: where it was among the 30, 6,085 are left, as DataComp lists for its tars of VTAB's copy.
ZERO_SHOT12 = {
  "cifar10": _labelled("CIFAR-10", 10_000),
  "cifar100": _labelled("CIFAR-100", 10_000),
  "caltech101": _labelled("Caltech-101", 6_084, 6_085, 9_144, metric=PER_CLASS),
  "cars": _labelled("Cars", 8_041),
  "flowers": _labelled("Flowers", 6_149, metric=PER_CLASS),
  "food101": _labelled("Food-101", 25_250),
  "sun397": _labelled("SUN397", 21_750, 19_850, 108_754, 108_753),
  "dtd": _labelled("DTD", 1_880),
  "fgvc_aircraft": _labelled("Aircraft", 3_333, metric=PER_CLASS),
  "pets": _labelled("Pets", 3_669, metric=PER_CLASS),
  "eurosat": _labelled("EuroSAT", 5_400, 27_000),
  "imagenet1k": _labelled("ImageNet", 50_000),
}
RETRIEVAL = {
  "mscoco_captions": BenchmarkSet("MSCOCO", "retrieval", (5_000,)),
  "flickr30k": BenchmarkSet("Flickr30k", "retrieval", (1_000,)),
}
NOT_KARPATHYS = ("val", "validation")  # of a prepared set of RETRIEVAL: val2017 has 5,000 images, as his test split has
FID = {"mscoco_val2014": BenchmarkSet("MSCOCO val2014", "fid", (40_504,))}
SETS = ZERO_SHOT12 | RETRIEVAL | FID
SUITES = {"zero_shot12": ZERO_SHOT12, "retrieval": RETRIEVAL, "fid": FID, "paper": SETS}


def sections(suite: str, root: str | None, *, objectives: Collection[str], image_size: int) -> list[Section]:
  """Return the sections of those of a suite's sets that lie under `root`; warn of the others.

  Args:
    suite: one of `SUITES`.
    root: folder of the data sets.
    objectives: that the run was trained for. Of the suite `paper`, what it was not trained for is left out.
    image_size: of the run.

  Raises UserError: no such suite or folder, or none of the sets in it.
  """
  if suite not in SUITES:
    raise UserError(f"unknown suite {suite!r}; {did_you_mean(suite, SUITES)}")
  if not root:
    raise UserError("--suite needs --data_root=DIR, the folder of its data sets")
  folder = buckets.local(root, "--data_root")
  if not folder.is_dir():
    raise UserError(f"no folder --data_root={root}; it should hold the data sets, each in a folder of its name")
  # A suite that was named is measured or refused. `paper` is all of them, of which a run may be trained for some.
  able = {task for task, row in tasks.TASKS.items() if suite != "paper" or row.fits(objectives)}
  for task in sorted({benchmark.task for benchmark in SUITES[suite].values()} - able):
    logging.warning("%s is left out: the run's objectives are %s", task, ", ".join(objectives))
  wanted = {name: benchmark for name, benchmark in SUITES[suite].items() if benchmark.task in able}
  # Sets are large and few users have all twelve: those that lie there are measured.
  there = [name for name in wanted if find.folder_of(folder, name)]
  missing = [name for name in wanted if name not in there]
  if not there:
    looked = "; ".join(f"{name}: {', '.join(find.folders(name))}" for name in missing)
    raise UserError(f"no data set of {suite} in --data_root={root}; its folders were looked for: {looked}")
  if missing:
    logging.warning("%s: not in %s, and so not measured: %s", suite, root, ", ".join(missing))
  return [_section(name, root, image_size) for name in there]


def _section(name: str, root: str, image_size: int) -> Section:
  settings: dict[str, Any] = {"data": {"name": name, "path": root, "image_size": image_size}}
  if name in ZERO_SHOT12:
    known = class_lists.load()[name]
    settings |= {"classnames": known.classnames, "templates": known.templates}
    settings |= {"single_template": SINGLE_TEMPLATE}
  return Section(name, SETS[name].task, settings)


def check(name: str, evaluation: Evaluation, *, incomplete: bool) -> None:
  """Check that the data of an evaluation are the set that they are said to be.

  Args:
    name: of the set.
    evaluation: made of its section.
    incomplete: let pass another number of images.

  Raises UserError: another number of images than the published one, or another split.
  """
  source = getattr(evaluation, "source", None)
  if not isinstance(source, Published) or incomplete:
    return
  remedy = "or give --incomplete to measure what is there"
  there, published = f"{name} in {source.origin.path}", SETS[name]
  if name in RETRIEVAL and source.origin.split in NOT_KARPATHYS:
    raise UserError(
      f"{there} has no split test, and its split {source.origin.split} is of other images; prepare it by Karpathy's"
      f" splits (dataset_*.json), {remedy}"
    )
  if len(source) not in published.sizes:
    sizes = " or ".join(f"{count:,}" for count in published.sizes)
    raise UserError(f"{there} has {len(source):,} images, and should have {sizes}; download it again, {remedy}")


def is_whole(name: str, record: Mapping[str, Any]) -> bool:
  """Return whether a result is of a whole published split, and no leak test."""
  protocol = record["protocol"]
  is_other = name in RETRIEVAL and protocol.get("data", {}).get("split") in NOT_KARPATHYS
  return protocol["num_images"] in SETS[name].sizes and not is_other and not protocol.get("shuffle_labels")


def means(results: Mapping[str, Mapping[str, Any]]) -> Results:
  """Return {task: {name: record}} of the means over the sets that were measured.

  Of zero-shot classification the unweighted mean of each set's own metric, of retrieval that of recall@1 both ways. Its
  name is `mean_over_12`, or `mean_over_2`, if all the sets are there, whole; else `mean_of_k`.
  """
  means_of_tasks: Results = {}
  for task, wanted in (("zero_shot", ZERO_SHOT12), ("retrieval", RETRIEVAL)):
    records = {name: results[task][name] for name in wanted if name in results.get(task, {})}
    if not records:
      continue
    # The name tells at a glance whether it may stand beside the paper's: a mean over other sets does not compare.
    whole = len(records) == len(wanted) and all(is_whole(name, record) for name, record in records.items())
    name = f"mean_over_{len(wanted)}" if whole else f"mean_of_{len(records)}"
    figures: dict[str, list[float]] = {}
    for dataset, record in records.items():
      if task == "zero_shot":
        for suffix in ("", "_single_template"):
          figures.setdefault(f"mean{suffix}", []).append(record["metrics"][f"{SETS[dataset].metric}{suffix}"])
      else:
        ways = ("image_retrieval_recall@1", "text_retrieval_recall@1")
        figures.setdefault("mean_recall@1", []).extend(record["metrics"][way] for way in ways)
    first = next(iter(records.values()))
    means_of_tasks[task] = {
      name: make_record(
        dataset=name,
        model=first["model"],
        pretrained=first["pretrained"],
        task=first["task"],
        metrics={metric: float(np.mean(values)) for metric, values in figures.items()},
        protocol={"sets": {key: record["protocol"]["num_images"] for key, record in records.items()}, "whole": whole},
        provenance={**result_files.together(records.values()), "run": first.get("provenance", {}).get("run")},
      )
    }
  return means_of_tasks
