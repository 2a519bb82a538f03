"""The mathematics of cql.py against exact answers. (test_agents.py has what all files share.)"""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    OBS,
    adam,
    adam_step,
    clone,
    close,
    descend,
    follow,
    forward,
    lerp,
    make_data,
    plain_descent,
    same,
    same_parameters,
    stir,
)
from torch.distributions import Independent, Normal, TanhTransform
from torch.distributions import TransformedDistribution as Transformed

import cql
from cql import Args, Batch, DiscreteCQL, TanhNormal, Units, pick


def make_agent(obs_space, action_space, **flags):
    units = Units(obs_space, action_space)
    agent = cql.Agent(units, Args(**flags))
    agent.shape = units.obs_dim, units.action_dim
    return agent


def discrete_agent(states=3, actions=2, **flags):
    """Tabular: one-hot observations and a linear Q."""
    return make_agent(spaces.Discrete(states), spaces.Discrete(actions), hidden=(), **flags)


def continuous_agent(dim=1, **flags):
    return make_agent(OBS, spaces.Box(-1, 1, (dim,)), hidden=(16,), **flags)


def random_batch(agent, n=8, terminal=None):
    discrete, (dim, actions) = isinstance(agent, DiscreteCQL), agent.shape
    obs, next_obs = torch.randn(2, n, dim)
    action = torch.randint(actions, (n,)) if discrete else torch.rand(n, actions) * 2 - 1
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, action, torch.randn(n), next_obs, terminal)


# ---- The conservative term, discrete ----


def discrete_gap(q, action):
    return DiscreteCQL.gap(None, q, pick(q, action))


def test_discrete_gap_equals_the_hand_computed_sum():
    q = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 5.0]])
    by_hand = [
        math.log(sum(map(math.exp, q[n].tolist()))) - q[n, a].item() for n, a in ((0, 0), (1, 2))
    ]
    assert discrete_gap(q, torch.tensor([0, 2])).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_discrete_gap_of_a_constant_is_the_log_of_the_number_of_actions():
    for actions in (2, 5):
        gap = discrete_gap(torch.full((4, actions), 7.0), torch.zeros(4, dtype=torch.long))
        assert gap.tolist() == pytest.approx([math.log(actions)] * 4, abs=1e-6)


def test_discrete_gap_pushes_down_everything_but_the_data_action():
    q, action = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    (gradient,) = torch.autograd.grad(discrete_gap(q, action).sum(), q)
    expected = q.softmax(1) - torch.nn.functional.one_hot(action, 4)
    assert torch.allclose(gradient, expected, atol=1e-6)


# ---- The conservative term, continuous ----


def critic_of(function):
    """A critic given by a function of (obs, action); its second member is 1 higher."""
    return lambda obs, action: torch.stack([function(obs, action), function(obs, action) + 1])


def peak(obs, action):
    """Its place depends on the state."""
    return -3 * ((action - obs[..., :1]) ** 2).sum(-1)


def policies(n, dim=1):
    pi = torch.linspace(-0.8, 0.5, n * dim).view(n, dim), torch.full((n, dim), 0.7)
    pi_next = torch.linspace(0.6, -0.2, n * dim).view(n, dim), torch.full((n, dim), 1.2)
    return TanhNormal(*pi), TanhNormal(*pi_next)


def test_continuous_gap_equals_the_integral():
    """K = 20,000; a known public bug, the sum over the wrong axis, is off by 0.11."""
    torch.manual_seed(0)
    agent = continuous_agent(samples=20_000)
    agent.critic.forward = critic_of(peak)
    obs = torch.tensor([[0.4, 0, 0], [-0.7, 0, 0], [0.0, 0, 0]])
    q_data = agent.critic(obs, torch.tensor([[0.1], [0.9], [-0.3]]))
    gap = agent.gap(obs, q_data, *policies(3))
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for n in range(3):
        integral = torch.trapezoid(torch.exp(-3 * (grid - obs[n, 0]) ** 2), grid).log().item()
        exact = integral + math.log(3 * 20_000) - q_data[0, n].item()
        assert gap[:, n].tolist() == pytest.approx([exact, exact], abs=0.02)


