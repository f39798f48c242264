"""Compare the PyTorch model of an export with ours, for each ablation and several numbers of steps."""

from __future__ import annotations

import ast
import dataclasses
import functools
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ml_collections import ConfigDict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from configs import diffdis_cc3m
from diffdis_jax.common.params import Params
from diffdis_jax.config.sections import TextDiffusion
from diffdis_jax.interop import mapping, to_torch, torch_diffdis
from diffdis_jax.method import schedules
from diffdis_jax.method.diffdis import DiffDis, to_signed
from tests import steps
from tests.models import from_torch, networks
from tests.test_imports import FILES, SHIPPED, imported_modules
from tests.test_inference import query_noise

T_E = np.array([0, 1, 500, 999], np.int32)


def tiny_config(**changes: Any) -> ConfigDict:
  """Return the config of a run that diffusers' pipeline can represent, with `changes`."""
  config = steps.make_config()
  config.model = networks.tiny_model()
  config.model.unet.update(widths=(8, 16), attention=(True, False), depth=1)
  config.update_from_flattened_dict(changes)
  return config


def twin_config(config: ConfigDict) -> dict[str, Any]:
  fields = config.to_dict()
  names = ("model", "image_size", "image_diffusion", "text_diffusion", "condition_timestep", "inference")
  own = {name: fields[name] for name in names}
  return own | {"max_length": config.data.max_length}


@dataclasses.dataclass
class Twin:
  """The PyTorch model of an export, with the three networks that its methods need."""

  diffdis: torch_diffdis.DiffDis
  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel

  @classmethod
  def from_pretrained(cls, folder: pathlib.Path) -> Twin:
    kinds: dict[str, Any] = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    kinds["diffdis"] = torch_diffdis.DiffDis
    return cls(**{name: kind.from_pretrained(folder / name) for name, kind in kinds.items()})

  def to(self, dtype: torch.dtype) -> Twin:
    return Twin(*(part.to(dtype) for part in vars(self).values()))

  @property
  def _given(self) -> dict[str, Any]:
    return dict(unet=self.unet, c_null=self.diffdis.null_condition(self.text_encoder))

  def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
    return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

  def predict_query(self, z: torch.Tensor, e_t: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
    return self.diffdis.to_query(self.diffdis.predict(z, e_t, t_e, **self._given), e_t, t_e)

  def embed_image(self, z: torch.Tensor, steps: int, noise: torch.Tensor) -> torch.Tensor:
    return self.diffdis.embed_image(z, noise, steps=steps, **self._given)

  def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
    return self.diffdis.embed_text(input_ids, text_encoder=self.text_encoder)


def make_twin(config: ConfigDict, params: Params, folder: pathlib.Path) -> Twin:
  """Write an export and load it. The export empties `params`."""
  to_torch.write(folder, params, twin_config(config))
  return Twin.from_pretrained(folder)


def network_of(config: ConfigDict) -> networks.Network:
  return networks.Network.of(networks.builder(config.model, config.objectives))


def predict(model: DiffDis, e_t: Any, t_e: Any, z: Any, t_z: Any, *, length: int) -> jax.Array:
  c_null = model.encode_text(model.text_encoder.null_tokens(length)).c
  c_null = jnp.broadcast_to(c_null, (len(z), *c_null.shape[1:]))
  return model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c_null)


@functools.cache
def tiny_network(**switches: Any) -> tuple[Params, Callable[..., jax.Array]]:
  """Return parameters, and a compiled function of (e_t, t_e, z, t_z) that predicts with them."""
  config = tiny_config(**switches)
  network = network_of(config)
  params = networks.random_params(network.shapes, seed=0)
  return params, functools.partial(network.jit(functools.partial(predict, length=config.data.max_length)), params)


def inputs(config: ConfigDict, size: tuple[int, int]) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  n, width = len(T_E), config.model.text_encoder.projection or config.model.text_encoder.width
  return dict(
    e_t=rng.standard_normal((n, width)).astype(np.float32),
    t_e=T_E,
    z=rng.standard_normal((n, *size, config.model.autoencoder.latent_channels)).astype(np.float32),
  )


