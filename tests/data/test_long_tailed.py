"""Test the reading of long-tailed data sets, on a small imitation of Places-LT with three classes."""

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data import long_tail, sources
from diffdis_jax.data.long_tail import LongTailed
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base

LISTS = {"train": [0, 0, 0, 1, 1, 2], "val": [0, 1, 2], "test": [0, 1, 2, 2]}


@pytest.fixture
def places(tmp_path, monkeypatch):
  counts = {split: len(labels) for split, labels in LISTS.items()}
  monkeypatch.setitem(long_tail.SETS, "places_lt", LongTailed("Places_LT", 3, counts, wordnet=False))
  (tmp_path / "wiki").mkdir()
  for number in range(3):
    (tmp_path / "wiki" / f"desc_{number}.txt").write_text("A place.")
  (tmp_path / "labels.txt").write_text("attic 0\nbar 1\nzoo/park 2\n")
  for split, labels in LISTS.items():
    lines = []
    for i, label in enumerate(labels):
      path = tmp_path / ("train" if split == "val" else split) / f"c{label}" / f"{split}{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((4, 4, 3), 10 * i + label, np.uint8)).save(path)
      lines.append(f"{path.relative_to(tmp_path)} {label}\n")
    (tmp_path / f"Places_LT_{split}.txt").write_text("".join(lines))
  return tmp_path


def test_published_counts():
  places, imagenet = long_tail.SETS["places_lt"], long_tail.SETS["imagenet_lt"]
  assert (places.classes, *places.counts.values()) == (365, 62_500, 7_300, 36_500)
  assert (imagenet.classes, *imagenet.counts.values()) == (1000, 115_846, 20_000, 50_000)


@pytest.mark.parametrize("split", LISTS)
def test_a_split_has_its_labels_classes_and_images(places, split):
  source = sources.open_source(name="places_lt", path=places, split=split, image_size=32)
  assert isinstance(source, long_tail.LabelledSource)
  assert source.labels.tolist() == LISTS[split]
  record = source[2]
  assert (record["label"], record["class"]) == (LISTS[split][2], source.classnames[LISTS[split][2]])
  assert source.classnames[2] == "zoo park" and record["image"].startswith(b"\x89PNG")


def test_class_counts_and_texts_are_read(places):
  section = dict(name="places_lt", path=places)
  assert long_tail.SETS["places_lt"].train_counts(**section).tolist() == [3, 2, 1]
  corpus = long_tail.SETS["places_lt"].open_corpus(**section)
  assert corpus.classnames == ("attic", "bar", "zoo park") and len(corpus.sentences[0]) == 81


def test_missing_images_are_counted(places):
  for file in (places / "train" / "c0").glob("train*"):
    file.unlink()
  with pytest.raises(UserError, match=r"3 of the 6 images that .*train.txt names are missing, the first .*train0.png"):
    sources.open_source(name="places_lt", path=places, image_size=32)
  assert long_tail.SETS["places_lt"].train_counts(path=places).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
  "file, content, message",
  [
    ("Places_LT_train.txt", "train/c0/train0.png 0\n", "names 1 images, and should name 6"),
    ("Places_LT_train.txt", "one line without label\n" * 6, "has the line 'one line without label'"),
    ("Places_LT_train.txt", "train/c0/train0.png 0\n" * 6, "has other labels than 0 to 2, each"),
    ("Places_LT_train.txt", "a 0\nb 1\nc 2\nd 3\ne 0\nf 0\n", "has other labels than 0 to 2, each"),
    ("Places_LT_train.txt", "", "names 0 images"),
    ("labels.txt", "attic 0\n", "names 1 classes, and places_lt has 3"),
  ],
)
def test_a_damaged_list_is_refused(places, file, content, message):
  (places / file).write_text(content)
  with pytest.raises(UserError, match=message) as error:
    sources.open_source(name="places_lt", path=places, image_size=32)
  assert "\n" not in str(error.value)


def test_a_missing_list_and_an_unknown_split_are_refused(places):
  (places / "Places_LT_test.txt").unlink()
  with pytest.raises(UserError, match="download the published list"):
    sources.open_source(name="places_lt", path=places, split="test", image_size=32)
  with pytest.raises(UserError, match="no split 'all'; there are train, val, test"):
    sources.open_source(name="places_lt", path=places, split="all", image_size=32)


def test_an_evaluation_names_the_file_that_cannot_be_used(places):
  """No preparation has checked the images of such a set before."""
  source = sources.open_source(name="places_lt", path=places, split="test", image_size=4)
  (file := places / "test" / "c2" / "test3.png").write_bytes(b"no image")
  with pytest.raises(UserError, match=f"^{file} cannot be used: corrupt image; download or prepare it again$"):
    base.Images(source, np.arange(4), 4)[np.arange(4)]
  file.unlink()
  with pytest.raises(UserError, match=f"^{file} cannot be used: missing image; download or prepare it again$"):
    base.Images(source, np.arange(4), 4)[np.array([3])]
