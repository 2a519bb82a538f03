"""Online against offline on CartPole, 8,000 gradient updates each: an online learner, DQN of
stable-baselines3, that makes a step of its own with each of them; IQL, which only sees a dataset of
20,000 steps; and IQL that goes on online after half of them. Networks 64 x 64, batches of 64.

  pip install stable-baselines3
  python benchmarks/online.py         what benchmarks/data/online.csv lacks: 20 minutes on one core

Returns are means over 10 episodes on the same seeds for all, IQL's last ones over 100.
"""

import contextlib
import csv
import io
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym

sys.path.insert(0, str(Path(__file__).parent.parent))
import iql

CSV = Path(__file__).parent / "data/online.csv"
COLUMNS = ["learner", "dataset", "seed", "step", "return_mean"]
STEPS, EVERY, SEEDS = 8_000, 500, (100, 101, 102)
DATASETS = ("random", "medium", "mixed", "expert")


def online(seed):
    from stable_baselines3 import DQN

    model = DQN(
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=1e-3,
        batch_size=64,
        learning_starts=500,
        train_freq=1,
        target_update_interval=250,
        exploration_fraction=0.3,
        exploration_final_eps=0.02,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    )
    policy = SimpleNamespace(act=lambda obs: model.predict(obs, deterministic=True)[0])
    for step in range(EVERY, STEPS + 1, EVERY):
        model.learn(EVERY, reset_num_timesteps=step == EVERY)
        returns = iql.evaluate(policy, partial(gym.make, "CartPole-v1"), 10)
        yield step, returns.mean()


def offline(dataset, seed, online_steps=0):
    folder = f"runs/online/{dataset}-{seed}-{online_steps}"
    args = iql.Args(
        dataset_id=(f"cartpole/{dataset}-v0",),
        seed=seed,
        steps=STEPS - online_steps,
        online_steps=online_steps,
        hidden=(64, 64),
        batch_size=64,
        log_every=EVERY,
        eval_every=EVERY,
        out_dir=folder,
    )
    iql.main(args)
    metrics = max(Path(folder).glob("*/metrics.csv"), key=os.path.getmtime)
    with open(metrics) as file:
        for row in csv.DictReader(file):
            if row["return_mean"]:  # online rows wait for the end of an episode
                yield int(row["step"]) // EVERY * EVERY, float(row["return_mean"])


def main():
    learners = {("online", "none"): online}
    for name in DATASETS:
        learners["offline", name] = partial(offline, name)
        learners["offline, then online", name] = partial(offline, name, online_steps=STEPS // 2)
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(row[0], row[1], int(row[2])) for row in rows}
    todo = [(*key, seed) for seed in SEEDS for key in learners if (*key, seed) not in done]
    began = time.perf_counter()
    for count, (learner, dataset, seed) in enumerate(todo, 1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            points = list(learners[learner, dataset](seed=seed))
        rows += [[learner, dataset, seed, step, round(x, 1)] for step, x in points]
        with open(CSV, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        left = (time.perf_counter() - began) / count * (len(todo) - count) / 60
        what = f"{learner}, data {dataset}, seed {seed}"
        print(f"{count}/{len(todo)}, {left:.0f} min left: {what}: {points[-1][1]:.0f}", flush=True)


if __name__ == "__main__":
    iql.use_cpu_well()
    main()
