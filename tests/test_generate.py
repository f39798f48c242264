from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import untrained
from PIL import Image

from diffdis_jax import generate, inference
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.structs import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("run"))
  untrained.make_run(path)
  return path


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image)


def test_images_grid_and_manifest(run, tmp_path):
  prompts = ["a red star", "ein blauer Würfel"]
  generate.generate(run, prompts, str(tmp_path / "new" / "out"), num_images=2, seed=5, ema=False, batch_size=3)
  out = tmp_path / "new" / "out"
  files = [f"0000{i}.png" for i in range(4)]
  assert sorted(p.name for p in out.iterdir()) == [*files, "grid.png", "prompts.json"]
  assert [p.name for p in out.parent.iterdir()] == ["out"]

  model, params = inference.load(run, ema=False)
  asked = [prompts[0]] * 2 + [prompts[1]] * 2
  expected = model.generate(params, Tokenizer(16)(asked), model.noise(4, 5))
  found = np.stack([pixels(out / file) for file in files])
  assert np.abs(found.astype(int) - expected).max() <= 1 and found.std() > 10
  manifest = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
  assert [(entry["file"], entry["prompt"]) for entry in manifest["images"]] == list(zip(files, asked, strict=True))
  assert manifest["protocol"] == {"steps": 2, "guidance": 2.0, "seed": 5, "checkpoint": 3, "ema": False}
  np.testing.assert_array_equal(pixels(out / "grid.png")[8:136, 8:136], found[0].repeat(4, 0).repeat(4, 1))


def test_noise_from_a_file_gives_the_same_as_its_seed(run, tmp_path):
  model, _ = inference.load(run)
  np.save(tmp_path / "noise.npy", model.noise(2, 9))
  prompts = ["a red star", "a blue ring"]
  generate.generate(run, prompts, str(tmp_path / "seed"), seed=9, ema=False)
  (tmp_path / "noise").mkdir()
  generate.generate(run, prompts, str(tmp_path / "noise"), noise=str(tmp_path / "noise.npy"), ema=False)
  for file in ("00000.png", "00001.png"):
    np.testing.assert_array_equal(pixels(tmp_path / "seed" / file), pixels(tmp_path / "noise" / file))


def test_averaged_weights_are_the_default(run, tmp_path):
  for name, settings in (("average", {}), ("raw", {"ema": False})):
    generate.generate(run, ["a red star"], str(tmp_path / name), **settings)
  average, raw = (pixels(tmp_path / name / "00000.png") for name in ("average", "raw"))
  assert average.std() < 1 < raw.std()  # the averages of this run are zeros
  assert json.loads((tmp_path / "average" / "prompts.json").read_text())["protocol"]["ema"] is True


@pytest.mark.parametrize("shape, shown", [((1, 8, 8, 3), "(1, 8, 8, 3)"), ((8, 8, 4), "(8, 8, 4)")])
def test_noise_of_another_shape_names_both(run, tmp_path, shape, shown):
  np.save(tmp_path / "noise.npy", np.zeros(shape))
  with pytest.raises(UserError) as error:
    generate.generate(run, ["a star"], str(tmp_path / "out"), noise=str(tmp_path / "noise.npy"))
  assert shown in str(error.value) and "(1, 8, 8, 4)" in str(error.value)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_unreadable_noise(tmp_path, content):
  (tmp_path / "noise.npy").write_bytes(content)
  with pytest.raises(UserError, match="cannot read --noise="):
    generate.read_noise(str(tmp_path / "noise.npy"))


def test_noise_must_be_finite_numbers(tmp_path):
  np.save(tmp_path / "noise.npy", np.array(["a"]))
  with pytest.raises(UserError, match="cannot read --noise="):
    generate.read_noise(str(tmp_path / "noise.npy"))
  with pytest.raises(UserError, match="not finite"):
    generate.check_noise(np.full((1, 2, 2, 4), np.nan, np.float32), expected=(1, 2, 2, 4))


def test_prompts(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("a red star\n\n  a blue ring \n", encoding="utf-8")
  assert generate.read_prompts([], str(file)) == ["a red star", "a blue ring"]
  assert generate.read_prompts(["", "a star"], None) == ["", "a star"]
  (tmp_path / "empty.txt").write_text("\n \n")
  (tmp_path / "latin.txt").write_bytes(b"W\xfcrfel")
  for prompts, name, message in (
    ([], None, "nothing to draw"),
    (["a star"], "prompts.txt", "give one of them"),
    ([], "empty.txt", "no prompt in"),
    ([], "absent.txt", "cannot read --prompts_file"),
    ([], "latin.txt", "cannot read --prompts_file"),
  ):
    with pytest.raises(UserError, match=message):
      generate.read_prompts(prompts, name and str(tmp_path / name))


def test_a_folder_in_use_is_left_alone(run, tmp_path):
  (tmp_path / "kept.txt").write_text("kept")
  with pytest.raises(UserError, match="is not empty"):
    generate.generate(run, ["a star"], str(tmp_path))
  with pytest.raises(UserError, match="is a file"):
    generate.generate(run, ["a star"], str(tmp_path / "kept.txt"))
  assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(generate.samples, "save_grid", full)
  with pytest.raises(UserError, match="No space left"):
    generate.write(tmp_path / "out", np.zeros((1, 8, 8, 3), np.uint8), ["a star"], protocol={})
  assert not list(tmp_path.iterdir())


def test_command_line(run, tmp_path):
  command = [sys.executable, "-m", "diffdis_jax.generate", f"--workdir={run}", f"--out={tmp_path / 'out'}"]
  bad = subprocess.run(command, capture_output=True, text=True)
  assert bad.returncode == 2 and not (tmp_path / "out").exists()
  assert bad.stderr == 'error: nothing to draw; give --prompt="a red star" (may be repeated) or --prompts_file\n'
  good = subprocess.run([*command, "--prompt=a red star", "--prompt=a ring, blue"], capture_output=True, text=True)
  assert good.returncode == 0, good.stderr
  assert len(json.loads((tmp_path / "out" / "prompts.json").read_text())["images"]) == 2
