"""Run the code of docs/extending.md: a data set, an evaluation and a config."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.config.run import Run
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.evals import tasks
from tests import pages
from tests.raw_pairs import load

PAGE = "docs/extending.md"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
  """Return a function that imports a block of the page as a module."""
  folder = tmp_path_factory.mktemp("page")

  def make(name: str, containing: str) -> types.ModuleType:
    path = folder / f"{name}.py"
    path.write_text(pages.python_block(PAGE, containing))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded

  with pytest.MonkeyPatch.context() as patch:
    yield make


@pytest.fixture(scope="module")
def prepared(module, tmp_path_factory) -> tuple[pathlib.Path, dict]:
  """Prepare two birds and a broken image, and return the report. TFDS allows a set of one name only once."""
  folder = tmp_path_factory.mktemp("birds")
  source = folder / "BIRDS"
  (source / "images").mkdir(parents=True)
  rows = [{"file": f"{i}.png", "text": f"bird {i} on a branch", "species": f"species {i}"} for i in range(3)]
  (source / "captions.json").write_text(json.dumps(rows))
  rng = np.random.default_rng(0)
  for row in rows[:2]:
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(source / "images" / row["file"])
  (source / "images/2.png").write_bytes(b"no image")
  birds = module("birds_pairs", "BIRDS = DataSet")
  out = folder / "out"
  return out, prepare(birds.find_parts(source), out, data_set=birds.BIRDS)


def test_the_data_set_of_the_page_is_prepared(prepared):
  out, reports = prepared
  assert reports["train"].pairs == 2 and len(reports["train"].skipped) == 1
  records = load(out, "train")
  assert {(record["caption"], record["species"]) for record in records} == {
    (f"bird {i} on a branch", f"species {i}") for i in range(2)
  }


@pytest.mark.parametrize("order, rank", [((0, 1), 0.0), ((1, 0), 1.0)])
def test_the_evaluation_of_the_page_runs(module, prepared, order, rank, monkeypatch):
  median_rank = module("median_rank", "class MedianRank").MedianRank
  monkeypatch.setitem(tasks.TASKS, "median_rank", tasks.Task(median_rank, ()))
  assert tasks.settings_of("median_rank").keys() == {"num_images", "seed", "shuffle_labels"}
  inference = types.SimpleNamespace(
    image_size=32,
    max_length=16,
    protocol={"steps": 1},
    embed_texts=lambda params, tokens: np.eye(2, dtype=np.float32),
    embed_images=lambda params, images, seed: np.eye(2, dtype=np.float32)[list(order)],
  )
  evaluation = median_rank(data=dict(name="pairs", path=str(prepared[0]), split="train", image_size=32))
  assert evaluation.protocol(inference).items() >= {"steps": 1, "seed": 0, "num_images": 2}.items()
  assert evaluation.run(inference, {}) == {"median_rank": rank}


def test_the_config_of_the_page_is_read(module):
  get_config = module("birds_config", "def get_config").get_config
  autoencoder = Run.of(get_config("autoencoder,path=data/birds"))
  assert tuple(autoencoder.objectives) == ("reconstruction",)
  config = get_config("path=data/birds")
  assert Run.of(config).num_steps == 4500
  snippet = pages.python_block(PAGE, "config.train_evals")
  exec(snippet, {"config": config, "args": types.SimpleNamespace(path="data/birds")})
  assert config.train_evals == ("ranks",) and config.evals["ranks"]["task"] == "median_rank"
