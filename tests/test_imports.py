"""The package's import rule: downwards only, by parsing every file."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import diffdis_jax

ROOT = pathlib.Path(diffdis_jax.__file__).parent
# Every file of the package, room by room. A file may import those of earlier layers alone.
LAYERS = (
  "errors structs run/progress run/code_digest",
  "parallel/signals",
  "__init__",  # the version
  "run/buckets run/guesses",
  "run/committed run/files",
  "params cli parallel/processes run/history",
  "parallel/sharding parallel/programs parallel/fingerprint run/workdir run/checkpoint run/profile run/trackers",
  "run/writers",
  "parallel/batches",
  "diffusion/schedules diffusion/guidance",
  "diffusion/samplers",
  "models/sizes",
  # What data workers import, without jax.
  "data/image_files data/randaugment data/randaugment_timm data/shapes data/tokenizer",
  "data/transforms data/copies",
  "data/records run/config",
  "data/tars run/provenance",
  "data/layouts/labelled data/layouts/class_lists data/layouts/pickles",
  "data/corpus",
  "data/layouts/long_tailed data/shapes_lt",
  "data/layouts/karpathy data/layouts/tfds_folder data/layouts/torchvision_folders data/layouts/wds_folder",
  "data/layouts/find",
  "data/latents data/long_tail",
  "data/sources",
  "data/loader",
  "data/build",
  "data/prepare/pairs data/prepare/card",
  "data/prepare/webdataset",
  "data/prepare/parts",
  "data/prepare/staging",
  "data/prepare/builder",
  "data/prepare/emoji_packages",
  "data/prepare/captions data/prepare/cc3m data/prepare/emoji data/prepare/image_folder",
  "data/prepare/latents data/prepare/zero_shot_sets",
  "models/attention_tpu",
  "models/attention",
  "models/layers",
  "models/unet_blocks models/alignment models/text_encoder models/inception models/lgr",
  "models/autoencoder models/unet models/fusion models/clip",
  "models/diffdis models/sections",
  "models/clip_init",
  "models/joint models/build",
  "interop/mapping interop/sections interop/tensor_files interop/torch_diffdis",
  "interop/compvis interop/openclip interop/shapes interop/to_torch",
  "interop/from_torch interop/clip_to_torch interop/inception",
  "interop/hub interop/model_card",
  "training/losses training/draws training/metrics training/mixing",
  "training/optim training/encode",
  "training/long_tail",
  "training/objectives",
  "training/gradcache",
  "training/step",
  "training/build training/facts training/start",
  "inference",
  "evals/results evals/text_cache",
  "evals/prompts evals/samples evals/base evals/distances evals/resize",
  "evals/drawn_prompts evals/features evals/real_images evals/reference evals/nearest evals/copies",
  "evals/feature_parts",
  "evals/agreement evals/anchors evals/fid evals/long_tail evals/recognition evals/retrieval evals/zero_shot",
  "evals/watch",
  "evals",
  "evals/emoji",
  "evals/suites",
  "evals/tables",
  "estimates/chips estimates/gpus estimates/hlo estimates/operations estimates/schedules estimates/search",
  "estimates/times",
  "estimates/targets estimates/programs benchmarks/steps benchmarks/data benchmarks/peer",
  "training/loop",
  "estimates/calibration estimates/report benchmarks/table6",
  "ablations/tables ablations/columns ablations/significance",
  "ablations/plan",
  "ablations/folder",
  "ablations/run ablations/outlook ablations/summary ablations/render",
  "reports/curves",
  "reports/charts reports/read reports/pictures",
  "reports/summary",
  "reports/page",
  "studio/limits studio/charts studio/body_limit studio/player",
  "studio/same_site studio/uploads",
  "studio/draw",
  "studio/classify",
  "studio/search studio/inside",
  "studio/page",
  "studio/server",
  "train evaluate generate prepare_data benchmark preflight import_weights export_weights report app",
  "demo ablate",  # verbs that run others
  "__main__",  # which lists them
)
LEVEL = {file: level for level, layer in enumerate(LAYERS) for file in layer.split()}
VERBS = {*LAYERS[-3].split(), *LAYERS[-2].split()}
NOUNS = {"__main__", "inference", "cli", "errors", "structs", "params"}
# Torch is an extra: for these alone, of which two ask for it only where they read a pickle, or time it.
TORCH_FILES = {"interop/tensor_files.py", "interop/torch_diffdis.py", "benchmarks/peer.py"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.read_text())


def name_of(path: pathlib.Path) -> str:
  """`models/unet`; a room's own __init__.py is the room."""
  return str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")


def file_of(module: str) -> str:
  """The file that a dotted name below the package means: its longest beginning that is one."""
  parts = (module or "__init__").split(".")
  names = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
  return next((name for name in names if name in LEVEL), module)


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
  """Between rooms and inside them, lazy imports too."""
  name = name_of(path)
  assert name in LEVEL, f"{name} has no layer; give it one in LAYERS"
  for module in imported_modules(ast.parse(path.read_text())):
    package, _, rest = module.partition(".")
    if package == "diffdis_jax":
      other = file_of(rest)
      assert other in LEVEL and LEVEL[other] < LEVEL[name], f"{name} imports {other}, which is in no lower layer"


def test_only_demo_imports_configs(path):
  roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
  assert "configs" not in roots or name_of(path) == "demo"


def test_no_torch_and_no_tests(path):
  roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
  allowed = {"torch", "diffusers"} if str(path.relative_to(ROOT)) in TORCH_FILES else set()
  assert not roots & {"torch", "torchvision", "diffusers", "open_clip", "tests"} - allowed


def test_no_print(path):
  calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_only_sharding_names_mesh_axes(path):
  if name_of(path) != "parallel/sharding":
    modules = set(imported_modules(ast.parse(path.read_text())))
    assert not {module for module in modules if module.endswith((".PartitionSpec", ".NamedSharding"))}


def test_every_layer_exists():
  assert set(LEVEL) == {name_of(path) for path in FILES}


def test_verbs_and_a_few_nouns_stand_at_the_root():
  at_root = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
  assert at_root == VERBS | NOUNS
