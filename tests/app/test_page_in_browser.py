"""The page in Chromium, by clicking. It needs apt-get install chromium chromium-driver."""

from __future__ import annotations

import shutil
import time

import pytest

from tests import studio_pictures as pictures
from tests.served_app import serve

pytestmark = pytest.mark.full
pytest_plugins = ("tests.untrained",)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
  with serve(run, tmp_path_factory.mktemp("page") / "log", {}) as served:
    yield served


class Page:
  """What a user sees and clicks."""

  def __init__(self, driver, address: str, width: int):
    self.driver, self.width = driver, width
    driver.get(address)
    self.wait(lambda: self.all("button[role=tab]"))

  def all(self, selector: str):
    return [each for each in self.driver.find_elements("css selector", selector) if each.is_displayed()]

  def wait(self, found, seconds: float = 120):
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
      try:
        if value := found():
          return value
      except StaleElementReferenceException:
        pass
      time.sleep(0.1)
    raise AssertionError(self.driver.find_element("css selector", "body").text)

  def click(self, selector: str) -> None:
    element = self.wait(lambda: self.all(selector))[0]
    self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    time.sleep(0.2)
    element.click()

  def tab(self, name: str) -> None:
    self.wait(lambda: [each for each in self.all("button[role=tab]") if each.text == name])[0].click()

  def fill(self, label: str, text: str) -> None:
    path = f"//label[.//span[normalize-space()='{label}']]//*[self::textarea or self::input]"
    found = lambda: [each for each in self.driver.find_elements("xpath", path) if each.is_displayed()]
    element = self.wait(found)[0]
    element.clear()
    element.send_keys(text)

  def text(self, selector: str) -> str:
    return " ".join(each.text for each in self.all(selector))

  def line(self, name: str) -> str:
    """What the tab says of its answer."""
    found = self.driver.find_elements("css selector", f"#{name}-line textarea, #{name}-line input")
    return found[0].get_attribute("value") if found else ""

  def upload(self, name: str, path: str) -> None:
    """Into the tab's image field, which shows a cross once the file is there."""
    self.wait(lambda: self.driver.find_elements("css selector", f"#{name}-image input[type=file]"))[0].send_keys(path)

  def is_clean(self) -> bool:
    """Nothing wider than the window, and nothing asked of another machine."""
    wide = self.driver.execute_script(
      "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    elsewhere = self.driver.execute_script(
      "return performance.getEntriesByType('resource').map(e => e.name)"
      ".filter(name => !name.startsWith(location.origin) && !name.startsWith('data:'))"
    )
    return wide == 0 and elsewhere == [] and self.driver.execute_script("return innerWidth") == self.width


@pytest.fixture(params=[390, 1280])
def page(request, served, tmp_path):
  """At the width of a phone, and at that of a laptop."""
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  for flag in (*FLAGS, f"--user-data-dir={tmp_path}", "--window-size=1280,900"):
    options.add_argument(flag)
  if request.param < 500:  # the least of a window
    size = {"width": request.param, "height": 844, "pixelRatio": 1.0}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": size})
  options.binary_location = shutil.which("chromium") or ""
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
  yield Page(driver, served.address, request.param)
  driver.quit()


def test_an_image_is_generated_from_a_prompt(page):
  page.fill("Prompt", "a blue ring")
  page.click("#draw-button")
  page.wait(lambda: page.line("draw").startswith("2 steps"))
  page.wait(lambda: len(page.all("button.thumbnail-item img")) == 3)
  assert page.is_clean()


def test_an_image_is_classified(page, tmp_path):
  path = pictures.write(tmp_path, "a.png", pictures.png(40, 30))
  page.tab("Classify")
  page.upload("classify", path)
  page.wait(lambda: page.all("#classify-image img"))
  page.fill("Class names", "red star, blue ring, cat")
  page.click("#classify-button")
  page.wait(lambda: "%" in page.line("classify"))
  assert all(name in page.text("#classify-answer") for name in ("red star", "blue ring", "cat")) and page.is_clean()


def test_images_are_found_by_text_and_by_an_upload(page, tmp_path):
  page.tab("Search")
  page.fill("By text", "a red star\n")  # the return key asks
  page.wait(lambda: len(page.all("button.thumbnail-item")) >= 12)
  scores = page.text(".caption-label")
  page.upload("search", pictures.write(tmp_path, "a.png", pictures.png(40, 30)))
  page.wait(lambda: page.all("#search-image img"))
  page.click("#search-image-button")
  page.wait(lambda: page.text(".caption-label") not in ("", scores))
  assert page.is_clean()
