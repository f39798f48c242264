"""Compare the losses with torch, open_clip and numpy in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffdis_jax.method import losses
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import hlo

B, D = 8, 16
RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((B, D)).astype(np.float32) * 3
E = RNG.standard_normal((B, D)).astype(np.float32)
E /= np.linalg.norm(E, axis=1, keepdims=True)
CAPTIONS = np.array([0, 1, 2, 1, 3, 0, 1, 4])
SAME = CAPTIONS[:, None] == CAPTIONS[None, :]
DROPPED = np.array([0, 0, 1, 1, 0, 0, 0, 0], bool)
SCALE = np.float32(np.log(1 / 0.07))


def _jax(*arrays):
  return [jnp.asarray(a) for a in arrays]


def _logits(scale=SCALE):
  query = np.float64(QUERY) / np.linalg.norm(np.float64(QUERY), axis=1, keepdims=True)
  return min(np.exp(np.float64(scale)), 100.0) * query @ np.float64(E).T


def _slow_contrastive(same, dropped):
  """Return the losses of both directions by their definition, row by row, in float64; None if no row counts."""
  s = _logits()
  rows, columns = [], []
  for i in range(B):
    others = [j for j in range(B) if j == i or not same[i, j]]
    rows.append(np.log(np.exp(s[i, others]).sum()) - s[i, i])
    pool = [j for j in others if not dropped[j]]
    columns.append(None if dropped[i] else np.log(np.exp(s[pool, i]).sum()) - s[i, i])
  return rows, columns


def test_denoising_is_the_mean_square_of_each_sample():
  noise, prediction = RNG.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
  want = F.mse_loss(torch.tensor(prediction), torch.tensor(noise), reduction="none").mean(dim=(1, 2, 3))
  np.testing.assert_allclose(losses.denoising(*_jax(noise, prediction)), want, rtol=1e-6)
  assert losses.denoising(*(a.astype(jnp.bfloat16) for a in _jax(noise, prediction))).dtype == jnp.float32


def test_contrastive_equals_torch_cross_entropy():
  got = jax.jit(losses.contrastive)(*_jax(QUERY, E, SCALE))
  logits, labels = torch.tensor(_logits()), torch.arange(B)
  rows = F.cross_entropy(logits, labels, reduction="none")
  columns = F.cross_entropy(logits.T, labels, reduction="none")
  np.testing.assert_allclose(got.query_to_text, rows, rtol=1e-5)
  np.testing.assert_allclose(got.text_to_query, columns, rtol=1e-5)
  np.testing.assert_allclose(got.loss, (rows.mean() + columns.mean()) / 2, rtol=1e-6)
  np.testing.assert_allclose(got.accuracy, (logits.argmax(dim=1) == labels).double().mean(), rtol=1e-6)


def test_contrastive_and_its_gradients_equal_open_clips_loss():
  clip_loss = pytest.importorskip("open_clip.loss").ClipLoss()
  query, e, scale = (torch.tensor(np.float64(a), requires_grad=True) for a in (QUERY, E, SCALE))
  clip_loss(F.normalize(query, dim=-1), e, scale.exp()).backward()
  gradients = jax.jit(jax.grad(lambda *a: losses.contrastive(*a).loss, argnums=(0, 1, 2)))(*_jax(QUERY, E, SCALE))
  for got, want in zip(gradients, (query.grad, e.grad, scale.grad)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropped", [None, DROPPED])
@pytest.mark.parametrize("captions", [None, CAPTIONS])
@pytest.mark.parametrize("logits", [losses._LOGITS, B * B // 4])
def test_contrastive_masks_equal_the_definition(captions, dropped, logits, monkeypatch):
  monkeypatch.setattr(losses, "_LOGITS", logits)
  got = jax.jit(lambda *a, **kwargs: losses.contrastive(*a, **kwargs))(  # trace again with the changed _LOGITS
    *_jax(QUERY, E, SCALE),
    captions=None if captions is None else jnp.asarray(captions),
    dropped=None if dropped is None else jnp.asarray(dropped),
  )
  rows, columns = _slow_contrastive(
    np.eye(B, dtype=bool) if captions is None else SAME, np.zeros(B, bool) if dropped is None else dropped
  )
  anchors = [c for c in columns if c is not None]
  np.testing.assert_allclose(got.query_to_text, rows, rtol=1e-5)
  np.testing.assert_allclose(got.text_to_query, [c or 0.0 for c in columns], rtol=1e-5)
  np.testing.assert_allclose(got.loss, (np.mean(rows) + np.mean(anchors)) / 2, rtol=1e-6)


def test_dropped_rows_learn_from_their_query_only():
  """Such a row's query gets a gradient through ê → e, and does not change the loss of other rows."""
  query, e, scale, dropped = _jax(QUERY, E, SCALE, DROPPED)

  loss = jax.jit(lambda q: losses.contrastive(q, e, scale, dropped=dropped))
  assert np.all(np.abs(jax.jit(jax.grad(lambda q: loss(q).loss))(query)).sum(axis=1) > 0)
  moved = loss(jnp.asarray(np.where(DROPPED[:, None], -QUERY, QUERY)))
  before = loss(query)
  np.testing.assert_array_equal(moved.text_to_query, before.text_to_query)
  np.testing.assert_array_equal(moved.query_to_text[~DROPPED], before.query_to_text[~DROPPED])
  assert moved.accuracy == before.accuracy


