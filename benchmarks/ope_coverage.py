"""How often do the 95% intervals of ope.py hold the truth, and is its verdict right? Repeated logs:

  cartpole n   the built-in example, 100 and 1000 episodes, T = 50, gamma 0.99: what a controller of
               gain 5 has logged is to judge gain 8, 12 (far) and 2.5 (worse)
  table        a random MDP of 5 states and 2 actions with noisy rewards, values known exactly; the
               policies deviate by 0.1 or 0.3 from fair coins: n = 100 and T = 10 for near, far; 5
               times as many for many; clear: those of far whose effective size is 10 or more
  ratios n     the logs of cartpole, for (1) to (4) alone, which need no networks: hundreds a minute
  unknown n    the logs of cartpole without log probabilities: pi_b is estimated
  pipeline     300 episodes of the logs of cartpole: IQL learns from the first 80% with few updates,
               ope.py judges it by the rest, with few updates, too; truth of 20,000 episodes

    python benchmarks/ope_coverage.py runs/coverage.csv cartpole-100 cartpole-1000 near far many

makes repetitions, seeds from 100 on, and adds their rows to the file until it is stopped; without
settings it prints the file's table: intervals that were printed as 95% ones and held, of how many.

    python benchmarks/ope_coverage.py runs/coverage.csv benchmarks/data/coverage.csv

writes those counts for figures.py: logs, intervals printed as 95% ones, those of them that held.
"""

import contextlib
import csv
import io
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

sys.path.insert(0, str(Path(__file__).parent.parent))
import iql
import ope

GAINS = (8.0, 12.0, 2.5)
CARTPOLE = ope.Args(horizon=50)
TABLE = ope.Args(gamma=0.95)
SETTINGS = {
    "cartpole-100": (CARTPOLE, lambda seed: cartpole(100, seed)),
    "cartpole-1000": (CARTPOLE, lambda seed: cartpole(1000, seed)),
    "unknown-100": (CARTPOLE, lambda seed: unknown(100, seed)),
    "unknown-1000": (CARTPOLE, lambda seed: unknown(1000, seed)),
    "near": (TABLE, lambda seed: table(100, 0.1, seed)),
    "far": (TABLE, lambda seed: table(100, 0.3, seed)),
    "many": (TABLE, lambda seed: table(500, 0.3, seed)),
    "clear": (TABLE, lambda seed: clear(seed)),
    "pipeline": (replace(CARTPOLE, steps=1000), lambda seed: pipeline(seed)),
    "ratios-100": (CARTPOLE, lambda seed: cartpole(100, seed)),
    "ratios-1000": (CARTPOLE, lambda seed: cartpole(1000, seed)),
}


def cartpole(n, seed):
    """Logs, the policies to judge, their values."""
    data, policies = ope.example(CARTPOLE, n, (5.0, *GAINS), seed)
    return data, policies, [cartpole_value(gain) for gain in GAINS]


def unknown(n, seed):
    data, policies, values = cartpole(n, seed)
    data.behavior_log_prob = data.behavior_log_prob * np.nan
    return data, policies, values


@cache
def cartpole_value(gain):
    """Of 400,000 episodes."""
    values = []
    for seed in range(4):
        data, _ = ope.example(CARTPOLE, 100_000, (gain,), 10**6 + seed)
        length = np.bincount(data.episode)  # every step earns 1
        values.append(((1 - 0.99**length) / 0.01).mean())
    return np.mean(values)


