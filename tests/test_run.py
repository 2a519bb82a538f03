"""What every training file does beside learning: flags, the run's folder, resuming, evaluation, the
trained policy. Each test runs for every training file that exists and for the action spaces that
the file supports, with networks, datasets and runs that are as small as can be."""

import csv
import importlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from test_copies import ROOT, TRAINING

FILES = [name for name in TRAINING if (ROOT / name).exists()]
BOX_ONLY = {"mopo.py"}
CASES = [(f, k) for f in FILES for k in ("box", "discrete") if k == "box" or f not in BOX_ONLY]
ENVS = {"box": "Pendulum-v1", "discrete": "CartPole-v1"}
pytestmark = pytest.mark.filterwarnings("ignore")  # Minari asks for an author and the like

TINY = {  # whatever of these a file has
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
    "rollout_length": 2,
    "rollout_starts": 16,
    "rollout_every": 6,
    "real_ratio": 0.5,
}


def module(file):
    return importlib.import_module(file.removesuffix(".py"))


def has_flag(file, name):
    return name in {field.name for field in fields(module(file).Args)}


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
        columns = (np.array(column) for column in zip(*rows, strict=True))
        yield EpisodeBuffer(None, None, None, np.array(obs) if isinstance(obs, list) else obs,
                            *columns, {})  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A Minari root with one dataset per action space, with and without an environment."""
    root = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        for kind, env_id in ENVS.items():
            env = gym.make(env_id, max_episode_steps=12)
            extra = {"env": env.spec, "ref_min_score": -99.0, "ref_max_score": 101.0}
            store = minari.create_dataset_from_buffers
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
    tiny = {name: value for name, value in TINY.items() if has_flag(file, name)}
    given = {"dataset_id": (f"lab/{kind}-v0",), "out_dir": str(out_dir)} | tiny | flags
    return module(file).Args(**given)


def run(file, kind, out_dir, **flags):
    """main in a new folder -> (its result, the folder)."""
    before = set(out_dir.iterdir()) if out_dir.exists() else set()
    result = module(file).main(args_for(file, kind, out_dir, **flags))
    (folder,) = set(out_dir.iterdir()) - before
    return result, folder


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


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
    state = checkpoint(folder)["agent"]
    return {k: v for k, v in state.items() if not k.startswith(("units.", "alpha.constant"))}


def assert_same_run(one, other):
    a, b = checkpoint(one), checkpoint(other)
    for key in ("step", "agent", "optimizers", "rng", "metrics", "returns"):
        assert equal(a[key], b[key]), key
    for name in ("metrics.csv", "returns.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]


def watch_agent(file, monkeypatch, change):
    """Lets `change(agent)` alter each agent that the file builds."""
    build = module(file).Agent

    def watched(data, args):
        agent = build(data, args)
        change(agent)
        return agent

    monkeypatch.setattr(module(file), "Agent", watched)


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


# ---- Importing and calling ----


@pytest.mark.parametrize("file", FILES)
def test_importing_has_no_side_effect(file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    precision = torch.backends.mkldnn.matmul.fp32_precision
    handler, numpy_rng = signal.getsignal(signal.SIGTERM), np.random.get_state()[1].copy()
    spec = importlib.util.spec_from_file_location("fresh_copy", ROOT / file)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_copy", fresh)  # dataclasses look there
    spec.loader.exec_module(fresh)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert signal.getsignal(signal.SIGTERM) == handler
    assert np.array_equal(np.random.get_state()[1], numpy_rng)
    assert torch.get_default_dtype() == torch.float32


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

    before = flags.fp32_precision
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    try:
        importlib.import_module("cql").use_fast_matmul()
        assert flags.fp32_precision == ("none" if rounds else "bf16")
    finally:
        flags.fp32_precision = before


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_a_run_leaves_what_the_design_says(file, kind, tmp_path, capsys):
    name = file.removesuffix(".py")
    result, folder = run(file, kind, tmp_path / "out", seed=3)
    assert re.fullmatch(rf"{name}__lab-{kind}-v0__s3__\d{{8}}-\d{{6}}-\d{{6}}", folder.name)
    files = {"args.json", "metrics.csv", "returns.csv", "checkpoint.pt", file, "result.json"}
    assert {p.name for p in folder.iterdir()} - {"model.txt"} == files
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert max(times, key=times.get) == "result.json"
    assert (folder / file).read_bytes() == (ROOT / file).read_bytes()

    facts = json.loads((folder / "args.json").read_text())
    expected = asdict(args_for(file, kind, tmp_path / "out", seed=3))
    assert facts["args"] == json.loads(json.dumps(expected))
    assert set(facts["versions"]) == {"torch", "numpy", "gymnasium", "minari", "tyro"}
    assert facts["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}|", facts["commit"])

    metrics = rows(folder / "metrics.csv")
    assert [row["step"] for row in metrics] == ["4", "8", "12"]
    assert not {"seconds", "time"} & set(metrics[0])
    assert all(math.isfinite(float(x)) for row in metrics for x in row.values())
    documented = module(file).__doc__
    for metric in set(metrics[0]) - {"step", "return_mean"}:
        assert metric in documented, f"{metric} is not in the docstring"

    returns = rows(folder / "returns.csv")
    assert list(returns[0]) == ["step", "seed", "return"]
    found = [(int(row["step"]), int(row["seed"])) for row in returns]
    assert found == [(4, 10_000), (8, 10_000), (12, 10_000), (12, 10_001)]  # a tenth, rounded up
    final = [float(row["return"]) for row in returns[-2:]]
    assert float(metrics[-1]["return_mean"]) == pytest.approx(np.mean(final))

    state = checkpoint(folder)  # loads with weights_only=True
    assert state["step"] == 12 and state["args"] == expected
    env = gym.make(ENVS[kind])
    load_space = minari.serialization.deserialize_space
    assert load_space(state["observation_space"]) == env.observation_space
    assert load_space(state["action_space"]) == env.action_space
    assert {"units.obs_mean", "units.obs_std"} <= set(state["agent"])

    assert json.loads((folder / "result.json").read_text()) == result
    must = "algorithm dataset seed steps return_mean return_std score data_return_mean seconds"
    assert set(must.split()) <= set(result)
    assert (result["algorithm"], result["dataset"]) == (name, f"lab/{kind}-v0")
    assert (result["seed"], result["steps"]) == (3, 12)
    assert result["return_mean"] == pytest.approx(np.mean(final))
    assert result["return_std"] == pytest.approx(np.std(final))
    assert result["score"] == pytest.approx(100 * (np.mean(final) + 99) / 200)
    assert 0 < result["seconds"] < 600

    printed = capsys.readouterr().out
    for text in (f"run folder {folder}", "evaluation in", "transitions in 8 episodes", "health"):
        assert text in printed


@pytest.mark.parametrize("file", FILES)
def test_main_can_be_called_in_a_loop(file, tmp_path):
    results = [run(file, "box", tmp_path, seed=seed, steps=4) for seed in (0, 1, 0)]
    folders = [folder for _, folder in results]
    assert len(set(folders)) == 3
    assert_same_run(folders[0], folders[2])
    assert not equal(weights(folders[0]), weights(folders[1]))


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_the_same_seed_gives_the_same_run_whatever_the_state_of_the_process(file, kind, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    first = run(file, kind, tmp_path)[1]
    torch.rand(7)
    np.random.rand(7)
    second = run(file, kind, tmp_path)[1]
    assert_same_run(first, second)


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_results_do_not_depend_on_the_evaluation(file, kind, tmp_path):
    """Neither the weights nor any metric but the return."""
    usual = run(file, kind, tmp_path)[1]
    for flags in ({"eval_every": 0}, {"eval_every": 8, "eval_episodes": 25}, {"eval_episodes": 0}):
        other = run(file, kind, tmp_path, **flags)[1]
        assert equal(checkpoint(usual)["agent"], checkpoint(other)["agent"]), flags
        assert equal(checkpoint(usual)["rng"], checkpoint(other)["rng"]), flags
        tables = [rows(folder / "metrics.csv") for folder in (usual, other)]
        for row in [*tables[0], *tables[1]]:
            row.pop("return_mean")
        assert tables[0] == tables[1], flags


# ---- Interrupting and resuming ----


def interrupted(file, kind, out_dir, **flags):
    """A run that KeyboardInterrupt stops -> its folder."""
    before = set(out_dir.iterdir()) if out_dir.exists() else set()
    with pytest.raises(KeyboardInterrupt):
        module(file).main(args_for(file, kind, out_dir, **flags))
    (folder,) = set(out_dir.iterdir()) - before
    return folder


def resume(file, folder):
    return module(file).main(module(file).Args(resume=str(folder)))


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_interrupted_in_an_update_and_resumed(file, kind, tmp_path, monkeypatch, capsys):
    """Before the first checkpoint, right after one, between two, in the last update."""
    whole = run(file, kind, tmp_path)[1]
    for stop in (1, 3, 5, 10, 12):
        with monkeypatch.context() as patch:

            def stopping(agent, stop=stop):
                update, calls = agent.update, []

                def counting(*inputs):
                    calls.append(None)
                    if len(calls) == stop:
                        raise KeyboardInterrupt
                    return update(*inputs)

                agent.update = counting

            watch_agent(file, patch, stopping)
            folder = interrupted(file, kind, tmp_path)
        assert not (folder / "result.json").exists()
        assert f"python {file} --resume {folder}" in capsys.readouterr().out
        result = resume(file, folder)
        assert_same_run(whole, folder)
        assert result["steps"] == 12 and result == json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_interrupted_in_an_evaluation_and_resumed(file, kind, tmp_path, monkeypatch):
    """In each of the three; the interrupted one leaves nothing behind."""
    whole = run(file, kind, tmp_path)[1]
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            evaluate, calls = module(file).evaluate, []

            def stopping(*inputs, evaluate=evaluate, calls=calls, stop=stop):
                returns = evaluate(*inputs)
                calls.append(None)
                if len(calls) == stop:
                    raise KeyboardInterrupt
                return returns

            patch.setattr(module(file), "evaluate", stopping)
            folder = interrupted(file, kind, tmp_path)
        resume(file, folder)
        assert_same_run(whole, folder)


@pytest.mark.parametrize("file", FILES)
def test_killed_between_any_two_files_that_it_writes_and_resumed(file, tmp_path, monkeypatch):
    """A run has to survive a kill at every moment of a save; args.json is the first file."""
    writes = []
    with monkeypatch.context() as patch:
        write = module(file).write
        patch.setattr(module(file), "write", lambda path, x: (writes.append(path), write(path, x)))
        whole = run(file, "box", tmp_path)[1]
    assert writes[0].name == "args.json" and writes[-1].name == "result.json"
    for stop in range(2, len(writes) + 1):
        with monkeypatch.context() as patch:
            calls = []

            def stopping(path, content, calls=calls, stop=stop):
                calls.append(path)
                if len(calls) == stop:  # before the renaming
                    path.with_name(path.name + ".tmp").write_bytes(b"half")
                    raise KeyboardInterrupt
                write(path, content)

            patch.setattr(module(file), "write", stopping)
            folder = interrupted(file, "box", tmp_path)
        resume(file, folder)
        assert_same_run(whole, folder)


def interrupt(run):
    raise KeyboardInterrupt  # a signal would be lost where the shell has SIGINT ignored


@pytest.mark.parametrize("file", FILES)
def test_the_printed_command_survives_a_folder_with_spaces(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module(file), "save_checkpoint", interrupt)
    folder = interrupted(file, "box", tmp_path / "my runs")
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert shlex.split(line.partition("python ")[2]) == [file, "--resume", str(folder)]


@pytest.mark.parametrize("file", FILES)
def test_interrupted_twice_and_resumed_twice(file, tmp_path, monkeypatch):
    whole = run(file, "box", tmp_path)[1]

    def stopping(agent):
        update, calls = agent.update, []

        def counting(*inputs):
            calls.append(None)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return update(*inputs)

        agent.update = counting

    with monkeypatch.context() as patch:
        watch_agent(file, patch, stopping)
        folder = interrupted(file, "box", tmp_path)
        assert checkpoint(folder)["step"] == 4
        with pytest.raises(KeyboardInterrupt):
            resume(file, folder)
        assert checkpoint(folder)["step"] == 8
    resume(file, folder)
    assert_same_run(whole, folder)


def start(folder, *command):
    """A command line in a process of its own, in `folder`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def wait_for(process, pattern):
    """The folder of the run, once a file in it matches."""
    limit = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < limit:
        if found := list(process.cwd.glob(pattern)):
            return found[0].parent
        time.sleep(0.01)
    raise AssertionError(f"no {pattern}: {process.communicate()}")


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


