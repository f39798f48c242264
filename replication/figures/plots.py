"""Draw the plots of the book, only from measured records (replication/measured). `make figures` calls them."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from diffdis_jax.data.shapes import COLOURS, OUTLINES, SHAPES, UNSEEN
from replication.figures.style import IMAGE, INK, OFF, SOFT, TEXT, WIDTH, Figure, reach
from replication.measured import paired, records, replication


def emoji_generation_first() -> Figure:
  """Plot top-1 over the steps of generation before discrimination: a dot for each seed, a line through the means."""
  runs = {
    5400: {
      0: "no_generation_discrimination_5400",
      1800: "held_temperature_discrimination",
      3600: "generation_3600_first_discrimination",
      5400: "generation_5400_first_discrimination",
    },
    1800: {
      0: "held_temperature_discrimination_1800_epyc",
      1800: "generation_first_discrimination_1800",
      3600: "generation_3600_first_discrimination_1800",
    },
  }
  table = paired.TABLES["generation first"]
  figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 5.4), sharey=True)
  for axes, split in zip(grid, ("val_vendor", "test_vendor"), strict=True):
    axes.set(title=split.replace("_", " "), ylim=(20, 70), xticks=(0, 1800, 3600, 5400))
    axes.grid(axis="y")
    for (steps, starts), colour in zip(runs.items(), (TEXT, SOFT), strict=True):
      seeds = {x: [*paired.figures_of(table, start)[f"{split}/acc1"].values()] for x, start in starts.items()}
      axes.plot([*seeds], [np.mean(values) for values in seeds.values()], color=colour, lw=2, label=f"{steps:,}")
      points = [(x, value) for x, values in seeds.items() for value in values]
      axes.plot(*zip(*points, strict=True), "o", color=colour)
  grid[0].set_ylabel("zero-shot top-1, %")
  figure.supxlabel("steps of generation alone, before", color=SOFT, fontsize=16)
  handles = grid[0].get_legend_handles_labels()
  figure.legend(*handles, loc="outside upper center", ncols=2, title="steps of discrimination, after")
  return Figure(
    figure,
    "Emoji: zero-shot accuracy rises with the steps of generation before discrimination, on val_vendor and test_vendor,"
    " after 1,800 and after 5,400 steps of discrimination. A dot is a seed.",
  )


def long_tail() -> Figure:
  """Plot accuracy by the number of a class's training images, for DiffDis and CLIP: mean and standard deviation."""
  groups = {"all": "all", "many": "many\n> 99", "median": "median\n21–99", "low": "low\n≤ 20"}
  figure, axes = plt.subplots(figsize=(WIDTH, 5))
  for shift, model, colour in ((-0.2, "DiffDis", TEXT), (0.2, "CLIP", SOFT)):
    group_records = [records.record("long_tail", f"{model.lower()}/acc/{group}") for group in groups]
    mean, sd = ([getattr(record, name) or 0.0 for record in group_records] for name in ("mean", "sd"))
    x = np.arange(4) + shift
    axes.bar(x, mean, 0.3, color=f"{colour}59", label=model)
    axes.errorbar(x, mean, sd, fmt="o", color=colour, lw=2)
  axes.set(ylim=(0, 100), ylabel="accuracy after stage 2, %", xticks=range(4), xlabel="classes by training images")
  axes.set_xticklabels([*groups.values()])
  axes.grid(axis="y")
  axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
  return Figure(
    figure,
    "Long-tailed shapes: accuracy after stage 2 on all classes and on those with many, some and few training images,"
    " DiffDis and CLIP, mean and standard deviation of three seeds. No difference is significant after correction.",
  )


# ---- estimates from compiled programs

SIGNS = {"at least": "≥ ", "at most": "≤ ", "about": "≈ "}
INVERSE = {"at least": "≤ ", "at most": "≥ ", "about": "≈ "}  # sign of a time, by the bound of the rate
NOTE = "Empty bars: upper bounds.\nCompilers' estimates; nothing was run on these chips."


