"""Figures and tables of evaluations, and of two policies compared question by question.

Reads records alone, so all of it can be made again from the files of an evaluation.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from occ_jax.errors import UserError
from occ_jax.evaluation.records import Record, read_records
from occ_jax.evaluation.statistics import (
    MOST_ANSWERS,
    Interval,
    interval,
    majority_at_k,
    mean_of_sets,
    paired,
    pass_at_k,
)

NOTE = (
    "Mean over questions ± half of its normal 95% interval, clustered by question; shares in "
    "percent. avg@n: answers that are right; pass@k: questions with a right one among k answers; "
    "maj@k: questions on which the most frequent of k answers is right, ties shared."
)
COMPARISON_NOTE = (
    "Differences are paired by question, in percentage points, ± half of their normal 95% "
    "interval; * where it excludes 0. Last column: questions on which B is better, worse, equal."
)


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """What a run logs of one evaluation, under "val/".

    avg@n with its 95% interval clustered by question, pass@n and maj@n of all n answers, lengths,
    completions that the verifier failed on, the exact objective and the modules' agreement where
    there are such.
    """
    samples = len(records[0].scores)
    measures = per_question(records, [samples])
    figures: dict[str, float] = {}
    for name, values in measures.items():
        found = interval(values)
        figures[f"val/{name}"] = found.mean
        if name.startswith(("avg@", "objective")) and math.isfinite(found.half_width):
            figures[f"val/{name}_ci95"] = found.half_width
    figures["val/accuracy"] = figures[f"val/avg@{samples}"]
    figures["val/response_length/mean"] = float(np.mean([r.lengths for r in records]))
    figures["val/response_length/clip_ratio"] = float(np.mean([r.truncated for r in records]))
    failed = sum(failure != "" for record in records for failure in record.failures)
    figures["val/verifier_failures"] = float(failed)
    for k, value in enumerate(_agreement(records)):
        figures[f"val/agreement_{k + 1}"] = value
    return figures


def per_question(records: Sequence[Record], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """The numbers that means and intervals are of: measure -> float64 [Q].

    avg@n, then pass@k and maj@k for every k of `ks`, then the exact objective; without what the
    records do not give. An answer is right in pass@k where its score is 1 or more.

    Raises:
        UserError: questions differ in their number of answers, or a k is not to be had of it.
    """
    samples = len(records[0].scores)
    for record in records:
        if len(record.scores) != samples:
            raise UserError(
                f"question {record.id} of {record.source} has {len(record.scores)} answers, "
                f"others {samples}"
            )
    voted = any(given is not None for record in records for given in record.given)
    require_ks(ks, samples, majorities=voted)
    scores = np.array([record.scores for record in records], float)
    measures = {f"avg@{samples}": scores.mean(axis=1)}
    right = (scores >= 1).sum(axis=1)
    measures |= {f"pass@{k}": pass_at_k(right, samples, k) for k in ks}
    if voted:
        for k in ks:
            won = [majority_at_k(record.given, record.scores, k) for record in records]
            measures[f"maj@{k}"] = np.array(won)
    if all("objective" in record.figures for record in records):
        measures["objective"] = np.array([record.figures["objective"] for record in records])
    return measures


def require_ks(ks: Sequence[int], samples: int, *, majorities: bool) -> None:
    """Refuses a k that n answers a question give no figure for.

    Args:
        ks: of pass@k and maj@k.
        samples: n.
        majorities: whether maj@k is wanted too: a verifier that names the answers it reads, any but
            a function of the user's own, gives it.

    Raises:
        UserError: a k exceeds n, or maj@k of so many answers cannot be computed.
    """
    for k in ks:
        if k > samples:
            raise UserError(f"--k is {k}; it must be at most the {samples} answers a question has")
        if majorities and k < samples and samples > MOST_ANSWERS:
            raise UserError(
                f"--k is {k} of {samples:,} samples a question; maj@k is computed from at most "
                f"{MOST_ANSWERS:,} samples, or of all of them (--k {samples})"
            )


def figures_of(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """One set's figures as JSON values; None for an interval of a single question."""
    lengths = np.array([record.lengths for record in records])
    truncated = np.array([record.truncated for record in records], float).mean(axis=1)
    failures = collections.Counter(failure for record in records for failure in record.failures)
    intervals = {name: interval(values) for name, values in per_question(records, ks).items()}
    return {
        "questions": len(records),
        "samples": len(records[0].scores),
        **{name: _json(found) for name, found in intervals.items()},
        "agreement": _agreement(records),
        "response_length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "truncated": _json(interval(truncated)),
        "verifier_failures": {kind: failures[kind] for kind in ("timeout", "death", "error")},
    }


