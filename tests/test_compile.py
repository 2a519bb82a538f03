"""--compile computes what the eager update computes. Those that compile take up to a minute each:
`python -m pytest -m compile` runs them, the suite goes without."""

import importlib
import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Box, Discrete

FILES = ("bc", "cql", "iql", "bcq", "awac", "mopo")
CASES = [(name, kind) for name in FILES for kind in ("box", "discrete")][:-1]  # MOPO: Box alone
slow = pytest.mark.compile


@pytest.fixture
def in_float64():
    """Rounding apart, two ways to compute the same cannot differ: 1e-9 is a test here."""
    torch.set_default_dtype(torch.float64)
    torch.distributions.Distribution.set_default_validate_args(False)  # as use_cpu_well
    yield
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


def make(module, kind, **flags):
    torch.manual_seed(0)
    action_space = Discrete(4) if kind == "discrete" else Box(-1, 1, (3,))
    units = module.Units(Box(-9, 9, (11,)), action_space).double()
    flags |= {"hidden": (16, 16), "batch_size": 32}
    if module.__name__ == "mopo":
        flags |= {"model_hidden": (16, 16), "rollout_starts": 32}
    agent = module.Agent(units, module.Args(**flags)).double()
    for part in agent.modules():
        if isinstance(part, module.Adam):  # torch 2.13 compiles the decay to none in float64 alone
            part.decay = math.inf
    return agent


def batches(module, kind, n=30):
    torch.manual_seed(1)
    for _ in range(n):
        obs, next_obs = torch.randn(2, 32, 11)
        action = torch.randint(4, (32,)) if kind == "discrete" else torch.rand(32, 3) * 1.8 - 0.9
        yield module.Batch(obs, action, torch.randn(32), next_obs, (torch.rand(32) < 0.1).double())


@slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_compiled_update_equals_the_eager_one(name, kind, in_float64):
    module = importlib.import_module(name)
    eager, agent = make(module, kind), make(module, kind)
    first = deepcopy(eager.state_dict())
    update = module.compiled(agent.update, "cpu")
    for i, batch in enumerate(batches(module, kind)):
        torch.manual_seed(i)
        expected = eager.update(batch)
        torch.manual_seed(i)
        metrics = update(batch)
        assert set(metrics) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], value.detach(), rtol=1e-9, atol=1e-9)
    moved = 0.0
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[key], value, rtol=1e-9, atol=1e-9)
        moved = max(moved, (value - first[key]).abs().max().item())
    assert moved > 1e-3


@slow
def test_agents_in_one_process_have_graphs_of_their_own(in_float64):
    """No guard checks what was true when a graph was made: flags are constants in it, and a batch
    of another shape is an error, not a wrong result."""
    module = importlib.import_module("iql")
    eager, agents = ([make(module, "box", expectile=tau) for tau in (0.5, 0.9)] for _ in range(2))
    updates = [module.compiled(agent.update, "cpu") for agent in agents]
    for batch in batches(module, "box", 3):
        for one, update in zip(eager, updates, strict=True):
            expected = one.update(batch)["value_loss"].detach()
            torch.testing.assert_close(update(batch)["value_loss"], expected, rtol=1e-9, atol=1e-9)
    before = deepcopy(agents[0].state_dict())
    with pytest.raises(module.UserError, match="expected size 16==32"):
        updates[0](module.Batch(*(x[:16] for x in batch)))
    assert all(torch.equal(x, before[key]) for key, x in agents[0].state_dict().items())


@slow
@pytest.mark.parametrize("name", ["bc", "iql"])
def test_compiled_run_learns_and_resumes_bit_for_bit(name, monkeypatch):
    """CartPole's controller is cloned or improved upon; a run that was killed after half of its
    updates ends in the same weights as one that was not."""
    module = importlib.import_module(name)
    flags = {"dataset_id": ("cartpole/mixed-v0",), "hidden": (64, 64), "batch_size": 128}
    args = module.Args(**flags, steps=1_000, log_every=500, eval_every=0, eval_episodes=10,
                       seed=100, compile=True)  # fmt: skip
    result = module.main(args)
    assert result["return_mean"] >= 400  # of 500; the data's mean is 226

    def killed(self, update, metrics):
        log(self, update, metrics)
        raise KeyboardInterrupt

    log = module.Run.log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Run, "log", lambda *x: killed(*x) if x[1] == 500 else log(*x))
        module.main(module.Args(**vars(args) | {"out_dir": "killed"}))
    (folder,) = Path("killed").iterdir()
    module.main(module.Args(resume=str(folder)))
    (whole,) = Path("runs").iterdir()
    states = [torch.load(x / "checkpoint.pt", weights_only=True) for x in (whole, folder)]
    for key, value in states[0]["policy"].items():
        assert torch.equal(value, states[1]["policy"][key]), key
        if key.endswith("actor_optimizer.lr"):  # IQL's falls along a cosine to 0
            assert value == pytest.approx(0, abs=1e-9)
    assert json.loads((folder / "result.json").read_text())["returns"] == result["returns"]


@pytest.mark.parametrize("name", FILES)
def test_no_compiler_is_one_line(name):
    module = importlib.import_module(name)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(module.UserError, match=r"^--compile: InvalidCxxCompiler"):
        module.compiled(lambda batch: {}, "cpu")


@pytest.mark.parametrize("name", FILES)
def test_what_fails_while_the_first_update_compiles_is_one_line(name, monkeypatch):
    def broken(batch):
        raise KeyError("buf15")

    module = importlib.import_module(name)
    monkeypatch.setattr(torch, "compile", lambda *x, **y: broken)
    with pytest.raises(module.UserError, match=r"^--compile: KeyError: 'buf15'"):
        module.compiled(lambda batch: {}, "cpu")(None)
