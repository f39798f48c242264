from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.parallel import sharding
from diffdis_jax.parallel.fingerprint import fingerprint

RNG = np.random.default_rng(0)
PARAMS = {
  "a.conv.kernel": RNG.normal(size=(3, 3, 8, 16)).astype(np.float32),
  "b.bias": RNG.normal(size=16).astype(np.float32),
  "logit_scale": np.asarray(2.5, np.float32),
  "half": RNG.normal(size=(4, 6)).astype(jnp.bfloat16),
  "count": np.arange(5, dtype=np.int32),
}


def test_it_is_the_same_wherever_the_arrays_lie():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  kernel = {"a.conv.kernel": PARAMS["a.conv.kernel"]}
  split = jax.device_put(kernel, sharding.shardings(kernel, mesh, kernel))["a.conv.kernel"]
  assert len({str(shard.index) for shard in split.addressable_shards}) > 1
  expected = fingerprint(PARAMS)
  assert fingerprint({**PARAMS, "a.conv.kernel": split}) == expected
  assert fingerprint(dict(sharding.replicated(PARAMS, mesh))) == expected
  assert fingerprint(dict(reversed(PARAMS.items()))) == expected and fingerprint({}) != expected


def flipped(x: np.ndarray) -> np.ndarray:
  """One bit of the last number changed."""
  bits = np.atleast_1d(x.copy()).view(np.uint8)
  bits.reshape(-1)[-1] ^= 1
  return bits.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("name", PARAMS)
def test_it_tells_one_bit(name):
  assert fingerprint({**PARAMS, name: flipped(PARAMS[name])}) != fingerprint(PARAMS)


def test_it_tells_order_names_and_shapes():
  kernel = PARAMS["a.conv.kernel"]
  for changes in (
    {"a.conv.kernel": kernel.swapaxes(0, 1).copy()},
    {"a.conv.kernel": kernel[..., ::-1].copy()},
    {"a.conv.kernel": kernel.reshape(9, 8, 16)},
    {"b.bias": PARAMS["b.bias"].view(np.int32)},
  ):
    assert fingerprint({**PARAMS, **changes}) != fingerprint(PARAMS)
  renamed = {("c.bias" if name == "b.bias" else name): x for name, x in PARAMS.items()}
  assert fingerprint(renamed) != fingerprint(PARAMS)
