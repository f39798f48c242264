"""Compiled programs on disk: found without a trace, run to the same bits, and refused where they are another's."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath

from diffdis_jax.config import Run
from diffdis_jax.config.run import BESIDE
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import executables, program_keys, programs, sharding
from diffdis_jax.structs import Batch, LatentBatch
from diffdis_jax.training.prepared import Prepared
from diffdis_jax.training.step import take_step
from tests.bucket_faults import away
from tests.steps import make_batch, make_config, make_mesh

_ADDRESS = re.compile(r"0x[0-9a-f]+")
X = jax.ShapeDtypeStruct((5,), jnp.float32)


def kept_in(folder, *, given: bool = False, **fields) -> executables.Kept:
  return executables.Kept(executables.Folder(epath.Path(folder), given=given), {"rate": 1, **fields}, jax.devices()[:1])


def doubled(x):
  return {"y": jax.random.normal(jax.random.key(0), x.shape) * 2 * x}


def untraceable(x):
  raise AssertionError("it is traced")


def ahead(kept: executables.Kept, f=doubled, args=X) -> programs.AheadOfTime:
  return programs.AheadOfTime("the sum", jax.jit(f, donate_argnums=0), args, kept=kept)


@pytest.fixture
def said(caplog):
  """The log's lines of this room: a thread of an earlier test, which waits for its data, may still log."""
  caplog.set_level("INFO")
  logging.set_verbosity(logging.INFO)
  with caplog.filtering(lambda record: pathlib.Path(record.pathname).parent.name == "parallel"):
    yield caplog


def test_a_program_is_found_again_without_a_trace_and_donates(tmp_path, said):
  expected = ahead(kept_in(tmp_path)).compiled()(jnp.arange(5.0))["y"]
  loaded = ahead(kept_in(tmp_path), untraceable).compiled()
  x = jnp.arange(5.0)
  np.testing.assert_array_equal(loaded(x)["y"], expected)
  assert x.is_deleted()
  found = [message.split(" in ")[0] for message in said.messages if not message.startswith("compiling")]
  assert found == ["compiled the sum", "loaded the sum"]


def test_one_that_came_from_jaxs_cache_is_kept_with_its_machine_code(tmp_path, said):
  expected = ahead(kept_in(tmp_path / "a")).compiled()(jnp.arange(5.0))["y"]
  jax.clear_caches()
  ahead(kept_in(tmp_path / "b")).compiled()
  assert said.messages[-1].endswith("from the cache")
  loaded = ahead(kept_in(tmp_path / "b"), untraceable).compiled()
  np.testing.assert_array_equal(loaded(jnp.arange(5.0))["y"], expected)


def test_another_config_version_device_or_argument_is_another_program(tmp_path, monkeypatch):
  ahead(kept_in(tmp_path)).compiled()
  for kept, args in ((kept_in(tmp_path, rate=2), X), (kept_in(tmp_path), jax.ShapeDtypeStruct((6,), jnp.float32))):
    assert kept.read("the sum", (args,)) is None
  assert dataclasses.replace(kept_in(tmp_path), devices=jax.devices()[1:2]).read("the sum", (X,)) is None
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
  assert kept_in(tmp_path).read("the sum", (X,)) is None
  monkeypatch.undo()
  assert kept_in(tmp_path).read("the sum", (X,)) is not None
  monkeypatch.setattr(program_keys, "_source", lambda: "edited")
  assert kept_in(tmp_path).read("the sum", (X,)) is None


@pytest.mark.parametrize(
  ("found", "message"),
  [
    ({}, "cannot read .*/sum.program: .*; it should be a folder of preflight --save"),
    ({"rate": 2}, "compiled for other config: rate is 2 there and 1 here; compile it again with preflight --save"),
  ],
)
def test_a_given_folder_with_another_program_is_refused(tmp_path, found, message):
  if found:
    ahead(kept_in(tmp_path, given=True, **found)).save()
  program = ahead(kept_in(tmp_path, given=True))
  for refused in (program.check, program.compiled):
    with pytest.raises(UserError, match=message):
      refused()


def test_a_difference_names_processes_and_what_a_batch_lacks():
  """And not only that something differs: `latents=none` of preflight has no stored text, and srun may start one process
  a node or one a GPU."""
  moments, text = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 4, 4, 4), (8, 7, 16)))
  tokens = jax.ShapeDtypeStruct((8, 7), jnp.int32)
  bare = LatentBatch(mean=moments, log_variance=moments, tokens=tokens, condition=None)
  state = dict.fromkeys("abcdefghi", X)

  def key(batch: LatentBatch = bare, *, processes: int = 1):
    device = functools.partial(types.SimpleNamespace, platform="gpu", device_kind="A")
    devices = [device(id=i, process_index=i % processes) for i in (0, 1)]
    return program_keys.key("a step", (state, batch), {"rate": 1}, devices)

  captioned, difference = dataclasses.replace(bare, condition=text), program_keys.difference
  with_text = key(captioned)
  said = "program: argument 1.condition is {} there and {} here"
  assert difference(with_text, key()) == said.format(None, "bfloat16[8, 7, 16]")
  assert difference(key(), with_text) == said.format("bfloat16[8, 7, 16]", None)
  assert difference(key(processes=2), key()) == "devices: processes is 1 there and 2 here"
  state = state | {"a": tokens}
  assert re.fullmatch(r"arguments: of all is \w+ there and \w+ here", difference(key(captioned), with_text))


