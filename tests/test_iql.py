"""The mathematics of iql.py against exact answers. The online phase is the same in awac.py and is
tested here for both. (test_bc.py has the policies, test_awac.py learning on the built-in data.)"""

import difflib
import math
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_bc import make_data, minimise

import awac
import bc
import iql
from iql import Agent, Args, Batch

BOTH = [iql, awac]


def make_batch(s, a, r, next_s, terminal, states):
    one_hot = torch.eye(states, dtype=torch.float64)
    r, terminal = (torch.as_tensor(x, dtype=torch.float64) for x in (r, terminal))
    s, a, next_s = (torch.as_tensor(x) for x in (s, a, next_s))
    return Batch(one_hot[s], a, r, one_hot[next_s], terminal)


def tabular(batch, module=iql, actions=None, **flags):
    """An agent in float64 whose networks are tables (one-hot observations, no hidden layer)."""
    torch.manual_seed(0)
    space = spaces.Discrete(actions) if actions else None
    data = make_data(module, batch.obs, batch.action, batch.reward, action_space=space)
    return module.Agent(data, module.Args(hidden=(), **flags)).double()


def random_batch(n=16, discrete=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, n, 3, generator=g)
    action = torch.rand(n, 1, generator=g) * 2 - 1
    if discrete:
        action = torch.arange(n) % 3
    terminal = (torch.arange(n) % 4 == 0).float()
    return Batch(obs, action, torch.randn(n, generator=g), next_obs, terminal)


def small_agent(batch, module=iql, make_env=None, **flags):
    torch.manual_seed(0)
    data = make_data(module, batch.obs, batch.action, batch.reward)
    data.make_env = make_env
    return module.Agent(data, module.Args(hidden=(8,), **flags))


def critic_loss(agent, batch):
    return agent.critic_loss(batch, agent.critic(batch.obs, batch.action))


def actor_loss(agent, batch, advantage):
    return agent.actor_loss(batch, agent.policy(batch.obs), advantage)


def solve(agent, batch, rounds):
    """The fixed point of (1), (3) and (6): exact minimisation of each loss in turn."""
    for _ in range(rounds):
        with torch.no_grad():
            q = agent.critic_target(batch.obs, batch.action).min(0).values
        minimise(lambda q=q: agent.value_loss(batch, q), agent.value_net.parameters(), 2)
        minimise(lambda: critic_loss(agent, batch), agent.critic.parameters(), 1)
        agent.critic_target.load_state_dict(agent.critic.state_dict())


# ---- The value function ----


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_the_expectile_of_two_points(tau):
    """Q is 1 with probability p, else 0: V = tau p / (tau p + (1 - tau)(1 - p))."""
    batch = make_batch([0] * 5, [0] * 5, [0.0] * 5, [0] * 5, [1.0] * 5, 1)
    agent, q = tabular(batch, expectile=tau), torch.tensor([1.0, 0, 0, 1, 0]).double()
    minimise(lambda: agent.value_loss(batch, q), agent.value_net.parameters())
    expected = tau * 0.4 / (tau * 0.4 + (1 - tau) * 0.6)
    assert agent.value(batch.obs).tolist() == pytest.approx([expected] * 5, abs=1e-6)


def test_an_expectile_of_one_half_is_half_the_squared_error():
    batch = random_batch()
    agent, q = small_agent(batch, expectile=0.5), torch.randn(16)
    expected = 0.5 * ((q - agent.value(batch.obs)) ** 2).mean()
    assert agent.value_loss(batch, q).item() == pytest.approx(expected.item(), rel=1e-6)


def random_mdp():
    """4 states, 4 actions, deterministic; action 3 is never in the data and would be the best.
    Returns the data, the counts of the behaviour (S, A), the next states and the rewards."""
    rng = np.random.default_rng(3)
    next_s, r = rng.integers(4, size=(4, 4)), rng.normal(size=(4, 4))
    r[:, 3] = 5.0
    counts = rng.integers(1, 5, size=(4, 4))
    counts[:, 3] = 0
    counts[0, 1] = counts[2, 0] = 0
    s, a = counts.nonzero()
    s, a = (np.repeat(x, counts[counts > 0]) for x in (s, a))
    batch = make_batch(s, a, r[s, a], next_s[s, a], np.zeros(len(s)), 4)
    return batch, counts, next_s, r


