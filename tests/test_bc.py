"""The mathematics of bc.py against exact answers, then learning on the built-in data. What bc.py,
cql.py, iql.py and awac.py have in common above the plumbing is tested here for all of them."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

import awac
import bc
import cql
import iql

FAMILY = [bc, iql, awac]  # their policies are the same
EVERY = [*FAMILY, cql]
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(np.float32([-2, 0]), np.float32([2, 3]), dtype=np.float32)
DISCRETE = spaces.Discrete(3, start=1)


def make_data(module, obs, action, reward=None, lengths=None, action_space=None):
    """A Dataset of these transitions; without lengths, one episode."""
    n, data = len(action), module.Dataset.__new__(module.Dataset)
    if action_space is None and action.dim() == 1:
        action_space = spaces.Discrete(int(action.max()) + 1)
    elif action_space is None:
        action_space = spaces.Box(-1, 1, action.shape[1:])
    data.units = module.Units(spaces.Box(-np.inf, np.inf, obs.shape[1:]), action_space)
    reward, lengths = torch.zeros(n) if reward is None else reward, torch.tensor(lengths or [n])
    data.transitions = module.Batch(obs, action, reward, obs.roll(-1, 0), torch.zeros(n))
    data.episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    data.returns = np.array([r.sum().item() for r in reward.split(lengths.tolist())])
    return data


def minimise(loss, parameters, steps=20):
    """The exact minimum of a smooth convex loss."""
    parameters, tight = list(parameters), {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS(parameters, 1, 100, line_search_fn="strong_wolfe", **tight)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward(inputs=parameters)
        return value

    for _ in range(steps):
        optimizer.step(closure)


def stir(agent):
    """Moves all weights, so that targets differ from critics and mistakes show."""
    for name, p in agent.named_parameters():
        if "optimizer" not in name:
            p.data += 0.3 * torch.randn_like(p)
    return agent


def plain_descent(optimizer, loss):
    """In place of Adam, whose first step is only the gradient's sign, which hides most mistakes."""
    gradients = torch.autograd.grad(loss, optimizer.params)
    for p, gradient in zip(optimizer.params, gradients, strict=True):
        p.data -= optimizer.lr * gradient


def resumes_bitwise(module, ids, saved, kill_at, tmp_path, monkeypatch, **flags):
    """A whole run, and one that is killed in update kill_at and goes on from `saved` or later, end
    with the same result, metrics and weights. Returns the folder of the whole one."""
    args, calls, sample = (
        module.Args(ids, out_dir=str(tmp_path), **flags),
        [],
        module.Dataset.sample,
    )

    def killed(data, n):
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return sample(data, n)

    whole = module.main(args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Dataset, "sample", killed)
        module.main(args)
    one, two = sorted(tmp_path.iterdir())
    rows = torch.load(two / "checkpoint.pt", weights_only=True)["metrics"]
    assert saved <= (rows[-1]["step"] if rows else 0) < kill_at
    resumed = module.main(module.Args(resume=str(two)))
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    first, second = (module.load_policy(folder).state_dict() for folder in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return one


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


def random_transitions(module, discrete, n=40):
    action = torch.randint(3, (n,)) if discrete else torch.rand(n, 2) * 2 - 1
    space = DISCRETE if discrete else BOX
    return make_data(module, torch.randn(n, 3), action, torch.randn(n), action_space=space)


@pytest.mark.parametrize("discrete", [False, True])
def test_loss_and_metrics_are_the_hand_computed_ones(discrete):
    torch.manual_seed(0)
    data = random_transitions(bc, discrete)
    agent, batch = stir(bc.Agent(data.units, bc.Args(hidden=(8,)))), data.transitions
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
    torch.manual_seed(0)
    data = random_transitions(bc, False)
    agent = bc.Agent(data.units, bc.Args(hidden=(8,), lr=0.02))
    parameters = [*agent.policy.parameters()]
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(agent.actor_loss(data.transitions), parameters)
    agent.update(data.transitions)
    for p, old, g in zip(parameters, before, gradients, strict=True):
        assert torch.allclose(p, old - 0.02 * g / (g.abs() + 1e-8), atol=1e-5)


def test_silent_broadcasting_is_an_error():
    data = make_data(bc, torch.randn(8, 3), torch.rand(8, 1))
    agent = bc.Agent(data.units, bc.Args(hidden=(8,)))
    with pytest.raises(AssertionError):
        agent.actor_loss(data.transitions._replace(reward=torch.zeros(8, 1)))


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


# ---- What all four have in common ----


def fresh_agent(module, action_space, **flags):
    torch.manual_seed(0)
    units = module.Units(OBS, action_space)
    return stir(module.Agent(units, module.Args(hidden=(8,), **flags))), units


@pytest.mark.parametrize("space", [BOX, DISCRETE])
@pytest.mark.parametrize("module", EVERY)
def test_act_standardises_and_gives_the_mode_in_environment_units(module, space):
    """In cql.py the tanh of the Gaussian's mean; a Discrete space that starts at 1."""
    agent, units = fresh_agent(module, space)
    units.obs_mean.fill_(5)
    units.obs_std.fill_(3)
    policy, raw = module.Policy(agent, units), 5 + 9 * torch.randn(50, 3)
    out = getattr(agent, "policy", getattr(agent, "critic", None)).net((raw - 5) / 3)[0].detach()
    if space is BOX:
        expected = BOX.low + (out[:, :2].tanh().numpy() + 1) / 2 * (BOX.high - BOX.low)
    else:
        expected = out.argmax(1).numpy() + 1
    action, sample = policy.act(raw), policy.act(raw, deterministic=False)
    assert action == pytest.approx(expected, abs=1e-5) and len(np.unique(action, axis=0)) > 1
    greedy = module is cql and space is DISCRETE
    assert np.array_equal(action, sample) == greedy
    assert greedy or not np.array_equal(sample, policy.act(raw, deterministic=False))


@pytest.mark.parametrize("module", EVERY)
def test_box_samples_follow_the_density(module):
    """A clipped Gaussian, in cql.py its tanh."""
    agent, units = fresh_agent(module, BOX)
    obs, policy = torch.randn(1, 3), module.Policy(agent, units)
    samples = policy.act(obs.expand(20_000, 3), deterministic=False)
    assert (samples >= BOX.low).all() and (samples <= BOX.high).all()
    scaled = torch.tensor(2 * (samples - BOX.low) / (BOX.high - BOX.low) - 1)
    if module is cql:
        mean, log_std = agent.policy.net(obs)[0, 0].chunk(2)
        scaled, bound = scaled.clamp(-1 + 1e-6, 1 - 1e-6).atanh(), torch.inf
    else:
        mean, log_std, bound = agent.policy.net(obs)[0, 0].tanh(), agent.policy.log_std, 1
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        z = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1))
        expected = (mean + log_std.exp() * z).clamp(-bound, bound).detach()
        assert torch.allclose(scaled.quantile(quantile, 0), expected, atol=0.05)


