"""The estimators of the episode family against exact gradients and variances, and the slips of the notes."""

from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import FULL, HIDDEN, SMALL, TERMINATING, TabularMDP, TabularPolicy, moments, random_mdp

import offpolicy_is
import ppo
import reinforce
import reinforce_baseline
from offpolicy_is import effective_sample_size, importance_weights
from reinforce import compute_returns, policy_loss, total_returns
from reinforce_baseline import (
    compute_baseline,
    episode_scores,
    leave_one_out_baseline,
    mean_baseline,
    optimal_baseline,
    time_baseline,
)

MDPS = {"full": FULL, "terminating": TERMINATING, "hidden": HIDDEN, "small": SMALL}
ESTIMATORS = ["trajectory", "causal", "no-future", "per-step"]
STEPS = [1e-1, 1e-2, 1e-3]


@pytest.fixture(params=MDPS)
def mdp(request):
    return MDPS[request.param]


def policy_of(mdp, seed=0):
    return TabularPolicy(mdp.observe.shape[1], seed=seed)


def moved(policy, direction, h):
    """A TabularPolicy with theta + h direction."""
    other = TabularPolicy(*policy.theta.shape)
    other.theta.data = policy.theta.detach() + h * direction.view_as(policy.theta)
    return other


def direction_of(policy, seed=5):
    return torch.tensor(np.random.RandomState(seed).normal(size=policy.theta.shape))


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=0, atol=tolerance)


def gradients(output, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(output, list(policy.parameters()))])


def sgd_step(module, policy, update, *data, **args):
    """The step that an update of a script takes with plain SGD and learning rate 1: a gradient; (P,)"""
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    args = SimpleNamespace(**{"ent_coef": 0.0, "max_grad_norm": float("inf"), "gamma": 1.0, **args})
    getattr(module, update)(policy, torch.optim.SGD(policy.parameters(), lr=1.0), *data, args)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]) - before


rewards_and_gamma = st.tuples(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-100, 100, width=32),
    ).map(torch.tensor),
    st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)


# ---------------------------------------------------------------------------- reinforce


@settings(deadline=None, max_examples=60)
@given(rewards_and_gamma)
def test_returns_are_the_sums_of_their_definitions(data):
    rewards, gamma = data
    T, N = rewards.shape
    to_go = [[sum(gamma ** (k - t) * rewards[k, i] for k in range(t, T)) for i in range(N)] for t in range(T)]
    to_go = torch.tensor(to_go, dtype=torch.float64)
    close(compute_returns(rewards, gamma), to_go, 1e-10)
    close(total_returns(rewards, gamma), to_go[0].expand(T, N), 1e-10)


@pytest.mark.parametrize("estimate", [compute_returns, total_returns])
def test_the_gradient_is_unbiased(mdp, estimate):
    policy = policy_of(mdp)
    close(mdp.bias(policy, estimate(mdp.trajectories.rewards, 1.0), 1.0), torch.zeros(policy.theta.numel()))


def test_with_a_discount_only_the_total_return_is_unbiased(mdp):
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    close(mdp.bias(policy, total_returns(rewards, 0.9), 0.9), torch.zeros(policy.theta.numel()))
    assert mdp.bias(policy, compute_returns(rewards, 0.9), 0.9).norm() > 0.01


def test_an_action_is_uncorrelated_with_the_rewards_before_it(mdp):
    """E[ grad log pi(a_t|s_t) r_k ] = 0 for k < t: what lets the past rewards be dropped."""
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    p = mdp.trajectory_probabilities(policy).detach()
    credit = torch.einsum("i,tip,ki->tkp", p, mdp.step_scores(policy), rewards)
    for t in range(mdp.horizon):
        for k in range(mdp.horizon):
            if k < t:
                close(credit[t, k], torch.zeros(policy.theta.numel()))
            else:
                assert credit[t, k].norm() > 1e-4


def test_with_hidden_states_the_gradient_is_that_of_the_policy_on_observations():
    policy, rewards = policy_of(HIDDEN), HIDDEN.trajectories.rewards
    assert policy.theta.shape[0] < len(HIDDEN.start)
    of_observation = HIDDEN.trajectories.obs[:-1] @ torch.tensor([3.0, -2.0]).double()
    of_state = torch.tensor([3.0, -2.0, 1.0, 5.0]).double()[HIDDEN.trajectories.states[:-1]]
    for baseline in (torch.zeros(()), of_observation, of_state):
        close(HIDDEN.bias(policy, compute_returns(rewards, 1.0) - baseline, 1.0), torch.zeros(4))


def test_the_loss_over_all_trajectories_has_the_gradient_of_minus_J(mdp):
    policy, valid = policy_of(mdp), mdp.trajectories.valid
    weights = mdp.trajectory_probabilities(policy) * compute_returns(mdp.trajectories.rewards, 1.0)
    loss = policy_loss(mdp.logprobs(policy)[valid], weights[valid], 1)
    close(gradients(loss, policy), -mdp.exact_gradient(policy, 1.0))


def test_the_gradient_of_the_loss_is_minus_the_estimate_of_the_batch():
    policy, columns = policy_of(TERMINATING), [3, 100, 100, 250, 467]
    tr = TERMINATING.trajectories.select(columns)
    returns = compute_returns(tr.rewards, 1.0)
    logprobs = policy(tr.obs[:-1]).log_prob(tr.actions)[tr.valid]
    loss = policy_loss(logprobs, returns[tr.valid], 5)
    expected = (returns[..., None] * TERMINATING.step_scores(policy)[:, columns]).sum(0).mean(0)
    close(gradients(loss, policy), -expected)
    assert not tr.valid.all() and expected.norm() > 0.1


