"""Asynchronous advantage actor-critic (A3C), with n-step returns.

    R_t = r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k})                k <= n, up to the end of the episode
    A_t = R_t - V(s_t)                                                  V(s_{t+k}) = 0 if s_{t+k} is terminal
    g   = E_t[ grad_theta log pi_theta(a_t|s_t) A_t ]                   one step per rollout of each worker

Every worker is a process with its own environments. It takes the shared networks, rolls out, and moves the
shared networks by the gradient of its copy, without locks: others may have moved them since. One worker
repeats to the last bit, several do not.

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783, algorithm S3.

    python a3c_nstep.py --env-id CartPole-v1

Diff it with vpg_gae.py to see the n-step returns and the workers.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard", "tqdm"]
# ///

import copy
import json
import time
from collections import deque, namedtuple
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from queue import Empty
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
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
    total_timesteps: PositiveInt = 200_000  # environment steps to train for; the last iteration is finished
    num_workers: PositiveInt = 2  # processes that roll out and update
    log_interval: PositiveInt = 1_000  # steps of a worker between its reports, the rows of progress.csv
    num_envs: PositiveInt = 8  # N, environments that a worker steps in parallel
    num_steps: TwoOrMore = 32  # T = n, steps per environment between updates
    vectorization: Literal["auto", "sync"] = "auto"  # auto: the environment's own, else sync
    gamma: UnitInterval = 0.995  # discount factor
    value_epochs: PositiveInt = 10  # passes of the value function over each rollout
    num_minibatches: PositiveInt = 4  # minibatches per pass of the value function
    learning_rate: PositiveFloat = 3e-3  # policy learning rate
    value_learning_rate: PositiveFloat = 1e-3  # value function learning rate
    anneal_lr: bool = True  # let all step sizes fall to 0 at total_timesteps
    max_grad_norm: PositiveFloat = 0.5  # longer gradients are scaled down to this before Adam's step
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy bonus
    init_std: PositiveFloat = 0.6  # standard deviation that Gaussian actions begin with
    normalize_advantages: bool = True  # zero mean and unit standard deviation over each rollout
    device: Literal["cpu"] = "cpu"  # where the networks are
    torch_threads: PositiveInt = 1  # more than 1 makes small networks slower
    runs_dir: str = "runs"  # where the run folder is made
    resume: str | None = None  # run folder to continue; its arguments hold where none are given


# ---------------------------------------------------------------------------- the algorithm


def n_step_returns(rewards, values, terminations, dones, gamma, n):
    """R_t = r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k}), k = n or up to the end of episode or segment.

    A termination makes V(s_{t+k}) zero; a truncation keeps it; both stop the sum.

    rewards, terminations, dones (T, ...); values (T+1, ...)  ->  returns (T, ...)
    """
    next_values = values[1:] * ~terminations
    returns = rewards + gamma * next_values
    for _ in range(min(n, len(rewards)) - 1):  # one reward more for all that do not end
        returns[:-1] = rewards[:-1] + gamma * torch.where(dones[:-1], next_values[:-1], returns[1:])
    return returns


def normalize(x):
    """Zero mean and unit standard deviation over the batch; a constant becomes 0."""
    centered = x.double() - x.double().mean()  # float32 would scale up the rounding of the mean
    return (centered / (centered.std(correction=0) + 1e-8)).to(x)


def policy_loss(logprobs, advantages):
    """-E_t[ log pi(a_t|s_t) A_t ], whose gradient is minus the policy gradient; (B,), (B,) -> ()"""
    return -(logprobs * advantages).mean()


class SharedRMSprop:
    """v <- 0.99 v + 0.01 g^2, theta <- theta - lr g / sqrt(v + eps)  (A3C, equation 1), without locks.

    theta and v are shared. g is the gradient of a worker's own net, which then gets the new theta.
    torch's RMSprop has sqrt(v) + eps: there a small gradient alone makes no small step.
    """

    def __init__(self, net, shared_net, square_avgs):
        self.param_groups = [{"params": list(net.parameters())}]
        self.shared = list(zip(net.parameters(), shared_net.parameters(), square_avgs))

    def zero_grad(self):
        for param, *_ in self.shared:
            param.grad = None

    @torch.no_grad()
    def step(self):
        for param, shared_param, square_avg in self.shared:
            square_avg.lerp_(param.grad**2, 0.01)
            shared_param -= self.param_groups[0]["lr"] * param.grad / (square_avg + 1e-5).sqrt()
            param.copy_(shared_param)


def gradient_step(optimizer, loss, max_grad_norm):
    """One step down the gradient of the loss, scaled down to max_grad_norm; returns the norm it had."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if norm.isfinite():  # else Run.log ends the run, and the shared networks stay good
        optimizer.step()
    return norm


