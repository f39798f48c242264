"""The folder of uploads: its size, and that it goes."""

from __future__ import annotations

import asyncio
import os
import pathlib
import time

import pytest

from diffdis_jax.app import uploads


def size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_there_for_a_while(tmp_path, monkeypatch):
  monkeypatch.setenv(uploads.FOLDER, str(tmp_path / "given"))
  with pytest.raises(KeyboardInterrupt), uploads.folder() as folder:
    assert folder.parent == tmp_path / "given" and os.environ[uploads.FOLDER] == str(folder)
    (folder / "hash").mkdir()
    (folder / "hash" / "a.png").write_bytes(b"a")
    raise KeyboardInterrupt
  assert os.listdir(tmp_path / "given") == [] and os.environ[uploads.FOLDER] == str(tmp_path / "given")
  monkeypatch.delenv(uploads.FOLDER)
  with uploads.folder() as folder:
    assert folder.is_dir()
  assert not folder.exists() and uploads.FOLDER not in os.environ


def test_the_oldest_uploads_are_deleted_and_the_pages_own_files_stay(tmp_path):
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "pick.png").write_bytes(bytes(50_000))
  number = 0

  async def app(scope, receive, send):
    folder = tmp_path / f"hash{number}"
    folder.mkdir()
    (folder / "a.png").write_bytes(bytes(10_000))
    os.utime(folder / "a.png", (now := time.time() - 1000 + number, now))
    if number == 3:
      raise ValueError("after the upload")

  async def upload() -> None:
    await quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None)

  quota = uploads.Quota(app, folder=tmp_path, limit=45_000, seconds=60)
  for number in range(25):
    try:
      asyncio.run(upload())
    except ValueError:
      assert number == 3
    assert size(tmp_path) <= 50_000 + 45_000
  assert sorted(os.listdir(tmp_path)) == ["hash21", "hash22", "hash23", "hash24", "own"]


def test_uploads_that_were_broken_off_go_and_those_that_are_received_stay(tmp_path):
  async def app(scope, receive, send):
    pass

  quota = uploads.Quota(app, folder=tmp_path, limit=15_000, seconds=60)
  for name, age in (("tmpold", 100), ("tmpnew", 30), ("tmpnewer", 10)):
    (tmp_path / name).write_bytes(bytes(10_000))
    os.utime(tmp_path / name, (now := time.time() - age, now))
  asyncio.run(quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None))
  assert sorted(os.listdir(tmp_path)) == ["tmpnew", "tmpnewer"]


def test_many_small_files_count_by_what_they_take_on_disk(tmp_path):
  async def app(scope, receive, send):
    for i in range(100):
      (tmp_path / f"hash{i}").mkdir()
      (tmp_path / f"hash{i}" / "a").touch()

  quota = uploads.Quota(app, folder=tmp_path, limit=10 * uploads.BLOCK, seconds=60)
  asyncio.run(quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None))
  assert len(os.listdir(tmp_path)) == 10
