"""Updates per second of every method on random data, beside the floor and beside other projects.

  python benchmarks/throughput.py                        eager, a table in a few minutes
  python benchmarks/throughput.py --compile              and with the update as one graph
  python benchmarks/throughput.py --methods iql --hidden 128 128 --rounds 5

All variants of a method take turns within a round, and a ratio is the median over the rounds, so
that a neighbour on the machine does not decide it. Rates are updates per second of CPU time (on a
GPU of time): on a busy machine wall time says little. The floor is the time of the matrix products
that the update cannot do without, alone; "the rest" is what the profiler finds beside the products
of the eager update. If d3rlpy is installed (pip install d3rlpy) it takes its turns too.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).parent.parent))
OBS, ACTIONS, SIZE = 11, 3, 100_000
# JAX projects, measured separately: Zen 5 with AVX-512, one thread, the default sizes of Args here.
JAX = {
    "bc": ("unifloral, December 2025", 1550),
    "iql": ("unifloral, December 2025", 310),
    "awac": ("JAX-CORL, June 2026", 262),
    "cql": ("JAX-CORL, June 2026", 20),
}
D3RLPY = {"bc": "BC", "iql": "IQL", "awac": "AWAC", "cql": "CQL"}
FLAGS = {"cql": {"samples": 10}}  # as the other projects have it


@dataclass
class Args:
    methods: tuple[str, ...] = ("bc", "iql", "awac", "cql")
    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    compile: bool = False  # one more variant; takes a minute or two per method
    rounds: int = 9
    seconds: float = 1.0  # per turn
    device: str = "cpu"


def make_update(name, args, compiled=False):
    """A function that draws a batch and does one update of the method in name.py."""
    module = importlib.import_module(name)
    units = module.Units(
        spaces.Box(-np.inf, np.inf, (OBS,)), spaces.Box(-1, 1, (ACTIONS,), np.float32)
    )
    module.use_cpu_well()
    torch.manual_seed(0)
    flags = {"hidden": args.hidden, "device": args.device, **FLAGS.get(name, {})}
    agent = module.Agent(units, module.Args(**flags)).to(args.device)
    if compiled:
        agent.update = module.compiled(agent.update, args.device)
    columns = torch.randn(SIZE, OBS), torch.rand(SIZE, ACTIONS) * 1.8 - 0.9, torch.randn(SIZE)
    columns = *columns, torch.randn(SIZE, OBS), (torch.rand(SIZE) < 0.01).float()
    columns = [x.to(args.device) for x in columns]

    def update():
        index = torch.randint(SIZE, (args.batch_size,), device=args.device)
        return agent.update(module.Batch(*(x.index_select(0, index) for x in columns)))

    return update


def forward(rows, *sizes):
    """The products (n, k, m), of (n, k) with (k, m), of a network's outputs."""
    return [(rows, i, o) for i, o in pairwise(sizes)]


def backward(rows, *sizes):
    """Of the gradients of its layers' outputs, the first layer's excepted."""
    return [(rows, o, i) for i, o in pairwise(sizes[1:])]


def training(rows, *sizes):
    """Of a forward and a backward pass, the gradients of the weights included."""
    weights = [(i, rows, o) for i, o in pairwise(sizes)]
    return forward(rows, *sizes) + backward(rows, *sizes) + weights


def unavoidable(name, args):
    """The matrix products of one update, Box actions."""
    n, k = args.batch_size, FLAGS["cql"]["samples"]
    actor, value = (OBS, *args.hidden, ACTIONS), (OBS, *args.hidden, 1)
    critic, wide_actor = (OBS + ACTIONS, *args.hidden, 1), (OBS, *args.hidden, 2 * ACTIONS)
    return {
        "bc": training(n, *actor),
        "iql": training(n, *actor)
        + training(n, *value)
        + 2 * forward(n, *value)  # the new V at s, and at s'
        + 2 * (forward(n, *critic) + training(n, *critic)),
        "awac": training(n, *actor)
        + forward(n, *actor)
        + 2 * (2 * forward(n, *critic) + training(n, *critic)),
        "cql": training(n, *wide_actor)
        + forward(n, *wide_actor)
        + 2 * (training(n, *critic) + training(3 * k * n, *critic))
        # Q of the policy's action with its gradient, which passes the first layer, and the target
        + 2 * (forward(n, *critic) + backward(n, *critic) + [(n, args.hidden[0], ACTIONS)])
        + 2 * forward(n, *critic),
    }[name]


