"""The mathematics of mopo.py against exact answers: the model, the penalty, the rollouts, SAC and
COMBO on them, and runs."""

import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform
from torch.distributions import TransformedDistribution as Transformed

import cql
import mopo
from mopo import Agent, Args, Batch, Data, Model, ModelBuffer, Units


def units(obs_dim=3, action_dim=1, low=-1.0, high=1.0):
    obs_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
    return Units(obs_space, spaces.Box(low, high, (action_dim,), np.float32))


def make_agent(obs_dim=3, action_dim=1, low=-1.0, high=1.0, **flags):
    small = {"hidden": (16,), "model_hidden": (16,), "rollout_starts": 20, "rollout_length": 3}
    return Agent(Data(units(obs_dim, action_dim, low, high)), Args(**(small | flags)))


def random_batch(n=8, obs_dim=3, action_dim=1, terminal=None):
    obs, next_obs = torch.randn(2, n, obs_dim)
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, torch.rand(n, action_dim) * 2 - 1, torch.randn(n), next_obs, terminal)


def make_data(batch, episode_length, action_dim=1):
    """M transitions in episodes of equal length."""
    episode = torch.arange(len(batch.obs)) // episode_length
    return Data(
        units(batch.obs.shape[1], action_dim),
        batch,
        episode,
        torch.arange(len(batch.obs)),
        returns=np.zeros(int(episode[-1]) + 1),
    )


def linear_system(size=5_000, noise=0.0, episode_length=50, spread=1.0, seed=0):
    """s' = s + (s, a) D + noise, r = (s, a) d + noise: the whole truth is the matrix (3, 3)."""
    torch.manual_seed(seed)
    truth = torch.tensor([[-0.5, 0.3, 1.0], [0.2, -0.4, -2.0], [0.5, 1.0, 0.3]])
    obs, action = spread * torch.randn(size, 2), torch.rand(size, 1) * 2 - 1
    y = torch.cat([obs, action], 1) @ truth + noise * torch.randn(size, 3)
    batch = Batch(obs, action, y[:, 2], obs + y[:, :2], torch.zeros(size))
    return truth, make_data(batch, episode_length)


def trained(data, **flags):
    args = Args(**({"model_hidden": (32,), "model_epochs": 30} | flags))
    torch.manual_seed(1)
    model = Model(data.units, args)
    return model, mopo.train_model(model, data, args), args


# ---- The model ----


