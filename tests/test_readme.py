"""Runs the README: every bash command, training with few steps, and every Python block."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py", "ope.py"]
SHORT = "--steps 20 --log-every 10 --eval-every 0 --eval-episodes 2 --hidden 16".split()
NOT_RUN = ("pip install -r requirements.txt", "python -m pytest")  # .ci/run does these


def test_every_block_works_in_order(tmp_path, monkeypatch):
    for script in SCRIPTS:
        if (ROOT / script).exists():
            shutil.copy(ROOT / script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.M | re.S)
    assert len(blocks) > 5
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
            continue
        for line in code.strip().splitlines():
            if line in NOT_RUN:
                continue
            python, script, *flags = line.split()
            assert python == "python" and script in SCRIPTS, line
            command = [sys.executable, script, *flags, *SHORT]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_table_of_files_is_true():
    for script in SCRIPTS:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{script}`"))
        assert ((ROOT / script).exists()) == ("planned" not in row), row


def test_the_commands_that_are_not_run_here_are_run_by_ci():
    ci = (ROOT / ".ci/run").read_text()
    assert "-r requirements.txt" in ci and "\npython -m pytest\n" in ci
    assert all(f"\n{command}\n" in README for command in NOT_RUN)


def test_links_to_files_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
