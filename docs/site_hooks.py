"""Hooks of mkdocs: links to files that are not pages, and typeset equations.

On a page a link to a file is a path, `[layer_norm](../nrgpt_jax/core/norms.py#L63)`, which a reader
of the repository follows. The site has no such files: there a line of the package becomes its entry
in the API reference, which shows the source, and any other file its name. Equations in LaTeX become
MathML, which browsers typeset: the site loads nothing from elsewhere.
"""

import ast
import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+)([\w./-]+)(?:#L(\d+))?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links that hold in the site."""
    depth = len(Path(page.file.src_uri).parts)  # so many times ../ lead to the root

    def in_site(link: re.Match) -> str:
        text, up, path, line = link.groups()
        if up.count("../") < depth:
            return link[0]  # another page
        if line and path.startswith("nrgpt_jax/"):
            return f"[{text}][{name_at(path, int(line))}]"
        return f"{text} (`{path}`)" if path not in text else text

    return LINK.sub(in_site, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its equations typeset."""
    from latex2mathml.converter import convert

    def typeset(equation: re.Match) -> str:
        tag, latex = equation[1], html.unescape(equation[2])
        display = "block" if tag == "div" else "inline"
        return f'<{tag} class="equation">{convert(latex, display=display)}</{tag}>'

    return EQUATION.sub(typeset, content)


def name_at(path: str, line: int) -> str:
    """The dotted name of what is defined on a line of a module of the package.

    Raises:
      ValueError: nothing is.
    """

    def search(body: list[ast.stmt], prefix: str) -> str | None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if node.lineno == line:
                    return f"{prefix}.{node.name}"
                found = search(node.body, f"{prefix}.{node.name}")
                if found:
                    return found
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno == line:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                return f"{prefix}.{ast.unparse(target)}"
        return None

    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = search(ast.parse((ROOT / path).read_text()).body, module)
    if found is None:
        raise ValueError(f"{path}: nothing is defined on line {line}")
    return found
