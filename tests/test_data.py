"""The loader, on cql.py's copy (test_copies.py: the copies are the same text). Most datasets here
go through Minari's own files, which accept nearly everything."""

import functools
import json
import math
import re

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import refused
from minari.data_collector import EpisodeBuffer

import bc
import cql

pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for an author and the like

LINE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
UNIT = spaces.Box(-1, 1, (1,), np.float32)


def episode(T=3, first=0.0, terminated=False, infos=None, **changed):
    """T steps, its observations count up from `first`; the last step is truncated by default."""
    flags = np.arange(T) == T - 1
    parts = {
        "observations": first + np.arange(T + 1, dtype=np.float32)[:, None],
        "actions": np.linspace(-0.5, 0.5, T, dtype=np.float32)[:, None],
        "rewards": np.arange(1.0, T + 1),
        "terminations": flags & terminated,
        "truncations": flags & (not terminated),
        "infos": infos or {},
    }
    return EpisodeBuffer(**(parts | changed))


def store(episodes, observation_space=LINE, action_space=UNIT, name="lab/pump-v0", **extra):
    minari.create_dataset_from_buffers(
        name, episodes, observation_space=observation_space, action_space=action_space, **extra
    )
    return name


def load(*names, **flags):
    return cql.Dataset(names, **flags)


def load_stored(episodes, *space, **flags):
    return load(store(episodes, *space), **flags)


def from_memory(monkeypatch, episodes, observation_space=LINE, action_space=UNIT):
    """For what Minari itself refuses to store."""
    source = episodes, (observation_space, action_space), None, None
    monkeypatch.setattr(cql, "open_dataset", lambda name: source)
    return load("lab/pump-v0")


# ---- Alignment ----


def test_a_terminated_and_a_truncated_episode_give_exact_transitions(capsys):
    data = load_stored([episode(3, 100, terminated=True), episode(2, 200), episode(1, 300)])
    batch, obs = data.transitions, [100, 101, 102, 200, 201, 300]
    assert batch.obs[:, 0].tolist() == obs
    assert batch.next_obs[:, 0].tolist() == [o + 1 for o in obs]  # 103 and 202: the true last
    assert batch.terminal.tolist() == [0, 0, 1, 0, 0, 0]
    assert batch.reward.tolist() == [1, 2, 3, 1, 2, 1]
    assert batch.action[:, 0].tolist() == [-0.5, 0, 0.5, -0.5, 0.5, -0.5]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.returns.tolist() == [6, 3, 1]
    assert np.isnan(data.behavior_log_prob).all() and data.behavior_log_prob.shape == (6,)
    assert [tuple(x.shape) for x in batch] == [(6, 1), (6, 1), (6,), (6, 1), (6,)]
    assert all(x.dtype == torch.float32 for x in batch)
    assert data.make_env is None and data.reference is None
    assert "6 transitions in 3 episodes, return 3.3 (1.0 to 6.0)" in capsys.readouterr().out


def test_terminated_and_truncated_at_once_is_terminal():
    end = np.array([False, True])
    both = episode(2, terminations=end, truncations=end)
    assert load_stored([both]).transitions.terminal.tolist() == [0, 1]


