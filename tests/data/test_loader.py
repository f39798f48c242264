import collections
import io

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from diffdis_jax.data import sources
from diffdis_jax.data.loader import eval_batches, train_loader
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.structs import UserError

TOKENIZER = Tokenizer(16)
STRONG = Augmentation(crop="random", shift=0.1, hue=0.1)


class Numbered:
  """40 records; the caption and the image's value tell the index."""

  def __len__(self):
    return 40

  def __getitem__(self, index):
    return {"image": np.full((8, 8, 3), index, np.uint8), "caption": f"{index}", "index": index}


def make(source=None, **kwargs):
  source = source or sources.make(name="shapes", image_size=16, num_images=40)
  settings = {"tokenizer": TOKENIZER, "batch_size": 12, "image_size": 16, "seed": 5, "num_threads": 0, **kwargs}
  return train_loader(source, **settings)


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys() == {"image", "tokens"}
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_batches():
  batch = next(make())
  assert batch["image"].shape == (12, 16, 16, 3) and batch["image"].dtype == np.uint8
  assert batch["tokens"].shape == (12, 16) and batch["tokens"].dtype == np.int32


def test_image_and_caption_stay_together():
  batch = next(make(Numbered(), image_size=8))
  expected = TOKENIZER([str(value) for value in batch["image"][:, 0, 0, 0]])
  np.testing.assert_array_equal(batch["tokens"], expected)


def test_every_epoch_has_each_record_once_in_a_new_order():
  batches = take(make(Numbered(), image_size=8), 10)  # 120 records, three epochs, borders within batches
  order = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).reshape(3, 40)
  for epoch in order:
    assert sorted(epoch) == list(range(40))
  assert len({tuple(epoch) for epoch in order.tolist()}) == 3


def test_augmentation_differs_between_epochs():
  source = sources.make(name="shapes", image_size=16, num_images=4)
  images = np.concatenate([batch["image"] for batch in take(make(source, batch_size=4, augmentation=STRONG), 6)])
  assert len({image.tobytes() for image in images}) == 24


@pytest.mark.parametrize("threads", [0, 3])
def test_same_seed_same_batches(threads):
  reference = take(make(augmentation=STRONG), 8)
  assert_same(reference, take(make(augmentation=STRONG, num_threads=threads, prefetch=2), 8))
  other = take(make(augmentation=STRONG, seed=6), 8)
  assert any((a["image"] != b["image"]).any() for a, b in zip(reference, other, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(hosts):
  reference = take(make(augmentation=STRONG), 8)
  parts = [take(make(augmentation=STRONG, shard_index=i, shard_count=hosts), 8) for i in range(hosts)]
  interleaved = [{k: np.stack([p[k] for p in step], 1).reshape(12, *step[0][k].shape[1:]) for k in step[0]}
                 for step in zip(*parts, strict=True)]  # fmt: skip
  assert_same(reference, interleaved)


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


def test_position_moves_to_another_number_of_hosts(tmp_path):
  expected = take(make(), 5)[3:]
  iterator = make()
  take(iterator, 3)
  save(tmp_path, iterator)
  for i in range(2):
    half = take(restore(tmp_path, make(shard_index=i, shard_count=2)), 2)
    assert_same([{k: v[i::2] for k, v in batch.items()} for batch in expected], half)


def test_batch_that_hosts_do_not_divide():
  with pytest.raises(UserError, match="batch_size 12 does not divide by 5 hosts"):
    make(shard_count=5)


def test_eval_batches_in_order():
  batches = list(eval_batches(Numbered(), image_size=4, batch_size=16))
  assert [batch.image.shape for batch in batches] == [(16, 4, 4, 3), (16, 4, 4, 3), (8, 4, 4, 3)]
  indices = [record["index"] for batch in batches for record in batch.records]
  assert indices == list(range(40)) == [int(v) for batch in batches for v in batch.image[:, 0, 0, 0]]
  assert all(record.keys() == {"caption", "index"} for batch in batches for record in batch.records)


def test_encoded_images_of_any_size():
  class Encoded(Numbered):
    def __getitem__(self, index):
      file = io.BytesIO()
      Image.new("RGB", (10 + index, 30), (index, 0, 0)).save(file, "PNG")
      return {"image": file.getvalue(), "caption": f"{index}"}

  batch = next(make(Encoded(), augmentation=STRONG))
  assert batch["image"].shape == (12, 16, 16, 3)
  (first, *_) = eval_batches(Encoded(), image_size=8, batch_size=40)
  assert collections.Counter(first.image[:, 4, 4, 0].tolist()) == collections.Counter(range(40))
