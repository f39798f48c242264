"""Prepare the emoji: npm tarballs of icon sets, rendered to 64 px, with captions.

  make data/emoji/dataset_info.json

fetches the tarballs and runs

  python -m replication.prepare_emoji --source=DIR_OF_TARBALLS --out=data/emoji
"""

from __future__ import annotations

import pathlib

import tensorflow_datasets as tfds
from absl import flags

from diffdis_jax import prepare_data
from diffdis_jax.common import cli, machine
from diffdis_jax.data.prepare import builder
from replication import emoji

FLAGS = flags.FLAGS


def main(argv: object) -> None:
  source = pathlib.Path(FLAGS.source)

  def write(out: pathlib.Path) -> None:
    settings = builder.Settings(num_processes=machine.cores())
    prepare_data.log_total(builder.prepare(emoji.find_parts(source), out, builder=emoji.Emoji, settings=settings))
    prepare_data.write_card(out)

  tfds.disable_progress_bar()  # it would write over ours
  prepare_data.publish(write, FLAGS.out, finished="card.json")


if __name__ == "__main__":
  flags.DEFINE_string("source", None, "folder of the npm tarballs", required=True)
  flags.DEFINE_string("out", None, "folder to write; absent or empty", required=True)
  cli.run(main)