def test_no_transition_joins_two_episodes():
    lengths = np.random.default_rng(0).integers(1, 30, 50)
    data = load_stored([episode(int(T), 1000 * k) for k, T in enumerate(lengths)])
    batch = data.transitions
    assert len(batch.obs) == lengths.sum()
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(data.episode, (batch.obs[:, 0] // 1000).long())


def test_batches_are_rows_of_the_data():
    data = load_stored([episode(20, 0), episode(20, 100)])
    torch.manual_seed(0)
    batch = data.sample(1000)
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(batch.reward, batch.obs[:, 0] % 100 + 1)
    counts = batch.obs.unique(return_counts=True)[1]
    assert len(counts) == 40 and counts.max() < 60  # each is as likely, 25 on average
    assert torch.equal(data.batch(torch.tensor([39, 0])).obs, torch.tensor([[119.0], [0.0]]))


# ---- Observations ----


NESTED = spaces.Dict(
    b=spaces.Discrete(3, start=1),
    a=spaces.Tuple([spaces.Box(-1, 1, (2, 2), np.float64), spaces.Discrete(2)]),
    c=spaces.Dict(z=spaces.Box(0, 5, (), np.float32), y=spaces.Box(-9, 9, (1,), np.int32)),
)


def stack(space, samples):
    if isinstance(space, spaces.Dict):
        return {k: stack(s, [x[k] for x in samples]) for k, s in [*space.items()][::-1]}
    if isinstance(space, spaces.Tuple):
        return tuple(stack(s, [x[k] for x in samples]) for k, s in enumerate(space))
    return np.array(samples, dtype=space.dtype)


@pytest.mark.parametrize(
    "space",
    [
        NESTED,
        NESTED["a"],
        spaces.Discrete(4),
        spaces.Discrete(4, start=-2),
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Dict(zz=LINE, a=spaces.Dict(q=LINE, b=LINE)),
    ],
    ids=["dict", "tuple", "discrete", "discrete from -2", "matrix", "dict of dict"],
)
@pytest.mark.parametrize("stored", [True, False])
def test_observations_are_flat_as_gymnasium_flattens_each_step(monkeypatch, space, stored):
    """The keys of a stored Dict come in another order than those of its space."""
    space.seed(0)
    samples = [space.sample() for _ in range(9)]
    episodes = [
        episode(5, observations=stack(space, samples[:6])),
        episode(2, observations=stack(space, samples[6:])),
    ]
    data = load_stored(episodes, space) if stored else from_memory(monkeypatch, episodes, space)
    space = data.units.observation_space  # Minari has sorted the keys of a Dict
    flat = np.stack([spaces.flatten(space, x) for x in samples]).astype(np.float32)
    assert data.units.obs_dim == flat.shape[1] == spaces.flatdim(space)
    assert np.array_equal(data.transitions.obs, flat[[0, 1, 2, 3, 4, 6, 7]])
    assert np.array_equal(data.transitions.next_obs, flat[[1, 2, 3, 4, 5, 7, 8]])


def test_actions_of_the_wrong_number_are_an_error_not_broadcast():
    with pytest.raises(RuntimeError):
        cql.Units(LINE, spaces.Box(-1, 1, (3,), np.float32)).action(np.zeros((5, 1)))


# ---- Actions ----


def test_discrete_actions_count_from_0_inside_and_from_start_outside():
    data = load_stored([episode(3, actions=np.array([5, 7, 8]))], LINE, spaces.Discrete(4, start=5))
    action, units = data.transitions.action, data.units
    assert action.tolist() == [0, 2, 3] and action.dtype == torch.int64
    assert units.env_action(action).tolist() == [5, 7, 8]
    assert units.action_dim == 4 and units.discrete
    dates = cql.Units(LINE, spaces.Discrete(4, start=20250101))  # float32 has no such odd numbers
    assert dates.action(np.arange(20250101, 20250105)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_box_actions_are_scaled_by_their_bounds_there_and_back(dtype):
    low = np.array([[-1, 0, 10], [-4, -0.5, -30]], dtype)
    high = np.array([[1, 8, 11], [-3, 0.25, 50]], dtype)
    space = spaces.Box(low, high, dtype=dtype)
    space.seed(0)
    action = np.array([space.sample() for _ in range(4)] + [low, high, (low + high) / 2])
    data = load_stored([episode(7, actions=action)], LINE, space)
    expected = 2 * (action - low.astype(float)) / (high - low) - 1
    found = data.transitions.action
    assert found.shape == (7, 6) and np.allclose(found, expected.reshape(7, 6), atol=1e-6)
    assert found[4:].tolist() == [[-1] * 6, [1] * 6, [0] * 6]
    back = data.units.env_action(found)
    error = max(2e-6, 2 * np.finfo(dtype).eps)
    assert back.shape == (7, 2, 3) and np.allclose(back, action, rtol=error, atol=error)
    assert back.dtype == dtype and all(space.contains(x) for x in back)


@pytest.mark.parametrize("sign", [-1, 1])
def test_actions_are_clipped_within_a_thousandth_of_the_range_and_no_further(sign):
    space = spaces.Box(-2, 4, (1,), np.float64)  # range 6
    edge = 4 if sign > 0 else -2
    action = np.array([[0.0], [edge + sign * 0.0059], [1.0]])
    data = load_stored([episode(actions=action)], LINE, space)
    assert data.transitions.action[1].item() == sign
    action[1] = edge + sign * 0.0061
    with refused("") as error:
        load(store([episode(), episode(actions=action)], LINE, space, "lab/far-v0"))
    text = str(error.value)
    assert text.startswith("dataset lab/far-v0: episode 1: step 1: the action is not in Box(")


# ---- Broken datasets: one line that names dataset, episode and step ----


def nan(shape, index, value=math.nan):
    x = np.zeros(shape)
    x[index] = value
    return x


SHAPES = r"have shapes \[.*"
BROKEN = {  # id: (what episode 1 has, what the message says)
    "T observations": (
        {"observations": np.zeros((3, 1))},
        r"3 observations need T = 2; actions, rewards, .*\(3, 1\), \(3,\)",
    ),
    "T + 2 observations": ({"observations": np.zeros((5, 1))}, "5 observations need T = 4"),
    "feature size": ({"observations": np.zeros((4, 2))}, r"shape \(2,\) are not of Box"),
    "no feature axis": ({"observations": np.zeros(4)}, r"shape \(\) are not of Box"),
    "rewards shorter": ({"rewards": np.zeros(2)}, rf"T = 3; .*{SHAPES}\(2,\)"),
    "rewards (T, 1)": ({"rewards": np.zeros((3, 1))}, rf"{SHAPES}, \(3, 1\), \(3,\)"),
    "terminations longer": ({"terminations": np.zeros(4, bool)}, rf"{SHAPES}\(4,\)"),
    "truncations shorter": ({"truncations": np.zeros(2, bool)}, rf"{SHAPES}\(2,\)"),
    "actions shorter": (
        {"actions": np.zeros((2, 1), np.float32)},
        rf"4 observations need T = 3; .*{SHAPES}\(2, 1\)",
    ),
    "actions too wide": ({"actions": np.zeros((3, 2), np.float32)}, rf"{SHAPES}\(3, 2\)"),
    "no end flag": ({"truncations": np.zeros(3, bool)}, "step 2: the end is neither terminated"),
    "end flag in the middle": (
        {"terminations": np.array([False, True, False])},
        "step 1: the episode ends here and yet goes on",
    ),
    "cut in the middle": (
        {"truncations": np.array([True, False, True])},
        "step 0: the episode ends here and yet goes on",
    ),
    "NaN observation": ({"observations": nan((4, 1), 2)}, "step 2: the observation is NaN"),
    "NaN last observation": ({"observations": nan((4, 1), 3)}, "step 3: the observation is NaN"),
    "infinite observation": ({"observations": nan((4, 1), 0, np.inf)}, "step 0: the observation"),
    "observation x 1e300": ({"observations": nan((4, 1), 1, 1e300)}, "step 1: the observation is"),
    "NaN reward": ({"rewards": nan(3, 1)}, "step 1: the reward is NaN"),
    "infinite reward": ({"rewards": nan(3, 2, -np.inf)}, "step 2: the reward is NaN, inf"),
    "observation 1e39": ({"observations": nan((4, 1), 3, 1e39)}, "step 3: the observation is NaN"),
    "reward 1e300": ({"rewards": nan(3, 2, 1e300)}, "step 2: the reward .*beyond 1e30"),
    "NaN action": ({"actions": nan((3, 1), 1)}, "step 1: the action is not in Box"),
    "infinite action": ({"actions": nan((3, 1), 0, np.inf)}, "step 0: the action is not in Box"),
    "action beyond the bounds": (
        {"actions": nan((3, 1), 2, 1.01)},
        "step 2: the action is not in Box",
    ),
    "log-probabilities of a wrong length": (
        {"infos": {"behavior_log_prob": np.zeros(2)}},
        rf"behavior_log_prob {SHAPES}\(2,\)",
    ),
    "log-probabilities as a column": (
        {"infos": {"behavior_log_prob": np.zeros((3, 1))}},
        rf"behavior_log_prob {SHAPES}\(3, 1\)",
    ),
    "end flags that are none": (
        {"terminations": np.array([0.0, 0.0, 2.0])},
        "step 2: the end flags must be 0 or 1",
    ),
    "NaN terminations": ({"terminations": nan(3, 1)}, "step 1: the end flags must be 0 or 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_episodes(case):
    changed, message = BROKEN[case]
    with refused(f"^dataset lab/pump-v0: episode 1: .*{message}"):
        load_stored([episode(), episode(**changed), episode()])


NO_STEPS = {"observations": np.zeros((1, 1)), "actions": np.zeros((0, 1)), "rewards": np.zeros(0)}
NO_STEPS |= {"terminations": np.zeros(0, bool), "truncations": np.zeros(0, bool)}
DATA, ACTIONS = (LINE, UNIT), (LINE, spaces.Discrete(3))
STATES, FROM_1 = (spaces.Discrete(3), UNIT), (spaces.Discrete(3, start=1), UNIT)
NAMED = spaces.Dict(a=LINE, b=LINE), UNIT
MIXED = spaces.Dict(a=LINE, b=spaces.Discrete(2)), UNIT
NOT_IN = r"step 2: .*not in Discrete\("
ODD = [  # (spaces, what an episode has, message): what Minari itself would not store, too
    (ACTIONS, {"actions": np.array([0, 3, 1])}, r"step 1: the action is not in Discrete\(3\)"),
    (ACTIONS, {"actions": np.array([0, 1, -1])}, r"step 2: the action is not in Discrete\(3\)"),
    (ACTIONS, {"actions": np.array([0.0, 0.5, 2.0])}, r"step 1: the action is not in Discrete"),
    (ACTIONS, {"actions": np.array([[0], [1], [2]])}, r".*\(3, 1\)"),
    (STATES, {"observations": np.array([0, 1, 3, 2])}, NOT_IN),
    (STATES, {"observations": np.array([0, 1, np.nan, 1])}, NOT_IN),
    (STATES, {"observations": np.array([0, 1, 1.5, 1])}, NOT_IN),
    (FROM_1, {"observations": np.array([1, 2, 0, 3])}, NOT_IN),
    (MIXED, {"observations": {"a": np.zeros((4, 1)), "b": nan(4, 2, 7)}}, NOT_IN),
    (NAMED, {"observations": {"a": np.zeros((4, 1))}}, ".*'b'"),
    (NAMED, {"observations": {"a": np.zeros((4, 1)), "c": np.zeros((4, 1))}}, ".*'b'"),
    (NAMED, {"observations": {"a": np.zeros((4, 1)), "b": np.zeros((3, 1))}}, ".*3"),
    (NAMED, {"observations": np.zeros((4, 2))}, ""),
    (DATA, NO_STEPS, "1 observations need T = 0"),
    (DATA, {"observations": None}, "object observations of shape"),
    (DATA, {"observations": "text"}, "<U4 observations of shape"),
    (DATA, {"observations": [[0], [0, 1], [0], [0]]}, "ValueError"),
    (DATA, {"observations": np.zeros((4, 1), complex)}, "complex128 observations"),
    (DATA, {"observations": np.array([["a"]] * 4)}, "<U1 observations of shape .* are not of Box"),
    (DATA, {"actions": None}, "TypeError"),
    (DATA, {"truncations": None}, r"4 observations need T = 3; .*\(\)"),
    (DATA, {"truncations": np.array(["no", "no", "yes"])}, ".*must be plain numbers"),
    (DATA, {"rewards": np.array(["1", "2", "3"])}, ".*must be plain numbers"),
    (DATA, {"rewards": np.array([1, None, 3], dtype=object)}, ".*must be plain numbers"),
    (DATA, {"infos": {"behavior_log_prob": np.array(["a", "b", "c"])}}, ".*must be plain numbers"),
    (DATA, {"infos": {"behavior_log_prob": np.float64(0)}}, "TypeError"),
]


@pytest.mark.parametrize(("its_spaces", "changed", "message"), ODD)
def test_odd_episodes(monkeypatch, its_spaces, changed, message):
    with refused(f"^dataset lab/pump-v0: episode 0: {message}"):
        from_memory(monkeypatch, [episode(**changed)], *its_spaces)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (LINE, spaces.Box(-np.inf, np.inf, (1,)), "bounded Box of floats, not Box"),
        (LINE, spaces.Box(0, np.inf, (1,)), "bounded Box of floats, not Box"),
        (LINE, spaces.Box(1, 1, (1,)), "bounded Box of floats, not Box"),
        (LINE, spaces.Discrete(10**7), "spaces must have 1 to 100,000 numbers"),
        (LINE, spaces.Box(-1, 1, (0,)), "spaces must have 1 to 100,000 numbers"),
        (spaces.Discrete(10**7), UNIT, "spaces must have 1 to 100,000 numbers"),
        (spaces.Box(-1, 1, (0,)), UNIT, "spaces must have 1 to 100,000 numbers"),
        (spaces.Text(5), UNIT, "episode 0: observations of Text"),
        (LINE, spaces.MultiDiscrete([2, 3]), r"must be .*, not MultiDiscrete\(\[2 3\]\)"),
        (LINE, spaces.MultiBinary(3), r"must be .*, not MultiBinary\(3\)"),
        (LINE, spaces.Dict(a=UNIT), "actions must be .*, not Dict"),
        (LINE, spaces.Box(0, 9, (1,), np.int64), r"Box of floats, not Box\(.*int64\)"),
        (spaces.MultiBinary(3), UNIT, r"observations of MultiBinary\(3\) are not supported"),
        (spaces.MultiDiscrete([2, 2]), UNIT, "observations of MultiDiscrete"),
        (spaces.Dict(flags=spaces.MultiBinary(2)), UNIT, "observations of MultiBinary"),
        (spaces.Tuple([LINE, spaces.MultiBinary(2)]), UNIT, "observations of MultiBinary"),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), UNIT, "images: store features"),
        (spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), np.uint8)), UNIT, "images: store"),
    ],
)
def test_spaces_that_are_not_supported(monkeypatch, observation_space, action_space, message):
    observation_space.seed(0)
    samples = stack(observation_space, [observation_space.sample() for _ in range(4)])
    with refused(f"^dataset lab/pump-v0: .*{message}"):
        broken = [episode(observations=samples)]
        from_memory(monkeypatch, broken, observation_space, action_space)


