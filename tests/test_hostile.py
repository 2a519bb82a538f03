"""Damaged folders, broken data, environments that fail, numbers beyond sense, full disks: each is
refused with one line that names the thing, and leaves no half-written file and no NaN in one."""

import math
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_data import LINE, UNIT, episode
from test_run import ROOT, args_for, interrupted, module, start, stored, stored_root

import awac
import bc
import cql
import iql
import mopo

__all__ = ["stored", "stored_root"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for an author and the like
DATA = (LINE, UNIT)
RAW = {"normalize_obs": False}


def refuse(call, message, tmp_path, errors=(cql, bc, iql, awac, mopo)):
    """`call` raises a UserError of one line that matches; no file in tmp_path is half-written."""
    with pytest.raises(tuple(m.UserError for m in errors), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    check_files(tmp_path)


def check_files(folder):
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("result.json"))
    for path in folder.rglob("metrics.csv"):
        assert not {"nan", "inf", "-inf"} & set(path.read_text().replace("\n", ",").split(","))
    for path in folder.rglob("checkpoint.pt"):
        assert isinstance(torch.load(path, weights_only=True), dict)


# ---- Flags; the numbers' ranges are in test_run.py, datasets in test_data.py ----

RANGE = "it must lie in"
FLAGS = [  # (file, flags, message)
    ("cql.py", {"alpha": math.nan}, f"--alpha nan: {RANGE} 0 to 1,000,000,000"),
    ("cql.py", {"eval_episodes": 10**9}, f"--eval-episodes 1000000000: {RANGE} 0 to 10,000"),
    ("cql.py", {"hidden": 8}, "--hidden 8: one or more values are needed, as a tuple"),
    ("cql.py", {"target_gap": 1.0, "alpha": 0.0}, "--target-gap learns alpha from --alpha on"),
    ("cql.py", {"reward_scale": "return-rang"}, "--reward-scale return-rang: TypeError"),
    ("mopo.py", {"conservative": 1.0, "real_ratio": 0.0}, "--conservative needs real"),
    ("cql.py", {"device": "gpu"}, "--device gpu: RuntimeError"),
    ("cql.py", {"device": "cuda:99"}, "--device cuda:99: "),
    ("cql.py", {"env_id": "NoSuchEnv-v0"}, "environment NoSuchEnv-v0 .*--eval-episodes 0"),
    ("cql.py", {"env_id": "os:system"}, "environment os:system "),
    ("cql.py", {"env_id": "CartPole-v1"}, "environment CartPole-v1 .*not those of the data"),
    ("cql.py", {"env_id": "MountainCar-v0"}, "environment MountainCar-v0 .*not those of the data"),
    ("cql.py", {"out_dir": "/dev/null/runs"}, "--out-dir /dev/null/runs: NotADirectoryError"),
    ("cql.py", {"out_dir": "x" * 300}, "--out-dir x+: OSError"),
    ("cql.py", {"out_dir": "\0"}, "--out-dir .*: ValueError"),
    ("cql.py", {"resume": "nothing"}, "nothing: not a run of cql.py: no readable checkpoint"),
    ("cql.py", {"dataset_id": ()}, r"--dataset-id \(\): one or more"),
    ("cql.py", {"dataset_id": "lab/box-v0"}, "--dataset-id lab/box-v0: one or more .*, as a tuple"),
    ("cql.py", {"dataset_id": ("",)}, "dataset : an id is needed"),
    ("cql.py", {"dataset_id": ("lab",)}, "dataset lab: the id needs a version"),
    ("cql.py", {"dataset_id": ("pendulum/mixd-v0",)}, "dataset pendulum/mixd-v0: not on disk"),
    ("cql.py", {"dataset_id": ("lab/box-v0", "lab/discrete-v0")}, "dataset lab/discrete-v0: its"),
]


@pytest.mark.parametrize(
    ("file", "flags", "message"), FLAGS, ids=[f"{file} {flags}"[:60] for file, flags, _ in FLAGS]
)
def test_flags(file, flags, message, tmp_path):
    if "resume" in flags:
        args = module(file).Args(**flags)
    else:
        args = args_for(file, "box", **{"out_dir": tmp_path / "out"} | flags)
    refuse(lambda: module(file).main(args), f"^{message}", tmp_path)
    assert not (tmp_path / "out").exists() and not list(Path().iterdir())


def test_an_online_phase_without_environment_is_known_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(iql.Agent, "update", lambda *_: pytest.fail("an update"))
    for flags in ({"eval_episodes": 0}, {"dataset_id": ("lab/box-bare-v0",)}):
        args = args_for("iql.py", "box", tmp_path, online_steps=5, **flags)
        refuse(lambda args=args: iql.main(args), "--online-steps needs an environment", tmp_path)


# ---- Datasets ----


def train_on(monkeypatch, tmp_path, file, episodes, its_spaces=DATA, reference=None, **flags):
    source = episodes, its_spaces, None, reference
    monkeypatch.setattr(module(file), "open_dataset", lambda name: source)
    args = args_for(file, "box", tmp_path / "out", dataset_id=("lab/pump-v0",), **flags)
    return module(file).main(args)


@pytest.mark.parametrize("file", ["cql.py", "iql.py", "awac.py", "mopo.py"])
@pytest.mark.parametrize("what", ["observations", "rewards"])
def test_numbers_that_are_finite_and_too_large_stop_the_run_with_advice(
    file, what, monkeypatch, tmp_path
):
    large = {"observations": 1e30 * np.arange(6.0)[:, None], "rewards": np.full(5, 9e29)}[what]
    episodes = [episode(5, **{what: large}) for _ in range(4)]
    call = lambda: train_on(monkeypatch, tmp_path, file, episodes, **RAW)  # noqa: E731
    refuse(call, "(nan|inf|not finite).*--(normalize-obs|model-lr)", tmp_path)


NUMBERS = {  # what the episodes of an otherwise ordinary log have
    "tiny rewards": {"rewards": 1e-6 * np.arange(5)},
    "huge rewards": {"rewards": 1e6 * np.arange(5)},
    "no rewards": {"rewards": np.zeros(5)},
    "constant observations": {"observations": np.ones((6, 1))},
    "observations of variance 1e12": {"observations": -1e6 * np.arange(6.0)[:, None]},
    "duplicates": {"first": 0.0},
    "one action": {"actions": np.zeros((5, 1), np.float32)},
    "actions on the bounds": {"actions": np.float32([[-1], [1], [1], [-1], [1]])},
    "one-step episodes": {"T": 1, "terminated": True},
}


@pytest.mark.parametrize("file", ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("case", NUMBERS)
def test_strange_numbers_train_or_are_refused(case, discrete, file, monkeypatch, tmp_path, capsys):
    if discrete and file == "mopo.py":
        return
    episodes = [episode(**{"T": 5, "first": i / 9} | NUMBERS[case]) for i in range(8)]
    its_spaces = (LINE, spaces.Discrete(3, start=-1)) if discrete else DATA
    if discrete:
        for x in episodes:
            x.actions[:] = np.sign(x.actions)
        episodes = [replace(x, actions=x.actions[:, 0].astype(int)) for x in episodes]
    result = train_on(monkeypatch, tmp_path, file, episodes, its_spaces, **RAW)
    assert all(math.isfinite(x) for x in result.values() if isinstance(x, float))
    policy = module(file).load_policy(next((tmp_path / "out").iterdir()))
    action = policy.act(np.stack([x.observations[0] for x in episodes]))
    assert all(its_spaces[1].contains(a) for a in action)
    warned = "observations reach 4e+06: --normalize-obs" in capsys.readouterr().out
    assert warned == (case == "observations of variance 1e12")
    scaled = case == "huge rewards" or (case == "tiny rewards" and file != "mopo.py")  # a penalty
    if scaled and file != "bc.py":
        assert "--reward-scale should" in result["health"]


@pytest.mark.parametrize("reference", [(math.nan, 1.0), (-math.inf, 1.0), (0.0, math.inf)])
def test_reference_scores_that_are_no_numbers_are_none(reference, monkeypatch, empty_minari_root):
    class Stored:
        observation_space, action_space, env_spec = LINE, UNIT, None
        recover_environment = print
        storage = type("Storage", (), {"metadata": {}})

    Stored.storage.metadata |= dict(zip(("ref_min_score", "ref_max_score"), reference, strict=True))
    monkeypatch.setattr(cql.minari, "load_dataset", lambda *_, **__: Stored)
    (empty_minari_root / "lab/pump-v0/data").mkdir(parents=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(empty_minari_root))
    assert cql.open_dataset("lab/pump-v0")[3] is None


# ---- Environments ----


class Bad(gym.Env):
    """Pendulum's spaces; at the second step something is wrong with one of its parts."""

    observation_space = spaces.Box(np.float32([-1, -1, -8]), np.float32([1, 1, 8]))
    action_space = spaces.Box(-2, 2, (1,), np.float32)
    at_reset, at_step = None, {}

    def reset(self, seed=None, options=None):
        self.t = 0
        if isinstance(self.at_reset, BaseException):
            raise self.at_reset
        return np.zeros(3, np.float32) if self.at_reset is None else self.at_reset, {}

    def step(self, action):
        self.t += 1
        wrong = self.at_step if self.t == 2 else {}
        if isinstance(wrong, BaseException):
            raise wrong
        parts = {"obs": np.zeros(3, np.float32), "reward": 1.0, "end": self.t == 5} | wrong
        return parts["obs"], parts["reward"], False, parts["end"], {}


@pytest.fixture
def bad_env():
    gym.register("Bad-v0", Bad)
    yield Bad
    Bad.at_reset, Bad.at_step = None, {}
    del gym.registry["Bad-v0"]


ENVS = [  # (what reset gives or raises, what the second step changes or raises, message)
    (RuntimeError("no\nlicence"), {}, "RuntimeError: no licence"),
    (SystemExit("no licence"), {}, "SystemExit: no licence"),
    (np.zeros(2, np.float32), {}, ".*"),
    ("text", {}, ".*"),
    (None, ValueError("broken\nrobot"), "ValueError: broken robot"),
    (None, SystemExit(1), "SystemExit: 1"),
    (None, {"obs": np.zeros(4, np.float32)}, ".*"),
    (None, {"obs": None}, ".*"),
    (None, {"obs": np.full(3, np.nan)}, "an observation is NaN or infinite"),
    (None, {"obs": np.array([0, np.inf, 0])}, "an observation is NaN or infinite"),
    (None, {"reward": math.nan}, "the environment's reward is nan|the reward is nan"),
    (None, {"reward": -math.inf}, "the environment's reward is -inf|the reward is -inf"),
    (None, {"reward": None}, "TypeError"),
    (None, {"reward": "1"}, ".*Error"),
    (None, {"reward": np.ones(3)}, ".*Error"),
]


@pytest.mark.parametrize("phase", ["evaluation", "online"])
@pytest.mark.parametrize(("at_reset", "at_step", "message"), ENVS)
def test_environments(phase, at_reset, at_step, message, bad_env, tmp_path, monkeypatch):
    bad_env.at_reset, bad_env.at_step = at_reset, at_step
    online = {"online_steps": 9} if phase == "online" else {}
    args = args_for("iql.py", "box", tmp_path, env_id="Bad-v0", **online)
    if phase == "online":  # let the evaluation be fine
        monkeypatch.setattr(iql, "evaluate", lambda policy, make_env, n: np.zeros(n))
    start = (
        r"environment Bad-v0 \(not needed with --eval-episodes 0|evaluation \(--eval-episodes 0 |"
    )
    start += r"the environment of the online phase: "
    refuse(lambda: iql.main(args), f"^({start}).*({message})", tmp_path)


# ---- Checkpoints ----


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def stopped(stored, tmp_path_factory):
    """A run of cql.py that was stopped between its last checkpoint and its result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(stored))

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(cql, "health", stop)
        return interrupted("cql.py", "box", tmp_path_factory.mktemp("stopped"))


def raw(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def saved(x, **how):
    return lambda path: torch.save(x, path, **how)


def edited(change):
    def edit(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit


def changed(**entries):
    return edited(lambda state: state.update(entries))


def weight(value, name="units.obs_mean"):
    return edited(lambda state: state["policy"].update({name: value}))


def of_flags(**flags):
    return edited(lambda state: state["args"].update(flags))


NO_FILE = "no readable checkpoint.pt, "
BOTH = [  # (what is done to checkpoint.pt, message): neither resumed nor loaded
    (Path.unlink, f"{NO_FILE}FileNotFoundError"),
    (lambda path: (path.unlink(), path.mkdir()), f"{NO_FILE}IsADirectoryError"),
    (raw(lambda old: b""), f"{NO_FILE}EOFError"),
    (raw(lambda old: old[: len(old) // 2]), NO_FILE),
    (raw(lambda old: old[:-1]), NO_FILE),
    (raw(lambda old: bytes(range(256)) * 20), NO_FILE),
    (raw(lambda old: b"hello\nworld"), NO_FILE),
    (raw(lambda old: pickle.dumps(Evil(), 2)), NO_FILE),
    (raw(lambda old: pickle.dumps({"algorithm": "cql", "policy": Evil()})), NO_FILE),
    (saved({"algorithm": "cql", "args": Evil()}), f"{NO_FILE}UnpicklingError"),
    (saved({"algorithm": Evil()}, _use_new_zipfile_serialization=False), NO_FILE),
    (saved({}), "KeyError: 'algorithm'"),
    (saved([1, 2]), "TypeError"),
    (saved(torch.zeros(3)), "IndexError"),
    (saved({"algorithm": "cql"}), "KeyError: 'policy'"),
    (changed(algorithm="iql"), "not a run of cql.py: it is one of iql.py"),
    (changed(policy=None), "AttributeError"),
    (changed(args=None), "TypeError"),
    (of_flags(nonsense=1), "TypeError.*nonsense"),
    (of_flags(hidden=(9,)), "its checkpoint does not fit"),
    (of_flags(hidden="wide"), "--hidden wide|its checkpoint does not fit"),
    (weight(torch.full((3,), math.nan)), "has weights that are NaN"),
    (weight(torch.full((3,), math.inf)), "has weights that are NaN or infinite"),
    (weight(torch.zeros(2)), "its checkpoint does not fit"),
    (weight("text"), "AttributeError|TypeError"),
    (edited(lambda state: state["policy"].popitem()), "its checkpoint does not fit"),
    (weight(torch.zeros(3), "extra"), "its checkpoint does not fit"),
]
RESUMED = [  # refused by --resume; load_policy does without these
    (changed(rng=torch.zeros(3, dtype=torch.uint8)), "its checkpoint does not fit"),
    (changed(rng=None), "its checkpoint does not fit"),
    (changed(cuda_rng=3), "its checkpoint does not fit"),
    (changed(metrics=[3]), "its checkpoint does not fit"),
    (changed(seconds="long"), "its checkpoint does not fit"),
    (edited(lambda state: state.pop("seconds")), "its checkpoint does not fit"),
    (edited(lambda state: state.pop("extra")), "its checkpoint does not fit"),
    (of_flags(steps="many"), "--steps many: a whole number is needed"),
    (of_flags(alpha=math.nan), f"--alpha nan: {RANGE}"),
    (of_flags(dataset_id=("lab/discrete-v0",)), "its checkpoint does not fit"),
    (of_flags(dataset_id=("lab/gone",)), "dataset lab/gone: the id needs a version"),
]
LOADED = [  # refused by load_policy; --resume takes the spaces from the dataset
    (changed(spaces=["a", "b"]), "its checkpoint does not fit"),
    (changed(spaces=None), "its checkpoint does not fit"),
    (edited(lambda state: state["spaces"].reverse()), "its checkpoint does not fit"),
]


@pytest.mark.parametrize(
    ("how", "breaks", "message"),
    [("resume", *case) for case in BOTH + RESUMED]
    + [("load_policy", *case) for case in BOTH + LOADED],
)
def test_checkpoints(how, breaks, message, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    breaks(folder / "checkpoint.pt")
    before = {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir()}
    calls = {"resume": lambda: cql.main(cql.Args(resume=str(folder)))}
    calls["load_policy"] = lambda: cql.load_policy(folder)
    with pytest.raises(cql.UserError, match=message) as caught:
        calls[how]()
    text = str(caught.value)
    assert "\n" not in text and text.startswith((f"{folder}: ", "--", "dataset "))
    assert {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir()} == before
    assert not Path("executed").exists()


# ---- Full disks ----


@pytest.mark.parametrize(("limit", "file"), [(20_000, "cql.py"), (60_000, "checkpoint.pt")])
def test_a_limit_on_the_size_of_files(limit, file, tmp_path):
    """As on a full disk: one line, and what stood there before is whole."""
    args = args_for("cql.py", "box", tmp_path, hidden=(64, 64))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = f"^cannot write .*{file}, what stood there before is whole: .*File too large"
        refuse(lambda: cql.main(args), message, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_folder_where_a_temporary_file_is_to_be(tmp_path):
    (tmp_path / "args.json.tmp").mkdir()
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(cql.UserError, match=r"^cannot write .*args.json, what stood there before"):
        cql.write(tmp_path / "args.json", b"[]")
    assert (tmp_path / "args.json").read_text() == "{}"


# ---- The command line ----

COMMANDS = [  # (flags, exit code, what the last words say); test_run.py has the other files
    ("--resume nothing", 1, "cql: nothing: not a run of cql.py"),
    ("--nonsense 1", 2, "--nonsense"),
]


@pytest.mark.parametrize(("flags", "code", "message"), COMMANDS)
def test_the_command_line(flags, code, message, tmp_path):
    process = start(tmp_path, ROOT / "cql.py", *flags.split())
    out, error = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in out + error
    assert message in out + error
    assert code == 2 or error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_the_imports(tmp_path):
    process = start(tmp_path, "-X", "importtime", ROOT / "cql.py", "--steps", 10**6)
    while "numpy" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "Traceback" not in error
