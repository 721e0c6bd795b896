"""The benchmark of the estimators' noise: a tiny run, and what the stored numbers must say."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gradient_variance

SCRIPT = Path(gradient_variance.__file__)
STORED = SCRIPT.parent / "results" / "gradient_variance.csv"


def read(path):
    """{(setting, estimator, drift, quantity): (value, standard error)}, and the comment above it"""
    with open(path) as file:
        comment, rows = next(file), list(csv.reader(file))
    assert rows.pop(0) == [*gradient_variance.COLUMNS]
    return {(a, b, float(c), d): (float(e), float(f)) for a, b, c, d, e, f in rows}, comment


def values(setting, quantity, drift=0.0):
    """{estimator: value} of the stored table"""
    table, _ = read(STORED)
    return {
        key[1]: value
        for key, (value, _) in table.items()
        if key[::2] == (setting, drift) and key[3] == quantity
    }


def test_a_tiny_run_writes_the_table_and_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, SCRIPT, "--out", tmp_path, "--episodes", "64", "--training-steps", "1000"]
    run = subprocess.run([*command, "--drifts", "1e-3", "1e-2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tiny, comment = read(tmp_path / "results" / "gradient_variance.csv")
    stored, _ = read(STORED)
    assert set(tiny) == {key for key in stored if key[2] in (0, 1e-3, 1e-2)}
    assert comment.startswith("# python benchmarks/gradient_variance.py --out ") and "torch" in comment
    for suffix in (".svg", ".png"):
        assert (tmp_path / "figures" / f"gradient_variance{suffix}").stat().st_size > 10_000


def test_the_stored_exact_numbers_are_what_the_library_computes():
    stored, _ = read(STORED)
    exact = {}
    for estimator, drift, quantities in gradient_variance.tabular(gradient_variance.Args()):
        exact |= {("tabular", estimator, drift, name): x for name, x in quantities.items()}
    assert set(exact) == {key for key in stored if key[0] == "tabular"}
    for key, (value, error) in exact.items():
        assert stored[key] == (pytest.approx(float(value), rel=1e-5, abs=1e-11), error), key


@pytest.mark.parametrize("setting", ["cartpole", "tabular"])
def test_what_the_figure_says_of_baselines(setting):
    variance = values(setting, "relative_variance")
    assert variance["reward-to-go"] < 0.5
    assert variance["optimal"] < 0.25
    assert max(variance["time"], variance["value"]) < 0.12


def test_what_the_figure_says_of_importance_weights():
    order = ["trajectory", "causal", "no-future", "per-step"]
    for setting in ("cartpole", "tabular"):
        for drift in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
            error = values(setting, "relative_error", drift)
            assert sorted(order, key=error.get, reverse=True) == order
    for drift in gradient_variance.Args().drifts:
        bias = values("tabular", "squared_bias", drift)
        assert bias["trajectory"] == bias["causal"] == 0 < bias["no-future"] < bias["per-step"]
    for product in order[:3]:  # exact: faster than any power of the drift
        error = [values("tabular", "relative_error", drift)[product] for drift in (1e-3, 1e-2, 1e-1)]
        assert error[2] / error[1] > error[1] / error[0] > 1
        near, far = (read(STORED)[0]["cartpole", product, drift, "relative_error"] for drift in (1e-4, 1e-2))
        assert far[0] - 2 * far[1] > near[0] + 2 * near[1]  # sampled: by more than the bars of the figure


def test_the_policy_is_half_way_and_the_drifts_leave_ever_fewer_effective_episodes():
    assert values("cartpole", "return")[""] == pytest.approx(250, abs=25)
    shares = [values("cartpole", "effective_share", drift)[""] for drift in gradient_variance.Args().drifts]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.9 and shares[-1] < 0.01