@pytest.mark.parametrize(
    "its_spaces",
    [(None, UNIT), (LINE, None), (spaces.Dict(), UNIT), (spaces.Sequence(LINE), UNIT)],
)
def test_spaces_that_are_none(monkeypatch, its_spaces):
    with refused(r"^dataset lab/pump-v0: (Attr|Value|spaces)"):
        from_memory(monkeypatch, [episode()], *its_spaces)


def test_a_dataset_without_episodes(monkeypatch):
    with refused(r"^dataset lab/pump-v0: it has no episodes$"):
        from_memory(monkeypatch, [])


# ---- A part of a dataset ----


@pytest.mark.parametrize(
    ("part", "episodes"),
    [
        ("", range(7)),
        ("[:]", range(7)),
        ("[:100%]", range(7)),
        ("[:50%]", range(4)),  # the episode on the border is in the first part
        ("[50%:]", range(4, 7)),
        ("[15%:43%]", range(2, 4)),
        ("[:1%]", range(1)),
    ],
)
def test_a_part_of_a_dataset(part, episodes):
    data = load(store([episode(2, 100 * k) for k in range(7)]) + part)
    assert data.transitions.obs[::2, 0].tolist() == [100 * k for k in episodes]
    assert data.episode.tolist() == [k for k in range(len(episodes)) for _ in range(2)]


