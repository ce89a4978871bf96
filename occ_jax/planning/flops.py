"""Floating-point operations of a traced program, with loops multiplied out.

XLA's own count (`cost_analysis`) counts the body of a loop once, however often it runs, and does
not count kernels. This module counts the matrix products of the trace, including those that a
backward pass recomputes. It leaves out element-wise operations, which do not run on matrix units.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """Operations of all matrix products on all devices; a multiply-add counts as two.

    A scan counts as often as it is long, a `while_loop` as often as it may turn (`_max_turns`), a
    kernel as often as its grid has steps, a `cond` as its most expensive branch.
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
            return _max_turns(equation) * (count_flops(body) + count_flops(condition))
        case "cond":
            return max(count_flops(branch) for branch in parameters["branches"])
        case "shard_map":
            manual = parameters["newly_manual_axes"]
            devices = math.prod(parameters["mesh"].shape[axis] for axis in manual)
            return devices * count_flops(parameters["jaxpr"])
        case "pallas_call":
            steps = math.prod(parameters["grid_mapping"].grid)
            return steps * count_flops(parameters["jaxpr"])
        case _:
            # jit, checkpoint and custom derivatives, which keep their rules as functions: the only
            # traced program is the one that runs.
            programs = (core.Jaxpr, core.ClosedJaxpr)
            return sum(count_flops(x) for x in parameters.values() if isinstance(x, programs))


def _array(value: core.Var | core.Literal) -> ShapedArray:
    assert isinstance(value.aval, ShapedArray)
    return value.aval


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = _array(equation.invars[0]).shape, _array(equation.outvars[0])
    return 2 * out.size * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: core.JaxprEqn) -> int:
    """Every row is multiplied by the matrix of its own group only, and so in both transposes."""
    left, right = (_array(x).shape for x in equation.invars[:2])
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    rows = math.prod(left[axis] for axis in contracted)
    if dimensions.rhs_group_dimensions:
        return 2 * _array(equation.outvars[0]).size * rows
    # The contracted rows are split between the groups: [rows, k], [rows, n] to [groups, k, n].
    return 2 * rows * math.prod(left) // rows * math.prod(right) // rows


def _convolution(equation: core.JaxprEqn) -> int:
    kernel, out = _array(equation.invars[1]).shape, _array(equation.outvars[0])
    output_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * out.size * math.prod(kernel) // output_features


def _max_turns(equation: core.JaxprEqn) -> int:
    """The largest number of turns of a `while_loop`.

    This is the largest whole number in its condition, if there is one: sampling reaches that bound
    if no row ends early. Otherwise the bound is computed, as in the gradient of a grouped product
    (`occ_jax.models.grouped`). Such a loop walks along lists that it only reads: the bound is the
    length of the longest, at least 1.
    """
    constants = [
        int(value.val)
        for inner in equation.params["cond_jaxpr"].jaxpr.eqns
        for value in inner.invars
        if isinstance(value, core.Literal) and jnp.issubdtype(_array(value).dtype, jnp.integer)
    ]
    first = equation.params["cond_nconsts"]
    constants_of_body = equation.invars[first : first + equation.params["body_nconsts"]]
    lists = [_array(value).size for value in constants_of_body if len(_array(value).shape) == 1]
    return max(constants or lists, default=1)
