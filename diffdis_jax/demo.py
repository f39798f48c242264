"""Trains, evaluates and samples a small DiffDis on rendered shapes, with no download.

  diffdis demo --out=runs/demo

Writes results.json and grid.png into the folder. Run it again to resume where it was stopped; results.json then lacks
the time it took.
"""

from __future__ import annotations

import os
import shlex
import shutil
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags, logging

from diffdis_jax import evaluate, inference
from diffdis_jax.common import buckets, cli, files
from diffdis_jax.config import Run
from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import samples, tasks
from diffdis_jax.evals.results import ResultFile
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance
from diffdis_jax.training import loop
from diffdis_jax.training.step import Trainer

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("out", "runs/demo", "folder of the two runs, results.json and grid.png")
  flags.DEFINE_integer("seed", 0, "seed of both runs: parameters, order of the images, noise", lower_bound=0)


def main(argv: Sequence[str]) -> None:
  cli.compilation_cache()
  cli.use_all_cores()
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  begin, out = time.monotonic(), buckets.local(FLAGS.out, "--out")
  run, resumed = str(out / "diffdis"), (out / "autoencoder").exists()
  autoencoder, config = cli.read_config("shapes:autoencoder"), cli.read_config("shapes")
  # Both runs get it, so that another seed is another autoencoder too.
  autoencoder.seed = config.seed = FLAGS.seed
  config.init_from = str(out / "autoencoder")
  config.sample_prompts = ()  # grid.png has these very prompts
  # One device trains the autoencoder as fast as two; the other cores compile what comes next.
  first, second = Run.of(autoencoder), Run.of(config)
  small = Trainer(first, sharding.make_mesh(**vars(first.mesh), devices=jax.devices()[:1]))
  large = Trainer(second, sharding.make_mesh(**vars(second.mesh)))
  if not resumed:
    logging.info("compiling DiffDis while its autoencoder trains")
    threading.Thread(target=large.compile_ahead, daemon=True).start()
  loop.train_and_evaluate(first, second.init_from, trainer=small)
  loop.train_and_evaluate(second, run, trainer=large)

  asked = tasks.of_config(second.evals, tasks=("zero_shot", "generation_accuracy"))
  # A report looks for figures and pictures in the workdir.
  records = evaluate.evaluate(run, asked, kept=ResultFile(f"{run}/evaluation.json", resumes=False))
  metrics = {name: record["metrics"] for by_set in records.values() for name, record in by_set.items()}
  draw_classes(run, out / "grid.png", seed=FLAGS.seed)
  (out / "diffdis" / "samples").mkdir(exist_ok=True)
  shutil.copy(out / "grid.png", out / "diffdis" / "samples" / f"grid_{second.num_steps:08d}.png")
  results = dict(
    zero_shot_top1=metrics["test"]["acc1"],
    zero_shot_unseen_top1=metrics["unseen"]["acc1"],
    generation_agreement=metrics["generated"]["acc1_seen"],
    generation_agreement_unseen=metrics["generated"]["acc1_unseen"],
    classifier_accuracy=metrics["generated"]["judge_acc1"],
  )
  if not resumed:  # or else the time would be of a part
    results["seconds"] = time.monotonic() - begin
  origin = provenance.provenance(provenance.of_run(run, step=second.num_steps))
  files.write_json(out / "results.json", {**results, "provenance": origin})
  logging.info("%s", "  ".join(f"{name} {value:.3f}" for name, value in results.items()))
  logging.info("finished: images in %s, results in %s", out / "grid.png", out / "results.json")
  logging.info('to generate more: diffdis generate --workdir=%s --prompt="a red star" --out=images', shlex.quote(run))
  logging.info("to see all of it: diffdis report --workdir=%s --out=report.html", shlex.quote(run))


def draw_classes(run: str, path: os.PathLike[str], *, seed: int) -> None:
  """Generate one image of each class, with a star at those that training never saw."""
  model, params = inference.load(run)
  prompts, unseen = [f"a {name}" for name in shapes.CLASSNAMES], {" ".join(pair) for pair in shapes.UNSEEN}
  images = model.generate(params, Tokenizer(model.max_length)(prompts), model.noise(len(prompts), seed=seed))
  captions = [f"{prompt} *" if prompt.removeprefix("a ") in unseen else prompt for prompt in prompts]
  samples.save_grid(np.asarray(images), captions, path, columns=len(shapes.SHAPES))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
