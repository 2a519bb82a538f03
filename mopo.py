# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13", "numpy>=2.0.2", "gymnasium>=1.2", "minari[hdf5,hf]>=0.5.3",
#   "pillow>=11.0", "tyro>=0.9.3", "tqdm>=4.66"]
# ///
"""Model-based Offline Policy Optimization (MOPO): learn the world from the data, practise in it.

An ensemble of networks learns what follows an action. The policy is then trained by SAC on short
imagined rollouts that start at states of the data, and each imagined reward is lowered by how
uncertain the ensemble is: out of distribution the imagined world is unpleasant, so the policy has
no reason to go there. Where the data are broad but poor, a model pays.

  python mopo.py                                      Pendulum, a return of about -135, minutes
  python mopo.py --conservative 1 --real-ratio 0.5    COMBO
  python mopo.py --dataset-id mujoco/hopper/medium-v0 --hidden 256 256 --model-hidden 200 200 200 \
    200 --rollout-starts 50000 --rollout-every 1000 --penalty 5 --actor-lr 3e-4 --critic-lr 3e-4 \
    --polyak 0.005 --model-epochs 1000 --no-normalize-obs --steps 1000000 --log-every 5000 \
    --eval-every 50000    MuJoCo, the paper's settings, hours; h is 1 or 5, lambda 0.5 to 5 by task

s, a, r, s' are data or imagined, x = [s' - s, r]; lambda is --penalty, h --rollout-length, Q' a
lagging copy of Q. The model, 7 members i, each a Gaussian of x with mean m_i and std d_i:
  (1) L_model = sum_i mean[ (m_i - x)^2 / d_i^2 + log d_i^2 ]
                + 0.01 sum(max_logvar - min_logvar) + 1/2 decay |W|^2                         [D3]
  (2) u(s, a) = max_i |d_i(s, a)|                       --uncertainty aleatoric               [D6]
                max_i |m_i(s, a) - mean_j m_j(s, a)|    --uncertainty disagreement: of s' only
Rollouts of h steps from states of the data: a ~ pi(.|s), x ~ N(m_i, d_i^2) of a random member of
the 5 best (u is of all 7), up to where a classifier of s' says terminal, with the reward
  (3) r~      = r - lambda u(s, a)                                           [the penalised MDP, D5]
SAC, on batches with a share --real-ratio of real transitions, where r~ is r; the rest imagined:
  (4) L_pi    = mean[ temperature log pi(a|s) - min_j Q_j(s, a) ],  a ~ pi(.|s)
  (5) L_temp  = mean[ -log(temperature) (log pi(a|s) + target entropy) ],  target entropy -A  [D4]
  (6) y       = r~ + gamma (1 - terminal) (min_j Q'_j(s', a') - temperature log pi(a'|s')),
                a' ~ pi(.|s')
  (7) L_Q     = sum_j mean 1/2 (Q_j(s, a) - y)^2
COMBO (Yu et al. 2021, arXiv 2102.08363), with --conservative beta: no penalty in (3), and
  (8) L_Q     = (7) + beta sum_j ( mean_model[ log sum_k exp( Q_j(s, a_k) - log mu(a_k) ) ]
                                   - mean_data[ Q_j(s, a) ] )                                 [D4]
                over 10 actions a_k from each proposal mu: uniform, pi(.|s), pi(.|s')
MOReL (Kidambi et al. 2020, arXiv 2005.05951) differs from MOPO in (3): where the members disagree,
max_ij |m_i - m_j| > threshold, the rollout ends (terminal = 1) with a reward of -kappa.
If the model's error is at most u, in units that lambda translates to value, then for every policy
the return in the penalised MDP is a lower bound of the true one; (2) is a heuristic for such a u,
which the theory does not cover.

Shapes: N batch, O observation, A action size, E = 2 critics, members = 7.

Differs from the papers or from the official code:
  D1 Terminals are learned from the data, not written by hand for each task (`fit_terminal`). Nor
     may a rollout leave the range of the data by more than half of it: s' is clamped.
  D2 Held out is a tenth of the episodes, not 1000 transitions: neighbours in time are near copies.
  D3 One weight decay (5e-5) for all layers, official are 2.5e-5 to 1e-4; torch's initialisation.
  D4 Target entropy -A, the official code has -3 for every task. COMBO keeps (6)'s entropy bonus, as
     some do; (8) pushes down at the model's states, where a later implementation takes the batch.
  D5 s' - s, r and u are in the networks' units: with --normalize-obs or --reward-scale, lambda is.
  D6 Aleatoric is the official code's, to which its values of lambda belong; in the paper it is the
     norm of the covariance, not of the stds.

Papers: Yu, Thomas, Yu, Ermon, Zou, Levine, Finn, Ma (2020), arXiv 2005.13239; ensemble: PETS (Chua
et al. 2018, arXiv 1805.12114); SAC: Haarnoja et al. (2018). Written from them; no code from
elsewhere.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ctypes
import io
import json
import math
import os
import re
import shlex
import sys
import time
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.serialization import deserialize_space, serialize_space
from torch import nn
from torch.distributions import Normal
from tqdm import tqdm

__version__ = "2.5.0"


@dataclass
class Args:
    # Data and run
    dataset_id: tuple[str, ...] = ("pendulum/mixed-v0",)  # Minari or built-in ids, mixed if several
    env_id: str | None = None  # environment of the evaluation; default: the one of the dataset
    seed: int = 0  # of the networks, the batches and the sampled actions
    steps: int = 5_000  # gradient updates
    log_every: int = 250  # updates between two rows of metrics.csv, each with a checkpoint
    eval_every: int = 1_000  # updates between two evaluations; 0: only the final one
    eval_episodes: int = 100  # of the final evaluation, a tenth of it along the way; 0: none
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of the data and the networks
    compile: bool = False  # the update as one graph: up to 1.6 times as fast after half a minute
    out_dir: str = "runs"  # where the run's folder is made
    resume: str | None = None  # folder of a run to go on with; takes all other flags from there
    # Optimisation
    batch_size: int = 256  # N, transitions per update
    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers, for example 256 256
    critic_lr: float = 1e-3  # learning rate of the critic, in cql.py of alpha too
    actor_lr: float = 1e-3  # learning rate of the policy and the temperature (Box)
    gamma: float = 0.99  # discount
    polyak: float = 0.01  # rate of the target networks: Q' <- (1 - polyak) Q' + polyak Q
    normalize_obs: bool = True  # standardise observations by the dataset's mean and deviation
    reward_scale: float | Literal["return-range"] = 1.0  # or 1000 / (largest - smallest return)
    reward_shift: float = 0.0  # added to the scaled rewards; a new task where episodes terminate
    # MOPO
    model_lr: float = 1e-3  # learning rate of the model
    model_hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers of each member
    model_epochs: int = 50  # most passes over the data; it stops when no member improves
    terminal_updates: int = 20_000  # of the classifier of terminals, if the data have any
    uncertainty: Literal["aleatoric", "disagreement"] = "aleatoric"  # u in (2)
    penalty: float = 1.0  # lambda in (3); 0: plain model-based rollouts
    rollout_length: int = 5  # h, steps of a rollout
    rollout_starts: int = 5_000  # states of the data that rollouts start from, each time
    rollout_every: int = 250  # updates between rollouts; the model buffer has room for 5 rounds
    real_ratio: float = 0.05  # share of real transitions in each batch
    conservative: float = 0.0  # beta in (8): COMBO, without the penalty of (3); 0: MOPO


def main(args: Args) -> dict:
    """Fits the model, trains the policy in it and evaluates; returns what result.json has."""
    args, state = start(args)  # state: the checkpoint of --resume, or None
    data = Dataset(
        args.dataset_id, args.normalize_obs, args.reward_scale, args.reward_shift, args.device
    )
    agent = Agent(data.units, args).to(args.device)
    train, held_out = split(data)
    run = Run(args, data, agent, state)
    if run.step == 0:  # new, or stopped before the first checkpoint that has the fitted model
        fit_ensemble(agent.model, data.batch(train), data.batch(held_out), args)  # (1)
        fit_terminal(agent.model, data.batch(train), data.batch(held_out), args)  # D1
        report = model_report(agent.model, data, held_out, args)
        print(report)
        write(run.folder / "model.txt", report.encode())
    for update in run.updates(args.steps):  # from the last checkpoint on, with a progress bar
        if (update - 1) % args.rollout_every == 0:
            agent.rollout(data)  # (2), (3)
        metrics = agent.update(agent.sample(data))  # (4) to (8)
        run.log(update, metrics)
    return run.finish()


class Agent(nn.Module):
    """SAC on real and imagined transitions."""

    def __init__(self, units, args):
        super().__init__()
        self.args, self.action_dim = args, units.action_dim
        self.real_rows = round(args.real_ratio * args.batch_size)
        mixed = 0 < self.real_rows < args.batch_size or not args.conservative
        require(mixed, "--conservative needs real and model transitions: --real-ratio 0.5")
        require(not units.discrete, "MOPO needs Box actions; cql.py and others take Discrete ones")
        self.model = Model(units, args)
        with blaming("--rollout-starts, --rollout-length"):
            self.model_buffer = ModelBuffer(units, 5 * args.rollout_starts * args.rollout_length)
        self.policy = TanhGaussian(units, args.hidden)
        self.critic = TwinCritic(units, args.hidden)
        self.critic_target = deepcopy(self.critic)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        actor_parameters = [*self.policy.parameters(), self.log_temperature]
        self.actor_optimizer = Adam(actor_parameters, args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)

    def update(self, batch):
        """(4) to (8), all losses with the networks as before the update. Returns metrics as
        tensors: nothing waits for the device."""
        pi, q = self.policy(batch.obs), self.critic(batch.obs, batch.action)
        action, log_pi = pi.sample_and_log_prob()
        actor_loss = self.actor_loss(batch, action, log_pi)  # (4)
        temperature_loss = self.temperature_loss(log_pi)  # (5)

        critic_loss = td_loss = self.td_loss(q, self.target(batch))  # (7)
        metrics = {"td_loss": td_loss, "actor_loss": actor_loss, "entropy": -log_pi.mean()}
        if self.args.conservative:
            gap = self.conservative_gap(batch, q)  # (E,)
            critic_loss = td_loss + self.args.conservative * gap.sum()  # (8), COMBO
            metrics["gap"] = gap.mean()

        step(self.actor_optimizer, actor_loss + temperature_loss)
        step(self.critic_optimizer, critic_loss)
        polyak_update(self.critic_target, self.critic, self.args.polyak)
        return metrics | {"critic_loss": critic_loss, "temperature": self.log_temperature.exp()}

    def actor_loss(self, batch, action, log_pi):
        """(4) for a ~ pi(.|s): action (N, A), log_pi (N,)."""
        q = self.critic(batch.obs, action).min(0).values
        assert q.shape == log_pi.shape == batch.reward.shape
        return (self.log_temperature.exp().detach() * log_pi - q).mean()

    def temperature_loss(self, log_pi):
        """(5): the temperature rises while the entropy is below -A."""
        return -(self.log_temperature * (log_pi.detach() - self.action_dim)).mean()  # D4

    def target(self, batch):
        """(6) y (N,)."""
        with torch.no_grad():
            next_action, log_pi = self.policy(batch.next_obs).sample_and_log_prob()
            next_q = self.critic_target(batch.next_obs, next_action).min(0).values
            next_v = next_q - self.log_temperature.exp() * log_pi
            return batch.reward + self.args.gamma * (1 - batch.terminal) * next_v

    def td_loss(self, q, y):
        """(7) for q (E, N), y (N,)."""
        assert q.shape == (2, *y.shape)
        return 0.5 * ((q - y) ** 2).mean(1).sum()

    def conservative_gap(self, batch, q):
        """The bracket of (8) (E,) for q (E, N): how much higher Q is in the model's states, and in
        those alone (D4), than on the data."""
        obs, next_obs = batch.obs[self.real_rows :], batch.next_obs[self.real_rows :]
        pi, pi_next = self.policy(obs), self.policy(next_obs)
        pushed_down = soft_maximum(self.critic, obs, pi, pi_next, K=10)  # K as in CQL's code
        return pushed_down.mean(1) - q[:, : self.real_rows].mean(1)

    def act(self, obs, deterministic=True):
        """Actions (N, A): tanh of the Gaussian's mean, or a sample."""
        pi = self.policy(obs)
        return pi.median if deterministic else pi.sample_and_log_prob()[0]

    @torch.no_grad()
    def rollout(self, data):
        """A round of rollouts into the model buffer, with the rewards of (3). The last step of a
        rollout is not terminal: it bootstraps."""
        penalty = 0 if self.args.conservative else self.args.penalty
        obs = data.sample(self.args.rollout_starts).obs
        for _ in range(self.args.rollout_length):
            action = self.policy(obs).sample_and_log_prob()[0]
            reward, next_obs, terminal, u = self.model.imagine(obs, action)
            assert reward.shape == u.shape == terminal.shape
            self.model_buffer.add(Batch(obs, action, reward - penalty * u, next_obs, terminal))
            obs = next_obs[terminal == 0]

    def sample(self, data):
        """A batch of N: first the real transitions, then those of the model."""
        real = data.sample(self.real_rows)
        model = self.model_buffer.sample(self.args.batch_size - self.real_rows)
        return Batch(*(torch.cat(x) for x in zip(real, model, strict=True)))

    def diagnose(self, batch):
        """Metrics on a fixed sample of the data, as tensors; Q is the smaller of the two."""
        action = self.policy(batch.obs).median
        return {
            "q_data": self.critic(batch.obs, batch.action).min(0).values.mean(),
            "q_policy": self.critic(batch.obs, action).min(0).values.mean(),
            "action_distance": ((action - batch.action) ** 2).mean().sqrt(),  # units of [-1, 1]
            "u_data": self.model.uncertainty(*self.model(batch.obs, batch.action)).mean(),
            "u_policy": self.model.uncertainty(*self.model(batch.obs, action)).mean(),
            "model_reward": self.model_buffer.sample(len(action)).reward.mean(),  # r~
        }


