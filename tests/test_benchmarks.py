"""benchmarks/run.py and benchmarks/plot.py: the numbers of the tables, and runs that end in every way."""

import configparser
import csv
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plot, run

ROOT = Path(__file__).parent.parent
COMMANDS = """
[CartPole-v1]
total_timesteps = 1024
threshold = 50
ppo = --num-envs 8
vpg_gae = --gamma 2
a3c_nstep = --num-workers 2 --total-timesteps 1000000000

[Small]
total_timesteps = 2000

[Hopper-v5]
like = Small
threshold = 90
"""
PUBLISHED = """environment,algorithm,score,std,source
CartPole-v1,random,20,,measured
CartPole-v1,ppo,120,,"Somebody, 1 run"
CartPole-v1,vpg_gae,1000,5,Somebody else
Hopper-v5,random,0,,measured
Hopper-v5,trpo,50,,Somebody
Hopper-v5,ppo,50,,Somebody
"""


# ---------------------------------------------------------------------------- plot.py


def record(env_id, script, seed, returns, flags="", error=""):
    """A stored run of 2000 steps whose return is that of `returns` at equal distances."""
    steps = np.linspace(0, 2000, len(returns) + 1)[1:]
    curve = [[step, step / 10, value, step / 100] for step, value in zip(steps, returns)]
    return {
        "script": script,
        "env_id": env_id,
        "seed": seed,
        "total_timesteps": 2000,
        "flags": flags,
        "error": error,
        "final_return": None if error else returns[-1],
        "seconds": 20.0,
        "commit": "0123456789",
        "machine": "a machine, 2 cores",
        "versions": {"python": "3.10"},
        "arguments": {"seed": seed, "flags": flags},
        "curve_columns": ["step", "episodes", "episodic_return", "seconds"],
        "curve": curve,
    }


@pytest.fixture
def sample(tmp_path):
    """Arguments of plot.py for a few runs made up, and the runs."""
    random = np.random.default_rng(1)
    records = []
    for env_id, script, seeds in [
        ("CartPole-v1", "ppo", 5),
        ("CartPole-v1", "vpg_gae", 4),
        ("Hopper-v5", "ppo", 1),
        ("Hopper-v5", "vpg_gae", 3),
        ("Hopper-v5", "trpo", 3),
    ]:
        flags = "--num-envs 16" if script == "ppo" else ""
        for seed in range(1, seeds + 1):
            returns = np.cumsum(random.uniform(0, 4, size=100)).tolist()
            records.append(record(env_id, script, seed, returns, flags))
    records.append(record("Hopper-v5", "vpg_gae", 4, [1.0, 2.0], error="exit code 1: something broke"))
    for x in records:
        path = tmp_path / "results" / "matrix" / x["env_id"] / f"{x['script']}__{x['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(x))
    variant = tmp_path / "results" / "ablations" / "lr" / "CartPole-v1" / "ppo__101.json"
    variant.parent.mkdir(parents=True)
    variant.write_text(json.dumps(record("CartPole-v1", "ppo", 101, [1.0, 77.0], "--learning-rate 1")))
    variant.with_name("ppo__102.json").write_text(
        json.dumps(record("CartPole-v1", "ppo", 102, [], error="x"))
    )
    (tmp_path / "commands.ini").write_text(COMMANDS)
    (tmp_path / "published.csv").write_text(PUBLISHED)
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    paths = {x.split(".")[0].lower(): tmp_path / x for x in ("README.md", "commands.ini", "published.csv")}
    args = plot.Args(results=tmp_path / "results", figures=tmp_path / "figures", **paths)
    return args, [x for x in records if not x["error"]]


