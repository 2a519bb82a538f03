"""Stitching: the way to the goal is in the data only as halves of two kinds of episodes, which
cross in the door between two rooms. 60% of them lead from the start to a dead end, the others from
elsewhere to the goal, which alone has a reward. Who joins the halves?

  python benchmarks/stitching.py                  writes benchmarks/data/stitching.csv in a minute

Its rows are the cells of paths: 20 of each kind in the data, and one of each method's policy.
"""

import contextlib
import csv
import importlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks/data/stitching.csv"
WIDTH, HEIGHT = 7, 5
START, GOAL, DEAD_END, ELSEWHERE = (0, 0), (6, 0), (6, 4), (0, 4)
DOOR = [(2, 2), (4, 2)]  # both sides of the only gap in the wall, which is column 3
MOVES = [(1, 0), (0, 1), (-1, 0), (0, -1)]
RAW = {"normalize_obs": False}  # as the numbers here were made; the default of cql.py is True
METHODS = {  # file, flags
    "BC": ("bc", {}),
    "%BC": ("bc", {"top_fraction": 0.4}),
    "IQL": ("iql", {"reward_scale": 1.0}),
    "CQL": ("cql", RAW),
}
COMMON = {"seed": 100, "steps": 1_500, "gamma": 0.95, "eval_episodes": 0, "hidden": (64, 64)}


def walk(rng, *corners):
    """Cells from corner to corner, each time the shortest way, in a random order of moves."""
    path = [corners[0]]
    for x, y in corners[1:]:
        (x0, y0) = path[-1]
        moves = abs(x - x0) * [(np.sign(x - x0), 0)] + abs(y - y0) * [(0, np.sign(y - y0))]
        for dx, dy in rng.permutation(moves):
            path.append((int(path[-1][0] + dx), int(path[-1][1] + dy)))
    return path


def episode(path):
    moves = np.diff(path, axis=0).tolist()
    last = np.arange(len(moves)) == len(moves) - 1
    return EpisodeBuffer(
        observations=np.array([y * WIDTH + x for x, y in path]),
        actions=np.array([MOVES.index(tuple(move)) for move in moves]),
        rewards=last * float(path[-1] == GOAL),
        terminations=last,
        truncations=np.zeros_like(last),
    )


def train(method, dataset, folder):
    """A trained policy, by the file's own main."""
    name, flags = METHODS[method]
    module = importlib.import_module(name)
    flags = {"dataset_id": (dataset,), "out_dir": f"{folder}/{method}", **COMMON, **flags}
    names = module.Args.__dataclass_fields__
    args = module.Args(
        **{key: value for key, value in flags.items() if key in names}
    )  # BC: no gamma
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main(args)
    return module.load_policy(next(Path(folder, method).iterdir()))


def follow(policy):
    """The path of a policy from the start; it ends where the data's do, or after 40 steps."""
    path = [START]
    while path[-1] not in (GOAL, DEAD_END) and len(path) <= 40:
        x, y = path[-1]
        dx, dy = MOVES[policy.act(np.eye(WIDTH * HEIGHT)[[y * WIDTH + x]])[0]]
        to = min(max(x + dx, 0), WIDTH - 1), min(max(y + dy, 0), HEIGHT - 1)
        path.append((x, y) if to[0] == 3 and to[1] != 2 else to)
    return path


def main():
    sys.path.insert(0, str(ROOT))
    rng, dataset = np.random.default_rng(0), "grid/crossing-v0"
    to_dead_end = [walk(rng, START, *DOOR, DEAD_END) for _ in range(120)]
    to_goal = [walk(rng, ELSEWHERE, *DOOR, GOAL) for _ in range(80)]
    paths = {"data, to the dead end": to_dead_end[:20], "data, to the goal": to_goal[:20]}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*env")
            minari.create_dataset_from_buffers(
                dataset,
                [episode(path) for path in to_dead_end + to_goal],
                observation_space=spaces.Discrete(WIDTH * HEIGHT),
                action_space=spaces.Discrete(len(MOVES)),
                algorithm_name="random walks",
                author="benchmarks/stitching.py",
                author_email="none",
                code_permalink="none",
                description="crossing paths",
            )
        for method in METHODS:
            paths[method] = [follow(train(method, dataset, folder))]
            print(f"{method}: {len(paths[method][0]) - 1} steps, to {paths[method][0][-1]}")
    with open(CSV, "w", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write(["who", "path", "step", "x", "y"])
        for who, its in paths.items():
            for number, path in enumerate(its):
                for step, (x, y) in enumerate(path):
                    write([who, number, step, x, y])


if __name__ == "__main__":
    main()
