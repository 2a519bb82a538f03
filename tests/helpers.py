"""What several test files build on: agents, batches and datasets in a line, exact minima, and what
updates are made of that are written out."""

import importlib
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_copies import TRAINING

import cql
import iql

BOX_ONLY = {"mopo.py"}
CASES = [(f, k) for f in TRAINING for k in ("box", "discrete") if k == "box" or f not in BOX_ONLY]
OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def module(file):
    return importlib.import_module(file.removesuffix(".py"))


@contextmanager
def refused(message, error=cql.UserError):
    """What stands inside raises this error, whose message matches and is one line."""
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def has_flag(module, name):
    return name in {field.name for field in fields(module.Args)}


def small_agent(module, discrete=False, dim=2, **flags):
    """With 3 observations, `dim` Box actions or 3 Discrete ones."""
    torch.manual_seed(0)
    units = module.Units(OBS, spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (dim,)))
    widths = "hidden", "vae_hidden", "model_hidden"
    sizes = {name: (8,) for name in widths if has_flag(module, name)}
    return module.Agent(units, module.Args(**sizes | flags))


def random_batch(n=16, discrete=False, dim=2):
    """For such an agent; each fourth transition is terminal."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, n, 3, generator=g)
    action = torch.arange(n) % 3 if discrete else torch.rand(n, dim, generator=g) * 2 - 1
    terminal = (torch.arange(n) % 4 == 0).float()
    return iql.Batch(obs, action, torch.randn(n, generator=g), next_obs, terminal)


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


def descend(loss, parameters, lr):
    """One step of plain gradient descent, for updates that are written out."""
    parameters = list(parameters)
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= lr * g


def follow(target, source, rate):
    """Target networks, written out."""
    for t, p in zip(target.parameters(), source.parameters(), strict=True):
        t.data = (1 - rate) * t.data + rate * p.data


def same_parameters(one, other, atol=1e-6):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=atol), name


def close(metrics, expected, rel=1e-5):
    """Metrics are those expected, and no others."""
    found, expected = (
        {k: torch.as_tensor(x).item() for k, x in d.items()} for d in (metrics, expected)
    )
    assert found == pytest.approx(expected, rel=rel, abs=1e-6)


# ---- Networks written out, bit for bit ----


def clone(module):
    return [p.detach().clone().requires_grad_() for p in module.parameters()]


def same(weights, module):
    return all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def forward(weights, x):
    """An MLP from the list w0, w1, ..., b0, b1, ..., by the same products as torch's bmm."""
    n = len(weights) // 2
    x = x.mT.expand(len(weights[0]), *x.mT.shape[-2:])
    for i in range(n):
        x = torch.bmm(weights[i], x) + weights[n + i]
        x = x.relu() if i < n - 1 else x
    return x.mT


def adam(weights, lr):
    return torch.optim.Adam(weights, lr=torch.tensor(lr), fused=True)


def adam_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def lerp(target, source, rate):
    with torch.no_grad():
        for t, w in zip(target, source, strict=True):
            t.lerp_(w, rate)