@pytest.mark.parametrize(
    ("file", "kind"), [case for case in CASES if "box" in case or "cql.py" in case]
)  # once per file will do, cql.py does both
def test_stopped_and_killed_at_random_moments_and_resumed(file, kind, tmp_path):
    """SIGTERM, then the printed command, SIGKILL, then resumed in this process. The moments count
    checkpoints, of which a run has 50, so that they do not depend on the machine's speed."""
    moments = random.Random(0)
    flags = {"steps": 1000, "log_every": 20, "eval_every": 40}

    def some_checkpoints_later(process, path):
        for _ in range(moments.randint(1, 8)):
            seen = path.stat().st_mtime_ns
            while process.poll() is None and path.stat().st_mtime_ns == seen:
                time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))

    args = args_for(file, kind, "runs", **flags)
    process = start(tmp_path, ROOT / file, *flag_list(args))
    process.cwd = tmp_path
    folder = wait_for(process, "runs/*/checkpoint.pt")
    some_checkpoints_later(process, folder / "checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err and not (folder / "result.json").exists()
    command = out.strip().splitlines()[-1]
    assert command.startswith("stopped; to go on: python ")
    command = shlex.split(command.removeprefix("stopped; to go on: python "))
    assert command == [file, "--resume", f"runs/{folder.name}"]

    process = start(tmp_path, ROOT / file, *command[1:])
    some_checkpoints_later(process, folder / "checkpoint.pt")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (folder / "result.json").exists(), "too fast for this test: raise its steps"
    resume(file, folder)
    assert_same_run(run(file, kind, tmp_path / "whole", **flags)[1], folder)


# ---- What --resume refuses ----


@pytest.mark.parametrize("file", FILES)
def test_resume_takes_no_other_flag_and_no_complete_run(file, tmp_path, monkeypatch):
    folder = run(file, "box", tmp_path)[1]
    error = module(file).UserError
    Args, main = module(file).Args, module(file).main
    with pytest.raises(error, match=r"--resume .*complete") as caught:
        resume(file, folder)
    assert str(folder) in one_line(caught)
    with pytest.raises(error, match=r"--resume takes all flags from the run") as caught:
        main(Args(resume=str(folder), seed=5))
    one_line(caught)
    for nothing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(error, match=r"--resume .*not the folder of a run") as caught:
            main(Args(resume=str(nothing)))
        assert str(nothing) in one_line(caught)
    for given in (["--resume", str(folder), "--steps", str(Args.steps)],  # given, if the default
                  ["--seed", "1", "--resume", str(folder)]):  # fmt: skip
        text = exit_line(file, monkeypatch, given)
        assert "--resume takes all flags from the run" in text


@pytest.mark.parametrize("file", FILES)
def test_resume_refuses_the_run_of_another_algorithm(file, tmp_path):
    folder = run(file, "box", tmp_path)[1]
    (folder / "result.json").unlink()
    (folder / file).rename(folder / "other.py")
    facts = json.loads((folder / "args.json").read_text())
    facts["args"]["knob_of_another_method"] = 1.0
    (folder / "args.json").write_text(json.dumps(facts))
    with pytest.raises(module(file).UserError, match="--resume") as caught:
        resume(file, folder)
    assert str(folder) in one_line(caught)


def exit_line(file, monkeypatch, flags):
    """What the command line prints as it gives up, exit code 1."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", [file, *flags])
    try:
        with pytest.raises(SystemExit) as caught:
            module(file).command_line()
    finally:
        signal.signal(signal.SIGTERM, handler)
    text = caught.value.code  # sys.exit(text) prints it and exits with 1
    assert isinstance(text, str) and text.startswith(f"{file.removesuffix('.py')}: ")
    assert "\n" not in text
    return text


# ---- NaN ----


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops_the_run_and_keeps_the_good_checkpoint(file, value, tmp_path, monkeypatch):
    """Update 6 breaks a weight, the log after update 8 notices; update 4 was the last good one."""
    good, names = [], []

    def breaking(agent):
        update, calls = agent.update, []

        def counting(*inputs):
            metrics = update(*inputs)
            calls.append(None)
            names.append(next(iter(metrics)))
            if len(calls) == 6:
                good.append((next(tmp_path.iterdir()) / "checkpoint.pt").read_bytes())
            return metrics | {names[0]: torch.tensor(value)} if len(calls) >= 6 else metrics

        agent.update = counting

    watch_agent(file, monkeypatch, breaking)
    with pytest.raises(module(file).UserError) as caught:
        run(file, "box", tmp_path)
    (folder,) = tmp_path.iterdir()
    text = one_line(caught)
    for part in ("update 8", f"{names[0]} is {value}", "update 4", str(folder)):
        assert part in text
    assert (folder / "checkpoint.pt").read_bytes() == good[0]
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["4"]
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("file", FILES)
def test_nan_before_the_first_log_promises_no_checkpoint(file, tmp_path, monkeypatch):
    def breaking(agent):
        update = agent.update
        agent.update = lambda *inputs: update(*inputs) | {"critic_loss": torch.tensor(math.nan)}

    watch_agent(file, monkeypatch, breaking)
    with pytest.raises(module(file).UserError, match="update 4: critic_loss is nan") as caught:
        run(file, "box", tmp_path)
    (folder,) = tmp_path.iterdir()
    text = one_line(caught)
    assert ("checkpoint is that of" in text) == (folder / "checkpoint.pt").exists(), text


@pytest.mark.parametrize("file", [f for f in FILES if has_flag(f, "reward_scale")])
def test_a_loss_that_overflows_stops_the_run(file, tmp_path):
    with pytest.raises(module(file).UserError, match=r"is (nan|inf|not finite)"):
        run(file, "box", tmp_path, reward_scale=1e30)


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
    "device": "cpu",
    "out_dir": None,  # another folder
    "resume": None,  # tested above
    "batch_size": 16,
    "hidden": (6, 5),
    "gamma": 0.9,
    "polyak": 0.5,
    "lr": 0.01,
    "critic_lr": 0.01,
    "actor_lr": 0.01,
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
    "online_steps": None,  # test_iql.py, test_awac.py
    "expectile": 0.8,
    "beta": 1.0,
    "lam": 0.3,
    # bcq
    "threshold": 0.9,
    "phi": 0.2,
    "soft_min": 0.5,
    "target_samples": 5,
    "act_samples": 7,
    "vae_hidden": (6, 5),
    # mopo
    "model_lr": 0.01,
    "model_hidden": (6, 5),
    "model_epochs": 1,
    "uncertainty": "disagreement",
    "penalty": 3.0,
    "rollout_length": 3,
    "rollout_starts": 8,
    "rollout_every": 3,
    "real_ratio": 0.25,
    "conservative": 1.0,
}
# Flags that must not change the weights, and those that do nothing with the other action space.
NO_EFFECT = {"env_id", "log_every", "eval_every", "eval_episodes", "device", "out_dir"}
NO_EFFECT_WITH = {
    ("cql.py", "discrete"): {"actor_lr", "samples"},
    ("bcq.py", "box"): {"threshold", "act_samples"},
    ("bcq.py", "discrete"): {"phi", "soft_min", "target_samples", "act_samples", "vae_hidden"},
}
REFUSED = {("cql.py", "discrete"): {"bc_weight"}}


@pytest.mark.parametrize("file", FILES)
def test_the_table_of_flags_is_complete(file):
    flags = {field.name for field in fields(module(file).Args)}
    booleans = {field.name for field in fields(module(file).Args) if field.type is bool}
    assert flags - booleans - set(VALUES) == set(), "give these a value in VALUES"
    for field in fields(module(file).Args):
        value = VALUES.get(field.name)
        for one in value.values() if isinstance(value, dict) else [value]:
            assert one is None or one not in (field.default, TINY.get(field.name)), field.name


@pytest.fixture(scope="module")
def usual(stored, tmp_path_factory):
    """The weights of each file's run with the flags of TINY."""
    found = {}

    def weights_of(file, kind):
        if (file, kind) not in found:
            found[file, kind] = weights(run(file, kind, tmp_path_factory.mktemp("usual"))[1])
        return found[file, kind]

    return weights_of


@pytest.mark.parametrize(
    ("file", "kind", "name"),
    [
        pytest.param(file, kind, field.name, id=f"{file}-{kind}-{field.name}")
        for file, kind in CASES
        for field in fields(module(file).Args)
        if VALUES.get(field.name) or field.type is bool
    ],
)
def test_every_flag_with_another_value(file, kind, name, tmp_path, usual):
    """It is accepted, lands in args.json, and changes the weights or, as it should, does not."""
    value = VALUES.get(name)
    value = value[kind] if isinstance(value, dict) else value
    if value is None:  # a boolean
        value = not getattr(module(file).Args(), name)
    if name in REFUSED.get((file, kind), ()):
        with pytest.raises(module(file).UserError, match=f"--{name.replace('_', '-')}"):
            run(file, kind, tmp_path, **{name: value})
        return
    before, (_, folder) = usual(file, kind), run(file, kind, tmp_path, **{name: value})
    stored_args = json.loads((folder / "args.json").read_text())["args"]
    assert stored_args[name] == json.loads(json.dumps(value))
    after = weights(folder)
    no_effect = name in NO_EFFECT | NO_EFFECT_WITH.get((file, kind), set())
    assert equal(before, after) == no_effect


@pytest.mark.parametrize("file", FILES)
def test_every_boolean_both_ways(file, tmp_path):
    """With the value that is not the default, see above; here the default, given by its flag."""
    booleans = {field.name: field.default for field in fields(module(file).Args)
                if field.type is bool}  # fmt: skip
    given = args_for(file, "box", tmp_path, **booleans)
    assert [type(getattr(given, name)) for name in booleans] == [bool] * len(booleans)
    results = {value: run(file, "box", tmp_path, **dict.fromkeys(booleans, value))
               for value in (False, True)}  # fmt: skip
    for value, (_, folder) in results.items():
        stored_args = json.loads((folder / "args.json").read_text())["args"]
        assert all(stored_args[name] is value for name in booleans)


@pytest.mark.parametrize("file", FILES)
def test_another_out_dir(file, tmp_path):
    result, folder = run(file, "box", tmp_path / "not" / "there yet")
    assert folder.parent == tmp_path / "not" / "there yet" and result["steps"] == 12


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_device_cuda(file, kind, tmp_path, usual):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device on this machine")
    _, folder = run(file, kind, tmp_path, device="cuda", eval_every=8)
    agent = module(file).load_policy(folder)
    assert next(agent.parameters()).device.type == "cpu"
    again = run(file, kind, tmp_path, device="cuda", eval_every=0)[1]
    assert equal(weights(folder), weights(again))


@pytest.mark.parametrize("file", FILES)
def test_the_command_line_gives_the_flags_to_main(file, tmp_path, monkeypatch):
    """Each flag by its name in the shell, several values after one flag, booleans as --no-x."""
    got = []
    monkeypatch.setattr(module(file), "main", got.append)
    skip = {"resume"}
    for kind in ("box", "discrete"):
        values = {}
        for field in fields(module(file).Args):
            value = VALUES.get(field.name)
            value = value[kind] if isinstance(value, dict) else value
            if field.type is bool:
                value = kind == "box"
            if value is not None and field.name not in skip:
                values[field.name] = value
        args = module(file).Args(**values)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            monkeypatch.setattr(sys, "argv", [file, *map(str, flag_list(args))])
            module(file).command_line()
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert got.pop() == args


INVALID = [
    ("seed", -1),
    ("steps", 0),
    ("log_every", 0),
    ("eval_every", -4),
    ("eval_every", 6),  # not a multiple of --log-every 4
    ("eval_episodes", -1),
    ("batch_size", 0),
    ("hidden", (8, 0)),
    ("gamma", 1.0),
    ("gamma", -0.1),
    ("gamma", math.nan),
    ("polyak", 0.0),
    ("polyak", 1.5),
    ("lr", 0.0),
    ("critic_lr", -1e-3),
    ("actor_lr", 2.0),
    ("model_lr", 0.0),
    ("reward_scale", 0.0),
    ("reward_scale", -1.0),
    ("reward_scale", math.nan),
    ("reward_shift", math.inf),
    ("dataset_id", ()),
    ("dataset_id", ("pendulum/mixd-v0",)),
    ("dataset_id", "lab/box-v0"),  # a string where a tuple is meant
    ("env_id", "NoSuchEnv-v0"),
    ("env_id", "MountainCar-v0"),
]


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [(f, name, value) for f in FILES for name, value in INVALID if has_flag(f, name)],
)
def test_invalid_values_are_one_line_and_leave_no_folder(file, name, value, tmp_path):
    with pytest.raises(module(file).UserError) as caught:
        module(file).main(args_for(file, "box", tmp_path / "out", **{name: value}))
    text = one_line(caught)
    if name == "dataset_id" and "pendulum/mixd-v0" in value:
        assert "pendulum/mixed-v0" in text  # the list of those that exist
    elif name == "env_id":
        assert value in text
    else:
        assert f"--{name.replace('_', '-')}" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_device_that_is_not_there(file, tmp_path):
    missing = [n for n in ("cuda", "mps") if not getattr(torch, n).is_available()]
    for name in missing:
        with pytest.raises(module(file).UserError, match=f"--device {name}") as caught:
            module(file).main(args_for(file, "box", tmp_path / "out", device=name))
        one_line(caught)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", FILES)
