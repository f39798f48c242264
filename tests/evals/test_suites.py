"""The paper's suites over tiny copies of all the sets, with a model that sees a colour and knows its name."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data import sources
from diffdis_jax.data.layouts import class_lists, labelled
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, results, suites, tables, tasks
from tests.benchmark_sets import captioned_wds, labelled_wds, write_wds
from tests.raw_pairs import encode

SIZE = 8


def coloured(number):
  """A picture of one colour that says a number."""
  return np.full((SIZE, SIZE, 3), (number % 256, number // 256, 0), np.uint8)


def write_coloured(root, name):
  """A set whose pictures say their class, one of each, in tars, in the order of a permutation."""
  known = class_lists.load()[name]
  labels = np.random.default_rng(1).permutation(len(known.classnames)).tolist()
  samples = [{"png": encode(Image.fromarray(coloured(label))), "cls": str(label).encode()} for label in labels]
  templates = [template.replace("{}", "{c}") for template in known.templates]
  write_wds(root / f"wds_{name}", samples, per_tar=500, classnames=known.classnames, templates=templates)


class Inference:
  """Embeds a text by the class name that it holds, and a picture by the name of the class that its colour says."""

  image_size, max_length, protocol = SIZE, 77, {"steps": 1}

  def __init__(self, name):
    known = class_lists.load()[name]
    vectors = np.random.default_rng(0).normal(size=(len(known.classnames), 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    by_name = dict(zip(known.classnames, vectors))
    self._pictures = np.stack([by_name[name] for name in known.classnames])
    templates = (*known.templates, "a photo of a {}.")
    self._texts = {template.replace("{}", name): vector for name, vector in by_name.items() for template in templates}

  def embed_texts(self, params, texts):
    return np.stack([self._texts[text] for text in texts])

  def embed_images(self, params, images, *, seed):
    shown = images[np.arange(len(images))].astype(int)
    return self._pictures[shown[:, 0, 0, 0] + 256 * shown[:, 0, 0, 1]]


@pytest.fixture(autouse=True)
def as_texts(monkeypatch):
  """The model gets the texts themselves."""
  monkeypatch.setattr(base, "Tokenizer", lambda length: list)


def sections(root, suite="zero_shot12", **settings):
  made = suites.sections(suite, str(root), objectives=("discrimination",), image_size=SIZE)
  return {section.dataset: tasks.create(section.task, **section.settings, **settings) for section in made}


def record(name, evaluation, metrics, inference):
  protocol = {**evaluation.protocol(inference), "checkpoint": 1}
  return results.make_record(
    dataset=name, model="m", pretrained="run", task=evaluation.task, metrics=metrics, protocol=protocol, provenance={}
  )


SMALL = [name for name in suites.ZERO_SHOT12 if name != "imagenet1k"]


def test_the_table_is_the_twelve_of_the_class_lists():
  assert [*suites.ZERO_SHOT12] == [*class_lists.load()] and len(suites.ZERO_SHOT12) == 12
  per_class = {name for name, each in suites.ZERO_SHOT12.items() if each.metric == "mean_per_class_recall"}
  assert per_class == {"caltech101", "flowers", "fgvc_aircraft", "pets"}


def test_every_figure_is_right_and_at_chance_when_images_are_shuffled(tmp_path):
  """The model knows texts and pictures by their contents alone, so that labels in a wrong order would show."""
  for name in SMALL:
    write_coloured(tmp_path, name)
  honest, shuffled = sections(tmp_path), sections(tmp_path, shuffle_labels=True)
  assert [*honest] == SMALL
  for name in SMALL:
    inference, count = Inference(name), len(honest[name].labels)
    metrics = honest[name].run(inference, {})
    assert {metrics[key] for key in metrics if not key.startswith("lowest")} == {1.0}
    leaked, chance = shuffled[name].run(inference, {}), 1 / count
    bound = 3 * (chance * (1 - chance) / count) ** 0.5
    for key in ("acc1", "acc1_single_template", "mean_per_class_recall"):
      assert abs(leaked[key] - chance) <= bound, (name, key)
    protocol = json.loads(json.dumps(honest[name].protocol(inference)))
    known = class_lists.load()[name]
    assert protocol["templates"] == [*known.templates] and protocol["single_template"] == "a photo of a {}."
    assert protocol["data"] == {"layout": "wds", "split": "test"} and protocol["ties"] == "count as wrong"


def source_of(count, *, name="cifar10"):
  """As a reader gives it, without files."""
  known = class_lists.load()[name]
  labels = np.array([i % len(known.classnames) for i in range(count)])
  picture = encode(Image.fromarray(coloured(0)))
  origin = labelled.Origin("wds", "/data/x", "test")
  return labelled.Labelled([picture] * count, labels, known.classnames, origin)


def made(monkeypatch, source, name="cifar10"):
  monkeypatch.setattr(sources, "open_source", lambda **data: source)
  return suites._section(name, "/data", SIZE).create()


def test_what_is_checked_before_measuring(monkeypatch):
  monkeypatch.setitem(suites.SETS, "cifar10", dataclasses.replace(suites.SETS["cifar10"], sizes=(1_040,)))
  check = lambda source, name="cifar10", incomplete=False: suites.check(
    name, made(monkeypatch, source, name), incomplete=incomplete
  )
  check(source_of(1_040))
  message = "cifar10 in /data/x has 1,039 images, and should have 1,040; download it again, or give --incomplete"
  with pytest.raises(UserError, match=message):
    check(source_of(1_039))
  check(source_of(30), incomplete=True)


@pytest.mark.parametrize("count", [6_084, 6_085])
def test_both_test_splits_of_caltech_are_whole(monkeypatch, count):
  suites.check("caltech101", made(monkeypatch, source_of(count, name="caltech101"), "caltech101"), incomplete=False)
  assert suites.is_whole("caltech101", {"protocol": {"num_images": count}})


def test_as_many_images_of_another_split_are_not_karpathys(monkeypatch):
  """val2017 of MSCOCO has 5,000 images, as Karpathy's test split of val2014 has."""
  monkeypatch.setitem(suites.SETS, "mscoco_captions", dataclasses.replace(suites.SETS["mscoco_captions"], sizes=(2,)))

  def check(split, *, incomplete=False):
    images = [encode(Image.fromarray(coloured(i))) for i in range(2)]
    origin = labelled.Origin("prepared", "/data/coco", split)
    source = labelled.Captioned(images, [("a cat",), ("a dog",)], origin)
    suites.check("mscoco_captions", made(monkeypatch, source, "mscoco_captions"), incomplete=incomplete)

  check("test")
  with pytest.raises(UserError, match="mscoco_captions in /data/coco has no split test, and its split val is of other"):
    check("val")
  check("val", incomplete=True)