def test_two_parts_are_the_whole_without_overlap():
    stored = store([episode(1, k) for k in range(13)])
    for percent in (1, 7, 8, 9, 50, 62, 92):
        parts = f"[:{percent}%]", f"[{percent}%:]"
        data = load(*(stored + part for part in parts))
        assert data.transitions.obs[:, 0].tolist() == list(range(13))


@pytest.mark.parametrize(
    "part",
    ["[80%]", "[:80]", "[:0.8]", "[:101%]", "[50%:50%]", "[60%:40%]", "[:-5%]", "[80%:", "[]"],
)
def test_a_part_that_is_none(part):
    start = re.escape(f"dataset pendulum/mixed-v0{part}: ")
    with refused(rf"^{start}.*\[:80%\] or \[80%:\]"):
        load(f"pendulum/mixed-v0{part}")


def test_a_part_without_episodes():
    with refused(r"^dataset lab/pump-v0\[98%:\]: it has no episodes$"):
        load(store([episode()] * 3) + "[98%:]")


# ---- Broken files ----


def break_file(root, name, change):
    path = root / "lab/pump-v0/data" / name
    path.write_bytes(change(path.read_bytes()))


def change_metadata(**changes):
    def change(raw):
        metadata = json.loads(raw) | changes
        return json.dumps({k: v for k, v in metadata.items() if v is not None}).encode()

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("main_data.hdf5", lambda raw: raw[: len(raw) // 2], "OSError.*truncated"),
        ("main_data.hdf5", lambda raw: b"", "OSError"),
        ("main_data.hdf5", None, "No data"),
        ("metadata.json", lambda raw: raw[:-20], "JSONDecodeError"),
        ("metadata.json", change_metadata(data_format=None), "KeyError: 'data_format'"),
        ("metadata.json", change_metadata(minari_version="9.0.0"), "Minari 9.0.0"),
        ("metadata.json", None, "No data"),
    ],
    ids=["truncated", "empty", "no file", "broken json", "no format", "newer Minari", "no json"],
)
def test_broken_files(empty_minari_root, name, change, reason):
    store([episode() for _ in range(50)])
    folder = empty_minari_root / "lab/pump-v0/data"
    if change:
        break_file(empty_minari_root, name, change)
    else:
        (folder / name).unlink()
    with refused(f"^dataset lab/pump-v0: .*{reason}") as error:
        load("lab/pump-v0")
    assert str(folder) in str(error.value) or "episode 0" in str(error.value)