class Estimate(NamedTuple):
  """The estimate of preflight for a layout: memory in GiB, step time in ms, and images a second on all chips."""

  chip: str
  chips: int
  fsdp: int
  batch: int
  memory: float
  available: float
  step: float
  rate: float
  bound: str


def estimates() -> list[Estimate]:
  """Return the estimates of the paper's joint step, from replication/measured/estimates.json."""
  rows = []
  for record in records.load("estimates").values():
    if record.what.startswith("joint step of the paper"):
      values, of = record.values, record.of
      chip, _, layout = of["topology"].partition(":")
      chips = math.prod(int(part) for part in layout.split("x"))
      fsdp = dict(part.split("=") for part in of.get("mesh", "fsdp=4").split(","))[
        "fsdp"
      ]  # preflight.md's command uses 4 chips
      rate, memory, available = values["images/s"], values["memory a chip, GiB"], values["of GiB"]
      # A time that was not recorded follows from the rate.
      times = [values[name] for name in ("optimal_seconds, ms", "cycles, ms") if name in values]
      step = times[0] if times else 1000 * of["batch"] / rate
      bound = next((bound for bound in SIGNS if of.get("bound", "").startswith(bound)), "about")
      chip, fsdp = chip if chip.startswith("v") else chip.upper(), chips if fsdp == "-1" else int(fsdp)
      rows.append(Estimate(chip, chips, fsdp, of["batch"], memory, available, step, rate, bound))
  return rows


def bars(axes: Any, y: Any, widths: Any, rows: list[Estimate]) -> None:
  """Draw bars with their rates: full for an estimate or a lower bound, empty for an upper bound."""
  full = ["none" if row.bound == "at most" else TEXT for row in rows]
  patches = axes.barh(y, widths, 0.42, color=full, edgecolor=TEXT, lw=1.5)
  axes.bar_label(patches, [f"{SIGNS[row.bound]}{row.rate:,.0f}" for row in rows], padding=6, color=SOFT)
  axes.set(xticks=(), yticks=(), ylim=(max(y) + 0.5, min(y) - 1))
  axes.spines[:].set_visible(False)


def chips() -> Figure:
  """Plot memory, images a second per chip, and step time, for the first layout of each number of chips."""
  chosen: dict[tuple[str, int], Estimate] = {}
  for row in estimates():
    chosen.setdefault((row.chip, row.chips), row)
  rows, y = [*chosen.values()], np.arange(len(chosen)) * 1.0
  figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.75 * len(rows) + 1.2))
  available = left.barh(y, [row.available for row in rows], 0.42, color=OFF)
  left.barh(y, [row.memory for row in rows], 0.42, color=IMAGE)
  left.bar_label(available, [f"{row.memory:g} of {row.available:g}" for row in rows], padding=6, color=SOFT)
  left.set(xticks=(), yticks=(), ylim=(max(y) + 0.5, min(y) - 1), xlim=(0, 1.6 * max(row.available for row in rows)))
  left.spines[:].set_visible(False)
  bars(right, y, [row.rate / row.chips for row in rows], [row._replace(rate=row.rate / row.chips) for row in rows])
  right.set_xlim(0, 1.35 * max(row.rate / row.chips for row in rows))
  for place, row in zip(y, rows, strict=True):
    left.text(0, place - 0.32, f"{row.chips} {row.chip}, batch {row.batch:,}", in_layout=False)
    words = f"step {INVERSE[row.bound]}{round(row.step, 1):g} ms"
    right.text(1, place - 0.32, words, color=SOFT, ha="right", transform=right.get_yaxis_transform())
  left.set_title("memory a chip, GiB", color=IMAGE)
  right.set_title("images/s a chip", color=TEXT)
  figure.supxlabel(NOTE, fontsize=16, x=0, ha="left")
  title = "Compilers' estimates of a joint training step at 256 px by chip: memory, images a second and step time."
  return Figure(figure, title)


