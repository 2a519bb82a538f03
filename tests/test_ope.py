"""ope.py: expectations as exact sums over all trajectories of a small MDP, networks against exact
tables, densities against integrals, and everything that a user can get wrong."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import copy
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal, TanhTransform
from torch.distributions import TransformedDistribution as Transformed

import ope
from ope import (
    Args,
    BoxLaw,
    Estimate,
    UserError,
    bernstein_bound,
    hcope_bound,
    student_t_bound,
)


def of_equal_shares(estimator):
    """The estimator with p as its last argument, 1/n by default."""

    def with_p(reward, *arrays, p=None, **flags):
        p = np.full(len(reward), 1 / len(reward)) if p is None else p
        return estimator(p, reward, *arrays, **flags)

    return with_p


def of_shares(estimator, *arrays, **flags):
    """What bootstrap takes: a function of p."""
    return lambda p: estimator(*arrays, p=p, **flags)


S, A, T = 3, 2, 3
ope.builtin_dataset = cache(ope.builtin_dataset)
importance_sampling, doubly_robust, magic = map(
    of_equal_shares, (ope.importance_sampling, ope.doubly_robust, ope.magic)
)
PDIS = partial(importance_sampling, per_decision=True)
WIS = partial(importance_sampling, weighted=True)
PDWIS = partial(importance_sampling, per_decision=True, weighted=True)
WDR = partial(doubly_robust, weighted=True)


class MDP:
    """3 states and an absorbing end, 2 actions, horizon 3: few enough trajectories to list all."""

    def __init__(self, seed, deterministic=False, ends=True, gamma=0.9):
        rng = np.random.default_rng(seed)
        self.gamma, self.end, self.rng = gamma, S, rng
        self.P = rng.dirichlet(np.ones(S + 1), (S + 1, A))
        if not ends:
            self.P = np.pad(rng.dirichlet(np.ones(S), (S + 1, A)), ((0, 0), (0, 0), (0, 1)))
        self.start = rng.dirichlet(np.ones(S))
        if deterministic:
            self.P = np.eye(S + 1)[self.P.argmax(2)]
            self.start = np.eye(S)[0]
        self.P[S] = np.eye(S + 1)[S]
        self.r = rng.normal(size=(S + 1, A))
        self.r[S] = 0
        self.behavior, self.target = (rng.dirichlet(np.ones(A), S + 1) for _ in range(2))

    def q(self, pi, steps=T):
        """Exact Q with t steps to go, (steps + 1, S + 1, A), by dynamic programming."""
        q = [np.zeros((S + 1, A))]
        for _ in range(steps):
            q.append(self.r + self.gamma * self.P @ (pi * q[-1]).sum(1))
        return np.array(q)

    def value(self, pi, steps=T):
        return float(self.start @ (pi * self.q(pi, steps)[steps]).sum(1)[:S])

    def ratio(self, state, action):
        ratio = self.target / self.behavior
        return np.where(state == self.end, 1.0, ratio[state, action])

    def trajectories(self):
        """(probability (n,), state, action, reward, ratio (n, T)) of all under the behaviour."""
        rows = []
        for path in product(*[range(S)], *[range(A), range(S + 1)] * (T - 1), range(A)):
            state, action = np.array(path[::2]), np.array(path[1::2])
            p = self.start[state[0]]
            for t in range(T):
                p *= self.behavior[state[t], action[t]]
                if t + 1 < T:
                    p *= self.P[state[t], action[t], state[t + 1]]
            rows.append((p, state, action))
        p, state, action = (np.array(x) for x in zip(*rows, strict=True))
        return p, state, action, self.r[state, action], self.ratio(state, action)

    def sample(self, n, policy=None):
        """n logged episodes: state, action, reward, ratio (n, T)."""
        if not hasattr(self, "listed"):
            self.listed = self.trajectories()
        p, *columns = self.listed
        index = self.rng.choice(len(p), n, p=p / p.sum())
        return [x[index] for x in columns]

    def q_and_v(self, q, state, action):
        """Of Q with t steps to go (T + 1, S + 1, A): q (n, T), v (n, T + 1) along trajectories."""
        left = T - np.arange(T)
        v = (self.target * q).sum(2)[left, state]
        return q[left, state, action], np.pad(v, ((0, 0), (0, 1)))

    def random_q(self):
        q = self.rng.normal(size=(T + 1, S + 1, A))
        q[0], q[:, S] = 0, 0
        return q


@pytest.fixture(params=[0, 1, 2])
def mdp(request):
    return MDP(request.param)


def each(estimator, *arrays):
    """The estimate from every single episode."""
    return np.array([estimator(*(x[i : i + 1] for x in arrays)) for i in range(len(arrays[0]))])


# T-OPE-1, 2, 17: bias, by exact enumeration


def test_the_enumeration_is_complete(mdp):
    p, _, _, reward, _ = mdp.trajectories()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    behavior_value = p @ (reward * mdp.gamma ** np.arange(T)).sum(1)
    assert behavior_value == pytest.approx(mdp.value(mdp.behavior), abs=1e-12)


def test_is_pdis_and_dr_with_a_wrong_q_are_unbiased(mdp):
    p, state, action, reward, ratio = mdp.trajectories()
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    truth = mdp.value(mdp.target)
    g = mdp.gamma
    assert abs(truth - mdp.value(mdp.behavior)) > 0.01  # or the test would prove nothing
    for values in (
        each(partial(importance_sampling, gamma=g), reward, ratio),
        each(partial(PDIS, gamma=g), reward, ratio),
        each(partial(doubly_robust, gamma=g), reward, ratio, q, v),
    ):
        assert p @ values == pytest.approx(truth, abs=1e-10)


def test_dr_with_the_exact_q_is_unbiased_for_wrong_ratios(mdp):
    p, state, action, reward, _ = mdp.trajectories()
    q, v = mdp.q_and_v(mdp.q(mdp.target), state, action)
    wrong = np.where(state == mdp.end, 1.0, mdp.rng.uniform(0.2, 3, (S + 1, A))[state, action])
    values = each(partial(doubly_robust, gamma=mdp.gamma), reward, wrong, q, v)
    assert p @ values == pytest.approx(mdp.value(mdp.target), abs=1e-10)


def test_weighted_forms_of_one_episode_are_the_behaviour_s(mdp):
    p, state, action, reward, ratio = mdp.trajectories()
    behavior_value = mdp.value(mdp.behavior)
    for estimator in (WIS, PDWIS):
        values = each(partial(estimator, gamma=mdp.gamma), reward, ratio)
        assert p @ values == pytest.approx(behavior_value, abs=1e-10)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    values = each(partial(WDR, gamma=mdp.gamma), reward, ratio, q, v)
    control = (v[:, :-1] - q) @ mdp.gamma ** np.arange(T)  # not of mean 0 under pi_b
    assert p @ values == pytest.approx(behavior_value + p @ control, abs=1e-10)


def test_weighted_forms_of_two_episodes_are_biased_towards_the_behaviour():
    mdp = MDP(0)
    p, _, _, reward, ratio = mdp.trajectories()
    keep = p > 0
    p, reward, ratio = p[keep], reward[keep], ratio[keep]
    g, w = (reward * mdp.gamma ** np.arange(T)).sum(1), ratio.prod(1)
    pairs = (w[:, None] * g[:, None] + w * g) / (w[:, None] + w)
    assert WIS(reward[[3, 40]], ratio[[3, 40]], mdp.gamma) == pytest.approx(pairs[3, 40])
    expected, truth, behavior = p @ pairs @ p, mdp.value(mdp.target), mdp.value(mdp.behavior)
    assert min(truth, behavior) + 1e-3 < expected < max(truth, behavior) - 1e-3


def test_weighted_forms_are_consistent():
    mdp = MDP(1)
    state, action, reward, ratio = mdp.sample(200_000)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    truth = mdp.value(mdp.target)
    for value in (
        WIS(reward, ratio, mdp.gamma),
        PDWIS(reward, ratio, mdp.gamma),
        WDR(reward, ratio, q, v, mdp.gamma),
    ):
        assert value == pytest.approx(truth, abs=0.02)


def test_the_dr_of_common_lecture_notes_is_another_and_biased(mdp):
    p, state, action, reward, ratio = mdp.trajectories()
    q, v = mdp.q_and_v(mdp.q(mdp.target), state, action)
    notes = (ratio.cumprod(1) * (reward - q) + v[:, :-1]).sum(1)  # no gamma^t, no w_{t-1} on V
    ours = each(partial(doubly_robust, gamma=mdp.gamma), reward, ratio, q, v)
    truth = mdp.value(mdp.target)
    assert p @ ours == pytest.approx(truth, abs=1e-10)
    assert abs(p @ notes - truth) > 0.05


# T-OPE-3 to 8, 11, 12, 14, 18: identities


def test_all_are_the_mean_return_for_equal_policies(mdp):
    _, _, reward, ratio = mdp.sample(50)
    ones, g = np.ones_like(ratio), mdp.gamma
    mean = (reward * g ** np.arange(T)).sum(1).mean()
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        assert estimator(reward, ones, g) == pytest.approx(mean, abs=1e-12)
    zero = np.zeros_like(reward), np.zeros((50, T + 1))
    for estimator in (doubly_robust, WDR):
        assert estimator(reward, ones, *zero, g) == pytest.approx(mean, abs=1e-12)
    assert ope.weight_summary(ones).sizes[-1] == pytest.approx(50)
    # and with Q = 0 the doubly robust forms are the per-decision ones
    assert doubly_robust(reward, ratio, *zero, g) == pytest.approx(PDIS(reward, ratio, g))
    assert WDR(reward, ratio, *zero, g) == pytest.approx(PDWIS(reward, ratio, g))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_dr_with_the_exact_q_has_no_variance_in_a_deterministic_mdp(gamma):
    for seed in range(3):
        mdp = MDP(seed, deterministic=True, gamma=gamma)
        p, state, action, reward, ratio = mdp.trajectories()
        seen = p > 0
        q, v = (x[seen] for x in mdp.q_and_v(mdp.q(mdp.target), state, action))
        values = each(partial(doubly_robust, gamma=gamma), reward[seen], ratio[seen], q, v)
        np.testing.assert_allclose(values, mdp.value(mdp.target), atol=1e-12)
        assert seen.sum() > 1
        together = reward[seen], ratio[seen], q, v, gamma
        for estimator in (doubly_robust, WDR, magic):  # and all are the direct method
            assert estimator(*together) == pytest.approx(mdp.value(mdp.target), abs=1e-10)


def test_a_cut_log_takes_the_infinite_horizon_value_at_the_cut():
    mdp = MDP(0, deterministic=True, ends=False)
    pi = mdp.target
    q = mdp.q(pi, 500)[-1]  # stationary
    p, state, action, reward, ratio = mdp.trajectories()
    seen = p > 0
    state, action = state[seen], action[seen]
    v = (pi * q).sum(1)
    last = v[mdp.P.argmax(2)[state[:, -1], action[:, -1]]]  # V of the observation at the cut
    arrays = reward[seen], ratio[seen], q[state, action], np.column_stack([v[state], last])
    values = each(partial(doubly_robust, gamma=mdp.gamma), *arrays)
    np.testing.assert_allclose(values, v[0], atol=1e-9)


def test_dr_in_three_forms(mdp):
    state, action, reward, ratio = mdp.sample(30)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    recursion = np.zeros(30)
    for t in reversed(range(T)):
        recursion = v[:, t] + ratio[:, t] * (reward[:, t] + mdp.gamma * recursion - q[:, t])
    w = ratio.cumprod(1)
    before = np.column_stack([np.ones(30), w[:, :-1]])
    flat = (mdp.gamma ** np.arange(T) * (w * (reward - q) + before * v[:, :-1])).sum(1)
    ours = each(partial(doubly_robust, gamma=mdp.gamma), reward, ratio, q, v)
    np.testing.assert_allclose(ours, recursion, atol=1e-12)
    np.testing.assert_allclose(ours, flat, atol=1e-12)
    assert doubly_robust(reward, ratio, q, v, mdp.gamma) == pytest.approx(recursion.mean())


def test_weighted_forms_against_loops(mdp):
    state, action, reward, ratio = mdp.sample(20)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    w, g = ratio.cumprod(1), mdp.gamma
    pdwis, wdr = 0.0, v[:, 0].mean()
    for t in range(T):
        share = w[:, t] / w[:, t].sum()
        pdwis += g**t * (share * reward[:, t]).sum()
        wdr += g**t * (share * (reward[:, t] - q[:, t] + g * v[:, t + 1])).sum()
    returns = (reward * g ** np.arange(T)).sum(1)
    assert PDWIS(reward, ratio, g) == pytest.approx(pdwis, abs=1e-12)
    assert WDR(reward, ratio, q, v, g) == pytest.approx(wdr, abs=1e-12)
    assert WIS(reward, ratio, g) == pytest.approx((w[:, -1] * returns).sum() / w[:, -1].sum())


def test_wis_is_bounded_by_the_returns_and_moves_with_them(mdp):
    _, _, reward, ratio = mdp.sample(10)
    returns = (reward * mdp.gamma ** np.arange(T)).sum(1)
    wis = WIS(reward, ratio, mdp.gamma)
    assert returns.min() <= wis <= returns.max()
    shifted = reward + np.array([5.0, 0, 0])
    assert WIS(shifted, ratio, mdp.gamma) == pytest.approx(wis + 5, abs=1e-10)
    plain = importance_sampling(shifted, ratio, mdp.gamma)
    assert abs(plain - importance_sampling(reward, ratio, mdp.gamma) - 5) > 0.01


def test_magic_lies_within_its_partial_estimates_and_has_two_limits(mdp):
    for n in (2, 10, 100):
        state, action, reward, ratio = mdp.sample(n)
        q, v = mdp.q_and_v(mdp.random_q(), state, action)
        arrays = reward, ratio, q, v, mdp.gamma
        partial_ = [magic(*arrays, steps=(j,)) for j in range(-1, T)]
        assert partial_[0] == pytest.approx(v[:, 0].mean(), abs=1e-12)
        assert partial_[-1] == pytest.approx(WDR(*arrays), abs=1e-12)
        assert min(partial_) - 1e-12 <= magic(*arrays) <= max(partial_) + 1e-12
        assert magic(*arrays) == magic(*arrays, steps=range(-1, T))  # the direct method is one, too


def test_magic_trusts_a_good_q_and_distrusts_a_bad_one():
    mdp = MDP(0)
    state, action, reward, ratio = mdp.sample(2000)
    q, v = mdp.q_and_v(mdp.q(mdp.target), state, action)
    bad = q + 10 * (state < S), v + 10 * np.pad(state < S, ((0, 0), (0, 1)))
    wdr = WDR(reward, ratio, *bad, mdp.gamma)
    assert magic(reward, ratio, *bad, mdp.gamma) == pytest.approx(wdr, abs=0.1)
    assert abs(bad[1][:, 0].mean() - wdr) > 5
    good = magic(reward, ratio, q, v, mdp.gamma)
    assert good == pytest.approx(mdp.value(mdp.target), abs=0.05)


def test_the_minimum_over_the_simplex_is_that_of_a_fine_grid():
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 201)
    x = np.array([(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1])
    for _ in range(50):
        m = rng.normal(size=(3, 3)) + rng.normal()
        a = m @ m.T
        ours = ope.simplex_argmin(a)
        assert ours.min() >= 0 and ours.sum() == pytest.approx(1)
        assert ours @ a @ ours <= np.einsum("ni,ij,nj->n", x, a, x).min() + 1e-7
    large = rng.normal(size=(25, 30)).cumsum(0)
    a = large @ large.T
    ours = ope.simplex_argmin(a)
    gradient = a @ ours  # optimal: equal where x > 0, not smaller elsewhere
    assert gradient.min() >= gradient[ours > 0].max() - 1e-6 * abs(gradient).max()
    np.testing.assert_allclose(ope.simplex_argmin(np.zeros((4, 4))), 0.25)


def test_weights_are_carried_past_the_end():
    """Equal policies; half of the episodes end at once with 0, the others earn 1 a step later."""
    reward = np.array([[0.0, 0], [0, 1]] * 10)
    assert PDWIS(reward, np.ones((20, 2)), 1.0) == 0.5  # a mean over survivors alone gives 1


def test_padding_changes_nothing(mdp):
    state, action, reward, ratio = mdp.sample(40)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)

    def pad(x, value=0.0):
        return np.pad(x, ((0, 0), (0, 20)), constant_values=value)

    arrays = reward, ratio, q, v
    longer = pad(reward), pad(ratio, 1.0), pad(q), pad(v)
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        a, b = estimator(*arrays[:2], mdp.gamma), estimator(*longer[:2], mdp.gamma)
        assert a == pytest.approx(b, abs=1e-12)
    for estimator in (doubly_robust, WDR, magic):
        a, b = estimator(*arrays, mdp.gamma), estimator(*longer, mdp.gamma)
        assert a == pytest.approx(b, abs=1e-6)
    sizes = [ope.weight_summary(x).sizes[-1] for x in (ratio, pad(ratio, 1.0))]
    assert sizes[0] == pytest.approx(sizes[1])


def test_the_summary_of_weights(mdp):
    ratio = mdp.sample(30)[3]
    w, summary = ratio.cumprod(1), ope.weight_summary(ratio)
    np.testing.assert_allclose(summary.sizes, w.sum(0) ** 2 / (w**2).sum(0))
    assert summary.mean == pytest.approx(w[:, -1].mean())
    assert summary.error == pytest.approx(w[:, -1].std(ddof=1) / np.sqrt(30))
    assert summary.largest == pytest.approx(w[:, -1].max() / w[:, -1].sum())
    zero = ope.weight_summary(np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))
    assert zero.nonzero == 0.25 and zero.sizes == pytest.approx([1.6, 1.0]) and zero.largest == 1
    none = ope.weight_summary(np.array([[1.0, 0.0]] * 5))
    assert none.sizes.tolist() == [5.0, 0.0] and none.nonzero == 0


def test_a_thousand_steps_stay_finite():
    rng = np.random.default_rng(0)
    reward, v = rng.normal(size=(20, 1000)), rng.normal(size=(20, 1001))
    for ratio in (
        np.full((20, 1000), 1.5),
        rng.uniform(1e-3, 9, (20, 1000)),
        np.full((20, 1000), 1e-9),
    ):
        for estimator in (WIS, PDWIS):
            assert np.isfinite(estimator(reward, ratio, 0.99))
        for estimator in (WDR, magic):
            assert np.isfinite(estimator(reward, ratio, reward, v, 0.99))
        assert 1 <= ope.weight_summary(ratio).sizes[-1] <= 20
    same = np.full((20, 1000), 1.5)
    assert PDWIS(reward, same, 0.99) == pytest.approx(reward.mean(0) @ 0.99 ** np.arange(1000))


def test_pdis_can_be_worse_than_is():
    """One state, rewards +1 and -1, gamma 1: the variances are 0 and 1.05."""
    behavior, target = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    action = np.array(list(product(range(2), repeat=2)))
    ratio, reward = (target / behavior)[action], np.tile([1.0, -1.0], (4, 1))
    p = behavior[action].prod(1)
    for estimator, variance in ((importance_sampling, 0), (PDIS, 1.05)):
        x = each(partial(estimator, gamma=1.0), reward, ratio)
        assert p @ x**2 - (p @ x) ** 2 == pytest.approx(variance, abs=0.005)


# Intervals and bounds


def shares(n, rows, seed=1):
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rows) / n


def test_shares_of_episodes_are_the_bootstrap(mdp):
    """p, in one matrix product, against episodes that are really repeated; MAGIC's Omega has n - 1,
    so that its copies get a hair less certain."""
    state, action, reward, ratio = mdp.sample(25)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    p = shares(25, 30)
    cases = [(e, (reward, ratio)) for e in (importance_sampling, PDIS, WIS, PDWIS)]
    cases += [(e, (reward, ratio, q, v)) for e in (doubly_robust, WDR, magic)]
    for estimator, arrays in cases:
        estimator = partial(estimator, gamma=mdp.gamma)
        fast = estimator(*arrays, p=p)
        assert fast.shape == (30,)
        for value, row in zip(fast, p, strict=True):
            chosen = np.repeat(np.arange(25), np.rint(25 * row).astype(int))
            assert value == pytest.approx(estimator(*(x[chosen] for x in arrays)), abs=1e-10)


@pytest.mark.parametrize("sides", [1, -1])
def test_magic_follows_its_definition(mdp, sides):
    """x minimises x' (Omega + b b') x with b the distance from the interval around WDR, which is a
    normal one by Omega: on a fine grid of x for three g_j, two of them outside of the interval, on
    the same side or on opposite ones, where signed distances would cancel."""
    gamma, outside = mdp.gamma, np.zeros(2)
    while outside.prod() * sides <= 0:
        state, action, reward, ratio = mdp.sample(15)
        q, v = mdp.q_and_v(3 * mdp.random_q(), state, action)
        w = ratio.cumprod(1)
        delta = gamma ** np.arange(T) * w / w.mean(0) * (reward - q + gamma * v[:, 1:])
        each = np.stack([v[:, 0], v[:, 0] + delta[:, 0], v[:, 0] + delta.sum(1)], 1)
        g, omega = each.mean(0), np.cov(each.T) / 15
        half = 0.6745 * np.sqrt(omega[2, 2])
        b = np.maximum(0, np.abs(g - g[2]) - half)
        outside = (np.sign(g - g[2]) * b)[:2]
    grid = np.linspace(0, 1, 401)
    x = np.array([(i, j, 1 - i - j) for i in grid for j in grid if i + j <= 1])
    best = x[np.einsum("ni,ij,nj->n", x, omega + np.outer(b, b), x).argmin()]
    ours = magic(reward, ratio, q, v, gamma, steps=(-1, 0, T - 1))
    assert ours == pytest.approx(best @ g, abs=0.01 * np.ptp(g))


def test_quantiles_of_student_t():
    """Against printed tables."""
    for df, quantile in ((1, 6.3138), (4, 2.1318), (30, 1.6973), (1000, 1.6464), (1e5, 1.6449)):
        assert ope.t_quantile(0.95, df) == pytest.approx(quantile, rel=2e-3)
    assert ope.t_quantile(0.975, 4) == pytest.approx(2.7764, rel=1e-3)
    x = np.random.default_rng(0).normal(size=31)
    x = (x - x.mean()) / x.std(ddof=1) * np.sqrt(31)  # S / sqrt(n) = 1
    assert student_t_bound(x) == pytest.approx(-1.6973, abs=2e-3)


def test_intervals_are_wider_where_few_episodes_carry_the_weight():
    draws = np.linspace(-1, 3, 100_001)
    value, low, high = ope.interval(0.5, draws, np.inf)
    assert (value, low, high) == pytest.approx((0.5, -0.9, 2.9), abs=1e-3)
    few = np.random.default_rng(0).permutation(np.arange(1.0, 200))  # the 5th lowest and highest
    assert ope.interval(100.0, few, np.inf) == pytest.approx((100, 5, 195), abs=1e-3)
    value, low, high = ope.interval(0.5, draws, 5.0)
    wider = 2.5706 / 1.95996 * np.sqrt(6 / 5)
    assert (low, high) == pytest.approx((0.5 - wider * 1.4, 0.5 + wider * 2.4), abs=0.01)
    assert ope.interval(9.0, draws, 5.0)[2] == 9  # the value itself is always inside
    high = ope.interval(0.5, draws, 0.0)[2]  # not infinite, but that of df 1
    assert high == pytest.approx(0.5 + 12.706 / 1.95996 * np.sqrt(2) * 2.4, rel=1e-2)


def test_how_the_random_splits_fell_widens_the_interval():
    """By Student's t of their mean, beside what the episodes say, and that of the gain as well."""
    reward, ratio = np.random.default_rng(0).normal(size=(50, 1)), np.ones((50, 1))
    log = SimpleNamespace(resamples=shares(50, 2000), returns=np.zeros(50))
    mean = of_shares(PDIS, reward, ratio, gamma=1.0)
    alone, same = ope.bootstrap(mean, log), ope.bootstrap(mean, log, splits=[mean] * 4)
    assert same == alone
    splits = [lambda p, x=x: mean(p) + x for x in (-0.3, -0.1, 0.1, 0.3)]  # std 0.2582
    e, extra = ope.bootstrap(mean, log, splits=splits), 3.182 * 0.2582 / 2
    for one, two in ((alone[:3], e[:3]), (alone.gain, e.gain)):
        assert one[0] == two[0]
        for before, after in zip(one[1:], two[1:], strict=True):
            assert after - two[0] == pytest.approx(
                np.sign(before - one[0]) * np.hypot(before - one[0], extra), abs=1e-3
            )


