"""Pieces of the page: HTML and SVG in the colours of Gradio's theme, light or dark. All text is escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

THUMBNAIL = 64  # pixels
PIXELATED = 128  # pixels: images of smaller sides are enlarged without smoothing
VISIBLE = 0.002  # of a spread, below which there is nothing to see
# Okabe and Ito's, which the colour-blind can distinguish; readable on white and on near black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7a7a7a")
CSS = """
.dd { font-size: 14px; line-height: 1.4; color: var(--body-text-color); }
.dd p { margin: 0 0 10px; color: var(--body-text-color-subdued); }
.dd .row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(var(--least), 100%), 1fr)); gap: 14px; }
.dd figure { margin: 0; }
.dd figure img { width: 100%; max-width: 380px; aspect-ratio: 1; display: block; border-radius: 8px; object-fit: cover;
  background: var(--block-label-background-fill); border: 1px solid var(--border-color-primary); }
.dd figure img.small, .small img { image-rendering: pixelated; }
.dd figcaption { padding-top: 6px; overflow-wrap: anywhere; }
.dd figcaption small { display: block; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.dd .bar { display: grid; grid-template-columns: minmax(80px, 22%) 1fr 8.5em; gap: 10px; align-items: center;
  padding: 4px 0; }
.dd .bar > span:first-child { overflow-wrap: anywhere; text-align: right; }
.dd .bar > span:last-child { font-variant-numeric: tabular-nums; white-space: nowrap; }
.dd .bar small { color: var(--body-text-color-subdued); }
.dd .track { position: relative; height: 18px; border-radius: 4px; background: var(--block-label-background-fill); }
.dd .fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--color-accent); }
.dd .spread { position: absolute; top: 8px; height: 2px; min-width: 2px; background: var(--body-text-color); }
.dd .spread::before, .dd .spread::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px;
  background: var(--body-text-color); }
.dd .spread::before { left: 0; } .dd .spread::after { right: 0; }
.dd .progress { height: 4px; border-radius: 2px; background: var(--block-label-background-fill); margin: 0 0 14px; }
.dd .progress i { display: block; height: 100%; border-radius: 2px; background: var(--color-accent); }
.dd svg { width: 100%; height: auto; display: block; }
.dd svg text { fill: var(--body-text-color); font-size: 12px; }
.dd svg .axis { stroke: var(--border-color-primary); } .dd svg .tick { fill: var(--body-text-color-subdued); }
.dd .legend { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 6px 0; }
.dd .legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.dd .strip { display: flex; gap: 3px; padding-top: 14px; overflow-x: auto; }
.dd .strip > span { flex: 1 0 30px; max-width: 64px; text-align: center; font-size: 11px;
  color: var(--body-text-color-subdued); }
