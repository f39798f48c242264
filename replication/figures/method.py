"""Draw the figure of the method: four uses of one UNet, one strip each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from replication.figures.style import IMAGE, INK, OFF, SOFT, TEXT, WIDTH, Figure

UNITS, STRIP, GAP = 720, 262, 26  # width of the figure, height of a strip, distance between two strips


@dataclasses.dataclass(frozen=True)
class Strip:
  """One use of the UNet.

  Attributes:
    title: name of the use.
    image: what enters the image stream.
    caption: what cross-attention reads.
    query: what enters the text stream; None for Stable Diffusion's UNet, which has none.
    out: what comes out.
    loop: what is fed back, in words; empty for nothing.
  """

  title: str
  image: str
  caption: str
  query: str | None
  out: str
  loop: str = ""


STRIPS = (
  Strip(
    "Training: generation pass",
    "z + noise $ε_z$\n= zₜ at step $t_z$",
    "caption c",
    None,
    "$\\hat{ε}_z$\nloss $L_{IG}$",
  ),
  Strip(
    "Training: discrimination pass",
    "clean z\nat step 1000",
    "empty caption",
    "γe + noise εₑ\n= eₜ at step tₑ",
    "ê₀\nloss $L_{ITA}$",
  ),
  Strip("Generation", "pure noise $z_T$", "prompt c", None, "z₀\n→ image", "DDIM steps"),
  Strip("Classification", "clean z of\nthe image", "empty caption", "pure noise $e_T$", "ê₀ · e\nper name"),
)


def draw(axes: Any, strip: Strip, top: float) -> None:
  """Draw a strip, with its upper edge at `top`."""
  # Heights of the image stream and the text stream.
  discriminates, middle, below = strip.query is not None, top + 118, top + 212

  def text(x: float, y: float, words: str, colour: str = SOFT, **how: Any) -> None:
    axes.text(x, y, words, color=colour, **{"ha": "center", "va": "center", **how})

  def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = SOFT, bend: float = 0) -> None:
    how = dict(arrowstyle="-|>", color=colour, lw=2, shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}")
    axes.annotate("", end, start, arrowprops=how)

  def block(points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> None:
    fill = "none" if dashed else f"{colour}26"
    axes.fill(*zip(*points, strict=True), facecolor=fill, edgecolor=colour, lw=1.6, ls="--" if dashed else "-")

  text(4, top + 20, strip.title, INK, fontsize=19, ha="left")
  text(300, top + 50, strip.caption)
  arrow((300, top + 62), (300, middle - 38))
  # Draw the UNet: down path, middle, and up path, which discrimination does not run.
  block([(216, middle - 52), (356, middle - 24), (356, middle + 24), (216, middle + 52)], IMAGE)
  block([(362, middle - 24), (418, middle - 24), (418, middle + 24), (362, middle + 24)], IMAGE)
  up = [(424, middle - 24), (564, middle - 52), (564, middle + 52), (424, middle + 24)]
  block(up, OFF if discriminates else IMAGE, dashed=discriminates)
  text(282, middle, "down", IMAGE)
  text(390, middle, "mid", IMAGE)
  text(498, middle, "not run" if discriminates else "up", SOFT if discriminates else IMAGE)
  text(96, middle, strip.image, IMAGE)
  arrow((188, middle), (212, middle), IMAGE)
  if strip.query is None:
    arrow((568, middle), (598, middle), IMAGE)
    text(656, middle, strip.out, IMAGE)
    if strip.loop:
      arrow((650, middle + 40), (104, middle + 28), bend=-0.26)
      text(376, middle + 70, strip.loop)
    return
  text(96, below, strip.query, TEXT)
  arrow((188, below), (426, below), TEXT)
  # Deep fusion: at each attention block of down path and middle the text token attends with the image tokens.
  for x, height in ((246, 46), (292, 36), (338, 28), (390, 24)):
    axes.plot(x, below, "o", color=TEXT)
    arrow((x, below - 6), (x, middle + height + 4), TEXT)
  text(306, below + 28, "deep fusion", TEXT)
  # The alignment transformer reads the text token and the middle feature map.
  axes.add_patch(
    FancyBboxPatch((434, below - 30), 128, 60, "round,pad=4", facecolor=f"{TEXT}26", edgecolor=TEXT, lw=1.6)
  )
  text(498, below, "alignment\ntransformer", TEXT)
  arrow((406, middle + 26), (470, below - 36), IMAGE, bend=-0.3)
  arrow((568, below), (598, below), TEXT)
  text(656, below, strip.out, TEXT)


def method() -> Figure:
  """Draw the four strips."""
  heights = [STRIP if strip.query else STRIP - 42 if strip.loop else STRIP - 84 for strip in STRIPS]
  total = sum(heights) + GAP * (len(STRIPS) - 1) + 8
  figure = plt.figure(figsize=(WIDTH, WIDTH * total / UNITS), layout="none")
  axes: Any = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(0, UNITS), ylim=(total, 0))
  axes.axis("off")
  axes.text(582, 24, "image stream", color=IMAGE, ha="right", va="center")
  axes.text(716, 24, "text stream", color=TEXT, ha="right", va="center")
  top = 8.0
  for strip, height in zip(STRIPS, heights, strict=True):
    if strip is not STRIPS[0]:
      axes.axhline(top - GAP / 2, color=OFF, lw=1)
    draw(axes, strip, top)
    top += height + GAP
  title = (
    "DiffDis: one UNet. It generates images by removing noise from an image latent z, and classifies images by removing"
    " noise from a text query e under the condition of the clean image."
  )
  return Figure(figure, title)
