"""Times the joint training step against its single tasks, or the step of CLIP.

  diffdis benchmark --config=benchmark --out=benchmark.json

The steps are timed in turns, round by round, so that a machine whose speed drifts affects all of them alike. With
--preflight=F.json, written by `preflight --out` for the same config, the measured time is compared with the estimate.

Times the rows of the paper's Table 6: CLIP, Stable Diffusion and DiffDis; table6.md gets the table:

  diffdis benchmark table6 --config=table6 --out=table6.json
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffdis_jax import inference
from diffdis_jax.benchmark import steps, table6
from diffdis_jax.common import cli, files
from diffdis_jax.config.run import Run
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Define the command line."""
  cli.config_flag()
  flags.DEFINE_string("out", None, "JSON file to write", required=True)
  flags.DEFINE_integer("rounds", 5, "timed steps of each kind", lower_bound=1)
  flags.DEFINE_string("preflight", None, "the JSON file that preflight --out wrote for the same config; for steps only")
  flags.DEFINE_integer("images", 200, "how many distinct 512 px JPEGs", lower_bound=1)
  flags.DEFINE_string("scratch", None, "folder for temporary files, about 3 MB for each image")


def main(argv: Sequence[str]) -> None:
  if argv[1:] not in ([], ["table6"]):
    raise UserError(f"unexpected argument {argv[1]!r}; diffdis benchmark [table6] --config=... --out=...")
  kind = argv[1] if argv[1:] else "steps"
  if ("models" in FLAGS.config) != (kind == "table6"):
    raise UserError("table6 takes --config=table6, the other benchmark the config of one model")
  if FLAGS.preflight and kind != "steps":
    raise UserError(f"--preflight is of steps alone; leave it out of {kind}")
  cli.compilation_cache()
  cli.use_all_cores()
  # This and all below before anything is timed: a mistyped path should not cost the minutes.
  files.check_out(FLAGS.out)
  if kind == "table6" and FLAGS.out.endswith(".md"):
    raise UserError(f"--out={FLAGS.out} should end in .json; the table is written beside it, as .md")
  if FLAGS.scratch is not None and not os.path.isdir(FLAGS.scratch):
    raise UserError(f"no folder --scratch={FLAGS.scratch}; create it first")
  # Before the measurement, during which the checkout may change.
  made = provenance.provenance(origin(FLAGS.config))
  if kind == "table6":
    models = table6_models(FLAGS.config, sharding.make_mesh(**FLAGS.config.mesh))
    with tempfile.TemporaryDirectory(dir=FLAGS.scratch) as folder:
      results = table6.time_table6(
        models,
        pathlib.Path(folder),
        images=FLAGS.images,
        rounds=FLAGS.rounds,
        generated=FLAGS.config.generated,
        classified=FLAGS.config.classified,
      )
  else:
    results = time_steps(Run.of(FLAGS.config))
  files.write_out(FLAGS.out, files.as_json({**results, "provenance": made}))
  if kind == "table6":
    files.write_out(f"{FLAGS.out.removesuffix('.json')}.md", table6.markdown(results))


def origin(config: ConfigDict) -> dict[str, Any]:
  """Describe what is timed, for the record; several models by their names."""
  if "models" in config:
    return {name: provenance.of_config(each.to_dict()) for name, each in config.models.items()}
  return provenance.of_config(config.copy_and_resolve_references().to_dict())


def time_steps(run: Run) -> dict[str, Any]:
  """Time the joint step and its two single tasks, or CLIP's, the config's beside preflight's word where there is one.

  Raises:
    UserError: a config that trains neither DiffDis nor CLIP.
  """
  if run.task.is_autoencoder or run.task.labelled:
    raise UserError(
      f"benchmark times steps of generation, discrimination and CLIP, and this config's objective is"
      f" {run.objectives[0]}; its own pace is in the metrics.jsonl of a run, as steps_per_sec"
    )
  mesh, trainers, planned = sharding.make_mesh(**vars(run.mesh)), {}, None
  if FLAGS.preflight:
    # Read and compared before anything is timed, too.
    report, size = read_preflight(FLAGS.preflight), run.batch_size
    kind = mesh.devices.flat[0].device_kind
    planned = steps.preflighted(report, run.objectives, batch_size=size, chips=mesh.size, kind=kind)
  for name, objectives in (steps.OF_CLIP if run.task.is_clip else steps.OBJECTIVES).items():
    trainers[name] = Trainer(run.trained_for(*objectives), mesh)
  results = steps.time_steps(trainers, rounds=FLAGS.rounds)
  if planned:
    name, train = planned
    results["preflight"] = steps.beside_preflight(name, train, results["seconds"][name])
  return results


def read_preflight(path: str) -> dict[str, Any]:
  """Read what `preflight --out` wrote."""
  try:
    return dict(files.read_json(path))
  except (UserError, ValueError, TypeError) as error:
    raise UserError(f"--preflight={path} is no file that preflight --out wrote: {error}") from error


def table6_models(config: ConfigDict, mesh: Mesh) -> dict[str, table6.Model]:
  """Return the models that configs/table6.py names. Nothing is allocated."""
  models = {}
  for name, each in config.models.items():
    run = Run.of(each)
    step = Trainer(run, mesh)
    model = inference.Inference(step.network, run.inference, mesh=mesh, batch_size=run.batch_size)
    models[name] = table6.Model(step=step, inference=model, trained=config.trained[name])
  return models


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1)
