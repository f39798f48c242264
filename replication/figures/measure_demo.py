"""Measure the run of `make demo` for the figures: python -m replication.figures.measure_demo --demo=runs/demo

It writes demo_run.json and denoising.png into replication/measured, in a few minutes of one core. --parts=LIST measures
only some parts.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.common import cli, files
from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import base, generation_accuracy, prompts, tasks
from diffdis_jax.evals.generation_accuracy import PAIRS, ShapeJudge
from diffdis_jax.evals.zero_shot import ZeroShot, class_recalls
from diffdis_jax.method import algorithms, encode, samplers, schedules
from diffdis_jax.run import provenance
from replication.measured import records

FLAGS = flags.FLAGS
CURVES = ("loss", "loss_generation", "loss_discrimination")
POINTS = 75  # largest number of points in a curve
PROMPTS = ("a red circle", "a green star", "a purple ring")  # the second pair is unseen
FRAMES = 6
CANDIDATES = 16  # images generated for each prompt
KEPT_OF = (1, 2, 4, 8)


def define_flags() -> None:
  """Define the command line's flags."""
  flags.DEFINE_string("demo", "runs/demo", "what make demo wrote")
  flags.DEFINE_list("parts", [*PARTS], f"of {', '.join(PARTS)}")


def training(run: pathlib.Path) -> dict[str, Any]:
  """Return the loss and its parts over steps, as means of neighbouring lines of metrics.jsonl."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  lines = [line for line in lines if "loss" in line]
  width = math.ceil(len(lines) / POINTS)
  groups = [lines[start : start + width] for start in range(0, len(lines), width)]
  return {
    f"training/{name}": {
      "what": f"{name} of metrics.jsonl by step, means of {width * lines[0]['step']} steps",
      "values": {str(group[-1]["step"]): round(float(np.mean([line[name] for line in group])), 5) for group in groups},
    }
    for name in CURVES
  }


def classes(run: pathlib.Path) -> dict[str, Any]:
  """Return the zero-shot accuracy of each class, measured like the demo's own accuracy over all classes."""
  model, params = inference.load(str(run))
  accuracy: dict[str, float] = {}
  for section in tasks.of_config(run_config.load(str(run)).evals, tasks=("zero_shot",)):
    zero_shot = section.create()
    assert isinstance(zero_shot, ZeroShot)
    names, labels = zero_shot.names, zero_shot.labels
    shown = base.Images(zero_shot.source, np.arange(len(labels)), model.image_size)
    images = model.embed_images(params, shown, seed=0)
    texts = base.embed_texts(model, params, [prompts.fill(zero_shot.all_templates[0], name) for name in names])
    is_right = base.ranks(images, texts, query_groups=labels, key_groups=np.arange(len(names))) == 0
    recalls = class_recalls(is_right, labels)
    accuracy |= {names[k]: round(100 * float(x), 2) for k, x in zip(np.unique(labels), recalls, strict=True)}
  description = "zero-shot top-1 of 64 classes, by class: 16 images of each seen pair, 112 of each unseen one"
  return {
    "accuracy by class": {
      "what": description,
      "unit": "%",
      "values": {name: accuracy[name] for name in shapes.CLASSNAMES},
    }
  }


def best_of_n(run: pathlib.Path) -> dict[str, Any]:
  """Return the accuracy of the image that the model itself ranks first of n, by ê_0 of the image and e of its prompt.

  It is the mean over all choices of n of a prompt's CANDIDATES images.
  """
  model, params = inference.load(str(run))
  texts = [f"a {name}" for name in shapes.CLASSNAMES]
  prompt_of = np.tile(np.arange(len(texts)), CANDIDATES)
  tokens = Tokenizer(model.max_length)(texts)
  images = model.generate(params, tokens[prompt_of], model.noise(len(prompt_of), seed=0))
  queries, e = model.embed_images(params, images, seed=0), model.embed_texts(params, tokens)
  scores = np.einsum("nd,nd->n", queries, e[prompt_of]).reshape(CANDIDATES, len(texts))
  judge = ShapeJudge(0, classifier_steps=200).train(model.image_size).model
  squares = np.stack([base.to_square(image, generation_accuracy.SIZE) for image in images])
  is_right = (generation_accuracy.pairs_of(judge, squares) == PAIRS[prompt_of]).all(axis=-1).astype(float)
  ranked = np.take_along_axis(is_right.reshape(scores.shape), np.argsort(-scores, axis=0, kind="stable"), axis=0)
  seen = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])
  figures = {}
  for kind, chosen in (("seen", seen), ("unseen", ~seen)):
    by_rank = ranked[:, chosen].mean(axis=1)
    values = {str(n): round(100 * float(np.dot(first_of(n, CANDIDATES), by_rank)), 2) for n in KEPT_OF}
    figures[f"best of n/{kind}"] = {
      "what": f"accuracy of the first of n generated images by the model's own query, {kind} pairs, by n",
      "unit": "%",
      "values": values,
      "of": {"images": CANDIDATES, "settings": "demo"},
    }
  return figures


