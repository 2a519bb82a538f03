"""How often do the 95% intervals of ope.py hold the truth? Repeated logs of a random MDP (5 states,
2 actions, 10 steps, noisy rewards) whose values are known exactly: 50 and 500 episodes, policies
near to and far from each other. Q is exact but for a random error of a fifth of its deviation.

    python benchmarks/ope_coverage.py [repetitions]
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import ope

S, A, T, GAMMA = 5, 2, 10, 0.95
IS = partial(ope.importance_sampling, gamma=GAMMA)
DR = partial(ope.doubly_robust, gamma=GAMMA)
PLAIN = {
    "IS": IS,
    "PDIS": partial(IS, per_decision=True),
    "WIS": partial(IS, weighted=True),
    "PDWIS": partial(IS, per_decision=True, weighted=True),
}
WITH_Q = {"DR": DR, "WDR": partial(DR, weighted=True), "MAGIC": partial(ope.magic, gamma=GAMMA)}


def exact_q(P, r, target):
    """(T + 1, S, A), by steps to go."""
    q = [np.zeros((S, A))]
    for _ in range(T):
        q.append(r + GAMMA * P @ (target * q[-1]).sum(1))
    return np.array(q)


def log_episodes(rng, n, P, r, start, behavior):
    """state, action, reward (n, T)"""
    state, columns = rng.choice(S, n, p=start), []
    for _ in range(T):
        action = (rng.random(n) > behavior[state, 0]).astype(int)
        columns.append((state, action, r[state, action] + rng.normal(size=n)))
        state = (rng.random((n, 1)) > P[state, action].cumsum(1)[:, :-1]).sum(1)
    return (np.stack(x, 1) for x in zip(*columns, strict=True))


def coverage(n, distance, repetitions):
    """{name: share of the intervals with the truth}, and the mean effective sample size."""
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(S), (S, A)), rng.normal(size=(S, A))
    start, behavior = rng.dirichlet(np.ones(S)), np.full((S, A), 0.5)
    target = behavior + distance * np.sign(rng.normal(size=(S, 1))) * [1, -1]
    exact = exact_q(P, r, target)
    truth, hits, sizes = start @ (target * exact[T]).sum(1), {}, []
    for repetition in range(repetitions):
        state, action, reward = log_episodes(rng, n, P, r, start, behavior)
        ratio = (target / behavior)[state, action]
        q_hat = exact + 0.2 * exact.std() * rng.normal(size=exact.shape) * (exact != 0)
        left = T - np.arange(T)
        v = np.pad((target * q_hat).sum(2)[left, state], ((0, 0), (0, 1)))
        arrays = reward, ratio, q_hat[left, state, action], v
        sizes.append(ope.effective_sample_size(ratio))
        ends = {}
        for name, estimator in PLAIN.items():
            ends[name] = ope.bootstrap_interval(estimator, *arrays[:2], seed=repetition)
        for name, estimator in WITH_Q.items():
            resamples = 100 if name == "MAGIC" else 1000
            ends[name] = ope.bootstrap_interval(
                estimator, *arrays, resamples=resamples, seed=repetition
            )
        x = PLAIN["PDIS"](*arrays[:2], counts=np.eye(n))
        ends["PDIS, t"] = ope.student_t_bound(x, 0.975), -ope.student_t_bound(-x, 0.975)
        lowest = reward.min()
        x = PLAIN["PDIS"](reward - lowest, ratio, counts=np.eye(n))
        shift = lowest * (GAMMA ** np.arange(T)).sum()
        ends["HCOPE, one-sided"] = ope.hcope_bound(x, seed=repetition) + shift, np.inf
        for name, (low, high) in ends.items():
            hits.setdefault(name, []).append(low <= truth <= high)
    return {name: np.mean(hit) for name, hit in hits.items()}, np.mean(sizes)


if __name__ == "__main__":
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(f"coverage of 95% intervals in {repetitions} repetitions")
    for n in (50, 500):
        for distance in (0.1, 0.3):
            shares, size = coverage(n, distance, repetitions)
            text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"n = {n}, pi = 0.5 +- {distance}, effective sample size {size:.0f}: {text}")