def make_floor(name, args):
    pairs = [
        (torch.randn(n, k, device=args.device), torch.randn(k, m, device=args.device))
        for n, k, m in unavoidable(name, args)
    ]
    return lambda: [torch.mm(*pair) for pair in pairs]


def make_d3rlpy(name, args):
    import d3rlpy

    ends = np.zeros(SIZE, np.float32)
    ends[99::100] = 1
    obs, action = np.random.randn(SIZE, OBS), np.random.uniform(-0.9, 0.9, (SIZE, ACTIONS))
    data = d3rlpy.dataset.MDPDataset(
        obs.astype(np.float32), action.astype(np.float32), np.random.randn(SIZE, 1), ends
    )
    config = getattr(d3rlpy.algos, f"{D3RLPY[name]}Config")(batch_size=args.batch_size)
    algorithm = config.create(device=args.device if args.device == "cpu" else "cuda:0")
    algorithm.build_with_dataset(data)
    return lambda: algorithm.update(data.sample_transition_batch(args.batch_size))


def clock(device):
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def turn(f, seconds, device):
    """Seconds per call."""
    f()
    began, calls = clock(device), 0
    while clock(device) - began < seconds:
        for _ in range(1 if device == "cpu" else 50):  # the GPU must not wait for the clock
            f()
            calls += 1
    return (clock(device) - began) / calls


def breakdown(update):
    """Shares of the eager update under the profiler, which itself makes small operations slower."""
    groups = {"products": ("mm", "addmm", "bmm", "baddbmm"), "Adam": ("_fused_adam_",)}
    groups |= {"batch": ("index_select", "randint")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        for _ in range(100):
            update()
        total = (time.perf_counter() - began) * 1e6
    spent = {op.key.removeprefix("aten::"): op.self_cpu_time_total for op in profile.key_averages()}
    shares = {group: sum(spent.get(op, 0) for op in ops) for group, ops in groups.items()}
    products = shares.pop("products")
    rest = ", ".join(f"{group} {x / total:.0%}" for group, x in shares.items())
    other = 1 - (products + sum(shares.values())) / total
    return f"products {products / total:.0%}, {rest}, small operations and Python {other:.0%}"


def main(args):
    print("method     variant       updates/s  of the floor  quartiles")
    for name in args.methods:
        variants = {"floor": make_floor(name, args), "eager": make_update(name, args)}
        if args.compile:
            variants["compiled"] = make_update(name, args, compiled=True)
        if importlib.util.find_spec("d3rlpy"):
            variants["d3rlpy"] = make_d3rlpy(name, args)
        for f in variants.values():
            for _ in range(5):
                f()
        times = {variant: [] for variant in variants}
        for _ in range(args.rounds):
            for variant, f in variants.items():
                times[variant].append(turn(f, args.seconds, args.device))
        for variant, its_times in times.items():
            share = [a / b for a, b in zip(times["floor"], its_times, strict=True)]
            low, middle, high = statistics.quantiles(share, n=4)
            rate = 1 / statistics.median(its_times)
            print(f"{name:9}  {variant:12} {rate:10.1f}  {middle:12.2f}  {low:.2f} to {high:.2f}")
        project, rate = JAX[name]
        print(f"{name:9}  {project}: {rate} on another machine, see the source")
        if args.device == "cpu":
            print(f"{name:9}  eager: {breakdown(variants['eager'])}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
