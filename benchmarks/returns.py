"""Every method on every built-in dataset, ten training seeds: the README's table of results.

  python benchmarks/returns.py                           what benchmarks/returns.csv lacks
  python benchmarks/returns.py --table                   the table, from the CSV alone
  python benchmarks/returns.py --curves                  benchmarks/data/learning.csv, from the runs
  python benchmarks/returns.py --methods cql iql --datasets cartpole/mixed-v0 --seeds 100 101
  python benchmarks/returns.py --ray                     on a Ray cluster (pip install ray)
  python benchmarks/returns.py --minari                  the commands of the MuJoCo table
  python benchmarks/returns.py --minari --table          that table, with what others have published
  python benchmarks/returns.py --datasets hopper/replay-v0 --methods bc iql --seeds 100 101 102 \\
    --csv benchmarks/returns_hopper.csv                  data of collect_sac.py, 50,000 updates

One run is one row of the CSV: the return of the policy with the last weights, deterministic, over
100 episodes on the seeds 10,000 on. Runs that the CSV has are skipped, a run that was stopped goes
on from its last checkpoint, so that this script can be interrupted at any time. Under SLURM one job
does one method:

  sbatch --array=0-7 --wrap 'M=(bc %bc naive cql iql awac bcq mopo); \\
    python benchmarks/returns.py --methods ${M[$SLURM_ARRAY_TASK_ID]} --csv ${M[...]}.csv'
"""

import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ope  # noqa: E402

METHODS = {  # name: file, flags beside the defaults
    "bc": ("bc", ""),
    "%bc": ("bc", "--top-fraction 0.1"),
    "naive": ("cql", "--alpha 0"),
    "cql": ("cql", ""),
    "cql-bc": (
        "cql",
        "--bc-weight 1000 --actor-lr 1e-3 --samples 1 --batch-size 128 --steps 2000",
    ),
    "iql": ("iql", ""),
    "awac": ("awac", ""),
    "bcq": ("bcq", ""),
    "bcq-narrow": ("bcq", "--phi 0"),
    "bcq-0.05": ("bcq", "--phi 0.05"),
    "mopo": ("mopo", ""),
}
HOPPER = "--hidden 256 256 --normalize-obs --log-every 1000 --eval-every 5000"
HOPPER_FLAGS = {  # of a MuJoCo dataset in Minari's folder, see collect_sac.py: what a night allows
    "bc": "--lr 3e-4 --steps 50000",
    "%bc": "--top-fraction 0.1 --lr 3e-4 --steps 50000",
    "cql": "--alpha 5 --samples 4 --actor-lr 1e-4 --critic-lr 3e-4 --polyak 0.005 --steps 50000",
    "iql": "--reward-scale return-range --expectile 0.7 --beta 3 --lr 3e-4 --steps 50000",
    "awac": "--reward-scale 1 --lam 0.333 --lr 3e-4 --steps 50000",
    "bcq": "--vae-hidden 256 256 --batch-size 100 --polyak 0.005 --phi 0.05 --reward-scale 1 "
    "--steps 50000",
    "mopo": "--model-hidden 200 200 200 200 --actor-lr 3e-4 --critic-lr 3e-4 --polyak 0.005 "
    "--steps 100000",
}
ONLY = {
    "mopo": ("pendulum/", "hopper/"),
    "cql-bc": "pendulum/expert",
    "bcq-narrow": "pendulum/expert",
    "bcq-0.05": "pendulum/expert",
}
DATASETS = tuple(
    f"{env}/{quality}-v0"
    for env in ("pendulum", "cartpole")
    for quality in ("mixed", "medium", "random", "expert")
)
COLUMNS = (
    "method dataset seed return_mean return_std score data_return_mean steady steps seconds "
    "command date torch numpy cpu"
).split()  # cpu: the instructions that torch uses, which decide how the built-in data are rounded
HUB = [  # the MuJoCo table: dataset ids of each cell, and the flags of each method
    [f"mujoco/{env}/{quality}-v0" for quality in cell]
    for env in ("hopper", "halfcheetah", "walker2d")
    for cell in (["simple"], ["medium"], ["expert"], ["simple", "expert"])
]
HUB_RUNS = "runs/minari"
REFERENCES = {  # returns: random actions, mean of the expert data; what scores 0 and 100 in D4RL
    "hopper": (16.7, 3858, -20.3, 3234.3),
    "halfcheetah": (-290.3, 16243, -280.2, 12135),
    "walker2d": (1.4, 6848, 1.6, 4592.3),
}
HUB_FLAGS = {
    "bc": "--normalize-obs --hidden 256 256 --lr 3e-4",
    "%bc": "--top-fraction 0.1 --normalize-obs --hidden 256 256 --lr 3e-4",
    "cql": "--alpha 5 --samples 10 --hidden 256 256 256 --actor-lr 3e-5 --critic-lr 3e-4 "
    "--polyak 0.005",
    "iql": "--reward-scale return-range --expectile 0.7 --beta 3 --hidden 256 256 --lr 3e-4",
    "awac": "--normalize-obs --reward-scale 1 --lam 0.333 --hidden 256 256 256 --lr 3e-4",
    "bcq": "--hidden 256 256 --vae-hidden 256 256 --batch-size 100 --polyak 0.005 --phi 0.05 "
    "--reward-scale 1",
    "mopo": "--no-normalize-obs --hidden 256 256 --model-hidden 200 200 200 200 "
    "--rollout-starts 50000 --rollout-every 1000 --actor-lr 3e-4 --critic-lr 3e-4 --polyak 0.005",
}


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)  # names, see METHODS
    datasets: tuple[str, ...] = DATASETS  # dataset ids
    seeds: tuple[int, ...] = tuple(range(100, 110))  # no flag was tuned on them
    workers: int = os.cpu_count() or 1  # processes, each with one thread
    csv: str = str(Path(__file__).with_suffix(".csv"))  # one row a run
    runs: str = "runs/returns"  # where the runs' folders are made
    table: bool = False  # print the table and stop
    curves: bool = False  # gather the learning curves of all the runs' folders and stop
    minari: bool = False  # print the commands of the MuJoCo table, or with --table it, and stop
    ray: bool = False  # run on a Ray cluster in place of processes


