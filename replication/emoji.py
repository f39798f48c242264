"""Read emoji of several artists with captions, rendered from icon sets that are published as npm packages.

A concept is an emoji of Unicode by its English name in emojibase. Skin tones, flags, and most emoji that differ only in
gender or trade are left out. Six artists' drawings of 1,206 concepts are `train`, and their drawings of 158 others are
`val_concepts`. `val_vendor` and `test_vendor` each have an artist who is not in train. OpenMoji, if its package is
there, is the split `openmoji`, with the captions of `test_vendor`.

`emoji.json.gz` keeps the random choices that were made when the pairs were first published: the concepts by their code
points, the places of those that are held out, and for each artist the icons whose names differ from their concept's,
and the number in `TEMPLATES` of each icon's caption, or - if there is no icon.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib
import io
import json
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from diffdis_jax.data import image_files
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import Part, RawPair
from diffdis_jax.data.prepare.write import LICENSES, DataSet
from diffdis_jax.errors import not_installed
from replication import emoji_packages
from replication.emoji_packages import EMOJIBASE, ICONS, Package

CHOICES = pathlib.Path(__file__).with_name("emoji.json.gz")
SIZE = 64  # in pixels
# Icons of these artists are rendered larger and then shrunk, since the renderer does not smooth hard edges of masks.
SUPERSAMPLED = {"fluent-emoji": 2}
ITEMS = 2500  # items of a part
SPLITS = {
  "train": ("noto", "fluent-emoji-flat", "fluent-emoji", "fxemoji", "emojione", "streamline-emojis"),
  "val_vendor": ("noto-v1",),
  "val_concepts": ("noto", "fluent-emoji-flat", "fluent-emoji", "fxemoji", "emojione", "streamline-emojis"),
  "test_vendor": ("twemoji",),
}
OPENMOJI = "openmoji"  # name of the artist and of the split
STYLES = {
  "noto": "shaded",
  "fluent-emoji-flat": "flat",
  "fluent-emoji": "3d",
  "fxemoji": "soft flat",
  "emojione": "glossy flat",
  "streamline-emojis": "outlined cartoon",
  "noto-v1": "blob",
}
TEMPLATES = (
  "an emoji of {concept}",
  "icon of {concept}, {group}",
  "{concept}",
  "{concept}, {tags}",  # the concept's first two tags
  "{style} emoji of {concept}",
  "{style} drawing of {concept}",
)


def data_set(parts: Sequence[Part]) -> DataSet:
  """Describe the data set, with the licences of the artists' icons."""
  split_names = dict.fromkeys(part.split for part in parts)
  splits = {vendor: [split for split in split_names if vendor in SPLITS.get(split, (OPENMOJI,))] for vendor in ICONS}
  lines = [
    "# Licences",
    "",
    "The images are icons by the authors below, rendered at 64 px on white. A record's fields `vendor` and `licence`",
    "say whose it is. Names, groups and tags of the concepts are those of emojibase.",
    "",
    "| field `vendor` | splits | author | package | licence |",
    "|---|---|---|---|---|",
    *(_row(vendor, package, splits[vendor]) for vendor, package in ICONS.items() if splits[vendor]),
    _row("", EMOJIBASE, ["all"]),
  ]
  description = (
    "Emoji of several artists at 64 px on white, with captions made of the concept's name, the artist's style, and"
    f" Unicode's group or emojibase's tags. Licences: {LICENSES}."
  )
  return DataSet("emoji", description, licenses="\n".join(lines) + "\n")


def _row(vendor: str, package: Package, splits: Sequence[str]) -> str:
  return (
    f"| {vendor} | {', '.join(splits)} | [{package.author}]({package.url}) | {package.name} {package.version} "
    f"| [{package.licence}](https://spdx.org/licenses/{package.licence}.html) |"
  )


