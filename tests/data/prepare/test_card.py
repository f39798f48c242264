import json

import pytest

from diffdis_jax import prepare_data
from diffdis_jax.data.prepare import card, parts, write
from diffdis_jax.errors import UserError
from tests.raw_pairs import picture, write_tar


def test_card(tmp_path):
  (tmp_path / "raw").mkdir()
  content = {f"{i}.jpg": picture(i, "JPEG" if i % 4 else "PNG", (8 + i, 10)) for i in range(8)}
  content |= {f"{i}.txt": b"long caption" if i else b"short" for i in range(8)} | {"8.txt": b"x"}
  write_tar(tmp_path / "raw" / "0.tar", dict(sorted(content.items())))
  write.prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  made = card.describe(tmp_path / "out")
  facts = made.splits["train"]
  assert facts["pairs"] == 8 and facts["formats"] == {"JPEG": 0.75, "PNG": 0.25}
  assert facts["short_side"] == {"least": 8, "median": 10, "most": 10}
  assert facts["caption_characters"] == {"least": 5, "median": 12, "most": 12}
  assert facts["distinct_captions"] == 0.25
  assert made.images.shape == (8, card.TILE, card.TILE, 3) and made.captions[0] == "short"
  (line,) = made.lines()
  assert line.startswith("train: 8 pairs, ")
  prepare_data.finish(tmp_path / "out")
  assert json.loads((tmp_path / "out" / "card.json").read_bytes())["captions"] == ["short", "long caption"]
  with pytest.raises(UserError, match="no prepared data set in"):
    card.describe(tmp_path)
