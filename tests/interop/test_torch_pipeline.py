"""Compare the images and classifications of the exported pipeline in diffusers with the run's."""

from __future__ import annotations

import io
import json
import pathlib
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from configs import places_lt
from diffdis_jax import import_weights, inference
from diffdis_jax.data import transforms
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import prompts
from diffdis_jax.export_weights import export_weights
from diffdis_jax.interop import torch_pipeline
from diffdis_jax.interop.from_torch import open_source
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.structs import TrainState
from tests import pipelines, steps, tiny
from tests.models import from_torch
from tests.models.networks import random_params, relative_error
from tests.test_inference import query_noise

NAMES, TEMPLATES = ["red star", "blue ring", "green cross"], ["a photo of a {}.", "the {c}"]
STEPS = 3


def load(folder: pathlib.Path, **how: Any) -> Any:
  """Load a pipeline as the model card does."""
  pipe = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True, **how)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def export_of(folder: pathlib.Path, **changes: Any) -> str:
  """Export a tiny run with these changes by `export_config`. Its autoencoder has patches of 4 x 4 pixels."""
  config = tiny.get_config()
  config.model.unet.update(widths=(8, 16), attention=(True, False))
  config.update_from_flattened_dict(changes)
  return export_config(config, folder)


def export_config(config: ConfigDict, folder: pathlib.Path) -> str:
  """Export a run with random parameters to `folder`/out, and return its workdir."""
  path = str(folder / "run")
  workdir.open_for_training(path, config.to_dict())
  params = random_params(steps.network_of(config).shapes, seed=1)
  if "autoencoder.scale" in params:
    channels = len(params["autoencoder.scale"])
    params["autoencoder.shift"] = np.linspace(-0.5, 0.5, channels, dtype=np.float32)
    params["autoencoder.scale"] = np.linspace(0.2, 1, channels, dtype=np.float32)
    params["autoencoder.conv_out.kernel"] *= 0.3  # so that images are neither black nor white
  with checkpoint.Checkpointer(path) as checkpointer:
    checkpointer.save(3, TrainState(params=params))
  export_weights(path, str(folder / "out"))
  return path


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory) -> Iterator[None]:
  """Give diffusers another folder for copied code: test processes would share the default one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
  return export_of(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def folder(run) -> pathlib.Path:
  """Return the folder of the run's export."""
  return pathlib.Path(run).with_name("out")


@pytest.fixture(scope="module")
def pipe(folder) -> Any:
  return load(folder)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
  """Return images of several sizes and modes."""
  rng = np.random.default_rng(0)
  sizes = ((40, 60), (91, 70), (32, 32), (20, 33))
  coarse = [rng.integers(0, 256, (5, 7, 3), np.uint8) for _ in sizes]
  images = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x, size in zip(coarse, sizes, strict=True)]
  images[1].putalpha(Image.linear_gradient("L").resize(images[1].size))
  grey = images[0].convert("L")
  return [*images, grey, images[0].convert("P"), Image.fromarray(np.asarray(grey, np.float32) / 255)]


def squares(photos: list[Image.Image], size: int) -> np.ndarray:
  """Resize and crop images as evaluations and the app do."""
  return np.stack([np.asarray(transforms.resize(transforms.decode(_encoded(photo)), size)) for photo in photos])


def _encoded(image: Image.Image) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, "tiff" if image.mode == "F" else "png")
  return buffer.getvalue()


