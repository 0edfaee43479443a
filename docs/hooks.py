"""What mkdocs makes when it builds the site: register, pages of proofs, list of guides, sheets, reference.

None of it is written by hand, so none of it can lag behind: the register's table comes from
`clipworks.papers`, a proof's page from its JSON, the reference from the docstrings.
"""

from __future__ import annotations

import ast
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src"
sys.path.insert(0, str(SOURCE))

from clipworks.papers import FAMILIES, MINIMUM_SEEDS, STATUSES, Paper, register  # noqa: E402

GUIDES = "<!-- the list of guides is made when the site is built -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the navigation whose pages are found, not listed."""
    sections: dict[str, list[Any]] = {
        "Guides": [{title: f"guides/{path.name}"} for path, title in guides()],
        "Proofs": [{paper.slug: f"proofs/{paper.slug}.md"} for paper in register() if paper.proof],
        "Reference": [{name: f"reference/{name}.md"} for name in modules()],
    }
    for entry in config.nav or []:
        for title, pages in entry.items():
            if title in sections:
                pages += [page for page in sections[title] if page not in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    papers = register()
    pages = {
        "register.md": register_page(papers),
        "proofs/index.md": proofs_page(papers),
        "reference/index.md": reference_page(),
        **{f"proofs/{paper.slug}.md": proof_page(paper) for paper in papers if paper.proof},
        **{f"reference/{name}.md": f"# {name}\n\n::: {name}\n" for name in modules()},
    }
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    for name, sheet in world_sheets():
        files.append(File.generated(config, f"guides/world-{name}.png", content=sheet))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the list of guides where its page asks for it."""
    return markdown.replace(GUIDES, "\n".join(f"- [{title}]({path.name})" for path, title in guides()))


def world_sheets() -> Iterator[tuple[str, bytes]]:
    """Every kind of the generated world with its sheet as PNG, for the guide that shows them."""
    if (DOCS / "guides" / "world.md").is_file():
        from clipworks.data.world.kinds import kind, kinds

        for name in kinds():
            sheet = io.BytesIO()
            kind(name).preview(12, 0, 128).save(sheet, format="PNG")
            yield name, sheet.getvalue()


def guides() -> list[tuple[Path, str]]:
    """The pages of docs/guides with their titles, but for the index."""
    found = []
    for path in sorted((DOCS / "guides").glob("*.md")):
        if path.name != "index.md":
            first = next(
                (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")), ""
            )
            found.append((path, first.removeprefix("# ").strip() or path.stem))
    return found


def modules() -> list[str]:
    """Dotted names of the public modules that define something."""
    found = []
    for path in sorted((SOURCE / "clipworks").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in names) and _defines(path):
            found.append(".".join(names))
    return sorted(found)


def _defines(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        for node in body
    )


def register_page(papers: list[Paper]) -> str:
    """All papers by family: what works, what was released, what the proofs said."""
    lines = [
        "# Register",
        "",
        "A paper's status is computed from what is there: **works** means that its mechanism is complete, it "
        "keeps its family's contract, released checkpoints load where there are any, and its proof was run "
        f"on at least {MINIMUM_SEEDS} fresh seeds and published, whatever it says.",
        "",
        f"{len(papers)} papers: {_counts(papers)}.",
    ]
    for family in FAMILIES:
        members = [paper for paper in papers if paper.family == family]
        lines += ["", f"## {family}", "", f"{_counts(members)}.", ""]
        lines += [
            "| paper | venue | status | weights | proof | what it is for |",
            "|---|---|---|---|---|---|",
        ]
        for paper in members:
            proof = f"[{paper.proof.verdict}](proofs/{paper.slug}.md)" if paper.proof else "–"
            status = paper.status
            if status != "planned":
                module = ".".join(["clipworks", *Path(paper.method).with_suffix("").parts])
                status = f"[{status}](reference/{module}.md)" if module in modules() else status
            if status.startswith("[partial") or status == "partial":
                status += f": {', '.join(paper.missing)}"
            cells = [
                f"**{paper.slug}**<br>{paper.title}",
                paper.venue,
                status,
                paper.weights,
                proof,
                paper.summary,
            ]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, ""])


def proofs_page(papers: list[Paper]) -> str:
    """All published proofs with their verdicts."""
    proven = [(paper, paper.proof) for paper in papers if paper.proof]
    lines = [
        "# Proofs",
        "",
        "A proof compares a method with the baseline named for it, in the same run, on evaluation seeds that "
        "were never used in development. The verdict follows from a confidence interval over the seeds. "
        '"Does not hold" is a result like any other. `clipworks prove SLUG` reruns one.',
        "",
    ]
    if not proven:
        return "\n".join([*lines, "None is published yet.", ""])
    lines += ["| paper | verdict | seeds | budget |", "|---|---|---|---|"]
    for paper, proof in proven:
        lines.append(
            f"| [{paper.slug}]({paper.slug}.md) | {proof.verdict} | {proof.seeds} | {proof.budget or '–'} |"
        )
    return "\n".join([*lines, ""])


def proof_page(paper: Paper) -> str:
    """One proof: its JSON as text and tables, whatever fields the runner wrote."""
    values = json.loads((DOCS / "proofs" / f"{paper.slug}.json").read_text(encoding="utf-8"))
    lines = [
        f"# {paper.slug}: {values['verdict']}",
        "",
        f"*{paper.title}*, {paper.venue}.",
        "",
        f"**What its authors found.** {paper.claim}",
        "",
        f"Rerun: `clipworks prove {paper.slug}` · [the numbers as JSON]({paper.slug}.json)",
        "",
        *_section(values),
    ]
    return "\n".join([*lines, ""])


def _section(values: dict[str, Any], depth: int = 2) -> list[str]:
    plain = {key: value for key, value in values.items() if not _nested(value)}
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {_words(key)} | {_cell(_value(value))} |" for key, value in plain.items()),
    ]
    for key, value in values.items():
        if not _nested(value):
            continue
        lines += ["", f"{'#' * depth} {_words(key)}", ""]
        if isinstance(value, dict):
            lines += _section(value, min(depth + 1, 6))
        else:
            columns = list(dict.fromkeys(name for row in value for name in row))
            lines += [f"| {' | '.join(map(_words, columns))} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(_value(row.get(name))) for name in columns)} |" for row in value]
    return lines


def _nested(value: Any) -> bool:
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return rows or (isinstance(value, dict) and bool(value))


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "–"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def reference_page() -> str:
    """The modules by folder, each with the first line of its docstring."""
    lines = ["# Reference", ""]
    folder = None
    for name in modules():
        path = SOURCE.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        doc = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        here = name.split(".")[1] if name.count(".") > 1 or path.name == "__init__.py" else "clipworks"
        if here != folder:
            folder = here
            lines += ["", f"## {folder}", "", "| module | |", "|---|---|"]
        lines.append(f"| [{name}]({name}.md) | {_cell(' '.join(doc.split()))} |")
    return "\n".join([*lines, ""])


def _counts(papers: list[Paper]) -> str:
    counts = Counter(paper.status for paper in papers)
    return ", ".join(f"{counts[status]} {status}" for status in reversed(STATUSES) if counts[status])


def _words(key: str) -> str:
    return key.replace("_", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
