"""Bad input: tyro's message and exit code 2, or an exception that says what is wrong; nothing is written."""

import dataclasses
import importlib
import math
import re
import subprocess
import sys

import environments  # noqa: F401
import gymnasium as gym
import pytest
import torch
import tyro
from test_copies import EPISODE, MODULES

FROM_0 = {"seed", "ent_coef", "damping", "cg_tol", "kl_coef", "value_prox_coef"}
FROM_0_TO_1 = {"gamma", "gae_lambda", "value_lambda", "backtrack_coef", "min_ess"}
REFUSED = [  # environments; more that make_envs refuses: test_rollout.py
    ("CartPoel-v1", gym.error.NameNotFound, "Did you mean: `CartPole`"),
    ("CartPole-v99", gym.error.VersionNotFound, "v1"),
    ("no_such_module:Some-v0", ModuleNotFoundError, "no_such_module"),
    ("DictAction-v0", ValueError, r"takes Dict\(.*\): actions must be .*Discrete or .*Box"),
]


@pytest.fixture(params=MODULES)
def script(request):
    return importlib.import_module(request.param)


def bounds(script, field):
    """The numbers at the edge of what an argument takes, and those beyond; none if it is no number."""
    if type(field.default) is int:
        two = field.name == "num_steps" or field.name == "num_envs" and f"{script.__name__}.py" in EPISODE
        least = 0 if field.name in FROM_0 else 2 if two else 1
        return [least], [least - 1, least + 0.5, "many"]
    if type(field.default) is not float and field.name != "target_kl":
        return [], []
    smallest = 5e-324
    good, bad = ([0], [-smallest]) if field.name in FROM_0 | FROM_0_TO_1 else ([smallest], [0])
    if field.name in FROM_0_TO_1:
        good.append(1)
        bad.append(math.nextafter(1, 2))
    return good, [*bad, math.nan, -math.inf, "much"]


def test_every_number_has_its_bounds_and_every_choice_its_names(script, capfd):
    for field in dataclasses.fields(script.Args):
        good, bad = bounds(script, field)
        bad += ["another"] if "Literal" in str(field.type) else []
        assert bad or field.type in (bool, str, str | None), field.name
        for value in good:
            assert getattr(script.Args(**{field.name: value}), field.name) == value
        for value in bad:
            with pytest.raises(ValueError, match=field.name):
                script.Args(**{field.name: value})
        if bad:
            with pytest.raises(SystemExit) as stop:
                tyro.cli(script.Args, args=[f"--{field.name.replace('_', '-')}={bad[0]}"])
            assert stop.value.code == 2 and "──" in capfd.readouterr().err


def test_every_argument_is_one_line_with_its_help(script, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        tyro.cli(script.Args, args=["--help"])
    out = capfd.readouterr().out
    with open(script.__file__) as file:
        lines = file.read().split("class Args:\n")[1].split("\n\n")[0].splitlines()
    assert stop.value.code == 0 and len(lines) == len(dataclasses.fields(script.Args))
    for line in lines:
        name, text = re.fullmatch(r" {4}(\w+): .+ = .+  # (.+)", line).groups()
        assert text in out and f"--{name.replace('_', '-')}" in out


@pytest.mark.parametrize("env_id, error, words", REFUSED)
def test_train_refuses_before_a_folder_is_made(script, env_id, error, words, tmp_path):
    args = script.Args(env_id=env_id, runs_dir=str(tmp_path / "runs"))
    with pytest.raises(error, match=words):
        script.train(args)
    with pytest.raises(ValueError, match="scale"):  # the scripts' distributions alone are not checked
        torch.distributions.Normal(0.0, -1.0)
    if not torch.cuda.is_available() and script.__name__ != "a3c_nstep":
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            unmasked = {"mask": False} if hasattr(args, "mask") else {}
            script.train(dataclasses.replace(args, env_id="CartPole-v1", device="cuda", **unmasked))
    assert list(tmp_path.iterdir()) == []


NOWHERE = ["--resume", "nowhere"], 1, r"\nValueError: --resume nowhere is not a run folder of ppo.py\n$"


@pytest.mark.parametrize("argv, code, words", [(["--gamma", "2"], 2, "less than or equal to 1"), NOWHERE])
def test_the_command_says_what_is_wrong_and_writes_nothing(argv, code, words, tmp_path):
    command = [sys.executable, importlib.import_module("ppo").__file__, *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "") and re.search(words, done.stderr), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1) and list(tmp_path.iterdir()) == []
