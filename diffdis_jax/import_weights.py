"""Imports a PyTorch checkpoint as a workdir, to generate and train from (`--config.init_from=DIR`).

  diffdis import_weights --source=stable-diffusion-v1-4 --out=runs/imported

--source is one of

  DIR                       Stable Diffusion v1 as diffusers writes it, or transformers' CLIPModel
  FILE.safetensors, .ckpt   Stable Diffusion v1 with CompVis' names, or open_clip's weights
  hf:ORG/NAME[@REVISION]    the same on the Hugging Face hub, as safetensors

Parameters that only DiffDis has are random; a run that starts from here draws them again, from its own seed.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from diffdis_jax.common import buckets, cli, files
from diffdis_jax.config import Run, base
from diffdis_jax.data.tokenizer import VOCAB_SIZE, load_vocab
from diffdis_jax.errors import UserError
from diffdis_jax.interop import from_torch, hub
from diffdis_jax.interop.from_torch import Source
from diffdis_jax.interop.tensor_files import read_json
from diffdis_jax.method.network import Network
from diffdis_jax.models import sizes
from diffdis_jax.run import checkpoint, digests, workdir
from diffdis_jax.structs import TrainState

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("source", None, "folder, file, or hf:ORG/NAME[@REVISION] on the hub", required=True)
  flags.DEFINE_string("out", None, "workdir to write; absent or empty", required=True)


def main(argv: Sequence[str]) -> None:
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator
  cli.compilation_cache()
  import_weights(FLAGS.source, FLAGS.out)


def import_weights(source: str, out: str) -> None:
  """Read a checkpoint and write a workdir, absent or empty. Raises UserError: a source that cannot be read or is of
  another kind, or `out` cannot be written."""
  folder = files.empty_folder(out)  # first: what is in the way shows before anything is read
  is_hub = source.startswith(hub.PREFIX)
  path, source = hub.fetch(source) if is_hub else (buckets.local(source, "--source"), source)
  # The digests are of what export_weights wrote. Its card may have been edited, and is not read.
  if path.is_dir() and (damage := digests.damage(path, ending=".safetensors")):
    mend = f"copy it again, or remove {digests.NAME} if that was meant"
    raise UserError(f"--source={source} is damaged: {damage.file} {damage.what}; {mend}")
  opened = from_torch.open_source(path)
  run = Run.of(make_config(opened))
  if opened.tokenizer:
    check_tokenizer(opened.tokenizer)
  network = Network.of(run)
  matched = from_torch.match(opened, network.shapes)  # by shapes: what does not fit shows before tensors are read
  new = sorted(network.shapes.keys() - matched.names.keys())
  counts = (len(matched.names), len(new), len(matched.ignored))
  logging.info("%d parameters loaded, %d initialised, %d ignored; import.json names each", *counts)
  # It runs once, so the compiler need not try hard, and what is loaded is not computed.
  draw = lambda key: {path: x for path, x in network.initialise(key).items() if path not in matched.names}
  fresh = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0)) if new else {}
  params = fresh | from_torch.read(matched)

  with files.whole_folder(folder, last={digests.COMMIT_MARK}) as temporary:
    # A run's workdir, which generate, evaluate and init_from read as any other's.
    workdir.open_for_training(str(temporary), run.to_dict())
    # What is not in `loaded` is initialised again by the run that starts from here (training/start.py).
    origin = {"source": source, "loaded": matched.names, "ignored": matched.ignored, "initialised": new}
    files.write_json(temporary / "import.json", origin)
    with checkpoint.Checkpointer(str(temporary)) as checkpointer:
      # Step 0, without an optimizer's state: nothing was trained here.
      checkpointer.save(0, TrainState(params=params), meta={"source": source})
  logging.info("%d parameters in %s", len(params), out)


def make_config(source: Source) -> ConfigDict:
  """Make a config around the source's network, computing in f32 as PyTorch does. Raises UserError: a network that
  cannot be built, or whose token ids are not CLIP's."""
  if source.is_clip:
    config = base(sizes.clip_vit_l14(), image_size=source.fields["image_size"])
    config.objectives = ("contrastive",)
  else:
    config = base(sizes.sd_v1(), image_size=256)
    text = source.model["text_encoder"]
    config.model.alignment.update(width=text["width"], num_heads=text["num_heads"])  # as in the paper, 768 and 12
    config.model.remat = "none"
  config.model.update(source.model)
  config.model.dtype = "float32"
  config.update_from_flattened_dict(source.fields)
  if (size := config.model.text_encoder.vocab_size) < VOCAB_SIZE:
    raise UserError(f"the text tower has {size} tokens; only CLIP's vocabulary of {VOCAB_SIZE} is supported")
  return config


def check_tokenizer(folder: pathlib.Path) -> None:
  """Raise UserError unless the tokenizer's vocabulary is CLIP's, in files of older or newer transformers."""
  path = next((folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).exists()), None)
  if path is None:
    raise UserError(f"{folder} has neither vocab.json nor tokenizer.json")
  vocab: Any = read_json(path)
  if path.name == "tokenizer.json":
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # of another form, which is no such vocabulary
      # The start and the end token stand beside the vocabulary there.
      vocab = vocab["model"]["vocab"] | {token["content"]: token["id"] for token in vocab.get("added_tokens", ())}
  if vocab != load_vocab():
    raise UserError(f"{path} is not CLIP's vocabulary of {VOCAB_SIZE} tokens, the only one that is supported")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
