"""Test the batches of images, latents and mixtures that a config's data section opens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.config import Run
from diffdis_jax.data import encoders, loader
from diffdis_jax.data.build import batch_type, describe, doubts, latent_facts, open_loader
from diffdis_jax.data.prepare import latents, parts
from diffdis_jax.data.prepare.write import prepare
from diffdis_jax.data.transforms import Augmentation
from diffdis_jax.errors import UserError
from diffdis_jax.method.diffdis import to_signed
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import Batch, LatentBatch
from diffdis_jax.training.step import abstract_batch
from tests import steps, tiny
from tests.models.networks import random_params
from tests.raw_pairs import write_pairs
from tests.steps import network_of

N = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Prepare twenty pairs."""
  folder = tmp_path_factory.mktemp("data")
  write_pairs(folder / "raw", N, size=(24, 20))
  prepare(parts.tars(folder / "raw"), folder / "pairs")
  return folder


@pytest.fixture(scope="module")
def params():
  return random_params(network_of(tiny.get_config()).shapes, seed=0)


@pytest.fixture(scope="module")
def cache(data, params):
  return write_latents(data, data / "latents", params)


def write_latents(data, out, params):
  model = steps.make_inference(tiny.get_config(), mesh=steps.make_mesh(), batch_size=8)
  h, w, c = model.network.latent_shape
  prepare(
    latents.find_parts(data / "pairs"),
    out,
    data_set=latents.data_set(data / "pairs"),
    make_stage=lambda folder: latents.LatentStage(
      folder,
      encode=lambda images: model.moments(params, images),
      shape=(h, w, 2 * c),
      image_size=16,
      views=1,
      augmentation=Augmentation(),
      fingerprint=encoders.autoencoder_digest(params, model.network.model),
    ),
  )
  return out


def check_encoders(config, params):
  run = Run.of(config)
  encoders.check_stored(latent_facts(run.data), params, run.model)


def config_of(**changes):
  config = tiny.get_config()
  config.batch_size = N
  config.update_from_flattened_dict(changes)
  return config


def test_latents_are_the_posteriors_of_the_images(data, cache, params):
  config = config_of(**{"data.name": "latents", "data.path": str(cache)})
  images = next(steps.open_batches(config_of(**{"data.name": "pairs", "data.path": str(data / "pairs")})))
  stored = next(steps.open_batches(config))
  assert batch_type(Run.of(config).data) is LatentBatch
  np.testing.assert_array_equal(stored["tokens"], images["tokens"])
  model = network_of(config).with_params(params)
  posterior = jax.jit(lambda image: model.autoencoder.encode(to_signed(image)))(images["image"])
  for name in ("mean", "log_variance"):
    np.testing.assert_allclose(
      stored[name].astype(np.float32), getattr(posterior, name), rtol=0.02, atol=0.02, err_msg=name
    )
  check_encoders(config, params)
  other = {path: value + 0.1 for path, value in params.items()}
  with pytest.raises(UserError, match="were made by another autoencoder; set init_from to the workdir"):
    check_encoders(config, other)
  kernel = params["autoencoder.conv_in.kernel"]
  colours = kernel.reshape(*kernel.shape[:2], 3, -1, kernel.shape[3])  # input channels are (colour, pixel of a patch)
  bgr = {**params, "autoencoder.conv_in.kernel": colours[:, :, ::-1].reshape(kernel.shape)}
  with pytest.raises(UserError, match="were made by another autoencoder"):  # the kernel's mean magnitude is the same
    check_encoders(config, bgr)
  decoder = {path: value + (0.1 if "decoder" in path else 0.0) for path, value in params.items()}
  check_encoders(config, decoder)


def test_a_step_is_compiled_for_the_batches_that_are_stored(cache):
  config = config_of(**{"data.name": "latents", "data.path": str(cache)})
  batch = LatentBatch(**loader.Substitutions().take(next(steps.open_batches(config))))
  compiled_for = abstract_batch(Run.of(config), network_of(config), steps.make_mesh())
  assert jax.tree.structure(compiled_for) == jax.tree.structure(batch)
  shapes = lambda batch: [(x.shape, x.dtype) for x in jax.tree.leaves(batch)]
  assert shapes(compiled_for) == shapes(batch)


