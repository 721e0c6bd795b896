"""n-step returns, the shared optimizer, and the workers of a3c_nstep.py: what they do and how they end."""

import copy
import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import a3c_environments
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import a3c_nstep
from a3c_nstep import SharedRMSprop, gradient_step, n_step_returns
from vpg_gae import compute_gae

MODULE = a3c_environments.__name__
TIMES = {"seconds", "steps_per_second"}
GOES_ON, TERMINATED, TRUNCATED = range(3)
probabilities = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)

# ---------------------------------------------------------------------------- n-step returns


@st.composite
def segments(draw):
    """rewards (T, ...), values (T+1, ...), terminations and dones (T, ...) in float64."""
    T, shape = draw(st.integers(1, 10)), draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    numbers = st.floats(-10, 10, width=32)
    rewards = draw(hnp.arrays(np.float64, (T, *shape), elements=numbers))
    values = draw(hnp.arrays(np.float64, (T + 1, *shape), elements=numbers))
    ends = draw(hnp.arrays(np.int8, (T, *shape), elements=st.sampled_from([GOES_ON, TERMINATED, TRUNCATED])))
    return tuple(map(torch.as_tensor, (rewards, values, ends == TERMINATED, ends != GOES_ON)))


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


@settings(deadline=None)
@given(segments(), probabilities, st.integers(1, 12))
def test_at_most_n_rewards_then_the_value_of_the_state_reached(segment, gamma, n):
    rewards, values, terminations, dones = segment
    expected = torch.zeros_like(rewards)
    for t, *i in np.ndindex(*rewards.shape):
        total, k = 0.0, 0
        while True:
            total += gamma**k * rewards[(t + k, *i)].item()
            k += 1
            if k == n or dones[(t + k - 1, *i)] or t + k == len(rewards):
                break
        if not terminations[(t + k - 1, *i)]:
            total += gamma**k * values[(t + k, *i)].item()
        expected[(t, *i)] = total
    before = [x.clone() for x in segment]
    assert_equal(n_step_returns(*segment, gamma, n), expected)
    assert all(torch.equal(a, b) for a, b in zip(segment, before))


@settings(deadline=None)
@given(segments(), probabilities)
def test_one_step_is_the_td_target(segment, gamma):
    rewards, values, terminations, _ = segment
    assert_equal(n_step_returns(*segment, gamma, 1), rewards + gamma * values[1:] * ~terminations)


@settings(deadline=None)
@given(segments(), probabilities, st.integers(0, 3))
def test_all_steps_are_the_return_of_gae_with_lambda_1(segment, gamma, more):
    rewards, values, *_ = segment
    returns = n_step_returns(*segment, gamma, len(rewards) + more)
    assert_equal(returns, compute_gae(*segment, gamma, 1.0) + values[:-1])


@settings(deadline=None)
@given(segments(), probabilities, probabilities)
def test_gae_is_the_weighted_mean_of_the_n_step_advantages(segment, gamma, gae_lambda):
    """sum_n (1 - lambda) lambda^(n-1) A^(n); A^(n) stays as it is from n = T on, with all the weight left."""
    rewards, values, *_ = segment
    T = len(rewards)
    advantages = [n_step_returns(*segment, gamma, n) - values[:-1] for n in range(1, T + 1)]
    weights = [(1 - gae_lambda) * gae_lambda ** (n - 1) for n in range(1, T)] + [gae_lambda ** (T - 1)]
    mean = sum(weight * advantage for weight, advantage in zip(weights, advantages))
    assert_equal(compute_gae(*segment, gamma, gae_lambda), mean)


# ---------------------------------------------------------------------------- the shared optimizer


def rmsprop(param, square_avg, grad, lr):
    """The step of A3C, with eps inside the root; returns the new parameters and statistics."""
    square_avg = 0.99 * square_avg + 0.01 * grad**2
    return param - lr * grad / (square_avg + 1e-5) ** 0.5, square_avg


def worker_copy(shared_net, square_avgs, lr):
    net = copy.deepcopy(shared_net)
    optimizer = SharedRMSprop(net, shared_net, square_avgs)
    optimizer.param_groups[0]["lr"] = lr
    return net, optimizer


