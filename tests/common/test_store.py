"""What is kept by a digest of its key: found again, never trusted where it is damaged, and never in the way."""

from __future__ import annotations

import errno
import os
import pathlib

import numpy as np
import pytest

from diffdis_jax.common.store import Store

ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_each_key_has_its_own(tmp_path):
  store = Store(tmp_path / "new", "things")
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / ".a.npy.0123abcd.tmp").touch()  # of a killed process
  assert store.read_array(b"a", rows=3, dtype=np.float32) is None and store.read_json(b"a") is None
  store.write_array(b"a", ARRAY)
  store.write_json(b"b", {"x": [1, 2]})
  np.testing.assert_array_equal(store.read_array(b"a", rows=3, dtype=np.float32), ARRAY)
  assert store.read_json(b"b") == {"x": [1, 2]} and store.read_json(b"a") is None
  assert store.file(b"a", ".npy").exists() and len([*(tmp_path / "new").iterdir()]) == 2


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_what_is_damaged_is_warned_of_and_not_there(tmp_path, caplog, content):
  store = Store(tmp_path, "things")
  store.write_array(b"a", ARRAY)
  store.write_json(b"a", [1])
  for ending in (".npy", ".json"):
    file = store.file(b"a", ending)
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
  assert store.read_array(b"a", rows=3, dtype=np.float32) is None and store.read_json(b"a") is None
  assert caplog.text.count("is damaged") == 2


@pytest.mark.parametrize("other", [dict(rows=4), dict(dtype=np.int32)])
def test_an_array_of_another_kind_is_none(tmp_path, other):
  store = Store(tmp_path, "things")
  store.write_array(b"a", ARRAY)
  assert store.read_array(b"a", **dict(rows=3, dtype=np.float32) | other) is None


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  store = Store(tmp_path / "file", "things")
  store.write_json(b"a", 1)
  assert store.read_json(b"a") is None and "things are not kept in" in caplog.text


def test_a_flipped_bit_is_seen(tmp_path, caplog):
  store = Store(tmp_path, "things")
  store.write_array(b"a", ARRAY)
  file = store.file(b"a", ".npy")
  whole = file.read_bytes()
  for place in range(len(whole)):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    assert store.read_array(b"a", rows=3, dtype=np.float32) is None, place
  assert caplog.text.count("is damaged") == len(whole)


def test_what_another_process_removes_meanwhile_is_read_and_does_not_come_back_empty(tmp_path, monkeypatch):
  store, read = Store(tmp_path, "things", limit=10**6), pathlib.Path.read_bytes

  def read_and_lost(path):
    content = read(path)
    path.unlink()
    return content

  store.write_array(b"a", ARRAY)
  monkeypatch.setattr(pathlib.Path, "read_bytes", read_and_lost)
  np.testing.assert_array_equal(store.read_array(b"a", rows=3, dtype=np.float32), ARRAY)
  assert not [*tmp_path.iterdir()]


def test_a_folder_of_another_user_is_read(tmp_path, monkeypatch):
  def refuse(path, *args, **kwargs):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

  store = Store(tmp_path, "things", limit=10**6)
  store.write_array(b"a", ARRAY)
  monkeypatch.setattr(os, "utime", refuse)
  monkeypatch.setattr(os, "open", refuse)  # as pathlib opens a file to write
  np.testing.assert_array_equal(store.read_array(b"a", rows=3, dtype=np.float32), ARRAY)


def test_two_processes_make_room_at_a_time(tmp_path, caplog):
  (tmp_path / "gone.npy").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked at
  store = Store(tmp_path, "things", limit=200)
  for key in (b"a", b"b"):
    store.write_array(key, ARRAY)
  assert "are not kept" not in caplog.text
  assert [key for key in (b"a", b"b") if store.file(key, ".npy").exists()] == [b"b"]
