"""Model-based Offline Policy Optimization (MOPO): learn the world from the data, practise in it.

An ensemble of networks learns what follows an action. The policy is then trained by SAC on short
imagined rollouts that start at states of the data, and each imagined reward is lowered by how
uncertain the ensemble is: where data are lacking the imagined world is unpleasant, so the policy
has no reason to go there. Where the data are broad but poor, a model pays.

Paper: Yu, Thomas, Yu, Ermon, Zou, Levine, Finn, Ma (2020), arXiv 2005.13239. The policy's side is
SAC (Haarnoja et al. 2018), the ensemble that of PETS (Chua et al. 2018, arXiv 1805.12114).

The model, 7 members i that each predict a Gaussian of y = [s' - s, r]:
  (1) L_model  = sum_i mean[ (mu_i - y)^2 / sigma_i^2 + log sigma_i^2 ]
                 + 0.01 sum(max_logvar - min_logvar) + 1/2 decay |W|^2
  (2) u(s, a)  = max_i |sigma_i(s, a)|                      --uncertainty aleatoric: official code
                 max_i |mu_i(s, a) - mean_j mu_j(s, a)|     --uncertainty disagreement: s' only
A rollout: h steps from states of the data, a ~ pi(.|s), [s' - s, r] ~ N(mu_i, sigma_i^2) of a
random elite member i, cut where a learned classifier of s' says terminal. Stored with
  (3) r~       = r - lambda u(s, a)                                       [MOPO's penalised MDP]
SAC, on batches with a share `real_ratio` of real transitions (their r as it is), the rest model:
  (4) y        = r~ + gamma (1 - terminal) (min_j Q'_j(s', a') - temperature log pi(a'|s')),
                 a' ~ pi(.|s')
  (5) L_Q      = sum_j mean 1/2 (Q_j(s, a) - y)^2
  (6) L_pi     = mean[ temperature log pi(a|s) - min_j Q_j(s, a) ],  a ~ pi(.|s)
  (7) L_temp   = -log(temperature) mean[ log pi(a|s) - A ]
The theory: if the model's error at (s, a) is at most u(s, a), in units that lambda translates to
value, then for every policy the return in the penalised model is a lower bound of the true one.
(2) is a heuristic for such a u, which the theory does not cover.

COMBO (Yu et al. 2021, arXiv 2102.08363), with --conservative beta: no penalty in (3); instead
  (8) L_Q      = (5) + beta sum_j ( mean_model[ log sum_k exp( Q_j(s, a_k) - log mu(a_k) ) ]
                                    - mean_data[ Q_j(s, a) ] )
                 over K = 10 actions a_k from each proposal mu: uniform, pi(.|s), pi(.|s')
MOReL (Kidambi et al. 2020, arXiv 2005.05951) differs from MOPO in (3): where the members disagree,
max_ij |mu_i - mu_j| > threshold, the rollout ends (terminal = 1) with a reward of -kappa.

Symbols: lambda = penalty, h = rollout_length, beta = conservative, Q' = critic_target. N batch, O
observation, A action size, I = 7 members, E = 2 critics.

Metrics: critic_loss (5, 8), actor_loss (6), temperature, entropy; gap, the bracket of (8), with
--conservative; model_reward (mean r~) and model_terminal (share) in the model buffer; on a fixed
sample of the data q_data = Q(s, a_data), q_policy = Q(s, pi(s)), action_distance from pi(s) to
a_data (RMS in units of [-1, 1]), u_data = u(s, a_data), u_policy = u(s, pi(s)). The report on the
model, printed before the policy is trained, is also in the run's folder: model.txt.

Differs from the paper or from the official code:
  D1 Terminals are learned from the data, not written by hand for each task: a classifier of s'
     on balanced batches, cut where a terminal is more likely than not.
  D2 Held out is a tenth of the episodes, not 1000 transitions: neighbours in time are near copies.
  D3 One weight decay (5e-5) for all layers, official are 2.5e-5 to 1e-4; torch's initialisation.
  D4 Target entropy -A, the official code has -3 for every task; COMBO's (8) pushes down at model
     states, where a later implementation takes the whole batch.
  D5 s' - s, r and u are in the networks' units: with --normalize-obs or --reward-scale, lambda is.
  D6 (2), aleatoric, is the official code's, to which its values of lambda belong; in the paper it
     is the norm of the covariance, not of the deviations.

Written from the paper; no code taken from elsewhere. Pendulum, a return of about -135
after a minute on one core:

  python mopo.py

COMBO: python mopo.py --conservative 1 --real-ratio 0.5

On MuJoCo data, with the paper's settings (hours; per task, h is 1 or 5 and lambda 0.5 to 5):

  python mopo.py --dataset-id mujoco/hopper/medium-v0 --hidden 256 256 --model-hidden 200 200 200 \
    200 --rollout-starts 50000 --rollout-every 1000 --penalty 5 --actor-lr 3e-4 --critic-lr 3e-4 \
    --polyak 0.005 --model-epochs 1000 --steps 1000000 --log-every 5000 --eval-every 50000
"""

import csv
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm


