"""The run folder: what is in it, that it repeats, that it resumes, and that it survives every way to stop."""

import csv
import dataclasses
import fcntl
import importlib
import json
import math
import multiprocessing
import os
import pty
import re
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ["vpg_gae", "npg", "trpo", "ppo"]  # the episode family: test_episode_rollout.py
ALL = ["reinforce", "reinforce_baseline", "offpolicy_is", "vpg_gae", "npg", "trpo", "ppo"]  # test_a3c.py
PROCESSES = ["ppo"]  # in processes of their own; `# ---- running` is the same text in every script
TIMES = {"seconds", "steps_per_second"}


class ThreeSteps(gym.Env):
    """Episodes of 3 steps with random rewards; keeps a record of what was done to all of its instances."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    length = 3

    @classmethod
    def clear(cls):
        cls.seeds, cls.returns, cls.steps = [], [], 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seeds.append(seed)
        self.t, self.total = 0, 0.0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        reward = self.np_random.normal() * 1000
        self.t, self.total, ThreeSteps.steps = self.t + 1, self.total + reward, ThreeSteps.steps + 1
        if self.t == self.length:
            self.returns.append(self.total)
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return obs, reward, self.t == self.length, False, {}


class OneStep(ThreeSteps):
    length = 1


class Bad(gym.Env):
    """Episodes of 5 steps; one reward or observation is set to a value after so many steps."""

    observation_space, action_space = (
        gym.spaces.Box(-np.inf, np.inf, (500,), np.float64),
        gym.spaces.Discrete(2),
    )
    what, value, after = "", 0.0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.steps = 0, getattr(self, "steps", 0)
        return self.observation(), {}

    def observation(self):
        obs = self.np_random.normal(size=500)
        if self.what == "observation" and self.steps >= self.after:
            obs[250] = self.value
        return obs

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        reward = self.value if self.what == "reward" and self.steps >= self.after else 1.0
        return self.observation(), reward, self.t == 5, False, {}


for env_id, env in {"space/ThreeSteps-v0": ThreeSteps, "OneStep-v0": OneStep, "Bad-v0": Bad}.items():
    gym.register(env_id, env, disable_env_checker=True)


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    """A script that writes a checkpoint after every iteration; the real rule has tests of its own."""
    ThreeSteps.clear()
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "SAVE_EVERY", 0)
    return module


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C works, also where the tests run in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def tiny(script, runs_dir, **changes):
    """Arguments of a run of a few iterations; what the script does not have is left out."""
    sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 160}
    args = {**sizes, "runs_dir": str(runs_dir), **changes}
    return script.Args(**{key: value for key, value in args.items() if hasattr(script.Args, key)})


def progress(run_dir, without=()):
    """The rows of progress.csv."""
    with open(Path(run_dir, "progress.csv"), newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [{name: cell for name, cell in row.items() if name not in without} for row in rows]


def checkpoint(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_finite(state):
    assert all(x.isfinite().all() for name in ("policy", "value") for x in state.get(name, {}).values())


def assert_whole(run_dir):
    """progress.csv ends where the checkpoint does, every row is complete, and no step comes twice."""
    rows, state = progress(run_dir), checkpoint(run_dir)
    steps = [int(row["step"]) for row in rows]
    assert len(rows) == state["iteration"] and steps[-1] == state["step"]
    assert steps == sorted(set(steps))
    assert all(None not in row and None not in row.values() for row in rows)


def only_run(runs_dir):
    (run_dir,) = Path(runs_dir).iterdir()
    return run_dir


def train_until(script, iteration, args):
    """Train, but stop as at Ctrl-C when this many iterations are saved and the next one is about to be."""
    log = script.Run.log

    def log_or_stop(run, *rest):
        if run.iteration == iteration:
            raise KeyboardInterrupt
        log(run, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script.Run, "log", log_or_stop)
        return script.train(args).run_dir


def interrupted_run(script, runs_dir, iteration=2, **changes):
    return train_until(script, iteration, tiny(script, runs_dir, **changes))


def run_with_a_lost_row(script, runs_dir, error=KeyboardInterrupt, **changes):
    """A run that an error stopped in its fourth iteration: three rows, but the checkpoint of the second."""
    log = script.Run.log

    def log_or_stop(run, *rest):
        if run.iteration == 3:
            raise error
        script.SAVE_EVERY = 0 if run.iteration == 1 else math.inf
        log(run, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "SAVE_EVERY", math.inf)
        monkeypatch.setattr(script.Run, "log", log_or_stop)
        try:
            script.train(tiny(script, runs_dir, **{"total_timesteps": 600, **changes}))
        except error:
            pass
    run_dir = only_run(runs_dir)
    assert len(progress(run_dir)) == 3 and checkpoint(run_dir)["iteration"] == 2
    return run_dir


def resume(script, run_dir, **changes):
    return script.train(dataclasses.replace(script.load_args(run_dir), **changes))


# ---------------------------------------------------------------------------- what is in it


def test_the_folder_is_named_after_the_run_and_holds_four_files(script, tmp_path):
    run_dir = script.train(tiny(script, tmp_path, env_id="space/ThreeSteps-v0", seed=3)).run_dir
    assert run_dir == only_run(tmp_path)
    assert re.fullmatch(rf"{script.__name__}__space-ThreeSteps-v0__3__\d{{8}}-\d{{6}}-\d+", run_dir.name)
    names = sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in run_dir.iterdir())
    assert names == ["args.json", "checkpoint.pt", "events.out.tfevents", "progress.csv"]


def test_args_json_gives_the_arguments_back(script, tmp_path):
    args = tiny(script, tmp_path, seed=5, gamma=0.9, anneal_lr=False, learning_rate=1e-4)
    saved = json.loads((script.train(args).run_dir / "args.json").read_text())
    assert saved.pop("script") == script.__name__
    assert script.Args(**saved) == args


def test_progress_csv_has_one_finite_row_per_iteration(script, tmp_path):
    run_dir = script.train(tiny(script, tmp_path)).run_dir
    assert_whole(run_dir)
    rows = progress(run_dir)
    assert len(rows) >= 5
    assert {"step", "episodes", "episodic_return", "policy_loss", "entropy", *TIMES} <= set(rows[0])
    for name in rows[0]:
        cells = [row[name] for row in rows if name != "episodic_return" or row[name]]
        assert all(math.isfinite(float(cell)) for cell in cells)


def test_returns_are_raw_and_episodic_return_is_the_mean_of_the_last_100(script, tmp_path):
    result = script.train(tiny(script, tmp_path, env_id="space/ThreeSteps-v0", total_timesteps=1000))
    row = progress(result.run_dir)[-1]
    assert int(row["episodes"]) == len(result.episode_returns) > 200
    assert float(row["episodic_return"]) == pytest.approx(np.mean(result.episode_returns[-100:]))
    if hasattr(script.Args, "num_steps"):
        assert result.episode_returns == pytest.approx(ThreeSteps.returns)


def test_steps_are_those_of_the_environment_without_the_resets(script, tmp_path):
    result = script.train(tiny(script, tmp_path, env_id="space/ThreeSteps-v0"))
    rows = progress(result.run_dir)
    if hasattr(script.Args, "num_steps"):
        assert int(rows[-1]["step"]) == ThreeSteps.steps < len(rows) * 4 * 8
    else:
        assert int(rows[-1]["step"]) == len(result.episode_returns) * 3


def test_tensorboard_holds_the_numbers_of_progress_csv(script, tmp_path):
    run_dir = run_with_a_lost_row(script, tmp_path)
    time.sleep(1)  # event files are ordered by their names, which have the second
    resume(script, run_dir)
    events, rows = EventAccumulator(str(run_dir)).Reload(), progress(run_dir)
    assert set(events.Tags()["scalars"]) == set(rows[0])
    for name in rows[0]:
        scalars = {event.step: event.value for event in events.Scalars(name)}
        cells = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert scalars == pytest.approx(cells, rel=1e-5)


def test_the_checkpoint_is_that_of_the_returned_policy(script, tmp_path):
    result = script.train(tiny(script, tmp_path))
    state = checkpoint(result.run_dir)
    assert_same(state["policy"], result.policy.state_dict())
    assert state["policy"]["net.0.count"] == state["step"]
    assert state["episode_returns"].tolist() == result.episode_returns


# ---------------------------------------------------------------------------- that it repeats


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_seed_fixes_progress_csv_and_the_weights_to_the_last_bit(script, tmp_path, env_id):
    first, again, other = (
        script.train(tiny(script, tmp_path / str(i), env_id=env_id, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert progress(first.run_dir, TIMES) == progress(again.run_dir, TIMES)
    assert_same(first.policy.state_dict(), again.policy.state_dict())
    assert progress(first.run_dir, TIMES) != progress(other.run_dir, TIMES)


def test_every_environment_has_its_own_seed(script, tmp_path):
    for seed in (1, 2):
        script.train(tiny(script, tmp_path, env_id="space/ThreeSteps-v0", seed=seed))
    assert len(set(ThreeSteps.seeds)) == len(ThreeSteps.seeds) >= 8


# ---------------------------------------------------------------------------- that it resumes


def test_ctrl_c_keeps_the_finished_iterations(script, tmp_path, monkeypatch):
    policy_loss, calls = script.policy_loss, []

    def loss_and_ctrl_c(*args):
        if checkpoint(only_run(tmp_path))["iteration"] == 3 and not calls:
            calls.append(signal.raise_signal(signal.SIGINT))
        return policy_loss(*args)

    monkeypatch.setattr(script, "policy_loss", loss_and_ctrl_c)
    try:
        result = script.train(tiny(script, tmp_path, total_timesteps=1000))
    except KeyboardInterrupt:
        pytest.fail("KeyboardInterrupt")
    assert checkpoint(result.run_dir)["iteration"] in (3, 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_whole(result.run_dir)


@pytest.mark.parametrize("where", ["add_scalar", "save"])
def test_ctrl_c_while_an_iteration_is_written_keeps_row_and_checkpoint_together(
    script, tmp_path, monkeypatch, where
):
    owner = script.SummaryWriter if where == "add_scalar" else torch
    original, calls = getattr(owner, where), []

    def write_and_ctrl_c(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        original(*args)

    monkeypatch.setattr(owner, where, write_and_ctrl_c)
    try:
        result = script.train(tiny(script, tmp_path, total_timesteps=1000))
    except KeyboardInterrupt:
        pytest.fail("KeyboardInterrupt")
    assert checkpoint(result.run_dir)["iteration"] < 5
    assert_whole(result.run_dir)


def test_a_resumed_run_goes_on_to_its_budget(script, tmp_path):
    run_dir = interrupted_run(script, tmp_path)
    before = progress(run_dir)
    result = resume(script, run_dir)
    after = progress(run_dir)
    assert result.run_dir == run_dir and after[:2] == before and len(after) > 2
    assert int(after[-2]["step"]) < 160 <= int(after[-1]["step"])
    assert float(after[2]["seconds"]) > float(before[-1]["seconds"])
    assert int(after[-1]["episodes"]) == len(result.episode_returns)
    assert_whole(run_dir)


@pytest.mark.parametrize("iteration", [0, 2])
def test_a_resumed_run_starts_with_the_saved_state_to_the_last_bit(script, tmp_path, monkeypatch, iteration):
    run_dir = interrupted_run(script, tmp_path, iteration)
    saved = checkpoint(run_dir)
    if iteration:
        optimizers = {name for name in saved if name.endswith("optimizer")}  # npg.py and trpo.py have one
        assert "value_optimizer" in optimizers
        assert all(saved[name]["state"][0]["exp_avg"].any() for name in optimizers)

    def stop(run):
        names = "step", "iteration", "seconds", "progress_size"
        state = {name: getattr(run, name) for name in names}
        state |= {name: module.state_dict() for name, module in run.modules.items()}
        state["reward_rms"] = {name: float(value) for name, value in run.reward_rms.items()}
        state["episode_returns"] = torch.tensor(list(run.episode_returns), dtype=torch.float64)
        assert_same(state | {"rng": torch.get_rng_state()}, saved)
        raise InterruptedError

    monkeypatch.setattr(script.Run, "__enter__", stop)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        resume(script, run_dir)


def test_a_resumed_run_starts_its_environments_from_other_seeds(script, tmp_path):
    run_dir = interrupted_run(script, tmp_path, env_id="space/ThreeSteps-v0")
    first, ThreeSteps.seeds = set(ThreeSteps.seeds), []
    resume(script, run_dir)
    assert len(ThreeSteps.seeds) >= 4
    if hasattr(script.Args, "num_steps"):
        assert not first & set(ThreeSteps.seeds)


def test_resuming_twice_from_the_same_folder_gives_the_same_run(script, tmp_path):
    run_dir = interrupted_run(script, tmp_path / "runs")
    shutil.copytree(run_dir, tmp_path / "copy")
    first, again = resume(script, run_dir), resume(script, tmp_path / "copy")
    assert progress(run_dir, TIMES) == progress(tmp_path / "copy", TIMES)
    assert_same(first.policy.state_dict(), again.policy.state_dict())


def test_the_command_line_extends_a_finished_run_with_the_arguments_of_its_folder(
    script, tmp_path, monkeypatch
):
    args = tiny(script, tmp_path, env_id="Pendulum-v1", gamma=0.9, seed=5)
    run_dir = script.train(args).run_dir
    before = progress(run_dir)
    argv = [script.__file__, "--resume", f"{run_dir}/", "--total-timesteps", "400"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(script.__file__, run_name="__main__")
    assert script.load_args(run_dir) == dataclasses.replace(args, resume=str(run_dir), total_timesteps=400)
    assert progress(run_dir)[: len(before)] == before
    assert checkpoint(run_dir)["step"] >= 400
    assert_whole(run_dir)


def test_rows_after_the_checkpoint_are_dropped_on_resume(script, tmp_path):
    run_dir = interrupted_run(script, tmp_path)
    before = (run_dir / "progress.csv").read_text()
    with open(run_dir / "progress.csv", "a") as file:
        file.write(before.splitlines()[-1].replace(",", "9,", 1) + "\n123,4")
    resume(script, run_dir)
    assert (run_dir / "progress.csv").read_text().startswith(before)
    assert_whole(run_dir)


def test_a_resumed_run_that_stops_at_once_can_be_resumed_again(script, tmp_path):
    run_dir = interrupted_run(script, tmp_path)
    with open(run_dir / "progress.csv", "a") as file:
        file.write("123,4")
    train_until(script, 2, script.load_args(run_dir))
    assert_whole(run_dir)
    resume(script, run_dir)
    assert_whole(run_dir)


# ---------------------------------------------------------------------------- when it is saved


@pytest.fixture(params=ALL)
def as_it_is(request):
    """A script with its own rule: a checkpoint at the start, at most every 5 s, and at the end."""
    ThreeSteps.clear()
    return importlib.import_module(request.param)


def record_saves(monkeypatch, script):
    """The iteration of every checkpoint."""
    iterations, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run: (iterations.append(run.iteration), save(run))[1])
    return iterations


def test_a_checkpoint_at_the_start_every_5_seconds_and_at_the_end(as_it_is, tmp_path, monkeypatch):
    script, now, log = as_it_is, [1000.0], as_it_is.Run.log
    durations = iter([2.5, 2.5, 3.75, 15.0, 1.25, 2.5, 0.625] + [0.0] * 99)

    def log_later(run, *rest):
        now[0] += next(durations)
        log(run, *rest)

    monkeypatch.setattr(script.Run, "log", log_later)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    saves = record_saves(monkeypatch, script)
    args = tiny(script, tmp_path, env_id="space/ThreeSteps-v0", total_timesteps=300)
    result = script.train(args)
    rows = progress(result.run_dir)
    assert len(rows) > 7 and saves == [0, 2, 4, len(rows)]
    assert_whole(result.run_dir)
    state = checkpoint(result.run_dir)
    assert state["step"] >= 300 and state["episode_returns"].tolist() == result.episode_returns
    assert_same(state["policy"], result.policy.state_dict())


def test_a_save_that_takes_long_does_not_come_after_every_iteration(as_it_is, tmp_path, monkeypatch):
    """The 5 seconds count from the end of a save: a slow disk cannot take up all of the time."""
    script, now, log = as_it_is, [0.0], as_it_is.Run.log

    def log_later(run, *rest):
        now[0] += 2.5
        log(run, *rest)

    def slow_save(*args, save=torch.save):
        now[0] += 30.0
        save(*args)

    monkeypatch.setattr(script.Run, "log", log_later)
    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    saves = record_saves(monkeypatch, script)
    result = script.train(tiny(script, tmp_path, total_timesteps=400))
    last = len(progress(result.run_dir))
    assert saves == [*range(0, last + 1, 2), last]


def test_the_first_ctrl_c_saves_the_iteration_it_came_in(as_it_is, tmp_path, monkeypatch):
    script, log = as_it_is, as_it_is.Run.log

    def log_and_ctrl_c(run, *rest):
        log(run, *rest)
        if run.iteration == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "SAVE_EVERY", math.inf)
    monkeypatch.setattr(script.Run, "log", log_and_ctrl_c)
    saves = record_saves(monkeypatch, script)
    result = script.train(tiny(script, tmp_path, total_timesteps=1000))
    assert saves == [0, 3]
    assert_whole(result.run_dir)
    assert_same(checkpoint(result.run_dir)["policy"], result.policy.state_dict())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, ValueError])
def test_an_error_keeps_the_last_checkpoint_and_a_resumed_run_goes_on_from_there(script, tmp_path, error):
    run_dir = run_with_a_lost_row(script, tmp_path, error)
    before, state = progress(run_dir), checkpoint(run_dir)
    assert state["step"] == int(before[1]["step"]) == state["policy"]["net.0.count"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(script, run_dir)
    after = progress(run_dir)
    assert after[:2] == before[:2] and after[2] != before[2]
    assert checkpoint(run_dir)["step"] >= 600
    assert_whole(run_dir)


def test_the_error_is_not_hidden_but_the_second_ctrl_c_is(script, tmp_path, monkeypatch):
    def raise_error(*args):
        raise error

    monkeypatch.setattr(script, "policy_loss", raise_error)
    for error in (ValueError("x"), FloatingPointError("x"), SystemExit(2)):
        with pytest.raises(type(error)):
            script.train(tiny(script, tmp_path))
    error = KeyboardInterrupt()
    assert checkpoint(script.train(tiny(script, tmp_path)).run_dir)["iteration"] == 0


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_during_the_last_save(script, tmp_path, monkeypatch, times):
    """Once: the save is finished. Twice: at once, and the checkpoint before it stays."""
    save, calls = torch.save, []

    def save_and_ctrl_c(*args):
        calls.append(args)
        for _ in range(times if len(calls) == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(script, "SAVE_EVERY", math.inf)
    monkeypatch.setattr(torch, "save", save_and_ctrl_c)
    try:
        run_dir = script.train(tiny(script, tmp_path)).run_dir
    except KeyboardInterrupt:
        pytest.fail("KeyboardInterrupt")
    assert len(calls) == 2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint(run_dir)["iteration"] == (len(progress(run_dir)) if times == 1 else 0)
    resume(script, run_dir, total_timesteps=300)
    assert_whole(run_dir)


def test_a_full_disk_at_the_last_save_closes_everything_and_keeps_the_checkpoint_before(
    script, tmp_path, monkeypatch
):
    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left on device")

    def log_and_fill(run, *rest):
        log(run, *rest)
        monkeypatch.setattr(torch, "save", full)

    log = script.Run.log
    monkeypatch.setattr(script.Run, "log", log_and_fill)
    monkeypatch.setattr(script, "SAVE_EVERY", math.inf)
    args = tiny(script, tmp_path, vectorization="async")
    with pytest.raises(OSError, match="no space"):
        script.train(args)
    monkeypatch.undo()
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run_dir = only_run(tmp_path)
    assert checkpoint(run_dir)["iteration"] == 0 < len(progress(run_dir))
    resume(script, run_dir)
    assert_whole(run_dir)
    assert not list(run_dir.glob("*.tmp"))


# ---------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize(
    "what, value, after",
    [
        ("reward", math.nan, 20),
        ("reward", -math.inf, 20),
        ("reward", 1e300, 20),  # infinite in float32
        ("observation", math.nan, 20),
        ("observation", math.inf, 20),
        ("observation", 1e300, 20),
        ("observation", 1e25, 20),  # its square is infinite in float32
        ("observation", math.nan, 0),
    ],
)
def test_what_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    script, tmp_path, monkeypatch, what, value, after
):
    for name, setting in (("what", what), ("value", value), ("after", after)):
        monkeypatch.setattr(Bad, name, setting)
    args = tiny(script, tmp_path, env_id="Bad-v0", normalize_rewards=False)
    with pytest.raises(FloatingPointError) as error:
        script.train(args)
    state = checkpoint(only_run(tmp_path))
    assert (state["step"] > 0) == (after > 0)
    assert f"step {state['step']}" in str(error.value) and what in str(error.value)
    assert_finite(state)


@pytest.mark.parametrize("spoil", [lambda loss: loss * math.nan, lambda loss: loss + math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    script, tmp_path, monkeypatch, spoil
):
    policy_loss, saved = script.policy_loss, []

    def loss_after_two_iterations(*args):
        run_dir = only_run(tmp_path)
        if checkpoint(run_dir)["iteration"] < 2:
            return policy_loss(*args)
        saved.append(checkpoint(run_dir))
        return spoil(policy_loss(*args))

    monkeypatch.setattr(script, "policy_loss", loss_after_two_iterations)
    with pytest.raises(FloatingPointError, match="nan|inf") as error:
        script.train(tiny(script, tmp_path))
    assert f"step {saved[0]['step']}" in str(error.value) and "loss" in str(error.value)
    assert_same(checkpoint(only_run(tmp_path)), saved[0])
    assert_finite(saved[0])
    assert_whole(only_run(tmp_path))


@pytest.mark.parametrize("field", ["learning_rate", "value_learning_rate"])
def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(script, tmp_path, field):
    if not hasattr(script.Args, field):
        pytest.skip(f"no {field}")
    if field == "learning_rate" and hasattr(script.Args, "max_kl"):
        pytest.skip("a step that leaves the trust region is undone: test_trust_region_updates.py")
    sizes = {"num_minibatches": 1, "update_epochs": 1, "value_epochs": 1}
    with pytest.raises(FloatingPointError):
        script.train(tiny(script, tmp_path, **sizes, **{field: math.inf}))
    assert_finite(checkpoint(only_run(tmp_path)))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_batches_of_a_single_step_stay_finite(script, tmp_path, num_envs):
    sizes = {"num_envs": num_envs, "num_steps": 1, "num_minibatches": 1, "total_timesteps": 20}
    result = script.train(tiny(script, tmp_path, env_id="OneStep-v0", **sizes))
    assert len(result.episode_returns) >= 20
    assert_finite(checkpoint(result.run_dir))
    assert_whole(result.run_dir)


# ---------------------------------------------------------------------------- every way to stop


def start(name, runs_dir, *argv, code=None, **kwargs):
    """Start a run that would take hours, in a process group of its own."""
    path = importlib.import_module(name).__file__
    first = ["-c", code] if code else [path]
    sizes = ["--total-timesteps", "100000000", "--num-envs", "4", "--runs-dir", str(runs_dir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    command, env = [sys.executable, *first, *sizes, *argv], {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(command, cwd=Path(path).parent, env=env, start_new_session=True, **pipes)


def wait_for_rows(process, runs_dir, rows):
    """Wait until progress.csv has so many rows; returns the run folder."""
    deadline = time.time() + 60
    while time.time() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        if list(Path(runs_dir).glob("*/progress.csv")) and len(progress(only_run(runs_dir))) >= rows:
            return only_run(runs_dir)
        time.sleep(0.02)
    raise TimeoutError


def finish(process):
    """Wait for the end of a process and of all that it started; returns stdout and stderr."""
    try:
        texts = [(text or b"").decode() for text in process.communicate(timeout=20)]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    deadline = time.time() + 10
    while time.time() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return texts
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a child process is left")


def assert_resumes(name, run_dir):
    """From the checkpoint: the rows up to it stay, those after it are done again."""
    before, rows = checkpoint(run_dir), progress(run_dir)
    script = importlib.import_module(name)
    result = resume(script, run_dir, total_timesteps=before["step"] + 300)
    assert checkpoint(run_dir)["step"] >= before["step"] + 300
    assert progress(run_dir)[: before["iteration"]] == rows[: before["iteration"]]
    assert len(result.episode_returns) >= len(before["episode_returns"])
    assert_whole(run_dir)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_ctrl_c_ends_a_process_cleanly(tmp_path, name, vectorization):
    process = start(name, tmp_path, "--vectorization", vectorization)
    run_dir = wait_for_rows(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process)
    assert process.returncode == 0 and "Traceback" not in err and str(run_dir) in out
    assert checkpoint(run_dir)["iteration"] >= 3
    assert_whole(run_dir)
    assert_resumes(name, run_dir)


@pytest.mark.parametrize("name", PROCESSES)
def test_ctrl_c_while_half_of_the_workers_have_answered_ends_a_process_cleanly(tmp_path, name):
    code = f"""
