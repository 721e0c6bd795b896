"""The library of exact tests against itself, and what docs/derivations.md says beyond single functions."""

import numpy as np
import pytest
import tabular
import torch
from gymnasium.spaces import Box
from tabular import FULL, MDPS, TERMINATING, TabularMDP, close, flat_gradient, moments, moved, policy_of
from torch.distributions import Categorical, MultivariateNormal, kl_divergence

import ppo
from npg import natural_step_size
from offpolicy_is import compute_returns, importance_weights, policy_loss
from reinforce import Policy, total_returns

EYE = torch.eye(2, dtype=torch.float64)


@pytest.fixture(params=MDPS)
def mdp(request):
    return MDPS[request.param]


def distances(p, q):
    """Total variation, 1/2 |p - q|_1, and KL(p||q) of distributions (..., A) -> (...)"""
    return 0.5 * (p - q).abs().sum(-1), (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_the_enumeration_has_the_exact_values_and_gradient_as_means(mdp, gamma):
    policy, tr = policy_of(mdp), mdp.trajectories
    V, Q, _ = mdp.exact_values(policy, gamma)
    close(mdp.J(policy, gamma), mdp.start @ V[0])
    p, G = mdp.trajectory_probabilities(policy), compute_returns(tr.rewards, gamma)
    states, actions = torch.eye(len(mdp.start))[tr.states[:-1]], torch.eye(2)[tr.actions]
    visits = torch.einsum("tk,tks,tka->tksa", tr.valid.float(), states, actions).double()
    expected = mdp.state_distribution(policy)[..., None] * policy(mdp.observe).probs
    close(torch.einsum("k,tksa->tsa", p, visits), expected)
    close(torch.einsum("k,tk,tksa->tsa", p, G, visits), expected * Q)
    close(mdp.expectation(policy, mdp.scores(policy) * G[0, :, None]), mdp.exact_gradient(policy, gamma))
    close(mdp.bias(policy, mdp.discounts(gamma) * G, gamma))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_value_of_a_policy_from_the_episodes_of_another(mdp, gamma):
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=1)
    log_ratios, p = mdp.log_ratios(policy, sampler).detach(), mdp.trajectory_probabilities(sampler).detach()
    weights = importance_weights(log_ratios, mdp.trajectories.rewards, gamma, "trajectory")
    close(p @ weights[0], mdp.J(policy, gamma))
    assert (mdp.J(sampler, gamma) - mdp.J(policy, gamma)).abs() > 0.05


def test_without_an_end_the_mean_reward_is_that_of_the_stationary_distribution():
    """d = d P_pi. Started in d, J / T = d r_pi for every T; grad d r_pi = sum_s d(s) sum_a grad pi Q(s,a)."""
    policy = policy_of(FULL)
    pi = policy(FULL.observe).probs
    P, r = torch.einsum("sa,sax->sx", pi, FULL.P), (pi * FULL.r).sum(1)
    d = torch.linalg.solve((torch.eye(3) - P + 1).T, torch.ones(3).double())
    mean_reward = d @ r
    for horizon in (1, 3):
        mdp = TabularMDP(d.detach(), FULL.P, FULL.r, FULL.ends, FULL.observe, horizon)
        close(mdp.state_distribution(policy), d.expand(horizon, 3))
        close(mdp.J(policy, 1.0) / horizon, mean_reward)
    V = torch.linalg.solve(torch.eye(3) - P + d, r - mean_reward)  # relative to the mean reward, E_d[V] = 0
    Q = FULL.r - mean_reward + FULL.P @ V
    theorem = (d.detach()[:, None] * pi * Q.detach()).sum()
    close(flat_gradient(theorem, policy), flat_gradient(mean_reward, policy))


