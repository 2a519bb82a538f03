"""The files share nothing but text: the blocks between `# >>> shared: name` and
`# <<< shared: name` are the same in every file. After a change in one file,
`python tests/test_copies.py --fix cql.py` copies its blocks into the others."""

import ast
import difflib
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING = ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py"]
ALL = [*TRAINING, "ope.py"]
BLOCKS = {  # which files have which block
    "optim": ALL,
    "data": ALL,
    "evaluate": ALL,
    "health": ["cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py"],
    "run": TRAINING,
    "policy": TRAINING,
    "main": ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py"],
    "finetune": ["iql.py", "awac.py"],
}
FILES = [name for name in ALL if (ROOT / name).exists()]
ALLOWED = {"torch", "numpy", "gymnasium", "minari", "tyro", "tqdm"}
PATTERN = r"^# >>> shared: {name} .*?^# <<< shared: {name}$\n"


def block(text, name):
    found = re.findall(PATTERN.format(name=name), text, re.M | re.S)
    assert len(found) <= 1, f"block {name} occurs {len(found)} times"
    return found[0] if found else None


def read(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", [name for name in BLOCKS if set(BLOCKS[name]) & set(FILES)])
def test_blocks_are_the_same_text(name):
    copies = {file: block(read(file), name) for file in FILES}
    assert {file for file, text in copies.items() if text} == set(FILES) & set(BLOCKS[name])
    copies = {file: text for file, text in copies.items() if text}
    first = next(iter(copies))
    for file, text in copies.items():
        diff = difflib.unified_diff(
            copies[first].splitlines(), text.splitlines(), first, file, lineterm=""
        )
        assert text == copies[first], "\n".join(diff)


def test_every_marker_belongs_to_a_known_block():
    for file in FILES:
        marked = re.findall(r"^# (?:>>>|<<<) shared: (\w+)", read(file), re.M)
        assert set(marked) <= set(BLOCKS), file
        assert all(marked.count(name) == 2 for name in marked), file


@pytest.mark.parametrize("file", FILES)
def test_imports_are_the_core_packages_and_never_a_sibling(file):
    for node in ast.walk(ast.parse(read(file))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in ALLOWED | set(sys.stdlib_module_names), f"{file} imports {name}"
            assert f"{package}.py" not in ALL, f"{file} imports its sibling {name}"


def fields(file):
    """Args as {name: (type, help)}; the help is the string below the field."""
    tree = ast.parse(read(file))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    found = {}
    for field, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{file}: --{field.target.id} has no help"
            assert field.target.id not in found, f"{file}: --{field.target.id} stands twice"
            found[field.target.id] = (ast.unparse(field.annotation), text.value.value)
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_flag_is_read(file):
    tree = ast.parse(read(file))
    read_names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert set(fields(file)) <= read_names


def test_flags_of_the_same_name_mean_the_same():
    flags = {file: fields(file) for file in FILES}
    for one, other in combinations(FILES, 2):
        for name in set(flags[one]) & set(flags[other]):
            assert flags[one][name] == flags[other][name], f"--{name} in {one} and {other}"


def fix(source):
    """Copies the blocks of `source` into every other file that has them."""
    for name in BLOCKS:
        text = block(read(source), name)
        for file in FILES:
            old = block(read(file), name)
            if text and old and old != text:
                (ROOT / file).write_text(read(file).replace(old, text))
                print(f"{file}: block {name} taken from {source}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--fix" or sys.argv[2] not in FILES:
        sys.exit("usage: python tests/test_copies.py --fix FILE")
    fix(sys.argv[2])
