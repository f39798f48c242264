"""Test that a run in one file is read wherever a workdir is, and that damage is detected."""

from __future__ import annotations

import json
import pathlib
import random
import re

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from diffdis_jax import config as run_config
from diffdis_jax import export_weights
from diffdis_jax.common import one_file
from diffdis_jax.errors import UserError
from diffdis_jax.interop import packed as packing
from diffdis_jax.run import checkpoint, provenance, restore, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from tests.models.networks import random_params
from tests.steps import BOS, EOS, build_trainer, make_config, make_mesh, network_of

TOKENS, QUERY = "text_encoder.tokens.embedding", "text_encoder.query_tokens.embedding"
READ = [3, 5, 40]  # the tokens that occurred in training captions


@pytest.fixture(scope="module")
def config():
  return make_config(**{"model.text_encoder.token_embedding_weight": 2.0, "inference.generation_steps": 2})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> str:
  """Make a run at step 6 with averaged weights. Its captions had three words."""
  folder = tmp_path_factory.mktemp("one_file")
  config.data.path = str(folder / "data")
  (folder / "data").mkdir()
  (folder / "data" / "LICENSES.md").write_text("The images are CC-BY-4.0.\n")
  path = folder / "run"
  workdir.open_for_training(path, config.to_dict())
  shapes = network_of(config).shapes
  params, ema = (random_params(shapes, seed) for seed in (1, 2))
  for values in (params, ema):
    rows = np.zeros_like(values[QUERY])
    rows[READ] = values[QUERY][READ]
    values[QUERY] = rows
  with checkpoint.Checkpointer(str(path)) as checkpointer:
    checkpointer.save(6, TrainState(params=params, ema=ema))
  return str(path)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory) -> pathlib.Path:
  file = tmp_path_factory.mktemp("packed") / "few.safetensors"
  export_weights.write_one_file(run, str(file), dtype="bfloat16")
  return file


def test_the_file_is_read_like_its_workdir(config, run, packed):
  # The paths of this machine's folders are left out.
  assert run_config.load(packed) == run_config.load(run).replace({"data.path": "data"})
  assert restore.choose(packed, None, ema=True) == restore.choose(run, None, ema=True) == (6, True)
  assert provenance.of_run(str(packed), step=6) == provenance.of_run(run, step=6)
  assert provenance.behind(str(packed)) == provenance.behind(run) != []
  record = one_file.read_record(packed)
  assert (record.step, record.ema, record.licences) == (6, True, "The images are CC-BY-4.0.\n")
  assert str(packed.parents[1]) not in json.dumps(record.config)  # no path of this machine
  before, after = restore.restore_params(run), restore.restore_params(packed)
  assert before.keys() == after.keys() == restore.saved_params(packed).keys()
  for name in before.keys() - {TOKENS, QUERY}:
    assert after[name].dtype == np.float32
    # bfloat16 would change the exponential of the scalar logit_scale by up to 1.6 %.
    written = before[name].astype("bfloat16") if before[name].ndim else before[name]
    np.testing.assert_array_equal(after[name], np.asarray(written, np.float32), err_msg=name)
  trainer = build_trainer(config, make_mesh())
  assert start.load_initial(str(packed), trainer).keys() == start.load_initial(run, trainer).keys()


def test_tokens_that_were_never_read_share_one_vector(run, packed):
  before, after = restore.restore_params(run), restore.restore_params(packed)
  kept = sorted({*READ, BOS, EOS})
  others = [token for token in range(99) if token not in kept]
  with safe_open(packed, "numpy") as file:
    assert file.get_tensor(one_file.KEPT).tolist() == kept
    assert file.get_slice(TOKENS).get_shape() == [len(kept) + 1, before[TOKENS].shape[1]]
  for name in (TOKENS, QUERY):
    table, packed_table = np.asarray(before[name]), np.asarray(after[name])
    np.testing.assert_allclose(packed_table[kept], table[kept], rtol=2**-8)
    np.testing.assert_allclose(packed_table[others], np.tile(table[others].mean(axis=0), (94, 1)), rtol=2**-8)
  assert not np.asarray(after[QUERY])[others].any()


@pytest.mark.parametrize(
  "weight, read, origin",
  [
    (0.0, [], {}),  # the query has no token vectors
    (2.0, [], {}),  # it has them, but generation alone does not train them
    (2.0, READ, {"init_from": [{"imported": "sd"}]}),  # the other vectors are pretrained
  ],
)
def test_every_token_is_kept_if_none_is_known_to_be_untrained(tmp_path, weight, read, origin):
  config = make_config(**{"model.text_encoder.token_embedding_weight": weight})
  params = random_params(network_of(config).shapes, 0)
  if weight:
    params[QUERY][np.setdiff1d(np.arange(99), read)] = 0
  record = one_file.Record(config=config.to_dict(), step=1, ema=False, provenance=origin, licences="")
  packing.write(tmp_path / "F.safetensors", params, record, dtype=np.float32)
  after = one_file.read_params(tmp_path / "F.safetensors")
  assert one_file.read_record(tmp_path / "F.safetensors").licences == ""
  for name, value in params.items():
    np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_the_file_holds_the_results_of_its_checkpoint(run, tmp_path):
  record = dict(metrics={"acc1": 0.5}, dataset="few", model="m", pretrained="", task="zeroshot", language="en")
  records = {name: {**record, "protocol": {"checkpoint": step}} for name, step in (("few", 6), ("other", 5))}
  results_file = pathlib.Path(run) / "evaluation.json"
  results_file.write_text(json.dumps({"zero_shot": records}))
  try:
    export_weights.write_one_file(run, str(tmp_path / "F.safetensors"))
  finally:
    results_file.unlink()
  (result,) = provenance.results(tmp_path / "F.safetensors")  # the results of another checkpoint are left out
  assert (result.file, result.task, result.dataset) == ("evaluation.json", "zero_shot", "few")
  assert result.record["metrics"] == {"acc1": 0.5}