@dataclasses.dataclass(frozen=True)
class Concept:
  """An emoji's entry in emojibase; `concept_id` is its name in ASCII, like the names of icons."""

  concept: str
  concept_id: str
  group: str
  subgroup: str
  tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Icon:
  """An icon of a vendor with its concept, and the number of its template."""

  vendor: str
  name: str
  concept: Concept
  template: int

  @property
  def caption(self) -> str:
    concept = self.concept
    return TEMPLATES[self.template].format(
      concept=concept.concept,
      group=concept.group,
      tags=", ".join(concept.tags[:2]),
      style=STYLES.get(self.vendor, ""),
    )

  def metadata(self, key: str) -> str:
    fields = dataclasses.asdict(self.concept)
    record = {"key": key, "caption": self.caption, "status": "success", "width": SIZE, "height": SIZE}
    record |= {"concept": fields.pop("concept"), "concept_id": fields.pop("concept_id"), "vendor": self.vendor}
    return json.dumps({**record, "licence": ICONS[self.vendor].licence, **fields})


@dataclasses.dataclass
class IconsPart:
  """Some icons of a split. Keys are PART/KEY, as in webdataset tars."""

  name: str
  split: str
  source: pathlib.Path
  number: int
  icons: Sequence[Icon]

  def identity(self) -> list[Any]:
    versions = sorted({f"{ICONS[icon.vendor].name}@{ICONS[icon.vendor].version}" for icon in self.icons})
    return [self.name, len(self.icons), *versions]

  def __iter__(self) -> Iterator[RawPair]:
    for place, icon in enumerate(self.icons):
      key = f"{self.number:05d}{place:04d}"
      drawing = read_icons(self.source, icon.vendor).get(icon.name)
      image = None if drawing is None else render(drawing, scale=SUPERSAMPLED.get(icon.vendor, 1))
      yield RawPair(f"{self.name}/{key}", image, icon.caption.encode(), icon.metadata(key).encode())


def find_parts(source: pathlib.Path) -> list[Part]:
  """Return the parts of a folder with the tarballs of `emoji_packages`; OpenMoji's may be absent.

  Raises:
    UserError: no such folder, a tarball that is missing or differs, or no renderer.
  """
  parts.check_folder(source, "a folder of npm tarballs: docs/data.md says which")
  with_openmoji = (source / ICONS[OPENMOJI].file).is_file()
  needed = [package for vendor, package in ICONS.items() if vendor != OPENMOJI or with_openmoji]
  emoji_packages.check(source, [EMOJIBASE, *needed])
  _renderer()  # raise a missing renderer's error before minutes of reading
  chosen, concepts = read_choices(), read_concepts(source)
  all_parts: list[Part] = []
  for split in SPLITS:
    all_parts += _cut(split, source, icons_of(split, concepts, chosen))
  if with_openmoji:
    all_parts += _cut(OPENMOJI, source, icons_of_openmoji(concepts, chosen, read_icons(source, OPENMOJI)))
  else:
    logging.info("no %s in %s, and so no split %s", ICONS[OPENMOJI].file, source, OPENMOJI)
  return all_parts


def read_concepts(source: pathlib.Path) -> list[Concept]:
  """Read the concepts in the order of `emoji.json.gz`, which is the order of their ids."""
  read_json = functools.partial(emoji_packages.read_json, source, EMOJIBASE)
  messages, by_code = read_json("en/messages.json"), {entry["hexcode"]: entry for entry in read_json("en/data.json")}
  groups, subgroups = ({entry["order"]: entry["key"] for entry in messages[kind]} for kind in ("groups", "subgroups"))
  concepts = []
  for code in read_choices()["concepts"].split():
    entry = by_code[code]
    name = entry["label"].lower().replace(":", "")
    group, subgroup = groups[entry["group"]], subgroups[entry["subgroup"]]
    concepts.append(Concept(name, _in_ascii(name), group, subgroup, tuple(entry["tags"])))
  return concepts