def state_values(policy, next_s, r, gamma=0.5):
    """V of a policy (S, A), by a linear solve."""
    P = np.zeros((4, 4))
    for s, a in np.ndindex(4, 4):
        P[s, next_s[s, a]] += policy[s, a]
    return np.linalg.solve(np.eye(4) - gamma * P, (policy * r).sum(1))


def best_values(allowed, next_s, r, gamma=0.5):
    v = np.zeros(4)
    for _ in range(100):
        v = np.where(allowed, r + gamma * v[next_s], -np.inf).max(1)
    return v


@pytest.fixture(scope="module")
def values():
    """V of IQL in random_mdp for rising expectiles."""
    batch, *_ = random_mdp()
    found = {}
    for tau in (0.5, 0.7, 0.9, 0.9999):
        agent = tabular(batch, actions=4, expectile=tau, gamma=0.5)
        solve(agent, batch, 20)
        found[tau] = agent.value(torch.eye(4).double()).detach().numpy()
    return found


def test_with_expectile_one_half_v_is_the_value_of_the_behaviour(values):
    _, counts, next_s, r = random_mdp()
    exact = state_values(counts / counts.sum(1, keepdims=True), next_s, r)
    assert values[0.5] == pytest.approx(exact, abs=1e-3)


def test_v_rises_with_the_expectile_to_the_best_in_the_data_and_no_further(values):
    _, counts, next_s, r = random_mdp()
    best = best_values(counts > 0, next_s, r)
    rows = np.array(list(values.values()))
    assert (np.diff(rows, axis=0) > -1e-4).all() and (rows <= best + 1e-4).all()
    assert (best - rows[0]).min() > 0.3
    assert rows[-1] == pytest.approx(best, abs=0.02)


def test_a_better_action_that_is_not_in_the_data_is_ignored(values):
    _, counts, next_s, r = random_mdp()
    assert (best_values(counts >= 0, next_s, r) > values[0.9999] + 1).all()


def test_v_is_an_expectile_over_actions_and_q_a_mean_over_next_states():
    """State 0 has one action, leading to a prize of 10 or to nothing with equal probability: its
    value is gamma 5 for every expectile. An expectile of the target itself would be 9 gamma."""
    batch = make_batch([0, 0, 1, 2], [0] * 4, [0, 0, 10.0, 0], [1, 2, 1, 2], [0, 0, 1, 1], 3)
    agent = tabular(batch, expectile=0.9, gamma=0.9)
    solve(agent, batch, 5)
    assert agent.value(batch.obs)[0].item() == pytest.approx(4.5, abs=1e-3)


@pytest.mark.parametrize(("tau", "middle", "best"), [(0.5, 1, 1), (0.9, 5, 0), (0.9999, 10, 0)])
def test_improvement_of_more_than_one_step(tau, middle, best):
    """At the start, action 1 pays 3 and ends; action 0 leads to a middle where 9 of 10 transitions
    pay nothing and 1 pays 10. One step of improvement on the behaviour (tau = 0.5) takes the 3."""
    batch = make_batch(
        s=[0] * 2 + [1] * 10,
        a=[0, 1] + [0] * 9 + [1],
        r=[0, 3.0] + [0] * 9 + [10.0],
        next_s=[1] * 12,
        terminal=[0] + [1] * 11,
        states=2,
    )
    agent = tabular(batch, expectile=tau, gamma=1.0, beta=5.0)
    solve(agent, batch, 6)
    v = agent.value(batch.obs[[0, 2]]).tolist()
    assert v[1] == pytest.approx(middle, abs=0.02)
    q = agent.critic(batch.obs[:2], batch.action[:2])[0].tolist()
    assert q == pytest.approx([middle, 3], abs=0.02)
    with torch.no_grad():
        advantage = agent.critic(batch.obs, batch.action)[0] - agent.value(batch.obs)
    minimise(lambda: actor_loss(agent, batch, advantage), agent.policy.parameters())
    assert agent.policy(batch.obs[:1]).mode.item() == best


