"""Proximal policy optimization (PPO) with a KL penalty, with generalized advantage estimation (GAE).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                           V(s_{t+1}) = 0 if s_{t+1} is terminal
    A_t     = delta_t + gamma lambda A_{t+1}                            stops at the end of an episode
    rho_t   = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    L       = E_t[ rho_t A_t - beta KL(pi_old(.|s_t) || pi_theta(.|s_t)) ]  K epochs of minibatches

The KL of the paper weights by pi_old, which collected the data: like the surrogate it knows only the actions
that pi_old takes. KL(pi_theta || pi_old), which some notes print, agrees with it to second order.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347.
Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", arXiv:1506.02438.

    python variants/ppo_kl_penalty.py --env-id CartPole-v1

Diff it with ppo.py to see the penalty and its coefficient.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard", "tqdm"]
# ///

import copy
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
from torch.distributions.kl import kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

UnitInterval = Annotated[float, Field(ge=0, le=1)]
TwoOrMore = Annotated[int, Field(ge=2)]


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # gymnasium environment; Discrete or Box actions
    seed: NonNegativeInt = 1  # of the networks, the environments and the action sampling
    total_timesteps: PositiveInt = 200_000  # environment steps to train for; the last iteration is finished
    num_envs: PositiveInt = 16  # N, environments stepped in parallel
    num_steps: TwoOrMore = 64  # T, steps per environment between updates
    vectorization: Literal["auto", "sync", "async"] = "auto"  # auto: the environment's own, else sync
    gamma: UnitInterval = 0.995  # discount factor
    gae_lambda: UnitInterval = 0.95  # of the advantages: 0 is the TD error, 1 the Monte Carlo return minus V
    value_lambda: UnitInterval = 0.95  # of V's targets: 0 is r + gamma V(s'), 1 the Monte Carlo return
    target_kl: PositiveFloat = 0.01  # KL(pi_old || pi) of an update that the adaptive and the dual rule want
    kl_coef: NonNegativeFloat = 1.0  # beta, weight of the KL penalty, in the first update
    kl_rule: Literal["fixed", "adaptive", "dual"] = "adaptive"  # beta stays, doubles and halves, or climbs
    kl_learning_rate: PositiveFloat = 10.0  # step size of the dual rule
    update_epochs: PositiveInt = 5  # K, passes of the policy over each rollout
    value_epochs: PositiveInt = 5  # passes of the value function over each rollout
    num_minibatches: PositiveInt = 4  # minibatches per pass
    learning_rate: PositiveFloat = 1e-3  # policy learning rate
    value_learning_rate: PositiveFloat = 1e-3  # value function learning rate
    anneal_lr: bool = True  # let all step sizes fall to 0 at total_timesteps
    max_grad_norm: PositiveFloat = 0.5  # longer gradients are scaled down to this before Adam's step
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    init_std: PositiveFloat = 0.6  # standard deviation that Gaussian actions begin with
    normalize_advantages: bool = True  # zero mean and unit standard deviation over each rollout
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks are; environments always run on the CPU
    torch_threads: PositiveInt = 1  # more than 1 makes small networks slower
    runs_dir: str = "runs"  # where the run folder is made
    resume: str | None = None  # run folder to continue; its arguments hold where none are given


# ---------------------------------------------------------------------------- the algorithm


def compute_gae(rewards, values, terminations, dones, gamma, gae_lambda):
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t)  (GAE, equation 16).

    A termination makes V(s_{t+1}) zero; a truncation keeps it; both stop the sum.

    rewards, terminations, dones (T, N); values (T+1, N)  ->  advantages (T, N)
    """
    deltas = rewards + gamma * values[1:] * ~terminations - values[:-1]
    discounts = gamma * gae_lambda * (~dones).to(rewards)
    advantage, advantages = torch.zeros_like(rewards[0]), []
    for delta, discount in zip(deltas.flip(0), discounts.flip(0)):
        advantage = delta + discount * advantage
        advantages.append(advantage)
    return torch.stack(advantages).flip(0)