def test_the_interval_of_the_gain_is_paired():
    """An estimate that is what the same episodes earned, plus 1.5, gains 1.5 for certain."""
    returns = np.random.default_rng(0).normal(size=50)
    log = SimpleNamespace(resamples=shares(50, 200), returns=returns)
    e = ope.bootstrap(lambda p: p @ returns + 1.5, log)
    assert e.gain == pytest.approx((1.5, 1.5, 1.5)) and e.high - e.low > 0.3


def test_resamples_without_overlap_are_left_out():
    reward, ratio = np.ones((4, 1)), np.array([[4.0], [0], [0], [0]])
    log = SimpleNamespace(resamples=shares(4, 100), returns=np.zeros(4))
    zero = np.zeros((4, 1)), np.zeros((4, 2))
    for estimator, arrays in ((WIS, ()), (PDWIS, ()), (WDR, zero)):
        e = ope.bootstrap(of_shares(estimator, reward, ratio, *arrays, gamma=1.0), log)
        assert (e.value, e.low, e.high) == pytest.approx((1, 1, 1))
    e = ope.bootstrap(of_shares(magic, reward, ratio, *zero, gamma=1.0), log)
    assert 0 <= e.low <= e.value <= e.high
    reward, ratio = np.arange(4.0)[:, None], np.array([[4.0], [4], [0], [0]])
    log.resamples = shares(4, 400)
    e = ope.bootstrap(of_shares(WIS, reward, ratio, gamma=1.0), log)
    assert (e.value, e.low, e.high) == pytest.approx((0.5, 0, 1), abs=1e-3)