@pytest.mark.parametrize("module", FAMILY)
def test_discrete_samples_follow_the_probabilities(module):
    agent, units = fresh_agent(module, DISCRETE)
    obs = torch.randn(1, 3)
    policy, p = module.Policy(agent, units), agent.policy.net(obs)[0, 0].softmax(0)
    samples = policy.act(obs.expand(20_000, 3), deterministic=False)
    assert np.bincount(samples - 1) / 20_000 == pytest.approx(p.tolist(), abs=0.02)
    pi = agent.policy(torch.randn(6, 3))
    assert torch.equal(pi.mode, pi.logits.argmax(1))


@pytest.mark.parametrize("module", EVERY)
def test_the_deviation_is_bounded_and_in_all_but_cql_the_same_in_all_states(module):
    agent, _ = fresh_agent(module, BOX)
    obs, log_std = torch.randn(5, 3), getattr(agent.policy, "log_std", None)
    for value, bound in ((-9.0, -5.0), (9.0, 2.0), (-4.9, -4.9), (1.9, 1.9)):
        if module is cql:
            agent.policy.net.weight[-1].data[:, 2:] = 0
            agent.policy.net.bias[-1].data[:, 2:] = value
            std = agent.policy(obs).normal.stddev
        else:
            log_std.data.fill_(value)
            std = agent.policy(obs).stddev
        assert torch.allclose(std, torch.full((5, 2), bound).exp())


def test_the_deviation_starts_at_1_and_the_distance_is_the_hand_computed_one():
    for module in FAMILY:
        units = module.Units(OBS, BOX)
        assert module.GaussianPolicy(units, (8,)).log_std.tolist() == [0, 0]
        a, b = torch.tensor([[0.0, 0.5], [1.0, -1.0]]), torch.zeros(2, 2)
        assert module.GaussianPolicy.distance(a, b).item() == pytest.approx(math.sqrt(2.25 / 4))
        a, b = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
        assert module.CategoricalPolicy.distance(a, b).item() == 0.25


@pytest.mark.parametrize("space", [BOX, DISCRETE])
@pytest.mark.parametrize("module", [cql, iql, awac])
def test_the_target_network_starts_as_a_copy_of_the_critic(module, space):
    agent = module.Agent(module.Units(OBS, space), module.Args(hidden=(8,)))
    pairs = list(zip(agent.critic_target.parameters(), agent.critic.parameters(), strict=True))
    assert len(pairs) == 4
    for target, source in pairs:
        assert torch.equal(target, source) and target is not source
        assert len(source) == 1 or not torch.equal(source[0], source[1])


@pytest.mark.parametrize("module", EVERY)
def test_the_probe_of_the_metrics_spans_the_whole_training_data(module, tmp_path):
    data = make_data(
        module, torch.arange(3500.0)[:, None], torch.zeros(3500, 1), None, [1500, 2000]
    )
    args, seen = module.Args(eval_episodes=0, log_every=1, out_dir=str(tmp_path)), []
    agent = module.Agent(data.units, args)
    run = module.Run(args, data, agent, None)
    agent.diagnose = lambda batch: seen.append(batch.obs[:, 0].tolist()) or {}
    run.updates(1)
    run.log(1, {})
    assert seen == [list(range(0, 3500, 3))]


# ---- Learning; seeds from 100 on ----


def run(tmp_path, dataset, **flags):
    flags = {"seed": 100, "eval_every": 0, **flags}
    return bc.main(bc.Args((dataset,), out_dir=str(tmp_path), **flags))


def test_bc_learns_a_deterministic_expert(tmp_path):
    """CartPole's scripted expert: the same action in all but a sliver of the states it visits."""
    result = run(tmp_path, "cartpole/expert-v0", steps=1000, eval_episodes=10)
    assert result["action_distance"] < 0.05 and result["return_mean"] == 500


def test_percentile_bc_learns_from_mixed_data_where_bc_fails(tmp_path):
    top, every = (
        run(tmp_path, "pendulum/mixed-v0", steps=2000, eval_episodes=20, top_fraction=x)
        for x in (0.1, 1.0)
    )
    assert top["return_mean"] >= -200 and every["return_mean"] < top["return_mean"] - 100