def test_weights_carry_no_gradient():
    logprobs, theta = torch.randn(4, requires_grad=True), torch.ones(4, requires_grad=True)
    policy_loss(logprobs, 3 * theta * logprobs, 2).backward()
    assert theta.grad is None
    close(logprobs.grad, -3 * logprobs.detach() / 2, 1e-6)


@pytest.mark.parametrize("num_episodes", [1, 4, 10])
def test_weights_of_1_give_the_gradient_of_the_cross_entropy(num_episodes):
    torch.manual_seed(0)
    policy = reinforce.Policy(Box(-1, 1, (3,)), Discrete(4)).double()
    obs, actions = torch.randn(10, 3).double(), torch.randint(4, (10,))
    loss = policy_loss(policy(obs).log_prob(actions), torch.ones(10), num_episodes)
    likelihood = torch.nn.functional.cross_entropy(policy.net(obs), actions, reduction="sum") / num_episodes
    close(loss, likelihood)
    close(gradients(loss, policy), gradients(likelihood, policy))


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_an_update_ascends_the_estimate_and_the_entropy(ent_coef):
    policy, columns = policy_of(SMALL), [0, 5, 12]
    tr = SMALL.trajectories.select(columns)
    returns = compute_returns(tr.rewards, 1.0)
    estimate = SMALL.estimates(policy, compute_returns(SMALL.trajectories.rewards, 1.0))[columns].mean(0)
    entropy = gradients(policy(tr.obs[:-1][tr.valid]).entropy().mean(), policy)
    batch = tr.obs[:-1][tr.valid], tr.actions[tr.valid], returns[tr.valid]
    step = sgd_step(reinforce, policy, "update_policy", *batch, num_envs=3, ent_coef=ent_coef)
    close(step, estimate + ent_coef * entropy)
    assert entropy.norm() > 0.1


# reward-to-go's share of the variance of the total return: summed, and for the worst parameter
@pytest.mark.parametrize(
    "name, summed, worst",
    [
        ("full", 0.5834, 0.6253),
        ("terminating", 0.5866, 0.6289),
        ("hidden", 0.4887, 0.5889),
        ("small", 0.6631, 0.7699),
    ],
)
def test_reward_to_go_has_less_variance_here_for_every_parameter(name, summed, worst):
    mdp = MDPS[name]
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    to_go, total = (mdp.covariance(policy, f(rewards, 1.0)).diag() for f in (compute_returns, total_returns))
    close(to_go.sum() / total.sum(), summed, 1e-4)
    close((to_go / total).max(), worst, 1e-4)


# ---------------------------------------------------------------------------- reinforce_baseline


def test_a_baseline_of_anything_but_the_action_leaves_no_bias(mdp):
    policy, tr = policy_of(mdp), mdp.trajectories
    returns, zero = compute_returns(tr.rewards, 1.0), torch.zeros(policy.theta.numel())
    numbers = torch.tensor(np.random.RandomState(1).normal(size=(mdp.horizon + 1, len(mdp.start))) * 3)
    of_time, of_state, of_both = numbers[:-1, :1], numbers[0][tr.states[:-1]], mdp.along(numbers)[:-1]
    for baseline in (0.7, -3.0, 40.0, of_time, of_state, of_both):
        close(mdp.bias(policy, returns - baseline, 1.0), zero)
    _, Q, _ = mdp.exact_values(policy, 1.0)
    close(mdp.bias(policy, returns - mdp.along(Q), 1.0), -mdp.exact_gradient(policy, 1.0))


def test_every_baseline_of_the_command_line():
    torch.manual_seed(0)
    returns, values = torch.randn(2, 5, 3)
    valid = torch.arange(5)[:, None] < torch.tensor([5, 3, 1])
    others = torch.stack([returns[0, 1:].mean(), returns[0, [0, 2]].mean(), returns[0, :2].mean()])
    time = torch.stack([returns[t, : int(valid[t].sum())].mean() for t in range(5)])[:, None]
    for name, expected in [
        ("none", torch.tensor(0.0)),
        ("mean", returns[0].mean()),
        ("leave-one-out", others),
        ("time", time),
        ("value", values),
    ]:
        close(torch.as_tensor(compute_baseline(name, returns, valid, values)).float(), expected, 1e-6)
    assert time_baseline(returns, valid).shape == (5, 1)
    assert mean_baseline(returns).shape == () and leave_one_out_baseline(returns).shape == (3,)


def batch_estimator(mdp, policy, baseline):
    """1/N sum_i sum_t grad log pi (G_t - b) of the columns of a batch, b from that batch."""
    tr, scores = mdp.trajectories, mdp.step_scores(policy)
    returns = compute_returns(tr.rewards, 1.0)

    def estimator(columns):
        T = tr.valid[:, columns].any(1).sum()  # as in a rollout, the length of the longest
        G, valid = returns[:T, columns], tr.valid[:T, columns]
        weights = G - compute_baseline(baseline, G, valid, None)
        return torch.einsum("ti,tip->p", weights, scores[:T, columns]) / len(columns)

    return estimator


@pytest.mark.parametrize("num_episodes", [2, 3])
def test_the_mean_of_the_batch_shrinks_the_gradient_and_leaving_one_out_does_not(num_episodes):
    policy = policy_of(SMALL)
    gradient = SMALL.exact_gradient(policy, 1.0)
    means = {}
    for name in ("none", "mean", "leave-one-out"):
        estimator = batch_estimator(SMALL, policy, name)
        means[name], _ = SMALL.batch_moments(policy, estimator, num_episodes)
    close(means["none"], gradient)
    close(means["mean"], (1 - 1 / num_episodes) * gradient)
    close(means["leave-one-out"], gradient)


