"""Name what the replication adds in the package's tables: a data source, tasks, judges, columns and a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffdis_jax.ablate import tables
from diffdis_jax.ablate.tables import Column, percent
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


def of_choice(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return the columns of accuracy among a caption and its four negatives."""
  del section
  return [percent("choice", name, "acc1", f"choice of five, {name}")]


def of_generated_images(name: str, section: Mapping[str, Any]) -> list[Column]:
  """Return the columns of generated images; for scenes also the share of the five attributes that are right."""
  found = tables.of_generated_images(name, section)
  if section.get("data", {}).get("name") == "scenes":
    title = f"generated images, {name}, of five attributes"
    found.append(percent("generation_accuracy", name, "acc1_attributes", title))
  return found


def add() -> None:
  """Add them; a second call changes nothing."""
  sources.KINDS["scenes"] = scenes.Section
  model.TOWERS["convolutional"], clip.TOWERS["convolutional"] = 2 ** (LEVELS - 1), ConvolutionalEncoder
  TASKS["choice"] = Task(Choice, ALIGNED)
  TASKS["hog"] = Task(Hog, (), compares=False)
  TASKS["generation_accuracy"] = Task(GenerationAccuracy, GENERATIVE, generates=True)
  tables.COLUMNS_OF.update(generation_accuracy=of_generated_images, choice=of_choice)
