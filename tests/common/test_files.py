from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import subprocess
import sys

import pytest

from diffdis_jax.common import files
from diffdis_jax.errors import UserError
from tests.command_runs import ROOT


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_appears_whole(tmp_path, made):
  out = tmp_path / "new" / "out"
  if made:
    out.mkdir(parents=True)
  with files.whole_folder(out) as temporary:
    (temporary / "file").write_text("content")
    assert not made or not list(out.iterdir())
    assert temporary.parent == out.parent
  assert (out / "file").read_text() == "content"
  assert [path.name for path in out.parent.iterdir()] == ["out"]
  assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
  "error", [UserError("bad"), RuntimeError("a bug"), KeyboardInterrupt(), ConnectionResetError("of what is read")]
)
def test_nothing_is_left_of_a_failure(tmp_path, error):
  with pytest.raises(type(error)), files.whole_folder(tmp_path / "out") as temporary:
    (temporary / "file").write_text("content")
    raise error
  assert not list(tmp_path.iterdir())


def test_folders_in_use_and_files_are_refused(tmp_path):
  (tmp_path / "file").write_text("kept")
  for out, message in (
    (tmp_path, "is not empty; give a new folder"),
    (tmp_path / "file", "is a file; it should be a folder"),
    (tmp_path / "file" / "out", "cannot write --out=.*: (Not a directory|File exists)"),
  ):
    with pytest.raises(UserError, match=message), files.whole_folder(out):
      pass
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_an_empty_folder_is_followed_and_a_mounted_disk_refused(tmp_path, monkeypatch):
  (tmp_path / "folder").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "folder")
  with files.whole_folder(tmp_path / "link") as temporary:
    (temporary / "file").write_text("content")
  assert (tmp_path / "link" / "file").read_text() == "content"
  (tmp_path / "disk").mkdir()
  monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path.name == "disk")
  with pytest.raises(UserError, match="--out=.*disk is where a disk is mounted; give a folder in it"):
    files.empty_folder(tmp_path / "disk")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
  (tmp_path / "out").mkdir()
  with pytest.raises(OSError):
    files.write_whole(tmp_path / "out", b"content")
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_is_refused_before_the_work(tmp_path):
  (tmp_path / "file.json").write_text("kept")
  for out, message in (
    (tmp_path, "is a folder; it should name the file to write"),
    (tmp_path / "none" / "F.json", "lies in no folder that exists; create it first"),
    (tmp_path / ("F" * 300), "cannot write --out=.*: File name too long"),
  ):
    with pytest.raises(UserError, match=message):
      files.check_out(str(out))
  files.check_out(str(tmp_path / "file.json"))
  assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
  assert (tmp_path / "file.json").read_text() == "kept"


DEEP = '{"a":' * 20_000


@pytest.mark.parametrize(
  "content, message",
  [
    (DEEP.encode(), "f.json is not JSON: maximum recursion depth exceeded"),
    (b"{", "f.json is not JSON: Expecting property name"),
    (b"\xff\xff{}", "f.json is not JSON: .* decode byte 0xff"),
    (b"9" * 5000, "f.json is not JSON: Exceeds the limit"),
    (b"\x00" * 50, "f.json is not JSON: "),
    (None, "cannot read .*f.json: No such file or directory"),
  ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "f.json").write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    files.read_json(tmp_path / "f.json")
  assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["[" * 50_000, "a\0b"])
def test_a_name_that_no_file_can_have_is_one_line(name):
  with pytest.raises(UserError, match="cannot read templates: "):
    files.read_json(name, "templates")


def test_json_is_read_with_the_mark_that_some_editors_put_before_it(tmp_path):
  (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf" + b"[" * 64 + b"]" * 64)
  assert files.read_json(tmp_path / "f.json")


def test_storage_that_cannot_be_reached_is_no_bad_input(tmp_path, monkeypatch):
  def refuse(path):
    raise ConnectionRefusedError(111, "Connection refused")

  monkeypatch.setattr(files.epath.Path, "read_bytes", refuse, raising=False)
  monkeypatch.setattr(type(files.epath.Path(tmp_path)), "read_bytes", refuse)
  with pytest.raises(ConnectionRefusedError):
    files.read_json(tmp_path / "f.json")
  with pytest.raises(ConnectionRefusedError), files.writing("--out=F"):
    refuse("F")
  with pytest.raises(OSError, match="No space left"), files.writing("--out=F"):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITER = """
import pathlib, sys, time
from diffdis_jax.common import files
with files.whole_folder(pathlib.Path(sys.argv[1]) / "folder") as temporary:
  (temporary / "large").write_bytes(bytes(1000))
  sys.stdout.write("in\\n")
  sys.stdout.flush()
  time.sleep(600)
"""


def test_the_next_command_removes_the_folder_that_a_killed_one_left(tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], env=environment, stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"in\n"
  (there,) = tmp_path.iterdir()

  def again() -> list[pathlib.Path]:
    with contextlib.suppress(KeyError), files.whole_folder(tmp_path / "folder"):
      raise KeyError
    return [*tmp_path.iterdir()]

  assert again() == [there]  # its process lives
  process.kill()
  process.communicate()
  assert again() == []
