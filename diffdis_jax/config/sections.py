"""A config's other sections as frozen dataclasses: each field with its default, what it says, and its range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from diffdis_jax.errors import UserError, check_choice, check_number, check_regex

NUM_TIMESTEPS = 1000  # of both diffusion processes
# Stable Diffusion's code and the appendix call `scaled_linear` linear; `linear` here is evenly spaced in β.
SCHEDULES = ("scaled_linear", "linear", "cosine")
TARGETS = ("data", "noise")
DUPLICATE_CAPTIONS = ("mask", "negatives")
SCHEDULE_KINDS = ("constant", "cosine", "linear", "epoch_cosine")
CONTRASTIVE_BATCHES = ("whole", "microbatch")
MOMENTS = ("float32", "bfloat16")  # names, since a config is read before jax is imported
ANCHOR_CHOICES = ("linear_loss", "first", "random")
ANCHOR_IMAGES = ("val", "train50")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDiffusion:
  """The diffusion process of images; a config's `image_diffusion`.

  Attributes:
    schedule: name of the noise schedule, one of SCHEDULES.
    target, gamma: as TextDiffusion's; of images always these.
  """

  schedule: str = "scaled_linear"
  # No fields: Stable Diffusion's weights predict the noise of unscaled latents.
  target: ClassVar[str] = "noise"
  gamma: ClassVar[float] = 1.0

  def __post_init__(self) -> None:
    check_choice("schedule", self.schedule, SCHEDULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDiffusion:
  """The diffusion process of text queries; a config's `text_diffusion`.

  Attributes:
    schedule: name of the noise schedule, one of SCHEDULES.
    target: what the network predicts (appendix, Table 2), one of TARGETS.
    gamma: feature scaling γ of the data, above 0 and at most 1.
  """

  schedule: str = "cosine"
  target: str = "data"
  # Of 1,024 captions, e_t by itself would name its own in 21 % of the timesteps at γ = 1, in 6 % at 0.3.
  gamma: float = 0.3

  def __post_init__(self) -> None:
    check_choice("schedule", self.schedule, SCHEDULES)
    check_choice("target", self.target, TARGETS)
    # Above 0, since Algorithm 3 divides by it.
    check_number("gamma", self.gamma, above=0.0, at_most=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
  """A config's `loss` section.

  Attributes:
    ita_weight: λ of L = L_IG + λ L_ITA; 1 is not stated by the paper.
    condition_dropout: share of samples whose caption generation does not see, for guidance.
    image_dropout: share of samples whose image discrimination does not see, for guidance.
    kl_weight: weight of the KL term in an autoencoder's training.
    snr_gamma: γ of min-SNR weighting (Hang et al., 2023, arXiv:2303.09556): each sample's L_IG is multiplied by
      min(SNR, γ) / SNR, SNR = ᾱ / (1 − ᾱ) at its t_z; 5 is theirs, 0 for none. What is logged as L_IG has no weights.
      Not the paper's.
    noised_image_share: share of samples whose image discrimination sees as z_t under its sampled t_z, as generation
      does, in place of the clean image under `condition_timestep`. Not the paper's, whose Table 7 changes the clean
      image's t_z alone.
    dispersive_weight: weight of Dispersive Loss (Wang and He, 2025, arXiv:2506.09027) on the middle feature map of the
      generation pass: the InfoNCE-based variant with squared ℓ2 distances and temperature 1 (losses.dispersive); 0.5 is
      theirs, 0 for none. Not the paper's.
    duplicate_captions: what pairs with equal captions are to each other in a contrastive batch, one of
      DUPLICATE_CAPTIONS: left out of both softmaxes, or negatives, as in open_clip. Not stated by the paper.
  """

  ita_weight: float = 1.0
  condition_dropout: float = 0.1
  image_dropout: float = 0.1
  kl_weight: float = 1e-4
  snr_gamma: float = 0.0
  noised_image_share: float = 0.0
  dispersive_weight: float = 0.0
  duplicate_captions: str = "mask"

  def __post_init__(self) -> None:
    check_number("ita_weight", self.ita_weight, at_least=0.0)
    check_number("condition_dropout", self.condition_dropout, at_least=0.0, at_most=1.0)
    # Below 1: these rows leave the loss from texts to images, of which nothing would be left.
    check_number("image_dropout", self.image_dropout, at_least=0.0, below=1.0)
    check_number("noised_image_share", self.noised_image_share, at_least=0.0, at_most=1.0)
    for name in ("kl_weight", "snr_gamma", "dispersive_weight"):
      check_number(name, getattr(self, name), at_least=0.0)
    check_choice("duplicate_captions", self.duplicate_captions, DUPLICATE_CAPTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """A config's `optim` section. None of its values is stated by the paper for DiffDis.

  Attributes:
    groups: (regex, group); the first that is found in a parameter's path wins. Group `frozen` is not trained.
    rates: peak learning rate of each group but `frozen`.
    schedule_kind: how the rate changes after the warm-up, one of SCHEDULE_KINDS; `epoch_cosine` is VL-LTR's.
    warmup_steps: steps from rate 0 to the peak, linearly.
    final_fraction: of the peak, the rate at the end of a `cosine` or `linear` decay.
    epoch_steps: of `epoch_cosine` alone, steps of an epoch, after which the rate changes.
    warmup_rate: of `epoch_cosine` alone, the rate at which the warm-up begins.
    weight_decay: AdamW's weight decay.
    no_decay: regex of the paths without weight decay.
    b1: AdamW's decay of the first moment.
    b2: AdamW's decay of the second moment.
    eps: AdamW's ε, added to the root of the second moment.
    first_moment: dtype in which AdamW's first moment is kept, one of MOMENTS. The second stays f32: with b2 = 0.999 it
      changes by less than bf16 can tell, and would stand still.
    clip_norm: largest global norm of the gradient; 0 for no clipping.
    ema_decay: decay of the averaged weights, which a short run does not reach (`update_ema`); 0 keeps no average, and
      saves its four bytes a trained parameter.
    accumulate: microbatches that a step takes one after another, so that less has to be in memory at a time.
    contrastive_batch: `whole`, all microbatches of a step are one contrastive batch, and their number does not change
      the step's result (GradCache); `microbatch`, each is a batch of its own, with its own timesteps and noise. Those
      of reconstruction and long_tail_head, which compare no rows, have noise and mixing of their own either way.
    allow_uninitialized: regex of the frozen parameters that may be random; a run refuses to start with others.
    skip_bad_steps: how many of the last `skip_window` steps may be skipped. A step whose loss or gradient is not finite
      is, and changes nothing; beyond that number the run ends. 0 skips none: such a step ends the run, and none is
      measurably faster.
    skip_window: steps in which they are counted.
    skip_deviations: a step is skipped too if its gradient norm, before it is clipped, is more than this many standard
      deviations above the mean of the last hundred; 0 for no such limit.

  Raises:
    UserError: a value out of its range.
  """

  # The last rule takes all the rest: a parameter that no rule matches is refused.
  groups: Sequence[tuple[str, str]] = (("^autoencoder", "frozen"), (".*", "new"))
  rates: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(new=1e-3))
  schedule_kind: str = "constant"
  warmup_steps: int = 1000
  final_fraction: float = 0.0
  weight_decay: float = 1e-4
  # Decay pulls towards 0. A norm's scale belongs at 1, and logit_scale wherever the loss puts it.
  no_decay: str = r"bias$|norm|positions|logit_scale"
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float = 1.0
  ema_decay: float = 0.9999
  accumulate: int = 1
  contrastive_batch: str = "whole"
  allow_uninitialized: str = "^$"
  epoch_steps: int = 0
  warmup_rate: float = 0.0
  first_moment: str = "float32"
  skip_bad_steps: int = 10
  skip_window: int = 1000
  skip_deviations: float = 0.0

  def __post_init__(self) -> None:
    # Now, and not at the first parameter, which comes when the network is built.
    for regex in (*(regex for regex, _ in self.groups), self.no_decay):
      check_regex("groups or no_decay", regex)
    check_regex("allow_uninitialized", self.allow_uninitialized)
    # A rate of 0 is one: configs/emoji.py holds the temperature by it.
    for group, rate in self.rates.items():
      check_number(f"rates.{group}", rate, at_least=0.0)
    check_choice("schedule_kind", self.schedule_kind, SCHEDULE_KINDS)
    check_number("final_fraction", self.final_fraction, at_least=0.0, at_most=1.0)
    for name in ("warmup_steps", "weight_decay", "clip_norm"):
      check_number(name, getattr(self, name), at_least=0)
    # Below 1: Adam divides a moment by 1 − b^t.
    for name in ("b1", "b2", "ema_decay"):
      check_number(name, getattr(self, name), at_least=0.0, below=1.0)
    # Above 0: of a token that no caption has had yet, both moments are 0.
    check_number("eps", self.eps, above=0.0)
    check_number("accumulate", self.accumulate, at_least=1)
    check_choice("contrastive_batch", self.contrastive_batch, CONTRASTIVE_BATCHES)
    check_choice("first_moment", self.first_moment, MOMENTS)
    # That schedule divides by it, and counts the warm-up in whole epochs.
    check_number("epoch_steps", self.epoch_steps, at_least=1 if self.schedule_kind == "epoch_cosine" else 0)
    check_number("warmup_rate", self.warmup_rate, at_least=0.0)
    check_number("skip_bad_steps", self.skip_bad_steps, at_least=0)
    check_number("skip_window", self.skip_window, at_least=1)
    check_number("skip_deviations", self.skip_deviations, at_least=0.0)
    # A decay that is not there would be found out at the run's end.
    for name, kinds in (("final_fraction", ("cosine", "linear")), ("warmup_rate", ("epoch_cosine",))):
      if (value := getattr(self, name)) and self.schedule_kind not in kinds:
        raise UserError(
          f"{name} is {value}; it belongs to schedule_kind {' and '.join(kinds)}, and that is {self.schedule_kind}:"
          " leave it at 0, or give that one"
        )
    if self.epoch_steps and self.warmup_steps % self.epoch_steps:
      raise UserError(f"warmup_steps is {self.warmup_steps}; it must be whole epochs of {self.epoch_steps} steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTail:
  """A config's `long_tail` section. The values are VL-LTR's.

  Attributes:
    label_smoothing: ε of both stages' targets.
    distill_weight: β of stage 1's L = (1 − β) L_class + β L_distill.
    mixup, cutmix: a of their Beta(a, a) in stage 2; 0 leaves one out.
    cutmix_share: how often it is CutMix where both are there.
    anchor_choice: which sentences of a class stage 2 keeps, one of ANCHOR_CHOICES: those of the smallest linear loss
      (AnSS); or for comparison the first of its text, or random ones.
    anchor_images: what the linear loss is taken on, one of ANCHOR_IMAGES: the validation split, as VL-LTR's shipped
      configs do, or the first 50 training images of each class, as its README says.
    crop_pct: of the side of an image's central square that is seen there, 224 px of 256.

  Raises:
    UserError: a value out of its range.
  """

  label_smoothing: float = 0.1
  distill_weight: float = 0.5
  mixup: float = 0.8
  cutmix: float = 1.0
  cutmix_share: float = 0.5
  anchor_choice: str = "linear_loss"
  anchor_images: str = "val"
  crop_pct: float = 0.875

  def __post_init__(self) -> None:
    check_number("label_smoothing", self.label_smoothing, at_least=0.0, below=1.0)
    for name in ("distill_weight", "cutmix_share"):
      check_number(name, getattr(self, name), at_least=0.0, at_most=1.0)
    for name in ("mixup", "cutmix"):
      check_number(name, getattr(self, name), at_least=0.0)
    check_number("crop_pct", self.crop_pct, above=0.0, at_most=1.0)
    check_choice("anchor_choice", self.anchor_choice, ANCHOR_CHOICES)
    check_choice("anchor_images", self.anchor_images, ANCHOR_IMAGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
  """Which checkpoints stay; a config's `checkpoint` section.

  Attributes:
    keep_last: how many of the newest checkpoints.
    keep_every: checkpoints whose step is a multiple of this as well; 0 for none.
    keep_best: how many of those with the best `best_metric` as well; 0 for none.
    best_metric: EVALUATION/METRIC, of an evaluation in train_evals; needed by keep_best.
    best_is: whether the best is its "max" or its "min".

  Raises:
    UserError: a number out of its range, or a policy that contradicts itself.
  """

  keep_last: int = 2  # if the newest is damaged, the run resumes from the one before
  keep_every: int = 0
  keep_best: int = 0
  best_metric: str = ""
  best_is: str = "max"

  def __post_init__(self) -> None:
    check_number("keep_last", self.keep_last, at_least=1)
    for name in ("keep_every", "keep_best"):
      check_number(name, getattr(self, name), at_least=0)
    check_choice("best_is", self.best_is, ("max", "min"))
    if bool(self.keep_best) != bool(self.best_metric):
      raise UserError(
        f"keep_best is {self.keep_best} and best_metric {self.best_metric!r}; keep_best needs the name of a metric such"
        " as 'test/acc1'"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How to sample; a config's `inference` section.

  Attributes:
    steps: denoising steps of the text query. The paper uses one, from noise (Algorithm 3, Table 6).
    num_noise_samples: noise samples of the text query to average (not stated by the paper).
    guidance: scale s of the text query's guidance, whose null condition is the image z = 0; 1 is none.
    normalize_query: with several steps and target `data`, normalise each step's ê_0 before it is fed back.
      The process is defined on vectors of length 1, and the loss never sees a length (not stated by the paper). With
      one step, or with target `noise`, it changes nothing.
    generation_steps: DDIM steps of an image.
    generation_guidance: scale s = 1 + w of an image's guidance.

  Raises:
    UserError: a value out of its range.
  """

  steps: int = 1
  num_noise_samples: int = 1
  guidance: float = 1.0
  normalize_query: bool = True
  generation_steps: int = 50  # the paper states neither: these are the defaults of StableDiffusionPipeline
  generation_guidance: float = 7.5

  def __post_init__(self) -> None:
    check_number("steps", self.steps, at_least=1, at_most=1000)
    check_number("num_noise_samples", self.num_noise_samples, at_least=1)
    check_number("guidance", self.guidance, at_least=0.0)
    # At most 999: Stable Diffusion's steps begin at 1 (schedules.leading).
    check_number("generation_steps", self.generation_steps, at_least=1, at_most=999)
    check_number("generation_guidance", self.generation_guidance, at_least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
  """How the devices are arranged; a config's `mesh`. -1 takes those that the other axes leave (parallel/sharding.py).

  Attributes:
    data: parts of the batch, each with a copy of all parameters.
    fsdp: parts of the batch, and of every parameter.
    tensor: parts of the layers' widths.
  """

  # Not checked here, where nobody knows how many devices there are.
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
