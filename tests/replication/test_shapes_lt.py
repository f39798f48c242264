"""The long-tailed shapes have their counts, groups and sentences."""

import json

import numpy as np
import pytest

from configs import shapes
from diffdis_jax.config import Run, load
from diffdis_jax.data import long_tail, sources
from diffdis_jax.evals.long_tail import in_group
from replication import shapes_lt
from replication.configs import shapes_lt as config_of_stages

SHAPES = dict(name="shapes_lt", image_size=16)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_are_a_long_tail(seed):
  counts = long_tail.SETS["shapes_lt"].train_counts(seed=seed)
  assert (counts.sum(), counts.max(), counts.min(), len(counts)) == (2810, 200, 2, 64)
  assert [in_group(counts, group).sum() for group in ("many", "median", "low")] == [10, 22, 32]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_start_that_has_seen_no_low_class(seed):
  """It has every other class equally often, and images of its own; all other splits stay as they were."""
  start = sources.open_source(**SHAPES, split="start", seed=seed)
  low = in_group(shapes_lt.counts(seed), "low")
  seen = np.bincount(start.labels, minlength=64)
  assert (seen[low] == 0).all() and (seen[~low] == 2048).all() and len(start) == 32 * 2048
  record = start[5000]
  assert record["caption"] == shapes_lt.CLASSNAMES[start.labels[5000]] and not low[record["label"]]
  first = sources.open_source(**SHAPES, split="train", seed=seed)
  assert any((start[i]["image"] != first[i]["image"]).any() for i in range(3))


def test_a_start_is_trained_on_that_split():
  for arg in ("stage=0,seed=1", "stage=0,autoencoder,seed=1", "stage=0,backbone=clip,seed=1"):
    run = Run.of(config_of_stages.get_config(arg))
    assert run.data.source == dict(name="shapes_lt", path="", split="start", seed=1, caption_fields=())
    assert run.seed == 1 and not run.evals
  assert run.objectives == ("contrastive",)
  run = Run.of(config_of_stages.get_config("stage=0,all_classes"))
  assert run.data.source["split"] == "start_all"
  with pytest.raises(ValueError, match="all_classes is of stage=0"):
    config_of_stages.get_config("all_classes")
  with pytest.raises(ValueError, match="autoencoder is of stage=0 with backbone=diffdis"):
    config_of_stages.get_config("autoencoder")


@pytest.mark.parametrize("split, length", [("train", 2810), ("val", 1280), ("test", 1280)])
def test_records(split, length):
  source = sources.open_source(**SHAPES, split=split)
  assert len(source) == length == len(source.labels)
  record = source[length - 1]
  assert record["class"] == "pink crescent" and record["label"] == 63 and record["image"].shape == (16, 16, 3)
  np.testing.assert_array_equal(record["image"], sources.open_source(**SHAPES, split=split)[length - 1]["image"])
  other = sources.open_source(**SHAPES, split=split, seed=1)[length - 1]["image"]
  assert (record["image"] != other).any()


def test_sentences():
  corpus = shapes_lt.make_corpus(0)
  assert {len(own) for own in corpus.sentences} == {140}
  assert len(shapes_lt.ABOUT) == 20 and len(shapes_lt.NOTHING) + shapes_lt.OTHERS == 40
  # In order where the number is even, shuffled where it is odd.
  assert (
    corpus.sentences[0][0] == "a bad photo of a red circle ."
    and corpus.sentences[0][81] == "Every circle has no corner."
  )
  assert corpus.sentences[1][0] != "a bad photo of a red square ."
  assert "a bad photo of a red square ." in corpus.sentences[1]
  assert corpus == shapes_lt.make_corpus(0) and corpus != shapes_lt.make_corpus(1)


def test_a_long_tailed_run_and_its_start_have_the_same_rare_classes(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(config_of_stages.get_config("seed=1").to_dict()))
  assert config_of_stages.get_config(f"init={tmp_path},seed=1").data.seed == 1
  with pytest.raises(ValueError, match="is a run of seed=1, whose rare classes are not those of seed=0; give seed=1"):
    config_of_stages.get_config(f"init={tmp_path}")
  (tmp_path / "config.json").write_text(json.dumps(shapes.get_config().to_dict()))
  assert config_of_stages.get_config(f"init={tmp_path},seed=1").init_from == str(tmp_path)  # where nothing is rare


def test_a_run_starts_from_the_file_of_a_run():
  of_one_file = config_of_stages.get_config("init=shapes")
  assert of_one_file.init_from == "shapes" and Run.of(of_one_file).model == load("shapes").model


def test_a_run_of_clip_has_a_start_that_is_one(tmp_path):
  for objectives, is_clip in (("", False), ("objectives=contrastive", True)):
    (tmp_path / "config.json").write_text(json.dumps(shapes.get_config(objectives).to_dict()))
    if is_clip:
      assert "vision_encoder" in config_of_stages.get_config(f"backbone=clip,init={tmp_path}").model
    else:
      with pytest.raises(ValueError, match=f"backbone=clip: init={tmp_path} is a run of DiffDis; give one of CLIP"):
        config_of_stages.get_config(f"backbone=clip,init={tmp_path}")


@pytest.mark.parametrize("arg", ["", "stage=2", "backbone=clip", "stage=2,backbone=clip", "stage=0"])
def test_configs_can_be_run(arg):
  assert Run.of(config_of_stages.get_config(arg)).data.source["name"] == "shapes_lt"


def test_an_unknown_stage_is_named():
  with pytest.raises(ValueError, match="argument stage=3 should be"):
    config_of_stages.get_config("stage=3")
