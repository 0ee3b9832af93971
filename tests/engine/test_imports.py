"""Who may import whom: read from the source with `ast`, and shown by processes in which torch cannot be imported."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("methods", "rewards", "models", "prompts")
ALLOWED = {
    "methods": {"harness.api", "harness.sampling"},
    "rewards": {"harness.api", "harness.sampling"},
    "models": {"harness.api", "harness.sampling"},
    "prompts": {"harness.api", "harness.prompts", "harness.errors"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, in full, with the name taken from it; `eager` if importing the file imports it, too."""

    module: str
    name: str
    eager: bool


def sources(*folders: str) -> list[Path]:
    """The Python files of folders, relative to the repository."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """`harness/stats/curves.py` is harness.stats.curves."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[Import]:
    """All imports of a file, those inside functions and for the type checker included."""
    return list(_imports(ast.parse((ROOT / path).read_text(encoding="utf-8")), path, eager=True))


def _imports(node: ast.AST, path: Path, eager: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                module = ".".join([*path.parts[: len(path.parts) - child.level], *module.split(".")]).rstrip(".")
            yield from (Import(module, alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_only(child):
            yield from _imports(child, path, eager=False)
        else:
            yield from _imports(child, path, eager)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_file_of(folder: Path, found: Import, underscore: bool) -> bool:
    """Whether an import is of a file of `folder`: any, or only one whose name begins with an underscore."""
    full = f"{found.module}.{found.name}" if found.name else found.module
    prefix = ".".join(folder.parts) + "."
    return full.startswith(prefix) and (not underscore or full[len(prefix) :].startswith("_"))


@pytest.mark.parametrize("path", sources(*PLUGINS), ids=str)
def test_plugins_import_contracts_their_own_family_and_libraries(path: Path) -> None:
    """A plug-in knows the contracts and what its own family shares: no other plug-in, nothing else of the harness."""
    own = Path(path.parts[0]) if len(path.parts) == 2 else Path(*path.parts[:2])
    inside_model = path.parts[0] == "models" and len(path.parts) > 2
    for found in imports(path):
        full = f"{found.module}.{found.name}"
        top = found.module.split(".")[0]
        if top == "harness":
            allowed = ALLOWED[path.parts[0]]
            assert found.module in allowed or full in allowed, f"{path} imports {full}"
        elif top in PLUGINS or top in ("tests", "benchmarks", "presets"):
            assert is_file_of(own, found, underscore=not inside_model), f"{path} imports {full}"


@pytest.mark.parametrize("path", sources("harness"), ids=str)
def test_the_harness_imports_no_plugin_by_name(path: Path) -> None:
    """The engine finds plug-ins by listing folders, so that adding one edits no file of the engine."""
    named = [found.module for found in imports(path) if found.module.split(".")[0] in PLUGINS]
    assert not named, f"{path} imports {named}"
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            target = node.args[0]
            if isinstance(target, ast.Constant) and str(target.value).split(".")[0] in PLUGINS:
                assert str(target.value).split(".")[-1].startswith("_"), f"{path} imports {target.value}"


def test_no_circle_among_the_modules_of_the_harness() -> None:
    """Importing the engine's modules in any order works: at import time they form no circle."""
    paths = {module_name(path): path for path in sources("harness")}
    edges: dict[str, set[str]] = {}
    for name, path in paths.items():
        eager = [found for found in imports(path) if found.eager]
        targets = {target for found in eager for target in (found.module, f"{found.module}.{found.name}")}
        edges[name] = {target for target in targets if target in paths and target != name}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above[above.index(name) :], name))}"
        if name not in finished:
            for target in sorted(edges[name]):
                visit(target, (*above, name))
            finished.add(name)

    for name in edges:
        visit(name, ())


def test_statistics_reports_and_the_command_line_need_no_torch() -> None:
    """Rendering a report works where torch cannot be imported, and so do the help and the lists."""
    modules = [module_name(path) for path in sources("harness/stats", "harness/report")]
    modules += ["harness", "harness.cli", "harness.config", "harness.progress", "harness.store"]
    program = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name not in ('torch', 'diffusers', 'transformers', 'peft'), f'{name} is imported'\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "from harness.cli import list_\n"
        "for kind in ('methods', 'rewards', 'suites', 'models', 'presets'): list_(kind)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "draft-k" in done.stdout
    assert "emoji-3d" in done.stdout


@pytest.mark.parametrize(("words", "limit"), [("--help", 0.5), ("list methods", 1.0)])
def test_help_and_lists_are_immediate(words: str, limit: float) -> None:
    """The help takes at most half a second of processor time, a list at most a second, and neither loads torch."""
    program = (
        "import sys\n"
        f"sys.argv = ['harness', *{words.split()!r}]\n"
        "from harness.cli import main\n"
        "main()\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    seconds = []
    while len(seconds) < 3 and min(seconds, default=9.0) > limit:  # busy neighbours slow a core: the best of three
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) <= limit
