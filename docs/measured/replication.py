"""Keeps what an experiment of docs/replication/protocol.md has measured.

  python -m docs.measured.replication --tables=runs/e1/tables.json

writes the figures of every arm by seed into replication.json beside this file, with where they come from: the
provenance of all, and of each run its config hash, seed, steps, minutes and the runs that it started from.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from diffdis_jax.common import files
from docs.measured import records

FLAGS = flags.FLAGS
FILE = records.HERE / "replication.json"
PAGE = "replication/protocol.md"
ABOUT = "Experiments of docs/replication/protocol.md: figures of each arm by seed. Written by replication.py."


def records_of(summary: Mapping[str, Any]) -> dict[str, Any]:
  """What is kept of a tables.json.

  Returns:
    records: `EXPERIMENT/ARM/COLUMN` -> a `records.Record`'s fields.
    settings: EXPERIMENT -> what its records have in common.
    runs: of each run, by name.
    claims: as the table has them.
  """
  (experiment, table), *_ = summary["tables"].items()
  settings = {"base": summary["base"], "seeds": summary["seeds"], **summary["provenance"]}
  found = {
    f"{experiment}/{row['label']}/{column}": {
      "what": f"{row['label']}: {summary['columns'][column]}",
      "unit": "%",
      "values": cell["values"],
      "of": {"settings": experiment, "runs": row["runs"]},
      "page": PAGE,
    }
    for row in table["rows"]
    for column, cell in row["cells"].items()
    if cell["n"]
  }
  runs = {
    name: {"minutes": run["minutes"], "start": run["start"], **(run["provenance"] or {})}
    for name, run in summary["runs"].items()
  }
  return {"settings": {experiment: settings}, "records": found, "runs": runs, "claims": {experiment: summary["claims"]}}


def merged(there: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """The file's content with the records of another experiment, or in place of its older ones."""
  (experiment,) = new["settings"]
  kept = {name: each for name, each in there.get("records", {}).items() if not name.startswith(f"{experiment}/")}
  whole = {part: {**there.get(part, {}), **new[part]} for part in ("settings", "runs", "claims")}
  return {"about": ABOUT, **whole, "records": {**kept, **new["records"]}}


def main(argv: Sequence[str]) -> None:
  del argv
  there = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
  files.write_json(FILE, merged(there, records_of(files.read_json(pathlib.Path(FLAGS.tables)))))


if __name__ == "__main__":
  flags.DEFINE_string("tables", None, "tables.json of `ablate table`", required=True)
  app.run(main)
