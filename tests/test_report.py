"""Figures, comparison and closing lines on hand-made rows whose results are worked out by hand."""

import json
import math
import re

import matplotlib.image
import numpy as np
import pytest

from occ_jax.training.figures import (
    _accuracy_figure,
    _by_update,
    _coefficient_figure,
    _smoothed,
    comparison,
    comparison_table,
    run_report,
    write_figures,
)

NAN, INF = float("nan"), float("inf")


def rows_of(objective, accuracy=None, agreement=(), seconds=(), updates=()):
    """A run: evaluated at steps 0, 1, ..., with `updates[i]` logged by step i + 1."""
    rows = []
    accuracy = objective if accuracy is None else accuracy
    for step, (exact, sampled) in enumerate(zip(objective, accuracy, strict=True)):
        row = {"step": step, "val/accuracy": sampled}
        if exact is not None:
            row["val/objective"] = exact
        row |= {f"val/agreement_{k}": value for k, value in enumerate(agreement, start=1)}
        if step > 0:
            row |= {"critic/score/mean": sampled, "per_update": {}}
            if len(seconds) > 0:
                row["timing_s/step"] = seconds[step - 1]
            if len(updates) > 0:
                row["per_update"] = updates[step - 1]
                row |= {name: float(np.mean(values)) for name, values in row["per_update"].items()}
        rows.append(row)
    return rows


def logged(coefficient, correlation=None, penalty=None):
    """What the updates of one rollout log for one module."""
    found = {"occ/coefficient_1": coefficient}
    if correlation is not None:
        found |= {"occ/correlation_1": correlation, "occ/penalty_1_1": penalty}
    return found


def calibrated_run(offset=0.0, steps=6):
    """λ decays, c changes sign, v² spans decades and is 0 in the first update of a rollout."""
    updates = [
        logged(
            [offset + 1 / s] * 4,
            [0.0, 3.0 - s, 2.0 * (3 - s) + offset, 4.0 - s],
            [0.0, 10.0**-s, 2 * 10.0**-s, 0.1],
        )
        for s in range(1, steps + 1)
    ]
    accuracy = [0.3 + offset + 0.05 * s for s in range(steps + 1)]
    return rows_of(accuracy, agreement=(0.9,), seconds=[9.0] + [1.0] * (steps - 1), updates=updates)


def names(paths):
    return [path.stem for path in paths]


# --- comparison ----------------------------------------------------------------------------------


def test_comparison_gives_mean_t_interval_and_paired_difference():
    runs = {
        "detach": [rows_of([0.0, 0.50]), rows_of([0.0, 0.60]), rows_of([0.0, 0.70])],
        "occ/exact": [rows_of([0.0, 0.62]), rows_of([0.0, 0.70]), rows_of([0.0, 0.84])],
    }
    detach, occ = comparison(runs)
    # t(0.975, 2) = 4.30265 (any table); values .5 .6 .7: s = .1, half-width 4.30265 * .1 / sqrt(3).
    assert detach["objective"] == pytest.approx(0.60)
    assert detach["objective_half_width"] == pytest.approx(0.248414, abs=1e-6)
    assert detach["objective_difference"] is None
    assert detach["objective_difference_half_width"] is None
    # Differences .12 .10 .14: mean .12, s = .02. Unpaired, the interval would be ten times as wide.
    assert occ["objective"] == pytest.approx(0.72)
    assert occ["objective_difference"] == pytest.approx(0.12)
    assert occ["objective_difference_half_width"] == pytest.approx(0.0496828, abs=1e-7)
    assert (occ["variant"], occ["seeds"]) == ("occ/exact", 3)


def test_comparison_of_two_seeds_uses_one_degree_of_freedom():
    (record,) = comparison({"ce": [rows_of([0.4]), rows_of([0.6])]})
    # t(0.975, 1) = 12.7062; s / sqrt(2) = .1.
    assert record["accuracy_half_width"] == pytest.approx(1.27062, abs=1e-5)


def test_comparison_reads_the_last_evaluated_row():
    rows = [*rows_of([0.1, 0.8], accuracy=[0.2, 0.7], agreement=(0.9, 0.5)), {"step": 2}]
    (record,) = comparison({"policy": [rows]})
    assert (record["objective"], record["accuracy"]) == (0.8, 0.7)
    assert record["agreement"] == [0.9, 0.5]


