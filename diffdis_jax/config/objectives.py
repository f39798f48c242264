"""Define the objectives of a run: one table of what each requires of network, data, loss and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffdis_jax.config.section import check_choice
from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """The properties of an objective, a row of the table."""

  network: str = (
    "diffdis"  # the network that is built: `diffdis`, its `autoencoder` alone, `clip`, or `either` of diffdis and clip
  )
  alone: bool = False  # it cannot be combined with another objective
  generates: bool = False  # the network makes images from captions, and its UNet has an up path
  aligned: bool = False  # the network compares images with texts
  needs_images: bool = False  # it cannot be trained on stored latents
  contrasts: bool = False  # its loss compares the rows of a batch with each other
  grad_cache: bool = (
    False  # a batch in several microbatches may have the result of a single one (training/gradcache.py)
  )
  labelled: bool = False  # its batches have labels, and the config has `long_tail` and `data.sampling`
  sentences: bool = False  # each image of such a batch has a sentence of its class
  head: bool = False  # the model has a head, and only the head's branches are trained
  teacher: bool = False  # the state also holds the parameters of the start
  starts_from: str = ""  # what `init_from` must name; empty if it is optional
  follows: str = ""  # the objective that the run in `init_from` must have finished training


_LONG_TAIL: dict[str, Any] = dict(network="either", alone=True, aligned=True, needs_images=True, labelled=True)
TABLE = {
  # The paper's two objectives, the only ones that may be combined.
  "generation": Objective(generates=True, grad_cache=True),
  "discrimination": Objective(aligned=True, contrasts=True, grad_cache=True),
  # The autoencoder for a run from scratch; the paper uses Stable Diffusion's.
  "reconstruction": Objective(network="autoencoder", alone=True, needs_images=True),
  # CLIP, the baseline of the paper's Table 1. Its image encoder reads pixels.
  "contrastive": Objective(
    network="clip", alone=True, aligned=True, needs_images=True, contrasts=True, grad_cache=True
  ),
  # Stages 1 and 2 of VL-LTR's long-tailed recognition (paper appendix, Table 8).
  "class_contrastive": Objective(
    **_LONG_TAIL,
    contrasts=True,
    sentences=True,
    teacher=True,
    starts_from="a trained DiffDis or CLIP, which is stage 1's teacher too",
  ),
  "long_tail_head": Objective(**_LONG_TAIL, head=True, starts_from="stage 1's workdir", follows="class_contrastive"),
}
JOINT = Objective(generates=True, aligned=True, contrasts=True, grad_cache=True)  # both objectives of the paper
# Some measurements and tools need a run with one of these.
GENERATIVE = tuple(name for name, row in TABLE.items() if row.generates)
ALIGNED = tuple(name for name, row in TABLE.items() if row.aligned)
COMPARING = tuple(name for name, row in TABLE.items() if row.aligned and not row.labelled)
DENOISING = tuple(name for name in COMPARING if TABLE[name].network == "diffdis")
LABELLED = tuple(name for name, row in TABLE.items() if row.labelled)
WITH_HEAD = tuple(name for name, row in TABLE.items() if row.head)


def task_of(objectives: Sequence[str]) -> Objective:
  """Return what a run's objectives require together. Raise UserError: they are unknown or cannot be combined."""
  if not objectives:
    raise UserError(f"objectives is empty; choose among {', '.join(TABLE)}")
  for name in objectives:
    check_choice("objectives", name, TABLE)
  if len({*objectives}) < len(objectives):
    raise UserError(f"objectives is {', '.join(objectives)}; name each once")
  if len(objectives) == 1:
    return TABLE[objectives[0]]
  for name in objectives:
    if TABLE[name].alone:
      raise UserError(f"objectives: {name} is trained alone and cannot be combined with others")
  return JOINT