def test_all_rows_dropped_or_all_captions_the_same_is_finite():
  query, e, scale = _jax(QUERY, E, SCALE)

  contrastive = jax.jit(losses.contrastive)
  loss = jax.jit(jax.value_and_grad(lambda q, **kwargs: losses.contrastive(q, e, scale, **kwargs).loss))
  for kwargs, want in (
    ({"dropped": jnp.ones(B, bool)}, np.mean(contrastive(query, e, scale).query_to_text) / 2),
    ({"captions": jnp.zeros(B, int)}, 0.0),
  ):
    value, gradient = loss(query, **kwargs)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_accuracy_counts_rows_with_an_image_among_distinct_captions():
  query = np.eye(4, dtype=np.float32)[[1, 1, 0, 3]]  # row 0 picks row 1's caption, row 2 picks row 0's
  query[0, 0] = 0.5
  e, scale = jnp.eye(4), jnp.asarray(SCALE)
  contrastive = jax.jit(losses.contrastive)
  captions = jnp.asarray([0, 0, 1, 2])

  def accuracy(**kwargs):
    return float(contrastive(jnp.asarray(query), e, scale, **kwargs).accuracy)

  assert accuracy() == 0.5
  assert accuracy(captions=captions) == 0.75
  assert accuracy(dropped=jnp.asarray([False, False, True, False])) == pytest.approx(2 / 3)


def test_temperature_stops_at_100_and_can_come_down():
  for scale in (0.0, SCALE, 4.6):
    np.testing.assert_allclose(losses.temperature(jnp.float32(scale)), np.exp(scale), rtol=1e-5)
  value, gradient = jax.value_and_grad(losses.temperature)(jnp.float32(9.0))
  np.testing.assert_allclose([value, gradient], 100.0, rtol=1e-5)


def test_a_temperature_beyond_100_is_100_in_the_loss():
  loss = jax.jit(jax.value_and_grad(lambda scale: losses.contrastive(*_jax(QUERY, E), scale).loss))
  logits = torch.tensor(_logits(9.0))
  scale = torch.ones((), dtype=torch.float64, requires_grad=True)
  want = sum(F.cross_entropy(scale * of_side, torch.arange(B)) for of_side in (logits, logits.T)) / 2
  want.backward()
  value, gradient = loss(jnp.float32(9.0))
  np.testing.assert_allclose([value, gradient], [want.item(), scale.grad], rtol=1e-5)


def test_a_loop_on_each_device_gives_the_loss_and_gradients_of_all_logits_at_once(monkeypatch):
  mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1, devices=jax.devices()[:8])
  random, b = np.random.default_rng(3), 64
  query, e = (random.normal(size=(b, D)).astype(np.float32) for _ in range(2))
  e /= np.linalg.norm(e, axis=1, keepdims=True)
  arguments = _jax(query, e, SCALE, (np.arange(b) // 3).astype(np.uint32), random.random(b) < 0.2)

  def loss(query, e, scale, captions, dropped, on_rows):
    return losses.contrastive(query, e, scale, captions=captions, dropped=dropped, on_rows=on_rows).loss

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnames="on_rows")
  want, want_gradients = step(*arguments, on_rows=lambda f: f)
  monkeypatch.setattr(losses, "_LOGITS", b * b // 8 // 4)  # four loop turns on each device
  rows = [x if x.ndim == 0 else jax.device_put(x, sharding.batch_sharding(mesh)) for x in arguments]
  with sharding.tracing(mesh, matmul_precision="highest"):
    got, gradients = step(*rows, on_rows=sharding.each_own_rows)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for one, other in zip(gradients, want_gradients):
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def compiled_contrastive(b: int, d: int, devices: int):
  """Compile the loss with its gradients for b rows of width d, spread over devices."""
  mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])

  def loss(query, e, scale, captions):
    with sharding.tracing(mesh, matmul_precision="highest"):
      return losses.contrastive(query, e, scale, captions=captions, on_rows=sharding.each_own_rows).loss

  rows = sharding.batch_sharding(mesh)
  array = lambda *shape, dtype=jnp.float32, place=rows: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  args = array(b, d), array(b, d), array(place=None), array(b, dtype=jnp.uint32)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args).compile()


