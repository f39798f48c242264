"""Prepares raw image-text pairs as a data set of ArrayRecord files.

  diffdis prepare_data cc3m --source=cc3m_tars --out=data/cc3m

The data set is a TFDS folder, which data.name=pairs reads. Pairs that cannot be used are skipped and counted by reason
in report.json. A killed command resumes when it is run again, and ends in the same records. card.png shows some pairs.
The first argument says what --source is:

  files               your own pictures: x.jpg with x.txt or x.caption, CLASS/x.jpg, a .csv or
                      .jsonl of file names and captions, parquet, or a folder of Hugging Face
                      datasets' save_to_disk; a share of the pairs is held out as split `val`
  pairs, cc3m         webdataset tars SPLIT-00000.tar as img2dataset writes them:
                      KEY.jpg, .png or .webp, KEY.txt, KEY.json
  coco                annotations/captions_*.json and the images, or Karpathy's dataset_coco.json
  flickr30k           Karpathy's dataset_flickr30k.json and the images
  folder              CLASS/IMAGE or SPLIT/CLASS/IMAGE
  torchvision NAME    one of the twelve zero-shot sets, in the folder that torchvision's class reads

`latents` stores a run's latents of --views augmented views of each image of a prepared data set, for training with
data.name=latents at that image size:

  diffdis prepare_data latents --workdir=RUN --data=DIR --out=DIR2 --views=4 \\
      --augment='{"crop": "random"}'
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, cli, files, machine
from diffdis_jax.config.data import Augmentation
from diffdis_jax.config.model import Model
from diffdis_jax.config.section import check_type, read_section
from diffdis_jax.data import records, transforms
from diffdis_jax.data.layouts import find
from diffdis_jax.data.prepare import latents, own, parts, published, tables, zero_shot_sets
from diffdis_jax.data.prepare.write import PAIRS, DataSet, Report, Stage, prepare
from diffdis_jax.errors import UserError, parse_json
from diffdis_jax.run import digests

# name -> the config that trains on it, up to its folder
NEXT = {"cc3m": "diffdis_cc3m:path=", "latents": "diffdis_cc3m:latents="}
NEXT |= dict.fromkeys(("files", "folder", "pairs"), "own:path=")
# name -> how its raw data are found, what it is
DATA_SETS: dict[str, tuple[Callable[[pathlib.Path], list[parts.Part]], DataSet]] = {
  "files": (lambda source: own.find_parts(source, _asked()), own.OWN),
  "pairs": (parts.tars, PAIRS),
  "cc3m": (published.find_cc3m, published.CC3M),
  "coco": (published.find_coco, published.COCO),
  "flickr30k": (published.find_flickr30k, published.FLICKR30K),
  "folder": (own.classes, own.CLASSES),
  **{name: (functools.partial(zero_shot_sets.find_parts, name), zero_shot_sets.ZERO_SHOT) for name in find.LABELLED},
}
NAMES = (*(name for name in DATA_SETS if name not in find.LABELLED), "torchvision", "latents")
# Flag -> the names that take it; refused of others.
TAKERS: dict[str, tuple[str, ...]] = {
  **dict.fromkeys(("caption_fields", "captions", "held_out"), ("files",)),
  **dict.fromkeys(("workdir", "data", "views", "augment", "image_size", "batch_size"), ("latents",)),
  **dict.fromkeys(("source", "short_side", "num_processes", "beam_pipeline_options"), tuple(DATA_SETS)),
}

SHEET, TILE, EXAMPLES = 64, 128, 16  # pairs of card.png, pixels of a picture in it, and captions of card.json
FLAGS = flags.FLAGS


def _asked() -> tables.Asked:
  return tables.Asked(caption_fields=tuple(FLAGS.caption_fields), held_out=FLAGS.held_out, captions=FLAGS.captions)


def define_flags() -> None:
  flags.DEFINE_string("out", None, "folder to write; absent or empty; in a bucket, by way of the user's cache folder")
  flags.DEFINE_string("source", None, "folder of the raw data")
  side = f"short side of larger images, then JPEG; 0 keeps all bytes. By default {published.SHORT_SIDE} for cc3m, or 0"
  flags.DEFINE_integer("short_side", None, side, lower_bound=0)
  flags.DEFINE_integer("num_processes", None, "processes that prepare; by default one a core", lower_bound=1)
  flags.DEFINE_list("beam_pipeline_options", [], "name=value,...: run by Apache Beam instead")
  flags.DEFINE_list("caption_fields", [], "columns whose texts are the captions")
  flags.DEFINE_enum("captions", "", ["", "filename", "folder"], "name of each picture that is its caption")
  share = "share of the pairs for split `val`, at least one pair; 0 for none"
  flags.DEFINE_float("held_out", tables.HELD_OUT, share, lower_bound=0.0, upper_bound=0.5)
  flags.DEFINE_string("workdir", None, "run or import whose autoencoder encodes the images")
  flags.DEFINE_string("data", None, "prepared data set")
  flags.DEFINE_integer("views", 1, "views of each image", lower_bound=1, upper_bound=1000)
  flags.DEFINE_string("augment", None, 'JSON such as {"crop": "random"}; by default data.augment of the run')
  flags.DEFINE_integer("image_size", None, "pixels of a view, as in the training to come; by default the run's")
  flags.DEFINE_integer("batch_size", 64, "views encoded at a time", lower_bound=1)


def main(argv: list[str]) -> None:
  name = _name(argv[1:])
  cli.refuse((flag for flag, takers in TAKERS.items() if name not in takers), f"on prepare_data {name}")
  if name == "latents":
    write = functools.partial(write_latents, _given("workdir", name), _given("data", name))
  else:
    write = functools.partial(write_pairs, name, buckets.local(_given("source", name), "--source"))
  files.publish(write, out := _given("out", name), mark=records.INFO)
  if name in NEXT:
    logging.info("to train on it: diffdis train --config=%s --workdir=RUN", shlex.quote(NEXT[name] + out))


def _name(words: Sequence[str]) -> str:
  """Return the name of the data set that the command line asks for. Raises UserError: there is none."""
  command, known, example = "prepare_data", NAMES, "cc3m"
  if words[:1] == ["torchvision"]:
    command, known, example, words = "prepare_data torchvision", find.LABELLED, "pets", words[1:]
  if (given := " ".join(words)) not in known:
    usage = f"diffdis {command} {example} --source=DIR --out=DIR"
    raise UserError(f"{command} takes one name of {', '.join(known)}, not {given or 'none'}: {usage}")
  return given


def write_pairs(name: str, source: pathlib.Path, out: pathlib.Path) -> None:
  """Prepare the data set of this name from the raw data in `source`."""
  find_parts, data_set = DATA_SETS[name]
  default = published.SHORT_SIDE if name == "cc3m" else 0
  short_side = (default if FLAGS.short_side is None else FLAGS.short_side) or None  # 0, too, keeps the bytes
  stage, count = functools.partial(Stage, short_side=short_side), FLAGS.num_processes or machine.cores()
  how: dict[str, Any] = dict(num_processes=count, beam_options=FLAGS.beam_pipeline_options, finish=finish)
  log_total(prepare(find_parts(source), out, data_set=data_set, make_stage=stage, **how))


def finish(folder: pathlib.Path) -> None:
  """Write card.png of some pairs of a data set's first split, card.json of their captions, and last all digests."""
  from diffdis_jax.evals import samples  # here, since the processes of the preparation import this file too

  source = records.open_pairs(folder, split=next(iter(records.read_info(folder).splits)), num_images=None)
  # Evenly apart and not at random, so that the same folder has the same card.
  places = np.unique(np.linspace(0, len(source) - 1, min(len(source), SHEET)).astype(int))
  pairs = [source[place] for place in places.tolist()]
  captions = [pair["caption"] for pair in pairs]
  images = np.stack([np.asarray(transforms.resize(records.read_image(pair["image"]), TILE)) for pair in pairs])
  samples.save_grid(images, captions, folder / "card.png")
  files.write_json(folder / "card.json", {"captions": list(dict.fromkeys(captions))[:EXAMPLES]})
  digests.write(folder)