def mesh() -> Figure:
  """Plot images a second and memory per chip, for chips with estimates of several layouts."""
  layouts = estimates()
  names = [name for name, count in Counter(row.chip for row in layouts).items() if count > 1]
  groups = {name: [row for row in layouts if row.chip == name] for name in names}
  figure, grid = plt.subplots(
    len(names), 1, figsize=(WIDTH, 8), height_ratios=[len(rows) for rows in groups.values()], squeeze=False
  )
  for axes, (name, rows) in zip(grid[:, 0], groups.items(), strict=True):
    y = np.arange(len(rows)) * 1.0
    bars(axes, y, [row.rate for row in rows], rows)
    axes.set(title=f"{name}: images/s of all chips", xlim=(0, 1.2 * max(row.rate for row in rows)))
    for place, row in zip(y, rows, strict=True):
      words = f"{row.chips} chips, data {row.chips // row.fsdp} × fsdp {row.fsdp}, batch {row.batch:,}"
      axes.text(0, place - 0.32, words)
      words = f"{row.memory:g} of {row.available:g} GiB"
      axes.text(1, place - 0.32, words, color=IMAGE, ha="right", transform=axes.get_yaxis_transform())
  figure.supxlabel(f"Each chip has its own scale. {NOTE}", fontsize=16, x=0, ha="left")
  return Figure(figure, f"Compilers' estimates of images a second and memory a chip by mesh: {', '.join(names)}.")


def scaling() -> Figure:
  """Plot the time of each part of a joint step over the number of chips at a constant batch per chip, a panel for each
  kind."""
  kinds: dict[str, list[records.Record]] = {}
  for name, row in records.load("estimates").items():
    if name.startswith("weak scaling/"):
      kinds.setdefault(row.of["topology"].partition(":")[0], []).append(row)
  figure, grid = plt.subplots(len(kinds), 1, figsize=(WIDTH, 3.6 * len(kinds) + 1), squeeze=False)
  for axes, (kind, rows) in zip(grid[:, 0], kinds.items(), strict=True):
    first, name = rows[0].of, kind if kind.startswith("v") else f"{kind.upper()}s"
    below = np.zeros(len(rows))
    took = {part: np.array([row.values[f"{part}, ms"] for row in rows]) for part in ("computing", "step", "hops")}
    parts = {"computing": took["computing"], "exchange": took["step"] - took["computing"] - took["hops"]}
    for (part, times), colour in zip({**parts, "latency": took["hops"]}.items(), (TEXT, IMAGE, SOFT), strict=True):
      shades = [f"{colour}{'73' if row.of['row'] == 'fitted' else 'e6'}" for row in rows]
      patches = axes.bar(range(len(rows)), times, 0.65, below, color=shades, label=part)
      below += times
    axes.bar_label(patches, [f"{row.values['efficiency, %']:.0f} %" for row in rows], padding=3)
    axes.set(title=f"{name}, {first['batch'] // first['chips']} images a chip", ylabel="ms", xticks=range(len(rows)))
    axes.set_xticklabels([row.of["chips"] for row in rows])
    axes.margins(y=0.12)
    axes.grid(axis="y")
  grid[-1, 0].set_xlabel("chips; pale: fitted\nabove: images/s of a chip against the fewest chips")
  figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
  return Figure(
    figure,
    f"Weak scaling of the joint step on {', '.join(kinds)} up to 256 chips by the compilers: computing, what moves"
    " over links and network, and latency, in milliseconds, where nothing overlaps. Nothing was run on these chips.",
  )


# ---- the demo


