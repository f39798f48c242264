"""Report a compiled program's figures to people and in files."""

from __future__ import annotations

from typing import Any

from diffdis_jax.parallel.chips import GIB
from diffdis_jax.preflight.targets import Compiled, Target
from diffdis_jax.training.flops import Program

HOUR = 3600.0
ESTIMATES = {
  "seconds": "the compiler's sum",
  "seconds_by_cycles": "its operations' cycles, which charge what moves in bf16 twice",
  "seconds_by_roof": "its schedules or memory traffic, the longer for each operation: a lower figure",
}
# What each makes of images/s and of a cost.
BOUNDS = {
  "seconds": ("", ""),
  "seconds_by_cycles": ("at least ", "at most "),
  "seconds_bound": ("at most ", "at least "),
}


def summarise(program: Program, compiled: Compiled, target: Target, *, num_pairs: int, epochs: float) -> dict[str, Any]:
  """Return everything that is known of a program; bytes are GiB of one chip, operations TFLOP.

  Args:
    num_pairs, epochs: what a run passes over, for its cost; 0 epochs for a program that does not train.

  `seconds` is the compiler's own sum, its `optimal_seconds`; `seconds_by_cycles` adds up the cycles that it notes
  beside each operation; `seconds_by_roof` the longer of each operation's schedule and memory traffic. The second takes
  a loop's body as often as it turns, and the first, which is one figure, grows by as much; a program with loops has not
  the third. Images and chip-hours go by `planned_by`: `seconds` where there is one, else `seconds_by_cycles`, else
  `seconds_bound`, the time that the chips need at their peak. What moves between chips takes time that is in none of
  them: `seconds_between_chips`, at all that links can carry, runs beside the rest, after it, or in part.

  Why not the slower one: cycles charge what is read and written in bf16 twice what the sum does (on v5p 574 against
  1,133 bytes a cycle, where memory gives 1,580), so they are an upper figure. A step that others have measured agrees
  with the sum: Stable Diffusion 2 at 512 px, batch 1024 on v5p-128, takes 0.245 s (README of diffusers' PyTorch/XLA
  example, September 2024), which by our count of operations is 50 % of peak, a third of them the encoding of images.
  For a step of as many tokens a chip, without encoding, the sum says 48 %, cycles 35 %.
  """
  # The program's operations are all devices' together, the compiler's figures are one's.
  chips, chip = len(target.devices), target.chip
  bound = program.operations / chips / chip.flops
  estimates = dict(seconds=compiled.seconds, seconds_by_cycles=compiled.seconds_by_cycles, seconds_bound=bound)
  # The first that there is, in this order; the bound, which is always there, last.
  planned_by, planned = next((name, each) for name, each in estimates.items() if each)
  estimates.update(seconds_by_roof=compiled.seconds_by_roof, seconds_between_chips=compiled.seconds_between_chips)
  result = dict(
    compiler=target.compiler,
    for_this_chip=target.exact,
    chip=chip.kind,
    chips=chips,
    images=program.rows,
    parameters=program.parameters,
    fits=compiled.fits,
    memory_gib=dict(
      arguments=compiled.arguments / GIB,
      temporaries=compiled.temporaries / GIB,
      outputs=compiled.outputs / GIB,
      total=compiled.memory / GIB,
      chip=chip.memory / GIB,
    ),
    operations_tflop=program.operations / 1e12,
    compiler_operations_tflop_chip=None if compiled.operations is None else compiled.operations / 1e12,
    collectives_gib={kind: size / GIB for kind, size in compiled.collectives.items()},
    traffic=vars(compiled.traffic),
    **estimates,
    planned_by=planned_by,
    mfu=None if planned_by == "seconds_bound" else bound / planned,
    images_per_second=program.rows / planned,
  )
  if epochs:
    result.update(
      epochs=epochs, num_pairs=num_pairs, chip_hours=epochs * num_pairs / program.rows * planned * chips / HOUR
    )
  return result


def lines(name: str, result: dict[str, Any]) -> list[str]:
  """Return the lines of a report for reading."""
  memory = result["memory_gib"]
  chip = f"{result['chips']} x {result['chip']}"
  said = [f"{name}: {result['parameters']:,} parameters, {result['images']} images on {chip}"]
  if not result["for_this_chip"]:
    said.append(f"compiled by XLA for {result['compiler']}: memory and collectives are that program's, not the chip's")
  # The TPU compiler refuses what does not fit, so that there is no program of which more could be said.
  if result["compiler"] == "tpu" and not memory["arguments"]:
    said.append(f"memory a chip: {memory['total']:.2f} GiB wanted of {memory['chip']:.0f}: DOES NOT FIT")
    return said
  said.append(
    f"memory a chip: {memory['arguments']:.2f} arguments + {memory['temporaries']:.2f} temporaries"
    f" + {memory['outputs']:.2f} outputs = {memory['total']:.2f} GiB of {memory['chip']:.0f}:"
    f" {'fits' if result['fits'] else 'DOES NOT FIT'}"
  )
  said.append(f"operations: {result['operations_tflop']:.2f} TFLOP in all")
  for key, by in ESTIMATES.items():
    if seconds := result[key]:
      share = 100 * result["seconds_bound"] / seconds
      used = "; what follows goes by it" if key == result["planned_by"] else ""
      said.append(f"estimated time: {1e3 * seconds:.1f} ms, {share:.1f} % of the chips' peak, by {by}{used}")
  if result["planned_by"] == "seconds_bound":
    said.append(f"time: at least {1e3 * result['seconds_bound']:.1f} ms, at the chips' peak; no estimate")
  if between := result["seconds_between_chips"]:
    said.append(f"between chips: at least {1e3 * between:.1f} ms, at all their links can carry; beside the rest or not")
  elif crossing := result["traffic"]["network_bytes"]:
    said.append(f"between chips: unknown; {crossing / GIB:.3f} GiB a chip cross a network whose speed is not known")
  of_rate, of_cost = BOUNDS[result["planned_by"]]
  rate = result["images_per_second"]
  said.append(f"{of_rate}{rate:.0f} images/s" if rate >= 10 else f"{of_rate}{rate:.2g} images/s")
  # A bound at the chips' peak has no traffic in it either, but then says `at least` already.
  beside = "" if result["planned_by"] == "seconds_bound" else ", not in that time"
  moved = ", ".join(f"{kind} {size:.3f}" for kind, size in result["collectives_gib"].items())
  said.append(f"collectives{beside}, GiB a chip: {moved or 'none'}")
  if "chip_hours" in result:
    hours = result["chip_hours"]
    shown = f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}"
    said.append(f"{result['epochs']:g} epochs of {result['num_pairs']:,} pairs: {of_cost}{shown} chip-hours")
  return said
