"""Compare CLIP's initial parameters with open_clip's: the spread and shape of each kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import jax
import numpy as np
import open_clip
import pytest
import torch
from ml_collections import ConfigDict

from configs import clip_cc3m
from tests import tiny_clip
from tests.models import open_clip_twin
from tests.steps import network_of

SEEDS = 3


def pooled(draws: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Return all values of each kind of parameter, over seeds and layers."""
  values = defaultdict(list)
  for params in draws:
    for path, value in params.items():
      values[re.sub(r"\d+", "#", path)].append(np.ravel(value))
  return {kind: np.concatenate(values) for kind, values in values.items()}


def check(config: ConfigDict, theirs: list[Mapping[str, np.ndarray]], *, least: float) -> None:
  """Check that deviations are equal up to `least` or chance, and that parameters are uniform if open_clip's are."""
  network = network_of(config)
  initialise = jax.jit(network.initialise)
  ours = pooled([initialise(jax.random.key(seed)) for seed in range(len(theirs))])
  expected = pooled(theirs)
  assert ours.keys() == expected.keys()
  for kind, values in expected.items():
    assert abs(ours[kind].mean()) - abs(values.mean()) < 6 * values.std() / values.size**0.5 + 1e-6, kind
    if values.std() < 1e-6:
      np.testing.assert_allclose(ours[kind], values, err_msg=kind)
      continue
    assert abs(ours[kind].std() / values.std() - 1) < max(least, 5 / values.size**0.5), kind
    # The largest of a few hundred normal values is beyond 2.5 deviations; a uniform value is never beyond 1.74.
    is_uniform = lambda x: np.abs(x).max() < 1.8 * x.std()
    assert values.size < 200 or is_uniform(ours[kind]) == is_uniform(values), kind


def test_each_kind_of_parameter_starts_as_in_open_clip():
  config = tiny_clip.get_config()
  # All widths and depths differ, so that a mix-up would show.
  config.model.text_encoder.update(vocab_size=999, bos_id=997, eos_id=998, width=64, depth=3, mlp_width=192)
  config.model.vision_encoder.update(width=96, depth=2, mlp_width=480)
  theirs = []
  for seed in range(SEEDS):
    torch.manual_seed(seed)
    theirs.append(open_clip_twin.to_ours(dict(open_clip_twin.make(config.model).named_parameters())))
  check(config, theirs, least=0.02)


@pytest.mark.full
@pytest.mark.parametrize("model, name", [("vit_b32", "ViT-B-32"), ("vit_l14", "ViT-L-14")])
def test_a_released_size_starts_as_open_clips(model, name):
  torch.manual_seed(0)
  theirs = open_clip.create_model(name, pretrained=None)
  check(clip_cc3m.get_config(f"model={model}"), [open_clip_twin.to_ours(dict(theirs.named_parameters()))], least=0.02)
