"""The training state and the jitted training step. losses.py has the losses.

Parameters are a flat dict (common/params.py). Those of the group `frozen` have no gradient, no optimizer state and no
average. If optim.ema_decay is 0, there are no averages.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Average
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.data.build import batch_type
from diffdis_jax.errors import UserError
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import programs, sharding
from diffdis_jax.structs import Batch, LabelledBatch, LatentBatch, TrainingBatch, TrainState
from diffdis_jax.training import gradcache, long_tail, losses
from diffdis_jax.training import optim as optimizers
from diffdis_jax.training.losses import Build, Gradient
from diffdis_jax.training.metrics import SKIPPED, Metrics

# A key for each random choice of a step. Their order determines the numbers of runs: append, never reorder.
KEYS = (
  *("posterior", "t_z", "noise_z", "drop_condition", "t_e", "noise_e", "drop_image", "posterior_discrimination"),
  "mix",
)
# The loss of each objective. Objectives that are combined share a loss: Algorithm 1 omits the loss of a missing
# objective.
LOSSES = {
  "generation": losses.diffusion_loss,
  "discrimination": losses.diffusion_loss,
  "reconstruction": losses.reconstruction_loss,
  "contrastive": losses.clip_loss,
  "class_contrastive": long_tail.class_contrastive_loss,
  "long_tail_head": long_tail.head_loss,
}


def step_keys(seed: int | UInt32[Array, ""], step: Int[Array, ""], microbatch: Int[Array, ""]) -> dict[str, jax.Array]:
  """Make the keys of a microbatch from (seed, step, microbatch), so that a resumed run samples the same noise."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), microbatch)
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(KEYS)}


