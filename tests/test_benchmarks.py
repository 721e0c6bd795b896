"""benchmarks/: what is stored, what is trained again, and tables that say what is stored."""

import csv
import functools
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plot, run, speed

ROOT = Path(__file__).parent.parent
RESULTS, TABLE = ROOT / "benchmarks" / "results", run.read_commands(run.Args().commands)
VARIANTS = run.read_commands(ROOT / "benchmarks" / "variants.ini")


def record(seed, **changes):
    """A run of ppo.py that is stored with the flags and the budget of commands.ini."""
    stored = {"script": "ppo", "env_id": "CartPole-v1", "seed": seed, "total_timesteps": 200_000}
    return stored | {"flags": "", "error": "", **changes}


def test_the_last_line_of_a_key_counts_and_a_torn_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "new" / "matrix.jsonl"
    for seed, score in [(2, 5.0), (1, 6.0), (2, 7.0)]:
        run.append(path, record(seed, final_return=score))
    whole = path.read_text()
    path.write_text(whole + whole[:40])  # of a process that was killed while it wrote
    assert [x["final_return"] for x in run.read_runs(path).values()] == [7.0, 6.0]
    run.append(path, record(1, variant="a", final_return=8.0))
    assert path.read_text().startswith(whole + whole[:40] + "\n{")
    run.tidy(path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["seed"], x["final_return"]) for x in kept] == [(1, 6.0), (2, 7.0), (1, 8.0)]


def test_what_is_stored_with_the_same_flags_and_budget_is_skipped(tmp_path, capsys):
    def to_do(seeds, **changes):
        values = {"scripts": ("ppo",), "env_ids": ("CartPole-v1",), "results": tmp_path, "dry_run": True}
        run.main(run.Args(seeds=seeds, **values | changes))
        return [int(seed) for seed in re.findall(r"--seed (\d+)", capsys.readouterr().out)]

    for seed, changes in enumerate([{}, {"flags": "--gamma 1"}, {"total_timesteps": 7}, {"error": "broke"}]):
        run.append(tmp_path / "matrix.jsonl", record(seed, **changes))
    assert to_do((0, 1, 2, 3, 4)) == [1, 2, 3, 4]
    run.append(tmp_path / "ablations.jsonl", record(0, variant="g", flags="--gamma 1"))
    assert to_do((0, 1), variant="g", flags="--gamma 1") == [1]
    assert to_do((0,), variant="g", flags="--gamma 0.5") == to_do((0,), variant="h") == [0]
    assert to_do((0,), scripts=("variants/ppo_kl_penalty",)) == [0]
    with pytest.raises(SystemExit):  # before anything is trained
        to_do((0,), variant="g", flags="--no-such-flag")


@pytest.mark.skipif(not shutil.which("ps"), reason="looks for processes")
def test_runs_are_stored_when_they_end_and_ctrl_c_ends_the_others(tmp_path):
    flags = "ppo = --num-envs 8\nvpg_gae = --env-id Nowhere-v0\na3c_nstep = --total-timesteps 1000000000"
    (tmp_path / "commands.ini").write_text(f"[CartPole-v1]\ntotal_timesteps = 2048\n{flags}")
    command = f"--commands {tmp_path}/commands.ini --results {tmp_path} --seeds 7 --jobs 3".split()
    command = [sys.executable, "benchmarks/run.py", *command, "--scripts", "a3c_nstep", "ppo", "vpg_gae"]
    environment, path = {**os.environ, "TMPDIR": str(tmp_path)}, tmp_path / "matrix.jsonl"
    ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # may be off
    process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=ctrl_c)

    def processes():  # told by their environment
        every = subprocess.run(["ps", "axeww"], capture_output=True, text=True).stdout
        return every.count(f"TMPDIR={tmp_path}")

    deadline = time.time() + 60
    while len(run.read_runs(path)) < 2 or processes() < 4:  # a3c_nstep.py has two workers
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    time.sleep(1)
    assert processes() == 0
    assert [*tmp_path.glob("tmp*")] == []
    ppo, failed = (run.read_runs(path)["CartPole-v1", script, "", 7] for script in ("ppo", "vpg_gae"))
    assert failed["error"].startswith("exit code 1: ") and "Nowhere" in failed["error"]
    assert ppo == ppo | record(7, flags="--num-envs 8", total_timesteps=2048)
    assert len(ppo["curve"]["seconds"]) <= 100 and ppo["curve"]["step"][-1] >= 2048
    assert ppo["curve"]["episodic_return"][-1] == pytest.approx(ppo["final_return"], rel=1e-3)


