"""The mathematics of mopo.py against exact answers: the model, the penalty, the rollouts, SAC and
COMBO on them, and runs. (test_agents.py has what all files share.)"""

import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import clone, close, forward, same
from minari.data_collector import EpisodeBuffer
from torch import nn
from torch.nn.functional import normalize

import mopo
from mopo import Agent, Args, Batch, Dataset, Model, ModelBuffer, Units


def units(obs_dim=3, action_dim=1, low=-1.0, high=1.0):
    obs_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    return Units(obs_space, spaces.Box(low, high, (action_dim,), np.float32))


def make_agent(obs_dim=3, action_dim=1, **flags):
    small = {"hidden": (16,), "model_hidden": (16,), "rollout_starts": 20, "rollout_length": 3}
    return Agent(units(obs_dim, action_dim), Args(**(small | flags)))


def random_batch(n=8, obs_dim=3, action_dim=1, terminal=None):
    obs, next_obs = torch.randn(2, n, obs_dim)
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, torch.rand(n, action_dim) * 2 - 1, torch.randn(n), next_obs, terminal)


def make_data(batch, episode_length):
    """A Dataset of M transitions in episodes of equal length."""
    data = object.__new__(Dataset)
    data.units, data.transitions = units(batch.obs.shape[1], batch.action.shape[1]), batch
    data.episode = torch.arange(len(batch.obs)) // episode_length
    data.returns = np.zeros(int(data.episode[-1]) + 1)
    return data


def world_agent(action_dim=1, **flags):
    """An agent whose model is random, with 40 data states."""
    torch.manual_seed(0)
    agent = make_agent(action_dim=action_dim, **flags)
    return agent, make_data(random_batch(40, action_dim=action_dim), 10)


def stored(agent):
    """What the model buffer holds."""
    buffer = getattr(agent, "model_buffer", agent)
    rows = buffer.rows[: min(int(buffer.added), len(buffer.rows))]
    obs, action, reward, next_obs, terminal = rows.split(buffer.widths, 1)
    return Batch(obs, action, reward[:, 0], next_obs, terminal[:, 0])


def linear_system(size=5_000, noise=0.0, episode_length=50):
    """s' = s + (s, a) D + noise, r = (s, a) d + noise: the whole truth is the matrix (3, 3)."""
    torch.manual_seed(0)
    truth = torch.tensor([[-0.5, 0.3, 1.0], [0.2, -0.4, -2.0], [0.5, 1.0, 0.3]])
    obs, action = torch.randn(size, 2), torch.rand(size, 1) * 2 - 1
    x = torch.cat([obs, action], 1) @ truth + noise * torch.randn(size, 3)
    batch = Batch(obs, action, x[:, 2], obs + x[:, :2], torch.zeros(size))
    return truth, make_data(batch, episode_length)


def fitted(data, **flags):
    """A model fitted to the data, and the held-out transitions (H,)."""
    args = Args(**({"model_hidden": (32,), "model_epochs": 30, "terminal_updates": 1_000} | flags))
    torch.manual_seed(1)
    model = Model(data.units, args)
    train, held_out = mopo.split(data)
    mopo.fit_ensemble(model, data.batch(train), data.batch(held_out), args)
    mopo.fit_terminal(model, data.batch(train), data.batch(held_out), args)
    return model, held_out


# ---- The model ----


def test_the_loss_equals_equation_1_written_out():
    torch.manual_seed(0)
    model = Model(units(), Args(model_hidden=(5,)))
    model.input_mean[:], model.input_std[:] = torch.randn(4), torch.rand(4) + 0.5
    obs, action, x = torch.randn(7, 6, 3), torch.randn(7, 6, 1), torch.randn(7, 6, 4)
    expected = 0.01 * (4 * 0.5 + 4 * 10)
    for i in range(7):
        h = (torch.cat([obs[i], action[i]], 1) - model.input_mean) / model.input_std
        h = h @ model.net.weight[0][i].T + model.net.bias[0][i].T
        h = h / (1 + (-h).exp())  # swish
        h = h @ model.net.weight[1][i].T + model.net.bias[1][i].T
        mean, logvar = h[:, :4], h[:, 4:]
        logvar = 0.5 - (0.5 - logvar).exp().add(1).log()
        logvar = -10 + (logvar + 10).exp().add(1).log()
        expected += ((mean - x[i]) ** 2 / logvar.exp() + logvar).sum() / (6 * 4)
        expected += 0.5 * 5e-5 * sum((w[i] ** 2).sum() for w in model.net.weight)
    assert model.loss(obs, action, x).item() == pytest.approx(expected.item(), rel=1e-6)


def test_members_learn_independently():
    model = Model(units(), Args(model_hidden=(5,)))
    obs, action, x = torch.randn(7, 6, 3), torch.randn(7, 6, 1), torch.randn(7, 6, 4)
    before = torch.autograd.grad(model.loss(obs, action, x), model.net.weight[0])[0]
    obs[3] += 1
    after = torch.autograd.grad(model.loss(obs, action, x), model.net.weight[0])[0]
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [i == 3 for i in range(7)]


def test_log_variance_is_bounded_and_monotone():
    """The upper bound is exceeded by at most log(1 + exp(min - max)), as in the official code."""
    model = Model(units(obs_dim=1), Args(model_hidden=()))
    with torch.no_grad():
        for p in model.net.parameters():
            p.zero_()
        model.net.weight[0][:, 2:, 0] = 1.0  # log-variances before the bounds = s
    s = torch.linspace(-100, 100, 2_001)[:, None]
    logvar = model(s, torch.zeros_like(s))[1].detach()[..., 0]
    slack = math.log1p(math.exp(-10 - 0.5))
    assert (logvar >= -10).all() and (logvar <= 0.5 + slack + 1e-6).all()
    assert (logvar.diff(dim=1) >= 0).all()
    assert logvar[:, 0].tolist() == pytest.approx([-10] * 7, abs=1e-4)
    assert logvar[:, -1].tolist() == pytest.approx([0.5] * 7, abs=1e-4)
    middle = s[:, 0].abs() < 0.05  # far inside the bounds of -10 and 20, it is nearly the identity
    model.max_logvar.data += 20
    assert model(s, torch.zeros_like(s))[1][:, middle].abs().max() < 0.06