@pytest.mark.parametrize("dim", [1, 3])
def test_continuous_gap_of_a_constant_q_under_a_wide_policy(dim):
    """A log 2 + log 3K, since E[1 / mu] is the volume 2^A; a narrow policy's is up to log 3 less,
    as its samples miss most of that volume."""
    torch.manual_seed(0)
    agent = continuous_agent(dim=dim, samples=50_000)
    agent.critic.forward = critic_of(lambda obs, action: torch.full(action.shape[:-1], 4.0))
    wide = TanhNormal(torch.zeros(2, dim), torch.ones(2, dim))
    gap = agent.gap(torch.zeros(2, 3), torch.tensor([[4.0], [5.0]]), wide, wide)
    exact = dim * math.log(2) + math.log(150_000)
    assert gap.flatten().tolist() == pytest.approx([exact] * 4, abs=0.02)


def test_continuous_gap_ignores_a_constant_and_trains_no_policy():
    agent = continuous_agent(dim=2)
    obs, a_data, gaps = torch.randn(4, 3), torch.full((4, 2), 0.2), []
    for offset in (0.0, 5.0):
        agent.critic.forward = critic_of(lambda s, a, offset=offset: peak(s, a) + offset)
        torch.manual_seed(1)
        gaps.append(agent.gap(obs, agent.critic(obs, a_data), *policies(4, 2)))
    assert torch.allclose(*gaps, atol=1e-5)
    agent = continuous_agent()
    pi, parameters = agent.policy(obs), [*agent.policy.parameters()]
    gap = agent.gap(obs, torch.zeros(2, 4), pi, pi)
    gradients = torch.autograd.grad(gap.sum(), parameters, allow_unused=True)
    assert pi.median.requires_grad and not any(g is not None for g in gradients)


# ---- The lower bound and other exact answers, tabular ----


def random_mdps(generator, mdps, states, actions):
    """Rewards (M, S, A), transitions (M, S, A, S), behaviour (M, S, A) with full support."""
    rand = torch.rand(mdps, states, actions, states, generator=generator, dtype=torch.float64)
    transition = rand.pow(3) / rand.pow(3).sum(-1, keepdim=True)
    reward = torch.randn(mdps, states, actions, generator=generator, dtype=torch.float64)
    rand = torch.rand(mdps, states, actions, generator=generator, dtype=torch.float64) + 0.1
    return reward, transition, rand / rand.sum(-1, keepdim=True)


def solve_cql(reward, transition, behavior, alpha, gamma=0.9, iterations=4000):
    """The joint fixed point of the file's own penalty, half the squared Bellman error and an exact
    backup under pi = softmax Q, by gradient descent with the behaviour's expectation."""
    mdps, states, actions = reward.shape
    action = torch.arange(actions).repeat(mdps * states)
    q = torch.zeros_like(reward, requires_grad=True)
    for _ in range(iterations):
        v = (q.softmax(-1) * q).sum(-1).detach()
        y = reward + gamma * torch.einsum("msan,mn->msa", transition, v)
        rows = q.reshape(-1, actions).repeat_interleave(actions, 0)  # every (s, a) once
        gap = discrete_gap(rows, action).view_as(q)
        loss = (behavior * (alpha * gap + 0.5 * (q - y) ** 2)).sum()
        (gradient,) = torch.autograd.grad(loss, q)
        q = (q - gradient / (behavior + alpha)).detach().requires_grad_()
        if gradient.abs().max() < 1e-10:
            return q.detach(), y


def policy_value(reward, transition, pi, gamma=0.9):
    kernel = torch.einsum("msa,msan->msn", pi, transition)
    identity = torch.eye(reward.shape[1], dtype=torch.float64)
    return torch.linalg.solve(identity - gamma * kernel, (pi * reward).sum(-1))


@pytest.fixture(scope="module")
def solved():
    """Thirty random MDPs, solved for three values of alpha."""
    mdp = random_mdps(torch.Generator().manual_seed(0), 30, 5, 3)
    return mdp, {alpha: solve_cql(*mdp, alpha) for alpha in (0.1, 0.5, 2.0)}


def test_the_policy_value_is_a_lower_bound_in_every_state(solved):
    """Theorem 3.2 for CQL(H): E_pi Q <= V^pi with pi = softmax Q; not pointwise, not for max Q."""
    (reward, transition, _), solutions = solved
    for q, _ in solutions.values():
        pi = q.softmax(-1)
        assert ((pi * q).sum(-1) <= policy_value(reward, transition, pi) + 1e-7).all()