@pytest.mark.parametrize("num_episodes, factors", [(1, (0, 0)), (2, (0.5, 0.45314)), (3, (0.66667, 0.63251))])
def test_the_mean_per_time_step_shrinks_every_time_step_by_its_own_factor(num_episodes, factors):
    """Of n episodes that run at t, each is 1/n of its own baseline, and n - 1 is binomial(N - 1, p_t):
    g_t shrinks by 1 - E[1/n] = 1 - (1 - (1 - p_t)^N) / (N p_t), with p_t the probability to be running."""
    policy, tr = policy_of(SMALL), SMALL.trajectories
    p = SMALL.trajectory_probabilities(policy).detach()
    returns = compute_returns(tr.rewards, 1.0)
    per_time_step = torch.einsum("i,ti,tip->tp", p, returns, SMALL.step_scores(policy))
    running = tr.valid.double() @ p
    shrink = 1 - (1 - (1 - running) ** num_episodes) / (num_episodes * running)
    mean, _ = SMALL.batch_moments(policy, batch_estimator(SMALL, policy, "time"), num_episodes)
    close(mean, shrink @ per_time_step)
    close(shrink, factors, 1e-5)


def test_the_optimal_baseline_of_the_batch_is_biased_too():
    """E[g^2 R] / E[g^2] from the batch itself: the exact relative error for N = 1, 2, 3."""
    policy = policy_of(SMALL)
    scores, returns = SMALL.scores(policy), SMALL.trajectories.rewards.sum(0)
    gradient = SMALL.exact_gradient(policy, 1.0)

    def estimator(columns):
        g, R = scores[columns], returns[columns]
        return (g * (R[:, None] - optimal_baseline(g, R))).mean(0)

    means = [SMALL.batch_moments(policy, estimator, num_episodes)[0] for num_episodes in (1, 2, 3)]
    errors = [(mean - gradient).norm() / gradient.norm() for mean in means]
    close(torch.stack(errors), [1.0, 0.7750, 0.6526], 1e-4)


@pytest.mark.parametrize(
    "num_episodes, factors", [(1, (1.0360, 0.0)), (2, (1.1161, 0.6437)), (3, (1.1255, 0.8689))]
)
def test_normalized_weights_change_the_gradient_by_another_factor_in_every_state(num_episodes, factors):
    policy, tr, scores = policy_of(SMALL), SMALL.trajectories, SMALL.step_scores(policy_of(SMALL))
    returns = compute_returns(tr.rewards, 1.0)

    def estimator(columns):
        valid = tr.valid[:, columns]
        weights = reinforce.normalize(returns[:, columns][valid])
        return weights @ scores[:, columns][valid] / num_episodes

    mean, _ = SMALL.batch_moments(policy, estimator, num_episodes)
    close((mean / SMALL.exact_gradient(policy, 1.0))[[1, 3]], factors, 1e-4)


def folded_optimal_baseline(mdp, policy, returns):
    """The optimal baseline of the whole distribution: each score times the root of p(tau) K."""
    p = mdp.trajectory_probabilities(policy).detach()
    return optimal_baseline(mdp.scores(policy) * (p * len(p)).sqrt()[:, None], returns)


def test_the_optimal_baseline_has_the_least_variance_of_all_constants_for_every_parameter(mdp):
    policy, returns = policy_of(mdp), mdp.trajectories.rewards.sum(0)
    p, scores = mdp.trajectory_probabilities(policy).detach(), mdp.scores(policy)
    squares = p @ scores**2
    best = folded_optimal_baseline(mdp, policy, returns)
    close(best, (p * returns) @ scores**2 / squares, 1e-9)

    def variance(baseline):
        return moments(p, scores * (returns[:, None] - baseline))[1].diag()

    for change in (-2.0, -1e-3, 1e-3, 2.0):
        assert (variance(best + change) > variance(best)).all()
        close(variance(best + change) - variance(best), change**2 * squares, 1e-10)
    assert variance(best).sum() < variance(p @ returns).sum() < variance(0).sum()
    close(variance(2 * best), variance(0), 1e-9)


def test_scores_of_episodes_are_those_of_the_enumeration(mdp):
    policy, tr = policy_of(mdp), mdp.trajectories
    columns = torch.arange(0, len(tr.dynamics), 7)
    some = tr.select(columns)
    scores = episode_scores(policy, some.obs[:-1], some.actions, some.valid)
    close(scores, mdp.scores(policy)[columns])


