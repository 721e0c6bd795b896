"""The environments and rollouts of the step family."""

import re

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo


def start(env_id, mode="sync", num_envs=4, seed=1, iteration=0, init_std=1.0):
    args = ppo.Args(env_id=env_id, num_envs=num_envs, seed=seed, vectorization=mode)
    envs = ppo.make_envs(args)
    torch.manual_seed(0)
    policy = ppo.Policy(envs.single_observation_space, envs.single_action_space, init_std)
    return envs, policy, *ppo.reset(envs, args, iteration)


def counter_data(mode):
    """Two consecutive rollouts of Counter-v0, 15 steps each, joined."""
    envs, policy, obs, done = start("Counter-v0", mode)
    native = type(envs.unwrapped) is environments.CounterVector  # overwrites the arrays that it returned
    assert native == (mode == "auto")
    first = ppo.rollout(envs, policy, obs, done, 15)
    second = ppo.rollout(envs, policy, first[0][-1], first[4][-1], 15)
    envs.close()
    assert first[4][14].sum() == 1  # an episode that ends with the rollout
    return [torch.cat([first[0][:-1], second[0]]), *(torch.cat(both) for both in zip(first[1:], second[1:]))]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_vectorization_gives_the_same_data(mode):
    for x, y in zip(counter_data(mode), counter_data("auto")):
        assert torch.equal(x, y) and x.dtype == y.dtype


def test_rows_are_true_transitions_but_for_the_resets_which_are_not_valid():
    """An observation of Counter is its seed, the episode, the step, and the action that led there or -1."""
    obs, actions, rewards, terminations, dones, valid = data = counter_data("auto")
    assert [x.dtype for x in data] == [torch.float32, torch.int64, torch.float32] + 3 * [torch.bool]
    assert obs.shape == (31, 4, 4) and {x.shape for x in data[1:]} == {(30, 4)}
    name, episode, step, _ = obs[:-1].unbind(-1)
    next_name, next_episode, next_step, action = obs[1:].unbind(-1)
    reset = ~valid
    assert torch.equal(next_name, name) and len(name[0].unique()) == 4  # different seeds
    assert torch.equal(valid, step != environments.LENGTH) and 10 < reset.sum() < 20 and reset[15].sum() == 1
    assert torch.equal(next_episode, episode + reset) and torch.equal(next_step, (step + 1) * valid)
    assert torch.equal(action, torch.where(valid, actions + environments.START, -1.0))
    assert set(actions.flatten().tolist()) == {0, 1, 2}  # where the environment counts from START
    assert torch.equal(rewards, (10 * episode + step) * valid)
    assert torch.equal(dones, step == environments.LENGTH - 1)
    assert torch.equal(terminations, dones & (episode % 2 == 0))
    assert 0 < terminations.sum() < dones.sum()


@pytest.mark.parametrize("mode", ["sync", "auto"])
def test_reset_seeds_the_environments_and_the_sampling_by_seed_and_iteration(mode):
    drawn = []
    for seed, iteration in [(1, 0), (1, 0), (1, 1), (2, 0), (2, 1)]:
        _, _, obs, done = start("Counter-v0", mode, seed=seed, iteration=iteration)
        assert done.shape == (4,) and not done.any()
        drawn.append((*obs[:, 0].tolist(), torch.rand(()).item()))
    assert drawn[0] == drawn[1] and all(len(set(column)) == 4 for column in zip(*drawn))


@pytest.mark.parametrize("env_id", ["Counter-v0", "MatrixAction-v0"])
def test_a_rollout_builds_no_graph_and_what_it_returns_can_be_differentiated_through_a_policy(env_id):
    """Actions are sampled in inference mode, whose tensors autograd refuses."""
    envs, policy, *last, graphs = *start(env_id), []
    policy.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    for _ in range(2):  # the second starts from what the first returned
        obs, actions, *_, dones, valid = batch = ppo.rollout(envs, policy, *last, 3)
        assert not any(x.is_inference() or x.requires_grad for x in batch) and torch.is_grad_enabled()
        policy(obs[:-1]).log_prob(actions).sum().backward()
        last = obs[-1], dones[-1]
    assert policy.net[-1].bias.grad.abs().max() > 0 and graphs == 2 * [False, False, False, True]


@pytest.mark.parametrize("name", "Dict Tuple Discrete Matrix Scalar Byte".split())
def test_observations_are_flattened_as_gymnasium_does(name):
    envs, policy, obs, done = start(f"{name}Obs-v0", num_envs=3)
    obs = ppo.rollout(envs, policy, obs, done, 6)[0]
    for n, env in enumerate(envs.unwrapped.envs):
        space, raw = env.unwrapped.observation_space, env.unwrapped.observations
        np.testing.assert_array_equal(obs[:, n], [gym.spaces.flatten(space, x).astype("f") for x in raw])
    assert ppo.Value(envs.single_observation_space)(obs).shape == (7, 3)


def test_an_image_is_flattened_with_a_warning_that_names_the_recipe():
    with pytest.warns(UserWarning, match="ImageObs-v0: images go flat .* docs/recipes.md"):
        assert start("ImageObs-v0")[2].shape == (4, 7500)


@pytest.mark.parametrize("name, size", [("Matrix", 6), ("Scalar", 1), ("Double", 2)])
def test_box_actions_are_stored_as_they_are_and_clipped_for_the_environment(name, size):
    envs, policy, obs, done = start(f"{name}Action-v0", num_envs=3, init_std=4.0)
    actions = ppo.rollout(envs, policy, obs, done, 20)[1]
    assert actions.shape == (20, 3, size)
    for n, env in enumerate(envs.unwrapped.envs):
        space, received = env.action_space, np.array(env.unwrapped.actions)
        stored = actions[:, n].numpy().reshape(received.shape)
        np.testing.assert_allclose(received, stored.clip(space.low, space.high), rtol=1e-6)
        assert (received != stored).any() and (received == stored).any()


@pytest.mark.parametrize("env_id", ["InfObs-v0", "HugeObs-v0"])
def test_an_observation_that_is_not_finite_is_refused_at_the_step_where_it_comes(env_id):
    envs, policy, obs, done = start(env_id)
    obs = ppo.rollout(envs, policy, obs, done, 2)[0][-1]
    with pytest.raises(FloatingPointError, match="observation"):
        ppo.rollout(envs, policy, obs, done, 1)


REFUSED = [
    ("SameStep-v0", "auto", "SameStep-v0 must reset on the step after"),
    ("MultiDiscreteAction-v0", "sync", "MultiDiscreteAction-v0 takes MultiDiscrete([2 3])"),
    ("IntegerBoxAction-v0", "sync", "IntegerBoxAction-v0 takes Box(0, 3, (2,), int64)"),
    ("SequenceObs-v0", "sync", "Sequence("),
]


@pytest.mark.parametrize("env_id, mode, words", REFUSED)
def test_what_is_not_supported_is_refused_by_name(env_id, mode, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        start(env_id, mode)
