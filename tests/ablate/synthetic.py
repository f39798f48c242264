"""Make plans for the tiny config, and files of results with known figures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import diffdis_cc3m
from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import tables
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.ablate.run import Folder
from replication.configs import emoji
from tests import tiny

PAPER = ("2", "3", "4", "5", "7")
METRICS = {
  "generation_accuracy": ("acc1_seen", "acc1_unseen"),
  "zero_shot": ("acc1",),
  "retrieval": ("image_retrieval_recall@1", "text_retrieval_recall@1"),
  "fid": ("fid",),
  "held_out_loss": ("loss_generation", "loss_discrimination"),
}


def base(name: str = "tiny") -> ConfigDict:
  """Return the config of this name: the tiny shapes, the emoji, or the paper's run with its evaluations."""
  arg = "imagenet=I,coco=C,flickr=F,fid=C,inception=W"
  return {"tiny": tiny.get_config, "emoji": emoji.get_config, "paper": lambda: diffdis_cc3m.get_config(arg)}[name]()


def make_plan(config: ConfigDict | None = None, *, names: Sequence[str] = PAPER, seeds=(0, 1, 2), grid="") -> Plan:
  """Plan these tables, or a grid, for the tiny config and its autoencoder."""
  config = config or base()
  fields = config.to_dict()
  asked_tables = [tables.grid(grid, fields)] if grid else tables.choose(names, schedule=config.text_diffusion.schedule)
  return planning.make(fields, tiny.get_config("autoencoder").to_dict(), asked_tables, seeds)


def write(
  folder: Folder, run: Run, figures: Mapping[str, float], *, without: Sequence[str] = (), **protocol: Any
) -> None:
  """Write the results of a run. All metrics of a data set equal its value in `figures`, or 0.5. The data sets of
  `without` are left out."""
  results: dict[str, dict[str, Any]] = {}
  for name, section in run.evals.items():
    if name not in without:
      metrics = {metric: figures.get(name, 0.5) for metric in METRICS[section["task"]]}
      record = {"dataset": name, "model": "m", "pretrained": "p", "task": section["task"], "language": "en"}
      record |= {"metrics": metrics, "protocol": {"num_images": 64, "weights": run.name, **protocol}}
      results.setdefault(section["task"], {})[name] = record
  path = pathlib.Path(folder.results(run))
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results))
