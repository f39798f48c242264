"""Generates images from prompts.

  diffdis generate --workdir=shapes --prompt="a purple star" --out=images

Writes 00000.png, 00001.png, ... (all images of the first prompt first), grid.png of the first 64, and prompts.json
with each file's prompt and the sampling settings.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from jaxtyping import Float32
from PIL import Image

from diffdis_jax.common import cli, files, progress
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError

FLAGS = flags.FLAGS
BATCH_SIZE = 16
CHUNK = 256  # images in memory at a time, or those of a call where it has more
GRID, COLUMNS, MOST_COLUMNS = 64, 8, 16  # images of grid.png, and its columns


def define_flags() -> None:
  cli.process_flags()
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)
  flags.DEFINE_multi_string("prompt", [], "text to generate an image of; may be repeated")
  flags.DEFINE_string("prompts_file", None, "text file with one prompt a line, instead of --prompt")
  flags.DEFINE_integer("num_images", 1, "images of each prompt", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "seed of the initial noise", lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_string("noise", None, "initial noise instead of --seed: .npy, [n, h, w, c]")
  # Bounds as config.sections.Sampling has them.
  flags.DEFINE_integer("steps", None, "sampling steps; by default the run's", lower_bound=1, upper_bound=999)
  flags.DEFINE_float("guidance", None, "guidance scale, of which 1 is none; by default the run's", lower_bound=0.0)
  flags.DEFINE_integer("batch_size", BATCH_SIZE, "images per compiled call", lower_bound=1)
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")


def main(argv: Sequence[str]) -> None:
  if FLAGS.noise and FLAGS["seed"].present:
    raise UserError("--noise and --seed are both given; give one of them")
  prompts = read_prompts(FLAGS.prompt, FLAGS.prompts_file)

  from diffdis_jax.parallel import processes  # not at the top: jax takes seconds, and mistakes are said before

  processes.start()
  sampling = {"generation_steps": FLAGS.steps, "generation_guidance": FLAGS.guidance}
  given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
  given |= {name: FLAGS[name].value for name in ("num_images", "seed", "noise", "step", "ema", "batch_size")}
  generate(FLAGS.workdir, prompts, FLAGS.out, **given)


def generate(
  run: str,
  prompts: Sequence[str],
  out: str,
  *,
  num_images: int = 1,
  seed: int = 0,
  noise: str | None = None,
  step: int | None = None,
  ema: bool = True,
  batch_size: int = BATCH_SIZE,
  **protocol: Any,
) -> None:
  """Generate `num_images` of each prompt and write the folder `out`, which is absent or empty, whole or not at all.

  Args:
    noise: an .npy file of the initial noise, [n, h, w, c], in the place of that of the seed.
    batch_size: images a compiled call, at most.
    step, ema, protocol: as `inference.load` takes them.

  Raises UserError: bad settings, noise or checkpoint, or `out` cannot be written.
  """
  from diffdis_jax import inference
  from diffdis_jax.evals import samples
  from diffdis_jax.evals.prompts import warn_of_long
  from diffdis_jax.parallel import processes
  from diffdis_jax.run import restore

  folder = files.empty_folder(out)  # here: what is in the way shows before anything is loaded
  prompts = [prompt for prompt in prompts for _ in range(num_images)]
  given = read_noise(noise) if noise else None
  step, ema = restore.choose(run, step, ema=ema)
  logging.info("reading %s", run)
  # A batch of the compiled program is computed whole, however few images it is for.
  model, params = inference.load(run, step=step, ema=ema, batch_size=min(batch_size, len(prompts)), **protocol)
  # The noise of all of them, so that no image depends on how they are parted.
  z_T = model.noise(len(prompts), seed) if given is None else given
  if z_T.shape != (expected := (len(prompts), *model.network.latent_shape)):
    raise UserError(f"--noise has shape {z_T.shape}; this run and these prompts need {expected}, [n, h, w, c]")
  warn_of_long(tuple(prompts), model.max_length)
  tokens, done = Tokenizer(model.max_length)(prompts), progress.Progress("generated", len(prompts), "images").add
  size = max(1, CHUNK // model.batch_size) * model.batch_size  # in whole calls, since those are computed whole
  parts = (slice(start, start + size) for start in range(0, len(prompts), size))
  images = (image for part in parts for image in model.generate(params, tokens[part], z_T[part], done=done))
  if not processes.is_first():
    deque(images, maxlen=0)  # its share of each
    return
  start = {"noise": noise} if noise else {"seed": seed}
  how = {**model.generation_protocol, **start, "checkpoint": step, "ema": ema}
  listed = [{"file": f"{i:05d}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
  columns = num_images if 1 < num_images <= MOST_COLUMNS else COLUMNS  # a prompt a row, where a row can hold it
  with files.whole_folder(folder) as temporary:
    first = []
    for entry, image in zip(listed, images, strict=True):  # each is written as it comes
      Image.fromarray(image).save(temporary / entry["file"])
      first += [image] * (len(first) < GRID)
    samples.save_grid(np.stack(first), prompts[: len(first)], temporary / "grid.png", columns=columns)
    text = json.dumps({"protocol": how, "images": listed}, indent=2, ensure_ascii=False)
    (temporary / "prompts.json").write_text(f"{text}\n", encoding="utf-8")
  logging.info("images in %s: %d; side by side: %s", out, len(prompts), folder / "grid.png")


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
  """Return the prompts of the command line, or of a file, where blank lines do not count. Raises UserError: no prompt,
  both kinds at once, or an unreadable file."""
  if prompts and file:
    raise UserError("--prompt and --prompts_file are both given; give one of them")
  if not file:
    if not prompts:
      raise UserError('no prompt; give --prompt="a red star" (may be repeated) or --prompts_file')
    return list(prompts)
  lines = [line.strip() for line in files.read_text(file, "--prompts_file").splitlines() if line.strip()]
  if not lines:
    raise UserError(f"no prompt in --prompts_file={file}; it should hold one a line")
  return lines


def read_noise(file: str) -> Float32[np.ndarray, "..."]:
  """Return the array of an .npy file. Raises UserError: unreadable, or not of finite real numbers."""
  try:
    noise = np.load(file)
    if not np.can_cast(noise.dtype, np.float32, "same_kind") or not np.isfinite(noise).all():
      raise ValueError("it holds something else than finite numbers")
    return np.asarray(noise, np.float32)
  except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
    raise UserError(f"cannot read --noise={file}: {error}; it should be an .npy file, [n, h, w, c]") from error


if __name__ == "__main__":
  define_flags()
  cli.run(main)
