# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13", "numpy>=2.0.2", "gymnasium>=1.2", "minari[hdf5,hf]>=0.5.3",
#   "pillow>=11.0", "tyro>=0.9.3", "tqdm>=4.66"]
# ///
"""Off-policy evaluation (OPE): how good is a policy, judged from the logs of another one alone?

Importance sampling reweights the logged returns: right on average, but its variance grows
exponentially with the horizon. Fitted Q evaluation (FQE) and a learned model extrapolate: stable,
but biased. Doubly robust estimates combine both. A verdict by stated rules (`verdict`) says which
number can be believed, and whether the policy is better than the logged one. The intervals of IS,
PDIS, RIS, MAGIC, the model, and where pi_b is estimated WIS and PDWIS, are marked: not 95%.

  python ope.py                                   CartPole: about 39.0 where the logs earned 33.2
  python ope.py --run runs/bc__... --run runs/cql__... --verify    trained policies, with the truth
  python ope.py --policy FILE.py:NAME --dataset-id mylab/logs-v0    any policy, any Minari dataset:
      a function of observations (N, O) that returns probabilities (N, A), or a torch Distribution

Train on one part, --dataset-id 'mylab/logs-v0[:80%]': --run then takes the other part for itself.

pi is judged by n episodes of pi_b, T steps of each. Ratio rho_t = pi(a_t|s_t) / pi_b(a_t|s_t),
weight w_t = rho_0 ... rho_t, normalised weight w~_t = w_t / sum_i w_t, [n] the paper's number.
Estimated is J = E_pi[ sum_{t<T} gamma^t r_t ]:
  (1) IS      (1/n) sum_i w_{T-1} G,  G = sum_t gamma^t r_t
  (2) PDIS    (1/n) sum_i sum_t gamma^t w_t r_t                                    per decision
  (3) WIS     sum_i w~_{T-1} G                        weighted: biased, consistent, within the data
  (4) PDWIS   sum_t gamma^t sum_i w~_t r_t
  (5) RIS     (4) with pi_b estimated from the same episodes, where it is known, too          [D1]
  (6) DR      (1/n) sum_i [ V(s_0) + sum_t gamma^t w_t delta_t ]                          [eq. 10]
              delta_t = r_t - Q(s_t, a_t) + gamma V(s_{t+1}),  V(s) = E_{a~pi} Q(s, a)        [D2]
  (7) WDR     (1/n) sum_i V(s_0) + sum_t gamma^t sum_i w~_t delta_t
  (8) MAGIC   sum_j x_j g_j,  g_j = (7) with only the steps t <= j                            [D3]
              x = argmin over the simplex of x' (Omega + b b') x, Omega the covariance of g,
              b_j the distance of g_j from a 50% interval of (7)
  (9) FQE     Q_h(s, a) <- r + gamma (1 - terminal) E_{a'~pi} Q_{h-1}(s', a'), h steps to go,
              Q_0 = 0;  J = (1/n) sum_i V_T(s_0)                                              [D4]
 (10) model   one network for E[s' - s], E[r] and P(terminal); J = mean return of paths of mean
              steps under pi from the logged s_0, each step weighted by the chance to be alive

Shapes: n episodes, T steps, M transitions, N batch, O observation, A action size (Box) or number of
actions (Discrete), E members of FQE, K actions that stand for pi in a state, B resamples.

Differs from the papers:
  D1 RIS is weighted and per decision. A tenth of the episodes is held out, for early stopping.
  D2 Q in (6) to (8) is cross-fitted: the mean of the 4 members that have not seen the episode, one
     of each random split. What these say alone differs; that is in the intervals, too.
  D3 At most 25 of the g_j. The 50% interval is the normal one, by Omega, not bootstrapped.
  D4 Q_h is (1 + gamma + ... + gamma^(h-1)) times a value per step in units of the logged returns:
     no network must first grow to its level. No target network, as Q_h learns from Q_{h-1} alone.
     8 members: 4 random halves of the episodes, and the rest of each. Box: K actions, drawn once.
  D5 HCOPE takes one cap for all episodes, chosen on a twentieth of them.
  D6 Box actions count as at a bound from 0.99 of the way on, where policies that clip have a mass.

Papers: (1)-(4) Precup, Sutton, Singh 2000 (ICML); RIS: Hanna, Niekum, Stone 2019, arXiv 1806.01347;
DR: Jiang, Li 2016, arXiv 1511.03722; WDR, MAGIC: Thomas, Brunskill 2016, arXiv 1604.00923; FQE: Le,
Voloshin, Yue 2019, arXiv 1903.08738; HCOPE: Thomas, Theocharous, Ghavamzadeh 2015 (AAAI). Written
from them; no code from elsewhere.
"""

import ctypes
import importlib.util
import math
import os
import re
import signal
import sys
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, count, pairwise, product
from pathlib import Path
from types import SimpleNamespace
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
from torch.distributions import Categorical, Distribution, Independent, Normal
from tyro.conf import UseAppendAction

__version__ = "2.5.0"


@dataclass
class Args:
    # What to evaluate, and on what
    run: UseAppendAction[tuple[str, ...]] = ()  # a run's folder, whose code is executed: trust it
    policy: UseAppendAction[tuple[str, ...]] = ()  # FILE.py:NAME, a function of observations
    policy_mode: Literal["stochastic", "deterministic"] = "stochastic"  # draws, or the likeliest
    dataset_id: tuple[str, ...] = ()  # Minari or built-in ids, mixed if several
    env_id: str | None = None  # environment of the evaluation; default: the one of the dataset
    horizon: int | None = None  # T, steps that count; default: as many as are known of each episode
    gamma: float = 0.99  # discount
    lowest_reward: float | None = None  # that can occur, for HCOPE; default: the lowest logged one
    resamples: int = 1_000  # B, of the bootstrap over episodes
    verify: bool = False  # roll the policies out in the environment, print the truth and the errors
    verify_episodes: int = 1_000  # episodes of --verify
    seed: int = 0  # of the networks, the batches and the sampled actions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of the data and the networks
    # Networks: FQE, the model, the estimated behaviour policy
    steps: int = 3_000  # gradient updates
    batch_size: int = 128  # N, transitions per update
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers, for example 256 256
    lr: float = 1e-2  # learning rate of all networks
    action_samples: int = 4  # K, actions per state that stand for pi (Box; exact for Discrete)


def main(args: Args) -> dict:
    """Prints a table and a verdict for each policy, and a ranking; returns {name: Report}."""
    check_args(args)
    use_cpu_well()
    if args.run or args.policy:
        data, policies = load(args)
    else:
        require(not args.dataset_id, "--dataset-id needs --run or --policy, which it is to judge")
        print("built-in example: 1000 episodes of CartPole by a controller that often acts at "
              "random, gain 5; what would it earn with gain 12?")  # fmt: skip
        args = replace(args, verify=True, horizon=args.horizon or 50)
        data, policies = example(args)
    make_env = find_env(data, args.env_id, "without --verify") if args.verify else None
    torch.manual_seed(args.seed)
    log, reports = Log(data, args), {}
    limit = make_env().spec.max_episode_steps if make_env else log.horizon
    enough = limit >= log.horizon
    require(enough, f"--verify: the environment ends after {limit} steps; --horizon {limit}")
    for note in log.notes:
        print(f"note: {note}")
    if args.run and args.policy_mode == "stochastic":
        print("note: a policy that draws its actions is judged so; the training files report the "
              "deterministic one")  # fmt: skip
    for policy in policies:
        report = reports[policy.name] = evaluate_policy(policy, log, args)
        if make_env:
            report.truth = true_value(policy, make_env, args.verify_episodes, log)
        print_report(report)
    if len(reports) > 1:
        print_ranking(reports.values())
    return reports


def evaluate_policy(policy, log, args):
    """All estimates of a policy's value -> Report."""
    torch.manual_seed(args.seed)  # the same numbers whichever policy comes first
    q, v, members = fqe(log, policy, log.seen, args)
    model_returns = log.model_returns(policy)
    found = members, model_returns, log.errors["FQE"]
    finite = all(np.isfinite(x).all() for x in found)
    require(finite, f"{policy.name}: FQE or the model diverged; a smaller --lr may help")
    report = Report(policy.name, log, policy.seen, policy.problem)
    if not policy.problem:
        log_pi = policy.log_prob(log.obs, log.transitions.action)
        ratio, ris_ratio = (log.ratio(log_pi, x) for x in (log.log_pi_b, log.estimated_log_pi_b))
        report.weights = weight_summary(ratio)
        report.problem = weight_problem(report.weights)
    if report.weights and report.weights.sizes[-1] > 0:
        r, gamma, both = log.reward, log.gamma, {"per_decision": True, "weighted": True}
        for name, estimator in {
            "IS": lambda p, q, v: importance_sampling(p, r, ratio, gamma),
            "PDIS": lambda p, q, v: importance_sampling(p, r, ratio, gamma, per_decision=True),
            "WIS": lambda p, q, v: importance_sampling(p, r, ratio, gamma, weighted=True),
            "PDWIS": lambda p, q, v: importance_sampling(p, r, ratio, gamma, **both),
            "RIS": lambda p, q, v: importance_sampling(p, r, ris_ratio, gamma, **both),
            "DR": lambda p, q, v: doubly_robust(p, r, ratio, q, v, gamma),
            "WDR": lambda p, q, v: doubly_robust(p, r, ratio, q, v, gamma, weighted=True),
            "MAGIC": lambda p, q, v: magic(p, r, ratio, q, v, gamma),
        }.items():
            whole = partial(estimator, q=q.mean(0), v=v.mean(0))
            splits = [partial(estimator, q=x, v=y) for x, y in zip(q, v, strict=True)]
            estimate = bootstrap(whole, log, report.weights.sizes[-1] - 1, splits)
            fitted = DOUBTS["RIS"] if log.estimated and name in ("WIS", "PDWIS") else ""
            doubt = report.problem or DOUBTS.get(name, fitted)
            report.estimates[name] = estimate._replace(doubt=doubt)
        if report.weights.mean - 1 < 3 * report.weights.error + 1e-3:  # else pi_b is wrong
            report.bounds = lower_bounds(log, ratio, report.problem)
    report.estimates["FQE"] = fqe_estimate(members, log)
    estimate = bootstrap(lambda p: p @ model_returns, log)
    report.estimates["model"] = estimate._replace(doubt=DOUBTS["model"])
    return report


