"""Functions are short, modules few, and names that others keep private are not used."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alexnet_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 60  # lines of code of a function
# Functions that may be longer, at most three, and why.
LONGER = {
    "alexnet_jax/trainer.py: create": "one list of what is compiled, with the options of each",
}
# Names with an underscore that the standard library documents for everyone.
DOCUMENTED = {"_exit", "_fields", "_replace"}


def trees():
    for path in FILES:
        yield str(path.relative_to(PACKAGE.parent)), ast.parse(path.read_text())


def lines_of_code(function):
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    lines = range(function.lineno, function.end_lineno + 1)
    return len(lines) - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def private_names(tree):
    """Returns what a module takes from others by a name that begins with an underscore."""
    imported, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            found += [*names, getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts, value = [value.attr, *parts], value.value
            if isinstance(value, ast.Name) and value.id in imported:
                found.append(".".join([value.id, *parts]))
    return sorted({name for name in found if any(map(is_private, name.split(".")))})


def is_private(part):
    return part.startswith("_") and not part.endswith("__") and part not in DOCUMENTED


def test_functions_are_short():
    lengths = {
        f"{path}: {node.name}": lines_of_code(node)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name for name, length in lengths.items() if length > LONGEST}
    assert long == set(LONGER)
    assert len(LONGER) <= 3


def test_the_top_of_the_package_is_small():
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 14, modules


def test_the_training_loop_is_one_page():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 220


def test_private_names_stay_private():
    found = {path: names for path, tree in trees() if (names := private_names(tree))}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "from jax._src import core",
        "from clu.metrics import _reduction_counter",
        "import jax._src.core",
        "import jax\njax._src.core.trace()",
        "from alexnet_jax import train\ntrain._train()",
    ],
)
def test_private_names_are_found(code):
    assert private_names(ast.parse(code))


def test_lines_of_code_leave_out_the_docstring():
    code = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    assert lines_of_code(ast.parse(code).body[0]) == 2
