"""The mathematics of awac.py against exact answers; stitching, beside bc.py and iql.py.
(test_agents.py has the policies; test_iql.py the weights, the metrics, the health line and the
online phase, for both.)"""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    close,
    descend,
    follow,
    make_data,
    minimise,
    plain_descent,
    random_batch,
    same_parameters,
    small_agent,
    stir,
)
from test_iql import actor_loss, critic_loss, make_batch, tabular

import awac
import bc
import iql
from awac import Batch

# ---- The actor ----


@pytest.mark.parametrize("discrete", [False, True])
def test_a_huge_lambda_is_behaviour_cloning(discrete):
    batch = random_batch(discrete=discrete)
    agent, cloner = small_agent(awac, discrete, lam=1e8), small_agent(bc, discrete)
    cloner.policy.load_state_dict(agent.policy.state_dict())
    losses = actor_loss(agent, batch, torch.randn(16) * 10), cloner.actor_loss(batch)
    gradients = [
        torch.autograd.grad(loss, [*a.policy.parameters()])
        for loss, a in zip(losses, (agent, cloner), strict=True)
    ]
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*gradients, strict=True))


def test_with_an_online_phase_alone_the_actor_learning_rate_follows_a_cosine():
    for online_steps, expected in ((0, 0.01), (5, 0.005)):
        agent = small_agent(awac, steps=10, lr=0.01, online_steps=online_steps)
        for _ in range(5):
            agent.update(random_batch())
        assert agent.actor_optimizer.lr.item() == pytest.approx(expected, abs=1e-8)
        assert agent.critic_optimizer.lr.item() == pytest.approx(0.01)


