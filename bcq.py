"""Batch-Constrained Q-learning (BCQ): Q-learning over the actions that the data could contain.

The maximum in Q-learning's target picks the actions whose value the critic overestimates most, and
offline those are actions that the data lack. BCQ first learns which actions the data contain in a
state, and then takes the maximum over these only.

Papers: [n.m] is equation m of [1] Fujimoto, Meger, Precup (2019), arXiv 1812.02900, Box actions,
or [2] Fujimoto, Conti, Ghavamzadeh, Pineau (2019), arXiv 1910.01708, Discrete actions.

Discrete actions, on double DQN (DiscreteBCQ):
  (1) allowed = { a: G(a|s) / max_b G(b|s) >= threshold },  G(.|s) = softmax of logits(s)
  (2) pi(s)   = argmax_{a allowed in s} Q(s, a)                                   [2.17 to 2.19]
  (3) y       = r + gamma (1 - terminal) Q'(s', pi(s'))
  (4) L_Q     = mean huber( Q(s, a_data) - y )
  (5) L_G     = mean[ -log G(a_data|s) ] + 0.01 mean logits^2
Continuous actions (ContinuousBCQ), with a VAE (encoder, decoder) as the model of the data:
  (6) L_VAE   = mean (decoder(s, z) - a_data)^2 + 1/2 KL,  z = mu + sigma noise
      KL      = -1/2 mean[ 1 + log sigma^2 - mu^2 - sigma^2 ],  (mu, sigma) = encoder(s, a_data)
  (7) a_i     = clip( b_i + phi tanh(net(s, b_i)) ),  b_i = decoder(s, z_i),
                z_i ~ N(0, 1) clipped to [-0.5, 0.5]
  (8) pi(s)   = argmax_{a_i} Q_1(s, a_i),  i = 1 .. --act-samples                 [1.10]
  (9) y       = r + gamma (1 - terminal) max_i [ soft_min min_j Q'_j(s', a'_i)
                + (1 - soft_min) max_j Q'_j(s', a'_i) ],  i = 1 .. n              [1.13]
  (10) L_Q    = sum_j mean( Q_j(s, a_data) - y )^2
  (11) L_pi   = -mean Q_1(s, a_1)                                                 [1.12]

Symbols: [2]'s tau = threshold, [1]'s lambda = soft_min, Phi = phi, xi(s, b) = phi tanh(net(s, b)).
Q' = critic_target; a' in (9) come from perturbation_target. N batch, O observation, A action size
(Box) or number of actions (Discrete), n = candidates, Z = 2 A latent variables.

Metrics: critic_loss (4, 10), imitation_loss (5), vae_loss (6), reconstruction and kl (its parts),
actor_loss (11); on a fixed sample of the data q_data = Q_1(s, a_data), q_policy = Q_1(s, pi(s)),
action_distance from pi(s) to a_data: RMS in units of [-1, 1], for Discrete the share of states
where they differ; masked: share of the actions that are not allowed (0: plain double DQN); entropy
of G; spread: standard deviation of the b_i of a state (0: behaviour cloning within phi);
perturbation: mean |tanh(net)|, 1 where phi always binds.

The means in (6) amount to a decoder with noise of deviation 0.35 in units of [-1, 1]: where the
actions of a state have a smaller deviation than that, kl and spread are 0 and b_i is their mean.

Differs from the papers (D1, D2, D4, D5) or from the official code (D3):
  D1 (5): Q and G are separate networks, for Atari's images they share their first layers.
  D2 Polyak targets for Discrete actions too; the paper's Atari agent copies every 8,000 updates.
  D3 (1) has >=, the official code >: threshold 1 then allows nothing. Here it leaves the mode of G.
  D4 The last term of (5), and the means and the 1/2 of (6), are the official code's alone.
  D5 threshold is 0.5, on Atari 0.3: where half of the actions are random, the worse one of two has
     1/3 of the better one's probability, and 0.3 forbids nothing.

Written from the papers; no code taken from elsewhere. Pendulum, a return of about -160:

  python bcq.py

On MuJoCo data, with the official settings (hours):

  python bcq.py --dataset-id mujoco/hopper/medium-v0 --hidden 400 300 --vae-hidden 750 750 \
    --batch-size 100 --polyak 0.005 --lr 1e-3 --steps 1000000 --log-every 5000 --eval-every 50000
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
    steps: int = 4_000
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
    polyak: float = 0.02
    """rate of the target networks: Q' <- (1 - polyak) Q' + polyak Q"""
    normalize_obs: bool = False
    """standardise observations by the mean and deviation of the dataset"""
    reward_scale: float | Literal["return-range"] = 1.0
    """factor on the rewards in training; return-range: 1000 / (largest - smallest return)"""
    reward_shift: float = 0.0
    """added to the scaled rewards in training; changes the task where episodes can terminate"""
    # BCQ
    lr: float = 1e-3
    """learning rate of all networks"""
    threshold: float = 0.5
    """in (1): an action is allowed from this share of the likeliest one's probability on; 0: all
    are, plain double DQN; 1: only the likeliest (Discrete)"""
    phi: float = 0.05
    """in (7): the largest perturbation, in units of [-1, 1]; 0: none (Box)"""
    soft_min: float = 0.75
    """in (9): weight of the smaller of the two Q', the larger has the rest (Box)"""
    target_samples: int = 10
    """n in (9): candidates for each next state; more are more optimistic (Box)"""
    act_samples: int = 100
    """in (8): candidates when acting (Box)"""
    vae_hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden layers of encoder and decoder (Box)"""


class DiscreteBCQ(nn.Module):
    """Double DQN over the actions that a classifier, trained on the data, holds for likely."""

    has_density = True  # of the greedy policy: 1 at its action

    def __init__(self, data, args):
        super().__init__()
        if not 0 <= args.threshold <= 1:
            raise UserError(f"--threshold {args.threshold}: it must lie in [0, 1]")
        self.args, self.units = args, data.units
        self.log_threshold = math.log(args.threshold) if args.threshold > 0 else -math.inf
        self.imitation = PerAction(self.units, args.hidden)  # logits of G
        self.critic = PerAction(self.units, args.hidden)
        self.critic_target = PerAction(self.units, args.hidden)
        self.critic_target.load_state_dict(self.critic.state_dict())
        networks = [*self.critic.parameters(), *self.imitation.parameters()]
        self.optimizer = adam(networks, args.lr)
        self.optimizers = [self.optimizer]

    def allowed(self, obs):
        """(1) as (N, A) booleans, never all False: the likeliest action is always allowed."""
        logits = self.imitation(obs)
        return logits - logits.amax(1, keepdim=True) >= self.log_threshold  # D3

    def policy(self, obs):
        """(2) pi(s) (N,)."""
        return self.critic(obs).masked_fill(~self.allowed(obs), -math.inf).argmax(1)

    def target(self, batch):
        """(3) y (N,): Q chooses the next action among the allowed ones, Q' values it."""
        with torch.no_grad():
            next_q = pick(self.critic_target(batch.next_obs), self.policy(batch.next_obs))
            return batch.reward + self.args.gamma * (1 - batch.terminal) * next_q

    def critic_loss(self, batch):
        """(4)."""
        q, y = pick(self.critic(batch.obs), batch.action), self.target(batch)
        assert q.shape == y.shape == batch.reward.shape
        return F.huber_loss(q, y)

    def imitation_loss(self, batch):
        """(5). With a weight of 0.5 no ratio of two actions in (1) would fall below 0.35 (D4)."""
        logits = self.imitation(batch.obs)
        negative_log_prob = F.cross_entropy(logits, batch.action, reduction="none")
        assert negative_log_prob.shape == batch.reward.shape
        return negative_log_prob.mean() + 0.01 * (logits**2).mean()

    def update(self, batch):
        """One gradient step. Returns metrics as tensors: nothing waits for the device."""
        critic_loss, imitation_loss = self.critic_loss(batch), self.imitation_loss(batch)
        step(self.optimizer, critic_loss + imitation_loss)  # D1: no parameter is in both
        polyak_update(self.critic_target, self.critic, self.args.polyak)  # D2
        return {"critic_loss": critic_loss, "imitation_loss": imitation_loss}

    def diagnose(self, batch):
        """How Q and its policy stand to the data, and how much the threshold forbids."""
        q, action = self.critic(batch.obs), self.policy(batch.obs)
        log_g = self.imitation(batch.obs).log_softmax(1)
        return {
            "q_data": pick(q, batch.action).mean(),
            "q_policy": pick(q, action).mean(),
            "action_distance": (action != batch.action).float().mean(),
            "masked": 1 - self.allowed(batch.obs).float().mean(),
            "entropy": -(log_g.exp() * log_g).sum(1).mean(),
        }

    def health(self, metrics, data):
        advice = "Raise --threshold.", "Lower --threshold."
        return q_health(metrics, data, self.args.gamma, *advice)

    @torch.no_grad()
    def probabilities(self, obs):
        """Raw observations (N, ...) -> (N, A): one-hot, the policy is greedy."""
        action = self.policy(self.units.obs(obs))
        return F.one_hot(action, self.units.action_dim).float()

    def act(self, obs, deterministic=True):
        """Raw observations (N, ...) -> environment actions (N,)."""
        return self.units.env_action(self.probabilities(obs).argmax(1))

    def log_prob(self, obs, action):
        """log pi(a|s) (N,) of raw observations (N, ...) and environment actions (N,)."""
        return pick(self.probabilities(obs), self.units.action(action)).log()


