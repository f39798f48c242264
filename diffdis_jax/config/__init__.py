"""A run's config: every field with its default and its range, and the record that the code works with. No jax."""

from diffdis_jax.config.fields import base, load, read_fields, with_evals
from diffdis_jax.config.run import Run

__all__ = ["Run", "base", "load", "read_fields", "with_evals"]
