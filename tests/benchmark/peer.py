"""Time steps against PyTorch's libraries with the same weights and inputs, in turns, in one process.

  python -m tests.benchmark.peer unet OUT.json [ROUNDS]    # diffusers' UNet, forwards and backwards
  python -m tests.benchmark.peer clip OUT.json [ROUNDS]    # open_clip's ViT-B/32, a training step of 16 pairs

The UNet is that of replication/configs/benchmark.py. On a GPU diffusers' is compiled by `torch.compile`, in
channels-last layout; on a CPU each uses all cores.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import logging
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from configs import clip_cc3m
from diffdis_jax.common import files
from diffdis_jax.common.params import flatten, merge
from diffdis_jax.config.run import Run
from diffdis_jax.interop import mapping, sections
from diffdis_jax.method.network import Network, abstract_module, initial_state
from diffdis_jax.models.unet import UNet
from diffdis_jax.parallel import sharding
from diffdis_jax.run import provenance
from replication.configs import benchmark
from tests import steps
from tests.models import open_clip_twin
from tests.training.test_contrastive import MAX_LOGIT_SCALE, their_loss, their_optimizer

Pass = Callable[[], Any]  # one finished forward pass or training step


def time_in_turns(ways: Mapping[str, Pass], rounds: int) -> dict[str, Any]:
  """Return the seconds of each round, their medians, and the ratio of the first function's median to the second's."""
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for index in range(rounds + 1):
    for name, run_pass in ways.items():
      begin = time.perf_counter()
      run_pass()
      if index:  # the first round warms up
        seconds[name].append(time.perf_counter() - begin)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  ours, theirs = median.values()
  logging.info("ours %.3f s, theirs %.3f s: %.2f times as long", ours, theirs, ours / theirs)
  return dict(seconds=median, rounds=seconds, ratio=ours / theirs, device=jax.devices()[0].device_kind)


def clip(rounds: int) -> dict[str, Any]:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  config = clip_cc3m.get_config("model=vit_b32,recipe=openclip")
  config.batch_size, config.model.dtype = 16, "float32"
  trainer, batch, model = steps.Trainer(config), steps.make_batch(config), open_clip_twin.make(config.model).train()
  state, optimizer = trainer.initial(), their_optimizer(model, config)

  def ours() -> None:
    nonlocal state
    state, _ = trainer.run(state, batch)
    jax.block_until_ready(state)

  def theirs() -> None:
    optimizer.zero_grad()
    their_loss(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, float(MAX_LOGIT_SCALE))

  return time_in_turns({"ours": ours, "open_clip": theirs}, rounds)


def unet(rounds: int) -> dict[str, Any]:
  """Time a pass of each UNet, and compare their predictions."""
  run = Run.of(benchmark.get_config())
  network, model = Network.of(run), run.model
  device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
  # Use the same noise for all passes: their cost does not depend on the values.
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((run.batch_size, *shape), np.float32)
  inputs = dict(z=normal(*network.latent_shape), t=rng.integers(0, 1000, run.batch_size, np.int32))
  inputs |= dict(c=normal(network.max_length, model.text_encoder.width), noise=normal(*network.latent_shape))

  graphdef, abstract = abstract_module(build := lambda rngs: UNet(model, up_path=True, dtype=network.dtype, rngs=rngs))
  # PyTorch uses one GPU or all cores of a CPU; give JAX the same.
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices() if device == "cpu" else jax.devices()[:1])
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params = jax.jit(lambda key: flatten(initial_state(build, key)), out_shardings=replicated)(jax.random.key(0))
  batch = sharding.to_global(inputs, mesh)

  def loss(params: Any, z: Any, t: Any, c: Any, noise: Any) -> Any:
    prediction = merge(graphdef, abstract, params)(z, t, c)
    return jnp.mean(jnp.square(noise - prediction)), prediction

  passes = jax.jit(network.tracing(mesh)(jax.value_and_grad(loss, has_aux=True)))

  def ours() -> Any:
    (_, prediction), gradients = passes(params, *(batch[name] for name in inputs))
    jax.block_until_ready(gradients)  # the call returns before the result is computed
    return prediction

  sizes = dict(latent_channels=model.autoencoder.latent_channels, context_width=model.text_encoder.width)
  config = sections.write_unet(dataclasses.asdict(model.unet), sample_size=network.latent_shape[0], **sizes)
  peer: Any = UNet2DConditionModel.from_config(config)
  entries = {path: mapping.from_path(f"unet.{path}") for path in params}
  state = {entry.name: np.array(entry.to_theirs(np.asarray(params[path]))) for path, entry in entries.items()}
  peer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})  # the same network
  # By default PyTorch uses TF32 for convolutions but not for matrix products.
  torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = network.matmul_precision != "highest"
  # Copy: otherwise the strides of NHWC make PyTorch use its channels-last convolutions.
  nchw = lambda x: torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(device)
  z, noise = nchw(inputs["z"]), nchw(inputs["noise"])
  t, c = (torch.from_numpy(inputs[name]).to(device) for name in "tc")
  call = peer.to(device)
  if device == "cuda":  # PyTorch's fastest layout, so that the comparison is fair
    call = torch.compile(peer.to(memory_format=torch.channels_last))

  def theirs() -> Any:
    peer.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16"):
      prediction = call(z, t, encoder_hidden_states=c).sample
    torch.mean(torch.square(noise - prediction.float())).backward()
    return prediction.detach().float().cpu().numpy().transpose(0, 2, 3, 1)  # the copy waits for the device

  predictions = [np.asarray(run_pass(), np.float64) for run_pass in (ours, theirs)]
  difference = np.abs(predictions[0] - predictions[1]).max() / np.abs(predictions[1]).max()
  origin = provenance.provenance(provenance.of_config(run.to_dict()))
  measured = time_in_turns({"ours": ours, "diffusers": theirs}, rounds)
  return {**measured, "largest_difference": float(difference), "provenance": origin}


if __name__ == "__main__":
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise JAX leaves PyTorch no GPU memory
  logging.set_verbosity(logging.INFO)
  time_peer = {"unet": unet, "clip": clip}[sys.argv[1]]
  files.write_out(sys.argv[2], files.as_json(time_peer(int(sys.argv[3]) if sys.argv[3:] else 5)))
