"""Every script learns in a short run, which is deterministic for its seed."""

import importlib

import numpy as np
import pytest

LEARNED = [  # script, arguments, steps, and a threshold below the last 100 returns of four seeds
    ("reinforce", {}, 40_000, 250),
    ("reinforce_baseline", {}, 40_000, 270),
    ("offpolicy_is", {}, 40_000, 110),
    ("vpg_gae", {}, 40_000, 190),
    ("npg", {}, 40_000, 200),
    ("trpo", {}, 40_000, 200),
    ("ppo", {}, 40_000, 230),
    ("variants.ppo_kl_penalty", {}, 40_000, 230),
    ("a3c_nstep", dict(num_workers=1), 14_000, 90),  # with more it is not deterministic
]


@pytest.mark.parametrize("name, changes, steps, threshold", LEARNED)
def test_learns_to_balance_a_pole(tmp_path, name, changes, steps, threshold):
    script = importlib.import_module(name)
    returns = script.train(script.Args(total_timesteps=steps, runs_dir=str(tmp_path), **changes)).returns
    assert len(returns) == 100 and np.mean(returns) > threshold