import os, pathlib, signal, time, gymnasium.envs.classic_control, tyro, {name} as script

TRAINER, SEEDS = os.getpid(), pathlib.Path({str(tmp_path)!r}, "seeds")

class CtrlC(gymnasium.envs.classic_control.PendulumEnv):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seed, self.steps = seed, 0
            (SEEDS / str(seed)).touch()
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.steps == 100 and self.seed == max(int(path.name) for path in SEEDS.iterdir()):
            time.sleep(0.3)  # the others have answered and are read
            os.kill(TRAINER, signal.SIGINT)
            time.sleep(0.3)
        return super().step(action)

gymnasium.register("CtrlC-v0", CtrlC, max_episode_steps=10)
script.train(tyro.cli(script.Args))
"""
    (tmp_path / "seeds").mkdir()
    argv = "--env-id", "CtrlC-v0", "--vectorization", "async"
    process = start(name, tmp_path / "runs", *argv, code=code)
    out, err = finish(process)
    run_dir = only_run(tmp_path / "runs")
    assert process.returncode == 0 and "Traceback" not in err and str(run_dir) in out
    assert checkpoint(run_dir)["step"] > 0
    assert_whole(run_dir)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("vectorization, saves", [("sync", 1), ("sync", 2), ("async", 2)])
def test_a_killed_process_leaves_a_checkpoint_that_resumes(tmp_path, name, vectorization, saves):
    """Killed with the checkpoint of its start, or 5 s later with the next one and some rows more."""
    process = start(name, tmp_path, "--vectorization", vectorization)
    run_dir = wait_for_rows(process, tmp_path, 3)
    deadline = time.time() + 60
    while saves == 2 and checkpoint(run_dir)["iteration"] == 0 and time.time() < deadline:
        time.sleep(0.05)
    wait_for_rows(process, tmp_path, checkpoint(run_dir)["iteration"] + 3)
    time.sleep(np.random.uniform(0, 0.1))
    process.kill()
    finish(process)
    state, rows = checkpoint(run_dir), progress(run_dir)
    assert saves == 1 or state["iteration"] > 0
    assert len(rows) >= state["iteration"]
    assert state["iteration"] == 0 or int(rows[state["iteration"] - 1]["step"]) == state["step"]
    assert_resumes(name, run_dir)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_killed_while_it_writes_the_checkpoint_leaves_the_one_before(tmp_path, name):
    code = f"""
