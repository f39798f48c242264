"""The training state, the loss function and the train step: the one jit boundary.

Parameters are a flat dict (tree.py). Those whose group is `frozen` get no gradient, no optimizer state and no average.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from diffdis_jax import losses, optim, sharding, tree
from diffdis_jax.diffusion import schedules
from diffdis_jax.models import autoencoder as autoencoders
from diffdis_jax.models import build, latents
from diffdis_jax.models.diffdis import DiffDis, to_signed
from diffdis_jax.structs import AnyBatch, Batch, UserError
from diffdis_jax.tree import Params

# One key for each random choice of a step. Their numbers are part of a run's identity: append, never reorder.
KEYS = ("posterior", "t_z", "noise_z", "drop_condition", "t_e", "noise_e", "drop_image", "posterior_discrimination")
# Share of the running latent statistics that each reconstruction step keeps.
STATISTICS_DECAY = 0.98

# name -> (sum, count): sums over samples, microbatches and steps add up, and their ratio is the mean.
Metrics = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]


@struct.dataclass
class TrainState:
  step: Int[Array, ""]
  params: Params
  ema: Params
  opt_state: Any


def step_keys(seed: int, step: Int[Array, ""], microbatch: Int[Array, ""]) -> dict[str, jax.Array]:
  """The keys of one microbatch, a function of (seed, step, microbatch) alone, so that a resumed run draws the same."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), microbatch)
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(KEYS)}


