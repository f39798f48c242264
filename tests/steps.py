"""Run training steps of the tiny config, which compile in seconds, with random parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax.common.params import Params
from diffdis_jax.config import Run, read_fields
from diffdis_jax.data.build import open_loader
from diffdis_jax.inference import Inference
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import Batch, TrainState
from diffdis_jax.training import step
from diffdis_jax.training.metrics import Metrics
from diffdis_jax.training.start import latent_shape
from diffdis_jax.training.step import step_keys
from tests import tiny
from tests.models.networks import random_params

BOS, EOS = 97, 98

NUM_TIMESTEPS = 1000
_COSINE = np.cos((np.arange(NUM_TIMESTEPS + 1) / NUM_TIMESTEPS + 0.008) / 1.008 * np.pi / 2) ** 2
_BETAS = {
  "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS) ** 2,
  "linear": np.linspace(0.00085, 0.012, NUM_TIMESTEPS),
  "cosine": np.minimum(1 - _COSINE[1:] / _COSINE[:-1], 0.999),
}
ALPHA_BAR = {name: np.cumprod(1 - betas) for name, betas in _BETAS.items()}


def make_config(*objectives: str, **changes: Any) -> ConfigDict:
  """Make the tiny config with a vocabulary of 99 tokens and attention in the middle block alone: it compiles quickly.

  `changes` maps fields, by dotted path, to values.
  """
  config = tiny.get_config()
  config.model.unet.attention = (False,)
  config.model.text_encoder.update(vocab_size=99, bos_id=BOS, eos_id=EOS)
  config.objectives = objectives or ("generation", "discrimination")
  if "reconstruction" in config.objectives:
    config.optim.groups = ((".*", "new"),)
  config.update_from_flattened_dict(changes)
  return config


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  devices = jax.devices()[: data * fsdp * tensor]
  return sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def make_batch(config: ConfigDict, seed: int = 0) -> Batch:
  """Make images of smooth noise and captions of two to five words; the last two rows have the same caption."""
  rng = np.random.default_rng(seed)
  n, side = config.batch_size, config.image_size
  coarse = rng.integers(0, 256, (n, side // 4, side // 4, 3), np.uint8)
  tokens = np.full((n, config.data.max_length), EOS, np.int32)
  tokens[:, 0] = BOS
  for row in tokens:
    length = rng.integers(2, 6)
    row[1 : 1 + length] = rng.integers(0, BOS, length)
  tokens[-1] = tokens[-2]
  return Batch(image=coarse.repeat(4, axis=1).repeat(4, axis=2), tokens=tokens)


def make_inference(config: ConfigDict, *, mesh: Mesh | None = None, batch_size: int = 64, **sampling: Any) -> Inference:
  run = Run.of(config).replace({f"inference.{name}": value for name, value in sampling.items()})
  return Inference(Network.of(run), run.inference, mesh=mesh, batch_size=batch_size)


def config_of(workdir: epath.PathLike) -> ConfigDict:
  """Read the config of a run. It is not locked, so that a test may change it."""
  return ConfigDict(read_fields(workdir))


def network_of(config: ConfigDict) -> Network:
  return Network.of(Run.of(config))


def build_trainer(config: ConfigDict, mesh: Mesh) -> step.Trainer:
  return step.Trainer(Run.of(config), mesh)


def open_batches(config: ConfigDict, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
  """Open the batches that a run of this config trains on."""
  run = Run.of(config)
  return open_loader(run, rows=rows, latent_shape=latent_shape(Network.of(run)))


class Trainer:
  """A compiled training step with random parameters; `batch` shows which fields and shapes the step takes."""

  def __init__(self, config: ConfigDict, mesh: Mesh | None = None, batch: Any = None):
    self.config, self.mesh = config, make_mesh() if mesh is None else mesh
    self.step = build_trainer(config, self.mesh)
    self.params = random_params(self.step.shapes, seed=0)
    lowered = self.step.train_step.lower(self.step.abstract_state, self.place(batch or make_batch(config)))
    self._train_step = lowered.compile()

  @property
  def text(self) -> str:
    """Return the text of the compiled step."""
    return self._train_step.as_text()

  def place(self, batch: Any) -> Any:
    return type(batch)(**sharding.to_global(vars(batch), self.mesh))

  def initial(self) -> TrainState:
    return self.step.with_params(jax.device_put(self.params, self.step.param_shardings))

  def run(self, state: TrainState, *batches: Any) -> tuple[TrainState, list[Metrics]]:
    """Take a step on each of the batches; return the state, and each step's metrics on the host."""
    state, metrics = jax.tree.map(jnp.copy, state), []  # the step reuses the memory of its input state
    for batch in batches:
      state, metrics_now = self._train_step(state, self.place(batch))
      metrics.append(jax.device_get(metrics_now))
    return state, metrics


def moments(opt_state: Any, name: str) -> dict[str, jax.Array]:
  """Return Adam's moments `mu` or `nu` by path."""
  leaves = jax.tree.leaves_with_path(opt_state)
  return {key[-1].key: x for key, x in leaves if jax.tree_util.GetAttrKey(name) in key}


def loss_function(network: Network, run: Run) -> Any:
  """Return a run's loss as a function of (trainable, fixed, batch, keys, teacher), without gathering over devices."""

  def loss(
    trainable: Params, fixed: Params, batch: Any, keys: dict[str, jax.Array], teacher: Params | None = None
  ) -> Any:
    build = lambda trainable: network.with_params({**fixed, **trainable})
    return step.loss_of(network, run, build)(trainable, batch, keys, teacher or {})

  return loss


def make_keys(microbatch: int = 0) -> dict[str, jax.Array]:
  return step_keys(0, jnp.int32(0), jnp.int32(microbatch))


class Loss:
  """A config's loss as a function of (trained parameters, batch, keys). The other parameters are fixed."""

  def __init__(self, config: ConfigDict, *, trained: str = ""):
    self.network = network_of(config)
    self.params = random_params(self.network.shapes, seed=0)
    self.trained = {path: value for path, value in self.params.items() if re.search(trained, path)}
    self._fixed = {path: value for path, value in self.params.items() if path not in self.trained}
    self._loss = loss_function(self.network, Run.of(config))

  def __call__(self, trained: Params, batch: Batch, keys: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    # The compiled step also takes JAX arrays.
    trained, fixed, batch = jax.tree.map(jnp.asarray, (trained, self._fixed, batch))
    loss, (metrics, _) = self._loss(trained, fixed, batch, keys)
    return loss, metrics

  def value_and_grad(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    (loss, _), gradient = jax.jit(jax.value_and_grad(self, has_aux=True))(self.trained, batch, make_keys())
    return float(loss), jax.device_get(gradient)


def means(metrics: Metrics) -> dict[str, float]:
  return {name: float(x.total) / float(x.count) if x.count else np.nan for name, x in metrics.items()}