# ---- The critic ----


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("discrete", [False, True])
def test_the_value_of_a_terminal_transition_is_its_reward(module, discrete):
    batch = random_batch(discrete=discrete)
    batch = batch._replace(terminal=torch.ones(16))
    agent = small_agent(batch, module, lr=0.03)
    for _ in range(600):
        agent.update(batch)
    assert torch.allclose(
        agent.critic(batch.obs, batch.action), batch.reward.expand(2, 16), atol=0.2
    )
    before = agent.critic(batch.obs, batch.action) - batch.reward
    expected = (before[0] ** 2).mean() + (before[1] ** 2).mean()
    assert agent.update(batch)["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_transition_that_is_not_terminal_bootstraps():
    batch = make_batch([0, 1], [0, 0], [1.0, 2.0], [1, 1], [0.0, 1.0], 2)
    agent = tabular(batch, gamma=0.9)
    solve(agent, batch, 4)
    assert agent.critic(batch.obs, batch.action)[0].tolist() == pytest.approx([2.8, 2.0], abs=1e-4)


@pytest.mark.parametrize("module", BOTH)
def test_twin_critics_start_apart_and_their_targets_as_copies(module):
    for discrete in (False, True):
        batch = random_batch(discrete=discrete)
        agent = small_agent(batch, module)
        q = agent.critic(batch.obs, batch.action)
        assert q.shape == (2, 16) and not torch.allclose(q[0], q[1])
        assert torch.equal(q, agent.critic_target(batch.obs, batch.action))


def test_unseen_actions_are_never_asked_for():
    """Whatever Q says about the action that is not in the data: V, Q on the data and the policy are
    bitwise the same. (AWAC's critic does ask, weighted by the policy.)"""
    batch = random_batch(discrete=True)
    weights = []
    for q_unseen in (0.0, 1e6):
        torch.manual_seed(0)
        data = make_data(iql, batch.obs, batch.action, action_space=spaces.Discrete(4))
        agent = Agent(data, Args(hidden=(8,)))
        for critic in (agent.critic, agent.critic_target):
            critic.net.bias[-1].data[..., 3] = q_unseen
        for _ in range(10):
            agent.update(batch)
        assert (agent.critic.net.bias[-1][..., 3] == q_unseen).all()
        kept = [*agent.value_net.parameters(), *agent.policy.parameters()]
        kept += [agent.critic(batch.obs, batch.action)]
        weights.append(torch.cat([p.detach().flatten() for p in kept]))
    assert torch.equal(*weights)


# ---- The actor ----


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_0_is_behaviour_cloning_bitwise(discrete):
    batch = random_batch(discrete=discrete)
    agent, cloner = small_agent(batch, beta=0.0), small_agent(batch, bc, held_out=0)
    cloner.policy.load_state_dict(agent.policy.state_dict())
    loss = actor_loss(agent, batch, torch.randn(16) * 100)
    assert torch.equal(loss, cloner.actor_loss(batch))
    gradients = [
        torch.autograd.grad(x, [*a.policy.parameters()])
        for x, a in ((loss, agent), (cloner.actor_loss(batch), cloner))
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("module", "flags"), [(iql, {"beta": 2.0}), (awac, {"lam": 0.5})])
def test_the_optimal_actor_is_proportional_to_count_times_weight(module, flags):
    s, a = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 2, 0, 2, 2])
    batch = make_batch(s, a, [0.0] * 7, s, [0.0] * 7, 2)
    advantage = torch.tensor([[0.5, -0.2, 0.1, 0], [0.3, 0, -0.4, 0]]).double()[s, a]
    agent = tabular(batch, module, actions=4, **flags)
    minimise(lambda: actor_loss(agent, batch, advantage), agent.policy.parameters())
    expected = torch.zeros(2, 4).double()
    expected.index_put_((s, a), (2 * advantage).exp(), accumulate=True)
    expected /= expected.sum(1, keepdim=True)
    pi = agent.policy(torch.eye(2).double())
    assert torch.allclose(pi.probs, expected, atol=1e-4)
    assert (pi.probs[expected == 0] < 1e-4).all()