def demo_seeds() -> Figure:
  """Plot the accuracy of each seed on two kinds of CPU, a line for each metric, with the means."""
  rows = {
    "seen": "zero-shot, seen pairs",
    "unseen": "zero-shot, unseen pairs",
    "worst": "zero-shot, the worst unseen pair",
    "generated_seen": "generated images, seen pairs",
    "generated_unseen": "generated images, unseen pairs",
  }
  figure, axes = plt.subplots(figsize=(WIDTH, 6))
  for shift, (processor, words, colour) in enumerate((("epyc", "AMD EPYC", TEXT), ("xeon", "Intel Xeon", IMAGE))):
    for i, name in enumerate(rows):
      values, y = [*records.record("demo", f"{name}/{processor}").values.values()], i + 0.25 * shift
      axes.plot(sorted(values), [y] * len(values), "o-", color=colour, alpha=0.75, label=words if i == 0 else None)
      axes.plot(np.mean(values), y, "|", color=colour, ms=20, mew=3)
  for i, words in enumerate(rows.values()):
    axes.text(50, i - 0.25, words)
  axes.set(xlim=(49, 101), ylim=(4.6, -0.7), yticks=(), xlabel="accuracy, %; dots: seeds, strokes: means")
  axes.grid(axis="x")
  axes.spines["left"].set_visible(False)
  figure.legend(loc="outside upper left", ncols=2)
  return Figure(
    figure,
    "make demo: accuracy by seed on 64 classes of rendered shapes, zero-shot and of generated images, on pairs that"
    " training saw and on pairs that it never saw; four seeds on each of two processors.",
  )


def demo_training() -> Figure:
  """Plot the loss and its two parts over the steps of the demo, on a logarithmic axis."""
  figure, axes = plt.subplots(figsize=(WIDTH, 5.4))
  names = (("$L_{ITA}$", "loss_discrimination", TEXT), ("$L_{IG}$", "loss_generation", IMAGE), ("loss", "loss", INK))
  for words, name, colour in names:
    curve = records.record("demo_run", f"training/{name}").values
    axes.semilogy([int(step) for step in curve], [*curve.values()], color=colour, lw=2, label=words)
  axes.set_xlabel("step")
  axes.grid(axis="y")
  figure.legend(loc="outside upper left", ncols=3)
  title = "Training of make demo: the loss, and its parts L_IG (generation) and L_ITA (discrimination), over the steps."
  return Figure(figure, title)


def demo_by_class() -> Figure:
  """Plot zero-shot accuracy of each pair of colour and shape; a frame marks unseen pairs."""
  accuracy = records.record("demo_run", "accuracy by class").values
  figure, axes = plt.subplots(figsize=(WIDTH, 8.6))
  for (i, colour), (j, shape) in itertools.product(enumerate(COLOURS), enumerate(SHAPES)):
    value, unseen = accuracy[f"{colour} {shape}"], (colour, shape) in UNSEEN
    shade, edge = round(255 * (0.05 + 0.35 * max(0.0, (value - 50) / 50))), IMAGE if unseen else "none"
    axes.add_patch(Rectangle((j + 0.04, i + 0.04), 0.92, 0.92, fc=f"{TEXT}{shade:02x}", ec=edge, lw=4))
    axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center")
  for j, shape in enumerate(SHAPES):
    for part in OUTLINES[shape]:
      axes.fill(*(np.array(part).T * 0.27 + [[j + 0.5], [-0.45]]), fc="none", ec=SOFT, lw=1.5)
  axes.set(xlim=(0, 8), ylim=(8, -0.9), aspect="equal", xticks=(), yticks=np.arange(8) + 0.5)
  axes.set_yticklabels([*COLOURS])
  axes.set_xlabel("top-1 of 64 classes, %; framed: never seen in training")
  axes.spines[:].set_visible(False)
  return Figure(
    figure,
    "make demo: zero-shot accuracy of each of the 64 pairs of colour and shape, of one run; the eight pairs that"
    " training never saw are framed.",
  )


