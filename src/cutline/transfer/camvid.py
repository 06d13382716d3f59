"""CamVid as the SegNet tutorial lays it out: {train,val[,test]}/{images,masks}, index PNG, names in classes.txt."""

from pathlib import Path

from cutline.errors import DataError
from cutline.transfer import folder
from cutline.transfer.data import DenseData, Task
from cutline.transfer.files import serves


def open(rest: str, task: Task) -> DenseData:
    """Open `camvid:PATH`: a folder of masks whose classes must be named."""
    serves("camvid", task, "segment")
    if not (Path(rest) / "classes.txt").is_file():
        raise DataError(f"camvid:{rest} needs the names of its classes, one a line, in {rest}/classes.txt.")
    data = folder.open(rest, task)
    data.spec = f"camvid:{rest}"
    return data
