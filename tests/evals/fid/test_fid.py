"""Test the evaluation around the network: what is sampled, compared and refused. The generator and the features are
stand-ins, which always give the same for a prompt and a noise."""

from __future__ import annotations

import hashlib
import json
import logging
import types

import jax
import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import fid as fid_module
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals.fid import distances, features, reference
from diffdis_jax.interop.inception import Weights
from diffdis_jax.parallel import sharding

WIDTH, SIDE, PART, COUNT = 6, 8, 8, 36
DATA = {"name": "pairs", "path": "somewhere", "split": "val", "image_size": SIDE}


class Source:
  """Gives records with two captions, and images of another size than the model's."""

  def __init__(self, n: int = 60):
    self.n, self.broken = n, False

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> dict:
    image = np.random.default_rng([7, i]).integers(0, 256, (12, 10, 3), np.uint8)
    return {"image": b"broken" if self.broken else image, "caption": f"{i}", "captions": [f"a {i}", f"the {i}"]}


class Extractor:
  """Combines pixels by positive weights."""

  settings: list[dict] = []

  def __init__(self, params, *, kind, mesh, batch_size, after_batch):
    del params, mesh, after_batch
    self.settings.append({"kind": kind, "batch_size": batch_size})
    self.seen = 0
    self.scale = {"tensorflow": 1.0, "clean": 1.1}[kind]

  def __call__(self, images):
    images = images[np.arange(len(images))]
    assert images.dtype == np.uint8 and images.shape[1:] == (SIDE, SIDE, 3)
    self.seen += len(images)
    # Of whole numbers, so that sums are the same in any order.
    mixing = np.random.default_rng(0).integers(0, 9, (SIDE * SIDE * 3, WIDTH)).astype(np.float64)
    return (self.scale / 1e5 * (images.reshape(len(images), -1) @ mixing)).astype(np.float32)


class Inference:
  """Paints noise over what a prompt's tokens stand for."""

  image_size, max_length, batch_size, aligned = SIDE, 16, PART, False

  def __init__(self, guidance: float = 2.0):
    self.generation_protocol = {"steps": 5, "guidance": guidance, "matmul_precision": "highest"}
    self.network = types.SimpleNamespace(
      image_process=types.SimpleNamespace(schedule="scaled_linear"), model=types.SimpleNamespace(dtype="float32")
    )
    self.mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    self.after_batch = lambda: None
    self.calls, self.images = [], []

  def noise(self, n, seed, *, first=0):
    return np.stack([np.random.default_rng([seed, first + i]).normal(size=(2, 2, 3)) for i in range(n)])

  def generate(self, params, tokens, noise):
    self.calls.append(len(tokens))
    meant = [np.random.default_rng(row.tolist()).integers(0, 200, (SIDE, SIDE, 3)) for row in tokens]
    drawn = noise.repeat(4, axis=1).repeat(4, axis=2) * 20 + np.stack(meant)
    self.images.append(drawn.clip(0, 255).astype(np.uint8))
    return self.images[-1]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
  params = {"p": np.zeros(1, np.float32)}
  read = lambda path: Weights(params, file_sha256=f"file of {path}", sha256=f"tensors of {path}", published=True)
  monkeypatch.setattr(fid_module.inception_file, "read", read)
  monkeypatch.setattr(features, "Extractor", Extractor)
  monkeypatch.setattr(fid_module, "PART", PART)
  monkeypatch.setattr(reference, "WIDTH", WIDTH)
  source = Source()
  monkeypatch.setattr(sources, "open_source", lambda **section: source)
  Extractor.settings = []
  return source


def make(**section) -> fid_module.Fid:
  evaluation = evals.create("fid", **{"data": DATA, "inception": "w.pth", "num_images": COUNT, **section})
  assert isinstance(evaluation, fid_module.Fid)
  return evaluation


def features_of(inference) -> np.ndarray:
  """Return the features of all images that it has generated."""
  extractor = Extractor({}, kind="tensorflow", mesh=None, batch_size=1, after_batch=None)
  return extractor(np.concatenate(inference.images))


def test_the_metrics_are_those_of_the_features(tmp_path):
  evaluation, inference = make(reference=str(tmp_path / "r.npz")), Inference()
  metrics = evaluation.run(inference, {})
  assert inference.calls == [8, 8, 8, 8, 4] and Extractor.settings == [{"kind": "tensorflow", "batch_size": PART}]
  drawn, real = features_of(inference), np.load(tmp_path / "r.npz")["features"]
  assert drawn.shape == (COUNT, WIDTH) and real.shape == (60, WIDTH)
  kid = distances.kernel(drawn, real)
  assert metrics == {
    "fid": distances.frechet(distances.gaussian(drawn), distances.gaussian(real)),
    "kid": kid.mean,
    "kid_std": kid.std,
    "num_images": COUNT,
  }
  assert metrics["fid"] > 0 and kid.subset_size == COUNT


def test_one_caption_each_of_different_records_is_sampled():
  sample = lambda count: fid_module.sample_prompts(Source(40), num_images=count)
  texts, records = zip(*(prompt.split() for prompt in sample(30)), strict=True)
  assert {*texts} == {"a", "the"} and len({*records}) == 30 and [*records] != sorted(records, key=int)
  assert sample(13) == sample(30)[:13]


def test_images_are_the_same_however_many_a_call_has():
  by_rows = {}
  for rows in (PART, 3 * PART + 5):
    inference = Inference()
    inference.batch_size = rows
    by_rows[rows] = make().run(inference, {}), np.concatenate(inference.images)
  assert inference.calls == [3 * PART, COUNT - 3 * PART]
  (metrics, images), (expected, one_by_one) = by_rows[3 * PART + 5], by_rows[PART]
  assert metrics == expected
  np.testing.assert_array_equal(images, one_by_one)


