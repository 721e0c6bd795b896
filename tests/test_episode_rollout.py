"""Whole episodes, one per column, and what train of the episode family does with them."""

import copy
import importlib

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch
from tabular import close

import reinforce

BOX = dict(action_space=gym.spaces.Box(-1, 1, (2, 3)))
gym.register("Short-v0", environments.Sampler, max_episode_steps=4, disable_env_checker=True, kwargs=BOX)


def start(env_id, mode="sync", num_envs=4):
    args = reinforce.Args(env_id=env_id, num_envs=num_envs, vectorization=mode)
    envs = reinforce.make_envs(args)
    torch.manual_seed(0)
    policy = reinforce.Policy(envs.single_observation_space, envs.single_action_space)
    return envs, policy, reinforce.reset(envs, args, 0)[0]


@pytest.mark.parametrize("mode", ["sync", "async", "auto"])
def test_one_whole_episode_per_column_as_long_as_the_longest(mode):
    """Counter-v0 starts at step 0, 2, 4 or 6 and ends at 7: episodes of 7, 5, 3 and 1 steps."""
    envs, policy, obs = start("Counter-v0", mode)
    obs, actions, rewards, valid = reinforce.rollout_episodes(envs, policy, obs, 7)
    envs.close()
    lengths = environments.LENGTH - obs[0, :, 2]
    assert sorted(lengths.tolist()) == [1, 3, 5, 7] and len(obs[0, :, 0].unique()) == 4
    assert torch.equal(valid, torch.arange(7)[:, None] < lengths)
    assert obs.shape == (7, 4, 4) and actions.shape == rewards.shape == valid.shape == (7, 4)
    assert obs.dtype == rewards.dtype == torch.float32 and valid.dtype == torch.bool
    # every row is what the policy saw before it acted, with the reward of its action, 0 past the end
    name, episode, step, last_action = obs.unbind(-1)
    assert (name == name[0]).all() and (episode[valid] == 0).all() and (episode[~valid] == 1).any()
    assert torch.equal(step[valid], (step[0] + torch.arange(7)[:, None])[valid])
    assert torch.equal(last_action[1:][valid[1:]], actions[:-1][valid[1:]] + environments.START)
    assert torch.equal(rewards, step * valid) and rewards.any()


def test_actions_are_sampled_from_the_policy_at_these_observations():
    envs, policy, obs = start("Counter-v0", "auto", num_envs=64)
    policy.net[-1].bias.data = torch.tensor([0.0, 1.0, 2.0])
    obs, actions, _, valid = reinforce.rollout_episodes(envs, policy, obs, 7)
    dist = policy(obs[valid])
    shares = torch.stack([(actions[valid] == a).float().mean() for a in range(3)])
    close(shares, dist.probs.mean(0).detach(), 0.1)
    dist.log_prob(actions[valid]).sum().backward()  # which tensors made in inference mode would refuse


