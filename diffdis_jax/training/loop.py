"""The training loop of a run: it opens data, checkpoints and logs, and takes the steps."""

from __future__ import annotations

import contextlib
import functools

import jax
from absl import logging

from diffdis_jax.config.run import Run
from diffdis_jax.errors import Diverged, Preempted, UserError
from diffdis_jax.parallel import processes, sharding
from diffdis_jax.run import checkpoint, provenance, watch, writers
from diffdis_jax.training import anchors, evaluator, run_info, start
from diffdis_jax.training.metrics import Meters
from diffdis_jax.training.step import Trainer


def train_and_evaluate(
  run: Run,
  path: str,
  *,
  tracker: str = "",
  profiled: str = "",
  trainer: Trainer | None = None,
  hang_timeout: float = watch.SECONDS,
) -> None:
  """Train up to `run.num_steps`, from the last checkpoint in the workdir `path` if there is one.

  Args:
    tracker: one of writers.TRACKERS, which also gets the metrics and images; empty for none.
    profiled: the steps to profile, as text for `watch.parse`; empty for none.
    trainer: the run's trainer; None to build it for a mesh of all devices.
    hang_timeout: the seconds of `watch.Watchdog`.

  Raises:
    UserError: the data or the workdir are wrong, or the devices cannot train the config.
    Diverged: more than `optim.skip_bad_steps` steps in a row were not finite.
    Preempted: SIGTERM or, as Interrupted, Ctrl-C came; the steps so far are saved.
  """
  traced = watch.parse(profiled, num_steps=run.num_steps) if profiled else range(0)
  processes.on_first(functools.partial(writers.check_tracker, tracker))
  provenance.code()  # read it now: the checkout may change until the start is recorded, minutes later
  mesh = trainer.mesh if trainer else sharding.make_mesh(**vars(run.mesh))
  stop = processes.PreemptionHandler(sharding.batch_sharding(mesh))
  # The watch begins here, since building and compiling may take minutes.
  with stop.listening(), watch.Watchdog(hang_timeout) as dog, contextlib.ExitStack() as stack:
    # All errors in the config and its data are found before the workdir is touched.
    trainer = trainer or Trainer(run, mesh)
    data = stack.enter_context(contextlib.closing(start.open_batches(trainer)))
    inference = evaluator.make_inference(trainer, stop, dog)
    evaluations = evaluator.Evaluator(run, inference)
    choose = functools.partial(anchors.Selection(run).params, inference, path) if run.task.head else None
    run_info.log(trainer)
    run_info.check_same_on_all(run)
    before = start.open_workdir(path, trainer, stack)  # locked until the end
    checkpoints = stack.enter_context(checkpoint.Checkpointer(path, run.checkpoint))
    # It compiles while parameters are read or initialised, which may take a minute.
    program = trainer.step if checkpoints.latest_step() != run.num_steps else None
    state, meta = start.restore_or_init(trainer, checkpoints, data, choose)
    first, is_writer, evaluated = int(state.step), processes.is_first(), meta.get("evaluated", True)
    run_info.log_changes(run, path, before=before, step=first)

    # The contexts close in reverse order: profile, logs, history, then a pending save, and the lock.
    info = run_info.of_start(trainer, begins=not first)
    stack.enter_context(provenance.recorded(path, step=first, is_writer=is_writer, facts=info))
    track = functools.partial(writers.Tracker, path, run.to_dict()) if tracker else None
    out = writers.open_writer(path, start_step=first, is_writer=is_writer, evaluated=evaluated, open_tracker=track)
    stack.enter_context(contextlib.closing(out))
    profiler = stack.enter_context(contextlib.closing(watch.Profiler(traced, path, start_step=first)))
    # A run that was stopped during an evaluation was saved without it. The evaluation is done now.
    if not evaluated:
      evaluations.after_step(first, state, out, last=first == run.num_steps)
    meters = Meters(run, start_step=first, meta=meta)
    train_step, metrics = program.compiled() if program else trainer.train_step, None
    stop.begin()  # up to here there was nothing to save, and a signal ended the process at once

    for step in meters.steps():
      dog.alive()
      profiler.before(step, metrics)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = train_step(state, trainer.place(meters.next_rows(data)))
      meters.add(step, metrics)
      profiler.after(step, metrics)

      # These steps do not depend on interruptions.
      last = step == run.num_steps
      logs, saves = last or step % run.log_every == 0, last or step % run.save_every == 0
      if (logs or saves) and (bad := int(state.skipped)) > run.optim.skip_bad_steps:
        checkpoints.wait()  # wait for the save in progress
        raise Diverged(step, bad, checkpoints.latest_step())
      if logs:
        out.scalars(step, meters.report(step))
      why, due, best = stop.agreed(), evaluations.is_due(step, last=last), {}
      # Evaluate before the save, whose metrics decide which checkpoints are kept, unless the run has to stop.
      if due and not why:
        dog.alive()
        try:
          with meters.paused():
            best, due = evaluations.after_step(step, state, out, last=last), False
        except (Preempted, UserError) as error:  # save first, so that no step is lost
          # Several processes may not all have this error, which may be about the rows of one of them.
          if jax.process_count() > 1 and type(error) is UserError:
            raise
          why = error
      # Save before the next batch is loaded, so that the iterator's position is that of the next step.
      if saves or why:
        dog.alive()
        with meters.paused():
          out.flush()
          meta = meters.to_meta() | {"evaluated": not due}
          checkpoints.save(step, state, data, meta=meta, metrics=best)
      if why:
        logging.warning("the run stops: saving step %d; run the same command again to resume", step)
        raise why
    checkpoints.wait()  # the run is finished only after its last save
