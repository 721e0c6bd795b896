"""The mathematics of the trust region: Fisher matrix, conjugate gradient, step length, surrogate and bound.

The functions are those of npg.py; trpo.py has the same text (test_copies.py). What they are compared with is
exact: explicit matrices, or the enumerated MDPs of tabular.py.
"""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import FULL, HIDDEN, SMALL, TERMINATING, TabularMDP, TabularPolicy
from test_episode_estimators import close, direction_of, distances, fisher, moved, policy_of
from torch.distributions.kl import kl_divergence

import trpo
from npg import Policy, conjugate_gradient, fisher_vector_product, flat_grad, natural_step_size

MDPS = {"full": FULL, "terminating": TERMINATING, "hidden": HIDDEN, "small": SMALL}
SPACES = {"discrete": Discrete(3), "box": Box(-1, 1, (2,))}


@pytest.fixture(params=MDPS)
def mdp(request):
    return MDPS[request.param]


def params_of(policy):
    return list(policy.parameters())


# ---------------------------------------------------------------------------- Fisher matrix


@pytest.fixture(params=SPACES)
def small_policy(request):
    """A Policy in float64 whose network is small enough for explicit matrices; not at its initial weights."""
    torch.manual_seed(0)
    policy = Policy(Box(-1, 1, (3,)), SPACES[request.param])
    out = policy.net[-1].out_features
    policy.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out))
    policy = policy.double()
    if not policy.discrete:
        policy.log_std.data = torch.tensor([0.3, -0.6]).double()
    return policy


def kl_gradient(policy, obs):
    """The graph of grad KL(pi_old || pi) at pi = pi_old, mean over obs."""
    with torch.no_grad():
        old = policy(obs)
    return flat_grad(kl_divergence(old, policy(obs)).mean(), params_of(policy), create_graph=True)


def fisher_products(policy, obs, damping=0.0):
    """fisher_vector_product applied to the identity; (P, P)"""
    grad_kl = kl_gradient(policy, obs)
    identity = torch.eye(len(grad_kl)).to(grad_kl)
    return torch.stack([fisher_vector_product(grad_kl, params_of(policy), v, damping) for v in identity])


def every_action(policy, obs):
    """Actions (K, B, ...) and weights (K, B) that turn the mean of a polynomial up to degree 5 into a sum."""
    with torch.no_grad():
        dist = policy(obs)
    if policy.discrete:
        return torch.arange(3)[:, None].expand(-1, len(obs)), dist.probs.T
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z = torch.cartesian_prod(*[torch.tensor(nodes)] * 2)
    weights = torch.cartesian_prod(*[torch.tensor(weights)] * 2).prod(1) / (2 * np.pi)
    return dist.mean + z[:, None] * dist.stddev, weights[:, None].expand(-1, len(obs))


def score_products(policy, obs):
    """E_s E_a[ grad log pi(a|s) grad log pi(a|s)^T ]; (P, P)"""
    actions, weights = every_action(policy, obs)
    logprobs = policy(obs).log_prob(actions).flatten()
    scores = torch.stack([flat_grad(x, params_of(policy), retain_graph=True) for x in logprobs])
    return (weights.reshape(-1, 1) * scores).T @ scores / len(obs)