def test_an_out_dir_that_cannot_be_made(file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(module(file).UserError, match="--out-dir") as caught:
        module(file).main(args_for(file, "box", tmp_path / "file"))
    one_line(caught)


@pytest.mark.parametrize("file", FILES)
def test_the_command_line_prints_errors_as_one_line(file, monkeypatch):
    assert "--steps 0: " in exit_line(file, monkeypatch, ["--steps", "0"])
    text = exit_line(file, monkeypatch, ["--dataset-id", "pendulum/mixd-v0"])
    assert "pendulum/mixd-v0" in text


@pytest.mark.parametrize("file", sorted(BOX_ONLY & set(FILES)))
def test_files_for_box_actions_say_so(file, tmp_path):
    with pytest.raises(module(file).UserError, match="Discrete") as caught:
        module(file).main(args_for(file, "discrete", tmp_path / "out"))
    one_line(caught)
    assert not (tmp_path / "out").exists()


# ---- The trained policy ----


def raw_observations(n, kind):
    space = gym.make(ENVS[kind]).observation_space
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (n, *space.shape)).astype(np.float32)


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_load_policy_is_the_trained_agent(file, kind, tmp_path, monkeypatch):
    trained = []
    with monkeypatch.context() as patch:
        watch_agent(file, patch, trained.append)
        _, folder = run(file, kind, tmp_path, normalize_obs=True)
    patchless = module(file).load_policy(folder)
    for name in ("cql", "lab"):  # needs neither the dataset nor the environment
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / name))
    loaded, agent = module(file).load_policy(str(folder)), trained[0]
    obs = raw_observations(50, kind)
    for deterministic in (True, False):
        actions = []
        for policy in (agent, loaded, patchless):
            torch.manual_seed(0)
            actions.append(policy.act(obs, deterministic=deterministic))
        assert np.array_equal(actions[0], actions[1]) and np.array_equal(actions[0], actions[2])
    space = gym.make(ENVS[kind]).action_space
    assert actions[0].shape == (50, *space.shape) and all(map(space.contains, actions[0]))
    assert loaded.units.obs_mean.abs().sum() > 0  # the normaliser came with it
    assert not loaded.training and isinstance(loaded.has_density, bool)


