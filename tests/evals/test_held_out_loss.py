"""Compare the held-out loss with the equations of Algorithm 1, computed in float64 from the network's outputs."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax import inference
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import tasks as evals
from diffdis_jax.evals.held_out_loss import TIMESTEPS
from diffdis_jax.inference import Inference
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import watch
from diffdis_jax.training import evaluator
from tests import steps, tiny, tiny_clip
from tests.models.networks import random_params

pytest_plugins = ("tests.untrained",)

COUNT, GROUP = 10, 4  # the last group is filled up with two pairs of the group before it
DATA = dict(name="shapes", split="test", image_size=16, seed=1, num_images=COUNT)
SECTION = dict(task="held_out_loss", data=DATA, contrastive_batch=GROUP, seed=3)


def make(*objectives: str, devices: int = 1, batch_size: int = 4, **changes: Any) -> Inference:
  config = tiny.get_config()
  config.model.unet.attention = (False,)  # attention in the middle block alone: it compiles faster
  config.objectives = objectives or config.objectives
  config.update_from_flattened_dict(changes)
  return steps.make_inference(config, mesh=steps.make_mesh(data=devices), batch_size=batch_size)


def pairs(field: str = "caption") -> tuple[np.ndarray, np.ndarray]:
  """Return the pairs in the order of the measurement: sorted by a digest of the content that the seed keys."""
  source = sources.open_source(**DATA)

  def digest(record: dict[str, Any]) -> bytes:
    content = record[field].encode() + b"\0" + record["image"].tobytes()
    return hashlib.blake2b(content, digest_size=16, key=b"3").digest()

  records = sorted((source[i] for i in range(COUNT)), key=digest)
  return np.stack([record["image"] for record in records]), Tokenizer(8)([record[field] for record in records])


def noise(pass_: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
  """Return the noise of pass 0 or 1. It depends only on the seed, the pass, the timestep's number and the place."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), pass_), number)
  return np.stack([jax.random.normal(jax.random.fold_in(key, place), shape) for place in range(COUNT)]).astype(float)


def info_nce(query: np.ndarray, e: np.ndarray, scale: float, tokens: np.ndarray) -> float:
  """Compare each pair with the others of its group of GROUP pairs, except those of equal `tokens`."""
  query = query / np.linalg.norm(query, axis=1, keepdims=True)
  e = e / np.linalg.norm(e, axis=1, keepdims=True)
  total = 0.0
  for start in range(0, COUNT, GROUP):
    group = range(min(start, COUNT - GROUP), min(start, COUNT - GROUP) + GROUP)
    for i in range(start, min(start + GROUP, COUNT)):
      candidates = [j for j in group if j == i or (tokens[i] != tokens[j]).any()]
      image_to_text = [scale * query[i] @ e[j] for j in candidates]
      text_to_image = [scale * query[j] @ e[i] for j in candidates]
      own = scale * query[i] @ e[i]
      total += (np.log(np.exp(image_to_text).sum()) + np.log(np.exp(text_to_image).sum())) / 2 - own
  return total / COUNT


def expected(inference: Inference, params: dict[str, Any]) -> dict[str, np.ndarray]:
  """Return the value of each loss at each of TIMESTEPS."""
  images, tokens = pairs()
  model, network = inference.network.with_params(params), inference.network
  generation, discrimination = jax.jit(model.generation), jax.jit(model.discrimination)
  encode_text = jax.jit(model.encode_text)
  z, text = jax.jit(model.encode_image)(images), encode_text(tokens)
  null = encode_text(model.text_encoder.null_tokens(8)).c
  z64, e64 = np.asarray(z, np.float64), np.asarray(text.e, np.float64)
  by_loss: dict[str, list[float]] = {"loss_generation": [], "loss_discrimination": []}
  for number, t in enumerate(TIMESTEPS):
    step = jnp.full(COUNT, t)
    if "generation" in network.objectives:
      alpha_bar, eps = steps.ALPHA_BAR["scaled_linear"][t], noise(0, number, z.shape[1:])
      z_t = np.sqrt(alpha_bar) * z64 + np.sqrt(1 - alpha_bar) * eps
      guess = generation(z_t=jnp.asarray(z_t, jnp.float32), t_z=step, c=text.c)
      by_loss["loss_generation"].append(((np.asarray(guess, np.float64) - eps) ** 2).mean())
    if "discrimination" in network.objectives:
      process = network.text_process
      alpha_bar, eps = steps.ALPHA_BAR["cosine"][t], noise(1, number, e64.shape[1:])
      e_t = process.gamma * np.sqrt(alpha_bar) * e64 + np.sqrt(1 - alpha_bar) * eps
      query = np.asarray(
        discrimination(
          e_t=jnp.asarray(e_t, jnp.float32),
          t_e=step,
          z=z,
          t_z=jnp.full(COUNT, 1000),
          c_null=jnp.broadcast_to(null, text.c.shape),
        ),
        np.float64,
      )
      if process.target == "noise":
        query = (e_t - np.sqrt(1 - alpha_bar) * query) / (process.gamma * np.sqrt(alpha_bar))
      scale = float(np.exp(np.float64(params["logit_scale"])))
      by_loss["loss_discrimination"].append(info_nce(query, e64, scale, tokens))
  return {name: np.array(values) for name, values in by_loss.items() if values}