def test_with_the_sign_of_the_penalty_turned_the_bound_fails(solved):
    (reward, transition, behavior), _ = solved
    q, _ = solve_cql(reward, transition, behavior, alpha=-0.01)
    pi = q.softmax(-1)
    assert ((pi * q).sum(-1) > policy_value(reward, transition, pi) + 1e-3).any()


def test_a_larger_alpha_lowers_the_value_and_the_preference_for_rare_actions(solved):
    (_, _, behavior), solutions = solved
    values = [(q.softmax(-1) * q).sum(-1).mean() for q, _ in solutions.values()]
    assert values[0] > values[1] > values[2]
    rare, common = behavior.argmin(-1, True), behavior.argmax(-1, True)
    excess = [(q.gather(-1, rare) - q.gather(-1, common)).mean() for q, _ in solutions.values()]
    assert excess[0] > excess[1] > excess[2]


# ---- The agents' whole update ----


FLAGS = {"alpha": 0.7, "target_gap": 0.5, "gamma": 0.9, "polyak": 0.1, "critic_lr": 0.05}


def test_a_discrete_update_is_the_one_of_the_equations(monkeypatch):
    """(1) to (3) and (9), where alpha compares the gap as it is; by plain gradient descent."""
    monkeypatch.setattr(cql, "step", plain_descent)
    torch.manual_seed(0)
    agent = discrete_agent(4, 3, **FLAGS)
    stir(agent)
    ours, batch, rows = deepcopy(agent), random_batch(agent), torch.arange(8)
    metrics = ours.update(batch)

    q, alpha = agent.critic(batch.obs), agent.log_alpha.exp()
    q_data, best = q[rows, batch.action], agent.critic(batch.next_obs).argmax(1)
    next_q = agent.critic_target(batch.next_obs).detach()[rows, best]
    y = batch.reward + 0.9 * (1 - batch.terminal) * next_q
    td_loss, gap = 0.5 * ((q_data - y) ** 2).mean(), (q.exp().sum(1).log() - q_data).mean()
    loss = td_loss + alpha.item() * gap
    close(metrics, {"critic_loss": loss, "td_loss": td_loss, "gap": gap, "alpha": alpha})
    descend(loss, agent.critic.parameters(), 0.05)
    agent.log_alpha.data += 0.05 * alpha * (gap - 0.5)
    follow(agent.critic_target, agent.critic, 0.1)
    same_parameters(ours, agent)


def test_a_box_update_is_the_one_of_the_equations(monkeypatch):
    """(4) to (9) and D5 for A = 2, K = 2, with the same draws in the same order; all losses with
    the networks as before, the gaps of both critics summed, all proposals valued at s."""
    monkeypatch.setattr(cql, "step", plain_descent)
    torch.manual_seed(0)
    flags = FLAGS | {"target_gap": 2.5, "bc_weight": 0.3, "actor_lr": 0.03, "samples": 2}
    agent = continuous_agent(2, **flags).double()
    stir(agent)
    ours = deepcopy(agent)
    batch = Batch(*(x.double() for x in random_batch(agent)))
    torch.manual_seed(1)
    metrics = ours.update(batch)

    def gaussian(obs):
        mean, log_std = agent.policy.net(obs)[0].chunk(2, 1)
        return Normal(mean, log_std.clamp(-5, 2).exp())

    def draw(pi, *shape):
        z = pi.rsample(shape)
        return z.tanh(), (pi.log_prob(z) - torch.log1p(-(z.tanh() ** 2))).sum(-1)

    torch.manual_seed(1)
    pi, pi_next = gaussian(batch.obs), gaussian(batch.next_obs)
    temperature, alpha = agent.log_temperature.exp().item(), agent.log_alpha.exp().item()
    action, log_pi = draw(pi)
    actor_loss = (temperature * log_pi - agent.critic(batch.obs, action).amin(0)).mean()
    actor_loss = actor_loss + 0.3 * ((pi.mean.tanh() - batch.action) ** 2).sum(1).mean()
    temperature_loss = -agent.log_temperature * (log_pi.mean().item() - 2)
    next_q = agent.critic_target(batch.next_obs, draw(pi_next)[0]).amin(0)
    y = (batch.reward + 0.9 * (1 - batch.terminal) * next_q).detach()
    uniform = torch.empty(2, 8, 2).uniform_(-1, 1)
    proposals = [(uniform, torch.full((2, 8), -2 * math.log(2))), draw(pi, 2), draw(pi_next, 2)]
    terms = [
        (agent.critic(batch.obs.expand(2, 8, 3), a.detach().double()) - log_mu.detach()).exp()
        for a, log_mu in proposals
    ]
    q = agent.critic(batch.obs, batch.action)
    gap = (torch.cat(terms, 1).sum(1).log() - q).mean(1)
    td_loss = 0.5 * ((q[0] - y) ** 2).mean() + 0.5 * ((q[1] - y) ** 2).mean()
    critic_loss = td_loss + alpha * (gap[0] + gap[1])

    actor = [*agent.policy.parameters(), agent.log_temperature]
    descend(actor_loss + temperature_loss, actor, 0.03)
    descend(critic_loss, agent.critic.parameters(), 0.05)
    agent.log_alpha.data += 0.05 * alpha * (gap.mean() - 2.5)
    follow(agent.critic_target, agent.critic, 0.1)
    same_parameters(ours, agent)
    expected = {"critic_loss": critic_loss, "td_loss": td_loss, "actor_loss": actor_loss}
    expected |= {"gap": gap.mean(), "alpha": alpha, "entropy": -log_pi.mean()}
    close(metrics, expected | {"temperature": agent.log_temperature.exp()})


