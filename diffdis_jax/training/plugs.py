"""What each objective of config/objectives.py plugs into training: the loss of its step, and what it chooses before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from diffdis_jax.common.params import Params
from diffdis_jax.config.run import Run
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import Keys
from diffdis_jax.structs import TrainingBatch
from diffdis_jax.training import anchors, long_tail
from diffdis_jax.training import loss_function as losses
from diffdis_jax.training.loss_function import ModelLoss
from diffdis_jax.training.metrics import Metrics, mean_of

LossFn = Callable[..., tuple[Float[Array, ""], tuple[Metrics, Params]]]


@dataclasses.dataclass(frozen=True)
class Plug:
  """Of one objective, or of those that stand together.

  Attributes:
    loss: of a network with parameters.
    selection: of a run: what chooses parameters by all the others, before its first step; None for nothing.
    chosen: names of these parameters.
  """

  loss: ModelLoss
  selection: Callable[[Run], anchors.Selection] | None = None
  chosen: frozenset[str] = frozenset()


# One for both: Algorithm 1 leaves out the loss of an objective that is not there.
_DIFFUSION = Plug(losses.diffusion_loss)
PLUGS = {
  "generation": _DIFFUSION,
  "discrimination": _DIFFUSION,
  "reconstruction": Plug(losses.reconstruction_loss),
  "contrastive": Plug(losses.clip_loss),
  "class_contrastive": Plug(long_tail.class_contrastive_loss),
  "long_tail_head": Plug(long_tail.head_loss, selection=anchors.Selection, chosen=frozenset({anchors.ANCHORS})),
}


def plug_of(objectives: Sequence[str]) -> Plug:
  """What these plug in. Those that stand together share one."""
  return PLUGS[objectives[0]]


def loss_function(network: Network, run: Run) -> LossFn:
  """(trainable, fixed, batch, keys, teacher) -> loss, (metrics, new latent statistics), for the run's objectives.

  `teacher`: the trainable parameters as they were at the start, of objectives that keep them.
  """
  loss_of = plug_of(run.objectives).loss

  def loss(
    trainable: Params, fixed: Params, batch: TrainingBatch, keys: Keys, teacher: Params | None = None
  ) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
    model = network.with_params({**fixed, **trainable})
    # What is frozen is the same now and then, and so is kept once.
    start = network.with_params({**fixed, **teacher}) if teacher else None
    found = loss_of(model, batch, keys, network=network, run=run, teacher=start)
    return found.total, ({"loss": mean_of(found.total[None]), **found.metrics}, found.statistics)

  return loss
