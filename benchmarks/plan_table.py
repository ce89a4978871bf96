"""Plans of the large configs on TPU slices, every regime and estimator, as Markdown tables.

    python benchmarks/plan_table.py docs/results/plans.jsonl [--config NAME ...] [--regime NAME ...]
    python benchmarks/plan_table.py docs/results/plans.jsonl --render

A line of the file is one program, `run.py plan --only PROGRAM --json` in a process of its own. What
is there already is not compiled again, and what regimes share is compiled once: all sample and are
evaluated alike, and those that need no module's old log-probabilities score alike. Needs libtpu
(docs/plan.md) and one to three minutes of both cores of a laptop a program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
GIB = 2**30


class Job(NamedTuple):
    """One compilation, and the rows of the table that show it."""

    config: str
    slice: str
    program: str
    regime: str  # the first of those that share it


# Of every config the slices, and how its run is laid out there where that is not the config's way.
SLICES: dict[str, dict[str, tuple[str, ...]]] = {
    "mimo_7b_dapo": {
        "v5e:4x8": ("--mesh.tensor", "4", "--rollout.sampling-chunks", "16"),
        "v5e:8x8": (),
        "v6e:4x4": ("--mesh.tensor", "2", "--rollout.sampling-chunks", "16"),
        "v5p:2x2x1": (
            *("--mesh.fsdp", "4", "--mesh.tensor", "1"),
            *("--rollout.sampling-chunks", "16"),
        ),
    },
    "glm45_air_dapo": {
        "v5e:16x16": (
            *("--mesh.fsdp", "4", "--algorithm.micro-batches", "16"),
            *("--rollout.sampling-chunks", "4"),
        ),
        "v6e:8x16": (),
        "v5p:2x4x4": ("--mesh.tensor", "2"),
    },
}
REGIMES: dict[str, tuple[str, ...]] = {
    "occ/log_prob": ("--mtp.regime", "occ"),
    "detach": ("--mtp.regime", "detach"),
    "ce": ("--mtp.regime", "ce"),
    "policy": ("--mtp.regime", "policy"),
    "occ/exact": ("--mtp.regime", "occ", "--mtp.estimator", "exact"),
    "occ/cross_batch": ("--mtp.regime", "occ", "--mtp.estimator", "cross_batch"),
}
PROGRAMS = ("update", "rollout", "mini-batches", "evaluation")


def shared(program: str, regime: str) -> str:
    """The regime whose program this is."""
    if program in ("rollout", "evaluation"):
        return "occ/log_prob"
    if program == "mini-batches":
        return "detach" if regime in ("detach", "ce") else "occ/log_prob"
    return regime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--render", action="store_true", help="print the tables, compile nothing")
    parser.add_argument("--config", nargs="+", choices=tuple(SLICES), default=tuple(SLICES))
    names = sorted({name for slices in SLICES.values() for name in slices})
    parser.add_argument("--slice", nargs="+", choices=names, help="of a config's (all)")
    parser.add_argument("--regime", nargs="+", choices=tuple(REGIMES), default=tuple(REGIMES))
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    options = parser.parse_args()
    if not options.render:
        for job in jobs(options):
            compile_one(options.file, job)
    for config in options.config:
        print(table(read(options.file), config), end="\n\n")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for regime in options.regime:
        for config in options.config:
            for name in options.slice or SLICES[config]:
                for program in options.program:
                    if name in SLICES[config]:
                        yield Job(config, name, program, shared(program, regime))


def read(file: Path) -> dict[Job, dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {Job(*row["job"]): row for row in map(json.loads, lines)}


def compile_one(file: Path, job: Job) -> None:
    """Adds one program's plan to the file unless it is there."""
    if job in read(file):
        return
    layout, regime = SLICES[job.config][job.slice], REGIMES[job.regime]
    command = ["run.py", "plan", f"configs/{job.config}.py", "--topology", job.slice]
    command += [*layout, *regime, "--only", job.program, "--json"]
    print(" ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    row = {"job": list(job), "command": " ".join(command), "plan": json.loads(done.stdout)}
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def table(rows: dict[Job, dict[str, Any]], config: str) -> str:
    """GiB of a device by program; temporaries, operations and sent GiB are an update's."""
    heads = ("slice", "regime", *PROGRAMS, "temporaries", "PFLOP", "sent", "verdict")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * 7 + "---|"]
    for name in SLICES[config]:
        for regime in REGIMES:
            found = {
                program: rows[job]["plan"]
                for program in PROGRAMS
                if (job := Job(config, name, program, shared(program, regime))) in rows
            }
            if "update" in found:
                lines.append(line(name, regime, found))
    return "\n".join(lines)


def line(name: str, regime: str, found: dict[str, Any]) -> str:
    programs = {program: plan["programs"][0] for program, plan in found.items()}
    update = programs["update"]
    sizes = [f"{programs[p]['total'] / GIB:.1f}" if p in programs else "-" for p in PROGRAMS]
    refused = [program for program, plan in found.items() if not plan["fits"]]
    over = max(plan["over"] for plan in found.values())
    if refused:
        verdict = f"{', '.join(refused)} over" + (f" by {over / GIB:.1f}" if over else "")
    else:
        verdict = "fits" if len(found) == len(PROGRAMS) else "-"
    sent = "-" if update["refused"] else f"{sum(update['collectives'].values()) / GIB:,.0f}"
    cells = [
        *(name, regime, *sizes, f"{update['temporaries'] / GIB:.1f}"),
        *(f"{update['flops'] / 1e15:.2f}", sent, verdict),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