@pytest.mark.parametrize("action_space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_scores_of_episodes_do_not_see_the_padding(action_space):
    torch.manual_seed(0)
    policy = reinforce_baseline.Policy(Box(-1, 1, (3,)), action_space).double()
    lengths = [5, 1, 3, 4]
    valid = torch.arange(5)[:, None] < torch.tensor(lengths)
    obs = torch.randn(5, 4, 3).double()
    actions = policy(obs).sample()
    obs[~valid] = float("nan")
    actions[~valid] = 10**6
    scores = episode_scores(policy, obs, actions, valid)
    assert scores.shape == (4, sum(p.numel() for p in policy.parameters()))
    for i, length in enumerate(lengths):
        loglikelihood = sum(policy(obs[t, i]).log_prob(actions[t, i]) for t in range(length))
        close(scores[i], gradients(loglikelihood, policy))
    close(episode_scores(policy, obs[:, :1], actions[:, :1], valid[:, :1]), scores[:1])


def test_the_optimal_baseline_of_one_episode_is_its_return_and_stays_finite_without_a_score():
    scores = torch.tensor([[2.0, 0.0, -1e-3]])
    close(optimal_baseline(scores, torch.tensor([7.0])), [7.0, 0.0, 7.0], 1e-4)
    scores = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    close(optimal_baseline(scores, torch.tensor([3.0, 8.0])), [4.0, 0.0], 1e-5)


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_the_optimal_update_ascends_the_scores_times_the_centred_returns(ent_coef):
    policy, columns = policy_of(SMALL), [0, 5, 12]
    tr = SMALL.trajectories.select(columns)
    scores, returns = SMALL.scores(policy)[columns], tr.rewards.sum(0)
    expected = (scores * (returns[:, None] - optimal_baseline(scores, returns))).mean(0)
    entropy = gradients(policy(tr.obs[:-1][tr.valid]).entropy().mean(), policy)
    batch = tr.obs[:-1], tr.actions, tr.valid, returns
    step = sgd_step(reinforce_baseline, policy, "optimal_update", *batch, ent_coef=ent_coef)
    close(step, expected + ent_coef * entropy)
    assert expected.norm() > 0.01


# ---------------------------------------------------------------------------- offpolicy_is


def weights_by_definition(log_ratios, rewards, gamma, estimator):
    rho, (T, N) = log_ratios.exp(), rewards.shape
    weights = torch.zeros(T, N, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            present = rho[: t + 1, i].prod()
            future = [rho[t + 1 : k + 1, i].prod() for k in range(t, T)]
            discounted = [gamma ** (k - t) * rewards[k, i] for k in range(t, T)]
            weights[t, i] = {
                "trajectory": rho[:, i].prod() * sum(gamma**k * rewards[k, i] for k in range(T)),
                "causal": present * sum(r * f for r, f in zip(discounted, future)),
                "no-future": present * sum(discounted),
                "per-step": rho[t, i] * sum(discounted),
            }[estimator]
    return weights


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=40)
@given(rewards_and_gamma, st.integers(0, 2**31))
def test_importance_weights_are_the_products_of_their_definitions(estimator, data, seed):
    rewards, gamma = data
    log_ratios = torch.tensor(np.random.RandomState(seed).normal(size=rewards.shape))
    expected = weights_by_definition(log_ratios, rewards, gamma, estimator)
    actual = importance_weights(log_ratios, rewards, gamma, estimator)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_on_policy_the_weights_are_the_returns(mdp, estimator, gamma):
    rewards = mdp.trajectories.rewards
    returns = (total_returns if estimator == "trajectory" else compute_returns)(rewards, gamma)
    assert torch.equal(importance_weights(torch.zeros_like(rewards), rewards, gamma, estimator), returns)


def importance_bias(mdp, policy, sampler, estimator):
    log_ratios = mdp.log_ratios(policy, sampler).detach()
    weights = importance_weights(log_ratios, mdp.trajectories.rewards, 1.0, estimator)
    return mdp.bias(policy, weights, 1.0, sampler)


@pytest.mark.parametrize("estimator", ["trajectory", "causal"])
def test_all_ratios_up_to_the_reward_leave_no_bias(mdp, estimator):
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    close(importance_bias(mdp, policy, sampler, estimator), torch.zeros(policy.theta.numel()))
    assert mdp.log_ratios(policy, sampler).abs().max() > 0.5


@pytest.mark.parametrize(
    "name, no_future, per_step",
    [
        ("full", 0.0364, 0.0667),
        ("terminating", 0.0219, 0.0646),
        ("hidden", 0.0433, 0.1268),
        ("small", 0.0739, 0.0750),
    ],
)
def test_the_bias_of_dropping_ratios(name, no_future, per_step):
    mdp = MDPS[name]
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    close(importance_bias(mdp, policy, sampler, "no-future").norm(), no_future, 1e-4)
    close(importance_bias(mdp, policy, sampler, "per-step").norm(), per_step, 1e-4)


@pytest.mark.parametrize("estimator", ["no-future", "per-step"])
def test_the_bias_of_dropping_ratios_is_of_first_order(mdp, estimator):
    """So is the change of the gradient itself: the biased ones are exact only at the old policy."""
    sampler = policy_of(mdp)
    d = direction_of(sampler)
    biases = [importance_bias(mdp, moved(sampler, d, h), sampler, estimator) / h for h in STEPS]
    assert biases[-1].norm() > 0.02
    close(biases[1] / biases[2].norm(), biases[2] / biases[2].norm(), 0.05)
    close(biases[0] / biases[2].norm(), biases[2] / biases[2].norm(), 0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 2**31))
def test_the_padding_has_no_influence(estimator, lengths, seed):
    rng = np.random.RandomState(seed)
    valid = torch.arange(6)[:, None] < torch.tensor(lengths)
    log_ratios, rewards = (torch.tensor(rng.normal(size=valid.shape)) * valid for _ in range(2))
    weights = importance_weights(log_ratios, rewards, 0.9, estimator)
    for i, length in enumerate(lengths):
        alone = importance_weights(log_ratios[:length, [i]], rewards[:length, [i]], 0.9, estimator)
        close(weights[:length, [i]], alone)


def batch_of(mdp, columns, sampler, change_padding=0.0):
    """A batch as train keeps it: obs, actions, rewards, valid, old_logprobs."""
    tr = mdp.trajectories.select(columns)
    obs = tr.obs[:-1] + change_padding * ~tr.valid[..., None]
    return obs, tr.actions, tr.rewards, tr.valid, sampler(obs).log_prob(tr.actions).detach()


def offpolicy_step(policy, batches, **changes):
    args = dict(num_updates=1, min_ess=1e-6, estimator="causal", normalize_weights=False, num_envs=5)
    return sgd_step(offpolicy_is, policy, "update_policy", batches, **{**args, **changes})


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change_padding", [0.0, 3.0])
def test_an_update_ascends_the_weighted_scores(estimator, change_padding):
    policy, sampler, columns = policy_of(TERMINATING), policy_of(TERMINATING, 1), [3, 100, 100, 250, 467]
    log_ratios = TERMINATING.log_ratios(policy, sampler).detach()
    weights = importance_weights(log_ratios, TERMINATING.trajectories.rewards, 1.0, estimator)
    expected = TERMINATING.estimates(policy, weights)[columns].mean(0)
    batch = batch_of(TERMINATING, columns, sampler, change_padding)
    close(offpolicy_step(policy, [batch], estimator=estimator), expected)


