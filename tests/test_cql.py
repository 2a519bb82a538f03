"""The mathematics of cql.py against exact answers, then learning on the built-in data."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform
from torch.distributions import TransformedDistribution as Transformed

import cql
from cql import Args, Batch, ContinuousCQL, Data, DiscreteCQL, Units, squash

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def discrete_agent(states=3, actions=2, **flags):
    """Tabular: one-hot observations and a linear Q."""
    data = Data(Units(spaces.Discrete(states), spaces.Discrete(actions)))
    return DiscreteCQL(data, Args(hidden=(), **flags))


def continuous_agent(low=-1.0, high=1.0, dim=1, **flags):
    action_space = spaces.Box(low, high, (dim,), np.float32)
    return ContinuousCQL(Data(Units(BOX, action_space)), Args(hidden=(16,), **flags))


def random_batch(agent, n=8, terminal=None):
    units = agent.units
    obs, next_obs = torch.randn(2, n, units.obs_dim)
    action = torch.rand(n, units.action_dim) * 2 - 1
    if units.discrete:
        action = torch.randint(units.action_dim, (n,))
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, action, torch.randn(n), next_obs, terminal)


def all_pairs(states, actions):
    """Observations (one-hot) and actions of every state-action pair."""
    s, a = torch.cartesian_prod(torch.arange(states), torch.arange(actions)).T
    return torch.eye(states)[s], a


# ---- The conservative term, discrete ----


def test_discrete_gap_equals_the_hand_computed_sum():
    q = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 5.0]])
    gap = DiscreteCQL.gap(q, torch.tensor([0, 2]))
    by_hand = [
        math.log(sum(map(math.exp, row))) - row[a]
        for row, a in zip(q.tolist(), (0, 2), strict=True)
    ]
    assert gap.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_discrete_gap_pushes_down_everything_but_the_data_action():
    q = torch.randn(5, 4, requires_grad=True)
    action = torch.tensor([0, 1, 2, 3, 0])
    (gradient,) = torch.autograd.grad(DiscreteCQL.gap(q, action).sum(), q)
    data = gradient.gather(1, action[:, None])
    assert (data < 0).all() and ((gradient > 0).sum(1) == 3).all()
    assert torch.allclose(gradient.sum(1), torch.zeros(5), atol=1e-6)
    expected = q.softmax(1) - torch.nn.functional.one_hot(action, 4)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_discrete_gap_ignores_a_constant():
    q, action = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.allclose(DiscreteCQL.gap(q, action), DiscreteCQL.gap(q + 7, action), atol=1e-5)


# ---- The conservative term, continuous ----


class Function(torch.nn.Module):
    """A critic given by a function of (obs, action), the same for both members."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, obs, action):
        q = self.function(obs, action)
        return torch.stack([q, q])


class Peak(torch.nn.Module):
    """Both critics are Q(s, a) = -3 |a - s_0|^2 + offset: the peak depends on the state."""

    offset = 0.0

    def forward(self, obs, action):
        q = -3 * ((action - obs[..., :1]) ** 2).sum(-1) + self.offset
        return torch.stack([q, q])


def policies(n, dim=1):
    pi = Normal(torch.linspace(-0.8, 0.5, n * dim).view(n, dim), torch.full((n, dim), 0.7))
    pi_next = Normal(torch.linspace(0.6, -0.2, n * dim).view(n, dim), torch.full((n, dim), 1.2))
    return pi, pi_next


def test_continuous_gap_equals_the_integral():
    """K = 20,000; a known public bug, the sum over the wrong axis, is off by 0.11."""
    torch.manual_seed(0)
    agent = continuous_agent(samples=20_000)
    agent.critic = Peak()
    obs = torch.tensor([[0.4, 0, 0], [-0.7, 0, 0], [0.0, 0, 0]])
    a_data = torch.tensor([[0.1], [0.9], [-0.3]])
    q_data = agent.critic(obs, a_data)
    gap = agent.gap(obs, q_data, *policies(3))
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for n in range(3):
        integral = torch.trapezoid(torch.exp(-3 * (grid - obs[n, 0]) ** 2), grid).log().item()
        exact = integral + math.log(3 * 20_000) - q_data[0, n].item()
        assert gap[:, n].tolist() == pytest.approx([exact, exact], abs=0.02)