import io, os, signal, sys, torch, tyro, {name} as script
save, saves, script.SAVE_EVERY = torch.save, [], 0

def save_half_of_the_fourth(state, file):
    saves.append(state["step"])
    if len(saves) < 4:
        return save(state, file)
    save(state, whole := io.BytesIO())
    file = file if hasattr(file, "write") else open(file, "wb")
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    print(*saves, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half_of_the_fourth
script.train(tyro.cli(script.Args))
"""
    process = start(name, tmp_path, code=code)
    _, err = finish(process)
    steps = [int(step) for step in err.split()]
    assert process.returncode == -signal.SIGKILL and len(steps) == 4
    run_dir = only_run(tmp_path)
    assert checkpoint(run_dir)["step"] == steps[2] and len(progress(run_dir)) == 3
    assert_resumes(name, run_dir)
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("name", PROCESSES)
def test_plain_lines_come_as_they_are_printed_when_there_is_no_terminal(tmp_path, name):
    process = start(name, tmp_path)
    wait_for_rows(process, tmp_path, 2)
    assert select.select([process.stdout], [], [], 5)[0]
    process.send_signal(signal.SIGINT)
    out, err = finish(process)
    assert re.match(r"step \d+ .*episodic_return", out)
    assert "\r" not in out and err == ""


@pytest.mark.parametrize("name", PROCESSES)
def test_a_progress_bar_on_a_terminal(tmp_path, name):
    terminal, child = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = start(name, tmp_path, stdin=child, stdout=child, stderr=child)
    os.close(child)
    wait_for_rows(process, tmp_path, 20)
    process.send_signal(signal.SIGINT)
    output = b""
    while select.select([terminal], [], [], 10)[0]:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    finish(process)
    assert process.returncode == 0
    text = output.decode()
    assert re.search(r"\r.*0%\|.* steps/s", text) and "episodic_return=" in text
    assert not re.search(r"^step \d", text, re.MULTILINE)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_train_works_outside_the_main_thread(script, tmp_path, vectorization):
    results = []
    args = tiny(script, tmp_path, vectorization=vectorization)
    thread = threading.Thread(target=lambda: results.append(script.train(args)))
    thread.start()
    thread.join(60)
    assert len(results) == 1
    assert_whole(results[0].run_dir)