def first_of(n: int, total: int) -> list[float]:
  """Return, for each rank (0 is best), how often its image is the best of n random ones."""
  return [math.comb(total - 1 - rank, n - 1) / math.comb(total, n) for rank in range(total)]


def denoising(run: pathlib.Path) -> dict[str, Any]:
  """Return the images of denoising.png: for each prompt a row of decoded z_t, and below it a row of predicted z_0."""
  model, params = inference.load(str(run), batch_size=8)
  how, tokens = model.sampling, Tokenizer(model.max_length)([*PROMPTS])
  timesteps = schedules.leading(how.generation_steps)

  def steps(network: Any, z_T: Any) -> Any:
    """Return z after each step of Algorithm 2 and its prediction of z_0, decoded."""
    c, c_null = network.encode_text(tokens).c, encode.null_condition(network, tokens.shape[1])
    guided = dict(c=c, c_null=c_null, network=model.network, guidance_scale=how.generation_guidance)

    def step(z_t: Any, now: Any) -> Any:
      done = algorithms.generation_step(network, z_t, now, **guided)
      return done.x_prev, (network.decode_image(done.x_prev), network.decode_image(done.x_0))

    return jax.lax.scan(step, z_T, samplers.ddim_coefficients(model.network.image_process, timesteps))[1]

  shown = jax.tree.map(np.asarray, model.compiled("steps of a generation", steps)(params, model.noise(len(PROMPTS), 0)))
  places = np.linspace(0, how.generation_steps - 1, FRAMES + 1).round().astype(int)
  # A step gives z at the next step's timestep; the last step gives the image.
  times = [*np.append(timesteps.t, 0)[places + 1].tolist()]
  rows = [np.concatenate([*images[places, i]], axis=1) for i in range(len(PROMPTS)) for images in shown]
  Image.fromarray(np.concatenate(rows)).save(records.HERE / "denoising.png", optimize=True)
  of = {"prompts": PROMPTS, "t": times, "image_size": model.image_size, "guidance": how.generation_guidance}
  description = "denoising.png: DDIM steps of a generation, by prompt z_t decoded and the prediction of z_0"
  values = {"steps": how.generation_steps}
  return {"denoising": {"what": description, "values": values, "of": {**of, "settings": "demo"}}}


PARTS: Mapping[str, Callable[[pathlib.Path], dict[str, Any]]] = {
  "training": training,
  "classes": classes,
  "best_of_n": best_of_n,
  "denoising": denoising,
}


def main(_: Sequence[str]) -> None:
  cli.compilation_cache()
  run, path = pathlib.Path(FLAGS.demo) / "diffdis", records.HERE / "demo_run.json"
  stored = json.loads(path.read_text())["records"] if path.exists() else {}
  same = {"of": "demo", "page": "replication/log/shapes.md"}
  for part in FLAGS.parts:
    stored |= {name: same | record for name, record in PARTS[part](run).items()}
    source = provenance.provenance(provenance.of_run(str(run), step=run_config.load(str(run)).num_steps))
    command = "make demo; python -m replication.figures.measure_demo"
    settings = {"demo": {"command": command, "seed": 0, "provenance": source}}
    about = "One run of make demo, seed 0, as the figures of docs show it, a record a line."
    as_json = ((json.dumps(name), json.dumps(record, ensure_ascii=False)) for name, record in stored.items())
    lines = ",\n".join(f"{name}: {record}" for name, record in as_json)
    head = f'"about": {json.dumps(about)},\n"settings": {json.dumps(settings)},'
    files.write_whole(path, f'{{\n{head}\n"records": {{\n{lines}\n}}\n}}\n'.encode())


if __name__ == "__main__":
  define_flags()
  cli.run(main)
