"""What V is regressed on in the step family, and the proximal term of that, against closed forms."""

import importlib
import math

import environments
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

GAE = ["vpg_gae", "npg", "trpo", "ppo"]
PROXIMAL = ["vpg_gae", "a3c_nstep"]  # npg.py, trpo.py and ppo.py have the same text: test_copies.py
GAMMA, LAMBDA = 0.9, 0.7

# ---------------------------------------------------------------------------- the targets


def record(monkeypatch, module, name):
    """(arguments, result) of every call of a function of a script."""
    calls, function = [], getattr(module, name)

    def recorded(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, recorded)
    return calls


def monte_carlo(rewards, values, terminations, dones, t):
    """The rewards from t to the end of the episode or of the rollout, then V if it was no termination."""
    total = 0.0
    for k in range(len(rewards) - t):
        total += GAMMA**k * rewards[t + k]
        if dones[t + k]:
            break
    return total + GAMMA ** (k + 1) * values[t + k + 1] * (not terminations[t + k])


def td(rewards, values, terminations, dones, t):
    return rewards[t] + GAMMA * values[t + 1] * (not terminations[t])


def lambda_return(rewards, values, terminations, dones, t):
    """The mean of the returns of n steps with weights (1 - lambda) lambda^(n-1), the rest for the longest."""
    total, weight, returns = 0.0, 1.0, 0.0
    for k in range(len(rewards) - t):
        total += GAMMA**k * rewards[t + k]
        n_step = total + GAMMA ** (k + 1) * values[t + k + 1] * (not terminations[t + k])
        if dones[t + k] or t + k + 1 == len(rewards):
            return returns + weight * n_step
        returns += weight * (1 - LAMBDA) * n_step
        weight *= LAMBDA


TARGETS = {"gae": lambda_return, "monte-carlo": monte_carlo, "td": td}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", GAE)
def test_train_regresses_on_the_target_of_each_step(monkeypatch, tmp_path, name, target):
    """In Counter-v0, whose episodes of 7 steps terminate and are truncated in turn; rollouts of 15 steps."""
    script, values = importlib.import_module(name), []

    class Value(script.Value):
        def forward(self, obs):
            result = super().forward(obs)
            if result.shape == (16, 4):  # of a whole rollout, not of a batch
                values.append(result.double().numpy())
            return result

    monkeypatch.setattr(script, "Value", Value)
    rollouts = record(monkeypatch, script, "rollout")
    updates = record(monkeypatch, script, "update_value")
    sizes = dict(num_envs=4, num_steps=15, num_minibatches=1, total_timesteps=150, normalize_rewards=False)
    args = dict(value_target=target, gamma=GAMMA, gae_lambda=LAMBDA, runs_dir=str(tmp_path))
    script.train(script.Args(f"{environments.__name__}:Counter-v0", **sizes, **args))
    assert len(updates) == len(rollouts) == len(values) == 3
    for (_, batch), v, ((_, _, b_obs, b_returns, _), _) in zip(rollouts, values, updates):
        obs, _, rewards, terminations, dones, valid = (x.numpy() for x in batch)
        columns = rewards.astype(float), v, terminations, dones
        expected = [
            TARGETS[target](*(x[:, n] for x in columns), t) for t, n in np.ndindex(valid.shape) if valid[t, n]
        ]
        np.testing.assert_array_equal(b_obs, obs[:-1][valid])
        np.testing.assert_allclose(b_returns, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", ["goes on", "terminated", "truncated"])
def test_three_targets_of_one_step_before_and_at_an_end_in_numbers(end):
    """Rewards 1, 1 and V = 10, 20, 40: what each target is at both steps."""
    rewards, values = np.ones(2), np.array([10.0, 20.0, 40.0])
    terminations, dones = np.array([False, end == "terminated"]), np.array([False, end != "goes on"])
    last = 1 + (0 if end == "terminated" else 0.9 * 40)
    expected = {"td": 1 + 0.9 * 20, "monte-carlo": 1 + 0.9 * last}
    expected["gae"] = 0.3 * expected["td"] + 0.7 * expected["monte-carlo"]
    tensors = [torch.as_tensor(x)[:, None] for x in (rewards, values, terminations, dones)]
    for target, gae_lambda in (("td", 0.0), ("monte-carlo", 1.0), ("gae", LAMBDA)):
        for t, number in enumerate((expected[target], last)):
            assert TARGETS[target](rewards, values, terminations, dones, t) == pytest.approx(number)
        for name in GAE:
            gae = importlib.import_module(name).compute_gae(*tensors, GAMMA, gae_lambda)
            torch.testing.assert_close(
                (gae + tensors[1][:-1]).squeeze(1), torch.tensor([expected[target], last]).double()
            )


# ---------------------------------------------------------------------------- the proximal term


def args_of(script, **changes):
    """Arguments of update_value: one pass of one minibatch, without a limit of the gradient."""
    return script.Args(**{"value_epochs": 1, "num_minibatches": 1, "max_grad_norm": 1e9, **changes})


def flat(net):
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.fixture(params=PROXIMAL)
def script(request):
    return importlib.import_module(request.param)


class Line(torch.nn.Module):
    """V(s) = phi . s"""

    def __init__(self, size):
        super().__init__()
        self.phi = torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, obs):
        return obs @ self.phi


