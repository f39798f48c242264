import csv
import re

import pytest

from configs import clip_cc3m, diffdis_cc3m
from diffdis_jax.data import sources
from diffdis_jax.data.prepare import builder, cc3m
from diffdis_jax.errors import UserError
from tests.raw_pairs import load, picture, write_tar


def prepare(source, out):
  return builder.prepare(
    cc3m.find_parts(source), out, builder=cc3m.Cc3m, settings=builder.Settings(short_side=cc3m.SHORT_SIDE)
  )


def test_tars_and_tables_give_the_same_images_and_captions(tmp_path):
  big = picture(1, "JPEG", (400, 300))
  for folder in ("tars", "tables/images"):
    (tmp_path / folder).mkdir(parents=True)
  write_tar(tmp_path / "tars" / "cc3m-train-0000.tar", {"0.jpg": big, "0.txt": "a café".encode()})
  write_tar(tmp_path / "tars" / "cc3m-validation-0000.tar", {"0.jpg": picture(2), "0.txt": b"second"})
  (tmp_path / "tables" / "images" / "1.jpg").write_bytes(big)
  (tmp_path / "tables" / "images" / "2.jpg").write_bytes(picture(2))
  (tmp_path / "tables" / "Train_GCC-training.tsv").write_text(
    "caption\tfilepath\turl\na café\timages/1.jpg\thttp://x\n"
  )
  (tmp_path / "tables" / "Validation_GCC.tsv").write_text("title\timage\nsecond\timages/2.jpg\ngone\timages/3.jpg\n")

  reports = prepare(tmp_path / "tars", tmp_path / "a"), prepare(tmp_path / "tables", tmp_path / "b")
  assert reports[0]["train"].changed == {"image stored smaller": 1}
  assert reports[1]["val"].skipped == {"missing image": 1}
  (first,), (second,) = load(tmp_path / "a", "train"), load(tmp_path / "b", "train")
  assert (first["caption"], first["image"]) == (second["caption"], second["image"]) and first["caption"] == "a café"
  assert (second["url"], second["key"]) == ("http://x", "images/1.jpg")
  assert load(tmp_path / "a", "val")[0]["image"] == load(tmp_path / "b", "val")[0]["image"] == picture(2)
  assert cc3m.Cc3m.name == "cc3m" and (tmp_path / "a" / "cc3m-train.array_record-00000-of-00001").exists()


@pytest.mark.parametrize("config", [diffdis_cc3m, clip_cc3m])
def test_configs_find_what_is_held_out_in_the_published_tars(tmp_path, config):
  for name in ("train", "validation"):
    write_tar(tmp_path / f"cc3m-{name}-0000.tar", {"0.jpg": picture(1), "0.txt": name.encode()})
  prepare(tmp_path, tmp_path / "out")
  section = config.get_config(f"path={tmp_path / 'out'},held_out={tmp_path / 'out'}").evals.held_out
  assert [record["caption"] for record in sources.open_source(**section.data)] == ["validation"]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("train.tsv", "a caption\thttp://image\n", "the first line must name a column caption and a column filepath, not"),
    ("train.tsv", "", "must name a column caption and a column filepath, not none"),
    ("train.tsv", "caption\tfilepath\n", "train.tsv has no rows"),
    ("pairs.tsv", "caption\tfilepath\na\tb\n", "cannot tell the split of pairs.tsv; name it train.tsv"),
  ],
)
def test_bad_tables(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=re.escape(message)):
    cc3m.find_parts(tmp_path)


def test_two_tables_of_a_split(tmp_path):
  for name in ("val.tsv", "validation.tsv"):
    (tmp_path / name).write_text("caption\tfilepath\na\tb\n")
  with pytest.raises(UserError, match="second table of split val"):
    cc3m.find_parts(tmp_path)


@pytest.mark.parametrize("name", ["cc3m-train-0000.tar", "00000.tar", "Train_GCC-training.tsv"])
def test_what_macos_leaves_beside_a_file_is_no_part(tmp_path, name):
  """On a disk of another system's it keeps a file's attributes in ._FILE."""
  if name.endswith(".tar"):
    write_tar(tmp_path / name, {"0.jpg": picture(1), "0.txt": b"a"})
  else:
    (tmp_path / name).write_text("caption\tfilepath\na\t1.png\n")
  (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
  (part,) = cc3m.find_parts(tmp_path)
  assert part.split == "train" and not part.name.startswith(".")


def test_a_table_that_begins_with_a_mark(tmp_path):
  """As a spreadsheet saves it."""
  (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfcaption\tfilepath\na\t1.png\n")
  (part,) = cc3m.find_parts(tmp_path)
  assert [(item.caption, item.file) for item in part.items] == [("a", "1.png")]


def test_odd_rows(tmp_path):
  """A short row, a quote, bytes that are not UTF-8."""
  (tmp_path / "train.tsv").write_bytes(b'caption\tfilepath\nalone\n"quoted\t1.png\n\xff\t1.png\n')
  (tmp_path / "1.png").write_bytes(picture(0))
  reports = prepare(tmp_path, tmp_path / "out")
  assert reports["train"].skipped == {"missing image": 1, "caption that is not UTF-8": 1}
  assert load(tmp_path / "out", "train")[0]["caption"] == '"quoted'


def test_captions_with_quotes_as_pandas_writes_them(tmp_path):
  captions = ['the " best " dog', '"hi" he said', '"quoted', "plain", 'a ""', '"']
  with open(tmp_path / "train.tsv", "w", newline="") as file:
    table = csv.writer(file, delimiter="\t")
    table.writerows([["title", "filepath"], *([caption, "1.png"] for caption in captions)])
  (part,) = cc3m.find_parts(tmp_path)
  assert [item.caption for item in part.items] == captions


def test_a_caption_of_two_lines_is_refused_and_not_halved(tmp_path):
  for text in ('"a\ncat"', '"a\n\nblack\ncat"'):
    (tmp_path / "train.tsv").write_text(f"caption\tfilepath\nb\t1.png\n{text}\t1.png\n")
    with pytest.raises(UserError, match="line 3: a quoted text goes on in the next line"):
      cc3m.find_parts(tmp_path)
  (tmp_path / "train.tsv").write_text('caption\tfilepath\n"cut\nb\t1.png\n"c"\t1.png\n"end')
  (part,) = cc3m.find_parts(tmp_path)
  assert [item.caption for item in part.items] == ['"cut', "b", '"c"', '"end']