def texts_of(names: list[str], templates: list[str]) -> list[str]:
  return [prompts.fill(template, name) for template in templates for name in names]


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_a_pipeline_with_patches_generates_the_images_of_the_run(run, folder, pipe):
  model, params = inference.load(run, mesh=steps.make_mesh(), batch_size=8, generation_steps=STEPS)
  noise = model.noise(2, seed=3)
  expected = model.generate(params, Tokenizer(model.max_length)(pipelines.PROMPTS), noise)
  generated = pipelines.draw(pipe, noise, steps=STEPS, guidance=model.sampling.generation_guidance)
  assert pipelines.psnr(generated, expected) >= 60
  assert generated.std() > 10 and pipelines.psnr(generated[:1], generated[1:]) < 30
  size = model.image_size
  images = pipe("a red star", num_inference_steps=1).images
  assert images[0].size == (size, size)
  assert pipe("a red star", num_inference_steps=1, height=2 * size, width=size).images[0].size == (size, 2 * size)
  with pytest.raises(ValueError, match="trust_remote_code=True"):
    StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
  "changes",
  [{}, pytest.param({"guidance": 2.0, "steps": 3, "num_noise_samples": 2}, marks=pytest.mark.slow)],
  ids=["paper", "more"],
)
def test_the_pipeline_embeds_and_classifies_as_the_run_does(run, pipe, photos, changes, monkeypatch):
  model, params = inference.load(run, mesh=steps.make_mesh(), batch_size=8, **changes)
  images = squares(photos, model.image_size)
  samples = model.sampling.num_noise_samples
  noise = torch.from_numpy(np.stack([query_noise(len(images), seed=7, draw=draw) for draw in range(samples)]))
  monkeypatch.setitem(pipe.diffdis.sampling, "guidance", model.sampling.guidance)
  how = dict(noise=noise, num_inference_steps=model.sampling.steps, num_noise_samples=samples, batch_size=4)

  expected = model.embed_images(params, images, seed=7)
  queries = pipe.embed_images(photos, **how)
  assert queries.dtype == torch.float32 and not queries.requires_grad
  np.testing.assert_allclose(queries, expected, atol=1e-4)
  assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-3, "the images' queries should differ"

  texts = texts_of(NAMES, TEMPLATES)
  embedded = model.embed_texts(params, Tokenizer(model.max_length)(texts))
  np.testing.assert_allclose(pipe.embed_texts(texts, batch_size=4), embedded, atol=1e-4)

  classes = unit(embedded.reshape(len(TEMPLATES), len(NAMES), -1).mean(axis=0))
  logits = np.minimum(np.exp(np.asarray(params["logit_scale"])), 100) * expected @ classes.T
  odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
  result = pipe.classify(photos, NAMES, templates=TEMPLATES, **how)
  np.testing.assert_allclose(result.scores, odds / odds.sum(axis=-1, keepdims=True), atol=1e-4)
  assert result.labels == [NAMES[i] for i in logits.argmax(axis=-1)]

  ranking = pipe.rank(photos, texts[0], **how)
  cosines = expected @ embedded[0]
  np.testing.assert_allclose(ranking.scores, cosines[ranking.order], atol=1e-4)
  assert sorted(ranking.order) == list(range(len(photos))) and (ranking.scores.diff() <= 0).all()


def test_it_reads_texts_as_the_run_does(run, pipe):
  """These texts look like captions from the web."""
  texts = [
    "Salt &amp; pepper",
    "salt &amp;amp; pepper",
    "the baker\u2019s \u201cshop\u201d",
    "\u2018a\u02bc &quot;b&quot; &rsquo;",
    "\ufeffred \ufb01re",  # the first line of a file with a byte order mark
    "\uff32\uff45\uff44\u3000\uff11\uff0c\uff76",
  ]
  model, params = inference.load(run, mesh=steps.make_mesh(), batch_size=8)
  expected = model.embed_texts(params, Tokenizer(model.max_length)(texts))
  np.testing.assert_allclose(pipe.embed_texts(texts), expected, atol=1e-4)


# Text that web captions contain, and text that a tokenizer could misread as a special token.
PIECES = [
  *("<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "&lt;|endoftext|&gt;", "<| endoftext |>", "<|endoftext|>x"),
  *("\x00", "\x1b[31m", "\x7f", "\x85", "\r\n", "\t", "\u200b", "\u2028", "\ufeff", "&#1;", "&#128;", "&nbsp;"),
  *("â€œquoted", "Ã©tÃ©", "cafÃ©", "â€™s", "schÃ¶n", "&amp;amp;", "\u2018q\u2019", "\u201cq\u201d", "ﬁre", "Ｆｕｌｌ"),
  *("İstanbul", "ß", "ΑΣ", "e\u0301", "½", "日本語", "🙂", "it's", "a red star", "12", "!!", " "),
]


def test_any_text_has_the_tokens_that_it_has_in_training(run, pipe):
  rng = random.Random(0)
  texts = [rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(1, 5))) for _ in range(640)]
  texts += [
    "".join(chr(rng.choice([rng.randrange(0x300), rng.randrange(0xD800)])) for _ in range(8)) for _ in range(320)
  ]
  tokenizer = Tokenizer(pipe.diffdis.max_length)
  np.testing.assert_array_equal(pipe._token_ids(texts), tokenizer(texts))


