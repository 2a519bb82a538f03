"""The mathematics of bcq.py against exact answers, then learning on the built-in data."""

import math
from itertools import pairwise

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from torch.distributions import Normal, kl_divergence

import bcq
from bcq import Args, Batch, ContinuousBCQ, Data, DiscreteBCQ, Units, repeat

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def discrete_agent(states=3, actions=2, **flags):
    """Tabular: one-hot observations, a linear Q and linear logits."""
    data = Data(Units(spaces.Discrete(states), spaces.Discrete(actions)))
    return DiscreteBCQ(data, Args(**{"hidden": ()} | flags))


def continuous_agent(low=-1.0, high=1.0, dim=1, **flags):
    data = Data(Units(BOX, spaces.Box(low, high, (dim,), np.float32)))
    return ContinuousBCQ(data, Args(**{"hidden": (16,), "vae_hidden": (16,)} | flags))


def random_batch(agent, n=8, terminal=None):
    units = agent.units
    obs, next_obs = torch.randn(2, n, units.obs_dim)
    action = torch.rand(n, units.action_dim) * 2 - 1
    if units.discrete:
        action = torch.randint(units.action_dim, (n,))
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, action, torch.randn(n), next_obs, terminal)


def tabular_batch(states, *transitions):
    """Transitions (times, s, a, r, s') as one-hot observations; s' is None where the MDP ends."""
    rows = [t[1:] for t in transitions for _ in range(t[0])]
    s, a, r, next_s = zip(*rows, strict=True)
    terminal = torch.tensor([float(x is None) for x in next_s])
    eye, next_s = torch.eye(states), torch.tensor([x or 0 for x in next_s])
    return Batch(eye[list(s)], torch.tensor(a), torch.tensor(r), eye[next_s], terminal)


def trained(agent, batch, updates):
    for _ in range(updates):
        agent.update(batch)
    return agent


def table(net):
    """Q or the logits of every state (S, A) of a tabular agent."""
    with torch.no_grad():
        return net(torch.eye(net.net.weight[0].shape[1]))


def fill(net, values):
    """Makes a tabular net equal to `values` (S, A)."""
    net.net.weight[0].data[0] = torch.as_tensor(values, dtype=torch.float32)
    net.net.bias[0].data.zero_()


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


def same(weights, module):
    return all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def adam_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def lerp(target, source, rate):
    with torch.no_grad():
        for t, w in zip(target, source, strict=True):
            t.lerp_(w, rate)


