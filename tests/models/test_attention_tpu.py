"""Compare the TPU's kernel, interpreted, with float64, and check that compiled programs contain the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffdis_jax.errors import UserError
from diffdis_jax.models import attention, attention_tpu
from diffdis_jax.models.attention import Projected
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import chips, targets
from tests import steps
from tests.models import networks

# Rounding of results in bf16, which has 8 bits, and of the weights that are summed.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1.5e-2}
interpreted = functools.partial(attention_tpu.attend_with_lse, interpret=True)


def attention_in_float64(q, k, v, of_attended, of_lse):
  """Compute value, lse and, by hand, the gradients of q, k and v for given gradients of value and lse."""
  scale = 1 / np.sqrt(q.shape[-1])
  scores = np.einsum("bnhd,bmhd->bnhm", q, k) * scale
  top = scores.max(axis=-1, keepdims=True)
  weights = np.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  weights /= total
  attended = np.einsum("bnhm,bmhd->bnhd", weights, v)
  of_weights = np.einsum("bnhd,bmhd->bnhm", of_attended, v) + of_lse[..., None]
  mean = np.sum(of_attended * attended, axis=-1, keepdims=True)
  of_scores = weights * (of_weights - mean) * scale
  of_q, of_k = np.einsum("bnhm,bmhd->bnhd", of_scores, k), np.einsum("bnhm,bnhd->bmhd", of_scores, q)
  return attended, (top + np.log(total))[..., 0], of_q, of_k, np.einsum("bnhm,bnhd->bmhd", weights, of_attended)


def inputs(n: int, m: int, *, heads: int = 1, channels: int = 8, dtype=jnp.float32, deviation: float = 2.0):
  """Return q, k, v, and gradients of value and lse."""
  rng = np.random.default_rng(n + m)
  draw = lambda *shape: jnp.asarray(deviation * rng.standard_normal((1, *shape)), dtype)
  q, k, v, g = (draw(size, heads, channels) for size in (n, m, m, n))
  return q, k, v, g, draw(n, heads).astype(jnp.float32)


def with_gradients(attend, q, k, v, g, of_lse):
  with jax.default_matmul_precision("highest"):
    value, vjp = jax.vjp(attend, q, k, v)
    return *value, *vjp(type(value)(g, of_lse))


def of_value(attend, q, k, v, g):
  """Return an attention's value alone, and its gradients for g."""
  value, vjp = jax.vjp(attend, q, k, v)
  return value, *vjp(g)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
  "n, m, heads, channels",
  [
    (256, 256, 2, 40),
    (1024, 1024, 1, 40),
    (257, 257, 1, 64),
    (130, 77, 2, 8),
    pytest.param(4096, 4096, 1, 40, marks=pytest.mark.full),
    pytest.param(1025, 4095, 2, 80, marks=pytest.mark.full),
  ],
)
def test_value_and_gradients_of_the_kernel(n, m, heads, channels, dtype):
  args = inputs(n, m, heads=heads, channels=channels, dtype=dtype)
  ours = jax.jit(functools.partial(with_gradients, interpreted))(*args)
  expected = attention_in_float64(*(np.asarray(x, np.float64) for x in args))
  assert [x.dtype for x in ours] == [dtype, jnp.float32, dtype, dtype, dtype]
  for name, a, b in zip(("value", "lse", "of q", "of k", "of v"), ours, expected, strict=True):
    assert networks.relative_error(a.astype(jnp.float32), b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [256, 257, pytest.param(4096, marks=pytest.mark.full)])
def test_one_more_key_is_merged_exactly_with_the_kernel(monkeypatch, n, dtype):
  """The value and all gradients, also of the extra key and its value, equal attention over all keys together."""
  q, k, v, g, _ = inputs(n, n + 1, dtype=dtype)
  monkeypatch.setattr(attention_tpu, "attend_with_lse", interpreted)

  def merged(q, k, v):
    with attention.standing_in_for("tpu"):
      return attention.attend_with_one_more(q, k[:, :-1], v[:, :-1], Projected(q[:, :1], k[:, -1:], v[:, -1:]))

  monkeypatch.setattr(attention, "_compiled_for", lambda: "tpu")
  with jax.default_matmul_precision("highest"):
    ours = jax.jit(functools.partial(of_value, merged))(q, k, v, g)
  args = (*(np.asarray(x, np.float64) for x in (q, k, v, g)), np.zeros(q.shape[:3]))
  attended, _, *expected = attention_in_float64(*args)
  for a, b in zip(ours, (attended, *expected), strict=True):
    assert networks.relative_error(a.astype(jnp.float32), b) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape, heads", [((2, 2, 2), 2), ((1, 2, 4), 2)])
def test_each_device_attends_for_its_own_rows_and_heads(shape, heads):
  """A mesh gives the results and gradients of one device, whether or not `tensor` divides the heads."""
  mesh = steps.make_mesh(*shape)
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((8, 128, heads, 8)), jnp.float32) for _ in range(3))
  total = lambda q, k, v: sum(jnp.sum(jnp.sin(3 * x)) for x in interpreted(q, k, v))
  expected = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
  place = sharding.batch_sharding(mesh)
  on_mesh = sharding.tracing(mesh, matmul_precision="highest")(jax.value_and_grad(total, (0, 1, 2)))
  program = jax.jit(on_mesh, in_shardings=place).lower(q, k, v).compile()
  on_devices = program(*jax.device_put((q, k, v), place))
  for a, b in zip(jax.tree.leaves(on_devices), jax.tree.leaves(expected), strict=True):
    assert networks.relative_error(np.asarray(a), b) < 1e-5
  assert "all-gather" not in program.as_text() or heads % shape[2]


