import dataclasses

import numpy as np
import pytest

from diffdis_jax.data import records, sources
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from tests.raw_pairs import picture


def test_the_source_of_shapes_has_its_size_and_caption_fields():
  source = sources.open_source(name="shapes", split="unseen", image_size=24, num_images=5, seed=3)
  assert len(source) == 5 and source[4]["image"].shape == (24, 24, 3) and not source[4]["seen"]
  assert len(sources.open_source(name="shapes", image_size=24)) == 65536
  assert len(sources.read(name="shapes", image_size=8, num_images=None).open()) == 65536
  plain = sources.open_source(name="shapes", image_size=24, caption_fields=("plain_caption", "colour"))
  record = plain[7]
  assert record["captions"] == [record["plain_caption"], record["colour"]] and record["caption"].startswith("a ")
  np.testing.assert_array_equal(record["image"], sources.open_source(name="shapes", image_size=24)[7]["image"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "laion"}, "unknown data source 'laion'; there are shapes, pairs"),
    ({"name": "shapes", "split": "val"}, "shapes has no split 'val'; there are train, test, unseen, all"),
    ({"name": "shapes", "num_images": 0}, "num_images is 0; at least 1"),
    (
      {"name": "shapes", "caption_fields": ("texts",)},
      "shapes has no caption field 'texts'; the fields of its first record are capt",
    ),
    ({"name": "pairs"}, "''; write one with diffdis prepare_data, and name .* --config=FILE.py:path=DIR"),
    ({"name": "pairs", "path": "nowhere"}, "no prepared data set in 'nowhere'"),
    ({"name": "shapes", "caption_field": ("caption",)}, "no field 'caption_field'; did you mean caption_fields?"),
    ({"name": "shapes", "caption_fields": "caption"}, "caption_fields is 'caption'; it must be a sequence"),
    ({"name": "shapes", "num_images": "5"}, "num_images is '5'; it must be a whole number"),
    ({"name": "shapes", "seed": 1.5}, "seed is 1.5; it must be a whole number"),
    ({"name": "shapes", "seed": -1}, "seed is -1; at least 0"),
    ({"name": "shapes", "split": None}, "split is None; it must be a text"),
    ({"name": "shapes", "path": "birds"}, "data.path is 'birds', and data.name 'shapes', whose images are rendered"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UserError, match=message):
    sources.open_source(**arguments, image_size=32)


def test_a_users_own_kind_of_source_may_have_further_fields(monkeypatch):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Mine(sources.Section):
    shade: int = 0

    def open(self):
      return [{"image": b"", "caption": str(self.shade)}]

  monkeypatch.setitem(sources.KINDS, "mine", Mine)
  assert sources.open_source(name="mine", image_size=8, shade=3)[0]["caption"] == "3"
  with pytest.raises(UserError, match="no field 'shad'; did you mean shade?"):
    sources.open_source(name="mine", image_size=8, shad=3)


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
  (tmp_path / "dataset_info.json").write_text("{}")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="no prepared data set in ''"):
    sources.open_source(name="pairs", image_size=32)


@pytest.mark.parametrize(
  ("captions", "usable"),
  [
    (["a cat", "a black cat"], ["a cat", "a black cat"]),
    (["a cat", "", " a black cat ", None, " "], ["a cat", "a black cat"]),
    (["a cat", ""], []),
    ("a cat", []),
    (None, []),
  ],
)
def test_an_empty_one_of_several_captions_leaves_the_others(captions, usable):
  """Otherwise all the captions would be dropped silently, or white space would be a caption."""
  assert records.captions_of({"caption": "alt", "captions": captions}) == usable


def test_caption_fields_of_a_prepared_folder(tmp_path):
  pairs = [parts.file_pair(f"{i}.png", f"caption {i}", concept=f"concept {i}") for i in range(4)]
  for i, pair in enumerate(pairs):
    (tmp_path / pair.file).write_bytes(picture(i))
  prepare(parts.files(pairs, split="train", root=tmp_path), tmp_path / "data")
  make = lambda fields: sources.open_source(name="pairs", path=tmp_path / "data", image_size=8, caption_fields=fields)
  source = make(("concept", "caption"))
  stored = [source[i] for i in range(4)]
  assert all(r["captions"] == [r["concept"], r["caption"].replace("concept", "caption")] for r in stored)
  assert {r["caption"] for r in stored} == {f"concept {i}" for i in range(4)}
  assert "captions" not in make(())[0]
  for file in ("dataset_info.json", "features.json"):
    whole = (tmp_path / "data" / file).read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
      (tmp_path / "data" / file).write_bytes(content)
      with pytest.raises(UserError, match="data is no whole data set: .*; copy it again, or prepare it again"):
        make(())
    (tmp_path / "data" / file).write_bytes(whole)
  with pytest.raises(UserError, match="no caption field 'concpt'; the fields of its first record are caption, concept"):
    make(("caption", "concpt"))
