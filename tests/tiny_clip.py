"""Shrink configs/clip_cc3m.py until a step compiles and runs in seconds: the same code with smaller numbers.

It is also a config file for command lines: --config=tests/tiny_clip.py[:recipe=openclip]
"""

from ml_collections import ConfigDict

from configs import clip_cc3m


def get_config(arg: str = "") -> ConfigDict:
  config = clip_cc3m.get_config(f"runlocal,{arg}" if arg else "runlocal")
  config.image_size = config.evals.test.data.image_size = 16
  config.num_steps, config.data.max_length = 8, 8
  config.log_every = config.save_every = config.eval_every = 4
  config.evals.test.data.num_images = 64
  shrink(config.model)
  config.data.loader.update(num_threads=1, prefetch=2)
  return config


def shrink(model: ConfigDict) -> None:
  """Shrink a model for 16 px and 8 tokens."""
  tower = dict(width=16, depth=2, num_heads=2, mlp_width=32, projection=12)
  model.text_encoder.update(max_length=8, **tower)
  model.vision_encoder.update(image_size=16, patch=4, **tower)
