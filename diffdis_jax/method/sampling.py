"""How Algorithms 2 and 3 are run: numbers of steps, guidance, noise samples."""

from __future__ import annotations

import dataclasses

from diffdis_jax.errors import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How to sample; a config's `inference` section.

  Attributes:
    steps: denoising steps of the text query. One, from noise, is the paper's norm (Algorithm 3, Table 6).
    num_noise_samples: samples of the text query's noise to average (not stated by the paper).
    guidance: s of the text query's guidance, where the null condition is the image z = 0; 1 is none.
    normalize_query: of several steps and target `data`, whether each step's ê_0 is normalised before it is fed back:
      the process is defined on vectors of length 1, and the loss never sees a length (not stated by the paper). With
      one step, or with target `noise`, it changes nothing.
    generation_steps: DDIM steps of an image.
    generation_guidance: s = 1 + w of an image's guidance.

  Raises:
    UserError: a value out of its range.
  """

  steps: int = 1
  num_noise_samples: int = 1
  guidance: float = 1.0
  normalize_query: bool = True
  generation_steps: int = 50
  generation_guidance: float = 7.5

  def __post_init__(self) -> None:
    # At most the number of timesteps; for generation one fewer, since its spacing begins at t = 1.
    check_number("steps", self.steps, at_least=1, at_most=1000)
    check_number("num_noise_samples", self.num_noise_samples, at_least=1)
    check_number("guidance", self.guidance, at_least=0.0)
    check_number("generation_steps", self.generation_steps, at_least=1, at_most=999)
    check_number("generation_guidance", self.generation_guidance, at_least=0.0)
