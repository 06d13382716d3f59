"""The table of pairs: pictures that stay where they are, with alt text, captions and everything else as columns.

    from cutline.pairs import Pairs, create
    create("flickr.lance", ["shards/{00000..00003}.tar"], alt="txt", captions="json:captions")
    pairs = Pairs.open("flickr.lance")
    pairs.read([5, 3], ["key", "image", "alt"])

Names are imported when first used, because Lance and Arrow take a while to load.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutline.pairs.checking import check
    from cutline.pairs.decode import BadPicture
    from cutline.pairs.exporting import export
    from cutline.pairs.ingest import create
    from cutline.pairs.provenance import Provenance
    from cutline.pairs.report import CheckReport, IngestReport
    from cutline.pairs.rows import create_from_rows
    from cutline.pairs.table import Pairs

_HOME = {
    "BadPicture": "decode",
    "CheckReport": "report",
    "IngestReport": "report",
    "Pairs": "table",
    "Provenance": "provenance",
    "check": "checking",
    "create": "ingest",
    "create_from_rows": "rows",
    "export": "exporting",
}
__all__ = [
    "BadPicture",
    "CheckReport",
    "IngestReport",
    "Pairs",
    "Provenance",
    "check",
    "create",
    "create_from_rows",
    "export",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