def tables(text):
    """Every table of a markdown text: {(row, column): cell}, rows and columns named by their first cell."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            head, _, *rows = lines
            found.append({(row[0], name): cell for row in rows for name, cell in zip(head, row)})
            lines = []
    return found


FIGURES = ("learning_curves", "wall_clock", "sample_efficiency", "profile")


def test_tables_and_figures_are_what_the_data_say(sample, capsys, monkeypatch):
    drawn = importlib.util.find_spec("matplotlib")
    for name in () if drawn else FIGURES:
        monkeypatch.setattr(plot, f"plot_{name}", lambda *_: None)
    args, records = sample
    plot.main(args)
    assert "vpg_gae.py Hopper-v5 seed 4 is left out: exit code 1: something broke" in capsys.readouterr().err
    text = (args.results / "tables.md").read_text()
    cartpole, hopper, cartpole_steps, hopper_steps, *_ = tables(text)

    def scores(env_id, script):
        return [x["final_return"] for x in records if (x["env_id"], x["script"]) == (env_id, script)]

    def cell(env_id, script):
        values = scores(env_id, script)
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)})"

    assert statistics.mean(scores("CartPole-v1", "ppo")) > 120  # the published one
    assert cartpole == {
        ("`vpg_gae.py`", ""): "`vpg_gae.py`",
        ("`vpg_gae.py`", "CartPole-v1, 2k"): f"{cell('CartPole-v1', 'vpg_gae')}; 1000",
        ("`ppo.py`", ""): "`ppo.py`",
        ("`ppo.py`", "CartPole-v1, 2k"): f"**{cell('CartPole-v1', 'ppo')}**; 120",
    }
    assert hopper["`vpg_gae.py`", "Hopper-v5, 2k"] == f"{cell('Hopper-v5', 'vpg_gae')}; -"
    assert hopper["`trpo.py`", "Hopper-v5, 2k"] == f"**{cell('Hopper-v5', 'trpo')}**; 50"
    (one_seed,) = scores("Hopper-v5", "ppo")
    assert one_seed > 50
    assert hopper["`ppo.py`", "Hopper-v5, 2k"] == f"{one_seed:.1f} (1); 50"  # not bold

    first = []  # steps of 20 with 2 episodes each: 100 episodes after 1000
    for x in records:
        if (x["env_id"], x["script"]) == ("CartPole-v1", "ppo"):
            first.append(
                min(step for step, episodes, value, _ in x["curve"] if episodes >= 100 and value >= 50)
            )
    half = f"{statistics.median(first):,.0f} (5 of 5)"
    assert cartpole_steps["`ppo.py`", "CartPole-v1, 50"] == half
    assert hopper_steps["`trpo.py`", "Hopper-v5, 90"].endswith(" of 3)")

    assert "| CartPole-v1 | ppo | lr | 77.0 (1) | 50: 2,000 (1 of 1) | 101 | `--learning-rate 1` |" in text
    assert "vpg_gae.py Hopper-v5 seed 4 is left out" in text
    assert "- lr: ppo.py CartPole-v1 seed 102 is left out: x" in text
    assert "- commit 0123456789: 16 runs" in text
    readme = args.readme.read_text()
    assert readme.startswith("before\n<!-- results -->\nMean ±") and readme.endswith(
        "<!-- /results -->\nafter\n"
    )
    assert tables(readme)[:2] == [cartpole, hopper]
    assert "| `ppo.py` | CartPole-v1, Hopper-v5 | `--num-envs 16` |" in readme
    assert "](figures/learning_curves.svg)" in readme and "](results/tables.md)" in readme

    made = {path: path.read_bytes() for path in args.results.parent.rglob("*") if path.is_file()}
    names = {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")} if drawn else set()
    assert {path.name for path in made if path.parent == args.figures} == names
    plot.main(args)
    assert made == {path: path.read_bytes() for path in made}  # no diff without new data


def test_no_runs_is_one_line(sample):
    args, _ = sample
    with pytest.raises(SystemExit, match="no runs in"):
        plot.main(plot.Args(results=args.figures))


def test_odd_runs_are_remarked(sample):
    args, _ = sample
    path = args.results / "matrix" / "Hopper-v5" / "trpo__3.json"
    path.write_text(path.read_text().replace('"flags": ""', '"flags": "--gamma 1"'))
    runs, remarks = plot.load(args.results / "matrix", ["Hopper-v5"])
    assert [*runs] == ["Hopper-v5"] and [*runs["Hopper-v5"]] == ["vpg_gae", "trpo", "ppo"]
    assert "trpo.py Hopper-v5 seed 3 has other arguments than seed 1" in remarks
    assert "ppo.py CartPole-v1 seed 1 is left out: its environment is not in the commands" in remarks


@pytest.mark.parametrize("count", range(1, 13))
def test_iqm_is_the_mean_without_the_outer_quarters(count):
    scores = np.random.default_rng(count).normal(size=(count, 3))
    for column in range(3):
        middle = sorted(scores[:, column])
        for _ in range(int(0.25 * count)):  # as scipy.stats.trim_mean(scores, 0.25)
            middle.remove(max(middle))
            middle.remove(min(middle))
        assert plot.iqm(scores)[column] == pytest.approx(statistics.mean(middle))
    assert plot.iqm(np.array([100, 0, 1, 2, 3, 4, 5, -100])) == 2.5


def test_bootstrap_is_the_distribution_over_all_draws_within_each_stratum():
    strata = [np.array([0.0, 1.0, 3.0, 7.0]), np.array([100.0, 130.0, 150.0])]

    def statistic(draw):
        return sum(np.mean(x) for x in draw)

    every = [[*itertools.product(x, repeat=len(x))] for x in strata]
    exact = np.percentile([statistic(draw) for draw in itertools.product(*every)], [2.5, 97.5])
    assert plot.bootstrap(strata, statistic, repetitions=20_000) == pytest.approx(exact, abs=0.7)
    assert plot.iqm_interval(np.array([5.0, 1.0, 3.0])) == pytest.approx(
        [1, 5]
    )  # 1 of 27 draws is the extreme
    constant = [np.zeros(3), np.ones(3)]
    assert [*plot.bootstrap(constant, statistic)] == [1, 1]
    curves = np.random.default_rng(0).normal(size=(5, 7))
    assert plot.iqm_interval(curves).shape == (2, 7)


def test_profile_weighs_environments_equally():
    strata = [np.array([0.0, 0.5, 1.0, 1.0]), np.array([0.5])]
    assert [*plot.profile(strata, np.array([0.0, 0.5, 0.6, 1.0]))] == [1, 0.875, 0.25, 0.25]


def test_normalize_and_steps_to_and_curves():
    published = {
        ("E", "random"): {"score": "-100"},
        ("E", "ppo"): {"score": "50"},
        ("E", "npg"): {"score": "100"},
    }
    assert [*plot.normalize(np.array([-100, 0, 100, 200]), "E", published)] == [0, 0.5, 1, 1.5]
    early, late = record("E", "ppo", 1, [9.0, 0.0, 5.0, 9.0]), record("E", "ppo", 2, [0.0, 1.0, 2.0, 3.0])
    assert plot.steps_to(4, [early, late]) == [1500, float("inf")]  # 50 episodes are too few
    grid, returns, seconds = plot.curves([early, late], points=7)
    assert [*grid] == [500, 750, 1000, 1250, 1500, 1750, 2000]
    assert [*returns[0]] == [9, 4.5, 0, 2.5, 5, 7, 9] and [*seconds[1]] == [*(grid / 100)]


def test_the_readme_has_the_stored_numbers():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read_string(plot.Args().commands.read_text())
    runs, _ = plot.load(plot.Args().results / "matrix", settings.sections())
    readme = plot.Args().readme.read_text()
    if not runs or "<!-- results -->" not in readme:
        pytest.skip("no results yet")
    with open(plot.Args().published) as file:
        published = {(row["environment"], row["algorithm"]): row for row in csv.DictReader(file)}
    for text in (readme, (plot.Args().results / "tables.md").read_text()):
        assert plot.final_table(runs, settings, published) in text, "python benchmarks/plot.py"
        assert plot.efficiency_table(runs, settings) in text, "python benchmarks/plot.py"


# ---------------------------------------------------------------------------- run.py


def test_every_command_of_the_table_is_understood(tmp_path):
    table = run.read_commands(run.Args().commands)
    assert run.SCRIPTS == [*plot.COLORS]
    with open(plot.Args().published) as file:
        published = {(row["environment"], row["algorithm"]) for row in csv.DictReader(file)}
    assert {algorithm for _, algorithm in published} <= {"random", *run.SCRIPTS}
    assert {env_id for env_id, _ in published} == set(table)
    for env_id, entries in table.items():
        assert float(entries["threshold"]) and (env_id, "random") in published
        for script in run.SCRIPTS:
            assert run.Job(script, env_id, 1, entries, "", tmp_path).reason == "new"


def test_an_environment_has_the_lines_of_its_group_and_its_own(tmp_path):
    (tmp_path / "commands.ini").write_text("[A]\nppo = a\ntrpo = a\n[B]\nlike = A\nppo = b\n[C]\nnpg = c\n")
    table = run.read_commands(tmp_path / "commands.ini")
    assert table == {"B": {"like": "A", "ppo": "b", "trpo": "a"}, "C": {"npg": "c"}}
    (tmp_path / "commands.ini").write_text("[A]\npop = a\n")
    with pytest.raises(SystemExit):
        run.read_commands(tmp_path / "commands.ini")


def test_what_is_done_is_what_has_the_same_arguments(tmp_path):
    def reason(flags="", extra="", steps=1024):
        return run.Job(
            "ppo", "CartPole-v1", 1, {"total_timesteps": steps, "ppo": flags}, extra, tmp_path
        ).reason

    job = run.Job("ppo", "CartPole-v1", 1, {"total_timesteps": 1024, "ppo": "--gamma 0.9"}, "", tmp_path)
    job.path.parent.mkdir(parents=True)

    def store(arguments, error=""):
        job.path.write_text(json.dumps({"arguments": arguments, "error": error}))

    store(job.arguments)
    assert reason("--gamma 0.9") == reason("--gamma 0.8", "--gamma 0.9") == ""
    assert reason() == "gamma was 0.9, is 0.99"
    assert reason("--gamma 0.9", steps=2048) == "total_timesteps was 1024, is 2048"
    store({name: value for name, value in job.arguments.items() if name != "ent_coef"})
    assert reason("--gamma 0.9") == "" and reason("--gamma 0.9 --ent-coef 1") == "ent_coef was 0.0, is 1.0"
    store(job.arguments, "exit code 1: out of memory")
    assert reason("--gamma 0.9") == "exit code 1: out of memory"


@pytest.fixture
def command(tmp_path):
    """run.py on the small table; its processes can be told by TMPDIR."""
    (tmp_path / "commands.ini").write_text(COMMANDS)
    (tmp_path / "tmp").mkdir()
    arguments = ["--commands", tmp_path / "commands.ini", "--results", tmp_path, "--env-ids", "CartPole-v1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}

    def start(*more):
        line = [sys.executable, ROOT / "benchmarks" / "run.py", *arguments, "--jobs", "2", *more]
        return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def test_a_failed_run_is_stored_and_what_is_done_is_skipped(command, tmp_path):
    process = command("--scripts", "vpg_gae", "ppo", "--seeds", "7")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "vpg_gae CartPole-v1 seed 7: FAILED: exit code 2: vpg_gae.py: --gamma 2.0" in stderr
    assert "2 runs stored, 1 of them failed" in stderr
    folder = tmp_path / "matrix" / "CartPole-v1"
    assert sorted(x.name for x in folder.iterdir()) == ["ppo__7.json", "vpg_gae__7.json"]
    failed, done = (json.loads((folder / f"{x}__7.json").read_text()) for x in ("vpg_gae", "ppo"))
    assert failed["error"].endswith("must be at most 1") and failed["final_return"] is None
    assert done["error"] == "" and done["flags"] == "--num-envs 8" and done["arguments"]["num_envs"] == 8
    step, episodes, episodic_return, seconds = done["curve"][-1]
    assert 1024 <= step < 1024 + 8 * 32 and episodes == done["episodes"]
    assert episodic_return == pytest.approx(done["final_return"]) and seconds == pytest.approx(
        done["seconds"], abs=0.1
    )
    assert (folder / "ppo__7.json").stat().st_size < 16_000

    before = (folder / "ppo__7.json").stat().st_mtime_ns
    process = command("--scripts", "ppo", "--seeds", "7")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "0 of 1 runs to do" in stderr
    assert (folder / "ppo__7.json").stat().st_mtime_ns == before
    assert not [*(tmp_path / "tmp").glob("tmp*")]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_ctrl_c_keeps_what_is_finished_and_ends_all_processes(command, tmp_path):
    def processes():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found += [path.parent.name] * (f"TMPDIR={tmp_path}/tmp".encode() in path.read_bytes())
            except OSError:  # ended meanwhile, or another user's
                pass
        return found

    finished = tmp_path / "ablations" / "long" / "CartPole-v1" / "ppo__7.json"
    process = command(
        "--scripts", "a3c_nstep", "ppo", "--seeds", "7", "--variant", "long", "--flags", "--gamma 0.5"
    )
    deadline = time.time() + 120
    while not (finished.exists() and len(processes()) >= 4):  # run.py, the other script and its two workers
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same call continues" in stderr
    assert json.loads(finished.read_text())["flags"] == "--num-envs 8 --gamma 0.5"
    assert [*finished.parent.iterdir()] == [finished]
    deadline = time.time() + 10
    while processes():
        assert time.time() < deadline, "left behind"
        time.sleep(0.1)
    assert not [*(tmp_path / "tmp").glob("tmp*")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env-ids", "Nowhere-v1"], "--env-ids Nowhere-v1"),
        (["--scripts", "dqn"], "--scripts dqn: no such script"),
        (["--flags", "--gamma 1"], "--flags: need a --variant"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    values = {name.strip("-").replace("-", "_"): value for name, value in [arguments]}
    args = run.Args(**{name: value if name == "flags" else (value,) for name, value in values.items()})
    with pytest.raises(SystemExit) as error:
        run.main(args)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"run.py: {message}")
