"""Write the numbers of README, results.md and the log, from the records in this folder.

  python -m replication.measured.tables

writes them into the pages. A table is between `<!-- NAME -->` and `<!-- end of NAME -->`, a number in the text is
between `<!--=TOPIC/RECORD-->` and `<!--=-->`. tests/replication/test_measured.py fails if a page and the records
differ.
"""

from __future__ import annotations

import pathlib
import re
import statistics
from collections.abc import Callable, Sequence

from absl import app

from diffdis_jax.ablate import significance
from diffdis_jax.errors import UserError
from replication.measured import paired, records, replication

ROOT = pathlib.Path(__file__).parents[2]
README, RESULTS, WEIGHTS = "README.md", "docs/results.md", "docs/weights.md"
SCALING, EMOJI = "replication/scaling.md", "replication/emoji.md"
REPLICATION = replication.PAGE
NORMAL = statistics.NormalDist().inv_cdf(1 - significance.ALPHA / 2)  # half of a 95 % interval, in standard errors

# These texts have digits that are not measured numbers. All other numbers must come from a record.
NAMES = re.compile(
  r"""<!--.*?-->|\]\([^)]*\)|`[^`]*`|\btop-[15]\b|\bR@1\b|\b95\x20%(?=\s(interval|CI))|\bCC3M\b|\bViT-[BL]/\d\d\b
  |\b[Tt]ables?\s\d(,\s\d)*((\sto|\sand)\s\d)*|\bStable\sDiffusion\sv1\b|\bTPU\sv4\b|\bê_0\b|\bFlickr30k\b""",
  re.X | re.S,
)
_KEY = re.compile(r"\{([^{}]+)\}")
_NUMBER = re.compile(r"\d[\d,.]*")
_INLINE = re.compile(r"<!--=(.*?)-->(.*?)<!--=-->", re.S)


def number(key: str) -> str:
  """Return a record's value, by `TOPIC/RECORD`, or by `TOPIC/RECORD#SEED` if there are several.

  Raises:
    UserError: no such record or value.
  """
  topic, _, name = key.partition("/")
  name, _, seed = name.partition("#")
  return f"{records.value(topic, name, seed):,}"


def say(text: str) -> str:
  """Replace each `{TOPIC/RECORD}` of a text by its number. Raises UserError if the text has a number of its own."""
  if loose := loose_numbers(_KEY.sub("", text)):
    raise UserError(f"{text!r} has the numbers {', '.join(loose)}, which should be records in replication/measured")
  return _KEY.sub(lambda key: number(key[1]), text)


def loose_numbers(text: str) -> list[str]:
  """Return the numbers of a text that are not part of a name."""
  return _NUMBER.findall(NAMES.sub(" ", text))


def of_seeds(*names: str, unit: str = " %") -> tuple[str, str]:
  """Return mean and 95 % interval over seeds, and the number of seeds. A seed counts as the mean over these records of
  the demo, since its runs on several machines are not independent."""
  runs = [records.record("demo", name).values for name in names]
  values = [statistics.fmean(values) for values in zip(*(run.values() for run in runs), strict=True)]
  if len({tuple(run) for run in runs}) > 1:
    raise UserError(f"{', '.join(names)} should have the same seeds")
  return records.interval(statistics.fmean(values), _half(significance.paired(values)), unit=unit), f"{len(values)}"


def _half(difference: significance.Difference) -> float:
  if difference.low is None or difference.high is None:
    raise UserError("a figure without a spread has no interval")
  return (difference.high - difference.low) / 2


# ---- the short tables


def shown() -> str:
  """Return README's table of questions. Each answer begins with the verdict."""
  (top1, n), (generated, _) = of_seeds(*_both("unseen")), of_seeds(*_both("generated_unseen"))
  (joint, joint_n), (scenes, _), (lead, lead_n), (rare, _) = map(_points, (NO_HELP, TOGETHER, LEAD, RARE))
  rows = [
    (
      "Can one small network name and draw what it never saw?",
      f"**Yes**, shapes: {top1} of unseen pairs named, {generated} of drawings right",
      n,
    ),
    (
      "Does joint training help?",
      f"**Not shown**: top-1 on emoji {joint}; attributes of drawn scenes, hardly one of which is right, {scenes}",
      joint_n,
    ),
    (
      "Is it better than a CLIP?",
      f"**Undecided** on emoji, {lead}; on rare shapes {rare}, with more parameters",
      lead_n,
    ),
    (
      "Does it use the text query?",
      say(
        "**Not in `shapes`**, which names {included/query_lowest} % of unseen pairs,"
        " whatever is given as [e_t](docs/method.md#what-the-network-does-with-e_t)"
      ),
      "1",
    ),
    (
      "At which scale?",
      say(
        "{demo/image_size} pixels, CPUs. The paper's run is **neither confirmed nor refuted**; on TPU v4 it takes at"
        " most {estimates/v4-32#chip-hours of six epochs} chip-hours by [preflight](docs/preflight.md)"
      ),
      "",
    ),
  ]
  return records.table(("question", "answer, ± half a 95 % interval", "n"), rows)


