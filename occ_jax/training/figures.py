"""Figures, the comparison table and the closing lines, for people to look at after a run.

Owns every figure and every printed result. Reads rows of metrics.jsonl alone, so all of it can be
made again from a run directory; what a row holds is `occ_jax.training.loop`'s business. A run that
went wrong must still be drawn, so numbers that are not finite are left out of figures; a table
shows no mean where one of the seeds has none, as the mean of those that survived would flatter.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import stdtrit

from occ_jax.files import Row
from occ_jax.tables import markdown_table

Rows = Sequence[Row]
Runs = Mapping[str, Sequence[Rows]]
"""A variant's name -> one list of rows per seed, the seeds in the same order everywhere."""
Curve = dict[float, float]
"""Step or update -> value; finite, in order."""

# Okabe and Ito's palette, distinct under the common colour blindnesses; a variant keeps its colour
# in every figure. Unknown names are black.
_COLORS = {
    "detach": "#7f7f7f",
    "ce": "#e69f00",
    "policy": "#d55e00",
    "occ/log_prob": "#0072b2",
    "occ/cross_batch": "#009e73",
    "occ/exact": "#cc79a7",
}
_DASHES = ("-", "--", ":", "-.")  # module 1, 2, ...
_INK, _LIGHT = "#333333", "#bbbbbb"
_OBJECTIVE, _ACCURACY, _AGREEMENT = "val/objective", "val/accuracy", "val/agreement_{}"
_COEFFICIENT, _CORRELATION = "occ/coefficient_{}", "occ/correlation_{}"
_WINDOW = 5  # rollouts in a running median
_MOST_DECADES = 1e6  # a logarithmic axis spans at most this ratio
_SYMLOG_ABOVE = 30.0  # largest over typical value from which on a signed axis is symlog
_SPARKS = "▁▂▃▄▅▆▇█"


class _Line(NamedTuple):
    """One line of a figure: a quantity of a variant, over seeds."""

    label: str
    color: str
    dash: str
    curves: list[Curve]  # one a seed


def write_figures(runs: Runs, directory: Path) -> list[Path]:
    """Draws accuracy, coefficient, correlation and agreement as PNGs.

    Args:
        runs: rows by variant and seed; a single run is one variant with one seed.
        directory: made if it does not exist.

    Returns:
        The files written. A figure that no variant has data for is left out.
    """
    figures = {
        "accuracy": _accuracy_figure(runs),
        "coefficient": _coefficient_figure(runs),
        "correlation": _correlation_figure(runs),
        "agreement": _agreement_figure(runs),
    }
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(directory / f"{name}.png")
            figure.savefig(written[-1], dpi=160)
    return written


def _finite(points: Iterable[tuple[float, Any]]) -> Curve:
    return {float(x): float(y) for x, y in points if y is not None and math.isfinite(y)}


def _by_step(rows: Rows, name: str) -> Curve:
    return _finite((row["step"], row[name]) for row in rows if name in row)


def _rollouts(rows: Rows, name: str) -> Iterator[tuple[int, int, list[float]]]:
    """Number of updates before a rollout's, of the rollout's, and the values they logged."""
    for row in rows:
        logged = row.get("per_update", {})
        if name in logged:
            updates = len(logged.get(_COEFFICIENT.format(1), logged[name]))  # all log the first
            yield (row["step"] - 1) * updates, updates, logged[name]


def _by_update(rows: Rows, name: str) -> Curve:
    """Values of single updates, counted from 1.

    With `mtp.measure_every` a rollout has fewer values than updates and the row does not say whose
    they are: they are spread evenly, which is exact where it divides the updates of a rollout.
    """
    return _finite(
        (before + 1 + i * updates / len(values), value)
        for before, updates, values in _rollouts(rows, name)
        for i, value in enumerate(values)
    )