def main(args: Args):
    if args.minari:
        return print("\n".join(hub_table() if args.table else hub_commands()))
    if args.curves:
        return save_curves(args.runs)
    rows = read(args.csv)
    if not args.table:
        known = {(row["method"], row["dataset"], int(row["seed"])) for row in rows}
        jobs = [
            (method, dataset, seed)
            for seed in args.seeds
            for dataset in args.datasets
            for method in args.methods
            if dataset.startswith(ONLY.get(method, ""))
        ]
        todo = [job for job in jobs if job not in known]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them are in {args.csv}")
        began = time.perf_counter()
        for count, row in enumerate((on_ray if args.ray else on_processes)(todo, args), 1):
            rows.append(row)
            write(args.csv, rows)
            left = (time.perf_counter() - began) / count * (len(todo) - count)
            what = f"{row['method']} on {row['dataset']}, seed {row['seed']}"
            print(f"{count}/{len(todo)}, {left / 60:.0f} min left: {what}: {row['return_mean']}")
    print(markdown(rows, args))


def run(method, dataset, seed, folder):
    """One training run -> its row. What an earlier, stopped process has left is gone on with."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    name, flags = METHODS[method]
    flags = (
        f"{flags} --eval-every 250" if dataset in DATASETS else f"{HOPPER_FLAGS[method]} {HOPPER}"
    )
    flags = f"--dataset-id {dataset} --seed {seed} {flags}"
    module = importlib.import_module(name)
    out_dir = f"{folder}/{method}__{dataset.replace('/', '-')}__s{seed}"
    new = tyro.cli(module.Args, args=[*flags.split(), "--out-dir", out_dir])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stopped = [x.parent for x in Path(out_dir).glob("*/checkpoint.pt")]
        stopped = [x for x in stopped if not (x / "result.json").exists()]
        result = module.main(module.Args(resume=str(stopped[0])) if stopped else new)
    metrics = max(Path(out_dir).glob("*/metrics.csv"), key=os.path.getmtime)
    return {
        "method": method,
        **{name: result[name] for name in COLUMNS[1:7]},
        "steady": steady(metrics, dataset),
        **{name: result[name] for name in ("steps", "seconds")},
        "command": f"python {name}.py {flags}",
        "date": str(date.today()),
        **{package: version(package) for package in ("torch", "numpy")},
        "cpu": module.torch.backends.cpu.get_cpu_capability(),
    }


def steady(metrics, dataset):
    """Share of the evaluations in the second half of the run that are not below the last one by
    more than a tenth of the distance between random actions and the expert."""
    with open(metrics) as file:
        returns = [float(x["return_mean"]) for x in csv.DictReader(file) if x["return_mean"]]
    scale = {"pendulum": 1084.0, "cartpole": 478.0, "hopper": 3208.0}[dataset.split("/")[0]]
    second_half = np.array(returns[len(returns) // 2 :])
    return round(float((second_half > returns[-1] - 0.1 * scale).mean()), 3)


def save_curves(runs):
    """Every 500th update of the complete runs among the folders, for figures.py; what the CSV has
    of other runs stays."""
    path, rows = ROOT / "benchmarks/data/learning.csv", {}
    for row in read(path):
        rows.setdefault((row["method"], row["dataset"], row["seed"]), []).append([*row.values()])
    for result in sorted(Path(runs).glob("*/*/result.json")):
        method, dataset, seed = result.parts[-3].split("__")
        key = method, dataset.replace("-", "/", 1), seed[1:]
        rows[key] = [
            [*key, row["step"], round(float(row["return_mean"]), 1)]
            for row in read(result.parent / "metrics.csv")
            if row["return_mean"] and int(row["step"]) % 500 == 0
        ]
    with open(path, "w", newline="") as file:
        header = ["method", "dataset", "seed", "update", "return_mean"]
        csv.writer(file, lineterminator="\n").writerows([header, *itertools.chain(*rows.values())])


def on_processes(jobs, args):
    with ProcessPoolExecutor(args.workers) as pool:
        for done in as_completed([pool.submit(run, *job, args.runs) for job in jobs]):
            yield done.result()


def on_ray(jobs, args):
    """A run whose worker is killed starts again elsewhere, from its last checkpoint if the folder
    of the runs is shared."""
    import ray

    ray.init(ignore_reinit_error=True)
    remote = ray.remote(num_cpus=1, max_retries=3)(run)
    waiting = [remote.remote(*job, str(Path(args.runs).absolute())) for job in jobs]
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        yield ray.get(done)


def read(path):
    if not Path(path).exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def write(path, rows):
    rows = sorted(rows, key=lambda row: (row["dataset"], row["method"], int(row["seed"])))
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def interquartile_mean(x):
    """Mean of the middle half of (..., n), a quarter of n cut at either end with its fraction."""
    x, n = np.sort(x, -1), np.shape(x)[-1]
    edges = np.clip(np.arange(n + 1), n / 4, 3 * n / 4)  # the part of each value inside the middle
    return x @ np.diff(edges) / (n / 2)


def interval(x):
    """95% bootstrap interval of the mean over seeds, for (n,): percentiles, which of ten seeds hold
    it in 90%, and so as much wider as Student's t is than the normal."""
    means = np.random.default_rng(0).choice(x, (9999, len(x))).mean(1)
    return ope.interval(x.mean(), means, len(x) - 1)[1:]


