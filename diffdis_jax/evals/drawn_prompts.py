"""Sample, by a seed and in parts, the captions of a data set for which images are generated."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.config.section import check_choice, check_number
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts

PART = 500  # images of a part
MOST = 30_000  # images, where it is not said how many
CAPTIONS = ("per_image", "all")


@dataclasses.dataclass(frozen=True)
class Part:
  """Some of the images to generate.

  Attributes:
    number: from 0.
    first: place of its first image among all.
    records, captions: of each image's prompt, the record of the data and which of its captions.
    prompts: the texts.
  """

  number: int
  first: int
  records: Int[np.ndarray, " n"]
  captions: Int[np.ndarray, " n"]
  prompts: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.prompts)


def draw(source: Any, *, num_images: int | None, captions: str, seed: int) -> list[Part]:
  """Sample prompts out of a source's captions, in the order in which their images are generated.

  The first n of a sample are the sample of n. (Count and rule are not stated by the paper.)

  Args:
    source: records with captions.
    num_images: how many; None for MOST, or fewer where there are not so many.
    captions: "per_image", that of different records, one caption of each; or "all", of all captions alike, so that two
      images may have a record in common.
    seed: of the sample.

  Raises:
    UserError: fewer than two images, or more than there are.
  """
  check_choice("captions", captions, CAPTIONS)
  check_number("prompts_seed", seed, ge=0)
  rng = np.random.default_rng(seed)
  if captions == "per_image":
    # All places and captions are sampled before any is dropped, so that fewer images are the first of more.
    order, which = rng.permutation(len(source)), rng.random(len(source))
    found = []
    for i, u in list(zip(order.tolist(), which))[: _count(len(source), num_images)]:
      texts = base.captions(base.fields(source, i))
      found.append(_Prompt(i, int(u * len(texts)), texts[int(u * len(texts))]))
  else:
    # Each caption is as likely as any other, so that a record with more of them comes up more often.
    texts = (base.captions(base.fields(source, i)) for i in range(len(source)))
    every = [_Prompt(i, k, text) for i, several in enumerate(texts) for k, text in enumerate(several)]
    found = [every[i] for i in rng.permutation(len(every))[: _count(len(every), num_images)]]
  return [
    Part(
      # A part is the unit of what is kept: a killed command loses at most this many images.
      number=start // PART,
      first=start,
      records=np.array([each.record for each in found[start : start + PART]], np.int32),
      captions=np.array([each.caption for each in found[start : start + PART]], np.int32),
      prompts=tuple(each.text for each in found[start : start + PART]),
    )
    for start in range(0, len(found), PART)
  ]


def check_count(num_images: int) -> None:
  """Refuse fewer than two images. Raises UserError for them."""
  if num_images < 2:
    raise UserError(f"num_images is {num_images}; FID takes at least 2 images, and means something from thousands on")


def sha256(parts: list[Part]) -> str:
  """Return the hash of all the prompts' texts."""
  return prompts.sha256([text for part in parts for text in part.prompts])


def records(parts: list[Part]) -> Int[np.ndarray, " n"]:
  """Return the records of all the prompts, in order."""
  return np.concatenate([part.records for part in parts])


@dataclasses.dataclass(frozen=True)
class _Prompt:
  """A prompt's text, its record, and which of the record's captions it is."""

  record: int
  caption: int
  text: str


def _count(available: int, num_images: int | None) -> int:
  count = min(available, MOST) if num_images is None else num_images
  check_count(count)
  if count > available:
    raise UserError(f"num_images is {count}, but there are captions for {available}; ask for fewer")
  return count