def surrogate(mdp, policy, old, clip_coef, gamma, power):
    """E_old[ sum_t power^t min(rho_t A_t, clip(rho_t) A_t) ], A exact, by ppo.policy_loss."""
    valid = mdp.trajectories.valid
    p = (mdp.discounts(power) * mdp.trajectory_probabilities(old).detach())[valid]
    advantages = mdp.along(mdp.exact_values(old, gamma)[2])[valid]
    logprobs, old_logprobs = mdp.logprobs(policy)[valid], mdp.logprobs(old)[valid].detach()
    return -ppo.policy_loss(logprobs, old_logprobs, p * len(p) * advantages, clip_coef)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_surrogate_is_the_improvement_of_J_up_to_second_order_and_the_clipped_one_below(mdp, gamma):
    """J(theta') - J(theta) = E_{pi'}[ sum_t gamma^t A_pi(s_t,a_t) ]; under pi, without a ratio, it is 0."""
    old, rest = policy_of(mdp), []
    discounted = mdp.discounts(gamma) * mdp.along(mdp.exact_values(old, gamma)[2]) * mdp.trajectories.valid
    close(mdp.expectation(old, discounted.sum(0)))
    for h in (1.0, 1e-2, 1e-3):
        new = moved(old, policy_of(mdp, seed=5).theta, h)
        improvement = mdp.expectation(new, discounted.sum(0))
        close(improvement, mdp.J(new, gamma) - mdp.J(old, gamma))
        clipped, plain = (surrogate(mdp, new, old, clip, gamma, gamma) for clip in (0.2, 1e9))
        assert clipped < plain - 0.01 or h < 1
        rest.append((plain - improvement).item() / h**2)
    assert abs(rest[2]) > 1e-3 and rest[1] == pytest.approx(rest[2], rel=0.1)


def test_without_gamma_to_the_t_the_gradient_is_not_that_of_J(mdp):
    """Of the reward-to-go and of the surrogate: sum_t sum_s p_t(s) sum_a grad pi(a|s) Q_t(s,a) instead."""
    policy, gamma = policy_of(mdp), 0.5
    gradient, rewards = mdp.exact_gradient(policy, gamma), mdp.trajectories.rewards
    close(flat_gradient(surrogate(mdp, policy, policy, 0.2, gamma, gamma), policy), gradient)
    weights = mdp.state_distribution(policy)[..., None] * mdp.exact_values(policy, gamma)[1]
    without = flat_gradient((weights * policy(mdp.observe).probs).sum(), policy)
    close(flat_gradient(surrogate(mdp, policy, policy, 0.2, gamma, 1.0), policy), without)
    close(gradient + mdp.bias(policy, compute_returns(rewards, gamma), gamma), without)
    assert (gradient - without).norm() > 0.01


def test_a_euclidean_step_a_natural_step_and_the_bounds_as_printed():
    """In |d|^2 <= eps the best step is along g; one of the same KL, 1/2 d F d, along F^-1 g gains more."""
    policy, eps = policy_of(FULL), 1e-2
    p, scores = FULL.trajectory_probabilities(policy).detach(), FULL.scores(policy)
    g, F = FULL.exact_gradient(policy, 1.0), scores.T @ (p[:, None] * scores)
    x, step = torch.linalg.pinv(F) @ g, (eps / (g @ g)).sqrt() * g
    others = torch.nn.functional.normalize(torch.randn(1000, 6).double()) * eps**0.5
    assert (others @ g).max() < step @ g and (step @ step - eps).abs() < 1e-12
    kl = step @ F @ step / 2
    natural, printed = natural_step_size(g, x, kl) * x, (2 * kl / (g @ F @ g)).sqrt() * x
    close(torch.stack([natural @ F @ natural, printed @ F @ printed]) / (2 * kl), [1, 2.592], 1e-3)
    close(torch.stack([step @ g, natural @ g]), [0.0769, 0.0785], 1e-4)
    near = moved(policy, natural_step_size(g, x, 1e-6) * x)  # whose KL is that of the quadratic form
    close(FULL.expectation(policy, FULL.log_ratios(policy, near).sum(0)) * 1e6, 1.0, 1e-2)
    shares, A, t = [], FULL.exact_values(policy, 1.0)[2], torch.arange(3)
    for new in moved(policy, x, 1e-2), moved(policy, x, 1e-3):
        eps = distances(policy(FULL.observe).probs, new(FULL.observe).probs)[0].max()
        bounds = 2 * eps * 3 * 3 * FULL.r.abs().max(), 4 * eps**2 * (t * A.abs().amax((1, 2))).sum()
        shares.append(torch.stack(bounds).detach() / surrogate(FULL, new, policy, 1e9, 1.0, 1.0).item())
    first, second = shares[1]  # of the gain: sum_t 2 eps t T R_max as printed, and what is right
    close(torch.stack([first, second / shares[0][1]]), [13.5, 0.1], 0.1)


