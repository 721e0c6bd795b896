"""Trust region policy optimization (TRPO), with GAE.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                           V(s_{t+1}) = 0 if s_{t+1} is terminal
    A_t     = delta_t + gamma lambda A_{t+1}                            stops at the end of an episode
    L       = E_t[ pi_theta(a_t|s_t) / pi_old(a_t|s_t) A_t ],  g = grad_theta L at pi_theta = pi_old
    F       = E_t[ Hessian_theta KL(pi_old(.|s_t) || pi_theta(.|s_t)) ]  at pi_theta = pi_old
    theta  += beta^j sqrt(2 max_kl / (g^T F^-1 g)) F^-1 g     j = 0, 1, ... until L improves at a KL <= max_kl

Schulman et al. 2015, "Trust Region Policy Optimization", arXiv:1502.05477.
Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", arXiv:1506.02438.

    python trpo.py --env-id CartPole-v1

Diff it with npg.py to see the surrogate and the line search.
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
from collections import namedtuple
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
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
    max_kl: float = 0.03
    """size of the trust region: KL(pi_old || pi) that a step is made for, to second order"""
    backtrack_coef: float = 0.8
    """beta, what each backtrack of the line search shortens the step by"""
    max_backtracks: int = 10
    """tries before the step is given up"""
    step_rule: Literal["kl", "fixed"] = "kl"
    """kl: the multiple of F^-1 g that is max_kl long; fixed: learning_rate times F^-1 g"""
    cg_iters: int = 10
    """conjugate gradient iterations, at most"""
    cg_tol: float = 1e-5
    """relative residual |F x - g| / |g| that ends them"""
    damping: float = 0.1
    """multiple of the identity added to F"""
    fisher_subsample: float = 1.0
    """share of the rollout that F is averaged over"""
    learning_rate: float = 0.1
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


def policy_loss(logprobs, old_logprobs, advantages):
    """-E_t[ pi(a_t|s_t) / pi_old(a_t|s_t) A_t ]  (TRPO, equation 14); (B,) each -> ()"""
    return -((logprobs - old_logprobs).exp() * advantages).mean()


def flat_grad(output, params, **kwargs):
    """Gradient of a scalar with respect to all parameters, as one vector; () -> (P,)"""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(output, params, **kwargs)])


def fisher_vector_product(grad_kl, params, v, damping):
    """(F + damping I) v from the graph of grad KL(pi_old || pi)  (TRPO, appendix C); (P,), (P,) -> (P,)"""
    # The KL is least, 0, where pi = pi_old: there it has no gradient, but it curves, and its Hessian
    # is F. Differentiating grad_kl . v gives F v without F.
    return flat_grad(grad_kl @ v, params, retain_graph=True) + damping * v


def conjugate_gradient(matvec, b, iters, tol, residuals=None):
    """Solve A x = b for a symmetric A >= 0, given v -> A v, until |A x - b| <= tol |b|; (P,) -> (P,)"""
    x, r, p = torch.zeros_like(b), b, b
    for _ in range(iters):
        Ap = matvec(p)
        if not 1e-15 * (p @ p) < p @ Ap < float("inf"):  # A does not curve along p
            break
        alpha = r @ r / (p @ Ap)
        x, r, old_r = x + alpha * p, r - alpha * Ap, r
        if residuals is not None:
            residuals.append(r.norm() / b.norm())
        if r.norm() <= tol * b.norm():
            break
        p = r + r @ r / (old_r @ old_r) * p
    return x


def natural_step_size(g, direction, max_kl):
    """sqrt(2 max_kl / (g . F^-1 g)): the step whose KL is max_kl to second order; direction F^-1 g (P,)"""
    return (2 * max_kl / (g @ direction).clamp_min(1e-30)).sqrt()


def gradient_step(optimizer, loss, max_grad_norm):
    """One step down the gradient of the loss, scaled down to max_grad_norm; raises FloatingPointError."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not norm.isfinite():
        raise FloatingPointError(f"gradient of norm {norm:g} of a loss of {loss:g}")
    optimizer.step()


