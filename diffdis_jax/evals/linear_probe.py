"""A linear classifier on frozen features, of all training images and of a few a class: what a representation holds.

After CLIP (Radford et al., 2021): logistic regression by L-BFGS, its regularisation chosen on images that are neither
trained on nor tested.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.common.params import Params
from diffdis_jax.config.section import check_number
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base
from diffdis_jax.method import encode
from diffdis_jax.method.network import Network

ALL = "all"
L2 = tuple(10.0**power for power in range(1, -7, -1))  # strongest first, from which the next one starts
MOST_STEPS = 1000  # of L-BFGS, as CLIP has it
HELD_OUT = 0.2  # of the training images, where there is no split to choose on


@dataclasses.dataclass(frozen=True)
class Examples:
  """Features, or places of images, and the numbers of their classes."""

  x: np.ndarray
  labels: Int[np.ndarray, " n"]

  def take(self, rows: Int[np.ndarray, " m"]) -> Examples:
    return Examples(self.x[rows], self.labels[rows])


class LinearProbe:
  """Task `linear_probe`: top-1 of logistic regression on an image's denoised query, and on the UNet's middle map.

  The middle map is that of the UNet without its text stream, of the clean image under the empty caption, and its mean
  over positions is taken. CLIP has its embedding alone, and what has no trained head the middle map alone.

  Args:
    data: section of a data source, as `data.sources.open_source` takes it; its split is tested on, without images of
      classes that are not trained on.
    train_split: the split of the same data that is trained on.
    val_split: that on which the regularisation is chosen; empty for a fifth of the training images, held out, of no
      class all.
    label_field: the record's field with the class.
    shots: how many training images of each class, or all of them; for each a classifier.
    timestep: of the middle map; None for that at which the run's head sees clean images, or 0 for a run without one.
    num_images: how many images to test on, the same ones each time; None for all.
    num_training_images: how many images of train_split to take, before some are held out and shots are taken; None for
      all.
    seed: seed of the choice of shots, of the images held out, and of the query's noise.

  Raises:
    UserError: shots that are none, or a split without an image of a class that is trained on.
  """

  task = "linear_probe"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    train_split: str = "train",
    val_split: str = "",
    label_field: str = "label",
    shots: Sequence[str] = ("1", "2", "4", "8", "16", ALL),
    timestep: int | None = None,
    num_images: int | None = None,
    num_training_images: int | None = None,
    seed: int = 0,
  ):
    self._shots = tuple(_read_shots(each) for each in shots)
    if timestep is not None:
      check_number("timestep", timestep, ge=0, le=NUM_TIMESTEPS)
    self._timestep, self._seed = timestep, seed
    splits = dict(train=train_split, val=val_split or train_split, test=data.get("split", "train"))
    if splits["test"] in (splits["train"], splits["val"]):
      raise UserError(
        f"linear_probe would test on the split {splits['test']}, on which it trains or chooses; give another"
      )
    if val_split == train_split:
      raise UserError(
        f"linear_probe would choose on the split {val_split}, on which it trains; leave val_split out, and a fifth of"
        " it is held out"
      )
    self._splits = {"train_split": train_split, "val_split": val_split}
    self._sources = {name: base.open_split(data, split) for name, split in splits.items()}
    rows = {name: np.arange(len(source)) for name, source in self._sources.items()}
    rows["train"] = base.subset(len(rows["train"]), num_training_images)
    rows["test"] = base.subset(len(rows["test"]), num_images)
    if not val_split:
      order = np.random.default_rng(seed).permutation(rows["train"])
      rows["val"], rows["train"] = np.split(order, [round(HELD_OUT * len(order))])
    names = {
      name: [str(base.get_field(base.fields(source, i), label_field)) for i in rows[name]]
      for name, source in self._sources.items()
    }
    if not val_split:  # of few images a class, chance may hold out all of one, which the test would then lack
      lost = {*names["val"]} - {*names["train"]}
      back = [names["val"].index(name) for name in sorted(lost)]
      rows["train"] = np.append(rows["train"], rows["val"][back])
      rows["val"] = np.delete(rows["val"], back)
      names["train"] += [names["val"][i] for i in back]
      names["val"] = np.delete(names["val"], back).tolist()
    self.classes = sorted({*names["train"]})
    number = {name: i for i, name in enumerate(self.classes)}
    self.examples: dict[str, Examples] = {}
    for name, labels in names.items():
      # What is not trained on has no answer that could be right.
      known = [i for i, label in enumerate(labels) if label in number]
      if not known or len(self.classes) < 2:
        raise UserError(
          f"linear_probe needs two classes in {train_split}, and images of them to train, val and test on"
        )
      if name == "test" and len(known) < len(labels):
        others = sorted({*labels} - {*number})
        logging.warning(
          "linear_probe: %d of %d images to test on are left out, of classes that %s has none of, such as %s",
          len(labels) - len(known),
          len(labels),
          train_split,
          ", ".join(map(repr, others[:5])),
        )
      self.examples[name] = Examples(rows[name][known], np.array([number[labels[i]] for i in known]))
    self._warn_of_few()
    self._program_of = functools.lru_cache(1)(self._compile)  # in a run the inference is one, and compiled once

  def _warn_of_few(self) -> None:
    """Warn of the numbers of shots that are more than some classes have images to train on."""
    counts = np.bincount(self.examples["train"].labels)
    fewer = {k: int((counts < k).sum()) for k in self._shots if k is not None}
    if said := [f"of {k} shots {count} of {len(counts)}" for k, count in fewer.items() if count]:
      said[0] += " classes have fewer images to train on"
      logging.warning("linear_probe: %s; all of theirs count", ", ".join(said))

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    counts = {f"num_{name}_images": len(each.labels) for name, each in self.examples.items()}
    return {
      **inference.protocol,
      "seed": self._seed,
      "num_images": len(self.examples["test"].labels),
      "num_classes": len(self.classes),
      "shots": [ALL if k is None else k for k in self._shots],
      "timestep": self._middle_timestep(inference),
      "l2": list(L2),
      **self._splits,
      **counts,
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return, for each kind of features and number of shots, acc1_embedding_4_shots and so on, and the l2 that was
    chosen."""
    metrics = {}
    for kind, features in self._features(inference, params).items():
      for k in self._shots:
        name = f"{kind}_all" if k is None else f"{kind}_{k}_shots"
        metrics |= {f"{what}_{name}": value for what, value in self._measure(features, k).items()}
        logging.info("linear probe, %s: %.4f", name, metrics[f"acc1_{name}"])
    return metrics

  def _measure(self, features: Mapping[str, Examples], shots: int | None) -> dict[str, float]:
    train = features["train"]
    if shots is not None:
      train = train.take(base.first_of_each(train.labels, shots, seed=self._seed))
    # Shifted and scaled as a whole: so one list of l2 fits features of any length.
    mean, spread = train.x.mean(axis=0), float(train.x.std()) + 1e-12
    scaled = {name: Examples((each.x - mean) / spread, each.labels) for name, each in features.items()}
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
    found: dict[str, dict[str, Examples]] = {}
    for name, each in self.examples.items():
      source = self._sources[name]
      if inference.aligned:
        x = base.embed_images(inference, params, source, each.x, seed=self._seed)
        found.setdefault("embedding", {})[name] = Examples(x, each.labels)
      if not inference.network.is_clip:
        images = base.Images(source, each.x, inference.image_size)
        x = inference.batched(functools.partial(self._program_of(inference), params), images)
        found.setdefault("middle", {})[name] = Examples(x, each.labels)
    return found

  def _middle_timestep(self, inference: Any) -> int | None:
    if inference.network.is_clip:
      return None
    given = inference.network.condition_timestep if inference.aligned else 0
    return given if self._timestep is None else self._timestep

  def _compile(self, inference: Any) -> Callable[..., Array]:
    t = self._middle_timestep(inference)
    assert t is not None
    return inference.compiled("middle maps", functools.partial(middle_map, inference.network, t))


