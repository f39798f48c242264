import threading

import ml_dtypes
import numpy as np
import pytest
from absl import flags

from diffdis_jax.config.data import Loading
from diffdis_jax.data import records, sources
from diffdis_jax.data.loader import ROWS, SUBSTITUTED, Substitutions, train_loader
from diffdis_jax.data.prepare import latents, parts, write
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.errors import UserError
from tests.raw_pairs import picture, write_pairs

N, VIEWS = 12, 3


def encode(images: np.ndarray) -> np.ndarray:
  """Stand in for the autoencoder: return corner pixels as the mean, and -mean - 10 as the log-variance."""
  corners = images[:, ::7, ::7, :2].astype(np.float32)
  return np.concatenate([corners, -corners - 10], -1).astype(ml_dtypes.bfloat16)


STAGE = dict(
  encode=encode,
  shape=(2, 2, 4),
  image_size=8,
  views=VIEWS,
  augmentation=Augmentation(crop="random_resized", crop_scale=(0.5, 0.6)),
  fingerprint="1.5",
)


@pytest.fixture
def data(tmp_path, monkeypatch):
  """Prepare twelve pairs, and make the image of the first unreadable."""
  write_pairs(tmp_path / "raw", N, size=(12, 12))
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "data")
  read = records.read_image
  first = picture(0, size=(12, 12))

  def read_all_but_the_first(image, **how):
    if image == first:
      raise records.Unusable("corrupt image")
    return read(image, **how)

  monkeypatch.setattr(records, "read_image", read_all_but_the_first)
  monkeypatch.setattr(latents, "CHUNK", 6)
  return tmp_path / "data"


def prepare(data, out, **changes):
  make = lambda folder: latents.LatentStage(folder, **{**STAGE, **changes})
  return write.prepare(latents.find_parts(data), out, data_set=latents.data_set(data), make_stage=make)


def test_latents_are_written_and_read_back(data, tmp_path, monkeypatch):
  """The next images are decoded while the network encodes the earlier ones."""
  decoded, read = threading.Semaphore(0), records.read_image
  ahead = iter([4, 2, 2, 2, 2, 0])  # images decoded since the last call; a chunk has two images

  def counted(image, **how):
    decoded.release()
    return read(image, **how)

  def waiting(images):
    assert all(decoded.acquire(timeout=10) for _ in range(next(ahead)))
    return encode(images)

  monkeypatch.setattr(records, "read_image", counted)
  reports = prepare(data, tmp_path / "out", encode=waiting)
  assert (reports["train"].pairs, reports["train"].skipped) == (VIEWS * (N - 1), {"corrupt image": 1})
  source = sources.open_source(name="latents", path=tmp_path / "out", image_size=8)
  described = sources.read(name="latents", path=tmp_path / "out", image_size=8).describe()
  assert described.endswith(f"split train: {N - 1} images, views of each: {VIEWS}")
  assert len(source) == N - 1 and source.views == VIEWS and source.shape == (2, 2, 4)
  assert source.facts["image_size"] == 8 and source.facts["augmentation"]["crop"] == "random_resized"
  seen = set()
  for i in range(N - 1):
    assert (source[i]["caption"], source[i]["key"]) == (f"{i + 1}", f"0/{i + 1:03d}")
    for k in range(VIEWS):
      moments = source.read(i, k)["moments"]
      assert moments.dtype == ml_dtypes.bfloat16 and moments.shape == (2, 2, 4)
      np.testing.assert_array_equal(moments[..., 2:], (-moments[..., :2].astype(np.float32) - 10).astype(moments.dtype))
      seen.add(moments.tobytes())
  assert len(seen) == VIEWS * (N - 1)


def test_latents_keep_the_licences_of_their_images(data, tmp_path):
  (data / "LICENSES.md").write_text("CC-BY-4.0, by Zoë\n", encoding="utf-8")
  prepare(data, tmp_path / "out")
  assert (tmp_path / "out" / "LICENSES.md").read_text(encoding="utf-8") == "CC-BY-4.0, by Zoë\n"
  (data / "LICENSES.md").unlink()
  prepare(data, tmp_path / "without")
  assert not (tmp_path / "without" / "LICENSES.md").exists()


def test_batches_draw_a_view_each_time(data, tmp_path):
  prepare(data, tmp_path / "out")
  source = sources.open_source(name="latents", path=tmp_path / "out", image_size=8)
  iterator = train_loader(
    source, tokenizer=Tokenizer(8), batch_size=N - 1, image_size=8, seed=0, loading=Loading(num_threads=0)
  )
  batches = [next(iterator) for _ in range(8)]
  for batch in batches:
    assert batch.keys() == {"mean", "log_variance", "tokens", SUBSTITUTED, ROWS}
    assert batch["mean"].dtype == ml_dtypes.bfloat16 and batch["mean"].shape == (N - 1, 2, 2, 2)
    assert len({tuple(row) for row in batch["tokens"]}) == N - 1
  drawn = {row.tobytes() for batch in batches for row in batch["mean"]}
  assert len(drawn) > 2 * (N - 1)


def test_latents_in_the_place_of_images_are_refused_and_the_other_way_round(data, tmp_path):
  with pytest.raises(UserError, match="holds no latents; write them with"):
    sources.open_source(name="latents", path=data, image_size=8)
  prepare(data, tmp_path / "out")
  with pytest.raises(UserError, match="holds latents already; name the data set of images"):
    latents.find_parts(tmp_path / "out")
  with pytest.raises(UserError, match="holds latents, not images; train from it with data.name=latents"):
    sources.open_source(name="pairs", path=tmp_path / "out", image_size=8)


def encode_with_a_nan(images: np.ndarray) -> np.ndarray:
  moments = encode(images)
  moments[1, 0, 0, 3] = np.nan
  return moments


def test_views_that_are_not_finite_are_not_prepared(data, tmp_path):
  report = prepare(data, tmp_path / "out", encode=encode_with_a_nan)["train"]
  # In each chunk of two images the first has a NaN and loses all its views. The very first image is unreadable.
  assert report.skipped == {"corrupt image": 1, "numbers that are not finite": 6}
  assert len(sources.open_source(name="latents", path=tmp_path / "out", image_size=8)) == N - 7 == report.pairs // VIEWS


@pytest.mark.parametrize("workers", [0, 1])
def test_stored_numbers_that_are_not_finite_are_substituted_and_named(data, tmp_path, monkeypatch, caplog, workers):
  """Another program may have written such numbers."""
  with monkeypatch.context() as patched:
    patched.setattr(latents, "is_finite", lambda *_: True)
    prepare(data, tmp_path / "out", encode=encode_with_a_nan)
  source = sources.open_source(name="latents", path=tmp_path / "out", image_size=8)
  flags.FLAGS.mark_as_parsed()
  how = Loading(num_threads=0, num_workers=workers)
  iterator = train_loader(source, tokenizer=Tokenizer(8), batch_size=N - 1, image_size=8, seed=0, loading=how)
  substitutions = Substitutions()
  for _ in range(9):
    batch = substitutions.take(next(iterator))
    assert np.isfinite(batch["mean"].astype(np.float32)).all()
    assert np.isfinite(batch["log_variance"].astype(np.float32)).all()
  total = substitutions.report()[SUBSTITUTED]
  assert total > 0 and f"records that cannot be used: {total} numbers that are not finite" in caplog.text
  iterator.close()
