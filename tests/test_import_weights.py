"""Test import_weights: the images that the imported run generates, the parameters it lists, and refusals."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from ml_collections import ConfigDict
from open_clip.model import CLIP as OpenClip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import CLIPConfig, CLIPModel

from diffdis_jax import import_weights, inference
from diffdis_jax.common.params import Params
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.export_weights import write_one_file
from diffdis_jax.interop import from_torch, mapping
from diffdis_jax.models.clip import normalise
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.training import start
from tests import compvis_names, pipelines
from tests.command_runs import call
from tests.interop.test_damaged_checkpoints import write as write_open_clip
from tests.models import networks
from tests.models.from_torch import nchw, randomise
from tests.steps import build_trainer, config_of, make_mesh, network_of, open_batches

pytest_plugins = ("tests.command_runs", "tests.pipelines")

STEPS = 3
CLIP_SIZES = dict(image_size=32, patch_size=8)
QUERY_INIT = 0.5  # of the runs that start from an import, whose own value is 1


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
  return np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32)


def generate(run: str, noise: np.ndarray) -> np.ndarray:
  model, params = inference.load(run, mesh=make_mesh(), batch_size=len(noise), generation_steps=STEPS)
  return model.generate(params, Tokenizer(model.max_length)(pipelines.PROMPTS), noise)


def load(source: pathlib.Path) -> tuple[ConfigDict, Params, list[str]]:
  """Return a source's config, its parameters, and the names that are ignored."""
  opened = from_torch.open_source(source)
  config = import_weights.make_config(opened)
  matched = from_torch.match(opened, network_of(config).shapes)
  return config, from_torch.read(matched), matched.ignored


def assert_same_params(loaded: Params, run: str, rtol: float = 0.0) -> None:
  """Check that these equal the parameters that the run imported, and are all of them."""
  expected = restore.restore_params(run)
  origin = json.loads((pathlib.Path(run) / "import.json").read_text())
  assert loaded.keys() == origin["loaded"].keys()
  for path, value in loaded.items():
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected[path], rtol=rtol, atol=rtol * 1e-3, err_msg=path)


def copied(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  shutil.copytree(source, folder)
  return folder


def test_an_imported_run_generates_the_images_of_stable_diffusion(sd, imported, noise):
  expected = pipelines.draw(StableDiffusionPipeline.from_pretrained(sd), noise, steps=STEPS)
  images = generate(imported, noise)
  assert pipelines.psnr(images, expected) >= 60
  assert expected.std() > 10 and pipelines.psnr(expected[:1], expected[1:]) < 30


def test_import_json_names_the_origin_of_every_parameter(sd, imported):
  config, origin = config_of(imported), json.loads((pathlib.Path(imported) / "import.json").read_text())
  params = restore.restore_params(imported)
  assert params.keys() == origin["loaded"].keys() | set(origin["initialised"])
  names = [
    entry.name
    for path in origin["initialised"]
    if path not in mapping.STATISTICS
    for entry in [mapping.from_path(path)]
  ]
  assert {name.split(".")[0] for name in names} == {"text_stream", "alignment", "logit_scale"}
  assert origin["ignored"] == [] and origin["source"] == str(sd)
  assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}
  assert (config.image_size, config.data.max_length) == (32, pipelines.LENGTH)
  assert config.model.unet.to_dict() == dict(widths=(32, 64), attention=(True, False), depth=1, num_heads=8, groups=32)
  np.testing.assert_array_equal(params["autoencoder.scale"], np.full(4, 0.18215, np.float32))
  assert workdir.latest_step(imported) == 0


def started(run: str, scratch: pathlib.Path, *, seed: int = 0) -> Params:
  """Return the parameters with which training starts from this run, with another `query_init` than the import's."""
  config = config_of(run)
  assert config.model.query_init == 1.0
  config.batch_size, config.model.query_init, config.init_from, config.seed = 8, QUERY_INIT, run, seed
  with checkpoint.Checkpointer(str(scratch)) as checkpointer:
    state, _ = start.restore_or_init(build_trainer(config, make_mesh()), checkpointer, open_batches(config))
  return state.params


