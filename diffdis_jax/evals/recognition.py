"""Do generated images show what was asked for? A classifier of real, labelled images names them.

`agreement.py` asks the same of rendered shapes, whose judge is all but perfect. Here the judge errs too, so its own
accuracy on real images that it was not trained on stands beside every figure. Most of what it was trained on the
generator was trained on as well; how many generated images are near to copies of that stands there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from diffdis_jax.data import sources, transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError, check_number
from diffdis_jax.evals import base, copies, prompts

JUDGE_SIZE = 32  # pixels: the classifier sees every image at this size
PARTS = 4  # along each side: the classifier takes features' means over so many parts
BATCH = 64
PEAK_RATE = 2.5e-3
VIEW = transforms.Augmentation(
  shift=0.08, zoom=0.15, rotation=10.0, brightness=0.2, contrast=0.2, saturation=0.3, hue=0.02
)


class Classifier(nnx.Module):
  """Five convolutions with BatchNorm, their means over 4 x 4 parts of the image, and one head with dropout.

  It shares nothing with what it judges. A mean over the whole image would lose where things are.
  """

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
    b, h, w, c = x.shape
    parts = x.reshape(b, PARTS, h // PARTS, PARTS, w // PARTS, c).mean((2, 4))
    return self.head(self.dropout(parts.reshape(b, -1)))


def train_classifier(
  images: Sequence[Image.Image], labels: Int[np.ndarray, " n"], *, num_classes: int, epochs: int, seed: int
) -> Classifier:
  """Trains on varied views of the images by AdamW under a one-cycle schedule, which peaks at PEAK_RATE."""
  batch_size = min(BATCH, len(images))
  num_steps = epochs * (len(images) // batch_size)
  model = Classifier(num_classes, rngs=nnx.Rngs(seed))
  schedule = optax.cosine_onecycle_schedule(num_steps, PEAK_RATE)
  optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.01), wrt=nnx.Param)

  @nnx.jit
  def step(model: Classifier, optimizer: nnx.Optimizer, image: Array, label: Int[Array, "b"]) -> None:
    loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(image), label).mean()
    grads = nnx.grad(loss)(model)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
      optimizer.update(model, grads)

  model.train()
  for number, rows in enumerate(_epochs(len(images), batch_size, num_steps=num_steps, seed=seed)):
    views = base.decoders().map(lambda i, number=number: _view(images[i], seed=(seed, number, i)), rows.tolist())
    step(model, optimizer, jnp.asarray(np.stack(list(views))), jnp.asarray(labels[rows]))
    if number % 500 == 0:
      logging.info("training the judge: step %d of %d", number, num_steps)
  model.eval()
  return model


def _epochs(n: int, batch_size: int, *, num_steps: int, seed: int) -> Iterator[Int[np.ndarray, " b"]]:
  """Rows of each step: all in random order, then all anew. What is left of an epoch is left out."""
  rng = np.random.default_rng(seed)
  for _ in range(0, num_steps, n // batch_size):
    order = rng.permutation(n)
    yield from order[: n // batch_size * batch_size].reshape(-1, batch_size)


def _view(image: Image.Image, *, seed: tuple[int, int, int]) -> UInt8[np.ndarray, "s s 3"]:
  return transforms.augment(image, np.random.default_rng(seed), size=JUDGE_SIZE, how=VIEW)


def classify(model: Classifier, images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n k"]:
  """Logits of the classes."""
  apply = nnx.jit(lambda model, image: model(image))
  found = []
  for start in range(0, len(images), BATCH):
    part = images[start : start + BATCH]
    padded = np.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
    found.append(np.asarray(jax.device_get(apply(model, padded)))[: len(part)])
  return np.concatenate(found)


def ranks(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """How many other classes are as likely as each row's own, or likelier; 0 is right. A NaN ranks before all."""
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  others = np.arange(logits.shape[1]) != labels[:, None]
  return (others & ~(logits < own)).sum(axis=1)


