import collections
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags

from diffdis_jax.common import storage
from diffdis_jax.config.data import Loading
from diffdis_jax.data import records, sources
from diffdis_jax.data.loader import ROWS, SUBSTITUTED, Substitutions, train_loader
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.errors import UserError
from tests.command_runs import ROOT
from tests.interrupting import is_alive
from tests.raw_pairs import faults, write_pairs

TOKENIZER = Tokenizer(16)
FAULTS = faults()
STRONG = Augmentation(crop="random_resized", shift=0.1, hue=0.1)


class Numbered:
  """A source of 40 records. The caption and the pixels of a record hold its index."""

  def __len__(self):
    return 40

  def __getitem__(self, index):
    return {"image": np.full((8, 8, 3), index, np.uint8), "caption": f"{index}", "index": index}


def make(source=None, *, num_threads=0, num_workers=0, prefetch=8, **settings):
  source = source or sources.open_source(name="shapes", image_size=16, num_images=40)
  loading = Loading(num_threads=num_threads, num_workers=num_workers, prefetch=prefetch)
  settings = {"tokenizer": TOKENIZER, "batch_size": 12, "image_size": 16, "seed": 5, **settings}
  return train_loader(source, loading=loading, **settings)


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys() == {"image", "tokens", SUBSTITUTED, ROWS}
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_image_and_caption_stay_together():
  batch = next(make(Numbered(), image_size=8))
  assert batch["image"].shape == (12, 8, 8, 3) and batch["image"].dtype == np.uint8
  expected = TOKENIZER([str(value) for value in batch["image"][:, 0, 0, 0]])
  np.testing.assert_array_equal(batch["tokens"], expected)


def test_every_epoch_has_each_record_once_in_a_new_order():
  batches = take(make(Numbered(), image_size=8), 10)  # 120 records, three epochs, borders within batches
  order = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).reshape(3, 40)
  for epoch in order:
    assert sorted(epoch) == list(range(40))
  assert len({tuple(epoch) for epoch in order.tolist()}) == 3


@pytest.mark.parametrize("threads", [0, 3])
def test_same_seed_same_batches(threads):
  reference = take(make(augmentation=STRONG), 8)
  assert_same(reference, take(make(augmentation=STRONG, num_threads=threads, prefetch=2), 8))
  other = take(make(augmentation=STRONG, seed=6), 8)
  assert any((a["image"] != b["image"]).any() for a, b in zip(reference, other, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
  reference = take(make(augmentation=STRONG), 8)
  parts = [take(make(augmentation=STRONG, rows=range(i, 12, hosts)), 8) for i in range(hosts)]
  interleaved = [{k: np.stack([p[k] for p in step], 1).reshape(12, *step[0][k].shape[1:]) for k in step[0]}
                 for step in zip(*parts, strict=True)]  # fmt: skip
  assert_same(reference, interleaved)


class Slow(Numbered):
  """A source whose reads return only once `wanted` reads have run at the same time."""

  def __init__(self, wanted, patience=20.0):
    self.wanted, self.patience = wanted, patience
    self.now = self.most = 0
    self.changed = threading.Condition()

  def __getitem__(self, index):
    with self.changed:
      self.now += 1
      self.most = max(self.most, self.now)
      self.changed.notify_all()
      assert self.changed.wait_for(lambda: self.most >= self.wanted, self.patience)
      self.now -= 1
    return super().__getitem__(index)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_all_threads_read_at_the_same_time(threads):
  source = Slow(threads)
  iterator = make(source, image_size=8, num_threads=threads, prefetch=1, augmentation=STRONG)
  batches = take(iterator, 3)
  assert source.most == threads
  iterator.close()
  assert_same(batches, take(make(Slow(1), image_size=8, augmentation=STRONG), 3))


def save(folder, iterator):
  with ocp.CheckpointManager(folder) as manager:
    manager.save(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))


def restore(folder, iterator):
  with ocp.CheckpointManager(folder) as manager:
    manager.restore(0, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator)))
  return iterator


@pytest.mark.parametrize("steps", [0, 2, 3, 7])  # an epoch ends within batch 3, another within batch 6
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])
def test_saved_position_resumes_to_the_same_numbers(tmp_path, steps, before, after):
  expected = take(make(augmentation=STRONG), steps + 4)[steps:]
  iterator = make(augmentation=STRONG, num_threads=before)
  take(iterator, steps)
  save(tmp_path, iterator)
  assert_same(expected, take(restore(tmp_path, make(augmentation=STRONG, num_threads=after)), 4))
  assert_same(expected, take(iterator, 4))


