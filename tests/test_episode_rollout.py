"""Whole episodes, one per column, and the training of the episode family on them."""

import csv
import importlib
from pathlib import Path

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import offpolicy_is
import reinforce
import reinforce_baseline

SCRIPTS = ["reinforce", "reinforce_baseline", "offpolicy_is"]
VECTOR_CLASS = {
    "sync": gym.vector.SyncVectorEnv,
    "async": gym.vector.AsyncVectorEnv,
    "auto": environments.CounterVector,
}
TIMES = {"seconds", "steps_per_second"}


class Short(environments.Sampler):
    """A Sampler whose episodes end after 4 steps, by termination and truncation in turn."""

    episodes = 0

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        end = len(self.actions) == 4
        self.episodes += end
        return obs, reward + 1, end and self.episodes % 2 == 1, end and self.episodes % 2 == 0, info


class Bandit(gym.Env):
    """One step; the last of three actions gives 1, the others 0."""

    observation_space, action_space = Box(-1, 1, (2,)), Discrete(3, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(2, np.float32), float(action == 5), True, False, {}


gym.register("Short-v0", Short, disable_env_checker=True)
gym.register("ShortMatrix-v0", Short, disable_env_checker=True, kwargs=dict(action_space=Box(-1, 1, (2, 3))))
gym.register("Bandit-v0", Bandit, disable_env_checker=True)


def start(env_id, mode="sync", num_envs=4, seed=1):
    args = reinforce.Args(env_id=env_id, num_envs=num_envs, seed=seed, vectorization=mode)
    envs = reinforce.make_envs(args)
    torch.manual_seed(0)
    policy = reinforce.Policy(envs.single_observation_space, envs.single_action_space)
    obs, _ = reinforce.reset(envs, args, 0)
    return envs, policy, obs


def episodes(env_id, mode="sync", num_envs=4, seed=1, max_episode_steps=100):
    envs, policy, obs = start(env_id, mode, num_envs, seed)
    batch = reinforce.rollout_episodes(envs, policy, obs, max_episode_steps)
    envs.close()
    return batch


# ---------------------------------------------------------------------------- the rollout


@pytest.fixture(scope="module", params=VECTOR_CLASS)
def counted(request):
    """Counter-v0 starts at step 0, 2, 4 or 6 and ends at 7: episodes of 7, 5, 3 and 1 steps."""
    envs, policy, obs = start("Counter-v0", request.param)
    assert type(envs.unwrapped) is VECTOR_CLASS[request.param]
    batch = reinforce.rollout_episodes(envs, policy, obs, 7)
    envs.close()
    return batch


def test_one_whole_episode_per_column_as_long_as_the_longest(counted):
    obs, actions, rewards, valid = counted
    lengths = environments.LENGTH - obs[0, :, 2]
    assert sorted(lengths.tolist()) == [1, 3, 5, 7]
    assert torch.equal(valid, torch.arange(7)[:, None] < lengths)
    assert obs.shape == (7, 4, 4) and actions.shape == rewards.shape == valid.shape == (7, 4)
    assert obs.dtype == rewards.dtype == torch.float32 and valid.dtype == torch.bool


def test_every_row_is_what_the_policy_saw_before_it_acted(counted):
    obs, actions, _, valid = counted
    name, episode, step, last_action = obs.unbind(-1)
    assert (name == name[0]).all() and len(name[0].unique()) == 4
    assert (episode[valid] == 0).all()
    assert torch.equal(step[valid], (step[0] + torch.arange(7)[:, None])[valid])
    assert (last_action[0] == -1).all()
    assert torch.equal(last_action[1:][valid[1:]], actions[:-1][valid[1:]] + environments.START)


def test_rewards_stand_with_their_action_and_are_0_past_the_end(counted):
    obs, _, rewards, valid = counted
    assert torch.equal(rewards, obs[..., 2] * valid)
    assert (obs[..., 1][~valid] == 1).any()  # the next episode, whose rewards are at least 10


def test_actions_are_sampled_from_the_policy_at_these_observations():
    envs, policy, obs = start("Counter-v0", "auto", num_envs=64)
    with torch.no_grad():
        policy.net[-1].bias[:] = torch.tensor([0.0, 1.0, 2.0])
        obs, actions, _, valid = reinforce.rollout_episodes(envs, policy, obs, 7)
        shares = torch.stack([(actions[valid] == a).float().mean() for a in range(3)])
        torch.testing.assert_close(shares, policy(obs[valid]).probs.mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_one_environment_gives_its_one_episode(seed):
    obs, actions, rewards, valid = episodes("Counter-v0", num_envs=1, seed=seed)
    length = int(environments.LENGTH - obs[0, 0, 2])
    assert valid.shape == rewards.shape == actions.shape == (length, 1) and valid.all()
    assert rewards.sum() == sum(range(7 - length, 7))


def test_truncation_ends_an_episode_as_termination_does():
    envs, policy, obs = start("Short-v0", num_envs=2)
    for _ in range(3):
        rewards = reinforce.rollout_episodes(envs, policy, obs, 4)[2]
        assert rewards.tolist() == [[1.0, 1.0]] * 4
        obs = torch.tensor(envs.reset(seed=1)[0])


def test_a_limit_of_the_longest_episode_is_enough_and_one_less_is_refused(capsys):
    assert len(episodes("Counter-v0", max_episode_steps=7)[3]) == 7
    with pytest.raises(SystemExit) as error:
        episodes("Counter-v0", max_episode_steps=6)
    assert error.value.code == 2
    assert capsys.readouterr().err == "reinforce.py: --max-episode-steps 6: an episode did not end before\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_without_an_end_is_refused_in_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(script, tmp_path, env_id="DiscreteObs-v0", max_episode_steps=20)
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and "--max-episode-steps 20" in err


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("env_id", ["NaNReward-v0", "InfObs-v0", "HugeObs-v0"])
def test_what_is_not_finite_stops_at_the_step_where_it_comes(env_id):
    envs, policy, obs = start(env_id)
    with pytest.raises(SystemExit):
        reinforce.rollout_episodes(envs, policy, obs, 2)
    envs.reset(seed=1)
    with pytest.raises(FloatingPointError):
        reinforce.rollout_episodes(envs, policy, obs, 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_not_finite_names_what_and_where(script, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite after step 0: reward"):
        train(script, tmp_path, env_id="NaNReward-v0")
    with pytest.raises(FloatingPointError, match="not finite after step 0: observation"):
        train(script, tmp_path, env_id="InfObs-v0")


def test_box_actions_of_two_dimensions_are_stored_raw_and_clipped_for_the_environment():
    envs, policy, obs = start("ShortMatrix-v0", num_envs=3)
    actions = reinforce.rollout_episodes(envs, policy, obs, 10)[1]
    assert actions.shape == (4, 3, 6)
    for n, env in enumerate(envs.unwrapped.envs):
        received, stored = np.array(env.unwrapped.actions), actions[:, n].numpy().reshape(4, 2, 3)
        np.testing.assert_allclose(received, stored.clip(-1, 1), rtol=1e-6)
    assert actions.abs().max() > 1


@pytest.mark.parametrize("env_id", ["Counter-v0", "ShortMatrix-v0"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_rollout_returns_can_be_differentiated_through_a_policy(script, env_id):
    """Actions are sampled in inference mode, whose tensors autograd refuses."""
    module = importlib.import_module(script)
    envs, policy, obs = start(env_id)
    batch = module.rollout_episodes(envs, policy, obs, 100)
    assert not any(x.is_inference() or x.requires_grad for x in batch)
    obs, actions, _, valid = batch
    policy(obs).log_prob(actions)[valid].sum().backward()
    assert all(x.grad.isfinite().all() for x in policy.parameters())
    assert policy.net[-1].bias.grad.abs().max() > 0


# ---------------------------------------------------------------------------- training


def args_of(script, runs_dir, **changes):
    module = importlib.import_module(script)
    sizes = dict(num_envs=4, total_timesteps=120, torch_threads=1, runs_dir=str(runs_dir))
    return module, module.Args(**{**sizes, **changes})


def train(script, runs_dir, **changes):
    module, args = args_of(script, runs_dir, **changes)
    return module.train(args)


def record(monkeypatch, module, name):
    """(arguments, result) of every call of a function of a script."""
    calls, function = [], getattr(module, name)

    def recorded(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, recorded)
    return calls


def progress(run_dir):
    """The rows of progress.csv without the columns of time."""
    with open(Path(run_dir, "progress.csv"), newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_episode_returns_are_the_sums_of_the_columns(script, tmp_path, monkeypatch):
    calls = record(monkeypatch, importlib.import_module(script), "rollout_episodes")
    result = train(script, tmp_path, env_id="Counter-v0")
    returns = torch.cat([rewards.sum(0) for _, (_, _, rewards, _) in calls]).tolist()
    assert result.episode_returns == returns
    assert sorted(returns[:4]) == [6, 15, 20, 21]
    steps = [int(valid.sum()) for _, (_, _, _, valid) in calls]
    assert [int(row["step"]) for row in progress(result.run_dir)] == np.cumsum(steps).tolist()
    assert len(steps) > 1 and sum(steps[:-1]) < 120 <= sum(steps)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_iteration_starts_other_episodes_and_only_valid_rows_enter_the_statistics(
    script, tmp_path, monkeypatch
):
    calls = record(monkeypatch, importlib.import_module(script), "rollout_episodes")
    norm = train(script, tmp_path, env_id="Counter-v0").policy.net[0]
    starts = [tuple(obs[0, :, 0].tolist()) for _, (obs, _, _, _) in calls]
    assert len(set(starts)) == len(starts) > 2
    rows = torch.cat([obs[valid] for _, (obs, _, _, valid) in calls])
    assert norm.count == len(rows)
    torch.testing.assert_close(norm.mean, rows.mean(0))
    torch.testing.assert_close(norm.var, rows.var(0, correction=0))


def test_leaving_one_out_needs_two_environments(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train("reinforce_baseline", tmp_path, baseline="leave-one-out", num_envs=1)
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1
    assert "--baseline leave-one-out" in err and "--num-envs" in err
    assert not list(tmp_path.iterdir())
    train("reinforce_baseline", tmp_path, baseline="leave-one-out", num_envs=2, env_id="Counter-v0")


def case(script, **changes):
    return pytest.param(script, changes, id="-".join(map(str, [script, *changes.values()])))


LEARNERS = [
    case("reinforce", estimator="reward-to-go"),
    case("reinforce", estimator="total"),
    case("reinforce", normalize_weights=True),
    *(case("reinforce_baseline", baseline=name) for name in ("none", "mean", "leave-one-out")),
    *(case("reinforce_baseline", baseline=name) for name in ("time", "optimal")),
    case("reinforce_baseline", baseline="value", num_minibatches=1),
    *(case("offpolicy_is", estimator=name) for name in ("trajectory", "causal", "no-future", "per-step")),
    case("offpolicy_is", num_batches=3),
]


@pytest.mark.parametrize("script, changes", LEARNERS)
def test_train_learns_which_action_is_good(script, changes, tmp_path):
    changes = dict(num_envs=32, total_timesteps=32 * 40, learning_rate=0.01, **changes)
    policy = train(script, tmp_path, env_id="Bandit-v0", **changes).policy
    assert policy(torch.zeros(2)).probs[2] > 0.7


def interrupt(monkeypatch, module, iteration):
    """Ctrl-C when so many iterations are logged and the next is about to be."""
    log = module.Run.log

    def log_or_interrupt(run, *args):
        if run.iteration == iteration:
            raise KeyboardInterrupt
        log(run, *args)

    monkeypatch.setattr(module.Run, "log", log_or_interrupt)


RESUMED = [
    case("reinforce"),
    case("reinforce", env_id="Pendulum-v1", total_timesteps=5000, vectorization="sync"),
    case("reinforce_baseline", baseline="value", num_minibatches=4),
    case("reinforce_baseline", baseline="optimal"),
    case("offpolicy_is", num_batches=1),
    case("offpolicy_is", num_batches=3),
]


@pytest.mark.parametrize("saved", [2, 3])
@pytest.mark.parametrize("script, changes", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(script, changes, saved, tmp_path):
    """Also where the checkpoint is that of an iteration before the last one: its rows are made again."""
    changes = {"total_timesteps": 600, **changes}
    whole = train(script, tmp_path / "whole", **changes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = importlib.import_module(script)
        interrupt(monkeypatch, module, 3)
        save = module.Run.save
        monkeypatch.setattr(module, "SAVE_EVERY", 0)  # after every iteration
        monkeypatch.setattr(module.Run, "save", lambda run: run.iteration <= saved and save(run))
        run_dir = train(script, tmp_path / "parts", **changes).run_dir
    assert len(progress(run_dir)) == 3 < len(progress(whole.run_dir)) - 1
    assert torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)["iteration"] == saved
    torch.manual_seed(12345)
    resumed = module.train(module.load_args(run_dir))
    assert progress(resumed.run_dir) == progress(whole.run_dir)
    assert resumed.episode_returns == whole.episode_returns
    ends = [torch.load(Path(x.run_dir, "checkpoint.pt"), weights_only=True) for x in (whole, resumed)]
    for end in ends:
        del end["seconds"], end["progress_size"]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# ---------------------------------------------------------------------------- what each script adds


def test_the_value_baseline_is_that_of_before_its_fit_to_the_batch(tmp_path, monkeypatch):
    """An action must not be in its own baseline: V and its scale come from the batches before."""
    updates = record(monkeypatch, reinforce_baseline, "update_policy")
    batches = record(monkeypatch, reinforce_baseline, "compute_baseline")
    fits, fit = [], reinforce_baseline.update_value

    def look(value, optimizer, obs, returns, args):
        fits.append((value(obs).detach(), returns))
        return fit(value, optimizer, obs, returns, args)

    monkeypatch.setattr(reinforce_baseline, "update_value", look)
    train("reinforce_baseline", tmp_path, baseline="value", num_minibatches=4, total_timesteps=300)
    assert len(updates) == len(batches) == len(fits) > 2
    seen, mean, std = torch.empty(0), 0.0, 1.0
    for ((*_, weights, _), _), ((_, returns, valid, _), _), (values, targets) in zip(updates, batches, fits):
        torch.testing.assert_close(weights, returns[valid] - (values * std + mean), rtol=1e-3, atol=1e-3)
        seen = torch.cat([seen, returns[valid]])
        mean, std = seen.mean(), seen.std(correction=0)
        torch.testing.assert_close(targets, (returns[valid] - mean) / std, rtol=1e-3, atol=1e-3)


class Clock(gym.Env):
    """Eight steps of reward 100 under a constant observation: only the time tells what is left."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 100.0, False, self.t == 8, {}


gym.register("Clock-v0", Clock, disable_env_checker=True)


def test_the_value_baseline_knows_the_time(tmp_path, monkeypatch):
    """The horizon is finite: V(s_t, t) explains a return that depends on nothing but the time left."""
    updates = record(monkeypatch, reinforce_baseline, "update_policy")
    sizes = dict(num_envs=4, num_minibatches=4, gamma=1.0, total_timesteps=3200)
    train("reinforce_baseline", tmp_path, env_id="Clock-v0", baseline="value", **sizes)
    first, last = (weights.abs().mean() for (*_, weights, _), _ in (updates[0], updates[-1]))
    assert first > 400 and last < 20


def test_normalized_weights_have_zero_mean_and_unit_deviation(tmp_path, monkeypatch):
    for module in (reinforce, reinforce_baseline):
        updates = record(monkeypatch, module, "update_policy")
        train(module.__name__, tmp_path, normalize_weights=True)
        for (_, _, _, _, weights, _), _ in updates:
            torch.testing.assert_close(weights.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
            torch.testing.assert_close(weights.std(correction=0), torch.tensor(1.0), rtol=0, atol=1e-4)


def test_a_batch_is_left_when_its_effective_sample_size_falls(tmp_path):
    def columns(**changes):
        args = dict(total_timesteps=1500, num_envs=8, num_updates=6, min_ess=0.5)
        result = train("offpolicy_is", tmp_path, **args, **changes)
        rows = progress(result.run_dir)
        return [(int(float(r["updates"])), float(r["effective_sample_size"])) for r in rows]

    small, huge = columns(learning_rate=1e-5), columns(learning_rate=0.3)
    assert all(updates == 6 and size > 7.9 for updates, size in small)
    assert huge[0][0] < 6 and huge[0][1] < 0.5 * 8
    for updates, size in huge:
        assert 1 <= updates <= 6 and 1 <= size <= 8 + 1e-3
        assert updates == 6 or size < 4


def test_three_batches_are_the_latest_three_with_the_policies_that_collected_them(tmp_path, monkeypatch):
    collected, seen = record(monkeypatch, offpolicy_is, "rollout_episodes"), []
    update = offpolicy_is.update_policy

    def look(policy, optimizer, batches, args):
        with torch.no_grad():
            ratios = [(policy(b[0]).log_prob(b[1]) - b[4])[b[3]].abs().max().item() for b in batches]
        seen.append(([b[0] for b in batches], ratios))
        return update(policy, optimizer, batches, args)

    monkeypatch.setattr(offpolicy_is, "update_policy", look)
    train("offpolicy_is", tmp_path, num_batches=3, total_timesteps=600)
    assert len(seen) > 4
    for i, (batches, ratios) in enumerate(seen):
        expected = [obs for _, (obs, _, _, _) in collected[max(0, i - 2) : i + 1]]
        assert len(batches) == len(expected) and all(a is b for a, b in zip(batches, expected))
        assert ratios[-1] == 0 and all(ratio > 1e-4 for ratio in ratios[:-1])


@pytest.mark.parametrize("num_envs", [3, 16, 13])
def test_an_effective_sample_size_of_all_is_met_by_the_policy_that_collected(num_envs, tmp_path):
    result = train("offpolicy_is", tmp_path, min_ess=1.0, num_envs=num_envs)
    assert all(float(row["updates"]) >= 1 for row in progress(result.run_dir))
