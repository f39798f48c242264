import numpy as np
import pytest
from PIL import Image

from diffdis_jax.evals import samples


def noise_images(n, size=8):
  images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
  return images, [f"image number {i}" for i in range(n)]


@pytest.mark.parametrize("size", [8, 32, 64, 200])
def test_every_pixel_of_every_image_is_in_the_grid(tmp_path, size):
  images, captions = noise_images(5, size)
  samples.save_grid(images, captions, tmp_path / "grid.png", columns=3)
  with Image.open(tmp_path / "grid.png") as opened:
    grid = np.asarray(opened)
  factor = max(1, round(samples.TILE / size))
  step = size * factor + samples.GAP
  assert grid.shape[1] == 3 * step + samples.GAP
  row_height = (grid.shape[0] - samples.GAP) // 2
  for i, image in enumerate(images):
    y, x = samples.GAP + i // 3 * row_height, samples.GAP + i % 3 * step
    tile = grid[y : y + size * factor, x : x + size * factor]
    np.testing.assert_array_equal(tile, image.repeat(factor, 0).repeat(factor, 1))
    below = grid[y + size * factor : y + row_height - samples.GAP, x : x + size * factor]
    assert (below < 128).any() and below.shape[0] >= samples.LINE_HEIGHT


def test_counts_must_agree(tmp_path):
  images, captions = noise_images(3)
  with pytest.raises(ValueError, match="3 images and 2 captions"):
    samples.save_grid(images, captions[:2], tmp_path / "grid.png")
  with pytest.raises(ValueError, match="0 images"):
    samples.save_grid(images[:0], [], tmp_path / "grid.png")
  assert not list(tmp_path.iterdir())
