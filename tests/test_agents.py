"""What the agents of several files have in common: actions, the densities of their samples, target
networks, terminal transitions, shapes."""

import math

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
    forward,
    lerp,
    make_data,
    random_batch,
    same,
    small_agent,
    stir,
)
from torch.distributions import Normal
from torch.nn.functional import softplus

import awac
import bc
import bcq
import cql
import iql
import mopo

BOX = spaces.Box(np.float32([-2, 0]), np.float32([2, 3]), dtype=np.float32)
DISCRETE = spaces.Discrete(3, start=1)


def agents(*modules):
    """Each with the action spaces that it supports."""
    kinds = [(module, discrete) for module in modules for discrete in (False, True)]
    return [kind for kind in kinds if kind != (mopo, True)]


# ---- Actions ----


@pytest.mark.parametrize(("module", "discrete"), agents(bc, cql, iql, bcq, awac, mopo))
def test_act_takes_raw_observations_and_gives_what_the_environment_takes(module, discrete):
    """Standardised by the stored mean and deviation, on the way back in the action's units."""
    space = BOX if not discrete else DISCRETE
    agent, units = stir(small_agent(module, discrete)), module.Units(OBS, space)
    units.obs_mean.fill_(5)
    units.obs_std.fill_(3)
    obs = torch.randn(200, 3)
    for deterministic in (True, False):
        torch.manual_seed(1)
        found = module.Policy(agent, units).act((5 + 3 * obs).numpy(), deterministic)
        torch.manual_seed(1)
        with torch.no_grad():
            expected = agent.act(obs, deterministic).numpy()
        if not discrete:
            assert expected.min() < -0.05 and expected.max() > 0.05
            expected = np.float32([-2, 0]) + (expected + 1) / 2 * np.float32([4, 3])
            assert found == pytest.approx(expected.clip(BOX.low, BOX.high), abs=2e-3)
        else:
            assert np.mean(found == expected + 1) > 0.97 and len(set(found)) > 1  # rounding
        assert all(map(space.contains, found))


@pytest.mark.parametrize(("module", "discrete"), agents(bc, cql, iql, awac, mopo))
def test_act_gives_the_mode_or_a_sample(module, discrete):
    """Of Box actions tanh of what the network says is the mean; of Discrete ones the likeliest, in
    cql.py the one with the largest Q, always."""
    agent, obs = stir(small_agent(module, discrete)), torch.randn(50, 3)
    greedy = module is cql and discrete
    out = (agent.critic if greedy else agent.policy).net(obs)[0]
    action = agent.act(obs)
    expected = out[:, :2].tanh() if not discrete else out.argmax(1)
    assert torch.equal(action, expected) and len(action.unique(dim=0)) > 1
    one, other = (agent.act(obs, deterministic=False) for _ in range(2))
    assert torch.equal(action, one) == torch.equal(one, other) == greedy


@pytest.mark.parametrize("module", [bc, iql, awac, cql, mopo])
def test_box_samples_follow_the_density(module):
    """A clipped Gaussian, in cql.py and mopo.py its tanh."""
    agent, obs = stir(small_agent(module)), torch.randn(1, 3)
    samples = agent.act(obs.expand(20_000, 3), deterministic=False)
    if module in (cql, mopo):
        mean, log_std = agent.policy.net(obs)[0, 0].chunk(2)
        samples, bound = samples.clamp(-1 + 1e-6, 1 - 1e-6).atanh(), torch.inf
    else:
        mean, log_std, bound = agent.policy.net(obs)[0, 0].tanh(), agent.policy.log_std, 1
        samples = samples.clamp(-1, 1)  # as Policy does
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        z = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1))
        expected = (mean + log_std.exp() * z).clamp(-bound, bound)
        miss = (samples.quantile(quantile, 0) - expected).abs()  # its own noise: 0.01 of the std
        assert (miss < 0.05 * log_std.exp().clamp(min=1)).all()


@pytest.mark.parametrize("module", [bc, iql, awac])
def test_discrete_samples_follow_the_probabilities(module):
    agent, obs = stir(small_agent(module, True)), torch.randn(1, 3)
    p = agent.policy.net(obs)[0, 0].softmax(0)
    samples = agent.act(obs.expand(20_000, 3), deterministic=False)
    assert samples.bincount() / 20_000 == pytest.approx(p.tolist(), abs=0.02)


