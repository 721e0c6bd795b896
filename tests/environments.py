"""Environments for the tests, registered in gymnasium when this file is imported."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence, Tuple
from gymnasium.vector import AutoresetMode

LENGTH = 7  # steps of an episode
START = 5  # the smallest action of Counter


class Counter(gym.Env):
    """Observes (seed mod 1000, episode, step, action that led here or -1); reward 10 episode + step.

    Episode 0 starts at step 0, 2, 4 or 6, by the seed. Even episodes terminate, odd ones are truncated.
    """

    observation_space = Box(-1, 1000, (4,))
    action_space = Discrete(3, start=START)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:
            self.episode, self.t = self.episode + 1, 0
        else:
            self.name, self.episode, self.t = seed % 1000, 0, seed % 4 * 2
        return np.array([self.name, self.episode, self.t, -1], np.float32), {}

    def step(self, action):
        reward = 10.0 * self.episode + self.t
        self.t += 1
        obs = np.array([self.name, self.episode, self.t, action], np.float32)
        end, even = self.t == LENGTH, self.episode % 2 == 0
        return obs, reward, end and even, end and not even, {}


class CounterVector(gym.vector.VectorEnv):
    """The same, native: every step returns the same five arrays, overwritten."""

    def __init__(self, num_envs, autoreset_mode=AutoresetMode.NEXT_STEP):
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": autoreset_mode}
        self.single_observation_space = Counter.observation_space
        self.single_action_space = Counter.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs, self.rewards = np.zeros((num_envs, 4), np.float32), np.zeros(num_envs)
        self.terminations, self.truncations = np.zeros((2, num_envs), bool)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        seeds = seed + np.arange(self.num_envs)
        self.obs[:] = np.stack([seeds % 1000, 0 * seeds, seeds % 4 * 2, 0 * seeds - 1], 1)
        self.terminations[:] = self.truncations[:] = False
        return self.obs, {}

    def step(self, actions):
        over = self.terminations | self.truncations
        episode, t = self.obs[:, 1], self.obs[:, 2]
        self.rewards[:] = np.where(over, 0, 10 * episode + t)
        episode[over] += 1
        t[:] = np.where(over, 0, t + 1)
        self.obs[:, 3] = np.where(over, -1, actions)
        self.terminations[:] = (t == LENGTH) & (episode % 2 == 0)
        self.truncations[:] = (t == LENGTH) & (episode % 2 == 1)
        return self.obs, self.rewards, self.terminations, self.truncations, {}


class Sampler(gym.Env):
    """Random observations of any space; keeps them and the actions. Its third step may go wrong."""

    observation_space, action_space = Box(-1, 1), Discrete(2)

    def __init__(self, third_reward=0.0, third_obs=None, **spaces):
        self.third_reward, self.third_obs = third_reward, third_obs
        vars(self).update(spaces)

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        self.observations, self.actions = [self.observation_space.sample()], []
        return self.observations[0], {}

    def step(self, action):
        self.actions.append(action)
        third = len(self.actions) == 3
        bad = third and self.third_obs is not None
        self.observations.append(self.third_obs if bad else self.observation_space.sample())
        return self.observations[-1], self.third_reward if third else 0.0, False, False, {}


def register(env_id, entry_point="Sampler", vector_entry_point=None, **kwargs):
    native = vector_entry_point and f"{__name__}:{vector_entry_point}"
    entry_point = f"{__name__}:{entry_point}"
    gym.register(env_id, entry_point, vector_entry_point=native, disable_env_checker=True, kwargs=kwargs)


register("Counter-v0", "Counter", "CounterVector")
register("SameStep-v0", "Counter", "CounterVector", autoreset_mode=AutoresetMode.SAME_STEP)
register("NoAutoreset-v0", "Counter", "CounterVector", autoreset_mode=AutoresetMode.DISABLED)
register("DictObs-v0", observation_space=Dict(b=Box(-1, 1, (2,)), a=Discrete(3)))
register("TupleObs-v0", observation_space=Tuple([Box(-1, 1, (2, 2)), Discrete(3, start=1)]))
register("DiscreteObs-v0", observation_space=Discrete(5, start=2))
register("MatrixObs-v0", observation_space=Box(-1, 1, (3, 2)))
register("ScalarObs-v0", observation_space=Box(-1, 1, ()))
register("ByteObs-v0", observation_space=Box(0, 255, (4,), np.uint8))
register("SequenceObs-v0", observation_space=Sequence(Discrete(3)))
register("MatrixAction-v0", action_space=Box(-1, np.array([[1, 2, 3], [4, 5, 6]], np.float32)))
register("ScalarAction-v0", action_space=Box(-1, 1, ()))
register("DoubleAction-v0", action_space=Box(-1, 1, (2,), np.float64))
register("MultiDiscreteAction-v0", action_space=MultiDiscrete([2, 3]))
register("MultiDiscreteMatrixAction-v0", action_space=MultiDiscrete([[2, 3], [4, 5]]))
register("IntegerBoxAction-v0", action_space=Box(0, 3, (2,), np.int64))
register("NaNReward-v0", third_reward=float("nan"))
register("InfObs-v0", third_obs=np.array([np.inf]))
register("HugeObs-v0", observation_space=Box(-np.inf, np.inf, (1,), np.float64), third_obs=np.array([1e300]))
