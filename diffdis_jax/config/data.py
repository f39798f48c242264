"""Define a config's `data` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.config.section import Section, check_number, choice, field, number
from diffdis_jax.errors import UserError

MOST_READERS = 1024  # threads or processes: more than any host has cores
MOST_AHEAD = 10_000  # in batches
CROPS = ("centre", "random", "random_resized")
RANDAUGMENTS = {"torchvision": 30, "timm": 10}  # and the largest magnitude of each
VIEWS = ("shared", "own")
_VARYING = ("flip", "shift", "zoom", "rotation", "brightness", "contrast", "saturation", "hue")
_VARYING += ("randaugment_operations", "erase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation(Section):
  """The variation of training images. The defaults only resize. None of it is stated by the paper."""

  # The largest square, from the middle or from a random place; or a box of random area and ratio, stretched to a
  # square. A generative model trained on stretched images generates stretched images.
  crop: str = choice("centre", CROPS, help="part of the image that is seen; random_resized stretches a random box")
  # torchvision's default is (0.08, 1), open_clip's (0.9, 1).
  crop_scale: Sequence[float] = number(
    (0.5, 1.0), gt=0, le=1, help="random_resized: range of the box's area, as a fraction of the image's"
  )
  crop_ratio: Sequence[float] = number(
    (3 / 4, 4 / 3), gt=0, help="random_resized: range of the box's width over its height"
  )
  flip: bool = field(False, help="mirror left and right half of the time; wrong where captions tell left from right")
  shift: float = number(0.0, ge=0, le=1, help="largest move, as a fraction of the side; it uncovers white")
  zoom: float = number(0.0, ge=0, help="largest relative change of size: 0.1 means 1/1.1 to 1.1; it uncovers white")
  rotation: float = number(0.0, ge=0, le=180, help="largest turn, degrees; it uncovers white")
  # Up to 1, since a factor of 1 − x must not be negative.
  brightness: float = number(0.0, ge=0, le=1, help="largest relative change: 0.2 means a factor of 0.8 to 1.2")
  contrast: float = number(0.0, ge=0, le=1, help="largest relative change: 0.2 means a factor of 0.8 to 1.2")
  saturation: float = number(0.0, ge=0, le=1, help="largest relative change: 0.2 means a factor of 0.8 to 1.2")
  # Half a turn reaches every hue.
  hue: float = number(0.0, ge=0, le=0.5, help="largest turn of the colour circle, as a fraction of it")
  randaugment_operations: int = number(0, ge=0, help="operations of RandAugment, after the crop; 2 is customary")
  randaugment_magnitude: int = number(9, ge=0, help="strength of RandAugment: torchvision's 0 to 30, timm's 0 to 10")
  randaugment_kind: str = choice("torchvision", RANDAUGMENTS, help="library whose operations RandAugment takes")
  randaugment_deviation: float = number(0.0, ge=0, help="standard deviation of the strength, of timm's alone")
  erase: float = number(0.0, ge=0, le=1, help="share of images in which a random box becomes noise (timm)")
  # If the part that is cropped from it still has as many pixels as the view.
  reduced_decoding: bool = field(
    True, help="decode large JPEGs at 1/2, 1/4 or 1/8 of their size, which is faster and changes pixels slightly"
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ("crop_scale", "crop_ratio"):
      bounds = getattr(self, name)
      if len(bounds) != 2 or bounds[1] < bounds[0]:
        raise UserError(f"{name} is {bounds!r}; it must be two numbers, the least and the most")
    # The two libraries count strength on different scales.
    check_number("randaugment_magnitude", self.randaugment_magnitude, le=RANDAUGMENTS[self.randaugment_kind])

  @property
  def varies(self) -> bool:
    """Return whether two views of an image may differ."""
    return self.crop != "centre" or any(getattr(self, name) for name in _VARYING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading(Section):
  """The reading ahead of batches, a config's `data.loader`."""

  num_threads: int = number(4, ge=0, le=MOST_READERS, help="threads that read ahead; 0 reads in the calling thread")
  num_workers: int = number(0, ge=0, le=MOST_READERS, help="processes that prepare batches; 0 for none")
  prefetch: int = number(8, ge=1, le=MOST_AHEAD, help="batches that the threads read ahead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassSampling(Section):
  """The sampling of a long-tailed set's images, a config's `data.sampling`."""

  # 0.5 is VL-LTR's square-root sampling.
  sampling_exponent: float = number(0.5, ge=0, le=1, help="x: a class of n images has the share n^x of the samples")
  sentences: bool = choice(dataclasses.MISSING, (True, False), help="a sentence of its class comes with each image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section):
  """The training data of a run, a config's `data` section.

  Raises:
    UserError: a value out of its range, a field image_size, or fields of a single source beside a mixture.
  """

  # By default rendered shapes, which need no file. Each kind of source has its own fields (data/sources.py).
  source: Mapping[str, Any] = field(
    dict(name="shapes", path="", split="train", caption_fields=()), rest=True, help="a field of the data source"
  )
  max_length: int = field(77, help="most tokens of a caption")
  augment: Augmentation = field(Augmentation())
  discrimination_view: str = choice(
    "shared", VIEWS, help="view of an image: shared by both objectives, or discrimination's own"
  )
  discrimination_augment: Augmentation = field(Augmentation())
  mixture: Mapping[str, Mapping[str, Any]] = field(
    {}, help="name -> weight, name, path, split: several sources instead of the one above"
  )
  loader: Loading = field(Loading())
  sampling: ClassSampling | None = field(None, kind=ClassSampling)

  def __post_init__(self) -> None:
    super().__post_init__()
    sections = {"": self.source, **{f"mixture.{name}.": section for name, section in self.mixture.items()}}
    for prefix, section in sections.items():
      if "image_size" in section:  # an evaluation's data have this field
        raise UserError(f"{prefix}image_size is {section['image_size']!r}; leave it out: it is the run's image_size")
    for name in ("path", "caption_fields") if self.mixture else ():
      if own_fields := self.source.get(name):
        raise UserError(
          f"{name} is {own_fields!r}, which data.mixture takes the place of: give {name} to one of its sources, and"
          f" leave data.{name} empty"
        )

  @property
  def sources(self) -> dict[str, Mapping[str, Any]]:
    """Return name -> the fields for `data.sources.open_source`, and `weight` if there are several sources."""
    # Sort by name, so that the order of records does not depend on the order in the file.
    return dict(sorted(self.mixture.items())) or {"data": self.source}

  @property
  def own_augment(self) -> Augmentation | None:
    """Return the augmentation of discrimination's own view, or None if both objectives share one view."""
    return self.discrimination_augment if self.discrimination_view == "own" else None

  @property
  def paths(self) -> list[str]:
    """Return the paths of the sources that are on a disk or in a bucket."""
    return [str(section["path"]) for section in self.sources.values() if section.get("path")]
