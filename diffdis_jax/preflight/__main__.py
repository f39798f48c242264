"""Estimates memory, step time and cost of a config on chips that are not there.

  diffdis preflight --config=diffdis_cc3m --topology=v5e:8x8 --config.mesh.fsdp=4

It compiles the real training step from shapes, with the compiler for TPUs or for NVIDIA's GPUs (the extras `tpu` and
`cuda`). For TPUs the time is the compiler's own estimate; for GPUs it is a bound from the chip's peak figures. Without
these extras XLA compiles for as many CPU devices, and memory and collectives are those of a CPU's program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from diffdis_jax.common import cli, files
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError, install
from diffdis_jax.models import attention
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import chips, flops, targets
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS

ESTIMATES = {
  "seconds": "the compiler's sum",
  "seconds_by_cycles": "its operations' cycles, which charge what moves in bf16 twice",
}
# What each makes of images/s and of a cost.
BOUNDS = {
  "seconds": ("", ""),
  "seconds_by_cycles": ("at least ", "at most "),
  "seconds_bound": ("at most ", "at least "),
}


def estimate(config: ConfigDict, platform: str, topology: chips.Topology) -> dict[str, Any]:
  """Compile a config's train step for a topology, and return its report.

  Raises UserError: a network, mesh or batch that cannot run there.
  """
  run, target = Run.of(config), targets.find(platform, topology, FLAGS.slices)
  return compile_step(run, target, num_pairs=FLAGS.num_pairs, epochs=FLAGS.epochs)


def compile_step(run: Run, target: targets.Target, *, num_pairs: int, epochs: float) -> dict[str, Any]:
  """Compile the train step for a target, and return its report, which is logged."""
  # The mesh is of the target's devices, and the code traced for its platform, whatever this machine has: attention
  # picks its kernel by them.
  mesh = sharding.make_mesh(**vars(run.mesh), devices=target.devices)
  with attention.standing_in_for(target.chip.platform):
    program = flops.trace_train(Trainer(run, mesh))
    lowered = program.lower()
  shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  logging.info("compiling for %d x %s (%s), compiler %s", mesh.size, target.chip.kind, shape, target.compiler)
  report = summarise(program, targets.compile(lowered, target), target, num_pairs=num_pairs, epochs=epochs)
  for line in lines(report):
    logging.info("%s", line)
  if not report["fits"]:
    logging.info("try, in this order: --config.model.remat=full, a larger --config.mesh.fsdp, a smaller batch")
  return report


def summarise(
  program: flops.Program, compiled: targets.Compiled, target: targets.Target, *, num_pairs: int, epochs: float
) -> dict[str, Any]:
  """Return everything that is known of a program; bytes are GiB of one chip, operations TFLOP.

  Args:
    num_pairs, epochs: what a run passes over, for its cost.

  `seconds` is the compiler's own sum, its `optimal_seconds`; `seconds_by_cycles` adds up the cycles that it notes
  beside each operation, an upper figure: it charges what is read and written in bf16 twice. Images and chip-hours go by
  `planned_by`: `seconds` where there is one, else `seconds_by_cycles`, else `seconds_bound`, the time that the chips
  need at their peak. What moves between chips takes time that is in none of them: `seconds_between_chips`, at all that
  links can carry, runs beside the rest, after it, or in part.
  """
  # The program's operations are all devices' together, the compiler's figures are one's.
  num_chips, chip = len(target.devices), target.chip
  bound = program.operations / num_chips / chip.flops
  estimates = dict(seconds=compiled.seconds, seconds_by_cycles=compiled.seconds_by_cycles, seconds_bound=bound)
  # The first that there is, in this order; the bound, which is always there, last.
  planned_by, planned = next((name, seconds) for name, seconds in estimates.items() if seconds)
  result = dict(
    compiler=target.compiler,
    for_this_chip=target.compiler != "cpu",
    chip=chip.kind,
    chips=num_chips,
    images=program.rows,
    parameters=program.parameters,
    fits=0 < compiled.arguments and compiled.memory <= chip.memory,  # without arguments the compiler refused it
    memory_gib=dict(
      arguments=compiled.arguments / chips.GIB,
      temporaries=compiled.temporaries / chips.GIB,
      outputs=compiled.outputs / chips.GIB,
      total=compiled.memory / chips.GIB,
      chip=chip.memory / chips.GIB,
    ),
    operations_tflop=program.operations / 1e12,
    collectives_gib={kind: size / chips.GIB for kind, size in compiled.collectives.items()},
    traffic=vars(compiled.traffic),
    **estimates,
    seconds_between_chips=compiled.traffic.seconds(chip),
    planned_by=planned_by,
    mfu=None if planned_by == "seconds_bound" else bound / planned,
    images_per_second=program.rows / planned,
  )
  if epochs:
    hours = epochs * num_pairs / program.rows * planned * num_chips / 3600
    result.update(epochs=epochs, num_pairs=num_pairs, chip_hours=hours)
  return result


def lines(result: dict[str, Any]) -> list[str]:
  """Return the lines of a report for reading."""
  memory, bound = result["memory_gib"], result["seconds_bound"]
  text = [f"{result['parameters']:,} parameters, {result['images']} images on {result['chips']} x {result['chip']}"]
  if not result["for_this_chip"]:
    text.append(f"compiled by XLA for {result['compiler']}: memory and collectives are that program's, not the chip's")
  # The TPU compiler refuses what does not fit, so that there is no program of which more could be said.
  if result["compiler"] == "tpu" and not memory["arguments"]:
    return [*text, f"memory a chip: {memory['total']:.2f} GiB wanted of {memory['chip']:.0f}: DOES NOT FIT"]
  text.append(
    f"memory a chip: {memory['arguments']:.2f} arguments + {memory['temporaries']:.2f} temporaries"
    f" + {memory['outputs']:.2f} outputs = {memory['total']:.2f} GiB of {memory['chip']:.0f}:"
    f" {'fits' if result['fits'] else 'DOES NOT FIT'}"
  )
  text.append(f"operations: {result['operations_tflop']:.2f} TFLOP in all")
  for key, by in ESTIMATES.items():
    if seconds := result[key]:
      used = "; what follows goes by it" if key == result["planned_by"] else ""
      share = f"{100 * bound / seconds:.1f} % of the chips' peak"
      text.append(f"estimated time: {1e3 * seconds:.1f} ms, {share}, by {by}{used}")
  if result["planned_by"] == "seconds_bound":
    text.append(f"time: at least {1e3 * bound:.1f} ms, at the chips' peak; no estimate")
  if between := result["seconds_between_chips"]:
    text.append(f"between chips: at least {1e3 * between:.1f} ms, at all their links can carry; beside the rest or not")
  elif crossing := result["traffic"]["network_bytes"] / chips.GIB:
    text.append(f"between chips: unknown; {crossing:.3f} GiB a chip cross a network whose speed is not known")
  (of_rate, of_cost), rate = BOUNDS[result["planned_by"]], result["images_per_second"]
  text.append(f"{of_rate}{rate:.0f} images/s" if rate >= 10 else f"{of_rate}{rate:.2g} images/s")
  # A bound at the chips' peak has no traffic in it either, but then says `at least` already.
  beside = "" if result["planned_by"] == "seconds_bound" else ", not in that time"
  moved = ", ".join(f"{kind} {size:.3f}" for kind, size in result["collectives_gib"].items())
  text.append(f"collectives{beside}, GiB a chip: {moved or 'none'}")
  if hours := result.get("chip_hours"):
    shown = f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}"
    text.append(f"{result['epochs']:g} epochs of {result['num_pairs']:,} pairs: {of_cost}{shown} chip-hours")
  return text


def define_flags() -> None:
  cli.config_flag()
  flags.DEFINE_string("topology", None, "chips and layout, such as v5e:8x8, or h100:8x4 for four hosts of eight")
  flags.DEFINE_integer("slices", 1, "how many such slices, joined by the data centre's network", lower_bound=1)
  flags.DEFINE_boolean("cpu", False, "compile for CPU devices, also where the chips' own compiler is installed")
  flags.DEFINE_float("epochs", 6, "epochs of the run, for its cost", lower_bound=0)
  flags.DEFINE_integer("num_pairs", 2_905_954, "pairs of the training set, for the cost; CC3M's", lower_bound=1)
  flags.DEFINE_string("out", None, "JSON file to write")


def main(argv: Sequence[str]) -> None:
  if FLAGS.out:
    files.check_out(FLAGS.out)
  if not FLAGS.topology:
    raise UserError("give --topology, such as v5e:8x8 or h100:8")
  topology = chips.parse(FLAGS.topology)
  report = estimate(FLAGS.config, prepare(topology), topology)
  if FLAGS.out:
    files.write_out(FLAGS.out, files.as_json({"train": report}))


def prepare(topology: chips.Topology) -> str:
  """Make JAX ready to compile for these chips, before anything asks for devices. Returns the compiler's platform."""
  platform = "tpu" if topology.is_tpu else "cuda"
  if not targets.is_installed(platform) and not FLAGS.cpu:
    what = {"tpu": "libtpu", "cuda": "jax's CUDA plugin"}[platform]
    logging.warning("%s is not installed (%s); XLA compiles for CPU devices instead", what, install(platform))
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  if targets.is_installed(platform) and not FLAGS.cpu:
    jax.config.update("jax_enable_compilation_cache", False)  # without the device, its programs cannot be read back
    return platform
  jax.config.update("jax_num_cpu_devices", topology.size * FLAGS.slices)
  cli.compilation_cache()
  return "cpu"


if __name__ == "__main__":
  define_flags()
  cli.run(main)