def log_total(reports: Mapping[str, Report]) -> None:
  """Log what became of all pairs, in one line."""
  total = Report()
  for report in reports.values():
    total.add(report)
  by_split = ", ".join(f"{split} {report.pairs:,}" for split, report in reports.items())
  logging.info("%d pairs (%s); skipped: %s", total.pairs, by_split, total.reasons() or "none")


def write_latents(run: str, data: str, out: pathlib.Path) -> None:
  """Encode every image of a prepared data set by a run's autoencoder, in this process."""
  from diffdis_jax import inference  # here, since the processes of the preparation import this file too
  from diffdis_jax.data import encoders

  parts_of_data = latents.find_parts(data)  # first: a wrong folder shows before weights are read
  model, params = inference.load(run, image_size=FLAGS.image_size, batch_size=FLAGS.batch_size)
  h, w, c = model.network.latent_shape
  assert isinstance(sizes := model.network.model, Model)  # CLIP has no noise
  own = dataclasses.asdict(run_config.load(run).data.augment)
  fields = parse_json(FLAGS.augment, f"--augment={FLAGS.augment}") if FLAGS.augment else own
  check_type("augment", fields, dataclasses.asdict(Augmentation()))  # as a config's, before its ranges
  augmentation = read_section(Augmentation, fields, "augment")
  if FLAGS.views > 1 and not augmentation.varies:
    mend = """give an --augment that varies, such as '{"crop": "random"}', or leave out --views"""
    raise UserError(f"--views={FLAGS.views} of an image would all be the same; {mend}")
  stage = functools.partial(
    latents.LatentStage,
    encode=functools.partial(model.moments, params),
    shape=(h, w, 2 * c),  # mean and log-variance
    image_size=model.image_size,
    views=FLAGS.views,
    augmentation=augmentation,
    fingerprint=encoders.autoencoder_digest(params, sizes),
    images=digests.fingerprint(data, part=digests.RECORDS),
  )
  log_total(prepare(parts_of_data, out, data_set=latents.data_set(data), finish=digests.write, make_stage=stage))


def _given(flag: str, name: str) -> str:
  """Return the value of a flag that this data set needs."""
  value = FLAGS[flag].value
  if not value:
    raise UserError(f"prepare_data {name} needs --{flag}=DIR: {FLAGS[flag].help}")
  return value


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=2)