def test_truncation_ends_an_episode_and_box_actions_are_stored_raw():
    envs, policy, obs = start("Short-v0", num_envs=2)
    _, actions, _, valid = reinforce.rollout_episodes(envs, policy, obs, 4)
    assert valid.shape == (4, 2) and valid.all() and actions.shape == (4, 2, 6) and actions.abs().max() > 1
    for n, env in enumerate(envs.unwrapped.envs):
        stored = actions[:, n].numpy().reshape(4, 2, 3)
        np.testing.assert_allclose(env.unwrapped.actions, stored.clip(-1, 1), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("env_id", ["InfObs-v0", "HugeObs-v0"])
def test_an_episode_that_is_too_long_or_not_finite_is_an_error_where_it_is(env_id):
    envs, policy, obs = start(env_id)  # the third observation goes wrong
    with pytest.raises(ValueError, match="--max-episode-steps 2"):
        reinforce.rollout_episodes(envs, policy, obs, 2)
    envs.reset(seed=1)
    with pytest.raises(FloatingPointError, match="observation"):
        reinforce.rollout_episodes(envs, policy, obs, 3)


TRACED = ["rollout_episodes", "update_policy", "optimal_update", "update_value", "update_statistics"]


def trace(script, runs_dir, **changes):
    """What train returns, and of every iteration {function: [(args, networks and rates before, result)]}."""
    module, iterations = importlib.import_module(script), []
    sizes = dict(env_id="Counter-v0", num_envs=4, total_timesteps=60, gamma=0.9, runs_dir=str(runs_dir))

    def traced(name, function):
        def f(*args):
            networks = copy.deepcopy([x for x in args if isinstance(x, torch.nn.Module)])
            rates = [x.param_groups[0]["lr"] for x in args if isinstance(x, torch.optim.Optimizer)]
            if name == "rollout_episodes":
                iterations.append({})
            result = function(*args)
            iterations[-1].setdefault(name, []).append((args, networks, rates, result))
            return result

        return f

    with pytest.MonkeyPatch.context() as patch:
        for name in set(TRACED) & set(vars(module)):
            patch.setattr(module, name, traced(name, getattr(module, name)))
        patch.setattr(module.Run, "log", traced("log", module.Run.log))
        return module.train(module.Args(**sizes | changes)), iterations


BASELINES = ["none", "mean", "leave-one-out", "time", "optimal", "value"]
CASES = [
    *(("reinforce", dict(estimator=x, normalize_weights=True)) for x in ("total", "reward-to-go")),
    ("reinforce", dict(estimator="total", normalize_weights=False, anneal_lr=False)),
    *(("reinforce_baseline", dict(baseline=x, normalize_weights=False)) for x in BASELINES),
    ("reinforce_baseline", dict(baseline="value", normalize_weights=True, anneal_lr=False)),
    *(("offpolicy_is", dict(anneal_lr=x)) for x in (True, False)),
]


@pytest.mark.parametrize("script, changes", CASES)
def test_every_iteration_updates_the_policy_that_collected_and_then_the_statistics(script, changes, tmp_path):
    result, iterations = trace(script, tmp_path, learning_rate=0.02, ent_coef=0.01, **changes)
    baseline = changes.get("baseline")
    step, all_returns, names, seen, mean, std = 0, [], set(), torch.zeros(0), 0.0, 1.0
    for calls in iterations:
        update = "optimal_update" if baseline == "optimal" else "update_policy"
        order = [update, *["update_value"] * (baseline == "value"), "update_statistics", "log"]
        assert list(calls) == ["rollout_episodes", *order]
        [(_, [collector], _, (obs, actions, rewards, valid))] = calls["rollout_episodes"]
        [(updated, [scored], rates, _)], [(logged, *_)] = calls[update], calls["log"]
        torch.testing.assert_close(scored.state_dict(), collector.state_dict(), rtol=0, atol=0)
        remaining = 1 - step / 60 if changes.get("anneal_lr", True) else 1
        assert rates == [pytest.approx(0.02 * remaining)] and updated[-1].ent_coef == 0.01
        assert logged[1] == valid.sum() and torch.equal(logged[2], rewards.sum(0))
        step, names = step + logged[1], names | set(obs[0, :, 0].tolist())
        all_returns += rewards.sum(0).tolist()

        G = (0.9 ** (torch.arange(7) - torch.arange(7)[:, None]).clamp(min=0)).triu() @ rewards
        credit = {
            "total": G[0].expand(7, 4),
            "mean": G - G[0].mean(),
            "leave-one-out": G - (G[0].sum() - G[0]) / 3,
            "time": G - ((G * valid).sum(1) / valid.sum(1))[:, None],
        }.get(baseline or changes.get("estimator"), G)[valid]
        moved = {result.policy.net: obs[valid]}
        if baseline == "value":
            timed = torch.cat([obs, torch.arange(1.0, 8)[:, None, None].expand(7, 4, 1)], -1)[valid]
            [((value, _, *data, _), [before], value_rates, _)] = calls["update_value"]
            credit = credit - (before(timed).detach() * std + mean)  # of V before its fit to this batch
            seen = torch.cat([seen, G[valid]])
            mean, std = seen.mean(), seen.std(correction=0)
            torch.testing.assert_close(data, [timed, (G[valid] - mean) / std], rtol=1e-4, atol=1e-4)
            assert value_rates == [pytest.approx(0.003 * remaining)]
            moved[value.net] = timed
        if changes.get("normalize_weights"):
            credit = (credit - credit.mean()) / credit.std(correction=0)
        expected = obs[valid], actions[valid], credit
        if baseline == "optimal":
            expected = obs, actions, valid, G[0]
        if script == "offpolicy_is":
            expected = obs, actions, rewards, valid
        torch.testing.assert_close(updated[2:-1], expected, rtol=1e-4, atol=1e-4)
        statistics = dict(args for args, *_ in calls["update_statistics"])
        assert statistics.keys() == moved.keys() and all(torch.equal(statistics[x], moved[x]) for x in moved)
    assert len(iterations) == 4 and len(names) == 16  # every environment is another one in every iteration
    assert result.returns == all_returns and result.policy.net[0].count == step == 64
