from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import os
import re
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from diffdis_jax.evals import samples
from diffdis_jax.report import page, read
from tests.command_runs import call
from tests.report import written_run


class Scripts(html.parser.HTMLParser):
  """Collect the contents of script elements, and every address that the page names."""

  def __init__(self, text: str):
    super().__init__()
    self.scripts, self.addresses, self._open = [], [], None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self._open = dict(attrs) if tag == "script" else None
    self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

  def handle_data(self, data):
    if self._open is not None:
      self.scripts.append((self._open, data))

  def handle_endtag(self, tag):
    self._open = None

  def json(self, id: str):
    (text,) = [text for attributes, text in self.scripts if attributes.get("id") == id]
    return json.loads(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pages")
  paths = [written_run.write(folder / name / "run", batch_size=size) for name, size in (("a", 16), ("b<script>", 32))]
  return [read.read(path, name) for path, name in zip(paths, page.names_of(paths), strict=True)]


@pytest.fixture(scope="module")
def pages(runs):
  return [page.render(some, now=written_run.DAY + 1000) for some in (runs[:1], runs)]


def test_names_are_as_long_as_it_takes_to_tell_them_apart():
  assert page.names_of(["x/a", "x/b/"]) == ["a", "b"]
  assert page.names_of(["x/1/run", "x/2/run", "y"]) == ["1/run", "2/run", "y"]


def test_the_page_holds_what_the_run_left(pages):
  content = Scripts(pages[0]).json("data")
  (run,) = content["runs"]
  assert (run["name"], run["step"], run["num_steps"], run["status"]["state"]) == ("a/run", 300, 400, "stopped")
  loss = run["curves"]["loss"]
  assert loss["steps"] == list(range(10, 310, 10)) and loss["mean"][:2] == [10.0, 5.0]
  assert loss["last"] == {"step": 300, "value": pytest.approx(1 / 3, rel=1e-5)}
  assert run["curves"]["grad_norm"]["highest"] == {"step": 150, "value": 77.0}
  assert run["curves"]["steps_per_sec"]["mean"][0] is None and run["curves"]["steps_per_sec"]["not_finite"] == 1
  assert run["curves"]["test/acc1"]["mean"] == [0.1, 0.2, 0.3]
  assert run["substituted"] == 1
  assert run["checkpoints"] == [{"step": 200, "metrics": {"test/acc1": 0.25}}, {"step": 300, "metrics": {}}]
  assert run["parameters"]["new"] == {"unet": 60, "alignment": 10}
  assert {chart["section"] for chart in content["charts"]} == {"losses", "evaluations", "speed", "optimisation", "data"}
  (pictures,) = Scripts(pages[0]).json("pictures")
  assert [grid["step"] for grid in pictures["grids"][0]["grids"]] == [100, 200, 300]


def test_runs_are_compared_where_their_configs_differ(pages):
  content = Scripts(pages[1]).json("data")
  assert [run["name"] for run in content["runs"]] == ["a/run", "b<script>/run"]
  assert {"field": "batch_size", "values": ["16", "32"]} in content["differences"]
  assert {row["field"] for row in content["differences"]} == {"batch_size", "data.path"}


def test_the_page_loads_nothing_and_what_it_holds_cannot_break_out_of_it(pages):
  for text in pages:
    parsed = Scripts(text)
    assert parsed.addresses == [], "every address is made by the script, and is #, or data:"
    assert len(parsed.scripts) == 3
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a namespace, not loaded
    assert "default-src 'none'" in text
    assert not re.search(r"\{\{\w+\}\}", text), "a place of the template that was not filled"


def test_texts_of_a_run_that_look_like_places_of_the_template_are_texts(tmp_path):
  """A class or a prompt may look like a placeholder."""
  names = ("{{pictures}}", "{{data}}", "{{title}}", "{{other}}", r"\g<1>")
  path = written_run.write(tmp_path / "{{pictures}} {{data}}", sample_prompts=names)
  text = page.render([read.read(path, "{{pictures}} {{data}}")], now=written_run.DAY)
  parsed = Scripts(text)
  (run,), (pictures,) = parsed.json("data")["runs"], parsed.json("pictures")
  assert run["name"] == "{{pictures}} {{data}}" and json.loads(run["config"]["sample_prompts"]) == list(names)
  assert len(pictures["grids"][0]["grids"]) == 3
  assert "<title>{{pictures}} {{data}}</title>" in text and len(parsed.scripts) == 3


def test_numbers_that_are_not_finite_are_null():
  assert page.as_json({"a": [1.5, math.nan], "b": (math.inf, "<")}) == '{"a":[1.5,null],"b":[null,"\\u003c"]}'


def test_no_more_pictures_than_fit_and_the_last_among_them(runs, monkeypatch):
  monkeypatch.setattr(page, "MOST_GRIDS", 4)
  pictures = page.embed(runs)
  assert [[grid["step"] for grid in run["grids"][0]["grids"]] for run in pictures] == [[100, 300]] * 2
  assert [run["grids"][0]["all"] for run in pictures] == [3, 3]


def test_pictures_become_smaller_until_all_fit_and_a_file_that_is_none_is_left_out(tmp_path):
  smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 12, 3), dtype=np.uint8)).resize((400, 200))
  paths = [epath.Path(tmp_path / f"{i}.png") for i in range(5)]
  for i, path in enumerate(paths):
    smooth.rotate(20 * i).save(path)
  whole = page.embed_pictures(paths, most_bytes=1_000_000)
  for picture, path in zip(whole, paths, strict=True):
    image = Image.open(io.BytesIO(base64.b64decode(picture.uri.removeprefix("data:image/webp;base64,"))))
    assert image.size == (picture.width, picture.height) == (400, 200)
    assert np.abs(np.asarray(image, np.float32) - np.asarray(Image.open(path), np.float32)).mean() < 4  # of 255
  most = sum(len(picture.uri) for picture in whole) // 3
  smaller = page.embed_pictures(paths, most_bytes=most)
  assert sum(len(picture.uri) for picture in smaller) <= most
  assert len({(picture.width, picture.height) for picture in smaller}) == 1
  paths[1].write_bytes(paths[0].read_bytes()[:500])
  images = page.embed_pictures([*paths[:2], epath.Path(tmp_path / "none")], most_bytes=10**6)
  assert [picture is None for picture in images] == [False, True, True]