def test_only_embeddings_go_between_devices():
  b, d = 64, 16
  moved = hlo.collectives(compiled_contrastive(b, d, 8).as_text())
  gathered = [shape for collective in moved if collective.kind == "all-gather" for shape in collective.shapes]
  assert 2 <= gathered.count((b, d)) <= 4  # embeddings of both modalities, and their gradients in the backward pass
  for collective in moved:
    assert collective.kind in ("all-gather", "all-reduce", "reduce-scatter"), collective
    assert all(math.prod(shape) <= b * d for shape in collective.shapes), collective


def test_memory_does_not_grow_as_the_square_of_the_batch():
  temporaries = [compiled_contrastive(b, 16, 1).memory_analysis().temp_size_in_bytes for b in (2048, 4096, 8192)]
  assert temporaries[0] > 4 * 2048**2  # all logits at once
  assert max(temporaries[1:]) < 1.2 * temporaries[0] and temporaries[2] < 2 * 8192**2


def test_unit_norm_equals_torch_and_is_safe_at_zero():
  x = np.concatenate([QUERY, np.zeros((1, D), np.float32), QUERY[:1] * 1e-8])
  np.testing.assert_allclose(losses.unit_norm(jnp.asarray(x)), F.normalize(torch.tensor(x), dim=-1), atol=1e-6)
  gradient = jax.jit(jax.grad(lambda x: (losses.unit_norm(x) * E[0]).sum()))(jnp.asarray(x))
  assert np.all(np.isfinite(gradient)) and np.all(gradient[B] == 0)


def test_caption_ids_are_equal_exactly_where_captions_are():
  """The captions are as similar as possible: all variants of one caption with one token changed, or two."""
  base = np.full((1, 77), 49407, np.int32)
  base[0, :4] = [49406, 320, 1125, 539]
  one_changed = np.repeat(base, 49408, axis=0)
  one_changed[:, 2] = np.arange(49408)
  two_changed = np.repeat(base, 300 * 300, axis=0)
  two_changed[:, 1], two_changed[:, 3] = np.divmod(np.arange(300 * 300), 300)
  swapped = base[:, [0, 2, 1, 3, *range(4, 77)]]
  captions = np.unique(np.concatenate([base, one_changed, two_changed, swapped]), axis=0)
  caption_ids = jax.jit(losses.caption_ids)
  ids = caption_ids(jnp.asarray(captions))
  assert ids.dtype == jnp.uint32
  assert len(np.unique(ids)) >= len(captions) - 4  # 2.3 collisions are expected among 1e10 pairs
  assert len(np.unique(caption_ids(jnp.asarray(one_changed)))) == len(one_changed)
  twice = caption_ids(jnp.asarray(np.concatenate([base, base])))
  assert twice[0] == twice[1]


def test_quarters_of_the_timesteps():
  t = np.array([0, 249, 250, 499, 500, 749, 750, 999, 3], np.int32)
  per_sample = np.arange(9, dtype=np.float32)
  for rows, expected, count in (
    (np.ones(9, bool), [0 + 1 + 8, 2 + 3, 4 + 5, 6 + 7], [3, 2, 2, 2]),
    (np.arange(9) != 4, [0 + 1 + 8, 2 + 3, 5, 6 + 7], [3, 2, 1, 2]),
  ):
    sums, counts = jax.jit(losses.by_timestep_quarter)(*_jax(per_sample, t, rows))
    np.testing.assert_array_equal(sums, expected)
    np.testing.assert_array_equal(counts, count)


def test_reconstruction_equals_torch():
  x, x_hat = RNG.standard_normal((2, 3, 4, 4, 3)).astype(np.float32)
  mean, log_variance = RNG.standard_normal((2, 3, 2, 2, 4)).astype(np.float32)
  normal = torch.distributions.Normal
  posterior = normal(torch.tensor(mean, dtype=torch.float64), torch.exp(torch.tensor(log_variance).double() / 2))
  kl = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).mean(dim=(1, 2, 3))
  l1 = F.l1_loss(torch.tensor(x_hat), torch.tensor(x), reduction="none").mean(dim=(1, 2, 3))
  got = jax.jit(losses.reconstruction, static_argnames="kl_weight")(
    *_jax(x, x_hat), mean=jnp.asarray(mean), log_variance=jnp.asarray(log_variance), kl_weight=0.1
  )
  np.testing.assert_allclose(got.kl, kl, rtol=1e-5)
  np.testing.assert_allclose(got.l1, l1, rtol=1e-5)
  np.testing.assert_allclose(got.loss, l1 + 0.1 * kl, rtol=1e-5)
