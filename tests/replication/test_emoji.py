from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data.prepare import write
from diffdis_jax.errors import UserError
from replication import emoji, emoji_packages
from tests.raw_pairs import load
from tests.replication.emoji_packages import write_packages

pytestmark = pytest.mark.slow

COUNTS = {"train": 5_726, "val_vendor": 895, "val_concepts": 757, "test_vendor": 1_364}
# As first published: SHA-256 of the captions of a split, one a line.
CAPTIONS = {
  "train": "11b2734b8dbb3f99326a1ff684de272305ad136a1f2b7b6d51191275aacf4cfa",
  "val_vendor": "ab5b239fb0047abe07a7e9d3500d234907c00a9ec3fa6dc2b081867463dcb8c1",
  "val_concepts": "0d9eadffe22ba51aa38907f2f82bb428e0771a11caa20ca87ba03c5bf6cfb220",
  "test_vendor": "07a132a9f39ef9e39d55db11b8f161a64d77678275230c6240d92edd66e8def2",
}


@pytest.fixture
def source(tmp_path):
  return tmp_path / "icons"


def prepare(source, out):
  return write.prepare(emoji.find_parts(source), out, data_set=emoji.EMOJI)


def test_a_few_icons(source, tmp_path, monkeypatch):
  write_packages(source, monkeypatch)
  reports = prepare(source, tmp_path / "out")
  counts = {split: report.pairs for split, report in reports.items()}
  assert counts == {"train": 18, "val_vendor": 2, "val_concepts": 11, "test_vendor": 5, "openmoji": 5}
  assert not any(report.skipped for report in reports.values())
  test = load(tmp_path / "out", "test_vendor")
  assert {record["caption"] for record in test} == {
    "an emoji of blue heart",
    "icon of green apple, food-drink",
    "person blond hair",
    "piñata, round, ripe",
    "an emoji of red apple",
  }
  openmoji = load(tmp_path / "out", "openmoji")
  assert [record["caption"] for record in openmoji] == [record["caption"] for record in test]
  assert {record["licence"] for record in openmoji} == {"CC-BY-SA-4.0"}
  held_out = load(tmp_path / "out", "val_concepts")
  assert {record["concept_id"] for record in held_out} == {"pinata", "red-apple"}
  assert {record["caption"] for record in held_out if record["concept_id"] == "red-apple"} == {
    f"{style} emoji of red apple" for style in ("shaded", "flat", "3d", "soft flat", "glossy flat")
  } | {"outlined cartoon drawing of red apple"}
  train = load(tmp_path / "out", "train")
  assert sorted(record["caption"] for record in train if record["vendor"] == "streamline-emojis") == [
    "an emoji of blue heart",
    "icon of person blond hair, food-drink",
    "outlined cartoon emoji of blue heart",
  ]
  image = test[0].pop("image")
  assert test[0].pop("caption") and test[0] == {
    **{"key": "test_vendor-00000/000000000", "status": "success", "width": 64, "height": 64},
    **{name: test[0][name] for name in ("concept", "concept_id")},
    **{"vendor": "twemoji", "licence": "CC-BY-4.0", "group": "food-drink", "subgroup": "food-fruit"},
    "tags": ["round", "ripe", "sweet"],
  }
  pixels = np.asarray(Image.open(io.BytesIO(image)))
  assert pixels.shape == (64, 64, 3) and (pixels[0, 0] == 255).all() and not (pixels[32, 32] == 255).all()
  notice = (tmp_path / "out" / "LICENSES.md").read_text()
  assert all(package.name in notice for package in emoji_packages.ICONS.values()) and "CC-BY-SA-4.0" in notice
  assert "| noto | train, val_concepts | [Google](" in notice and "| openmoji | openmoji | [OpenMoji](" in notice


def test_without_openmoji(source, tmp_path, monkeypatch, caplog):
  write_packages(source, monkeypatch)
  (source / emoji_packages.ICONS["openmoji"].file).unlink()
  with caplog.at_level("INFO"):
    reports = prepare(source, tmp_path / "out")
  assert "openmoji" not in reports and "and so no split openmoji" in caplog.text
  assert "openmoji" not in (tmp_path / "out" / "LICENSES.md").read_text()


def test_icons_that_cannot_be_used_are_counted(source, tmp_path, monkeypatch):
  write_packages(source, monkeypatch, changed={"twemoji": {"pinata": "<path"}, "noto-v1": {"blue-heart": "<g></h>"}})
  reports = prepare(source, tmp_path / "out")
  assert reports["test_vendor"].skipped == {"corrupt image": 1} and reports["test_vendor"].pairs == 4
  assert reports["val_vendor"].skipped == {"corrupt image": 1}


