"""What MkDocs asks for besides mkdocs.yml: the repository's own pages, in the places that they have there.

README.md and its like are written for readers of the repository. Each keeps its path on the site, so that
links to each other, to images and to results hold as they stand; ``docs_dir`` only has what the site adds.
A script in ``examples`` becomes a page: its docstring, and the code.
"""

from __future__ import annotations

import ast
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/images/**/*.png",
    "benchmarks/results/*.json*",
)

IN_TEXT = re.compile(
    r"<(?P<kind>pre|code|math)\b.*?</(?P=kind)>|<[^>]+>"
    r"|(?<=[^\W\d_]|\|)_(?:\{(?P<index>[^{}<]+)\}|(?P<letter>[A-Za-z0-9])\b)"
    r"|(?<=\S)\^(?:\{(?P<power>[^{}<]+)\}|(?P<exponent>-?\w+(?:[./]\d+)?|\(\w\)))",
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    for path in sorted(ROOT.glob("examples/*.py")):
        page = f"examples/{path.stem}.md"
        files.append(File.generated(config, page, content=example(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A link to a script leads to its page; what is folded is Markdown, too."""
    markdown = markdown.replace("<details>", "<details markdown>")
    return re.sub(r"(\]\([\w./-]*examples/\w+)\.py\)", r"\1.md)", markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Mathematics that arithmatex has marked becomes MathML, which browsers show without a script.

    Indices and exponents of formulas in running text, h_{k+1} and 2^-8, are set as such. Names of the package
    lead to the reference, where it has them: mkdocs-autorefs resolves them.
    """
    html = re.sub(
        r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>',
        lambda found: mathml(unescape(found[2]), found[1] == "div", page.file.src_uri),
        html,
        flags=re.DOTALL,
    )
    html = IN_TEXT.sub(set_formula, html)
    return re.sub(
        r"<code>((?:odeblock\.)?([A-Za-z_][\w.]*))</code>",
        r'<autoref optional identifier="odeblock.\2"><code>\1</code></autoref>',
        html,
    )


def set_formula(found: re.Match[str]) -> str:
    if index := found["index"] or found["letter"]:
        return f"<sub>{index}</sub>"
    if exponent := found["power"] or found["exponent"]:
        return f"<sup>{exponent}</sup>"
    return found[0]  # no text


def mathml(tex: str, displayed: bool, where: str) -> str:
    """The formula; what the converter would pass on as text ends the build."""
    tex, *number = re.split(r"\\tag\{(.*?)\}", tex)
    formula = convert(tex.strip(), display="block" if displayed else "inline")
    if re.search(r"<mi>(\\|&<)", formula):
        raise PluginError(f"{where}: latex2mathml does not know all of {tex}")
    label = f"<span>({number[0]})</span>" if number else ""
    return f'<div class="equation">{formula}{label}</div>' if displayed else formula


def example(path: Path) -> str:
    """The page of a script: the first line of its docstring for title, the rest for text, and the code."""
    source = path.read_text()
    module = ast.parse(source)
    title, _, text = (ast.get_docstring(module) or "").partition("\n")
    code = "".join(source.splitlines(keepends=True)[module.body[0].end_lineno :]).strip()
    return f'# {title.rstrip(".")}\n{text}\n\n```python title="examples/{path.name}"\n{code}\n```\n'
