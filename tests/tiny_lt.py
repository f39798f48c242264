"""Shrink replication/configs/shapes_lt.py until a step compiles and runs in seconds. Without `init=`, the network is
small, too.

It is also a config file for command lines: --config=tests/tiny_lt.py:stage=1,init=WORKDIR
"""

from ml_collections import ConfigDict

from replication import shapes_lt
from replication.configs import shapes_lt as shapes_lt_config
from tests import tiny, tiny_clip

shapes_lt.add()


def get_config(arg: str = "") -> ConfigDict:
  config = shapes_lt_config.get_config(arg)
  if "init=" not in arg:
    config.image_size, config.data.max_length = 16, 8
    (tiny_clip if "vision_encoder" in config.model else tiny).shrink(config.model)
    for section in config.evals.values():
      section.data.image_size = 16
  config.batch_size, config.num_steps = 16, 12
  config.optim.epoch_steps = 2
  config.optim.warmup_steps = min(2, config.optim.warmup_steps)
  config.log_every, config.save_every, config.eval_every = 1, 4, 12
  config.data.loader.update(num_threads=1, prefetch=2)
  if "head" in config.model:
    config.model.head.anchors = 3
  config.train_evals = ()
  return config