DOUBTS = {  # why these intervals are never 95% ones
    "IS": "rare large weights may be missing",
    "PDIS": "rare large weights may be missing",
    "RIS": "knows nothing of the error of its estimated pi_b",
    "MAGIC": "too narrow, as it chooses its blend by the same episodes",
    "model": "knows only how the first states differ, nothing of the model's error",
}


@dataclass
class Report:
    """What is known of one policy."""

    name: str
    log: "Log"
    seen: bool  # whether it was trained on these episodes
    problem: str  # why ratios say nothing of it, or ""
    estimates: dict = field(default_factory=dict)  # {estimator's name: Estimate}
    weights: "Weights | None" = None  # None without ratios
    bounds: dict = field(default_factory=dict)  # 95% lower bounds of J, where there are ratios
    truth: tuple | None = None  # mean, standard error


class Estimate(NamedTuple):
    """A value, its 95% interval, and both for its difference to the logged policy."""

    value: float
    low: float
    high: float
    gain: tuple  # value, low, high
    doubt: str = ""  # why the intervals are not 95% ones


# ---- Estimators. reward and ratio (n, T): after the end of an episode reward 0 and ratio 1, which
# carries its weight on. p is the share of each episode, 1/n (n,), or that in each of B resamples
# (B, n), for as many estimates at once: a bootstrap is a matrix product.


def importance_sampling(p, reward, ratio, gamma, per_decision=False, weighted=False):
    """(1)-(4). Unweighted: unbiased if the ratios are exact and pi_b > 0 wherever pi > 0."""
    w, r = step_weights(ratio, weighted), reward * gamma ** np.arange(reward.shape[1])
    if not per_decision:  # an episode becomes one step: its whole weight, its return
        w, r = w[:, -1:], r.sum(1, keepdims=True)
    return (p @ (w * r) / (p @ w if weighted else 1)).sum(-1)


def doubly_robust(p, reward, ratio, q, v, gamma, weighted=False):
    """(6), (7) for q (n, T) at the logged actions and v (n, T + 1), both 0 after the end; where a
    log is merely cut, v at the cut may value the rest. Unbiased if ratio or q is exact."""
    w, delta = step_weights(ratio, weighted), reward - q + gamma * v[:, 1:]
    terms = p @ (w * delta) / (p @ w if weighted else 1)  # (T,) or (B, T)
    return p @ v[:, 0] + terms @ gamma ** np.arange(delta.shape[1])


def magic(p, reward, ratio, q, v, gamma, steps=None):
    """(8): corrects Q up to the step that the data can, and trusts it beyond. `steps`: the j to
    choose from; (-1,) is the direct method, (T - 1,) is (7)."""
    if p.ndim == 2:
        return np.array([magic(row, reward, ratio, q, v, gamma, steps) for row in p])
    n, T = reward.shape
    w, delta = step_weights(ratio, True), reward - q + gamma * v[:, 1:]
    terms = w / (p @ w) * delta * gamma ** np.arange(T)
    steps = np.unique(np.linspace(-1, T - 1, 25).astype(int)) if steps is None else steps
    each = np.column_stack([v[:, 0], terms]).cumsum(1)[:, np.add(steps, 1)]  # (n, J)
    whole = v[:, 0] + terms.sum(1)
    g, wdr = p @ each, p @ whole
    if not np.isfinite(wdr):  # a resample without overlap
        return np.nan
    omega = ((p[:, None] * (each - g)).T @ (each - g)) / (n - 1)
    half = 0.6745 * np.sqrt(p @ (whole - wdr) ** 2 / (n - 1))  # D3
    b = np.abs(g - g.clip(wdr - half, wdr + half))
    return simplex_argmin(omega + np.outer(b, b)) @ g


def step_weights(ratio, weighted=False):
    """w_t (n, T), by logarithms, so that a thousand ratios do not vanish; where they will be
    normalised, relative to the largest of the step, so that they do not overflow."""
    with np.errstate(divide="ignore", over="ignore"):  # an action that pi never takes: log 0 = -inf
        log_w = np.log(ratio).cumsum(1)
        return np.exp(log_w - log_w.max(0) if weighted else log_w)


# ---- The networks of FQE, the model and pi_b


class QNetwork:
    """E members side by side: obs (E, N, O), action (E, N, A), h (E, N), or (N, ..) for all
    -> Q_h(s, a) (E, N)."""

    def __init__(self, members, log, args):
        annuity = np.append(0, (log.gamma ** np.arange(log.horizon)).cumsum())  # of h = 0, 1, ...
        per_step = log.returns / annuity[-1]  # D4
        self.center, spread = float(per_step.mean()), float(per_step.std(ddof=1))
        size = float(abs(log.reward).max())
        self.scale = spread if spread > 1e-6 * size else size or 1.0  # else it is rounding
        self.annuity, self.standardize = log.obs.new_tensor(annuity), log.standardize
        sizes = log.obs.shape[1] + log.action.shape[1] + 2, *args.hidden, 1
        self.net = MLP(members, *sizes).to(log.obs.device)

    def __call__(self, obs, action, h):
        annuity = self.annuity[h]
        left = torch.stack([annuity / self.annuity[-1], 1 / annuity.clamp(min=1)], -1)
        x = torch.cat([self.standardize(obs), action, left], -1)
        return annuity * (self.center + self.scale * self.net(x)[..., 0])

    def value(self, obs, action, weight, h):
        """V_h(s) = E_{a~pi} Q_h(s, a) (E, N): action (E, N, K, A), its weight (E, N, K)."""
        K = weight.shape[-1]
        obs, h = obs.repeat_interleave(K, -2), h.repeat_interleave(K, -1)
        return (weight * self(obs, action.flatten(-3, -2), h).unflatten(-1, (-1, K))).sum(-1)


def fqe(log, policy, seen, args):
    """(9) by a member for each column of seen (n, E), which learns from the episodes that are true
    there. Q (E / 2, n, T) and V (E / 2, n, T + 1) of the one of each pair that has not seen the
    episode [D2], 0 after its end; V_T(s_0) (n, E) of every member."""
    E, reward, terminal = seen.shape[1], log.transitions.reward, log.transitions.terminal
    next_action, next_weight = policy.support(log.next_obs)  # (M, K, A), (M, K)
    critic = QNetwork(E, log, args)

    def loss(i):
        h, y = torch.randint(1, log.horizon + 1, i.shape, device=i.device), reward[i]
        if log.horizon > 1:  # else V_0 = 0, and a bandit with many actions would wait for nothing
            with torch.no_grad():
                v = critic.value(log.next_obs[i], next_action[i], next_weight[i], h - 1)
            y = y + log.gamma * (1 - terminal[i]) * v
        error = (critic(log.obs[i], log.action[i], h) - y) / (critic.annuity[h] * critic.scale)
        assert error.shape == i.shape
        return (error**2).mean(1).sum()

    train(critic.net, loss, [torch.nonzero(x[log.episode])[:, 0] for x in seen.T], args)

    h = (log.horizon - log.step).clamp(min=0)  # beyond the horizon: 0 steps to go, not used
    size = 10_000 // next_weight.shape[1] + 1  # of the rows at once, as each has K actions
    with torch.no_grad():
        q = chunked(lambda *x: critic(*x).T, log.obs, log.action, h, size=size)
        v = chunked(lambda *x: critic.value(*x).T, log.obs, *policy.support(log.obs), h, size=size)
    q, v, unseen = q.double(), v.double(), ~seen[log.episode]  # by one member of each pair
    by_pair = [x[unseen].view(len(x), -1).T.cpu().numpy() for x in (q, v)]
    q_pairs, v_pairs = (np.stack([log.padded(row) for row in x]) for x in by_pair)
    return q_pairs, np.pad(v_pairs, ((0, 0), (0, 0), (0, 1))), v[log.first].cpu().numpy()


