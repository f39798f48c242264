import collections

import numpy as np
import pytest

from diffdis_jax.data import shapes


def make(split="all", **kwargs):
  return shapes.Shapes(split=split, image_size=32, **kwargs)


def test_held_out_pairs_take_each_colour_and_shape_once():
  assert len(shapes.UNSEEN) == 8 and len(shapes.SEEN) == 56 and len(set(shapes.CLASSNAMES)) == 64
  assert {colour for colour, _ in shapes.UNSEEN} == set(shapes.COLOURS)
  assert {shape for _, shape in shapes.UNSEEN} == set(shapes.SHAPES)
  for colour, shape in shapes.UNSEEN:
    assert f"{colour} {shape}" in " ".join(shapes.__doc__.split())


@pytest.mark.parametrize(("split", "classes"), [("train", 56), ("test", 56), ("unseen", 8), ("all", 64)])
def test_splits_are_balanced_and_keep_the_held_out_pairs_apart(split, classes):
  source = make(split, num_images=3 * classes)
  counts = collections.Counter(
    (r["colour"], r["shape"], r["seen"]) for r in map(source.__getitem__, range(len(source)))
  )
  assert len(counts) == classes and set(counts.values()) == {3}
  for colour, shape, seen in counts:
    assert seen == ((colour, shape) not in shapes.UNSEEN)
    assert split == "all" or seen == (split != "unseen")


def test_a_record_depends_on_seed_split_and_index_alone():
  first = make("train")[500]
  second = make("train", num_images=501)[500]
  np.testing.assert_array_equal(first.pop("image"), second.pop("image"))
  assert first == second
  images = [make("train")[500], make("train")[556], make("test")[500], make("train", seed=1)[500]]
  assert {image["label"] for image in images} == {first["label"]}
  assert len({image["image"].tobytes() for image in images}) == 4
  with pytest.raises(IndexError):
    make("train", num_images=5)[5]


@pytest.mark.parametrize("image_size", [32, 64, 100])
def test_every_image_shows_its_colour_at_its_place(image_size):
  rng = np.random.default_rng(0)
  for colour, shape in shapes.PAIRS:
    drawn = shapes.make_scene(rng, colour=colour, shape=shape)
    image = shapes.render(drawn, image_size=image_size, rng=rng).astype(int)
    assert image.shape == (image_size, image_size, 3)
    near = np.abs(image - shapes.COLOURS[colour]).max(-1) <= shapes.COLOUR_JITTER + 1
    assert near.sum() > 0.1 * (drawn.radius * image_size) ** 2
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert np.abs(edge - shapes.BACKGROUNDS[drawn.background]).max() <= shapes.BACKGROUND_JITTER + 1
    rows, columns = np.nonzero(near)
    middle = np.array([columns.mean(), rows.mean()]) / image_size - 0.5
    assert np.abs(middle - [drawn.x, drawn.y]).max() < 0.75 * drawn.radius


def test_captions_are_true():
  source, seen = make(num_images=1500), collections.Counter()
  for index in range(len(source)):
    record = source[index]
    rng = np.random.default_rng((0, tuple(shapes.SPLITS).index("all"), index))
    drawn = shapes.make_scene(rng, colour=record["colour"], shape=record["shape"])
    text = record["caption"]
    assert record["label"] in text
    truths = {
      "small": drawn.radius < 0.36,
      "large": drawn.radius > 0.42,
      "on the left": drawn.x < -0.05,
      "on the right": drawn.x > 0.05,
      "at the top": drawn.y < -0.05,
      "at the bottom": drawn.y > 0.05,
      "in the middle": max(abs(drawn.x), abs(drawn.y)) < 0.05 / 3,
      "on a light background": drawn.background in ("white", "beige", "light grey"),
      "on a dark background": drawn.background in ("black", "navy", "dark grey"),
      **{f"on a {name} background": drawn.background == name for name in shapes.BACKGROUNDS},
    }
    for words, true in truths.items():
      assert true or words not in text, (text, drawn)
      seen[words] += words in text
  assert len(seen) == 15 and min(seen.values()) > 0
