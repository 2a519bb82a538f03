"""The loader, on cql.py's copy of the data block (test_copies.py: the copies are the same text).
Most datasets here go through Minari's own files, which accept nearly everything."""

import json
import math
import re

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

import cql
from cql import UserError

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


def load(*names, env_id=None, normalize_obs=False, reward_scale=1.0, reward_shift=0.0):
    transform = normalize_obs, reward_scale, reward_shift
    return cql.load_dataset(names, env_id, *transform, torch.device("cpu"))


def load_stored(episodes, *space, **flags):
    return load(store(episodes, *space), **flags)


def from_memory(monkeypatch, episodes, observation_space=LINE, action_space=UNIT, env=None):
    """For what Minari itself refuses to store."""
    source = episodes, observation_space, action_space, env, None
    monkeypatch.setattr(cql, "open_dataset", lambda name: source)
    return load("lab/pump-v0")


def one_line(error):
    """The message of a UserError: one line, no paragraph, no traceback."""
    text = str(error.value)
    assert "\n" not in text and text
    return text


# ---- Alignment ----


def test_a_terminated_and_a_truncated_episode_give_exact_transitions(capsys):
    episodes = [episode(3, 100, terminated=True), episode(2, 200), episode(1, 300)]
    data = load_stored(episodes)
    obs = [100, 101, 102, 200, 201, 300]
    assert data.all.obs[:, 0].tolist() == obs
    assert data.all.next_obs[:, 0].tolist() == [o + 1 for o in obs]  # 103 and 202: the true last
    assert data.all.terminal.tolist() == [0, 0, 1, 0, 0, 0]
    assert data.all.reward.tolist() == [1, 2, 3, 1, 2, 1]
    assert data.all.action[:, 0].tolist() == [-0.5, 0, 0.5, -0.5, 0.5, -0.5]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.train.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.returns.tolist() == [6, 3, 1]
    assert np.isnan(data.behavior_log_prob).all() and data.behavior_log_prob.shape == (6,)
    shapes = [tuple(x.shape) for x in data.all]
    assert shapes == [(6, 1), (6, 1), (6,), (6, 1), (6,)]
    assert all(x.dtype == torch.float32 for x in data.all)
    assert data.make_env is None and data.reference is None
    printed = capsys.readouterr().out
    assert "6 transitions in 3 episodes, return 3.3 on average, 1.0 to 6.0" in printed


def test_terminated_and_truncated_at_once_is_terminal():
    end = np.array([False, True])
    both = episode(2, terminations=end, truncations=end)
    assert load_stored([both]).all.terminal.tolist() == [0, 1]


