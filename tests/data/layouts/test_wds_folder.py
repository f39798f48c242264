"""CLIP_benchmark's tars are written as its builder writes them, and read as its reader reads them."""

from __future__ import annotations

import tarfile

import pytest

from diffdis_jax.data import sources
from diffdis_jax.data.layouts import class_lists, find, wds_folder
from diffdis_jax.errors import UserError
from tests.benchmark_sets import write_wds
from tests.raw_pairs import picture, write_tar

PETS = ("Pug", "Boxer", "Abyssinian")  # any order: labels go by name
LABELS = (2, 0, 1, 1, 0, 2, 2)


def write(folder, endings=("webp",), **changes):
  """Write a picture for each of LABELS, and return them."""
  kinds = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}
  chosen = [endings[i % len(endings)] for i in range(len(LABELS))]
  images = [picture(i, kinds[ending]) for i, ending in enumerate(chosen)]
  samples = [
    {ending: image, "cls": f"{label}\n".encode()} for ending, image, label in zip(chosen, images, LABELS, strict=True)
  ]
  write_wds(folder, samples, **{"classnames": PETS, "templates": ("a photo of a {c}.",), **changes})
  return images


@pytest.mark.parametrize("endings", [("webp",), ("png", "jpg", "webp")])
@pytest.mark.parametrize("folder", ["pets", "wds_pets", "wds_vtab-pets"])
def test_same_images_labels_and_order(tmp_path, folder, endings):
  images = write(tmp_path / folder, endings)
  ours = find.open_set(tmp_path, "pets")
  assert [ours[i]["image"] for i in range(len(ours))] == images
  assert (ours.origin.layout, ours.origin.split) == ("wds", "test")
  source = sources.open_source(name="pets", path=tmp_path, image_size=8)
  assert [source[i]["class"] for i in range(7)] == [PETS[label] for label in LABELS]
  assert source.labels[0] == class_lists.load()["pets"].classnames.index("Abyssinian") == 0


def test_one_label_a_class_of_another_order(tmp_path):
  """Two of ImageNet's classes share a name, so that the order has to be the usual one."""
  names = class_lists.load()["imagenet1k"].classnames
  write(tmp_path / "imagenet1k", classnames=names)
  assert sources.open_source(name="imagenet1k", path=tmp_path, image_size=8).labels.tolist() == list(LABELS)
  (tmp_path / "imagenet1k/classnames.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
  with pytest.raises(UserError, match="class list of another order: class 0 is 'goldfish', which should be class 1"):
    sources.open_source(name="imagenet1k", path=tmp_path, image_size=8)


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("classnames.txt", "Pug\nBoxer\n", "has the label '2'; there are 2 classes, counted from 0"),
    ("classnames.txt", "", "no .*classnames.txt; labels go by name"),
    ("classnames.txt", "Pug\nBoxer\nLynx\n", "class 2 is 'Lynx', which is none of the 37 classes of pets"),
    ("test/nshards.txt", "4", "no .*3.tar, one of 4 by nshards.txt"),
    ("test/nshards.txt", "many", "says 'many'; it should be the number of tars"),
    ("test/nshards.txt", "9" * 5000, "nshards.txt says"),
    ("test/nshards.txt", f"{10**15}", "no .*3.tar, one of 1000000000000000"),
    ("test/nshards.txt", b"\xff\xfe2", "nshards.txt holds text that is not UTF-8"),
    ("dataset_type.txt", "multilabel", "is of type multilabel"),
    ("test/1.tar", "x" * 600, "1.tar is damaged"),
    ("classnames.txt", b"Caf\xe9\n", "classnames.txt holds text that is not UTF-8"),
  ],
)
def test_damage_is_one_line(tmp_path, file, content, message):
  write(tmp_path / "pets")
  (tmp_path / "pets" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=message) as error:
    sources.open_source(name="pets", path=tmp_path, image_size=8)
  assert "\n" not in str(error.value)


def test_a_tar_in_another_order_and_one_that_is_cut_off(tmp_path):
  write(tmp_path / "pets")
  path = tmp_path / "pets/test/0.tar"
  read = lambda: [record["image"] for record in map(find.open_set(tmp_path, "pets").__getitem__, range(len(LABELS)))]
  before = read()
  with tarfile.open(path) as tar:
    files = {member.name: tar.extractfile(member).read() for member in tar}
  write_tar(path, dict(sorted(files.items(), key=lambda file: file[0].rpartition(".")[2])))
  assert read() == before
  path.write_bytes(path.read_bytes()[: 512 * 5])
  with pytest.raises(UserError, match="0.tar is damaged or cut off; download it again"):
    sources.open_source(name="pets", path=tmp_path, image_size=8)


def test_captions(tmp_path):
  texts = [["a cat", "the cat, again"], ["a dog"]]
  write_wds(
    tmp_path / "wds_mscoco_captions",
    [{"jpg": picture(i, "JPEG"), "txt": "\n".join(lines).encode()} for i, lines in enumerate(texts)],
    kind="retrieval",
  )
  source = sources.open_source(name="mscoco_captions", path=tmp_path, image_size=8)
  assert [source[i]["captions"] for i in range(2)] == texts
  assert source[1]["image"] == picture(1, "JPEG") and source.fields(1)["caption"] == "a dog"
  with pytest.raises(UserError, match="is of type retrieval"):
    wds_folder.read(tmp_path / "wds_mscoco_captions", class_lists.load()["pets"])