class ContinuousBCQ(nn.Module):
    """Q-learning over sampled actions: a VAE of the data proposes, a small network perturbs, the
    critic chooses."""

    has_density = False  # the best of many samples: a random action of unknown density

    def __init__(self, data, args):
        super().__init__()
        if args.phi < 0 or not 0 <= args.soft_min <= 1:
            raise UserError("--phi must be at least 0 and --soft-min in [0, 1]")
        if args.target_samples < 1 or args.act_samples < 1:
            raise UserError("--target-samples and --act-samples must be at least 1")
        if not all(width > 0 for width in args.vae_hidden):
            raise UserError("--vae-hidden: widths must be positive")
        self.args, self.units = args, data.units
        self.vae = VAE(self.units, args.vae_hidden)
        self.perturbation = Perturbation(self.units, args.hidden, args.phi)
        self.perturbation_target = Perturbation(self.units, args.hidden, args.phi)
        self.perturbation_target.load_state_dict(self.perturbation.state_dict())
        self.critic = TwinCritic(self.units, args.hidden)
        self.critic_target = TwinCritic(self.units, args.hidden)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.vae_optimizer = adam(self.vae.parameters(), args.lr)
        self.critic_optimizer = adam(self.critic.parameters(), args.lr)
        self.actor_optimizer = adam(self.perturbation.parameters(), args.lr)
        self.optimizers = [self.vae_optimizer, self.critic_optimizer, self.actor_optimizer]

    def vae_loss(self, batch):
        """(6), and its parts as metrics. Both parts are means over their variables, not sums."""
        mean, log_std = self.vae.encode(batch.obs, batch.action)
        z = mean + log_std.exp() * torch.randn_like(mean)
        error = (self.vae.decode(batch.obs, z) - batch.action) ** 2
        kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp())
        assert error.shape == (*batch.reward.shape, self.units.action_dim)
        assert kl.shape == (*batch.reward.shape, self.vae.latent_dim)
        vae_loss = error.mean() + 0.5 * kl.mean()
        return vae_loss, {"vae_loss": vae_loss, "reconstruction": error.mean(), "kl": kl.mean()}

    def target(self, batch):
        """(9) y (N,): first the soft minimum of the two Q' of each candidate, then the best one."""
        with torch.no_grad():
            next_obs = repeat(batch.next_obs, self.args.target_samples)  # (N, n, O)
            action = self.perturbation_target(next_obs, self.vae.sample(next_obs))  # (N, n, A)
            q = self.critic_target(next_obs, action)  # (2, N, n)
            soft_min = self.args.soft_min
            next_q = (soft_min * q.amin(0) + (1 - soft_min) * q.amax(0)).amax(1)
            return batch.reward + self.args.gamma * (1 - batch.terminal) * next_q

    def critic_loss(self, batch):
        """(10)."""
        td_error = self.critic(batch.obs, batch.action) - self.target(batch)
        assert td_error.shape == (2, *batch.reward.shape)
        return (td_error**2).mean(1).sum()

    def actor_loss(self, batch):
        """(11), of the perturbation only: the VAE stays a model of the data."""
        with torch.no_grad():
            action = self.vae.sample(batch.obs)
        q = self.critic(batch.obs, self.perturbation(batch.obs, action))[0]
        assert q.shape == batch.reward.shape
        return -q.mean()

    def update(self, batch):
        """One gradient step. Returns metrics as tensors: nothing waits for the device."""
        vae_loss, metrics = self.vae_loss(batch)
        step(self.vae_optimizer, vae_loss)
        critic_loss = self.critic_loss(batch)
        step(self.critic_optimizer, critic_loss)
        actor_loss = self.actor_loss(batch)
        step(self.actor_optimizer, actor_loss)
        polyak_update(self.critic_target, self.critic, self.args.polyak)
        polyak_update(self.perturbation_target, self.perturbation, self.args.polyak)
        return metrics | {"critic_loss": critic_loss, "actor_loss": actor_loss}

    def policy(self, obs):
        """(8) pi(s) (N, A), a random variable."""
        obs = repeat(obs, self.args.act_samples)  # (N, n, O)
        action = self.perturbation(obs, self.vae.sample(obs))  # (N, n, A)
        best = self.critic(obs, action)[0].argmax(1)  # (N,)
        return action.take_along_dim(best[:, None, None], 1)[:, 0]

    def diagnose(self, batch):
        """How Q and its policy stand to the data, and how free the policy is."""
        action, obs = self.policy(batch.obs), repeat(batch.obs, self.args.target_samples)
        proposal = self.vae.sample(obs)  # (N, n, A)
        return {
            "q_data": self.critic(batch.obs, batch.action)[0].mean(),
            "q_policy": self.critic(batch.obs, action)[0].mean(),
            "action_distance": ((action - batch.action) ** 2).mean().sqrt(),
            "spread": proposal.var(1, correction=0).mean().sqrt(),
            "perturbation": self.perturbation.direction(obs, proposal).abs().mean(),
        }

    def health(self, metrics, data):
        advice = "Lower --phi or raise --soft-min.", "Raise --phi or lower --soft-min."
        return q_health(metrics, data, self.args.gamma, *advice)

    @torch.no_grad()
    def act(self, obs, deterministic=True):
        """Raw observations (N, ...) -> environment actions (N, ...). Draws from torch's generator
        in any case: without samples there is no policy."""
        parts = self.units.obs(obs).split(1000)  # so that the candidates of all fit into memory
        return self.units.env_action(torch.cat([self.policy(part) for part in parts]))

    def log_prob(self, obs, action):
        raise UserError("continuous BCQ acts by the best of many samples: that has no density")


