"""Images on the host: decoding, resizing, augmentation. Pure functions of (image, numpy generator)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from diffdis_jax.config.data import Augmentation
from diffdis_jax.data import image_files, randaugment_timm
from diffdis_jax.data.randaugment import randaugment

WHITE = (255, 255, 255)
TRIES = 10  # of sampling a box that fits, as in torchvision
STRIP = 2**20  # pixels that are converted at a time, so that a large image needs no second copy of four bytes a pixel


def decode(image: bytes | UInt8[np.ndarray, "h w 3"]) -> Image.Image:
  """Encoded bytes or an RGB array -> RGB image, upright by EXIF, transparency composited on white.

  Palettes, grey, 16 bit grey and CMYK are converted.

  Raises:
    Image.DecompressionBombError: more pixels than `image_files.open_image` takes.
    Exception: the bytes are no image that Pillow can read to its end.
  """
  if isinstance(image, np.ndarray):
    return Image.fromarray(image)
  with image_files.open_image(image) as opened:
    # To its end: a file that is cut off raises here, where that is counted.
    opened.load()
    ImageOps.exif_transpose(opened, in_place=True)
    upright = opened
  # Pillow itself would cut 16 bits off at 255, so that all but the darkest were white.
  if upright.mode.startswith("I") or upright.mode == "F":
    return _in_strips(upright, _from_sixteen_bit_grey)
  # Of palettes and colour keys too: by itself Pillow shows what lies below the transparency, often black.
  if upright.has_transparency_data:
    return _in_strips(upright, _on_white)
  return upright if upright.mode == "RGB" else upright.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
  """`convert`, which gives an RGB image, strip after strip."""
  if image.width * image.height <= STRIP:
    return convert(image)
  converted, height = Image.new("RGB", image.size), max(1, STRIP // image.width)
  for top in range(0, image.height, height):
    strip = image.crop((0, top, image.width, min(top + height, image.height)))
    converted.paste(convert(strip), (0, top))
  return converted


def _on_white(image: Image.Image) -> Image.Image:
  layer = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer).convert("RGB")


def _from_sixteen_bit_grey(image: Image.Image) -> Image.Image:
  # 65535 / 257 is 255.
  values = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)
  return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def resize(image: Image.Image, size: int, *, place: float = 0.5) -> Image.Image:
  """Short side to `size` pixels (bicubic, antialiased), then a square. Both sides have one scale: nothing is stretched.

  Args:
    image: of any size.
    size: side of the square, pixels.
    place: of the square along the long side, from 0, left or top, to 1; by default the middle.
  """
  if image.size == (size, size):
    return image
  side = min(image.size)
  # The box is resampled once: to scale first and then cut would round scale and place to whole pixels.
  left, top = place * (image.width - side), place * (image.height - side)
  return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def augment(
  image: Image.Image, rng: np.random.Generator, *, size: int, how: Augmentation
) -> UInt8[np.ndarray, "size size 3"]:
  """A varied view of the image, `size` pixels square."""
  if how.shift or how.zoom or how.rotation:
    image = random_affine(image, rng, shift=how.shift, zoom=how.zoom, rotation=how.rotation)
  if how.crop == "random":
    image = random_square(image, rng, size=size)
  elif how.crop == "random_resized":
    image = random_resized_crop(image, rng, size=size, scale=how.crop_scale, ratio=how.crop_ratio)
  else:
    image = resize(image, size)
  if how.flip and rng.random() < 0.5:
    image = ImageOps.mirror(image)
  common = dict(operations=how.randaugment_operations, magnitude=how.randaugment_magnitude)
  if how.randaugment_operations and how.randaugment_kind == "timm":
    image = randaugment_timm.randaugment(image, rng, **common, deviation=how.randaugment_deviation)
  elif how.randaugment_operations:
    image = randaugment(image, rng, **common)
  pixels = np.asarray(jitter_colour(image, rng, how=how))
  # Last, as in timm: nothing changes the noise afterwards.
  return randaugment_timm.erase(pixels, rng, probability=how.erase) if how.erase else pixels


def random_square(image: Image.Image, rng: np.random.Generator, *, size: int) -> Image.Image:
  """Short side to `size` pixels, then a square from a uniformly random place, as Stable Diffusion's training cuts it.

  The place is any fraction of a pixel, and the scale exactly that of the short side. A square image is only resized.
  """
  return resize(image, size, place=rng.random())


class Box(NamedTuple):
  """Part of an image, in whole pixels from the left and the top."""

  left: int
  top: int
  width: int
  height: int


def draw_box(
  width: int, height: int, rng: np.random.Generator, *, scale: Sequence[float], ratio: Sequence[float]
) -> Box:
  """A box in an image of this width and height, in pixels, by the rule of torchvision's RandomResizedCrop.get_params.

  The area is uniform in `scale`, a fraction of the image's, and the log of width over height uniform in that of
  `ratio`; sides are rounded, and the place is uniform. After ten tries that do not fit, it is the largest box in the
  middle whose ratio is within `ratio`.
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
  image: Image.Image, rng: np.random.Generator, *, size: int, scale: Sequence[float], ratio: Sequence[float]
) -> Image.Image:
  """A random box, stretched to a square of `size` pixels: torchvision's RandomResizedCrop, bicubic and antialiased.

  `scale` and `ratio` are those of `draw_box`. No pixel outside of the box has a part in the result.
  """
  box = draw_box(image.width, image.height, rng, scale=scale, ratio=ratio)
  # Not by `box` of resize, whose filter reaches beyond the box.
  inside = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
  return inside.resize((size, size), Image.Resampling.BICUBIC)


def random_affine(
  image: Image.Image, rng: np.random.Generator, *, shift: float, zoom: float, rotation: float
) -> Image.Image:
  """Turns and scales about the middle, then moves; log of the scale uniform, uncovered pixels white."""
  angle = math.radians(rng.uniform(-rotation, rotation))
  log_zoom = math.log1p(zoom)
  factor = math.exp(rng.uniform(-log_zoom, log_zoom))
  dx, dy = rng.uniform(-shift, shift, 2) * image.size
  cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
  x, y = image.width / 2, image.height / 2
  # Pillow asks of each pixel of the result where it comes from, so that this is the way back.
  inverse = (cos, sin, x - cos * (x + dx) - sin * (y + dy), -sin, cos, y + sin * (x + dx) - cos * (y + dy))
  return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=WHITE)


def jitter_colour(image: Image.Image, rng: np.random.Generator, *, how: Augmentation) -> Image.Image:
  """Brightness, contrast and saturation by random factors, then hue by a random turn."""
  enhancers = (
    (ImageEnhance.Brightness, how.brightness),
    (ImageEnhance.Contrast, how.contrast),
    (ImageEnhance.Color, how.saturation),
  )
  for enhancer, strength in enhancers:
    if strength:
      image = enhancer(image).enhance(rng.uniform(1 - strength, 1 + strength))
  if how.hue:
    # Pillow's hue is a circle of 256 levels.
    turn = round(256 * rng.uniform(-how.hue, how.hue))
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(h + turn) % 256 for h in range(256)])
    image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
  return image
