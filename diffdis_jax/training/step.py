"""The training state and the train step: the one jit boundary. What it minimises is in plugs.py.

Parameters are a flat dict (common/params.py). Those whose group is `frozen` get no gradient, no optimizer state and no
average. With optim.ema_decay of 0 nothing has one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Average
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import Objective
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError
from diffdis_jax.method.network import Network
from diffdis_jax.models import remat
from diffdis_jax.parallel import programs, sharding
from diffdis_jax.structs import LabelledBatch, TrainingBatch, TrainState
from diffdis_jax.training import gradcache, packing, plugs, skips
from diffdis_jax.training import optim as optimizers
from diffdis_jax.training.loss_function import Gradient
from diffdis_jax.training.metrics import Metrics

# One key for each random choice of a step. Their numbers are part of a run's identity: append, never reorder.
KEYS = (
  *("posterior", "t_z", "noise_z", "drop_condition", "t_e", "noise_e", "drop_image", "posterior_discrimination"),
  *("mix", "noised_image"),
)


def step_keys(seed: int | UInt32[Array, ""], step: Int[Array, ""], microbatch: Int[Array, ""]) -> dict[str, jax.Array]:
  """The keys of one microbatch, a function of (seed, step, microbatch) alone, so a resumed run samples the same."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), microbatch)
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(KEYS)}


def is_running(metrics: Metrics | None) -> bool:
  """Whether the step that gives these has not ended yet."""
  return metrics is not None and not all(value.is_ready() for value in jax.tree.leaves(metrics))


def take_step(train_step: Callable[..., Any], state: TrainState, batch: TrainingBatch) -> tuple[TrainState, Metrics]:
  """The state after a step, and its metrics; donates what the step changes. `train_step`: compiled or not."""
  changed, fixed = state.split()
  changed, metrics = train_step(changed, fixed, batch)
  return changed.joined(fixed), metrics