def evaluation_report(sets: Mapping[str, Sequence[Record]], ks: Sequence[int]) -> dict[str, Any]:
    """Every set's figures, and the mean over sets where there are several; JSON values."""
    found = {name: figures_of(records, ks) for name, records in sets.items()}
    if len(found) < 2:
        return {"sets": found}
    first, *others = found.values()
    common = [name for name in first if "@" in name and all(name in other for other in others)]
    means = {
        name: _json(mean_of_sets([_interval(figures[name]) for figures in found.values()]))
        for name in common
    }
    return {"sets": found, "mean": means}


def evaluation_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """The table of an `evaluation_report`; columns that no set has a figure for are left out."""
    rows = dict(report["sets"])
    if "mean" in report:
        rows["mean of sets"] = report["mean"]
    measures = [name for name in dict.fromkeys(name for f in rows.values() for name in f)]
    shares = [name for name in measures if "@" in name or name == "objective"]
    cells = [["set", "questions", *shares, "agreement", "tokens", "median", "longest", "truncated"]]
    cells[0].append("not judged")
    for name, figures in rows.items():
        row = [name, f"{figures['questions']:,}" if "questions" in figures else "–"]
        row += [_percent(_interval(figures[x])) if x in figures else "–" for x in shares]
        if "questions" not in figures:
            cells.append([*row, *"––––––"])
            continue
        lengths, failed = figures["response_length"], sum(figures["verifier_failures"].values())
        row.append(" / ".join(f"{100 * x:.1f}" for x in figures["agreement"]) or "–")
        row += [f"{lengths[x]:,.0f}" for x in ("mean", "median", "max")]
        cells.append([*row, _percent(_interval(figures["truncated"])), str(failed)])
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"–"}]
    return [list(row) for row in zip(*columns, strict=True)]


class Evaluated(NamedTuple):
    """The files of one evaluation."""

    directory: Path
    headers: dict[str, dict[str, Any]]  # by set
    sets: dict[str, list[Record]]


