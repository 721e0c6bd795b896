"""REINFORCE with importance sampling: further steps on the same episodes, and on those of older policies.

    rho_t = pi_theta(a_t|s_t) / pi_old(a_t|s_t)                              pi_old collected the episode
    g     = 1/N sum_i sum_t grad_theta log pi_theta(a_t|s_t) w_t       up to K steps per N whole episodes

    trajectory  w_t = (prod_k rho_k) (sum_k gamma^k r_k)                     unbiased
    causal      w_t = (prod_{k<=t} rho_k) sum_{l>=t} gamma^{l-t} r_l prod_{t<k<=l} rho_k          unbiased
    no-future   w_t = (prod_{k<=t} rho_k) G_t                                biased: the old policy's future
    per-step    w_t = rho_t G_t                                              biased: its states, too

A product of t ratios has a variance that grows exponentially with t; without it g is biased, to first order
in the distance between the policies.

An episode ends where the environment ends it: a time limit is part of this finite-horizon objective, and
nothing bootstraps past it.

Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation". Levine, CS285, lecture 5.

    python offpolicy_is.py --env-id CartPole-v1

Diff it with reinforce.py to see the importance weights and the re-use of a batch.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium>=1.1,<2", "numpy", "tyro>=0.9", "tensorboard", "tqdm"]
# ///

import json
import signal
import sys
import threading
import time
from collections import deque, namedtuple
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Distribution.set_default_validate_args(False)  # too slow for every step; Run.log stops at what is not finite


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """gymnasium environment; Discrete or Box actions"""
    seed: int = 1
    """seed of the networks, the environments and the action sampling"""
    total_timesteps: int = 300_000
    """environment steps to train for; the last iteration is finished"""
    num_envs: int = 32
    """N, environments stepped in parallel, one whole episode each between updates"""
    max_episode_steps: int = 10_000
    """an episode that is longer stops the run"""
    vectorization: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own vector version where it has one, else sync; async: one process each"""
    gamma: float = 0.995
    """discount factor"""
    estimator: Literal["trajectory", "causal", "no-future", "per-step"] = "trajectory"
    """which importance ratios weight the credit of an action"""
    num_updates: int = 4
    """K, gradient steps per iteration, at most"""
    num_batches: int = 1
    """M, the latest batches that each step is taken on, whatever policies collected them"""
    min_ess: float = 0.9
    """no further step on a batch once the effective sample size of its episodes is below this share of N"""
    normalize_weights: bool = True
    """zero mean and unit deviation over a batch: biased, as the batch is in its own baseline; one scale"""
    learning_rate: float = 1e-2
    """policy learning rate"""
    anneal_lr: bool = True
    """let the learning rates fall linearly to 0 at total_timesteps"""
    max_grad_norm: float = float("inf")
    """longer gradients are scaled down to this"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    init_std: float = 1.0
    """standard deviation that Gaussian actions begin with"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are; environments always run on the CPU"""
    torch_threads: int = 1
    """more than 1 makes small networks slower"""
    runs_dir: str = "runs"
    """where the run folder is made"""
    resume: str | None = None
    """run folder to continue; its arguments hold where none are given"""


# ---------------------------------------------------------------------------- the algorithm


def compute_returns(rewards, gamma):
    """G_t = r_t + gamma G_{t+1}, the reward-to-go; (T, N), one episode per column -> (T, N)"""
    G, returns = torch.zeros_like(rewards[0]), []
    for reward in rewards.flip(0):
        G = reward + gamma * G
        returns.append(G)
    return torch.stack(returns).flip(0)


def importance_weights(log_ratios, rewards, gamma, estimator):
    """w_t, what multiplies grad log pi(a_t|s_t) (see above); log rho_t (T, N), 0 where not valid -> (T, N)"""
    if estimator == "trajectory":
        return log_ratios.sum(0).exp() * compute_returns(rewards, gamma)[:1].expand_as(rewards)
    past_and_present = log_ratios.cumsum(0).exp()  # prod_{k<=t} rho_k
    if estimator == "causal":
        return compute_returns(past_and_present * rewards, gamma)
    ratios = past_and_present if estimator == "no-future" else log_ratios.exp()
    return ratios * compute_returns(rewards, gamma)


def effective_sample_size(log_weights):
    """(sum w)^2 / sum w^2, between 1 and N; log w (N,) -> ()"""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def normalize(x):
    """Zero mean and unit standard deviation over the batch; a constant becomes 0."""
    centered = x.double() - x.double().mean()  # float32 would scale up the rounding of the mean
    return (centered / (centered.std(correction=0) + 1e-8)).to(x)


