"""ope.py: expectations as exact sums over all trajectories of a small MDP, networks against exact
tables, and everything that a user can get wrong."""

from copy import copy
from functools import cache, partial
from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal

import ope
from ope import (
    Args,
    Estimate,
    Report,
    UserError,
    bernstein_bound,
    bootstrap_interval,
    doubly_robust,
    effective_sample_size,
    hcope_bound,
    importance_sampling,
    magic,
    regret,
    spearman,
    student_t_bound,
    verdict,
)

S, A, T = 3, 2, 3
ope.builtin_dataset = cache(ope.builtin_dataset)
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
    assert effective_sample_size(ones) == pytest.approx(50)
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
        used = max(1, int(((reward != 0) | (ratio != 1) | (q != 0)).any(0).nonzero()[0].max()) + 1)
        partial_ = [magic(*arrays, steps=(j,)) for j in range(-1, used)]
        assert partial_[0] == pytest.approx(v[:, 0].mean(), abs=1e-12)
        assert partial_[-1] == pytest.approx(WDR(*arrays), abs=1e-12)
        assert min(partial_) - 1e-12 <= magic(*arrays) <= max(partial_) + 1e-12


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
        return np.pad(x, ((0, 0), (0, 40)), constant_values=value)

    arrays = reward, ratio, q, v
    longer = pad(reward), pad(ratio, 1.0), pad(q), pad(v)
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        a, b = estimator(*arrays[:2], mdp.gamma), estimator(*longer[:2], mdp.gamma)
        assert a == pytest.approx(b, abs=1e-12)
    for estimator in (doubly_robust, WDR, magic):
        a, b = estimator(*arrays, mdp.gamma), estimator(*longer, mdp.gamma)
        assert a == pytest.approx(b, abs=1e-12)
    assert effective_sample_size(ratio) == pytest.approx(effective_sample_size(pad(ratio, 1.0)))


def test_effective_sample_size(mdp):
    ratio = mdp.sample(30)[3]
    w = ratio.prod(1)
    assert effective_sample_size(ratio) == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert 1 <= effective_sample_size(ratio) <= 30
    assert effective_sample_size(np.array([[1.0], [0.0], [0.0]])) == 1
    assert effective_sample_size(np.zeros((5, 2))) == 0


def test_a_thousand_steps_stay_finite():
    rng = np.random.default_rng(0)
    reward, v = rng.normal(size=(20, 1000)), rng.normal(size=(20, 1001))
    same = np.full((20, 1000), 1.5)
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        assert np.isfinite(estimator(reward, same, 0.99))
    for ratio in (same, rng.uniform(1e-3, 9, (20, 1000)), np.full((20, 1000), 1e-9)):
        for estimator in (WIS, PDWIS):
            assert np.isfinite(estimator(reward, ratio, 0.99))
        for estimator in (WDR, magic):
            assert np.isfinite(estimator(reward, ratio, reward, v, 0.99))
        assert 1 <= effective_sample_size(ratio) <= 20
    with pytest.raises(UserError, match="exceed 1e304"):
        importance_sampling(reward, np.full((20, 1000), 9.0), 0.99)


def test_pdis_can_be_worse_than_is():
    """One state, rewards +1 and -1, gamma 1: the variances are 0 and 1.05."""
    behavior, target = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    action = np.array(list(product(range(2), repeat=2)))
    ratio, reward = (target / behavior)[action], np.tile([1.0, -1.0], (4, 1))
    p = behavior[action].prod(1)
    for estimator, variance in ((importance_sampling, 0), (PDIS, 1.05)):
        x = each(partial(estimator, gamma=1.0), reward, ratio)
        assert p @ x**2 - (p @ x) ** 2 == pytest.approx(variance, abs=0.005)


# T-OPE-10: estimated behaviour


def tabular_ratio(mdp, state, action):
    """The ratio by the frequencies of the same data."""
    counts = np.zeros((S + 1, A))
    np.add.at(counts, (state, action), 1)
    estimated = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return np.where(state == mdp.end, 1.0, mdp.target[state, action] / estimated[state, action])