def test_single_seed_has_a_difference_but_no_intervals():
    _, record = comparison({"detach": [rows_of([0.5])], "policy": [rows_of([0.7])]})
    assert record["objective_difference"] == pytest.approx(0.2)
    assert record["objective_half_width"] is None
    assert record["objective_difference_half_width"] is None


def test_missing_objective_is_none_and_accuracy_stays():
    runs = {name: [rows_of([None], accuracy=[0.4])] for name in ("detach", "ce")}
    for record in comparison(runs):
        assert record["objective"] is None
        assert record["objective_difference"] is None
        assert record["accuracy"] == 0.4


def test_without_detach_there_is_no_difference():
    (record,) = comparison({"policy": [rows_of([0.7])]})
    assert record["accuracy_difference"] is None


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_seed_that_is_not_finite_leaves_no_mean(value):
    runs = {"detach": [rows_of([0.5])] * 2, "ce": [rows_of([0.5]), rows_of([value])]}
    _, record = comparison(runs)
    assert record["objective"] is None
    assert record["objective_difference"] is None
    json.dumps(record, allow_nan=False)


def test_a_run_without_evaluation_leaves_no_mean():
    (record,) = comparison({"ce": [rows_of([0.5]), [{"step": 1, "timing_s/step": 1.0}]]})
    assert record["accuracy"] is None
    assert record["seeds"] == 2


def test_seconds_leave_the_first_step_out():
    runs = [
        rows_of([0.0] * 5, seconds=[99.0, 1.0, 2.0, 9.0]),  # median 2
        rows_of([0.0] * 4, seconds=[99.0, 3.0, 5.0]),  # median 4
        rows_of([0.0] * 2, seconds=[99.0]),  # none
    ]
    (record,) = comparison({"detach": runs})
    assert record["seconds_per_step"] == 3.0
    assert comparison({"detach": runs[2:]})[0]["seconds_per_step"] is None


# --- table ---------------------------------------------------------------------------------------

TABLE = """\
| variant      | exact objective, % |   to detach | sampled accuracy, % |   to detach | \
agreement, % | s/step | seeds |
| ------------ | -----------------: | ----------: | ------------------: | ----------: | \
-----------: | -----: | ----: |
| detach       |        60.0 ± 24.8 |           – |         60.0 ± 24.8 |           – | \
        90.0 |   1.50 |     3 |
| occ/log_prob |        72.0 ± 27.7 | +12.0 ± 5.0 |         48.0 ± 24.8 | -12.0 ± 0.0 | \
        80.0 |   1.25 |     3 |

Mean ± half of its 95% t-interval over seeds; differences are paired by seed, in percentage points.\
"""


def test_table_is_this_text():
    def seed(exact, sampled, agreement, seconds):
        return rows_of(
            [0.0] * 2 + [exact],
            accuracy=[0.0] * 2 + [sampled],
            agreement=(agreement,),
            seconds=[60.0, seconds],
        )

    runs = {
        "detach": [seed(x, x, 0.9, 1.5) for x in (0.5, 0.6, 0.7)],
        "occ/log_prob": [
            seed(x, y, 0.8, 1.25) for x, y in ((0.62, 0.38), (0.70, 0.48), (0.84, 0.58))
        ],
    }
    assert comparison_table(comparison(runs)) == TABLE


def test_table_leaves_out_columns_without_figures():
    runs = {name: [rows_of([None], accuracy=[0.4])] for name in ("ce", "policy")}
    table = comparison_table(comparison(runs))
    assert table.splitlines()[0] == "| variant | sampled accuracy, % | seeds |"
    assert table.splitlines()[2] == "| ce      |                40.0 |     1 |"
    assert "±" not in table


def test_table_shows_every_module_and_no_negative_zero():
    runs = {
        "detach": [rows_of([0.5], agreement=(0.9, 0.725))],
        "ce": [rows_of([0.49999], agreement=(0.9, 0.725))],
    }
    table = comparison_table(comparison(runs))
    assert table.count("90.0 / 72.5") == 2
    assert "+0.0" in table and "-0.0" not in table


# --- closing lines -------------------------------------------------------------------------------


