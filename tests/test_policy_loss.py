import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo

torch.set_num_threads(1)

OBS_SPACE = Box(-1, 1, (3,))


def make_policy(action_space, seed=0):
    torch.manual_seed(seed)
    policy = ppo.Policy(OBS_SPACE, action_space)
    return policy, make_optimizer(policy, lr=1e-2)


def make_optimizer(policy, lr):
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    optimizer.param_groups[0]["kl_coef"] = 1.0  # as train does
    return optimizer


def record(monkeypatch, name):
    """The arguments of every call of a function of ppo."""
    calls, function = [], getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *args: (calls.append(args), function(*args))[1])
    return calls


# advantage, ratio, minus the clipped surrogate with eps 0.2, its derivative by log pi
CLIP = [
    (+2.0, 0.5, -1.0, -1.0),
    (+2.0, 1.1, -2.2, -2.2),
    (+2.0, 1.5, -2.4, 0.0),
    (-2.0, 0.5, +1.6, 0.0),
    (-2.0, 1.1, +2.2, +2.2),
    (-2.0, 1.5, +3.0, +3.0),
]


@pytest.mark.parametrize("advantage, ratio, expected_loss, expected_gradient", CLIP)
def test_clip_case_by_case(advantage, ratio, expected_loss, expected_gradient):
    old_logprobs, advantages = torch.tensor([-1.5]).double(), torch.tensor([advantage]).double()
    logprobs = (old_logprobs + np.log(ratio)).requires_grad_()
    loss = ppo.policy_loss(logprobs, old_logprobs, advantages, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss)
    assert logprobs.grad.item() == pytest.approx(expected_gradient, rel=1e-9, abs=0)


