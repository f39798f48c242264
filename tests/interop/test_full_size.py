"""Test Stable Diffusion v1 at full size with random weights: parity, and the time and memory of import and export.

  python -m pytest -m full tests/interop/test_full_size.py --log-cli-level=INFO

The tests take about 15 GB of memory and of disk, and log all figures.
"""

from __future__ import annotations

import gc
import json
import logging
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffdis_jax.config.model import Model
from diffdis_jax.models.autoencoder import Autoencoder
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.models.unet import UNet
from tests import pipelines
from tests.command_runs import ROOT
from tests.interop.test_mapping import TEXT_L14
from tests.models import from_torch, networks

pytestmark = pytest.mark.full

MODEL = Model()
LEVELS = 4
UNET: dict[str, Any] = dict(cross_attention_dim=768, sample_size=32)
VAE = dict(
  block_out_channels=(128, 256, 512, 512),
  down_block_types=("DownEncoderBlock2D",) * LEVELS,
  up_block_types=("UpDecoderBlock2D",) * LEVELS,
  layers_per_block=2,
)
TEXT = dict(num_hidden_layers=12, max_position_embeddings=77, **TEXT_L14)
SECONDS, MEMORY, PSNR = 120, 2.5, 45

# Run a command from a small process: a child's peak memory includes its parent's memory when it was started.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
sys.stderr.write(done.stderr)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": time.monotonic() - start, "peak": usage.ru_maxrss * 1024}))
sys.exit(done.returncode)
"""

log = logging.getLogger(__name__).info


def measure(verb: str, *flags: str) -> dict[str, float]:
  """Run a command, and return its wall time in seconds and its peak memory in bytes."""
  command = [sys.executable, "-c", MEASURE, sys.executable, "-m", f"diffdis_jax.{verb}", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def size_of(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def check_cost(name: str, cost: dict[str, float], size: int) -> None:
  log("%s: %.2f GB, %.0f s, peak memory %.2f x", name, size / 1e9, cost["seconds"], cost["peak"] / size)
  assert cost["seconds"] < SECONDS
  assert cost["peak"] < MEMORY * size


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
  """Write a checkpoint to `sd`. The tests below fill `run` and `out`, in this order."""
  root = tmp_path_factory.mktemp("full")
  pipelines.stable_diffusion(root / "tokenizer", unet=UNET, vae=VAE, text=TEXT).save_pretrained(root / "sd")
  gc.collect()
  return {name: root / name for name in ("sd", "run", "out", "images")}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
  side = UNET["sample_size"]
  return np.random.default_rng(0).standard_normal((1, side, side, 4)).astype(np.float32)


def test_the_cost_of_an_import(folders):
  cost = measure("import_weights", f"--source={folders['sd']}", f"--out={folders['run']}")
  check_cost("import", cost, size_of(folders["sd"]))


def test_the_cost_of_an_export(folders):
  cost = measure("export_weights", f"--workdir={folders['run']}", f"--out={folders['out']}")
  check_cost("export", cost, size_of(folders["out"]))


def test_the_import_and_the_export_generate_the_images_of_diffusers(folders, noise):
  np.save(folders["run"] / "noise.npy", noise)
  flags = (
    f"--prompt={pipelines.PROMPTS[0]}",
    f"--noise={folders['run'] / 'noise.npy'}",
    "--steps=50",
    "--guidance=7.5",
  )
  measure("generate", f"--workdir={folders['run']}", f"--out={folders['images']}", *flags)
  with Image.open(folders["images"] / "00000.png") as image:
    ours = np.asarray(image)[None]
  generated = {}
  for name in ("sd", "out"):
    generated[name] = pipelines.draw(StableDiffusionPipeline.from_pretrained(folders[name]), noise, steps=50)
    gc.collect()
    log("PSNR of %s and ours: %.1f dB", name, pipelines.psnr(generated[name], ours))
  assert ours.std() > 10
  assert min(pipelines.psnr(images, ours) for images in generated.values()) >= PSNR


def check_parity(name: str, actual: Any, expected: torch.Tensor, limit: float) -> None:
  expected = from_torch.nhwc(expected) if expected.ndim == 4 else expected
  error = networks.relative_error(actual, expected)
  log("%s: max abs error %.1e of the largest magnitude", name, error)
  assert error <= limit


def ours_of(module: torch.nn.Module, prefix: str, make: Any) -> tuple[networks.Network, dict[str, np.ndarray]]:
  """Return our network with the parameters of a PyTorch module, and zeros for those that the module lacks."""
  network = networks.Network.of(make)
  shapes = {f"{prefix}.{path}": leaf for path, leaf in network.shapes.items() if path not in ("shift", "scale")}
  params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in network.shapes.items()}
  theirs = from_torch.to_ours(module, shapes).items()
  return network, params | {path.removeprefix(f"{prefix}."): value for path, value in theirs}


@pytest.mark.parametrize("side", [32, 64])
def test_the_unet_equals_diffusers(side):
  theirs = from_torch.randomise(pipelines.UNet2DConditionModel(**UNET), 0)
  network, params = ours_of(theirs, "unet", lambda rngs: UNet(MODEL, up_path=True, dtype=np.float32, rngs=rngs))
  normal = lambda *shape: np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
  x, t, c = normal(1, side, side, 4), np.array([500], np.int32), normal(1, 77, UNET["cross_attention_dim"])
  ours = jax.jit(network.pure(lambda model, x, t, c: model(x, t, c)))(params, x, t, c)
  with torch.no_grad():
    expected = theirs(from_torch.nchw(x), torch.from_numpy(t), encoder_hidden_states=torch.from_numpy(c)).sample
  check_parity(f"UNet, {side} x {side} latents", ours, expected, 2e-4)


def test_the_autoencoder_equals_diffusers():
  theirs = from_torch.randomise(pipelines.AutoencoderKL(**VAE), 0)
  make = lambda rngs: Autoencoder(MODEL.autoencoder, dtype=np.float32, rngs=rngs)
  network, params = ours_of(theirs, "autoencoder", make)
  rng = np.random.default_rng(0)
  x, latent = rng.uniform(-1, 1, (1, 256, 256, 3)).astype(np.float32), rng.standard_normal((1, 32, 32, 4), np.float32)
  run = jax.jit(network.pure(lambda model, x, latent: (model.encode(x), model.decode(latent))))
  posterior, image = run(params, x, latent)
  with torch.no_grad():
    expected = theirs.encode(from_torch.nchw(x)).latent_dist
    decoded = theirs.decode(from_torch.nchw(latent)).sample
  check_parity("autoencoder, mean", posterior.mean, expected.mean, 2e-4)
  check_parity("autoencoder, log-variance", posterior.log_variance, expected.logvar, 2e-4)
  check_parity("autoencoder, decoded", image, decoded, 2e-4)


def test_the_text_encoder_equals_transformers():
  theirs = from_torch.randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), 0)
  make = lambda rngs: TextEncoder(MODEL.text_encoder, remat="none", dtype=np.float32, rngs=rngs)
  network, params = ours_of(theirs, "text_encoder", make)
  tokens = np.random.default_rng(0).integers(0, 49406, (2, 77))
  tokens[:, 0], tokens[0, 9:], tokens[1, -1] = 49406, 49407, 49407
  run = jax.jit(network.pure(lambda model, tokens: model(tokens).c))
  ours = run(params, tokens.astype(np.int32))
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).last_hidden_state
  check_parity("CLIP text tower L/14, last hidden state", ours, expected, 1e-4)