def test_a_text_that_needs_a_package_says_so(pipe, monkeypatch):
  monkeypatch.setattr(sys.modules[type(pipe).__module__], "ftfy", None)
  assert pipe.embed_texts("a red star").shape == (1, 16)
  with pytest.raises(ImportError, match="the text 'café' is repaired as in training, which needs ftfy: pip install"):
    pipe.embed_texts("café")


def test_its_templates_are_the_evaluations():
  assert torch_pipeline.TEMPLATES == prompts.TEMPLATES


def test_images_of_every_kind_in_batches_of_any_size(pipe, photos):
  noise = torch.from_numpy(query_noise(2, seed=1))
  square = torch.from_numpy(squares(photos[:2], 48))
  expected = pipe.embed_images([Image.fromarray(x) for x in square.numpy()], noise=noise)
  chw = square.movedim(-1, 1)
  kinds = (square.numpy(), chw, chw / 255.0, list(chw), [square[0].numpy(), chw[1]], (square / 255.0).numpy())
  for images in kinds:
    torch.testing.assert_close(pipe.embed_images(images, noise=noise), expected, atol=0, rtol=0)
  single = pipe.embed_images(photos[0], generator=torch.Generator().manual_seed(4))
  assert single.shape == (1, 16)
  torch.testing.assert_close(single, pipe.embed_images(photos[0], generator=torch.Generator().manual_seed(4)))
  assert not torch.allclose(single, pipe.embed_images(photos[0], generator=torch.Generator().manual_seed(5)))
  assert pipe.embed_texts("a red star").shape == (1, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("odd", [b"", struct.pack("<HHLf", 0x0131, 11, 1, 1.5)], ids=["whole", "damaged"])
def test_a_photograph_is_upright_as_in_the_run(orientation, odd):
  """The orientation also counts if a camera stored a number as text, or a text as a number."""
  entries = struct.pack("<HHL2H", 0x0112, 3, 1, orientation, 0) + odd
  exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries) // 12) + entries + bytes(4)
  buffer = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, "jpeg", exif=exif)
  expected = np.asarray(transforms.resize(transforms.decode(buffer.getvalue()), 16))
  np.testing.assert_array_equal(torch_pipeline._square(Image.open(buffer), 16), expected)


class Offloaded:
  """Stand in for accelerate's hook: a call of a part loads its weights and unloads those of the part before it."""

  def __init__(self, part: torch.nn.Module, before: Offloaded | None = None):
    self.part, self.before = part, before
    self.weights = {name: value.clone() for name, value in part.state_dict().items()}
    part._hf_hook = self
    part.register_forward_pre_hook(lambda *_: self.pre_forward(part))
    self.go()

  def go(self) -> None:
    for value in self.part.parameters():
      value.data.fill_(torch.nan)

  def pre_forward(self, part: torch.nn.Module) -> None:
    part.load_state_dict(self.weights)
    if self.before:
      self.before.go()


def test_the_pipeline_works_with_parts_that_are_offloaded(folder, pipe, photos, monkeypatch):
  """The pipeline calls layers of a part without the part's `forward`, in which alone accelerate loads weights."""
  noise, offloaded = torch.from_numpy(query_noise(2, seed=1)), load(folder)
  # enable_sequential_cpu_offload keeps the weights of a part on the meta device until it is called.
  monkeypatch.setattr(type(offloaded.text_encoder), "device", torch.device("meta"))
  # A part of the sequence unloads the previous one; vae.encode is decorated only if accelerate is installed.
  sequence = [name for name in offloaded.model_cpu_offload_seq.split("->") if name not in ("image_encoder", "vae")]
  assert sequence == ["text_encoder", "unet"], "beyond it diffdis comes and leaves the UNet, which it calls"
  hooks = [text := Offloaded(offloaded.text_encoder), Offloaded(offloaded.unet, text), Offloaded(offloaded.diffdis)]
  freed = []
  offloaded.maybe_free_model_hooks = lambda: freed.extend(hook.go() for hook in hooks)
  embed = lambda pipeline: (pipeline.embed_images(photos[:2], noise=noise), pipeline.embed_texts(NAMES))
  torch.testing.assert_close(embed(offloaded), embed(pipe), atol=0, rtol=0)
  assert len(freed) == 2 * len(hooks)


