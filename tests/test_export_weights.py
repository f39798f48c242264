"""Test export_weights: the images that diffusers generates from the export, its files, and refusals."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.numpy import load_file

from diffdis_jax import export_weights, import_weights, inference
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.interop import from_torch, mapping, to_torch
from diffdis_jax.run import checkpoint, digests, restore, workdir
from diffdis_jax.structs import TrainState
from tests import pages, pipelines
from tests.command_runs import ROOT, call
from tests.models.networks import random_params
from tests.report import written_run
from tests.steps import config_of, network_of

pytest_plugins = ("tests.command_runs", "tests.pipelines")

STEPS = 3
METRICS = {"step": 5, "loss": 0.123456789, "loss_generation": 0.1, "loss_discrimination": None}
RESULTS = {
  "zero_shot": {
    "emoji": {
      "dataset": "emoji",
      "pretrained": "step 5",
      "metrics": {"acc1": 0.5, "acc5": 0.75},
      "protocol": {"steps": 1, "templates": ["a {}", "the {}"], "metric": "", "folder": "/home/me/emoji"},
    }
  }
}
LINES = ({"step": 4, "test/acc1": 0.25}, METRICS, {"step": 8, "test/acc1": 0.9})


def make_run(folder: pathlib.Path, imported: str, **changes: object) -> str:
  """Make a run of the imported network with other random parameters and averages, and unequal latent statistics."""
  config = config_of(imported)
  config.update_from_flattened_dict(changes)
  workdir.open_for_training(str(folder), config.to_dict())
  shapes = network_of(config).shapes
  statistics = {
    "autoencoder.shift": np.float32([0.5, -0.5, 0.1, 0.0]),
    "autoencoder.scale": np.float32([0.2, 0.3, 0.5, 1.0]),
  }
  params, ema = (random_params(shapes, seed=seed) | statistics for seed in (1, 2))
  for values in (params, ema):
    values["autoencoder.conv_out.kernel"] *= 0.3  # images neither black nor white
  averaged = {path: value for path, value in ema.items() if not path.startswith("autoencoder.")}
  with checkpoint.Checkpointer(str(folder)) as checkpointer:
    checkpointer.save(5, TrainState(params=params, ema=averaged))
  (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES) + '{"step": 9, "lo')
  (folder / "samples").mkdir()
  for step in (2, 4, 8):
    (folder / "samples" / f"samples_{step:08d}.png").write_bytes(f"of step {step}".encode())
  (folder / "results.json").write_text(json.dumps(RESULTS))
  return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, imported) -> str:
  beside_tokens = {"model.alignment.spatial_pool": 2, "model.text_encoder.token_embedding_weight": 0.7}
  return make_run(
    tmp_path_factory.mktemp("export") / "run", imported, **beside_tokens, **{"inference.num_noise_samples": 2}
  )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run) -> pathlib.Path:
  """Export by the command in a process that must not import torch, and return the folder."""
  out = tmp_path_factory.mktemp("export") / "out"
  code = (
    "import sys; from absl import flags; from diffdis_jax import export_weights as verb\n"
    "verb.define_flags(); flags.FLAGS(sys.argv); verb.main([])\n"
    "roots = {name.split('.')[0] for name in sys.modules}\n"
    "assert not roots & {'torch', 'diffusers'}, roots"
  )
  command = [sys.executable, "-c", code, f"--workdir={run}", f"--out={out}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return out


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
  return np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32)


def test_diffusers_generates_the_images_of_the_run(run, exported, noise):
  model, params = inference.load(run, batch_size=8, generation_steps=STEPS)
  images = model.generate(params, Tokenizer(model.max_length)(pipelines.PROMPTS), noise)
  drawn = pipelines.draw(StableDiffusionPipeline.from_pretrained(exported), noise, steps=STEPS)
  assert pipelines.psnr(drawn, images) >= 60
  assert drawn.std() > 10 and pipelines.psnr(drawn[:1], drawn[1:]) < 30


def test_an_import_is_exported_bit_for_bit(sd, imported, tmp_path):
  export_weights.export_weights(imported, str(tmp_path / "out"))
  for part in ("unet", "vae", "text_encoder"):
    (before,), (after,) = ((folder / part).glob("*.safetensors") for folder in (sd, tmp_path / "out"))
    # Published checkpoints have a prefix that transformers 5 leaves out.
    exported = {name.removeprefix("text_model."): value for name, value in load_file(after).items()}
    expected = load_file(before)
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_an_export_is_imported_back_with_the_parts_of_diffdis(run, exported):
  source = from_torch.open_source(exported)
  config, expected = import_weights.make_config(source), config_of(run)
  for field in ("image_size", "text_diffusion", "image_diffusion", "condition_timestep", "objectives", "inference"):
    assert config.to_dict()[field] == expected.to_dict()[field]
  for part in ("alignment", "text_encoder"):
    assert config.model[part].to_dict() == expected.model[part].to_dict()
  matched = from_torch.match(source, network_of(config).shapes)
  loaded = from_torch.read(matched)
  params = restore.restore_params(run)
  assert loaded.keys() == params.keys() - set(mapping.STATISTICS) and not matched.ignored
  for path, value in loaded.items():
    if "quant." not in path:  # the export multiplies the latents' shift and scale into these
      np.testing.assert_array_equal(value, params[path], err_msg=path)


def test_the_export_has_all_files(run, exported):
  files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
  tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
  configs = ("model_index.json", "scheduler/scheduler_config.json", "pipeline.py", "diffdis/torch_diffdis.py")
  parts = {f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "diffdis")}
  expected = {*configs, *parts, *to_torch.FILES.values(), *(f"tokenizer/{name}" for name in tokenizer)}
  expected |= {"README.md", "samples.png", digests.NAME}
  assert files == expected
  own, config = json.loads((exported / "diffdis" / "config.json").read_text()), config_of(run)
  assert own["model"]["alignment"] == config.model.alignment.to_dict()
  assert own["text_diffusion"] == config.text_diffusion.to_dict()
  assert (own["max_length"], own["condition_timestep"]) == (pipelines.LENGTH, 1000)


@pytest.mark.slow
def test_the_code_of_the_page_on_weights_generates_and_classifies(exported, environment, tmp_path):
  (tmp_path / "DIR").symlink_to(exported)
  block = pages.python_block("docs/weights.md", "from_pretrained")
  variables = {**environment, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", block]
  done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert done.stdout in ("['red star']\n", "['blue ring']\n")


def test_the_model_card_describes_the_run(exported):
  card = (exported / "README.md").read_text()
  for text in (
    "checkpoint of step 5, averaged weights, float32",
    "- 5 steps of 64 pairs, 320 pairs in all",
    "- data: shapes, split train",
    "- step 4: test/acc1 0.25\n- step 5: loss 0.123457, loss_generation 0.1, loss_discrimination not finite\n",
    "| zero_shot | emoji | acc1 0.5, acc5 0.75 | checkpoint step 5, steps 1, templates 2 of them, folder emoji |\n",
    "![Samples, each with its prompt](samples.png)\n\n*Generated at step 4 of the training",
    'StableDiffusionPipeline.from_pretrained("FOLDER")',
    "Watermarks",
    "People and animals",
    '"condition_timestep": 1000',
    "pipeline.py, diffdis/torch_diffdis.py",
    "\nlicense: unknown\n",
  ):
    assert text in card
  assert "acc1 0.9" not in card  # this is of a later step
  assert (exported / "samples.png").read_bytes() == b"of step 4"


@pytest.mark.slow
@pytest.mark.parametrize("ema, dtype", [(True, "float32"), (False, "bfloat16"), (True, "float16")])
def test_averaged_and_raw_weights_are_exported_in_any_dtype(run, tmp_path, ema, dtype):
  export_weights.export_weights(run, str(tmp_path / "out"), ema=ema, dtype=dtype)
  params = restore.restore_params(run, ema=ema)
  for component in ("unet", "text_encoder", "diffdis"):
    for name, value in load_file(tmp_path / "out" / to_torch.file_of(component, dtype)).items():
      entry = mapping.from_name(component, name)
      expected = np.asarray(params[entry.path]).astype(to_torch.DTYPES[dtype])
      np.testing.assert_array_equal(entry.to_ours(value), expected, err_msg=name)
  assert f"{'averaged' if ema else 'raw'} weights, {dtype}" in (tmp_path / "out" / "README.md").read_text()


def refused(run: str, out: pathlib.Path, message: str, **settings: object) -> None:
  """Check that an export is refused in one line, with nothing written."""
  before = sorted(out.parent.iterdir())
  with pytest.raises(UserError, match=message) as error:
    export_weights.export_weights(run, str(out), **settings)
  assert "\n" not in str(error.value)
  assert sorted(out.parent.iterdir()) == before


def test_an_autoencoder_alone_is_exported_for_diffusers(imported, tmp_path, caplog):
  caplog.set_level("INFO")
  run = make_run(tmp_path / "run", imported, objectives=("reconstruction",))
  export_weights.export_weights(run, str(tmp_path / "out"))
  assert "an autoencoder alone: the pipeline's vae encodes and decodes" in caplog.text
  assert type(AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae")) is AutoencoderKL
  with pytest.raises(UserError, match="has no folder unet; a Stable Diffusion v1 has unet, vae") as error:
    import_weights.import_weights(str(tmp_path / "out"), str(tmp_path / "again"))
  assert "\n" not in str(error.value) and not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_card_names_the_import_behind_a_run(sd, imported, tmp_path):
  run = make_run(tmp_path / "run", imported, init_from="second")
  behind = [{"steps": 4}, {"steps": 0, "imported": "hf:org/sd@abc"}]
  start = {"event": "start", "time": 0, "step": 0, "init_from": behind}
  (tmp_path / "run" / "history.jsonl").write_text(json.dumps(start))
  export_weights.export_weights(run, str(tmp_path / "out"))
  assert "- started from `second`, which began from `hf:org/sd@abc`\n" in (tmp_path / "out" / "README.md").read_text()
  export_weights.write_one_file(imported, str(tmp_path / "sd.safetensors"))
  export_weights.export_weights(str(tmp_path / "sd.safetensors"), str(tmp_path / "again"))
  assert f"Imported from `{sd.name}`, and not trained since" in (tmp_path / "again" / "README.md").read_text()


def test_licences_in_a_bucket_are_left_out_on_a_machine_without_gcsfs(tmp_path, caplog, monkeypatch):
  run = written_run.write(tmp_path / "run", **{"data.path": "gs://away/data", "init_from": "gs://away/of-the-cluster"})
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find_spec(name))
  assert export_weights.licences_of(run) == ""
  assert "the licences of its data cannot be read, add them yourself: gs://away/data needs the package" in caplog.text


def test_wrong_arguments_are_refused(run, environment, tmp_path):
  refused(str(tmp_path / "nowhere"), tmp_path / "out", "no folder .*nowhere")
  refused(run, tmp_path / "out", "no checkpoint 7 in", step=7)
  kept = tmp_path / "kept"
  kept.mkdir()
  (kept / "file").write_text("kept")
  refused(run, kept, "is not empty; give a new folder")
  refused(run, kept / "file", "is a file; it should be a folder")
  for flags, message in (([], "nowhere to write to; give --out=DIR"), (["--out=F", "--noprivate"], "--private has no")):
    done = call("export_weights", environment, f"--workdir={run}", *flags)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
  refused(run, tmp_path / "x.ckpt", "x.ckpt should be a folder: PyTorch's libraries read an export as one")


@pytest.mark.slow
def test_values_that_do_not_fit_the_dtype_leave_no_file(imported, tmp_path):
  run = make_run(tmp_path / "run", imported)
  params = dict(restore.restore_params(run, ema=False))
  params["unet.conv_in.bias"] = np.full(params["unet.conv_in.bias"].shape, 1e6, np.float32)
  with checkpoint.Checkpointer(run) as checkpointer:
    checkpointer.save(6, TrainState(params=params))
  message = "parameter unet.conv_in.bias is beyond the range of float16; take another --dtype"
  refused(run, tmp_path / "out", message, dtype="float16")
  with checkpoint.Checkpointer(run) as checkpointer:
    params["unet.conv_in.bias"] *= np.float32(np.nan)
    checkpointer.save(7, TrainState(params=params))
  refused(run, tmp_path / "out", "parameter unet.conv_in.bias is not finite, .*; take an earlier checkpoint, --step")


@pytest.mark.slow
def test_a_damaged_export_is_named(exported, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(exported, folder)
  card = folder / "README.md"
  card.write_text(card.read_text().replace("license: unknown", "license: cc-by-4.0"))  # as its owner should
  assert digests.damage(folder) is None
  file = folder / to_torch.FILES["unet"]
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  name = file.relative_to(folder)
  with pytest.raises(
    UserError, match=f"is damaged: {name} holds other bytes than were saved; copy it again, or remove"
  ):
    import_weights.import_weights(str(folder), str(tmp_path / "run"))
  (folder / digests.NAME).unlink()
  import_weights.import_weights(str(folder), str(tmp_path / "run"))
