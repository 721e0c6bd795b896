"""The trust region: Fisher product, conjugate gradient, step length, line search, and the updates.

All against explicit matrices, or the enumerated MDPs of tabular.py.
"""

import copy
import importlib
import itertools
from math import inf, isfinite, nan

import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from tabular import MDPS, close, flat_gradient, policy_of
from torch.distributions.kl import kl_divergence

import trpo
from npg import Policy, conjugate_gradient, fisher_vector_product, flat_grad, natural_step_size

OBS_SPACE = Box(-1, 1, (3,))


@pytest.fixture(params=["npg", "trpo"])
def script(request):
    return importlib.import_module(request.param)


def vector_of(policy):
    return nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


# ---------------------------------------------------------------------------- the natural step


@pytest.fixture(params=[Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "box"])
def small_policy(request):
    """A Policy in float64 whose network is small enough for explicit matrices."""
    torch.manual_seed(0)
    policy = Policy(OBS_SPACE, request.param, init_std=1.3)
    policy.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, policy.net[-1].out_features))
    return policy.double()


def kl_gradient(policy, obs, weights=1.0):
    """The graph of grad KL(pi_old || pi) at pi = pi_old, weighted mean over obs."""
    with torch.no_grad():
        old = policy(obs)
    kl = (weights * kl_divergence(old, policy(obs))).mean()
    return flat_grad(kl, list(policy.parameters()), create_graph=True)


def fisher_products(policy, grad_kl, damping=0.0):
    """fisher_vector_product applied to the identity, on one graph; (P, P)"""
    params, identity = list(policy.parameters()), torch.eye(len(grad_kl)).double()
    return torch.stack([fisher_vector_product(grad_kl, params, v, damping) for v in identity])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("mdp", MDPS.values(), ids=MDPS)
def test_no_step_of_the_same_quadratic_kl_promises_more(mdp, damping):
    """And the Fisher product is the expected outer product of the score. Without sampling."""
    policy, obs = policy_of(mdp), mdp.observe
    p, scores = mdp.trajectory_probabilities(policy).detach(), mdp.step_scores(policy)
    grad_kl = kl_gradient(
        policy, obs, len(obs) * mdp.state_distribution(policy).sum(0)
    )  # weights: the visits
    close(grad_kl, 0.0, 1e-14)  # the KL is least where pi = pi_old, but it curves
    F, g = fisher_products(policy, grad_kl, damping), mdp.exact_gradient(policy, 1.0)
    close(F, torch.einsum("i,tip,tiq->pq", p, scores, scores) + damping * torch.eye(len(F)).double())
    x = conjugate_gradient(lambda v: F @ v, g, 200, 1e-12)
    for max_kl in (1e-4, 0.03, 2.0):
        step = natural_step_size(g, x, max_kl) * x
        assert (step @ F @ step / 2).item() == pytest.approx(max_kl, rel=1e-6)
        for d in (g, *torch.randn(50, len(g)).double()):
            assert (2 * max_kl / (d @ F @ d)).sqrt() * (g @ d) < g @ step


# ---------------------------------------------------------------------------- conjugate gradient

SPECTRA = {  # and the number of different eigenvalues where it bounds the iterations
    "one": ([2.0], 1),
    "identity": ([1.0] * 5, 1),
    "two clusters": ([1.0] * 4 + [50.0] * 4, 2),
    "singular": ([0.0, 0.0, 0.5, 1.0, 3.0], 3),
    "condition 1e4": (np.logspace(-4, 0, 12), None),
    "condition 1e8": (np.logspace(-6, 2, 9), None),
}


@pytest.mark.parametrize("eigenvalues, different", SPECTRA.values(), ids=SPECTRA)
def test_the_solution_is_that_of_a_direct_solve_with_less_error_at_every_iteration(eigenvalues, different):
    """In the norm sqrt(e^T A e), where every iterate is the best of its Krylov space; a residual may rise.
    That of a singular matrix is the shortest solution."""
    rng, n = np.random.RandomState(0), len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.tensor(rng.normal(size=(n, n))))
    A = Q @ torch.as_tensor(eigenvalues).double().diag() @ Q.T
    b = 100 * A @ torch.tensor(rng.normal(size=n))

    def solve(iters, tol):
        products = []
        x = conjugate_gradient(lambda v: (products.append(v), A @ v)[1], b, iters, tol)
        return x, len(products), (A @ x - b).norm() / b.norm()

    expected = torch.linalg.pinv(A) @ b if min(eigenvalues) == 0 else torch.linalg.solve(A, b)
    x, iterations, residual = solve(2000, 1e-10)
    assert residual < 1e-7 and (x - expected).norm() < 1e-4 * expected.norm()
    assert different in (None, iterations)
    _, iterations, _ = solve(2000, 1e-6)
    errors = []
    for iters in range(iterations + 1):
        x, products, residual = solve(iters, 1e-6)
        assert products == iters and (residual <= 1.001e-6) == (iters == iterations)
        errors.append(((x - expected) @ A @ (x - expected)).item())
    assert all(after < before for before, after in zip(errors, errors[1:]))