def chosen(monkeypatch, compiled_for: str, n: int, m: int, *, d: int = 40, dtype=jnp.bfloat16, mask=None, **options):
  monkeypatch.setattr(attention, "_compiled_for", lambda: compiled_for)
  q, k = (jnp.zeros((1, size, 1, d), dtype) for size in (n, m))
  kernel = attention._choose(q, k, mask, **options)
  return next(name for name, candidate in attention.KERNELS.items() if candidate is kernel)


def test_the_choice_by_platform(monkeypatch):
  choose = functools.partial(chosen, monkeypatch)
  assert [choose(platform, 1024, 1024) for platform in ("tpu", "gpu", "cpu")] == ["pallas", "cudnn", "xla_per_head"]
  assert {choose(platform, 64, 64) for platform in ("tpu", "gpu", "cpu")} == {"xla"}
  assert {choose(platform, 1, 1024) for platform in ("tpu", "gpu", "cpu")} == {"xla"}
  mask = jnp.ones((256, 256), bool)
  assert [choose(platform, 256, 256, mask=mask) for platform in ("tpu", "gpu", "cpu")] == ["xla"] * 2 + ["xla_per_head"]
  assert choose("gpu", 256, 256, dtype=jnp.float32) == choose("gpu", 256, 256, d=160) == "xla"
  assert choose("gpu", 256, 256, with_lse=True) == "xla" and choose("tpu", 256, 256, with_lse=True) == "pallas"
  assert choose("tpu", 1024, 77) == "pallas" and choose("tpu", 128, 2**14) == "xla"


def test_a_kernel_can_be_forced(monkeypatch):
  with attention.by("xla"):
    assert chosen(monkeypatch, "tpu", 1024, 1024) == "xla"
  with attention.by("xla_per_head"):
    assert chosen(monkeypatch, "tpu", 6, 6) == "xla_per_head"
  with attention.by("pallas"):
    assert chosen(monkeypatch, "tpu", 6, 6) == "pallas"
    assert chosen(monkeypatch, "tpu", 6, 6, mask=jnp.ones((6, 6), bool)) == "xla"
    with pytest.raises(UserError, match="attention_kernel is 'pallas', which runs on tpu alone, not on cpu"):
      chosen(monkeypatch, "cpu", 6, 6)
  assert chosen(monkeypatch, "tpu", 1024, 1024) == "pallas"


@pytest.mark.parametrize("n, m", [(128, 128), (129, 129), (131, 128)])
def test_what_cudnn_is_given(monkeypatch, n, m):
  """XLA's form of the same function stands in for cuDNN: it gets even numbers of tokens, and results are exact."""
  shapes = []

  def stand_in(q, k, v, *, implementation, **lengths):
    shapes.append((implementation, q.shape[1] % 2, k.shape[1] % 2))
    return dot_product_attention(q, k, v, implementation="xla", **lengths)

  dot_product_attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(attention, "_compiled_for", lambda: "gpu")
  q, k, v, g, _ = inputs(n, m + 1, dtype=jnp.bfloat16)
  with_extra_key = lambda q, k, v: attention.attend_with_one_more(
    q, k[:, :-1], v[:, :-1], Projected(q, k[:, -1:], v[:, -1:])
  )
  plain = lambda q, k, v: attention.attend(q, k, v)
  args = (*(np.asarray(x, np.float64) for x in (q, k, v, g)), np.zeros(q.shape[:3]))
  attended, _, *gradients = attention_in_float64(*args)
  for attend in (with_extra_key, plain):
    with jax.numpy_dtype_promotion("standard"):  # XLA's form mixes bf16 and f32
      ours = jax.jit(functools.partial(of_value, attend))(q, k, v, g)
    for a, b in zip(ours, (attended, *gradients), strict=True):
      assert networks.relative_error(a.astype(jnp.float32), b) < TOLERANCE[jnp.bfloat16]
  assert set(shapes) == {("cudnn", 0, 0)}


@pytest.mark.full
@pytest.mark.parametrize("n", [1024, 257])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:4", "a100:4", "b200:4"])
def test_compiled_programs_contain_the_kernel(topology, n):
  """The chip's own compiler compiles self-attention with one extra key, and its gradient, on a mesh."""
  parsed = chips.parse(topology)
  platform = "tpu" if parsed.is_tpu else "cuda"
  if not targets.is_installed(platform):
    pytest.skip(f"the compiler for {platform} is not installed")
  target = targets.find(platform, parsed, 1)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=target.devices)
  place = NamedSharding(mesh, PartitionSpec(("fsdp", "data")))
  shape = lambda n: jax.ShapeDtypeStruct((4, n, 8, 40), jnp.bfloat16, sharding=place)

  def loss(q, k, v, extra):
    return attention.attend_with_one_more(q, k, v, extra).astype(jnp.float32).sum()

  gradient = sharding.tracing(mesh, matmul_precision="default")(jax.grad(loss, (0, 1, 2, 3)))
  args = (*[shape(n)] * 3, Projected(*[shape(1)] * 3))
  compiled = targets.compile(jax.jit(gradient).lower(*args), target)
  names = ("tpu_custom_call",) * 2 if parsed.is_tpu else ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
  assert all(compiled.text.count(f'custom_call_target="{name}"') == names.count(name) for name in names)
  # All scores in bf16 would take 8 MiB on each of the four devices.
  assert compiled.temporaries < 6 * 2**20
