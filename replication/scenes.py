"""Render captioned images of two coloured shapes and a relation, such as "a red star left of a blue ring".

16 of the 64 pairs of colour and shape are never in training, two of each colour and two of each shape. Each image has
two true captions, which are converses: here the other is "a blue ring right of a red star". Its hard negatives are
false captions that differ from the true one in one thing. In two kinds only the order of the words differs.

A caption alone does not reveal that it is false. The splits `choice_...`, which have negatives, also have the scenes
that the negatives describe, equally often, so scoring texts alone is right on half of the swaps. Every negative names
as many unseen pairs as the true caption. None of this is in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental
from jaxtyping import UInt8

from diffdis_jax.data import shapes, sources
from diffdis_jax.data.shapes import COLOURS, PAIRS, SHAPES
from diffdis_jax.errors import UserError

Pair = tuple[str, str]  # colour and shape

CONVERSES = {"left of": "right of", "above": "below"}
RELATIONS = tuple(CONVERSES)
KINDS = ("other_colour", "other_shape", "swapped_colours", "swapped_objects")  # kinds of negatives

# All lengths are fractions of the image's side. Shapes do not touch and do not leave the image.
RADIUS = (0.18, 0.22)  # to a shape's outermost point
APART = (0.22, 0.26)  # distance from the scene's centre to each shape's centre, along the relation's axis
ASIDE = 0.12  # largest offset of a shape, across that axis
OFF_CENTRE = 0.02  # largest offset of the scene's centre, along each axis

# 3 and 8 have no common factor, and 2 and 5 differ, so each shape and each colour is held out twice.
UNSEEN = tuple((colour, SHAPES[(3 * i + j) % len(SHAPES)]) for i, colour in enumerate(COLOURS) for j in (2, 5))
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)
# Number of images. `val` and `test` share no scene; settings are chosen on `val`.
MEASURED = tuple(f"{part}{pairs}" for part in ("val", "test") for pairs in ("", "_unseen"))
SPLITS = {
  "train": 65536,
  **dict.fromkeys(MEASURED, 1024),
  **dict.fromkeys((f"choice_{split}" for split in MEASURED), 4096),
  "all": 8192,
}
TOGETHER = 8  # consecutive scenes of training: four of the same two objects, and four of two others of the same colours
ORBIT = 8  # number of scenes that swapping colours, objects or the relation makes of one


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene, in which `first` is left of `second`, or above it."""

  first: Pair
  second: Pair
  relation: str  # one of RELATIONS

  def caption(self, *, converse: bool = False) -> str:
    """Return the true caption that begins with `first`, or its converse."""
    if converse:
      return say(self.second, CONVERSES[self.relation], self.first)
    return say(self.first, self.relation, self.second)

  @property
  def unseen(self) -> int:
    """Return how many of the scene's pairs are never in training."""
    return (self.first in UNSEEN) + (self.second in UNSEEN)

  @property
  def swapped_colours(self) -> Scene:
    """Return the scene with the two shapes' colours swapped."""
    (colour, shape), (other_colour, other_shape) = self.first, self.second
    return Scene((other_colour, shape), (colour, other_shape), self.relation)

  @property
  def swapped_objects(self) -> Scene:
    """Return the scene with the two shapes' places swapped."""
    return Scene(self.second, self.first, self.relation)

  def others(self, part: int) -> list[Scene]:
    """Return the scenes in which one of the two shapes gets a new colour or form, with as many unseen pairs.

    Args:
      part: 0 to change a colour, 1 to change a shape.
    """
    others = []
    for value in (COLOURS, SHAPES)[part]:
      if value in (self.first[part], self.second[part]):
        continue
      changed = lambda pair, value=value: (value, pair[1]) if part == 0 else (pair[0], value)
      others.append(dataclasses.replace(self, first=changed(self.first)))
      others.append(dataclasses.replace(self, second=changed(self.second)))
    return [scene for scene in others if scene.unseen == self.unseen]


def say(first: Pair, relation: str, second: Pair) -> str:
  """Write the caption of two shapes and their relation."""
  return f"a {' '.join(first)} {relation} a {' '.join(second)}"


