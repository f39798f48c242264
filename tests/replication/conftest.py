"""Add the replication's extensions to the package's tables for these tests alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffdis_jax.ablate import tables
from diffdis_jax.config import model, sections
from diffdis_jax.data import long_tail, sources
from diffdis_jax.evals.tasks import TASKS
from diffdis_jax.method import network, schedules
from diffdis_jax.models import clip
from replication import extensions


@pytest.fixture(scope="module", autouse=True)
def extended() -> Iterator[None]:
  changed = (sources.KINDS, long_tail.SETS, TASKS, tables.TITLES_OF, model.TOWERS, clip.TOWERS)
  changed += (network.TEXT_STREAMS, schedules.BETAS)
  lists = (model.TEXT_STREAMS, sections.SCHEDULES)
  before, names = [{**table} for table in changed], [[*entries] for entries in lists]
  extensions.add()
  yield
  for table, entries in zip(changed, before, strict=True):
    table.clear()
    table.update(entries)
  for entries, original in zip(lists, names, strict=True):
    entries[:] = original
