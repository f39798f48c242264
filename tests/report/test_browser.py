"""Read the page in Chromium. It requires apt-get install chromium chromium-driver."""

from __future__ import annotations

import pathlib

import pytest

from diffdis_jax.report import __main__ as report
from tests import browser
from tests.report import written_run

pytestmark = pytest.mark.full
pytest_plugins = ("tests.browser",)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Write the pages of one run, of two runs, and of a run that has just begun."""
  folder = tmp_path_factory.mktemp("browser")
  runs = [written_run.write(folder / name / "run", batch_size=size) for name, size in (("a", 16), ("b", 32))]
  begun = pathlib.Path(written_run.write(folder / "c" / "run"))
  metrics = begun / "metrics.jsonl"
  metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
  for picture in sorted((begun / "samples").iterdir())[1:]:
    picture.unlink()
  pages = {"one": runs[:1], "two": runs, "begun": [str(begun)]}
  for name, few_steps in pages.items():
    report.report(few_steps, str(folder / f"{name}.html"))
  return {name: folder / f"{name}.html" for name in pages}


def texts(driver, selector: str) -> list[str]:
  return [" ".join(element.text.split()) for element in driver.find_elements("css selector", selector)]


def is_clean(driver) -> bool:
  """Return whether the console has no error and nothing is wider than the window."""
  return browser.is_no_wider_than_the_window(driver) and driver.get_log("browser") == []


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
  charts = driver.find_elements("css selector", ".chart")
  assert [len(chart.find_elements("css selector", "svg path")) for chart in charts] == [1] * 7, "one for each metric"
  assert "1 records could not be used" in texts(driver, "#data-set")[0] and "</script>" in texts(driver, "#data-set")[0]
  assert "100 parameters, 70 of them trained" in texts(driver, "#parameters")[0]


def test_the_slider_the_curves_and_the_config_answer(driver, pages):
  driver.get(pages["one"].as_uri())
  source = lambda: driver.find_element("css selector", ".live img").get_attribute("src")
  assert texts(driver, "output") == ["step 300"]
  last, slider = source(), driver.find_element("css selector", "input[type=range]")
  slider.send_keys("\ue012")  # the left arrow key
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


def test_a_run_that_has_just_begun_has_no_slider_and_no_charts_of_two_points(driver, pages):
  driver.get(pages["begun"].as_uri())
  assert is_clean(driver) and len(driver.find_elements("css selector", ".live img")) == 1
  assert not driver.find_elements("css selector", "input[type=range], .chart")
  assert texts(driver, "#losses tbody tr") == ["Loss 10 at 10 5 at 20"]


def test_two_runs_are_beside_each_other(driver, pages):
  driver.get(pages["two"].as_uri())
  assert is_clean(driver)
  assert texts(driver, "header tbody tr")[1].startswith("b/run stopped 300 of 400 0.3333")
  assert len(driver.find_elements("css selector", ".live img")) == 2
  assert "batch_size 16 32" in texts(driver, "#config tbody tr")
  assert len(driver.find_elements("css selector", "#losses .chart:first-child .legend span.swatch")) == 2