class Function(torch.nn.Module):
    """Twin critics given by two functions of (obs, action)."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def forward(self, obs, action):
        return torch.stack([f(obs, action) for f in self.functions])


# ---- Discrete: the threshold ----


def test_allowed_compares_the_ratio_to_the_likeliest_action():
    """G = (0.5, 0.3, 0.2): ratios 1, 0.6, 0.4. A threshold on G itself would differ."""
    for threshold, expected in (
        (0.0, [True, True, True]),
        (0.39, [True, True, True]),
        (0.41, [True, True, False]),
        (0.59, [True, True, False]),
        (0.61, [True, False, False]),
        (1.0, [True, False, False]),
    ):
        agent = discrete_agent(1, 3, threshold=threshold)
        fill(agent.imitation, [[math.log(0.5) + 7, math.log(0.3) + 7, math.log(0.2) + 7]])
        assert agent.allowed(torch.eye(1)).tolist() == [expected]


def test_threshold_1_allows_all_the_likeliest_actions_and_never_none():
    agent = discrete_agent(2, 3, threshold=1.0)
    fill(agent.imitation, [[2.0, -1.0, 2.0], [0.5, 0.5, 0.5]])
    assert agent.allowed(torch.eye(2)).tolist() == [[True, False, True], [True, True, True]]
    fill(agent.critic, [[1.0, 9.0, 3.0], [-1.0, 4.0, 2.0]])
    assert agent.policy(torch.eye(2)).tolist() == [2, 1]


def test_threshold_0_allows_an_action_of_probability_0():
    agent = discrete_agent(1, 2, threshold=0.0)
    fill(agent.imitation, [[0.0, -1e30]])
    assert agent.allowed(torch.eye(1)).all()


def test_threshold_0_is_double_dqn_bit_for_bit():
    torch.manual_seed(0)
    data = Data(Units(BOX, spaces.Discrete(4)))
    agent = DiscreteBCQ(data, Args(threshold=0.0, hidden=(16, 16)))
    q, q_target, g = map(clone, (agent.critic, agent.critic_target, agent.imitation))
    q_optimizer = torch.optim.Adam(q, lr=agent.args.lr, fused=True)
    g_optimizer = torch.optim.Adam(g, lr=agent.args.lr, fused=True)
    rows = torch.arange(8)
    for _ in range(5):
        batch = random_batch(agent)._replace(reward=3 * torch.randn(8))  # both sides of Huber's
        with torch.no_grad():
            best = forward(q, batch.next_obs)[0].argmax(1)
            next_q = forward(q_target, batch.next_obs)[0][rows, best]
            y = batch.reward + 0.99 * (1 - batch.terminal) * next_q
        error = forward(q, batch.obs)[0][rows, batch.action] - y
        huber = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5)
        adam_step(q_optimizer, huber.mean())
        lerp(q_target, q, agent.args.polyak)
        logits = forward(g, batch.obs)[0]
        nll = torch.nn.functional.cross_entropy(logits, batch.action)
        adam_step(g_optimizer, nll + 0.01 * (logits**2).mean())
        agent.update(batch)
    assert same(q, agent.critic) and same(q_target, agent.critic_target)
    assert same(g, agent.imitation)


def test_threshold_1_is_the_mode_of_the_imitation_whatever_q_says():
    torch.manual_seed(0)
    data = Data(Units(BOX, spaces.Discrete(4)))
    agent = DiscreteBCQ(data, Args(threshold=1.0, hidden=(16, 16)))
    batch = random_batch(agent, 500)
    mode = agent.imitation(batch.obs).argmax(1)
    assert torch.equal(agent.policy(batch.obs), mode)
    assert not torch.equal(agent.critic(batch.obs).argmax(1), mode)
    next_mode = agent.imitation(batch.next_obs).argmax(1)
    next_q = agent.critic_target(batch.next_obs)[torch.arange(500), next_mode]
    y = batch.reward + 0.99 * (1 - batch.terminal) * next_q
    assert torch.equal(agent.target(batch), y)


# ---- Discrete: the fixed point, tabular ----

COUNTS = torch.tensor([[6, 3, 1], [1, 6, 3], [5, 1, 4], [1, 2, 7]])
NEXT = torch.tensor([[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]])
REWARD = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5], [-2.0, 1.0, 0.0], [1.5, 0.0, -1.0]])


def value_iteration(allowed, gamma):
    """V of the best policy that takes allowed actions (S, A) only."""
    v = torch.zeros(4)
    for _ in range(1000):
        v = (REWARD + gamma * v[NEXT]).masked_fill(~allowed, -math.inf).amax(1)
    return v


def test_the_fixed_point_is_value_iteration_over_the_allowed_actions():
    """The agent's own update finds G and Q; from threshold 1, the policy argmax count, to 0."""
    rows = [
        (int(COUNTS[s, a]), s, a, float(REWARD[s, a]), int(NEXT[s, a]))
        for s in range(4)
        for a in range(3)
    ]
    batch, values = tabular_batch(4, *rows), []
    ratio = COUNTS / COUNTS.amax(1, keepdim=True)
    for threshold in (1.0, 0.55, 0.25, 0.0):
        torch.manual_seed(0)
        agent = discrete_agent(4, 3, threshold=threshold, gamma=0.6, lr=2e-2, polyak=0.2)
        trained(agent, batch, 600)
        agent.optimizer.param_groups[0]["lr"] = 2e-3
        trained(agent, batch, 300)
        allowed = ratio >= threshold
        assert torch.equal(agent.allowed(torch.eye(4)), allowed)
        v = value_iteration(allowed, 0.6)
        assert torch.allclose(table(agent.critic), REWARD + 0.6 * v[NEXT], atol=5e-3)
        values.append(v)
    mode_kernel = torch.eye(4)[NEXT[range(4), COUNTS.argmax(1)]]
    mode_reward = REWARD[range(4), COUNTS.argmax(1)]
    v_mode = torch.linalg.solve(torch.eye(4) - 0.6 * mode_kernel, mode_reward)
    assert torch.allclose(values[0], v_mode, atol=1e-5)
    for higher, lower in pairwise(values):  # more actions, no state is worse
        assert (lower >= higher).all() and (lower > higher).any()


def test_an_unseen_action_is_neither_chosen_nor_bootstrapped_from():
    torch.manual_seed(0)
    rows = [(5, s, a, 1.0, (s + a + 1) % 4) for s in range(4) for a in range(2)]
    batch = tabular_batch(4, *rows)
    agent = trained(discrete_agent(4, 3, threshold=0.1, lr=1e-2), batch, 300)
    y = agent.target(batch)
    for net in (agent.critic, agent.critic_target):
        net.net.bias[0].data[..., 2] = 1e6
    assert (agent.policy(torch.eye(4)) < 2).all()
    assert torch.equal(agent.target(batch), y)
    assert agent.diagnose(batch)["q_policy"] < 100
    agent.log_threshold = -math.inf  # without the constraint it is both
    assert (agent.policy(torch.eye(4)) == 2).all() and (agent.target(batch) > 1e5).all()