@pytest.mark.parametrize("dim", [1, 3])
def test_continuous_gap_of_a_constant_q(dim):
    """log sum_i exp(c) / mu(a_i) = c + d log 2 + log 3K, since E[1 / mu] is the volume 2^d."""
    torch.manual_seed(0)
    agent = continuous_agent(dim=dim, samples=50_000)
    agent.critic = Function(lambda obs, action: torch.full(action.shape[:-1], 4.0))
    wide = Normal(torch.zeros(2, dim), torch.full((2, dim), 0.8))
    gap = agent.gap(torch.zeros(2, 3), torch.zeros(2, 2), wide, wide)
    assert gap.flatten().tolist() == pytest.approx(
        [4.0 + dim * math.log(2) + math.log(150_000)] * 4, abs=0.02
    )


def test_continuous_gap_of_a_constant_q_is_exact_for_uniform_proposals(monkeypatch):
    def uniform(pi, u):
        shape = u.shape[:-1]
        return torch.zeros_like(u), torch.full(shape, -2 * math.log(2))

    monkeypatch.setattr(cql, "squash", uniform)
    agent = continuous_agent(dim=2, samples=5)
    agent.critic = Function(lambda obs, action: torch.full(action.shape[:-1], -1.5))
    gap = agent.gap(torch.zeros(4, 3), torch.zeros(2, 4), *policies(4, 2))
    exact = -1.5 + 2 * math.log(2) + math.log(15)
    assert torch.allclose(gap, torch.full((2, 4), exact), atol=1e-5)


def test_continuous_gap_pushes_down_unseen_actions_and_up_the_data():
    agent = continuous_agent(samples=500)
    height = torch.zeros(2, requires_grad=True)  # of two bumps, around -0.6 and 0.6

    def bumps(obs, action):
        centers = torch.tensor([-0.6, 0.6])
        return (height * torch.exp(-50 * (action - centers) ** 2)).sum(-1)

    agent.critic = Function(bumps)
    obs, a_data = torch.zeros(1, 3), torch.tensor([[0.6]])
    gap = agent.gap(obs, agent.critic(obs, a_data), *policies(1))
    unseen, data = torch.autograd.grad(gap.sum(), height)[0]
    assert unseen > 0 > data


def test_continuous_gap_ignores_a_constant_and_trains_no_policy():
    agent = continuous_agent()
    agent.critic, obs = Peak(), torch.zeros(4, 3)
    a_data, gaps = torch.full((4, 1), 0.2), []
    for offset in (0.0, 5.0):
        agent.critic.offset = offset
        torch.manual_seed(1)
        gaps.append(agent.gap(obs, agent.critic(obs, a_data), *policies(4)))
    assert torch.allclose(*gaps, atol=1e-5)
    pi = agent.policy(obs)
    gap = continuous_agent().gap(obs, torch.zeros(2, 4), pi, pi)
    assert pi.mean.requires_grad
    assert torch.autograd.grad(gap.sum(), pi.mean, allow_unused=True) == (None,)


def test_continuous_proposals_are_uniform_and_from_both_policies_all_valued_at_s():
    seen = []

    def spy(obs, action):
        seen.append((obs, action))
        return action.sum(-1)

    agent = continuous_agent(samples=1000)
    agent.critic, obs = Function(spy), torch.randn(2, 3)
    narrow = [Normal(torch.full((2, 1), mean), torch.full((2, 1), 1e-3)) for mean in (-1.0, 1.0)]
    agent.gap(obs, torch.zeros(2, 2), *narrow)
    ((its_obs, action),) = seen
    assert torch.equal(its_obs, obs.expand(3000, 2, 3))
    uniform, from_pi, from_pi_next = action.split(1000)
    assert uniform.mean().abs() < 0.05 and uniform.std() == pytest.approx(3**-0.5, abs=0.02)
    assert from_pi.max() < -0.7 and from_pi_next.min() > 0.7


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
        gap = DiscreteCQL.gap(rows, action).view_as(q)
        loss = (behavior * (alpha * gap + 0.5 * (q - y) ** 2)).sum()
        (gradient,) = torch.autograd.grad(loss, q)
        q = (q - gradient / (behavior + alpha)).detach().requires_grad_()
    assert gradient.abs().max() < 1e-9
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


def test_the_minimiser_satisfies_the_stationarity_condition(solved):
    """pi_b (Q - y) + alpha (softmax Q - pi_b) = 0."""
    (_, _, behavior), solutions = solved
    for alpha, (q, y) in solutions.items():
        residual = behavior * (q - y) + alpha * (q.softmax(-1) - behavior)
        assert residual.abs().max() < 1e-8


