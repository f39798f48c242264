"""The shapes_lt of the package with stage=0 before it: a start that has seen no image of the low classes.

  diffdis train --config=replication/configs/shapes_lt.py:stage=0,autoencoder --workdir=AUTOENCODER
  diffdis train --config=replication/configs/shapes_lt.py:stage=0 --workdir=START --config.init_from=AUTOENCODER

For CLIP take the second line only, with backbone=clip. For comparison, all_classes in both lines makes a start that has
seen all classes, in as many images. Stages 1 and 2 with init=START are those of the package.
"""

from ml_collections import ConfigDict

from diffdis_jax.configs import common, shapes, shapes_lt
from diffdis_jax.data.shapes import CLASSNAMES


def get_config(arg: str = "") -> ConfigDict:
  defaults = dict(stage=1, backbone="diffdis", init="", seed=0, autoencoder=False, all_classes=False)
  args = common.parse_arg(arg, **defaults)
  common.check_choices(args, backbone=shapes_lt.BACKBONES, stage=(0, 1, 2))
  if args.autoencoder and (args.stage or args.backbone == "clip"):
    raise ValueError("argument autoencoder is of stage=0 with backbone=diffdis; the other runs have theirs from it")
  if args.all_classes and args.stage:
    raise ValueError("argument all_classes is of stage=0; the other stages have all classes")
  if args.stage:
    given = (entry for entry in arg.split(",") if not entry.startswith(("autoencoder", "all_classes")))
    return shapes_lt.get_config(",".join(given))
  if args.init:
    raise ValueError(f"argument init is of stages 1 and 2; stage=0 takes it as --config.init_from={args.init}")
  return start(args)


def start(args: ConfigDict) -> ConfigDict:
  """Return the run that stage 1 starts from: a short run of configs/shapes.py. Its pairs have none of the low classes,
  or as many of them as of all others."""
  config = shapes.get_config("autoencoder" if args.autoencoder else shapes_lt.OBJECTIVES[args.backbone])
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