def test_an_unknown_id_offline(monkeypatch, empty_minari_root, capsys):
    """It says what is there before it asks the hub, which offline takes long."""
    store([episode()], name="lab/pump-v0")
    asked = []

    def no_network(dataset_id, download):
        asked.append(capsys.readouterr().out)
        raise ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")

    monkeypatch.setattr(minari, "load_dataset", no_network)
    with refused("") as error:
        load("mujoco/hopper/medium-v0")
    text, folder = str(error.value), empty_minari_root / "mujoco/hopper/medium-v0/data"
    assert text.startswith("dataset mujoco/hopper/medium-v0: ") and "name resolution" in text
    assert str(folder) in text
    where = f"medium-v0: not in {empty_minari_root}, where ['lab/pump-v0'] are; asking"
    assert [where in printed for printed in asked] == [True]
    monkeypatch.undo()  # following the advice works
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(empty_minari_root))
    folder.parent.mkdir(parents=True)
    (empty_minari_root / "lab/pump-v0/data").rename(folder)
    assert len(load("mujoco/hopper/medium-v0").episode) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mujoco/hopper/medium", "needs a version, as in mujoco/hopper/medium-v0"),
        ("lab/pump", "needs a version"),
        ("pump-v", "needs a version"),
        ("pendulum/mixd-v0", r"built in, as are \{pendulum,cartpole\}/\{random,medium,.*0.35-v0"),
        ("pendulum/mixed-v1", r"\{random,medium,expert,mixed\}-v0"),
        ("cartpole/mixed", r"\{random,medium,expert,mixed\}-v0"),
        ("cartpole/1.5-v0", "by the noise"),
    ],
)
def test_a_wrong_id_is_known_without_the_network(monkeypatch, name, message):
    asked = lambda *name, **more: pytest.fail("asked the network")  # noqa: E731
    monkeypatch.setattr(minari, "load_dataset", asked)
    with refused(rf"^dataset {name}: .*{message}"):
        load(name)


# ---- Several ids, reference scores, environments ----


def with_env(name, env="Pendulum-v1", **extra):
    made = gym.make(env)
    made.action_space.seed(0)
    actions = np.array([made.action_space.sample() for _ in range(4)])
    observations = np.zeros((5, *made.observation_space.shape), np.float32)
    buffer = episode(4, observations=observations, actions=actions)
    minari.create_dataset_from_buffers(name, [buffer], env=env, **extra)
    return name


def test_several_ids_are_mixed_in_order():
    one = store([episode(3, 0), episode(2, 100)], name="lab/one-v0")
    two = store([episode(2, 200)], name="lab/two-v0")
    data = load(one, two)
    assert data.transitions.obs[:, 0].tolist() == [0, 1, 2, 100, 101, 200, 201]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert data.returns.tolist() == [6, 3, 3]


@pytest.mark.parametrize(
    ("observation_space", "action_space", "buffer"),
    [
        (LINE, spaces.Box(-2, 2, (1,), np.float32), episode()),
        (LINE, spaces.Discrete(2), episode(actions=np.array([0, 1, 0]))),
        (spaces.Discrete(5), UNIT, episode(observations=np.arange(4))),
    ],
)
def test_ids_with_different_spaces_are_an_error(observation_space, action_space, buffer):
    one = store([episode()], name="lab/one-v0")
    two = store([buffer], observation_space, action_space, "lab/two-v0")
    with refused("lab/two-v0: its spaces are not those of lab/one-v0"):
        load(one, two)


def test_an_error_in_the_second_of_two_datasets_names_it():
    one = store([episode(), episode()], name="lab/one-v0")
    two = store([episode(), episode(rewards=nan(3, 2))], name="lab/two-v0")
    with refused(r"^dataset lab/two-v0: episode 1: step 2: the reward"):
        load(one, two)


def test_reference_scores_are_kept_only_where_they_are_equal():
    first = with_env("lab/one-v0", ref_min_score=-1000.0, ref_max_score=-150.0)
    same = with_env("lab/two-v0", ref_min_score=-1000.0, ref_max_score=-150.0)
    other = with_env("lab/three-v0", ref_min_score=-900.0, ref_max_score=-150.0)
    none = with_env("lab/four-v0")
    flat = with_env("lab/five-v0", ref_min_score=-99.0, ref_max_score=-99.0)  # no scale
    assert load(first).reference == load(first, same).reference == (-1000.0, -150.0)
    for names in ((first, other), (first, none), (none, first), (first, other, same)):
        assert load(*names).reference is None
    assert load(none).reference is load(flat).reference is None


class Line(gym.Env):
    """Never ends by itself."""

    observation_space, action_space = LINE, UNIT

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Parts(Line):
    """Flat its observations are three numbers, as Pendulum's."""

    observation_space = spaces.Dict(angle=spaces.Box(-1, 1, (2,)), speed=LINE)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


@pytest.fixture
def registered():
    """Makes Line-v0, with a time limit, Endless-v0, without, and Parts-v0 known to gymnasium."""
    gym.register("Line-v0", Line, max_episode_steps=7)
    gym.register("Endless-v0", Line)
    gym.register("Parts-v0", Parts, max_episode_steps=7)
    yield
    for name in ("Line-v0", "Endless-v0", "Parts-v0"):
        del gym.registry[name]


def find_env(name, env_id=None):
    return cql.find_env(load(name), env_id)


def steps_of(env):
    steps, ended = 0, not env.reset()
    while not ended and steps < 20:
        ended, steps = env.step(np.zeros(1))[3], steps + 1
    return steps


def test_a_dataset_without_environment_and_env_id(capsys, registered):
    name = store([episode(3), episode(9), episode(4)])
    assert find_env(name) is None
    printed = capsys.readouterr().out
    assert "no evaluation" in printed and "--env-id" in printed and "ope.py" in printed
    assert steps_of(find_env(name, "Line-v0")()) == 7
    # Without a time limit the longest episode in the data is one.
    assert steps_of(find_env(name, "Endless-v0")()) == 9
    printed = capsys.readouterr().out
    assert "no evaluation" not in printed
    assert "no time limit: an episode ends after 9 steps" in printed


