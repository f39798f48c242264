"""RandAugment (Cubuk et al. 2019) in PIL, operation by operation what torchvision's RandAugment does to a PIL image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDES = 31  # of each operation, 0 the weakest; 9 is customary
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, inverse: tuple[float, ...]) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
  return lambda image, amount: kind(image).enhance(1.0 + amount)


# name -> what it does with a strength. Uncovered pixels are black.
OPERATIONS: dict[str, Operation] = {
  "Identity": lambda image, _: image,
  "ShearX": lambda image, amount: _affine(image, (1, amount, 0, 0, 1, 0)),
  "ShearY": lambda image, amount: _affine(image, (1, 0, 0, amount, 1, 0)),
  "TranslateX": lambda image, pixels: _affine(image, (1, 0, -int(pixels), 0, 1, 0)),
  "TranslateY": lambda image, pixels: _affine(image, (1, 0, 0, 0, 1, -int(pixels))),
  "Rotate": lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST),
  "Brightness": _enhance(ImageEnhance.Brightness),
  "Color": _enhance(ImageEnhance.Color),
  "Contrast": _enhance(ImageEnhance.Contrast),
  "Sharpness": _enhance(ImageEnhance.Sharpness),
  "Posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
  "Solarize": lambda image, threshold: ImageOps.solarize(image, math.ceil(threshold)),
  "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
  "Equalize": lambda image, _: ImageOps.equalize(image),
}
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
_RANGES = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9}
_RANGES |= {"Sharpness": 0.9}


def strength(name: str, magnitude: int, size: tuple[int, int]) -> float:
  """An operation's strength at a magnitude, without sign, for an image of this width and height."""
  if name in ("TranslateX", "TranslateY"):
    return _between(0.0, 150 / 331 * size[name == "TranslateY"], magnitude)
  if name == "Posterize":
    return float(8 - round(magnitude / ((MAGNITUDES - 1) / 4)))
  if name == "Solarize":
    return _between(255.0, 0.0, magnitude)
  return _between(0.0, _RANGES.get(name, 0.0), magnitude)


def _between(start: float, end: float, magnitude: int) -> float:
  """Space numbers evenly, rounded as torch.linspace does, in single precision from the nearer end: thresholds of whole
  levels depend on it."""
  first, last = np.float32(start), np.float32(end)
  step = (last - first) / np.float32(MAGNITUDES - 1)
  if magnitude < MAGNITUDES // 2:
    return float(first + step * np.float32(magnitude))
  return float(last - step * np.float32(MAGNITUDES - 1 - magnitude))


def randaugment(image: Image.Image, rng: np.random.Generator, *, operations: int, magnitude: int) -> Image.Image:
  """Applies so many operations, sampled uniformly, one after the other, each to either side where it has two."""
  for _ in range(operations):
    name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
    amount = strength(name, magnitude, image.size)
    if name in SIGNED and rng.random() < 0.5:
      amount = -amount
    image = OPERATIONS[name](image, amount)
  return image
