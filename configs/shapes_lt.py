"""Long-tailed recognition on a laptop: rendered shapes, 200 to 2 training images a class, and sentences that distract.

  diffdis train --config=shapes_lt:stage=1,init=START --workdir=STAGE1
  diffdis train --config=shapes_lt:stage=2,init=STAGE1 --workdir=STAGE2
  diffdis evaluate --workdir=STAGE2 --tasks=long_tail --out=F.json

START is a run of configs/shapes.py, either network, trained shorter than there: --config.num_steps=300 for DiffDis
after its autoencoder, or for CLIP with :objectives=contrastive. seed=N also decides which classes are rare.

Without init= the network is the one that such a start has.

Result of three seeds, with a wider small network than now: top-1 61.0 ± 7.1 % for DiffDis and 40.4 ± 3.8 % for CLIP, on
low classes 49.2 ± 5.7 and 20.4 ± 5.7 % (replication/log/shapes.md). Hours were not recorded.

The classes are rare in these two stages only: START has seen some 257 images with captions of each of 56 of the 64
classes, 27 of the 32 low ones (at most 20 training images) among them. A START that has seen no image of the low
classes: replication/configs/shapes_lt.py.
"""

from ml_collections import ConfigDict

from diffdis_jax.configs import common, shapes
from diffdis_jax.configs.places_lt import first_stage, second_stage
from diffdis_jax.data.shapes import CLASSNAMES
from diffdis_jax.models.sizes import clip_small, small

EPOCH = 44  # steps of 64 images, of 2,810
BACKBONES = {"diffdis": small, "clip": clip_small}
OBJECTIVES = {"diffdis": "", "clip": "objectives=contrastive"}  # arguments of configs/shapes.py


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, stage=1, backbone="diffdis", init="", seed=0)
  common.check_choices(args, backbone=BACKBONES, stage=(1, 2))
  config = common.base(BACKBONES[args.backbone](), image_size=32)
  if args.init:
    data = common.take_start(config, args)["data"]
    # Otherwise its rare classes would be frequent here, and accuracy on low classes would have the wrong name.
    if data.get("name") == "shapes_lt" and data["seed"] != args.seed:
      raise ValueError(
        f"argument init={args.init} is a run of seed={data['seed']}, whose rare classes are not those of"
        f" seed={args.seed}; give seed={data['seed']}"
      )
  else:
    common.put_network(config, shapes.get_config(OBJECTIVES[args.backbone]).to_dict())
  config.seed = args.seed
  config.data.update(name="shapes_lt", seed=args.seed)
  config.batch_size, config.num_steps = 64, 10 * EPOCH
  config.optim.update(epoch_steps=EPOCH, weight_decay=0.05)
  if args.stage == 1:
    first_stage(config, rate=2e-4, text=True)
    config.optim.update(warmup_steps=EPOCH, warmup_rate=2e-5)
  else:
    second_stage(config, classes=len(CLASSNAMES), anchors=64, visual=1e-3, language=1e-4)
  config.long_tail.crop_pct = 1.0
  config.log_every, config.save_every, config.eval_every = EPOCH, 5 * EPOCH, config.num_steps
  data = dict(name="shapes_lt", split="test", image_size=common.own_size(config), seed=args.seed)
  config.evals.test = dict(task="long_tail", data=data, crop_pct=1.0)
  config.train_evals = ("test",)
  return config
