"""DiffDis in JAX: one diffusion model that generates images from text and aligns images with text."""

from diffdis_jax.parallel import signals as _signals

_signals.while_importing()
