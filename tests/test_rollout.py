import importlib
from types import SimpleNamespace

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo

torch.set_num_threads(1)

STEP_FAMILY = ["vpg_gae", "npg", "trpo", "ppo", "a3c_nstep"]
FIELDS = ("obs", "actions", "rewards", "terminations", "dones", "valid")
VECTOR_CLASS = {
    "sync": gym.vector.SyncVectorEnv,
    "async": gym.vector.AsyncVectorEnv,
    "auto": environments.CounterVector,
}


def start(env_id, mode="sync", num_envs=4, seed=1, iteration=0):
    args = ppo.Args(env_id=env_id, num_envs=num_envs, seed=seed, vectorization=mode)
    envs = ppo.make_envs(args)
    torch.manual_seed(0)
    policy = ppo.Policy(envs.single_observation_space, envs.single_action_space)
    return envs, policy, *ppo.reset(envs, args, iteration)


@pytest.fixture(scope="module", params=VECTOR_CLASS)
def data(request):
    """Two consecutive rollouts of Counter-v0, 15 steps each, joined; its columns are in name, episode, ..."""
    envs, policy, obs, done = start("Counter-v0", request.param)
    assert type(envs.unwrapped) is VECTOR_CLASS[request.param]
    first = ppo.rollout(envs, policy, obs, done, 15)
    second = ppo.rollout(envs, policy, first[0][-1], first[4][-1], 15)
    envs.close()
    data = SimpleNamespace(**{name: torch.cat(both) for name, *both in zip(FIELDS, first, second)})
    data.obs = torch.cat([first[0][:-1], second[0]])
    data.name, data.episode, data.step, data.last_action = data.obs[:-1].unbind(-1)
    data.next_name, data.next_episode, data.next_step, data.next_last_action = data.obs[1:].unbind(-1)
    return data


def test_shapes_and_types(data):
    assert data.obs.shape == (31, 4, 4) and data.obs.dtype == torch.float32
    assert data.actions.shape == data.rewards.shape == (30, 4) and data.rewards.dtype == torch.float32
    for flags in (data.terminations, data.dones, data.valid):
        assert flags.shape == (30, 4) and flags.dtype == torch.bool


def test_next_row_is_the_true_successor_the_last_of_an_episode_included(data):
    valid = data.valid
    assert torch.equal(data.next_name, data.name)
    assert torch.equal(data.next_episode[valid], data.episode[valid])
    assert torch.equal(data.next_step[valid], data.step[valid] + 1)
    assert torch.equal(data.next_last_action[valid], data.actions[valid] + environments.START)
    assert (data.next_step == environments.LENGTH).any()


def test_rows_that_are_not_valid_are_exactly_the_resets(data):
    assert torch.equal(data.valid, data.step != environments.LENGTH)
    assert 10 < (~data.valid).sum() < 20
    assert torch.equal(data.next_episode[~data.valid], data.episode[~data.valid] + 1)
    assert (data.next_step[~data.valid] == 0).all() and (data.next_last_action[~data.valid] == -1).all()


def test_rewards_and_ends_stand_in_the_row_of_their_action(data):
    valid = data.valid
    assert torch.equal(data.rewards[valid], (10 * data.episode + data.step)[valid])
    ends = data.step == environments.LENGTH - 1
    assert torch.equal(data.dones, ends)
    assert torch.equal(data.terminations, ends & (data.episode % 2 == 0))
    assert 0 < data.terminations.sum() < data.dones.sum()


def test_an_episode_that_ends_with_a_rollout_is_reset_in_the_next(data):
    assert data.dones[14].sum() == 1
    assert torch.equal(data.valid[15], ~data.dones[14])
    assert data.valid[0].all()


def test_a_policy_samples_from_0_and_the_environment_receives_from_start(data):
    assert set(data.actions.flatten().tolist()) == {0, 1, 2}
    start = environments.START
    assert set(data.last_action.flatten().tolist()) == {-1, start, start + 1, start + 2}


def test_sub_environments_have_different_seeds(data):
    assert len(data.name[0].unique()) == 4


