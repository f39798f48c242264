"""Show the notebook with its outputs as the page tour.md. mkdocs.yml names this file as a hook."""

from __future__ import annotations

import json
import pathlib
from typing import Any


def on_files(files: Any, config: Any) -> Any:
  """Add the page, for which there is no file."""
  from mkdocs.structure.files import File  # imported here, so that tests need no mkdocs

  notebook = (pathlib.Path(config.docs_dir) / "tour.ipynb").read_text(encoding="utf-8")
  files.append(File.generated(config, "tour.md", content=markdown(json.loads(notebook))))
  return files


def markdown(notebook: dict[str, Any]) -> str:
  """Convert the notebook to Markdown: text, then code and its output as blocks, and pictures inside the page."""
  parts = []
  for cell in notebook["cells"]:
    source = "".join(cell["source"])
    parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts += map(_shown, cell.get("outputs", ()))
  return "\n\n".join(parts)


def _shown(output: dict[str, Any]) -> str:
  data = output.get("data", {})
  if "image/png" in data:
    return f'<img alt="Output of the cell above" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
  return "```text\n{}\n```".format("".join(output.get("text", data.get("text/plain", ""))).rstrip())
