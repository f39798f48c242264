"""Exports a run as a folder that PyTorch users can load, or to the Hugging Face hub.

  diffdis export_weights --workdir=runs/demo/diffdis --out=exported
  diffdis export_weights --workdir=runs/demo/diffdis --push=ORG/NAME --noprivate

DiffDis: `DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)` of diffusers loads the
folder. CLIP: `transformers.CLIPModel.from_pretrained` and `open_clip.create_model("local-dir:DIR")` read it.

--out=F.safetensors writes a run in one file, which is read wherever a workdir is.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from diffdis_jax import config as run_config
from diffdis_jax.common import buckets, cli, files, one_file
from diffdis_jax.config.objectives import task_of
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.interop import hub, model_card, packed, to_torch
from diffdis_jax.run import digests, provenance, restore

FLAGS = flags.FLAGS
# Fields of a run's config that say what its weights mean. CLIP has no diffusion process.
CLIP_FIELDS = ("model", "image_size", "objectives")
OWN_FIELDS = (*CLIP_FIELDS, "image_diffusion", "text_diffusion", "condition_timestep", "inference")
LICENSES = "LICENSES.md"  # as prepare_data writes it beside records
CONFIGS = {"config.json", "model_index.json", "open_clip_config.json"}  # without which nobody loads the rest


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run, or the name of a trained model", required=True)
  flags.DEFINE_string("out", None, "folder to write, absent or empty, or F.safetensors; required without --push")
  flags.DEFINE_string("push", None, "ORG/NAME on the Hugging Face hub to write to; takes a token")
  flags.DEFINE_boolean("private", True, "with --push, whether a newly created repository is private")
  flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
  flags.DEFINE_boolean("ema", True, "averaged weights, where the run keeps them")
  flags.DEFINE_enum("dtype", "float32", list(to_torch.DTYPES), "dtype of the written weights")
  flags.DEFINE_string("keep_tokens_of", "", "text file; a smaller F.safetensors has the vectors of its tokens alone")


def main(argv: Sequence[str]) -> None:
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator
  how = dict(step=FLAGS.step, ema=FLAGS.ema, dtype=FLAGS.dtype)
  in_one_file = not FLAGS.push and (FLAGS.out or "").endswith(one_file.SUFFIX)
  cli.refuse(() if FLAGS.push else ("private",), "without --push=ORG/NAME")
  cli.refuse(() if in_one_file else ("keep_tokens_of",), "without --out=F.safetensors")
  if FLAGS.push:
    push_weights(FLAGS.workdir, FLAGS.push, FLAGS.out, private=FLAGS.private, **how)
  elif not FLAGS.out:
    raise UserError("nowhere to write to; give --out=DIR, --push=ORG/NAME, or both")
  elif in_one_file:
    write_one_file(FLAGS.workdir, FLAGS.out, keep_tokens_of=FLAGS.keep_tokens_of, **how)
  else:
    export_weights(FLAGS.workdir, FLAGS.out, **how)


def push_weights(run: str, repo: str, out: str | None = None, *, private: bool = True, **how: Any) -> str:
  """Export a run to `ORG/NAME` on the Hugging Face hub, and return its address; `out` keeps the files.
  Raises UserError: as `export_weights`, which takes `how`; or no token, no network, or the hub refuses it."""
  hub.check_token(repo)  # first: a missing token shows before the export
  with files.temporary_folder("diffdis-push") as temporary:
    folder = buckets.local(out or f"{temporary}/export", "--out")
    step = export_weights(run, str(folder), repo=repo, **how)
    address = hub.push(folder, repo, private=private, message=f"Write step {step}")
  logging.info("step %d at %s", step, address)
  return address


def export_weights(
  run: str, out: str, *, step: int | None = None, ema: bool = True, dtype: str = "float32", repo: str = ""
) -> int:
  """Write a run's weights for PyTorch into a folder, absent or empty, and return their step.

  `inference.load` takes `step` and `ema`, `dtype` is a key of to_torch.DTYPES, and the model card names the `repo`.
  Raises UserError: no such checkpoint, a CLIP that their libraries cannot hold, or `out` cannot be written.
  """
  # Whatever can be refused is, before gigabytes are read.
  if out.endswith((".ckpt", ".pt", ".pth", ".bin", one_file.SUFFIX)):
    raise UserError(f"--out={out} should be a folder: PyTorch's libraries read an export as one")
  folder, fields = files.empty_folder(out), run_config.load(run).to_dict()
  is_clip = "vision_encoder" in fields["model"]
  if is_clip:
    to_torch.check_clip(fields["model"])
  step, ema = restore.choose(run, step, ema=ema)
  params = restore.restore_params(run, step=step, ema=ema)
  with files.whole_folder(folder, last=CONFIGS) as temporary:
    own = {name: fields[name] for name in (CLIP_FIELDS if is_clip else OWN_FIELDS)}
    # The tokenizer pads to the captions' length in training, which may be less than the text encoder's.
    own |= {"max_length": fields["data"]["max_length"]}
    (to_torch.write_clip if is_clip else to_torch.write)(temporary, params, own, dtype=dtype)
    if task_of(fields["objectives"]).network == "autoencoder" and not is_clip:
      logging.info("it is an autoencoder alone: the pipeline's vae encodes and decodes; it generates nothing")
    else:
      Tokenizer(own["max_length"]).save(temporary if is_clip else temporary / "tokenizer")
    digests.write(temporary)  # not of the card, in which its owner fills in a licence
    how: dict[str, Any] = dict(step=step, ema=ema, dtype=dtype, repo=repo)
    model_card.write(temporary, run=buckets.path(run), fields=fields, own=own, **how)
    if text := licences_of(run):
      (temporary / LICENSES).write_text(text, encoding="utf-8")
  logging.info("step %d in %s; README.md there says how to load it", step, out)
  return step


def write_one_file(
  run: str, out: str, *, step: int | None = None, ema: bool = True, dtype: str = "float32", keep_tokens_of: str = ""
) -> None:
  """Write a run's config, weights, provenance and results to FILE.safetensors, which is read where a workdir is.

  The vectors of the tokens in the text file `keep_tokens_of` alone are kept. All else is as for `export_weights`.
  """
  path = buckets.local(out, "--out")
  files.check_out(out)
  words = files.read_text(keep_tokens_of, "--keep_tokens_of").split() if keep_tokens_of else []
  tokens = np.unique(Tokenizer(77)(words)).tolist() if words else None  # word by word, so that nothing is too long
  fields = run_config.load(run).to_dict()
  step, ema = restore.choose(run, step, ema=ema)
  results: dict[str, Any] = {}
  for result in provenance.results(run):
    if result.record.get("protocol", {}).get("checkpoint") == step:
      results.setdefault(result.file, {}).setdefault(result.task, {})[result.dataset] = result.record
  # Without the folders of this machine, as all that leaves it.
  record = one_file.Record(
    config=provenance.public(fields),
    step=step,
    ema=ema,
    provenance=provenance.of_run(run, step=step),
    licences=licences_of(run),
    initialised=sorted(restore.initialised(run)),
    results=provenance.public(results),
  )
  params = jax.device_get(restore.restore_params(run, step=step, ema=ema))
  packed.write(path, params, record, dtype=to_torch.DTYPES[dtype], tokens=tokens)
  logging.info("step %d in %s, %.1f MB", step, out, path.stat().st_size / 1e6)
  logging.info("it stands for a workdir: --workdir=%s", shlex.quote(out))


def licences_of(run: str) -> str:
  """Return the licences of the data that a run and those that it began from were trained on, each once. They lie beside
  the records, or in a run in one file; those of a start that is gone are not known."""
  texts, seen = [], set[str]()
  try:
    while run not in seen:
      seen.add(run)  # a folder may since hold another run, which began from this one
      if (file := one_file.at(run)) is not None:
        texts.append(one_file.read_record(file).licences)
      elif run and (buckets.path(run) / "config.json").exists():
        config = run_config.load(run)
        run, lists = config.init_from, [buckets.path(path) / LICENSES for path in config.data.paths]
        texts += [file.read_text(encoding="utf-8") for file in lists if file.exists()]
  except Exception as error:  # of another machine's bucket or disk: the weights are whole all the same
    logging.warning("the licences of its data cannot be read, add them yourself: %s", error)
  return "\n".join(dict.fromkeys(filter(None, texts)))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
