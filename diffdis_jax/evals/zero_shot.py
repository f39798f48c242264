"""Zero-shot classification: class names in prompt templates against each image's denoised query."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from diffdis_jax.config.section import field
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.prompts import ClassNames, comparable

NAME_FIELD = "class"  # of a record whose label is a number: the class's name, as prepare_data folder writes it
_NUMBER = re.compile(r"n\d{8}")  # of WordNet, as ImageNet's class folders are called


@base.settings()
class ZeroShot(base.OfImages):
  """Task `zero_shot`: top-1, top-5 and mean per-class recall over a class list.

  An image's class is that whose text embedding, of its name in prompt templates, is nearest to the image's denoised
  query. Source: the paper's Table 1; prompts and their mean after CLIP (Radford et al., 2021).

  A label is a class's name or its number in `classnames`. Names compare as by `prompts.comparable`. Where records have
  both the number and, as `class`, the name, the list must have the same names in the same places; a `class` that is
  itself the number fits any name, and so do WordNet's numbers, if the list has as many names as there are of them.
  Classes of one name, as two pairs of ImageNet's, are a tie, which is wrong.
  """

  task = "zeroshot_classification"

  classnames: Sequence[str] | Mapping[str, str] | str = field(
    "", help="JSON file of class names: a list, or an object {name in the data: name}; by default the data's labels"
  )
  templates: Sequence[str] | str = field("", help="JSON file of a list of prompt templates, such as 'a photo of a {}.'")
  single_template: str = field("", help="template that is also measured by itself; by default the first one")
  label_field: str = field("label", help="record's field with the class's name, or with its number in classnames")
  seen_split: str = field(
    "", help="split of the same data whose classes are seen ones: accuracy is also given on seen and on unseen classes"
  )

  def open(self) -> None:
    super().open()
    self.all_templates = prompts.resolve_templates(self.templates)
    self.single = self.single_template or self.all_templates[0]
    prompts.resolve_templates((self.single,))  # which checks it
    # Names first: labels that are numbers are places in them.
    given = prompts.resolve_classnames(self.classnames) if self.classnames else None
    labels = _read_labels(self.source, self.label_field, given)
    classes = given or _occurring(labels)
    self.names, self.labels = classes.names, _places(labels, classes)[self.indices]
    # ImageNet's folders without a list of names: every prompt would be "a photo of a n01440764".
    if all(_NUMBER.fullmatch(name) for name in self.names):
      raise UserError(
        f"the class names are numbers such as {self.names[0]}; give a JSON list of names in their order as"
        " classnames, with label_field=label"
      )
    self.seen = None
    if self.seen_split:
      labels = _read_labels(base.open_split(self.data, self.seen_split), self.label_field, given)
      seen = [label if isinstance(label, str) else classes.keys[label] for label in labels]
      self.seen = np.isin([*map(comparable, classes.keys)], [*map(comparable, seen)])

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {
      **super().protocol(inference),
      "num_classes": len(self.names),
      "classnames_sha256": prompts.sha256(self.names),  # they decide as much as templates, and may be thousands
      "templates": list(self.all_templates),
      "single_template": self.single,
      "equal_names": prompts.repeated_names(self.names),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, acc5, the mean and the lowest recall of a class: of all templates averaged, and of the single
    one."""
    images = self.embed_images(inference, params)
    by_template = self._embed_classes(inference, params)
    of_all = prompts.mean_embedding(np.stack([by_template[template] for template in self.all_templates]))
    metrics = self._measure(images, of_all)
    single = self._measure(images, by_template[self.single])
    return metrics | {f"{name}_single_template": value for name, value in single.items()}

  def _embed_classes(self, inference: Any, params: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "k d"]]:
    # Classes whose names differ only beyond what is read are equal to the network.
    prompts.warn_of_long(tuple(prompts.of_classes([self.single], self.names)), inference.max_length)
    # The single template is often among the others, and is then embedded once.
    templates = [*dict.fromkeys((*self.all_templates, self.single))]
    embedded = base.embed_texts(inference, params, prompts.of_classes(templates, self.names))
    return dict(zip(templates, embedded.reshape(len(templates), len(self.names), -1), strict=True))

  def _measure(self, images: Float[np.ndarray, "n d"], classes: Float[np.ndarray, "k d"]) -> dict[str, float]:
    return self.metrics(base.ranks(images, classes, query_groups=self.labels, key_groups=np.arange(len(classes))))

  def metrics(self, ranks: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Return the reported metrics, given how many classes come before each image's own; 0 is right."""
    right = ranks == 0
    recalls = class_recalls(right, self.labels)
    metrics = {
      "acc1": float(right.mean()),
      "mean_per_class_recall": float(recalls.mean()),
      "lowest_class_recall": float(recalls.min()),
    }
    if len(self.names) >= 5:
      metrics["acc5"] = float((ranks < 5).mean())
    if self.seen is not None:
      seen = self.seen[self.labels]
      groups = (("acc1_seen", seen), ("acc1_unseen", ~seen))
      metrics |= {name: float(right[which].mean()) for name, which in groups if which.any()}
    return metrics


def class_recalls(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " k"]:
  """Return the share of right answers of each class that occurs, by its number."""
  # Classes without an image have no recall; they still stand among the answers.
  counts = np.bincount(labels)
  hits = np.bincount(labels, weights=right)
  return hits[counts > 0] / counts[counts > 0]


def _read_labels(source: sources.Source, name: str, classes: ClassNames | None) -> list[str | int]:
  """Return every record's label: the class's name in the data, or its number in the class list."""
  labels, named = [], set()
  for i in range(len(source)):
    record = base.fields(source, i)
    label, called = base.get_field(record, name), record.get(NAME_FIELD)
    if not isinstance(label, str):
      _check_number(label, name, called, classes)
      if classes is not None and classes.by_key:
        label = called
      elif isinstance(called, str):
        named.add((int(label), called))
    labels.append(label)
  if classes is not None:
    _check_names(sorted(named), classes)
  return labels


def _check_number(label: Any, name: str, called: Any, classes: ClassNames | None) -> None:
  """Check that the label is a number that stands for a class. Raises UserError otherwise."""
  if not isinstance(label, (int, np.integer)) or isinstance(label, bool):
    raise UserError(f"field {name!r} holds {label!r}; a label should be a class name or its number")
  if classes is None:
    by_name = f", or label_field={NAME_FIELD} to go by the data's names" if isinstance(called, str) else ""
    raise UserError(f"field {name!r} holds numbers such as {label}; give the class names that they count into{by_name}")
  if classes.by_key and not isinstance(called, str):
    raise UserError(
      f"field {name!r} holds numbers without a name beside them (field {NAME_FIELD!r}), so that an object of names"
      " does not apply; give a list of class names in the order of the numbers"
    )
  if not classes.by_key and not 0 <= label < len(classes.names):
    raise UserError(f"field {name!r} holds {label}, but there are {len(classes.names)} class names, from 0")


def _check_names(named: Sequence[tuple[int, str]], classes: ClassNames) -> None:
  """Check that the data's name for a number is that of the class list. Raises UserError where it is not."""
  # A list has the names in the order of WordNet's numbers, as ImageNet's folders are called. Only a list of all of them
  # does: for some it does not say which.
  codes = [name for _, name in named]
  is_in_order = codes == sorted(codes) and [number for number, _ in named] == [*range(len(classes.names))]
  if is_in_order and all(map(_NUMBER.fullmatch, codes)):
    return
  for number, name in named:
    # A folder that is called by its number says nothing of the order of the names.
    is_number = name.isdecimal() and int(name) == number
    if not is_number and comparable(name) != comparable(classes.names[number]):
      raise UserError(
        f"class {number} is {name!r} in the data, but {classes.names[number]!r} in the class list; give the names in"
        f" the data's order, or label_field={NAME_FIELD} to go by name, or an object {{name in the data: your name}}"
      )


def _occurring(labels: Sequence[str | int]) -> ClassNames:
  """Return the classes of these names, sorted."""
  keys = sorted({comparable(label): label for label in labels if isinstance(label, str)}.values())
  return ClassNames(names=tuple(key.replace("_", " ") for key in keys), keys=tuple(keys))


def _places(labels: Sequence[str | int], classes: ClassNames) -> Int[np.ndarray, " n"]:
  """Return each label's place in the class list."""
  # Spelling of the data and of a list differ in case and underscores, and mean the same class.
  index = {comparable(key): i for i, key in enumerate(classes.keys)}
  names = {label for label in labels if isinstance(label, str)}
  if names and len(index) < len(classes.keys):
    repeated = prompts.listed(prompts.repeated_names([*map(comparable, classes.keys)]))
    raise UserError(f"class list with duplicates: {repeated}; each class name should occur once")
  if repeated := prompts.repeated_names(classes.names):
    logging.warning("equal class names cannot be distinguished and count as wrong: %s", prompts.listed(repeated))
  if missing := sorted(name for name in names if comparable(name) not in index):
    raise UserError(
      f"{len(missing)} labels of the data are not in the class list: {prompts.listed(missing)}; add them to it, or give"
      " an object {label in the data: name}"
    )
  return np.array([index[comparable(label)] if isinstance(label, str) else label for label in labels])
