"""REINFORCE with importance sampling: further steps on the episodes of an older policy.

    G_t   = r_t + gamma G_{t+1}                                              the reward-to-go
    rho_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)                              pi_old collected the episode
    g     = 1/N sum_i sum_t grad_theta log pi_theta(a_t|s_t) w_t       up to K steps per N whole episodes

    trajectory  w_t = (prod_k rho_k) (G_0 - b)                               unbiased, for any constant b
    causal      w_t = (prod_{k<=t} rho_k) (sum_{l>=t} gamma^{l-t} r_l prod_{t<k<=l} rho_k - b)    at gamma 1
    no-future   w_t = (prod_{k<=t} rho_k) (G_t - b)                          biased: the old policy's future
    per-step    w_t = rho_t (G_t - b)                                        biased: its states, too

A product of t ratios has a variance that grows exponentially with t; without it g is biased, to first order
in the distance between the policies. Only a baseline inside the ratio drops out of E[g] off the old policy.

An episode ends where the environment ends it: a time limit is part of this finite-horizon objective, and
nothing bootstraps past it.

Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation". Levine, CS285, lecture 5.

    python offpolicy_is.py --env-id CartPole-v1

Diff it with reinforce.py to see the importance weights and the re-use of a batch.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard", "tqdm"]
# ///

import json
import time
from collections import deque, namedtuple
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.wrappers import vector as wrappers
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

UnitInterval = Annotated[float, Field(ge=0, le=1)]
TwoOrMore = Annotated[int, Field(ge=2)]


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # gymnasium environment; Discrete or Box actions
    seed: NonNegativeInt = 1  # of the networks, the environments and the action sampling
    total_timesteps: PositiveInt = 300_000  # environment steps to train for; the last iteration is finished
    num_envs: TwoOrMore = 4  # N, environments stepped in parallel, one whole episode each between updates
    max_episode_steps: PositiveInt = 10_000  # an episode that is longer stops the run
    vectorization: Literal["auto", "sync", "async"] = "auto"  # auto: the environment's own, else sync
    gamma: UnitInterval = 0.995  # discount factor
    estimator: Literal["trajectory", "causal", "no-future", "per-step"] = "trajectory"  # w_t, see above
    num_updates: PositiveInt = 4  # K, gradient steps per batch, at most
    min_ess: UnitInterval = 0.9  # effective share of the ratios that ends them
    normalize_weights: bool = True  # b and one scale: the mean and the deviation of the credits in a batch
    learning_rate: PositiveFloat = 3e-3  # policy learning rate
    anneal_lr: bool = True  # let all step sizes fall to 0 at total_timesteps
    max_grad_norm: PositiveFloat = float("inf")  # longer gradients are scaled down to this before Adam's step
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    init_std: PositiveFloat = 0.4  # standard deviation that Gaussian actions begin with
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks are; environments always run on the CPU
    torch_threads: PositiveInt = 1  # more than 1 makes small networks slower
    runs_dir: str = "runs"  # where the run folder is made
    resume: str | None = None  # run folder to continue; its arguments hold where none are given


# ---------------------------------------------------------------------------- the algorithm


def compute_returns(rewards, gamma):
    """G_t = r_t + gamma G_{t+1}, the reward-to-go; (T, N), one episode per column -> (T, N)"""
    G, returns = torch.zeros_like(rewards[0]), []
    for reward in rewards.flip(0):
        G = reward + gamma * G
        returns.append(G)
    return torch.stack(returns).flip(0)


def log_products(log_ratios, estimator):
    """log of the product of ratios that the credit at t is multiplied by; (T, N) -> (T, N)"""
    if estimator == "trajectory":
        return log_ratios.sum(0).expand_as(log_ratios)
    return log_ratios if estimator == "per-step" else log_ratios.cumsum(0)


def importance_weights(log_ratios, rewards, gamma, estimator, baseline=0.0):
    """w_t, what multiplies grad log pi(a_t|s_t) (see above); log rho_t (T, N), 0 where not valid -> (T, N)"""
    products = log_products(log_ratios, estimator).exp()
    if estimator == "causal":
        return compute_returns(products * rewards, gamma) - products * baseline
    returns = compute_returns(rewards, gamma)
    return products * ((returns[:1] if estimator == "trajectory" else returns) - baseline)


def effective_sample_size(log_weights):
    """(sum w)^2 / sum w^2, between 1 and N; log w (N,) -> ()"""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def policy_loss(logprobs, weights, num_episodes):
    """-1/N sum_i sum_t log pi(a_t|s_t) w_t: a negative log-likelihood, weighted; (B,), (B,), int -> ()

    A pseudo-loss: its gradient is minus the policy gradient, its value means nothing.
    """
    return -(logprobs * weights.detach()).sum() / num_episodes


def gradient_step(optimizer, loss, max_grad_norm):
    """One step down the gradient of the loss, scaled down to max_grad_norm; returns the norm it had."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    return norm