def test_no_transition_joins_two_episodes():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 50)
    data = load_stored([episode(int(T), 1000 * k) for k, T in enumerate(lengths)])
    assert len(data.all.obs) == lengths.sum()
    assert torch.equal(data.all.next_obs, data.all.obs + 1)
    assert torch.equal(data.episode, (data.all.obs[:, 0] // 1000).long())


def test_batches_are_rows_of_the_data():
    data = load_stored([episode(20, 0), episode(20, 100)])
    torch.manual_seed(0)
    batch = data.sample(1000)
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(batch.reward, batch.obs[:, 0] % 100 + 1)
    assert len(batch.obs.unique()) == 40
    data.train = data.train[:5]  # what --top-fraction and the like do
    assert data.sample(1000).obs.max() == 4


def test_discounted_returns_end_with_the_episode():
    data = load_stored([episode(3, terminated=True), episode(2)])
    expected = [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 1 + 0.5 * 2, 2]
    assert data.discounted_returns(0.5).tolist() == expected
    assert data.discounted_returns(0.0).tolist() == [1, 2, 3, 1, 2]
    data = load("lab/pump-v0", reward_scale=2.0, reward_shift=1.0)
    assert data.discounted_returns(0.0).tolist() == [3, 5, 7, 3, 5]  # of the rewards in training


# ---- Observations ----


NESTED = spaces.Dict(
    b=spaces.Discrete(3, start=1),
    a=spaces.Tuple([spaces.Box(-1, 1, (2, 2), np.float64), spaces.Discrete(2)]),
    c=spaces.Dict(z=spaces.Box(0, 5, (), np.float32), y=spaces.Box(-9, 9, (1,), np.int32)),
)


def stack(space, samples):
    if isinstance(space, spaces.Dict):
        return {k: stack(s, [x[k] for x in samples]) for k, s in space.items()}
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
    assert np.array_equal(data.all.obs.numpy(), flat[[0, 1, 2, 3, 4, 6, 7]])
    assert np.array_equal(data.all.next_obs.numpy(), flat[[1, 2, 3, 4, 5, 7, 8]])


def test_observations_of_the_wrong_number_are_an_error_not_broadcast():
    """One observation without the batch axis would otherwise pass for N observations of size 1."""
    units = cql.Units(spaces.Box(-1, 1, (3,), np.float32), UNIT)
    assert units.obs(np.zeros((5, 3))).shape == (5, 3)
    for wrong in (np.zeros(3), np.zeros((5, 1)), np.zeros((3, 2))):
        with pytest.raises((RuntimeError, UserError)):
            units.obs(wrong)
    with pytest.raises((RuntimeError, UserError)):
        cql.Units(LINE, spaces.Box(-1, 1, (3,), np.float32)).action(np.zeros((5, 1)))


# ---- Actions ----


def test_discrete_actions_count_from_0_inside_and_from_start_outside(capsys):
    space = spaces.Discrete(4, start=5)
    data = load_stored([episode(3, actions=np.array([5, 7, 8]))], LINE, space)
    assert data.all.action.tolist() == [0, 2, 3] and data.all.action.dtype == torch.int64
    assert data.units.env_action(data.all.action).tolist() == [5, 7, 8]
    assert data.units.action_dim == 4 and data.units.discrete
    assert "actions [1] (counted from 0) never occur" in capsys.readouterr().out


def test_box_actions_are_scaled_by_their_bounds_there_and_back():
    low = np.array([[-1, 0, 10], [-4, -0.5, -30]], np.float32)
    high = np.array([[1, 8, 11], [-3, 0.25, 50]], np.float32)
    space = spaces.Box(low, high)
    space.seed(0)
    action = np.array([space.sample() for _ in range(4)] + [low, high, (low + high) / 2])
    data = load_stored([episode(7, actions=action)], LINE, space)
    expected = (2 * (action - low) / (high - low) - 1).reshape(7, 6)
    assert data.all.action.shape == (7, 6)
    assert np.allclose(data.all.action, expected, atol=1e-6)
    assert data.all.action[4:].tolist() == [[-1] * 6, [1] * 6, [0] * 6]
    back = data.units.env_action(data.all.action)
    assert back.shape == (7, 2, 3) and np.allclose(back, action, rtol=1e-6, atol=2e-6)
    assert all(space.contains(x) for x in back)


@pytest.mark.parametrize("sign", [-1, 1])
def test_actions_are_clipped_within_a_thousandth_of_the_range_and_no_further(sign):
    space = spaces.Box(-2, 4, (1,), np.float64)  # range 6
    edge = 4 if sign > 0 else -2
    action = np.array([[0.0], [edge + sign * 0.0059], [1.0]])
    data = load_stored([episode(actions=action)], LINE, space)
    assert data.all.action[1].item() == sign
    action[1] = edge + sign * 0.0061
    with pytest.raises(UserError) as error:
        load(store([episode(), episode(actions=action)], LINE, space, "lab/far-v0"))
    text = one_line(error)
    assert text.startswith("dataset lab/far-v0, episode 1: step 1: the action is not in Box(")


# ---- Broken datasets: one line that names dataset, episode and step ----


def nan(shape, index, value=math.nan):
    x = np.zeros(shape)
    x[index] = value
    return x


BROKEN = {  # id: (what episode 1 has, what the message says)
    "T observations": (
        {"observations": np.zeros((3, 1))},
        "3 observations for 3 actions, one more is needed",
    ),
    "T + 2 observations": ({"observations": np.zeros((5, 1))}, "5 observations for 3 actions"),
    "feature size": ({"observations": np.zeros((4, 2))}, r"shape \(2,\) .*do not fit Box"),
    "no feature axis": ({"observations": np.zeros(4)}, r"shape \(\) .*do not fit Box"),
    "rewards shorter": ({"rewards": np.zeros(2)}, "rewards must be 3 numbers, one per action"),
    "rewards (T, 1)": ({"rewards": np.zeros((3, 1))}, "rewards must be 3 numbers"),
    "terminations longer": (
        {"terminations": np.zeros(4, bool)},
        "terminations must be 3 numbers, one per action",
    ),
    "truncations shorter": ({"truncations": np.zeros(2, bool)}, "truncations must be 3"),
    "actions shorter": ({"actions": np.zeros((2, 1), np.float32)}, "4 observations for 2 actions"),
    "actions of the wrong size": (
        {"actions": np.zeros((3, 2), np.float32)},
        r"actions .*\(3, 2\).*\(3, 1\)",
    ),
    "no end flag": ({"truncations": np.zeros(3, bool)}, "neither terminated nor truncated"),
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
    "NaN reward": ({"rewards": nan(3, 1)}, "step 1: the reward is NaN"),
    "infinite reward": ({"rewards": nan(3, 2, -np.inf)}, "step 2: the reward is NaN or inf"),
    "NaN action": ({"actions": nan((3, 1), 1)}, "step 1: the action is not in Box"),
    "infinite action": ({"actions": nan((3, 1), 0, np.inf)}, "step 0: the action is not in Box"),
    "action beyond the bounds": (
        {"actions": nan((3, 1), 2, 1.01)},
        "step 2: the action is not in Box",
    ),
    "actions of a wrong type": ({"actions": np.zeros((3, 1), bool)}, "actions .*type bool"),
    "log-probabilities of a wrong length": (
        {"infos": {"behavior_log_prob": np.zeros(2)}},
        "behavior_log_prob.* 3 ",
    ),
    "log-probabilities as a column": (
        {"infos": {"behavior_log_prob": np.zeros((3, 1))}},
        "behavior_log_prob",
    ),
    "terminations that are no flags": (
        {"terminations": np.array([0.0, 0.0, 2.0])},
        "step 2: .*terminations",
    ),
    "NaN terminations": ({"terminations": nan(3, 1)}, "step 1: .*terminations"),
}


NO_STEPS = {
    "observations": np.zeros((1, 1)),
    "actions": np.zeros((0, 1), np.float32),
    "rewards": np.zeros(0),
    "terminations": np.zeros(0, bool),
    "truncations": np.zeros(0, bool),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_episodes(case):
    changed, message = BROKEN[case]
    with pytest.raises(UserError, match=message) as error:
        load_stored([episode(), episode(**changed), episode()])
    assert one_line(error).startswith("dataset lab/pump-v0, episode 1: ")


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0, 3, 1]), r"step 1: the action is not in Discrete\(3\)"),
        (np.array([0, 1, -1]), r"step 2: the action is not in Discrete\(3\)"),
        (np.array([0.0, 1.0, 2.0]), "actions must be 3 integers"),
        (np.array([[0], [1], [2]]), "actions must be 3 integers"),
    ],
)
def test_broken_discrete_actions(actions, message):
    with pytest.raises(UserError, match=f"^dataset lab/pump-v0, episode 0: {message}"):
        load_stored([episode(actions=actions)], LINE, spaces.Discrete(3))


