"""Auto-PruMUX on tables with known truth."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fxsparse.autoprumux import AutoPruMUX, Point, Surface
from fxsparse.errors import OptionError

MEMBERS = (2, 5, 10)
SPARSITIES = (0.60, 0.70, 0.80, 0.90, 0.95)
FINE = tuple(round(0.60 + 0.05 * step, 2) for step in range(8))


def random_bilinear(generator: np.random.Generator) -> list[float]:
    return list(generator.normal(size=4))


def bilinear(k: list[float], n: float, s: float) -> float:
    return k[0] + k[1] * s + k[2] * n + k[3] * n * s


def test_exact_at_every_measured_point_of_any_set() -> None:
    generator = np.random.default_rng(1)
    for count in (1, 2, 3, 7, 20):
        values = {
            (int(generator.integers(1, 20)), float(generator.uniform(0, 0.99))): float(generator.normal())
            for _ in range(count)
        }
        surface = Surface(values)
        for point, measured in values.items():
            estimate = surface(*point)
            assert estimate.value == pytest.approx(measured, abs=1e-12) and estimate.measured


def test_bilinear_inside_each_cell_of_a_grid() -> None:
    generator = np.random.default_rng(2)
    values = {(n, s): float(generator.normal()) for n in MEMBERS for s in SPARSITIES}
    surface = Surface(values)
    for _ in range(200):
        n, s = generator.uniform(2, 10), generator.uniform(0.60, 0.95)
        n0, n1 = next(pair for pair in pairwise(MEMBERS) if pair[0] <= n <= pair[1])
        s0, s1 = next(pair for pair in pairwise(SPARSITIES) if pair[0] <= s <= pair[1])
        corners = [(a, b) for a in (n0, n1) for b in (s0, s1)]
        design = np.array([(1, b, a, a * b) for a, b in corners])
        k = np.linalg.solve(design, [values[corner] for corner in corners])
        estimate = surface(n, s)
        assert estimate.value == pytest.approx(bilinear(list(k), n, s), abs=1e-9)
        assert not estimate.extrapolated and set(estimate.basis) == set(corners)


def test_a_bilinear_truth_is_found_from_scattered_points_and_beyond_them() -> None:
    generator = np.random.default_rng(3)
    k = random_bilinear(generator)
    points: list[Point] = [(1, 0.0), (2, 0.3), (5, 0.7), (10, 0.2), (7, 0.9), (3, 0.6)]
    surface = Surface({point: bilinear(k, *point) for point in points})
    for n, s in ((1, 0.5), (20, 0.95), (4, 0.4), (2, 0.31)):
        estimate = surface(n, s)
        assert estimate.extrapolated and estimate.value == pytest.approx(bilinear(k, n, s), rel=1e-6, abs=1e-6)


def test_three_corners_extend_as_a_plane_and_two_points_as_a_line() -> None:
    surface = Surface({(1, 0.0): 90.0, (1, 0.6): 88.0, (2, 0.0): 87.0})
    assert surface(2, 0.6).value == pytest.approx(85.0) and surface(2, 0.6).extrapolated
    assert Surface({(1, 0.2): 1.0, (1, 0.4): 2.0})(1, 0.6).value == pytest.approx(3.0)
    assert Surface({(4, 0.2): 7.0})(1, 0.6).value == pytest.approx(7.0)


def test_a_missing_corner_makes_the_next_larger_box_the_cell() -> None:
    values = {(n, s): n + 10 * s for n in (1, 2, 5) for s in (0.0, 0.5, 0.8)}
    del values[2, 0.5]
    estimate = Surface(values)(2, 0.5)
    assert estimate.value == pytest.approx(7.0) and not estimate.extrapolated


def test_throughput_interpolates_powers_of_n_exactly() -> None:
    table = {(n, s): (80.0, 100.0 * n**0.9 * math.exp(s)) for n in MEMBERS for s in SPARSITIES}
    model = AutoPruMUX.fit(table)
    assert model.throughput(7, 0.85).value == pytest.approx(100.0 * 7**0.9 * math.exp(0.85))
    assert model.throughput(2, 0.6).measured and model.throughput(20, 0.6).extrapolated


def true_accuracy(members: int, sparsity: float, k: tuple[float, ...]) -> float:
    """Falls with N and with s, ever faster, and more where both are large: percent."""
    base, by_members, by_sparsity, both = k
    fall = by_members * math.log2(members) + by_sparsity * sparsity**4
    return base - fall - both * math.log2(members) * sparsity**2


def test_the_true_best_is_among_the_first_three() -> None:
    """The paper's grid and criterion; the surfaces are drawn, with noise of 0.3 points on every measurement."""
    generator = np.random.default_rng(0)
    hits = total = 0
    for _ in range(25):
        low, high = (80, 1, 3, 0.3), (93, 2.5, 9, 1.5)
        k = tuple(float(value) for value in generator.uniform(low, high))
        single = [(1, s) for s in (0.0, *SPARSITIES)] + [(n, 0.0) for n in MEMBERS]
        fine = [*((n, s) for n in MEMBERS for s in FINE), *single]
        rate = float(generator.uniform(0.6, 0.9))
        speeds = {(n, s): n**0.85 / (1 - s) ** rate for n, s in fine}
        measured = [*((n, s) for n in MEMBERS for s in SPARSITIES), *single]
        accuracies = {point: true_accuracy(*point, k) + float(generator.normal() * 0.3) for point in measured}
        model = AutoPruMUX.fit(accuracies, throughput=speeds, baseline=true_accuracy(1, 0.0, k))
        for budget in np.arange(0, 10.5, 0.5):
            able = [p for p in fine if true_accuracy(*p, k) >= true_accuracy(1, 0.0, k) - budget]
            best = max(able, key=lambda point: speeds[point])
            try:
                ranked = model.predict(loss_budget=float(budget), candidates=fine, top=3)
            except OptionError:  # at a budget of 0 noise may put even the plain model below itself
                ranked = []
            hits += best in [prediction.point for prediction in ranked]
            total += 1
    assert hits / total >= 0.8


