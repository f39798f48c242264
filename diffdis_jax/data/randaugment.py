"""RandAugment (Cubuk et al. 2019) in PIL, as torchvision and as timm do it, and timm's random erasing.

Both sample from one table of operations. timm's `rand-m9-mstd0.5-inc1` and its like do each operation half of the time,
sample its strength, turn by bicubic resampling, and fill with a colour what is uncovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

MAGNITUDES = 31  # of torchvision's operations, 0 the weakest; 9 is customary
LARGEST, PROBABILITY = 10.0, 0.5  # timm's largest magnitude, and how often an operation that is sampled is done
# Of CLIP's training images, of 255: what turns uncover, and the noise that erases.
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
FILL = tuple(round(255 * value) for value in MEAN)
ERASED, ERASED_RATIO, TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


class Warp(NamedTuple):
  """How an image is turned or moved."""

  resample: Image.Resampling  # the filter that samples pixels
  fill: tuple[int, ...] | None  # the colour of what is uncovered, None for black


NEAREST, BICUBIC = Warp(Image.Resampling.NEAREST, None), Warp(Image.Resampling.BICUBIC, FILL)
Operation = Callable[[Image.Image, float, Warp], Image.Image]


def _affine(image: Image.Image, warp: Warp, *inverse: float) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, inverse, warp.resample, fillcolor=warp.fill)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
  return lambda image, change, _: kind(image).enhance(1.0 + change)


def _solarize_add(image: Image.Image, add: float, _: Warp) -> Image.Image:
  return image.point([min(255, value + int(add)) if value < 128 else value for value in range(256)] * 3)


# name -> what it does to an image by an amount: a slope, pixels, degrees, a relative change, bits or a threshold.
OPERATIONS: dict[str, Operation] = {
  "Identity": lambda image, _, warp: image,
  "ShearX": lambda image, slope, warp: _affine(image, warp, 1, slope, 0, 0, 1, 0),
  "ShearY": lambda image, slope, warp: _affine(image, warp, 1, 0, 0, slope, 1, 0),
  "TranslateX": lambda image, pixels, warp: _affine(image, warp, 1, 0, -pixels, 0, 1, 0),
  "TranslateY": lambda image, pixels, warp: _affine(image, warp, 1, 0, 0, 0, 1, -pixels),
  "Rotate": lambda image, degrees, warp: image.rotate(degrees, warp.resample, fillcolor=warp.fill),
  "Brightness": _enhance(ImageEnhance.Brightness),
  "Color": _enhance(ImageEnhance.Color),
  "Contrast": _enhance(ImageEnhance.Contrast),
  "Sharpness": _enhance(ImageEnhance.Sharpness),
  "Posterize": lambda image, bits, _: ImageOps.posterize(image, int(bits)),
  "Solarize": lambda image, threshold, _: ImageOps.solarize(image, math.ceil(threshold)),
  "AutoContrast": lambda image, _, warp: ImageOps.autocontrast(image),
  "Equalize": lambda image, _, warp: ImageOps.equalize(image),
  "Invert": lambda image, _, warp: ImageOps.invert(image),
  "SolarizeAdd": _solarize_add,
}
# Those of torchvision, in its order, with the amount at the largest magnitude; `SIGNED` ones are done to either side.
TORCHVISION = {"Identity": 0.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331}
TORCHVISION |= {"Rotate": 30.0, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9}
TORCHVISION |= {"Posterize": 4.0, "Solarize": 0.0, "AutoContrast": 0.0, "Equalize": 0.0}
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
# Those of timm, in its order: the amount at a level from 0, or of SIGNED ones from -1, to 1.
# In both tables a translation is a fraction of the side.
TIMM: dict[str, Callable[[float], float]] = {
  **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda level: level),
  "Rotate": lambda level: 30 * level,
  "Posterize": lambda level: 4 - int(level * 4),
  "Solarize": lambda level: 256 - min(256, int(level * 256)),
  "SolarizeAdd": lambda level: min(128, int(level * 110)),
  **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), lambda level: max(-0.9, 0.9 * level)),
  **dict.fromkeys(("ShearX", "ShearY"), lambda level: 0.3 * level),
  **dict.fromkeys(("TranslateX", "TranslateY"), lambda level: -0.45 * level),
}


def _side(name: str, image: Image.Image) -> int:
  return {"TranslateX": image.width, "TranslateY": image.height}.get(name, 1)


def torchvision_amount(name: str, magnitude: int, image: Image.Image) -> float:
  """Return an operation's amount at a magnitude, without sign."""
  if name == "Posterize":
    return float(8 - round(magnitude / ((MAGNITUDES - 1) / 4)))
  # Rounded as torch.linspace does, in single precision from the nearer end: thresholds of levels depend on it.
  first = np.float32(255.0 if name == "Solarize" else 0.0)
  last = np.float32(TORCHVISION[name] * _side(name, image))
  step = (last - first) / np.float32(MAGNITUDES - 1)
  if magnitude < MAGNITUDES // 2:
    amount = float(first + step * np.float32(magnitude))
  else:
    amount = float(last - step * np.float32(MAGNITUDES - 1 - magnitude))
  return float(int(amount)) if name.startswith("Translate") else amount


def torchvision_randaugment(
  image: Image.Image, rng: np.random.Generator, *, operations: int, magnitude: int
) -> Image.Image:
  """Apply so many operations, sampled uniformly, one after the other, each to either side where it has two."""
  for _ in range(operations):
    name = list(TORCHVISION)[rng.integers(len(TORCHVISION))]
    amount = torchvision_amount(name, magnitude, image)
    if name in SIGNED and rng.random() < 0.5:
      amount = -amount
    image = OPERATIONS[name](image, amount, NEAREST)
  return image


def timm_randaugment(
  image: Image.Image, rng: np.random.Generator, *, operations: int, magnitude: float, deviation: float
) -> Image.Image:
  """Sample so many operations uniformly, and do each of them half of the time, at a strength that is normal with mean
  `magnitude` and this `deviation`, cut to 0 ... LARGEST."""
  for number in rng.integers(len(TIMM), size=operations):
    if rng.random() >= PROBABILITY:
      continue
    name = list(TIMM)[number]
    level = float(np.clip(rng.normal(magnitude, deviation), 0.0, LARGEST)) / LARGEST
    if name in SIGNED and rng.random() < 0.5:
      level = -level
    image = OPERATIONS[name](image, TIMM[name](level) * _side(name, image), BICUBIC)
  return image


def erase(
  pixels: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, *, probability: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Replace a random box by noise with this probability (Zhong et al., 2020). Its area and ratio are timm's. Each value
  is normal, as CLIP's training images; timm's, sampled after normalisation, is not cut to 0 ... 255."""
  if rng.random() >= probability:
    return pixels
  height, width = pixels.shape[:2]
  for _ in range(TRIES):
    area = rng.uniform(*ERASED) * height * width
    ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if h < height and w < width:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      noise = 255 * (np.array(MEAN) + np.array(STD) * rng.normal(size=(h, w, 3)))
      erased = pixels.copy()
      erased[top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
      return erased
  return pixels