def to_data(config: ConfigDict, prediction: jax.Array, *, e_t: np.ndarray, t_e: np.ndarray) -> jax.Array:
  process = TextDiffusion(**config.text_diffusion)
  return schedules.to_data(process, jnp.asarray(e_t), prediction=prediction, t=jnp.asarray(t_e))


def assert_same_query(twin: Twin, expected: Any, given: dict[str, np.ndarray], tolerance: float):
  e_t, t_e = torch.from_numpy(given["e_t"]), torch.from_numpy(given["t_e"])
  with torch.no_grad():
    query = twin.predict_query(from_torch.nchw(given["z"]), e_t, t_e)
  errors = [networks.relative_error(*rows) for rows in zip(query, expected, strict=True)]
  logging.getLogger(__name__).info("predicted query: max abs error %.1e of the largest magnitude", max(errors))
  assert max(errors) < tolerance


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"model.alignment.spatial_pool": 2},
    {"text_diffusion.target": "noise", "text_diffusion.schedule": "linear", "text_diffusion.gamma": 1.0},
    *(
      pytest.param(changes, marks=pytest.mark.slow)
      for changes in (
        {"model.fusion": False},
        {"model.share_attention": False},
        {"model.modality_ffn": False},
        {"model.text_encoder.projection": 12},
        {"condition_timestep": 0},
        {"text_diffusion.target": "noise"},
        {"text_diffusion.target": "noise", "text_diffusion.schedule": "cosine"},
      )
    ),
  ],
)
def test_predicted_query_equals_ours(changes, tmp_path):
  config = tiny_config(**changes)
  params, run = tiny_network(**{name: value for name, value in changes.items() if name.startswith("model.")})
  query_inputs = inputs(config, size=(8, 12))
  prediction = run(**query_inputs, t_z=np.full(len(T_E), config.condition_timestep, np.int32))
  expected = to_data(config, prediction, e_t=query_inputs["e_t"], t_e=T_E)
  assert_same_query(make_twin(config, dict(params), tmp_path), expected, query_inputs, tolerance=1e-5)


@pytest.mark.slow
def test_the_parameters_of_the_torch_model_equal_ours_at_full_size():
  config = diffdis_cc3m.get_config()
  with torch.device("meta"):
    twin = torch_diffdis.DiffDis(**twin_config(config))
  new = {name: tuple(x.shape) for name, x in twin.named_parameters()}
  entries = {name: mapping.from_name("diffdis", name) for name in new}
  theirs = {entries[name].path: entries[name].to_ours(np.broadcast_to(0.0, shape)).shape for name, shape in new.items()}
  ours = {path: leaf.shape for path, leaf in network_of(config).shapes.items()}
  assert theirs == {path: ours[path] for path in ours if path.startswith(("text_stream.", "alignment.", "logit_scale"))}
  assert sum(math.prod(shape) for shape in theirs.values()) == 126_067_201


@pytest.mark.full
@pytest.mark.parametrize(
  "arg",
  ["", "fusion=False", "share_attention=False", "modality_ffn=False", "target=noise", "condition_timestep=999"],
)
def test_predicted_query_equals_ours_at_full_size(arg, tmp_path):
  config = diffdis_cc3m.get_config(arg)
  config.model.dtype = "float32"
  network = network_of(config)
  params = networks.random_params(network.shapes, seed=0)
  run = jax.jit(network.pure(functools.partial(predict, length=config.data.max_length)))
  query_inputs = inputs(config, size=(32, 32))
  prediction = run(params, **query_inputs, t_z=np.full(len(T_E), config.condition_timestep, np.int32))
  expected = np.asarray(to_data(config, prediction, e_t=query_inputs["e_t"], t_e=T_E))
  twin = make_twin(config, params, tmp_path)
  shutil.rmtree(tmp_path)  # free 5 GB
  assert_same_query(twin, expected, query_inputs, tolerance=1e-4)