def test_the_best_episodes_do_not_set_the_time_limit_of_the_evaluation(registered):
    """With a reward of -1 per step they are the shortest."""
    name = store([episode(T, rewards=-np.ones(T)) for T in (3, 9)])
    train, _ = bc.choose_episodes(bc.Dataset([name]), bc.Args(top_fraction=0.1))
    assert len(train.episode) == 3 and steps_of(bc.find_env(train, "Endless-v0")()) == 9


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", "its spaces are not those of the data"),
        ("MountainCarContinuous-v0", "its spaces are not those of the data"),
        ("NoSuchEnv-v0", ".*doesn't exist"),
        ("no_such_package:Env-v0", ".*no_such_package"),
        ("Parts-v0", ".*"),  # evaluating would crash later on
    ],
)
def test_a_wrong_env_id_is_an_error(env_id, message, registered):
    without = r"\(not needed with --eval-episodes 0\)"
    with refused(rf"^environment {env_id} {without}: {message}"):
        find_env(with_env("lab/one-v0"), env_id)


def test_an_environment_with_other_actions_is_an_error():
    """Observations of two numbers both, three Discrete actions against a Box."""
    with refused("its spaces are not those of the data"):
        find_env(with_env("lab/one-v0", "MountainCar-v0"), "MountainCarContinuous-v0")


def test_the_environment_of_the_dataset_is_used():
    spec = gym.make("Pendulum-v1", max_episode_steps=33).spec
    assert find_env(with_env("lab/one-v0", spec))().spec.max_episode_steps == 33
    evaluation = gym.make("Pendulum-v1", max_episode_steps=44).spec
    env = find_env(with_env("lab/two-v0", spec, eval_env=evaluation))()
    assert env.spec.max_episode_steps == 44 and env.spec.id == "Pendulum-v1"


def test_a_missing_environment_package_is_an_error_that_says_how_to_do_without(empty_minari_root):
    """Nobody should find out in the morning that nothing was evaluated."""
    name = with_env("lab/pump-v0")

    def change(raw):
        metadata = json.loads(raw)
        spec = json.loads(metadata["env_spec"]) | {"entry_point": "no_such_package.envs:Env"}
        return json.dumps(metadata | {"env_spec": json.dumps(spec)}).encode()

    break_file(empty_minari_root, "metadata.json", change)
    assert len(load(name).episode) == 4
    with refused(r"--eval-episodes 0\): .*no_such_package"):
        find_env(name)
    assert find_env(name, "Pendulum-v1")().spec.id == "Pendulum-v1"


@pytest.mark.parametrize(
    ("name", "eval_env"),
    [
        ("D4RL/antmaze/umaze-v1", False),
        ("D4RL/antmaze/umaze-diverse-v1", False),
        ("D4RL/antmaze/medium-play-v1", True),
        ("D4RL/pointmaze/umaze-v2", True),
    ],
)
def test_only_umaze_of_antmaze_is_evaluated_where_its_data_were_collected(name, eval_env):
    """The evaluation maze of these sets is the data's turned by 180 degrees."""
    collection = gym.make("Pendulum-v1", max_episode_steps=33).spec
    evaluation = gym.make("Pendulum-v1", max_episode_steps=44).spec
    with_env(name, collection, eval_env=evaluation)
    assert find_env(name)().spec.max_episode_steps == (44 if eval_env else 33)


# ---- Transforms for training ----


def test_normalize_obs_standardises_by_the_statistics_of_the_data():
    rng = np.random.default_rng(0)
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    raw = [rng.normal([5, -100, 7], [0.1, 30, 0], (T + 1, 3)) for T in (40, 60)]
    name = store([episode(len(x) - 1, observations=x) for x in raw], space)
    s = np.concatenate([x[:-1] for x in raw])
    data = load(name, normalize_obs=True)
    batch, units = data.transitions, data.units
    assert np.allclose(units.obs_mean, s.mean(0), rtol=1e-6)
    assert np.allclose(units.obs_std, s.std(0) + 1e-3, rtol=1e-4)
    assert np.allclose(batch.obs, (s - s.mean(0)) / (s.std(0) + 1e-3), atol=1e-3)
    assert torch.isfinite(batch.obs).all()  # the third feature is constant
    assert torch.equal(batch.next_obs[:39], batch.obs[1:40])  # by the same statistics
    assert torch.equal(units.obs(raw[0][:5]), batch.obs[:5])
    plain = load(name)
    assert np.array_equal(plain.transitions.obs, s.astype(np.float32))
    assert plain.units.obs_mean.tolist() == [0] * 3 and plain.units.obs_std.tolist() == [1] * 3


def test_normalize_obs_warns_of_a_column_that_it_hides(capsys):
    """Its deviation is far below the 1e-3 that is added; constants, but for rounding, are not."""
    columns = np.random.default_rng(0).normal([5, 0, 1e6], [0.1, 2e-6, 1e-9], (11, 3))
    name = store([episode(10, observations=columns)], spaces.Box(-1e7, 1e7, (3,), np.float64))
    for normalize_obs in (True, False):
        load(name, normalize_obs=normalize_obs)
        text = capsys.readouterr().out
        assert ("observation 1 varies by only" in text) == normalize_obs
        assert text.count("varies by only") == normalize_obs


@pytest.mark.parametrize(
    "path", ["lab/a-v0/", "/lab/a-v0", "../lab/a-v0", "lab//a-v0", "./a-v0", ""]
)
def test_an_id_has_one_spelling(path):
    """Or ope.py would not see that a run was trained on what it is judged by."""
    with refused("an id is needed, as in mylab/logs-v0, not a path"):
        load(f"{path}[:80%]")