def _smoothed(rows: Rows, name: str) -> Curve:
    """Mean over each rollout's updates, then a running median over rollouts.

    The proxy's statistics start from 0 at every rollout and grow with each update, so a median of
    single updates would jump with the phase of its window; the mean has no phase left.
    """
    means: Curve = {}
    for before, updates, values in _rollouts(rows, name):
        finite = list(_finite(enumerate(values)).values())
        if finite:
            means[before + (updates + 1) / 2] = float(np.mean(finite))
    ys, half = list(means.values()), _WINDOW // 2
    return {x: float(np.median(ys[max(0, i - half) : i + half + 1])) for i, x in enumerate(means)}


def _modules(seeds: Sequence[Rows], name: str) -> list[str]:
    """The metrics "..._1" to "..._K" of "..._{}" that rows hold; without {}, the metric itself."""
    held = {key for rows in seeds for row in rows for key in row}
    most = len(held) if "{}" in name else 1
    names = (name.replace("{}", str(k)) for k in range(1, most + 1))
    return list(itertools.takewhile(held.__contains__, names))


def _values(lines: Sequence[_Line], *, zeros: bool = True) -> np.ndarray:
    values = [y for line in lines for curve in line.curves for y in curve.values()]
    return np.array([y for y in values if zeros or y != 0], float)


def _lines(runs: Runs, name: str, curve: Callable[[Rows, str], Curve] = _by_step) -> list[_Line]:
    """One line per variant and module; none without a value."""
    lines: list[_Line] = []
    for variant, seeds in runs.items():
        color = _COLORS.get(variant, "#000000")
        for k, metric in enumerate(_modules(seeds, name)):
            curves = [curve(rows, metric) for rows in seeds]
            if any(curves):
                lines.append(_Line(variant, color, _DASHES[k % len(_DASHES)], curves))
    return lines


