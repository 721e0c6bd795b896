"""n-step returns, the shared optimizer, and the workers of a3c_nstep.py: what they do and how they end."""

import copy
import dataclasses
import queue
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import test_run_folder as runs
import torch
from environments import Random
from test_run_folder import assert_same, assert_whole, checkpoint, progress
from torch.multiprocessing.spawn import ProcessException

import a3c_nstep
from a3c_nstep import SharedRMSprop, gradient_step

NETS = "policy", "value"


@pytest.mark.parametrize("seed", range(100))
def test_at_most_n_rewards_then_the_value_of_the_state_reached(seed):
    rng = np.random.default_rng(seed)
    T, n, gamma = rng.integers(1, 13), rng.integers(1, 15), rng.choice([0, 0.5, 0.9, 1])
    rewards, values, shape = rng.normal(size=(T, 3)), rng.normal(size=(T + 1, 3)), (T, 3)
    terminations, dones = rng.random(shape) < 0.1, rng.random(shape) < 0.1
    dones |= terminations
    segment = [torch.tensor(x) for x in (rewards, values, terminations, dones)]
    returns = a3c_nstep.n_step_returns(*segment, gamma, n)
    for t, i in np.ndindex(shape):
        k = 1
        while k < n and t + k < T and not dones[t + k - 1, i]:
            k += 1
        last = 0 if terminations[t + k - 1, i] else values[t + k, i]
        expected = gamma ** np.arange(k) @ rewards[t : t + k, i] + gamma**k * last
        assert returns[t, i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    np.testing.assert_equal(segment, [rewards, values, terminations, dones])  # is left as it was


# ---------------------------------------------------------------------------- the shared optimizer


def rmsprop(param, square_avg, grad, lr):
    """The step of A3C, with eps inside the root; returns the new parameters and statistics."""
    square_avg = 0.99 * square_avg + 0.01 * grad**2
    return param - lr * grad / (square_avg + 1e-5) ** 0.5, square_avg


@pytest.mark.parametrize("num_workers", [1, 2])
def test_four_equal_gradients_are_not_accumulated(num_workers):
    """Where shared.grad is the local gradient, four gradients of 1 count as 1, 2, 3 and 4."""
    shared_net = torch.nn.Linear(3, 2).double()
    square_avgs = [torch.zeros_like(param) for param in shared_net.parameters()]
    expected = [(param.detach().clone(), torch.zeros_like(param)) for param in shared_net.parameters()]
    nets = [copy.deepcopy(shared_net) for _ in range(num_workers)]
    optimizers = [SharedRMSprop(net, shared_net, square_avgs) for net in nets]

    def step(i, factor, max_grad_norm=1e9):
        optimizers[i].param_groups[0]["lr"] = 0.1
        loss = factor * sum(param.sum() for param in nets[i].parameters())
        return gradient_step(optimizers[i], loss, max_grad_norm)

    for i in range(4):
        assert step(i % num_workers, 1) == pytest.approx(8**0.5)
        expected = [rmsprop(*state, torch.ones_like(state[0]), 0.1) for state in expected]
        torch.testing.assert_close(list(zip(shared_net.parameters(), square_avgs)), expected)
        assert_same(shared_net.state_dict(), nets[i % num_workers].state_dict())  # the copy gets what is new
    step(0, 1000, max_grad_norm=0.5)  # is scaled down
    expected = [rmsprop(*state, torch.full_like(state[0], 0.5 / 8**0.5), 0.1) for state in expected]
    torch.testing.assert_close(list(zip(shared_net.parameters(), square_avgs)), expected)
    assert step(0, torch.nan).isnan()  # is not taken
    torch.testing.assert_close(list(zip(shared_net.parameters(), square_avgs)), expected)


# ---------------------------------------------------------------------------- workers in this process


class Lock:
    """Checks that what it guards, the statistics and the steps, stays as it is while none holds it."""

    held, guarded, before = False, [], None

    def __enter__(self):
        assert self.before is None or all(map(torch.equal, self.guarded, self.before))
        self.held = True

    def __exit__(self, *_):
        self.held, self.before = False, [x.clone() for x in self.guarded]


@pytest.fixture
def here(monkeypatch):
    """train has its workers one after the other, in this process; holds what they share, before and after."""
    here, parent = SimpleNamespace(lock=Lock(), first_step=0), SimpleNamespace(is_alive=lambda: True)

    def spawn(work, work_args, num_workers, join, daemon):
        _, _, here.shared, step, _, _ = work_args
        step += here.first_step
        here.lock.guarded, here.before = [step, *here.shared.buffers()], copy.deepcopy(here.shared)
        for rank in range(num_workers):
            work(rank, copy.deepcopy(work_args[0]), *work_args[1:])
        return SimpleNamespace(join=lambda timeout: True, processes=[])

    context = SimpleNamespace(Lock=lambda: here.lock, Queue=queue.Queue)
    monkeypatch.setattr(a3c_nstep.mp, "get_context", lambda method: context)
    monkeypatch.setattr(a3c_nstep.mp, "parent_process", lambda: parent)
    monkeypatch.setattr(a3c_nstep.mp, "spawn", spawn)
    return here


def tiny(runs_dir, **changes):
    return runs.tiny(a3c_nstep, runs_dir, **dict(num_envs=1, num_steps=5, log_interval=100) | changes)


def recorded(monkeypatch, name):
    """The results of all calls of a function from now on."""
    results, function = [], getattr(a3c_nstep, name)
    monkeypatch.setattr(a3c_nstep, name, lambda *args: results.append(function(*args)) or results[-1])
    return results


@pytest.mark.parametrize("env_id, bootstraps", [("test/Random-v0", 0), ("Truncated-v0", 1)])
def test_an_update_by_a_worker(tmp_path, monkeypatch, here, env_id, bootstraps):
    """An episode of 3 steps, when half of all steps are done: both networks against the formulas."""
    rollouts, here.first_step = recorded(monkeypatch, "rollout"), 3
    monkeypatch.setattr(a3c_nstep.RewardScale, "forward", lambda self, rewards, valid: rewards / 500)
    args = tiny(tmp_path, env_id=env_id, num_workers=1, num_steps=3, total_timesteps=6, gamma=0.5)
    args = dataclasses.replace(args, max_grad_norm=1e9, ent_coef=0.01, value_epochs=1, num_minibatches=1)
    a3c_nstep.train(args)
    ((obs, actions, rewards, *_),), old = rollouts, here.before
    with torch.no_grad():
        values, returns = old["value"](obs), rewards / 500
        returns[2] += 0.5 * bootstraps * values[3]
        returns[1] += 0.5 * returns[2]
        returns[0] += 0.5 * returns[1]
        advantages = returns - values[:-1]
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    dist = old["policy"](obs[:-1])
    policy_loss = -(dist.log_prob(actions) * advantages + 0.01 * dist.entropy()).mean()
    losses = policy_loss, (old["value"](obs[:-1]) - returns).pow(2).mean()
    for name, loss, lr in zip(NETS, losses, (3e-3, 1e-3)):
        params = list(old[name].parameters())
        states = zip(params, old[f"{name}_square_avgs"], torch.autograd.grad(loss, params))
        new = list(zip(here.shared[name].parameters(), here.shared[f"{name}_square_avgs"]))
        expected = [rmsprop(*state, 0.5 * lr) for state in states]
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-7)


