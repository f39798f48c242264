"""What a run tells of itself when it starts."""

from __future__ import annotations

import math
import socket
from collections import Counter
from typing import Any

import jax
from absl import logging
from clu import parameter_overview

from diffdis_jax.data.build import describe
from diffdis_jax.run import provenance
from diffdis_jax.training.step import Trainer


def parameter_groups(trainer: Trainer) -> dict[str, dict[str, int]]:
  """Numbers of parameters by group of the optimizer and part of the network."""
  sizes: dict[str, Counter[str]] = {}
  for path, group in trainer.groups.items():
    sizes.setdefault(group, Counter())[path.split(".")[0]] += math.prod(trainer.shapes[path].shape)
  return {group: dict(parts) for group, parts in sizes.items()}


def of_start(trainer: Trainer, *, begins: bool) -> dict[str, Any]:
  """What history.jsonl gets to know of a start.

  Args:
    trainer: of the run.
    begins: whether it does; else it goes on.
  """
  return {
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "device_kind": jax.devices()[0].device_kind,
    "host": socket.gethostname(),
    "jax": jax.__version__,
    **provenance.code(),
    # A run that goes on has its parameters from its own checkpoint.
    **({"init_from": provenance.behind(trainer.run.init_from)} if begins else {}),
    "mesh": dict(trainer.mesh.shape),
    "parameters": parameter_groups(trainer),
    "data": describe(trainer.run.data),
  }


def overview(trainer: Trainer) -> str:
  """A table of the parameters: path, shape, dtype, number."""
  # Without statistics, which need values: there are only shapes yet.
  return parameter_overview.get_parameter_overview(trainer.shapes, include_stats=False) + "\n"


def log(trainer: Trainer) -> None:
  """Mesh, data and parameters by group, so that a wrong regex shows before the first step."""
  logging.info("mesh %s", dict(trainer.mesh.shape))
  for line in describe(trainer.run.data):
    logging.info("data: %s", line)
  logging.info(
    "objectives %s; parameters: %s",
    ", ".join(trainer.network.objectives),
    ", ".join(f"{group} {sum(parts.values()):,}" for group, parts in parameter_groups(trainer).items()),
  )
