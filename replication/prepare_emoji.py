"""Prepare the emoji pairs: render npm tarballs of icon sets to 64 px, and write captions.

  make data/emoji/dataset_info.json

fetches the tarballs and runs

  python -m replication.prepare_emoji --source=DIR_OF_TARBALLS --out=data/emoji
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from diffdis_jax import prepare_data
from diffdis_jax.common import cli, files, machine
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.data.records import INFO
from replication import emoji

FLAGS = flags.FLAGS


def main(argv: object) -> None:
  source = pathlib.Path(FLAGS.source)

  def write(out: pathlib.Path) -> None:
    parts = emoji.find_parts(source)
    how: Any = dict(data_set=emoji.data_set(parts), num_processes=machine.cores(), finish=prepare_data.finish)
    reports = prepare(parts, out, **how)
    prepare_data.log_total(reports)

  files.publish(write, FLAGS.out, mark=INFO)


if __name__ == "__main__":
  flags.DEFINE_string("source", None, "folder of the npm tarballs", required=True)
  flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)
  cli.run(main)
