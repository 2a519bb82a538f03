"""The mathematics of bc.py against exact answers. (test_agents.py has what all files share.)"""

import math

import numpy as np
import pytest
import torch
from helpers import make_data, minimise, random_batch, small_agent, stir

import bc


def tabular_bc(action, states):
    obs = torch.eye(int(states.max()) + 1).double()[states]
    data = make_data(bc, obs, action)
    return bc.Agent(data.units, bc.Args(hidden=())).double(), data.transitions


# ---- The loss ----


def test_the_discrete_optimum_is_the_empirical_frequency():
    states = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    agent, batch = tabular_bc(torch.tensor([0, 1, 1, 2, 0, 0, 0, 1, 2]), states)
    minimise(lambda: agent.actor_loss(batch), agent.policy.parameters(), 3)
    probabilities = agent.policy(torch.eye(2).double()).probs
    expected = torch.tensor([[1 / 4, 2 / 4, 1 / 4], [3 / 5, 1 / 5, 1 / 5]]).double()
    assert torch.allclose(probabilities, expected, atol=1e-6)


def test_the_box_optimum_is_the_conditional_mean_and_the_pooled_deviation():
    action = torch.tensor([[-0.4], [0.0], [0.1], [0.3], [0.7]]).double()
    agent, batch = tabular_bc(action, torch.tensor([0, 0, 0, 1, 1]))
    minimise(lambda: agent.actor_loss(batch), agent.policy.parameters())
    pi = agent.policy(torch.eye(2).double())
    assert torch.allclose(pi.mean, torch.tensor([[-0.1], [0.5]]).double(), atol=1e-6)
    residual = action[:, 0] - torch.tensor([-0.1, -0.1, -0.1, 0.5, 0.5])
    assert pi.stddev.tolist() == pytest.approx(
        np.full((2, 1), (residual**2).mean().sqrt()), abs=1e-6
    )


@pytest.mark.parametrize("discrete", [False, True])
def test_loss_and_metrics_are_the_hand_computed_ones(discrete):
    agent, batch = stir(small_agent(bc, discrete)), random_batch(discrete=discrete)
    out = agent.policy.net(batch.obs)[0]
    if discrete:
        nll = torch.nn.functional.cross_entropy(out, batch.action)
        distance = (out.argmax(1) != batch.action).float().mean()
    else:
        mean, log_std = out.tanh(), agent.policy.log_std
        error = mean - batch.action
        nll = 0.5 * (error / log_std.exp()) ** 2 + log_std + 0.5 * math.log(2 * math.pi)
        nll, distance = nll.sum(1).mean(), (error**2).mean().sqrt()
    metrics = agent.diagnose(batch)
    for value in (agent.actor_loss(batch), metrics["nll"], agent.update(batch)["actor_loss"]):
        assert value.item() == pytest.approx(nll.item(), rel=1e-5)
    assert metrics["action_distance"].item() == pytest.approx(distance.item(), rel=1e-5)


def test_an_update_is_one_step_of_adam():
    agent, batch = small_agent(bc, lr=0.02), random_batch()
    parameters = [*agent.policy.parameters()]
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(agent.actor_loss(batch), parameters)
    agent.update(batch)
    for p, old, g in zip(parameters, before, gradients, strict=True):
        assert torch.allclose(p, old - 0.02 * g / (g.abs() + 1e-8), atol=1e-5)


# ---- Which episodes ----


def episodes_in(lengths, returns):
    """Episodes of these lengths and returns; obs are the indices of the transitions."""
    parts = [torch.full((n,), r / n) for n, r in zip(lengths, returns, strict=True)]
    n = sum(lengths)
    return make_data(bc, torch.arange(n)[:, None], torch.arange(n) % 2, torch.cat(parts), lengths)


def choose(data, **flags):
    """The indices of the training part and of what is held out."""
    train, held_out = bc.choose_episodes(data, bc.Args(**flags))
    held_out = [] if held_out is None else held_out.obs[:, 0].tolist()
    assert train.returns is data.returns and torch.equal(
        train.episode, data.episode[train.transitions.obs[:, 0]]
    )
    return train.transitions.obs[:, 0].tolist(), held_out


MIXED = [30.0, 70, 10, 90, 0, 50, 20, 80, 60, 40]


def test_without_fraction_and_split_every_transition_is_there_once():
    data = episodes_in([4] * 10, MIXED)
    assert choose(data, held_out=0.0) == (list(range(40)), [])
    assert len(data.episode) == 40 and bc.choose_episodes(data, bc.Args(held_out=0.0))[1] is None


def test_every_whole_percentage_keeps_as_many_of_the_best_of_100_equal_episodes():
    returns = np.random.default_rng(0).permutation(100).astype(float)
    data = episodes_in([200] * 100, returns)
    for percent in range(1, 101):
        train, _ = choose(data, held_out=0.0, top_fraction=percent / 100)
        kept = np.unique(data.episode[train])
        assert len(train) == 200 * percent and set(returns[kept]) == set(range(100 - percent, 100))


