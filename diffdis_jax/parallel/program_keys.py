"""What a compiled program is made from, by which it is found again without tracing it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffdis_jax.common import code_digest, guesses

# What traces and compiles; of those that are installed.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "clu", "numpy")
OF_TPUS = ("libtpu",)
OF_GPUS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
OF_GPUS += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
# Settings of jax that no program depends on, or only by the devices, which are asked themselves.
_BESIDE = re.compile(
  "cache|_log|dump|platform|num_cpu_devices|visible_devices|timeout|address|explain|traceback|preemption|pprint"
  "|distributed|debug_leaked|share_binary|frames|xla_backend|backend_target"
)
_DUMPS = re.compile(r"--xla_\w*dump\w*(=\S*)?\s*")  # of texts, which preflight asks for
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")
_FEW = 8  # arrays of an argument, such as a batch, whose shapes a difference names; a state has a thousand


def key(name: str, args: Any, made_from: Mapping[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
  """Part -> what it is; JSON, and in the order in which a difference is looked for."""
  leaves, tree = jax.tree.flatten(args)
  shapes = [(x.shape, str(x.dtype), str(getattr(getattr(x, "sharding", None), "spec", None))) for x in leaves]
  first = devices[0]
  places = [(x.id, x.process_index, x.coords if x.platform == "tpu" else ()) for x in devices]
  key = {
    "packages": _packages(first.platform),
    "devices": {
      "kind": f"{len(devices)} x {first.device_kind}",
      "processes": len({x.process_index for x in devices}),
      "places": _digest(places),
    },
    "config": dict(made_from),
    "settings": _settings(),
    "source": {"of diffdis_jax": _source()},
    "program": {"name": name, **_few(args)},
    "arguments": {"of all": _digest(shapes, str(tree))},
  }
  if first.platform == "cpu":  # whose programs are made for its instructions, and for a process's own devices
    key["devices"] |= {"processor": _processor(), "process": jax.process_index()}
  return json.loads(json.dumps(key))  # with lists for tuples, as it is read back


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
  """The first thing in which two keys differ, for people; empty where they are equal."""
  for part in (part for part in here if here[part] != there.get(part)):
    ours, theirs = guesses.fields_of(here[part]), guesses.fields_of(there.get(part, {}))
    name = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
    return f"{part}: {name} is {theirs.get(name)} there and {ours.get(name)} here"
  return ""


def _few(args: Any) -> dict[str, str]:
  """Dtype and shape of each array of the arguments that have few: `argument 2.tokens` -> `int32[16, 8]`."""
  found = {}
  for i, argument in enumerate(args):
    leaves = jax.tree.leaves_with_path(argument)
    if len(leaves) <= _FEW:
      found |= {f"argument {i}{jax.tree_util.keystr(path)}": f"{x.dtype}{[*x.shape]}" for path, x in leaves}
  return found


@functools.cache
def _source() -> str:
  return code_digest.of(".")[:16]


def _packages(devices: str) -> dict[str, str]:
  """Version by name; of the compilers that of these devices alone, since a machine may have both."""
  own = {"tpu": OF_TPUS, "cpu": ()}.get(devices, OF_GPUS)
  found = {"python": ".".join(platform.python_version_tuple()[:2])}
  for name in (*PACKAGES, *own):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _settings() -> dict[str, str]:
  """Of jax and XLA: what is traced and how it is compiled depends on most of them."""
  values: dict[str, Any] = jax.config.values  # pyright: ignore[reportAttributeAccessIssue]
  found = {name: str(value) for name, value in sorted(values.items()) if not _BESIDE.search(name)}
  return found | {name: _DUMPS.sub("", os.environ.get(name, "")).strip() for name in _VARIABLES}


@functools.cache
def _processor() -> str:
  described = pathlib.Path("/proc/cpuinfo")
  lines = described.read_text().splitlines() if described.exists() else [platform.processor()]
  features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
  return f"{platform.machine()} {_digest(features or lines)}"


def _digest(*parts: Any) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