@pytest.mark.parametrize("file", FILES)
def test_load_policy_of_something_else(file, tmp_path):
    with pytest.raises(module(file).UserError, match="not the folder of a run") as caught:
        module(file).load_policy(tmp_path)
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize("file", FILES)
def test_log_prob_is_a_density_in_the_units_of_the_environment(file, tmp_path):
    """Its integral over the bounds (-2, 2) is the share of samples that need no clipping."""
    agent = module(file).load_policy(run(file, "box", tmp_path, normalize_obs=True)[1])
    obs, n = raw_observations(3, "box"), 20_001
    if not agent.has_density:
        with pytest.raises(module(file).UserError):
            agent.log_prob(obs, np.zeros((3, 1), np.float32))
        return
    grid = np.linspace(-2, 2, n, dtype=np.float32)[1:-1, None]
    torch.manual_seed(0)
    for one in obs:
        density = agent.log_prob(np.tile(one, (n - 2, 1)), grid).double().exp()
        assert density.shape == (n - 2,)
        x = torch.tensor(grid[:, 0]).double()
        samples = agent.act(np.tile(one, (n, 1)), deterministic=False)[:, 0]
        inside = (abs(samples) < 2).mean()
        assert torch.trapezoid(density, x).item() == pytest.approx(inside, abs=0.02)
        expected = samples[abs(samples) < 2].mean() * inside
        assert torch.trapezoid(density * x, x).item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("file", [file for file, kind in CASES if kind == "discrete"])
