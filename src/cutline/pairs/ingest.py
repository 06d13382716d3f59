"""`create`: sources → a table of pairs, in one pass, in commits that survive a kill.

Samples are cleaned, checked for duplicate keys and gathered into batches of `BATCH` rows; every `COMMIT` rows (or
bytes, with `inline`) are appended to the Lance table in one commit. The first batch, from which the columns have their
types, is a whole commit. Before each commit the journal is told where the sources will stand after it, so a second start
goes on behind the last commit, with the same report and the same digests as an undisturbed run. Memory: one commit's
rows, and 8 bytes for each key.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.blob import BlobType

from cutline.errors import DataError
from cutline.pairs import content
from cutline.pairs.journal import Journal, locked, side_folder
from cutline.pairs.keys import Keys, prefixes
from cutline.pairs.provenance import CONTENT, KEY, Provenance
from cutline.pairs.report import IngestReport, utf8
from cutline.pairs.samples import OWN, Feed, Missing, Picture, Sample, Wanted
from cutline.pairs.sources import open_feeds
from cutline.pairs.values import plain_column, sniff, text_column
from cutline.progress import progress

BATCH, BATCH_BYTES = 4096, 64 << 20
COMMIT, COMMIT_BYTES = 65_536, 256 << 20
STATE, REPORT, SHAPE = "cutline:state", "cutline:report", "cutline:shape"  # in the schema metadata
ENOUGH = 1000  # samples before the share of skipped ones says anything


def create(
    out: str | Path,
    sources: Sequence[str | Path],
    *,
    alt: str | None = None,
    captions: str | None = None,
    image: str | None = None,
    fields: Mapping[str, str] | None = None,
    inline: bool = False,
    need_text: bool = True,
    prefix_keys: bool = False,
    max_bad: float = 0.1,
    show: bool = True,
) -> IngestReport:
    """Make the table `out` of the pairs in `sources`, or go on with it where an earlier start was cut off.

    sources: tar shards with brace and glob patterns, … (`cutline.pairs.sources.KINDS`).
    alt, captions: the fields with the alt text and the captions. A field is a tar member's extension or the name of a
    column; `json:key` reaches into JSON. fields: more columns, name → field.
    image: the column of a csv, tsv, jsonl or parquet file that holds paths or bytes, where its name does not tell.
    inline: store the pictures in the table instead of pointing at them. need_text: skip pictures without any text.
    prefix_keys: put the file's name before each key, for shards and tables that each count from zero; where two have the
    same name, with as many of their folders as tell them apart.
    max_bad: the share of skipped samples, or of a column's values lost, above which `DataError` stops the work.

    Raises `DataError` also for an `out` that exists and is no unfinished create of the same sources.
    """
    fields = dict(fields or {})
    for name in fields:
        if name in (*OWN, "alt", "captions") or not name.isidentifier():
            raise DataError(f"{name!r} cannot be the name of a field: use a new name of letters, digits and _.")
    feeds = open_feeds(sources, image)
    wanted = []
    with_captions = bool(captions) or any(f.captions for f in feeds)
    for feed in feeds:
        columns = {"alt": alt or feed.alt or ""}
        if with_captions:
            columns["captions"] = captions or feed.captions or ""
        wanted.append(Wanted(columns | fields, frozenset({"alt", "captions"} & columns.keys()), inline, prefix_keys))
    settings = {"alt": alt, "captions": captions, "fields": fields, "inline": inline, "need_text": need_text}
    named = [str(s) for s in sources]
    provenance = Provenance(
        how="create",
        inputs=named if len(named) <= 8 else [*named[:8], f"and {len(named) - 8:,} more"],
        settings=settings | {"prefix_keys": prefix_keys},
    )
    return ingest(out, feeds, wanted, provenance, need_text=need_text, max_bad=max_bad, show=show)


def ingest(
    out: str | Path,
    feeds: Sequence[Feed],
    wanted: Sequence[Wanted],
    provenance: Provenance,
    *,
    need_text: bool,
    max_bad: float,
    show: bool,
) -> IngestReport:
    """Write what `feeds` give (each asked for its `wanted`) to the table `out`; see `create`."""
    if "://" in str(out):
        raise DataError(f"{str(out)!r} is remote: make the table on a local disk and copy it there.")
    out = Path(out)
    if out.exists() and not (out.is_dir() and (side_folder(out).is_dir() or not any(out.iterdir()))):
        raise _in_the_way(out)
    with locked(out, "create"):
        writer = _Writer(out, feeds, wanted, provenance, need_text, max_bad)
        try:
            with progress("pairs create", None, "pairs", show) as tick, _no_cycles():
                return writer.run(tick)
        finally:
            if not any(p != side_folder(out) for p in out.iterdir()):  # nothing was written: leave nothing
                writer.journal.clear()
                out.rmdir()


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """Hold Python's cycle collector: going over the queued samples, which form no cycles, would cost a fifth more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _in_the_way(out: Path) -> DataError:
    try:
        rows = lance.dataset(str(out)).count_rows()
    except (ValueError, OSError):
        return DataError(f"{str(out)!r} exists and is no table of pairs. Choose another name.")
    return DataError(
        f"{str(out)!r} exists already ({rows:,} pairs). Choose another name, or delete it first; "
        "to add a column to it, use add_column."
    )