@dataclass
class Args:
    # Data and run
    dataset_id: tuple[str, ...] = ("pendulum/mixed-v0",)
    """Minari ids, mixed if several; built in {pendulum,cartpole}/{random,medium,expert,mixed}-v0"""
    env_id: str | None = None
    """Gymnasium environment for the evaluation; default: the one that the dataset names"""
    seed: int = 0
    """seed of the networks, the batches and the sampled actions"""
    steps: int = 5_000
    """gradient updates"""
    log_every: int = 250
    """updates between two rows of metrics.csv, each with a checkpoint"""
    eval_every: int = 1_000
    """updates between two evaluations, a multiple of --log-every; 0: only the final one"""
    eval_episodes: int = 100
    """episodes of the final evaluation, a tenth of it along the way; 0: no evaluation"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu"""
    out_dir: str = "runs"
    """where the run's folder is made"""
    resume: str | None = None
    """folder of a run to go on with; takes all other flags from there"""
    # Optimisation
    batch_size: int = 256
    """transitions per update (N)"""
    hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden layers, for example 256 256"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.01
    """rate of the target networks: Q' <- (1 - polyak) Q' + polyak Q"""
    normalize_obs: bool = False
    """standardise observations by the mean and deviation of the dataset"""
    reward_scale: float | Literal["return-range"] = 1.0
    """factor on the rewards in training; return-range: 1000 / (largest - smallest return)"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training; changes the task where episodes can terminate"""
    # MOPO
    critic_lr: float = 1e-3
    """learning rate of the critic"""
    actor_lr: float = 1e-3
    """learning rate of the policy and the temperature (Box)"""
    model_lr: float = 1e-3
    """learning rate of the model"""
    model_hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden layers of each member of the model"""
    model_epochs: int = 50
    """most passes over the data in training the model; it stops when no member improves"""
    uncertainty: Literal["aleatoric", "disagreement"] = "aleatoric"
    """u in (2): the largest predicted deviation, or the largest distance from the mean member"""
    penalty: float = 1.0
    """lambda in (3); 0: plain model-based rollouts"""
    rollout_length: int = 5
    """h, steps of a rollout"""
    rollout_starts: int = 5_000
    """states of the data that rollouts start from, each time"""
    rollout_every: int = 250
    """updates between two rounds of rollouts; the model buffer has room for 5 full ones"""
    real_ratio: float = 0.05
    """share of real transitions in each batch"""
    conservative: float = 0.0
    """beta in (8): COMBO, without the penalty of (3); 0: MOPO"""


class Agent(nn.Module):
    """SAC on real and imagined transitions."""

    has_density = True

    def __init__(self, data, args):
        super().__init__()
        check_own_args(args, data)
        self.args, self.units = args, data.units
        self.real_rows = round(args.real_ratio * args.batch_size)
        self.model = Model(self.units, args)
        self.model_buffer = ModelBuffer(self.units, 5 * args.rollout_starts * args.rollout_length)
        self.policy = TanhGaussian(self.units, args.hidden)
        self.critic = TwinCritic(self.units, args.hidden)
        self.critic_target = TwinCritic(self.units, args.hidden)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_lr)
        actor_parameters = [*self.policy.parameters(), self.log_temperature]
        self.actor_optimizer = adam(actor_parameters, args.actor_lr)
        self.optimizers = [self.critic_optimizer, self.actor_optimizer]

    @torch.no_grad()
    def rollout(self, data):
        """A round of rollouts into the model buffer, with the rewards of (3). The last step of a
        rollout is not terminal."""
        penalty = 0 if self.args.conservative else self.args.penalty
        obs = data.sample(self.args.rollout_starts).obs
        for _ in range(self.args.rollout_length):
            action = self.policy(obs).sample().tanh()
            reward, next_obs, terminal, u = self.model.step(obs, action)
            assert reward.shape == u.shape == terminal.shape
            self.model_buffer.add(Batch(obs, action, reward - penalty * u, next_obs, terminal))
            obs = next_obs[terminal == 0]

    def sample(self, data):
        """A batch of N: first the real transitions, then those of the model."""
        real = data.sample(self.real_rows)
        model = self.model_buffer.sample(self.args.batch_size - self.real_rows)
        return Batch(*(torch.cat(x) for x in zip(real, model, strict=True)))

    def target(self, batch):
        """(4) y (N,)."""
        with torch.no_grad():
            pi_next = self.policy(batch.next_obs)
            next_action, log_pi = squash(pi_next, pi_next.sample())
            next_q = self.critic_target(batch.next_obs, next_action).min(0).values
            next_v = next_q - self.log_temperature.exp() * log_pi
            return batch.reward + self.args.gamma * (1 - batch.terminal) * next_v

    def critic_loss(self, batch):
        """(5) or, with --conservative, (8), and its parts as metrics. Pushed down are the model
        states alone (D4)."""
        q = self.critic(batch.obs, batch.action)
        td_error = q - self.target(batch)
        assert td_error.shape == (2, *batch.reward.shape)
        critic_loss = 0.5 * (td_error**2).mean(1).sum()
        metrics = {}
        if self.args.conservative:
            model_obs, model_next_obs = (x[self.real_rows :] for x in (batch.obs, batch.next_obs))
            pushed_down = self.soft_maximum(model_obs, model_next_obs).mean(1)  # (E,)
            gap = pushed_down - q[:, : self.real_rows].mean(1)
            critic_loss = critic_loss + self.args.conservative * gap.sum()
            metrics = {"gap": gap.mean()}
        return critic_loss, {"critic_loss": critic_loss} | metrics

    def soft_maximum(self, obs, next_obs):
        """The logarithm in (8) (E, N): of the integral of exp Q(s, .), by importance sampling."""
        shape = (10, len(obs), self.units.action_dim)  # (K, N, A)
        with torch.no_grad():
            pi, pi_next = self.policy(obs), self.policy(next_obs)
            uniform = torch.empty(shape, device=obs.device).uniform_(-1, 1)
            log_uniform = torch.full(shape[:2], -shape[2] * math.log(2), device=obs.device)
            a_pi, log_pi = squash(pi, pi.sample(shape[:1]))
            a_next, log_next = squash(pi_next, pi_next.sample(shape[:1]))  # valued at s, not at s'
            actions = torch.cat([uniform, a_pi, a_next])  # (3K, N, A)
            log_mu = torch.cat([log_uniform, log_pi, log_next])  # (3K, N)
        q = self.critic(obs.expand(len(actions), *obs.shape), actions)  # (E, 3K, N)
        return (q - log_mu).logsumexp(1)

    def actor_loss(self, batch):
        """(6) + (7), one loss: the temperature is a constant in (6) and the policy in (7), where
        the target of the entropy is -A (D4)."""
        pi = self.policy(batch.obs)
        action, log_pi = squash(pi, pi.rsample())
        temperature = self.log_temperature.exp().detach()
        q = self.critic(batch.obs, action).min(0).values
        assert q.shape == log_pi.shape == batch.reward.shape
        actor_loss = (temperature * log_pi - q).mean()
        temperature_loss = -self.log_temperature * (log_pi.detach() - self.units.action_dim).mean()
        metrics = {"actor_loss": actor_loss, "temperature": temperature, "entropy": -log_pi.mean()}
        return actor_loss + temperature_loss, metrics

    def update(self, batch):
        """One gradient step. Returns metrics as tensors: nothing waits for the device."""
        actor_loss, actor_metrics = self.actor_loss(batch)
        critic_loss, critic_metrics = self.critic_loss(batch)
        step(self.actor_optimizer, actor_loss)  # both losses are of the networks before the step
        step(self.critic_optimizer, critic_loss)
        polyak_update(self.critic_target, self.critic, self.args.polyak)
        return critic_metrics | actor_metrics

    def diagnose(self, batch):
        """How Q, the policy's mean action and the model's uncertainty stand to the data."""
        action = self.policy(batch.obs).mean.tanh()
        imagined = self.model_buffer.all()
        return {
            "q_data": self.critic(batch.obs, batch.action).min(0).values.mean(),
            "q_policy": self.critic(batch.obs, action).min(0).values.mean(),
            "action_distance": ((action - batch.action) ** 2).mean().sqrt(),
            "u_data": self.model.uncertainty(*self.model(batch.obs, batch.action)).mean(),
            "u_policy": self.model.uncertainty(*self.model(batch.obs, action)).mean(),
            "model_reward": imagined.reward.mean(),
            "model_terminal": imagined.terminal.mean(),
        }

    def health(self, metrics, data):
        knob = "--conservative" if self.args.conservative else "--penalty"
        return q_health(metrics, data, self.args.gamma, f"Raise {knob}.", f"Lower {knob}.")

    @torch.no_grad()
    def act(self, obs, deterministic=True):
        """Raw observations (N, ...) -> environment actions (N, ...), tanh(mean) or a sample."""
        pi = self.policy(self.units.obs(obs))
        return self.units.env_action((pi.mean if deterministic else pi.sample()).tanh())

    @torch.no_grad()
    def log_prob(self, obs, action):
        """log pi(a|s) (N,) of raw observations and environment actions (N, ...), in their units."""
        u = self.units.action(action).clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        log_prob = squash(self.policy(self.units.obs(obs)), u)[1]
        return log_prob - self.units.half_range.log().sum()


def check_own_args(args, data):
    if data.units.discrete:
        others = "bc.py, cql.py, iql.py, bcq.py and awac.py"
        raise UserError(f"MOPO needs Box actions, these are Discrete, which {others} support")
    for name in ("model_epochs", "rollout_length", "rollout_starts", "rollout_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if not all(width > 0 for width in args.model_hidden):
        raise UserError("--model-hidden: widths must be positive")
    if args.penalty < 0 or args.conservative < 0 or not 0 <= args.real_ratio <= 1:
        raise UserError("--penalty and --conservative must be at least 0, --real-ratio in [0, 1]")
    if args.conservative and not 0 < round(args.real_ratio * args.batch_size) < args.batch_size:
        raise UserError("--conservative needs real and model transitions: --real-ratio 0.5")
    if data.all and len(data.returns) < 2:
        raise UserError("MOPO holds out whole episodes: the data must have at least two")


class Model(nn.Module):
    """P(s', r, terminal | s, a): an ensemble of Gaussians for s' and r, a classifier of s'."""

    members, elite_members = 7, 5

    def __init__(self, units, args):
        super().__init__()
        O, A = units.obs_dim, units.action_dim  # noqa: E741
        self.disagreement = args.uncertainty == "disagreement"
        self.net = MLP(self.members, O + A, *args.model_hidden, 2 * (O + 1))
        self.max_logvar = nn.Parameter(torch.full((O + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((O + 1,), -10.0))
        self.end = MLP(1, O, *args.model_hidden, 1)
        self.register_buffer("end_threshold", torch.tensor(math.inf))  # never, until it is trained
        self.register_buffer("input_mean", torch.zeros(O + A))
        self.register_buffer("input_std", torch.ones(O + A))
        self.register_buffer("elites", torch.arange(self.elite_members))

    def forward(self, obs, action):
        """(N, .), or (I, N, .) for each member its own -> mu, log sigma^2 of y (I, N, O + 1)."""
        x = (torch.cat([obs, action], -1) - self.input_mean) / self.input_std
        x = x.expand(self.members, *x.shape[-2:])
        *hidden, (last_weight, last_bias) = zip(self.net.weight, self.net.bias, strict=True)
        for weight, bias in hidden:  # MLP with x sigmoid(x) in place of ReLU: a smooth world
            x = F.silu(torch.baddbmm(bias, x, weight))
        mean, logvar = torch.baddbmm(last_bias, x, last_weight).chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def loss(self, obs, action, y):
        """(1), each member on its own batch: obs, action, y (I, N, .)."""
        mean, logvar = self(obs, action)
        nll = (mean - y) ** 2 * (-logvar).exp() + logvar
        assert nll.shape == y.shape
        bounds = (self.max_logvar - self.min_logvar).sum()
        decay = sum((weight**2).sum() for weight in self.net.weight)
        return nll.mean((1, 2)).sum() + 0.01 * bounds + 0.5 * 5e-5 * decay  # D3

    def uncertainty(self, mean, logvar):
        """(2) u (N,), over all members, from mu and log sigma^2 (I, N, O + 1)."""
        if self.disagreement:
            return (mean - mean.mean(0))[..., :-1].norm(dim=-1).amax(0)
        return (logvar / 2).exp().norm(dim=-1).amax(0)

    def end_logit(self, obs):
        """log odds (N,) of terminal at s' = obs (N, O), in balanced data."""
        O = obs.shape[1]  # noqa: E741
        return self.end((obs - self.input_mean[:O]) / self.input_std[:O])[0, :, 0]

    def step(self, obs, action):
        """A step in the imagined world: reward (N,), next_obs (N, O), terminal (N,), u (N,)."""
        mean, logvar = self(obs, action)
        choice = torch.randint(len(self.elites), (len(obs),), device=obs.device)
        member, row = self.elites[choice], torch.arange(len(obs), device=obs.device)
        y = torch.normal(mean[member, row], (logvar[member, row] / 2).exp())
        next_obs = obs + y[:, :-1]
        terminal = (self.end_logit(next_obs) > self.end_threshold).float()
        return y[:, -1], next_obs, terminal, self.uncertainty(mean, logvar)


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

    def batch(self, index):
        obs, action, reward, next_obs, terminal = self.rows[index].split(self.widths, 1)
        return Batch(obs, action, reward[:, 0], next_obs, terminal[:, 0])

    def sample(self, n):
        size = self.added.clamp(max=len(self.rows))  # a tensor: the host need not know it
        return self.batch((torch.rand(n, device=self.rows.device) * size).long())

    def all(self):
        return self.batch(slice(min(int(self.added), len(self.rows))))


def train_model(model, data, args):
    """Fits the ensemble and the classifier of terminals. Returns the held-out transitions, (H,)."""
    episodes = torch.randperm(len(data.returns), device=data.train.device)
    is_held = torch.isin(data.episode, episodes[: math.ceil(len(episodes) / 10)])  # D2
    train, held = data.train[~is_held], data.train[is_held]
    train_ensemble(model, data, train, held, args)
    train_end(model, data, train, args)
    return held


def model_target(batch):
    """y = [s' - s, r], (N, O + 1)."""
    return torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)


@torch.no_grad()
def squared_error(model, batch):
    """Mean squared error of each member, (I,)."""
    return ((model(batch.obs, batch.action)[0] - model_target(batch)) ** 2).mean((1, 2))


def train_ensemble(model, data, train, held, args):
    """(1), until no member has improved on the held-out transitions by 1% for 5 epochs. Each member
    learns from its own bootstrap sample and goes back to its best weights; the elites are the best
    members. As in the official code the error of the means decides: sigma, which settles later, is
    then often too wide, as the report's "within 1 sigma" shows."""
    x = torch.cat([data.all.obs, data.all.action], 1)[train]
    model.input_mean.copy_(x.mean(0))
    model.input_std.copy_(torch.where(x.std(0) > 1e-6, x.std(0), 1.0))
    y, held_out = model_target(data.all), data.batch(held)
    bounds = [model.max_logvar, model.min_logvar]
    optimizer = adam([*model.net.parameters(), *bounds], args.model_lr)
    best = [p.detach().clone() for p in model.net.parameters()]
    best_error, waited = torch.full((model.members,), math.inf, device=x.device), 0
    rows = train[torch.randint(len(train), (model.members, len(train)), device=x.device)]
    with tqdm(total=args.model_epochs, desc="model", disable=None, dynamic_ncols=True) as bar:
        for _ in range(args.model_epochs):
            rows = rows.gather(1, torch.rand(rows.shape, device=x.device).argsort(1))
            for index in rows.split(args.batch_size, 1):  # (I, N)
                step(optimizer, model.loss(data.all.obs[index], data.all.action[index], y[index]))
            error = squared_error(model, held_out)
            if not error.isfinite().all():
                raise UserError("the model's held-out error is not finite: lower --model-lr")
            improved = error < 0.99 * best_error
            for kept, p in zip(best, model.net.parameters(), strict=True):
                kept[improved] = p.detach()[improved]
            best_error = best_error.where(~improved, error)
            waited = 0 if improved.any() else waited + 1
            bar.update()
            bar.set_postfix(held_out_error=f"{best_error.mean():.3g}")
            if waited == 5:
                break
    with torch.no_grad():
        for p, kept in zip(model.net.parameters(), best, strict=True):
            p.copy_(kept)
    model.elites.copy_(best_error.argsort()[: model.elite_members])


def train_end(model, data, train, args):
    """D1: the classifier learns from batches that are half terminal, which the data rarely are; the
    threshold turns its log odds back into those of the data. Without terminals it stays off; where
    all transitions are terminal, all imagined ones are."""
    is_end = data.all.terminal[train] == 1
    ends, others = train[is_end], train[~is_end]
    if not len(ends) or not len(others):
        model.end_threshold.fill_(-math.inf if len(ends) else math.inf)
        return
    updates, half = 4_000, 128
    optimizer = adam(model.end.parameters(), args.model_lr)
    schedule = CosineAnnealingLR(optimizer, updates)  # or the last batches shift the threshold
    label = torch.cat([torch.ones(half), torch.zeros(half)]).to(train.device)
    for _ in tqdm(range(updates), desc="terminals", disable=None, dynamic_ncols=True):
        index = torch.cat([x[torch.randint(len(x), (half,))] for x in (ends, others)])
        logit = model.end_logit(data.all.next_obs[index])
        step(optimizer, F.binary_cross_entropy_with_logits(logit, label))
        schedule.step()
    model.end_threshold.fill_(math.log(len(others) / len(ends)))


class TwinCritic(nn.Module):
    """Two Q(s, a) for Box actions: obs (..., O), action (..., A) -> (2, ...)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(2, units.obs_dim + units.action_dim, *hidden, 1)

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1)
        return self.net(x.flatten(0, -2)).view(2, *x.shape[:-1])


class TanhGaussian(nn.Module):
    """pi(.|s) before tanh: obs (N, O) -> Normal with mean and deviation (N, A)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(1, units.obs_dim, *hidden, 2 * units.action_dim)

    def forward(self, obs):
        mean, log_std = self.net(obs)[0].chunk(2, -1)
        return Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)


def squash(pi, u):
    """u (..., A) drawn from pi -> a = tanh(u) and log pi(a|s) (...), by the change of variables."""
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), never log of 0
    return u.tanh(), (pi.log_prob(u) - log_slope).sum(-1)


