"""Measures and tables of an evaluation, and of two policies compared question by question.

Everything is computed from records, so it can be computed again from the files of an evaluation.
Leaves estimators to `occ_jax.evaluation.statistics`.
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
    MAX_ANSWERS,
    Interval,
    interval,
    majority_at_k,
    mean_of_sets,
    paired,
    pass_at_k,
)

NOTE = (
    "Mean over questions ± half of its normal 95% interval, clustered by question; shares in "
    "percent. avg@n: answers that are right; pass@k: questions with a right answer among k; maj@k: "
    "questions on which the most frequent of k answers is right, ties shared."
)
COMPARISON_NOTE = (
    "Differences are paired by question, in percentage points, ± half of their normal 95% "
    "interval; * marks an interval without 0. Last column: questions on which B is better, worse, "
    "equal."
)


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """The metrics "val/..." that a run logs of one evaluation.

    They are avg@n with its 95% interval clustered by question, pass@n and maj@n of all n answers,
    lengths, the number of completions that the verifier failed on, and, if the records have them,
    the exact objective and the modules' agreement.
    """
    samples = len(records[0].scores)
    figures: dict[str, float] = {}
    for name, values in per_question(records, [samples]).items():
        mean, half_width = interval(values)
        figures[f"val/{name}"] = mean
        if name.startswith(("avg@", "objective")) and math.isfinite(half_width):
            figures[f"val/{name}_ci95"] = half_width
    figures["val/accuracy"] = figures[f"val/avg@{samples}"]
    figures["val/response_length/mean"] = float(np.mean([r.lengths for r in records]))
    figures["val/response_length/clip_ratio"] = float(np.mean([r.truncated for r in records]))
    failed = sum(failure != "" for record in records for failure in record.failures)
    figures["val/verifier_failures"] = float(failed)
    agreement = {f"val/agreement_{k + 1}": x for k, x in enumerate(_agreement(records))}
    return figures | agreement


def per_question(records: Sequence[Record], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every measure's value for each question: name -> float64 [Q].

    The measures are avg@n, then pass@k and maj@k for every k of `ks`, then the exact objective;
    those that the records do not have are left out. For pass@k, an answer with score 1 or more is
    right.

    Raises:
        UserError: questions differ in their number of answers, or `require_ks` refuses a k.
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
    """Refuses every k for which pass@k, or maj@k if `majorities`, cannot be computed.

    `samples` is n, answers a question. maj@k needs a verifier that returns the answer it reads; a
    user's function does not.

    Raises:
        UserError: a k exceeds n, or maj@k of so many answers cannot be computed.
    """
    for k in ks:
        if k > samples:
            raise UserError(f"--k is {k}; it must be at most the {samples} answers a question has")
        if majorities and k < samples and samples > MAX_ANSWERS:
            raise UserError(
                f"--k is {k} of {samples:,} samples a question; maj@k is computed from at most "
                f"{MAX_ANSWERS:,} samples, or of all of them (--k {samples})"
            )


def figures_of(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """One set's figures as JSON values; the interval of a single question is None."""
    lengths = np.array([record.lengths for record in records])
    truncated = np.array([record.truncated for record in records], float).mean(axis=1)
    failures = collections.Counter(failure for record in records for failure in record.failures)
    measures = per_question(records, ks)
    return {
        "questions": len(records),
        "samples": len(records[0].scores),
        **{name: _to_json(interval(values)) for name, values in measures.items()},
        "agreement": _agreement(records),
        "response_length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        "truncated": _to_json(interval(truncated)),
        "verifier_failures": {kind: failures[kind] for kind in ("timeout", "death", "error")},
    }


def evaluation_report(sets: Mapping[str, Sequence[Record]], ks: Sequence[int]) -> dict[str, Any]:
    """Every set's figures and, for several sets, their mean; JSON values."""
    by_set = {name: figures_of(records, ks) for name, records in sets.items()}
    if len(by_set) < 2:
        return {"sets": by_set}
    first, *others = by_set.values()
    common = [name for name in first if "@" in name and all(name in other for other in others)]
    means = {
        name: _to_json(mean_of_sets([_from_json(figures[name]) for figures in by_set.values()]))
        for name in common
    }
    return {"sets": by_set, "mean": means}


def evaluation_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table of an `evaluation_report`; columns without any figure are left out."""
    rows = dict(report["sets"])
    if "mean" in report:
        rows["mean of sets"] = report["mean"]
    measures = dict.fromkeys(name for figures in rows.values() for name in figures)
    shares = [name for name in measures if "@" in name or name == "objective"]
    cells = [["set", "questions", *shares, "agreement", "tokens", "median", "longest", "truncated"]]
    cells[0].append("not judged")
    for name, figures in rows.items():
        row = [name, f"{figures['questions']:,}" if "questions" in figures else "–"]
        row += [_percent(figures[x]) if x in figures else "–" for x in shares]
        if "questions" not in figures:
            cells.append([*row, *"––––––"])
            continue
        lengths, failed = figures["response_length"], sum(figures["verifier_failures"].values())
        row.append(" / ".join(f"{100 * x:.1f}" for x in figures["agreement"]) or "–")
        row += [f"{lengths[x]:,.0f}" for x in ("mean", "median", "max")]
        cells.append([*row, _percent(figures["truncated"]), str(failed)])
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"–"}]
    return [list(row) for row in zip(*columns, strict=True)]


class Evaluated(NamedTuple):
    """The contents of one evaluation's directory."""

    directory: Path
    headers: dict[str, dict[str, Any]]  # by set
    sets: dict[str, list[Record]]