def test_the_variant_fp16_computes_in_float32_unless_a_dtype_is_given(run, tmp_path):
  """By default transformers 5 would keep the dtype of the files."""
  out = tmp_path / "out"
  export_weights(run, str(out), dtype="float16")
  assert 'trust_remote_code=True, variant="fp16")' in (out / "README.md").read_text()
  pipe = load(out, variant="fp16")
  parts = {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
  assert parts == dict.fromkeys(("vae", "text_encoder", "unet", "diffdis"), torch.float32)
  assert pipe("a red star", num_inference_steps=1).images[0].size == (16, 16)
  assert load(out, variant="fp16", dtype=torch.float16).text_encoder.dtype == torch.float16
  import_weights.import_weights(str(out), str(tmp_path / "again"))  # import_weights also reads the variant


def test_the_pipeline_is_saved_and_loaded_again(folder, pipe, photos, tmp_path):
  pipe.save_pretrained(tmp_path)
  code = {"pipeline.py", "diffdis/torch_diffdis.py", "vae/torch_parts.py"}
  assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")} == code
  for name in code:
    assert (tmp_path / name).read_text() == (folder / name).read_text()
  before, after = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path))
  assert {name: after[name] for name in before if name != "_diffusers_version"} == {
    name: value for name, value in before.items() if name != "_diffusers_version"
  }
  again, noise = load(tmp_path), torch.from_numpy(query_noise(2, seed=1))
  torch.testing.assert_close(again.embed_images(photos[:2], noise=noise), pipe.embed_images(photos[:2], noise=noise))
  assert type(again).__name__ == "DiffDisPipeline" and again.vae_scale_factor == pipe.vae_scale_factor


def test_without_patches_the_pipeline_equals_stable_diffusion_bit_for_bit(tmp_path):
  one_by_one = {"model.autoencoder.patch": 1, "model.autoencoder.widths": (8, 8)}
  run = export_of(tmp_path, **one_by_one)
  noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
  plain = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
  pipe = load(tmp_path / "out")
  expected = pipelines.draw(plain, noise, steps=STEPS)
  np.testing.assert_array_equal(pipelines.draw(pipe, noise, steps=STEPS), expected)
  model, params = inference.load(run, mesh=steps.make_mesh(), batch_size=8)
  np.testing.assert_allclose(query_of(pipe, expected), model.embed_images(params, expected, seed=2), atol=1e-4)


def query_of(pipe: Any, images: np.ndarray) -> torch.Tensor:
  key, width = jax.random.fold_in(jax.random.key(2), 0), pipe.diffdis.query_width
  noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), (width,)) for i in range(len(images))])
  return pipe.embed_images(images, noise=torch.from_numpy(noise))


@pytest.mark.slow
def test_an_export_for_generation_alone_refuses_to_classify(tmp_path):
  export_of(tmp_path, objectives=("generation",))
  pipe = load(tmp_path / "out")
  assert not (tmp_path / "out" / "diffdis").exists()
  assert pipe("a red star", num_inference_steps=1).images[0].size == (16, 16)
  with pytest.raises(ValueError, match="not trained for discrimination and only generates"):
    pipe.embed_texts(["a"])


def test_an_export_for_discrimination_alone_refuses_to_generate(tmp_path):
  path = export_of(tmp_path, objectives=("discrimination",))
  pipe, (model, params) = load(tmp_path / "out"), inference.load(path, mesh=steps.make_mesh(), batch_size=8)
  assert not hasattr(pipe.unet, "up_blocks")
  images = squares([Image.linear_gradient("L"), Image.radial_gradient("L")], model.image_size)
  np.testing.assert_allclose(query_of(pipe, images), model.embed_images(params, images, seed=2), atol=1e-4)
  with pytest.raises(ValueError, match="trained for discrimination alone and generates no images; it has classify"):
    pipe("a red star")
  card = (tmp_path / "out" / "README.md").read_text()
  assert "it classifies, and generates no images" in card and "import_weights" in card
  assert_imported_back(tmp_path / "out", path, tmp_path / "again")


def test_an_export_with_patches_is_imported_back(run, folder, tmp_path):
  assert_imported_back(folder, run, tmp_path / "again")


def assert_imported_back(folder: pathlib.Path, run: str, again: pathlib.Path) -> None:
  import_weights.import_weights(str(folder), str(again))
  imported, expected = restore.restore_params(str(again)), restore.restore_params(run)
  assert imported.keys() == expected.keys()
  for path, value in expected.items():
    if not path.startswith(("autoencoder.shift", "autoencoder.scale", "autoencoder.quant", "autoencoder.post_quant")):
      np.testing.assert_array_equal(imported[path], value, err_msg=path)