def test_ris_beats_is_in_mean_squared_error():
    mdp = MDP(1)
    truth, errors = mdp.value(mdp.target), []
    for _ in range(300):
        state, action, reward, ratio = mdp.sample(1000)
        by = tabular_ratio(mdp, state, action)
        both = [importance_sampling(reward, x, mdp.gamma) - truth for x in (ratio, by)]
        errors.append(both)
    plain, ris = (np.array(errors) ** 2).mean(0)
    assert ris < 0.7 * plain


# T-OPE-13: intervals and bounds


def test_quantiles_of_student_t():
    """Against printed tables: the mean of x is 0 and S / sqrt(n) is 1."""
    for n, quantile in ((2, 6.3138), (5, 2.1318), (31, 1.6973), (1001, 1.6464)):
        x = np.random.default_rng(0).normal(size=n)
        x = (x - x.mean()) / x.std(ddof=1) * np.sqrt(n)
        assert student_t_bound(x) == pytest.approx(-quantile, abs=2e-3)
    assert student_t_bound(x, 0.975) == pytest.approx(-1.9623, abs=1e-3)


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
    for repetition in range(500):
        _, _, reward, ratio = mdp.sample(100)
        x = importance_sampling(reward, ratio, mdp.gamma, True, counts=np.eye(100))
        t = student_t_bound(x, 0.975), -student_t_bound(-x, 0.975)
        arrays = reward, ratio
        boot = bootstrap_interval(
            partial(PDWIS, gamma=mdp.gamma), *arrays, resamples=200, seed=repetition
        )
        lowest = mdp.r.min()
        shift = lowest * (mdp.gamma ** np.arange(T)).sum()
        shifted = importance_sampling(reward - lowest, ratio, mdp.gamma, True, counts=np.eye(100))
        hcope = hcope_bound(shifted, seed=repetition) + shift
        hit.append((t[0] <= truth <= t[1], boot[0] <= truth <= boot[1], hcope <= truth))
    student, bootstrap, hcope = np.mean(hit, 0)
    assert 0.90 <= student <= 0.98
    assert 0.90 <= bootstrap <= 0.98
    assert hcope >= 0.95


def test_the_bootstrap_by_counts_is_the_bootstrap_by_resampling(mdp):
    state, action, reward, ratio = mdp.sample(25)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    counts = np.random.default_rng(1).multinomial(25, np.full(25, 1 / 25), 30).astype(float)
    cases = [(e, (reward, ratio)) for e in (importance_sampling, PDIS, WIS, PDWIS)]
    cases += [(e, (reward, ratio, q, v)) for e in (doubly_robust, WDR)]
    for estimator, arrays in cases:
        estimator = partial(estimator, gamma=mdp.gamma)
        fast = estimator(*arrays, counts=counts)
        for value, count in zip(fast, counts, strict=True):
            chosen = np.repeat(np.arange(25), count.astype(int))
            assert value == pytest.approx(estimator(*(x[chosen] for x in arrays)), abs=1e-10)
        plain = bootstrap_interval(lambda *x, e=estimator: e(*x), *arrays, resamples=100)
        fast = bootstrap_interval(estimator, *arrays, resamples=100)
        assert plain == pytest.approx(fast, abs=1e-10)
        assert fast[0] < estimator(*arrays) < fast[1]


def test_the_bootstrap_of_magic(mdp):
    """Not equal draw by draw, as its inner intervals are random; the same on one draw of each."""
    state, action, reward, ratio = mdp.sample(40)
    q, v = mdp.q_and_v(mdp.random_q(), state, action)
    once = magic(reward, ratio, q, v, mdp.gamma, counts=np.ones((1, 40)))[0]
    assert once == magic(reward, ratio, q, v, mdp.gamma)
    count = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40))
    chosen = np.repeat(np.arange(40), count)
    resampled = magic(*(x[chosen] for x in (reward, ratio, q, v)), mdp.gamma, steps=(-1, 0, 2))
    counted = magic(reward, ratio, q, v, mdp.gamma, steps=(-1, 0, 2), counts=count[None])[0]
    assert counted == pytest.approx(resampled, abs=0.05)
    estimator = partial(magic, gamma=mdp.gamma)
    low, high = bootstrap_interval(estimator, reward, ratio, q, v, resamples=50)
    assert low < magic(reward, ratio, q, v, mdp.gamma) < high


# T-OPE-15: wrong input on arrays


