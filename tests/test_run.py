"""What every training file does beside learning: flags, the run's folder, resuming, evaluation, the
trained policy. The plumbing is the same text in every file (test_copies.py), so that cql.py stands
for all; what an agent takes part in runs for every file and for the action spaces that it supports,
with networks, datasets and runs that are as small as can be."""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import CASES, has_flag, module, refused
from minari.data_collector import EpisodeBuffer
from test_copies import FILES, ROOT, TRAINING

import cql
from cql import UserError

ONLINE = [(f, k) for f in ("iql.py", "awac.py") for k in ("box online", "discrete online")]
GAP = [("cql.py", "box gap"), ("cql.py", "discrete gap")]  # alpha is learned
ENVS = {"box": "Pendulum-v1", "discrete": "CartPole-v1"}
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for an author and the like

TINY = {  # whatever of these a file has
    "seed": 4,
    "steps": 12,
    "log_every": 4,
    "eval_every": 4,
    "eval_episodes": 2,
    "batch_size": 8,
    "hidden": (8,),
    "held_out": 0.25,
    "vae_hidden": (8,),
    "target_samples": 3,
    "act_samples": 4,
    "model_hidden": (8,),
    "model_epochs": 2,
    "terminal_updates": 10,
    "rollout_length": 2,
    "rollout_starts": 16,
    "rollout_every": 6,
    "real_ratio": 0.5,
}


# ---- Datasets ----


class DictEnv(gym.Env):
    """Its keys are not sorted, those of a stored dataset are; the values tell the parts apart."""

    action_space = spaces.Box(-2, 3, (1,), np.float32)
    observation_space = spaces.Dict(
        speed=spaces.Box(10, 11, (1,), np.float32),
        angle=spaces.Box(0, 1, (2,), np.float32),
        mode=spaces.Discrete(2),
    )

    def reset(self, seed=None, options=None):
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), float(action[0]), False, self.t == 5, {}