def test_the_bernstein_bound_is_its_formula():
    x = np.array([0.0, 1, 2, 3, 10])
    y = np.array([0.0, 1, 2, 3, 4])
    expected = 2 - np.sqrt(2 * 2.5 * np.log(40) / 5) - 7 * 4 * np.log(40) / (3 * 4)
    assert bernstein_bound(x, 4) == pytest.approx(expected) == bernstein_bound(y, 4)


def test_coverage():
    """500 repetitions with mild ratios, n = 100; benchmarks/ope_coverage.py has harder cases."""
    mdp = MDP(2)
    mdp.behavior = 0.5 * mdp.behavior + 0.25
    mdp.target = 0.5 * mdp.target + 0.5 * mdp.behavior
    truth, hit = mdp.value(mdp.target), []
    discounts = mdp.gamma ** np.arange(T)
    for repetition in range(500):
        _, _, reward, ratio = mdp.sample(100)
        x = (ratio.cumprod(1) * reward) @ discounts
        log = SimpleNamespace(resamples=shares(100, 200, repetition), returns=reward @ discounts)
        boot = ope.bootstrap(of_shares(PDWIS, reward, ratio, gamma=mdp.gamma), log)
        lowest = mdp.r.min()
        shifted = (ratio.cumprod(1) * (reward - lowest)) @ discounts
        hcope = hcope_bound(shifted, seed=repetition) + lowest * discounts.sum()
        hit.append((student_t_bound(x) <= truth, boot.low <= truth <= boot.high))
        hit[-1] += (hcope <= truth, hcope <= truth - 10)
    student, bootstrap, hcope, useless = np.mean(hit, 0)
    assert 0.92 <= student <= 0.98
    assert 0.90 <= bootstrap <= 0.98
    assert hcope >= 0.95 and useless == 0


def test_the_cap_of_hcope_is_chosen_by_a_twentieth_and_used_for_the_rest():
    x = np.random.default_rng(3).exponential(size=400) ** 3
    held_out, rest = np.split(np.random.default_rng(0).permutation(x), [20])
    bounds = {cap: ope.bernstein_bound(held_out, cap, n=380) for cap in held_out}
    assert hcope_bound(x) == ope.bernstein_bound(rest, max(bounds, key=bounds.get))


def test_ratios_too_large_for_a_float_stay_finite():
    log = SimpleNamespace(padded=lambda x: x)
    ratio = ope.Log.ratio(log, np.array([0.0, 2000.0, -2000.0]), np.zeros(3))
    assert np.isfinite(ratio).all() and ratio[1] > 1e300 and ratio[2] == 0


def test_hcope_holds_where_the_worst_reward_is_not_in_the_log():
    """Reward 1, or -1000 in one of a hundred: known beforehand, the bound holds; the lowest logged
    one alone puts it above the truth in most logs, and the line says under which condition."""
    rng, truth = np.random.default_rng(0), 1 - 10.01
    above = {None: 0, -1000.0: 0}
    for _ in range(100):
        reward = np.where(rng.random((60, 1)) < 0.01, -1000.0, 1.0)
        for lowest in above:
            args = Args(lowest_reward=lowest)
            log = SimpleNamespace(args=args, reward=reward, discounts=np.ones(1), n=60)
            log.inside = reward < 2
            bounds = ope.lower_bounds(log, np.ones((60, 1)), "")
            (name,) = (name for name in bounds if name.startswith("HCOPE"))
            above[lowest] += bounds[name] > truth
            assert ("if no reward is below" in name) == (lowest is None)
    assert above[-1000.0] == 0 and above[None] > 40
    log.args = Args(lowest_reward=5.0)
    with pytest.raises(UserError, match=r"--lowest-reward 5\.0: the logs have"):
        ope.lower_bounds(log, np.ones((60, 1)), "")
    log.args, log.reward = Args(), np.full((60, 1), 5.0)  # all the same, and yet not certain
    bounds = ope.lower_bounds(log, np.ones((60, 1)), "")
    assert all((name[:5] != "HCOPE") or 0 < bound < 4.9 for name, bound in bounds.items())
    log.n = 39  # too few for HCOPE; with a problem nothing for Student
    assert list(ope.lower_bounds(log, np.ones((60, 1)), "")) == ["PDIS, Student's t"]
    assert ope.lower_bounds(log, np.ones((60, 1)), "few") == {}
    log.args, log.reward, log.n = Args(lowest_reward=-2.0), np.zeros((60, 2)), 60
    log.discounts, log.inside = np.array([1, 0.5]), np.ones((60, 2), bool)
    bounds = ope.lower_bounds(log, np.ones((60, 2)), "")  # what was added is taken back discounted
    expected = {"PDIS, Student's t": 0, "HCOPE": ope.hcope_bound(np.full(60, 3.0)) - 3}
    assert bounds == pytest.approx(expected)


def test_students_bound_is_that_of_pdis_whatever_the_lowest_reward():
    """Nothing is shifted for it: with negative rewards that would add the weights' noise."""
    rng = np.random.default_rng(0)
    ratio, reward, discounts = rng.uniform(0.5, 1.5, (80, 3)), rng.normal(size=(80, 3)), np.ones(3)
    inside = np.ones((80, 3), bool)
    log = SimpleNamespace(reward=reward, discounts=discounts, inside=inside, n=80)
    for lowest in (None, -20.0, -1000.0):
        log.args = Args(lowest_reward=lowest)
        bounds = ope.lower_bounds(log, ratio, "")
        expected = student_t_bound((ratio.cumprod(1) * reward).sum(1))
        assert bounds["PDIS, Student's t"] == pytest.approx(expected, rel=1e-9)


def test_the_lowest_reward_is_one_of_an_episode_and_may_be_a_decimal():
    """Not the 0 after its end; -0.1 is a little less in float32, as rewards are read."""
    log = SimpleNamespace(reward=np.array([[2.0, 0.0], [1.0, 3.0]] * 30), n=60, args=Args())
    log.inside, log.discounts = np.array([[True, False], [True, True]] * 30), np.ones(2)
    assert "HCOPE, if no reward is below 1, " in ", ".join(
        ope.lower_bounds(log, log.inside * 1, "")
    )
    log.args = Args(lowest_reward=-0.1)
    log.reward = log.inside * np.float64(np.float32(-0.1))
    assert "HCOPE" in ope.lower_bounds(log, log.inside * 1, "")
    log.args = Args(lowest_reward=-0.09)
    with pytest.raises(UserError, match=r"--lowest-reward -0\.09: the logs have -0\.1"):
        ope.lower_bounds(log, log.inside * 1, "")


# Laws of Box actions


def test_samples_of_a_squashed_law_are_the_tanh_of_the_gaussian():
    torch.manual_seed(0)
    u = BoxLaw(torch.full((50_000, 1), 0.8), torch.ones(50_000, 1), squash=True).sample().atanh()
    assert u.mean().item() == pytest.approx(0.8, abs=0.03)
    assert u.std().item() == pytest.approx(1.0, abs=0.03)


def law(*parts, squash=False):
    """BoxLaw of (mean, std) in one state, equally weighted."""
    mean, std = torch.tensor(parts).double().T[:, None, :, None]
    return BoxLaw(mean, std, torch.zeros(1, len(parts)).double(), squash)


def test_a_box_law_has_mass_one():
    """Density inside, mass at the edges."""
    inside = torch.linspace(-ope.EDGE, ope.EDGE, 200_001).double()[1:-1, None]
    for pi in (law((0.3, 0.5)), law((-0.9, 0.2), (1.5, 0.4)), law((0.5, 1.2), squash=True)):
        density = pi.log_prob(inside).exp()
        edges = pi.log_prob(torch.tensor([[-1.0], [1.0]]).double()).exp().sum()
        total = torch.trapezoid(density, inside[:, 0]) + edges
        assert total.item() == pytest.approx(1, abs=1e-4)
        assert edges > 0.003
    many = BoxLaw(torch.full((50_000, 1, 1), 0.8), torch.ones(50_000, 1, 1), torch.zeros(50_000, 1))
    share = (many.sample().abs() >= ope.EDGE).double().mean()
    at = law((0.8, 1.0)).log_prob(torch.tensor([[-1.0], [1.0]]).double()).exp().sum()
    assert share.item() == pytest.approx(at.item(), abs=0.01)


def test_ratios_of_clipped_policies_average_one():
    """With the density of the Gaussians alone they average 0.94 and 1.09."""
    torch.manual_seed(0)
    behavior = law((0.0, 1.0))
    u = torch.randn(400_000, 1).double()
    for mean, std, plain_mean in ((0.5, 1.0, 0.94), (0.9, 0.5, 1.09)):
        action, policy = u.clamp(-1, 1), law((mean, std))
        ratio = (policy.log_prob(action) - behavior.log_prob(action)).exp()
        assert ratio.mean().item() == pytest.approx(1, abs=0.01)
        plain = Normal(mean, std).log_prob(action) - Normal(0, 1).log_prob(action)
        assert plain.exp().mean().item() == pytest.approx(plain_mean, abs=0.02)
    tanh = law((1.0, 1.0), squash=True)  # and of a clipped policy over a squashed one
    action = (1 + u).tanh()
    ratio = (policy.log_prob(action) - tanh.log_prob(action)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)


def test_the_laws_of_trained_policies_agree_with_their_own_densities():
    """Inside, log_prob is the distribution's; pi over pi is 1 everywhere, at the bounds, too."""
    import bc
    import cql

    units = ope.Units(spaces.Box(-1, 1, (3,)), spaces.Box(-2.0, 2.0, (2,)))
    units.obs_mean, units.obs_std = torch.ones(3), torch.full((3,), 0.5)  # --normalize-obs
    obs, inside = torch.randn(50, 3), torch.rand(50, 2) * 1.8 - 0.9
    bounds = torch.cat([inside[:25], torch.ones(25, 2)])
    for module, net in ((bc, bc.GaussianPolicy), (cql, cql.TanhGaussian)):
        agent = SimpleNamespace(policy=net(units, (8,)))
        target = ope.run_policy("x", SimpleNamespace(agent=agent, units=units), Args(), seen=False)
        density = agent.policy(units.obs(obs))
        if module is cql:
            density = Independent(Transformed(density.normal, [TanhTransform()]), 1)
        ours = target.log_prob(obs, inside)
        np.testing.assert_allclose(ours, density.log_prob(inside).detach(), rtol=1e-4)
        same = ope.run_policy("y", SimpleNamespace(agent=agent, units=units), Args(), seen=False)
        assert (target.log_prob(obs, bounds) == same.log_prob(obs, bounds)).all()
        assert np.isfinite(target.log_prob(obs, bounds)).all() and module
        assert target.sample(obs).abs().max() <= 1


# The networks, on tables


TABLE = {"hidden": (32,), "batch_size": 128, "lr": 1e-2, "resamples": 100}


def tabular_data(mdp, n=400, seed=0):
    """n episodes as a Dataset has them: observations are one-hot states."""
    rng = np.random.default_rng(seed)
    rows, log_prob = [], []
    for episode in range(n):
        state = rng.choice(S, p=mdp.start)
        for _ in range(T):
            action = rng.choice(A, p=mdp.behavior[state])
            next_state = rng.choice(S + 1, p=mdp.P[state, action])
            rows.append((state, action, mdp.r[state, action], next_state, episode))
            log_prob.append(np.log(mdp.behavior[state, action]))
            state = next_state
            if state == mdp.end:
                break
    state, action, reward, next_state, episode = (torch.tensor(x) for x in zip(*rows, strict=True))
    eye = torch.eye(S + 1)
    terminal = (next_state == mdp.end).float()
    batch = ope.Batch(eye[state], action, reward.float(), eye[next_state], terminal)
    units = ope.Units(spaces.Box(0, 1, (S + 1,)), spaces.Discrete(A))
    return dataset(units, batch, episode, np.array(log_prob))