@pytest.mark.parametrize("num_workers", [1, 2])
def test_four_equal_gradients_are_not_accumulated(num_workers):
    """Where shared.grad is the local gradient, four gradients of 1 count as 1, 2, 3 and 4."""
    torch.manual_seed(1)
    shared_net = nn.Linear(3, 2).double()
    square_avgs = nn.ParameterList(map(torch.zeros_like, shared_net.parameters()))
    right = wrong = [(param.detach().clone(), torch.zeros_like(param)) for param in shared_net.parameters()]
    workers = [worker_copy(shared_net, square_avgs, lr=0.1) for _ in range(num_workers)]
    for i in range(4):
        net, optimizer = workers[i % num_workers]
        gradient_step(optimizer, sum(param.sum() for param in net.parameters()), max_grad_norm=1e9)
        right = [rmsprop(*state, torch.ones_like(state[0]), 0.1) for state in right]
        wrong = [rmsprop(*state, torch.full_like(state[0], i + 1), 0.1) for state in wrong]
        for (expected, _), shared_param, param in zip(right, shared_net.parameters(), net.parameters()):
            assert_equal(shared_param.data, expected)
            assert torch.equal(shared_param, param)  # the copy is one of the new parameters
    assert_equal([x.data for x in square_avgs], [square_avg for _, square_avg in right])
    assert not torch.allclose(right[0][0], wrong[0][0], atol=0.01)


def test_gradients_are_scaled_down_to_the_norm_and_refused_if_not_finite():
    shared_net = nn.Linear(3, 1).double()
    square_avgs = nn.ParameterList(map(torch.zeros_like, shared_net.parameters()))
    net, optimizer = worker_copy(shared_net, square_avgs, lr=0.1)
    before = copy.deepcopy(shared_net.state_dict())
    gradient_step(optimizer, 1000 * sum(param.sum() for param in net.parameters()), max_grad_norm=0.5)
    expected, _ = rmsprop(before["bias"], 0.0, torch.full((1,), 0.25).double(), 0.1)  # 4 parameters
    torch.testing.assert_close(shared_net.bias.data, expected, rtol=1e-5, atol=0)
    before = copy.deepcopy(shared_net.state_dict())
    with pytest.raises(FloatingPointError, match="nan"):
        gradient_step(
            optimizer, torch.nan * sum(param.sum() for param in net.parameters()), max_grad_norm=0.5
        )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), shared_net.state_dict().values()))


# ---------------------------------------------------------------------------- one worker in this process


class Orders:
    """The pipe of a worker whose parent has said everything in advance; keeps the reports."""

    def __init__(self, *orders, second=lambda: None):
        self.orders, self.reports, self.second = [*orders, None], [], second

    def recv(self):
        if len(self.reports) == 1:
            self.second()
        return self.orders.pop(0)

    def send(self, report):
        self.reports.append(copy.deepcopy(report))


def shared_modules(args):
    envs = a3c_nstep.make_envs(args)
    policy = a3c_nstep.Policy(envs.single_observation_space, envs.single_action_space)
    value = a3c_nstep.Value(envs.single_observation_space)
    statistics = [nn.ParameterList(map(torch.zeros_like, net.parameters())) for net in (policy, value)]
    names = "policy", "value", "policy_optimizer", "value_optimizer"
    return nn.ModuleDict(dict(zip(names, (policy, value, *statistics))))


@pytest.mark.parametrize("env_id, after", [("Terminates-v0", 0.0), ("Truncated-v0", 7.0)])
def test_the_update_of_a_worker_bootstraps_after_a_truncation_alone(monkeypatch, env_id, after):
    """V = 7 everywhere, rewards 1, 1, 1, the end: one update of both networks against closed forms."""
    batches, rollout = [], a3c_nstep.rollout
    monkeypatch.setattr(a3c_nstep, "rollout", lambda *args: batches.append(rollout(*args)) or batches[-1])
    args = a3c_nstep.Args(env_id=f"{MODULE}:{env_id}", num_steps=3, total_timesteps=12, gamma=0.5)
    args = dataclasses.replace(args, normalize_rewards=False, max_grad_norm=1e9, ent_coef=0.01)
    shared = shared_modules(args)
    with torch.no_grad():
        shared["value"].net[-1].weight.zero_()
        shared["value"].net[-1].bias.fill_(7)
        for square_avg in [*shared["policy_optimizer"], *shared["value_optimizer"]]:
            square_avg.uniform_(1e-4, 1e-2)
    old, steps = copy.deepcopy(shared), torch.tensor([3])  # a quarter of the steps is done
    a3c_nstep.work(0, args, 0, shared, steps, [Orders((6, {}))])
    ((obs, actions, *_),) = batches

    returns = torch.tensor([1 + 0.5 + 0.25 + 0.125 * after, 1 + 0.5 + 0.25 * after, 1 + 0.5 * after])
    dist = old["policy"](obs[:-1, 0])
    policy_loss = -(dist.log_prob(actions[:, 0]) * (returns - 7) + 0.01 * dist.entropy()).mean()
    value_loss = (old["value"](obs[:-1, 0]) - returns).pow(2).mean()
    for name, loss, lr in [
        ("policy", policy_loss, args.learning_rate),
        ("value", value_loss, args.value_learning_rate),
    ]:
        params = list(old[name].parameters())
        for param, square_avg, grad, new, new_square_avg in zip(
            params,
            old[f"{name}_optimizer"],
            torch.autograd.grad(loss, params),
            shared[name].parameters(),
            shared[f"{name}_optimizer"],
        ):
            expected = rmsprop(param, square_avg, grad, 0.75 * lr)
            torch.testing.assert_close((new, new_square_avg), expected, rtol=1e-4, atol=1e-6)
    assert steps.tolist() == [6]