@pytest.mark.parametrize(
    ("space", "observations"),
    [
        (spaces.Discrete(3), np.array([0, 1, 3, 2])),
        (spaces.Discrete(3, start=1), np.array([1, 2, 0, 3])),
        (spaces.Discrete(3), np.array([0, 1, np.nan, 1])),
        (spaces.Discrete(3), np.array([0, 1, 1.5, 1])),
        (spaces.Dict(a=LINE, b=spaces.Discrete(2)), {"a": np.zeros((4, 1)), "b": nan(4, 2, 7)}),
    ],
)
def test_broken_discrete_observations(space, observations):
    with pytest.raises(UserError, match=r"step 2: .*not in Discrete\(") as error:
        load_stored([episode(observations=observations)], space)
    assert one_line(error).startswith("dataset lab/pump-v0, episode 0: ")


@pytest.mark.parametrize(
    "observations",
    [
        {"a": np.zeros((4, 1))},
        {"a": np.zeros((4, 1)), "c": np.zeros((4, 1))},
        {"a": np.zeros((4, 1)), "b": np.zeros((3, 1))},
        {"a": np.zeros((4, 1)), "b": np.zeros((4, 2))},
        {"a": np.zeros((4, 1)), "b": np.zeros((4, 1)), "c": np.zeros((4, 1))},
        np.zeros((4, 2)),
        (np.zeros((4, 1)), np.zeros((4, 1))),
    ],
    ids=["missing", "other key", "shorter", "wider", "one more", "array", "tuple"],
)
def test_broken_dict_observations(monkeypatch, observations):
    with pytest.raises(UserError) as error:
        broken = episode(observations=observations)
        from_memory(monkeypatch, [broken], spaces.Dict(a=LINE, b=LINE))
    assert one_line(error).startswith("dataset lab/pump-v0, episode 0: ")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (NO_STEPS, "it has no steps"),
        ({"observations": np.array([["a"]] * 4)}, "do not fit Box"),
        ({"rewards": np.array(["1", "2", "3"])}, "rewards must be 3 numbers"),
        ({"rewards": np.array([1, None, 3], dtype=object)}, "rewards must be 3 numbers"),
        ({"truncations": np.array(["no", "no", "yes"])}, "truncations must be 3 numbers"),
        ({"infos": {"behavior_log_prob": np.array(["a", "b", "c"])}}, "behavior_log_prob"),
        ({"infos": {"behavior_log_prob": np.float64(0)}}, "behavior_log_prob"),
    ],
)
def test_what_minari_itself_would_not_store(monkeypatch, changed, message):
    with pytest.raises(UserError, match=message) as error:
        from_memory(monkeypatch, [episode(), episode(**changed)])
    assert one_line(error).startswith("dataset lab/pump-v0, episode 1: ")


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (LINE, spaces.Box(-np.inf, np.inf, (1,)), "has no finite bounds"),
        (LINE, spaces.Box(0, np.inf, (1,)), "has no finite bounds"),
        (LINE, spaces.Box(1, 1, (1,)), "has no finite bounds"),
        (LINE, spaces.MultiDiscrete([2, 3]), r"actions of MultiDiscrete\(\[2 3\]\) are not"),
        (LINE, spaces.MultiBinary(3), r"actions of MultiBinary\(3\) are not supported"),
        (LINE, spaces.Dict(a=UNIT), "actions of Dict"),
        (LINE, spaces.Box(0, 9, (1,), np.int64), r"actions of Box\(.*int64\) are not supported"),
        (spaces.MultiBinary(3), UNIT, r"observations of MultiBinary\(3\) are not supported"),
        (spaces.MultiDiscrete([2, 2]), UNIT, "observations of MultiDiscrete"),
        (spaces.Text(5), UNIT, "observations of Text.* are not supported"),
        (spaces.Dict(mission=spaces.Text(5)), UNIT, "observations of Text"),
        (spaces.Tuple([LINE, spaces.MultiBinary(2)]), UNIT, "observations of MultiBinary"),
        (spaces.Box(0, 255, (32, 32, 3), np.uint8), UNIT, "image observations are not supported"),
        (spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), np.uint8)), UNIT, "image observations"),
    ],
)
def test_spaces_that_are_not_supported(monkeypatch, observation_space, action_space, message):
    with pytest.raises(UserError, match=message) as error:
        from_memory(monkeypatch, [episode()], observation_space, action_space)
    assert one_line(error).startswith("dataset lab/pump-v0: ")


