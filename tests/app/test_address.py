"""Where the page can listen."""

from __future__ import annotations

import socket

import pytest

from diffdis_jax.app import __main__ as app
from diffdis_jax.app import address
from diffdis_jax.app.limits import Limits
from diffdis_jax.errors import UserError


def test_a_taken_port_is_known_before_the_run_is_looked_for():
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    how = dict(data=None, split=None, num_images=9, step=None, ema=True)
    with pytest.raises(UserError, match=f"^cannot listen at 127.0.0.1, port {port}: Address already in use; take "):
      app.serve("nowhere", Limits(), **how, host="127.0.0.1", port=port)
  address.check("127.0.0.1", port)


@pytest.mark.parametrize("host, message", [("192.0.2.1", "Cannot assign requested address"), ("ü" * 99, "hostname")])
def test_where_this_machine_is_not(host, message):
  with pytest.raises(UserError, match=f"cannot listen at {host}, port 0: .*({message}).*; take another"):
    address.check(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "", "::1", "[::1]"])
def test_a_free_port(host):
  port = address.free_port(host)
  assert port > 0
  address.check(host, port)
