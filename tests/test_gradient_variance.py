"""The benchmark of the estimators' noise: a tiny run, whose exact numbers are those that are stored."""

import csv
from pathlib import Path

import pytest

from benchmarks import gradient_variance


def read(folder):
    lines = (folder / "results" / "gradient_variance.csv").read_text().splitlines()
    return {tuple(row[:4]): [*map(float, row[4:])] for row in csv.reader(lines[2:])}


def test_a_tiny_run_writes_the_figure_and_the_stored_exact_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = dict(training_steps=1000, episodes=64, drifts=(1e-3, 1e-2))
    gradient_variance.main(gradient_variance.Args(**sizes, out=tmp_path))
    tiny, stored = read(tmp_path), read(Path(gradient_variance.__file__).parent)
    assert tiny.keys() == {key for key in stored if float(key[2]) in (0, 1e-3, 1e-2)}
    for key in tiny:
        assert key[0] == "cartpole" or tiny[key] == pytest.approx(stored[key], rel=1e-5, abs=1e-11), key
    assert (tmp_path / "figures" / "gradient_variance.svg").stat().st_size > 10_000
