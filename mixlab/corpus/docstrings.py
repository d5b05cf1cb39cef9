"""A module's documentation as one text: signatures and docstrings of what it defines, in order."""

import ast


def docstrings(source: str) -> str | None:
    """The documentation of a module given as source, "" when it has none; None when it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    parts = [_docstring(tree)]
    _collect(tree, "", parts)
    return "\n\n".join(part for part in parts if part)


def _collect(node: ast.AST, prefix: str, parts: list[str]) -> None:
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.ClassDef):
            name = prefix + child.name
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            text = _docstring(child)
            if text:
                parts.append(f"class {name}({bases}):\n{text}" if bases else f"class {name}:\n{text}")
            _collect(child, f"{name}.", parts)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            text = _docstring(child)
            if text:
                returns = f" -> {ast.unparse(child.returns)}" if child.returns else ""
                parts.append(f"def {prefix}{child.name}({ast.unparse(child.args)}){returns}:\n{text}")


def _docstring(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""
