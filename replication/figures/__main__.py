"""Draw every figure of the book into docs/figures: python -m replication.figures, or make figures."""

from __future__ import annotations

import pathlib

from replication.figures import forest, method, plots

FOLDER = pathlib.Path(__file__).parents[2] / "docs/figures"
FIGURES = {
  draw.__name__: draw
  for draw in (
    method.method,
    plots.demo_training,
    plots.demo_seeds,
    plots.demo_by_class,
    plots.best_of_n,
    plots.denoising,
    plots.emoji_generation_first,
    plots.long_tail,
    plots.chips,
    plots.mesh,
    plots.scaling,
    plots.replication_minutes,
    forest.ablations_forest,
    forest.emoji_forest,
    forest.emoji_changes_forest,
    forest.replication_forest,
  )
}


def main() -> None:
  for name, draw in FIGURES.items():
    (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
  main()
