"""Train on your own captioned pictures: fine-tune Stable Diffusion's weights, or train a small network from scratch.

  diffdis prepare_data files --source=PICTURES --out=DATA

Fine-tuning all of Stable Diffusion, on one GPU of 24 GB or more:

  diffdis import_weights --source=SD --out=SD_RUN
  diffdis train --config=own:path=DATA,from=SD_RUN,memory=24 --workdir=RUN

From scratch at 64 px, on a CPU too. Its autoencoder is trained first, in RUN/first:

  diffdis train --config=own:path=DATA --workdir=RUN

On L4, A10G and RTX 4090 it takes 17.9 GiB of 24 GB by XLA's buffer assignment, before convolutions' workspaces. So let
JAX take 90 % of the card instead of its default of 75 %: XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, which the launchers set.
This was not run.

Batch and steps follow from the number of pairs. The use of memory follows from memory=GB of one device: below 80 GB
there are no averaged weights and the first moment is in bf16. Rematerialisation is always on, and a step takes as many
images at a time as fit. `train` logs each choice, and --config.batch_size=N and the like override it. size=PIXELS is
the images' size, by default that of the run in `from`; half of it takes a quarter of the time.

The losses on split `val` are measured ten times, and the checkpoint with the lowest generation loss is kept beside the
newest: evaluate --best. None of these sizes and learning rates was tuned. Fine-tuning has those of diffdis_cc3m.py,
training from scratch those of emoji.py.

With 500 pictures of 512 to 1,024 px and cold caches, the autoencoder's first step came after 29 s of CPU time, 2 of
them for prepare_data. Each step took 1.4 s, and L1 was 0.12 after 60 steps.
"""

from __future__ import annotations

from absl import logging
from ml_collections import ConfigDict

from diffdis_jax.configs import common
from diffdis_jax.models.sizes import medium

SMALLEST, LARGEST = 8, 64  # batch size
PASSES = {"pretrained": 50, "scratch": 150, "autoencoder": 100}  # passes over the pairs, within the limits of STEPS
STEPS = {"pretrained": (500, 10_000), "scratch": (2000, 40_000), "autoencoder": (1500, 10_000)}
# GB of one device -> number of 256 px images in a microbatch; at 512 px it is a quarter. Compiled for 24 and 40 GB.
AT_A_TIME = {24: 8, 40: 16, 80: 32}
PROMPTS = 8
FEW = 300  # number of pictures


def get_config(arg: str = "") -> ConfigDict:
  # `from` is a keyword of Python, so it cannot be written as an argument.
  args = common.parse_arg(arg, **{"path": "", "from": "", "autoencoder": False, "memory": 24, "size": 0})
  if not args.path:
    raise ValueError("argument path=DIR is missing, the folder that prepare_data files wrote")
  pairs = common.num_pairs(args.path)
  config = common.base(medium(), image_size=64)
  scratch_network(config)
  start = "autoencoder" if args.autoencoder else "scratch"
  if args["from"]:
    if args.autoencoder:
      raise ValueError("from=DIR has an autoencoder; leave out one of autoencoder and from")
    start = take_start(config, args["from"])
  elif start == "scratch":
    size = f",size={args.size}" if args.size else ""
    config.init_from = f"config:own:path={args.path},autoencoder{size}"
  if args.size:
    config.image_size = args.size
  config.data.update(name="pairs", path=args.path)
  set_length(config, pairs, start)
  if args.autoencoder:
    to_autoencoder(config)
    return config
  if start == "pretrained":
    fine_tune(config, args.memory)
  else:
    train_from_scratch(config)
  config.sample_prompts = tuple(dict.fromkeys(common.read_prepared(args.path, "card.json").get("captions", ())))[
    :PROMPTS
  ]
  if pairs.get("val"):
    data = dict(name="pairs", path=args.path, split="val", image_size=common.own_size(config))
    config.evals = {"held_out": common.held_out_loss(data)}
    config.train_evals = ("held_out",)
    config.checkpoint.update(keep_best=1, best_metric="held_out/loss_generation", best_is="min")
  else:
    logging.info("own: no split val, so that overfitting is not seen; prepare_data files holds one out (--held_out)")
  return config


