import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data.transforms import (
  Augmentation,
  augment,
  decode,
  draw_box,
  random_affine,
  random_resized_crop,
  resize,
)
from tests.raw_pairs import encode


def noise(height: int = 24, width: int = 24, channels: int = 3) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_decode_rgb_exactly():
  pixels = noise()
  np.testing.assert_array_equal(np.asarray(decode(encode(Image.fromarray(pixels))).image), pixels)
  np.testing.assert_array_equal(
    np.asarray(decode(encode(Image.fromarray(pixels), "WEBP", lossless=True)).image), pixels
  )
  np.testing.assert_array_equal(np.asarray(decode(pixels).image), pixels)


def test_decode_composites_transparency_on_white():
  pixels = noise(channels=4)
  alpha = pixels[..., 3:].astype(float) / 255
  expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
  result = np.asarray(decode(encode(Image.fromarray(pixels))).image)
  assert result.shape == (24, 24, 3)
  np.testing.assert_allclose(result, expected, atol=1.01)


def test_decode_palette_with_transparency():
  image = Image.new("P", (2, 1))
  image.putpalette([255, 0, 0, 0, 0, 255])
  image.putpixel((1, 0), 1)
  assert np.asarray(decode(encode(image)).image).tolist() == [[[255, 0, 0], [0, 0, 255]]]
  assert np.asarray(decode(encode(image, transparency=0)).image).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_decode_grey():
  grey = noise()[..., 0]
  for pixels in (grey, grey.astype(np.uint16) * 257):
    result = np.asarray(decode(encode(Image.fromarray(pixels))).image)
    np.testing.assert_array_equal(result, np.repeat(grey[..., None], 3, -1))
  for floats in (grey / np.float32(255), grey * np.float32(257)):  # values up to 1, or up to 65535
    result = np.asarray(decode(encode(Image.fromarray(floats), "TIFF")).image)
    np.testing.assert_array_equal(result, np.repeat(grey[..., None], 3, -1))
  transparent = Image.merge("LA", (Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 0)))
  assert np.asarray(decode(encode(transparent)).image).tolist() == [[[255] * 3]]


def test_decode_cmyk_and_exif():
  red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
  np.testing.assert_allclose(np.asarray(decode(encode(red, "JPEG")).image)[8, 8], (255, 0, 0), atol=3)
  exif = Image.Exif()
  exif[0x0112] = 6  # show the image rotated by 90 degrees clockwise
  pixels = noise(16, 24)
  turned = np.asarray(decode(encode(Image.fromarray(pixels), exif=exif)).image)
  np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.filterwarnings("ignore:Metadata Warning", "ignore:Corrupt EXIF", "ignore:Truncated")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turns", [0, 1])
def test_an_image_with_damaged_exif_is_decoded(kind, turns):
  """Some cameras and editors write wrong EXIF, although the pixels and the entry of the orientation are right."""
  entry = struct.pack("<HHL2H", 0x0112, 3, 1, 6, 0)
  odd = struct.pack("<HHLf", 0x0131, 11, 1, 1.5)  # this tag should hold a text, and holds a float
  exif = b"II*\0" + struct.pack("<LH", 8, 2) + entry + odd + bytes(4) if turns else b"garbage"
  image = Image.fromarray(noise(16, 24))
  data = encode(image, kind, exif=b"Exif\0\0" + exif, **({"dpi": (72, 72)} if kind == "JPEG" else {}))
  for at_least in (None, 2):
    shown = decode(data, at_least=at_least)
    assert (shown.width, shown.height) == ((16, 24) if turns else (24, 16))
  with Image.open(io.BytesIO(data)) as stored:
    np.testing.assert_array_equal(np.asarray(decode(data).image), np.rot90(np.asarray(stored.convert("RGB")), -turns))


