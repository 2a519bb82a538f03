"""Whatever the input, found by hypothesis: the loader gives exact transitions or one line, and
load_policy the policy that was saved or one line."""

import io
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from test_data import LINE, UNIT, episode
from test_run import args_for

import cql

BOTH = spaces.Dict({"a": spaces.Discrete(3, start=1), "b": spaces.Box(-9, 9, (2, 1))})
ODD = some.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e31, 0.5, 2.0, 1e-300])
NUMBERS = some.floats(-1, 1, width=32)
many = settings(max_examples=150, deadline=None, derandomize=True)
shared = settings(many, suppress_health_check=[HealthCheck.function_scoped_fixture])


@some.composite
def episodes(draw):
    """Up to four good episodes of a Dict space, in half of the cases with one odd thing."""
    made = []
    for _ in range(draw(some.integers(1, 4))):
        T = draw(some.integers(1, 6))
        a = draw(arrays.arrays(np.int64, T + 1, elements=some.integers(1, 3)))
        b = draw(arrays.arrays(np.float32, (T + 1, 2, 1), elements=NUMBERS))
        rewards = draw(arrays.arrays(np.float64, T, elements=some.floats(-1e6, 1e6)))
        actions = draw(arrays.arrays(np.float32, (T, 1), elements=NUMBERS))
        terminated = draw(some.booleans())
        parts = {"observations": {"b": b, "a": a}, "rewards": rewards, "actions": actions}
        made.append(episode(T, terminated=terminated, **parts))
    if draw(some.booleans()):
        return made, None
    odd = draw(some.integers(0, len(made) - 1))
    name = draw(some.sampled_from(["rewards", "actions", "terminations", "truncations", "a", "b"]))
    holder = made[odd].observations if name in "ab" else vars(made[odd])
    if draw(some.booleans()):  # a row too few or too many
        rows = draw(some.sampled_from([slice(1, None), [0, *range(len(holder[name]))]]))
        holder[name] = holder[name][rows]
    else:
        holder[name] = holder[name].astype(np.float64)
        holder[name].flat[draw(some.integers(0, holder[name].size - 1))] = draw(ODD)
    return made, odd


@shared
@given(case=episodes())
def test_the_loader_gives_exact_transitions_or_one_line(case, monkeypatch):
    made, odd = case
    monkeypatch.setattr(cql, "open_dataset", lambda name: (made, (BOTH, UNIT), None, None))
    try:
        data = cql.Dataset(("lab/pump-v0",))
    except cql.UserError as error:
        assert odd is not None and "\n" not in str(error)
        assert str(error).startswith(f"dataset lab/pump-v0: episode {odd}: ")
        return
    rows = [
        [*np.eye(3)[x.observations["a"][t].astype(int) - 1], *x.observations["b"][t].ravel()]
        for x in made
        for t in range(len(x.rewards) + 1)
    ]
    last = np.cumsum([len(x.rewards) + 1 for x in made]) - 1
    first, n = np.r_[0, last[:-1] + 1], data.transitions
    assert torch.equal(n.obs, torch.tensor(np.delete(rows, last, 0), dtype=torch.float32))
    assert torch.equal(n.next_obs, torch.tensor(np.delete(rows, first, 0), dtype=torch.float32))
    for column, name in ((n.reward, "rewards"), (n.terminal, "terminations")):
        whole = np.concatenate([getattr(x, name) for x in made])
        assert torch.equal(column, torch.tensor(whole, dtype=torch.float32))
    assert all(x.isfinite().all() for x in n) and n.action.abs().max() <= 1
    assert data.episode.tolist() == [i for i, x in enumerate(made) for _ in x.rewards]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, and the bytes of its checkpoint."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cql, "open_dataset", lambda name: ([episode(9)], (LINE, UNIT), None, None))
        cql.main(args_for("cql.py", "box", root, dataset_id=("lab/pump-v0",)))
    (folder,) = root.iterdir()
    return folder, (folder / "checkpoint.pt").read_bytes()


def outcome(folder):
    """What the policy does, or the line in its place."""
    try:
        action = cql.load_policy(folder).act(np.zeros((3, 1), np.float32))
    except cql.UserError as error:
        assert "\n" not in str(error) and str(error).startswith(str(folder))
        return None
    assert action.shape == (3, 1) and (abs(action) <= 1).all()
    return action


@many
@given(data=some.data())
def test_load_policy_of_damaged_bytes(trained, data):
    folder, whole = trained
    content = bytearray(whole)
    if data.draw(some.booleans()):
        del content[data.draw(some.integers(0, len(whole) - 1)) :]
    else:
        for _ in range(data.draw(some.integers(1, 9))):
            content[data.draw(some.integers(0, len(whole) - 1))] = data.draw(some.integers(0, 255))
    (folder / "checkpoint.pt").write_bytes(content)
    outcome(folder)


JUNK = some.one_of(
    some.none(),
    some.integers(),
    some.floats(),
    some.text(),
    some.lists(some.integers()),
    some.builds(torch.zeros, some.lists(some.integers(0, 3), max_size=3)),
)


@many
@given(data=some.data())
def test_load_policy_of_changed_entries(trained, data):
    folder, whole = trained
    state = torch.load(io.BytesIO(whole), weights_only=True)
    place = data.draw(some.sampled_from([state, state["args"], state["policy"], state["spaces"]]))
    keys = list(place) if isinstance(place, dict) else range(len(place))
    place[data.draw(some.sampled_from(keys))] = data.draw(JUNK)
    torch.save(state, folder / "checkpoint.pt")
    outcome(folder)
