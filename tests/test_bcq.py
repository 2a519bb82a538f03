"""The mathematics of bcq.py against exact answers. (test_agents.py has what all files share.)"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import OBS, adam, adam_step, clone, close, forward, lerp, make_data, same
from torch.distributions import Normal, kl_divergence

import bcq
from bcq import Agent, Args, Batch, DiscreteBCQ, Units

EYE_2, EYE_4 = torch.eye(2), torch.eye(4)


def discrete_agent(states=3, actions=2, **flags):
    """Tabular: one-hot observations, a linear Q and linear logits."""
    units = Units(spaces.Discrete(states), spaces.Discrete(actions))
    return Agent(units, Args(**{"hidden": ()} | flags))


def continuous_agent(dim=1, **flags):
    units = Units(OBS, spaces.Box(-1, 1, (dim,), np.float32))
    return Agent(units, Args(**{"hidden": (16,), "vae_hidden": (12,)} | flags))


def random_batch(agent, n=8, terminal=None):
    if isinstance(agent, DiscreteBCQ):
        obs_dim = agent.critic.net.weight[0].shape[2]
        action = torch.randint(agent.critic.net.weight[-1].shape[1], (n,))
    else:
        obs_dim, action = 3, torch.rand(n, agent.vae.latent_dim // 2) * 2 - 1
    obs, next_obs = torch.randn(2, n, obs_dim)
    terminal = torch.randint(2, (n,)).float() if terminal is None else torch.full((n,), terminal)
    return Batch(obs, action, torch.randn(n), next_obs, terminal)


def tabular_batch(states, *transitions):
    """Transitions (times, s, a, r, s') as one-hot observations; s' is None where the MDP ends."""
    rows = [t[1:] for t in transitions for _ in range(t[0])]
    s, a, r, next_s = zip(*rows, strict=True)
    terminal = torch.tensor([float(x is None) for x in next_s])
    eye, next_s = torch.eye(states), torch.tensor([x or 0 for x in next_s])
    return Batch(eye[list(s)], torch.tensor(a), torch.tensor(r), eye[next_s], terminal)


def trained(agent, batch):
    """After its --steps updates, along which the learning rate falls to 0."""
    for _ in range(agent.args.steps):
        agent.update(batch)
    return agent


def shaken(agent):
    """Target networks that are not their originals: whoever takes the wrong one is found out."""
    with torch.no_grad():
        for name, p in agent.named_parameters():
            if "target" in name:
                p += 0.3 * torch.randn_like(p)
    return agent


def table(net):
    """Q or the logits of every state (S, A) of a tabular agent."""
    with torch.no_grad():
        return net(torch.eye(net.net.weight[0].shape[2]))


def fill(net, values):
    """Makes a tabular net equal to `values` (S, A)."""
    net.net.weight[0].data[0] = torch.as_tensor(values, dtype=torch.float32).T
    net.net.bias[0].data.zero_()


def constant(net, *values):
    """Makes an MLP equal to `values` for all inputs."""
    for p in net.parameters():
        p.data.zero_()
    net.bias[-1].data[0, :, 0] = torch.tensor(values)


def decayed(optimizer, loss, lr, share):
    """A step, after which the learning rate is that of `share` of all steps along a cosine."""
    adam_step(optimizer, loss)
    optimizer.param_groups[0]["lr"].copy_(lr * (1 + (share * math.pi).cos()) / 2)


def repeat(obs, n):
    return obs[:, None].expand(-1, n, -1)


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
        fill(agent.classifier, [[math.log(0.5) + 7, math.log(0.3) + 7, math.log(0.2) + 7]])
        assert agent.allowed(torch.eye(1)).tolist() == [expected]


def test_threshold_1_allows_all_the_likeliest_actions_and_never_none():
    agent = discrete_agent(2, 3, threshold=1.0)
    fill(agent.classifier, [[2.0, -1.0, 2.0], [0.5, 0.5, 0.5]])
    assert agent.allowed(EYE_2).tolist() == [[True, False, True], [True, True, True]]
    fill(agent.critic, [[1.0, 9.0, 3.0], [-1.0, 4.0, 2.0]])
    assert agent.act(EYE_2).tolist() == agent.greedy(EYE_2).tolist() == [2, 1]


def test_threshold_0_allows_an_action_of_probability_0():
    agent = discrete_agent(1, 2, threshold=0.0)
    fill(agent.classifier, [[0.0, -1e30]])
    assert agent.allowed(torch.eye(1)).all()


@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.0])
def test_the_discrete_update_is_the_written_out_one_bit_for_bit(threshold):
    """Threshold 0 is double DQN, and 1 bootstraps from the mode of G whatever Q says."""
    torch.manual_seed(0)
    units = Units(OBS, spaces.Discrete(4))
    flags = {"gamma": 0.9, "lr": 3e-3, "polyak": 0.1, "steps": 8}
    agent = Agent(units, Args(threshold=threshold, hidden=(16, 16), **flags))
    q, q_target, g = map(clone, (shaken(agent).critic, agent.critic_target, agent.classifier))
    q_optimizer, g_optimizer = (adam(x, 3e-3) for x in (q, g))
    rows, forbidden = torch.arange(50), []
    for n in range(1, 6):
        batch = random_batch(agent, 50)._replace(reward=3 * torch.randn(50))  # beyond 1, Huber's
        with torch.no_grad():
            next_g = forward(g, batch.next_obs)[0].softmax(1)
            next_q = forward(q, batch.next_obs)[0]
            forbidden.append(next_g / next_g.max(1, keepdim=True).values < threshold)
            best = torch.where(forbidden[-1], -math.inf, next_q).argmax(1)
            next_q = forward(q_target, batch.next_obs)[0][rows, best]
            y = batch.reward + 0.9 * (1 - batch.terminal) * next_q
        error = forward(q, batch.obs)[0][rows, batch.action] - y
        critic_loss = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean()
        logits = forward(g, batch.obs)[0]
        nll = torch.nn.functional.cross_entropy(logits, batch.action)
        classifier_loss = nll + 0.01 * (logits**2).mean()
        decayed(q_optimizer, critic_loss, 3e-3, torch.tensor(n / 8))
        lerp(q_target, q, 0.1)
        decayed(g_optimizer, classifier_loss, 3e-3, torch.tensor(n / 8))
        close(agent.update(batch), {"critic_loss": critic_loss, "classifier_loss": classifier_loss})
    assert same(q, agent.critic) and same(q_target, agent.critic_target)
    assert same(g, agent.classifier)
    share = torch.stack(forbidden).float().mean()
    assert share == {0.0: 0, 1.0: 0.75}.get(threshold, share) and (threshold != 0.8 or share > 0.2)


# ---- Discrete: the fixed point, tabular ----

COUNTS = torch.tensor([[6, 3, 1], [1, 6, 3], [5, 1, 4], [1, 2, 7]])
NEXT = torch.tensor([[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]])
REWARD = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5], [-2.0, 1.0, 0.0], [1.5, 0.0, -1.0]])


def value_iteration(allowed, gamma):
    """V of the best policy that takes allowed actions (S, A) only."""
    v = torch.zeros(4)
    for _ in range(100):
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
        agent = discrete_agent(4, 3, threshold=threshold, gamma=0.6, lr=5e-2, polyak=0.5, steps=350)
        trained(agent, batch)
        allowed = ratio >= threshold
        assert torch.equal(agent.allowed(EYE_4), allowed)
        v = value_iteration(allowed, 0.6)
        assert torch.allclose(table(agent.critic), REWARD + 0.6 * v[NEXT], atol=5e-3)
        values.append(v)
    mode_kernel = EYE_4[NEXT[range(4), COUNTS.argmax(1)]]
    mode_reward = REWARD[range(4), COUNTS.argmax(1)]
    v_mode = torch.linalg.solve(EYE_4 - 0.6 * mode_kernel, mode_reward)
    assert torch.allclose(values[0], v_mode, atol=1e-5)
    for higher, lower in pairwise(values):  # more actions, no state is worse
        assert (lower >= higher).all() and (lower > higher).any()


def test_an_unseen_action_is_neither_chosen_nor_bootstrapped_from():
    torch.manual_seed(0)
    rows = [(5, s, a, 1.0, (s + a + 1) % 4) for s in range(4) for a in range(2)]
    batch = tabular_batch(4, *rows)
    agent = trained(discrete_agent(4, 3, threshold=0.1, lr=0.1, steps=100), batch)
    y = agent.target(batch)
    for net in (agent.critic, agent.critic_target):
        net.net.bias[0].data[0, 2] = 1e6
    assert (agent.act(EYE_4) < 2).all()
    assert torch.equal(agent.target(batch), y)
    assert agent.diagnose(batch)["q_policy"] < 100
    agent.args.threshold = 0  # without the constraint it is both
    assert (agent.act(EYE_4) == 2).all() and (agent.target(batch) > 1e5).all()


@pytest.mark.parametrize(("threshold", "start", "value"), [(0.3, 1, 3.0), (0.05, 0, 10.0)])
def test_a_rare_good_action_counts_only_above_the_threshold(threshold, start, value):
    """Y pays 3 at once; X leads to a state where the data take "bad" (0) in 90% and "good" (10) in
    10%: a ratio of 0.11."""
    torch.manual_seed(0)
    bad, good = (18, 1, 0, 0.0, None), (2, 1, 1, 10.0, None)
    batch = tabular_batch(2, (20, 0, 0, 0.0, 1), (20, 0, 1, 3.0, None), bad, good)
    flags = {"gamma": 0.999, "lr": 0.1, "polyak": 0.5, "steps": 400}
    agent = trained(discrete_agent(2, 2, threshold=threshold, **flags), batch)
    assert agent.act(EYE_2)[0] == start
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
    flags = {"gamma": 0.9, "lr": 5e-2, "polyak": 0.5, "steps": 600}
    agent = discrete_agent(16, 4, threshold=threshold, **flags)
    for net in (agent.critic, agent.critic_target):
        fill(net, torch.zeros(16, 4))
    trained(agent, tabular_batch(16, *rows))
    state, path, seen = 0, [0], {row[1:3] for row in rows}
    action = agent.act(torch.eye(16)).tolist()
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
    assert table(agent.critic)[0, 1].item() == pytest.approx(returns[0], abs=0.02)
    assert returns[0] > returns[1]


def test_without_the_constraint_the_grid_world_ends_off_the_data():
    torch.manual_seed(0)
    assert grid_world(threshold=0.0)[1][-1] != 15


# ---- Discrete: the classifier and the metrics ----


def test_on_deterministic_data_the_other_action_is_masked():
    """Where the data take only one of two actions, (5) is least at x (1 + e^x) = 2 / 0.01, with
    e^-x the other action's ratio: 0.02. The weight 0.5 of a public implementation leaves it 0.35:
    above the 0.3 of the paper. There nothing is masked, and BCQ is plain double DQN."""
    torch.manual_seed(0)
    agent = discrete_agent(1, 2, lr=0.1, steps=200)
    trained(agent, tabular_batch(1, (1, 0, 0, 0.0, None)))
    x = -table(agent.classifier).diff().item()
    assert x * (1 + math.exp(x)) == pytest.approx(2 / 0.01, rel=1e-2)
    assert agent.allowed(torch.eye(1)).tolist() == [[True, False]]
    assert math.exp(-1.0426) > 0.3 > math.exp(-x)
    assert 1.0426 * (1 + math.exp(1.0426)) == pytest.approx(2 / 0.5, rel=1e-3)


def test_discrete_metrics_by_hand():
    """Two states; in the second only the first of the actions and the last one are allowed, Q's
    best one is not."""
    agent = discrete_agent(2, 4, threshold=0.5)
    fill(agent.classifier, [[0.0, 0.0, 0.0, 0.0], [0.0, -9.0, -9.0, -0.1]])
    fill(agent.critic, [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 99.0, 8.0]])
    fill(agent.critic_target, torch.full((2, 4), -50.0))
    batch = tabular_batch(2, (3, 0, 1, 0.0, 1), (1, 0, 3, 0.0, 1), (1, 1, 1, 0.0, 0))
    p = torch.tensor([0.0, -9.0, -9.0, -0.1]).softmax(0)
    entropy = -(p * p.log()).sum().item()
    expected = {
        "q_data": (3 * 2 + 4 + 6) / 5,
        "q_policy": (4 * 4 + 8) / 5,
        "action_distance": 4 / 5,
        "masked": 0.5 / 5,
        "entropy": (4 * math.log(4) + entropy) / 5,
    }
    close(agent.diagnose(batch), expected)


# ---- Continuous: the target ----


def target_by_hand(agent, batch, candidates):
    """(8) one state and one candidate at a time."""
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
    """soft_min 1 is clipped double Q, 0 the larger of the twins."""
    torch.manual_seed(0)
    agent = shaken(continuous_agent(dim=2, soft_min=soft_min, target_samples=7, phi=0.3))
    batch = random_batch(agent)
    torch.manual_seed(1)
    y = agent.target(batch)
    torch.manual_seed(1)
    next_obs = repeat(batch.next_obs, 7)
    candidates = agent.perturbation_target(next_obs, agent.vae.sample(next_obs))
    assert torch.allclose(y, target_by_hand(agent, batch, candidates), atol=1e-5)


# ---- Continuous: the VAE ----


def test_the_sizes_of_the_networks():
    agent = continuous_agent(dim=3, hidden=(5,), vae_hidden=(7,))
    nets = agent.critic.net, agent.perturbation.net, agent.vae.encoder, agent.vae.decoder
    sizes = [[(w.shape[2], w.shape[1]) for w in net.weight] for net in nets]
    assert sizes[:2] == [[(6, 5), (5, 1)], [(6, 5), (5, 3)]]
    assert sizes[2:] == [[(6, 7), (7, 2 * 6)], [(3 + 6, 7), (7, 3)]]  # Z = 2 A, mean and std each


def test_kl_and_reconstruction_equal_their_closed_forms():
    torch.manual_seed(0)
    agent = continuous_agent(dim=2)
    batch = random_batch(agent)
    constant(agent.vae.decoder, 0.3, -0.6)
    expected = ((batch.action - torch.tensor([0.3, -0.6]).tanh()) ** 2).mean().item()
    for mean, log_std in (([0.5, -1.0, 0.0, 2.0], [0.1, -2.0, 0.0, 0.7]), ([0.0] * 4, [0.0] * 4)):
        constant(agent.vae.encoder, *mean, *log_std)
        reconstruction, kl = agent.vae_losses(batch)
        q = Normal(torch.tensor(mean), torch.tensor(log_std).exp())
        divergence = kl_divergence(q, Normal(0.0, 1.0)).mean().item()
        assert kl.item() == pytest.approx(divergence, abs=1e-5)
        assert reconstruction.item() == pytest.approx(expected, abs=1e-6)
    assert kl.item() == 0  # of the standard normal, the last one


def test_z_is_clipped_when_acting_and_only_then():
    torch.manual_seed(0)
    agent = continuous_agent()
    drawn = []
    agent.vae.decode = lambda obs, z: drawn.append(z) or z[..., :1]
    agent.vae.sample(torch.zeros(500, 20, 3))
    acting = drawn.pop()
    assert acting.shape == (500, 20, 2) and acting.min() == -0.5 and acting.max() == 0.5
    assert (acting.abs() < 0.5).float().mean().item() == pytest.approx(0.383, abs=0.02)
    constant(agent.vae.encoder, 0.0, 3.0, 0.0, -9.0)
    agent.vae_losses(random_batch(agent, 5000))
    z = drawn.pop()
    assert z[:, 0].std().item() == pytest.approx(1, abs=0.05) and z[:, 0].max() > 2
    assert z[:, 1].mean().item() == pytest.approx(3, abs=0.01)
    assert z[:, 1].std().item() == pytest.approx(math.exp(-4), abs=2e-3)  # the floor of sigma
    constant(agent.vae.encoder, 0.0, 3.0, 0.0, 99.0)
    kl = agent.vae_losses(random_batch(agent))[1].item()
    assert kl == pytest.approx((math.exp(30) + 9 - 31) / 4, rel=1e-3)  # its ceiling: finite


def fit_vae(agent, draw, updates=400, n=256):
    for _ in range(updates):
        obs = torch.rand(n, 3) * 2 - 1
        batch = Batch(obs, draw(obs), torch.zeros(n), obs, torch.zeros(n))
        reconstruction, kl = agent.vae_losses(batch)
        bcq.step(agent.vae_optimizer, reconstruction + 0.5 * kl)
    return kl


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
    kl = fit_vae(agent, two_modes(distance))
    with torch.no_grad():
        spread = agent.vae.sample(torch.zeros(1000, 3)).std()
    assert (kl > 0.2) == (spread > 0.3) == seen
    assert (kl < 0.02) == (spread < 0.05) == (not seen)


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


def test_act_is_the_best_of_its_own_candidates_by_the_first_critic():
    """Drawn anew each time, deterministic or not, for a thousand states at a time: as many as fit
    into memory."""
    agent = shaken(continuous_agent(dim=2, act_samples=9, phi=0.3))
    obs, expected = torch.randn(2500, 3), []
    torch.manual_seed(1)
    action = agent.act(obs)
    torch.manual_seed(1)
    for part in obs.split(1000):
        z = torch.randn(len(part), 9, 4).clamp(-0.5, 0.5)
        part = repeat(part, 9)
        candidates = agent.perturbation(part, agent.vae.decode(part, z))
        best = agent.critic(part, candidates)[0].argmax(1)
        expected.append(candidates[torch.arange(len(best)), best])
    assert torch.allclose(action, torch.cat(expected), atol=1e-5)
    for deterministic in (True, False):
        assert (agent.act(obs, deterministic) != action).any(1).float().mean() > 0.8


def test_the_actor_climbs_the_first_critic_up_to_phi():
    for phi, expected in ((0.1, 0.1), (0.5, 0.3)):  # from 0 towards 0.3
        torch.manual_seed(0)
        agent = continuous_agent(phi=phi, lr=3e-2)
        agent.vae.sample = lambda obs: torch.zeros(*obs.shape[:-1], 1)
        agent.critic = Function(
            lambda obs, action: -((action - 0.3) ** 2).sum(-1),
            lambda obs, action: -action.sum(-1),
        )
        batch = random_batch(agent, 64)
        for _ in range(150):
            bcq.step(agent.actor_optimizer, agent.actor_loss(batch))
        moved = agent.perturbation(batch.obs, torch.zeros(64, 1))
        assert (moved - expected).abs().max() < 0.03


@pytest.mark.parametrize(("phi", "limit"), [(0.0, 0.25), (2.0, 0.9)])
def test_the_policy_stays_where_the_data_are(phi, limit):
    """A bandit whose reward is the action; the data have -0.8 to 0.2 only. The critic extrapolates
    that 1 is best: with phi 2 the policy goes there."""
    torch.manual_seed(0)
    agent = continuous_agent(phi=phi, lr=1e-2, act_samples=20, target_samples=2)
    for _ in range(150):
        batch = random_batch(agent, 64, terminal=1.0)
        action = torch.rand(64, 1) - 0.8
        agent.update(batch._replace(action=action, reward=action[:, 0]))
    with torch.no_grad():
        action = agent.act(torch.randn(500, 3))
    assert (action.max() < limit) if phi == 0 else (action.mean() > limit)


def test_the_continuous_update_is_the_written_out_one_bit_for_bit():
    """VAE, critics, perturbation, then both targets, each with the networks just stepped."""
    torch.manual_seed(0)
    flags = {"phi": 0.2, "target_samples": 4, "soft_min": 0.6, "gamma": 0.9, "lr": 3e-3}
    agent = shaken(continuous_agent(dim=2, polyak=0.1, steps=8, **flags))
    vae = agent.vae
    encoder, decoder, q, q_target, xi, xi_target = map(
        clone,
        (vae.encoder, vae.decoder, agent.critic, agent.critic_target, agent.perturbation,
         agent.perturbation_target),
    )  # fmt: skip
    vae_optimizer, q_optimizer, xi_optimizer = (
        adam(weights, 3e-3) for weights in (encoder + decoder, q, xi)
    )

    def decode(obs, z):
        return forward(decoder, torch.cat([obs, z], 1))[0].tanh()

    def perturb(weights, obs, action):
        direction = forward(weights, torch.cat([obs, action], 1))[0].tanh()
        return (action + 0.2 * direction).clamp(-1, 1)

    for n in range(1, 6):
        share = torch.tensor(n / 8)
        torch.manual_seed(n)
        b = random_batch(agent)
        mean, log_std = forward(encoder, torch.cat([b.obs, b.action], 1))[0].chunk(2, 1)
        z = mean + log_std.exp() * torch.randn_like(mean)
        kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).mean()
        reconstruction = ((decode(b.obs, z) - b.action) ** 2).mean()
        decayed(vae_optimizer, reconstruction + 0.5 * kl, 3e-3, share)
        with torch.no_grad():
            next_obs = b.next_obs.repeat_interleave(4, 0)
            action = decode(next_obs, torch.randn(8, 4, 4).view(32, 4).clamp(-0.5, 0.5))
            action = perturb(xi_target, next_obs, action)
            q_1, q_2 = forward(q_target, torch.cat([next_obs, action], 1))[..., 0]
            next_q = 0.6 * torch.minimum(q_1, q_2) + 0.4 * torch.maximum(q_1, q_2)
            y = b.reward + 0.9 * (1 - b.terminal) * next_q.view(8, 4).max(1).values
        q_1, q_2 = forward(q, torch.cat([b.obs, b.action], 1))[..., 0]
        critic_loss = ((q_1 - y) ** 2).mean() + ((q_2 - y) ** 2).mean()
        decayed(q_optimizer, critic_loss, 3e-3, share)
        with torch.no_grad():
            action = decode(b.obs, torch.randn(8, 4).clamp(-0.5, 0.5))
        action = perturb(xi, b.obs, action)
        actor_loss = -forward(q, torch.cat([b.obs, action], 1))[0, :, 0].mean()
        decayed(xi_optimizer, actor_loss, 3e-3, share)
        lerp(q_target, q, 0.1)
        lerp(xi_target, xi, 0.1)
        torch.manual_seed(n)
        expected = {"reconstruction": reconstruction, "kl": kl}
        expected |= {"critic_loss": critic_loss, "actor_loss": actor_loss}
        close(agent.update(random_batch(agent)), expected)
    assert same(encoder, vae.encoder) and same(decoder, vae.decoder)
    assert same(q, agent.critic) and same(q_target, agent.critic_target)
    assert same(xi, agent.perturbation) and same(xi_target, agent.perturbation_target)


def test_the_actors_step_moves_the_perturbation_alone():
    agent = continuous_agent()
    networks = agent.vae, agent.critic, agent.critic_target, agent.perturbation_target
    before, batch = [clone(x) for x in networks], random_batch(agent)
    start = clone(agent.perturbation)
    bcq.step(agent.actor_optimizer, agent.actor_loss(batch))
    assert not same(start, agent.perturbation)
    assert all(map(same, before, networks))
    (gradient,) = torch.autograd.grad(
        agent.actor_loss(batch), agent.vae.decoder.weight[0], allow_unused=True
    )
    assert gradient is None


def test_continuous_metrics_by_hand():
    """Candidates s_1 and s_1 + 0.2 in turns, pushed down by tanh(-0.5) phi; Q_1 likes the larger
    one. Where s_1 is at the bound nothing can push it. `spread` draws ten, whatever the flags."""
    agent = continuous_agent(target_samples=2, act_samples=2, phi=0.1)
    agent.vae.sample = lambda obs: obs[..., :1] + torch.arange(obs.shape[1])[:, None] % 2 * 0.2
    constant(agent.perturbation.net, -0.5)
    constant(agent.perturbation_target.net, 9.0)
    agent.critic = Function(
        lambda obs, action: 2 * action.sum(-1) + obs[..., 1],
        lambda obs, action: -2 * action.sum(-1) - obs[..., 1],  # now smaller, now larger
    )
    agent.critic_target = Function(*2 * [lambda obs, action: 0 * obs[..., 0] - 50])
    batch = random_batch(agent)._replace(obs=torch.rand(8, 3) - 0.5)
    batch.obs[:4, 0] = -1
    action, move = batch.obs[:, :1] + 0.2 - 0.1 * math.tanh(0.5), 0.1 * math.tanh(0.5)
    expected = {
        "q_data": (2 * batch.action[:, 0] + batch.obs[:, 1]).mean().item(),
        "q_policy": (2 * action[:, 0] + batch.obs[:, 1]).mean().item(),
        "action_distance": ((action - batch.action) ** 2).mean().sqrt().item(),
        "spread": 0.1 * (10 / 9) ** 0.5,
        "perturbation": 0.75 * move,
    }
    close(agent.diagnose(batch), expected)


# ---- Health ----


@pytest.mark.parametrize(
    ("action", "too_high", "too_low"),
    [
        (torch.arange(4) % 2, "Raise --threshold.", "Lower --threshold."),
        (
            torch.zeros(4, 1),
            "Lower --phi or raise --soft-min.",
            "Raise --phi or lower --soft-min.",
        ),
    ],
    ids=["discrete", "box"],
)
def test_health_says_what_makes_q_fall_or_rise(action, too_high, too_low):
    """Possible are -10 to 20."""
    data = make_data(bcq, torch.zeros(4, 3), action, torch.tensor([-1.0, 0.5, 0.0, 2.0]))
    sane = {"q_data": -9.9, "q_policy": 19.9}
    assert bcq.health(sane, data, Args(gamma=0.9)).endswith("possible are -10 to 20")
    for name in sane:
        for value, advice in ((20.4, too_high), (-10.4, too_low)):
            assert bcq.health(sane | {name: value}, data, Args(gamma=0.9)).endswith(advice)


def test_the_defaults():
    args = Args()
    assert (args.soft_min, args.target_samples, args.act_samples) == (0.75, 10, 100)  # the paper's
    assert (args.threshold, args.phi) == (0.5, 0.2)  # our own
