import json

import numpy as np
import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data.prepare import card, parts, write
from diffdis_jax.errors import UserError
from diffdis_jax.run import digests
from tests.raw_pairs import picture, write_tar


def test_card(tmp_path):
  (tmp_path / "raw").mkdir()
  content = {f"{i}.jpg": picture(i, "JPEG" if i % 4 else "PNG", (8 + i, 10)) for i in range(8)}
  content |= {f"{i}.txt": b"long caption" if i else b"short" for i in range(8)} | {"8.txt": b"x"}
  write_tar(tmp_path / "raw" / "0.tar", dict(sorted(content.items())))
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  made = card.describe(tmp_path / "out")
  facts = json.loads(made.to_json())["splits"]["train"]
  assert facts["pairs"] == 8 and facts["report"]["skipped"] == {"missing image": 1}
  assert facts["short_side"] == {"least": 8, "median": 10, "most": 10}
  assert facts["long_side"] == {"least": 10, "median": 12, "most": 15}
  assert facts["formats"] == {"JPEG": 0.75, "PNG": 0.25}
  assert facts["caption_characters"] == {"least": 5, "median": 12, "most": 12}
  assert facts["distinct_captions"] == 0.25
  assert made.images.shape == (8, card.TILE, card.TILE, 3) and made.captions[0] == "short"
  assert json.loads(made.to_json())["captions"] == ["short", "long caption"]
  assert made.lines()[1].startswith("train: 8 pairs, ")
  assert made.lines()[2] == "train: skipped 1 with missing image"
  with pytest.raises(UserError, match="no prepared data set in"):
    card.describe(tmp_path)
  (shard,) = (tmp_path / "out").glob("*.array_record*")
  shard.write_bytes(shard.read_bytes()[:100])
  with pytest.raises(UserError, match="none of 8 records can be read|cannot be read"):
    card.describe(tmp_path / "out")


def test_a_card_of_pairs_whose_names_are_not_unicode(tmp_path):
  (tmp_path / "raw").mkdir()
  broken = {"\udcff.png": b"no image", "\udcff.txt": b"x"}
  write_tar(tmp_path / "raw" / "0.tar", {"a.png": picture(0), "a.txt": b"x", **broken})
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  prepare_data.write_card(tmp_path / "out")
  report = json.loads((tmp_path / "out" / "card.json").read_bytes())["splits"]["train"]["report"]
  assert report["first_skipped"] == {"corrupt image": ["0/\udcff"]}


def test_a_card_that_is_written_again_is_no_damage(tmp_path, monkeypatch):
  (tmp_path / "raw").mkdir()
  content = {f"{i}.png": picture(i) for i in range(3)} | {f"{i}.txt": b"x" for i in range(3)}
  write_tar(tmp_path / "raw" / "0.tar", content)
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  prepare_data.write_card(tmp_path / "out")
  assert not (tmp_path / "out" / digests.NAME).exists()  # the preparation writes it last
  digests.write(tmp_path / "out")
  before = (tmp_path / "out" / "card.json").read_bytes()
  monkeypatch.setattr(card, "SHEET", 2)  # as another version may show other pairs
  monkeypatch.setattr(card, "SAMPLE", 2)
  prepare_data.write_card(tmp_path / "out")
  assert (tmp_path / "out" / "card.json").read_bytes() != before and digests.damage(tmp_path / "out") is None
  (shard,) = (tmp_path / "out").glob("*.array_record*")
  shard.write_bytes(shard.read_bytes()[:-1] + b"x")
  prepare_data.write_card(tmp_path / "out")
  assert digests.damage(tmp_path / "out").file == shard.name


def test_captions_that_are_no_strings_do_not_count(tmp_path):
  (tmp_path / "raw").mkdir()
  odd = ({"captions": [{"text": "x"}, 3]}, {"captions": "abc"}, {"captions": 7}, {"captions": ["one", "another"]})
  content = {}
  for i, metadata in enumerate(odd):
    content |= {f"{i}.png": picture(i), f"{i}.txt": b"four", f"{i}.json": json.dumps(metadata).encode()}
  write_tar(tmp_path / "raw" / "0.tar", content)
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  facts = card.describe(tmp_path / "out").splits["train"]
  assert facts["captions_an_image"] == 5 / 4
  assert facts["caption_characters"] == {"least": 3, "median": 4, "most": 7}


def test_places_are_spread():
  assert card.spread(3, 64).tolist() == [0, 1, 2]
  places = card.spread(1000, 64)
  assert len(places) == 64 and places[0] == 0 and places[-1] == 999 and np.ptp(np.diff(places)) <= 1
