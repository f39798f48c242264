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
from diffdis_jax.data import records
from diffdis_jax.data.layouts import class_lists, find
from diffdis_jax.data.layouts.labelled import Captioned, Labelled
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts, registry
from diffdis_jax.evals.base import Eval
from diffdis_jax.evals.fid import Fid
from diffdis_jax.evals.results import Results
from diffdis_jax.evals.retrieval import Retrieval
from diffdis_jax.evals.sections import Section
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.run import provenance

SINGLE_TEMPLATE = "a photo of a {}."
DECODED = 10  # images of a set, a random sample, that have to be readable before it is measured


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
  """A data set of a suite.

  Attributes:
    title: of its column.
    task: that is measured on it.
    counts: split -> how many images it has, where copies differ, the numbers of each.
    metric: of zero-shot classification, the figure that counts.
  """

  title: str
  task: str
  counts: Mapping[str, Sequence[int]]
  metric: str = "acc1"

  @property
  def sizes(self) -> list[int]:
    """Return the numbers of images of all its splits."""
    return [count for several in self.counts.values() for count in several]


def _labelled(title: str, metric: str = "acc1", **counts: int | tuple[int, ...]) -> BenchmarkSet:
  by_split = {split: (count,) if isinstance(count, int) else count for split, count in counts.items()}
  return BenchmarkSet(title, "zero_shot", by_split, metric)


PER_CLASS = "mean_per_class_recall"
# Where a set has no split of its own, `all` of it is measured, or, of a copy that has one, VTAB's or TFDS' `test`. Of
# Caltech-101 that is what TFDS leaves of 9,144 images when it has taken 30 random files of each class. A file `tmp` of
# the background is no image: where it was among the 30, 6,085 are left, as DataComp lists for its tars of VTAB's copy.
ZERO_SHOT12 = {
  "cifar10": _labelled("CIFAR-10", test=10_000),
  "cifar100": _labelled("CIFAR-100", test=10_000),
  "caltech101": _labelled("Caltech-101", PER_CLASS, test=(6_084, 6_085), all=9_144),
  "cars": _labelled("Cars", test=8_041),
  "flowers": _labelled("Flowers", PER_CLASS, test=6_149),
  "food101": _labelled("Food-101", test=25_250),
  "sun397": _labelled("SUN397", test=(21_750, 19_850), all=(108_754, 108_753)),
  "dtd": _labelled("DTD", test=1_880),
  "fgvc_aircraft": _labelled("Aircraft", PER_CLASS, test=3_333),
  "pets": _labelled("Pets", PER_CLASS, test=3_669),
  "eurosat": _labelled("EuroSAT", test=5_400, all=27_000),
  "imagenet1k": _labelled("ImageNet", val=50_000),
}
RETRIEVAL = {
  "mscoco_captions": BenchmarkSet("MSCOCO", "retrieval", {"test": (5_000,)}),
  "flickr30k": BenchmarkSet("Flickr30k", "retrieval", {"test": (1_000,)}),
}
NOT_KARPATHYS = ("val", "validation")  # of a prepared set of RETRIEVAL: val2017 has 5,000 images, as his test split has
FID = {"mscoco_val2014": BenchmarkSet("MSCOCO val2014", "fid", {"val2014": (40_504,)})}
SETS = ZERO_SHOT12 | RETRIEVAL | FID
SUITES = {"zero_shot12": ZERO_SHOT12, "retrieval": RETRIEVAL, "fid": FID, "paper": SETS}


def check_name(suite: str) -> None:
  """Check the name of a suite. Raises UserError: there is no such suite."""
  if suite not in SUITES:
    raise UserError(f"unknown suite {suite!r}; {did_you_mean(suite, SUITES)}")


def sections(suite: str, root: str, *, objectives: Collection[str], image_size: int) -> list[Section]:
  """Return the sections of those of a suite's sets that lie under `root`; warn of the others.

  Args:
    suite: one of `SUITES`.
    root: folder of the data sets.
    objectives: that the run was trained for. Of the suite `paper`, what it was not trained for is left out.
    image_size: of the run.

  Raises:
    UserError: no such suite or folder, or none of the sets in it.
  """
  check_name(suite)
  folder = buckets.local(root, "--data_root")
  if not folder.is_dir():
    raise UserError(f"no folder --data_root={root}; it should hold the data sets, each in a folder of its name")
  # A suite that was named is measured or refused. `paper` is all of them, of which a run may be trained for some.
  able = {task for task, any_of in registry.MEASURES.items() if suite != "paper" or {*any_of} & {*objectives}}
  for task in sorted({each.task for each in SUITES[suite].values()} - able):
    logging.warning("%s is left out: the run's objectives are %s", task, ", ".join(objectives))
  wanted = {name: each for name, each in SUITES[suite].items() if each.task in able}
  # Sets are large and few users have all twelve: those that lie there are measured.
  there = [name for name in wanted if find.is_there(folder, name)]
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
    settings |= {"single_template": SINGLE_TEMPLATE, "metric": SETS[name].metric}
  return Section(name, SETS[name].task, settings)


