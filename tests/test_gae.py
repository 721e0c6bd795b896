import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo import compute_gae

GOES_ON, TERMINATED, TRUNCATED = range(3)
probabilities = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)


@st.composite
def segments(draw):
    """rewards (T, N), values (T+1, N), ends (T, N)."""
    T, N = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    numbers = st.floats(-10, 10, width=32)
    rewards = draw(hnp.arrays(np.float64, (T, N), elements=numbers))
    values = draw(hnp.arrays(np.float64, (T + 1, N), elements=numbers))
    ends = draw(hnp.arrays(np.int8, (T, N), elements=st.sampled_from([GOES_ON, TERMINATED, TRUNCATED])))
    return rewards, values, ends


def gae(rewards, values, ends, gamma, gae_lambda):
    terminations, dones = torch.as_tensor(ends == TERMINATED), torch.as_tensor(ends != GOES_ON)
    rewards, values = torch.as_tensor(rewards), torch.as_tensor(values)
    return compute_gae(rewards, values, terminations, dones, gamma, gae_lambda).numpy()


def td_errors(rewards, values, ends, gamma):
    return rewards + gamma * np.where(ends == TERMINATED, 0, values[1:]) - values[:-1]


@settings(deadline=None)
@given(segments(), probabilities, probabilities)
def test_equals_the_double_sum_cut_at_the_first_done(segment, gamma, gae_lambda):
    rewards, values, ends = segment
    delta = td_errors(rewards, values, ends, gamma)
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        for k in range(len(rewards) - t):
            expected[t, n] += (gamma * gae_lambda) ** k * delta[t + k, n]
            if ends[t + k, n] != GOES_ON:
                break
    np.testing.assert_allclose(
        gae(rewards, values, ends, gamma, gae_lambda), expected, rtol=1e-12, atol=1e-11
    )


@settings(deadline=None)
@given(segments(), probabilities)
def test_lambda_1_is_the_return_minus_the_value(segment, gamma):
    rewards, values, ends = segment
    expected = np.zeros_like(rewards)
    for n in range(rewards.shape[1]):
        after = values[-1, n]
        for t in reversed(range(len(rewards))):
            after = {GOES_ON: after, TERMINATED: 0.0, TRUNCATED: values[t + 1, n]}[ends[t, n]]
            after = rewards[t, n] + gamma * after
            expected[t, n] = after - values[t, n]
    np.testing.assert_allclose(gae(rewards, values, ends, gamma, 1.0), expected, rtol=1e-12, atol=1e-10)


@settings(deadline=None)
@given(segments(), probabilities)
def test_lambda_0_is_the_td_error(segment, gamma):
    rewards, values, ends = segment
    expected = td_errors(rewards, values, ends, gamma)
    np.testing.assert_allclose(gae(rewards, values, ends, gamma, 0.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_exact_values_give_zero_advantages_unless_truncation_counts_as_termination(gae_lambda):
    """Reward 1 forever behind a time limit of 10 steps: V = 1 / (1 - gamma), whatever the step."""
    T, gamma = 64, 0.99
    valid = np.arange(T)[:, None] % 11 != 10  # the step after an episode resets, with reward 0
    rewards, values = valid.astype(np.float64), np.full((T + 1, 1), 1 / (1 - gamma))
    ends = np.where(np.arange(T)[:, None] % 11 == 9, TRUNCATED, GOES_ON)

    assert np.abs(gae(rewards, values, ends, gamma, gae_lambda)[valid]).max() < 1e-9

    merged = np.where(ends == TRUNCATED, TERMINATED, ends)
    assert np.abs(gae(rewards, values, merged, gamma, gae_lambda)[valid]).max() > 90


def test_at_the_last_step_a_truncation_bootstraps_and_a_termination_does_not():
    rewards, values = np.ones((3, 3)), np.full((4, 3), 10.0)
    ends = np.zeros((3, 3), int)
    ends[-1] = GOES_ON, TRUNCATED, TERMINATED
    np.testing.assert_allclose(gae(rewards, values, ends, 0.5, 1.0)[-1], [-4, -4, -9])
    np.testing.assert_allclose(gae(rewards, values, ends, 0.5, 1.0)[0], [-7, -7, -8.25])