def test_probabilities_sum_to_one_and_agree_with_log_prob(file, tmp_path):
    agent = module(file).load_policy(run(file, "discrete", tmp_path)[1])
    obs = raw_observations(40, "discrete")
    probabilities = agent.probabilities(obs)
    assert probabilities.shape == (40, 2) and (probabilities >= 0).all()
    assert probabilities.sum(1).tolist() == pytest.approx([1] * 40, abs=1e-6)
    for action in (0, 1):
        log_prob = agent.log_prob(obs, np.full(40, action))
        assert torch.allclose(log_prob.exp(), probabilities[:, action], atol=1e-6)
    assert np.array_equal(agent.act(obs), probabilities.argmax(1).numpy())
    torch.manual_seed(0)
    many = agent.act(np.tile(obs[0], (4000, 1)), deterministic=False)
    assert many.mean() == pytest.approx(probabilities[0, 1].item(), abs=0.04)


@pytest.mark.parametrize("file", FILES)
def test_one_observation_without_the_batch_axis_is_an_error_not_garbage(file, tmp_path):
    """Three numbers of one Pendulum would otherwise broadcast to three observations."""
    agent = module(file).load_policy(run(file, "box", tmp_path, steps=1)[1])
    with pytest.raises((RuntimeError, module(file).UserError)):
        agent.act(np.zeros(3, np.float32))