@pytest.mark.parametrize(("threshold", "start", "value"), [(0.3, 1, 3.0), (0.05, 0, 10.0)])
def test_a_rare_good_action_counts_only_above_the_threshold(threshold, start, value):
    """Y pays 3 at once; X leads to a state where the data take "bad" (0) in 90% and "good" (10) in
    10%: a ratio of 0.11."""
    torch.manual_seed(0)
    bad, good = (18, 1, 0, 0.0, None), (2, 1, 1, 10.0, None)
    batch = tabular_batch(2, (20, 0, 0, 0.0, 1), (20, 0, 1, 3.0, None), bad, good)
    agent = discrete_agent(2, 2, threshold=threshold, gamma=0.999, lr=5e-2, polyak=0.2)
    trained(agent, batch, 1500)
    assert agent.policy(torch.eye(2))[0] == start
    assert table(agent.critic)[0, start].item() == pytest.approx(value, abs=0.05)


# A 4 x 4 grid, actions up, right, down, left, -1 per step; the goal, 15, ends the episode with +10.
# Neither trajectory is good: both meet in 5, and the best path takes the first half of one and the
# second half of the other. Where an action is not in the data, Q keeps its start value 0: too high.
MOVES = (-4, 1, 4, -1)
PATHS = [[0, 1, 5, 4, 8, 12, 13, 14, 15], [2, 3, 7, 6, 5, 9, 10, 11, 15]]


def grid_world(threshold):
    rows = [
        (1, s, MOVES.index(t - s), 10.0 if t == 15 else -1.0, None if t == 15 else t)
        for path in PATHS
        for s, t in pairwise(path)
    ]
    agent = discrete_agent(16, 4, threshold=threshold, gamma=0.9, lr=2e-2, polyak=0.2)
    for net in (agent.critic, agent.critic_target):
        fill(net, torch.zeros(16, 4))
    trained(agent, tabular_batch(16, *rows), 1500)
    state, path, seen = 0, [0], {row[1:3] for row in rows}
    action = agent.policy(torch.eye(16)).tolist()
    while state != 15 and len(path) < 20 and (state, action[state]) in seen:
        state += MOVES[action[state]]
        path.append(state)
    return agent, path


def test_stitching_grid_world():
    """The policy is the optimum over the paths that the data contain, better than both of them."""
    torch.manual_seed(0)
    agent, path = grid_world(threshold=0.3)
    assert path == [0, 1, 5, 9, 10, 11, 15]  # 6 steps; the trajectories have 8
    returns = [sum(0.9**t * -1 for t in range(n - 1)) + 0.9 ** (n - 1) * 10 for n in (6, 8)]
    assert agent.critic(torch.eye(16)).detach()[0, 1].item() == pytest.approx(returns[0], abs=0.02)
    assert returns[0] > returns[1]


def test_without_the_constraint_the_grid_world_ends_off_the_data():
    torch.manual_seed(0)
    assert grid_world(threshold=0.0)[1][-1] != 15


# ---- Discrete: losses and policy ----


def test_imitation_loss_equals_the_hand_computed_sum():
    agent = discrete_agent(2, 3)
    logits, actions = [[1.0, 2.0, -1.0], [0.0, 0.5, 5.0]], (0, 2)
    fill(agent.imitation, logits)
    batch = tabular_batch(2, (1, 0, 0, 0.0, 1), (1, 1, 2, 0.0, 0))
    nll = [
        math.log(sum(map(math.exp, row))) - row[a] for row, a in zip(logits, actions, strict=True)
    ]
    penalty = sum(x * x for row in logits for x in row) / 6
    expected = sum(nll) / 2 + 0.01 * penalty
    assert agent.imitation_loss(batch).item() == pytest.approx(expected, abs=1e-6)


def test_on_deterministic_data_the_other_action_is_masked():
    """Where the data take only one of two actions, (5) is least at x (1 + e^x) = 2 / 0.01, with
    e^-x the other action's ratio: 0.02. The weight 0.5 of a public implementation leaves it 0.35:
    above the 0.3 of the paper. There nothing is masked, and BCQ is plain double DQN."""
    torch.manual_seed(0)
    agent = discrete_agent(1, 2, lr=2e-2)
    trained(agent, tabular_batch(1, (1, 0, 0, 0.0, None)), 600)
    x = -table(agent.imitation).diff().item()
    assert x * (1 + math.exp(x)) == pytest.approx(2 / 0.01, rel=1e-2)
    assert agent.allowed(torch.eye(1)).tolist() == [[True, False]]
    assert math.exp(-1.0426) > 0.3 > math.exp(-x)
    assert 1.0426 * (1 + math.exp(1.0426)) == pytest.approx(2 / 0.5, rel=1e-3)


