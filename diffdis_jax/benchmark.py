"""Times the joint step against its two single tasks, in one run on one machine.

  python -m diffdis_jax.benchmark --config=configs/benchmark.py --out=benchmark.json

The steps take turns, round by round, so that a machine whose speed drifts does so for all of them alike.

  python -m diffdis_jax.benchmark data --config=configs/diffdis_cc3m.py:runlocal --out=data.json

times the data's way from tars to batches (benchmark_data.py) instead; the config is the model whose steps wait for it.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from diffdis_jax import benchmark_data, cli, sharding, workdir
from diffdis_jax.benchmark_data import BATCH
from diffdis_jax.step import Step
from diffdis_jax.structs import Batch, UserError

OBJECTIVES = {
  "joint": ("generation", "discrimination"),
  "generation": ("generation",),
  "discrimination": ("discrimination",),
}


def benchmark_step(config: ConfigDict, *, rounds: int) -> dict[str, Any]:
  """Seconds of each step (median and all rounds), floating-point operations as the compiler counts them, and ratios."""
  mesh = sharding.make_mesh(**config.mesh)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (config.batch_size, config.image_size, config.image_size, 3), np.uint8)
  tokens = rng.integers(0, 49406, (config.batch_size, config.data.max_length), np.int32)
  batch = Batch(**sharding.to_global(dict(image=pixels, tokens=tokens), mesh))

  states, steps, operations = {}, {}, {}
  for name, objectives in OBJECTIVES.items():
    config.objectives = objectives
    step = Step(config, mesh)
    states[name] = step.with_params(step.init_params(jax.random.key(0)))
    steps[name] = step.train_step.lower(states[name], batch).compile()
    operations[name] = float((steps[name].cost_analysis() or {}).get("flops", float("nan"))) * mesh.size
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
  return dict(
    device=f"{mesh.size} x {jax.devices()[0].device_kind}",
    batch_size=config.batch_size,
    image_size=config.image_size,
    seconds=median,
    rounds=seconds,
    gigaflop={name: value / 1e9 for name, value in operations.items()},
    joint_over_generation=median["joint"] / median["generation"],
    joint_over_sum=median["joint"] / (median["generation"] + median["discrimination"]),
    joint_over_generation_flop=operations["joint"] / operations["generation"],
  )


def main(argv: Sequence[str]) -> None:
  if argv[1:] not in ([], ["data"]):
    raise UserError(f"unexpected argument {argv[1]!r}; python -m diffdis_jax.benchmark [data] --config=... --out=...")
  cli.compilation_cache()
  cli.use_all_cores()
  if not epath.Path(FLAGS.out).parent.is_dir():
    raise UserError(f"--out={FLAGS.out} lies in no folder that exists; create it first")
  results = time_data(FLAGS.config) if argv[1:] else time_steps(FLAGS.config)
  workdir.write_whole(epath.Path(FLAGS.out), (json.dumps(results, indent=2) + "\n").encode())


def time_steps(config: ConfigDict) -> dict[str, Any]:
  results = benchmark_step(config, rounds=FLAGS.rounds)
  logging.info(
    "joint / generation %.3f, joint / (generation + discrimination) %.3f, operations joint / generation %.3f",
    results["joint_over_generation"],
    results["joint_over_sum"],
    results["joint_over_generation_flop"],
  )
  return results


def time_data(config: ConfigDict) -> dict[str, Any]:
  with tempfile.TemporaryDirectory(dir=FLAGS.scratch) as folder:
    results = benchmark_data.benchmark_data(
      config, pathlib.Path(folder), images=FLAGS.images, num_pairs=FLAGS.pairs, rounds=FLAGS.rounds
    )
  for name, bar in results["bars"].items():
    logging.info("%s %.3g, bar %g: %s", name, results[name], bar, "met" if results["met"][name] else "missed")
  return results


FLAGS = flags.FLAGS

if __name__ == "__main__":
  cli.config_flag()
  flags.DEFINE_string("out", None, "JSON file to write", required=True)
  flags.DEFINE_integer("rounds", 5, "timed steps of each kind", lower_bound=1)
  flags.DEFINE_integer("images", 200, "of `data`: distinct 512 px JPEGs", lower_bound=BATCH)
  flags.DEFINE_integer("pairs", 200_000, "of `data`: small pairs prepared while memory is watched", lower_bound=1)
  flags.DEFINE_string("scratch", None, "of `data`: folder for a temporary folder, of about 5 kB a pair")
  cli.run(main, positional=1)
