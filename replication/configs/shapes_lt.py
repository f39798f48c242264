"""Long-tailed recognition on a laptop: rendered shapes, 200 to 2 training images a class, and sentences that distract.

  python -m replication train --config=replication/configs/shapes_lt.py:stage=1,init=START --workdir=STAGE1
  python -m replication train --config=replication/configs/shapes_lt.py:stage=2,init=STAGE1 --workdir=STAGE2
  python -m replication evaluate --workdir=STAGE2 --tasks=long_tail --out=F.json

START is a run of configs/shapes.py, either network, trained shorter than there: --config.num_steps=300 for DiffDis
after its autoencoder, or for CLIP with :objectives=contrastive. seed=N also decides which classes are rare.

Without init= the network is the one that such a start has.

Result of three seeds, with a wider small network than now: top-1 61.0 ± 7.1 % for DiffDis and 40.4 ± 3.8 % for CLIP, on
low classes 49.2 ± 5.7 and 20.4 ± 5.7 % (replication/log/shapes.md). Hours were not recorded.

The classes are rare in these two stages only: START has seen some 257 images with captions of each of 56 of the 64
classes, 27 of the 32 low ones (at most 20 training images) among them. stage=0 makes a START that has seen no image of
the low classes:

  python -m replication train --config=replication/configs/shapes_lt.py:stage=0,autoencoder --workdir=AUTOENCODER
  python -m replication train --config=replication/configs/shapes_lt.py:stage=0 --workdir=START \
      --config.init_from=AUTOENCODER

For CLIP take the second line only, with backbone=clip. For comparison, all_classes in both lines makes a start that has
seen all classes, in as many images.
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
  defaults = dict(stage=1, backbone="diffdis", init="", seed=0, autoencoder=False, all_classes=False)
  args = common.parse_arg(arg, **defaults)
  common.check_choices(args, backbone=BACKBONES, stage=(0, 1, 2))
  if args.autoencoder and (args.stage or args.backbone == "clip"):
    raise ValueError("argument autoencoder is of stage=0 with backbone=diffdis; the other runs have theirs from it")
  if args.all_classes and args.stage:
    raise ValueError("argument all_classes is of stage=0; the other stages have all classes")
  if not args.stage:
    if args.init:
      raise ValueError(f"argument init is of stages 1 and 2; stage=0 takes it as --config.init_from={args.init}")
    return start(args)
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


def start(args: ConfigDict) -> ConfigDict:
  """Return the run that stage 1 starts from: a short run of configs/shapes.py. Its pairs have none of the low classes,
  or as many of them as of all others."""
  config = shapes.get_config("autoencoder" if args.autoencoder else OBJECTIVES[args.backbone])
  config.seed = args.seed
  # No caption_fields are needed: a record's one caption is its class.
  split = "start_all" if args.all_classes else "start"
  config.data.update(name="shapes_lt", split=split, seed=args.seed, caption_fields=())
  # The evaluations of configs/shapes.py measure the pairs that it holds out itself.
  config.evals, config.train_evals = {}, ()
  if not args.autoencoder:
    config.num_steps = config.save_every = config.sample_every = 300
  config.sample_prompts = CLASSNAMES if args.backbone == "diffdis" and not args.autoencoder else ()
  return config