def test_the_metrics_say_how_much_the_threshold_forbids():
    agent = discrete_agent(2, 4, threshold=0.5)
    fill(agent.imitation, [[0.0, 0.0, 0.0, 0.0], [0.0, -9.0, -9.0, -0.1]])
    metrics = agent.diagnose(tabular_batch(2, (3, 0, 1, 0.0, 1), (1, 1, 0, 0.0, 0)))
    assert metrics["masked"].item() == pytest.approx(0.25 * 0.5)
    assert metrics["entropy"].item() == pytest.approx(0.75 * math.log(4) + 0.25 * 0.693, abs=2e-3)


def test_the_greedy_policy_is_one_hot():
    agent = discrete_agent(actions=4, threshold=0.5)
    obs = np.eye(3, dtype=np.float32)
    probabilities, action = agent.probabilities(obs), agent.act(obs)
    assert torch.equal(probabilities.argmax(1), agent.policy(torch.eye(3)))
    assert probabilities.sum(1).tolist() == [1, 1, 1]
    assert agent.log_prob(obs, action).tolist() == [0, 0, 0]
    assert agent.log_prob(obs, (action + 1) % 4).tolist() == [-math.inf] * 3
    assert agent.has_density


# ---- Continuous: the target ----


def target_by_hand(agent, batch, candidates):
    """(9) one state and one candidate at a time."""
    lam, y = agent.args.soft_min, []
    for s, a, r, d in zip(batch.next_obs, candidates, batch.reward, batch.terminal, strict=True):
        values = []
        for a_i in a:
            q_1, q_2 = agent.critic_target(s[None], a_i[None])[:, 0].tolist()
            values.append(lam * min(q_1, q_2) + (1 - lam) * max(q_1, q_2))
        y.append(r.item() + 0.99 * (1 - d.item()) * max(values))
    return torch.tensor(y)


@pytest.mark.parametrize("soft_min", [0.0, 0.4, 0.75, 1.0])
def test_target_by_hand(soft_min):
    torch.manual_seed(0)
    agent = continuous_agent(dim=2, soft_min=soft_min, target_samples=7, phi=0.3)
    agent.perturbation_target.net.bias[-1].data.fill_(0.7)  # not the online network's
    batch = random_batch(agent)
    torch.manual_seed(1)
    y = agent.target(batch)
    torch.manual_seed(1)
    next_obs = repeat(batch.next_obs, 7)
    candidates = agent.perturbation_target(next_obs, agent.vae.sample(next_obs))
    assert torch.allclose(y, target_by_hand(agent, batch, candidates), atol=1e-5)
    assert not y.requires_grad


def targets(agent, batch):
    torch.manual_seed(3)
    return agent.target(batch)


def test_soft_min_1_is_clipped_double_q_and_0_the_larger_of_the_twins():
    torch.manual_seed(0)
    agent = continuous_agent(target_samples=1)
    batch = random_batch(agent, terminal=0.0)
    torch.manual_seed(3)
    next_obs = repeat(batch.next_obs, 1)
    next_action = agent.perturbation_target(next_obs, agent.vae.sample(next_obs))[:, 0]
    q = agent.critic_target(batch.next_obs, next_action)
    previous = None
    for soft_min in (0.0, 0.25, 0.75, 1.0):
        agent.args.soft_min = soft_min
        y = targets(agent, batch)
        if soft_min in (0, 1):
            next_q = q.min(0).values if soft_min else q.max(0).values
            assert torch.allclose(y, batch.reward + 0.99 * next_q, atol=1e-6)
        assert previous is None or (y < previous).all()
        previous = y


def test_changing_one_next_state_changes_only_its_own_target():
    torch.manual_seed(0)
    agent = continuous_agent(dim=2)
    batch = random_batch(agent, terminal=0.0)
    y = targets(agent, batch)
    for n in range(8):
        next_obs = batch.next_obs.clone()
        next_obs[n] += 1
        changed = targets(agent, batch._replace(next_obs=next_obs)) != y
        assert changed.nonzero().flatten().tolist() == [n]


def test_more_candidates_never_lower_the_target():
    torch.manual_seed(0)
    agent = continuous_agent()
    batch = random_batch(agent, 50, terminal=0.0)
    candidates, ys = torch.rand(50, 10, 1) * 2 - 1, []
    agent.vae.sample = lambda obs: candidates[:, : obs.shape[1]]
    for n in (1, 3, 10):
        agent.args.target_samples = n
        ys.append(agent.target(batch))
    ys[1:] = (y + 1e-6 for y in ys[1:])  # products of other sizes round otherwise
    assert (ys[0] <= ys[1]).all() and (ys[1] <= ys[2]).all() and (ys[0] < ys[2] - 1e-3).any()


@pytest.mark.parametrize("make", [discrete_agent, continuous_agent])
def test_a_terminal_transition_is_worth_its_reward(make):
    agent = make()
    batch = random_batch(agent, terminal=1.0)
    assert torch.equal(agent.target(batch), batch.reward)
    batch = batch._replace(terminal=torch.zeros(8))
    assert not torch.isclose(agent.target(batch), batch.reward).any()


