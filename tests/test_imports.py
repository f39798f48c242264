"""Test the package's import rule, that a room imports only rooms below it, by parsing every file."""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib
from collections.abc import Iterator

import diffdis_jax
from diffdis_jax import __main__ as main_module

ROOT = pathlib.Path(diffdis_jax.__file__).parent
# The rooms of the package from the ground up. A room is a folder, or a file at the root, and imports those before it.
CORE = (
  *("errors", "structs", "common", "config", "__init__"),
  *("parallel", "run", "data", "models", "method"),
  *("interop", "inference", "evals", "pipeline", "training"),
  *("train", "evaluate", "generate", "prepare_data", "import_weights", "export_weights", "verify", "demo"),
)
# A tool is a room with a __main__.py, or one file. The core imports none of them.
TOOLS = ("app", "preflight", "report", "status", "benchmark", "ablate")
ROOMS = (*CORE, *TOOLS, "__main__")
COMMANDS = {*CORE[-8:], *TOOLS, "config"}
# Torch is an extra. Only these files use it, and the one outside SHIPPED only to read a pickle.
SHIPPED = {f"interop/torch_{name}.py" for name in ("diffdis", "parts", "pipeline")}  # export_weights copies these
TORCH_FILES = {"interop/tensor_files.py", *SHIPPED}
# A room has at most so many lines. To let it grow, raise its number in the same change, and say why there.
MOST_LINES = {
  "ablate": 1200,
  "app": 925,
  "benchmark": 350,
  "common": 1275,
  "config": 1275,
  "configs": 950,
  "data": 4175,
  "evals": 3200,
  "files at the root": 1875,
  "interop": 2700,
  "method": 1850,
  "models": 2125,
  "parallel": 750,
  "preflight": 1100,
  "report": 600,
  "run": 1450,
  "training": 1750,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.read_text())
NAMES = {str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__") for path in FILES}


def name_of(path: pathlib.Path) -> str:
  """Return the file's name, such as `models/unet`. A room's own __init__.py has the room's name."""
  return str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")


def room_of(name: str) -> str:
  """Return `models` for models/unet. A file at the root is a room of its own."""
  return name.partition("/")[0]


def file_of(module: str) -> str:
  """Return the file of a dotted name in the package: the longest prefix of the name that is a file."""
  parts = (module or "__init__").split(".")
  names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
  return next((name for name in names if name in NAMES), "__init__")


def imported_modules(tree: ast.AST) -> Iterator[str]:
  """Yield the dotted names that a file imports anywhere, a.b for `from a import b`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative imports hide what a file depends on"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text())


@functools.cache
def modules_of(path: pathlib.Path) -> frozenset[str]:
  """Return the dotted names that a file imports anywhere."""
  return frozenset(imported_modules(tree_of(path)))


@functools.cache
def own_imports(path: pathlib.Path) -> set[str]:
  """Return the files of the package that this one imports anywhere."""
  modules = (module.partition(".") for module in modules_of(path))
  return {file_of(rest) for package, _, rest in modules if package == "diffdis_jax"}


def other_rooms(path: pathlib.Path) -> set[str]:
  """Return the other rooms that this file imports from."""
  return {room_of(name) for name in own_imports(path)} - {room_of(name_of(path))}


def test_rooms_import_rooms_below_them():
  """The rule also holds for imports inside functions."""
  assert {room_of(name_of(path)) for path in FILES} <= {*ROOMS}, "a room has no place; give it one in ROOMS"
  is_below = lambda other, path: ROOMS.index(other) < ROOMS.index(room_of(name_of(path)))
  wrong = [(name_of(path), other) for path in FILES for other in other_rooms(path) if not is_below(other, path)]
  assert wrong == [], "the first imports the second, which is no room below it"


def test_the_core_imports_no_tool():
  core = [path for path in FILES if room_of(name_of(path)) in CORE]
  assert [(name_of(path), tools) for path in core if (tools := other_rooms(path) & {*TOOLS})] == []


def test_no_circle_inside_a_room():
  graph = {name_of(path): own_imports(path) - {name_of(path)} for path in FILES}
  list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def roots_of(path: pathlib.Path) -> set[str]:
  """Return the packages that a file imports."""
  return {module.split(".")[0] for module in modules_of(path)}


def test_the_package_imports_neither_configs_nor_the_replication():
  assert not {name_of(path) for path in FILES if roots_of(path) & {"configs", "replication"}}


def test_no_torch_and_no_tests():
  for path in FILES:
    allowed = {"torch", "diffusers"} if str(path.relative_to(ROOT)) in TORCH_FILES else set()
    allowed |= {"torchvision"} if name_of(path) == "data/prepare/zero_shot_sets" else set()
    assert not roots_of(path) & {"torch", "torchvision", "diffusers", "open_clip", "tests"} - allowed, name_of(path)


def test_no_print():
  for path in FILES:
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"], name_of(path)


def test_only_sharding_names_mesh_axes():
  axes = (".PartitionSpec", ".NamedSharding")
  files = {name_of(path) for path in FILES if any(module.endswith(axes) for module in modules_of(path))}
  assert files <= {"parallel/sharding"}


def test_every_room_exists():
  assert {*ROOMS} == {room_of(name) for name in NAMES}


def test_every_command_is_listed():
  assert main_module.commands().keys() == COMMANDS


def test_no_room_outgrows_its_budget():
  """The package's `configs` is a link to the repository's folder."""
  lines = dict.fromkeys(MOST_LINES, 0)
  for path in [*FILES, *(ROOT / "configs").glob("*.py")]:
    room = room_of(name_of(path))
    lines[room if room in lines else "files at the root"] += len(path.read_text().splitlines())
  assert {room: count for room, count in lines.items() if count > MOST_LINES[room]} == {}
