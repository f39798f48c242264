"""CLIP's byte-pair tokenizer, built from the merges shipped with the package."""

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

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from diffdis_jax.errors import UserError

START = "<|startoftext|>"
END = "<|endoftext|>"
START_ID = 49406
END_ID = 49407
VOCAB_SIZE = 49408
# What a text is cut into before pairs are merged: CLIP's own pattern.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(caption: str) -> str:
  """Repairs mojibake, unescapes HTML twice, collapses white space, lowers: open_clip's default cleaning."""
  if caption.isascii() and caption.isprintable() and "&" not in caption:
    unescaped = caption  # as most are: nothing to repair
  else:
    # Twice: captions of the web are often escaped twice.
    unescaped = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return " ".join(unescaped.split()).lower()


@functools.cache
def load_merges() -> tuple[tuple[str, str], ...]:
  """The 48,894 merges that CLIP uses, in order of rank."""
  data = importlib.resources.files("diffdis_jax.data").joinpath("clip_merges.txt.gz").read_bytes()
  pairs = (line.split(" ") for line in gzip.decompress(data).decode().splitlines())
  return tuple((first, second) for first, second in pairs)


def byte_alphabet() -> list[str]:
  """One printable character for each of the 256 bytes, printable bytes first, as GPT-2 and CLIP order them."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def make_vocab(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
  """Token -> id: the bytes, the bytes that end a word, the merges, start and end of text."""
  alphabet = byte_alphabet()
  tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
  return {token: i for i, token in enumerate(tokens)}


def spell_out(text: str) -> str:
  """The lower-case text with a space inside of each START and END, so that these are read as the characters they are.

  CLIP's pattern begins a new piece at the same places, so that the spaces change no id.
  """
  return text.replace(START, "<| startoftext |>").replace(END, "<| endoftext |>") if "<|" in text else text


class Tokenizer:
  """Captions -> ids: start, tokens, end, then padding by the end token (49407), as Stable Diffusion pads.

  A caption longer than `max_length` is cut, and the end token stays last. A caption that spells out the start or the
  end token is text (not stated by the paper): OpenAI's tokenizer and transformers' take the token itself, at which the
  text would end; to open_clip's, whose tokens have other names, it is text too.

  Raises:
    UserError: when it is called with one text in the place of a list of texts.
  """

  def __init__(self, max_length: int):
    self.max_length = max_length
    self.merges = load_merges()
    self.vocab = make_vocab(self.merges)
    # The parts of transformers' CLIPTokenizer, which takes seconds to import.
    clip = tokenizers.Tokenizer(
      models.BPE(vocab=self.vocab, merges=list(self.merges), end_of_word_suffix="</w>", unk_token=END)
    )
    clip.normalizer = normalizers.Sequence(
      [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    clip.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    clip.decoder = decoders.ByteLevel()
    clip.add_special_tokens([START, END])  # which are in the vocabulary already
    clip.post_processor = processors.RobertaProcessing((END, END_ID), (START, START_ID), False, False)
    # Start and end are counted, and a caption that is too long keeps both.
    clip.enable_truncation(max_length)
    clip.enable_padding(length=max_length, pad_id=END_ID, pad_token=END)
    self._clip = clip

  def __call__(self, captions: Sequence[str]) -> Int[np.ndarray, "n l"]:
    if isinstance(captions, str):  # whose letters would be captions
      raise UserError(f"captions are the one text {captions[:50]!r}; give a list of texts, [text]")
    cleaned = [spell_out(clean(caption)) for caption in captions]
    encoded = [each.ids for each in self._clip.encode_batch_fast(cleaned)]
    return np.array(encoded, np.int32).reshape(len(captions), self.max_length)

  def cut(self, caption: str) -> str | None:
    """Return what is left of a caption of more tokens than `max_length`, start and end counted; None for any other."""
    (encoded,) = self._clip.encode_batch([spell_out(clean(caption))])
    return self.decode(np.array(encoded.ids)) if encoded.overflowing else None

  def __reduce__(self):
    # A worker of the loader builds its own, rather than get 49,408 entries by pickle.
    return Tokenizer, (self.max_length,)

  def decode(self, tokens: Int[np.ndarray, " l"]) -> str:
    """Ids -> cleaned caption, without start, end and padding."""
    return self._clip.decode(tokens.tolist(), skip_special_tokens=True).replace("</w>", " ").strip()

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes what `CLIPTokenizer.from_pretrained(folder)` reads, vocab.json and merges.txt of older versions too."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch when imported
    from transformers import CLIPTokenizer  # only here: it takes seconds

    folder = pathlib.Path(folder)
    merges: Any = list(self.merges)  # its annotation has lines of text alone
    CLIPTokenizer(vocab=self.vocab, merges=merges, model_max_length=self.max_length).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
