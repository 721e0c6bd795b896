"""Asynchronous advantage actor-critic (A3C) with n-step returns.

    R_t = r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k})                k <= n, up to the end of the episode
    A_t = R_t - V(s_t)                                                  V(s_{t+k}) = 0 if s_{t+k} is terminal
    g   = E_t[ grad_theta log pi_theta(a_t|s_t) A_t ]                   one step per rollout of each worker

Every worker is a process with its own environment and its own copy of the networks. The gradients of the
copies move the shared networks, without locks. One worker repeats to the last bit, several do not.

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783, algorithm S3.

    python a3c_nstep.py --env-id CartPole-v1

Diff it with vpg_gae.py to see the n-step returns and the workers.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium>=1.1,<2", "numpy", "tyro>=0.9", "tensorboard", "tqdm"]
# ///

import copy
import json
import signal
import sys
import threading
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import tyro
from gymnasium.wrappers import vector as wrappers
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.distributions.kl import kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Distribution.set_default_validate_args(False)  # too slow for every step; Run.log stops at what is not finite


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """gymnasium environment; Discrete or Box actions"""
    seed: int = 1
    """seed of the networks, the environments and the action sampling"""
    total_timesteps: int = 200_000
    """environment steps to train for; the last iteration is finished"""
    num_workers: int = 2
    """processes that roll out and update"""
    log_interval: int = 2_000
    """steps of all workers per iteration: a row of progress.csv, new observation statistics"""
    num_envs: int = 1
    """N, environments stepped in parallel"""
    num_steps: int = 20
    """T = n, steps per environment between updates"""
    vectorization: Literal["auto", "sync"] = "sync"
    """auto: the environment's own vector version where it has one, else sync"""
    gamma: float = 0.99
    """discount factor"""
    learning_rate: float = 1e-3
    """policy learning rate"""
    value_learning_rate: float = 1e-3
    """value function learning rate"""
    value_epochs: int = 1
    """passes of the value function over each rollout"""
    value_prox_coef: float = 0.0
    """kappa, weight of ||phi - phi_i||^2, the way of V's parameters from those before the regression"""
    num_minibatches: int = 1
    """minibatches per pass"""
    anneal_lr: bool = True
    """let the learning rates fall linearly to 0 at total_timesteps"""
    max_grad_norm: float = 0.5
    """longer gradients are scaled down to this"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    init_std: float = 1.0
    """standard deviation that Gaussian actions begin with"""
    normalize_advantages: bool = False
    """zero mean and unit standard deviation over each rollout"""
    normalize_rewards: bool = True
    """divide rewards by the running deviation of the discounted return; what is logged stays raw"""
    device: Literal["cpu"] = "cpu"
    """where the networks are; environments always run on the CPU"""
    torch_threads: int = 1
    """more than 1 makes small networks slower"""
    runs_dir: str = "runs"
    """where the run folder is made"""
    resume: str | None = None
    """run folder to continue; its arguments hold where none are given"""


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
    """One step down the gradient of the loss, scaled down to max_grad_norm; raises FloatingPointError."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"gradient of norm {norm:g} of a loss of {loss:g}")
    optimizer.step()


def update_policy(policy, optimizer, obs, actions, advantages, args):
    """One step of ascent on E_t[ log pi(a_t|s_t) A_t ]; returns what to log."""
    with torch.no_grad():
        old_dist = policy(obs)
    dist = policy(obs)
    loss = policy_loss(dist.log_prob(actions), advantages)
    if args.ent_coef:
        loss = loss - args.ent_coef * dist.entropy().mean()
    gradient_step(optimizer, loss, args.max_grad_norm)
    with torch.no_grad():
        dist = policy(obs)
    metrics = {"policy_loss": loss.detach(), "entropy": dist.entropy().mean()}
    return metrics | {"kl": kl_divergence(old_dist, dist).mean()}