def test_the_loss_equals_equation_1_written_out():
    torch.manual_seed(0)
    model = Model(units(), Args(model_hidden=(5,)))
    obs, action, y = torch.randn(7, 6, 3), torch.randn(7, 6, 1), torch.randn(7, 6, 4)
    expected = 0.01 * (4 * 0.5 + 4 * 10)
    for i in range(7):
        x = torch.cat([obs[i], action[i]], 1)
        x = x @ model.net.weight[0][i] + model.net.bias[0][i]
        x = x / (1 + (-x).exp())  # swish
        x = x @ model.net.weight[1][i] + model.net.bias[1][i]
        mu, logvar = x[:, :4], x[:, 4:]
        logvar = 0.5 - (0.5 - logvar).exp().add(1).log()
        logvar = -10 + (logvar + 10).exp().add(1).log()
        expected += ((mu - y[i]) ** 2 / logvar.exp() + logvar).sum() / (6 * 4)
        expected += 0.5 * 5e-5 * sum((w[i] ** 2).sum() for w in model.net.weight)
    assert model.loss(obs, action, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_members_learn_independently():
    model = Model(units(), Args(model_hidden=(5,)))
    obs, action, y = torch.randn(7, 6, 3), torch.randn(7, 6, 1), torch.randn(7, 6, 4)
    before = torch.autograd.grad(model.loss(obs, action, y), model.net.weight[0])[0]
    obs[3] += 1
    after = torch.autograd.grad(model.loss(obs, action, y), model.net.weight[0])[0]
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [i == 3 for i in range(7)]


def test_log_variance_is_bounded_and_monotone():
    """The upper bound is exceeded by at most log(1 + exp(min - max)), as in the official code."""
    model = Model(units(obs_dim=1), Args(model_hidden=()))
    with torch.no_grad():
        for p in model.net.parameters():
            p.zero_()
        model.net.weight[0][:, 0, 2:] = 1.0  # log-variances before the bounds = s
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
    model, held, _ = trained(data, model_hidden=(), model_lr=1e-2, batch_size=32)
    weight = model.net.weight[0][..., :3] / model.input_std[:, None]
    assert (weight[model.elites].mean(0) - truth).abs().max() < 0.05
    batch = data.batch(held)
    sigma = (model(batch.obs, batch.action)[1] / 2).exp()[model.elites].mean((0, 1))
    assert sigma.tolist() == pytest.approx([0.3] * 3, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_swish_ensemble_learns_the_system_and_its_noise(noise):
    truth, data = linear_system(noise=noise)
    model, held, _ = trained(data, model_lr=3e-3, batch_size=64)
    batch = data.batch(held)
    mean, logvar = (x.detach()[model.elites] for x in model(batch.obs, batch.action))
    miss = mean - torch.cat([batch.obs, batch.action], 1) @ truth
    assert miss.square().mean() < 1e-3 + 0.05 * noise**2  # variances of y are 1 to 5
    sigma = (logvar / 2).exp().mean((0, 1))
    if noise:
        assert sigma.tolist() == pytest.approx([noise] * 3, rel=0.2)
    else:
        assert sigma.max() < 0.1


def test_elites_are_the_members_with_the_lowest_held_out_error_after_the_restore():
    _, data = linear_system(size=600, noise=0.5)
    model, held, _ = trained(data, model_hidden=(64,), model_epochs=40, model_lr=1e-2)
    errors = mopo.squared_error(model, data.batch(held))
    assert model.elites.tolist() == errors.argsort()[:5].tolist()


def test_each_member_goes_back_to_its_best_weights(monkeypatch):
    """Held-out errors are dictated: member i is best in epoch i; later changes are below 1%."""
    _, data = linear_system(size=500)
    seen, epochs = [], []

    def dictated(model, _):
        seen.append([p.detach().clone() for p in model.net.parameters()])
        epoch = len(seen) - 1
        epochs.append(epoch)
        return torch.tensor([1.0 if epoch < i else 0.5 - 0.01 * i - 1e-4 * (epoch - i)
                             for i in range(7)])  # fmt: skip

    monkeypatch.setattr(mopo, "squared_error", dictated)
    model, _, _ = trained(data, model_hidden=(4,))
    assert len(epochs) == 7 + 5  # and stops 5 epochs after the last improvement
    for i in range(7):
        for p, kept in zip(model.net.parameters(), seen[i], strict=True):
            assert torch.equal(p[i], kept[i])
    assert model.elites.tolist() == [6, 5, 4, 3, 2]


def test_held_out_are_whole_episodes_that_the_training_never_sees(monkeypatch):
    _, data = linear_system(size=500, episode_length=20)
    seen, loss = [], Model.loss

    def spy(model, obs, action, y):
        seen.append(obs.reshape(-1, 2))
        return loss(model, obs, action, y)

    monkeypatch.setattr(Model, "loss", spy)
    ends, end_logit = [], Model.end_logit
    monkeypatch.setattr(Model, "end_logit", lambda m, x: ends.append(x) or end_logit(m, x))
    data.all.terminal[19::20] = 1
    model, held, _ = trained(data, model_epochs=3)
    assert len(held) == 3 * 20  # a tenth of 25 episodes, rounded up
    assert (data.episode[held].bincount(minlength=25) % 20 == 0).all()
    held_obs = {tuple(x) for x in data.all.obs[held].tolist()}
    seen_obs = [tuple(x) for x in torch.cat(seen).tolist()]
    assert not held_obs & set(seen_obs)
    held_next = {tuple(x) for x in data.all.next_obs[held].tolist()}
    assert not held_next & {tuple(x) for x in torch.cat(ends).tolist()}
    train = torch.ones(500, dtype=torch.bool)
    train[held] = False
    assert torch.equal(model.input_mean[:2], data.all.obs[train].mean(0))
    assert len(seen_obs) == 3 * 7 * 440  # each member draws as many as there are, in each epoch
    assert 430 < len(set(seen_obs)) <= 440  # few are in no member's sample


def test_members_have_their_own_bootstrap_samples_and_keep_them(monkeypatch):
    _, data = linear_system(size=300, episode_length=20)
    seen, loss = [], Model.loss

    def spy(model, obs, action, y):
        seen.append(obs)
        assert torch.equal(y[..., :2], data_next(obs))
        return loss(model, obs, action, y)

    rows = {tuple(x): i for i, x in enumerate(data.all.obs.tolist())}

    def data_next(obs):
        index = torch.tensor([rows[tuple(x)] for x in obs.reshape(-1, 2).tolist()])
        return (data.all.next_obs - data.all.obs)[index].view_as(obs)

    monkeypatch.setattr(Model, "loss", spy)
    trained(data, model_epochs=2)
    epochs = torch.cat(seen, 1).split(260, 1)  # 2 epochs of (I, 260, 2); two episodes are held out
    samples = [[sorted(member.tolist()) for member in epoch] for epoch in epochs]
    assert samples[0] == samples[1] and epochs[0].tolist() != epochs[1].tolist()
    assert all(a != b for a, b in itertools.combinations(samples[0], 2))


def test_the_data_must_have_two_episodes():
    _, data = linear_system(size=100, episode_length=100)
    with pytest.raises(mopo.UserError, match="two"):
        Agent(data, Args())


def test_constant_inputs_do_not_divide_by_zero():
    _, data = linear_system(size=200, episode_length=20)
    data.all = data.all._replace(action=torch.zeros(200, 1))
    model, held, _ = trained(data, model_epochs=2)
    assert mopo.squared_error(model, data.batch(held)).isfinite().all()


# ---- The penalty ----


def constant_model(means, stds, **flags):
    """Member i predicts N(means[i], stds[i]^2) in every dimension of y, whatever (s, a) is."""
    model = Model(units(obs_dim=2), Args(model_hidden=(), **flags))
    model.max_logvar.data += 20  # no bound near the wanted deviations
    model.min_logvar.data -= 20
    with torch.no_grad():
        model.net.weight[0].zero_()
        model.net.bias[0][:, 0, :3] = torch.tensor(means)[:, None]
        model.net.bias[0][:, 0, 3:] = 2 * torch.tensor(stds).log()[:, None]
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


@pytest.mark.parametrize("uncertainty", ["aleatoric", "disagreement"])
def test_the_penalty_is_larger_off_the_data_than_on_it(uncertainty):
    """A pendulum-like system, nonlinear, with the same noise everywhere: what grows off the data is
    the model's own ignorance."""
    torch.manual_seed(0)
    obs, action = torch.randn(4_000, 2), torch.rand(4_000, 1) * 2 - 1
    change = torch.stack([obs[:, 1], torch.sin(2 * obs[:, 0]) + action[:, 0]], 1)
    change = change + 0.05 * torch.randn(4_000, 2)
    reward = -obs.square().sum(1)
    data = make_data(Batch(obs, action, reward, obs + change, torch.zeros(4_000)), 50)
    model, held, _ = trained(data, uncertainty=uncertainty, model_lr=3e-3, batch_size=64)
    far = 5 * torch.nn.functional.normalize(torch.randn(400, 2))  # the data lie within about 3
    near = model.uncertainty(*model(*data.batch(held)[:2])).mean()
    assert model.uncertainty(*model(far, torch.zeros(400, 1))).mean() > 2 * near


# ---- The theory, on tabular MDPs read out of the model buffer ----

GAMMA, STATES, ACTIONS = 0.9, 3, 2


class TabularModel(nn.Module):
    """A deterministic model of s' with the true rewards, and the L1 distance from the truth."""

    def __init__(self, truth, next_state, reward):
        super().__init__()
        self.next_state, self.reward = next_state, reward
        self.u = (torch.eye(STATES)[next_state] - truth).abs().sum(-1)

    def step(self, obs, action):
        s, a = obs.argmax(1), (action[:, 0] > 0).long()
        next_obs = torch.eye(STATES)[self.next_state[s, a]]
        return self.reward[s, a], next_obs, torch.zeros(len(s)), self.u[s, a]


class CoinFlip(nn.Module):
    def forward(self, obs):
        return Normal(torch.zeros(len(obs), 1), torch.ones(len(obs), 1))


def penalised_mdp(model, penalty):
    """Rewards (S, A) and next states (S, A) as `rollout` stores them."""
    agent = make_agent(STATES, penalty=penalty, rollout_starts=200)
    agent.model, agent.policy = model, CoinFlip()
    obs = torch.eye(STATES).repeat(10, 1)
    agent.rollout(make_data(Batch(obs, obs[:, :1], obs[:, 0], obs, obs[:, 0]), 10))
    rows = agent.model_buffer.all()
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
    return truth, TabularModel(truth, next_state, reward)


LAMBDA = GAMMA * 1.0 / (1 - GAMMA)  # gamma c, with c = max |r| / (1 - gamma)


@pytest.mark.parametrize("seed", range(10))
def test_the_penalised_return_is_a_lower_bound_for_every_policy(seed):
    truth, model = tabular(seed)
    reward, transition = penalised_mdp(model, LAMBDA)
    for policy in policies(random=20):
        bound = value(transition, reward, policy)
        assert (bound <= value(truth.double(), model.reward.double(), policy) + 1e-4).all()


def test_without_the_penalty_the_bound_fails_and_with_an_exact_model_it_is_tight():
    violated = 0
    for seed in range(10):
        truth, model = tabular(seed)
        reward, transition = penalised_mdp(model, 0.0)
        for policy in policies(random=0):
            true = value(truth.double(), model.reward.double(), policy)
            violated += (value(transition, reward, policy) > true + 1e-3).any().item()
    assert violated > 20
    truth, model = tabular(0, exact=True)
    reward, transition = penalised_mdp(model, LAMBDA)
    for policy in policies(random=20):
        true = value(truth.double(), model.reward.double(), policy)
        assert torch.allclose(value(transition, reward, policy), true, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_telescoping_identity(seed):
    """Lemma 4.1: eta_model - eta = gamma E_model[ E_model[V(s')] - E_true[V(s')] ]."""
    truth, model = tabular(seed)
    truth = truth.double()
    reward, transition = penalised_mdp(model, 0.0)
    for policy in policies(random=5):
        true = value(truth, model.reward.double(), policy)
        change = torch.einsum("sat,t->sa", transition - truth, true)
        difference = GAMMA * value(transition, change, policy)
        assert torch.allclose(value(transition, reward, policy) - true, difference, atol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_the_best_policy_of_the_penalised_mdp_satisfies_theorem_4_4(seed):
    truth, model = tabular(seed)
    reward, transition = penalised_mdp(model, LAMBDA)
    found, regret_bound = [], []
    for policy in policies(random=0):
        true = value(truth.double(), model.reward.double(), policy).mean()  # rho_0 is uniform
        error = value(transition, model.u.double(), policy).mean()  # eps_u
        found.append((value(transition, reward, policy).mean().item(), true.item()))
        regret_bound.append((true - 2 * LAMBDA * error).item())
    assert max(found)[1] >= max(regret_bound) - 1e-6


# ---- Rollouts ----


def world_agent(**flags):
    """An agent whose model is random, with 40 data states."""
    torch.manual_seed(0)
    agent = make_agent(**flags)
    return agent, make_data(random_batch(40), 10)


def test_penalty_0_is_plain_model_based_rollouts_bit_for_bit():
    agent, data = world_agent(penalty=0.0)
    torch.manual_seed(1)
    agent.rollout(data)
    torch.manual_seed(1)
    obs, plain = data.sample(20).obs, []
    with torch.no_grad():
        for _ in range(3):
            action = agent.policy(obs).sample().tanh()
            reward, next_obs, terminal, _ = agent.model.step(obs, action)
            plain.append(Batch(obs, action, reward, next_obs, terminal))
            obs = next_obs
    plain = Batch(*map(torch.cat, zip(*plain, strict=True)))
    for mine, its in zip(agent.model_buffer.all(), plain, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("uncertainty", ["aleatoric", "disagreement"])
def test_the_penalty_lowers_each_reward_by_lambda_times_its_own_u(uncertainty):
    rows = []
    for penalty in (0.0, 2.5):
        agent, data = world_agent(penalty=penalty, uncertainty=uncertainty)
        torch.manual_seed(1)
        agent.rollout(data)
        rows.append(agent.model_buffer.all())
    plain, penalised = rows
    assert torch.equal(plain.next_obs, penalised.next_obs)
    u = agent.model.uncertainty(*agent.model(plain.obs, plain.action))
    assert u.std() > 0
    assert torch.allclose(plain.reward - penalised.reward, 2.5 * u, atol=1e-5)


def test_with_conservative_rewards_are_not_penalised():
    rows = []
    for flags in ({"penalty": 0.0}, {"penalty": 3.0, "conservative": 1.0, "real_ratio": 0.5}):
        agent, data = world_agent(**flags)
        torch.manual_seed(1)
        agent.rollout(data)
        rows.append(agent.model_buffer.all().reward)
    assert torch.equal(*rows)


class EndsAbove(nn.Module):
    """s' = s + 1 in the first coordinate, terminal where it exceeds `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def step(self, obs, action):
        next_obs = obs + torch.tensor([1.0, 0, 0])
        n = len(obs)
        return torch.zeros(n), next_obs, (next_obs[:, 0] > self.limit).float(), torch.zeros(n)


def test_rollouts_start_in_the_data_go_on_where_they_were_and_stop_at_terminals():
    agent, data = world_agent(rollout_length=4)
    data.all.obs[:, 0] = torch.arange(40) % 4 - 0.5  # -0.5 to 2.5
    agent.model = EndsAbove(3)
    agent.rollout(data)
    rows = agent.model_buffer.all()
    known = {tuple(x) for x in data.all.obs.tolist()}
    current, position = [], 0
    for k in range(4):
        if k == 0:
            n = 20
            assert all(tuple(x) in known for x in rows.obs[:20].tolist())
        else:
            n = len(current)
            assert torch.equal(rows.obs[position : position + n], current)
        piece = slice(position, position + n)
        assert torch.equal(rows.terminal[piece], (rows.next_obs[piece, 0] > 3).float())
        current = rows.next_obs[piece][rows.terminal[piece] == 0]
        position += n
    assert position == len(rows.obs) < 4 * 20
    agent, data = world_agent(rollout_length=4)
    agent.model = EndsAbove(math.inf)
    agent.rollout(data)
    rows = agent.model_buffer.all()
    assert len(rows.obs) == 4 * 20 and not rows.terminal.any()  # the last step bootstraps


def test_a_rollout_that_ends_everywhere_at_once_is_one_step():
    agent, data = world_agent()
    agent.model = EndsAbove(-math.inf)
    agent.rollout(data)
    assert agent.model_buffer.added == 20 and agent.model_buffer.all().terminal.all()


def test_rollout_actions_are_samples_of_the_policy_and_leave_no_graph():
    agent, data = world_agent(rollout_starts=4_000, rollout_length=1)
    agent.rollout(data)
    rows = agent.model_buffer.all()
    pi = agent.policy(rows.obs)
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
    reward, next_obs, terminal, _ = model.step(obs, torch.randn(50_000, 1))
    y = torch.cat([next_obs - obs, reward[:, None]], 1).detach()
    member = (y / 10).round()
    assert (member == member[:, :1]).all()  # s' and r are from the same member
    assert sorted(set(member[:, 0].int().tolist())) == elites
    for i in elites:
        mine = y[member[:, 0] == i]
        assert len(mine) == pytest.approx(10_000, abs=400)
        assert mine.mean(0).tolist() == pytest.approx([10.0 * i] * 3, abs=0.02)
        assert mine.std(0).tolist() == pytest.approx([0.1 * i] * 3, rel=0.04)
    assert not terminal.any()  # untrained, the classifier is off


# ---- Terminals ----


def hopper_like(share, size=20_000):
    """Terminal where z < 0.7 or |angle| > 0.2; s' has a share of about `share` of them."""
    torch.manual_seed(0)
    next_obs = torch.randn(size, 4) * torch.tensor([0.2, 0.08, 2.0, 2.0]) + torch.tensor(
        [1.25, 0.0, 0, 0]
    )
    terminal = ((next_obs[:, 0] < 0.7) | (next_obs[:, 1].abs() > 0.2)).float()
    assert terminal.mean() == pytest.approx(share, rel=0.3)
    obs = next_obs + 0.1 * torch.randn(size, 4)
    return make_data(Batch(obs, torch.rand(size, 1), torch.ones(size), next_obs, terminal), 100)


def test_terminals_are_learned_from_the_data():
    data = hopper_like(share=0.016)
    model, held, _ = trained(data, model_epochs=1, model_hidden=(64, 64))
    batch = data.batch(held)
    said = model.end_logit(batch.next_obs) > model.end_threshold
    is_end = batch.terminal == 1
    assert (said & is_end).sum() / said.sum() > 0.8
    assert (said & is_end).sum() / is_end.sum() > 0.8
    line = mopo.terminals_line(model, batch)
    assert f"{is_end.sum()} held out, {said.sum()} predicted" in line
    assert f"precision {(said & is_end).sum() / said.sum():.2f}" in line
    assert f"recall {(said & is_end).sum() / is_end.sum():.2f}" in line


def test_it_is_the_state_arrived_at_that_ends_an_episode(monkeypatch):
    model = constant_model([3.0] * 7, [0.5] * 7)
    monkeypatch.setattr(model, "end_logit", lambda obs: obs[:, 0])
    model.end_threshold.fill_(2.0)
    torch.manual_seed(0)
    obs = torch.randn(1_000, 2)
    _, next_obs, terminal, _ = model.step(obs, torch.randn(1_000, 1))
    assert torch.equal(terminal, (next_obs[:, 0] > 2).float())
    assert 0 < terminal.mean() < 1 and not torch.equal(terminal, (obs[:, 0] > 2).float())


def test_the_threshold_cuts_where_a_terminal_is_more_likely_than_not():
    """s' in {0, 1, 2} is terminal with probability 0.02, 0.3, 0.7: only 2 is more likely than not,
    although on balanced batches 1 is too."""
    torch.manual_seed(0)
    state = torch.randint(3, (20_000,))
    terminal = (torch.rand(20_000) < torch.tensor([0.02, 0.3, 0.7])[state]).float()
    keep = (state == 0) | (torch.rand(20_000) < 0.1)  # terminals are rare
    state, terminal = state[keep], terminal[keep]
    next_obs = torch.eye(3)[state]
    n = len(state)
    batch = Batch(next_obs, torch.rand(n, 1), torch.ones(n), next_obs, terminal)
    model, _, _ = trained(make_data(batch, 100), model_epochs=1)
    logit = model.end_logit(torch.eye(3))
    assert logit[1] > 0
    assert (logit > model.end_threshold).tolist() == [False, False, True]
    odds = (logit - model.end_threshold).sigmoid()
    assert odds.tolist() == pytest.approx([0.02, 0.3, 0.7], abs=0.08)


def test_without_terminals_the_model_never_ends_an_episode():
    _, data = linear_system(size=500)
    model, held, args = trained(data, model_epochs=1)
    assert not model.step(1e3 * torch.randn(1_000, 2), torch.randn(1_000, 1))[2].any()
    assert "never ends one" in mopo.report(model, data, held, args)


def test_where_every_transition_is_terminal_every_imagined_one_is():
    _, data = linear_system(size=100, episode_length=1)
    data.all.terminal.fill_(1)
    model, held, args = trained(data, model_epochs=1)
    assert model.step(torch.randn(50, 2), torch.randn(50, 1))[2].all()
    assert "10 held out, 10 predicted" in mopo.report(model, data, held, args)


# ---- The model buffer ----


@pytest.mark.parametrize("seed", range(20))
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
        held = buffer.all()
        assert sorted(held.obs[:, 0].tolist()) == rows
        number = held.obs[:, 0]
        assert torch.equal(held.obs, number[:, None].expand(-1, 3))  # columns stay together
        assert torch.equal(held.action[:, 0], -number) and torch.equal(held.terminal, number % 2)
        assert torch.equal(held.reward, number + 0.25)
        assert torch.equal(held.next_obs, held.obs + 0.5)
        if rows:
            drawn = buffer.sample(2_000).obs[:, 0]
            assert set(drawn.tolist()) == set(rows)  # never an empty row, and all of them


def test_the_buffer_of_an_agent_holds_five_rounds_of_rollouts():
    agent, data = world_agent(rollout_starts=6, rollout_length=2)
    for _ in range(7):
        agent.rollout(data)
    assert len(agent.model_buffer.all().obs) == len(agent.model_buffer.rows) == 5 * 6 * 2


def test_batches_have_exactly_the_real_share():
    for ratio, real in ((0.0, 0), (0.05, 13), (0.29, 74), (0.5, 128), (1.0, 256)):
        agent, data = world_agent(real_ratio=ratio)
        agent.rollout(data)
        known = {tuple(x) for x in data.all.next_obs.tolist()}
        is_real = [tuple(x) in known for x in agent.sample(data).next_obs.tolist()]
        assert is_real == [True] * real + [False] * (256 - real)  # real ones first


def test_real_transitions_keep_their_reward():
    agent, data = world_agent(real_ratio=1.0, penalty=100.0)
    agent.rollout(data)
    torch.manual_seed(3)
    batch = agent.sample(data)
    torch.manual_seed(3)
    for mine, its in zip(batch, data.sample(256), strict=True):
        assert torch.equal(mine, its)


# ---- SAC ----


def clone(module):
    return [p.detach().clone().requires_grad_() for p in module.parameters()]


def forward(weights, x):
    """An MLP with one hidden layer from w0, w1, b0, b1, by the same products as torch's bmm."""
    w0, w1, b0, b1 = weights
    x = torch.baddbmm(b0, x.expand(len(w0), *x.shape), w0).relu()
    return torch.baddbmm(b1, x, w1)


def same(tensors, module):
    return all(torch.equal(a, b) for a, b in zip(tensors, module.parameters(), strict=True))


def test_real_ratio_1_is_sac_bit_for_bit():
    """Five updates against SAC written out here, on the same batches and random numbers."""
    agent, data = world_agent(real_ratio=1.0)
    q, q_target, pi = map(clone, (agent.critic, agent.critic_target, agent.policy))
    log_temperature = torch.zeros((), requires_grad=True)
    q_optimizer = torch.optim.Adam(q, lr=agent.args.critic_lr, fused=True)
    pi_optimizer = torch.optim.Adam([*pi, log_temperature], lr=agent.args.actor_lr, fused=True)

    def sample(obs):
        mean, log_std = forward(pi, obs)[0].chunk(2, -1)
        std = log_std.clamp(-5, 2).exp()
        u = Normal(mean, std).rsample()
        slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        return u.tanh(), (Normal(mean, std).log_prob(u) - slope).sum(-1)

    def q_value(weights, obs, action):
        return forward(weights, torch.cat([obs, action], -1))[..., 0]

    for seed in range(5):
        torch.manual_seed(seed)
        batch = data.sample(256)
        action, log_pi = sample(batch.obs)
        q_pi = q_value(q, batch.obs, action).min(0).values
        pi_loss = (log_temperature.exp().detach() * log_pi - q_pi).mean()
        pi_loss = pi_loss - log_temperature * (log_pi.detach() - 1).mean()
        with torch.no_grad():
            next_action, next_log_pi = sample(batch.next_obs)
            next_q = q_value(q_target, batch.next_obs, next_action).min(0).values
            next_v = next_q - log_temperature.exp() * next_log_pi
            y = batch.reward + 0.99 * (1 - batch.terminal) * next_v
        pi_optimizer.zero_grad()
        pi_loss.backward()
        pi_optimizer.step()
        q_loss = 0.5 * ((q_value(q, batch.obs, batch.action) - y) ** 2).mean(1).sum()
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()
        with torch.no_grad():
            for t, w in zip(q_target, q, strict=True):
                t.lerp_(w, agent.args.polyak)
        torch.manual_seed(seed)
        agent.update(agent.sample(data))
    assert same(q, agent.critic) and same(q_target, agent.critic_target) and same(pi, agent.policy)
    assert torch.equal(log_temperature, agent.log_temperature)


def test_a_terminal_transition_is_worth_its_reward_and_the_others_bootstrap():
    agent, _ = world_agent()
    batch = random_batch(terminal=1.0)
    assert torch.equal(agent.target(batch), batch.reward)
    assert (agent.target(batch._replace(terminal=torch.zeros(8))) != batch.reward).all()


def test_silent_broadcasting_is_an_error():
    agent, data = world_agent()
    batch = random_batch(2)  # as many as critics: nothing else would notice
    for loss in (agent.critic_loss, agent.actor_loss):
        with pytest.raises(AssertionError):
            loss(batch._replace(reward=batch.reward[:, None]))
    agent.model.uncertainty = lambda mean, logvar: torch.ones(20, 1)
    with pytest.raises(AssertionError):
        agent.rollout(data)


def test_an_update_leaves_the_model_and_the_gradients_of_others_alone():
    agent, data = world_agent()
    agent.rollout(data)
    before = clone(agent.model)
    agent.update(agent.sample(data))
    assert same(before, agent.model)
    assert all(
        p.grad is None for p in [*agent.model.parameters(), *agent.critic_target.parameters()]
    )


def test_the_temperature_rises_while_the_entropy_is_below_its_target():
    for log_std, rises in ((-4.0, True), (0.0, False)):
        agent, data = world_agent()
        with torch.no_grad():
            agent.policy.net.weight[-1].zero_()
            agent.policy.net.bias[-1][..., 1:] = log_std
        agent.rollout(data)
        agent.update(agent.sample(data))
        assert (agent.log_temperature > 0) == rises


def test_log_prob_is_that_of_torch_distributions_in_environment_units():
    torch.manual_seed(0)
    agent = make_agent(action_dim=2, low=-2.0, high=3.0)
    obs, action = torch.randn(50, 3), torch.rand(50, 2) * 4.9 - 1.95
    pi = agent.policy(obs)
    scale = [TanhTransform(), AffineTransform(0.5, 2.5)]
    reference = Independent(Transformed(Normal(pi.mean, pi.stddev), scale), 1)
    log_prob = agent.log_prob(obs.numpy(), action.numpy())
    assert torch.allclose(log_prob, reference.log_prob(action), atol=1e-3)


# ---- COMBO ----


def combo(action_dim=1, **flags):
    flags = {"conservative": 2.0, "real_ratio": 0.5, "batch_size": 8} | flags
    return make_agent(action_dim=action_dim, **flags)


def test_on_data_states_the_conservative_term_is_that_of_cql_bit_for_bit():
    torch.manual_seed(0)
    agent = combo(action_dim=2)
    reference = cql.ContinuousCQL(Data(agent.units), cql.Args(hidden=(16,), samples=10))
    reference.critic.load_state_dict(agent.critic.state_dict())
    batch = random_batch(action_dim=2)
    pi, pi_next = agent.policy(batch.obs), agent.policy(batch.next_obs)
    q = agent.critic(batch.obs, batch.action)
    torch.manual_seed(5)
    expected = reference.gap(batch.obs, q, pi, pi_next)
    torch.manual_seed(5)
    assert torch.equal(agent.soft_maximum(batch.obs, batch.next_obs) - q, expected)


def test_the_critic_is_pushed_down_on_model_states_and_up_on_the_data():
    """The gradient of the term with respect to Q, entry by entry, on a critic that is a table."""
    torch.manual_seed(0)
    agent, asked = combo(), []

    class Table(nn.Module):
        def forward(self, obs, action):
            q = torch.zeros(2, *action.shape[:-1], requires_grad=True)
            asked.append((obs, q))
            return q

    batch = random_batch()
    td_only = make_agent(real_ratio=0.5, batch_size=8)
    agent.critic, agent.target = Table(), lambda batch: torch.zeros(8)
    loss, metrics = agent.critic_loss(batch)
    (_, q), (obs, q_model) = asked
    gradient, pushed = torch.autograd.grad(loss, [q, q_model])
    assert torch.equal(obs, batch.obs[4:].expand(30, 4, 3))  # the states of the model
    assert (pushed > 0).all()
    assert torch.allclose(pushed.sum(1), torch.full((2, 4), 2.0 / 4))  # beta / states, in total
    assert torch.allclose(gradient[:, :4], torch.full((2, 4), -2.0 / 4))  # here Q = y = 0: no TD
    assert (gradient[:, 4:] == 0).all()
    assert metrics["critic_loss"].item() == pytest.approx(2 * 2 * metrics["gap"].item())
    assert "gap" not in td_only.critic_loss(batch)[1]


def test_the_td_part_stands_beside_the_conservative_one():
    torch.manual_seed(0)
    agent, batch = combo(), random_batch()
    mopo_agent = make_agent(real_ratio=0.5, batch_size=8)
    mopo_agent.load_state_dict(agent.state_dict())
    torch.manual_seed(1)
    plain = mopo_agent.critic_loss(batch)[0]
    torch.manual_seed(1)
    both, metrics = agent.critic_loss(batch)
    assert both.item() == pytest.approx((plain + 2.0 * 2 * metrics["gap"]).item(), rel=1e-5)


def test_training_with_the_term_lowers_the_gap():
    torch.manual_seed(0)
    agent, batch = combo(critic_lr=1e-2), random_batch()
    before = agent.critic_loss(batch)[1]["gap"]
    for _ in range(50):
        agent.update(batch)
    assert agent.critic_loss(batch)[1]["gap"] < before - 1


# ---- The report ----


def perfect_model(noise=0.1):
    truth, data = linear_system(noise=noise)
    model = Model(data.units, Args(model_hidden=()))
    model.max_logvar.data += 20
    model.min_logvar.data -= 20
    with torch.no_grad():
        model.net.weight[0].zero_()
        model.net.weight[0][..., :3] = truth
        model.net.bias[0][..., :3] = 0
        model.net.bias[0][..., 3:] = 2 * math.log(noise or 1e-3)
    return model, data, truth


def test_the_calibration_of_a_right_and_of_an_overconfident_model():
    model, data, _ = perfect_model()
    y = mopo.model_target(data.all)
    with torch.no_grad():
        mean, logvar = model(data.all.obs, data.all.action)
    error, sigma = (mean - y).abs(), (logvar / 2).exp()
    row = mopo.members_table(model, y, error, sigma)[1].replace("%", "").split()
    assert float(row[1]) == pytest.approx(0.01, rel=0.05)
    assert [float(x) for x in row[3:5]] == pytest.approx([68.3, 95.4], abs=1)
    share = (0.01 / y.var(0)).mean().item()
    assert float(row[2]) == pytest.approx(100 * share, rel=0.05)
    row = mopo.members_table(model, y, error, sigma / 2)[1].replace("%", "").split()
    assert [float(x) for x in row[3:5]] == pytest.approx([38.3, 68.3], abs=1)  # of half a sigma


def test_the_error_growth_of_a_perfect_model_is_zero_and_of_a_wrong_one_is_exact():
    """Trajectories, so that the rows of an episode follow each other."""
    model, data, truth = perfect_model(noise=0.0)
    obs, rows = torch.randn(2), []
    for t in range(200):
        if t % 20 == 0:
            obs = torch.randn(2)
        action = torch.rand(1) * 2 - 1
        y = torch.cat([obs, action]) @ truth
        rows.append((obs, action, y[2], obs + y[:2], torch.tensor(0.0)))
        obs = obs + y[:2]
    data = make_data(Batch(*map(torch.stack, zip(*rows, strict=True))), 20)
    held, args = torch.arange(60), Args(rollout_length=4)
    table = [line.split() for line in mopo.rollout_table(model, data, held, args)[1:]]
    assert [row[0] for row in table] == ["1", "2", "3", "4"]
    assert [float(row[1]) for row in table] == [0, 0, 0, 0]
    starts = [t for t in range(60) if t % 20 <= 16]  # where 4 steps of the episode follow
    scale = data.all.obs.std(0)
    for k in range(4):
        moved = data.all.next_obs[[t + k for t in starts]] - data.all.obs[starts]
        expected = (moved / scale).square().mean().sqrt().item()
        assert float(table[k][2]) == pytest.approx(expected, abs=6e-4)
    model.net.weight[0].data[5:].zero_()  # not elites: theirs is not the imagined world
    assert [float(x.split()[1]) for x in mopo.rollout_table(model, data, held, args)[1:]] == [0] * 4
    model.net.weight[0].data.zero_()  # predicts no change
    for row in mopo.rollout_table(model, data, held, args)[1:]:
        assert row.split()[1] == row.split()[2]
    assert (
        "no held-out episode" in mopo.rollout_table(model, data, held, Args(rollout_length=21))[0]
    )


def test_the_penalty_table_orders_by_u():
    u = torch.tensor([5.0, 1, 4, 2, 3])
    table = mopo.penalty_table(u, 60 - u**2)
    assert [float(x) for x in table[0].split()[-5:]] == [1, 2, 3, 4, 5]
    assert [float(x) for x in table[1].split()[-5:]] == [59, 56, 51, 44, 35]
    assert table[2].endswith(" -1.00") and mopo.penalty_table(u, u**2)[2].endswith(" 1.00")


# ---- Runs ----


def test_discrete_actions_are_one_clear_line_and_leave_no_folder(tmp_path):
    with pytest.raises(mopo.UserError, match=r"Box.*cql\.py"):
        mopo.main(Args(dataset_id=("cartpole/mixed-v0",), out_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"penalty": -1.0}, "--penalty"),
        ({"conservative": -1.0}, "--conservative"),
        ({"conservative": 1.0, "real_ratio": 1.0}, "--real-ratio"),
        ({"conservative": 1.0, "real_ratio": 0.0}, "--real-ratio"),
        ({"real_ratio": 1.1}, "--real-ratio"),
        ({"rollout_length": 0}, "--rollout-length"),
        ({"rollout_starts": 0}, "--rollout-starts"),
        ({"rollout_every": 0}, "--rollout-every"),
        ({"model_epochs": 0}, "--model-epochs"),
        ({"model_hidden": (8, 0)}, "--model-hidden"),
    ],
)
def test_wrong_flags_are_one_clear_line(flags, name):
    with pytest.raises(mopo.UserError, match=name):
        make_agent(**flags)


def store_dataset():
    """Four short episodes of random actions on the pendulum, stored where Minari looks. Two of them
    are said to end in a terminal state."""
    env, episodes = gym.make("Pendulum-v1", max_episode_steps=20), []
    for seed in range(4):
        obs, rows, ended = [env.reset(seed=seed)[0]], [], False
        env.action_space.seed(seed)
        while not ended:
            action = env.action_space.sample()
            next_obs, reward, _, ended, _ = env.step(action)
            rows.append((action, float(reward), ended and seed % 2, ended and not seed % 2))
            obs.append(next_obs)
        columns = (np.array(column) for column in zip(*rows, strict=True))
        episodes.append(EpisodeBuffer(None, None, None, np.array(obs), *columns, {}))
    minari.create_dataset_from_buffers(
        "tests/small-v0",
        episodes,
        env=env,
        algorithm_name="random",
        author="tests",
        author_email="",
        code_permalink="",
    )


@pytest.mark.filterwarnings("ignore")  # Minari asks for more about the dataset
@pytest.mark.parametrize(
    ("where", "call", "conservative"), [("loss", 3, 0.0), ("sample", 1, 0.0), ("sample", 4, 1.0)]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_its_policy_loads(
    where, call, conservative, tmp_path, monkeypatch
):
    """Stopped in the training of the model, right after it, and after the first checkpoint of the
    policy; the model is trained again only in the first case."""
    store_dataset()
    flags = {"dataset_id": ("tests/small-v0",), "steps": 6, "log_every": 2, "eval_every": 4}
    flags |= {"eval_episodes": 2, "hidden": (8,), "model_hidden": (8,), "model_epochs": 3}
    flags |= {"rollout_starts": 5, "rollout_length": 2, "rollout_every": 3, "batch_size": 16}
    flags |= {"conservative": conservative, "real_ratio": 0.5}
    whole = mopo.main(Args(**flags, out_dir=str(tmp_path / "whole")))
    owner = Model if where == "loss" else Agent
    original, calls = getattr(owner, where), []

    def stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, where, stop)
        mopo.main(Args(**flags, out_dir=str(tmp_path / "part")))
    (folder,) = (tmp_path / "part").iterdir()
    trainings, train_model = [], mopo.train_model
    monkeypatch.setattr(mopo, "train_model", lambda *x: trainings.append(x) or train_model(*x))
    resumed = mopo.main(Args(resume=str(folder)))
    assert len(trainings) == (where == "loss")
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
    (whole_folder,) = (tmp_path / "whole").iterdir()
    for name in ("metrics.csv", "returns.csv", "model.txt"):
        assert (folder / name).read_text() == (whole_folder / name).read_text()
    one, other = (mopo.load_policy(f) for f in (folder, whole_folder))
    state = other.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in one.state_dict().items())
    assert one.model.end_threshold.isfinite() and one.has_density
    obs = np.random.default_rng(0).normal(size=(5, 3))
    assert (one.act(obs) == other.act(obs)).all() and (np.abs(one.act(obs)) <= 2).all()


@pytest.mark.filterwarnings("ignore")
def test_rollouts_come_before_the_first_update_and_then_every_rollout_every(tmp_path, monkeypatch):
    store_dataset()
    flags = {"dataset_id": ("tests/small-v0",), "steps": 8, "log_every": 2, "eval_every": 0}
    flags |= {"eval_episodes": 0, "hidden": (8,), "model_hidden": (8,), "model_epochs": 1}
    flags |= {"rollout_starts": 5, "rollout_length": 2, "rollout_every": 3, "batch_size": 16}
    order = []
    for name in ("rollout", "update"):
        original = getattr(Agent, name)
        call = lambda self, x, name=name, f=original: order.append(name) or f(self, x)  # noqa: E731
        monkeypatch.setattr(Agent, name, call)
    mopo.main(Args(**flags, out_dir=str(tmp_path)))
    assert order == (["rollout"] + ["update"] * 3) * 2 + ["rollout"] + ["update"] * 2


def test_metrics_are_those_of_the_docstring():
    agent, data = world_agent(conservative=1.0, real_ratio=0.5)
    agent.rollout(data)
    metrics = agent.update(agent.sample(data)) | agent.diagnose(data.all)
    documented = mopo.__doc__.split("Metrics:")[1].split("Differs")[0]
    assert all(name in documented for name in metrics)
    assert all(value.ndim == 0 for value in metrics.values())


def test_health_names_the_flag_that_helps():
    data = SimpleNamespace(all=SimpleNamespace(reward=torch.tensor([0.0, 1.0])))
    metrics = {"q_data": 1.0, "q_policy": 1e6}
    assert "Raise --penalty" in make_agent().health(metrics, data)
    assert "Raise --conservative" in combo().health(metrics, data)


# ---- Learning on the built-in data, default flags ----


@pytest.mark.parametrize(
    ("dataset", "bound"),
    [
        ("pendulum/random-v0", -150),  # -136 ± 1.5 over five seeds, the data -1207
        ("pendulum/mixed-v0", -150),  # -135 ± 1.1, the data -578
    ],
)
def test_learns(dataset, bound, tmp_path):
    result = mopo.main(Args(dataset_id=(dataset,), out_dir=str(tmp_path), eval_every=0))
    assert result["return_mean"] >= bound
    assert "possible are" in result["health"]
