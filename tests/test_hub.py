"""Weights from and to the Hugging Face hub, of which a stand-in runs on this machine."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants, snapshot_download

from diffdis_jax import export_weights, import_weights
from diffdis_jax.errors import UserError
from diffdis_jax.interop import hub as hub_files
from diffdis_jax.run import restore
from tests.command_runs import call
from tests.hub_server import READER, TOKEN, Hub

pytest_plugins = ("tests.command_runs", "tests.pipelines", "tests.hub_server")
# huggingface_hub's own, at each upload of a large file.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")]

WEIGHTS = {
  "unet/diffusion_pytorch_model.safetensors",
  "vae/diffusion_pytorch_model.safetensors",
  "text_encoder/model.safetensors",
}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("HF_TOKEN", TOKEN)


def refused(message: str, act: Callable[[], object]) -> None:
  with pytest.raises(UserError, match=message) as error:
    act()
  assert "\n" not in str(error.value)


def downloaded(hub: Hub) -> set[str]:
  return {line.rpartition("/resolve/")[2].partition("/")[2] for line in hub.asked if line.startswith("GET /org/")}


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_import_from_the_hub_is_that_of_the_folder(hub, sd, imported, tmp_path):
  others = {"unet/diffusion_pytorch_model.bin": b"pickle", "safety_checker/model.safetensors": b"large"}
  repo = hub.add("org/sd", sd, others)
  commit = repo.tags["v1"] = repo.commits[0].sha
  repo.commit({"README.md": b"nothing else any more"}, "no weights")
  import_weights.import_weights("hf:org/sd@v1", str(tmp_path / "run"))
  loaded, expected = restore.restore_params(str(tmp_path / "run")), restore.restore_params(imported)
  assert loaded.keys() == expected.keys()
  for path, value in loaded.items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)
  assert json.loads((tmp_path / "run" / "import.json").read_text())["source"] == f"hf:org/sd@{commit}"
  assert {name for name in downloaded(hub) if not name.endswith((".json", ".txt"))} == WEIGHTS

  hub.asked.clear()
  hub_files.fetch(f"hf:org/sd@{commit}")
  assert downloaded(hub) == set()


@pytest.mark.parametrize(
  "names, weights",
  [
    (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    (
      ["open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors"],
      ["open_clip_model.safetensors"],
    ),
    (["v1-4.ckpt", "v1-4.safetensors", "README.md"], ["v1-4.safetensors"]),
    (
      ["config.json", "model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))],
      ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ),
  ],
  ids=["transformers", "open_clip_beside_timm", "single_file", "shards"],
)
def test_which_weights_are_read(names, weights):
  config = [name for name in names if name.endswith("config.json")]
  assert hub_files.choose(names, "org/name") == (config, weights)


def test_full_precision_rather_than_a_variant_and_what_diffdis_adds():
  fp16 = [name.replace(".safe", ".fp16.safe") for name in WEIGHTS if name.startswith("unet")]
  own = {"diffdis/config.json", "diffdis/diffusion_pytorch_model.safetensors"}
  names = ["model_index.json", *own, "diffdis/torch_diffdis.py", "tokenizer/vocab.json", *WEIGHTS, *fp16]
  configs, weights = hub_files.choose([*names, "v1.safetensors"], "org/name")
  assert {*configs, *weights} == {"model_index.json", *own, "tokenizer/vocab.json", *WEIGHTS}


def test_what_an_import_refuses(hub, sd, tmp_path):
  fetch = lambda address: lambda: hub_files.fetch(address)
  hub.add("org/sd", sd)
  hub.add("org/gated", sd, gated=True)
  unet = json.loads((sd / "unet" / "config.json").read_text()) | {"transformer_layers_per_block": [1, 2, 10]}
  hub.add("org/xl", sd, {"unet/config.json": json.dumps(unet).encode()})
  pickles = {name.replace(".safetensors", ".bin"): b"" for name in WEIGHTS}
  hub.add("org/pickles", tmp_path, {"model_index.json": b"{}", **pickles})
  hub.add("org/empty", tmp_path, {"README.md": b""})
  hub.add("org/single", tmp_path, {"v1-4.ckpt": b""})
  hub.add("org/siglip", tmp_path, {"config.json": b'{"model_type": "siglip"}', "model.safetensors": b"large"})
  hub.add("org/flux", tmp_path, {"model_index.json": b'{"_class_name": "FluxPipeline", "text_encoder_2": ["a", "b"]}'})
  hub.add("org/two", tmp_path, {"a.safetensors": b"", "b.safetensors": b""})
  refused("--source=hf:org should be hf:ORG/NAME or", fetch("hf:org"))
  refused("http.*/org/none is not there, or private; check the name", fetch("hf:org/none"))
  refused("/org/sd has no revision v7; name a branch", fetch("hf:org/sd@v7"))
  refused("/org/gated is gated; ask for access", fetch("hf:org/gated"))
  refused("org/pickles has no safetensors beside unet/diffusion_pytorch_model.bin", fetch("hf:org/pickles"))
  refused("org/empty has no safetensors beside README.md", fetch("hf:org/empty"))
  refused("beside v1-4.ckpt, .* or download the files and name their folder, or the file", fetch("hf:org/single"))
  refused("neither a model_index.json of Stable Diffusion nor a config.json of CLIP", fetch("hf:org/siglip"))
  refused("org/two has a.safetensors, b.safetensors; download the one", fetch("hf:org/two"))
  refused("transformer_layers_per_block is .1, 2, 10.; Stable Diffusion v1 and this package have 1", fetch("hf:org/xl"))
  refused("a FluxPipeline, has no folder unet", fetch("hf:org/flux"))
  assert not [name for name in downloaded(hub) if "safetensors" in name]


def test_offline_and_without_a_network(hub, monkeypatch):
  fetch = lambda: hub_files.fetch("hf:org/sd")
  hub.broken = "GET /api/models"
  refused("org/sd cannot be had: .*the hub has a bad day", fetch)
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
  refused("http://127.0.0.1:9/org/sd cannot be had: ", fetch)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  refused("HF_HUB_OFFLINE is set", fetch)


def test_a_push_is_the_export_as_one_commit_and_comes_back(hub, token, imported, tmp_path):
  export_weights.push_weights(imported, "me/new", str(tmp_path / "out"), private=True)
  repo, written = hub.repositories["me/new"], files_of(tmp_path / "out")
  assert repo.private and [commit.message for commit in repo.commits] == ["initial commit", "Write step 0"]
  assert {name: repo.files[name] for name in written} == written and len(repo.files) == len(written) + 1
  assert 'from_pretrained("me/new")' in repo.files["README.md"].decode()
  assert not [name for name in repo.files if name.endswith((".bin", ".ckpt", ".pt"))]
  StableDiffusionPipeline.from_pretrained(snapshot_download("me/new", endpoint=hub.endpoint))

  import_weights.import_weights("hf:me/new", str(tmp_path / "again"))
  before, after = (restore.restore_params(path) for path in (imported, str(tmp_path / "again")))
  for path, value in after.items():
    np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_a_second_push_leaves_nothing_of_the_first(hub, token, tmp_path):
  for name in ("first", "second"):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.safetensors").write_bytes(name.encode())
    hub_files.push(tmp_path / name, "me/model", private=False, message=name)
    if name == "first":
      hub.repositories["me/model"].files["LICENSE"] = b"somebody wrote it on the page"
  repo = hub.repositories["me/model"]
  assert not repo.private and repo.files.keys() == {".gitattributes", "LICENSE", "second.safetensors"}
  assert len(repo.commits) == 3


@pytest.mark.parametrize("broken", ["POST .*/preupload", "PUT /store/", "POST .*/commit/"])
def test_a_push_that_fails_writes_nothing(hub, token, tmp_path, monkeypatch, broken):
  monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's attempts
  (tmp_path / "export").mkdir()
  (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
  hub.broken = broken
  push = lambda: hub_files.push(tmp_path / "export", "me/model", private=True, message="first")
  refused("me/model cannot be had: .*(the hub has|Error while uploading)", push)
  assert hub.repositories["me/model"].files.keys() == {".gitattributes"}


def test_who_may_push(hub, imported, tmp_path, monkeypatch):
  push = lambda repo: lambda: export_weights.push_weights(imported, repo, str(tmp_path / "out"))
  refused("--push=model should be ORG/NAME", push("model"))
  refused("no token to write to me/model with; set HF_TOKEN, or type: hf auth login", push("me/model"))
  monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
  refused("me/model cannot be had: .*Invalid user token", push("me/model"))
  monkeypatch.setenv("HF_TOKEN", READER)
  refused("this token may only read; set HF_TOKEN to one with write access to me/model", push("me/model"))
  assert not (tmp_path / "out").exists()  # nothing is exported before the token is known to be good
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  (tmp_path / "files").mkdir()
  elsewhere = lambda: hub_files.push(tmp_path / "files", "them/model", private=True, message="first")
  refused("them/model cannot be had: .*You don't have the rights", elsewhere)
  assert not hub.repositories


def test_command_lines(hub_environment, environment, imported, tmp_path):
  hub_flags = environment | hub_environment
  for done, message in (
    (call("import_weights", hub_flags, "--source=hf:a/b", f"--out={tmp_path}/run"), "http"),
    (call("export_weights", environment, f"--workdir={imported}"), "nowhere to write to; give --out=DIR"),
  ):
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
  assert not (tmp_path / "run").exists()