def test_a_dataset_without_episodes(monkeypatch):
    with pytest.raises(UserError, match=r"^dataset lab/pump-v0: it has no episodes$"):
        from_memory(monkeypatch, [])


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
        ("metadata.json", lambda raw: raw[:-20], "JSONDecodeError"),
        ("metadata.json", change_metadata(data_format=None), "KeyError: 'data_format'"),
        ("metadata.json", change_metadata(minari_version="9.0.0"), "Minari 9.0.0"),
    ],
    ids=["truncated", "empty", "broken metadata", "no data_format", "newer Minari"],
)
def test_broken_files(empty_minari_root, name, change, reason):
    store([episode() for _ in range(50)])
    break_file(empty_minari_root, name, change)
    with pytest.raises(UserError, match=reason) as error:
        load("lab/pump-v0")
    text = one_line(error)
    assert text.startswith("dataset lab/pump-v0: cannot be loaded (")
    assert str(empty_minari_root / "lab/pump-v0/data") in text  # where to put the right files


@pytest.mark.parametrize("name", ["main_data.hdf5", "metadata.json"])
def test_missing_files(empty_minari_root, name):
    (empty_minari_root / store([episode()]) / "data" / name).unlink()
    with pytest.raises(
        UserError, match=r"dataset lab/pump-v0: cannot be loaded .*No data"
    ) as error:
        load("lab/pump-v0")
    one_line(error)