.dd .strip img { width: 100%; aspect-ratio: 1; display: block; margin-bottom: 3px; border-radius: 3px; }
.dd h4 { margin: 0 0 4px; font-size: 14px; }
"""


def block(*parts: str, least: int = 170) -> str:
  """What a tab shows. `least`: width of a figure or chart, pixels; as many stand side by side as fit."""
  return f'<div class="dd" style="--least:{least}px">{"".join(parts)}</div>'


def line(text: str) -> str:
  return f"<p>{html.escape(text)}</p>"


def row(parts: Sequence[str]) -> str:
  """Side by side, or below each other where the page is narrow."""
  return f'<div class="row">{"".join(parts)}</div>'


def progress(done: int, of: int) -> str:
  return f'<div class="progress"><i style="width:{100 * done / of:.1f}%"></i></div>'


def encode(image: UInt8[np.ndarray, "h w 3"]) -> str:
  """A PNG as a data URL, so that nothing has to be kept for the page to ask for."""
  buffer = io.BytesIO()
  # Fast rather than small: three images after each step are encoded while the user waits.
  Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
  return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure(image: UInt8[np.ndarray, "h w 3"], title: str, note: str = "") -> str:
  small = ' class="small"' if image.shape[0] < PIXELATED else ""
  # A caption is the data's, a prompt the user's: either may look like HTML.
  title, note = html.escape(title), html.escape(note)
  return (
    f'<figure><img{small} src="{encode(image)}" alt="{title}"><figcaption>{title}<small>{note}</small></figcaption>'
    "</figure>"
  )


def strip(columns: Sequence[tuple[str, Sequence[UInt8[np.ndarray, "h w 3"]]]]) -> str:
  """Small images in columns, each with its label below."""
  cells = []
  for label, images in columns:
    shown = "".join(f'<img class="small" src="{encode(thumbnail(image))}" alt="">' for image in images)
    cells.append(f"<span>{shown}{html.escape(label)}</span>")
  return f'<div class="strip">{"".join(cells)}</div>'


def thumbnail(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
  """At most `THUMBNAIL` pixels wide."""
  small = Image.fromarray(image)
  small.thumbnail((THUMBNAIL, THUMBNAIL))
  return np.asarray(small)


class Bar(NamedTuple):
  """A share, 0 to 1, and its lowest and highest value over the noise samples."""

  name: str
  share: float
  low: float
  high: float
  note: str = ""


def bars(rows: Sequence[Bar]) -> str:
  """One a line, with whiskers from the lowest to the highest value."""
  return "".join(
    f'<div class="bar"><span>{html.escape(bar.name)}</span><div class="track"><div class="fill"'
    f' style="width:{100 * bar.share:.2f}%"></div>'
    + (
      f'<div class="spread" style="left:{100 * bar.low:.2f}%;width:{100 * (bar.high - bar.low):.2f}%"></div>'
      if bar.high - bar.low >= VISIBLE
      else ""
    )
    + f"</div><span>{bar.share:.1%} <small>{html.escape(bar.note)}</small></span></div>"
    for bar in rows
  )


def legend(names: Sequence[str]) -> str:
  """Names in their colours, those of `lines` and `paths`."""
  return (
    '<div class="legend">'
    + "".join(f'<span><i style="background:{colour(i)}"></i>{html.escape(name)}</span>' for i, name in enumerate(names))
    + "</div>"
  )


def colour(index: int) -> str:
  return COLOURS[index % len(COLOURS)]


class _Pixel(NamedTuple):
  """A place in the picture, from the left and the top."""

  x: float
  y: float


class _Range(NamedTuple):
  low: float
  high: float


class Frame:
  """An SVG picture with room for labels, whose x and y are those of the data.

  Args:
    x, y: lowest and highest value.
  """

  WIDTH, HEIGHT = 480, 300
  LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 30

  def __init__(self, x: tuple[float, float], y: tuple[float, float]):
    self._x, self._y = _widened(*x), _widened(*y)
    self._parts: list[str] = []

  def place(self, x: float, y: float) -> _Pixel:
    (left, right), (low, high) = self._x, self._y
    width, height = self.WIDTH - self.LEFT - self.RIGHT, self.HEIGHT - self.TOP - self.BOTTOM
    # The data's y grows upwards, and SVG's downwards.
    return _Pixel(self.LEFT + (x - left) / (right - left) * width, self.TOP + (high - y) / (high - low) * height)

  def curve(self, points: Sequence[tuple[float, float]], paint: str, *, width: float, opacity: float = 1.0) -> None:
    placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*point) for point in points))
    self._parts.append(
      f'<polyline points="{placed}" fill="none" stroke="{paint}" stroke-width="{width}" stroke-opacity="{opacity}"'
      ' stroke-linejoin="round"/>'
    )

  def dot(self, x: float, y: float, paint: str, *, radius: float, title: str = "") -> None:
    """A point, which says its title when the mouse rests on it."""
    px, py = self.place(x, y)
    self._parts.append(
      f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" fill="{paint}"><title>{html.escape(title)}</title></circle>'
    )

  def label(self, x: float, y: float, text: str) -> None:
    """Text beside a point, on the side where there is room."""
    px, py = self.place(x, y)
    # Browsers cut off at the edge of an SVG what is beyond it.
    right = px > self.WIDTH * 0.7
    anchor, offset = ("end", -9) if right else ("start", 9)
    self._parts.append(
      f'<text x="{px + offset:.1f}" y="{py + 4:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
    )

  def x_tick(self, x: float, text: str) -> None:
    px = self.place(x, self._y.low).x
    self._parts.append(
      f'<text class="tick" x="{px:.1f}" y="{self.HEIGHT - 10}" text-anchor="middle">{html.escape(text)}</text>'
    )

  def y_tick(self, y: float, text: str) -> None:
    """A label and a line across."""
    py = self.place(self._x.low, y).y
    # In front of all others: SVG paints in order, and the line belongs below the curves.
    self._parts.insert(
      0,
      f'<line class="axis" x1="{self.LEFT}" x2="{self.WIDTH - self.RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
      f'<text class="tick" x="{self.LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{html.escape(text)}</text>',
    )

  def html(self, title: str, note: str) -> str:
    return (
      f'<figure><h4>{html.escape(title)}</h4><svg viewBox="0 0 {self.WIDTH} {self.HEIGHT}" role="img"'
      f' aria-label="{html.escape(title)}">{"".join(self._parts)}</svg>'
      f"<figcaption><small>{html.escape(note)}</small></figcaption></figure>"
    )


def _widened(low: float, high: float) -> _Range:
  """A range that has a length."""
  # One value, or equal ones, are no range: `place` and `ticks` would divide by zero.
  return _Range(low, high) if high > low else _Range(low - 0.5, high + 0.5)


def ticks(low: float, high: float, count: int = 5) -> Float[np.ndarray, " n"]:
  """Round numbers within the range, about `count` of them."""
  low, high = _widened(low, high)
  rough = (high - low) / count
  size = 10 ** np.floor(np.log10(rough))
  # The nearest of the steps that people count by; 10 too, since the rough one may lie just below it.
  step = size * min((1, 2, 5, 10), key=lambda factor: abs(factor * size - rough))
  return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0  # -0 becomes 0