def test_the_licences_of_a_runs_starts_are_included(run, packed, tmp_path, caplog):
  """Each licence appears once. A start that is missing or damaged adds none."""
  own, data = "The pictures are CC0.\n", tmp_path / "data"
  data.mkdir()
  (data / "LICENSES.md").write_text(own)

  def licences_of_run_from(start: str, name: str) -> str:
    config = make_config(init_from=start, **{"data.path": str(data)})
    workdir.open_for_training(tmp_path / name, config.to_dict())
    return export_weights.licences_of(str(tmp_path / name))

  two = "The pictures are CC0.\n\nThe images are CC-BY-4.0.\n"
  assert (
    licences_of_run_from(run, "a")
    == licences_of_run_from(str(packed), "b")
    == licences_of_run_from(str(tmp_path / "a"), "c")
    == two
  )
  assert licences_of_run_from(str(tmp_path / "gone"), "d") == own
  (tmp_path / "damaged.safetensors").write_bytes(packed.read_bytes()[:100])
  assert licences_of_run_from(str(tmp_path / "damaged.safetensors"), "e") == own
  assert "the licences of its data cannot be read, add them yourself" in caplog.text


def test_a_name_means_a_shipped_file_unless_a_folder_has_it(packed, tmp_path, monkeypatch):
  monkeypatch.setattr(one_file, "models", lambda: {"few": packed})
  monkeypatch.chdir(tmp_path)
  assert restore.choose("few", None, ema=True) == (6, True)
  for read in (run_config.load, restore.restore_params):
    with pytest.raises(UserError, match=r"no (folder fex|checkpoint in .*fex).*; did you mean few\?$"):
      read("fex")
  (tmp_path / "few").mkdir()
  with pytest.raises(UserError, match=re.escape("no config.json in few")):
    run_config.load("few")


def test_weights_of_pytorch_are_refused_until_they_are_imported(tmp_path):
  (tmp_path / "sd").mkdir()
  (tmp_path / "sd" / "model_index.json").write_text("{}")
  (tmp_path / "clip").mkdir()  # a transformers checkpoint, which also has a config.json
  (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
  (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
  save_file({"model.diffusion_model.x": np.ones(1, np.float32)}, tmp_path / "v1.safetensors")
  for name in ("sd", "clip", "v1.safetensors"):
    for read in (run_config.load, restore.saved_params):  # --workdir and init_from
      with pytest.raises(UserError, match=rf"{name}.*; weights of PyTorch take diffdis import_weights first$"):
        read(str(tmp_path / name))


def test_steps_and_arrays_that_the_file_lacks_are_refused(packed):
  shapes = dict(restore.saved_params(packed)) | {"x": jax.ShapeDtypeStruct((1,), np.float32)}
  for how, message in (
    (dict(step=7), "no checkpoint 7 in .*few.safetensors, which holds that of step 6 alone"),
    (dict(ema=False), "few.safetensors holds averaged weights alone; leave --noema out"),
    (dict(abstract=shapes), "does not fit this model in 1 arrays; the first, x, is absent"),
  ):
    with pytest.raises(UserError, match=message):
      restore.restore_params(packed, **how)


def test_any_flipped_bit_is_refused_in_one_line(packed, tmp_path):
  rng, file, whole = random.Random(0), tmp_path / "F.safetensors", packed.read_bytes()
  length = 8 + int.from_bytes(whole[:8], "little")
  # Flip a bit of the header's length, of the header, or of weights; then cut the file short.
  header, weights = [rng.randrange(8, length) for _ in range(60)], [rng.randrange(length, len(whole)) for _ in "12"]
  for at in (0, 7, 9, *header, *weights):
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    with pytest.raises(UserError, match="F.safetensors") as error:
      one_file.read_params(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
  for size in (0, 5, length - 1, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(UserError, match="F.safetensors"):
      one_file.read_params(file)


def test_weights_beyond_the_dtype_leave_no_file(tmp_path):
  config = make_config()
  params = random_params(network_of(config).shapes, 0)
  params["unet.conv_in.bias"] = np.full_like(params["unet.conv_in.bias"], 1e6)
  record = one_file.Record(config=config.to_dict(), step=1, ema=False, provenance={}, licences="")
  with pytest.raises(UserError, match="unet.conv_in.bias is beyond the range of float16"):
    packing.write(tmp_path / "F.safetensors", params, record, dtype=np.float16)
  params["unet.conv_in.bias"] *= np.float32(np.nan)
  with pytest.raises(UserError, match="unet.conv_in.bias is not finite, .*; take an earlier checkpoint, --step"):
    packing.write(tmp_path / "F.safetensors", params, record, dtype=np.float32)
  assert not list(tmp_path.iterdir())