def middle_map(network: Network, t: int, params: Params, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b d"]:
  """Return the mean over positions of the UNet's middle map of clean images at timestep t, under the empty caption."""
  model: Any = network.with_params(params)
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
  from scipy import optimize  # here, since it takes a second

  width = examples.x.shape[1]
  x, labels = jnp.asarray(examples.x, jnp.float32), jnp.asarray(examples.labels)
  begin = np.zeros((width + 1, num_classes)) if start is None else np.vstack([start.weight, start.bias])

  def value_and_gradient(flat: Float[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
    found = _value_and_gradient(jnp.asarray(flat.reshape(begin.shape), jnp.float32), x, labels, l2)
    value, gradient = jax.device_get(found)
    return float(value), np.asarray(gradient, np.float64).ravel()

  found = optimize.minimize(
    value_and_gradient, begin.ravel(), jac=True, method="L-BFGS-B", options=dict(maxiter=MOST_STEPS, ftol=0, gtol=1e-7)
  ).x.reshape(begin.shape)
  return Linear(found[:-1].astype(np.float32), found[-1].astype(np.float32))


@jax.jit
@jax.value_and_grad
def _value_and_gradient(
  both: Float[Array, "d k"], x: Float[Array, "n e"], labels: Int[Array, " n"], l2: Float[Array, ""]
) -> Float[Array, ""]:
  weight, bias = both[:-1], both[-1]
  logits = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST) + bias
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
  return (jax.nn.logsumexp(logits, axis=1) - own).mean() + 0.5 * l2 * (weight**2).sum()


def _read_shots(text: str | int) -> int | None:
  """Read a number of shots; None for all. Raises UserError unless it is a number of at least 1, or all."""
  if text == ALL:
    return None
  if str(text).isdecimal() and int(text) >= 1:
    return int(text)
  raise UserError(f"shots has {text!r}; it should be numbers from 1 on, or all, such as 1,2,4,8,16,all")