# ---- Plumbing, the same in every file: a reader of the method can stop here ----


# >>> shared: optim   (the same in every file; tests/test_copies.py keeps it so)
class MLP(nn.Module):
    """ReLU networks side by side, one batched product per layer: x (N, I), the same for all, or
    (members, N, I) -> (members, N, O)."""

    def __init__(self, members, *sizes):
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):  # initialised as torch.nn.Linear
            self.weight.append(torch.empty(members, i, o).uniform_(-(i**-0.5), i**-0.5))
            self.bias.append(torch.empty(members, 1, o).uniform_(-(i**-0.5), i**-0.5))

    def forward(self, x):
        *hidden, (last_weight, last_bias) = zip(self.weight, self.bias, strict=True)
        x = x.expand(len(last_weight), *x.shape[-2:])
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(last_bias, x, last_weight)


def adam(parameters, lr):
    return torch.optim.Adam(list(parameters), lr=lr, fused=True)


def step(optimizer, loss):
    """One gradient step. Only the optimiser's own parameters get gradients: an actor's loss leaves
    none in the critic, and no time is spent on them."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient
    optimizer.step()


@torch.no_grad()
def polyak_update(target, source, rate):
    """target <- (1 - rate) target + rate source."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.lerp_(s, rate)


def pick(values, index):
    """values (N, A), index (N,) -> values[n, index[n]] (N,)."""
    return values.gather(1, index[:, None])[:, 0]