def test_the_compiler_of_other_chips_makes_no_other_program(monkeypatch):
  """Whoever compares TPUs with GPUs by preflight has both, and the GPUs' hosts one."""
  device = types.SimpleNamespace(id=0, process_index=0, device_kind="A", coords=(0, 0, 0))

  def packages(platform: str, installed: tuple[str, ...]) -> dict[str, str]:
    versions = dict.fromkeys(("jax", *installed), "1.0")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name, "none"))
    device.platform = platform
    return program_keys.key("a step", (X,), {}, [device])["packages"]

  for platform, own, other in (("gpu", "jax-cuda12-plugin", "libtpu"), ("tpu", "libtpu", "jax-cuda12-plugin")):
    assert packages(platform, (own, other)) == packages(platform, (own,)) != packages(platform, (other,))
  assert packages("cpu", ("libtpu",)) == packages("cpu", ())


def test_damage_is_warned_of_in_a_given_folder_alone_and_compiled_again(tmp_path, said):
  for given, warned in ((False, 0), (True, 1)):
    kept = kept_in(tmp_path / str(given), given=given)
    ahead(kept).save()  # by the name of its key, or its own
    (file,) = kept.folder.path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"{}\n", whole[:-20], whole[:-1] + bytes([whole[-1] ^ 1])):
      file.write_bytes(damaged)
      said.clear()
      ahead(kept).check()
      assert ahead(kept).compiled()(jnp.ones(5))["y"].shape == (5,)
      warnings = [record.getMessage() for record in said.records if record.levelname == "WARNING"]
      assert len(warnings) == warned and all("is compiled again" in each for each in warnings)
      assert [*file.parent.iterdir()] == [file]
      # Nobody writes into a folder that train was given.
      assert (file.read_bytes() == damaged) == given
    ahead(kept).compiled()
    assert ("loaded" in said.messages[-1]) != given


def test_a_bucket_that_is_away_has_no_program(tmp_path, monkeypatch):
  fresh = executables.compile(jax.jit(doubled).lower(X))
  for name in ("read_bytes", "write_bytes"):
    monkeypatch.setattr(type(epath.Path(tmp_path)), name, away)
  assert kept_in(tmp_path).read("the sum", (X,)) is None
  given = kept_in(tmp_path, given=True)
  for asked in (lambda: given.read("the sum", (X,)), lambda: given.write("the sum", (X,), fresh)):
    with pytest.raises(Exception, match="^no backend, 503"):
      asked()


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
  programs_of = {rate: kept_in(tmp_path, rate=rate) for rate in (1, 2, 3)}
  for rate in (1, 2):
    ahead(programs_of[rate]).compiled()
    for file in tmp_path.iterdir():
      os.utime(file, (rate, rate))
  assert programs_of[1].read("the sum", (X,)) is not None  # which is a use
  size = max(file.stat().st_size for file in tmp_path.iterdir())
  monkeypatch.setattr(executables, "LIMIT", 2.5 * size)
  ahead(programs_of[3]).compiled()
  assert [kept.read("the sum", (X,)) is not None for kept in programs_of.values()] == [True, False, True]


def test_a_folder_that_cannot_be_written_is_named_where_it_was_given(tmp_path):
  (tmp_path / "file").write_text("")
  ahead(kept_in(tmp_path / "file")).compiled()
  with pytest.raises(UserError, match="cannot keep the sum in .*/file/sum.program"):
    ahead(kept_in(tmp_path / "file", given=True)).save()


def test_what_a_run_begins_with_is_saved_and_trains_to_the_same_bits(tmp_path, monkeypatch):
  config, mesh = make_config("reconstruction", batch_size=4), make_mesh(data=2)
  run, folder = Run.of(config), executables.Folder(epath.Path(tmp_path), given=True)
  Prepared.of(run, mesh, folder).save()
  names = ["initialisation.program", "state.program", "training_step.program"]
  assert sorted(each.name for each in tmp_path.iterdir()) == names
  batch = Batch(**sharding.to_global(vars(make_batch(config)), mesh))

  def two_steps(prepared: Prepared):
    trainer = prepared.trainer
    state = trainer.with_params(trainer.init_params(jax.random.key(run.seed)))
    for _ in range(2):
      before, (state, metrics) = state, take_step(prepared.train_step.compiled(), state, batch)
      assert jax.tree.leaves(before.params)[0].is_deleted()
    return jax.device_get((state, metrics))

  expected = two_steps(Prepared.of(run, mesh))
  loaded = Prepared.of(Run.of(make_config("reconstruction", batch_size=4, log_every=3)), mesh, folder)
  loaded.check(begins=True)
  monkeypatch.setattr(executables, "compile", None)
  jax.tree.map(np.testing.assert_array_equal, two_steps(loaded), expected)


def test_no_program_depends_on_the_fields_that_its_key_leaves_out():
  config, mesh = make_config(batch_size=4), make_mesh()
  changes = {"seed": 5, "init_from": "elsewhere", "data.path": "elsewhere", "data.augment.flip": True}
  changes |= {"checkpoint.keep_last": 7, "inference.generation_steps": 3, "sample_prompts": ("a star",), "evals": {}}
  changes |= {name: 3 for name in ("log_every", "save_every", "eval_every", "sample_every")}
  run = Run.of(config)
  other = run.replace(changes)
  assert {name.split(".")[0] for name in changes} | {"train_evals"} == {*BESIDE}
  assert run.of_programs() == other.of_programs() != run.replace({"optim.clip_norm": 0.7}).of_programs()
  texts = [str(Prepared.of(each, mesh).train_step.trace().jaxpr) for each in (run, other)]
  assert _ADDRESS.sub("", texts[0]) == _ADDRESS.sub("", texts[1])