def test_what_is_looked_for(tmp_path, caplog):
  make = lambda suite, objectives=("discrimination", "generation"), root=tmp_path: [
    section.dataset for section in suites.sections(suite, str(root), objectives=objectives, image_size=SIZE)
  ]
  with pytest.raises(
    UserError, match="no data set of retrieval in --data_root=.*mscoco_captions: mscoco_captions, mscoco"
  ):
    make("retrieval")
  with pytest.raises(UserError, match="no folder --data_root=.*nowhere"):
    make("retrieval", root=tmp_path / "nowhere")
  for name in ("pets", "dtd"):
    labelled_wds(tmp_path, name)
  captioned_wds(tmp_path / "coco2014", {1: ["a cat"]})
  captioned_wds(tmp_path / "wds_flickr30k", {1: ["a cat"]})
  assert make("zero_shot12") == ["dtd", "pets"] and make("retrieval") == ["flickr30k"]
  assert make("paper") == ["dtd", "pets", "flickr30k", "mscoco_val2014"]
  assert make("paper", ("contrastive",)) == ["dtd", "pets", "flickr30k"]
  assert make("paper", ("generation",)) == ["mscoco_val2014"]


def fabricated(count, *, images=None, seed=0, **protocol):
  """Results of the first sets of the twelve and of retrieval."""
  rng = np.random.default_rng(seed)
  found = {"zero_shot": {}, "retrieval": {}}
  for task, wanted in (("zero_shot", suites.ZERO_SHOT12), ("retrieval", suites.RETRIEVAL)):
    for name in [*wanted][:count]:
      keys = ("acc1", "mean_per_class_recall", "image_retrieval_recall@1", "text_retrieval_recall@1")
      metrics = {key + end: float(rng.random()) for key in keys for end in ("", "_single_template")}
      number = images or wanted[name].sizes[0]
      found[task][name] = results.make_record(
        dataset=name,
        model="m",
        pretrained="run",
        task=task,
        metrics=metrics,
        protocol={"num_images": number, **protocol},
        provenance={"commit": "0" * 40, "clean": True, "run": {"seed": 3}},
      )
  return found


def with_means(found):
  for task, made in suites.means(found).items():
    found[task] |= made
  return found


def means_of(found):
  """The records in the order of their tasks."""
  return [record for records in suites.means(found).values() for record in records.values()]