@functools.cache
def scenes_of(split: str) -> tuple[Scene, ...]:
  """Return the scenes of a split, each once.

  `train` has every scene of two seen pairs that share neither colour nor shape. Similar scenes follow each other:
  unless they share a batch, relations and shapes are learned late, or only in some runs. `val` and `test` have such
  scenes too, and `val_unseen` and `test_unseen` those with one unseen pair. For each of these four, `choice_...` has
  the scenes whose swapped colours name as many unseen pairs: all eight of an orbit, one after another. `all`, on which
  the judge is trained, has every two pairs, even two equal ones.
  """
  pairs = {"train": SEEN, "all": PAIRS}.get(split)
  if pairs is not None:
    every = [Scene(first, second, relation) for first in pairs for second in pairs for relation in RELATIONS]
    scenes = [scene for scene in every if split == "all" or _differs(scene)]
    scenes = [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))]
    return tuple(scenes if split == "all" else _alike_together(scenes))
  unseen, is_choice = split.endswith("_unseen"), split.startswith("choice_")
  return tuple(
    scene
    for orbit in _orbits()["test" in split :: 2]
    for scene in orbit
    if scene.unseen == unseen and (not is_choice or scene.swapped_colours.unseen == unseen)
  )


def _alike_together(scenes: Sequence[Scene]) -> list[Scene]:
  """Order scenes so that those of the same two colours follow each other, the four of the same two objects together."""
  by_colours: dict[frozenset[str], dict[Scene, None]] = {}
  for scene in scenes:
    orders = sorted((scene, scene.swapped_objects), key=lambda order: (order.first, order.second))
    of_objects = (dataclasses.replace(order, relation=relation) for order in orders for relation in RELATIONS)
    by_colours.setdefault(frozenset((scene.first[0], scene.second[0])), {}).update(dict.fromkeys(of_objects))
  return [scene for group in by_colours.values() for scene in group]


def _differs(scene: Scene) -> bool:
  return all(a != b for a, b in zip(scene.first, scene.second, strict=True))


@functools.cache
def _orbits() -> list[tuple[Scene, ...]]:
  """Return all orbits in random order. `val` and `test` take alternate ones, so they share no scene."""
  every = [Scene(first, second, RELATIONS[0]) for first in PAIRS for second in PAIRS]
  orbits = [*dict.fromkeys(_orbit(scene) for scene in every if _differs(scene))]
  return [orbits[i] for i in np.random.default_rng(0).permutation(len(orbits))]


def _orbit(scene: Scene) -> tuple[Scene, ...]:
  """Return the eight scenes that swaps make of one scene, in an order that does not depend on that scene."""
  own = (scene, scene.swapped_colours)
  four = sorted((*own, *(member.swapped_objects for member in own)), key=lambda member: (member.first, member.second))
  return tuple(dataclasses.replace(member, relation=relation) for member in four for relation in RELATIONS)


