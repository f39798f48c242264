"""The programs that a run begins with, which compile before anything is allocated."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from diffdis_jax.config.run import Run
from diffdis_jax.parallel import programs
from diffdis_jax.training.flops import abstract_batch
from diffdis_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a run trains with; nothing is allocated yet."""

  trainer: Trainer
  train_step: programs.AheadOfTime

  @classmethod
  def of(cls, run: Run, mesh: Mesh) -> Prepared:
    """Describe the programs of a run. Raises UserError: a run that cannot be trained on this mesh."""
    trainer = Trainer(run, mesh)
    shapes = abstract_batch(run, trainer.network, mesh)
    step = programs.AheadOfTime("the training step", trainer.train_step, *trainer.abstract_state.split(), shapes)
    return cls(trainer, step)

  def compile_ahead(self) -> None:
    """Have threads compile all that takes long before the first step of a new run."""
    self.trainer.initialise.start()
    self.trainer.assemble.start()
    self.train_step.start()
