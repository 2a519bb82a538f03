"""Earlier implementations on the same data, as many updates, evaluated alike: the README's table.

  python benchmarks/peers.py --corl FOLDER       what benchmarks/peers.csv lacks, then the table
  python benchmarks/peers.py --table             the table from the CSVs alone

FOLDER has any_percent_bc.py, iql.py and awac.py of github.com/corl-team/CORL (commit eeeeef2 of
February 2024, algorithms/offline), unchanged; what they import and no longer installs is replaced
by empty modules. d3rlpy 2.8.1 is from PyPI: pip install --no-deps d3rlpy (it wants a gymnasium of
2024, and runs with today's), then its gym, click, structlog, colorama, dataclasses-json,
scikit-learn. Each gets our default networks, batch, learning rates, discount, target rate,
observations and rewards, and our data, read right (d3rlpy's own loader of Minari data shifts
observations against actions). "own" means its own weights, networks and learning rates on
standardised observations and unscaled rewards.
"""

import contextlib
import csv
import importlib.util
import io
import logging
import os
import sys
import types
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CSV = ROOT / "benchmarks/peers.csv"
COLUMNS = "peer flags dataset seed updates return_mean torch".split()
PENDULUM = "pendulum/mixed-v0", "pendulum/random-v0"
PEERS = {  # name: our file, what data
    "CORL BC": ("bc", PENDULUM),
    "CORL IQL": ("iql", PENDULUM),
    "CORL AWAC": ("awac", PENDULUM),
    "d3rlpy AWAC": ("awac", PENDULUM),
    "d3rlpy CQL": ("cql", PENDULUM),
    "d3rlpy BCQ": ("bcq", PENDULUM),
    "d3rlpy DiscreteCQL": ("cql", ("cartpole/mixed-v0",)),
    "d3rlpy DiscreteBCQ": ("bcq", ("cartpole/mixed-v0",)),
}


@dataclass
class Args:
    corl: str = "CORL"  # folder of the three files
    peers: tuple[str, ...] = tuple(PEERS)  # names, see PEERS
    flags: tuple[str, ...] = ("ours", "own")  # own: of CORL alone
    seeds: tuple[int, ...] = (100, 101, 102)
    table: bool = False  # print the table and stop


