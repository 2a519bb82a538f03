"""The mathematics of bc.py against exact answers, then learning on the built-in data. The policies
and what the trained agent offers are the same in iql.py and awac.py and tested here for all."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Normal

import awac
import bc
import iql

FAMILY = [bc, iql, awac]
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.float32([-2, 0]), np.float32([2, 3]), dtype=np.float32)
DISCRETE = spaces.Discrete(3, start=1)


def make_data(module, obs, action, reward=None, lengths=None, action_space=None):
    """A Data of these transitions; without lengths, one episode."""
    n = len(action)
    discrete = action.dim() == 1
    default = spaces.Discrete(int(action.max()) + 1) if discrete else spaces.Box(-1, 1, (1,))
    obs_space = spaces.Box(-np.inf, np.inf, obs.shape[1:], np.float32)
    reward = torch.zeros(n) if reward is None else reward
    lengths = torch.tensor(lengths or [n])
    return module.Data(
        module.Units(obs_space, action_space or default),
        module.Batch(obs, action, reward, obs.roll(-1, 0), torch.zeros(n)),
        episode=torch.arange(len(lengths)).repeat_interleave(lengths),
        train=torch.arange(n),
        returns=np.array([r.sum().item() for r in reward.split(lengths.tolist())]),
    )


def minimise(loss, parameters, steps=20):
    """The exact minimum of a smooth convex loss."""
    parameters = list(parameters)
    optimizer = torch.optim.LBFGS(
        parameters,
        1,
        100,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward(inputs=parameters)
        return value

    for _ in range(steps):
        optimizer.step(closure)


def double(batch):
    return type(batch)(*(x.double() if x.is_floating_point() else x for x in batch))


def tabular_bc(action, states):
    data = make_data(bc, torch.eye(int(states.max()) + 1)[states], action)
    return bc.Agent(data, bc.Args(hidden=(), held_out=0)).double(), double(data.all)


# ---- The loss ----


def test_the_discrete_optimum_is_the_empirical_frequency():
    states = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    action = torch.tensor([0, 1, 1, 2, 0, 0, 0, 1, 2])
    agent, batch = tabular_bc(action, states)
    minimise(lambda: agent.actor_loss(batch), agent.policy.parameters())
    probabilities = agent.policy(torch.eye(2).double()).probs
    expected = torch.tensor([[1, 2, 1], [0, 0, 0]]) / 4 + torch.tensor([[0] * 3, [3, 1, 1]]) / 5
    assert torch.allclose(probabilities, expected.double(), atol=1e-6)


def test_the_box_optimum_is_the_conditional_mean_and_the_pooled_deviation():
    states = torch.tensor([0, 0, 0, 1, 1])
    action = torch.tensor([[-0.4], [0.0], [0.1], [0.3], [0.7]])
    agent, batch = tabular_bc(action, states)
    minimise(lambda: agent.actor_loss(batch), agent.policy.parameters())
    pi = agent.policy(torch.eye(2).double())
    assert torch.allclose(pi.mean, torch.tensor([[-0.1], [0.5]]).double(), atol=1e-6)
    residual = batch.action[:, 0] - torch.tensor([-0.1, -0.1, -0.1, 0.5, 0.5])
    expected = (residual**2).mean().sqrt()
    assert pi.stddev.tolist() == pytest.approx(np.full((2, 1), expected), abs=1e-6)


def test_the_loss_is_the_hand_computed_likelihood():
    torch.manual_seed(0)
    obs, action = torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    data = make_data(bc, obs, action, action_space=BOX)
    agent = bc.Agent(data, bc.Args(hidden=(8,)))
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([-1.0, 0.5]))
    total = 0.0
    for s, a in zip(obs, action, strict=True):
        mean = agent.policy.net(s[None])[0, 0].tanh()
        for mu, log_std, x in zip(mean.tolist(), (-1.0, 0.5), a.tolist(), strict=True):
            total += (
                0.5 * ((x - mu) / math.exp(log_std)) ** 2 + log_std + 0.5 * math.log(2 * math.pi)
            )
    assert agent.actor_loss(data.all).item() == pytest.approx(total / 5, rel=1e-5)
    obs, action = torch.randn(5, 3), torch.randint(3, (5,))
    data = make_data(bc, obs, action, action_space=DISCRETE)
    agent = bc.Agent(data, bc.Args(hidden=(8,)))
    expected = torch.nn.functional.cross_entropy(agent.policy.net(obs)[0], action)
    assert agent.actor_loss(data.all).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("action", [torch.rand(40, 1) * 2 - 1, torch.arange(40) % 2])
def test_rewards_are_not_read(action):
    torch.manual_seed(0)
    obs, reward = torch.randn(40, 3), torch.randn(40)
    weights = []
    for order in (torch.arange(40), torch.randperm(40)):
        data = make_data(bc, obs, action, reward[order], lengths=[10] * 4)
        torch.manual_seed(1)
        agent = bc.Agent(data, bc.Args(hidden=(8,), batch_size=16))
        for _ in range(20):
            agent.update(data.sample(16))
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]))
    assert torch.equal(*weights)


def test_silent_broadcasting_is_an_error():
    data = make_data(bc, torch.randn(8, 3), torch.rand(8, 1))
    agent = bc.Agent(data, bc.Args(hidden=(8,)))
    with pytest.raises(AssertionError):
        agent.actor_loss(data.all._replace(reward=torch.zeros(8, 1)))


# ---- Which episodes ----


def episodes_of(data, index):
    return set(data.episode[index].tolist())


def ten_episodes(lengths):
    """Episodes of the returns 0, 10, 20, ... in mixed order, and of these lengths."""
    order = torch.tensor([3, 7, 1, 9, 0, 5, 2, 8, 6, 4])
    parts = [torch.full((n,), 10.0 * r / n) for n, r in zip(lengths, order.tolist(), strict=True)]
    n = sum(lengths)
    return make_data(
        bc, torch.arange(n)[:, None].float(), torch.arange(n) % 2, torch.cat(parts), lengths
    )


def test_without_fraction_and_split_every_transition_is_there_once():
    data = ten_episodes([4] * 10)
    bc.Agent(data, bc.Args(hidden=(), held_out=0))
    assert torch.equal(data.train, torch.arange(40))


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.1, 1), (0.11, 2), (0.3, 3), (0.55, 6), (1.0, 10)]
)
def test_top_fraction_keeps_the_best_episodes(fraction, kept):
    data = ten_episodes([4] * 10)
    agent = bc.Agent(data, bc.Args(hidden=(), held_out=0, top_fraction=fraction))
    chosen = episodes_of(data, data.train)
    dropped = set(range(10)) - chosen
    assert len(chosen) == kept and len(data.train) == 4 * kept
    assert not dropped or data.returns[list(chosen)].min() >= data.returns[list(dropped)].max()
    assert sorted(agent.kept_returns) == sorted(data.returns[list(chosen)])


def test_top_fraction_counts_transitions_not_episodes():
    lengths = [1, 1, 1, 51, 1, 1, 1, 41, 1, 1]  # the two best, of 9 and 8, are the long ones
    data = ten_episodes(lengths)
    bc.Agent(data, bc.Args(hidden=(), held_out=0, top_fraction=0.5))
    assert episodes_of(data, data.train) == {3}
    data = ten_episodes(lengths)
    bc.Agent(data, bc.Args(hidden=(), held_out=0, top_fraction=0.52))
    assert episodes_of(data, data.train) == {3, 7}


def test_episodes_are_held_out_whole_and_are_among_the_best():
    data = ten_episodes([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    agent = bc.Agent(data, bc.Args(hidden=(), held_out=0.3, top_fraction=0.9))
    held_out = set(agent.held_out.obs[:, 0].long().tolist())  # obs are the indices
    train = set(data.train.tolist())
    assert held_out and train and not held_out & train
    assert not episodes_of(data, list(held_out)) & episodes_of(data, list(train))
    every = held_out | train
    assert len(every) == sum(
        (data.episode == e).sum().item() for e in episodes_of(data, list(every))
    )
    best = np.argsort(-data.returns)[: len(episodes_of(data, list(every)))]
    assert episodes_of(data, list(every)) == set(best.tolist())


def test_the_split_depends_on_the_seed_alone():
    splits = []
    for seed in (0, 0, 1):
        data = ten_episodes([4] * 10)
        torch.rand(len(splits))  # torch's random state does not matter
        bc.Agent(data, bc.Args(hidden=(), held_out=0.3, seed=seed))
        splits.append(data.train.tolist())
    assert splits[0] == splits[1] != splits[2]


def test_one_episode_is_not_held_out():
    data = make_data(bc, torch.randn(8, 3), torch.rand(8, 1))
    agent = bc.Agent(data, bc.Args(hidden=(8,), held_out=0.5))
    assert len(data.train) == 8 and "held_out_nll" not in agent.diagnose(data.all)
    assert "held out" not in agent.health({"nll": 1.0}, data)


def test_held_out_nll_shows_what_is_learnt_by_heart():
    """Random actions: nothing can be learnt about those of other episodes."""
    torch.manual_seed(0)
    data = make_data(bc, torch.randn(40, 3), torch.randint(2, (40,)), lengths=[10] * 4)
    agent = bc.Agent(data, bc.Args(hidden=(64,), lr=1e-2, held_out=0.25))
    batch = data.batch(data.train)
    for _ in range(300):
        agent.update(batch)
    metrics = {name: value.item() for name, value in agent.diagnose(batch).items()}
    assert metrics["nll"] < 0.1 and metrics["held_out_nll"] > math.log(2)
    assert "learns the data by heart" in agent.health(metrics, data)
    assert "by heart" not in agent.health({"nll": 0.5, "held_out_nll": 0.6}, data)


@pytest.mark.parametrize("flags", [{"top_fraction": 0.0}, {"top_fraction": 1.1}, {"held_out": 1.0}])
def test_wrong_flags(flags):
    with pytest.raises(bc.UserError, match="must lie in"):
        bc.Agent(ten_episodes([4] * 10), bc.Args(**flags))


# ---- The policies and the trained agent: bc, iql, awac ----


def fresh_agent(module, action_space):
    torch.manual_seed(0)
    agent = module.Agent(module.Data(module.Units(OBS, action_space)), module.Args(hidden=(8,)))
    if action_space is BOX:
        with torch.no_grad():
            agent.policy.log_std.copy_(torch.tensor([-0.5, 0.3]))
    return agent


@pytest.mark.parametrize("module", FAMILY)
def test_box_log_prob_is_a_density_in_environment_units(module):
    agent = fresh_agent(module, BOX)
    obs = torch.randn(4, 3)
    mean = agent.policy.net(obs)[0].tanh().detach()
    low, high = torch.tensor(BOX.low), torch.tensor(BOX.high)
    half = (high - low) / 2
    by_hand = Normal((low + high) / 2 + mean * half, torch.tensor([-0.5, 0.3]).exp() * half)
    action = torch.tensor([[-1.9, 0.1], [0.0, 0.5], [2.0, 3.0], [1.2, 0.9]])
    expected = by_hand.log_prob(action).sum(1)
    assert torch.allclose(agent.log_prob(obs.numpy(), action.numpy()), expected, atol=1e-5)
    assert agent.has_density


@pytest.mark.parametrize("module", FAMILY)
def test_box_actions_are_the_mean_or_clipped_samples_in_environment_units(module):
    agent = fresh_agent(module, BOX)
    obs = torch.randn(1, 3)
    mean = agent.policy.net(obs)[0].tanh().detach().numpy()
    expected = BOX.low + (mean + 1) / 2 * (BOX.high - BOX.low)
    assert agent.act(obs.numpy()) == pytest.approx(expected, abs=1e-5)
    samples = agent.act(obs.expand(20_000, 3).numpy(), deterministic=False)
    assert samples.shape == (20_000, 2) and samples.std(0).min() > 0.1
    assert (samples >= BOX.low).all() and (samples <= BOX.high).all()
    assert (samples == BOX.low).any(0).all() and (samples == BOX.high).any(0).all()
    assert np.median(samples, 0) == pytest.approx(expected[0], abs=0.05)


@pytest.mark.parametrize("module", FAMILY)
def test_discrete_probabilities_log_probs_and_actions_agree(module):
    agent = fresh_agent(module, DISCRETE)
    obs = torch.randn(4, 3)
    p = agent.probabilities(obs.numpy())
    assert torch.allclose(p, agent.policy.net(obs)[0].softmax(1), atol=1e-6)
    assert agent.act(obs.numpy()).tolist() == (p.argmax(1) + 1).tolist()  # the space starts at 1
    for a in (1, 2, 3):
        log_prob = agent.log_prob(obs.numpy(), np.full(4, a))
        assert torch.allclose(log_prob, p[:, a - 1].log(), atol=1e-5)
    samples = agent.act(obs[:1].expand(20_000, 3).numpy(), deterministic=False)
    assert np.bincount(samples - 1, minlength=3) / 20_000 == pytest.approx(p[0].numpy(), abs=0.02)


@pytest.mark.parametrize("module", FAMILY)
def test_the_deviation_is_bounded_and_the_same_in_all_states(module):
    agent = fresh_agent(module, BOX)
    for value, bound in ((-9.0, -5.0), (9.0, 2.0)):
        agent.policy.log_std.data.fill_(value)
        std = agent.policy(torch.randn(5, 3)).stddev
        assert torch.allclose(std, torch.full((5, 2), bound).exp())


@pytest.mark.parametrize("module", FAMILY)
def test_the_distance_to_the_data(module):
    a, b = torch.tensor([[0.0, 0.5], [1.0, -1.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    distance = module.GaussianPolicy.distance(a, b).item()
    assert distance == pytest.approx(math.sqrt((0.25 + 1 + 1) / 4))
    a, b = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
    assert module.CategoricalPolicy.distance(a, b).item() == 0.25


@pytest.mark.parametrize("module", FAMILY)
def test_the_mode_of_a_categorical_is_its_largest_probability(module):
    agent = fresh_agent(module, DISCRETE)
    pi = agent.policy(torch.randn(6, 3))
    assert isinstance(pi, Categorical) and torch.equal(pi.mode, pi.logits.argmax(1))


# ---- Learning ----


def run(tmp_path, **flags):
    return bc.main(bc.Args(out_dir=str(tmp_path), eval_every=0, **flags))


def test_bc_reproduces_a_deterministic_expert(tmp_path):
    """CartPole's scripted expert: the same action in all but a sliver of the states it visits."""
    result = run(tmp_path, dataset_id=("cartpole/expert-v0",), steps=1000, eval_episodes=10)
    assert result["action_distance"] < 0.05 and result["return_mean"] == 500


def test_percentile_bc_learns_from_mixed_data_where_bc_fails(tmp_path):
    """With default flags, over seeds 0 to 4: -146 ± 3 and -632 ± 182, the data -578."""
    flags = {"dataset_id": ("pendulum/mixed-v0",)}
    top, every = run(tmp_path, top_fraction=0.1, **flags), run(tmp_path, **flags)
    assert top["return_mean"] >= -200 and every["return_mean"] < top["return_mean"] - 100
    assert "imitates 9 of 100 episodes" in top["health"]
