"""Train long-tailed recognition, the paper's Table 8: VL-LTR (Tian et al., ECCV 2022) on Places-LT or ImageNet-LT.

  diffdis train --config=places_lt:stage=1,path=PLACES,init=START --workdir=STAGE1
  diffdis train --config=places_lt:stage=2,path=PLACES,init=STAGE1 --workdir=STAGE2
  diffdis evaluate --workdir=STAGE2 --tasks=long_tail --out=F.json

START is any run that embeds images and texts: DiffDis, CLIP, or an imported CLIP. Its config gives the network, which
here computes in bf16 with full rematerialisation. Without init=, as for preflight, backbone=diffdis|clip takes one of
the paper's two: DiffDis at 256 px or CLIP ViT-L/14 at 224 px. PLACES holds the published lists, the text corpus and the
images (docs/long_tail.md). set=imagenet is ImageNet-LT.

Stage 1 is class-wise contrast and distillation from START; stage 2 the language-guided head on the frozen backbone. All
learning rates are VL-LTR's for ViT-B/16; the paper states none for DiffDis or ViT-L/14. text=False freezes the text
tower in stage 1.

It was not run at full size. For stage 1 of DiffDis `preflight` estimates 5 chip-hours on 16 v5e by cycles, which is an
underestimate, and at least 0.7 on 8 H100 (replication/log/compilers.md).

The paper's figures (Image-, Text-, KNN-Acc after stage 1, Acc after stage 2): CLIP-L/14 31.4 / 38.1 / 35.5, 40.5 %;
DiffDis 37.0 / 52.5 / 40.5, 44.4 %.
"""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from diffdis_jax.config.data import ClassSampling
from diffdis_jax.config.sections import LongTail
from diffdis_jax.configs import common
from diffdis_jax.models.sizes import clip_vit_l14, sd_v1

BATCH = 1024
EPOCHS, WARMUP = 50, 5
ANCHORS = 64


class LongTailedSet(NamedTuple):
  """The training images and classes of a data set, and the learning rates that differ between data sets."""

  name: str
  images: int
  classes: int
  backbone: float  # of stage 1
  visual: float  # of stage 2


SETS = {
  "places": LongTailedSet("places_lt", 62_500, 365, 1e-5, 5e-5),
  "imagenet": LongTailedSet("imagenet_lt", 115_846, 1000, 3.5e-5, 1e-3),
}
BACKBONES = {"diffdis": (sd_v1, 256), "clip": (clip_vit_l14, 224)}


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, stage=1, backbone="diffdis", set="places", path="", init="", text=True)
  common.check_choices(args, backbone=BACKBONES, set=SETS, stage=(1, 2))
  model, image_size = BACKBONES[args.backbone]
  config = common.base(model(), image_size=image_size)
  if args.init:
    common.take_start(config, args)
  # Set these after taking the start's network: an import computes in f32 and stores all activations, too much for these
  # batches.
  config.model.update(dtype="bfloat16", remat="full")
  chosen_set = SETS[args.set]
  epoch = chosen_set.images // BATCH
  config.batch_size, config.num_steps = BATCH, EPOCHS * epoch
  config.data.update(name=chosen_set.name, path=args.path)
  config.data.augment.update(
    crop="random_resized",
    crop_scale=(0.08, 1.0),
    flip=True,
    randaugment_operations=2,
    randaugment_kind="timm",
    randaugment_deviation=0.5,
    erase=0.25,
  )
  config.data.loader.update(num_threads=16, prefetch=16)
  # Split weights, moments and the frozen start over all chips: unsplit, they do not fit on a v5e beside 64 images.
  config.mesh.update(data=1, fsdp=-1)
  config.optim.update(epoch_steps=epoch, weight_decay=0.05)
  if args.stage == 1:
    first_stage(config, rate=chosen_set.backbone, text=args.text)
    config.optim.update(warmup_steps=WARMUP * epoch, warmup_rate=1e-6)
  else:
    second_stage(config, classes=chosen_set.classes, anchors=ANCHORS, visual=chosen_set.visual, language=1e-6)
  config.log_every, config.save_every, config.eval_every = epoch, 5 * epoch, config.num_steps
  data = dict(name=chosen_set.name, path=args.path, split="test", image_size=common.own_size(config))
  config.evals.test = dict(task="long_tail", data=data, crop_pct=0.875)
  config.train_evals = ("test",)
  return config


def long_tailed(config: ConfigDict) -> None:
  """Set the fields that both stages share for all long-tailed sets."""
  config.sample_posterior = False  # as in the embedding of images
  sentences = "class_contrastive" in config.objectives
  config.data.sampling = dataclasses.asdict(ClassSampling(sentences=sentences))
  config.long_tail = dataclasses.asdict(LongTail())
  # One-dimensional parameters have no weight decay, but the scalar scale of the logits has.
  config.optim.update(schedule_kind="epoch_cosine", no_decay=r"bias$|norm|class_token", clip_norm=0.0, ema_decay=0.0)


def first_stage(config: ConfigDict, *, rate: float, text: bool) -> None:
  """Train everything except the autoencoder, and the text tower unless it is frozen."""
  config.objectives = ("class_contrastive",)
  long_tailed(config)
  config.optim.groups = (("^autoencoder" if text else "^autoencoder|^text_encoder", "frozen"), (".*", "backbone"))
  config.optim.rates = dict(backbone=rate)


def second_stage(config: ConfigDict, *, classes: int, anchors: int, visual: float, language: float) -> None:
  """Train only a new head: its visual branch, and the attention of its language branch."""
  config.objectives = ("long_tail_head",)
  long_tailed(config)
  config.model.head = dict(classes=classes, anchors=anchors)
  config.optim.groups = (
    (r"^head\.fc", "visual"),
    (r"^head\.(q|k|query_norm|key_norm)\.", "language"),
    (".*", "frozen"),
  )
  config.optim.rates = dict(visual=visual, language=language)
  config.optim.warmup_steps = 0