def test_the_first_of_several_updates_is_on_policy_and_the_next_are_weighted():
    policy, columns = policy_of(FULL), [3, 100, 200, 300, 600]
    batch = batch_of(FULL, columns, policy)
    rewards, sampler = FULL.trajectories.rewards, moved(policy, policy.theta.detach(), 0.0)
    first = FULL.estimates(sampler, compute_returns(rewards, 1.0))[columns].mean(0)
    halfway = moved(sampler, first, 1.0)
    weights = importance_weights(FULL.log_ratios(halfway, sampler).detach(), rewards, 1.0, "causal")
    second = FULL.estimates(halfway, weights)[columns].mean(0)
    close(offpolicy_step(policy, [batch], num_updates=2), first + second)
    assert (weights - compute_returns(rewards, 1.0)).abs().max() > 0.1


def test_equal_weights_are_a_full_sample_whatever_the_rounding():
    N = 2982  # in float32 2 log N - log N is not log N
    assert effective_sample_size(torch.zeros(N)) < N - 1e-3
    policy = offpolicy_is.Policy(Box(-1, 1, (1,)), Discrete(2))
    obs, actions = torch.zeros(1, N, 1), torch.arange(N)[None] % 2
    batch = obs, actions, actions.float(), actions >= 0, policy(obs).log_prob(actions).detach()
    changes = dict(min_ess=1.0, num_updates=1, estimator="per-step", normalize_weights=True)
    assert sgd_step(offpolicy_is, policy, "update_policy", [batch], **changes).norm() > 1e-3


def test_several_batches_are_averaged_each_with_the_ratios_to_its_own_policy():
    policy, columns = policy_of(FULL), [3, 100, 200, 300, 600]
    samplers = [policy_of(FULL, 1), policy_of(FULL, 2), moved(policy, policy.theta.detach(), 0.0)]
    rewards, estimates = FULL.trajectories.rewards, []
    for sampler in samplers:
        weights = importance_weights(FULL.log_ratios(policy, sampler).detach(), rewards, 1.0, "causal")
        estimates.append(FULL.estimates(policy, weights)[columns].mean(0))
    batches = [batch_of(FULL, columns, sampler) for sampler in samplers]
    close(offpolicy_step(policy, batches), torch.stack(estimates).mean(0))


def test_a_batch_below_the_effective_sample_size_is_left_out():
    columns = [3, 100, 200, 300, 600]
    near = policy_of(FULL)
    far = moved(near, direction_of(near), 3.0)
    log_weights = FULL.log_ratios(near, far).sum(0)[columns]
    assert effective_sample_size(log_weights) < 0.5 * 5
    batches = [batch_of(FULL, columns, far), batch_of(FULL, columns, near)]
    only = offpolicy_step(policy_of(FULL), batches[1:], min_ess=0.5)
    close(offpolicy_step(policy_of(FULL), batches, min_ess=0.5), only)
    assert (offpolicy_step(policy_of(FULL), batches) - only).norm() > 0.01


log_weights = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-200, 200)).map(torch.tensor)


@settings(deadline=None)
@given(log_weights, st.floats(-300, 300))
def test_effective_sample_size_is_between_1_and_N_whatever_the_scale(log_w, shift):
    size = effective_sample_size(log_w)
    assert 1 - 1e-9 <= size <= len(log_w) * (1 + 1e-9)
    close(effective_sample_size(log_w + shift), size, 1e-6)
    w = (log_w - log_w.max()).exp()
    close(size, w.sum() ** 2 / (w**2).sum(), 1e-6)


def test_effective_sample_size_of_equal_weights_and_of_one_that_dominates():
    for N in (1, 2, 16, 1000):
        close(effective_sample_size(torch.full((N,), -7.0).double()), N, 1e-9)
        close(effective_sample_size(torch.eye(N)[0].double() * 60), 1.0, 1e-9)


def test_ratios_of_e_to_the_200_per_step_stay_finite():
    """Cumulated over 50 steps of float32: products of e^10000 and e^-10000."""
    log_weights = torch.tensor([200.0, -200.0, 200.0]).expand(50, 3).sum(0)
    close(effective_sample_size(log_weights), 2.0, 1e-2)
    close(effective_sample_size(-log_weights), 1.0, 1e-2)


# ---------------------------------------------------------------------------- Gaussian and Fisher


@pytest.mark.parametrize("log_std", [0.0, -0.7, 0.4])
def test_the_score_of_a_gaussian(log_std):
    """d log pi / d mean = Sigma^-1 (a - mean), without the printed 1/2; d log pi / d log_std = z^2 - 1."""
    torch.manual_seed(0)
    policy = reinforce.Policy(Box(-1, 1, (3,)), Box(-1, 1, (2,))).double()
    policy.log_std.data += torch.tensor([log_std, 0.2])
    obs = torch.randn(3).double()
    mean, std = policy.net(obs), policy.log_std.exp()
    action = torch.tensor([1.3, -0.4]).double()
    logprob = policy(obs).log_prob(action)
    of_mean, of_log_std = torch.autograd.grad(logprob, [policy.net[-1].bias, policy.log_std])
    right = (std.diag() ** 2).inverse() @ (action - mean)
    printed = -0.5 * (std.diag() ** 2).inverse() @ (mean - action)
    close(of_mean, right)
    close(of_mean, 2 * printed)
    close(of_log_std, ((action - mean) / std) ** 2 - 1)
    assert right.norm() > 0.5


def kl_of_trajectories(mdp, p, q):
    """KL(p||q) = E_p[ log p - log q ] over trajectories; the dynamics cancel."""
    return mdp.expectation(p, mdp.log_ratios(p, q).sum(0)).detach()