def Agent(data, args):
    return (DiscreteBCQ if data.units.discrete else ContinuousBCQ)(data, args)


def repeat(obs, n):
    """(N, O) -> (N, n, O), without a copy."""
    return obs[:, None].expand(-1, n, -1)


class PerAction(nn.Module):
    """Q(s, .) or the logits of G(.|s) for Discrete actions: obs (N, O) -> (N, A)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(1, units.obs_dim, *hidden, units.action_dim)

    def forward(self, obs):
        return self.net(obs)[0]


class TwinCritic(nn.Module):
    """Two Q(s, a) for Box actions: obs (..., O), action (..., A) -> (2, ...)."""

    def __init__(self, units, hidden):
        super().__init__()
        self.net = MLP(2, units.obs_dim + units.action_dim, *hidden, 1)

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1)
        return self.net(x.flatten(0, -2)).view(2, *x.shape[:-1])


class Perturbation(nn.Module):
    """(7) obs (..., O), action (..., A) -> an action (..., A) at most phi away, within bounds."""

    def __init__(self, units, hidden, phi):
        super().__init__()
        self.net, self.phi = (
            MLP(1, units.obs_dim + units.action_dim, *hidden, units.action_dim),
            phi,
        )

    def direction(self, obs, action):
        """(..., A) in [-1, 1]."""
        x = torch.cat([obs, action], -1)
        return self.net(x.flatten(0, -2)).view(action.shape).tanh()

    def forward(self, obs, action):
        return (action + self.phi * self.direction(obs, action)).clamp(-1, 1)


class VAE(nn.Module):
    """A conditional variational autoencoder of the actions (..., A) of the data."""

    def __init__(self, units, hidden):
        super().__init__()
        self.latent_dim = 2 * units.action_dim
        self.encoder = MLP(1, units.obs_dim + units.action_dim, *hidden, 2 * self.latent_dim)
        self.decoder = MLP(1, units.obs_dim + self.latent_dim, *hidden, units.action_dim)

    def encode(self, obs, action):
        """Mean and log deviation of z, each (N, Z)."""
        mean, log_std = self.encoder(torch.cat([obs, action], -1))[0].chunk(2, -1)
        return mean, log_std.clamp(-4, 15)

    def decode(self, obs, z):
        """obs (..., O), z (..., Z) -> actions (..., A)."""
        x = torch.cat([obs, z], -1)
        return self.decoder(x.flatten(0, -2)).view(*x.shape[:-1], -1).tanh()

    def sample(self, obs):
        """b in (7): one action for each obs. Rare z, which decode to rare actions, are clipped."""
        z = torch.randn(*obs.shape[:-1], self.latent_dim, device=obs.device)
        return self.decode(obs, z.clamp(-0.5, 0.5))


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


# >>> shared: main   (the same in bc, cql, iql, awac and bcq; tests/test_copies.py keeps it so)
def train(run):
    """The offline phase: from the run's last checkpoint on to --steps updates."""
    args = run.args
    with tqdm(total=args.steps, initial=run.step, disable=None, dynamic_ncols=True) as bar:
        for update in range(run.step + 1, args.steps + 1):
            metrics = run.agent.update(run.data.sample(args.batch_size))
            bar.update()
            if update == args.steps:
                log(run, update, metrics, args.eval_episodes, bar)
            elif update % args.log_every == 0:
                due = args.eval_every and update % args.eval_every == 0
                log(run, update, metrics, math.ceil(args.eval_episodes / 10) if due else 0, bar)


# <<< shared: main


def main(args: Args) -> dict:
    """Trains and evaluates; returns the final metrics, which are also the folder's result.json."""
    with open_run(args) as run:
        train(run)
    return finish(run)


if __name__ == "__main__":
    command_line()
