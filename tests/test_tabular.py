"""The library of exact tests against itself, and GAE against the library."""

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tabular import FULL, HIDDEN, SMALL, TERMINATING, TabularPolicy

from ppo import Policy, compute_gae

MDPS = {"full": FULL, "terminating": TERMINATING, "hidden": HIDDEN, "small": SMALL}


@pytest.fixture(params=MDPS)
def mdp(request):
    return MDPS[request.param]


def policy_of(mdp, seed=0):
    return TabularPolicy(mdp.observe.shape[1], seed=seed)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=0, atol=tolerance)


def returns_to_go(mdp, gamma):
    """G_t = sum_{t'>=t} gamma^(t'-t) r_t', from the definition; (T, K)"""
    rewards = mdp.trajectories.rewards
    t = torch.arange(mdp.horizon)
    powers = (gamma ** (t - t[:, None]).clamp(min=0).double()).triu()
    return powers @ rewards


# ---------------------------------------------------------------------------- the enumeration


def test_every_trajectory_is_there_once(mdp):
    tr, T = mdp.trajectories, mdp.horizon
    rows = torch.cat([tr.states, tr.actions]).T
    assert len(rows.unique(dim=0)) == len(rows)
    close(mdp.trajectory_probabilities(policy_of(mdp)).sum(), 1)
    close(tr.rewards[~tr.valid], torch.zeros((~tr.valid).sum()))
    assert torch.equal(tr.valid[1:], tr.valid[:-1] & ~tr.terminations[:-1])
    assert (tr.dones.sum(0) == 1).all() and torch.equal(tr.dones[: T - 1], tr.terminations[: T - 1])
    assert mdp is FULL or (tr.terminations.any() and not tr.valid.all())


def test_sizes():
    assert [len(mdp.trajectories.dynamics) for mdp in MDPS.values()] == [648, 468, 1600, 13]


def test_hidden_states_have_one_observation():
    policy = policy_of(HIDDEN)
    assert HIDDEN.trajectories.obs.shape[-1] == 2
    probs = policy(HIDDEN.observe).probs
    close(probs[0], probs[1])
    _, Q, _ = HIDDEN.exact_values(policy, gamma=1.0)
    assert (Q[0, 0] - Q[0, 1]).abs().min() > 0.1


