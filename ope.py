"""Off-policy evaluation (OPE): how good is a policy, judged from the logs of another one alone?

Importance sampling reweights the logged returns: right on average, but its variance grows
exponentially with the horizon. Fitted Q evaluation (FQE) and a learned model extrapolate: stable,
but biased. Doubly robust estimates combine both. Where all agree, the number can be believed; a
verdict by stated rules (`verdict`) says whether.

Estimand: J = E_pi[ sum_{t<T} gamma^t r_t ], from n episodes logged by pi_b. Ratio rho_t =
pi(a_t|s_t) / pi_b(a_t|s_t), weight w_t = rho_0 ... rho_t, normalised weight w~_t = w_t / sum_i w_t.
  (1) IS      (1/n) sum_i w_{T-1} G,  G = sum_t gamma^t r_t                       [Precup et al.]
  (2) PDIS    (1/n) sum_i sum_t gamma^t w_t r_t                 per decision      [Precup et al.]
  (3) WIS     sum_i w~_{T-1} G                        weighted: biased, consistent, within the data
  (4) PDWIS   sum_t gamma^t sum_i w~_t r_t
  (5) DR      (1/n) sum_i [ V(s_0) + sum_t gamma^t w_t delta_t ]           [Jiang & Li, eq. 10]
              delta_t = r_t - Q(s_t, a_t) + gamma V(s_{t+1}),  V(s) = E_{a~pi} Q(s, a)
  (6) WDR     (1/n) sum_i V(s_0) + sum_t gamma^t sum_i w~_t delta_t        [Thomas & Brunskill]
  (7) MAGIC   sum_j x_j g_j,  g_j = (6) with only the steps t <= j         [Thomas & Brunskill]
              x = argmin over the simplex of x' (Omega + b b') x, Omega the covariance of g, b_j the
              distance of g_j from a 50% bootstrap interval of (6)
  (8) RIS     (1) with pi_b estimated from the same data                          [Hanna et al.]
  (9) FQE     Q_h(s, a) <- r + gamma (1 - terminal) E_{a'~pi} Q_{h-1}(s', a'), h steps to go,
              Q_0 = 0;  J = (1/n) sum_i V_T(s_0)                                     [Le et al.]
 (10) model   one network for s' - s, r and P(terminal); J = mean return of its rollouts under pi

Papers: Precup, Sutton, Singh 2000 (ICML); Jiang, Li 2016, arXiv 1511.03722; Thomas, Brunskill 2016,
arXiv 1604.00923; Hanna, Niekum, Stone 2019, arXiv 1806.01347; Le, Voloshin, Yue 2019, arXiv
1903.08738; lower bounds: Thomas, Theocharous, Ghavamzadeh 2015 (AAAI).

Not here: DualDICE (Nachum et al. 2019, arXiv 1906.04733), J = E_data[w r] / (1 - gamma) with the
ratio of occupancies w(s, a) = d_pi / d_data, the saddle point zeta of min_nu max_zeta
E_data[ (nu(s, a) - gamma (1 - terminal) nu(s', a')) zeta(s, a) - zeta^2 / 2 ]
- (1 - gamma) E[nu(s_0, a_0)].
No product over time and no pi_b, but a game of two networks, unstable beyond tables.

Symbols: n episodes, T horizon, M transitions, N batch, O observation, A action size (Box) or number
of actions (Discrete), E = 4 critics, K actions per state, counts (B, n): how often each episode
occurs in each of B bootstrap resamples.

Differs from the papers:
  D1 FQE's Q knows the steps to go and is (1 + gamma + ... + gamma^(h-1)) times a network: J has a
     horizon, and a network for the value per step need not first grow to the level of Q.
  D2 Q in (5)-(7) is cross-fitted: learned on the other half of the episodes.
  D3 MAGIC uses at most 25 of the g_j; its interval comes from the bootstrap alone.
  D4 HCOPE takes one cap for all episodes, chosen on a twentieth of them.

Written from the papers; no code taken from elsewhere. The built-in example, half a minute:

  python ope.py

Trained policies, ranked, with the truth beside the estimates:

  python ope.py --run runs/cql__... --run runs/bc__... --verify
"""

import importlib.util
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from torch import nn
from torch.distributions import Distribution, Normal
from tyro.conf import UseAppendAction


@dataclass
class Args:
    # What to evaluate, and on what
    run: UseAppendAction[tuple[str, ...]] = ()
    """folder of a training run, several are ranked; executes its copy of the source: only open
    runs that you trust"""
    policy: UseAppendAction[tuple[str, ...]] = ()
    """FILE.py:FUNCTION from a tensor of observations (N, O) to probabilities (N, A), or to a torch
    Distribution of actions (Box)"""
    policy_mode: Literal["stochastic", "deterministic"] = "stochastic"
    """whether the policy draws its actions or takes the most likely one, here and in --verify"""
    dataset_id: tuple[str, ...] = ()
    """Minari ids, mixed if several; built in {pendulum,cartpole}/{random,medium,expert,mixed}-v0"""
    env_id: str | None = None
    """Gymnasium environment for the evaluation; default: the one that the dataset names"""
    horizon: int | None = None
    """T, steps that count; default: as many as are known of every episode"""
    gamma: float = 0.99
    """discount"""
    resamples: int = 1_000
    """B, of the bootstrap over episodes; a tenth of it for MAGIC"""
    verify: bool = False
    """roll the policies out in the environment and print the true values beside the estimates"""
    verify_episodes: int = 1_000
    """episodes of --verify"""
    seed: int = 0
    """seed of the networks, the batches and the sampled actions"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu"""
    # Networks: FQE, the model, the estimated behaviour policy
    steps: int = 3_000
    """gradient updates"""
    batch_size: int = 256
    """transitions per update (N)"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of the hidden layers, for example 256 256"""
    lr: float = 3e-3
    """learning rate of all networks"""
    polyak: float = 0.2
    """rate of the target networks: Q' <- (1 - polyak) Q' + polyak Q"""
    action_samples: int = 4
    """K, actions per state that stand for the policy in E_{a~pi} (Box; exact for Discrete)"""


# Estimators on arrays: reward and ratio (n, T); after the end of an episode reward 0 and ratio 1,
# which carries its weight forward. With counts (B, n) they return the estimates (B,) of B resamples
# in which episode i occurs counts[b, i] times: so a bootstrap is a matrix product.


def importance_sampling(reward, ratio, gamma, per_decision=False, weighted=False, counts=None):
    """(1)-(4). Unweighted: unbiased if the ratios are exact and pi_b > 0 wherever pi > 0."""
    reward, ratio = as_arrays(reward, ratio)
    x, log_weight = discount(reward, gamma), log_weights(ratio)
    if not per_decision:  # an episode becomes one step: its return, its whole weight
        x, log_weight = x.sum(1, keepdims=True), log_weight[:, -1:]
    return per_call(weighted_sum(x, log_weight, weighted, or_once(counts, x)), counts)


def doubly_robust(reward, ratio, q, v, gamma, weighted=False, counts=None):
    """(5), (6) for q (n, T) at the logged actions and v (n, T + 1), both 0 after the end; where a
    log is merely cut, v at the cut may value the rest. Unbiased if ratio or q is exact."""
    reward, ratio, q, v = as_arrays(reward, ratio, q, v)
    delta, once = reward - q + gamma * v[:, 1:], or_once(counts, reward)
    correction = weighted_sum(discount(delta, gamma), log_weights(ratio), weighted, once)
    return per_call(once @ v[:, 0] / once.sum(1) + correction, counts)


def magic(reward, ratio, q, v, gamma, seed=0, steps=None, counts=None):
    """(7): trusts Q up to the step that the data can correct. `steps`: the j to choose from; (-1,)
    is the direct method, (T - 1,) is (6)."""
    reward, ratio, q, v = as_arrays(reward, ratio, q, v)
    if len(reward) < 2:
        raise UserError("MAGIC needs at least two episodes")
    end = max(1, *(((reward != 0) | (ratio != 1) | (q != 0)).any(0) * np.arange(1, len(q[0]) + 1)))
    delta = discount((reward - q + gamma * v[:, 1:])[:, :end], gamma)
    log_weight, rng = log_weights(ratio)[:, :end], np.random.default_rng(seed)
    weight = relative_weights(log_weight)
    steps = np.unique(np.linspace(-1, end - 1, 25).astype(int)) if steps is None else steps
    estimates = []
    for count in or_once(counts, reward):
        n, total = count.sum(), count @ weight
        if (total == 0).any():  # a resample without overlap
            estimates.append(np.nan)
            continue
        terms = np.column_stack([v[:, 0] / n, weight / total * delta])
        terms = terms.cumsum(1)[:, np.array(steps) + 1]  # (n, J), what an episode adds to each g_j
        g = count @ terms
        inner = rng.multinomial(int(n), count / n, 200).astype(float)  # B of the 50% interval
        wdr = inner @ v[:, 0] / n + weighted_sum(delta, log_weight, True, inner)
        bias = g - g.clip(*np.nanquantile(wdr, [0.25, 0.75]))
        omega = n * np.atleast_2d(np.cov(terms.T, fweights=count.astype(int)))
        estimates.append(simplex_argmin(omega + np.outer(bias, bias)) @ g)
    return per_call(np.array(estimates), counts)


