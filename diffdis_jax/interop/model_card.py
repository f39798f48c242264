"""README.md of an export, the model card: what the model is, how and on what it was trained, figures with their
protocols, samples, how to load it, and what is known to fail.

It says what the run's workdir says, and no more: config.json, import.json, metrics.jsonl, the results that evaluations
left there, and samples/.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from diffdis_jax.common import buckets, files
from diffdis_jax.config.objectives import Objectives
from diffdis_jax.run import history

PAPER = "*DiffDis: Empowering Generative Diffusion Model with Cross-Modal Discrimination Capability*"
SAMPLES = "samples.png"
LONGEST = 60  # characters of a protocol's value

# What both kinds have below their own beginning.
REST = """
## Training

{training}

## Figures

{figures}

## Known failures

{failures}

## Config

```json
{config}
```
"""

DIFFDIS = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffdis, stable-diffusion, jax]
---
# DiffDis

One UNet that generates images from text and aligns images with text, by denoising a text embedding under the condition
of an image ({paper},
ICCV 2023, [arXiv 2308.09306](https://arxiv.org/abs/2308.09306)). An independent implementation, diffdis_jax, wrote it:
{what}.
{samples}
## Generating images, with diffusers

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("{address}")
image = pipeline("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```
{pytorch}{jax}"""

FAILURES = """The paper says of its own model, which was trained on CC3M:

- Watermarks: photographs of CC3M often carry them, and the model generates them too.
- People and animals are its weakest subjects.

Expect the same of any model that was trained on CC3M. On what this one was trained is said above; whether it fails in
the same ways was not measured. No safety checker comes with it, and the biases of its training data are in it."""

TWIN = """
## Aligning images with texts, with PyTorch

`diffdis.safetensors` and `diffdis_config.json` are read by the PyTorch model, one file,
`diffdis_jax/interop/torch_diffdis.py`.

```python
import torch
from transformers import CLIPTokenizer
from diffdis_jax.interop import torch_diffdis

{download}
model = torch_diffdis.DiffDis.from_pretrained(folder)
tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
texts = ["{prompt}"]
tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
z = model.encode_image(pixels)  # f32[b, 3, {size}, {size}] in [-1, 1]
image = model.embed_image(z, steps=1, noise=torch.randn(len(z), model.query_width))
scores = model.similarity(image, model.embed_text(tokens))
```
"""

JAX = """
## In JAX

```
python -m diffdis_jax.import_weights --source={source} --out=RUN
```
"""

CLIP = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, jax]
---
# CLIP

Two towers that embed images and texts side by side, trained as the baseline of {paper}
(ICCV 2023). diffdis_jax wrote it: {what}.

## Loading

