"""What a table holds, for people."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.markup import escape

if TYPE_CHECKING:
    from cutline.pairs.provenance import Provenance
    from cutline.pairs.table import Pairs


class Info:
    """Rows, columns with types and provenance, where the pictures lie, versions; printed by rich."""

    def __init__(self, pairs: "Pairs") -> None:
        self.path, self.rows, self.version, self.versions = pairs.path, len(pairs), pairs.version, len(pairs.versions())
        self.fingerprint, self.finished, self.filter = pairs.fingerprint, pairs.finished, pairs.filter
        self.columns = {f.name: (_type(f.type), pairs.provenance(f.name)) for f in pairs.schema}
        self.failed = {name: pairs.failed(name) for name in self.columns}
        self.pictures = _places(pairs)
        self.report = pairs.report

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("column", "type", "made by", "time (UTC)", show_lines=False)
        for name, (kind, provenance) in self.columns.items():
            table.add_row(name, escape(kind), escape(_made_by(provenance)), provenance.time[:16] if provenance else "")
        lines = [
            f"[bold]{escape(self.path)}[/bold]: {self.rows:,} pairs"
            + ("" if self.finished else " so far; [red]its create was cut off: run it again to go on[/red]"),
            f"version {self.version} of {self.versions}, fingerprint {self.fingerprint}",
            f"pictures: {escape(self.pictures)}",
        ]
        key = self.columns["key"][1]
        if key and key.inputs:
            lines.insert(1, escape(f"made from {', '.join(key.inputs)}"))
        if self.filter:
            lines.insert(1, escape(f"where {self.filter}"))
        counts = {**self.report.skipped, **self.report.lost, **self.report.repaired} if self.report else {}
        if counts:
            lines.append(escape("at create: " + "; ".join(f"{reason} {c.n:,}" for reason, c in counts.items())))
        for name, reasons in self.failed.items():
            if reasons:
                lines.append(escape(f"no {name}: " + "; ".join(f"{reason} {c.n:,}" for reason, c in reasons.items())))
        return Group(*lines, table)


def _type(kind: pa.DataType) -> str:
    if isinstance(kind, pa.ExtensionType):
        return "picture" if kind.extension_name == "lance.blob.v2" else kind.extension_name
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.value_type}[{kind.list_size}]"
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _made_by(provenance: "Provenance | None") -> str:
    if provenance is None:
        return "another program"
    inputs = "" if provenance.how == "create" else ", ".join(provenance.inputs)  # the sources have a line of their own
    parts = [provenance.how, provenance.model, inputs]
    return " · ".join(p for p in parts if p)


def _places(pairs: "Pairs") -> str:
    """Where the first and the last picture lie, as an example."""
    if not len(pairs):
        return "none"
    seen = {"stored in the table" if uri is None else uri for uri in pairs.picture_uris([0, len(pairs) - 1])}
    return " … ".join(sorted(seen))