def effective_sample_size(ratio):
    """(sum w)^2 / sum w^2 of the whole episodes: n equally weighted ones would say as much."""
    log_weight = log_weights(as_arrays(np.zeros_like(ratio, np.float64), ratio)[1])[:, -1]
    if log_weight.max() == -np.inf:
        return 0.0
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (weight**2).sum())


def bootstrap_interval(estimator, *arrays, level=0.95, resamples=1000, seed=0):
    """(low, high), percentiles of estimator(*arrays) over resampled episodes, axis 0 of the arrays.
    The functions above, gamma bound by functools.partial, take all resamples at once, any other
    estimator one by one. Resamples without overlap have no estimate and are left out."""
    n = len(arrays[0])
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    if "counts" in inspect.signature(estimator).parameters:
        values = estimator(*arrays, counts=counts.astype(np.float64))
    else:
        values = np.full(resamples, np.nan)
        for b, count in enumerate(counts):
            episodes = np.repeat(np.arange(n), count)
            with suppress(UserError):
                values[b] = estimator(*(np.asarray(x)[episodes] for x in arrays))
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def student_t_bound(x, confidence=0.95):
    """Lower bound of the mean of i.i.d. x (n,), if their mean is nearly normal:
    mean - t_{confidence, n-1} S / sqrt(n)."""
    x, n = np.asarray(x, np.float64), len(x)
    theta = (np.arange(100_000) + 0.5) / 100_000 * np.pi - np.pi / 2  # t = sqrt(n - 1) tan(theta),
    cdf = (np.cos(theta) ** (n - 2)).cumsum()  # where theta has a density ~ cos(theta)^(n - 2)
    quantile = np.sqrt(n - 1) * np.tan(np.interp(confidence, cdf / cdf[-1], theta))
    return float(x.mean() - quantile * x.std(ddof=1) / np.sqrt(n))


def bernstein_bound(x, cap, confidence=0.95, n=None):
    """Empirical Bernstein lower bound of the mean of i.i.d. x >= 0, without any other assumption:
    y = min(x, cap) only lowers the mean; with S^2 = var(y), l = log(2 / (1 - confidence)),
    mean(y) - sqrt(2 S^2 l / n) - 7 cap l / (3 (n - 1))."""
    y, n = np.minimum(x, cap), n or len(x)
    log_term = math.log(2 / (1 - confidence))
    width = math.sqrt(2 * y.var(ddof=1) * log_term / n) + 7 * cap * log_term / (3 * (n - 1))
    return float(y.mean() - width)


