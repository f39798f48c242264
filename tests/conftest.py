"""Eight CPU devices, strict dtype promotion, warnings as errors, and every annotation of the package checked."""

import jax
import jaxtyping
import pytest

import tests.typechecking  # noqa: F401

# Before any module of the package is imported: shapes, dtypes and types of all its functions are then checked at calls.
jaxtyping.install_import_hook("diffdis_jax", "tests.typechecking.check")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("filterwarnings", "error")
  # Of annotations that are flax's own.
  config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