def update_policy(policy, optimizer, obs, actions, advantages, args):
    """One step of ascent on E_t[ log pi(a_t|s_t) A_t ]; returns what to log."""
    dist = policy(obs)
    loss = policy_loss(dist.log_prob(actions), advantages)
    if args.ent_coef:
        loss = loss - args.ent_coef * dist.entropy().mean()
    norm = gradient_step(optimizer, loss, args.max_grad_norm)
    return {"policy_loss": loss.detach(), "policy_grad_norm": norm, "entropy": dist.entropy().mean().detach()}


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

    Raises ValueError at spaces that are not supported, FloatingPointError at what is not finite, and the
    error of a worker that died, with its traceback.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    envs = make_envs(args)
    policy = Policy(envs.single_observation_space, envs.single_action_space, args.init_std).to(args.device)
    value = Value(envs.single_observation_space).to(args.device)
    reward_scale = RewardScale(args.num_envs, args.gamma).to(args.device)
    shared = nn.ModuleDict(dict(policy=policy, value=value, reward_scale=reward_scale))
    shared["policy_square_avgs"] = nn.ParameterList(map(torch.zeros_like, policy.parameters()))
    shared["value_square_avgs"] = nn.ParameterList(map(torch.zeros_like, value.parameters()))

    with Run(args, envs, **shared) as run:
        step = torch.tensor(run.step).share_memory_()
        context = mp.get_context("spawn")
        lock, reports = context.Lock(), context.Queue()
        work_args = args, run.iteration, shared.share_memory(), step, lock, reports
        workers = mp.spawn(work, work_args, args.num_workers, join=False, daemon=True)
        try:
            while not workers.join(timeout=0) or not reports.empty():
                try:
                    run.log(*reports.get(timeout=0.1))
                except Empty:
                    continue
        finally:
            for process in workers.processes:
                process.terminate()
    return TrainResult(policy, list(run.returns), run.dir)


def work(rank, args, iteration, shared, step, lock, reports):
    """A worker: roll out, move the shared networks and report, until all together are at the last step."""
    torch.set_num_threads(args.torch_threads)
    args.seed = int(np.random.SeedSequence([args.seed, rank]).generate_state(1)[0])
    max_episodes = args.log_interval + args.num_envs * args.num_steps  # between two reports
    envs = wrappers.RecordEpisodeStatistics(make_envs(args), buffer_length=max_episodes)
    policy, value = copy.deepcopy(shared["policy"]), copy.deepcopy(shared["value"])
    policy_optimizer = SharedRMSprop(policy, shared["policy"], shared["policy_square_avgs"])
    value_optimizer = SharedRMSprop(value, shared["value"], shared["value_square_avgs"])
    reward_scale = RewardScale(args.num_envs, args.gamma)
    reward_scale.norm = shared["reward_scale"].norm
    with closing(envs):
        next_obs, next_done = reset(envs, args, iteration)
        steps, all_metrics, last_step = 0, [], step.item()
        while last_step < args.total_timesteps and mp.parent_process().is_alive():
            remaining = 1 - last_step / args.total_timesteps if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            value_optimizer.param_groups[0]["lr"] = args.value_learning_rate * remaining

            with lock:  # while none changes the statistics, to which the first layers belong
                policy.load_state_dict(shared["policy"].state_dict())
                value.load_state_dict(shared["value"].state_dict())
            batch = rollout(envs, policy, next_obs, next_done, args.num_steps)
            obs, actions, rewards, terminations, dones, valid = batch
            next_obs, next_done = obs[-1], dones[-1]
            with lock:
                rewards = reward_scale(rewards, valid)
            with torch.no_grad():
                values = value(obs)
            returns = n_step_returns(rewards, values, terminations, dones, args.gamma, args.num_steps)
            advantages = returns - values[:-1]

            # (T, N, ...) -> (B, ...), dropping the reset steps
            b_obs, b_actions, b_returns = obs[:-1][valid], actions[valid], returns[valid]
            b_advantages = normalize(advantages[valid]) if args.normalize_advantages else advantages[valid]
            metrics = update_policy(policy, policy_optimizer, b_obs, b_actions, b_advantages, args)
            metrics |= update_value(value, value_optimizer, b_obs, b_returns, args)
            all_metrics.append({name: metric.item() for name, metric in metrics.items()})
            with lock:
                update_statistics(shared["policy"].net, b_obs)
                update_statistics(shared["value"].net, b_obs)
                step += len(b_obs)
                last_step = step.item()
            steps += len(b_obs)
            if steps >= args.log_interval or last_step >= args.total_timesteps:
                metrics = {name: np.mean([m[name] for m in all_metrics]) for name in metrics}
                reports.put((steps, list(envs.return_queue), metrics))
                envs.return_queue.clear()
                steps, all_metrics = 0, []


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