class Trainer:
  """The training step of a network, compiled for a mesh.

  Args:
    run: the config of the training.
    mesh: the devices.

  Attributes:
    shapes: parameter path -> ShapeDtypeStruct.
    groups: parameter path -> the optimizer's group.
    trainable: the paths of the trained parameters.
    optimizer: clips the gradient and turns it into updates.
    param_shardings: parameter path -> NamedSharding.
    state_shardings: TrainState of NamedShardings.
    abstract_state: TrainState of ShapeDtypeStructs, with their shardings.
    train_step: (state, batch) -> (state, metrics), jitted; donates the state.

  Raises:
    UserError: sections do not fit the network, or the mesh cannot split the batch.
  """

  def __init__(self, run: Run, mesh: Mesh):
    sharding.check_batch(mesh, run.batch_size, run.optim.accumulate)
    self.run, self.mesh, self.network = run, mesh, Network.of(run)
    self.shapes = self.network.shapes
    self.groups = optimizers.groups_of(self.shapes, run.optim.groups)
    self.trainable = [path for path, group in self.groups.items() if group != optimizers.FROZEN]
    if not self.trainable:
      raise UserError("optim.groups freezes every parameter; give at least one group a rate")
    if run.task.network != "autoencoder" and any(path.startswith("autoencoder.") for path in self.trainable):
      raise UserError(
        "optim.groups trains the autoencoder, whose latents are the data of generation and discrimination; freeze it"
        " ('^autoencoder', 'frozen'), and train it first with objectives=('reconstruction',)"
      )
    self.optimizer = optimizers.build_optimizer(self.trainable, run.optim, num_steps=run.num_steps)
    # Only shapes are needed: shardings are known before any array is allocated.
    self.param_shardings = sharding.shardings(self.shapes, mesh, self.shapes)
    abstract = jax.eval_shape(self._at_start, self.shapes)
    self.state_shardings = sharding.shardings(abstract, mesh, self.shapes)
    self.abstract_state = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, self.state_shardings
    )
    self.train_step = jax.jit(
      self._train_step,
      donate_argnums=0,  # the new state takes the memory of the old one
      in_shardings=(self.state_shardings, sharding.batch_sharding(mesh)),
      out_shardings=(self.state_shardings, None),
    )

  @functools.cached_property
  def traced(self) -> jax.stages.Traced:
    """The training step, traced for its shapes without allocating anything."""
    return self.train_step.trace(self.abstract_state, abstract_batch(self.run, self.network, self.mesh))

  @functools.cached_property
  def step(self) -> programs.AheadOfTime:
    """The training step, which begins to compile at the first access."""
    return programs.AheadOfTime("the training step", self.traced.lower())

  @functools.cached_property
  def initialise(self) -> programs.AheadOfTime:
    """The program that makes all initial parameters, sharded, from a key. Frozen ones are replaced later."""
    # It runs once. On a CPU it takes longer to compile than to run, so optimise it less.
    is_cpu = self.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    initialise = jax.jit(self.network.initialise, out_shardings=self.param_shardings, compiler_options=options)
    return programs.AheadOfTime("the initialisation", initialise.lower(jax.eval_shape(jax.random.key, 0)))

  @functools.cached_property
  def assemble(self) -> programs.AheadOfTime:
    """The program that makes the state of step 0 from parameters, which it donates."""
    assemble = jax.jit(self._at_start, donate_argnums=0, out_shardings=self.state_shardings)
    return programs.AheadOfTime("the state", assemble.lower(self.abstract_state.params))

  def compile_ahead(self) -> None:
    """Begin to compile the programs that take long before the first step of a new run."""
    _ = self.step, self.initialise, self.assemble

  def place(self, rows: dict[str, Any]) -> TrainingBatch:
    """Make the global batch from the rows of each process."""
    return batch_type(self.run.data)(**sharding.to_global(rows, self.mesh))

  def init_params(self, key: jax.Array) -> Params:
    """Make initial parameters from a key."""
    return self.initialise.compiled()(key)

  def with_params(self, params: Params) -> TrainState:
    """Make the state of step 0 from these parameters, which are donated."""
    # They have these shardings already, except parameters that the run has chosen.
    params = jax.device_put(params, self.param_shardings)
    return self.numbered(self.assemble.compiled()(params), step=0)

  def numbered(self, state: TrainState, *, step: int) -> TrainState:
    """Add the step and the run's seed, which checkpoints do not store, to a state."""

    def placed(number: np.ndarray) -> jax.Array:
      # A global array without axes, which every process makes from its own number.
      return jax.make_array_from_callback((), self.state_shardings.seed, lambda _: number)

    return dataclasses.replace(
      state,
      step=placed(np.asarray(step, np.int32)),
      seed=placed(np.asarray(self.run.seed, np.uint32)),
      skipped=placed(np.asarray(0, np.int32)),
    )

  def _at_start(self, params: Params) -> TrainState:
    trainable = self._trainable(params)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=trainable if self.run.optim.ema_decay else {},
      opt_state=self.optimizer.init(trainable),
      seed=jnp.zeros((), jnp.uint32),  # `numbered` replaces it by the run's seed
      teacher=trainable if self.run.task.teacher else {},
      skipped=jnp.zeros((), jnp.int32),
    )

  def _trainable(self, params: Params) -> Params:
    return {path: params[path] for path in self.trainable}

  def _train_step(self, state: TrainState, batch: TrainingBatch) -> tuple[TrainState, Metrics]:
    section, trainable = self.run.optim, self._trainable(state.params)
    with self.network.tracing(self.mesh):
      gradient, metrics, statistics = self.gradient(state, batch)
      with jax.numpy_dtype_promotion("standard"):  # optax combines its integer step count with floats
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, trainable, step=state.step)
      trainable = cast(Params, optax.apply_updates(trainable, updates))
      # CLIP's limit after the step, as in open_clip; in DiffDis the loss limits τ (losses.temperature).
      if self.run.task.network == "clip":
        trainable = optimizers.limit_logit_scale(trainable)
      # Measure the norm before clipping: afterwards it is at most clip_norm.
      metrics["grad_norm"] = Average(total=optax.tree.norm(gradient), count=jnp.ones(()))
      new = dataclasses.replace(
        state,
        params={**state.params, **trainable, **statistics},
        ema=optimizers.update_ema(trainable, state.ema, decay=section.ema_decay, step=state.step) if state.ema else {},
        opt_state=opt_state,
      )
      return _unless_bad(new, state, metrics)

  def gradient(self, state: TrainState, batch: TrainingBatch) -> Gradient:
    """Compute the gradient of the whole batch, or the mean over microbatches that are separate batches; metrics are
    added up. Raises UserError: images are not uint8."""
    _check_images(batch)
    network, run = self.network, self.run
    n = run.optim.accumulate
    trainable = self._trainable(state.params)
    fixed = {path: value for path, value in state.params.items() if path not in trainable}
    keys = functools.partial(step_keys, state.seed, state.step)
    if n > 1 and run.optim.contrastive_batch == "whole" and run.task.grad_cache:
      assert not isinstance(batch, LabelledBatch)
      whole = gradcache.GradCache(network, run, self.mesh, n)
      # With the keys of microbatch 0, which are those of an unsplit batch.
      return whole(trainable, fixed, batch, keys(jnp.zeros((), jnp.int32)))

    def build(trainable: Params) -> Any:
      # This is differentiated, too, so that gradients get the shardings of the stored parameters.
      return network.with_params(sharding.gathered({**fixed, **trainable}, self.mesh, dtype=network.dtype))

    # Differentiate only by the trained parameters, so that frozen ones take no time and no memory.
    value_and_grad = jax.value_and_grad(loss_of(network, run, build), has_aux=True)

    named = lambda result: Gradient(result[1], *result[0][1])  # from ((loss, (metrics, statistics)), gradient)
    if n == 1:
      return named(value_and_grad(trainable, batch, keys(jnp.zeros((), jnp.int32)), state.teacher))

    def one(microbatch: Int[Array, ""], batch: TrainingBatch) -> Gradient:
      return named(value_and_grad(trainable, batch, keys(microbatch), state.teacher))

    # Microbatches take the rows in turn, so that each device's rows stay on it.
    arrays, kind = jax.tree.flatten(batch)
    split = [jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1) for x in arrays]
    first = jax.tree.unflatten(kind, [x[0] for x in split])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.zeros((), jnp.int32), first))

    def body(total: Any, microbatch: tuple[Array, list[Array]]) -> tuple[Any, None]:
      index, rows = microbatch
      return jax.tree.map(jnp.add, total, one(index, jax.tree.unflatten(kind, rows))), None

    total, _ = jax.lax.scan(body, zeros, (jnp.arange(n), split))
    mean = functools.partial(jax.tree.map, lambda x: x / n)
    # Metrics are sums and counts, which are added. Microbatches have equal sizes, so the mean of means is the mean.
    return Gradient(mean(total.gradient), total.metrics, mean(total.statistics))


