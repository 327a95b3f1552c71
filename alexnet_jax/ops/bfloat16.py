"""Matrix products in bfloat16, arranged so that XLA's CPU backend uses the matrix units.

XLA:CPU of jaxlib 0.10 computes `float32 = bfloat16 x bfloat16` on AMX, at several times the speed
of float32, if the left side is not transposed. Nearly all else it does with bfloat16 is slower
than with float32: the numbers go to float32 and back around each padding and concatenation. So
what only moves numbers moves their bits here, as uint16, and what computes computes in float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax import Array, lax
from jaxtyping import BFloat16, Float, Float32, UInt16

T = TypeVar("T")


def to_bits(x: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """Returns the bits of bfloat16, or of float32 rounded to the nearest bfloat16."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return (lax.bitcast_convert_type(rounded, jnp.uint32) >> 16).astype(jnp.uint16)


def from_bits(bits: UInt16[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Returns the bfloat16 numbers that these are the bits of."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def multiply(
    left: BFloat16[Array, "rows inner"], right: BFloat16[Array, "_ _"], sum_right: int
) -> Float32[Array, "rows columns"]:
    """Multiplies matrices and sums in float32, over dimension `sum_right` of the right one.

    The left one must be laid out by `row_major` after a transposition.
    """
    dimensions = (((1,), (sum_right,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def row_major(bits: UInt16[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Makes XLA write out a transposed array, instead of transposing in the product it is for.

    The barrier is one-dimensional as that of a matrix may still be kept transposed.
    """
    return from_bits(lax.optimization_barrier(bits.reshape(-1)).reshape(bits.shape))


def apart(function: Callable[..., T], weights: UInt16[Array, "..."], *arguments: Any) -> T:
    """Calls function(weights, *arguments) so that XLA fuses nothing of it with its surroundings.

    XLA:CPU drops optimization barriers before it fuses, and then computes the pooling and the
    ReLU of the forward pass a second time, within each product of the backward pass that takes
    their result. It leaves a conditional alone. That this one always goes the same way is known
    only at run time, as it depends on bits of the weights (which are whole on every device).
    """
    first = lax.slice(weights, (0,) * weights.ndim, (1,) * weights.ndim).reshape(())
    results = jax.eval_shape(function, weights, *arguments)

    def never(*_: Any) -> T:
        return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)

    return lax.cond(first.astype(jnp.uint32) < 2**16, function, never, weights, *arguments)


@jax.custom_vjp
def _matmul(x: Array, weights: Array) -> Array:
    return _forward(x, weights)[0]


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = x, from_bits(to_bits(weights))
    return multiply(*rounded, 0).astype(jnp.bfloat16), rounded


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weights = residuals
    by_weights = multiply(row_major(to_bits(x).T), gradient, 0)
    return multiply(gradient, weights, 1).astype(jnp.bfloat16), by_weights


_matmul.defvjp(_forward, _backward)


def dot_general(
    lhs: Float[Array, "..."], rhs: Float[Array, "..."], dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
    """As `jax.lax.dot_general`, which computes all but products of two bfloat16 matrices.

    The right one may also be float32; it is rounded, and its gradient is not. That product can be
    differentiated in reverse mode only.
    """
    sums, batches = dimension_numbers
    plain = [tuple(axes) for axes in (*sums, *batches)] == [(1,), (0,), (), ()]
    matrices = lhs.ndim == rhs.ndim == 2 and lhs.dtype == jnp.bfloat16
    if matrices and plain and all(option is None for option in options.values()):
        return _matmul(lhs, rhs.astype(jnp.float32))
    return lax.dot_general(lhs, rhs.astype(lhs.dtype), dimension_numbers, **options)


def promote_dtype(*arrays: Array | None, dtype: Any, inexact: bool = True) -> list[Array | None]:
    """As that of `flax.linen.Dense`, but `dot_general` rounds the kernel.

    So the kernel's gradient, the largest array of a step, reaches the optimizer in the product's
    float32, instead of being rounded, written, and read once more.
    """
    inputs, kernel, bias = arrays
    inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=dtype, inexact=inexact)
    return [inputs, kernel, bias]
