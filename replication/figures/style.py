"""Share what all figures need: colours for light and dark pages, letters for phones, and an SVG written by hand.

No plotting library draws them: the same records give the same bytes on every machine and with every version. A figure
is WIDTH units wide. On a phone of 390 px a unit is half a pixel, so no letter is below SMALL; on a wide page the figure
is SHOWN pixels wide, and its letters are as large as the page's.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDTH, SHOWN = 720, 580
SMALL, NORMAL, LARGE = 21, 22, 25  # of letters
FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"


@dataclasses.dataclass(frozen=True)
class Palette:
  """Colours: ground, text, soft text, the image stream, the text stream, and what is not run.

  The image stream's colour is also that of generation, the text stream's that of classification.
  """

  ground: str
  ink: str
  soft: str
  image: str
  image_fill: str
  text: str
  text_fill: str
  off: str


# Without a ground, in tones that have a contrast of about four to one on white and on black.
PALETTE = Palette("none", "#757d87", "#7d8590", "#c26a12", "#c26a1226", "#3a82d2", "#3a82d226", "#8b949e73")


def number(value: float) -> str:
  """Return a coordinate, to a tenth: 12, 12.5."""
  return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


class Canvas:
  """Elements of an SVG, one after another."""

  def __init__(self, palette: Palette, width: int = WIDTH):
    self.palette, self.width = palette, width
    self.parts: list[str] = []

  def label(self, x: float, y: float, words: str, *, colour: str = "") -> None:
    """Write small words from x on."""
    self.text(x, y, words, size=SMALL, colour=colour, anchor="start")

  def text(
    self, x: float, y: float, words: str, *, size: int = NORMAL, colour: str = "", anchor: str = "middle"
  ) -> None:
    """Write words in which `_x` is a subscript: z_t."""
    colour = colour or self.palette.ink
    inner = "".join(
      f'<tspan dy="6" font-size="{size - 6}">{escape(part[1:])}</tspan><tspan dy="-6">&#8203;</tspan>'
      if part.startswith("_")
      else escape(part)
      for part in _split(words)
    )
    self.parts.append(
      f'<text x="{number(x)}" y="{number(y)}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{inner}</text>'
    )

  def box(
    self,
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    stroke: str,
    fill: str,
    dashed: bool = False,
    round: int = 9,
    width: int = 2,
  ) -> None:
    dash = ' stroke-dasharray="6 6"' if dashed else ""
    at = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
    self.parts.append(f'<rect {at} rx="{round}" fill="{fill}" stroke="{stroke}" stroke-width="{width}"{dash}/>')

  def fill(self, x: float, y: float, w: float, h: float, colour: str, *, opacity: float = 1) -> None:
    """Draw a box without an edge."""
    at = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
    self.parts.append(f'<rect {at} fill="{colour}"{_opacity(opacity)}/>')

  def polygon(self, points: Sequence[tuple[float, float]], *, stroke: str, fill: str, dashed: bool = False) -> None:
    dash = ' stroke-dasharray="6 6"' if dashed else ""
    listed = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    self.parts.append(
      f'<polygon points="{listed}" fill="{fill}" stroke="{stroke}" stroke-width="2" stroke-linejoin="round"{dash}/>'
    )

  def arrow(self, path: str, colour: str) -> None:
    """Draw a line along an SVG path, with a head at its end."""
    head = "image" if colour == self.palette.image else "text" if colour == self.palette.text else "ink"
    self.parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="3" marker-end="url(#{head})"/>')

  def line(self, points: Iterable[tuple[float, float]], colour: str, *, width: float = 3, dashed: bool = False) -> None:
    """Draw a straight line through points."""
    dash = ' stroke-dasharray="7 6"' if dashed else ""
    listed = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    self.parts.append(
      f'<polyline points="{listed}" fill="none" stroke="{colour}" stroke-width="{number(width)}"'
      f' stroke-linejoin="round"{dash}/>'
    )

  def dot(
    self, x: float, y: float, colour: str, *, radius: float = 6, hollow: bool = False, opacity: float = 1
  ) -> None:
    paint = f'fill="{self.palette.ground}" stroke="{colour}" stroke-width="2.5"' if hollow else f'fill="{colour}"'
    self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" {paint}{_opacity(opacity)}/>')

  def define_picture(self, name: str, w: float, h: float, png: bytes) -> None:
    """Define a PNG of w x h pixels, which stay squares, for `cut`."""
    data = base64.b64encode(png).decode()
    self.parts.append(
      f'<defs><image id="{name}" width="{number(w)}" height="{number(h)}" style="image-rendering:pixelated"'
      f' href="data:image/png;base64,{data}"/></defs>'
    )

  def cut(self, name: str, box: tuple[float, float, float, float], x: float, y: float, w: float, h: float) -> None:
    """Draw a part of a defined picture, `box` its left, top, width and height in pixels."""
    at = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
    part = " ".join(map(number, box))
    self.parts.append(f'<svg {at} viewBox="{part}" preserveAspectRatio="none"><use href="#{name}"/></svg>')

  def svg(self, height: float, title: str) -> str:
    """Return the document. `title` says in words what the figure shows."""
    palette = self.palette
    heads = "".join(
      f'<marker id="{name}" viewBox="0 0 10 10" refX="7" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
      f'<path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
      for name, colour in (("image", palette.image), ("text", palette.text), ("ink", palette.soft))
    )
    body = "".join(self.parts)
    defs = f"<defs>{heads}</defs>" if "marker-end" in body else ""
    shown = f'width="{SHOWN}" height="{round(SHOWN * height / self.width)}"'
    return (
      f'<svg xmlns="http://www.w3.org/2000/svg" {shown} viewBox="0 0 {self.width} {number(height)}" role="img"'
      f' aria-label="{escape(title)}" font-family="{FONT}"><title>{escape(title)}</title>{defs}'
      f"{body}</svg>\n"
    )


@dataclasses.dataclass(frozen=True)
class Scale:
  """A map from a figure's values to its units: `low` is at `start`, `high` at `end`. With `log`, by decades."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, value: float) -> float:
    low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
    return self.start + (self.end - self.start) * (at - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Axes:
  """A plot's frame: values along x and y, on a canvas."""

  canvas: Canvas
  x: Scale
  y: Scale

  def grid_y(self, ticks: Sequence[float], label: Callable[[float], str] = "{:g}".format) -> None:
    """Draw thin lines across, each with its value at the left."""
    palette = self.canvas.palette
    for tick in ticks:
      y = self.y(tick)
      self.canvas.line([(self.x.start, y), (self.x.end, y)], palette.off, width=1)
      self.canvas.text(self.x.start - 10, y + 7, label(tick), size=SMALL, colour=palette.soft, anchor="end")

  def grid_x(self, ticks: Sequence[float], label: Callable[[float], str] = "{:g}".format, lines: bool = False) -> None:
    """Draw values below the frame, and with `lines` thin lines up."""
    palette = self.canvas.palette
    for tick in ticks:
      x = self.x(tick)
      if lines:
        self.canvas.line([(x, self.y.start), (x, self.y.end)], palette.off, width=1)
      self.canvas.text(x, self.y.start + 28, label(tick), size=SMALL, colour=palette.soft)

  def line(self, points: Iterable[tuple[float, float]], colour: str, *, width: float = 3, dashed: bool = False) -> None:
    self.canvas.line([(self.x(x), self.y(y)) for x, y in points], colour, width=width, dashed=dashed)

  def dot(self, x: float, y: float, colour: str, *, radius: float = 6, hollow: bool = False) -> None:
    self.canvas.dot(self.x(x), self.y(y), colour, radius=radius, hollow=hollow)


def _opacity(opacity: float) -> str:
  return "" if opacity == 1 else f' opacity="{opacity:g}"'


def _split(words: str) -> list[str]:
  """Split `z_t, e` -> `z`, `_t`, `, e`: the letters and digits after an underscore behind a single letter, not
  `a_name`."""
  parts, rest, done = [], words, ""
  while "_" in rest:
    before, _, after = rest.partition("_")
    length = next((i for i, letter in enumerate(after) if not letter.isalnum()), len(after))
    if len(before) > 1 and before[-2:].isalnum():
      done, rest = f"{done}{before}_", after
      continue
    parts += [done + before, "_" + after[:length]]
    done, rest = "", after[length:]
  return [part for part in [*parts, done + rest] if part]