def render(scene: Scene, *, image_size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
  """Draw a scene; `rng` decides background, places, sizes, rotations, and a slight jitter of all colours."""
  background = tuple(shapes.BACKGROUNDS.values())[rng.integers(len(shapes.BACKGROUNDS))]
  image = np.broadcast_to(_jittered(background, shapes.BACKGROUND_JITTER, rng), (image_size, image_size, 3))
  axis = RELATIONS.index(scene.relation)
  middle, apart = rng.uniform(-OFF_CENTRE, OFF_CENTRE, 2), rng.uniform(*APART)
  for (colour, shape), side in ((scene.first, -1), (scene.second, 1)):
    along, across = middle[axis] + side * apart, middle[1 - axis] + rng.uniform(-ASIDE, ASIDE)
    x, y = (across, along) if axis else (along, across)
    covered = shapes.coverage(
      shape,
      x=x,
      y=y,
      radius=rng.uniform(*RADIUS),
      rotation=rng.uniform(-shapes.MAX_ROTATION, shapes.MAX_ROTATION),
      image_size=image_size,
    )
    image = image + (_jittered(COLOURS[colour], shapes.COLOUR_JITTER, rng) - image) * covered
  return (image + 0.5).astype(np.uint8)


def _jittered(colour: Sequence[int], reach: int, rng: np.random.Generator) -> np.ndarray:
  return np.clip(np.array(colour) + rng.integers(-reach, reach, 3, endpoint=True), 0, 255)


def in_runs(length: int, run: int, seed: int) -> grain.MapDataset:
  """Return an order of an epoch of `length` records in which `run` records always follow each other.

  Raises UserError: a number of records that does not divide by `run`.
  """
  if length % run:
    raise UserError(f"num_images is {length}; in training these come {run} at a time: take a multiple of {run}")
  return experimental.FlatMapMapDataset(grain.MapDataset.range(length // run).seed(seed).shuffle(), _Run(run))


class _Run(experimental.FlatMapTransform):
  """The number of a run of records -> their places in the source."""

  def __init__(self, length: int):
    self._length = length

  @property
  def max_fan_out(self) -> int:
    return self._length

  def flat_map(self, element: int) -> range:
    return range(element * self._length, (element + 1) * self._length)


class Scenes:
  """A random-access source of `num_images` records, each a function of (seed, split, index) alone.

  A record is {image: u8[h w 3], caption, captions: both true ones, first: "red star", second, relation, seen: True if
  both of its pairs are seen, key}. In the splits `choice_...` it also has negatives: {kind: false caption} of KINDS.
  `caption` is one of the two true ones, and the negatives have its wording. The scenes of `scenes_of` are repeated in
  turn, in new images each time. `val`, `val_unseen`, `test` and `test_unseen` have more than 1,024 scenes, with
  different captions. `seed` changes images, not scenes. In training TOGETHER images follow each other.
  """

  def __init__(self, *, split: str, image_size: int, seed: int = 0, num_images: int | None = None):
    self._scenes = scenes_of(split)
    # The split is part of the seed: otherwise two splits with a common scene would share images.
    self._seed = (seed, tuple(SPLITS).index(split))
    self._has_negatives = split.startswith("choice_")
    self._image_size = image_size
    self.together = TOGETHER if split == "train" else 1  # records that follow each other in training
    self._num_images = SPLITS[split] if num_images is None else num_images

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    fields = self.fields(index)
    rng = np.random.default_rng((*self._seed, index, 0))
    return {**fields, "image": render(self.scene(index), image_size=self._image_size, rng=rng)}

  def order(self, seed: int) -> grain.MapDataset:
    """Return the places of an epoch."""
    return in_runs(len(self), self.together, seed)

  def scene(self, index: int) -> Scene:
    """Return the scene of an image. Raises IndexError if there is no such image."""
    if not 0 <= index < self._num_images:
      raise IndexError(f"index {index} outside of {self._num_images} images")
    return self._scenes[index % len(self._scenes)]

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image."""
    scene = self.scene(index)
    # All eight scenes of an orbit have one wording: the negatives of one are the true captions of others.
    converse = bool(index // ORBIT % 2)
    caption, other = scene.caption(converse=converse), scene.caption(converse=not converse)
    negatives = {"negatives": self._negatives(scene, index, converse=converse)} if self._has_negatives else {}
    return {
      "caption": caption,
      "captions": [caption, other],
      "first": " ".join(scene.first),
      "second": " ".join(scene.second),
      "relation": scene.relation,
      "seen": not scene.unseen,
      **negatives,
      "key": f"{index:09d}",
    }

  def _negatives(self, scene: Scene, index: int, *, converse: bool) -> Mapping[str, str]:
    rng = np.random.default_rng((*self._seed, index, 1))
    others = [scene.others(part) for part in (0, 1)]
    false_scenes = (
      *(candidates[rng.integers(len(candidates))] for candidates in others),
      scene.swapped_colours,
      scene.swapped_objects,
    )
    return {kind: other.caption(converse=converse) for kind, other in zip(KINDS, false_scenes, strict=True)}


class Section(sources.Section):
  """The data source `scenes` of a config; `split` is one of SPLITS."""

  def open(self) -> sources.Source:
    if path := str(self.path):  # its images would otherwise be left out without a message
      raise UserError(f"data.path is {path!r}, and scenes are rendered, from no file: leave the path empty")
    if self.split not in SPLITS:
      raise UserError(f"scenes has no split {self.split!r}; there are {', '.join(SPLITS)}")
    return self._recaptioned(
      Scenes(split=self.split, image_size=self.image_size, seed=self.seed, num_images=self.num_images)
    )
