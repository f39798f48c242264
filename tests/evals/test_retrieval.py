from __future__ import annotations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval

from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import tasks as evals

DATA = {"split": "test"}
NAMES = [
  f"{colour} {animal}" for colour in ("red", "grey", "black", "white") for animal in ("fox", "cat", "dog", "owl")
]
SEVERAL = [[f"a {name}", f"one {name}.", f"the {name}, again"][: 1 + i % 3] for i, name in enumerate(NAMES)]


def test_recall_equals_clip_benchmarks(use, fakes):
  use(test=fakes.Source(NAMES, SEVERAL))
  inference = fakes.Inference(NAMES, noise=0.25)
  metrics = evals.create("retrieval", data=DATA, seed=4).run(inference, {})

  class Model:
    def encode_image(self, images):
      return torch.from_numpy(inference.embed_images({}, images.numpy(), seed=4))

    def encode_text(self, tokens):
      return torch.from_numpy(inference.embed_texts({}, tokens.numpy()))

  images = torch.from_numpy(np.stack([record["image"] for record in fakes.Source(NAMES).records]))
  tokenize = lambda texts: torch.from_numpy(Tokenizer(16)(texts))
  expected = zeroshot_retrieval.evaluate(
    Model(), [(images, SEVERAL)], tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
  )
  assert metrics == pytest.approx(expected)
  assert metrics["image_retrieval_recall@1"] < 1


def test_no_recall_at_k_for_k_above_the_number_of_candidates(use, fakes):
  """Such a recall would be 1 for any model; CLIP_benchmark fails there."""
  use(test=fakes.Source(NAMES[:4], [[f"a {name}", f"the {name}"] for name in NAMES[:4]]))
  inference = fakes.Inference(NAMES[:4])
  inference.embed_images = lambda params, images, *, seed: np.full((len(images), 64), np.nan, np.float32)
  metrics = evals.create("retrieval", data=DATA).run(inference, {})
  assert metrics == {
    "image_retrieval_recall@1": 0.0,
    "text_retrieval_recall@1": 0.0,
    "text_retrieval_recall@5": 0.0,
  }


def test_equal_captions_count_as_one_target_if_asked_for(use, fakes):
  labels = ["cat", "dog", "cat", "fox"]
  use(test=fakes.Source(labels))
  inference = fakes.Inference(labels)
  strict = evals.create("retrieval", data=DATA).run(inference, {})
  merged = evals.create("retrieval", data=DATA, duplicate_captions=True).run(inference, {})
  assert strict["text_retrieval_recall@1"] == strict["image_retrieval_recall@1"] == 0.5
  assert merged["text_retrieval_recall@1"] == merged["image_retrieval_recall@1"] == 1


def test_every_caption_of_an_image_counts_unless_a_field_is_named(use, fakes):
  source = fakes.Source(["cat", "dog"], ["a cat", "a dog"])
  for record, captions in zip(source.records, [["a cat", "the cat"], ["a dog", "the dog"]], strict=True):
    record["captions"] = captions
  use(test=source)
  assert evals.create("retrieval", data=DATA).texts == ["a cat", "the cat", "a dog", "the dog"]
  assert evals.create("retrieval", data=DATA, caption_field="captions").texts == [
    "a cat",
    "the cat",
    "a dog",
    "the dog",
  ]
  assert evals.create("retrieval", data=DATA, caption_field="caption").texts == ["a cat", "a dog"]


@pytest.mark.parametrize("caption", ["", [], 3, ["a", 3]])
def test_missing_captions_are_refused(use, fakes, caption):
  use(test=fakes.Source(["cat"], [caption]))
  with pytest.raises(UserError, match="it should be a caption"):
    evals.create("retrieval", data=DATA)
