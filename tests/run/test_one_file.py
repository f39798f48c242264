"""A run in one file: that it stands for its workdir wherever one is read; damage, and what it does not hold."""

from __future__ import annotations

import json
import pathlib
import random
import re
import types

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from diffdis_jax import config as run_config
from diffdis_jax import export_weights, inference
from diffdis_jax.common import one_file
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.errors import UserError
from diffdis_jax.interop import packed as packing
from diffdis_jax.run import checkpoint, provenance, restore, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from tests.models.networks import random_params
from tests.steps import BOS, EOS, build_trainer, make_config, make_mesh, network_of

TOKENS, QUERY = "text_encoder.tokens.embedding", "text_encoder.query_tokens.embedding"
READ = [3, 5, 40]  # the tokens that discrimination has read


@pytest.fixture(scope="module")
def config():
  return make_config(**{"model.text_encoder.token_embedding_weight": 2.0, "inference.generation_steps": 2})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> str:
  """A run whose captions had three words, as import and training leave it: raw weights and averages of step 6."""
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


def test_licences_in_another_encoding_are_left_out(tmp_path, monkeypatch, caplog):
  """As somebody has added a name to them."""
  (tmp_path / "LICENSES.md").write_bytes(b"by Ren\xe9\n")
  (tmp_path / "config.json").touch()
  record = types.SimpleNamespace(data=types.SimpleNamespace(paths=[str(tmp_path)]), init_from="")
  monkeypatch.setattr(run_config, "load", lambda _: record)
  assert export_weights.licences_of(str(tmp_path)) == ""
  assert "the licences of its data cannot be read, add them yourself" in caplog.text


def test_the_file_stands_for_its_workdir(run, packed):
  # Without the folders of this machine, as all that leaves it.
  assert run_config.load(packed) == run_config.load(run).replace({"data.path": "data"})
  assert restore.choose(packed, None, ema=True) == restore.choose(run, None, ema=True) == (6, True)
  assert provenance.of_run(str(packed), step=6) == provenance.of_run(run, step=6)
  before, after = restore.restore_params(run), restore.restore_params(packed)
  assert before.keys() == after.keys() == restore.saved_params(packed).keys()
  for name in before.keys() - {TOKENS, QUERY}:
    assert after[name].dtype == np.float32
    # The exponential of logit_scale, a scalar, would be off by up to 1.6 %.
    written = before[name].astype("bfloat16") if before[name].ndim else before[name]
    np.testing.assert_array_equal(after[name], np.asarray(written, np.float32), err_msg=name)


def test_tokens_that_were_never_read_share_one_vector(run, packed):
  before, after = restore.restore_params(run), restore.restore_params(packed)
  kept = sorted({*READ, BOS, EOS})
  others = [token for token in range(99) if token not in kept]
  with safe_open(packed, "numpy") as file:
    assert file.get_tensor(one_file.KEPT).tolist() == kept
    assert file.get_slice(TOKENS).get_shape() == [len(kept) + 1, before[TOKENS].shape[1]]
  for name in (TOKENS, QUERY):
    table, found = np.asarray(before[name]), np.asarray(after[name])
    np.testing.assert_allclose(found[kept], table[kept], rtol=2**-8)
    np.testing.assert_allclose(found[others], np.tile(table[others].mean(axis=0), (94, 1)), rtol=2**-8)
  assert not np.asarray(after[QUERY])[others].any()


@pytest.mark.parametrize(
  "weight, read, origin",
  [
    (0.0, [], {}),  # no token vectors in the query
    (2.0, [], {}),  # they are there, and generation alone does not train them
    (2.0, READ, {"init_from": [{"imported": "sd"}]}),  # where the others are pretrained
  ],
)
def test_every_token_is_kept_where_none_is_known_to_be_untrained(tmp_path, weight, read, origin):
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


def test_only_the_tokens_of_given_texts_are_kept(run, tmp_path):
  """Where the table of tokens was never trained, as that of `shapes`, the file need not hold it whole."""
  text = "a red star\non grass"
  (tmp_path / "captions.txt").write_text(text)
  config = make_config(**{"model.text_encoder.vocab_size": 49408})
  params = random_params(network_of(config).shapes, 0)
  record = one_file.Record(config=config.to_dict(), step=1, ema=False, provenance={}, licences="")
  ids = sorted({int(x) for x in Tokenizer(16)([text.replace("\n", " ")])[0]})
  packing.write(tmp_path / "F.safetensors", params, record, dtype=np.float32, tokens=ids)
  after = one_file.read_params(tmp_path / "F.safetensors")
  np.testing.assert_array_equal(after[TOKENS][ids], params[TOKENS][ids])
  others = np.setdiff1d(np.arange(49408), [*ids, BOS, EOS])
  np.testing.assert_allclose(
    after[TOKENS][others], np.tile(params[TOKENS][others].mean(0), (len(others), 1)), atol=1e-6
  )
  assert (tmp_path / "F.safetensors").stat().st_size < 4 * params[TOKENS].size


@pytest.mark.parametrize(
  "content, message", [(b" \n", "no word in"), (b"\xff\xfe", "it should be a text file"), (None, "cannot")]
)
def test_texts_that_say_no_token_are_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "texts").write_bytes(content)
  with pytest.raises(UserError, match=message):
    export_weights.read_words(str(tmp_path / "texts"))


def test_results_of_its_checkpoint_stand_in_the_file(run, tmp_path):
  """Those of another checkpoint are left out."""
  record = dict(metrics={"acc1": 0.5}, dataset="few", model="m", pretrained="", task="zeroshot", language="en")
  records = {name: {**record, "protocol": {"checkpoint": step}} for name, step in (("few", 6), ("other", 5))}
  there = pathlib.Path(run) / "evaluation.json"
  there.write_text(json.dumps({"zero_shot": records}))
  try:
    export_weights.write_one_file(run, str(tmp_path / "F.safetensors"))
  finally:
    there.unlink()
  (found,) = provenance.results(tmp_path / "F.safetensors")
  assert (found.file, found.task, found.dataset) == ("evaluation.json", "zero_shot", "few")
  assert found.record["metrics"] == {"acc1": 0.5}


