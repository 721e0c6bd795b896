"""Environments for the workers of a3c_nstep.py; they leave their marks in the folder $A3C_MARKS."""

import os
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class Constant(gym.Env):
    """Reward 1 at every step; after 3 steps the episode terminates or is truncated."""

    observation_space, action_space = Box(-9, 9, (2,)), Discrete(2)

    def __init__(self, ends):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.array([1, -2], np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 3
        obs = np.array([1, -2], np.float32)
        return obs, 1.0, end and self.ends == "terminates", end and self.ends == "truncated", {}


class Marking(gym.Env):
    """Random observations, episodes of 1 to 20 steps; a file per process has a byte for each step.

    One process goes wrong at its 300th step: it raises, or observes nan.
    """

    observation_space, action_space = Box(-9, 9, (2,)), Discrete(2)

    def __init__(self, goes_wrong=None):
        self.goes_wrong, self.steps = goes_wrong, 0
        self.marks = Path(os.environ["A3C_MARKS"])
        self.file = None

    def observation(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(1, 21)
        return self.observation(), {}

    def step(self, action):
        self.file = self.file or open(self.marks / f"steps_{os.getpid()}", "ab", buffering=0)
        self.file.write(b".")
        self.steps += 1
        self.left -= 1
        obs = self.observation()
        if self.goes_wrong and self.steps == 300 and self.is_first():
            if self.goes_wrong == "raises":
                raise ValueError("no such ladder")
            obs[0] = np.nan
        return obs, 1.0, self.left == 0, False, {}

    def is_first(self):
        """One process alone can create this file."""
        try:
            open(self.marks / "wrong", "x").close()
        except FileExistsError:
            return False
        return True


def register(env_id, entry_point, **kwargs):
    gym.register(env_id, f"{__name__}:{entry_point}", disable_env_checker=True, kwargs=kwargs)


register("Terminates-v0", "Constant", ends="terminates")
register("Truncated-v0", "Constant", ends="truncated")
register("Marking-v0", "Marking")
register("Raises-v0", "Marking", goes_wrong="raises")
register("Nan-v0", "Marking", goes_wrong="nan")
