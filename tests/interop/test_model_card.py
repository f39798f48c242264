"""Run the code of the model card in an environment without JAX and this package."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath
from PIL import Image

from diffdis_jax.export_weights import export_weights
from diffdis_jax.interop import model_card
from tests import tiny_clip
from tests.interop.test_torch_pipeline import export_config, export_of
from tests.test_requirements import EXTRAS

pytestmark = pytest.mark.slow

# Users of PyTorch do not need these packages, so that importing them fails here.
ABSENT = "import sys\nfor name in ('jax', 'flax', 'jaxtyping', 'diffdis_jax'):\n  sys.modules[name] = None\n"


def code_of(folder: pathlib.Path) -> str:
  """Return all Python blocks of the model card, joined."""
  return "\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S))


def run_code(code: str, cwd: pathlib.Path, **environment: str) -> str:
  """Run code and return its output. Downloads and copies are stored in `cwd`."""
  (cwd / "card.py").write_text(ABSENT + code)
  variables = {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
  path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  command = [sys.executable, "card.py"]
  done = subprocess.run(command, cwd=cwd, env=path | variables | environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "packages that were not found" not in done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("made")
  export_of(path, sample_prompts=('a "red" 🍎', "blue ring"))  # quotes and emoji, as in captions
  return path / "out"


def test_the_code_for_a_folder_runs(folder, tmp_path):
  code = code_of(folder)
  lines = [line for line in code.splitlines() if line]
  assert len(lines) == 4  # one line for the import, two for generation, one for classification
  # The card has no results that were written to another folder.
  card = (folder / "README.md").read_text()
  assert "## Figures\n\nNone are recorded with the run.\n" in card
  assert (
    'pip install torch "diffusers>=0.35.2" transformers accelerate ftfy' in card
    and "diffusers>=0.35.2" in EXTRAS["torch"]
  )
  (tmp_path / "FOLDER").symlink_to(folder)
  # A pipeline that was saved works in another process too.
  saved = 'pipe.save_pretrained("saved")\n' + "\n".join(lines[:2]).replace('"FOLDER"', '"saved"') + "\n"
  printed = run_code(code + saved + 'print(pipe.classify(image, ["a", "b"]).labels)\n', tmp_path)
  assert printed.count("\n") == 2 and printed.startswith("['")


def test_the_card_describes_a_mixture_whose_sources_have_default_fields():
  mixture = {"a": {"path": "/home/somebody/cc3m"}, "b": {"name": "shapes", "split": "test", "weight": 0.5}}
  text = model_card._data({"name": "shapes", "path": "", "split": "train", "mixture": mixture})
  assert text == "pairs cc3m, split train, weight 1.0; shapes, split test, weight 0.5"
  assert model_card._data(mixture["a"] | {"mixture": {}}) == "pairs cc3m, split train"


def test_the_prompts_are_of_the_runs_own_data(tmp_path):
  """Also where the run generated no samples, as a run of discrimination alone."""
  (tmp_path / "card.json").write_text('{"captions": ["two cats", "a boat"]}')
  shapes = {"name": "shapes", "path": "", "mixture": {}}
  for data, drawn, expected in (
    (shapes, ("a house",), ["a house"]),
    (shapes, (), ["a red circle", "a red square"]),
    ({"name": "pairs", "path": str(tmp_path), "mixture": {}}, (), ["two cats", "a boat"]),
    (shapes | {"mixture": {"a": {"path": str(tmp_path)}}}, (), ["two cats", "a boat"]),
    ({"name": "pairs", "path": "gs://of-another/machine", "mixture": {}}, (), [*model_card.PROMPTS]),
  ):
    assert [*model_card._prompts({"data": data, "sample_prompts": drawn}, step=3)][:2] == expected
  # The data of an import's config were never used.
  assert model_card._prompts({"data": shapes, "sample_prompts": ()}, step=0) == model_card.PROMPTS


def test_the_grid_of_the_demo_is_shown(tmp_path):
  (tmp_path / "run" / "samples").mkdir(parents=True)
  (tmp_path / "run" / "samples" / "grid_00003000.png").write_bytes(b"grid")
  assert model_card._copy_samples(epath.Path(tmp_path / "run"), tmp_path, 3000) == 3000
  assert (tmp_path / "samples.png").read_bytes() == b"grid"


def test_a_file_of_results_adds_no_markup():
  """Anybody may have written the file; it may contain characters that Markdown and HTML interpret."""
  hostile = "x |\n\n# Y <script>alert(1)</script> [a](javascript:b) ![c](//d) `e` *f* _g_ ~~h~~ $i$ \\"
  record = {"protocol": {"templates": hostile[:50], hostile[:20]: 1}, "pretrained": "a_b"}
  protocol, metrics = model_card._protocol(record), model_card._shown({hostile: 0.5})
  assert "checkpoint a_b" in protocol
  for text in (model_card._plain(hostile), protocol, metrics):
    assert "\n" not in text and "<" not in text and not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]~$|]", text)
  assert model_card._plain("mean_per_class_recall 0.5") == "mean_per_class_recall 0.5"


def test_the_code_for_a_run_that_only_classifies_runs(tmp_path):
  export_of(tmp_path, objectives=("discrimination",))
  (tmp_path / "FOLDER").symlink_to(tmp_path / "out")
  Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
  assert run_code(code_of(tmp_path / "out"), tmp_path).startswith("['")


def test_the_code_for_an_autoencoder_alone_runs(tmp_path):
  export_of(tmp_path, objectives=("reconstruction",))
  (tmp_path / "FOLDER").symlink_to(tmp_path / "out")
  Image.new("RGB", (48, 32)).save(tmp_path / "photo.png")
  shapes = "print(tuple(latents.shape), tuple(images.shape))\n"
  assert run_code(code_of(tmp_path / "out") + shapes, tmp_path) == "(1, 4, 8, 12) (1, 3, 32, 48)\n"
  card = (tmp_path / "out" / "README.md").read_text()
  assert "import_weights" not in card and "Watermarks" not in card


def test_the_code_for_the_hub_runs(tmp_path):
  """huggingface_hub takes a repository that was downloaded earlier from its cache."""
  commit = "a" * 40
  cached = tmp_path / "hf" / "hub" / "models--me--tiny"
  export_weights(export_of(tmp_path), str(cached / "snapshots" / commit), repo="me/tiny")
  readme = cached / "snapshots" / commit / "README.md"
  readme.write_text(readme.read_text().replace('"COMMIT"', f'"{commit}"'))  # as a push does
  (cached / "refs").mkdir()
  (cached / "refs" / "main").write_text(commit)
  code, card = code_of(cached / "snapshots" / commit), (cached / "snapshots" / commit / "README.md").read_text()
  pinned = f'revision="{commit}", custom_revision="{commit}"'
  assert f'from_pretrained("me/tiny", custom_pipeline="me/tiny", trust_remote_code=True, {pinned})' in code
  assert f'call `huggingface_hub.snapshot_download("me/tiny", revision="{commit}")` once' in card
  program = 'from huggingface_hub import snapshot_download\nfolder = snapshot_download("me/tiny")\n'
  assert run_code(program + code.replace('"me/tiny"', "folder"), tmp_path).startswith("['")


def test_the_code_for_a_clip_runs(tmp_path):
  export_config(tiny_clip.get_config(), tmp_path)
  (tmp_path / "FOLDER").symlink_to(tmp_path / "out")
  shapes = 'print(model.logit_scale.shape, tuple(preprocess(__import__("PIL.Image").Image.new("RGB", (9, 8))).shape))'
  assert run_code(f"{code_of(tmp_path / 'out')}\n{shapes}\n", tmp_path) == "torch.Size([]) (3, 16, 16)\n"
