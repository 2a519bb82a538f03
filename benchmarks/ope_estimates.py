"""Every estimate of ope.py beside the truth: logs of 10 to 1,000 episodes of CartPole (T = 50,
gamma 0.99) by a controller of gain 5, from which five other gains are judged. One log of each size.

  python benchmarks/ope_estimates.py            what benchmarks/data/ope.csv lacks: about 10 minutes

Distance is the mean difference of the two policies' probabilities in the logged states: in how many
steps the judged policy must act otherwise. Truth is the mean of 400,000 episodes.
"""

import contextlib
import csv
import io
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from ope_coverage import CARTPOLE, cartpole_value, ope

CSV = Path(__file__).parent / "data/ope.csv"
COLUMNS = (
    "seed n policy distance estimator estimate low high printed_as_95 ess verdict logged truth"
).split()
SIZES, GAINS, SEEDS = (10, 30, 100, 300, 1000), (6.5, 8.0, 2.5, 12.0, 20.0), (100,)


def judge(n, seed):
    """Rows of one log."""
    data, policies = ope.example(CARTPOLE, n, (5.0, *GAINS), seed)
    torch.manual_seed(seed)
    log = ope.Log(data, CARTPOLE)
    for policy, gain in zip(policies, GAINS, strict=True):
        report = ope.evaluate_policy(policy, log, CARTPOLE)
        for name, e in report.estimates.items():
            numbers = [round(float(x), 3) for x in (e.value, e.low, e.high)]
            ess, truth = round(report.weights.sizes[-1], 1), round(cartpole_value(gain), 3)
            row = [seed, n, f"gain {gain:g}", distance(gain), name, *numbers, not e.doubt]
            yield [*row, ess, ope.verdict(report)[1], round(log.returns.mean(), 3), truth]


@cache
def distance(gain):
    """In 1,000 episodes."""
    data, policies = ope.example(CARTPOLE, gains=(5.0, 5.0, gain))
    logged, judged = (pi.pi(data.transitions.obs).probs[:, 1].numpy() for pi in policies)
    return round(float(np.abs(logged - judged).mean()), 3)


def main():
    ope.use_cpu_well()
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(int(row[1]), int(row[0])) for row in rows}
    todo = [(n, seed) for seed in SEEDS for n in SIZES if (n, seed) not in done]
    for left, (n, seed) in zip(range(len(todo) - 1, -1, -1), todo, strict=True):
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            rows += list(judge(n, seed))
        with open(CSV, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        seconds = time.perf_counter() - began
        print(f"{n} episodes, seed {seed}: {seconds:.0f} s; {left} logs to go", flush=True)


if __name__ == "__main__":
    main()
