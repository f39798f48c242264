"""Writes README.md of an export, the model card: what the model is, how and on what it was trained, figures with their
protocols, samples, how to load it, and what is known to fail.

It says what the run's workdir says, and no more: config.json, import.json, metrics.jsonl, the results that evaluations
left there, and samples/.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from diffdis_jax.common import files
from diffdis_jax.config.objectives import task_of
from diffdis_jax.interop import card_texts, tensor_files, to_torch
from diffdis_jax.run import provenance

PAPER = "*DiffDis: Empowering Generative Diffusion Model with Cross-Modal Discrimination Capability*"
SAMPLES = "samples.png"
LONGEST = 60  # characters of a protocol's value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """The description of an export.

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
    """Write README.md, and samples.png where the run has some. It comes last, as it says which files there are."""
    address = self.repo or "FOLDER"
    is_clip = "vision_encoder" in self.fields["model"]  # of long-tailed runs the objectives do not say it
    is_autoencoder = task_of(self.fields["objectives"]).is_autoencoder
    parts = {
      "paper": PAPER,
      "what": f"checkpoint of step {self.step}, {'averaged' if self.ema else 'raw'} weights, {self.dtype}",
      "address": address,
      "open_clip": f"hf-hub:{self.repo}" if self.repo else "local-dir:FOLDER",
      "jax": card_texts.JAX.format(source=f"hf:{self.repo}" if self.repo else "FOLDER"),
      "samples": "" if is_clip or is_autoencoder else self._samples(folder),
      "training": self._training(),
      "figures": "\n".join(self._figures()) or "None are recorded with the run.",
      "failures": card_texts.PLAIN_FAILURES if is_clip or is_autoencoder else card_texts.FAILURES,
      "config": json.dumps(self.own, indent=2, sort_keys=True),
    }
    kind = card_texts.CLIP if is_clip else card_texts.DIFFDIS
    if is_autoencoder:
      kind = card_texts.AUTOENCODER
      parts |= {"load": card_texts.LOAD.format(address=address), "code": self._code(folder)}
    elif not is_clip:
      parts |= self._use(folder, address)
    # Last: what stands in the other parts may hold braces, such as a prompt, and is not formatted again.
    text = (kind + card_texts.REST).format(**parts)
    (folder / "README.md").write_text(text, encoding="utf-8")

  @functools.cached_property
  def _provenance(self) -> dict[str, Any]:
    return provenance.of_run(os.fspath(self.run), step=self.step)

  def _code(self, folder: pathlib.Path) -> str:
    return ", ".join(
      [to_torch.PIPELINE, *sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.py"))]
    )

  def _use(self, folder: pathlib.Path, address: str) -> dict[str, str]:
    """Say how the pipeline is loaded and called: one or two blocks of code, which run as they are printed."""
    generates = task_of(self.fields["objectives"]).generates
    is_aligned, patch = (folder / "diffdis").is_dir(), self.fields["model"]["autoencoder"]["patch"]
    prompts = [*(self.fields.get("sample_prompts") or ("a bear searching for food near the river", "a red car"))]
    inference = self.fields["inference"]
    # By json, which writes strings as Python does: a prompt may hold quotes. Its escapes of emojis alone are not
    # Python's.
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    generate = card_texts.GENERATES.format(
      prompt=quoted(prompts[0]), steps=inference["generation_steps"], guidance=inference["generation_guidance"]
    )
    uses = card_texts.CLASSIFIES.format(names=quoted(prompts[:3])) if is_aligned else card_texts.ONLY_GENERATES
    uses += "" if generates else card_texts.ONLY_CLASSIFIES
    plain = card_texts.PLAIN.format(address=address) * generates
    uses += card_texts.PATCHES.format(patch=patch) if patch > 1 else plain
    uses += card_texts.OFFLINE.format(repo=self.repo) if self.repo else ""
    uses += card_texts.HEAD * (folder / tensor_files.HEAD).exists()
    return {
      "tag": "text-to-image" if generates else "zero-shot-image-classification",
      "code": self._code(folder),
      "load": card_texts.LOAD.format(address=address)
      + "\n" * generates
      + (generate if generates else card_texts.OPENS),
      "uses": uses,
    }

  def _samples(self, folder: pathlib.Path) -> str:
    """Copy the newest grid that the run had generated by this step."""
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
    origin = files.read_object(self.run / "import.json")
    # Of a run in one file, its record alone says it.
    if self.step == 0 and (source := origin.get("source") or self._provenance.get("imported")):
      new = f"; {len(random)} of its parameters are random" if (random := origin.get("initialised")) else ""
      return f"Imported from `{_public(source)}`, and not trained since{new}."
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
    # What the run recorded when it began is known also where that folder is gone.
    recorded = [link.get("imported") for link in self._provenance["init_from"]]
    source = files.read_object(f"{start.rstrip('/')}/import.json").get("source") or next(iter(recorded), None)
    if source:
      return f"`{_public(source)}`"
    first = next((f", and that one at first from `{_public(source)}`" for source in recorded if source), "")
    return f"another run, `{_public(start)}`{first}"

  def _figures(self) -> Iterator[str]:
    """Yield the last losses up to this step, what evaluations in training gave, and the results of evaluate."""
    last: dict[str, Any] = {}
    for line in provenance.metrics_of(files.lines(self.run / "metrics.jsonl")):
      # Evaluations report at other steps than losses, so that the last value of each metric is looked for by itself.
      if line.get("step", self.step + 1) <= self.step:
        last |= {name: (value, line["step"]) for name, value in line.items() if name != "step"}
    losses = {name: found for name, found in last.items() if name.startswith("loss")}
    measured = {name: found for name, found in last.items() if "/" in name}
    for what, found in (("training", losses), ("evaluated while training", measured)):
      for step in sorted({step for _, step in found.values()}):
        yield f"- {what}: step {step}, {_shown({name: value for name, (value, at) in found.items() if at == step})}"
    yield from self._results()

  def _results(self) -> Iterator[str]:
    if found := provenance.results(self.run):
      yield from ("", "| task | data set | measured | protocol |", "|---|---|---|---|")
    for _, task, dataset, record in found:
      yield f"| {_plain(task)} | {_plain(dataset)} | {_shown(record['metrics'])} | {_protocol(record)} |"


def _is_joint(fields: Mapping[str, Any]) -> bool:
  task = task_of(fields["objectives"])
  return task.generates and task.aligned


def _data(section: Mapping[str, Any]) -> str:
  """Say what the run was trained on."""
  if mixture := section.get("mixture"):
    return "; ".join(f"{_source(source)}, weight {source.get('weight', 1.0)}" for source in mixture.values())
  return _source(section)


def _source(section: Mapping[str, Any]) -> str:
  # A source of a mixture may leave out what data/sources.py has a default for.
  where = " ".join(filter(None, (section.get("name", "pairs"), _public(section.get("path") or ""))))
  return _plain(f"{where}, split {section.get('split', 'train')}")


def _public(name: Any) -> Any:
  """Return the last part of a path, whose folders are a machine's own affair; an address on the hub as it is."""
  is_path = isinstance(name, str) and "/" in name and not name.startswith("hf:")
  return pathlib.PurePath(name).name if is_path else name


def _protocol(record: Mapping[str, Any]) -> str:
  """Write a protocol for a table's cell; lists by their length."""
  # `pretrained` is CLIP_benchmark's name of the field; a protocol's own fields come after it, and win.
  cell = {"checkpoint": record.get("pretrained"), **(record.get("protocol") or {})}
  shown = {
    name: f"{len(value)} of them" if isinstance(value, list | dict) else _public(value) for name, value in cell.items()
  }
  words = (f"{name} {value}" for name, value in shown.items() if value not in (None, "") and len(str(value)) <= LONGEST)
  return _plain(", ".join(words))


def _shown(values: Mapping[str, Any]) -> str:
  """Write numbers; None is one that was not finite."""
  shown = {name: value for name, value in values.items() if value is None or isinstance(value, int | float)}
  return ", ".join(f"{_plain(name)} {'not finite' if x is None else f'{x:.6g}'}" for name, x in shown.items())


def _plain(text: str) -> str:
  """Escape what Markdown or HTML would read in a text, and join its lines: a file's values may be anybody's."""
  return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\`*\[\]|~$]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))
