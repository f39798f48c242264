"""A linear classifier on frozen features, of all training images and of a few a class: what a representation holds.

After CLIP (Radford et al., 2021): logistic regression by L-BFGS, its regularisation chosen on images that are neither
trained on nor tested.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.config.section import field, number
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.method import encode
from diffdis_jax.method.network import Network

ALL = "all"
L2 = tuple(10.0**power for power in range(1, -7, -1))  # strongest first, from which the next one starts
MOST_STEPS = 1000  # of L-BFGS, as CLIP has it
SMALL_GRADIENT = 1e-7  # at which L-BFGS ends
HELD_OUT = 0.2  # of the training images, on which the regularisation is chosen


@dataclasses.dataclass(frozen=True)
class Examples:
  """Features, or places of images, and the numbers of their classes."""

  x: np.ndarray
  labels: Int[np.ndarray, " n"]

  def take(self, rows: Int[np.ndarray, " m"]) -> Examples:
    return Examples(self.x[rows], self.labels[rows])


@base.settings()
class LinearProbe(base.Evaluation):
  """Task `linear_probe`: top-1 of logistic regression on an image's denoised query, and on the UNet's middle map.

  The middle map is that of the UNet without its text stream, of the clean image under the empty caption, and its mean
  over positions is taken. CLIP has its embedding alone, and what has no trained head the middle map alone. The split of
  `data` is tested on, without images of classes that are not trained on.
  """

  task = "linear_probe"

  data: Mapping[str, Any] = field(help="section of a data source")
  train_split: str = field("train", help="split of the same data that is trained on")
  label_field: str = field("label", help="record's field with the class")
  shots: Sequence[str] = field(("1", "2", "4", "8", "16", ALL), help="training images of each class, or all of them")
  timestep: int | None = number(
    None, ge=0, le=NUM_TIMESTEPS, help="timestep of the middle map; by default that of the run's head, or else 0"
  )
  num_images: int | None = field(None, help="images to test on, the same ones each time; by default all")

  def open(self) -> None:
    self.counts = tuple(_read_shots(text) for text in self.shots)
    test_split = self.data.get("split", "train")
    if test_split == self.train_split:
      raise UserError(f"linear_probe would test on the split {test_split}, on which it trains; give another")
    train, test = (base.open_split(self.data, split) for split in (self.train_split, test_split))
    self.sources = {"train": train, "val": train, "test": test}
    rows = {"test": base.subset(len(test), self.num_images)}
    order = np.random.default_rng(self.seed).permutation(base.subset(len(train), None))
    rows["val"], rows["train"] = np.split(order, [round(HELD_OUT * len(order))])
    label = lambda name, i: str(base.get_field(base.fields(self.sources[name], i), self.label_field))
    names = {name: np.array([label(name, i) for i in places]) for name, places in rows.items()}
    # Of few images a class, chance may hold out all of one, which the test would then lack.
    lost = np.setdiff1d(names["val"], names["train"])
    back = np.array([np.flatnonzero(names["val"] == name)[0] for name in lost], int)
    for of in (rows, names):
      of["train"], of["val"] = np.append(of["train"], of["val"][back]), np.delete(of["val"], back)
    self.classes = np.unique(names["train"]).tolist()
    # What is not trained on has no answer that could be right.
    known = {name: np.isin(labels, self.classes) for name, labels in names.items()}
    if len(self.classes) < 2 or not all(which.any() for which in known.values()):
      raise UserError(
        f"linear_probe needs two classes in {self.train_split}, and images of them to train, val and test on"
      )
    self.examples = {
      name: Examples(rows[name][known[name]], np.searchsorted(self.classes, names[name][known[name]])) for name in rows
    }
    if (left_out := names["test"][~known["test"]]).size:
      others = ", ".join(map(repr, np.unique(left_out).tolist()[:5]))
      what = f"{left_out.size} of {len(names['test'])} images to test on"
      logging.warning("linear_probe: %s are left out, of classes that are not trained on, such as %s", what, others)

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **inference.protocol,
      "seed": self.seed,
      "num_images": len(self.examples["test"].labels),
      "num_classes": len(self.classes),
      "shots": [ALL if k is None else k for k in self.counts],
      "timestep": self._middle_timestep(inference),
      "l2": list(L2),
      "train_split": self.train_split,
      **{f"num_{name}_images": len(examples.labels) for name, examples in self.examples.items()},
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return, for each kind of features and number of shots, acc1_embedding_4_shots and so on, and the l2 that was
    chosen."""
    metrics = {}
    for kind, features in self._features(inference, params).items():
      for k in self.counts:
        name = f"{kind}_all" if k is None else f"{kind}_{k}_shots"
        metrics |= {f"{what}_{name}": value for what, value in self._measure(features, k).items()}
        logging.info("linear probe, %s: %.4f", name, metrics[f"acc1_{name}"])
    return metrics

  def _measure(self, features: Mapping[str, Examples], shots: int | None) -> dict[str, float]:
    train = features["train"]
    if shots is not None:
      train = train.take(base.first_of_each(train.labels, shots, seed=self.seed))
    # Shifted and scaled as a whole: so one list of l2 fits features of any length.
    mean, spread = train.x.mean(axis=0), float(train.x.std()) + 1e-12
    scaled = {name: Examples((examples.x - mean) / spread, examples.labels) for name, examples in features.items()}
    scaled["train"] = Examples((train.x - mean) / spread, train.labels)
    model, best, chosen, l2 = None, -1.0, None, L2[0]
    for strength in L2:
      model = fit(scaled["train"], num_classes=len(self.classes), l2=strength, start=model)
      accuracy = model.accuracy(scaled["val"])
      if accuracy > best:  # of equally good ones the strongest
        best, chosen, l2 = accuracy, model, strength
    assert chosen is not None
    # The test images are read once, by the classifier that was chosen.
    return {"acc1": chosen.accuracy(scaled["test"]), "l2": l2}

  def _features(self, inference: Any, params: Mapping[str, Any]) -> dict[str, dict[str, Examples]]:
    """Return the features of each kind and of each split."""
    features: dict[str, dict[str, Examples]] = {}
    for name, examples in self.examples.items():
      images = base.Images(self.sources[name], examples.x, inference.image_size)
      if inference.aligned:
        x = inference.embed_images(params, images, seed=self.seed)
        features.setdefault("embedding", {})[name] = Examples(x, examples.labels)
      if not inference.network.is_clip:
        t = self._middle_timestep(inference)
        program = functools.partial(middle_map, inference.network, t)
        x = inference.over_rows(f"middle maps, t = {t}", program, params, images)
        features.setdefault("middle", {})[name] = Examples(x, examples.labels)
    return features

  def _middle_timestep(self, inference: Any) -> Any:
    if inference.network.is_clip:
      return None
    by_default = inference.network.condition_timestep if inference.aligned else 0
    return by_default if self.timestep is None else self.timestep


