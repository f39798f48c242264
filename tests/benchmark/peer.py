"""Time the UNet, forwards and backwards, against diffusers' under PyTorch, in turns, in one process.

  python -m tests.benchmark.peer OUT.json [ROUNDS]

takes replication/configs/benchmark.py.

Both have the same weights, noised latents and text conditions. On a GPU diffusers' is compiled by `torch.compile`, in
channels-last layout; on a CPU both use all cores.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from diffdis_jax.common import files
from diffdis_jax.common.params import Params, flatten, merge
from diffdis_jax.config.model import Model
from diffdis_jax.config.run import Run
from diffdis_jax.interop import mapping, sections
from diffdis_jax.method.network import Network, abstract_module, initial_state
from diffdis_jax.models.unet import UNet
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance
from replication.configs import benchmark

Inputs = Mapping[str, np.ndarray]
# One pass forwards and backwards, finished; returns the predicted noise [b, h, w, c].
Pass = Callable[[], Float[Any, "b h w c"]]


def time_peer(network: Network, *, batch_size: int, rounds: int) -> dict[str, Any]:
  """Time our UNet and diffusers', both with batches of this size, and return how far their predictions lie apart.

  Each has `rounds` timed passes, and one more that warms up.
  """
  model = network.model
  assert isinstance(model, Model)
  device, inputs = _device_of_torch(), _inputs(network, model, batch_size)
  params, ours = _ours(network, model, inputs)
  ways = {"ours": ours, "diffusers": _theirs(network, model, params, inputs, device)}
  # The pass that warms up also shows that both compute the same.
  noise = {name: np.asarray(once(), np.float64) for name, once in ways.items()}
  difference = np.abs(noise["ours"] - noise["diffusers"]).max() / np.abs(noise["diffusers"]).max()
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, once in ways.items():
      begin = time.perf_counter()
      once()
      seconds[name].append(time.perf_counter() - begin)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  ratio = median["ours"] / median["diffusers"]
  logging.info("ours %.3f s, diffusers' %.3f s: %.2f times as long", median["ours"], median["diffusers"], ratio)
  return dict(
    device=jax.devices()[0].device_kind,
    dtype=model.dtype,
    batch_size=batch_size,
    latents=list(network.latent_shape),
    parameters=sum(leaf.size for leaf in params.values()),
    seconds=median,
    rounds=seconds,
    ours_over_diffusers=ratio,
    largest_difference=float(difference),
  )


def _device_of_torch() -> str:
  import torch

  backend = jax.default_backend()
  if backend == "cpu":
    return "cpu"
  if backend == "gpu" and torch.cuda.is_available():
    return "cuda"
  raise RuntimeError(f"JAX computes on {backend}, which this PyTorch cannot; install a PyTorch for it, or JAX for CPUs")


def _inputs(network: Network, model: Model, batch_size: int) -> Inputs:
  """Return z_t, t_z, c and the noise to predict."""
  # Noise for all of them: what a pass costs does not depend on the values.
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((batch_size, *shape), np.float32)
  return dict(
    z=normal(*network.latent_shape),
    t=rng.integers(0, 1000, batch_size, np.int32),
    c=normal(network.max_length, model.text_encoder.width),
    noise=normal(*network.latent_shape),
  )


class _Loss(NamedTuple):
  value: Float[Array, ""]
  prediction: Float[Array, "b h w c"]


def _ours(network: Network, model: Model, inputs: Inputs) -> tuple[Params, Pass]:
  build = lambda rngs: UNet(model, up_path=True, dtype=network.dtype, rngs=rngs)
  graphdef, abstract = abstract_module(build)
  # PyTorch has one GPU, or all cores of a CPU; those are as many devices to JAX.
  devices = jax.devices() if jax.default_backend() == "cpu" else jax.devices()[:1]
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, devices=devices)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params = jax.jit(lambda key: flatten(initial_state(build, key)), out_shardings=whole)(jax.random.key(0))
  batch = sharding.to_global(inputs, mesh)

  def loss(params: Params, z: Array, t: Array, c: Array, noise: Array) -> _Loss:
    prediction = merge(graphdef, abstract, params)(z, t, c)
    return _Loss(jnp.mean(jnp.square(noise - prediction)), prediction)

  passes = jax.jit(network.tracing(mesh)(jax.value_and_grad(loss, has_aux=True)))

  def once() -> Float[Array, "b h w c"]:
    (_, prediction), gradients = passes(params, *(batch[name] for name in inputs))
    # The call returns before it is computed; PyTorch on a GPU is waited for below.
    jax.block_until_ready(gradients)
    return prediction

  return params, once


def _theirs(network: Network, model: Model, params: Params, inputs: Inputs, device: str) -> Pass:
  """Return the pass of diffusers' UNet with the same parameters, in the same dtype."""
  import torch
  from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

  config = sections.write_unet(
    dataclasses.asdict(model.unet),
    latent_channels=model.autoencoder.latent_channels,
    context_width=model.text_encoder.width,
    sample_size=network.latent_shape[0],
  )
  unet: Any = UNet2DConditionModel.from_config(config)
  entries = {path: mapping.from_path(f"unet.{path}") for path in params}
  state = {entry.name: np.array(entry.to_theirs(np.asarray(params[path]))) for path, entry in entries.items()}
  # Strict: with a parameter too many or too few it would be another network.
  unet.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
  # By itself PyTorch takes TF32 for convolutions, and not for products.
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = network.matmul_precision != "highest"
  # A copy: with the strides of NHWC PyTorch takes it for channels-last, for which it has other convolutions.
  nchw = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(device)
  z, noise = nchw(inputs["z"]), nchw(inputs["noise"])
  t, c = (torch.from_numpy(inputs[name]).to(device) for name in "tc")
  run = unet.to(device)
  if device == "cuda":
    # The fastest that PyTorch has there, or the comparison would flatter ours.
    run = torch.compile(unet.to(memory_format=torch.channels_last))

  def once() -> Float[np.ndarray, "b h w c"]:
    unet.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16"):
      prediction = run(z, t, encoder_hidden_states=c).sample
    torch.mean(torch.square(noise - prediction.float())).backward()
    if device == "cuda":
      torch.cuda.synchronize()
    return prediction.detach().float().cpu().numpy().transpose(0, 2, 3, 1)

  return once


if __name__ == "__main__":
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it leaves PyTorch no memory of a GPU
  logging.set_verbosity(logging.INFO)
  run = Run.of(benchmark.get_config())
  origin = provenance.provenance(provenance.of_config(run.to_dict()))
  measured = time_peer(Network.of(run), batch_size=run.batch_size, rounds=int(sys.argv[2]) if sys.argv[2:] else 5)
  files.write_out(sys.argv[1], files.as_json({**measured, "provenance": origin}))