def scratch_network(config: ConfigDict) -> None:
  """Set a network for 64 px with latents of 16 x 16 and the text process, both as in emoji.py."""
  config.model.query_init = 0.0
  config.model.autoencoder.widths = (16, 32, 64)
  config.model.text_encoder.max_length = config.data.max_length = 32
  config.text_diffusion.update(schedule="scaled_linear", gamma=0.1)
  config.inference.update(num_noise_samples=4, generation_steps=50, generation_guidance=4.0)


def take_start(config: ConfigDict, path: str) -> str:
  """Take the network of the run in `path`. Return `scratch` if it trained only an autoencoder, else `pretrained`."""
  objectives = common.take_network(config, path, argument="from")["objectives"]
  if "vision_encoder" in config.model:
    raise ValueError(f"argument from={path} is a CLIP; it should be import_weights' folder of Stable Diffusion")
  return "scratch" if objectives == ("reconstruction",) else "pretrained"


def set_length(config: ConfigDict, pairs: dict[str, int], start: str) -> None:
  """Set the batch size and the number of steps for this number of pairs."""
  train = pairs["train"]
  if train < SMALLEST:
    raise ValueError(
      f"path={config.data.path} has {train} pairs in split train, fewer than the smallest batch, {SMALLEST}"
    )
  # With an eighth of the pairs, a pass has several steps; a power of two is divisible by devices and microbatches.
  size = SMALLEST
  while 2 * size <= min(LARGEST, train // 8):
    size *= 2
  least, maximum = STEPS[start]
  config.batch_size = size
  config.num_steps = max(least, min(maximum, PASSES[start] * train // size))
  config.optim.warmup_steps = min(1000, config.num_steps // 10)
  config.save_every = config.eval_every = config.sample_every = -(-config.num_steps // 10)
  held_out = f", {pairs['val']:,} held out" if pairs.get("val") else ""
  passes = config.num_steps * size / train
  if train < FEW and start != "autoencoder":
    logging.warning(
      "own: of fewer than %d pictures a network learns each by heart; look at what it draws beside them", FEW
    )
  logging.info(
    f"own: {train:,} pairs{held_out}: batch_size {size}, {config.num_steps:,} steps, {passes:.0f} passes over the pairs"
  )


def to_autoencoder(config: ConfigDict) -> None:
  """Train the autoencoder alone as emoji.py does, except for the views that show white borders."""
  config.objectives = ("reconstruction",)
  config.data.augment.update(crop="random", flip=True)
  config.optim.update(groups=((".*", "new"),), rates=dict(new=2e-3), ema_decay=0.998)
  config.optim.update(schedule_kind="cosine", weight_decay=0.05, b2=0.99)


def train_from_scratch(config: ConfigDict) -> None:
  """Train as emoji.py does, without its vocabulary and its two additions to the paper."""
  config.data.augment.crop = "random"
  config.loss.ita_weight = 0.3
  config.optim.update(
    groups=(("^autoencoder", "frozen"), (r"^unet\.(up|norm_out|conv_out)", "drawing"), (".*", "new")),
    rates=dict(new=5e-4, drawing=1e-3),
    schedule_kind="cosine",
    weight_decay=0.2,
    b2=0.99,
    ema_decay=0.998,
  )


def fine_tune(config: ConfigDict, memory: int) -> None:
  """Train the whole UNet and the parts that DiffDis adds, within this memory in GB."""
  fitting = [gigabytes for gigabytes in AT_A_TIME if gigabytes <= memory]
  if not fitting:
    raise ValueError(f"memory={memory} is too little: fine-tuning Stable Diffusion takes {min(AT_A_TIME)} GB")
  config.data.augment.crop = "random"  # no flip: captions may tell left from right
  config.model.update(dtype="bfloat16", remat="full")
  config.optim.update(
    groups=(("^autoencoder|^text_encoder", "frozen"), ("^unet", "pretrained"), (".*", "new")),
    rates=dict(pretrained=1e-5, new=1e-4),
    weight_decay=1e-4,
    ema_decay=0.999 if memory >= 80 else 0.0,
    first_moment="float32" if memory >= 80 else "bfloat16",
  )
  at_a_time = max(1, int(AT_A_TIME[fitting[-1]] * (256 / config.image_size) ** 2))
  at_a_time = min(config.batch_size, 2 ** (at_a_time.bit_length() - 1))
  config.optim.accumulate = config.batch_size // at_a_time
  logging.info(f"own: memory={memory} GB: {at_a_time} images of {config.image_size} px at a time")
