"""The page in Chromium, as a reader sees it. It needs apt-get install chromium chromium-driver."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from diffdis_jax.report import __main__ as report
from tests.report import written_run

pytestmark = pytest.mark.slow
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += (
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--force-prefers-reduced-motion",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Of one run, of two, and of one that never had a finite number."""
  folder = tmp_path_factory.mktemp("browser")
  runs = [written_run.write(folder / name / "run", batch_size=size) for name, size in (("a", 16), ("b", 32))]
  for name, some in (("one", runs[:1]), ("two", runs)):
    report.report(some, str(folder / f"{name}.html"))
  lost = pathlib.Path(written_run.write(folder / "c" / "run"))
  lines = [json.loads(line) for line in (lost / "metrics.jsonl").read_text().splitlines()[:-1]]
  lines = [{name: value if name == "step" else None for name, value in line.items()} for line in lines]
  (lost / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  report.report([str(lost)], str(folder / "lost.html"))
  return {name: folder / f"{name}.html" for name in ("one", "two", "lost")}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Of a run that measures nine data sets and diverges, and of a shorter one before it."""
  folder = tmp_path_factory.mktemp("odd")
  runs = [pathlib.Path(written_run.write(folder / name, num_steps=4000)) for name in ("short", "long")]
  sets = {f"set{i}/acc1": i / 10 for i in range(9)}
  lines = [
    {"step": step, "loss": 10 ** (step / 100) if step < 3000 else None, "data_wait": step / 10_000, **sets}
    for step in range(20, 3010, 20)
  ]
  (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  report.report([str(runs[1])], str(folder / "one.html"))
  report.report([*map(str, runs)], str(folder / "two.html"))
  return {name: folder / f"{name}.html" for name in ("one", "two")}


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> pathlib.Path:
  """Of a run that was killed at its first start, hardly waits for data, is nearly always as fast, and whose batches are
  so small that every second report lacks a quarter of the timesteps."""
  folder = tmp_path_factory.mktemp("steady")
  run = pathlib.Path(written_run.write(folder / "run"))
  (run / "history.jsonl").write_text((run / "history.jsonl").read_text().splitlines()[0] + "\n")
  lines = [
    {
      **{"step": step, "loss": 1 / step, "loss_generation_q1": 0.5 if step % 20 else None},
      **{"data_wait": 1e-4 + step / 1e6, "images_per_sec": 5123.4 + step / 200, "steps_per_sec": 0.5},
    }
    for step in range(10, 310, 10)
  ]
  (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  report.report([str(run)], str(folder / "run.html"))
  return folder / "run.html"


@pytest.fixture(params=[390, 1280])
def driver(request, tmp_path):
  """At the width of a phone, and at that of a laptop."""
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  for flag in (*FLAGS, f"--user-data-dir={tmp_path}", "--window-size=1280,900"):
    options.add_argument(flag)
  if request.param < 500:  # the least of a window
    size = {"width": request.param, "height": 844, "pixelRatio": 1.0}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": size})
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  options.binary_location = shutil.which("chromium") or ""
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
  driver.width = request.param
  yield driver
  driver.quit()


def texts(driver, selector: str) -> list[str]:
  return [" ".join(each.text.split()) for each in driver.find_elements("css selector", selector)]


def is_clean(driver) -> bool:
  """No error in the console, and nothing wider than the window."""
  wide = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
  assert driver.execute_script("return innerWidth") == driver.width
  return wide == 0 and driver.get_log("browser") == []


def test_a_run_is_read_off_the_page(driver, pages):
  driver.get(pages["one"].as_uri())
  assert is_clean(driver)
  tiles = texts(driver, "header .tile")
  assert any(tile.startswith("Step 300 of 400") for tile in tiles)
  assert any(tile.startswith("Loss 0.3333 lowest 0.3333 at 300") for tile in tiles)
  assert any(tile.startswith("test/acc1 0.3") for tile in tiles)
  assert any(tile.startswith("Starts 2 10 steps repeated") for tile in tiles)
  assert texts(driver, "header .pill") == ["stopped"]
  assert texts(driver, "h2") == [
    *("Samples", "Losses", "Evaluations", "Speed", "Optimisation", "Data", "Parameters", "History and cost", "Config")
  ]
  assert len(driver.find_elements("css selector", ".chart svg path")) >= 8
  assert "corrupt image" in texts(driver, "#data-set")[0] and "</script>" in texts(driver, "#data-set")[0]
  assert "100 parameters, 70 of them trained" in texts(driver, "#parameters")[0]


def test_a_run_of_numbers_that_are_not_finite_has_a_page_too(driver, pages):
  driver.get(pages["lost"].as_uri())
  assert is_clean(driver)
  assert "Loss – never finite" in texts(driver, "header .tile")
  assert len(texts(driver, "h2")) == 9 and "No finite value yet." in texts(driver, "#losses")[0]


def test_the_slider_the_curves_and_the_config_answer(driver, pages):
  driver.get(pages["one"].as_uri())
  source = lambda: driver.find_element("css selector", ".live img").get_attribute("src")
  assert texts(driver, "output") == ["step 300"]
  last, slider = source(), driver.find_element("css selector", "input[type=range]")
  slider.send_keys("\ue012")  # arrow left
  assert texts(driver, "output") == ["step 200"] and source() != last

  stage = driver.find_element("css selector", "#losses .chart [tabindex]")
  driver.execute_script("arguments[0].focus()", stage)
  stage.send_keys("\ue012")
  assert texts(driver, "#losses .tip")[0] == "step 300 0.3333"

  rows = len(driver.find_elements("css selector", "#config tbody tr"))
  driver.find_element("css selector", "#only").click()
  assert len(driver.find_elements("css selector", "#config tbody tr")) > rows
  driver.find_element("css selector", "#config input[type=search]").send_keys("num_steps")
  assert texts(driver, "#config tbody tr") == ["num_steps 400"]
  before = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
  driver.find_element("css selector", "nav button").click()
  assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") != before
  theme = "return document.documentElement.dataset.theme"
  driver.execute_script("dispatchEvent(new Event('beforeprint'))")
  assert driver.execute_script(theme) == "light"
  driver.execute_script("dispatchEvent(new Event('afterprint'))")
  assert driver.execute_script(theme) == "dark"
  assert is_clean(driver)


def test_two_runs_are_beside_each_other(driver, pages):
  driver.get(pages["two"].as_uri())
  assert is_clean(driver)
  assert texts(driver, "header tbody tr")[1].startswith("b/run stopped 300 of 400 0.3333")
  assert len(driver.find_elements("css selector", ".live img")) == 2
  assert "batch_size 16 32" in texts(driver, "#config tbody tr")
  assert len(driver.find_elements("css selector", "#losses .chart:first-child .legend span.swatch")) == 2


def test_every_line_is_seen_and_large_numbers_fit(driver, odd):
  driver.get(odd["one"].as_uri())
  assert "Loss 6.31e29 not finite after step 2,980" in texts(driver, "header .tile")
  strokes = "return [...document.querySelectorAll('.chart svg path')].map((path) => getComputedStyle(path).stroke)"
  assert "none" not in driver.execute_script(strokes)
  ticks = texts(driver, "#losses .chart:first-child text[text-anchor=end]")
  assert "1e24" in ticks and len(ticks) < 12 and max(map(len, ticks)) < 8
  assert is_clean(driver)


def test_a_share_on_a_logarithmic_scale(driver, odd):
  driver.get(odd["one"].as_uri())
  driver.set_script_timeout(10)
  (toggle,) = driver.find_elements("xpath", "//h3[starts-with(., 'Time spent waiting')]/../button")
  toggle.click()
  assert toggle.get_attribute("aria-pressed") == "true"
  lines = driver.execute_script("return [...document.querySelectorAll('#speed svg path')].map((p) => p.outerHTML)")
  assert lines and "NaN" not in "".join(lines) and is_clean(driver)


def test_a_short_run_beside_a_long_one_that_diverged(driver, odd):
  driver.get(odd["two"].as_uri())
  runs = texts(driver, "header tbody tr")
  assert "300 of 4,000 0.3333" in runs[0] and "6.31e29, not finite after step 2,980" in runs[1]
  stage = driver.find_element("css selector", "#losses .chart [tabindex]")
  driver.execute_script("arguments[0].focus()", stage)
  stage.send_keys("\ue012\ue012")  # arrow left, from the right end
  assert texts(driver, "#losses .tip")[0] == "step 2,980 short – long 6.31e29"
  assert is_clean(driver)


def test_labels_of_an_axis_say_where_they_stand(driver, steady):
  driver.get(steady.as_uri())
  script = """return Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => [
    chart.querySelector('h3').textContent,
    [...chart.querySelectorAll('svg line + text')].map((text) => [text.textContent, text.getBBox().x])
  ]))"""
  found = driver.execute_script(script)
  for title in ("Time spent waiting for data", "Images a second"):
    labels = [label for label, _ in found[title]]
    values = [float(label.removesuffix(" %").replace(",", "")) for label in labels]
    assert len(values) > 2 and np.diff(values) == pytest.approx(values[1] - values[0]) and values[1] > values[0], labels
    assert all(left >= 0 for _, left in found[title]), "cut off"
  assert "waiting for data 0.04 %" in " ".join(texts(driver, "header .tile"))
  assert is_clean(driver)


def test_a_point_between_two_that_are_not_finite_is_seen(driver, steady):
  driver.get(steady.as_uri())
  script = "return document.querySelectorAll('#losses .chart')[1].querySelectorAll('svg circle').length"
  assert driver.execute_script(script) == 15


def test_a_run_that_was_killed_at_its_first_start_was_interrupted(driver, steady):
  driver.get(steady.as_uri())
  assert texts(driver, "header .pill") == ["killed"]
  assert "Starts 1 killed" in texts(driver, "header .tile")
