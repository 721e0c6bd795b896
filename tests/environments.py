"""Environments for the tests, registered in gymnasium when this file is imported."""

import functools
import os
import signal
import time

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


class CounterVector(gym.vector.SyncVectorEnv):
    """The same, native: reset and every step return the same arrays, overwritten."""

    def __init__(self, num_envs, autoreset_mode=AutoresetMode.NEXT_STEP):
        super().__init__([Counter] * num_envs, autoreset_mode=autoreset_mode)

    def reset(self, **kwargs):
        self.arrays = [super().reset(**kwargs)[0]]
        return self.arrays[0], {}

    def step(self, actions):
        *arrays, info = super().step(actions)
        self.arrays += arrays[len(self.arrays) :]
        for kept, new in zip(self.arrays, arrays):
            kept[:] = new
        return *self.arrays, info


class Sampler(gym.Env):
    """Random observations of any space, the third may be given; keeps them and the actions."""

    observation_space, action_space = Box(-1, 1), Discrete(2)

    def __init__(self, third_obs=None, **spaces):
        self.third_obs = third_obs
        vars(self).update(spaces)

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        self.observations, self.actions = [self.observation_space.sample()], []
        return self.observations[0], {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        bad = self.third_obs is not None and len(self.actions) == 3
        self.observations.append(self.third_obs if bad else self.observation_space.sample())
        return self.observations[-1], 0.0, False, False, {}


class Random(gym.Env):
    """Random observations and rewards, episodes of 3 steps; keeps what is done to all in this process.

    With a seed that is a multiple of 4, as one of 4 environments has, it goes wrong after 20 steps.
    """

    observation_space, action_space = Box(-9, 9, (2,)), Discrete(2)
    seeds, returns, steps = [], [], []

    def __init__(self, truncates=False, wrong=None):
        self.truncates, self.wrong, self.count = truncates, wrong, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.rewards, self.seed = [], self.seed if seed is None else seed
        self.seeds.extend([] if seed is None else [seed])
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.count += 1
        self.steps.append(action)
        self.rewards.append(1000 * self.np_random.normal())
        if self.wrong and self.count > 20 and self.seed % 4 == 0:
            if self.wrong == "raises":
                raise LookupError(f"no such ladder at {time.time()}")
            if self.wrong == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            self.rewards[-1] = float(self.wrong)
        end, obs = len(self.rewards) == 3, self.np_random.normal(size=2).astype(np.float32)
        self.returns.extend([sum(self.rewards)] if end else [])
        return obs, self.rewards[-1], end and not self.truncates, end and self.truncates, {}


register = functools.partial(gym.register, disable_env_checker=True)
register("Counter-v0", Counter, vector_entry_point=CounterVector)
for name, mode in {"SameStep": AutoresetMode.SAME_STEP, "NoAutoreset": AutoresetMode.DISABLED}.items():
    register(f"{name}-v0", Counter, vector_entry_point=CounterVector, kwargs={"autoreset_mode": mode})
for name, space in {
    "Dict": Dict(b=Box(-1, 1, (2,)), a=Discrete(3)),
    "Tuple": Tuple([Box(-1, 1, (2, 2)), Discrete(3, start=1)]),
    "Discrete": Discrete(5, start=2),
    "Matrix": Box(-1, 1, (3, 2)),
    "Scalar": Box(-1, 1, ()),
    "Byte": Box(0, 255, (4,), np.uint8),
    "Image": Box(0, 255, (50, 50, 3), np.uint8),
    "Sequence": Sequence(Discrete(3)),
}.items():
    register(f"{name}Obs-v0", Sampler, kwargs={"observation_space": space})
for name, space in {
    "Matrix": Box(-1, np.array([[1, 2, 3], [4, 5, 6]], np.float32)),
    "Scalar": Box(-1, 1, ()),
    "Double": Box(-1, 1, (2,), np.float64),
    "MultiDiscrete": MultiDiscrete([2, 3]),
    "Dict": Dict(a=Discrete(2)),
    "IntegerBox": Box(0, 3, (2,), np.int64),
}.items():
    register(f"{name}Action-v0", Sampler, kwargs={"action_space": space})
for name, third_obs in {"Inf": np.inf, "Huge": 1e300}.items():  # the second is infinite in float32
    kwargs = {"observation_space": Box(-np.inf, np.inf, (1,), np.float64), "third_obs": np.array([third_obs])}
    register(f"{name}Obs-v0", Sampler, kwargs=kwargs)
register("test/Random-v0", Random)
register("Truncated-v0", Random, kwargs={"truncates": True})
for wrong in ("nan", "inf", "raises", "killed"):
    register(f"{wrong}-v0", Random, kwargs={"wrong": wrong})