def table(n, distance, seed, S=5, A=2, T=10):
    rng = np.random.default_rng(0)
    P, r = rng.dirichlet(np.ones(S), (S, A)), rng.normal(size=(S, A))
    start, behavior = rng.dirichlet(np.ones(S)), np.full((S, A), 0.5)
    target = behavior + distance * np.sign(rng.normal(size=(S, 1))) * [1, -1]
    v = np.zeros(S)
    for _ in range(T):
        v = (target * (r + TABLE.gamma * P @ v)).sum(1)
    rng, rows = np.random.default_rng(seed), []
    state = rng.choice(S, n, p=start)
    for _ in range(T):
        action = (rng.random(n) > behavior[state, 0]).astype(int)
        reward = r[state, action] + rng.normal(size=n)
        after = (rng.random((n, 1)) > P[state, action].cumsum(1)[:, :-1]).sum(1)
        rows.append((np.eye(S)[state], action, reward, np.eye(S)[after]))
        state = after
    s, a, reward, after = (np.concatenate(np.stack(x, 1)) for x in zip(*rows, strict=True))
    units = ope.Units(spaces.Box(0, 1, (S,)), spaces.Discrete(A))
    s, reward, after = map(units.tensor, (s, reward, after))
    data = SimpleNamespace(
        units=units,
        transitions=ope.Batch(s, units.action(a), reward, after, torch.zeros(n * T)),
        episode=torch.arange(n).repeat_interleave(T),
        behavior_log_prob=np.log(np.full(n * T, 0.5)),
    )

    def pi(obs):
        return ope.Probabilities(torch.tensor(target)[obs.argmax(1)])

    return data, [ope.Target(f"{distance} from it", pi, units, TABLE)], [start @ v]


def clear(seed):
    """The first of a thousand logs of far that ratios can judge, by rule 2 of the verdict."""
    for number in range(1000 * seed, 1000 * seed + 1000):
        data, policies, truths = table(100, 0.3, number)
        log_pi = policies[0].log_prob(data.transitions.obs, data.transitions.action)
        weights = ope.weight_summary(np.exp(log_pi - data.behavior_log_prob).reshape(100, -1))
        if not ope.weight_problem(weights):
            return data, policies, truths
    raise AssertionError("none in a thousand")


