"""How soon a script solves a task: steps, episodes and seconds until the mean of 100 episodes is high enough.

    python benchmarks/solve.py --script ppo
    python benchmarks/solve.py --script ppo --threshold -90 --flags "--env-id Acrobot-v1"

One process per seed, one after the other. Appends a row per seed to benchmarks/results/solve.csv and prints
the summary of all rows with the same flags.
"""

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import tyro

ROOT = Path(__file__).parent.parent
FIELDS = "script flags seed threshold solved_step solved_episodes solved_seconds final_return seconds".split()


@dataclass
class Args:
    script: str = "ppo"
    """name of the script, without .py"""
    flags: str = ""
    """its flags, all but --seed"""
    threshold: float = 475
    """mean return of the last 100 episodes that counts as solved"""
    seeds: tuple[int, ...] = tuple(range(1, 11))
    """seeds to run; those used for tuning were 101 to 110"""
    out: Path = ROOT / "benchmarks" / "results" / "solve.csv"
    """file of the rows"""


def run(script, flags, seed, threshold):
    """Train once; returns a row of FIELDS, with empty cells for what was not reached."""
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, ROOT / f"{script}.py", "--seed", str(seed), "--runs-dir", runs_dir]
        subprocess.run([*command, *flags.split()], check=True, stdout=subprocess.DEVNULL)
        (progress,) = Path(runs_dir).glob("*/progress.csv")
        rows = [row for row in csv.DictReader(progress.open()) if row["episodic_return"]]
    solved = (r for r in rows if int(r["episodes"]) >= 100 and float(r["episodic_return"]) >= threshold)
    solved = next(solved, {"step": "", "episodes": "", "seconds": ""})
    row = [script, flags, seed, threshold, solved["step"], solved["episodes"], solved["seconds"]]
    return dict(zip(FIELDS, [*row, rows[-1]["episodic_return"], rows[-1]["seconds"]]))


def summary(rows):
    """One line about the rows of one experiment."""
    steps, episodes, seconds = (
        median(float(row[f"solved_{name}"] or "inf") for row in rows)
        for name in ("step", "episodes", "seconds")
    )
    final = [float(row["final_return"]) for row in rows]
    return (
        f"{rows[0]['script']} {rows[0]['flags']}: solved {sum(bool(row['solved_step']) for row in rows)} of"
        f" {len(rows)}, median {steps:.0f} steps, {episodes:.0f} episodes, {seconds:.1f} s;"
        f" final return {mean(final):.1f}, worst {min(final):.1f};"
        f" whole run {median(float(row['seconds']) for row in rows):.1f} s"
    )


def main(args):
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    for seed in args.seeds:
        rows.append(run(args.script, args.flags, seed, args.threshold))
        with args.out.open("w", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    print(summary([row for row in rows if (row["script"], row["flags"]) == (args.script, args.flags)]))


if __name__ == "__main__":
    main(tyro.cli(Args))
