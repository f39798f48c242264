"""FID and KID of images that are generated for a data set's captions, against real ones.

The paper reports "FID score on MSCOCO image generation" and nothing of how; what stands here after U-ViT is said so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from diffdis_jax.common import buckets
from diffdis_jax.common.progress import Progress
from diffdis_jax.config.section import check_choice
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, distances, drawn_prompts, reference, resize
from diffdis_jax.evals.drawn_prompts import Part
from diffdis_jax.evals.feature_parts import PartsFolder, Sampled
from diffdis_jax.evals.features import Extractor
from diffdis_jax.evals.settings import written
from diffdis_jax.interop import inception as inception_file
from diffdis_jax.parallel import processes
from diffdis_jax.run import provenance

FEW = 10_000  # images, generated or real, below which FID is too high by as much as models differ
FEW_NOTE = f"of fewer than {FEW} images FID is biased upwards; compare it only at equal numbers, or compare KID"
MEASURES = ("fid", "kid", "kid_std", "head_similarity")
NOTHING = Sampled(np.empty((0, 0), np.float32), np.empty(0, np.float32))
Extract = Callable[[Any], Float[np.ndarray, "n d"]]  # features of images


class Fid:
  """Task `fid`: FID and KID by the 2015 Inception network, whose weights are a file of the user's.

  Source: Heusel et al., 2017 (FID), Bińkowski et al., 2018 (KID); numbers, prompts and real images as U-ViT has them.

  Args:
    data: section of a data source with captions, as `data.sources.open_source` takes it.
    inception: file of the network's weights, torch-fidelity's or pytorch-fid's, or a safetensors copy.
    num_images: how many images to generate; None for 30,000, or as many as there are captions for.
    captions: which to sample: "per_image", one caption a record; or "all", from all captions of all records.
    reference: .npz of the real images' statistics. Where there is none yet it is made and written; without a name it is
      made each time.
    reference_images: the real images: "all" of the data, those "prompted", which belong to the sampled captions, or a
      folder of images. Empty for all; if given, a file of other images is refused.
    resize: resizing to Inception's input, "tensorflow" or "clean"; see `resize`.
    resampling: resizing of real images to the model's size, "lanczos" or "bicubic".
    seed: seed of the initial noise.
    prompts_seed: seed of the choice of captions.
    parts: folder that keeps features of generated images, 500 a file, from which a killed run resumes; empty for none.
    keep_images: keep the images themselves there too, as PNG.

  Raises:
    UserError: weights, data, statistics or settings that are none, or do not fit each other.
  """

  task = "generation_fid"

  def __init__(
    self,
    *,
    data: Mapping[str, Any],
    inception: str = "",
    num_images: int | None = None,
    captions: str = "per_image",
    reference: str = "",
    reference_images: str = "",
    resize: str = "tensorflow",
    resampling: str = "lanczos",
    seed: int = 0,
    prompts_seed: int = 0,
    parts: str = "",
    keep_images: bool = False,
  ):
    # In this order: settings, weights, data, prompts, reference; a slip in a word must not wait for a disk.
    _check_settings(inception, num_images, resize, resampling, reference, parts, keep_images)
    self._data, self._seed, self._parts, self._keep_images = dict(data), seed, parts, keep_images
    self._weights = inception_file.read(inception)
    self.source = sources.open_source(**data)
    self._plan = drawn_prompts.draw(self.source, num_images=num_images, captions=captions, seed=prompts_seed)
    self._count = sum(map(len, self._plan))
    self._made = {
      "features": "inception-2015-12-05",
      "weights_sha256": self._weights.sha256,
      "inception_sha256": self._weights.file_sha256,
      "inception_published": self._weights.published,
      "resize": resize,
    }
    self._prompts = {
      "captions": captions,
      "prompts_seed": prompts_seed,
      "prompts_sha256": drawn_prompts.sha256(self._plan),
    }
    self._open_reference(reference, reference_images, resampling)
    self._tokenizer = functools.cache(Tokenizer)
    # In a run the same evaluation is called again and again, with one inference, and is compiled once.
    self._extractor_of = functools.lru_cache(1)(self._compile)
    self._warn_once = functools.cache(logging.warning)
    self._subset_size = 0

  def protocol(self, inference: Any) -> dict[str, Any]:
    """Return how `run` measures with this inference; what is known of the reference only afterwards is there after the
    run."""
    # Before the run there is none yet, where it is made of the data, but how it will be made; the results file compares
    # these fields as far as they are known (results.AFTERWARDS).
    found = self._reference
    return {
      **_drawing(inference),
      **self._made,
      **self._prompts,
      "seed": self._seed,
      "num_images": self._count,
      "reference": provenance.public(
        {
          "name": self._reference_file or self._reference_name,
          "sha256": found and found.sha256,
          "num_images": found and found.gaussian.count,
          "protocol": found.protocol if found else self._reference_protocol(inference.image_size),
        }
      ),
      "kid_subsets": distances.SUBSETS,
      "kid_subset_size": self._subset_size,
      "device": inference.mesh.devices.flat[0].device_kind,
      **({"note": FEW_NOTE} if min(self._count, self._real_count() or FEW) < FEW else {}),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return fid, kid and kid_std, where the reference has the features that KID takes, and num_images; of a run with a
    head also head_similarity, the mean ⟨ê_0, e⟩ of image and prompt."""
    # Parts before the reference: a folder of another protocol is refused before minutes go into real images.
    extractor, folder, finished = self._extractor_of(inference), None, np.zeros(len(self._plan), bool)
    if self._parts:
      folder = PartsFolder(self._parts, self._header(inference, params), self._keep_images)
      finished = folder.finished(self._plan)
    self._make_reference(extractor, inference.image_size)
    sampled, progress = dict[int, Sampled](), Progress("FID: sampled", self._count, "images", every=0)
    for part, is_there in zip(self._plan, finished, strict=True):
      if is_there:
        progress.add(len(part))
        # Only process 0 measures, so the others need not read what another run left.
        sampled[part.number] = folder.read(part) if folder and processes.is_first() else NOTHING
    missing = [part for part, is_there in zip(self._plan, finished, strict=True) if not is_there]
    # As many parts together as fill a call, of which many chips have many rows.
    together = max(1, inference.batch_size // drawn_prompts.PART)
    for first in range(0, len(missing), together):
      sampled |= self._sample(missing[first : first + together], inference, params, extractor, folder)
      progress.add(sum(map(len, missing[first : first + together])))
    return {**self._measure([sampled[part.number] for part in self._plan]), "num_images": float(self._count)}

  def _sample(
    self,
    parts: Sequence[Part],
    inference: Any,
    params: Mapping[str, Any],
    extractor: Extract,
    folder: PartsFolder | None,
  ) -> dict[int, Sampled]:
    """Generate the parts' images and return what is kept of them, written if there is a folder. Image i's noise is of
    the seed and i alone."""
    # `first` makes the noise that of the image's place among all, whatever the parts are.
    tokens = self._tokenizer(inference.max_length)([prompt for part in parts for prompt in part.prompts])
    noise = np.concatenate([inference.noise(len(part), self._seed, first=part.first) for part in parts])
    # By places in the part the head sees its noise, so that no similarity depends on the parts of a call.
    places = np.concatenate([np.arange(len(part)) for part in parts])
    images = inference.generate(params, tokens, noise)
    own = base.similarity(inference, params, images, tokens, places) if inference.aligned else None
    features, ends = extractor(images), np.cumsum([len(part) for part in parts])
    found = {}
    for part, end in zip(parts, ends, strict=True):
      rows = slice(end - len(part), end)
      found[part.number] = of_part = Sampled(features[rows], NOTHING.similarity if own is None else own[rows])
      if folder is not None:
        processes.on_first(lambda part=part, rows=rows, of_part=of_part: folder.write(part, of_part, images[rows]))
    return found

  def _measure(self, sampled: list[Sampled]) -> dict[str, float]:
    """Measure on process 0, and return its figures on all."""
    # NaN stands for a figure that there is not, in an array that process 0 can send to all.
    found = np.full(len(MEASURES), np.nan)

    def measure() -> None:
      assert self._reference is not None
      generated, real = np.concatenate([part.features for part in sampled]), self._reference
      found[0] = distances.frechet(distances.gaussian(generated), real.gaussian)
      if real.features is not None:
        kid = distances.kernel(generated, real.features)
        found[1:3] = kid.mean, kid.std
        self._subset_size = kid.subset_size
      own = np.concatenate([part.similarity for part in sampled])
      found[3] = own.mean(dtype=np.float64) if own.size else np.nan

    real = self._real_count()
    if self._count < FEW:
      self._warn_once("%d images: %s", self._count, FEW_NOTE)
    elif real is not None and real < FEW:
      self._warn_once("%d real images: %s", real, FEW_NOTE)
    processes.on_first(measure)
    values = processes.from_first(found.view(np.uint32)).view(np.float64)  # 32 bits at a time
    return {name: float(value) for name, value in zip(MEASURES, values) if not np.isnan(value)}

  def _real_count(self) -> int | None:
    """Return the number of the reference's images; None where another tool's file does not say."""
    return len(self._real_indices) if self._reference is None else self._reference.gaussian.count

  def _header(self, inference: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the features of a prompt's image, and the head's similarity of the two, depend on."""
    return {
      **_drawing(inference),
      "params": base.fingerprint(params),
      "code": provenance.code(),
      "seed": self._seed,
      "resize": self._made["resize"],
      "weights_sha256": self._weights.sha256,
      "device": inference.mesh.devices.flat[0].device_kind,
      **({"head": inference.protocol} if inference.aligned else {}),
    }

  def _compile(self, inference: Any) -> Extract:
    return Extractor(
      self._weights.params,
      kind=self._made["resize"],
      mesh=inference.mesh,
      batch_size=min(inference.batch_size, self._count),
      after_batch=inference.after_batch,
    )

  def _open_reference(self, file: str, images: str, resampling: str) -> None:
    """Read the file, if there is one, or else find the images of which it will be made."""
    self._reference_file, self._resampling, self._reference = file, resampling, None
    # "all" by default, but only what was asked for is a reason to refuse a file: others do not say what theirs is of.
    which = images or "all"
    self._real, self._real_indices = self.source, np.arange(len(self.source))
    self._images: dict[str, Any] = {"which": which, "data": self._data}
    if which == "prompted":
      self._real_indices = np.unique(drawn_prompts.records(self._plan))
      self._images |= self._prompts
    elif which != "all":
      self._real = reference.open_folder(which)
      self._real_indices, self._images = np.arange(len(self._real)), {"which": which}
    self._reference_name = f"{which} of {self._data.get('path') or self._data.get('name')}"
    if file and buckets.path(file).exists():
      self._reference = reference.read(file)
      expected = self._reference_protocol(self._data.get("image_size"))
      reference.check(self._reference, expected, file, images_asked_for=bool(images))

  def _reference_protocol(self, image_size: int | None) -> dict[str, Any]:
    of_images = {"image_size": image_size, "resampling": self._resampling, "images": self._images}
    return {**self._made, "code": provenance.code()["versions"], **of_images}

  def _make_reference(self, extractor: Extract, image_size: int) -> None:
    """Make the reference on all processes, and write it where it has a name, unless process 0 has one."""
    # Process 0 may have read a file that the others cannot see.
    if bool(processes.from_first(np.uint8(self._reference is not None))):
      return
    parts, progress = [], Progress("FID: looked at", len(self._real_indices), "images", every=0)
    for start in range(0, len(self._real_indices), drawn_prompts.PART):
      rows = self._real_indices[start : start + drawn_prompts.PART]
      images = base.Images(self._real, rows, image_size, resampling=self._resampling, what="the reference's images")
      parts.append(extractor(images))
      progress.add(len(rows))

    def keep() -> None:
      made = reference.of_features(np.concatenate(parts), protocol=self._reference_protocol(image_size))
      if self._reference_file:
        reference.write(self._reference_file, made)
        logging.info("statistics of %d real images in %s", len(self._real_indices), self._reference_file)
      self._reference = made

    processes.on_first(keep)


def _drawing(inference: Any) -> dict[str, Any]:
  """Return how images are generated."""
  network = inference.network
  return {
    **inference.generation_protocol,
    "sampler": "ddim",
    "schedule": network.image_process.schedule,
    "image_size": inference.image_size,
    "dtype": network.model.dtype,
  }


def _check_settings(
  inception: str, num_images: int | None, kind: str, resampling: str, file: str, parts: str, keep_images: bool
) -> None:
  """Check what can be seen before anything is read."""
  check_choice("resize", kind, resize.KINDS)
  check_choice("resampling", resampling, resize.RESAMPLING)
  if not inception:
    raise UserError(f"fid needs the weights of Inception, {written('inception')}=FILE: {inception_file.SOURCE}")
  if num_images is not None:
    drawn_prompts.check_count(num_images)
  if file and not file.endswith(".npz"):
    raise UserError(f"--reference={file} should be an .npz of statistics; images go in reference_images")
  if keep_images and not parts:
    raise UserError("keep_images keeps them in the folder of parts; give parts too")
