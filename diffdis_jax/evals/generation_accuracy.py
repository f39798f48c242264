"""Measure whether generated images show what was asked for. A classifier of real images, the judge, names them.

The judge of rendered shapes is all but perfect. That of labelled images errs too, so its own accuracy on real images
that it was not trained on stands beside every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int, UInt8

from diffdis_jax.config.section import field, number
from diffdis_jax.data import shapes, transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, classifiers, prompts
from diffdis_jax.evals.classifiers import PAIRS, SIZE, Trained

SEEN = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])
OF_LABELS = ("splits", "label_field", "epochs", "held_out")  # settings of the judge of labelled images
OF_SHAPES = ("classifier_steps", "required_accuracy")


@base.settings()
class GenerationAccuracy(base.Evaluation):
  """Task `generation_accuracy`: the share of generated images that show what was asked for, as a classifier judges.

  Without `data` the images are rendered shapes, and right are those of the colour and the shape asked for. With `data`
  they are of its classes, and right are those whose class is named first, or among the first five. Source: none; it
  stands for FID where there are too few images for that.
  """

  task = "generation_accuracy"

  data: Mapping[str, Any] | None = field(None, help="section of a data source")
  template: str = field("", help="the prompt, {} for the name; by default 'a {}' for shapes, only the name for labels")
  per_class: int | None = number(
    None, ge=1, help="images generated for each class; by default 4 for shapes, 1 for labelled images"
  )
  splits: Sequence[str] | None = field(
    None, help="further splits of the same data, on which the classifier is trained and measured too"
  )
  label_field: str | None = field(None, help="record's field with the class's name; by default label")
  epochs: int | None = number(None, ge=1, help="epochs of the classifier on labelled images; by default 20")
  held_out: float | None = number(
    None, gt=0.0, lt=1.0, help="share of the labelled images held out to measure the classifier; by default 0.1"
  )
  classifier_steps: int | None = number(None, ge=1, help="steps of the classifier on shapes; by default 500")
  required_accuracy: float | None = field(
    None, help="accuracy that the classifier must reach on new renders of shapes; by default 0.98"
  )

  def open(self) -> None:
    self.judge = self.make_judge()
    copies: int = self.judge.per_class if self.per_class is None else self.per_class
    self.prompt = prompts.resolve_templates((self.template or self.judge.template,))[0]
    self.classes = np.tile(self.judge.asked, copies)

  def make_judge(self) -> Any:
    """Return the judge of these data. Raises UserError: settings that are the other judge's."""
    if self.data is None:
      # Without this, a forgotten `data` would quietly measure shapes.
      self.refuse(OF_LABELS, "rendered shapes are judged; give data too")
      return ShapeJudge(self.seed, **self.given(OF_SHAPES))
    self.refuse(OF_SHAPES, "labelled images are judged; leave it out")
    return LabelJudge(self.data, self.seed, **self.given(OF_LABELS))

  def given(self, names: Sequence[str]) -> dict[str, Any]:
    """Return those of these settings that are given."""
    return {name: value for name in names if (value := getattr(self, name)) is not None}

  def refuse(self, names: Sequence[str], where: str) -> None:
    """Raise UserError where one of these settings is given, which has no effect `where`."""
    for name in self.given(names):
      raise UserError(f"{name} has no effect where {where}")

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.generation_protocol,
      "seed": self.seed,
      "num_images": len(self.classes),
      "num_classes": len(self.judge.classnames),
      "templates": [self.prompt],
      "judge": self.judge.protocol(),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1 of generated images, and judge_acc1 of real ones that the judge was not trained on.

    Of shapes also acc1_seen and acc1_unseen, of pairs that training saw and of others, and acc1_colour and acc1_shape.
    Of labelled images also acc5 and judge_acc5.

    Of a run with a head also head_similarity, ⟨ê_0, e⟩ of image and prompt, and head_acc1, the share that its own head
    takes for what was asked for among all classes.
    """
    # Before anything is generated, which takes longer: a classifier that is no judge ends it.
    self.judge.train(inference.image_size)
    texts = [prompts.fill(self.prompt, name) for name in self.judge.classnames]
    tokens = Tokenizer(inference.max_length)([texts[k] for k in self.classes])
    images = inference.generate(params, tokens, inference.noise(len(tokens), self.seed))
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    metrics = self.judge.measure(squares, self.classes, image_size=inference.image_size)
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
    self, images: UInt8[np.ndarray, "n s s 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return the accuracy of colour and shape together, of all, seen and unseen pairs; of the colour; of the shape."""
    trained = self.train(image_size)
    colour, shape = (classifiers.pairs_of(trained.model, images) == PAIRS[classes]).T
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