def markdown(rows, args):
    """Mean over seeds [its 95% interval, of fewer than five their range] (how many, if not ten or
    more); of five or more, where these differ, the interquartile mean, the worst, the share of
    steady evaluations."""
    cells, data = defaultdict(list), {}
    for row in rows:
        if row["method"] in args.methods and int(row["seed"]) in args.seeds:
            cells[row["method"], row["dataset"]].append(row)
            data[row["dataset"]] = float(row["data_return_mean"])
    lines = [f"| data | its return | {' | '.join(args.methods)} |"]
    lines.append("|---|---|" + "---|" * len(args.methods))
    for dataset in args.datasets:
        if dataset not in data:
            continue
        line = f"| `{dataset}` | {data[dataset]:.0f} |"
        for method in args.methods:
            returns = np.array([float(x["return_mean"]) for x in cells[method, dataset]])
            if not len(returns):
                line += " not run |" if dataset.startswith(ONLY.get(method, "")) else " - |"
                continue
            few = len(returns) < 5
            low, high = (returns.min(), returns.max()) if few else interval(returns)
            line += f" {returns.mean():.0f}"
            line += f" [{low:.0f}, {high:.0f}]" if len(returns) > 1 else ""
            line += f" ({len(returns)}) |" if len(returns) < 10 else " |"
        lines.append(line)
    lines += [
        "",
        "| data | method | seeds | interquartile mean | worst | steady |",
        "|---" * 6 + "|",
    ]
    for (method, dataset), cell in sorted(cells.items(), key=lambda x: x[0][::-1]):
        if len(cell) > 4:
            returns = np.array([float(x["return_mean"]) for x in cell])
            steady = np.mean([float(x["steady"]) for x in cell])
            middle, worst = interquartile_mean(returns), returns.min()
            if middle - worst > 6 or steady < 1:
                line = f"| `{dataset}` | {method} | {len(cell)} | {middle:.0f} |"
                lines.append(f"{line} {worst:.0f} | {steady:.0%} |")
    return "\n".join(lines)


