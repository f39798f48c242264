"""Define a config's smaller sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from diffdis_jax.config.section import Section, check_number, choice, field, number, regex
from diffdis_jax.errors import UserError

NUM_TIMESTEPS = 1000  # of both diffusion processes
# Stable Diffusion's code and the appendix call `scaled_linear` linear; `linear` here is evenly spaced in β. An
# extension may add others.
SCHEDULES = ["scaled_linear", "linear", "cosine"]
TARGETS = ("data", "noise")
DUPLICATE_CAPTIONS = ("mask", "negatives")
SCHEDULE_KINDS = ("constant", "cosine", "linear", "epoch_cosine")
CONTRASTIVE_BATCHES = ("whole", "microbatch")
MOMENTS = ("float32", "bfloat16")  # names, since a config is read before jax is imported


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDiffusion(Section):
  """The diffusion process of images, a config's `image_diffusion`."""

  schedule: str = choice("scaled_linear", SCHEDULES, help="noise schedule of the image's latent")
  # Not a field: Stable Diffusion's weights predict the noise of unscaled latents.
  target: ClassVar[str] = "noise"
  gamma: ClassVar[float] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDiffusion(Section):
  """The diffusion process of text queries, a config's `text_diffusion`."""

  schedule: str = choice("cosine", SCHEDULES, help="noise schedule of the text query")
  target: str = choice("data", TARGETS, help="what the network predicts (appendix, Table 2)")
  # Above 0, since Algorithm 3 divides by it. Among 1,024 captions, e_t alone would identify its own caption in 21 % of
  # the timesteps at γ = 1, and in 6 % at γ = 0.3.
  gamma: float = number(0.3, gt=0, le=1, help="feature scaling γ of the text query")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Section):
  """The `loss` section of a config."""

  # The paper does not state λ; 1 is this project's choice.
  ita_weight: float = number(1.0, ge=0, help="λ of L = L_IG + λ L_ITA")
  condition_dropout: float = number(0.1, ge=0, le=1, help="share of samples whose caption generation does not see")
  # Below 1: these rows leave the text-to-image loss, which would otherwise have no rows.
  image_dropout: float = number(0.1, ge=0, lt=1, help="share of samples whose image discrimination does not see")
  kl_weight: float = number(1e-4, ge=0, help="weight of the KL term in an autoencoder's training")
  # Not in the paper: Hang et al., 2023, arXiv:2303.09556. The logged L_IG is unweighted.
  snr_gamma: float = number(
    0.0, ge=0, help="γ of min-SNR weighting, which multiplies L_IG by min(SNR, γ) / SNR; 5 is customary, 0 is off"
  )
  # Not stated by the paper. open_clip takes duplicate captions as negatives.
  duplicate_captions: str = choice(
    "mask", DUPLICATE_CAPTIONS, help="pairs with equal captions in a contrastive batch: out of both softmaxes, or not"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(Section):
  """The `optim` section of a config. The paper states none of these values for DiffDis.

  Raises:
    UserError: a value is out of its range, or does not fit `schedule_kind`.
  """

  # The last rule should match everything else: a parameter that no rule matches is an error.
  groups: Sequence[tuple[str, str]] = regex(
    (("^autoencoder", "frozen"), (".*", "new")),
    help="(regex, group): the first found in a parameter's path wins; `frozen` is not trained",
  )
  # A rate of 0 is allowed, for example to fix a temperature.
  rates: Mapping[str, float] = number(dict(new=1e-3), ge=0, help="peak learning rate of each group but `frozen`")
  schedule_kind: str = choice(
    "constant", SCHEDULE_KINDS, help="how the rate changes after the warm-up; epoch_cosine is VL-LTR's"
  )
  warmup_steps: int = number(1000, ge=0, help="steps from rate 0 to the peak, linearly")
  final_fraction: float = number(
    0.0, ge=0, le=1, help="of the peak, the rate at the end of a `cosine` or `linear` decay"
  )
  weight_decay: float = number(1e-4, ge=0, help="AdamW's weight decay")
  # Weight decay pulls towards 0, but a norm's scale belongs near 1, and logit_scale wherever the loss puts it.
  no_decay: str = regex(r"bias$|norm|positions|logit_scale", help="regex of the paths without weight decay")
  # Below 1: Adam divides a moment by 1 − b^t.
  b1: float = number(0.9, ge=0, lt=1, help="AdamW's decay of the first moment")
  b2: float = number(0.999, ge=0, lt=1, help="AdamW's decay of the second moment")
  # Above 0: the two moments of a token that no caption has had yet are 0.
  eps: float = number(1e-8, gt=0, help="AdamW's ε, added to the root of the second moment")
  clip_norm: float = number(1.0, ge=0, help="largest global norm of the gradient; 0 for no clipping")
  # A short run does not reach this decay (`update_ema`).
  ema_decay: float = number(0.9999, ge=0, lt=1, help="decay of the averaged weights; 0 keeps no average")
  accumulate: int = number(1, ge=1, help="microbatches that a step takes one after another, which needs less memory")
  # With `whole`, the number of microbatches does not change the step's result (GradCache). With `microbatch`, each has
  # its own timesteps and noise. reconstruction and long_tail_head compare no rows, and always have their own.
  contrastive_batch: str = choice(
    "whole", CONTRASTIVE_BATCHES, help="what is one contrastive batch: all microbatches of a step, or each"
  )
  allow_uninitialized: str = regex(
    "^$", help="regex of the frozen parameters that may be random; a run refuses to start with others"
  )
  epoch_steps: int = number(0, ge=0, help="epoch_cosine: steps of an epoch, after which the rate changes")
  warmup_rate: float = number(0.0, ge=0, help="epoch_cosine: rate at which the warm-up begins")
  # The second moment stays f32: with b2 = 0.999 it changes by less than bf16 resolves, and would never change.
  first_moment: str = choice("float32", MOMENTS, help="dtype of AdamW's first moment")
  # A skipped step changes nothing. A run with more of them at a report or a save ends with code 1, as after a crash.
  skip_bad_steps: int = number(
    10, ge=0, help="how many steps in a row may be left out as their loss or gradient is not finite"
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    # `epoch_cosine` divides by it, and counts the warm-up in whole epochs.
    check_number("epoch_steps", self.epoch_steps, ge=1 if self.schedule_kind == "epoch_cosine" else 0)
    if self.epoch_steps and self.warmup_steps % self.epoch_steps:
      raise UserError(f"warmup_steps is {self.warmup_steps}; it must be whole epochs of {self.epoch_steps} steps")
    # Otherwise a missing decay would be noticed only at the end of the run.
    for name, kinds in (("final_fraction", ("cosine", "linear")), ("warmup_rate", ("epoch_cosine",))):
      if (value := getattr(self, name)) and self.schedule_kind not in kinds:
        raise UserError(
          f"{name} is {value}; it belongs to schedule_kind {' and '.join(kinds)}, and that is {self.schedule_kind}:"
          " leave it at 0, or give that one"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTail(Section):
  """The `long_tail` section of a config. The values are VL-LTR's."""

  label_smoothing: float = number(0.1, ge=0, lt=1, help="ε of both stages' targets")
  distill_weight: float = number(0.5, ge=0, le=1, help="β of stage 1's L = (1 − β) L_class + β L_distill")
  mixup: float = number(0.8, ge=0, help="a of mixup's Beta(a, a) in stage 2; 0 leaves it out")
  cutmix: float = number(1.0, ge=0, help="a of CutMix's Beta(a, a) in stage 2; 0 leaves it out")
  cutmix_share: float = number(0.5, ge=0, le=1, help="share of CutMix where both are there")
  crop_pct: float = number(0.875, gt=0, le=1, help="of the side of an image's central square, what is seen of it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPolicy(Section):
  """The choice of checkpoints that are kept, a config's `checkpoint` section.

  Raises:
    UserError: a number is out of its range, or the policy contradicts itself.
  """

  # Two: if the newest is damaged, the run resumes from the previous one.
  keep_last: int = number(2, ge=1, help="how many of the newest checkpoints stay")
  keep_every: int = number(0, ge=0, help="checkpoints whose step is a multiple of this stay as well; 0 for none")
  keep_best: int = number(0, ge=0, help="how many of those with the best `best_metric` stay as well; 0 for none")
  best_metric: str = field("", help="EVALUATION/METRIC of one of train_evals, for keep_best")
  best_is: str = choice("max", ("max", "min"), help="which value of best_metric is the best")

  def __post_init__(self) -> None:
    super().__post_init__()
    if bool(self.keep_best) != bool(self.best_metric):
      raise UserError(
        f"keep_best is {self.keep_best} and best_metric {self.best_metric!r}; keep_best needs the name of a metric such"
        " as 'test/acc1'"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Section):
  """The sampling of queries and images, a config's `inference` section."""

  # The paper uses one, from noise (Algorithm 3, Table 6).
  steps: int = number(1, ge=1, le=1000, help="denoising steps of the text query")
  num_noise_samples: int = number(1, ge=1, help="noise samples of the text query to average")
  guidance: float = number(1.0, ge=0, help="scale s of the text query's guidance, against the image z = 0; 1 is none")
  # The process is defined on vectors of length 1, and the loss ignores lengths. With one step, or with target `noise`,
  # this changes nothing. Not stated by the paper.
  normalize_query: bool = field(True, help="normalise each step's ê_0 before it is fed back, with target `data`")
  # The paper states neither; these are the defaults of StableDiffusionPipeline. At most 999, since the timesteps begin
  # at 1 (schedules.leading).
  generation_steps: int = number(50, ge=1, le=999, help="DDIM steps of an image")
  generation_guidance: float = number(7.5, ge=0, help="scale s = 1 + w of an image's guidance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape(Section):
  """The arrangement of the devices, a config's `mesh`."""

  # parallel/sharding.py checks these fields, since the number of devices is not known here.
  data: int = field(-1, help="parts of the batch, each with a copy of all parameters; -1: the other devices")
  fsdp: int = field(1, help="parts of the batch, and of every parameter")
  tensor: int = field(1, help="parts of the layers' widths")
