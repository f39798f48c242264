"""Test weights from and to the Hugging Face hub, with a stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from diffdis_jax import export_weights, import_weights
from diffdis_jax.errors import UserError
from diffdis_jax.interop import hub as hub_files
from diffdis_jax.run import digests, restore

pytest_plugins = ("tests.pipelines",)
pytestmark = pytest.mark.slow

WEIGHTS = {
  "unet/diffusion_pytorch_model.safetensors",
  "vae/diffusion_pytorch_model.safetensors",
  "text_encoder/model.safetensors",
}
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
Files = dict[str, bytes]


def files_of(folder: pathlib.Path) -> Files:
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub:
  """Stand in for HfApi and `snapshot_download`. A repository maps the hash of each commit to its files."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.repositories, self.downloaded, self.private = (
      folder,
      dict[str, dict[str, Files]](),
      set[str](),
      [],
    )

  def add(self, repo: str, files: Files) -> str:
    """Add a commit, and return its hash."""
    sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    self.repositories.setdefault(repo, {})[sha] = files
    return sha

  def files(self, repo: str) -> Files:
    return [*self.repositories[repo].values()][-1]

  def model_info(self, repo: str, revision: str | None = None) -> Any:
    if repo not in self.repositories:
      raise _refusal(errors.RepositoryNotFoundError, 404)
    commits = self.repositories[repo]
    sha = revision or [*commits][-1]
    if sha not in commits:
      raise _refusal(errors.RevisionNotFoundError, 404)
    return types.SimpleNamespace(sha=sha, siblings=[types.SimpleNamespace(rfilename=name) for name in commits[sha]])

  def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str]) -> str:
    files = self.repositories[repo][revision]
    for name in filter_repo_objects(files, allow_patterns=allow_patterns):
      path = self.folder / revision / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(files[name])
      self.downloaded.add(name)
    return str(self.folder / revision)

  def whoami(self) -> Any:
    return {"auth": {"accessToken": {"role": huggingface_hub.get_token()}}}

  def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
    if not repo.startswith("me/"):
      raise _refusal(errors.HfHubHTTPError, 403)
    self.private.append(private)
    self.repositories.setdefault(repo, {}) or self.add(repo, {".gitattributes": b""})

  def upload_file(self, *, repo_id: str, path_in_repo: str, path_or_fileobj: Any, commit_message: str) -> Any:
    sha = self.add(repo_id, self.files(repo_id) | {path_in_repo: pathlib.Path(path_or_fileobj).read_bytes()})
    return types.SimpleNamespace(commit_url=f"{commit_message} {sha}", oid=sha)

  def upload_folder(self, *, repo_id: str, folder_path: Any, commit_message: str, delete_patterns: list[str]) -> Any:
    before = self.files(repo_id)
    kept = before.keys() - {*filter_repo_objects(before, allow_patterns=delete_patterns)}
    sha = self.add(repo_id, {name: before[name] for name in kept} | files_of(folder_path))
    return types.SimpleNamespace(commit_url=f"{commit_message} {sha}", oid=sha)


def _refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
  return kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
  hub = Hub(tmp_path / "downloads")
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
  monkeypatch.setenv("HF_TOKEN", "write")
  return hub


def refused(message: str, act: Callable[[], object]) -> None:
  """Check that `act` is refused in one line."""
  with pytest.raises(UserError, match=message) as error:
    act()
  assert "\n" not in str(error.value)


def test_an_import_from_the_hub_equals_one_from_a_folder(hub, sd, imported, tmp_path):
  others = {"unet/diffusion_pytorch_model.bin": b"pickle", "safety_checker/model.safetensors": b"large"}
  commit = hub.add("org/sd", files_of(sd) | others)
  hub.add("org/sd", {"README.md": b"nothing else any more"})
  import_weights.import_weights(f"hf:org/sd@{commit}", str(tmp_path / "run"))
  loaded, expected = restore.restore_params(str(tmp_path / "run")), restore.restore_params(imported)
  assert loaded.keys() == expected.keys()
  for path, value in loaded.items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)
  assert json.loads((tmp_path / "run" / "import.json").read_text())["source"] == f"hf:org/sd@{commit}"
  assert {name for name in hub.downloaded if not name.endswith((".json", ".txt"))} == WEIGHTS


