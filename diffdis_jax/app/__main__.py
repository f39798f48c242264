"""Serves a local web page to generate, classify and search.

  diffdis app --workdir=runs/demo/diffdis

It needs the extra `app`: pip install -e '.[app]' in the repository's folder. The page is at http://127.0.0.1:7860, and
only this machine can open it unless --host says otherwise. It has the tabs that the run can serve: a run without
generation has no tab to generate; CLIP has classify and search.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.app import step_sampler
from diffdis_jax.common import cli, files
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.evals import tasks
from diffdis_jax.parallel import sharding
from diffdis_jax.run import restore

FLAGS = flags.FLAGS
BATCH_SIZE = 16
UPLOAD_MB = 10.0  # of the largest file
SECONDS = 120.0  # after which a request is ended
FOLDER = "GRADIO_TEMP_DIR"  # the variable that tells Gradio where uploads lie, which it reads when it is imported


def define_flags() -> None:
  """Define the command line. It is defined on call, so that two verbs can be imported side by side."""
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string(
    "data", None, "folder written by prepare_data to search; by default that of the first evaluation of images"
  )
  flags.DEFINE_string("split", None, "split of --data")
  flags.DEFINE_integer("num_images", 2000, "how many of its images are searched", lower_bound=1)
  flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 shows the page to the network")
  flags.DEFINE_integer("port", 7860, "port to listen at; 0 takes a free one", lower_bound=0, upper_bound=65535)
  flags.DEFINE_list("allowed_hosts", [], "further host names of the page, such as a proxy's")
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")


def main(argv: Sequence[str]) -> None:
  """Serve the page until SIGINT or SIGTERM."""
  del argv
  if importlib.util.find_spec("gradio") is None:
    raise not_installed("the page", "gradio", "app")
  for name in FLAGS.allowed_hosts:
    if "://" in name or re.search(r"[/*]|^[^:]*:\d+$", name):
      raise UserError(f"--allowed_hosts={name} is no host's name; give it alone, such as page.example")
  cli.compilation_cache()
  with uploads(), listen(FLAGS.host, FLAGS.port) as listener:
    serve(listener)


def serve(listener: socket.socket) -> None:
  """Load the run and serve its page."""
  from diffdis_jax.app import answers, page, server

  # In this order: a run that no tab can serve, and a mistyped --data, end before weights are read.
  run = run_config.load(FLAGS.workdir)
  step_sampler.tabs(run.objectives)
  source = open_data(run.evals, FLAGS.data, FLAGS.split, image_size=run.image_size)
  # Once: the page names the checkpoint that it serves, also where the run saves a newer one meanwhile.
  step, ema = restore.choose(FLAGS.workdir, FLAGS.step, ema=FLAGS.ema)
  # One device: a request has one image, which several could not share as rows.
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  model, params = inference.load(FLAGS.workdir, step=step, ema=ema, batch_size=BATCH_SIZE, mesh=mesh)
  sampler = step_sampler.StepSampler(model, params, seconds=SECONDS)
  if FLAGS.data and "search" not in sampler.tabs:
    raise UserError(f"--data={FLAGS.data} has no effect on this run, which cannot search; leave it out")
  index = answers.Index(sampler, source, FLAGS.num_images) if source and "search" in sampler.tabs else None
  # Its last folder alone: the page may be shown to others, whom this machine's folders do not concern.
  about = f"{pathlib.PurePath(FLAGS.workdir).name}, checkpoint {step}{', averaged weights' if ema else ''}"
  blocks = page.build(sampler, index, run, about)
  embedding = threading.Thread(target=index.fill, name="search") if index else None
  try:
    if embedding:
      embedding.start()
    server.serve(blocks, UPLOAD_MB, listener=listener, host=FLAGS.host, allowed_hosts=FLAGS.allowed_hosts)
  finally:
    # First, since it stops the thread: else `join` would wait until every image is embedded.
    sampler.closed.set()
    if embedding:
      embedding.join()


def open_data(
  evals: Mapping[str, Any], data: str | None, split: str | None, *, image_size: int
) -> sources.Source | None:
  """Open what is searched: the folder, or else the first data set whose images the run's config measures; None without
  either.

  Raises UserError: no such folder or split.
  """
  if bool(data) != bool(split):
    raise UserError("--data and --split go together: a folder written by prepare_data, and one of its splits")
  if data:
    return sources.open_source(name="pairs", path=data, split=split, image_size=image_size)
  # Images that are measured before those that generated ones are compared with, as training's often are.
  ordered = sorted(evals.values(), key=lambda section: tasks.get(section["task"]).generates)
  section = next((section["data"] for section in ordered if "data" in section), None)
  try:
    return None if section is None else sources.open_source(**section)
  except (UserError, OSError) as error:
    # Nobody has asked for this set, which may lie where this machine cannot look: the other tabs do without it.
    logging.warning("no images to search: %s; give --data and --split", error)
    return None


def listen(host: str, port: int) -> socket.socket:
  """Take the port; 0 for any that is free. Raises UserError: nobody can listen there, such as beside another page."""
  name = host.strip("[]")  # with or without, as addresses have them
  listener = socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET)
  try:
    # As servers ask for it: a port whose last connections are not forgotten yet is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((name, port))
  except OSError as error:
    listener.close()
    raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}; take another --port or --host") from error
  return listener


@contextlib.contextmanager
def uploads() -> Iterator[None]:
  """Give Gradio a new folder for uploads, in $GRADIO_TEMP_DIR or the system's for temporary files, and remove it."""
  if given := os.environ.get(FOLDER):
    os.makedirs(given, exist_ok=True)
  with files.temporary_folder("diffdis-page", given) as folder:
    os.environ[FOLDER] = os.fspath(folder)
    yield


if __name__ == "__main__":
  define_flags()
  cli.run(main)
