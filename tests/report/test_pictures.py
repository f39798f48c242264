from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from diffdis_jax.report import page


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  smooth = Image.fromarray(rng.integers(0, 256, (6, 12, 3), dtype=np.uint8)).resize((400, 200))
  for i in range(5):
    smooth.rotate(20 * i).save(folder / f"{i}.png")
  return [epath.Path(folder / f"{i}.png") for i in range(5)]


def decoded(picture):
  head, _, text = picture.uri.partition(",")
  assert head == "data:image/webp;base64"
  return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_that_fit_keep_their_size_and_look_the_same(files):
  found = page.embed_pictures(files, most_bytes=1_000_000)
  for picture, path in zip(found, files, strict=True):
    image = decoded(picture)
    assert image.size == (picture.width, picture.height) == (400, 200)
    difference = np.asarray(image, np.float32) - np.asarray(Image.open(path), np.float32)
    assert np.abs(difference).mean() < 4  # of 255


def test_pictures_become_smaller_until_all_of_them_fit(files):
  whole = sum(len(picture.uri) for picture in page.embed_pictures(files, most_bytes=1_000_000))
  found = page.embed_pictures(files, most_bytes=whole // 3)
  assert sum(len(picture.uri) for picture in found) <= whole // 3
  assert len({(picture.width, picture.height) for picture in found}) == 1 and found[0].width == 2 * found[0].height


def test_a_file_that_is_no_picture_is_left_out(files, tmp_path):
  (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:500])
  found = page.embed_pictures(
    [files[0], epath.Path(tmp_path / "cut.png"), epath.Path(tmp_path / "none")], most_bytes=10**6
  )
  assert [picture is None for picture in found] == [False, True, True]
  assert page.embed_pictures([], most_bytes=0) == []