def behaviour(seed):
    """3 states, 3 actions, all in the data; one transition of each count. Returns the data, the
    behaviour (S, A), the probabilities of the next states (S, A, S), the rewards (S, A)."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, size=(3, 3))
    s, a = (np.repeat(x, counts.flatten()) for x in np.indices((3, 3)).reshape(2, -1))
    P, r = rng.dirichlet(np.ones(3), size=(3, 3)), rng.normal(size=(3, 3))
    batch = make_batch(s, a, r[s, a], s, np.zeros(len(s)), 3)
    return batch, counts / counts.sum(1, keepdims=True), P, r


def exact_values(policy, P, r, gamma=0.9):
    v = np.linalg.solve(np.eye(3) - gamma * np.einsum("sa,sat->st", policy, P), (policy * r).sum(1))
    return v, r + gamma * P @ v


def improved(batch, advantage, lam):
    """The actor that minimises (1), with unclipped weights, as a table (S, A)."""
    agent = tabular(batch, awac, actions=3, lam=lam)
    agent.max_weight = math.inf
    per_transition = torch.as_tensor(advantage)[batch.obs.argmax(1), batch.action]
    loss = lambda: actor_loss(agent, batch, per_transition)  # noqa: E731
    minimise(loss, agent.policy.parameters(), 3)
    return agent.policy(torch.eye(3).double()).probs.detach().numpy()


def test_a_small_lambda_takes_the_best_action_in_the_data():
    batch, *_ = behaviour(0)
    kept = batch.action < 2  # action 2 is the best, but not in the data
    batch = Batch(*(x[kept] for x in batch))
    advantage = np.array([[0.0, -0.1, 3.0], [-0.1, 0.0, 3.0], [0.0, -0.1, 3.0]])
    policy = improved(batch, advantage, 0.01)
    assert policy.argmax(1).tolist() == [0, 1, 0] and policy.max(1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_one_step_from_the_behaviour_is_an_improvement_in_every_state(lam):
    for seed in range(3):
        batch, pi_b, P, r = behaviour(seed)
        v, q = exact_values(pi_b, P, r)
        new_v, _ = exact_values(improved(batch, q - v[:, None], lam), P, r)
        assert (new_v >= v - 1e-6).all() and (new_v > v + 1e-3).any()


def test_the_divergence_from_the_behaviour_falls_as_lambda_rises():
    batch, pi_b, P, r = behaviour(0)
    v, q = exact_values(pi_b, P, r)
    policies = [improved(batch, q - v[:, None], lam) for lam in (0.2, 0.5, 1.0, 3.0, 30.0)]
    divergence = np.array([(pi * np.log(pi / pi_b)).sum(1) for pi in policies])
    assert (np.diff(divergence, axis=0) < 0).all() and (divergence[-1] < 0.01).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_the_actor_is_that_of_awr(discrete):
    """AWR (Peng et al. 2019), algorithm 1: maximise log pi(a|s) min(exp(A / beta), 20)."""
    batch, agent = random_batch(discrete=discrete), small_agent(awac, discrete, lam=0.05)
    agent.max_weight, advantage = 20.0, torch.linspace(-0.3, 0.3, 16)
    weight = (advantage / 0.05).exp().clamp(max=20)
    assert 0 < (weight == 20).sum() < 8
    awr = -(agent.policy(batch.obs).log_prob(batch.action) * weight).mean()
    loss, parameters = actor_loss(agent, batch, advantage), [*agent.policy.parameters()]
    assert loss.item() == pytest.approx(awr.item(), rel=1e-6)
    gradients = (torch.autograd.grad(x, parameters) for x in (loss, awr))
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(*gradients, strict=True))


# ---- The critic ----


def test_the_value_of_a_state_is_the_exact_mean_over_discrete_actions():
    batch, agent = random_batch(discrete=True), stir(small_agent(awac, True))
    pi, expected = agent.policy(batch.obs), 0.0
    for a in range(3):
        q = agent.critic(batch.obs, torch.full((16,), a))
        expected = expected + pi.probs[:, a] * torch.minimum(q[0], q[1])
    value = agent.critic.value(batch.obs, pi)
    assert value.shape == (16,) and torch.allclose(value, expected, atol=1e-6)


def test_the_value_of_a_state_is_one_clipped_sample_of_box_actions():
    """Its mean over many draws is the integral of min_j Q_j over the clipped Gaussian."""
    torch.manual_seed(0)
    agent = stir(awac.Agent(awac.Units(*2 * [spaces.Box(-1, 1, (1,))]), awac.Args(hidden=(8,))))
    obs = torch.full((200_000, 1), 0.5)
    with torch.no_grad():
        v = agent.critic.value(obs, agent.policy(obs))
        u = torch.linspace(-8, 8, 100_001)[:, None]
        density = agent.policy(obs[:1]).log_prob(u).exp()
        q = agent.critic(obs[:1].expand(len(u), 1), u.clamp(-1, 1)).min(0).values
    exact = torch.trapezoid(density * q, u[:, 0])
    assert v.shape == (200_000,) and v.std() > 0.01
    assert v.mean().item() == pytest.approx(exact.item(), abs=4 * v.std().item() / 200_000**0.5)


def test_the_critic_of_a_fixed_policy_converges_to_its_value():
    _, pi, _, _ = behaviour(1)
    s, a = np.indices((3, 3)).reshape(2, -1)
    rng = np.random.default_rng(0)
    next_s, r = rng.integers(3, size=(3, 3)), rng.normal(size=(3, 3))
    batch = make_batch(s, a, r[s, a], next_s[s, a], np.zeros(9), 3)
    agent = tabular(batch, awac, gamma=0.5)
    agent.policy.net.weight[0].data[0] = torch.as_tensor(np.log(pi).T)
    agent.policy.net.bias[0].data.zero_()
    for _ in range(25):
        minimise(lambda: critic_loss(agent, batch), agent.critic.parameters(), 1)
        agent.critic_target.load_state_dict(agent.critic.state_dict())
    _, exact = exact_values(pi, np.eye(3)[next_s], r, gamma=0.5)
    q = agent.critic(batch.obs, batch.action).detach().numpy()
    assert q == pytest.approx(np.tile(exact[s, a], (2, 1)), abs=1e-4)


# ---- The update ----


@pytest.mark.parametrize("discrete", [False, True])
def test_an_update_is_the_one_of_the_equations(discrete, monkeypatch):
    """Written out once more, all from the old networks; V by all actions or by one draw, first of
    those at s, then of those at s'."""
    monkeypatch.setattr(awac, "step", plain_descent)
    batch = random_batch(discrete=discrete)
    flags = {"lr": 0.05, "polyak": 0.1, "lam": 0.5, "gamma": 0.9}
    theirs = stir(small_agent(awac, discrete, **flags))
    ours = deepcopy(theirs)
    torch.manual_seed(1)
    metrics = ours.update(batch)

    def value(critic, obs):
        out = theirs.policy.net(obs)[0]
        if not discrete:
            std = theirs.policy.log_std.exp().expand(16, 2)
            return critic(obs, torch.normal(out.tanh(), std).clamp(-1, 1)).amin(0).detach()
        q = torch.stack([critic(obs, torch.full((16,), a)) for a in range(3)], -1)
        return (out.softmax(1) * q.amin(0)).sum(1).detach()

    torch.manual_seed(1)
    q = theirs.critic(batch.obs, batch.action)
    advantage = q.amin(0).detach() - value(theirs.critic, batch.obs)
    y = batch.reward + 0.9 * (1 - batch.terminal) * value(theirs.critic_target, batch.next_obs)
    weight = torch.clamp((advantage / 0.5).exp(), max=100)
    losses = {
        "actor_loss": -(weight * theirs.policy(batch.obs).log_prob(batch.action)).mean(),
        "critic_loss": ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean(),
    }
    descend(losses["actor_loss"], theirs.policy.parameters(), 0.05)
    descend(losses["critic_loss"], theirs.critic.parameters(), 0.05)
    follow(theirs.critic_target, theirs.critic, 0.1)
    close(metrics, losses)
    same_parameters(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("discrete", [False, True])
def test_no_loss_has_gradients_in_the_networks_of_another(discrete):
    batch, agent = random_batch(discrete=discrete), small_agent(awac, discrete)
    networks = {"policy": agent.policy, "critic": agent.critic, "target": agent.critic_target}
    q = agent.critic(batch.obs, batch.action)
    losses = {
        "policy": agent.actor_loss(batch, agent.policy(batch.obs), q),
        "critic": agent.critic_loss(batch, q),
    }
    for own, loss in losses.items():
        for name, network in networks.items():
            parameters = list(network.parameters())
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            assert all((g is not None) == (name == own) for g in gradients), (own, name)


# ---- Stitching ----

# X . M . G   8 episodes start at S, two steps below M, pass M and end in the pit X; 2 start at T,
# two steps above M, pass M and reach the prize at G. None leads from S to G, but their parts do.
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def move(cell, action):
    (row, column), (down, right) = cell, list(MOVES.values())[action]
    return min(max(row + down, 0), 4), min(max(column + right, 0), 4)


def grid_data(module):
    rows = []
    for start, path in (
        *8 * [((4, 2), "up up left left")],
        *2 * [((0, 2), "down down right right")],
    ):
        cell = start
        for name in path.split():
            action, before = list(MOVES).index(name), cell
            cell = move(cell, action)
            ends = float(cell == (2, 4)), float(cell in ((2, 0), (2, 4)))  # prize, terminal
            rows.append((before[0] * 5 + before[1], action, cell[0] * 5 + cell[1], *ends))
    s, a, next_s, r, terminal = map(list, zip(*rows, strict=True))
    eye, r = torch.eye(25), torch.tensor(r)
    data = make_data(module, eye[s], torch.tensor(a), r, [4] * 10, spaces.Discrete(4))
    data.transitions = data.transitions._replace(
        next_obs=eye[next_s], terminal=torch.tensor(terminal)
    )
    return data


def reaches_the_goal(module, seed, **flags):
    args = module.Args(hidden=(), lr=0.05, batch_size=64, steps=400, seed=seed, **flags)
    data, cell = grid_data(module), (4, 2)
    torch.manual_seed(seed)
    agent = module.Agent(data.units, args)
    if module is bc:
        data, _ = bc.choose_episodes(data, args)
    for _ in range(400):
        agent.update(data.sample(64))
    for _ in range(12):
        cell = move(cell, agent.act(torch.eye(25)[[cell[0] * 5 + cell[1]]]).item())
        if cell == (2, 4):
            return True
    return False


@pytest.mark.parametrize("seed", range(2))
def test_iql_and_awac_stitch_and_bc_cannot(seed):
    assert reaches_the_goal(iql, seed, beta=10.0, expectile=0.9, polyak=0.05)
    assert reaches_the_goal(awac, seed, lam=0.1, polyak=0.05)
    assert not reaches_the_goal(bc, seed, held_out=0.0)
    assert not reaches_the_goal(bc, seed, held_out=0.0, top_fraction=0.2)
