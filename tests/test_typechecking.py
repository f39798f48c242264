"""That calls are checked, whatever the checks' decorator saves."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from jax import Array
from jaxtyping import Float

from tests.typechecking import checked


@checked
def scaled(x: "Float[Array, 'n']", scale: float = 1.0, *, length: int) -> "Float[Array, 'n']":
  return twice(jnp.ones(length)) * scale


@checked
def twice(x: Float[Array, "n"]) -> Float[Array, "n"]:
  return 2 * x


@checked
def sized(n: int) -> Float[Array, "{n}"]:
  return jnp.zeros(3)


@checked
def counted(n: int) -> Iterator[int]:
  yield from range(n)


@checked
@dataclasses.dataclass
class Pair:
  one: Float[Array, "n"]
  other: Float[Array, "n"]


def test_what_fits_passes():
  assert scaled(jnp.zeros(3), 2, length=3).shape == (3,) == sized(3).shape
  assert [*counted(3)] == [0, 1, 2] and Pair(jnp.zeros(2), jnp.zeros(2)).one.shape == (2,)
  assert scaled.__annotations__["scale"] is float and scaled.__annotations__["x"] == "Float[Array, 'n']"


@pytest.mark.parametrize(
  "call",
  [
    lambda: scaled(jnp.zeros((3, 1)), length=3),
    lambda: scaled(jnp.zeros(3), "2", length=3),
    lambda: scaled(jnp.zeros(3), length=4),
    lambda: sized(4),
    lambda: counted("3"),
    lambda: Pair(jnp.zeros(2), jnp.zeros(3)),
    lambda: Pair(one=1, other=jnp.zeros(3)),
  ],
)
def test_what_does_not_fit_is_an_error(call):
  with pytest.raises(Exception, match="[Tt]ype-check error|violates type hint"):
    call()