def policy_loss(logprobs, weights, num_episodes):
    """-1/N sum_i sum_t log pi(a_t|s_t) w_t: a negative log-likelihood, weighted; (B,), (B,), int -> ()

    A pseudo-loss: its gradient is minus the policy gradient, its value means nothing.
    """
    return -(logprobs * weights.detach()).sum() / num_episodes


def gradient_step(optimizer, loss, max_grad_norm):
    """One step down the gradient of the loss, scaled down to max_grad_norm; raises FloatingPointError."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"gradient of norm {norm:g} of a loss of {loss:g}")
    optimizer.step()


def update_policy(policy, optimizer, batches, args):
    """Up to K steps of gradient ascent on the batches still near the policy; returns what to log."""
    updates = 0
    while updates < args.num_updates:
        losses = []
        for obs, actions, rewards, valid, old_logprobs in batches:
            dist = policy(obs)
            logprobs = dist.log_prob(actions)
            log_ratios = ((logprobs - old_logprobs) * valid).detach()
            ess, num_episodes = effective_sample_size(log_ratios.sum(0)), valid.shape[1]
            if ess < args.min_ess * num_episodes * (1 - 1e-3):
                continue
            weights = importance_weights(log_ratios, rewards, args.gamma, args.estimator)[valid]
            if args.normalize_weights:
                weights = normalize(weights)
            loss = policy_loss(logprobs[valid], weights, num_episodes)
            entropy = dist.entropy()[valid].mean()
            losses.append(loss - args.ent_coef * entropy)
        if not losses:
            break
        gradient_step(optimizer, torch.stack(losses).mean(), args.max_grad_norm)
        updates += 1
    metrics = {"policy_loss": loss.detach(), "entropy": entropy.detach(), "updates": updates}
    return metrics | {"effective_sample_size": ess, "max_weight": log_ratios.sum(0).max().exp()}


class Batches(deque):
    """The latest batches, oldest first, with the state_dict that a checkpoint needs."""

    def state_dict(self):
        return {"batches": list(self)}

    def load_state_dict(self, state):
        self.extend(state["batches"])


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


def rollout_episodes(envs, policy, obs, max_episode_steps):
    """Run one whole episode in each of N environments, from obs (N, O); T is the length of the longest.

    Episodes are never cut at a number of steps, which would favour the short ones.

    Returns obs (T, N, O), actions (T, N) or (T, N, A), rewards (T, N), zero after the end of an episode, and
    valid (T, N), true until then. Raises FloatingPointError at a reward or an observation that is not finite.
    """
    steps, running = [], np.ones(len(obs), bool)
    while running.any():
        if len(steps) == max_episode_steps:
            refuse(f"--max-episode-steps {max_episode_steps}: an episode did not end before")
        with torch.inference_mode():  # cheaper than no_grad
            action = policy(obs).sample()
        env_action = action.cpu().numpy().reshape(envs.action_space.shape)
        next_obs, reward, terminated, truncated, _ = envs.step(env_action)
        next_obs, reward = next_obs.astype(np.float32), np.float32(reward * running)
        if not (np.isfinite(reward).all() and np.isfinite(next_obs).all()):
            raise FloatingPointError("observation" if np.isfinite(reward).all() else "reward")
        reward, valid = (torch.as_tensor(x, device=obs.device) for x in (reward, running))
        steps.append((obs, action, reward, valid))
        obs = torch.as_tensor(next_obs, device=obs.device)
        running = running & ~(terminated | truncated)
    return tuple(torch.stack(x) for x in zip(*steps))


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
    envs = make_envs(args)
    policy = Policy(envs.single_observation_space, envs.single_action_space, args.init_std).to(args.device)
    policy_optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    batches = Batches(maxlen=args.num_batches)
    modules = dict(policy=policy, policy_optimizer=policy_optimizer, batches=batches)

    with Run(args, envs, [], **modules) as run:
        while run.step < args.total_timesteps and not run.interrupted:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            obs, _ = reset(envs, args, run.iteration)
            obs, actions, rewards, valid = rollout_episodes(envs, policy, obs, args.max_episode_steps)
            with torch.no_grad():
                batches.append((obs, actions, rewards, valid, policy(obs).log_prob(actions)))
            metrics = update_policy(policy, policy_optimizer, batches, args)
            b_obs = obs[valid]
            policy.net[0].update(b_obs)
            run.episode_returns += rewards.sum(0).tolist()
            run.log(len(b_obs), metrics)
        run.save()
    return TrainResult(policy, run.episode_returns, run.dir)


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=load_args(args.resume)) if args.resume else args)
