"""train learns: short runs, mostly with the default arguments, which are deterministic for their seed."""

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

KL = dict(objective="kl-penalty")
ONE = dict(num_workers=1)  # several workers are not deterministic
# Each threshold is well below the worst of 8 seeds, which stand behind it. To see these, in tests/:
#   PYTHONPATH=.. python -c "import test_learning as t; t.show()"
LEARNED = [  # script, other arguments, environment, steps, threshold of the mean of the last 100 returns
    ("reinforce", {}, "CartPole-v1", 40_000, 100),  # 170 187 239 245 262 338 386 399
    ("reinforce_baseline", {}, "CartPole-v1", 40_000, 130),  # 182 273 306 327 334 349 368 376
    ("offpolicy_is", {}, "CartPole-v1", 40_000, 120),  # 175 192 245 289 340 345 368 406
    ("vpg_gae", {}, "CartPole-v1", 40_000, 200),  # 268 278 297 298 308 320 323 348
    ("npg", {}, "CartPole-v1", 60_000, 80),  # 130 186 226 331 363 381 399 406
    ("trpo", {}, "CartPole-v1", 60_000, 80),  # 149 191 325 362 391 391 397 403
    ("ppo", {}, "CartPole-v1", 40_000, 200),  # 272 282 282 284 296 301 305 306
    ("ppo", KL, "CartPole-v1", 40_000, 200),  # 273 279 288 292 310 310 316 336
    ("a3c_nstep", ONE, "CartPole-v1", 14_000, 90),  # 132 136 141 145 150 152 181 183
    ("reinforce", {}, "Copy-v0", 15_000, -0.58),  # -0.493 -0.409 -0.408 -0.3 -0.234 -0.219 -0.208 -0.142
    ("npg", {}, "Copy-v0", 8_000, -0.3),  # -0.155 -0.132 -0.127 -0.125 -0.123 -0.121 -0.114 -0.0954
    ("trpo", {}, "Copy-v0", 8_000, -0.35),  # -0.226 -0.186 -0.177 -0.177 -0.173 -0.164 -0.159 -0.132
    ("vpg_gae", {}, "Copy-v0", 20_000, -0.58),  # -0.503 -0.493 -0.487 -0.485 -0.439 -0.436 -0.434 -0.425
    ("ppo", {}, "Copy-v0", 20_000, -0.55),  # -0.425 -0.412 -0.411 -0.41 -0.394 -0.372 -0.37 -0.324
    ("ppo", KL, "Copy-v0", 20_000, -0.55),  # -0.424 -0.411 -0.41 -0.41 -0.391 -0.375 -0.37 -0.322
]


def learn(name, changes, env_id, steps, runs_dir="runs", seed=1):
    """The mean return of the first 20 and of the last 100 episodes."""
    script = importlib.import_module(name)
    args = script.Args(env_id=env_id, seed=seed, total_timesteps=steps, runs_dir=str(runs_dir), **changes)
    returns = script.train(args).episode_returns
    return np.mean(returns[:20]), np.mean(returns[-100:])


@pytest.mark.parametrize("name, changes, env_id, steps, threshold", LEARNED)
def test_learns(tmp_path, name, changes, env_id, steps, threshold):
    first, last = learn(name, changes, env_id, steps, tmp_path)
    assert first < threshold < last


def show():
    for *run, _ in LEARNED:
        means = sorted(learn(*run, seed=seed)[1] for seed in range(1, 9))
        print(*run, *[f"{mean:.3g}" for mean in means], flush=True)
