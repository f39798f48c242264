"""Test which data sets the paper's suites look for, their means, and their tables beside the paper's figures."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image

from diffdis_jax.data import sources
from diffdis_jax.data.layouts import labelled
from diffdis_jax.errors import UserError
from diffdis_jax.evals import results, suites, tables
from tests.benchmark_sets import captioned_wds, labelled_wds
from tests.raw_pairs import encode

SIZE = 8


def test_another_number_of_images_or_another_split_is_refused(monkeypatch):
  """val2017 of MSCOCO has 5,000 images, as Karpathy's test split of val2014 has."""
  monkeypatch.setitem(suites.SETS, "mscoco_captions", dataclasses.replace(suites.SETS["mscoco_captions"], sizes=(2,)))

  def check(split, count=2, *, incomplete=False):
    image = encode(Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)))
    origin = labelled.Origin("prepared", "/data/coco", split)
    source = labelled.Captioned([image] * count, [("a cat",)] * count, origin=origin)
    monkeypatch.setattr(sources, "open_source", lambda **data: source)
    evaluation = suites._section("mscoco_captions", "/data", SIZE).create()
    suites.check("mscoco_captions", evaluation, incomplete=incomplete)

  check("test")
  with pytest.raises(
    UserError, match="mscoco_captions in /data/coco has 3 images, and should have 2; download it again"
  ):
    check("test", 3)
  with pytest.raises(UserError, match="mscoco_captions in /data/coco has no split test, and its split val is of other"):
    check("val")
  check("val", incomplete=True)


def test_a_suite_measures_the_sets_that_are_in_the_folder(tmp_path, caplog):
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
  """Make up results for the first `count` sets of the twelve, and of retrieval."""
  rng = np.random.default_rng(seed)
  records = {"zero_shot": {}, "retrieval": {}}
  for task, wanted in (("zero_shot", suites.ZERO_SHOT12), ("retrieval", suites.RETRIEVAL)):
    for name in [*wanted][:count]:
      keys = ("acc1", "mean_per_class_recall", "image_retrieval_recall@1", "text_retrieval_recall@1")
      metrics = {key + end: float(rng.random()) for key in keys for end in ("", "_single_template")}
      number = images or wanted[name].sizes[0]
      records[task][name] = results.make_record(
        dataset=name,
        model="m",
        pretrained="run",
        task=task,
        metrics=metrics,
        protocol={"num_images": number, **protocol},
        provenance={"commit": "0" * 40, "clean": True, "run": {"seed": 3}},
      )
  return records


def with_means(results_):
  for task, means in suites.means(results_).items():
    results_[task] |= means
  return results_


def means_of(measured):
  """Return the records in the order of their tasks."""
  return [record for records in suites.means(measured).values() for record in records.values()]


def test_means():
  measured = fabricated(12)
  zero_shot, retrieval = means_of(measured)
  own = [measured["zero_shot"][name]["metrics"][benchmark.metric] for name, benchmark in suites.ZERO_SHOT12.items()]
  assert zero_shot["dataset"] == "mean_over_12" and zero_shot["metrics"]["mean"] == pytest.approx(np.mean(own))
  assert zero_shot["metrics"]["mean_single_template"] != zero_shot["metrics"]["mean"]
  four = [
    measured["retrieval"][name]["metrics"][f"{way}_retrieval_recall@1"]
    for name in suites.RETRIEVAL
    for way in ("image", "text")
  ]
  assert retrieval["dataset"] == "mean_over_2" and retrieval["metrics"]["mean_recall@1"] == pytest.approx(np.mean(four))


@pytest.mark.parametrize(
  ("measured", "names"),
  [
    (fabricated(11), ["mean_of_11", "mean_over_2"]),
    (fabricated(1), ["mean_of_1", "mean_of_1"]),
    (fabricated(12, images=40), ["mean_of_12", "mean_of_2"]),
    (fabricated(12, shuffle_labels=True), ["mean_of_12", "mean_of_2"]),
    (fabricated(12, data={"layout": "prepared", "split": "val"}), ["mean_over_12", "mean_of_2"]),
  ],
)
def test_a_mean_over_fewer_sets_or_images_has_another_name(measured, names):
  assert [mean["dataset"] for mean in means_of(measured)] == names
  assert [*suites.means(measured)["zero_shot"]] == names[:1]


def rows_of(text):
  return {cells[1]: cells[2:-1] for line in text.splitlines() if (cells := [*map(str.strip, line.split("|"))])[1:]}


