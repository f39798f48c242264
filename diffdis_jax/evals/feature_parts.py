"""Features of generated images in a folder of parts, so that killed sampling can be resumed.

A part is a file of the features and the prompts of at most 500 images, written whole, with a header that says how they
were made. Features are all that is needed for every measure; the images themselves are kept on request.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from diffdis_jax.common import buckets, files
from diffdis_jax.data import image_files
from diffdis_jax.errors import UserError, may_pass, parse_json
from diffdis_jax.evals.drawn_prompts import Part
from diffdis_jax.evals.reference import UNREADABLE
from diffdis_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Sampled:
  """The features of a part's images, and the similarity that the run's head gives each image and its prompt; no
  similarity without a head."""

  features: Float[np.ndarray, "n d"]
  similarity: Float[np.ndarray, " m"]


@dataclasses.dataclass(frozen=True)
class PartsFolder:
  """A folder of parts, which process 0 alone reads and writes.

  Attributes:
    path: of the folder.
    header: how all of the parts are made: whatever changes a feature.
    keep_images: whether images/00000.png and so on are kept beside the features.
  """

  path: str
  header: Mapping[str, Any]
  keep_images: bool = False

  def finished(self, parts: Sequence[Part]) -> Bool[np.ndarray, " k"]:
    """Return which of the parts are there, on every process the same.

    Raises:
      UserError: one that cannot be read, or was made otherwise; on every process.
    """
    # One process looks, and all hear the same: on a shared disk two could see different states of it, and one would
    # generate while the other waits.
    found = np.zeros(len(parts), np.uint8)

    def look() -> None:
      found[:] = [self._is_finished(part) for part in parts]

    processes.on_first(look)
    return processes.from_first(found).astype(bool)

  def read(self, part: Part) -> Sampled:
    """Return the content of a finished part. Raises UserError: unreadable."""
    content = self._load(part)
    return Sampled(content["features"], content["similarity"])

  def write(
    self,
    part: Part,
    sampled: Sampled,
    images: UInt8[np.ndarray, "n h w 3"],
  ) -> None:
    """Write the images, where they are kept, and then the part. Raises UserError: they cannot be written."""
    with files.writing(f"to --parts={self.path}"):
      # Images first: a part is finished where its features are, and then its images must be there too.
      if self.keep_images:
        (self._folder / "images").mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
          files.write_whole(self._image(part.first + i), image_files.png(Image.fromarray(image)))
      self._folder.mkdir(parents=True, exist_ok=True)
      buffer = io.BytesIO()
      header = json.dumps(self._header(part), sort_keys=True)
      np.savez(
        buffer,
        features=sampled.features,
        similarity=sampled.similarity,
        records=part.records,
        captions=part.captions,
        header=np.asarray(header),
      )
      files.write_whole(self._file(part), buffer.getvalue())

  @property
  def _folder(self) -> epath.Path:
    return buckets.path(self.path)

  def _file(self, part: Part) -> epath.Path:
    return self._folder / f"part-{part.number:05d}.npz"

  def _image(self, place: int) -> epath.Path:
    return self._folder / "images" / f"{place:05d}.png"

  def _header(self, part: Part) -> dict[str, Any]:
    header = {**self.header, "first": part.first, "prompts": list(part.prompts)}
    # Tuples become lists, and keys texts, in a file; compared as they are, equal headers would differ.
    return json.loads(json.dumps(header))  # as it will be read

  def _is_finished(self, part: Part) -> bool:
    if not self._file(part).exists():
      return False
    content = self._load(part)
    there, here = content["header"], self._header(part)
    # Features of another protocol among these would spoil the figure unseen. Nothing is removed for the user, who may
    # have mistyped the folder.
    for name in sorted(there.keys() | here.keys()):
      if there.get(name) != here.get(name):
        raise UserError(
          f"--parts={self.path} is of another protocol: {name} is {_shown(there.get(name))} in {self._file(part).name},"
          f" and {_shown(here.get(name))} now; give another folder"
        )
    if content["features"].shape[0] != len(part):
      raise UserError(f"{self._file(part)} has {len(content['features'])} images, not {len(part)}; remove it")
    # Features without the images that are asked for now: the part is generated again, to the same features.
    return not self.keep_images or all(self._image(part.first + i).exists() for i in range(len(part)))

  def _load(self, part: Part) -> dict[str, Any]:
    path = self._file(part)
    try:
      with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        found = {name: file[name] for name in ("features", "similarity")}
        return {**found, "header": parse_json(str(file["header"]), "its header")}
    except (UserError, *UNREADABLE) as error:
      if may_pass(error):
        raise
      raise UserError(f"cannot read {os.fspath(path)}: {error}; remove it, and it is made again") from error


def _shown(value: Any) -> str:
  text = "absent" if value is None else json.dumps(value)
  return text if len(text) <= 60 else f"{text[:60]}..."