def dataset(units, batch, episode, log_prob=None, make_env=None):
    log_prob = np.full(len(episode), np.nan) if log_prob is None else log_prob
    return SimpleNamespace(
        units=units,
        transitions=batch,
        episode=episode,
        behavior_log_prob=log_prob,
        make_env=make_env,
    )


def by_table(table, units, args):
    table = torch.as_tensor(table)
    return ope.Target("table", lambda s: ope.Probabilities(table[s.argmax(1)]), units, args)


def quick_log(data, args, monkeypatch):
    """A Log whose behaviour, model and check are not trained, for tests of the rest."""
    zeros = None, np.zeros(len(data.episode))
    monkeypatch.setattr(ope, "fit_behavior", lambda log, args: zeros)
    monkeypatch.setattr(ope, "fit_model", lambda log, args: None)
    monkeypatch.setattr(ope, "errors_on_logged", lambda log, args: {"FQE": 0.0, "model": 0.0})
    return ope.Log(data, args)


def certainty_equivalent(mdp, data, keep):
    """Exact Q (T + 1, S + 1, A) of the MDP with the frequencies of the transitions `keep`, and how
    often it has seen each pair (S + 1, A)."""
    batch = data.transitions
    state, next_state = batch.obs.argmax(1).numpy(), batch.next_obs.argmax(1).numpy()
    counts, certain = np.zeros((S + 1, A, S + 1)), copy(mdp)
    np.add.at(counts, (state[keep], batch.action.numpy()[keep], next_state[keep]), 1)
    certain.P = mdp.P.copy()
    certain.P[:S] = counts[:S] / counts[:S].sum(2, keepdims=True)
    return certain.q(mdp.target), counts.sum(2)


def test_fqe_is_the_certainty_equivalent_value_of_each_half(monkeypatch):
    """Eight members, each the exact value of the frequencies in its own half; Q and V of an episode
    are the mean of the four that have not seen it."""
    torch.manual_seed(0)
    mdp, args = MDP(3), Args(steps=1000, gamma=0.9, **TABLE)
    data = tabular_data(mdp)
    log = quick_log(data, args, monkeypatch)
    policy = by_table(mdp.target, data.units, args)
    q, v, members = ope.fqe(log, policy, log.seen, args)
    q, v = q.mean(0), v.mean(0)
    state, action = data.transitions.obs.argmax(1).numpy(), data.transitions.action.numpy()
    seen, left = log.seen.numpy()[data.episode], T - log.step.numpy()
    exact, counts, values = [], [], []
    for k in range(8):
        q_k, count = certainty_equivalent(mdp, data, seen[:, k])
        v_0 = (mdp.target * q_k).sum(2)[T, state[log.first.numpy()]]
        assert np.corrcoef(members[:, k], v_0)[0, 1] > 0.99
        exact.append(q_k[left, state, action])
        counts.append(count[state, action])
        values.append(v_0.mean())
    np.testing.assert_allclose(members.mean(0), values, atol=0.05)
    assert np.abs(np.diff(values)[::2]).max() > 0.15  # halves differ, or swapped ones would pass
    assert (np.abs(log.seen.float().mean(0).numpy() - 0.5) < 0.01).all()
    assert (log.seen[:, ::2] == ~log.seen[:, 1::2]).all()
    expected, wrong = (np.mean(exact, 0, where=x.T) for x in (~seen, seen))
    often = np.min(counts, 0) >= 10
    assert often.mean() > 0.95
    inside = log.padded(often.astype(float)) == 1
    errors = np.abs(q - log.padded(expected))[inside]
    assert errors.mean() < 0.05 and errors.max() < 0.2
    assert errors.mean() < 0.7 * np.abs(q - log.padded(wrong))[inside].mean()  # that have seen it
    assert q.shape == (log.n, T) and v.shape == (log.n, T + 1) and not v[:, T].any()
    assert not q[~log.inside].any() and not v[:, :T][~log.inside].any()


def random_halves(rng, n):
    """(n, 8): four random halves, each beside its rest."""
    half = rng.permuted(np.tile([False, True], (4, n // 2)), axis=1).T
    return np.stack([half, ~half], 2).reshape(n, 8)


def test_the_interval_of_fqe():
    """se^2 = mean d_k^2 + var / n with 4 degrees of freedom; and the gain, paired: members that
    repeat the returns of their own half, plus 1.5, gain 1.5 for certain. What they miss of the
    logged policy is added in quadrature."""
    rng = np.random.default_rng(0)
    seen = random_halves(rng, 20)
    members, returns = rng.normal(size=(20, 8)), rng.normal(size=20)
    log = SimpleNamespace(seen=torch.tensor(seen), returns=returns, n=20, errors={"FQE": 0.0})
    e = ope.fqe_estimate(members, log)
    d = np.diff(members.mean(0).reshape(4, 2), axis=1) / 2
    se = np.sqrt((d**2).mean() + members.mean(1).var(ddof=1) / 20)
    expected = members.mean() - 2.7764 * se, members.mean() + 2.7764 * se
    assert (e.low, e.high) == pytest.approx(expected, abs=1e-3)
    repeated = np.broadcast_to(returns[:, None], (20, 8)) + 1.5
    assert ope.fqe_estimate(repeated, log).gain == pytest.approx((1.5, 1.5, 1.5))
    gain = ope.fqe_estimate(np.where(seen, repeated, 1000.0), log).gain  # which must not count
    assert gain[2] - gain[1] == pytest.approx(0, abs=1e-9)
    log.errors["FQE"] = -0.5
    wider = np.hypot(2.7764 * se, 0.5)
    e = ope.fqe_estimate(members, log)
    assert (e.value - e.low, e.high - e.value) == pytest.approx((wider, wider), abs=1e-3)
    assert ope.fqe_estimate(repeated, log).gain == pytest.approx((1.5, 1.0, 2.0))


def test_fqe_covers_in_a_table():
    """Exact tabular FQE on halves, 200 logs: the interval holds the truth in 93 to 99.5%."""
    mdp, hits = MDP(1), []
    rng, truth = np.random.default_rng(0), mdp.value(mdp.target)
    for _ in range(200):
        state, action, reward, _ = mdp.sample(80)
        after = np.column_stack([state[:, 1:], np.full(80, -1)])  # -1: cut, not used
        seen = random_halves(rng, 80)
        members = np.empty((80, 8))
        for k, rows in enumerate(seen.T):
            counts, certain = np.full((S + 1, A, S + 1), 1e-9), copy(mdp)
            use = (after[rows] >= 0) & (state[rows] < S)
            np.add.at(counts, (state[rows][use], action[rows][use], after[rows][use]), 1)
            certain.P = counts / counts.sum(2, keepdims=True)
            certain.P[S] = mdp.P[S]
            members[:, k] = (mdp.target * certain.q(mdp.target)).sum(2)[T, state[:, 0]]
        log = SimpleNamespace(returns=reward.sum(1), n=80, errors={"FQE": 0.0})
        log.seen = torch.tensor(seen)
        e = ope.fqe_estimate(members, log)
        hits.append(e.low <= truth <= e.high)
    assert 0.93 <= np.mean(hits) <= 0.995


def test_fqe_of_terminal_steps_is_their_reward_and_truncated_ones_go_on(monkeypatch):
    torch.manual_seed(0)
    args = Args(steps=600, gamma=0.5, horizon=3, **TABLE)
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    zero, one = torch.zeros(40, 1), torch.ones(40)
    for terminal, expected in ((one, 1.0), (0 * one, 1.75)):  # 1 + 1/2 + 1/4
        batch = ope.Batch(zero, torch.arange(40) % 2, one, zero, terminal)
        data = dataset(units, batch, torch.arange(40) // (1 if terminal.any() else 4))
        log = quick_log(data, args, monkeypatch)
        policy = by_table(np.full((1, 2), 0.5), units, args)
        _, _, members = ope.fqe(log, policy, log.seen, args)
        np.testing.assert_allclose(members, expected, atol=0.03)


def test_returns_that_differ_by_rounding_alone_do_not_freeze_fqe():
    """The scale of Q is their deviation, however small, unless that is rounding."""
    log = SimpleNamespace(gamma=1.0, horizon=3, obs=torch.zeros(6, 2), action=torch.zeros(6, 1))
    log.standardize = None
    for spread, scale in ((1e-16, 0.5), (0.0, 0.5), (1e-4, 1e-4)):
        for mean in (0.0, 0.2):
            log.returns = 3 * (mean + spread * np.array([-1.0, 0.0, 1.0]))
            for unit in (1.0, 2.0**-20):
                log.reward = unit * np.array([[0.5, -0.5]])
                log.returns = unit * log.returns
                assert ope.QNetwork(1, log, Args()).scale == pytest.approx(unit * scale)


def test_fqe_does_not_care_about_the_scale_of_rewards(monkeypatch):
    """The same log with rewards a thousand times as large, plus 5: Q follows."""
    mdp, args, values = MDP(3, ends=False), Args(steps=300, gamma=0.9, **TABLE), []
    for scale, shift in ((1.0, 0.0), (1000.0, 5.0)):
        torch.manual_seed(0)
        data = tabular_data(mdp, 100)
        reward = data.transitions.reward * scale + shift
        data.transitions = data.transitions._replace(reward=reward)
        log = quick_log(data, args, monkeypatch)
        policy = by_table(mdp.target, data.units, args)
        torch.manual_seed(1)
        members = ope.fqe(log, policy, log.seen, args)[2]
        values.append((members.mean() - shift * (1 + 0.9 + 0.81)) / scale)
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_estimated_behaviour_of_discrete_actions_is_the_frequency(monkeypatch):
    torch.manual_seed(0)
    mdp, args = MDP(3), Args(steps=400, **TABLE)
    data = tabular_data(mdp, 1500)
    with monkeypatch.context() as patch:
        log = quick_log(data, args, patch)
    policy, estimated = ope.fit_behavior(log, args)
    state, action = data.transitions.obs.argmax(1).numpy(), data.transitions.action.numpy()
    frequency = np.array([[(action[state == s] == a).mean() for a in range(A)] for s in range(S)])
    np.testing.assert_allclose(np.exp(estimated), frequency[state, action], atol=0.05)
    np.testing.assert_allclose(policy.support(torch.eye(S + 1))[1][:S], frequency, atol=0.05)


def test_training_ends_where_the_held_out_loss_was_lowest():
    """On its way from 0 to 300 Adam is at 0.91, 1.41 and 1.5 where that is measured."""
    net, y = ope.MLP(1, 1, 1), torch.tensor([300.0, 0.9])
    net.bias[0].data.zero_()

    def loss(i):
        return (net(torch.zeros(1, 1)) - y[i]).square().mean()

    args = Args(steps=300, batch_size=1, lr=0.01)
    ope.train(net, loss, [torch.tensor([0])], args, torch.tensor([[1]]))
    assert net.bias[0].item() == pytest.approx(0.91, abs=0.01)


def test_whole_episodes_are_held_out(monkeypatch):
    """Of 20 episodes two are drawn for early stopping, and no transition of them is fitted."""
    torch.manual_seed(0)
    mdp, args, seen = MDP(3), Args(steps=3, **TABLE), []
    data = tabular_data(mdp, 20)
    data.transitions = data.transitions._replace(
        obs=torch.arange(len(data.episode)).float()[:, None].repeat(1, S + 1)
    )
    with monkeypatch.context() as patch:
        log = quick_log(data, args, patch)
    log.standardize = lambda obs: seen.append(obs[:, 0]) or obs / 100
    ope.fit_behavior(log, args)
    *fitted, held_out, _ = seen
    fitted, held_out = (data.episode[x.long()].unique() for x in (torch.cat(fitted), held_out))
    assert len(held_out) == 2 and not set(fitted.tolist()) & set(held_out.tolist())
    assert len(fitted) >= 15


def box_data(n=1500):
    """One-step episodes with two kinds of actions, clipped: a third lies at the bounds."""
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Box(-4.0, 4.0, (1,)))
    mean = torch.where(torch.rand(n, 1) < 0.5, -0.9, 0.5)
    action = (mean + 0.2 * torch.randn(n, 1)).clamp(-1, 1)
    obs, one = torch.rand(n, 1), torch.ones(n)
    return dataset(units, ope.Batch(obs, action, one, obs, one), torch.arange(n))


def test_estimated_behaviour_of_box_actions(monkeypatch):
    """A mixture of clipped Gaussians: about the density inside, about the mass at the bound; so the
    exact policy over it averages 1, and a logged density counts inside only, per unit."""
    torch.manual_seed(0)
    args, data = Args(steps=600, **TABLE), box_data()
    with monkeypatch.context() as patch:
        log = quick_log(data, args, patch)
    policy, estimated = ope.fit_behavior(log, args)
    exact = law((-0.9, 0.2), (0.5, 0.2)).log_prob(data.transitions.action.double()).numpy()
    edge = (data.transitions.action.abs() >= ope.EDGE).numpy()[:, 0]
    assert 0.1 < edge.mean() < 0.5
    assert np.mean(np.exp(exact - estimated)) == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(exact[edge].mean(), estimated[edge].mean(), atol=0.2)
    np.testing.assert_allclose(exact[~edge].mean(), estimated[~edge].mean(), atol=0.2)
    share = (policy.sample(torch.rand(5000, 1)).abs() >= ope.EDGE).float().mean().item()
    assert share == pytest.approx(edge.mean(), abs=0.06)
    log.estimated_log_pi_b = estimated
    known = log.known_log_prob(np.full(len(edge), -1.25))
    np.testing.assert_allclose(known[~edge], -1.25 + np.log(4), rtol=1e-6)
    np.testing.assert_array_equal(known[edge], estimated[edge])
    with pytest.raises(UserError, match="too high a probability of the logged action"):
        log.known_log_prob(np.full(len(edge), np.inf))


def test_a_logged_density_counts_where_no_part_of_the_action_is_at_a_bound(monkeypatch):
    units, n = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Box(-2, 2, (2,))), 4
    action = torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.3, -1.0], [-0.9, 0.9]])
    batch = ope.Batch(torch.zeros(n, 1), action, torch.ones(n), torch.zeros(n, 1), torch.ones(n))
    data = dataset(units, batch, torch.arange(n), np.full(n, -1.0))
    log = quick_log(data, Args(steps=1, resamples=100), monkeypatch)  # estimated: 0
    inside = -1 + 2 * np.log(2)  # per unit of [-1, 1]
    np.testing.assert_allclose(log.log_pi_b, [inside, 0, 0, inside], rtol=1e-6)