def test_diagnose_takes_the_greedy_action_and_the_online_critic():
    torch.manual_seed(0)
    agent = discrete_agent(4, 3)
    stir(agent)
    batch, rows = random_batch(agent, 50), torch.arange(50)
    q = agent.critic(batch.obs)
    expected = {"q_data": q[rows, batch.action].mean(), "q_policy": q.max(1).values.mean()}
    differ = (q.argmax(1) != batch.action).float().mean()
    close(agent.diagnose(batch), expected | {"action_distance": differ})


def test_diagnose_takes_the_median_action_and_the_smaller_of_the_online_critics():
    torch.manual_seed(0)
    agent = continuous_agent(2)
    stir(agent)
    batch = random_batch(agent, 50)
    action = agent.policy.net(batch.obs)[0][:, :2].tanh()
    q, q_policy = (torch.min(*agent.critic(batch.obs, a)) for a in (batch.action, action))
    distance = ((action - batch.action) ** 2).mean().sqrt()
    expected = {"q_data": q.mean(), "q_policy": q_policy.mean(), "action_distance": distance}
    close(agent.diagnose(batch), expected)


def tabular_batch(counts, next_state, reward):
    """Every pair (s, a) as often as counts[s][a] says; deterministic transitions."""
    s, a = (torch.tensor(counts) > 0).nonzero().T
    times = torch.tensor(counts)[s, a]
    s, a = s.repeat_interleave(times), a.repeat_interleave(times)
    eye, reward = torch.eye(len(counts)), torch.tensor(reward)[s, a]
    return Batch(eye[s], a, reward, eye[torch.tensor(next_state)[s, a]], torch.zeros(len(s)))


def table(agent, states):
    with torch.no_grad():
        return agent.critic(torch.eye(states))


def test_the_discrete_update_converges_to_its_stationary_point():
    """T-CQL-5 on the agent's own update: double DQN's target, Adam, Polyak."""
    torch.manual_seed(0)
    counts, reward = [[3, 1], [2, 2], [1, 4]], [[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]]
    batch = tabular_batch(counts, [[1, 2], [0, 2], [0, 1]], reward)
    agent = discrete_agent(alpha=0.7, gamma=0.8, critic_lr=5e-3, polyak=0.5)
    for _ in range(2000):
        agent.update(batch)
    q, counts = table(agent, 3), torch.tensor(counts).float()
    behavior = counts / counts.sum(1, keepdim=True)
    y = torch.tensor(reward) + 0.8 * q.max(1).values[torch.tensor([[1, 2], [0, 2], [0, 1]])]
    residual = behavior * (q - y) + 0.7 * (q.softmax(1) - behavior)
    assert residual.abs().max() < 1e-3