def update_policy(policy, optimizer, obs, actions, rewards, valid, args):
    """Up to K steps of gradient ascent on a batch of whole episodes; returns what to log."""
    with torch.no_grad():
        old_logprobs = policy(obs).log_prob(actions)
    baseline, scale = 0.0, 1.0
    if args.normalize_weights:
        rewards = rewards.double()  # float32 would scale up the rounding of the mean
        credits = importance_weights(torch.zeros_like(rewards), rewards, args.gamma, args.estimator)[valid]
        baseline, scale = credits.mean(), credits.std(correction=0) + 1e-8
    updates = 0
    while updates < args.num_updates:
        dist = policy(obs)
        logprobs = dist.log_prob(actions)
        log_ratios = ((logprobs - old_logprobs) * valid).detach()
        log_weights = log_products(log_ratios, args.estimator)[valid]
        ess = effective_sample_size(log_weights) / len(log_weights)
        if updates and ess < args.min_ess:
            break
        weights = importance_weights(log_ratios, rewards, args.gamma, args.estimator, baseline) / scale
        loss = policy_loss(logprobs[valid], weights[valid].float(), args.num_envs)
        entropy = dist.entropy()[valid].mean()
        norm = gradient_step(optimizer, loss - args.ent_coef * entropy, args.max_grad_norm)
        updates += 1
    metrics = {"policy_loss": loss.detach(), "policy_grad_norm": norm, "entropy": entropy.detach()}
    return metrics | {"updates": updates, "effective_share": ess, "max_ratio": log_weights.max().exp()}


# ---------------------------------------------------------------------------- training

TrainResult = namedtuple("TrainResult", "policy returns run_dir")