def hcope_bound(x, confidence=0.95, seed=0):
    """bernstein_bound with the best cap as judged by a twentieth of the episodes, for the rest [D4,
    Thomas et al. 2015]. x (n,) >= 0: what each episode adds to (1) or (2)."""
    x = np.random.default_rng(seed).permutation(np.asarray(x, np.float64))
    if len(x) < 40 or x.min() < 0:
        raise UserError("the bound needs at least 40 episodes with contributions >= 0")
    held, rest = np.split(x, [max(10, len(x) // 20)])
    cap = max(held, key=lambda c: bernstein_bound(held, c, confidence, n=len(rest)))
    return bernstein_bound(rest, cap, confidence)


def weighted_sum(x, log_weight, weighted, counts):
    """sum_t sum_i w_t x_t / n, or / sum_i w_t, for x, log w (n, T) under each of counts (B, n)."""
    if weighted:
        weight = relative_weights(log_weight)
        with np.errstate(invalid="ignore"):  # 0 / 0 in a resample without overlap: NaN
            return ((counts @ (weight * x)) / (counts @ weight)).sum(1)
    if log_weight.max() > 700:
        raise UserError("the weights exceed 1e304: the horizon is too long for unweighted ratios")
    return counts @ (np.exp(log_weight) * x).sum(1) / counts.sum(1)


def relative_weights(log_weight):
    """w (n, T), in each step relative to the largest, which normalised weights do not notice."""
    largest = log_weight.max(0)
    if largest.min() == -np.inf:
        step = int(largest.argmin())
        raise UserError(f"no overlap: no logged episode follows the policy beyond step {step}")
    return np.exp(log_weight - largest)


def log_weights(ratio):
    """log w_t (n, T): in logarithms a thousand ratios neither overflow nor vanish."""
    with np.errstate(divide="ignore"):  # an action that the policy never takes: log 0 = -inf
        return np.log(ratio).cumsum(1)


def discount(x, gamma):
    return x * gamma ** np.arange(x.shape[1])


def or_once(counts, x):
    return np.ones((1, len(x))) if counts is None else np.asarray(counts, np.float64)


def per_call(estimates, counts):
    return float(estimates[0]) if counts is None else estimates


class Critic(nn.Module):
    """E critics side by side. obs (E, N, O), action (E, N, A), h (E, N) -> Q_h(s, a) (E, N)."""

    def __init__(self, members, log, args):
        super().__init__()
        steps = log.gamma ** torch.arange(log.horizon, dtype=torch.float64)
        annuity = F.pad(steps.cumsum(0), (1, 0))  # 0, 1, 1 + gamma, ...: of h = 0, 1, 2, ... steps
        self.register_buffer("annuity", annuity.float())
        self.standardize = Standardize(log.obs)
        sizes = log.obs.shape[1] + log.action.shape[1] + 1, *args.hidden, 1
        self.net = MLP(members, *sizes)

    def forward(self, obs, action, h):
        value = self.annuity[h]
        x = torch.cat([self.standardize(obs), action, (value / self.annuity[-1])[..., None]], -1)
        return value * self.net(x)[..., 0]


def fit_q(log, policy, args):
    """(9) -> Critic with two members for each fold, learned on the other fold's episodes [D2]."""
    folds = [torch.nonzero(log.fold[log.data.episode] != k)[:, 0] for k in (0, 1)]
    if not all(map(len, folds)):
        raise UserError("at least two episodes are needed")
    next_action, next_weight = policy.support(log.data.all.next_obs)  # (M, K, A), (M, K)
    reward, terminal = log.data.all.reward, log.data.all.terminal
    low, high = reward.min().clamp(max=0), reward.max().clamp(min=0)
    critic = Critic(4, log, args).to(reward.device)
    critic_target = deepcopy(critic)
    optimizer, size = adam(critic.parameters(), args.lr), (2 * args.batch_size,)
    for update in range(args.steps):
        i = torch.cat([f[torch.randint(len(f), size, device=f.device)] for f in folds])
        i = i.view(4, args.batch_size)
        h = torch.randint(1, log.horizon + 1, i.shape, device=i.device)
        annuity = critic.annuity[h]
        with torch.no_grad():
            v = state_value(critic_target, log.next_obs[i], next_action[i], next_weight[i], h - 1)
            y = reward[i] + log.gamma * (1 - terminal[i]) * v
            y = y.clamp(low * annuity, high * annuity)
        error = (critic(log.obs[i], log.action[i], h) - y) / annuity
        assert error.shape == (4, args.batch_size)
        anneal(optimizer, args, update)
        step(optimizer, (error**2).mean(1).sum())
        polyak_update(critic_target, critic, args.polyak)
    return critic_target


def state_value(critic, obs, action, weight, h):
    """V_h(s) = E_{a~pi} Q_h(s, a): obs (E, N, O), action (E, N, K, A), its weight (E, N, K) and h
    (E, N) -> (E, N)."""
    E, N, K = weight.shape
    obs, h = (x.repeat_interleave(K, 1) for x in (obs, h))
    return (weight * critic(obs, action.flatten(1, 2), h).view(E, N, K)).sum(-1)


class Model(nn.Module):
    """(10): one network for s' - s, r and the logit of P(terminal)."""

    def __init__(self, log, args):
        super().__init__()
        self.standardize, change = Standardize(log.obs), log.next_obs - log.obs
        self.change = Standardize(torch.cat([change, log.data.all.reward[:, None]], 1))
        self.low, self.high = (f(log.next_obs, 0).values for f in (torch.min, torch.max))
        obs_dim, action_dim = log.obs.shape[1], log.action.shape[1]
        self.net = MLP(1, obs_dim + action_dim, *args.hidden, obs_dim + 2)

    def forward(self, obs, action):
        """Standardised s' - s and r (N, O + 1), logit (N,)."""
        y = self.net(torch.cat([self.standardize(obs), action], -1))[0]
        return y[:, :-1], y[:, -1]

    def fit(self, log, args):
        optimizer, terminal = adam(self.parameters(), args.lr), log.data.all.terminal
        change = torch.cat([log.next_obs - log.obs, log.data.all.reward[:, None]], 1)
        for update in range(args.steps):
            i = torch.randint(len(change), (args.batch_size,), device=change.device)
            predicted, logit = self(log.obs[i], log.action[i])
            error = predicted - self.change(change[i])
            assert error.shape == change[i].shape and logit.shape == i.shape
            anneal(optimizer, args, update)
            ended = F.binary_cross_entropy_with_logits(logit, terminal[i])
            step(optimizer, (error**2).mean(1).mean() + ended)
        return self

    @torch.no_grad()
    def rollout(self, log, policy):
        """Discounted returns (n,) from the logged initial states; a path that may have ended counts
        with the probability that it has not."""
        obs, value, alive = log.obs[log.index[:, 0]], 0.0, 1.0
        for t in range(log.horizon):
            action = log.vector(log.data.units.action(policy.act(obs)))
            predicted, logit = self(obs, action)
            change = self.change.inverse(predicted)
            value = value + log.gamma**t * alive * change[:, -1].double()
            alive = alive * (1 - logit.double().sigmoid() * log.data.all.terminal.max())
            obs = (obs + change[:, :-1]).clamp(self.low, self.high)
        return value.cpu().numpy()


class DiscreteBehavior(nn.Module):
    """pi_b(a|s) by a softmax: log_prob of obs (N, O), action (N,)."""

    def __init__(self, log, args):
        super().__init__()
        self.standardize = Standardize(log.obs)
        self.net = MLP(1, log.obs.shape[1], *args.hidden, log.action.shape[1])

    def log_prob(self, obs, action):
        return pick(self.net(self.standardize(obs))[0].log_softmax(1), action)


class BoxBehavior(nn.Module):
    """pi_b(a|s) by a mixture of five Gaussians, squashed by tanh: logs of several policies, or of
    one with added noise, are no single Gaussian. log_prob of obs (N, O), action (N, A)."""

    def __init__(self, log, args):
        super().__init__()
        self.standardize = Standardize(log.obs)
        self.net = MLP(1, log.obs.shape[1], *args.hidden, 5 * (1 + 2 * log.action.shape[1]))

    def log_prob(self, obs, action):
        action = action.clamp(-1 + 1e-4, 1 - 1e-4)
        N, A = action.shape
        y = self.net(self.standardize(obs))[0].view(N, 5, 1 + 2 * A)
        logit, mean, log_std = y.split([1, A, A], -1)
        normal = Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)
        log_normal = normal.log_prob(action.atanh()[:, None]).sum(-1)  # (N, 5)
        log_slope = (1 - action**2).log().sum(-1)
        return (logit[..., 0].log_softmax(-1) + log_normal).logsumexp(-1) - log_slope


def fit_behavior(log, args):
    """Maximum likelihood with early stopping on a tenth of the transitions -> log pi_b (M,) in
    network units, float64."""
    obs, action = log.obs, log.data.all.action
    behavior = (DiscreteBehavior if log.data.units.discrete else BoxBehavior)(log, args)
    behavior = behavior.to(obs.device)
    held, train = torch.randperm(len(obs), device=obs.device).tensor_split([len(obs) // 10])
    optimizer, best, best_loss = adam(behavior.parameters(), args.lr), None, math.inf
    for update in range(args.steps):
        i = train[torch.randint(len(train), (args.batch_size,), device=obs.device)]
        log_prob = behavior.log_prob(obs[i], action[i])
        assert log_prob.shape == i.shape
        anneal(optimizer, args, update)
        step(optimizer, -log_prob.mean())
        if update % 100 == 99 or update == args.steps - 1:
            with torch.no_grad():
                loss = -behavior.log_prob(obs[held], action[held]).mean().item()
            if not loss >= best_loss:  # also when no transition is held out: NaN
                best, best_loss = deepcopy(behavior), loss
    with torch.no_grad():
        return chunked(best.log_prob, obs, action).double().cpu().numpy()


class Estimate(NamedTuple):
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seconds: float = math.nan
    reason: str = ""  # why there is no value


class Report(NamedTuple):
    """What is known of one policy."""

    name: str
    setting: str  # what is estimated
    estimates: dict  # {estimator's name: Estimate}
    ess: float  # of n
    n: int
    return_std: float  # of the logged returns, discounted up to the horizon
    weights: tuple  # mean of w_{T-1}, its standard error, share of the largest
    bounds: tuple  # lower bounds of J, Student t and HCOPE; empty where there are no ratios
    notes: tuple
    truth: tuple | None  # mean, standard error


WEIGHTED = ["IS", "PDIS", "WIS", "PDWIS", "RIS", "DR", "WDR", "MAGIC"]  # those that use ratios


def evaluate_policy(policy, log, args):
    """All estimates of a policy's value -> Report."""
    estimates, learning, ess, weights, bounds = {}, {}, 0.0, (math.nan,) * 3, ()

    def estimate(name, estimator, *arrays, resamples=args.resamples):
        began = time.perf_counter()
        try:
            value = estimator(*arrays)
            interval = bootstrap_interval(estimator, *arrays, resamples=resamples, seed=args.seed)
        except UserError as error:
            estimates[name] = Estimate(reason=str(error))
        else:
            seconds = time.perf_counter() - began
            estimates[name] = Estimate(value, *interval, seconds + learning.get(name, 0.0))

    began = time.perf_counter()
    critic = fit_q(log, policy, args)
    q, v, members = cross_fitted(log, policy, critic)
    learning["FQE"] = time.perf_counter() - began
    began = time.perf_counter()
    model_returns = log.model.rollout(log, policy)
    learning["model"] = log.model_seconds + time.perf_counter() - began
    learning["RIS"] = log.behavior_seconds
    if not (np.isfinite(members).all() and np.isfinite(model_returns).all()):
        raise UserError(f"{policy.name}: FQE or the model diverged; a smaller --lr may help")
    reason = policy.no_density
    if not reason:
        log_pi = policy.log_prob(log.obs, log.data.all.action)
        ratio = log.ratio(log_pi, log.behavior_log_prob)
        ess, weights = effective_sample_size(ratio), weight_summary(ratio)
        if ess == 0:
            reason = "no overlap: no logged episode follows the policy up to the horizon"
    if not reason:
        IS = partial(importance_sampling, gamma=args.gamma)
        DR = partial(doubly_robust, gamma=args.gamma)
        MAGIC = partial(magic, gamma=args.gamma, seed=args.seed)
        estimate("IS", IS, log.reward, ratio)
        estimate("PDIS", partial(IS, per_decision=True), log.reward, ratio)
        estimate("WIS", partial(IS, weighted=True), log.reward, ratio)
        estimate("PDWIS", partial(IS, per_decision=True, weighted=True), log.reward, ratio)
        estimate("RIS", IS, log.reward, log.ratio(log_pi, log.estimated_log_prob))
        estimate("DR", DR, log.reward, ratio, q, v)
        estimate("WDR", partial(DR, weighted=True), log.reward, ratio, q, v)
        estimate("MAGIC", MAGIC, log.reward, ratio, q, v, resamples=max(10, args.resamples // 10))
        bounds = lower_bounds(log, ratio)
    else:
        estimates = {name: Estimate(reason=reason) for name in WEIGHTED}
    estimate("FQE", fqe_value, members)
    estimate("model", mean_value, model_returns)
    truth = true_value(policy, log, args) if args.verify else None
    notes = (*log.notes, *policy.notes)
    setting = f"T = {log.horizon} steps, gamma = {log.gamma}, {args.policy_mode} policy"
    return_std = discount(log.reward, log.gamma).sum(1).std()
    size = ess, log.n, return_std
    return Report(policy.name, setting, estimates, *size, weights, bounds, notes, truth)


def cross_fitted(log, policy, critic):
    """Q (n, T) and V (n, T + 1) by the members that have not seen the episode [D2], 0 after its
    end; and V_T(s_0) (n, 4) by every member."""
    action, weight = policy.support(log.obs)
    fold = log.fold[log.data.episode]
    h = (log.horizon - log.step).clamp(min=0)  # beyond the horizon: 0 steps to go, not used

    def values(obs, vector, action, weight, h):  # (M, 4, 2): Q and V of every member
        obs, vector, h = (x.expand(4, *x.shape) for x in (obs, vector, h))
        action, weight = (x.expand(4, *x.shape) for x in (action, weight))
        both = critic(obs, vector, h), state_value(critic, obs, action, weight, h)
        return torch.stack(both, -1).transpose(0, 1)

    with torch.no_grad():
        all_members = chunked(values, log.obs, log.action, action, weight, h)
    halves = all_members.view(-1, 2, 2, 2).mean(2)  # (M, fold, Q and V)
    unseen = halves[torch.arange(len(halves), device=fold.device), fold].double().cpu().numpy()
    q, v = log.padded(unseen[:, 0]), log.padded(unseen[:, 1])
    return q, np.pad(v, ((0, 0), (0, 1))), all_members[log.index[:, 0], :, 1].double().cpu().numpy()


def fqe_value(members, counts=None):
    """Mean of V_T(s_0) (n, 4) over the episodes; its bootstrap also resamples the members, the only
    trace of the error of Q itself: the interval is too narrow where all four err alike."""
    if counts is None:
        return float(members.mean())
    drawn = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), len(counts)) / 4
    return (counts @ members / len(members) * drawn).sum(1)


def mean_value(x, counts=None):
    """Mean of (n,), over initial states: knows nothing of the model's own error."""
    return per_call(or_once(counts, x) @ x / len(x), counts)


def true_value(policy, log, args):
    """Mean and standard error over fresh episodes: same horizon, discount and policy mode."""

    def make_env():
        return Discounted(log.data.make_env(), log.gamma, log.horizon)

    returns = evaluate(policy, make_env, args.verify_episodes)
    return returns.mean(), returns.std(ddof=1) / math.sqrt(len(returns))


def verdict(report):
    """One line, by these rules. Two estimates agree if their 95% intervals overlap, or if they are
    less than a tenth of the deviation of the logged returns apart: intervals know not all errors.
    PDWIS, WDR, FQE and the model speak for their families.
      1. No ratios: at best a hint, if FQE and the model agree.
      2. Effective sample size below 10 or one episode above half of the weight: ratios say nothing.
         At best a hint, as in 1.
      3. The mean weight is more than 3 standard errors from 1: the logs miss some of what it does,
         or pi_b is wrong; ratios say nothing.
      4. PDWIS, WDR and FQE all agree: believe WDR, with care if the size is below 50.
      5. Only PDWIS and WDR agree, size at least 50: believe WDR with care, not FQE.
      6. Otherwise nothing."""
    by_name, size = report.estimates, f"effective sample size {report.ess:.0f} of {report.n}"
    names = [k for k in ("PDWIS", "WDR", "FQE", "model") if not by_name[k].reason]
    apart = [
        (a, b)
        for a, b in combinations(names, 2)
        if max(by_name[a].low, by_name[b].low) > min(by_name[a].high, by_name[b].high)
        and abs(by_name[a].value - by_name[b].value) > 0.1 * report.return_std
    ]
    disagree = "; ".join(f"{a} and {b}" for a, b in apart)
    disagree = f"{disagree} disagree by more than their intervals" if apart else "all agree"
    mean, error, largest = report.weights
    if "WDR" not in names:
        problem = by_name["WDR"].reason
    elif report.ess < 10 or largest > 0.5:
        problem = f"{size}, the largest weight {largest:.0%} of all"
    elif abs(mean - 1) > 3 * error:
        problem = f"weights average {mean:.2f}, not 1: logs lack what it does, or pi_b is wrong"
    else:
        wdr = f"{by_name['WDR'].low:.4g} to {by_name['WDR'].high:.4g}"
        apart = [pair for pair in apart if "model" not in pair]
        if not apart:
            care = "believe WDR" if report.ess >= 50 else "believe WDR with care"
            return f"{disagree}, {size}: {care}, {wdr}."
        if ("PDWIS", "WDR") not in apart and report.ess >= 50:
            return f"{disagree}, {size}: believe WDR with care, {wdr}, and not FQE."
        return f"{disagree}, {size}: do not trust any of these."
    if ("FQE", "model") in apart:
        return f"{disagree}, {problem}: do not trust any of these."
    return f"{problem}; FQE and the model agree, unchecked by ratios: a hint, no more."


def spearman(x, y):
    """Correlation of the ranks, ties sharing theirs; NaN if all of x or y are equal."""

    def rank(z):
        return (z[:, None] > z).sum(1) + 0.5 * (z[:, None] == z).sum(1)

    ranks = [rank(np.asarray(z)) for z in (x, y)]
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks)[0, 1])


def regret(truth, estimate, k=1):
    """How much worse the best of the k that look best is than the best, as a share of the range."""
    truth, best = np.asarray(truth), np.argsort(estimate)[-k:]
    return float((truth.max() - truth[best].max()) / (np.ptp(truth) or 1.0))


def main(args: Args) -> dict:
    """Prints a table and a verdict for each policy, and a ranking; returns {name: Report}."""
    check_args(args)
    device = pick_device(args.device)
    if not (args.run or args.policy):
        args = replace(args, verify=True, horizon=args.horizon or 50)
    data, policies = load(args, device) if args.run or args.policy else example(args, device)
    if args.verify and data.make_env is None:
        raise UserError("--verify needs an environment: --env-id gives one")
    torch.manual_seed(args.seed)
    log = Log(data, args, policies)
    reports = [evaluate_policy(policy, log, args) for policy in policies]
    for report in reports:
        print_report(report)
    if len(reports) > 1:
        print_ranking(reports)
    return {report.name: report for report in reports}


# ---- Plumbing, the same in every file: a reader of the method can stop here ----


class Log:
    """The logged episodes: transitions (M, ...) in raw observations for the networks, arrays (n, T)
    padded after the end for the estimators; and what is learned once for all policies."""

    def __init__(self, data, args, policies=()):
        self.data, self.gamma, self.notes, self.behavior_seconds = data, args.gamma, (), 0.0
        self.obs, self.next_obs = data.all.obs, data.all.next_obs
        self.action = self.vector(data.all.action)
        length = torch.bincount(data.episode).cpu().numpy()
        end = length.cumsum()
        self.n, start = len(length), torch.as_tensor(end - length, device=self.obs.device)
        terminated = data.all.terminal.cpu().numpy()[end - 1] == 1
        self.horizon = known_steps(length, terminated, args.horizon)
        self.step = torch.arange(len(self.obs), device=start.device) - start[data.episode]
        self.fold = torch.randperm(self.n, device=start.device) % 2
        self.inside = np.arange(self.horizon) < length[:, None]
        index = start[:, None] + torch.arange(self.horizon, device=start.device)
        self.index = index.clamp(max=len(self.obs) - 1)
        self.reward = self.padded(data.all.reward.double().cpu().numpy())
        value = discount(self.reward, self.gamma).sum(1).mean()
        print(f"{self.n} episodes: in T = {self.horizon} steps, discounted by {self.gamma}, the "
              f"logged policy earned {value:.4g}")  # fmt: skip
        if any(not policy.no_density for policy in policies):
            self.learn_behavior(args)
        began = time.perf_counter()
        self.model = Model(self, args).to(self.obs.device).fit(self, args)
        self.model_seconds = time.perf_counter() - began

    def vector(self, action):
        """Actions as networks take them in: (M, A), one-hot for Discrete."""
        units = self.data.units
        return F.one_hot(action, units.action_dim).float() if units.discrete else action

    def padded(self, x, after=0.0):
        """(M,) -> (n, T)"""
        return np.where(self.inside, x[self.index.cpu().numpy()], after)

    def ratio(self, log_pi, log_behavior):
        with np.errstate(over="ignore"):  # infinite: as_arrays says where
            return np.exp(self.padded(log_pi - log_behavior))

    def learn_behavior(self, args):
        """log pi_b (M,): as logged, where it was; and estimated, for RIS and for the rest."""
        began = time.perf_counter()
        logged, units = self.data.behavior_log_prob, self.data.units
        self.estimated_log_prob = fit_behavior(self, args)
        if not units.discrete:  # a density per unit of [-1, 1] -> per unit of the environment
            self.estimated_log_prob -= units.half_range.log().sum().item()
        wrong = (logged == -np.inf) | (units.discrete & (logged > 1e-6))
        if wrong.any():
            i = wrong.argmax()
            where = f"episode {self.data.episode[i].item()}, step {self.step[i].item()}"
            what = "zero probability of" if logged[i] < 0 else "a probability above 1 for"
            raise UserError(f"{where}: behavior_log_prob gives {what} the logged action")
        self.behavior_log_prob = np.where(np.isnan(logged), self.estimated_log_prob, logged)
        missing = np.isnan(logged).mean()
        note = f"behaviour policy estimated from the data for {missing:.0%} of the steps"
        self.notes = (note if missing else "behaviour policy as logged",)
        self.behavior_seconds = time.perf_counter() - began


class Discounted(gym.Wrapper):
    """Rewards times gamma^t up to the horizon: their sum is what the estimators estimate."""

    def __init__(self, env, gamma, horizon):
        super().__init__(env)
        self.gamma, self.horizon = gamma, horizon

    def reset(self, **kwargs):
        self.t = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward, self.t = reward * self.gamma**self.t, self.t + 1
        return obs, reward, terminated, truncated or self.t >= self.horizon, info


class DiscretePolicy:
    """A policy by its probabilities (N, A) of raw observations (N, O). Actions: int64 from 0, but
    the environment's in `act`."""

    no_density = ""

    def __init__(self, name, function, units, args, notes=()):
        self.name, self.function, self.units, self.notes = name, function, units, notes
        self.greedy = args.policy_mode == "deterministic"

    @torch.no_grad()
    def probabilities(self, obs):
        p, shape = self.function(raw(obs)), (len(obs), self.units.action_dim)
        p = torch.as_tensor(p, dtype=torch.float64, device=self.units.obs_mean.device)
        if p.shape != shape:
            raise UserError(f"{self.name}: probabilities of shape {tuple(p.shape)}, not {shape}")
        bad = ~((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-4))  # True for NaN
        if bad.any():
            row = p[bad][0].tolist()
            raise UserError(f"{self.name}: probabilities {row} are not >= 0 with the sum 1")
        return F.one_hot(p.argmax(1), shape[1]).double() if self.greedy else p / p.sum(1, True)

    def act(self, obs):
        return self.units.env_action(torch.multinomial(self.probabilities(obs), 1)[:, 0])

    def log_prob(self, obs, action):
        return pick(chunked(self.probabilities, obs), action).log().cpu().numpy()

    def support(self, obs):
        """Actions (N, K, A) and weights (N, K) that make up E_{a~pi}: all actions, one-hot."""
        p = chunked(self.probabilities, obs).float()
        return torch.eye(p.shape[1], device=p.device).expand(len(p), -1, -1), p


class BoxPolicy:
    """A policy by a function that draws environment actions (N, ...) and one for their log-density
    (N,), for raw observations (N, O); the latter None where there is none, for the reason given."""

    def __init__(self, name, draw, density, units, args, notes=(), no_density=""):
        self.name, self.draw, self.density, self.units = name, draw, density, units
        self.notes, self.no_density = notes, no_density
        if args.policy_mode == "deterministic":
            self.no_density = "a deterministic policy with continuous actions has no density"
        self.samples = 1 if args.policy_mode == "deterministic" else args.action_samples

    @torch.no_grad()
    def act(self, obs):
        action, space = np.asarray(self.draw(raw(obs))), self.units.action_space
        if action.size != len(obs) * self.units.action_dim:
            raise UserError(f"{self.name}: actions of shape {action.shape} do not fit {space}")
        if not np.isfinite(action).all():
            raise UserError(f"{self.name}: an action is NaN or infinite")
        return action.reshape(len(obs), *space.shape).clip(space.low, space.high)

    @torch.no_grad()
    def log_prob(self, obs, action):
        def density(obs, action):
            return torch.as_tensor(self.density(raw(obs), self.units.env_action(action)))

        log_prob = chunked(density, obs, action).double().cpu().numpy()
        if log_prob.shape != (len(obs),) or np.isnan(log_prob).any() or log_prob.max() == np.inf:
            raise UserError(f"{self.name}: the log-density of a logged action is not a number")
        return log_prob

    def support(self, obs):
        """Actions (N, K, A) and weights (N, K) that stand for E_{a~pi}: samples."""
        draws = [
            chunked(lambda x: self.units.action(self.act(x)), obs) for _ in range(self.samples)
        ]
        actions = torch.stack(draws, 1)
        return actions, torch.full_like(actions[..., 0], 1 / self.samples)


def raw(obs):
    return torch.as_tensor(obs, dtype=torch.float32, device="cpu")


def load(args, device):
    """The policies of --run and --policy, and the data -> (Data, [policy])."""
    runs = [load_run(folder, device) for folder in args.run]
    trained_on = {tuple(its["dataset_id"]) for _, its in runs}
    if not args.dataset_id and len(trained_on) != 1:
        which = "the runs have different ones" if runs else "--policy has none of its own"
        raise UserError(f"--dataset-id is needed: {which}")
    dataset_id = args.dataset_id or next(iter(trained_on))
    env_id = args.env_id or next((its["env_id"] for _, its in runs), None)
    data = load_dataset(dataset_id, env_id, False, 1.0, 0.0, device)
    policies = []
    for folder, (agent, its) in zip(args.run, runs, strict=True):
        if (agent.units.observation_space, agent.units.action_space) != (
            data.units.observation_space,
            data.units.action_space,
        ):
            raise UserError(f"--run {folder}: its spaces are not those of the data")
        seen = set(its["dataset_id"]) & set(dataset_id)
        notes = ("trained on these logs, so its estimates are optimistic",) if seen else ()
        policies.append(run_policy(folder, agent, data.units, args, notes))
    for name in args.policy:
        policies.append(user_policy(name, load_function(name), data.units, args))
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise UserError("the same --run or --policy is given twice")
    return data, policies


def run_policy(name, agent, units, args, notes):
    if units.discrete:
        return DiscretePolicy(
            name, lambda obs: agent.probabilities(obs.numpy()), units, args, notes
        )
    deterministic = args.policy_mode == "deterministic"
    reason = "" if agent.has_density else "this algorithm's policy has no density"
    return BoxPolicy(
        name,
        lambda obs: agent.act(obs.numpy(), deterministic=deterministic),
        lambda obs, action: agent.log_prob(obs.numpy(), action),
        units,
        args,
        notes,
        reason,
    )


def user_policy(name, function, units, args):
    if units.discrete:
        return DiscretePolicy(name, function, units, args)

    def distribution(obs):
        pi = function(obs)
        if not isinstance(pi, Distribution):
            raise UserError(f"{name}: returns {type(pi).__name__}, not a torch Distribution")
        return pi

    def draw(obs):
        pi = distribution(obs)
        if args.policy_mode == "stochastic":
            return pi.sample()
        try:
            return pi.mode
        except NotImplementedError as error:
            problem = "--policy-mode deterministic needs a distribution with a mode"
            raise UserError(f"{name}: {problem}") from error

    def density(obs, action):
        log_prob = distribution(obs).log_prob(torch.as_tensor(action))
        return log_prob.reshape(len(obs), -1).sum(1)

    return BoxPolicy(name, draw, density, units, args)


def import_file(path, name):
    """A module under a name of its own, known to sys.modules before it runs (dataclasses ask)."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_run(folder, device):
    """(agent, args as a dict) of a training run, by the source that was saved there."""
    folder = Path(folder)
    sources = list(folder.glob("*.py"))
    if len(sources) != 1 or not (folder / "args.json").exists():
        raise UserError(f"--run {folder}: not the folder of a training run")
    name = f"{sources[0].stem}_of_" + re.sub(r"\W", "_", str(folder.resolve()))
    module = import_file(sources[0], name)
    try:
        agent = module.load_policy(folder, device)
    except module.UserError as error:
        raise UserError(f"--run {error}") from error
    return agent, json.loads((folder / "args.json").read_text())["args"]


def load_function(name):
    """FILE.py:FUNCTION -> the function."""
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--policy {name}: FILE.py:FUNCTION is needed, and there is no file {path}")
    module = import_file(path, "policy_of_" + re.sub(r"\W", "_", str(Path(path).resolve())))
    if not callable(getattr(module, attribute, None)):
        raise UserError(f"--policy {name}: {path} has no function {attribute}")
    return getattr(module, attribute)


def example_probabilities(obs, gain):
    """CartPole by a linear controller, the more decided the larger the gain: (N, O) -> (N, 2)."""
    right = 1 / (1 + np.exp(-gain * np.asarray(obs) @ [0.1, 0.5, 1.0, 0.5]))
    return np.stack([1 - right, right], 1)


def example(args, device, episodes=1000, gains=(5.0, 12.0)):
    """Logs of an undecided controller (gains[0]) up to --horizon, and a more decided one."""
    print(f"built-in example: {episodes} episodes of CartPole by a linear controller with random "
          f"actions, gain {gains[0]}; what would it earn with gain {gains[1]}?")  # fmt: skip
    env, rng = gym.make("CartPole-v1", max_episode_steps=args.horizon), np.random.default_rng(0)
    units, rows = Units(env.observation_space, env.action_space), []
    for episode in range(episodes):
        obs, ended = env.reset(seed=episode)[0], False
        while not ended:
            p = example_probabilities(obs[None], gains[0])[0]
            action = int(rng.uniform() < p[1])
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, next_obs, terminated, episode, math.log(p[action])))
            obs, ended = next_obs, terminated or truncated
    obs, action, reward, next_obs, terminal, episode, log_prob = map(
        np.array, zip(*rows, strict=True)
    )
    batch = obs, torch.as_tensor(action), reward, next_obs, terminal
    batch = Batch(
        *(x.to(device) if torch.is_tensor(x) else units.tensor(x).to(device) for x in batch)
    )
    data = Data(
        units=units.to(device),
        all=batch,
        episode=torch.as_tensor(episode, device=device),
        behavior_log_prob=log_prob,
        make_env=partial(gym.make, "CartPole-v1", disable_env_checker=True),
    )
    target = partial(example_probabilities, gain=gains[1])
    return data, [DiscretePolicy(f"gain {gains[1]}", target, data.units, args)]


class Standardize(nn.Module):
    """x less its mean, over its deviation in the data (M, I)."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("mean", data.mean(0))
        self.register_buffer("std", data.std(0, correction=0) + 1e-3)

    def forward(self, x):
        return (x - self.mean) / self.std

    def inverse(self, x):
        return x * self.std + self.mean


def anneal(optimizer, args, update):
    optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.steps)


def chunked(f, *arrays, size=10_000):
    """f of rows, for no more than so many at once."""
    starts = range(0, len(arrays[0]), size)
    return torch.cat([f(*(x[i : i + size] for x in arrays)) for i in starts])


def as_arrays(reward, ratio, q=None, v=None):
    """The estimators' arguments as float64, checked."""
    n, T = shape = (*np.shape(reward), 0, 0)[:2]
    if np.ndim(reward) != 2 or not n or not T:
        raise UserError(f"reward has shape {np.shape(reward)}, not (episodes, steps)")
    arrays = {"reward": (reward, shape), "ratio": (ratio, shape)}
    arrays |= {} if q is None else {"q": (q, shape), "v": (v, (n, T + 1))}
    for name, (x, expected) in arrays.items():
        if np.shape(x) != expected:
            raise UserError(f"{name} has shape {np.shape(x)}, not {expected}")
        x = np.asarray(x, np.float64)
        bad = ~np.isfinite(x) | ((x < 0) if name == "ratio" else False)
        if bad.any():
            i, t = np.argwhere(bad)[0]
            why = (
                ": is the behaviour probability of the logged action 0?" if name == "ratio" else ""
            )
            raise UserError(f"{name} is {x[i, t]} in episode {i}, step {t}{why}")
        arrays[name] = x
    return tuple(arrays.values())


def simplex_argmin(a):
    """argmin x' a x over x >= 0, sum x = 1 for a (J, J), positive semidefinite. The solution y of
    min y' a y / 2 - sum y over y >= 0 points in its direction (Lawson & Hanson's active set)."""
    a = a / (np.trace(a) or 1.0) + 1e-10 * np.eye(len(a))
    y, free = np.zeros(len(a)), np.zeros(len(a), bool)
    for _ in range(10 * len(a)):
        slope = np.where(free, -np.inf, 1 - a @ y)
        if slope.max() <= 1e-8:
            break
        free[slope.argmax()] = True
        while True:
            z = np.zeros(len(a))
            z[free] = np.linalg.solve(a[np.ix_(free, free)], np.ones(free.sum()))
            if z[free].min() > 0:
                break
            out = free & (z <= 0)  # go towards z until the first of them is 0
            y += (y[out] / (y[out] - z[out])).min() * (z - y)
            free &= y > 1e-12 * y.max()
            y *= free
        y = z
    return y / y.sum()


def weight_summary(ratio):
    """Mean of the final weights (1 if the behaviour probabilities are right and cover the policy),
    its standard error, share of the largest."""
    with np.errstate(over="ignore", invalid="ignore"):
        weight = np.exp(log_weights(ratio)[:, -1])
        error = weight.std(ddof=1) / math.sqrt(len(weight))
        return float(weight.mean()), float(error), float(weight.max() / weight.sum())


def lower_bounds(log, ratio):
    """95% lower bounds of J from per-decision IS: rewards shifted to be >= 0, as E[w] = 1."""
    lowest = min(0.0, log.reward.min())
    each = np.eye(log.n)  # as resamples of a single episode: its own contribution
    shifted = log.reward - lowest
    x = importance_sampling(shifted, ratio, log.gamma, per_decision=True, counts=each)
    shift = lowest * (log.gamma ** np.arange(log.horizon)).sum()
    hcope = hcope_bound(x) + shift if log.n >= 40 else math.nan
    return student_t_bound(x) + shift, hcope


def print_report(report):
    print(f"\n{report.name}: {report.setting}")
    print(
        "estimator  estimate   95% interval            seconds" + "     error" * bool(report.truth)
    )
    for name, e in report.estimates.items():
        line = f"{name:9s} {e.value:9.4g}   {e.low:9.4g} .. {e.high:<9.4g} {e.seconds:8.2f}"
        error = f" {e.value - report.truth[0]:+9.3g}" if report.truth else ""
        print(f"{name:9s}         -   {e.reason}" if e.reason else line + error)
    if report.truth:
        print(f"{'truth':9s} {report.truth[0]:9.4g}   +- {report.truth[1]:.2g} (standard error)")
    mean, error, largest = report.weights
    if math.isfinite(mean):
        print(f"weights: effective sample size {report.ess:.1f} of {report.n}, mean {mean:.3g} +- "
              f"{error:.2g} (should be 1), largest {largest:.0%} of all")  # fmt: skip
    if report.bounds:
        student, hcope = report.bounds
        print(f"with 95% confidence at least {student:.4g} (PDIS, Student t), {hcope:.4g} (HCOPE)")
    for note in report.notes:
        print(f"note: {note}")
    print(f"verdict: {verdict(report)}")


def print_ranking(reports):
    """Policies from best to worst, by WDR if every effective sample size is at least 10, else FQE;
    with the truth also how well each estimator ranks."""
    by = "WDR" if min(report.ess for report in reports) >= 10 else "FQE"
    names = ["PDWIS", "DR", "WDR", "MAGIC", "FQE", "model"]
    print(f"\nranking by {by}" + "".join(f"{name:>10s}" for name in [*names, "truth"]))
    for report in sorted(reports, key=lambda r: -r.estimates[by].value):
        values = [report.estimates[name].value for name in names]
        values += [report.truth[0]] if report.truth else []
        print(f"{report.name}\n{'':14s}" + "".join(f"{value:10.4g}" for value in values))
    if reports[0].truth:
        truth = [report.truth[0] for report in reports]
        for name in names:
            values = [report.estimates[name].value for report in reports]
            if np.isfinite(values).all():
                print(f"{name:9s} Spearman {spearman(truth, values):5.2f}, regret@1 "
                      f"{regret(truth, values):.2f}")  # fmt: skip


def known_steps(length, terminated, horizon):
    """T. After the end of a terminated episode nothing is earned; after that of a truncated one
    nobody knows, so that none may be shorter than T."""
    cut = length[~terminated]
    known = int(cut.min()) if len(cut) else int(length.max())
    if horizon and len(cut) and horizon > known:
        episode = int(np.where(terminated, length.max() + 1, length).argmin())
        problem = f"episode {episode} was truncated after {known} steps, its rest is unknown"
        raise UserError(f"--horizon {horizon}: {problem}; --horizon {known} at most")
    return horizon or known


def check_args(args):
    limits = {"steps": 1, "batch_size": 1, "resamples": 10, "verify_episodes": 2, "horizon": 1}
    limits |= {"action_samples": 1}
    for name, lowest in limits.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag}: it must be at least {lowest}")
    if not (0 < args.lr <= 1 and 0 < args.polyak <= 1 and 0 <= args.gamma <= 1):
        raise UserError("--lr and --polyak must lie in (0, 1], --gamma in [0, 1]")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not (name == "cpu" or getattr(torch, name).is_available()):
        raise UserError(f"--device {name}: there is none on this machine")
    return torch.device(name)