LOSSES = {
    discrete_agent: ("critic_loss", "imitation_loss"),
    continuous_agent: ("vae_loss", "critic_loss", "actor_loss"),
}


@pytest.mark.parametrize("make", LOSSES)
def test_silent_broadcasting_is_an_error(make):
    agent = make()
    batch = random_batch(agent, 2)  # as many as critics: nothing else would notice
    for name in LOSSES[make]:
        getattr(agent, name)(batch)
        with pytest.raises(AssertionError):
            getattr(agent, name)(batch._replace(reward=batch.reward[:, None]))


# ---- Continuous: the VAE ----


def constant_encoder(agent, mean, log_std):
    for p in agent.vae.encoder.parameters():
        p.data.zero_()
    agent.vae.encoder.bias[-1].data[0, 0] = torch.tensor([*mean, *log_std])


def test_kl_and_reconstruction_equal_their_closed_forms():
    torch.manual_seed(0)
    agent = continuous_agent(dim=2)
    batch = random_batch(agent)
    mean, log_std = [0.5, -1.0, 0.0, 2.0], [0.1, -2.0, 0.0, 0.7]
    for m, ls in ((mean, log_std), ([0.0] * 4, [0.0] * 4)):
        constant_encoder(agent, m, ls)
        for p in agent.vae.decoder.parameters():
            p.data.zero_()
        agent.vae.decoder.bias[-1].data.fill_(0.3)
        loss, metrics = agent.vae_loss(batch)
        q = Normal(torch.tensor(m), torch.tensor(ls).exp())
        kl = kl_divergence(q, Normal(0.0, 1.0)).mean()
        reconstruction = ((batch.action - math.tanh(0.3)) ** 2).mean()
        assert metrics["kl"].item() == pytest.approx(kl.item(), abs=1e-5)
        assert metrics["reconstruction"].item() == pytest.approx(reconstruction.item(), abs=1e-6)
        assert loss.item() == pytest.approx((reconstruction + 0.5 * kl).item(), abs=1e-5)
    assert metrics["kl"].item() == 0  # of the standard normal, the last one


def test_z_is_clipped_when_acting_and_only_then():
    torch.manual_seed(0)
    agent = continuous_agent()
    drawn = []
    agent.vae.decode = lambda obs, z: drawn.append(z) or z[..., :1]
    agent.vae.sample(torch.zeros(500, 20, 3))
    acting = drawn.pop()
    assert acting.min() == -0.5 and acting.max() == 0.5  # 62% lie at the two ends
    assert (acting.abs() < 0.5).float().mean().item() == pytest.approx(0.383, abs=0.02)
    constant_encoder(agent, [0.0, 3.0], [0.0, -9.0])
    agent.vae_loss(random_batch(agent, 5000))
    z = drawn.pop()
    assert z[:, 0].std().item() == pytest.approx(1, abs=0.05) and z[:, 0].max() > 2
    assert z[:, 1].mean().item() == pytest.approx(3, abs=0.01)
    assert z[:, 1].std().item() == pytest.approx(math.exp(-4), abs=2e-3)  # the floor of sigma


def fit_vae(agent, draw, updates=1000, n=256):
    for _ in range(updates):
        obs = torch.rand(n, 3) * 2 - 1
        batch = Batch(obs, draw(obs), torch.zeros(n), obs, torch.zeros(n))
        loss, metrics = agent.vae_loss(batch)
        bcq.step(agent.vae_optimizer, loss)
    return metrics


def two_modes(distance):
    """Actions distance and -distance, 50:50 in every state, with a little noise."""

    def draw(obs):
        sign = torch.randint(2, (len(obs), 1)) * 2.0 - 1
        return (distance * sign + 0.03 * torch.randn(len(obs), 1)).clamp(-1, 1)

    return draw


def test_the_vae_covers_both_modes_and_hardly_the_gap_where_a_gaussian_acts():
    """The mean, which a Gaussian's deterministic policy plays, is 0: never in the data. Of its
    samples 38% lie in the middle; a decoder is continuous, so that of the VAE's some do too."""
    torch.manual_seed(0)
    agent = continuous_agent(vae_hidden=(64, 64), lr=3e-3)
    draw, obs = two_modes(0.8), torch.rand(10_000, 3) * 2 - 1
    fit_vae(agent, draw)
    with torch.no_grad():
        action = agent.vae.sample(obs)
    near = [((action - mode).abs() < 0.25).float().mean() for mode in (-0.8, 0.8)]
    assert min(near) > 0.35 and (action.abs() < 0.4).float().mean() < 0.15
    data = draw(obs)
    gaussian = data.mean() + data.std() * torch.randn_like(data)
    assert data.mean().abs() < 0.05 and (gaussian.abs() < 0.4).float().mean() > 0.35


