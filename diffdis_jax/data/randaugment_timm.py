"""timm's variant of RandAugment in PIL, `rand-m9-mstd0.5-inc1` and its like, and its random erasing.

It differs from torchvision's (randaugment.py): other operations, each done half of the time, a magnitude with noise, a
fill colour, bicubic turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

LARGEST = 10.0  # magnitude
PROBABILITY = 0.5  # of each operation that is sampled
# Of CLIP's training images, of 255: what turns uncover, and the noise that erases.
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
FILL = tuple(round(255 * value) for value in MEAN)
ERASED, ERASED_RATIO, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
# An operation of an image with a fraction of LARGEST, whose sign was sampled where it has two sides.
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, inverse, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, level: float) -> Image.Image:
  return ImageOps.posterize(image, 4 - int(level * 4))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
  add = min(128, int(level * 110))
  return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
  return lambda image, level: kind(image).enhance(max(0.1, 1.0 + 0.9 * level))


OPERATIONS: dict[str, Operation] = {
  "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
  "Equalize": lambda image, _: ImageOps.equalize(image),
  "Invert": lambda image, _: ImageOps.invert(image),
  "Rotate": lambda image, level: image.rotate(30 * level, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
  "PosterizeIncreasing": _posterize,
  "SolarizeIncreasing": lambda image, level: ImageOps.solarize(image, 256 - min(256, int(level * 256))),
  "SolarizeAdd": _solarize_add,
  "ColorIncreasing": _enhance(ImageEnhance.Color),
  "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
  "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
  "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
  "ShearX": lambda image, level: _affine(image, 1, 0.3 * level, 0, 0, 1, 0),
  "ShearY": lambda image, level: _affine(image, 1, 0, 0, 0.3 * level, 1, 0),
  "TranslateXRel": lambda image, level: _affine(image, 1, 0, 0.45 * level * image.width, 0, 1, 0),
  "TranslateYRel": lambda image, level: _affine(image, 1, 0, 0, 0, 1, 0.45 * level * image.height),
}
_ONE_SIDED = ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")


def randaugment(
  image: Image.Image, rng: np.random.Generator, *, operations: int, magnitude: float, deviation: float
) -> Image.Image:
  """Samples so many operations uniformly, and does each of them half of the time.

  Args:
    magnitude: mean strength of an operation, of LARGEST; it is normal with this `deviation`, cut to 0 ... LARGEST.
  """
  for number in rng.integers(len(OPERATIONS), size=operations):
    if rng.random() >= PROBABILITY:
      continue
    name = [*OPERATIONS][number]
    level = float(np.clip(rng.normal(magnitude, deviation), 0.0, LARGEST)) / LARGEST
    if name not in _ONE_SIDED and rng.random() < 0.5:
      level = -level
    image = OPERATIONS[name](image, level)
  return image


def erase(
  pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, probability: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Replace a random box by noise with this probability (Zhong et al., 2020).

  Its area and ratio are timm's. Each value is normal, with the mean and deviation of CLIP's training images; timm's,
  which is sampled after the images were normalised, is not cut to 0 ... 255.
  """
  if rng.random() >= probability:
    return pixels
  height, width = pixels.shape[:2]
  for _ in range(TRIES):
    area = rng.uniform(*ERASED) * height * width
    low, high = map(math.log, ERASED_RATIO)
    ratio = math.exp(rng.uniform(low, high))
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if h < height and w < width:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      noise = 255 * (np.array(MEAN) + np.array(STD) * rng.normal(size=(h, w, 3)))
      erased = pixels.copy()
      erased[top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
      return erased
  return pixels