class _Writer:
    """State of one `create`."""

    def __init__(
        self, out: Path, feeds: Sequence[Feed], wanted: Sequence[Wanted], provenance: Provenance, need_text: bool,
        max_bad: float,
    ) -> None:  # fmt: skip
        self.out, self.wanted, self.provenance = out, wanted, provenance
        self.need_text, self.max_bad = need_text, max_bad
        self.units = [(f, w, part) for f, w in zip(feeds, wanted) for part in range(len(f.parts))]
        self.prefixes = prefixes([f.parts[part] for f, _, part in self.units]) if wanted[0].prefix_keys else []
        self.names = wanted[0].columns
        self.texts = [name for name in self.names if name in wanted[0].texts]
        self.identity = [[f.identity for f in feeds], provenance.settings]
        self.journal = Journal(out)
        self.report, self.keys = IngestReport(out=str(out)), Keys()
        self.unit, self.consumed, self.rows, self.before = 0, 0, 0, 0.0
        self.chains: dict[str, str] = {}
        self.schema: pa.Schema | None = None
        self.samples: list[Sample] = []
        self.sample_bytes = 0
        self.batches: list[pa.RecordBatch] = []
        self.batch_bytes = 0
        self.whole = False
        self.dataset = self._resume()
        self.durable = self.snapshot()

    def _resume(self) -> Any:
        note = self.journal.read()
        try:
            dataset = lance.dataset(str(self.out))
        except ValueError:
            return None  # killed before the first commit, or never begun
        if note is None:
            raise _in_the_way(self.out)
        if note["identity"] != self.identity:
            raise DataError(
                f"{str(self.out)!r} is an unfinished create of other sources or options. Give the same ones to go on, "
                "or delete it to start again."
            )
        self.whole = dataset.schema.metadata.get(STATE.encode()) == b"finished"  # killed after its last commit
        rows = dataset.count_rows()
        states = [s for s in (note["next"], note["now"]) if s["rows"] == rows]
        if not states:
            raise DataError(
                f"{str(self.out)!r} holds {rows:,} pairs, which its journal does not know. Delete it and start again."
            )
        state = states[0]
        self.unit, self.consumed, self.rows, self.before = state["unit"], state["consumed"], rows, state["seconds"]
        self.chains, self.report = state["chains"], IngestReport.model_validate(state["report"])
        self.schema = dataset.schema
        for batch in dataset.to_batches(columns=["key"]):
            self.keys.add(batch["key"].to_pylist())
        return dataset

    def snapshot(self) -> dict[str, Any]:
        return {
            "unit": self.unit, "consumed": self.consumed, "rows": self.rows, "chains": dict(self.chains),
            "report": self.report.model_dump(), "seconds": self.before,
        }  # fmt: skip

    def run(self, tick: Any) -> IngestReport:
        if self.whole:
            self.journal.clear()
            return IngestReport.model_validate_json(self.dataset.schema.metadata[REPORT.encode()])
        begun, earlier = time.monotonic(), self.before
        for unit in range(self.unit, len(self.units)):
            feed, wanted, part = self.units[unit]
            again = self.consumed if unit == self.unit else 0
            self.unit, self.consumed = unit, again
            name = Path(feed.parts[part]).name
            self.report.at(name, muted=True)
            samples = feed.samples(part, wanted, self.report)
            for _ in islice(samples, again):
                pass
            self.report.at(name, muted=False)
            for sample in samples:
                self.consumed += 1
                self._take(sample._replace(key=self.prefixes[unit] + sample.key) if self.prefixes else sample)
                # the first batch tells the types
                most, most_bytes = (BATCH, BATCH_BYTES) if self.schema else (COMMIT, COMMIT_BYTES)
                if len(self.samples) >= most or self.sample_bytes >= most_bytes:
                    tick(self._flush())
                    self.before = earlier + time.monotonic() - begun
                    if sum(map(len, self.batches)) >= COMMIT or self.batch_bytes >= COMMIT_BYTES:
                        self._commit()
        self.unit, self.consumed = len(self.units), 0
        tick(self._flush())
        self.before = self.report.seconds = earlier + time.monotonic() - begun
        self._commit()
        self._demand()
        if self.dataset is None:
            reasons = self.report.reasons() or "it holds no sample"
            raise DataError(f"no pair was found in {', '.join(self.provenance.inputs)}: {reasons}.")
        return self._finish()

    def _take(self, sample: Sample | Missing) -> None:
        """Queue a sample, or count why not."""
        if not sample.key.isascii() and (key := utf8(sample.key)) != sample.key:
            self.report.repair("key is not UTF-8: bad bytes replaced", key)
            sample = sample._replace(key=key)
        if isinstance(sample, Missing):
            return self.report.skip(sample.reason, sample.key)
        if sample.picture.size == 0:
            return self.report.skip("zero-byte picture", sample.key)
        self.samples.append(sample)
        self.sample_bytes += len(sample.picture.data or b"")

    def _flush(self) -> int:
        """Queued samples → a record batch, without those that have no text or a known key. Returns its rows."""
        samples, self.samples, self.sample_bytes = self.samples, [], 0
        if not samples:
            return 0
        keys = [s.key for s in samples]
        raw = dict(zip(self.names, map(list, zip(*(s.values for s in samples)))))
        schema = self.schema = self.schema or self._sniff(raw)
        columns: dict[str, pa.Array] = {}
        text = np.full(len(samples), not self.need_text)
        for name in self.texts:
            columns[name] = text_column(raw[name], schema.field(name), keys, self.report)
            text |= columns[name].is_valid().to_numpy(zero_copy_only=False)
        keep = text.copy()
        keep[text] = self.keys.add([k for k, t in zip(keys, text) if t])
        for i in np.flatnonzero(~keep):
            self.report.skip("duplicate key" if text[i] else "no text", keys[i])
        for name in self.names:
            if name not in columns:
                columns[name] = plain_column(raw[name], schema.field(name), keys, self.report)
        if not keep.all():
            columns = {name: c.filter(pa.array(keep)) for name, c in columns.items()}
            samples = [s for s, k in zip(samples, keep) if k]
        if samples:
            self._queue(samples, columns)
        return len(samples)

    def _queue(self, samples: list[Sample], columns: dict[str, pa.Array]) -> None:
        """Add the columns that every table has, take digests, and queue the batch for the next commit."""
        assert self.schema is not None
        pictures = [s.picture for s in samples]
        columns["key"] = pa.array([s.key for s in samples], pa.string())
        columns["image"] = _pictures(pictures)
        columns["width"] = pa.array([p.width for p in pictures], pa.int32())
        columns["height"] = pa.array([p.height for p in pictures], pa.int32())
        for name in self.schema.names:
            values = _content(pictures) if name == "image" else columns[name]
            self.chains[name] = content.chain(self.chains.get(name, content.START), values)
        self.batches.append(pa.RecordBatch.from_arrays([columns[n] for n in self.schema.names], schema=self.schema))
        self.batch_bytes += sum(len(p.data or b"") for p in pictures)
        self.rows += len(samples)
        self.report.kept = self.rows

    def _sniff(self, raw: dict[str, list[Any]]) -> pa.Schema:
        fields = [pa.field("key", pa.string()), lance.blob_field("image")]
        fields += [pa.field("width", pa.int32()), pa.field("height", pa.int32())]
        kinds = {name: sniff(raw[name], name in self.texts) for name in self.names}
        if "captions" in self.texts:  # one string so far need not be all that ever comes
            kinds["captions"] = pa.list_(pa.string())
        fields += [pa.field(name, kind) for name, kind in kinds.items()]
        return pa.schema(fields, metadata={STATE: "unfinished"})

    def _commit(self) -> None:
        """Append the batches, with the journal telling first how things stand before and after."""
        after = self.snapshot()
        if self.batches:
            assert self.schema is not None
            self.journal.write(identity=self.identity, now=self.durable, next=after)
            self.dataset = lance.write_dataset(
                pa.RecordBatchReader.from_batches(self.schema, self.batches), str(self.out),
                mode="append" if self.dataset else "create", data_storage_version="2.2",
                allow_external_blob_outside_bases=True,
            )  # fmt: skip
        self.durable, self.batches, self.batch_bytes = after, [], 0
        if self.report.kept + self.report.bad >= ENOUGH:
            self._demand()

    def _demand(self) -> None:
        self.report.demand(self.max_bad, can_prefix=len(self.units) > 1 and not self.prefixes)

    def _finish(self) -> IngestReport:
        """Provenance and digests, then the word that the table is whole."""
        assert self.schema is not None
        self._tell_empty()
        record = self.provenance.model_dump_json()
        notes = {name: {KEY: record, CONTENT: self.chains[name]} for name in self.schema.names}
        self.dataset.update_field_metadata(notes)
        shape = table_shape(self.dataset)
        self.dataset.update_schema_metadata({STATE: "finished", REPORT: self.report.model_dump_json(), SHAPE: shape})
        self.journal.clear()
        return self.report

    def _tell_empty(self) -> None:
        """Count each field that the user named and no pair has: most likely its name is wrong."""
        settings = self.provenance.settings
        named = {name: settings.get(name) for name in ("alt", "captions")} | settings.get("fields", {})
        for name, field in named.items():
            filled = {"columns": ["key"], "filter": f"`{name}` IS NOT NULL", "limit": 1}
            if field and not self.dataset.scanner(**filled).to_table().num_rows:
                self.report.repair("field found in no pair: its column is empty", f"{field} for {name}")


def table_shape(dataset: Any) -> str:
    """Which rows a table holds (not which columns), as text: it changes with every append, delete and rewrite."""
    return " ".join(f"{f.fragment_id}:{f.physical_rows}-{f.num_deletions}" for f in dataset.get_fragments())


def _pictures(pictures: list[Picture]) -> pa.Array:
    """Picture references (or bytes) as a Lance blob column."""
    uris, positions, sizes, _, _, _, data = zip(*pictures)
    storage = pa.StructArray.from_arrays(
        [
            pa.array(data, pa.large_binary()),
            pa.array([None if d else u for u, d in zip(uris, data)], pa.string()),
            pa.array([None if d else p for p, d in zip(positions, data)], pa.uint64()),
            pa.array([None if d or p is None else s for s, p, d in zip(sizes, positions, data)], pa.uint64()),
        ],
        names=["data", "uri", "position", "size"],
    )
    return pa.ExtensionArray.from_storage(BlobType(), storage)


def _content(pictures: list[Picture]) -> pa.Array:
    sizes = np.array([p.size for p in pictures], np.int64)
    return pa.StructArray.from_arrays([pa.array(sizes), pa.array([p.tail for p in pictures], pa.binary())], ["n", "t"])
