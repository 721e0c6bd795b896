"""How noisy is each policy gradient estimator? Sampled on CartPole, and exact on an MDP that is enumerated.

    python benchmarks/gradient_variance.py
    python benchmarks/gradient_variance.py --plot-only

For gradients g from 16 episodes each:

    relative_variance  trace of the covariance of g, in units of that of "total" or, off-policy, "trajectory"
    signal_to_noise    ||grad J||^2 / trace of the covariance
    squared_bias       ||E g - grad J||^2 / ||grad J||^2; where that is 0, the estimate can be negative
    relative_error     sqrt(E ||g - grad J||^2) / ||grad J||
    effective_share    (sum w)^2 / sum w^2 of the trajectory weights w, as a share of all episodes; where
                       it is tiny, no sample shows how large the error of a product of ratios is

cartpole: a policy half way through training; a baseline comes from the batch, grad J from fresh episodes.
tabular: 2 states, 7 steps; a baseline is its expectation, so that "mean" and "leave-one-out" are the same.
drift: mean KL divergence per state from the policy of the episodes to that of J, moved along its gradient.
gamma is 1: with less, "total", "optimal" and "trajectory" estimate the gradient of another J.
"""

import copy
import csv
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from tabular import TabularPolicy, random_mdp

import reinforce_baseline as rb
from offpolicy_is import importance_weights
from reinforce import total_returns

BATCH = 16
BASELINES = ("mean", "leave-one-out", "time", "value")
ON_POLICY = ("total", "reward-to-go", *BASELINES, "optimal")
OFF_POLICY = ("trajectory", "causal", "no-future", "per-step")
BIASED = ("no-future", "per-step")
COLUMNS = ("setting", "estimator", "drift", "quantity", "value", "standard_error")


