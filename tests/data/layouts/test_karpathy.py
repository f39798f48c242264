"""COCO's and Flickr30k's files against the readers of torchvision and of CLIP_benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from clip_benchmark.datasets import flickr

from diffdis_jax.data import sources, transforms
from diffdis_jax.errors import UserError
from tests.benchmark_sets import write_coco, write_flickr

CAPTIONS = {42: ["a cat", "two cats "], 7: ["a dog, running", "dogs", "the dog"], 11: ["an owl"]}


def open_set(root, name):
  return sources.open_source(name=name, path=root, image_size=8)


@pytest.mark.parametrize("folder", ["mscoco_captions", "coco"])
def test_coco(tmp_path, folder):
  """As torchvision's CocoCaptions, which needs pycocotools: images by their number, captions in the file's order."""
  write_coco(tmp_path / folder, CAPTIONS, "coco_test_karpathy.json")
  source = open_set(tmp_path, "mscoco_captions")
  assert [source[i]["captions"] for i in range(3)] == [
    ["the dog", "dogs", "a dog, running"],
    ["an owl"],
    ["two cats", "a cat"],
  ]
  image = tmp_path / folder / "val2014/COCO_val2014_000000000011.jpg"
  assert source[1]["image"] == image.read_bytes() and source.origin.split == "test"
  with pytest.raises(UserError, match="no mscoco_val2014 in"):
    open_set(tmp_path, "mscoco_val2014")
  write_coco(tmp_path / folder, {3: ["one"]}, "captions_val2014.json")
  assert open_set(tmp_path, "mscoco_val2014")[0]["caption"] == "one" and len(open_set(tmp_path, "mscoco_captions")) == 3


def test_flickr(tmp_path):
  write_flickr(tmp_path / "flickr30k", CAPTIONS)
  theirs = flickr.Flickr(str(tmp_path / "flickr30k"), str(tmp_path / "flickr30k/flickr30k_test_karpathy.txt"))
  source = open_set(tmp_path, "flickr30k")
  assert len(source) == len(theirs) == 3
  for i, (image, captions) in enumerate(theirs):
    np.testing.assert_array_equal(np.asarray(transforms.decode(source[i]["image"])), np.asarray(image))
    assert source[i]["captions"] == captions == source.fields(i)["captions"]
    if i == 2:
      break


@pytest.mark.parametrize(
  ("name", "file", "content", "message"),
  [
    ("mscoco_captions", "coco_test_karpathy.json", "[]", "is not of the form of COCO's captions"),
    (
      "mscoco_captions",
      "coco_test_karpathy.json",
      '{"annotations": [], "images": [{"id": 4, "file_name": "x"}]}',
      "4 has no",
    ),
    (
      "mscoco_captions",
      "coco_test_karpathy.json",
      '{"annotations": [], "images": [{"id": 4, "file_name": "x"}, {"id": "5", "file_name": "y"}]}',
      "is not of the form of COCO's captions",
    ),
    (
      "mscoco_captions",
      "coco_test_karpathy.json",
      '{"annotations": [{"image_id": 4, "caption": "a"}], "images": [{"id": 4, "file_name": null}]}',
      "is not of the form of COCO's captions",
    ),
    (
      "flickr30k",
      "flickr30k_test_karpathy.txt",
      "image,caption\n1.png,a cat\n",
      "line 2: '1.png,a cat' is not IMAGE.jpg,",
    ),
  ],
)
def test_refused(tmp_path, name, file, content, message):
  (tmp_path / name).mkdir()
  (tmp_path / name / file).write_text(content)
  with pytest.raises(UserError, match=message):
    open_set(tmp_path, name)
