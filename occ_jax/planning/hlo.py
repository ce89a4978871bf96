"""Bytes that a compiled program sends between devices, read from its text.

XLA does not report the bytes of its collectives, but the text of a program has all of them, also
those in loops and fusions. This module walks the text from the entry computation and counts the
body of a loop as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_ALLOCATE_NOTHING = ("parameter", "get-tuple-element", "bitcast", "constant")
_BITS = {"pred": 8, "token": 0, "f8": 8}  # all others end in their number of bits
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=(\{[^}]*\}|[^,\s]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")


class _Collective(NamedTuple):
    kind: str
    channel: str
    size: int


class _Call(NamedTuple):
    target: str
    trips: int  # 1 except for the body of a loop
    own_scope: bool  # true for a loop's body or a branch; a fusion belongs to its caller


class _Computation(NamedTuple):
    collectives: list[_Collective]
    calls: list[_Call]
    constants: list[int]  # its whole numbers


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of one device's collectives in one run of the program, by kind.

    A collective counts as its input or its output, whichever is larger. The text may contain an
    asynchronous collective several times, from its start to its end, with the same channel; it
    counts once.

    Args:
        text: text of a compiled and partitioned program (`jax.stages.Compiled.as_text`).
    """
    computations, entry = _read(text)
    totals: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        scope = _scope(computations, name)
        by_channel: dict[tuple[str, str], int] = {}
        for kind, channel, size in (each for part in scope for each in part.collectives):
            by_channel[kind, channel] = max(size, by_channel.get((kind, channel), 0))
        for (kind, _), size in by_channel.items():
            totals[kind] += times * size
        for call in (call for part in scope for call in part.calls if call.own_scope):
            visit(call.target, times * call.trips)

    visit(entry, 1)
    return dict(totals)


def largest_arrays(text: str, count: int) -> list[tuple[int, str]]:
    """The largest arrays that the program allocates in a device's main memory, largest first.

    Args:
        text: as for `collective_bytes`.
        count: largest number of arrays to return.

    Returns:
        Pairs (bytes, type and origin); only the first of several with the same type and origin.
    """
    sizes: dict[str, int] = {}
    fused = False
    for line in text.splitlines():
        if header := _HEADER.match(line):
            fused = "fused_computation" in header.group(2)
        instruction = _INSTRUCTION.match(line)
        if not instruction or fused:
            continue
        result, operation, arguments = _split(line[instruction.end() :])
        # Other instructions allocate the parts of a tuple; S(1) is memory on the chip.
        if operation in _ALLOCATE_NOTHING or result.startswith("(") or "S(1)" in result:
            continue
        origin = re.search(r'op_name="([^"]*)"', arguments)
        source = origin.group(1) if origin else operation
        if shape := _SHAPE.match(result):
            sizes.setdefault(f"{shape.group(0)}  {source}", _bytes(result))
    return [(size, name) for name, size in Counter(sizes).most_common(count)]


def _scope(computations: dict[str, _Computation], name: str) -> list[_Computation]:
    """A computation and its fusions."""
    computation = computations[name]
    inside = [call.target for call in computation.calls if not call.own_scope]
    return [computation, *(part for target in inside for part in _scope(computations, target))]


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the entry computation."""
    computations: dict[str, _Computation] = {}
    conditions: list[tuple[str, int, str]] = []
    entry = name = ""
    shapes: dict[str, int] = {}
    for line in text.splitlines():
        header, match = _HEADER.match(line), _INSTRUCTION.match(line)
        if header:
            name = header.group(2)
            entry = name if header.group(1) else entry
            computations[name], shapes = _Computation([], [], []), {}
        elif match and name:
            _add_instruction(line, match, name, computations, shapes, conditions)
    for owner, position, condition in conditions:
        bound = max([1, *computations[condition].constants])
        calls = computations[owner].calls
        calls[position] = calls[position]._replace(trips=bound)
    return computations, entry


def _add_instruction(
    line: str,
    match: re.Match[str],
    owner: str,
    computations: dict[str, _Computation],
    shapes: dict[str, int],
    conditions: list[tuple[str, int, str]],
) -> None:
    """Adds one instruction to its computation."""
    computation = computations[owner]
    result, operation, arguments = _split(line[match.end() :])
    size = _bytes(result)
    shapes[match.group(1)] = size
    if operation == "constant" and re.fullmatch(r"[su]\d+\[\].*", result):
        value = re.match(r"\(?(-?\d+)", arguments)
        if value:
            computation.constants.append(int(value.group(1)))
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        operands = sum(shapes.get(name, 0) for name in _names(arguments))
        if operation.endswith("-start"):  # its result has operands, results and scalar contexts
            size = _bytes(re.sub(r"\w+\[\]", "", result)) - operands
        channel = _CHANNEL.search(line)
        computation.collectives.append(
            _Collective(kind, channel.group(1) if channel else match.group(1), max(size, operands))
        )
        return
    if operation == "while":
        body = re.search(r"body=%?([\w.\-]+)", line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        assert body and condition, line
        trips = _TRIPS.search(line)
        computation.calls.append(_Call(body.group(1), int(trips.group(1)) if trips else 1, True))
        if not trips:
            conditions.append((owner, len(computation.calls) - 1, condition.group(1)))
        return
    if called := _CALLED.search(arguments):
        for target in re.findall(r"[\w.\-]+", called.group(1)):
            computation.calls.append(_Call(target, 1, operation == "conditional"))


def _split(rest: str) -> tuple[str, str, str]:
    """Type of the result, operation, and the text after its opening bracket."""
    depth = 0
    for position, letter in enumerate(rest):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == " " and depth == 0:
            operation, _, arguments = rest[position + 1 :].partition("(")
            return rest[:position], operation, arguments
    return rest, "", ""


def _names(arguments: str) -> list[str]:
    """Names of the operands, up to the closing bracket of their list."""
    depth = 1
    for position, letter in enumerate(arguments):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", arguments[:position])
    return re.findall(r"%([\w.\-]+)", arguments)


def _bytes(types: str) -> int:
    """Bytes of a type, or of all types of a tuple, without layouts and padding."""
    total = 0
    for kind, dimensions in _SHAPE.findall(types):
        bits = _BITS.get(kind[:2] if kind.startswith("f8") else kind)
        if bits is None:
            number = re.search(r"(\d+)", kind)
            bits = int(number.group(1)) if number else 0
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total
