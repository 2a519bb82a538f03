"""The files share nothing but text: definitions of the same name are the same text in every file
that has them, but for those in OWN. After a change in one file, `python tests/test_copies.py --fix
cql.py` carries its definitions into the others."""

import ast
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ["bc.py", "cql.py", "iql.py", "bcq.py", "awac.py", "mopo.py", "ope.py"]
TRAINING = FILES[:-1]
ALLOWED = {"torch", "numpy", "gymnasium", "minari", "tyro", "tqdm"}
LINE = "# ---- Plumbing, the same in every file: a reader of the method can stop here ----"
OWN = {"Args", "Agent", "main", "health", "BoxCritic", "DiscreteCritic"}  # meant to differ
OWN_OF_OPE = {"command_line"}
ONLINE = {"iql.py", "awac.py"}  # have Replay
MISSING = {  # of no use there
    "bc.py": {"q_health", "polyak_update", "pick"},
    **{file: {"pick"} for file in ("iql.py", "awac.py", "mopo.py")},
}


def read(file):
    return (ROOT / file).read_text()


@cache
def parsed(file):
    return ast.parse(read(file))


@cache
def definitions(file):
    """{name: source text} of the functions, classes and constants at the top level."""
    text, found = read(file), {}
    lines = text.splitlines(keepends=True)
    for node in parsed(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
            name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "".join(lines[first - 1 : node.end_lineno])
    return found


def own(file):
    return OWN | (OWN_OF_OPE if file == "ope.py" else set())


@pytest.mark.parametrize("one, other", list(combinations(FILES, 2)))
def test_definitions_of_the_same_name_are_the_same_text(one, other):
    first, second = definitions(one), definitions(other)
    shared = (set(first) & set(second)) - own(one) - own(other)
    assert len(shared) > 10
    for name in shared:
        assert first[name] == second[name], f"{name} in {one} and {other}"


def test_every_training_file_has_the_whole_plumbing_in_the_same_order():
    plumbing = {}
    for file in TRAINING:
        assert read(file).count(LINE) == 1, file
        below = read(file).split(LINE)[1]
        plumbing[file] = [x for x in definitions(file) if definitions(file)[x] in below]
    for file in TRAINING:
        extra = {"Replay"} if file in ONLINE else set()
        expected = [x for x in plumbing["cql.py"] if x not in MISSING.get(file, set())]
        assert [x for x in plumbing[file] if x not in extra] == expected, file
        assert extra <= set(plumbing[file])


@pytest.mark.parametrize("file", FILES)
def test_nothing_below_the_line_is_unused(file):
    names = {n.id for n in ast.walk(parsed(file)) if isinstance(n, ast.Name)}
    assert set(definitions(file)) - {"__version__", "load_policy"} <= names


@pytest.mark.parametrize("file", FILES)
def test_imports_are_the_core_packages_and_never_a_sibling(file):
    for node in ast.walk(parsed(file)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in ALLOWED | set(sys.stdlib_module_names), f"{file} imports {name}"
            assert f"{package}.py" not in FILES, f"{file} imports its sibling {name}"


def script_block(file):
    text = read(file)
    assert text.startswith("# /// script\n"), file
    return text.split("# ///\n")[0]


def test_the_script_metadata_is_the_same_in_every_file():
    assert len({script_block(file) for file in FILES}) == 1


def flags(file):
    """Args as {name: (type, help)}; the help is the comment behind the field."""
    lines = read(file).splitlines()
    body = next(n for n in parsed(file).body if getattr(n, "name", "") == "Args").body
    found = {}
    for field in body:
        name, (_, comment, text) = field.target.id, lines[field.end_lineno - 1].partition("  # ")
        assert comment and text, f"{file}: --{name} has no help"
        assert name not in found, f"{file}: --{name} stands twice"
        found[name] = (ast.unparse(field.annotation), text)
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_flag_is_read(file):
    tree = parsed(file)
    assert set(flags(file)) <= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def test_flags_of_the_same_name_mean_the_same():
    for one, other in combinations(FILES, 2):
        for name in set(flags(one)) & set(flags(other)):
            assert flags(one)[name] == flags(other)[name], f"--{name} in {one} and {other}"


def test_every_limit_is_that_of_a_flag():
    import cql

    assert set(cql.LIMITS) <= set().union(*map(flags, FILES))


def fix(source):
    """Carries the definitions of `source` into every other file that has them."""
    for file in FILES:
        text = read(file)
        theirs, ours = definitions(file), definitions(source)
        for name in (set(theirs) & set(ours)) - own(file) - own(source):
            if theirs[name] != ours[name]:
                assert text.count(theirs[name]) == 1, name
                text = text.replace(theirs[name], ours[name])
                print(f"{file}: {name} taken from {source}")
        (ROOT / file).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--fix" or sys.argv[2] not in FILES:
        sys.exit("usage: python tests/test_copies.py --fix FILE")
    fix(sys.argv[2])