def collect(env, episodes, seed=0):
    """Episodes of uniformly random actions, as buffers."""
    env.action_space.seed(seed)
    for number in range(episodes):
        obs, rows, ended = [env.reset(seed=seed + number)[0]], [], False
        while not ended:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((action, float(reward), terminated, truncated))
            obs.append(next_obs)
            ended = terminated or truncated
        if isinstance(obs[0], dict):
            obs = {key: np.array([o[key] for o in obs]) for key in obs[0]}
        else:
            obs = np.array(obs)
        columns = (np.array(column) for column in zip(*rows, strict=True))
        yield EpisodeBuffer(None, None, None, obs, *columns, {})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A Minari root with one dataset per action space, with and without an environment."""
    root = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        store = minari.create_dataset_from_buffers
        for kind, env_id in ENVS.items():
            env = gym.make(env_id, max_episode_steps=12)
            extra = {"env": env.spec, "ref_min_score": -99.0, "ref_max_score": 101.0}
            store(f"lab/{kind}-v0", list(collect(env, 8)), **extra)
            store(f"lab/{kind}-more-v0", list(collect(env, 4, seed=50)), **extra)
            bare = {"observation_space": env.observation_space, "action_space": env.action_space}
            store(f"lab/{kind}-bare-v0", list(collect(env, 4)), **bare)
        spec = gym.envs.registration.EnvSpec("Dict-v0", "test_run:DictEnv")
        store("lab/dict-v0", list(collect(DictEnv(), 8)), env=spec)
    return root


@pytest.fixture(autouse=True)
def stored_root(stored, empty_minari_root, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(stored))


def args_for(file, kind, out_dir, **flags):
    kind, _, more = kind.partition(" ")
    tiny = {name: value for name, value in TINY.items() if has_flag(module(file), name)}
    tiny |= {"online": {"online_steps": 30}, "gap": {"target_gap": 0.5}}.get(more, {})
    given = {"dataset_id": (f"lab/{kind}-v0",), "out_dir": str(out_dir)} | tiny | flags
    return module(file).Args(**given)


def run(file, kind, out_dir, **flags):
    """main in a new folder -> (its result, the folder)."""
    before = set(out_dir.iterdir()) if out_dir.exists() else set()
    result = module(file).main(args_for(file, kind, out_dir, **flags))
    (folder,) = set(out_dir.iterdir()) - before
    return result, folder


@pytest.fixture(scope="module")
def usual(stored, tmp_path_factory):
    """The run of a file with the flags of TINY, made once: its result, its folder, what it printed
    and how many optimiser steps it took."""
    found = {}

    def of(file, kind):
        if (file, kind) not in found:
            steps, printed = [], io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
                count_steps(file, patch, steps.append)
                result, folder = run(file, kind, tmp_path_factory.mktemp("usual"))
            found[file, kind] = result, folder, printed.getvalue(), len(steps)
        return found[file, kind]

    return of


def count_steps(file, patch, watch):
    """Calls watch(number) before each step of an optimiser, of a model's fit too."""
    step, calls = module(file).step, []

    def counting(optimizer, loss):
        calls.append(None)
        watch(len(calls))
        step(optimizer, loss)

    patch.setattr(module(file), "step", counting)


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def checkpoint(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state | {"step": state["metrics"][-1]["step"] if state["metrics"] else 0}


def equal(one, other):
    """Nested dicts, lists and tensors: the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def weights(folder):
    """All but counters and rates: log_alpha is the flag itself."""
    state = checkpoint(folder)["policy"]
    return {k: v for k, v in state.items() if v.numel() > 1 and not k.startswith("units.")}


def assert_same_run(one, other):
    a, b = checkpoint(one), checkpoint(other)
    for key in ("step", "policy", "extra", "rng", "metrics", "returns"):
        assert equal(a[key], b[key]), key
    for name in ("metrics.csv", *(["model.txt"] if a["algorithm"] == "mopo" else [])):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        assert result.pop("seconds") > 0
    assert results[0] == results[1]


def watch_agent(file, monkeypatch, change):
    """Lets `change(agent)` alter each agent that the file builds."""
    build = module(file).Agent

    def watched(units, args):
        agent = build(units, args)
        change(agent)
        return agent

    monkeypatch.setattr(module(file), "Agent", watched)


# ---- Importing and calling ----


@pytest.mark.parametrize("file", TRAINING)
def test_importing_has_no_side_effect(file, monkeypatch, capfd):
    matmul = torch.backends.mkldnn.matmul
    rng, threads, precision = torch.get_rng_state(), torch.get_num_threads(), matmul.fp32_precision
    handler, numpy_rng = signal.getsignal(signal.SIGTERM), np.random.get_state()[1].copy()
    spec = importlib.util.spec_from_file_location("fresh_copy", ROOT / file)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_copy", fresh)  # dataclasses look there
    spec.loader.exec_module(fresh)
    assert capfd.readouterr() == ("", "") and not list(Path().iterdir())
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads
    assert matmul.fp32_precision == precision and torch.get_default_dtype() == torch.float32
    assert signal.getsignal(signal.SIGTERM) == handler
    assert np.array_equal(np.random.get_state()[1], numpy_rng)


@pytest.mark.parametrize("rounds", [False, True], ids=["keeps float32", "rounds to bfloat16"])
def test_the_fast_matrix_product_is_kept_only_where_it_is_exact(rounds, monkeypatch):
    flags, multiply = torch.backends.mkldnn.matmul, torch.Tensor.__matmul__

    def product(x, y):  # of a CPU that rounds, or one that does not, whatever this one does
        setting = flags.fp32_precision
        if rounds and setting == "bf16" and x.dtype == torch.float32:
            x, y = x.bfloat16().float(), y.bfloat16().float()
        flags.fp32_precision = "none"
        result = multiply(x, y)
        flags.fp32_precision = setting
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    cql.use_cpu_well()
    assert flags.fp32_precision == ("none" if rounds else "bf16")


def test_one_thread_unless_told_otherwise(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cql.use_cpu_well()
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    cql.use_cpu_well()
    assert chosen == [1]


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_a_run_leaves_what_the_design_says(file, kind, usual):
    name, (result, folder, printed, _) = file.removesuffix(".py"), usual(file, kind)
    assert re.fullmatch(rf"{name}__lab-{kind}-v0__s4__\d{{8}}-\d{{6}}-\d{{6}}", folder.name)
    files = {"args.json", "metrics.csv", "checkpoint.pt", file, "result.json"}
    assert {p.name for p in folder.iterdir()} - {"model.txt"} == files
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert max(times, key=times.get) == "result.json"
    assert (folder / file).read_bytes() == (ROOT / file).read_bytes()

    facts, args = (
        json.loads((folder / "args.json").read_text()),
        args_for(file, kind, folder.parent),
    )
    assert facts["args"] == json.loads(json.dumps(asdict(args)))
    assert set(facts["versions"]) == {"torch", "numpy", "gymnasium", "minari", "tyro", file}
    assert facts["versions"]["minari"] == minari.__version__

    metrics = rows(folder / "metrics.csv")
    assert [row["step"] for row in metrics] == ["4", "8", "12"]
    assert not {"seconds", "time"} & set(metrics[0])
    assert all(math.isfinite(float(x)) for row in metrics for x in row.values())

    state = checkpoint(folder)  # loads with weights_only=True
    assert state["step"] == 12 and state["args"] == asdict(args)
    env = gym.make(ENVS[kind])
    restored = [minari.serialization.deserialize_space(x) for x in state["spaces"]]
    assert restored == [env.observation_space, env.action_space]
    assert {"units.obs_mean", "units.obs_std"} <= set(state["policy"])

    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["algorithm"], result["dataset"]) == (name, f"lab/{kind}-v0")
    assert (result["seed"], result["steps"], len(result["returns"])) == (4, 12, 2)
    assert result["return_mean"] == pytest.approx(np.mean(result["returns"]))
    assert result["return_mean"] == float(metrics[-1]["return_mean"])
    assert result["return_std"] == pytest.approx(np.std(result["returns"]))
    assert result["score"] == pytest.approx(100 * (result["return_mean"] + 99) / 200)
    assert 0 < result["seconds"] < 600 and isinstance(result["health"], str)
    data = minari.load_dataset(f"lab/{kind}-v0")
    returns = [episode.rewards.sum() for episode in data]
    assert result["data_return_mean"] == pytest.approx(np.mean(returns))

    for text in (f"run folder {folder}", "transitions in 8 episodes", "step 4, ", "health"):
        assert text in printed


@pytest.mark.parametrize(("file", "kind"), [*CASES, *ONLINE])
def test_the_same_seed_gives_the_same_run_whatever_the_state_of_the_process(
    file, kind, usual, tmp_path
):
    """And another seed another one; main can be called in a loop."""
    torch.manual_seed(1)
    np.random.seed(1)
    assert_same_run(usual(file, kind)[1], run(file, kind, tmp_path)[1])
    other = run(file, kind, tmp_path, seed=1)[1]
    assert not equal(weights(other), weights(usual(file, kind)[1]))


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_results_do_not_depend_on_the_evaluation(file, kind, usual, tmp_path):
    """Neither the weights nor any metric but the return."""
    folder = usual(file, kind)[1]
    for flags in ({"eval_every": 8, "eval_episodes": 25}, {"eval_every": 0}, {"eval_episodes": 0}):
        other = run(file, kind, tmp_path, **flags)[1]
        assert equal(checkpoint(folder)["policy"], checkpoint(other)["policy"]), flags
        assert equal(checkpoint(folder)["rng"], checkpoint(other)["rng"]), flags
        tables = [rows(x / "metrics.csv") for x in (folder, other)]
        for row in [*tables[0], *tables[1]]:
            row["evaluated"] = row.pop("return_mean") != ""
            del row["return_std"], row["score"]
        evaluated = [row.pop("evaluated") for row in tables[1]]
        expected = [False, "eval_every" in flags and flags["eval_every"] > 0, "eval_every" in flags]
        assert evaluated == expected
        for row in tables[0]:
            assert row.pop("evaluated")
        assert tables[0] == tables[1], flags


# ---- Interrupting and resuming ----


def interrupted(file, kind, out_dir, **flags):
    """A run that KeyboardInterrupt stops -> its folder."""
    before = set(out_dir.iterdir()) if out_dir.exists() else set()
    with pytest.raises(KeyboardInterrupt):
        module(file).main(args_for(file, kind, out_dir, **flags))
    (folder,) = set(out_dir.iterdir()) - before
    assert not (folder / "result.json").exists()
    return folder


def resume(file, folder):
    return module(file).main(module(file).Args(resume=str(folder)))


@pytest.mark.parametrize("file", TRAINING)
def test_a_run_does_not_go_on_with_other_data(file, usual, tmp_path):
    """It has units, and online episodes, of those that it began with."""
    folder = shutil.copytree(usual(file, "box")[1], tmp_path / "run")
    (folder / "result.json").unlink()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    episodes, transitions, mean = state["facts"]
    assert episodes == 8 and transitions == (72 if file == "bc.py" else 96)  # of 8 bc trains on 6
    error = module(file).UserError
    for other in ([8, transitions - 1, mean], [8, transitions, 1.01 * mean]):
        torch.save(state | {"facts": other}, folder / "checkpoint.pt")
        with refused("the data have changed since it began", error):
            resume(file, folder)
    del state["facts"]
    torch.save(state, folder / "checkpoint.pt")
    with refused("an older version made it: go on with the file in there", error):
        resume(file, folder)


def test_many_parts_make_no_folder_whose_name_is_too_long(tmp_path):
    ids = tuple(f"lab/box-v0[{i}%:{i + 13}%]" for i in range(0, 91, 13))
    ids += tuple(f"lab/box-more-v0[{i}%:{i + 25}%]" for i in range(0, 100, 25))
    assert len("+".join(ids)) > 200
    folder = run("bc", "box", tmp_path, dataset_id=ids)[1]
    assert len(folder.name) < 200 and json.loads((folder / "args.json").read_text())


@pytest.mark.parametrize(("file", "kind"), [*CASES, *ONLINE, *GAP])
def test_interrupted_in_an_update_and_resumed_twice(file, kind, usual, tmp_path, monkeypatch):
    """Before the first log, in the middle, in the last update; of a model's fit too."""
    _, whole, _, steps = usual(file, kind)

    def stopping_at(*stops):
        def watch(number):
            if number in stops:
                raise KeyboardInterrupt

        return watch

    for first, second in ((1, steps // 2), (steps * 3 // 5, steps // 4), (steps, None)):
        with monkeypatch.context() as patch:
            count_steps(file, patch, stopping_at(first))
            folder = interrupted(file, kind, tmp_path)
        reached = checkpoint(folder)["step"]
        assert first != 1 or reached == 0
        if second:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                count_steps(file, patch, stopping_at(second))
                resume(file, folder)
            assert checkpoint(folder)["step"] >= reached
        seconds = checkpoint(folder)["seconds"]
        result = resume(file, folder)
        assert_same_run(whole, folder)
        assert result == json.loads((folder / "result.json").read_text())
        assert result["seconds"] > seconds > 0  # it has the time before the interruptions


def failing(call, number, error):
    """`call`, but its n-th call raises the error, after it has done its work."""
    calls = []

    def watched(*inputs, **more):
        result = call(*inputs, **more)
        calls.append(None)
        if len(calls) == number:
            raise error
        return result

    return watched


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_in_an_evaluation_and_resumed(stop, usual, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cql, "evaluate", failing(cql.evaluate, stop, KeyboardInterrupt()))
        folder = interrupted("cql.py", "box", tmp_path)
    resume("cql.py", folder)
    assert_same_run(usual("cql.py", "box")[1], folder)


@pytest.mark.parametrize(("file", "kind"), [("bc.py", "box"), ("mopo.py", "box"), *ONLINE])
def test_interrupted_after_the_last_checkpoint_and_resumed(
    file, kind, usual, tmp_path, monkeypatch
):
    """The line on the run's health needs all the data, those of an unfinished episode too."""
    with monkeypatch.context() as patch:
        patch.setattr(module(file), "health", failing(module(file).health, 1, KeyboardInterrupt()))
        folder = interrupted(file, kind, tmp_path)
    resume(file, folder)
    assert_same_run(usual(file, kind)[1], folder)


WRITES = ["cql.py", "args.json", *4 * ["metrics.csv", "checkpoint.pt"], "result.json"]


def test_files_are_written_in_an_order_that_survives_kills(tmp_path, monkeypatch):
    written, write = [], cql.write
    monkeypatch.setattr(cql, "write", lambda p, x: (written.append(p.name), write(p, x)))
    run("cql.py", "box", tmp_path)
    assert written == WRITES


@pytest.mark.parametrize("stop", range(1, len(WRITES) + 1))
def test_stopped_inside_any_write_and_resumed(stop, usual, tmp_path, monkeypatch):
    """The old file is whole, nothing half-written is left, also where the disk is full. The first
    four are of a run that has not begun."""
    write_bytes, calls = Path.write_bytes, []

    def half(path, content):
        calls.append(path.name)
        write_bytes(path, content[: len(content) // 2] if len(calls) == stop else content)
        if len(calls) == stop:
            raise error

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        calls.clear()
        raised = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
        with monkeypatch.context() as patch, refused("", raised) as caught:
            patch.setattr(Path, "write_bytes", half)
            run("cql.py", "box", tmp_path)
        folder = max(tmp_path.iterdir(), key=lambda x: x.name)
        assert calls[-1] == f"{WRITES[stop - 1]}.tmp" and not list(folder.glob("*.tmp"))
        assert raised is KeyboardInterrupt or "No space left" in str(caught.value)
        assert (folder / "checkpoint.pt").exists() == (stop > 4)
        if stop > 4:
            resume("cql.py", folder)
            assert_same_run(usual("cql.py", "box")[1], folder)


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", Path.replace
    cql.write(path, b"old")

    def forbidden(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", forbidden)
    with refused(rf"cannot write {path}, .*not permitted"):
        cql.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(Path, "replace", replace)
    cql.write(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def start(folder, *command, **environment):
    """A command line in a process of its own, in `folder`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    command = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def flag_list(args):
    """Args as a command line."""
    command = []
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            command += [flag, *(value if isinstance(value, tuple) else [value])]
    return command


@pytest.mark.parametrize(("file", "kind"), [("mopo.py", "box"), ("awac.py", "box online")])
def test_stopped_and_killed_at_random_moments_and_resumed(file, kind, tmp_path):
    """SIGTERM, then the printed command, SIGKILL, then resumed in this process. The moments count
    checkpoints, of which a run has at least 20, so that they do not depend on the machine's
    speed."""
    moments = random.Random(0)
    flags = {"steps": 400, "log_every": 20, "eval_every": 40}

    def some_checkpoints_later(process, path):
        for _ in range(moments.randint(1, 5)):
            seen = path.stat().st_mtime_ns
            while process.poll() is None and path.stat().st_mtime_ns == seen:
                time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))

    args = args_for(file, kind, "my runs", **flags)
    process = start(tmp_path, ROOT / file, *flag_list(args))
    while process.poll() is None and not (found := list(tmp_path.glob("my runs/*/checkpoint.pt"))):
        time.sleep(0.01)
    folder = found[0].parent
    some_checkpoints_later(process, folder / "checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err and not (folder / "result.json").exists()
    line = err.strip().splitlines()[-1]
    command = shlex.split(line.partition("stopped; to go on: python ")[2])
    assert command == [file, "--resume", f"my runs/{folder.name}"]  # a folder with a space

    process = start(tmp_path, ROOT / file, *command[1:])
    some_checkpoints_later(process, folder / "checkpoint.pt")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (folder / "result.json").exists(), "too fast for this test: raise its steps"
    with contextlib.chdir(tmp_path):
        resume(file, folder)
    assert_same_run(run(file, kind, tmp_path / "whole", **flags)[1], folder)


# ---- What --resume refuses ----


@contextlib.contextmanager
def flags_of_the_shell(file, flags):
    """sys.argv is set; the signal handlers are those of before afterwards."""
    handlers = {x: signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(file), *map(str, flags)])
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def exit_line(file, flags):
    """What the command line prints as it gives up, exit code 1."""
    with flags_of_the_shell(file, flags), pytest.raises(SystemExit) as caught:
        module(file).command_line()
    text = caught.value.code  # sys.exit(text) prints it and exits with 1
    assert isinstance(text, str) and text.startswith(f"{file.removesuffix('.py')}: ")
    assert "\n" not in text
    return text


def test_resume_takes_no_other_flag_and_no_complete_run(usual, tmp_path):
    folder = usual("cql.py", "box")[1]
    with refused(rf"--resume {folder}: it is complete, see result"):
        resume("cql.py", folder)
    with refused("--resume takes all flags from the run"):
        cql.main(cql.Args(resume=str(folder), seed=5))
    for nothing in (tmp_path / "nothing", tmp_path):
        with refused(rf"^{nothing}: not a run of cql.py: "):
            resume("cql.py", nothing)
    for flag in (["--seed", "1"], ["--seed", "0"]):  # 0 is the default
        text = exit_line("cql.py", [*flag, "--resume", folder])
        assert "--resume takes all flags from the run" in text


# ---- NaN ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [2, 6])
def test_nan_stops_the_run_and_keeps_the_good_checkpoint(value, first, tmp_path, monkeypatch):
    """Update 6 breaks a metric, the log after update 8 notices; update 4 was the last good one. If
    update 2 does, it is the checkpoint of the start."""
    good = []

    def breaking(agent):
        update, calls = agent.update, []

        def counting(*inputs):
            calls.append(None)
            if len(calls) == first:
                good.append((next(tmp_path.iterdir()) / "checkpoint.pt").read_bytes())
            broken = {"td_loss": torch.tensor(value)} if len(calls) >= first else {}
            return update(*inputs) | broken

        agent.update = counting

    watch_agent("cql.py", monkeypatch, breaking)
    with refused("") as caught:
        run("cql.py", "box", tmp_path)
    (folder,) = tmp_path.iterdir()
    text, before = str(caught.value), first // 4 * 4
    good_one = f"the last good checkpoint is that of update {before} in {folder}"
    for part in (f"update {before + 4}: td_loss is {value}", good_one, "--reward-scale"):
        assert part in text
    assert (folder / "checkpoint.pt").read_bytes() == good[0]
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["4"][: before // 4]
    assert not (folder / "result.json").exists()


# ---- Every flag ----

# A value for each flag that differs from TINY and the default; {kind: value} where they differ.
VALUES = {
    "dataset_id": {
        "box": ("lab/box-v0", "lab/box-more-v0"),
        "discrete": ("lab/discrete-v0", "lab/discrete-more-v0"),
    },
    "env_id": ENVS,
    "seed": 7,
    "steps": 9,
    "log_every": 2,
    "eval_every": 12,
    "eval_episodes": 3,
    "device": None,  # below
    "compile": None,  # takes a minute
    "out_dir": None,  # another folder, everywhere here
    "resume": None,  # above
    "online_steps": None,  # above, and test_iql.py
    "batch_size": 16,
    "hidden": (6, 5),
    "gamma": 0.9,
    "polyak": 0.5,
    "lr": 0.01,
    "critic_lr": 0.01,
    "actor_lr": 0.01,
    "normalize_obs": "not the default",
    "reward_scale": "return-range",
    "reward_shift": 0.5,
    # cql
    "alpha": 3.0,
    "target_gap": 0.5,
    "samples": 2,
    "bc_weight": 1.0,
    # bc
    "top_fraction": 0.5,
    "held_out": 0.5,
    # iql, awac
    "expectile": 0.8,
    "beta": 1.0,
    "lam": 0.3,
    # bcq
    "threshold": 1.0,
    "phi": 0.05,
    "soft_min": 0.5,
    "target_samples": 5,
    "act_samples": 7,
    "vae_hidden": (6, 5),
    # mopo
    "model_lr": 0.01,
    "model_hidden": (6, 5),
    "model_epochs": 1,
    "terminal_updates": 5,
    "uncertainty": "disagreement",
    "penalty": 3.0,
    "rollout_length": 3,
    "rollout_starts": 8,
    "rollout_every": 3,
    "real_ratio": 0.25,
    "conservative": 1.0,
}
# Flags that must not change the weights, and those that do nothing with the other action space.
NO_EFFECT = {"env_id", "log_every", "eval_every", "eval_episodes"}
NO_EFFECT_WITH = {
    ("cql.py", "discrete"): {"actor_lr", "samples"},
    ("bcq.py", "box"): {"threshold", "act_samples"},
    ("bcq.py", "discrete"): {"phi", "soft_min", "target_samples", "act_samples", "vae_hidden"},
    ("mopo.py", "box"): {"terminal_updates"},  # Pendulum has no terminals
}
REFUSED = {("cql.py", "discrete"): {"bc_weight"}}


def other_value(file, kind, name):
    """One that is neither the default nor that of TINY."""
    default, value = getattr(module(file).Args, name), VALUES[name]
    value = value[kind] if isinstance(value, dict) else value
    value = not default if isinstance(default, bool) else value
    assert value not in (default, TINY.get(name)) or value is None
    return value


@pytest.mark.parametrize(
    ("file", "kind", "names"),
    [
        pytest.param(file, kind, names, id=f"{file}-{kind}-{'-'.join(sorted(names))}")
        for file, kind in CASES
        for names in [NO_EFFECT, *({x.name} for x in fields(module(file).Args))]
        if names == NO_EFFECT or (not names & NO_EFFECT and VALUES[max(names)] is not None)
    ],
)
def test_every_flag_with_another_value(file, kind, names, tmp_path, usual):
    """It is accepted, lands in args.json, and changes the weights or, as it should, does not."""
    values = {name: other_value(file, kind, name) for name in names}
    flags = values if names == NO_EFFECT else {"eval_episodes": 0, **values}
    if names & REFUSED.get((file, kind), set()):
        with refused(f"--{max(names).replace('_', '-')}", module(file).UserError):
            run(file, kind, tmp_path, **flags)
        return
    before, (_, folder) = weights(usual(file, kind)[1]), run(file, kind, tmp_path, **flags)
    stored_args = json.loads((folder / "args.json").read_text())["args"]
    assert {name: stored_args[name] for name in names} == json.loads(json.dumps(values))
    no_effect = names <= NO_EFFECT | NO_EFFECT_WITH.get((file, kind), set())
    assert equal(before, weights(folder)) == no_effect


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("file", "kind"), CASES)
def test_on_a_gpu(file, kind, tmp_path):
    one, other = (run(file, kind, tmp_path, device="cuda", eval_every=x)[1] for x in (8, 0))
    policy = module(file).load_policy(one)
    assert {p.device.type for p in policy.state_dict().values()} == {"cpu"}
    assert equal(weights(one), weights(other))


@pytest.mark.parametrize("file", TRAINING)
def test_the_command_line_gives_the_flags_to_main(file, monkeypatch):
    """Each flag by its name in the shell, several values after one flag, booleans as --no-x."""
    got = []
    monkeypatch.setattr(module(file), "main", got.append)
    for kind in ("box", "discrete"):
        values = {}
        for field in fields(module(file).Args):
            value = other_value(file, kind, field.name)
            if field.type is bool:
                value = kind == "box"
            if value is not None:
                values[field.name] = value
        args = module(file).Args(**values)
        with flags_of_the_shell(file, flag_list(args)):
            module(file).command_line()
        assert got.pop() == args


@pytest.mark.parametrize("file", TRAINING)
def test_every_number_has_a_range_that_the_message_names(file):
    """NaN and infinity lie in none; the bounds themselves do; counts are whole."""
    Args, check = module(file).Args, module(file).start
    numbers = [f for f in fields(Args) if re.search("int|float", str(f.type))]
    assert len(numbers) > 8
    for field in numbers:
        many, whole = isinstance(field.default, tuple), "float" not in str(field.type)
        low, high = module(file).LIMITS.get(field.name, (1 if whole else 0, 10**9))
        step = 1 if whole else 1e-6
        wrong = [math.nan, math.inf, -math.inf, low - step, high + step, -(10**30), 10**30]
        wrong += ["text"] * (field.default is not None) + [low + 0.5] * whole
        for value in wrong:
            given = {field.name: (value,) if many else value}
            flag = f"--{field.name.replace('_', '-')}"
            with refused(rf"^{flag} .*{value}", module(file).UserError) as caught:
                check(Args(**given))
            text = str(caught.value)
            range_ = f"it must lie in {low:,} to {high:,}"
            assert (
                range_ in text
                or (whole and "a whole number is needed" in text)
                or (value == "text" and "TypeError" in text)
            )
        for value in (low, high):
            check(Args(**{field.name: (value,) if many else value}))
        if many:
            check(Args(**{field.name: ()})) if not field.default else None
            with refused("as a tuple", module(file).UserError):
                check(Args(**{field.name: 8}))


def test_gamma_1_is_refused():
    """Returns of episodes that go on would be infinite."""
    with refused(r"--gamma 1\.0: it must lie in 0 to 0\.999999", cql.UserError):
        cql.start(cql.Args(gamma=1.0))


@pytest.mark.parametrize("file", TRAINING)
def test_what_a_checkpoint_would_not_take_is_refused_before_the_run(file, tmp_path):
    """NumPy's numbers, for example of a logspace, are written and can never be loaded again."""
    for flags, problem in (
        ({"polyak": np.float64(1e-3), "lr": np.float64(1e-3)}, "a float64 cannot be saved"),
        ({"out_dir": tmp_path}, "a PosixPath cannot be saved"),
        ({"device": torch.device("cpu")}, "a device cannot be saved"),
        ({"seed": np.int64(1)}, "a whole number is needed"),
        ({"normalize_obs": "no"}, "True or False is needed"),
        ({"normalize_obs": np.bool_(True)}, "True or False is needed"),
    ):
        flags = {k: v for k, v in flags.items() if has_flag(module(file), k)}
        with refused(problem, module(file).UserError):
            module(file).start(module(file).Args(**flags))


@pytest.mark.parametrize("file", TRAINING)
def test_the_command_line_prints_errors_as_one_line(file):
    assert "--steps 0: it must lie in 1 to 1,000,000,000" in exit_line(file, ["--steps", "0"])
    assert "pendulum/mixd-v0" in exit_line(file, ["--dataset-id", "pendulum/mixd-v0"])
    assert "no readable checkpoint.pt" in exit_line(file, ["--resume", ""])  # an unset variable


def test_two_runs_of_the_same_microsecond_do_not_mix(usual, tmp_path, monkeypatch):
    class Frozen(cql.datetime):
        @classmethod
        def now(cls):
            return cls(2025, 1, 2, 3, 4, 5, 6)

    monkeypatch.setattr(cql, "datetime", Frozen)
    folder = run("cql.py", "box", tmp_path)[1]
    with refused(rf"^--out-dir {tmp_path}: FileExistsError"):
        run("cql.py", "box", tmp_path)
    assert_same_run(usual("cql.py", "box")[1], folder)


# ---- The trained policy ----


def raw_observations(n, kind):
    space = gym.make(ENVS[kind]).observation_space
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (n, *space.shape)).astype(np.float32)


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_load_policy_is_the_trained_agent(file, kind, tmp_path, monkeypatch):
    policies, Policy = [], module(file).Policy
    with monkeypatch.context() as patch:
        patch.setattr(module(file), "Policy", lambda *x: policies.append(Policy(*x)) or policies[0])
        folder = run(file, kind, tmp_path, normalize_obs=True, eval_every=0)[1]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "nothing"))  # it needs no dataset
    monkeypatch.setattr(gym, "make", None)  # and no environment
    loaded = module(file).load_policy(str(folder))
    monkeypatch.undo()
    obs, space = raw_observations(50, kind), gym.make(ENVS[kind]).action_space
    for deterministic in (True, False):
        actions = []
        for policy in (policies[0], loaded):
            torch.manual_seed(0)
            actions.append(policy.act(obs, deterministic=deterministic))
        assert np.array_equal(*actions)
        assert actions[0].shape == (50, *space.shape) and all(map(space.contains, actions[0]))
    assert loaded.units.obs_mean.abs().sum() > 0  # the normaliser came with it
    assert not loaded.training


@pytest.mark.parametrize("shape", [(3,), (2, 4), (5, 1), (0, 3), (0,), ()])
def test_observations_of_another_shape_are_an_error_not_garbage(shape, usual):
    """Three numbers of one Pendulum would otherwise broadcast to three observations."""
    policy = cql.load_policy(usual("cql.py", "box")[1])
    with refused(re.escape(f"{shape} are not (N, 3) numbers")):
        policy.act(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_observations_that_are_no_numbers_are_an_error(value, usual):
    policy = cql.load_policy(usual("cql.py", "box")[1])
    with refused("an observation is NaN or infinite"):
        policy.act(np.array([[0, 0, 0], [0, value, 0]]))
    with refused(r"^observations .Dict, .* gymnasium.spaces.flatten.: [A-Z][A-Za-z]+Error: "):
        policy.act([["a", "b", "c"]])


def test_dict_observations_in_training_evaluation_and_the_loaded_policy(tmp_path, monkeypatch):
    """Stored datasets have sorted keys, this environment has not: both must be flattened alike."""
    seen, act = [], cql.Policy.act
    with monkeypatch.context() as patch:
        patch.setattr(cql.Policy, "act", lambda self, obs: (seen.append(obs), act(self, obs))[1])
        result, folder = run("cql.py", "box", tmp_path, dataset_id=("lab/dict-v0",))
    assert len(seen) == 3 * 5 and seen[-1].shape == (2, 5)
    for obs in seen:  # angle (2), mode (one-hot, 2), speed (1)
        assert (obs[:, :2] <= 1).all() and (obs[:, 4] >= 10).all()
        assert (obs[:, 2:4].sum(1) == 1).all()
    assert -10 <= result["return_mean"] <= 15 and result["score"] is None
    policy, env = cql.load_policy(folder), DictEnv()
    obs = spaces.flatten(policy.units.observation_space, env.reset(seed=0)[0])
    action = policy.act(obs[None])
    assert action.shape == (1, 1) and env.action_space.contains(action[0].astype(np.float32))


# ---- Evaluation ----


class Line(gym.Env):
    """Episode length and reward follow from the seed; to be stepped after the end is an error."""

    made = []  # noqa: RUF012

    def __init__(self):
        self.ended, self.closed = True, False
        self.made.append(self)

    def reset(self, seed=None, options=None):
        self.seed, self.t, self.ended = seed, 0, False
        return np.array([seed, 0], np.float32), {}

    def step(self, action):
        assert not self.ended and not self.closed
        self.t += 1
        terminated, truncated = self.t == 1 + self.seed % 4, self.t == 3
        self.ended = terminated or truncated
        obs = np.array([self.seed, self.t], np.float32)
        return obs, float(action[0]), terminated, truncated, {}

    def close(self):
        self.closed = True


def test_evaluate():
    """Its own seed for each episode, one batched act for those alive, none stepped after its end,
    undiscounted sums, and the random states of the process as before."""
    calls = []

    def act(obs):
        calls.append(obs)
        return obs[:, :1] + 0 * torch.rand(1).numpy()

    Line.made.clear()
    torch.manual_seed(5)
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    returns = cql.evaluate(SimpleNamespace(act=act), Line, 5)
    assert [env.seed for env in Line.made] == [10_000, 10_001, 10_002, 10_003, 10_004]
    lengths = [min(1 + seed % 4, 3) for seed in range(10_000, 10_005)]
    assert lengths == [1, 2, 3, 3, 1]
    expected = [n * s for n, s in zip(lengths, range(10_000, 10_005), strict=True)]
    assert returns.tolist() == expected  # every action went to its own environment
    assert [len(obs) for obs in calls] == [5, 3, 2]
    assert [obs[:, 0].astype(int).tolist() for obs in calls[1:]] == [
        [10_001, 10_002, 10_003],
        [10_002, 10_003],
    ]
    assert all((obs[:, 1] == t).all() for t, obs in enumerate(calls))
    assert all(env.closed and env.ended for env in Line.made)
    assert torch.equal(torch.get_rng_state(), rng)
    assert np.array_equal(np.random.get_state()[1], numpy_rng)


def test_evaluate_seeds_what_the_policy_draws():
    """The same result whatever the state of the process."""
    policy, found = SimpleNamespace(act=lambda obs: torch.rand(len(obs), 1).numpy()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(cql.evaluate(policy, Line, 5).tolist())
    assert found[0] == found[1] and len(set(found[0])) == 5


def test_reported_returns_are_raw(usual, tmp_path):
    result = run("cql.py", "box", tmp_path, reward_scale=100.0, reward_shift=-7.0)[0]
    assert result["data_return_mean"] == usual("cql.py", "box")[0]["data_return_mean"]
    for value in result["returns"]:  # 12 steps of Pendulum cost at most 16.3 each
        assert -12 * 16.3 <= value <= 0


def test_the_result_names_all_datasets(tmp_path):
    both = "lab/box-v0", "lab/box-bare-v0"
    result, folder = run("cql.py", "box", tmp_path, dataset_id=both)
    assert result["dataset"] == "lab/box-v0+lab/box-bare-v0"
    assert folder.name.startswith("cql__lab-box-v0+lab-box-bare-v0__s4__")


@pytest.mark.parametrize("file", TRAINING)
def test_without_an_environment_it_trains_logs_and_saves(file, tmp_path, capsys):
    bare = {"dataset_id": ("lab/box-bare-v0",)}
    result, folder = run(file, "box", tmp_path, **bare)
    printed = capsys.readouterr().out
    assert "no evaluation" in printed and "--env-id" in printed and "ope.py" in printed
    assert [result[k] for k in ("return_mean", "return_std", "score")] == [None] * 3
    assert result["returns"] == [] and result["data_return_mean"] is not None
    metrics = rows(folder / "metrics.csv")
    assert [row["step"] for row in metrics] == ["4", "8", "12"]
    assert {row["return_mean"] for row in metrics} == {""}
    module(file).load_policy(folder).act(raw_observations(2, "box"))
    result, other = run(file, "box", tmp_path, env_id="Pendulum-v1", eval_every=0, **bare)
    assert result["return_mean"] < 0 and len(result["returns"]) == 2
    assert equal(weights(folder), weights(other))


def test_the_score_is_0_and_100_at_the_reference_returns(tmp_path, monkeypatch):
    for value, score in ((-99.0, 0), (101.0, 100), (1.0, 50)):
        monkeypatch.setattr(cql, "evaluate", lambda p, e, n, value=value: np.full(n, value))
        result = run("cql.py", "box", tmp_path, steps=1)[0]
        assert result["score"] == pytest.approx(score) and result["return_std"] == 0


@pytest.mark.parametrize("file", ["cql.py", "mopo.py"])
def test_sac_sees_standardised_observations_by_default(file, tmp_path):
    """With raw ones CQL spins past the goal on Pendulum: too few data at high speed."""
    units = module(file).load_policy(run(file, "box", tmp_path, steps=1)[1]).units
    data = module(file).Dataset(("lab/box-v0",))
    assert torch.allclose(units.obs_mean, data.transitions.obs.mean(0), atol=1e-5)
    assert torch.allclose(units.obs_std, data.transitions.obs.std(0, correction=0) + 1e-3)


# ---- Health ----


def health_data(reward, terminal=0.0, lengths=(3,)):
    """Transitions of episodes of these lengths, with these rewards; the last of each terminal."""
    lengths = torch.tensor(lengths)
    x, end = torch.zeros(len(reward), 1), torch.zeros(len(reward))
    end[lengths.cumsum(0) - 1] = terminal
    batch = cql.Batch(x, x, torch.tensor(reward), x, end)
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    return SimpleNamespace(transitions=batch, episode=episode)


@pytest.mark.parametrize(
    ("q_data", "q_policy", "problem"),
    [
        (3.0, 4.0, None),
        (20.29, -10.29, None),  # within a hundredth of what is possible: not worth a word
        (3.0, 20.31, "the critic extrapolates. Lower it."),
        (3.0, -10.31, "too pessimistic. Raise it."),
        (3.0, 40.0, "the critic extrapolates. Lower it."),
        (40.0, 4.0, "the critic extrapolates. Lower it."),
        (3.0, -11.0, "too pessimistic. Raise it."),
        (-11.0, 4.0, "too pessimistic. Raise it."),
    ],
)
def test_q_health(q_data, q_policy, problem):
    metrics = {"q_data": q_data, "q_policy": q_policy}
    line = cql.q_health(metrics, health_data([-1.0, 2.0, 0.0]), 0.9, "Lower it.", "Raise it.")
    assert line.startswith(f"Q(s, pi(s)) = {q_policy:g}, Q on the data {q_data:g}, where")
    assert "possible are -10 to 20" in line and "\n" not in line
    assert line.endswith(problem or "20")


def test_q_health_takes_the_mean_of_the_discounted_returns_and_the_horizon():
    """Which is endless where an episode was cut, or where one ended sooner than another: then a
    better policy may live longer than any that was logged."""
    rewards, gamma = [1.0, 2.0, 3.0, 5.0, 7.0, 0.0], 0.5
    returns = [1 + (2 + 3 * gamma) * gamma, 2 + 3 * gamma, 3, 5 + 7 * gamma, 7, 0]
    other = [1 + 2 * gamma, 2, 3 + (5 + 7 * gamma) * gamma, 5 + 7 * gamma, 7, 0]
    for terminal, lengths, steps, expected in (
        (0.0, (3, 3), 2, returns),
        (1.0, (3, 3), 1 + 0.5 + 0.25, returns),
        (1.0, (2, 4), 2, other),
    ):
        data = health_data(rewards, terminal, lengths)
        line = cql.q_health({"q_data": 1, "q_policy": 1}, data, gamma, "", "")
        assert f"average {np.mean(expected):.4g}; possible are 0 to {7 * steps:.4g}" in line


def test_q_health_knows_returns_of_gammas_near_1():
    """1 - gamma^(t + 1) has few digits in float32."""
    data = health_data([-1.0] * 30, 0.0, (30,))
    line = cql.q_health({"q_data": -1, "q_policy": -1}, data, 1 - 1e-6, "", "")
    assert "average -15.5;" in line
    data = health_data([1.0, 0.0], 1.0, (1, 1))
    line = cql.q_health({"q_data": 1, "q_policy": 1}, data, 1 - 1e-6, "", "")
    assert line.endswith("possible are 0 to 1")


def test_q_health_asks_for_another_scale_by_the_size_of_the_rewards():
    """Not by their mean: a game that is won as often as lost has returns around 0."""
    metrics, found = {"q_data": 0, "q_policy": 0}, []
    for size in (9e3, 2e4, 0.05, 2e-3, 9e-4):
        data = health_data([size, -size], lengths=(1, 1))
        found.append("--reward-scale" in cql.q_health(metrics, data, 0.5, "", ""))
    assert found == [False, True, False, False, True]
    line = cql.q_health(metrics | {"q_data": 1}, health_data([0.0, 0.0], lengths=(2,)), 0.5, "", "")
    assert line.endswith("possible are 0 to 0: all rewards are 0, nothing can be learned")


# ---- Copied out alone ----


@pytest.mark.parametrize("file", TRAINING)
def test_copied_out_alone_it_runs(file, tmp_path, monkeypatch, capsys):
    """In an empty folder, with the built-in data, by the command line, without its siblings."""
    copied = tmp_path / file
    copied.write_bytes((ROOT / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    for other in {*FILES} - {file}:
        monkeypatch.setitem(sys.modules, other.removesuffix(".py"), None)  # no import finds it
    flags = {"steps": 2, "eval_episodes": 1, "model_epochs": 1, "rollout_starts": 16}
    flags = {k: v for k, v in flags.items() if has_flag(module(file), k)}
    command = [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v)]
    with flags_of_the_shell(copied, command):
        runpy.run_path(str(copied), run_name="__main__")
    assert "pendulum/mixed-v0: built in" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {file, "runs"}