class Model(nn.Module):
    """P(s', r, terminal | s, a): an ensemble of Gaussians for s' and r, a classifier of s'."""

    members, elite_members = 7, 5
    never = torch.finfo(torch.float32).max  # no log odds and no observation exceed it

    def __init__(self, units, args):
        super().__init__()
        O, A = units.obs_dim, units.action_dim  # noqa: E741
        self.disagreement = args.uncertainty == "disagreement"
        self.net = MLP(self.members, O + A, *args.model_hidden, 2 * (O + 1), activation=F.silu)
        self.max_logvar = nn.Parameter(torch.full((O + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((O + 1,), -10.0))
        self.terminal_net = MLP(1, O, *args.model_hidden, 1)
        self.register_buffer("terminal_threshold", torch.tensor(self.never))
        self.register_buffer("input_mean", torch.zeros(O + A))
        self.register_buffer("input_std", torch.ones(O + A))
        self.register_buffer("obs_range", torch.tensor([[-self.never], [self.never]]).repeat(1, O))
        self.register_buffer("elites", torch.arange(self.elite_members))

    def forward(self, obs, action):
        """(N, .) for all members, or (members, N, .) -> m, log d^2 of x (members, N, O + 1)."""
        inputs = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        mean, logvar = self.net(inputs).chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def loss(self, obs, action, x):
        """(1), each member on its own batch: obs, action, x (members, N, .)."""
        mean, logvar = self(obs, action)
        nll = (mean - x) ** 2 * (-logvar).exp() + logvar
        assert nll.shape == x.shape
        bounds = (self.max_logvar - self.min_logvar).sum()
        decay = 5e-5 * sum((weight**2).sum() for weight in self.net.weight)  # D3
        return nll.mean((1, 2)).sum() + 0.01 * bounds + 0.5 * decay

    def uncertainty(self, mean, logvar):
        """(2) u (N,), over all members, from m and log d^2 (members, N, O + 1)."""
        if self.disagreement:
            return (mean - mean.mean(0))[..., :-1].norm(dim=-1).amax(0)
        return (logvar / 2).exp().norm(dim=-1).amax(0)  # D6

    def terminal_logit(self, obs):
        """log odds (N,) of terminal at s' = obs (N, O), in balanced data."""
        O = obs.shape[1]  # noqa: E741
        return self.terminal_net((obs - self.input_mean[:O]) / self.input_std[:O])[0, :, 0]

    def imagine(self, obs, action):
        """A step in the imagined world: reward (N,), next_obs (N, O), terminal (N,), u (N,)."""
        mean, logvar = self(obs, action)
        choice = torch.randint(len(self.elites), (len(obs),), device=obs.device)
        member, row = self.elites[choice], torch.arange(len(obs), device=obs.device)
        x = torch.normal(mean[member, row], (logvar[member, row] / 2).exp())
        next_obs = (obs + x[:, :-1]).clamp(*self.obs_range)  # D1
        terminal = (self.terminal_logit(next_obs) > self.terminal_threshold).float()  # D1
        return x[:, -1], next_obs, terminal, self.uncertainty(mean, logvar)


class ModelBuffer(nn.Module):
    """The newest `capacity` imagined transitions, first in, first out. A part of the agent, so
    that a resumed run finds them in the checkpoint."""

    def __init__(self, units, capacity):
        super().__init__()
        self.widths = [units.obs_dim, units.action_dim, 1, units.obs_dim, 1]
        self.register_buffer("rows", torch.zeros(capacity, sum(self.widths)))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))  # since the start

    def add(self, batch):
        columns = [x if x.ndim == 2 else x[:, None] for x in batch]
        index = self.added + torch.arange(len(batch.obs), device=self.rows.device)
        self.rows[index % len(self.rows)] = torch.cat(columns, 1)
        self.added += len(index)

    def sample(self, n):
        size = self.added.clamp(max=len(self.rows))  # a tensor: the host need not know it
        rows = self.rows[(torch.rand(n, device=self.rows.device) * size).long()]
        obs, action, reward, next_obs, terminal = rows.split(self.widths, 1)
        return Batch(obs, action, reward[:, 0], next_obs, terminal[:, 0])