class Trainer:
  """A network's training step, compiled for a mesh.

  Args:
    run: says what is trained, and how.
    mesh: devices.

  Attributes:
    run, mesh: as given.
    network: of the run.
    plug: of its objectives.
    shapes: parameter path -> ShapeDtypeStruct.
    groups: parameter path -> group of the optimizer.
    trainable: paths of the parameters that are trained.
    layout: of a state's small parameters; its `by_path` gives a state as it is saved and as inference takes its params.
    param_shardings: parameter path -> NamedSharding.
    state_shardings: of TrainState.
    abstract_state: TrainState of ShapeDtypeStructs, with their shardings.
    abstract_by_path: the same, as it is saved.
    train_step: (what it changes, what it only reads, batch) -> (what it changed, metrics), of `TrainState.split`;
      donates the first. `take_step` calls it.

  Raises:
    UserError: sections that do not fit the network, or a batch that the mesh cannot split.
  """

  def __init__(self, run: Run, mesh: Mesh):
    sharding.check_batch(mesh, run.batch_size, run.optim.accumulate)
    self.run, self.mesh, self.plug = run, mesh, plugs.plug_of(run.objectives)
    self.network = network = Network.of(run)
    self.shapes = network.shapes
    self.groups = optimizers.groups_of(self.shapes, run.optim.groups)
    self.trainable = [path for path, group in self.groups.items() if group != optimizers.FROZEN]
    _check_trainable(run.task, self.trainable)
    self._averages = self.run.optim.ema_decay > 0  # without them, inference takes the raw parameters
    # Changed by an autoencoder's step, though by no optimizer.
    measured = optimizers.STATISTICS if run.task.is_autoencoder else "^$"
    groups = {path: group for path, group in self.groups.items() if not re.search(measured, path)}
    frozen = groups.keys() - {*self.trainable}
    # From shapes alone: where each array lies is known before the first one is allocated.
    self.param_shardings = sharding.shardings(self.shapes, mesh, self.shapes)
    split = [path for path, place in self.param_shardings.items() if place.spec]
    self.layout = packing.layout(self.shapes, optimizers.kinds_of(groups, run.optim), frozen, split)
    self._trained = [*self.layout.common(dict.fromkeys(self.trainable))]  # as they are packed
    self._tx = optimizers.build_optimizer(self.trainable, run.optim, num_steps=run.num_steps, layout=self.layout)

    self.abstract_state = self._placed(jax.eval_shape(self._around, *self._lent(self.shapes)))
    self.abstract_by_path = self._placed(jax.eval_shape(self.layout.by_path, self.abstract_state))
    self.state_shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    changed, fixed = self.state_shardings.split()
    self.train_step = jax.jit(
      network.traced_for(mesh, self._train_step),
      donate_argnums=0,  # the new state takes the old one's memory
      in_shardings=(changed, fixed, sharding.batch_sharding(mesh)),
      out_shardings=(changed, None),
    )

  def _placed(self, abstract: TrainState) -> TrainState:
    place = sharding.shardings(abstract, self.mesh, self.shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, place)

  @functools.cached_property
  def initialise(self) -> programs.AheadOfTime:
    """Key -> fresh parameters, born sharded."""
    # It runs once, so on a CPU, where compiling costs more than running, the compiler need not try hard.
    is_cpu = self.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    initialise = jax.jit(self.network.initialise, out_shardings=self.param_shardings, compiler_options=options)
    return programs.AheadOfTime("the initialisation", initialise, jax.eval_shape(jax.random.key, 0))

  @functools.cached_property
  def assemble(self) -> programs.AheadOfTime:
    """Parameters -> the state of step 0; donates them."""
    around = jax.jit(self._around, donate_argnums=0, out_shardings=self.state_shardings)
    return programs.AheadOfTime("the state", around, *self._lent(self.abstract_by_path.params))

  def _lent(self, params: Params) -> tuple[Params, Params]:
    """Those whose memory the state takes, and the small ones, which it packs."""
    whole = self.layout.not_packed(params)
    return whole, {path: value for path, value in params.items() if path not in whole}

  def init_params(self, key: jax.Array) -> Params:
    """Fresh parameters, born sharded: the frozen ones too, which are not to stay random (start.restore_or_init)."""
    return self.initialise.compiled()(key)

  def with_params(self, params: Params) -> TrainState:
    """The state of step 0 around these parameters; donates them."""
    # Where they lie already, except those that a run chooses by itself.
    params = jax.device_put(params, self.param_shardings)
    return self.assemble.compiled()(*self._lent(params)).replace(seed=self.place_seed())

  def place_seed(self) -> UInt32[Array, ""]:
    """The run's, as `place_number` does it."""
    return self.place_number(np.asarray(self.run.seed, np.uint32))

  def place_number(self, number: np.ndarray) -> jax.Array:
    """A global array of no axes, which every process makes from its own number."""
    return jax.make_array_from_callback((), self.state_shardings.seed, lambda _: number)

  def _around(self, whole: Params, small: Params) -> TrainState:
    state = self.layout.pack_state(TrainState(params=whole | small))
    trainable = {name: state.params[name] for name in self._trained}
    return dataclasses.replace(
      state,
      step=jnp.zeros((), jnp.int32),
      ema=dict(trainable) if self._averages else {},
      opt_state=self._tx.init(trainable),
      seed=jnp.zeros((), jnp.uint32),  # with_params puts the run's in its place
      teacher=dict(trainable) if self.run.task.teacher else {},
      norms=skips.no_norms(self.run.optim),
    )

  def counted(self, batch: TrainingBatch) -> core.ClosedJaxpr:  # pyright: ignore[reportPrivateImportUsage]
    """The step by which operations are counted: nothing is computed twice, and none of them is inside a kernel. A batch
    that is one whole in several microbatches is taken at once, without the pass that GradCache adds."""
    whole = self.run.optim.contrastive_batch == "whole"
    step = functools.partial(self._train_step, microbatches=1 if whole else None)
    with remat.keeping_all():
      traced = jax.jit(self.network.counted().traced_for(self.mesh, step)).trace(*self.abstract_state.split(), batch)
    return traced.jaxpr

  def _parts(self, state: TrainState) -> tuple[Params, Params]:
    """Differentiated with respect to the first alone: frozen parameters cost no gradient and no memory for one."""
    params = self.layout.unpack(state.params) | self.layout.unpack(state.frozen)
    trainable = {path: params.pop(path) for path in self.trainable}
    return trainable, params

  def _train_step(
    self, changed: TrainState, fixed: TrainState, batch: TrainingBatch, *, microbatches: int | None = None
  ) -> tuple[TrainState, Metrics]:
    state = changed.joined(fixed)
    trainable = {name: state.params[name] for name in self._trained}
    gradient, metrics, statistics = self.gradient(state, batch, microbatches=microbatches)
    norm = optax.tree.norm(gradient)
    clipped = optimizers.clip(self.layout.pack(gradient), norm, self.run.optim)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
      updates, opt_state = self._tx.update(clipped, state.opt_state, trainable)
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    # Of CLIP as open_clip does it, after the step; in DiffDis the loss limits τ (losses.temperature).
    if self.run.task.is_clip:
      trainable = optimizers.limit_logit_scale(trainable)
    # Before it is clipped: after that it says no more than clip_norm.
    metrics["grad_norm"] = Average(total=norm, count=jnp.ones(()))
    new = dataclasses.replace(
      state,
      step=state.step + 1,
      params={**trainable, **statistics},
      ema=optimizers.update_ema(trainable, state.ema, decay=self.run.optim.ema_decay, step=state.step)
      if self._averages
      else {},
      opt_state=opt_state,
    )
    if not self.run.optim.skip_bad_steps:
      return new.split()[0], metrics
    judged = skips.judge(metrics["loss"].total, norm, state.norms, self.run.optim)
    # Here alone, after all that adds up over microbatches and devices: each device has the same norm.
    new = skips.chosen(judged.good, new, state).replace(step=new.step, norms=judged.norms)
    return new.split()[0], skips.of_taken(judged.good, metrics, norm)

  def gradient(
    self,
    state: TrainState,
    batch: TrainingBatch,
    *,
    microbatches: int | None = None,
  ) -> Gradient:
    """Of the whole batch, or the mean over microbatches that are batches of their own; metrics, added up; and the new
    latent statistics.

    Args:
      microbatches: None for as many as the run has.

    Raises:
      UserError: images that are not uint8.
    """
    _check_images(batch)
    network, run = self.network, self.run
    n = microbatches or run.optim.accumulate
    trainable, fixed = self._parts(state)
    keys = functools.partial(step_keys, state.seed, state.step)
    if n > 1 and run.optim.contrastive_batch == "whole" and run.task.grad_cache:
      assert not isinstance(batch, LabelledBatch)
      whole = gradcache.GradCache(network, run, self.mesh, n)
      # By the keys of microbatch 0, which are those of a batch that is not split.
      return whole(trainable, fixed, batch, keys(jnp.zeros((), jnp.int32)))

    gathered = functools.partial(sharding.gathered, mesh=self.mesh, dtype=network.dtype)
    loss_of = plugs.loss_function(network, run)

    def loss(trainable: Params, fixed: Params, *args: Any) -> Any:
      # Inside of what is differentiated, so that gradients go back the same way, to where the parameters are stored.
      return loss_of(gathered(trainable), gathered(fixed), *args)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(microbatch: Int[Array, ""], batch: TrainingBatch) -> Gradient:
      (_, (metrics, statistics)), gradient = value_and_grad(
        trainable, fixed, batch, keys(microbatch), gathered(self.layout.unpack(state.teacher))
      )
      return Gradient(gradient, metrics, statistics)

    if n == 1:
      return one(jnp.zeros((), jnp.int32), batch)
    # Rows are dealt out in turn, so that each device's rows stay on it.
    arrays, kind = jax.tree.flatten(batch)
    split = [jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1) for x in arrays]
    first = jax.tree.unflatten(kind, [x[0] for x in split])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.zeros((), jnp.int32), first))

    def body(total: Any, microbatch: tuple[Array, list[Array]]) -> tuple[Any, None]:
      index, rows = microbatch
      return jax.tree.map(jnp.add, total, one(index, jax.tree.unflatten(kind, rows))), None

    total, _ = jax.lax.scan(body, zeros, (jnp.arange(n), split))
    mean = functools.partial(jax.tree.map, lambda x: x / n)
    # Metrics are sums and counts, and so are added; the parts are equal, so that the mean of their means is the mean.
    return Gradient(mean(total.gradient), total.metrics, mean(total.statistics))


def _check_images(batch: Any) -> None:
  """Raises UserError for numbers of 0 to 1, as other libraries have them, all of which would be black. Of latents
  nothing is checked."""
  for name in ("image", "discrimination_image"):
    image = getattr(batch, name, None)
    if image is not None and image.dtype != np.uint8:
      raise UserError(f"the batch's {name} is {image.dtype}; give uint8 pixels, 0 to 255")


def _check_trainable(task: Objective, trainable: Sequence[str]) -> None:
  if not trainable:
    raise UserError("optim.groups freezes every parameter; give at least one group a rate")
  if not task.is_autoencoder and any(path.startswith("autoencoder.") for path in trainable):
    raise UserError(
      "optim.groups trains the autoencoder, whose latents are the data of generation and discrimination; freeze it"
      " ('^autoencoder', 'frozen'), and train it first with objectives=('reconstruction',)"
    )
