"""tools/enjoy.py plays the policy that was trained, as it was trained."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro

import ppo

ENJOY = Path(__file__).resolve().parents[1] / "tools" / "enjoy.py"
spec = importlib.util.spec_from_file_location("enjoy", ENJOY)
enjoy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(enjoy)


class Picky(gym.Env):
    """Ends after 5 steps; reward 1 for every action that is in its space."""

    observation_space = gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (2, 2)), y=gym.spaces.Discrete(3))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return {"x": np.zeros((2, 2), np.float32), "y": 1}, {}

    def step(self, action):
        self.t += 1
        obs = {"x": np.full((2, 2), self.t / 5, np.float32), "y": self.t % 3}
        return obs, float(self.action_space.contains(action)), self.t == 5, False, {}


ACTION_SPACES = {
    "PickyDiscrete-v0": gym.spaces.Discrete(2, start=5),
    "PickyBox-v0": gym.spaces.Box(-0.01, 0.01, (2, 2), np.float32),
}
for env_id, action_space in ACTION_SPACES.items():
    gym.register(env_id, Picky, kwargs={"action_space": action_space}, disable_env_checker=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """env_id -> the result of a short training, once per module."""
    results = {}

    def train(env_id):
        if env_id not in results:
            runs_dir = str(tmp_path_factory.mktemp("runs"))
            args = ppo.Args(env_id, total_timesteps=600, num_envs=4, num_steps=50, runs_dir=runs_dir)
            results[env_id] = ppo.train(args)
        return results[env_id]

    return train


@pytest.fixture
def play(capsys):
    """Run enjoy.py with these arguments; returns the lines it prints."""

    def play(*argv):
        capsys.readouterr()
        enjoy.main(tyro.cli(enjoy.Args, args=[str(arg) for arg in argv]))
        return capsys.readouterr().out.splitlines()

    return play


@pytest.fixture
def refusal(play, capsys):
    """The one line on standard error with which enjoy.py refuses these arguments."""

    def refusal(*argv):
        with pytest.raises(SystemExit) as stop:
            play(*argv)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return refusal


def returns_in(lines):
    return [float(line.split()[3].strip(",")) for line in lines[:-1]]


def copy_with(run_dir, to, args=None, policy=None):
    """A copy of a run folder with other entries in args.json or other weights."""
    shutil.copytree(run_dir, to)
    saved = json.loads((to / "args.json").read_text())
    (to / "args.json").write_text(json.dumps(saved | (args or {})))
    checkpoint = torch.load(to / "checkpoint.pt", weights_only=True)
    checkpoint["policy"].update(policy or {})
    torch.save(checkpoint, to / "checkpoint.pt")
    return to


def test_the_command_prints_every_episode_and_the_mean_from_any_directory(trained):
    run_dir = trained("CartPole-v1").run_dir
    command = [sys.executable, str(ENJOY), f"{run_dir.name}/", "--episodes", "3"]
    done = subprocess.run(command, cwd=run_dir.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *episodes, mean = done.stdout.splitlines()
    returns = returns_in([*episodes, mean])
    assert episodes == [f"episode {i + 1}: return {r:g}, length {r:g}" for i, r in enumerate(returns)]
    assert mean == f"mean {np.mean(returns):g} +- {np.std(returns):g} over 3 episodes"


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_deterministic_returns_are_those_of_a_hand_rollout_with_the_trained_policy(trained, play, env_id):
    result, env, returns = trained(env_id), gym.make(env_id), []
    for seed in (7, None, None):
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            output = result.policy.net(torch.tensor(obs, dtype=torch.float32)).detach().numpy()
            action = output.argmax() if env_id == "CartPole-v1" else output.clip(-2, 2)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        returns.append(total)
    lines = play(result.run_dir, "--episodes", 3, "--seed", 7, "--deterministic")
    assert returns_in(lines) == pytest.approx(returns, rel=1e-5)


@pytest.mark.parametrize("mode", ["--deterministic", "--no-deterministic"])
def test_the_seed_fixes_the_episodes(trained, play, mode):
    run_dir = trained("Pendulum-v1").run_dir
    first, again, other = (play(run_dir, "--episodes", 2, "--seed", seed, mode) for seed in (1, 1, 2))
    assert first == again != other


def test_actions_are_sampled_by_default(trained, play):
    run_dir = trained("Pendulum-v1").run_dir
    assert play(run_dir, "--episodes", 2) != play(run_dir, "--episodes", 2, "--deterministic")


def test_the_saved_statistics_are_used(trained, play, tmp_path):
    result = trained("Pendulum-v1")
    shifted = copy_with(result.run_dir, tmp_path / "x", policy={"net.0.mean": result.policy.net[0].mean + 1})
    assert play(result.run_dir, "--deterministic") != play(shifted, "--deterministic")


@pytest.mark.parametrize("env_id", ACTION_SPACES)
def test_observations_are_flat_and_actions_in_their_space_as_in_training(trained, play, env_id):
    result = trained(env_id)
    assert set(result.episode_returns) == {5.0}
    assert set(returns_in(play(result.run_dir, "--episodes", 4))) == {5.0}


def test_a_folder_that_is_no_run_is_refused(trained, refusal, tmp_path):
    run_dir = trained("CartPole-v1").run_dir
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "args.json" in refusal(tmp_path)
    for name, content in (("empty", ""), ("list", "[]"), ("other", "{}")):
        shutil.copytree(run_dir, tmp_path / name)
        (tmp_path / name / "args.json").write_text(content)
        assert f"{name}: not a run folder" in refusal(tmp_path / name)


def test_a_missing_or_torn_checkpoint_is_refused(trained, refusal, tmp_path):
    checkpoint = copy_with(trained("CartPole-v1").run_dir, tmp_path / "x") / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        checkpoint.write_bytes(torn)
        assert "x: not a run folder" in refusal(tmp_path / "x")
    checkpoint.unlink()
    assert "checkpoint.pt" in refusal(tmp_path / "x")


def test_weights_of_another_version_are_refused(trained, refusal, tmp_path):
    run_dir = copy_with(
        trained("CartPole-v1").run_dir, tmp_path / "x", policy={"net.9.weight": torch.zeros(1)}
    )
    assert "another version" in refusal(run_dir)


def test_a_checkpoint_with_code_is_refused_and_not_run(trained, refusal, tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "it_ran").touch, ()

    run_dir = copy_with(trained("CartPole-v1").run_dir, tmp_path / "x")
    (run_dir / "checkpoint.pt").write_bytes(pickle.dumps(Code()))
    refusal(run_dir)
    torch.save(Code(), run_dir / "checkpoint.pt")
    refusal(run_dir)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("script", ["sac", "../tests/test_enjoy", "tools/enjoy", None])
def test_a_script_that_is_not_in_the_repository_root_is_refused(trained, refusal, tmp_path, script):
    run_dir = copy_with(trained("CartPole-v1").run_dir, tmp_path / "x", args={"script": script})
    assert Path(f"{script}.py").name in refusal(run_dir)


def test_bad_arguments_are_refused(trained, refusal, tmp_path):
    run_dir = trained("CartPole-v1").run_dir
    for argv in (["--episodes", 0], ["--seed", -1], ["--video", "x.gif"], ["--video", "x.mp4", "--render"]):
        assert argv[0] in refusal(run_dir, *argv)
    unknown = copy_with(run_dir, tmp_path / "x", args={"env_id": "CartPoel-v1"})
    assert "Did you mean: `CartPole`" in refusal(unknown)


def without(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    "package, argv",
    [("moviepy", ["--video", "x.mp4"]), ("pygame", ["--video", "x.mp4"]), ("pygame", ["--render"])],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    trained, refusal, monkeypatch, tmp_path, package, argv
):
    pytest.importorskip("pygame")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    without(monkeypatch, package)
    line = refusal(trained("CartPole-v1").run_dir, *argv)
    assert package in line and "pip install -r requirements-extras.txt" in line
    assert not Path("x.mp4").exists()


def test_missing_mujoco_is_named_with_the_command_that_installs_it(trained, tmp_path):
    run_dir = copy_with(trained("CartPole-v1").run_dir, tmp_path / "x", args={"env_id": "Hopper-v5"})
    (tmp_path / "mujoco.py").write_text("raise ImportError('No module named mujoco')")
    command, env = [sys.executable, str(ENJOY), str(run_dir)], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "mujoco" in done.stderr.lower() and "pip install -r requirements-extras.txt" in done.stderr


def test_a_window_without_a_display_is_refused(trained, refusal, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "no display" in refusal(trained("CartPole-v1").run_dir, "--render")


def test_a_display_that_does_not_work_is_refused(trained, refusal, monkeypatch):
    pygame = pytest.importorskip("pygame")
    pygame.display.quit()
    monkeypatch.setenv("SDL_VIDEODRIVER", "no-such-driver")
    assert "CartPole-v1 cannot be drawn" in refusal(trained("CartPole-v1").run_dir, "--render")


def test_render_and_video_play_the_same_episodes_and_film_them_to_that_file(
    trained, play, tmp_path, monkeypatch
):
    pytest.importorskip("pygame")
    moviepy = pytest.importorskip("moviepy")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    argv = [trained("CartPole-v1").run_dir, "--episodes", 2]
    lines = play(*argv)
    assert [line for line in play(*argv, "--render") if "pygame" not in line] == lines
    assert play(*argv, "--video", tmp_path / "film.mp4") == lines
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    with moviepy.VideoFileClip(str(tmp_path / "film.mp4")) as film:
        frames = np.stack(list(film.iter_frames()))
    assert len(frames) == sum(returns_in(lines))
    assert (frames[0] != frames[-1]).any()
