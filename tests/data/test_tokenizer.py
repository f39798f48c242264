"""Test that the tokenizer's ids equal open_clip's, and transformers' after it reads a saved folder."""

import subprocess
import sys

import numpy as np
import pytest

from diffdis_jax.data.tokenizer import END_ID, START_ID, Tokenizer, clean
from diffdis_jax.errors import UserError

SENTENCES = (
  "a small red star on the left",
  "A Photo of a DOG.",
  "",
  "   \t\n ",
  "it's, they're, I'd, we'll, I've, I'm, don't",
  "IT’S “curly” ‘quotes’ — and dashes…",
  "Tom &amp; Jerry",
  "Tom &amp;amp; Jerry &lt;3",
  "Tom <3 &amp;amp; Jerry",  # beside a bare <, ftfy unescapes nothing
  "caf\u00e9 cafe\u0301 na\u00efve",
  "ï¬\x81ancÃ© mojibake",
  "😀 grinning face 👨‍👩‍👧‍👦 family 🇨🇭",
  "❤️ red heart",
  "a bear searching for food near the river",
  "A large bed sitting next to a small Christmas Tree surrounded by pictures",
  "12345 numbers 3.14 1,000,000 ½",
  "snow ☃ and ☂",
  "日本語のキャプション",
  "русский текст",
  "مرحبا بالعالم",
  "한국어 설명",
  "ελληνικά",
  "tabs\tand\nnew\r\nlines   and    spaces\u00a0hard",
  "a_b-c/d\\e (f) [g] {h} <i> #hashtag @user",
  "pneumonoultramicroscopicsilicovolcanoconiosis",
  "!!! ??? ... ---",
  "ﬁnal ligature, ｆｕｌｌｗｉｄｔｈ",
  "x" * 300,
  "a river with boats docked and houses in the background " * 12,
  "https://example.com/path?query=1&other=2",
  "<person> walking in <city>, 2019",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return Tokenizer(77)


def test_ids_equal_open_clip(tokenizer):
  oracle = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer(clean="lower")
  expected = oracle(list(SENTENCES), context_length=77).numpy()
  padded_by_end = np.where(np.cumsum(expected == END_ID, axis=1) > 0, END_ID, expected)
  np.testing.assert_array_equal(tokenizer(SENTENCES), padded_by_end)


MARKERS = (
  "a <|endoftext|> b",
  "a <|startoftext|> b",
  "<|endoftext|>",
  "<|STARTOFTEXT|><|EndOfText|>",
  "x<|endoftext|>y, don't<|startoftext|>'s",
  "!<|<|endoftext|>|>.",
  "&lt;|endoftext|&gt; of a page",
  "\uff1c|endoftext|\uff1e in full width",
  "<|endoftext|> " * 40,
)


def test_a_caption_that_spells_start_or_end_is_text(tokenizer):
  """open_clip spells its own markers differently, so it reads these as text too."""
  oracle = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer(clean="lower")
  expected = oracle(list(MARKERS), context_length=77).numpy()
  ids = tokenizer(MARKERS)
  np.testing.assert_array_equal(ids, np.where(np.cumsum(expected == END_ID, axis=1) > 0, END_ID, expected))
  for row in ids:
    end = row.tolist().index(END_ID)
    assert end > 3 and (row[end:] == END_ID).all() and (row[1:] != START_ID).all()
  spelled = [tokenizer.vocab[token] for token in ("<", "|</w>", "endof", "text</w>", "|", "></w>")]
  assert tokenizer(["a <|endoftext|>"])[0, :9].tolist() == [START_ID, 320, *spelled, END_ID]


@pytest.mark.parametrize("length", [3, 8, 77])
def test_cut_returns_the_words_that_fit(length):
  """Words after the cut do not change the ids."""
  tokenizer, words = Tokenizer(length), ["red"] * (length - 2)
  assert tokenizer.cut(" ".join(words)) is None and tokenizer.cut("") is None
  assert tokenizer.cut(" ".join([*words, "star"])) == " ".join(words)
  assert (tokenizer([" ".join([*words, "star"])]) == tokenizer([" ".join(words)])).all()


def test_clean_and_decode(tokenizer):
  assert clean(" Tom &amp;amp;\n JERRY’s ") == "tom & jerry's"
  assert tokenizer.decode(tokenizer(["A small  RED star"])[0]) == "a small red star"


def test_one_text_in_the_place_of_a_list_is_refused(tokenizer):
  """Otherwise each letter would be a caption, and a single letter could be the nearest class."""
  with pytest.raises(UserError, match=r"captions are the one text 'a red star'; give a list of texts"):
    tokenizer("a red star")


def test_saved_folder_is_read_by_transformers(tokenizer, tmp_path):
  from transformers import CLIPTokenizer

  tokenizer.save(tmp_path / "all")
  (tmp_path / "old").mkdir()
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / "old" / name).write_bytes((tmp_path / "all" / name).read_bytes())
  captions = [clean(s) for s in SENTENCES]
  for folder in ("all", "old"):
    read = CLIPTokenizer.from_pretrained(tmp_path / folder)
    ids = read(captions, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(ids, tokenizer(SENTENCES))


def test_workers_import_no_framework():
  code = (
    "import sys; from diffdis_jax.data import latents, records, shapes, sources, tokenizer, transforms\n"
    "tokenizer.Tokenizer(8)(['a']); sources.open_source(name='shapes', image_size=8)[0]\n"
    "sys.exit(str({'jax', 'flax', 'torch', 'tensorflow'} & sys.modules.keys() or ''))"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.stderr.strip() == "", result.stderr
