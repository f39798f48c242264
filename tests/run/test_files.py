from __future__ import annotations

import pathlib

import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import files


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


@pytest.mark.parametrize("error", [UserError("bad"), RuntimeError("a bug"), KeyboardInterrupt()])
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
