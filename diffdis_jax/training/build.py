"""A config to its training step."""

from __future__ import annotations

from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax.errors import UserError, check_number, read_section
from diffdis_jax.method.network import LONG_TAIL, Network
from diffdis_jax.training.long_tail import LongTail
from diffdis_jax.training.loss_function import Loss
from diffdis_jax.training.optim import Optim
from diffdis_jax.training.step import Trainer


def plain(config: ConfigDict) -> ConfigDict:
  """The config that operations are counted by: nothing is computed twice, and none of them is inside a kernel. A batch
  that is one whole in several microbatches is taken at once, without the pass that GradCache adds."""
  changed = config.copy_and_resolve_references().unlock()
  changed.model.update(remat="none", attention_kernel="xla")
  if changed.optim.contrastive_batch == "whole":
    changed.optim.accumulate = 1
  return changed


def build_step(config: ConfigDict, mesh: Mesh) -> Trainer:
  """The training step of a config, for a mesh. Nothing is allocated.

  Raises:
    UserError: a field out of its range, or fields that do not go together.
  """
  check_number("seed", config.seed, at_least=0, at_most=2**32 - 1)
  check_number("num_steps", config.num_steps, at_least=1)
  if "contrastive" in config.objectives and config.data.discrimination_view != "shared":
    raise UserError(
      f"data.discrimination_view is {config.data.discrimination_view!r}; objective contrastive has one view of an"
      " image, by data.augment, so leave it at 'shared'"
    )
  # The sections first: a number out of its range is told at once, before the network is built.
  optim = read_section(Optim, config.optim.to_dict(), "optim")
  loss = read_section(
    Loss,
    config.loss.to_dict() | {"sample_posterior": config.sample_posterior, "long_tail": read_long_tail(config)},
    "loss",
  )
  if "class_contrastive" in config.objectives and optim.accumulate > 1 and optim.contrastive_batch == "whole":
    raise UserError(
      f"optim.accumulate is {optim.accumulate}; objective class_contrastive takes a batch whole: leave it at 1, or let"
      " each microbatch be a batch of its own by optim.contrastive_batch='microbatch'"
    )
  return Trainer(
    Network.of(config),
    mesh,
    optim=optim,
    loss=loss,
    batch_size=config.batch_size,
    num_steps=config.num_steps,
    seed=config.seed,
  )


def read_long_tail(config: ConfigDict) -> LongTail | None:
  """The `long_tail` section of a run of long-tailed recognition; None of any other.

  Raises:
    UserError: such a run without it or on other data, or another run with it or on such data.
  """
  asked = bool({*LONG_TAIL} & {*config.objectives})
  for name, there in (("long_tail", "long_tail" in config), ("data.sampling", "sampling" in config.data)):
    if there != asked:
      raise UserError(
        f"objectives is {', '.join(config.objectives)}, and {name} is {'there' if there else 'missing'}; it belongs to"
        f" {' and '.join(LONG_TAIL)}: take configs/places_lt.py or configs/shapes_lt.py"
      )
  if not asked:
    return None
  if config.data.sampling.sentences != ("class_contrastive" in config.objectives):
    raise UserError(
      f"data.sampling.sentences is {config.data.sampling.sentences}; class_contrastive needs sentences, and"
      " long_tail_head has its anchors instead"
    )
  return read_section(LongTail, config.long_tail.to_dict(), "long_tail")
