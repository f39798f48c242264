"""Serves a local web page to generate, classify and search, and to look inside a run.

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
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax import inference
from diffdis_jax.app import limits as limits_of
from diffdis_jax.app import search, step_sampler
from diffdis_jax.app.limits import Limits, read_names
from diffdis_jax.common import cli
from diffdis_jax.config import Run
from diffdis_jax.data import sources
from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.evals import prompts, tasks
from diffdis_jax.parallel import sharding
from diffdis_jax.run import restore

FLAGS = flags.FLAGS
BATCH_SIZE = 16


def define_flags() -> None:
  """Define the command line. It is defined on call, so that two verbs can be imported side by side."""
  limits = Limits()
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string(
    "data", None, "folder written by prepare_data to search; by default that of the first evaluation of images"
  )
  flags.DEFINE_string("split", None, "split of --data")
  flags.DEFINE_integer("num_images", 2000, "how many of its images are searched", lower_bound=1)
  flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 shows the page to the network")
  flags.DEFINE_integer("port", 7860, "port to listen at; 0 takes a free one", lower_bound=0, upper_bound=65535)
  flags.DEFINE_list("allowed_hosts", [], "further host names of the page, such as a proxy's")
  flags.DEFINE_float("upload_mb", limits.upload_mb, "largest upload, MB")
  flags.DEFINE_float("megapixels", limits.megapixels, "largest uploaded image, millions of pixels")
  flags.DEFINE_float("seconds", limits.seconds, "time after which a request is ended, in seconds")
  flags.DEFINE_integer("waiting", limits.waiting, "requests that may wait; further ones are refused")
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")


def main(argv: Sequence[str]) -> None:
  del argv
  # Asked for before the run is loaded, which takes long; the page itself is imported last.
  if importlib.util.find_spec("gradio") is None:
    raise not_installed("the page", "gradio", "app")
  limits = Limits(
    upload_mb=FLAGS.upload_mb,
    megapixels=FLAGS.megapixels,
    seconds=FLAGS.seconds,
    waiting=FLAGS.waiting,
  )
  cli.compilation_cache()
  serve(
    FLAGS.workdir,
    limits,
    data=FLAGS.data,
    split=FLAGS.split,
    num_images=FLAGS.num_images,
    step=FLAGS.step,
    ema=FLAGS.ema,
    host=FLAGS.host,
    port=FLAGS.port,
    allowed_hosts=FLAGS.allowed_hosts,
  )


def serve(
  run: str,
  limits: Limits,
  *,
  data: str | None,
  split: str | None,
  num_images: int,
  step: int | None,
  ema: bool,
  host: str,
  port: int,
  allowed_hosts: Sequence[str] = (),
) -> None:
  """Serve the page until SIGINT or SIGTERM.

  Args:
    run: a workdir.
    limits: of requests.
    data, split: prepared folder to search; None takes what the run's config measures on.
    num_images: of it.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    host, port: where to listen.
    allowed_hosts: names by which the page is asked for, beside its address.

  Raises:
    UserError: no such run, data or checkpoint, a run that no tab can serve, data that none searches, no name of a host,
      or nobody can listen there.
  """
  limits_of.check_names(allowed_hosts)
  # First: a taken port would show after minutes, in which the run is loaded and its first program compiled.
  with limits_of.listen(host, port) as listener:
    record = run_config.load(run)
    # For its UserError alone: a run that no tab can serve ends before its weights are read.
    step_sampler.tabs(record.objectives)
    # Once: the page names the checkpoint that it serves, also where the run saves a newer one meanwhile.
    step, ema = restore.choose(run, step, ema=ema)
    # Before the weights, too: a mistyped --data ends at once.
    source = open_data(record.evals, data, split, image_size=record.image_size)
    # One device: a request has one image, which several could not share as rows.
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    model, params = inference.load(run, step=step, ema=ema, batch_size=BATCH_SIZE, mesh=mesh)
    sampler = step_sampler.StepSampler(model, params, seconds=limits.seconds)
    index = None
    if "search" not in sampler.tabs:
      if data:
        raise UserError(f"--data={data} has no effect on this run, which cannot search; leave it out")
    elif source is not None:
      index = search.Index(sampler, source, num_images)

    preparing = threading.Thread(target=prepare, args=(sampler, index), name="prepare")
    with limits_of.uploads():
      import_gradio()
      from diffdis_jax.app import page, server

      # Its last folder alone: the page may be shown to others, whom this machine's folders do not concern.
      name = pathlib.PurePath(run).name
      contents = contents_of(record, f"{name}, checkpoint {step}{', averaged weights' if ema else ''}")
      blocks = page.build(sampler, index, limits, contents)
      preparing.start()
      try:
        server.serve(blocks, limits, listener=listener, host=host, allowed_hosts=allowed_hosts)
      finally:
        # First, since it stops the thread: else `join` would wait until every image is embedded.
        sampler.close()
        preparing.join()


def import_gradio() -> None:
  """Import it without the environment's proxy, of a kind that httpx may lack a package for. The page asks nobody."""
  names = ("no_proxy", "NO_PROXY")  # of which Python prefers the former, where it is there
  before = {name: os.environ.pop(name, None) for name in names}
  os.environ.update(dict.fromkeys(names, "*"))
  try:
    importlib.import_module("gradio")
  finally:
    for name, value in before.items():
      os.environ.pop(name)
      if value is not None:
        os.environ[name] = value