def test_wrong_arrays_get_one_clear_line():
    reward, ratio = np.ones((3, 4)), np.ones((3, 4))
    q, v = np.ones((3, 4)), np.ones((3, 5))
    zero_behavior = ratio.copy()
    zero_behavior[1, 2] = np.inf
    negative = ratio.copy()
    negative[0, 3] = -1.0
    nan = reward.copy()
    nan[2, 0] = np.nan
    for call, message in (
        (lambda: importance_sampling(reward[0], ratio, 1.0), r"reward has shape \(4,\)"),
        (lambda: importance_sampling(reward[:0], ratio[:0], 1.0), r"reward has shape \(0, 4\)"),
        (lambda: importance_sampling(reward, ratio[:2], 1.0), r"ratio has shape \(2, 4\)"),
        (lambda: importance_sampling(nan, ratio, 1.0), "reward is nan in episode 2, step 0"),
        (lambda: importance_sampling(reward, zero_behavior, 1.0), "episode 1, step 2.*action 0?"),
        (lambda: effective_sample_size(zero_behavior), "episode 1, step 2.*action 0?"),
        (lambda: importance_sampling(reward, negative, 1.0), "ratio is -1.0 in episode 0, step 3"),
        (lambda: doubly_robust(reward, ratio, q, q, 1.0), r"v has shape \(3, 4\), not \(3, 5\)"),
        (lambda: magic(reward, ratio, v, v, 1.0), r"q has shape \(3, 5\), not \(3, 4\)"),
        (lambda: magic(*(x[:1] for x in (reward, ratio, q, v)), 1.0), "at least two episodes"),
        (lambda: PDWIS(reward, ratio * [1, 1, 0, 1], 1.0), "no overlap.*beyond step 2"),
        (lambda: hcope_bound(np.ones(9)), "at least 40"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert importance_sampling(reward, np.zeros((3, 4)), 1.0) == 0  # unbiased: one in many is not 0


# T-OPE-16: selection


def test_rank_correlation_and_regret():
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


# Networks (T-OPE-9 and the estimated behaviour)


def tabular_data(mdp, n=400, seed=0):
    """n episodes as a Data: observations are one-hot states."""
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
    return ope.Data(units, batch, episode, behavior_log_prob=np.array(log_prob))


def tabular_policy(mdp, data, args, pi=None):
    table = torch.as_tensor(mdp.target if pi is None else pi)
    return ope.DiscretePolicy("table", lambda obs: table[obs.argmax(1)], data.units, args)


def certainty_equivalent(mdp, data, keep):
    """Exact Q (T + 1, S + 1, A) of the MDP with the frequencies of the transitions `keep`, and how
    often it has seen each pair (S + 1, A)."""
    state, next_state = data.all.obs.argmax(1).numpy(), data.all.next_obs.argmax(1).numpy()
    counts, certain = np.zeros((S + 1, A, S + 1)), copy(mdp)
    np.add.at(counts, (state[keep], data.all.action.numpy()[keep], next_state[keep]), 1)
    certain.P = mdp.P.copy()
    certain.P[:S] = counts[:S] / counts[:S].sum(2, keepdims=True)
    return certain.q(mdp.target), counts.sum(2)


def test_fqe_is_the_certainty_equivalent_value_in_a_table():
    torch.manual_seed(0)
    mdp, args = MDP(3), Args(hidden=(64,), steps=2000, gamma=0.9, lr=1e-2, batch_size=128)
    data = tabular_data(mdp)
    log = ope.Log(data, args)
    policy = tabular_policy(mdp, data, args)
    q, v, members = ope.cross_fitted(log, policy, ope.fit_q(log, policy, args))
    state, action = data.all.obs.argmax(1).numpy(), data.all.action.numpy()
    fold, left = log.fold[data.episode].numpy(), T - log.step.numpy()
    both = [certainty_equivalent(mdp, data, fold != k) for k in (0, 1)]
    exact, counts = (np.stack(x) for x in zip(*both, strict=True))
    exact_v = (mdp.target * exact).sum(3)
    expected = exact_v[:, T, state[log.index[:, 0].numpy()]]
    assert abs(expected[0] - expected[1]).max() > 0.1  # the halves of the data differ
    np.testing.assert_allclose(members, expected[[0, 0, 1, 1]].T, atol=0.05)
    assert ope.fqe_value(members) == pytest.approx(expected.mean(), abs=0.01)
    often = log.padded(counts[fold, state, action], after=99) >= 10  # others are extrapolated
    expected_q = log.padded(exact[fold, left, state, action])
    assert often.mean() > 0.98
    np.testing.assert_allclose(q[often], expected_q[often], atol=0.05)
    np.testing.assert_allclose(v[:, :T], log.padded(exact_v[fold, left, state]), atol=0.05)
    assert q.shape == (log.n, T) and v.shape == (log.n, T + 1) and not v[:, T].any()
    assert not q[~log.inside].any() and not v[:, :T][~log.inside].any()


def test_folds_do_not_see_themselves():
    """Rewards of one fold are 1, of the other 0: an episode's Q must be that of the other."""
    torch.manual_seed(0)
    mdp, args = MDP(3), Args(hidden=(16,), steps=300, gamma=0.0, lr=1e-2, batch_size=32)
    data = tabular_data(mdp, 60)
    log = ope.Log(data, args)
    own = log.fold[data.episode].float()
    data.all = data.all._replace(reward=own, terminal=torch.ones_like(own))
    policy = tabular_policy(mdp, data, args)
    q, _, members = ope.cross_fitted(log, policy, ope.fit_q(log, policy, args))
    of_episode = 1.0 - log.fold.numpy()[:, None]
    assert np.abs(q - of_episode)[log.inside].max() < 0.1
    np.testing.assert_allclose(members.mean(0), [1, 1, 0, 0], atol=0.1)


def test_fqe_of_terminal_steps_is_their_reward_and_truncated_ones_go_on():
    torch.manual_seed(0)
    args = Args(hidden=(16,), steps=600, gamma=0.5, horizon=3, lr=1e-2, batch_size=64)
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    zero, one = torch.zeros(40, 1), torch.ones(40)
    for terminal, expected in ((one, 1.0), (0 * one, 1.75)):  # 1 + 1/2 + 1/4
        batch = ope.Batch(zero, torch.arange(40) % 2, one, zero, terminal)
        data = ope.Data(units, batch, torch.arange(40) // (1 if terminal.any() else 4))
        log = ope.Log(data, args)
        policy = ope.DiscretePolicy("even", lambda obs: torch.full((len(obs), 2), 0.5), units, args)
        _, _, members = ope.cross_fitted(log, policy, ope.fit_q(log, policy, args))
        assert ope.fqe_value(members) == pytest.approx(expected, abs=0.02)
        assert log.model.rollout(log, policy).mean() == pytest.approx(expected, abs=0.05)


def test_fqe_is_near_monte_carlo_in_cartpole():
    torch.manual_seed(0)
    args = Args(horizon=30, steps=1000, gamma=0.98, verify_episodes=500)
    data, (policy,) = ope.example(args, torch.device("cpu"), episodes=300, gains=(1.0, 8.0))
    log = ope.Log(data, args)
    _, _, members = ope.cross_fitted(log, policy, ope.fit_q(log, policy, args))
    truth, error = ope.true_value(policy, log, args)
    behavior = ope.discount(log.reward, 0.98).sum(1).mean()
    assert truth - behavior > 1  # the answer is not in the logged returns
    assert ope.fqe_value(members) == pytest.approx(truth, abs=0.5 + 2 * error)


def test_the_interval_of_fqe_knows_its_members():
    members = np.array([[0.0, 0, 1, 1]]).repeat(50, 0)
    low, high = bootstrap_interval(ope.fqe_value, members)
    assert ope.fqe_value(members) == 0.5 and low < 0.3 and high > 0.7


def test_estimated_behaviour_of_discrete_actions_is_the_frequency():
    torch.manual_seed(0)
    mdp, args = MDP(3), Args(hidden=(), steps=800, lr=2e-2)
    data = tabular_data(mdp)
    log = ope.Log(data, args)
    estimated = np.exp(ope.fit_behavior(log, args))
    state, action = data.all.obs.argmax(1).numpy(), data.all.action.numpy()
    frequency = np.array([[(action[state == s] == a).mean() for a in range(A)] for s in range(S)])
    np.testing.assert_allclose(estimated, frequency[state, action], atol=0.03)


def box_log(args, n=1500):
    """One-step episodes with two kinds of actions: the density is a mixture."""
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Box(-4.0, 4.0, (2,)))
    mean = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    action = (mean + 0.3 * torch.randn(n, 2)).tanh()
    obs, one = torch.rand(n, 1), torch.ones(n)
    batch = ope.Batch(obs, action, one, obs, one)
    nan = np.full(n, np.nan)
    return ope.Log(ope.Data(units, batch, torch.arange(n), behavior_log_prob=nan), args), mean


def test_estimated_behaviour_of_box_actions():
    torch.manual_seed(0)
    args = Args(hidden=(32,), steps=800, lr=1e-2)
    log, _ = box_log(args)
    behavior = ope.BoxBehavior(log, args).requires_grad_(False)
    grid = torch.linspace(-4.9, 4.9, 201)  # of atanh(action)
    pairs = torch.cartesian_prod(grid, grid).tanh()
    slope = (1 - pairs**2).prod(1)
    density = slope * behavior.log_prob(torch.zeros(len(pairs), 1), pairs).exp()
    total = torch.trapezoid(torch.trapezoid(density.view(201, 201), grid), grid)
    assert total.item() == pytest.approx(1, abs=0.01)  # a density, before any training
    u = log.action.clamp(-1 + 1e-4, 1 - 1e-4).atanh()
    exact = torch.stack([Normal(m, 0.3).log_prob(u).sum(1) for m in (-1.0, 1.0)]).logsumexp(0)
    exact = exact - np.log(2) - (1 - log.action**2).log().sum(1)
    estimated = ope.fit_behavior(log, args)
    assert np.mean(estimated) == pytest.approx(exact.mean().item(), abs=0.05)
    # log pi_b as the policies have it: per unit of the environment's actions, 4 to each side
    uniform = Independent(torch.distributions.Uniform(-4 * torch.ones(2), 4 * torch.ones(2)), 1)
    policy = ope.user_policy(
        "uniform", lambda obs: uniform.expand([len(obs)]), log.data.units, args
    )
    log.learn_behavior(args)
    assert np.mean(log.behavior_log_prob) == pytest.approx(
        exact.mean().item() - np.log(16), abs=0.05
    )
    assert log.notes == ("behaviour policy estimated from the data for 100% of the steps",)
    density = policy.log_prob(log.obs, log.data.all.action)
    np.testing.assert_allclose(density, -np.log(64), rtol=1e-5)


def test_the_model_rolls_out_what_it_has_learned():
    """s' = s + a / 10, r = s, the end beyond 1.05: from 0, a = 1 earns 0, 0.1, ..., 1.0."""
    torch.manual_seed(0)
    args = Args(hidden=(64,), steps=1500, gamma=0.9, horizon=14, lr=3e-3)
    units = ope.Units(spaces.Box(-9, 9, (1,)), spaces.Box(-1.0, 1.0, (1,)))
    s, a = torch.rand(4000, 1) * 2.2 - 1.1, torch.rand(4000, 1) * 2 - 1
    s[::2] = 0.0
    end = ((s + a / 10) > 1.05).float()[:, 0]
    batch = ope.Batch(s, a, s[:, 0], s + a / 10, end)
    data = ope.Data(units, batch, torch.arange(4000) // 20)
    policy = ope.BoxPolicy("one", lambda obs: np.ones((len(obs), 1)), None, units, args)
    log = ope.Log(data, args)
    value = log.model.rollout(log, policy)
    expected = sum(0.9**t * 0.1 * t for t in range(11))
    assert np.median(value) == pytest.approx(expected, abs=0.3)
    endless = sum(0.9**t * 0.1 * t for t in range(14))
    assert abs(expected - endless) > 0.6  # the end was honoured


# Horizon, ends, truth


def test_the_horizon_stops_where_a_truncated_episode_does():
    length, ends = np.array([5, 9, 7]), np.array([True, False, False])
    assert ope.known_steps(length, ends, None) == 7
    assert ope.known_steps(length, ends, 6) == 6
    assert ope.known_steps(length, np.array([True] * 3), None) == 9
    assert ope.known_steps(length, np.array([True] * 3), 20) == 20
    with pytest.raises(UserError, match="episode 2 was truncated after 7 steps"):
        ope.known_steps(length, ends, 8)


def test_arrays_of_a_log():
    """Episodes of 2 (terminated), 4 and 3 (truncated) steps; reward = the transition's number."""
    args = Args(steps=1, horizon=3, gamma=0.5)
    units = ope.Units(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    episode, number = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2]), torch.arange(9.0)
    obs, terminal = number[:, None], (number == 1).float()
    batch = ope.Batch(obs, torch.zeros(9, dtype=torch.long), number, obs, terminal)
    log = ope.Log(ope.Data(units, batch, episode), args)
    np.testing.assert_array_equal(log.reward, [[0, 1, 0], [2, 3, 4], [6, 7, 8]])
    np.testing.assert_array_equal(log.step, [0, 1, 0, 1, 2, 3, 0, 1, 2])
    ratio = log.ratio(np.log(np.full(9, 3.0)), np.log(np.full(9, 1.5)))
    np.testing.assert_allclose(ratio, [[2, 2, 1], [2, 2, 2], [2, 2, 2]])


class Counter(gym.Env):
    """Reward 1 per step, for ever."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2, start=3)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert action in (3, 4)
        return np.zeros(2, np.float32), float(action == 4), False, False, {}


def test_the_truth_has_the_horizon_the_discount_and_the_policy_mode():
    units = ope.Units(Counter.observation_space, Counter.action_space)
    for mode, expected in (("stochastic", 0.7 * 1.75), ("deterministic", 1.75)):
        args = Args(policy_mode=mode, verify_episodes=4000)
        policy = ope.DiscretePolicy(
            "p", lambda obs: np.tile([0.3, 0.7], (len(obs), 1)), units, args
        )
        log = type("Log", (), {"data": ope.Data(units, make_env=Counter), "gamma": 0.5})
        log.horizon = 3
        truth, error = ope.true_value(policy, log, args)
        assert truth == pytest.approx(expected, abs=4 * error + 1e-12)
        assert error == pytest.approx(0.5 * np.sqrt(21 / 16 * 0.84 / 4000), rel=0.1) or mode != (
            "stochastic"
        )


# Verdict


def report(wdr=(1, 2), pdwis=(1, 2), fqe=(1, 2), model=(1, 2), ess=80.0, weights=(1, 0.1, 0.05)):
    ends = {"PDWIS": pdwis, "WDR": wdr, "FQE": fqe, "model": model}
    estimates = {
        name: Estimate(reason=x) if isinstance(x, str) else Estimate(sum(x) / 2, *x, 0.0)
        for name, x in ends.items()
    }
    return Report("p", "", estimates, ess, 200, 1.0, weights, (), (), None)


def test_verdict():
    agree = verdict(report())
    assert agree == "all agree, effective sample size 80 of 200: believe WDR, 1 to 2."
    assert "believe WDR with care" in verdict(report(ess=30))
    near = {"wdr": (1.998, 2), "pdwis": (1, 2.5), "model": (1, 2.5)}
    assert verdict(report(fqe=(2.001, 2.003), **near)).startswith("all agree")
    assert verdict(report(fqe=(2.3, 2.4), **near)).startswith("WDR and FQE disagree")
    assert "and not FQE" in verdict(report(fqe=(5, 6)))
    assert "FQE and model disagree" in verdict(report(fqe=(5, 6)))
    assert "do not trust any" in verdict(report(fqe=(5, 6), ess=30))
    assert "do not trust any" in verdict(report(pdwis=(5, 6), fqe=(5, 6)))
    assert "believe WDR" in verdict(report(model=(5, 6)))  # heard, but has no vote
    few = verdict(report(ess=3, weights=(0.5, 0.3, 0.4)))
    assert few.startswith("effective sample size 3 of 200") and "a hint, no more" in few
    assert "do not trust any" in verdict(report(ess=3, model=(5, 6)))
    assert "hint" in verdict(report(weights=(1, 0.1, 0.6)))
    assert "weights average 0.50, not 1" in verdict(report(weights=(0.5, 0.1, 0.05)))
    none = report(wdr="no density", pdwis="no density", ess=0.0, weights=(np.nan,) * 3)
    assert verdict(none).startswith("no density; FQE and the model agree")


# What a user runs


QUICK = {"steps": 10, "resamples": 20, "device": "cpu", "hidden": (8,), "batch_size": 16}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import cql

    out, folders = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(out / "minari"))
        for seed, dataset in enumerate(["cartpole/random-v0", "pendulum/random-v0"]):
            flags = {"steps": 10, "log_every": 10, "eval_every": 0, "eval_episodes": 0}
            args = cql.Args(dataset_id=(dataset,), hidden=(16,), out_dir=str(out), **flags)
            cql.main(args)
            (folders[dataset[:8]],) = out.glob(f"cql__{dataset.replace('/', '-')}*")
            assert seed < 2
    return {name: str(folder) for name, folder in folders.items()}


def test_the_example_runs_and_the_horizon_collapses_the_sample(capsys):
    reports = []
    for horizon in (None, 500):
        (one,) = ope.main(Args(horizon=horizon, verify_episodes=50, **QUICK)).values()
        reports.append(one)
    assert reports[0].ess > 50 > reports[1].ess
    assert set(reports[0].estimates) == {*ope.WEIGHTED, "FQE", "model"}
    for name in ("PDWIS", "WDR"):
        e, (truth, error) = reports[0].estimates[name], reports[0].truth
        assert e.low - 3 * error < truth < e.high + 3 * error
    text = capsys.readouterr().out
    assert (
        "T = 50 steps, gamma = 0.99, stochastic policy" in text
        and "verdict: " in text
        and "truth" in text
    )


def test_a_discrete_run(runs, capsys):
    """Greedy CQL: no logged episode follows it for long."""
    folder = runs["cartpole"]
    (one,) = ope.main(Args(run=(folder,), horizon=None, **QUICK)).values()
    assert "trained on these logs, so its estimates are optimistic" in one.notes
    assert "behaviour policy as logged" in one.notes
    assert np.isfinite(one.estimates["FQE"].value) and np.isfinite(one.estimates["model"].value)
    assert one.truth is None
    assert "verdict: " in capsys.readouterr().out


def test_a_box_run_in_both_modes(runs):
    for mode in ("stochastic", "deterministic"):
        args = Args(run=(runs["pendulum"],), policy_mode=mode, horizon=3, verify=True, **QUICK)
        (one,) = ope.main(Args(**{**vars(args), "verify_episodes": 5})).values()
        assert -60 < one.truth[0] < 0
        if mode == "stochastic":
            assert np.isfinite(one.estimates["WDR"].value) and one.ess >= 1
            note = "behaviour policy estimated from the data for 100% of the steps"
            assert note in one.notes
        else:
            assert "has no density" in one.estimates["WDR"].reason
            assert "no density" in verdict(one)


POLICIES = """
import torch
from torch.distributions import Independent, Normal

def good(obs): return torch.stack([obs[:, 2] <= 0, obs[:, 2] > 0], 1) * 0.3 + 0.35
def bad(obs): return 1 - good(obs)
def shape(obs): return torch.ones(len(obs), 3) / 3
def total(obs): return torch.ones(len(obs), 2)
def nan(obs): return torch.full((len(obs), 2), float("nan"))
def box(obs): return Independent(Normal(0.1 * obs[:, :1], 1.0), 1)
def unsummed(obs): return Normal(0.1 * obs[:, :1], 1.0)
number = 3
"""


@pytest.fixture
def policies(tmp_path):
    (tmp_path / "mypolicy.py").write_text(POLICIES)
    return f"{tmp_path}/mypolicy.py:"


def test_users_policies_are_ranked(policies, capsys):
    names = [policies + name for name in ("bad", "good")]
    ids = {"dataset_id": ("cartpole/random-v0",)}
    args = Args(policy=tuple(names), horizon=15, verify=True, verify_episodes=200, **ids, **QUICK)
    reports = ope.main(args)
    text = capsys.readouterr().out
    assert text.rindex(names[1]) < text.rindex(names[0])  # the ranking: the better one first
    assert "ranking by WDR" in text and "WDR       Spearman  1.00, regret@1 0.00" in text
    good, bad = reports[names[1]], reports[names[0]]
    assert good.estimates["WDR"].value > bad.estimates["WDR"].value
    assert good.estimates["WDR"].low - 0.2 < good.truth[0] < good.estimates["WDR"].high + 0.2


def test_densities_with_and_without_an_event_dimension_are_the_same(policies):
    units = ope.Units(spaces.Box(-9, 9, (3,)), spaces.Box(-2.0, 2.0, (1,)))
    obs, action = torch.randn(7, 3), torch.rand(7, 1) * 2 - 1
    a, b = (
        ope.user_policy(n, ope.load_function(policies + n), units, Args())
        for n in ("box", "unsummed")
    )
    np.testing.assert_allclose(a.log_prob(obs, action), b.log_prob(obs, action))
    expected = Normal(0.1 * obs[:, :1], 1.0).log_prob(2 * action)[:, 0]
    np.testing.assert_allclose(a.log_prob(obs, action), expected, rtol=1e-5)
    actions, weights = a.support(obs)
    assert actions.shape == (7, 4, 1) and weights.shape == (7, 4)
    greedy = ope.user_policy(
        "g", ope.load_function(policies + "box"), units, Args(policy_mode="deterministic")
    )
    np.testing.assert_allclose(greedy.support(obs)[0][:, 0], 0.05 * obs[:, :1], rtol=1e-5)


def test_wrong_use_gets_one_clear_line(policies, runs, tmp_path):
    cartpole = {"dataset_id": ("cartpole/random-v0",)}
    for flags, message in (
        ({"policy": (policies + "shape",), **cartpole}, r"shape \(10000, 3\), not \(10000, 2\)"),
        (
            {"policy": (policies + "total",), **cartpole},
            r"\[1.0, 1.0\] are not >= 0 with the sum 1",
        ),
        ({"policy": (policies + "nan",), **cartpole}, "nan.* are not >= 0 with the sum 1"),
        ({"policy": (policies + "absent",), **cartpole}, "has no function absent"),
        ({"policy": (policies + "number",), **cartpole}, "has no function number"),
        ({"policy": ("nothing.py:f",), **cartpole}, "there is no file nothing.py"),
        ({"policy": (policies + "good",)}, "--dataset-id is needed"),
        ({"policy": (policies + "good",) * 2, **cartpole}, "given twice"),
        ({"run": (runs["cartpole"], runs["pendulum"])}, "the runs have different ones"),
        ({"run": (str(tmp_path),)}, "not the folder of a training run"),
        ({"run": (runs["pendulum"],), **cartpole}, "its spaces are not those of the data"),
        ({"gamma": 1.5}, "--gamma in"),
        ({"resamples": 0}, "--resamples 0: it must be at least 10"),
    ):
        with pytest.raises(UserError, match=message):
            ope.main(Args(**{**QUICK, "horizon": 3, **flags}))


def test_wrong_logged_probabilities_get_one_clear_line():
    mdp, args = MDP(3), Args(steps=1, hidden=(4,))
    data = tabular_data(mdp, 10)
    policy = tabular_policy(mdp, data, args)
    for value, message in ((-np.inf, "zero probability of"), (0.5, "a probability above 1 for")):
        data.behavior_log_prob[4] = value
        where = f"episode {data.episode[4]}, step "
        with pytest.raises(UserError, match=f"{where}.*{message} the logged action"):
            ope.Log(data, args, [policy])


def test_a_policy_that_nobody_followed(capsys):
    mdp, args = MDP(3), Args(**QUICK)
    mdp.behavior[:] = [1.0, 0.0]
    data = tabular_data(mdp, 20)
    policy = tabular_policy(mdp, data, args, np.tile([0.0, 1.0], (S + 1, 1)))
    log = ope.Log(data, args, [policy])
    one = ope.evaluate_policy(policy, log, args)
    assert one.estimates["IS"].reason.startswith("no overlap") and one.ess == 0
    assert verdict(one).startswith("no overlap") or "do not trust any" in verdict(one)
    ope.print_report(one)
    assert "no overlap" in capsys.readouterr().out


def test_a_thousand_resamples_of_many_long_episodes_are_fast():
    import time

    rng = np.random.default_rng(0)
    reward, q, v = (rng.normal(size=(1000, n)) for n in (500, 500, 501))
    ratio = rng.uniform(0.95, 1.05, (1000, 500))
    began = time.process_time()
    for estimator in (importance_sampling, PDIS, WIS, PDWIS):
        bootstrap_interval(partial(estimator, gamma=0.99), reward, ratio)
    for estimator in (doubly_robust, WDR):
        bootstrap_interval(partial(estimator, gamma=0.99), reward, ratio, q, v)
    assert time.process_time() - began < 5
