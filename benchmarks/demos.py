"""The data of the page with the demonstrations, and the page itself, docs/index.html.

  python benchmarks/demos.py              runs what benchmarks/data/ lacks, then builds the page
  python benchmarks/page.py               builds the page alone, from the CSVs

Runs of the files themselves, with small networks and few updates: half an hour on one core. It can
be stopped at any time, finished runs are kept. It makes shift.csv, nearby.csv, conservatism.csv and
quality.csv; online.py and ope_estimates.py make the data of the other two demonstrations.
"""

import contextlib
import csv
import functools
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import page
import torch
from page import ALPHAS, BROAD, NARROW

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks/data"
sys.path.insert(0, str(ROOT))
SMALL = {"batch_size": 128, "hidden": (64, 64)}

# Data quality: CartPole, the controller's noise, every method, learning curves.
NOISES = [round(0.1 * i, 1) for i in range(11)]
RAW = {"normalize_obs": False}  # as the numbers here were made; the default of cql.py is True
METHODS = {  # name: file, flags
    "BC": ("bc", {}),
    "%BC": ("bc", {"top_fraction": 0.1}),
    "CQL": ("cql", RAW),
    "IQL": ("iql", {}),
    "AWAC": ("awac", {}),
}
SEEDS = (100, 101, 102)
OFTEN = {"log_every": 250, "eval_every": 250, "eval_episodes": 50}  # 5 episodes along the way

# Distribution shift and conservatism: Pendulum, one number is the action, so that Q is a curve.
FAST = {**SMALL, "samples": 1, "polyak": 0.05, "critic_lr": 3e-3, "actor_lr": 1e-3, "steps": 2500}
SNAPSHOT = 250  # updates between two pictures of Q
STATES = {  # name: angle from the upright in radians, its speed; nearby data are shown
    "upright, at rest": (0.0, 0.0),
    "upright, falling": (0.3, 1.0),
    "half-way up, rising": (1.5, -5.0),
    "hanging, at rest": (3.1, 0.0),
}
TORQUES = np.linspace(-2, 2, 41, dtype=np.float32)
SHOWN = {0: "naive Q-learning", 3: "CQL"}  # alphas whose training the page shows
NEAR = 25  # data points around a state


def module(name):
    """One of the files, which makes each built-in dataset only once here."""
    file = importlib.import_module(name)
    if not hasattr(file.builtin_dataset, "cache_info"):
        file.builtin_dataset = functools.lru_cache(2)(file.builtin_dataset)
    return file


def quality(noise, method, seed):
    """Rows of one run's learning curve."""
    name, flags = METHODS[method]
    file, dataset = module(name), f"cartpole/{({0: 'expert', 1: 'random'}).get(noise, noise)}-v0"
    with tempfile.TemporaryDirectory() as folder:
        flags = {"dataset_id": (dataset,), "seed": seed, "steps": 1000, **SMALL, **OFTEN, **flags}
        result = file.main(file.Args(out_dir=folder, **flags))
        with next(Path(folder).glob("*/metrics.csv")).open() as metrics:
            for row in csv.DictReader(metrics):
                returns = float(row["return_mean"]), result["data_return_mean"]
                yield [noise, method, seed, row["step"], *(round(x, 1) for x in returns)]


def critic(dataset, alpha, seed, every):
    """One training run of cql.py, and what it believes after every so many updates. -> rows of
    update, state, action, q, policy_action, gap, q_policy, true_value, return_mean."""
    cql = module("cql")
    args = cql.Args(dataset_id=(dataset,), alpha=float(alpha), seed=seed, **FAST, **RAW)
    args, _ = cql.start(args)
    data = cql.Dataset(args.dataset_id)
    agent = cql.Agent(data.units, args)
    policy = cql.Policy(agent, data.units)
    make_env, some = cql.find_env(data, None), data.batch(slice(None, None, 50))
    first = np.flatnonzero(np.diff(data.episode, prepend=-1))[:10]  # of 10 episodes
    begins = data.transitions.obs[first].numpy()
    states = np.array([[np.cos(x), np.sin(x), speed] for x, speed in STATES.values()], np.float32)

    def q_of(obs, actions):
        """Q (..., N) of obs (N, 3) and torques (..., N)."""
        actions = torch.as_tensor(actions / 2)[..., None]
        obs = torch.as_tensor(obs).expand(*actions.shape[:-1], 3)
        return agent.critic(obs, actions).min(0).values

    for update in range(1, args.steps + 1):
        agent.update(data.sample(args.batch_size))
        if update % every:
            continue
        with torch.no_grad(), torch.random.fork_rng():
            q = q_of(states, TORQUES[:, None].repeat(len(states), 1))  # (torques, states)
            off = q_of(some.obs, TORQUES[:, None].repeat(len(some.obs), 1))
            gap = (
                off.logsumexp(0) + np.log(2 / len(TORQUES)) - q_of(some.obs, some.action[:, 0] * 2)
            )
            q_policy = q_of(begins, policy.act(begins)[:, 0]).mean()
            true_value = play(policy, begins, args.gamma).mean()
            return_mean = cql.evaluate(policy, make_env, 10).mean()
        numbers = [round(float(x), 2) for x in (gap.mean(), q_policy, true_value, return_mean)]
        for i, (state, chosen) in enumerate(zip(STATES, policy.act(states)[:, 0], strict=True)):
            for torque, value in zip(TORQUES, q[:, i].tolist(), strict=True):
                row = [update, state, round(float(torque), 1), round(value, 2)]
                yield [*row, round(float(chosen), 3), *numbers]


