"""Test how the texts of classes are split into sentences, against hand-written answers."""

import numpy as np
import pytest

from diffdis_jax.data import long_tail
from diffdis_jax.data.long_tail import Corpus
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError

PAGE = """
An airfield is a place. Planes land there.

== History ==
It began in 1910.
== See also ==
Airport
=== Details ===
A detail.
== References ==
A book. Another book.
== External links ==
A page.
== Further reading ==
More.
== Bibliography ==
Much more.
"""


@pytest.mark.parametrize(
  "text, sentences",
  [
    ("One. Two? Three", ("One.", "Two?", "Three")),
    ("Glued.Next comes. and this too.", ("Glued.", "Next comes.", "and this too.")),
    ("J. Smith met F. Kahlo. They ate.", ("J. Smith met F. Kahlo.", "They ate.")),
    ("A fruit, e.g. Apples or i.e. Pears. Both fall.", ("A fruit, e.g. Apples or i.e. Pears.", "Both fall.")),
    ("It was in the U.S. Army. Over", ("It was in the U.S. Army.", "Over")),
    ("Dr. No came at 3.5 km/h. Mr. X left.", ("Dr.", "No came at 3.5 km/h.", "Mr.", "X left.")),
    ("what is it?who knows.", ("what is it?who knows.",)),
    ("over\ntwo lines. And\nmore! Still one.", ("over\ntwo lines.", "And\nmore! Still one.")),
    ("  .  ", (".",)),
    ("", ()),
  ],
)
def test_a_text_is_split_into_sentences(text, sentences):
  assert long_tail.split_sentences(text) == sentences


def test_a_page_has_its_summary_and_all_but_four_sections():
  text = long_tail.page_text(PAGE)
  assert text == "An airfield is a place. Planes land there.\nIt began in 1910.\nAirport\nA detail."


def test_a_later_section_replaces_an_earlier_one_of_the_same_title():
  assert long_tail.page_text("s\n== A ==\none\n== B ==\ntwo\n== A ==\nthree") == "s\nthree\ntwo"


def test_the_sentences_of_a_class_are_eighty_prompts_and_its_text():
  sentences = long_tail.sentences_of("airfield", "An airfield is flat. It is long.")
  assert len(sentences) == 82 and sentences[0] == "a bad photo of a airfield ."
  assert sentences[80:] == ("An airfield is flat.", "It is long.")
  glued = long_tail.sentences_of("airfield", "airfields are flat. It is long.")
  assert glued[79:] == (f"{sentences[79]}airfields are flat.", "It is long.")


def write(root, names, pages):
  (root / "wiki").mkdir()
  (root / "labels.txt").write_text("".join(f"{name} {number}\n" for number, name in names))
  for number, page in pages.items():
    (root / "wiki" / f"desc_{number}.txt").write_bytes(page)
  return root


def test_a_corpus_folder_is_read(tmp_path):
  pages = {0: b"A yard.", 1: "Ein Café.".encode(), 2: "看 A place.".encode("gbk")}
  write(tmp_path, [(2, "zoo"), (0, "art_school/indoor"), (1, "bar")], pages)
  sentences = long_tail.read_corpus(tmp_path, wordnet=False)
  assert sentences.classnames == ("art school indoor", "bar", "zoo")
  assert [own[-1] for own in sentences.sentences] == ["A yard.", "Ein Café.", f"{sentences.sentences[2][-1]}"]
  assert sentences.sentences[2][-1].endswith("看 A place.")
  assert len(sentences.flat) == len(sentences.labels) and sentences.labels[-1] == 2


@pytest.mark.parametrize(
  "names, pages, message",
  [
    ([(0, "a"), (1, "b"), (2, "c")], {0: b"A."}, "2 of 3 classes have no text, the first 'b': no file"),
    ([(0, "a")], {0: b"== References ==\nA book."}, "desc_0.txt has no text"),
    ([(0, "a")], {0: b"\xff\xff\xff"}, "neither UTF-8 nor GBK"),
    ([(0, "a"), (2, "b")], {}, "2 lines, whose numbers should be 0 to 1"),
    ([("x", "a")], {}, "invalid literal for int.*; it should name the classes, one a line, with their numbers last"),
  ],
)
def test_a_damaged_corpus_folder_is_refused(tmp_path, names, pages, message):
  write(tmp_path, names, pages)
  with pytest.raises(UserError, match=message) as error:
    long_tail.read_corpus(tmp_path, wordnet=False)
  assert "\n" not in str(error.value)


def test_a_class_samples_from_its_own_sentences():
  own = Corpus(("a", "b"), (("one.", "two words."), ("three.",)))
  tokens = long_tail.tokens_of(own, Tokenizer(8))
  np.testing.assert_array_equal(tokens.ids, Tokenizer(8)(own.flat))
  assert tokens.starts.tolist() == [0, 2, 3]
  rng = np.random.default_rng(0)
  drawn = {tokens.draw(0, rng).tobytes() for _ in range(50)}
  assert drawn == {row.tobytes() for row in tokens.ids[:2]}
