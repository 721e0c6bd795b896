"""Generalized advantage estimation; what train makes of it: test_wiring.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import MDPS, close, policy_of

from ppo import compute_gae

GOES_ON, TERMINATED, TRUNCATED = range(3)
shares, seeds = st.sampled_from([0.0, 1.0]) | st.floats(0, 1), st.integers(0, 2**32 - 1)


def random_segment(seed):
    """rewards (T, N), values (T+1, N), ends (T, N)."""
    rng = np.random.RandomState(seed)
    T, N = rng.randint(1, 13), rng.randint(1, 5)
    return rng.normal(size=(T, N)), rng.normal(size=(T + 1, N)), rng.choice(3, (T, N), p=[0.7, 0.15, 0.15])


def gae(rewards, values, ends, gamma, gae_lambda):
    terminations, dones = torch.as_tensor(ends == TERMINATED), torch.as_tensor(ends != GOES_ON)
    rewards, values = torch.as_tensor(rewards), torch.as_tensor(values)
    return compute_gae(rewards, values, terminations, dones, gamma, gae_lambda).numpy()


@settings(deadline=None)
@given(seeds, shares, shares)
def test_equals_the_double_sum_cut_at_the_first_done(seed, gamma, gae_lambda):
    rewards, values, ends = segment = random_segment(seed)
    delta = rewards + gamma * np.where(ends == TERMINATED, 0, values[1:]) - values[:-1]
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(len(rewards) - t):
            expected[t, n] += (gamma * gae_lambda) ** k * delta[t + k, n]
            if ends[t + k, n] != GOES_ON:
                break
    np.testing.assert_allclose(gae(*segment, gamma, gae_lambda), expected, rtol=1e-12, atol=1e-11)


@settings(deadline=None)
@given(seeds, shares)
def test_with_the_value_it_is_the_td_target_at_lambda_0_and_the_monte_carlo_return_at_1(seed, gamma):
    rewards, values, ends = segment = random_segment(seed)
    td_targets = rewards + gamma * np.where(ends == TERMINATED, 0, values[1:])
    np.testing.assert_allclose(gae(*segment, gamma, 0.0) + values[:-1], td_targets, rtol=1e-12, atol=1e-11)
    after, returns = values[-1], []  # what is truncated, or goes on at the end, is bootstrapped
    for reward, td_target, end in zip(rewards[::-1], td_targets[::-1], ends[::-1]):
        after = np.where(end == GOES_ON, reward + gamma * after, td_target)
        returns.insert(0, after)
    np.testing.assert_allclose(gae(*segment, gamma, 1.0) + values[:-1], returns, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_exact_values_give_zero_advantages_unless_truncation_counts_as_termination(gae_lambda):
    """Reward 1 forever behind a time limit of 10 steps: V = 1 / (1 - gamma), whatever the step."""
    t, gamma = np.arange(64)[:, None], 0.99
    valid = t % 11 != 10  # the step after an episode resets, with reward 0
    rewards, values = valid.astype(np.float64), np.full((65, 1), 1 / (1 - gamma))
    ends = np.where(t % 11 == 9, TRUNCATED, GOES_ON)
    assert np.abs(gae(rewards, values, ends, gamma, gae_lambda)[valid]).max() < 1e-9
    merged = np.where(ends == TRUNCATED, TERMINATED, ends)
    assert np.abs(gae(rewards, values, merged, gamma, gae_lambda)[valid]).max() > 90


@pytest.mark.parametrize("mdp", MDPS.values(), ids=MDPS)
def test_with_exact_values_the_policy_gradient_is_unbiased(mdp):
    policy, tr = policy_of(mdp), mdp.trajectories
    values = mdp.along(mdp.exact_values(policy, 1.0)[0])
    for gae_lambda in (0.0, 0.95, 1.0):
        advantages = compute_gae(tr.rewards, values, tr.terminations, tr.dones, 1.0, gae_lambda)
        close(mdp.bias(policy, advantages * tr.valid, 1.0))
