"""A compiled program's figures for people and files."""

from __future__ import annotations

from typing import Any

from diffdis_jax.estimates.chips import GIB
from diffdis_jax.estimates.programs import Program
from diffdis_jax.estimates.targets import Compiled, Target

HOUR = 3600.0


def summarise(program: Program, compiled: Compiled, target: Target, *, num_pairs: int, epochs: float) -> dict[str, Any]:
  """Everything that is known of a program; bytes are GiB of one chip, operations TFLOP.

  Args:
    num_pairs, epochs: what a run passes over, for its cost; 0 epochs for a program that does not train.

  `seconds` and `seconds_by_cycles` are the compiler's two estimates, each times the turns of its loops, by operations,
  whose bodies it takes once; images and chip-hours go by the slower one. Where the compiler has neither,
  `seconds_bound`, the time that the chips need at their peak, stands in. What moves between chips takes time that is in
  none of them.
  """
  chips, chip = len(target.devices), target.chip
  bound = program.operations / chips / chip.flops
  seconds, by_cycles = (
    each * program.turns if each else None for each in (compiled.seconds, compiled.seconds_by_cycles)
  )
  shown = max(filter(None, (seconds, by_cycles)), default=bound)
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
    seconds=seconds,
    seconds_by_cycles=by_cycles,
    seconds_bound=bound,
    mfu=bound / shown if seconds or by_cycles else None,
    images_per_second=program.rows / shown,
  )
  if epochs:
    result.update(
      epochs=epochs, num_pairs=num_pairs, chip_hours=epochs * num_pairs / program.rows * shown * chips / HOUR
    )
  return result


def lines(name: str, result: dict[str, Any]) -> list[str]:
  """A report for reading."""
  memory = result["memory_gib"]
  chip = f"{result['chips']} x {result['chip']}"
  said = [f"{name}: {result['parameters']:,} parameters, {result['images']} images on {chip}"]
  if not result["for_this_chip"]:
    said.append(f"compiled by XLA for {result['compiler']}: memory and collectives are that program's, not the chip's")
  if result["compiler"] == "tpu" and not memory["arguments"]:
    said.append(f"memory a chip: {memory['total']:.2f} GiB wanted of {memory['chip']:.0f}: DOES NOT FIT")
    return said
  said.append(
    f"memory a chip: {memory['arguments']:.2f} arguments + {memory['temporaries']:.2f} temporaries"
    f" + {memory['outputs']:.2f} outputs = {memory['total']:.2f} GiB of {memory['chip']:.0f}:"
    f" {'fits' if result['fits'] else 'DOES NOT FIT'}"
  )
  said.append(f"operations: {result['operations_tflop']:.2f} TFLOP in all")
  estimates = [
    f"{1e3 * result[key]:.1f} ms by {what}"
    for key, what in (("seconds", "the compiler's sum"), ("seconds_by_cycles", "its operations' cycles"))
    if result[key]
  ]
  if estimates:
    said.append(f"estimated time: {', '.join(estimates)}: {100 * result['mfu']:.1f} % of the chips' peak")
  else:
    said.append(f"time: at least {1e3 * result['seconds_bound']:.1f} ms, at the chips' peak; no estimate")
  at_most, at_least, beside = ("", "", ", not in that time") if estimates else ("at most ", "at least ", "")
  said.append(f"{at_most}{result['images_per_second']:.0f} images/s")
  moved = ", ".join(f"{kind} {size:.3f}" for kind, size in result["collectives_gib"].items())
  said.append(f"collectives{beside}, GiB a chip: {moved or 'none'}")
  if "chip_hours" in result:
    said.append(
      f"{result['epochs']:g} epochs of {result['num_pairs']:,} pairs: {at_least}{result['chip_hours']:.0f} chip-hours"
    )
  return said