@pytest.mark.parametrize(
  "num_steps, target, normalize_query",
  [
    (3, "data", True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in ((1, "data", True), (3, "data", False), (3, "noise", True))
    ),
  ],
)
def test_embeddings_equal_ours(num_steps, target, normalize_query, tmp_path):
  config = tiny_config(**{"text_diffusion.target": target, "text_diffusion.schedule": "cosine"})
  config.inference.normalize_query = normalize_query
  inference = steps.make_inference(config, mesh=steps.make_mesh(), batch_size=4, steps=num_steps)
  params, _ = tiny_network()
  batch = steps.make_batch(config)
  images, tokens = batch.image[:3], batch.tokens[:3]
  image, text = inference.embed_images(params, images, seed=7), inference.embed_texts(params, tokens)

  twin = make_twin(config, dict(params), tmp_path)
  with torch.no_grad():
    z = twin.encode_image(from_torch.nchw(np.asarray(to_signed(jnp.asarray(images)))))
  their_image = twin.embed_image(z, num_steps, torch.from_numpy(query_noise(3, seed=7)))
  their_text = twin.embed_text(torch.from_numpy(tokens).long())
  assert networks.relative_error(image, their_image) < 1e-5
  assert networks.relative_error(text, their_text) < 1e-5
  assert np.abs(np.diff(image, axis=0)).max(axis=1).min() > 1e-3, "the images' queries should differ"


@pytest.mark.parametrize(
  "changes", [{"model.text_encoder.projection": 12}, {"model.text_encoder.token_embedding_weight": 0.7}]
)
def test_text_query_equals_ours(changes, tmp_path):
  config = tiny_config(**changes)
  params, _ = tiny_network(**changes)
  tokens = steps.make_batch(config).tokens[:3]
  encode = network_of(config).jit(lambda model, tokens: model.encode_text(tokens).e)
  theirs = make_twin(config, dict(params), tmp_path).embed_text(torch.from_numpy(tokens).long())
  assert networks.relative_error(encode(params, tokens), theirs) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("export")
  to_torch.write(path, dict(tiny_network()[0]), twin_config(tiny_config()))
  return path


def test_a_bfloat16_model_returns_float32_queries_close_to_float32s(folder):
  twin = Twin.from_pretrained(folder)
  query_inputs = inputs(tiny_config(), size=(8, 8))
  z, noise = from_torch.nchw(query_inputs["z"]), torch.from_numpy(query_inputs["e_t"])
  expected = twin.embed_image(z, 2, noise)
  query = twin.to(torch.bfloat16).embed_image(z, 2, noise)
  assert query.dtype == torch.float32
  assert (query * expected).sum(dim=1).min() > 0.99


def test_parameters_that_do_not_fit_the_config_are_refused(folder, tmp_path):
  own = shutil.copytree(folder / "diffdis", tmp_path / "diffdis")
  weights = load_file(own / "diffusion_pytorch_model.safetensors")
  weights["text_stream.blocks.9.fc_in.bias"] = weights.pop("text_stream.blocks.0.fc_in.bias")
  save_file(weights, own / "diffusion_pytorch_model.safetensors")
  with pytest.raises(ValueError, match=r"lack .*blocks\.0\.fc_in\.bias.* unknown .*blocks\.9"):
    torch_diffdis.DiffDis.from_pretrained(own)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine"])
def test_schedule_equals_ours(schedule):
  np.testing.assert_allclose(
    torch_diffdis.alpha_bar(schedule)[:-1], schedules.noise_schedule(schedule).alpha_bar, rtol=1e-9
  )


def test_timesteps_equal_ours():
  for n in (1, 2, 3, 7, 50, 999, 1000):
    ours = schedules.trailing(n)
    with torch.device("meta"):  # even if the default device, such as Apple's, has no float64
      assert torch_diffdis.trailing(n) == [*ours.t, ours.t_prev[-1]]
  for n in (0, 1001):
    with pytest.raises(ValueError, match=f"steps is {n}"):
      torch_diffdis.trailing(n)


def test_the_shipped_files_neither_import_the_package_nor_are_imported():
  for path in FILES:
    modules = set(imported_modules(ast.parse(path.read_text())))
    if f"interop/{path.name}" in SHIPPED:
      assert not [module for module in modules if module.startswith(("diffdis_jax", "jax.", "flax"))]
    else:
      assert not [module for module in modules if "interop.torch_" in module]