def test_a_larger_alpha_lowers_the_value_and_the_preference_for_rare_actions(solved):
    (_, _, behavior), solutions = solved
    values = [(q.softmax(-1) * q).sum(-1).mean() for q, _ in solutions.values()]
    assert values[0] > values[1] > values[2]
    rare, common = behavior.argmin(-1, True), behavior.argmax(-1, True)
    excess = [(q.gather(-1, rare) - q.gather(-1, common)).mean() for q, _ in solutions.values()]
    assert excess[0] > excess[1] > excess[2]


# ---- The agents' whole update ----


def tabular_batch(counts, next_state, reward, terminal=0.0):
    """Every pair (s, a) as often as counts[s][a] says; deterministic transitions."""
    states = len(counts)
    s, a = (torch.tensor(counts) > 0).nonzero().T
    times = torch.tensor(counts)[s, a]
    s, a = s.repeat_interleave(times), a.repeat_interleave(times)
    eye, next_s = torch.eye(states), torch.tensor(next_state)[s, a]
    reward = torch.tensor(reward)[s, a]
    return Batch(eye[s], a, reward, eye[next_s], torch.full_like(reward, terminal))


def table(agent, states):
    with torch.no_grad():
        return agent.critic(torch.eye(states))


def test_the_discrete_update_converges_to_its_stationary_point():
    """T-CQL-5 on the agent's own update: double DQN's target, Adam, Polyak."""
    torch.manual_seed(0)
    counts = [[3, 1], [2, 2], [1, 4]]
    batch = tabular_batch(counts, [[1, 2], [0, 2], [0, 1]], [[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]])
    agent = discrete_agent(alpha=0.7, gamma=0.8, critic_lr=5e-3, polyak=0.5)
    for _ in range(2000):
        agent.update(batch)
    q, counts = table(agent, 3), torch.tensor(counts).float()
    behavior = counts / counts.sum(1, keepdim=True)
    v = q.max(1).values
    reward = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]])
    y = reward + 0.8 * v[torch.tensor([[1, 2], [0, 2], [0, 1]])]
    residual = behavior * (q - y) + 0.7 * (q.softmax(1) - behavior)
    assert residual.abs().max() < 1e-3


def test_a_huge_alpha_imitates_the_mode_of_the_behaviour():
    torch.manual_seed(0)
    counts = [[1, 5, 2], [6, 1, 1], [2, 1, 3], [1, 1, 4]]
    reward = np.random.default_rng(0).normal(size=(4, 3)).astype("float32").tolist()
    batch = tabular_batch(counts, [[0, 1, 2], [3, 2, 1], [0, 0, 3], [1, 2, 3]], reward)
    agent = discrete_agent(4, 3, alpha=300.0, critic_lr=1e-2)
    for _ in range(1500):
        agent.update(batch)
    q, counts = table(agent, 4), torch.tensor(counts).float()
    assert torch.equal(q.argmax(1), counts.argmax(1))
    assert torch.allclose(q.softmax(1), counts / counts.sum(1, keepdim=True), atol=0.02)


@pytest.mark.parametrize(("alpha", "unseen"), [(0.0, True), (1.0, False)])
def test_naive_q_learning_prefers_the_action_that_is_not_in_the_data(alpha, unseen):
    """Rewards are negative, action 2 is never taken, Q starts at 0: nothing ever corrects it."""
    counts = [[1, 1, 0]] * 4
    reward = [[-1.0, -0.8, 0.0]] * 4
    batch = tabular_batch(counts, [[1, 2, 0], [2, 3, 0], [3, 0, 0], [0, 1, 0]], reward)
    agent = discrete_agent(4, 3, alpha=alpha, gamma=0.9, critic_lr=2e-2, polyak=0.1)
    for p in [*agent.critic.parameters(), *agent.critic_target.parameters()]:
        p.data.zero_()
    for _ in range(1500):
        agent.update(batch)
    greedy = table(agent, 4).argmax(1)
    assert (greedy == 2).all() if unseen else (greedy != 2).all()
    if unseen:  # and Q of the actions in the data is about r, far from the true -8 and worse
        assert table(agent, 4)[:, :2].min() > -1.1