@pytest.mark.parametrize(("module", "flags"), [(iql, {"beta": 2.0}), (awac, {"lam": 0.5})])
def test_weights_are_clipped_before_exp(module, flags):
    agent = small_agent(random_batch(), module, **flags)
    advantage = torch.tensor([-1e6, -1.0, 0.0, 1.0, 2.3, 2.31, 1e6])
    w = agent.weights(advantage)
    expected = [0.0, math.exp(-2), 1.0, math.exp(2), math.exp(4.6), 100.0, 100.0]
    assert w.tolist() == pytest.approx(expected, rel=1e-4)


# ---- The update ----


def plain_descent(agent):
    """Adam's first step is only the gradient's sign, which would hide most mistakes."""
    lr, agent.schedule = agent.args.lr, None
    agent.actor_optimizer = torch.optim.SGD(agent.policy.parameters(), lr)
    agent.critic_optimizer = torch.optim.SGD(agent.critic.parameters(), lr)
    if hasattr(agent, "value_net"):
        agent.value_optimizer = torch.optim.SGD(agent.value_net.parameters(), lr)


def reference_update(agent, batch, args):
    """One update in the official order, written out once more: V, actor with the new V, Q with the
    new V, targets."""
    value_opt, actor_opt, critic_opt = (
        torch.optim.SGD(module.parameters(), lr=args.lr)
        for module in (agent.value_net, agent.policy, agent.critic)
    )

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    twin = agent.critic_target(batch.obs, batch.action).detach()
    q = torch.minimum(twin[0], twin[1])
    u = q - agent.value(batch.obs)
    weight = torch.where(u > 0, args.expectile, 1 - args.expectile)
    descend(value_opt, (weight * u * u).mean())
    w = torch.clamp(torch.exp(args.beta * (q - agent.value(batch.obs).detach())), max=100)
    descend(actor_opt, (-w * agent.policy(batch.obs).log_prob(batch.action)).mean())
    y = batch.reward + args.gamma * agent.value(batch.next_obs).detach() * (1 - batch.terminal)
    one, two = agent.critic(batch.obs, batch.action)
    mse = torch.nn.functional.mse_loss
    descend(critic_opt, mse(one, y) + mse(two, y))
    for target, source in zip(
        agent.critic_target.parameters(), agent.critic.parameters(), strict=True
    ):
        target.data = (1 - args.polyak) * target.data + args.polyak * source.data


@pytest.mark.parametrize("discrete", [False, True])
def test_an_update_is_the_official_one(discrete):
    batch = random_batch(discrete=discrete)
    flags = {"lr": 0.05, "polyak": 0.1, "beta": 2.0, "expectile": 0.8, "gamma": 0.9}
    ours, theirs = small_agent(batch, **flags), small_agent(batch, **flags)
    for agent in (ours, theirs):  # targets apart from the critics, or the wrong one goes unnoticed
        for p in agent.critic_target.parameters():
            p.data.mul_(0.5)
    plain_descent(ours)
    ours.update(batch)
    reference_update(theirs, batch, theirs.args)
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, other, atol=1e-6), name


def test_no_loss_has_gradients_in_the_networks_of_another():
    batch = random_batch()
    agent = small_agent(batch)
    q = agent.critic(batch.obs, batch.action).min(0).values.detach()
    networks = {"value": agent.value_net, "policy": agent.policy, "critic": agent.critic}
    losses = {
        "value": agent.value_loss(batch, q),
        "policy": actor_loss(agent, batch, q),
        "critic": critic_loss(agent, batch),
    }
    for own, loss in losses.items():
        for name, network in networks.items():
            parameters = list(network.parameters())
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            assert all((g is not None) == (name == own) for g in gradients), (own, name)


