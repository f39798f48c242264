"""What the replication adds to the package's tables is there for its own tests alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffdis_jax.ablate import columns
from diffdis_jax.data import sources
from diffdis_jax.evals import registry
from replication import extensions


@pytest.fixture(scope="module", autouse=True)
def extended() -> Iterator[None]:
  tables = (sources.KINDS, registry.EVALS, registry.MEASURES, columns.COLUMNS_OF)
  before, without_queries = [{**table} for table in tables], registry.WITHOUT_QUERIES
  extensions.add()
  yield
  registry.WITHOUT_QUERIES = without_queries
  for table, entries in zip(tables, before, strict=True):
    table.clear()
    table.update(entries)
