"""Test how the judges of generated images count: labelled icons, and attributes of rendered scenes."""

from __future__ import annotations

import numpy as np
import pytest

from replication import label_judge, scene_judge
from replication.scenes import Scene

pytestmark = pytest.mark.slow

STAR, RING, HEART = ("red", "star"), ("blue", "ring"), ("green", "heart")


def test_ties_and_nans_are_wrong():
  logits = np.array([[3.0, 1.0, 2.0], [3.0, 3.0, 1.0], [np.nan, 1.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
  np.testing.assert_array_equal(label_judge.ranks(logits, np.array([0, 0, 0, 0])), [0, 1, 2, 2])
  np.testing.assert_array_equal(label_judge.ranks(logits[2:], np.array([2, 1])), [1, 1])


def test_images_held_out_are_not_trained_on(monkeypatch):
  colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}
  records = [{"image": np.full((8, 8, 3), colours[name], np.uint8), "label": name} for name in [*colours] * 64]
  monkeypatch.setattr(label_judge.base, "open_split", lambda data, split: records)
  judge = label_judge.LabelJudge({"split": "train"}, 0, held_out=0.25)
  held_out, trained_on = {*judge._measured_on.tolist()}, {*judge._trained_on.tolist()}
  assert not held_out & trained_on and (len(held_out), len(trained_on)) == (48, 144)
  assert [judge.classnames[k] for k in judge.labels] == [record["label"] for record in records]


def test_how_many_of_five_attributes_of_a_scene_are_right():
  prompted = Scene(STAR, RING, "left of")
  expected = {
    prompted: 5,
    prompted.swapped_objects: 4,  # "a red star right of a blue ring": only the relation is wrong
    prompted.swapped_colours: 3,
    Scene(STAR, RING, "above"): 4,
    Scene(RING, STAR, "above"): 4,
    Scene(STAR, HEART, "left of"): 3,
    Scene(HEART, STAR, "left of"): 2,  # the star is in the other object's place, and the relation is wrong too
    Scene(STAR, ("blue", "heart"), "left of"): 4,
    Scene(HEART, HEART, "above"): 0,
  }
  judged = np.array([scene_judge.attributes_of(scene) for scene in expected])
  correct = scene_judge.right(judged, np.tile(scene_judge.attributes_of(prompted), (len(judged), 1)))
  assert correct.sum(axis=1).tolist() == [*expected.values()]
  assert correct[1].tolist() == [False, True, True, True, True]