def test_run_report_tells_before_and_after():
    updates = [logged([0.0, 0.5]), logged([1.0, 0.25])]
    rows = rows_of(
        [0.1, 0.2, 0.625], accuracy=[0.05, 0.3, 0.6], seconds=[50.0, 1.5], updates=updates
    )
    rows = [row | {"val/agreement_1": 0.5 + 0.1 * row["step"]} for row in rows]
    assert run_report(rows, "occ/log_prob").splitlines() == [
        "occ/log_prob, 2 steps, 1.50 s a step",
        "  sampled accuracy    5.0 →  60.0 %",
        "  exact objective    10.0 →  62.5 %",
        "  agreement 1        50.0 →  70.0 %",
        "  λ 1               first 0.000, last 0.250, mean 0.438",
        "  ▁▅█▃  0.000 to 1.000",
    ]


def test_run_report_leaves_out_what_there_is_not():
    text = run_report(rows_of([None, None], accuracy=[0.1, 0.2]), "detach")
    assert text.splitlines() == ["detach, 1 steps", "  sampled accuracy   10.0 →  20.0 %"]
    assert run_report([], "detach") == "detach, 0 steps"


def sparkline_of(coefficients):
    """The sparkline of a run with these λ, four updates a rollout."""
    updates = [logged(coefficients[i : i + 4]) for i in range(0, len(coefficients), 4)]
    text = run_report(rows_of([0.5] * (len(updates) + 1), updates=updates), "occ/exact")
    return re.findall("[▁▂▃▄▅▆▇█]+", text)[0]


def test_sparkline_of_constant_values_is_level():
    assert sparkline_of([0.1] * 8) == "▄" * 8
    # Parts of 17 and of 18 values have means that differ in the last bit, which must not show.
    assert sparkline_of([0.1] * 1032) == "▄" * 60


def test_sparkline_averages_down_to_its_width():
    line = sparkline_of([i / 240 for i in range(240)])
    assert len(line) == 60
    assert list(line) == sorted(line)
    assert (line[0], line[-1]) == ("▁", "█")


def test_sparkline_ignores_values_that_are_not_finite():
    assert sparkline_of([0.0, NAN, INF, 1.0]) == "▁█"


# --- figures -------------------------------------------------------------------------------------

ALL = ["accuracy", "coefficient", "correlation", "agreement"]


def test_updates_are_placed_by_their_number():
    """Of four updates a rollout the second rollout measures two, the third none."""
    updates = [
        logged([0.0] * 4, [1.0, 2.0, NAN, 4.0], [1.0] * 4),
        logged([0.0] * 4, [5.0, 6.0], [1.0] * 2),
        logged([0.0] * 4),
    ]
    rows = rows_of([0.0] * 4, updates=updates)
    assert _by_update(rows, "occ/correlation_1") == {1: 1, 2: 2, 4: 4, 5: 5, 7: 6}
    assert list(_by_update(rows, "occ/coefficient_1")) == list(range(1, 13))


def test_smoothing_is_a_running_median_of_rollout_means():
    means = [1.0, 9.0, 2.0, 3.0, NAN, 8.0, 4.0]
    updates = [logged([0.0] * 2, [mean - 1, mean + 1], [1.0] * 2) for mean in means]
    smoothed = _smoothed(rows_of([0.0] * 8, updates=updates), "occ/correlation_1")
    # Windows of the finite 1 9 2 3 8 4: 1 9 2, 1 9 2 3, 1 9 2 3 8, 9 2 3 8 4, 2 3 8 4, 3 8 4;
    # two updates a rollout, so the middle of the first is 1.5.
    assert smoothed == {1.5: 2, 3.5: 2.5, 5.5: 3, 7.5: 4, 11.5: 3.5, 13.5: 4}


def test_lines_are_means_and_bands_the_range_over_seeds():
    seeds = [rows_of([0.1, 0.2]), rows_of([0.3, 0.5]), rows_of([0.2])]  # the last one ended early
    figure = _accuracy_figure({"policy": seeds})
    objective = figure.axes[0]
    np.testing.assert_allclose(objective.lines[0].get_xydata(), [[0, 20], [1, 35]])
    band = objective.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.x0, band.y0, band.x1, band.y1], [0, 10, 1, 50])
    assert "3 seeds" in figure.get_supxlabel()