@pytest.mark.slow
def test_new_parameters_depend_on_the_seed_and_config_of_the_run(imported, tmp_path):
  saved, origin = restore.restore_params(imported), json.loads((pathlib.Path(imported) / "import.json").read_text())
  first, second = (started(imported, tmp_path / str(seed), seed=seed) for seed in (0, 1))
  new = {path for path in origin["initialised"] if path.endswith("kernel") and not path.endswith("fc_out.kernel")}
  differing = {path for path in first if not np.array_equal(first[path], second[path])}
  assert len(new) > 20 and new <= differing <= set(origin["initialised"])
  for path in [*origin["loaded"], *mapping.STATISTICS]:
    np.testing.assert_array_equal(first[path], saved[path], err_msg=path)
  for path in (path for path in saved if path.endswith("fc_in.kernel")):
    assert np.std(first[path]) / np.std(saved[path]) == pytest.approx(QUERY_INIT, rel=0.05), path


@pytest.mark.parametrize("content", ["{", '{"loaded": 3}'])
def test_a_damaged_import_json_is_refused(imported, tmp_path, content):
  copy = copied(pathlib.Path(imported), tmp_path / "copy")
  (copy / "import.json").write_text(content)
  with pytest.raises(UserError, match="import.json (is not JSON|.* import_weights)"):
    started(str(copy), tmp_path / "scratch")


def test_an_import_in_one_file_names_its_random_parameters(imported, tmp_path):
  file = str(tmp_path / "imported.safetensors")
  write_one_file(imported, file)
  assert restore.initialised(file) == restore.initialised(imported) != set()