def test_latents_that_do_not_fit_the_config_are_refused(cache):
  settings = {"data.name": "latents", "data.path": str(cache)}
  for change, message in (
    ({"image_size": 32}, "of 16 px images and of shape .4, 4, 8.; the config's are of 32 px and .8, 8, 8."),
    ({"data.discrimination_view": "own"}, "need images; take another data.name"),
    ({"objectives": ("reconstruction",)}, "need images; take another data.name"),
  ):
    with pytest.raises(UserError, match=message):
      steps.open_batches(config_of(**settings, **change))


def test_a_mixture_gives_batches_and_describes_its_sources(data, cache):
  prepared = {"path": str(data / "pairs"), "weight": 3.0}
  config = config_of()
  config.data.mixture = {"prepared": prepared, "drawn": {"name": "shapes", "weight": 1.0}}
  assert batch_type(Run.of(config).data) is Batch
  assert next(steps.open_batches(config))["image"].shape == (N, 16, 16, 3)
  drawn, pairs_line = describe(Run.of(config).data)
  assert drawn == "shapes, split train, weight 1.0"
  assert pairs_line.endswith("split train: 20 records, weight 3.0")
  config.data.mixture.cached = {"name": "latents", "path": str(cache)}
  with pytest.raises(UserError, match="data.mixture has latents and images; take either"):
    batch_type(Run.of(config).data)


def test_latents_of_other_views_than_the_config_asks_for_are_named(cache):
  views = {"data.name": "latents", "data.path": str(cache)}
  assert doubts(Run.of(config_of(**views))) == []
  (doubt,) = doubts(Run.of(config_of(**views, **{"data.augment.crop": "random", "data.augment.flip": True})))
  assert doubt.endswith(
    "its views were made by crop=centre, flip=False; data.augment, crop=random, flip=True, has no effect on latents"
  )


@pytest.mark.parametrize("field", [{"data.path": "CC3M"}, {"data.caption_fields": ("key",)}])
def test_a_mixture_beside_other_data_is_refused(data, field):
  config = config_of(**field)
  config.data.mixture = {"own": {"path": str(data / "pairs")}}
  with pytest.raises(UserError, match=f"^{min(field)} is .* which data.mixture takes the place of: give"):
    Run.of(config)


@pytest.mark.parametrize("mixture", [{}, {"own": {"path": "P", "image_size": 8}}])
def test_a_runs_data_section_must_not_set_the_image_size(mixture):
  """Only the data section of an evaluation sets image_size; a run's images have the run's size."""
  config = config_of()
  config.data.mixture = mixture
  if not mixture:
    config.data.image_size = 8
  where = "data.mixture.own.image_size" if mixture else "data.image_size"
  with pytest.raises(UserError, match=f"^{where} is 8; leave it out: it is the run's image_size"):
    Run.of(config)


@pytest.mark.parametrize(
  "section, message",
  [
    ({"wieght": 2}, "a data source has no field 'wieght'; did you mean weight?"),
    ({"num_images": "2"}, "num_images is '2'; it must be a whole number"),
    ({"split": "dev"}, "shapes has no split 'dev'"),
  ],
)
def test_an_error_in_a_source_of_a_mixture_names_the_source(section, message):
  config = config_of()
  config.data.mixture = {"own": {"name": "shapes", **section}}
  with pytest.raises(UserError, match=re.escape(f"data.mixture.own: {message}")):
    open_loader(Run.of(config))


def test_a_digest_depends_on_the_bits_of_the_encoder_alone(params):
  model = Run.of(config_of()).model
  digest = encoders.autoencoder_digest(params, model)
  other_decoder = params | {path: params[path] + 1 for path in ("autoencoder.scale", "autoencoder.post_quant.bias")}
  assert encoders.autoencoder_digest(other_decoder, model) == digest
  path = "autoencoder.quant.kernel"
  assert encoders.autoencoder_digest({**params, path: jnp.nextafter(params[path], jnp.inf)}, model) != digest


def test_digests_are_the_same_for_sharded_parameters(params):
  model, mesh = Run.of(config_of()).model, sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sharded = jax.device_put(params, sharding.shardings(params, mesh, params))
  kernel = sharded["autoencoder.conv_in.kernel"]
  assert len({str(shard.index) for shard in kernel.addressable_shards}) > 1
  assert encoders.autoencoder_digest(sharded, model) == encoders.autoencoder_digest(params, model)
