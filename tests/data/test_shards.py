"""Test the order of large data sets, and that few of their files are open."""

import collections
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest

from diffdis_jax.common import buckets
from diffdis_jax.data import copies, shards, sources
from diffdis_jax.data.loader import ROWS
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from tests.data.test_loader import assert_same, make, restore, save, take
from tests.raw_pairs import write_pairs

LENGTHS = [5, 7, 6, 4, 9, 5, 8, 6, 3, 7, 5, 5]  # 70 records


@pytest.fixture
def large(monkeypatch):
  """Treat every data set as large, with windows of 80 records and 4 lanes."""
  monkeypatch.setattr(shards, "AS_A_WHOLE", 0)
  monkeypatch.setattr(shards, "WINDOW", 80)
  monkeypatch.setattr(shards, "LANES", 4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Prepare a data set of 40 pairs in eight shards."""
  folder = tmp_path_factory.mktemp("shards")
  for part in range(8):
    write_pairs(folder / "raw", 5, first=5 * part, tar=f"{part}.tar")
  prepare(parts.tars(folder / "raw"), folder / "out")
  return folder / "out"


def shards_of(places):
  return np.searchsorted(np.cumsum(LENGTHS), places, side="right")


@pytest.mark.parametrize("batch_size", [8, 12, 7])
def test_each_record_comes_once_in_an_epoch_and_orders_differ(large, batch_size):
  order = shards.Order(LENGTHS, batch_size, 3)
  places = [order[i] for i in range(5 * 70)]
  counts = collections.Counter(places)
  assert set(counts) == set(range(70))
  # One lane is at most a shard and a batch ahead of another.
  assert max(counts.values()) - min(counts.values()) <= 2
  assert places[:70] != [shards.Order(LENGTHS, batch_size, 4)[i] for i in range(70)]
  restored = pickle.loads(pickle.dumps(order))
  assert [restored[i] for i in range(200, 250)] == places[200:250]


def test_one_lane_takes_each_record_of_an_epoch_before_the_next(large):
  order = shards.Order(LENGTHS, 1, 0)
  for epoch in range(3):
    assert sorted(order[i] for i in range(70 * epoch, 70 * epoch + 70)) == list(range(70))


def test_a_batch_and_a_host_use_few_shards(large):
  order = shards.Order([10] * 100, 8, 0)  # two shards a group
  for batch in range(0, 100, 7):
    shard = [order[8 * batch + row] // 10 for row in range(8)]
    assert all(len(set(shard[row : row + 2])) <= 2 for row in range(0, 8, 2))
  # Rows 0 and 1 are one lane, which in an epoch has a quarter of the shards.
  own = {order[8 * batch + row] // 10 for batch in range(125) for row in (0, 1)}
  assert len(own) == 25
  # A group's records are shuffled.
  first = [order[8 * batch + row] for batch in range(10) for row in (0, 1)]
  assert len({place // 10 for place in first}) == 2 and len({place // 10 for place in first[:10]}) == 2


def test_the_next_group_is_asked_for_when_one_begins(large):
  asked = []
  order = shards.Order([10] * 8, 4, 0, prefetch=lambda group: asked.append([*map(int, group)]))
  taken = [order[4 * step] for step in range(60)]  # the first lane, three epochs of two shards
  groups = [taken[start : start + 20] for start in range(0, 60, 20)]
  assert [{place // 10 for place in group} for group in groups][1:] == [set(group) for group in asked[:2]]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_hosts_and_after_a_resume(large, prepared, tmp_path, hosts):
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  settings = dict(batch_size=8, image_size=8)
  expected = take(make(source, **settings), 8)
  assert len({row for batch in expected[:5] for row in batch[ROWS]}) >= 36
  for host in range(hosts):
    rows = range(8 // hosts * host, 8 // hosts * (host + 1))
    own = [{key: value[rows] for key, value in batch.items()} for batch in expected]
    iterator = make(source, rows=rows, num_threads=2, **settings)
    assert_same(take(iterator, 3), own[:3])
    save(tmp_path / f"{host}", iterator)
    assert_same(take(restore(tmp_path / f"{host}", make(source, rows=rows, **settings)), 5), own[3:])


def test_few_shards_are_open(large, prepared, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "LANES", 1)
  monkeypatch.setattr(shards, "WINDOW", 5)
  folder = shutil.copytree(prepared, tmp_path / "own")  # no other test reads this copy
  iterator = make(sources.open_source(name="pairs", path=folder, image_size=8), batch_size=4, image_size=8)
  most = 0
  for _ in range(30):
    next(iterator)
    with os.scandir("/proc/self/fd") as opened:
      most = max(most, sum(str(folder) in os.path.realpath(file.path) for file in opened))
  assert 0 < most <= 2


def test_a_buckets_shards_are_fetched_and_dropped_one_by_one(large, prepared, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(buckets, "checked", lambda: fsspec.filesystem("file"))  # a folder stands in for a bucket
  monkeypatch.setattr(shards, "LANES", 1)
  monkeypatch.setattr(shards, "WINDOW", 5)
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  names = [path.name for path in sorted(prepared.glob("*.array_record*"))]
  local = shards.Reader([str(prepared / name) for name in names], source.lengths)
  fetched = shards.Reader(names, source.lengths, copies.ShardCopies(str(prepared), names))
  for place in [*range(40), *range(0, 40, 7)]:
    assert fetched[place] == local[place]
    assert len([*tmp_path.rglob("*.array_record*-of-00008")]) <= 2
  fetched.prefetch([7])
  fetched[0]