def test_the_actor_learning_rate_falls_along_a_cosine_unless_an_online_phase_follows():
    batch = random_batch()
    agent = small_agent(batch, steps=10, lr=0.01)
    for update in range(1, 11):
        agent.update(batch)
        expected = 0.01 * (1 + math.cos(math.pi * update / 10)) / 2
        assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)
        assert agent.value_optimizer.param_groups[0]["lr"] == 0.01
        assert agent.critic_optimizer.param_groups[0]["lr"] == 0.01
    agent = small_agent(batch, make_env=Walk, steps=10, lr=0.01, online_steps=5)
    for _ in range(10):
        agent.update(batch)
    assert agent.actor_optimizer.param_groups[0]["lr"] == 0.01


def test_silent_broadcasting_is_an_error():
    batch = random_batch(2)  # as many transitions as critics: the worst case
    agent, q = small_agent(batch), torch.zeros(2)
    wrong = batch._replace(reward=batch.reward[:, None])
    losses = (
        lambda: agent.value_loss(batch, q[:, None]),
        lambda: critic_loss(agent, wrong),
        lambda: actor_loss(agent, batch, q[:, None]),
    )
    for loss in losses:
        with pytest.raises(AssertionError):
            loss()


@pytest.mark.parametrize("flags", [{"expectile": 1.0}, {"expectile": 0.0}, {"beta": -1.0}])
def test_wrong_flags(flags):
    with pytest.raises(iql.UserError, match="--expectile must lie"):
        small_agent(random_batch(), **flags)


@pytest.mark.parametrize(
    ("clipped", "ess", "word"),
    [
        (0.01, 0.5, "effective sample 50.0%$"),
        (0.2, 0.5, "the clip hides which of them are best. Lower --beta"),
        (0.2, 0.01, "copies few transitions. Lower --beta"),
        (0, 1.0, "Raise --beta"),
    ],
)
def test_health_speaks_of_the_weights(clipped, ess, word):
    batch = random_batch()
    data = make_data(iql, batch.obs, batch.action, batch.reward)
    agent = Agent(data, Args(hidden=(8,)))
    metrics = {"q_data": 0.5, "q_policy": 0.6, "weight_clipped": clipped, "weight_ess": ess}
    assert re.search(word, agent.health(metrics, data))
    high = agent.health(metrics | {"q_policy": 1e4}, data)
    assert "exceeds every return possible" in high and "Lower --expectile" in high


@pytest.mark.parametrize("module", BOTH)
def test_diagnose_measures_what_it_says(module):
    batch = random_batch(discrete=True)
    agent = small_agent(batch, module, **({"beta": 1.0} if module is iql else {"lam": 1.0}))
    for p in agent.critic_target.parameters():
        p.data += 0.1 * torch.randn_like(p)
    metrics = {name: value.item() for name, value in agent.diagnose(batch).items()}
    pi = agent.policy(batch.obs)
    critic = agent.critic_target if module is iql else agent.critic
    q, q_policy = (critic(batch.obs, a).min(0).values for a in (batch.action, pi.probs.argmax(1)))
    actions = range(pi.probs.shape[1])
    if module is iql:
        value = agent.value_net(batch.obs)[0, :, 0]
    else:
        each = [critic(batch.obs, torch.full((16,), a)).min(0).values for a in actions]
        value = (pi.probs * torch.stack(each, 1)).sum(1)
    advantage = q - value
    w = advantage.exp()
    assert metrics["q_data"] == pytest.approx(q.mean().item(), rel=1e-5)
    assert metrics["q_policy"] == pytest.approx(q_policy.mean().item(), rel=1e-5)
    assert metrics["value"] == pytest.approx(value.mean().item(), rel=1e-5)
    differ = (pi.probs.argmax(1) != batch.action).float().mean().item()
    assert metrics["action_distance"] == pytest.approx(differ)
    assert metrics["advantage"] == pytest.approx(advantage.mean().item(), rel=1e-4)
    assert metrics["weight_ess"] == pytest.approx(
        (w.sum() ** 2 / (w**2).sum() / 16).item(), rel=1e-4
    )
    assert metrics["nll"] == pytest.approx(small_nll(agent, batch), rel=1e-5)
    agent.weights = torch.zeros_like  # all of them underflow
    assert agent.diagnose(batch)["weight_ess"] == 0
    del agent.weights
    agent.max_weight = w.median().item()
    assert agent.diagnose(batch)["weight_clipped"].item() == pytest.approx(9 / 16)


