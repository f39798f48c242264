"""Set the style of all figures: colours for light and dark pages, and letters that can be read on a phone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
from matplotlib import pyplot as plt

WIDTH = 8.0  # inches of 72 units; on a phone of 390 px a letter of 16 units is 11 px high
# These tones have a contrast of about four to one on white and on black. The image stream's colour also stands for
# generation, and the text stream's for classification.
INK, SOFT, OFF = "#757d87", "#7d8590", "#8b949e73"
IMAGE, TEXT = "#c26a12", "#3a82d2"

FONTS = ("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif")

matplotlib.use("svg")
matplotlib.rcParams.update(
  {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "diffdis",
    "font.sans-serif": ["DejaVu Sans"],  # the widest of the common fonts, for measuring text
    "mathtext.default": "regular",
    "font.size": 16,
    "axes.titlesize": 16,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.color": OFF,
    "ytick.color": OFF,
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.edgecolor": OFF,
    "grid.color": OFF,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
  }
)


class Figure(NamedTuple):
  """A figure, and its description in words."""

  figure: Any
  title: str

  def svg(self) -> str:
    """Return the figure as SVG, without invisible parts, which are two thirds of its bytes."""
    file = io.StringIO()
    self.figure.savefig(file, format="svg", metadata={"Date": None, "Title": self.title})
    plt.close(self.figure)
    svg = file.getvalue().replace("<svg ", f'<svg role="img" font-family="{", ".join(FONTS)}" ', 1)
    for useless in _USELESS:
      svg = re.sub(useless, "", svg, flags=re.DOTALL)
    svg = re.sub(r"\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}" if match[0][0] != "0" else match[0][:4], svg)
    for _ in range(3):  # each pass opens groups that have one element
      svg = re.sub(r"<g>\s*(<(?:path|use)[^<]*/>|<text[^<]*</text>)\s*</g>", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip() + "\n"


_USELESS = (
  r"<\?xml.*?<!DOCTYPE.*?>",
  r"<metadata>.*?</metadata>",
  r"<!--.*?-->",
  r"<clipPath.*?</clipPath>",
  r' clip-path="[^"]*"',
  r"font-family: [^;\"]*;? ?",
  r' transform="rotate\(-?0 [^"]*"',
  r'(?<=<g) id="[^"]*"',
  r"; stroke-linejoin: miter",
  r"text-anchor: start; ",
  r'<g>\s*<path [^>]*style="fill: none"/>\s*</g>',
)


def ends(difference: Mapping[str, Any] | None) -> list[float]:
  """Return the ends of a difference's interval, or its mean twice if one seed gives no interval."""
  if difference is None:
    return []
  return [difference["mean"] if difference[key] is None else difference[key] for key in ("low", "high")]


def reach(value: float) -> float:
  """Return the least number of 1, 2, 3, 4, 5, 6, 8 times powers of ten that is not below `value`; for 0, return 1."""
  power = 10.0 ** math.floor(math.log10(value)) if value else 1.0
  return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)