def test_an_autoencoder_alone_encodes_and_decodes(tmp_path):
  path = export_of(tmp_path, objectives=("reconstruction",))
  assert {part.name for part in (tmp_path / "out").iterdir()} == {
    *("README.md", "digests.json", "model_index.json", "pipeline.py", "vae")
  }
  load(tmp_path / "out").save_pretrained(tmp_path / "saved")
  network, params = steps.network_of(steps.config_of(path)), restore.restore_params(path)
  x = np.random.default_rng(0).uniform(-1, 1, (2, network.image_size, network.image_size, 3)).astype(np.float32)

  @jax.jit
  def autoencode(params, x):
    ours = network.with_params(params).autoencoder
    z = ours.to_z(ours.encode(x).mean)
    return z, ours.decode(ours.from_z(z))

  z, expected = autoencode(params, x)
  for folder in (tmp_path / "out", tmp_path / "saved"):
    pipe = load(folder)
    with torch.no_grad():
      latents = pipe.vae.encode(from_torch.nchw(x)).latent_dist.mode() * pipe.vae.config.scaling_factor
      decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert relative_error(from_torch.nhwc(latents), z) < 1e-5
    assert relative_error(from_torch.nhwc(decoded), expected) < 1e-5
    for call, given in ((pipe, ("a red star",)), (pipe.classify, (BLACK, ["a"])), (pipe.embed_texts, (["a"],))):
      with pytest.raises(ValueError, match="autoencoder alone, which neither generates nor classifies; take pipe.vae"):
        call(*given)


def test_a_long_tailed_head_is_exported_to_its_own_file(tmp_path):
  config = tiny.get_config()
  config.optim.epoch_steps = 2
  places_lt.second_stage(config, classes=64, anchors=3, visual=1e-3, language=1e-3)
  run = export_config(config, tmp_path)
  head, params = load_file(tmp_path / "out" / "head.safetensors"), restore.restore_params(run)
  np.testing.assert_array_equal(head["fc1.weight"], np.asarray(params["head.fc1.kernel"]).T)
  assert len(head) == sum(name.startswith("head.") for name in params)
  assert "head.safetensors" in (tmp_path / "out" / "README.md").read_text()
  assert sorted(open_source(tmp_path / "out").others) == sorted(f"head/{name}" for name in head)
  assert load(tmp_path / "out").embed_texts(["a"]).shape == (1, 16)


BLACK = Image.new("RGB", (8, 8))
WRONG = {
  "no names": (dict(names=[]), "names is empty; give at least one"),
  "numbers": (dict(names=[1, 2]), "names should be a list of strings"),
  "no slot": (dict(templates=["a photo"]), "template 'a photo' has no place for the class name"),
  "no images": (dict(images=[]), "images is empty; give at least one"),
  "paths": (dict(images=["cat.png"]), "an image is of type str; give a PIL image, a tensor or an array"),
  "grey": (dict(images=torch.zeros(1, 8, 8)), r"an image has shape \(8, 8, 1\); give a tensor \[3, h, w\]"),
  "nan": (dict(images=Image.fromarray(np.float32([[0.5, np.nan]]))), "an image holds numbers that are not finite"),
  "wide": (dict(images=torch.full((3, 8, 8), 200)), r"an image is of dtype int64; give uint8, or float in \[0, 1\]"),
  "signed": (dict(images=-torch.ones(3, 8, 8)), r"an image is of dtype float32; give uint8, or float in \[0, 1\]"),
  "noise": (dict(noise=torch.zeros(2, 16)), r"noise has shape \(1, 2, 16\); it should end in \(1, 16\)"),
  "steps": (dict(num_inference_steps=0), "num_inference_steps is 0; it should be a whole number from 1 on"),
  "many": (dict(num_inference_steps=1001), "steps is 1001; it must be 1 to 1000"),
}


@pytest.mark.parametrize("given, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_in_one_line(pipe, given, message):
  given = {"images": BLACK, "names": NAMES, **given}
  with pytest.raises(ValueError, match=message) as error:
    pipe.classify(**given)
  assert "\n" not in str(error.value)


def test_a_pipeline_without_its_weights_is_refused(folder, tmp_path):
  weights = pathlib.Path("diffdis", "diffusion_pytorch_model.safetensors")
  missing, cut = (pathlib.Path(shutil.copytree(folder, tmp_path / name)) for name in ("missing", "cut"))
  (missing / weights).unlink()
  (cut / weights).write_bytes((cut / weights).read_bytes()[:-100])
  for path in (missing, cut):
    with pytest.raises(OSError, match="diffdis"):
      load(path)
