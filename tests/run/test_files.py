from __future__ import annotations

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
