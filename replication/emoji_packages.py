"""List the npm packages of the emoji pairs, and check their tarballs, which `npm pack` writes, by hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
  """A version of an npm package.

  Attributes:
    name, version: name and version in npm's registry.
    sha256: digest of its tarball.
    licence: SPDX identifier of the licence of the files that are taken.
    author, url: author and address to credit.
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
  *("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
  *("MIT", "Miles Johnson", "https://github.com/milesj/emojibase"),
)


def _icons(set_name: str, version: str, sha256: str, licence: str, author: str, repository: str) -> Package:
  return Package(f"@iconify-json/{set_name}", version, sha256, licence, author, f"https://github.com/{repository}")


# The packages of each artist. Versions are pinned by hash, since another version has other icons.
ICONS = {
  "noto": _icons(
    *("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    *("Apache-2.0", "Google", "googlefonts/noto-emoji"),
  ),
  "fluent-emoji-flat": _icons(
    *("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    *("MIT", "Microsoft Corporation", "microsoft/fluentui-emoji"),
  ),
  "fluent-emoji": _icons(
    *("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    *("MIT", "Microsoft Corporation", "microsoft/fluentui-emoji"),
  ),
  "fxemoji": _icons(
    *("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    *("CC-BY-4.0", "Mozilla", "mozilla/fxemoji"),
  ),
  "emojione": _icons(
    *("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    *("CC-BY-4.0", "Emoji One", "EmojiTwo/emojitwo"),
  ),
  "streamline-emojis": _icons(
    *("streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    *("CC-BY-4.0", "Streamline", "webalys-hq/streamline-vectors"),
  ),
  "noto-v1": _icons(
    *("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    *("Apache-2.0", "Google", "googlefonts/noto-emoji"),
  ),
  "twemoji": _icons(
    *("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    *("CC-BY-4.0", "Twitter", "jdecked/twemoji"),
  ),
  "openmoji": _icons(
    *("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    *("CC-BY-SA-4.0", "OpenMoji", "hfg-gmuend/openmoji"),
  ),
}


def check(source: pathlib.Path, packages: Sequence[Package]) -> None:
  """Check that the folder has the tarballs of these packages as published. Raises UserError otherwise."""
  if missing := [package for package in packages if not (source / package.file).is_file()]:
    named = ", ".join(f"{package.name} {package.version}" for package in missing)
    raise UserError(f"{source} lacks {named}; in this folder: {_fetch(missing)}")
  # Name all missing tarballs at once, since one command fetches them.
  for package in packages:
    path = source / package.file
    try:
      digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:  # a folder of that name, or a missing permission
      raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if digest != package.sha256:
      raise UserError(
        f"{path} is not {package.name} {package.version} as published: its SHA-256 begins with {digest[:8]}, not with"
        f" {package.sha256[:8]}; fetch it again: {_fetch([package])}"
      )


def read_json(source: pathlib.Path, package: Package, member: str) -> Any:
  """Read a JSON file of a package. Raises UserError: the tarball cannot be read, or has no such file."""
  path = source / package.file
  try:
    with tarfile.open(path) as tar:
      file = tar.extractfile(f"package/{member}")
      assert file is not None  # not a folder of that name
      return json.load(file)  # npm puts all files of a package below `package/`
  except (OSError, EOFError, KeyError, ValueError, AssertionError, tarfile.TarError) as error:
    raise UserError(f"cannot read {member} of {path}: {error}; fetch it again: {_fetch([package])}") from error


def _fetch(packages: Sequence[Package]) -> str:
  return f"npm pack {' '.join(f'{package.name}@{package.version}' for package in packages)}"