def test_every_command_is_understood_and_has_a_published_score():
    with open(ROOT / "benchmarks" / "published.csv") as file:
        published = {(row["environment"], row["algorithm"]) for row in csv.DictReader(file)}
    assert published <= {*itertools.product(TABLE, ["random", *run.SCRIPTS])}
    for env_id, entries in TABLE.items():
        assert set(entries) <= {"like", "total_timesteps", "threshold", *run.SCRIPTS}
        assert (env_id, "random") in published and float(entries["threshold"])
        assert all(run.Job(script, env_id, 1, entries, run.Args()) for script in run.SCRIPTS)


@pytest.mark.parametrize("name", ["matrix", "ablations"])
def test_every_stored_run_is_whole_and_in_its_place(name):
    path = RESULTS / f"{name}.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.stat().st_size < 2e6 and [*map(run.key, runs)] == sorted({*map(run.key, runs)})
    for x in runs:
        assert x["env_id"] in TABLE | VARIANTS and (ROOT / f"{x['script']}.py").exists()
        assert x["error"] or np.isfinite([x["final_return"], x["episodes"], x["seconds"]]).all()
        assert (name == "matrix") == ("variant" not in x) == ("curve" in x)
        if "curve" in x and not x["error"]:
            assert len(x["curve"]["step"]) <= 100 and x["curve"]["step"][-1] >= 0.999 * x["total_timesteps"]
            assert x["curve"]["episodic_return"][-1] == pytest.approx(x["final_return"], rel=1e-3, abs=1e-3)


def test_every_number_of_the_readme_is_what_the_stored_runs_give():
    scores = {}
    for x in run.read_runs(RESULTS / "matrix.jsonl").values():
        scores.setdefault((x["env_id"], x["script"]), []).append(x["final_return"])
    section = re.search("<!-- results -->(.*?)<!-- /results -->", (ROOT / "README.md").read_text(), re.S)[1]
    head, _, *rows = [line.strip("|").split("|") for line in section.split("\n") if line]
    cells = {
        (row[0].strip(), name.strip(" `")): x.strip() for row in rows for name, x in zip(head[1:], row[1:])
    }
    for key, x in scores.items():
        digits = 1 if abs(statistics.mean(x)) < 10 else 0
        numbers = [statistics.mean(x), *([statistics.stdev(x)] if len(x) > 1 else [])]
        assert cells.pop(key) == "±".join(f"{number:.{digits}f}" for number in numbers)
    assert not any(cells.values())
    groups, ablations = (
        plot.load(RESULTS / f"{name}.jsonl", TABLE | VARIANTS) for name in ("matrix", "ablations")
    )
    assert plot.steps_table(groups, TABLE) in (ROOT / "benchmarks" / "README.md").read_text()
    assert plot.ablation_table(ablations) in (RESULTS / "ablations.md").read_text()


def test_statistics():
    assert plot.iqm(np.array([100, 0, 1, 2, 3, 4, 5, -100])) == 2.5 and plot.iqm(np.array([9, 1, 2])) == 4
    strata = [np.array([0.0, 1.0, 3.0, 7.0]), np.array([100.0, 130.0, 150.0])]
    every = [[np.mean(draw) for draw in itertools.product(x, repeat=len(x))] for x in strata]
    exact = np.percentile([sum(draw) for draw in itertools.product(*every)], [2.5, 97.5])
    assert plot.bootstrap(strata, lambda x: sum(map(np.mean, x)), 20_000) == pytest.approx(exact, abs=0.7)
    # environments have the same weight, whatever the number of their runs
    shares = plot.profile([np.array([0.0, 0.5, 1.0, 1.0]), np.array([0.5])], np.array([0.5, 0.6]))
    assert [*shares] == [0.875, 0.25]
    early = {"curve": {"step": [500, 1000, 1500, 2000], "episodic_return": [0, 1, 5, 9]}}
    grid, returns = plot.curves(
        [early, {"curve": {"step": [1000, 3000], "episodic_return": [2, 4]}}], points=3
    )
    assert [*grid] == [1000, 1500, 2000] and returns.tolist() == [[1, 5, 9], [2, 2.5, 3]]
    assert [plot.steps_to(x, early) for x in (5, 10)] == [1500, float("inf")]


