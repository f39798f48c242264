"""Turns a run into a folder that PyTorch users load: a StableDiffusionPipeline, and what DiffDis adds beside it; of a
CLIP, what transformers and open_clip load.

  python -m diffdis_jax.export_weights --workdir=RUN --out=DIR

DIR holds what `diffusers.StableDiffusionPipeline.from_pretrained` reads; where the run was trained for discrimination,
diffdis.safetensors and diffdis_config.json for the PyTorch twin, interop/torch_diffdis.py; and README.md, a model card.
Of a CLIP it holds what `transformers.CLIPModel.from_pretrained` and `open_clip.create_model("local-dir:DIR")` read, a
tokenizer and a model card.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from diffdis_jax import cli
from diffdis_jax.data.tokenizer import END, START, Tokenizer
from diffdis_jax.interop import clip_to_torch, to_torch
from diffdis_jax.params import Params
from diffdis_jax.run import checkpoint, files, workdir

FLAGS = flags.FLAGS
# Fields of a run's config that say what its weights mean.
OWN_FIELDS = (
  "model",
  "image_size",
  "objectives",
  "image_diffusion",
  "text_diffusion",
  "condition_timestep",
  "inference",
)
CLIP_FIELDS = ("model", "image_size", "objectives")

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# DiffDis

One UNet that draws images from text and aligns images with text, by denoising a text embedding under the condition of
an image (*DiffDis: Empowering Generative Diffusion Model with Cross-Modal Discrimination Capability*, ICCV 2023).
Written by diffdis_jax: checkpoint of step {step}, {weights} weights, {dtype}.

```python
from diffusers import StableDiffusionPipeline
image = StableDiffusionPipeline.from_pretrained(FOLDER)("a bear searching for food near the river").images[0]
```
{twin}
## Figures

{figures}

## Known failures

- Watermarks: trained on CC3M, whose photographs often carry them, the paper's model draws them too.
- People and animals are its weakest subjects.
- No safety checker comes with it, and the biases of its training data are in it.

## Config

```json
{config}
```
"""
TWIN = """
For alignment, `diffdis.safetensors` and `diffdis_config.json` are read by the PyTorch twin,
`diffdis_jax/interop/torch_diffdis.py`.
"""
CLIP_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# CLIP

Two towers that embed images and texts side by side, trained as the baseline of *DiffDis: Empowering Generative
Diffusion Model with Cross-Modal Discrimination Capability* (ICCV 2023). Written by diffdis_jax: checkpoint of step
{step}, {weights} weights, {dtype}.

```python
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)
```

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
```

## Figures

{figures}

## Config

```json
{config}
```
"""


def define_flags() -> None:
  """The command line. Defined on call, so that two verbs can be imported side by side."""
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")
  flags.DEFINE_enum("dtype", "float32", list(to_torch.DTYPES), "of the written weights")


def main(argv: Sequence[str]) -> None:
  del argv
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator
  export_weights(FLAGS.workdir, FLAGS.out, step=FLAGS.step, ema=FLAGS.ema, dtype=FLAGS.dtype)


def export_weights(run: str, out: str, *, step: int | None = None, ema: bool = True, dtype: str = "float32") -> None:
  """Writes a run's weights for PyTorch.

  Args:
    run: a workdir.
    out: folder, absent or empty.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    dtype: of the files, a key of to_torch.DTYPES.

  Raises:
    UserError: no such checkpoint, a run that no pipeline or CLIP of theirs can hold, or `out` cannot be written.
  """
  folder = files.empty_folder(out)
  fields = workdir.load_config(run).to_dict()
  is_clip = "vision_encoder" in fields["model"]
  if is_clip:
    clip_to_torch.check(fields["model"])
  else:
    to_torch.check(fields["model"], fields["objectives"])
  step, ema = checkpoint.choose(run, step, ema=ema)
  params = checkpoint.restore_params(run, step=step, ema=ema)
  with files.whole_folder(folder) as temporary:
    own = {name: fields[name] for name in (CLIP_FIELDS if is_clip else OWN_FIELDS)}
    own |= {"max_length": fields["data"]["max_length"]}
    card, own = (write_clip if is_clip else write_pipeline)(temporary, params, own, dtype=dtype)
    card = card.format(
      step=step,
      weights="averaged" if ema else "raw",
      dtype=dtype,
      figures="\n".join(f"- {name}: {value}" for name, value in figures(pathlib.Path(run))) or "None were measured.",
      config=json.dumps(own, indent=2, sort_keys=True),
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
  logging.info("step %d in %s", step, out)


class Card(NamedTuple):
  """A model card with places for what is the same of every run, and the fields of its config."""

  text: str
  config: dict[str, Any]


def write_pipeline(folder: pathlib.Path, params: Params, own: dict[str, Any], *, dtype: str) -> Card:
  """A StableDiffusionPipeline, and the PyTorch twin's file where the run was trained for discrimination.

  Args:
    own: of the run's config, OWN_FIELDS and `max_length`.
  """
  to_torch.write(
    folder,
    params,
    model=own["model"],
    image_size=own["image_size"],
    schedule=own["image_diffusion"]["schedule"],
    diffdis=own,
    dtype=dtype,
  )
  write_tokenizer(folder / "tokenizer", own["max_length"])
  has_twin = (folder / to_torch.FILES["diffdis"]).exists()
  if not has_twin:
    logging.info("it was not trained for discrimination")
  return Card(CARD.replace("{twin}", TWIN if has_twin else ""), own)


def write_clip(folder: pathlib.Path, params: Params, own: dict[str, Any], *, dtype: str) -> Card:
  """A CLIP for transformers and for open_clip; `own` is CLIP_FIELDS and `max_length`."""
  clip_to_torch.write(folder, params, model=own["model"], dtype=dtype)
  write_tokenizer(folder, own["max_length"])
  return Card(CLIP_CARD, own)


def write_tokenizer(folder: pathlib.Path, max_length: int) -> None:
  """CLIP's tokenizer, in the files of older and newer transformers."""
  folder.mkdir(exist_ok=True)
  Tokenizer(max_length).save(folder)
  special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
  (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def figures(run: pathlib.Path) -> Iterator[tuple[str, str]]:
  """What the workdir says of the run: the last line of metrics.jsonl, and the results of evaluations left there."""
  metrics = run / "metrics.jsonl"
  lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
  if last := [line for line in map(_parse, lines) if line][-1:]:
    yield "training", _shown(last[0])
  for path in sorted(run.glob("*.json")):
    for task, records in _parse(path.read_text(encoding="utf-8")).items():
      for dataset, record in records.items() if isinstance(records, dict) else ():
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict):
          yield f"{task}, {dataset} ({path.name})", _shown(record["metrics"])


def _parse(text: str) -> dict[str, Any]:
  """A JSON object; anything else, such as a line that a killed run left unfinished, is an empty one."""
  try:
    content = json.loads(text)
  except ValueError:
    return {}
  return content if isinstance(content, dict) else {}


def _shown(values: Mapping[str, Any]) -> str:
  numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
  return ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())


if __name__ == "__main__":
  define_flags()
  cli.run(main)
