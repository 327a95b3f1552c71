"""Matrix products in bfloat16, put so that XLA's CPU backend gives them to the matrix units.

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

T = TypeVar("T")


def to_bits(x: Array) -> Array:
    """Float32, rounded to the nearest bfloat16, or bfloat16, as the uint16 of the latter's bits."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return (lax.bitcast_convert_type(rounded, jnp.uint32) >> 16).astype(jnp.uint16)


def from_bits(bits: Array) -> Array:
    """The bfloat16 that these uint16 are."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def multiply(left: Array, right: Array, sum_right: int) -> Array:
    """Multiplies matrices and sums in float32.

    Args:
        left: bfloat16[M, K]; by `row_major` after a transposition.
        right: bfloat16[K, N] if `sum_right` is 0, and bfloat16[N, K] if it is 1.
        sum_right: The dimension of `right` to sum over.

    Returns:
        float32[M, N].
    """
    dimensions = (((1,), (sum_right,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def row_major(bits: Array) -> Array:
    """Has XLA lay out a transposed array anew, instead of transposing in the product it is for.

    The barrier is one-dimensional as that of a matrix may still be kept transposed.

    Args:
        bits: uint16 of any shape.

    Returns:
        bfloat16 of that shape.
    """
    return from_bits(lax.optimization_barrier(bits.reshape(-1)).reshape(bits.shape))


def apart(function: Callable[..., T], weights: Array, *arguments: Any) -> T:
    """Calls a function so that XLA merges nothing of it with what stands before and after.

    XLA:CPU drops optimization barriers before it fuses, and then computes the pooling and the
    ReLU of the forward pass a second time, within each product of the backward pass that takes
    their result. A conditional it leaves alone. That this one always goes the same way is
    known when it runs and not before, as it asks for bits of the weights.

    Args:
        function: Of `weights` and `arguments`, to any tree of arrays.
        weights: uint16 of any shape. (Of the weights as these are whole on every device.)
        *arguments: Any trees of arrays.
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


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **options: Any) -> Array:
    """As `jax.lax.dot_general`, and by it unless it is the product of two bfloat16 matrices.

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
    """As flax's for `flax.linen.Dense`, but leaves the rounding of the kernel to `dot_general`.

    So the kernel's gradient, the largest arrays of a step, goes to the optimizer as the product
    has it, in float32, instead of being rounded, written, and read once more.
    """
    inputs, kernel, bias = arrays
    inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=dtype, inexact=inexact)
    return [inputs, kernel, bias]