def outcome(batch):
    """x = [s' - s, r] (N, O + 1), in the networks' units (D5)."""
    return torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)


def split(data):
    """The transitions to fit the model on, and those held out (H,): whole episodes (D2)."""
    episodes = torch.randperm(len(data.returns), device=data.episode.device)
    require(len(episodes) > 1, "MOPO holds out whole episodes: the data must have at least two")
    is_held_out = torch.isin(data.episode, episodes[: math.ceil(len(episodes) / 10)])
    return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]


@torch.no_grad()
def squared_error(model, batch):
    """Mean squared error of each member, (members,)."""
    return ((model(batch.obs, batch.action)[0] - outcome(batch)) ** 2).mean((1, 2))


def fit_ensemble(model, train, held_out, args):
    """(1), until no member has improved on the held-out transitions by 1% for 5 epochs. Each member
    learns from its own bootstrap sample and goes back to its best weights; the elites are the best
    members. As in the official code the error of the means decides: d, which settles later, is
    then often too wide, as the report shows."""
    inputs, x = torch.cat([train.obs, train.action], 1), outcome(train)
    model.input_mean.copy_(inputs.mean(0))
    model.input_std.copy_(inputs.std(0).where(inputs.std(0) > 1e-6, 1.0))  # 1 for a constant
    low, high = torch.cat([train.obs, train.next_obs]).aminmax(dim=0)
    half = (high - low) / 2
    model.obs_range.copy_(torch.stack([low - half, high + half]))  # D1
    optimizer = Adam([*model.net.parameters(), model.max_logvar, model.min_logvar], args.model_lr)
    best, waited = deepcopy(model.net), 0
    best_error = torch.full((model.members,), math.inf, device=x.device)
    rows = torch.randint(len(x), (model.members, len(x)), device=x.device)
    for _ in tqdm(range(args.model_epochs), "model", disable=None):
        rows = rows.gather(1, torch.rand(rows.shape, device=x.device).argsort(1))  # shuffled
        for index in rows.split(args.batch_size, 1):  # (members, N)
            step(optimizer, model.loss(train.obs[index], train.action[index], x[index]))
        error = squared_error(model, held_out)
        require(error.isfinite().all(), "the model's error is not finite: lower --model-lr")
        improved = error < 0.99 * best_error
        best_error = error.where(improved, best_error)
        for kept, p in zip(best.parameters(), model.net.parameters(), strict=True):
            kept.data[improved] = p.data[improved]
        waited = 0 if improved.any() else waited + 1
        if waited == 5:
            break
    model.net.load_state_dict(best.state_dict())
    model.elites.copy_(best_error.argsort()[: model.elite_members])


def fit_terminal(model, train, held_out, args):
    """D1: the classifier learns from batches that are half terminal, which the data rarely are.
    Without terminals it stays off; where all transitions are terminal, all imagined ones are."""
    ends, others = train.next_obs[train.terminal == 1], train.next_obs[train.terminal == 0]
    if not len(ends) or not len(others):
        model.terminal_threshold.fill_(-model.never if len(ends) else model.never)
        return
    half = 128  # terminal ones in a batch, and others
    updates = args.terminal_updates  # the rate falls, or the last batches shift the classifier
    optimizer = Adam(model.terminal_net.parameters(), args.model_lr, decay=updates)
    label = torch.cat([torch.ones(half), torch.zeros(half)]).to(ends.device)
    for _ in tqdm(range(updates), "terminals", disable=None):
        next_obs = torch.cat([x[torch.randint(len(x), (half,))] for x in (ends, others)])
        loss = F.binary_cross_entropy_with_logits(model.terminal_logit(next_obs), label)
        step(optimizer, loss)
    # Few terminals are soon learned by heart: what their log odds are worth, held-out ones tell.
    calibrate(model, held_out if held_out.terminal.any() else train)


@torch.no_grad()
def calibrate(model, batch):
    """The threshold above which a terminal is more likely than not, as sigmoid(logit - threshold)
    is its probability: as many must be expected in the batch as there are. By bisection."""
    logit, ends = model.terminal_logit(batch.next_obs), batch.terminal.sum()
    low, high = logit.min() - 20, logit.max() + 20  # where all or none are expected
    for _ in range(50):
        middle = (low + high) / 2
        too_many = (logit - middle).sigmoid().sum() > ends
        low, high = middle.where(too_many, low), high.where(too_many, middle)
    model.terminal_threshold.copy_(high)


def soft_maximum(critic, obs, pi, pi_next, K):
    """Log of the integral of exp Q_j(s, .), plus log 3K (E, N), by importance sampling: exp Q / mu,
    averaged over a ~ mu, is that integral for every mu that covers the actions; pi(.|s') is one."""
    N, A = pi.median.shape
    with torch.no_grad():
        uniform = torch.empty(K, N, A, device=obs.device).uniform_(-1, 1)
        log_uniform = torch.full((K, N), -A * math.log(2), device=obs.device)
        a_pi, log_pi = pi.sample_and_log_prob((K,))
        a_next, log_next = pi_next.sample_and_log_prob((K,))  # valued at s, not at s'
    actions = torch.cat([uniform, a_pi, a_next])  # (3K, N, A)
    log_mu = torch.cat([log_uniform, log_pi, log_next])  # (3K, N)
    q = critic(obs.expand(3 * K, -1, -1), actions)  # (E, 3K, N)
    return (q - log_mu).logsumexp(1)


