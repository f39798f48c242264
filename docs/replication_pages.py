"""Add the pages of replication/, which is beside docs/, to the site. mkdocs.yml names this file as a hook."""

from __future__ import annotations

import pathlib
from typing import Any


def on_files(files: Any, config: Any) -> Any:
  """Add every Markdown file of replication/ under the same path."""
  from mkdocs.structure.files import File  # imported here, so that tests need no mkdocs

  root = pathlib.Path(config.docs_dir).parent
  for path in sorted((root / "replication").rglob("*.md")):
    name = str(path.relative_to(root))
    files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Convert links between docs/ and replication/ from paths in the repository to paths on the site."""
  if page.file.src_uri.startswith("replication/"):
    return markdown.replace("../docs/", "../")
  return markdown.replace("](../replication/", "](replication/")
