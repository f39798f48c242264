"""DiffDisPipeline, a StableDiffusionPipeline of diffusers that also classifies and ranks images.

It needs torch, diffusers, transformers and Pillow, and ftfy for texts beyond plain ASCII. export_weights copies this
file to pipeline.py of an export, from which diffusers loads it.

  pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
  image = pipe("a red star").images[0]
  pipe.classify(image, ["red star", "blue ring"]).labels
"""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import ExifTags, Image
from torch import Tensor

# Only texts beyond plain ASCII need ftfy.
try:
  import ftfy
except ImportError:
  ftfy = None

Images = Any  # PIL.Image, torch.Tensor or np.ndarray, or a sequence of them
# The default templates of this project's evaluations: the seven that were selected for CLIP, and the plain one.
TEMPLATES = ("a photo of a {}.", "itap of a {}.", "a bad photo of the {}.", "a origami {}.")
TEMPLATES += ("a photo of the large {}.", "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
_SLOT = re.compile(r"\{c?\}")
# The Image.Transpose that makes an image upright, by EXIF's orientation from 2 on.
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))


class Classification(NamedTuple):
  """The most likely name of each image, and the softmax over the names of τ ⟨ê_0, e⟩, f32[n, k]."""

  labels: list[str]
  scores: Tensor


class Ranking(NamedTuple):
  """The indices of the images, sorted by decreasing cosine with the text, and the cosines in that order, f32[n]."""

  order: list[int]
  scores: Tensor


