"""The suite of emoji over tiny sets, with a model that knows each concept's colour."""

from __future__ import annotations

import numpy as np
import pytest

import replication.configs.emoji
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, tables
from diffdis_jax.evals import results as result_files
from diffdis_jax.evals.tasks import override
from replication import emoji as prepared
from replication import measure_emoji as emoji
from tests.replication.emoji_packages import CONCEPTS, write_packages

pytestmark = pytest.mark.slow

SIZE = 8
NAMES = [label.replace(":", "") for _, label, _ in CONCEPTS.values()]
COLOURS = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, _, colour in CONCEPTS.values()])


class Inference:
  """Embeds a text by the concept that it names, and an image by that of its colour."""

  image_size, max_length, protocol = SIZE, 77, {"steps": 1}

  def embed_texts(self, params, texts):
    return np.eye(len(NAMES), dtype=np.float32)[[next(i for i, n in enumerate(NAMES) if n in text) for text in texts]]

  def embed_images(self, params, images, *, seed):
    middle = images[np.arange(len(images))][:, SIZE // 2, SIZE // 2].astype(int)
    nearest = np.abs(middle[:, None] - COLOURS).sum(-1).argmin(-1)
    return np.eye(len(NAMES), dtype=np.float32)[nearest]


@pytest.fixture(autouse=True)
def as_texts(monkeypatch):
  """The model gets the texts themselves."""
  monkeypatch.setattr(base, "Tokenizer", lambda length: list)


def write(folder, tmp_path, monkeypatch, **changed):
  write_packages(tmp_path / "icons", monkeypatch, **changed)
  prepare(prepared.find_parts(tmp_path / "icons"), folder, data_set=prepared.EMOJI)


def sections(root):
  return emoji.sections(root, image_size=SIZE)


def test_templates_are_the_configs():
  assert emoji.TEMPLATES == replication.configs.emoji.TEMPLATES


def test_every_split_both_ways(tmp_path, monkeypatch):
  wrong = {"openmoji": {"pinata": '<path fill="#f00" d="M4 4h24v24H4z"/>'}}
  write(tmp_path / "root" / "emoji", tmp_path, monkeypatch, changed=wrong)
  made = sections(tmp_path / "root")
  assert made == sections(tmp_path / "root" / "emoji")
  assert [(section.dataset, section.task) for section in made] == [
    (f"emoji/{split}", task)
    for split in ("test_vendor", "val_vendor", "val_concepts", "openmoji")
    for task in ("zero_shot", "retrieval", *(() if split == "val_concepts" else ("hog",)))
  ]
  results = {"zero_shot": {}, "retrieval": {}, "hog": {}}
  for section in made:
    name, evaluation = section.dataset, section.create()
    metrics = evaluation.run(Inference(), {})
    protocol = evaluation.protocol(Inference())
    results[section.task][name] = result_files.make_record(
      dataset=name, model="m", pretrained="run", task=evaluation.task, metrics=metrics, protocol=protocol, provenance={}
    )
  zero_shot = {name: record["metrics"] for name, record in results["zero_shot"].items()}
  retrieval = {name: record["metrics"] for name, record in results["retrieval"].items()}
  ways = ("image_retrieval_recall@1", "text_retrieval_recall@1")
  for split in ("test_vendor", "val_vendor", "val_concepts"):
    assert zero_shot[f"emoji/{split}"]["acc1"] == 1.0
  assert [retrieval["emoji/test_vendor"][way] for way in ways] == [1.0, 1.0]
  test, drawn = zero_shot["emoji/test_vendor"], zero_shot["emoji/openmoji"]
  assert test["acc1_seen"] == test["acc1_unseen"] == test["acc5"] == 1.0
  assert (drawn["acc1"], drawn["acc1_seen"], drawn["acc1_unseen"]) == (0.8, 1.0, 0.5)
  assert retrieval["emoji/openmoji"][ways[1]] == 0.8
  assert results["retrieval"]["emoji/val_concepts"]["protocol"]["duplicate_captions"] is True
  assert "zero_shot, emoji/openmoji, acc1 | 80.00 |" in tables.table({"mine": results})
  table = emoji.table("mine", results)
  # One table of all artists who are not in training, the baseline under the run, and the mean without val_vendor.
  hog = [
    results["hog"][f"emoji/{split}"]["metrics"]["acc1_seen"] for split in ("test_vendor", "val_vendor", "openmoji")
  ]
  baseline = " | ".join(f"{100 * share:.2f}" for share in (*hog, (hog[0] + hog[2]) / 2))
  assert "|  | test_vendor | val_vendor | openmoji | mean of the test artists |" in table
  assert "| mine | 100.00 | 100.00 | 100.00 | 100.00 |" in table and f"| mine, HOG | {baseline} |" in table


def test_what_is_checked(tmp_path, monkeypatch):
  root = tmp_path / "emoji"
  write(root, tmp_path, monkeypatch)
  section, *_ = sections(tmp_path)
  name, evaluation = section.dataset, section.create()
  mend = "prepare it again with python -m replication.prepare_emoji, or give --incomplete to measure what is there"
  with pytest.raises(UserError, match=f"emoji/test_vendor has 5 images, and should have 1,364; {mend}"):
    emoji.check(name, evaluation, incomplete=False)
  emoji.check(name, evaluation, incomplete=True)
  monkeypatch.setitem(emoji.SETS, "emoji/test_vendor", 5)
  emoji.check(name, evaluation, incomplete=False)
  (tmp_path / "nothing").mkdir()
  with pytest.raises(UserError, match="no emoji in --data_root=.*nothing, neither in it nor in its folder emoji"):
    sections(tmp_path / "nothing")


def test_a_set_without_a_split(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(prepared, "SPLITS", {k: v for k, v in prepared.SPLITS.items() if k != "val_vendor"})
    write(tmp_path / "emoji", tmp_path, patch)
  with pytest.raises(UserError, match="emoji has no split val_vendor; prepare it again"):
    sections(tmp_path)


def test_an_artist_who_was_added_is_measured_too(tmp_path, monkeypatch):
  """A split that this package does not know of, as whoever has other icons may prepare it."""
  with monkeypatch.context() as patch:
    patch.setattr(prepared, "SPLITS", {**prepared.SPLITS, "another": prepared.SPLITS["test_vendor"]})
    write(tmp_path / "emoji", tmp_path, patch)
  made = [(section.dataset, section.task) for section in sections(tmp_path)]
  assert made[-3:] == [("emoji/another", task) for task in ("zero_shot", "retrieval", "hog")]
  assert emoji.held_out(dict.fromkeys(name for name, _ in made))[-1] == "emoji/another"


def test_without_openmoji(tmp_path, monkeypatch, caplog):
  write_packages(tmp_path / "icons", monkeypatch)
  (tmp_path / "icons" / prepared.ICONS["openmoji"].file).unlink()
  prepare(prepared.find_parts(tmp_path / "icons"), tmp_path / "emoji", data_set=prepared.EMOJI)
  with caplog.at_level("INFO"):
    made = sections(tmp_path)
  assert len(made) == 8 and "has no split openmoji, and so it is not measured" in caplog.text
  assert override(made, {"num_images": 2})[0].settings["num_images"] == 2