def small_nll(agent, batch):
    logits = agent.policy.net(batch.obs)[0]
    return torch.nn.functional.cross_entropy(logits, batch.action).item()


# ---- iql.py beside awac.py ----


def test_the_difference_between_iql_and_awac_is_small():
    texts = [Path(module.__file__).read_text().splitlines() for module in BOTH]
    opcodes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    changed = sum(j - i + n - m for tag, i, j, m, n in opcodes if tag != "equal")
    assert changed <= 150


# ---- The online phase, of both ----


class Walk(gym.Env):
    """A line: the action moves along it; beyond 2 the episode ends, the time limit cuts it at 5."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, discrete=False):
        self.discrete = discrete
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-3, 3, (1,), np.float32)
        self.seeds, self.log = [], []
        self.spec = None

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.x, self.t = self.np_random.uniform(-0.5, 0.5), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        before = self.x
        move = 0.8 * (2 * action - 1) if self.discrete else 0.4 * float(action[0])
        self.x, self.t = self.x + move, self.t + 1
        terminated, truncated = abs(self.x) > 2, self.t == 5
        self.log.append((before, action, 1.0 - abs(self.x), self.x, terminated, truncated))
        return np.array([self.x], np.float32), self.log[-1][2], terminated, truncated, {}


def walk_data(module, env):
    """20 transitions of one episode in env, with units, reward scale and shift of their own."""
    env.reset(seed=1)
    g = np.random.default_rng(0)
    obs = torch.tensor(g.normal(size=(20, 1)), dtype=torch.float32)
    action = torch.arange(20) % 2 if env.discrete else torch.rand(20, 1) * 2 - 1
    data = make_data(module, obs, action, torch.rand(20), [12, 8], env.action_space)
    data.units.obs_mean += 0.5
    data.units.obs_std *= 2
    data.reward_scale, data.reward_shift, data.make_env = 3.0, -0.25, lambda: env
    return data


def online_run(module, tmp_path, env, **flags):
    flags = {"steps": 10, "online_steps": 40, "log_every": 8, "eval_every": 0, **flags}
    torch.manual_seed(0)
    data = walk_data(module, env)
    args = module.Args(hidden=(8,), batch_size=4, eval_episodes=0, seed=70, **flags)
    agent = module.Agent(data, args)
    return module.Run(args, data, agent, tmp_path, 0.0, step=args.steps)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("module", BOTH)
def test_new_transitions_join_the_data_in_the_same_units(module, discrete, tmp_path):
    env = Walk(discrete)
    run = online_run(module, tmp_path, env)
    old, first = run.data.all, len(env.seeds)
    module.finetune(run)
    data = run.data
    assert len(env.log) == 40 and torch.equal(data.train, torch.arange(60))
    assert all(torch.equal(x[:20], y) for x, y in zip(data.all, old, strict=True))
    before, action, reward, after, terminated, truncated = map(np.array, zip(*env.log, strict=True))
    new = Batch(*(x[20:] for x in data.all))
    assert new.obs[:, 0].numpy() == pytest.approx((before - 0.5) / 2, abs=1e-5)
    assert new.next_obs[:, 0].numpy() == pytest.approx((after - 0.5) / 2, abs=1e-5)
    assert new.reward.numpy() == pytest.approx(3 * reward - 0.25, abs=1e-5)
    assert new.terminal.tolist() == terminated.tolist()  # and not where the time limit cuts
    assert (truncated & ~terminated).any() and terminated.any()
    expected = action if discrete else action / 3
    assert new.action.numpy() == pytest.approx(expected, abs=1e-6)
    ended = terminated | truncated
    episode = 2 + np.concatenate([[0], ended.cumsum()[:-1]])
    assert data.episode[20:].tolist() == episode.tolist()
    assert env.seeds[first:] == [70 + k for k in range(episode.max() - 1)]
    assert np.unique(action).size == 2 if discrete else np.unique(action).size > 20  # sampled
    assert run.step == 50 and len(run.agent.online.rows[0]) == 40


@pytest.mark.parametrize("module", BOTH)
def test_one_update_per_step_from_data_and_new_transitions(module, tmp_path):
    env = Walk()
    run = online_run(module, tmp_path, env)
    first = len(env.log)
    seen, sizes = [], []

    def update(batch):
        seen.extend(batch.obs[:, 0].tolist())
        sizes.append(len(env.log) - first)
        return {}

    run.agent.update = update
    module.finetune(run)
    assert sizes == list(range(1, 41))
    data, new = (set(x[:, 0].tolist()) for x in (run.data.all.obs[:20], run.data.all.obs[20:]))
    assert set(seen) <= data | new
    assert 40 < sum(x in new for x in seen) < 120  # of 160; about 40 % by the mean share


@pytest.mark.parametrize("module", BOTH)
def test_logs_and_evaluations_wait_for_the_end_of_an_episode(module, tmp_path, monkeypatch):
    env, logged = Walk(), []
    run = online_run(module, tmp_path, env, eval_every=16)

    def log(run, update, metrics, episodes, bar):
        logged.append((update, episodes))
        run.step = update

    run.args.eval_episodes = 20
    monkeypatch.setattr(module, "log", log)
    module.finetune(run)
    ended = [10 + i + 1 for i, row in enumerate(env.log) if row[4] or row[5]]
    expected, last = [], 10
    for update in ended:
        if update // 8 > last // 8 and update < 50:
            expected.append((update, 2 if update // 16 > last // 16 else 0))
            last = update
    assert logged == [*expected, (50, 20)] and any(n for _, n in expected)


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("dataset", ["cartpole/random-v0", "pendulum/mixed-v0"])
def test_a_resumed_online_phase_ends_bitwise_the_same(module, dataset, tmp_path, monkeypatch):
    flags = {"steps": 30, "log_every": 10, "eval_every": 20, "eval_episodes": 10, "hidden": (8,)}
    online = 420 if dataset.startswith("pendulum") else 100
    args = module.Args((dataset,), online_steps=online, out_dir=str(tmp_path), **flags)
    whole = module.main(args)
    update, calls = module.Agent.update, []

    def interrupted(agent, batch):
        calls.append(1)
        if len(calls) == 30 + online - 5:
            raise KeyboardInterrupt
        return update(agent, batch)

    monkeypatch.setattr(module.Agent, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main(args)
    monkeypatch.setattr(module.Agent, "update", update)
    one, two = sorted(tmp_path.iterdir())
    state = torch.load(two / "checkpoint.pt", weights_only=True)
    assert 30 < state["step"] < 30 + online - 5
    resumed = module.main(module.Args(resume=str(two)))
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    for name in ("metrics.csv", "returns.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (module.load_policy(folder).state_dict() for folder in (one, two))
    rows = first.pop("online._extra_state"), second.pop("online._extra_state")
    assert all(map(torch.equal, *rows)) and len(rows[0][0]) == online
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("module", BOTH)
def test_an_online_phase_without_environment_is_an_error_at_the_start(module):
    batch = random_batch()
    with pytest.raises(module.UserError, match="--env-id"):
        small_agent(batch, module, online_steps=5)
    with pytest.raises(module.UserError, match="at least 0"):
        small_agent(batch, module, online_steps=-1)