def test_an_unknown_id_offline(monkeypatch, empty_minari_root, capsys):
    asked = []

    def no_network(dataset_id):
        asked.append(dataset_id)
        raise ConnectionError("[Errno -3] Temporary failure in name resolution\nmore")

    monkeypatch.setattr(minari, "download_dataset", no_network)
    with pytest.raises(UserError) as error:
        load("mujoco/hopper/medium-v0")
    text, folder = one_line(error), empty_minari_root / "mujoco/hopper/medium-v0/data"
    assert asked == ["mujoco/hopper/medium-v0"]
    assert "mujoco/hopper/medium-v0" in text and "name resolution" in text and str(folder) in text
    assert f"not in {empty_minari_root}, downloading" in capsys.readouterr().out
    # Following the advice works.
    store([episode()], name="lab/pump-v0")
    folder.parent.mkdir(parents=True)
    (empty_minari_root / "lab/pump-v0/data").rename(folder)
    assert len(load("mujoco/hopper/medium-v0").all.reward) == 3


@pytest.mark.parametrize("name", ["mujoco/hopper/medium", "lab/pump", "pump-v"])
def test_an_id_without_version_is_told_apart_from_a_failed_download(monkeypatch, name):
    def no_download(dataset_id):
        raise AssertionError("asked the network for a malformed id")

    monkeypatch.setattr(minari, "download_dataset", no_download)
    with pytest.raises(UserError, match=rf"dataset {name}: .*version.*-v0") as error:
        load(name)
    one_line(error)


@pytest.mark.parametrize("name", ["pendulum/mixd-v0", "pendulum/mixed-v1", "cartpole/mixed"])
def test_a_misspelt_built_in_dataset_lists_the_right_ones(monkeypatch, name):
    monkeypatch.setattr(minari, "download_dataset", lambda name: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=rf"dataset {name}: .*pendulum/mixed-v0"):
        load(name)


# ---- Several ids, reference scores, environments ----


def with_env(name, env="Pendulum-v1", spaces_of=None, **extra):
    made = gym.make(env)
    made.action_space.seed(0)
    T, obs = 4, made.observation_space
    actions = np.array([made.action_space.sample() for _ in range(T)])
    shape = (T + 1, *obs.shape)
    buffer = episode(T, observations=np.zeros(shape, np.float32), actions=actions)
    minari.create_dataset_from_buffers(name, [buffer], env=env, **extra)
    return name


def test_several_ids_are_mixed_in_order():
    one = store([episode(3, 0), episode(2, 100)], name="lab/one-v0")
    two = store([episode(2, 200)], name="lab/two-v0")
    data = load(one, two)
    assert data.all.obs[:, 0].tolist() == [0, 1, 2, 100, 101, 200, 201]
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
    with pytest.raises(UserError, match="lab/two-v0: its spaces are not those of lab/one-v0"):
        load(one, two)


def test_an_error_in_the_second_of_two_datasets_names_it():
    one = store([episode(), episode()], name="lab/one-v0")
    two = store([episode(), episode(rewards=nan(3, 2))], name="lab/two-v0")
    with pytest.raises(UserError, match=r"^dataset lab/two-v0, episode 1: step 2: the reward"):
        load(one, two)


def test_reference_scores_are_kept_only_where_they_are_equal():
    first = with_env("lab/one-v0", ref_min_score=-1000.0, ref_max_score=-150.0)
    same = with_env("lab/two-v0", ref_min_score=-1000.0, ref_max_score=-150.0)
    other = with_env("lab/three-v0", ref_min_score=-900.0, ref_max_score=-150.0)
    none = with_env("lab/four-v0")
    flat = with_env("lab/five-v0", ref_min_score=-99.0, ref_max_score=-99.0)  # no scale
    assert load(first).reference == load(first, same).reference == (-1000.0, -150.0)
    for names in (
        (first, other),
        (first, none),
        (none, first),
        (first, other, first),
        (none,),
        (flat,),
    ):
        assert load(*names).reference is None
    assert load("pendulum/random-v0", "pendulum/expert-v0").reference == (-1230.0, -146.0)


