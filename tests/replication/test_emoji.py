"""Test which pairs of icons and captions the emoji experiments have."""

from __future__ import annotations

import collections
import hashlib
import os
import pathlib

import pytest

from diffdis_jax.data.prepare import write
from replication import emoji
from tests.raw_pairs import load

pytestmark = pytest.mark.slow

COUNTS = {"train": 5_726, "val_vendor": 895, "val_concepts": 757, "test_vendor": 1_364}
# SHA-256 of a split's captions as first published, one per line.
CAPTIONS = {
  "train": "11b2734b8dbb3f99326a1ff684de272305ad136a1f2b7b6d51191275aacf4cfa",
  "val_vendor": "ab5b239fb0047abe07a7e9d3500d234907c00a9ec3fa6dc2b081867463dcb8c1",
  "val_concepts": "0d9eadffe22ba51aa38907f2f82bb428e0771a11caa20ca87ba03c5bf6cfb220",
  "test_vendor": "07a132a9f39ef9e39d55db11b8f161a64d77678275230c6240d92edd66e8def2",
}


def test_the_shipped_choices():
  """The concepts' names come from emojibase, so code points replace them here."""
  chosen = emoji.read_choices()
  codes = chosen["concepts"].split()
  assert len(codes) == len({*codes}) == 1_364 and len({*chosen["held_out"].split()}) == 158
  concepts = [emoji.Concept(code, code, "group", "subgroup", ("one", "two", "three")) for code in codes]
  icons = {split: emoji.icons_of(split, concepts, chosen) for split in emoji.SPLITS}
  assert {split: len(icons[split]) for split in icons} == COUNTS
  assert collections.Counter(icon.vendor for icon in icons["train"]) == {
    **{"noto": 1_206, "fluent-emoji-flat": 1_191, "fluent-emoji": 1_191, "fxemoji": 734, "emojione": 910},
    "streamline-emojis": 494,
  }
  seen, unseen = ({icon.concept for icon in icons[split]} for split in ("train", "val_concepts"))
  assert len(seen) == 1_206 and len(unseen) == 158 and not seen & unseen
  assert {icon.concept for icon in icons["val_vendor"]} < seen
  templates = collections.Counter(icon.template for icon in icons["test_vendor"])
  assert templates == {0: 338, 1: 344, 2: 346, 3: 336}
  assert {icon.caption for icon in icons["test_vendor"] if icon.concept.concept == "1F9C4"} == {"icon of 1F9C4, group"}


@pytest.mark.full
@pytest.mark.skipif("EMOJI_SOURCE" not in os.environ, reason="EMOJI_SOURCE names no folder of npm packages")
def test_the_published_packages_give_the_published_pairs(tmp_path):
  parts = emoji.find_parts(pathlib.Path(os.environ["EMOJI_SOURCE"]))
  reports = write.prepare(parts, tmp_path / "out", data_set=emoji.data_set(parts))
  assert not any(report.skipped for report in reports.values())
  assert {split: reports[split].pairs for split in COUNTS} == COUNTS
  for split, expected in CAPTIONS.items():
    captions = [record["caption"] for record in load(tmp_path / "out", split)]
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest() == expected
