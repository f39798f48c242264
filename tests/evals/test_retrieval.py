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


def recall_as_clip_benchmark(texts, images, text_image, k):
  """The positive pair matrix, and the share of rows with a positive among the k highest."""
  scores = texts.astype(np.float64) @ images.astype(np.float64).T
  positive = np.zeros_like(scores, bool)
  positive[np.arange(len(scores)), text_image] = True
  ways = {}
  for way, s, p in (("image", scores, positive), ("text", scores.T, positive.T)):
    ways[way] = np.mean([p[i, np.argsort(-s[i])[:k]].any() for i in range(len(s))])
  return ways


def test_recall_by_definition(use, fakes):
  use(test=fakes.Source(NAMES, SEVERAL))
  inference = fakes.Inference(NAMES, noise=0.25)
  metrics = evals.create("retrieval", data=DATA, seed=4).run(inference, {})
  flat = [text for texts in SEVERAL for text in texts]
  text_image = [i for i, texts in enumerate(SEVERAL) for _ in texts]
  texts = inference.embed_texts({}, Tokenizer(16)(flat))
  shown = np.stack([record["image"] for record in fakes.Source(NAMES).records])
  images = inference.embed_images({}, shown, seed=4)
  for k in (1, 5, 10):
    for way, expected in recall_as_clip_benchmark(texts, images, text_image, k).items():
      assert metrics[f"{way}_retrieval_recall@{k}"] == pytest.approx(expected)
  assert 0.2 < metrics["text_retrieval_recall@1"] < metrics["text_retrieval_recall@5"]


def test_recall_as_clip_benchmark_computes_it(use, fakes):
  use(test=fakes.Source(NAMES, SEVERAL))
  inference = fakes.Inference(NAMES, noise=0.25)
  metrics = evals.create("retrieval", data=DATA, seed=4).run(inference, {})

  class Model:
    def encode_image(self, images):
      return torch.from_numpy(inference.embed_images({}, images.numpy(), seed=4))

    def encode_text(self, tokens):
      return torch.from_numpy(inference.embed_texts({}, tokens.numpy()))

  shown = torch.from_numpy(np.stack([record["image"] for record in fakes.Source(NAMES).records]))
  tokenize = lambda texts: torch.from_numpy(Tokenizer(16)(texts))
  expected = zeroshot_retrieval.evaluate(
    Model(), [(shown, SEVERAL)], tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
  )
  assert metrics == pytest.approx(expected)
  assert metrics["image_retrieval_recall@1"] < 1


def test_no_recall_among_more_than_there_are(use, fakes):
  """It would be 1 of any model; CLIP_benchmark fails there."""
  use(test=fakes.Source(NAMES[:4], [[f"a {name}", f"the {name}"] for name in NAMES[:4]]))
  inference = fakes.Inference(NAMES[:4])
  inference.embed_images = lambda params, images, *, seed: np.full((len(images), 64), np.nan, np.float32)
  metrics = evals.create("retrieval", data=DATA).run(inference, {})
  assert metrics == {
    "image_retrieval_recall@1": 0.0,
    "text_retrieval_recall@1": 0.0,
    "text_retrieval_recall@5": 0.0,
  }


def test_captions_that_are_longer_than_the_network_reads_are_named(use, fakes, caplog):
  long = " ".join(["cat"] * 14)
  use(test=fakes.Source(["cat", "dog"], [f"{long} red", f"{long} grey"]))
  evals.create("retrieval", data=DATA).run(fakes.Inference(["cat", "dog"]), {})
  found = [message for message in caplog.messages if "tokens" in message]
  assert found == [f"this run reads 14 tokens: of {f'{long} {word}'!r} it sees {long!r}" for word in ("red", "grey")]


def test_leak_test_passes_an_honest_model_and_catches_a_cheat(use, fakes):
  names = [f"{a} {b}" for a in "abcdefgh" for b in "stuvwxyz"]
  use(test=fakes.Source(names))
  shuffled = evals.create("retrieval", data=DATA, shuffle_labels=True)
  honest = shuffled.run(fakes.Inference(names), {})
  assert evals.create("retrieval", data=DATA).run(fakes.Inference(names), {})["text_retrieval_recall@1"] == 1
  assert honest["text_retrieval_recall@1"] < 0.1 and honest["image_retrieval_recall@1"] < 0.1
  assert shuffled.run(fakes.Cheat(names, names), {})["text_retrieval_recall@1"] == 1


def test_equal_captions_are_one_target_on_request(use, fakes):
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
def test_missing_captions(use, fakes, caption):
  use(test=fakes.Source(["cat"], [caption]))
  with pytest.raises(UserError, match="it should be a caption"):
    evals.create("retrieval", data=DATA)