def test_a_worker_takes_what_is_shared_and_moves_statistics_under_the_lock(tmp_path, monkeypatch, here):
    rollout, returns, load = a3c_nstep.rollout, a3c_nstep.n_step_returns, torch.nn.Module.load_state_dict
    obs, loads = [], []

    def checked_rollout(envs, policy, *rest):
        assert_same(policy.state_dict(), here.shared["policy"].state_dict())
        batch = rollout(envs, policy, *rest)
        obs.append(batch[0])
        return batch

    def checked_returns(rewards, values, *rest):
        assert_same(values, here.shared["value"](obs[-1]).detach())
        return returns(rewards, values, *rest)

    def checked_load(net, state):
        loads.append(here.lock.held)
        return load(net, state)

    monkeypatch.setattr(a3c_nstep, "rollout", checked_rollout)
    monkeypatch.setattr(a3c_nstep, "n_step_returns", checked_returns)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", checked_load)
    a3c_nstep.train(tiny(tmp_path, num_workers=1))
    norms = [here.shared[name].net[0] for name in NETS] + [here.shared["reward_scale"].norm]
    assert {int(norm.count) for norm in norms} == {len(Random.steps)}
    assert all(loads) and len(loads) == 2 * len(obs) > 50


def test_a_worker_reports_all_its_steps_and_returns_and_the_mean_of_its_metrics(tmp_path, monkeypatch, here):
    updates, rollouts, threads = recorded(monkeypatch, "update_policy"), recorded(monkeypatch, "rollout"), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    sizes = dict(num_workers=1, num_envs=3, num_steps=4, total_timesteps=500, torch_threads=2)
    result = a3c_nstep.train(tiny(tmp_path, **sizes))
    rows, ends = progress(result.run_dir), np.cumsum([int(valid.sum()) for *_, valid in rollouts])
    steps = np.diff([int(row["step"]) for row in rows], prepend=0)
    assert sum(steps) == len(Random.steps) >= 500 and all(100 <= n < 112 for n in steps[:-1])
    assert int(rows[-1]["episodes"]) == len(Random.returns) and threads == [2, 2]
    assert result.returns == pytest.approx(Random.returns[-100:], rel=1e-4)
    entropies = [update["entropy"].item() for update, end in zip(updates, ends) if end <= steps[0]]
    assert float(rows[0]["entropy"]) == pytest.approx(np.mean(entropies)) and len(entropies) > 5
    assert_whole(result.run_dir)