def test_top_fraction_counts_transitions_and_keeps_what_holds_the_share():
    data = episodes_in([1, 1, 1, 51, 1, 1, 1, 41, 1, 1], MIXED)  # the two best are the long ones
    for fraction, kept in (
        (0.01, {3}),
        (0.51, {3}),
        (0.52, {3, 7}),
        (0.92, {3, 7}),
        (0.93, {1, 3, 7}),
    ):
        train, _ = choose(data, held_out=0.0, top_fraction=fraction)
        assert set(data.episode[train].tolist()) == kept


def test_of_equal_episodes_the_first_are_kept():
    train, _ = choose(episodes_in([2] * 40, [1.0] * 40), held_out=0.0, top_fraction=0.25)
    assert train == list(range(20))


def test_episodes_are_held_out_whole_and_are_among_the_best():
    data = episodes_in(list(range(1, 11)), MIXED)
    train, held_out = choose(data, held_out=0.3, top_fraction=0.9)
    kept, out = (set(data.episode[x].tolist()) for x in (train, held_out))
    assert out and kept and not kept & out
    assert sum((data.episode == e).sum() for e in kept | out) == len(train) + len(held_out)
    assert kept | out == set(np.argsort(-data.returns)[: len(kept | out)].tolist())


def test_as_many_episodes_are_held_out_as_hold_the_share_but_never_all():
    data = episodes_in([2] * 10, MIXED)
    for share, number in ((0.01, 1), (0.1, 1), (0.11, 2), (0.25, 3), (0.5, 5), (0.9, 9)):
        assert len(choose(data, held_out=share)[1]) == 2 * number
    assert len(choose(data, held_out=0.9, top_fraction=0.2)[1]) == 2  # one of two
    assert choose(data, held_out=0.5, top_fraction=0.1) == ([6, 7], [])  # one episode is trained on
    data = episodes_in([1] * 100, list(range(100)))
    for percent in range(1, 91):
        assert len(choose(data, held_out=percent / 100)[1]) == percent


def test_the_split_depends_on_the_seed_alone():
    splits = []
    for seed, returns in ((0, MIXED), (0, MIXED[::-1]), (1, MIXED)):
        torch.rand(len(splits))  # torch's random state and the rewards do not matter
        splits.append(choose(episodes_in([4] * 10, returns), held_out=0.3, seed=seed))
    assert splits[0] == splits[1] != splits[2]


def test_main_trains_and_measures_on_the_training_part_alone(tmp_path, monkeypatch):
    """Of 100 episodes the best 50 are kept, 13 of them held out: the mean return stays all data's,
    nll is of the training part, held_out_nll of the rest."""
    torch.manual_seed(0)
    data = episodes_in([60] * 100, list(range(100)))
    data.transitions = data.transitions._replace(obs=data.transitions.obs.float() / 6000)
    args = bc.Args(hidden=(8,), top_fraction=0.5, held_out=0.25, steps=2, log_every=1)
    args.eval_episodes, args.out_dir = 0, str(tmp_path)
    train, held_out = bc.choose_episodes(data, args)
    seen, update, diagnose = [], bc.Agent.update, bc.Agent.diagnose
    monkeypatch.setattr(bc, "Dataset", lambda *a, **k: data)
    monkeypatch.setattr(bc.Agent, "update", lambda a, b: seen.append(b) or update(a, b))
    monkeypatch.setattr(bc.Agent, "diagnose", lambda a, b: seen.append((a, b)) or diagnose(a, b))
    result = bc.main(args)
    batch, (agent, probe), *_ = seen
    assert len(train.episode) == 37 * 60 and len(held_out.obs) == 13 * 60
    assert torch.equal(probe.obs, train.transitions.obs[::2])
    assert len(batch.obs) == 256 and set(batch.obs[:, 0].tolist()) <= set(
        train.transitions.obs[:, 0].tolist()
    )
    assert result["held_out_nll"] == pytest.approx(agent.actor_loss(held_out).item(), rel=1e-6)
    assert result["nll"] == pytest.approx(agent.actor_loss(probe).item(), rel=1e-6)
    assert result["data_return_mean"] == pytest.approx(49.5)
    (csv,) = tmp_path.glob("*/metrics.csv")
    header, *rows = [line.split(",") for line in csv.read_text().splitlines()]
    assert len(rows) == 2 and all(row[header.index("held_out_nll")] for row in rows)


def test_health_warns_where_the_held_out_loss_is_more_than_1_higher():
    for held_out, warns in ((1.51, True), (1.49, False), (0.0, False), (-1.0, False)):
        line = bc.health({"nll": 0.5, "held_out_nll": held_out}, None, None)
        assert ("by heart" in line) == warns and f"{held_out:.3g}" in line and "0.5" in line
    assert "no episode is held out" in bc.health({"nll": 0.5}, None, None)