class LabelJudge:
  """Names labelled images' classes, after training on several splits. Settings as `GenerationAccuracy` has them.

  Raises:
    UserError: a label that is no text, fewer than two classes, or so few images that none or all are held out.
  """

  template, per_class = "{}", 1

  def __init__(
    self,
    data: Mapping[str, Any],
    seed: int,
    *,
    splits: Sequence[str] = (),
    label_field: str = "label",
    epochs: int = 20,
    held_out: float = 0.1,
  ):
    split = data.get("split", "train")
    self._splits = tuple(dict.fromkeys((split, *splits)))
    opened = {split: base.open_split(data, split) for split in self._splits}
    self.sources = tuple(opened.values())
    names = {split: base.text_labels(source, label_field) for split, source in opened.items()}
    classes, self.labels = np.unique(np.concatenate([*names.values()]), return_inverse=True)
    self.classnames = tuple(classes.tolist())
    if len(self.classnames) < 2:
      raise UserError(f"field {label_field!r} names {', '.join(self.classnames)} alone; a judge needs two classes")
    self.asked = np.unique(self.labels[: len(names[split])])
    self._seed, self._epochs = seed, epochs
    # The order is of the seed alone, so that the judge of another call is the same one.
    order, count = np.random.default_rng(seed).permutation(len(self.labels)), round(held_out * len(self.labels))
    if not 0 < count < len(order):
      share, size = ("all of them", "smaller") if count else ("none", "larger")
      raise UserError(f"held_out={held_out} of {len(order)} images is {share}; ask for a {size} share")
    self._measured_on, self._trained_on = order[:count], order[count:]
    self._trained: Trained | None = None

  def protocol(self) -> dict[str, Any]:
    """Return how the classifier is trained, and on how many images."""
    counts = {"trained_on": len(self._trained_on), "measured_on": len(self._measured_on)}
    return {"splits": list(self._splits), "epochs": self._epochs, **counts}

  def train(self, image_size: int = SIZE) -> Trained:
    """Train the classifier for generated images of any size, once, on the images that are not held out."""
    del image_size
    if self._trained is None:
      # Read once and kept as they are: every epoch takes other views of them.
      images = [base.read_image(source, i) for source in self.sources for i in range(len(source))]
      of_training, labels = [images[i] for i in self._trained_on], self.labels[self._trained_on]
      how = dict(num_classes=len(self.classnames), epochs=self._epochs, seed=self._seed)
      model = classifiers.train_on_labels(of_training, labels, **how)
      # Held-out images are judged as generated ones are: as a whole, in one view.
      real = np.stack([np.asarray(transforms.resize(images[i], SIZE)) for i in self._measured_on])
      places = ranks(classifiers.classify(model, real), self.labels[self._measured_on])
      self._trained = Trained(model, _accuracy("judge_", places))
      logging.info(
        "the classifier is right on %.1f %% of held-out real images", 100 * self._trained.accuracy["judge_acc1"]
      )
    return self._trained

  def measure(
    self, images: UInt8[np.ndarray, "n s s 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return acc1 and acc5, and the judge's own."""
    trained = self.train(image_size)
    return {**_accuracy("", ranks(classifiers.classify(trained.model, images), classes)), **trained.accuracy}


def ranks(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Count the other classes that are as likely as each row's own, or likelier; 0 is right. A NaN ranks before all."""
  # As in base.ranks a tie is wrong, so that a classifier that says the same of all is right on none.
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  others = np.arange(logits.shape[1]) != labels[:, None]
  return (others & ~(logits < own)).sum(axis=1)


def _accuracy(prefix: str, places: Int[np.ndarray, " n"]) -> dict[str, float]:
  return {f"{prefix}acc1": float((places == 0).mean()), f"{prefix}acc5": float((places < 5).mean())}