def test_every_environment_of_every_worker_has_its_own_seed_also_when_resumed(tmp_path, here):
    run_dir = a3c_nstep.train(tiny(tmp_path, num_workers=3, num_envs=2)).run_dir
    assert len(set(Random.seeds)) == 6
    runs.resume(a3c_nstep, run_dir, total_timesteps=300)
    assert len(set(Random.seeds)) == 12


# ---------------------------------------------------------------------------- workers in processes


def test_two_workers_share_everything_count_every_step_and_resume(tmp_path):
    result, states = a3c_nstep.train(tiny(tmp_path, env_id="CartPole-v1", total_timesteps=500)), []
    for total in (500, 1000):
        if states:
            result = runs.resume(a3c_nstep, result.run_dir, total_timesteps=total)
        state = checkpoint(result.run_dir)
        counts = [*(state[name]["net.0.count"] for name in NETS), state["reward_scale"]["norm.count"]]
        assert {int(count) for count in counts} == {state["step"]} and total <= state["step"] <= total + 2 * 5
        assert state["episodes"] == len(result.returns) and sum(result.returns) <= state["step"]
        assert_same(state["policy"], result.policy.state_dict())
        assert_whole(result.run_dir)
        states.append(state)
    assert states[0]["returns"] == states[1]["returns"][: states[0]["episodes"]] != states[1]["returns"]
    for name in (*NETS, "policy_square_avgs", "value_square_avgs"):
        assert all(not torch.equal(a, b) for a, b in zip(*(state[name].values() for state in states)))


def test_one_worker_with_a_seed_repeats_to_the_last_bit(tmp_path):
    args, different = tiny(tmp_path, num_workers=1, total_timesteps=300), ("seconds", "progress_size", "args")
    first, again, other = (a3c_nstep.train(dataclasses.replace(args, seed=n)).run_dir for n in (1, 1, 2))
    assert progress(first) == progress(again) != progress(other) and len(progress(first)) == 3
    assert_same(checkpoint(first, different), checkpoint(again, different))


WRONG = {
    "raises": r"environments.py(.|\n)*no such ladder at (?P<time>[\d.]+)",
    "killed": "terminated with signal SIGKILL",
    "nan": r"^not finite at step \d+: .*nan",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_worker_that_goes_wrong_ends_the_run_at_once(tmp_path, wrong):
    args, start = tiny(tmp_path, env_id=f"environments:{wrong}-v0", total_timesteps=10**9), time.time()
    args.seed = 4  # with which one of two workers has an environment that goes wrong
    with pytest.raises((FloatingPointError, ProcessException)) as error:
        a3c_nstep.train(args)
    groups = re.search(WRONG[wrong], str(error.value)).groupdict()
    assert time.time() - float(groups.get("time", start + 20)) < 3
    runs.assert_finite(runs.only_run(tmp_path))
    while [process for process in torch.multiprocessing.active_children() if process.is_alive()]:
        assert time.time() - start < 20
        time.sleep(0.02)


@runs.POSIX
def test_ctrl_c_ends_all_processes(tmp_path):
    runs.interrupt(a3c_nstep, tmp_path, "--log-interval", "200")


@runs.POSIX
def test_a_killed_run_takes_its_workers_along_where_ctrl_c_is_off_too_and_goes_on(tmp_path):
    process = runs.command(a3c_nstep, tmp_path, "--log-interval", "200", ctrl_c=False)
    run_dir = runs.wait_for_rows(tmp_path, 3)
    process.kill()
    process.communicate(timeout=20)
    runs.assert_no_process_is_left(process.pid)
    before, state = progress(run_dir), checkpoint(run_dir)
    runs.resume(a3c_nstep, run_dir, total_timesteps=state["step"] + 300)
    assert progress(run_dir)[: state["iteration"]] == before[: state["iteration"]]
    assert checkpoint(run_dir)["step"] >= state["step"] + 300
    assert_whole(run_dir)
