import collections

import numpy as np
import pytest

from diffdis_jax.data import shapes


def make(split="all", **kwargs):
  return shapes.Shapes(split=split, image_size=32, **kwargs)


def scene(**changes):
  known = {"colour": "red", "shape": "star", "background": "black", "x": 0.0, "y": 0.0, "radius": 0.3, "rotation": 0.0}
  return shapes.Scene(**{**known, **changes})


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


def test_areas_equal_geometry():
  """Covered area of each shape against its formula, in units of the radius squared."""
  star = 10 * 0.5 * 0.42 * np.sin(np.pi / 5)
  d, r = 0.45, 0.8  # two circles' lens: the crescent is the unit disc without it
  lens = (
    r**2 * np.arccos((d**2 + r**2 - 1) / (2 * d * r))
    + np.arccos((d**2 + 1 - r**2) / (2 * d))
    - 0.5 * np.sqrt((-d + r + 1) * (d + r - 1) * (d - r + 1) * (d + r + 1))
  )
  expected = {
    "circle": np.pi,
    "square": 2.0,
    "triangle": 3 * np.sqrt(3) / 4,
    "star": star,
    "cross": 0.6 * 1.9 * 2 - 0.36,
    "ring": np.pi * (1 - 0.58**2),
    "heart": 180 * np.pi / 18.3**2,
    "crescent": np.pi - lens,
  }
  for shape, area in expected.items():
    image = shapes.render(scene(shape=shape, rotation=17.0, radius=0.4), image_size=256, rng=np.random.default_rng(1))
    red = image[..., 0].astype(float)
    covered = ((red - red.min()) / (red.max() - red.min())).sum() / (0.4 * 256) ** 2
    assert covered == pytest.approx(area, rel=0.03), shape


def test_outlines_lie_in_the_unit_circle():
  for shape, (outline, *_) in shapes.OUTLINES.items():
    assert 0.95 < max(np.hypot(x, y) for x, y in outline) < 1 + 1e-9, shape


def test_no_two_shapes_coincide_under_rotation():
  """Overlap (intersection over union) of two different shapes, each at any allowed turn, stays below 0.9."""
  turns = np.linspace(-shapes.MAX_ROTATION, shapes.MAX_ROTATION, 7)
  masks = {}
  for shape in shapes.SHAPES:
    drawn = [shapes.render(scene(shape=shape, rotation=t), image_size=32, rng=np.random.default_rng(0)) for t in turns]
    masks[shape] = np.stack([image[..., 0] > 110 for image in drawn])
  for i, a in enumerate(shapes.SHAPES):
    for b in shapes.SHAPES[i + 1 :]:
      both = (masks[a][:, None] & masks[b][None]).sum((-1, -2))
      either = (masks[a][:, None] | masks[b][None]).sum((-1, -2))
      assert (both / either).max() < 0.9, (a, b)


def test_colours_and_backgrounds_differ():
  values = np.array([*shapes.COLOURS.values(), *shapes.BACKGROUNDS.values()])
  distance = np.abs(values[:8, None] - values[None]).max(-1)
  distance[np.arange(8), np.arange(8)] = 255
  assert distance.min() > 3 * shapes.COLOUR_JITTER > 3 * shapes.BACKGROUND_JITTER


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


def test_templates_are_in_the_training_distribution():
  source = make("train", num_images=2000)
  captions = {source[i]["caption"] for i in range(len(source))}
  for template in shapes.TEMPLATES:
    assert any(template.format(name) in captions for name in shapes.CLASSNAMES)


def test_plain_captions_are_one_a_class():
  records = [make("train", num_images=200)[i] for i in range(200)]
  assert all(record["plain_caption"] == f"a {record['label']}" for record in records)
  assert any(record["caption"] not in [t.format(record["label"]) for t in shapes.TEMPLATES] for record in records)
