"""Test that JPEGs decoded at a fraction of their size give the same views and errors, and never too few pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.config.data import CROPS
from diffdis_jax.data import records, transforms
from diffdis_jax.data.transforms import Augmentation, augment, decode, needed_side
from diffdis_jax.evals import base
from tests.raw_pairs import encode

ORIENTATION = 0x0112


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
  """Draw a background of smooth colours, with sharp-edged objects in front."""
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
  pixels = 0.8 * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32) + 20
  y, x = np.mgrid[:height, :width]
  pixels[np.hypot(x - 0.4 * width, y - 0.6 * height) < 0.2 * height] *= 0.7
  pixels[(np.abs(x - 0.7 * width) < 0.1 * width) & (np.abs(y - 0.3 * height) < 0.15 * height)] += 30
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def jpeg(width: int, height: int, mode: str = "RGB", **options) -> bytes:
  return encode(scene(width, height, mode), "JPEG", quality=92, **options)


def exif_of(orientation: int) -> Image.Exif:
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  return exif


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Return the peak signal-to-noise ratio in decibels."""
  error = np.square(ours.astype(float) - theirs.astype(float)).mean()
  return 10 * math.log10(255**2 / max(error, 1e-9))


def views(data: bytes, size: int, how: Augmentation, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
  """Return the view by reduced decoding, the view by full decoding, and the factor."""
  reduced = decode(data, at_least=needed_side(size, how))
  return (
    augment(reduced, np.random.default_rng(seed), size=size, how=how),
    augment(decode(data), np.random.default_rng(seed), size=size, how=how),
    reduced.factor,
  )


@pytest.mark.parametrize(
  ("width", "height", "factor"),
  [(512, 512, 2), (640, 512, 2), (1025, 769, 2), (1023, 1537, 2), (1031, 1400, 4), (2100, 2049, 8), (511, 900, 1)],
)
@pytest.mark.parametrize("crop", ["centre", "random"])
def test_views_equal_those_of_full_decoding(width, height, factor, crop):
  ours, theirs, reduced_by = views(jpeg(width, height), 256, Augmentation(crop=crop, flip=True))
  assert reduced_by == factor and ours.shape == (256, 256, 3)
  assert psnr(ours, theirs) >= 45


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1301, 1103)])
def test_boxes_of_random_size_lie_in_the_same_place(width, height):
  data, how = jpeg(width, height), Augmentation(crop="random_resized", crop_scale=(0.5, 1.0))
  for seed in range(8):
    ours, theirs, factor = views(data, 256, how, seed)
    assert factor == 2 and psnr(ours, theirs) >= 45


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(640, 512), (645, 515)])
def test_turned_images_stay_turned(orientation, width, height):
  data = jpeg(width, height, exif=exif_of(orientation))
  reduced = decode(data, at_least=128)
  assert (reduced.width, reduced.height) == decode(data).image.size
  assert psnr(*views(data, 128, Augmentation())[:2]) >= 42  # a small view has more edges per pixel


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_cmyk_views_equal_those_of_full_decoding(mode, progressive):
  data = jpeg(640, 515, mode, progressive=progressive)
  ours, theirs, factor = views(data, 256, Augmentation())
  assert factor == 2 and psnr(ours, theirs) >= 45


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_and_arrays_are_decoded_in_full(kind):
  data = encode(scene(96, 80), kind)
  for image in (data, np.asarray(scene(96, 80))):
    decoded = decode(image, at_least=1)
    assert decoded.factor == 1
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(decode(image).image))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("left", [0.3, 0.7, 0.97])
def test_a_file_that_is_cut_off_raises(progressive, left):
  data = jpeg(512, 512, progressive=progressive)
  for at_least in (None, 256, 1):
    with pytest.raises(records.Unusable, match="corrupt image"):
      records.read_image(data[: int(left * len(data))], at_least=at_least)


def test_never_fewer_pixels_than_are_wanted():
  """Sample the image's size, the augmentation and the crop's box at random."""
  rng = np.random.default_rng(0)
  for _ in range(150):
    width, height = (int(side) for side in np.exp(rng.uniform(np.log(8), np.log(900), 2)))
    size, low = int(rng.integers(4, 200)), float(rng.uniform(0.05, 1.0))
    crop = CROPS[rng.integers(3)]
    ratio = tuple(sorted(np.exp(rng.uniform(-0.7, 0.7, 2)).tolist()))
    how = Augmentation(crop=crop, crop_scale=(low, 1.0), crop_ratio=ratio, zoom=float(rng.choice([0, 0.3])))
    decoded = decode(jpeg(width, height), at_least=needed_side(size, how))
    assert decoded.image.size == (-(-width // decoded.factor), -(-height // decoded.factor))
    if decoded.factor == 1:
      continue
    assert min(width, height) / decoded.factor >= size * (1 + how.zoom)
    if crop == "random_resized":
      for seed in range(5):
        box = transforms.draw_box(
          width, height, np.random.default_rng(seed), scale=how.crop_scale, ratio=how.crop_ratio
        )
        assert min(box.width, box.height) / decoded.factor >= size * (1 + how.zoom)


def test_evaluations_decode_in_full():
  data = jpeg(640, 515)
  full = np.asarray(transforms.resize(decode(data), 256))
  np.testing.assert_array_equal(base.to_square(data, 256), full)
  # A crop of 224 px of 256 is cut out of a square of 256 px.
  np.testing.assert_array_equal(base.to_square(data, 224, 0.875), full[16:240, 16:240])


def test_reduced_decoding_can_be_turned_off():
  off = Augmentation(reduced_decoding=False)
  assert needed_side(256, off) is None and needed_side(256, Augmentation(), off) is None
  assert needed_side(256, Augmentation(), Augmentation(zoom=0.5)) == 384