def test_without_curvature_or_without_a_right_side_there_is_no_step_and_no_number_leaves_float32():
    zero, one = torch.zeros(3), torch.ones(3)
    for curvature, b in ((0.0, one), (-1.0, one), (1.0, zero)):
        assert torch.equal(conjugate_gradient(lambda v: curvature * v, b, 10, 1e-5), zero)  # noqa: B023
        size = natural_step_size(b, zero, 0.03)
        assert size.isfinite() and torch.equal(size * zero, zero)
    for *A, scale in itertools.product([0.0, 1e-38, 1e-20, 1.0, 1e15, 1e38], repeat=4):
        x = conjugate_gradient(lambda v: torch.tensor(A) * v, min(scale, 1e15) * one, 10, 1e-5)  # noqa: B023
        assert x.isfinite().all()


# ---------------------------------------------------------------------------- line search

GOOD = (-1.0, 0.01)
SEARCHES = {  # (loss, kl) at every try, where the loss before is 0 and max_kl 0.03; which try is accepted
    "the first that is good, not the best": ([(-0.1, 0.01), (-9.0, 0.01)], 0),
    "kl of exactly max_kl": ([(-1.0, 0.03)], 0),
    "better, but too far": ([(-1.0, 0.0301), GOOD], 1),
    "near, but not better": ([(0.1, 0.01), (0.0, 0.01), GOOD], 2),
    "either alone": ([(-1.0, 0.04), (1.0, 0.01), (-1.0, 0.04), (1.0, 0.01)], None),
    "not a number": ([(nan, 0.01), (-1.0, nan), (-1.0, inf), GOOD], 3),
    "never a number": ([(nan, nan)] * 4, None),
    "only after the last": ([(1.0, 0.0)] * 4 + [GOOD], None),
}


@pytest.mark.parametrize("results, expected", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("shapes", [[(2, 3), (4,), ()], [(3,)]])
def test_line_search_takes_the_first_try_that_is_better_and_near(results, expected, shapes):
    params, visited = [nn.Parameter(torch.randn(shape)) for shape in shapes], []
    params[0].data.view(-1)[:3] = torch.tensor([-0.0, 1e-40, 1e30])  # numbers that are easily lost
    before = nn.utils.parameters_to_vector(params).detach().clone()
    step = torch.linspace(-1, 1, len(before))

    def evaluate():
        assert not torch.is_grad_enabled()
        visited.append(nn.utils.parameters_to_vector(params).detach().clone())
        return torch.tensor([(0.0, 0.0), *results][len(visited) - 1])

    accepted = trpo.line_search(evaluate, params, step, 0.03, 0.5, max_backtracks=4)
    assert accepted == (expected is not None)
    assert len(visited) == 1 + (4 if expected is None else expected + 1)
    assert all(torch.equal(point, before + 0.5**j * step) for j, point in enumerate(visited[1:]))
    after, right = nn.utils.parameters_to_vector(params).detach(), visited[-1] if accepted else before
    assert torch.equal(after.view(torch.int32), right.view(torch.int32))  # bit for bit, -0.0 included
    assert [param.shape for param in params] == shapes and all(param.requires_grad for param in params)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_an_update_is_the_natural_gradient_step_of_explicit_matrices(script, small_policy, ent_coef):
    obs, advantages = torch.randn(30, 3).double(), torch.randn(30).double()
    actions, old = small_policy(obs).sample(), copy.deepcopy(small_policy)
    args = script.Args(max_kl=1e-4, cg_iters=300, cg_tol=1e-10, damping=0.01, ent_coef=ent_coef)
    metrics = script.update_policy(small_policy, args.max_kl, obs, actions, advantages, args)

    dist = old(obs)
    loss = -(dist.log_prob(actions) * advantages).mean() - ent_coef * dist.entropy().mean()
    g = -flat_gradient(loss, old)
    direction = torch.linalg.solve(fisher_products(old, kl_gradient(old, obs), 0.01), g)
    step = vector_of(small_policy) - vector_of(old)
    assert (step - (2e-4 / (g @ direction)).sqrt() * direction).norm() < 1e-6 * step.norm()
    kl = kl_divergence(old(obs), small_policy(obs)).mean().item()
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-6) and 0.5e-4 < kl < 1e-4
    assert script is not trpo or metrics["accepted"]


