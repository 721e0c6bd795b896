"""train learns: short runs with the default arguments, which are deterministic for their seed."""

import importlib

import gymnasium as gym
import numpy as np
import pytest


class Copy(gym.Env):
    """Episodes of one step, reward -|action - observation|^2: at best -2/3 for a constant action."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, -float(((action - self.obs) ** 2).sum()), True, False, {}


gym.register("Copy-v0", Copy, disable_env_checker=True)

# Each threshold is far below the worst of 8 seeds. To see these, in tests/:
#   PYTHONPATH=.. python -c "import test_learning as t; t.show()"
LEARNED = [  # script, environment, steps, threshold of the mean of the last 100 returns
    ("ppo", "CartPole-v1", 80_000, 300),  # 464 493 499 500 500 500 500 500
    ("ppo", "Copy-v0", 20_000, -0.55),
]


def learn(name, env_id, steps, runs_dir="runs", seed=1):
    """The mean return of the first and of the last 100 episodes."""
    script = importlib.import_module(name)
    args = script.Args(env_id=env_id, seed=seed, total_timesteps=steps, runs_dir=str(runs_dir))
    returns = script.train(args).episode_returns
    return np.mean(returns[:100]), np.mean(returns[-100:])


@pytest.mark.parametrize("name, env_id, steps, threshold", LEARNED)
def test_the_default_arguments_learn(tmp_path, name, env_id, steps, threshold):
    first, last = learn(name, env_id, steps, tmp_path)
    assert first < threshold < last


def show():
    for name, env_id, steps, _ in LEARNED:
        means = sorted(learn(name, env_id, steps, seed=seed)[1] for seed in range(1, 9))
        print(name, env_id, *[f"{mean:.3g}" for mean in means])
