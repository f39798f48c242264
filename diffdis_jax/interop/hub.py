"""Fetches models from the Hugging Face hub before an import, and pushes them after an export.

It takes huggingface_hub (extra `hub`), whose own settings say where the hub is and who asks: HF_ENDPOINT, HF_TOKEN or
`hf auth login`, HF_HOME for what is kept of downloads. Safetensors alone go either way: no other file of weights is
downloaded or uploaded.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.interop import from_torch, tensor_files

PREFIX = "hf:"
_NAME = r"[\w.-]+/[\w.-]+"
_OF_A_PIPELINE = r"model_index\.json|diffdis/(config\.json|diffusion_pytorch_model\.safetensors)"
_OF_A_PART = r"[\w.-]+\.(json|txt)"
_OF_A_CLIP = r"config\.json|preprocessor_config\.json|open_clip_config\.json"
_OF_A_TOKENIZER = r"tokenizer_config\.json"  # which says how long the texts are
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_OF_AN_EXPORT = (".safetensors", ".json", ".txt", ".py")


class Fetched(NamedTuple):
  """A download: a folder, or a single file of weights; and its address with the commit."""

  path: pathlib.Path
  address: str


class Wanted(NamedTuple):
  """Files of a repository that an import reads, by their paths there."""

  config: list[str]
  weights: list[str]
  is_single_file: bool = False


def fetch(address: str) -> Fetched:
  """Download what an import reads, to where huggingface_hub keeps downloads; what is there is not downloaded again.

  Args:
    address: `hf:ORG/NAME`, or `hf:ORG/NAME@REV` with a branch, tag or commit.

  Raises:
    UserError: another form, no such repository or revision, one without safetensors or of a kind that is not read, no
      network, or no right to read it.
  """
  match = re.fullmatch(rf"{PREFIX}({_NAME})(?:@(\S+))?", address)
  if match is None:
    raise UserError(f"--source={address} should be {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
  repo, revision = match.groups()
  hub = _library()
  with _in_one_line(repo, revision):
    info = hub.HfApi().model_info(repo, revision=revision)
    # The commit, not the branch: config and weights are two downloads, between which a branch may move.
    commit, wanted = str(info.sha), choose([file.rfilename for file in info.siblings or ()], repo)

    def download(files: list[str]) -> pathlib.Path:
      return pathlib.Path(hub.snapshot_download(repo, revision=commit, allow_patterns=files))

    if wanted.config:
      from_torch.check_kind(download(wanted.config))  # before gigabytes that would be refused
    folder = download([*wanted.config, *wanted.weights])
  path = folder / wanted.weights[0] if wanted.is_single_file else folder
  return Fetched(path, f"{PREFIX}{repo}@{commit}")


def choose(names: Collection[str], repo: str) -> Wanted:
  """Choose the files of a repository that an import reads, of weights safetensors alone.

  Of each part of a pipeline, and for CLIP, the weights that `tensor_files.open_folder` would read there; of a
  repository with the config files of neither, its single file.

  Raises:
    UserError: no safetensors, or several single files.
  """

  def inside(folder: str, pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(f"{folder}(?:{pattern})", name)]

  # A pipeline before CLIP: its root may hold a config.json too.
  if "model_index.json" in names:
    parts = "|".join((*from_torch.PARTS, "scheduler"))
    config = inside("", _OF_A_PIPELINE) + inside(f"(?:{parts})/", _OF_A_PART)
    # Of a part that is not there the config files say more: the pipeline is another one.
    there = [part for part in from_torch.WITH_WEIGHTS if inside(f"{part}/", ".+")]
    return Wanted(config, [name for part in there for name in _weights(names, repo, f"{part}/")])
  if config := inside("", _OF_A_CLIP):
    return Wanted([*config, *inside("", _OF_A_TOKENIZER)], _weights(names, repo))
  single = sorted(inside("", r"[\w.-]+\.safetensors"))
  if len(single) > 1:
    raise UserError(f"{repo} has {', '.join(single)}; download the one that you mean, and name it: --source=FILE")
  return Wanted([], single or _weights(names, repo), is_single_file=True)


def _weights(names: Collection[str], repo: str, folder: str = "") -> list[str]:
  """Return the file of weights in a repository's folder (its path and a slash), or its shards and their index."""
  inside = [name.removeprefix(folder) for name in names if re.fullmatch(re.escape(folder) + "[^/]+", name)]
  safe = [name for name in inside if ".safetensors" in name]
  found = tensor_files.preferred(safe)
  if found is None:
    others = [name for name in inside if name.endswith(_PICKLES)]
    has = f"only {others[0]}" if others else "nor others"
    raise UserError(
      f"{repo} has no safetensors{f' in {folder}' if folder else ''}, {has};"
      " nothing else is read from the hub: take a revision that has them, or download the files and name their folder,"
      " or the file"
    )
  is_index = found.endswith(".json")
  shards = [name for name in safe if re.search(r"-\d+-of-\d+\.", name)] if is_index else []
  return [folder + name for name in (found, *shards)]


