"""variants/ppo_lstm.py: what its networks remember, and that the update sees what the rollout did."""

from pathlib import Path

import environments
import gymnasium as gym
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tabular import close

from variants import ppo_lstm as script

OBS_SPACE, SPACES = Box(-1, 1, (2,)), {"discrete": Discrete(3), "box": Box(-1, 1, (2,))}


class Short(environments.Random):  # episodes of 1 to 9 steps
    def step(self, action):
        obs, reward, *_, info = super().step(action)
        end = len(self.rewards) == 9 or self.np_random.uniform() < 0.3
        return obs, reward, end and not self.truncates, end and self.truncates, info


for kind, space in SPACES.items():
    Class, kwargs = type(kind, (Short,), {"action_space": space}), {"truncates": kind == "box"}
    gym.register(f"Short-{kind}-v0", Class, disable_env_checker=True, kwargs=kwargs)


@pytest.fixture
def sequence():
    """Arguments of recurrent in float64: 6 steps of 3 environments, resets first, in the middle and last."""
    torch.manual_seed(0)
    net, lstm = script.mlp(2, 3, out_gain=1.0).double(), torch.nn.LSTM(64, 64).double()
    obs, state, valid = torch.randn(6, 3, 2), torch.randn(2, 3, 64), torch.ones(6, 3, dtype=torch.bool)
    valid[2, 0] = valid[0, 1] = valid[3, 1] = valid[5, 1] = False
    return net, lstm, obs.double().requires_grad_(), valid, state.double().requires_grad_()


def by_hand(net, lstm, obs, valid, state):
    (norm, first, tanh, *rest), (h, c), outputs = net, state, []
    for x, same_episode in zip(tanh(first((obs - norm.mean) / norm.std)), valid[:, :, None]):
        gates = x @ lstm.weight_ih_l0.T + h @ lstm.weight_hh_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(torch.nn.Sequential(*rest)(h))
        h, c = (torch.where(same_episode, x, 0.0) for x in (h, c))
    return torch.stack(outputs)


def test_outputs_and_gradients_through_time_are_those_of_the_equations(sequence):
    net, lstm, obs, _, state = sequence
    actual, expected = script.recurrent(*sequence)[0], by_hand(*sequence)
    close(actual, expected)
    weights, inputs = torch.randn_like(actual), [*net.parameters(), *lstm.parameters(), obs, state]
    for x, y in zip(*(torch.autograd.grad((weights * x).sum(), inputs) for x in (actual, expected))):
        assert y.abs().max() > 1e-4
        close(x, y)


def test_an_output_depends_on_what_its_episode_showed_so_far_and_on_nothing_else(sequence):
    """Up to the last observation of an episode: its row is not valid, but a truncation needs its value."""
    *nets, obs, valid, state = sequence
    jacobian = torch.autograd.functional.jacobian(lambda x: script.recurrent(*nets, x, valid, state)[0], obs)
    episode = torch.cat([torch.zeros(1, 3), (~valid[:-1]).cumsum(0)]) + 10 * torch.arange(3)
    so_far = torch.ones(6, 6).tril().bool()[:, None, :, None]
    assert torch.equal(jacobian.abs().sum((2, -1)) > 0, (episode[:, :, None, None] == episode) & so_far)
    assert torch.equal(script.recurrent(*sequence)[1].abs().sum((0, 2)) > 0, valid[-1])


