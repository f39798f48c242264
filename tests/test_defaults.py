"""A default of a config's field stands in the field's dataclass alone."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

import diffdis_jax
from diffdis_jax.config import Run, data, model, sections
from diffdis_jax.config.objectives import TABLE
from diffdis_jax.models import attention, layers, remat
from diffdis_jax.training import optim, step

ROOT = pathlib.Path(diffdis_jax.__file__).parent
SECTIONS = [
  kind
  for module in (sections, model, data)
  for _, kind in inspect.getmembers(module, dataclasses.is_dataclass)
  if kind.__module__ == module.__name__
]
FIELDS = {field.name for kind in (Run, *SECTIONS) for field in dataclasses.fields(kind)}
# What a section's fields go into.
FED = ("method", "models", "training", "data/build.py", "data/loader.py", "data/tokenizer.py", "run/checkpoint.py")
# Of the same name, but of no config: data that are not scaled, a norm's, a function, a state's seed.
OTHERS = {
  ("lgr", "dtype"),
  ("schedules", "gamma"),
  ("samplers", "gamma"),
  ("layers", "eps"),
  ("unet", "attention"),
  ("step", "seed"),
}


def defaults(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
  """Of every function's arguments and every class's fields, those that have one."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      positional = [*node.args.posonlyargs, *node.args.args]
      values = [*[None] * (len(positional) - len(node.args.defaults)), *node.args.defaults, *node.args.kw_defaults]
      pairs = zip([*positional, *node.args.kwonlyargs], values, strict=True)
      yield from ((argument.arg, value) for argument, value in pairs if value is not None)
    elif isinstance(node, ast.ClassDef):
      for each in node.body:
        if isinstance(each, ast.AnnAssign) and each.value is not None and isinstance(each.target, ast.Name):
          yield each.target.id, each.value


def is_none(value: ast.expr) -> bool:
  return isinstance(value, ast.Constant) and value.value is None


@pytest.mark.parametrize("place", FED)
def test_no_default_stands_twice(place: str):
  path = ROOT / place
  for file in path.rglob("*.py") if path.is_dir() else [path]:
    own = {name for name, value in defaults(ast.parse(file.read_text())) if not is_none(value)}
    twice = {name for name in own & FIELDS if (file.stem, name) not in OTHERS}
    assert not twice, f"{file}: {twice}; take the section, or its field without a default"


def test_the_test_sees_a_default():
  tree = ast.parse("def f(a, b=1, *, seed=0, c=None, d): ...\nclass A:\n  remat: str = 'none'\n  x: int")
  found = [(name, is_none(value)) for name, value in defaults(tree)]
  assert found == [("b", False), ("seed", False), ("c", True), ("remat", False)]


@pytest.mark.parametrize(
  "names, there",
  [
    (model.DTYPES, layers.DTYPES),
    (model.ACTIVATIONS, layers.ACTIVATIONS),
    (model.REMAT_POLICIES, remat.REMAT_POLICIES),
    (model.ATTENTION_KERNELS[1:], attention.KERNELS),
    (sections.MOMENTS, optim.MOMENTS),
  ],
)
def test_choices_are_those_that_there_are(names: tuple[str, ...], there: Any):
  assert names == (*there,)


def test_every_objective_has_a_loss():
  assert step.LOSSES.keys() == TABLE.keys()
