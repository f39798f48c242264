"""Name what the replication adds in the package's tables: a data source, tasks, judges, columns and a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffdis_jax.ablate import tables
from diffdis_jax.config import model
from diffdis_jax.config.objectives import ALIGNED, GENERATIVE
from diffdis_jax.data import sources
from diffdis_jax.evals.tasks import TASKS, Task
from diffdis_jax.models import clip
from replication import scenes
from replication.choice import Choice
from replication.convolutional import LEVELS, ConvolutionalEncoder
from replication.generation_accuracy import GenerationAccuracy
from replication.hog import Hog

of_shapes = tables.TITLES_OF["generation_accuracy"]


def of_choice(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the title of accuracy among a caption and its four negatives."""
  del section
  return {"acc1": f"choice of five, {name} ↑"}


def of_generated_images(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the titles of generated images; for scenes also of the share of the five attributes that are right."""
  if "data" not in section:
    return of_shapes(name, section)
  title = f"generated images, {name}"
  attributes = {"acc1_attributes": f"{title}, of five attributes ↑"} if section["data"].get("name") == "scenes" else {}
  return {"acc1": f"{title} ↑", **attributes}


def add() -> None:
  """Add them; a second call changes nothing."""
  sources.KINDS["scenes"] = scenes.Section
  model.TOWERS["convolutional"], clip.TOWERS["convolutional"] = 2 ** (LEVELS - 1), ConvolutionalEncoder
  TASKS["choice"] = Task(Choice, ALIGNED)
  TASKS["hog"] = Task(Hog, (), compares=False)
  TASKS["generation_accuracy"] = Task(GenerationAccuracy, GENERATIVE, generates=True)
  tables.TITLES_OF.update(generation_accuracy=of_generated_images, choice=of_choice)
