"""A config's `data` section as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffdis_jax.errors import UserError, check_choice, check_number, check_numbers, read_section

MOST_READERS = 1024  # threads, or processes: more than any host has cores
MOST_AHEAD = 10_000  # batches
CROPS = ("centre", "random", "random_resized")
RANDAUGMENTS = {"torchvision": 30, "timm": 10}  # and the largest magnitude of each
VIEWS = ("shared", "own")
_VARYING = ("flip", "shift", "zoom", "rotation", "brightness", "contrast", "saturation", "hue")
_VARYING += ("randaugment_operations", "erase")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
  """How training images vary. The defaults change nothing but the size. None of it is stated by the paper.

  Attributes:
    crop: "centre" and "random", the largest square, from the middle or from a random place; or "random_resized", a box
      of random area and ratio, stretched to a square. A generative model trained on it generates stretched images.
    crop_scale: of "random_resized" alone, the range of the box's area, as a fraction of the image's. torchvision's
      default is (0.08, 1), open_clip's (0.9, 1).
    crop_ratio: of "random_resized" alone, the range of the box's width over its height.
    flip: mirror left and right half of the time. It is wrong where captions tell left from right.
    shift: largest move, as a fraction of the side.
    zoom: largest relative change of size, so that 0.1 means 1/1.1 to 1.1.
    rotation: largest turn, degrees. Shift, zoom and turn uncover white.
    brightness, contrast, saturation: largest relative change of each, so that 0.2 means a factor of 0.8 to 1.2.
    hue: largest turn of the colour circle, as a fraction of it, at most 0.5.
    randaugment_operations: how many operations of RandAugment, after the crop; 2 with magnitude 9 is customary.
    randaugment_kind: whose operations, one of RANDAUGMENTS.
    randaugment_magnitude: their strength, torchvision's 0 to 30, timm's 0 to 10.
    randaugment_deviation: of timm's alone, the standard deviation of the strength.
    erase: how often a random box is noise at last, timm's random erasing.
    reduced_decoding: decode a JPEG at 1/2, 1/4 or 1/8 of its size where what is cropped from it still has as many
      pixels as the view. It is faster, and changes pixels slightly.
  """

  crop: str = "centre"
  crop_scale: Sequence[float] = (0.5, 1.0)
  crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
  flip: bool = False
  shift: float = 0.0
  zoom: float = 0.0
  rotation: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  randaugment_operations: int = 0
  randaugment_magnitude: int = 9
  randaugment_kind: str = "torchvision"
  randaugment_deviation: float = 0.0
  erase: float = 0.0
  reduced_decoding: bool = True

  def __post_init__(self) -> None:
    check_choice("crop", self.crop, CROPS)
    for name, limits in (("crop_scale", dict(above=0.0, at_most=1.0)), ("crop_ratio", dict(above=0.0))):
      bounds = getattr(self, name)
      check_numbers(name, bounds, **limits)
      if len(bounds) != 2:
        raise UserError(f"{name} is {bounds!r}; it must be two numbers, the least and the most")
      check_number(f"{name}[1]", bounds[1], at_least=bounds[0])
    check_number("shift", self.shift, at_least=0.0, at_most=1.0)
    check_number("zoom", self.zoom, at_least=0.0)
    check_number("rotation", self.rotation, at_least=0.0, at_most=180.0)
    # Up to 1, since a factor of 1 − x must not be negative; half a turn reaches every hue.
    for name in ("brightness", "contrast", "saturation"):
      check_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
    check_number("hue", self.hue, at_least=0.0, at_most=0.5)
    check_number("randaugment_operations", self.randaugment_operations, at_least=0)
    check_choice("randaugment_kind", self.randaugment_kind, RANDAUGMENTS)
    # After the kind, since the two libraries count strength on scales of their own.
    largest = RANDAUGMENTS[self.randaugment_kind]
    check_number("randaugment_magnitude", self.randaugment_magnitude, at_least=0, at_most=largest)
    check_number("randaugment_deviation", self.randaugment_deviation, at_least=0.0)
    check_number("erase", self.erase, at_least=0.0, at_most=1.0)

  @property
  def varies(self) -> bool:
    """Whether two views of an image may differ."""
    return self.crop != "centre" or any(getattr(self, name) for name in _VARYING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
  """How batches are read ahead; a config's `data.loader`.

  Attributes:
    num_threads: threads that read ahead; 0 to do everything in the calling thread.
    num_workers: processes that prepare batches; 0 for none.
    prefetch: batches read ahead by the threads.
  """

  num_threads: int = 4
  num_workers: int = 0
  prefetch: int = 8

  def __post_init__(self) -> None:
    check_number("num_threads", self.num_threads, at_least=0, at_most=MOST_READERS)
    check_number("num_workers", self.num_workers, at_least=0, at_most=MOST_READERS)
    check_number("prefetch", self.prefetch, at_least=1, at_most=MOST_AHEAD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassSampling:
  """How images of a long-tailed set are sampled; a config's `data.sampling`.

  Attributes:
    sampling_exponent: a class of n images has the share n^sampling_exponent of the samples; 0.5 is VL-LTR's square-root
      sampling.
    sentences: whether a sentence of its class comes with each image.
  """

  sampling_exponent: float = 0.5
  sentences: bool

  def __post_init__(self) -> None:
    check_number("sampling_exponent", self.sampling_exponent, at_least=0.0, at_most=1.0)
    check_choice("sentences", self.sentences, (True, False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What a run trains on; a config's `data` section.

  Attributes:
    source: a field of the source, as data/sources.py has them. They stand in the section beside the other fields:
      `name`, `path`, `split`, `caption_fields` (fields of a record, whose texts are its captions; none: those that it
      came with), and whatever else that source has.
    max_length: most tokens of a caption.
    augment: how images vary.
    discrimination_view: of an image, one of VIEWS: shared by both objectives, or discrimination's own, by
      `discrimination_augment`.
    mixture: name -> weight, name, path, split: several sources instead of the one above.
    loader: how batches are read ahead.
    sampling: of a long-tailed set, whose batches have labels; None of any other.

  Raises:
    UserError: a value out of its range, an image_size, or data of one source beside a mixture.
  """

  # Rendered shapes, which need no file.
  source: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: dict(name="shapes", path="", split="train", caption_fields=())
  )
  max_length: int = 77
  augment: Augmentation = Augmentation()
  discrimination_view: str = "shared"
  discrimination_augment: Augmentation = Augmentation()
  mixture: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  loader: Loading = Loading()
  sampling: ClassSampling | None = None

  def __post_init__(self) -> None:
    check_choice("discrimination_view", self.discrimination_view, VIEWS)
    sections = {"": self.source, **{f"mixture.{name}.": section for name, section in self.mixture.items()}}
    for prefix, section in sections.items():
      if "image_size" in section:  # as an evaluation's data have it
        raise UserError(f"{prefix}image_size is {section['image_size']!r}; leave it out: it is the run's image_size")
    for name in ("path", "caption_fields") if self.mixture else ():
      if given := self.source.get(name):
        raise UserError(
          f"{name} is {given!r}, which data.mixture takes the place of: give {name} to one of its sources, and"
          f" leave data.{name} empty"
        )

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> Data:
    """The section as a config has it. Raises UserError: a wrong field or value."""
    # Taken out one after another. What is left is the source's, of which each kind has fields of its own.
    fields = dict(fields)
    parts = {name: read_section(kind, fields.pop(name), f"data.{name}") for name, kind in _PARTS.items()}
    sampling = fields.pop("sampling", None)
    if sampling is not None:
      sampling = read_section(ClassSampling, sampling, "data.sampling")
    own = {name: fields.pop(name) for name in ("max_length", "discrimination_view", "mixture")}
    return read_section(cls, {**own, **parts, "sampling": sampling, "source": fields}, "data")

  def to_dict(self) -> dict[str, Any]:
    """The inverse of `of`."""
    fields = dataclasses.asdict(self)
    if self.sampling is None:
      del fields["sampling"]
    return {**fields.pop("source"), **fields}

  @property
  def sources(self) -> dict[str, Mapping[str, Any]]:
    """Name -> what `data.sources.open_source` takes, and `weight` where there are several."""
    # By name, so that the order in which a file lists them does not decide which record comes when.
    return dict(sorted(self.mixture.items())) or {"data": self.source}

  @property
  def own_augment(self) -> Augmentation | None:
    """Of discrimination's own view of an image; None where both objectives share one."""
    return self.discrimination_augment if self.discrimination_view == "own" else None

  @property
  def paths(self) -> list[str]:
    """Where the sources are that are on a disk or in a bucket."""
    return [str(section["path"]) for section in self.sources.values() if section.get("path")]


_PARTS = {"augment": Augmentation, "discrimination_augment": Augmentation, "loader": Loading}