def test_the_model_rolls_out_what_it_has_learned(monkeypatch):
    """s' = s + a / 10, r = s, the end beyond 1.05: from 0, a = 1 earns 0, 0.1, ..., 1.0."""
    torch.manual_seed(0)
    args = Args(hidden=(64,), steps=1000, gamma=0.9, horizon=14, lr=1e-2, resamples=100)
    units = ope.Units(spaces.Box(-9, 9, (1,)), spaces.Box(-1.0, 1.0, (1,)))
    s, a = torch.rand(4000, 1) * 2.2 - 1.1, torch.rand(4000, 1) * 2 - 1
    s[::20] = 0.0
    end = ((s + a / 10) > 1.05).float()[:, 0]
    batch = ope.Batch(s, a, s[:, 0], s + a / 10, end)
    data = dataset(units, batch, torch.arange(4000) // 20)
    with monkeypatch.context() as patch:
        log = quick_log(data, args, patch)
    policy = ope.Target("one", lambda s: ope.certain(torch.ones(len(s), 1), units), units, args)
    value = ope.fit_model(log, args)(policy)
    expected = sum(0.9**t * 0.1 * t for t in range(11))
    assert np.median(value) == pytest.approx(expected, abs=0.3)
    endless = sum(0.9**t * 0.1 * t for t in range(14))
    assert abs(expected - endless) > 0.6  # the end was honoured


def test_the_model_never_ends_without_ends_and_stays_within_the_range_of_the_data(monkeypatch):
    """After a single update it knows nothing else: half a chance to end, steps in any direction."""
    torch.manual_seed(0)
    args = Args(hidden=(64,), steps=1, gamma=0.9, horizon=50, resamples=100)
    units = ope.Units(spaces.Box(-9, 9, (1,)), spaces.Box(-1.0, 1.0, (1,)))
    s, next_s, a = torch.rand(3, 400, 1) * 2 - 1
    next_s[:2] = torch.tensor([[-1.0], [1.0]])
    batch = ope.Batch(s, a, torch.ones(400), next_s, torch.zeros(400))
    with monkeypatch.context() as patch:
        log = quick_log(dataset(units, batch, torch.arange(400) // 50), args, patch)
    visited = []

    def one(obs):
        visited.append(obs)
        return ope.certain(torch.ones(len(obs), 1), units)

    value = ope.fit_model(log, args)(ope.Target("one", one, units, args))
    assert value == pytest.approx(np.full(8, (1 - 0.9**50) / 0.1), abs=0.1)
    assert torch.cat(visited).abs().max() == 1  # at the edge, where it would have gone on


def test_the_check_on_the_logged_policy_is_by_all_members(monkeypatch):
    monkeypatch.setattr(ope, "fqe", lambda *x: (0, 0, np.array([[1.0, 3.0], [2.0, 6.0]])))
    log = SimpleNamespace(behavior=None, seen=np.ones((2, 8)), returns=np.ones(2))
    log.model_returns = lambda policy: np.array([2.0, 4.0])
    assert ope.errors_on_logged(log, Args()) == {"FQE": 2, "model": 2}


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_diverges_stops_the_evaluation_in_one_line(which, monkeypatch):
    """FQE, the model, or FQE of the logged policy, which would make an interval of NaN."""
    mdp, args = MDP(3, ends=False), Args(**QUICK)
    log, values = quick_log(tabular_data(mdp, 20), args, monkeypatch), [0.0] * 3
    values[which] = math.nan
    monkeypatch.setattr(ope, "fqe", lambda *x: (None, None, np.full((20, 8), values[0])))
    log.model_returns = lambda policy: np.full(20, values[1])
    log.errors["FQE"] = values[2]
    with pytest.raises(UserError, match="it: FQE or the model diverged; a smaller --lr"):
        ope.evaluate_policy(SimpleNamespace(name="it"), log, args)


def test_fqe_counts_errors_in_units_of_what_can_still_be_earned(monkeypatch):
    """Of h steps 1 + gamma + ... times as much as of one; with a last layer of zeros Q is the logs'
    mean per step, and the error that of the reward."""
    mdp, args, found = MDP(3, ends=False), Args(gamma=0.5, **QUICK), []
    log = quick_log(tabular_data(mdp, 20), args, monkeypatch)

    def no_training(net, loss, rows, args):
        net.weight[-1].data.zero_(), net.bias[-1].data.zero_()
        i = torch.arange(8).expand(8, -1)
        torch.manual_seed(0)
        found.append(loss(i))
        torch.manual_seed(0)
        h = torch.randint(1, log.horizon + 1, i.shape)
        per_step = log.returns / (1 - 0.5**log.horizon) * 0.5
        error = (per_step.mean() - log.transitions.reward[i]) / per_step.std(ddof=1)
        found.append((error / (2 * (1 - 0.5**h))).square().mean(1).sum())

    monkeypatch.setattr(ope, "train", no_training)
    ope.fqe(log, by_table(mdp.target, log.units, args), log.seen, args)
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-4)


def test_fqe_and_the_model_are_checked_on_the_logged_policy():
    """Fixed-length episodes that are marked as terminations: each state looks as if it could be the
    last, FQE and the model are far below what the logs earned. As truncations they are not."""
    n, T = 60, 5
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    for ends, wrong in ((True, True), (False, False)):
        torch.manual_seed(0)
        args = Args(steps=300, horizon=T, **TABLE)
        last = (torch.arange(n * T) % T == T - 1).float() * ends
        obs, action = torch.zeros(n * T, 1), torch.randint(2, (n * T,))
        batch = ope.Batch(obs, action, torch.ones(n * T), obs, last)
        data = dataset(units, batch, torch.arange(n).repeat_interleave(T), np.full(n * T, -0.6931))
        log = ope.Log(data, args)
        assert (abs(log.errors["FQE"]) > 0.5) == wrong == (abs(log.errors["model"]) > 0.5)
        assert any("terminate after exactly 5 steps" in note for note in log.notes) == ends
        line = verdict(ope.evaluate_policy(by_table(np.full((1, 2), 0.5), units, args), log, args))
        assert ("FQE misses the logged policy by -" in line) == wrong
        assert ("believe WDR with care" in line) == wrong  # all agree, but one voice is missing


# Horizon, ends, truth


def test_the_horizon_stops_where_a_truncated_episode_does():
    length, ends = np.array([5, 9, 7]), np.array([True, False, False])
    T, notes = ope.known_steps(length, ends, None)
    assert T == 7
    assert notes == [
        "T = 7, as episode 2 was truncated after 7 steps (1 are so short); without, T would be 9"
    ]
    assert ope.known_steps(length, ends, 6) == (6, [])
    assert ope.known_steps(length, np.array([True] * 3), None) == (9, [])
    assert ope.known_steps(length, np.array([True] * 3), 20)[0] == 20
    assert ope.known_steps(np.array([4, 4]), np.array([False, False]), None) == (4, [])
    with pytest.raises(UserError, match="--horizon 8: episode 2 was truncated after 7 steps"):
        ope.known_steps(length, ends, 8)
    T, (note,) = ope.known_steps(np.array([50, 1, 50]), np.array([False] * 3), None)
    assert T == 1 and note.endswith(
        "truncated after 1 steps (1 are so short); without, T would be 50"
    )
    T, (note,) = ope.known_steps(np.array([1, 30, 1, 1, 50]), np.array([False] * 5), None)
    assert note.endswith(
        "episode 0 was truncated after 1 steps (3 are so short); without, T would be 30"
    )
    T, (note,) = ope.known_steps(np.array([5, 7, 12]), np.array([False] * 3), None)
    assert T == 5 and note.endswith("without, T would be 7")
    T, (note,) = ope.known_steps(np.array([3, 9]), np.array([False, True]), None)
    assert T == 3 and note.endswith("without, T would be 9")


def test_arrays_of_a_log(monkeypatch):
    """Episodes of 2 (terminated), 4 and 3 (truncated) steps; reward = the transition's number."""
    args = Args(steps=1, horizon=3, gamma=0.5, resamples=100)
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    episode, number = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2]), torch.arange(9.0)
    obs, terminal = number[:, None], (number == 1).float()
    batch = ope.Batch(obs, torch.zeros(9, dtype=torch.long), number, obs, terminal)
    log = quick_log(dataset(units, batch, episode, np.full(9, -1.0)), args, monkeypatch)
    np.testing.assert_array_equal(log.reward, [[0, 1, 0], [2, 3, 4], [6, 7, 8]])
    np.testing.assert_array_equal(log.returns, [0.5, 4.5, 11.5])
    np.testing.assert_array_equal(log.step, [0, 1, 0, 1, 2, 3, 0, 1, 2])
    ratio = log.ratio(np.log(np.full(9, 3.0)), np.log(np.full(9, 1.5)))
    np.testing.assert_allclose(ratio, [[2, 2, 1], [2, 2, 2], [2, 2, 2]])
    assert log.resamples.shape == (100, 3)
    np.testing.assert_allclose(log.resamples.sum(1), 1)


class Counter(gym.Env):
    """Reward 1 per step for the second action, with no end of its own."""

    steps = 0
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2, start=3)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        assert action in (3, 4) and self.steps <= 3, "the horizon is over"
        return np.zeros(2, np.float32), float(action == 4), False, False, {}


def test_the_truth_has_the_horizon_and_the_discount():
    units, args = ope.Units(Counter.observation_space, Counter.action_space), Args()
    log = SimpleNamespace(gamma=0.5, horizon=3)
    truth, error = ope.true_value(by_table([[0.3, 0.7]], units, args), Counter, 4000, log)
    assert truth == pytest.approx(0.7 * 1.75, abs=4 * error)
    assert error == pytest.approx(0.5 * np.sqrt(21 / 16 * 0.84 / 4000), rel=0.1)


def test_units_of_observations_and_rewards_do_not_matter():
    """Observations times 2^-20 (a column beside them is always 3) and rewards times 2^-20: with
    networks that see standardised numbers, the estimates are the same but for that factor."""
    args, small = Args(horizon=20, steps=60, resamples=100), 2.0**-20
    values = []
    for factor in (1.0, small):
        data, (policy,) = ope.example(args, 60)
        old, pi = data.transitions, policy.pi
        obs, next_obs = (
            torch.cat([factor * x, torch.full((len(x), 1), 3.0)], 1)
            for x in (old.obs, old.next_obs)
        )
        units = ope.Units(spaces.Box(-9, 9, (5,)), data.units.action_space)
        data.units, data.behavior_log_prob = units, data.behavior_log_prob * np.nan
        data.transitions = ope.Batch(obs, old.action, factor * old.reward, next_obs, old.terminal)
        target = ope.Target("gain 12", lambda x, k=factor, pi=pi: pi(x[:, :4] / k), units, args)
        torch.manual_seed(0)
        report = ope.evaluate_policy(target, ope.Log(data, args), args)
        values.append([x for e in report.estimates.values() for x in e[:3]])
    assert len(values[0]) == 30 and np.isfinite(values[0]).all()
    np.testing.assert_allclose(np.array(values[1]) / small, values[0], rtol=1e-3)


