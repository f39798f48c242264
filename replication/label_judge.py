"""Train a small classifier of labelled images to judge generated images.

It shares neither weights nor layers with the model that it judges. It is not in the paper. It makes errors too, so its
own accuracy on held-out real images is reported with every result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped, UInt8
from PIL import Image

from diffdis_jax.data import records, transforms
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.evals.generation_accuracy import BATCH, SIZE, Examples, Trained, apply, fit

PARTS = 4  # the classifier averages its features over this many parts along each side
PEAK_RATE = 2.5e-3
VIEW = transforms.Augmentation(
  shift=0.08, zoom=0.15, rotation=10.0, brightness=0.2, contrast=0.2, saturation=0.3, hue=0.02
)


class LabelJudge:
  """A judge that names the classes of labelled images, after training on several splits. `GenerationAccuracy` explains
  the settings.

  Raises:
    UserError: a label that is not text, fewer than two classes, or so few images that none or all are held out.
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
    names = {split: text_labels(source, label_field) for split, source in opened.items()}
    classes, self.labels = np.unique(np.concatenate([*names.values()]), return_inverse=True)
    self.classnames = tuple(classes.tolist())
    if len(self.classnames) < 2:
      raise UserError(f"field {label_field!r} names {', '.join(self.classnames)} alone; a judge needs two classes")
    self.asked = np.unique(self.labels[: len(names[split])])
    self._seed, self._epochs = seed, epochs
    # The order depends on the seed alone, so that another call trains the same judge.
    order, count = np.random.default_rng(seed).permutation(len(self.labels)), round(held_out * len(self.labels))
    if not 0 < count < len(order):
      share, size = ("all of them", "smaller") if count else ("none", "larger")
      raise UserError(f"held_out={held_out} of {len(order)} images is {share}; ask for a {size} share")
    self._measured_on, self._trained_on = order[:count], order[count:]
    self._trained: Trained | None = None

  def protocol(self) -> dict[str, Any]:
    """Return the settings of the classifier's training, and its number of images."""
    counts = {"trained_on": len(self._trained_on), "measured_on": len(self._measured_on)}
    return {"splits": list(self._splits), "epochs": self._epochs, **counts}

  def train(self, image_size: int = SIZE) -> Trained:
    """Train the classifier once, on the images that are not held out. It judges generated images of any size."""
    del image_size
    if self._trained is None:
      # The images are read once; every epoch uses new views of them.
      images = [
        records.read_image(base.read(source, i)["image"]).image for source in self.sources for i in range(len(source))
      ]
      of_training, labels = [images[i] for i in self._trained_on], self.labels[self._trained_on]
      how = dict(num_classes=len(self.classnames), epochs=self._epochs, seed=self._seed)
      model = train_on_labels(of_training, labels, **how)
      # Held-out images are judged like generated ones: uncropped, in one view.
      real = np.stack([np.asarray(transforms.resize(images[i], SIZE)) for i in self._measured_on])
      places = ranks(classify(model, real), self.labels[self._measured_on])
      self._trained = Trained(model, _accuracy("judge_", places))
      logging.info(
        "the classifier is right on %.1f %% of held-out real images", 100 * self._trained.accuracy["judge_acc1"]
      )
    return self._trained

  def measure(
    self, images: UInt8[np.ndarray, "n h w 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    """Return acc1 and acc5 of the images, and the judge's own accuracy."""
    trained = self.train(image_size)
    squares = np.stack([base.to_square(image, SIZE) for image in images])
    return {**_accuracy("", ranks(classify(trained.model, squares), classes)), **trained.accuracy}


def ranks(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """Count the classes that are at least as likely as each row's own class; 0 is correct. A NaN counts as likelier."""
  # As in base.ranks, a tie is wrong: a classifier with equal logits for all classes is never right.
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  others = np.arange(logits.shape[1]) != labels[:, None]
  return (others & ~(logits < own)).sum(axis=1)


def _accuracy(prefix: str, places: Int[np.ndarray, " n"]) -> dict[str, float]:
  return {f"{prefix}acc1": float((places == 0).mean()), f"{prefix}acc5": float((places < 5).mean())}


class LabelClassifier(nnx.Module):
  """Five convolutions with BatchNorm, their means over 4 x 4 parts of the image, and one head with dropout."""

  def __init__(self, num_classes: int, *, rngs: nnx.Rngs, widths: Sequence[int] = (32, 64, 64, 128, 128)):
    strides = (2, 1, 1, 2, 1)
    self.convs = nnx.List(
      nnx.Conv(a, b, (3, 3), strides=stride, use_bias=False, rngs=rngs)
      for a, b, stride in zip((3, *widths[:-1]), widths, strides, strict=True)
    )
    self.norms = nnx.List(nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.head = nnx.Linear(PARTS * PARTS * widths[-1], num_classes, rngs=rngs)

  def __call__(self, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b k"]:
    x = image.astype(jnp.float32) / 127.5 - 1.0
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    # A mean over the whole image would lose positions, and many icons differ in nothing else.
    b, h, w, c = x.shape
    parts = x.reshape(b, PARTS, h // PARTS, PARTS, w // PARTS, c).mean((2, 4))
    return self.head(self.dropout(parts.reshape(b, -1)))


def train_on_labels(
  images: Sequence[Image.Image], labels: Int[np.ndarray, " n"], *, num_classes: int, epochs: int, seed: int
) -> LabelClassifier:
  """Train on varied views of the images by AdamW under a one-cycle schedule, which peaks at PEAK_RATE."""
  # The rest of an epoch is dropped, so that only one step is compiled. Few images form a single batch.
  batch_size = min(BATCH, len(images))
  num_steps = epochs * (len(images) // batch_size)
  model = LabelClassifier(num_classes, rngs=nnx.Rngs(seed))

  def loss(model: LabelClassifier, image: Array, label: Int[Array, "b"]) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(image), label).mean()

  def batches() -> Iterator[Examples]:
    for number, rows in enumerate(_epochs(len(images), batch_size, num_steps=num_steps, seed=seed)):
      views = base.decoders().map(lambda i, number=number: _view(images[i], seed=(seed, number, i)), rows.tolist())
      yield Examples(np.stack(list(views)), labels[rows])
      if number % 500 == 0:
        logging.info("training the judge: step %d of %d", number, num_steps)

  # BatchNorm uses the batch's moments in training, and their averages in judging.
  model.train()
  fit(model, optax.adamw(optax.cosine_onecycle_schedule(num_steps, PEAK_RATE), weight_decay=0.01), loss, batches())
  model.eval()
  return model


def _epochs(n: int, batch_size: int, *, num_steps: int, seed: int) -> Iterator[Int[np.ndarray, " b"]]:
  """Yield the rows of each step, in a new random order every epoch. The rest of an epoch is dropped."""
  rng = np.random.default_rng(seed)
  for _ in range(0, num_steps, n // batch_size):
    order = rng.permutation(n)
    yield from order[: n // batch_size * batch_size].reshape(-1, batch_size)


def _view(image: Image.Image, *, seed: Sequence[int]) -> UInt8[np.ndarray, "s s 3"]:
  return transforms.augment(image, np.random.default_rng(seed), size=SIZE, how=VIEW)


def classify(model: LabelClassifier, images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
  """Return the logits of the classes."""
  return apply(lambda model, image: model(image), model, images, batch_size=BATCH)


def text_labels(source: Any, name: str) -> Shaped[np.ndarray, " n"]:
  """Return each record's class name. Raises UserError if one is not text."""
  labels = [base.get_field(base.fields(source, i), name) for i in range(len(source))]
  if not_text := [label for label in labels if not isinstance(label, str)]:
    raise UserError(f"field {name!r} holds {not_text[0]!r}; a label should be a class's name: give another label_field")
  return np.array(labels)