def fit_model(log, args):
    """(10) -> a function of a policy: its discounted returns (n,) from the logged first states, in
    mean steps within the range of the data. Logs without ends teach none."""
    reward, terminal = log.transitions.reward, log.transitions.terminal
    change = torch.cat([log.next_obs - log.obs, reward[:, None]], 1)  # (M, O + 1)
    mean, low, high = change.mean(0), log.next_obs.amin(0), log.next_obs.amax(0)
    std = change.std(0, correction=0).maximum(1e-6 * mean.abs() + 1e-30)  # what never changes stays
    target, inputs = (change - mean) / std, log.obs.shape[1] + log.action.shape[1]
    net = MLP(1, inputs, *args.hidden, change.shape[1] + 1).to(change.device)

    def predict(obs, action):  # standardised s' - s and r (N, O + 1), logit of P(terminal) (N,)
        y = net(torch.cat([log.standardize(obs), action], -1))[0]
        return y[:, :-1], y[:, -1]

    def loss(i):
        predicted, logit = predict(log.obs[i[0]], log.action[i[0]])
        error, ended = predicted - target[i[0]], terminal[i[0]]
        assert error.shape == predicted.shape and logit.shape == ended.shape
        return (error**2).mean() + F.binary_cross_entropy_with_logits(logit, ended)

    train(net, loss, [torch.arange(len(change), device=change.device)], args)

    @torch.no_grad()
    def returns(policy):
        obs, value, alive = log.obs[log.first], 0.0, 1.0  # alive: the chance that none has ended
        for t in range(log.horizon):
            predicted, logit = predict(obs, log.vector(policy.sample(obs)))
            change = predicted * std + mean
            value = value + log.gamma**t * alive * change[:, -1].double()
            alive = alive * (1 - logit.double().sigmoid() * terminal.max())
            obs = (obs + change[:, :-1]).clamp(low, high)
        return value.cpu().numpy()

    return returns


def fit_behavior(log, args):
    """pi_b, estimated by maximum likelihood, as a policy, and its log pi_b(a|s) of the logged
    actions (M,), in network units. Stopped early, by a tenth of the episodes [D1]."""
    A, action, n = log.action.shape[1], log.transitions.action, log.n
    sizes = log.obs.shape[1], *args.hidden, A if log.units.discrete else 5 * (1 + 2 * A)
    net = MLP(1, *sizes).to(log.obs.device)

    def pi(obs):
        y = net(log.standardize(obs))[0]
        if log.units.discrete:
            return Categorical(logits=y)
        logits, mean, log_std = y.split([5, 5 * A, 5 * A], 1)  # logs of several policies, or of one
        mean, log_std = (x.view(-1, 5, A) for x in (mean, log_std))  # with noise, are no Gaussian
        return BoxLaw(mean, log_std.clamp(-5, 2).exp(), logits)

    def loss(i):
        log_prob = pi(log.obs[i[0]]).log_prob(action[i[0]])
        assert log_prob.shape == i[0].shape
        return -log_prob.mean()

    held_out = (torch.randperm(n, device=action.device) < n // 10)[log.episode]
    train_rows, held_out = torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
    train(net, loss, [train_rows], args, held_out[None])
    policy = Target("the logged policy", pi, log.units, args)
    return policy, policy.log_prob(log.obs, action)


# ---- How each goes wrong: intervals, weights, bounds


def bootstrap(estimator, log, df=math.inf, splits=()):
    """Estimate by estimator(p), with the intervals of resampled episodes. df: their effective
    number less 1. splits: the same by the Q of each random split alone [D2]. How those fell is
    chance, too, and no resample tells: the variance of their mean is added."""
    p, spread = np.full(len(log.returns), 1 / len(log.returns)), 0.0
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # 0 / 0: no overlap
        value, draws = estimator(p), estimator(log.resamples)
        gain, gains = value - log.returns.mean(), draws - log.resamples @ log.returns
        if splits:
            error = np.std([f(p) for f in splits], ddof=1) / math.sqrt(len(splits))
            spread = t_quantile(0.975, len(splits) - 1) * error
        return Estimate(*interval(value, draws, df, spread), interval(gain, gains, df, spread))


def interval(value, draws, df, spread=0.0):
    """(value, low, high): percentiles, which are too narrow where few episodes carry the weight; so
    as much wider as Student's t is than the normal, and a variance over n - 1 than one over n."""
    if not np.isfinite(value):
        return value, np.nan, np.nan
    tails = [0.025, 0.975]  # of 999 draws the 25th and the 975th; NaN: a draw without overlap
    low, high = np.nanquantile(draws, tails, method="weibull")
    df = min(max(1.0, df), 1e5)
    wider = t_quantile(0.975, df) / t_quantile(0.975, 1e5) * math.sqrt((df + 1) / df)
    below, above = (math.hypot(wider * max(0.0, x), spread) for x in (value - low, high - value))
    return value, value - below, value + above


def fqe_estimate(members, log):
    """J of (9), the mean of V_T(s_0) (n, E). The halves of a pair are independent: half the
    difference d of what two members say is as large as the error of all episodes together. So the
    variance is the mean of d^2 over the 4 pairs, plus that of the first states; of the gain over
    the logged policy, where a half's own first states and returns are paired, mean d^2 alone. An
    error that all members share, as of training that is not done, is in no d: for it stands what
    they miss of the logged policy, which widens both intervals. More --steps make it smaller."""

    def mean_square(x):  # of d, for x (E,)
        return (((x[0::2] - x[1::2]) / 2) ** 2).mean()

    gains, seen = members - log.returns[:, None], log.seen.cpu().numpy()
    variance = mean_square(members.mean(0)) + members.mean(1).var(ddof=1) / log.n
    variance_gain = mean_square((gains * seen).sum(0) / seen.sum(0))
    spread = t_quantile(0.975, 4) * np.sqrt([variance, variance_gain])
    half, half_gain = np.hypot(spread, log.errors["FQE"])
    value, gain = members.mean(), gains.mean()
    return Estimate(value, value - half, value + half, (gain, gain - half_gain, gain + half_gain))


class Weights(NamedTuple):
    mean: float  # of w_{T-1}: 1 if pi_b is right and covers pi
    error: float  # its standard error
    largest: float  # share of the largest in the sum
    nonzero: float  # share of the episodes where it is not 0
    sizes: np.ndarray  # effective sample sizes of w_t (T,)


def weight_summary(ratio):
    """Weights. Effective sample size: (sum w)^2 / sum w^2 equally weighted episodes say as much."""
    with np.errstate(over="ignore", invalid="ignore"):
        w, relative = step_weights(ratio)[:, -1], step_weights(ratio, weighted=True)
        relative = np.nan_to_num(relative)  # NaN: a step that no episode with a weight has reached
        sizes = relative.sum(0) ** 2 / np.maximum((relative**2).sum(0), 1e-300)
        error, last = w.std(ddof=1) / math.sqrt(len(w)), relative[:, -1]
    return Weights(w.mean(), error, last.max() / max(last.sum(), 1e-300), (last > 0).mean(), sizes)


def weight_problem(weights):
    """Why ratios say nothing, or "" (rule 2 of `verdict`)."""
    ess, mean, largest = weights.sizes[-1], weights.mean, weights.largest
    last = (np.flatnonzero(weights.sizes >= size) + 1 for size in (1e-9, 10, 50))
    followed, some, enough = (max(steps, default=0) for steps in last)
    if not ess:
        problem = f"no overlap: no logged episode follows the policy for more than {followed} steps"
    elif mean > 10 or abs(mean - 1) > 3 * weights.error + 1e-3:
        return f"weights average {mean:.2g}, not 1: logs lack what it does, or pi_b is wrong"
    elif ess >= 10 and largest <= 0.5:
        return ""
    else:
        problem = f"effective sample size {ess:.1f}, the largest weight {largest:.0%} of their sum"
    return f"{problem}; try --horizon {enough or some}" if some else problem


def student_t_bound(x):
    """95% lower bound of the mean of i.i.d. x (n,), if that is nearly normal."""
    return x.mean() - t_quantile(0.95, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))


def bernstein_bound(x, cap, n=None):
    """95% lower bound of the mean of i.i.d. x >= 0, without any other assumption (empirical
    Bernstein): y = min(x, cap) only lowers the mean; with S^2 = var(y), l = log(2 / 0.05),
    mean(y) - sqrt(2 S^2 l / n) - 7 cap l / (3 (n - 1))."""
    y, n, log = np.minimum(x, cap), n or len(x), math.log(2 / 0.05)
    return y.mean() - math.sqrt(2 * y.var(ddof=1) * log / n) - 7 * cap * log / (3 * (n - 1))


