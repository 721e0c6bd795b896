"""Classic control without its velocities: what an observation does not show, a policy has to remember.

Registered where this file is imported, which gymnasium does itself for an id of the form module:name.

    PYTHONPATH=benchmarks python variants/ppo_lstm.py --env-id partial:CartPoleNoVelocity-v1
"""

import gymnasium as gym
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation

POSITIONS = {"CartPole-v1": [0, 2], "Pendulum-v1": [0, 1]}  # x, angle; cosine and sine of the angle


def make(env_id, **kwargs):
    """An environment that shows positions alone."""
    env, shown = gym.make(env_id, **kwargs), POSITIONS[env_id]
    space = Box(env.observation_space.low[shown], env.observation_space.high[shown])
    return TransformObservation(env, lambda obs: obs[shown], space)


for env_id in POSITIONS:
    gym.register(env_id.replace("-", "NoVelocity-"), make, kwargs={"env_id": env_id})
