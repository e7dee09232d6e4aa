"""Who may import whom, and how large functions may become; by the source, so imports inside functions count, too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("lightning_mdc/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]
PUBLIC_FUNCTIONS = {"search", "compress", "score", "slim", "masked", "macs", "save", "load"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PACKAGES = {module_of(path) for path in FILES if path.name == "__init__.py"}
MODULES = {module_of(path): ast.parse(path.read_text()) for path in FILES}


class Import(NamedTuple):
    """`module` imports `what` in `line`; not at module level is what functions import, or type checkers alone see."""

    module: str
    what: str
    line: int
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.what}"


def statements(node: ast.AST, at_module_level: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    of_types = node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(node):
        is_run = at_module_level and not in_function and child not in of_types
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_run
        yield from statements(child, is_run)


def imports(module: str) -> Iterator[Import]:
    packages = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    for statement, at_module_level in statements(MODULES[module]):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            above = ".".join(packages[: len(packages) + 1 - statement.level]) if statement.level else ""
            source = ".".join(filter(None, (above, statement.module)))
            # What is imported from a package may be a module or a name in it.
            whole = [f"{source}.{alias.name}" for alias in statement.names]
            names = [name if name in MODULES or source not in MODULES else source for name in whole]
        for name in dict.fromkeys(names):
            yield Import(module, name, statement.lineno, at_module_level)


IMPORTS = [found for module in MODULES for found in imports(module)]


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def assert_none(broken: list[Import], rule: str) -> None:
    if broken:
        pytest.fail("\n  ".join([f"{rule}:", *map(str, broken)]))


# --- rules of the layout ----------------------------------------------------------------------------------------------


def test_no_module_is_imported_by_what_it_imports():
    ours = {module: {found.what for found in imports(module)} & MODULES.keys() for module in MODULES}
    circle = [i for i in IMPORTS if i.module != i.what and i.module in all_below(i.what, ours)]
    assert_none(circle, "modules that import one another in a circle")


def all_below(module: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = {module}
    while left:
        found |= left
        left = {other for one in left for other in graph.get(one, ())} - found
    return found


def test_only_the_application_imports_the_application():
    users = ("lightning_mdc.app", "lightning_mdc.__main__")
    broken = [i for i in IMPORTS if inside(i.what, "lightning_mdc.app") and not inside(i.module, *users)]
    assert_none(broken, "only app/ and __main__ may import app/")


def test_gp_ei_knows_no_policy_and_no_torch():
    allowed = ("lightning_mdc.gp_ei", "lightning_mdc.errors", "lightning_mdc.files")
    mine = [i for i in IMPORTS if inside(i.module, "lightning_mdc.gp_ei")]
    broken = [i for i in mine if inside(i.what, "lightning_mdc", "torch") and not inside(i.what, *allowed)]
    assert_none(broken, "gp_ei/ may import no torch, and of ours only errors and files")


def test_values_know_only_errors():
    values = ("lightning_mdc.policy", "lightning_mdc.errors", "lightning_mdc.files")
    broken = [i for i in IMPORTS if i.module in values and inside(i.what, "lightning_mdc")]
    assert_none([i for i in broken if i.what not in values[1:]], "values may import nothing of ours but errors, files")


def test_the_library_loads_only_what_it_needs():
    users = ("lightning_mdc.app", "hydra_plugins")
    loaded = [i for i in IMPORTS if i.at_module_level and not inside(i.module, *users)]
    broken = [i for i in loaded if inside(i.what, "hydra", "wandb", "mlflow", "jinja2", "matplotlib")]
    assert_none(broken, "hydra, wandb, mlflow, jinja2 and matplotlib at module level only in app/ and hydra_plugins/")


def test_other_peoples_models_are_loaded_only_when_there_are_any():
    loaded = [i for i in IMPORTS if i.at_module_level and inside(i.what, "transformers", "torchvision.models")]
    assert_none(loaded, "transformers and torchvision.models nowhere at module level")


def test_no_module_takes_the_place_of_a_public_function():
    beside = {module.split(".")[1] for module in MODULES if module.startswith("lightning_mdc.")}
    assert not beside & PUBLIC_FUNCTIONS, "modules directly under lightning_mdc, which mdc.NAME would then be"


@pytest.mark.parametrize("module", ["lightning_mdc", "hydra_plugins.hydra_mdc_sweeper.mdc_sweeper"])
def test_what_hydra_imports_at_every_start_is_without_torch(module):
    script = f"import sys, {module}; sys.exit('it imports torch' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- size -------------------------------------------------------------------------------------------------------------

MOST_LINES, MOST_PARAMETERS = 60, 14
# Settings that belong together are not bundled into values yet.
MANY_PARAMETERS = {
    "lightning_mdc.callback.MultiDimPruneCallback.__init__",
    "lightning_mdc.compression.compress",
    "lightning_mdc.app.data.image_folder.ImageFolderDataModule.__init__",
}
MANY_LINES: set[str] = set()


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        below = f"{name}.{child.name}" if hasattr(child, "name") else name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield below, child
        yield from functions(child, below)


def lines_of_code(lines: list[str], function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function but for its docstring, comments and blanks."""
    first, *_ = function.body
    documented = ast.get_docstring(function) is not None
    docstring = range(first.lineno, (first.end_lineno or 0) + 1) if documented else ()
    numbers = set(range(function.lineno, (function.end_lineno or 0) + 1)) - set(docstring)
    return sum(not line.startswith("#") for line in (lines[number - 1].strip() for number in numbers) if line)


def assert_at_most(sizes: dict[str, int], most: int, exceptions: set[str], what: str) -> None:
    large = {name: size for name, size in sizes.items() if size > most}
    beyond = {name: size for name, size in large.items() if name not in exceptions}
    assert not beyond, f"more than {most} {what}"
    assert not exceptions - large.keys(), f"no more than {most} {what}; take these from the list of exceptions"


def test_functions_fit_a_screen():
    sizes = {}
    for path in FILES:
        lines, module = path.read_text().splitlines(), module_of(path)
        sizes |= {name: lines_of_code(lines, function) for name, function in functions(MODULES[module], module)}
    assert_at_most(sizes, MOST_LINES, MANY_LINES, "lines of code")


def test_signatures_can_be_read():
    sizes = {}
    for module, tree in MODULES.items():
        for name, function in functions(tree, module):
            named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            sizes[name] = sum(argument.arg not in ("self", "cls") for argument in named)
    assert_at_most(sizes, MOST_PARAMETERS, MANY_PARAMETERS, "parameters")