def hub_commands():
    for ids in HUB:
        for method, flags in HUB_FLAGS.items():
            for seed in range(100, 105):
                yield (
                    f"python {METHODS[method][0]}.py --dataset-id {' '.join(ids)} --seed {seed} "
                    f"{flags} --steps 1000000 --log-every 5000 --eval-every 50000 "
                    f"--out-dir {HUB_RUNS}/{method}"
                )


def hub_table():
    """Lines: the published means and those of our complete runs (how many), which benchmarks/
    minari.csv gets, with their share of the expert data's return, in %, and D4RL's number, to which
    D4RL's own datasets are not comparable: others, of another version of the environments."""
    cells, rows = defaultdict(list), []
    for path in sorted(Path(HUB_RUNS).glob("*/*/result.json")):
        result, method = json.loads(path.read_text()), path.parts[-3]
        dataset, value = result["dataset"], result["return_mean"]
        random, expert, low, high = REFERENCES[dataset.split("/")[1]]
        share, d4rl = (value - random) / (expert - random), (value - low) / (high - low)
        row = [method, dataset, result["seed"], result["steps"], value, 100 * share, 100 * d4rl]
        rows.append(row)
        cells[dataset, method].append(value)
    if rows:
        with open(ROOT / "benchmarks/minari.csv", "w", newline="") as file:
            header = "method dataset seed steps return_mean share_of_expert d4rl_relative".split()
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    published = {row["dataset"]: row for row in read(ROOT / "benchmarks/minari_published.csv")}
    others = ("data", "flow-BC", "FQL", "GFP")
    yield f"| data | its return | {' | '.join([*others[1:], *HUB_FLAGS])} |"
    yield "|---" * (len(others) + len(HUB_FLAGS) + 1) + "|"
    for dataset in map("+".join, HUB):
        line = [published.get(dataset, {}).get(name, "-") for name in others]
        for method in HUB_FLAGS:
            x = cells[dataset, method]
            line.append(f"{np.mean(x):.0f} ({len(x)})" if x else "not run")
        yield f"| `{dataset}` | {' | '.join(line)} |"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