def test_reward_scale_and_shift_change_the_training_only(capsys):
    data = load_stored([episode(3), episode(1)], reward_scale=10.0, reward_shift=-0.5)
    assert data.transitions.reward.tolist() == [9.5, 19.5, 29.5, 9.5]  # scaled first, then shifted
    assert data.returns.tolist() == [6, 1]
    assert (data.reward_scale, data.reward_shift) == (10.0, -0.5)
    assert "rewards x 10 + -0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "scale"), [((3, 1, 2), 1000 / (6 - 1)), ((3, 3), 1.0)], ids=["range", "equal"]
)
def test_return_range_scales_returns_to_a_range_of_1000(lengths, scale, capsys):
    """Where all returns are equal the rewards stay as they are, and a line says so."""
    data = load_stored([episode(T) for T in lengths], reward_scale="return-range")
    assert data.reward_scale == scale
    assert data.transitions.reward[:3].tolist() == [scale, 2 * scale, 3 * scale]
    assert data.returns[0] == 6
    assert f"rewards x {scale:g} + 0" in capsys.readouterr().out


def test_return_range_of_returns_that_differ_by_rounding_alone():
    """Sums of the same rewards in another order."""
    rewards = [np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1])]
    assert rewards[0].sum() != rewards[1].sum()
    around_0 = [np.array([0.1, 0.2, -0.3]), np.array([-0.3, 0.2, 0.1])]
    for name, pair in (("lab/one-v0", rewards), ("lab/two-v0", around_0)):
        store([episode(3, rewards=r) for r in pair], name=name)
        assert load(name, reward_scale="return-range").reward_scale == 1.0


# ---- Logged probabilities of the behaviour ----


def test_behavior_log_prob_of_length_T_and_of_T_plus_1():
    values = np.log([0.5, 0.25, 0.125])
    plain = episode(infos={"behavior_log_prob": values})
    with_reset_row = episode(infos={"behavior_log_prob": np.array([np.nan, *values])})
    data = load_stored([plain, with_reset_row, episode(2)])
    assert data.behavior_log_prob[:6].tolist() == [*values, *values]
    assert data.behavior_log_prob.dtype == np.float64
    assert np.isnan(data.behavior_log_prob[6:]).all() and len(data.behavior_log_prob) == 8


# ---- Built-in datasets ----

BUILTIN = {  # episodes, steps, and for each column the sum of x[t] cos(t): observations, actions,
    # rewards, terminations, truncations, behavior_log_prob
    "pendulum/random-v0": (100, 20000, [-1.11982, -9.34456, 16.21346, 0, 0]),
    "pendulum/medium-v0": (100, 20000, [1.20618, 6.47962, 28.76006, 0, 0]),
    "pendulum/expert-v0": (100, 20000, [-0.21587, -14.9984, 25.00842, 0, 0]),
    "pendulum/mixed-v0": (100, 20000, [-9.61926, 7.06863, 32.8796, 0, 0]),
    "cartpole/random-v0": (933, 20034, [37.2474, -59.9761, 0.94077, 10.3174, 0, -0.65209]),
    "cartpole/medium-v0": (137, 20039, [-17.3282, -26.8185, 1.5314, -13.0668, 0, -68.5434]),
    "cartpole/expert-v0": (40, 20000, [-3.5305, 7.0488, 0.62606, 0, 0.13584, 0]),
    "cartpole/mixed-v0": (90, 20373, [-36.5541, 18.4193, 1.19421, 4.9400, -2.05143, -22.4432]),
}
RETURNS = {"random": -1206.9, "medium": -682.4, "expert": -142.52, "mixed": -577.67}
RETURNS = {f"pendulum/{quality}-v0": x for quality, x in RETURNS.items()}
RETURNS |= {"cartpole/random-v0": 21.473, "cartpole/medium-v0": 146.27}
RETURNS |= {"cartpole/expert-v0": 500, "cartpole/mixed-v0": 226.37}
COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations")


@pytest.fixture(scope="module")
def builtin():
    """Makes each at most once."""
    return functools.cache(cql.builtin_dataset)


def column(episodes, name, steps=None):
    """Of the first `steps` rows of each episode, or all."""
    rows = [np.asarray(getattr(e, name), float)[:steps] for e in episodes]
    return np.concatenate([x.ravel() for x in rows])


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_datasets_are_what_they_were(builtin, name, monkeypatch, capsys):
    """Nobody's results may change silently. The last bits of NumPy's sines depend on the CPU, and
    the pendulum is chaotic: its episodes are compared while they have not grown."""
    episodes, _, make_env, (low, high) = builtin(name)
    columns = [column(episodes, x, 8 if "pendulum" in name else None) for x in COLUMNS]
    if name.startswith("cartpole"):
        columns.append(np.concatenate([e.infos["behavior_log_prob"] for e in episodes]))
    found = [(x * np.cos(np.arange(len(x)))).sum() for x in columns]
    assert (len(episodes), sum(len(e.rewards) for e in episodes)) == BUILTIN[name][:2]
    assert found == pytest.approx(BUILTIN[name][2], abs=2e-4)

    monkeypatch.setattr(cql, "builtin_dataset", builtin)
    data = load(name)
    size, lengths = len(data.episode), data.episode.bincount()
    assert size >= 20_000 > size - lengths[-1]  # the last episode is complete, and needed
    assert data.returns.mean() == pytest.approx(RETURNS[name], rel=1e-3)
    assert f"{name}: built in" in capsys.readouterr().out
    assert data.reference == (low, high) and low < high and make_env() is not None
    cartpole = name.startswith("cartpole")
    assert data.units.discrete == cartpole
    ends = torch.cat([data.episode.diff() > 0, torch.tensor([True])])
    assert data.transitions.terminal[~ends].sum() == 0
    if cartpole:  # terminal, or cut at 500 steps
        assert torch.equal(data.transitions.terminal[ends] == 0, lengths == 500)
        assert np.array_equal(data.returns, lengths)
    else:  # its policy is part point mass: it has no density
        assert data.transitions.terminal.sum() == 0 and not any(e.infos for e in episodes)


def test_reference_scores_are_the_returns_of_the_random_and_the_expert_dataset(builtin):
    for env in ("pendulum", "cartpole"):
        returns = [
            np.mean([e.rewards.sum() for e in builtin(f"{env}/{quality}-v0")[0]])
            for quality in ("random", "expert")
        ]
        assert builtin(f"{env}/random-v0")[3] == pytest.approx(returns, rel=0.03)


