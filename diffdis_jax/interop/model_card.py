"""Write the model card of an export, README.md, from the template model_card.md and the facts in the run's workdir."""

from __future__ import annotations

import html
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from huggingface_hub import ModelCard, ModelCardData

from diffdis_jax.common import files
from diffdis_jax.config.objectives import task_of
from diffdis_jax.data import shapes
from diffdis_jax.interop import tensor_files, to_torch
from diffdis_jax.run import provenance

TEMPLATE = pathlib.Path(__file__).with_suffix(".md")
PROMPTS = ("a bear searching for food near the river", "a red car")
LONGEST = 60  # the most characters of a protocol's value


def write(
  folder: pathlib.Path,
  *,
  run: epath.Path,
  fields: Mapping[str, Any],
  own: Mapping[str, Any],
  step: int,
  ema: bool,
  dtype: str,
  repo: str = "",
) -> None:
  """Write README.md, and samples.png if the run has samples. Call it last, since it lists the folder's files.

  Args:
    folder, run: the export's folder, and the workdir.
    fields: the run's config.
    own: the fields that the weights need to be used, which the card shows.
    repo: `ORG/NAME` on the hub, or empty for a folder.
  """
  task, model = task_of(fields["objectives"]), fields["model"]
  kind = "clip" if "vision_encoder" in model else "autoencoder" if task.network == "autoencoder" else "diffdis"
  tags = {"clip": ["clip"], "autoencoder": ["autoencoder", "diffdis"], "diffdis": ["diffdis", "stable-diffusion"]}
  pipeline_tag = "text-to-image" if kind == "diffdis" and task.generates else "zero-shot-image-classification"
  data = ModelCardData(
    library_name="transformers" if kind == "clip" else "diffusers",
    pipeline_tag=None if kind == "autoencoder" else pipeline_tag,
    tags=[*tags[kind], "jax"],
    license="unknown",  # whoever shares the model fills it in: it depends on the data and on the start of the run
  )
  origin, past = files.read_object(run / "import.json"), provenance.of_run(os.fspath(run), step=step)
  card = ModelCard.from_template(
    data,
    template_path=str(TEMPLATE),
    kind=kind,
    paper="*DiffDis: Empowering Generative Diffusion Model with Cross-Modal Discrimination Capability*",
    what=f"checkpoint of step {step}, {'averaged' if ema else 'raw'} weights, {dtype}",
    step=step,
    fields=fields,
    address=repo or "FOLDER",
    variant=f', variant="{to_torch.VARIANTS[dtype]}"' if to_torch.VARIANTS[dtype] else "",
    repo=repo,
    open_clip=f"hf-hub:{repo}" if repo else "local-dir:FOLDER",
    source=f"hf:{repo}" if repo else "FOLDER",
    code=", ".join([to_torch.PIPELINE, *sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.py"))]),
    generates=task.generates,
    is_aligned=(folder / "diffdis").is_dir(),
    has_head=(folder / tensor_files.HEAD).exists(),
    patch=model.get("autoencoder", {}).get("patch", 1),
    # JSON writes strings as Python does, except that it would escape emojis.
    prompts=[json.dumps(prompt, ensure_ascii=False) for prompt in _prompts(fields, step=step)],
    samples=_copy_samples(run, folder, step) if kind == "diffdis" else None,
    # An import is a checkpoint of step 0. The batch, data and rates of its config are defaults that were never used.
    imported=_public(origin.get("source") or past.get("imported")) if step == 0 else None,
    num_random=len(origin.get("initialised", ())),
    data=_data(fields["data"]),
    start=_start(fields["init_from"], past),
    metrics=_metrics(run, step),
    results=provenance.results(run),
    shown=_shown,
    plain=_plain,
    protocol=_protocol,
    config=json.dumps(own, indent=2, sort_keys=True),
  )
  card.save(folder / "README.md")


def _prompts(fields: Mapping[str, Any], *, step: int) -> Sequence[str]:
  """Return texts like those of the run's data: its sample prompts, or captions that prepare_data wrote beside it."""
  if fields.get("sample_prompts") or step == 0:  # of an import, which used none of its config's data
    return fields.get("sample_prompts") or PROMPTS
  sources = [*(fields["data"].get("mixture") or {"": fields["data"]}).values()]
  cards = [files.read_object(f"{source['path']}/card.json") for source in sources if source.get("path")]
  captions = [caption for card in cards for caption in card.get("captions", ())]
  of_shapes = [f"a {name}" for name in shapes.CLASSNAMES if any(source.get("name") == "shapes" for source in sources)]
  return captions or of_shapes or PROMPTS


def _copy_samples(run: epath.Path, folder: pathlib.Path, step: int) -> int | None:
  """Copy the newest grid of samples up to this step, the demo's too, and return its step."""
  # Not the newest file: the run may have later samples than the exported checkpoint.
  grids = {int(path.stem[-8:]): path for path in run.glob("samples/*_*.png") if path.stem[-8:].isdecimal()}
  newest = max((at for at in grids if at <= step), default=None)
  if newest is not None:
    (folder / "samples.png").write_bytes(grids[newest].read_bytes())
  return newest


def _start(start: str, past: Mapping[str, Any]) -> str:
  """Describe the start of the run, and the import from which that came, as the run recorded it when it began."""
  if not start:
    return "random parameters"
  own = files.read_object(f"{start.rstrip('/')}/import.json").get("source")
  source = next(filter(None, [own, *(link.get("imported") for link in past["init_from"])]), None)
  return f"`{_public(start)}`" + (f", which began from `{_public(source)}`" if source else "")


def _metrics(run: epath.Path, step: int) -> dict[int, dict[str, Any]]:
  """Return the last value up to this step of each loss and evaluation in training, by the value's step."""
  # Evaluations are logged at other steps than losses, so take the last value of each metric separately.
  last: dict[str, tuple[int, Any]] = {}
  for line in provenance.metrics_of(files.lines(run / "metrics.jsonl")):
    if line.get("step", step + 1) <= step:
      last |= {name: (line["step"], value) for name, value in line.items() if name.startswith("loss") or "/" in name}
  steps = sorted({at for at, _ in last.values()})
  return {at: {name: value for name, (there, value) in last.items() if there == at} for at in steps}


def _data(section: Mapping[str, Any]) -> str:
  """Describe the data of the run. A source of a mixture may leave out fields with a default."""
  texts = []
  for source in (section.get("mixture") or {"": section}).values():
    what = f"{source.get('name', 'pairs')} {_public(source.get('path') or '')}".strip()
    weight = f", weight {source.get('weight', 1.0)}" if section.get("mixture") else ""
    texts.append(_plain(f"{what}, split {source.get('split', 'train')}{weight}"))
  return "; ".join(texts)


def _public(name: Any) -> Any:
  """Return the last part of a path, without the folders of a machine, or an unchanged address on the hub."""
  is_path = isinstance(name, str) and "/" in name and not name.startswith("hf:")
  return pathlib.PurePath(name).name if is_path else name


def _protocol(record: Mapping[str, Any]) -> str:
  """Format a protocol for a table's cell, with the lengths of lists."""
  # `pretrained` is CLIP_benchmark's field; the fields of the protocol come after it and replace it.
  cell = {"checkpoint": record.get("pretrained"), **(record.get("protocol") or {})}
  text = lambda value: f"{len(value)} of them" if isinstance(value, list | dict) else _public(value)
  shown = {name: text(value) for name, value in cell.items()}
  words = (f"{name} {value}" for name, value in shown.items() if value not in (None, "") and len(str(value)) <= LONGEST)
  return _plain(", ".join(words))


def _shown(values: Mapping[str, Any]) -> str:
  """Format numbers; None is one that was not finite."""
  shown = {name: value for name, value in values.items() if value is None or isinstance(value, int | float)}
  return ", ".join(f"{_plain(name)} {'not finite' if x is None else f'{x:.6g}'}" for name, x in shown.items())


def _plain(text: str) -> str:
  """Escape a text's Markdown and HTML, and join its lines, since a file may hold values from anybody."""
  return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\`*\[\]|~$]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))