def _page(
    title: str, note: str, lines: Sequence[_Line], shape: tuple[int, int]
) -> tuple[Figure, list[list[Axes]]]:
    """Title and legend over a grid of empty panels, the note below.

    One legend, outside: panels share it, and it cannot collide with a line wherever lines end.
    """
    figure = Figure(figsize=(9, 1.1 + 2.7 * shape[0]), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    keys: dict[str, Line2D] = {}
    for line in lines:
        keys.setdefault(line.label, Line2D([], [], color=line.color, ls=line.dash, lw=2))
    if len({(line.label, line.dash) for line in lines}) > len(keys):
        for k, dash in enumerate(_DASHES, start=1):
            if any(line.dash == dash for line in lines):
                keys[f"module {k}"] = Line2D([], [], color=_INK, ls=dash, lw=1.2)
    figure.legend(
        list(keys.values()),
        list(keys),
        title=title,  # a suptitle would be laid over an outside legend
        title_fontproperties={"size": 12, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=7,
        frameon=False,
        fontsize=9,
    )
    note = textwrap.fill(note, 150, break_on_hyphens=False)
    figure.supxlabel(note, x=0.012, ha="left", size=8, color="#666666", linespacing=1.3)
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_LIGHT)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", labelsize=8, color=_LIGHT, labelcolor=_INK)
        axis.margins(x=0.015)
    return figure, axes.tolist()


def _draw(axis: Axes, lines: Sequence[_Line], scale: float, x: str, y: str, title: str) -> None:
    """Mean over the seeds that have a value, the range of their values, and what it all is."""
    for line in lines:
        xs = sorted({x for curve in line.curves for x in curve})
        values = [[scale * curve[x] for curve in line.curves if x in curve] for x in xs]
        mean, width = [float(np.mean(y)) for y in values], 1.0 if line.color == _LIGHT else 1.7
        axis.plot(xs, mean, color=line.color, ls=line.dash, lw=width, zorder=1 + width)
        if len(line.curves) > 1:
            low, high = [min(y) for y in values], [max(y) for y in values]
            axis.fill_between(xs, low, high, facecolor=line.color, alpha=0.14, lw=0)
    axis.set_xlabel(x, size=9, color=_INK)
    axis.set_ylabel(y, size=9, color=_INK)
    axis.set_title(title, loc="left", size=9.5, color=_INK)


def _share_figure(title: str, note: str, panels: dict[str, list[_Line]], y: str) -> Figure | None:
    """Panels of shares in percent over steps; None if there is no line to draw."""
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        return None
    listed = [line for lines in panels.values() for line in lines]
    figure, (axes,) = _page(title, note, listed, (1, len(panels)))
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        _draw(axis, lines, 100.0, "RL step (one rollout each)", f"{y} (%)", name)
        for drawn in axis.lines:  # evaluations far apart are seen as points
            drawn.set(marker="o" if np.size(drawn.get_xdata()) < 40 else "", markersize=3)
    return figure


def _spread(runs: Runs) -> str:
    """The part of a note that explains lines and bands."""
    counts = sorted({len(seeds) for seeds in runs.values()})
    if counts == [1]:
        return "One seed. "
    return f"Lines: mean over {'–'.join(map(str, counts))} seeds; bands: lowest to highest seed. "


def _accuracy_figure(runs: Runs) -> Figure | None:
    exact, sampled = "Exact objective, π(right answer | prompt)", "Accuracy of sampled answers"
    panels = {exact: _lines(runs, _OBJECTIVE), sampled: _lines(runs, _ACCURACY)}
    title, note = "How well the policy solves held-out problems during training", _spread(runs)
    if [len(seeds) for seeds in runs.values()] == [1]:
        title, note = (
            f"{next(iter(runs))}: how often the policy is right during training",
            "Held-out problems; in grey the training ones.",
        )
        # The score, as the share of right answers, and not the reward, which has penalties in it.
        training = _lines(runs, "critic/score/mean")
        drawn = [line._replace(label=exact) for line in panels[exact]]
        drawn += [line._replace(label=sampled, dash="--") for line in panels[sampled]]
        drawn += [line._replace(label="Training rollouts", color=_LIGHT) for line in training]
        panels = {"": drawn}
    return _share_figure(title, note, panels, "right answers")


def _agreement_figure(runs: Runs) -> Figure | None:
    title = "How often a module's most probable token is the main head's"
    note = _spread(runs) + "Agreement is the share of tokens a greedy drafter would get accepted."
    return _share_figure(title, note, {"": _lines(runs, _AGREEMENT)}, "top-1 agreement")


def _coefficient_figure(runs: Runs) -> Figure | None:
    calibrated = {name: seeds for name, seeds in runs.items() if name.startswith("occ")}
    lines = _lines(calibrated, _COEFFICIENT, _by_update)
    if not lines:
        return None
    # c / v² can be anything once gradients vanish; one such update must not hide the others.
    values = _values(lines)
    low, high = np.percentile(values, [1, 99])
    cut = np.ptp(values) > 4 * (high - low) > 0
    note = _spread(calibrated) + ("Values beyond the axis are cut off. " if cut else "")
    if len(calibrated) < len(runs):
        note += "Not drawn: coefficients that are fixed."
    title = "λ, the weight of the auxiliary loss, as calibrated at every update"
    figure, ((axis,),) = _page(title, note, lines, (1, 1))
    axis.axhline(0, color=_INK, lw=0.8)
    _draw(axis, lines, 1.0, "update", "λ", "")
    if cut:
        axis.set_ylim(min(low, 0) - 0.5 * (high - low), max(high, 0) + 0.5 * (high - low))
    return figure


def _correlation_figure(runs: Runs) -> Figure | None:
    """c and v², in a column of their own for each unit they are measured in."""
    units = {
        ("log-probabilities", "nats², summed over tokens"): ("occ/log_prob",),
        ("gradients", "squared norm"): ("occ/exact", "occ/cross_batch"),
    }
    columns = {
        unit: measured
        for unit, members in units.items()
        if _lines(measured := {n: runs[n] for n in runs if n in members}, _CORRELATION, _smoothed)
    }
    if not columns:
        return None
    note = (
        f"{_spread(runs)}Each seed is smoothed: mean of a rollout's updates, then running median "
        f"over {_WINDOW} rollouts. Dots: single updates, where within the axes."
    )
    if "occ/log_prob" in runs:
        note += " Log-probabilities measure 0 in the first update after a rollout."
    listed = [line for measured in columns.values() for line in _lines(measured, _CORRELATION)]
    title = "What λ is made of: correlation c and penalty v²"
    figure, axes = _page(title, note, listed, (2, len(columns)) if len(columns) > 1 else (1, 2))
    panels = [axis for row in axes for axis in row]
    for i, (symbol, name) in enumerate((("c", _CORRELATION), ("v²", "occ/penalty_{}_{}"))):
        for j, ((source, unit), measured) in enumerate(columns.items()):
            axis = panels[i * len(columns) + j]
            for line in _lines(measured, name, _by_update):
                for curve in line.curves:
                    alpha = min(0.4, 150 / (len(line.curves) * max(1, len(curve))))
                    axis.scatter([*curve], [*curve.values()], 4, line.color, alpha=alpha, lw=0)
            lines = _lines(measured, name, _smoothed)
            _draw(axis, lines, 1.0, "update", f"{symbol} ({unit})", f"{symbol} from {source}")
            _scale(axis, lines, signed=name == _CORRELATION)
    return figure


def _scale(axis: Axes, lines: Sequence[_Line], *, signed: bool) -> None:
    """Limits by the smoothed values, as single updates reach from 0 to far up; decades if many."""
    values = _values(lines)
    medians = [
        float(np.median(x)) for line in lines if len(x := np.abs(_values([line], zeros=False)))
    ]
    if not medians:
        return
    largest, typical = np.abs(values).max(), min(medians)
    if not signed:
        axis.set_yscale("log")
        smallest = np.abs(_values(lines, zeros=False)).min()
        axis.set_ylim(max(smallest / 3, largest / _MOST_DECADES), largest * 3)
        return
    axis.axhline(0, color=_INK, lw=0.8)
    if largest > _SYMLOG_ABOVE * typical:
        axis.set_yscale("symlog", linthresh=10.0 ** round(math.log10(typical)))
        axis.set_ylabel(f"{axis.get_ylabel()}, symlog")
    axis.set_ylim(min(values.min(), 0) - 0.3 * largest, max(values.max(), 0) + 0.3 * largest)


def comparison(runs: Runs) -> list[dict[str, Any]]:
    """Final figures of every variant, with 95% t-intervals over seeds.

    Half-width = t(0.975, n - 1) * std / sqrt(n). Differences to "detach" are taken seed by seed,
    which removes what a seed's prompts have in common, and have an interval of their own.

    Args:
        runs: rows by variant and seed; seed i of every variant is paired with seed i of "detach".

    Returns:
        A JSON-ready record per variant: "variant"; "seeds", their number; for "objective" and
        "accuracy" (shares, of the last row evaluated): the mean, "..._half_width",
        "..._difference" and "..._difference_half_width"; "agreement", a share per module;
        "seconds_per_step", median over steps after the first, then over seeds. None where there is
        nothing: no exact objective, one seed only, no "detach", a number that is not finite.
    """
    last = {
        name: [([{}] + [row for row in rows if _ACCURACY in row])[-1] for rows in seeds]
        for name, seeds in runs.items()
    }
    records: list[dict[str, Any]] = []
    for name, rows in last.items():
        record: dict[str, Any] = {"variant": name, "seeds": len(rows)}
        pairs = list(zip(rows, last.get("detach", []), strict=False)) if name != "detach" else []
        for key, metric in (("objective", _OBJECTIVE), ("accuracy", _ACCURACY)):
            mean, half = _interval([_number(row, metric) for row in rows])
            record |= {key: mean, f"{key}_half_width": half}
            mean, half = _interval([_number(a, metric) - _number(b, metric) for a, b in pairs])
            record |= {f"{key}_difference": mean, f"{key}_difference_half_width": half}
        metrics = _modules([rows], _AGREEMENT)
        record["agreement"] = [_interval([_number(row, m) for row in rows])[0] for m in metrics]
        seconds = [value for rows in runs[name] if (value := _seconds(rows)) is not None]
        record["seconds_per_step"] = float(np.median(seconds)) if seconds else None
        records.append(record)
    return records


def comparison_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of `comparison` as a Markdown table that also lines up on a terminal.

    Shares in percent, differences in percentage points, seconds. Columns that no variant has a
    figure for are left out.
    """
    cells = [["variant", "exact objective, %", "to detach", "sampled accuracy, %", "to detach"]]
    cells[0] += ["agreement, %", "s/step", "seeds"]
    for record in records:
        row = [record["variant"]]
        for key in ("objective", "accuracy"):
            row.append(_percent(record[key], record[f"{key}_half_width"]))
            difference = record[f"{key}_difference"], record[f"{key}_difference_half_width"]
            row.append(_percent(*difference, sign="+"))
        row.append(" / ".join(map(_percent, record["agreement"])) or "–")
        seconds = record["seconds_per_step"]
        cells.append([*row, "–" if seconds is None else f"{seconds:.2f}", str(record["seeds"])])
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"–"}]
    table = markdown_table(list(zip(*columns, strict=True)))
    if "±" not in table:
        return table
    return (
        f"{table}\n\nMean ± half of its 95% t-interval over seeds; differences are paired by seed, "
        "in percentage points."
    )


def run_report(rows: Rows, regime: str) -> str:
    """Returns the closing lines of a single run.

    Args:
        rows: the run's metrics.jsonl.
        regime: the variant's name, such as "detach" or "occ/log_prob".

    Returns:
        Steps and seconds a step; accuracy, exact objective and agreement, before → after, in
        percent; λ per module with a sparkline over updates. Lines without figures are left out.
    """
    seconds = _seconds(rows)
    lines = [f"{regime}, {rows[-1]['step'] if rows else 0} steps"]
    lines[0] += "" if seconds is None else f", {seconds:.2f} s a step"
    shares = {"sampled accuracy": _ACCURACY, "exact objective": _OBJECTIVE}
    agreements = enumerate(_modules([rows], _AGREEMENT), start=1)
    shares |= {f"agreement {k}": metric for k, metric in agreements}
    for label, metric in shares.items():
        values = [row[metric] for row in rows if metric in row]
        if values:
            before, after = _percent(values[0]), _percent(values[-1])
            lines.append(f"  {label:16}  {before:>5} → {after:>5} %")
    for k, metric in enumerate(_modules([rows], _COEFFICIENT), start=1):
        values = list(_by_update(rows, metric).values())
        if values:
            mean = float(np.mean(values))
            figures = f"first {values[0]:.3f}, last {values[-1]:.3f}, mean {mean:.3f}"
            lines.append(f"  {f'λ {k}':16}  {figures}")
            lines.append(f"  {_sparkline(values)}  {min(values):.3f} to {max(values):.3f}")
    return "\n".join(lines)


def _number(row: Row, metric: str) -> float:
    return float(row.get(metric, math.nan))


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and half of the 95% t-interval; None for what the values do not give."""
    count = len(values)
    if count == 0 or not np.all(np.isfinite(values)):
        return None, None
    if count == 1:
        return float(values[0]), None
    half = stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count)
    return float(np.mean(values)), float(half)


def _seconds(rows: Rows) -> float | None:
    """Median seconds a step; the first step compiles, so it is no measure of the others."""
    seconds = [row["timing_s/step"] for row in rows if row["step"] > 1 and "timing_s/step" in row]
    return float(np.median(seconds)) if seconds else None


def _percent(mean: float | None, half_width: float | None = None, *, sign: str = "") -> str:
    if mean is None or not math.isfinite(mean):
        return "–"
    text = f"{round(100 * mean, 1) + 0.0:{sign}.1f}"  # + 0.0 turns -0.0 into 0.0
    return text if half_width is None else f"{text} ± {100 * half_width:.1f}"


def _sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values as one line of bars between their lowest and highest; equal values are equal bars."""
    parts = np.array_split(values, min(width, len(values)))
    low, span, top = min(values), max(values) - min(values), len(_SPARKS) - 1
    heights = [(float(part.mean()) - low) / span * top if span else 3 for part in parts]
    return "".join(_SPARKS[round(height)] for height in heights)
