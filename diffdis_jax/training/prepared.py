"""The programs that a run begins with, before anything is allocated: to compile ahead, to keep, or to load."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from diffdis_jax.config.run import Run
from diffdis_jax.parallel import executables, programs
from diffdis_jax.training.flops import abstract_batch
from diffdis_jax.training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a run trains with; nothing is allocated yet."""

  trainer: Trainer
  train_step: programs.AheadOfTime

  @classmethod
  def of(cls, run: Run, mesh: Mesh, folder: executables.Folder | None = None) -> Prepared:
    """`folder`: where its programs may lie compiled. Raises UserError: a run that cannot be trained on this mesh."""
    trainer = Trainer(run, mesh, folder)
    shapes = abstract_batch(run, trainer.network, mesh)
    step = programs.AheadOfTime(
      "the training step", trainer.train_step, *trainer.abstract_state.split(), shapes, kept=trainer.kept
    )
    return cls(trainer, step)

  def check(self, *, begins: bool) -> None:
    """Raises UserError where --compiled has the programs of another run. `begins`: whether the run is new."""
    for program in (self.train_step, *((self.trainer.initialise, self.trainer.assemble) if begins else ())):
      program.check()

  def save(self, step: executables.Fresh | None = None) -> None:
    """Compiles and keeps all that a run begins with. `step`: the train step, where it has been compiled. Raises
    UserError: it cannot be kept."""
    self.trainer.initialise.save()
    self.trainer.assemble.save()
    self.train_step.save(step)

  def compile_ahead(self) -> None:
    """Has threads compile all that takes long before the first step of a new run."""
    self.trainer.initialise.start()
    self.trainer.assemble.start()
    self.train_step.start()
