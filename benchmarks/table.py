"""Trains one file on several datasets and seeds and prints a table of the final returns.

    python benchmarks/table.py cql --datasets pendulum/mixed-v0 cartpole/mixed-v0 --seeds 0 1 2 3 4
    python benchmarks/table.py cql --datasets cartpole/expert-v0 --vary alpha 0 1 10

Each cell is the mean of the final evaluation (100 episodes on fixed seeds, deterministic policy,
last weights) over the seeds, with the standard deviation over the seeds. What follows `--` goes to
the file as it is. Every run has one thread; the runs' folders are kept in --out-dir."""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))


def run(job):
    algorithm, flags = job
    torch.set_num_threads(1)
    module = importlib.import_module(algorithm)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return module.main(tyro.cli(module.Args, args=flags))
        except module.UserError as error:
            numbers = dict.fromkeys(("return_mean", "data_return_mean", "seconds"), np.nan)
            return numbers | {"health": str(error)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("algorithm")
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--vary", nargs="+", default=[], help="a flag's name and its values")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out-dir", default="runs/benchmark")
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(own.split())
    name, values = (args.vary or [""])[0], args.vary[1:] or [""]
    cells = list(product(args.datasets, values))
    jobs = [
        [f"--dataset-id={dataset}", f"--seed={seed}", f"--out-dir={args.out_dir}", "--eval-every=0"]
        + ([f"--{name}={value}"] if name else [])
        + rest.split()
        for (dataset, value), seed in product(cells, args.seeds)
    ]
    for job in jobs:  # a wrong flag stops here: in a worker it would hang the pool
        tyro.cli(importlib.import_module(args.algorithm).Args, args=job)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        results = pool.map(run, [(args.algorithm, job) for job in jobs], chunksize=1)
        pool.close()
        pool.join()
    table, means = {}, {}
    for i, cell in enumerate(cells):
        rows = results[i * len(args.seeds) : (i + 1) * len(args.seeds)]
        returns = np.array([row["return_mean"] for row in rows], float)
        table[cell] = f"{returns.mean():.0f}"
        if len(returns) > 1:
            table[cell] += f" ± {returns.std(ddof=1):.0f}"
        for seed, value, row in zip(args.seeds, returns, rows, strict=True):
            flag = f"{name}={cell[1]} " if name else ""
            line = f"{cell[0]} {flag}seed={seed}: return {value:.1f}, {row['seconds']:.0f} s. "
            print(line + row["health"])
        means[cell[0]] = f"{row['data_return_mean']:.0f}"
    header = ["data", "its return", *(f"{name} {value}".strip() or "return" for value in values)]
    print("\n| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for dataset in args.datasets:
        cells = [dataset, means[dataset], *(table[dataset, v] for v in values)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
