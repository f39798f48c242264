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

from diffdis_jax.config.section import check_number
from diffdis_jax.data import shapes, transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, classifiers, prompts
from diffdis_jax.evals.classifiers import PAIRS, SIZE, Trained

SEEN = np.array([pair in shapes.SEEN for pair in shapes.PAIRS])


class GenerationAccuracy:
  """Task `generation_accuracy`: the share of generated images that show what was asked for, as a classifier judges.

  Without `data` the images are rendered shapes, and right are those of the colour and the shape asked for. With `data`
  they are of its classes, and right are those whose class is named first, or among the first five. Source: none; it
  stands for FID where there are too few images for that.

  Args:
    data: section of a data source, as `data.sources.open_source` takes it. One image or more is generated for each of
      the classes of its split.
    splits: further splits of the same data, on which the classifier is trained and measured too; all are held
      in memory.
    label_field: the record's field with the class's name.
    template: the prompt, `{}` for the name; by default "a {}" for shapes, only the name for labelled images.
    per_class: images generated for each class; by default 4 for shapes, 1 for labelled images.
    seed: seed of the initial noise, of the classifier and of its held-out images.
    epochs: epochs of the classifier's training on labelled images; by default 20.
    held_out: share of the labelled images held out to measure the classifier; by default 0.1.
    classifier_steps: steps of the classifier's training on shapes; by default 500.
    required_accuracy: accuracy that the classifier must reach on new renders of shapes, or the evaluation stops; by
      default 0.98.

  Raises:
    UserError: a label that is no text, fewer than two classes, so few images that none or all are held out, or settings
      of the other judge.
  """

  task = "generation_accuracy"

  def __init__(
    self,
    *,
    data: Mapping[str, Any] | None = None,
    splits: Sequence[str] | None = None,
    label_field: str | None = None,
    template: str = "",
    per_class: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    held_out: float | None = None,
    classifier_steps: int | None = None,
    required_accuracy: float | None = None,
  ):
    of_labels = _given(splits=splits, label_field=label_field, epochs=epochs, held_out=held_out)
    of_shapes = _given(classifier_steps=classifier_steps, required_accuracy=required_accuracy)
    self.judge = self.make_judge(data, seed, of_labels, of_shapes)
    copies: int = self.judge.per_class if per_class is None else per_class
    check_number("per_class", copies, ge=1)
    self._template = prompts.resolve_templates((template or self.judge.template,))[0]
    self._classes, self._seed = np.tile(self.judge.asked, copies), seed

  def make_judge(
    self, data: Mapping[str, Any] | None, seed: int, of_labels: Mapping[str, Any], of_shapes: Mapping[str, Any]
  ) -> Any:
    """Return the judge of these data. Raises UserError: settings that are the other judge's."""
    # Without this, a forgotten `data` would quietly measure shapes.
    if data is None and of_labels:
      raise UserError(f"{[*of_labels][0]} has no effect where rendered shapes are judged; give data too")
    if data is not None and of_shapes:
      raise UserError(f"{[*of_shapes][0]} has no effect where labelled images are judged; leave it out")
    return ShapeJudge(seed, **of_shapes) if data is None else LabelJudge(data, seed, **of_labels)

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    return {
      **inference.generation_protocol,
      "seed": self._seed,
      "num_images": len(self._classes),
      "num_classes": len(self.judge.classnames),
      "templates": [self._template],
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
    texts = [prompts.fill(self._template, self.judge.classnames[k]) for k in self._classes]
    noise = inference.noise(len(texts), self._seed)
    images = inference.generate(params, Tokenizer(inference.max_length)(texts), noise)
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    found = self.judge.measure(squares, self._classes, image_size=inference.image_size)
    return found | (self._measure_by_head(inference, params, images) if inference.aligned else {})

  def _measure_by_head(
    self, inference: Any, params: Mapping[str, Any], images: UInt8[np.ndarray, "n h w 3"]
  ) -> dict[str, float]:
    """Measure the images by the model's own head, which judges not their truth but whether the model's two sides
    agree."""
    prompts_of_all = [prompts.fill(self._template, name) for name in self.judge.classnames]
    e = base.embed_texts(inference, params, prompts_of_all)
    q = inference.embed_images(params, images, seed=self._seed)
    # Classes of one name are one.
    groups = np.unique(self.judge.classnames, return_inverse=True)[1]
    places = base.ranks(q, e, query_groups=groups[self._classes], key_groups=groups)
    return {
      "head_similarity": float((q * e[self._classes]).sum(axis=1).mean()),
      "head_acc1": float((places == 0).mean()),
    }


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
      accuracy = float(right.mean())
      logging.info("the independent classifier is right on %.2f %% of new renders", 100 * accuracy)
      if accuracy < self._required:
        raise UserError(
          f"the classifier that should judge is right on only {accuracy:.1%} of real renders, below "
          f"{self._required:.0%}; train it for more than {self._steps} steps (classifier_steps)"
        )
      self._trained[image_size] = Trained(model, {"judge_acc1": accuracy})
    return self._trained[image_size]

  def measure(
    self, images: UInt8[np.ndarray, "n s s 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return the accuracy of colour and shape together, of all, seen and unseen pairs; of the colour; of the shape."""
    trained = self.train(image_size)
    colour, shape = (classifiers.pairs_of(trained.model, images) == PAIRS[classes]).T
    both, seen = colour & shape, SEEN[classes]
    right = {"": both, "_seen": both[seen], "_unseen": both[~seen], "_colour": colour, "_shape": shape}
    return {**{f"acc1{which}": float(each.mean()) for which, each in right.items()}, **trained.accuracy}


class LabelJudge:
  """Names labelled images' classes, after training on several splits. Settings and errors as `GenerationAccuracy`."""

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
    check_number("epochs", epochs, ge=1)
    check_number("held_out", held_out, gt=0.0, lt=1.0)
    split = data.get("split", "train")
    self._splits = tuple(dict.fromkeys((split, *splits)))
    opened = {split: base.open_split(data, split) for split in self._splits}
    self.sources = tuple(opened.values())
    names = {split: base.text_labels(source, label_field).tolist() for split, source in opened.items()}
    self.classnames = tuple(sorted({name for labels in names.values() for name in labels}))
    if len(self.classnames) < 2:
      raise UserError(f"field {label_field!r} names {', '.join(self.classnames)} alone; a judge needs two classes")
    index = {name: i for i, name in enumerate(self.classnames)}
    self.labels = np.array([index[name] for labels in names.values() for name in labels])
    self.asked = np.array(sorted({index[name] for name in names[split]}))
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
      model = classifiers.train_on_labels(
        [images[i] for i in self._trained_on],
        self.labels[self._trained_on],
        num_classes=len(self.classnames),
        epochs=self._epochs,
        seed=self._seed,
      )
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


def _given(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}
