"""The npm packages that the emoji pairs are made of: tarballs as `npm pack` writes them, checked by their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
  """A version of an npm package.

  Attributes:
    name, version: in the registry.
    sha256: of its tarball.
    licence: of what is taken from it, an SPDX identifier.
    author, url: to be named with it.
  """

  name: str
  version: str
  sha256: str
  licence: str
  author: str
  url: str

  @property
  def file(self) -> str:
    return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package(
  name="emojibase-data",
  version="17.0.0",
  sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
  licence="MIT",
  author="Miles Johnson",
  url="https://github.com/milesj/emojibase",
)
# Of each artist.
ICONS = {
  "noto": Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    licence="Apache-2.0",
    author="Google",
    url="https://github.com/googlefonts/noto-emoji",
  ),
  "fluent-emoji-flat": Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    licence="MIT",
    author="Microsoft Corporation",
    url="https://github.com/microsoft/fluentui-emoji",
  ),
  "fluent-emoji": Package(
    name="@iconify-json/fluent-emoji",
    version="1.2.7",
    sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    licence="MIT",
    author="Microsoft Corporation",
    url="https://github.com/microsoft/fluentui-emoji",
  ),
  "fxemoji": Package(
    name="@iconify-json/fxemoji",
    version="1.2.2",
    sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    licence="CC-BY-4.0",
    author="Mozilla",
    url="https://github.com/mozilla/fxemoji",
  ),
  "emojione": Package(
    name="@iconify-json/emojione",
    version="1.2.3",
    sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    licence="CC-BY-4.0",
    author="Emoji One",
    url="https://github.com/EmojiTwo/emojitwo",
  ),
  "streamline-emojis": Package(
    name="@iconify-json/streamline-emojis",
    version="1.2.4",
    sha256="5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    licence="CC-BY-4.0",
    author="Streamline",
    url="https://github.com/webalys-hq/streamline-vectors",
  ),
  "noto-v1": Package(
    name="@iconify-json/noto-v1",
    version="1.2.5",
    sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    licence="Apache-2.0",
    author="Google",
    url="https://github.com/googlefonts/noto-emoji",
  ),
  "twemoji": Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    licence="CC-BY-4.0",
    author="Twitter",
    url="https://github.com/jdecked/twemoji",
  ),
  "openmoji": Package(
    name="@iconify-json/openmoji",
    version="1.2.29",
    sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    licence="CC-BY-SA-4.0",
    author="OpenMoji",
    url="https://github.com/hfg-gmuend/openmoji",
  ),
}


def check(source: pathlib.Path, packages: Sequence[Package]) -> None:
  """Raises UserError unless the tarballs of these packages lie in the folder as they were published."""
  if missing := [package for package in packages if not (source / package.file).is_file()]:
    named = ", ".join(f"{package.name} {package.version}" for package in missing)
    raise UserError(f"{source} lacks {named}; in this folder: {_fetch(missing)}")
  for package in packages:
    path = source / package.file
    try:
      found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
      raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if found != package.sha256:
      raise UserError(
        f"{path} is not {package.name} {package.version} as published: its SHA-256 begins with {found[:8]}, not with"
        f" {package.sha256[:8]}; fetch it anew: {_fetch([package])}"
      )


def read_json(source: pathlib.Path, package: Package, member: str) -> Any:
  """A JSON file of a package. Raises UserError: the tarball cannot be read, or has no such file."""
  path = source / package.file
  try:
    with tarfile.open(path) as tar:
      file = tar.extractfile(f"package/{member}")
      assert file is not None  # a folder of that name
      return json.load(file)
  except (OSError, EOFError, KeyError, ValueError, AssertionError, tarfile.TarError) as error:
    raise UserError(f"cannot read {member} of {path}: {error}; fetch it anew: {_fetch([package])}") from error


def _fetch(packages: Sequence[Package]) -> str:
  return f"npm pack {' '.join(f'{package.name}@{package.version}' for package in packages)}"
