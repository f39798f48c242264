"""Raw pairs -> a TFDS folder of ArrayRecord shards, which the data source `pairs` reads.

python -m diffdis_jax.prepare_data pairs --source=DIR --out=DIR

The folder of --source holds webdataset tars in img2dataset's layout (KEY.jpg|.png|.webp, KEY.txt, KEY.json).
`train-00000.tar` goes into split train, `val-00000.tar` into split val, and a bare `00000.tar` into train. Pairs that
cannot be used are skipped, counted by reason, and reported in report.json in the folder of --out.
"""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds
from absl import flags, logging

from diffdis_jax import cli
from diffdis_jax.data import pairs
from diffdis_jax.structs import UserError

_SOURCE = flags.DEFINE_string("source", None, "folder of the tars", required=True)
_OUT = flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)


def main(argv: list[str]) -> None:
  if argv[1:] != ["pairs"]:
    usage = "python -m diffdis_jax.prepare_data pairs --source=DIR --out=DIR"
    raise UserError(f"prepare_data takes one name, pairs, not {' '.join(argv[1:]) or 'none'}: {usage}")
  tfds.disable_progress_bar()
  reports = pairs.prepare(pathlib.Path(_SOURCE.value), pathlib.Path(_OUT.value))
  for split, report in reports.items():
    logging.info("%s: %d pairs, skipped: %s", split, report.pairs, report.reasons() or "none")
    if report.truncated_tars:
      logging.warning("truncated or damaged, read as far as possible: %s", ", ".join(report.truncated_tars))
  logging.info("wrote %s and its report.json", _OUT.value)


if __name__ == "__main__":
  cli.run(main, positional=1)