def train(args):
    """Train; returns the policy, the raw returns of the last 100 episodes in order, and the run folder.

    Raises ValueError at spaces that are not supported, FloatingPointError at what is not finite.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    envs = make_envs(args)
    policy = Policy(envs.single_observation_space, envs.single_action_space, args.init_std).to(args.device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    modules = dict(policy=policy, policy_optimizer=policy_optimizer)

    with Run(args, envs, **modules) as run:
        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            obs, _ = reset(envs, args, run.iteration)
            obs, actions, rewards, valid = rollout_episodes(envs, policy, obs, args.max_episode_steps)

            metrics = update_policy(policy, policy_optimizer, obs, actions, rewards, valid, args)
            update_statistics(policy.net, obs[valid])
            run.log(int(valid.sum()), rewards.sum(0), metrics)
    return TrainResult(policy, list(run.returns), run.dir)


# ---------------------------------------------------------------------------- networks


class RunningNorm(nn.Module):
    """(x - mean) / std over all that it was updated with, clipped to [-10, 10]; saved with the weights."""

    MIN_STD = 1e-4

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):  # (..., dim) -> (..., dim)
        return ((x - self.mean) / self.std).clamp(-10, 10)

    def update(self, x):
        """Merge the mean and variance of a batch (B, dim) into the running ones (Chan et al. 1979)."""
        self.count += len(x)
        share, delta = len(x) / self.count, x.mean(0) - self.mean
        self.mean += share * delta
        var = (self.std**2).lerp(x.var(0, correction=0) + (1 - share) * delta**2, share)
        self.std.copy_(var.sqrt().clamp_min(self.MIN_STD))


def mlp(in_dim, out_dim, out_gain):
    """Normalized inputs, two tanh layers of 64 units, orthogonal weights, zero biases."""
    layers = [nn.Linear(in_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out_dim)]
    for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, out_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(RunningNorm(in_dim), *layers)


@torch.no_grad()
def update_statistics(net, obs):
    """Merge obs (B, O) into the statistics of the inputs, and change the first layer so that net(obs) stays.

    Otherwise a new normalization, after the update, would be a new policy: a step out of the trust region.
    """
    norm, linear = net[0], net[1]
    first, old_mean, old_std = norm.count == 0, norm.mean.clone(), norm.std.clone()
    norm.update(obs)
    if not first:
        # an input that was constant so far had no weight in the function: its weight stays
        linear.weight *= torch.where(old_std > norm.MIN_STD, norm.std / old_std, 1)
        linear.bias += linear.weight @ ((norm.mean - old_mean) / norm.std)


class Policy(nn.Module):
    """pi(a|s): categorical for Discrete actions, diagonal Gaussian for Box actions."""

    def __init__(self, obs_space, action_space, init_std=1.0):
        super().__init__()
        action_dim = gym.spaces.flatdim(action_space)
        self.net = mlp(gym.spaces.flatdim(obs_space), action_dim, out_gain=0.01)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((action_dim,), init_std).log())

    def forward(self, obs):  # (..., O) -> distribution with batch shape (...)
        if self.discrete:
            return Categorical(logits=self.net(obs), validate_args=False)  # checks cost time at every step
        normal = Normal(self.net(obs), self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)


# ---------------------------------------------------------------------------- data


def make_envs(args):
    """N environments side by side, wrapped so that they give vectors and take every action of a Policy."""
    mode = None if args.vectorization == "auto" else args.vectorization
    envs = gym.make_vec(args.env_id, args.num_envs, vectorization_mode=mode)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete)
    if not discrete and not (isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"):
        raise ValueError(f"{args.env_id} takes {action_space}: actions must be Discrete or a Box of floats")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"{args.env_id} must reset on the step after an end (next-step autoreset)")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = wrappers.FlattenObservation(envs)
        if gym.spaces.flatdim(obs_space) > 5_000:
            gym.logger.warn(f"{args.env_id}: images go flat into an MLP; docs/recipes.md has a CNN")
    if not discrete:
        return wrappers.ClipAction(envs)
    start = action_space.start
    return wrappers.TransformAction(envs, lambda action: action + start) if start else envs


def reset(envs, args, iteration):
    """Seed all that is random by (seed, iteration) and start N episodes; returns obs (N, O), done (N,)."""
    seed = int(np.random.SeedSequence([args.seed, iteration]).generate_state(1)[0])
    torch.manual_seed(seed)
    obs = torch.tensor(envs.reset(seed=seed)[0], dtype=torch.float32, device=args.device)
    return obs, torch.zeros(len(obs), dtype=torch.bool, device=args.device)


def rollout_episodes(envs, policy, obs, max_episode_steps):
    """Run one whole episode in each of N environments, from obs (N, O); T is the length of the longest.

    Episodes are never cut at a number of steps, which would favour the short ones.

    Returns obs (T, N, O), actions (T, N) or (T, N, A), rewards (T, N), zero after the end of an episode, and
    valid (T, N), true until then. Raises ValueError at an episode that is too long, FloatingPointError at an
    observation that is not finite.
    """
    steps, running = [], np.ones(len(obs), bool)
    while running.any():
        if len(steps) == max_episode_steps:
            raise ValueError(f"an episode did not end within --max-episode-steps {max_episode_steps}")
        with torch.inference_mode():  # cheaper than no_grad
            action = policy(obs).sample()
        env_action = action.cpu().numpy().reshape(envs.action_space.shape)
        next_obs, reward, terminated, truncated, _ = envs.step(env_action)
        outcome = np.where(running, reward, 0), running
        steps.append((obs, action, *(torch.as_tensor(x, device=obs.device) for x in outcome)))
        next_obs = next_obs.astype(np.float32)  # a copy: an environment may use its array again
        if not np.isfinite(next_obs).all():
            raise FloatingPointError(f"not finite: an observation, {next_obs}")
        obs = torch.as_tensor(next_obs, device=obs.device)
        running = running & ~(terminated | truncated)
    obs, actions, rewards, valid = map(torch.stack, zip(*steps))
    return obs, actions, rewards.float(), valid


# ---------------------------------------------------------------------------- running

SCRIPT = Path(__file__).stem
COUNTERS = ("step", "iteration", "episodes", "seconds", "progress_size")


class Run:
    """A run folder: args.json, progress.csv, TensorBoard events, and checkpoint.pt, at most 5 s old.

    A run may be stopped at any time, by Ctrl-C or by SIGKILL: --resume goes on from its last checkpoint.
    modules: everything with a state_dict that this takes, by name.
    """

    def __init__(self, args, envs, **modules):
        self.args, self.envs, self.modules, self.returns = args, envs, modules, deque(maxlen=100)
        self.step, self.iteration, self.episodes, self.seconds, self.progress_size = 0, 0, 0, 0.0, 0
        name = f"{SCRIPT}__{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = Path(args.resume or Path(args.runs_dir, name.replace("/", "-").replace(":", "-")))
        if args.resume:
            self.load()
        self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
        self.saved_args = {"script": SCRIPT, **asdict(args)}
        Path(self.dir, "args.json").write_text(json.dumps(self.saved_args, indent=2))
        self.progress = open(Path(self.dir, "progress.csv"), "a", newline="")
        self.progress.seek(self.progress.truncate(self.progress_size))  # what came after is done again
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", mininterval=1)
        self.start = time.time() - self.seconds
        self.save()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        print(f"{self.step} steps in {self.seconds:.1f} s; to go on: --resume {self.dir}")
        self.progress.close()
        if not error:  # a Ctrl-C inside the writer leaves it locked: it would wait for ever
            self.writer.close()
        # processes of environments get a Ctrl-C, too: they may no longer answer
        self.envs.close(**{"terminate": True} if self.args.vectorization == "async" else {})

    def log(self, steps, returns, metrics):
        """End an iteration of so many steps, in which episodes of these raw returns ended.

        Raises FloatingPointError if a metric is not finite; the last checkpoint is from before.
        """
        self.step += steps
        self.iteration += 1
        self.episodes += len(returns)
        self.returns.extend(map(float, returns))
        self.seconds = time.time() - self.start
        metrics = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(list(metrics.values())).all():
            raise FloatingPointError(f"not finite at step {self.step}: {metrics}")
        episodic_return = float(np.mean(self.returns)) if self.returns else np.nan
        row = {"step": self.step, "episodes": self.episodes, "episodic_return": episodic_return}
        row |= metrics | {"seconds": self.seconds}
        if self.iteration == 1:
            print(*row, sep=",", file=self.progress)
        print(*row.values(), sep=",", file=self.progress, flush=True)
        for name, value in row.items():
            self.writer.add_scalar(name, value, self.step)
        self.bar.set_postfix(episodic_return=episodic_return, refresh=False)
        self.bar.update(steps)
        if time.time() - self.saved_at > 5 or self.step >= self.args.total_timesteps:
            self.save()

    def save(self):
        """Replace checkpoint.pt as a whole; loading it with weights_only=True runs no code."""
        self.saved_at, self.progress_size = time.time(), self.progress.tell()
        state = {name: getattr(self, name) for name in COUNTERS}
        state |= {"args": self.saved_args, "returns": list(self.returns)}
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        torch.save(state, Path(self.dir, "checkpoint.tmp"))
        Path(self.dir, "checkpoint.tmp").replace(Path(self.dir, "checkpoint.pt"))

    def load(self):
        """Take up the state of checkpoint.pt; raises ValueError if it has lost the rows that led to it."""
        state = torch.load(Path(self.dir, "checkpoint.pt"), map_location=self.args.device, weights_only=True)
        for name in COUNTERS:
            setattr(self, name, state[name])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.returns.extend(state["returns"])
        if Path(self.dir, "progress.csv").stat().st_size < self.progress_size:
            raise ValueError(f"{self.dir}/progress.csv is shorter than its checkpoint says: restore it")


def load_args(run_dir):
    """The arguments of the run in a folder; raises ValueError if it is not one of this script."""
    path = Path(run_dir, "checkpoint.pt")
    saved = torch.load(path, "cpu", weights_only=True)["args"] if path.exists() else {}
    if saved.pop("script", None) != SCRIPT:
        raise ValueError(f"--resume {run_dir} is not a run folder of {SCRIPT}.py")
    return Args(**saved | {"resume": str(run_dir)})


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=load_args(args.resume)) if args.resume else args)