def test_figures_and_sections_are_made_from_the_stored_runs(tmp_path):
    pytest.importorskip("matplotlib")
    for x in run.read_runs(RESULTS / "matrix.jsonl").values():
        if x["env_id"] == "CartPole-v1" and x["seed"] < 3:
            run.append(tmp_path / "matrix.jsonl", x)
    (tmp_path / "README.md").write_text("before <!-- results -->old<!-- /results --> after")
    plot.main(plot.Args(tmp_path, tmp_path / "figures", tmp_path / "README.md", tmp_path / "none"))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before <!-- results -->\n|  | `")
    assert text.endswith(" |\n<!-- /results --> after") and "old" not in text
    assert {x.name for x in tmp_path.glob("figures/*")} == {"learning_curves.svg", "profile.svg"}


CLEANRL = """
import sys
import gymnasium as gym

class OneStep(gym.Env):  # the return of episode k is k
    action_space = observation_space = gym.spaces.Discrete(2)
    episode = 0
    def reset(self, **kwargs):
        self.episode += 1
        return 0, {}
    def step(self, action):
        return 0, float(self.episode), True, False, {}

env = gym.wrappers.RecordEpisodeStatistics(OneStep())
for _ in range(98 + int(sys.argv[sys.argv.index("--seed") + 1])):
    env.reset()
    env.step(0)
print("SPS: 5")
print("SPS: 0.5")
"""


def compare(tmp_path, capsys, **changes):
    """The cells of the table of speed.py, row by row, with the script above as CleanRL's ppo.py."""
    (tmp_path / "cleanrl").mkdir()
    (tmp_path / "cleanrl" / "ppo.py").write_text(CLEANRL)
    speed.main(speed.Args(cleanrl=tmp_path, **changes))
    rows = capsys.readouterr().out.split("\n|")[3:]
    return [[cell.strip() for cell in row.strip("|\n").split("|")] for row in rows]


def test_solved_is_when_the_mean_of_100_whole_episodes_is_at_the_threshold(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "PEERS", {})
    # 50.5 is the mean of 1 to 100: seed 1 ends an episode before, and ours is there soon
    ours, cleanrl = compare(tmp_path, capsys, solve=True, threshold=50.5, repeats=2)
    assert ours[0] == "ppo.py" and ours[2] == ours[4] == "1.0"
    whole, training = (float(cell.split()[0]) for cell in (ours[1], ours[3]))
    assert training < whole < 100
    assert cleanrl[0] == "CleanRL's ppo.py" and cleanrl[2] == cleanrl[4] == "inf"
    assert re.fullmatch(r"inf \(\d+\.\d-inf\), 1 of 2 not solved", cleanrl[1])
    with pytest.raises(RuntimeError, match="does not record its episodes"):
        speed.measure(["-c", "pass"], "gymnasium.wrappers.RecordEpisodeStatistics", speed.Args(solve=True))


def test_steps_per_second_of_every_side(tmp_path, capsys):
    ours, cleanrl, *peers = compare(tmp_path, capsys, total_timesteps=500, repeats=1)
    assert ours[0].startswith("ppo.py --num-envs 4 --num-steps 128 ")
    assert cleanrl[:2] == ["CleanRL's ppo.py", "0.5 (0.5-0.5)"]
    steps = [float(row[1].split()[0].replace(",", "")) for row in (ours, *peers)]
    assert float(cleanrl[2]) == pytest.approx(2 * steps[0], rel=0.01) and min(steps) > 0.5
    assert [row[0] for row in peers] == ["stable_baselines3.PPO"] * bool(find_spec("stable_baselines3"))


def test_the_sides_of_a_comparison(tmp_path):
    def names(script, **changes):
        every = [*speed.sides(script, 3, speed.Args(cleanrl=tmp_path, **changes))]
        assert all(command[0] == "-c" or {"--seed", "3"} <= {*command} for _, command, _ in every)
        return [name for name, *_ in every if name not in ("stable_baselines3.PPO", "stable_baselines3.A2C")]

    for own in ({"defaults": True}, {"solve": True}):
        assert names("ppo", env_id="Pendulum-v1", **own)[1:] == ["CleanRL's ppo_continuous_action.py"]
        assert names("vpg_gae", **own) == ["vpg_gae.py"]
    assert names("npg", against=tmp_path) == [f"npg.py {speed.SIZES['npg']}", str(tmp_path / "npg.py")]
    assert names("ppo", against=tmp_path, solve=True) == ["ppo.py", str(tmp_path / "ppo.py")]
