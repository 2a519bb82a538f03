"""What all tests share: the root on the path, one thread, an empty folder to be in, no datasets of
the machine's user, and no setting that a run in another test has left behind."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_minari_root(tmp_path_factory, monkeypatch):
    """Built-in datasets come from memory, and tests can store their own ones."""
    root = tmp_path_factory.mktemp("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # nothing is left in the checkout
    yield root
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # use_cpu_well is for the process
    torch.distributions.Distribution.set_default_validate_args(True)


def pytest_collection_modifyitems(items):
    """The longest first, so that the workers end together."""
    items.sort(key=lambda item: "test_learning" not in item.nodeid)
