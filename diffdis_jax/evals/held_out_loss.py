"""Measures the training losses on held-out pairs: where they rise while training's fall, a run overfits."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8, UInt32

from diffdis_jax.config.section import field, number
from diffdis_jax.config.sections import NUM_TIMESTEPS
from diffdis_jax.data import sources
from diffdis_jax.data.tokenizer import Tokenizer
from diffdis_jax.evals import base
from diffdis_jax.method import algorithms, encode, losses
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import noise_at
from diffdis_jax.structs import Batch

# The middles of eight equal parts of 0 ... T-1, two in each quarter by which training reports its losses.
TIMESTEPS = tuple((2 * i + 1) * NUM_TIMESTEPS // 16 for i in range(8))


@base.settings()
class HeldOutLoss(base.Evaluation):
  """Task `held_out_loss`: L_IG and L_ITA of Algorithm 1 at eight fixed timesteps, with fixed noise; of CLIP its loss.

  Latents are the posterior's mode, images their central squares, and no caption or image is dropped. So two
  checkpoints differ by their weights alone, and a figure lies a little off training's, whose views vary. Equal captions
  are negatives of each other where the run's `loss.duplicate_captions` makes them so.

  Rows are ordered by a digest of the seed, the image and the caption. So L_ITA's negatives and the noise do not depend
  on the order of the records, which follows the names of files.
  """

  task = "held_out_loss"

  data: Mapping[str, Any] = field(help="section of a data source; a split that is not trained on")
  caption_field: str = field("", help="record's field with the caption; by default the first that training has")
  num_images: int | None = field(None, help="images to measure, the same ones each time; by default all")
  # A guess has a loss of ln(contrastive_batch).
  contrastive_batch: int = number(64, ge=2, help="pairs among which L_ITA looks for each one's caption")

  def open(self) -> None:
    self.source = sources.open_source(**self.data)
    indices = base.subset(len(self.source), self.num_images)
    captions, digests = [], []
    for index in indices:
      record = base.read(self.source, index)
      captions.append(base.captions(record, self.caption_field)[0])
      digests.append(_digest(record["image"], captions[-1], seed=self.seed))
    order = sorted(range(len(indices)), key=digests.__getitem__)
    self.indices, self.captions = indices[order], [captions[i] for i in order]
    self.batch = min(self.contrastive_batch, len(self.indices))

  def protocol(self, inference: Any) -> dict[str, Any]:
    masks = inference.duplicate_captions == "mask"
    return {
      "matmul_precision": inference.protocol["matmul_precision"],
      "seed": self.seed,
      "num_images": len(self.indices),
      "timesteps": list(TIMESTEPS),
      "contrastive_batch": self.batch,
      **({} if masks else {"duplicate_captions": inference.duplicate_captions}),
      **base.origin(self.source),
    }

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Measure both losses, each also by the quarter of the timestep; for CLIP, loss_contrastive."""
    network, metrics = inference.network, {}
    images = base.Images(self.source, self.indices, inference.image_size)
    tokens = Tokenizer(inference.max_length)(self.captions)

    def over_rows(name: str) -> np.ndarray:
      # A pair's noise depends on seed and place in this order alone.
      rows, f = (images, tokens, np.arange(len(tokens), dtype=np.int32)), functools.partial(_denoised, network, name)
      return inference.over_rows(f"held-out {name}", f, params, *rows, whole=[jax.random.key(self.seed)])

    if network.task.generates:
      metrics |= _by_quarter("loss_generation", over_rows("generation").mean(axis=0))
    if network.task.aligned:
      e = inference.embed_texts(params, tokens)
      scale = np.asarray(jax.device_get(params["logit_scale"]))
      captions = np.arange(len(tokens), dtype=np.uint32)  # all differ, and so are negatives
      if inference.duplicate_captions == "mask":
        captions = np.asarray(losses.caption_ids(jnp.asarray(tokens)))
      if network.is_clip:  # which denoises nothing
        queries = inference.embed_images(params, images, seed=self.seed)
        metrics["loss_contrastive"] = self._contrastive(queries, e, scale, captions)
      else:
        queries = over_rows("discrimination").swapaxes(0, 1)
        by_timestep = np.array([self._contrastive(query, e, scale, captions) for query in queries])
        metrics |= _by_quarter("loss_discrimination", by_timestep)
    return metrics

  def _contrastive(
    self,
    query: Float[np.ndarray, "n d"],
    e: Float[np.ndarray, "n d"],
    logit_scale: Float[np.ndarray, ""],
    captions: UInt32[np.ndarray, " n"],
  ) -> float:
    """Return L_ITA among `contrastive_batch` pairs at a time, each pair counted once."""
    n, size, total = len(e), self.batch, 0.0
    for start in range(0, n, size):
      # The last ones are filled up with pairs before them: all are compared with equally many, and those count once.
      first = min(start, n - size)
      rows = slice(first, first + size)
      total += float(_per_pair(query[rows], e[rows], logit_scale, captions[rows])[start - first :].sum())
    return total / n


def _digest(image: bytes | UInt8[np.ndarray, "h w 3"], caption: str, *, seed: int) -> bytes:
  """Return what a pair is ordered by: its content, keyed by the seed."""
  content = hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=16, key=str(seed).encode())
  content.update(b"\0")
  content.update(image if isinstance(image, bytes) else image.tobytes())
  return content.digest()


def _denoised(
  network: Network,
  name: str,
  model: Any,
  key: PRNGKeyArray,
  images: UInt8[Array, "b H W 3"],
  tokens: Int[Array, "b l"],
  places: Int[Array, "b"],
) -> Float[Array, "b t ..."]:
  """Run Algorithm 1 up to where rows meet, at each of TIMESTEPS: L_IG [b t] or ê_0 [b t d], by `name`."""
  numbers, timesteps = jnp.arange(len(TIMESTEPS)), jnp.array(TIMESTEPS, jnp.int32)
  at = functools.partial(noise_at, key, places=places, network=network)
  encoded = encode.encode_rows(model, Batch(image=images, tokens=tokens), at(timesteps[0], sample=numbers[0]))
  c_null = encode.null_condition(model, tokens.shape[1])

  def one(at_number: tuple[Int[Array, ""], Int[Array, ""]]) -> Float[Array, "b ..."]:
    number, t = at_number
    noise = at(t, sample=number)
    denoised: Any = algorithms.denoise_rows(model, encoded, c_null, noise, network=network, passes=(name,))
    return denoised.loss_generation if name == "generation" else denoised.query

  # One after the other: all at once would take eight times the memory.
  return jnp.swapaxes(jax.lax.map(one, (numbers, timesteps)), 0, 1)


@jax.jit
def _per_pair(
  query: Float[Array, "b d"], e: Float[Array, "b d"], logit_scale: Float[Array, ""], captions: UInt32[Array, "b"]
) -> Float[Array, "b"]:
  """Return both directions' mean for each pair."""
  losses_of_pairs = losses.contrastive(query, e, logit_scale, captions=captions)
  return 0.5 * (losses_of_pairs.query_to_text + losses_of_pairs.text_to_query)


def _by_quarter(name: str, of_timesteps: Float[np.ndarray, " t"]) -> dict[str, float]:
  """Average over TIMESTEPS, and over those of each quarter, q1 the least noisy."""
  quarters = of_timesteps.reshape(4, -1).mean(axis=1)
  return {name: float(of_timesteps.mean()), **{f"{name}_q{i + 1}": float(x) for i, x in enumerate(quarters)}}