@pytest.mark.parametrize("file", FILES)
def test_dict_observations_in_training_evaluation_and_the_loaded_policy(
    file, tmp_path, monkeypatch
):
    """Stored datasets have sorted keys, this environment has not: both must be flattened alike."""
    seen = []

    def watching(agent):
        act = agent.act

        def record(obs, *rest):
            seen.append(obs)
            return act(obs, *rest)

        agent.act = record

    with monkeypatch.context() as patch:
        watch_agent(file, patch, watching)
        result, folder = run(file, "box", tmp_path, dataset_id=("lab/dict-v0",))
    assert len(seen) == (1 + 1 + 2 * 1) * 5 - 5 and seen[-1].shape == (2, 5)
    for obs in seen:  # angle (2), mode (one-hot, 2), speed (1)
        assert (obs[:, :2] <= 1).all() and (obs[:, 4] >= 10).all()
        assert (obs[:, 2:4].sum(1) == 1).all()
    assert -10 <= result["return_mean"] <= 15 and result["score"] is None
    agent = module(file).load_policy(folder)
    env = DictEnv()
    obs = spaces.flatten(agent.units.observation_space, env.reset(seed=0)[0])
    action = agent.act(obs[None])
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


@pytest.mark.parametrize("file", FILES)
def test_evaluate(file):
    """Its own seed for each episode, one batched act for those alive, none stepped after its end,
    undiscounted sums, and the random states of the process as before."""
    calls = []

    def act(obs):
        calls.append(obs)
        return obs[:, :1] + 0 * torch.rand(1).numpy()

    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    units = module(file).Units(space, spaces.Box(-1, 1, (1,), np.float32))
    Line.made.clear()
    torch.manual_seed(5)
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    returns = module(file).evaluate(SimpleNamespace(units=units, act=act), Line, 5)
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


