"""CLIP on CC3M from scratch, the baseline of the paper's Table 1: two towers, two recipes.

  diffdis prepare_data cc3m --source=TARS --out=DIR
  diffdis train --config=clip_cc3m:model=vit_b32,recipe=paper,path=DIR,imagenet=DIR2 \
      --workdir=RUN

The paper's zero-shot ImageNet accuracy after 20 epochs, batch 1024, AdamW, learning rate 1e-3, weight decay 0.1:

  recipe=paper     random crop and RandAugment                 vit_b32 16.7 %   vit_l14 21.1 %
  recipe=openclip  open_clip's code: its crop, nothing else    vit_b32 14.7 %   vit_l14 19.1 %

Nothing was run at full size: `preflight` estimates 37 chip-hours for vit_l14 on v5p at batch 256, and at most 20 for
vit_b32 on v5e at batch 1024 (replication/log/compilers.md).

The rest is not stated by the paper: betas, epsilon, warm-up, schedule, crops, activation. The values here are
open_clip's, with two exceptions: the warm-up is shorter than its 10,000 steps, and the paper's recipe crops half of the
image or more and has 2 operations of magnitude 9. Both recipes have the exact GELU. They differ in the views of images,
and in duplicate captions, which open_clip's recipe takes as negatives.

CLIP overfits CC3M: its best checkpoint comes well before the last. After each epoch the data sets that
imagenet=DIR,coco=DIR,flickr=DIR,held_out=DIR name are measured, as in diffdis_cc3m.py, and the checkpoint of the
highest top-1 on ImageNet is kept beside the newest. The paper does not say which of them Table 1 reports: report both.

A smoke test for a laptop, 20 steps of small towers on rendered shapes, or with path=DIR on your own pairs:

  diffdis train --config=clip_cc3m:runlocal --workdir=RUN
"""

from ml_collections import ConfigDict

from diffdis_jax.configs import common
from diffdis_jax.data.shapes import CLASSNAMES, TEMPLATES
from diffdis_jax.models.sizes import clip_small, clip_vit_b32, clip_vit_l14

MODELS = {"vit_b32": clip_vit_b32, "vit_l14": clip_vit_l14}
RECIPES = {
  "paper": dict(crop="random_resized", crop_scale=(0.5, 1.0), randaugment_operations=2, randaugment_magnitude=9),
  "openclip": dict(crop="random_resized", crop_scale=(0.9, 1.0)),
}
BATCH = 1024
EPOCHS = 20
# The number of steps is rounded up, so that the last evaluation is at the last step.
EPOCH = -(-common.CC3M_PAIRS // BATCH)


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(
    arg,
    runlocal=False,
    model="vit_b32",
    recipe="paper",
    path="",
    imagenet="",
    imagenet_names="",
    coco="",
    flickr="",
    held_out="",
  )
  common.check_choices(args, model=MODELS, recipe=RECIPES)
  config = common.base(MODELS[args.model](), image_size=224)
  config.objectives = ("contrastive",)
  config.data.update(name="pairs", path=args.path, max_length=77)
  config.data.augment.update(RECIPES[args.recipe])
  config.data.loader.update(num_threads=16, prefetch=16)
  config.loss.duplicate_captions = "negatives" if args.recipe == "openclip" else "mask"
  for tower in (config.model.text_encoder, config.model.vision_encoder):
    tower.activation = "gelu"
  config.batch_size = BATCH
  config.num_steps = EPOCHS * common.CC3M_PAIRS // BATCH
  config.optim.update(
    groups=((".*", "new"),),
    rates=dict(new=1e-3),
    schedule_kind="cosine",
    warmup_steps=2000,
    weight_decay=0.1,
    no_decay=r"bias$|norm|positions|class_token|logit_scale",
    b1=0.9,
    b2=0.98,
    eps=1e-6,
    clip_norm=0.0,
    ema_decay=0.0,  # the baseline has no averaged weights
  )
  config.eval_every, config.save_every = EPOCH, EPOCH // 2
  if args.runlocal:
    run_local(config, args.path)
  config.evals.update(common.evaluations(args, common.own_size(config)))
  config.train_evals = tuple(config.evals)
  best = "imagenet" if args.imagenet else next((name for name in config.evals if name != "held_out"), "")
  if best in config.evals and config.evals[best].task == "zero_shot":
    config.checkpoint.update(keep_best=1, best_metric=f"{best}/acc1")
  return config


def run_local(config: ConfigDict, path: str) -> None:
  """Turn the config into a smoke test: small towers, 32 px, 20 steps."""
  activation = config.model.text_encoder.activation
  config.model = clip_small()
  for tower in (config.model.text_encoder, config.model.vision_encoder):
    tower.activation = activation
  config.image_size, config.batch_size, config.num_steps = 32, 16, 20
  config.data.max_length = config.model.text_encoder.max_length
  config.data.loader.update(num_threads=2, prefetch=4)
  config.optim.warmup_steps = 5
  config.log_every, config.save_every, config.eval_every = 5, 10, 10
  if not path:
    config.data.name = "shapes"
    data = dict(name="shapes", split="test", image_size=common.own_size(config), seed=1, num_images=128)
    config.evals.test = dict(task="zero_shot", data=data, classnames=CLASSNAMES, templates=TEMPLATES)
