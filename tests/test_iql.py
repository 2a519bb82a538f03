"""The mathematics of iql.py against exact answers. Metrics, health line and online phase are
those of awac.py too and tested here for both. (test_agents.py has the policies.)"""

import difflib
import math
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
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

import awac
import bc
import iql
from iql import Batch

BOTH = [iql, awac]


def make_batch(s, a, r, next_s, terminal, states):
    one_hot = torch.eye(states, dtype=torch.float64)
    r, terminal = (torch.as_tensor(x, dtype=torch.float64) for x in (r, terminal))
    s, a, next_s = (torch.as_tensor(x) for x in (s, a, next_s))
    return Batch(one_hot[s], a, r, one_hot[next_s], terminal)


def tabular(batch, module=iql, actions=None, **flags):
    """An agent in float64 whose networks are tables (one-hot observations, no hidden layer)."""
    torch.manual_seed(0)
    obs_space = spaces.Box(0, 1, batch.obs.shape[1:])
    units = module.Units(obs_space, spaces.Discrete(actions or int(batch.action.max()) + 1))
    return module.Agent(units, module.Args(hidden=(), **flags)).double()


def critic_loss(agent, batch):
    extra = [agent.critic(batch.obs, batch.action)] if isinstance(agent, awac.Agent) else []
    return agent.critic_loss(batch, *extra)


def actor_loss(agent, batch, advantage):
    if isinstance(agent, iql.Agent):
        return agent.actor_loss(batch, advantage)
    agent.critic.value = lambda obs, pi: torch.zeros(len(obs))
    return agent.actor_loss(batch, agent.policy(batch.obs), torch.stack([advantage + 1, advantage]))


def solve(agent, batch, rounds):
    """The fixed point of (1), (3) and (4): exact minimisation of each loss in turn."""
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
    minimise(lambda: agent.value_loss(batch, q), agent.value_net.parameters(), 5)
    expected = tau * 0.4 / (tau * 0.4 + (1 - tau) * 0.6)
    assert agent.value(batch.obs).tolist() == pytest.approx([expected] * 5, abs=1e-6)


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
    """A better action that is not in the data is ignored."""
    _, counts, next_s, r = random_mdp()
    best, rows = best_values(counts > 0, next_s, r), np.array(list(values.values()))
    assert (np.diff(rows, axis=0) > -1e-4).all() and (rows <= best + 1e-4).all()
    assert (best - rows[0]).min() > 0.3 and rows[-1] == pytest.approx(best, abs=0.02)
    assert (best_values(counts >= 0, next_s, r) > best + 1).all()


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
    minimise(lambda: actor_loss(agent, batch, advantage), agent.policy.parameters(), 3)
    assert agent.policy(batch.obs[:1]).mode.item() == best


# ---- The critic ----


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("discrete", [False, True])
def test_the_value_of_a_terminal_transition_is_its_reward(module, discrete):
    batch = random_batch(discrete=discrete)._replace(terminal=torch.ones(16))
    agent = stir(small_agent(module, discrete))
    error = agent.critic(batch.obs, batch.action) - batch.reward
    expected = (error[0] ** 2).mean() + (error[1] ** 2).mean()
    assert critic_loss(agent, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_transition_that_is_not_terminal_bootstraps():
    batch = make_batch([0, 1], [0, 0], [1.0, 2.0], [1, 1], [0.0, 1.0], 2)
    agent = tabular(batch, gamma=0.9)
    solve(agent, batch, 4)
    assert agent.critic(batch.obs, batch.action)[0].tolist() == pytest.approx([2.8, 2.0], abs=1e-4)


def test_unseen_actions_are_never_asked_for():
    """Whatever Q says about the action that is not in the data: V, Q on the data and the policy are
    bitwise the same. (AWAC's critic does ask, weighted by the policy.)"""
    batch, weights = random_batch(discrete=True), []
    batch = batch._replace(action=batch.action % 2)
    for q_unseen in (0.0, 1e6):
        agent = small_agent(iql, True)
        for critic in (agent.critic, agent.critic_target):
            critic.net.bias[-1].data[:, 2] = q_unseen
        for _ in range(10):
            agent.update(batch)
        assert (agent.critic.net.bias[-1][:, 2] == q_unseen).all()
        kept = [*agent.value_net.parameters(), *agent.policy.parameters()]
        kept += [agent.critic(batch.obs, batch.action)]
        weights.append(torch.cat([p.detach().flatten() for p in kept]))
    assert torch.equal(*weights)


# ---- The actor ----


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_0_is_behaviour_cloning_bitwise(discrete):
    batch = random_batch(discrete=discrete)
    agent, cloner = small_agent(iql, discrete, beta=0.0), small_agent(bc, discrete)
    cloner.policy.load_state_dict(agent.policy.state_dict())
    losses = actor_loss(agent, batch, torch.randn(16) * 100), cloner.actor_loss(batch)
    assert torch.equal(*losses)
    gradients = [
        torch.autograd.grad(loss, [*a.policy.parameters()])
        for loss, a in zip(losses, (agent, cloner), strict=True)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("module", "flags"), [(iql, {"beta": 2.0}), (awac, {"lam": 0.5})])
def test_the_optimal_actor_is_proportional_to_count_times_weight(module, flags):
    s, a = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 2, 0, 2, 2])
    batch = make_batch(s, a, [0.0] * 7, s, [0.0] * 7, 2)
    advantage = torch.tensor([[0.5, -0.2, 0.1, 0], [0.3, 0, -0.4, 0]]).double()[s, a]
    agent = tabular(batch, module, actions=4, **flags)
    minimise(lambda: actor_loss(agent, batch, advantage), agent.policy.parameters(), 3)
    expected = torch.zeros(2, 4).double()
    expected.index_put_((s, a), (2 * advantage).exp(), accumulate=True)
    expected /= expected.sum(1, keepdim=True)
    pi = agent.policy(torch.eye(2).double())
    assert torch.allclose(pi.probs, expected, atol=1e-4)
    assert (pi.probs[expected == 0] < 1e-4).all()


