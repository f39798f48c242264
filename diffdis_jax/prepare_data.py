"""Raw pairs -> a TFDS folder of ArrayRecord shards, which the data source `pairs` reads.

python -m diffdis_jax.prepare_data pairs --source=DIR --out=DIR

DIR of --source holds webdataset tars in img2dataset's layout (KEY.jpg|.png|.webp, KEY.txt, KEY.json). `train-00000.tar`
goes into split train, `val-00000.tar` into split val, and a bare `00000.tar` into train. Pairs that cannot be used are
skipped, counted by reason and reported in DIR/report.json of --out.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping

from absl import flags, logging

from diffdis_jax import cli
from diffdis_jax.data.webdataset import split_of
from diffdis_jax.structs import UserError

_SOURCE = flags.DEFINE_string("source", None, "folder of the tars", required=True)
_OUT = flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)

_USAGE = "python -m diffdis_jax.prepare_data pairs --source=DIR --out=DIR"


def main(argv: list[str]) -> None:
  if argv[1:] != ["pairs"]:
    raise UserError(f"prepare_data takes one name, pairs, not {' '.join(argv[1:]) or 'none'}: {_USAGE}")
  reports = prepare_pairs(pathlib.Path(_SOURCE.value), pathlib.Path(_OUT.value))
  for split, report in reports.items():
    skipped = ", ".join(f"{count} with {reason}" for reason, count in report["skipped"].items()) or "none"
    logging.info("%s: %d pairs, skipped: %s", split, report["pairs"], skipped)
    for tar in report["truncated_tars"]:
      logging.warning("%s ends early: it is truncated or damaged", tar)
  logging.info("wrote %s", _OUT.value)


def prepare_pairs(source: pathlib.Path, out: pathlib.Path) -> Mapping[str, dict]:
  """Writes folder `out`, whole or not at all.

  Returns:
    What became of each split: fields of data.pairs.SplitReport.

  Raises:
    UserError: no tars, tars of unknown split, `out` not empty, or a split without one usable pair.
  """
  from diffdis_jax.data.pairs import Pairs  # here, so that a wrong flag need not wait for TFDS

  tars = find_tars(source)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists and is not an empty folder; name a new one")
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
    builder = Pairs(tars=tars, data_dir=temporary)
    builder.download_and_prepare()
    reports = {split: dataclasses.asdict(report) for split, report in builder.reports.items()}
    folder = pathlib.Path(builder.data_dir)
    (folder / "report.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    folder.replace(out)
  return reports


def find_tars(source: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Split -> its tars, by name.

  Raises:
    UserError: no folder, no tars in it, or a tar whose name gives no split.
  """
  if not source.is_dir():
    raise UserError(f"no folder {source}; --source is a folder of webdataset tars")
  tars = collections.defaultdict(list)
  for path in sorted(source.glob("*.tar")):
    split = split_of(path)
    if split is None or split == "all":
      raise UserError(f"cannot tell the split of {path.name}; name tars SPLIT-00000.tar, SPLIT not 'all', or 00000.tar")
    tars[split].append(path)
  if not tars:
    raise UserError(f"no .tar files in {source}; --source is a folder of webdataset tars, such as img2dataset writes")
  return dict(tars)


if __name__ == "__main__":
  cli.run(main)