class TwinCritic(nn.Module):
    """Two Q(s, a) for Box actions: obs (..., O), action (..., A) -> (2, ...)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(2, units.obs_dim + units.action_dim, *hidden, 1)

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1)
        return self.net(x.flatten(0, -2)).view(2, *x.shape[:-1])


class TanhGaussian(nn.Module):
    """pi(.|s) for Box actions: obs (N, O) -> TanhNormal over actions (N, A)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(1, units.obs_dim, *hidden, 2 * units.action_dim)

    def forward(self, obs):
        mean, log_std = self.net(obs)[0].chunk(2, -1)
        return TanhNormal(mean, log_std.clamp(-5, 2).exp())


class TanhNormal:
    """Actions a = tanh(z), z ~ Normal(mean, std) (N, A); densities by the change of variables."""

    def __init__(self, mean, std):
        self.normal, self.median = Normal(mean, std), mean.tanh()

    def sample_and_log_prob(self, shape=()):
        """Differentiable actions (*shape, N, A) and their log pi(a|s) (*shape, N)."""
        z = self.normal.rsample(shape)
        action = z.tanh()
        log_slope = 2 * (math.log(2) - z - F.softplus(-2 * z))  # log(1 - tanh(z)^2), never log of 0
        return action, (self.normal.log_prob(z) - log_slope).sum(-1)


def health(metrics, data, args):
    """Q of (6) is soft and penalised, and is compared with rewards that are so too."""
    if not data.transitions.reward.any():
        return "all rewards are 0, nothing can be learned"
    penalty, knob = (0, "--conservative") if args.conservative else (args.penalty, "--penalty")
    penalty *= 1 - args.real_ratio  # real transitions have none; the bonus is given from s' on
    low = f"Lower {knob}." if penalty or args.conservative else "Lower --critic-lr."
    added = args.gamma * metrics["temperature"] * metrics["entropy"] - penalty * metrics["u_policy"]
    like_q = copy(data)
    like_q.transitions = data.transitions._replace(reward=data.transitions.reward + added)
    text = q_health(metrics, like_q, args.gamma, f"Raise {knob}.", low)
    return f"with the entropy bonus and a penalty of {penalty:g} u, {text}"


# ---- The report on the model, printed before the policy is trained ----
@torch.no_grad()
def model_report(model, data, held_out, args):
    """Whether the model deserves trust, as text, from the held-out transitions (H,)."""
    batch = data.batch(held_out)
    mean, logvar = model(batch.obs, batch.action)
    x, u = outcome(batch), model.uncertainty(mean, logvar)
    miss, std = (mean - x)[model.elites], (logvar / 2).exp()[model.elites]  # (elites, H, O + 1)
    whole = outcome(data.transitions)
    varies = whole.var(0) > 1e-12 * whole.mean(0) ** 2  # the others are constant
    share = ((miss**2).mean(1) / whole.var(0))[:, varies]  # (elites, those)
    by_u, error = u.argsort().tensor_split(min(5, len(u))), miss.norm(dim=-1).mean(0)  # (H,)
    penalty, size = (0 if args.conservative else args.penalty) * u, batch.reward.abs()
    table = {
        "squared error of each elite / variance": share.mean(1),
        "share within 1 std (a right Gaussian: 0.683)": (miss.abs() < std).float().mean((1, 2)),
        **growth(model, data, held_out, args.rollout_length),
        "u, by fifths": [u[i].mean() for i in by_u],
        "  error |m - x| there": [error[i].mean() for i in by_u],
        "penalty, mean and largest": [penalty.mean(), penalty.max()],
        "|r|, mean and largest": [size.mean(), size.max()],
        **found_terminals(model, batch),
    }
    lines = [f"The model on {len(held_out)} transitions of held-out episodes:"]
    for name, values in table.items():
        lines.append(f"{name:48}" + "".join(f"{float(value):10.3g}" for value in values))
    return "\n".join(lines) + "\n"


def growth(model, data, held_out, h):
    """How the error grows when the model goes on from its own predictions, with the elites' means
    and the actions of the data, where an episode has h steps."""
    start = held_out[held_out + h <= len(data.episode)]
    start = start[data.episode[start] == data.episode[start + h - 1]]
    scale, mean = data.transitions.obs.std(0), data.transitions.obs.mean(0)
    varies = scale > 1e-6 * mean.abs()  # the others are constant
    obs = first = data.transitions.obs[start].expand(model.members, -1, -1)
    table = {f"RMS error 1 to {h} steps ahead, in std of obs": [], "  of predicting no change": []}
    for k in range(h if len(start) else 0):
        batch = data.batch(start + k)
        obs = obs + model(obs, batch.action.expand(model.members, -1, -1))[0][..., :-1]
        for errors, s in zip(table.values(), (obs, first), strict=True):
            miss = ((s - batch.next_obs) / scale)[model.elites][..., varies]
            errors.append(miss.square().mean().sqrt())
    return table


def found_terminals(model, batch):
    if model.terminal_threshold == model.never:
        return {"terminals: none in the episodes fitted, the model never ends one": []}
    said = model.terminal_logit(batch.next_obs) > model.terminal_threshold
    is_end = batch.terminal == 1
    precision, recall = ((is_end & said).sum() / n.sum().clamp(min=1) for n in (said, is_end))
    table = {"terminals held out, predicted": [is_end.sum(), said.sum()]}
    table["  precision, recall"] = precision, recall
    if is_end.any() and recall < 0.8:
        table["warning: the model misses many terminals, and imagines life after them"] = []
    return table


# ---- Plumbing, the same in every file: a reader of the method can stop here ----
ALGORITHM = Path(__file__).stem


class MLP(nn.Module):
    """Networks side by side: x (N, I) for all, or (members, N, I) -> (members, N, O)."""

    def __init__(self, members, *sizes, activation=torch.relu_):
        super().__init__()
        self.activation = activation
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):  # initialised as torch.nn.Linear
            self.weight.append(torch.empty(members, o, i).uniform_(-(i**-0.5), i**-0.5))
            self.bias.append(torch.empty(members, o, 1).uniform_(-(i**-0.5), i**-0.5))

    def forward(self, x):
        x = x.mT.expand(len(self.bias[0]), *x.mT.shape[-2:])  # columns: thin layers are faster
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.bmm(weight, self.activation(x) if layer else x).add_(bias)
        return x.mT


class Adam(nn.Module):
    """What torch.optim.Adam keeps, as a module: it is saved with the agent. The learning rate falls
    to 0 along a cosine within `decay` steps, and goes on along it."""

    def __init__(self, parameters, lr, decay=math.inf):
        super().__init__()
        self.params, self.first_lr, self.decay = list(parameters), lr, decay
        self.means = nn.ParameterList(torch.zeros_like(p) for p in self.params)
        self.squares = nn.ParameterList(torch.zeros_like(p) for p in self.params)
        self.register_buffer("count", self.params[0].new_zeros(()))
        self.register_buffer("lr", self.params[0].new_tensor(lr))


@torch.no_grad()
def step(optimizer, loss):
    """One step of Adam; an actor's loss leaves no gradients in the critic that it goes through."""
    lr, count, params = optimizer.lr, optimizer.count, optimizer.params
    means, squares = list(optimizer.means), list(optimizer.squares)
    gradients = torch.autograd.grad(loss, params)
    count += 1
    if torch.compiler.is_compiling():  # one loop with what surrounds it
        rest1, rest2 = (count * math.log(0.9)).exp(), (count * math.log(0.999)).exp()
        for p, gradient, mean, square in zip(params, gradients, means, squares, strict=True):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            p -= lr / (1 - rest1) * mean / ((square / (1 - rest2)).sqrt() + 1e-8)
    else:  # the same in one call
        rates = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
        counts, options = [count] * len(params), {"amsgrad": False, "maximize": False}
        torch._fused_adam_(params, gradients, means, squares, [], counts, **rates, **options)
    if optimizer.decay < math.inf:
        lr.copy_(optimizer.first_lr * (1 + (count * (math.pi / optimizer.decay)).cos()) / 2)


