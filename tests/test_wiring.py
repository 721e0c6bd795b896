"""What `train` of the step family passes from function to function; what these do is tested elsewhere."""

import copy
import importlib
from collections import defaultdict, deque
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import environments
import numpy as np
import pytest
import torch
from tabular import close
from test_networks import scaled_rewards

SCRIPTS = ["vpg_gae", "npg", "trpo", "ppo", "variants.ppo_kl_penalty"]
BEFORE = "make_envs Policy Value RewardScale reset".split()
UPDATES = "update_policy update_value update_statistics update_statistics".split()
ITERATION = ["rollout", "compute_gae", "compute_gae", *UPDATES, "log"]
FIELDS = "obs actions rewards terminations dones valid".split()
ARGS = dict(gamma=0.9, gae_lambda=0.7, value_lambda=0.3, value_learning_rate=0.002, init_std=0.5, seed=3)
ARGS |= dict(num_envs=4, num_steps=15, num_minibatches=1, total_timesteps=200, max_grad_norm=0.4)
CHANGES = {"defaults": {}, "without": dict(normalize_advantages=False, anneal_lr=False)}


def snapshot(x):
    """What it is now, to be looked at later."""
    if isinstance(x, torch.optim.Optimizer):
        return x.param_groups[0]["lr"], {id(param) for param in x.param_groups[0]["params"]}
    copies = {torch.Tensor: torch.clone, torch.nn.Module: copy.deepcopy, deque: list}
    return next((copied(x) for kind, copied in copies.items() if isinstance(x, kind)), x)


@cache
def trained(name, changes, runs_dir):
    """Every call of a run in Counter-v0: args as they were, the very objects given, and the result."""
    script, order, calls = importlib.import_module(name), [], defaultdict(list)

    def spy(patch, owner, attribute):
        function = getattr(owner, attribute)

        def call(*args):
            order.append(attribute)
            made = SimpleNamespace(args=[snapshot(x) for x in args], given=args)
            calls[attribute].append(made)
            result = function(*args)
            made.result = snapshot(result)
            return result

        patch.setattr(owner, attribute, call)

    args = script.Args(f"{environments.__name__}:Counter-v0", runs_dir=runs_dir, **ARGS)
    vars(args).update(CHANGES[changes] | ({"learning_rate": 0.001} if hasattr(args, "learning_rate") else {}))
    with pytest.MonkeyPatch.context() as patch:
        for attribute in {*BEFORE, *ITERATION} - {"log"}:
            spy(patch, script, attribute)
        spy(patch, script.Run, "log")
        spy(patch, script, "gradient_step")
        returned = script.train(args)
    batches = [SimpleNamespace(**dict(zip(FIELDS, call.result))) for call in calls["rollout"]]
    return SimpleNamespace(**calls, order=order, batches=batches, script=script, args=args, returned=returned)


@pytest.fixture(params=[(name, changes) for name in SCRIPTS for changes in CHANGES], ids="-".join)
def run(request, tmp_path_factory):
    return trained(*request.param, str(tmp_path_factory.getbasetemp()))


def same_state(module, other):
    return all(torch.equal(x, y) for x, y in zip(module.state_dict().values(), other.state_dict().values()))


def test_a_rollout_goes_on_where_the_last_one_ended_with_the_policy_that_is_scored(run):
    spaces, [reset] = run.Policy[0].args, run.reset
    assert spaces[2] == 0.5 and run.Value[0].args == spaces[:1] and reset.args[1:] == [run.args, 0]
    torch.manual_seed(3)
    assert same_state(run.rollout[0].args[1], run.script.Policy(*spaces))
    obs, done = reset.result
    for call, batch, update in zip(run.rollout, run.batches, run.update_policy):
        close(call.args[2], obs, 0.0)
        close(call.args[3], done, 0.0)
        assert call.args[4] == 15 and same_state(call.args[1], update.args[0])
        assert not same_state(update.args[0], update.given[0])
        obs, done = batch.obs[-1], batch.dones[-1]
    assert any((batch.dones & ~batch.terminations)[-1].any() for batch in run.batches[:-1])


def test_advantages_and_targets_are_of_scaled_rewards_with_their_own_lambda_without_reset_rows(run):
    scaled = scaled_rewards([(batch.rewards.numpy(), batch.valid.numpy()) for batch in run.batches], 0.9)
    for k, (batch, rewards) in enumerate(zip(run.batches, scaled)):
        obs, valid = batch.obs[:-1][batch.valid], batch.valid
        assert 0 < (~valid).sum() < 12 and (batch.dones & ~batch.terminations).any()
        value, _, value_obs, returns, _ = run.update_value[k].args
        policy_obs, actions, b_advantages, _ = run.update_policy[k].args[-4:]
        with torch.no_grad():
            values = value(batch.obs)
        for call, lam in zip(run.compute_gae[2 * k :], (0.7, 0.3)):
            for actual, expected in zip(call.args, (rewards, values, batch.terminations, batch.dones)):
                close(actual, expected, 1e-4)
            assert call.args[4:] == [0.9, lam]
        advantages, targets = (call.result[valid] for call in run.compute_gae[2 * k :][:2])
        if run.args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        close(b_advantages, advantages, 1e-4)
        close(returns, targets + values[:-1][valid], 1e-4)
        close(actions, batch.actions[valid])
        for actual in (policy_obs, value_obs, *(call.args[1] for call in run.update_statistics[2 * k :][:2])):
            close(actual, obs)


def test_statistics_of_both_networks_change_after_both_updates_and_learning_rates_fall_to_0(run):
    assert [name for name in run.order if name != "gradient_step"] == BEFORE + 4 * ITERATION
    assert {call.args[2] for call in run.gradient_step} == {run.args.max_grad_norm}
    step, annealed = 0, run.args.anneal_lr
    for k, batch in enumerate(run.batches):
        updates = run.update_policy[k], run.update_value[k]
        for call, statistics, rate in zip(updates, run.update_statistics[2 * k :], (0.001, 0.002)):
            assert statistics.given[0] is call.given[0].net and call.args[-1] is run.args
            remaining = 1 - step / 200 if annealed else 1
            if isinstance(call.args[1], float):  # npg.py and trpo.py have no optimizer of the policy
                assert call.args[1] == pytest.approx(run.args.max_kl * remaining)
            else:
                assert call.args[1][0] == pytest.approx(rate * remaining)
                assert call.args[1][1] == {id(param) for param in call.given[0].parameters()}
        step += batch.valid.sum().item()
    assert step > 200 and len(updates[0].args) == 6


def test_what_is_logged_are_valid_steps_raw_returns_and_the_metrics_of_both_updates(run):
    for k, batch in enumerate(run.batches):
        _, steps, returns, metrics = run.log[k].args
        assert steps == batch.valid.sum() and len(returns) == batch.dones.sum()
        assert metrics == run.update_policy[k].result | run.update_value[k].result
    expected = [6, 15, 20, 21, *np.repeat([91, 161, 231, 301, 371, 441], 4), 511, 511]
    assert run.returned.returns == expected and run.returned.policy is run.update_policy[0].given[0]
    state = torch.load(Path(run.returned.run_dir, "checkpoint.pt"), weights_only=True)
    assert set(state["reward_scale"]) == {"norm.mean", "norm.std", "norm.count"}
