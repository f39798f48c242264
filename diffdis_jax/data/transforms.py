"""Images on the host: decoding, resizing, augmentation. Pure functions of (image, numpy generator)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from diffdis_jax.config.data import Augmentation
from diffdis_jax.data import image_files, randaugment

WHITE = (255, 255, 255)
FACTORS = (8, 4, 2)  # by which libjpeg can decode fewer pixels
TRIES = 10  # of sampling a box that fits, as in torchvision
# What makes an image upright, by the number that EXIF has for how it lies.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
  """An upright RGB image, perhaps of fewer pixels than its file has."""

  image: Image.Image  # each side the file's over `factor`, rounded up: the last pixel may lie partly beyond the edge
  width: int  # of the file's image, upright, pixels
  height: int
  factor: int = 1  # or one of FACTORS

  @classmethod
  def of(cls, image: Image.Image | Decoded) -> Decoded:
    """Return the same, or take an image with all of its pixels."""
    return image if isinstance(image, Decoded) else cls(image, *image.size)

  @property
  def sides(self) -> tuple[float, float]:
    """Return width and height in pixels of `image`, to a fraction of one where `factor` does not divide them."""
    return self.width / self.factor, self.height / self.factor


def decode(image: bytes | UInt8[np.ndarray, "h w 3"], *, at_least: int | None = None) -> Decoded:
  """Decode bytes, or take an RGB array, as an RGB image, upright by EXIF, transparency composited on white.

  Palettes, grey, 16 bit grey, grey of floats (to 1, or else as of 16 bits) and CMYK are converted. A JPEG is decoded at
  the smallest of 1/8, 1/4, 1/2 and 1 of its size whose short side has `at_least` so many pixels, None for all; one that
  EXIF turns only where both sides divide. Raises image_files.Unusable as `image_files.open_image` does, and whatever
  Pillow raises for bytes that it cannot read to the end.
  """
  if isinstance(image, np.ndarray):
    return Decoded.of(Image.fromarray(image))
  with image_files.open_image(image) as opened:
    sides = opened.size
    factor = 1 if at_least is None else _reduce(opened, at_least)
    # To its end: a file that is cut off raises here, where that is counted.
    opened.load()
    upright = upright_rgb(opened)
  # -stored % factor is how far the last pixel lies beyond the edge: zero where EXIF exchanges the sides.
  width, height = (side * factor - -stored % factor for side, stored in zip(upright.size, sides, strict=True))
  return Decoded(upright, width, height, factor)


def upright_rgb(image: Image.Image) -> Image.Image:
  """Turn an image upright by EXIF, and convert it as `decode` does. Raises ValueError: floats that are not finite."""
  # Not by ImageOps.exif_transpose, which writes all of EXIF again, and fails at whatever is wrong in it.
  turn = _turn(image)
  upright = image if turn is None else image.transpose(turn)
  # Pillow itself would cut 16 bits off at 255, so that all but the darkest were white.
  if upright.mode.startswith("I") or upright.mode == "F":
    # One number that is not finite would make all of the image black.
    if not np.isfinite(most := np.asarray(upright).max()):
      raise ValueError("it holds numbers that are not finite")
    white = 1.0 if upright.mode == "F" and most <= 1 else 65535.0
    values = np.clip(np.asarray(upright).astype(np.float64) / (white / 255), 0, 255)
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
  # Of palettes and colour keys too: by itself Pillow shows what lies below the transparency, often black.
  if upright.has_transparency_data:
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer).convert("RGB")
  return upright if upright.mode == "RGB" else upright.convert("RGB")


def _turn(opened: Image.Image) -> Image.Transpose | None:
  """Return the operation that makes the image upright, by EXIF; None where it is upright, or EXIF cannot be read."""
  try:
    return _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
  except Exception:  # Pillow's reader raises whatever damage leads it into
    return None


def _reduce(opened: Image.Image, at_least: int) -> int:
  """Have a JPEG decoded at a fraction of its size, and return by how much it is smaller."""
  if not isinstance(opened, JpegImageFile) or min(opened.size) < FACTORS[-1] * at_least:
    return 1
  # Turning would bring the partial last pixel to the left or the top.
  is_turned = _turn(opened) is not None
  for factor in FACTORS:
    divides = not any(side % factor for side in opened.size)
    if min(opened.size) >= factor * at_least and (divides or not is_turned):
      # Without a mode: grey and CMYK are converted by us, as at full size.
      drafted = opened.draft(None, (opened.width // factor, opened.height // factor))
      return factor if drafted else 1
  return 1


def needed_side(size: int, *views: Augmentation) -> int | None:
  """Return the `at_least` of `decode` for which whatever part of the image these views show, `size` pixels
  square, has as many pixels a side; None where one of them is to have all pixels."""
  sides = []
  for how in views:
    wanted, share = size * (1 + how.zoom), 1.0
    if how.crop == "random_resized":
      # The smallest box is of the least area and the most oblong ratio; where no try fits, the ratio alone counts.
      low, high = how.crop_ratio
      oblong = min(low, 1 / high, 1.0)
      share = min(math.sqrt(how.crop_scale[0] * oblong), oblong)
      wanted += 1  # a box's sides are rounded
    # Without a rest of floating point: 256 is not to become 257.
    sides.append(math.ceil(round(wanted / share, 6)))
  return max(sides) if all(how.reduced_decoding for how in views) else None


def resize(image: Image.Image | Decoded, size: int, *, place: float = 0.5) -> Image.Image:
  """Resize the short side to `size` pixels (bicubic, antialiased), then cut a square, at a `place` along the long side
  from 0, left or top, to 1. Nothing is stretched."""
  whole = Decoded.of(image)
  if whole.sides == (size, size):
    return whole.image
  width, height = whole.sides
  side = min(width, height)
  # The box is resampled once: to scale first and then cut would round scale and place to whole pixels.
  left, top = place * (width - side), place * (height - side)
  return whole.image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def augment(
  image: Image.Image | Decoded, rng: np.random.Generator, *, size: int, how: Augmentation
) -> UInt8[np.ndarray, "size size 3"]:
  """Return a varied view of the image, `size` pixels square; the same part of it at any factor of `Decoded`."""
  whole = Decoded.of(image)
  if how.shift or how.zoom or how.rotation:
    moved = random_affine(whole, rng, shift=how.shift, zoom=how.zoom, rotation=how.rotation)
    whole = whole._replace(image=moved)
  if how.crop == "random_resized":
    image = random_resized_crop(whole, rng, size=size, scale=how.crop_scale, ratio=how.crop_ratio)
  else:
    # At a uniformly random place, any fraction of a pixel, as Stable Diffusion is trained.
    image = resize(whole, size, place=rng.random() if how.crop == "random" else 0.5)
  if how.flip and rng.random() < 0.5:
    image = ImageOps.mirror(image)
  common = dict(operations=how.randaugment_operations, magnitude=how.randaugment_magnitude)
  if how.randaugment_operations and how.randaugment_kind == "timm":
    image = randaugment.timm_randaugment(image, rng, **common, deviation=how.randaugment_deviation)
  elif how.randaugment_operations:
    image = randaugment.torchvision_randaugment(image, rng, **common)
  pixels = np.asarray(jitter_colour(image, rng, how=how))
  # Last, as in timm: nothing changes the noise afterwards.
  return randaugment.erase(pixels, rng, probability=how.erase) if how.erase else pixels


class Box(NamedTuple):
  """Part of an image, in whole pixels from the left and the top."""

  left: int
  top: int
  width: int
  height: int


def draw_box(
  width: int, height: int, rng: np.random.Generator, *, scale: Sequence[float], ratio: Sequence[float]
) -> Box:
  """Sample a box in an image of this size, in pixels, by the rule of torchvision's RandomResizedCrop.get_params.

  The area is uniform in `scale`, a fraction of the image's, and the log of width over height in that of `ratio`; sides
  are rounded, the place is uniform. After TRIES it is the largest box in the middle whose ratio is within `ratio`.
  """
  for _ in range(TRIES):
    area = width * height * rng.uniform(scale[0], scale[1])
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return Box(int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h)
  w, h = width, height
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return Box((width - w) // 2, (height - h) // 2, w, h)


def random_resized_crop(
  image: Image.Image | Decoded, rng: np.random.Generator, *, size: int, scale: Sequence[float], ratio: Sequence[float]
) -> Image.Image:
  """Stretch a random box, by `draw_box` in pixels of the file, to a square of `size` pixels: torchvision's
  RandomResizedCrop, bicubic and antialiased. No pixel outside of the box has a part in the result."""
  whole = Decoded.of(image)
  box = draw_box(whole.width, whole.height, rng, scale=scale, ratio=ratio)
  left, top, width, height = (pixels / whole.factor for pixels in box)
  right, bottom = left + width, top + height
  # Not by `box` of resize alone, whose filter reaches beyond the box.
  x, y = math.floor(left), math.floor(top)
  inside = whole.image.crop((x, y, math.ceil(right), math.ceil(bottom)))
  return inside.resize((size, size), Image.Resampling.BICUBIC, box=(left - x, top - y, right - x, bottom - y))


def random_affine(
  image: Image.Image | Decoded, rng: np.random.Generator, *, shift: float, zoom: float, rotation: float
) -> Image.Image:
  """Turn and scale about the middle, then move; log of the scale uniform, uncovered pixels white."""
  whole = Decoded.of(image)
  width, height = whole.sides
  angle = math.radians(rng.uniform(-rotation, rotation))
  log_zoom = math.log1p(zoom)
  factor = math.exp(rng.uniform(-log_zoom, log_zoom))
  dx, dy = rng.uniform(-shift, shift, 2) * (width, height)
  cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
  x, y = width / 2, height / 2
  # Pillow asks of each pixel of the result where it comes from, so that this is the way back.
  inverse = (cos, sin, x - cos * (x + dx) - sin * (y + dy), -sin, cos, y + sin * (x + dx) - cos * (y + dy))
  kind, filter_ = Image.Transform.AFFINE, Image.Resampling.BICUBIC
  return whole.image.transform(whole.image.size, kind, inverse, filter_, fillcolor=WHITE)


def jitter_colour(image: Image.Image, rng: np.random.Generator, *, how: Augmentation) -> Image.Image:
  """Change brightness, contrast and saturation by random factors, then hue by a random turn."""
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for enhancer, strength in zip(enhancers, (how.brightness, how.contrast, how.saturation), strict=True):
    if strength:
      image = enhancer(image).enhance(rng.uniform(1 - strength, 1 + strength))
  if how.hue:
    # Pillow's hue is a circle of 256 levels.
    turn = round(256 * rng.uniform(-how.hue, how.hue))
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(h + turn) % 256 for h in range(256)])
    image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
  return image
