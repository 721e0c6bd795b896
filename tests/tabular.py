"""Small finite-horizon MDPs whose trajectories are all enumerated, in float64: exact numbers, no sampling.

The tensors have the (T, N) layout of the scripts' rollouts, one trajectory per column, so that the scripts'
own functions apply to them: K trajectories, S states, A actions, O observations, P policy parameters.
"""

from collections import namedtuple

import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Categorical


class TabularPolicy(nn.Module):
    """pi(a|o) = softmax(theta[o]), called as the scripts' Policy is."""

    def __init__(self, num_obs, num_actions=2, seed=0):
        super().__init__()
        theta = np.random.RandomState(seed).normal(size=(num_obs, num_actions))
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, obs):  # (..., O), one-hot -> distribution with batch shape (...)
        return Categorical(logits=obs @ self.theta)


NAMES = "states obs actions rewards terminations dones valid dynamics"


class Trajectories(namedtuple("Trajectories", NAMES)):
    """One per column: states (T+1, K), obs (T+1, K, O), the others (T, K), but dynamics (K,), the factors of
    their probability that the policy has no part in. Past the end: valid False, reward 0, action 0, the state
    stays. The horizon is a truncation: dones, and not terminations, at T-1. What follows has the value 0."""

    def select(self, columns):
        return Trajectories(*(x[:, columns] for x in self[:-1]), self.dynamics[columns])


class TabularMDP:
    """start (S,) and P (S, A, S) are probabilities, r (S, A) rewards, ends (S, A, S) transitions that end the
    episode, observe (S, O) the observation of each state: states with equal rows are not told apart."""

    def __init__(self, start, P, r, ends, observe, horizon):
        self.start, self.P, self.r, self.ends = start, P, r, ends
        self.observe, self.horizon = observe, horizon
        self.trajectories = self.enumerate()

    def enumerate(self):
        S, A, T = len(self.start), self.r.shape[1], self.horizon
        grid = torch.cartesian_prod(*[torch.arange(S)] * (T + 1), *[torch.arange(A)] * T).T
        states, actions = grid[: T + 1], grid[T + 1 :]
        step = states[:-1], actions, states[1:]
        valid = torch.ones_like(actions, dtype=torch.bool)
        for t in range(1, T):
            valid[t] = valid[t - 1] & ~self.ends[step][t - 1]
        terminations = self.ends[step] & valid
        dones = terminations.clone()
        dones[-1] |= valid[-1]
        padded = (actions == 0) & (states[1:] == states[:-1])
        dynamics = self.start[states[0]] * self.P[step].where(valid, 1).prod(0)
        rewards = self.r[states[:-1], actions] * valid
        obs = self.observe[states]
        every = Trajectories(states, obs, actions, rewards, terminations, dones, valid, dynamics)
        return every.select((valid | padded).all(0) & (dynamics > 0))

    def logprobs(self, policy):
        """log pi(a_t|s_t) of every step, 0 where it is not valid; differentiable; (T, K)"""
        tr = self.trajectories
        return policy(tr.obs[:-1]).log_prob(tr.actions).where(tr.valid, 0)

    def log_ratios(self, policy, sampler):
        """log pi(a_t|s_t) - log sampler(a_t|s_t), 0 where not valid; (T, K)"""
        return self.logprobs(policy) - self.logprobs(sampler)

    def trajectory_probabilities(self, policy):
        """p(tau); differentiable; (K,)"""
        return self.trajectories.dynamics * self.logprobs(policy).sum(0).exp()

    def expectation(self, policy, f):
        """E[ f(tau) ]; differentiable; (K, ...) -> (...)"""
        return torch.tensordot(self.trajectory_probabilities(policy), f, 1)

    def discounts(self, gamma):
        """gamma^t; (T, 1)"""
        return gamma ** torch.arange(self.horizon, dtype=torch.float64)[:, None]

    def J(self, policy, gamma):
        """E[ sum_t gamma^t r_t ]; differentiable; ()"""
        return self.expectation(policy, (self.discounts(gamma) * self.trajectories.rewards).sum(0))

    def exact_gradient(self, policy, gamma):
        """grad J by automatic differentiation; (P,)"""
        return flat_gradient(self.J(policy, gamma), policy)

    @torch.no_grad()
    def exact_values(self, policy, gamma):
        """Exact V (T+1, S), with V_T = 0, Q (T, S, A) and advantages Q - V (T, S, A); all depend on t."""
        pi = policy(self.observe).probs
        V, Q = torch.zeros(self.horizon + 1, len(self.start), dtype=torch.float64), []
        for t in reversed(range(self.horizon)):
            Q.insert(0, self.r + gamma * (self.P * ~self.ends) @ V[t + 1])
            V[t] = (pi * Q[0]).sum(1)
        Q = torch.stack(Q)
        return V, Q, Q - V[:-1, :, None]

    @torch.no_grad()
    def state_distribution(self, policy):
        """p_t(s), the probability that the episode goes on at t and is in s; (T, S)"""
        transition = torch.einsum("sa,sax->sx", policy(self.observe).probs, self.P * ~self.ends)
        p = [self.start]
        for _ in range(1, self.horizon):
            p.append(p[-1] @ transition)
        return torch.stack(p)

    def along(self, table):
        """A table by (t, s) or (t, s, a) at every step; (T+1, S) -> (T+1, K), (T, S, A) -> (T, K)"""
        t, tr = torch.arange(len(table))[:, None], self.trajectories
        return table[t, tr.states] if table.ndim == 2 else table[t, tr.states[:-1], tr.actions]

    def step_scores(self, policy):
        """grad log pi(a_t|s_t) of every step, 0 where not valid; (T, K, P)"""
        tr = self.trajectories
        logprobs = policy(self.observe).logits.log_softmax(1)
        table = torch.stack([flat_gradient(x, policy) for x in logprobs.flatten()])
        table = table.unflatten(0, logprobs.shape)  # (S, A, P)
        return table[tr.states[:-1], tr.actions] * tr.valid[..., None]

    def scores(self, policy):
        """sum_t grad log pi(a_t|s_t); (K, P)"""
        return self.step_scores(policy).sum(0)

    def estimates(self, policy, weights):
        """sum_t weights_t grad log pi(a_t|s_t); (T, K) -> (K, P)"""
        return (weights[..., None] * self.step_scores(policy)).sum(0)

    def bias(self, policy, weights, gamma, sampler=None):
        """E[ estimate ] - grad J of the policy, on trajectories of the sampler (default: the policy); (P,)"""
        mean = moments(self.trajectory_probabilities(sampler or policy), self.estimates(policy, weights))[0]
        return mean - self.exact_gradient(policy, gamma)

    def covariance(self, policy, weights):
        """Covariance of the estimate from one trajectory; (P, P)"""
        return moments(self.trajectory_probabilities(policy), self.estimates(policy, weights))[1]

    def batch_mean(self, policy, estimator, num_episodes):
        """Mean (P,) over all K^N batches of an estimator: columns (N,), the trajectories of one -> (P,)"""
        K = len(self.trajectories.dynamics)
        batches = torch.cartesian_prod(*[torch.arange(K)] * num_episodes).reshape(-1, num_episodes)
        probabilities = self.trajectory_probabilities(policy).detach()[batches].prod(1)
        return probabilities @ torch.stack([estimator(columns) for columns in batches])


