"""Describe the three models of the paper's Table 6, which `benchmark table6` times in turns.

  diffdis benchmark table6 --config=table6 --out=table6.json

At full size these are CLIP-L/14 at 224 px, and Stable Diffusion and DiffDis at 256 px, with `batch=N` images in all.
small=True takes the networks of `runlocal` at 32 px, for a laptop. The paper's hours for CLIP are those of 20 epochs of
CC3M. It does not state the epochs of the others; here they are those of configs/diffdis_cc3m.py.

Nothing was run at full size; small=True is a smoke test.
"""

from ml_collections import ConfigDict

from diffdis_jax.configs import clip_cc3m, common, diffdis_cc3m


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, small=False, batch=16)
  size = ",runlocal" if args.small else ""
  models = ConfigDict(
    dict(
      clip=clip_cc3m.get_config(f"model=vit_l14{size}"),
      stable_diffusion=diffdis_cc3m.get_config(f"objectives=generation{size}"),
      diffdis=diffdis_cc3m.get_config(size.removeprefix(",")),
    )
  )
  for config in models.values():
    config.batch_size = args.batch
    config.inference.generation_steps = 50
  epochs = dict(clip=clip_cc3m.EPOCHS, stable_diffusion=diffdis_cc3m.EPOCHS, diffdis=diffdis_cc3m.EPOCHS)
  return ConfigDict(
    dict(
      models=models,
      mesh=dict(data=-1, fsdp=1, tensor=1),
      trained={name: count * common.CC3M_PAIRS for name, count in epochs.items()},  # images of the whole training
      generated=30_000,  # MSCOCO captions; the paper does not say how many
      classified=50_000,  # ImageNet's validation images
    )
  )
