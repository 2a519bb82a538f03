"""Five policies of graded quality on CartPole and on Pendulum: estimates beside the truth, and how
well each estimator of ope.py ranks them. The logs are the built-in mixed datasets.

    python benchmarks/ope_ranking.py [cartpole] [pendulum]
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal

sys.path.insert(0, str(Path(__file__).parent.parent))
import ope


def cartpole(obs, eps):
    """The scripted controller that acts uniformly at random with probability eps."""
    scripted = [ope.scripted_action("cartpole/mixed-v0", row) for row in obs.numpy()]
    return eps / 2 + (1 - eps) * F.one_hot(torch.tensor(scripted), 2)


def pendulum(obs, gain):
    """The scripted controller at part of its torque, with Gaussian noise."""
    scripted = [ope.scripted_action("pendulum/mixed-v0", row)[0] for row in obs.numpy()]
    return Independent(Normal(gain * torch.tensor(scripted)[:, None], 0.5), 1)


cartpole_10, cartpole_30, cartpole_50, cartpole_70, cartpole_90 = (
    partial(cartpole, eps=eps) for eps in (0.1, 0.3, 0.5, 0.7, 0.9)
)
pendulum_00, pendulum_25, pendulum_50, pendulum_75, pendulum_100 = (
    partial(pendulum, gain=gain) for gain in (0.0, 0.25, 0.5, 0.75, 1.0)
)
HORIZON = {"cartpole": 100, "pendulum": 200}


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


def print_quality(reports):
    truth = [report.truth[0] for report in reports]
    for name in reports[0].estimates:
        if all(name in report.estimates for report in reports):
            values = [report.estimates[name].value for report in reports]
            error = np.abs(np.subtract(values, truth)).mean()
            print(f"{name:9s} Spearman {spearman(truth, values):5.2f}, regret@1 "
                  f"{regret(truth, values):.2f}, mean error {error:.3g}")  # fmt: skip


if __name__ == "__main__":
    for env in sys.argv[1:] or HORIZON:
        policies = [f"{__file__}:{name}" for name in list(globals()) if name.startswith(f"{env}_")]
        flags = {"horizon": HORIZON[env], "verify": True, "verify_episodes": 200}
        args = ope.Args(policy=tuple(policies), dataset_id=(f"{env}/mixed-v0",), **flags)
        print_quality(list(ope.main(args).values()))