# <<< shared: optim


# >>> shared: data   (the same in every file; tests/test_copies.py keeps it so)
class UserError(Exception):
    """Bad input, or a run that has to stop: one line on what is wrong, where, and what to do."""


class Batch(NamedTuple):
    """N transitions in network units (Units). terminal is 1.0 where the MDP ended, and only there:
    a time limit (truncation) bootstraps."""

    obs: torch.Tensor  # (N, O) float32
    action: torch.Tensor  # (N, A) float32 in [-1, 1], or (N,) int64 from 0
    reward: torch.Tensor  # (N,) float32, scaled and shifted
    next_obs: torch.Tensor  # (N, O) float32
    terminal: torch.Tensor  # (N,) float32


class Units(nn.Module):
    """Translates between the environment's units and the networks'. Its buffers are saved with the
    agent, so that nobody who uses the trained policy can forget them."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.obs_dim = spaces.flatdim(observation_space)
        self.action_dim = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.register_buffer("obs_mean", torch.zeros(self.obs_dim))
        self.register_buffer("obs_std", torch.ones(self.obs_dim))
        low, high = (0, 1) if self.discrete else (action_space.low, action_space.high)
        self.register_buffer("center", self.tensor((low + high) / 2.0).flatten())
        self.register_buffer("half_range", self.tensor((high - low) / 2.0).flatten())

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.obs_mean.device)

    def obs(self, obs):
        """(N, ...) -> (N, O), standardised. Dict and Tuple as rows that gymnasium.spaces.flatten
        made with self.observation_space: an environment may order its keys otherwise."""
        return (self.tensor(obs).reshape(len(obs), self.obs_dim) - self.obs_mean) / self.obs_std

    def action(self, action):
        """Environment actions (N, ...) -> (N, A) in [-1, 1], or (N,) int64 from 0."""
        if self.discrete:
            return self.tensor(action).long() - int(self.action_space.start)
        action = self.tensor(action).reshape(len(action), self.action_dim)
        return ((action - self.center) / self.half_range).clamp(-1, 1)

    def env_action(self, action):
        """The inverse of `action`: an array (N, ...) for env.step."""
        if self.discrete:
            return action.cpu().numpy() + self.action_space.start
        action = (self.center + action * self.half_range).cpu().numpy()
        action = action.reshape(-1, *self.action_space.shape)
        return action.clip(self.action_space.low, self.action_space.high)


@dataclass
class Data:
    """M transitions on the device, episode after episode."""

    units: Units
    all: Batch | None = None  # of M transitions
    episode: torch.Tensor | None = None  # (M,) int64, the episode of each transition
    train: torch.Tensor | None = None  # (M,) int64, the transitions that `sample` draws from
    behavior_log_prob: np.ndarray | None = None  # (M,) float64, as logged; NaN where it was not
    returns: np.ndarray | None = None  # (episodes,) undiscounted raw returns
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reference: tuple | None = None  # raw returns that score 0 and 100
    make_env: Callable | None = None  # for the evaluation; None without an environment

    def batch(self, index):
        return Batch(*(x[index] for x in self.all))

    def sample(self, n):
        index = torch.randint(len(self.train), (n,), device=self.train.device)
        return self.batch(self.train[index])

    def discounted_returns(self, gamma):
        """(M,) discounted sum of the rewards from each transition to the end of its episode."""
        reward, episode = self.all.reward.tolist(), [*self.episode.tolist(), -1]
        returns = [0.0] * len(episode)
        for t in reversed(range(len(reward))):
            returns[t] = reward[t] + gamma * returns[t + 1] * (episode[t] == episode[t + 1])
        return np.array(returns[:-1])


BUILTIN = {  # probability of a uniformly random action; None: drawn from U(0, 1) for each episode
    "pendulum/random-v0": 1.0,
    "pendulum/medium-v0": 0.6,
    "pendulum/expert-v0": 0.0,
    "pendulum/mixed-v0": None,
    "cartpole/random-v0": 1.0,
    "cartpole/medium-v0": 0.3,
    "cartpole/expert-v0": 0.0,
    "cartpole/mixed-v0": None,
}


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
    """20,000 transitions (the last episode complete), the same in every run, but for the last bits
    of another CPU's sines: a scripted controller that acts uniformly at random with probability
    eps. CartPole's log the probability of their actions; Pendulum's policy, part point mass, has no
    density. Returns what open_dataset returns."""
    cartpole = dataset_id.startswith("cartpole")
    make_env = partial(gym.make, "CartPole-v1" if cartpole else "Pendulum-v1")
    env, rng = make_env(disable_env_checker=True), np.random.default_rng(0)
    episodes, size = [], 0
    while size < 20_000:
        eps = rng.uniform() if BUILTIN[dataset_id] is None else BUILTIN[dataset_id]
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
        size += len(rows)
    reference = (22.0, 500.0) if cartpole else (-1230.0, -146.0)  # random actions, the controller
    return episodes, env.observation_space, env.action_space, make_env, reference


def open_dataset(dataset_id):
    """(episodes, observation space, action space, make_env or None, reference or None)."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    folder = root / dataset_id / "data"
    if dataset_id in BUILTIN and not folder.exists():
        print(f"{dataset_id}: built in, generated in memory")
        return builtin_dataset(dataset_id)
    if dataset_id.split("/")[0] in ("pendulum", "cartpole") and not folder.exists():
        raise UserError(f"dataset {dataset_id}: unknown; built in are {', '.join(BUILTIN)}")
    if not (folder.exists() or dataset_id.rpartition("-v")[2].isdigit()):
        raise UserError(f"dataset {dataset_id}: the id needs a version, as in {dataset_id}-v0")
    try:
        if not folder.exists():
            print(f"{dataset_id}: not in {root}, downloading")
            minari.download_dataset(dataset_id)
        dataset = minari.load_dataset(dataset_id)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:  # Minari and its backends raise anything from KeyError to OSError
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(
            f"dataset {dataset_id}: cannot be loaded ({reason}); to install it by hand, put its "
            f"metadata.json and main_data.hdf5 into {folder}"
        ) from error
    print(f"{dataset_id}: read from {root}")
    # The evaluation maze of AntMaze's umaze sets is turned by 180 degrees against that of the data.
    eval_env = "antmaze/umaze" not in dataset_id
    make_env = dataset.env_spec and partial(dataset.recover_environment, eval_env=eval_env)
    reference = [dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    known = None not in reference and reference[0] != reference[1]
    reference = tuple(map(float, reference)) if known else None
    return episodes, dataset.observation_space, dataset.action_space, make_env, reference


def check_spaces(observation_space, action_space, where):
    """Box and Discrete; as observations also Dict and Tuple of these."""
    if isinstance(observation_space, spaces.Dict | spaces.Tuple):
        for key in part_keys(observation_space):
            check_spaces(observation_space[key], action_space, where)
    elif not isinstance(observation_space, spaces.Box | spaces.Discrete):
        raise UserError(f"{where}: observations of {observation_space} are not supported")
    elif observation_space.dtype == np.uint8 and len(observation_space.shape) > 1:
        raise UserError(f"{where}: image observations are not supported; store features instead")
    box = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
    if not (box or isinstance(action_space, spaces.Discrete)):
        raise UserError(f"{where}: actions of {action_space} are not supported")
    if box and not (action_space.is_bounded() and (action_space.low < action_space.high).all()):
        raise UserError(f"{where}: {action_space} has no finite bounds to scale actions by")


def part_keys(space):
    return list(space.spaces) if isinstance(space, spaces.Dict) else range(len(space.spaces))


def flatten(space, x, where):
    """Observations (T, ...) of an episode -> (T, O), in the order of gymnasium.spaces.flatten."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        keys = part_keys(space)
        found = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, tuple) else []
        if set(found) != set(keys):
            raise UserError(f"{where}: its observations do not have the parts of {space}")
        parts = [flatten(space[k], x[k], where) for k in keys]
        if len({len(part) for part in parts}) > 1:
            raise UserError(f"{where}: the parts of its observations differ in length")
        return np.concatenate(parts, axis=1)
    x = np.asarray(x)
    if x.shape[1:] != space.shape or x.dtype.kind not in "biuf":
        found = f"shape {x.shape[1:]} and type {x.dtype}"
        raise UserError(f"{where}: observations of {found} do not fit {space}")
    if isinstance(space, spaces.Discrete):
        inside = np.isin(x, np.arange(space.n) + space.start)  # False for 0.5 and NaN
        if not inside.all():
            raise UserError(f"{where}: step {inside.argmin()}: the observation is not in {space}")
        return np.eye(space.n)[x.astype(np.int64) - space.start]
    return x.reshape(len(x), -1)


def read_episode(episode, observation_space, action_space, where):
    """Checks what Minari does not; returns obs (T + 1, O), action (T, ...), reward, terminal and
    behavior_log_prob (T,) as arrays."""

    def check(ok, problem):
        if not ok:
            raise UserError(f"{where}: {problem}")

    def check_steps(ok, problem):
        bad = np.argwhere(~ok)  # each row starts with the step
        check(len(bad) == 0, f"step {bad[:1, :1].sum()}: {problem}")

    obs = flatten(observation_space, episode.observations, where).astype(np.float32)
    action, reward = np.asarray(episode.actions), np.asarray(episode.rewards)
    terminal, truncated = (np.asarray(x) for x in (episode.terminations, episode.truncations))
    log_prob = (episode.infos or {}).get("behavior_log_prob")
    T = len(action)
    log_prob = np.full(T, np.nan) if log_prob is None else np.asarray(log_prob)
    check(T > 0, "it has no steps")
    check(
        len(obs) == T + 1, f"{len(obs)} observations for {T} actions, one more is needed: the last"
    )
    named = {"rewards": reward, "terminations": terminal, "truncations": truncated}
    for name, x in named.items():
        check(
            x.shape == (T,) and x.dtype.kind in "biuf",
            f"{name} must be {T} numbers, one per action",
        )
    check(
        log_prob.shape in ((T,), (T + 1,)) and log_prob.dtype.kind in "iuf",
        f"infos['behavior_log_prob'] must be {T} numbers, one per action",
    )
    for name in ("terminations", "truncations"):
        check_steps(np.isin(named[name], (0, 1)), f"{name} must be True or False")
    check_steps(np.isfinite(obs), "the observation is NaN or infinite")
    check_steps(np.isfinite(reward), "the reward is NaN or infinite")
    if isinstance(action_space, spaces.Discrete):
        check(action.shape == (T,) and action.dtype.kind in "iu", f"actions must be {T} integers")
        low, high, slack = action_space.start, action_space.start + action_space.n - 1, 0
    else:
        shape = (T, *action_space.shape)
        found = f"shape {action.shape} and type {action.dtype}"
        check(
            action.shape == shape and action.dtype.kind in "iuf",
            f"actions of {found}, not of shape {shape} and numbers",
        )
        low, high = action_space.low, action_space.high
        slack = 1e-3 * (high - low)  # rounding; Units clips it away
    inside = (action >= low - slack) & (action <= high + slack)  # False for NaN
    check_steps(inside, f"the action is not in {action_space}")
    ended = (terminal + truncated) > 0
    check(ended[-1], "the last step is neither terminated nor truncated; where a log just stops, "
          "set truncations[-1] = True")  # fmt: skip
    check_steps(~ended[:-1], "the episode ends here and yet goes on; split it in two")
    return obs, action, reward, terminal, log_prob[-T:]


def load_dataset(dataset_id, env_id, normalize_obs, reward_scale, reward_shift, device):
    """Minari ids (a tuple) -> Data. Everything is checked; a UserError names dataset, episode and
    step. Nothing is dropped: T + 1 observations make T transitions, the last with its true s'."""
    rows, sources = [], [open_dataset(name) for name in dataset_id]
    _, observation_space, action_space, make_env, reference = sources[0]
    for name, (episodes, *its_spaces, _, its_reference) in zip(dataset_id, sources, strict=True):
        check_spaces(*its_spaces, f"dataset {name}")
        if its_spaces != [observation_space, action_space]:
            raise UserError(f"dataset {name}: its spaces are not those of {dataset_id[0]}")
        reference = reference if its_reference == reference else None
        for number, episode in enumerate(episodes):
            where = f"dataset {name}, episode {number}"
            rows.append(read_episode(episode, observation_space, action_space, where))
    if not rows:
        raise UserError(f"dataset {dataset_id[0]}: it has no episodes")
    obs, action, reward, terminal, log_prob = zip(*rows, strict=True)
    lengths, returns = [len(r) for r in reward], np.array([r.sum() for r in reward])
    range_ = f"{returns.mean():.1f} on average, {returns.min():.1f} to {returns.max():.1f}"
    print(f"{sum(lengths)} transitions in {len(rows)} episodes, return {range_}")
    if reward_scale == "return-range":
        reward_scale = 1000 / (np.ptp(returns) or 1000)
        print(f"--reward-scale return-range is {reward_scale:.4g}; 1 where all returns are equal")

    units = Units(observation_space, action_space)
    s, next_s = (np.concatenate(x) for x in zip(*((o[:-1], o[1:]) for o in obs), strict=True))
    if normalize_obs:
        units.obs_mean = units.tensor(s.mean(0, dtype=np.float64))
        units.obs_std = units.tensor(s.std(0, dtype=np.float64) + 1e-3)
    a, r, d = np.concatenate(action), np.concatenate(reward), units.tensor(np.concatenate(terminal))
    r = units.tensor(r * reward_scale + reward_shift)
    batch = Batch(units.obs(s), units.action(a), r, units.obs(next_s), d)
    if units.discrete and (unused := set(range(units.action_dim)) - set(batch.action.tolist())):
        print(f"note: actions {sorted(unused)} (counted from 0) never occur in the data")
    return Data(
        units=units.to(device),
        all=Batch(*(x.to(device) for x in batch)),
        episode=torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(device),
        train=torch.arange(len(r), device=device),
        behavior_log_prob=np.concatenate(log_prob),
        returns=returns,
        reward_scale=reward_scale,
        reward_shift=reward_shift,
        reference=reference,
        make_env=find_env(make_env, env_id, units, max(lengths)),
    )


def find_env(make_env, env_id, units, longest):
    """The evaluation's environment: --env-id, else the dataset's, else None with the reason."""
    make_env = partial(gym.make, env_id) if env_id else make_env
    if make_env is None:
        print("no evaluation: the data name no environment; --env-id gives one, ope.py needs none")
        return None
    make_env = partial(make_env, disable_env_checker=True)
    try:
        env = make_env()
        spaces.flatten(units.observation_space, env.reset(seed=0)[0])
    except Exception as error:  # whatever the environment's package raises
        problem = f"environment {env_id or 'of the data'}: {error}".split("\n")[0]
        if env_id:
            raise UserError(problem) from error
        print(f"no evaluation: {problem}")
        return None
    check_spaces(env.observation_space, env.action_space, f"environment {env.spec.id}")
    its, ours = (
        (u.obs_dim, u.action_dim, u.discrete)
        for u in (Units(env.observation_space, env.action_space), units)
    )
    if its != ours:
        raise UserError(f"environment {env.spec.id}: its spaces are not those of the data")
    print(f"evaluation in {env.spec.id}")
    if env.spec.max_episode_steps is None:  # or an episode could run for ever
        make_env = partial(make_env, max_episode_steps=longest)
    return make_env


# <<< shared: data


# >>> shared: evaluate   (the same in every file; tests/test_copies.py keeps it so)
@torch.no_grad()
def evaluate(agent, make_env, episodes, seed=10_000):
    """Undiscounted raw returns (episodes,) of the deterministic policy; episode i is reset with
    seed + i, the same for all methods, so that comparisons are paired. One environment for each;
    a finished one is not stepped. Leaves torch's random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        space = agent.units.observation_space
        envs = [make_env() for _ in range(episodes)]
        obs = [spaces.flatten(space, env.reset(seed=seed + i)[0]) for i, env in enumerate(envs)]
        returns, alive = np.zeros(episodes), list(range(episodes))
        while alive:
            for i, action in zip(alive, agent.act(np.stack([obs[i] for i in alive])), strict=True):
                next_obs, reward, terminated, truncated, _ = envs[i].step(action)
                obs[i] = None if terminated or truncated else spaces.flatten(space, next_obs)
                returns[i] += reward
            alive = [i for i in alive if obs[i] is not None]
        for env in envs:
            env.close()
        return returns


# <<< shared: evaluate


# >>> shared: health   (the same in every file with a critic; tests/test_copies.py keeps it so)
def q_health(metrics, data, gamma, if_high, if_low):
    """One line on whether to believe the critic: Q on the data and at the policy's actions, against
    the returns that the rewards in the data make possible, and the discounted ones in the data."""
    low = min(0.0, data.all.reward.min().item()) / (1 - gamma)
    high = max(0.0, data.all.reward.max().item()) / (1 - gamma)
    q_data, q_policy = metrics["q_data"], metrics["q_policy"]
    if q_policy > high:
        what = f"Q(s, pi(s)) = {q_policy:.4g} exceeds every return possible ({high:.4g})"
        return f"{what}: the critic extrapolates. {if_high}"
    if q_policy < low:
        what = f"Q(s, pi(s)) = {q_policy:.4g} is below every return possible ({low:.4g})"
        return f"{what}: the critic is too pessimistic. {if_low}"
    if not low <= q_data <= high:
        what = f"Q on the data = {q_data:.4g} is no possible return ({low:.4g} to {high:.4g})"
        return f"{what}, Q(s, pi(s)) = {q_policy:.4g}: the critic is wrong even on the data."
    mean = data.discounted_returns(gamma).mean()
    data_q = f"Q on the data {q_data:.4g}, where discounted returns average {mean:.4g}"
    return f"Q(s, pi(s)) = {q_policy:.4g}, {data_q}; possible are {low:.4g} to {high:.4g}"


# <<< shared: health


# >>> shared: run   (the same in every file; tests/test_copies.py keeps it so)
ALGORITHM = Path(__file__).stem


@dataclass
class Run:
    """A training run: what it needs, and how far it is."""

    args: Args
    data: Data
    agent: nn.Module
    folder: Path
    began: float  # time.perf_counter() at the start, less the time before a resume
    step: int = 0  # of the last checkpoint
    metrics: list = field(default_factory=list)  # the rows of metrics.csv
    returns: list = field(default_factory=list)  # the rows of returns.csv


def check_args(args):
    """Ranges of the flags that the files have in common; a method checks its own ones."""
    limits = {"seed": 0, "eval_every": 0, "eval_episodes": 0}
    limits |= {"steps": 1, "log_every": 1, "batch_size": 1}
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in limits and value < limits[name]:
            raise UserError(f"{flag}: it must be at least {limits[name]}")
        if (name.endswith("lr") or name == "polyak") and not 0 < value <= 1:
            raise UserError(f"{flag}: it must lie in (0, 1]")
        if name == "gamma" and not 0 <= value < 1:
            raise UserError(f"{flag}: it must lie in [0, 1)")
        if name == "reward_scale" and value != "return-range" and not 0 < value < math.inf:
            raise UserError(f"{flag}: it must be positive")
        if name == "reward_shift" and not math.isfinite(value):
            raise UserError(f"{flag}: it must be a number")
        if name == "hidden" and not all(width > 0 for width in value):
            raise UserError(f"{flag}: widths must be positive")
    if args.eval_every % args.log_every:
        raise UserError(f"--eval-every {args.eval_every}: not a multiple of --log-every")
    if not args.dataset_id or isinstance(args.dataset_id, str):
        raise UserError("--dataset-id: a tuple of one or more ids is needed")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not (name == "cpu" or getattr(torch, name).is_available()):
        raise UserError(f"--device {name}: there is none on this machine")
    return torch.device(name)


def use_fast_matmul():
    """oneDNN's float32 products are faster than MKL's on AMD CPUs, up to twice with AVX-512. Where
    the CPU would really round to bfloat16 (an error of 2e-3 instead of 1e-6) it is taken back."""
    x = torch.linspace(0, 1, 256 * 256, device="cpu").view(256, 256)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    exact = x.double() @ x.double()
    if (x @ x - exact).abs().max() > 1e-4 * exact.abs().max():
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@contextmanager
def open_run(args):
    """A new Run, or with --resume one at its last checkpoint. A new folder is made only after all
    the input has been found good."""
    began = time.perf_counter()
    folder = Path(args.resume) if args.resume else None
    args = resumed_args(args) if args.resume else args
    check_args(args)
    device = pick_device(args.device)
    use_fast_matmul()
    transform = args.normalize_obs, args.reward_scale, args.reward_shift
    data = load_dataset(args.dataset_id, args.env_id, *transform, device)
    torch.manual_seed(args.seed)
    with torch.device(device):
        agent = Agent(data, args)
    run = Run(args, data, agent, folder or create_folder(args), began)
    if (run.folder / "checkpoint.pt").exists():
        load_checkpoint(run)
    print(f"run folder {run.folder}")
    try:
        yield run
    except KeyboardInterrupt:
        folder = shlex.quote(str(run.folder))
        print(f"\nstopped; to go on: python {Path(__file__).name} --resume {folder}")
        raise


def resumed_args(args):
    """The flags of the run in --resume."""
    folder = Path(args.resume)
    if args != Args(resume=args.resume):
        raise UserError("--resume takes all flags from the run: give no other one beside it")
    if not (folder / "args.json").exists():
        raise UserError(f"--resume {folder}: not the folder of a run, it has no args.json")
    if not (folder / Path(__file__).name).exists():
        raise UserError(f"--resume {folder}: not a run of {Path(__file__).name}")
    if (folder / "result.json").exists():
        raise UserError(f"--resume {folder}: the run is complete, see result.json there")
    stored = json.loads((folder / "args.json").read_text())["args"]
    return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def create_folder(args):
    """out_dir/<algorithm>__<dataset>__s<seed>__<time>, with args.json and the source that runs."""
    dataset = "+".join(args.dataset_id).replace("/", "-")
    stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 1000 % 10**6:06d}"
    folder = Path(args.out_dir) / f"{ALGORITHM}__{dataset}__s{args.seed}__{stamp}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out-dir {args.out_dir}: {error}") from error
    source = Path(__file__).resolve()
    git = [shutil.which("git") or "true", "-C", source.parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "numpy", "gymnasium", "minari", "tyro")
    facts = {"args": asdict(args), "versions": {p: version(p) for p in packages}, "commit": commit}
    shutil.copy(source, folder / source.name)
    write(folder / "args.json", json.dumps(facts, indent=2))
    return folder


def write(path, content):
    """Whole or not at all: under a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)