def play(policy, obs, gamma, steps=300):
    """Discounted sums of rewards (N,) of a policy that plays on from obs (N, 3), without limit."""
    envs, total, obs = (
        [gym.make("Pendulum-v1", max_episode_steps=10**6) for _ in obs],
        0,
        obs.copy(),
    )
    for env, (cos, sin, speed) in zip(envs, obs, strict=True):
        env.reset()
        env.unwrapped.state = np.array([np.arctan2(sin, cos), speed])
    for t in range(steps):
        moves = [env.step(a) for env, a in zip(envs, policy.act(obs), strict=True)]
        obs = np.stack([move[0] for move in moves])
        total = total + gamma**t * np.array([move[1] for move in moves])
    return total


def nearby(dataset):
    """The data's torques next to each of STATES: the NEAR nearest observations."""
    file = module("cql")
    data = file.Dataset((dataset,))
    for state, (angle, speed) in STATES.items():
        wanted = torch.tensor([np.cos(angle), np.sin(angle), speed]) * torch.tensor([1, 1, 0.2])
        obs = data.transitions.obs * torch.tensor([1, 1, 0.2])
        for i in (obs - wanted).norm(dim=1).argsort()[:NEAR].tolist():
            yield [dataset, state, round(2 * data.transitions.action[i, 0].item(), 3)]


COLUMNS = {
    "quality": "noise method seed update return_mean data_return_mean",
    "shift": "method seed update state action q policy_action gap q_policy true_value return_mean",
    "conservatism": "data alpha seed state action q policy_action gap q_policy true_value "
    "return_mean",
    "nearby": "data state action",
}


def read(name):
    path = DATA / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(name, rows):
    """Adds the rows of a whole run, so that a run is in the file or is not."""
    DATA.mkdir(exist_ok=True)
    path, lines = DATA / f"{name}.csv", io.StringIO()
    write = csv.writer(lines, lineterminator="\n")
    if not path.exists():
        write.writerow(COLUMNS[name].split())
    write.writerows(rows)
    with path.open("a") as file:
        file.write(lines.getvalue())


def run_critic(dataset, alpha, seed):
    shown = dataset == NARROW and alpha in SHOWN
    rows = list(critic(dataset, alpha, seed, SNAPSHOT if shown else FAST["steps"]))
    if shown:
        append("shift", [[SHOWN[alpha], seed, *row] for row in rows])
    last = [row for row in rows if row[0] == FAST["steps"]]
    append("conservatism", [[dataset, alpha, seed, *row[1:]] for row in last])


def collect():
    """Runs what is missing, with the time that is left."""
    if not read("nearby"):
        append("nearby", [row for dataset in (NARROW, BROAD) for row in nearby(dataset)])
    done = {(x["data"], float(x["alpha"]), int(x["seed"])) for x in read("conservatism")}
    jobs = [(run_critic, (d, a, SEEDS[0])) for d in (NARROW, BROAD) for a in ALPHAS]
    jobs = [job for job in jobs if job[1] not in done]
    done = {(float(x["noise"]), x["method"], int(x["seed"])) for x in read("quality")}
    for job in ((noise, method, seed) for seed in SEEDS for noise in NOISES for method in METHODS):
        if job not in done:
            jobs.append((lambda *job: append("quality", quality(*job)), job))
    began = time.perf_counter()
    for count, (run, job) in enumerate(jobs, 1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(*job)
        left = (time.perf_counter() - began) / count * (len(jobs) - count) / 60
        print(f"{count}/{len(jobs)}, {left:.0f} min left: {', '.join(map(str, job))}", flush=True)


if __name__ == "__main__":
    collect()
    page.write()
