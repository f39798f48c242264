"""The twelve sets have the pixels, labels and order of torchvision's own classes."""

from __future__ import annotations

import numpy as np
import pytest
import torchvision.datasets
from clip_benchmark.datasets import caltech101

from diffdis_jax.data import sources, transforms
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.prepare import write, zero_shot_sets
from diffdis_jax.errors import UserError
from tests import benchmark_sets

PUBLISHED = {
  "cifar10": lambda root: torchvision.datasets.CIFAR10(root, train=False),
  "cifar100": lambda root: torchvision.datasets.CIFAR100(root, train=False),
  "caltech101": lambda root: caltech101.Caltech101(root),  # with the background, as torchvision's has not
  "cars": lambda root: torchvision.datasets.StanfordCars(root, split="test"),
  "flowers": lambda root: torchvision.datasets.Flowers102(root, split="test"),
  "food101": lambda root: torchvision.datasets.Food101(root, split="test"),
  "sun397": lambda root: torchvision.datasets.SUN397(root),
  "dtd": lambda root: torchvision.datasets.DTD(root, split="test"),
  "fgvc_aircraft": lambda root: torchvision.datasets.FGVCAircraft(root, split="test"),
  "pets": lambda root: torchvision.datasets.OxfordIIITPet(root, split="test"),
  "eurosat": lambda root: torchvision.datasets.EuroSAT(root),
  "imagenet1k": lambda root: torchvision.datasets.ImageNet(root, split="val"),
}


@pytest.fixture
def unchecked(monkeypatch):
  """Keep torchvision from checking the hashes of the real files."""
  for module in ("cifar", "flowers102", "imagenet"):
    monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity", lambda *args: True)
  numbers = class_lists.load()["imagenet1k"].names_in_data
  meta = ({number: (number,) for number in numbers}, [])
  monkeypatch.setattr(torchvision.datasets.imagenet, "load_meta_file", lambda root: meta)


def prepare(name, raw, out):
  parts = zero_shot_sets.find_parts(name, raw)
  write.prepare(parts, out / name, data_set=zero_shot_sets.ZERO_SHOT)
  return sources.open_source(name=name, path=out, image_size=8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_pixels_labels_and_order(tmp_path, unchecked, monkeypatch, name):
  monkeypatch.setattr(zero_shot_sets.parts, "ITEMS", 3)
  raw, known = tmp_path / "raw", class_lists.load()[name]
  raw.mkdir()
  benchmark_sets.TORCHVISION[name](raw)
  source, theirs = prepare(name, raw, tmp_path / "out"), PUBLISHED[name](raw)
  order = range(len(theirs))
  if name == "sun397":  # theirs has the disk's order, ours that of the paths
    order = sorted(order, key=lambda i: theirs._image_files[i])
  assert len(source) == len(source.labels) == len(theirs) > 2
  classes = theirs.categories if name == "caltech101" else theirs.classes
  for i, j in enumerate(order):
    (image, target), record = theirs[j], source[i]
    np.testing.assert_array_equal(
      np.asarray(transforms.decode(record["image"]).image), np.asarray(image.convert("RGB")), err_msg=str(i)
    )
    assert record["class"] == record["caption"] == known.classnames[record["label"]]
    named = classes[target] if isinstance(classes[target], str) else classes[target][0]
    in_data = (known.names_in_data or known.classnames)[record["label"]]
    assert class_lists.normalised(named) in {class_lists.normalised(n) for n in (record["class"], in_data)}
    assert source.fields(i).items() <= record.items()
  assert len({*source.labels.tolist()}) > 2
  assert (source.origin.layout, source.origin.split in ("test", "val", "all")) == ("prepared", True)
  if name not in zero_shot_sets.PIXELS:  # others keep their bytes
    files = {path.read_bytes() for path in raw.rglob("*") if path.suffix in (".jpg", ".JPEG")}
    assert {source[i]["image"] for i in range(len(source))} <= files


WAFFLE = {"food-101/meta/test.json": '{"waffle": ["waffle/1"]}'}
VARIANT = {"fgvc-aircraft-2013b/data/images_variant_test.txt": "0000007 Yak-43\n"}


@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    ("food101", WAFFLE, "class 0 is 'waffle', which is none of the 101 classes of food101"),
    ("fgvc_aircraft", VARIANT, "torchvision cannot read fgvc_aircraft in --source=.*: KeyError"),
    ("cars", {"stanford_cars/devkit/cars_meta.mat": "nothing"}, "torchvision cannot read cars in --source=.*"),
    ("cifar10", {}, "torchvision cannot read cifar10 in --source=.*not found or corrupted"),
  ],
)
def test_damage_is_one_line(tmp_path, name, damage, message):
  """The tiny CIFAR is none to torchvision, which knows the digests of the published files."""
  benchmark_sets.TORCHVISION[name](tmp_path)
  for file, text in damage.items():
    (tmp_path / file).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    zero_shot_sets.find_parts(name, tmp_path)
  assert "\n" not in str(error.value)
