"""Each layout against torchvision's own class: same pixels, same labels, same order."""

from __future__ import annotations

import json
import pickle
import shutil
import struct

import numpy as np
import pytest
import torchvision.datasets
from clip_benchmark.datasets import caltech101

from diffdis_jax.data import sources, transforms
from diffdis_jax.data.layouts import class_lists, find
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
SETS = tuple(benchmark_sets.TORCHVISION)


@pytest.fixture
def unchecked(monkeypatch):
  """torchvision without its hashes of the real files."""
  for module in ("cifar", "flowers102", "imagenet"):
    monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity", lambda *args: True)
  numbers = class_lists.load()["imagenet1k"].names_in_data
  meta = ({number: (number,) for number in numbers}, [])
  monkeypatch.setattr(torchvision.datasets.imagenet, "load_meta_file", lambda root: meta)


def pixels(record):
  return np.asarray(transforms.decode(record))


@pytest.mark.parametrize("name", SETS)
def test_same_pixels_labels_and_order(tmp_path, unchecked, name):
  benchmark_sets.TORCHVISION[name](tmp_path)
  theirs = PUBLISHED[name](tmp_path)
  read = find.find_labelled(tmp_path, name)
  assert read is not None
  ours = read()
  order = range(len(theirs))
  if name == "sun397":  # theirs has the disk's order, ours that of the paths
    order = sorted(order, key=lambda i: theirs._image_files[i])
  assert len(ours.images) == len(ours.labels) == len(theirs) > 2
  for i, j in enumerate(order):
    image, target = theirs[j]
    np.testing.assert_array_equal(pixels(ours.images[i]), np.asarray(image.convert("RGB")))
    assert ours.labels[i] == target
  assert (ours.origin.layout, ours.origin.split in ("test", "val", "all")) == ("torchvision", True)

  source = sources.open_source(name=name, path=tmp_path, image_size=8)
  known = class_lists.load()[name]
  for i, label in enumerate(ours.labels):
    record, named = source[i], ours.classes[label]
    assert record["class"] == known.classnames[record["label"]] and source.fields(i).items() <= record.items()
    in_data = (known.names_in_data or known.classnames)[record["label"]]
    assert class_lists.normalised(named) in {class_lists.normalised(n) for n in (record["class"], in_data)}
  assert len({*source.labels.tolist()}) == len({*ours.labels.tolist()}) > 2


@pytest.mark.parametrize("name", ["caltech101", "imagenet1k"])
def test_what_macos_leaves_beside_an_image_is_none(tmp_path, name):
  """On a disk of another system's it keeps a file's attributes in ._FILE."""
  benchmark_sets.TORCHVISION[name](tmp_path)
  expected = sources.open_source(name=name, path=tmp_path, image_size=8)
  files = [file for file in tmp_path.rglob("*") if file.is_file()]
  for file in files:
    file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
  for hidden in (files[0].parents[1] / ".Trashes", files[0].parents[1] / "__MACOSX", files[0].parent / ".ipynb"):
    hidden.mkdir()
    shutil.copy(files[0], hidden)
  found = sources.open_source(name=name, path=tmp_path, image_size=8)
  assert found.labels.tolist() == expected.labels.tolist() and found.images == expected.images


@pytest.mark.parametrize("folder", ["", "cars", "stanford_cars", "wds_nothing"])
def test_below_the_root_or_in_a_folder_of_its_own(tmp_path, folder):
  benchmark_sets.cars(tmp_path / folder)
  assert find.is_there(tmp_path, "cars") == (folder != "wds_nothing")
  assert not find.is_there(tmp_path, "pets")


@pytest.mark.parametrize(("name", "archive"), [("caltech101", "101_ObjectCategories"), ("eurosat", "2750")])
def test_an_archive_that_was_unpacked_in_the_root(tmp_path, name, archive):
  """Without torchvision's own folder above it."""
  benchmark_sets.TORCHVISION[name](tmp_path)
  (tmp_path / name / archive).rename(tmp_path / archive)
  (tmp_path / name).rmdir()
  read = find.find_labelled(tmp_path, name)
  assert read is not None and read().origin.path == str(tmp_path / archive)


def test_what_was_looked_for(tmp_path):
  with pytest.raises(
    UserError, match="no pets in .*: it was|no pets in .*; it was looked for in its folders pets, oxf"
  ):
    sources.open_source(name="pets", path=tmp_path, image_size=8)


def as_python_2_pickled_it(pixels, labels):
  """{"data": pixels, "labels": labels} by protocol 2: texts are bytes, and numpy's module is the old one."""
  text = lambda value: b"U" + bytes([len(value)]) + value
  number = lambda value: b"J" + struct.pack("<i", value)
  kind = (
    b"cnumpy\ndtype\n"
    + text(b"u1")
    + b"K\x00K\x01\x87R"
    + b"(K\x03"
    + text(b"|")
    + b"NNN"
    + 2 * number(-1)
    + b"K\x00tb"
  )
  shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
  content = b"T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes()
  empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
  array = empty + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"
  items = text(b"data") + array + text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
  return b"\x80\x02}(" + items + b"u."


def test_a_pickle_of_python_2(tmp_path):
  """As the published files are."""
  benchmark_sets.cifar10(tmp_path)
  pixels = np.random.default_rng(1).integers(0, 256, (3, 3072), np.uint8)
  (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(as_python_2_pickled_it(pixels, [3, 0, 9]))
  source = sources.open_source(name="cifar10", path=tmp_path, image_size=8)
  assert [source[i]["class"] for i in range(3)] == ["cat", "airplane", "truck"]
  for i in range(3):
    np.testing.assert_array_equal(source[i]["image"], pixels[i].reshape(3, 32, 32).transpose(1, 2, 0))


class Evil:
  def __reduce__(self):
    return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("content", [Evil(), {"data": np.array([Evil()], object), "labels": [0]}, {"data": print}])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, content):
  benchmark_sets.cifar10(tmp_path)
  (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(content))
  with pytest.raises(
    UserError, match=r"test_batch is a pickle that would call builtins\.(exec|print), .*it was not run"
  ):
    sources.open_source(name="cifar10", path=tmp_path, image_size=8)


def damage_number(root):
  (root / "pets").mkdir()
  rows = "Bengal_1 6 1 1\nBirman_1 6 1 1\n"
  (root / "oxford-iiit-pet/annotations/test.txt").write_text(rows)


def damage_label(root):
  data = {"data": np.zeros((1, 3072), np.uint8), "labels": [10]}
  (root / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(data))


def damage_name(root):
  (root / "food-101/meta/test.json").write_text(json.dumps({"waffle": ["waffle/1"]}))


def damage_form(root):
  (root / "fgvc-aircraft-2013b/data/images_variant_test.txt").write_text("0000007 Yak-43\n")


def damage_matlab(root):
  (root / "flowers-102/imagelabels.mat").write_bytes(b"nothing")


@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    ("pets", damage_number, "numbers and names of its classes contradict each other"),
    ("cifar10", damage_label, "has the label 10, counted from 0, but 10 classes"),
    ("food101", damage_name, "class 0 is 'waffle', which is none of the 101 classes of food101"),
    ("fgvc_aircraft", damage_form, "is not of the form of torchvision's fgvc_aircraft: KeyError"),
    ("flowers", damage_matlab, "imagelabels.mat is no MATLAB file"),
  ],
)
def test_damage_is_one_line(tmp_path, name, damage, message):
  benchmark_sets.TORCHVISION[name](tmp_path)
  damage(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    sources.open_source(name=name, path=tmp_path, image_size=8)
  assert "\n" not in str(error.value)
