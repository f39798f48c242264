"""Measure whether generated images of rendered shapes show what was asked for, as a small classifier names them.

A classifier errs too, so its own accuracy on real images stands beside every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from diffdis_jax.config.section import field, number
from diffdis_jax.data import shapes
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, classifiers, prompts
from diffdis_jax.evals.classifiers import PAIRS, SIZE, Trained

SEEN = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])
OF_SHAPES = ("classifier_steps", "required_accuracy")  # settings of the classifier


@base.settings()
class GenerationAccuracy(base.Evaluation):
  """Task `generation_accuracy`: the share of generated images that show what was asked for, as a classifier judges.

  The images are of rendered shapes, and right are those of the colour and the shape asked for. Source: none; it stands
  for FID where there are too few images for that.
  """

  task = "generation_accuracy"

  template: str = field("", help="the prompt, {} for the name; by default 'a {}'")
  per_class: int | None = number(None, ge=1, help="images generated for each class; by default 4")
  classifier_steps: int | None = number(None, ge=1, help="steps of the classifier; by default 500")
  required_accuracy: float | None = field(
    None, help="accuracy that the classifier must reach on new renders; by default 0.98"
  )

  def open(self) -> None:
    self.named_by = self.make_judge()
    copies: int = self.named_by.per_class if self.per_class is None else self.per_class
    self.prompt = prompts.resolve_templates((self.template or self.named_by.template,))[0]
    self.classes = np.tile(self.named_by.asked, copies)

  def make_judge(self) -> Any:
    """Return what judges the images."""
    return ShapeJudge(self.seed, **self.given(OF_SHAPES))

  def given(self, names: Sequence[str]) -> dict[str, Any]:
    """Return those of these settings that are given."""
    return {name: value for name in names if (value := getattr(self, name)) is not None}

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.generation_protocol,
      "seed": self.seed,
      "num_images": len(self.classes),
      "num_classes": len(self.named_by.classnames),
      "templates": [self.prompt],
      "judge": self.named_by.protocol(),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1 of generated images, and judge_acc1 of real ones that the judge was not trained on.

    Also acc1_seen and acc1_unseen, of pairs that training saw and of others, and acc1_colour and acc1_shape.

    Of a run with a head also head_similarity, ⟨ê_0, e⟩ of image and prompt, and head_acc1, the share that its own head
    takes for what was asked for among all classes.
    """
    # Before anything is generated, which takes longer: a classifier that is no judge ends it.
    self.named_by.train(inference.image_size)
    texts = [prompts.fill(self.prompt, name) for name in self.named_by.classnames]
    tokens = Tokenizer(inference.max_length)([texts[k] for k in self.classes])
    images = inference.generate(params, tokens, inference.noise(len(tokens), self.seed))
    metrics = self.named_by.measure(images, self.classes, image_size=inference.image_size)
    return metrics | (self.judge_by_head(inference, params, images, texts) if inference.aligned else {})

  def judge_by_head(
    self, inference: Any, params: Mapping[str, Any], images: UInt8[np.ndarray, "n h w 3"], texts: Sequence[str]
  ) -> dict[str, float]:
    """Measure by the model's own head, which judges not the images' truth but whether the model's two sides agree."""
    e = base.embed_texts(inference, params, texts)
    q = inference.embed_images(params, images, seed=self.seed)
    groups = np.unique(texts, return_inverse=True)[1]  # classes of one name are one
    places = base.ranks(q, e, query_groups=groups[self.classes], key_groups=groups)
    similarity = float((q * e[self.classes]).sum(axis=1).mean())
    return {"head_similarity": similarity, "head_acc1": float((places == 0).mean())}


class ShapeJudge:
  """Names colour and shape of rendered shapes, after training on renders. Settings as `GenerationAccuracy` has them."""

  classnames, template, per_class = tuple(shapes.CLASSNAMES), "a {}", 4

  def __init__(self, seed: int, *, classifier_steps: int = 500, required_accuracy: float = 0.98):
    self.asked = np.arange(len(PAIRS))
    self._seed, self._steps, self._required = seed, classifier_steps, required_accuracy
    self._trained: dict[int, Trained] = {}

  def protocol(self) -> dict[str, Any]:
    """Return how the classifier is trained."""
    return {"steps": self._steps}

  def train(self, image_size: int) -> Trained:
    """Train the classifier for generated images of this size, once. Raises UserError: its accuracy is below what is
    required."""
    if image_size not in self._trained:
      # Renders are made at the generator's size and shrunk as its images are, so that they are as sharp or as blurred.
      model = classifiers.train_on_shapes(image_size=image_size, seed=self._seed, num_steps=self._steps)
      fresh = classifiers.render(image_size=image_size, num_images=2048, seed=self._seed + 1)
      right = (classifiers.pairs_of(model, fresh) == PAIRS[np.arange(len(fresh)) % len(PAIRS)]).all(axis=-1)
      self._trained[image_size] = Trained(model, {"judge_acc1": float(right.mean())})
      require(self._trained[image_size], self._required, self._steps)
    return self._trained[image_size]

  def measure(
    self, images: UInt8[np.ndarray, "n h w 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return the accuracy of colour and shape together, of all, seen and unseen pairs; of the colour; of the shape."""
    trained = self.train(image_size)
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    colour, shape = (classifiers.pairs_of(trained.model, squares) == PAIRS[classes]).T
    pair, seen = colour & shape, SEEN[classes]
    right = {"": pair, "_seen": pair[seen], "_unseen": pair[~seen], "_colour": colour, "_shape": shape}
    return {**{f"acc1{which}": float(each.mean()) for which, each in right.items()}, **trained.accuracy}


def require(trained: Trained, least: float, steps: int) -> None:
  """Check that a classifier of renders can judge. Raises UserError: its accuracy is below `least`."""
  accuracy = trained.accuracy["judge_acc1"]
  logging.info("the independent classifier is right on %.2f %% of new renders", 100 * accuracy)
  if accuracy < least:
    raise UserError(
      f"the classifier that should judge is right on only {accuracy:.1%} of real renders, below {least:.0%}; train it"
      f" for more than {steps} steps (classifier_steps)"
    )
