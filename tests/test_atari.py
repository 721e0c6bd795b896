"""variants/ppo_atari.py: games and their lives, the shared network, the common loss, and a run."""

import runpy
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_run_folder import assert_same, checkpoint, progress

script = pytest.importorskip("variants.ppo_atari", exc_type=ImportError)
FRAMES = Box(0, 255, (4, 84, 84), np.uint8)


def make_games(env_id):
    return script.EpisodicLife(script.make_envs(script.Args(env_id=env_id, num_envs=2)), buffer_length=9)


@pytest.mark.parametrize(
    "env_id, fire, choice", [("ALE/Breakout-v5", 1, (2, 4)), ("ALE/MsPacman-v5", 0, (0, 9))]
)
def test_games_are_those_of_atari_preprocessing_and_a_lost_life_is_a_termination(env_id, fire, choice):
    """But for the first frames: ale-py presses FIRE, then NOOPs, and fills the stack with black frames."""
    pytest.importorskip("cv2", reason="AtariPreprocessing needs OpenCV: pip install opencv-python-headless")
    single = gym.make(env_id, frameskip=1, repeat_action_probability=0.0)
    single = gym.wrappers.AtariPreprocessing(single, noop_max=0)
    envs, rng, lost, starts, over = make_games(env_id), np.random.default_rng(0), False, 0, True
    given, step = [], envs.env.step
    envs.env.step = lambda actions: given.append(actions) or step(actions)
    obs, info = envs.reset(seed=5)
    assert (envs.single_observation_space, envs.single_action_space.start) == (FRAMES, 0)
    while True:
        if over:  # and the observation is that of a reset
            single.reset(seed=5)
            for frame in range(info["episode_frame_number"][0]):
                single.env.step(fire * (frame == 0))
            starts, over, total, ends, lives = starts + 1, False, 0.0, 0, info["lives"][0]
        old, actions = obs[0], rng.integers(*choice, 2)  # of Breakout neither NOOP nor FIRE
        obs, rewards, terminations, truncations, info = envs.step(actions)
        assert given[-1][0] == (fire if lost else actions[0])
        frame, reward, over, _, _ = single.step(fire if lost else actions[0])
        np.testing.assert_array_equal(obs[0], [*old[1:], frame])
        lost, lives, total = single.ale.lives() < lives, single.ale.lives(), total + reward
        assert (rewards[0], terminations[0], truncations.any()) == (np.sign(reward), lost, False)
        ends += lost
        if starts == 2:
            break
        if over:
            assert ends == (5 if fire else 3) and total in envs.return_queue and total > 0
            obs, rewards, terminations, _, info = envs.step(actions)
            assert (rewards[0], terminations[0]) == (0, False)
            lost = False


class Uniform(torch.nn.Module):
    def forward(self, obs):
        return torch.distributions.Categorical(logits=torch.zeros(len(obs), 4))


def test_a_rollout_is_bytes_and_the_step_after_a_lost_life_is_no_data():
    envs = make_games("ALE/Breakout-v5")
    obs, done = script.reset(envs, script.Args(), 0)
    obs, actions, rewards, terminations, dones, valid = script.rollout(envs, Uniform(), obs, done, 60)
    assert obs.shape == (61, 2, 4, 84, 84) and obs.dtype == torch.uint8 and actions.shape == (60, 2)
    assert terminations.any() and envs.lives.min() > 0 and not envs.return_queue
    assert_same(valid[1:], ~terminations[:-1])
    assert_same(obs[1:, :, :3], obs[:-1, :, 1:])  # the game goes on where a life is lost
    assert rewards.dtype == torch.float32 and not envs.single_observation_space.low.any()


def test_seeds_are_such_as_ale_py_takes():
    seed = max(range(99), key=lambda seed: np.random.SeedSequence([seed, 0]).generate_state(1)[0])
    script.reset(make_games("ALE/Pong-v5"), script.Args(seed=seed), 0)


def test_policy_and_value_share_convolutions_of_pixels_over_255():
    torch.manual_seed(0)
    policy, obs = (
        script.Policy(FRAMES, Discrete(6)),
        torch.randint(0, 256, (3, 2, 4, 84, 84), dtype=torch.uint8),
    )
    dist, values = policy.with_value(obs)
    assert dist.logits.shape == (3, 2, 6) and values.shape == (3, 2) and policy(obs[0]).logits.shape == (2, 6)
    sizes = {name: x.shape for name, x in policy.named_parameters() if "weight" in name}
    assert [*sizes.values()] == [
        (6, 512),
        (1, 512),
        (32, 4, 8, 8),
        (64, 32, 4, 4),
        (64, 64, 3, 3),
        (512, 3136),
    ]
    x = obs[1].float() / 255
    for name, stride in zip([*sizes][2:5], (4, 2, 1)):
        x = torch.conv2d(x, policy.get_parameter(name), stride=stride).relu()
    x = (x.flatten(1) @ policy.get_parameter([*sizes][5]).T).relu()
    torch.testing.assert_close(values[1], (x @ policy.value.weight.T)[:, 0], rtol=1e-4, atol=1e-5)
    logits = x @ policy.logits.weight.T
    torch.testing.assert_close(dist.logits[1], logits.log_softmax(-1), rtol=1e-4, atol=1e-5)


def test_one_step_goes_down_the_gradient_of_the_common_loss():
    torch.manual_seed(0)
    policy, obs = script.Policy(FRAMES, Discrete(6)), torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    actions, advantages, returns = torch.randint(0, 6, (5,)), torch.randn(5), torch.randn(5)
    dist, values = policy.with_value(obs)
    loss = -(dist.log_prob(actions) * advantages).mean() - 0.3 * dist.entropy().mean()
    loss = loss + 0.7 * (values - returns).pow(2).mean()
    params = list(policy.parameters())
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)])
    args = script.Args(update_epochs=1, num_minibatches=1, max_grad_norm=1e9, ent_coef=0.3, value_coef=0.7)
    optimizer = torch.optim.Adam(params, lr=0.0)
    batch = obs, actions, dist.logits.detach(), values.detach(), advantages, returns
    metrics = script.update_policy(policy, optimizer, *batch, args)
    gradient = torch.cat([param.grad.flatten() for param in params])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["explained_variance"].item() == pytest.approx(1 - unexplained.item(), rel=1e-4)


def test_a_run_goes_on_where_it_was(tmp_path):
    args = script.Args(num_envs=2, num_steps=8, total_timesteps=40, runs_dir=str(tmp_path), torch_threads=1)
    result = script.train(args)
    rows, state = progress(result.run_dir), checkpoint(result.run_dir)
    assert [row["step"] for row in rows] == ["16", "32", "48"] and state["step"] == 48
    args = script.load_args(result.run_dir)
    assert_same(script.train(args).policy.state_dict(), result.policy.state_dict())
    args.total_timesteps = 60
    again = script.train(args)
    assert again.run_dir == result.run_dir and progress(result.run_dir)[:3] == rows
    assert checkpoint(result.run_dir)["iteration"] == 4


@pytest.mark.parametrize("changes", [{"env_id": "CartPole-v1"}, {"vectorization": "sync"}])
def test_other_environments_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        script.Args(**changes)


def test_without_ale_py_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match="pip install ale-py$"):
        runpy.run_path(script.__file__)
