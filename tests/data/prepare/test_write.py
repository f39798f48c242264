import functools
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from diffdis_jax.data.prepare import parts, write
from diffdis_jax.errors import UserError
from tests.interrupting import Terminal, is_alive
from tests.raw_pairs import load, picture, write_pairs, write_tar


@pytest.fixture
def raw(tmp_path):
  """Write good pairs and one bad of each kind in two tars of `train`, the second truncated, and a pair of `val`."""
  folder = tmp_path / "raw"
  folder.mkdir()
  metadata = json.dumps({"vendor": "v", "key": "inner", "tags": ["x", "ü"]}, ensure_ascii=False).encode()
  first = {"0.png": picture(0), "0.txt": " a naïve caption\n".encode(), "0.json": metadata}
  first |= {"1.jpg": picture(1, "JPEG"), "1.txt": b"second"}
  first |= {"2.png": picture(2)[:-60], "2.txt": b"cut"}
  first |= {"3.png": picture(3), "4.txt": b"no image", "5.png": picture(5), "5.txt": b"  \n"}
  first |= {"6.png": picture(6), "6.txt": b"x", "6.json": b"[1]", "7.png": picture(7), "7.txt": b"\xff\xfe"}
  first |= {"8.png": picture(8), "8.txt": b"x", "8.json": b'{"a": '}
  write_tar(folder / "train-00000.tar", first)
  second = {"0.webp": picture(9, "WEBP"), "0.txt": b"third", "1.png": picture(10), "1.txt": b"y"}
  write_tar(folder / "00001.tar", second)
  whole = (folder / "00001.tar").read_bytes()
  (folder / "00001.tar").write_bytes(whole[: whole.index(b"1.png") + 600])
  write_tar(folder / "val-00000.tar", {"0.png": picture(11), "0.txt": b"val"})
  return folder


def prepare(source, out, **how):
  return write.prepare(parts.tars(source), out, **how)


def test_prepared_pairs_read_back(raw, tmp_path):
  reports = prepare(raw, tmp_path / "new" / "out")
  train = load(tmp_path / "new" / "out", "train")
  assert [r["caption"] for r in train] == ["third", "a naïve caption", "second"]
  assert [r["image"] for r in train] == [picture(9, "WEBP"), picture(0), picture(1, "JPEG")]
  assert [r["key"] for r in train] == ["00001/0", "train-00000/0", "train-00000/1"]
  assert (train[1]["vendor"], train[1]["tags"]) == ("v", ["x", "ü"])
  assert [r["caption"] for r in load(tmp_path / "new" / "out", "val")] == ["val"]

  report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
  assert report["train"]["pairs"] == reports["train"].pairs == 3
  assert report["train"]["truncated"] == ["00001"]
  assert report["train"]["skipped"] == {
    "corrupt image": 1,
    "missing caption": 2,
    "missing image": 1,
    "json that is no object": 1,
    "caption that is not UTF-8": 1,
    "corrupt json": 1,
  }
  assert report["train"]["first_skipped"]["missing caption"] == ["train-00000/3", "train-00000/5"]
  nothing = {"skipped": {}, "first_skipped": {}, "truncated": [], "shared": {}}
  assert report["val"] == {"pairs": 1, **nothing}
  assert json.loads((tmp_path / "new" / "out" / "metadata.json").read_text()) == report
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def content(folder: pathlib.Path) -> list:
  """Return the names of files, the records of each split in order, and the report."""
  report = (folder / "report.json").read_text()
  return [sorted(path.name for path in folder.iterdir()), [load(folder, split) for split in json.loads(report)], report]