def natural_step(policy, params, obs, loss, learning_rate, args):
    """The step along F^-1 g (P,), g = -grad loss, and what to log."""
    num_obs = round(args.fisher_subsample * len(obs)) or 1
    g, obs = -flat_grad(loss, params), obs[torch.randperm(len(obs), device=obs.device)[:num_obs]]
    with torch.no_grad():
        old_dist = policy(obs)
    grad_kl = flat_grad(kl_divergence(old_dist, policy(obs)).mean(), params, create_graph=True)
    matvec = partial(fisher_vector_product, grad_kl, params, damping=args.damping)
    residuals = [1.0]
    direction = conjugate_gradient(matvec, g, args.cg_iters, args.cg_tol, residuals)
    step_size = natural_step_size(g, direction, args.max_kl) if args.step_rule == "kl" else learning_rate
    step = step_size * direction
    kl = step @ fisher_vector_product(grad_kl, params, step, damping=0) / 2
    return step, {"cg_iterations": len(residuals) - 1, "cg_residual": residuals[-1], "predicted_kl": kl}


@torch.no_grad()
def line_search(evaluate, params, step, max_kl, backtrack_coef, max_backtracks):
    """Move params by the longest beta^j step, j < max_backtracks, that lowers the loss within the region.

    evaluate() -> (loss, kl); step (P,) -> whether params moved: if not, they are restored (TRPO, appendix C)
    """
    old_params, (old_loss, _) = nn.utils.parameters_to_vector(params), evaluate()
    for j in range(max_backtracks):
        nn.utils.vector_to_parameters(old_params + backtrack_coef**j * step, params)
        loss, kl = evaluate()
        if loss < old_loss and kl <= max_kl:  # false for what is not a number
            return True
    nn.utils.vector_to_parameters(old_params, params)
    return False


def update_policy(policy, remaining, obs, actions, advantages, args):
    """One step up the natural gradient of the surrogate, if it is accepted; returns what to log."""
    with torch.no_grad():
        old_dist = policy(obs)
        old_logprobs = old_dist.log_prob(actions)

    def evaluate():
        dist = policy(obs)
        loss = policy_loss(dist.log_prob(actions), old_logprobs, advantages)
        if args.ent_coef:
            loss = loss - args.ent_coef * dist.entropy().mean()
        return loss, kl_divergence(old_dist, dist).mean()

    loss, _ = evaluate()
    params = list(policy.parameters())
    step, step_metrics = natural_step(policy, params, obs, loss, args.learning_rate * remaining, args)
    accepted = line_search(evaluate, params, step, args.max_kl, args.backtrack_coef, args.max_backtracks)
    step_metrics["accepted"] = accepted
    with torch.no_grad():
        dist = policy(obs)
    metrics = {"policy_loss": loss.detach(), "entropy": dist.entropy().mean()}
    return metrics | {"kl": kl_divergence(old_dist, dist).mean(), **step_metrics}


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

    with Run(args, envs, recorder.return_queue, **modules) as run:
        next_obs, next_done = reset(envs, args, run.iteration)
        while run.step < args.total_timesteps and not run.interrupted:
            remaining = 1 - run.step / args.total_timesteps if args.anneal_lr else 1
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
            metrics = update_policy(policy, remaining, b_obs, b_actions, b_advantages, args)
            metrics |= update_value(value, value_optimizer, b_obs, b_returns, args)
            policy.net[0].update(b_obs)
            value.net[0].update(b_obs)
            run.log(len(b_obs), metrics)
        run.save()
    return TrainResult(policy, list(run.episode_returns), run.dir)


if __name__ == "__main__":
    args = tyro.cli(Args)
    train(tyro.cli(Args, default=load_args(args.resume)) if args.resume else args)