def loss_of(network: Network, run: Run, build: Build) -> functools.partial[losses.Result]:
  """Return the loss of a run's objectives: (trainable, batch, keys, teacher) -> loss, (metrics, latent statistics)."""
  return functools.partial(LOSSES[run.objectives[0]], build=build, network=network, run=run)


def abstract_batch(run: Run, network: Network, mesh: Mesh) -> TrainingBatch:
  """Return the shapes of a run's global batch of images or latents."""

  def rows(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct((run.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))

  data = run.data
  tokens = rows(jnp.int32, data.max_length)
  if batch_type(data) is LatentBatch:
    moments = rows(jnp.bfloat16, *network.latent_shape)
    return LatentBatch(mean=moments, log_variance=moments, tokens=tokens)
  image = rows(jnp.uint8, run.image_size, run.image_size, 3)
  if data.sampling is not None:
    return LabelledBatch(image=image, label=rows(jnp.int32), tokens=tokens if data.sampling.sentences else None)
  return Batch(image=image, tokens=tokens, discrimination_image=None if data.own_augment is None else image)


def _unless_bad(new: TrainState, old: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
  """Return the new state, or, if the loss or the gradient is not finite, the old one with the new step number and with
  metrics that count nothing."""
  # Decide here, after all sums over microbatches and devices, so that all devices have the same numbers.
  good = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(metrics["grad_norm"].total)
  chosen = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
  numbers = {"step": old.step + 1, "skipped": jnp.where(good, 0, old.skipped + 1)}
  bad = Average(total=1.0 - good.astype(jnp.float32), count=jnp.ones(()))
  metrics = {**chosen(metrics, jax.tree.map(jnp.zeros_like, metrics)), SKIPPED: bad}
  return dataclasses.replace(chosen(new, old), **numbers), metrics


def _check_images(batch: Any) -> None:
  """Raise UserError unless images are uint8: those of other libraries, with numbers of 0 to 1, would be black."""
  for name in ("image", "discrimination_image"):
    image = getattr(batch, name, None)
    if image is not None and image.dtype != np.uint8:
      raise UserError(f"the batch's {name} is {image.dtype}; give uint8 pixels, 0 to 255")
