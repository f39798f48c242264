"""The twelve sets in the folders that their authors publish and torchvision's classes read.

Order, labels and class names are those of torchvision's class, except Caltech-101, whose folder BACKGROUND_Google is a
class here, as in CLIP_benchmark, and SUN397, whose images torchvision takes in whatever order the disk gives and which
are in the order of their paths here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffdis_jax.common.files import read_json
from diffdis_jax.data.layouts import class_lists, pickles
from diffdis_jax.data.layouts.labelled import Images, Lazy, Named, Origin, image_files
from diffdis_jax.data.paths import is_below, is_hidden
from diffdis_jax.errors import UserError

ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # as torchvision's ImageFolder


@dataclasses.dataclass(frozen=True)
class Folder:
  """The layout of a set on the disk.

  Attributes:
    base: its folder, below that which torchvision's class takes as root.
    marker: a file or folder in it by which it is known.
    split: that is read.
    read: of the base.
  """

  base: str
  marker: str
  split: str
  read: Callable[[pathlib.Path, Origin], Named]


def find(parent: pathlib.Path, set_name: str, *, below: bool = True) -> pathlib.Path | None:
  """The set's folder under torchvision's root `parent` or a part of the way down; with `below`, also `parent`."""
  folder = FOLDERS[set_name]
  # An archive unpacks to the last part of the way; what is above it is torchvision's own.
  parts = folder.base.split("/")
  bases = ["/".join(parts[n:]) for n in range(len(parts) + below)]
  return next((parent / base for base in bases if (parent / base / folder.marker).exists()), None)


def read(path: pathlib.Path, set_name: str) -> Named:
  """Read a folder that `find` found.

  Raises:
    UserError: a file of it is missing, damaged, or of another form.
  """
  folder = FOLDERS[set_name]
  origin = Origin("torchvision", str(path), folder.split)
  try:
    found = folder.read(path, origin)
    listed = found.images.items if isinstance(found.images, Lazy) else ()
    if outside := next((file for file in listed if not is_below(file, path)), None):
      raise UserError(f"{path} names {outside}, which is not below it; download it again")
    return found
  except OSError as error:
    raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
  # What a reader below runs into where a file is of another form: each reads as if it were right.
  except (KeyError, IndexError, ValueError, TypeError) as error:
    raise UserError(f"{path} is not of the form of torchvision's {set_name}: {error!r}") from error


def _named(images: Images, names: Sequence[str], classes: Sequence[str], origin: Origin) -> Named:
  """Make a set of images whose classes are given by name."""
  index = {name: number for number, name in enumerate(classes)}
  return Named(images, np.array([index[name] for name in names], np.int64), classes, origin)


def _numbered(images: Images, labels: Any, classes: Sequence[str], origin: Origin) -> Named:
  """Make a set of images whose classes are places in `classes`. Raises UserError: there is none at such a place."""
  # Numbers of another copy would be taken for other classes without a word, so that both ends are checked.
  labels = np.asarray(labels, np.int64)
  if labels.shape != (len(images),):
    raise UserError(f"{origin.path} has {len(images)} images and {labels.size} labels; download it again")
  if outside := sorted({*labels.tolist()} - {*range(len(classes))}):
    raise UserError(f"{origin.path} has the label {outside[0]}, counted from 0, but {len(classes)} classes")
  return Named(images, labels, classes, origin)


def _cifar(batch: str, labels: str, meta: str, names: str) -> Callable[[pathlib.Path, Origin], Named]:
  def read_batch(path: pathlib.Path, origin: Origin) -> Named:
    found, classes = pickles.read(path / batch), pickles.read(path / meta)[names]
    pixels = found["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
      raise UserError(f"{path / batch} does not hold rows of 3072 bytes; download it again")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return _numbered(images, found[labels], classes, origin)

  return read_batch


def _class_folders(path: pathlib.Path, origin: Origin) -> Named:
  classes = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not is_hidden(folder.name))
  files = [file for name in classes for file in _images_below(path / name)]
  return _named(image_files(files), [file.relative_to(path).parts[0] for file in files], classes, origin)


def _images_below(folder: pathlib.Path) -> list[pathlib.Path]:
  """List the images of each folder before those of its subfolders, each by name, as os.walk's sorted entries are.
  Hidden files and folders, such as macOS leaves on other disks, are left out."""
  files = [file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file()]
  files = [file for file in files if not any(map(is_hidden, file.relative_to(folder).parts))]
  return sorted(files, key=lambda file: (str(file.parent), file.name))


def _imagenet(path: pathlib.Path, origin: Origin) -> Named:
  return _class_folders(path / "val", origin)


def _cars(path: pathlib.Path, origin: Origin) -> Named:
  """The devkit's cars_meta.mat says in which order its labels count, from 1."""
  # atleast_1d, here and below: scipy squeezes a list of one.
  rows = _matlab(path / "cars_test_annos_withlabels.mat")["annotations"]
  rows = np.atleast_1d(rows)
  classes = _matlab(path / "devkit" / "cars_meta.mat")["class_names"].tolist()
  files = [path / "cars_test" / str(row["fname"]) for row in rows]
  return _numbered(image_files(files), [int(row["class"]) - 1 for row in rows], classes, origin)