@pytest.mark.parametrize(("distance", "seen"), [(0.2, False), (0.6, True)])
def test_the_vae_does_not_see_what_is_finer_than_a_third(distance, seen):
    """(6) is the evidence bound of a decoder with the standard deviation 1 / sqrt(8) = 0.35: up to
    there z carries nothing, and all candidates of a state are the data's mean action."""
    torch.manual_seed(0)
    agent = continuous_agent(vae_hidden=(64, 64), lr=3e-3)
    metrics = fit_vae(agent, two_modes(distance), updates=600)
    with torch.no_grad():
        spread = agent.vae.sample(torch.zeros(1000, 3)).std()
    assert (metrics["kl"] > 0.2) == (spread > 0.3) == seen
    assert (metrics["kl"] < 0.02) == (spread < 0.05) == (not seen)


# ---- Continuous: the perturbation and the policy ----


def test_the_perturbation_never_exceeds_phi_nor_the_bounds():
    torch.manual_seed(0)
    agent = continuous_agent(dim=2, phi=0.1)
    obs, action = 3 * torch.randn(50, 7, 3), torch.rand(50, 7, 2) * 2 - 1
    action[:10] = action[:10].sign()  # corners
    for scale in (1.0, 1e3):
        for p in agent.perturbation.parameters():
            p.data *= scale
        moved = agent.perturbation(obs, action)
        assert moved.shape == action.shape and moved.abs().max() <= 1
        distance = (moved - action).abs()
        assert distance.max() <= 0.1 + 1e-6
    assert (distance > 0.0999).float().mean() > 0.7  # now it always binds, but at the bounds


def test_phi_0_acts_only_with_samples_of_the_vae():
    torch.manual_seed(0)
    agent = continuous_agent(low=-2.0, high=3.0, phi=0.0, act_samples=5)
    trained(agent, random_batch(agent), 3)
    obs = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    torch.manual_seed(1)
    action = agent.act(obs)
    torch.manual_seed(1)
    with torch.no_grad():
        samples = agent.vae.sample(repeat(torch.tensor(obs), 5))[..., 0] * 2.5 + 0.5
    assert np.isclose(samples.numpy(), action, atol=1e-6).any(1).all()
    agent.args.act_samples = 1  # behaviour cloning by sampling
    torch.manual_seed(1)
    action = agent.act(obs)
    torch.manual_seed(1)
    with torch.no_grad():
        sample = agent.vae.sample(torch.tensor(obs)[:, None])[:, 0] * 2.5 + 0.5
    assert np.allclose(sample.numpy(), action, atol=1e-6)


def test_the_policy_is_the_best_candidate_by_the_first_critic():
    torch.manual_seed(0)
    agent = continuous_agent(act_samples=50)
    candidates, obs = torch.rand(20, 50, 1) * 2 - 1, torch.rand(20, 3) * 2 - 1
    agent.vae.sample = lambda obs: candidates
    agent.critic = Function(
        lambda obs, action: -((action - obs[..., :1]) ** 2).sum(-1),
        lambda obs, action: 10 * action.sum(-1),
    )
    moved = agent.perturbation(repeat(obs, 50), candidates)[..., 0]
    nearest = (moved - obs[:, :1]).abs().argmin(1)
    assert torch.equal(agent.policy(obs)[:, 0], moved[torch.arange(20), nearest])


def test_the_actor_climbs_the_first_critic_up_to_phi():
    for phi, expected in ((0.1, 0.1), (0.5, 0.3)):  # from 0 towards 0.3
        torch.manual_seed(0)
        agent = continuous_agent(phi=phi, lr=1e-2)
        agent.vae.sample = lambda obs: torch.zeros(*obs.shape[:-1], 1)
        agent.critic = Function(
            lambda obs, action: -((action - 0.3) ** 2).sum(-1),
            lambda obs, action: -action.sum(-1),
        )
        batch = random_batch(agent, 64)
        for _ in range(400):
            bcq.step(agent.actor_optimizer, agent.actor_loss(batch))
        moved = agent.perturbation(batch.obs, torch.zeros(64, 1))
        assert (moved - expected).abs().max() < 0.03


@pytest.mark.parametrize(("phi", "limit"), [(0.0, 0.25), (2.0, 0.9)])
def test_the_policy_stays_where_the_data_are(phi, limit):
    """A bandit whose reward is the action; the data have -0.8 to 0.2 only. The critic extrapolates
    that 1 is best: with phi 2 the policy goes there."""
    torch.manual_seed(0)
    agent = continuous_agent(phi=phi, lr=3e-3, act_samples=20)
    for _ in range(500):
        batch = random_batch(agent, 64, terminal=1.0)
        action = torch.rand(64, 1) - 0.8
        agent.update(batch._replace(action=action, reward=action[:, 0]))
    with torch.no_grad():
        action = agent.policy(torch.randn(500, 3))
    assert (action.max() < limit) if phi == 0 else (action.mean() > limit)