def hcope_bound(x, seed=0):
    """bernstein_bound with the best cap as judged by a twentieth of the episodes, for the rest.
    x (n,) >= 0: what each episode adds to (1) or (2) [D5]."""
    x = np.random.default_rng(seed).permutation(x)
    held_out, rest = np.split(x, [max(10, len(x) // 20)])
    cap = max(held_out, key=lambda c: bernstein_bound(held_out, c, n=len(rest)))
    return bernstein_bound(rest, cap)


def lower_bounds(log, ratio, problem):
    """{name: 95% lower bound of J}, from (2). HCOPE's contributions must be >= 0: rewards are
    shifted by the lowest that can occur, which is taken back as E[w_t] = 1."""
    logged, lowest, hcope = log.reward[log.inside].min(), log.args.lowest_reward, "HCOPE"
    if lowest is None:
        lowest = logged
        hcope = f"HCOPE, if no reward is below {logged:.4g}, the lowest in T steps of the logs"
    require(np.float32(lowest) <= logged, f"--lowest-reward {lowest}: the logs have {logged:.4g}")
    lowest = min(0.0, lowest)  # 0 is what is earned after the end
    with np.errstate(over="ignore", invalid="ignore"):  # weights that overflow
        w = step_weights(ratio)
        pdis, x = ((w * r) @ log.discounts for r in (log.reward, log.reward - lowest))
    shift = lowest * log.discounts.sum()
    bounds = {} if problem else {"PDIS, Student's t": student_t_bound(pdis)}
    if log.n >= 40 and np.isfinite(x).all():
        bounds[hcope] = hcope_bound(x) + shift
    return bounds


# ---- What to believe


def verdict(report):
    """The estimator that is believed, WDR, or FQE as a hint, or "", and a line that says why, by
    these rules. PDWIS, WDR and FQE have a vote each, without ratios FQE and the model; two agree if
    their 95% intervals overlap.
      1. If it was trained on these episodes, no estimate counts.
      2. Ratios say nothing if there are none, if no episode follows the policy, if the mean weight
         is above 10 or more than 3 standard errors from 1, if the effective sample size is below 10
         or one episode has above half of the weight.
      3. FQE and the model have no vote if they miss what the logged policy earned by more than 2%
         and 3 standard errors together.
      4. Without ratios at best a hint: if both have a vote, and the model's value is in the
         interval of FQE, or at most a tenth of the std of the logged returns outside.
      5. PDWIS, WDR and FQE agree: believe WDR, with care if the effective sample size is below 50.
      6. PDWIS and WDR agree, it is at least 50, FQE differs or has no vote: believe WDR with care.
      7. Otherwise nothing.
    What is believed is better or worse than the logged policy if the interval of the difference
    does not hold 0."""
    e, log = report.estimates, report.log
    if report.seen:
        return "", ("trained on these very episodes, so that every estimate is too good: believe "
                    "none; train on --dataset-id 'ID[:80%]' and judge by the rest")  # fmt: skip
    slack = 0.02 * abs(log.returns.mean()) + 3 * log.returns.std() / math.sqrt(log.n)
    missed = {name: x for name, x in log.errors.items() if not abs(x) <= slack}
    lost = [f"{name} misses the logged policy by {x:+.3g}: no vote" for name, x in missed.items()]
    if report.problem:
        outside = max(e["FQE"].low - e["model"].value, e["model"].value - e["FQE"].high)
        if not lost and outside > 0.1 * log.returns.std():
            lost = ["FQE and the model disagree"]
        if lost:
            return "", f"{'; '.join([report.problem, *lost])}: believe none of these"
        hint = f"FQE and the model agree: a hint, no more: FQE, {said(e['FQE'])}"
        return "FQE", f"{report.problem}; {hint}"
    votes = ["PDWIS", "WDR"] if "FQE" in missed else ["PDWIS", "WDR", "FQE"]
    apart = [
        f"{a} and {b} disagree"
        for a, b in combinations(votes, 2)
        if max(e[a].low, e[b].low) > min(e[a].high, e[b].high)
    ]
    ess, all_agree = report.weights.sizes[-1], "FQE" in votes and not apart
    found = [*lost, *apart, *["PDWIS, WDR and FQE agree"] * all_agree]
    found = f"{'; '.join(found)}; effective sample size {ess:.0f} of {log.n}"
    if "PDWIS and WDR disagree" in apart or not (ess >= 50 or all_agree):
        return "", f"{found}: believe none of these"
    care = "" if ess >= 50 and all_agree else " with care"
    return "WDR", f"{found}: believe WDR{care}, {said(e['WDR'])}"


def said(estimate):
    """The estimate's interval, and what it says against the logged policy."""
    (_, low, high), line = estimate.gain, f"{estimate.low:.4g} to {estimate.high:.4g}"
    word = "better" if low > 0 else "worse" if high < 0 else "cannot tell whether better"
    return f"{line}; {word} than the logged policy ({low:+.3g} to {high:+.3g})"


# ---- The logs


class Log:
    """n logged episodes: M transitions for the networks, arrays (n, T) for the estimators; and what
    is learned once for all policies."""

    def __init__(self, data, args):
        self.units, self.transitions, self.episode = data.units, data.transitions, data.episode
        self.obs, self.next_obs = data.transitions.obs, data.transitions.next_obs
        self.action, self.gamma, self.args = self.vector(data.transitions.action), args.gamma, args
        self.mean, std = self.obs.mean(0), self.obs.std(0, correction=0)
        self.std = torch.where(std > 1e-6 * self.mean.abs(), std, 1.0)  # 1: equal but for rounding
        length = torch.bincount(data.episode)
        self.n, self.first = len(length), length.cumsum(0) - length  # rows of the first steps (n,)
        self.step = torch.arange(len(self.obs)).to(length) - self.first[data.episode]  # (M,)
        terminated = data.transitions.terminal[self.first + length - 1].cpu().numpy() == 1
        length = length.cpu().numpy()
        self.horizon, self.notes = known_steps(length, terminated, args.horizon)
        self.inside = np.arange(self.horizon) < length[:, None]  # (n, T)
        self.reward = self.padded(data.transitions.reward.double().cpu().numpy())
        self.discounts = self.gamma ** np.arange(self.horizon)  # (T,)
        self.returns = self.reward @ self.discounts  # (n,)
        print(f"{self.n} episodes: in T = {self.horizon} steps, discounted by {self.gamma}, the "
              f"logged policy earned {self.returns.mean():.4g}")  # fmt: skip
        require(self.n > 1, "at least two episodes are needed")
        rng, p = np.random.default_rng(args.seed), np.full(self.n, 1 / self.n)
        with blaming(f"--resamples {args.resamples} of {self.n} episodes, 16 bytes each"):
            self.resamples = rng.multinomial(self.n, p, args.resamples) / self.n  # (B, n)
        half = torch.stack([torch.randperm(self.n) % 2 == 0 for _ in range(4)], 1)  # (n, 4)
        seen = torch.stack([half, ~half], 2).flatten(1)  # by each member of FQE (n, E)
        self.seen = seen.to(self.step.device)
        self.behavior, self.estimated_log_pi_b = fit_behavior(self, args)
        self.log_pi_b = self.known_log_prob(data.behavior_log_prob)
        self.model_returns = fit_model(self, args)
        self.errors = errors_on_logged(self, args)
        missed = ", ".join(f"{name} by {x:+.3g}" for name, x in self.errors.items())
        self.notes.append(f"the logged policy's value, which is known, is missed by {missed}")

    def standardize(self, obs):
        return (obs - self.mean) / self.std

    def vector(self, action):
        """Actions as networks take them in: (M, A), one-hot for Discrete."""
        return F.one_hot(action, self.units.action_dim).float() if self.units.discrete else action

    def padded(self, x):
        """(M,) -> (n, T), 0 after the end."""
        y = np.zeros(self.inside.shape)
        y[self.inside] = x[(self.step < self.horizon).cpu().numpy()]
        return y

    def ratio(self, log_pi, log_pi_b):
        """(n, T), 1 after the end; a single one above 1e304 is cut to that."""
        return np.exp(self.padded(np.minimum(log_pi - log_pi_b, 700)))

    def known_log_prob(self, logged):
        """log pi_b (M,) in network units: as logged, where it was, else estimated."""
        if not self.units.discrete:  # a density per unit of the environment -> per unit of [-1, 1]
            logged = logged + self.units.half_range.log().sum().item()
            edge = (self.transitions.action.abs() >= EDGE).any(1).cpu().numpy()
            logged = np.where(edge, np.nan, logged)  # D6: a mass, whatever has been logged
        check_log_prob(logged, self)
        missing = np.isnan(logged)
        self.estimated = missing.mean()  # share of the steps
        note = f"behaviour policy estimated from the data for {self.estimated:.0%} of the steps"
        self.notes.append(note if self.estimated else "behaviour policy as logged")
        return np.where(missing, self.estimated_log_pi_b, logged)


def errors_on_logged(log, args):
    """{"FQE", "model": by how much they miss what the logged policy, as estimated, has earned}."""
    members = fqe(log, log.behavior, log.seen[:, :2], args)[2]
    said = {"FQE": members.mean(), "model": log.model_returns(log.behavior).mean()}
    return {name: x - log.returns.mean() for name, x in said.items()}


# ---- Policies, loading, printing, tools: this file's own plumbing ----


class Target:
    """A policy to judge. pi: a tensor of raw observations (N, O) -> a law of actions in network
    units, with `sample` and, without a `problem`, `log_prob`; for Discrete `probs`."""

    def __init__(self, name, pi, units, args, problem="", seen=False):
        self.name, self.pi, self.units = name, pi, units
        self.problem, self.seen = problem, seen  # why it has no density; if trained on these logs
        self.samples = 1 if args.policy_mode == "deterministic" else args.action_samples

    @torch.no_grad()
    def sample(self, obs):
        with blaming(self.name):
            action = self.pi(obs).sample()
            require(action.isfinite().all(), "its actions are NaN")
        return action

    def act(self, obs):
        """Raw observations (N, O) -> actions (N, ...) for env.step."""
        return self.units.env_action(self.sample(self.units.tensor(obs)))

    @torch.no_grad()
    def log_prob(self, obs, action):
        """(M,) as float64 array."""
        with blaming(self.name):
            log_prob = chunked(lambda *x: self.pi(x[0]).log_prob(x[1]), obs, action)
            known = log_prob.shape == (len(obs),) and (log_prob < math.inf).all()  # not so NaN
            require(known, "log pi(a|s) of a logged action is not a number")
        return log_prob.double().cpu().numpy()

    @torch.no_grad()
    def support(self, obs):
        """Actions (N, K, A) and weights (N, K) that make up E_{a~pi}: all, one-hot, or samples."""
        if self.units.discrete:
            with blaming(self.name):
                p = chunked(lambda x: self.pi(x).probs.float(), obs)
            return torch.eye(p.shape[1], device=p.device).expand(len(p), -1, -1), p
        actions = torch.stack([chunked(self.sample, obs) for _ in range(self.samples)], 1)
        return actions, torch.full_like(actions[..., 0], 1 / self.samples)


def chunked(f, *arrays, size=10_000):
    """f of rows, for no more than so many at once."""
    starts = range(0, len(arrays[0]), size)
    return torch.cat([f(*(x[i : i + size] for x in arrays)) for i in starts])


class BoxLaw:
    """The law of actions in [-1, 1] that are drawn from a Gaussian (N, A), or from several
    (N, parts, A), mixed by logits (N, parts), and then clipped, or squashed by tanh. All laws count
    actions beyond EDGE as at the bound, where a law has no density but a mass [D6]: so ratios of
    any two average 1."""

    def __init__(self, mean, std, logits=None, squash=False):
        if logits is None:
            mean, std, logits = mean[:, None], std[:, None], torch.zeros_like(mean[:, :1])
        self.normal, self.logits, self.squash = Normal(mean, std), logits, squash

    def sample(self):
        part = Categorical(logits=self.logits).sample()
        u = self.normal.sample()[torch.arange(len(part)), part]
        return u.tanh() if self.squash else u.clamp(-1, 1)

    def log_prob(self, action):
        """(N, A) -> (N,): log density, at an edge log mass."""
        action = action.clamp(-EDGE, EDGE)[:, None]
        u, edge = (action.atanh(), math.atanh(EDGE)) if self.squash else (action, EDGE)
        density = self.normal.log_prob(u) - (1 - action**2).log() * self.squash
        beyond = (action.sign() * self.normal.mean - edge) / self.normal.stddev
        log_prob = torch.where(action.abs() < EDGE, density, torch.special.log_ndtr(beyond))
        return (self.logits.log_softmax(1) + log_prob.sum(-1)).logsumexp(1)


EDGE = 0.99


class Probabilities(Categorical):
    """A zero stays one, which Categorical makes 1e-7."""

    def log_prob(self, action):
        return pick(self.probs, action).log()


class InUnits:
    """A torch Distribution over Box actions in the environment's units as a law in the networks',
    which ends at the bounds: an edge has its density there times the edge's width."""

    def __init__(self, pi, units):
        self.pi, self.units = pi, units

    def sample(self):
        return self.units.action(self.pi.sample())

    def log_prob(self, action):
        env_action = torch.as_tensor(self.units.env_action(action.clamp(-EDGE, EDGE)))
        log_prob = self.pi.log_prob(env_action).reshape(len(action), -1).sum(1).to(action.device)
        edges = (action.abs() >= EDGE).sum(1)
        return log_prob + self.units.half_range.log().sum() + edges * math.log(1 - EDGE)


def certain(action, units):
    """The law of one action: a probability of 1 (Discrete), no density (Box)."""
    if units.discrete:
        return Probabilities(F.one_hot(action, units.action_dim).double())
    return SimpleNamespace(sample=lambda: action)


NO_DENSITY = "this policy of continuous actions has no density"


def run_policy(name, policy, args, seen):
    """The Target of a trained agent: its distribution, or its actions, where it has none or they
    are to be deterministic."""
    agent, units, deterministic = policy.agent, policy.units, args.policy_mode == "deterministic"
    without = deterministic or not hasattr(agent, "policy")

    def pi(obs):
        obs = units.obs(obs)
        if without:
            return certain(agent.act(obs, deterministic or units.discrete), units)
        law = agent.policy(obs)
        if units.discrete:
            return law
        squash = hasattr(law, "median")  # TanhNormal
        normal = law.normal if squash else law.base_dist
        return BoxLaw(normal.mean, normal.stddev, squash=squash)

    return Target(name, pi, units, args, NO_DENSITY * (without and not units.discrete), seen)


def user_policy(name, units, args):
    """The Target of FILE.py:NAME."""
    deterministic, function = args.policy_mode == "deterministic", load_function(name)
    problem = NO_DENSITY * (deterministic and not units.discrete)

    def probabilities(obs):
        p = function(obs.cpu().clone())  # which may change it
        p = torch.as_tensor(getattr(p, "probs", p), dtype=torch.float64, device=obs.device)
        shape, needed = tuple(p.shape), (len(obs), units.action_dim)
        require(shape == needed, f"probabilities of shape {shape}, not {needed}")
        good = (p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-4)  # not so NaN
        first = p[good.int().argmin()].tolist()
        require(good.all(), f"{first} are not probabilities: >= 0 with sum 1")
        return certain(p.argmax(1), units) if deterministic else Probabilities(p)

    def box_law(obs):
        pi = function(obs.cpu().clone())
        what = f"it returns {type(pi).__name__}, not a torch Distribution"
        require(isinstance(pi, Distribution), what)
        shape = tuple(pi.batch_shape + pi.event_shape)
        needed = len(obs), *units.action_space.shape
        require(shape == needed, f"a Distribution of shape {shape}, not {needed}")
        if deterministic:
            return certain(units.action(pi.mode), units)
        normal = pi.base_dist if isinstance(pi, Independent) else pi
        if not isinstance(normal, Normal):
            return InUnits(pi, units)
        law = normal.mean.float().to(obs.device), normal.stddev.float().to(obs.device)
        mean, std = (x.reshape(len(obs), -1) for x in law)
        require(mean.isfinite().all(), "a mean is NaN or infinite")
        require(((std > 0) & std.isfinite()).all(), "a standard deviation is not above 0")
        return BoxLaw((mean - units.center) / units.half_range, std / units.half_range)

    return Target(name, probabilities if units.discrete else box_law, units, args, problem)


def load_function(name):
    """FILE.py:NAME -> the function."""
    path, _, attribute = name.rpartition(":")
    with blaming(f"--policy {name}"):
        there = path.endswith(".py") and Path(path).is_file()
        require(there, f"FILE.py:NAME is needed, and there is no Python file {path or name}")
        function = getattr(import_file(path), attribute, None)
        require(callable(function), f"{path} has no function {attribute}")
    return function


def load_run(folder, device):
    """Policy, Args and the rest of the data of a training run, by the source that it saved."""
    with blaming(f"--run {folder}"):
        sources = list(Path(folder).glob("*.py"))
        complete = len(sources) == 1 and Path(folder, "checkpoint.pt").exists()
        require(complete, "not the folder of a training run")
        module = import_file(sources[0])
        its = module.read_checkpoint(folder)["args"]
        return module.load_policy(folder, device), its, the_rest(its.dataset_id)


def import_file(path):
    """A module under a name of its own, known to sys.modules before it runs (dataclasses ask)."""
    name = re.sub(r"\W", "_", str(Path(path).resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(args):
    """The data, and the Targets of --run and --policy."""
    runs = {folder: load_run(folder, args.device) for folder in args.run}
    once = len(runs) == len(args.run) and len(set(args.policy)) == len(args.policy)
    require(once, "the same --run or --policy is given twice")
    rests = {rest for _, _, rest in runs.values()}
    which = "the runs have different ones" if runs else "--policy has none of its own"
    require(args.dataset_id or len(rests) == 1, f"--dataset-id is needed: {which}")
    ids = args.dataset_id or rests.pop()
    print(f"judged on {' '.join(ids)}")
    data, policies = Dataset(ids, device=args.device), []
    data.longest = max(data.longest, args.horizon or 0)
    envs = {its.env_id for _, its, _ in runs.values()}
    one = args.env_id or len(envs) < 2 or not args.verify
    require(one, "--env-id is needed: the runs have different ones")
    for folder, (policy, its, _) in runs.items():
        with blaming(f"--run {folder}"):
            its_spaces = policy.units.observation_space, policy.units.action_space
            same = its_spaces == (data.units.observation_space, data.units.action_space)
            require(same, "its spaces are not those of the data")
            policies.append(run_policy(folder, policy, args, overlap(its.dataset_id, ids)))
        if its.env_id and not args.env_id:
            data.make_env = partial(gym.make, its.env_id)
    return data, policies + [user_policy(name, data.units, args) for name in args.policy]


def overlap(ids, others):
    pairs = product(map(split_id, ids), map(split_id, others))
    return any(x[0] == y[0] and max(x[1], y[1]) < min(x[2], y[2]) for x, y in pairs)


def the_rest(ids):
    """What a run on a part of its datasets has left out; all, if it has left out nothing."""
    parts, rest = sorted(map(split_id, ids)), []
    for name in dict.fromkeys(part[0] for part in parts):
        end = 0
        for first, last in [*(part[1:] for part in parts if part[0] == name), (100, 100)]:
            rest += [f"{name}[{end}%:{first}%]"] if first > end else []
            end = max(end, last)
    return tuple(rest) or tuple(ids)


def example(args, episodes=1000, gains=(5.0, 12.0), seed=0):
    """Logs of a linear controller of CartPole, up to --horizon; the larger its gain, the more
    decided. The first gain is the logged one, the others are to be judged."""
    envs = gym.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")
    units = Units(envs.single_observation_space, envs.single_action_space).to(args.device)

    def right(obs, gain):  # probability (N,)
        return 1 / (1 + np.exp(-gain * np.asarray(obs, np.float64) @ [0.1, 0.5, 1.0, 0.5]))

    def target(gain):
        def pi(obs):
            p = right(obs.cpu(), gain)
            return Probabilities(torch.as_tensor(np.stack([1 - p, p], 1), device=obs.device))

        return Target(f"gain {gain}", pi, units, args)

    rng = np.random.default_rng((seed, 1))  # not the environment's stream: it draws from `seed`
    obs, alive, steps = envs.reset(seed=seed)[0], np.full(episodes, True), []
    for _ in range(args.horizon):  # all episodes at once
        p = right(obs, gains[0])
        action = (rng.random(episodes) < p).astype(int)
        next_obs, reward, terminated, *_ = envs.step(action)
        log_prob = np.log(np.where(action, p, 1 - p))
        steps.append((obs, action, reward, next_obs, terminated, log_prob, alive))
        obs, alive = next_obs, alive & ~terminated
    *columns, alive = (np.stack(x, 1) for x in zip(*steps, strict=True))  # (n, T, ...)
    obs, action, reward, next_obs, terminal, log_prob = (x[alive] for x in columns)
    s, r, next_s, d = map(units.tensor, (obs, reward, next_obs, terminal))
    data = SimpleNamespace(
        units=units,
        transitions=Batch(s, units.action(action), r, next_s, d),
        episode=torch.as_tensor(np.nonzero(alive)[0], device=args.device),
        behavior_log_prob=log_prob,
        make_env=partial(gym.make, "CartPole-v1"),
    )
    return data, [target(gain) for gain in gains[1:]]


def known_steps(length, terminated, horizon):
    """T, and notes on it. After the end of a terminated episode nothing is earned; after that of a
    truncated one nobody knows, so that none may be shorter than T."""
    cut, notes = np.where(terminated, length.max() + 1, length), []
    known = min(cut.min(), length.max())
    T, episode, count = horizon or known, cut.argmin(), (cut == known).sum()
    where = f"episode {episode} was truncated after {known} steps"
    unknown = f"--horizon {horizon}: {where}, its rest is unknown; --horizon {known} at most"
    require(terminated.all() or T <= known, unknown)
    if not horizon and length.max() > known:
        longer = min([*cut[cut > known], length.max()])
        notes.append(f"T = {T}, as {where} ({count} are so short); without, T would be {longer}")
    if terminated.all() and (length == length[0]).all() and T > 1:
        notes.append(f"all episodes terminate after exactly {known} steps: if that is a time limit "
                     "log truncations, or FQE and the model are wrong")  # fmt: skip
    return int(T), notes


def check_log_prob(log_prob, log):
    """Of the logged actions: none has probability 0, or above 1."""
    wrong = np.isinf(log_prob) | (log.units.discrete & (log_prob > 1e-6))
    i = wrong.argmax()
    what = "zero probability of" if log_prob[i] < 0 else "too high a probability of"
    where = f"episode {log.episode[i].item()}, step {log.step[i].item()}"
    require(not wrong[i], f"{where}: behavior_log_prob gives {what} the logged action")


def true_value(policy, make_env, episodes, log):
    """Mean and standard error over fresh episodes: same horizon, discount and policy mode."""

    def make():  # an environment that is reset once
        discounts = (log.gamma**t for t in count())
        env = gym.wrappers.TransformReward(make_env(), lambda reward: reward * next(discounts))
        return gym.wrappers.TimeLimit(env, log.horizon)

    with blaming("--verify"):
        returns = evaluate(policy, make, episodes)
    return returns.mean(), returns.std(ddof=1) / math.sqrt(episodes)


def print_report(report):
    log, truth, w = report.log, report.truth, report.weights
    print(f"\n{report.name}, {log.args.policy_mode}: T = {log.horizon} steps, gamma = {log.gamma}")
    print("estimator  estimate    95% interval" + " " * 16 + "error" * bool(truth))
    doubts = {}
    for name, e in report.estimates.items():
        error = f"{e.value - truth[0]:+9.3g}" if truth else ""
        row = f"{e.value:10.4g}  {e.low:10.4g} .. {e.high:<10.4g} {'*' * bool(e.doubt):1} {error}"
        overflow = not np.isfinite(e.low + e.high)
        print(f"{name:9s} {'        -   the weights overflow' if overflow else row}")
        doubts[e.doubt] = [*doubts.get(e.doubt, ()), name]
    if truth:
        print(f"{'truth':9s} {truth[0]:10.4g}  +- {truth[1]:.2g} (standard error)")
    doubts.pop("", None)
    for doubt, names in doubts.items():
        print(f"* no 95% interval ({', '.join(names)}): {doubt}")
    if w:
        error = f" +- {w.error:.2g}" if math.isfinite(w.error) else ""
        print(f"weights: effective sample size {w.sizes[-1]:.1f} of {log.n}, mean {w.mean:.3g}"
              f"{error} (should be 1), {w.nonzero:.0%} not 0, the largest {w.largest:.0%} of all"
        )  # fmt: skip
    gains = [(k, *report.estimates[k].gain) for k in ("WDR", "FQE") if k in report.estimates]
    gains = ", ".join("{} {:+.3g} ({:+.3g} to {:+.3g})".format(*x) for x in gains)
    print(f"the logged policy earned {log.returns.mean():.4g}; difference to that: {gains}")
    if report.bounds and not report.seen:
        bounds = ", ".join(f"{x:.4g} ({name})" for name, x in report.bounds.items())
        if_right = ", if the estimated pi_b is right," if log.estimated else ""
        print(f"with 95% confidence{if_right} at least {bounds}")
    print(f"verdict: {verdict(report)[1]}")


def print_ranking(reports):
    """Policies from best to worst, by what the verdicts believe of all of them."""
    verdicts = [verdict(report) for report in reports]
    believed = {name for name, _ in verdicts}
    if "" in believed:
        print("\nno ranking: there is a policy of which nothing can be believed")
        return
    if len(believed) > 1 and any(x == "WDR" and "FQE agree" not in line for x, line in verdicts):
        print("\nno ranking: FQE alone says something of all, and is not believed of each")
        return
    by, hint = ("FQE", ", a hint, no more") if "FQE" in believed else ("WDR", "")
    print(f"\nranking by {by}{hint}")
    for report in sorted(reports, key=lambda r: -r.estimates[by].value):
        e = report.estimates[by]
        print(f"{e.value:10.4g}  {e.low:10.4g} .. {e.high:<10.4g}  {report.name}")


@torch.enable_grad()
def train(net, loss, rows, args, held_out=None):
    """Minimises loss(i) over random transitions i (E, N), those of member e out of rows[e]; with
    rows held_out (1, H), `net` ends as it was when the loss of those was lowest."""
    optimizer, best, lowest = Adam(net.parameters(), args.lr, args.steps), None, math.inf
    for update in range(1, args.steps + 1):
        i = [x[torch.randint(len(x), (args.batch_size,), device=x.device)] for x in rows]
        step(optimizer, loss(torch.stack(i)))
        if held_out is not None and (update % 100 == 0 or update == args.steps):
            with torch.no_grad():
                now = loss(held_out).item()
            if not now >= lowest:  # also when none are held out: NaN
                best, lowest = deepcopy(net.state_dict()), now
    if best:
        net.load_state_dict(best)


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


def t_quantile(level, df):
    """Student's: t = sqrt(df) tan(theta) where theta in +-pi/2 has a density ~ cos(theta)^(df - 1)
    (SciPy has it, which is no package of this file)."""
    theta = (np.arange(20_000) + 0.5) / 20_000 * np.pi - np.pi / 2
    density = np.cos(theta) ** (df - 1)
    cdf = density.cumsum() - density / 2  # in the middle of each cell
    return math.sqrt(df) * math.tan(np.interp(level, cdf / density.sum(), theta))


def check_args(args):
    mode = args.policy_mode
    known = mode in ("stochastic", "deterministic")
    require(known, f"--policy-mode {mode}: it must be stochastic or deterministic")
    limits = {"horizon": (1, 10**5), "gamma": (0.0, 1.0), "lowest_reward": (-1e9, 1e9)}
    limits |= {"resamples": (100, 10**6), "verify_episodes": (2, 10**6), "seed": (0, 2**32 - 1)}
    limits |= {"steps": (1, 10**9), "batch_size": (1, 10**6), "hidden": (1, 10**4)}
    limits |= {"lr": (1e-12, 1.0), "action_samples": (1, 10**4)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        kinds = (int, float) if isinstance(low, float) else (int,)
        with blaming(f"--{name.replace('_', '-')} {value}"):
            for x in value if name == "hidden" else (value,):
                if x is not None or name not in ("horizon", "lowest_reward"):
                    require(type(x) in kinds, "a number is needed, a whole one if it counts")
                    require(low <= x <= high, f"it must lie in {low:,} to {high:,}")


def command_line():
    """Runs main with the flags of the command line; what the user can mend is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except UserError as error:
        sys.exit(f"ope: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---- Plumbing, the same in every file: a reader of the method can stop here ----


class MLP(nn.Module):
    """Networks side by side: x (N, I) for all, or (members, N, I) -> (members, N, O)."""

    def __init__(self, members, *sizes, activation=torch.relu_):
        super().__init__()
        self.activation = activation
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):  # initialised as torch.nn.Linear
            self.weight.append(torch.empty(members, o, i).uniform_(-(i**-0.5), i**-0.5))
            self.bias.append(torch.empty(members, o, 1).uniform_(-(i**-0.5), i**-0.5))

    def forward(self, x):
        x = x.mT.expand(len(self.bias[0]), *x.mT.shape[-2:])  # columns: thin layers are faster
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.bmm(weight, self.activation(x) if layer else x).add_(bias)
        return x.mT


class Adam(nn.Module):
    """What torch.optim.Adam keeps, as a module: it is saved with the agent. The learning rate falls
    to 0 along a cosine within `decay` steps, and goes on along it."""

    def __init__(self, parameters, lr, decay=math.inf):
        super().__init__()
        self.params, self.first_lr, self.decay = list(parameters), lr, decay
        self.means = nn.ParameterList(torch.zeros_like(p) for p in self.params)
        self.squares = nn.ParameterList(torch.zeros_like(p) for p in self.params)
        self.register_buffer("count", self.params[0].new_zeros(()))
        self.register_buffer("lr", self.params[0].new_tensor(lr))


@torch.no_grad()
def step(optimizer, loss):
    """One step of Adam; an actor's loss leaves no gradients in the critic that it goes through."""
    lr, count, params = optimizer.lr, optimizer.count, optimizer.params
    means, squares = list(optimizer.means), list(optimizer.squares)
    gradients = torch.autograd.grad(loss, params)
    count += 1
    if torch.compiler.is_compiling():  # one loop with what surrounds it
        rest1, rest2 = (count * math.log(0.9)).exp(), (count * math.log(0.999)).exp()
        for p, gradient, mean, square in zip(params, gradients, means, squares, strict=True):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            p -= lr / (1 - rest1) * mean / ((square / (1 - rest2)).sqrt() + 1e-8)
    else:  # the same in one call
        rates = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
        counts, options = [count] * len(params), {"amsgrad": False, "maximize": False}
        torch._fused_adam_(params, gradients, means, squares, [], counts, **rates, **options)
    if optimizer.decay < math.inf:
        lr.copy_(optimizer.first_lr * (1 + (count * (math.pi / optimizer.decay)).cos()) / 2)


def pick(values, index):
    """values (N, A), index (N,) -> values[n, index[n]] (N,)."""
    return values.gather(1, index[:, None])[:, 0]


class UserError(Exception):
    """Bad input, or a run that has to stop: one line on what is wrong, where, and what to do."""


@contextmanager
def blaming(what):
    """Whatever goes wrong inside, here or in a library, becomes one line that begins with what."""
    try:
        yield
    except (Exception, SystemExit) as error:  # some environments call sys.exit
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(" ".join(f"{what}: {reason}".split())[:500]) from error


def require(ok, problem):
    """Stops with the problem unless ok."""
    if not ok:
        raise UserError(problem)


# ---- Data ----
class Batch(NamedTuple):
    """N transitions in network units. terminal is 1.0 where the MDP ended, not at a time limit."""

    obs: torch.Tensor  # (N, O) float32
    action: torch.Tensor  # (N, A) float32 in [-1, 1], or (N,) int64 from 0
    reward: torch.Tensor  # (N,) float32, scaled and shifted
    next_obs: torch.Tensor  # (N, O) float32
    terminal: torch.Tensor  # (N,) float32


class Units(nn.Module):
    """Translates the environment's units to the networks' and back; saved with the policy."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.obs_dim, self.action_dim = map(spaces.flatdim, (observation_space, action_space))
        sizes = self.obs_dim, self.action_dim
        require(1 <= min(sizes) and max(sizes) <= 10**5, "spaces must have 1 to 100,000 numbers")
        self.discrete = isinstance(action_space, spaces.Discrete)
        floats = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
        low, high = (action_space.low, action_space.high) if floats else (np.zeros(1), np.ones(1))
        known = (floats or self.discrete) and ((low < high) & (high - low < math.inf)).all()
        require(known, f"actions must be Discrete or a bounded Box of floats, not {action_space}")
        self.register_buffer("obs_mean", torch.zeros(self.obs_dim))
        self.register_buffer("obs_std", torch.ones(self.obs_dim))
        self.register_buffer("center", self.tensor((low + high) / 2.0).flatten())
        self.register_buffer("half_range", self.tensor((high - low) / 2.0).flatten())

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.obs_mean.device)

    def obs(self, obs):
        """(N, ...) -> (N, O), standardised. Dict and Tuple as rows of gymnasium.spaces.flatten."""
        with blaming("observations (Dict, Tuple, Discrete: rows of gymnasium.spaces.flatten)"):
            obs = self.tensor(obs)
        good = obs.ndim > 1 and obs.numel() == len(obs) * self.obs_dim > 0
        require(good, f"observations {tuple(obs.shape)} are not (N, {self.obs_dim}) numbers")
        require(obs.isfinite().all(), "an observation is NaN or infinite")
        return (obs.flatten(1) - self.obs_mean) / self.obs_std

    def action(self, action):
        """Environment actions (N, ...) -> (N, A) in [-1, 1], or (N,) int64 from 0."""
        if self.discrete:
            return self.tensor(np.asarray(action) - self.action_space.start).long()
        action = self.tensor(action).reshape(len(action), self.action_dim)
        return ((action - self.center) / self.half_range).clamp(-1, 1)

    def env_action(self, action):
        """The inverse of `action`: an array (N, ...) for env.step."""
        space = self.action_space
        if self.discrete:
            return action.cpu().numpy() + space.start
        action = (self.center + action * self.half_range).cpu().numpy()
        require(np.isfinite(action).all(), "actions are NaN: observations are far from the data's")
        return action.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype)


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
    """20,000 transitions (the last episode complete), the same but for the CPU's rounding, of a
    scripted controller that acts at random with probability eps, in cartpole/0.35-v0 0.35; its
    probabilities if it has any. -> (episodes, (observation space, action space), make_env or None,
    reference or None)."""
    twin = dataset_id == "pendulum/0.6-v0"  # of medium: no dataset has two names
    name = r"(pendulum|cartpole)/(random|medium|expert|mixed|0\.\d*[1-9])-v0"
    known = not twin and re.fullmatch(name, dataset_id)
    names = "{pendulum,cartpole}/{random,medium,expert,mixed}-v0 and, by the noise, 0.35-v0 (not "
    names += "0.350; pendulum/0.6 is medium, 0.0 expert)"
    require(known, f"not on disk, and not built in, as are {names}")
    rng, episodes, cartpole = np.random.default_rng(0), [], known[1] == "cartpole"
    noises = {"random": 1, "medium": 0.3 if cartpole else 0.6, "expert": 0, "mixed": None}
    noise = noises[known[2]] if known[2] in noises else float(known[2])
    make_env = partial(gym.make, "CartPole-v1" if cartpole else "Pendulum-v1")
    env = make_env(disable_env_checker=True)
    while sum(len(episode.actions) for episode in episodes) < 20_000:
        eps = rng.uniform() if noise is None else noise
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
    reference = (22.0, 500.0) if cartpole else (-1230.0, -146.0)  # random actions, the controller
    return episodes, (env.observation_space, env.action_space), make_env, reference


def open_dataset(dataset_id):
    """What builtin_dataset returns, of a dataset on disk, else built in, else from the hub."""
    root = minari.storage.get_dataset_path()
    folder = root / dataset_id / "data"
    if not folder.exists():
        if dataset_id.startswith(("pendulum/", "cartpole/")):
            source = builtin_dataset(dataset_id)
            print(f"{dataset_id}: built in")
            return source
        versioned = re.search(r"-v\d+$", dataset_id)
        require(versioned, f"the id needs a version, as in {dataset_id}-v0")
        others = sorted(str(x.parent.relative_to(root)) for x in root.glob("**/data"))
        print(f"{dataset_id}: not in {root}, where {others} are; asking the hub", flush=True)
    with blaming(f"to install it by hand, put metadata.json and main_data.hdf5 into {folder}"):
        dataset = minari.load_dataset(dataset_id, download=True)
    print(f"{dataset_id}: read from {root}")
    # AntMaze's umaze: the maze of the evaluation is turned by 180 degrees against the data's.
    make_env = partial(dataset.recover_environment, eval_env="antmaze/umaze" not in dataset_id)
    scores = (dataset.storage.metadata.get(f"ref_{end}_score", "nan") for end in ("min", "max"))
    low, high = map(float, scores)
    reference = (low, high) if -math.inf < low < high < math.inf else None
    its_spaces = dataset.observation_space, dataset.action_space
    return dataset, its_spaces, dataset.env_spec and make_env, reference


def flatten(space, x):
    """Observations (T, ...) of an episode -> (T, O), in the order of gymnasium.spaces.flatten."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return np.concatenate([flatten(part, x[key]) for key, part in parts], 1)
    x = np.asarray(x)
    if isinstance(space, spaces.Discrete):
        one_hot = x[:, None] == np.arange(space.n) + space.start
        known = one_hot.any(1)
        require(known.all(), f"step {known.argmin()}: the observation is not in {space}")
        return one_hot.astype(np.float32)
    rows = isinstance(space, spaces.Box) and (space.dtype != np.uint8 or len(space.shape) < 2)
    require(rows, f"observations of {space} are not supported; images: store features")
    fits = x.shape[1:] == space.shape and x.dtype.kind in "biuf"
    require(fits, f"{x.dtype} observations of shape {x.shape[1:]} are not of {space}")
    return x.astype(np.float32).reshape(len(x), -1)


def read_episode(episode, observation_space, action_space):
    """Obs (T + 1, O), action (T, ...), reward, terminal, behavior_log_prob (T,), all checked."""
    T, log_prob = len(episode.actions), (episode.infos or {}).get("behavior_log_prob")
    log_prob = np.full(T, np.nan) if log_prob is None else np.asarray(log_prob)
    log_prob = log_prob[1:] if len(log_prob) == T + 1 else log_prob  # Minari's row of the reset
    columns = episode.actions, episode.rewards, episode.terminations, episode.truncations, log_prob
    action, reward, terminal, truncated, log_prob = columns = [np.asarray(x) for x in columns]
    obs, shapes = flatten(observation_space, episode.observations), [x.shape for x in columns]
    names = "actions, rewards, terminations, truncations and behavior_log_prob"
    good = 0 < T == len(obs) - 1 and shapes == [(T, *action_space.shape), *4 * [(T,)]]
    require(good, f"{len(obs)} observations need T = {len(obs) - 1}; {names} have shapes {shapes}")
    require(all(x.dtype.kind in "biuf" for x in columns), f"{names} must be plain numbers")
    if isinstance(action_space, spaces.Discrete):
        inside = np.isin(action, np.arange(action_space.n) + action_space.start)
    else:
        slack = 1e-3 * (action_space.high - action_space.low)  # rounding; Units clips it away
        inside = (action >= action_space.low - slack) & (action <= action_space.high + slack)
    ended, last = (terminal != 0) | (truncated != 0), np.arange(T) == T - 1
    for ok, problem in (
        (np.isfinite(obs), "the observation is NaN or infinite"),
        (np.abs(reward.astype(np.float64)) < 1e30, "the reward is NaN, infinite or beyond 1e30"),
        (inside, f"the action is not in {action_space}"),
        (np.isin(terminal, (0, 1)) & np.isin(truncated, (0, 1)), "the end flags must be 0 or 1"),
        (ended | ~last, "the end is neither terminated nor truncated; set truncations[-1] = True"),
        (last | ~ended, "the episode ends here and yet goes on; split it in two"),
    ):
        if not ok.all():
            raise UserError(f"step {np.argwhere(~ok)[0][0]}: {problem}")
    return obs, action, reward.astype(np.float64), terminal != 0, log_prob.astype(np.float64)


def split_id(name):
    """mylab/logs-v0[:80%] -> the id, and where the part begins and ends, in % of the episodes."""
    part = re.fullmatch(r"(.*?)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", name)
    plain = re.fullmatch(r"([^./][^/]*/)*[^./][^/]*", part[1])  # so that no dataset has two names
    require(plain, "an id is needed, as in mylab/logs-v0, not a path")
    first, last = int(part[2] or 0), int(part[3] or 100)
    good = "[" not in part[1] and first < last <= 100
    require(good, "a part is written in whole percent, as [:80%] or [80%:]")
    return part[1], first, last


class Dataset:
    """M transitions of one or more Minari datasets on the device, episode after episode. Nothing is
    dropped: T + 1 observations make T transitions, the last with its true s'."""

    def __init__(self, ids, normalize_obs=False, reward_scale=1.0, reward_shift=0.0, device="cpu"):
        rows, sources, parts = [], [], []
        for name in ids:
            with blaming(f"dataset {name}"):
                whole, first, last = split_id(name)
                apart = (x != whole or last <= start or end <= first for x, start, end in parts)
                require(all(apart), "its episodes would count twice")
                parts.append((whole, first, last))
                episodes, its_spaces, *_ = source = open_dataset(whole)
                self.units = Units(*its_spaces)
                sources.append(source)
                require(its_spaces == sources[0][1], f"its spaces are not those of {ids[0]}")
                numbers = range(-(-first * len(episodes) // 100), -(-last * len(episodes) // 100))
                require(numbers, "it has no episodes")
                for number in numbers:
                    with blaming(f"episode {number}"):
                        rows.append(read_episode(episodes[number], *its_spaces))
        obs, action, reward, terminal, log_prob = zip(*rows, strict=True)
        self.make_env = sources[0][2]  # the environment that the data name, or None
        references = {source[3] for source in sources}  # raw returns that score 0 and 100
        self.reference = references.pop() if len(references) == 1 else None
        self.returns = returns = np.array([r.sum() for r in reward])  # (episodes,) undiscounted
        if reward_scale == "return-range":
            spread, size = np.ptp(returns), max(abs(r).sum() for r in reward)
            reward_scale = 1000 / spread if spread > 1e-9 * size else 1.0
        self.reward_scale, self.reward_shift = reward_scale, reward_shift
        size = f"{sum(map(len, reward))} transitions in {len(rows)} episodes"
        mean_min_max = f"{returns.mean():.1f} ({returns.min():.1f} to {returns.max():.1f})"
        print(f"{size}, return {mean_min_max}; rewards x {reward_scale:.4g} + {reward_shift:.4g}")
        s, next_s = np.concatenate([o[:-1] for o in obs]), np.concatenate([o[1:] for o in obs])
        a, r, d, self.behavior_log_prob = map(np.concatenate, (action, reward, terminal, log_prob))
        with blaming(f"--device {device}"):
            units = self.units.to(device)
            if normalize_obs:
                mean, std = s.mean(0, dtype=np.float64), s.std(0, dtype=np.float64)
                units.obs_mean, units.obs_std = units.tensor(mean), units.tensor(std + 1e-3)
                for i in np.flatnonzero((1e-6 * abs(mean) < std) & (std < 1e-3)):
                    print(f"observation {i} varies by only {std[i]:.2g}: use smaller units for it")
            r, d = units.tensor(r * reward_scale + reward_shift), units.tensor(d)
            self.transitions = Batch(units.obs(s), units.action(a), r, units.obs(next_s), d)
            lengths = torch.tensor([len(r) for r in reward], device=device)
            self.episode = torch.arange(len(rows), device=device).repeat_interleave(lengths)  # (M,)
            self.longest = lengths.max().item()  # steps of an episode

    def batch(self, index):
        return Batch(*(x[index] for x in self.transitions))

    def sample(self, n):
        index = torch.randint(len(self.episode), (n,), device=self.episode.device)
        return Batch(*(x.index_select(0, index) for x in self.transitions))  # faster than x[index]


# ---- Evaluation ----
def find_env(data, env_id, unless="with --eval-episodes 0"):
    """Makes environments of --env-id, else of the data, or None; observations become rows (O,)."""
    make = partial(gym.make, env_id) if env_id else data.make_env
    if make is None:
        print("no evaluation: the data name no environment; --env-id gives one, ope.py needs none")
        return None
    with blaming(f"environment {env_id or 'of the data'} (not needed {unless})"):
        env, space = make(), data.units.observation_space
        limit = env.spec.max_episode_steps or data.longest
        if not env.spec.max_episode_steps:
            print(f"the environment has no time limit: an episode ends after {limit} steps")
        row = spaces.flatten(space, env.reset(seed=0)[0])
        same = len(row) == data.units.obs_dim and env.action_space == data.units.action_space
        require(same, "its spaces are not those of the data")
    to_row = partial(gym.wrappers.TransformObservation, func=partial(spaces.flatten, space))
    settings = {"disable_env_checker": True, "max_episode_steps": limit}
    return lambda: to_row(make(**settings), observation_space=spaces.flatten_space(space))


@torch.random.fork_rng()
def evaluate(policy, make_env, episodes, seed=10_000):
    """Raw returns (episodes,) of the deterministic policy. Episode i is reset with seed + i for all
    methods, so that comparisons are paired."""
    torch.manual_seed(seed)
    envs, returns = [make_env() for _ in range(episodes)], np.zeros(episodes)
    obs = {i: env.reset(seed=seed + i)[0] for i, env in enumerate(envs)}  # of those still alive
    while obs:
        for i, action in zip(list(obs), policy.act(np.stack(list(obs.values()))), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            require(math.isfinite(returns[i]), f"the environment's reward is {reward}")
            if terminated or truncated:
                envs[i].close()
                del obs[i]
    return returns


def use_cpu_well():
    """One thread, or OMP_NUM_THREADS: a second gains little, and on a busy machine they wait for
    each other. And oneDNN's float32 products, on AMD CPUs up to twice as fast as MKL's, unless the
    CPU would really round to bfloat16 (an error of 2e-3 instead of 1e-6)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)
    if sys.platform == "linux":  # keep freed memory: to ask for it again costs CQL a fifth
        for limit, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(limit, size)
    x = torch.linspace(0, 1, 256 * 256, device="cpu").view(256, 256)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    exact = x.double() @ x.double()
    if (x @ x - exact).abs().max() > 1e-4 * exact.abs().max():
        torch.backends.mkldnn.matmul.fp32_precision = "none"


if __name__ == "__main__":
    command_line()
