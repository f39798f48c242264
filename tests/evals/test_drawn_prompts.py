from __future__ import annotations

import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.evals import drawn_prompts


class Source:
  """Record i has 1 + i % 5 captions."""

  def __init__(self, n: int):
    self.read, self.n = [], n

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> dict:
    self.read.append(i)
    texts = [f"caption {k} of {i}" for k in range(1 + i % 5)]
    return {"image": b"", "caption": texts[0], **({"captions": texts} if len(texts) > 1 else {})}


def draw(n: int = 40, num_images: int | None = None, captions: str = "per_image", seed: int = 0):
  return drawn_prompts.draw(Source(n), num_images=num_images, captions=captions, seed=seed)


def texts(parts) -> list[str]:
  return [text for part in parts for text in part.prompts]


def test_one_caption_each_of_different_records(monkeypatch):
  monkeypatch.setattr(drawn_prompts, "PART", 8)
  parts = draw(num_images=30)
  assert [len(part) for part in parts] == [8, 8, 8, 6]
  assert [(part.number, part.first) for part in parts] == [(0, 0), (1, 8), (2, 16), (3, 24)]
  records, captions = drawn_prompts.records(parts), np.concatenate([part.captions for part in parts])
  assert len(set(records.tolist())) == 30 and records.dtype == np.int32
  assert texts(parts) == [f"caption {k} of {i}" for i, k in zip(records, captions)]
  assert list(records) != sorted(records) and set(captions.tolist()) == {0, 1, 2, 3, 4}


def test_every_caption_of_a_record_is_as_likely():
  parts = draw(5000)
  records, captions = drawn_prompts.records(parts), np.concatenate([part.captions for part in parts])
  for k in range(5):
    np.testing.assert_allclose((captions[records % 5 == 4] == k).mean(), 0.2, atol=0.05)


@pytest.mark.parametrize("captions", drawn_prompts.CAPTIONS)
def test_the_first_of_a_draw_are_the_smaller_draw(captions):
  assert texts(draw(num_images=13, captions=captions)) == texts(draw(num_images=30, captions=captions))[:13]
  assert texts(draw(captions=captions)) != texts(draw(captions=captions, seed=1))
  assert drawn_prompts.sha256(draw(captions=captions)) != drawn_prompts.sha256(draw(captions=captions, seed=1))


def test_all_captions_alike():
  parts = draw(captions="all")
  assert len(texts(parts)) == 40 * 3 == len(set(texts(parts)))
  records = drawn_prompts.records(draw(num_images=40, captions="all"))
  assert len(set(records.tolist())) < 40


def test_no_more_is_read_than_is_drawn():
  source = Source(1000)
  drawn_prompts.draw(source, num_images=7, captions="per_image", seed=0)
  assert len(source.read) == 7


def test_the_usual_count(monkeypatch):
  monkeypatch.setattr(drawn_prompts, "MOST", 25)
  assert len(texts(draw())) == 25 and len(texts(draw(20))) == 20


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(num_images=1), "num_images is 1; FID takes at least 2"),
    (dict(n=1), "num_images is 1; FID takes at least 2"),
    (dict(n=0), "num_images is 0"),
    (dict(num_images=41), "num_images is 41, but there are captions for 40"),
    (dict(seed=-1), "prompts_seed is -1; it must be at least 0"),
    (dict(captions="some"), "captions is 'some'; it must be one of per_image, all"),
  ],
)
def test_what_cannot_be_drawn(how, message):
  with pytest.raises(UserError, match=message):
    draw(**how)


@pytest.mark.parametrize("captions", drawn_prompts.CAPTIONS)
def test_no_image_is_read_for_its_caption(captions):
  class Described(Source):
    def fields(self, i: int) -> dict:
      return super().__getitem__(i)

    def __getitem__(self, i: int) -> dict:
      raise AssertionError("an image was read")

  found = drawn_prompts.draw(Described(40), num_images=None, captions=captions, seed=0)
  assert texts(found) == texts(draw(captions=captions))