def update_value(value, optimizer, obs, returns, args):
    """Regress V(s_t) on the returns, within reach of the parameters it had; returns what to log."""
    with torch.no_grad():
        error = returns - value(obs)
        explained_variance = 1 - error.var(correction=0) / (returns.var(correction=0) + 1e-8)
        old_params = nn.utils.parameters_to_vector(value.parameters())
    for _ in range(args.value_epochs):
        for mb in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            loss = (value(obs[mb]) - returns[mb]).pow(2).mean()
            if args.value_prox_coef:
                distance = (nn.utils.parameters_to_vector(value.parameters()) - old_params).pow(2).sum()
                loss = loss + args.value_prox_coef * distance
            gradient_step(optimizer, loss, args.max_grad_norm)
    return {"value_loss": loss.detach(), "explained_variance": explained_variance}


# ---------------------------------------------------------------------------- networks


class RunningNorm(nn.Module):
    """(x - mean) / std over all observations so far, clipped to [-10, 10]; saved with the weights."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("scale", torch.ones(dim))  # 1 / std, stored because it is used at every step
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):  # (..., dim) -> (..., dim)
        return ((x - self.mean) * self.scale).clamp(-10, 10)

    def update(self, x):
        """Merge the mean and variance of a batch (B, dim) into the running ones (Chan et al. 1979)."""
        self.count += len(x)
        share, delta = len(x) / self.count, x.mean(0) - self.mean
        self.mean += share * delta
        self.var.lerp_(x.var(0, correction=0) + (1 - share) * delta**2, share)
        self.scale.copy_((self.var + 1e-8).rsqrt())


def mlp(in_dim, out_dim, out_gain):
    """Normalized inputs, two tanh layers of 64 units, orthogonal weights, zero biases."""
    layers = [nn.Linear(in_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out_dim)]
    for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, out_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(RunningNorm(in_dim), *layers)


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
            return Categorical(logits=self.net(obs))
        return Independent(Normal(self.net(obs), self.log_std.exp()), 1)


class Value(nn.Module):
    """V(s)."""

    def __init__(self, obs_space):
        super().__init__()
        self.net = mlp(gym.spaces.flatdim(obs_space), 1, out_gain=1.0)

    def forward(self, obs):  # (..., O) -> (...)
        return self.net(obs).squeeze(-1)


# ---------------------------------------------------------------------------- data


def make_envs(args):
    """N environments side by side, wrapped so that they give vectors and take every action of a Policy."""
    mode = None if args.vectorization == "auto" else args.vectorization
    shield = mode == "async" and threading.current_thread() is threading.main_thread()
    if shield:  # worker processes inherit this: Ctrl-C is for their parent alone
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        envs = gym.make_vec(args.env_id, args.num_envs, vectorization_mode=mode)
    except (gym.error.Error, ImportError, TypeError) as error:
        refuse(f"--env-id {args.env_id}: {error}")
    finally:
        if shield:
            signal.signal(signal.SIGINT, handler)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(action_space, gym.spaces.Discrete)
    if not discrete and not (isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"):
        refuse(f"--env-id {args.env_id}: actions must be Discrete or float Box, not {action_space}")
    if not obs_space.is_np_flattenable:
        refuse(f"--env-id {args.env_id}: observations must flatten to a vector, not {obs_space}")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        refuse(f"--env-id {args.env_id}: its vector environment must use next-step autoreset")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = wrappers.FlattenObservation(envs)
    if discrete and action_space.start:
        return wrappers.TransformAction(envs, lambda action: action + action_space.start)
    return envs if discrete else wrappers.ClipAction(envs)


def reset(envs, args, iteration):
    """Start an episode in every environment, seeded by (seed, iteration); returns obs (N, O), done (N,)."""
    seed = int(np.random.SeedSequence([args.seed, iteration]).generate_state(1)[0])
    obs = torch.tensor(envs.reset(seed=seed)[0], dtype=torch.float32, device=args.device)
    if not obs.isfinite().all():
        raise FloatingPointError("observation")
    return obs, torch.zeros(len(obs), dtype=torch.bool, device=args.device)


def rollout(envs, policy, obs, done, num_steps):
    """Step N environments T times with actions sampled from pi; done (N,): obs (N, O) ended an episode.

    An environment resets on the step *after* its episode ends (gymnasium's next-step autoreset), so
    obs[t + 1] is always the true successor of obs[t], and the reset step itself is not valid data.

    Returns obs (T+1, N, O), actions (T, N) or (T, N, A), and rewards, terminations, dones, valid (T, N).
    Raises FloatingPointError at a reward or an observation that is not finite.
    """
    all_obs, actions, rewards = [obs], [], np.zeros((num_steps, len(obs)), np.float32)
    terminations, truncations = np.zeros_like(rewards, bool), np.zeros_like(rewards, bool)
    for t in range(num_steps):
        with torch.inference_mode():  # cheaper than no_grad
            actions.append(policy(obs).sample())
        action = actions[-1].cpu().numpy().reshape(envs.action_space.shape)
        next_obs, rewards[t], terminations[t], truncations[t], _ = envs.step(action)
        next_obs = next_obs.astype(np.float32)
        if not (np.isfinite(rewards[t]).all() and np.isfinite(next_obs).all()):
            raise FloatingPointError("observation" if np.isfinite(rewards[t]).all() else "reward")
        obs = torch.as_tensor(next_obs, device=obs.device)
        all_obs.append(obs)
    arrays = rewards, terminations, terminations | truncations
    rewards, terminations, dones = (torch.as_tensor(x, device=obs.device) for x in arrays)
    valid = ~torch.cat([done[None], dones[:-1]])
    return torch.stack(all_obs), torch.stack(actions), rewards, terminations, dones, valid


# ---------------------------------------------------------------------------- running

SCRIPT = Path(__file__).stem
SAVE_EVERY = 5.0  # seconds; a checkpoint takes about ten milliseconds


def refuse(message):
    """End for bad input: one line on standard error, exit code 2."""
    print(f"{SCRIPT}.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


MAY_BE_ZERO = "seed gamma gae_lambda ent_coef value_prox_coef kl_coef damping cg_tol".split()
AT_MOST_ONE = "gamma gae_lambda min_ess fisher_subsample backtrack_coef".split()


def check_args(args):
    """Refuse, before anything is written, what no run can have."""
    for name, value in vars(args).items():
        may_be_zero = name in MAY_BE_ZERO
        if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_zero):
            refuse(f"--{name.replace('_', '-')} {value}: must be {'at least' if may_be_zero else 'above'} 0")
        if name in AT_MOST_ONE and value > 1:
            refuse(f"--{name.replace('_', '-')} {value}: must be at most 1")
        if type(value) is int and value >= 2**63:
            refuse(f"--{name.replace('_', '-')} {value}: too large")
    batch_size = args.num_envs * getattr(args, "num_steps", 1)
    if hasattr(args, "num_steps") and batch_size % getattr(args, "num_minibatches", 1):
        refuse(f"--num-minibatches {args.num_minibatches}: must divide a batch of {batch_size}")
    if args.total_timesteps < batch_size:
        refuse(f"--total-timesteps {args.total_timesteps}: one iteration takes {batch_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: not available")
    one_weight = args.num_envs == 1 and getattr(args, "estimator", None) in ("total", "trajectory")
    if one_weight and args.normalize_weights:
        refuse(f"--num-envs 1: --estimator {args.estimator} has one weight per episode, normalized it is 0")
    for name in ("env_id", "objective", "baseline") if args.resume else ():
        if getattr(load_args(args.resume), name, None) != getattr(args, name, None):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            refuse(f"{flag}: --resume {args.resume} was trained with another")


def load_args(run_dir):
    """The arguments of the run in a folder, to resume it."""
    try:
        saved = json.loads(Path(run_dir, "args.json").read_text())
    except (OSError, ValueError):
        saved = {}
    if (
        not isinstance(saved, dict)
        or saved.pop("script", None) != SCRIPT
        or not Path(run_dir, "checkpoint.pt").exists()
    ):
        refuse(f"--resume {run_dir}: not a run of {SCRIPT}.py")
    try:
        return Args(**{**saved, "resume": str(run_dir)})
    except TypeError as error:
        refuse(f"--resume {run_dir}: of another version of {SCRIPT}.py: {error}")


class Run:
    """A run folder: args.json, progress.csv, TensorBoard events, and checkpoint.pt, at most every 5 s.

    episode_returns: the raw return of every episode, which train or a wrapper appends to.
    modules: everything with a state_dict that a resumed run needs, by name.
    """

    def __init__(self, args, envs, episode_returns, **modules):
        self.args, self.envs, self.episode_returns, self.modules = args, envs, episode_returns, modules
        self.step, self.iteration, self.seconds, self.progress_size = 0, 0, 0.0, 0
        self.saved_at, self.interrupted, self.handler = 0.0, False, None
        self.reward_rms = vars(envs.return_rms) if isinstance(envs, wrappers.NormalizeReward) else {}
        name = f"{SCRIPT}__{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = Path(args.resume or Path(args.runs_dir, name.replace("/", "-")))
        if args.resume:
            self.load()
        self.dir.mkdir(parents=True, exist_ok=True)
        saved_args = {"script": SCRIPT, **asdict(args), "resume": None}
        Path(self.dir, "args.json").write_text(json.dumps(saved_args, indent=2))
        self.progress = open(Path(self.dir, "progress.csv"), "a")
        self.progress.truncate(self.progress_size)  # what came after the checkpoint is done again
        self.progress.seek(self.progress_size)
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1, max_queue=1000)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit=" steps", disable=None)
        self.start = time.time() - self.seconds

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGINT, self.interrupt)
        self.save()
        return self

    def interrupt(self, *_):
        """The first Ctrl-C ends the run after this iteration, the second at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, self.handler)

    def __exit__(self, kind, error, traceback):
        if self.handler:
            signal.signal(signal.SIGINT, self.handler)
        for resource in (self.bar, self.writer, self.progress):
            resource.close()
        self.envs.close(**({"terminate": True} if self.args.vectorization == "async" else {}))
        print(f"{SCRIPT}.py: {self.step} steps in {self.seconds:.1f} s, in {self.dir}")
        if kind is FloatingPointError:
            error.args = (f"not finite after step {self.step}: {error}",)
        return kind is KeyboardInterrupt  # a second Ctrl-C drops what came after the last save

    def log(self, steps, metrics):
        """End an iteration of so many steps. Raises FloatingPointError if a metric is not finite."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(list(metrics.values())).all():
            raise FloatingPointError(f"{metrics}")
        for name, module in self.modules.items():
            if isinstance(module, nn.Module) and not all(
                x.isfinite().all() for x in module.state_dict().values()
            ):
                raise FloatingPointError(f"weights or observation statistics of {name}")
        self.step += steps
        self.iteration += 1
        self.seconds = time.time() - self.start
        recent = list(self.episode_returns)[-100:]
        episodic_return = float(np.mean(recent)) if recent else ""
        row = {"step": self.step, "episodes": len(self.episode_returns), "episodic_return": episodic_return}
        row |= {**metrics, "seconds": self.seconds, "steps_per_second": round(self.step / self.seconds)}
        if self.iteration == 1:
            print(*row, sep=",", file=self.progress)
        print(*row.values(), sep=",", file=self.progress, flush=True)
        for name, value in row.items():
            if value != "":
                self.writer.add_scalar(name, value, self.step)
        self.bar.update(steps)
        self.bar.set_postfix(episodic_return=episodic_return, refresh=False)
        if self.bar.disable and self.iteration % 10 == 1:
            line = f"step {self.step}  episodic_return {episodic_return}  seconds {self.seconds:.1f}"
            print(line, flush=True)
        if time.monotonic() - self.saved_at >= SAVE_EVERY:
            self.save()

    def save(self):
        """Replace checkpoint.pt as a whole; loading it with weights_only=True runs no code."""
        self.progress_size = self.progress.tell()
        self.writer.flush()
        state = {name: getattr(self, name) for name in ("step", "iteration", "seconds", "progress_size")}
        state |= {name: module.state_dict() for name, module in self.modules.items()}
        state["reward_rms"] = {name: float(value) for name, value in self.reward_rms.items()}
        state["episode_returns"] = torch.tensor(self.episode_returns, dtype=torch.float64)
        state["rng"] = torch.get_rng_state()
        if self.args.device == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        with open(Path(self.dir, "checkpoint.tmp"), "wb") as file:
            torch.save(state, file)
        Path(file.name).replace(Path(self.dir, "checkpoint.pt"))
        self.saved_at = time.monotonic()

    def load(self):
        """Take up the state of checkpoint.pt."""
        state = torch.load(Path(self.dir, "checkpoint.pt"), map_location=self.args.device, weights_only=True)
        for name in ("step", "iteration", "seconds", "progress_size"):
            setattr(self, name, state[name])
        if self.step >= self.args.total_timesteps:
            refuse(f"--total-timesteps {self.args.total_timesteps}: {self.step} are already done")
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            refuse(f"--resume {self.dir}: of another version of {SCRIPT}.py: {error}")
        self.reward_rms.update(state["reward_rms"])
        self.episode_returns.extend(state["episode_returns"].tolist())
        torch.set_rng_state(state["rng"].cpu())
        if self.args.device == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())


# ---------------------------------------------------------------------------- training

TrainResult = namedtuple("TrainResult", "policy episode_returns run_dir")


def train(args):
    """Train; returns the policy, the raw returns of all episodes in order, and the run folder.

    Raises SystemExit at bad input, FloatingPointError at a reward, observation or loss that is not finite.
    """
    check_args(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    recorder = envs = wrappers.RecordEpisodeStatistics(make_envs(args), buffer_length=None)
    if args.normalize_rewards:
        envs = wrappers.NormalizeReward(envs, args.gamma)
    policy = Policy(envs.single_observation_space, envs.single_action_space, args.init_std).to(args.device)
    value = Value(envs.single_observation_space).to(args.device)
    modules = nn.ModuleDict({"policy": policy, "value": value})
    modules["policy_optimizer"] = nn.ParameterList(map(torch.zeros_like, policy.parameters()))
    modules["value_optimizer"] = nn.ParameterList(map(torch.zeros_like, value.parameters()))

    with Run(args, envs, recorder.return_queue, **modules) as run:
        steps = torch.tensor([run.step] + [0] * (args.num_workers - 1))  # a slot each: exact without locks
        pipes, ends = zip(*[mp.Pipe() for _ in range(args.num_workers)])
        work_args = args, run.iteration, modules.share_memory(), steps.share_memory_(), ends
        shield = threading.current_thread() is threading.main_thread()
        if shield:  # from Ctrl-C, as in make_envs
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        workers = mp.spawn(work, work_args, args.num_workers, join=False, daemon=True)
        if shield:
            signal.signal(signal.SIGINT, handler)
        for end in ends:
            end.close()  # a pipe shall end with its worker
        try:
            while run.step < args.total_timesteps and not run.interrupted:
                order = min(run.step + args.log_interval, args.total_timesteps), run.reward_rms
                obs, returns, reward_rms, metrics = zip(*ask(pipes, workers, order))
                # statistics change here, where every worker waits: none reads them half updated
                b_obs = torch.as_tensor(np.concatenate(obs))
                policy.net[0].update(b_obs)
                value.net[0].update(b_obs)
                run.reward_rms.update(mean(reward_rms))
                run.episode_returns.extend(np.concatenate(returns))
                run.log(len(b_obs), mean(metrics))
            run.save()
            for pipe in pipes:
                pipe.send(None)
        except mp.ProcessRaisedException as error:
            if "\nFloatingPointError: " in str(error):
                raise FloatingPointError(error) from None
            raise
        finally:
            for stop in (mp.Process.terminate, mp.Process.kill):
                for process in workers.processes:
                    process.join(1 / args.num_workers)  # an idle worker ends by itself
                    stop(process)
    return TrainResult(policy, list(run.episode_returns), run.dir)


def ask(pipes, workers, order):
    """Send all workers an order and wait for their reports; raises the error of a worker that ended."""
    try:
        for pipe in pipes:
            pipe.send(order)
        while not all(pipe.poll(0.5) for pipe in pipes):
            workers.join(0)
        return [pipe.recv() for pipe in pipes]
    except (EOFError, ConnectionError):
        workers.join(5)
        raise


def mean(dicts):
    """The mean of every entry of dicts with the same keys."""
    return {name: np.mean([d[name] for d in dicts]) for name in dicts[0]}


def work(rank, args, iteration, shared, steps, pipes):
    """A worker: at each order, roll out and update until all workers together are at a step, and report."""
    for other in set(pipes) - {pipes[rank]}:
        other.close()
    torch.set_num_threads(args.torch_threads)
    args.seed = int(np.random.SeedSequence([args.seed, rank, iteration]).generate_state(1)[0])
    torch.manual_seed(args.seed)
    recorder = envs = wrappers.RecordEpisodeStatistics(make_envs(args), buffer_length=None)
    if args.normalize_rewards:
        envs = wrappers.NormalizeReward(envs, args.gamma)
    reward_rms = vars(envs.return_rms) if args.normalize_rewards else {}
    policy, value = copy.deepcopy(shared["policy"]), copy.deepcopy(shared["value"])
    policy_optimizer = SharedRMSprop(policy, shared["policy"], shared["policy_optimizer"])
    value_optimizer = SharedRMSprop(value, shared["value"], shared["value_optimizer"])
    next_obs, next_done = reset(envs, args, iteration)
    while order := pipes[rank].recv():
        last_step, new_reward_rms = order
        reward_rms.update(new_reward_rms)
        policy.load_state_dict(shared["policy"].state_dict())
        value.load_state_dict(shared["value"].state_dict())
        all_obs, all_metrics = [], []
        while not all_obs or steps.sum() < last_step:
            remaining = max(0, 1 - steps.sum().item() / args.total_timesteps) if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            value_optimizer.param_groups[0]["lr"] = args.value_learning_rate * remaining

            batch = rollout(envs, policy, next_obs, next_done, args.num_steps)
            obs, actions, rewards, terminations, dones, valid = batch
            next_obs, next_done = obs[-1], dones[-1]
            if not valid.any():  # every environment was resetting
                continue
            with torch.no_grad():
                values = value(obs)
            returns = n_step_returns(rewards, values, terminations, dones, args.gamma, args.num_steps)
            advantages = returns - values[:-1]

            # (T, N, ...) -> (B, ...), dropping the reset steps
            b_obs, b_actions, b_returns = obs[:-1][valid], actions[valid], returns[valid]
            b_advantages = normalize(advantages[valid]) if args.normalize_advantages else advantages[valid]
            metrics = update_policy(policy, policy_optimizer, b_obs, b_actions, b_advantages, args)
            metrics |= update_value(value, value_optimizer, b_obs, b_returns, args)
            metrics.pop("explained_variance")  # of so few steps
            all_metrics.append({name: metric.item() for name, metric in metrics.items()})
            all_obs.append(b_obs)
            steps[rank] += len(b_obs)
        report = torch.cat(all_obs).numpy(), np.array(recorder.return_queue), reward_rms, mean(all_metrics)
        pipes[rank].send(report)
        recorder.return_queue.clear()
    envs.close()


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=load_args(args.resume)) if args.resume else args)