@pytest.mark.parametrize("broken", [b"", b"not an image", encode(Image.fromarray(noise()))[:-400]])
def test_decode_refuses_broken_bytes(broken):
  with pytest.raises((OSError, SyntaxError, ValueError)):
    decode(broken)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_decode_refuses_floats_that_are_not_finite(value):
  """Maps have such values where data are missing; scaling by them would make all other pixels black."""
  pixels = np.full((8, 8), 0.5, np.float32)
  pixels[3, 3] = value
  with pytest.raises(ValueError, match="not finite"):
    decode(encode(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize(
  "field",
  [
    {"crop": "random"},
    {"crop": "random_resized"},
    {"flip": True},
    {"shift": 0.2},
    {"zoom": 0.3},
    {"rotation": 20.0},
    {"brightness": 0.4},
    {"contrast": 0.4},
    {"saturation": 0.9},
    {"hue": 0.3},
  ],
)
def test_each_field_varies_the_image_by_the_generator_alone(field):
  image, how = Image.fromarray(noise(40, 30)), Augmentation(**field)
  views = [augment(image, np.random.default_rng(seed), size=16, how=how) for seed in [*range(8), 0]]
  assert all(view.shape == (16, 16, 3) and view.dtype == np.uint8 for view in views)
  assert len({view.tobytes() for view in views[:8]}) > 1
  np.testing.assert_array_equal(views[0], views[8])


def test_flip_mirrors_half_of_the_images():
  image, rng = Image.fromarray(noise()), np.random.default_rng(0)
  pixels = np.asarray(image)
  views = [augment(image, rng, size=24, how=Augmentation(flip=True)) for _ in range(200)]
  flipped = sum(np.array_equal(view, pixels[:, ::-1]) for view in views)
  assert 70 < flipped < 130
  assert flipped + sum(np.array_equal(view, pixels) for view in views) == 200


def test_the_random_square_equals_stable_diffusions():
  """Stable Diffusion resizes the short side and then crops; a crop at a whole pixel has the same pixels here."""
  functional = pytest.importorskip("torchvision.transforms.functional")
  image = Image.fromarray(noise(48, 96))
  whole = functional.resize(image, 16, functional.InterpolationMode.BICUBIC)
  for left in range(17):
    expected = functional.crop(whole, 0, left, 16, 16)
    difference = np.asarray(resize(image, 16, place=left / 16)).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
  ("width", "height", "scale", "ratio"),
  [
    (640, 480, (0.08, 1.0), (3 / 4, 4 / 3)),
    (480, 640, (0.5, 1.0), (3 / 4, 4 / 3)),
    (500, 100, (0.3, 0.9), (0.8, 2.0)),  # often no try fits
    (7, 5, (0.1, 1.0), (0.5, 2.0)),
  ],
)
def test_boxes_have_the_distribution_of_torchvisions(width, height, scale, ratio, seed):
  torch = pytest.importorskip("torch")
  transforms, stats = pytest.importorskip("torchvision.transforms"), pytest.importorskip("scipy.stats")
  image, rng, n = Image.new("RGB", (width, height)), np.random.default_rng(seed), 3000
  with torch.random.fork_rng(devices=[]):
    torch.manual_seed(seed)
    drawn = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
  theirs = np.array([(left, top, w, h) for top, left, h, w in drawn])
  boxes = [draw_box(width, height, rng, scale=scale, ratio=ratio) for _ in range(n)]
  ours = np.array([(box.left, box.top, box.width, box.height) for box in boxes])
  assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (width, height)).all()
  for measure in (
    *(lambda boxes, i=i: boxes[:, i] for i in range(4)),
    lambda boxes: boxes[:, 2] * boxes[:, 3],
    lambda boxes: boxes[:, 2] / boxes[:, 3],
    lambda boxes: boxes[:, 0] / np.maximum(1, width - boxes[:, 2]),
    lambda boxes: boxes[:, 1] / np.maximum(1, height - boxes[:, 3]),
  ):
    assert stats.ks_2samp(measure(ours), measure(theirs), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(64, 48), (37, 53), (16, 16)])
def test_the_pixels_of_a_resized_crop_equal_torchvisions(width, height):
  functional = pytest.importorskip("torchvision.transforms.functional")
  image, how = Image.fromarray(noise(height, width)), dict(scale=(0.2, 1.0), ratio=(0.5, 2.0))
  for seed in range(20):
    box = draw_box(width, height, np.random.default_rng(seed), **how)
    expected = functional.resized_crop(
      image, box.top, box.left, box.height, box.width, [16, 16], functional.InterpolationMode.BICUBIC, antialias=True
    )
    view = random_resized_crop(image, np.random.default_rng(seed), size=16, **how)
    np.testing.assert_array_equal(np.asarray(view), np.asarray(expected))


class Ends(np.random.Generator):
  """A generator that returns an end of each range: the upper end where `upper` is true, or else the lower."""

  def __init__(self, *upper: bool):
    super().__init__(np.random.PCG64(0))
    self.upper = [*upper]

  def uniform(self, low=0.0, high=1.0, size=None):
    samples = [high if self.upper.pop(0) else low for _ in range(size or 1)]
    return np.array(samples) if size else samples[0]


@pytest.mark.parametrize("upper", [*itertools.product((False, True), repeat=4)])
def test_the_largest_rotation_zoom_and_shift_equal_torchvisions(upper):
  functional = pytest.importorskip("torchvision.transforms.functional")
  image = Image.fromarray(noise(30, 40))
  ours = random_affine(image, Ends(*upper), shift=0.1, zoom=0.5, rotation=20.0)
  turn, zoom, right, down = (1 if is_upper else -1 for is_upper in upper)
  how = dict(angle=20.0 * turn, translate=[4.0 * right, 3.0 * down], scale=1.5**zoom, shear=[0.0])
  bicubic = functional.InterpolationMode.BICUBIC
  expected = functional.affine(image, **how, interpolation=bicubic, fill=[255] * 3)
  assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("upper", [False, True])
def test_the_largest_changes_of_colour_equal_torchvisions(upper):
  """The changes are applied one after another; for a hue of 0.2 both libraries round alike."""
  functional = pytest.importorskip("torchvision.transforms.functional")
  image, sign = Image.fromarray(noise()), 1 if upper else -1
  how = Augmentation(brightness=0.4, contrast=0.3, saturation=0.6)
  expected = functional.adjust_brightness(image, 1 + 0.4 * sign)
  expected = functional.adjust_saturation(functional.adjust_contrast(expected, 1 + 0.3 * sign), 1 + 0.6 * sign)
  np.testing.assert_array_equal(augment(image, Ends(*[upper] * 3), size=24, how=how), np.asarray(expected))
  expected = functional.adjust_hue(image, 0.2 * sign)
  ours = augment(image, Ends(upper), size=24, how=Augmentation(hue=0.2))
  np.testing.assert_array_equal(ours, np.asarray(expected))