@pytest.mark.parametrize("make", [discrete_agent, continuous_agent])
def test_a_terminal_transition_is_worth_its_reward(make):
    agent = make()
    batch = random_batch(agent, terminal=1.0)
    extra = () if agent.units.discrete else (agent.policy(batch.next_obs),)
    assert torch.equal(agent.target(batch, *extra), batch.reward)
    batch = batch._replace(terminal=torch.zeros(8))
    assert not torch.isclose(agent.target(batch, *extra), batch.reward).any()


def forward(weights, x):
    """An MLP from the list w0, w1, ..., b0, b1, ..., by the same products as torch's bmm."""
    n = len(weights) // 2
    x = x.expand(weights[0].shape[0], *x.shape)
    for i in range(n):
        x = torch.baddbmm(weights[n + i], x, weights[i])
        x = x.relu() if i < n - 1 else x
    return x


def clone(module):
    return [p.detach().clone().requires_grad_() for p in module.parameters()]


def test_alpha_0_is_double_dqn_bit_for_bit():
    torch.manual_seed(0)
    space = Units(BOX, spaces.Discrete(4))
    agent = DiscreteCQL(Data(space), Args(alpha=0.0, hidden=(16, 16), critic_lr=3e-2))
    q, q_target = clone(agent.critic), clone(agent.critic_target)
    optimizer = torch.optim.Adam(q, lr=3e-2, fused=True)
    for seed in range(20):
        torch.manual_seed(seed)
        batch = random_batch(agent)
        with torch.no_grad():
            best = forward(q, batch.next_obs)[0].argmax(1)
            next_q = forward(q_target, batch.next_obs)[0][torch.arange(8), best]
            y = batch.reward + 0.99 * (1 - batch.terminal) * next_q
        loss = 0.5 * ((forward(q, batch.obs)[0][torch.arange(8), batch.action] - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for t, w in zip(q_target, q, strict=True):
                t.lerp_(w, agent.args.polyak)
        torch.manual_seed(seed)
        agent.update(random_batch(agent))
    for mine, its in ((q, agent.critic), (q_target, agent.critic_target)):
        assert all(torch.equal(a, b) for a, b in zip(mine, its.parameters(), strict=True))


def test_alpha_0_is_sac_without_entropy_in_the_backup_bit_for_bit():
    torch.manual_seed(0)
    agent = continuous_agent(dim=2, alpha=0.0)
    q, q_target, pi = map(clone, (agent.critic, agent.critic_target, agent.policy))
    log_temperature = torch.zeros((), requires_grad=True)
    q_optimizer = torch.optim.Adam(q, lr=1e-3, fused=True)
    pi_optimizer = torch.optim.Adam([*pi, log_temperature], lr=agent.args.actor_lr, fused=True)

    def sample(obs):
        mean, log_std = forward(pi, obs)[0].chunk(2, -1)
        std = log_std.clamp(-5, 2).exp()
        u = Normal(mean, std).rsample()
        slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
        return u.tanh(), (Normal(mean, std).log_prob(u) - slope).sum(-1)

    def value(weights, obs, action):
        return forward(weights, torch.cat([obs, action], -1))[..., 0]

    for seed in range(5):
        torch.manual_seed(seed)
        batch = random_batch(agent)
        action, log_pi = sample(batch.obs)
        q_pi = value(q, batch.obs, action).min(0).values
        pi_loss = (log_temperature.exp().detach() * log_pi - q_pi).mean()
        pi_loss = pi_loss - log_temperature * (log_pi.detach() - 2).mean()
        with torch.no_grad():
            next_action, _ = sample(batch.next_obs)
            next_q = value(q_target, batch.next_obs, next_action).min(0).values
            y = batch.reward + 0.99 * (1 - batch.terminal) * next_q
        pi_optimizer.zero_grad()
        pi_loss.backward()
        pi_optimizer.step()
        q_loss = 0.5 * ((value(q, batch.obs, batch.action) - y) ** 2).mean(1).sum()
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()
        with torch.no_grad():
            for t, w in zip(q_target, q, strict=True):
                t.lerp_(w, agent.args.polyak)
        torch.manual_seed(seed)
        agent.update(random_batch(agent))
    for mine, its in ((q, agent.critic), (q_target, agent.critic_target), (pi, agent.policy)):
        assert all(torch.equal(a, b) for a, b in zip(mine, its.parameters(), strict=True))
    assert torch.equal(log_temperature, agent.log_temperature)


def test_the_continuous_update_lowers_the_gap():
    """Without the penalty, or without its gradient, the net gap stays about 0, that of a flat Q."""
    torch.manual_seed(0)
    agent = continuous_agent(alpha=5.0, critic_lr=3e-3)
    batch = random_batch(agent, 64)._replace(action=torch.full((64, 1), 0.5))
    before = agent.update(batch)["gap_net"]
    for _ in range(300):
        metrics = agent.update(batch)
    assert before > -0.3 and metrics["gap_net"] < -0.8


@pytest.mark.parametrize("make", [discrete_agent, continuous_agent])
def test_target_gap_raises_alpha_while_the_gap_is_above_it(make):
    for target, rises in ((-100.0, True), (100.0, False)):
        torch.manual_seed(0)
        agent = make(target_gap=target, alpha=2.0)
        assert agent.alpha().item() == pytest.approx(2.0)
        agent.update(random_batch(agent))
        assert (agent.alpha().item() > 2.0) == rises


def test_the_target_gap_is_reached():
    torch.manual_seed(0)
    batch = tabular_batch([[3, 1], [2, 2], [1, 4]], [[1, 2], [0, 2], [0, 1]], [[1.0, 0.0]] * 3)
    agent = discrete_agent(target_gap=0.62, critic_lr=1e-2, polyak=0.5, gamma=0.5)
    for _ in range(1500):
        metrics = agent.update(batch)
    assert metrics["gap"].item() == pytest.approx(0.62, abs=0.01)
    assert metrics["gap_net"].item() == pytest.approx(0.62 - math.log(2), abs=0.01)
    assert 0.01 < metrics["alpha"].item() < 100


def test_bc_weight_pulls_the_mean_action_to_the_data():
    distances = []
    for bc_weight in (0.0, 1000.0):
        torch.manual_seed(0)
        agent = continuous_agent(bc_weight=bc_weight, actor_lr=1e-2)
        batch = random_batch(agent, 32)
        batch = batch._replace(action=torch.full((32, 1), 0.7))
        for _ in range(200):
            agent.update(batch)
        distances.append(agent.diagnose(batch)["action_distance"].item())
    assert distances[1] < 0.05 < distances[0]


def test_the_temperature_rises_while_the_entropy_is_below_its_target():
    for log_std, rises in ((-5.0, True), (0.0, False)):  # entropies about -3.6 and 0.6, target -1
        agent = continuous_agent()
        pi = Normal(torch.zeros(64, 1, requires_grad=True), torch.tensor(log_std).exp())
        loss, _ = agent.actor_loss(random_batch(agent, 64), pi)
        (gradient,) = torch.autograd.grad(loss, agent.log_temperature)
        assert (gradient < 0) == rises


def test_an_update_leaves_no_gradient_in_other_networks():
    agent = continuous_agent()
    batch = random_batch(agent)
    pi = agent.policy(batch.obs)
    cql.step(agent.actor_optimizer, agent.actor_loss(batch, pi)[0])
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(p.grad is not None for p in agent.policy.parameters())
    agent.update(batch)
    assert all(p.grad is None for p in agent.critic_target.parameters())


@pytest.mark.parametrize("make", [discrete_agent, continuous_agent])
def test_silent_broadcasting_is_an_error(make):
    agent = make()
    batch = random_batch(agent)
    with pytest.raises(AssertionError):
        agent.update(batch._replace(reward=batch.reward[:, None]))


def test_twin_critics_have_equal_shapes_and_different_weights():
    agent = continuous_agent()
    for p in agent.critic.parameters():
        assert p.shape[0] == 2 and not torch.equal(p[0], p[1])
    for p, t in zip(agent.critic.parameters(), agent.critic_target.parameters(), strict=True):
        assert torch.equal(p, t)
    obs, action = torch.randn(5, 3), torch.rand(5, 1)
    q = agent.critic(obs, action)
    one = [
        torch.relu(torch.cat([obs, action], 1) @ agent.critic.net.weight[0][j] + bias[j])
        @ agent.critic.net.weight[1][j]
        + agent.critic.net.bias[1][j]
        for j, bias in ((0, agent.critic.net.bias[0]), (1, agent.critic.net.bias[0]))
    ]
    assert torch.allclose(q, torch.stack(one)[..., 0], atol=1e-6)


# ---- The policy's density ----


def test_the_tanh_gaussian_integrates_to_one():
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    for mean, std in ((0.0, 0.5), (0.8, 1.0), (-2.0, 0.7)):
        pi = Normal(torch.tensor([mean], dtype=torch.float64), torch.tensor([std]).double())
        action, log_prob = squash(pi, grid[:, None].atanh())
        assert torch.allclose(action[:, 0], grid)
        assert torch.trapezoid(log_prob.exp(), grid).item() == pytest.approx(1, abs=1e-3)


def test_log_prob_of_given_actions_is_that_of_torch_distributions_in_environment_units():
    torch.manual_seed(0)
    agent = continuous_agent(low=-2.0, high=3.0, dim=2)
    obs, action = torch.randn(50, 3), torch.rand(50, 2) * 4.9 - 1.95
    pi = agent.policy(obs)
    scale = [TanhTransform(), AffineTransform(0.5, 2.5)]
    reference = Independent(Transformed(Normal(pi.mean, pi.stddev), scale), 1)
    expected = reference.log_prob(action)
    assert torch.allclose(agent.log_prob(obs.numpy(), action.numpy()), expected, atol=1e-3)


def test_samples_stay_in_bounds_and_follow_their_density():
    torch.manual_seed(0)
    agent = continuous_agent(low=-2.0, high=3.0)
    obs = np.zeros((20_000, 3), np.float32)
    action = agent.act(obs, deterministic=False)
    assert action.min() >= -2 and action.max() <= 3
    grid = np.linspace(-1.999, 2.999, 2_000, dtype=np.float32)[:, None]
    density = agent.log_prob(np.zeros((2_000, 3), np.float32), grid).exp().double()
    mean = torch.trapezoid(density * torch.tensor(grid[:, 0]), torch.tensor(grid[:, 0]).double())
    assert action.mean() == pytest.approx(mean.item(), abs=0.05)


def test_the_greedy_policy_is_one_hot():
    agent = discrete_agent(actions=4)
    obs = np.eye(3, dtype=np.float32)
    probabilities, action = agent.probabilities(obs), agent.act(obs)
    assert torch.equal(probabilities.argmax(1), table(agent, 3).argmax(1))
    assert probabilities.sum(1).tolist() == [1, 1, 1]
    assert agent.log_prob(obs, action).tolist() == [0, 0, 0]
    assert agent.log_prob(obs, (action + 1) % 4).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("flags", [{"alpha": -1.0}, {"alpha": 0.0, "target_gap": 1.0}])
def test_a_wrong_alpha_is_one_clear_line(flags):
    with pytest.raises(cql.UserError, match="--alpha"):
        discrete_agent(**flags)


def test_other_wrong_flags():
    with pytest.raises(cql.UserError, match="--bc-weight"):
        discrete_agent(bc_weight=1.0)
    with pytest.raises(cql.UserError, match="--samples"):
        continuous_agent(samples=0)


# ---- Learning on the built-in data, default flags ----
# Bounds: the mean over seeds 0 to 4 less two standard errors of what the test averages, or the
# project's goal where the seeds hardly differ. benchmarks/table.py makes the figures again.


def final(dataset, tmp_path, **flags):
    args = Args(dataset_id=(dataset,), out_dir=str(tmp_path), eval_every=0, **flags)
    return cql.main(args)


@pytest.mark.parametrize(
    ("dataset", "bound"),
    [
        ("cartpole/mixed-v0", 475),  # 500 ± 0, the data 226
        ("cartpole/expert-v0", 475),  # 500 ± 0, the data 500
        ("cartpole/medium-v0", 217),  # 226 ± 3, the data 146
        ("pendulum/mixed-v0", -190),  # -138 ± 1, the data -578
    ],
)
def test_learns(dataset, bound, tmp_path):
    result = final(dataset, tmp_path)
    assert result["return_mean"] >= bound
    assert "possible are" in result["health"]


def test_learns_from_random_actions(tmp_path):
    """171 ± 59 over the seeds, the data 21: three of them average more than 100."""
    returns = [final("cartpole/random-v0", tmp_path, seed=s)["return_mean"] for s in range(3)]
    assert np.mean(returns) >= 100


def test_without_the_penalty_it_collapses_and_says_so(tmp_path):
    result = final("cartpole/expert-v0", tmp_path, alpha=0.0)
    assert result["return_mean"] < 20  # 9.4 ± 0.0, the data 500
    assert result["q_policy"] > 100
    assert "exceeds every return possible" in result["health"] and "--alpha" in result["health"]
