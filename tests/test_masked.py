"""variants/ppo_masked.py: what a mask forbids is not done, not learned from, and not counted."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from tabular import close
from torch.distributions import kl_divergence

from variants import ppo_masked as script

SPACES = {"Discrete": Discrete(4, start=5), "MultiDiscrete": MultiDiscrete([2, 4, 3], start=[0, 5, -1])}
MASKS = {  # info of an environment, t steps after a reset
    "right": lambda mask, t: {"action_mask": mask},
    "nowhere": lambda mask, t: {},
    "too-long": lambda mask, t: {"action_mask": np.append(mask, 1)},
    "not-at-a-reset": lambda mask, t: {"action_mask": mask} if t else {},
    "here-and-there": lambda mask, t: {"action_mask": mask} if mask[0] else {},
}


class Masked(gym.Env):
    """Episodes of 3 steps with random masks, which at their end allow nothing; refuses what is forbidden."""

    observation_space = Box(-1, 1, (2,))

    def __init__(self, kind, masks):
        self.action_space, self.info = SPACES[kind], MASKS[masks]

    def show(self, t):
        rng, self.t, sizes = self.np_random, t, getattr(self.action_space, "nvec", [4])
        self.parts = [rng.permutation(size) <= rng.integers(size) for size in sizes]
        mask = np.concatenate(self.parts).astype(np.int8) * (t < 3)
        return rng.normal(size=2).astype(np.float32), self.info(mask, t)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.show(0)

    def step(self, action):
        action = np.ravel(action - self.action_space.start)
        assert all(part[a] for part, a in zip(self.parts, action, strict=True)), "forbidden"
        obs, info = self.show(self.t + 1)
        return obs, self.np_random.normal(), self.t == 3, False, info


for kind, masks in [(kind, masks) for kind in SPACES for masks in MASKS]:
    gym.register(f"{kind}-{masks}-v0", Masked, disable_env_checker=True, kwargs=dict(kind=kind, masks=masks))


@pytest.fixture
def policies():
    """Two policies of 2, 4 and 3 actions, and observations (3, 2 + 9) that end with their masks."""
    torch.manual_seed(0)
    masks = torch.tensor([9 * [1], [1, 1, 0, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 1, 0, 0]])
    both = [script.Policy(Box(-1, 1, (11,)), SPACES["MultiDiscrete"]) for _ in range(2)]
    for policy in both:
        policy.net[-1].weight.data *= 100
    return *both, torch.cat([torch.randn(3, 2), masks], -1)


def test_a_distribution_is_that_over_the_joint_actions_that_are_allowed(policies):
    actions, obs = torch.cartesian_prod(*map(torch.arange, (2, 4, 3))), policies[2]
    p, q = dists = [policy(obs) for policy in policies[:2]]
    samples, divergence = p.sample((2000,)), kl_divergence(p, q)
    for n in range(3):
        tables = []  # of p and q, by the softmax of what is allowed
        for dist, policy in zip(dists, policies):
            parts = (policy.net(obs[n]).exp() * obs[n, 2:]).split([2, 4, 3])
            tables.append(torch.cartesian_prod(*(part / part.sum() for part in parts)).prod(-1))
            probs = dist.log_prob(actions[:, None])[:, n].exp()
            close(probs, tables[-1], 1e-6)
        allowed = probs > 0
        a, b = (table[allowed] for table in tables)
        close(p.entropy()[n], -(a * a.log()).sum().item(), 1e-5)
        close(divergence[n], (a * (a / b).log()).sum().item(), 1e-5)
        assert torch.equal((samples[:, n, None] == actions).all(-1).any(0), allowed)
        assert torch.equal(p.mode[n], actions[tables[0].argmax()])
    assert (policies[0](torch.zeros(2000, 11)).sample() < torch.tensor([2, 4, 3])).all()  # none is allowed


def test_what_is_forbidden_has_no_gradient_and_what_is_allowed_has(policies):
    policy, other, obs = policies
    bias, parts = policy.net[-1].bias, obs[:, 2:].split([2, 4, 3], -1)
    free = torch.cat([(part > 0) & (part.sum(-1, keepdim=True) > 1) for part in parts], -1)  # and not alone
    p, q = policy(obs), other(obs)
    for score in (p.log_prob(p.mode), p.entropy(), kl_divergence(p, q)):
        for n in range(3):
            [gradient] = torch.autograd.grad(score[n], bias, retain_graph=True)
            assert torch.equal(gradient != 0, free[n])


@pytest.mark.parametrize("kind", SPACES)
def test_a_run_takes_what_is_allowed_and_scores_it_with_the_same_mask(kind, tmp_path, monkeypatch):
    old_logprobs, loss = [], script.policy_loss
    monkeypatch.setattr(script, "policy_loss", lambda *batch: old_logprobs.append(batch[1]) or loss(*batch))
    args = script.Args(f"{__name__}:{kind}-right-v0", total_timesteps=2000, runs_dir=str(tmp_path))
    script.train(args)
    assert torch.cat(old_logprobs).min() > -20
    args.mask = False
    with pytest.raises(AssertionError, match="forbidden"):
        script.train(args)


@pytest.mark.parametrize("masks", [*MASKS][1:])
def test_an_environment_without_masks_is_refused(masks, tmp_path):
    args = script.Args(f"{__name__}:MultiDiscrete-{masks}-v0", runs_dir=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="action_mask.* of size 9: add it in a wrapper, or --no-mask"):
        script.train(args)
    assert masks == "here-and-there" or list(tmp_path.iterdir()) == []
