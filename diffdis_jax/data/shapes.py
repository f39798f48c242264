"""Procedural captioned images: one coloured shape on a plain background, each made from its index alone.

8 colours x 8 shapes are 64 classes. Eight of them, one for each colour and one for each shape, are never in training:
red triangle, brown ring, yellow circle, green star, cyan heart, blue square, purple cross and pink crescent.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw

COLOURS = {
  "red": (222, 36, 36),
  "brown": (150, 88, 34),
  "yellow": (248, 222, 40),
  "green": (40, 166, 62),
  "cyan": (52, 208, 222),
  "blue": (40, 76, 228),
  "purple": (136, 48, 186),
  "pink": (250, 142, 198),
}
BACKGROUNDS = {
  "white": (250, 250, 250),
  "beige": (232, 220, 196),
  "light grey": (198, 200, 204),
  "dark grey": (84, 84, 88),
  "navy": (16, 24, 52),
  "black": (10, 10, 10),
}
COLOUR_JITTER, BACKGROUND_JITTER = 18, 8  # of 255, uniform either way, one draw a channel
RADIUS = (0.33, 0.44)  # of the image's side, to the outermost point of a shape
MARGIN = 0.04  # of the image's side, left free around a shape
SMALL, LARGE = 0.36, 0.42  # radii below and above which a caption may say so
OFF_CENTRE = 0.05  # of the image's side: a caption may name the side; within a third of it, the middle
MAX_ROTATION = 20.0  # degrees either way: a cross stays a cross and a square no diamond
SUPERSAMPLING = 4
DETAIL = 0.1  # how often a caption names each of size, position and background

# Two captions of one class that differ, be it in a detail, are negatives of each other: `plain_caption` is one a class.
TEMPLATES = ("a {}", "a picture of a {}")
SPLITS = {"train": 65536, "test": 1792, "unseen": 256, "all": 2048}

Points = list[tuple[float, float]]


def _regular(n: int, *, inner: float = 1.0) -> Points:
  """Return a regular polygon's corners, the first on top; with `inner` < 1 every second one is on that radius."""
  radii = [inner if i % 2 and inner < 1 else 1.0 for i in range(n)]
  return [(r * math.sin(2 * math.pi * i / n), -r * math.cos(2 * math.pi * i / n)) for i, r in enumerate(radii)]


def _turned(quarter: Points) -> Points:
  """Return these points, then the same turned about the middle by one, two and three quarters."""
  points = [*quarter]
  for _ in range(3):
    points += [(-y, x) for x, y in points[-len(quarter) :]]
  return points


def _heart() -> Points:
  """Return x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, moved and scaled to radius 1."""
  t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  return list(zip((x / 18.3).tolist(), ((-y - 2.5) / 18.3).tolist(), strict=True))


