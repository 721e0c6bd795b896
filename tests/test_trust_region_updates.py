"""The updates of npg.py and trpo.py, and the KL penalty of ppo.py: line search, edge cases, runs."""

import copy
import csv
import importlib
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trust_region import fisher_products, small_policy  # noqa: F401, a fixture
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence

import npg
import ppo
import trpo
from ppo import kl_penalty_loss, update_kl_coef

OBS_SPACE = Box(-1, 1, (3,))
SPACES = {"discrete": Discrete(3), "box": Box(-1, 1, (2,)), "one action": Discrete(1)}
NAN, INF = math.nan, math.inf


@pytest.fixture(params=["npg", "trpo"])
def script(request):
    return importlib.import_module(request.param)


def values_of(policy):
    return nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


def kl_between(old, new, obs):
    with torch.no_grad():
        return kl_divergence(old(obs), new(obs)).mean().item()


def assert_finite(metrics, policy):
    assert all(np.isfinite(float(metric)) for metric in metrics.values()), metrics
    assert values_of(policy).isfinite().all()


# ---------------------------------------------------------------------------- line search

MAX_KL = 0.03
GOOD = (-1.0, 0.01)
SEARCHES = {  # (loss, kl) at every try, where the loss before is 0; which try is accepted
    "the first": ([GOOD], 0),
    "the first that is good, not the best": ([(-0.1, 0.01), (-9.0, 0.01)], 0),
    "kl of exactly max_kl": ([(-1.0, MAX_KL)], 0),
    "better, but too far": ([(-1.0, 0.0301), GOOD], 1),
    "near, but not better": ([(0.1, 0.01), (0.0, 0.01), GOOD], 2),
    "either alone": ([(-1.0, 0.04), (1.0, 0.01), (-1.0, 0.04), (1.0, 0.01)], None),
    "loss is nan": ([(NAN, 0.01), GOOD], 1),
    "kl is nan": ([(-1.0, NAN), GOOD], 1),
    "kl is inf": ([(-1.0, INF), GOOD], 1),
    "all nan": ([(NAN, NAN)] * 4, None),
    "not better": ([(0.0, 0.0)] * 4, None),
    "only after the last": ([(1.0, 0.0)] * 4 + [GOOD], None),
}