def kl_hessian(policy, obs):
    """Hessian of theta -> mean KL(pi_old || pi_theta) at theta_old; (P, P)"""
    names, shapes = zip(*[(name, param.shape) for name, param in policy.named_parameters()])
    with torch.no_grad():
        old = policy(obs)

    def kl(theta):
        parts = theta.split([shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return kl_divergence(old, torch.func.functional_call(policy, params, (obs,))).mean()

    theta = nn.utils.parameters_to_vector(policy.parameters()).detach()
    return torch.autograd.functional.hessian(kl, theta)


def test_the_fisher_product_is_the_hessian_of_the_kl_and_the_outer_product_of_the_score(small_policy):
    obs = torch.randn(6, 3).double()
    F = fisher_products(small_policy, obs)
    close(F, kl_hessian(small_policy, obs))
    close(F, score_products(small_policy, obs))
    close(F, F.T)
    assert torch.linalg.eigvalsh(F).min() > -1e-12 and F.abs().max() > 0.01
    assert kl_gradient(small_policy, obs).abs().max() < 1e-14  # the KL has no gradient there, but it curves


def test_damping_adds_a_multiple_of_the_identity(small_policy):
    obs = torch.randn(6, 3).double()
    damped = fisher_products(small_policy, obs, damping=0.3)
    close(damped - fisher_products(small_policy, obs), 0.3 * torch.eye(len(damped)).double())


def test_one_graph_of_the_kl_gradient_serves_every_product(small_policy):
    grad_kl = kl_gradient(small_policy, torch.randn(6, 3).double())
    v = torch.randn(len(grad_kl)).double()
    first, second = (fisher_vector_product(grad_kl, params_of(small_policy), v, 0.1) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_fisher_product_of_the_policy_in_its_real_size(space):
    torch.manual_seed(0)
    policy = Policy(Box(-1, 1, (3,)), space).double()
    obs = torch.randn(3, 3).double()
    actions, weights = every_action(policy, obs)
    logprobs = policy(obs).log_prob(actions).flatten()
    scores = torch.stack([flat_grad(x, params_of(policy), retain_graph=True) for x in logprobs])
    grad_kl = kl_gradient(policy, obs)
    for v in torch.randn(3, len(grad_kl)).double():
        expected = (weights.flatten() * (scores @ v)) @ scores / len(obs)
        close(fisher_vector_product(grad_kl, params_of(policy), v, 0.0), expected, 1e-10)


class Exact:
    """g, F and the natural gradient of a policy on an MDP, by the scripts' functions and without sampling."""

    def __init__(self, mdp, policy, gamma=1.0):
        self.params, self.g = params_of(policy), mdp.exact_gradient(policy, gamma)
        states = mdp.state_distribution(policy).sum(0)  # KL weighted by the visits, sum_t E_{s_t}[ KL ]
        with torch.no_grad():
            old = policy(mdp.observe)
        kl = (states * kl_divergence(old, policy(mdp.observe))).sum()
        self.grad_kl = flat_grad(kl, self.params, create_graph=True)

    def product(self, v, damping=0.0):
        return fisher_vector_product(self.grad_kl, self.params, v, damping)

    def direction(self, damping=0.0):
        return conjugate_gradient(lambda v: self.product(v, damping), self.g, 200, 1e-12)


def test_on_the_mdp_the_fisher_product_is_the_expected_outer_product_of_the_score(mdp):
    policy = policy_of(mdp)
    F = torch.stack([Exact(mdp, policy).product(v) for v in torch.eye(policy.theta.numel()).double()])
    close(F, fisher(mdp, policy))


# ---------------------------------------------------------------------------- conjugate gradient


def matrix(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    random = torch.tensor(np.random.RandomState(seed).normal(size=(len(eigenvalues),) * 2))
    Q, _ = torch.linalg.qr(random)
    return Q @ torch.as_tensor(eigenvalues).double().diag() @ Q.T


def vector(size, seed=1):
    return torch.tensor(np.random.RandomState(seed).normal(size=size))


SPECTRA = {
    "one": [2.0],
    "identity": [1.0] * 5,
    "two clusters": [1.0] * 4 + [50.0] * 4,
    "condition 1e4": np.logspace(-4, 0, 12),
    "condition 1e8": np.logspace(-6, 2, 9),
    "one small": [1e-6] + [1.0] * 9,
}


@pytest.fixture(params=SPECTRA)
def system(request):
    A = matrix(SPECTRA[request.param])
    return A, vector(len(A))


def test_the_solution_is_that_of_a_direct_solve(system):
    A, b = system
    x = conjugate_gradient(lambda v: A @ v, b, 2000, 1e-10)
    expected = torch.linalg.solve(A, b)
    close((A @ x - b).norm() / b.norm(), 0.0, 1e-7)
    close((x - expected).norm() / expected.norm(), 0.0, 1e-5)


def test_the_error_decreases_at_every_iteration_and_the_residual_reaches_the_tolerance(system):
    """In the norm sqrt(e^T A e), where every iterate is the best of its Krylov space; a residual may rise."""
    A, b = system
    solution, residuals, errors = torch.linalg.solve(A, b), [], []
    conjugate_gradient(lambda v: A @ v, b, 2000, 1e-6, residuals)
    assert residuals[-1] <= 1e-6 and all(residual > 1e-6 for residual in residuals[:-1])
    for iters in range(len(residuals) + 1):
        error = conjugate_gradient(lambda v: A @ v, b, iters, 1e-6) - solution
        errors.append((error @ A @ error).sqrt().item())
    assert all(after < before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("name, iterations", [("one", 1), ("identity", 1), ("two clusters", 2)])
def test_as_many_iterations_as_there_are_different_eigenvalues(name, iterations):
    A, residuals, products = matrix(SPECTRA[name]), [], []
    b = vector(len(A))
    conjugate_gradient(lambda v: (products.append(v), A @ v)[1], b, 100, 1e-10, residuals)
    assert len(residuals) == len(products) == iterations


@pytest.mark.parametrize("iters", [0, 1, 3])
def test_no_more_iterations_than_allowed(iters):
    A, residuals = matrix(SPECTRA["condition 1e4"]), []
    conjugate_gradient(lambda v: A @ v, vector(12), iters, 0.0, residuals)
    assert len(residuals) == iters


def test_the_residuals_are_those_of_the_iterates():
    A, b, residuals = matrix(SPECTRA["condition 1e4"]), vector(12), []
    conjugate_gradient(lambda v: A @ v, b, 8, 0.0, residuals)
    for iters, residual in enumerate(residuals, 1):
        x = conjugate_gradient(lambda v: A @ v, b, iters, 0.0)
        close((A @ x - b).norm() / b.norm(), residual, 1e-9)


eigenvalues = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10)


@settings(deadline=None, max_examples=50)
@given(eigenvalues, st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_any_positive_matrix_and_any_scale_of_the_right_side(eigenvalues, seed, scale):
    A, b = matrix(eigenvalues, seed), scale * vector(len(eigenvalues), seed + 1)
    x = conjugate_gradient(lambda v: A @ v, b, 1000, 1e-8)
    expected = torch.linalg.solve(A, b)
    assert (x - expected).norm() <= 1e-2 * expected.norm()
    assert ((x - expected) @ A @ (x - expected)).sqrt() <= 1e-4 * (expected @ A @ expected).sqrt()


def test_zero_on_the_right_side_gives_zero():
    A, residuals = matrix([1.0, 2.0]), []
    x = conjugate_gradient(lambda v: A @ v, torch.zeros(2).double(), 10, 1e-5, residuals)
    assert torch.equal(x, torch.zeros(2).double()) and residuals == []


def test_a_singular_matrix_gives_the_shortest_solution():
    A = matrix([0.0, 0.0, 0.5, 1.0, 3.0])
    b = A @ vector(5)
    close(conjugate_gradient(lambda v: A @ v, b, 100, 1e-10), torch.linalg.pinv(A) @ b, 1e-9)


def test_without_curvature_there_is_no_step():
    for A in (torch.zeros(3, 3), -torch.eye(3)):
        x = conjugate_gradient(lambda v: A @ v, torch.ones(3), 10, 1e-5)  # noqa: B023
        assert torch.equal(x, torch.zeros(3))


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, 4, elements=st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1e20, 1e38])))
def test_what_leaves_float32_ends_the_iterations_with_a_finite_result(eigenvalues):
    A = torch.tensor(eigenvalues)
    for scale in (1e-38, 1e-20, 1.0, 1e15):
        x = conjugate_gradient(lambda v: A * v, torch.full((4,), scale), 10, 1e-5)
        assert x.isfinite().all()


# ---------------------------------------------------------------------------- step length


@pytest.mark.parametrize("max_kl", [1e-4, 0.03, 2.0])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_quadratic_kl_of_the_step_is_max_kl(mdp, max_kl, damping):
    exact = Exact(mdp, policy_of(mdp))
    direction = exact.direction(damping)
    step = natural_step_size(exact.g, direction, max_kl) * direction
    assert (step @ exact.product(step, damping) / 2).item() == pytest.approx(max_kl, rel=1e-6)
    undamped = (step @ exact.product(step) / 2).item()
    assert undamped == pytest.approx(max_kl, rel=1e-6) if damping == 0 else undamped < max_kl


def kl_of(mdp, old, new):
    """sum_t E_{s_t}[ KL(pi_old || pi_new) ], which is the KL of the trajectories"""
    return mdp.expectation(old, mdp.log_ratios(old, new).sum(0)).item()


def test_the_true_kl_approaches_max_kl_as_its_square_root(mdp):
    policy = policy_of(mdp)
    exact = Exact(mdp, policy)
    direction, errors = exact.direction(), []
    for max_kl in (1e-2, 1e-4, 1e-6):
        new = moved(policy, natural_step_size(exact.g, direction, max_kl) * direction, 1.0)
        errors.append(abs(kl_of(mdp, policy, new) / max_kl - 1))
    assert errors[0] < 0.15 and errors[2] < 2e-3
    assert errors[2] == pytest.approx(0.1 * errors[1], rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_gives_a_finite_length_of_a_step_of_zero(dtype):
    zero = torch.zeros(3, dtype=dtype)
    size = natural_step_size(zero, zero, 0.03)
    assert size.isfinite() and torch.equal(size * zero, zero)


# ---------------------------------------------------------------------------- the natural gradient


class Reparametrised(TabularPolicy):
    """The same family of policies in other coordinates: theta = M phi + 0.1 (M phi)^3."""

    M = torch.tensor(np.random.RandomState(3).normal(size=(6, 6)) / 2)

    def forward(self, obs):
        x = (self.M @ self.theta.flatten()).view_as(self.theta)
        return torch.distributions.Categorical(logits=obs @ (x + 0.1 * x**3))


def after(mdp, policy, step):
    """log pi of all states and actions after a step of the parameters."""
    return moved_module(policy, step)(mdp.observe).logits.detach()


def moved_module(policy, step):
    other = type(policy)(*policy.theta.shape)
    other.theta.data = policy.theta.detach() + step.view_as(policy.theta)
    return other


def test_the_natural_gradient_does_not_depend_on_the_coordinates_and_the_plain_gradient_does():
    there = Reparametrised(3)
    x = (there.M @ there.theta.flatten()).view(3, 2).detach()
    here = TabularPolicy(3)
    here.theta.data = x + 0.1 * x**3
    old = here(FULL.observe).logits.detach()
    close(there(FULL.observe).logits.detach(), old)

    exact = [Exact(FULL, here), Exact(FULL, there)]
    natural = [e.direction() for e in exact]
    sizes = [natural_step_size(e.g, d, 0.01) for e, d in zip(exact, natural)]
    close(sizes[0], sizes[1], 1e-8)
    rest = []
    for h in (1e-2, 1e-3):
        moves = [after(FULL, policy, h * d) - old for policy, d in zip((here, there), natural)]
        assert moves[0].norm() > 0.1 * h
        rest.append((moves[0] - moves[1]).norm() / h**2)
    assert 1e-3 < rest[1] and rest[0] == pytest.approx(rest[1].item(), rel=0.2)  # they differ by O(h^2)

    moves = [(after(FULL, policy, 1e-4 * e.g) - old).flatten() for policy, e in zip((here, there), exact)]
    assert torch.cosine_similarity(*moves, 0) < 0.9


# ---------------------------------------------------------------------------- the chain of the notes


def layered(num_layers=3, width=2, seed=0):
    """An MDP in which a state tells the time, so that V, A and the best action do not depend on t."""
    rng, S = np.random.RandomState(seed), num_layers * width
    P = torch.zeros(S, 2, S, dtype=torch.float64)
    for s in range(S):
        layer = (
            slice(0, width) if s >= S - width else slice((s // width + 1) * width, (s // width + 2) * width)
        )
        P[s, :, layer] = torch.tensor(rng.dirichlet(np.ones(width), 2))
    start = torch.tensor([0.5] * width + [0.0] * (S - width)).double()
    r = torch.tensor(rng.normal(1, 1, (S, 2)))
    never, eye = torch.zeros(S, 2, S, dtype=torch.bool), torch.eye(S).double()
    return TabularMDP(start, P, r, never, eye, num_layers)


LAYERED = layered()


def advantages_of(mdp, policy):
    """A(s, a) of a layered MDP; (S, A)"""
    _, _, advantages = mdp.exact_values(policy, 1.0)
    return torch.cat([advantages[t, 2 * t : 2 * t + 2] for t in range(mdp.horizon)])


def surrogate(mdp, policy, old, gamma=1.0):
    """E_old[ sum_t gamma^t rho_t A_t ] with the exact advantages, by trpo.policy_loss."""
    valid = mdp.trajectories.valid
    p = (mdp.trajectory_probabilities(old).detach() * mdp.discounts(gamma).expand(valid.shape))[valid]
    advantages = mdp.along(mdp.exact_values(old, gamma)[2])[valid]
    return -trpo.policy_loss(
        mdp.logprobs(policy)[valid], mdp.logprobs(old)[valid].detach(), p * len(p) * advantages
    )


def greedy(table, sharpness=60.0):
    """A policy that takes the best action of a table (S, A) with probability 1 - e^-60."""
    policy = TabularPolicy(len(table))
    policy.theta.data = sharpness * nn.functional.one_hot(table.argmax(1), 2).double()
    return policy


def test_without_a_constraint_the_surrogate_is_greatest_at_the_step_of_policy_iteration():
    old = policy_of(LAYERED)
    improved = greedy(advantages_of(LAYERED, old))
    best = surrogate(LAYERED, improved, old).item()
    visits = LAYERED.state_distribution(old).sum(0)
    assert best == pytest.approx((visits * advantages_of(LAYERED, old).max(1).values).sum().item())
    for seed in range(200):
        assert surrogate(LAYERED, policy_of(LAYERED, seed), old) < best

    J, policy = [LAYERED.J(old, 1.0).item()], old
    for _ in range(4):
        policy = greedy(advantages_of(LAYERED, policy))
        J.append(LAYERED.J(policy, 1.0).item())
    V = torch.zeros(6).double()
    for _ in range(3):  # value iteration
        V = (LAYERED.r + LAYERED.P @ V * (torch.arange(6) < 4)[:, None]).max(1).values
    assert all(later >= earlier - 1e-9 for earlier, later in zip(J, J[1:]))
    assert J[1] > J[0] + 0.1 and J[-1] == pytest.approx((LAYERED.start @ V).item())


def best_step(objective, old, penalty, weight):
    """argmax over d of objective(theta + d) - weight * penalty(theta + d); (P,)"""
    new = TabularPolicy(*old.theta.shape)
    new.theta.data = old.theta.detach().clone()
    options = dict(max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS(new.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = penalty(new) - objective(new) / weight
        loss.backward()
        return loss

    optimizer.step(closure)
    return (new.theta - old.theta).detach().flatten()


def test_in_a_euclidean_ball_it_is_the_gradient_and_in_a_kl_ball_the_natural_gradient():
    """The best step with a penalty is the best in the ball of its own size. As the ball shrinks, it becomes
    sqrt(eps / |g|^2) g, and sqrt(2 eps / (g . F^-1 g)) F^-1 g."""
    old = policy_of(LAYERED)
    exact = Exact(LAYERED, old)
    natural = exact.direction()
    close(natural, torch.linalg.pinv(fisher(LAYERED, old)) @ exact.g, 1e-9)
    assert torch.cosine_similarity(exact.g, natural, 0) < 0.97

    def objective(new):
        return surrogate(LAYERED, new, old)

    def distance(new):
        return (new.theta - old.theta.detach()).pow(2).sum()

    def kl(new):
        return LAYERED.expectation(old, LAYERED.log_ratios(old, new).sum(0))

    errors = []
    for weight in (1e2, 1e3):
        d = best_step(objective, old, distance, weight)
        step = (d @ d / (exact.g @ exact.g)).sqrt() * exact.g
        n = best_step(objective, old, kl, weight)
        natural_step = natural_step_size(exact.g, natural, kl_of(LAYERED, old, moved(old, n, 1.0))) * natural
        errors.append([(d - step).norm() / d.norm(), (n - natural_step).norm() / n.norm()])
        assert torch.cosine_similarity(n, exact.g, 0) < 0.97
    errors = torch.tensor(errors)
    assert (errors[0] < 0.05).all() and (errors[1] < 0.005).all()
    close(errors[1] / errors[0], [0.1, 0.1], 0.03)


def test_with_a_table_of_logits_the_natural_gradient_is_the_advantage():
    """Up to a constant per state. A long natural step is policy iteration: pi exp(alpha A) becomes greedy."""
    old = policy_of(LAYERED)
    advantages, direction = advantages_of(LAYERED, old), Exact(LAYERED, old).direction().view(6, 2)
    close(direction - direction.mean(1, keepdim=True), advantages - advantages.mean(1, keepdim=True), 1e-8)
    far = moved(old, direction, 1e4)(LAYERED.observe).probs
    close(far, greedy(advantages)(LAYERED.observe).probs)


# ---------------------------------------------------------------------------- the lower bound


def bound(mdp, old, new, gamma):
    """max_s KL(pi_old || pi_new), eps = max_s TV, and 4 sum_t gamma^t t max|A_t|."""
    with torch.no_grad():
        tv, kl = distances(old(mdp.observe).probs, new(mdp.observe).probs)
    _, _, advantages = mdp.exact_values(old, gamma)
    t = torch.arange(mdp.horizon).double()
    return kl.max(), tv.max(), 4 * (gamma**t * t * advantages.abs().amax((1, 2))).sum()


pairs = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 1.0, 3.0]))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(MDPS)), pairs, st.sampled_from([1.0, 0.9]))
def test_the_surrogate_minus_C_max_kl_is_a_lower_bound_of_J(name, pair, gamma):
    """|J(new) - J(old) - L| <= 4 eps^2 S <= 2 S max_s KL, where S = sum_t gamma^t t max|A_t|; C = 2 S."""
    mdp, (seed, other, h) = MDPS[name], pair
    old = policy_of(mdp, seed)
    new = moved(old, direction_of(old, other), h)
    with torch.no_grad():
        L, J = surrogate(mdp, new, old, gamma), mdp.J(new, gamma) - mdp.J(old, gamma)
    kl, eps, four = bound(mdp, old, new, gamma)
    assert (J - L).abs() <= four * eps**2 + 1e-12
    assert J >= L - four / 2 * kl - 1e-12


def test_a_bound_of_second_order_promises_an_improvement_and_the_printed_one_of_first_order_does_not():
    """2 eps sum_t t C shrinks as slowly as the surrogate, C max KL faster: a small step surely improves J."""
    old = policy_of(FULL)
    direction = Exact(FULL, old).direction()
    shares = []
    for h in (1e-1, 1e-2, 1e-3):
        new = moved(old, direction, h)
        kl, eps, four = bound(FULL, old, new, 1.0)
        gain = surrogate(FULL, new, old).item()
        printed = 2 * eps * 3 * 3 * FULL.r.abs().max()  # sum_t t = 3, C = T R_max
        shares.append([(printed / gain).item(), (four / 2 * kl / gain).item()])
        assert FULL.J(new, 1.0) > FULL.J(old, 1.0)
    shares = np.array(shares)
    assert (shares[:, 0] > 10).all() and shares[2, 0] == pytest.approx(shares[1, 0], rel=0.1)
    assert shares[2, 1] < 0.1 and shares[2, 1] == pytest.approx(0.1 * shares[1, 1], rel=0.1)


def test_an_advantage_can_be_twice_the_horizon_times_the_greatest_reward():
    """T = 3 and rewards are -1 or 1; the old policy always takes 0, the new one 1, so eps = 1. At t = 1 the
    means under the two state distributions differ by 8, which is more than 2 eps t T = 6."""
    S, X, Y, GOOD, BAD = range(5)
    r = torch.tensor([[0, 0], [-1, 1], [1, -1], [1, 1], [-1, -1]]).double()
    P = torch.zeros(5, 2, 5).double()
    for s, actions in {
        S: (X, Y),
        X: (BAD, GOOD),
        Y: (GOOD, BAD),
        GOOD: (GOOD, GOOD),
        BAD: (BAD, BAD),
    }.items():
        P[s, [0, 1], list(actions)] = 1.0
    eye = torch.eye(5).double()
    mdp = TabularMDP(eye[0], P, r, torch.zeros(5, 2, 5, dtype=torch.bool), eye, 3)
    old, new = (greedy(eye[[a] * 5, :2]) for a in (0, 1))
    _, _, advantages = mdp.exact_values(old, 1.0)
    f = (new(mdp.observe).probs * advantages[1]).sum(1)
    p, q = (mdp.state_distribution(policy)[1] for policy in (old, new))
    close(p @ f - q @ f, 8.0)
    close((p - q).abs().sum() * f[[X, Y]].abs().max(), 8.0)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(list(MDPS)), pairs)
def test_state_distributions_of_any_two_policies_differ_by_at_most_2_eps_t(name, pair):
    mdp, (seed, other, h) = MDPS[name], pair
    old = policy_of(mdp, seed)
    new = moved(old, direction_of(old, other), h)
    kl, eps, _ = bound(mdp, old, new, 1.0)
    difference = (mdp.state_distribution(old) - mdp.state_distribution(new)).abs().sum(1)
    t = torch.arange(mdp.horizon)
    assert (difference <= 2 * (1 - (1 - eps) ** t) + 1e-12).all()
    assert (difference <= 2 * eps * t + 1e-12).all()
    assert (difference <= 2 * t * (kl.clamp(min=0) / 2).sqrt() + 1e-7).all()
