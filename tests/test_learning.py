"""Learning on the built-in data, on seeds from 100 on: nothing was tuned on them. The goals are the
project's, and shorter runs miss some of them."""

import pytest
from helpers import module

FEW = {"eval_episodes": 20}
RUNS = [  # (file, dataset, least return, flags); the longest first
    ("mopo.py", "pendulum/mixed-v0", -150, {}),
    ("bcq.py", "pendulum/mixed-v0", -190, {}),
    ("mopo.py", "pendulum/random-v0", -150, FEW | {"steps": 2_000, "model_epochs": 20}),
    ("cql.py", "pendulum/mixed-v0", -190, FEW | {"steps": 1_500, "samples": 2}),
    ("iql.py", "pendulum/mixed-v0", -190, FEW | {"steps": 4_000}),
    ("awac.py", "pendulum/mixed-v0", -190, FEW | {"steps": 4_000}),
    ("bcq.py", "cartpole/medium-v0", 146, FEW | {"steps": 2_000}),
    ("bcq.py", "cartpole/mixed-v0", 475, FEW | {"steps": 2_000}),
    ("cql.py", "cartpole/expert-v0", 475, FEW | {"steps": 2_000}),  # which never shows a fall
    ("iql.py", "cartpole/mixed-v0", 475, FEW | {"steps": 1_000}),
    ("awac.py", "cartpole/mixed-v0", 475, FEW | {"steps": 1_000}),
]  # of the data: pendulum/mixed -578, random -1207, expert -143, cartpole/mixed 226, medium 146


def learn(file, dataset, **flags):
    return module(file).main(module(file).Args((dataset,), seed=100, eval_every=0, **flags))


@pytest.mark.parametrize(("file", "dataset", "goal", "flags"), RUNS)
def test_it_learns_and_its_q_is_believed(file, dataset, goal, flags):
    result = learn(file, dataset, **flags)
    assert result["return_mean"] >= goal
    assert "possible are" in result["health"] and "extrapolates" not in result["health"]


def test_bc_learns_a_deterministic_expert():
    """CartPole's scripted expert: the same action in all but a sliver of the states it visits."""
    result = learn("bc.py", "cartpole/expert-v0", steps=1000, eval_episodes=10)
    assert result["action_distance"] < 0.05 and result["return_mean"] == 500


def test_percentile_bc_learns_from_mixed_data_where_bc_fails():
    top, every = (
        learn("bc.py", "pendulum/mixed-v0", steps=2000, top_fraction=x, **FEW) for x in (0.1, 1.0)
    )
    assert top["return_mean"] >= -200 and every["return_mean"] < top["return_mean"] - 100


def test_without_the_penalty_cql_collapses_and_says_so():
    result = learn("cql.py", "cartpole/expert-v0", steps=3000, alpha=0.0, **FEW)
    assert result["return_mean"] < 20 and result["q_policy"] > 100
    assert "extrapolates" in result["health"] and "--alpha" in result["health"]
