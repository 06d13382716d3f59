"""Pack the 96 pictures of `cutline.scenes.objects` into one sheet: `python scripts/pack_emoji.py ASSETS_DIR`.

ASSETS_DIR is the folder `assets` of the npm package @lobehub/fluent-emoji-3d. Each picture is trimmed to its opaque
part, scaled to fit a cell and set on the cell's bottom, so that its lowest point is where it touches the ground.
"""

import sys
from pathlib import Path

from PIL import Image

from cutline.scenes.objects import OBJECTS
from cutline.scenes.sheet import CELL, COLUMNS, SHEET

LIMIT = 2_000_000  # bytes


def main(assets: Path) -> None:
    rows = -(-len(OBJECTS) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, o in enumerate(OBJECTS):
        picture = Image.open(next(p for p in (assets / f"{o.code}.webp", assets / f"{o.code}-fe0f.webp") if p.exists()))
        picture = picture.convert("RGBA")
        solid = picture.getchannel("A").point(lambda a: 255 * (a > 40))
        picture = picture.crop(solid.getbbox())
        scale = (CELL - 4) / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        sheet.paste(picture, (x + (CELL - size[0]) // 2, y + CELL - 2 - size[1]))
    sheet.save(SHEET, quality=86, alpha_quality=85, method=6)
    print(f"{SHEET}: {len(OBJECTS)} objects, {SHEET.stat().st_size:,} bytes")
    if SHEET.stat().st_size > LIMIT:
        sys.exit(f"over the limit of {LIMIT:,} bytes: lower the quality or CELL")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
