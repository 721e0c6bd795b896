"""Policy, Value, the statistics of their inputs, and the scale of rewards."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ppo import Policy, RewardScale, RunningNorm, Value, mlp, update_statistics

OBS_SPACE = Box(-1, 1, (3,))
ACTION_SPACES = {"discrete": Discrete(4), "box": Box(-1, 1, (2,)), "matrix": Box(-1, 1, (2, 3))}
STATISTICS = {"mean", "std", "count"}


@pytest.fixture(params=ACTION_SPACES.values(), ids=ACTION_SPACES.keys())
def policy(request):
    torch.manual_seed(0)
    return Policy(OBS_SPACE, request.param)


@pytest.mark.parametrize("shape", [(), (5,), (7, 5)])
def test_policy_is_a_distribution_and_value_a_number_for_every_leading_shape(policy, shape):
    obs, value = torch.randn(*shape, 3), Value(OBS_SPACE)
    dist, other = policy(obs), policy(torch.randn(*shape, 3))
    assert isinstance(dist, Categorical if policy.discrete else Independent)
    assert policy.discrete or isinstance(dist.base_dist, Normal) and dist.event_shape == policy.log_std.shape
    for x in (dist.log_prob(dist.sample()), dist.entropy(), kl_divergence(dist, other), value(obs)):
        assert x.shape == dist.batch_shape == shape and x.isfinite().all()
    torch.testing.assert_close(value(obs).flatten(), value(obs.reshape(-1, 3)))


def test_the_first_policy_is_nearly_uniform_but_sees_the_state_and_a_deviation_does_not(policy):
    dist = policy(torch.randn(1000, 3))
    outputs = dist.probs - 1 / 4 if policy.discrete else dist.mean
    assert outputs.abs().max() < 0.1 and outputs.std(0).min() > 0
    if not policy.discrete:
        assert isinstance(policy.log_std, torch.nn.Parameter) and (dist.stddev == 1).all()
        other = Policy(OBS_SPACE, Box(-1, 1, (2, 3)), init_std=0.5)
        torch.testing.assert_close(other(torch.randn(8, 3)).stddev, torch.full((8, 6), 0.5))


rows = st.integers(1, 9).flatmap(lambda n: hnp.arrays(np.float64, (n, 2), elements=st.floats(-100, 100)))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=6))
def test_merged_statistics_are_those_of_all_rows(batches):
    norm, x = RunningNorm(2).double(), torch.linspace(-50, 50, 12).double().reshape(2, 3, 2)
    torch.testing.assert_close(norm(x), x.clamp(-10, 10))  # before the first update
    for batch in batches:
        norm.update(torch.as_tensor(batch))
    every = np.concatenate(batches)
    np.testing.assert_allclose(norm.mean, every.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(norm.std, every.std(0).clip(1e-4), rtol=1e-7, atol=1e-4)
    np.testing.assert_allclose(norm(x), ((x - norm.mean) / norm.std).clamp(-10, 10))
    assert norm.count == len(every)


def test_statistics_are_saved_with_the_weights_and_move_only_when_updated(policy):
    def changed():
        return {name for name, x in policy.state_dict().items() if not torch.equal(state[name], x)}

    policy.train()
    state = {name: x.clone() for name, x in policy.state_dict().items()}
    assert not any("net.0" in name for name, _ in policy.named_parameters())
    policy(torch.randn(20, 3))
    assert not changed()
    update_statistics(policy.net, 1 + torch.randn(20, 3))  # the first are taken as they come
    assert changed() == {f"net.0.{name}" for name in STATISTICS}
    update_statistics(policy.net, torch.randn(20, 3))
    assert changed() == {f"net.0.{name}" for name in STATISTICS} | {"net.1.weight", "net.1.bias"}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_new_statistics_leave_the_function_as_it_was(dtype, tolerance):
    torch.manual_seed(0)
    net, scales = mlp(3, 4, out_gain=1.0).to(dtype), torch.tensor([0.1, 1.0, 10.0])
    batches = [(0.2 * k + torch.randn(200, 3) * scales ** (k % 2)).to(dtype) for k in range(6)]
    obs = torch.cat(batches)
    update_statistics(net, batches[0])
    for batch in batches[1:]:
        before, inside = net(obs), (net[0](obs).abs() < 10).all(1)
        update_statistics(net, batch)
        inside &= (net[0](obs).abs() < 10).all(1)  # the clip
        assert inside.float().mean() > 0.4
        torch.testing.assert_close(net(obs)[inside], before[inside], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(net[0].mean, obs.mean(0), rtol=1e-4, atol=1e-4)


def test_an_input_that_was_constant_keeps_its_weight_and_does_not_blow_up_when_it_varies():
    torch.manual_seed(0)
    net, obs = mlp(3, 1, out_gain=1.0), torch.randn(400, 3)
    obs[:, 2] = 0.0  # as one of a one-hot observation that has not come yet
    for shift in (0.0, 0.5):
        update_statistics(net, obs + torch.tensor([shift, 0.0, 0.0]))
    weight, before, new = net[1].weight[:, 2].clone(), net(obs), obs.clone()
    new[::10, 2] = 1.0
    update_statistics(net, new)
    assert torch.equal(net[1].weight[:, 2], weight) and net(new).abs().max() < 5
    torch.testing.assert_close(net(obs), before, rtol=1e-4, atol=1e-4)


def scaled_rewards(rollouts, gamma):
    """What RewardScale makes of rewards and valid (T, N) of the rollouts of a run, by its definition."""
    sums, results, last = [], [], {}
    for rewards, valid in rollouts:
        for t, n in np.ndindex(rewards.shape):
            last[n] = float(rewards[t, n]) + gamma * last.get(n, 0.0) if valid[t, n] else 0.0
            sums += [last[n]] * bool(valid[t, n])
        results.append(rewards / max(np.std(sums), 1e-4))
    return results


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_are_scaled_by_the_deviation_of_the_return_that_starts_again_with_each_episode(gamma):
    rng = np.random.default_rng(0)
    valid = rng.random((5, 6, 4)) < 0.7  # a step that is not valid stands between two episodes
    rewards = (rng.normal(3, 2, valid.shape) * valid).astype(np.float32)
    scale, resumed = RewardScale(4, gamma), RewardScale(4, gamma)
    for rollout, expected in zip(zip(rewards, valid), scaled_rewards(list(zip(rewards, valid)), gamma)):
        np.testing.assert_allclose(scale(*map(torch.as_tensor, rollout)), expected, rtol=1e-4)
    assert set(scale.state_dict()) == {f"norm.{name}" for name in STATISTICS}
    resumed.load_state_dict(scale.state_dict())  # has the statistics, and its environments begin anew
    assert scale.discounted.any() and not resumed.discounted.any()