class Recognition:
  """The share of generated images whose class a classifier of real images names first, or among its first five.

  Args:
    data: section of a data source, as `data.sources.open_source` takes it. One image or more is generated for each of
      the classes of its split, which should be what the generator was trained on: copies are looked for there.
    splits: of the same data, on whose images the classifier is trained and measured; all of them are held in memory.
    label_field: the record's field with the class's name.
    template: the prompt, `{}` for the name.
    per_class: images generated for each class.
    seed: of the initial noise, the classifier and the held-out images.
    epochs: of the classifier's training.
    held_out: share of the real images that it is measured on instead of trained.

  Raises:
    UserError: a label that is no text, fewer than two classes, or so few images that none are held out.
  """

  task = "generation_recognition"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    splits: Sequence[str] = (),
    label_field: str = "label",
    template: str = "{}",
    per_class: int = 1,
    seed: int = 0,
    epochs: int = 20,
    held_out: float = 0.1,
  ):
    check_number("per_class", per_class, at_least=1)
    check_number("epochs", epochs, at_least=1)
    check_number("held_out", held_out, above=0.0, below=1.0)
    self._template = prompts.resolve_templates((template,))[0]
    self._per_class = per_class
    split = data.get("split", "train")
    self._splits = tuple(dict.fromkeys((split, *splits)))
    opened = {split: sources.open_source(**{**data, "split": split}) for split in self._splits}
    self._sources = tuple(opened.values())
    names = {split: _labels(source, label_field) for split, source in opened.items()}
    self.classnames = tuple(sorted({name for labels in names.values() for name in labels}))
    if len(self.classnames) < 2:
      raise UserError(f"field {label_field!r} names {', '.join(self.classnames)} alone; recognition needs two classes")
    index = {name: i for i, name in enumerate(self.classnames)}
    self._labels = np.array([index[name] for labels in names.values() for name in labels])
    self._drawn = np.array(sorted({index[name] for name in names[split]}))
    self._seed, self._epochs = seed, epochs
    self._trained, self._measured = _divide(len(self._labels), held_out=held_out, seed=seed)
    self._judge: tuple[Classifier, dict[str, float]] | None = None
    self._own: tuple[copies.OwnDistances, dict[str, float]] | None = None

  def protocol(self, inference: Any) -> dict[str, Any]:
    """How `run` measures with this inference."""
    return {
      **inference.generation_protocol,
      "seed": self._seed,
      "num_images": self._per_class * len(self._drawn),
      "num_classes": len(self.classnames),
      "templates": [self._template],
      "judge": {
        "splits": list(self._splits),
        "epochs": self._epochs,
        "trained_on": len(self._trained),
        "measured_on": len(self._measured),
      },
    }

  def get_judge(self) -> tuple[Classifier, dict[str, float]]:
    """The classifier, trained when first asked for, and how often it is right on the real images held out."""
    if self._judge is None:
      images = [base.read_image(source, i) for source in self._sources for i in range(len(source))]
      model = train_classifier(
        [images[i] for i in self._trained],
        self._labels[self._trained],
        num_classes=len(self.classnames),
        epochs=self._epochs,
        seed=self._seed,
      )
      real = np.stack([np.asarray(transforms.resize(images[i], JUDGE_SIZE)) for i in self._measured])
      self._judge = model, _shares("judge", ranks(classify(model, real), self._labels[self._measured]))
      logging.info("the judge names %.1f %% of the real images held out", 100 * self._judge[1]["judge_acc1"])
    return self._judge

  def get_own_distances(self) -> tuple[copies.OwnDistances, dict[str, float]]:
    """Those of the classes' images in the split of `data`, and real_nearer_than_own, the share of the other splits'.

    The latter is what images that were not trained on come to; without other splits there is none.
    """
    if self._own is None:
      every = [np.arange(len(source)) for source in self._sources]
      squares = [base.Images(source, rows, JUDGE_SIZE)[rows] for source, rows in zip(self._sources, every, strict=True)]
      labels, others = np.split(self._labels, [len(squares[0])])
      own = copies.OwnDistances(squares[0], labels, num_classes=len(self.classnames))
      share = own.share_nearer(np.concatenate(squares[1:]), others) if squares[1:] else None
      self._own = own, {} if share is None else {"real_nearer_than_own": share}
    return self._own

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """recognised_acc1 and _acc5 of generated images; judge_acc1 and _acc5 of real ones that it was not trained on.

    Then nearer_than_own: the share of generated images whose nearest image in the split of `data` is nearer than any
    two of their class there are to each other, at JUDGE_SIZE; and the same of real images of the other splits. Each is
    left out where no class has two.
    """
    model, measured = self.get_judge()
    classes = np.tile(self._drawn, self._per_class)
    texts = [prompts.fill(self._template, self.classnames[k]) for k in classes]
    noise = inference.noise(len(classes), self._seed)
    images = inference.generate(params, Tokenizer(inference.max_length)(texts), noise)
    squares = np.stack([base.to_square(image, JUDGE_SIZE) for image in images])
    own, real = self.get_own_distances()
    share = own.share_nearer(squares, classes)
    nearer = {} if share is None else {"nearer_than_own": share}
    return {**_shares("recognised", ranks(classify(model, squares), classes)), **measured, **nearer, **real}


def _divide(n: int, *, held_out: float, seed: int) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
  """Rows to train on and rows to measure on, drawn at random."""
  order, count = np.random.default_rng(seed).permutation(n), round(held_out * n)
  if not count:
    raise UserError(f"held_out={held_out} of {n} images is none; ask for a larger share")
  return order[count:], order[:count]


def _labels(source: Any, field: str) -> list[str]:
  labels = [base.get_field(base.fields(source, i), field) for i in range(len(source))]
  if wrong := [label for label in labels if not isinstance(label, str)]:
    raise UserError(f"field {field!r} holds {wrong[0]!r}; a label should be a class's name: give another label_field")
  return labels


def _shares(name: str, places: Int[np.ndarray, " n"]) -> dict[str, float]:
  return {f"{name}_acc1": float((places == 0).mean()), f"{name}_acc5": float((places < 5).mean())}