def _arc(radius: float, centre: float, start: float, stop: float) -> Points:
  """Return points on a circle around (centre, 0), from angle `start` to `stop` in radians."""
  return [(centre + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(start, stop, 32)]


def _crescent() -> Points:
  """Return a unit disc without the disc of radius 0.8 around (0.45, 0)."""
  bite, depth = 0.8, 0.45
  x = (1 - bite**2 + depth**2) / (2 * depth)
  outer, inner = math.acos(x), math.atan2(math.sqrt(1 - x**2), x - depth)
  return _arc(1.0, 0.0, outer, 2 * math.pi - outer) + _arc(bite, depth, 2 * math.pi - inner, inner)


_CIRCLE = _regular(48)
OUTLINES: dict[str, tuple[Points, ...]] = {  # filled outline, then holes, within the unit circle, y downwards
  "circle": (_CIRCLE,),
  "square": (_turned([(-math.sqrt(0.5), -math.sqrt(0.5))]),),
  "triangle": (_regular(3),),
  "star": (_regular(10, inner=0.42),),
  "cross": (_turned([(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3)]),),
  "ring": (_CIRCLE, [(0.58 * x, 0.58 * y) for x, y in _CIRCLE]),
  "heart": (_heart(),),
  "crescent": (_crescent(),),
}
SHAPES = tuple(OUTLINES)
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
CLASSNAMES = tuple(f"{colour} {shape}" for colour, shape in PAIRS)
# 3 and 8 have no common factor: each shape is held out once, as each colour is.
UNSEEN = tuple((colour, SHAPES[(3 * i + 2) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)


@dataclasses.dataclass(frozen=True)
class Scene:
  """The content of an image. Lengths are fractions of the image's side, x and y from its middle, y downwards."""

  colour: str
  shape: str
  background: str
  x: float
  y: float
  radius: float
  rotation: float  # degrees


def make_scene(rng: np.random.Generator, *, colour: str, shape: str) -> Scene:
  """Sample background, size, rotation and a position that keeps the whole shape inside."""
  radius = rng.uniform(*RADIUS)
  room = 0.5 - MARGIN - radius
  x, y, rotation = rng.uniform(-1, 1, 3)
  background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
  return Scene(colour, shape, background, x * room, y * room, radius, rotation * MAX_ROTATION)


def position(scene: Scene) -> str:
  """Name the side on which the shape clearly is, "in the middle", or "" where neither is plain."""
  distance = max(abs(scene.x), abs(scene.y))
  if distance < OFF_CENTRE / 3:
    return "in the middle"
  if distance < OFF_CENTRE:
    return ""
  if abs(scene.x) > abs(scene.y):
    return "on the left" if scene.x < 0 else "on the right"
  return "at the top" if scene.y < 0 else "at the bottom"


def describe(rng: np.random.Generator, scene: Scene) -> str:
  """Name colour and shape, and each of size, position and background a tenth of the time, always truly."""
  sized, placed, on_ground, by_tone = rng.random(4) < (DETAIL, DETAIL, DETAIL, 0.5)
  size = "small" if scene.radius < SMALL else "large" if scene.radius > LARGE else ""
  words = [size if sized else "", scene.colour, scene.shape, position(scene) if placed else ""]
  if on_ground:
    tone = "light" if sum(BACKGROUNDS[scene.background]) > 384 else "dark"
    words.append(f"on a {tone if by_tone else scene.background} background")
  return " ".join(filter(None, words))


def coverage(
  shape: str, *, x: float, y: float, radius: float, rotation: float, image_size: int
) -> Float32[np.ndarray, "h w 1"]:
  """Return how much of each pixel a shape covers, 0 to 1. Lengths, places and degrees are those of `Scene`."""
  side = image_size * SUPERSAMPLING
  angle = math.radians(rotation)
  cos, sin = math.cos(angle) * radius * side, math.sin(angle) * radius * side
  x0, y0 = (0.5 + x) * side, (0.5 + y) * side
  # ImageDraw has no antialiasing: it draws larger, and the mean of the pixels smooths the edges.
  mask = Image.new("L", (side, side), 0)
  draw = ImageDraw.Draw(mask)
  # All but the ring have no hole.
  for fill, outline in zip((255, 0), OUTLINES[shape], strict=False):
    draw.polygon([(x0 + x * cos - y * sin, y0 + x * sin + y * cos) for x, y in outline], fill=fill)
  return np.asarray(mask.reduce(SUPERSAMPLING), np.float32)[:, :, None] / 255


def render(scene: Scene, *, image_size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
  """Draw the scene with antialiased edges; `rng` gives the slight jitter of both colours."""
  place: Any = dict(x=scene.x, y=scene.y, radius=scene.radius, rotation=scene.rotation)
  covered = coverage(scene.shape, **place, image_size=image_size)
  reach = np.array([[BACKGROUND_JITTER], [COLOUR_JITTER]])
  jitter = rng.integers(-reach, reach, (2, 3), endpoint=True)
  back, front = np.clip(np.array((BACKGROUNDS[scene.background], COLOURS[scene.colour])) + jitter, 0, 255)
  return (back + (front - back) * covered + 0.5).astype(np.uint8)


class Shapes:
  """Random access source of `num_images` records, classes in turn, each a function of (seed, split, index) alone.

  A record is {image: u8[h w 3], caption, plain_caption, label: "red star", colour, shape, seen: bool, key}. `caption`
  has one of TEMPLATES, and details at times; `plain_caption` is the first, of the label alone. Splits: `train` (the 56
  seen classes), `test` (the same classes, other images), `unseen` (the 8 held out), `all` (all 64, other images again).
  """

  def __init__(self, *, split: str, image_size: int, seed: int = 0, num_images: int | None = None):
    self._pairs = {"train": SEEN, "test": SEEN, "unseen": UNSEEN, "all": PAIRS}[split]
    # With the split, or splits of one class would share images.
    self._seed = (seed, tuple(SPLITS).index(split))
    self._image_size = image_size
    self._num_images = SPLITS[split] if num_images is None else num_images

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._num_images:
      raise IndexError(f"index {index} outside of {self._num_images} images")
    colour, shape = self._pairs[index % len(self._pairs)]
    rng = np.random.default_rng((*self._seed, index))
    scene = make_scene(rng, colour=colour, shape=shape)
    image = render(scene, image_size=self._image_size, rng=rng)
    described, label = describe(rng, scene), f"{colour} {shape}"
    return {
      "image": image,
      "caption": TEMPLATES[rng.integers(len(TEMPLATES))].format(described),
      "plain_caption": TEMPLATES[0].format(label),
      "label": label,
      "colour": colour,
      "shape": shape,
      "seen": (colour, shape) in SEEN,
      "key": f"{index:09d}",
    }
