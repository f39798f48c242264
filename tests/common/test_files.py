from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from diffdis_jax.common import files
from diffdis_jax.errors import UserError
from tests.command_runs import ROOT


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_appears_whole(tmp_path, exists):
  out = tmp_path / "new" / "out"
  if exists:
    out.mkdir(parents=True)
  with files.whole_folder(out) as temporary:
    (temporary / "file").write_text("content")
    assert not exists or not list(out.iterdir())
    assert temporary.parent == out.parent
  assert (out / "file").read_text() == "content"
  assert [path.name for path in out.parent.iterdir()] == ["out"]
  assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [UserError("bad"), KeyboardInterrupt()])
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


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"a":' * 20_000, "f.json is not JSON: maximum recursion depth exceeded"),
    (b"\xff\xff{}", "f.json is not JSON: .* decode byte 0xff"),
    (None, "cannot read .*f.json: No such file or directory"),
  ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "f.json").write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    files.read_json(tmp_path / "f.json")
  assert len(str(error.value)) < 300
  (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf[1]")  # some editors write this mark at the start of a text
  assert files.read_json(tmp_path / "f.json") == [1]


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
  (folder,) = tmp_path.iterdir()

  def again() -> list[pathlib.Path]:
    with contextlib.suppress(KeyError), files.whole_folder(tmp_path / "folder"):
      raise KeyError
    return [*tmp_path.iterdir()]

  assert again() == [folder]  # its process is still running
  process.kill()
  process.communicate()
  assert again() == []