@pytest.mark.parametrize("file", FILES)
def test_evaluate_seeds_what_the_policy_draws(file):
    """The same result whatever the state of the process."""

    def act(obs):
        return torch.rand(len(obs), 1).numpy()

    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    units = module(file).Units(space, spaces.Box(-1, 1, (1,), np.float32))
    agent, found = SimpleNamespace(units=units, act=act), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(module(file).evaluate(agent, Line, 5).tolist())
    assert found[0] == found[1] and len(set(found[0])) == 5


@pytest.mark.parametrize("file", [f for f in FILES if has_flag(f, "reward_scale")])
def test_reported_returns_are_raw(file, tmp_path):
    result, folder = run(file, "box", tmp_path, reward_scale=100.0, reward_shift=-7.0)
    plain = run(file, "box", tmp_path, reward_scale=1.0)[0]
    assert result["data_return_mean"] == plain["data_return_mean"]
    for row in rows(folder / "returns.csv"):  # 12 steps of Pendulum cost at most 16.3 each
        assert -12 * 16.3 <= float(row["return"]) <= 0


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_without_an_environment_it_trains_logs_and_saves(file, kind, tmp_path, capsys):
    bare = {"dataset_id": (f"lab/{kind}-bare-v0",)}
    result, folder = run(file, kind, tmp_path, **bare)
    printed = capsys.readouterr().out
    assert "no evaluation" in printed and "--env-id" in printed and "ope.py" in printed
    assert "return of the policy" not in printed
    assert [result[k] for k in ("return_mean", "return_std", "score")] == [None] * 3
    assert result["data_return_mean"] is not None
    metrics = rows(folder / "metrics.csv")
    assert [row["step"] for row in metrics] == ["4", "8", "12"]
    assert {row["return_mean"] for row in metrics} == {""}
    assert rows(folder / "returns.csv") == []
    assert (folder / "returns.csv").read_text() == "step,seed,return\n"
    module(file).load_policy(folder).act(raw_observations(2, kind))
    result, other = run(file, kind, tmp_path, env_id=ENVS[kind], **bare)
    assert result["return_mean"] is not None and len(rows(other / "returns.csv")) == 4
    assert equal(weights(folder), weights(other))