def test_names_and_captions_that_are_not_unicode(tmp_path):
  folder = tmp_path / os.fsdecode(b"caf\xe9")
  folder.mkdir()
  (folder / "0.png").write_bytes(picture(0))
  (folder / "1.png").write_bytes(picture(1))
  items = [
    parts.file_pair(f"{folder.name}/0.png", "coffee"),
    parts.file_pair(f"{folder.name}/1.png", "half \ud800"),
    parts.file_pair(f"{folder.name}/1.png", "other", **{"class": "\ud800"}),
  ]
  reports = write.prepare(parts.files(items, split="train", root=tmp_path), tmp_path / "out")
  assert reports["train"].skipped == {"caption that is not UTF-8": 1, "corrupt json": 1}
  (record,) = load(tmp_path / "out", "train")
  assert (record["key"], record["caption"]) == ("caf\\udce9/0.png", "coffee")


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (None, "no folder .*raw; --source is a folder of webdataset tars"),
    ({}, "no .tar files in .*raw"),
    ({"pictures.tar": {"0.txt": b"x"}}, "cannot tell the split of pictures.tar"),
    ({"all-0.tar": {"0.txt": b"x"}}, "cannot tell the split of all-0.tar"),
    (
      {"0.tar": {"0.txt": b"x", "1.png": b"z", "1.txt": b"z"}},
      "no usable pair in split train: 1 with missing image, 1 with corrupt image, the first '0/0'; mend these, or take"
      " them out of --source$",
    ),
  ],
)
def test_bad_source_writes_nothing(tmp_path, files, message):
  if files is not None:
    (tmp_path / "raw").mkdir()
    for name, members in files.items():
      write_tar(tmp_path / "raw" / name, members)
  with pytest.raises(UserError, match=message):
    prepare(tmp_path / "raw", tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ([] if files is None else ["raw"])


def test_out_must_be_free(raw, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("keep")
  for out in (tmp_path / "out", tmp_path / "out" / "mine"):
    with pytest.raises(UserError, match="--out=.* is not empty; give a new folder|--out=.* is a file"):
      prepare(raw, out)
  with pytest.raises(UserError, match="cannot write --out=.*: Not a directory"):
    prepare(raw, tmp_path / "out" / "mine" / "deeper" / "out")
  assert (tmp_path / "out" / "mine").read_text() == "keep"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  """Write twelve tars of twenty pairs."""
  folder = tmp_path_factory.mktemp("many")
  for i in range(12):
    write_pairs(folder, 20, first=20 * i, tar=f"{'val' if i == 11 else 'train'}-{i:05d}.tar")
  return folder


# Dies by SIGKILL at the n-th time that a file gets its final name.
KILLED = """
import os, pathlib, signal, sys
from diffdis_jax.data.prepare import parts, write
left = int(sys.argv[1])
def dying(method):
  def replace(self, target):
    global left
    left -= 1
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return method(self, target)
  return replace
pathlib.Path.replace = dying(pathlib.Path.replace)
write.prepare(parts.tars(pathlib.Path(sys.argv[2])), pathlib.Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_several_processes_write_the_same_records(raw, tmp_path):
  reports = [prepare(raw, tmp_path / name, num_processes=n) for name, n in (("one", 1), ("two", 2))]
  assert reports[0] == reports[1]
  assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
def test_killed_at_any_point_it_ends_in_the_same_records(many, tmp_path):
  """The second kill hits the moving of the parts. Those that were moved are made again."""
  prepare(many, tmp_path / "whole")
  command = [sys.executable, "-c", KILLED, "17", str(many), str(tmp_path / "killed")]
  codes = []
  while not codes or codes[-1]:
    codes.append(subprocess.run(command, cwd=pathlib.Path(__file__).parents[2]).returncode)
    left = [*(tmp_path / ".killed.partial" / "parts").glob(".*.tmp")]
    assert len(left) <= 1, left  # of this kill, and of none before
    assert set(codes[:-1]) <= {-signal.SIGKILL} and len(codes) < 10, codes
  assert len(codes) >= 4
  assert content(tmp_path / "killed") == content(tmp_path / "whole")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


# What Python imports at its start: where a part is finished, whoever did it waits, so that a test comes in time.
SITE = """
import os, time
replace = os.replace
def slowly(*args, **how):
  replace(*args, **how)
  if str(args[1]).endswith(".json"):
    time.sleep(0.5)
os.replace = slowly
"""


@pytest.fixture
def unhurried(tmp_path_factory):
  """Return the variables of a preparation that takes a while."""
  folder = tmp_path_factory.mktemp("site")
  (folder / "sitecustomize.py").write_text(SITE)
  known = os.environ.get("PYTHONPATH", "")
  return {**os.environ, "PYTHONPATH": f"{folder}:{pathlib.Path(__file__).parents[3]}:{known}"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_one_line_and_the_same_command_goes_on(many, tmp_path, unhurried, number):
  """A terminal or a scheduler sends it to the workers as well; SIGKILL, as for memory, hits one of them alone."""
  command = [sys.executable, "-m", "diffdis_jax.prepare_data", "pairs", f"--source={many}", f"--out={tmp_path / 'out'}"]
  with Terminal([*command, "--num_processes=2", "--quiet"], unhurried, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: [*(tmp_path / ".out.partial" / "parts").glob("*.json")])
    group = [int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*") if _group(path) == terminal.process.pid]
    if number == signal.SIGKILL:
      os.kill(next(pid for pid in group if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()), number)
      assert terminal.end() == 2 and terminal.stderr.startswith(
        "error: a process of the preparation was killed, perhaps"
      )
      assert terminal.stderr.count("\n") == 1 and "with --num_processes below 2 if memory is short" in terminal.stderr
    else:
      os.killpg(terminal.process.pid, number)
      ends = {signal.SIGINT: (130, "interrupted\n"), signal.SIGTERM: (143, "terminated\n")}
      assert (terminal.end(), terminal.stderr) == ends[number]
    deadline = time.monotonic() + 20
    while any(map(is_alive, group)) and time.monotonic() < deadline:
      time.sleep(0.01)
    assert len(group) > 2 and not any(map(is_alive, group))
  prepare(many, tmp_path / "out")
  prepare(many, tmp_path / "whole")
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def _group(process: pathlib.Path) -> int | None:
  try:
    return int((process / "stat").read_text().rpartition(")")[2].split()[2])
  except OSError:
    return None


@pytest.mark.parametrize("content", [gzip.compress(bytes(20480), mtime=0), b"<html>" * 200], ids=["gzip", "page"])
def test_what_is_no_tar_is_named(tmp_path, content):
  for name in ("train-00000.tar", "train-00001.tar"):
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match="train-00000 is cut off, damaged, or no uncompressed tar: download"):
    prepare(tmp_path, tmp_path / "out")


def test_two_at_once(many, tmp_path):
  (tmp_path / ".out.partial").mkdir()
  with write._only_process(tmp_path / ".out.partial"), pytest.raises(UserError, match="another process is writing"):
    prepare(many, tmp_path / "out")


FULL = """
import pathlib, resource, signal, sys
from diffdis_jax.data.prepare import parts, write
from diffdis_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
  write.prepare(parts.tars(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
except UserError as error:
  sys.exit(str(error))
"""


def test_a_disk_that_takes_no_more(many, tmp_path):
  """A limit of 2,000 bytes a file is to the program the same as a full disk."""
  command = [sys.executable, "-c", FULL, str(many), str(tmp_path / "out")]
  done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
  assert "cannot write to" in done.stderr and "too large" in done.stderr
  assert "nothing is lost: make room and run the same command again" in done.stderr
  assert not (tmp_path / "out").exists()
  assert prepare(many, tmp_path / "out")["train"].pairs == 220


def test_beam_writes_the_same_records(many, tmp_path):
  pytest.importorskip("apache_beam")
  prepare(many, tmp_path / "beam", beam_options=("runner=DirectRunner",))
  prepare(many, tmp_path / "local")
  assert content(tmp_path / "beam") == content(tmp_path / "local")


@pytest.mark.parametrize("begun", ["same", "smaller", "other"])
def test_a_preparation_goes_on_with_the_same_source_and_settings_alone(many, raw, tmp_path, monkeypatch, begun):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    original = write.Stage.write
    patch.setattr(write.Stage, "write", lambda stage, part: original(stage, part) if part.split == "train" else stop())
    how = {"make_stage": functools.partial(write.Stage, short_side=4)} if begun == "smaller" else {}
    prepare(raw if begun == "other" else many, tmp_path / "out", **how)
  assert not (tmp_path / "out").exists()
  report = tmp_path / ".out.partial" / "parts" / "train-00003.json"
  if begun == "same":
    report.write_bytes(b"")  # as a power cut may leave it
  with monkeypatch.context() as patch:
    written = []
    patch.setattr(write.Stage, "serialized", lambda *a: (written.append(a[1].name), original_serialized(*a))[1])
    prepare(many, tmp_path / "out")
  assert len(written) == (2 if begun == "same" else 12)
  prepare(many, tmp_path / "direct")
  assert content(tmp_path / "out") == content(tmp_path / "direct")


original_serialized = write.Stage.serialized


def stop():
  raise KeyboardInterrupt


def test_beam_that_is_not_installed_and_a_part_that_vanishes(many, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(UserError, match="needs Apache Beam .*; pip install apache-beam"):
    patch.setitem(sys.modules, "apache_beam", None)
    prepare(many, tmp_path / "new" / "out", beam_options=("runner=DirectRunner",))
  assert not (tmp_path / "new").exists()
  of_tars = parts.tars(many)
  of_tars[3].path = many / "vanished.tar"
  of_tars[3].identity = lambda: []
  with pytest.raises(UserError, match="cannot read part vanished of --source: .*No such file"):
    write.prepare(of_tars, tmp_path / "out")
