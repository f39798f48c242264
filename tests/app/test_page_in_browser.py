"""Click through the page in Chromium. It requires the packages of apt-get install chromium chromium-driver."""

from __future__ import annotations

import time

import pytest

from tests import browser
from tests import studio_pictures as pictures
from tests.served_app import serve

pytestmark = pytest.mark.full
pytest_plugins = ("tests.untrained", "tests.browser")


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
  with serve(run, tmp_path_factory.mktemp("page") / "log", {}) as served:
    yield served


class Page:
  """The page as a user sees it and clicks on it."""

  def __init__(self, driver, address: str):
    self.driver = driver
    driver.get(address)
    self.wait(lambda: self.all("button[role=tab]"))

  def all(self, selector: str):
    return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

  def wait(self, look, seconds: float = 120):
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
      try:
        if value := look():
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
    self.wait(lambda: [tab for tab in self.all("button[role=tab]") if tab.text == name])[0].click()

  def fill(self, label: str, text: str) -> None:
    path = f"//label[.//span[normalize-space()='{label}']]//*[self::textarea or self::input]"
    path += f"|//input[@aria-label='number input for {label}']"  # of a slider
    fields = lambda: [element for element in self.driver.find_elements("xpath", path) if element.is_displayed()]
    element = self.wait(fields)[0]
    element.clear()
    element.send_keys(text)

  def text(self, selector: str) -> str:
    return " ".join(element.text for element in self.all(selector))

  def line(self, name: str) -> str:
    """Return the status line below a tab's answer."""
    fields = self.driver.find_elements("css selector", f"#{name}-line textarea, #{name}-line input")
    return fields[0].get_attribute("value") if fields else ""

  def upload(self, name: str, path: str) -> None:
    """Upload a file into the tab's image field."""
    self.wait(lambda: self.driver.find_elements("css selector", f"#{name}-image input[type=file]"))[0].send_keys(path)

  def is_clean(self) -> bool:
    """Return whether nothing is wider than the window and the page contacted no other machine."""
    elsewhere = self.driver.execute_script(
      "return performance.getEntriesByType('resource').map(e => e.name)"
      ".filter(name => !name.startsWith(location.origin) && !name.startsWith('data:'))"
    )
    return elsewhere == [] and browser.is_no_wider_than_the_window(self.driver)


@pytest.fixture
def page(driver, served):
  return Page(driver, served.address)


def test_an_image_is_generated_from_a_prompt_and_classified(page):
  assert page.line("draw") == "1 of 1, seed 0, 2 steps.", "the example"
  gallery, button = page.all(".grid-wrap")[0], page.all("#draw-button")[0]
  assert (gallery.location["y"] < button.location["y"]) or page.driver.width > 640, "on a phone the result is first"
  page.fill("Prompt", "a blue ring")
  page.fill("Images", "2")
  page.click("#seed-button")
  page.click("#draw-button")
  page.wait(lambda: page.line("draw").startswith("2 of 2") and "seed 0," not in page.line("draw"))
  page.wait(lambda: len(page.all("button.thumbnail-item img")) == 2)
  assert page.is_clean()
  page.click("#send-button")
  page.wait(lambda: page.all("#classify-image img") and "%" in page.line("classify"))
  page.click("#back-button")
  name = page.line("classify").partition(":")[0]
  page.wait(lambda: page.all("#draw-button") and name in page.text(".caption-label"))


def test_an_image_is_classified(page, tmp_path):
  path = pictures.write(tmp_path, "a.png", pictures.png(40, 30))
  page.tab("Classify")
  page.upload("classify", path)
  page.wait(lambda: page.all("#classify-image img"))
  page.fill("Class names", "red star, blue ring, cat")
  page.click("#classify-button")
  names = ("red star", "blue ring", "cat")
  page.wait(lambda: all(name in page.text("#classify-answer") for name in names))
  assert page.line("classify").partition(":")[0] in names and page.is_clean()


def test_images_are_found_by_text_and_by_an_upload(page, tmp_path):
  page.tab("Search")
  page.fill("By text", "a red star\n")  # the return key starts the search
  page.wait(lambda: len(page.all("button.thumbnail-item")) >= 12)
  scores = page.text(".caption-label")
  page.upload("search", pictures.write(tmp_path, "a.png", pictures.png(40, 30)))
  page.wait(lambda: page.all("#search-image img"))
  page.click("#search-image-button")
  page.wait(lambda: page.text(".caption-label") not in ("", scores))
  assert page.is_clean()
