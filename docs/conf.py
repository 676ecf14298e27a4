"""Sphinx' settings. The sources are the repository's own pages, so that their links lead there on a code host too:
`make docs` calls sphinx-build with this folder for settings and the repository for sources."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.pycode import ModuleAnalyzer

import regfast

ROOT = Path(__file__).resolve().parent.parent

project = "regfast"
author = copyright = "the regfast authors"
version = release = regfast.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md", "bench/README.md", "CONTRIBUTING.md", "KERNELS.md", "CHANGELOG.md", "SECURITY.md",
]  # fmt: skip
exclude_patterns = ["build", "dist", ".*", "csrc", "tests", "examples", "regfast"]

source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in regfast.types.__all__}  # by their names, not all that they may be
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_use_rtype = False
default_role = "literal"

html_theme = "furo"
html_title = f"regfast {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
html_copy_source = False
html_domain_indices = False  # of modules, of which there are three
html_show_sourcelink = False
copybutton_prompt_text = r"\$ "


def write_formula(translator, node: nodes.math | nodes.math_block) -> None:
    """As MathML, which browsers draw by themselves: no script is loaded from anywhere."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def without_overloads(analyze):
    """Signatures as the documentation shows them: one, that of the implementation."""

    def call(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    return call


def names_of_types(app, what, name, thing, options, signature, returns):
    """Aliases by their names inside of unions too, where Sphinx 9 shows what it stands in for them."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def link_to_results(app, page: str, text: list[str]) -> None:
    """The page that make report puts beside the others is no document: only the site, where it is, can have a link."""
    if page == "docs/benchmarks":
        text[0] = text[0].replace("The page of results", '<a href="../report.html">The page of results</a>', 1)


def setup(app) -> None:
    app.connect("source-read", link_to_results)
    app.connect("autodoc-process-signature", names_of_types)
    ModuleAnalyzer.analyze = without_overloads(ModuleAnalyzer.analyze)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
