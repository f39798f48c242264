import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data import pairs, sources
from diffdis_jax.structs import UserError


def picture(seed: int, kind: str = "PNG") -> bytes:
  file = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def write_tar(path, files):
  with tarfile.open(path, "w") as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def raw(tmp_path):
  """Train: three good pairs and one bad of each kind in two tars, the second truncated. Val: one good pair."""
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
  write_tar(
    folder / "00001.tar", {"0.webp": picture(9, "WEBP"), "0.txt": b"third", "1.png": picture(10), "1.txt": b"y"}
  )
  whole = (folder / "00001.tar").read_bytes()
  (folder / "00001.tar").write_bytes(whole[: whole.index(b"1.png") + 600])
  write_tar(folder / "val-00000.tar", {"0.png": picture(11), "0.txt": b"val"})
  return folder


def load(folder, split):
  source = sources.make(name="pairs", path=folder, split=split, image_size=8)
  return [source[i] for i in range(len(source))]


def test_prepared_pairs_read_back(raw, tmp_path):
  reports = pairs.prepare(raw, tmp_path / "new" / "out")
  train = load(tmp_path / "new" / "out", "train")
  assert [r["caption"] for r in train] == ["third", "a naïve caption", "second"]
  assert [r["image"] for r in train] == [picture(9, "WEBP"), picture(0), picture(1, "JPEG")]
  assert [r["key"] for r in train] == ["00001/0", "train-00000/0", "train-00000/1"]
  assert (train[1]["vendor"], train[1]["tags"]) == ("v", ["x", "ü"])
  assert [r["caption"] for r in load(tmp_path / "new" / "out", "val")] == ["val"]

  report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
  assert report["train"]["pairs"] == reports["train"].pairs == 3
  assert report["train"]["truncated_tars"] == ["00001.tar"]
  assert report["train"]["skipped"] == {
    "corrupt image": 1,
    "missing caption": 2,
    "missing image": 1,
    "json that is no object": 1,
    "caption that is not UTF-8": 1,
    "corrupt json": 1,
  }
  assert report["train"]["first_skipped"]["missing caption"] == ["train-00000/3", "train-00000/5"]
  assert report["val"] == {"pairs": 1, "skipped": {}, "first_skipped": {}, "truncated_tars": []}
  assert json.loads((tmp_path / "new" / "out" / "metadata.json").read_text()) == report
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_two_builds_give_the_same_records(raw, tmp_path):
  for name in ("one", "two"):
    pairs.prepare(raw, tmp_path / name)
  assert load(tmp_path / "one", "train") == load(tmp_path / "two", "train")


def test_an_empty_folder_is_filled(raw, tmp_path):
  (tmp_path / "out").mkdir()
  pairs.prepare(raw, tmp_path / "out")
  assert len(load(tmp_path / "out", "val")) == 1


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (None, "no folder .*raw; --source is a folder of webdataset tars"),
    ({}, "no .tar files in .*raw"),
    ({"pictures.tar": {"0.txt": b"x"}}, "cannot tell the split of pictures.tar"),
    ({"all-0.tar": {"0.txt": b"x"}}, "cannot tell the split of all-0.tar"),
    (
      {"0.tar": {"0.png": picture(0), "0.txt": b"x"}, "val-0.tar": {"0.txt": b"x", "1.png": b"z", "1.txt": b"z"}},
      "no usable pair in the tars of split val: 1 with missing image, 1 with corrupt image",
    ),
  ],
)
def test_bad_source_writes_nothing(tmp_path, files, message):
  if files is not None:
    (tmp_path / "raw").mkdir()
    for name, members in files.items():
      write_tar(tmp_path / "raw" / name, members)
  with pytest.raises(UserError, match=message):
    pairs.prepare(tmp_path / "raw", tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ([] if files is None else ["raw"])


def test_out_must_be_free(raw, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("keep")
  for out in (tmp_path / "out", tmp_path / "out" / "mine"):
    with pytest.raises(UserError, match="exists and is not an empty folder"):
      pairs.prepare(raw, out)
  with pytest.raises(UserError, match="cannot make the folder"):
    pairs.prepare(raw, tmp_path / "out" / "mine" / "deeper" / "out")
  assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_interrupted_build_leaves_nothing(raw, tmp_path, monkeypatch):
  def interrupt(reader):
    raise KeyboardInterrupt

  monkeypatch.setattr(pairs, "_checked", interrupt)
  with pytest.raises(KeyboardInterrupt):
    pairs.prepare(raw, tmp_path / "out")
  assert [p.name for p in tmp_path.iterdir()] == ["raw"]
