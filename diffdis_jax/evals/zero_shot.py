"""Zero-shot classification: class names in prompt templates against each image's denoised query."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from diffdis_jax.config.section import check_choice
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.settings import written

NAME_FIELD = "class"  # of a record whose label is a number: the class's name, as prepare_data folder writes it
METRICS = ("acc1", "mean_per_class_recall")
_NUMBER = re.compile(r"n\d{8}")  # of WordNet, as ImageNet's class folders are called


class ZeroShot:
  """Task `zero_shot`: top-1, top-5 and mean per-class recall over a class list.

  An image's class is that whose text embedding, of its name in prompt templates, is nearest to the image's denoised
  query. Source: the paper's Table 1; prompts and their mean after CLIP (Radford et al., 2021).

  Args:
    data: section of a data source, as `data.sources.open_source` takes it.
    classnames: a JSON file's path to a list of names or an object {name in the data: name in the prompts}, or, other
      than as a flag, either itself; empty for the labels that occur in the data, sorted, with spaces for underscores.
      Names compare as by `prompts.comparable`.
    templates: a JSON file's path to a list of prompt templates, or, other than as a flag, the list; empty for
      `prompts.TEMPLATES`.
    single_template: template that is also measured on its own; empty for the first of the templates.
    metric: the data set's own metric, "acc1" or "mean_per_class_recall"; only written to the record.
    label_field: the record's field with the class name, or with its number in `classnames`. Where it is the number, a
      name may occur twice, as two do in the usual list of ImageNet; between equal names it is a tie, which is wrong.
      Where records have both the number and, as `class`, the name, as `prepare_data folder` makes them, the list must
      have the same names in the same places. A `class` that is itself the number fits any name; so do WordNet's numbers
      such as n01440764, if the list has as many names as there are of them.
    only_classes_present: leave out the class names that no record has.
    seen_classes: a JSON file's path to a list of the training set's classes, or, other than as a flag, the list; acc1
      is then also reported on seen and on unseen classes, both against the whole class list.
    seen_split: the split of the same data whose labels are `seen_classes`.
    num_images: how many images to measure, the same ones each time; None for all.
    seed: seed of the query's noise, and of the shuffle.
    reduced_decoding: decode JPEGs of at least twice the side that is seen at 1/2, 1/4 or 1/8 of their size. It is
      faster, and figures then differ slightly from published protocols.
    shuffle_labels: the leak test. Each record keeps its place and its label but shows another one's image, so accuracy
      must fall to chance; where it does not, something other than the pixels gives the label away.

  Raises:
    UserError: a class name occurs twice and labels are names, a label is not in the class list, the class list and
      the data have different names for a number, the names are ImageNet's numbers, a template has no place for the
      name.
  """

  task = "zeroshot_classification"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    classnames: Sequence[str] | Mapping[str, str] | str = "",
    templates: Sequence[str] | str = "",
    single_template: str = "",
    metric: str = "acc1",
    label_field: str = "label",
    only_classes_present: bool = False,
    seen_classes: Sequence[str] | str = "",
    seen_split: str = "",
    num_images: int | None = None,
    seed: int = 0,
    reduced_decoding: bool = False,
    shuffle_labels: bool = False,
  ):
    check_choice("metric", metric, METRICS)
    self.source = sources.open_source(**data)
    self._indices = base.subset(len(self.source), num_images)
    self._seed, self._reduced_decoding = seed, reduced_decoding
    self._shuffle_labels = shuffle_labels
    self.templates = prompts.resolve_templates(templates)
    self._single = prompts.resolve_templates((single_template,))[0] if single_template else self.templates[0]
    self._metric = metric

    # Names first: labels that are numbers are places in them.
    given = prompts.resolve_classnames(classnames) if classnames else None
    labels = _read_labels(self.source, label_field, given)
    classes = given or _occurring(labels)
    places = _places(labels, classes)
    kept = classes
    if only_classes_present:
      # Fewer classes are an easier question, which is why it is no default.
      present, places = np.unique(places, return_inverse=True)
      names, keys = (tuple(field[i] for i in present) for field in (classes.names, classes.keys))
      kept = classes._replace(names=names, keys=keys)
    self.classnames = kept.names
    self.labels = places[self._indices]
    # ImageNet's folders without a list of names: every prompt would be "a photo of a n01440764".
    if all(_NUMBER.fullmatch(name) for name in self.classnames):
      raise UserError(
        f"the class names are numbers such as {self.classnames[0]}; give a JSON list of names in their order as"
        " classnames, with label_field=label"
      )
    if not given and all(name.isdecimal() for name in self.classnames):
      logging.warning(
        "the data call classes by numbers such as %s, and prompts are such as %r; give an object of names,"
        " {number in the data: name}, as classnames",
        self.classnames[0],
        prompts.fill(self._single, self.classnames[0]),
      )

    if seen_split and seen_classes:
      raise UserError("seen_split and seen_classes are both set; give one of them")
    self._seen = None
    if seen_split:
      labels = _read_labels(base.open_split(data, seen_split), label_field, given)
      self._seen = _is_in(kept.keys, [label if isinstance(label, str) else classes.keys[label] for label in labels])
    elif seen_classes:
      self._seen = _is_in(kept.names, prompts.resolve_classnames(seen_classes).names)

  @property
  def order(self) -> Int[np.ndarray, " n"]:
    """Return which image stands for the record of each of `labels`: its own, unless labels are shuffled."""
    # The leak test changes which image is shown, and nothing else: labels, places and noise stay.
    return base.shuffled(self._indices, seed=self._seed) if self._shuffle_labels else self._indices

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference."""
    return {
      **inference.protocol,
      "seed": self._seed,
      "num_images": len(self._indices),
      "num_classes": len(self.classnames),
      "classnames_sha256": prompts.sha256(self.classnames),  # they decide as much as templates, and may be thousands
      "templates": list(self.templates),
      "single_template": self._single,
      "metric": self._metric,
      "ties": base.TIES,
      "equal_names": prompts.repeated_names(self.classnames),
      **base.origin(self.source),
      "reduced_decoding": self._reduced_decoding,
      "shuffle_labels": self._shuffle_labels,
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return acc1, acc5, the mean and the lowest recall of a class: of all templates averaged, and of the single
    one."""
    images = base.embed_images(
      inference, params, self.source, self.order, seed=self._seed, reduced_decoding=self._reduced_decoding
    )
    by_template = self._embed_classes(inference, params)
    # The mean of unit vectors, normalised again, as CLIP builds its classifier of several templates.
    mean = np.stack([by_template[template] for template in self.templates]).mean(axis=0)
    ensemble = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    metrics = self._measure(images, ensemble)
    single = self._measure(images, by_template[self._single])
    return metrics | {f"{name}_single_template": value for name, value in single.items()}

  def _embed_classes(self, inference: Any, params: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "k d"]]:
    # Classes whose names differ only beyond what is read are equal to the network.
    prompts.warn_of_long(tuple(prompts.fill(self._single, name) for name in self.classnames), inference.max_length)
    # The single template is often among the others, and is then embedded once.
    templates = [*dict.fromkeys((*self.templates, self._single))]
    texts = [prompts.fill(template, name) for template in templates for name in self.classnames]
    embedded = base.embed_texts(inference, params, texts)
    return dict(zip(templates, embedded.reshape(len(templates), len(self.classnames), -1), strict=True))

  def _measure(self, images: Float[np.ndarray, "n d"], classes: Float[np.ndarray, "k d"]) -> dict[str, float]:
    ranks = base.ranks(images, classes, query_groups=self.labels, key_groups=np.arange(len(classes)))
    return self.metrics(ranks)

  def metrics(self, ranks: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Return the reported metrics, given how many classes come before each image's own; 0 is right."""
    right = ranks == 0
    recalls = class_recalls(right, self.labels)
    metrics = {
      "acc1": float(right.mean()),
      "mean_per_class_recall": float(recalls.mean()),
      "lowest_class_recall": float(recalls.min()),
    }
    if len(self.classnames) >= 5:
      metrics["acc5"] = float((ranks < 5).mean())
    if self._seen is not None:
      seen = self._seen[self.labels]
      metrics |= {
        name: float(right[which].mean()) for name, which in (("acc1_seen", seen), ("acc1_unseen", ~seen)) if which.any()
      }
    return metrics


def class_recalls(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " k"]:
  """Return the share of right answers of each class that occurs, by its number."""
  # Classes without an image have no recall; they still stand among the answers.
  counts = np.bincount(labels)
  hits = np.bincount(labels, weights=right)
  return hits[counts > 0] / counts[counts > 0]


def _read_labels(source: sources.Source, field: str, classes: prompts.ClassNames | None) -> list[str | int]:
  """Return every record's label: the class's name in the data, or its number in the class list."""
  labels, named = [], set()
  called: dict[str, set[str]] = {}  # caption -> the classes that it is of
  by_key = classes is not None and classes.by_key
  for i in range(len(source)):
    record = base.fields(source, i)
    label, name = base.get_field(record, field), record.get(NAME_FIELD)
    if not isinstance(label, str):
      _check_number(label, field, record, classes)
      if by_key:
        label = name
      elif isinstance(name, str):
        named.add((int(label), name))
    elif field == "caption" and isinstance(name, str):
      called.setdefault(prompts.comparable(label), set()).add(name)
    labels.append(label)
  if classes is not None:
    _check_names(named, classes)
  # Two pairs of ImageNet's thousand classes have one name each: without a list, 998 are measured.
  elif shared := sorted(caption for caption, names in called.items() if len(names) > 1):
    logging.warning(
      "class names that several classes of the data have in common count as one class: %s; give the names of all"
      " classes as classnames, with label_field=label",
      ", ".join(map(repr, shared)),
    )
  return labels


def _check_number(label: Any, field: str, record: Mapping[str, Any], classes: prompts.ClassNames | None) -> None:
  """Check that the label is a number that tells the class. Raises UserError otherwise."""
  has_name = isinstance(record.get(NAME_FIELD), str)
  if not isinstance(label, (int, np.integer)) or isinstance(label, bool):
    raise UserError(f"field {field!r} holds {label!r}; a label should be a class name or its number")
  if classes is None:
    by_name = f", or {written('label_field')}={NAME_FIELD} to go by the data's names" if has_name else ""
    raise UserError(
      f"field {field!r} holds numbers such as {label}; give the class names that they count into{by_name}"
    )
  if classes.by_key:
    if not has_name:
      raise UserError(
        f"field {field!r} holds numbers without a name beside them (field {NAME_FIELD!r}), so that an object of names"
        " does not apply; give a list of class names in the order of the numbers"
      )
  elif not 0 <= label < len(classes.names):
    raise UserError(f"field {field!r} holds {label}, but there are {len(classes.names)} class names, from 0")


def _check_names(named: Collection[tuple[int, str]], classes: prompts.ClassNames) -> None:
  """Check that the data's name for a number is that of the class list. Raises UserError where it is not."""
  # A list has the names in the order of WordNet's numbers, as ImageNet's folders are called. Only a list of all of them
  # does: for some it does not say which.
  codes = [name for _, name in sorted(named)]
  is_in_order = codes == sorted(codes) and [number for number, _ in sorted(named)] == [*range(len(classes.names))]
  if is_in_order and all(map(_NUMBER.fullmatch, codes)):
    return
  for number, name in sorted(named):
    # A folder that is called by its number says nothing of the order of the names.
    is_number = name.isdecimal() and int(name) == number
    if not is_number and prompts.comparable(name) != prompts.comparable(classes.names[number]):
      by_name = f"{written('label_field')}={NAME_FIELD} to go by name"
      raise UserError(
        f"class {number} is {name!r} in the data, but {classes.names[number]!r} in the class list; give the names in"
        f" the data's order, or {by_name}, or an object {{name in the data: your name}}"
      )


def _occurring(labels: Sequence[str | int]) -> prompts.ClassNames:
  """Return the classes of these names, sorted."""
  keys = sorted({prompts.comparable(label): label for label in labels if isinstance(label, str)}.values())
  return prompts.ClassNames(names=tuple(key.replace("_", " ") for key in keys), keys=tuple(keys))


def _places(labels: Sequence[str | int], classes: prompts.ClassNames) -> Int[np.ndarray, " n"]:
  """Return each label's place in the class list."""
  # Spelling of the data and of a list differ in case and underscores, and mean the same class.
  index = {prompts.comparable(key): i for i, key in enumerate(classes.keys)}
  names = {label for label in labels if isinstance(label, str)}
  if names and len(index) < len(classes.keys):
    repeated = prompts.repeated([prompts.comparable(key) for key in classes.keys])
    raise UserError(f"class list with duplicates: {repeated}; each class name should occur once")
  if repeated := prompts.repeated(classes.names):
    logging.warning("equal class names cannot be distinguished and count as wrong: %s", repeated)
  if missing := sorted(name for name in names if prompts.comparable(name) not in index):
    shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
    # Columns of a .csv are texts, also where they are numbers. A list of such numbers is only not whole.
    are_numbers = all(map(str.isdecimal, missing)) and not any(map(str.isdecimal, classes.keys))
    number = "they are texts: give an object {number in the data: name} instead"
    remedy = number if are_numbers else "add them to the class list"
    raise UserError(f"{len(missing)} labels of the data are not in the class list: {shown}; {remedy}")
  return np.array([index[prompts.comparable(label)] if isinstance(label, str) else label for label in labels])


def _is_in(names: Sequence[str], others: Sequence[str]) -> Bool[np.ndarray, " k"]:
  """Return, for each of the names, whether it is among the others."""
  return np.isin([prompts.comparable(name) for name in names], sorted({prompts.comparable(name) for name in others}))