# Verdict


def verdict(report):
    """The line, which names what is believed."""
    believed, line = ope.verdict(report)
    assert believed == ("WDR" if "believe WDR" in line else "FQE" if "a hint" in line else "")
    return line


def report(
    wdr=(1, 2), pdwis=(1, 2), fqe=(1, 2), model=1.5, gain=(-1, 1), problem="", seen=False, **other
):
    """ess; errors of FQE and the model on a logged policy that earned 1.0 with std 1 in 100."""
    ends = {"PDWIS": pdwis, "WDR": wdr, "FQE": fqe, "model": (model, model)}
    estimates = {name: Estimate(sum(x) / 2, *x, (0, *gain)) for name, x in ends.items()}
    weights = SimpleNamespace(sizes=np.array([other.get("ess", 80.0)]))
    errors = {"FQE": 0.0, "model": 0.0} | other.get("errors", {})
    returns = np.array([0.0, 2.0] * 50)
    log = SimpleNamespace(returns=returns, errors=errors, n=100)
    return SimpleNamespace(
        estimates=estimates, problem=problem, seen=seen, weights=weights, log=log
    )


def test_verdict():
    line = verdict(report())
    assert line == (
        "PDWIS, WDR and FQE agree; effective sample size 80 of 100: believe WDR, 1 to 2; cannot "
        "tell whether better than the logged policy (-1 to +1)"
    )
    assert "believe WDR with care, 1 to 2; better than the logged policy (+1 to +2)" in verdict(
        report(ess=30, gain=(1, 2))
    )
    assert "worse than the logged policy (-2 to -1)" in verdict(report(gain=(-2, -1)))
    line = verdict(report(fqe=(5, 6)))
    assert line.startswith("PDWIS and FQE disagree; WDR and FQE disagree; effective")
    assert "believe WDR with care" in line
    assert "believe none of these" in verdict(report(fqe=(5, 6), ess=30))
    assert "PDWIS and WDR disagree" in verdict(report(pdwis=(5, 6)))
    assert "believe none of these" in verdict(report(pdwis=(5, 6)))
    assert "believe WDR, 1 to 2" in verdict(report(model=9))  # heard, but has no vote
    assert verdict(report(errors={"model": 2.0})).startswith(
        "model misses the logged policy by +2: no vote; PDWIS, WDR and FQE agree; effective"
    )
    missed = verdict(report(errors={"FQE": -0.4}))
    assert "FQE misses the logged policy by -0.4: no vote" in missed
    assert "believe WDR with care" in missed
    assert "believe none" in verdict(report(errors={"FQE": np.nan}, ess=30))
    assert "no vote" not in verdict(report(errors={"FQE": -0.3}))  # 2% of 1 and 3 std / sqrt(n)
    loss = report(errors={"FQE": -2.0})
    loss.log.returns = loss.log.returns - 101  # 2% of -100
    assert "no vote" not in verdict(loss)
    few = {"problem": "too few"}
    hint = verdict(report(gain=(1, 2), **few))
    assert hint == (
        "too few; FQE and the model agree: a hint, no more: FQE, 1 to 2; better than the logged "
        "policy (+1 to +2)"
    )
    assert "a hint" in verdict(report(model=2.09, **few))  # a tenth of the std of the returns
    assert "FQE and the model disagree: believe none of these" in verdict(report(model=2.2, **few))
    assert "a hint" in verdict(report(model=0.91, **few))  # and so below
    assert "FQE and the model disagree: believe none of these" in verdict(report(model=0.8, **few))
    assert "believe none of these" in verdict(report(errors={"model": 2.0}, **few))
    assert verdict(report(seen=True)).startswith("trained on these very episodes")
    assert "believe none" in verdict(report(seen=True))


def summary(mean=1.0, error=0.1, largest=0.1, sizes=(90.0, 80.0)):
    return ope.Weights(mean, error, largest, 1.0, np.array(sizes))


def test_what_makes_ratios_useless():
    problem = ope.weight_problem
    assert problem(summary()) == "" == problem(summary(mean=1.29))
    assert problem(summary(mean=1 - 1e-6, error=1e-9)) == ""  # rounding: the logged policy itself
    assert problem(summary(mean=0.5)).startswith("weights average 0.5, not 1")
    assert "weights average 1e+30" in problem(summary(mean=1e30, error=1e30, sizes=(9.0, 1.0)))
    assert "weights average inf" in problem(summary(mean=np.inf, error=np.nan))
    few = problem(summary(sizes=(90.0, 60.0, 9.0, 3.0)))
    assert few == (
        "effective sample size 3.0, the largest weight 10% of their sum; try --horizon 2"
    )
    assert "the largest weight 60%" in problem(summary(largest=0.6))
    none = "no overlap: no logged episode follows the policy for more than 2 steps"
    assert problem(summary(sizes=(5.0, 2.0, 0.0, 0.0))) == none  # a horizon of 2 says nothing, too
    assert problem(summary(sizes=(30.0, 20.0, 0.0, 0.0))) == f"{none}; try --horizon 2"
    assert problem(summary(sizes=(60.0, 20.0, 0.0, 0.0))) == f"{none}; try --horizon 1"
    assert problem(summary(sizes=(30.0, 9.0, 12.0, 8.0))).endswith("; try --horizon 3")  # not 2


def test_rank_correlation_and_regret():
    """Of benchmarks/policy_selection.py."""
    sys.path.insert(0, str(Path(ope.__file__).parent / "benchmarks"))
    from policy_selection import regret, spearman

    x = np.array([3.0, 1, 2, 5])
    assert spearman(x, x) == spearman(x, x**3) == 1
    assert spearman(x, -x) == -1
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == 1  # ties
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert regret(x, x, k=1) == 0 == regret(x, -x, k=4)
    assert regret(x, -x) == 1
    assert regret(x, [9, 0, 0, 0]) == 0.5
    assert regret([1, 1], [0, 1]) == 0


def test_the_example_s_weights_average_one():
    """Its actions must not be drawn from the stream that drew the first states."""
    args = Args(horizon=10)
    data, (policy,) = ope.example(args, 20_000, (5.0, 8.0))
    log_ratio = policy.log_prob(data.transitions.obs, data.transitions.action)
    log_ratio = np.bincount(data.episode, log_ratio - data.behavior_log_prob)
    w = np.exp(log_ratio)
    assert w.mean() == pytest.approx(1, abs=3 * w.std() / np.sqrt(len(w)))
    assert w.std() / np.sqrt(len(w)) < 0.01


# What a user runs