def write_csv(path, rows, header):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def save_checkpoint(run):
    """All that is needed to go on and to deploy."""
    units, checkpoint = run.agent.units, io.BytesIO()
    state = {
        "step": run.step,
        "seconds": time.perf_counter() - run.began,
        "metrics": run.metrics,
        "returns": run.returns,
        "agent": run.agent.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.agent.optimizers],
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "args": asdict(run.args),
        "observation_space": serialize_space(units.observation_space),
        "action_space": serialize_space(units.action_space),
    }
    torch.save(state, checkpoint)
    write_csv(run.folder / "metrics.csv", run.metrics, ["step"])
    write_csv(run.folder / "returns.csv", run.returns, ["step", "seed", "return"])
    write(run.folder / "checkpoint.pt", checkpoint.getvalue())  # last: what it has, the CSVs have


def load_checkpoint(run):
    path, device = run.folder / "checkpoint.pt", run.data.train.device
    state = torch.load(path, map_location=device, weights_only=True)
    run.agent.load_state_dict(state["agent"])
    for optimizer, its_state in zip(run.agent.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(its_state)
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    run.step, run.metrics, run.returns = state["step"], state["metrics"], state["returns"]
    run.began -= state["seconds"]


def log(run, update, metrics, episodes, bar):
    """After `update` updates: health, NaN check, evaluation, a row of metrics, the checkpoint."""
    probe = run.data.train[:: max(1, len(run.data.train) // 1000)]
    with torch.no_grad(), torch.random.fork_rng():
        metrics = metrics | run.agent.diagnose(run.data.batch(probe))
    row = {"step": update} | {name: value.item() for name, value in metrics.items()}
    for name, value in row.items():
        if not math.isfinite(value):
            good = f"the last good checkpoint is that of update {run.step} in {run.folder}"
            good = good if (run.folder / "checkpoint.pt").exists() else "there is no checkpoint yet"
            raise UserError(f"update {update}: {name} is {value}; {good}")
    row["return_mean"] = None
    if run.data.make_env and episodes:
        returns = evaluate(run.agent, run.data.make_env, episodes)
        row["return_mean"] = returns.mean().item()
        for i, value in enumerate(returns.tolist()):
            run.returns.append({"step": update, "seed": 10_000 + i, "return": value})
        tqdm.write(f"update {update}: return {row['return_mean']:.1f} over {episodes} episodes")
    run.metrics.append(row)
    run.step = update
    save_checkpoint(run)
    shown = ("actor_loss", "critic_loss", "q_data", "q_policy")
    bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row})


def finish(run):
    """Prints the table, writes result.json (its presence says that the run is complete)."""
    args, row, data_returns = run.args, dict(run.metrics[-1]), run.data.returns
    returns = np.array([r["return"] for r in run.returns if r["step"] == row["step"]])
    result = {
        "algorithm": ALGORITHM,
        "dataset": "+".join(args.dataset_id),
        "seed": args.seed,
        "steps": row.pop("step"),
        "return_mean": row.pop("return_mean"),
        "return_std": None,
        "score": None,
        "data_return_mean": data_returns.mean().item(),
        **row,
        "health": run.agent.health(row, run.data),
        "seconds": time.perf_counter() - run.began,
    }
    lines = [f"{ALGORITHM} on {result['dataset']}, seed {args.seed}, {result['steps']} updates"]
    lines += [f"return of the data    {data_returns.mean():.1f} +- {data_returns.std():.1f}"]
    if len(returns):
        result["return_std"] = returns.std().item()
        over = f"over {len(returns)} episodes, deterministic policy"
        lines += [f"return of the policy  {returns.mean():.1f} +- {returns.std():.1f} {over}"]
    if len(returns) and run.data.reference:
        low, high = run.data.reference
        result["score"] = (100 * (returns.mean() - low) / (high - low)).item()
        scale = f"0: {low:.1f}, random actions; 100: {high:.1f}, the reference policy"
        lines += [f"normalised score      {result['score']:.1f} ({scale})"]
    lines += [f"health                {result['health']}"]
    lines += [f"time                  {result['seconds']:.0f} s"]
    print("\n" + "\n".join(lines))
    write(run.folder / "result.json", json.dumps(result, indent=2))
    return result


def command_line():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        if args.resume and len(sys.argv) > 3:
            raise UserError("--resume takes all flags from the run: give no other one beside it")
        main(args)
    except UserError as error:
        sys.exit(f"{ALGORITHM}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


# <<< shared: run


# >>> shared: policy   (the same in every file; tests/test_copies.py keeps it so)
def load_policy(folder, device="cpu"):
    """The trained agent of a run's folder, with act(obs, deterministic=True), log_prob(obs,
    action), has_density and, for Discrete actions, probabilities(obs); observations and actions
    are the environment's. Needs neither the dataset nor the environment."""
    checkpoint = Path(folder) / "checkpoint.pt"
    if not checkpoint.exists():
        raise UserError(f"{folder}: not the folder of a run, it has no checkpoint.pt")
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    observation_space, action_space = (
        deserialize_space(state[f"{kind}_space"]) for kind in ("observation", "action")
    )
    with torch.device(device):
        agent = Agent(Data(Units(observation_space, action_space)), Args(**state["args"]))
    agent.load_state_dict(state["agent"])
    return agent.eval()


# <<< shared: policy


@torch.no_grad()
def report(model, data, held, args):
    """Whether the model deserves trust, as text, from the held-out transitions (H,)."""
    batch = data.batch(held)
    y, (mean, logvar) = model_target(batch), model(batch.obs, batch.action)
    error, sigma = (mean - y).abs(), (logvar / 2).exp()  # (I, H, O + 1)
    u = model.uncertainty(mean, logvar)
    lines = [f"The model on {len(held)} transitions of held-out episodes:"]
    lines += [*members_table(model, y, error, sigma), *rollout_table(model, data, held, args)]
    lines += penalty_table(u, error[model.elites].norm(dim=-1).mean(0))
    penalty, reward = args.penalty * u, batch.reward.abs()
    unused = " (not applied: --conservative)" if args.conservative else ""
    lines += [f"penalty {penalty.mean():.3g} on average, {penalty.max():.3g} at most{unused}; "
              f"|r| {reward.mean():.3g}, {reward.max():.3g}"]  # fmt: skip
    if model.end_threshold < math.inf:
        lines += [terminals_line(model, batch)]
    else:
        lines += ["terminals: none in the episodes trained on, the model never ends one"]
    return "\n".join(lines)


def members_table(model, y, error, sigma):
    """Error and calibration of each member: y (H, O + 1), error and sigma (I, H, O + 1)."""
    lines = ["member  squared error  share of variance  within 1 sigma  within 2 sigma"]
    squared = (error**2).mean(1)  # (I, O + 1)
    share = (squared / y.var(0).clamp(min=1e-12)).mean(1)
    one, two = ((error < k * sigma).float().mean((1, 2)) for k in (1, 2))
    for i in range(model.members):
        elite = "  elite" if i in model.elites else ""
        row = f"{i:6} {squared[i].mean():14.3g} {share[i]:18.2%} {one[i]:15.1%} {two[i]:15.1%}"
        lines.append(row + elite)
    return [*lines, "a right Gaussian has 68.3% and 95.4% there"]


def rollout_table(model, data, held, args):
    """How the error grows when the model goes on from its own predictions, with the elites' means
    and the actions of the data."""
    h, size = args.rollout_length, len(data.train)
    last = (held + h - 1).clamp(max=size - 1)
    start = held[(held + h <= size) & (data.episode[held] == data.episode[last])]
    if not len(start):
        return [f"no held-out episode has {h} steps"]
    lines = ["steps ahead  error  error of predicting no change (RMS, in deviations of obs)"]
    scale = data.all.obs.std(0).clamp(min=1e-6)
    obs = first = data.all.obs[start].expand(model.members, -1, -1)
    for k in range(h):
        action = data.all.action[start + k].expand(model.members, -1, -1)
        obs = obs + model(obs, action)[0][..., :-1]
        misses = [(x - data.all.next_obs[start + k]) / scale for x in (obs, first)]
        errors = [miss[model.elites].square().mean().sqrt() for miss in misses]
        lines.append(f"{k + 1:11} {errors[0]:6.3f} {errors[1]:6.3f}")
    return lines


def penalty_table(u, error):
    """Whether u (H,) is large where the elites' error |mu - y| (H,) is."""
    fifths = u.argsort().tensor_split(5)
    lines = [" ".join([name, *(f"{x[i].mean():9.3g}" for i in fifths)])
             for name, x in (("u, by fifths ", u), ("true |mu - y|", error))]  # fmt: skip
    ranks = torch.stack([x.argsort().argsort().float() for x in (u, error)])
    return [*lines, f"rank correlation of u with the true error {torch.corrcoef(ranks)[0, 1]:.2f}"]


def terminals_line(model, batch):
    is_end, said = batch.terminal == 1, model.end_logit(batch.next_obs) > model.end_threshold
    precision, recall = ((is_end & said).sum() / x.sum().clamp(min=1) for x in (said, is_end))
    counts = f"terminals: {is_end.sum()} held out, {said.sum()} predicted"
    return f"{counts}, precision {precision:.2f}, recall {recall:.2f}"


def main(args: Args) -> dict:
    """Trains the model, then the policy, and evaluates; returns the final metrics, which are also
    the folder's result.json."""
    with open_run(args) as run:
        agent, data, args = run.agent, run.data, run.args
        if not (run.folder / "checkpoint.pt").exists():  # the first one has the trained model
            held = train_model(agent.model, data, args)
            text = report(agent.model, data, held, args)
            print(text)
            write(run.folder / "model.txt", text + "\n")
            save_checkpoint(run)
        with tqdm(total=args.steps, initial=run.step, disable=None, dynamic_ncols=True) as bar:
            for update in range(run.step + 1, args.steps + 1):
                if (update - 1) % args.rollout_every == 0:
                    agent.rollout(data)
                metrics = agent.update(agent.sample(data))
                bar.update()
                if update == args.steps:
                    log(run, update, metrics, args.eval_episodes, bar)
                elif update % args.log_every == 0:
                    due = args.eval_every and update % args.eval_every == 0
                    log(run, update, metrics, math.ceil(args.eval_episodes / 10) if due else 0, bar)
    return finish(run)


if __name__ == "__main__":
    command_line()
