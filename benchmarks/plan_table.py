"""Plans of the large configs on TPU slices, every regime and estimator, as a Markdown table.

    python benchmarks/plan_table.py plans.jsonl [--render] [--config mimo_7b_dapo ...]

A line of the file is one plan, `run.py plan --json` in a process of its own; what is there already
is not compiled again. A program that regimes share (they all sample alike) is compiled once. Needs
libtpu (docs/plan.md) and about two minutes a program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GIB = 2**30

# Of every config the slices and, where it is not the config's own, how the run is laid out there.
SLICES: dict[str, dict[str, tuple[str, ...]]] = {
    "mimo_7b_dapo": {
        "v5e:8x8": ("--rollout.sampling-chunks", "16"),
        "v6e:8x8": (),
        "v5p:4x4x4": (),
    },
    "glm45_air_dapo": {},
}

# The paper's regimes; occ with every estimator. The first compiles all programs, the others theirs.
REGIMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "occ/log_prob": (("--mtp.regime", "occ"), ()),
    "detach": (("--mtp.regime", "detach"), ("mini-batches", "update")),
    "ce": (("--mtp.regime", "ce"), ("mini-batches", "update")),
    "policy": (("--mtp.regime", "policy"), ("update",)),
    "occ/exact": (("--mtp.regime", "occ", "--mtp.estimator", "exact"), ("update",)),
    "occ/cross_batch": (("--mtp.regime", "occ", "--mtp.estimator", "cross_batch"), ("update",)),
    "occ/released": (("--mtp.regime", "occ", "--mtp.estimator", "released"), ("update",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--render", action="store_true", help="print the tables, compile nothing")
    parser.add_argument("--config", nargs="+", choices=tuple(SLICES), default=tuple(SLICES))
    parser.add_argument("--regime", nargs="+", choices=tuple(REGIMES), default=tuple(REGIMES))
    parser.add_argument("--slice", nargs="+", help="of a config's (all)")
    options = parser.parse_args()
    if not options.render:
        for regime in options.regime:
            for config in options.config:
                for name in options.slice or SLICES[config]:
                    if name in SLICES[config]:
                        compile_one(options.file, config, name, regime)
    for config in options.config:
        print(table(read(options.file), config), end="\n\n")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compile_one(file: Path, config: str, name: str, regime: str) -> None:
    """Adds one plan to the file unless it is there."""
    key = {"config": config, "slice": name, "regime": regime}
    if any(key.items() <= row.items() for row in read(file)):
        return
    fields, only = REGIMES[regime]
    command = ["plan", f"configs/{config}.py", "--topology", name, *SLICES[config][name], *fields]
    command += ["--only", *only] if only else []
    print(f"{config} {name} {regime}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "run.py", *command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"run.py {' '.join(command)} ended with status {done.returncode}")
    row = {**key, "command": f"run.py {' '.join(command)}", **json.loads(done.stdout)}
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]], config: str) -> str:
    """GiB of a device by program; temporaries, operations and sent GiB are an update's."""
    heads = ("slice", "regime", "rollout", "mini-batches", "update", "temporaries", "FLOP", "sent")
    lines = [f"| {' | '.join((*heads, 'verdict'))} |", "|---|---|" + "---:|" * 6 + "---|"]
    mine = [row for row in rows if row["config"] == config]
    for name in SLICES[config]:
        whole = {
            program["name"]: program
            for row in mine
            if row["slice"] == name and row["regime"] == "occ/log_prob"
            for program in row["programs"]
        }
        for regime in REGIMES:
            for row in mine:
                if (row["slice"], row["regime"]) == (name, regime):
                    lines.append(line(row, whole))
    return "\n".join(lines)


def line(row: dict[str, Any], shared: dict[str, Any]) -> str:
    programs = shared | {program["name"]: program for program in row["programs"]}
    update = programs["update"]
    over = max(0, *(program["total"] - row["memory"] for program in programs.values()))
    refused = [name for name, program in programs.items() if program["refused"]]
    fits = "fits" if not over and not refused else f"over by {over / GIB:.1f} GiB"
    sizes = [programs[name]["total"] for name in ("rollout", "mini-batches", "update")]
    cells = [
        row["slice"],
        row["regime"],
        *(f"{size / GIB:.1f}" for size in (*sizes, update["temporaries"])),
        f"{update['flops'] / 1e15:.2f} P",
        f"{sum(update['collectives'].values()) / GIB:,.0f}",
        fits if fits == "fits" or over else f"refused: {', '.join(refused)}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
