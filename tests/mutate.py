"""Mutate the equations one at a time, and count how many mutations the fast tests of their modules find.

  python tests/mutate.py [--count=40] [--seed=0] [--only=losses]

It works in a copy of the checkout. Each change is one operation of the syntax tree: a comparison becomes its opposite,
+ and − are swapped, · and / are swapped, a term or a sign is dropped, or a number changes. The modules take turns, so
that each has its share of the changes; the same seed makes the same changes. The output has a line for each change,
then those that no test found, then `found N of M`. Forty take about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("Makefile", "README.md", "pyproject.toml", "configs", "diffdis_jax", "docs", "launch", "replication", "tests")
# The tests of each module, the fastest first.
JOINT_LOSS = "training/test_step.py::test_joint_loss_is_the_equations_on_the_same_keys"
TIMESTEPS = "training/test_step.py::test_timesteps_of_image_and_text_are_independent_and_any_of_all"
PRECISION = "test_precision.py::test_a_config_may_set_the_precision"
STATISTICS = "training/test_step.py::test_latent_statistics_of_microbatches_are_the_mean_of_theirs"
TESTS = {
  "method/algorithms.py": f"method/test_algorithms.py method/test_diffdis.py {JOINT_LOSS}",
  "method/alignment.py": "method/test_alignment.py method/test_diffdis.py",
  "method/diffdis.py": "method/test_diffdis.py method/test_algorithms.py",
  "method/fusion.py": "method/test_fusion.py method/test_diffdis.py",
  "method/guidance.py": "method/test_guidance.py method/test_algorithms.py",
  "method/joint.py": "method/test_joint.py method/test_diffdis.py",
  "method/losses.py": "method/test_losses.py",
  "method/network.py": f"method/test_network.py method/test_diffdis.py {PRECISION}",
  "method/samplers.py": "method/test_samplers.py method/test_algorithms.py",
  "method/schedules.py": "method/test_schedules.py method/test_samplers.py",
  "method/step_noise.py": f"method/test_algorithms.py method/test_diffdis.py {TIMESTEPS}",
  "training/gradcache.py": "training/test_gradcache.py",
  "method/long_tail.py": "training/test_mixing.py training/test_long_tail.py evals/test_long_tail_eval.py",
  "training/losses.py": f"training/test_contrastive.py training/test_metrics.py {JOINT_LOSS} {STATISTICS}",
  "training/optim.py": "training/test_optim.py",
  "evals/base.py": "evals/test_base.py evals/test_retrieval.py evals/test_zero_shot.py",
  "evals/diffusion_classifier.py": "evals/test_diffusion_classifier.py",
  "evals/fid/distances.py": "evals/fid/test_distances.py",
  "evals/held_out_loss.py": "evals/test_held_out_loss.py",
  "evals/linear_probe.py": "evals/test_linear_probe.py",
  "evals/long_tail.py": "evals/test_long_tail_eval.py",
  "evals/retrieval.py": "evals/test_retrieval.py",
  "evals/zero_shot.py": "evals/test_zero_shot.py",
}
OPPOSITE = {
  **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
  **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
}


def changes(node: ast.AST) -> Iterator[ast.expr]:
  """Yield the expressions that may replace a node."""
  if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
    yield ast.Compare(node.left, [OPPOSITE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
  elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
    yield ast.BinOp(node.left, OPPOSITE[type(node.op)](), node.right)
    yield node.left
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    yield node.operand
  elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
    yield ast.Constant(node.value + 1 if type(node.value) is int or not node.value else 2 * node.value)


def expressions(tree: ast.AST) -> Iterator[ast.AST]:
  """Yield the nodes of functions' bodies in order, without annotations, errors, text and logging."""
  for name, child in ast.iter_fields(tree):
    if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(tree, ast.Call):
      continue
    for node in child if isinstance(child, list) else [child]:
      if isinstance(node, ast.AST) and not isinstance(node, ast.Raise | ast.JoinedStr) and not is_logging(node):
        yield node
        # A negative number loses its sign and is not changed besides: to a reshape, −2 means what −1 does.
        if not (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)):
          yield from expressions(node)


def is_logging(node: ast.AST) -> bool:
  return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logging.")


def sites(tree: ast.Module) -> list[ast.AST]:
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
  return [*{id(node): node for function in functions for node in expressions(function)}.values()]


class Replace(ast.NodeTransformer):
  """Replace the node `old` by `new`."""

  def __init__(self, old: ast.AST, new: ast.expr):
    self.old, self.new = old, new

  def visit(self, node: ast.AST) -> ast.AST:
    return self.new if node is self.old else self.generic_visit(node)


def mutated(path: str, i: int, k: int) -> tuple[str, str]:
  """Return a line that describes change `k` of the module's node `i`, and the whole source after it."""
  tree = ast.parse((ROOT / "diffdis_jax" / path).read_text())
  old = sites(tree)[i]
  new = [*changes(old)][k]
  text = f"{path}:{old.lineno}: {ast.unparse(old)} -> {ast.unparse(new)}"
  return text, ast.unparse(ast.fix_missing_locations(Replace(old, new).visit(tree)))


def chosen_changes(*, only: str, count: int, seed: int) -> list[tuple[str, int, int]]:
  """Choose changes at random from the modules in turn, each as a path, a node's number and a change's number."""
  queues = []
  for path in (path for path in TESTS if only in path):
    nodes = sites(ast.parse((ROOT / "diffdis_jax" / path).read_text()))
    queue = [(path, i, k) for i, node in enumerate(nodes) for k, _ in enumerate(changes(node))]
    random.Random(f"{seed} {path}").shuffle(queue)
    queues.append(queue)
  turns = itertools.zip_longest(*queues)
  return [change for turn in turns for change in turn if change is not None][:count]


def tests_pass(checkout: pathlib.Path, path: str, *, seconds: float) -> bool:
  """Return whether a module's tests pass within `seconds`."""
  files = [f"tests/{name}" for name in TESTS[path].split()]
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
  environment = {**os.environ, "PYTHONPATH": str(checkout)}
  try:
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    return False
  if done.returncode > 2:
    raise RuntimeError(done.stdout + done.stderr)
  return done.returncode == 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=40, help="number of changes")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="a part of a module's name")
  parser.add_argument("--seconds", type=float, default=120, help="limit for the tests of one change")
  arguments = parser.parse_args()
  missed: list[str] = []
  tried = 0
  passing: dict[str, bool] = {}
  with tempfile.TemporaryDirectory() as folder:
    checkout = pathlib.Path(folder)
    for name in COPIED:
      copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
      copied(ROOT / name, checkout / name)
    for path, i, k in chosen_changes(only=arguments.only, count=arguments.count, seed=arguments.seed):
      if path not in passing:
        passing[path] = tests_pass(checkout, path, seconds=5 * arguments.seconds)
        if not passing[path]:
          sys.stdout.write(f"the tests of {path} fail without a change: {TESTS[path]}\n")
      if not passing[path]:
        continue
      text, source = mutated(path, i, k)
      file = checkout / "diffdis_jax" / path
      before = file.read_text()
      file.write_text(source)
      is_found = not tests_pass(checkout, path, seconds=arguments.seconds)
      file.write_text(before)
      tried += 1
      sys.stdout.write(f"{'found ' if is_found else 'MISSED'} {text}\n")
      sys.stdout.flush()
      if not is_found:
        missed.append(text)
  sys.stdout.write("\n".join(["", *missed, f"found {tried - len(missed)} of {tried}\n"]))


if __name__ == "__main__":
  main()