@pytest.mark.parametrize(("module", "flags"), [(iql, {"beta": 2.0}), (awac, {"lam": 0.5})])
def test_weights_are_clipped_before_exp(module, flags):
    agent = small_agent(module, **flags)
    advantage = torch.tensor([-1e6, -1.0, 0.0, 1.0, 2.3, 2.31, 1e6])
    expected = [0.0, math.exp(-2), 1.0, math.exp(2), math.exp(4.6), 100.0, 100.0]
    assert agent.weights(advantage).tolist() == pytest.approx(expected, rel=1e-4)


# ---- The update ----


@pytest.mark.parametrize("discrete", [False, True])
def test_an_update_is_the_official_one(discrete, monkeypatch):
    """In the official order, written out once more: V, actor with the new V, Q with the new V,
    targets."""
    monkeypatch.setattr(iql, "step", plain_descent)
    batch = random_batch(discrete=discrete)
    flags = {"lr": 0.05, "polyak": 0.1, "beta": 2.0, "expectile": 0.8, "gamma": 0.9}
    theirs = stir(small_agent(iql, discrete, **flags))
    ours = deepcopy(theirs)
    metrics = ours.update(batch)

    q = theirs.critic_target(batch.obs, batch.action).detach().amin(0)
    u = q - theirs.value(batch.obs)
    value_loss = (torch.where(u > 0, 0.8, 0.2) * u * u).mean()
    descend(value_loss, theirs.value_net.parameters(), 0.05)
    w = torch.clamp(torch.exp(2 * (q - theirs.value(batch.obs).detach())), max=100)
    actor_loss = (-w * theirs.policy(batch.obs).log_prob(batch.action)).mean()
    descend(actor_loss, theirs.policy.parameters(), 0.05)
    y = batch.reward + 0.9 * theirs.value(batch.next_obs).detach() * (1 - batch.terminal)
    one, two = theirs.critic(batch.obs, batch.action)
    mse = torch.nn.functional.mse_loss
    critic_loss = mse(one, y) + mse(two, y)
    descend(critic_loss, theirs.critic.parameters(), 0.05)
    follow(theirs.critic_target, theirs.critic, 0.1)
    losses = {"value_loss": value_loss, "actor_loss": actor_loss, "critic_loss": critic_loss}
    close(metrics, losses)
    same_parameters(ours, theirs)


def test_no_loss_has_gradients_in_the_networks_of_another():
    batch, agent = random_batch(), small_agent(iql)
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


def test_the_actor_learning_rate_falls_along_a_cosine_and_goes_on_along_it_online():
    batch, agent = random_batch(), small_agent(iql, steps=10, lr=0.01, online_steps=5)
    for update in range(1, 16):
        agent.update(batch)
        expected = 0.01 * (1 + math.cos(math.pi * update / 10)) / 2
        assert agent.actor_optimizer.lr.item() == pytest.approx(expected, abs=1e-8)
        for optimizer in (agent.value_optimizer, agent.critic_optimizer):
            assert optimizer.lr.item() == pytest.approx(0.01)


