"""Draw every figure of the book into docs/figures: python -m replication.figures, or make figures."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from replication.figures import method, plots, replication
from replication.figures.style import PALETTE
from replication.measured import replication as records

FOLDER = pathlib.Path(__file__).parents[2] / "docs/figures"
FIGURES = {"method": method.picture, **plots.PLOTS, **replication.figures(records.stored())}


def drawn() -> Iterator[tuple[str, str]]:
  """Yield name and text of each file."""
  for name, draw in FIGURES.items():
    yield f"{name}.svg", draw(PALETTE)


def main() -> None:
  for name, svg in drawn():
    (FOLDER / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
  main()
