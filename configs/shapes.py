"""DiffDis on rendered shapes: minutes on a CPU, no download.

  python -m diffdis_jax.train --config=configs/shapes.py:autoencoder --workdir=runs/shapes/autoencoder
  python -m diffdis_jax.train --config=configs/shapes.py --workdir=runs/shapes/diffdis \
      --config.init_from=runs/shapes/autoencoder

`make demo` runs both, evaluates and generates. 8 of the 64 colour-shape pairs are never trained on.
"""

from configs import common
from configs.sizes import small
from diffdis_jax.data.shapes import CLASSNAMES, TEMPLATES
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, autoencoder=False)
  config = common.base(small(), image_size=32)
  config.data.max_length = 16
  config.optim.update(
      schedule_kind="cosine", warmup_steps=50, weight_decay=0.01, b2=0.99, rates=dict(new=2e-3), ema_decay=0.998
  )
  config.text_diffusion.schedule = "scaled_linear"
  if args.autoencoder:
    config.objectives = ("reconstruction",)
    config.num_steps, config.batch_size = 500, 32
    config.optim.groups = ((".*", "new"),)
    config.save_every = 250
    return config

  config.num_steps = 2000
  config.save_every = 500
  zero_shot = lambda split: dict(
      task="zero_shot",
      data=dict(name="shapes", split=split, image_size=32, seed=1, num_images=896),
      classnames=CLASSNAMES,
      templates=TEMPLATES,
  )
  config.evals = dict(
      test=zero_shot("test"), unseen=zero_shot("unseen"), generated=dict(task="agreement", per_class=4)
  )
  config.train_evals = ("test", "unseen")
  config.eval_every = 500
  config.sample_prompts = tuple(f"a {name}" for name in CLASSNAMES)
  config.inference.update(generation_steps=30, generation_guidance=2.0)
  return config
