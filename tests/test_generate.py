from __future__ import annotations

import json
import types

import numpy as np
import pytest
from PIL import Image

from diffdis_jax import generate, inference
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.evals import samples
from diffdis_jax.run import restore
from tests.command_runs import call

pytest_plugins = ("tests.untrained", "tests.command_runs")


class Inference:
  """Fill each image with the mean of its noise, and record the prompts and the settings."""

  max_length, batch_size = 16, 16
  generation_protocol = {"steps": 2, "guidance": 2.0}

  network = types.SimpleNamespace(latent_shape=(8, 8, 4))

  def noise(self, n, seed):
    return np.arange(n, dtype=np.float32)[:, None, None, None] * 10 + np.full((n, 8, 8, 4), seed, np.float32)

  def generate(self, params, tokens, noise, *, done):
    self.asked = [*map(Tokenizer(16).decode, tokens)]
    return np.stack([np.full((32, 32, 3), z.mean(), np.uint8) for z in noise])


@pytest.fixture
def model(monkeypatch):
  """Replace the model of every workdir by this Inference, at step 7, with averaged weights."""
  model = Inference()

  def load(path, **settings):
    model.settings = settings
    return model, {}

  monkeypatch.setattr(inference, "load", load)
  monkeypatch.setattr(restore, "choose", lambda run, step, ema: (7, ema))
  return model


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image)


