"""Times zero-shot classification of as many JPEG as ImageNet's validation set has, beside decoding them and no more.

  python -m tests.benchmark.reading [IMAGES]

The images are crops of two photographs at ImageNet's usual size, 500 x 375, and the network is the tests' smallest, so
that what is timed is whether decoding and the network overlap. Both ways use all cores.
"""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from diffdis_jax.config import Run
from diffdis_jax.data import sources
from diffdis_jax.evals import base
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.inference import Inference
from tests import tiny
from tests.models.networks import random_params
from tests.steps import network_of

DISTINCT, WIDTH, HEIGHT, CLASSES = 256, 500, 375, 10


class Photographs:
  """Records with the bytes of a JPEG and the name of a class."""

  def __init__(self, length: int):
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    self._length, self._files = length, []
    for i in range(DISTINCT):
      photograph = photographs[i % 2]
      top, left = (rng.integers(0, photograph.shape[axis] - side) for axis, side in ((0, HEIGHT), (1, WIDTH)))
      file = io.BytesIO()
      Image.fromarray(photograph[top : top + HEIGHT, left : left + WIDTH]).save(file, "JPEG", quality=95)
      self._files.append(file.getvalue())

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._files[index % DISTINCT], "label": f"class {index % CLASSES}"}


def main(length: int = 50_000) -> None:
  source, config = Photographs(length), tiny.get_config()
  network = network_of(config)
  inference, params = (
    Inference(network, Run.of(config).inference),
    random_params(network.shapes, seed=0),
  )
  sources.open_source = lambda **section: source
  evaluation = ZeroShot(data={}, num_images=DISTINCT)
  evaluation.run(inference, params)  # compiles

  begin = time.perf_counter()
  for images in base.chunks(source, np.arange(length), image_size=network.image_size):
    for start in range(0, len(images), inference.batch_size):
      images[np.arange(start, min(start + inference.batch_size, len(images)))]
  decoding = time.perf_counter() - begin

  begin = time.perf_counter()
  ZeroShot(data={}).run(inference, params)
  whole = time.perf_counter() - begin
  seconds = {"decoding": round(decoding, 1), "classification": round(whole, 1)}
  found = {"images": length, "seconds": seconds, "of_decoding": round(decoding / whole, 3)}
  json.dump(found, sys.stdout, indent=2)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
