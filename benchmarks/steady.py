"""Does it matter where a run stops? Default runs, evaluated every 200 updates over 20 episodes: the
share of the evaluations in their second half at the goal, -190 on Pendulum, 475 on CartPole.

  python benchmarks/steady.py             what benchmarks/data/steady.csv lacks, then the table
"""

import contextlib
import csv
import importlib
import io
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks/data/steady.csv"
COLUMNS = ["method", "dataset", "seed", "update", "return_mean"]
GOALS = {"pendulum/mixed-v0": -190, "cartpole/mixed-v0": 475}
METHODS, SEEDS = ("cql", "iql", "awac", "bcq", "mopo"), range(110, 115)


def run(method, dataset, seed):
    """The evaluations of one run, but for the final one of more episodes."""
    module = importlib.import_module(method)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            quiet.enter_context(redirect(io.StringIO()))
        often = {"log_every": 200, "eval_every": 200, "eval_episodes": 200, "out_dir": folder}
        module.main(module.Args(dataset_id=(dataset,), seed=seed, **often))
        with open(next(Path(folder).glob("*/metrics.csv"))) as file:
            rows = [x for x in csv.DictReader(file) if x["return_mean"]]
    return [
        [method, dataset, seed, x["step"], round(float(x["return_mean"]), 1)] for x in rows[:-1]
    ]


def main():
    sys.path.insert(0, str(ROOT))
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(method, dataset, int(seed)) for method, dataset, seed, *_ in rows}
    for seed in SEEDS:
        for job in ((method, dataset, seed) for dataset in GOALS for method in METHODS):
            if job in done or job[:2] == ("mopo", "cartpole/mixed-v0"):
                continue
            print(*job, flush=True)
            rows += run(*job)
            with open(CSV, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print_table(rows)


def print_table(rows):
    runs = defaultdict(list)
    for method, dataset, seed, _, value in rows:
        runs[dataset, method, seed].append(float(value))
    cells = defaultdict(list)
    for (dataset, method, _), returns in runs.items():
        cells[dataset, method] += returns[len(returns) // 2 :]
    print("| data | method | at the goal | worst evaluation |\n|---|---|---|---|")
    for (dataset, method), x in cells.items():
        share = (np.array(x) >= GOALS[dataset]).mean()
        print(f"| `{dataset}` | {method} | {share:.0%} of {len(x)} | {min(x):.0f} |")


if __name__ == "__main__":
    main()
