"""Shrink configs/shapes.py until a step compiles and runs in seconds: the same code with smaller numbers.

It is also a config file for command lines: --config=tests/tiny.py[:autoencoder]
"""

from ml_collections import ConfigDict

from configs import shapes


def get_config(arg: str = "") -> ConfigDict:
  config = shapes.get_config(arg)
  config.image_size = 16
  config.batch_size = 16
  config.num_steps = 8
  config.log_every = config.save_every = config.eval_every = config.sample_every = 4
  shrink(config.model)
  config.data.max_length = 8
  config.data.caption_fields = ()  # so that a test may use other data
  config.data.loader.update(num_threads=1, prefetch=2)
  for section in config.evals.values():
    if "data" in section:
      section.data.update(image_size=16, num_images=64)
  # So that a test may start a run without a checkpoint.
  config.optim.allow_uninitialized = "^autoencoder|^text_encoder.tokens"
  config.train_evals = ()
  config.sample_prompts = ()
  config.inference.update(generation_steps=4)
  return config


def shrink(model: ConfigDict) -> None:
  """Shrink a model for 16 px and 8 tokens."""
  model.unet.update(widths=(8,), attention=(True,), depth=1, num_heads=2, groups=4)
  model.alignment.update(width=16, depth=1, num_heads=2)
  model.text_encoder.update(max_length=8, width=16, depth=1, num_heads=2, mlp_width=32)
  model.autoencoder.update(widths=(8,), patch=4, latent_channels=4, groups=4)