class Spoiled(Numbered):
  """A source with three unusable records, two of them adjacent."""

  def __getitem__(self, index):
    if index in (7, 8, 20):
      return {**super().__getitem__(index), "image": FAULTS["truncated" if index == 8 else "zero bytes"][0]}
    return super().__getitem__(index)


def test_the_next_usable_record_replaces_an_unusable_one():
  batches = take(make(Spoiled(), image_size=8), 10)
  whole = take(make(Numbered(), image_size=8), 10)
  for batch, reference in zip(batches, whole, strict=True):
    indices, originals = batch["image"][:, 0, 0, 0], reference["image"][:, 0, 0, 0]
    replaced = {7: 9, 8: 9, 20: 21}
    assert indices.tolist() == [replaced.get(index, index) for index in originals.tolist()]
    np.testing.assert_array_equal(batch["tokens"], TOKENIZER([str(value) for value in indices]))
  substitutions = Substitutions()
  for batch in batches:
    assert substitutions.take(batch).keys() == {"image", "tokens"}
    assert substitutions.rows.tolist() == [str(value) for value in batch["image"][:, 0, 0, 0]]
  assert substitutions.report() == {SUBSTITUTED: 3 * (1 + 2 + 1)}
  assert substitutions.report() == {SUBSTITUTED: 0}
  reasons = dict(zip(records.REASONS, sum(batch[SUBSTITUTED] for batch in batches).sum(0), strict=True))
  assert {reason: n for reason, n in reasons.items() if n} == {"missing image": 6, "corrupt image": 6}


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (b"", "^40 records in a row cannot be used: 40 missing image; prepare"),
    (np.zeros((16, 16)), "^a record's image is of type ndarray; a source gives the bytes of an image's file"),
  ],
)
def test_a_source_without_a_usable_record(image, message):
  class Unusable(Numbered):
    def __getitem__(self, index):
      return {"image": image, "caption": "x"}

  with pytest.raises(UserError, match=message):
    next(make(Unusable()))


@pytest.fixture
def prepared(tmp_path):
  """Prepare a data set of 40 pairs in two files."""
  for part in range(2):
    write_pairs(tmp_path / "raw", 20, first=20 * part, tar=f"{part}.tar")
  prepare(parts.tars(tmp_path / "raw"), tmp_path / "out")
  return tmp_path / "out"


@pytest.mark.parametrize("settings", [{"num_threads": 0}, {"num_threads": 2}, {"num_workers": 1}], ids=str)
def test_a_record_file_that_is_gone_for_a_while_changes_no_bit(prepared, monkeypatch, caplog, settings):
  monkeypatch.setattr(storage, "PAUSE", 0.2)
  flags.FLAGS.mark_as_parsed()
  expected = take(make(sources.open_source(name="pairs", path=prepared, image_size=8)), 8)
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  file = prepared / "pairs-train.array_record-00001-of-00002"
  away = file.rename(prepared / "away")
  timer = threading.Timer(1.0, away.rename, [file])
  timer.start()
  iterator = make(source, **settings)
  assert_same(take(iterator, 8), expected)
  timer.join()
  if "num_workers" not in settings:  # workers write their own log
    assert f"cannot read the data: {file} is not there; trying again in 0.2 s" in caplog.text
  iterator.close()


def test_a_damaged_record_file_loses_only_its_own_records(prepared):
  file = prepared / "pairs-train.array_record-00001-of-00002"
  spoiled = bytearray(file.read_bytes())
  place = spoiled.index(b"IHDR")
  spoiled[place : place + 20] = bytes(20)
  file.write_bytes(spoiled)
  batches = take(make(sources.open_source(name="pairs", path=prepared, image_size=8), image_size=8), 10)
  assert 0 < sum(batch[SUBSTITUTED].sum() for batch in batches) < 60
  file.unlink()
  with pytest.raises(UserError, match=f"{file.name} is missing; put it back"):
    sources.open_source(name="pairs", path=prepared, image_size=8)


