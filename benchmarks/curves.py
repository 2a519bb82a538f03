"""What the critic believes and what the policy earns, over training, of naive Q-learning, CQL and
IQL on narrow data (cartpole/expert, no action noise): the data of the README's first picture.

  python benchmarks/curves.py                     what benchmarks/data/curves.csv lacks
"""

import contextlib
import csv
import importlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks/data/curves.csv"
COLUMNS = ["method", "seed", "update", "return_mean", "q_policy"]
METHODS = {  # name: file, flags
    "naive Q-learning": ("cql", {"alpha": 0.0}),
    "CQL": ("cql", {}),
    "IQL": ("iql", {"steps": 4_000, "reward_scale": 1.0}),
}
SEEDS = (100, 101, 102)


def run(method, seed):
    """Rows of one training run, evaluated every 100 updates over 10 episodes."""
    name, flags = METHODS[method]
    module = importlib.import_module(name)
    often = {"log_every": 100, "eval_every": 100, "eval_episodes": 100}
    flags = {"dataset_id": ("cartpole/expert-v0",), "seed": seed, **often, **flags}
    folder = f"runs/curves/{name}-{seed}-{flags.get('alpha', 1)}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main(module.Args(out_dir=folder, **flags))
    metrics = max(Path(folder).glob("*/metrics.csv"), key=os.path.getmtime)
    with open(metrics) as file:
        for row in csv.DictReader(file):
            yield [method, seed, row["step"], row["return_mean"], row["q_policy"]]


def main():
    sys.path.insert(0, str(ROOT))
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(row[0], int(row[1])) for row in rows}
    for method, seed in ((m, s) for s in SEEDS for m in METHODS if (m, s) not in done):
        print(f"{method}, seed {seed}", flush=True)
        rows += run(method, seed)
        with open(CSV, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