def assert_same_episodes(one, other):
    for a, b in zip(one, other, strict=True):
        assert all(np.array_equal(getattr(a, x), getattr(b, x)) for x in COLUMNS)
        assert a.infos.keys() == b.infos.keys()
        assert all(np.array_equal(a.infos[key], b.infos[key]) for key in a.infos)


@pytest.mark.parametrize("name", ["cartpole/mixed-v0", "pendulum/mixed-v0"])
def test_built_in_datasets_are_always_the_same(builtin, name):
    np.random.seed(1)
    torch.manual_seed(1)
    state, rng = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert_same_episodes(cql.builtin_dataset(name)[0], builtin(name)[0])
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), rng)


def test_no_episode_counts_twice():
    name = store([episode() for _ in range(4)])
    assert len(load(f"{name}[:50%]", f"{name}[50%:]").returns) == 4
    for parts in ((name, name), (f"{name}[:51%]", f"{name}[50%:]"), (f"{name}[50%:]", name)):
        with refused("its episodes would count twice"):
            load(*parts)


@pytest.mark.parametrize("name", ["cartpole/0.70-v0", "pendulum/0.0-v0", "pendulum/0.6-v0"])
def test_no_dataset_has_two_names(name):
    """pendulum/0.6-v0 is medium, 0.0 expert: ope.py compares ids to know what a run has seen."""
    with refused("not built in"):
        cql.builtin_dataset(name)


def test_a_number_in_the_id_is_the_share_of_random_actions(builtin):
    episodes = builtin("cartpole/0.35-v0")[0]
    assert sum(len(e.actions) for e in episodes) >= 20_000
    p = np.exp(np.concatenate([e.infos["behavior_log_prob"] for e in episodes]))
    assert set(p.round(9)) == {0.175, 0.825}
    assert (p < 0.5).mean() == pytest.approx(0.175, abs=0.01)


@pytest.mark.parametrize("name", ["cartpole/random-v0", "cartpole/medium-v0", "cartpole/expert-v0"])
def test_behavior_log_probs_are_the_true_ones(builtin, name):
    """Recomputed from the description: the controller, but with probability eps uniform."""
    eps = {"random": 1.0, "medium": 0.3, "expert": 0.0}[re.split("[/-]", name)[1]]
    weights = [0, 0, 0, 1] if "medium" in name else [0.1, 0.5, 1.0, 0.5]
    for e in builtin(name)[0]:
        agrees = e.actions == (e.observations[:-1] @ np.array(weights) > 0)
        expected = np.log(np.where(agrees, 1 - eps / 2, eps / 2))
        assert np.allclose(e.infos["behavior_log_prob"], expected, atol=1e-12)


def test_behavior_log_probs_of_the_mixed_dataset_are_one_eps_per_episode(builtin):
    """Each episode has at most two values, eps / 2 and 1 - eps / 2; the rarer action occurs as
    often as eps says, over all episodes; eps is spread over (0, 1)."""
    rare, expected, variance, epsilons = 0, 0.0, 0.0, []
    for e in builtin("cartpole/mixed-v0")[0]:
        agrees = e.actions == (e.observations[:-1] @ np.array([0.1, 0.5, 1.0, 0.5]) > 0)
        p = np.exp(e.infos["behavior_log_prob"])
        eps = 2 * (1 - p[agrees][0]) if agrees.any() else 2 * p[0]
        assert np.allclose(p, np.where(agrees, 1 - eps / 2, eps / 2))
        rare, expected = rare + (~agrees).sum(), expected + len(p) * eps / 2
        variance += len(p) * eps / 2 * (1 - eps / 2)
        epsilons.append(eps)
    assert abs(rare - expected) < 4 * variance**0.5
    assert np.quantile(epsilons, [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.1)


@pytest.mark.parametrize("name", ["cartpole/medium-v0", "pendulum/expert-v0"])
def test_built_in_transitions_are_those_of_gymnasium(builtin, name):
    """Replayed action by action: nothing is shifted, the last observation is the true one."""
    episodes, _, make_env, _ = builtin(name)
    env = make_env()
    for number in (0, 7, len(episodes) - 1):
        e = episodes[number]
        assert np.array_equal(env.reset(seed=number)[0], e.observations[0])
        for t, action in enumerate(e.actions):
            obs, *rest = env.step(action)
            assert np.array_equal(obs, e.observations[t + 1])
            assert rest[:3] == [e.rewards[t], e.terminations[t], e.truncations[t]]


@pytest.mark.parametrize("name", ["cartpole/mixed-v0", "pendulum/medium-v0"])
def test_built_in_datasets_can_be_stored_and_the_stored_one_wins(builtin, name, capsys):
    episodes, _, make_env, (low, high) = builtin(name)
    env = make_env().spec
    stored = minari.create_dataset_from_buffers(
        "lab/copy-v0", episodes, env=env, ref_min_score=low, ref_max_score=high
    )
    assert stored.total_steps == sum(len(e.actions) for e in episodes)
    copy, original = load("lab/copy-v0"), load(name)
    for one, other in zip(copy.transitions, original.transitions, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(copy.episode, original.episode)
    assert np.array_equal(copy.returns, original.returns)
    both = copy.behavior_log_prob, original.behavior_log_prob
    assert np.array_equal(*both, equal_nan=True)
    assert copy.reference == original.reference == (low, high)
    assert copy.make_env().spec.id == original.make_env().spec.id
    assert f"{name}: built in" in capsys.readouterr().out
    minari.create_dataset_from_buffers(name, episodes[:2], env=env)
    assert load(name).episode.max() == 1
    printed = capsys.readouterr().out
    assert f"{name}: read from" in printed and "built in" not in printed