def test_means_are_of_the_code_that_measured_their_sets():
  found = fabricated(2)
  del found["zero_shot"][[*found["zero_shot"]][1]]["provenance"]["commit"]
  zero_shot, retrieval = (mean["provenance"] for mean in means_of(found))
  assert (zero_shot["commits"], retrieval["commits"]) == (["0" * 40, None], ["0" * 40])
  assert zero_shot["run"] == retrieval["run"] == {"seed": 3} and retrieval["clean"] is True


def test_means():
  found = fabricated(12)
  zero_shot, retrieval = means_of(found)
  own = [found["zero_shot"][name]["metrics"][each.metric] for name, each in suites.ZERO_SHOT12.items()]
  assert zero_shot["dataset"] == "mean_over_12" and zero_shot["metrics"]["mean"] == pytest.approx(np.mean(own))
  assert zero_shot["metrics"]["mean_single_template"] != zero_shot["metrics"]["mean"]
  four = [
    found["retrieval"][name]["metrics"][f"{way}_retrieval_recall@1"]
    for name in suites.RETRIEVAL
    for way in ("image", "text")
  ]
  assert retrieval["dataset"] == "mean_over_2" and retrieval["metrics"]["mean_recall@1"] == pytest.approx(np.mean(four))


@pytest.mark.parametrize(
  ("found", "names"),
  [
    (fabricated(11), ["mean_of_11", "mean_over_2"]),
    (fabricated(1), ["mean_of_1", "mean_of_1"]),
    (fabricated(12, images=40), ["mean_of_12", "mean_of_2"]),
    (fabricated(12, shuffle_labels=True), ["mean_of_12", "mean_of_2"]),
    (fabricated(12, data={"layout": "prepared", "split": "val"}), ["mean_over_12", "mean_of_2"]),
  ],
)
def test_a_mean_over_less_has_another_name(found, names):
  assert [mean["dataset"] for mean in means_of(found)] == names
  assert [*suites.means(found)["zero_shot"]] == names[:1]


def rows_of(text):
  return {cells[1]: cells[2:-1] for line in text.splitlines() if (cells := [*map(str.strip, line.split("|"))])[1:]}


def test_table():
  found = with_means(fabricated(12))
  text = tables.table({"mine": found})
  rows = rows_of(text)
  assert rows[""] == ["mine", "the paper's DiffDis", "the paper's CLIP ViT-L/14", "the paper's CLIP ViT-B/32"]
  imagenet = found["zero_shot"]["imagenet1k"]["metrics"]
  assert rows["zero_shot, ImageNet, acc1"] == [f"{100 * imagenet['acc1']:.2f}", "25.92", "21.1", "16.7"]
  assert rows["zero_shot, Pets, mean_per_class_recall_single_template"][1:] == ["–"] * 3
  assert rows["retrieval, mean, mean_recall@1"][1:] == ["33.60", "–", "–"] and "†" not in text
  few = rows_of(tables.table({"mine": with_means(fabricated(3))}))
  assert few["zero_shot, mean, mean"][0].startswith("mean of 3: ")
  for other in (fabricated(12, images=40), fabricated(12, shuffle_labels=True)):
    assert "| mean of 12: " in tables.table({"mine": with_means(other)})
  val2017 = fabricated(12, data={"layout": "prepared", "split": "val"})
  assert "| mean of 2: " in tables.table({"mine": with_means(val2017)})


def test_the_papers_fid_stands_beside_mscoco_alone():
  record = lambda fid: {"protocol": {}, "metrics": {"fid": fid, "kid": 0.002, "kid_std": 0.1, "num_images": 100}}
  rows = rows_of(tables.table({"mine": {"fid": {"test": record(50.0), "mscoco_val2014": record(12.5)}}}))
  assert rows["fid, test, fid"] == ["50.00", "–", "–"] and rows["fid, test, kid"][0] == "2.000"
  assert rows["fid, MSCOCO val2014, fid"] == ["12.50", "9.80", "10.8"]
  assert rows["fid, MSCOCO val2014, num_images"] == ["100", "–", "–"]
  assert "the paper's DiffDis" not in tables.table({"mine": {"fid": {"test": record(50.0)}}})