def read_evaluation(directory: Path) -> Evaluated:
    """Reads all sets of an evaluation's directory.

    Raises:
        UserError: the directory holds no set, or an unfinished one.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise UserError(f"{directory} holds no records of an evaluation (*.jsonl)")
    evaluated = Evaluated(directory, {}, {})
    for path in files:
        header, records = read_records(path)
        if len(records) < header["num_questions"]:
            raise UserError(
                f"{path} holds {len(records):,} of {header['num_questions']:,} questions; start "
                "its evaluation again to finish it"
            )
        evaluated.headers[header["set"]], evaluated.sets[header["set"]] = header, records
    return evaluated


def compare_evaluations(first: Evaluated, second: Evaluated, ks: Sequence[int]) -> dict[str, Any]:
    """Compares two policies on the sets that both answered.

    `ks` are those of pass@k and maj@k; if empty, the largest k that both evaluations have.

    Returns:
        JSON values: "rows", one per set and measure, with both means, the paired difference and the
        counts of questions; for several sets "mean", the mean difference of avg; "settings", those
        in which the evaluations differ.

    Raises:
        UserError: the evaluations have no common set, or their questions differ.
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
        set_ks = ks or [min(len(a[0].scores), len(b[0].scores))]
        before, after = (_rename_avg(per_question(records, set_ks)) for records in (a, b))
        for measure in before:
            if measure in after:
                comparison = paired(before[measure], after[measure])
                row: dict[str, Any] = {"set": name, "questions": len(a), "measure": measure}
                row["a"] = _to_json(interval(before[measure]))
                row["b"] = _to_json(interval(after[measure]))
                row |= comparison._asdict()
                row["difference"] = _to_json(comparison.difference)
                rows.append(row)
    result: dict[str, Any] = {"a": str(first.directory), "b": str(second.directory), "rows": rows}
    if len(names) > 1:
        differences = [_from_json(row["difference"]) for row in rows if row["measure"] == "avg"]
        result["mean"] = {"measure": "avg", "difference": _to_json(mean_of_sets(differences))}
    result["settings"] = {
        name: differences
        for name in names
        if (differences := _differing_settings(first.headers[name], second.headers[name]))
    }
    return result


def comparison_cells(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table of a comparison, which `compare_evaluations` returns."""
    cells = [["set", "measure", "questions", "A", "B", "B - A", "better/worse/equal"]]
    for row in comparison["rows"]:
        counts = f"{row['better']}/{row['worse']}/{row['equal']}"
        values = [_percent(row["a"]), _percent(row["b"]), _difference(row["difference"])]
        cells.append([row["set"], row["measure"], f"{row['questions']:,}", *values, counts])
    if "mean" in comparison:
        difference = _difference(comparison["mean"]["difference"])
        cells.append(["mean of sets", "avg", "–", "–", "–", difference, "–"])
    return cells


def _require_same_questions(name: str, a: Sequence[Record], b: Sequence[Record]) -> None:
    first, second = ({record.id: record.answer for record in records} for records in (a, b))
    for id in (*first, *second):
        if first.get(id) != second.get(id):
            both = id in first and id in second
            reason = f"{id} has different answers" if both else f"only one of them has {id}"
            raise UserError(f"the evaluations on {name} are of different questions: {reason}")
    if list(first) != list(second):
        raise UserError(f"the evaluations on {name} have their questions in different orders")


def _rename_avg(measures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names avg@n "avg": avg@16 and avg@32 estimate the same number and can be compared."""
    return {name if "avg" not in name else "avg": values for name, values in measures.items()}


def _differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    # Policies may have different tokenizers, on which the digest of the questions depends too.
    expected = {"policy", "questions", "prompts a call", "completions"}
    return {
        name: [a.get(name), b.get(name)]
        for name in dict.fromkeys((*a, *b))
        if name not in expected and a.get(name) != b.get(name)
    }


def _agreement(records: Sequence[Record]) -> list[float]:
    """Each module's agreement: share of tokens where it and the main head prefer the same token."""
    shares: list[float] = []
    while f"agreed_{(k := len(shares) + 1)}" in records[0].figures:
        agreed, drafted = (
            sum(record.figures[f"{name}_{k}"] for record in records)
            for name in ("agreed", "drafted")
        )
        shares.append(agreed / max(drafted, 1.0))
    return shares


def _to_json(interval: Interval) -> dict[str, float | None]:
    mean, half = interval
    return {"mean": mean, "half_width": half if math.isfinite(half) else None}


def _from_json(value: Mapping[str, Any]) -> Interval:
    half = value["half_width"]
    return Interval(value["mean"], math.nan if half is None else half)


def _percent(value: Mapping[str, Any], form: str = ".1f") -> str:
    mean, half = _from_json(value)
    plus_minus = f" ± {100 * half:.1f}" if math.isfinite(half) else ""
    return f"{round(100 * mean, 1) + 0.0:{form}}{plus_minus}"


def _difference(value: Mapping[str, Any]) -> str:
    mean, half = _from_json(value)
    mark = "*" if abs(mean) > half else ""  # none if there is no interval, as half is NaN
    return f"{_percent(value, '+.1f')}{mark}"