def test_images_a_grid_and_a_manifest_are_written(model, tmp_path):
  prompts = ["a red star", "ein blauer Würfel"]
  out = tmp_path / "new" / "out"
  generate.generate("run", prompts, str(out), num_images=2, seed=5, batch_size=3, generation_steps=2)
  files = [f"0000{i}.png" for i in range(4)]
  assert sorted(p.name for p in out.iterdir()) == [*files, "grid.png", "prompts.json"]
  assert [p.name for p in out.parent.iterdir()] == ["out"]
  assert model.settings == {"step": 7, "ema": True, "batch_size": 3, "generation_steps": 2}
  for text, word in zip(model.asked, ("star", "star", "würfel", "würfel"), strict=True):
    assert word in text
  for i, file in enumerate(files):
    np.testing.assert_array_equal(pixels(out / file), np.full((32, 32, 3), 10 * i + 5))
  manifest = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
  asked = [(file, prompts[i // 2]) for i, file in enumerate(files)]
  assert [(entry["file"], entry["prompt"]) for entry in manifest["images"]] == asked
  assert manifest["protocol"] == {"steps": 2, "guidance": 2.0, "seed": 5, "checkpoint": 7, "ema": True}
  grid = pixels(out / "grid.png")
  assert (grid[8:136, 8:136] == 5).all() and (grid[8:136, 144:272] == 15).all() and grid.shape[1] == 280


def test_many_images_are_made_in_chunks_and_the_grid_shows_the_first(model, tmp_path, monkeypatch):
  monkeypatch.setattr(generate, "CHUNK", 3)
  monkeypatch.setattr(generate, "GRID", 4)
  generate.generate("run", ["a red star"], str(tmp_path / "out"), num_images=20, seed=1)
  for i in range(20):
    np.testing.assert_array_equal(pixels(tmp_path / "out" / f"{i:05d}.png"), np.full((32, 32, 3), 10 * i + 1))
  grid = pixels(tmp_path / "out" / "grid.png")
  assert grid.shape[1] == 4 * 136 + 8 and grid.shape[0] < 2 * 136


def test_the_initial_noise_may_come_from_a_file(model, tmp_path):
  np.save(tmp_path / "noise.npy", np.stack([np.full((8, 8, 4), value) for value in (40, 30)]))
  (tmp_path / "out").mkdir()
  generate.generate("run", ["a star", "a ring"], str(tmp_path / "out"), noise=str(tmp_path / "noise.npy"))
  assert [pixels(tmp_path / "out" / file)[0, 0, 0] for file in ("00000.png", "00001.png")] == [40, 30]
  protocol = json.loads((tmp_path / "out" / "prompts.json").read_text())["protocol"]
  assert protocol["noise"].endswith("noise.npy") and "seed" not in protocol
  assert model.settings["batch_size"] == 2


@pytest.mark.parametrize("shape, shown", [((1, 8, 8, 3), "(1, 8, 8, 3)"), ((8, 8, 4), "(8, 8, 4)")])
def test_noise_of_another_shape_is_refused_with_both_shapes(model, tmp_path, shape, shown):
  np.save(tmp_path / "noise.npy", np.zeros(shape))
  with pytest.raises(UserError) as error:
    generate.generate("run", ["a star"], str(tmp_path / "out"), noise=str(tmp_path / "noise.npy"))
  assert shown in str(error.value) and "(1, 8, 8, 4)" in str(error.value)
  assert not (tmp_path / "out").exists()


def test_unreadable_noise_is_refused(tmp_path):
  for content in (b"", b"not numpy", b"\x93NUMPY\x01\x00"):
    (tmp_path / "noise.npy").write_bytes(content)
    with pytest.raises(UserError, match="cannot read --noise="):
      generate.read_noise(str(tmp_path / "noise.npy"))
  np.save(tmp_path / "noise.npy", np.full((1, 2, 2, 4), np.nan, np.float32))
  with pytest.raises(UserError, match="something else than finite numbers"):
    generate.read_noise(str(tmp_path / "noise.npy"))


def test_prompts_come_from_flags_or_a_file(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("a red star\n\n  a blue ring \n", encoding="utf-8")
  assert generate.read_prompts([], str(file)) == ["a red star", "a blue ring"]
  assert generate.read_prompts(["", "a star"], None) == ["", "a star"]
  (tmp_path / "empty.txt").write_text("\n \n")
  (tmp_path / "latin.txt").write_bytes(b"W\xfcrfel")
  for prompts, name, message in (
    ([], "a\0b", "cannot read --prompts_file"),
    ([], None, "no prompt; give"),
    (["a star"], "prompts.txt", "give one of them"),
    ([], "empty.txt", "no prompt in"),
    ([], "absent.txt", "cannot read --prompts_file"),
    ([], "latin.txt", "cannot read --prompts_file"),
  ):
    with pytest.raises(UserError, match=message):
      generate.read_prompts(prompts, name and str(tmp_path / name))


def test_a_folder_that_is_not_empty_is_refused(model, tmp_path):
  (tmp_path / "kept.txt").write_text("kept")
  with pytest.raises(UserError, match="is not empty"):
    generate.generate("run", ["a star"], str(tmp_path))
  with pytest.raises(UserError, match="is a file"):
    generate.generate("run", ["a star"], str(tmp_path / "kept.txt"))
  assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_nothing_is_left_when_writing_fails(model, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(samples, "save_grid", full)
  with pytest.raises(OSError, match="No space left"):
    generate.generate("run", ["a star"], str(tmp_path / "out"))
  assert not list(tmp_path.iterdir())


def test_a_seed_beside_given_noise_is_refused(environment, tmp_path):
  flags = ["--workdir=run", f"--out={tmp_path / 'out'}", "--prompt=a red star", "--noise=noise.npy", "--seed=0"]
  bad = call("generate", environment, *flags)
  assert (bad.returncode, bad.stderr) == (2, "error: --noise and --seed are both given; give one of them\n")


def test_the_command_generates_and_refuses_wrong_flags(run, environment, tmp_path):
  to = [f"--workdir={run}", f"--out={tmp_path / 'out'}"]
  bad = call("generate", environment, *to)
  assert bad.returncode == 2 and not (tmp_path / "out").exists()
  assert bad.stderr == 'error: no prompt; give --prompt="a red star" (may be repeated) or --prompts_file\n'
  for flag in ("--steps=1000", "--guidance=-1.0"):
    bad = call("generate", environment, *to, "--prompt=a red star", flag)
    assert bad.returncode == 2 and bad.stderr.startswith(f"error: flag {flag}: ") and bad.stderr.count("\n") == 1
  flags = ["--prompt=a red star", "--prompt=a ring, blue", "--steps=3", "--seed=4", "--noema"]
  good = call("generate", environment, *to, *flags)
  assert good.returncode == 0, good.stderr
  written = json.loads((tmp_path / "out" / "prompts.json").read_text())
  assert [entry["prompt"] for entry in written["images"]] == ["a red star", "a ring, blue"]
  expected = {"steps": 3, "guidance": 4.0, "matmul_precision": "highest", "seed": 4, "checkpoint": 3, "ema": False}
  assert written["protocol"] == expected
  image = pixels(tmp_path / "out" / "00000.png")
  assert image.shape == (32, 32, 3) and image.std() > 0
