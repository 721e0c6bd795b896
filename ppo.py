"""Proximal policy optimization (PPO): the clipped surrogate or a KL penalty, with GAE.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                           V(s_{t+1}) = 0 if s_{t+1} is terminal
    A_t     = delta_t + gamma lambda A_{t+1}                            stops at the end of an episode
    rho_t   = pi_theta(a_t|s_t) / pi_old(a_t|s_t)
    L       = E_t[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ]  K epochs of minibatches per rollout
           or E_t[ rho_t A_t - beta KL(pi_old(.|s_t) || pi_theta(.|s_t)) ]

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347.
Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", arXiv:1506.02438.

    python ppo.py --env-id CartPole-v1

Diff it with vpg_gae.py to see the ratio, the clip, the penalty and the epochs.
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
    num_envs: int = 32
    """N, environments stepped in parallel"""
    num_steps: int = 32
    """T, steps per environment between updates"""
    vectorization: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own vector version where it has one, else sync; async: one process each"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of GAE: 0 is the one-step TD error, 1 is the Monte Carlo return minus V"""
    objective: Literal["clip", "kl-penalty"] = "clip"
    """what keeps pi near pi_old"""
    clip_coef: float = 0.2
    """eps, the probability ratio is clipped to [1 - eps, 1 + eps]"""
    update_epochs: int = 4
    """K, passes of the policy over each rollout"""
    target_kl: float | None = None
    """KL(pi_old || pi) above which no further pass follows; what a KL penalty aims at, 0.01 if not given"""
    kl_coef: float = 1.0
    """beta, weight of the KL penalty, in the first update"""
    kl_rule: Literal["fixed", "adaptive", "dual"] = "adaptive"
    """what beta does: stays, doubles and halves, or climbs the dual of max E[rho A] with KL <= target_kl"""
    kl_learning_rate: float = 10.0
    """step size of the dual rule"""
    learning_rate: float = 1e-3
    """policy learning rate"""
    value_learning_rate: float = 1e-3
    """value function learning rate"""
    value_epochs: int = 4
    """passes of the value function over each rollout"""
    value_target: Literal["gae", "monte-carlo", "td"] = "gae"
    """what V is regressed on: lambda-returns, Monte Carlo returns of the rollout, or r + gamma V(s')"""
    value_prox_coef: float = 0.0
    """kappa, weight of ||phi - phi_i||^2, the way of V's parameters from those before the regression"""
    num_minibatches: int = 4
    """minibatches per pass"""
    anneal_lr: bool = True
    """let the learning rates fall linearly to 0 at total_timesteps"""
    max_grad_norm: float = 0.5
    """longer gradients are scaled down to this"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    init_std: float = 1.0
    """standard deviation that Gaussian actions begin with"""
    normalize_advantages: bool = True
    """zero mean and unit standard deviation over each rollout"""
    normalize_rewards: bool = True
    """divide rewards by the running deviation of the discounted return; what is logged stays raw"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are; environments always run on the CPU"""
    torch_threads: int = 1
    """more than 1 makes small networks slower"""
    runs_dir: str = "runs"
    """where the run folder is made"""
    resume: str | None = None
    """run folder to continue; its arguments hold where none are given"""


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


def policy_loss(logprobs, old_logprobs, advantages, clip_coef):
    """-E_t[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ]  (PPO, equation 7); (B,) each -> ()"""
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


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
    """One step down the gradient of the loss, scaled down to max_grad_norm; raises FloatingPointError."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"gradient of norm {norm:g} of a loss of {loss:g}")
    optimizer.step()


def update_policy(policy, optimizer, obs, actions, advantages, args):
    """K epochs of minibatch ascent on the objective; returns what to log."""
    clip = args.objective == "clip"
    old_policy = None if clip else copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        old_dist = policy(obs)
        old_logprobs = old_dist.log_prob(actions)
    beta = optimizer.param_groups[0]["kl_coef"]  # checkpoints of the optimizer keep it
    for _ in range(args.update_epochs):
        for mb in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            dist = policy(obs[mb])
            batch = dist.log_prob(actions[mb]), old_logprobs[mb], advantages[mb]
            if clip:
                loss = policy_loss(*batch, args.clip_coef)
            else:
                loss = kl_penalty_loss(*batch, kl_divergence(old_policy(obs[mb]), dist).mean(), beta)
            if args.ent_coef:
                loss = loss - args.ent_coef * dist.entropy().mean()
            gradient_step(optimizer, loss, args.max_grad_norm)
        if clip and args.target_kl and kl_divergence(old_dist, policy(obs)).mean() > args.target_kl:
            break
    with torch.no_grad():
        dist = policy(obs)
        ratio, kl = (dist.log_prob(actions) - old_logprobs).exp(), kl_divergence(old_dist, dist).mean()
    if not clip:
        rule = args.target_kl or 0.01, args.kl_rule, args.kl_learning_rate
        optimizer.param_groups[0]["kl_coef"] = update_kl_coef(beta, kl.item(), *rule)
    clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
    metrics = {"policy_loss": loss.detach(), "entropy": dist.entropy().mean()}
    return metrics | {"kl": kl, "clip_fraction": clip_fraction} | ({} if clip else {"kl_coef": beta})


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
    value_optimizer = torch.optim.Adam(value.parameters(), eps=1e-5, fused=True)
    modules = dict(policy=policy, value=value, value_optimizer=value_optimizer)
    policy_optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    policy_optimizer.param_groups[0]["kl_coef"] = args.kl_coef
    modules["policy_optimizer"] = policy_optimizer

    with Run(args, envs, recorder.return_queue, **modules) as run:
        next_obs, next_done = reset(envs, args, run.iteration)
        while run.step < args.total_timesteps and not run.interrupted:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            value_optimizer.param_groups[0]["lr"] = args.value_learning_rate * remaining

            batch = rollout(envs, policy, next_obs, next_done, args.num_steps)
            obs, actions, rewards, terminations, dones, valid = batch
            next_obs, next_done = obs[-1], dones[-1]
            if not valid.any():  # every environment was resetting
                continue
            with torch.no_grad():
                values = value(obs)
            advantages = compute_gae(rewards, values, terminations, dones, args.gamma, args.gae_lambda)
            returns = advantages + values[:-1]
            if args.value_target != "gae":
                value_lambda = 1.0 if args.value_target == "monte-carlo" else 0.0
                value_advantages = compute_gae(rewards, values, terminations, dones, args.gamma, value_lambda)
                returns = value_advantages + values[:-1]

            # (T, N, ...) -> (B, ...), dropping the reset steps
            b_obs, b_actions, b_returns = obs[:-1][valid], actions[valid], returns[valid]
            b_advantages = normalize(advantages[valid]) if args.normalize_advantages else advantages[valid]
            metrics = update_policy(policy, policy_optimizer, b_obs, b_actions, b_advantages, args)
            metrics |= update_value(value, value_optimizer, b_obs, b_returns, args)
            policy.net[0].update(b_obs)
            value.net[0].update(b_obs)
            run.log(len(b_obs), metrics)
        run.save()
    return TrainResult(policy, list(run.episode_returns), run.dir)


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=load_args(args.resume)) if args.resume else args)
