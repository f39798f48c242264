"""Exports a run as a folder that PyTorch users can load, or to the Hugging Face hub.

  diffdis export_weights --workdir=runs/demo/diffdis --out=exported

DiffDis: one line of PyTorch, with diffusers and transformers alone, loads the folder:

  pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)

It generates as StableDiffusionPipeline does, which reads the folder too unless it says otherwise, and has classify,
rank, embed_images and embed_texts. The head of a long-tailed run is in head.safetensors. Of an autoencoder alone, the
pipeline has `vae`, diffusers' AutoencoderKL.

CLIP: `transformers.CLIPModel.from_pretrained` and `open_clip.create_model("local-dir:DIR")` read the folder.

Both get README.md, a model card.

A file takes a run elsewhere in this package: where a workdir is read, it may be given, as in --workdir=F.safetensors.

  diffdis export_weights --workdir=runs/demo/diffdis --out=F.safetensors --dtype=bfloat16

--push writes the same to the Hugging Face hub, as one commit:

  diffdis export_weights --workdir=runs/demo/diffdis --push=ORG/NAME --noprivate
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, cli, files, one_file
from diffdis_jax.common.params import Params
from diffdis_jax.config.objectives import task_of
from diffdis_jax.data.tokenizer import END, START, Tokenizer
from diffdis_jax.errors import UserError, may_pass
from diffdis_jax.interop import clip_to_torch, hub, to_torch
from diffdis_jax.interop.model_card import Card
from diffdis_jax.run import digests, provenance, restore

FLAGS = flags.FLAGS
# Fields of a run's config that say what its weights mean.
OWN_FIELDS = (
  "model",
  "image_size",
  "objectives",
  "image_diffusion",
  "text_diffusion",
  "condition_timestep",
  "inference",
)
LICENSES = "LICENSES.md"  # as prepare_data writes it beside records
# CLIP has no diffusion process.
CLIP_FIELDS = ("model", "image_size", "objectives")
CONFIGS = {"config.json", "model_index.json", "open_clip_config.json"}  # without which nobody loads the rest


def define_flags() -> None:
  """Define the command line. Defined on call, so that two verbs can be imported side by side."""
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string(
    "out", None, "folder to write, absent or empty, or F.safetensors for a run in one file; required without --push"
  )
  flags.DEFINE_string("push", None, "ORG/NAME on the Hugging Face hub to write to, as one commit; takes a token")
  flags.DEFINE_boolean("private", True, "with --push, whether a newly created repository is private")
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")
  flags.DEFINE_enum("dtype", "float32", list(to_torch.DTYPES), "dtype of the written weights")


def main(argv: Sequence[str]) -> None:
  del argv
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator
  how = dict(step=FLAGS.step, ema=FLAGS.ema, dtype=FLAGS.dtype)
  if FLAGS["private"].present and not FLAGS.push:
    raise UserError("--private has no effect without --push=ORG/NAME; leave it out")
  if FLAGS.out and FLAGS.out.endswith(one_file.SUFFIX):
    if FLAGS.push:
      raise UserError(f"--push writes a folder; give --out={FLAGS.out} in a call of its own")
    write_one_file(FLAGS.workdir, FLAGS.out, **how)
  elif FLAGS.push:
    push_weights(FLAGS.workdir, FLAGS.push, FLAGS.out, private=FLAGS.private, **how)
  elif FLAGS.out:
    export_weights(FLAGS.workdir, FLAGS.out, **how)
  else:
    raise UserError("nowhere to write to; give --out=DIR, --push=ORG/NAME, or both")


def push_weights(run: str, repo: str, out: str | None = None, *, private: bool = True, **how: Any) -> str:
  """Write a run's weights to the Hugging Face hub, as one commit, and return its address.

  Args:
    run: a workdir.
    repo: `ORG/NAME`; made if it is not there.
    out: folder, absent or empty, that keeps the files; None keeps none.
    private: whether a repository that has to be made is private.
    how: step, ema, dtype of `export_weights`.

  Raises:
    UserError: as `export_weights`; or no token, no network, or the hub refuses it.
  """
  push = hub.Push(repo, private=private)  # first: a missing token shows before the export
  with files.temporary_folder("diffdis-push") as temporary:
    folder = buckets.local(out or f"{temporary}/export", "--out")
    step = export_weights(run, str(folder), repo=repo, **how)
    address = push.folder(folder, message=f"Write step {step}")
  logging.info("step %d at %s", step, address)
  return address


def export_weights(
  run: str, out: str, *, step: int | None = None, ema: bool = True, dtype: str = "float32", repo: str = ""
) -> int:
  """Write a run's weights for PyTorch, and return their step.

  Args:
    run: a workdir.
    out: folder, absent or empty.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    dtype: of the files, a key of to_torch.DTYPES.
    repo: `ORG/NAME` on the hub, for the model card.

  Raises:
    UserError: no such checkpoint, a CLIP that their libraries cannot hold, or `out` cannot be written.
  """
  # Whatever can be refused is, before gigabytes are read.
  folder = files.empty_folder(out)
  fields = run_config.load(run).to_dict()
  is_clip = "vision_encoder" in fields["model"]
  if is_clip:
    clip_to_torch.check(fields["model"])
  step, ema = restore.choose(run, step, ema=ema)
  params = restore.restore_params(run, step=step, ema=ema)
  with files.whole_folder(folder, last=CONFIGS) as temporary:
    own = {name: fields[name] for name in (CLIP_FIELDS if is_clip else OWN_FIELDS)}
    # The tokenizer pads to the captions' length in training, which may be less than the text encoder's.
    own |= {"max_length": fields["data"]["max_length"]}
    (write_clip if is_clip else write_pipeline)(temporary, params, own, dtype=dtype)
    Card(run=buckets.path(run), fields=fields, own=own, step=step, ema=ema, dtype=dtype, repo=repo).write(temporary)
    if text := licences_of(run):
      (temporary / LICENSES).write_text(text, encoding="utf-8")
    digests.write(temporary)
  logging.info("step %d in %s", step, out)
  return step


def write_one_file(run: str, out: str, *, step: int | None = None, ema: bool = True, dtype: str = "float32") -> None:
  """Write a run's config, weights and provenance to one file, which is read where a workdir is.

  Args:
    run: a workdir.
    out: FILE.safetensors.
    step: which checkpoint; None takes the newest.
    ema: averaged weights, where the run keeps them.
    dtype: of the weights in it, a key of to_torch.DTYPES; they are read as float32.

  Raises:
    UserError: no such checkpoint, or `out` cannot be written.
  """
  path = buckets.local(out, "--out")
  files.check_out(out)
  fields = run_config.load(run).to_dict()
  step, ema = restore.choose(run, step, ema=ema)
  # Without the folders of this machine, as all that leaves it.
  record = one_file.Record(
    config=provenance.public(fields),
    step=step,
    ema=ema,
    provenance=provenance.of_run(run, step=step),
    licences=licences_of(run),
    initialised=sorted(restore.initialised(run)),
  )
  params = jax.device_get(restore.restore_params(run, step=step, ema=ema))
  one_file.write(path, params, record, dtype=to_torch.DTYPES[dtype])
  logging.info("step %d in %s, %.1f MB", step, out, path.stat().st_size / 1e6)


def licences_of(run: str) -> str:
  """Return the licences of the data that a run was trained on, and of the runs that it began from, each once: as a run
  in one file has them, or as they lie beside the records of its data. Of a start that is not there any more nothing is
  known."""
  texts, seen = [], set[str]()
  while run and run not in seen:
    seen.add(run)  # a folder may since hold another run, which began from this one
    if (file := one_file.at(run)) is not None:
      with _left_out():
        texts.append(one_file.read_record(file).licences)
      break
    paths, start = [], ""
    with _left_out():
      if (buckets.path(run) / "config.json").exists():
        record = run_config.load(run)
        paths, start = record.data.paths, record.init_from
    for path in paths:
      with _left_out():
        file = buckets.path(path) / LICENSES
        texts += [file.read_text(encoding="utf-8")] if file.exists() else []
    run = start
  return "\n".join(dict.fromkeys(filter(None, texts)))


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
  """Leave out the licences that cannot be read of another machine's bucket or disk, or is not in UTF-8: the weights are
  whole all the same."""
  try:
    yield
  except Exception as error:
    if not (isinstance(error, (OSError, UserError, UnicodeDecodeError)) or may_pass(error)):
      raise
    logging.warning("the licences of its data cannot be read, add them yourself: %s", error)


def write_pipeline(folder: pathlib.Path, params: Params, own: dict[str, Any], *, dtype: str) -> None:
  """Write a pipeline of diffusers.

  Args:
    own: of the run's config, OWN_FIELDS and `max_length`.
  """
  to_torch.write(
    folder,
    params,
    model=own["model"],
    image_size=own["image_size"],
    schedule=own["image_diffusion"]["schedule"],
    diffdis=own,
    dtype=dtype,
  )
  # What is missing is said, since a pipeline loads without it.
  if task_of(own["objectives"]).is_autoencoder:
    logging.info("it is an autoencoder alone: the pipeline's vae encodes and decodes; it generates nothing")
    return
  write_tokenizer(folder / "tokenizer", own["max_length"])
  if not (folder / to_torch.FILES["diffdis"]).exists():
    logging.info("it was not trained for discrimination: the pipeline generates and does not classify")


def write_clip(folder: pathlib.Path, params: Params, own: dict[str, Any], *, dtype: str) -> None:
  """Write a CLIP model for transformers and for open_clip; `own` is CLIP_FIELDS and `max_length`."""
  size = {"image_size": own["image_size"], "max_length": own["max_length"]}
  clip_to_torch.write(folder, params, model=own["model"], **size, dtype=dtype)
  write_tokenizer(folder, own["max_length"])


def write_tokenizer(folder: pathlib.Path, max_length: int) -> None:
  """Write CLIP's tokenizer, in the files of older and newer transformers."""
  folder.mkdir(exist_ok=True)
  Tokenizer(max_length).save(folder)
  # As in CLIP's own files: the end token pads, and stands for what is unknown.
  special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
  (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
