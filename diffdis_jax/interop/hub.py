"""Fetch models from the Hugging Face hub before an import, and push them after an export, by huggingface_hub.

Its environment variables HF_ENDPOINT, HF_TOKEN and HF_HOME apply. Only safetensors are read as weights.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
import sys
from collections.abc import Collection, Iterator
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars

from diffdis_jax.errors import UserError
from diffdis_jax.interop import from_torch, tensor_files

PREFIX = "hf:"
_NAME = r"[\w.-]+/[\w.-]+"
# The hint for an error of huggingface_hub, by the name of its class.
_HINTS = {
  "GatedRepoError": "is gated; ask for access on its page, and set HF_TOKEN",
  "RevisionNotFoundError": "has no revision {revision}; name a branch, a tag or a commit",
  "RepositoryNotFoundError": "is not there, or private; check the name, or set HF_TOKEN",
  "OfflineModeIsEnabled": "cannot be asked for while HF_HUB_OFFLINE is set; unset it, or name a local folder",
}


class Fetched(NamedTuple):
  """The path of a download, and its address with the commit."""

  path: pathlib.Path  # a folder, or a single file of weights
  address: str


def fetch(address: str) -> Fetched:
  """Download the files that an import reads from `hf:ORG/NAME` or `hf:ORG/NAME@REV` to huggingface_hub's cache.

  Raises UserError: the address has another form, the repository or revision is missing, private, without safetensors or
  of an unsupported kind, or the hub cannot be reached.
  """
  match = re.fullmatch(rf"{PREFIX}({_NAME})(?:@(\S+))?", address)
  if match is None:
    raise UserError(f"--source={address} should be {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
  repo, revision = match.groups()
  with _in_one_line(repo, revision):
    info = huggingface_hub.HfApi().model_info(repo, revision=revision)
    # Download by commit, not by branch, which may move between the downloads of the configs and of the weights.
    configs, weights = choose([file.rfilename for file in info.siblings or ()], repo)
    download = functools.partial(huggingface_hub.snapshot_download, repo, revision=info.sha)
    if configs:  # check them before gigabytes are downloaded
      from_torch.check_kind(pathlib.Path(download(allow_patterns=configs)))
    folder = pathlib.Path(download(allow_patterns=[*configs, *weights]))
  return Fetched(folder if configs else folder / weights[0], f"{PREFIX}{repo}@{info.sha}")


def choose(names: Collection[str], repo: str) -> tuple[list[str], list[str]]:
  """Choose the configs and the weights of a repository that an import reads: a pipeline's, CLIP's, or a single file
  without config. Raises UserError: no safetensors, or several single files."""

  def inside(folder: str) -> list[str]:
    return [name for name in names if name.rpartition("/")[0] == folder]

  # Look for a pipeline before CLIP: its root may also hold a config.json.
  is_pipeline = "model_index.json" in names
  if not is_pipeline and not {"config.json", "open_clip_config.json"} & {*names}:
    single = [name for name in inside("") if name.endswith(".safetensors")]
    if len(single) > 1:
      raise UserError(f"{repo} has {', '.join(single)}; download the one that you mean, and name it: --source=FILE")
    return [], single or _weights(inside(""), repo)
  folders = ("", *from_torch.PARTS, "diffdis", "scheduler") if is_pipeline else ("",)
  texts = [name for folder in folders for name in inside(folder) if name.endswith((".json", ".txt"))]
  # Missing parts are no error here: the check of the configs names the kind of pipeline.
  parts = [part for part in (*from_torch.WITH_WEIGHTS, "diffdis") if inside(part)] if is_pipeline else [""]
  weights = [name for part in parts for name in _weights(inside(part), repo)]
  return [name for name in texts if ".index." not in name], weights


def _weights(names: Collection[str], repo: str) -> list[str]:
  """Choose a folder's file of weights, or its shards and their index."""
  safe = {pathlib.PurePosixPath(name).name: name for name in names if ".safetensors" in name}
  chosen = tensor_files.preferred(safe)
  if chosen is None:
    raise UserError(
      f"{repo} has no safetensors beside {', '.join(sorted(names)[:3]) or 'nothing'}, and nothing else is read from the"
      " hub: take a revision that has them, or download the files and name their folder, or the file"
    )
  shards = [name for name in safe if re.search(r"-\d+-of-\d+\.", name)] if chosen.endswith(".json") else []
  return [safe[name] for name in (chosen, *shards)]


def check_token(repo: str) -> None:
  """Raise UserError unless `repo` is ORG/NAME and there is a token that may write to the hub."""
  if not re.fullmatch(_NAME, repo):
    raise UserError(f"--push={repo} should be ORG/NAME, such as my-name/diffdis-cc3m")
  if huggingface_hub.get_token() is None:
    raise UserError(f"no token to write to {repo} with; set HF_TOKEN, or type: hf auth login")
  with _in_one_line(repo):
    token = huggingface_hub.HfApi().whoami().get("auth", {}).get("accessToken") or {}
  if token.get("role") == "read":
    raise UserError(f"this token may only read; set HF_TOKEN to one with write access to {repo}")


def push(folder: pathlib.Path, repo: str, *, private: bool, message: str) -> str:
  """Write a folder of an export as one commit, and return its address. A second commit pins the card to it.

  The first one also removes files of an earlier export that this one lacks. Other files, such as a licence, stay.
  Raises UserError: the hub refuses it or cannot be reached.
  """
  api = huggingface_hub.HfApi()
  with _in_one_line(repo):
    api.create_repo(repo, private=private, exist_ok=True)
    earlier = ["*.safetensors", "*.json", "*.txt", "*.py"]
    commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=earlier)
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace('"COMMIT"', f'"{commit.oid}"'), encoding="utf-8")
    api.upload_file(repo_id=repo, path_in_repo=card.name, path_or_fileobj=card, commit_message="Pin the card's code")
    return commit.commit_url


@contextlib.contextmanager
def _in_one_line(repo: str, revision: str | None = None) -> Iterator[None]:
  """Turn the errors of huggingface_hub into a UserError."""
  if not sys.stderr.isatty():
    disable_progress_bars()
  try:
    yield
  # httpx's errors, which are raised if the hub does not answer, are no OSErrors.
  except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # pyright: ignore[reportPrivateImportUsage]
    names = [kind.__name__ for kind in type(error).__mro__]
    text = " ".join(f"{error} {error.__cause__ or ''}".split())[:300] or names[0]
    hint = next((_HINTS[name].format(revision=revision) for name in names if name in _HINTS), f"cannot be had: {text}")
    raise UserError(f"{constants.ENDPOINT}/{repo} {hint}") from error