def test_gaussians_with_a_full_and_with_a_diagonal_covariance():
    """The scores of the mean, without the printed 1/2, and of Sigma; entropy and KL; and those of Policy."""
    torch.manual_seed(0)
    mean, other, action = torch.randn(3, 2).double()
    sigma, wide = torch.tensor([[[1.0, 0.6], [0.6, 0.5]], [[2.0, 0.3], [0.3, 1.0]]]).double()
    mean.requires_grad_(), sigma.requires_grad_()
    p, q = MultivariateNormal(mean, sigma), MultivariateNormal(other, wide)
    of_mean, of_sigma = torch.autograd.grad(p.log_prob(action), [mean, sigma])
    u = sigma.inverse() @ (action - mean)
    close(of_mean, u)
    close(of_sigma, 0.5 * (torch.outer(u, u) - sigma.inverse()))
    close(p.entropy(), 0.5 * torch.logdet(2 * np.pi * np.e * sigma))
    form = (wide.inverse() @ sigma).trace() + (other - mean) @ wide.inverse() @ (other - mean)
    close(kl_divergence(p, q), 0.5 * (form - 2 + torch.logdet(wide) - torch.logdet(sigma)))
    policies = [Policy(Box(-1, 1, (3,)), Box(-1, 1, (2,)), std).double() for std in (0.5, 2.0)]
    diagonal = [policy(torch.ones(3).double()) for policy in policies]
    full = [MultivariateNormal(x.mean, (x.stddev**2).diag_embed()) for x in diagonal]
    for f in (lambda p, q: p.log_prob(action), lambda p, q: p.entropy(), kl_divergence):
        close(f(*diagonal), f(*full))
    parameters = policies[0].net[-1].bias, policies[0].log_std
    of_mean, of_log_std = torch.autograd.grad(diagonal[0].log_prob(action), parameters)
    z = (action - diagonal[0].mean) / diagonal[0].stddev
    close(of_mean, z / 0.5, 1e-6)
    close(of_log_std, z**2 - 1, 1e-6)


def test_total_variation_in_couplings_in_means_in_pinskers_inequality_and_in_time():
    """Maximal coupling: equal with probability 1 - TV. |E_p f - E_q f| <= 2 TV max|f|. TV <= sqrt(KL / 2)."""
    for p, q in torch.tensor(np.random.RandomState(0).dirichlet([0.5] * 4, (50, 2))):
        (tv, kl), both = distances(p, q), torch.minimum(p, q)
        joint = both.diag() + torch.outer(p - both, q - both) / tv
        assert (joint >= 0).all() and tv <= (kl / 2).sqrt() and tv <= (distances(q, p)[1] / 2).sqrt()
        close(torch.stack([joint.sum(1), joint.sum(0)]), torch.stack([p, q]))
        close(joint.trace(), 1 - tv)
        close((p - q) @ (p - q).sign(), 2 * tv)  # not TV, as printed
        close((p * (q.log() - p.log())).sum(), -kl)  # the printed sign
    tv, kl = distances(*torch.tensor([[0.5, 0.5], [0.6, 0.4]]).double())
    close(torch.stack([2 * tv, (kl / 2).sqrt()]), [0.2, 0.1010], 1e-4)  # fails for the sum of differences
    old, new = policy_of(FULL), policy_of(FULL, seed=1)
    eps = distances(old(FULL.observe).probs, new(FULL.observe).probs)[0].max()
    tv, t = distances(*(FULL.state_distribution(policy) for policy in (old, new)))[0], torch.arange(3)
    assert (tv <= 1 - (1 - eps) ** t + 1e-12).all() and (1 - (1 - eps) ** t <= eps * t + 1e-12).all()
    close(torch.stack([eps, *tv]), [0.4123, 0.0, 0.0832, 0.0266], 1e-4)


