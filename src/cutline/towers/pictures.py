"""What belongs to a model beside its weights: the pictures it expects when it is tested, and the hash that names it."""

from typing import Any

from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from cutline.record import fingerprint_of
from cutline.towers.model import Model
from cutline.towers.store import preprocess_of


def test_transform(model: Model) -> Any:
    """The tower's own test transform, PIL picture → (3, S, S) normalised: open_clip's resize and centre crop."""
    return image_transform_v2(PreprocessCfg(**preprocess_of(model)), is_train=False)


def weights_hash(model: nn.Module) -> str:
    """Fingerprint of all weights, both towers."""
    tensors = model.state_dict().items()
    return fingerprint_of(part for k, v in tensors for part in (k, v.cpu().contiguous().numpy().tobytes()))