def test_ranking_reasons_and_thresholds() -> None:
    model = AutoPruMUX.fit({(1, 0.0): (90.0, 100), (1, 0.6): (88.0, 200), (2, 0.0): (87.0, 190), (2, 0.6): (84.0, 370)})
    ranked = model.predict(loss_budget=3.0, top=10)
    speeds = [prediction.throughput.value for prediction in ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert all(prediction.accuracy.value >= 87.0 - 1e-9 for prediction in ranked)
    assert model.predict(threshold=87.0)[0].point == ranked[0].point
    assert "the largest throughput" in str(ranked[0]) and "reaches 87.00" in ranked[0].reason
    (beyond,) = model.predict(threshold=0.0, candidates=[(10, 0.9)])
    assert beyond.extrapolated and "extrapolated" in beyond.reason
    assert not any(prediction.extrapolated for prediction in ranked)
    with pytest.raises(OptionError, match=r"no candidate reaches the accuracy 95; the best, N=1, s=0"):
        model.predict(threshold=95.0)
    with pytest.raises(OptionError, match="one of them"):
        model.predict()
    without = AutoPruMUX.fit({(2, 0.0): (87.0, 190)})
    with pytest.raises(OptionError, match="N=1, s=0"):
        without.predict(loss_budget=1.0)


def test_leave_one_out() -> None:
    model = AutoPruMUX.fit({(n, s): (90 - n - 10 * s, 100.0 * n) for n in (1, 2, 5, 10) for s in (0.0, 0.5, 0.9)})
    left = model.leave_one_out()
    assert len(left["accuracy"]) == len(left["throughput"]) == 12
    for kind in ("accuracy", "throughput"):
        assert all(abs(item.error) <= 1e-6 * item.measured for item in left[kind])  # a plane and a power of N
    edges = {item.point for item in left["accuracy"] if item.predicted.extrapolated}
    assert edges == {(1, 0.0), (1, 0.9), (10, 0.0), (10, 0.9)}  # only corners lie between no others
    bumped = AutoPruMUX.fit({(n, s): (90.0 + (n, s).__eq__((2, 0.5)), 1.0) for n in (1, 2, 5) for s in (0.0, 0.5, 0.9)})
    errors = {item.point: item.error for item in bumped.leave_one_out()["accuracy"]}
    assert errors[2, 0.5] == pytest.approx(-1.0)


def test_csv_and_dict_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("N, s, accuracy, throughput\n1,0,90,100\n2,0.6,84,370\n5,0.6,,700\n")
    model = AutoPruMUX.fit(path)
    same = AutoPruMUX.fit({(1, 0.0): (90, 100), (2, 0.6): {"accuracy": 84, "throughput": 370}, (5, 0.6): (None, 700)})
    assert model.accuracies == same.accuracies == {(1, 0.0): 90.0, (2, 0.6): 84.0}
    assert model.throughputs == same.throughputs and model.baseline == 90.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "no accuracy"),
        ({(1, 0.0): 90.0}, "no throughput"),
        ({(0, 0.0): (90.0, 1.0)}, "N is 0"),
        ({(1, 1.0): (90.0, 1.0)}, "s is 1"),
        ({(1, 0.0): (90.0, 0.0)}, "not positive"),
        ({(1, 0.0): (float("nan"), 1.0)}, "accuracy is nan"),
    ],
)
def test_tables_that_cannot_be_fitted(table: dict[Point, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AutoPruMUX.fit(table)


def test_a_csv_without_columns_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("members,accuracy\n1,90\n")
    with pytest.raises(OptionError, match="no column sparsity or s"):
        AutoPruMUX.fit(path)
    path.write_text("N,s,accuracy,throughput\n1,0,ninety,1\n")
    with pytest.raises(OptionError, match=r"line 2: accuracy is 'ninety'"):
        AutoPruMUX.fit(path)


def test_frontier_and_plot(tmp_path: Path) -> None:
    model = AutoPruMUX.fit({(1, 0.0): (90.0, 100), (1, 0.6): (88.0, 200), (2, 0.0): (87.0, 190), (2, 0.6): (84.0, 370)})
    frontier = model.frontier([(1, 0.0), (1, 0.6), (2, 0.0), (2, 0.6)])
    assert [item[0] for item in frontier] == [(1, 0.0), (1, 0.6), (2, 0.6)]  # (2, 0) is slower and worse than (1, 0.6)
    pytest.importorskip("matplotlib")
    model.plot(tmp_path / "plots" / "frontier.png")
    assert (tmp_path / "plots" / "frontier.png").stat().st_size > 1000


def paper_model() -> AutoPruMUX:
    points = [(n, s) for n in (1, *MEMBERS) for s in (0.0, *SPARSITIES)]
    return AutoPruMUX.fit({(n, s): (90 - n - 10 * s, n**0.9 * (1 + s)) for n, s in points})


def test_by_default_the_candidates_are_the_papers() -> None:
    candidates = paper_model().candidates()
    single = [(1, s) for s in (0.0, *SPARSITIES)] + [(n, 0.0) for n in MEMBERS]
    assert candidates == sorted([*((n, s) for n in MEMBERS for s in FINE), *single]) and len(candidates) == 33
    chosen = {prediction.point for prediction in paper_model().predict(threshold=0.0, top=100)}
    assert chosen == set(candidates)


def test_denser_grids_on_request() -> None:
    model = paper_model()
    fine = model.candidates(step=0.05)
    assert set(fine) == {(n, round(0.05 * k, 2)) for n in (1, *MEMBERS) for k in range(20)}
    finest = model.candidates(step=0.01)
    assert len(finest) == 4 * 96 and set(fine) < set(finest)  # 0 to 0.95
    between = model.candidates(members=(3, 4, 20))
    assert {n for n, _ in between} == {1, 2, 3, 4, 5, 10}, "N = 20 lies outside of what was measured"
    assert sum(n == 3 for n, _ in between) == 20
    best = model.predict(loss_budget=8.0, candidates=finest)[0]
    assert best.throughput.value >= model.predict(loss_budget=8.0)[0].throughput.value
    for step in (0.0, 1.0, -0.1, True):
        with pytest.raises(OptionError, match="spacing of sparsities"):
            model.candidates(step=step)
    with pytest.raises(OptionError, match="N is 0"):
        model.candidates(members=(0,))