def test_a_worker_reports_its_observations_returns_reward_scale_and_mean_metrics():
    args = a3c_nstep.Args(env_id=f"{MODULE}:Terminates-v0", num_steps=4, total_timesteps=100)
    pipe, steps = Orders((5, {}), (9, {"count": 1e9}), (9, {})), torch.tensor([0, 1])
    a3c_nstep.work(0, args, 0, shared_modules(args), steps, [pipe])
    # each rollout has an episode and its reset; the last order is behind the steps already, and gets one too
    assert [len(obs) for obs, *_ in pipe.reports] == [6, 3, 3] and steps.tolist() == [12, 1]
    assert [returns.tolist() for _, returns, *_ in pipe.reports] == [[3, 3], [3], [3]]
    assert [round(rms["count"]) for *_, rms, _ in pipe.reports] == [6, 10**9 + 3, 10**9 + 6]
    assert all(set(metrics) == {"policy_loss", "entropy", "kl", "value_loss"} for *_, metrics in pipe.reports)
    assert pipe.reports[0][-1]["entropy"] == pytest.approx(np.log(2), rel=0.1)


def test_a_worker_with_several_environments_and_box_actions():
    args = a3c_nstep.Args(env_id="Pendulum-v1", num_envs=3, num_steps=4, total_timesteps=100)
    pipe, shared = Orders((20, {})), shared_modules(args)
    a3c_nstep.work(0, args, 0, shared, torch.tensor([0]), [pipe])
    ((obs, returns, _, metrics),) = pipe.reports
    assert obs.shape == (24, 3) and len(np.unique(obs, axis=0)) == 24 and len(returns) == 0
    assert np.isfinite(list(metrics.values())).all()
    assert all(square_avg.max() > 0 for square_avg in shared["policy_optimizer"])