class Push:
  """A repository to write to. Opened before the export, so that a missing token costs no time.

  Args:
    repo: `ORG/NAME`.
    private: whether a repository that has to be made is private; one that is there stays what it is.

  Raises:
    UserError: another form, no token, one that the hub does not know or that may only read, or no network.
  """

  def __init__(self, repo: str, *, private: bool):
    if not re.fullmatch(_NAME, repo):
      raise UserError(f"--push={repo} should be ORG/NAME, such as my-name/diffdis-cc3m")
    self.repo, self._private, self._hub = repo, private, _library()
    if self._hub.get_token() is None:
      raise UserError(f"no token to write to {repo} with; set HF_TOKEN, or type: hf auth login")
    self._api = self._hub.HfApi()
    with _in_one_line(repo):
      auth = self._api.whoami().get("auth") or {}
    # Of a token for some repositories alone, `fineGrained`, only the hub knows whether this is one of them.
    if (auth.get("accessToken") or {}).get("role") == "read":
      raise UserError(
        f"this token may only read; set HF_TOKEN to one with write access to {repo}, or type: hf auth login"
      )

  def folder(self, folder: pathlib.Path, *, message: str) -> str:
    """Write a folder of an export as one commit, and return its address. It is there whole or not at all.

    The same commit removes files of an earlier export that this one does not have: those whose kind an export writes.
    Others, such as a licence, stay.

    Raises:
      UserError: the hub refuses it or cannot be reached, or somebody else wrote in the meantime.
    """
    with _in_one_line(self.repo):
      # Its head before the commit, which names it as parent: what somebody pushes in between makes the hub refuse.
      self._api.create_repo(self.repo, private=self._private, exist_ok=True)
      head, removed = self._api.model_info(self.repo).sha, [f"*{ending}" for ending in _OF_AN_EXPORT]
      how = dict(commit_message=message, parent_commit=head, delete_patterns=removed)
      return self._api.upload_folder(repo_id=self.repo, folder_path=folder, **how).commit_url


def _library() -> Any:
  """Import huggingface_hub when it is needed: most imports and exports do without."""
  try:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars
  except ImportError as error:
    raise not_installed("the hub", "huggingface_hub", "hub") from error
  if not sys.stderr.isatty():
    disable_progress_bars()
  return huggingface_hub


@contextlib.contextmanager
def _in_one_line(repo: str, revision: str | None = None) -> Iterator[None]:
  """Turn what huggingface_hub raises into a UserError."""
  from huggingface_hub import constants, errors

  # Of httpx, which raises it where nobody answers. It depends on huggingface_hub's version which httpx that is.
  transport = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
  where = constants.ENDPOINT
  # From narrow to wide: most of huggingface_hub's errors derive from one that stands below.
  try:
    yield
  except errors.GatedRepoError as error:
    raise UserError(f"{where}/{repo} is gated; ask for access on its page, and set HF_TOKEN") from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f"{where}/{repo} has no revision {revision}; name a branch, a tag or a commit") from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(f"no repository {where}/{repo}, or a private one; check the name, or set HF_TOKEN") from error
  except errors.OfflineModeIsEnabled as error:
    raise UserError(
      f"cannot ask {where} for {repo}: HF_HUB_OFFLINE is set; unset it, or name a local folder"
    ) from error
  except errors.HfHubHTTPError as error:
    message = _said(error.server_message or error)
    raise UserError(f"{where} refuses {repo}, status {error.response.status_code}: {message}") from error
  except (transport, errors.LocalEntryNotFoundError) as error:
    message = _said(error) or type(error).__name__
    raise UserError(f"cannot reach {where} for {repo}: {message}; is there a network?") from error
  except (OSError, RuntimeError, ValueError) as error:  # of a file here, or of an upload, with the cause behind it
    raise UserError(f"{repo} on {where}: {_said(error)} {_said(error.__cause__ or '')}".strip()) from error


def _said(error: object) -> str:
  return " ".join(str(error).split())[:300]
