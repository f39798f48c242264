"""Add the replication's parts to the package's tables: data sources, tasks, judges, columns, a vision tower, a text
stream and a noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffdis_jax.ablate import tables
from diffdis_jax.config import model, sections
from diffdis_jax.config.objectives import ALIGNED, GENERATIVE
from diffdis_jax.data import sources
from diffdis_jax.evals.held_out_loss import TIMESTEPS
from diffdis_jax.evals.query_use import STEPS
from diffdis_jax.evals.tasks import TASKS, Task
from diffdis_jax.method import network, schedules
from diffdis_jax.models import clip
from replication import query, scenes, shapes_lt
from replication.choice import Choice
from replication.convolutional import LEVELS, ConvolutionalEncoder
from replication.generation_accuracy import GenerationAccuracy
from replication.hog import Hog

of_shapes = tables.TITLES_OF["generation_accuracy"]
# Metric of `query_use` -> its title in tables.
QUERY_USE = {
  "acc1_by_input": "largest difference between two e_t",
  "cosine_of_two_draws": "100 × cosine of two draws of e_T",
  "acc1_noise_t999": "top-1, e_t noise at t_e 999",
  "acc1_zero_t999": "top-1, e_t zero at t_e 999",
  **{f"acc1_{e}_1_t{t}": f"top-1, e_t of the {e} caption at t_e {t}" for t in (999, 0) for e in ("true", "wrong")},
  **{f"acc1_steps_{steps}": f"top-1, {steps} steps" for steps in STEPS},
  **{f"loss_noised_t{t}": f"100 × loss at t_e {t}" for t in TIMESTEPS},
}


def of_choice(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the title of the accuracy among a caption and its four negatives."""
  del section
  return {"acc1": f"choice of five, {name} ↑"}


def of_generated_images(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the titles of the metrics of generated images; for scenes also of the share of correct attributes."""
  if "data" not in section:
    return of_shapes(name, section)
  title = f"generated images, {name}"
  attributes = {"acc1_attributes": f"{title}, of five attributes ↑"} if section["data"].get("name") == "scenes" else {}
  return {"acc1": f"{title} ↑", **attributes}


def of_query_use(name: str, section: Mapping[str, Any]) -> dict[str, str]:
  """Return the titles of the metrics that show whether the noised text query is read."""
  del name, section
  return {metric: f"query use: {title}" for metric, title in QUERY_USE.items()}


def add() -> None:
  """Add all parts; a second call changes nothing."""
  sources.KINDS["scenes"] = scenes.Section
  shapes_lt.add()
  sources.KINDS |= {f"{name}_twice": query.twice(sources.KINDS[name]) for name in ("scenes", "pairs")}
  if "constant" not in network.TEXT_STREAMS:
    model.TEXT_STREAMS.append("constant")
    sections.SCHEDULES.append("late")
  network.TEXT_STREAMS["constant"], schedules.BETAS["late"] = query.ConstantQuery, query.late_betas
  model.TOWERS["convolutional"], clip.TOWERS["convolutional"] = 2 ** (LEVELS - 1), ConvolutionalEncoder
  TASKS["choice"] = Task(Choice, ALIGNED)
  TASKS["hog"] = Task(Hog, (), compares=False)
  TASKS["generation_accuracy"] = Task(GenerationAccuracy, GENERATIVE, generates=True)
  tables.TITLES_OF.update(generation_accuracy=of_generated_images, choice=of_choice, query_use=of_query_use)
