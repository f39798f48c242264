"""Test the order of large data sets, and that few of their files are open."""

import os
import pickle
import shutil

import fsspec
import pytest

from diffdis_jax.common import buckets
from diffdis_jax.data import shards, sources
from diffdis_jax.data.loader import ROWS
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.write import prepare
from tests.data.test_loader import assert_same, make, restore, save, take
from tests.raw_pairs import write_pairs

LENGTHS = [5, 7, 6, 4, 9, 5, 8, 6, 3, 7, 5, 5]  # 70 records


@pytest.fixture
def large(monkeypatch):
  """Treat every data set as large, with windows of 20 records."""
  monkeypatch.setattr(shards, "AS_A_WHOLE", 0)
  monkeypatch.setattr(shards, "WINDOW", 20)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Prepare a data set of 40 pairs in eight shards."""
  folder = tmp_path_factory.mktemp("shards")
  for part in range(8):
    write_pairs(folder / "raw", 5, first=5 * part, tar=f"{part}.tar")
  prepare(parts.tars(folder / "raw"), folder / "out")
  return folder / "out"


def test_each_record_comes_once_in_an_epoch_and_orders_differ(large):
  order = shards.Order(LENGTHS, 3)
  epochs = [[order[i] for i in range(70 * epoch, 70 * epoch + 70)] for epoch in range(5)]
  assert all(sorted(places) == list(range(70)) for places in epochs)
  assert len({tuple(places) for places in epochs}) == 5
  assert epochs[0] != [shards.Order(LENGTHS, 4)[i] for i in range(70)]
  restored = pickle.loads(pickle.dumps(order))
  assert [restored[i] for i in range(210, 280)] == epochs[3]


def test_few_shards_are_in_use_at_a_time(large):
  order = shards.Order([10] * 100, 0)
  for group in range(50):  # of two shards
    places = [order[i] for i in range(20 * group, 20 * group + 20)]
    assert len({place // 10 for place in places}) == 2 and len({place // 10 for place in places[:10]}) == 2


def test_the_next_group_is_asked_for_when_one_begins(large):
  asked = []
  order = shards.Order([10] * 8, 0, prefetch=lambda group: asked.append({*map(int, group)}))
  taken = [order[i] for i in range(240)]  # three epochs
  groups = [{place // 10 for place in taken[start : start + 20]} for start in range(0, 240, 20)]
  assert groups[1:] == asked[:-1]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_hosts_and_after_a_resume(large, prepared, tmp_path, hosts):
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  settings = dict(batch_size=8, image_size=8)
  expected = take(make(source, **settings), 8)
  assert len({row for batch in expected[:5] for row in batch[ROWS]}) == 40
  for host in range(hosts):
    rows = range(8 // hosts * host, 8 // hosts * (host + 1))
    own = [{key: value[rows] for key, value in batch.items()} for batch in expected]
    iterator = make(source, rows=rows, num_threads=2, **settings)
    assert_same(take(iterator, 3), own[:3])
    save(tmp_path / f"{host}", iterator)
    assert_same(take(restore(tmp_path / f"{host}", make(source, rows=rows, **settings)), 5), own[3:])


def test_few_shards_are_open(large, prepared, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "WINDOW", 5)
  folder = shutil.copytree(prepared, tmp_path / "own")  # no other test reads this copy
  iterator = make(sources.open_source(name="pairs", path=folder, image_size=8), batch_size=4, image_size=8)
  most = 0
  for _ in range(30):
    next(iterator)
    with os.scandir("/proc/self/fd") as opened:
      most = max(most, sum(str(folder) in os.path.realpath(file.path) for file in opened))
  assert 0 < most <= 3


def test_a_buckets_shards_are_fetched_and_dropped_one_by_one(large, prepared, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(buckets, "checked", lambda: fsspec.filesystem("file"))  # a folder stands in for a bucket
  monkeypatch.setattr(shards, "WINDOW", 5)
  source = sources.open_source(name="pairs", path=prepared, image_size=8)
  names = [path.name for path in sorted(prepared.glob("*.array_record*"))]
  local = shards.Reader([str(prepared / name) for name in names], source.lengths)
  fetched = shards.Reader(names, source.lengths, shards.Copies(str(prepared)))
  for place in [*range(40), *range(0, 40, 7)]:
    assert fetched[place] == local[place]
    assert len([*tmp_path.rglob("*.array_record*-of-00008")]) <= 3
  fetched.prefetch([7])
  fetched[0]
