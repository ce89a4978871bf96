"""Floating-point operations of a traced program, loops multiplied out.

XLA's own count (`cost_analysis`) visits the body of a loop once, however often it runs, and knows
nothing of kernels. Here the matrix products of the trace are counted, what a backward pass computes
again included; everything element-wise, which matrix units do not do, is left out.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """Operations of all matrix products, two a multiplication with addition, over all devices.

    A scan counts by its length, a `while_loop` by the largest constant that its condition compares
    with (a bound that sampling reaches when no row ends early), a `cond` by its dearest branch, a
    kernel by its grid.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_equation(equation) for equation in inner.eqns)


def _equation(equation: core.JaxprEqn) -> int:
    parameters = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _dot(equation)
        case "ragged_dot_general" | "ragged_dot":
            return _ragged_dot(equation)
        case "conv_general_dilated":
            return _convolution(equation)
        case "scan":
            return parameters["length"] * count_flops(parameters["jaxpr"])
        case "while":
            body, condition = parameters["body_jaxpr"], parameters["cond_jaxpr"]
            return _bound(condition) * (count_flops(body) + count_flops(condition))
        case "cond":
            return max(count_flops(branch) for branch in parameters["branches"])
        case "shard_map":
            manual = parameters["newly_manual_axes"]
            places = math.prod(parameters["mesh"].shape[axis] for axis in manual)
            return places * count_flops(parameters["jaxpr"])
        case "pallas_call":
            steps = math.prod(parameters["grid_mapping"].grid)
            return steps * count_flops(parameters["jaxpr"])
        case _:
            return sum(count_flops(inner) for inner in _inside(parameters))


def _inside(parameters: dict[str, Any]) -> list[core.Jaxpr | core.ClosedJaxpr]:
    """The programs that an equation calls: of jit, checkpoint, custom derivatives."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    # A custom derivative holds its rules as functions; what runs here is the one traced program.
    return [value for value in parameters.values() if isinstance(value, kinds)]


def _array(value: core.Var | core.Literal) -> ShapedArray:
    assert isinstance(value.aval, ShapedArray)
    return value.aval


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = _array(equation.invars[0]).shape, _array(equation.outvars[0])
    return 2 * out.size * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: core.JaxprEqn) -> int:
    """Every row meets the matrix of its own group only, forward and in both transposes."""
    left, right = (_array(x).shape for x in equation.invars[:2])
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    if dimensions.rhs_group_dimensions:
        return 2 * _array(equation.outvars[0]).size * math.prod(left[axis] for axis in contracted)
    # The groups share the contracted rows out: [rows, k] and [rows, n] make [groups, k, n].
    rows = math.prod(left[axis] for axis in contracted)
    return 2 * rows * math.prod(left) // rows * math.prod(right) // rows


def _convolution(equation: core.JaxprEqn) -> int:
    kernel, out = _array(equation.invars[1]).shape, _array(equation.outvars[0])
    output_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * out.size * math.prod(kernel) // output_features


def _bound(condition: core.ClosedJaxpr) -> int:
    """The largest whole number a condition holds, 1 if it holds none."""
    constants = [
        int(value.val)
        for equation in condition.jaxpr.eqns
        for value in equation.invars
        if isinstance(value, core.Literal) and jnp.issubdtype(_array(value).dtype, jnp.integer)
    ]
    return max([1, *constants])
