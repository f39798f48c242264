"""Change the equations one at a time and count how many of the changes the tests of `make test` find.

  python tests/mutate.py [--count=40] [--seed=0] [--only=losses]

It works in a copy of the checkout, where each change is one operation of the syntax tree: a comparison becomes its
opposite, + and − or · and / change places, a term or a sign is dropped, a number becomes another one. What
a change breaks must fail in the tests of its module. A line a change; the changes that no test found come last.
"""

from __future__ import annotations

import argparse
import ast
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
TESTS = {
  "method/algorithms.py": "method/test_algorithms.py method/test_diffdis.py test_inference.py",
  "method/alignment.py": "method/test_alignment.py",
  "method/diffdis.py": "method/test_diffdis.py method/test_algorithms.py",
  "method/fusion.py": "method/test_fusion.py",
  "method/guidance.py": "method/test_guidance.py method/test_algorithms.py",
  "method/joint.py": "method/test_joint.py method/test_diffdis.py",
  "method/losses.py": "method/test_losses.py training/test_step.py",
  "method/network.py": "method/test_network.py method/test_diffdis.py",
  "method/samplers.py": "method/test_samplers.py method/test_algorithms.py",
  "method/schedules.py": "method/test_schedules.py method/test_samplers.py",
  "method/step_noise.py": "method/test_algorithms.py method/test_diffdis.py test_inference.py evals",
  "training/losses.py": "training/test_contrastive.py training/test_step.py training/test_metrics.py",
  "training/long_tail.py": "training/test_mixing.py training/test_long_tail.py",
  "training/optim.py": "training/test_optim.py training/test_step.py",
}
OPPOSITE = {
  **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
  **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
}


def changes(node: ast.AST) -> Iterator[ast.expr]:
  """Yield what may stand in the node's place."""
  if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
    yield ast.Compare(node.left, [OPPOSITE[type(node.ops[0])](), *node.ops[1:]], node.comparators)
  elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
    yield ast.BinOp(node.left, OPPOSITE[type(node.op)](), node.right)
    yield node.left
  elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
    yield node.operand
  elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
    yield ast.Constant(node.value + 1 if type(node.value) is int or not node.value else 2 * node.value)


def expressions(tree: ast.AST) -> Iterator[ast.AST]:
  """Yield the nodes of functions' bodies in their order, but for annotations and messages of errors."""
  for name, child in ast.iter_fields(tree):
    if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(tree, ast.Call):
      continue
    for node in child if isinstance(child, list) else [child]:
      if isinstance(node, ast.AST) and not isinstance(node, ast.Raise):
        yield node
        yield from expressions(node)


def sites(tree: ast.Module) -> list[ast.AST]:
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
  return [*{id(node): node for function in functions for node in expressions(function)}.values()]


class Replace(ast.NodeTransformer):
  """Put `new` in the place of `old`."""

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


def is_found(checkout: pathlib.Path, path: str, source: str) -> bool:
  file = checkout / "diffdis_jax" / path
  before = file.read_text()
  file.write_text(source)
  files = [f"tests/{name}" for name in TESTS[path].split()]
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
  try:
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=900)
  except subprocess.TimeoutExpired:
    return True
  finally:
    file.write_text(before)
  if done.returncode > 2:
    raise RuntimeError(done.stdout + done.stderr)
  return done.returncode != 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=40, help="changes, drawn from all at random")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="a part of a module's name")
  given = parser.parse_args()
  every = []
  for path in TESTS:
    nodes = sites(ast.parse((ROOT / "diffdis_jax" / path).read_text())) if given.only in path else []
    every += [(path, i, k) for i, node in enumerate(nodes) for k, _ in enumerate(changes(node))]
  chosen = random.Random(given.seed).sample(every, min(given.count, len(every)))
  missed: list[str] = []
  passing: set[str] = set()
  with tempfile.TemporaryDirectory() as folder:
    checkout = pathlib.Path(folder)
    for name in COPIED:
      copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
      copied(ROOT / name, checkout / name)
    for path, i, k in chosen:
      if path not in passing and is_found(checkout, path, (checkout / "diffdis_jax" / path).read_text()):
        raise RuntimeError(f"the tests of {path} fail as it is: {TESTS[path]}")
      passing.add(path)
      text, source = mutated(path, i, k)
      found = is_found(checkout, path, source)
      sys.stdout.write(f"{'found ' if found else 'MISSED'} {text}\n")
      sys.stdout.flush()
      if not found:
        missed.append(text)
  sys.stdout.write("\n".join(["", *missed, f"{len(chosen) - len(missed)} of {len(chosen)} found, of {len(every)}\n"]))


if __name__ == "__main__":
  main()
