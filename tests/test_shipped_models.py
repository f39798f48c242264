"""Test the trained model that comes with the package: its file, its figures, its images and its classes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors import safe_open

import diffdis_jax
from diffdis_jax.common import one_file
from diffdis_jax.data import shapes
from diffdis_jax.run import provenance
from replication.measured import records

NAME, MOST_BYTES = "shapes", 5_000_000


@pytest.fixture(scope="module")
def file():
  return one_file.models()[NAME]


def test_the_package_has_one_small_model(file):
  assert {*one_file.models()} == {NAME} and file.stat().st_size <= MOST_BYTES


def test_the_file_is_the_one_of_the_record(file):
  record, recorded = one_file.read_record(file), records.record("included", "unseen").of
  with safe_open(file, "numpy") as opened:
    assert opened.metadata()["sha256"] == recorded["sha256"]
  links = [record.provenance, *record.provenance["init_from"]]
  assert [link["objectives"] for link in links] == [["generation", "discrimination"], ["reconstruction"]]
  assert all(link["commits"] and link["clean"] for link in links)
  assert not re.search(r'"/\w', json.dumps([record.config, record.provenance, record.results])), "a folder of a machine"


def test_the_file_holds_the_figures_of_the_record():
  metrics = {result.dataset: result.record["metrics"] for result in provenance.results(NAME)}
  value = lambda name: records.record("included", name).value
  assert round(100 * metrics["unseen"]["acc1"], 1) == value("unseen")
  assert round(100 * metrics["test"]["acc1"], 1) == value("seen")
  assert round(100 * metrics["generated"]["acc1_unseen"], 1) == value("generated_unseen")


@pytest.mark.slow
def test_the_model_classifies_unseen_pairs_and_its_own_images():
  """Chance is 1/64. Processors round differently, so that the classes of a few images may differ."""
  model = diffdis_jax.load(NAME)
  source = shapes.Shapes(split="unseen", image_size=32, seed=1)
  rendered = [source[i] for i in range(64)]
  named = model.classify([record["image"] for record in rendered], shapes.CLASSNAMES).labels
  right = np.mean([label == record["label"] for label, record in zip(named, rendered, strict=True)])
  assert 100 * right >= records.record("included", "unseen").value - 10
  names = [f"{colour} {shape}" for colour, shape in shapes.UNSEEN]
  drawn = model.classify(model.generate([f"a {name}" for name in names]), shapes.CLASSNAMES).labels
  assert sum(label == name for label, name in zip(drawn, names, strict=True)) >= 6
