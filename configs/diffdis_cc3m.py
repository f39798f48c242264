"""The paper's run: DiffDis on CC3M at 256 px, from Stable Diffusion v1-1's weights.

  python -m diffdis_jax.train --config=configs/diffdis_cc3m.py:path=DIR --workdir=DIR2 --config.init_from=SD_WORKDIR

Ablations, as the appendix numbers its tables:

  Table 2  gamma=1.0,target=noise      gamma=1.0,target=data
  Table 3  gamma=1.0,schedule=cosine   gamma=1.0,schedule=scaled_linear
  Table 4  fusion=False
  Table 5  modality_ffn=False          share_attention=False
  Table 7  condition_timestep=0        condition_timestep=999

Single tasks, as baselines of Table 6: objectives=generation is Stable Diffusion alone, objectives=discrimination.
The paper's figures for the model itself: FID 9.80, zero-shot ImageNet 25.92 %, mean R@1 33.60 %. Batch size, epochs and
rates are not stated by the paper for DiffDis; its CLIP baseline has batch 1024.
"""

from ml_collections import ConfigDict

from configs import common
from configs.sizes import sd_v1

CC3M_PAIRS = 2_905_954
BATCH = 1024
EPOCHS = 6


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(
    arg,
    path="",
    objectives="both",
    schedule="cosine",
    target="data",
    gamma=0.3,
    fusion=True,
    share_attention=True,
    modality_ffn=True,
    condition_timestep=1000,
  )
  config = common.base(sd_v1(), image_size=256)
  config.model.update(fusion=args.fusion, share_attention=args.share_attention, modality_ffn=args.modality_ffn)
  config.text_diffusion.update(schedule=args.schedule, target=args.target, gamma=args.gamma)
  config.condition_timestep = args.condition_timestep
  if args.objectives != "both":
    config.objectives = (args.objectives,)

  config.data.update(name="pairs", path=args.path, max_length=77)
  config.data.augment = dict(crop="random", crop_scale=(0.5, 1.0), flip=True)
  config.data.loader.update(num_threads=16, prefetch=16)
  config.batch_size = BATCH
  config.num_steps = EPOCHS * CC3M_PAIRS // BATCH
  config.model.remat = "full"
  config.optim.update(
    groups=(("^autoencoder|^text_encoder", "frozen"), ("^unet", "pretrained"), (".*", "new")),
    rates=dict(pretrained=1e-5, new=1e-4),
    warmup_steps=1000,
    weight_decay=1e-4,
    ema_decay=0.9999,
  )
  config.save_every = config.sample_every = config.eval_every = 2000
  config.checkpoint.keep_every = 10_000
  return config
