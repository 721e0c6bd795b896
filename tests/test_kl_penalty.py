"""variants/ppo_kl_penalty.py: the loss, the three rules of its coefficient, and the update."""

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tabular import close
from torch.distributions.kl import kl_divergence

from variants import ppo_kl_penalty as script
from variants.ppo_kl_penalty import kl_penalty_loss, update_kl_coef

COEFFICIENTS = {  # beta, kl, the next beta; target 0.03, learning rate 10
    "fixed": [(0.7, 0.0, 0.7), (0.7, 9.0, 0.7)],
    "adaptive": [(0.7, 0.0199, 0.35), (0.7, 0.0201, 0.7), (0.7, 0.0449, 0.7), (0.7, 0.0451, 1.4)]
    + [(0.7, math.inf, 1.4), (1e-9, 0.0, 1e-9), (1e9, 1.0, 1e9)],
    "dual": [(0.7, 0.03, 0.7), (0.7, 0.05, 0.9), (0.7, 0.01, 0.5), (0.1, 0.01, 0.0), (0.0, 0.04, 0.1)],
}


@pytest.mark.parametrize("rule", COEFFICIENTS)
def test_the_next_coefficient(rule):
    for beta, kl, expected in COEFFICIENTS[rule]:
        after = update_kl_coef(beta, kl, 0.03, rule, 10.0)
        assert type(after) is float and after == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_where_the_constraint_does_not_bind_the_coefficient_stops_at_0_and_as_printed_turns_negative():
    """max -(m - 0.05)^2 / 2, whose optimum has a KL of 0.005 < eps. Printed: lambda + eta (KL - eps), without
    max(0, .): below 0 it rewards distance, and settles where the KL is eps, twice as far as the optimum."""
    right = printed = 0.3
    for _ in range(1000):
        m, far = (0.05 / (1 + beta / 0.25) for beta in (right, printed))  # the best with a penalty
        right = update_kl_coef(right, m**2 / 0.5, 0.02, "dual", 1.0)
        printed = printed + 1.0 * (far**2 / 0.5 - 0.02)
    assert (right, m, printed, far) == pytest.approx((0.0, 0.05, -0.125, 0.1), rel=1e-6)


def test_the_loss_adds_the_penalty_and_leaves_a_ratio_beyond_all_floats_to_it():
    """What it is without a penalty: test_policy_loss.py."""
    logprobs = torch.tensor([500.0, -500.0, 20.0, 0.0], requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, 1.0, 0.5])
    loss = kl_penalty_loss(logprobs, torch.zeros(4), advantages, logprobs.sum(), 0.7)
    [gradient] = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, 0.7 - torch.tensor([0.0, 0.0, math.exp(20), 0.5]) / 4)
    assert loss.item() == pytest.approx(0.7 * 20 - 0.5 / 4, rel=1e-3)


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_the_penalty_is_the_kl_from_the_policy_before_the_update(monkeypatch, space):
    torch.manual_seed(0)
    policy = script.Policy(Box(-1, 1, (3,)), space)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2, eps=1e-5)
    optimizer.param_groups[0]["kl_coef"] = 0.3
    obs, advantages, old, calls = torch.randn(64, 3), torch.randn(64), copy.deepcopy(policy), []

    def loss(*args):
        kls = [kl_divergence(p(obs), q(obs)).mean().item() for p, q in ((old, policy), (policy, old))]
        calls.append([args[3].item(), *kls, args[4]])
        return kl_penalty_loss(*args)

    monkeypatch.setattr(script, "kl_penalty_loss", loss)
    args = script.Args(kl_rule="dual", update_epochs=10, num_minibatches=1, target_kl=1e-4)
    metrics = script.update_policy(policy, optimizer, obs, old(obs).sample(), advantages, args)
    used, kl, reverse, betas = torch.tensor(calls).T
    torch.testing.assert_close(used, kl, rtol=1e-3, atol=1e-6)
    assert kl[-1] > 0.01 and (kl / reverse - 1)[1:].abs().max() > 0.01
    close(betas, 0.3, 1e-7)
    kl = kl_divergence(old(obs), policy(obs)).mean().item()
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-4) and metrics["kl_coef"] == 0.3
    expected = update_kl_coef(0.3, kl, 1e-4, "dual", args.kl_learning_rate)
    assert optimizer.param_groups[0]["kl_coef"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rule", COEFFICIENTS)
def test_the_coefficient_of_a_run_follows_its_rule_and_survives_a_resume(tmp_path, rule):
    args = script.Args(num_envs=4, num_steps=16, total_timesteps=384, runs_dir=str(tmp_path), kl_coef=0.5)
    args.kl_rule, args.target_kl = rule, 0.003
    args.resume = str(script.train(args).run_dir)
    args.total_timesteps = 768
    with open(Path(script.train(args).run_dir, "progress.csv"), newline="") as file:
        betas, kls = zip(*[(float(row["kl_coef"]), float(row["kl"])) for row in csv.DictReader(file)])
    assert betas[0] == 0.5 and len(betas) >= 12 and (betas[-1] != 0.5) == (rule != "fixed")
    for beta, kl, after in zip(betas, kls, betas[1:]):
        assert after == update_kl_coef(beta, kl, 0.003, rule, args.kl_learning_rate)