@pytest.mark.parametrize("case", ["bin", "fp16 variant", "shards", "names of older libraries"])
def test_a_folder_may_have_other_formats(sd, imported, tmp_path, case):
  folder, tolerance = copied(sd, tmp_path / "sd"), 0.0
  unet, vae, text = (next((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder"))
  values = {path: load_file(path) for path in (unet, vae, text)}
  if case == "bin":
    for path in values:
      torch.save({name: torch.from_numpy(x) for name, x in values[path].items()}, path.with_suffix(".bin"))
      path.unlink()
    text.with_suffix(".bin").rename(text.with_name("pytorch_model.bin"))
  elif case == "fp16 variant":
    tolerance = 1e-3
    for path in values:
      halved = {name: x.astype(np.float16) for name, x in values[path].items()}
      save_file(halved, path.with_name(f"{path.stem}.fp16.safetensors"))
      path.unlink()
  elif case == "shards":
    names = sorted(values[unet])
    shards = {f"{unet.stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
      save_file({name: values[unet][name] for name in own}, unet.with_name(file))
    weight_map = {name: file for file, own in shards.items() for name in own}
    unet.with_name(f"{unet.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    unet.unlink()
  else:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in values[vae].items():
      for new, old in older.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
      renamed[name] = value
    save_file(renamed, vae)
    positions = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    save_file({f"text_model.{name}": x for name, x in values[text].items()} | positions, text)
  config, loaded, ignored = load(folder)
  assert config.to_dict() == config_of(imported).to_dict()
  assert_same_params(loaded, imported, rtol=tolerance)
  assert len(ignored) == (case == "names of older libraries")


def compvis_file(sd: pathlib.Path) -> dict[str, torch.Tensor]:
  pipeline = StableDiffusionPipeline.from_pretrained(sd)
  states = {part: getattr(pipeline, part).state_dict() for part in ("unet", "vae", "text_encoder")}
  states["text_encoder"] = {f"text_model.{name}": x for name, x in states["text_encoder"].items()}
  return compvis_names.single_file(states, depth=1, levels=2)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_is_imported(sd, imported, tmp_path, suffix):
  state = compvis_file(sd)
  path = tmp_path / f"v1.{suffix}"
  if suffix == "ckpt":
    ema = {f"model_ema.{name.replace('.', '')}": x for name, x in state.items() if name.startswith("model.")}
    torch.save({"state_dict": state | ema | {"betas": torch.ones(10)}, "global_step": 7}, path)
  else:
    save_torch({name: x.contiguous() for name, x in state.items()}, path)
  config, loaded, ignored = load(path)
  assert_same_params(loaded, imported)
  assert config.model.to_dict() == config_of(imported).model.to_dict()
  assert config.image_size == 512  # Stable Diffusion's size: the file has none
  assert len(ignored) == (len(ema) + 1 if suffix == "ckpt" else 0)


def check_clip(run: pathlib.Path, embed_images: Any, embed_texts: Any) -> None:
  """Compare unit embeddings of an imported CLIP with those of PyTorch's model."""
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  tokens = Tokenizer(pipelines.LENGTH)(pipelines.PROMPTS)
  model, params = inference.load(str(run), batch_size=8)
  with torch.no_grad():
    image = embed_images(nchw(np.asarray(normalise(jnp.asarray(images)))))
    text = embed_texts(torch.from_numpy(tokens).long())
  assert networks.relative_error(model.embed_images(params, images, seed=0), image) < 1e-5
  assert networks.relative_error(model.embed_texts(params, tokens), text) < 1e-5


def test_a_clip_of_transformers_is_imported(tmp_path):
  vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **CLIP_SIZES)
  theirs = randomise(CLIPModel(CLIPConfig(text_config=pipelines.TEXT, vision_config=vision, projection_dim=16)), 0)
  theirs.save_pretrained(tmp_path / "clip")
  import_weights.import_weights(str(tmp_path / "clip"), str(tmp_path / "run"))
  unit = lambda output: torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
  check_clip(
    tmp_path / "run",
    lambda pixels: unit(theirs.get_image_features(pixel_values=pixels)),
    lambda tokens: unit(theirs.get_text_features(input_ids=tokens)),
  )
  params = restore.restore_params(str(tmp_path / "run"))
  assert float(params["logit_scale"]) == theirs.logit_scale.item()
  assert json.loads((tmp_path / "run" / "import.json").read_text())["initialised"] == []


@pytest.mark.parametrize("form", ["folder", "file", "file of several processes"])
def test_a_clip_of_open_clip_is_imported(tmp_path, form):
  vision = CLIPVisionCfg(layers=2, width=64, patch_size=8, image_size=32)
  text = CLIPTextCfg(layers=2, width=64, heads=1, context_length=pipelines.LENGTH)
  theirs = randomise(OpenClip(16, vision, text, quick_gelu=form == "folder"), 0)
  source = tmp_path / "clip"
  source.mkdir()
  if form == "folder":
    save_torch(theirs.state_dict(), source / "open_clip_model.safetensors")
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
  else:
    source, prefix = source / "epoch_1.pt", "module." * (form != "file")
    torch.save({"state_dict": {prefix + name: x for name, x in theirs.state_dict().items()}, "epoch": 1}, source)
  import_weights.import_weights(str(source), str(tmp_path / "run"))
  embed = (functools.partial(method, normalize=True) for method in (theirs.encode_image, theirs.encode_text))
  check_clip(tmp_path / "run", *embed)


SQUASHED = {"preprocess_cfg": {"resize_mode": "squash"}}
OWN = "open_clip's own vision transformer and text transformer are supported, such as ViT-B-32"


@pytest.mark.parametrize(
  "config, warned",
  [(SQUASHED, True), ({"preprocess_cfg": {"interpolation": "bilinear"}}, True)]
  + [({"preprocess_cfg": {"resize_mode": "shortest", "interpolation": "bicubic"}}, False)],
)
def test_another_preprocessing_of_open_clip_gives_a_warning(tmp_path, caplog, config, warned):
  """The published accuracy of DFN's ViT-H-14, for example, was measured on squashed images."""
  from_torch.open_source(write_open_clip(tmp_path, {"model_cfg": {}} | config))
  assert ("squashes images, or resizes them" in caplog.text) == ("published ones" in caplog.text) == warned


@pytest.mark.parametrize(
  "config, warned",
  [({"size": {"height": 32, "width": 32}}, True), ({"size": {"shortest_edge": 32}, "resample": 2}, True)]
  + [({"size": {"shortest_edge": 32}, "resample": 3}, False), ({"size": 32}, False)],
)
def test_another_preprocessing_of_transformers_gives_a_warning(tmp_path, caplog, config, warned):
  write_open_clip(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
  from_torch.open_source(tmp_path)
  assert ("squashes images, or resizes them" in caplog.text) == warned


@pytest.mark.parametrize(
  "config, message",
  [
    ({"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}, "timm_model_name is 'convnext_base'"),
    ({"model_cfg": {"text_cfg": {"hf_model_name": "roberta-base"}}}, "text_cfg: hf_model_name is 'roberta-base'"),
    ({"model_cfg": {"custom_text": True}}, f"model_cfg: custom_text is True; it is not supported; {OWN}"),
    ({"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, "vision_cfg: pool_type is 'avg'"),
    ({"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3]}}}, "layers is .3, 4, 6, 3.; it should be a number"),
    ({"model_cfg": {"vision_cfg": "ViT"}}, "vision_cfg is 'ViT'; it should be an object"),
    ({"model_cfg": None}, "model_cfg is None; it should be an object"),
    ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}, "mean is .0.5, 0.5, 0.5.; only OpenAI's"),
    ({"preprocess_cfg": [1]}, r"preprocess_cfg is \[1\]; it should be an object"),
  ],
)
def test_unsupported_towers_of_open_clip_are_refused(tmp_path, config, message):
  refused(write_open_clip(tmp_path / "clip", {"model_cfg": {}} | config), tmp_path / "run", message)


def test_tensors_of_other_towers_are_refused(tmp_path):
  arrays = {"visual.proj": np.zeros((4, 4), np.float32), "visual.trunk.stem.weight": np.zeros(4, np.float32)}
  save_file(arrays, tmp_path / "a.safetensors")
  refused(tmp_path / "a.safetensors", tmp_path / "run", f"is no whole checkpoint of such a network: .*; {OWN}")


def refused(source: pathlib.Path, out: pathlib.Path, message: str) -> None:
  """Check that an import is refused in one line, with nothing written."""
  before = sorted(out.parent.iterdir())
  with pytest.raises(UserError, match=message) as error:
    import_weights.import_weights(str(source), str(out))
  assert "\n" not in str(error.value)
  assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_missing_component_folder_is_named(sd, tmp_path, part):
  shutil.rmtree(copied(sd, tmp_path / "sd") / part)
  refused(tmp_path / "sd", tmp_path / "run", f"has no folder {part}; .* has unet, vae, text_encoder, tokenizer")


@pytest.mark.parametrize(
  "file, changes, message",
  [
    ("unet/config.json", {"in_channels": 9}, "in_channels is 9; .* have 4"),
    ("unet/config.json", {"cross_attention_dim": 1024}, "cross_attention_dim is 1024; .* have 64"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2]}, r"transformer_layers_per_block is \[1, 2\]"),
    ("unet/config.json", {"attention_head_dim": [5, 10]}, r"attention_head_dim is \(5, 10\); it should be a value"),
    ("unet/config.json", {"attention_head_dim": 5}, "model.unet.widths has .32, 64.; it must be a multiple of num"),
    (
      "unet/config.json",
      {"block_out_channels": [32, 96]},
      r"unet parameter \S+ has shape \(.*64.*; its model has",
    ),
    ("vae/config.json", {"layers_per_block": 2}, r"vae lacks \d+ of its model's parameters, such as encoder.down"),
    ("text_encoder/config.json", {"vocab_size": 99}, "the text tower has 99 tokens; only CLIP's"),
    ("tokenizer/tokenizer.json", {"model": {"vocab": {"a": 0}}}, "is not CLIP's vocabulary"),
  ],
)
def test_a_folder_of_another_model_is_refused(sd, tmp_path, file, changes, message):
  path = copied(sd, tmp_path / "sd") / file
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  refused(tmp_path / "sd", tmp_path / "run", message)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_model_index_is_refused(sd, tmp_path, content):
  path = copied(sd, tmp_path / "sd") / "model_index.json"
  path.unlink() if content is None else path.write_text(content)
  refused(tmp_path / "sd", tmp_path / "run", "model_index.json")


def test_a_pipeline_without_a_unet_is_refused_by_its_name(tmp_path):
  """Like Stable Diffusion XL, this pipeline has a second text encoder."""
  parts = dict.fromkeys(("text_encoder", "text_encoder_2", "transformer", "vae"), ["a", "b"])
  (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
  needed = "a Stable Diffusion v1 has unet, vae, text_encoder, tokenizer"
  refused(tmp_path, tmp_path / "run", f", a FluxPipeline, has no folder unet; {needed}")


@pytest.mark.parametrize(
  "names, message",
  [
    (["conditioner.embedders.0.x"], r"has no model.diffusion_model\.\*: a Stable Diffusion v1 has .* conditioner"),
    (["model.diffusion_model.input_blocks.0.0.weight"], r"has no first_stage_model\.\*: a Stable Diffusion v1 has"),
    (
      ["unet.conv_in.kernel", "unet.conv_in.bias"],
      "is a run in one file, .* no import: give it as --workdir or --conf",
    ),
    ([], "its tensors: none"),
  ],
)
def test_a_single_file_of_another_kind_is_refused(tmp_path, names, message):
  save_file({name: np.zeros(1, np.float32) for name in names}, tmp_path / "x.safetensors")
  refused(tmp_path / "x.safetensors", tmp_path / "run", message)


def test_a_missing_source_is_refused(tmp_path):
  refused(tmp_path / "nowhere", tmp_path / "run", "no file or folder .*nowhere; .* on the Hugging Face hub hf:ORG/NAME")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", tmp_path / "run", "has neither a model_index.json")


def test_an_output_folder_that_is_not_empty_is_refused(sd, tmp_path):
  out = tmp_path / "run"
  out.mkdir()
  (out / "kept.txt").write_text("kept")
  refused(sd, out, "is not empty; give a new folder")
  assert [path.name for path in out.iterdir()] == ["kept.txt"]


def test_nothing_is_left_when_the_disk_is_full(sd, tmp_path, monkeypatch):
  full = mock.Mock(side_effect=OSError(28, "No space left on device"))
  monkeypatch.setattr(import_weights.checkpoint, "Checkpointer", full)
  with pytest.raises(OSError, match="No space left on device"):
    import_weights.import_weights(str(sd), str(tmp_path / "run"))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "scheduler, schedule",
  [
    (PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), "scaled_linear"),
    (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "cosine"),
    (DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012), "linear"),
  ],
)
def test_the_noise_schedule_comes_from_the_source(sd, tmp_path, scheduler, schedule):
  scheduler.save_pretrained(copied(sd, tmp_path / "sd") / "scheduler")
  source = from_torch.open_source(tmp_path / "sd")
  assert import_weights.make_config(source).image_diffusion.schedule == schedule


@pytest.mark.parametrize("limit, length", [(7, 7), (10**30, pipelines.LENGTH), (float("inf"), pipelines.LENGTH)])
def test_captions_are_as_long_as_the_tokenizer_and_the_encoder_allow(sd, tmp_path, limit, length):
  config = copied(sd, tmp_path / "sd") / "tokenizer" / "tokenizer_config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": limit}))
  assert from_torch.open_source(tmp_path / "sd").fields["data.max_length"] == length


@pytest.mark.slow
def test_the_command_prints_how_many_parameters_were_loaded(sd, environment, tmp_path):
  done = call("import_weights", environment, f"--source={sd}", f"--out={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  assert "352 parameters loaded, 131 initialised, 0 ignored; import.json names each" in done.stderr
