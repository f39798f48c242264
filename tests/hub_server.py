"""A stand-in for the Hugging Face hub on this machine, which answers the calls that huggingface_hub makes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"
READER = "hf_that_may_only_read"
OWN = "me"  # namespace of both
Files = dict[str, bytes]


class Commit(NamedTuple):
  sha: str
  files: Files
  message: str


@dataclasses.dataclass
class Repository:
  """Commits, oldest first, and tags by name."""

  private: bool = False
  gated: bool = False
  commits: list[Commit] = dataclasses.field(default_factory=list)
  tags: dict[str, str] = dataclasses.field(default_factory=dict)

  def commit(self, files: Files, message: str) -> str:
    sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
    self.commits.append(Commit(sha, files, message))
    return sha

  @property
  def files(self) -> Files:
    return self.commits[-1].files

  def find(self, revision: str) -> Commit | None:
    sha = self.commits[-1].sha if revision == "main" else self.tags.get(revision, revision)
    return next((commit for commit in self.commits if commit.sha == sha), None)


class Refused(Exception):
  """An error of the hub: status, its X-Error-Code, what it says, and what else it answers."""

  def __init__(self, status: int, code: str, message: str, **others: str):
    self.status, self.code, self.message, self.others = status, code, message, others


@dataclasses.dataclass
class Hub:
  """The state of the server: what it holds, which requests it got, and what it refuses.

  Attributes:
    repositories: by `ORG/NAME`.
    stored: large files, by their SHA-256, whether committed or not.
    asked: `METHOD path` of each request, in order.
    broken: regex of requests that are answered with status 500.
  """

  endpoint: str = ""
  repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
  stored: Files = dataclasses.field(default_factory=dict)
  asked: list[str] = dataclasses.field(default_factory=list)
  broken: str = "^$"

  def add(self, name: str, folder: pathlib.Path, others: Files | None = None, **fields: Any) -> Repository:
    """A repository with the files of a folder, and others."""
    repo = self.repositories[name] = Repository(**fields)
    paths = (path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    repo.commit(files | (others or {}), "as it was found")
    return repo

  def repository(self, name: str, token: str | None) -> Repository:
    repo = self.repositories.get(name)
    if repo is None or (repo.private and token != TOKEN):
      raise Refused(404, "RepoNotFound", "Repository not found")
    if repo.gated and token != TOKEN:
      raise Refused(401, "GatedRepo", "Access to this model is restricted")
    return repo

  def answer(self, method: str, url: str, token: str | None, body: bytes) -> tuple[dict[str, str], bytes]:
    """Return the headers and the content of a request."""
    path, query = unquote(urlsplit(url).path), parse_qs(urlsplit(url).query)
    self.asked.append(f"{method} {path}")
    if re.search(self.broken, self.asked[-1]):
      raise Refused(500, "", "the hub has a bad day")
    for pattern, answer in _ROUTES.items():
      if match := re.fullmatch(pattern, f"{method} {path}"):
        answered = answer(self, token, body, *match.groups())
        return answered if isinstance(answered, tuple) else ({}, json.dumps(answered).encode())
    raise Refused(400, "", f"the stand-in does not know {method} {path} {query}")

  def whoami(self, token: str | None, body: bytes) -> Any:
    if token not in (TOKEN, READER):
      raise Refused(401, "", "Invalid credentials in Authorization header")
    auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": "read" if token == READER else "write"}}
    return {"name": OWN, "type": "user", "orgs": [], "auth": auth}

  def create(self, token: str | None, body: bytes) -> Any:
    asked = json.loads(body)
    name = f"{asked.get('organization') or OWN}/{asked['name']}"
    if not name.startswith(f"{OWN}/"):
      raise Refused(403, "", f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
    if name in self.repositories:
      raise Refused(409, "", "You already created this model repo", url=f"{self.endpoint}/{name}")
    # The hub makes a first commit of its own.
    repo = self.repositories[name] = Repository(private=asked.get("visibility") == "private")
    repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    return {"url": f"{self.endpoint}/{name}", "name": name, "id": name}

  def info(self, token: str | None, body: bytes, name: str, revision: str | None) -> Any:
    commit = self.revision(name, token, revision or "main")
    siblings = [{"rfilename": path} for path in commit.files]
    return {"id": name, "modelId": name, "sha": commit.sha, "siblings": siblings, "tags": [], "private": False}

  def revision(self, name: str, token: str | None, revision: str) -> Commit:
    commit = self.repository(name, token).find(revision)
    if commit is None:
      raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit

  def tree(self, token: str | None, body: bytes, name: str, revision: str) -> Any:
    files = self.revision(name, token, revision).files
    return [{"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)} for path, data in files.items()]

  def resolve(self, token: str | None, body: bytes, name: str, revision: str, path: str) -> Any:
    sha, files, _ = self.revision(name, token, revision)
    if path not in files:
      raise Refused(404, "EntryNotFound", f"no {path}")
    return {"X-Repo-Commit": sha, "ETag": f'"{_git_oid(files[path])}"', "Accept-Ranges": "bytes"}, files[path]

  def preupload(self, token: str | None, body: bytes, name: str) -> Any:
    self.repository(name, token)
    kind = lambda path: "lfs" if path.endswith((".safetensors", ".png")) else "regular"
    paths = [file["path"] for file in json.loads(body)["files"]]
    return {"files": [{"path": path, "uploadMode": kind(path), "shouldIgnore": False} for path in paths]}

  def batch(self, token: str | None, body: bytes, name: str) -> Any:
    upload = lambda oid: {"upload": {"href": f"{self.endpoint}/store/{oid}"}}
    objects = json.loads(body)["objects"]
    return {"transfer": "basic", "objects": [{**entry, "actions": upload(entry["oid"])} for entry in objects]}

  def store(self, token: str | None, body: bytes, oid: str) -> Any:
    assert hashlib.sha256(body).hexdigest() == oid
    self.stored[oid] = body
    return {}

  def commit(self, token: str | None, body: bytes, name: str) -> Any:
    repo = self.repository(name, token)
    header, *operations = map(json.loads, body.splitlines())
    files = dict(repo.files)
    for operation in operations:
      value = operation["value"]
      if operation["key"] == "deletedFile":
        del files[value["path"]]
      elif operation["key"] == "lfsFile":
        files[value["path"]] = self.stored[value["oid"]]
      else:
        files[value["path"]] = base64.b64decode(value["content"])
    sha = repo.commit(files, header["value"]["summary"])
    return {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha}


_REPO = r"([^/]+/[^/]+)"
_ROUTES = {
  "GET /api/whoami-v2": Hub.whoami,
  "POST /api/repos/create": Hub.create,
  "POST /api/validate-yaml": lambda *_: {},
  rf"GET /api/models/{_REPO}(?:/revision/(.+))?": Hub.info,
  rf"GET /api/models/{_REPO}/tree/([^/]+)": Hub.tree,
  rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)": Hub.resolve,
  rf"POST /api/models/{_REPO}/preupload/main": Hub.preupload,
  rf"POST /{_REPO}\.git/info/lfs/objects/batch": Hub.batch,
  r"PUT /store/(\w+)": Hub.store,
  rf"POST /api/models/{_REPO}/commit/main": Hub.commit,
}


def _git_oid(data: bytes) -> str:
  return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
  class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
      token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      try:
        status, (headers, content) = 200, hub.answer(self.command, self.path, token, body)
      except Refused as error:
        status, content = error.status, json.dumps({"error": error.message, **error.others}).encode()
        headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
      self.send_response(status)
      for name, value in {**headers, "Content-Length": str(len(content))}.items():
        if value:
          self.send_header(name, value)
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args: Any) -> None:
      pass

  return Handler


@pytest.fixture
def hub_environment(tmp_path: pathlib.Path, hub: Hub) -> dict[str, str]:
  """Return the variables of a command that finds the stand-in and has no token."""
  kept = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
  return {**kept, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": ""}


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
  """The stand-in, empty, to which huggingface_hub now talks in this process, without a token."""
  from huggingface_hub import constants

  hub = Hub()
  server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
  hub.endpoint = f"http://127.0.0.1:{server.server_port}"
  settings = {
    "ENDPOINT": hub.endpoint,
    "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
    "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
    "HF_HUB_DISABLE_XET": True,
  }
  for name, value in settings.items():
    assert hasattr(constants, name)
    monkeypatch.setattr(constants, name, value)
  for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  yield hub
  server.shutdown()
  server.server_close()
  thread.join()