def pipeline(seed):
    """The logs in the form of a dataset on disk; IQL's policy, its value."""
    logs, _ = ope.example(CARTPOLE, 300, (5.0,), seed)
    episodes, units = [], logs.units
    for i in range(300):
        rows = logs.episode == i
        s, a, r, next_s, d = (x[rows].numpy() for x in logs.transitions)
        cut = (np.arange(len(d)) == len(d) - 1) & (d == 0)
        infos = {"behavior_log_prob": logs.behavior_log_prob[rows.numpy()]}
        obs = np.concatenate([s, next_s[-1:]])
        episodes.append(EpisodeBuffer(None, None, None, obs, a, r, d == 1, cut, infos))
    source = episodes, (units.observation_space, units.action_space), logs.make_env, None
    iql.open_dataset = ope.open_dataset = lambda _: source
    flags = {"steps": 500, "hidden": (64, 64), "eval_every": 0, "eval_episodes": 0, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        iql.main(iql.Args(("cartpole/logs-v0[:80%]",), seed=seed, out_dir=folder, **flags))
        (run,) = map(str, Path(folder).iterdir())
        data, (policy,) = ope.load(replace(CARTPOLE, run=(run,)))
    assert not policy.seen and int(data.episode.max()) == 59
    policy.name = "IQL"
    envs = gym.make_vec("CartPole-v1", 20_000, vectorization_mode="vector_entry_point")
    obs, alive, truth = envs.reset(seed=10**6 + seed)[0], np.ones(20_000, bool), 0.0
    for t in range(CARTPOLE.horizon):  # every step earns 1
        truth += CARTPOLE.gamma**t * alive.mean()
        obs, _, terminated, *_ = envs.step(policy.act(obs))
        alive &= ~terminated
    return data, [policy], [truth]


def repeat(setting, seed):
    """Rows: setting, seed, policy, effective sample size, name, value, low, high, truth, whether it
    counts as a 95% interval. The name is an estimator's, "gain WDR", "gain FQE" or a verdict."""
    args, make = SETTINGS[setting]
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        data, policies, truths = make(seed)
        if setting.startswith("ratios"):
            yield from ratios_alone(setting, seed, data, policies, truths)
            return
        log = ope.Log(data, args)
        baseline = cartpole_value(5.0) if args is CARTPOLE else None
        for policy, truth in zip(policies, truths, strict=True):
            report = ope.evaluate_policy(policy, log, args)
            first = setting, seed, policy.name, report.weights.sizes[-1]
            for name, e in report.estimates.items():
                yield *first, name, e.value, e.low, e.high, truth, not e.doubt
                if baseline and name in ("WDR", "FQE"):
                    yield *first, f"gain {name}", *e.gain, truth - baseline, not e.doubt
            for name, bound in report.bounds.items():
                yield *first, f"at least, {name[:5]}", bound, bound, np.inf, truth, True
            e, (_, line) = report.estimates["WDR"], ope.verdict(report)
            for grade in ("believe WDR with care", "believe WDR,", "a hint", "believe none"):
                if grade in line:
                    yield *first, grade.rstrip(","), e.value, e.low, e.high, truth, True
            sure = "cannot tell" not in line and "believe WDR" in line
            if sure and baseline:
                yield *first, "better or worse", *e.gain, truth - baseline, True


def ratios_alone(setting, seed, data, policies, truths):
    """The rows of (1) to (4)."""
    length = np.bincount(data.episode)
    n, discounts = len(length), 0.99 ** np.arange(50)
    inside = np.arange(50) < length[:, None]
    rng, reward = np.random.default_rng(seed), inside * 1.0
    resamples = rng.multinomial(n, np.full(n, 1 / n), 1000) / n
    log = SimpleNamespace(resamples=resamples, returns=reward @ discounts)
    for policy, truth in zip(policies, truths, strict=True):
        log_pi = policy.log_prob(data.transitions.obs, data.transitions.action)
        ratio = np.ones((n, 50))
        ratio[inside] = np.exp(log_pi - data.behavior_log_prob)
        weights = ope.weight_summary(ratio)
        for name, per_decision, weighted in (
            ("IS, unmarked", False, False),
            ("PDIS, unmarked", True, False),
            ("WIS", False, True),
            ("PDWIS", True, True),
        ):
            flags = {"gamma": 0.99, "per_decision": per_decision, "weighted": weighted}
            estimator = partial(ope.importance_sampling, reward=reward, ratio=ratio, **flags)
            e = ope.bootstrap(estimator, log, weights.sizes[-1] - 1)
            row = setting, seed, policy.name, weights.sizes[-1], name
            yield *row, e.value, e.low, e.high, truth, not ope.weight_problem(weights)


def print_table(path):
    held, bias = defaultdict(list), defaultdict(list)
    for setting, _, policy, _, name, value, low, high, truth, counts in csv.reader(path.open()):
        column = f"{setting} {policy}"
        bias[name, column].append(float(value) - float(truth))
        if counts == "True":
            held[name, column].append(float(low) <= float(truth) <= float(high))
    columns = sorted({column for _, column in bias})
    print("| | " + " | ".join([*columns, "all"]) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for name in dict.fromkeys(name for name, _ in bias):
        cells = [held[name, column] for column in columns]
        cells.append([hit for cell in cells for hit in cell])
        cells = [f"{sum(x)}/{len(x)}" if x else "" for x in cells]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("WDR", "FQE"):
        cells = [bias[name, column] for column in columns]
        cells = [f"{np.mean(x):+.3f}" if x else "" for x in cells]
        print(f"| mean error of {name} | " + " | ".join(cells) + " | |")


def save_counts(path, to):
    cells = defaultdict(list)
    for setting, _, policy, ess, name, _, low, high, truth, counts in csv.reader(path.open()):
        held = float(low) <= float(truth) <= float(high)
        cells[setting, policy, name].append((float(ess), counts == "True", held))
    with open(to, "w", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write("setting policy name ess logs printed held".split())
        for key, rows in cells.items():
            ess, printed = np.mean([ess for ess, *_ in rows]), [held for _, x, held in rows if x]
            write([*key, round(ess, 1), len(rows), len(printed), sum(printed)])


if __name__ == "__main__":
    ope.use_cpu_well()
    path, settings = Path(sys.argv[1]), sys.argv[2:]
    if not settings:
        print_table(path)
    elif settings[0].endswith(".csv"):
        save_counts(path, settings.pop())
    path.touch()
    done = {tuple(row[:2]) for row in csv.reader(path.open())}
    for seed in count(100) if settings else ():
        for setting in settings:
            if (setting, str(seed)) in done:
                continue
            rows = list(repeat(setting, seed))
            with path.open("a") as file:
                csv.writer(file).writerows(rows)
