"""Five policies of graded quality on CartPole and on Pendulum: estimates beside the truth, and how
well each estimator of ope.py ranks them. The logs are the built-in mixed datasets.

    python benchmarks/ope_ranking.py [cartpole] [pendulum]
"""

import sys
from functools import partial
from pathlib import Path

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

if __name__ == "__main__":
    for env in sys.argv[1:] or HORIZON:
        policies = [f"{__file__}:{name}" for name in list(globals()) if name.startswith(f"{env}_")]
        args = ope.Args(
            policy=tuple(policies),
            dataset_id=(f"{env}/mixed-v0",),
            horizon=HORIZON[env],
            verify=True,
            verify_episodes=200,
        )
        ope.main(args)