@pytest.mark.parametrize("module", [bc, cql])
def test_the_deviation_is_bounded_and_but_for_cql_and_mopo_the_same_in_all_states(module):
    """GaussianPolicy is the same text in bc.py, iql.py and awac.py, TanhGaussian in mopo.py."""
    policy, obs = small_agent(module).policy, torch.randn(5, 3)
    if module is bc:
        assert policy.log_std.tolist() == [0, 0]
    for value, bound in ((-9.0, -5.0), (9.0, 2.0), (-4.9, -4.9), (1.9, 1.9)):
        if module is bc:
            policy.log_std.data.fill_(value)
            std = policy(obs).stddev
        else:
            policy.net.weight[-1].data[:, 2:] = 0
            policy.net.bias[-1].data[:, 2:] = value
            std = policy(obs).normal.stddev
        assert torch.allclose(std, torch.full((5, 2), bound).exp())


def test_the_distance_of_actions_is_the_hand_computed_one():
    a, b = torch.tensor([[0.0, 0.5], [1.0, -1.0]]), torch.zeros(2, 2)
    assert bc.GaussianPolicy.distance(a, b).item() == pytest.approx(math.sqrt(2.25 / 4))
    a, b = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
    assert bc.CategoricalPolicy.distance(a, b).item() == 0.25


# ---- Updates ----


@pytest.mark.parametrize(("module", "discrete"), agents(cql, iql, bcq, awac, mopo))
def test_target_networks_start_as_copies_and_follow_at_the_rate_polyak(module, discrete):
    agent, batch = small_agent(module, discrete, polyak=0.25), random_batch(discrete=discrete)
    names = ["critic", "perturbation"] if module is bcq and not discrete else ["critic"]
    start = {name: clone(getattr(agent, name)) for name in names}
    for name in names:
        assert same(start[name], getattr(agent, f"{name}_target"))
        weight = getattr(agent, name).net.weight[0]
        assert len(weight) == 1 or not torch.equal(*weight)  # twins differ
    agent.update(batch)
    for name in names:
        now, target = getattr(agent, name), getattr(agent, f"{name}_target")
        assert not same(start[name], now)
        lerp(start[name], now.parameters(), 0.25)
        assert same(start[name], target)


@pytest.mark.parametrize(("module", "discrete"), agents(cql, bcq, mopo))
def test_a_terminal_transition_is_worth_its_reward_and_the_others_bootstrap(module, discrete):
    """test_iql.py has iql.py and awac.py, whose targets stand inside a loss."""
    agent, batch = small_agent(module, discrete), random_batch(discrete=discrete)
    extra = (agent.policy(batch.next_obs),) if module is cql and not discrete else ()
    y = agent.target(batch, *extra)
    assert not y.requires_grad and (y == batch.reward).tolist() == (batch.terminal == 1).tolist()


def losses(module, discrete, agent, batch):
    """Calls of each loss of an agent; the other files' take the batch alone."""
    if module is mopo or (module is cql and not discrete):
        pi, q = agent.policy(batch.obs), agent.critic(batch.obs, batch.action)
        yield agent.actor_loss, batch, *pi.sample_and_log_prob()
        yield agent.td_loss, q, agent.target(batch, *(pi,) if module is cql else ())
    elif module is cql:
        yield agent.td_loss, cql.pick(agent.critic(batch.obs), batch.action), agent.target(batch)
    elif module is awac:
        q = agent.critic(batch.obs, batch.action)
        yield agent.actor_loss, batch, agent.policy(batch.obs), q
        yield agent.critic_loss, batch, q
    elif module is iql:
        yield agent.value_loss, batch, torch.zeros(2)
        yield agent.actor_loss, batch, torch.zeros(2)
        yield agent.critic_loss, batch
    else:
        names = "actor_loss", "critic_loss", "vae_losses", "classifier_loss"
        yield from ((getattr(agent, name), batch) for name in names if hasattr(agent, name))


@pytest.mark.parametrize(("module", "discrete"), agents(bc, cql, iql, bcq, awac, mopo))
def test_silent_broadcasting_is_an_error(module, discrete):
    """Of rewards (N, 1), where there are as many transitions as critics: nothing else would
    notice."""
    agent, batch = small_agent(module, discrete), random_batch(2, discrete)
    for loss, *inputs in losses(module, discrete, agent, batch):
        loss(*inputs)
    wrong = batch._replace(reward=batch.reward[:, None])
    for loss, *inputs in losses(module, discrete, agent, wrong):
        with pytest.raises(AssertionError):
            loss(*inputs)


# cql.py with alpha 0 is SAC without the entropy in the backup, mopo.py is SAC, or COMBO.
SAC = [(cql, {"alpha": 0.0}), (mopo, {}), (mopo, {"conservative": 2.0, "real_ratio": 0.5})]


