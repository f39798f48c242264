"""Test that the notebook is saved with its outputs, and that every cell runs, with small and with its own sizes."""

from __future__ import annotations

import json
import re

import nbclient
import nbformat
import pytest

from docs import tour_page
from tests.command_runs import ROOT

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)

PICTURES = 8  # number of images in the outputs
SMALL = """
AUTOENCODER_STEPS, AUTOENCODER_BATCH, STEPS, BATCH = 2, 8, 2, 8
GENERATION_STEPS, GUIDANCE, TESTED = 2, 3.0, 8
SIZES = dict(
  unet=dict(widths=(8,), attention=(True,), num_heads=2, groups=4),
  alignment=dict(width=16, depth=1, num_heads=2),
  text_encoder=dict(width=16, depth=1, num_heads=2, mlp_width=16),
  autoencoder=dict(widths=(8, 8), groups=4),
)
"""


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
  return nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)


def assigned(source: str) -> set[str]:
  return set(re.findall(r"\b[A-Z_]{3,}\b", re.sub("(?m) *#.*$", "", source)))


def test_the_notebook_has_the_outputs_of_one_run_from_top_to_bottom(notebook):
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
  outputs = [output for cell in code for output in cell.outputs]
  assert {output.output_type for output in outputs} == {"display_data", "stream"}, "there is no error"
  text = "".join(output.text for output in outputs if output.output_type == "stream")
  assert not re.search(r"Warning|Traceback|(?<![\w.])/(?:home|root|tmp|usr|opt|var|Users)/", text)
  page = tour_page.markdown(json.loads((ROOT / "docs" / "tour.ipynb").read_text()))
  assert page.startswith("# ") and page.count('src="data:image/png;base64,') == PICTURES


@pytest.fixture
def run_notebook(environment, tmp_path, monkeypatch):
  """Return a function that runs a notebook in an empty folder and returns its printed text."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))

  def run(notebook: nbformat.NotebookNode) -> str:
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")

  return run


# The kernel causes these warnings; it connects to this process alone.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.full
def test_the_notebook_runs_from_top_to_bottom_and_learns(notebook, run_notebook):
  printed = run_notebook(nbformat.from_dict(notebook))
  accuracy, chance = map(float, re.findall(r"not trained on: ([\d.]+)%\nchance: ([\d.]+)%", printed)[0])
  assert accuracy > 10 * chance


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_cell_runs_in_an_empty_folder(notebook, run_notebook, tmp_path):
  notebook = nbformat.from_dict(notebook)
  (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
  assert assigned(parameters.source) == assigned(SMALL)  # so that no parameter keeps its full size
  parameters.source = SMALL
  printed = run_notebook(notebook)
  assert "top-1 of 64 classes on 8 images that were not trained on" in printed
  images, queries = map(float, re.findall(r"differ by ([\d.]+) of 1 at most, text embeddings by (\S+)", printed)[0])
  assert images <= 0.02 and queries <= 1e-5  # two of 255 levels, one of them by rounding
  written = {path.name for path in (tmp_path / "tour").iterdir()}
  assert {path.name for path in tmp_path.iterdir()} == {"tour"} and written == {"autoencoder", "diffdis", "export"}