def test_an_update_takes_whole_sequences_and_leaves_out_what_is_not_valid(monkeypatch):
    torch.manual_seed(0)
    obs, valid, state = inputs = torch.randn(6, 5, 2), torch.rand(6, 5) > 0.3, torch.randn(2, 5, 64)
    policy, value = script.Policy(OBS_SPACE, SPACES["discrete"]), script.Value(OBS_SPACE)
    policy.net[-1].weight.data *= 100
    (dist, _), (values, _), batches = policy(*inputs), value(*inputs), []
    actions, (advantages, returns), loss = dist.sample(), torch.randn(2, 6, 5), script.policy_loss
    logprobs, entropy, error = dist.log_prob(actions)[valid], dist.entropy()[valid].mean(), values - returns
    surrogate = ((logprobs - logprobs.detach()).exp() * advantages[valid]).mean()
    parameters = [*policy.parameters(), *value.parameters()]
    gradients = torch.autograd.grad(error[valid].pow(2).mean() - surrogate - 0.1 * entropy, parameters)

    monkeypatch.setattr(script, "policy_loss", lambda *batch: batches.append(batch) or loss(*batch))
    noise, actions = 100 * ~valid, torch.where(valid, actions, 0)
    args = script.Args(update_epochs=1, value_epochs=1, ent_coef=0.1, max_grad_norm=1e9)
    for args.num_minibatches, lr in ((3, 0.0), (1, 0.3)):
        optimizers = [torch.optim.SGD(network.parameters(), lr) for network in (policy, value)]
        metrics = script.update_policy(policy, optimizers[0], inputs, actions, advantages + noise, args)
        metrics |= script.update_value(value, optimizers[1], inputs, returns + noise, args)
    for parameter, gradient in zip(parameters, gradients):
        close(parameter.grad, gradient, 1e-5)
    new, _ = policy(*inputs)
    ratio = (new.log_prob(actions) - dist.log_prob(actions)).exp()[valid]
    close(metrics["clip_fraction"], ((ratio - 1).abs() > 0.2).float().mean().item(), 1e-5)
    close(metrics["entropy"], new.entropy()[valid].mean().item(), 1e-5)
    close(metrics["kl"], torch.distributions.kl_divergence(dist, new)[valid].mean().item(), 1e-5)
    close(metrics["explained_variance"], 1 - (error[valid].var() / returns[valid].var()).item(), 1e-4)
    *new_and_old, used, _ = zip(*batches[:3])
    for logs in new_and_old:
        close(torch.cat(logs).sort()[0], logprobs.sort()[0].detach(), 1e-5)
    columns = [{n for n in range(5) if set(x.tolist()) & set(advantages[:, n].tolist())} for x in used]
    assert sorted(map(len, columns)) == [1, 2, 2] and len(set.union(*columns)) == 5


@pytest.mark.parametrize("kind", SPACES)
def test_a_run_is_one_long_sequence_and_a_resumed_run_begins_another(kind, tmp_path, monkeypatch):
    """The same of networks that stay as they are: step by step, rollout by rollout, and all at once."""
    calls = {name: [] for name in ("forward", "rollout", "compute_gae", "update_policy", "update_value")}
    for name in calls:
        owner = script.Policy if name == "forward" else script

        def spied(*args, name=name, function=getattr(owner, name)):  # noqa: B008
            calls[name].append([*args, function(*args)])
            return calls[name][-1][-1]

        monkeypatch.setattr(owner, name, spied)
    monkeypatch.setattr(script, "mlp", lambda *sizes, out_gain, mlp=script.mlp: mlp(*sizes, 1.0))
    monkeypatch.setattr(script, "update_statistics", lambda *_: None)
    args = script.Args(f"{__name__}:Short-{kind}-v0", num_envs=3, num_steps=7, runs_dir=str(tmp_path))
    args.learning_rate = args.value_learning_rate = 1e-30
    for args.total_timesteps in (80, 160):
        args.resume = str(script.train(args).run_dir)
        obs, actions, _, _, dones, valid, _ = zip(*(call[-1] for call in calls["rollout"]))
        obs, valid = torch.cat([*(x[:-1] for x in obs), obs[-1][-1:]]), torch.cat([*valid, ~dones[-1][-1:]])
        assert len(dones) >= 4 and not valid[6::7].all() and not valid[7::7].all()
        steps = [dist for _, obs, *_, (dist, _) in calls["forward"] if len(obs) == 1]
        policy, value = calls["update_policy"][0][0], calls["update_value"][0][0]
        dist, _ = policy(obs[:-1], valid[:-1], torch.zeros(2, 3, 64))
        values, _ = value(obs, valid, torch.zeros(2, 3, 64))
        logprobs = dist.log_prob(torch.cat(actions)).split(7)
        for step, action, logprob in zip(steps, torch.cat(actions), torch.cat(logprobs)):
            close(step.log_prob(action[None])[0], logprob, 1e-5)
        for k in range(len(dones)):
            close(calls["update_policy"][k][4][valid[7 * k : 7 * k + 7]].mean(), 0.0, 1e-5)
            close(policy(*calls["update_policy"][k][2])[0].log_prob(actions[k]), logprobs[k], 1e-5)
            close(value(*calls["update_value"][k][2])[0], values[7 * k : 7 * k + 7], 1e-5)
            close(calls["compute_gae"][2 * k][1], values[7 * k : 7 * k + 8], 1e-5)
        for made in calls.values():
            made.clear()


@pytest.mark.parametrize("name, shown", [("CartPole", [0, 2]), ("Pendulum", [0, 1])])
def test_environments_without_velocities(name, shown, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    part, whole = gym.make(f"partial:{name}NoVelocity-v1"), gym.make(f"{name}-v1")
    action = whole.action_space.sample()
    results = [[env.reset(seed=1), *(env.step(action) for _ in range(5))] for env in (part, whole)]
    for (obs, *rest), (whole_obs, *expected) in zip(*results):
        assert obs in part.observation_space and [*obs, *rest] == [*whole_obs[shown], *expected]
