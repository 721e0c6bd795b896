"""The losses and policy updates of the step family; npg.py and trpo.py in full: test_trust_region.py."""

import importlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import FULL, MDPS, close, flat_gradient, moved, policy_of
from torch.distributions.kl import kl_divergence

import npg
import ppo
import trpo
import vpg_gae
from variants import ppo_kl_penalty

LOSSES = {  # by the names of the scripts, all called in one way
    "vpg_gae": lambda new, old, advantages: vpg_gae.policy_loss(new, advantages),
    "npg": lambda new, old, advantages: npg.policy_loss(new, advantages),
    "trpo": trpo.policy_loss,
    "ppo": lambda *batch: ppo.policy_loss(*batch, 0.2),
    "variants.ppo_kl_penalty": lambda *batch: ppo_kl_penalty.kl_penalty_loss(*batch, torch.zeros(()), 0.7),
}


def make_policy(space, script=ppo):
    torch.manual_seed(0)
    policy = script.Policy(Box(-1, 1, (3,)), space)
    policy.net[-1].bias.data = torch.linspace(-1, 1, len(policy.net[-1].bias))
    return policy


def update(script, policy, *batch, **args):
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, eps=1e-5)
    optimizer.param_groups[0]["kl_coef"] = 1.0
    args = script.Args(**args)
    mover = args.max_kl if script in (npg, trpo) else optimizer
    return script.update_policy(policy, mover, *batch, args)


def record(monkeypatch, script, name):
    """The arguments of every call of a function."""
    calls, function = [], getattr(script, name)
    monkeypatch.setattr(script, name, lambda *args: (calls.append(args), function(*args))[1])
    return calls


def exact_loss(name, mdp, policy, old):
    """A loss on all trajectories of the old policy, weighted with probabilities, with exact advantages."""
    valid = mdp.trajectories.valid
    p = mdp.trajectory_probabilities(old).detach().expand(valid.shape)[valid]
    advantages = mdp.along(mdp.exact_values(old, 1.0)[2])[valid]
    logprobs, old_logprobs = mdp.logprobs(policy)[valid], mdp.logprobs(old)[valid].detach()
    return LOSSES[name](logprobs, old_logprobs, len(p) * p * advantages)


@pytest.mark.parametrize("mdp", MDPS.values(), ids=MDPS)
def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient(mdp):
    policy = policy_of(mdp)
    for name in LOSSES:
        gradient = flat_gradient(exact_loss(name, mdp, policy, policy), policy)
        close(-gradient, mdp.exact_gradient(policy, 1.0))


@pytest.mark.parametrize("name", ["trpo", "variants.ppo_kl_penalty"])
def test_elsewhere_it_is_minus_the_mean_advantage_in_the_states_of_the_old_policy(name):
    old, new = policy_of(FULL), policy_of(FULL, seed=1)
    advantages = (new(FULL.observe).probs * FULL.exact_values(old, 1.0)[2]).sum(-1)
    close(exact_loss(name, FULL, new, old), -(FULL.state_distribution(old) * advantages).sum())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(MDPS)), st.integers(0, 10**6), st.integers(0, 10**6), st.floats(1e-3, 3))
def test_the_surrogate_minus_C_max_kl_is_a_lower_bound_of_J(name, seed, other, h):
    """|J(new) - J(old) - L| <= 4 eps^2 S <= C max_s KL, where S = sum_t t max|A_t|; C = 2 S."""
    mdp, old = MDPS[name], policy_of(MDPS[name], seed)
    new = moved(old, policy_of(mdp, other).theta, h)
    with torch.no_grad():
        L, J = -exact_loss("trpo", mdp, new, old), mdp.J(new, 1.0) - mdp.J(old, 1.0)
        p, q = old(mdp.observe).probs, new(mdp.observe).probs
    S = (torch.arange(mdp.horizon) * mdp.exact_values(old, 1.0)[2].abs().amax((1, 2))).sum()
    assert (J - L).abs() <= 4 * S * ((p - q).abs().sum(-1).max() / 2) ** 2 + 1e-12
    assert J >= L - 2 * S * (p * (p / q).log()).sum(-1).max() - 1e-12


CLIP = [  # advantage, ratio, minus the clipped surrogate with eps 0.2, its derivative by log pi
    (+2.0, 0.5, -1.0, -1.0),
    (+2.0, 1.1, -2.2, -2.2),
    (+2.0, 1.5, -2.4, 0.0),
    (-2.0, 0.5, +1.6, 0.0),
    (-2.0, 1.1, +2.2, +2.2),
    (-2.0, 1.5, +3.0, +3.0),
]


