from __future__ import annotations

import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.evals import fid


class Source:
  """Gives 1 + i % 5 captions for record i."""

  def __init__(self, n: int):
    self.read, self.n = [], n

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> dict:
    self.read.append(i)
    texts = [f"caption {k} of {i}" for k in range(1 + i % 5)]
    return {"image": b"", "caption": texts[0], **({"captions": texts} if len(texts) > 1 else {})}


def sample(n: int = 40, num_images: int | None = None):
  return fid.sample_prompts(Source(n), num_images=num_images)


def numbers(texts, place: int) -> list[int]:
  """Return the numbers of the captions in their records, or those of the records."""
  return [int(text.split()[place]) for text in texts]


def test_one_caption_each_of_different_records():
  records = numbers(captions := sample(num_images=30), 3)
  assert len({*records}) == 30 and records != sorted(records)
  assert {*numbers(captions, 1)} == {0, 1, 2, 3, 4}


def test_the_first_of_a_sample_are_the_smaller_sample():
  assert sample(num_images=13) == sample(num_images=30)[:13]


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(num_images=1), "num_images is 1[;,]"),
    (dict(n=1), "num_images is 1[;,]"),
    (dict(n=0), "num_images is 0"),
    (dict(num_images=41), "num_images is 41, and there are captions for 40"),
  ],
)
def test_what_cannot_be_sampled(how, message):
  with pytest.raises(UserError, match=message):
    sample(**how)