def compiled(update, device):
    """`update` as one graph, Adam and targets included: equal but for rounding, on a GPU replayed
    without work for the CPU. All batches have the shapes of the first."""
    with blaming("--compile"):
        torch._inductor.cpp_builder.get_cpp_compiler()  # is there one?
    torch._dynamo.config.trace_autograd_ops = True  # takes torch.autograd.grad into the graph
    options = {"fallback_random": True, "cpp_wrapper": device == "cpu"}  # eager's random numbers
    options["triton.cudagraphs"] = device != "cpu"
    options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe  # shapes are asserted

    def graph(batch):
        return {name: x.detach() for name, x in update(batch).items()}

    graph.__code__ = graph.__code__.replace()  # its own cache: without guards agents share one
    graph = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    return blaming("--compile")(graph)  # the first call compiles


@torch.no_grad()
def polyak_update(target, source, rate):
    """target <- (1 - rate) target + rate source."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


class UserError(Exception):
    """Bad input, or a run that has to stop: one line on what is wrong, where, and what to do."""


@contextmanager
def blaming(what):
    """Whatever goes wrong inside, here or in a library, becomes one line that begins with what."""
    try:
        yield
    except (Exception, SystemExit) as error:  # some environments call sys.exit
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(" ".join(f"{what}: {reason}".split())[:500]) from error


def require(ok, problem):
    """Stops with the problem unless ok."""
    if not ok:
        raise UserError(problem)


# ---- Data ----
class Batch(NamedTuple):
    """N transitions in network units. terminal is 1.0 where the MDP ended, not at a time limit."""

    obs: torch.Tensor  # (N, O) float32
    action: torch.Tensor  # (N, A) float32 in [-1, 1], or (N,) int64 from 0
    reward: torch.Tensor  # (N,) float32, scaled and shifted
    next_obs: torch.Tensor  # (N, O) float32
    terminal: torch.Tensor  # (N,) float32


class Units(nn.Module):
    """Translates the environment's units to the networks' and back; saved with the policy."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.obs_dim, self.action_dim = map(spaces.flatdim, (observation_space, action_space))
        sizes = self.obs_dim, self.action_dim
        require(1 <= min(sizes) and max(sizes) <= 10**5, "spaces must have 1 to 100,000 numbers")
        self.discrete = isinstance(action_space, spaces.Discrete)
        floats = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
        low, high = (action_space.low, action_space.high) if floats else (np.zeros(1), np.ones(1))
        known = (floats or self.discrete) and ((low < high) & (high - low < math.inf)).all()
        require(known, f"actions must be Discrete or a bounded Box of floats, not {action_space}")
        self.register_buffer("obs_mean", torch.zeros(self.obs_dim))
        self.register_buffer("obs_std", torch.ones(self.obs_dim))
        self.register_buffer("center", self.tensor((low + high) / 2.0).flatten())
        self.register_buffer("half_range", self.tensor((high - low) / 2.0).flatten())

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.obs_mean.device)

    def obs(self, obs):
        """(N, ...) -> (N, O), standardised. Dict and Tuple as rows of gymnasium.spaces.flatten."""
        with blaming("observations (Dict, Tuple, Discrete: rows of gymnasium.spaces.flatten)"):
            obs = self.tensor(obs)
        good = obs.ndim > 1 and obs.numel() == len(obs) * self.obs_dim > 0
        require(good, f"observations {tuple(obs.shape)} are not (N, {self.obs_dim}) numbers")
        require(obs.isfinite().all(), "an observation is NaN or infinite")
        return (obs.flatten(1) - self.obs_mean) / self.obs_std

    def action(self, action):
        """Environment actions (N, ...) -> (N, A) in [-1, 1], or (N,) int64 from 0."""
        if self.discrete:
            return self.tensor(np.asarray(action) - self.action_space.start).long()
        action = self.tensor(action).reshape(len(action), self.action_dim)
        return ((action - self.center) / self.half_range).clamp(-1, 1)

    def env_action(self, action):
        """The inverse of `action`: an array (N, ...) for env.step."""
        space = self.action_space
        if self.discrete:
            return action.cpu().numpy() + space.start
        action = (self.center + action * self.half_range).cpu().numpy()
        require(np.isfinite(action).all(), "actions are NaN: observations are far from the data's")
        return action.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype)


class Policy(nn.Module):
    """An agent in the environment's units: what is evaluated, saved and deployed."""

    def __init__(self, agent, units):
        super().__init__()
        self.agent, self.units = agent, units

    @torch.no_grad()
    def act(self, obs, deterministic=True):
        """Raw observations (N, ...) -> actions (N, ...) for env.step."""
        return self.units.env_action(self.agent.act(self.units.obs(obs), deterministic))


def scripted_action(dataset_id, obs):
    """The controller behind a built-in dataset."""
    if dataset_id == "cartpole/medium-v0":  # flawed: knows only the pole's speed, the cart drifts
        return int(obs[3] > 0)
    if dataset_id.startswith("cartpole"):
        return int(np.dot([0.1, 0.5, 1.0, 0.5], obs) > 0)
    angle, speed = np.arctan2(obs[1], obs[0]), obs[2]
    torque = speed * (15 - speed**2 / 2 - 15 * np.cos(angle))  # drives the energy to the upright's
    if abs(angle) < 0.6:
        torque = -8 * angle - 2 * speed  # holds the pendulum upright
    return np.array([np.clip(torque, -2, 2)], np.float32)