def _flowers(path: pathlib.Path, origin: Origin) -> Named:
  """Labels are numbers alone, from 1, in the authors' order, which is that of OpenAI's and CLIP_benchmark's lists."""
  numbers = np.atleast_1d(_matlab(path / "setid.mat")["tstid"]).tolist()
  labels = np.atleast_1d(_matlab(path / "imagelabels.mat")["labels"])
  files = [path / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
  classes = class_lists.load()["flowers"].classnames
  return _numbered(image_files(files), [int(labels[number - 1]) - 1 for number in numbers], classes, origin)


def _matlab(path: pathlib.Path) -> dict[str, Any]:
  import scipy.io  # here, since it takes a while and two sets alone need it

  if not path.exists():
    raise UserError(f"no {path}; it lists the classes, put it there")
  try:
    return scipy.io.loadmat(path, squeeze_me=True)
  except Exception as error:  # scipy raises whatever the bytes lead into
    raise UserError(f"{path} is no MATLAB file that scipy reads ({error!r}); download it again") from error


def _food(path: pathlib.Path, origin: Origin) -> Named:
  table = read_json(path / "meta" / "test.json")
  names = [name for name, images in table.items() for _ in images]
  files = [path / "images" / f"{image}.jpg" for images in table.values() for image in images]
  return _named(image_files(files), names, sorted(table), origin)


def _sun(path: pathlib.Path, origin: Origin) -> Named:
  # ClassName.txt has the letter in front of each name; folders have one of that letter above the class's.
  classes = [line[3:].strip() for line in (path / "ClassName.txt").read_text().splitlines() if line.strip()]
  files = sorted(path.rglob("sun_*.jpg"))
  return _named(image_files(files), ["/".join(file.relative_to(path).parts[1:-1]) for file in files], classes, origin)


def _dtd(path: pathlib.Path, origin: Origin) -> Named:
  lines = (path / "labels" / "test1.txt").read_text().split()
  names = [line.split("/")[0] for line in lines]
  return _named(image_files([path / "images" / line for line in lines]), names, sorted({*names}), origin)


def _aircraft(path: pathlib.Path, origin: Origin) -> Named:
  """Read the level `variant`. The line of credits at the bottom of each image stays, as torchvision leaves it."""
  data = path / "data"
  classes = [line.strip() for line in (data / "variants.txt").read_text().splitlines() if line.strip()]
  rows = [line.strip().split(" ", 1) for line in (data / "images_variant_test.txt").read_text().splitlines()]
  files = [data / "images" / f"{image}.jpg" for image, _ in rows]
  return _named(image_files(files), [name for _, name in rows], classes, origin)


def _pets(path: pathlib.Path, origin: Origin) -> Named:
  """Read the classes from the names of the files. The number in the list, from 1, has to agree."""
  rows = [line.split() for line in (path / "annotations" / "test.txt").read_text().splitlines()]
  rows = [row for row in rows if row and not row[0].startswith("#")]
  names = [row[0].rsplit("_", 1)[0] for row in rows]
  # The name is what counts; by the number, classes stand in torchvision's order.
  by_number = sorted({(int(row[1]), name) for row, name in zip(rows, names)})
  classes = [name for _, name in by_number]
  if len({number for number, _ in by_number}) < len(by_number) or len({*classes}) < len(classes):
    raise UserError(f"{path}/annotations/test.txt: numbers and names of its classes contradict each other")
  return _named(image_files([path / "images" / f"{row[0]}.jpg" for row in rows]), names, classes, origin)


FOLDERS = {
  "cifar10": Folder(
    "cifar-10-batches-py", "test_batch", "test", _cifar("test_batch", "labels", "batches.meta", "label_names")
  ),
  "cifar100": Folder("cifar-100-python", "test", "test", _cifar("test", "fine_labels", "meta", "fine_label_names")),
  "caltech101": Folder("caltech101/101_ObjectCategories", "accordion", "all", _class_folders),
  "cars": Folder("stanford_cars", "cars_test_annos_withlabels.mat", "test", _cars),
  "flowers": Folder("flowers-102", "setid.mat", "test", _flowers),
  "food101": Folder("food-101", "meta/test.json", "test", _food),
  "sun397": Folder("SUN397", "ClassName.txt", "all", _sun),
  "dtd": Folder("dtd/dtd", "labels/test1.txt", "test", _dtd),
  "fgvc_aircraft": Folder("fgvc-aircraft-2013b", "data/images_variant_test.txt", "test", _aircraft),
  "pets": Folder("oxford-iiit-pet", "annotations/test.txt", "test", _pets),
  "eurosat": Folder("eurosat/2750", "AnnualCrop", "all", _class_folders),
  "imagenet1k": Folder("", "val/n01440764", "val", _imagenet),
}
