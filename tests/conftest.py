"""Eight CPU devices, strict dtype promotion and warnings as errors, for every test."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("filterwarnings", "error")