# ---- What the run says: metrics and health, of both ----


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("module", BOTH)
def test_diagnose_measures_what_it_says(module, discrete):
    """IQL's Q is the target's, AWAC's the online one; V is the network's or of pi's own actions."""
    batch = random_batch(discrete=discrete)
    agent = stir(small_agent(module, discrete, **{"beta" if module is iql else "lam": 1.0}))
    torch.manual_seed(5)
    metrics = agent.diagnose(batch)
    torch.manual_seed(5)
    out = agent.policy.net(batch.obs)[0].detach()
    mode = out.argmax(1) if discrete else out.tanh()
    critic = agent.critic_target if module is iql else agent.critic
    q, q_policy = (torch.min(*critic(batch.obs, a).detach()) for a in (batch.action, mode))
    if module is iql:
        value = agent.value_net(batch.obs)[0, :, 0].detach()
    elif discrete:
        each = [torch.min(*critic(batch.obs, torch.full((16,), a))) for a in range(3)]
        value = (out.softmax(1) * torch.stack(each, 1)).sum(1).detach()
    else:
        sample = torch.normal(mode, agent.policy.log_std.exp().expand(16, 2))
        value = torch.min(*critic(batch.obs, sample.clamp(-1, 1))).detach()
    w = (q - value).exp()
    if discrete:
        nll = torch.nn.functional.cross_entropy(out, batch.action)
        distance = (mode != batch.action).float().mean()
    else:
        z = (mode - batch.action) / agent.policy.log_std.exp()
        nll = 0.5 * z**2 + agent.policy.log_std + 0.5 * math.log(2 * math.pi)
        nll = nll.sum(1).mean()
        distance = ((mode - batch.action) ** 2).mean().sqrt()
    expected = {"q_data": q.mean(), "q_policy": q_policy.mean(), "value": value.mean()}
    expected |= {"weight_ess": w.sum() ** 2 / (w**2).sum() / 16, "weight_clipped": 0}
    expected |= {"nll": nll, "action_distance": distance}
    expected |= {"advantage": (q - value).mean()} if "advantage" in metrics else {}
    close(metrics, expected, rel=1e-4)


@pytest.mark.parametrize("module", BOTH)
def test_weight_clipped_is_the_share_of_weights_at_the_clip(module):
    batch, agent = random_batch(), small_agent(module)
    weights = torch.tensor([100.0, 100.0, 99.0, 1.0, 0.0])
    agent.weights = lambda advantage: weights
    assert agent.diagnose(batch)["weight_clipped"].item() == pytest.approx(0.4)
    agent.weights = torch.zeros_like  # all of them underflow
    assert agent.diagnose(batch)["weight_ess"] == 0
    agent = small_agent(module)
    agent.weights(torch.full((16,), 1e3))  # float32 exp(log 100) need not be 100
    clipped = agent.weights(torch.full((16,), 1e3))
    assert (clipped > 0.999 * agent.max_weight).all() and agent.max_weight == 100


@pytest.mark.parametrize(("module", "less", "more"), [
    (iql, "Lower --beta.", "Raise --beta."), (awac, "Raise --lam.", "Lower --lam.")
])  # fmt: skip
def test_health_speaks_of_the_weights(module, less, more):
    """Limits: an effective sample of 2 and 99 %, a tenth of the weights clipped."""
    data = make_data(module, torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor([-1.0, 2.0]))
    args, q = module.Args(gamma=0.9), {"q_data": 0.5, "q_policy": 0.6}  # possible are -10 to 20
    for clipped, ess, end in (
        (0.0, 0.019, f"the policy copies few transitions. {less}"),
        (0.2, 0.019, f"the policy copies few transitions. {less}"),
        (0.0, 0.021, "effective sample 2.1%"),
        (0.09, 0.5, "9% of the weights clipped, effective sample 50.0%"),
        (0.11, 0.5, f"the clip hides which of them are best. {less}"),
        (0.0, 0.989, "effective sample 98.9%"),
        (0.0, 0.991, f"nearly behaviour cloning. {more}"),
    ):
        weights = {"weight_clipped": clipped, "weight_ess": ess}
        assert module.health(q | weights, data, args).endswith(end)
    high = "Lower --expectile or --lr." if module is iql else "Raise --lam or lower --lr."
    for q_policy, advice in ((21.0, f"extrapolates. {high}"), (-11.0, "pessimistic. Lower --lr.")):
        line = module.health(q | weights | {"q_policy": q_policy}, data, args)
        assert advice in line


def test_the_difference_between_iql_and_awac_is_small():
    texts = [Path(module.__file__).read_text().split('"""', 2)[2].splitlines() for module in BOTH]
    opcodes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    changed = sum(j - i + n - m for tag, i, j, m, n in opcodes if tag != "equal")
    assert changed <= 110


# ---- The online phase, of both ----