def read_evaluation(directory: Path) -> Evaluated:
    """All finished sets of an evaluation's directory.

    Raises:
        UserError: there are none, or one was not finished.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise UserError(f"{directory} holds no records of an evaluation (*.jsonl)")
    found = Evaluated(directory, {}, {})
    for path in files:
        header, records = read_records(path)
        if len(records) < header["num_questions"]:
            raise UserError(
                f"{path} holds {len(records):,} of {header['num_questions']:,} questions; start "
                "its evaluation again to finish it"
            )
        found.headers[header["set"]], found.sets[header["set"]] = header, records
    return found


def compare_evaluations(first: Evaluated, second: Evaluated, ks: Sequence[int]) -> dict[str, Any]:
    """How the second policy differs from the first on the sets that both answered.

    Args:
        first: A.
        second: B.
        ks: k of pass@k and maj@k; empty for the largest that both have.

    Returns:
        JSON values: "rows", one per set and measure, with both means, the paired difference and the
        counts of questions; "mean", the difference of avg over sets, where there are several;
        "settings", those in which the evaluations differ.

    Raises:
        UserError: no common set, or a set whose questions are not the same.
    """
    names = [name for name in first.sets if name in second.sets]
    if not names:
        raise UserError(
            f"{first.directory} ({', '.join(first.sets)}) and {second.directory} "
            f"({', '.join(second.sets)}) have no set in common"
        )
    rows: list[dict[str, Any]] = []
    for name in names:
        a, b = first.sets[name], second.sets[name]
        _require_same_questions(name, a, b)
        chosen = ks or [min(len(a[0].scores), len(b[0].scores))]
        before, after = _named_alike(per_question(a, chosen)), _named_alike(per_question(b, chosen))
        for measure in before:
            if measure in after:
                found = paired(before[measure], after[measure])
                rows.append(
                    {
                        "set": name,
                        "questions": len(a),
                        "measure": measure,
                        "a": _json(interval(before[measure])),
                        "b": _json(interval(after[measure])),
                        "difference": _json(found.difference),
                        "better": found.better,
                        "worse": found.worse,
                        "equal": found.equal,
                    }
                )
    result: dict[str, Any] = {"a": str(first.directory), "b": str(second.directory), "rows": rows}
    if len(names) > 1:
        differences = [_interval(row["difference"]) for row in rows if row["measure"] == "avg"]
        result["mean"] = {"measure": "avg", "difference": _json(mean_of_sets(differences))}
    result["settings"] = {
        name: found
        for name in names
        if (found := _differing(first.headers[name], second.headers[name]))
    }
    return result


def comparison_cells(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The table of a `compare_evaluations`."""
    cells = [["set", "measure", "questions", "A", "B", "B - A", "better/worse/equal"]]
    for row in comparison["rows"]:
        counts = f"{row['better']}/{row['worse']}/{row['equal']}"
        a, b = _percent(_interval(row["a"])), _percent(_interval(row["b"]))
        difference = _difference(_interval(row["difference"]))
        questions = f"{row['questions']:,}"
        cells.append([row["set"], row["measure"], questions, a, b, difference, counts])
    if "mean" in comparison:
        difference = _difference(_interval(comparison["mean"]["difference"]))
        cells.append(["mean of sets", "avg", "–", "–", "–", difference, "–"])
    return cells


def _require_same_questions(name: str, a: Sequence[Record], b: Sequence[Record]) -> None:
    ours, theirs = ({record.id: record.answer for record in records} for records in (a, b))
    for id in (*ours, *theirs):
        if ours.get(id) != theirs.get(id):
            kind = "with another answer" if id in ours and id in theirs else "in one of them only"
            raise UserError(f"the evaluations on {name} are of different questions: {id} is {kind}")
    if list(ours) != list(theirs):
        raise UserError(f"the evaluations on {name} have their questions in different orders")


def _named_alike(measures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """avg@16 and avg@32 estimate the same, so they can be compared as avg."""
    return {name if "avg" not in name else "avg": values for name, values in measures.items()}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    # Two policies have two tokenizers, which the digest of the questions speaks of too.
    expected = {"policy", "questions", "prompts a call", "completions"}
    return {
        name: [a.get(name), b.get(name)]
        for name in dict.fromkeys((*a, *b))
        if name not in expected and a.get(name) != b.get(name)
    }


def _agreement(records: Sequence[Record]) -> list[float]:
    """Per module, the share of tokens on which its most probable one is the main head's."""
    shares: list[float] = []
    while f"agreed_{(k := len(shares) + 1)}" in records[0].figures:
        agreed, drafted = (
            sum(record.figures[f"{name}_{k}"] for record in records)
            for name in ("agreed", "drafted")
        )
        shares.append(agreed / max(drafted, 1.0))
    return shares


def _json(found: Interval) -> dict[str, float | None]:
    half = found.half_width if math.isfinite(found.half_width) else None
    return {"mean": found.mean, "half_width": half}


def _interval(value: Mapping[str, float | None]) -> Interval:
    mean, half = value["mean"], value["half_width"]
    return Interval(math.nan if mean is None else mean, math.nan if half is None else half)


def _percent(found: Interval) -> str:
    half = f" ± {100 * found.half_width:.1f}" if math.isfinite(found.half_width) else ""
    return f"{100 * found.mean:.1f}{half}"


def _difference(found: Interval) -> str:
    sure = abs(found.mean) > found.half_width  # False where there is no interval
    return f"{round(100 * found.mean, 1) + 0.0:+.1f}" + (
        f" ± {100 * found.half_width:.1f}{'*' if sure else ''}"
        if math.isfinite(found.half_width)
        else ""
    )