def fisher(mdp, policy):
    """E[ sum_t grad log pi(a_t|s_t) grad log pi(a_t|s_t)^T ]; (P, P)"""
    p = mdp.trajectory_probabilities(policy).detach()
    return torch.einsum("i,tip,tiq->pq", p, mdp.step_scores(policy), mdp.step_scores(policy))


def test_kl_is_half_the_fisher_form_up_to_third_order(mdp):
    policy = policy_of(mdp)
    d, F = direction_of(policy), fisher(mdp, policy)
    form = d.flatten() @ F @ d.flatten()
    for forward in (True, False):
        rest = []
        for h in (1e-1, 1e-2):
            pair = (policy, moved(policy, d, h)) if forward else (moved(policy, d, h), policy)
            rest.append((kl_of_trajectories(mdp, *pair) - 0.5 * h**2 * form) / h**3)
        assert 1e-3 < rest[1].abs() < form
        close(rest[0], rest[1], 0.3 * rest[1].abs().item())
    p = mdp.trajectory_probabilities(policy).detach()
    close(torch.einsum("i,ip,iq->pq", p, mdp.scores(policy), mdp.scores(policy)), F)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_kl_is_not_negative_and_the_printed_sign_is(seed, other):
    p, q = policy_of(SMALL, seed), policy_of(SMALL, other)
    printed = SMALL.expectation(p, SMALL.logprobs(q).sum(0) - SMALL.logprobs(p).sum(0))
    kl = kl_of_trajectories(SMALL, p, q)
    assert kl >= -1e-15 and (seed == other or kl > 0)
    close(printed, -kl, 1e-14)


# ---------------------------------------------------------------------------- the surrogate of ppo


def surrogate(mdp, policy, old, clip_coef):
    """E_old[ sum_t min(rho_t A_t, clip(rho_t) A_t) ] with the exact advantages, by ppo.policy_loss."""
    valid = mdp.trajectories.valid
    p = mdp.trajectory_probabilities(old).detach().expand(valid.shape)[valid]
    advantages = mdp.along(mdp.exact_values(old, 1.0)[2])[valid]
    logprobs, old_logprobs = mdp.logprobs(policy)[valid], mdp.logprobs(old)[valid].detach()
    return -ppo.policy_loss(logprobs, old_logprobs, p * len(p) * advantages, clip_coef)


def test_at_the_old_policy_the_clipped_surrogate_has_the_gradient_of_J(mdp):
    old = policy_of(mdp)
    close(gradients(surrogate(mdp, old, old, 0.2), old), mdp.exact_gradient(old, 1.0))


def test_the_surrogate_is_the_improvement_of_J_up_to_second_order(mdp):
    old = policy_of(mdp)
    d, rest = direction_of(old), []
    for h in STEPS:
        new = moved(old, d, h)
        improvement = mdp.J(new, 1.0) - mdp.J(old, 1.0)
        rest.append((surrogate(mdp, new, old, 1e9) - improvement).item() / h**2)
    assert abs(rest[2]) > 1e-3
    assert rest[1] == pytest.approx(rest[2], rel=0.1)


def test_the_clipped_surrogate_is_a_lower_bound_of_the_surrogate(mdp):
    old = policy_of(mdp)
    new = moved(old, direction_of(old), 1.0)
    assert surrogate(mdp, new, old, 0.2) < surrogate(mdp, new, old, 1e9) - 0.01


# ---------------------------------------------------------------------------- errata of the notes


def test_reward_to_go_can_have_more_variance_than_the_total_return():
    """A certain first reward of -1.5 is a baseline for the second reward, 1 or 2, of the second action."""
    eye = torch.eye(2, dtype=torch.float64)
    always_to_1 = eye[1].expand(2, 2, 2)
    r = torch.tensor([[-1.5, -1.5], [1.0, 2.0]]).double()
    mdp = TabularMDP(eye[0], always_to_1, r, torch.zeros(2, 2, 2, dtype=torch.bool), eye, 2)
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    to_go, total = (
        mdp.covariance(policy, f(rewards, 1.0)).diag()[2:].sum() for f in (compute_returns, total_returns)
    )
    close(torch.stack([total, to_go]), [0.0268, 0.5123], 1e-4)


@pytest.mark.parametrize("baseline, factor", [(-10.0, 10.635), (-1.0, 1.493), (3.0, 0.150), (20.0, 13.130)])
def test_a_constant_baseline_lowers_the_variance_only_if_it_is_chosen_well(baseline, factor):
    policy, rewards = policy_of(FULL), FULL.trajectories.rewards
    with_it, without = (
        FULL.covariance(policy, total_returns(rewards, 1.0) - b).trace() for b in (baseline, 0.0)
    )
    close(with_it / without, factor, 1e-3)


@pytest.mark.parametrize("h, size", [(1.0, 4.2884), (1e-1, 0.5663), (1e-2, 0.0479), (1e-3, 0.0047)])
def test_causal_ratios_as_printed_count_the_present_twice(h, size):
    """Second product from t, not t + 1: a bias of first order, on a 2-state, 2-action, 3-step MDP."""
    mdp = random_mdp(2, horizon=3)
    sampler = policy_of(mdp)
    policy = moved(sampler, direction_of(sampler), h)
    log_ratios, rewards = mdp.log_ratios(policy, sampler).detach(), mdp.trajectories.rewards
    right = importance_weights(log_ratios, rewards, 1.0, "causal")
    close(mdp.bias(policy, right, 1.0, sampler), torch.zeros(4), 1e-14)
    close(mdp.bias(policy, log_ratios.exp() * right, 1.0, sampler).norm(), size, 1e-4)