TOGETHER = ("e1", "both", "generation")
NO_HELP = ("e8", "both", "discrimination")
LEAD = ("e4", "discrimination", "CLIP with parts")
RARE = ("e5", "DiffDis, no low classes", "CLIP, no low classes")


def _both(name: str) -> tuple[str, str]:
  return f"{name}/epyc", f"{name}/xeon"


def _points(comparison: tuple[str, str, str]) -> tuple[str, str]:
  """Return the difference of a primary comparison of the replication, with its experiment, and n."""
  change, _ = _verdict(*comparison)
  return f"{records.interval(change.mean, _half(change), sign='+')} points ({comparison[0].upper()})", str(change.n)


def _verdict(experiment: str, row: str, base: str) -> tuple[significance.Difference, str]:
  """Return the difference of a primary comparison of the replication, and the verdict in words."""
  claims = replication.stored()["claims"][experiment]
  (verdict,) = (claim["verdict"] for claim in claims if (claim["row"], claim["base"]) == (row, base))
  return significance.Difference(**verdict["difference"]), verdict["words"]


def demo() -> str:
  """Return the demo's accuracies of classification and generation."""
  rows = [
    (say("top-1, seen pairs"), *of_seeds(*_both("seen"))),
    (say("top-1, unseen pairs"), *of_seeds(*_both("unseen"))),
    (say("generated images, seen pairs"), *of_seeds(*_both("generated_seen"))),
    (say("generated images, unseen pairs"), *of_seeds(*_both("generated_unseen"))),
    (say("the worst of the unseen pairs, top-1"), *of_seeds(*_both("worst"))),
  ]
  return records.table(("accuracy", "mean ± 95 % interval", "n"), rows)


def claimed() -> str:
  """Return the table of the paper's claims."""
  return replication.paper(replication.stored())


def neighbours() -> str:
  """Compare the best run on emoji with a baseline without training. There is one run, so the interval is binomial."""
  run = records.results("emoji")["generation_5400_first_discrimination-seed_0"]["zero_shot"]
  best = {split: 100 * run[split]["metrics"]["acc1"] for split in ("val_vendor", "test_vendor")}
  baselines = {name: records.record("emoji", f"others/{name}").values for name in ("neighbours", "neighbours_cut")}
  rows = [
    ("DiffDis, the best run", *(_binomial(best[split], split) for split in best)),
    ("nearest neighbours", *(_binomial(baselines["neighbours"][split], split) for split in best)),
    ("the same, icons cut to their content", "", _binomial(baselines["neighbours_cut"]["test_vendor"], "test_vendor")),
  ]
  return records.table(("top-1, one run", "`val_vendor`", "`test_vendor`, by which settings were chosen"), rows)


def _binomial(percent: float, split: str) -> str:
  share, n = percent / 100, records.value("emoji", split)
  return records.interval(percent, 100 * NORMAL * (share * (1 - share) / n) ** 0.5, unit=" %")


def icons() -> str:
  """Return the accuracy of generated icons."""
  (result,) = records.results("emoji")["guidance_7.5_both_drawn-seed_0"]["generation_accuracy"].values()
  metrics = {name: f"{100 * value:.1f} %" for name, value in result["metrics"].items()}
  rows = [
    (say("generated icons"), metrics["acc1"], metrics["acc5"], f"{result['protocol']['num_images']:,}"),
    (
      say("real icons, held out"),
      metrics["judge_acc1"],
      metrics["judge_acc5"],
      f"{result['protocol']['judge']['measured_on']:,}",
    ),
  ]
  return records.table(("one run", "top-1", "top-5", "images"), rows)


COSTS = {
  "joint/generation/time": "a joint step / a generation step",
  "joint/both/time": "a joint step / a step of each objective",
  "table6/diffdis/discrimination": "DiffDis' classification / CLIP's, small networks",
  "diffusers/ratio": "our UNet / diffusers' UNet in PyTorch",
  "sampling/ratio": "our generation / diffusers' pipeline in PyTorch",
  "open_clip_pages/ratio": "our CLIP step / open_clip's in PyTorch",
  "open_clip_kept/ratio": "the same, freed memory kept",
}


