"""What a run may be trained for: one table of what each objective asks of network, data, loss and evaluation."""

from __future__ import annotations

import dataclasses

from diffdis_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """A row of the table.

  Attributes:
    trains: what it trains, where no other may stand beside it; empty where another may.
    network: what is built for it: `diffdis`, its `autoencoder` alone, `clip`, or `either` of the two whole ones.
    generates: the network makes images of captions, and has a UNet with an up path.
    aligned: the network compares images with texts.
    needs_images: it cannot be trained on stored latents.
    contrasts: its loss compares the rows of a batch with each other.
    grad_cache: a batch in several microbatches may be one whole (training/gradcache.py).
    labelled: its batches have labels, as a long-tailed set's have; the config has `long_tail` and `data.sampling`.
    sentences: of such a batch, whether each image has a sentence of its class.
    head: the model has a head, whose branches are all that is trained.
    teacher: the state has the parameters as they were at the start, too.
    starts_from: what `init_from` has to name; empty where it may be left out.
    follows: the objective that the run in `init_from` was trained for, to its end.
  """

  trains: str = ""
  network: str = "diffdis"
  generates: bool = False
  aligned: bool = False
  needs_images: bool = False
  contrasts: bool = False
  grad_cache: bool = False
  labelled: bool = False
  sentences: bool = False
  head: bool = False
  teacher: bool = False
  starts_from: str = ""
  follows: str = ""


TABLE = {
  # The two of the paper, the only ones that may stand side by side.
  "generation": Objective(generates=True, grad_cache=True),
  "discrimination": Objective(aligned=True, contrasts=True, grad_cache=True),
  # The autoencoder of a run from scratch; the paper takes Stable Diffusion's.
  "reconstruction": Objective(trains="the autoencoder", network="autoencoder", needs_images=True),
  # CLIP, the baseline of the paper's Table 1. Its image encoder reads pixels.
  "contrastive": Objective(
    trains="CLIP's two towers", network="clip", aligned=True, needs_images=True, contrasts=True, grad_cache=True
  ),
  # Stages 1 and 2 of VL-LTR's long-tailed recognition (paper appendix, Table 8).
  "class_contrastive": Objective(
    trains="an image and a text side",
    network="either",
    aligned=True,
    needs_images=True,
    contrasts=True,
    labelled=True,
    sentences=True,
    teacher=True,
    starts_from="a trained DiffDis or CLIP, which is stage 1's teacher too",
  ),
  "long_tail_head": Objective(
    trains="the language-guided head",
    network="either",
    aligned=True,
    needs_images=True,
    labelled=True,
    head=True,
    starts_from="stage 1's workdir",
    follows="class_contrastive",
  ),
}
# What some measurements and tools take: a run with one of these.
GENERATIVE = tuple(name for name, row in TABLE.items() if row.generates)
ALIGNED = tuple(name for name, row in TABLE.items() if row.aligned)
COMPARING = tuple(name for name, row in TABLE.items() if row.aligned and not row.labelled)
DENOISING = tuple(name for name in COMPARING if TABLE[name].network == "diffdis")
LABELLED = tuple(name for name, row in TABLE.items() if row.labelled)
WITH_HEAD = tuple(name for name, row in TABLE.items() if row.head)


class Objectives(tuple[str, ...]):
  """The names of a run's objectives, and what they ask for together: a property that is called as a field of Objective
  says whether any of them has it, or for `grad_cache` all."""

  __slots__ = ()

  def check(self) -> None:
    """Raises UserError for objectives that are unknown or do not go together."""
    if not self:
      raise UserError(f"objectives is empty; choose among {', '.join(TABLE)}")
    # All names before any row, which an unknown name does not have.
    for name in self:
      check_choice("objectives", name, TABLE)
      if self.count(name) > 1:
        raise UserError(f"objectives names {name} twice; name each once")
    for name in self:
      if TABLE[name].trains and len(self) > 1:
        raise UserError(f"objectives: {name} trains {TABLE[name].trains} alone and cannot be combined with others")

  @property
  def rows(self) -> tuple[Objective, ...]:
    """Of the table."""
    return tuple(TABLE[name] for name in self)

  @property
  def first(self) -> Objective:
    """The only one, unless it is one that stands beside others."""
    return TABLE[self[0]]

  @property
  def is_autoencoder(self) -> bool:
    """The network is the autoencoder alone."""
    return self.first.network == "autoencoder"

  @property
  def is_clip(self) -> bool:
    """CLIP's own: not those of long-tailed recognition, which take CLIP or DiffDis."""
    return self.first.network == "clip"

  @property
  def generates(self) -> bool:
    return any(row.generates for row in self.rows)

  @property
  def aligned(self) -> bool:
    return any(row.aligned for row in self.rows)

  @property
  def needs_images(self) -> bool:
    return any(row.needs_images for row in self.rows)

  @property
  def contrasts(self) -> bool:
    return any(row.contrasts for row in self.rows)

  @property
  def grad_cache(self) -> bool:
    # All: a batch goes through GradCache or it does not.
    return all(row.grad_cache for row in self.rows)

  @property
  def labelled(self) -> bool:
    return any(row.labelled for row in self.rows)

  @property
  def teacher(self) -> bool:
    return any(row.teacher for row in self.rows)