def test_the_update_is_the_official_one_bit_for_bit():
    """VAE, critics, perturbation, then both targets, written a second time."""
    torch.manual_seed(0)
    agent = continuous_agent(dim=2, phi=0.2, target_samples=4)
    args, vae = agent.args, agent.vae
    encoder, decoder, q, q_target, xi, xi_target = map(
        clone,
        (vae.encoder, vae.decoder, agent.critic, agent.critic_target, agent.perturbation,
         agent.perturbation_target),
    )  # fmt: skip
    vae_optimizer, q_optimizer, xi_optimizer = (
        torch.optim.Adam(weights, lr=args.lr, fused=True) for weights in (encoder + decoder, q, xi)
    )

    def decode(obs, z):
        return forward(decoder, torch.cat([obs, z], 1))[0].tanh()

    def perturb(weights, obs, action):
        direction = forward(weights, torch.cat([obs, action], 1))[0].tanh()
        return (action + 0.2 * direction).clamp(-1, 1)

    for seed in range(5):
        torch.manual_seed(seed)
        b = random_batch(agent)
        mean, log_std = forward(encoder, torch.cat([b.obs, b.action], 1))[0].chunk(2, 1)
        z = mean + log_std.exp() * torch.randn(8, 4)
        kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).mean()
        adam_step(vae_optimizer, ((decode(b.obs, z) - b.action) ** 2).mean() + 0.5 * kl)
        with torch.no_grad():
            next_obs = b.next_obs.repeat_interleave(4, 0)
            action = decode(next_obs, torch.randn(8, 4, 4).view(32, 4).clamp(-0.5, 0.5))
            action = perturb(xi_target, next_obs, action)
            q_1, q_2 = forward(q_target, torch.cat([next_obs, action], 1))[..., 0]
            next_q = 0.75 * torch.minimum(q_1, q_2) + 0.25 * torch.maximum(q_1, q_2)
            y = b.reward + 0.99 * (1 - b.terminal) * next_q.view(8, 4).max(1).values
        q_1, q_2 = forward(q, torch.cat([b.obs, b.action], 1))[..., 0]
        adam_step(q_optimizer, ((q_1 - y) ** 2).mean() + ((q_2 - y) ** 2).mean())
        with torch.no_grad():
            action = decode(b.obs, torch.randn(8, 4).clamp(-0.5, 0.5))
        action = perturb(xi, b.obs, action)
        adam_step(xi_optimizer, -forward(q, torch.cat([b.obs, action], 1))[0, :, 0].mean())
        lerp(q_target, q, args.polyak)
        lerp(xi_target, xi, args.polyak)
        torch.manual_seed(seed)
        agent.update(random_batch(agent))
    assert same(encoder, vae.encoder) and same(decoder, vae.decoder)
    assert same(q, agent.critic) and same(q_target, agent.critic_target)
    assert same(xi, agent.perturbation) and same(xi_target, agent.perturbation_target)


def test_targets_start_as_copies():
    agent = continuous_agent()
    assert same(agent.critic.parameters(), agent.critic_target)
    assert same(agent.perturbation.parameters(), agent.perturbation_target)
    agent = discrete_agent()
    assert same(agent.critic.parameters(), agent.critic_target)


def test_an_update_leaves_no_gradient_in_other_networks():
    agent = continuous_agent()
    batch = random_batch(agent)
    bcq.step(agent.actor_optimizer, agent.actor_loss(batch))
    assert all(p.grad is not None for p in agent.perturbation.parameters())
    others = [*agent.vae.parameters(), *agent.critic.parameters()]
    assert all(p.grad is None for p in others)
    (gradient,) = torch.autograd.grad(
        agent.actor_loss(batch), agent.vae.decoder.weight[0], allow_unused=True
    )
    assert gradient is None
    agent.update(batch)
    targets = [*agent.critic_target.parameters(), *agent.perturbation_target.parameters()]
    assert all(p.grad is None for p in targets)


def test_acting_stays_in_bounds_and_splits_large_batches():
    torch.manual_seed(0)
    agent = continuous_agent(low=-2.0, high=3.0, dim=2, act_samples=3)
    sizes, policy = [], agent.policy
    agent.policy = lambda obs: sizes.append(len(obs)) or policy(obs)
    action = agent.act(torch.randn(2500, 3).numpy())
    assert action.shape == (2500, 2) and action.min() >= -2 and action.max() <= 3
    assert sizes == [1000, 1000, 500]


def test_the_evaluation_is_reproducible_although_the_policy_samples():
    agent, make_env = continuous_agent(low=-2.0, high=2.0, act_samples=5), pendulum
    state = torch.get_rng_state()
    returns = [bcq.evaluate(agent, make_env, 2) for _ in range(2)]
    assert (returns[0] == returns[1]).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_continuous_policy_has_no_density_and_says_so():
    agent = continuous_agent()
    assert not agent.has_density
    with pytest.raises(bcq.UserError, match="no density"):
        agent.log_prob(np.zeros((1, 3)), np.zeros((1, 1)))