def test_a_dataset_without_environment_and_env_id(capsys):
    name = store([episode()])
    assert load(name).make_env is None
    printed = capsys.readouterr().out
    assert "no evaluation" in printed and "--env-id" in printed and "ope.py" in printed

    class Line(gym.Env):
        observation_space, action_space = LINE, UNIT

        def reset(self, seed=None, options=None):
            return np.zeros(1, np.float32), {}

    gym.register("Line-v0", Line, max_episode_steps=7)
    try:
        assert load(name, env_id="Line-v0").make_env().spec.id == "Line-v0"
    finally:
        del gym.registry["Line-v0"]
    assert "evaluation in Line-v0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", "environment CartPole-v1: its spaces are not those of the data"),
        ("MountainCarContinuous-v0", "MountainCarContinuous-v0: its spaces are not"),
        ("NoSuchEnv-v0", "environment NoSuchEnv-v0: .*"),
        ("no_such_package:Env-v0", "environment no_such_package:Env-v0: .*no_such_package"),
    ],
)
def test_a_wrong_env_id_is_an_error(env_id, message):
    with pytest.raises(UserError, match=message) as error:
        load(with_env("lab/one-v0"), env_id=env_id)
    one_line(error)


def test_an_environment_whose_observations_only_have_the_same_size_is_an_error():
    """Flat both are three numbers, but the one is a Dict: evaluating would crash later on."""

    class Parts(gym.Env):
        observation_space = spaces.Dict(angle=spaces.Box(-1, 1, (2,)), speed=LINE)
        action_space = spaces.Box(-2, 2, (1,), np.float32)

        def reset(self, seed=None, options=None):
            return self.observation_space.sample(), {}

    gym.register("Parts-v0", Parts, max_episode_steps=7)
    try:
        with pytest.raises(UserError, match=r"^environment Parts-v0: "):
            load(with_env("lab/one-v0"), env_id="Parts-v0")
    finally:
        del gym.registry["Parts-v0"]


def test_the_environment_of_the_dataset_is_used(capsys):
    spec = gym.make("Pendulum-v1", max_episode_steps=33).spec
    data = load(with_env("lab/one-v0", spec))
    assert data.make_env().spec.max_episode_steps == 33
    assert "evaluation in Pendulum-v1" in capsys.readouterr().out
    evaluation = gym.make("Pendulum-v1", max_episode_steps=44).spec
    env = load(with_env("lab/two-v0", spec, eval_env=evaluation)).make_env()
    assert env.spec.max_episode_steps == 44