def test_a_product_of_ratios_has_mean_1_although_its_logarithm_falls():
    """What hurts is the variance, (1 + chi^2)^t - 1. One state, so that the 8 ratios are independent."""
    mdp = random_mdp(1, horizon=8)
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=2)
    p = mdp.trajectory_probabilities(sampler).detach()
    log_ratios = mdp.log_ratios(policy, sampler).detach()
    products, t = log_ratios.cumsum(0).exp(), torch.arange(1, 9)
    pi, old = policy(mdp.observe).probs[0].detach(), sampler(mdp.observe).probs[0].detach()
    close(products @ p, torch.ones(8))
    close(products.log() @ p, -distances(old, pi)[1] * t)
    close((products - 1) ** 2 @ p, ((pi**2 / old).sum()) ** t - 1)
    all_below, product_below = (log_ratios < 0).all(0).double() @ p, (products[-1] < 1).double() @ p
    close(torch.stack([all_below, product_below]), [0.0145, 0.8091], 1e-4)


def test_importance_sampling_can_lower_the_variance_or_raise_it_with_the_same_ratios():
    p, q = torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64)
    for f, direct, weighted in [((4.0, 1.0), 2.25, 0.0), ((1.0, 4.0), 2.25, 14.0625)]:
        f = torch.tensor(f).double()
        close(p @ f**2 - (p @ f) ** 2, direct)
        close(q @ (p / q * f), p @ f)
        close(q @ (p / q * f) ** 2 - (p @ f) ** 2, weighted, 1e-5)


def test_the_gradient_of_a_product_is_not_the_sum_of_the_scores():
    policy = policy_of(FULL)
    for column in (0, 300, 647):
        product = FULL.logprobs(policy)[:, column].sum().exp()
        close(gradients(product, policy), product.detach() * FULL.scores(policy)[column])
        assert product < 0.9 and FULL.scores(policy)[column].norm() > 0.1


def test_the_printed_weighted_loss_broadcasts_and_loses_the_credit():
    """negative_likelihoods (B,) times q_values (B, 1) is (B, B); its mean is mean(nll) mean(q)."""
    torch.manual_seed(0)
    policy = reinforce.Policy(Box(-1, 1, (3,)), Discrete(4)).double()
    obs, actions, q_values = torch.randn(9, 3).double(), torch.randint(4, (9,)), torch.randn(9, 1).double()
    negative_likelihoods = -policy(obs).log_prob(actions)
    printed = negative_likelihoods * q_values
    assert printed.shape == (9, 9)
    imitation = q_values.mean() * gradients(-policy(obs).log_prob(actions).mean(), policy)
    close(gradients(printed.mean(), policy), imitation)
    right = gradients(policy_loss(policy(obs).log_prob(actions), q_values[:, 0], 9), policy)
    assert torch.cosine_similarity(right, imitation, 0).abs() < 0.9


def test_the_mean_over_all_steps_instead_of_episodes_favours_short_episodes():
    """To leave gives 1, to stay 0.5 up to three times: leaving must become rarer. But an episode of one step
    weighs more in a mean over steps than one of three; 1/N sum_i sum_t has no such preference."""
    eye = torch.eye(2, dtype=torch.float64)
    P = torch.stack([eye, eye[[1, 1]]])
    ends = torch.zeros(2, 2, 2, dtype=torch.bool)
    ends[0, 1, 1] = True
    mdp = TabularMDP(eye[0], P, torch.tensor([[0.5, 1.0], [0.0, 0.0]]).double(), ends, eye, 3)
    policy, lengths = policy_of(mdp), mdp.trajectories.valid.sum(0)
    policy.theta.data.zero_()
    estimates = mdp.estimates(policy, compute_returns(mdp.trajectories.rewards, 1.0))

    def push_to_leave(size, num_episodes):
        mean, _ = mdp.batch_moments(policy, lambda c: estimates[c].sum(0) / size(c), num_episodes)
        return mean[1].item()

    per_episode = [push_to_leave(len, N) for N in (1, 2, 3)]
    per_step = [push_to_leave(lambda c: lengths[c].sum(), N) for N in (1, 2, 3)]
    assert per_episode == pytest.approx([-0.15625] * 3)
    assert per_step == pytest.approx([0.10417, 0.01406, -0.02094], abs=1e-5)


def test_the_advantage_is_the_mean_of_the_td_error_and_not_the_td_error():
    policy, tr = policy_of(FULL), FULL.trajectories
    V, _, advantages = FULL.exact_values(policy, 1.0)
    td_errors = FULL.r[:, :, None] + V[1:, None, None, :] - V[:-1, :, None, None]
    close((FULL.P * td_errors).sum(3), advantages)
    close((td_errors - advantages[..., None]).abs().max(), 0.2152, 1e-4)
    assert tr.valid.all()


def test_the_td_error_has_mean_0_under_the_policy_and_not_under_the_best_action():
    policy = policy_of(FULL)
    V, Q, _ = FULL.exact_values(policy, 1.0)
    close((policy(FULL.observe).probs * Q).sum(2) - V[:-1], torch.zeros(3, 3))
    close((Q.max(2).values - V[:-1]).min(), 0.0168, 1e-4)


def test_a_value_of_later_states_in_the_baseline_is_a_bias():
    """sum_{k>=t} (r_k - V(s_k)) as printed, against G_t - V(s_t)."""
    policy, tr = policy_of(TERMINATING), TERMINATING.trajectories
    V = TERMINATING.along(TERMINATING.exact_values(policy, 1.0)[0])[:-1] * tr.valid
    close(TERMINATING.bias(policy, compute_returns(tr.rewards, 1.0) - V, 1.0), torch.zeros(6))
    close(TERMINATING.bias(policy, compute_returns(tr.rewards - V, 1.0), 1.0).norm(), 0.2467, 1e-4)