def test_the_real_images_are_cut_and_resized_by_lanczos(stand_ins):
  evaluation = make()
  evaluation.run(Inference(), {})
  square = [features.square(Image.fromarray(stand_ins[i]["image"]), SIDE) for i in range(60)]
  expected = Extractor({}, kind="tensorflow", mesh=None, batch_size=1, after_batch=None)(np.stack(square))
  np.testing.assert_array_equal(evaluation.real.features, expected)


def test_the_protocol_says_all(tmp_path):
  evaluation = make(seed=4, resize="clean", reference=str(tmp_path / "r.npz"))
  inference = Inference()
  evaluation.run(inference, {})
  protocol = evaluation.protocol(inference)
  expected = {
    **{"steps": 5, "guidance": 2.0, "sampler": "ddim", "schedule": "scaled_linear", "image_size": SIDE},
    **{"dtype": "float32", "seed": 4, "num_images": COUNT, "resize": "clean"},
    **{"features": "inception-2015-12-05", "inception_sha256": "file of w.pth", "weights_sha256": "tensors of w.pth"},
    **{"inception_published": True, "kid_subsets": 100, "kid_subset_size": COUNT, "device": "cpu"},
  }
  assert expected.items() <= protocol.items()
  texts = json.dumps(evaluation.prompts)
  assert protocol["prompts_sha256"] == hashlib.sha256(texts.encode()).hexdigest()
  of_real = protocol["reference"]
  assert of_real["name"].endswith("r.npz") and of_real["num_images"] == 60 and len(of_real["sha256"]) == 64
  assert of_real["protocol"]["resampling"] == "lanczos" and of_real["protocol"]["images"] == DATA
  assert "fewer than 10000 images FID is biased upwards" in protocol["note"]
  assert json.loads(json.dumps(protocol)) == protocol


def test_a_reference_is_made_once_and_read_ever_after(tmp_path, stand_ins):
  file = tmp_path / "new" / "r.npz"
  expected = make(reference=str(file)).run(Inference(), {})
  with np.load(file) as content:  # as pytorch-fid reads it
    mean, covariance = content["mu"][:], content["sigma"][:]
    assert mean.dtype == covariance.dtype == np.float64 and covariance.shape == (WIDTH, WIDTH)
    np.testing.assert_allclose(covariance, np.cov(content["features"].astype(np.float64), rowvar=False), rtol=1e-6)
    assert content["num_images"] == 60 and json.loads(str(content["protocol"]))["resize"] == "tensorflow"
  stand_ins.broken = True
  assert make(reference=str(file)).run(Inference(), {}) == expected


def test_statistics_that_do_not_compare(tmp_path):
  file = str(tmp_path / "r.npz")
  make(reference=file).run(Inference(), {})
  for section, message in (
    (dict(resize="clean"), "is of another resize, tensorflow, and this measurement's is clean"),
    (dict(inception="other.pth"), "is of another Inception weights, tensors of w.pth"),
  ):
    with pytest.raises(UserError, match=message):
      make(reference=file, **section)


def test_statistics_of_other_tools(tmp_path, caplog):
  rng = np.random.default_rng(0)
  theirs = rng.random((50, WIDTH))
  np.savez(tmp_path / "r.npz", mu=theirs.mean(0), sigma=np.cov(theirs, rowvar=False))
  with caplog.at_level(logging.WARNING):
    evaluation = make(reference=str(tmp_path / "r.npz"))
  assert "does not say how it was made: its resize is unknown" in caplog.text
  inference = Inference()
  metrics = evaluation.run(inference, {})
  drawn = features_of(inference)
  expected = distances.frechet(distances.gaussian(drawn), distances.gaussian(theirs))
  assert metrics == {"fid": pytest.approx(expected, rel=1e-9), "num_images": COUNT}, "no features, no KID"
  of_real = evaluation.protocol(inference)["reference"]
  assert of_real["protocol"] is None and of_real["num_images"] is None


def arrays(**changes) -> dict[str, np.ndarray]:
  return {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH), **changes}


@pytest.mark.parametrize(
  "content, message",
  [
    (arrays(mu=np.zeros(64), sigma=np.eye(64)), r"has .*'mu': \[64\], 'sigma': \[64, 64\].*; it should be an .npz"),
    (arrays(sigma=np.full((WIDTH, WIDTH), np.nan)), "not finite"),
    (arrays(num_images=np.asarray(1)), "is of 1 images; it takes at least 2"),
    (arrays(features=np.zeros((9, WIDTH + 1))), r"'features': \[9, 7\].*; it should be"),
    (dict(arr_0=np.zeros(3)), "cannot read .* it should be an .npz with mu"),
    (arrays(mu=np.array([{}] * WIDTH, dtype=object)), "cannot read"),
    (arrays(protocol=np.asarray("[1]")), r"'protocol': .*; it should be"),
  ],
)
def test_files_that_are_no_statistics(tmp_path, content, message):
  np.savez(tmp_path / "r.npz", **content)
  with pytest.raises(UserError, match=message) as error:
    make(reference=str(tmp_path / "r.npz"))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(inception=""), "fid needs the weights of Inception, --inception=FILE: weights-inception-2015-12-05"),
    (dict(num_images=1), "num_images is 1[;,]"),
    (dict(num_images=1000), "num_images is 1000, and there are captions for 60"),
    (dict(resize="bilinear"), "resize is 'bilinear'; it must be one of tensorflow, clean"),
    (dict(reference="r.pkl"), "--reference=r.pkl should be an .npz"),
    (dict(images=3), "has no setting 'images'"),
  ],
)
def test_bad_settings(section, message):
  with pytest.raises(UserError, match=message):
    make(**section)