def test_a_huge_alpha_imitates_the_behaviour():
    torch.manual_seed(0)
    counts = [[1, 5, 2], [6, 1, 1], [2, 1, 3], [1, 1, 4]]
    reward = np.random.default_rng(0).normal(size=(4, 3)).astype("float32").tolist()
    batch = tabular_batch(counts, [[0, 1, 2], [3, 2, 1], [0, 0, 3], [1, 2, 3]], reward)
    agent = discrete_agent(4, 3, alpha=300.0, critic_lr=1e-2)
    for _ in range(1500):
        agent.update(batch)
    q, counts = table(agent, 4), torch.tensor(counts).float()
    assert torch.allclose(q.softmax(1), counts / counts.sum(1, keepdim=True), atol=0.02)


@pytest.mark.parametrize(("alpha", "unseen"), [(0.0, True), (1.0, False)])
def test_naive_q_learning_prefers_the_action_that_is_not_in_the_data(alpha, unseen):
    """Rewards are negative, action 2 is never taken, Q starts at 0: nothing ever corrects it."""
    reward = [[-1.0, -0.8, 0.0]] * 4
    batch = tabular_batch([[1, 1, 0]] * 4, [[1, 2, 0], [2, 3, 0], [3, 0, 0], [0, 1, 0]], reward)
    agent = discrete_agent(4, 3, alpha=alpha, gamma=0.9, critic_lr=2e-2, polyak=0.1)
    for p in [*agent.critic.parameters(), *agent.critic_target.parameters()]:
        p.data.zero_()
    for _ in range(1500):
        agent.update(batch)
    greedy = table(agent, 4).argmax(1)
    assert (greedy == 2).all() if unseen else (greedy != 2).all()
    if unseen:  # and Q of the actions in the data is about r, far from the true -8 and worse
        assert table(agent, 4)[:, :2].min() > -1.1


def test_alpha_0_is_double_dqn_bit_for_bit():
    torch.manual_seed(0)
    args = Args(alpha=0.0, hidden=(16, 16), critic_lr=3e-2)
    agent = make_agent(OBS, spaces.Discrete(4), **vars(args))
    q, q_target = clone(agent.critic), clone(agent.critic_target)
    optimizer = adam(q, 3e-2)
    for _ in range(20):
        batch = random_batch(agent)
        with torch.no_grad():
            best = forward(q, batch.next_obs)[0].argmax(1)
            next_q = forward(q_target, batch.next_obs)[0][torch.arange(8), best]
            y = batch.reward + 0.99 * (1 - batch.terminal) * next_q
        loss = 0.5 * ((forward(q, batch.obs)[0][torch.arange(8), batch.action] - y) ** 2).mean()
        adam_step(optimizer, loss)
        lerp(q_target, q, args.polyak)
        agent.update(batch)
    assert same(q, agent.critic) and same(q_target, agent.critic_target)


@pytest.mark.parametrize(("make", "gap"), [(discrete_agent, 1e-3), (continuous_agent, 0.0)])
def test_alpha_starts_at_its_flag_and_a_target_gap_of_0_is_one_too(make, gap):
    torch.manual_seed(0)
    agent = make(target_gap=gap, alpha=0.7)
    metrics = {name: value.item() for name, value in agent.update(random_batch(agent)).items()}
    assert metrics["alpha"] == pytest.approx(0.7)
    assert metrics["gap"] > 0 and agent.log_alpha.exp() > 0.7005


def test_the_target_gap_is_reached():
    torch.manual_seed(0)
    batch = tabular_batch([[3, 1], [2, 2], [1, 4]], [[1, 2], [0, 2], [0, 1]], [[1.0, 0.0]] * 3)
    agent = discrete_agent(target_gap=0.62, critic_lr=1e-2, polyak=0.5, gamma=0.5)
    for _ in range(1500):
        metrics = agent.update(batch)
    assert metrics["gap"].item() == pytest.approx(0.62, abs=0.01)
    assert 0.01 < metrics["alpha"].item() < 100


def test_a_run_without_penalty_can_be_loaded(tmp_path):
    args = Args(("cartpole/mixed-v0",), alpha=0.0, steps=1, eval_episodes=0, out_dir=str(tmp_path))
    cql.main(args)
    (folder,) = tmp_path.iterdir()
    assert cql.load_policy(folder).act(np.zeros((5, 4))).shape == (5,)