def test_the_ratio_of_the_state_marginals_is_the_mean_of_the_product_and_not_an_approximation(mdp):
    """E[ prod_{k<=t} rho_k | s_t, a_t ] = p'(s_t, a_t) / p(s_t, a_t): the same mean as no-future, so the same
    bias; what remains of it is the old policy's future."""
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    rho = mdp.log_ratios(policy, sampler).detach().exp()
    new, old = (mdp.state_distribution(pi) for pi in (policy, sampler))
    of_states = (new / old.where(old > 0, 1))[
        torch.arange(mdp.horizon)[:, None], mdp.trajectories.states[:-1]
    ]
    marginal = of_states * rho * compute_returns(mdp.trajectories.rewards, 1.0)
    bias = mdp.bias(policy, marginal, 1.0, sampler)
    close(bias, importance_bias(mdp, policy, sampler, "no-future"))
    assert bias.norm() > 0.01


def test_the_score_of_the_old_policy_under_the_ratio_is_a_bias():
    """As printed, grad log pi_theta with theta the old policy; right is that of the new one."""
    policy, sampler, rewards = policy_of(FULL), policy_of(FULL, seed=1), FULL.trajectories.rewards
    log_ratios = FULL.log_ratios(policy, sampler).detach()
    weights = importance_weights(log_ratios, rewards, 1.0, "causal")
    p = FULL.trajectory_probabilities(sampler).detach()
    printed = p @ FULL.estimates(sampler, weights)
    close((printed - FULL.exact_gradient(policy, 1.0)).norm(), 2.7650, 1e-4)


def test_without_the_ratio_the_mean_advantage_is_0_and_has_no_gradient(mdp):
    """E_{pi_old}[ A ] = 0: the penalised objective as printed depends on the new policy by its KL alone."""
    old = policy_of(mdp)
    advantages = (mdp.along(mdp.exact_values(old, 1.0)[2]) * mdp.trajectories.valid).sum(0)
    close(mdp.expectation(old, advantages), 0.0)
    new = policy_of(mdp, seed=1)
    close(mdp.expectation(new, advantages), mdp.J(new, 1.0) - mdp.J(old, 1.0))
    assert mdp.expectation(new, advantages).abs() > 0.05


def test_a_natural_gradient_step_has_the_inverse_fisher_in_its_length():
    policy, errors = policy_of(FULL), []
    g, F = FULL.exact_gradient(policy, 1.0), fisher(FULL, policy)
    direction = torch.linalg.pinv(F) @ g
    for eps in (1e-3, 1e-5):
        right, printed = (2 * eps / (g @ direction)).sqrt(), (2 * eps / (g @ F @ g)).sqrt()
        kl = [kl_of_trajectories(FULL, moved(policy, direction, a), policy) / eps for a in (right, printed)]
        errors.append(torch.stack(kl))
    close(errors[1][0], 1.0, 1e-2)
    close((errors[1][0] - 1).abs() / (errors[0][0] - 1).abs(), 0.1, 0.05)
    close(errors[1][1], 2.602, 1e-2)


def distances(p, q):
    """Total variation, 1/2 |p - q|_1, and KL(p||q) of distributions (..., A) -> (...)"""
    return 0.5 * (p - q).abs().sum(-1), (p * (p.log() - q.log())).sum(-1)


def maximal_coupling(p, q):
    """A joint distribution (A, A) with marginals p and q that agrees as often as any can."""
    both = torch.minimum(p, q)
    rest = torch.outer(p - both, q - both)
    return both.diag() + rest / rest.sum().sqrt() if rest.sum() > 0 else both.diag()


distributions = hnp.arrays(np.float64, (2, 4), elements=st.floats(1e-3, 1)).map(
    lambda x: torch.tensor(x / x.sum(1, keepdims=True))
)


@settings(deadline=None, max_examples=50)
@given(distributions)
def test_a_maximal_coupling_agrees_with_probability_1_minus_the_total_variation(pair):
    p, q = pair
    tv, _ = distances(p, q)
    joint = maximal_coupling(p, q)
    assert (joint >= 0).all()
    close(joint.sum(1), p)
    close(joint.sum(0), q)
    close(joint.trace(), 1 - tv)
    assert torch.outer(p, q).trace() <= joint.trace() + 1e-12


@settings(deadline=None, max_examples=50)
@given(distributions)
def test_pinsker_holds_for_the_total_variation_in_both_directions_of_the_kl(pair):
    p, q = pair
    assert distances(p, q)[0] <= (distances(p, q)[1].clamp(min=0) / 2).sqrt() + 1e-7
    assert distances(p, q)[0] <= (distances(q, p)[1].clamp(min=0) / 2).sqrt() + 1e-7


def test_pinsker_fails_for_the_sum_of_absolute_differences():
    p, q = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).double()
    tv, kl = distances(p, q)
    close(torch.stack([tv, 2 * tv, (kl / 2).sqrt()]), [0.1, 0.2, 0.1010], 1e-4)


def test_states_drift_apart_by_eps_t_and_the_printed_2_eps_t_bounds_the_sum_of_differences():
    old, new = policy_of(FULL), policy_of(FULL, seed=1)
    eps = distances(old(FULL.observe).probs, new(FULL.observe).probs)[0].max()
    p, q = FULL.state_distribution(old), FULL.state_distribution(new)
    tv, t = distances(p, q)[0], torch.arange(3)
    assert (tv <= 1 - (1 - eps) ** t + 1e-12).all() and (1 - (1 - eps) ** t <= eps * t + 1e-12).all()
    close(torch.stack([eps, *tv]), [0.4123, 0.0, 0.0832, 0.0266], 1e-4)


def test_the_difference_of_two_means_needs_twice_the_total_variation():
    """|E_p f - E_q f| <= TV max|f| as printed fails; 2 TV max|f| holds, and f = sign(p - q) attains it."""
    p, q = (FULL.state_distribution(policy_of(FULL, seed))[1] for seed in (0, 1))
    tv, _ = distances(p, q)
    f = (p - q).sign()
    difference = p @ f - q @ f
    close(difference, 2 * tv * f.abs().max())
    assert difference > 1.9 * tv and tv > 0.01