def test_what_trpo_evaluates_is_the_surrogate_and_the_kl_to_the_old_policy(monkeypatch, small_policy):
    obs, advantages, searches = torch.randn(30, 3).double(), torch.randn(30).double(), []
    actions, old = small_policy(obs).sample(), copy.deepcopy(small_policy)(obs)
    monkeypatch.setattr(trpo, "line_search", lambda *args: (searches.append(args), False)[1])
    args = trpo.Args(ent_coef=0.1, max_kl=0.5, backtrack_coef=0.7, max_backtracks=3)
    metrics = trpo.update_policy(small_policy, args.max_kl, obs, actions, advantages, args)
    [(evaluate, params, step, *rest)] = searches
    assert rest == [0.5, 0.7, 3] and not metrics["accepted"]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params).detach() + step, params)
    new = small_policy(obs)
    ratios = (new.log_prob(actions) - old.log_prob(actions)).exp()
    loss, kl = evaluate()
    close(loss, -(ratios * advantages).mean() - 0.1 * new.entropy().mean())
    close(kl, kl_divergence(old, new).mean())
    assert (kl / kl_divergence(new, old).mean() - 1).abs() > 0.01


EXTREMES = {  # from uniform to as good as deterministic: log-odds, or logarithms of the deviation
    "discrete": (Discrete(3), [0.0, 40.0, 90.0, 200.0]),
    "box": (Box(-1, 1, (2,)), [0.0, -8.0, -15.0]),
    "one action": (Discrete(1), [0.0]),
}


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("space, extremes", EXTREMES.values(), ids=EXTREMES)
def test_an_update_stays_in_the_region_or_where_it_was(script, space, extremes, damping):
    """With more parameters than rows F is singular in all of them. No gradient, no step."""
    args = script.Args(damping=damping)
    batches = [(1, 1.0), (40, 0.0), (40, 1e-20), (40, 1.0), (40, 1e6)]
    for extreme, (rows, scale) in [(x, batch) for x in extremes for batch in batches]:
        torch.manual_seed(0)
        policy = script.Policy(OBS_SPACE, space)
        (policy.net[-1].bias[0] if policy.discrete else policy.log_std).data.add_(extreme)
        before, obs = vector_of(policy), torch.randn(rows, 3)
        actions, advantages = policy(obs).sample(), scale * torch.randn(rows)
        if policy.discrete:
            actions[0] = space.n - 1  # one that hardly ever happens
        metrics = script.update_policy(policy, args.max_kl, obs, actions, advantages, args)
        stays = torch.equal(vector_of(policy), before)
        assert vector_of(policy).isfinite().all() and (stays or (space != Discrete(1) and scale))
        if script is trpo:
            assert metrics["accepted"] != stays and all(isfinite(x) for x in metrics.values())
            assert metrics["kl"] <= args.max_kl * (1 + 1e-4) + 1e-6


# ---------------------------------------------------------------------------- runs

RUNS = {
    "defaults": dict(total_timesteps=8_000, num_envs=16, num_steps=16, seed=4),
    "statistics that change the function": dict(total_timesteps=8_000, num_envs=16, num_steps=16, seed=4),
    "a large region": dict(total_timesteps=4_000, max_kl=1.0, damping=1e-3, num_steps=16),
    "a box": dict(env_id="Pendulum-v1", total_timesteps=3_000, num_envs=8, num_steps=32),
}


def successive_kls(args):
    """KL of each collecting policy of a run to the next, mean over the data of the first."""
    collected, rollout = [], trpo.rollout

    def spy(envs, policy, *rest):
        obs, *_, valid = batch = rollout(envs, policy, *rest)
        collected.append((copy.deepcopy(policy), obs[:-1][valid]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trpo, "rollout", spy)
        trpo.train(args)
    with torch.no_grad():
        return [kl_divergence(p(b), q(b)).mean().item() for (p, b), (q, _) in zip(collected, collected[1:])]


@pytest.mark.parametrize("name", RUNS)
def test_successive_collecting_policies_of_trpo_are_within_the_region(monkeypatch, tmp_path, name):
    """But for the first two, between which there are statistics for the first time."""
    if name == "statistics that change the function":
        monkeypatch.setattr(trpo, "update_statistics", lambda net, obs: net[0].update(obs))
    args = trpo.Args(runs_dir=str(tmp_path), **RUNS[name])
    _, *kls = successive_kls(args)
    within = max(kls) <= args.max_kl * (1 + 1e-4) + 1e-7
    assert within == (name != "statistics that change the function")
    assert len(kls) >= 6 and np.median(kls) > 0.2 * args.max_kl