def middle_map(network: Network, t: int, model: Any, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b d"]:
  """Return the mean over positions of the UNet's middle map of clean images at timestep t, under the empty caption."""
  z, c_null = model.encode_image(images), encode.null_condition(model, network.max_length)
  c = jnp.broadcast_to(c_null, (len(z), *c_null.shape[1:]))
  return model.unet.down_and_middle(z, jnp.full(len(z), t, jnp.int32), c).h.mean(axis=(1, 2)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
  """Logits x W + b."""

  weight: Float[np.ndarray, "d k"]
  bias: Float[np.ndarray, " k"]

  def accuracy(self, examples: Examples) -> float:
    """Return the share whose class has the largest logit. A tie is wrong, as everywhere."""
    logits = examples.x @ self.weight + self.bias
    own = np.take_along_axis(logits, examples.labels[:, None], axis=1)
    return float(((logits >= own).sum(axis=1) == 1).mean())


def fit(examples: Examples, *, num_classes: int, l2: float, start: Linear | None = None) -> Linear:
  """Minimise mean cross-entropy + l2 / 2 ‖W‖² by L-BFGS; the bias is free.

  Args:
    start: from which it begins; None for zeros. The minimum is one, and does not depend on it.
  """
  if start is None:
    start = Linear(np.zeros((examples.x.shape[1], num_classes), np.float32), np.zeros(num_classes, np.float32))
  x, labels = jnp.asarray(examples.x, jnp.float32), jnp.asarray(examples.labels)
  begin = jnp.asarray(start.weight), jnp.asarray(start.bias)
  with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
    return Linear(*map(np.asarray, _minimised(begin, x, labels, jnp.float32(l2))))


@jax.jit
def _minimised(begin: Any, x: Float[Array, "n d"], labels: Int[Array, " n"], l2: Float[Array, ""]) -> Any:
  def loss(params: Any) -> Float[Array, ""]:
    weight, bias = params
    logits = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST) + bias
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return cross_entropy.mean() + 0.5 * l2 * (weight**2).sum()

  optimizer, value_and_gradient = optax.lbfgs(), optax.value_and_grad_from_state(loss)

  def step(carry: Any) -> Any:
    params, state, count, _ = carry
    value, gradient = value_and_gradient(params, state=state)
    updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
    return optax.apply_updates(params, updates), state, count + 1, optax.tree.norm(gradient, ord=jnp.inf)

  is_open = lambda carry: (carry[2] < MOST_STEPS) & (carry[3] > SMALL_GRADIENT)
  return jax.lax.while_loop(is_open, step, (begin, optimizer.init(begin), 0, jnp.float32(jnp.inf)))[0]


def _read_shots(text: str | int) -> int | None:
  """Read a number of shots; None for all. Raises UserError unless it is a number of at least 1, or all."""
  if text == ALL:
    return None
  if str(text).isdecimal() and int(text) >= 1:
    return int(text)
  raise UserError(f"shots has {text!r}; it should be numbers from 1 on, or all, such as 1,2,4,8,16,all")