class DiffDisPipeline(StableDiffusionPipeline):
  r"""
  Text-to-image generation with Stable Diffusion, and zero-shot classification with the same UNet.

  It inherits from [`StableDiffusionPipeline`]: `pipe(prompt, ...)` takes what that takes and returns the same images.
  Its arguments are those of that class, and `diffdis`, without which it only generates. A run of an autoencoder alone
  has only `vae`.
  """

  _optional_components = ["scheduler", "text_encoder", "tokenizer", "unet", "diffdis"]
  _optional_components += StableDiffusionPipeline._optional_components
  # The code for `save_pretrained`. diffusers overwrites its copy when it loads another model's file.
  source = pathlib.Path(__file__).read_text(encoding="utf-8")

  def __init__(
    self,
    vae,
    text_encoder,
    tokenizer,
    unet,
    scheduler,
    safety_checker,
    feature_extractor,
    image_encoder: Any = None,
    diffdis: Any = None,
    requires_safety_checker=True,
  ):
    parts = (vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder)
    super().__init__(*parts, requires_safety_checker=requires_safety_checker)
    self.register_modules(diffdis=diffdis)
    if (patch := getattr(vae, "patch", 1)) > 1:
      self.vae_scale_factor *= patch
      self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

  # diffusers checks each part against its annotation, which older versions expect to be a class, not a string. The
  # annotation is `object`, since the classes of a file are new ones each time that it is loaded.
  __init__.__annotations__ = dict.fromkeys(inspect.signature(__init__).parameters, object)

  @functools.wraps(StableDiffusionPipeline.__call__)
  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    self._check_unet()
    if not hasattr(self.unet, "up_blocks"):
      raise ValueError("this model was trained for discrimination alone and generates no images; it has classify")
    return super().__call__(*args, **kwargs)

  def classify(
    self, images: Images, names: Sequence[str], templates: Sequence[str] = TEMPLATES, **how: Any
  ) -> Classification:
    r"""
    Find the most likely of these class names for each image.

    Args:
      images, how: the arguments of `embed_images`.
      names (`List[str]`): the names of the classes.
      templates (`List[str]`): prompts with `{}` where the name goes. The texts' embeddings are averaged over them.
    """
    _check_texts("names", names)
    _check_texts("templates", templates)
    for template in templates:
      # Without a slot, all classes would have the same text.
      if not _SLOT.search(template):
        raise ValueError(f"template {template!r} has no place for the class name; write {{}} where it goes")
    queries = self.embed_images(images, **how)
    texts = [_SLOT.sub(lambda _, name=name: name, template) for template in templates for name in names]
    by_template = self.embed_texts(texts, batch_size=how.get("batch_size", 32)).unflatten(0, (len(templates), -1))
    # CLIP's classifier of several templates is the normalised mean of unit vectors.
    scores = self._diffdis().similarity(queries, F.normalize(by_template.mean(dim=0), dim=-1)).softmax(dim=-1)
    return Classification([names[int(i)] for i in scores.argmax(dim=-1)], scores)

  def rank(self, images: Images, text: str, **how: Any) -> Ranking:
    """Sort images by their similarity to a text. `how` are arguments of `embed_images`."""
    _check_texts("text", [text])
    cosines = self.embed_images(images, **how) @ self.embed_texts(text)[0]
    scores, order = cosines.sort(descending=True, stable=True)
    return Ranking(order.tolist(), scores)

  @torch.no_grad()
  def embed_texts(self, texts: str | Sequence[str], batch_size: int = 32) -> Tensor:
    """Embed texts: return queries e of length 1, f32 [texts, width], for cosines with images.

    Texts are cut at the model's `max_length`, and cleaned as in training, with ftfy if they are beyond plain ASCII.
    """
    diffdis, texts = self._diffdis(), [texts] if isinstance(texts, str) else texts
    _check_texts("texts", texts)
    with contextlib.ExitStack() as end:
      end.callback(self.maybe_free_model_hooks)  # offloaded parts go back to the CPU, as after a call of the pipeline
      parts = [part.to(self._execution_device) for part in self._token_ids(texts).split(batch_size)]
      return torch.cat([diffdis.embed_text(part, text_encoder=self.text_encoder) for part in parts])

  @torch.no_grad()
  def embed_images(
    self,
    images: Images,
    num_inference_steps: int | None = None,
    num_noise_samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    batch_size: int = 32,
  ) -> Tensor:
    r"""
    Embed images: return denoised queries ê_0 of length 1 (the paper's Algorithm 3), f32 [images, width].

    Args:
      images (`PIL.Image.Image`, `torch.Tensor`, `np.ndarray`, or a list of them): of any size. Tensors are
        [3, h, w] or [n, 3, h, w], arrays [h, w, 3] or [n, h, w, 3], uint8, or float in [0, 1]. An image is resized so
        that its short side fits, and its central square is taken.
      num_inference_steps, num_noise_samples (`int`, *optional*): denoising steps, and samples of the noise to average;
        by default the run's.
      generator (`torch.Generator`, *optional*): the generator of the noise.
      noise (`torch.Tensor`, *optional*): the noise itself, [n, d] or [samples, n, d], in place of a generator.
      batch_size (`int`): the number of images at a time, which does not change an image's noise.
    """
    diffdis, device = self._diffdis(), self._execution_device
    steps = diffdis.sampling["steps"] if num_inference_steps is None else num_inference_steps
    samples = diffdis.sampling["num_noise_samples"] if num_noise_samples is None else num_noise_samples
    for name, value in (("num_inference_steps", steps), ("num_noise_samples", samples), ("batch_size", batch_size)):
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it should be a whole number from 1 on")
    squares = [_square(image, diffdis.image_size) for image in _to_list(images)]
    shape = (samples, len(squares), diffdis.query_width)
    if noise is None:  # sampled at once, so that it does not depend on the batch size
      noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
    noise = noise[None] if noise.ndim == 2 else noise
    if noise.ndim != 3 or noise.shape[1:] != shape[1:]:
      raise ValueError(f"noise has shape {tuple(noise.shape)}; it should end in {shape[1:]}")

    how = dict(unet=self.unet, steps=steps, guidance=diffdis.sampling["guidance"])
    embedded = []
    progress_bar: Any = self.progress_bar  # type checkers do not know its arguments, since it is decorated
    with contextlib.ExitStack() as end, progress_bar(total=len(squares)) as bar:
      end.callback(self.maybe_free_model_hooks)
      c_null = diffdis.null_condition(self.text_encoder, device)
      for first in range(0, len(squares), batch_size):
        pixels = torch.from_numpy(np.stack(squares[first : first + batch_size])).to(device)
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        z = self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode() * self.vae.config.scaling_factor
        e_T = noise[:, first : first + batch_size].to(device=device, dtype=torch.float32)
        queries = torch.stack([diffdis.embed_image(z, sample, c_null=c_null, **how) for sample in e_T])
        embedded.append(F.normalize(queries.mean(dim=0), dim=-1))
        bar.update(len(pixels))
    return torch.cat(embedded)

  def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
    """Write model_index.json, as export_weights does, and the files of code, for `save_pretrained`."""
    folder = pathlib.Path(save_directory)
    super().save_config(folder, push_to_hub=False, **kwargs)
    # diffusers names a class by its module, which exists only in this process.
    index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
    for name, value in index.items():
      part: Any = getattr(self, name, None) if isinstance(value, list) else None
      if hasattr(part, "source"):
        value[0] = value[0].split(".")[-1]
        (folder / name / f"{value[0]}.py").write_text(part.source, encoding="utf-8")
    index["_class_name"] = StableDiffusionPipeline.__name__  # so that it still loads without this file
    (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "pipeline.py").write_text(self.source, encoding="utf-8")

  def _token_ids(self, texts: Sequence[str]) -> Tensor:
    """Return the token ids of texts, as in training."""
    how = dict(padding="max_length", max_length=self._diffdis().max_length, truncation=True, return_tensors="pt")
    return self.tokenizer([_cleaned(text) for text in texts], **how).input_ids

  def _check_unet(self) -> None:
    if self.unet is None:
      raise ValueError("this model is an autoencoder alone, which neither generates nor classifies; take pipe.vae")

  def _diffdis(self) -> Any:
    self._check_unet()
    if self.diffdis is None:
      raise ValueError("this model was not trained for discrimination and only generates; it has no component diffdis")
    return self.diffdis


