"""Runs the README: every bash command, training with few steps, and every Python block, in order in
one empty folder that has copies of the files."""

import re
import runpy
import shlex
import shutil
from glob import glob

from test_copies import ROOT
from test_run import flags_of_the_shell

README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci/run").read_text()
SCRIPTS = ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py", "ope.py"]
SHORT = "--steps 20 --log-every 10 --eval-every 0 --eval-episodes 2 --hidden 16"
SHORT_OPE = "--steps 20 --resamples 100 --hidden 16"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.M | re.S)


def test_every_block_works_in_order(tmp_path, monkeypatch):
    """In this process: the imports of one are those of all. (test_run.py has real processes.)"""
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(BLOCKS) > 5
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
            continue
        for line in code.strip().splitlines():
            if line in CI or line.startswith(("pip install", "python benchmarks/", "uv ")):
                continue
            line += f" {SHORT_OPE if 'ope.py' in line.split()[1] else SHORT}"
            python, script, *flags = shlex.split(line)
            assert python == "python" and script in SCRIPTS, line
            flags = [match for x in flags for match in (glob(x) or [x])]
            with flags_of_the_shell(script, flags):
                runpy.run_path(script, run_name="__main__")


def test_the_two_commands_are_what_ci_runs():
    first, second = (code.strip() for _, code in BLOCKS[:2])
    assert f"\n{first}\n" in CI and first.endswith("python cql.py --alpha 1.0")
    assert f"\n{second}\n" in CI and second.endswith("python -m pytest")


def test_the_lines_of_the_table_are_true():
    for script in SCRIPTS:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{script}`"))
        above, below = (ROOT / script).read_text().split("# ---- Plumbing, the same in every file")
        assert f"{above.count(chr(10))} (+ {below.count(chr(10))})" in row, script


def test_links_to_files_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