```python
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained("{address}"), CLIPProcessor.from_pretrained("{address}")
```

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("{open_clip}")
```
{jax}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What an export is.

  Attributes:
    run: its workdir.
    fields: the run's config.
    own: the part of it that says what the weights mean, which the card shows.
    step: of the checkpoint.
    ema: averaged weights, or raw ones.
    dtype: of the files.
    repo: `ORG/NAME` on the hub; empty where it is a folder alone.
  """

  run: epath.Path
  fields: Mapping[str, Any]
  own: Mapping[str, Any]
  step: int
  ema: bool
  dtype: str
  repo: str = ""

  def write(self, folder: pathlib.Path) -> None:
    """README.md, and samples.png where the run had generated some by then."""
    address = self.repo or "FOLDER"
    prompt = (self.fields.get("sample_prompts") or ("a bear searching for food near the river",))[0]
    is_clip = Objectives(self.fields["objectives"]).is_clip
    inference = self.fields.get("inference", {})
    parts = {
      "paper": PAPER,
      "what": f"checkpoint of step {self.step}, {'averaged' if self.ema else 'raw'} weights, {self.dtype}",
      "address": address,
      "open_clip": f"hf-hub:{self.repo}" if self.repo else "local-dir:FOLDER",
      "prompt": prompt,
      "size": self.fields["image_size"],
      "steps": inference.get("generation_steps"),
      "guidance": inference.get("generation_guidance"),
      "download": _download(self.repo),
      "jax": JAX.format(source=f"hf:{self.repo}" if self.repo else "FOLDER"),
      "samples": "" if is_clip else self._samples(folder),
      "training": self._training(),
      "figures": "\n".join(self._figures()) or "None were measured.",
      "failures": "The biases of its training data are in it; they were not measured." if is_clip else FAILURES,
      "config": json.dumps(self.own, indent=2, sort_keys=True),
    }
    # Where there is nothing of DiffDis' own, as in a run of generation alone, the PyTorch model cannot load it.
    parts["pytorch"] = TWIN.format(**parts) if (folder / "diffdis.safetensors").exists() else ""
    # Last: what stands in the other parts may hold braces, such as a prompt, and is not formatted again.
    text = ((CLIP if is_clip else DIFFDIS) + REST).format(**parts)
    (folder / "README.md").write_text(text, encoding="utf-8")

  def _samples(self, folder: pathlib.Path) -> str:
    """Copies the newest grid that the run had generated by this step."""
    # Not the newest file: a run that was trained on has later ones than the checkpoint that is exported.
    named = {path: re.fullmatch(r"samples_(\d+)\.png", path.name) for path in self.run.glob("samples/samples_*.png")}
    grids = {int(match[1]): path for path, match in named.items() if match}
    steps = [step for step in grids if step <= self.step]
    if not steps:
      return ""
    (folder / SAMPLES).write_bytes(grids[max(steps)].read_bytes())
    how, seed = self.fields["inference"], self.fields["seed"]
    return (
      f"\n![Samples, each with its prompt]({SAMPLES})\n\n*Generated at step {max(steps)} of the training, not selected:"
      f" DDIM, {how['generation_steps']} steps, guidance {how['generation_guidance']}, noise of seed {seed}.*\n"
    )

  def _training(self) -> str:
    # An import is a checkpoint of step 0; its config's batch, data and rates are defaults that nothing was done by.
    origin = _parse(self.run / "import.json")
    if self.step == 0 and "source" in origin:
      new = f"; {len(origin['initialised'])} of its parameters are random" * bool(origin.get("initialised"))
      return f"Imported from `{_public(origin['source'])}`, and not trained since{new}."
    fields, optim = self.fields, self.fields["optim"]
    lines = [
      f"- {self.step} steps of {fields['batch_size']} pairs, {self.step * fields['batch_size']:,} pairs in all, with"
      f" repetitions; images of {fields['image_size']} px",
      f"- data: {_data(fields['data'])}",
      f"- objectives: {', '.join(fields['objectives'])}" + f"; λ = {fields['loss']['ita_weight']}" * _is_joint(fields),
      f"- AdamW, weight decay {optim['weight_decay']}, {optim['schedule_kind']} schedule after {optim['warmup_steps']}"
      f" steps of warm-up, peak rates {_shown(optim['rates'])}; average of the weights: {optim['ema_decay']}",
      f"- started from {self._start()}",
    ]
    return "\n".join(lines)

  def _start(self) -> str:
    if not (start := self.fields.get("init_from")):
      return "random parameters"
    source = _parse(buckets.path(start) / "import.json").get("source")
    return f"`{_public(source)}`" if source else f"another run, `{_public(start)}`"

  def _figures(self) -> Iterator[str]:
    """The last losses up to this step, what evaluations in training gave, and the results of evaluate."""
    last: dict[str, Any] = {}
    for text in files.lines(self.run / "metrics.jsonl"):
      # Evaluations report at other steps than losses, so that the last value of each metric is looked for by itself.
      line = history.metrics_of(text)
      if line.get("step", self.step + 1) <= self.step:
        last |= {name: (value, line["step"]) for name, value in line.items() if name != "step"}
    losses = {name: found for name, found in last.items() if name.startswith("loss")}
    measured = {name: found for name, found in last.items() if "/" in name}
    for what, found in (("training", losses), ("evaluated while training", measured)):
      for step in sorted({step for _, step in found.values()}):
        yield f"- {what}: step {step}, {_shown({name: value for name, (value, at) in found.items() if at == step})}"
    yield from self._results()

  def _results(self) -> Iterator[str]:
    # Any JSON of the workdir's root may be of evaluate, whose --out is free: what counts is its form.
    rows = []
    for path in sorted(self.run.glob("*.json")):
      for task, records in _parse(path).items():
        for dataset, record in records.items() if isinstance(records, dict) else ():
          if isinstance(record, dict) and isinstance(record.get("metrics"), dict):
            protocol = _protocol(record)
            rows.append(f"| {task} | {dataset} | {_shown(record['metrics'])} | {protocol} |")
    if rows:
      yield from ("", "| task | data set | measured | protocol |", "|---|---|---|---|", *rows)


def _is_joint(fields: Mapping[str, Any]) -> bool:
  objectives = Objectives(fields["objectives"])
  return objectives.generates and objectives.aligned


def _data(section: Mapping[str, Any]) -> str:
  """What the run was trained on."""
  if mixture := section.get("mixture"):
    return "; ".join(f"{_source(source)}, weight {source['weight']}" for source in mixture.values())
  return f"{_source(section)}, split {section['split']}"


def _source(section: Mapping[str, Any]) -> str:
  return " ".join(filter(None, (section["name"], _public(section.get("path") or ""))))


def _public(name: Any) -> Any:
  """The last part of a path, whose folders say how somebody's machine is arranged; an address on the hub as it is."""
  is_path = isinstance(name, str) and "/" in name and not name.startswith("hf:")
  return pathlib.PurePath(name).name if is_path else name


def _download(repo: str) -> str:
  if not repo:
    return "folder = FOLDER"
  return f'import huggingface_hub\nfolder = huggingface_hub.snapshot_download("{repo}")'


def _protocol(record: Mapping[str, Any]) -> str:
  """What fits into a table's cell; lists by their length."""
  # `pretrained` is CLIP_benchmark's name of the field; a protocol's own fields come after it, and win.
  cell = {"checkpoint": record.get("pretrained"), **(record.get("protocol") or {})}
  shown = {
    name: f"{len(value)} of them" if isinstance(value, list | dict) else _public(value) for name, value in cell.items()
  }
  words = (f"{name} {value}" for name, value in shown.items() if value not in (None, "") and len(str(value)) <= LONGEST)
  # Either sign would end the table's cell.
  return re.sub(r"[|\n]", " ", ", ".join(words))


def _parse(path: epath.Path) -> dict[str, Any]:
  """A JSON object; of anything else an empty one."""
  return history.parse(path.read_bytes().decode(errors="replace")) if path.exists() else {}


def _shown(values: Mapping[str, Any]) -> str:
  numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
  return ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
