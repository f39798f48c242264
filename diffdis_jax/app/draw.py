"""The tab *Generate*: an image from a prompt, while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffdis_jax.app import charts
from diffdis_jax.app.limits import Limits, read_text, read_whole, within
from diffdis_jax.app.step_sampler import Frame, StepSampler
from diffdis_jax.config.section import check_number

MOST_STEPS = 200
MOST_GUIDANCE = 30
MOST_SEED = 2**31 - 1
FRAMES = 20  # shown of one image; decoding a latent costs about as much as a step


def answer(
  sampler: StepSampler,
  limits: Limits,
  prompt: str | None,
  seed: Any,
  steps: Any,
  guidance_scale: Any,
) -> Iterator[str]:
  """HTML after each step that is shown; the last one has the image.

  Raises:
    UserError: a field out of its range, or no more time.
  """
  prompt = read_text(prompt, "prompt", limits)
  whole_seed = read_whole("seed", seed, at_least=0, at_most=MOST_SEED)
  whole_steps = read_whole("steps", steps, at_least=1, at_most=MOST_STEPS)
  check_number("guidance", guidance_scale, ge=0, le=MOST_GUIDANCE)
  frames = sampler.generate(
    prompt, seed=whole_seed, steps=whole_steps, guidance_scale=float(guidance_scale), frames=FRAMES
  )
  # At once: the first step may still wait for its program to be compiled.
  yield charts.block(charts.line(f"Step 0 of {whole_steps}"), charts.progress(0, whole_steps))
  shown, left = [], sampler.cut(prompt)
  for frame in within(limits.seconds, frames):
    shown.append(frame)
    yield show(shown, prompt, left)


def show(frames: Sequence[Frame], prompt: str, left: str | None = None) -> str:
  """Side by side, after the last of these steps, what is there, the emptied prediction and the guided one; below, the
  two predictions after each of them. `left`: what the network reads of a prompt that is too long for it."""
  frame = frames[-1]
  done = frame.step == frame.steps
  where = f"{frame.steps} steps" if done else f"Step {frame.step} of {frame.steps}, t = {frame.t}"
  return charts.block(
    charts.line(where),
    charts.progress(frame.step, frame.steps),
    charts.line(f"The prompt is too long for this model, which reads: {left}") if left is not None else "",
    charts.row(
      [
        charts.figure(frame.noisy, prompt if done else "So far", "the image" if done else "z at the next t, decoded"),
        charts.figure(frame.emptied, "Emptied", "what the network makes of z_t without the prompt"),
        charts.figure(frame.guided, "Guided", "what it makes of z_t with the prompt and guidance"),
      ]
    ),
    charts.line("Over the steps, by t: the emptied prediction above, the guided one below."),
    charts.strip([(str(each.t), (each.emptied, each.guided)) for each in frames]),
  )