# >>> shared: optim   (the same in every file; tests/test_copies.py keeps it so)
class MLP(nn.Module):
    """ReLU networks side by side, one batched product per layer: x (N, I), the same for all, or
    (members, N, I) -> (members, N, O)."""

    def __init__(self, members, *sizes):
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):  # initialised as torch.nn.Linear
            self.weight.append(torch.empty(members, i, o).uniform_(-(i**-0.5), i**-0.5))
            self.bias.append(torch.empty(members, 1, o).uniform_(-(i**-0.5), i**-0.5))

    def forward(self, x):
        *hidden, (last_weight, last_bias) = zip(self.weight, self.bias, strict=True)
        x = x.expand(len(last_weight), *x.shape[-2:])
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(last_bias, x, last_weight)


def adam(parameters, lr):
    return torch.optim.Adam(list(parameters), lr=lr, fused=True)


def step(optimizer, loss):
    """One gradient step. Only the optimiser's own parameters get gradients: an actor's loss leaves
    none in the critic, and no time is spent on them."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient
    optimizer.step()


@torch.no_grad()
def polyak_update(target, source, rate):
    """target <- (1 - rate) target + rate source."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.lerp_(s, rate)


def pick(values, index):
    """values (N, A), index (N,) -> values[n, index[n]] (N,)."""
    return values.gather(1, index[:, None])[:, 0]