@pytest.mark.parametrize(
  "objectives, target",
  [(("generation", "discrimination"), "data"), (("generation",), "data"), (("discrimination",), "noise")],
)
def test_the_losses_equal_the_equations_at_eight_timesteps(objectives, target):
  inference = make(*objectives, **{"text_diffusion.schedule": "cosine", "text_diffusion.target": target})
  params = random_params(inference.shapes, seed=0)
  metrics = evals.create(**SECTION).run(inference, params)
  want = expected(inference, params)
  assert TIMESTEPS == (62, 187, 312, 437, 562, 687, 812, 937)
  assert metrics.keys() == {f"{name}{q}" for name in want for q in ("", "_q1", "_q2", "_q3", "_q4")}
  for name, values in want.items():
    assert values.std() > 1e-3
    assert metrics[name] == pytest.approx(values.mean(), rel=2e-5)
    for quarter in range(4):
      assert metrics[f"{name}_q{quarter + 1}"] == pytest.approx(values[2 * quarter : 2 * quarter + 2].mean(), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [tiny.get_config(), tiny_clip.get_config()], ids=["diffdis", "clip"])
def test_the_order_of_the_records_does_not_matter(config, monkeypatch):
  """Folders of classes are stored class by class; batches in that order would compare only equal captions."""
  images, _ = pairs()
  stored = [dict(image=image, caption="a star" if i < COUNT // 2 else "a ring") for i, image in enumerate(images)]
  mixed = [stored[i] for i in np.random.default_rng(0).permutation(COUNT)]
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4)
  params = random_params(inference.shapes, seed=0)
  metrics = []
  for rows in (stored, mixed):
    monkeypatch.setattr(sources, "open_source", lambda rows=rows, **section: rows)
    metrics.append(evals.create(**SECTION).run(inference, params))
  loss = metrics[0]["loss_contrastive" if "loss_contrastive" in metrics[0] else "loss_discrimination"]
  assert loss > 0.1
  assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)


def test_a_clip_has_its_own_loss():
  inference = steps.make_inference(tiny_clip.get_config(), mesh=steps.make_mesh(), batch_size=4)
  params = random_params(inference.shapes, seed=0)
  metrics = evals.create(**SECTION).run(inference, params)
  images, tokens = pairs()
  query, e = inference.embed_images(params, images, seed=0), inference.embed_texts(params, tokens)
  scale = float(np.exp(np.float64(params["logit_scale"])))
  assert metrics == {"loss_contrastive": pytest.approx(info_nce(query.astype(float), e.astype(float), scale, tokens))}


def test_equal_captions_count_as_in_training(tmp_path, monkeypatch):
  """By open_clip's recipe, equal captions are negatives of each other, in training and so in the measured loss."""
  config = tiny_clip.get_config("recipe=openclip")
  trainer = steps.build_trainer(config, steps.make_mesh())
  (tmp_path / "config.json").write_text(json.dumps(trainer.run.to_dict()))
  monkeypatch.setattr(inference.restore, "restore_params", lambda path, **how: random_params(trainer.shapes, seed=0))
  stop = processes.PreemptionHandler(sharding.batch_sharding(trainer.mesh))
  while_training = evaluator.make_inference(trainer, stop, watch.Watchdog())
  loaded, params = inference.load(str(tmp_path), mesh=trainer.mesh)
  evaluation = evals.create(**{**SECTION, "caption_field": "colour"})
  images, tokens = pairs("colour")
  query, e = loaded.embed_images(params, images, seed=0), loaded.embed_texts(params, tokens)
  scale = float(np.exp(np.float64(params["logit_scale"])))
  loss_with = lambda tokens: info_nce(query.astype(float), e.astype(float), scale, tokens)
  assert loss_with(np.arange(COUNT)[:, None]) > loss_with(tokens) + 0.1
  all_negatives = pytest.approx(loss_with(np.arange(COUNT)[:, None]), rel=1e-5)
  assert evaluation.run(loaded, params) == {"loss_contrastive": all_negatives}
  assert while_training.duplicate_captions == evaluation.protocol(loaded)["duplicate_captions"] == "negatives"