class Walk(gym.Env):
    """A line: the action moves along it; beyond 2 the episode ends, the time limit cuts it at 5."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, discrete=False):
        self.discrete = discrete
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-3, 3, (1,), np.float32)
        self.seeds, self.log = [], []

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
        reward = np.float32(1.0 - abs(self.x))  # as many environments have it
        self.log.append((before, action, reward, self.x, terminated, truncated))
        return np.array([self.x], np.float32), reward, terminated, truncated, {}


def online_run(module, tmp_path, env, **flags):
    """After its 10 offline updates, on 20 transitions, with units, reward scale and shift."""
    g, flags = np.random.default_rng(0), {"log_every": 8, "eval_every": 0, **flags}
    obs = torch.tensor(g.normal(size=(20, 1)), dtype=torch.float32)
    action = torch.arange(20) % 2 if env.discrete else torch.rand(20, 1) * 2 - 1
    data = make_data(module, obs, action, torch.rand(20), [12, 8], env.action_space)
    data.units.obs_mean += 0.5
    data.units.obs_std *= 2
    data.reward_scale, data.reward_shift, data.reference = 3.0, -0.25, None  # floats
    args = module.Args(steps=10, online_steps=40, hidden=(8,), batch_size=4, seed=70, **flags)
    args.eval_episodes, args.out_dir = 0, str(tmp_path)
    torch.manual_seed(0)
    run = module.Run(args, data, module.Agent(data.units, args), None)
    run.step, run.make_env = 10, lambda: env
    replay, run.make_env = module.Replay(run), None  # which evaluates nothing
    return run, replay


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("module", BOTH)
def test_new_transitions_join_the_data_in_the_same_units(module, discrete, tmp_path):
    env = Walk(discrete)
    run, replay = online_run(module, tmp_path, env)
    old = run.data.transitions
    module.finetune(run, replay)
    data = run.data
    assert len(env.log) == 40 and len(data.episode) == 60
    assert all(torch.equal(x[:20], y) for x, y in zip(data.transitions, old, strict=True))
    before, action, reward, after, terminated, truncated = map(np.array, zip(*env.log, strict=True))
    new = Batch(*(x[20:] for x in data.transitions))
    assert new.obs[:, 0].numpy() == pytest.approx((before - 0.5) / 2, abs=1e-5)
    assert new.next_obs[:, 0].numpy() == pytest.approx((after - 0.5) / 2, abs=1e-5)
    assert new.reward.numpy() == pytest.approx(3 * reward - 0.25, abs=1e-5)
    assert new.terminal.tolist() == terminated.tolist()  # and not where the time limit cuts
    assert (truncated & ~terminated).any() and terminated.any()
    assert new.action.numpy() == pytest.approx(action if discrete else action / 3, abs=1e-6)
    ended = terminated | truncated
    episode = 2 + np.concatenate([[0], ended.cumsum()[:-1]])
    assert data.episode[20:].tolist() == episode.tolist()
    assert env.seeds == [70 + k for k in range(episode.max() - 1)]
    assert np.unique(action).size == 2 if discrete else np.unique(action).size > 20  # sampled
    columns = zip(run.extra["online"], [*data.transitions, data.episode], strict=True)
    assert run.step == 50 and all(torch.equal(x, y[20:]) for x, y in columns)


@pytest.mark.parametrize("module", BOTH)
def test_one_update_per_step_from_data_and_new_transitions(module, tmp_path):
    env, seen, sizes = Walk(), [], []
    run, replay = online_run(module, tmp_path, env)

    def update(batch):
        seen.extend(batch.obs[:, 0].tolist())
        sizes.append((len(env.log), len(batch.obs)))
        return {}

    run.agent.update = update
    module.finetune(run, replay)
    assert sizes == [(n, 4) for n in range(1, 41)]
    obs = run.data.transitions.obs[:, 0].tolist()
    assert set(seen) <= set(obs)
    assert 40 < sum(x in set(obs[20:]) for x in seen) < 120  # of 160; about 40 % by the mean share


@pytest.mark.parametrize("module", BOTH)
def test_logs_and_evaluations_wait_for_the_end_of_an_episode(module, tmp_path, monkeypatch):
    env, evaluated = Walk(), []
    run, replay = online_run(module, tmp_path, env, eval_every=16)
    run.args.eval_episodes, run.make_env = 20, lambda: env
    monkeypatch.setattr(
        module, "evaluate", lambda policy, make_env, n: evaluated.append(n) or np.zeros(n)
    )
    module.finetune(run, replay)
    ended = [10 + i + 1 for i, row in enumerate(env.log) if row[4] or row[5]]
    logged, returns, last = [], [], 10
    for update in ended:
        if update // 8 > last // 8 and update < 50:
            returns += [2] if update // 16 > last // 16 else []
            logged.append(update)
            last = update
    assert [row["step"] for row in run.metrics] == [*logged, 50]
    assert evaluated == [*returns, 20] and returns
