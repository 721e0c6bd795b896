"""The regression of V; what it is regressed on: test_gae.py and test_wiring.py."""

import importlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tabular import close

import ppo


@pytest.mark.parametrize("name, kappa", [("ppo", 0.0), ("vpg_gae", 0.0), ("vpg_gae", 0.1), ("vpg_gae", 5.0)])
def test_a_linear_value_goes_to_the_ridge_regression_around_the_old_parameters(name, kappa):
    """min 1/B |X phi - R|^2 + kappa |phi - phi_i|^2  at  (X'X/B + kappa I)^-1 (X'R/B + kappa phi_i)"""
    torch.manual_seed(0)
    script, obs, noise = importlib.import_module(name), torch.randn(40, 3).double(), torch.randn(40).double()
    returns, linear = 3 + obs[:, 0] + noise, torch.nn.Linear(3, 1, bias=False).double()
    value = torch.nn.Sequential(linear, torch.nn.Flatten(0))
    before, error = linear.weight[0].detach().clone(), returns - value(obs)
    args = script.Args(value_epochs=500, num_minibatches=1, max_grad_norm=1e9)
    vars(args).update({"value_prox_coef": kappa} if kappa else {})
    metrics = script.update_value(value, torch.optim.SGD(value.parameters(), lr=0.05), obs, returns, args)

    matrix = obs.T @ obs / 40 + kappa * torch.eye(3)
    expected = torch.linalg.solve(matrix, obs.T @ returns / 40 + kappa * before)
    close(linear.weight[0], expected, 1e-8)
    loss = (obs @ expected - returns).pow(2).mean() + kappa * (expected - before).pow(2).sum()
    close(metrics["value_loss"], loss)
    explained = 1 - error.var(correction=0) / returns.var(correction=0)  # by V before the update
    close(metrics["explained_variance"], explained, 1e-6)
    close(metrics["value_grad_norm"], 0.0, 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_every_row_is_visited_and_what_is_logged_is_finite(rows):
    torch.manual_seed(0)
    value, obs, returns = ppo.Value(Box(-1, 1, (3,))), torch.randn(rows, 3), torch.randn(rows)
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-2)
    metrics = ppo.update_value(value, optimizer, obs, returns, ppo.Args(value_epochs=200, num_minibatches=4))
    assert all(np.isfinite(float(metric)) for metric in metrics.values())
    close(value(obs), returns, 0.05)