QUICK = {"steps": 20, "resamples": 100, "device": "cpu", "hidden": (8,), "batch_size": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs: {method_env or method_env_part: folder}."""
    import bc
    import bcq
    import cql

    out, folders = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(out / "minari"))
        for module, dataset_id in (
            (cql, "cartpole/random-v0"),
            (bc, "cartpole/random-v0[:80%]"),
            (cql, "pendulum/random-v0[20%:]"),
            (bc, "pendulum/random-v0[20%:60%]"),
            (bcq, "pendulum/random-v0[20%:]"),
        ):
            patch.setattr(module, "builtin_dataset", ope.builtin_dataset)
            flags = {"steps": 5, "log_every": 5, "eval_every": 0, "eval_episodes": 0}
            name = f"{module.__name__}_{dataset_id.partition('/')[0]}"
            folder = out / name
            module.main(module.Args((dataset_id,), hidden=(16,), out_dir=str(folder), **flags))
            (folders[name],) = map(str, folder.iterdir())
    return folders


def test_the_example_runs_and_the_horizon_collapses_the_sample(capsys):
    args = Args(verify_episodes=50, **(QUICK | {"steps": 100, "hidden": (32,)}))
    (one,) = ope.main(args).values()
    text = capsys.readouterr().out
    names = ["IS", "PDIS", "WIS", "PDWIS", "RIS", "DR", "WDR", "MAGIC", "FQE", "model"]
    assert list(one.estimates) == names
    assert one.weights.sizes[-1] > 50 and "T = 50 steps, gamma = 0.99" in text
    for name in ("PDWIS", "WDR"):
        e, (truth, error) = one.estimates[name], one.truth
        assert e.low - 0.5 - 3 * error < truth < e.high + 0.5 + 3 * error
        assert e.gain[0] == pytest.approx(e.value - one.log.returns.mean())
        assert e.gain[1] > 4 and e.gain[2] - e.gain[1] < 3  # paired: better, and by how much
    for line in (
        "behaviour policy as logged",
        "if no reward is below 1, the lowest in T steps of the logs",
        "100% not 0",
        "error",
    ):
        assert line in text
    assert text.splitlines()[-1].startswith("verdict: ")
    errors = "FQE by {FQE:+.3g}, model by {model:+.3g}".format(**one.log.errors)
    assert f"note: the logged policy's value, which is known, is missed by {errors}\n" in text
    for names in ("IS, PDIS", "RIS", "MAGIC", "model"):
        assert f"* no 95% interval ({names}): " in text
    (one,) = ope.main(Args(horizon=400, verify_episodes=2, **QUICK)).values()
    assert one.weights.sizes[-1] < 10 and "; try --horizon" in verdict(one)


def test_the_order_of_policies_changes_nothing():
    args = Args(horizon=10, **QUICK)
    values = {}
    for gains in ((5.0, 8.0, 12.0), (5.0, 12.0, 8.0)):
        data, policies = ope.example(args, 50, gains)
        torch.manual_seed(0)
        log = ope.Log(data, args)
        reports = [ope.evaluate_policy(policy, log, args) for policy in policies]
        for one in reports:
            values.setdefault(one.name, []).append(one.estimates)
    for first, second in values.values():
        assert first == second


def test_a_run_on_a_part_is_judged_by_the_rest(runs, capsys):
    """And one on all episodes is told that it cannot be: no bound, no verdict."""
    (one,) = ope.main(Args(run=(runs["bc_cartpole"],), horizon=5, **QUICK)).values()
    text = capsys.readouterr().out
    assert "judged on cartpole/random-v0[80%:100%]" in text and not one.seen
    assert "with 95% confidence at least" in text  # pi_b stands in the logs
    assert "a policy that draws its actions is judged so" in text
    assert 0.5 < one.weights.mean < 2 and one.log.n < 250
    (one,) = ope.main(Args(run=(runs["cql_cartpole"],), horizon=5, **QUICK)).values()
    text = capsys.readouterr().out
    assert one.seen and "verdict: trained on these very episodes" in text
    assert "with 95% confidence at least" not in text and "believe WDR" not in text
    ids = ("cartpole/random-v0[70%:]",)  # overlaps with :80%
    (one,) = ope.main(Args(run=(runs["bc_cartpole"],), dataset_id=ids, horizon=5, **QUICK)).values()
    assert one.seen


def test_parts_of_datasets():
    assert ope.the_rest(("a-v0[:80%]",)) == ("a-v0[80%:100%]",)
    assert ope.the_rest(("a-v0[20%:60%]",)) == ("a-v0[0%:20%]", "a-v0[60%:100%]")
    assert ope.the_rest(("a-v0[60%:]", "a-v0[:20%]")) == ("a-v0[20%:60%]",)
    assert ope.the_rest(("a-v0", "b-v0[:50%]")) == ("b-v0[50%:100%]",)
    assert ope.the_rest(("a-v0",)) == ("a-v0",)
    assert ope.the_rest(("a-v0[:80%]", "a-v0[20%:50%]")) == ("a-v0[80%:100%]",)
    assert ope.overlap(("a-v0[:80%]",), ("b-v0", "a-v0[79%:]"))
    assert not ope.overlap(("a-v0[:80%]",), ("b-v0", "a-v0[80%:]"))


def test_the_truth_comes_from_the_environment_that_the_run_was_given(monkeypatch):
    units = ope.Units(spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (1,)))
    policy = SimpleNamespace(agent=None, units=units)
    its = SimpleNamespace(dataset_id=("a-v0",), env_id="Pendulum-v1")
    data = SimpleNamespace(units=units, make_env=None, longest=5)
    monkeypatch.setattr(ope, "load_run", lambda *x: (policy, its, ("a-v0",)))
    monkeypatch.setattr(ope, "Dataset", lambda *x, **y: data)
    assert ope.load(Args(run=("x",)))[0].make_env().spec.id == "Pendulum-v1"
    assert data.longest == 5  # where the environment has no time limit: as long as is judged
    assert ope.load(Args(run=("x",), horizon=60))[0].longest == 60


def test_a_run_on_two_datasets_has_seen_both(monkeypatch):
    units = ope.Units(spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (1,)))
    policy = SimpleNamespace(agent=None, units=units)
    its = SimpleNamespace(dataset_id=("a-v0", "b-v0[:50%]"), env_id=None)
    monkeypatch.setattr(ope, "load_run", lambda *x: (policy, its, ("b-v0[50%:100%]",)))
    monkeypatch.setattr(ope, "Dataset", lambda *x, **y: SimpleNamespace(units=units, longest=1))
    for ids, seen in (((), False), (("a-v0[:1%]",), True), (("b-v0[40%:]",), True)):
        assert ope.load(Args(run=("x",), dataset_id=ids))[1][0].seen == seen


def test_box_runs_in_both_modes(runs, capsys):
    """BCQ has samples only, and a deterministic policy no density: FQE and the model are left."""
    names = {name: runs[f"{name}_pendulum"] for name in ("bc", "cql", "bcq")}
    flags = {"dataset_id": ("pendulum/random-v0[:15%]",), "horizon": 2} | QUICK
    for mode in ("stochastic", "deterministic"):
        reports = ope.main(Args(run=tuple(names.values()), policy_mode=mode, **flags))
        for name, folder in names.items():
            one = reports[folder]
            assert not one.seen and np.isfinite(one.estimates["FQE"].value)
            if mode == "deterministic" or name == "bcq":
                assert "has no density" in one.problem and set(one.estimates) == {"FQE", "model"}
                assert "has no density" in verdict(one)
            else:
                assert np.isfinite(one.estimates["WDR"].value)
                assert one.weights.sizes[0] > 5
    text = capsys.readouterr().out
    assert "behaviour policy estimated from the data for 100% of the steps" in text
    assert "with 95% confidence, if the estimated pi_b is right, at least" in text
    assert text.count("a policy that draws its actions is judged so") == 1  # in one of two modes


POLICIES = """
import torch
from torch.distributions import Independent, Normal, Uniform

def good(obs): return torch.stack([obs[:, 2] <= 0, obs[:, 2] > 0], 1) * 0.3 + 0.35
def bad(obs): return 1 - good(obs)
def shape(obs): return torch.ones(len(obs), 3) / 3
def total(obs): return torch.ones(len(obs), 2)
def third(obs): return torch.ones(len(obs), 2) / 3
def nan(obs): return torch.full((len(obs), 2), float("nan"))
def nothing(obs): return None
def failing(obs): return obs[:, 99]
def flat(obs): return torch.full((len(obs),), 0.5)
def negative(obs): return torch.tensor([[-0.5, 1.5]]).repeat(len(obs), 1)
def quits(obs): raise SystemExit
def categorical(obs): return torch.distributions.Categorical(logits=torch.zeros(len(obs), 2))
def normal(obs, mean=0.0, std=1.0, n=1): return Normal(torch.full((len(obs), n), mean), std)
def nan_mean(obs): return normal(obs, float("nan"))
def no_std(obs): return normal(obs, std=0.0)
def wide(obs): return normal(obs, n=3)
def one_state(obs): return normal(obs[:1])
def double(obs): return Normal(torch.zeros(len(obs), 1).double(), 1.0)
def changes(obs): p = good(obs); obs *= 2; return p
def changes_box(obs): pi = box(obs.clone()); obs *= 2; return pi
def scalar(obs): return Normal(0.1 * obs[:, 0], 1.0)
def box(obs): return Independent(Normal(0.1 * obs[:, :1], 1.0), 1)
def unsummed(obs): return Normal(0.1 * obs[:, :1], 1.0)
def no_mode(obs): return Uniform(torch.full((len(obs), 1), -2.0), 2.0)
def uniform(obs): return Independent(Uniform(-2 + 0 * obs[:, :1], 2 + 0 * obs[:, :1]), 1)
number = 3
"""


@pytest.fixture
def policies(tmp_path):
    (tmp_path / "mypolicy.py").write_text(POLICIES)
    (tmp_path / "syntax.py").write_text("def f(obs:\n")
    (tmp_path / "imports.py").write_text("import no_such_package\n")
    (tmp_path / "fails.py").write_text("raise ValueError('two\\nlines')\n")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "data.json").write_text("{}")
    return f"{tmp_path}/mypolicy.py:"


def test_users_policies_are_ranked(policies, capsys):
    names = [policies + name for name in ("bad", "good")]
    flags = {"dataset_id": ("cartpole/random-v0",), "horizon": 10, "verify": True}
    flags |= QUICK | {"steps": 400, "verify_episodes": 200, "hidden": (32,)}
    reports = ope.main(Args(policy=tuple(names), **flags))
    text = capsys.readouterr().out
    ranking = text[text.index("ranking by WDR") :]
    assert ranking.index(names[1]) < ranking.index(names[0])  # the better one first
    good, bad = reports[names[1]], reports[names[0]]
    assert good.estimates["WDR"].value > bad.estimates["WDR"].value
    assert good.estimates["WDR"].low - 0.2 < good.truth[0] < good.estimates["WDR"].high + 0.2
    good.problem, good.log.errors = "no ratios", {"FQE": 0.0, "model": 0.0}
    good.estimates["model"] = good.estimates["FQE"]
    ope.print_ranking([good, bad])
    assert "ranking by FQE, a hint, no more" in capsys.readouterr().out
    good.problem, fqe = "", bad.estimates["FQE"]
    bad.problem, bad.log.errors = "no ratios", {"FQE": 0.0, "model": 0.0}
    bad.estimates["model"] = fqe
    ope.print_ranking([good, bad])
    assert "ranking by FQE" in capsys.readouterr().out  # which agrees with WDR on the good one
    good.estimates["FQE"] = fqe._replace(value=900.0, low=899.0, high=901.0)
    good.weights.sizes[-1] = 99.0
    ope.print_ranking([good, bad])
    assert "no ranking: FQE alone says something of all" in capsys.readouterr().out
    bad.seen = True
    ope.print_ranking([good, bad])
    assert "no ranking: there is a policy" in capsys.readouterr().out


def test_densities_of_users_policies(policies):
    units, args = ope.Units(spaces.Box(-9, 9, (3,)), spaces.Box(-2.0, 2.0, (1,))), Args()
    obs, action = torch.randn(7, 3), torch.rand(7, 1) * 1.8 - 0.9
    a, b, c = (ope.user_policy(policies + n, units, args) for n in ("box", "unsummed", "uniform"))
    expected = Normal(0.1 * obs[:, :1], 1.0).log_prob(2 * action)[:, 0] + np.log(2)
    np.testing.assert_allclose(a.log_prob(obs, action), expected, rtol=1e-5)
    np.testing.assert_allclose(b.log_prob(obs, action), expected, rtol=1e-5)
    np.testing.assert_allclose(c.log_prob(obs, action), np.log(0.5), rtol=1e-5)
    at = a.log_prob(obs, torch.ones(7, 1))  # the mass beyond the edge, 1.98
    beyond = torch.special.log_ndtr(0.1 * obs[:, 0] - 2 * ope.EDGE)
    np.testing.assert_allclose(at, beyond, rtol=1e-4)
    at = c.log_prob(obs, torch.ones(7, 1))  # half of a hundredth of the range
    np.testing.assert_allclose(at, np.log(0.5 * 0.01), rtol=1e-4)
    actions, weights = a.support(obs)
    assert actions.shape == (7, 4, 1) and weights.shape == (7, 4)
    assert a.act(obs.numpy()).shape == (7, 1) and c.sample(obs).abs().max() <= 1
    assert ope.user_policy(policies + "double", units, args).sample(obs).dtype == torch.float32
    greedy = ope.user_policy(policies + "box", units, Args(policy_mode="deterministic"))
    np.testing.assert_allclose(greedy.support(obs)[0][:, 0], 0.05 * obs[:, :1], rtol=1e-5)
    assert "has no density" in greedy.problem


def test_a_box_without_axes(policies):
    units, obs = ope.Units(spaces.Box(-9, 9, (3,)), spaces.Box(-2.0, 2.0, ())), torch.randn(7, 3)
    pi, action = ope.user_policy(policies + "scalar", units, Args()), torch.rand(7, 1) * 1.8 - 0.9
    expected = Normal(0.1 * obs[:, 0], 1.0).log_prob(2 * action[:, 0]) + np.log(2)
    np.testing.assert_allclose(pi.log_prob(obs, action), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["changes", "changes_box"])
def test_a_policy_that_works_in_place_leaves_the_logs_alone(policies, name):
    space = spaces.Discrete(2) if name == "changes" else spaces.Box(-2.0, 2.0, (1,))
    units, obs = ope.Units(spaces.Box(-9, 9, (3,)), space), torch.randn(7, 3)
    pi, before = ope.user_policy(policies + name, units, Args()), obs.clone()
    pi.log_prob(obs, torch.zeros(7).long() if name == "changes" else torch.zeros(7, 1))
    pi.support(obs)
    assert torch.equal(obs, before)


def test_networks_learn_where_a_policys_file_has_switched_gradients_off():
    net, row = torch.nn.Linear(1, 1), torch.zeros(1).long()
    before = net.weight.item()
    with torch.no_grad():
        ope.train(net, lambda i: net(torch.ones(1, 1)).sum() ** 2, [row], Args(steps=3))
    assert net.weight.item() != before


def test_a_categorical_stands_for_its_probabilities(policies):
    units = ope.Units(spaces.Box(-9, 9, (3,)), spaces.Discrete(2))
    pi = ope.user_policy(policies + "categorical", units, Args())
    np.testing.assert_allclose(pi.support(torch.randn(7, 3))[1], 0.5)
    with pytest.raises(UserError, match="are not probabilities: >= 0 with sum 1"):
        ope.user_policy(policies + "third", units, Args()).support(torch.randn(7, 3))


def damaged(tmp_path, run, **changes):
    """A copy of the run with changes in its files: text, or a function of the checkpoint."""
    folder = tmp_path / f"damaged{len(list(tmp_path.iterdir()))}"
    shutil.copytree(run, folder)
    for name, change in changes.items():
        path = folder / ("checkpoint.pt" if name == "checkpoint" else f"{name}.py")
        if isinstance(change, str):
            path.write_text(change)
        else:
            state = torch.load(path, weights_only=True)
            change(state)
            torch.save(state, path)
    return str(folder)


def test_damaged_runs_get_one_clear_line(runs, tmp_path):
    spy = "def load_policy(*_): return None\ndef read_checkpoint(_): return {'args': Args}\n"
    spy += "class Args: dataset_id, env_id = ('cartpole/random-v0[:80%]',), None\n"
    for changes, message in (
        ({"checkpoint": ""}, "no readable checkpoint"),
        ({"checkpoint": lambda s: s.pop("policy")}, "KeyError: 'policy'"),
        ({"checkpoint": lambda s: s["args"].update(dataset_id=("x[",))}, "a part is written in"),
        ({"checkpoint": lambda s: s["args"].update(dataset_id=None)}, "TypeError: 'NoneType'"),
        ({"checkpoint": lambda s: s["policy"]["agent.policy.net.bias.0"].fill_(math.nan)}, "NaN"),
        ({"bc": "def f(:"}, "SyntaxError"),
        ({"bc": "x = 1"}, "has no attribute 'read_checkpoint'"),
        ({"bc": "raise SystemExit"}, "SystemExit"),
        ({"bc": spy}, "AttributeError: 'NoneType' object has no attribute 'units'"),
        ({"cql": "x = 1"}, "not the folder of a training run"),
    ):
        folder = damaged(tmp_path, runs["bc_cartpole"], **changes)
        with pytest.raises(UserError, match=f"^--run {folder}: .*{message}") as error:
            ope.main(Args(run=(folder,), horizon=3, **QUICK))
        assert "\n" not in str(error.value)


def test_deterministic_discrete_policies_have_zeros():
    """Not the 1e-7 that torch's Categorical makes of them."""
    pi = ope.Probabilities(torch.tensor([[1.0, 0.0]]))
    assert pi.log_prob(torch.tensor([1])).item() == -np.inf
    assert pi.log_prob(torch.tensor([0])).item() == 0


def test_wrong_use_gets_one_clear_line(policies, runs, tmp_path):
    cartpole, pendulum = ({"dataset_id": (f"{x}/random-v0",)} for x in ("cartpole", "pendulum"))
    file = policies.removesuffix("mypolicy.py:")
    other_env = str(shutil.copytree(runs["cql_cartpole"], tmp_path / "run"))
    state = torch.load(f"{other_env}/checkpoint.pt", weights_only=True)
    state["args"]["env_id"] = "CartPole-v0"
    torch.save(state, f"{other_env}/checkpoint.pt")
    for flags, message in (
        ({"policy": (policies + "shape",), **cartpole}, r"mypolicy.py:shape: probabilities of sh"),
        ({"policy": (policies + "total",), **cartpole}, r"\[1.0, 1.0\] are not probabilities"),
        ({"policy": (policies + "nan",), **cartpole}, "nan.* are not probabilities"),
        ({"policy": (policies + "nothing",), **cartpole}, "mypolicy.py:nothing: TypeError"),
        ({"policy": (policies + "nothing",), **pendulum}, "it returns NoneType, not a torch Dist"),
        ({"policy": (policies + "failing",), **cartpole}, "mypolicy.py:failing: IndexError"),
        ({"policy": (policies + "absent",), **cartpole}, "has no function absent"),
        ({"policy": (policies + "number",), **cartpole}, "has no function number"),
        ({"policy": (file + "syntax.py:f",), **cartpole}, "syntax.py:f: SyntaxError"),
        ({"policy": (file + "imports.py:f",), **cartpole}, "imports.py:f: ModuleNotFoundError"),
        ({"policy": (file + "fails.py:f",), **cartpole}, "fails.py:f: ValueError: two lines"),
        ({"policy": (file + "quits.py:f",), **cartpole}, "quits.py:f: SystemExit"),
        ({"policy": (file + "data.json:f",), **cartpole}, "there is no Python file .*data.json"),
        ({"policy": (policies + "flat",), **cartpole}, r"probabilities of shape \(\d+,\), not"),
        ({"policy": (policies + "negative",), **cartpole}, r"\[-0.5, 1.5\] are not probabilities"),
        ({"policy": (policies + "quits",), **cartpole}, "mypolicy.py:quits: SystemExit"),
        ({"policy": (policies + "nan_mean",), **pendulum}, ":nan_mean: a mean is NaN or infinite"),
        ({"policy": (policies + "no_std",), **pendulum}, ":no_std: a standard deviation is not ab"),
        ({"policy": (policies + "wide",), **pendulum}, r"Distribution of shape \(\d+, 3\), not"),
        ({"policy": (policies + "one_state",), **pendulum}, r"Distribution of shape \(1, 1\), not"),
        (
            {"policy": (policies + "no_mode",), "policy_mode": "deterministic", **pendulum},
            "no_mode: its actions are NaN",
        ),
        ({"policy": ("nothing.py:f",), **cartpole}, "there is no Python file nothing.py"),
        ({"policy": (policies + "good",)}, "--dataset-id is needed: --policy has none"),
        ({"policy": (policies + "good",) * 2, **cartpole}, "given twice"),
        ({"dataset_id": ("cartpole/random-v0",)}, "--dataset-id needs --run or --policy"),
        (
            {
                "policy": (policies + "good",),
                "dataset_id": ("cartpole/random-v0[:80%]", "cartpole/random-v0[79%:]"),
            },
            "episodes would count twice",
        ),
        ({"run": (runs["cql_cartpole"], runs["cql_pendulum"])}, "the runs have different ones"),
        (
            {"run": (runs["cql_cartpole"], other_env), "verify": True, **cartpole},
            "--env-id is needed: the runs have different ones",
        ),
        (
            {"policy": (policies + "good",), "verify": True, "horizon": 1000, **cartpole},
            "--verify: the environment ends after 500 steps; --horizon 500",
        ),
        ({"run": (file,)}, "not the folder of a training run"),
        ({"run": (runs["cql_pendulum"],), **cartpole}, "its spaces are not those of the data"),
        ({"policy_mode": "greedy"}, "--policy-mode greedy: it must be stochastic or deterministic"),
        ({"gamma": 1.5}, "--gamma 1.5: it must lie in 0.0 to 1"),
        ({"gamma": float("nan")}, "--gamma nan: it must lie in 0.0 to 1"),
        ({"resamples": 0}, "--resamples 0: it must lie in 100 to"),
        ({"hidden": (8, 0)}, r"--hidden \(8, 0\): it must lie in 1 to"),
        ({"seed": -1}, "--seed -1: it must lie in 0 to"),
        ({"seed": None}, "--seed None: a number is needed"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"horizon": 0}, "--horizon 0"),
        ({"horizon": 10**6}, "--horizon 1000000: it must lie in 1 to 100,000"),
        ({"steps": 1.5}, "--steps 1.5: a number is needed"),
        ({"hidden": 8}, "--hidden 8: TypeError"),
        ({"gamma": "1"}, "--gamma 1: a number is needed"),
        ({"seed": 10**30}, "--seed 10+: it must lie in"),
        ({"verify_episodes": 1}, "--verify-episodes 1"),
        ({"dataset_id": ("x/y",), "policy": (policies + "good",)}, "dataset x/y: .*a version"),
        ({"env_id": "No-v0"}, r"environment No-v0 \(not needed without --verify\): .*No"),
    ):
        with pytest.raises(UserError, match=message) as error:
            ope.main(Args(**{**QUICK, "horizon": 3, **flags}))
        assert "\n" not in str(error.value)