def test_the_spread_is_that_of_the_candidates_of_a_state():
    agent = continuous_agent(target_samples=2)
    agent.vae.sample = lambda obs: obs[..., :1] + torch.arange(obs.shape[1])[:, None] * 0.2
    metrics = agent.diagnose(random_batch(agent))
    assert metrics["spread"].item() == pytest.approx(0.1, abs=1e-5)
    for p in agent.perturbation.parameters():
        p.data.zero_()
    agent.perturbation.net.bias[-1].data.fill_(-math.atanh(0.5))
    assert agent.diagnose(random_batch(agent))["perturbation"].item() == pytest.approx(0.5)


# ---- Runs ----


@pytest.mark.parametrize(
    ("make", "flags", "name"),
    [
        (discrete_agent, {"threshold": 1.1}, "--threshold"),
        (discrete_agent, {"threshold": -0.1}, "--threshold"),
        (continuous_agent, {"phi": -0.1}, "--phi"),
        (continuous_agent, {"soft_min": 1.5}, "--soft-min"),
        (continuous_agent, {"target_samples": 0}, "--target-samples"),
        (continuous_agent, {"act_samples": 0}, "--act-samples"),
        (continuous_agent, {"vae_hidden": (8, 0)}, "--vae-hidden"),
    ],
)
def test_wrong_flags_are_one_clear_line(make, flags, name):
    with pytest.raises(bcq.UserError, match=name):
        make(**flags)


def pendulum():
    return gym.make("Pendulum-v1", disable_env_checker=True)


def store_dataset(env_id):
    """Four short episodes of random actions, stored where Minari looks."""
    env, episodes = gym.make(env_id, max_episode_steps=20), []
    for seed in range(4):
        obs, rows, ended = [env.reset(seed=seed)[0]], [], False
        env.action_space.seed(seed)
        while not ended:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((action, float(reward), terminated, truncated))
            obs.append(next_obs)
            ended = terminated or truncated
        columns = (np.array(column) for column in zip(*rows, strict=True))
        episodes.append(EpisodeBuffer(None, None, None, np.array(obs), *columns, {}))
    minari.create_dataset_from_buffers(
        "tests/small-v0",
        episodes,
        env=env,
        eval_env=env,
        description="for tests",
        algorithm_name="random",
        author="tests",
        author_email="",
        code_permalink="",
    )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_its_policy_loads(
    env_id, tmp_path, monkeypatch
):
    store_dataset(env_id)
    flags = {"dataset_id": ("tests/small-v0",), "steps": 6, "log_every": 2, "eval_every": 4}
    flags |= {"eval_episodes": 2, "hidden": (8,), "vae_hidden": (8,), "act_samples": 4}
    whole = bcq.main(Args(**flags, out_dir=str(tmp_path / "whole")))
    sample, calls = Data.sample, []

    def stop_at_5(data, n):
        calls.append(n)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sample(data, n)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Data, "sample", stop_at_5)
        bcq.main(Args(**flags, out_dir=str(tmp_path / "part")))
    (folder,) = (tmp_path / "part").iterdir()
    resumed = bcq.main(Args(resume=str(folder)))
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
    (whole_folder,) = (tmp_path / "whole").iterdir()
    for name in ("metrics.csv", "returns.csv"):
        assert (folder / name).read_text() == (whole_folder / name).read_text()
    agents = [bcq.load_policy(f) for f in (folder, whole_folder)]
    assert same(agents[0].parameters(), agents[1])
    obs, actions = np.random.default_rng(0).normal(size=(5, agents[0].units.obs_dim)), []
    for agent in agents:
        torch.manual_seed(0)
        actions.append(agent.act(obs))
    assert (actions[0] == actions[1]).all()


# ---- Learning on the built-in data, default flags ----
# Bounds: the project's goals. Over seeds 0 to 4, benchmarks/table.py gives what stands beside them.


@pytest.mark.parametrize(
    ("dataset", "bound"),
    [
        ("cartpole/mixed-v0", 475),  # 500 ± 0, the data 226
        ("cartpole/expert-v0", 475),  # 500 ± 0, the data 500
        ("cartpole/medium-v0", 146),  # 209 ± 7, the data 146
        ("pendulum/mixed-v0", -190),  # -159 ± 6, the data -578
        ("pendulum/expert-v0", -200),  # -137 ± 1, the data -143
    ],
)
def test_learns(dataset, bound, tmp_path):
    result = bcq.main(Args(dataset_id=(dataset,), out_dir=str(tmp_path), eval_every=0))
    assert result["return_mean"] >= bound
    assert "possible are" in result["health"]