def test_a_report_takes_no_accelerator(tmp_path):
  """A run in progress on the same machine may use all of them."""
  run = written_run.write(tmp_path / "run")
  none_to_be_had = {**os.environ, "JAX_PLATFORMS": "cuda"}
  flags = [f"--workdir={run}", f"--out={tmp_path}/report.html"]
  done = call("report", none_to_be_had, *flags)
  assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_hundred_thousand_lines_and_two_hundred_grids_are_ten_seconds_and_ten_megabytes(tmp_path):
  run, out, num_lines, rng = tmp_path / "run", tmp_path / "report.html", 100_000, np.random.default_rng(0)
  written_run.write(run, num_steps=10 * num_lines)
  names = ("loss", "loss_generation", "grad_norm", "steps_per_sec", "data_wait", *(f"loss_{i}_q1" for i in range(13)))
  values = rng.uniform(0.5, 1.5, (num_lines, len(names))).tolist()
  lines = (json.dumps({"step": 10 * i, **dict(zip(names, line))}) for i, line in enumerate(values, 1))
  (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  for i in range(200):  # grids of smooth samples, all different
    tiles = [Image.fromarray(tile).resize((32, 32)) for tile in rng.integers(0, 256, (64, 6, 6, 3), dtype=np.uint8)]
    grid = samples.draw_grid(np.stack([np.asarray(tile) for tile in tiles]), ["a red star"] * 64, columns=8)
    grid.save(run / "samples" / f"samples_{5000 * (i + 1):08d}.png")
  begin = time.monotonic()
  assert call("report", dict(os.environ), f"--workdir={run}", f"--out={out}").returncode == 0
  assert out.stat().st_size <= 10e6 and time.monotonic() - begin <= 10
  assert out.read_text().count("data:image/webp") >= 200