def normalize(x):
    """Zero mean and unit standard deviation over the batch; a constant becomes 0."""
    centered = x.double() - x.double().mean()  # float32 would scale up the rounding of the mean
    return (centered / (centered.std(correction=0) + 1e-8)).to(x)


def kl_penalty_loss(logprobs, old_logprobs, advantages, kl, kl_coef):
    """-E_t[ rho_t A_t ] + beta KL(pi_old || pi)  (PPO, equation 8); (B,), (B,), (B,), (), float -> ()"""
    ratio = (logprobs - old_logprobs).clamp(max=20).exp()  # an overflow would be stronger than any penalty
    return kl_coef * kl - (ratio * advantages).mean()


def update_kl_coef(kl_coef, kl, target_kl, rule, learning_rate):
    """The next beta, after an update that made this KL; all floats.

    adaptive: half or twice beta where the KL is far from its target (PPO, section 4)
    dual: max(0, beta + learning_rate (KL - target)), gradient ascent on the Lagrangian's multiplier
    """
    if rule == "adaptive":
        factor = 0.5 if kl < target_kl / 1.5 else 2.0 if kl > target_kl * 1.5 else 1.0
        return min(max(factor * kl_coef, 1e-9), 1e9)  # a policy that cannot move would drive it to 0
    return max(0.0, kl_coef + learning_rate * (kl - target_kl)) if rule == "dual" else kl_coef