def test_side_by_side(tmp_path):
  """Different protocols are marked and named; what belongs to the model is none."""
  how = {"steps": 1, "guidance": 1.0}
  a, b = fabricated(12, weights="x", **how), fabricated(12, seed=1, weights="y", checkpoint=7, **how)
  paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
  out = str(tmp_path / "new/F.md")

  def text():
    for path, found in zip(paths, (a, b), strict=True):
      results.write(path, with_means(found))
    tables.compare(paths, out)
    return (tmp_path / "new/F.md").read_text()

  assert "†" not in text() and rows_of(text())[""][:2] == ["a", "b"]
  b["zero_shot"]["dtd"]["protocol"].update(steps=4, guidance=2.0)
  marked = text()
  assert [row for row in rows_of(marked) if "†" in row] == [
    *("zero_shot, DTD, acc1 †", "zero_shot, DTD, acc1_single_template †"),
    *("zero_shot, mean, mean †", "zero_shot, mean, mean_single_template †"),
  ]
  assert "- zero_shot, dtd, steps: a: 1; b: 4\n- zero_shot, dtd, guidance: a: 1.0; b: 2.0\n" in marked
  for wrong, message in (
    ([paths[0], paths[0]], "names a file twice"),
    ([paths[0], str(tmp_path / "c.json")], "cannot read results from"),
    ([paths[0], out], "cannot read results from"),
  ):
    with pytest.raises(UserError, match=message):
      tables.compare(wrong, str(tmp_path / "G.md"))
  with pytest.raises(UserError, match="should name the Markdown table to write"):
    tables.compare(paths, str(tmp_path / "G.json"))
  fields = ", ".join(f'"{field}": 1' for field in ("dataset", "model", "pretrained", "task", "language", "protocol"))
  (tmp_path / "c.json").write_text(f'{{"zero_shot": {{"dtd": {{"metrics": {{}}, {fields}}}}}}}')
  with pytest.raises(UserError, match="c.json holds no results of evaluate"):
    tables.compare([paths[0], str(tmp_path / "c.json")], str(tmp_path / "G.md"))
  (tmp_path / "c.json").write_text('{"zero_shot": {"dtd": {"metrics": 3}}}')
  with pytest.raises(UserError, match="c.json holds no results of evaluate"):
    tables.compare([paths[0], str(tmp_path / "c.json")], str(tmp_path / "G.md"))
  assert not (tmp_path / "G.md").exists()


def test_clip_which_denoises_nothing_stands_beside_diffdis():
  """As in the paper's Table 1; two ways of denoising are still marked."""
  how = {"steps": 1, "num_noise_samples": 1, "guidance": 1.0, "normalize_query": True}
  of = {"diffdis": with_means(fabricated(12, seed=0, **how)), "clip": with_means(fabricated(12, seed=0))}
  assert "†" not in tables.table(of)
  marked = tables.table(of | {"four": with_means(fabricated(12, seed=0, **(how | {"num_noise_samples": 4})))})
  assert "- zero_shot, dtd, num_noise_samples: diffdis: 1; clip: null; four: 4\n" in marked
  assert "steps" not in marked


def test_a_file_of_results_is_gone_on_from(tmp_path):
  path = str(tmp_path / "F.json")
  found = with_means(fabricated(2, steps=1, weights="x", kid_subset_size=9))
  results.write(path, found)
  kept = results.ResultFile(path)
  assert [*kept.results["zero_shot"]] == ["cifar10", "cifar100"]  # without the mean over fewer
  protocol = {"num_images": 10_000, "steps": 1, "weights": "x", "kid_subset_size": 0}
  assert kept.has("zero_shot", "cifar10", protocol) and not kept.has("zero_shot", "dtd", protocol)
  for change, message in (
    ({"weights": "y"}, 'has cifar10 by another protocol, weights "x" where this measurement has "y"; name a new file'),
    ({"seed": 1}, "seed null where this measurement has 1"),
    ({"num_images": 40}, "num_images 10000 where this measurement has 40"),
  ):
    with pytest.raises(UserError, match=message):
      kept.has("zero_shot", "cifar10", protocol | change)
  # Means would mix what is there and a new set of another model.
  with pytest.raises(UserError, match='has cifar10 by another protocol, weights "x" where this measurement has "y"'):
    kept.has("zero_shot", "dtd", protocol | {"weights": "y"})
  assert not kept.has("zero_shot", "dtd", protocol | {"steps": 4})


def test_a_figure_that_is_not_finite_is_null_in_the_file(tmp_path):
  """JSON has no NaN: readers but Python's refuse a file with one."""
  path, record = tmp_path / "F.json", fabricated(1)["zero_shot"]["cifar10"]
  figures = {"acc1": 0.5, "loss": math.nan, "kid": math.inf}
  results.write(str(path), {"zero_shot": {"cifar10": record | {"metrics": figures}}})

  def refuse(constant: str) -> None:
    raise AssertionError(constant)

  written = json.loads(path.read_text(), parse_constant=refuse)["zero_shot"]["cifar10"]["metrics"]
  assert written == {"acc1": 0.5, "loss": None, "kid": None}
  found = results.read(str(path))["zero_shot"]["cifar10"]["metrics"]
  assert found["acc1"] == 0.5 and math.isnan(found["loss"]) and math.isnan(found["kid"])