def costs() -> str:
  """Return the table of time ratios."""
  rows = [(say(label), f"{number(f'peers/{key}')} ×") for key, label in COSTS.items()]
  return records.table(("one CPU run each", "time"), rows)


def weak_scaling() -> str:
  """Return the table of weak scaling: a joint step with a constant batch per chip."""
  rows = []
  for name, estimate in records.load("estimates").items():
    if name.startswith("weak scaling/"):
      values, of = estimate.values, estimate.of
      rate, share = f"{values['images/s']:,.0f}", f"{values['efficiency, %']:.0f} %"
      rows.append((of["topology"], f"{of['batch']:,}", f"{values['step, ms']:.0f}", rate, share, of["row"]))
  return records.table(("machine", "batch", "step, ms", "images/s", "efficiency", "row"), rows)


def paper() -> str:
  """Return the paper's own results of Table 1 and its ablations."""
  archive = records.load("paper")
  rows: list[tuple[str, ...]] = [
    (record.what, "", f"{record.value}", "") for name, record in archive.items() if re.match(r"table 1/.*ViT", name)
  ]
  for name, record in archive.items():
    if re.match(r"table [2-57]/", name):
      rows.append((record.what, *(f"{record.values[column]:.2f}" for column in ("FID", "ZS", "R@1"))))
  return records.table(("row", "FID ↓", "ImageNet top-1 ↑", "R@1 ↑"), rows)


def paper_costs() -> str:
  """Return the paper's own results of Tables 6 and 8."""
  archive = records.load("paper")
  rows = [
    (archive[f"table 6/{kind}"].what, *(f"{archive[f'table 6/{kind}'].values.get(name, '')}" for name in names))
    for kind, names in (
      ("training", ("CLIP-L/14", "Stable Diffusion", "DiffDis")),
      ("generation", ("", "Stable Diffusion", "DiffDis")),
      ("discrimination", ("CLIP", "", "DiffDis")),
    )
  ]
  clip, diffdis = (f"{archive[f'table 8/{name}'].values['acc']}" for name in ("CLIP-L/14", "DiffDis"))
  rows.append((say("Table 8, accuracy on Places-LT in %"), clip, "", diffdis))
  return records.table(("what", "CLIP", "Stable Diffusion", "DiffDis"), rows)


PLACES: dict[str, tuple[str, Callable[[], str]]] = {
  "shown": (README, shown),
  "accuracy of the demo": (RESULTS, demo),
  "the paper's claims": (RESULTS, claimed),
  "neighbours": (RESULTS, neighbours),
  "icons": (EMOJI, icons),
  "costs": (RESULTS, costs),
  "weak scaling": (SCALING, weak_scaling),
  "paper": (REPLICATION, paper),
  "paper costs": (REPLICATION, paper_costs),
  **{
    f"replication {make.__name__}": (REPLICATION, lambda make=make: make(replication.stored()))
    for make in (replication.claims, replication.pictures, replication.arms, replication.paper, replication.cost)
  },
  **{name: (each.page, lambda name=name: paired.whole(name)) for name, each in paired.TABLES.items()},
}
PAGES = [*dict.fromkeys(page for page, _ in PLACES.values()), WEIGHTS]  # it has numbers, but no table


def written(page: str, text: str) -> str:
  """Return a page's text with its tables and numbers updated.

  Raises:
    UserError: the page has no place for a table, or names a record that does not exist.
  """
  for name, (where, make) in PLACES.items():
    if where == page:
      begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
      place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
      if len(place.findall(text)) != 1:
        raise UserError(f"{page} should hold {begin} and {end} once, between which the table is written")
      new = f"{begin}\n\n{make()}\n\n{end}"
      text = place.sub(lambda _, new=new: new, text)
  return _INLINE.sub(lambda place: f"<!--={place[1]}-->{number(place[1])}<!--=-->", text)


def unrecorded(text: str) -> list[str]:
  """Return the numbers of a page that neither come from a record nor belong to a name."""
  outside = _INLINE.sub(" ", text)
  for name in PLACES:
    outside = re.sub(f"<!-- {re.escape(name)} -->.*?<!-- end of {re.escape(name)} -->", " ", outside, flags=re.S)
  return loose_numbers(outside)


def main(_: Sequence[str]) -> None:
  for page in PAGES:
    path = ROOT / page
    path.write_text(written(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
