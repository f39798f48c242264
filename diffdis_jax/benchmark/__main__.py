"""Times the joint training step against its single tasks, or the step of CLIP.

  diffdis benchmark --config=diffdis_cc3m:runlocal --out=benchmark.json

The steps take turns, round by round, so that a machine whose speed drifts affects all of them alike. `table6` times the
rows of the paper's Table 6, CLIP, Stable Diffusion and DiffDis; table6.md gets the table:

  diffdis benchmark table6 --config=table6 --out=table6.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import inference
from diffdis_jax.benchmark import table6
from diffdis_jax.common import cli, files
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import flops
from diffdis_jax.run import provenance
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS
OBJECTIVES = {
  "joint": ("generation", "discrimination"),
  "generation": ("generation",),
  "discrimination": ("discrimination",),
}
OF_CLIP = {"contrastive": ("contrastive",)}


def define_flags() -> None:
  cli.config_flag()
  flags.DEFINE_string("out", None, "JSON file to write", required=True)
  flags.DEFINE_integer("rounds", 5, "timed steps of each kind", lower_bound=1)


def main(argv: Sequence[str]) -> None:
  if argv[1:] not in ([], ["table6"]):
    raise UserError(f"unexpected argument {argv[1]!r}; diffdis benchmark [table6] --config=... --out=...")
  is_table = argv[1:] == ["table6"]
  if ("models" in FLAGS.config) != is_table:
    raise UserError("table6 takes --config=table6, the other benchmark the config of one model")
  cli.compilation_cache()
  cli.use_all_cores()
  # Check these flags before anything is timed: a mistyped path should not cost minutes.
  files.check_out(FLAGS.out)
  if is_table and FLAGS.out.endswith(".md"):
    raise UserError(f"--out={FLAGS.out} should end in .json; the table is written beside it, as .md")
  # Record this before the measurement, during which the checkout may change.
  record = provenance.provenance(origin(FLAGS.config))
  if is_table:
    models = table6_models(FLAGS.config, sharding.make_mesh(**FLAGS.config.mesh))
    counts = {name: FLAGS.config[name] for name in ("generated", "classified")}
    results = table6.time_table6(models, rounds=FLAGS.rounds, **counts)
    files.write_out(f"{FLAGS.out.removesuffix('.json')}.md", table6.markdown(results))
  else:
    results = time_steps(trainers(Run.of(FLAGS.config)), rounds=FLAGS.rounds)
  files.write_out(FLAGS.out, files.as_json({**results, "provenance": record}))


def origin(config: ConfigDict) -> dict[str, Any]:
  """Describe what is timed for the record: a config, or several models by their names."""
  if "models" in config:
    return {name: provenance.of_config(model.to_dict()) for name, model in config.models.items()}
  return provenance.of_config(config.copy_and_resolve_references().to_dict())


def table6_models(config: ConfigDict, mesh: Mesh) -> dict[str, table6.Model]:
  """Return the models that configs/table6.py names, without allocating anything."""
  models = {}
  for name, fields in config.models.items():
    run = Run.of(fields)
    step = Trainer(run, mesh)
    model = inference.Inference(step.network, run.inference, mesh=mesh, batch_size=run.batch_size)
    models[name] = table6.Model(step=step, inference=model, trained=config.trained[name])
  return models


def trainers(run: Run) -> dict[str, Trainer]:
  """Return the joint step and its two single tasks, or CLIP's. Raises UserError: the config trains neither."""
  if run.task.network == "autoencoder" or run.task.labelled:
    raise UserError(
      f"benchmark times steps of generation, discrimination and CLIP, and this config's objective is"
      f" {run.objectives[0]}; its own pace is in the metrics.jsonl of a run, as steps_per_sec"
    )
  mesh = sharding.make_mesh(**vars(run.mesh))
  kinds = OF_CLIP if run.task.network == "clip" else OBJECTIVES
  return {name: Trainer(run.trained_for(*objectives), mesh) for name, objectives in kinds.items()}


def time_steps(trainers: Mapping[str, Trainer], *, rounds: int) -> dict[str, Any]:
  """Measure the seconds of each step (median and all rounds), its floating-point operations (`flops.count`), and
  ratios.

  Args:
    trainers: the steps by their names, on the same mesh and with the same batch.
    rounds: number of timed steps of each.
  """
  first = next(iter(trainers.values()))
  mesh, run, batch = first.mesh, first.run, table6.random_batch(first)
  states, steps, operations = {}, {}, {}
  for name, step in trainers.items():
    states[name] = step.with_params(step.init_params(jax.random.key(0)))
    traced = step.train_step.trace(states[name], batch)
    steps[name] = traced.lower().compile()
    operations[name] = flops.count(traced.jaxpr)
    logging.info("%s: compiled, %.1f GFLOP a step", name, operations[name] / 1e9)
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for index in range(rounds + 1):
    for name, step in steps.items():
      begin = time.perf_counter()
      states[name], metrics = step(states[name], batch)
      jax.block_until_ready(metrics)
      if index:  # the first round warms up
        seconds[name].append(time.perf_counter() - begin)
    logging.info("round %d of %d", index, rounds)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  ratios = {}
  if "joint" in median:
    ratios = dict(
      joint_over_generation=median["joint"] / median["generation"],
      joint_over_sum=median["joint"] / (median["generation"] + median["discrimination"]),
      joint_over_generation_flop=operations["joint"] / operations["generation"],
    )
    logging.info("%s", ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
  return dict(
    device=f"{mesh.size} x {jax.devices()[0].device_kind}",
    batch_size=run.batch_size,
    image_size=run.image_size,
    seconds=median,
    rounds=seconds,
    gigaflop={name: value / 1e9 for name, value in operations.items()},
    **ratios,
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1)
