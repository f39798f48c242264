"""npm packages of a few icons, with choices to match, in place of the published ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Mapping
from typing import Any

import pytest

from replication import emoji, emoji_packages

# Code point, label, and the colour of every artist's icon.
CONCEPTS = {
  "blue-heart": ("1F499", "blue heart", "#0000ff"),
  "green-apple": ("1F34F", "green apple", "#00ff00"),
  "person-blond-hair": ("1F471", "person: blond hair", "#ffff00"),
  "pinata": ("1FA85", "piñata", "#ff00ff"),
  "red-apple": ("1F34E", "red apple", "#ff0000"),
}
NOT_CALLED_SO = {"fxemoji": {"4": "apple"}, "streamline-emojis": {"0": "blue-heart-1 blue-heart-2"}}
TEMPLATES = {"streamline-emojis": "04 - 1 - 5", "noto-v1": "4 5 - - -", "twemoji": "0 1 2 3 0"}


def drawing(colour: str) -> str:
  return f'<path fill="{colour}" d="M4 4h24v24H4z"/>'


def write_package(path: pathlib.Path, files: Mapping[str, Any]) -> None:
  with tarfile.open(path, "w:gz") as tar:
    for name, content in files.items():
      data = json.dumps(content).encode()
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


def write_packages(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, changed: Mapping[str, Mapping[str, str]] | None = None
) -> None:
  """Writes the tarballs of all the icon sets and of emojibase, and makes their hashes the expected ones.

  Args:
    folder: to write.
    changed: artist -> icon -> its SVG, where it is not a square of the concept's colour.
  """
  folder.mkdir()
  data = [
    {"hexcode": code, "label": label, "group": 4, "subgroup": 7, "tags": ["round", "ripe", "sweet"]}
    for code, label, _ in CONCEPTS.values()
  ]
  named = {"groups": [{"order": 4, "key": "food-drink"}], "subgroups": [{"order": 7, "key": "food-fruit"}]}
  base = emoji.EMOJIBASE
  write_package(folder / base.file, {"en/data.json": data, "en/messages.json": named})
  monkeypatch.setattr(emoji, "EMOJIBASE", _with_hash(folder, base))
  for vendor, package in emoji_packages.ICONS.items():
    icons = {}
    for place, (name, (_, _, colour)) in enumerate(CONCEPTS.items()):
      for each in NOT_CALLED_SO.get(vendor, {}).get(str(place), name).split():
        icons[each] = {"body": drawing(colour)}
    icons |= {name: {"body": body} for name, body in (changed or {}).get(vendor, {}).items()}
    write_package(folder / package.file, {"icons.json": {"width": 32, "height": 32, "icons": icons}})
    monkeypatch.setitem(emoji_packages.ICONS, vendor, _with_hash(folder, package))
  vendors = {
    vendor: {"icons": NOT_CALLED_SO.get(vendor, {}), "templates": TEMPLATES.get(vendor, "0 1 2 3 4")}
    for vendor in emoji_packages.ICONS
    if vendor != emoji.OPENMOJI
  }
  choices = {"concepts": " ".join(code for code, _, _ in CONCEPTS.values()), "held_out": "3 4", "vendors": vendors}
  path = folder / "choices.json.gz"
  path.write_bytes(gzip.compress(json.dumps(choices).encode()))
  monkeypatch.setattr(emoji, "CHOICES", path)


def _with_hash(folder: pathlib.Path, package: emoji_packages.Package) -> emoji_packages.Package:
  return dataclasses.replace(package, sha256=hashlib.sha256((folder / package.file).read_bytes()).hexdigest())