def test_one_wild_coefficient_does_not_hide_the_others():
    rows = calibrated_run(steps=60)
    rows[5]["per_update"]["occ/coefficient_1"][2] = 1e9
    figure = _coefficient_figure({"occ/exact": [rows]})
    assert figure.axes[0].get_ylim()[1] < 3
    assert "cut off" in figure.get_supxlabel()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The figures of one run."""
    directory = tmp_path_factory.mktemp("run") / "new" / "figures"
    return write_figures({"occ/exact": [calibrated_run()]}, directory)


def test_single_calibrated_run_has_every_figure(single):
    assert names(single) == ALL
    for path in single:
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 1440 and height > 400


def test_comparison_has_every_figure(tmp_path):
    fixed = rows_of([0.1, 0.2], agreement=(0.9,), updates=[logged([1.0, 1.0])])
    runs = {
        "detach": [rows_of([0.1, 0.2], agreement=(0.9,))] * 2,
        "policy": [fixed, fixed],
        "occ/log_prob": [calibrated_run(), calibrated_run(0.1, steps=3)],  # one ended early
        "occ/cross_batch": [calibrated_run(), calibrated_run(0.2)],
    }
    assert names(write_figures(runs, tmp_path)) == ALL


def test_figures_without_data_are_not_written(tmp_path):
    detached = rows_of([None, None], accuracy=[0.1, 0.2])
    assert names(write_figures({"detach": [detached]}, tmp_path / "1")) == ["accuracy"]
    fixed = rows_of([0.1, 0.2], agreement=(0.9,), updates=[logged([1.0])])
    assert names(write_figures({"ce": [fixed]}, tmp_path / "2")) == ["accuracy", "agreement"]
    unmeasured = rows_of([0.1, 0.2], updates=[logged([0.5, 0.2])])
    written = names(write_figures({"occ/log_prob": [unmeasured]}, tmp_path / "3"))
    assert written == ["accuracy", "coefficient"]
    assert write_figures({"detach": [[]], "ce": [[{"step": 0}]]}, tmp_path / "4") == []
    assert list((tmp_path / "4").iterdir()) == []


def test_same_rows_give_the_same_bytes(single, tmp_path):
    again = write_figures({"occ/exact": [calibrated_run()]}, tmp_path)
    assert [path.read_bytes() for path in single] == [path.read_bytes() for path in again]


@pytest.mark.filterwarnings("error")
def test_values_that_are_not_finite_are_left_out(tmp_path):
    """A run that has them is drawn like the run that lacks them."""
    bad = {3: NAN, 4: INF, 5: -INF}
    clean, dirty = calibrated_run(), calibrated_run()
    for step, value in bad.items():
        for name in ("val/objective", "val/accuracy", "val/agreement_1", "critic/score/mean"):
            dirty[step][name] = value
            del clean[step][name]
        for name, values in dirty[step]["per_update"].items():
            dirty[step]["per_update"][name] = [*values[:3], value]
            dirty[step][name] = value
    for row in clean:  # accuracy and agreement alone, to compare with
        row["per_update"] = {}
    written = write_figures({"occ/exact": [dirty]}, tmp_path / "dirty")
    expected = {path.stem: path for path in write_figures({"occ/exact": [clean]}, tmp_path / "2")}
    assert names(written) == ALL
    for path in (written[0], written[-1]):
        assert path.read_bytes() == expected[path.stem].read_bytes()
    assert "nan" not in run_report(dirty, "occ/exact")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [NAN, 0.0])
def test_runs_of_nothing_else_do_not_crash(tmp_path, value):
    updates = [logged([value] * 2, [value] * 2, [value] * 2)] * 2
    rows = rows_of([value] * 3, agreement=(value,), updates=updates)
    written = names(write_figures({"occ/exact": [rows, rows]}, tmp_path))
    assert written == ([] if math.isnan(value) else ALL)
    run_report(rows, "occ/exact")


def test_two_modules_and_fewer_measurements_than_updates(tmp_path):
    """K = 2, statistics measured by every other update, and in the second rollout by none."""
    two = {}
    for k in (1, 2):
        two |= {f"occ/coefficient_{k}": [0.1 * k] * 4, f"occ/correlation_{k}": [1.0, -1.0]}
        two |= {f"occ/penalty_{k}_{j}": [2.0, 3.0] for j in range(k, 3)}
    updates = [two, {name: values for name, values in two.items() if "coefficient" in name}]
    rows = rows_of([0.1, 0.2, 0.3], agreement=(0.9, 0.7), updates=updates)
    assert names(write_figures({"occ/exact": [rows]}, tmp_path)) == ALL
    assert "λ 2" in run_report(rows, "occ/exact")