@dataclass
class Args:
    seed: NonNegativeInt = 1  # of the training, the environments and the action sampling
    training_steps: PositiveInt = 25_000  # of reinforce_baseline.py on CartPole: half way to a return of 500
    episodes: PositiveInt = 4096  # of the policy and of every moved one on CartPole; a multiple of 16
    drifts: tuple[PositiveFloat, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # KL divergences per state
    out: Path = Path(__file__).parent  # folder with results/ and figures/
    plot_only: bool = False  # draw the figure from the stored numbers


@torch.no_grad()
def move(policy, direction, obs, p, drift):
    """The policy, moved along the direction until the KL divergence from it is the drift, with p over obs."""
    moved, step = copy.deepcopy(policy), 0.01 / direction.norm()
    for _ in range(20 if drift else 0):
        vector_to_parameters(parameters_to_vector(policy.parameters()) + step * direction, moved.parameters())
        step *= (drift / (p @ kl_divergence(policy(obs), moved(obs)))) ** 0.5  # it is almost quadratic
    return moved


def quantities(p, g, fresh, unit, size=float("inf"), scale=1.0):
    """p (..., B): probabilities of the rows (B, P) of g, of unit, and of fresh, whose mean is grad J

    size: number of batches that the rows are samples of; scale: what makes variances those of 16 episodes
    """
    mean, target, _ = means = [p @ x for x in (g, fresh, unit)]
    moments = [p @ x.pow(2).sum(1) for x in (g, fresh, unit)]
    variance, rest, unit = (scale * (x - mean.pow(2).sum(-1)) for x, mean in zip(moments, means))
    signal = target.pow(2).sum(-1) - rest / size
    squared_bias = (mean - target).pow(2).sum(-1) - (variance + rest) / size
    error = ((squared_bias + variance).clamp(min=0) / signal).sqrt()
    values = {"relative_variance": variance / unit, "signal_to_noise": signal / variance}
    return values | {"squared_bias": squared_bias / signal, "relative_error": error}


def effective_share(p, log_weights):
    return {"effective_share": (p @ log_weights.exp()) ** 2 / (p @ (2 * log_weights).exp())}


# ---------------------------------------------------------------------------- CartPole


def with_errors(statistic, *samples, **options):
    """{quantity: (value, standard error)} of statistic(p, ...), p (201, B): uniform, and 200 resamples."""
    size = len(samples[0])
    counts = np.random.default_rng(0).multinomial(size, np.ones(size) / size, 200)
    p = torch.tensor(np.vstack([np.ones(size), counts]) / size, dtype=torch.float32)
    return {name: (x[0], x[1:].std()) for name, x in statistic(p, *samples, **options).items()}


def batch_gradients(policy, episodes, weights_of):
    """{estimator: (B, P)}; weights_of(logprobs, *batch) -> {estimator: weights (T, 16) or gradient (P,)}"""
    gradients, params = {}, list(policy.parameters())
    for obs, actions, rewards, valid in zip(*(x.split(BATCH, dim=1) for x in episodes)):
        logprobs = policy(obs[valid]).log_prob(actions[valid])
        for name, x in weights_of(logprobs.detach(), obs, actions, rewards, valid).items():
            if x.ndim == 2:
                loss = -rb.policy_loss(logprobs, x[valid], BATCH)
                x = parameters_to_vector(torch.autograd.grad(loss, params, retain_graph=True))
            gradients.setdefault(name, []).append(x)
    return {name: torch.stack(x) for name, x in gradients.items()}


def cartpole(args):
    """Yields estimator, drift, and {quantity: (value, standard error)}."""
    with tempfile.TemporaryDirectory() as runs_dir:
        sizes = dict(total_timesteps=args.training_steps, num_envs=32, learning_rate=1e-2, value_epochs=4)
        run_args = rb.Args(seed=args.seed, gamma=1.0, runs_dir=runs_dir, **sizes)
        policy, _, run_dir = rb.train(run_args)
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    run_args = rb.Args(seed=args.seed, num_envs=args.episodes)
    envs = rb.make_envs(run_args)
    timed_space = gym.spaces.Tuple([envs.single_observation_space, gym.spaces.Box(1, np.inf)])
    value, return_norm = rb.Value(timed_space).requires_grad_(False), rb.RunningNorm(1)
    value.load_state_dict(checkpoint["value"])
    return_norm.load_state_dict(checkpoint["return_norm"])

    def value_baseline(obs):  # as in reinforce_baseline.py: train
        timed_obs = torch.cat([obs, torch.ones_like(obs[..., :1]).cumsum(0)], -1)
        return value(timed_obs) * return_norm.std + return_norm.mean

    def collect(policy, iteration):
        obs, _ = rb.reset(envs, run_args, iteration)
        return rb.rollout_episodes(envs, policy, obs, run_args.max_episode_steps)

    def fresh_weights(logprobs, obs, actions, rewards, valid):
        return {"value": rb.compute_returns(rewards, 1.0) - value_baseline(obs)}

    def on_policy_weights(logprobs, obs, actions, rewards, valid):
        returns = rb.compute_returns(rewards, 1.0)
        weights = {"total": total_returns(rewards, 1.0), "reward-to-go": returns}
        values = value_baseline(obs)
        weights |= {b: returns - rb.compute_baseline(b, returns, valid, values) for b in BASELINES}
        scores, R = rb.episode_scores(policy, obs, actions, valid), returns[0]
        return weights | {"optimal": (scores * (R[:, None] - rb.optimal_baseline(scores, R))).mean(0)}

    def off_policy_weights(logprobs, obs, actions, rewards, valid):
        log_ratios = torch.zeros_like(rewards)
        log_ratios[valid] = logprobs - policy(obs[valid]).log_prob(actions[valid]).detach()
        log_weights.append(log_ratios.sum(0))
        return {name: importance_weights(log_ratios, rewards, 1.0, name) for name in OFF_POLICY}

    torch.manual_seed(args.seed)
    episodes = obs, _, rewards, valid = collect(policy, 0)
    yield "", 0, with_errors(lambda p, returns: {"return": p @ returns}, rewards.sum(0))
    some_obs = obs[:, :256][valid[:, :256]]
    p, direction = torch.full((len(some_obs),), 1 / len(some_obs)), torch.zeros(())
    for i, drift in enumerate((0, *args.drifts)):
        moved, log_weights = move(policy, direction, some_obs, p, drift), []
        fresh = batch_gradients(moved, collect(moved, i + 1), fresh_weights)["value"]
        gradients = batch_gradients(moved, episodes, off_policy_weights if drift else on_policy_weights)
        for name, g in gradients.items():
            samples, B = (g, fresh, gradients["trajectory" if drift else "total"]), len(g)
            yield name, drift, with_errors(quantities, *samples, size=B, scale=B / (B - 1))
        if drift:
            yield "", drift, with_errors(effective_share, torch.cat(log_weights))
        else:
            direction = gradients["value"].mean(0)


# ---------------------------------------------------------------------------- tabular


def tabular(args):
    """Yields estimator, drift, and {quantity: (value, 0)}."""
    mdp, policy = random_mdp(num_states=2, horizon=7, seed=1), TabularPolicy(2)
    rewards, p = mdp.trajectories.rewards, mdp.trajectory_probabilities(policy).detach()
    returns, scores = rb.compute_returns(rewards, 1.0), mdp.scores(policy)
    R, V = returns[0], mdp.along(mdp.exact_values(policy, 1.0)[0])[:-1]
    b = {"mean": R @ p, "leave-one-out": R @ p, "time": (returns @ p)[:, None], "value": V}
    weights = {"reward-to-go": returns} | {name: returns - b[name] for name in BASELINES}
    estimates = {"total": scores * R[:, None]} | {x: mdp.estimates(policy, w) for x, w in weights.items()}
    optimal = rb.optimal_baseline(scores * p.sqrt()[:, None], R)  # p makes its means expectations
    estimates["optimal"] = scores * (R[:, None] - optimal)
    occupancy, direction = mdp.state_distribution(policy).mean(0), mdp.exact_gradient(policy, 1.0)
    for drift in (0, *args.drifts):
        moved = move(policy, direction, mdp.observe, occupancy, drift)
        if drift:
            log_ratios = mdp.log_ratios(moved, policy).detach()
            weights = {name: importance_weights(log_ratios, rewards, 1.0, name) for name in OFF_POLICY}
            estimates = {name: mdp.estimates(moved, w) for name, w in weights.items()}
            share = effective_share(p, log_ratios.sum(0))
            yield "", drift, {name: (x, 0) for name, x in share.items()}
        exact, unit = mdp.exact_gradient(moved, 1.0), estimates["trajectory" if drift else "total"]
        for name, g in estimates.items():
            values = quantities(p, g, exact.expand_as(g), unit, scale=1 / BATCH)
            yield name, drift, {quantity: (x, 0) for quantity, x in values.items()}


# ---------------------------------------------------------------------------- figure

COLORS = {"trajectory": "#D55E00", "causal": "#AA4499", "no-future": "#117733", "per-step": "#0072B2"}
STYLE = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E5E5E5", "svg.hashsalt": "0"}
LABELS = """$R$, the total return\n$G_t$, the reward-to-go\n$G_t$ − mean $R$ of the batch
$G_t$ − mean $R$ of the others\n$G_t$ − mean $G_t$ of the batch\n$G_t$ − $V(s_t, t)$\n$R$ − best constants"""


def plot(rows, path):
    """Left the on-policy variances, right the errors of importance-sampled gradients, dashed their biases."""
    import matplotlib.pyplot as plt

    def points(*key):
        """drift, value and standard error of (setting, estimator, quantity)"""
        chosen = [row for row in rows if (row["setting"], row["estimator"], row["quantity"]) == key]
        return np.array([[float(row[x]) for x in ("drift", "value", "standard_error")] for row in chosen]).T

    plt.rcParams |= STYLE
    figure, (left, *others) = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for setting, marker in {"cartpole": "o", "tabular": "D"}.items():
        _, x, error = np.hstack([points(setting, name, "relative_variance") for name in ON_POLICY])
        left.errorbar(x, range(len(x)), xerr=2 * error, fmt=marker, color="#666666", label=setting)
    left.set(xscale="log", yticks=range(len(ON_POLICY)), yticklabels=LABELS.splitlines())
    left.set(xlabel="variance of the gradient, relative to $R$,\n±2 standard errors", title="On-policy")
    left.invert_yaxis()
    left.legend()
    for ax, setting in zip(others, ("cartpole", "tabular")):
        drift, share, _ = points(setting, "", "effective_share")
        for name, color in COLORS.items():
            known = (share > 0.005) | (name == "per-step")  # below, a product looks better than it is
            _, error, deviation = points(setting, name, "relative_error")[:, known]
            ax.errorbar(drift[known], error, 2 * deviation, fmt="o-", color=color, ms=5, label=name)
            _, squared_bias, deviation = points(setting, name, "squared_bias")
            seen = known & (squared_bias > np.maximum(2 * deviation, 1e-12)) & (name in BIASED)
            ax.plot(drift[seen], squared_bias[seen] ** 0.5, "o--", color=color, mfc="white", ms=5)
        ax.set(xscale="log", yscale="log", title=f"Off-policy, {setting}")
        ax.set_xticks(drift[::2], [f"{x:g}\n{100 * y:.3g}%" for x, y in zip(drift[::2], share[::2])])
        ax.minorticks_off()
        ax.set_ylabel("error, relative to the gradient")
        ax.set_xlabel("mean KL divergence per state, nats,\nand share of the episodes that is effective")
        ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(args):
    table = args.out / "results" / "gradient_variance.csv"
    if not args.plot_only:
        torch.set_num_threads(1)
        table.parent.mkdir(parents=True, exist_ok=True)
        made = ["# python benchmarks/gradient_variance.py", *sys.argv[1:], f"({date.today()}, Python"]
        made += [f"{platform.python_version()}, torch {torch.__version__}, gymnasium {gym.__version__})"]
        with open(table, "w", newline="") as file:
            print(*made, file=file)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for setting in (cartpole, tabular):
                for estimator, drift, values in setting(args):
                    print(setting.__name__, estimator, f"drift {drift:g}", flush=True)
                    for name, (x, error) in values.items():
                        numbers = f"{drift:g}", name, f"{round(float(x), 12):.6g}", f"{error:.2g}"
                        writer.writerow([setting.__name__, estimator, *numbers])
    with open(table) as file:
        next(file)
        plot(list(csv.DictReader(file)), args.out / "figures" / "gradient_variance.svg")


if __name__ == "__main__":
    main(tyro.cli(Args))
