"""The UNet beside diffusers': the same numbers, and what cannot be compared."""

from __future__ import annotations

import pytest

from configs import clip_cc3m
from diffdis_jax.errors import UserError
from tests import steps
from tests.benchmark import peer
from tests.steps import network_of


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_both_predict_the_same_noise(dtype, limit):
  config = steps.make_config("generation", **{"model.dtype": dtype})
  config.model.unet.update(widths=(8, 16), attention=(True, False))
  found = peer.time_peer(network_of(config), batch_size=8, rounds=2)
  assert found["largest_difference"] < limit
  assert found["batch_size"] == 8 and found["dtype"] == dtype
  assert {name: len(each) for name, each in found["rounds"].items()} == {"ours": 2, "diffusers": 2}
  assert found["ours_over_diffusers"] == found["seconds"]["ours"] / found["seconds"]["diffusers"] > 0


def test_a_clip_has_no_unet():
  with pytest.raises(UserError, match="a UNet is timed, and this config is a CLIP model"):
    peer.time_peer(network_of(clip_cc3m.get_config()), batch_size=8, rounds=1)