def test_wrong_logged_probabilities_get_one_clear_line(monkeypatch):
    mdp, args = MDP(3), Args(steps=1, hidden=(4,), resamples=100)
    data = tabular_data(mdp, 10)
    for value, message in ((-np.inf, "zero probability of"), (0.5, "too high a probability of")):
        data.behavior_log_prob[4] = value
        where = f"episode {data.episode[4]}, step "
        with pytest.raises(UserError, match=f"{where}.*{message} the logged action"):
            quick_log(data, args, monkeypatch)
    one = dataset(data.units, ope.Batch(*(x[:1] for x in data.transitions)), data.episode[:1])
    with pytest.raises(UserError, match="at least two episodes"):
        quick_log(one, args, monkeypatch)


def test_a_policy_that_nobody_followed(capsys):
    mdp, args = MDP(3, ends=False), Args(**QUICK)
    mdp.behavior[:] = [1.0, 0.0]
    data = tabular_data(mdp, 20)
    log = ope.Log(data, args)
    policy = by_table(np.tile([0.0, 1.0], (S + 1, 1)), data.units, args)
    one = ope.evaluate_policy(policy, log, args)
    assert one.problem.startswith("no overlap") and set(one.estimates) == {"FQE", "model"}
    assert verdict(one).startswith("no overlap")
    ope.print_report(one)
    text = capsys.readouterr().out
    assert "no overlap" in text and "nan" not in text and "0% not 0" in text
    one.truth = one.estimates["FQE"].value + 0.25, 0.1
    ope.print_report(one)
    (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("FQE "))
    assert row.endswith("-0.25")  # too low by so much


def test_each_interval_has_the_degrees_of_freedom_of_its_weights(monkeypatch):
    mdp, args, found, bootstrap = MDP(3, ends=False), Args(**QUICK), [], ope.bootstrap

    def spy(estimator, log, df=np.inf, splits=()):
        found.append(df)
        return bootstrap(estimator, log, df, splits)

    monkeypatch.setattr(ope, "bootstrap", spy)
    data = tabular_data(mdp, 60)
    log = quick_log(data, args, monkeypatch)
    log.log_pi_b = log.estimated_log_pi_b = data.behavior_log_prob
    log.model_returns = lambda policy: np.zeros(60)
    one = ope.evaluate_policy(by_table(mdp.target, log.units, args), log, args)
    assert one.weights.sizes[-1] < 50
    assert found == [one.weights.sizes[-1] - 1] * 8 + [np.inf]


def test_ris_has_the_estimated_behaviour_and_the_others_the_logged_one(monkeypatch):
    mdp, args = MDP(3, ends=False), Args(**QUICK)
    data = tabular_data(mdp, 60)
    log = quick_log(data, args, monkeypatch)
    log.estimated_log_pi_b = np.log(np.random.default_rng(0).uniform(0.3, 0.7, 180))
    log.model_returns = lambda policy: np.zeros(60)
    policy = by_table(mdp.target, data.units, args)
    found = ope.evaluate_policy(policy, log, args).estimates
    log_pi = policy.log_prob(log.obs, log.transitions.action)
    for name, log_pi_b in (("PDWIS", data.behavior_log_prob), ("RIS", log.estimated_log_pi_b)):
        expected = PDWIS(log.reward, log.ratio(log_pi, log_pi_b), log.gamma)
        assert found[name].value == pytest.approx(expected)


def test_which_intervals_are_marked(monkeypatch):
    """As no 95% ones; (3) and (4), too, where pi_b is fitted, as its error is not in them."""
    mdp, args = MDP(3, ends=False), Args(**QUICK)
    data = tabular_data(mdp, 60)
    known = data.behavior_log_prob
    fitted, wrong = known * np.nan, known - 1  # bounds need weights that do not average too much
    for logged, also in ((known, set()), (fitted, {"WIS", "PDWIS"}), (wrong, None)):
        data.behavior_log_prob = logged
        log = quick_log(data, args, monkeypatch)
        log.log_pi_b = log.estimated_log_pi_b = wrong if logged is wrong else known
        log.model_returns = lambda policy: np.zeros(60)
        one = ope.evaluate_policy(by_table(mdp.behavior, data.units, args), log, args)
        marked = {name for name, e in one.estimates.items() if e.doubt}
        if logged is wrong:
            assert marked == {*one.estimates} - {"FQE"} and one.bounds == {}
        else:
            assert marked == {"IS", "PDIS", "RIS", "MAGIC", "model"} | also and len(one.bounds) == 2
    log.log_pi_b = known + 1  # weights that average too little leave HCOPE right, if low
    one = ope.evaluate_policy(by_table(mdp.behavior, data.units, args), log, args)
    assert one.problem.startswith("weights average 0.05") and str(*one.bounds).startswith("HCOPE")


def test_weights_that_overflow_are_said_to(capsys):
    """Half of the episodes have a weight of e^700 per step: unweighted sums are infinite, the
    verdict names the mean weight, and no NaN is printed."""
    mdp, args = MDP(3, ends=False), Args(**QUICK)
    data = tabular_data(mdp, 20)
    data.behavior_log_prob[:] = -700.0
    log = ope.Log(data, args)
    one = ope.evaluate_policy(by_table(mdp.target, data.units, args), log, args)
    ope.print_report(one)
    text = capsys.readouterr().out
    assert "weights average inf, not 1" in verdict(one)
    assert "the weights overflow" in text and "nan" not in text
    assert np.isfinite(one.estimates["WDR"].value)


def test_ten_thousand_one_step_episodes_take_seconds(monkeypatch):
    rng = np.random.default_rng(0)
    n, reward = 10_000, rng.random((10_000, 1)) < 0.05
    ratio, q, v = rng.uniform(0.5, 1.5, (n, 1)), rng.random((n, 1)), rng.random((n, 2))
    log = SimpleNamespace(resamples=shares(n, 200), returns=reward[:, 0])
    began = time.process_time()
    e = ope.bootstrap(of_shares(magic, reward, ratio, q, v * [1, 0], gamma=1.0), log)
    assert e.low < e.value < e.high
    assert time.process_time() - began < 3
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(10))
    obs = torch.rand(n, 1)
    batch = ope.Batch(obs, torch.randint(10, (n,)), torch.rand(n), obs, torch.ones(n))
    args = Args(steps=100)
    log = quick_log(dataset(units, batch, torch.arange(n), np.full(n, -2.3)), args, monkeypatch)
    began = time.process_time()
    ope.fqe(log, by_table(np.full((1, 10), 0.1), units, args), log.seen, args)
    assert time.process_time() - began < 5  # of 100 updates, so that no V is computed for nothing


def test_a_thousand_resamples_of_many_long_episodes_are_fast():
    rng = np.random.default_rng(0)
    reward, q, v = (rng.normal(size=(1000, n)) for n in (500, 500, 501))
    ratio, p = rng.uniform(0.95, 1.05, (1000, 500)), shares(1000, 1000)
    began = time.process_time()
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        estimator(reward, ratio, 0.99, p=p)
    for estimator in (doubly_robust, WDR):
        estimator(reward, ratio, q, v, 0.99, p=p)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped(signal_):
    command = [sys.executable, "-u", str(Path(ope.__file__)), "--steps", "1000000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        for line in process.stdout:
            if "the logged policy earned" in line:
                break
        process.send_signal(signal_)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