@pytest.mark.parametrize(
  "names, weights",
  [
    (["config.json", "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    # timm's copy of the vision tower lies beside open_clip's own file.
    (["open_clip_config.json", "open_clip_model.safetensors", "model.safetensors"], ["open_clip_model.safetensors"]),
    (["v1-4.ckpt", "v1-4.safetensors", "README.md"], ["v1-4.safetensors"]),
    (["config.json", "model.safetensors.index.json", *SHARDS], ["model.safetensors.index.json", *SHARDS]),
  ],
)
def test_the_weights_are_downloaded_in_one_format(names, weights):
  config = [name for name in names if name.endswith("config.json")]
  assert hub_files.choose(names, "org/name") == (config, weights)


def test_full_precision_and_the_parts_of_diffdis_are_downloaded():
  fp16 = [name.replace(".safe", ".fp16.safe") for name in WEIGHTS if name.startswith("unet")]
  own = {"diffdis/config.json", "diffdis/diffusion_pytorch_model.safetensors"}
  names = ["model_index.json", *own, "diffdis/torch_diffdis.py", "tokenizer/vocab.json", *WEIGHTS, *fp16]
  configs, weights = hub_files.choose([*names, "v1.safetensors"], "org/name")
  assert {*configs, *weights} == {"model_index.json", *own, "tokenizer/vocab.json", *WEIGHTS}


def test_wrong_sources_are_refused_before_weights_are_downloaded(hub, sd):
  hub.add("org/sd", files_of(sd))
  hub.add("org/pickles", {"model_index.json": b"{}", "unet/diffusion_pytorch_model.bin": b""})
  hub.add("org/siglip", {"config.json": b'{"model_type": "siglip"}', "model.safetensors": b"large"})
  parts = {f"{part}/model.safetensors": b"" for part in ("text_encoder", "vae")}
  hub.add("org/flux", {"model_index.json": b'{"_class_name": "FluxPipeline"}', **parts})
  hub.add("org/two", {"a.safetensors": b"", "b.safetensors": b""})
  for address, message in (
    ("org", "--source=hf:org should be hf:ORG/NAME or"),
    ("org/none", "http.*/org/none is not there, or private; check the name"),
    ("org/sd@v7", "/org/sd has no revision v7; name a branch"),
    ("org/pickles", "org/pickles has no safetensors beside unet/diffusion_pytorch_model.bin"),
    ("org/siglip", "neither a model_index.json of Stable Diffusion nor a config.json of CLIP"),
    ("org/two", "org/two has a.safetensors, b.safetensors; download the one"),
    ("org/flux", "a FluxPipeline, has no folder unet"),
  ):
    refused(message, lambda address=address: hub_files.fetch(f"hf:{address}"))
  assert not [name for name in hub.downloaded if "safetensors" in name]


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch):
  fetch = lambda: hub_files.fetch("hf:org/sd")
  monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
  refused("http://127.0.0.1:9/org/sd cannot be had: ", fetch)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  refused("HF_HUB_OFFLINE is set", fetch)


def test_a_push_uploads_the_export_which_is_imported_back(hub, imported, tmp_path):
  address = export_weights.push_weights(imported, "me/new", str(tmp_path / "out"))
  written = files_of(tmp_path / "out")
  assert hub.private == [True] and address.startswith("Write step 0")
  assert hub.files("me/new") == written | {".gitattributes": b""}
  # The card, a commit of its own, pins the code that it asks to trust to the commit of the weights.
  *_, model, card = hub.repositories["me/new"]
  assert address.endswith(model)
  assert f'trust_remote_code=True, revision="{model}", custom_revision="{model}")' in written["README.md"].decode()
  assert hub.repositories["me/new"][model].keys() == hub.repositories["me/new"][card].keys()
  assert f'from_pretrained("me/new", revision="{model}")' in written["README.md"].decode()
  assert digests.damage(tmp_path / "out") is None
  assert not [name for name in written if name.endswith((".bin", ".ckpt", ".pt"))]
  StableDiffusionPipeline.from_pretrained(tmp_path / "out")

  import_weights.import_weights("hf:me/new", str(tmp_path / "again"))
  before, after = (restore.restore_params(path) for path in (imported, str(tmp_path / "again")))
  for path, value in after.items():
    np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_a_second_push_deletes_the_weights_of_the_first(hub, tmp_path):
  for name in ("first", "second"):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.safetensors").write_bytes(name.encode())
    (tmp_path / name / "README.md").write_text("card")
    hub_files.push(tmp_path / name, "me/model", private=False, message=name)
    hub.files("me/model")["LICENSE"] = b"somebody wrote it on the page"
  assert hub.private[0] is False and hub.files("me/model").keys() == {
    *(".gitattributes", "LICENSE", "README.md", "second.safetensors")
  }


def test_a_push_needs_a_token_with_write_access(hub, imported, tmp_path, monkeypatch):
  push = lambda repo: lambda: export_weights.push_weights(imported, repo, str(tmp_path / "out"))
  refused("--push=model should be ORG/NAME", push("model"))
  monkeypatch.setenv("HF_TOKEN", "read")
  refused("this token may only read; set HF_TOKEN to one with write access to me/model", push("me/model"))
  monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
  refused("no token to write to me/model with; set HF_TOKEN, or type: hf auth login", push("me/model"))
  assert not (tmp_path / "out").exists()  # nothing is exported before the token is known to be good
  refused("them/model cannot be had: refused", lambda: hub_files.push(tmp_path, "them/model", private=True, message=""))
  assert not hub.repositories