def regress(script, kappa, lr=0.05, epochs=500, **changes):
    """Gradient descent on a linear V; returns obs, returns, phi before and phi after."""
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    returns = torch.randn(40, generator=generator, dtype=torch.float64) + obs[:, 0]
    value = Line(3)
    before = value.phi.detach().clone()
    optimizer = torch.optim.SGD(value.parameters(), lr=lr)
    args = args_of(script, value_prox_coef=kappa, value_epochs=epochs, **changes)
    script.update_value(value, optimizer, obs, returns, args)
    return obs, returns, before, value.phi.detach()


@pytest.mark.parametrize("kappa", [0.0, 0.1, 1.0, 5.0])
def test_a_linear_value_goes_to_the_ridge_regression_around_the_old_parameters(script, kappa):
    """min 1/B |X phi - R|^2 + kappa |phi - phi_i|^2  at  (X'X/B + kappa I)^-1 (X'R/B + kappa phi_i)"""
    obs, returns, before, after = regress(script, kappa)
    matrix = obs.T @ obs / len(obs) + kappa * torch.eye(3)
    expected = torch.linalg.solve(matrix, obs.T @ returns / len(obs) + kappa * before)
    torch.testing.assert_close(after, expected, rtol=1e-8, atol=1e-8)


def test_the_weight_goes_from_the_regression_alone_to_the_old_parameters(script):
    way = []
    for kappa in (0.0, 0.1, 1.0, 5.0, 1e6):
        _, _, before, after = regress(script, kappa, lr=0.05 if kappa < 10 else 1e-7)
        way.append((after - before).norm())
    assert way[0] > 0.5 and way[-1] < 1e-4
    assert all(a > b for a, b in zip(way, way[1:]))


def test_the_old_parameters_are_those_before_the_regression_not_before_the_step(script):
    """phi_1 = phi_0 - lr grad(phi_0), phi_2 = phi_1 - lr (grad(phi_1) + 2 kappa (phi_1 - phi_0))"""
    lr, kappa = 0.05, 1.0
    obs, returns, phi_0, phi_2 = regress(script, kappa, lr, epochs=2)

    def grad(phi):
        return 2 * obs.T @ (obs @ phi - returns) / len(obs)

    phi_1 = phi_0 - lr * grad(phi_0)
    torch.testing.assert_close(phi_2, phi_1 - lr * (grad(phi_1) + 2 * kappa * (phi_1 - phi_0)))
    _, _, before, again = regress(script, kappa, lr, epochs=1)
    torch.testing.assert_close(again, phi_1)  # and the next regression starts anew


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_gradient_is_that_of_the_written_formula(script, monkeypatch, kappa):
    """For the scripts' own network, at the second step, where the parameters have moved."""
    torch.manual_seed(0)
    value = script.Value(Box(-1, 1, (3,))).double()
    obs, returns = torch.randn(30, 3).double(), torch.randn(30).double()
    old, gradients = flat(value), []

    def gradient_step(optimizer, loss, max_grad_norm):
        params, way, start = list(value.parameters()), 0.0, 0
        for param in params:
            way = way + (param - old[start : start + param.numel()].view_as(param)).pow(2).sum()
            start += param.numel()
        formula = ((value(obs) - returns) ** 2).sum() / 30 + kappa * way
        gradients.append([torch.autograd.grad(x, params, retain_graph=True) for x in (loss, formula)])
        original(optimizer, loss, max_grad_norm)

    original = script.gradient_step
    monkeypatch.setattr(script, "gradient_step", gradient_step)
    optimizer = torch.optim.SGD(value.parameters(), lr=0.1)
    args = args_of(script, value_prox_coef=kappa, value_epochs=2)
    script.update_value(value, optimizer, obs, returns, args)
    assert len(gradients) == 2
    for actual, expected in gradients:
        torch.testing.assert_close(actual, expected)


def test_a_huge_weight_keeps_the_network_where_it_was(script):
    torch.manual_seed(0)
    obs, returns, ways = torch.randn(64, 3), 5 + torch.randn(64), []
    for kappa in (0.0, 1e3):
        value = script.Value(Box(-1, 1, (3,)))
        old = flat(value)
        optimizer = torch.optim.SGD(value.parameters(), lr=1e-4)
        args = args_of(script, value_prox_coef=kappa, value_epochs=100, num_minibatches=2)
        script.update_value(value, optimizer, obs, returns, args)
        ways.append((flat(value) - old).norm().item())
    assert math.isfinite(ways[1]) and ways[1] < 0.1 * ways[0]