def test_credits_as_printed():
    policy, rewards = policy_of(FULL), FULL.trajectories.rewards
    product = FULL.logprobs(policy)[:, 300].sum().exp()
    close(flat_gradient(product, policy), product.detach() * FULL.scores(policy)[300])  # not without product
    returns = total_returns(rewards, 1.0)
    variances = [FULL.covariance(policy, returns - b).trace() for b in (0.0, -10.0, -1.0, 3.0, 20.0)]
    close(torch.stack(variances[1:]) / variances[0], [10.635, 1.493, 0.150, 13.130], 1e-3)
    tr, policy = TERMINATING.trajectories, policy_of(TERMINATING)
    V = TERMINATING.along(TERMINATING.exact_values(policy, 1.0)[0])[:-1] * tr.valid
    close(TERMINATING.bias(policy, compute_returns(tr.rewards, 1.0) - V, 1.0))
    close(TERMINATING.bias(policy, compute_returns(tr.rewards - V, 1.0), 1.0).norm(), 0.2467, 1e-4)
    # a certain first reward of -1.5 is a baseline for the second reward, 1 or 2, of the second action
    r = torch.tensor([[-1.5, -1.5], [1.0, 2.0]]).double()
    mdp = TabularMDP(EYE[0], EYE[1].expand(2, 2, 2), r, torch.zeros(2, 2, 2, dtype=torch.bool), EYE, 2)
    policy, rewards = policy_of(mdp), mdp.trajectories.rewards
    variances = [mdp.covariance(policy, f(rewards, 1.0)).diag() for f in (total_returns, compute_returns)]
    close(torch.stack([variance[2:].sum() for variance in variances]), [0.0268, 0.5123], 1e-4)


def test_the_printed_weighted_loss_broadcasts_and_loses_the_credit():
    """negative_likelihoods (B,) times q_values (B, 1) is (B, B); its mean is mean(nll) mean(q)."""
    torch.manual_seed(0)
    logits, q_values = torch.randn(9, 4, requires_grad=True), torch.randn(9, 1)
    logprobs = Categorical(logits=logits).log_prob(torch.randint(4, (9,)))
    losses = (-logprobs * q_values).mean(), -logprobs.mean() * q_values.mean()
    losses += (policy_loss(logprobs, q_values[:, 0], 9),)
    printed, imitation, right = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in losses)
    close(printed, imitation, 1e-6)
    assert torch.cosine_similarity(right.flatten(), imitation.flatten(), 0).abs() < 0.9


def test_the_mean_over_all_steps_instead_of_episodes_favours_short_episodes():
    """To leave gives 1, to stay 0.5 up to three times: leaving must become rarer. But an episode of one step
    weighs more in a mean over steps than one of three; 1/N sum_i sum_t has no such preference."""
    ends = torch.zeros(2, 2, 2, dtype=torch.bool)
    ends[0, 1, 1] = True
    P, r = torch.stack([EYE, EYE[[1, 1]]]), torch.tensor([[0.5, 1.0], [0.0, 0.0]]).double()
    mdp = TabularMDP(EYE[0], P, r, ends, EYE, 3)
    policy, lengths = moved(policy_of(mdp), policy_of(mdp).theta, -1), mdp.trajectories.valid.sum(0)
    estimates = mdp.estimates(policy, compute_returns(mdp.trajectories.rewards, 1.0))
    for N, push in zip((1, 2, 3), (0.10417, 0.01406, -0.02094)):
        close(mdp.batch_mean(policy, lambda c: estimates[c].mean(0), N)[1], -0.15625)
        close(mdp.batch_mean(policy, lambda c: estimates[c].sum(0) / lengths[c].sum(), N)[1], push, 1e-5)