def builtin_dataset(dataset_id):
    """20,000 transitions (the last episode complete), the same but for the CPU's rounding, of a
    scripted controller that acts at random with probability eps, in cartpole/0.35-v0 0.35; its
    probabilities if it has any. -> (episodes, (observation space, action space), make_env or None,
    reference or None)."""
    twin = dataset_id == "pendulum/0.6-v0"  # of medium: no dataset has two names
    name = r"(pendulum|cartpole)/(random|medium|expert|mixed|0\.\d*[1-9])-v0"
    known = not twin and re.fullmatch(name, dataset_id)
    names = "{pendulum,cartpole}/{random,medium,expert,mixed}-v0 and, by the noise, 0.35-v0 (not "
    names += "0.350; pendulum/0.6 is medium, 0.0 expert)"
    require(known, f"not on disk, and not built in, as are {names}")
    rng, episodes, cartpole = np.random.default_rng(0), [], known[1] == "cartpole"
    noises = {"random": 1, "medium": 0.3 if cartpole else 0.6, "expert": 0, "mixed": None}
    noise = noises[known[2]] if known[2] in noises else float(known[2])
    make_env = partial(gym.make, "CartPole-v1" if cartpole else "Pendulum-v1")
    env = make_env(disable_env_checker=True)
    while sum(len(episode.actions) for episode in episodes) < 20_000:
        eps = rng.uniform() if noise is None else noise
        obs, rows, ended = [env.reset(seed=len(episodes))[0]], [], False
        while not ended:
            action = scripted = scripted_action(dataset_id, obs[-1])
            if rng.uniform() < eps:
                action = rng.integers(2) if cartpole else rng.uniform(-2, 2, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            log_prob = np.log(eps / 2 + (1 - eps) * (action == scripted)) if cartpole else np.nan
            rows.append((action, reward, terminated, truncated, log_prob))
            obs.append(next_obs)
            ended = terminated or truncated
        *columns, log_probs = (np.array(column) for column in zip(*rows, strict=True))
        infos = {"behavior_log_prob": log_probs} if cartpole else {}
        episodes.append(EpisodeBuffer(None, None, None, np.array(obs), *columns, infos))
    reference = (22.0, 500.0) if cartpole else (-1230.0, -146.0)  # random actions, the controller
    return episodes, (env.observation_space, env.action_space), make_env, reference


def open_dataset(dataset_id):
    """What builtin_dataset returns, of a dataset on disk, else built in, else from the hub."""
    root = minari.storage.get_dataset_path()
    folder = root / dataset_id / "data"
    if not folder.exists():
        if dataset_id.startswith(("pendulum/", "cartpole/")):
            source = builtin_dataset(dataset_id)
            print(f"{dataset_id}: built in")
            return source
        versioned = re.search(r"-v\d+$", dataset_id)
        require(versioned, f"the id needs a version, as in {dataset_id}-v0")
        others = sorted(str(x.parent.relative_to(root)) for x in root.glob("**/data"))
        print(f"{dataset_id}: not in {root}, where {others} are; asking the hub", flush=True)
    with blaming(f"to install it by hand, put metadata.json and main_data.hdf5 into {folder}"):
        dataset = minari.load_dataset(dataset_id, download=True)
    print(f"{dataset_id}: read from {root}")
    # AntMaze's umaze: the maze of the evaluation is turned by 180 degrees against the data's.
    make_env = partial(dataset.recover_environment, eval_env="antmaze/umaze" not in dataset_id)
    scores = (dataset.storage.metadata.get(f"ref_{end}_score", "nan") for end in ("min", "max"))
    low, high = map(float, scores)
    reference = (low, high) if -math.inf < low < high < math.inf else None
    its_spaces = dataset.observation_space, dataset.action_space
    return dataset, its_spaces, dataset.env_spec and make_env, reference


def flatten(space, x):
    """Observations (T, ...) of an episode -> (T, O), in the order of gymnasium.spaces.flatten."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return np.concatenate([flatten(part, x[key]) for key, part in parts], 1)
    x = np.asarray(x)
    if isinstance(space, spaces.Discrete):
        one_hot = x[:, None] == np.arange(space.n) + space.start
        known = one_hot.any(1)
        require(known.all(), f"step {known.argmin()}: the observation is not in {space}")
        return one_hot.astype(np.float32)
    rows = isinstance(space, spaces.Box) and (space.dtype != np.uint8 or len(space.shape) < 2)
    require(rows, f"observations of {space} are not supported; images: store features")
    fits = x.shape[1:] == space.shape and x.dtype.kind in "biuf"
    require(fits, f"{x.dtype} observations of shape {x.shape[1:]} are not of {space}")
    return x.astype(np.float32).reshape(len(x), -1)


def read_episode(episode, observation_space, action_space):
    """Obs (T + 1, O), action (T, ...), reward, terminal, behavior_log_prob (T,), all checked."""
    T, log_prob = len(episode.actions), (episode.infos or {}).get("behavior_log_prob")
    log_prob = np.full(T, np.nan) if log_prob is None else np.asarray(log_prob)
    log_prob = log_prob[1:] if len(log_prob) == T + 1 else log_prob  # Minari's row of the reset
    columns = episode.actions, episode.rewards, episode.terminations, episode.truncations, log_prob
    action, reward, terminal, truncated, log_prob = columns = [np.asarray(x) for x in columns]
    obs, shapes = flatten(observation_space, episode.observations), [x.shape for x in columns]
    names = "actions, rewards, terminations, truncations and behavior_log_prob"
    good = 0 < T == len(obs) - 1 and shapes == [(T, *action_space.shape), *4 * [(T,)]]
    require(good, f"{len(obs)} observations need T = {len(obs) - 1}; {names} have shapes {shapes}")
    require(all(x.dtype.kind in "biuf" for x in columns), f"{names} must be plain numbers")
    if isinstance(action_space, spaces.Discrete):
        inside = np.isin(action, np.arange(action_space.n) + action_space.start)
    else:
        slack = 1e-3 * (action_space.high - action_space.low)  # rounding; Units clips it away
        inside = (action >= action_space.low - slack) & (action <= action_space.high + slack)
    ended, last = (terminal != 0) | (truncated != 0), np.arange(T) == T - 1
    for ok, problem in (
        (np.isfinite(obs), "the observation is NaN or infinite"),
        (np.abs(reward.astype(np.float64)) < 1e30, "the reward is NaN, infinite or beyond 1e30"),
        (inside, f"the action is not in {action_space}"),
        (np.isin(terminal, (0, 1)) & np.isin(truncated, (0, 1)), "the end flags must be 0 or 1"),
        (ended | ~last, "the end is neither terminated nor truncated; set truncations[-1] = True"),
        (last | ~ended, "the episode ends here and yet goes on; split it in two"),
    ):
        if not ok.all():
            raise UserError(f"step {np.argwhere(~ok)[0][0]}: {problem}")
    return obs, action, reward.astype(np.float64), terminal != 0, log_prob.astype(np.float64)


def split_id(name):
    """mylab/logs-v0[:80%] -> the id, and where the part begins and ends, in % of the episodes."""
    part = re.fullmatch(r"(.*?)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", name)
    plain = re.fullmatch(r"([^./][^/]*/)*[^./][^/]*", part[1])  # so that no dataset has two names
    require(plain, "an id is needed, as in mylab/logs-v0, not a path")
    first, last = int(part[2] or 0), int(part[3] or 100)
    good = "[" not in part[1] and first < last <= 100
    require(good, "a part is written in whole percent, as [:80%] or [80%:]")
    return part[1], first, last


class Dataset:
    """M transitions of one or more Minari datasets on the device, episode after episode. Nothing is
    dropped: T + 1 observations make T transitions, the last with its true s'."""

    def __init__(self, ids, normalize_obs=False, reward_scale=1.0, reward_shift=0.0, device="cpu"):
        rows, sources, parts = [], [], []
        for name in ids:
            with blaming(f"dataset {name}"):
                whole, first, last = split_id(name)
                apart = (x != whole or last <= start or end <= first for x, start, end in parts)
                require(all(apart), "its episodes would count twice")
                parts.append((whole, first, last))
                episodes, its_spaces, *_ = source = open_dataset(whole)
                self.units = Units(*its_spaces)
                sources.append(source)
                require(its_spaces == sources[0][1], f"its spaces are not those of {ids[0]}")
                numbers = range(-(-first * len(episodes) // 100), -(-last * len(episodes) // 100))
                require(numbers, "it has no episodes")
                for number in numbers:
                    with blaming(f"episode {number}"):
                        rows.append(read_episode(episodes[number], *its_spaces))
        obs, action, reward, terminal, log_prob = zip(*rows, strict=True)
        self.make_env = sources[0][2]  # the environment that the data name, or None
        references = {source[3] for source in sources}  # raw returns that score 0 and 100
        self.reference = references.pop() if len(references) == 1 else None
        self.returns = returns = np.array([r.sum() for r in reward])  # (episodes,) undiscounted
        if reward_scale == "return-range":
            spread, size = np.ptp(returns), max(abs(r).sum() for r in reward)
            reward_scale = 1000 / spread if spread > 1e-9 * size else 1.0
        self.reward_scale, self.reward_shift = reward_scale, reward_shift
        size = f"{sum(map(len, reward))} transitions in {len(rows)} episodes"
        mean_min_max = f"{returns.mean():.1f} ({returns.min():.1f} to {returns.max():.1f})"
        print(f"{size}, return {mean_min_max}; rewards x {reward_scale:.4g} + {reward_shift:.4g}")
        s, next_s = np.concatenate([o[:-1] for o in obs]), np.concatenate([o[1:] for o in obs])
        a, r, d, self.behavior_log_prob = map(np.concatenate, (action, reward, terminal, log_prob))
        with blaming(f"--device {device}"):
            units = self.units.to(device)
            if normalize_obs:
                mean, std = s.mean(0, dtype=np.float64), s.std(0, dtype=np.float64)
                units.obs_mean, units.obs_std = units.tensor(mean), units.tensor(std + 1e-3)
                for i in np.flatnonzero((1e-6 * abs(mean) < std) & (std < 1e-3)):
                    print(f"observation {i} varies by only {std[i]:.2g}: use smaller units for it")
            r, d = units.tensor(r * reward_scale + reward_shift), units.tensor(d)
            self.transitions = Batch(units.obs(s), units.action(a), r, units.obs(next_s), d)
            lengths = torch.tensor([len(r) for r in reward], device=device)
            self.episode = torch.arange(len(rows), device=device).repeat_interleave(lengths)  # (M,)
            self.longest = lengths.max().item()  # steps of an episode

    def batch(self, index):
        return Batch(*(x[index] for x in self.transitions))

    def sample(self, n):
        index = torch.randint(len(self.episode), (n,), device=self.episode.device)
        return Batch(*(x.index_select(0, index) for x in self.transitions))  # faster than x[index]


# ---- Evaluation ----
def find_env(data, env_id, unless="with --eval-episodes 0"):
    """Makes environments of --env-id, else of the data, or None; observations become rows (O,)."""
    make = partial(gym.make, env_id) if env_id else data.make_env
    if make is None:
        print("no evaluation: the data name no environment; --env-id gives one, ope.py needs none")
        return None
    with blaming(f"environment {env_id or 'of the data'} (not needed {unless})"):
        env, space = make(), data.units.observation_space
        limit = env.spec.max_episode_steps or data.longest
        if not env.spec.max_episode_steps:
            print(f"the environment has no time limit: an episode ends after {limit} steps")
        row = spaces.flatten(space, env.reset(seed=0)[0])
        same = len(row) == data.units.obs_dim and env.action_space == data.units.action_space
        require(same, "its spaces are not those of the data")
    to_row = partial(gym.wrappers.TransformObservation, func=partial(spaces.flatten, space))
    settings = {"disable_env_checker": True, "max_episode_steps": limit}
    return lambda: to_row(make(**settings), observation_space=spaces.flatten_space(space))


@torch.random.fork_rng()
def evaluate(policy, make_env, episodes, seed=10_000):
    """Raw returns (episodes,) of the deterministic policy. Episode i is reset with seed + i for all
    methods, so that comparisons are paired."""
    torch.manual_seed(seed)
    envs, returns = [make_env() for _ in range(episodes)], np.zeros(episodes)
    obs = {i: env.reset(seed=seed + i)[0] for i, env in enumerate(envs)}  # of those still alive
    while obs:
        for i, action in zip(list(obs), policy.act(np.stack(list(obs.values()))), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            require(math.isfinite(returns[i]), f"the environment's reward is {reward}")
            if terminated or truncated:
                envs[i].close()
                del obs[i]
    return returns


def q_health(metrics, data, gamma, if_high, if_low):
    """One line on whether to believe the critic: Q at the data's and the policy's actions, against
    the discounted returns in the data and all that their rewards make possible."""
    q_data, q_policy, reward = metrics["q_data"], metrics["q_policy"], data.transitions.reward
    t = torch.arange(len(reward)).to(data.episode) - torch.searchsorted(data.episode, data.episode)
    weight = (1 - gamma ** (t + 1).double()) / (1 - gamma)  # r_t is in t + 1 of the returns
    mean, size = (reward * weight).mean(), (reward.abs() * weight).mean()
    lengths, ends = data.episode.bincount(), data.transitions.terminal.sum()
    fixed = ends == len(lengths) and lengths.min() == lengths.max()  # else they might have gone on
    steps = (1 - bool(fixed) * gamma ** (t.max().item() + 1)) / (1 - gamma)  # discounted
    low, high = reward.min().clamp(max=0).item() * steps, reward.max().clamp(min=0).item() * steps
    line = f"Q(s, pi(s)) = {q_policy:.4g}, Q on the data {q_data:.4g}, where discounted returns "
    line += f"average {mean:.4g}; possible are {low:.4g} to {high:.4g}"
    slack = 0.01 * (high - low)  # of an approximation that is as good as it gets
    if not size:
        return f"{line}: all rewards are 0, nothing can be learned"
    if not 1e-3 < size < 1e4:
        line += "; --reward-scale should bring these returns to about 1 to 1000"
    if max(q_data, q_policy) > high + slack:
        return f"{line}: the critic extrapolates. {if_high}"
    return f"{line}: too pessimistic. {if_low}" if min(q_data, q_policy) < low - slack else line


# ---- The run and its folder ----
def use_cpu_well():
    """One thread, or OMP_NUM_THREADS: a second gains little, and on a busy machine they wait for
    each other. And oneDNN's float32 products, on AMD CPUs up to twice as fast as MKL's, unless the
    CPU would really round to bfloat16 (an error of 2e-3 instead of 1e-6)."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)
    if sys.platform == "linux":  # keep freed memory: to ask for it again costs CQL a fifth
        for limit, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(limit, size)
    x = torch.linspace(0, 1, 256 * 256, device="cpu").view(256, 256)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    exact = x.double() @ x.double()
    if (x @ x - exact).abs().max() > 1e-4 * exact.abs().max():
        torch.backends.mkldnn.matmul.fp32_precision = "none"


LIMITS = {  # of flags, so that none is NaN; of others: counts 1 to 10^9, numbers 0 to 10^9
    **dict.fromkeys(("lr", "critic_lr", "actor_lr", "model_lr", "polyak"), (1e-12, 1)),
    **dict.fromkeys(("hidden", "vae_hidden", "model_hidden", "rollout_length"), (1, 10**4)),
    **dict.fromkeys(("samples", "target_samples", "act_samples"), (1, 10**4)),
    **dict.fromkeys(("reward_shift", "target_gap"), (-(10**9), 10**9)),
    **dict.fromkeys(("threshold", "soft_min", "real_ratio"), (0, 1)),
    **dict.fromkeys(("batch_size", "rollout_starts"), (1, 10**6)),
    **{"seed": (0, 2**32 - 1), "online_steps": (0, 10**8), "top_fraction": (1e-6, 1)},
    **{"eval_every": (0, 10**9), "eval_episodes": (0, 10**4), "reward_scale": (1e-9, 10**9)},
    **{"gamma": (0, 1 - 1e-6), "expectile": (1e-6, 1 - 1e-6), "lam": (1e-6, 10**9)},
    **{"held_out": (0, 0.9), "phi": (0, 2)},
}


def start(args):
    """Checked flags and None, or those of --resume and its checkpoint. Seeds torch."""
    state = None if args.resume is None else read_checkpoint(args.resume)
    if state:
        alone = args == Args(resume=args.resume)
        require(alone, "--resume takes all flags from the run: give no other one beside it")
        complete = Path(args.resume, "result.json").exists()
        require(not complete, f"--resume {args.resume}: it is complete, see result.json there")
        args = state["args"]
    for flag in fields(args):
        value, many = getattr(args, flag.name), isinstance(flag.default, tuple)
        kind = type(flag.default[0] if many else flag.default)
        low, high = LIMITS.get(flag.name, (1, 10**9) if kind is int else (0, 10**9))
        with blaming(f"--{flag.name.replace('_', '-')} {value}"):
            given = (isinstance(value, tuple) and value) or not many
            require(given, "one or more values are needed, as a tuple")
            for x in value if many else (value,):
                require(kind is not int or type(x) is int, "a whole number is needed")
                require(kind is not bool or type(x) is bool, "True or False is needed")
                plain = type(x).__module__ == "builtins"  # a checkpoint takes no others
                require(plain, f"a {type(x).__name__} cannot be saved; str, int or float can")
                number = isinstance(x, int | float) or (kind is float and x != "return-range")
                require(not number or low <= x <= high, f"it must lie in {low:,} to {high:,}")
    use_cpu_well()
    torch.manual_seed(args.seed)
    return args, state


class Run:
    """A run: new, in a folder that is made once all input is found good, or as a checkpoint is."""

    go_on = "nothing had begun"  # what Ctrl-C prints

    def __init__(self, args, data, agent, state):
        self.args, self.data, self.agent, self.began = args, data, agent, time.perf_counter()
        self.policy = Policy(agent, data.units)
        self.make_env = find_env(data, args.env_id) if args.eval_episodes else None
        self.step, self.metrics, self.returns, self.extra = 0, [], [], {}  # extra: of Replay
        self.facts = [len(data.returns), len(data.episode), data.returns.mean().item()]
        if state:
            self.folder = state["folder"]
            with blaming(f"{self.folder}: its checkpoint does not fit"):
                self.began -= state["seconds"]
                self.metrics, self.returns = state["metrics"], state["returns"]
                self.step = self.metrics[-1]["step"] if self.metrics else 0
                self.extra = state["extra"]
                require("facts" in state, "an older version made it: go on with the file in there")
                *size, mean = state["facts"]  # of built-in data the mean depends on the CPU
                same = size == self.facts[:2] and math.isclose(mean, self.facts[2], rel_tol=1e-3)
                require(same, "the data have changed since it began")
                self.policy.load_state_dict(state["policy"])
                torch.set_rng_state(state["rng"])
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        else:
            ids = "+".join(args.dataset_id).replace("/", "-")[:150]
            name = f"{ALGORITHM}__{ids}__s{args.seed}"
            self.folder = Path(args.out_dir, f"{name}__{datetime.now():%Y%m%d-%H%M%S-%f}")
            versions = {p: version(p) for p in ("torch", "numpy", "gymnasium", "minari", "tyro")}
            facts = {"args": asdict(args), "versions": versions | {f"{ALGORITHM}.py": __version__}}
            with blaming(f"--out-dir {args.out_dir}"):
                self.folder.mkdir(parents=True)
            write(self.folder / f"{ALGORITHM}.py", Path(__file__).read_bytes())
            write(self.folder / "args.json", json.dumps(facts, indent=2).encode())
            self.save()  # so that there always is a checkpoint
        if args.compile:
            agent.update = compiled(agent.update, args.device)
        Run.go_on = f"to go on: python {ALGORITHM}.py --resume {shlex.quote(str(self.folder))}"
        if (largest := data.transitions.obs.abs().max()) > 1000:
            print(f"observations reach {largest:.2g}: --normalize-obs may be needed")
        print(f"run folder {self.folder}", flush=True)

    def save(self):
        """All that is needed to go on and to deploy."""
        units, checkpoint = self.data.units, io.BytesIO()
        state = {
            "algorithm": ALGORITHM,
            "args": asdict(self.args),
            "spaces": [serialize_space(x) for x in (units.observation_space, units.action_space)],
            "seconds": time.perf_counter() - self.began,
            "facts": self.facts,
            "metrics": self.metrics,
            "returns": self.returns,
            "policy": self.policy.state_dict(),
            "extra": self.extra,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        torch.save(state, checkpoint)
        table = [(self.metrics or [["step"]])[0], *(row.values() for row in self.metrics)]
        table = [",".join("" if x is None else str(x) for x in line) + "\n" for line in table]
        write(self.folder / "metrics.csv", "".join(table).encode())
        write(self.folder / "checkpoint.pt", checkpoint.getvalue())  # last: the CSV has what it has

    def updates(self, last):
        """The numbers of the updates that are still to do, up to `last`, with a progress bar."""
        self.last = last
        return tqdm(range(self.step + 1, last + 1), initial=self.step, total=last, disable=None)

    def due(self, update, every):
        """Whether `every` updates have passed since the last row, or all."""
        return update == self.last or (every > 0 and update // every > self.step // every)

    def log(self, update, metrics):
        """If it is time: a row of metrics, and a checkpoint, but never of a run that has a NaN."""
        if not self.due(update, self.args.log_every):
            return
        with torch.no_grad(), torch.random.fork_rng():
            probe = slice(None, None, max(1, len(self.data.episode) // 1000))
            metrics = metrics | self.agent.diagnose(self.data.batch(probe))
        row = {"step": update} | {name: value.item() for name, value in metrics.items()}
        mend = "smaller learning rates, --normalize-obs or --reward-scale may help"
        good = f"the last good checkpoint is that of update {self.step} in {self.folder}"
        for name, x in row.items():
            require(math.isfinite(x), f"update {update}: {name} is {x}; {mend}; {good}")
        row |= dict.fromkeys(("return_mean", "return_std", "score"))
        if self.make_env and self.due(update, self.args.eval_every):
            episodes = math.ceil(self.args.eval_episodes / (1 if update == self.last else 10))
            with blaming("evaluation (--eval-episodes 0 does without)"):
                returns = evaluate(self.policy, self.make_env, episodes)
            row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
            if self.data.reference:
                low, high = self.data.reference
                row["score"] = 100 * (row["return_mean"] - low) / (high - low)
            self.returns = returns.tolist()
        tqdm.write(", ".join(f"{name} {x:.5g}" for name, x in row.items() if x is not None))
        self.metrics, self.step = [*self.metrics, row], update
        self.save()

    def finish(self):
        """Prints the result and writes result.json: its presence says that the run is complete."""
        row = dict(self.metrics[-1])
        result = {"algorithm": ALGORITHM, "dataset": "+".join(self.args.dataset_id)}
        result |= {"seed": self.args.seed, "steps": row.pop("step")}
        result |= {"data_return_mean": self.data.returns.mean().item(), **row}
        result["health"] = health(row, self.data, self.args)
        result["seconds"] = time.perf_counter() - self.began
        for name, value in result.items():
            print(f"{name:16}  {value:.5g}" if isinstance(value, float) else f"{name:16}  {value}")
        result["returns"] = self.returns  # episode i was reset with seed 10,000 + i
        write(self.folder / "result.json", json.dumps(result, indent=2).encode())
        return result


def write(path, content):
    """Whole or not at all: under a temporary name, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp")
    with blaming(f"cannot write {path}, what stood there before is whole"):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_checkpoint(folder, device="cpu"):
    """What Run.save wrote, with the folder and its flags as Args."""
    with blaming(f"{folder}: not a run of {ALGORITHM}.py"):
        try:
            state = torch.load(f"{folder}/checkpoint.pt", device, weights_only=True)
        except Exception as error:  # torch's own message advises to load what is not safe
            raise UserError(f"no readable checkpoint.pt, {type(error).__name__}") from error
        require(state["algorithm"] == ALGORITHM, f"it is one of {state['algorithm']}.py")
        good = all((x < math.inf).all() for x in state["policy"].values())  # log_alpha may be -inf
        require(good, "its checkpoint.pt has weights that are NaN or infinite")
        return state | {"folder": Path(folder), "args": Args(**state["args"])}


def load_policy(folder, device="cpu"):
    """The Policy of a run's folder. Needs neither the dataset nor the environment."""
    state = read_checkpoint(folder, device)
    with blaming(f"{folder}: its checkpoint does not fit"), torch.device(device):
        units = Units(*map(deserialize_space, state["spaces"]))
        policy = Policy(Agent(units, state["args"]), units)
        policy.load_state_dict(state["policy"])
    return policy.eval()


def command_line():
    """Runs main with the flags of the command line; what the user can mend is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        alone = args.resume is None or len(sys.argv) < 4  # a flag at its default is one, too
        require(alone, "--resume takes all flags from the run: give no other one beside it")
        main(args)
    except UserError as error:
        sys.exit(f"{ALGORITHM}: {error}")
    except KeyboardInterrupt:
        print(f"\n{ALGORITHM}: stopped; {Run.go_on}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
