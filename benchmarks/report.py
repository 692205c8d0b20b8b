"""Results on disk: all numbers as JSON, tables as Markdown, each file whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperadam.files import atomic_write


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def number(value: float | None) -> str:
    """To three digits, in full; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(
    out: Path,
    name: str,
    command: str,
    machine: Mapping[str, Any],
    results: Mapping[str, Any],
    sections: Sequence[str],
) -> None:
    """Write ``<name>.json`` and ``<name>.md``.

    Args:
        out: the folder, made where it is missing.
        name: of the benchmark.
        command: that measured, without paths.
        machine: from :func:`benchmarks.machine.describe`.
        results: all numbers; plain values.
        sections: of the Markdown file: paragraphs and tables.
    """
    out.mkdir(parents=True, exist_ok=True)
    values = {"benchmark": name, "command": command, "machine": machine, "results": results}
    content = json.dumps(values, indent=1, allow_nan=False) + "\n"
    atomic_write(out / f"{name}.json", content.encode())
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = "\n\n".join([f"# {name}", f"`{command}`", described, *sections]) + "\n"
    atomic_write(out / f"{name}.md", text.encode())
