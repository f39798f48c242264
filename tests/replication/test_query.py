"""Test that the arms of E10 are those of replication/protocol.md."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax import config as run_config
from diffdis_jax.ablate import plan as planning
from diffdis_jax.common import cli
from diffdis_jax.config.sections import TextDiffusion
from diffdis_jax.data import sources
from diffdis_jax.method import algorithms, schedules
from diffdis_jax.method.step_noise import sample_noise
from diffdis_jax.run import workdir
from diffdis_jax.training.step import step_keys
from replication import arms
from replication.configs import experiments
from tests import steps
from tests.models.networks import random_params

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
BASES = {"e10": "scenes.py:measured=test,query_use", "e10_emoji": "emoji.py:path=data/emoji,query_use"}


def of_first_seed(name):
  base = f"replication/configs/{BASES[name]}"
  experiment = arms.read(f"replication/configs/experiments.py:{name}", base=base, overrides={})
  config = cli.read_config(base).to_dict()
  autoencoder = planning.find_autoencoder(base, {}, config)
  plan = planning.make(config, autoencoder, [experiment.table], range(5), own_starts=True)
  assert len(plan.runs) == 5 * 9, "an autoencoder and eight arms a seed"
  runs = {run.name.partition("-seed_0")[0]: run for run in plan.runs if "-seed_0-" in run.name}
  for run in runs.values():
    run_config.Run.of(run.config)
  return runs, experiment.claims


@pytest.mark.parametrize("name", BASES)
def test_arms_differ_in_what_the_protocol_names(name):
  runs, claims = of_first_seed(name)
  fields = {arm: workdir.flatten(run.config) for arm, run in runs.items()}
  inner = {arm: run.start for arm, run in runs.items()}
  assert {inner[arm] for arm in runs if arm != "autoencoder"} == {runs["autoencoder"]}
  base = fields["DiffDis"]
  differing = lambda arm: {name for name in fields[arm].keys() | base.keys() if fields[arm].get(name) != base.get(name)}
  strong = {"text_diffusion.gamma"} | ({"model.query_init"} if name == "e10_emoji" else set())
  assert differing("constant") == {"model.text_stream.kind"}
  assert differing("noise") == {"text_diffusion.gamma"}
  assert differing("strong_query") == strong
  assert differing("late_query") == strong | {"text_diffusion.schedule"}
  assert differing("guided_steps") == strong | {"loss.image_dropout", "inference.steps", "inference.guidance"}
  assert differing("two_captions") == strong | {"data.name"}
  assert differing("two_captions_constant") == {"model.text_stream.kind", "data.name"}
  assert {fields[arm]["num_steps"] for arm in runs if arm != "autoencoder"} == {1800}
  assert base["model.alignment.spatial_pool"] == 0 and base["objectives"] == ("discrimination",)
  assert all("query_use" in run.evals for arm, run in runs.items() if arm != "autoencoder")
  section = (ROOT / "replication/protocol.md").read_text().split("### E10\n")[1].split("\n##")[0]
  for claim in claims:
    assert f"| {claim.row} − {claim.base} |" in section
  assert len(claims) == 6 and {claim.bound for claim in claims} == {3.0 if name == "e10" else 2.0}


def gradient_of_query_noise(**changes):
  """Return the largest gradient of Algorithm 1's loss, and how much the queries of two samples of e_T differ."""
  config = steps.make_config("discrimination", **changes)
  run, images = run_config.Run.of(config), steps.make_batch(config)
  batch = jax.tree.map(jnp.asarray, images)
  network = steps.network_of(config)
  params = jax.tree.map(jnp.asarray, random_params(network.shapes, seed=0))
  noise = sample_noise(
    step_keys(0, jnp.int32(0), jnp.int32(0)), batch, network=network, loss=run.loss, sample_posterior=False
  )

  @jax.jit
  def gradient(noise_e):
    def loss(noise_e):
      changed = dataclasses.replace(noise, noise_e=noise_e)
      return algorithms.training_losses(
        network.with_params(params), batch, changed, network=network, loss=run.loss
      ).total

    return jax.grad(loss)(noise_e)

  inference = steps.make_inference(config)
  queries = [inference.embed_images(params, images.image, seed=seed) for seed in (0, 1)]
  return np.abs(gradient(noise.noise_e)).max(), np.abs(queries[0] - queries[1]).max()


def test_the_constant_arm_reads_no_query():
  assert all(largest > 0 for largest in gradient_of_query_noise())
  assert gradient_of_query_noise(**{"model.text_stream": {"kind": "constant"}}) == (0.0, 0.0)


def test_the_noise_arm_has_no_signal():
  e = np.random.default_rng(0).standard_normal((3, 8, 16)).astype(np.float32)
  process, t = TextDiffusion(gamma=experiments.NO_SIGNAL), jnp.arange(8) * 142
  noised = [schedules.add_noise(process, jnp.asarray(clean), noise=jnp.asarray(e[2]), t=t) for clean in e[:2]]
  np.testing.assert_allclose(*noised, rtol=0, atol=1e-11)


def test_the_late_arm_has_the_last_noise_levels_alone():
  late, whole = (schedules.noise_schedule(name).alpha_bar for name in ("late", "scaled_linear"))
  np.testing.assert_allclose(late, whole[900:].repeat(10), rtol=1e-9)


def test_two_captions_of_an_image_are_in_one_batch():
  config = cli.read_config("replication/configs/scenes.py:objectives=discrimination,two_captions")
  batch = next(steps.open_batches(config))
  images, tokens = batch["image"].reshape(32, 2, -1), batch["tokens"].reshape(32, 2, -1)
  np.testing.assert_array_equal(images[:, 0], images[:, 1])
  assert (tokens[:, 0] != tokens[:, 1]).any(axis=1).all()
  source = sources.open_source(name="scenes", image_size=32)
  (first, second) = (sources.open_source(name="scenes_twice", image_size=32)[i]["caption"] for i in (0, 1))
  assert [first, second] == source[0]["captions"]
