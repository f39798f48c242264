"""Estimates memory, step time and cost of a config on chips that are not there.

  diffdis preflight --config=diffdis_cc3m --topology=v5e:8x8 --config.mesh.fsdp=4

It compiles the real training step from shapes, with the compiler for TPUs or for NVIDIA's GPUs (the extras `tpu` and
`cuda`), and reports whether it fits, the time of a step, and the cost of the whole run. For TPUs the time is the
compiler's own estimate; for GPUs it is a bound from the chip's peak figures. Without these extras XLA compiles for as
many CPU devices, and memory and collectives are those of a CPU's program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax.common import buckets, cli, files
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError, install
from diffdis_jax.inference import Inference
from diffdis_jax.method.network import Network
from diffdis_jax.models import attention
from diffdis_jax.parallel import chips, sharding
from diffdis_jax.preflight import report, targets
from diffdis_jax.training import flops
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS

PROGRAMS = ("train", "generation", "discrimination")
CC3M_PAIRS = 2_905_954
Changes = dict[str, Any]  # config field -> value, of --search


def trace_program(name: str, run: Run, mesh: Mesh) -> flops.Program:
  """Trace the program of this name. Raises UserError for a run that the mesh cannot train, or that lacks this
  program."""
  if name == "train":
    return flops.trace_train(Trainer(run, mesh))
  if name not in run.objectives:
    raise UserError(f"--programs has {name}; this config's objectives are {', '.join(run.objectives)} alone")
  return flops.trace_inference(name, Inference(Network.of(run), run.inference, mesh=mesh, batch_size=run.batch_size))


def compile_one(
  name: str,
  run: Run,
  target: targets.Target,
  *,
  num_pairs: int,
  epochs: float,
  hlo: str | None = None,
) -> dict[str, Any]:
  """Compile one program and return its report.

  Args:
    hlo: folder for the program's text.

  Raises:
    UserError: a network, mesh or batch that cannot run there, or a folder that cannot be written.
  """
  # The mesh is of the target's devices, and the code traced for its platform, whatever this machine has: attention
  # picks its kernel by them.
  mesh = sharding.make_mesh(**vars(run.mesh), devices=target.devices)
  with attention.standing_in_for(target.chip.platform):
    program = trace_program(name, run, mesh)
    lowered = program.lower()
  shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  logging.info("%s: compiling for %d x %s (%s), compiler %s", name, mesh.size, target.chip.kind, shape, target.compiler)
  compiled = targets.compile(lowered, target)
  if hlo:
    files.write_whole(buckets.path(hlo) / f"{name}.txt", compiled.text.encode())
  result = report.summarise(program, compiled, target, num_pairs=num_pairs, epochs=epochs if name == "train" else 0)
  for line in report.lines(name, result):
    logging.info("%s", line)
  return result


def compile_all(run: Run, target: targets.Target) -> dict[str, Any]:
  """Compile every program asked for; where the train step does not fit and --search is given, also find what makes it
  fit."""
  settings = dict(num_pairs=FLAGS.num_pairs, epochs=FLAGS.epochs)
  results: dict[str, Any] = {name: compile_one(name, run, target, hlo=FLAGS.hlo, **settings) for name in FLAGS.programs}
  if FLAGS.search and "train" in results and not results["train"]["fits"]:
    tried = candidates(
      remat=run.model.remat,
      mesh=vars(run.mesh),
      batch_size=run.batch_size,
      accumulate=run.optim.accumulate,
      chips=len(target.devices),
      slices=FLAGS.slices,
    )

    def attempt(changes: Changes) -> dict[str, Any]:
      return compile_one("train", run.replace(changes), target, **settings)

    results["search"] = first_fit(tried, attempt)
  return results


def candidates(
  *, remat: str, mesh: Mapping[str, int], batch_size: int, accumulate: int, chips: int, slices: int = 1
) -> Iterator[Changes]:
  """Yield changes of these config fields, those that cost least first: rematerialisation, sharding over a slice, both,
  then smaller batches."""
  more_remat: Changes = {} if remat == "full" else {"model.remat": "full"}
  fsdp: Changes = {}
  if mesh["tensor"] > 0:
    fsdp = {"mesh.data": slices, "mesh.fsdp": chips // slices // mesh["tensor"]}
  sharded = mesh["fsdp"] == -1 or mesh["fsdp"] == fsdp.get("mesh.fsdp")
  # By what they cost: remat is operations, sharding is traffic, a smaller batch is another experiment.
  options = [more_remat, {} if sharded else fsdp]
  both = {**options[0], **options[1]}
  tried: list[Changes] = [{}]
  for changes in (*options, both):
    if changes not in tried:
      tried.append(changes)
      yield changes
  # A batch must divide over the chips in each microbatch; what is left over is a config that cannot run.
  smallest = chips * accumulate
  batch_size //= 2
  while batch_size >= smallest and batch_size % smallest == 0:
    yield {**both, "batch_size": batch_size}
    batch_size //= 2


def first_fit(tried: Iterable[Changes], attempt: Callable[[Changes], dict[str, Any]]) -> list[dict[str, Any]]:
  """Try the changes up to the first that fits, and return each with the report that `attempt` made of it."""
  trials = []
  for changes in tried:
    trials.append(dict(changes=changes, report=attempt(changes)))
    if trials[-1]["report"]["fits"]:
      break
  return trials


def describe_search(trials: Sequence[dict[str, Any]]) -> str:
  """Describe, as flags, what makes the step fit."""
  if not trials or not trials[-1]["report"]["fits"]:
    return "nothing tried fits: neither remat, fsdp nor smaller batches; take more or larger chips"
  return "fits with " + " ".join(f"--config.{name}={value}" for name, value in trials[-1]["changes"].items())


def define_flags() -> None:
  """Define the command line's flags."""
  cli.config_flag()
  flags.DEFINE_string(
    "topology", None, "chips and their layout, such as v5e:8x8, h100:8, or h100:8x4 for four hosts of eight"
  )
  flags.DEFINE_integer("slices", 1, "how many such slices, joined by the data centre's network", lower_bound=1)
  flags.DEFINE_enum(
    "platform", None, targets.PLATFORMS, "compiler; by default that of the topology's chips, if it is installed"
  )
  flags.DEFINE_list("programs", ["train"], f"any of {','.join(PROGRAMS)}")
  flags.DEFINE_bool("search", False, "if the training step does not fit, try remat, fsdp and smaller batches")
  flags.DEFINE_float("epochs", 6, "epochs of the run, for its cost", lower_bound=0)
  flags.DEFINE_integer("num_pairs", CC3M_PAIRS, "size of the training set, for the run's cost", lower_bound=1)
  flags.DEFINE_string("out", None, "JSON file to write")
  flags.DEFINE_string("hlo", None, "folder for the compiled programs' text")


