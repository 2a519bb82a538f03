"""Choosing among 20 trained policies without the environment: all are trained on one part of a
dataset, ope.py judges them by the rest, and the best estimate is picked. How good is it, against
the best of them, the average, and what k episodes of each in the environment would have picked?

  python benchmarks/policy_selection.py        what benchmarks/data/selection.csv lacks, the table

A policy's true return is its mean over 200 episodes; k of those stand for a shorter evaluation.
Policies are deterministic. No logged episode follows one for long: WDR has nothing to say.
"""

import contextlib
import csv
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import ope

CSV, RUNS = Path(__file__).parent / "data/selection.csv", Path("runs/selection")
DATASET, SEEDS = "cartpole/0.7-v0", (100, 101)
RAW = {"normalize_obs": False}  # as the numbers here were made; the default of cql.py is True
POLICIES = {  # name: file, flags
    "BC": ("bc", {}),
    "%BC": ("bc", {"top_fraction": 0.1}),
    "naive Q-learning": ("cql", {"alpha": 0.0, **RAW}),
    "CQL": ("cql", RAW),
    "CQL, alpha 10": ("cql", {"alpha": 10.0, **RAW}),
    "IQL": ("iql", {}),
    "IQL, expectile 0.5": ("iql", {"expectile": 0.5}),
    "IQL, beta 1": ("iql", {"beta": 1.0}),
    "AWAC": ("awac", {}),
    "BCQ": ("bcq", {}),
}
FLAGS = {"steps": 1_000, "batch_size": 64, "hidden": (64, 64), "eval_every": 0}
COLUMNS = ["policy", "seed", "return_mean", "FQE", "model", "verdict", "returns"]


def train(name, seed):
    """The folder of the run; one that is complete is not made again."""
    file, flags = POLICIES[name]
    out_dir = RUNS / f"{name.replace(' ', '-')}-{seed}"
    if not (done := list(out_dir.glob("*/result.json"))):
        module = importlib.import_module(file)
        flags = {**FLAGS, "dataset_id": (f"{DATASET}[:80%]",), "seed": seed, **flags}
        module.main(module.Args(eval_episodes=200, out_dir=str(out_dir), **flags))
        done = list(out_dir.glob("*/result.json"))
    return done[0].parent


def judge(folder, log, args):
    """A row's numbers from ope.py, which does not look at the environment."""
    policy, its, _ = ope.load_run(folder, args.device)
    seen = ope.overlap(its.dataset_id, args.dataset_id)
    report = ope.evaluate_policy(ope.run_policy(str(folder), policy, args, seen=seen), log, args)
    fqe, model = (round(report.estimates[x].value, 2) for x in ("FQE", "model"))
    return [fqe, model, ope.verdict(report)[1]]


def main():
    args = ope.Args(dataset_id=(f"{DATASET}[80%:]",), policy_mode="deterministic")
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(row[0], int(row[1])) for row in rows}
    todo = [(name, seed) for seed in SEEDS for name in POLICIES if (name, seed) not in done]
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ope.use_cpu_well()
        torch.manual_seed(args.seed)
        log = todo and ope.Log(ope.Dataset(args.dataset_id, device=args.device), args)
    for count, (name, seed) in enumerate(todo, 1):
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            folder = train(name, seed)
            its = judge(folder, log, args)
        result = json.loads((folder / "result.json").read_text())
        rows.append([name, seed, round(result["return_mean"], 2), *its])
        rows[-1].append(" ".join(f"{x:.0f}" for x in result["returns"]))
        with open(CSV, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        print(f"{count}/{len(todo)}: {name}, seed {seed}: {result['return_mean']:.0f}", flush=True)
    print_table(rows)


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


def print_table(rows):
    rng, table = np.random.default_rng(0), [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    returns = np.array([[float(x) for x in row["returns"].split()] for row in table])
    truth = returns.mean(1)
    fqe = [float(row["FQE"]) for row in table]
    print(f"FQE: Spearman {spearman(truth, fqe):.2f}, regret@1 {regret(truth, fqe):.2f}, regret@3 "
          f"{regret(truth, fqe, 3):.2f}")  # fmt: skip
    picks = {"the best": truth.max(), "the average": truth.mean(), "the worst": truth.min()}
    picks["the highest FQE"] = truth[np.argmax(fqe)]
    picks["one of the three highest FQE, by the environment"] = truth[np.argsort(fqe)[-3:]].max()
    for k in (1, 5, 20):
        columns = [rng.choice(returns.shape[1], k, replace=False) for _ in range(2_000)]
        means = [returns[:, its].mean(1) + 1e-6 * rng.random(len(truth)) for its in columns]  # ties
        chosen = truth[np.argmax(means, 1)]
        picks[f"{k} episode{'s' * (k > 1)} of each, mean of 2,000 tries"] = np.mean(chosen)
    print("| picked by | return |\n|---|---|")
    for name, value in picks.items():
        print(f"| {name} | {value:.0f} |")


if __name__ == "__main__":
    main()