@pytest.mark.slow
def test_saved_position_resumes_with_workers(tmp_path, prepared):
  """An epoch ends within batch 3."""
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  expected = take(make(source, augmentation=STRONG), 6)
  flags.FLAGS.unparse_flags()  # as in a notebook, where absl's flags are not parsed
  iterator = make(source, augmentation=STRONG, num_workers=2)
  assert_same(expected[:3], take(iterator, 3))
  save(tmp_path / "saved", iterator)
  iterator.close()
  restored = restore(tmp_path / "saved", make(source, augmentation=STRONG, num_workers=2))
  assert_same(expected[3:], take(restored, 3))
  restored.close()


class Shifted(Numbered):
  def __getitem__(self, index):
    return {"image": np.full((8, 8, 3), 100 + index, np.uint8), "caption": "y"}


MIXTURE = sources.Mixture((Numbered(), Shifted()), (3.0, 1.0))


def test_a_mixture_takes_shares_by_weight_and_each_record_once_an_epoch():
  order = np.concatenate([b["image"][:, 0, 0, 0] for b in take(make(MIXTURE, image_size=8, batch_size=16), 20)])
  first, second = order[order < 100], order[order >= 100]
  assert (len(first), len(second)) == (240, 80)
  for values, epochs in ((first, 6), (second - 100, 2)):
    assert all(sorted(epoch) == list(range(40)) for epoch in values.reshape(epochs, 40))


def test_a_mixtures_sources_have_orders_of_their_own():
  """With one shared order, equal indices of two sources of equal length would always come together."""
  equal = sources.Mixture((Numbered(), Shifted()), (1.0, 1.0))
  order = np.concatenate([b["image"][:, 0, 0, 0] for b in take(make(equal, image_size=8, batch_size=16), 5)])
  first, second = order[order < 100], order[order >= 100] - 100
  assert sorted(first) == sorted(second) == list(range(40))
  assert (first == second).mean() < 0.5


@pytest.mark.parametrize("source", [MIXTURE, Spoiled()], ids=["mixture", "spoiled"])
def test_mixtures_and_substitutes_resume_and_do_not_depend_on_the_number_of_hosts(tmp_path, source):
  reference = take(make(source, augmentation=STRONG), 6)
  iterator = make(source, augmentation=STRONG)
  take(iterator, 4)
  save(tmp_path, iterator)
  for hosts in (1, 2, 4):
    shares = [
      take(restore(tmp_path, make(source, augmentation=STRONG, rows=range(i, 12, hosts))), 2) for i in range(hosts)
    ]
    for i, share in enumerate(shares):
      assert_same([{k: v[i::hosts] for k, v in batch.items()} for batch in reference[4:]], share)


def test_one_caption_of_several_is_drawn_each_time():
  class Several(Numbered):
    def __getitem__(self, index):
      return {**super().__getitem__(index), "captions": ["one", "two", "three"]}

  tokens = np.concatenate([batch["tokens"] for batch in take(make(Several()), 10)])
  drawn = collections.Counter(TOKENIZER.decode(row) for row in tokens)
  assert drawn.keys() == {"one", "two", "three"} and min(drawn.values()) > 20


def test_discrimination_can_have_its_own_view():
  own = Augmentation(crop="random_resized", crop_scale=(0.1, 0.3))
  shared, two = next(make()), next(make(discrimination_augmentation=own))
  np.testing.assert_array_equal(shared["image"], two["image"])
  assert two["discrimination_image"].shape == shared["image"].shape
  assert (two["discrimination_image"] != two["image"]).any()


KILLED = """
import sys, time
from diffdis_jax.config.data import Loading
from diffdis_jax.data import loader, sources
from diffdis_jax.data.tokenizer import Tokenizer
source = sources.open_source(name="shapes", image_size=16, num_images=40)
how = dict(batch_size=4, image_size=16, seed=0, loading=Loading(num_threads=0, num_workers=1))
iterator = loader.train_loader(source, tokenizer=Tokenizer(16), **how)
next(iterator)
sys.stdout.write("read\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed():
  """A worker that outlives its run waits for ever with a full queue, and the next start adds its own workers."""
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  with subprocess.Popen([sys.executable, "-c", KILLED], env=env, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "read\n"
    lists = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")  # the processes that each thread started
    children = [child for file in lists for child in file.read_text().split()]
    process.kill()
  deadline = time.monotonic() + 30
  while (alive := [child for child in children if is_alive(child)]) and time.monotonic() < deadline:
    time.sleep(0.05)
  for child in alive:
    os.kill(int(child), signal.SIGKILL)
  assert len(children) > 1 and not alive  # a worker, and multiprocessing's own process
