"""Measures whether a network reads the noised text query e_t that it denoises, or classifies by the image alone.

Not in the paper, which takes for granted that discrimination is the denoising of e_t.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diffdis_jax.config.objectives import DENOISING
from diffdis_jax.config.sections import NUM_TIMESTEPS, Sampling
from diffdis_jax.errors import UserError
from diffdis_jax.evals import base, prompts
from diffdis_jax.evals.held_out_loss import TIMESTEPS
from diffdis_jax.evals.zero_shot import ZeroShot
from diffdis_jax.method import algorithms, encode, losses, schedules
from diffdis_jax.method.network import Network
from diffdis_jax.method.step_noise import query_noise

LENGTHS = (0.3, 1.0, 3.0)  # of a caption's embedding that is given as e_t; a trained one has length 1
AT = (NUM_TIMESTEPS - 1, NUM_TIMESTEPS // 2, 0)  # t_e at which each e_t is given
STEPS = (1, 4, 16)  # of Algorithm 3


@base.settings()
class QueryUse(ZeroShot):
  """Task `query_use`: top-1 of zero_shot's classes, by what the network is given as e_t, by t_e and by steps.

  Metrics `acc1_INPUT_tT` are of one evaluation of the network. INPUT is noise, zero, or the embedding of the image's
  own class or of a wrong one, in the single template, with a length such as 0.3. A network that does not read e_t has
  the same accuracy in all of them; one that does is better with the true caption and worse with a wrong one.
  `acc1_noised_tT` and `loss_noised_tT` are of e_t as in training, the true caption's noised to t_e = T; the loss is the
  cross-entropy over the classes. `acc1_steps_N` is of Algorithm 3 with N steps. `acc1_by_input` is the largest
  difference of accuracy between two inputs at one t_e, `cosine_of_two_draws` that of ê_0 from two draws of e_T.
  """

  task = "query_use"

  def open(self) -> None:
    self.templates = (self.single_template or prompts.resolve_templates(self.templates)[0],)
    super().open()
    if len(self.names) < 2:
      raise UserError("query_use gives the caption of a wrong class, and the data have one class; it needs two")

  def protocol(self, inference: Any) -> dict[str, Any]:
    return {**super().protocol(inference), "lengths": list(LENGTHS), "timesteps": list(TIMESTEPS), "steps": list(STEPS)}

  def run(self, inference: Any, params: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics above. Raises UserError: a run that denoises no text query."""
    network = inference.network
    if network.is_clip or not network.task.aligned:
      raise UserError(f"query_use measures {' or '.join(DENOISING)}, for which this run was not trained")
    classes = self._embed_classes(inference, params)[self.single]
    n, width = len(self.labels), network.model.query_width
    noise = query_noise(jax.random.key(self.seed), num_noise_samples=2, places=jnp.arange(n), width=width)
    true, wrong = classes[self.labels], classes[(self.labels + len(classes) // 2) % len(classes)]
    inputs = {"noise": noise[0], "other_noise": noise[1], "zero": jnp.zeros_like(noise[0])}
    inputs |= {f"true_{length:g}": length * true for length in LENGTHS}
    inputs |= {f"wrong_{length:g}": length * wrong for length in LENGTHS}
    asked = {f"{name}_t{t}": (e_t, t) for t in AT for name, e_t in inputs.items()}
    noised = functools.partial(schedules.add_noise, network.text_process, jnp.asarray(true), noise=noise[0])
    asked |= {f"noised_t{t}": (noised(t=jnp.full(n, t)), t) for t in TIMESTEPS}
    e_t, t_e = np.stack([np.asarray(e_t) for e_t, _ in asked.values()], axis=1), [t for _, t in asked.values()]
    images = base.Images(self.source, self.order, inference.image_size)
    program = functools.partial(_queries, network, inference.sampling)
    rows = images, e_t, np.tile(np.array(t_e, np.int32), (n, 1))
    queries = inference.over_rows("queries by input", program, params, *rows)
    by_name = dict(zip([*asked, *(f"steps_{steps}" for steps in STEPS)], queries.swapaxes(0, 1), strict=True))
    scores = {name: query @ classes.T for name, query in by_name.items()}
    accuracy = {name: float((score.argmax(axis=1) == self.labels).mean()) for name, score in scores.items()}
    temperature = float(losses.temperature(jnp.asarray(jax.device_get(params["logit_scale"]))))
    losses_of = lambda logits: -jax.nn.log_softmax(temperature * logits)[np.arange(n), self.labels]
    spread = lambda t: [accuracy[f"{name}_t{t}"] for name in inputs]
    return {
      **{f"acc1_{name}": value for name, value in accuracy.items()},
      **{f"loss_noised_t{t}": float(losses_of(scores[f"noised_t{t}"]).mean()) for t in TIMESTEPS},
      "acc1_by_input": max(max(spread(t)) - min(spread(t)) for t in AT),
      "cosine_of_two_draws": float((by_name[f"noise_t{AT[0]}"] * by_name[f"other_noise_t{AT[0]}"]).sum(axis=1).mean()),
    }


def _queries(
  network: Network,
  sampling: Sampling,
  model: Any,
  images: UInt8[Array, "b H W 3"],
  e_t: Float[Array, "b m d"],
  t_e: Int[Array, "b m"],
) -> Float[Array, "b k d"]:
  """Return ê_0 from each e_t by one evaluation, then Algorithm 3's from the first e_t by each of STEPS."""
  z, c_null = model.encode_image(images), encode.null_condition(model, network.max_length)
  c, t_z = jnp.broadcast_to(c_null, (len(z), *c_null.shape[1:])), jnp.full(len(z), network.condition_timestep)

  def one(given: tuple[Float[Array, "b d"], Int[Array, "b"]]) -> Float[Array, "b d"]:
    e_t, t_e = given
    prediction = model.discrimination(e_t=e_t, t_e=t_e, z=z, t_z=t_z, c_null=c)
    return losses.unit_norm(schedules.to_data(network.text_process, e_t, prediction=prediction, t=t_e))

  single = jax.lax.map(one, (e_t.swapaxes(0, 1), t_e.T))
  how: Any = dict(network=network, guidance_scale=sampling.guidance, normalize_query=sampling.normalize_query)
  by_steps = [algorithms.denoise_text_query(model, z, e_t[None, :, 0], steps=steps, **how) for steps in STEPS]
  return jnp.stack([*single, *by_steps], axis=1)