@pytest.mark.parametrize(("module", "flags"), SAC)
def test_updates_are_those_of_sac_and_of_combo_written_out(module, flags):
    """Five updates on the same batches and random numbers, bit for bit."""
    beta, n = flags.get("conservative", 0), 32  # n transitions are real, as many the model's
    rates = {"actor_lr": 3e-4, "critic_lr": 2e-3, "polyak": 0.02, "gamma": 0.9, "batch_size": 64}
    agent, batch = small_agent(module, **rates, **flags), random_batch(2 * n)
    for x in agent.critic_target.parameters():
        x.data += 0.1 * torch.randn_like(x)  # not the critic
    q, q_target, pi = map(clone, (agent.critic, agent.critic_target, agent.policy))
    log_temperature = torch.zeros((), requires_grad=True)
    q_optimizer, pi_optimizer = adam(q, 2e-3), adam([*pi, log_temperature], 3e-4)

    def sample(obs, shape=()):
        mean, log_std = forward(pi, obs)[0].chunk(2, -1)
        std = log_std.clamp(-5, 2).exp()
        z = Normal(mean, std).rsample(shape)
        action, slope = z.tanh(), 2 * (math.log(2) - z - softplus(-2 * z))
        return action, (Normal(mean, std).log_prob(z) - slope).sum(-1)

    def q_value(weights, obs, action):
        x = torch.cat([obs, action], -1)
        return forward(weights, x.flatten(0, -2)).reshape(2, *x.shape[:-1])

    for seed in range(5):
        torch.manual_seed(seed)
        q_data = q_value(q, batch.obs, batch.action)
        action, log_pi = sample(batch.obs)
        q_pi = q_value(q, batch.obs, action).min(0).values
        pi_loss = (log_temperature.exp().detach() * log_pi - q_pi).mean()
        temperature_loss = -(log_temperature * (log_pi.detach() - 2)).mean()  # A = 2
        with torch.no_grad():
            next_action, next_log_pi = sample(batch.next_obs)
            next_v = q_value(q_target, batch.next_obs, next_action).min(0).values
            if module is mopo:
                next_v = next_v - log_temperature.exp() * next_log_pi
            y = batch.reward + 0.9 * (1 - batch.terminal) * next_v
        q_loss = td_loss = 0.5 * ((q_data - y) ** 2).mean(1).sum()
        if beta:
            obs, next_obs = batch.obs[n:], batch.next_obs[n:]  # the states of the model
            uniform = torch.empty(10, n, 2).uniform_(-1, 1)
            with torch.no_grad():
                (a_pi, log_mu), (a_next, log_next) = sample(obs, (10,)), sample(next_obs, (10,))
            log_mu = torch.cat([torch.full((10, n), -2 * math.log(2)), log_mu, log_next])
            actions = torch.cat([uniform, a_pi, a_next])
            down = (q_value(q, obs.expand(30, -1, -1), actions) - log_mu).logsumexp(1)
            gap = down.mean(1) - q_data[:, :n].mean(1)
            q_loss = td_loss + beta * gap.sum()
        adam_step(pi_optimizer, pi_loss + temperature_loss)
        adam_step(q_optimizer, q_loss)
        lerp(q_target, q, 0.02)
        torch.manual_seed(seed)
        metrics = agent.update(batch)
        expected = {"td_loss": td_loss, "actor_loss": pi_loss, "entropy": -log_pi.mean()}
        expected |= {"critic_loss": q_loss, "temperature": log_temperature.exp()}
        close(metrics, expected | ({"gap": gap.mean()} if beta else {}), rel=1e-4)
    assert same(q, agent.critic) and same(q_target, agent.critic_target) and same(pi, agent.policy)
    assert torch.equal(log_temperature, agent.log_temperature)


# ---- Metrics ----


def test_the_probe_of_the_metrics_spans_the_whole_training_data(tmp_path):
    data = make_data(cql, torch.arange(3500.0)[:, None], torch.zeros(3500, 1), None, [1500, 2000])
    args, seen = cql.Args(eval_episodes=0, log_every=1, out_dir=str(tmp_path)), []
    agent = cql.Agent(data.units, args)
    run = cql.Run(args, data, agent, None)
    agent.diagnose = lambda batch: seen.append(batch.obs[:, 0].tolist()) or {}
    run.updates(1)
    run.log(1, {})
    assert seen == [list(range(0, 3500, 3))]