def main(args: Args):
    rows = list(csv.DictReader(open(CSV))) if CSV.exists() else []
    known = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    for seed in () if args.table else args.seeds:
        for peer in args.peers:
            for flags in args.flags if peer.startswith("CORL") else ("ours",):
                for dataset in PEERS[peer][1]:
                    if (peer, flags, dataset, str(seed)) in known:
                        continue
                    value, updates = run(peer, flags, dataset, seed, args.corl)
                    print(f"{peer}, {flags} flags, {dataset}, seed {seed}: {value:.1f}", flush=True)
                    row = peer, flags, dataset, seed, updates, round(value, 2), torch.__version__
                    rows.append(dict(zip(COLUMNS, row, strict=True)))
                    with open(CSV, "w", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(rows)
    print(markdown(rows))


def run(peer, flags, dataset, seed, corl):
    """The mean return of the last policy over our 100 episodes, and the number of updates."""
    module = importlib.import_module(PEERS[peer][0])
    args = module.Args(dataset_id=(dataset,))
    own = flags == "own"
    module.use_cpu_well()
    torch.manual_seed(seed)
    np.random.seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        scale = 1.0 if own else getattr(args, "reward_scale", 1.0)
        data = module.Dataset((dataset,), own or args.normalize_obs, scale)
        make_env = module.find_env(data, None)
    project, method = peer.split()
    agent = (corl_agent if project == "CORL" else d3rlpy_agent)(method, data, args, own, corl)
    policy = module.Policy(agent, data.units)
    return module.evaluate(policy, make_env, 100).mean(), args.steps


class Acting(torch.nn.Module):
    """What Policy asks of an agent, from a function of observations (N, O)."""

    def __init__(self, act):
        super().__init__()
        self.act_on = act

    def act(self, obs, deterministic=True):
        return torch.as_tensor(self.act_on(obs))


def corl_agent(method, data, args, own, folder):
    file = load_corl(folder, {"BC": "any_percent_bc"}.get(method, method.lower()))
    sizes = obs_dim, action_dim = data.units.obs_dim, data.units.action_dim
    width = 256 if own else args.hidden[0]

    def adam(network):
        return torch.optim.Adam(network.parameters(), 3e-4 if own else args.lr)

    if method == "BC":
        actor = file.Actor(*sizes, 1.0)
        if not own:
            actor.net = torch.nn.Sequential(
                *(torch.nn.Linear(obs_dim, width), torch.nn.ReLU(), torch.nn.Linear(width, width)),
                *(torch.nn.ReLU(), torch.nn.Linear(width, action_dim), torch.nn.Tanh()),
            )
        trainer = file.BC(1.0, actor, adam(actor))
        train, act = trainer.train, actor
    elif method == "IQL":
        actor, q = file.GaussianPolicy(*sizes, 1.0, width), file.TwinQ(*sizes, width)
        v, weights = file.ValueFunction(obs_dim, width), {}
        if not own:
            weights = {"iql_tau": args.expectile, "beta": args.beta, "tau": args.polyak}
        networks = [x for network in (actor, q, v) for x in (network, adam(network))]
        trainer = file.ImplicitQLearning(1.0, *networks, **weights, max_steps=args.steps)

        def act(obs):
            return actor(obs).mean.clamp(-1, 1)

        train = trainer.train
    else:
        networks = [file.Actor(*sizes, width), *(file.Critic(*sizes, width) for _ in range(2))]
        actor = networks[0]
        pairs = [x for network in networks for x in (network, adam(network))]
        weights = {} if own else {"awac_lambda": args.lam, "tau": args.polyak}
        trainer = file.AdvantageWeightedActorCritic(*pairs, **weights)

        def act(obs):
            return actor._get_policy(obs).mean.clamp(-1, 1)

        train = trainer.update
    for _ in range(args.steps):
        batch = data.sample(args.batch_size)
        column = [x[:, None] if x.ndim == 1 else x for x in batch]
        train(column)
    actor.eval()
    return Acting(act)


def load_corl(folder, name):
    class Empty(types.ModuleType):
        """Has every name, as a decorator that returns the function, or as nothing."""

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *x, **_: x[0] if x and callable(x[0]) else lambda function: function

    for missing in ("d4rl", "gym", "wandb", "pyrallis"):
        sys.modules[missing] = Empty(missing)
    sys.modules["gym"].Env = object
    spec = importlib.util.spec_from_file_location("peer", f"{folder}/{name}.py")
    sys.modules["peer"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["gym"]  # d3rlpy needs the real one
    return module


def d3rlpy_agent(method, data, args, own, _):
    import d3rlpy

    logging.disable()
    d3rlpy.seed(torch.initial_seed())
    obs, action, reward, _, terminal = (x.numpy() for x in data.transitions)
    last = np.diff(data.episode.numpy(), append=-1) != 0
    kind = d3rlpy.constants.ActionSpace
    dataset = d3rlpy.dataset.MDPDataset(
        obs,
        action if action.ndim == 2 else action[:, None],
        reward[:, None],
        terminal,
        (last & (terminal == 0)).astype(np.float32),
        action_space=kind.DISCRETE if data.units.discrete else kind.CONTINUOUS,
    )
    encoder = d3rlpy.models.VectorEncoderFactory(list(args.hidden))
    flags = {"batch_size": args.batch_size, "gamma": args.gamma}
    if data.units.discrete:
        rate = args.lr if hasattr(args, "lr") else args.critic_lr
        flags |= {"learning_rate": rate, "encoder_factory": encoder}
        flags["target_update_interval"] = round(1 / args.polyak)  # it copies, and does not average
        flags |= {"alpha": args.alpha} if method == "DiscreteCQL" else {}
        if method == "DiscreteBCQ":  # beta: of the mean squared logits
            flags |= {"action_flexibility": args.threshold, "beta": 0.01, "share_encoder": False}
    else:
        flags |= {"actor_encoder_factory": encoder, "critic_encoder_factory": encoder}
        flags["tau"] = args.polyak
        flags["actor_learning_rate"] = getattr(args, "actor_lr", None) or args.lr
        flags["critic_learning_rate"] = getattr(args, "critic_lr", None) or args.lr
        if method == "AWAC":
            flags["lam"] = args.lam
        elif method == "CQL":  # alpha is not learned
            flags |= {"conservative_weight": 2 * args.alpha, "alpha_learning_rate": 1e-12}
            flags |= {"temp_learning_rate": args.actor_lr, "alpha_threshold": 0.0}
            flags["n_action_samples"] = args.samples
        else:
            flags |= {"imitator_encoder_factory": encoder, "imitator_learning_rate": args.lr}
            flags |= {"action_flexibility": args.phi, "n_action_samples": args.target_samples}
            flags["lam"] = args.soft_min
    learner = getattr(d3rlpy.algos, f"{method}Config")(**flags).create(device="cpu:0")
    learner.build_with_dataset(dataset)
    for _ in range(args.steps):
        learner.update(dataset.sample_transition_batch(args.batch_size))
    if method == "BCQ":  # d3rlpy has one number for both
        learner.impl._n_action_samples = args.act_samples
    return Acting(lambda obs: learner.predict(obs.numpy()))


def markdown(rows):
    """Mean of each peer [lowest, highest] (seeds), beside ours."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["dataset"], row["peer"], row["flags"]].append(float(row["return_mean"]))
    ours = defaultdict(list)
    for row in csv.DictReader(open(ROOT / "benchmarks/returns.csv")):
        ours[row["dataset"], row["method"]].append(float(row["return_mean"]))

    def cell(x):
        return f"{np.mean(x):.0f} [{min(x):.0f}, {max(x):.0f}] ({len(x)})"

    lines = ["| data | implementation | its return | ours |", "|---|---|---|---|"]
    for (dataset, peer, flags), returns in sorted(cells.items()):
        mine = cell(ours[dataset, PEERS[peer][0]])
        name = f"{peer}, its own flags" if flags == "own" else peer
        lines.append(f"| `{dataset}` | {name} | {cell(returns)} | {mine} |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
