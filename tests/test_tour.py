"""The notebook of docs: that it has no outputs, and that every cell runs, with small numbers for its parameters."""

from __future__ import annotations

import re

import nbclient
import nbformat
import pytest

from tests.command_runs import ROOT

pytest_plugins = ("tests.command_runs",)

SMALL = """
AUTOENCODER_STEPS, AUTOENCODER_BATCH, STEPS, BATCH = 2, 8, 2, 8
DRAWING_STEPS, GUIDANCE, TESTED = 2, 3.0, 8
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


def test_it_is_short_and_has_no_outputs(notebook):
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert len(notebook.cells) < 15 and len(code) >= 6
  assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]


# The kernel's, which speaks to this process alone.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_cell_runs_in_an_empty_folder(notebook, environment, tmp_path, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.from_dict(notebook)
  (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
  assert assigned(parameters.source) == assigned(SMALL)  # so that none is left at its full size
  parameters.source = SMALL
  client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
  client.execute()

  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
  said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
  assert "top-1 of 64 classes on 8 images that were not trained on" in said
  images, queries = map(float, re.findall(r"differ by ([\d.]+) of 1 at most, text queries by (\S+)", said)[0])
  assert images <= 0.02 and queries <= 1e-5  # two of 255 levels, one of them by rounding
  written = {path.name for path in (tmp_path / "tour").iterdir()}
  assert {path.name for path in tmp_path.iterdir()} == {"tour"} and written == {"autoencoder", "diffdis", "export"}