@torch.no_grad()
def moments(probabilities, x):
    """Mean (P,) and covariance (P, P) of x (K, P) that has probabilities (K,)."""
    mean = probabilities @ x
    return mean, (probabilities[:, None] * (x - mean)).T @ (x - mean)


def flat_gradient(output, policy):
    """() -> (P,)"""
    grads = torch.autograd.grad(output, list(policy.parameters()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def random_mdp(num_states, horizon, start=None, terminates=False, observation=None, num_actions=2, seed=0):
    """Fixed random tables. terminates: action 1 into the last state ends the episode; observation: for every
    state the index of what is seen of it (default: the state itself)."""
    rng = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    shape = num_states, num_actions
    P, r = rng.dirichlet(np.ones(num_states), shape), rng.normal(1, 1, shape)
    start = rng.dirichlet(np.ones(num_states)) if start is None else start
    ends = torch.zeros(*shape, num_states, dtype=torch.bool)
    ends[:, 1, -1] = terminates
    observe = nn.functional.one_hot(torch.tensor(observation or range(num_states))).double()
    start, P, r = (torch.tensor(x, dtype=torch.float64) for x in (start, P, r))
    return TabularMDP(start, P, r, ends, observe, horizon)


FULL = random_mdp(3, horizon=3)
TERMINATING = random_mdp(3, horizon=3, terminates=True)
HIDDEN = random_mdp(4, horizon=3, terminates=True, observation=[0, 0, 1, 1])
SMALL = random_mdp(2, horizon=2, start=[1.0, 0.0], terminates=True)  # for batches: K^N stays small
MDPS = {"full": FULL, "terminating": TERMINATING, "hidden": HIDDEN, "small": SMALL}


def policy_of(mdp, seed=0):
    return TabularPolicy(mdp.observe.shape[1], seed=seed)


def moved(policy, direction, h=1.0):
    """A TabularPolicy with theta + h direction."""
    other = TabularPolicy(*policy.theta.shape)
    other.theta.data = policy.theta.detach() + h * direction.detach().view_as(policy.theta)
    return other


def close(actual, expected=0.0, tolerance=1e-12):
    """Equal up to an absolute tolerance; a number is compared with every element."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=tolerance)
