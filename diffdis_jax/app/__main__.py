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
UPLOAD_MB = 10.0  # largest file that may be uploaded
SECONDS = 120.0  # a request is ended after this time
FOLDER = "GRADIO_TEMP_DIR"  # Gradio reads the folder of uploads from this variable when it is imported


def define_flags() -> None:
  """Define the command's flags. This is a function, so that two commands can be imported side by side."""
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

  # In this order, a run that no tab can serve or a mistyped --data ends the command before weights are read.
  run = run_config.load(FLAGS.workdir)
  step_sampler.tabs(run.objectives)
  source = open_data(run.evals, FLAGS.data, FLAGS.split, image_size=run.image_size)
  # Choose the checkpoint once: the page names it, and the run may save a newer one meanwhile.
  step, ema = restore.choose(FLAGS.workdir, FLAGS.step, ema=FLAGS.ema)
  # Use one device: a request has one image, which cannot be split over devices.
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  model, params = inference.load(FLAGS.workdir, step=step, ema=ema, batch_size=BATCH_SIZE, mesh=mesh)
  sampler = step_sampler.StepSampler(model, params, seconds=SECONDS)
  if FLAGS.data and "search" not in sampler.tabs:
    raise UserError(f"--data={FLAGS.data} has no effect on this run, which cannot search; leave it out")
  index = answers.Index(sampler, source, FLAGS.num_images) if source and "search" in sampler.tabs else None
  # Show only the folder's name: other people may see the page, and this machine's paths are not their business.
  about = f"{pathlib.PurePath(FLAGS.workdir).name}, checkpoint {step}{', averaged weights' if ema else ''}"
  blocks = page.build(sampler, index, run, about)
  embedding = threading.Thread(target=index.fill, name="search") if index else None
  try:
    if embedding:
      embedding.start()
    server.serve(blocks, UPLOAD_MB, listener=listener, host=FLAGS.host, allowed_hosts=FLAGS.allowed_hosts)
  finally:
    # First, since this stops the thread: otherwise `join` would wait until every image is embedded.
    sampler.closed.set()
    if embedding:
      embedding.join()


def open_data(
  evals: Mapping[str, Any], data: str | None, split: str | None, *, image_size: int
) -> sources.Source | None:
  """Open the images to search: the given folder, or the first data set of the config's evaluations, or None without
  either.

  Raises UserError: no such folder or split.
  """
  if bool(data) != bool(split):
    raise UserError("--data and --split go together: a folder written by prepare_data, and one of its splits")
  if data:
    return sources.open_source(name="pairs", path=data, split=split, image_size=image_size)
  # Prefer images that an evaluation classifies to images that it compares with generated ones, as training's often are.
  ordered = sorted(evals.values(), key=lambda section: tasks.get(section["task"]).generates)
  section = next((section["data"] for section in ordered if "data" in section), None)
  try:
    return None if section is None else sources.open_source(**section)
  except (UserError, OSError) as error:
    # The user did not ask for this data set, which may be on another machine: the other tabs work without it.
    logging.warning("no images to search: %s; give --data and --split", error)
    return None


def listen(host: str, port: int) -> socket.socket:
  """Listen at a port; 0 takes any free one. Raises UserError: the port is in use, or cannot be used."""
  name = host.strip("[]")  # addresses may have brackets
  listener = socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET)
  try:
    # Usual for servers: a port whose last connections have just closed counts as free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((name, port))
    listener.listen()  # from now on a browser waits for the page, where it would be refused
  except OSError as error:
    listener.close()
    raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}; take another --port or --host") from error
  return listener


@contextlib.contextmanager
def uploads() -> Iterator[None]:
  """Give Gradio a new folder for uploads, in $GRADIO_TEMP_DIR or the system's temporary folder, and remove it at the
  end."""
  if previous := os.environ.get(FOLDER):
    os.makedirs(previous, exist_ok=True)
  with files.temporary_folder("diffdis-page", previous) as folder:
    os.environ[FOLDER] = os.fspath(folder)
    yield


if __name__ == "__main__":
  define_flags()
  cli.run(main)
