"""Test the command prepare_data."""

import json
import subprocess
import sys
import types

import pytest
from PIL import Image

from diffdis_jax import inference, prepare_data
from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from tests import steps
from tests.raw_pairs import picture, write_tar


def run(*arguments):
  command = [sys.executable, "-m", "diffdis_jax.prepare_data", *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def raw(tmp_path):
  folder = tmp_path / "raw"
  folder.mkdir()
  write_tar(folder / "00000.tar", {"0.png": picture(0), "0.txt": b"red", "1.png": b"broken", "1.txt": b"x"})
  return folder


def test_a_folder_is_written_and_skipped_pairs_are_reported(raw, tmp_path):
  done = run("pairs", f"--source={raw}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert "1 pairs (train 1); skipped: 1 with corrupt image" in done.stderr
  assert json.loads((tmp_path / "out" / "report.json").read_text())["train"]["pairs"] == 1
  assert json.loads((tmp_path / "out" / "card.json").read_text()) == {"captions": ["red"]}
  with Image.open(tmp_path / "out" / "card.png") as sheet:
    assert sheet.width > 128
  assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}
  again = run("pairs", f"--source={raw}", f"--out={tmp_path / 'out'}")
  assert again.returncode == 2
  assert again.stderr == f"error: --out={tmp_path / 'out'} is not empty; give a new folder\n"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--source=raw", "--out=out"), "takes one name of files, pairs, cc3m, coco, flickr30k, folder, torchvision, "),
    (("laion", "--source=raw", "--out=out"), "not laion"),
    (("torchvision", "mnist", "--source=raw", "--out=out"), "prepare_data torchvision takes one name of cifar10, "),
    (("coco", "pets", "--source=raw", "--out=out"), "not coco pets: diffdis prepare_data cc3m --source=DIR"),
    (("pairs", "--source=nowhere", "--out=out"), "no folder nowhere"),
    (("cc3m", "--source=nowhere", "--out=out"), "no folder nowhere"),
    (("pairs", "--source=raw", "--out=out", "--num_processes=0"), "num_processes"),
    (("pairs", "--source=.", "--out=out"), "no .tar files in ."),
    (("pairs", "--source=raw"), "--out"),
    (("files", "--source=raw", "--out=out"), "raw holds tars; type: diffdis prepare_data pairs --source=raw --out=DIR"),
    (("files", "--source=raw"), "prepare_data files needs --out=DIR"),
    (("files", "--source=raw", "--out=out", "--held_out=0.9"), "held_out"),
    (("files", "--source=raw", "--out=out", "--held_out=nan"), "--held_out=nan is no number; give one"),
    (
      ("pairs", "--source=raw", "--out=out", "--held_out=0"),
      "--held_out has no effect on prepare_data pairs; leave it out",
    ),
    (("pairs", "--source=raw", "--out=out", "--image_size=512"), "--image_size has no effect on prepare_data pairs"),
    (
      ("latents", "--workdir=w", "--data=d", "--out=out", "--short_side=8"),
      "--short_side has no effect on prepare_data",
    ),
    (("pairs", "--source=raw", "--output=out"), "unknown flag --output; did you mean --out?"),
  ],
)
def test_wrong_input_is_refused_in_one_line_with_exit_code_2(raw, tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  done = run(*arguments)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
  assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
  ("changes", "flags", "same"),
  [
    ({}, {}, True),
    ({}, {"views": 1}, False),
    ({}, {"augment": '{"reduced_decoding": false}'}, True),
    ({}, {"augment": '{"crop": "random"}'}, False),
    ({"data.augment.hue": 0.1}, {}, False),
  ],
)
def test_views_that_would_all_be_equal_are_refused(tmp_path, monkeypatch, changes, flags, same):
  config = steps.make_config("generation")
  config.data.augment.update(crop="centre", flip=False)
  config.update_from_flattened_dict(changes)
  run = Run.of(config)
  model = steps.make_inference(config, mesh=steps.make_mesh())
  monkeypatch.setattr(inference, "load", lambda *_, **__: (model, {}))
  monkeypatch.setattr(prepare_data.run_config, "load", lambda path: run)
  monkeypatch.setattr(prepare_data.latents, "find_parts", lambda data: [])
  given = {"image_size": None, "batch_size": None, "views": 4, "augment": None, **flags}
  monkeypatch.setattr(prepare_data, "FLAGS", types.SimpleNamespace(**given))
  with pytest.raises(UserError, match="--views=4 of an image would all be the same" if same else "has no pair"):
    prepare_data.write_latents("RUN", "DATA", tmp_path / "out")
