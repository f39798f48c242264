"""Test how FID's Inception is read: the path of each tensor, the hash, and files of other models."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdis_jax.errors import UserError
from diffdis_jax.interop import inception

pytest_plugins = ("tests.inception_weights",)


@pytest.fixture(scope="module")
def weights(inception_file) -> inception.Weights:
  return inception.read(str(inception_file))


def test_every_tensor_is_read_to_its_path(weights, inception_state):
  assert weights.params.keys() == inception.shapes().keys()
  used = [name for name in inception_state if not name.endswith("num_batches_tracked")]
  assert sorted(map(inception.name_of, weights.params)) + sorted(inception.CLASSIFIER) == sorted(
    used, key=lambda name: (name in inception.CLASSIFIER, name)
  )
  for path, value in weights.params.items():
    expected = inception_state[inception.name_of(path)].numpy()
    np.testing.assert_array_equal(value, expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected)


def test_a_copy_has_the_same_hash_of_its_tensors(tmp_path, weights, inception_file, inception_state):
  assert weights.file_sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest() and not weights.published
  without_counts = {name: x for name, x in inception_state.items() if not name.endswith("num_batches_tracked")}
  save_file(without_counts, tmp_path / "x.safetensors")
  copy = inception.read(str(tmp_path / "x.safetensors"))
  assert copy.sha256 == weights.sha256 and copy.file_sha256 != weights.file_sha256


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """Return tensors of the same shapes whose file takes a few kilobytes."""
  return {name: torch.zeros(()).expand(x.shape) for name, x in state.items()}


@pytest.mark.parametrize("name", ["fc.bias", "Mixed_5b.branch1x1.bn.weight"])
def test_the_hash_depends_on_each_tensor(tmp_path, inception_state, name):
  state = blank(inception_state)
  torch.save(state, tmp_path / "x.pth")
  torch.save({"state_dict": {**state, name: state[name] + 1}}, tmp_path / "y.pth")
  assert inception.read(str(tmp_path / "x.pth")).sha256 != inception.read(str(tmp_path / "y.pth")).sha256


def test_a_file_that_is_not_the_published_one_gives_a_warning(tmp_path, inception_state, caplog):
  torch.save(blank(inception_state), tmp_path / "x.pth")
  with caplog.at_level(logging.INFO):
    inception.read(str(tmp_path / "x.pth"))
  assert "SHA-256" in caplog.text and "is not the published file, whose SHA-256 begins with 6726825d" in caplog.text


NAN, TURNED = torch.full((320,), torch.nan), torch.zeros(128, 128, 7, 1)


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("fc.weight", None, "1 of its tensors are missing, or none of the network's, such as fc.weight"),
    ("extra", torch.zeros(3), "1 of its tensors are missing, or none of the network's, such as extra"),
    ("fc.bias", torch.zeros(1000), "fc.bias has another shape"),
    ("Mixed_6b.branch7x7_2.conv.weight", TURNED, "Mixed_6b.branch7x7_2.conv.weight has another shape"),
    ("Mixed_7b.branch1x1.bn.running_var", NAN, "Mixed_7b.branch1x1.bn.running_var .* not finite"),
  ],
)
def test_a_file_with_other_tensors_is_refused(tmp_path, inception_state, name, value, message):
  changed = {**blank(inception_state), name: value}
  torch.save({key: x for key, x in changed.items() if x is not None}, tmp_path / "x.pth")
  with pytest.raises(UserError, match=message) as error:
    inception.read(str(tmp_path / "x.pth"))
  assert "\n" not in str(error.value) and "torch-fidelity" in str(error.value)
