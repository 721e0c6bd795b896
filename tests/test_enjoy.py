"""tools/enjoy.py plays the policy that was trained, as it was trained."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from environments import Sampler
from gymnasium.spaces import Box, Dict, Discrete
from test_copies import MODULES
from test_run_folder import tiny

import ppo
from tools import enjoy

for env_id, action_space in {"Discrete": Discrete(2, start=5), "Matrix": Box(-0.01, 0.01, (2, 2))}.items():
    spaces = {"observation_space": Dict(x=Box(-1, 1, (2, 2)), y=Discrete(3)), "action_space": action_space}
    gym.register(f"{env_id}-v0", Sampler, kwargs=spaces, max_episode_steps=5, disable_env_checker=True)


@pytest.fixture
def play(capsys):
    """Run enjoy.py with these arguments; returns the lines it prints."""

    def play(*argv):
        capsys.readouterr()
        enjoy.main(tyro.cli(enjoy.Args, args=[str(arg) for arg in argv]))
        return capsys.readouterr().out.splitlines()

    return play


def train(runs_dir, env_id="CartPole-v1", script=ppo):
    return script.train(tiny(script, runs_dir, env_id=env_id))


def returns_in(lines):
    return [float(line.split()[3].strip(",")) for line in lines[:-1]]


@pytest.mark.parametrize("name", MODULES)
def test_the_run_of_every_script_is_played_the_same_for_the_same_seed(name, play, tmp_path):
    argv = train(tmp_path, "Pendulum-v1", importlib.import_module(name)).run_dir, "--episodes", 2, "--seed", 7
    assert play(*argv) == play(*argv) != play(*argv, "--deterministic")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_deterministic_returns_are_those_of_a_hand_rollout_with_the_trained_policy(env_id, play, tmp_path):
    result, env, returns = train(tmp_path, env_id), gym.make(env_id), []
    for seed in (7, None, None):
        obs, total, done = env.reset(seed=seed)[0], 0.0, False
        while not done:
            output = result.policy.net(torch.tensor(obs, dtype=torch.float32)).detach().numpy()
            action = output.argmax() if env_id == "CartPole-v1" else output.clip(-2, 2)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        returns.append(total)
    lines = play(result.run_dir, "--episodes", 3, "--seed", 7, "--deterministic")
    assert returns_in(lines) == pytest.approx(returns, rel=1e-5)


@pytest.mark.parametrize("env_id", ["Discrete-v0", "Matrix-v0"])
def test_observations_are_flat_and_actions_in_their_space_as_in_training(env_id, play, tmp_path):
    run_dir = train(tmp_path, env_id).run_dir
    lines = play(run_dir, "--episodes", 2)  # Sampler refuses an action that is not
    assert lines[:2] == ["episode 1: return 0, length 5", "episode 2: return 0, length 5"]

    policy, env = enjoy.load(run_dir)
    obs, ends = env.reset(seed=1)[0], []
    assert obs in env.observation_space and obs.shape == (7,) and not policy.training
    while len(ends) < 5:
        obs, reward, terminated, truncated, _ = env.step(policy(torch.from_numpy(obs)).mode)
        ends.append((type(reward), terminated, truncated))
    assert ends == 4 * [(float, False, False)] + [(float, False, True)]


def test_a_recurrent_policy_gets_its_state_back_and_zeros_with_each_episode(tmp_path):
    _, env = enjoy.load(train(tmp_path, "Discrete-v0").run_dir)
    states = []

    def policy(obs, valid, state):
        states.append(state.unique().item())
        return torch.distributions.Categorical(logits=torch.zeros(1, 1, 2)), state + 1

    policy.lstm = torch.nn.LSTM(3, 3)
    enjoy.play(env, policy, enjoy.Args("", episodes=2))
    assert states == 2 * [0, 1, 2, 3, 4]


def edited(path):
    """A copy of ppo.py whose policy always takes action 1."""
    source = Path(ppo.__file__).read_text()
    net = "Categorical(logits=self.net(obs)"
    assert net in source
    path.parent.mkdir(exist_ok=True)
    path.write_text(source.replace(net, "Categorical(logits=self.net(obs) + torch.tensor([0, 1e6])"))


def test_the_script_is_found_beside_the_run_here_by_its_path_and_then_in_the_repository(
    play, tmp_path, monkeypatch
):
    run_dir, other = train(tmp_path / "a/runs").run_dir, tmp_path / "other/mine.py"
    falls = ["8", "9", "10", "11"]  # steps in which a push to one side ends an episode

    def always_right(*argv):
        return all(line.split()[-1] in falls for line in play(run_dir, "--episodes", 3, *argv)[:-1])

    assert not always_right()
    edited(other)
    assert always_right("--script", other) and not always_right()
    edited(tmp_path / "here/ppo.py")
    monkeypatch.chdir(tmp_path / "here")
    assert always_right() and not always_right("--script", ppo.__file__)
    monkeypatch.chdir(tmp_path)
    assert not always_right()
    edited(tmp_path / "a/ppo.py")
    assert always_right()


def test_output_has_the_returns_and_the_interval(play, tmp_path):
    mean, deviation, low, high = enjoy.summarize(list(range(100)))
    assert (mean, deviation) == pytest.approx((49.5, 841.667**0.5), rel=1e-5)
    assert (low, high) == pytest.approx((49.5 - 1.96 * 2.887, 49.5 + 1.96 * 2.887), abs=0.2)

    run_dir, file = train(tmp_path).run_dir, tmp_path / "result.json"
    lines = play(run_dir, "--episodes", 3, "--seed", 7, "--deterministic", "--output", file)
    result = json.loads(file.read_text())
    assert result["returns"] == returns_in(lines) == result["lengths"]  # on CartPole-v1
    mean, deviation, *interval = enjoy.summarize(result["returns"])
    low, high = interval
    assert (
        lines[-1] == f"mean {mean:g}, deviation {deviation:g}, 95% interval of the mean {low:g} to {high:g}"
    )
    expected = dict(mean=mean, deviation=deviation, interval=interval, run_dir=str(run_dir), seed=7)
    assert result == result | expected | {"deterministic": True}

    play(run_dir, "--episodes", 1, "--output", file)
    one = json.loads(file.read_text())
    assert (one["deviation"], one["interval"], len(one["returns"])) == (None, None, 1)


CHANGES = {
    "environments.py: say by --script": {
        "args": {"script": "../tests/environments", "env_id": "CartPole-v1"}
    },
    "is not a run folder": {"args": {}},
    "Missing key": {"policy": {}},
    "Weights only load failed": {"code": subprocess.run},
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_checkpoint_of_another_kind_is_refused_and_none_runs_code(words, play, tmp_path):
    path = train(tmp_path).run_dir / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | CHANGES[words], path)
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError), match=words):
        play(path.parent)


def test_the_command_shows_and_films_the_same_episodes(tmp_path, play, monkeypatch):
    run_dir, film = train(tmp_path).run_dir, tmp_path / "film.mp4"
    command = [sys.executable, enjoy.__file__, f"{run_dir.name}/", "--episodes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    returns = returns_in(lines)
    assert done.stderr == "" and len(returns) == 2 and lines == play(run_dir, "--episodes", 2)

    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    for argv in (["--render"], ["--video", "x.gif"], ["--video", "x.mp4", "--render"]):
        with pytest.raises(ValueError, match=argv[0]):
            play(run_dir, *argv)

    pytest.importorskip("pygame")
    moviepy = pytest.importorskip("moviepy")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    shown = play(run_dir, "--episodes", 2, "--render")
    assert [line for line in shown if "pygame" not in line] == lines
    assert play(run_dir, "--episodes", 2, "--video", film) == lines
    with moviepy.VideoFileClip(str(film)) as clip:
        frames = np.stack(list(clip.iter_frames()))
    assert len(frames) == sum(returns) and (frames[0] != frames[-1]).any()