def test_a_table_has_the_papers_figures_beside_ours():
  measured = with_means(fabricated(12))
  text = tables.table({"mine": measured})
  rows = rows_of(text)
  assert rows[""] == ["mine", "the paper's DiffDis", "the paper's CLIP ViT-L/14", "the paper's CLIP ViT-B/32"]
  imagenet = measured["zero_shot"]["imagenet1k"]["metrics"]
  assert rows["zero_shot, ImageNet, acc1"] == [f"{100 * imagenet['acc1']:.2f}", "25.92", "21.1", "16.7"]
  assert rows["zero_shot, Pets, mean_per_class_recall_single_template"][1:] == ["–"] * 3
  assert rows["retrieval, mean, mean_recall@1"][1:] == ["33.60", "–", "–"] and "†" not in text
  of_three_sets = rows_of(tables.table({"mine": with_means(fabricated(3))}))
  assert of_three_sets["zero_shot, mean, mean"][0].startswith("mean of 3: ")
  for other in (fabricated(12, images=40), fabricated(12, shuffle_labels=True)):
    assert "| mean of 12: " in tables.table({"mine": with_means(other)})
  val2017 = fabricated(12, data={"layout": "prepared", "split": "val"})
  assert "| mean of 2: " in tables.table({"mine": with_means(val2017)})


def test_a_table_of_two_models_marks_different_protocols(tmp_path):
  """Settings that belong to the model, such as its weights, are no difference of protocol."""
  how = {"steps": 1, "guidance": 1.0}
  a, b = fabricated(12, weights="x", **how), fabricated(12, seed=1, weights="y", checkpoint=7, **how)
  paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
  out = str(tmp_path / "new/F.md")

  def text():
    for path, measured in zip(paths, (a, b), strict=True):
      results.write(path, with_means(measured))
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
  (tmp_path / "c.json").write_text('{"zero_shot": {"dtd": {"metrics": 3}}}')
  for wrong, message in (
    ([paths[0], paths[0]], "names a file twice"),
    ([paths[0], str(tmp_path / "d.json")], "cannot read results from"),
    ([paths[0], str(tmp_path / "c.json")], "c.json holds no results of evaluate"),
  ):
    with pytest.raises(UserError, match=message):
      tables.compare(wrong, str(tmp_path / "G.md"))
  with pytest.raises(UserError, match="should name the Markdown table to write"):
    tables.compare(paths, str(tmp_path / "G.json"))
  assert not (tmp_path / "G.md").exists()


def test_an_existing_file_of_results_is_continued(tmp_path):
  path = str(tmp_path / "F.json")
  measured = with_means(fabricated(2, steps=1, weights="x", kid_subset_size=9))
  results.write(path, measured)
  kept = results.ResultFile(path)
  assert [*kept.results["zero_shot"]] == ["cifar10", "cifar100"]  # without the mean over two sets
  protocol = {"num_images": 10_000, "steps": 1, "weights": "x", "kid_subset_size": 0}
  assert kept.has("zero_shot", "cifar10", protocol) and not kept.has("zero_shot", "dtd", protocol)
  for change, message in (
    ({"weights": "y"}, 'has cifar10 by another protocol, weights "x" where this measurement has "y"; name a new file'),
    ({"seed": 1}, "seed null where this measurement has 1"),
    ({"num_images": 40}, "num_images 10000 where this measurement has 40"),
  ):
    with pytest.raises(UserError, match=message):
      kept.has("zero_shot", "cifar10", protocol | change)
  # A mean would mix the stored sets with a new set of another model.
  with pytest.raises(UserError, match='has cifar10 by another protocol, weights "x" where this measurement has "y"'):
    kept.has("zero_shot", "dtd", protocol | {"weights": "y"})
  assert not kept.has("zero_shot", "dtd", protocol | {"steps": 4})


def test_a_figure_that_is_not_finite_is_null_in_the_file(tmp_path):
  """JSON has no NaN, and most readers refuse a file with one."""
  path, record = tmp_path / "F.json", fabricated(1)["zero_shot"]["cifar10"]
  figures = {"acc1": 0.5, "loss": math.nan, "kid": math.inf}
  results.write(str(path), {"zero_shot": {"cifar10": record | {"metrics": figures}}})

  def refuse(constant: str) -> None:
    raise AssertionError(constant)

  written = json.loads(path.read_text(), parse_constant=refuse)["zero_shot"]["cifar10"]["metrics"]
  assert written == {"acc1": 0.5, "loss": None, "kid": None}
  read_back = results.read(str(path))["zero_shot"]["cifar10"]["metrics"]
  assert read_back["acc1"] == 0.5 and math.isnan(read_back["loss"]) and math.isnan(read_back["kid"])