def _check_texts(what: str, texts: Any) -> None:
  if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
    raise ValueError(f"{what} should be a list of strings")
  if not texts:
    raise ValueError(f"{what} is empty; give at least one")


def _cleaned(text: str) -> str:
  """Clean a text as training does, so that it has the same tokens."""
  if not text.isascii() or not text.isprintable() or "&" in text:
    if ftfy is None:
      raise ImportError(f"the text {text[:50]!r} is repaired as in training, which needs ftfy: pip install ftfy")
    # Unescape twice: captions from the web are often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  text = " ".join(text.split()).lower()
  # With spaces inside, a spelled-out start or end is read as text, and not as a special token.
  return text.replace("<|startoftext|>", "<| startoftext |>").replace("<|endoftext|>", "<| endoftext |>")


def _to_list(images: Images) -> list[Any]:
  """Return the list of the single images of a batch or a list."""
  if not isinstance(images, (list, tuple)):
    images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
  if not images:
    raise ValueError("images is empty; give at least one")
  return list(images)


def _square(image: Any, size: int) -> np.ndarray:
  """Scale the short side to `size`, bicubic, and crop the central square, in one resampling: u8[size, size, 3]."""
  pil = _to_pil(image)
  if pil.size != (size, size):
    side = min(pil.size)
    left, top = (pil.width - side) / 2, (pil.height - side) / 2
    pil = pil.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
  return np.array(pil)


def _to_pil(image: Any) -> Image.Image:
  """Convert an image to RGB, make it upright by its EXIF, and put transparency on white."""
  if isinstance(image, Image.Image):
    # ImageOps.exif_transpose fails if anything else in EXIF is wrong.
    with contextlib.suppress(Exception):  # for damaged EXIF, Pillow may raise anything
      turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
      image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or floats, which Pillow would clip at 255
      if not np.isfinite(most := np.asarray(image).max()):  # one such value would make the whole image black
        raise ValueError("an image holds numbers that are not finite")
      white = 1.0 if image.mode == "F" and most <= 1 else 65535.0
      grey = np.rint(np.clip(np.asarray(image, np.float64) / (white / 255), 0, 255)).astype(np.uint8)
      return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
      layer = image.convert("RGBA")
      return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")
  if isinstance(image, Tensor):
    image = image.detach().cpu()
    # NumPy has no bfloat16.
    image = (image.float() if image.is_floating_point() else image).numpy()
    image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
  if not isinstance(image, np.ndarray):
    raise ValueError(f"an image is of type {type(image).__name__}; give a PIL image, a tensor or an array")
  if image.ndim != 3 or image.shape[-1] != 3:
    raise ValueError(f"an image has shape {tuple(image.shape)}; give a tensor [3, h, w] or an array [h, w, 3]")
  if image.dtype != np.uint8:
    if image.dtype.kind in "iu" or not (image.min() >= 0 and image.max() <= 1):  # NaN is neither
      raise ValueError(f"an image is of dtype {image.dtype}; give uint8, or float in [0, 1]")
    image = np.rint(image * 255).astype(np.uint8)
  return Image.fromarray(np.ascontiguousarray(image))