def test_openmoji_has_the_concepts_that_it_draws():
  concepts = [emoji.Concept(name, name, "g", "s", ()) for name in ("ape", "bee")]
  vendors = {"twemoji": {"icons": {"0": "monkey"}, "templates": "0 2"}}
  icons = emoji.icons_of_openmoji(concepts, {"held_out": "", "vendors": vendors}, {"ape": "<svg/>"})
  assert [(icon.vendor, icon.name, icon.caption) for icon in icons] == [("openmoji", "ape", "an emoji of ape")]


def damage(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (
      pathlib.Path.unlink,
      "icons lacks @iconify-json/noto 1.2.9; in this folder: npm pack @iconify-json/noto@1.2.9$",
    ),
    (damage, "iconify-json-noto-1.2.9.tgz is not @iconify-json/noto 1.2.9 as published: .* @iconify-json/noto@1.2.9$"),
  ],
)
def test_wrong_packages(source, monkeypatch, wrong, message):
  write_packages(source, monkeypatch)
  wrong(source / "iconify-json-noto-1.2.9.tgz")
  with pytest.raises(UserError, match=message) as error:
    emoji.find_parts(source)
  assert "\n" not in str(error.value)


def test_a_package_without_its_file(source, monkeypatch):
  write_packages(source, monkeypatch)
  with pytest.raises(UserError, match="cannot read x.json of .*noto-1.2.9.tgz: .*; fetch it again: npm pack @iconify"):
    emoji_packages.read_json(source, emoji_packages.ICONS["noto"], "x.json")


def test_no_renderer(source, monkeypatch):
  write_packages(source, monkeypatch)
  monkeypatch.setitem(sys.modules, "resvg_py", None)
  with pytest.raises(
    UserError, match=r"needs resvg-py, which is not installed; pip install -e '\.\[emoji\]' in the repository's folder$"
  ):
    emoji.find_parts(source)


def test_no_folder(tmp_path):
  with pytest.raises(UserError, match="no folder .*nowhere; --source is a folder of npm tarballs"):
    emoji.find_parts(tmp_path / "nowhere")


def test_the_shipped_choices():
  """Without emojibase the concepts have no names; their code points stand for them."""
  chosen = emoji.read_choices()
  codes = chosen["concepts"].split()
  assert len(codes) == len({*codes}) == 1_364 and len({*chosen["held_out"].split()}) == 158
  concepts = [emoji.Concept(code, code, "group", "subgroup", ("one", "two", "three")) for code in codes]
  found = {split: emoji.icons_of(split, concepts, chosen) for split in emoji.SPLITS}
  assert {split: len(icons) for split, icons in found.items()} == COUNTS
  assert collections.Counter(icon.vendor for icon in found["train"]) == {
    **{"noto": 1_206, "fluent-emoji-flat": 1_191, "fluent-emoji": 1_191, "fxemoji": 734, "emojione": 910},
    "streamline-emojis": 494,
  }
  seen, unseen = ({icon.concept for icon in found[split]} for split in ("train", "val_concepts"))
  assert len(seen) == 1_206 and len(unseen) == 158 and not seen & unseen
  assert {icon.concept for icon in found["val_vendor"]} < seen
  templates = collections.Counter(icon.template for icon in found["test_vendor"])
  assert templates == {0: 338, 1: 344, 2: 346, 3: 336}
  assert {icon.caption for icon in found["test_vendor"] if icon.concept.concept == "1F9C4"} == {"icon of 1F9C4, group"}


def test_the_documented_command_fetches_the_expected_versions():
  root = pathlib.Path(__file__).parents[2]
  assert "make data/emoji/dataset_info.json" in (root / "replication" / "emoji.md").read_text()
  said = subprocess.run(["make", "-n", "data/emoji/dataset_info.json"], cwd=root, capture_output=True, text=True).stdout
  (code,) = re.findall(r"-c '(from replication.emoji_packages[^']*)'", said.replace("\\\n", ""))
  names = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout.split()
  assert names == [f"{each.name}@{each.version}" for each in (emoji.EMOJIBASE, *emoji_packages.ICONS.values())]


@pytest.mark.full
@pytest.mark.skipif("EMOJI_SOURCE" not in os.environ, reason="EMOJI_SOURCE names no folder of npm packages")
def test_the_published_packages_give_the_published_pairs(tmp_path):
  reports = prepare(pathlib.Path(os.environ["EMOJI_SOURCE"]), tmp_path / "out")
  assert not any(report.skipped for report in reports.values())
  assert {split: reports[split].pairs for split in COUNTS} == COUNTS
  for split, expected in CAPTIONS.items():
    captions = [record["caption"] for record in load(tmp_path / "out", split)]
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == expected
  if "openmoji" in reports:
    captions = [[record["caption"] for record in load(tmp_path / "out", s)] for s in ("openmoji", "test_vendor")]
    assert captions[0] == captions[1]
  assert json.loads((tmp_path / "out" / "report.json").read_text()).keys() == reports.keys()