def main(argv: Sequence[str]) -> None:
  if argv[1:]:
    raise UserError(f"unexpected argument {argv[1]!r}; diffdis preflight --config=... --topology=...")
  for name in FLAGS.programs:
    if name not in PROGRAMS:
      raise UserError(f"--programs has {name!r}; it is some of {','.join(PROGRAMS)}")
  if FLAGS.search and "train" not in FLAGS.programs:
    raise UserError(f"--programs={','.join(FLAGS.programs)}: --search is of the train step; name train in it")
  if FLAGS.out:
    files.check_out(FLAGS.out)
  if FLAGS.hlo and not buckets.path(FLAGS.hlo).is_dir():
    raise UserError(f"--hlo={FLAGS.hlo} is no folder; create it first")
  topology = chips.parse(FLAGS.topology) if FLAGS.topology else None
  results = estimate(FLAGS.config, prepare(topology), topology)
  if FLAGS.out:
    files.write_out(FLAGS.out, files.as_json(results))


def prepare(topology: chips.Topology | None) -> str:
  """Make JAX ready to compile for these chips, before anything asks for devices. Returns the platform."""
  platform = targets.choose_platform(FLAGS.platform, topology)
  if platform == "cpu" and topology and FLAGS.platform is None:
    what, extra = ("libtpu", "tpu") if topology.is_tpu else ("jax's CUDA plugin", "cuda")
    logging.warning("%s is not installed (%s); XLA compiles for CPU devices instead", what, install(extra))
  # Nothing may have asked for devices before this line, after which JAX's platforms are fixed.
  targets.prepare(platform, topology, FLAGS.slices)
  if platform != "cpu" and topology:
    jax.config.update("jax_enable_compilation_cache", False)  # without the device, its programs cannot be read back
  else:
    cli.compilation_cache()
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  return platform


def estimate(config: ConfigDict, platform: str, topology: chips.Topology | None) -> dict[str, Any]:
  """Report every program of the config that was asked for."""
  results = compile_all(Run.of(config), targets.find(platform, topology, FLAGS.slices))
  if "search" in results:
    logging.info("%s", describe_search(results["search"]))
  return results


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1)