def test_a_worker_takes_the_shared_weights_and_statistics_with_each_order(monkeypatch):
    args = a3c_nstep.Args(env_id=f"{MODULE}:Terminates-v0", total_timesteps=100)
    shared = shared_modules(args)
    policies, batches, values, changed = [], [], [], []
    rollout, n_step_returns = a3c_nstep.rollout, a3c_nstep.n_step_returns

    def recorded_rollout(envs, policy, *rest):
        policies.append(copy.deepcopy(policy.state_dict()))
        batches.append(rollout(envs, policy, *rest))
        return batches[-1]

    def recorded_returns(rewards, some_values, *rest):
        values.append(some_values)
        return n_step_returns(rewards, some_values, *rest)

    def change():
        for tensor in shared.state_dict().values():
            tensor += 0.1
        changed.append(copy.deepcopy(shared))

    monkeypatch.setattr(a3c_nstep, "rollout", recorded_rollout)
    monkeypatch.setattr(a3c_nstep, "n_step_returns", recorded_returns)
    a3c_nstep.work(0, args, 0, shared, torch.tensor([0]), [Orders((1, {}), (1, {}), second=change)])
    assert len(policies) == 2
    torch.testing.assert_close(policies[1], changed[0]["policy"].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(values[1], changed[0]["value"](batches[1][0]).detach(), rtol=0, atol=0)


# ---------------------------------------------------------------------------- workers


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """The folder in which the environments of all processes leave their marks."""
    path = tmp_path / "marks"
    path.mkdir()
    monkeypatch.setenv("A3C_MARKS", str(path))
    return path


def tiny(runs_dir, env_id, **changes):
    sizes = {"num_steps": 5, "total_timesteps": 1000, "log_interval": 300}
    args = {"env_id": env_id, "runs_dir": str(runs_dir), **sizes, **changes}
    return a3c_nstep.Args(**args)


def progress(run_dir, without=()):
    with open(Path(run_dir, "progress.csv"), newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [{name: cell for name, cell in row.items() if name not in without} for row in rows]


def checkpoint(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)


def counted(marks):
    """Steps in all environments, a number for each process."""
    return [path.stat().st_size for path in marks.glob("steps_*")]


def assert_exact(result, marks, unfinished):
    """Every step of every environment is counted once, everywhere; episodes of 20 steps may be unfinished."""
    state, rows = checkpoint(result.run_dir), progress(result.run_dir)
    assert sum(counted(marks)) == state["step"] == int(rows[-1]["step"])
    assert state["policy"]["net.0.count"] == state["value"]["net.0.count"] == state["step"]
    assert len(rows) == state["iteration"]
    assert int(rows[-1]["episodes"]) == len(result.episode_returns)
    assert state["step"] - unfinished * 20 < sum(result.episode_returns) <= state["step"]


def test_two_workers_share_everything_count_every_step_and_resume(tmp_path, marks):
    args = tiny(tmp_path / "runs", f"{MODULE}:Marking-v0")
    result = a3c_nstep.train(args)
    assert_exact(result, marks, unfinished=2)
    assert all(tensor.is_shared() for tensor in result.policy.state_dict().values())
    first = checkpoint(result.run_dir)
    assert first["episode_returns"].tolist() == result.episode_returns
    assert all(
        torch.equal(a, b) for a, b in zip(first["policy"].values(), result.policy.state_dict().values())
    )
    for name in ("policy_optimizer", "value_optimizer"):
        assert all(square_avg.max() > 0 for square_avg in first[name].values())
    assert 1000 <= first["step"] <= 1000 + 2 * 5

    resumed = a3c_nstep.train(dataclasses.replace(args, resume=str(result.run_dir), total_timesteps=2000))
    assert resumed.run_dir == result.run_dir
    assert_exact(resumed, marks, unfinished=4)
    second = checkpoint(result.run_dir)
    assert second["step"] >= 2000 and len(counted(marks)) == 4
    assert resumed.episode_returns[: len(result.episode_returns)] == result.episode_returns
    for name in ("policy", "policy_optimizer", "value_optimizer"):
        assert all(not torch.equal(a, b) for a, b in zip(first[name].values(), second[name].values()))
    assert second["reward_rms"]["count"] > first["reward_rms"]["count"] > 300


def test_one_worker_with_a_seed_repeats_to_the_last_bit(tmp_path):
    sizes = {"num_workers": 1, "total_timesteps": 600, "log_interval": 200}
    first, second, other = (tiny(tmp_path, "CartPole-v1", seed=seed, **sizes) for seed in (1, 1, 2))
    with ThreadPoolExecutor() as thread:
        results = (
            a3c_nstep.train(first),
            thread.submit(a3c_nstep.train, second).result(),
            a3c_nstep.train(other),
        )
    runs = [result.run_dir for result in results]
    rows, states = [progress(run, TIMES) for run in runs], [checkpoint(run) for run in runs]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 3
    for state in states:
        del state["seconds"], state["progress_size"]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_learns_cartpole(tmp_path):
    sizes = {"num_workers": 1, "num_steps": 20, "total_timesteps": 15_000, "log_interval": 2000}
    returns = a3c_nstep.train(tiny(tmp_path, "CartPole-v1", **sizes)).episode_returns
    assert np.mean(returns[:20]) < 40 and np.mean(returns[-20:]) > 100


# ---------------------------------------------------------------------------- every way to stop


def start(runs_dir, env_id, *argv):
    """Start a run of two workers that would take hours, in a process group of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    sizes = ["--total-timesteps", "100000000", "--log-interval", "200", "--runs-dir", str(runs_dir)]
    return subprocess.Popen(
        [sys.executable, a3c_nstep.__file__, "--env-id", env_id, *sizes, *argv],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    """Wait until the condition is true; returns it."""
    deadline = time.time() + 60
    while time.time() < deadline:
        assert process.poll() is None, process.stderr.read()
        if result := condition():
            return result
        time.sleep(0.02)
    raise TimeoutError


def wait_for_rows(process, runs_dir, rows):
    """Wait until progress.csv has so many rows; returns the run folder."""

    def written():
        files = list(Path(runs_dir).glob("*/progress.csv"))
        return files and len(progress(files[0].parent)) >= rows and files[0].parent

    return wait_for(process, written)


def worker_pids(process):
    """The processes that multiprocessing spawned, two of them or none yet."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                pids.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return pids if len(pids) == 2 else None


def assert_no_orphans(process):
    """No process of the group is left 10 seconds later."""
    deadline = time.time() + 10
    while time.time() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a worker is left")


def finish(process):
    """Wait for the end; returns the exit code and standard error.

    60 seconds at most: a first iteration begins when two workers have imported torch, slow on a busy machine.
    """
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert_no_orphans(process)
    return process.returncode, err


def assert_good(run_dir, last=False):
    """The checkpoint loads, is finite, and is that of a row: the last, or the one when it was written."""
    state, rows = checkpoint(run_dir), progress(run_dir)
    assert len(rows) >= state["iteration"] > 0 and int(rows[state["iteration"] - 1]["step"]) == state["step"]
    assert not last or len(rows) == state["iteration"]
    tensors = [x for name in ("policy", "value", "policy_optimizer") for x in state[name].values()]
    assert all(x.isfinite().all() for x in tensors)


def wait_for_a_save(process, runs_dir):
    """Wait for a checkpoint after that of the start, which takes 5 s, and some rows more."""
    run_dir = wait_for_rows(process, runs_dir, 1)
    iteration = wait_for(process, lambda: checkpoint(run_dir)["iteration"])
    return wait_for_rows(process, runs_dir, iteration + 2)


def test_an_exception_in_a_worker_ends_the_run_with_its_traceback(tmp_path, marks):
    process = start(tmp_path / "runs", f"{MODULE}:Raises-v0")
    wait_for(process, (marks / "wrong").exists)
    code, err = finish(process)
    assert code == 1 and "ValueError: no such ladder" in err and "a3c_environments.py" in err


@pytest.mark.parametrize("goes_wrong", ["Raises", "Nan"])
def test_an_error_in_a_worker_keeps_the_last_checkpoint(tmp_path, marks, monkeypatch, goes_wrong):
    """It comes at the 300th step of one worker, in a later iteration than the first. Resumed, all is well."""
    save, saves = a3c_nstep.Run.save, []
    monkeypatch.setattr(a3c_nstep, "SAVE_EVERY", 0)
    monkeypatch.setattr(a3c_nstep.Run, "save", lambda run: (saves.append(run.step), save(run)))
    args = tiny(tmp_path / "runs", f"{MODULE}:{goes_wrong}-v0", log_interval=100)
    with pytest.raises((torch.multiprocessing.ProcessRaisedException, FloatingPointError)) as error:
        a3c_nstep.train(args)
    run_dir = next((tmp_path / "runs").iterdir())
    assert checkpoint(run_dir)["step"] == saves[-1] > 0 and len(saves) == 1 + len(progress(run_dir))
    assert_good(run_dir, last=True)
    if goes_wrong == "Nan":  # as in the other scripts
        assert error.type is FloatingPointError and "observation" in str(error.value)
        assert f"not finite after step {saves[-1]}:" in str(error.value)
    else:
        assert "ValueError: no such ladder" in str(error.value)
    assert not [x for x in torch.multiprocessing.active_children() if x.is_alive()]
    a3c_nstep.train(dataclasses.replace(args, resume=str(run_dir)))  # once is enough, say the marks
    assert checkpoint(run_dir)["step"] >= 1000
    assert_good(run_dir, last=True)


def test_a_killed_worker_ends_the_run_and_is_named(tmp_path):
    process = start(tmp_path, "CartPole-v1")
    run_dir = wait_for_a_save(process, tmp_path)
    os.kill(worker_pids(process)[1], signal.SIGKILL)
    code, err = finish(process)
    assert code == 1 and "terminated with signal SIGKILL" in err
    assert_good(run_dir)


@pytest.mark.parametrize("rows", [0, 3])
def test_ctrl_c_ends_all_processes_cleanly(tmp_path, rows):
    process = start(tmp_path, "CartPole-v1")
    if rows:
        wait_for_rows(process, tmp_path, rows)
    wait_for(process, lambda: worker_pids(process))
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, err = finish(process)
    assert code == 0 and err == ""
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint(run_dir)["iteration"] >= rows
    if rows:
        assert_good(run_dir, last=True)


def test_a_killed_parent_takes_its_workers_along(tmp_path):
    process = start(tmp_path, "CartPole-v1")
    run_dir = wait_for_a_save(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert_no_orphans(process)
    assert_good(run_dir)
    state, rows = checkpoint(run_dir), progress(run_dir)
    args = dataclasses.replace(a3c_nstep.load_args(run_dir), total_timesteps=state["step"] + 500)
    result = a3c_nstep.train(args)
    assert progress(run_dir)[: state["iteration"]] == rows[: state["iteration"]]
    assert checkpoint(run_dir)["step"] >= state["step"] + 500
    assert len(result.episode_returns) >= len(state["episode_returns"])
    assert_good(run_dir, last=True)