@pytest.mark.slow
def test_it_generates_and_classifies_as_its_workdir(run, packed):
  tokens = np.array([[BOS, 3, 40, EOS, EOS, EOS, EOS, EOS]], np.int32)
  (model, params), (_, own) = (inference.load(path, batch_size=8) for path in (str(packed), run))
  rounded = {name: np.asarray(value.astype("bfloat16"), np.float32) for name, value in own.items()}
  noise = model.noise(1, seed=0)
  images = model.generate(params, tokens, noise)
  np.testing.assert_array_equal(images, model.generate(rounded, tokens, noise))
  assert images.std() > 5
  np.testing.assert_array_equal(model.embed_texts(params, tokens), model.embed_texts(rounded, tokens))


def test_a_run_starts_from_it(config, run, packed):
  trainer = build_trainer(config, make_mesh())
  found, expected = (start.load_initial(path, trainer) for path in (str(packed), run))
  assert found.keys() == expected.keys() and len(found) > 100
  (link, *rest), (other, *more) = (provenance.behind(path) for path in (str(packed), run))
  assert (link, rest) == (other, more) and link["steps"] == 6


def test_it_says_what_it_is(packed):
  record = one_file.read_record(packed)
  assert (record.step, record.ema, record.licences) == (6, True, "The images are CC-BY-4.0.\n")
  assert str(packed.parents[1]) not in json.dumps(record.config)  # folders of this machine


def test_its_licences_are_those_of_its_starts_too(run, packed, tmp_path, caplog):
  """Each once: a run and its start may have the same data. A start that is gone says nothing, nor one that is
  damaged."""
  own, data = "The pictures are CC0.\n", tmp_path / "data"
  data.mkdir()
  (data / "LICENSES.md").write_text(own)

  def begun_from(start: str, name: str) -> str:
    config = make_config(init_from=start, **{"data.path": str(data)})
    workdir.open_for_training(tmp_path / name, config.to_dict())
    return export_weights.licences_of(str(tmp_path / name))

  both = "The pictures are CC0.\n\nThe images are CC-BY-4.0.\n"
  assert begun_from(run, "a") == begun_from(str(packed), "b") == begun_from(str(tmp_path / "a"), "c") == both
  assert begun_from(str(tmp_path / "gone"), "d") == begun_from(str(tmp_path / "e"), "e") == own
  (tmp_path / "damaged.safetensors").write_bytes(packed.read_bytes()[:100])
  assert begun_from(str(tmp_path / "damaged.safetensors"), "f") == own
  assert "the licences of its data cannot be read, add them yourself" in caplog.text


def test_a_name_stands_for_a_file_where_no_folder_has_it(packed, tmp_path, monkeypatch):
  monkeypatch.setattr(one_file, "models", lambda: {"few": packed})
  monkeypatch.chdir(tmp_path)
  assert restore.choose("few", None, ema=True) == (6, True)
  for read in (run_config.load, restore.restore_params):
    with pytest.raises(UserError, match=r"no (folder fex|checkpoint in .*fex).*; did you mean few\?$"):
      read("fex")
  (tmp_path / "few").mkdir()
  with pytest.raises(UserError, match=re.escape("no config.json in few")):
    run_config.load("few")


def test_weights_of_pytorch_are_imported_first(tmp_path):
  (tmp_path / "sd").mkdir()
  (tmp_path / "sd" / "model_index.json").write_text("{}")
  (tmp_path / "clip").mkdir()  # of transformers, whose config has a run's name
  (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
  (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
  (tmp_path / "open_clip").mkdir()
  (tmp_path / "open_clip" / "open_clip_config.json").write_text("{}")
  (tmp_path / "v1.ckpt").write_bytes(b"")
  save_file({"model.diffusion_model.x": np.ones(1, np.float32)}, tmp_path / "v1.safetensors")
  for name in ("sd", "clip", "open_clip", "v1.ckpt", "v1.safetensors"):
    for read in (run_config.load, restore.saved_params):  # as for --workdir, and for init_from
      with pytest.raises(UserError, match=rf"{name}.*; weights of PyTorch take diffdis import_weights first$"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
  "how, said",
  [
    (dict(step=7), "no checkpoint 7 in .*few.safetensors, which holds that of step 6 alone"),
    (dict(ema=False), "few.safetensors holds averaged weights alone; leave --noema out"),
  ],
)
def test_what_it_does_not_hold_is_refused(packed, how, said):
  with pytest.raises(UserError, match=said):
    restore.restore_params(packed, **how)


def test_a_model_of_another_size_is_refused(packed):
  with pytest.raises(UserError, match="few.safetensors does not fit this model in 1 arrays; the first, x, is absent"):
    shapes = dict(restore.saved_params(packed))
    restore.restore_params(packed, abstract=shapes | {"x": jax.ShapeDtypeStruct((1,), np.float32)})


def test_any_flipped_bit_is_found_and_said_in_one_line(packed, tmp_path):
  rng, file, whole = random.Random(0), tmp_path / "F.safetensors", packed.read_bytes()
  length = 8 + int.from_bytes(whole[:8], "little")
  # Of the header's length, of the header, of weights; and a file that is cut short.
  for at in (
    0,
    7,
    9,
    *(rng.randrange(8, length) for _ in range(60)),
    *(rng.randrange(length, len(whole)) for _ in "12"),
  ):
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