def gradient_step(optimizer, loss, max_grad_norm):
    """One step down the gradient of the loss, scaled down to max_grad_norm; returns the norm it had."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    return norm


def update_policy(policy, optimizer, obs, actions, advantages, args):
    """K epochs of minibatch ascent on the penalized surrogate; returns what to log."""
    old_policy = copy.deepcopy(policy).requires_grad_(False)
    kl_coef = optimizer.param_groups[0]["kl_coef"]  # which checkpoints of the optimizer keep
    with torch.no_grad():
        old_dist = policy(obs)
        old_logprobs = old_dist.log_prob(actions)
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            dist = policy(obs[mb])
            kl = kl_divergence(old_policy(obs[mb]), dist).mean()
            loss = kl_penalty_loss(dist.log_prob(actions[mb]), old_logprobs[mb], advantages[mb], kl, kl_coef)
            if args.ent_coef:
                loss = loss - args.ent_coef * dist.entropy().mean()
            gradient_step(optimizer, loss, args.max_grad_norm)
    with torch.no_grad():
        dist = policy(obs)
        kl = kl_divergence(old_dist, dist).mean()
    rule = args.target_kl, args.kl_rule, args.kl_learning_rate
    optimizer.param_groups[0]["kl_coef"] = update_kl_coef(kl_coef, kl.item(), *rule)
    metrics = {"policy_loss": loss.detach(), "entropy": dist.entropy().mean()}
    return metrics | {"kl": kl, "kl_coef": kl_coef}


def update_value(value, optimizer, obs, returns, args):
    """Regress V(s_t) on the returns; returns what to log."""
    with torch.no_grad():
        error = returns - value(obs)
    explained_variance = 1 - error.var(correction=0) / (returns.var(correction=0) + 1e-8)
    for _ in range(args.value_epochs):
        for mb in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            loss = (value(obs[mb]) - returns[mb]).pow(2).mean()
            norm = gradient_step(optimizer, loss, args.max_grad_norm)
    return {"value_loss": loss.detach(), "value_grad_norm": norm, "explained_variance": explained_variance}


# ---------------------------------------------------------------------------- training

TrainResult = namedtuple("TrainResult", "policy returns run_dir")


def train(args):
    """Train; returns the policy, the raw returns of the last 100 episodes in order, and the run folder.

    Raises ValueError at spaces that are not supported, FloatingPointError at what is not finite.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    envs = wrappers.RecordEpisodeStatistics(make_envs(args), buffer_length=args.num_envs * args.num_steps)
    policy = Policy(envs.single_observation_space, envs.single_action_space, args.init_std).to(args.device)
    value = Value(envs.single_observation_space).to(args.device)
    reward_scale = RewardScale(args.num_envs, args.gamma).to(args.device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    policy_optimizer.param_groups[0]["kl_coef"] = args.kl_coef
    value_optimizer = torch.optim.Adam(value.parameters(), eps=1e-5, fused=True)
    modules = dict(policy=policy, value=value, reward_scale=reward_scale)
    modules |= dict(policy_optimizer=policy_optimizer, value_optimizer=value_optimizer)

    with Run(args, envs, **modules) as run:
        next_obs, next_done = reset(envs, args, run.iteration)
        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            value_optimizer.param_groups[0]["lr"] = args.value_learning_rate * remaining

            batch = rollout(envs, policy, next_obs, next_done, args.num_steps)
            obs, actions, rewards, terminations, dones, valid = batch
            next_obs, next_done = obs[-1], dones[-1]
            rewards = reward_scale(rewards, valid)
            with torch.no_grad():
                values = value(obs)
            advantages = compute_gae(rewards, values, terminations, dones, args.gamma, args.gae_lambda)
            returns = compute_gae(rewards, values, terminations, dones, args.gamma, args.value_lambda)
            returns += values[:-1]

            # (T, N, ...) -> (B, ...), dropping the reset steps
            b_obs, b_actions, b_returns = obs[:-1][valid], actions[valid], returns[valid]
            b_advantages = normalize(advantages[valid]) if args.normalize_advantages else advantages[valid]
            metrics = update_policy(policy, policy_optimizer, b_obs, b_actions, b_advantages, args)
            metrics |= update_value(value, value_optimizer, b_obs, b_returns, args)
            update_statistics(policy.net, b_obs)
            update_statistics(value.net, b_obs)
            run.log(len(b_obs), envs.return_queue, metrics)
            envs.return_queue.clear()
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


class Value(nn.Module):
    """V(s)."""

    def __init__(self, obs_space):
        super().__init__()
        self.net = mlp(gym.spaces.flatdim(obs_space), 1, out_gain=1.0)

    def forward(self, obs):  # (..., O) -> (...)
        return self.net(obs).squeeze(-1)


class RewardScale(nn.Module):
    """Rewards over the running deviation of the discounted return, which starts again with each episode."""

    def __init__(self, num_envs, gamma):
        super().__init__()
        self.gamma, self.norm = gamma, RunningNorm(1)
        self.register_buffer("discounted", torch.zeros(num_envs), persistent=False)

    def forward(self, rewards, valid):  # (T, N), (T, N) -> (T, N)
        discounted = []
        for reward, same_episode in zip(rewards, valid):  # a step that is not valid begins an episode
            self.discounted = reward + self.gamma * self.discounted * same_episode
            discounted.append(self.discounted)
        self.norm.update(torch.stack(discounted)[valid][:, None])
        return rewards / self.norm.std


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


def rollout(envs, policy, obs, done, num_steps):
    """Step N environments T times with actions sampled from pi; done (N,): obs (N, O) ended an episode.

    An environment resets on the step *after* its episode ends (gymnasium's next-step autoreset), so
    obs[t + 1] is always the true successor of obs[t], and the reset step itself is not valid data.

    Returns obs (T+1, N, O), actions (T, N) or (T, N, A), and rewards, terminations, dones, valid (T, N).
    Raises FloatingPointError at an observation that is not finite.
    """
    steps = []
    for _ in range(num_steps):
        with torch.inference_mode():  # cheaper than no_grad
            action = policy(obs).sample()
        next_obs, *outcome, _ = envs.step(action.cpu().numpy().reshape(envs.action_space.shape))
        steps.append((obs, action, *(torch.tensor(x, device=obs.device) for x in outcome)))
        next_obs = next_obs.astype(np.float32)  # a copy: an environment may use its array again
        if not np.isfinite(next_obs).all():
            raise FloatingPointError(f"not finite: an observation, {next_obs}")
        obs = torch.as_tensor(next_obs, device=obs.device)
    all_obs, actions, rewards, terminations, truncations = map(torch.stack, zip(*steps))
    dones = terminations | truncations
    valid = ~torch.cat([done[None], dones[:-1]])
    return torch.cat([all_obs, obs[None]]), actions, rewards.float(), terminations, dones, valid


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
