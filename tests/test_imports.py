"""The package's import rule: downwards only, by parsing every file."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import diffdis_jax

ROOT = pathlib.Path(diffdis_jax.__file__).parent
# A part is a file or a folder of the package. It may import itself and the parts of earlier layers.
LAYERS = (
  {"structs"},
  {"tree", "cli", "workdir", "folders", "distributed"},
  {"losses", "diffusion", "models", "data", "optim", "sharding", "checkpoint", "writers", "interop"},
  {"objectives"},
  {"step"},
  {"inference", "batches"},
  {"benchmark_data", "estimates"},
  {"evals"},
  {"train", "evaluate", "generate", "prepare_data", "benchmark", "preflight", "import_weights", "export_weights"},
  {"demo"},  # a verb that runs others
)
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
# Torch is an extra: for these alone, the first of which asks for it only where it reads a pickle.
TORCH_FILES = {"interop/tensor_files.py", "interop/torch_diffdis.py"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_modules(tree: ast.AST) -> Iterator[str]:
  """Dotted names, `from a import b` as a.b, wherever in the file they stand."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative imports hide what a file depends on"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(ROOT)))
def path(request: pytest.FixtureRequest) -> pathlib.Path:
  return request.param


def test_imports_point_downwards(path):
  part = part_of(path)
  assert part in LEVEL, f"{part} has no layer; give it one in LAYERS"
  for module in imported_modules(ast.parse(path.read_text())):
    package, _, rest = module.partition(".")
    if package == "diffdis_jax":
      other = rest.split(".")[0]
      assert other == part or LEVEL[other] < LEVEL[part], f"{part} imports {other}, which is no lower layer"


def test_no_torch_and_no_tests(path):
  roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
  allowed = {"torch", "diffusers"} if str(path.relative_to(ROOT)) in TORCH_FILES else set()
  assert not roots & {"torch", "torchvision", "diffusers", "open_clip", "tests"} - allowed


def test_no_print(path):
  calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_only_sharding_names_mesh_axes(path):
  if part_of(path) != "sharding":
    modules = set(imported_modules(ast.parse(path.read_text())))
    assert not {module for module in modules if module.endswith((".PartitionSpec", ".NamedSharding"))}


def test_every_layer_exists():
  assert set(LEVEL) == {part_of(path) for path in FILES}
