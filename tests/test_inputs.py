"""Bad input gets one line on standard error and exit code 2, before anything is written."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import math
import re
import runpy
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = ["reinforce", "reinforce_baseline", "offpolicy_is", "vpg_gae", "npg", "trpo", "ppo"]


class Spaces(gym.Env):
    """An environment of any spaces."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


BOX, DISCRETE = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
SPACES = {
    "MultiDiscrete-v0": (BOX, gym.spaces.MultiDiscrete([2, 3])),
    "MultiBinary-v0": (BOX, gym.spaces.MultiBinary(3)),
    "DictAction-v0": (BOX, gym.spaces.Dict(a=DISCRETE)),
    "IntegerBox-v0": (BOX, gym.spaces.Box(0, 5, (2,), np.int64)),
    "Sequence-v0": (gym.spaces.Sequence(BOX), DISCRETE),
}
for env_id, (obs_space, action_space) in SPACES.items():
    kwargs = {"observation_space": obs_space, "action_space": action_space}
    gym.register(env_id, Spaces, kwargs=kwargs, disable_env_checker=True)

# argument: bad value, words of the line
BAD = [
    ("env_id", "CartPoel-v1", "Did you mean: `CartPole`"),
    ("env_id", "CartPole-v99", "v1"),
    ("env_id", "no id", "Malformed"),
    ("env_id", "ALE/NoGame-v5", "ALE"),
    ("env_id", "no_such_module:Some-v0", "no_such_module"),
    ("env_id", "MultiDiscrete-v0", "actions must be Discrete or float Box, not MultiDiscrete([2 3])"),
    ("env_id", "MultiBinary-v0", "actions must be Discrete or float Box, not MultiBinary(3)"),
    ("env_id", "DictAction-v0", "actions must be Discrete or float Box, not Dict"),
    ("env_id", "IntegerBox-v0", "actions must be Discrete or float Box, not Box"),
    ("env_id", "Sequence-v0", "Sequence"),
    ("gamma", 1.01, "at most 1"),
    ("gamma", math.inf, "gamma"),
    ("gae_lambda", 1.01, "at most 1"),
    ("max_kl", 0.0, "above 0"),
    ("backtrack_coef", 0.0, "above 0"),
    ("backtrack_coef", 1.01, "at most 1"),
    ("damping", -0.1, "at least 0"),
    ("cg_tol", -1e-9, "at least 0"),
    ("fisher_subsample", 0.0, "above 0"),
    ("fisher_subsample", 1.01, "at most 1"),
    ("kl_coef", -1.0, "at least 0"),
    ("kl_learning_rate", 0.0, "above 0"),
    ("target_kl", 0.0, "above 0"),
    ("num_minibatches", 3, "divide a batch of 32"),
    ("num_minibatches", 64, "divide a batch of 32"),
    ("total_timesteps", 1, "one iteration"),
    ("seed", 2**64, "seed"),
]


def script_and_field(kind):
    """(script, field) for all fields of Args of a kind."""
    for name in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(name).Args):
            if field.type in kind:
                yield name, field.name


def refusal(name, **changes):
    """The line with which train refuses these arguments; it must write nothing else and no file."""
    script = importlib.import_module(name)
    tiny = {"num_envs": 4, "num_steps": 8, "num_minibatches": 4, "total_timesteps": 64} | changes
    fields = script.Args.__dataclass_fields__
    args = script.Args(**{key: value for key, value in tiny.items() if key in fields})
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        with pytest.raises(SystemExit) as stop:
            script.train(args)
    assert stop.value.code == 2 and out.getvalue() == ""
    return one_line(name, err.getvalue())


