"""What a config's step would need and cost on machines that need not be there.

  python -m diffdis_jax.preflight --config=configs/diffdis_cc3m.py --topology=v5e:8x8 [--config.a.b=v ...] \
      [--programs=train,generation,discrimination] [--search] [--out=F.json]

compiles the very train step from shapes alone, with the compiler for TPUs or for NVIDIA's GPUs (the extras `tpu` and
`cuda`), and says whether it fits, how long a step should take by that compiler's own estimate, and what the whole run
costs. The GPUs' compiler estimates no time: what is given is a bound from the chip's peak figures. Without either, XLA
compiles for as many CPU devices, and memory and collectives are those of a CPU's program.

  python -m diffdis_jax.preflight calibration --topology=v5p:2x2x1 [--out=F.json]

says how far the TPU compiler's estimates lie above the least time of plain products, convolutions and sums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, cli, code_digest, files
from diffdis_jax.data.build import read_data
from diffdis_jax.errors import UserError, install
from diffdis_jax.inference import Inference, read_sampling
from diffdis_jax.method.network import Network
from diffdis_jax.models import attention
from diffdis_jax.parallel import chips, sharding
from diffdis_jax.preflight import calibration, report, search, targets
from diffdis_jax.training import flops
from diffdis_jax.training.build import build_step, plain

FLAGS = flags.FLAGS

PROGRAMS = ("train", "generation", "discrimination")
CC3M_PAIRS = 2_905_954
# What traces and compiles.
COMPILERS = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
COMPILERS += (*targets.CUDA, *targets.CUDNN)


def trace_program(name: str, config: ConfigDict, mesh: Mesh) -> flops.Program:
  """Raises UserError for a config that the mesh cannot run, or that lacks this program."""
  if name == "train":
    step, counted = build_step(config, mesh), build_step(plain(config), mesh)
    return flops.trace_train(step, counted, read_data(config), batch_size=config.batch_size)
  if name not in config.objectives:
    raise UserError(f"--programs has {name}; this config's objectives are {', '.join(config.objectives)} alone")
  sampling = read_sampling(config.inference.to_dict())
  inference, counted = (
    Inference(Network.of(each), sampling, mesh=mesh, batch_size=config.batch_size) for each in (config, plain(config))
  )
  return flops.trace_inference(name, inference, counted)


def compile_one(
  name: str, config: ConfigDict, target: targets.Target, *, num_pairs: int, epochs: float, hlo: str | None = None
) -> dict[str, Any]:
  """The report of one program; `hlo`, a folder, gets the program's text.

  Raises:
    UserError: a config, mesh or batch that cannot run there.
  """
  mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
  with attention.standing_in_for(target.chip.platform):
    program = trace_program(name, config, mesh)
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


def run(config: ConfigDict, target: targets.Target) -> dict[str, Any]:
  """Every program asked for, and where the train step does not fit and --search is given, what would make it fit."""
  run_config.check_types(config.to_dict())
  settings = dict(num_pairs=FLAGS.num_pairs, epochs=FLAGS.epochs)
  results: dict[str, Any] = {
    name: compile_one(name, config, target, hlo=FLAGS.hlo, **settings) for name in FLAGS.programs
  }
  if FLAGS.search and "train" in results and not results["train"]["fits"]:
    tried = search.candidates(
      remat=config.model.remat,
      mesh=config.mesh.to_dict(),
      batch_size=config.batch_size,
      accumulate=config.optim.accumulate,
      chips=len(target.devices),
      slices=FLAGS.slices,
    )

    def attempt(changes: search.Changes) -> dict[str, Any]:
      changed = config.copy_and_resolve_references().unlock()
      changed.update_from_flattened_dict(changes)
      return compile_one("train", changed, target, **settings)

    results["search"] = search.first_fit(tried, attempt)
  return results


def describe_search(trials: Sequence[dict[str, Any]]) -> str:
  """What makes the step fit, as flags."""
  if not trials or not trials[-1]["report"]["fits"]:
    return "nothing tried fits: neither remat, fsdp nor smaller batches; take more or larger chips"
  return "fits with " + " ".join(f"--config.{name}={value}" for name, value in trials[-1]["changes"].items())


def cache_file(config: str, platform: str, present: targets.Target | None) -> epath.Path:
  """Where the results of this config, target, package and compiler are kept.

  Args:
    config: as JSON.
    platform: compiler.
    present: the target, where its devices must be there.
  """
  asked = [FLAGS.topology, FLAGS.slices, platform, sorted(FLAGS.programs), FLAGS.search, FLAGS.num_pairs, FLAGS.epochs]
  kinds = [device.device_kind for device in present.devices] if present else []
  flags_of_xla = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *targets.MEMORY_VARIABLES)]
  code = code_digest.of(".", packages=COMPILERS)
  key = json.dumps([config, asked, kinds, flags_of_xla, code], sort_keys=True)
  return buckets.path(files.user_cache("preflight")) / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def define_flags() -> None:
  """The command line."""
  cli.config_flag(required=False)
  flags.DEFINE_string(
    "topology", None, "chips and their layout, such as v5e:8x8, h100:8, or h100:8x4 for four hosts of eight"
  )
  flags.DEFINE_integer("slices", 1, "how many of them, joined by the data centre's network", lower_bound=1)
  flags.DEFINE_enum("platform", None, targets.PLATFORMS, "compiler; that of the topology's chips where it is installed")
  flags.DEFINE_list("programs", ["train"], f"some of {','.join(PROGRAMS)}")
  flags.DEFINE_bool("search", False, "where the train step does not fit, try remat, fsdp and smaller batches")
  flags.DEFINE_float("epochs", 6, "of the run, for its cost", lower_bound=0)
  flags.DEFINE_integer("num_pairs", CC3M_PAIRS, "of the training set, for the run's cost", lower_bound=1)
  flags.DEFINE_string("out", None, "JSON file to write")
  flags.DEFINE_string("hlo", None, "folder for the compiled programs' text")


def main(argv: Sequence[str]) -> None:
  if argv[1:] not in ([], ["calibration"]):
    raise UserError(
      f"unexpected argument {argv[1]!r}; python -m diffdis_jax.preflight --config=... --topology=..., or calibration"
      " --topology=..."
    )
  if not argv[1:] and FLAGS.config is None:
    raise UserError("--config=FILE.py is missing, such as configs/diffdis_cc3m.py")
  for name in FLAGS.programs:
    if name not in PROGRAMS:
      raise UserError(f"--programs has {name!r}; it is some of {','.join(PROGRAMS)}")
  if FLAGS.out:
    files.check_out(FLAGS.out)
  if FLAGS.hlo and not buckets.path(FLAGS.hlo).is_dir():
    raise UserError(f"--hlo={FLAGS.hlo} is no folder; create it first")
  topology = chips.parse(FLAGS.topology) if FLAGS.topology else None
  platform = targets.choose_platform(FLAGS.platform, topology)
  if platform == "cpu" and topology and topology.is_tpu and FLAGS.platform is None:
    logging.warning("libtpu is not installed (%s); XLA compiles for CPU devices instead", install("tpu"))
  elif platform == "cpu" and topology and FLAGS.platform is None:
    logging.warning("jax's CUDA plugin is not installed (%s); XLA compiles for CPU devices instead", install("cuda"))
  targets.prepare(platform, topology, FLAGS.slices)
  if platform != "cpu" and topology:
    jax.config.update("jax_enable_compilation_cache", False)  # without the device, its programs cannot be read back
  else:
    cli.compilation_cache()
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  if argv[1:]:
    results = calibration.calibrate(targets.find(platform, topology, FLAGS.slices))
  else:
    results = estimate(platform, topology)
  if FLAGS.out:
    files.write_out(FLAGS.out, files.as_json(results))


def estimate(platform: str, topology: chips.Topology | None) -> dict[str, Any]:
  """Every program of the config that was asked for, from the cache where the same was asked before."""
  present = targets.find(platform, topology, FLAGS.slices) if topology is None else None
  kept = cache_file(FLAGS.config.to_json_best_effort(), platform, present)
  results = None if FLAGS.hlo else read_kept(kept)
  if results is not None:
    logging.info("the same was asked before; from %s", kept)
    for name in FLAGS.programs:
      for line in report.lines(name, results[name]):
        logging.info("%s", line)
  else:
    results = run(FLAGS.config, present or targets.find(platform, topology, FLAGS.slices))
    try:
      kept.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(kept, json.dumps(results).encode())
    except OSError as error:
      logging.warning("the answer is not kept in %s: %s", kept.parent, error.strerror or error)
  if "search" in results:
    logging.info("%s", describe_search(results["search"]))
  return results


def read_kept(file: epath.Path) -> dict[str, Any] | None:
  """What was answered before; None where it was not, or the file is damaged."""
  try:
    return files.read_json(file)
  except (OSError, UserError):
    return None


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1)