def prepare(sampler: step_sampler.StepSampler, index: search.Index | None) -> None:
  """Compile what answers take, then embed the images to search, while the page is there already."""
  try:
    sampler.warm_up()
    logging.info("every program is compiled")
  except (UserError, RuntimeError) as error:  # too large, or closed meanwhile
    if not sampler.closed.is_set():
      logging.warning("the model does not answer: %s", error)
  # After an error too: embedding takes less than generation, and says itself what it fails on.
  if index is not None:
    index.fill()


def open_data(
  evals: Mapping[str, Any], data: str | None, split: str | None, *, image_size: int
) -> sources.Source | None:
  """Open what is searched: the folder, or else the first data set whose images the run's config measures; None without
  either.

  Raises:
    UserError: no such folder or split.
  """
  if data:
    if not split:
      raise UserError("--data needs --split, the name of one of its splits")
    return sources.open_source(name="pairs", path=data, split=split, image_size=image_size)
  if split:
    raise UserError("--split is a split of --data; give --data too")
  # Images that are measured before those that generated ones are compared with, as training's often are.
  ordered = sorted(evals.values(), key=lambda section: tasks.get(section["task"]).generates)
  section = next((section["data"] for section in ordered if "data" in section), None)
  if section is None:
    return None
  try:
    return sources.open_source(**section)
  except (UserError, OSError) as error:
    # Nobody has asked for this set, which may lie where this machine cannot look: the other tabs do without it.
    logging.warning("no images to search: %s; give --data and --split", error)
    return None


def contents_of(run: Run, about: str) -> Any:
  """Return what the page's fields begin with: prompts, class names and templates of the run's own config."""
  from diffdis_jax.app import page

  zero_shot = next((each for each in run.evals.values() if each["task"] == "zero_shot"), {})
  templates = zero_shot.get("templates", ())
  # The plain prompt, where the first of many is another one.
  single = zero_shot.get("single_template") or (not isinstance(templates, str) and templates and templates[0])
  return page.Contents(
    about=about,
    prompt=run.sample_prompts[0] if run.sample_prompts else "a red star",
    names=_names_of(zero_shot.get("classnames", "")),
    template=single or prompts.TEMPLATES[0],
    steps=run.inference.generation_steps,
    guidance=run.inference.generation_guidance,
  )


def _names_of(classnames: Sequence[str] | Mapping[str, str] | str) -> str:
  """Return what the field of class names begins with: those of an evaluation, where a request may have them."""
  # A string is the path of a file, which may lie on another machine.
  if classnames and not isinstance(classnames, str):
    names = prompts.resolve_classnames(classnames).names
    joined = ", ".join(names)
    # There may be too many, and one may have a comma in it.
    with contextlib.suppress(UserError):
      if read_names(joined, Limits()) == names:
        return joined
  return "cat, dog, horse"


if __name__ == "__main__":
  define_flags()
  cli.run(main)