# ---------------------------------------------------------------------------- J and its gradient


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_J_is_the_start_value(mdp, gamma):
    policy = policy_of(mdp)
    V, _, _ = mdp.exact_values(policy, gamma)
    close(mdp.J(policy, gamma), mdp.start @ V[0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gradient_by_scores_autograd_and_finite_differences(mdp, gamma):
    policy = policy_of(mdp)
    gradient = mdp.exact_gradient(policy, gamma)
    assert gradient.norm() > 0.1
    returns = returns_to_go(mdp, gamma)
    close(mdp.expectation(policy, mdp.scores(policy) * returns[0, :, None]), gradient)
    close(mdp.bias(policy, mdp.discounts(gamma) * returns, gamma), torch.zeros_like(gradient))
    with torch.no_grad():
        for i in range(policy.theta.numel()):
            theta, J = policy.theta.view(-1), []
            for change in (1e-5, -2e-5):
                theta[i] += change
                J.append(mdp.J(policy, gamma))
            theta[i] += 1e-5
            close((J[0] - J[1]) / 2e-5, gradient[i], 1e-9)


def test_the_scripts_policy_in_place_of_the_table():
    torch.manual_seed(1)
    policy = Policy(Box(-1, 1, (2,)), Discrete(2)).double()
    gradient = SMALL.exact_gradient(policy, 1.0)
    assert gradient.norm() > 0.01
    close(SMALL.bias(policy, returns_to_go(SMALL, 1.0), 1.0), torch.zeros_like(gradient))


def test_the_scripts_gradient_without_discounts(mdp):
    """E[ sum_t grad log pi G_t ] = sum_t sum_s p_t(s) sum_a grad pi(a|s) Q_t(s,a), which is not grad J."""
    policy, gamma = policy_of(mdp), 0.5
    _, Q, _ = mdp.exact_values(policy, gamma)
    weights = mdp.state_distribution(policy)[..., None] * Q
    pi = policy(mdp.observe).probs
    expected = torch.autograd.grad((weights * pi).sum(), policy.theta)[0].flatten()
    bias = mdp.bias(policy, returns_to_go(mdp, gamma), gamma)
    close(mdp.exact_gradient(policy, gamma) + bias, expected)
    assert bias.norm() > 0.01


def test_log_ratios_turn_one_policys_trajectories_into_anothers(mdp):
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    ratios = mdp.log_ratios(policy, sampler).sum(0).exp()
    close(ratios * mdp.trajectory_probabilities(sampler), mdp.trajectory_probabilities(policy))
    returns = returns_to_go(mdp, 1.0)
    close(mdp.bias(policy, ratios * returns, 1.0, sampler), torch.zeros(policy.theta.numel()))
    assert mdp.bias(policy, returns, 1.0, sampler).norm() > 0.1


# ---------------------------------------------------------------------------- V, Q, A and the states


def test_advantages_have_mean_zero_under_the_policy(mdp):
    policy = policy_of(mdp)
    _, _, advantages = mdp.exact_values(policy, 0.9)
    mean = (policy(mdp.observe).probs * advantages).sum(2)
    close(mean, torch.zeros_like(mean))
    assert advantages.abs().max() > 0.1


def test_Q_is_the_mean_return_after_state_and_action(mdp):
    policy = policy_of(mdp)
    _, Q, _ = mdp.exact_values(policy, 0.9)
    tr, p, returns = mdp.trajectories, mdp.trajectory_probabilities(policy), returns_to_go(mdp, 0.9)
    for t in range(mdp.horizon):
        for s in range(len(mdp.start)):
            here = [tr.valid[t] & (tr.states[t] == s) & (tr.actions[t] == a) for a in (0, 1)]
            for a, select in enumerate(here):
                if p[select].sum() > 0:
                    close(p[select] @ returns[t, select] / p[select].sum(), Q[t, s, a])
            probability = p[here[0] | here[1]].sum()
            close(probability, mdp.state_distribution(policy)[t, s])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_performance_difference(mdp, gamma):
    """J(theta') - J(theta) = E_{pi'}[ sum_t gamma^t A_pi(s_t,a_t) ]"""
    old, new = policy_of(mdp), policy_of(mdp, seed=1)
    advantages = mdp.along(mdp.exact_values(old, gamma)[2]) * mdp.trajectories.valid
    difference = mdp.J(new, gamma) - mdp.J(old, gamma)
    close(mdp.expectation(new, (mdp.discounts(gamma) * advantages).sum(0)), difference)
    assert difference.abs() > 0.05


# ---------------------------------------------------------------------------- estimators


def simulate(mdp, policy, num_episodes):
    """Episodes drawn step by step; returns sum_t r_t (n,) and the scores (n, O * A) of a TabularPolicy."""

    def draw(probs):  # (n, ...) -> (n,)
        return torch.multinomial(probs, 1).squeeze(1)

    pi = policy(mdp.observe).probs.detach()
    s = draw(mdp.start.expand(num_episodes, -1))
    alive = torch.ones(num_episodes, dtype=torch.bool)
    returns = torch.zeros(num_episodes, dtype=torch.float64)
    scores = torch.zeros(num_episodes, policy.theta.numel(), dtype=torch.float64)
    for _ in range(mdp.horizon):
        a = draw(pi[s])
        returns += mdp.r[s, a] * alive
        score = torch.nn.functional.one_hot(a, 2) - pi[s]
        scores += (mdp.observe[s, :, None] * score[:, None]).flatten(1) * alive[:, None]
        next_s = draw(mdp.P[s, a])
        s, alive = next_s, alive & ~mdp.ends[s, a, next_s]
    return returns, scores


def test_simulation_agrees_within_its_standard_error(mdp):
    torch.manual_seed(1)
    policy, n = policy_of(mdp), 100_000
    returns, scores = simulate(mdp, policy, n)
    samples = torch.cat([returns[:, None], returns[:, None] * scores], 1)
    exact = torch.cat([mdp.J(policy, 1.0)[None], mdp.exact_gradient(policy, 1.0)])
    z = (samples.mean(0) - exact) / (samples.std(0) / n**0.5 + 1e-12)
    assert z.abs().max() < 3.5
    total = mdp.trajectories.rewards.sum(0).expand(mdp.horizon, -1)
    close(samples[:, 1:].T.cov(), mdp.covariance(policy, total), 0.05 * samples[:, 1:].var(0).max())


@pytest.mark.parametrize("num_episodes", [1, 2, 3])
def test_batches_are_independent_trajectories(num_episodes):
    """The mean of N estimates has their mean and 1/N of their covariance."""
    policy, weights = policy_of(SMALL), returns_to_go(SMALL, 1.0)
    estimates = SMALL.estimates(policy, weights)
    mean, covariance = SMALL.batch_moments(policy, lambda columns: estimates[columns].mean(0), num_episodes)
    close(mean, SMALL.exact_gradient(policy, 1.0))
    close(covariance, SMALL.covariance(policy, weights) / num_episodes)


@pytest.mark.parametrize("num_episodes", [1, 2, 3])
def test_a_mean_baseline_shrinks_the_gradient(num_episodes):
    """A baseline that is the mean return of the same batch: E[g] = (1 - 1/N) grad J."""
    policy = policy_of(SMALL)
    scores, returns = SMALL.scores(policy), SMALL.trajectories.rewards.sum(0)

    def estimator(columns):
        return ((returns[columns] - returns[columns].mean())[:, None] * scores[columns]).mean(0)

    mean, _ = SMALL.batch_moments(policy, estimator, num_episodes)
    close(mean, (1 - 1 / num_episodes) * SMALL.exact_gradient(policy, 1.0))


def gae_weights(mdp, V, gae_lambda):
    tr = mdp.trajectories
    return compute_gae(tr.rewards, mdp.along(V), tr.terminations, tr.dones, 1.0, gae_lambda) * tr.valid


def test_gae_with_the_exact_values_is_unbiased(mdp):
    policy = policy_of(mdp)
    V, _, _ = mdp.exact_values(policy, 1.0)
    for gae_lambda in (1.0, 0.95, 0.0):
        close(mdp.bias(policy, gae_weights(mdp, V, gae_lambda), 1.0), torch.zeros(policy.theta.numel()))


@pytest.mark.parametrize(
    "name, size", [("full", 0.0932), ("terminating", 0.1735), ("hidden", 0.0955), ("small", 0.1404)]
)
def test_gae_with_wrong_values(name, size):
    """V too high by 1 in the last state: no bias at lambda = 1, where GAE is G_t - V(s_t); below 1 a bias."""
    mdp = MDPS[name]
    policy = policy_of(mdp)
    wrong, _, _ = mdp.exact_values(policy, 1.0)
    wrong[:-1, -1] += 1.0
    close(mdp.bias(policy, gae_weights(mdp, wrong, 1.0), 1.0), torch.zeros(policy.theta.numel()))
    close(mdp.bias(policy, gae_weights(mdp, wrong, 0.0), 1.0).norm(), size, 1e-4)
    assert 0 < mdp.bias(policy, gae_weights(mdp, wrong, 0.5), 1.0).norm() < size


def test_the_exact_baseline_lowers_the_variance(mdp):
    policy = policy_of(mdp)
    V, _, _ = mdp.exact_values(policy, 1.0)
    returns = returns_to_go(mdp, 1.0)
    variance = [mdp.covariance(policy, weights).trace() for weights in (returns, gae_weights(mdp, V, 1.0))]
    assert variance[1] < variance[0]