@pytest.mark.parametrize("mode", ["sync", "auto"])
def test_reset_is_seeded_by_seed_and_iteration(mode):
    names = [
        start("Counter-v0", mode, seed=seed, iteration=iteration)[2][:, 0].tolist()
        for seed, iteration in [(1, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    ]
    assert names[0] == names[1]
    assert len(set(map(tuple, names))) == 4


def test_rollout_builds_no_graph():
    envs, policy, obs, done = start("Counter-v0")
    grad_enabled = []
    policy.register_forward_hook(lambda *args: grad_enabled.append(torch.is_grad_enabled()))
    batch = ppo.rollout(envs, policy, obs, done, 2)
    assert grad_enabled == [False, False] and not any(x.requires_grad for x in batch)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("env_id", ["Counter-v0", "MatrixAction-v0"])
@pytest.mark.parametrize("name", STEP_FAMILY)
def test_what_a_rollout_returns_can_be_differentiated_through_a_policy(name, env_id, num_steps):
    """Actions are sampled in inference mode, whose tensors autograd refuses."""
    script = importlib.import_module(name)
    envs, _, obs, done = start(env_id)
    policy = script.Policy(envs.single_observation_space, envs.single_action_space)
    for _ in range(2):  # the second starts from what the first returned
        batch = script.rollout(envs, policy, obs, done, num_steps)
        assert not any(x.is_inference() for x in batch)
        policy.zero_grad()
        policy(batch[0][:-1]).log_prob(batch[1]).sum().backward()
        assert all(x.grad.isfinite().all() for x in policy.parameters())
        assert policy.net[-1].bias.grad.abs().max() > 0
        obs, done = batch[0][-1], batch[4][-1]


@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_episode_returns_are_raw_and_in_the_order_of_the_ends(monkeypatch, tmp_path, normalize_rewards):
    rewards, compute_gae = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: (rewards.append(args[0]), compute_gae(*args))[1])
    args = ppo.Args(
        env_id="Counter-v0", num_envs=4, num_steps=15, total_timesteps=100, runs_dir=str(tmp_path)
    )
    args.normalize_rewards = normalize_rewards
    result = ppo.train(args)
    assert result.episode_returns == [6, 15, 20, 21] + 4 * [91] + 4 * [161] + 3 * [231]
    assert (torch.stack(rewards).max() == 43) == (not normalize_rewards)


@pytest.mark.parametrize(
    "env_id", [f"{name}Obs-v0" for name in "Dict Tuple Discrete Matrix Scalar Byte".split()]
)
def test_observations_are_flattened_as_gymnasium_does(env_id):
    envs, policy, obs, done = start(env_id, num_envs=3)
    obs = ppo.rollout(envs, policy, obs, done, 6)[0]
    for n, env in enumerate(envs.unwrapped.envs):
        space, raw = env.unwrapped.observation_space, env.unwrapped.observations
        expected = np.array([gym.spaces.flatten(space, x) for x in raw], np.float32)
        np.testing.assert_array_equal(obs[:, n], expected)
    assert ppo.Value(envs.single_observation_space)(obs).shape == (7, 3)


@pytest.mark.parametrize("name, size", [("Matrix", 6), ("Scalar", 1), ("Double", 2)])
def test_box_actions_of_any_shape_are_stored_as_they_are_and_clipped_for_the_environment(name, size):
    envs, policy, obs, done = start(f"{name}Action-v0", num_envs=3)
    with torch.no_grad():
        policy.log_std.fill_(1.5)
    actions = ppo.rollout(envs, policy, obs, done, 20)[1]
    assert actions.shape == (20, 3, size)
    for n, env in enumerate(envs.unwrapped.envs):
        space = env.action_space
        received = np.array(env.unwrapped.actions)
        stored = actions[:, n].numpy().reshape(20, *space.shape)
        np.testing.assert_allclose(received, stored.clip(space.low, space.high), rtol=1e-6)
        assert (received != stored).any() and (received == stored).any()


@pytest.mark.parametrize("env_id", ["NaNReward-v0", "InfObs-v0", "HugeObs-v0"])
def test_what_is_not_finite_is_refused_at_the_step_where_it_comes(env_id):
    envs, policy, obs, done = start(env_id)
    obs = ppo.rollout(envs, policy, obs, done, 2)[0][-1]
    with pytest.raises(FloatingPointError):
        ppo.rollout(envs, policy, obs, done, 1)


REFUSED = [
    ("SameStep-v0", "auto", "next-step autoreset"),
    ("NoAutoreset-v0", "auto", "next-step autoreset"),
    ("MultiDiscreteAction-v0", "sync", "MultiDiscrete([2 3])"),
    ("MultiDiscreteMatrixAction-v0", "sync", "MultiDiscrete([[2 3]"),
    ("IntegerBoxAction-v0", "sync", "Box(0, 3, (2,), int64)"),
    ("SequenceObs-v0", "sync", "Sequence(Discrete(3)"),
]


@pytest.mark.parametrize("env_id, mode, words", REFUSED)
def test_refused_in_one_line_with_code_2(capsys, recwarn, env_id, mode, words):
    with pytest.raises(SystemExit) as error:
        ppo.make_envs(ppo.Args(env_id=env_id, vectorization=mode))
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and env_id in err and words in err
    assert not out and not recwarn.list


def test_observations_that_cannot_be_flattened_are_refused_for_async_too():
    with pytest.raises(SystemExit):
        ppo.make_envs(ppo.Args(env_id="SequenceObs-v0", vectorization="async", num_envs=2))
