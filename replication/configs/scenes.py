"""Train DiffDis on rendered scenes of two shapes and a relation, such as "a red star left of a blue ring".

  python -m replication train --config=replication/configs/scenes.py:autoencoder --workdir=runs/scenes/autoencoder
  python -m replication train --config=replication/configs/scenes.py --workdir=runs/scenes/diffdis \
      --config.init_from=runs/scenes/autoencoder
  python -m replication evaluate --workdir=runs/scenes/diffdis \
      --tasks=choice,retrieval,generation_accuracy --out=scenes.json

It takes minutes and no download. The order of words matters here: a bag of words is right on half of the captions with
swapped colours or objects. 16 of the 64 colour-shape pairs are never trained on.

`choice` is the accuracy among five captions, of which four are false; retrieval is among 1,024 different captions;
generation_accuracy is the share of generated images on which both colours, both shapes and the relation are right. All
are measured on `val` and `val_unseen`, which are for choosing settings, or with measured=test on `test` and
`test_unseen`.

These lines train generation alone, discrimination alone, CLIP, which needs no autoencoder, and both after generation:

  ... --config=.../scenes.py:objectives=generation --config.init_from=runs/scenes/autoencoder
  ... --config=.../scenes.py:objectives=discrimination --config.init_from=runs/scenes/autoencoder
  ... --config=.../scenes.py:objectives=contrastive
  ... --config=.../scenes.py --config.init_from=runs/scenes/generation

E10 has three arguments: `query_use` also measures the task of that name, `constant_query` makes a network that cannot
read e_t, and `two_captions` trains on each image with two of its captions in one batch.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, shapes
from replication.scenes import scenes_of

OBJECTIVES = ("both", "generation", "discrimination", "contrastive")
PAIRS = ("", "_unseen")


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(
    arg, autoencoder=False, objectives="both", measured="val", query_use=False, constant_query=False, two_captions=False
  )
  common.check_choices(args, objectives=OBJECTIVES, measured=("val", "test"))
  # Network, learning rates and frozen parts are the same as for the shapes.
  config = shapes.get_config("autoencoder" if args.autoencoder else "")
  config.data.update(name="scenes", caption_fields=())
  if args.autoencoder:
    return config
  config.num_steps, config.batch_size = 900, 64
  config.optim.weight_decay = 0.05
  # With the shapes' weight of 0.01, 900 joint steps learned neither shapes nor relations; with 0.1 they did
  # (replication/protocol.md, pilot runs).
  config.loss.ita_weight = 0.1
  config.save_every = config.eval_every = config.sample_every = 450
  config.sample_prompts = tuple(scene.caption() for pairs in PAIRS for scene in scenes_of(f"val{pairs}")[:32])
  config.evals, config.train_evals = {}, ()
  if args.objectives == "contrastive":
    shapes.to_clip(config)
  elif args.objectives != "both":
    config.objectives = (args.objectives,)
  add_evaluations(config, args.measured)
  if args.query_use:
    data = dict(name="scenes", split=f"{args.measured}_unseen", image_size=common.own_size(config), seed=1)
    config.evals["query_use"] = dict(task="query_use", data=data, label_field="caption", templates=("{}",))
  if args.constant_query:
    config.model.text_stream = dict(kind="constant")
  if args.two_captions:
    config.data.name = "scenes_twice"
  return config


def add_evaluations(config: ConfigDict, measured: str) -> None:
  """Add the evaluations for the run's objectives, on this split and on its unseen pairs."""

  def data(split: str) -> dict[str, Any]:
    return dict(name="scenes", split=split, image_size=common.own_size(config), seed=1)

  for split in (f"{measured}{pairs}" for pairs in PAIRS):
    if config.objectives != ("generation",):
      config.evals[split] = dict(task="choice", data=data(f"choice_{split}"))
      config.evals[f"{split}_retrieval"] = dict(task="retrieval", data=data(split), caption_field="caption")
      if measured == "val":  # no choice depends on the test split, so it is measured once, at the end
        config.train_evals = (*config.train_evals, split)
    if "generation" in config.objectives:
      config.evals[f"{split}_generated"] = dict(task="generation_accuracy", data=data(split))
  config.evals["held_out"] = common.held_out_loss(data("val"))
  config.train_evals = (*config.train_evals, "held_out")
