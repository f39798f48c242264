"""Start Chromium for the tests of pages. This requires apt-get install chromium chromium-driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900")


@pytest.fixture(params=[390, 1280])
def driver(request, tmp_path) -> Iterator[Any]:
  """Start Chromium, once with the width of a phone and once with that of a laptop, which is `driver.width`."""
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  for flag in (*FLAGS, f"--user-data-dir={tmp_path}", "--force-prefers-reduced-motion"):
    options.add_argument(flag)
  if request.param < 500:  # a window cannot be narrower
    size = {"width": request.param, "height": 844, "pixelRatio": 1.0}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": size})
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  options.binary_location = shutil.which("chromium") or ""
  driver: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
  driver.width = request.param
  yield driver
  driver.quit()


def is_no_wider_than_the_window(driver: Any) -> bool:
  # A scroll bar at the side takes some of the window's width.
  content, window = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
  return content <= window == driver.width