def check(name: str, evaluation: Eval, *, incomplete: bool) -> None:
  """Check that the data of an evaluation are the set that they are said to be.

  Args:
    name: of the set.
    evaluation: made of its section.
    incomplete: let pass another number of images, and classes without any.

  Raises:
    UserError: another number of images than the published one, another split, a class without images, an image that is
      none, or a template that came with the data and has no place for the class name.
  """
  source = evaluation.source if isinstance(evaluation, ZeroShot | Retrieval | Fid) else None
  if not isinstance(source, Labelled | Captioned):
    return
  if name in RETRIEVAL and source.origin.split in NOT_KARPATHYS and not incomplete:
    raise UserError(
      f"{name} in {source.origin.path} has no split test, and its split {source.origin.split} is of other images;"
      " prepare it by Karpathy's splits (dataset_*.json), or give --incomplete to measure what is there"
    )
  # torchvision's folders say which split they are; a copy of another kind may be any of the published ones.
  published = SETS[name]
  expected = published.counts.get(source.origin.split, ()) if source.origin.layout == "torchvision" else ()
  expected = expected or published.sizes
  if len(source) not in expected and not incomplete:
    said = " or ".join(f"{count:,}" for count in expected)
    raise UserError(
      f"{name} in {source.origin.path} has {len(source):,} images, and should have {said}; download it again, or give"
      " --incomplete to measure what is there"
    )
  if isinstance(source, Labelled):
    _check_classes(name, source, incomplete)
  # A download that broke off leaves files without content. Ten of them show it, before hours of others.
  for index in np.random.default_rng(0).permutation(len(source))[:DECODED]:
    _check_image(name, source, int(index))


def _check_classes(name: str, source: Labelled, incomplete: bool) -> None:
  absent = np.setdiff1d(np.arange(len(source.classnames)), source.labels)
  if absent.size and not incomplete:
    raise UserError(
      f"{name} in {source.origin.path} has no image of {absent.size} of {len(source.classnames)} classes, such as"
      f" {source.classnames[absent[0]]!r}; download it again, or give --incomplete to measure what is there"
    )
  ours = class_lists.load()[name].templates
  # Prompts decide a point or two, so that all layouts of a set are measured with one list.
  theirs = source.origin.templates and prompts.resolve_templates(source.origin.templates)
  if theirs and [prompts.fill(template, "{}") for template in theirs] != [*ours]:
    logging.warning("%s: %d templates came with the data, and OpenAI's %d are used", name, len(theirs), len(ours))


def _check_image(name: str, source: Labelled | Captioned, index: int) -> None:
  try:
    records.read_image(source[index]["image"])
  except records.Unusable as error:
    raise UserError(
      f"{name} in {source.origin.path}: image {index} cannot be used: {error}; download it again"
    ) from error


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
  made: Results = {}
  for task, wanted in (("zero_shot", ZERO_SHOT12), ("retrieval", RETRIEVAL)):
    found = {name: results[task][name] for name in wanted if name in results.get(task, {})}
    if not found:
      continue
    # The name tells at a glance whether it may stand beside the paper's: a mean over other sets does not compare.
    whole = len(found) == len(wanted) and all(is_whole(name, record) for name, record in found.items())
    name = f"mean_over_{len(wanted)}" if whole else f"mean_of_{len(found)}"
    first = next(iter(found.values()))
    made[task] = {
      name: base.make_record(
        dataset=name,
        model=first["model"],
        pretrained=first["pretrained"],
        task=first["task"],
        metrics=_zero_shot_means(found) if task == "zero_shot" else _retrieval_means(found),
        protocol={"sets": {each: record["protocol"]["num_images"] for each, record in found.items()}, "whole": whole},
        provenance={**provenance.together(found.values()), "run": first.get("provenance", {}).get("run")},
      )
    }
  return made


def figure(name: str, record: Mapping[str, Any], *, single: bool = False) -> float:
  """Return a set's own metric of zero-shot classification, of all its templates or of the single one."""
  return record["metrics"][f"{SETS[name].metric}{'_single_template' if single else ''}"]


def _zero_shot_means(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:

  def mean(*, single: bool) -> float:
    return float(np.mean([figure(name, record, single=single) for name, record in found.items()]))

  return {"mean": mean(single=False), "mean_single_template": mean(single=True)}


def _retrieval_means(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  ways = ("image_retrieval_recall@1", "text_retrieval_recall@1")
  return {"mean_recall@1": float(np.mean([record["metrics"][way] for record in found.values() for way in ways]))}
