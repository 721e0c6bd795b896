"""The estimators of the episode family and the steps they make, against exact gradients and variances."""

from types import SimpleNamespace

import numpy as np
import pytest
import tabular
import torch
from gymnasium.spaces import Box, Discrete
from tabular import FULL, MDPS, SMALL, TERMINATING, close, flat_gradient, moments, moved, policy_of

import offpolicy_is
import reinforce
import reinforce_baseline
from offpolicy_is import effective_sample_size, importance_weights
from reinforce import compute_returns, normalize, policy_loss, total_returns
from reinforce_baseline import compute_baseline, episode_scores, optimal_baseline

ESTIMATORS = ["trajectory", "causal", "no-future", "per-step"]
INF = float("inf")


@pytest.fixture(params=MDPS)
def mdp(request):
    return MDPS[request.param]


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the parameters before and the gradient of every step."""

    def __init__(self, policy, lr=1.0):
        super().__init__(policy.parameters(), lr)
        self.steps = []

    def step(self):
        params = self.param_groups[0]["params"]
        both = params, [p.grad for p in params]
        self.steps.append([torch.cat([x.detach().flatten() for x in xs]) for xs in both])
        super().step()


def arguments(**changes):
    args = dict(gamma=1.0, ent_coef=0.0, max_grad_norm=INF, num_updates=1, min_ess=0.0)
    return SimpleNamespace(**args | dict(estimator="causal", normalize_weights=False) | changes)


def test_the_gradient_is_unbiased_and_with_a_discount_only_that_of_the_total_return(mdp):
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    for estimate, gamma in [(compute_returns, 1.0), (total_returns, 1.0), (total_returns, 0.9)]:
        close(mdp.bias(policy, estimate(rewards, gamma), gamma))
    assert mdp.bias(policy, compute_returns(rewards, 0.9), 0.9).norm() > 0.01
    variances = [mdp.covariance(policy, f(rewards, 1.0)).diag() for f in (compute_returns, total_returns)]
    assert (variances[0] < 0.8 * variances[1]).all()  # here, not by a law
    weights = mdp.trajectory_probabilities(policy) * compute_returns(rewards, 1.0)
    loss = policy_loss(mdp.logprobs(policy).flatten(), weights.flatten(), 1)  # not through the weights
    close(flat_gradient(loss, policy), -mdp.exact_gradient(policy, 1.0))


UPDATES = [reinforce.update_policy, reinforce_baseline.optimal_update, offpolicy_is.update_policy]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("ent_coef, norm", [(0.0, INF), (0.3, INF), (0.3, 0.01)])
def test_an_update_ascends_the_estimate_and_the_entropy_up_to_a_norm(update, normalized, ent_coef, norm):
    policy, columns = policy_of(SMALL), [0, 5, 12]  # episodes of one and of two steps
    tr, scores = SMALL.trajectories.select(columns), SMALL.step_scores(policy)[:, columns]
    valid, weights, R = tr.valid, compute_returns(tr.rewards, 1.0), tr.rewards.sum(0)
    if normalized:
        weights[valid] = normalize(weights[valid])
    estimate = torch.einsum("tn,tnp->p", weights, scores) / 3
    obs = tr.obs[:-1] + 3.0 * ~valid[..., None]  # the padding has no part in it
    batch = obs[valid], tr.actions[valid], weights[valid]
    if update == offpolicy_is.update_policy:
        batch = obs, tr.actions, tr.rewards, valid
    elif update == reinforce_baseline.optimal_update:
        batch, g = (obs, tr.actions, valid, R), scores.sum(0)
        R = normalize(R) if normalized else R
        estimate = (g * (R[:, None] - optimal_baseline(g, R))).mean(0)
    entropy, optimizer = policy(obs[valid]).entropy().mean(), Recorder(policy)
    ascent = estimate + ent_coef * flat_gradient(entropy, policy)
    args = arguments(num_envs=3, ent_coef=ent_coef, max_grad_norm=norm, normalize_weights=normalized)
    metrics = update(policy, optimizer, *batch, args)
    close(-optimizer.steps[0][1], ascent * min(1, norm / ascent.norm()), 1e-6)
    close(metrics["policy_grad_norm"], ascent.norm(), 1e-6)
    close(metrics["entropy"], entropy.detach())
    assert not valid.all() and estimate.norm() > 0.01


def test_a_baseline_of_anything_but_the_action_leaves_no_bias(mdp):
    policy, tr = policy_of(mdp), mdp.trajectories
    returns = compute_returns(tr.rewards, 1.0)
    numbers = torch.tensor(np.random.RandomState(1).normal(size=(mdp.horizon + 1, len(mdp.start))) * 3)
    of_time, of_state, of_both = numbers[:-1, :1], numbers[0][tr.states[:-1]], mdp.along(numbers)[:-1]
    for baseline in (0.7, 40.0, of_time, of_state, of_both, tr.obs[:-1] @ numbers[0, : tr.obs.shape[-1]]):
        close(mdp.bias(policy, returns - baseline, 1.0))
    _, Q, _ = mdp.exact_values(policy, 1.0)
    close(mdp.bias(policy, returns - mdp.along(Q), 1.0), -mdp.exact_gradient(policy, 1.0))


def batch_mean(baseline, num_episodes):
    """The mean of 1/N sum_i sum_t grad log pi (G_t - b) over all batches of SMALL, b from the batch; (P,)"""
    policy, tr = policy_of(SMALL), SMALL.trajectories
    scores, returns = SMALL.step_scores(policy), compute_returns(tr.rewards, 1.0)

    def estimator(columns):
        T = tr.valid[:, columns].any(1).sum()  # as in a rollout, the length of the longest
        G, valid, g = returns[:T, columns], tr.valid[:T, columns], scores[:T, columns]
        if baseline == "optimal":
            return (g.sum(0) * (G[0][:, None] - optimal_baseline(g.sum(0), G[0]))).mean(0)
        weights = G - compute_baseline(baseline, G, valid, None)
        if baseline == "normalize":
            weights[valid] = normalize(G[valid])
        return torch.einsum("tn,tnp->p", weights, g) / num_episodes

    return SMALL.batch_mean(policy, estimator, num_episodes)


OF_BATCHES = [(1, 1.0, (1.0360, 0.0)), (2, 0.7750, (1.1161, 0.6437)), (3, 0.6526, (1.1255, 0.8689))]


@pytest.mark.parametrize("N, optimal_error, of_states", OF_BATCHES)
def test_what_a_baseline_of_the_same_batch_does_to_the_gradient(N, optimal_error, of_states):
    """Of n episodes that run at t, each is 1/n of the mean at t, and n - 1 is binomial(N - 1, p_t)."""
    policy, tr = policy_of(SMALL), SMALL.trajectories
    gradient = SMALL.exact_gradient(policy, 1.0)
    close(batch_mean("none", N), gradient)
    close(batch_mean("mean", N), (1 - 1 / N) * gradient)
    if N > 1:
        close(batch_mean("leave-one-out", N), gradient)
    close((batch_mean("optimal", N) - gradient).norm() / gradient.norm(), optimal_error, 1e-4)
    close((batch_mean("normalize", N) / gradient)[[1, 3]], of_states, 1e-4)
    p, returns = SMALL.trajectory_probabilities(policy).detach(), compute_returns(tr.rewards, 1.0)
    per_time_step = torch.einsum("i,ti,tip->tp", p, returns, SMALL.step_scores(policy))
    running = tr.valid.double() @ p
    shrink = 1 - (1 - (1 - running) ** N) / (N * running)
    close(batch_mean("time", N), shrink @ per_time_step)


def test_the_optimal_baseline_has_the_least_variance_of_all_constants_for_every_parameter(mdp):
    policy, returns = policy_of(mdp), mdp.trajectories.rewards.sum(0)
    p, scores = mdp.trajectory_probabilities(policy).detach(), mdp.scores(policy)
    best = optimal_baseline(scores * (p * len(p)).sqrt()[:, None], returns)  # of the whole distribution

    def variance(baseline):
        return moments(p, scores * (returns[:, None] - baseline))[1].diag()

    for change in (-2.0, -1e-3, 1e-3, 2.0):
        close(variance(best + change) - variance(best), change**2 * (p @ scores**2), 1e-10)
    assert variance(best).sum() < variance(p @ returns).sum() < variance(0).sum()
    assert optimal_baseline(torch.zeros(2, 1), torch.ones(2)) == 0  # finite without a score


def test_scores_of_episodes_are_sums_over_their_own_steps():
    torch.manual_seed(0)
    policy = reinforce_baseline.Policy(Box(-1, 1, (3,)), Box(-1, 1, (2,))).double()
    lengths, obs = torch.tensor([5, 1, 3, 4]), torch.randn(5, 4, 3).double()
    valid, actions = torch.arange(5)[:, None] < lengths, policy(obs).sample()
    obs[~valid], actions[~valid] = float("nan"), 10**6
    scores = episode_scores(policy, obs, actions, valid)
    for i, length in enumerate(lengths):
        loglikelihood = sum(policy(obs[t, i]).log_prob(actions[t, i]) for t in range(length))
        close(scores[i], flat_gradient(loglikelihood, policy))


def test_the_value_is_regressed_in_minibatches_and_judged_before():
    torch.manual_seed(0)
    obs, returns, linear, seen = torch.eye(7), torch.randn(7), torch.nn.Linear(7, 1), []
    error = returns - linear(obs)[:, 0].detach()
    linear.register_forward_pre_hook(lambda _, x: seen.append(x[0].argmax(1)))
    value = torch.nn.Sequential(linear, torch.nn.Flatten(0))
    optimizer, args = Recorder(value, 1e-9), arguments(value_epochs=2, num_minibatches=3, max_grad_norm=0.1)
    metrics = reinforce_baseline.update_value(value, optimizer, obs, returns, args)
    close(metrics["explained_variance"], 1 - error.var() / returns.var(), 1e-6)
    assert [len(rows) for rows in seen] == [7, 3, 3, 1, 3, 3, 1] and len(optimizer.steps) == 6
    assert sorted(torch.cat(seen[1:4])) == sorted(torch.cat(seen[4:])) == list(range(7))
    for rows, (_, gradient) in zip(seen[1:], optimizer.steps):
        expected = torch.cat([obs[rows], torch.ones(len(rows), 1)], 1).T @ -error[rows]
        close(gradient, 0.1 * expected / expected.norm(), 1e-5)


@pytest.mark.parametrize("gamma, b", [(0.0, 0.0), (0.9, 2.5), (1.0, -3.0)])
@pytest.mark.parametrize("T, N", [(1, 1), (1, 3), (5, 1), (6, 4)])
def test_credits_are_the_sums_and_products_of_their_definitions(T, N, gamma, b):
    log_ratios, rewards = torch.tensor(np.random.RandomState(0).normal(size=(2, T, N)))

    def rho(first, last):
        return log_ratios[first : last + 1].exp().prod(0)

    def credit(t, first_ratio):
        return sum(gamma ** (k - t) * rewards[k] * rho(first_ratio, k) for k in range(t, T)) - b

    definitions = {
        "trajectory": lambda t: rho(0, T) * credit(0, T),
        "causal": lambda t: rho(0, t) * credit(t, t + 1),
        "no-future": lambda t: rho(0, t) * credit(t, T),
        "per-step": lambda t: rho(t, t) * credit(t, T),
    }
    close(compute_returns(rewards, gamma), torch.stack([credit(t, T) + b for t in range(T)]))
    close(total_returns(rewards, gamma), (credit(0, T) + b).expand(T, N))
    for estimator, definition in definitions.items():
        expected = torch.stack([definition(t) for t in range(T)])
        close(importance_weights(log_ratios, rewards, gamma, estimator, b), expected, 1e-9)


def importance_bias(mdp, policy, sampler, estimator, gamma=1.0, baseline=0.0, outside=0.0):
    log_ratios = mdp.log_ratios(policy, sampler).detach()
    weights = importance_weights(log_ratios, mdp.trajectories.rewards, gamma, estimator, baseline)
    return mdp.bias(policy, weights - outside, gamma, sampler)


@pytest.mark.parametrize("estimator, gamma", [("trajectory", 1.0), ("trajectory", 0.9), ("causal", 1.0)])
def test_all_ratios_up_to_the_reward_leave_no_bias_with_any_constant_baseline(mdp, estimator, gamma):
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    for baseline in (0.0, 2.5, -40.0):
        close(importance_bias(mdp, policy, sampler, estimator, gamma, baseline), tolerance=1e-11)
    assert importance_bias(mdp, policy, sampler, estimator, gamma, outside=2.5).norm() > 0.1
    assert importance_bias(mdp, policy, sampler, "causal", gamma=0.9).norm() > 0.01


BIASES = {"full": (0.0364, 0.0667), "terminating": (0.0219, 0.0646)}  # of no-future and per-step
BIASES |= {"hidden": (0.0433, 0.1268), "small": (0.0739, 0.0750)}


@pytest.mark.parametrize("name", MDPS)
def test_the_bias_of_dropping_ratios_is_of_first_order(name):
    """So is the change of the gradient itself: the biased ones are exact only at the old policy."""
    mdp, policy = MDPS[name], policy_of(MDPS[name])
    for estimator, size in zip(ESTIMATORS[2:], BIASES[name]):
        close(importance_bias(mdp, policy, policy_of(mdp, seed=1), estimator).norm(), size, 1e-4)
        new = {h: moved(policy, policy_of(mdp, seed=5).theta, h) for h in (1e-2, 1e-3)}
        small, smaller = (importance_bias(mdp, new[h], policy, estimator) / h for h in new)
        assert smaller.norm() > 0.02
        close(small / smaller.norm(), smaller / smaller.norm(), 0.05)


def complete_batch():
    """An MDP with certain transitions, a uniform policy, and every trajectory as often as it comes."""
    P = torch.eye(3, dtype=torch.float64)[torch.tensor(np.random.RandomState(0).randint(3, size=(3, 2)))]
    start = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    mdp = tabular.TabularMDP(start, P, FULL.r + 3, TERMINATING.ends, FULL.observe, 4)
    policy = moved(policy_of(mdp), policy_of(mdp).theta, -1)
    times = (64 * mdp.trajectory_probabilities(policy)).round().long()
    tr = mdp.trajectories.select(torch.arange(len(times)).repeat_interleave(times))
    return mdp, policy, (tr.obs[:-1], tr.actions, tr.rewards, tr.valid)


@pytest.mark.parametrize("normalized, lr, min_ess", [(True, 1.0, 0.0), (True, 0.5, 0.95), (False, 0.1, 0.9)])
@pytest.mark.parametrize("estimator, gamma", [*((x, 1.0) for x in ESTIMATORS), ("trajectory", 0.9)])
def test_updates_have_the_gradient_of_their_policy_while_the_ratios_in_use_are_effective(
    estimator, gamma, normalized, lr, min_ess
):
    """Also away from the policy that collected: with the default, where the baseline is inside the ratio."""
    mdp, policy, (obs, actions, rewards, valid) = complete_batch()
    sampler, optimizer, shares, greatest = moved(policy, policy.theta, 0), Recorder(policy, lr), [], []
    options = dict(estimator=estimator, gamma=gamma, normalize_weights=normalized, min_ess=min_ess)
    args = offpolicy_is.Args(**options, num_updates=9, num_envs=64)
    metrics = offpolicy_is.update_policy(policy, optimizer, obs, actions, rewards, valid, args)
    returns = (total_returns if estimator == "trajectory" else compute_returns)(rewards, gamma)[valid]
    baseline, scale = (returns.mean(), returns.std(correction=0)) if normalized else (0.0, 1.0)
    for theta, gradient in [*optimizer.steps, (policy.theta.detach().flatten(), None)]:
        here = moved(sampler, theta - sampler.theta.flatten())
        rho = ((here(obs).log_prob(actions) - np.log(0.5)) * valid).exp().detach()
        product = {"trajectory": rho.prod(0).expand_as(rho), "per-step": rho}.get(estimator, rho.cumprod(0))
        w = product[valid]
        shares.append(w.sum() ** 2 / (w**2).sum() / len(w))
        greatest.append(w.max())
        if gradient is not None:
            bias = importance_bias(mdp, here, sampler, estimator, gamma, baseline)
            close(-gradient * scale, mdp.exact_gradient(here, gamma) + bias, 1e-5)
            assert estimator not in ESTIMATORS[:2] or bias.norm() < 1e-11
    last = -2 if metrics["updates"] == 9 else -1
    assert min(shares[:-1]) >= min_ess and (last == -2) == (min_ess == 0) and min(shares) < max(min_ess, 0.9)
    close(metrics["effective_share"], shares[last])
    close(metrics["max_ratio"], greatest[last])


def test_the_rounding_of_float32_prevents_no_first_update_and_makes_no_gradient():
    N = 2982  # 2 log N - log N is not log N, and the mean of equal credits not the credit
    policy = offpolicy_is.Policy(Box(-1, 1, (1,)), Discrete(2))
    batch = torch.zeros(1, N, 1), torch.zeros(1, N).long(), torch.full((1, N), 0.1), torch.ones(1, N) > 0
    args, optimizer = arguments(min_ess=1, num_envs=N, normalize_weights=True), Recorder(policy)
    offpolicy_is.update_policy(policy, optimizer, *batch, args)
    assert effective_sample_size(torch.zeros(N)) / N < args.min_ess
    assert len(optimizer.steps) == 1 and optimizer.steps[0][1].norm() < 1e-5


def test_effective_sample_size_is_between_1_and_N_whatever_the_scale():
    for N, scale in [(1, 1), (2, 10), (1000, 0), (1000, 0.1), (1000, 200)]:
        log_w = torch.tensor(np.random.RandomState(0).normal(size=N) * scale)
        size, w = effective_sample_size(log_w), (log_w - log_w.max()).exp()
        close(size, w.sum() ** 2 / (w**2).sum(), 1e-9)
        close(effective_sample_size(log_w - 700), size, 1e-6)
        assert 1 - 1e-9 <= size <= N + 1e-9
    close(effective_sample_size(torch.tensor([1e4, -1e4, 1e4])), 2.0, 1e-2)  # in float32, products of e^10000
