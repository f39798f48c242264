"""Write tiny copies of the published data sets: torchvision's layouts, CLIP_benchmark's tars and COCO's files."""

from __future__ import annotations

import json
import pathlib
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import scipy.io

from diffdis_jax.data.layouts import class_lists
from tests.raw_pairs import picture, write_tar

SIZE = (9, 8)


def names(set_name: str) -> tuple[str, ...]:
  return class_lists.load()[set_name].classnames


def save(path: pathlib.Path, seed: int, kind: str = "JPEG") -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(picture(seed, kind, SIZE))


def cifar10(root: pathlib.Path) -> None:
  _cifar(root / "cifar-10-batches-py", "test_batch", "labels", "batches.meta", "label_names", "cifar10")


def cifar100(root: pathlib.Path) -> None:
  _cifar(root / "cifar-100-python", "test", "fine_labels", "meta", "fine_label_names", "cifar100")


def _cifar(folder: pathlib.Path, batch: str, labels: str, meta: str, field: str, set_name: str) -> None:
  """Pickle the set with Python 2's protocol, as its authors did."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  data = {"data": rng.integers(0, 256, (12, 3072), np.uint8), labels: [i % 10 for i in rng.permutation(12).tolist()]}
  (folder / batch).write_bytes(pickle.dumps({**data, "coarse_labels": [0] * 12}, protocol=2))
  (folder / meta).write_bytes(pickle.dumps({field: [name.replace(" ", "_") for name in names(set_name)]}, protocol=2))


def caltech101(root: pathlib.Path) -> None:
  for number, name in enumerate(("BACKGROUND_Google", "Faces", "accordion", "yin_yang")):
    for image in (1, 2):
      save(root / f"caltech101/101_ObjectCategories/{name}/image_{image:04d}.jpg", 10 * number + image)


def cars(root: pathlib.Path) -> None:
  folder = root / "stanford_cars"
  kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
  rows = [(1, label, f"{i:05d}.jpg") for i, label in enumerate((181, 3, 196, 1), 1)]
  (folder / "devkit").mkdir(parents=True)
  scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": np.array(rows, kinds)})
  scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(names("cars"), object)})
  for i in range(1, 5):
    save(folder / f"cars_test/{i:05d}.jpg", i)


def flowers(root: pathlib.Path) -> None:
  folder = root / "flowers-102"
  folder.mkdir(parents=True)
  scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 102, 1, 5, 97]])})
  scipy.io.savemat(folder / "setid.mat", {"trnid": [[4]], "valid": [[1]], "tstid": [[5, 2, 3]]})
  for i in range(1, 6):
    save(folder / f"jpg/image_{i:05d}.jpg", i)


def food101(root: pathlib.Path) -> None:
  table = {"waffles": ["waffles/9", "waffles/10"], "apple_pie": ["apple_pie/1"], "pad_thai": ["pad_thai/3"]}
  (root / "food-101/meta").mkdir(parents=True)
  (root / "food-101/meta/test.json").write_text(json.dumps(table))
  for i, image in enumerate(sum(table.values(), [])):
    save(root / f"food-101/images/{image}.jpg", i)


def sun397(root: pathlib.Path) -> None:
  classes = ("abbey", "apse/indoor", "wine_cellar/bottle_storage", "youth_hostel")
  for i, name in enumerate(classes):
    for image in ("sun_b", "sun_a"):
      save(root / f"SUN397/{name[0]}/{name}/{image}.jpg", 10 * i + ord(image[-1]))
  (root / "SUN397/ClassName.txt").write_text("".join(f"/{name[0]}/{name}\n" for name in classes))


def dtd(root: pathlib.Path) -> None:
  images = ("zigzagged/z_1.jpg", "polka-dotted/p_1.jpg", "banded/b_2.jpg", "zigzagged/z_0.jpg")
  (root / "dtd/dtd/labels").mkdir(parents=True)
  (root / "dtd/dtd/labels/test1.txt").write_text("".join(f"{image}\n" for image in images))
  for i, image in enumerate(images):
    save(root / f"dtd/dtd/images/{image}", i)


def fgvc_aircraft(root: pathlib.Path) -> None:
  data = root / "fgvc-aircraft-2013b/data"
  data.mkdir(parents=True)
  (data / "variants.txt").write_text("".join(f"{name}\n" for name in names("fgvc_aircraft")))
  (data / "images_variant_test.txt").write_text("0000007 Yak-42\n0000003 F-16A/B\n0000005 Eurofighter Typhoon\n")
  for i in (3, 5, 7):
    save(data / f"images/{i:07d}.jpg", i)


def pets(root: pathlib.Path) -> None:
  folder = root / "oxford-iiit-pet"
  rows = [("yorkshire_terrier_2", 37), ("Abyssinian_201", 1), ("american_bulldog_100", 2), ("Bengal_7", 6)]
  cats = ("Abyssinian", "Bengal")  # only cats' names begin with a capital
  spelled = [name if name in cats else name.lower() for name in names("pets")]
  one_of_each = [(f"{name.replace(' ', '_')}_1", i) for i, name in enumerate(spelled, 1)]
  rows = [*rows, *one_of_each]
  (folder / "annotations").mkdir(parents=True)
  (folder / "annotations/test.txt").write_text("".join(f"{image} {label} 1 1\n" for image, label in rows))
  for i, (image, _) in enumerate(rows):
    save(folder / f"images/{image}.jpg", i)


def eurosat(root: pathlib.Path) -> None:
  for i, name in enumerate(class_lists.load()["eurosat"].names_in_data):
    for image in (2, 10):
      save(root / f"eurosat/2750/{name}/{name}_{image}.jpg", 100 * i + image)


def imagenet1k(root: pathlib.Path) -> None:
  for i, number in enumerate(("n15075141", "n01440764", "n04356056")):
    save(root / f"val/{number}/ILSVRC2012_val_0000{i:04d}.JPEG", i)


TORCHVISION: dict[str, Callable[[pathlib.Path], None]] = {
  write.__name__: write
  for write in (
    *(cifar10, cifar100, caltech101, cars, flowers, food101, sun397, dtd, fgvc_aircraft, pets, eurosat, imagenet1k),
  )
}


def write_wds(
  folder: pathlib.Path,
  samples: Sequence[dict[str, bytes]],
  *,
  per_tar: int = 3,
  classnames: Sequence[str] = (),
  templates: Sequence[str] = (),
  kind: str = "",
) -> None:
  """Write tars as CLIP_benchmark does, by webdataset's ShardWriter, which sorts the members of a sample."""
  (folder / "test").mkdir(parents=True, exist_ok=True)
  texts = dict(classnames=classnames, zeroshot_classification_templates=templates, dataset_type=[kind] * bool(kind))
  for name, lines in texts.items():
    if lines:
      (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
  shards = range(0, len(samples), per_tar)
  (folder / "test/nshards.txt").write_text(f"{len(shards)}\n")
  for shard, start in enumerate(shards):
    members = enumerate(samples[start : start + per_tar], start)
    files = {f"s{number:07d}.{ending}": data for number, sample in members for ending, data in sorted(sample.items())}
    write_tar(folder / f"test/{shard}.tar", files)


def labelled_wds(root: pathlib.Path, set_name: str) -> None:
  """Write a set of four pictures in CLIP_benchmark's tars."""
  samples = [{"jpg": picture(i, "JPEG", SIZE), "cls": str(label).encode()} for i, label in enumerate((2, 0, 1, 3))]
  write_wds(root / f"wds_{set_name}", samples, classnames=names(set_name))


def captioned_wds(folder: pathlib.Path, captions: dict[int, Sequence[str]]) -> None:
  """Write pictures with captions in CLIP_benchmark's tars."""
  samples = [{"jpg": picture(i, "JPEG", SIZE), "txt": "\n".join(texts).encode()} for i, texts in captions.items()]
  write_wds(folder, samples, kind="retrieval")
