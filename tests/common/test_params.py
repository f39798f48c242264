from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffdis_jax.common.params import first_match, flatten, merge


class Pair(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.layers = nnx.List(nnx.Linear(2, 2, use_bias=False, rngs=rngs) for _ in range(12))
    self.shift = nnx.Variable(jnp.zeros(3))

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x


def test_merge_puts_each_value_in_its_place():
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
  params = {path: jnp.full(leaf.shape, i, jnp.float32) for i, (path, leaf) in enumerate(flatten(abstract).items())}
  module = merge(graphdef, abstract, params)
  np.testing.assert_array_equal(module.shift[...], params["shift"])
  # The eleventh layer, not the second: paths sort as text, not as numbers.
  for i in (2, 10):
    np.testing.assert_array_equal(module.layers[i].kernel[...], params[f"layers.{i}.kernel"])
  merged = flatten(nnx.state(module))
  assert merged.keys() == params.keys() and all(merged[path] is params[path] for path in params)


def test_first_match_wins():
  rules = ((r"\.bias$", "bias"), (r"^unet\.", "unet"), ("", "rest"))
  values = {path: first_match(path, rules, "rules") for path in ("unet.a.bias", "unet.a.kernel", "old_unet.kernel")}
  assert values == {"unet.a.bias": "bias", "unet.a.kernel": "unet", "old_unet.kernel": "rest"}
