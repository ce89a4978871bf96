"""A plan as text, whose last line is the verdict, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from occ_jax.planning.machines import Machine
from occ_jax.planning.plan import Plan
from occ_jax.tables import markdown_table


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; keys end in their unit where it is not bytes."""
    return {
        **plan._asdict(),
        "programs": [{**program._asdict(), "total": program.total} for program in plan.programs],
        "over": plan.over,
        "fits": plan.fits,
    }


def render(plan: Plan) -> str:
    """Returns the plan as tables; the last line is the verdict."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    memory = "" if plan.memory is None else f" of {_size(plan.memory)}"
    # Arrays that last, and the largest that programs keep among their temporaries.
    sizes = (plan.parameters, plan.optimizer, plan.gradients, plan.kv_cache)
    parts = [
        ("a device", "parameters", "optimizer", "gradients", "KV cache"),
        ("bytes", *map(_size, sizes)),
    ]
    return "\n".join(
        [
            f"{plan.machine}: {math.prod(plan.mesh.values())} x {plan.kind}{memory}, mesh {mesh}",
            "",
            markdown_table(parts),
            "",
            markdown_table(_programs(plan)),
            *_details(plan),
            "",
            verdict(plan),
        ]
    )


def verdict(plan: Plan) -> str:
    """Says whether the run fits, and if not, which programs exceed the memory by how much."""
    if plan.fits:
        largest = max(plan.programs, key=lambda program: program.total)
        room = (
            "the memory is not known; --memory GIB compares with it"
            if plan.memory is None
            else f"{_size(plan.memory - largest.total)} to spare"
        )
        return f"fits: {largest.name} takes most, {_size(largest.total)} a device, {room}"
    parts: list[str] = []
    for program in plan.programs:
        over = 0 if plan.memory is None else program.total - plan.memory
        if over > 0:
            parts.append(f"{program.name} is over by {_size(over)} a device")
        elif program.refused:
            parts.append(f"{program.name} is refused: {program.refused}")
    return "does not fit: " + "; ".join(parts)


def has_memory(machine: Machine, needed: int, say: Callable[[str], None]) -> bool:
    """Tells whether a device of a machine has `needed` bytes; calls `say` if not."""
    if machine.memory is None or needed <= machine.memory:
        return True
    needs = f"state and gradients alone take {_size(needed)} a device"
    say(f"{machine.name}: does not fit: {needs} of {_size(machine.memory)}")
    return False


def _programs(plan: Plan) -> list[tuple[str, ...]]:
    heads = ("resident", "arguments", "outputs", "temporaries", "total")
    cells: list[tuple[str, ...]] = [("a device", *heads, "FLOP", "sent", "compiled in s")]
    for program in plan.programs:
        sizes = (getattr(program, head) for head in heads)
        sent = "" if program.refused else _size(sum(program.collectives.values()))
        flops = _operations(program.flops)
        cells.append((program.name, *map(_size, sizes), flops, sent, f"{program.seconds:.0f}"))
    return cells


def _details(plan: Plan) -> list[str]:
    lines: list[str] = []
    for program in plan.programs:
        sent = ", ".join(f"{kind} {_size(size)}" for kind, size in program.collectives.items())
        lines += ["", f"{program.name}: sent {sent or 'nothing'}" if not program.refused else ""]
        lines += [f"  {_size(size):>10}  {name}" for size, name in program.largest]
        lines += [f"{program.name}: {program.refused}"] if program.refused else []
    return lines


def _size(count: int) -> str:
    """Bytes with three figures."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 2 ** (10 * power):.{2 if power > 2 else 0}f} {units[power]}"


def _operations(count: float) -> str:
    units = ("", "k", "M", "G", "T", "P", "E")
    power = min(len(units) - 1, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:.1f} {units[power]}FLOP"
