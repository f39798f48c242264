"""Measure FID with a whole network and a whole Inception, both with random weights."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffdis_jax.config import Run
from diffdis_jax.data import shapes
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals.fid import distances, features
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import sharding
from diffdis_jax.run import restore
from tests.steps import config_of, network_of

pytest_plugins = ("tests.untrained", "tests.inception_weights", "tests.command_runs")


def theirs(file: pathlib.Path, images: np.ndarray) -> np.ndarray:
  network = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(file)).eval()
  with torch.no_grad():
    return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
  assert ours.shape == expected.shape
  assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_the_features_and_figures_equal_torch_fidelitys(run, inception_file, monkeypatch):
  # The distance itself takes seconds at this width, and has its own tests.
  monkeypatch.setattr(distances, "frechet", lambda a, b: float(np.square(a.mean - b.mean).sum()))
  config = config_of(run)
  data = {"name": "shapes", "split": "test", "image_size": 32, "num_images": 6}
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  inference = Inference(network_of(config), Run.of(config).inference, mesh=mesh, batch_size=3)
  params = restore.restore_params(run, abstract=inference.abstract_params())
  evaluation, images = evals.create("fid", data=data, inception=str(inception_file)), []
  generate, measure = inference.generate, evaluation._measure
  monkeypatch.setattr(inference, "generate", lambda *given: images.append(generate(*given)) or images[-1])
  monkeypatch.setattr(evaluation, "_measure", lambda features: images.append(features) or measure(features))
  metrics = evaluation.run(inference, params)
  drawn = theirs(inception_file, images[0])
  assert len(images[0]) == 6
  assert_close(np.concatenate(images[1]), drawn)
  source = shapes.Shapes(split="test", image_size=32, num_images=6)
  squares = [features.square(Image.fromarray(source[i]["image"]), 32) for i in range(6)]
  real = theirs(inception_file, np.stack(squares))
  assert_close(evaluation.real.features, real)
  assert metrics["num_images"] == 6
  assert metrics["fid"] == pytest.approx(np.square(drawn.mean(0) - real.mean(0)).sum(), rel=1e-3)
  assert metrics["kid"] == pytest.approx(distances.kernel(drawn, real).mean, rel=1e-3)
  protocol = evaluation.protocol(inference)
  assert protocol["dtype"] == config.model.dtype and protocol["reference"]["num_images"] == 6