class Step:
  """A config's network and training step, compiled for a mesh.

  Attributes:
    graphdef, abstract: of the module, see tree.merge.
    shapes: parameter path -> ShapeDtypeStruct.
    groups: parameter path -> group of the optimizer.
    state_shardings: of TrainState.
    train_step: (state, batch) -> (state, metrics); donates the state.
  """

  def __init__(self, config: ConfigDict, mesh: Mesh):
    build.check(config.model, objectives=config.objectives, image_size=config.image_size)
    sharding.check_batch(mesh, config.batch_size, config.optim.accumulate)
    self.config, self.mesh = config, mesh
    self._build = build.make(config.model, objectives=config.objectives)
    self.graphdef, self.abstract = build.abstract(self._build)
    self.shapes = tree.flatten(self.abstract)
    self.groups = optim.groups_of(self.shapes, config.optim.groups)
    self.trainable = [path for path, group in self.groups.items() if group != optim.FROZEN]
    _check_trainable(config, self.trainable)

    settings = config.optim.to_dict()
    self._accumulate, self._ema_decay = settings.pop("accumulate"), settings.pop("ema_decay")
    self._tx = optim.make(self.trainable, num_steps=config.num_steps, **settings)
    self._loss = make_loss(config, self.graphdef, self.abstract)

    abstract_state = jax.eval_shape(self._around, self.shapes)
    self.state_shardings = sharding.shardings(abstract_state, mesh, self.shapes)
    self.abstract_state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, self.state_shardings
    )
    self.train_step = jax.jit(
      self._traced_for_mesh,
      donate_argnums=0,
      in_shardings=(self.state_shardings, sharding.batch_sharding(mesh)),
      out_shardings=(self.state_shardings, None),
    )

  def init_params(self, key: jax.Array) -> Params:
    """Fresh parameters, born sharded."""
    init = lambda key: tree.flatten(build.initialise(self._build, key))
    # It runs once, so on a CPU, where compiling costs more than running, the compiler need not try hard.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=self.state_shardings.params, compiler_options=options)(key)

  def with_params(self, params: Params) -> TrainState:
    """The state of step 0 around these parameters; donates them."""
    return jax.jit(self._around, donate_argnums=0, out_shardings=self.state_shardings)(params)

  def _around(self, params: Params) -> TrainState:
    trainable = {path: params[path] for path in self.trainable}
    return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, ema=dict(trainable), opt_state=self._tx.init(trainable)
    )

  def _traced_for_mesh(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
    with sharding.tracing(self.mesh):
      return self._train_step(state, batch)

  def _train_step(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
    trainable = {path: state.params[path] for path in self.trainable}
    fixed = {path: value for path, value in state.params.items() if path not in trainable}
    gradient, metrics, statistics = self._gradient(trainable, fixed, batch, state.step)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
      updates, opt_state = self._tx.update(gradient, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    metrics["grad_norm"] = (optax.tree.norm(gradient), jnp.ones(()))
    return (
      TrainState(
        step=state.step + 1,
        params={**fixed, **trainable, **statistics},
        ema=optim.ema(trainable, state.ema, decay=self._ema_decay, step=state.step),
        opt_state=opt_state,
      ),
      metrics,
    )

  def _gradient(
    self, trainable: Params, fixed: Params, batch: AnyBatch, step: Int[Array, ""]
  ) -> tuple[Params, Metrics, Params]:
    """Mean gradient over the microbatches, their metrics added up, and the new latent statistics."""
    dtype = build.DTYPES[self.config.model.dtype]
    gathered = functools.partial(sharding.gathered, mesh=self.mesh, dtype=dtype)
    loss = lambda trainable, fixed, *args: self._loss(gathered(trainable), gathered(fixed), *args)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def one(microbatch: Int[Array, ""], batch: AnyBatch) -> tuple[Params, Metrics, Params]:
      keys = step_keys(self.config.seed, step, microbatch)
      (_, (metrics, statistics)), gradient = value_and_grad(trainable, fixed, batch, keys)
      return gradient, metrics, statistics

    n = self._accumulate
    if n == 1:
      return one(jnp.zeros((), jnp.int32), batch)
    # Rows are dealt out in turn, so that each device's rows stay on it.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1), batch)
    totals = jax.eval_shape(one, jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), totals)
    body = lambda total, args: (jax.tree.map(jnp.add, total, one(*args)), None)
    (gradient, metrics, statistics), _ = jax.lax.scan(body, zeros, (jnp.arange(n), split))
    mean = functools.partial(jax.tree.map, lambda x: x / n)
    return mean(gradient), metrics, mean(statistics)


def _check_trainable(config: ConfigDict, trainable: list[str]) -> None:
  if not trainable:
    raise UserError("optim.groups freezes every parameter; give at least one group a rate")
  if "reconstruction" not in config.objectives and any(path.startswith("autoencoder.") for path in trainable):
    raise UserError(
      "optim.groups trains the autoencoder, whose latents are the data of generation and discrimination; freeze it"
      " ('^autoencoder', 'frozen'), and train it first with objectives=('reconstruction',)"
    )


LossFn = Callable[[Params, Params, AnyBatch, dict[str, jax.Array]], tuple[Float[Array, ""], tuple[Metrics, Params]]]


def make_loss(config: ConfigDict, graphdef: nnx.GraphDef, abstract: nnx.State) -> LossFn:
  """(trainable, fixed, batch, keys) -> loss, (metrics, new latent statistics), for the config's objectives.

  Raises UserError for an unknown noise schedule or target.
  """
  for process in (config.image_diffusion, config.text_diffusion):
    schedules.make(process.schedule)
  schedules.check_target(config.text_diffusion.target)

  def loss(
    trainable: Params, fixed: Params, batch: AnyBatch, keys: dict[str, jax.Array]
  ) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
    model = tree.merge(graphdef, abstract, {**fixed, **trainable})
    if "reconstruction" in config.objectives:
      total, metrics, statistics = reconstruction_loss(model, batch, keys, kl_weight=config.loss.kl_weight)
    else:
      total, metrics = diffusion_loss(model, batch, keys, config)
      statistics = {}
    return total, ({"loss": mean_of(total[None]), **metrics}, statistics)

  return loss


def mean_of(per_sample: Float[Array, "b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
  return jnp.sum(per_sample), jnp.asarray(len(per_sample), jnp.float32)


def quarters_of(name: str, per_sample: Float[Array, "b"], t: Int[Array, "b"]) -> Metrics:
  """A loss by the quarter of its timestep, q1 the least noisy: a diffusion loss alone says little."""
  quarters = losses.by_timestep_quarter(jax.lax.stop_gradient(per_sample), t)
  return {f"{name}_q{i + 1}": (quarters.sum[i], quarters.count[i]) for i in range(4)}


def diffusion_loss(
  model: DiffDis, batch: AnyBatch, keys: dict[str, jax.Array], config: ConfigDict
) -> tuple[Float[Array, ""], Metrics]:
  """L = L_IG + λ L_ITA on the same (x, y) (the paper's Algorithm 1), or one of the two."""
  z, z_discrimination = latents.of_batch(model, batch, keys, sample=config.sample_posterior)
  text = model.encode_text(batch.tokens)
  null = model.encode_text(model.text_encoder.null_tokens(batch.tokens.shape[1]))
  c_null = jnp.broadcast_to(null.c, text.c.shape)

  total, metrics = jnp.zeros(()), {}
  if "generation" in config.objectives:
    loss, parts = generation_loss(model, z, text.c, c_null, keys, config)
    total, metrics = total + loss, {**metrics, **parts}
  if "discrimination" in config.objectives:
    loss, parts = discrimination_loss(model, z_discrimination, text.e, c_null, batch.tokens, keys, config)
    total, metrics = total + config.loss.ita_weight * loss, {**metrics, **parts}
  return total, metrics


def generation_loss(
  model: DiffDis,
  z: Float[Array, "b h w c"],
  c: Float[Array, "b l d"],
  c_null: Float[Array, "b l d"],
  keys: dict[str, jax.Array],
  config: ConfigDict,
) -> tuple[Float[Array, ""], Metrics]:
  """L_IG = mean ‖ε_z − Φ_u(z_t, t_z, c)‖², with c replaced by the null condition for some of the samples."""
  schedule = schedules.make(config.image_diffusion.schedule)
  b = len(z)
  t_z = jax.random.randint(keys["t_z"], (b,), 0, schedule.num_timesteps)
  noise_z = jax.random.normal(keys["noise_z"], z.shape)
  z_t = schedules.add_noise(schedule, z, noise=noise_z, t=t_z)
  dropped = jax.random.bernoulli(keys["drop_condition"], config.loss.condition_dropout, (b, 1, 1))
  prediction = model.generation(z_t=z_t, t_z=t_z, c=jnp.where(dropped, c_null, c))
  per_sample = losses.denoising(noise_z, prediction)
  metrics = {"loss_generation": mean_of(per_sample), **quarters_of("loss_generation", per_sample, t_z)}
  return per_sample.mean(), metrics


def discrimination_loss(
  model: DiffDis,
  z: Float[Array, "b h w c"],
  e: Float[Array, "b d"],
  c_null: Float[Array, "b l d"],
  tokens: Int[Array, "b l"],
  keys: dict[str, jax.Array],
  config: ConfigDict,
) -> tuple[Float[Array, ""], Metrics]:
  """L_ITA: InfoNCE between the denoised text query ê_0 and the batch's text queries e.

  The noised query is data, not a path for gradients: a text tower in training learns from e as the target only.
  """
  text = config.text_diffusion
  schedule = schedules.make(text.schedule)
  b = len(z)
  t_e = jax.random.randint(keys["t_e"], (b,), 0, schedule.num_timesteps)
  noise_e = jax.random.normal(keys["noise_e"], e.shape)
  e_t = schedules.add_noise(schedule, jax.lax.stop_gradient(e), noise=noise_e, t=t_e, gamma=text.gamma)
  dropped = jax.random.bernoulli(keys["drop_image"], config.loss.image_dropout, (b,))
  prediction = model.discrimination(
    e_t=e_t,
    t_e=t_e,
    z=jnp.where(dropped[:, None, None, None], 0.0, z),
    t_z=jnp.full((b,), config.condition_timestep, jnp.int32),
    c_null=c_null,
  )
  query = schedules.to_data(schedule, e_t, prediction=prediction, target=text.target, t=t_e, gamma=text.gamma)
  result = losses.contrastive(
    query,
    e,
    model.logit_scale[...],
    captions=losses.caption_ids(tokens),
    dropped=dropped,
    gather=sharding.everywhere,
  )
  metrics = {
    "loss_discrimination": mean_of(result.loss[None]),
    "alignment_accuracy": mean_of(result.accuracy[None]),
    "temperature": mean_of(losses.temperature(model.logit_scale[...])[None]),
    **quarters_of("loss_discrimination", result.query_to_text, t_e),
  }
  return result.loss, metrics


def reconstruction_loss(
  model: DiffDis, batch: Batch, keys: dict[str, jax.Array], *, kl_weight: float
) -> tuple[Float[Array, ""], Metrics, Params]:
  """L1 + KL of the autoencoder, and its latents' running shift and scale to zero mean and unit variance."""
  x = to_signed(batch.image)
  posterior = model.autoencoder.encode(x)
  latent = autoencoders.sample_posterior(posterior, keys["posterior"])
  result = losses.reconstruction(
    x,
    model.autoencoder.decode(latent),
    mean=posterior.mean,
    log_variance=posterior.log_variance,
    kl_weight=kl_weight,
  )
  metrics = {name: mean_of(value) for name, value in (("loss_l1", result.l1), ("loss_kl", result.kl))}

  latent = jax.lax.stop_gradient(latent)
  keep, shift, scale = STATISTICS_DECAY, model.autoencoder.shift[...], model.autoencoder.scale[...]
  mean, deviation = latent.mean(axis=(0, 1, 2)), latent.std(axis=(0, 1, 2))
  statistics = {
    "autoencoder.shift": keep * shift + (1.0 - keep) * mean,
    "autoencoder.scale": 1.0 / (keep / scale + (1.0 - keep) * jnp.maximum(deviation, 1e-6)),
  }
  return result.loss.mean(), metrics, statistics