# <<< shared: optim


# >>> shared: data   (the same in every file; tests/test_copies.py keeps it so)
class UserError(Exception):
    """Bad input, or a run that has to stop: one line on what is wrong, where, and what to do."""


class Batch(NamedTuple):
    """N transitions in network units (Units). terminal is 1.0 where the MDP ended, and only there:
    a time limit (truncation) bootstraps."""

    obs: torch.Tensor  # (N, O) float32
    action: torch.Tensor  # (N, A) float32 in [-1, 1], or (N,) int64 from 0
    reward: torch.Tensor  # (N,) float32, scaled and shifted
    next_obs: torch.Tensor  # (N, O) float32
    terminal: torch.Tensor  # (N,) float32


class Units(nn.Module):
    """Translates between the environment's units and the networks'. Its buffers are saved with the
    agent, so that nobody who uses the trained policy can forget them."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.obs_dim = spaces.flatdim(observation_space)
        self.action_dim = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.register_buffer("obs_mean", torch.zeros(self.obs_dim))
        self.register_buffer("obs_std", torch.ones(self.obs_dim))
        low, high = (0, 1) if self.discrete else (action_space.low, action_space.high)
        self.register_buffer("center", self.tensor((low + high) / 2.0).flatten())
        self.register_buffer("half_range", self.tensor((high - low) / 2.0).flatten())

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.obs_mean.device)

    def obs(self, obs):
        """(N, ...) -> (N, O), standardised. Dict and Tuple as rows that gymnasium.spaces.flatten
        made with self.observation_space: an environment may order its keys otherwise."""
        return (self.tensor(obs).reshape(len(obs), self.obs_dim) - self.obs_mean) / self.obs_std

    def action(self, action):
        """Environment actions (N, ...) -> (N, A) in [-1, 1], or (N,) int64 from 0."""
        if self.discrete:
            return self.tensor(action).long() - int(self.action_space.start)
        action = self.tensor(action).reshape(len(action), self.action_dim)
        return ((action - self.center) / self.half_range).clamp(-1, 1)

    def env_action(self, action):
        """The inverse of `action`: an array (N, ...) for env.step."""
        if self.discrete:
            return action.cpu().numpy() + self.action_space.start
        action = (self.center + action * self.half_range).cpu().numpy()
        action = action.reshape(-1, *self.action_space.shape)
        return action.clip(self.action_space.low, self.action_space.high)


@dataclass
class Data:
    """M transitions on the device, episode after episode."""

    units: Units
    all: Batch | None = None  # of M transitions
    episode: torch.Tensor | None = None  # (M,) int64, the episode of each transition
    train: torch.Tensor | None = None  # (M,) int64, the transitions that `sample` draws from
    behavior_log_prob: np.ndarray | None = None  # (M,) float64, as logged; NaN where it was not
    returns: np.ndarray | None = None  # (episodes,) undiscounted raw returns
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reference: tuple | None = None  # raw returns that score 0 and 100
    make_env: Callable | None = None  # for the evaluation; None without an environment

    def batch(self, index):
        return Batch(*(x[index] for x in self.all))

    def sample(self, n):
        index = torch.randint(len(self.train), (n,), device=self.train.device)
        return self.batch(self.train[index])

    def discounted_returns(self, gamma):
        """(M,) discounted sum of the rewards from each transition to the end of its episode."""
        reward, episode = self.all.reward.tolist(), [*self.episode.tolist(), -1]
        returns = [0.0] * len(episode)
        for t in reversed(range(len(reward))):
            returns[t] = reward[t] + gamma * returns[t + 1] * (episode[t] == episode[t + 1])
        return np.array(returns[:-1])


BUILTIN = {  # probability of a uniformly random action; None: drawn from U(0, 1) for each episode
    "pendulum/random-v0": 1.0,
    "pendulum/medium-v0": 0.6,
    "pendulum/expert-v0": 0.0,
    "pendulum/mixed-v0": None,
    "cartpole/random-v0": 1.0,
    "cartpole/medium-v0": 0.3,
    "cartpole/expert-v0": 0.0,
    "cartpole/mixed-v0": None,
}


def scripted_action(dataset_id, obs):
    """The controller behind a built-in dataset."""
    if dataset_id == "cartpole/medium-v0":  # flawed: knows only the pole's speed, the cart drifts
        return int(obs[3] > 0)
    if dataset_id.startswith("cartpole"):
        return int(np.dot([0.1, 0.5, 1.0, 0.5], obs) > 0)
    angle, speed = np.arctan2(obs[1], obs[0]), obs[2]
    torque = speed * (15 - speed**2 / 2 - 15 * np.cos(angle))  # drives the energy to the upright's
    if abs(angle) < 0.6:
        torque = -8 * angle - 2 * speed  # holds the pendulum upright
    return np.array([np.clip(torque, -2, 2)], np.float32)


def builtin_dataset(dataset_id):
    """20,000 transitions (the last episode complete), the same in every run, but for the last bits
    of another CPU's sines: a scripted controller that acts uniformly at random with probability
    eps. CartPole's log the probability of their actions; Pendulum's policy, part point mass, has no
    density. Returns what open_dataset returns."""
    cartpole = dataset_id.startswith("cartpole")
    make_env = partial(gym.make, "CartPole-v1" if cartpole else "Pendulum-v1")
    env, rng = make_env(disable_env_checker=True), np.random.default_rng(0)
    episodes, size = [], 0
    while size < 20_000:
        eps = rng.uniform() if BUILTIN[dataset_id] is None else BUILTIN[dataset_id]
        obs, rows, ended = [env.reset(seed=len(episodes))[0]], [], False
        while not ended:
            action = scripted = scripted_action(dataset_id, obs[-1])
            if rng.uniform() < eps:
                action = rng.integers(2) if cartpole else rng.uniform(-2, 2, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            log_prob = np.log(eps / 2 + (1 - eps) * (action == scripted)) if cartpole else np.nan
            rows.append((action, reward, terminated, truncated, log_prob))
            obs.append(next_obs)
            ended = terminated or truncated
        *columns, log_probs = (np.array(column) for column in zip(*rows, strict=True))
        infos = {"behavior_log_prob": log_probs} if cartpole else {}
        episodes.append(EpisodeBuffer(None, None, None, np.array(obs), *columns, infos))
        size += len(rows)
    reference = (22.0, 500.0) if cartpole else (-1230.0, -146.0)  # random actions, the controller
    return episodes, env.observation_space, env.action_space, make_env, reference


def open_dataset(dataset_id):
    """(episodes, observation space, action space, make_env or None, reference or None)."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    folder = root / dataset_id / "data"
    if dataset_id in BUILTIN and not folder.exists():
        print(f"{dataset_id}: built in, generated in memory")
        return builtin_dataset(dataset_id)
    if dataset_id.split("/")[0] in ("pendulum", "cartpole") and not folder.exists():
        raise UserError(f"dataset {dataset_id}: unknown; built in are {', '.join(BUILTIN)}")
    if not (folder.exists() or dataset_id.rpartition("-v")[2].isdigit()):
        raise UserError(f"dataset {dataset_id}: the id needs a version, as in {dataset_id}-v0")
    try:
        if not folder.exists():
            print(f"{dataset_id}: not in {root}, downloading")
            minari.download_dataset(dataset_id)
        dataset = minari.load_dataset(dataset_id)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:  # Minari and its backends raise anything from KeyError to OSError
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(
            f"dataset {dataset_id}: cannot be loaded ({reason}); to install it by hand, put its "
            f"metadata.json and main_data.hdf5 into {folder}"
        ) from error
    print(f"{dataset_id}: read from {root}")
    # The evaluation maze of AntMaze's umaze sets is turned by 180 degrees against that of the data.
    eval_env = "antmaze/umaze" not in dataset_id
    make_env = dataset.env_spec and partial(dataset.recover_environment, eval_env=eval_env)
    reference = [dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    known = None not in reference and reference[0] != reference[1]
    reference = tuple(map(float, reference)) if known else None
    return episodes, dataset.observation_space, dataset.action_space, make_env, reference


def check_spaces(observation_space, action_space, where):
    """Box and Discrete; as observations also Dict and Tuple of these."""
    if isinstance(observation_space, spaces.Dict | spaces.Tuple):
        for key in part_keys(observation_space):
            check_spaces(observation_space[key], action_space, where)
    elif not isinstance(observation_space, spaces.Box | spaces.Discrete):
        raise UserError(f"{where}: observations of {observation_space} are not supported")
    elif observation_space.dtype == np.uint8 and len(observation_space.shape) > 1:
        raise UserError(f"{where}: image observations are not supported; store features instead")
    box = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
    if not (box or isinstance(action_space, spaces.Discrete)):
        raise UserError(f"{where}: actions of {action_space} are not supported")
    if box and not (action_space.is_bounded() and (action_space.low < action_space.high).all()):
        raise UserError(f"{where}: {action_space} has no finite bounds to scale actions by")


def part_keys(space):
    return list(space.spaces) if isinstance(space, spaces.Dict) else range(len(space.spaces))


def flatten(space, x, where):
    """Observations (T, ...) of an episode -> (T, O), in the order of gymnasium.spaces.flatten."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        keys = part_keys(space)
        found = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, tuple) else []
        if set(found) != set(keys):
            raise UserError(f"{where}: its observations do not have the parts of {space}")
        parts = [flatten(space[k], x[k], where) for k in keys]
        if len({len(part) for part in parts}) > 1:
            raise UserError(f"{where}: the parts of its observations differ in length")
        return np.concatenate(parts, axis=1)
    x = np.asarray(x)
    if x.shape[1:] != space.shape or x.dtype.kind not in "biuf":
        found = f"shape {x.shape[1:]} and type {x.dtype}"
        raise UserError(f"{where}: observations of {found} do not fit {space}")
    if isinstance(space, spaces.Discrete):
        inside = np.isin(x, np.arange(space.n) + space.start)  # False for 0.5 and NaN
        if not inside.all():
            raise UserError(f"{where}: step {inside.argmin()}: the observation is not in {space}")
        return np.eye(space.n)[x.astype(np.int64) - space.start]
    return x.reshape(len(x), -1)


def read_episode(episode, observation_space, action_space, where):
    """Checks what Minari does not; returns obs (T + 1, O), action (T, ...), reward, terminal and
    behavior_log_prob (T,) as arrays."""

    def check(ok, problem):
        if not ok:
            raise UserError(f"{where}: {problem}")

    def check_steps(ok, problem):
        bad = np.argwhere(~ok)  # each row starts with the step
        check(len(bad) == 0, f"step {bad[:1, :1].sum()}: {problem}")

    obs = flatten(observation_space, episode.observations, where).astype(np.float32)
    action, reward = np.asarray(episode.actions), np.asarray(episode.rewards)
    terminal, truncated = (np.asarray(x) for x in (episode.terminations, episode.truncations))
    log_prob = (episode.infos or {}).get("behavior_log_prob")
    T = len(action)
    log_prob = np.full(T, np.nan) if log_prob is None else np.asarray(log_prob)
    check(T > 0, "it has no steps")
    check(
        len(obs) == T + 1, f"{len(obs)} observations for {T} actions, one more is needed: the last"
    )
    named = {"rewards": reward, "terminations": terminal, "truncations": truncated}
    for name, x in named.items():
        check(
            x.shape == (T,) and x.dtype.kind in "biuf",
            f"{name} must be {T} numbers, one per action",
        )
    check(
        log_prob.shape in ((T,), (T + 1,)) and log_prob.dtype.kind in "iuf",
        f"infos['behavior_log_prob'] must be {T} numbers, one per action",
    )
    for name in ("terminations", "truncations"):
        check_steps(np.isin(named[name], (0, 1)), f"{name} must be True or False")
    check_steps(np.isfinite(obs), "the observation is NaN or infinite")
    check_steps(np.isfinite(reward), "the reward is NaN or infinite")
    if isinstance(action_space, spaces.Discrete):
        check(action.shape == (T,) and action.dtype.kind in "iu", f"actions must be {T} integers")
        low, high, slack = action_space.start, action_space.start + action_space.n - 1, 0
    else:
        shape = (T, *action_space.shape)
        found = f"shape {action.shape} and type {action.dtype}"
        check(
            action.shape == shape and action.dtype.kind in "iuf",
            f"actions of {found}, not of shape {shape} and numbers",
        )
        low, high = action_space.low, action_space.high
        slack = 1e-3 * (high - low)  # rounding; Units clips it away
    inside = (action >= low - slack) & (action <= high + slack)  # False for NaN
    check_steps(inside, f"the action is not in {action_space}")
    ended = (terminal + truncated) > 0
    check(ended[-1], "the last step is neither terminated nor truncated; where a log just stops, "
          "set truncations[-1] = True")  # fmt: skip
    check_steps(~ended[:-1], "the episode ends here and yet goes on; split it in two")
    return obs, action, reward, terminal, log_prob[-T:]


def load_dataset(dataset_id, env_id, normalize_obs, reward_scale, reward_shift, device):
    """Minari ids (a tuple) -> Data. Everything is checked; a UserError names dataset, episode and
    step. Nothing is dropped: T + 1 observations make T transitions, the last with its true s'."""
    rows, sources = [], [open_dataset(name) for name in dataset_id]
    _, observation_space, action_space, make_env, reference = sources[0]
    for name, (episodes, *its_spaces, _, its_reference) in zip(dataset_id, sources, strict=True):
        check_spaces(*its_spaces, f"dataset {name}")
        if its_spaces != [observation_space, action_space]:
            raise UserError(f"dataset {name}: its spaces are not those of {dataset_id[0]}")
        reference = reference if its_reference == reference else None
        for number, episode in enumerate(episodes):
            where = f"dataset {name}, episode {number}"
            rows.append(read_episode(episode, observation_space, action_space, where))
    if not rows:
        raise UserError(f"dataset {dataset_id[0]}: it has no episodes")
    obs, action, reward, terminal, log_prob = zip(*rows, strict=True)
    lengths, returns = [len(r) for r in reward], np.array([r.sum() for r in reward])
    range_ = f"{returns.mean():.1f} on average, {returns.min():.1f} to {returns.max():.1f}"
    print(f"{sum(lengths)} transitions in {len(rows)} episodes, return {range_}")
    if reward_scale == "return-range":
        reward_scale = 1000 / (np.ptp(returns) or 1000)
        print(f"--reward-scale return-range is {reward_scale:.4g}; 1 where all returns are equal")

    units = Units(observation_space, action_space)
    s, next_s = (np.concatenate(x) for x in zip(*((o[:-1], o[1:]) for o in obs), strict=True))
    if normalize_obs:
        units.obs_mean = units.tensor(s.mean(0, dtype=np.float64))
        units.obs_std = units.tensor(s.std(0, dtype=np.float64) + 1e-3)
    a, r, d = np.concatenate(action), np.concatenate(reward), units.tensor(np.concatenate(terminal))
    r = units.tensor(r * reward_scale + reward_shift)
    batch = Batch(units.obs(s), units.action(a), r, units.obs(next_s), d)
    if units.discrete and (unused := set(range(units.action_dim)) - set(batch.action.tolist())):
        print(f"note: actions {sorted(unused)} (counted from 0) never occur in the data")
    return Data(
        units=units.to(device),
        all=Batch(*(x.to(device) for x in batch)),
        episode=torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(device),
        train=torch.arange(len(r), device=device),
        behavior_log_prob=np.concatenate(log_prob),
        returns=returns,
        reward_scale=reward_scale,
        reward_shift=reward_shift,
        reference=reference,
        make_env=find_env(make_env, env_id, units, max(lengths)),
    )


def find_env(make_env, env_id, units, longest):
    """The evaluation's environment: --env-id, else the dataset's, else None with the reason."""
    make_env = partial(gym.make, env_id) if env_id else make_env
    if make_env is None:
        print("no evaluation: the data name no environment; --env-id gives one, ope.py needs none")
        return None
    make_env = partial(make_env, disable_env_checker=True)
    try:
        env = make_env()
        spaces.flatten(units.observation_space, env.reset(seed=0)[0])
    except Exception as error:  # whatever the environment's package raises
        problem = f"environment {env_id or 'of the data'}: {error}".split("\n")[0]
        if env_id:
            raise UserError(problem) from error
        print(f"no evaluation: {problem}")
        return None
    check_spaces(env.observation_space, env.action_space, f"environment {env.spec.id}")
    its, ours = (
        (u.obs_dim, u.action_dim, u.discrete)
        for u in (Units(env.observation_space, env.action_space), units)
    )
    if its != ours:
        raise UserError(f"environment {env.spec.id}: its spaces are not those of the data")
    print(f"evaluation in {env.spec.id}")
    if env.spec.max_episode_steps is None:  # or an episode could run for ever
        make_env = partial(make_env, max_episode_steps=longest)
    return make_env


# <<< shared: data


# >>> shared: evaluate   (the same in every file; tests/test_copies.py keeps it so)
@torch.no_grad()
def evaluate(agent, make_env, episodes, seed=10_000):
    """Undiscounted raw returns (episodes,) of the deterministic policy; episode i is reset with
    seed + i, the same for all methods, so that comparisons are paired. One environment for each;
    a finished one is not stepped. Leaves torch's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        space = agent.units.observation_space
        envs = [make_env() for _ in range(episodes)]
        obs = [spaces.flatten(space, env.reset(seed=seed + i)[0]) for i, env in enumerate(envs)]
        returns, alive = np.zeros(episodes), list(range(episodes))
        while alive:
            for i, action in zip(alive, agent.act(np.stack([obs[i] for i in alive])), strict=True):
                next_obs, reward, terminated, truncated, _ = envs[i].step(action)
                obs[i] = None if terminated or truncated else spaces.flatten(space, next_obs)
                returns[i] += reward
            alive = [i for i in alive if obs[i] is not None]
        for env in envs:
            env.close()
        return returns


# <<< shared: evaluate


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except UserError as error:
        sys.exit(f"ope: {error}")