def awkward_params():
    """Several shapes, and numbers that are easily lost."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(2, 3), (4,), ()]]
    params[0].data[0] = torch.tensor([-0.0, 1e-40, 1e30])
    return params


@pytest.mark.parametrize("results, expected", SEARCHES.values(), ids=SEARCHES)
def test_line_search_takes_the_first_try_that_is_better_and_near(results, expected):
    params, visited = awkward_params(), []
    before = nn.utils.parameters_to_vector(params).detach().clone()
    step = torch.linspace(-1, 1, len(before))

    def evaluate():
        assert not torch.is_grad_enabled()
        visited.append(nn.utils.parameters_to_vector(params).detach().clone())
        return torch.tensor([(0.0, 0.0), *results][len(visited) - 1])

    accepted = trpo.line_search(evaluate, params, step, MAX_KL, 0.5, max_backtracks=4)
    assert accepted == (expected is not None)
    assert len(visited) == 1 + (4 if expected is None else expected + 1)
    for j, point in enumerate(visited[1:]):
        assert torch.equal(point, before + 0.5**j * step)
    after = nn.utils.parameters_to_vector(params).detach()
    right = visited[-1] if accepted else before
    assert torch.equal(after.view(torch.int32), right.view(torch.int32))  # bit for bit, -0.0 included
    assert [param.shape for param in params] == [(2, 3), (4,), ()]
    assert all(param.requires_grad for param in params)


def test_line_search_with_one_parameter_restores_it():
    param = nn.Parameter(torch.ones(3))
    assert not trpo.line_search(lambda: torch.tensor([0.0, 0.0]), [param], torch.ones(3), 1.0, 0.8, 3)
    assert torch.equal(param.data, torch.ones(3))


@settings(deadline=None, max_examples=50)
@given(st.floats(-3, 3), st.floats(-10, 10), st.floats(1e-3, 10), st.floats(0.1, 0.9))
def test_line_search_on_a_parabola(start, step, max_kl, beta):
    """loss (x - 1)^2, kl the squared way from the start."""
    x = nn.Parameter(torch.tensor([start]).double())
    old = x.item()
    step = torch.tensor([step]).double()
    accepted = trpo.line_search(
        lambda: (((x - 1) ** 2).sum(), ((x - old) ** 2).sum()), [x], step, max_kl, beta, 5
    )
    good = [beta**j * step.item() for j in range(5)]
    good = [d for d in good if (old + d - 1) ** 2 < (old - 1) ** 2 and (old + d - old) ** 2 <= max_kl]
    assert accepted == bool(good)
    assert x.item() == pytest.approx(old + good[0] if good else old, abs=1e-12)


# ---------------------------------------------------------------------------- one update


def natural_direction(policy, obs, loss, damping):
    """(F + damping I)^-1 g by explicit matrices; F^-1 g, g"""
    grads = torch.autograd.grad(-loss, list(policy.parameters()))
    g = torch.cat([grad.flatten() for grad in grads])
    return torch.linalg.solve(fisher_products(policy, obs, damping), g), g


@pytest.mark.parametrize("step_rule, ent_coef", [("kl", 0.0), ("kl", 0.1), ("fixed", 0.0)])
def test_an_update_is_the_natural_gradient_step_of_explicit_matrices(
    script,
    small_policy,  # noqa: F811
    step_rule,
    ent_coef,
):
    obs, advantages = torch.randn(30, 3).double(), torch.randn(30).double()
    actions = small_policy(obs).sample()
    old, before = copy.deepcopy(small_policy), values_of(small_policy)
    args = script.Args(max_kl=1e-4, cg_iters=300, cg_tol=1e-10, damping=0.01, ent_coef=ent_coef)
    args.step_rule, args.learning_rate = step_rule, 1e-3
    metrics = script.update_policy(small_policy, 0.25, obs, actions, advantages, args)

    dist = old(obs)
    loss = -(dist.log_prob(actions) * advantages).mean() - ent_coef * dist.entropy().mean()
    direction, g = natural_direction(old, obs, loss, 0.01)
    length = (2e-4 / (g @ direction)).sqrt() if step_rule == "kl" else 0.25 * 1e-3  # a quarter remains
    step = values_of(small_policy) - before
    assert (step - length * direction).norm() < 1e-6 * step.norm()

    predicted = step @ fisher_products(old, obs) @ step / 2
    torch.testing.assert_close(metrics["predicted_kl"], predicted, rtol=1e-5, atol=0)
    assert predicted < 1e-4
    assert float(metrics["kl"]) == pytest.approx(kl_between(old, small_policy, obs), rel=1e-6)
    assert float(metrics["kl"]) == pytest.approx(predicted.item(), rel=0.1)
    assert metrics["cg_residual"] <= 1e-10 and 1 < metrics["cg_iterations"] <= 300
    assert script is npg or metrics["accepted"]


@pytest.mark.parametrize("share, rows", [(1.0, 40), (0.3, 12), (0.001, 1)])
def test_the_fisher_matrix_is_averaged_over_a_share_of_the_rollout(script, share, rows):
    policy, sizes = script.Policy(OBS_SPACE, Discrete(3)), []
    obs, actions, advantages = torch.randn(40, 3), torch.randint(3, (40,)), torch.randn(40)
    policy.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    script.update_policy(policy, 1.0, obs, actions, advantages, script.Args(fisher_subsample=share))
    assert sizes.count(rows) >= 2 and set(sizes) == {40, rows}


@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_entropy_rises_by_its_bonus_and_stays_without(script, space):
    for ent_coef in (0.0, 0.1):
        torch.manual_seed(0)
        policy = script.Policy(OBS_SPACE, space)
        nn.init.normal_(policy.net[-1].bias)
        obs = torch.randn(40, 3)
        before, old = values_of(policy), policy(obs)
        args = script.Args(ent_coef=ent_coef)
        metrics = script.update_policy(policy, 1.0, obs, old.sample(), torch.zeros(40), args)
        if ent_coef:
            assert metrics["entropy"] > old.entropy().mean() + 0.01
        else:
            assert torch.equal(values_of(policy), before)


def test_npg_takes_a_step_back_that_went_far_beyond_the_region():
    torch.manual_seed(0)
    policy = npg.Policy(OBS_SPACE, Discrete(3))
    obs, actions, before = torch.randn(40, 3), torch.randint(3, (40,)), values_of(policy)
    for learning_rate, kept in ((1e6, False), (0.1, True)):
        args = npg.Args(step_rule="fixed", learning_rate=learning_rate)
        metrics = npg.update_policy(policy, 1.0, obs, actions, torch.randn(40), args)
        assert torch.equal(values_of(policy), before) != kept
        assert abs(metrics["kl"]) < 10 * args.max_kl and (metrics["kl"] > 1e-4) == kept


def test_the_fixed_step_falls_with_the_share_of_the_run_that_remains(monkeypatch, script, tmp_path):
    natural_step, rates = script.natural_step, []
    monkeypatch.setattr(script, "natural_step", lambda *args: (rates.append(args[4]), natural_step(*args))[1])
    for anneal_lr in (True, False):
        rates.clear()
        args = script.Args(num_envs=4, num_steps=8, total_timesteps=100, step_rule="fixed", learning_rate=0.1)
        args.anneal_lr, args.runs_dir = anneal_lr, str(tmp_path)
        run_dir = script.train(args).run_dir
        steps = [0, *(int(row["step"]) for row in progress(run_dir))][:-1]
        assert rates == [0.1 * (1 - step / 100) if anneal_lr else 0.1 for step in steps]


# ---------------------------------------------------------------------------- nothing becomes nan


def extreme_policies(module, space):
    """From uniform to as good as deterministic: log-odds, or logarithms of the deviation. At e^-15 the least
    step of Adam is thousands of deviations."""
    of_box = [0.0, -8.0] if module is ppo else [0.0, -8.0, -15.0]
    of_discrete = [0.0] if space == Discrete(1) else [0.0, 40.0, 60.0, 90.0, 200.0]
    for extreme in of_discrete if isinstance(space, Discrete) else of_box:
        torch.manual_seed(0)
        policy = module.Policy(OBS_SPACE, space)
        with torch.no_grad():
            if policy.discrete:
                policy.net[-1].bias[0] += extreme
            else:
                policy.log_std += extreme
        yield policy


def extreme_batches(policy, space):
    """obs, actions, advantages; of one row too. The first action is one that hardly ever happens."""
    for rows in (1, 40):
        obs = torch.randn(rows, 3)
        actions = policy(obs).sample()
        if policy.discrete:
            actions[0] = space.n - 1
        for scale in (0.0, 1e-20, 1.0, 1e6):
            yield obs, actions, scale * torch.randn(rows)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_an_update_stays_in_the_region_or_where_it_was(script, space, damping):
    """With more parameters than rows F is singular in all of them. No gradient, no step."""
    args = script.Args(damping=damping)
    region = args.max_kl * (10 if script is npg else 1)
    for start in extreme_policies(script, space):
        for obs, actions, advantages in extreme_batches(start, space):
            policy = copy.deepcopy(start)
            metrics = script.update_policy(policy, 1.0, obs, actions, advantages, args)
            assert_finite(metrics, policy)
            assert metrics["kl"] <= region + 1e-6 and kl_between(start, policy, obs) <= region + 1e-6
            if space == Discrete(1) or not advantages.any():
                assert torch.equal(values_of(policy), values_of(start))
                assert metrics["predicted_kl"] == 0 and metrics["cg_iterations"] == 0
            if script is trpo and not metrics["accepted"]:
                assert torch.equal(values_of(policy), values_of(start))


def test_a_fixed_step_of_an_extreme_policy_stays_finite(script):
    for start in extreme_policies(script, Discrete(3)):
        for obs, actions, advantages in extreme_batches(start, Discrete(3)):
            for damping in (0.0, 0.1):
                policy = copy.deepcopy(start)
                args = script.Args(damping=damping, step_rule="fixed")
                assert_finite(script.update_policy(policy, 1.0, obs, actions, advantages, args), policy)


@pytest.mark.parametrize("rule", ["fixed", "adaptive", "dual"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_an_update_with_a_kl_penalty_stays_finite(space, rule):
    args = ppo.Args(objective="kl-penalty", kl_rule=rule, update_epochs=3, num_minibatches=2)
    for start in extreme_policies(ppo, space):
        for obs, actions, advantages in extreme_batches(start, space):
            policy = copy.deepcopy(start)
            optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
            optimizer.param_groups[0]["kl_coef"] = 1.0
            assert_finite(ppo.update_policy(policy, optimizer, obs, actions, advantages, args), policy)
            assert 0 <= optimizer.param_groups[0]["kl_coef"] < INF
            if space == Discrete(1):
                assert torch.equal(values_of(policy), values_of(start))


def test_a_ratio_beyond_all_floats_is_left_to_the_penalty():
    """A narrow Gaussian that Adam moves by many of its deviations: the ratio overflows, the KL does not."""
    torch.manual_seed(0)
    policy = ppo.Policy(OBS_SPACE, Box(-1, 1, (2,)), math.exp(-6))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    optimizer.param_groups[0]["kl_coef"] = 1.0
    obs, args = torch.randn(256, 3), ppo.Args(objective="kl-penalty")
    actions, advantages = policy(obs).sample(), torch.randn(256)
    for _ in range(3):
        assert_finite(ppo.update_policy(policy, optimizer, obs, actions, advantages, args), policy)

    logprobs = torch.tensor([500.0, -500.0, 20.0], requires_grad=True)
    loss = kl_penalty_loss(logprobs, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), logprobs.sum(), 1.0)
    [gradient] = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1.0, 1.0 - math.exp(20) / 3]))


class Dull(gym.Env):
    """The same reward whatever one does; episodes of 4 steps."""

    observation_space = Box(-1, 1, (2,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), 1.0, self.t == 4, False, {}


for name, action_space in {"One": Discrete(1), "Two": Discrete(2), "Box": Box(-1, 1, (1,))}.items():
    gym.register(f"Dull{name}-v0", Dull, disable_env_checker=True, kwargs={"action_space": action_space})


def progress(run_dir):
    """The rows of progress.csv."""
    with open(Path(run_dir, "progress.csv"), newline="") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.mark.parametrize("name", ["npg", "trpo", "ppo"])
@pytest.mark.parametrize("env_id", ["DullOne-v0", "DullTwo-v0", "DullBox-v0"])
@pytest.mark.parametrize("num_envs, num_steps", [(1, 1), (1, 6)])
def test_runs_of_one_step_one_environment_one_action_and_one_reward(
    tmp_path, name, env_id, num_envs, num_steps
):
    module = importlib.import_module(name)
    args = module.Args(env_id=env_id, num_envs=num_envs, num_steps=num_steps, num_minibatches=1)
    args.total_timesteps, args.runs_dir = 10 * num_envs * num_steps, str(tmp_path)
    if name == "ppo":
        args.objective = "kl-penalty"
    else:
        args.damping = 0.0
    args.normalize_advantages = num_steps > 1  # of a single step it would be 0
    rows = progress(module.train(args).run_dir)
    assert len(rows) >= 10
    for row in rows:
        assert all(np.isfinite(float(cell)) for cell in row.values() if cell != "")


# ---------------------------------------------------------------------------- runs

RUNS = {
    "defaults": dict(total_timesteps=8_000),
    "a large region": dict(total_timesteps=4_000, max_kl=1.0, damping=1e-3, num_steps=16),
    "a box": dict(env_id="Pendulum-v1", total_timesteps=3_000, num_envs=8, num_steps=32),
}


def run_and_measure(module, monkeypatch, tmp_path, changes):
    """args, the rows of a run, the KL of every update from copies of the policy, whether weights changed."""
    update_policy, kls, moves = module.update_policy, [], []

    def measure(policy, remaining, obs, *rest):
        old = copy.deepcopy(policy)
        metrics = update_policy(policy, remaining, obs, *rest)
        kls.append(kl_between(old, policy, obs))
        moves.append(not torch.equal(values_of(old), values_of(policy)))
        return metrics

    monkeypatch.setattr(module, "update_policy", measure)
    args = module.Args(runs_dir=str(tmp_path), **changes)
    rows = [
        {key: float(cell or 0) for key, cell in row.items()} for row in progress(module.train(args).run_dir)
    ]
    assert len(rows) == len(kls) >= 7
    return args, rows, kls, moves


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_trpo_moves_within_the_region_in_every_iteration_of_a_run(monkeypatch, tmp_path, changes):
    args, rows, kls, moves = run_and_measure(trpo, monkeypatch, tmp_path, changes)
    for row, kl, moved in zip(rows, kls, moves):
        assert row["accepted"] == moved and kl <= args.max_kl * (1 + 1e-4) + 1e-7
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6) and (row["kl"] > 1e-6) == moved
        assert 0 < row["predicted_kl"] <= args.max_kl * 1.05  # float32
        assert 1 <= row["cg_iterations"] <= args.cg_iters and 0 <= row["cg_residual"]
        assert row["cg_iterations"] == args.cg_iters or row["cg_residual"] <= args.cg_tol
    assert np.mean(moves) > 0.5
    assert max(kls) > 0.2 * args.max_kl


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_npg_predicts_the_region_and_never_leaves_it_far_behind(monkeypatch, tmp_path, changes):
    args, rows, kls, moves = run_and_measure(npg, monkeypatch, tmp_path, changes)
    for row, kl in zip(rows, kls):
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6) and kl < 10 * args.max_kl
        assert 0 < row["predicted_kl"] <= args.max_kl * 1.05  # float32
    assert np.mean(moves) > 0.3


# ---------------------------------------------------------------------------- KL penalty

COEFFICIENTS = [  # rule, beta, kl, the next beta; target 0.03, learning rate 10
    ("fixed", 0.7, 0.0, 0.7),
    ("fixed", 0.7, 9.0, 0.7),
    ("adaptive", 0.7, 0.0199, 0.35),
    ("adaptive", 0.7, 0.0201, 0.7),
    ("adaptive", 0.7, 0.0449, 0.7),
    ("adaptive", 0.7, 0.0451, 1.4),
    ("adaptive", 0.7, INF, 1.4),
    ("adaptive", 1e-9, 0.0, 1e-9),
    ("adaptive", 1e9, 1.0, 1e9),
    ("dual", 0.7, 0.03, 0.7),
    ("dual", 0.7, 0.05, 0.9),
    ("dual", 0.7, 0.01, 0.5),
    ("dual", 0.1, 0.01, 0.0),
    ("dual", 0.0, 0.0, 0.0),
    ("dual", 0.0, 0.04, 0.1),
]


@pytest.mark.parametrize("rule, beta, kl, expected", COEFFICIENTS)
def test_the_next_coefficient(rule, beta, kl, expected):
    after = update_kl_coef(beta, kl, 0.03, rule, 10.0)
    assert type(after) is float and after == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_band_of_the_adaptive_rule_includes_its_ends():
    assert [update_kl_coef(1.0, kl, 3.0, "adaptive", 1.0) for kl in (2.0, 4.5)] == [1.0, 1.0]


@settings(deadline=None)
@given(
    st.sampled_from(["fixed", "adaptive", "dual"]),
    st.floats(1e-9, 1e9),
    st.floats(0, 100),
    st.floats(1e-6, 10),
)
def test_the_coefficient_rises_above_the_target_and_falls_below_and_is_never_negative(rule, beta, kl, target):
    after = update_kl_coef(beta, kl, target, rule, 10.0)
    assert after >= 0
    assert after >= beta or kl < target
    assert after <= beta or kl > target


def test_the_loss_with_a_kl_penalty_and_its_gradient():
    torch.manual_seed(0)
    logits, old_logits = torch.randn(2, 5, 3).double()
    logits.requires_grad_()
    actions, advantages = torch.randint(3, (5,)), torch.randn(5).double()
    old, new = Categorical(logits=old_logits), Categorical(logits=logits)
    ratios = (new.probs / old.probs)[range(5), actions]
    kl = (old.probs * (old.logits - new.logits)).sum(1).mean()
    loss = kl_penalty_loss(new.log_prob(actions), old.log_prob(actions), advantages, kl, 0.7)
    torch.testing.assert_close(loss, 0.7 * kl - (ratios * advantages).mean())

    [gradient] = torch.autograd.grad(loss, logits)
    chosen = nn.functional.one_hot(actions, 3)
    of_surrogate = (ratios * advantages)[:, None] * (chosen - new.probs) / 5
    of_kl = (new.probs - old.probs) / 5
    torch.testing.assert_close(gradient, 0.7 * of_kl - of_surrogate)


def test_at_the_old_policy_the_penalty_has_no_gradient():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    dist, old = Categorical(logits=logits), Categorical(logits=logits.detach())
    actions, advantages = torch.arange(5) % 3, torch.linspace(-1, 1, 5).double()
    batch = dist.log_prob(actions), old.log_prob(actions), advantages
    loss = kl_penalty_loss(*batch, kl_divergence(old, dist).mean(), 1e3)
    [with_it] = torch.autograd.grad(loss, logits, retain_graph=True)
    [without] = torch.autograd.grad(-(dist.log_prob(actions) * advantages).mean(), logits)
    torch.testing.assert_close(with_it, without)


EPS = 0.02  # target KL of the problems below


def best_mean(beta, c=2.0, sigma=0.5):
    """max c m - beta KL(N(0, sigma) || N(m, sigma)), KL = m^2 / (2 sigma^2): the best m and its KL."""
    m = c * sigma**2 / beta
    return m, m**2 / (2 * sigma**2)


def test_dual_ascent_finds_the_constrained_optimum_of_a_gaussian():
    """m* = sigma sqrt(2 eps), beta* = c sigma / sqrt(2 eps)"""
    beta = 1.0
    for _ in range(2000):
        beta = update_kl_coef(beta, best_mean(beta)[1], EPS, "dual", 10.0)
    m, kl = best_mean(beta)
    assert (m, kl, beta) == pytest.approx(
        (0.5 * math.sqrt(2 * EPS), EPS, 2 * 0.5 / math.sqrt(2 * EPS)), rel=1e-6
    )


def test_the_adaptive_rule_stays_within_a_factor_of_8_3_of_the_target():
    """KL goes as 1 / beta^2: a step of beta is a factor of 4, the band one of 2.25. It may never settle."""
    for start in (1e-3, 1.0, 3.0, 1e3):
        beta, ratios = start, []
        for _ in range(50):
            kl = best_mean(beta)[1]
            ratios.append(kl / EPS)
            beta = update_kl_coef(beta, kl, EPS, "adaptive", 1.0)
        assert all(3 / 8 <= ratio <= 8 / 3 for ratio in ratios[25:])


def test_dual_ascent_on_the_loss_finds_the_constrained_optimum_of_a_bandit():
    """max E_pi[A] with KL(pi_old || pi) = eps: pi = beta pi_old / (lambda - A), by bisection of both."""
    old = Categorical(probs=torch.tensor([0.5, 0.3, 0.2]).double())
    A = torch.tensor([0.0, 1.0, -0.5]).double()

    def penalised(beta):
        low, high = A.max(), A.max() + beta
        for _ in range(200):  # sum pi = 1 between them, where it falls with lambda
            middle = (low + high) / 2
            low, high = (middle, high) if (beta * old.probs / (middle - A)).sum() > 1 else (low, middle)
        return beta * old.probs / (low - A)

    def kl_of(pi):
        return (old.probs * (old.probs / pi).log()).sum().item()

    low, high = 0.01, 100.0
    for _ in range(100):  # the KL falls with beta
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kl_of(penalised(middle)) > EPS else (low, middle)

    beta, logits = 1.0, old.logits.clone().requires_grad_()
    options = dict(max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")
    for _ in range(150):
        optimizer = torch.optim.LBFGS([logits], **options)

        def closure():
            optimizer.zero_grad()  # noqa: B023
            pi = Categorical(logits=logits)
            weighted = 3 * old.probs * A  # the mean over the three actions is then E_old[ rho A ]
            loss = kl_penalty_loss(pi.logits, old.logits, weighted, kl_divergence(old, pi), beta)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        kl = kl_divergence(old, Categorical(logits=logits.detach())).item()
        beta = update_kl_coef(beta, kl, EPS, "dual", 20.0)
    assert (kl, beta) == pytest.approx((EPS, low), rel=1e-4)
    torch.testing.assert_close(Categorical(logits=logits.detach()).probs, penalised(low), rtol=0, atol=1e-4)


def test_where_the_constraint_does_not_bind_the_coefficient_stops_at_0_and_as_printed_turns_negative():
    """max -(m - 0.05)^2 / 2, whose optimum has a KL of 0.005 < eps. Printed: lambda + eta (KL - eps), without
    max(0, .): below 0 it rewards distance, and settles where the KL is eps, twice as far as the optimum."""

    def best(beta):
        m = 0.05 / (1 + beta / 0.25)
        return m, m**2 / 0.5

    right = printed = 0.3
    for _ in range(1000):
        right = update_kl_coef(right, best(right)[1], EPS, "dual", 1.0)
        printed = printed + 1.0 * (best(printed)[1] - EPS)
    assert right == 0.0 and best(right) == (0.05, pytest.approx(0.005))
    assert (printed, *best(printed)) == pytest.approx((-0.125, 0.1, EPS), rel=1e-6)


def test_a_larger_penalty_keeps_the_policy_nearer():
    kls = []
    for beta in (0.0, 1.0, 100.0):
        torch.manual_seed(0)
        policy = ppo.Policy(OBS_SPACE, Discrete(3))
        obs, actions, advantages = torch.randn(64, 3), torch.arange(64) % 3, torch.randn(64)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        optimizer.param_groups[0]["kl_coef"] = beta
        args = ppo.Args(objective="kl-penalty", kl_rule="fixed", update_epochs=20)
        old = copy.deepcopy(policy)
        metrics = ppo.update_policy(policy, optimizer, obs, actions, advantages, args)
        assert float(metrics["kl"]) == pytest.approx(kl_between(old, policy, obs), rel=1e-4, abs=1e-7)
        kls.append(float(metrics["kl"]))
        assert metrics["kl_coef"] == optimizer.param_groups[0]["kl_coef"] == beta
    assert kls[0] > 2 * kls[1] > 20 * kls[2] > 0


@pytest.mark.parametrize("rule", ["fixed", "adaptive", "dual"])
def test_the_coefficient_of_a_run_follows_its_rule_and_survives_a_resume(tmp_path, rule):
    args = ppo.Args(num_envs=4, num_steps=16, total_timesteps=384, runs_dir=str(tmp_path), kl_coef=0.5)
    args.objective, args.kl_rule, args.target_kl = "kl-penalty", rule, 0.003
    run_dir = ppo.train(args).run_dir
    state = torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
    saved = state["policy_optimizer"]["param_groups"][0]["kl_coef"]
    first = len(progress(run_dir))

    args.resume, args.total_timesteps = str(run_dir), 768
    ppo.train(args)
    rows = progress(run_dir)
    betas, kls = ([float(row[name]) for row in rows] for name in ("kl_coef", "kl"))
    assert betas[0] == 0.5 and betas[first] == saved
    assert len(betas) >= first + 5
    for beta, kl, after in zip(betas, kls, betas[1:]):
        assert after == update_kl_coef(beta, kl, 0.003, rule, args.kl_learning_rate)
    assert (saved != 0.5) == (rule != "fixed")


def test_the_clipped_objective_logs_no_coefficient(tmp_path):
    args = ppo.Args(num_envs=4, num_steps=16, total_timesteps=64, runs_dir=str(tmp_path))
    assert "kl_coef" not in progress(ppo.train(args).run_dir)[0]