def test_twin_critics_are_two_networks():
    agent = continuous_agent()
    obs, action, net = torch.randn(5, 3), torch.rand(5, 1), agent.critic.net
    x = torch.cat([obs, action], 1)
    one = [(net.weight[0][j] @ x.T + net.bias[0][j]).relu() for j in (0, 1)]
    one = [net.weight[1][j] @ one[j] + net.bias[1][j] for j in (0, 1)]
    q = agent.critic(obs, action)
    assert torch.allclose(q, torch.cat(one), atol=1e-6) and not torch.equal(q[0], q[1])


def test_networks_start_as_those_of_torch():
    torch.manual_seed(0)
    net = cql.MLP(3, 100, 5)
    for x in (net.weight[0], net.bias[0]):  # uniform within 1 / sqrt(the number of inputs)
        assert 0.07 < x.abs().max() <= 0.1


# ---- The policy's density ----


def test_the_density_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, std = torch.randn(50, 2).double(), torch.rand(50, 2).double() + 0.2
    pi = TanhNormal(mean, std)
    reference = Independent(Transformed(Normal(mean, std), [TanhTransform()]), 1)
    action, log_prob = pi.sample_and_log_prob((4000,))
    assert torch.allclose(
        log_prob, reference.log_prob(action.clamp(-1 + 1e-15, 1 - 1e-15)), atol=1e-3
    )
    z = action.clamp(-1 + 1e-12, 1 - 1e-12).atanh()
    assert torch.allclose(z.mean(0), mean, atol=0.08) and torch.allclose(z.std(0), std, atol=0.08)
    assert torch.equal(pi.median, mean.tanh())


def test_the_density_is_finite_at_the_bounds():
    pi = TanhNormal(torch.tensor([[30.0], [-30.0]]), torch.ones(2, 1))
    action, log_prob = pi.sample_and_log_prob()
    assert action.tolist() == [[1.0], [-1.0]] and log_prob.isfinite().all()


# ---- Flags and health ----


def test_flags_that_make_no_sense_together():
    for make in (discrete_agent, continuous_agent):
        with pytest.raises(cql.UserError, match="--target-gap learns alpha"):
            make(alpha=0.0, target_gap=1.0)
    with pytest.raises(cql.UserError, match="--bc-weight needs Box"):
        discrete_agent(bc_weight=1.0)
    with pytest.raises(cql.UserError, match="the gap of Discrete actions is above 0"):
        discrete_agent(target_gap=0.0)


def test_health_raises_alpha_where_q_is_too_high_and_lowers_it_where_q_is_too_low():
    """And, where Q is sane, speaks of narrow data, whose remedy only Box actions have."""
    reward, args = torch.tensor([-1.0, 0.5, 0.0, 2.0]), Args(gamma=0.9)  # possible are -10 to 20
    sane = {"q_data": -9.9, "q_policy": 19.9, "action_distance": 0.251}
    for action, end in (
        (torch.zeros(4, 1), "actions are 0.25 from the data's: if the return is poor, the data are "
         "narrow, raise --bc-weight"),
        (torch.arange(4) % 2, "possible are -10 to 20"),
    ):  # fmt: skip
        data = make_data(cql, torch.zeros(4, 3), action, reward)
        assert cql.health(sane, data, args).endswith(end)
        for name in ("q_data", "q_policy"):
            assert cql.health(sane | {name: 20.4}, data, args).endswith(
                "the critic extrapolates. Raise --alpha."
            )
            assert cql.health(sane | {name: -10.4}, data, args).endswith(
                "too pessimistic. Lower --alpha."
            )
            for flags, too_high, too_low in (
                ({"alpha": 0.0}, "Raise --alpha.", "Lower --critic-lr."),
                ({"target_gap": 3.0}, "Lower --target-gap.", "Raise --target-gap."),
            ):
                other = Args(gamma=0.9, **flags)
                assert cql.health(sane | {name: 20.4}, data, other).endswith(f"tes. {too_high}")
                assert cql.health(sane | {name: -10.4}, data, other).endswith(f"tic. {too_low}")