def icons_of(split: str, concepts: Sequence[Concept], chosen: Mapping[str, Any]) -> list[Icon]:
  """Return the icons of a split of `SPLITS`, artist by artist, by name."""
  # A concept is held out for every artist, so that training has not seen it in any style.
  held_out = {int(place) for place in chosen["held_out"].split()}
  every = {*range(len(concepts))}
  chosen_concepts = {"test_vendor": every, "val_concepts": held_out}.get(split, every - held_out)
  icons_of_split = []
  for vendor in SPLITS[split]:
    icons = _icons_of_vendor(vendor, concepts, chosen["vendors"][vendor], chosen_concepts)
    # The parts depend on this order by name, in which the icons were first published.
    icons_of_split += sorted(icons, key=lambda icon: icon.name)
  return icons_of_split


def icons_of_openmoji(concepts: Sequence[Concept], chosen: Mapping[str, Any], drawn: Mapping[str, str]) -> list[Icon]:
  """Return OpenMoji's icons of the concepts of `test_vendor`, with the captions of `test_vendor`."""
  icons = icons_of("test_vendor", concepts, chosen)
  renamed = [dataclasses.replace(icon, vendor=OPENMOJI, name=icon.concept.concept_id) for icon in icons]
  return [icon for icon in renamed if icon.name in drawn]


def _icons_of_vendor(
  vendor: str, concepts: Sequence[Concept], chosen: Mapping[str, Any], chosen_concepts: Collection[int]
) -> Iterator[Icon]:
  for place, (concept, templates) in enumerate(zip(concepts, chosen["templates"].split(), strict=True)):
    if templates != "-" and place in chosen_concepts:
      names = chosen["icons"].get(str(place), concept.concept_id).split()
      for name, template in zip(names, templates, strict=True):
        yield Icon(vendor, name, concept, int(template))


def _cut(split: str, source: pathlib.Path, icons: Sequence[Icon]) -> list[Part]:
  """Cut icons into parts, in the order in which they were first published."""
  order = np.random.default_rng(0).permutation(len(icons))
  starts = range(0, len(icons), ITEMS)
  return [
    IconsPart(f"{split}-{i:05d}", split, source, i, [icons[j] for j in order[first : first + ITEMS]])
    for i, first in enumerate(starts)
  ]


@functools.cache  # once in each process, for all of its parts
def read_icons(source: pathlib.Path, vendor: str) -> dict[str, str]:
  """Read a vendor's icons as name -> SVG."""
  content = emoji_packages.read_json(source, ICONS[vendor], "icons.json")
  default = {"left": 0, "top": 0, "width": content.get("width", 16), "height": content.get("height", 16)}
  svgs = {}
  # Iconify's icons lack the outer element. An icon without its own box has the box of its set.
  for name, icon in content["icons"].items():
    box = " ".join(str(icon.get(side, default[side])) for side in default)
    svgs[name] = (
      '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
      f' width="{SIZE}" height="{SIZE}" viewBox="{box}">{icon["body"]}</svg>'
    )
  return svgs


def render(svg: str, *, scale: int = 1) -> bytes:
  """Render a PNG of `SIZE` on white from a drawing `scale` times as large. Return an SVG that cannot be drawn
  unchanged, so that it counts as no image."""
  side = scale * SIZE
  try:
    png = _renderer().svg_to_bytes(
      svg_string=svg, background="white", width=side, height=side, dpi=96, skip_system_fonts=True
    )
  except ValueError:
    return svg.encode()
  image = image_files.open_image(bytes(png)).convert("RGB")
  # A box filter averages the pixels that each pixel covers, without ringing.
  if scale > 1:
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
  file = io.BytesIO()
  image.save(file, "PNG", optimize=True)
  return file.getvalue()


def _renderer() -> Any:
  try:
    return importlib.import_module("resvg_py")
  except ImportError as error:
    raise not_installed("replication.prepare_emoji", "resvg-py", "emoji") from error


def read_choices() -> dict[str, Any]:
  """Read the content of `emoji.json.gz`."""
  return json.loads(gzip.decompress(CHOICES.read_bytes()))


def _in_ascii(name: str) -> str:
  # Icon sets name their files like this: without apostrophes and accents, and a hyphen for everything else.
  plain = unicodedata.normalize("NFKD", name.replace("’", "")).encode("ascii", "ignore").decode()
  return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
