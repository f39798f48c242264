"""Training a config: what is made for it, in which order, and its start. `steps` has what follows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from diffdis_jax.common import buckets, files
from diffdis_jax.common.params import Params
from diffdis_jax.config.model import Model
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.data.build import LatentShapes, latent_facts, open_loader
from diffdis_jax.inference import Inference
from diffdis_jax.method.network import Network
from diffdis_jax.parallel import batches, processes, sharding
from diffdis_jax.run import checkpoint, committed, history, profile, provenance, trackers, watchdog, workdir, writers
from diffdis_jax.training import facts, start, stored_inputs
from diffdis_jax.training.evaluator import Evaluator
from diffdis_jax.training.flops import rate_at_peak
from diffdis_jax.training.prepared import Prepared
from diffdis_jax.training.step import Trainer
from diffdis_jax.training.steps import Steps, Tools


def train_and_evaluate(
  run: Run,
  path: str,
  *,
  tracker: str = "",
  profiled: str = "",
  prepared: Prepared | None = None,
  hang_timeout: float = watchdog.SECONDS,
) -> None:
  """Trains to `run.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Args:
    run: its config's record.
    path: its workdir.
    tracker: one of trackers.TRACKERS, which gets what the writers get; empty for none.
    profiled: steps to trace, as `profile.parse` takes them; empty for none.
    prepared: of this run; None to do it here, for a mesh of all devices.
    hang_timeout: as `watchdog.Watchdog` takes its seconds.

  Raises:
    UserError: bad data or workdir, a config that the devices cannot train, or more steps to skip than may be.
    Preempted: SIGTERM or, as Interrupted, Ctrl-C came; the steps so far are saved.
  """
  # Flags first: they need neither devices nor data.
  span = profile.parse(profiled, num_steps=run.num_steps) if profiled else None
  trackers.check(tracker)
  provenance.code()  # now: the checkout may change in the minutes until a start is recorded
  mesh = prepared.trainer.mesh if prepared else sharding.make_mesh(**vars(run.mesh))
  stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
  if jax.process_count() == 1:  # each of several has said so when it joined the others
    processes.log_place()
  processes.on_first(functools.partial(trackers.sign_in, tracker))
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())  # from the start: building and compiling may take minutes

    # Everything that can be wrong with a config or its data is found before the workdir is touched.
    prepared = prepared or Prepared.of(run, mesh)
    trainer = prepared.trainer
    # Closed where the run fails or is stopped too: what is read ahead would be waited for at the program's end, and in
    # a notebook, which keeps the error and all that it reached, worker processes would live on.
    rows = sharding.local_rows(mesh, run.batch_size)
    loader = open_loader(run, rows=rows, latents=latent_shapes(trainer.network))
    iterator = stack.enter_context(contextlib.closing(loader))
    dog = stack.enter_context(watchdog.Watchdog(hang_timeout))
    inference = make_inference(trainer, stop, dog)
    evaluator = Evaluator(run, inference)
    selection = trainer.plug.selection(run) if trainer.plug.selection else None
    facts.log(trainer)
    facts.check_same_on_all(run)
    # As process 0 sees it: what follows is the same on all.
    begins = bool(processes.from_first(np.uint8(committed.latest_step(path) is None)))
    if begins:
      start.find_initial(run.init_from, trainer)

    before = open_workdir(path, trainer, stack)
    checkpointer = stack.enter_context(checkpoint.Checkpointer(path, run.checkpoint))
    if checkpointer.latest_step() != run.num_steps:
      prepared.train_step.start()  # in parallel to reading and initialising parameters, which may take a minute each
    if begins:
      trainer.assemble.start()
    tools = Tools(run, prepared, iterator, evaluator, checkpointer, stop, dog, rate_at_peak(trainer))
    made = functools.partial(selection.params, inference, path) if selection else None
    go_on(tools, path, made=made, before=before, tracker=tracker, span=span)
    log_best(path, run.checkpoint, checkpointer)


def make_inference(trainer: Trainer, stop: processes.PreemptionHandler, dog: watchdog.Watchdog) -> Inference:
  """With the run's network, beside its state."""

  def after_batch() -> None:
    dog.alive()
    stop.raise_if_agreed()

  run, mesh = trainer.run, trainer.mesh
  inference = Inference(
    trainer.network, run.inference, mesh=mesh, batch_size=rows_at_a_time(run, mesh), after_batch=after_batch
  )
  inference.duplicate_captions = run.loss.duplicate_captions  # so that the held-out loss is the one that is trained
  return inference


def open_workdir(path: str, trainer: Trainer, stack: contextlib.ExitStack) -> int | None:
  """Makes the workdir this run's, and locks it until `stack` closes. The number of steps that it had before it was made
  longer; None where it was not."""
  fields = trainer.run.to_dict()
  moved = facts.moved(trainer.run, path)
  # open_for_training does it again, when no other process can change the folder.
  workdir.check_config(path, fields, moved=moved)
  processes.check_shared(path)
  # The lock before anything is written: two runs in one workdir would each drop the other's lines and checkpoints.
  processes.on_first(lambda: stack.enter_context(workdir.Lock(path)))
  before = workdir.lengthened(path, fields)
  workdir.open_for_training(path, fields, is_writer=processes.is_first(), moved=moved)
  if processes.is_first():
    files.write_whole(buckets.path(path) / "parameters.txt", facts.overview(trainer).encode())
  return before


def go_on(
  tools: Tools,
  path: str,
  *,
  made: Callable[[Params], Params] | None,
  before: int | None,
  tracker: str,
  span: profile.Span | None,
) -> None:
  """To the end from the last checkpoint, if there is one.

  Args:
    made: as of `start.restore_or_init`.
    before: as of `open_workdir`.
    tracker, span: as of `train_and_evaluate`, and its `profiled` parsed.
  """
  run, trainer, is_writer = tools.run, tools.prepared.trainer, processes.is_first()
  tools.dog.alive()
  state, meta = start.restore_or_init(trainer, tools.checkpointer, tools.iterator, made)
  # Not before: the digests are of parameters, which are there only now.
  if stored := latent_facts(run.data):
    assert isinstance(run.model, Model)  # CLIP has no latents
    stored_inputs.check_stored(stored, trainer.layout.by_path(state).params, run.model, trainer.trainable)
  step = int(state.step)
  if before is not None:
    facts.log_longer(run, before, step)
  if step and is_writer:
    facts.warn_of_other_data(run, path)
  known = facts.of_start(trainer, begins=not step)
  track = functools.partial(trackers.open_tracker, tracker, path, run.to_dict())
  # What is entered closes from the last to the first: trace, lines, history; then a pending save, and the lock.
  with contextlib.ExitStack() as stack:
    stack.enter_context(history.recorded(path, step=step, is_writer=is_writer, facts=known))
    evaluated = meta.get("evaluated", True)
    writer = writers.open_writer(path, start_step=step, is_writer=is_writer, evaluated=evaluated, open_tracker=track)
    stack.enter_context(contextlib.closing(writer))
    profiler = stack.enter_context(contextlib.closing(profile.Profiler(span, path, start_step=step)))
    Steps(tools, writer, profiler, start_step=step, meta=meta).run_to_end(state)


def log_best(path: str, kept: CheckpointPolicy, checkpointer: checkpoint.Checkpointer) -> None:
  """Which checkpoint of a finished run is the best, where that is defined."""
  if not kept.best_metric:
    return
  checkpointer.wait()  # for the last save
  if best := checkpoint.best(path, kept):
    logging.info("best %s %.4f at step %d: evaluate --best measures it", kept.best_metric, best.value, best.step)


def rows_at_a_time(run: Run, mesh: Mesh) -> int:
  """Of a call of evaluations and samples: no more than a step has, beside whose state they must fit, and which may take
  a batch in parts; of a whole batch at least 64."""
  of_step = run.batch_size // run.optim.accumulate
  if run.optim.accumulate == 1:
    of_step = max(of_step, batches.ROWS)
  return min(batches.rows_of_a_call(mesh), of_step)


def latent_shapes(network: Network) -> LatentShapes | None:
  """What stored latents must fit; None for the training of an autoencoder, of CLIP or on labels, which needs images."""
  if network.task.needs_images:
    return None
  return LatentShapes(latent=network.latent_shape, text_width=network.model.text_encoder.width)
