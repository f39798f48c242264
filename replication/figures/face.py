"""Draw README's picture: images that the included model `shapes` generates, and how it classifies one.

  python -m replication.figures.face

Nothing is chosen: the prompts are the eight unseen pairs of colour and shape, the noise has seed 0, and the classified
image is the first of the split `unseen`.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import diffdis_jax
from diffdis_jax.data import shapes
from replication.figures import style

OUT = pathlib.Path(__file__).parents[2] / "docs/figures/shapes.png"
BARS = 3


def main(workdir: str = "shapes") -> None:
  model = diffdis_jax.load(workdir)
  names = [f"{colour} {shape}" for colour, shape in shapes.UNSEEN]
  generated = model.generate([f"a {name}" for name in names], seed=0)
  source = shapes.Shapes(split="unseen", image_size=32, seed=1)
  classified = source[0]["image"]
  (scores,) = model.classify(classified, shapes.CLASSNAMES).scores

  # With four columns the letters can be read on a phone.
  figure = plt.figure(figsize=(style.WIDTH, 6.6), layout="none")
  place = lambda column, row, width=0.235: (
    0.0075 + 0.25 * column,
    0.675 - 0.335 * row,
    width,
    0.235 * style.WIDTH / 6.6,
  )
  for i, (name, image) in enumerate(zip(names, generated, strict=True)):
    _show(figure.add_axes(place(i % 4, i // 4)), image, f"a {name}")
  _show(figure.add_axes(place(0, 2)), classified, "what is it?")
  _bars(figure.add_axes(place(2, 2, 0.48)), scores)
  # This figure needs its own backend, since that of style.py writes SVG.
  figure.savefig(OUT, dpi=100, transparent=True, backend="agg")


def _show(axes: Axes, image: Any, title: str) -> None:
  axes.imshow(image, interpolation="bicubic")
  axes.set_title(title, fontsize=15, loc="center", pad=4)
  axes.axis("off")


def _bars(axes: Axes, scores: Any) -> None:
  best = (-scores).argsort()[:BARS]
  axes.barh(range(BARS), scores[best], color=style.TEXT, height=0.6)
  axes.set_yticks(range(BARS), [shapes.CLASSNAMES[i] for i in best], fontsize=15)
  for row, i in enumerate(best):
    axes.text(scores[i] + 0.03, row, f"{100 * scores[i]:.0f} %", va="center", fontsize=15)
  axes.set(xlim=(0, 1.3), ylim=(BARS - 0.4, -0.9), xticks=[])
  axes.tick_params(left=False)
  axes.spines[:].set_visible(False)


if __name__ == "__main__":
  main(*sys.argv[1:])