def test_a_product_of_ratios_has_mean_1_although_its_logarithm_falls():
    """What hurts is the variance, (1 + chi^2)^t - 1. One state, so that the 8 ratios are independent."""
    mdp = tabular.random_mdp(1, horizon=8)
    policy, sampler = policy_of(mdp), policy_of(mdp, seed=2)
    p, t = mdp.trajectory_probabilities(sampler).detach(), torch.arange(1, 9)
    log_ratios = mdp.log_ratios(policy, sampler).detach()
    products = log_ratios.cumsum(0).exp()
    pi, old = (x(mdp.observe).probs[0].detach() for x in (policy, sampler))
    close(products @ p, 1)
    close(products.log() @ p, -distances(old, pi)[1] * t)
    close((products - 1) ** 2 @ p, (pi**2 / old).sum() ** t - 1)
    below = torch.stack([(log_ratios < 0).all(0), products[-1] < 1]).double()  # all 8, their product
    close(below @ p, [0.0145, 0.8091], 1e-4)
    p, q = torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64)
    for f, weighted in [((4.0, 1.0), 0.0), ((1.0, 4.0), 14.0625)]:  # variance lower and higher than direct
        f = torch.tensor(f).double()[:, None]
        (mean, direct), (same, variance) = moments(p, f), moments(q, (p / q)[:, None] * f)
        close(torch.cat([same - mean, direct[0], variance[0]]), [0, 2.25, weighted], 1e-12)


@pytest.mark.parametrize("h, size", [(1.0, 4.2884), (1e-1, 0.5663), (1e-2, 0.0479), (1e-3, 0.0047)])
def test_importance_weights_as_printed(h, size):
    """Causal, with the second product from t, not t + 1: rho_t counts twice, a first-order bias. So has the
    score of the old policy. p'(s_t, a_t) / p(s_t, a_t) is the mean of prod_{k<=t} rho_k: the same bias."""
    mdp = tabular.random_mdp(2, horizon=3)
    sampler, rewards, p = policy_of(mdp), mdp.trajectories.rewards, lambda x: mdp.state_distribution(x)
    policy = moved(sampler, policy_of(mdp, seed=5).theta, h)
    log_ratios = mdp.log_ratios(policy, sampler).detach()
    causal, no_future = (importance_weights(log_ratios, rewards, 1.0, x) for x in ("causal", "no-future"))
    close(mdp.bias(policy, causal, 1.0, sampler), 0.0, 1e-14)
    close(mdp.bias(policy, log_ratios.exp() * causal, 1.0, sampler).norm(), size, 1e-4)
    score = mdp.trajectory_probabilities(sampler).detach() @ mdp.estimates(sampler, causal)
    assert (score - mdp.exact_gradient(policy, 1.0)).norm() > 0.1 * h
    of_states = (p(policy) / p(sampler))[torch.arange(3)[:, None], mdp.trajectories.states[:-1]]
    marginal = of_states * log_ratios.exp() * compute_returns(rewards, 1.0)
    close(mdp.bias(policy, marginal, 1.0, sampler), mdp.bias(policy, no_future, 1.0, sampler))


def test_the_advantage_is_the_mean_of_the_td_error_and_not_the_td_error():
    """Nor is V updated with a maximum: under the policy, not under the best action, the error has mean 0."""
    policy = policy_of(FULL)
    V, Q, advantages = FULL.exact_values(policy, 1.0)
    td_errors = FULL.r[:, :, None] + V[1:, None, None, :] - V[:-1, :, None, None]
    close((FULL.P * td_errors).sum(3), advantages)
    close((td_errors - advantages[..., None]).abs().max(), 0.2152, 1e-4)
    close((policy(FULL.observe).probs * advantages).sum(2))
    close((Q.max(2).values - V[:-1]).min(), 0.0168, 1e-4)
    S, eye = torch.tensor([[2, 1], [1, 1], [2, 2]]), torch.eye(3).double()  # for good to 1 or to 2, from 0
    r = torch.tensor([[-1, 1], [1, 1], [-1, -1]]).double()
    mdp = TabularMDP(eye[0], eye[S], r, torch.zeros(3, 2, 3, dtype=torch.bool), eye, 3)
    always_0 = moved(policy_of(mdp), torch.tensor([99.0, 0.0]).expand(3, 2).clone())
    close(mdp.exact_values(always_0, 1.0)[2].max(), 6)  # twice T R_max
