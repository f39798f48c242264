"""FID and KID of images that are generated for a data set's captions, against real ones.

The paper reports "FID score on MSCOCO image generation" and nothing of how; what stands here after U-ViT is said so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from diffdis_jax.common import buckets
from diffdis_jax.common.progress import Progress
from diffdis_jax.config.section import choice, field, number
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.fid import distances, reference
from diffdis_jax.evals.fid import features as inception_features
from diffdis_jax.interop import inception as inception_file
from diffdis_jax.parallel import processes
from diffdis_jax.run import provenance

PART = 500  # images in memory at a time, or as many such parts as fill a call
MOST = 30_000  # images, where it is not said how many
FEW = 10_000  # images, generated or real, below which FID is too high by as much as models differ
FEW_NOTE = f"of fewer than {FEW} images FID is biased upwards; compare it only at equal numbers, or compare KID"
MEASURES = ("fid", "kid", "kid_std")
Extract = Callable[[Any], Float[np.ndarray, "n d"]]  # features of images


@base.settings()
class Fid(base.Evaluation):
  """Task `fid`: FID and KID by the 2015 Inception network, whose weights are a file of the user's.

  Source: Heusel et al., 2017 (FID), Bińkowski et al., 2018 (KID); numbers, prompts and real images as U-ViT has them.
  """

  task = "generation_fid"

  data: Mapping[str, Any] = field(help="section of a data source with captions")
  inception: str = field("", help="file of Inception's weights: torch-fidelity's, pytorch-fid's, or a safetensors copy")
  num_images: int | None = number(
    None, ge=2, help="images to generate; by default 30,000, or as many as there are captions"
  )
  resize: str = choice("tensorflow", inception_features.KINDS, help="resizing to Inception's input")
  reference: str = field("", help=".npz of the real images' statistics, which is made where there is none yet")

  def open(self) -> None:
    # In this order: settings, weights, data, prompts, reference; a slip in a word must not wait for a disk.
    if not self.inception:
      raise UserError(f"fid needs the weights of Inception, --inception=FILE: {inception_file.SOURCE}")
    if self.reference and not self.reference.endswith(".npz"):
      raise UserError(f"--reference={self.reference} should be an .npz of statistics")
    self.weights = inception_file.read(self.inception)
    self.source = sources.open_source(**self.data)
    self.prompts = sample_prompts(self.source, num_images=self.num_images)
    self.of_features = {
      "features": "inception-2015-12-05",
      "weights_sha256": self.weights.sha256,
      "inception_sha256": self.weights.file_sha256,
      "inception_published": self.weights.published,
      "resize": self.resize,
    }
    self._open_reference()
    self._tokenizer = functools.cache(Tokenizer)
    # In a run the same evaluation is called again and again, with one inference, and is compiled once.
    self._extractor_of = functools.lru_cache(1)(self._compile)
    self._warn_once = functools.cache(logging.warning)
    self._subset_size = 0

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures. What is known of the reference and of KID only afterwards is there after the run."""
    real, network = self.real, inference.network
    return {
      **inference.generation_protocol,
      "sampler": "ddim",
      "schedule": network.image_process.schedule,
      "image_size": inference.image_size,
      "dtype": network.model.dtype,
      **self.of_features,
      "prompts_sha256": prompts.sha256(self.prompts),
      "seed": self.seed,
      "num_images": len(self.prompts),
      "reference": provenance.public(
        {
          "name": self.reference or str(self.data.get("path") or self.data.get("name")),
          "sha256": real and real.sha256,
          "num_images": real and real.gaussian.count,
          "protocol": real.protocol if real else self._reference_protocol(inference.image_size),
        }
      ),
      "kid_subsets": distances.SUBSETS,
      "kid_subset_size": self._subset_size,
      "device": inference.mesh.devices.flat[0].device_kind,
      **({"note": FEW_NOTE} if self._fewest() < FEW else {}),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return fid and num_images, and, where the reference has the features that KID takes, kid and kid_std."""
    extract, count = self._extractor_of(inference), len(self.prompts)
    self._make_reference(extract, inference.image_size)
    if self._fewest() < FEW:
      self._warn_once("%d images: %s", self._fewest(), FEW_NOTE)
    features, progress = [], Progress("FID: sampled", count, "images", every=0)
    # Many chips have many rows: as many parts together as fill a call.
    together = max(1, inference.batch_size // PART) * PART
    for start in range(0, count, together):
      rows = np.arange(start, min(start + together, count))
      tokens = self._tokenizer(inference.max_length)([self.prompts[i] for i in rows])
      # `first` makes the noise that of the image's place among all, whatever the parts are.
      images = inference.generate(params, tokens, inference.noise(len(rows), self.seed, first=start))
      features.append(extract(images))
      progress.add(len(rows))
    return {**self._measure(features), "num_images": float(count)}

  def _measure(self, features: list[np.ndarray]) -> dict[str, float]:
    """Measure on process 0, and return its figures on all."""
    # NaN stands for a figure that there is not, in an array that process 0 can send to all.
    values = np.full(len(MEASURES), np.nan)

    def measure() -> None:
      assert self.real is not None
      generated = np.concatenate(features)
      values[0] = distances.frechet(distances.gaussian(generated), self.real.gaussian)
      if self.real.features is not None:
        kid = distances.kernel(generated, self.real.features)
        values[1:3] = kid.mean, kid.std
        self._subset_size = kid.subset_size

    processes.on_first(measure)
    sent = processes.from_first(values.view(np.uint32)).view(np.float64)  # 32 bits at a time
    return {name: float(value) for name, value in zip(MEASURES, sent) if not np.isnan(value)}

  def _fewest(self) -> int:
    """Return the number of generated or of real images, whichever is smaller; another tool's file does not say."""
    real = len(self.source) if self.real is None else self.real.gaussian.count
    return min(len(self.prompts), real or len(self.prompts))

  def _compile(self, inference: Any) -> Extract:
    return inception_features.Extractor(
      self.weights.params,
      kind=self.resize,
      mesh=inference.mesh,
      batch_size=min(inference.batch_size, len(self.prompts)),
      after_batch=inference.after_batch,
    )

  def _open_reference(self) -> None:
    """Read the file, if there is one."""
    self.real: reference.Reference | None = None
    if self.reference and buckets.path(self.reference).exists():
      self.real = reference.read(self.reference)
      reference.check(self.real, self._reference_protocol(self.data.get("image_size")), self.reference)

  def _reference_protocol(self, image_size: int | None) -> dict[str, Any]:
    of_images = {"image_size": image_size, "resampling": "lanczos", "images": dict(self.data)}
    return {**self.of_features, "code": provenance.code()["versions"], **of_images}

  def _make_reference(self, extract: Extract, image_size: int) -> None:
    """Make the reference on all processes, and write it where it has a name, unless process 0 has one."""
    # Process 0 may have read a file that the others cannot see.
    if bool(processes.from_first(np.uint8(self.real is not None))):
      return
    count, parts = len(self.source), []
    progress = Progress("FID: looked at", count, "images", every=0)
    for start in range(0, count, PART):
      rows = np.arange(start, min(start + PART, count))
      parts.append(extract(base.Images(self.source, rows, image_size, square=inception_features.square)))
      progress.add(len(rows))

    def keep() -> None:
      features, how = np.concatenate(parts), self._reference_protocol(image_size)
      how["num_images"] = len(features)
      statistics = reference.Reference(distances.gaussian(features), features, how)
      if self.reference:
        reference.write(self.reference, statistics)
        logging.info("statistics of %d real images in %s", len(features), self.reference)
      self.real = statistics

    processes.on_first(keep)


def sample_prompts(source: Any, *, num_images: int | None) -> tuple[str, ...]:
  """Sample a caption each of different records of a source. The first n of a sample are the sample of n.

  Count and rule are not stated by the paper.

  Args:
    num_images: their number; None for MOST, or fewer where there are not so many.

  Raises UserError: fewer than two images, or more than there are.
  """
  count = min(len(source), MOST) if num_images is None else num_images
  if not 2 <= count <= len(source):
    raise UserError(f"num_images is {count}, and there are captions for {len(source)}; FID takes 2 images to as many")
  rng = np.random.default_rng(0)
  # All places and captions are sampled before any is dropped, so that fewer images are the first of more.
  order, which = rng.permutation(len(source)), rng.random(len(source))
  several = [base.captions(base.fields(source, i)) for i in order[:count].tolist()]
  return tuple(texts[int(u * len(texts))] for texts, u in zip(several, which))