def test_the_ensemble_recovers_a_linear_gaussian_system_and_its_noise():
    """Linear members, so that the answer is known: (D, noise)."""
    truth, data = linear_system(noise=0.3)
    flags = {"model_hidden": (), "model_lr": 1e-2, "batch_size": 32, "model_epochs": 10}
    model, held_out = fitted(data, **flags)
    weight = model.net.weight[0][:, :3].mT / model.input_std[:, None]
    assert (weight[model.elites].mean(0) - truth).abs().max() < 0.05
    batch = data.batch(held_out)
    std = (model(batch.obs, batch.action)[1] / 2).exp()[model.elites].mean((0, 1))
    assert std.tolist() == pytest.approx([0.3] * 3, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_swish_ensemble_learns_the_system_and_its_noise(noise):
    truth, data = linear_system(size=3_000, noise=noise)
    model, held_out = fitted(data, model_lr=3e-3, batch_size=64, model_epochs=20)
    batch = data.batch(held_out)
    mean, logvar = (y.detach()[model.elites] for y in model(batch.obs, batch.action))
    miss = mean - torch.cat([batch.obs, batch.action], 1) @ truth
    assert miss.square().mean() < 1e-3 + 0.05 * noise**2  # variances of x are 1 to 5
    std = (logvar / 2).exp().mean((0, 1))
    if noise:
        assert std.tolist() == pytest.approx([noise] * 3, rel=0.2)
    else:
        assert std.max() < 0.1
    errors = mopo.squared_error(model, batch)  # of the restored weights
    assert model.elites.tolist() == errors.argsort()[:5].tolist()


def test_each_member_goes_back_to_its_best_weights(monkeypatch):
    """Held-out errors are dictated: member i is best in epoch i; later changes are below 1%."""
    _, data = linear_system(size=500)
    seen = []

    def dictated(model, _):
        seen.append([p.detach().clone() for p in model.net.parameters()])
        epoch = len(seen) - 1
        return torch.tensor([1.0 if epoch < i else 0.5 - 0.01 * i - 1e-4 * (epoch - i)
                             for i in range(7)])  # fmt: skip

    monkeypatch.setattr(mopo, "squared_error", dictated)
    model, _ = fitted(data, model_hidden=(4,))
    assert len(seen) == 7 + 5  # and stops 5 epochs after the last improvement
    for i in range(7):
        for p, kept in zip(model.net.parameters(), seen[i], strict=True):
            assert torch.equal(p[i], kept[i])
    assert model.elites.tolist() == [6, 5, 4, 3, 2]


def test_a_model_that_diverges_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(mopo, "squared_error", lambda *_: torch.full((7,), math.nan))
    with pytest.raises(mopo.UserError, match="--model-lr"):
        fitted(linear_system(size=100, episode_length=20)[1])


def test_squared_error_is_the_mean_over_transitions_and_dimensions():
    torch.manual_seed(0)
    model, batch = Model(units(), Args(model_hidden=(5,))), random_batch()
    x = torch.cat([batch.next_obs - batch.obs, batch.reward[:, None]], 1)
    mean = model(batch.obs, batch.action)[0]
    expected = [((mean[i] - x) ** 2).sum().item() / (8 * 4) for i in range(7)]
    assert mopo.squared_error(model, batch).tolist() == pytest.approx(expected, rel=1e-5)


def test_held_out_are_whole_episodes_that_the_fit_never_sees(monkeypatch):
    """Also: each member's bootstrap sample is its own and stays, in another order each epoch, and
    inputs and outcomes belong together."""
    _, data = linear_system(size=500, episode_length=20)
    data.transitions.terminal[19::20] = 1
    seen, loss, ends, terminal_logit = [], Model.loss, [], Model.terminal_logit
    rows = {tuple(s): i for i, s in enumerate(data.transitions.obs.tolist())}

    def spy(model, obs, action, x):
        batch = data.batch(torch.tensor([rows[tuple(s)] for s in obs.reshape(-1, 2).tolist()]))
        assert torch.equal(action.reshape(-1, 1), batch.action)
        assert torch.equal(x.reshape(-1, 3), mopo.outcome(batch))
        seen.append(obs)
        return loss(model, obs, action, x)

    monkeypatch.setattr(Model, "loss", spy)
    monkeypatch.setattr(
        Model, "terminal_logit", lambda m, s: ends.append(s) or terminal_logit(m, s)
    )
    adam, made = mopo.Adam, []
    monkeypatch.setattr(mopo, "Adam", lambda *x, **y: made.append(adam(*x, **y)) or made[-1])
    model, held_out = fitted(data, model_epochs=3, terminal_updates=50)
    rates = [optimizer.lr.item() for optimizer in made]  # the classifier's falls
    assert rates == pytest.approx([1e-3, 0], abs=1e-8)
    assert len(held_out) == 3 * 20  # a tenth of 25 episodes, rounded up
    assert (data.episode[held_out].bincount(minlength=25) % 20 == 0).all()
    train = torch.ones(500, dtype=torch.bool)
    train[held_out] = False
    batch = data.batch(train)
    inputs = torch.cat([batch.obs, batch.action], 1)
    assert torch.equal(model.input_mean, inputs.mean(0))
    assert torch.equal(model.input_std, inputs.std(0))

    epochs = torch.cat(seen, 1).split(440, 1)  # (members, 440, 2): as many as there are
    samples = [[sorted(member.tolist()) for member in epoch] for epoch in epochs]
    assert samples[0] == samples[1] == samples[2] and epochs[0].tolist() != epochs[1].tolist()
    assert all(a != b for a, b in itertools.combinations(samples[0], 2))
    fit = {tuple(s) for s in epochs[0].reshape(-1, 2).tolist()}
    assert fit <= {tuple(s) for s in batch.obs.tolist()} and len(fit) > 430  # few are in no sample
    next_obs = {tuple(s) for s in batch.next_obs.tolist()}
    assert {tuple(s) for s in torch.cat(ends[:50]).tolist()} <= next_obs
    is_end = {tuple(s) for s in batch.next_obs[batch.terminal == 1].tolist()}
    assert all(
        [tuple(s) in is_end for s in x.tolist()] == [True] * 128 + [False] * 128 for x in ends[:50]
    )


def test_the_data_must_have_two_episodes():
    with pytest.raises(mopo.UserError, match="two"):
        mopo.split(linear_system(size=100, episode_length=100)[1])


def test_constant_inputs_do_not_divide_by_zero():
    _, data = linear_system(size=200, episode_length=20)
    data.transitions = data.transitions._replace(action=torch.zeros(200, 1))
    model, held_out = fitted(data, model_epochs=2)
    assert mopo.squared_error(model, data.batch(held_out)).isfinite().all()
    assert model.input_std[2] == 1


# ---- The penalty ----


def constant_model(means, stds, **flags):
    """Member i predicts N(means[i], stds[i]^2) in every dimension of x, whatever (s, a) is."""
    model = Model(units(obs_dim=2), Args(model_hidden=(), **flags))
    model.max_logvar.data += 20  # no bound near the wanted stds
    model.min_logvar.data -= 20
    with torch.no_grad():
        model.net.weight[0].zero_()
        model.net.bias[0][:, :3, 0] = torch.tensor(means)[:, None]
        model.net.bias[0][:, 3:, 0] = 2 * torch.tensor(stds).log()[:, None]
    return model


def test_both_uncertainties_by_hand():
    means, stds = [0.0, 0, 0, 0, 0, 0, 7.0], [0.1, 0.2, 0.7, 0.3, 0.1, 0.1, 0.1]
    obs, action = torch.randn(4, 2), torch.randn(4, 1)
    model = constant_model(means, stds)
    model.elites.copy_(torch.tensor([0, 1, 3, 4, 5]))  # u is over all members
    u = model.uncertainty(*model(obs, action))
    assert u.tolist() == pytest.approx([0.7 * math.sqrt(3)] * 4, rel=1e-4)  # of s' and r
    model = constant_model(means, stds, uncertainty="disagreement")
    u = model.uncertainty(*model(obs, action))
    assert u.tolist() == pytest.approx([6.0 * math.sqrt(2)] * 4, rel=1e-4)  # of s', mean 1


def test_uncertainty_is_of_each_row_alone():
    torch.manual_seed(0)
    for name in ("aleatoric", "disagreement"):
        model = Model(units(), Args(model_hidden=(16,), uncertainty=name))
        obs, action = torch.randn(9, 3), torch.randn(9, 1)
        u = model.uncertainty(*model(obs, action))
        alone = [model.uncertainty(*model(obs[i : i + 1], action[i : i + 1])) for i in range(9)]
        assert u.shape == (9,) and torch.allclose(u, torch.cat(alone), atol=1e-6)


def test_the_penalty_is_larger_off_the_data_than_on_it():
    """A pendulum-like system, nonlinear, with the same noise everywhere: what grows off the data is
    the model's own ignorance."""
    torch.manual_seed(0)
    obs, action = torch.randn(4_000, 2), torch.rand(4_000, 1) * 2 - 1
    change = torch.stack([obs[:, 1], torch.sin(2 * obs[:, 0]) + action[:, 0]], 1)
    change = change + 0.05 * torch.randn(4_000, 2)
    reward = -obs.square().sum(1)
    data = make_data(Batch(obs, action, reward, obs + change, torch.zeros(4_000)), 50)
    model, held_out = fitted(data, model_lr=3e-3, batch_size=64, model_epochs=15)
    far = 5 * normalize(torch.randn(400, 2))  # the data lie within about 3
    for model.disagreement in (False, True):
        near = model.uncertainty(*model(*data.batch(held_out)[:2])).mean()
        assert model.uncertainty(*model(far, torch.zeros(400, 1))).mean() > 2 * near


# ---- The theory, on tabular MDPs read out of the model buffer ----

GAMMA, STATES, ACTIONS = 0.9, 3, 2


class TabularModel(nn.Module):
    """A deterministic model of s' with the true rewards, and the L1 distance from the truth."""

    def __init__(self, truth, next_state, reward):
        super().__init__()
        self.next_state, self.reward = next_state, reward
        self.u = (torch.eye(STATES)[next_state] - truth).abs().sum(-1)

    def imagine(self, obs, action):
        s, a = obs.argmax(1), (action[:, 0] > 0).long()
        next_obs = torch.eye(STATES)[self.next_state[s, a]]
        return self.reward[s, a], next_obs, torch.zeros(len(s)), self.u[s, a]


def penalised_mdp(model, penalty):
    """Rewards (S, A) and next states (S, A) as `rollout` stores them."""
    agent = make_agent(STATES, penalty=penalty, rollout_starts=200)
    del agent.policy
    agent.model = model
    agent.policy = lambda obs: mopo.TanhNormal(torch.zeros(len(obs), 1), torch.ones(len(obs), 1))
    obs = torch.eye(STATES).repeat(10, 1)
    agent.rollout(make_data(Batch(obs, obs[:, :1], obs[:, 0], obs, obs[:, 0]), 10))
    rows = stored(agent)
    s, a = rows.obs.argmax(1), (rows.action[:, 0] > 0).long()
    reward, next_state = torch.full((STATES, ACTIONS), math.nan), torch.zeros(3, 2).long()
    reward[s, a], next_state[s, a] = rows.reward, rows.next_obs.argmax(1)
    assert reward.isfinite().all()  # all pairs occur
    return reward.double(), torch.eye(STATES).double()[next_state]


def value(transition, reward, policy):
    """V (S,) of a policy (S, A), exactly."""
    p, r = torch.einsum("sa,sat->st", policy, transition), (policy * reward).sum(1)
    return torch.linalg.solve(torch.eye(STATES).double() - GAMMA * p, r)


def policies(random):
    """All deterministic ones, and as many random ones."""
    for actions in itertools.product(range(ACTIONS), repeat=STATES):
        yield torch.eye(ACTIONS).double()[list(actions)]
    for _ in range(random):
        yield torch.distributions.Dirichlet(torch.ones(STATES, ACTIONS).double()).sample()


def tabular(seed, exact=False):
    torch.manual_seed(seed)
    truth = torch.distributions.Dirichlet(torch.full((STATES, ACTIONS, STATES), 0.3)).sample()
    next_state = truth.argmax(-1)
    if exact:
        truth = torch.eye(STATES)[next_state]
    reward = torch.rand(STATES, ACTIONS) * 2 - 1
    return truth.double(), TabularModel(truth, next_state, reward)


LAMBDA = GAMMA * 1.0 / (1 - GAMMA)  # gamma c, with c = max |r| / (1 - gamma)


@pytest.mark.parametrize("seed", range(10))
def test_the_theorems_hold_for_the_penalised_mdp(seed):
    """The penalised return is a lower bound for every policy; the best policy there satisfies
    theorem 4.4; lemma 4.1: eta_model - eta = gamma E_model[ E_model[V(s')] - E_true[V(s')] ]."""
    truth, model = tabular(seed)
    plain = model.reward.double()
    reward, transition = penalised_mdp(model, LAMBDA)
    found = []
    for policy in policies(random=20):
        true, bound = value(truth, plain, policy), value(transition, reward, policy)
        assert (bound <= true + 1e-4).all()
        error = value(transition, model.u.double(), policy).mean()  # eps_u, rho_0 is uniform
        found.append((bound.mean().item(), true.mean().item(), (true.mean() - 2 * LAMBDA * error)))
        change = torch.einsum("sat,t->sa", transition - truth, true)
        difference = value(transition, plain, policy) - true
        assert torch.allclose(difference, GAMMA * value(transition, change, policy), atol=1e-10)
    found = found[: ACTIONS**STATES]  # the deterministic ones, of which one is best
    assert max(found)[1] >= max(x[2] for x in found) - 1e-6


def test_without_the_penalty_the_bound_fails_and_with_an_exact_model_it_is_tight():
    violated = 0
    for seed in range(10):
        truth, model = tabular(seed)
        reward, transition = penalised_mdp(model, 0.0)
        for policy in policies(random=0):
            true = value(truth, model.reward.double(), policy)
            violated += (value(transition, reward, policy) > true + 1e-3).any().item()
    assert violated > 20
    truth, model = tabular(0, exact=True)
    reward, transition = penalised_mdp(model, LAMBDA)
    for policy in policies(random=20):
        true = value(truth, model.reward.double(), policy)
        assert torch.allclose(value(transition, reward, policy), true, atol=1e-5)


# ---- Rollouts ----


def rolled_out(**flags):
    agent, data = world_agent(**flags)
    torch.manual_seed(1)
    agent.rollout(data)
    return agent, data, stored(agent)


def test_penalty_0_is_plain_model_based_rollouts_bit_for_bit():
    agent, data, rows = rolled_out(penalty=0.0)
    torch.manual_seed(1)
    obs, plain = data.sample(20).obs, []
    with torch.no_grad():
        for _ in range(3):
            action = agent.policy(obs).normal.sample().tanh()
            reward, next_obs, terminal, _ = agent.model.imagine(obs, action)
            plain.append(Batch(obs, action, reward, next_obs, terminal))
            obs = next_obs
    for mine, its in zip(rows, map(torch.cat, zip(*plain, strict=True)), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("uncertainty", ["aleatoric", "disagreement"])
def test_the_penalty_lowers_each_reward_by_lambda_times_its_own_u(uncertainty):
    _, _, plain = rolled_out(penalty=0.0)
    agent, _, penalised = rolled_out(penalty=2.5, uncertainty=uncertainty)
    assert torch.equal(plain.next_obs, penalised.next_obs)
    u = agent.model.uncertainty(*agent.model(plain.obs, plain.action))
    assert u.std() > 0
    assert torch.allclose(plain.reward - penalised.reward, 2.5 * u, atol=1e-5)


def test_a_step_that_ends_the_episode_is_penalised_too():
    def ends(penalty):
        agent, data = world_agent(penalty=penalty)
        agent.model.terminal_threshold.fill_(-agent.model.never)
        torch.manual_seed(1)
        agent.rollout(data)
        return agent, stored(agent)

    (agent, rows), (_, plain) = ends(2.5), ends(0.0)
    assert rows.terminal.all() and torch.equal(plain.next_obs, rows.next_obs)
    u = agent.model.uncertainty(*agent.model(rows.obs, rows.action))
    assert torch.allclose(plain.reward - rows.reward, 2.5 * u, atol=1e-5)


def test_with_conservative_rewards_are_not_penalised():
    _, _, combo = rolled_out(penalty=3.0, conservative=1.0, real_ratio=0.5)
    assert torch.equal(combo.reward, rolled_out(penalty=0.0)[2].reward)


class EndsAbove(nn.Module):
    """s' = s + 1 in the first coordinate, terminal where it exceeds `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def imagine(self, obs, action):
        next_obs = obs + torch.tensor([1.0, 0, 0])
        n = len(obs)
        return torch.zeros(n), next_obs, (next_obs[:, 0] > self.limit).float(), torch.zeros(n)


def test_rollouts_start_in_the_data_go_on_where_they_were_and_stop_at_terminals():
    agent, data = world_agent(rollout_length=4)
    data.transitions.obs[:, 0] = torch.arange(40) % 4 - 0.5  # -0.5 to 2.5
    agent.model = EndsAbove(3)
    agent.rollout(data)
    rows = stored(agent)
    known = {tuple(s) for s in data.transitions.obs.tolist()}
    assert all(tuple(s) in known for s in rows.obs[:20].tolist())
    current, position = rows.obs[:20], 0
    for _ in range(4):
        piece = slice(position, position + len(current))
        assert torch.equal(rows.obs[piece], current)
        assert torch.equal(rows.terminal[piece], (rows.next_obs[piece, 0] > 3).float())
        current = rows.next_obs[piece][rows.terminal[piece] == 0]
        position = piece.stop
    assert position == len(rows.obs) < 4 * 20
    for limit, rounds in ((math.inf, 4), (-math.inf, 1)):  # never and at once
        agent, data = world_agent(rollout_length=4)
        agent.model = EndsAbove(limit)
        agent.rollout(data)
        rows = stored(agent)
        assert len(rows.obs) == rounds * 20
        assert (rows.terminal == (rounds == 1)).all()  # the last step bootstraps


def test_rollout_actions_are_samples_of_the_policy_and_leave_no_graph():
    agent, _, rows = rolled_out(rollout_starts=4_000, rollout_length=1)
    pi = agent.policy(rows.obs).normal
    z = (rows.action.atanh() - pi.mean) / pi.stddev
    assert abs(z.mean()) < 0.06 and abs(z.std() - 1) < 0.05
    assert not any(x.requires_grad for x in rows)


def test_a_step_is_a_sample_of_one_elite_per_row():
    """Elite i predicts N(10 i, 0.1^2 i^2) in all dimensions: the row tells who made it."""
    model = constant_model([10.0 * i for i in range(7)], [0.1 * max(i, 0.01) for i in range(7)])
    elites = [1, 2, 4, 5, 6]
    model.elites.copy_(torch.tensor(elites))
    torch.manual_seed(0)
    obs = torch.randn(50_000, 2)
    reward, next_obs, terminal, _ = model.imagine(obs, torch.randn(50_000, 1))
    x = torch.cat([next_obs - obs, reward[:, None]], 1).detach()
    member = (x / 10).round()
    assert (member == member[:, :1]).all()  # s' and r are from the same member
    assert sorted(set(member[:, 0].int().tolist())) == elites
    for i in elites:
        mine = x[member[:, 0] == i]
        assert len(mine) == pytest.approx(10_000, abs=400)
        assert mine.mean(0).tolist() == pytest.approx([10.0 * i] * 3, abs=0.02)
        assert mine.std(0).tolist() == pytest.approx([0.1 * i] * 3, rel=0.04)
    assert not terminal.any()  # untrained, the classifier is off


def test_an_imagined_state_stays_within_twice_the_range_of_the_data(monkeypatch):
    _, data = linear_system(size=500, episode_length=20)
    data.transitions.next_obs[:, 0] += 5  # s' counts too
    model, held_out = fitted(data, model_epochs=1)
    train = torch.ones(500, dtype=torch.bool)
    train[held_out] = False
    states = torch.cat([data.transitions.obs[train], data.transitions.next_obs[train]])
    low, high = states.amin(0), states.amax(0)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    assert torch.allclose(model.obs_range, torch.stack([low, high]))
    asked = []
    monkeypatch.setattr(model, "terminal_logit", lambda s: asked.append(s) or s[:, 0])
    for jump, ends in ((1e3, high), (-1e3, low)):
        model.net.bias[-1].data[:, :2] = jump
        _, next_obs, *_ = model.imagine(torch.zeros(50, 2), torch.zeros(50, 1))
        assert torch.allclose(next_obs, ends.expand(50, 2))
        assert torch.equal(asked.pop(), next_obs)  # it is judged where it is
    model.net.bias[-1].data.zero_()
    model.net.weight[-1].data.zero_()  # s' - s ~ N(0, 1)
    _, next_obs, *_ = model.imagine(torch.zeros(2_000, 2), torch.zeros(2_000, 1))
    assert ((next_obs > low) & (next_obs < high)).all() and len(next_obs.unique()) == 4_000


# ---- Terminals ----


@cache
def hopper_like():
    """Terminal where z < 0.7 or |angle| > 0.2, as are 1.5% of s'; fitted."""
    torch.manual_seed(0)
    scale, center = torch.tensor([0.2, 0.08, 2.0, 2.0]), torch.tensor([1.25, 0.0, 0, 0])
    next_obs = torch.randn(20_000, 4) * scale + center
    terminal = ((next_obs[:, 0] < 0.7) | (next_obs[:, 1].abs() > 0.2)).float()
    obs = next_obs + 0.1 * torch.randn(20_000, 4)
    batch = Batch(obs, torch.rand(20_000, 1), torch.ones(20_000), next_obs, terminal)
    data = make_data(batch, 100)
    return data, *fitted(data, model_epochs=1, model_hidden=(64, 64))


def test_terminals_are_learned_from_the_data():
    data, model, held_out = hopper_like()
    batch = data.batch(held_out)
    said, is_end = model.terminal_logit(batch.next_obs) > model.terminal_threshold, batch.terminal
    precision, recall = ((said * is_end).sum() / n.sum() for n in (said, is_end))
    assert precision > 0.8 and recall > 0.8
    assert [*mopo.found_terminals(model, batch).values()] == [
        [is_end.sum(), said.sum()],
        (precision, recall),
    ]


def test_it_is_the_state_arrived_at_that_ends_an_episode(monkeypatch):
    model = constant_model([3.0] * 7, [0.5] * 7)
    monkeypatch.setattr(model, "terminal_logit", lambda obs: obs[:, 0])
    model.terminal_threshold.fill_(2.0)
    torch.manual_seed(0)
    obs = torch.randn(1_000, 2)
    _, next_obs, terminal, _ = model.imagine(obs, torch.randn(1_000, 1))
    assert torch.equal(terminal, (next_obs[:, 0] > 2).float())
    assert 0 < terminal.mean() < 1 and not torch.equal(terminal, (obs[:, 0] > 2).float())


def test_the_threshold_cuts_where_a_terminal_is_more_likely_than_not():
    """s' in {0, 1, 2} is terminal with probability 0.02, 0.3, 0.7: only 2 is more likely than not,
    although on balanced batches 1 is too."""
    torch.manual_seed(0)
    state = torch.randint(3, (20_000,))
    terminal = (torch.rand(20_000) < torch.tensor([0.02, 0.3, 0.7])[state]).float()
    keep = (state == 0) | (torch.rand(20_000) < 0.1)  # terminals are rare
    next_obs, terminal = torch.eye(3)[state[keep]], terminal[keep]
    n = len(terminal)
    batch = Batch(next_obs, torch.rand(n, 1), torch.ones(n), next_obs, terminal)
    model, _ = fitted(make_data(batch, 100), model_epochs=1)
    logit = model.terminal_logit(torch.eye(3))
    assert logit[1] > 0
    assert (logit > model.terminal_threshold).tolist() == [False, False, True]
    odds = (logit - model.terminal_threshold).sigmoid()
    assert odds.tolist() == pytest.approx([0.02, 0.3, 0.7], abs=0.08)


def test_the_threshold_is_where_as_many_terminals_are_expected_as_there_are(monkeypatch):
    torch.manual_seed(0)
    model, batch = Model(units(), Args(model_hidden=())), random_batch(20_000)
    with monkeypatch.context() as patch:  # a classifier that is 4 too sure of the end
        patch.setattr(model, "terminal_logit", lambda obs: 2 * obs[:, 0] + 3)
        chance = (2 * batch.next_obs[:, 0] - 1).sigmoid()
        mopo.calibrate(model, batch._replace(terminal=(torch.rand(20_000) < chance).float()))
        assert model.terminal_threshold.item() == pytest.approx(4, abs=0.1)

    def expected(batch):
        logit = model.terminal_logit(batch.next_obs)
        return (logit - model.terminal_threshold).sigmoid().sum().item()

    train, held_out, args = random_batch(90), random_batch(20), Args(terminal_updates=1)
    train.terminal[:], held_out.terminal[:] = torch.arange(90) < 10, torch.arange(20) < 7
    mopo.fit_terminal(model, train, held_out, args)
    assert expected(held_out) == pytest.approx(7, abs=0.01)
    mopo.fit_terminal(model, train, random_batch(20, terminal=0.0), args)
    assert expected(train) == pytest.approx(10, abs=0.01)


def test_without_terminals_none_is_imagined_and_where_all_are_all_are():
    for kind in (0.0, 1.0):
        _, data = linear_system(size=100, episode_length=5)
        data.transitions.terminal.fill_(kind)
        model, held_out = fitted(data, model_epochs=1)
        obs, action = 1e3 * torch.randn(1_000, 2), torch.randn(1_000, 1)
        assert (model.imagine(obs, action)[2] == kind).all()
        assert all(x.isfinite().all() for x in model.state_dict().values())
        (text, counts), *_ = mopo.found_terminals(model, data.batch(held_out)).items()
        assert counts == ([10, 10] if kind else []) and ("never ends one" in text) == (not kind)


# ---- The model buffer ----


@pytest.mark.parametrize("seed", range(10))
def test_the_buffer_is_first_in_first_out(seed):
    """Against a list: whatever the sizes of the additions, it holds exactly the newest rows."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 40))
    buffer, rows, count = ModelBuffer(units(), capacity), [], 0
    for _ in range(12):
        n = int(rng.integers(0, capacity + 1))
        number = torch.arange(count + 1, count + n + 1).float()  # 0 would be an empty row
        wide = number[:, None].expand(n, 3)
        buffer.add(Batch(wide, -wide[:, :1], number + 0.25, wide + 0.5, number % 2))
        count += n
        rows = [*rows, *number.tolist()][-capacity:]
        assert sorted(stored(buffer).obs[:, 0].tolist()) == rows
        if rows:
            drawn = buffer.sample(1_000)
            number = drawn.obs[:, 0]
            assert set(number.tolist()) == set(rows)  # never an empty row, and all of them
            assert torch.equal(drawn.obs, number[:, None].expand(-1, 3))  # columns stay together
            assert torch.equal(drawn.action, -number[:, None])
            assert torch.equal(drawn.reward, number + 0.25)
            assert torch.equal(drawn.next_obs, drawn.obs + 0.5)
            assert torch.equal(drawn.terminal, number % 2)


def test_the_buffer_of_an_agent_holds_five_rounds_of_rollouts():
    agent, data = world_agent(rollout_starts=6, rollout_length=2)
    for _ in range(7):
        agent.rollout(data)
    assert len(stored(agent).obs) == len(agent.model_buffer.rows) == 5 * 6 * 2


def test_batches_have_exactly_the_real_share_and_real_rewards_stay():
    for ratio, real in ((0.0, 0), (0.05, 13), (0.29, 74), (0.5, 128), (1.0, 256)):
        agent, data, _ = rolled_out(real_ratio=ratio, penalty=100.0)
        known = {tuple(s): i for i, s in enumerate(data.transitions.next_obs.tolist())}
        batch = agent.sample(data)
        rows = [known.get(tuple(s)) for s in batch.next_obs.tolist()]
        assert [row is not None for row in rows] == [True] * real + [False] * (256 - real)
        for mine, its in zip(batch, data.batch(rows[:real]), strict=True):
            assert torch.equal(mine[:real], its)


# ---- SAC and COMBO ----


def test_silent_broadcasting_in_the_model_is_an_error():
    agent, data = world_agent()
    batch = random_batch(4)
    with pytest.raises(AssertionError):
        agent.model.loss(batch.obs, batch.action, torch.zeros(4))
    agent.model.uncertainty = lambda mean, logvar: torch.ones(20, 1)
    with pytest.raises(AssertionError):
        agent.rollout(data)


def test_an_update_leaves_the_model_and_the_gradients_of_others_alone():
    agent, data, _ = rolled_out()
    before = clone(agent.model)
    agent.update(agent.sample(data))
    assert same(before, agent.model)
    others = [*agent.model.parameters(), *agent.critic_target.parameters()]
    assert all(p.grad is None for p in others)


# ---- Diagnosis, health ----


def test_diagnose_equals_values_by_hand():
    torch.manual_seed(0)
    agent, data, rows = rolled_out()
    for x in agent.critic_target.parameters():
        x.data += 1
    agent.critic.net.bias[-1].data[0] += torch.tensor([[0.1]])  # either may be the smaller
    batch = data.transitions
    action = forward(clone(agent.policy), batch.obs)[0, :, :1].tanh()

    def u(a):
        logvar = agent.model(batch.obs, a)[1]
        return max_norm((logvar / 2).exp())

    def max_norm(std):
        return std.square().sum(-1).sqrt().max(0).values.mean().item()

    q_data, q_policy = (agent.critic(batch.obs, a) for a in (batch.action, action))
    torch.manual_seed(2)
    drawn = (torch.rand(40) * 60).long()
    expected = {
        "q_data": torch.minimum(*q_data).mean().item(),
        "q_policy": torch.minimum(*q_policy).mean().item(),
        "action_distance": (action - batch.action).square().sum().div(40).sqrt().item(),
        "u_data": u(batch.action),
        "u_policy": u(action),
        "model_reward": rows.reward[drawn].mean().item(),
    }
    assert (q_data[0] < q_data[1]).float().mean() not in (0, 1)
    torch.manual_seed(2)
    metrics = agent.diagnose(batch)
    close(metrics, expected)
    assert len({round(x, 4) for x in expected.values()}) == 6


def test_health_compares_q_with_rewards_that_have_the_bonus_and_the_penalty():
    """Rewards are 0 to 1, the bonus 0.2 * 0.5, lambda u 2 * 0.3 in the imagined half of a batch,
    gamma 0.9, the episode is cut. The bonus comes a step late: possible are 10 times 0.09 - 0.3 to
    1.09 - 0.3 or, without the penalty, 0 to 1.09."""
    reward = torch.tensor([0.0, 1.0]).repeat(50)
    data = make_data(random_batch(100, terminal=0.0)._replace(reward=reward), 100)
    facts = {"temperature": 0.2, "entropy": 0.5, "u_policy": 0.3, "u_data": 7.0}

    def health(q, **flags):
        args = Args(gamma=0.9, **({"penalty": 2.0, "real_ratio": 0.5} | flags))
        return mopo.health(facts | {"q_data": 0.0, "q_policy": q}, data, args)

    assert "a penalty of 1 u" in health(7.8) and "possible are -2.1 to 7.9" in health(7.8)
    assert "possible are 0 to 10.9" in health(10.8, conservative=1.0)
    assert "possible are 0 to 10.9" in health(10.8, real_ratio=1.0)
    for q, advice in ((8.1, "Raise --penalty."), (-2.3, "Lower --penalty.")):
        assert health(q).endswith(advice)
    for q in (-2, 7.8):
        assert "Raise" not in health(q) and "Lower" not in health(q)
    assert health(11.2, penalty=0.0).endswith("Raise --penalty.")
    assert health(-0.2, penalty=0.0).endswith("Lower --critic-lr.")
    assert health(-0.2, real_ratio=1.0).endswith("Lower --critic-lr.")  # where no penalty is taken
    assert health(11.2, conservative=1.0).endswith("Raise --conservative.")
    assert health(-0.2, conservative=1.0).endswith("Lower --conservative.")
    assert torch.equal(data.transitions.reward, reward)
    data.transitions = data.transitions._replace(reward=0 * reward)
    assert health(1.0) == "all rewards are 0, nothing can be learned"


# ---- The report ----


def perfect_model(noise=0.1):
    truth, data = linear_system(noise=noise)
    model = Model(data.units, Args(model_hidden=()))
    model.max_logvar.data += 20
    model.min_logvar.data -= 20
    with torch.no_grad():
        model.net.weight[0].zero_()
        model.net.weight[0][:, :3] = truth.T
        model.net.bias[0][:, :3] = 0
        model.net.bias[0][:, 3:] = 2 * math.log(noise or 1e-3)
    return model, data, truth


def reported(model, data, held_out, **flags):
    """The report's first line and {its rows' names: their numbers}."""
    first, *lines, _ = mopo.model_report(model, data, held_out, Args(**flags)).splitlines()
    return first, {line[:48].strip(): [float(x) for x in line[48:].split()] for line in lines}


def test_the_report_on_a_right_and_on_an_overconfident_model():
    model, data, _ = perfect_model()
    batch, everything = data.transitions, torch.arange(len(data.episode))
    x = mopo.outcome(batch)
    first, rows = reported(model, data, everything, penalty=3.0)
    assert f"{len(x)} transitions of held-out" in first
    share = rows["squared error of each elite / variance"]
    assert share == pytest.approx([(0.01 / x.var(0)).mean().item()] * 5, rel=0.05)
    inside = "share within 1 std (a right Gaussian: 0.683)"
    assert rows[inside] == pytest.approx([0.683] * 5, abs=0.01)
    with torch.no_grad():
        u = model.uncertainty(*model(batch.obs, batch.action))
    for name, value in (("penalty", 3 * u), ("|r|", batch.reward.abs())):
        expected = [value.mean().item(), value.max().item()]
        assert rows[f"{name}, mean and largest"] == pytest.approx(expected, rel=0.01)
    assert reported(model, data, everything, conservative=1.0)[1]["penalty, mean and largest"] == [
        0,
        0,
    ]
    with torch.no_grad():
        model.net.bias[0][:, 3:] -= math.log(4)  # half the std
    assert reported(model, data, everything)[1][inside] == pytest.approx([0.383] * 5, abs=0.01)


def test_the_report_leaves_out_what_is_constant():
    """An error there is no multiple of the variance, 0."""
    model, data, _ = perfect_model()
    batch, everything = data.transitions, torch.arange(len(data.episode))
    change = batch.next_obs - batch.obs
    data.transitions = batch._replace(reward=torch.full_like(batch.reward, -1.0))
    share = reported(model, data, everything)[1]["squared error of each elite / variance"]
    assert share == pytest.approx([(0.01 / change.var(0)).mean().item()] * 5, rel=0.05)
    constant = torch.full((len(change), 1), 0.7)
    obs, next_obs = (torch.cat([x[:, :1], constant], 1) for x in (batch.obs, batch.next_obs))
    data.transitions = batch._replace(obs=obs, next_obs=next_obs)
    with torch.no_grad():
        _, (none,) = mopo.growth(model, data, everything, 1).values()
    expected = (change[:, 0] / obs[:, 0].std()).square().mean().sqrt()
    assert none.item() == pytest.approx(expected.item(), rel=1e-4)
    data.transitions = batch  # a model that diverges is not taken for a constant
    model.net.weight[0].data[:, 0] = math.nan  # in one column
    share = reported(model, data, everything)[1]["squared error of each elite / variance"]
    with torch.no_grad():
        own, _ = mopo.growth(model, data, everything, 1).values()
    assert math.isnan(share[0]) and math.isnan(own[0])


def test_the_report_on_fewer_transitions_than_fifths():
    model, data, _ = perfect_model()
    rows = reported(model, data, torch.arange(3))[1]
    assert len(rows["u, by fifths"]) == 3 and all(
        map(math.isfinite, itertools.chain(*rows.values()))
    )


def test_the_growth_table_of_a_perfect_model_is_zero_and_of_a_wrong_one_is_exact():
    """Trajectories, so that the rows of an episode follow each other."""
    model, data, truth = perfect_model(noise=0.0)
    obs, rows = torch.randn(2), []
    for t in range(200):
        if t % 20 == 0:
            obs = torch.randn(2)
        action = torch.rand(1) * 2 - 1
        x = torch.cat([obs, action]) @ truth
        rows.append((obs, action, x[2], obs + x[:2], torch.tensor(0.0)))
        obs = obs + x[:2]
    data = make_data(Batch(*map(torch.stack, zip(*rows, strict=True))), 20)
    held_out = torch.arange(140, 200)

    @torch.no_grad()
    def growth(h):
        return [[float(x) for x in row] for row in mopo.growth(model, data, held_out, h).values()]

    own, none = growth(4)
    assert own == pytest.approx([0] * 4, abs=1e-5)
    starts = [t for t in range(140, 200) if t % 20 <= 16]  # where 4 steps of the episode follow
    scale = data.transitions.obs.std(0)
    for k in range(4):
        moved = data.transitions.next_obs[[t + k for t in starts]] - data.transitions.obs[starts]
        assert none[k] == pytest.approx((moved / scale).square().mean().sqrt().item(), rel=0.01)
    model.net.weight[0].data[5:].zero_()  # not elites: theirs is not the imagined world
    assert growth(4)[0] == own
    model.net.weight[0].data.zero_()  # predicts no change
    assert growth(4)[0] == none
    assert growth(21) == [[], []]  # no episode is as long


def test_the_report_has_the_error_where_u_is_low_and_where_it_is_high(monkeypatch):
    model, data, _ = perfect_model()
    everything = torch.arange(len(data.episode))
    u = torch.randperm(len(everything)).float()
    monkeypatch.setattr(model, "uncertainty", lambda *_: u)
    forward = model.forward

    def wrong_by_u(obs, action):
        mean, logvar = forward(obs, action)
        side = 1 - torch.arange(len(mean))[:, None, None] % 2 * 2  # errors do not cancel out
        return mean + (side * u[:, None] if len(mean[0]) == len(u) else 0), logvar

    monkeypatch.setattr(model, "forward", wrong_by_u)
    rows, fifth = reported(model, data, everything)[1], len(u) / 5
    expected = [(k + 0.5) * fifth - 0.5 for k in range(5)]
    assert rows["u, by fifths"] == pytest.approx(expected, rel=0.01)
    assert rows["error |m - x| there"] == pytest.approx([3**0.5 * x for x in expected], rel=0.01)


def test_the_report_warns_where_terminals_are_missed(monkeypatch):
    model, batch = Model(units(), Args(model_hidden=())), random_batch(20, terminal=0.0)
    monkeypatch.setattr(model, "terminal_logit", lambda obs: obs[:, 0])
    model.terminal_threshold.fill_(0.5)
    batch.terminal[:10] = 1
    for found, alarms, warned in ((7, 0, True), (8, 8, False)):
        batch.next_obs[:, 0] = 0
        batch.next_obs[:found, 0] = 1
        batch.next_obs[10 : 10 + alarms, 0] = 1
        table = mopo.found_terminals(model, batch)
        counts, shares, *_ = table.values()
        assert counts == [10, found + alarms]
        assert [float(x) for x in shares] == pytest.approx([found / (found + alarms), found / 10])
        assert any(name.startswith("warning") for name in table) == warned


# ---- Runs ----


def test_discrete_actions_are_one_clear_line_and_leave_no_folder(tmp_path):
    with pytest.raises(mopo.UserError, match=r"Box.*cql\.py"):
        mopo.main(Args(dataset_id=("cartpole/mixed-v0[:2%]",), out_dir=str(tmp_path / "runs")))
    with pytest.raises(mopo.UserError, match="two"):
        mopo.main(Args(dataset_id=("pendulum/mixed-v0[:1%]",), out_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("real_ratio", [0.0, 0.001, 0.999, 1.0])
def test_combo_needs_real_and_imagined_transitions_in_each_batch(real_ratio):
    with pytest.raises(mopo.UserError, match="--real-ratio"):
        make_agent(conservative=1.0, real_ratio=real_ratio)


@cache
def four_episodes(_):
    """Of the pendulum, 20 steps each; two are said to end in a terminal state."""
    episodes, *others = mopo.builtin_dataset("pendulum/random-v0")
    short = []
    for i, x in enumerate(episodes[:4]):
        end = np.arange(20) == 19
        ends = (end & (i % 2 == 1), end & (i % 2 == 0))
        columns = (x.actions[:20], x.rewards[:20], *ends, {})
        short.append(EpisodeBuffer(None, None, None, x.observations[:21], *columns))
    return short, *others


SMALL = {"dataset_id": ("four/episodes-v0",), "steps": 6, "log_every": 2, "eval_every": 4}
SMALL |= {"eval_episodes": 2, "hidden": (8,), "model_hidden": (8,), "model_epochs": 3}
SMALL |= {"rollout_starts": 5, "rollout_length": 2, "rollout_every": 3, "batch_size": 16}
SMALL |= {"real_ratio": 0.5, "terminal_updates": 20}


@pytest.mark.parametrize(("call", "fits"), [(1, True), (4, False)])
def test_a_run_that_is_resumed_after_its_first_checkpoint_fits_nothing_again(
    call, fits, tmp_path, monkeypatch
):
    monkeypatch.setattr(mopo, "open_dataset", four_episodes)
    flags, sample, calls = SMALL | {"conservative": 1.0}, mopo.Agent.sample, []
    whole = mopo.main(Args(**flags, out_dir="whole"))

    def stop(self, data):
        calls.append(data)
        if len(calls) == call:
            raise KeyboardInterrupt
        return sample(self, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mopo.Agent, "sample", stop)
        mopo.main(Args(**flags, out_dir="part"))
    (folder,) = Path("part").iterdir()
    fitted, fit = [], mopo.fit_ensemble
    monkeypatch.setattr(mopo, "fit_ensemble", lambda *x: fitted.append(x) or fit(*x))
    assert {**whole, "seconds": 0} == {**mopo.main(Args(resume=str(folder))), "seconds": 0}
    assert bool(fitted) == fits
    loaded = [mopo.load_policy(next(Path(x).iterdir())) for x in ("part", "whole")]
    assert all(map(torch.equal, *(x.state_dict().values() for x in loaded)))
    assert abs(loaded[0].agent.model.terminal_threshold) < 100  # fitted


def test_the_phases_of_a_run(tmp_path, monkeypatch, capsys):
    """The model is fitted to one part of the data and reported on the other; rollouts come before
    the first update and then every rollout_every; metrics are taken on all of the data."""
    monkeypatch.setattr(mopo, "open_dataset", four_episodes)
    order, data = [], Dataset(("four",), normalize_obs=True)

    def spy(owner, name):
        original = getattr(owner, name)
        record = lambda *x: order.append((name, x)) or original(*x)  # noqa: E731
        monkeypatch.setattr(owner, name, record)

    for name in ("fit_ensemble", "fit_terminal", "model_report"):
        spy(mopo, name)
    for name in ("rollout", "update", "diagnose"):
        spy(mopo.Agent, name)
    flags = {"steps": 8, "log_every": 8, "eval_episodes": 0, "seed": 3}
    mopo.main(Args(**(SMALL | flags), out_dir=str(tmp_path)))
    names = ["fit_ensemble", "fit_terminal", "model_report"]
    names += (["rollout"] + ["update"] * 3) * 2 + ["rollout"] + ["update"] * 2 + ["diagnose"]
    assert [name for name, _ in order] == names
    (_, train, held_out, _), (_, *parts, _), (_, _, rows, _) = (x for _, x in order[:3])
    assert len(train.obs) == 60 and len(held_out.obs) == 20
    assert parts[0].obs.equal(train.obs) and parts[1].obs.equal(held_out.obs)
    assert data.batch(rows).obs.equal(held_out.obs)
    ((_, (_, probe)),) = [x for x in order if x[0] == "diagnose"]
    assert probe.obs.equal(data.transitions.obs)
    (folder,) = tmp_path.iterdir()
    report = (folder / "model.txt").read_text()
    assert "20 transitions of held-out episodes" in report and report in capsys.readouterr().out