def best_of_n() -> Figure:
  """Plot the accuracy of the best of n generated images, the one whose text query is nearest to the prompt's."""
  figure, axes = plt.subplots(figsize=(WIDTH, 5))
  for name, colour in (("seen", IMAGE), ("unseen", TEXT)):
    curve = records.record("demo_run", f"best of n/{name}").values
    axes.semilogx([int(n) for n in curve], [*curve.values()], "o-", color=colour, lw=2, label=f"{name} pairs")
  axes.set(xlabel="images generated for a prompt", ylabel="accuracy of the kept image, %")
  axes.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
  axes.set_xticks([], minor=True)
  axes.set_ylim(top=100)
  axes.grid(axis="y")
  figure.legend(loc="outside upper left", ncols=2)
  return Figure(
    figure,
    "make demo: accuracy of generated images where the model itself keeps the best of n, by the similarity of the"
    " image's denoised query and the prompt's text query.",
  )


def denoising() -> Figure:
  """Plot generation over denoising steps: the decoded latent, and the network's prediction from it."""
  of = records.record("demo_run", "denoising").of
  prompts, steps, pixels = of["prompts"], of["t"], of["image_size"]
  # Steps of 8 in colours take half the bytes and look the same.
  picture = np.asarray(Image.open(records.HERE / "denoising.png").convert("RGB")) // 8 * 8 + 4
  figure, grid = plt.subplots(len(prompts), 1, figsize=(WIDTH, 8.8))
  for i, (axes, prompt) in enumerate(zip(grid, prompts, strict=True)):
    axes.imshow(picture[2 * pixels * i : 2 * pixels * (i + 1)], interpolation="none")
    axes.set_title(prompt)
    axes.set_yticks([pixels / 2, 3 * pixels / 2], labels=["zₜ", "ẑ₀"])
    axes.set_xticks(
      pixels * (np.arange(len(steps)) + 0.5), labels=steps if i == len(prompts) - 1 else [""] * len(steps)
    )
    axes.spines[:].set_visible(False)
  grid[-1].set_xlabel("t")
  return Figure(
    figure,
    "Generation by the demo's model over denoising steps, from noise to the image: the latent z_t, decoded, and the"
    f" image that the network predicts from the step before, for {', '.join(prompts)}.",
  )


# ---- the replication


def replication_minutes(archive: Mapping[str, Any] | None = None) -> Figure:
  """Plot the compared metrics over minutes of training: a dot for each seed, a number for each arm."""
  timed = (
    "e1",
    "e2",
    "e4",
    "e8",
  )  # these experiments have arms of equal minutes; in all others, all arms take the same time
  arms = [
    arm for arm in replication.measured(archive or replication.stored()) if arm.minutes and arm.experiment in timed
  ]
  key = lambda arm: (arm.experiment, arm.column)
  groups = [(name, [*group]) for (name, _), group in itertools.groupby(sorted(arms, key=key), key)]
  heights = [4.0 + 0.3 * len(group) for _, group in groups]
  figure, grid = plt.subplots(len(groups), 1, figsize=(WIDTH, sum(heights)), height_ratios=heights, squeeze=False)
  for axes, (name, group) in zip(grid[:, 0], groups, strict=True):
    # The metric already says part of the split's name: test_unseen_generated has generated images of unseen pairs.
    words = re.sub(r"\b(test|val)_(\w+?)(_generated)?\b(?=[, ])", r"\2", group[0].title.strip("↑↓ "))
    seeds = [(arm.minutes, value) for arm in group for value in arm.values]
    means = [(arm.minutes or 0.0, float(np.mean(arm.values))) for arm in group]
    axes.plot(*zip(*seeds, strict=True), "o", color=SOFT, ms=5)
    axes.plot(*zip(*means, strict=True), "_", color=TEXT, ms=20, mew=3)
    for number, mean in enumerate(means, 1):
      axes.annotate(f"{number}", mean, (12, 0), textcoords="offset points", color=TEXT, va="center")
    listed = "\n".join(f"{number}  {arm.name}" for number, arm in enumerate(group, 1))
    axes.set(title=f"{name.upper()}: {words}, %", xlim=(0, reach(max(arm.minutes or 0 for arm in group))))
    axes.set_xlabel(f"minutes of one core\n{listed}", loc="left")
    axes.grid(axis="y")
  title = "Replication: the figures that are compared over minutes of training, by experiment and arm; a dot is a seed."
  return Figure(figure, title)