def test_an_environment_without_time_limit_gets_one():
    """Pendulum never ends by itself; the longest episode in the data is the limit."""

    class Endless(gym.Env):
        observation_space, action_space = LINE, UNIT

        def reset(self, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.0, False, False, {}

    gym.register("Endless-v0", Endless)
    try:
        name = store([episode(3), episode(9), episode(4)])
        env, steps, truncated = load(name, env_id="Endless-v0").make_env(), 0, False
    finally:
        del gym.registry["Endless-v0"]
    env.reset()
    while not truncated and steps < 20:
        truncated, steps = env.step(np.zeros(1))[3], steps + 1
    assert steps == 9


def test_a_missing_environment_package_means_no_evaluation(empty_minari_root, capsys):
    name = with_env("lab/pump-v0")

    def change(raw):
        metadata = json.loads(raw)
        spec = json.loads(metadata["env_spec"]) | {"entry_point": "no_such_package.envs:Env"}
        return json.dumps(metadata | {"env_spec": json.dumps(spec)}).encode()

    break_file(empty_minari_root, "metadata.json", change)
    data = load(name)
    assert data.make_env is None and len(data.all.reward) == 4
    line = next(x for x in capsys.readouterr().out.splitlines() if "no evaluation" in x)
    assert "no_such_package" in line
    assert load(name, env_id="Pendulum-v1").make_env().spec.id == "Pendulum-v1"


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
    assert load(name).make_env().spec.max_episode_steps == (44 if eval_env else 33)


# ---- Transforms for training ----


def test_normalize_obs_standardises_by_the_statistics_of_the_data():
    rng = np.random.default_rng(0)
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    raw = [rng.normal([5, -100, 7], [0.1, 30, 0], (T + 1, 3)) for T in (40, 60)]
    episodes = [episode(len(x) - 1, observations=x) for x in raw]
    name = store(episodes, space)
    s = np.concatenate([x[:-1] for x in raw])
    data = load(name, normalize_obs=True)
    assert np.allclose(data.units.obs_mean, s.mean(0), rtol=1e-6)
    assert np.allclose(data.units.obs_std, s.std(0) + 1e-3, rtol=1e-4)
    expected = (s - s.mean(0)) / (s.std(0) + 1e-3)
    assert np.allclose(data.all.obs, expected, atol=1e-3)
    assert torch.isfinite(data.all.obs).all()  # the third feature is constant
    assert torch.equal(data.all.next_obs[:39], data.all.obs[1:40])  # by the same statistics
    assert torch.equal(data.units.obs(raw[0][:5]), data.all.obs[:5])
    plain = load(name)
    assert np.array_equal(plain.all.obs, s.astype(np.float32))
    assert plain.units.obs_mean.tolist() == [0] * 3 and plain.units.obs_std.tolist() == [1] * 3


def test_reward_scale_and_shift_change_the_training_only():
    name = store([episode(3), episode(1)])
    data = load(name, reward_scale=10.0, reward_shift=-0.5)
    assert data.all.reward.tolist() == [9.5, 19.5, 29.5, 9.5]  # scaled first, then shifted
    assert data.returns.tolist() == [6, 1]
    assert (data.reward_scale, data.reward_shift) == (10.0, -0.5)


def test_return_range_scales_returns_to_a_range_of_1000(capsys):
    data = load_stored([episode(3), episode(1), episode(2)], reward_scale="return-range")
    assert data.reward_scale == 1000 / (6 - 1)
    assert data.all.reward[:3].tolist() == [200, 400, 600]
    assert data.returns.tolist() == [6, 1, 3]
    assert "--reward-scale return-range is 200" in capsys.readouterr().out


def test_return_range_of_equal_returns_is_1_and_says_so(capsys):
    data = load_stored([episode(3), episode(3)], reward_scale="return-range")
    assert data.reward_scale == 1 and data.all.reward[:3].tolist() == [1, 2, 3]
    lines = [x for x in capsys.readouterr().out.splitlines() if "return-range" in x]
    assert len(lines) == 1 and "is 1" in lines[0] and "equal" in lines[0]


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

RETURNS = {  # DESIGN: about
    "pendulum/random-v0": -1200,
    "pendulum/medium-v0": -640,
    "pendulum/expert-v0": -140,
    "pendulum/mixed-v0": -550,
    "cartpole/random-v0": 22,
    "cartpole/medium-v0": 140,
    "cartpole/expert-v0": 500,
    "cartpole/mixed-v0": 250,
}


@pytest.fixture(scope="module")
def builtin():
    return {name: cql.builtin_dataset(name) for name in cql.BUILTIN}


@pytest.mark.parametrize("name", RETURNS)
def test_built_in_datasets_are_what_the_table_says(builtin, name, monkeypatch, capsys):
    assert set(cql.BUILTIN) == set(RETURNS)
    monkeypatch.setattr(cql, "builtin_dataset", builtin.get)
    data = load(name)
    size = len(data.all.reward)
    last = (data.episode == data.episode[-1]).sum().item()
    assert size >= 20_000 > size - last  # the last episode is complete, and needed
    assert data.returns.mean() == pytest.approx(RETURNS[name], rel=0.12)
    printed = capsys.readouterr().out
    assert f"{name}: built in" in printed and "evaluation in" in printed
    low, high = data.reference
    assert low < high and data.make_env() is not None
    cartpole = name.startswith("cartpole")
    assert data.units.discrete == cartpole
    ends = torch.cat([data.episode.diff() > 0, torch.tensor([True])])
    if cartpole:  # terminal, or cut at 500 steps
        lengths = data.episode.bincount()
        assert torch.equal(data.all.terminal[ends] == 0, lengths == 500)
        assert np.array_equal(data.returns, lengths.numpy())
    else:
        assert data.all.terminal.sum() == 0
    assert data.all.terminal[~ends].sum() == 0


def test_reference_scores_are_the_returns_of_the_random_and_the_expert_dataset(builtin):
    for env in ("pendulum", "cartpole"):
        returns = [
            np.mean([e.rewards.sum() for e in builtin[f"{env}/{quality}-v0"][0]])
            for quality in ("random", "expert")
        ]
        for quality in ("random", "medium", "expert", "mixed"):
            assert builtin[f"{env}/{quality}-v0"][4] == pytest.approx(returns, rel=0.03)


@pytest.mark.parametrize("name", ["cartpole/mixed-v0", "pendulum/mixed-v0"])
def test_built_in_datasets_are_always_the_same(builtin, name):
    np.random.seed(1)
    torch.manual_seed(1)
    again = cql.builtin_dataset(name)[0]
    assert len(again) == len(builtin[name][0])
    for one, other in zip(again, builtin[name][0], strict=True):
        for part in ("observations", "actions", "rewards", "terminations", "truncations"):
            assert np.array_equal(getattr(one, part), getattr(other, part))
        for key in other.infos:
            assert np.array_equal(one.infos[key], other.infos[key])


@pytest.mark.parametrize("name", ["cartpole/random-v0", "cartpole/medium-v0", "cartpole/expert-v0"])
def test_behavior_log_probs_are_the_true_ones(builtin, name):
    """Recomputed from the description: the controller, but with probability eps uniform."""
    eps = {"random": 1.0, "medium": 0.3, "expert": 0.0}[re.split("[/-]", name)[1]]
    weights = [0, 0, 0, 1] if "medium" in name else [0.1, 0.5, 1.0, 0.5]
    for e in builtin[name][0]:
        agrees = e.actions == (e.observations[:-1] @ np.array(weights) > 0)
        expected = np.log(np.where(agrees, 1 - eps / 2, eps / 2))
        assert np.allclose(e.infos["behavior_log_prob"], expected, atol=1e-12)


def test_behavior_log_probs_of_the_mixed_dataset_are_one_eps_per_episode(builtin):
    """Each episode has at most two values, eps / 2 and 1 - eps / 2; the rarer action occurs as
    often as eps says, over all episodes; eps is spread over (0, 1)."""
    rare, expected, variance, epsilons = 0, 0.0, 0.0, []
    for e in builtin["cartpole/mixed-v0"][0]:
        agrees = e.actions == (e.observations[:-1] @ np.array([0.1, 0.5, 1.0, 0.5]) > 0)
        p = np.exp(e.infos["behavior_log_prob"])
        eps = 2 * (1 - p[agrees][0]) if agrees.any() else 2 * p[0]
        assert np.allclose(p, np.where(agrees, 1 - eps / 2, eps / 2))
        rare, expected = rare + (~agrees).sum(), expected + len(p) * eps / 2
        variance += len(p) * eps / 2 * (1 - eps / 2)
        epsilons.append(eps)
    assert abs(rare - expected) < 4 * variance**0.5
    assert np.quantile(epsilons, [0, 0.5, 1]) == pytest.approx([0, 0.5, 1], abs=0.1)


def test_pendulum_logs_no_log_prob(builtin):
    """Its policy is part point mass: it has no density."""
    for name in RETURNS:
        if name.startswith("pendulum"):
            assert all(not e.infos for e in builtin[name][0])


@pytest.mark.parametrize("name", ["cartpole/medium-v0", "pendulum/expert-v0"])
def test_built_in_transitions_are_those_of_gymnasium(builtin, name):
    """Replayed action by action: nothing is shifted, the last observation is the true one."""
    episodes, _, _, make_env, _ = builtin[name]
    env = make_env()
    for number in (0, 7, len(episodes) - 1):
        e = episodes[number]
        assert np.array_equal(env.reset(seed=number)[0], e.observations[0])
        for t, action in enumerate(e.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert np.array_equal(obs, e.observations[t + 1])
            assert (reward, terminated, truncated) == (
                e.rewards[t],
                e.terminations[t],
                e.truncations[t],
            )


@pytest.mark.parametrize("name", ["cartpole/mixed-v0", "pendulum/medium-v0"])
def test_built_in_datasets_can_be_stored_and_the_stored_one_wins(builtin, name, capsys):
    episodes, _, _, make_env, (low, high) = builtin[name]
    env = make_env().spec
    stored = minari.create_dataset_from_buffers(
        "lab/copy-v0", episodes, env=env, ref_min_score=low, ref_max_score=high
    )
    assert stored.total_steps == sum(len(e.actions) for e in episodes)
    copy, original = load("lab/copy-v0"), load(name)
    for one, other in zip(copy.all, original.all, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(copy.episode, original.episode)
    assert np.array_equal(copy.returns, original.returns)
    both = copy.behavior_log_prob, original.behavior_log_prob
    assert np.array_equal(*both, equal_nan=True)
    assert copy.reference == original.reference
    assert copy.make_env().spec.id == original.make_env().spec.id
    assert f"{name}: built in" in capsys.readouterr().out
    minari.create_dataset_from_buffers(name, episodes[:2], env=env)
    assert load(name).episode.max() == 1
    printed = capsys.readouterr().out
    assert f"{name}: read from" in printed and "built in" not in printed
