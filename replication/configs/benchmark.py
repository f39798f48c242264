"""Configure Stable Diffusion v1's network at half its widths and 128 px, for timing.

  python -m replication benchmark --config=replication/configs/benchmark.py --out=benchmark.json

At this size arithmetic dominates, and three training states fit a laptop. Nothing was trained with it. Its measurements
are in replication/log/compilers.md.
"""

from ml_collections import ConfigDict

from configs import diffdis_cc3m


def get_config(arg: str = "") -> ConfigDict:
  config = diffdis_cc3m.get_config(arg)
  model = config.model
  model.update(dtype="float32", remat="none")
  model.unet.widths = tuple(width // 2 for width in model.unet.widths)
  model.autoencoder.widths = tuple(width // 2 for width in model.autoencoder.widths)
  model.text_encoder.update(width=384, num_heads=6, mlp_width=1536)
  model.alignment.update(width=384, num_heads=6)
  config.image_size = 128
  config.batch_size = 4
  return config