def test_loss_is_the_mean_over_the_batch():
    advantages, ratios, losses, gradients = torch.tensor(CLIP).double().T
    logprobs = ratios.log().requires_grad_()
    loss = ppo.policy_loss(logprobs, torch.zeros(6).double(), advantages, 0.2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), losses.mean())
    torch.testing.assert_close(logprobs.grad, gradients / 6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("action_space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient(action_space):
    policy, _ = make_policy(action_space)
    obs, advantages = torch.randn(50, 3), torch.randn(50)
    logprobs = policy(obs).log_prob(policy(obs).sample())
    loss = ppo.policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    gradient = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    plain = torch.autograd.grad(-(logprobs * advantages).mean(), list(policy.parameters()))
    torch.testing.assert_close(gradient, plain)
    assert all(g.abs().max() > 0 for g in plain)


def test_first_ratio_is_exactly_1_although_the_environment_got_clipped_actions(monkeypatch):
    args = ppo.Args(env_id="Pendulum-v1", num_envs=4, update_epochs=1, num_minibatches=1)
    envs = ppo.make_envs(args)
    policy = ppo.Policy(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        policy.log_std.fill_(1.5)
    step, received = envs.unwrapped.step, []
    monkeypatch.setattr(envs.unwrapped, "step", lambda actions: (received.append(actions), step(actions))[1])

    batch = ppo.rollout(envs, policy, *ppo.reset(envs, args, 0), num_steps=50)
    obs, actions, valid = batch[0], batch[1], batch[-1]
    assert (actions.abs() > 2).float().mean() > 0.3
    np.testing.assert_array_equal(received, actions.clamp(-2, 2))

    calls = record(monkeypatch, "policy_loss")
    optimizer = make_optimizer(policy, lr=1e-3)
    ppo.update_policy(policy, optimizer, obs[:-1][valid], actions[valid], torch.randn(200), args)
    [(logprobs, old_logprobs, *_)] = calls
    assert len(logprobs) == 200
    assert ((logprobs - old_logprobs).exp() == 1).all()


def test_the_policy_that_is_scored_is_the_one_that_collected(monkeypatch, tmp_path):
    states = []

    def keep_state(name, position):
        function = getattr(ppo, name)

        def call(*args):
            states.append({key: tensor.clone() for key, tensor in args[position].state_dict().items()})
            return function(*args)

        monkeypatch.setattr(ppo, name, call)

    keep_state("rollout", 1)
    keep_state("update_policy", 0)
    ppo.train(ppo.Args(num_envs=4, num_steps=8, total_timesteps=90, runs_dir=str(tmp_path)))
    assert len(states) >= 6
    for collected, scored in zip(states[::2], states[1::2]):
        torch.testing.assert_close(collected, scored, rtol=0, atol=0)
    for scored, collected in zip(states[1::2], states[2::2]):
        assert collected["net.0.count"] > scored["net.0.count"]


@pytest.mark.parametrize("target_kl, passes", [(1e-9, 1), (1e9, 5), (None, 5)])
def test_no_further_pass_above_the_target_kl(monkeypatch, target_kl, passes):
    policy, optimizer = make_policy(Discrete(4))
    args = ppo.Args(update_epochs=5, num_minibatches=3, target_kl=target_kl)
    steps = record(monkeypatch, "gradient_step")
    obs, actions = torch.randn(30, 3), torch.randint(4, (30,))
    metrics = ppo.update_policy(policy, optimizer, obs, actions, torch.randn(30), args)
    assert len(steps) == 3 * passes
    assert 1e-9 < metrics["kl"] < 1e9


@pytest.mark.parametrize("action_space", [Discrete(4), Box(-1, 1, (2,))], ids=["discrete", "box"])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_entropy_bonus_raises_the_entropy_when_advantages_are_0(action_space, ent_coef):
    policy, optimizer = make_policy(action_space)
    torch.nn.init.normal_(policy.net[-1].bias)
    obs = torch.randn(40, 3)
    before = policy(obs)
    actions = before.sample()
    args = ppo.Args(ent_coef=ent_coef)
    metrics = ppo.update_policy(policy, optimizer, obs, actions, torch.zeros(40), args)
    entropy = policy(obs).entropy().mean()
    torch.testing.assert_close(metrics["entropy"], entropy)
    if ent_coef:
        assert entropy > before.entropy().mean() + 0.01
    else:
        torch.testing.assert_close(entropy, before.entropy().mean(), rtol=0, atol=0)


def test_update_makes_good_actions_more_likely_and_reports_what_it_did():
    policy, optimizer = make_policy(Discrete(4))
    obs, actions = torch.randn(64, 3), torch.arange(64) % 4
    advantages = torch.where(actions == 2, 1.0, -1.0)
    with torch.no_grad():
        old = policy(obs)
    metrics = ppo.update_policy(policy, optimizer, obs, actions, advantages, ppo.Args(update_epochs=20))
    new = policy(obs)
    assert (new.probs[:, 2] > old.probs[:, 2] + 0.02).all()
    ratios = (new.log_prob(actions) - old.log_prob(actions)).exp()
    assert metrics["clip_fraction"] == ((ratios - 1).abs() > 0.2).float().mean() > 0
    torch.testing.assert_close(metrics["kl"], (old.probs * (old.logits - new.logits)).sum(1).mean())


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 10, 13])
def test_every_row_is_visited_once_per_pass(monkeypatch, rows):
    policy, optimizer = make_policy(Box(-1, 1, (2,)))
    calls = record(monkeypatch, "policy_loss")
    args = ppo.Args(update_epochs=3, num_minibatches=4)
    advantages = torch.arange(rows).float()
    metrics = ppo.update_policy(
        policy, optimizer, torch.randn(rows, 3), torch.randn(rows, 2), advantages, args
    )
    assert all(np.isfinite(float(metric)) for metric in metrics.values())
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    minibatches = [advantages.tolist() for _, _, advantages, _ in calls]
    per_pass = len(minibatches) // 3
    assert 1 < per_pass <= 4 or rows == 1
    for k in range(3):
        assert sorted(sum(minibatches[k * per_pass : (k + 1) * per_pass], [])) == list(range(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_value_update_visits_every_row_and_stays_finite(rows):
    torch.manual_seed(0)
    value = ppo.Value(OBS_SPACE)
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-2)
    obs, returns = torch.randn(rows, 3), torch.randn(rows)
    metrics = ppo.update_value(value, optimizer, obs, returns, ppo.Args(value_epochs=200))
    assert all(np.isfinite(float(metric)) for metric in metrics.values())
    torch.testing.assert_close(value(obs), returns, atol=0.05, rtol=0)


def test_gradient_step_scales_long_gradients_down_and_refuses_what_is_not_finite():
    x = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([x], lr=1.0)
    ppo.gradient_step(optimizer, (x * torch.tensor([3.0, 4.0])).sum(), 0.5)
    torch.testing.assert_close(x.data, torch.tensor([-0.3, -0.4]))
    with pytest.raises(FloatingPointError):
        ppo.gradient_step(optimizer, x.sum() * float("nan"), 0.5)
    torch.testing.assert_close(x.data, torch.tensor([-0.3, -0.4]))


def test_normalize_gives_zero_mean_and_unit_deviation():
    x = ppo.normalize(7 + 3 * torch.randn(500, generator=torch.Generator().manual_seed(0)))
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("constant", [3.0, 0.1, 100.3])
def test_normalize_makes_a_constant_0(constant):
    for rows in (1, 2, 7, 50, 1000):
        torch.testing.assert_close(
            ppo.normalize(torch.full((rows,), constant)), torch.zeros(rows), atol=1e-3, rtol=0
        )
