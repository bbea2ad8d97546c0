"""The Python standard library's own documentation, read from its source files without importing any of them."""

from __future__ import annotations

import ast
import functools
import inspect
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

from hypenet_jax.errors import HypenetError

_SKIPPED = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "turtledemo",
    "pydoc_data", "_bundled", "__pycache__", "__phello__", "config", "lib-dynload",
}  # fmt: skip


def stdlib_version() -> str:
    """What the documents depend on, for the identity of a packed data set."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def stdlib_documents() -> Iterator[str]:
    """One document a module (in the order of their paths), then one a topic of Python's help.

    A module's document holds its docstring, then those of its classes and functions under their signatures. Raises
    HypenetError where this Python was installed without its sources.
    """
    texts = _all_documents()
    if not texts:
        raise HypenetError(
            f"source 'stdlib' found no documented Python sources in {str(_root())!r}; use a Python that ships them"
        )
    yield from texts


@functools.cache
def _all_documents() -> tuple[str, ...]:
    root = _root()
    return tuple([*_module_documents(root), *_topics(root / "pydoc_data" / "topics.py")])


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def _module_documents(root: pathlib.Path) -> Iterator[str]:
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).parts):
        parts = file.relative_to(root).with_suffix("").parts
        if any(part in _SKIPPED or part.startswith(("test_", "config-")) for part in parts):
            continue
        tree = _parse(file)
        if tree is None:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        entries = list(_entries(tree, name))
        if entries:
            yield f"Module {name}\n\n" + "\n\n".join(entries) + "\n"


def _parse(file: pathlib.Path) -> ast.Module | None:
    # A few files of the standard library are deliberately broken or in another encoding: they are no documentation.
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def _entries(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, depth: int = 0
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and text.strip():
        text = inspect.cleandoc(text).strip()
        yield text if depth == 0 else f"{_signature(node, name)}\n    " + text.replace("\n", "\n    ")
    for child in node.body:
        if isinstance(child, ast.ClassDef) or (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(node, ast.Module | ast.ClassDef)
        ):
            yield from _entries(child, f"{name}.{child.name}", depth + 1)


def _signature(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return f"class {name}"


def _topics(file: pathlib.Path) -> Iterator[str]:
    tree = _parse(file) if file.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield f"Topic {name}\n\n{topics[name].strip()}\n"
