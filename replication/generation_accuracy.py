"""Add two judges to the task `generation_accuracy`: one for rendered scenes, and one for icons that counts copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from diffdis_jax.config.section import field, number
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, generation_accuracy
from diffdis_jax.evals.generation_accuracy import OF_SHAPES, SIZE
from replication import copies
from replication.label_judge import LabelJudge
from replication.scene_judge import SceneJudge

OF_LABELS = ("splits", "label_field", "epochs", "held_out")  # settings of the judge of labelled images


@base.settings()
class GenerationAccuracy(generation_accuracy.GenerationAccuracy):
  """Task `generation_accuracy`: measure the share of generated images that show the prompt, judged by a classifier.

  With `data` of `scenes` it generates one image for each caption. An image is correct if both colours, both shapes and
  the relation are (`scene_judge`). Further metrics are acc1_attributes, the share of the five that are correct,
  acc1_relation, acc1_colour and acc1_shape.

  With labelled images there is also nearer_than_own: the share of generated images that are nearer to an image in the
  split of `data` than any two images of their class there are to each other. real_nearer_than_own is the same share of
  real images of the other splits. Both are left out if no class has two images.
  """

  data: Mapping[str, Any] | None = field(None, help="section of a data source")
  label_field: str | None = field(None, help="record's field with the class's name; by default label")
  splits: Sequence[str] | None = field(
    None, help="further splits of the same data, on which the classifier is trained and measured too"
  )
  epochs: int | None = number(None, ge=1, help="epochs of the classifier on labelled images; by default 20")
  held_out: float | None = number(
    None, gt=0.0, lt=1.0, help="share of the labelled images held out to measure the classifier; by default 0.1"
  )

  def make_judge(self) -> Any:
    if self.data is None:
      self.refuse(OF_LABELS, "rendered shapes are judged; give data too")
      return super().make_judge()
    if self.data.get("name") == "scenes":
      self.refuse(OF_LABELS, "rendered scenes are judged; leave it out")
      return SceneJudge(self.data, self.seed, **self.given(OF_SHAPES))
    self.refuse(OF_SHAPES, "labelled images are judged; leave it out")
    return CopiesJudge(self.data, self.seed, **self.given(OF_LABELS))

  def refuse(self, names: Sequence[str], where: str) -> None:
    """Raise UserError if one of these settings is given, since it has no effect `where`."""
    for name in self.given(names):
      raise UserError(f"{name} has no effect where {where}")


class CopiesJudge(LabelJudge):
  """A judge that names the classes of labelled images, and counts images that are as near to a training image as a
  copy."""

  _own: copies.OwnDistances | None = None
  _real_nearer: Mapping[str, float] = {}

  def measure(
    self, images: UInt8[np.ndarray, "n h w 3"], classes: Int[np.ndarray, " n"], *, image_size: int
  ) -> dict[str, float]:
    metrics = super().measure(images, classes, image_size=image_size)
    if self._own is None:
      every = [np.arange(len(source)) for source in self.sources]
      squares = [base.Images(source, rows, SIZE)[rows] for source, rows in zip(self.sources, every, strict=True)]
      # The first source is the split of `data`, on which the generator was trained.
      labels, others = np.split(self.labels, [len(squares[0])])
      self._own = copies.OwnDistances(squares[0], labels, num_classes=len(self.classnames))
      # The baseline without copies: the same share for real images that were not trained on.
      if squares[1:]:
        real = self._own.share_nearer(np.concatenate(squares[1:]), others)
        self._real_nearer = {} if real is None else {"real_nearer_than_own": real}
    share = self._own.share_nearer(np.stack([base.to_square(image, SIZE) for image in images]), classes)
    return {**metrics, **({} if share is None else {"nearer_than_own": share}), **self._real_nearer}
