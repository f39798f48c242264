"""CLIP's byte-pair tokenizer, read from the tokenizer.json shipped with the package."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from diffdis_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
VOCAB_SIZE = 49408


def clean(caption: str) -> str:
  """Clean as open_clip does: repair mojibake, unescape HTML twice, collapse white space, lower."""
  if caption.isascii() and caption.isprintable() and "&" not in caption:
    unescaped = caption  # as most are: nothing to repair
  else:
    import ftfy  # here, since few captions need it

    # Twice: captions of the web are often escaped twice.
    unescaped = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return " ".join(unescaped.split()).lower()


@functools.cache
def load() -> dict[str, Any]:
  """Read tokenizer.json, the parts of transformers' CLIPTokenizer, which takes seconds to import."""
  data = importlib.resources.files("diffdis_jax.data").joinpath("clip_tokenizer.json.gz").read_bytes()
  return json.loads(gzip.decompress(data))


def load_vocab() -> dict[str, int]:
  """Return the id of each token."""
  return load()["model"]["vocab"]


def spell_out(text: str) -> str:
  """Put a space inside of each START and END of a lower-case text, so that they are read as the characters they are.
  CLIP's pattern begins a new piece at the same places, so that the spaces change no id."""
  return text.replace(START, "<| startoftext |>").replace(END, "<| endoftext |>") if "<|" in text else text


class Tokenizer:
  """Captions -> ids: start, tokens, end, then padding by the end token (49407), as Stable Diffusion pads.

  A caption longer than `max_length` is cut, and the end token stays last. A caption that spells out the start or the
  end token is text (not stated by the paper), as to open_clip's tokenizer: to OpenAI's and transformers' it is the
  token itself, at which the text would end. A call with one text in the place of a list of them raises UserError.
  """

  def __init__(self, max_length: int):
    self.max_length = max_length
    self.vocab = load_vocab()
    clip = tokenizers.Tokenizer.from_str(json.dumps(load()))
    # Start and end are counted, and a caption that is too long keeps both.
    clip.enable_truncation(max_length)
    clip.enable_padding(length=max_length, pad_id=END_ID, pad_token=END)
    self._clip = clip

  def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "n l"]:
    if isinstance(captions, str):  # whose letters would be captions
      raise UserError(f"captions are the one text {captions[:50]!r}; give a list of texts, [text]")
    cleaned = [spell_out(clean(caption)) for caption in captions]
    encoded = [encoding.ids for encoding in self._clip.encode_batch_fast(cleaned)]
    return np.array(encoded, np.int32).reshape(len(captions), self.max_length)

  def cut(self, caption: str) -> str | None:
    """Return what is left of a caption of more tokens than `max_length`, start and end counted; None for any other."""
    (encoded,) = self._clip.encode_batch([spell_out(clean(caption))])
    return self.decode(np.array(encoded.ids)) if encoded.overflowing else None

  def __reduce__(self):
    # A worker of the loader builds its own, rather than get 49,408 entries by pickle.
    return Tokenizer, (self.max_length,)

  def decode(self, tokens: Int[np.ndarray, " l"]) -> str:
    """Return the cleaned caption of ids, without start, end and padding."""
    return self._clip.decode(tokens.tolist(), skip_special_tokens=True).replace("</w>", " ").strip()

  def save(self, folder: str | pathlib.Path) -> None:
    """Write what `CLIPTokenizer.from_pretrained(folder)` reads, vocab.json and merges.txt of older versions too."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch when imported
    from transformers import CLIPTokenizer  # only here: it takes seconds

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = load()["model"]["merges"]
    merges: Any = [tuple(pair) for pair in pairs]  # its annotation has lines of text alone
    CLIPTokenizer(vocab=self.vocab, merges=merges, model_max_length=self.max_length).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # As in CLIP's own files: the end token pads, and stands for what is unknown.
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