@pytest.mark.parametrize("file", FILES)
def test_no_episodes_mean_no_evaluation(file, tmp_path, capsys):
    result, folder = run(file, "box", tmp_path, eval_episodes=0)
    assert [result[k] for k in ("return_mean", "return_std", "score")] == [None] * 3
    assert (folder / "returns.csv").read_text() == "step,seed,return\n"
    printed = capsys.readouterr().out
    assert "return of the policy" not in printed


@pytest.mark.parametrize("file", FILES)
def test_the_score_is_0_and_100_at_the_reference_returns(file, tmp_path, monkeypatch):
    for value, score in ((-99.0, 0), (101.0, 100), (1.0, 50)):
        with monkeypatch.context() as patch:
            fixed = lambda agent, make_env, n, value=value: np.full(n, value)  # noqa: E731
            patch.setattr(module(file), "evaluate", fixed)
            result = run(file, "box", tmp_path, steps=1)[0]
        assert result["score"] == pytest.approx(score) and result["return_std"] == 0


# ---- Health ----


def health_data(file, reward):
    """Three steps, one episode, with these rewards."""
    m = module(file)
    units = m.Units(spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2))
    x = torch.zeros(3, 1)
    batch = m.Batch(x, torch.zeros(3, dtype=torch.int64), torch.tensor(reward), x, torch.zeros(3))
    return m.Data(units, all=batch, episode=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("file", [f for f in FILES if hasattr(module(f), "q_health")])
@pytest.mark.parametrize(
    ("q_data", "q_policy", "says", "advice"),
    [
        (3.0, 4.0, "Q(s, pi(s)) = 4, Q on the data 3,", None),
        (3.0, 40.0, "Q(s, pi(s)) = 40 exceeds every return possible (20)", "Lower it."),
        (3.0, -11.0, "Q(s, pi(s)) = -11 is below every return possible (-10)", "Raise it."),
        # Only Q at the data's actions is off: the line must not say it of Q(s, pi(s)).
        (40.0, 4.0, "40", None),
        (-11.0, 4.0, "-11", None),
    ],
)
def test_q_health(file, q_data, q_policy, says, advice):
    data = health_data(file, [-1.0, 2.0, 0.0])
    metrics = {"q_data": q_data, "q_policy": q_policy}
    line = module(file).q_health(metrics, data, 0.9, "Lower it.", "Raise it.")
    assert says in line and "\n" not in line
    assert all((word in line) == (word == advice) for word in ("Lower it.", "Raise it.") if advice)
    assert "= 4 exceeds" not in line and "= 4 is below" not in line
    if says.startswith("Q(s, pi(s)) = 4,"):
        assert "possible are -10 to 20" in line and "exceeds" not in line


# ---- Copied out alone ----


@pytest.mark.parametrize("file", FILES)
def test_copied_out_alone_it_runs(file, tmp_path):
    """In an empty folder, with the built-in data, by the command line."""
    (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    flags = {k: v for k, v in TINY.items() if k in ("model_epochs", "rollout_starts")}
    flags |= {"steps": 20, "eval_episodes": 2}
    flags = {k: v for k, v in flags.items() if has_flag(file, k)}
    command = [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v)]
    process = start(tmp_path, file, *command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "pendulum/mixed-v0: built in" in out and "return of the policy" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "result.json").read_text())["steps"] == 20
    assert {p.name for p in tmp_path.iterdir()} <= {file, "runs"}