def one_line(name, text):
    assert text.startswith(f"{name}.py: ") and text.endswith("\n") and text.count("\n") == 1, text
    return text


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a script with these arguments in this process; returns exit code, stdout and stderr."""

    def command(name, *argv):
        path = importlib.import_module(name).__file__
        monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def finished(command, tmp_path):
    """Make a finished run of a script; returns its folder."""

    def finished(name):
        sizes = ["--total-timesteps", 64, "--num-envs", 2]
        if hasattr(importlib.import_module(name).Args, "num_steps"):
            sizes += ["--num-steps", 16]
        assert command(name, *sizes, "--runs-dir", tmp_path / "finished")[0] == 0
        (run_dir,) = (tmp_path / "finished").iterdir()
        return run_dir

    return finished


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("field, value, words", BAD)
def test_a_bad_argument_is_refused_in_one_line_before_anything_is_written(
    tmp_path, name, field, value, words
):
    fields = vars(importlib.import_module(name).Args)
    if field not in fields or words.startswith("divide") and "num_steps" not in fields:
        pytest.skip(f"{name} has no such {field}")
    line = refusal(name, runs_dir=str(tmp_path / "runs"), **{field: value})
    assert words in line and f"--{field.replace('_', '-')}" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, field", list(script_and_field([int])))
def test_an_integer_that_is_not_positive_is_refused(tmp_path_factory, name, field):
    runs_dir = tmp_path_factory.mktemp("inputs") / "runs"

    @settings(max_examples=20, deadline=None)
    @given(st.integers(max_value=-1 if field == "seed" else 0))
    def check(value):
        line = refusal(name, runs_dir=str(runs_dir), **{field: value})
        assert f"--{field.replace('_', '-')} {value}" in line

    check()
    assert not runs_dir.exists()


@pytest.mark.parametrize("name, field", list(script_and_field([float, float | None])))
def test_a_number_that_is_nan_or_negative_is_refused(tmp_path_factory, name, field):
    runs_dir = tmp_path_factory.mktemp("inputs") / "runs"

    @settings(max_examples=20, deadline=None)
    @given(st.just(math.nan) | st.floats(max_value=-5e-324))
    def check(value):
        line = refusal(name, runs_dir=str(runs_dir), **{field: value})
        assert f"--{field.replace('_', '-')} {value}" in line

    check()
    assert not runs_dir.exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_budget_of_exactly_one_iteration_is_accepted(command, tmp_path, name):
    budget = 64 if hasattr(importlib.import_module(name).Args, "num_steps") else 4
    sizes = ["--num-envs", 4] + (["--num-steps", 16] if budget == 64 else [])
    for total_timesteps, expected in ((budget - 1, 2), (budget, 0)):
        runs_dir = tmp_path / str(expected)
        code, _, _ = command(name, *sizes, "--total-timesteps", total_timesteps, "--runs-dir", runs_dir)
        assert code == expected and runs_dir.exists() == (expected == 0)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(tmp_path, name):
    assert "cuda" in refusal(name, runs_dir=str(tmp_path / "runs"), device="cuda")
    assert list(tmp_path.iterdir()) == []


def edit_checkpoint(folder, edit):
    """Change the state in a run folder's checkpoint."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "checkpoint.pt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_resumed_is_refused_and_left_alone(command, finished, tmp_path, name):
    run_dir = finished(name)
    args = run_dir / "args.json"
    broken = {
        "nowhere": lambda folder: shutil.rmtree(folder),
        "no_args": lambda folder: (folder / args.name).unlink(),
        "no_checkpoint": lambda folder: (folder / "checkpoint.pt").unlink(),
        "empty_args": lambda folder: (folder / args.name).write_text(""),
        "list_args": lambda folder: (folder / args.name).write_text("[]"),
        "wrong_script": lambda folder: (folder / args.name).write_text(
            args.read_text().replace(f'"{name}"', '"sac"')
        ),
        "other_version": lambda folder: (folder / args.name).write_text(
            args.read_text().replace('"gamma"', '"discount"')
        ),
        "other_networks": lambda folder: edit_checkpoint(
            folder, lambda state: state["policy"].pop("net.0.mean")
        ),
        "other_modules": lambda folder: edit_checkpoint(folder, lambda state: state.pop("policy")),
        "other_optimizer": lambda folder: edit_checkpoint(
            folder,
            lambda state: [
                state[module]["param_groups"][0]["params"].append(99)
                for module in state
                if module.endswith("optimizer")
            ],
        ),
    }
    for what, damage in broken.items():
        folder = tmp_path / what
        shutil.copytree(run_dir, folder)
        damage(folder)
        before = contents(tmp_path)
        code, out, err = command(name, "--resume", folder, "--total-timesteps", 512)
        assert (code, out) == (2, "") and f"--resume {folder}" in (line := one_line(name, err))
        assert ("another version" in line) == what.startswith("other")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_without_a_larger_budget_is_refused_and_left_alone(command, finished, name):
    run_dir = finished(name)
    before = contents(run_dir)
    code, out, err = command(name, "--resume", run_dir)
    assert (code, out) == (2, "") and "already done" in one_line(name, err)
    assert contents(run_dir) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_cannot_be_resumed_in_another_environment(command, finished, name):
    run_dir = finished(name)
    before = contents(run_dir)
    for env_id in ("Pendulum-v1", "CartPoel-v1"):
        code, out, err = command(name, "--resume", run_dir, "--total-timesteps", 128, "--env-id", env_id)
        assert (code, out) == (2, "") and one_line(name, err)
        assert contents(run_dir) == before


@pytest.mark.parametrize(
    "name, flags", [("ppo", ["--objective", "kl-penalty"]), ("reinforce_baseline", ["--baseline", "none"])]
)
def test_a_run_cannot_be_resumed_with_other_columns(command, finished, name, flags):
    run_dir = finished(name)
    before = contents(run_dir)
    code, out, err = command(name, "--resume", run_dir, "--total-timesteps", 128, *flags)
    assert (code, out) == (2, "") and " ".join(flags) in one_line(name, err)
    assert contents(run_dir) == before


@pytest.mark.parametrize("name, estimator", [("reinforce", "total"), ("offpolicy_is", "trajectory")])
def test_one_weight_cannot_be_normalized(tmp_path, name, estimator):
    changes = dict(estimator=estimator, num_envs=1, runs_dir=str(tmp_path / "runs"))
    assert "--num-envs 1" in refusal(name, **changes, normalize_weights=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_train_refuses_a_resume_folder_that_is_no_run(tmp_path, name):
    assert f"--resume {tmp_path}" in refusal(name, resume=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_line_refuses_without_a_traceback(tmp_path, name):
    path = importlib.import_module(name).__file__
    for argv in (["--env-id", "CartPoel-v1"], ["--learning-rate", "nan"]):
        done = subprocess.run([sys.executable, path, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert " ".join(argv) in one_line(name, done.stderr)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_argument(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    script = importlib.import_module(name)
    code, out, _ = command(name, "--help")
    (body,) = (node.body for node in ast.parse(inspect.getsource(script.Args)).body)
    assert code == 0 and len(body) == 2 * len(dataclasses.fields(script.Args))
    for field, doc in zip(body[::2], body[1::2]):
        text = " ".join(doc.value.value.split())
        assert len(text) > 5 and text in " ".join(re.sub("[│\n]", " ", out).split())
        assert f"--{field.target.id.replace('_', '-')}" in out