@pytest.mark.parametrize("cases", [*([case] for case in CLIP), CLIP])
def test_clip_case_by_case(cases):
    advantages, ratios, losses, gradients = torch.tensor(cases).double().T
    logprobs = (ratios.log() - 1.5).requires_grad_()
    loss = ppo.policy_loss(logprobs, torch.full_like(ratios, -1.5), advantages, 0.2)
    loss.backward()
    close(loss.detach(), losses.mean(), 1e-6)
    close(logprobs.grad, gradients / len(cases), 1e-6)


def test_normalize_gives_zero_mean_and_unit_deviation_and_makes_a_constant_0():
    x = ppo.normalize(7 + 3 * torch.randn(500))
    assert abs(x.mean()) < 1e-6 and abs(x.std(correction=0) - 1) < 1e-6
    for constant, rows in [(3.0, 1), (3.0, 7), (0.1, 2), (100.3, 1000)]:
        close(ppo.normalize(torch.full((rows,), constant)), 0.0, 1e-3)


def test_gradient_step_scales_long_gradients_down_and_returns_the_norm_they_had():
    x = torch.nn.Parameter(torch.zeros(2))
    for scale, expected in ((1.0, [-0.3, -0.4]), (0.05, [-0.15, -0.2])):
        x.data.zero_()  # and the gradient of the step before stays
        loss = scale * (x * torch.tensor([3.0, 4.0])).sum()
        assert ppo.gradient_step(torch.optim.SGD([x], lr=1.0), loss, 0.5) == pytest.approx(5 * scale)
        close(x.data, torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_entropy_bonus_raises_the_entropy_and_good_actions_become_likelier(name, space):
    script, obs = importlib.import_module(name), torch.linspace(-1, 1, 120).view(40, 3)
    for ent_coef, scale in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        policy = make_policy(space, script)
        with torch.no_grad():
            old = policy(obs)
        actions = old.sample()
        advantages = scale * torch.where(actions.view(40, -1)[:, 0] > 0, 1.0, -1.0)
        metrics = update(script, policy, obs, actions, advantages, ent_coef=ent_coef)
        new = policy(obs)
        rise = (new.entropy() - old.entropy()).mean()
        assert scale or (rise > 6e-3 if ent_coef else rise.abs() < 4e-3)
        assert not scale or ((new.log_prob(actions) - old.log_prob(actions)) * advantages).mean() > 0.01
        close(metrics["entropy"], new.entropy().mean(), 1e-5)
        close(metrics["kl"], kl_divergence(old, new).mean(), 1e-5)


@pytest.mark.parametrize("target_kl, passes", [(1e-9, 1), (1e9, 5), (None, 5)])
def test_no_further_pass_above_the_target_kl(monkeypatch, target_kl, passes):
    policy, steps = make_policy(Discrete(4)), record(monkeypatch, ppo, "gradient_step")
    batch = torch.randn(30, 3), torch.randint(4, (30,)), torch.randn(30)
    args = dict(update_epochs=5, num_minibatches=3, target_kl=target_kl)
    assert 1e-9 < update(ppo, policy, *batch, **args)["kl"] < 1e9
    assert len(steps) == 3 * passes


@pytest.mark.parametrize("script, loss", [(ppo, "policy_loss"), (ppo_kl_penalty, "kl_penalty_loss")])
@pytest.mark.parametrize("rows", [1, 2, 5, 13])
def test_every_row_is_visited_once_per_pass_with_the_ratio_to_the_old_policy(monkeypatch, script, loss, rows):
    policy, calls = make_policy(Box(-1, 1, (2,))), record(monkeypatch, script, loss)
    obs, actions, numbers = torch.randn(rows, 3), torch.randn(rows, 2), 1.0 + torch.arange(rows)
    old = policy(obs).log_prob(actions).detach()
    coef = {"clip_coef": 0.01} if script is ppo else {}
    metrics = update(script, policy, obs, actions, numbers, update_epochs=3, **coef)
    assert all(np.isfinite(float(metric)) for metric in metrics.values())
    _, old_logprobs, visited, *_, coefs = zip(*calls)
    assert set(coefs) == {0.01 if coef else 1.0}
    assert rows == 1 or 1 < len(calls) / 3 <= script.Args().num_minibatches
    visited = torch.cat(visited).view(3, rows).long() - 1
    assert torch.equal(visited.sort().values, torch.arange(rows).expand(3, -1))
    close(torch.cat(old_logprobs), old[visited].flatten(), 1e-5)
    ratios = (policy(obs).log_prob(actions) - old).exp()
    assert not coef or metrics["clip_fraction"] == ((ratios - 1).abs() > 0.01).float().mean() > 0
