"""The experts that label pictures: segmenters and depth estimators of transformers, and transferred runs of ours.

An expert gives class ids, or depth, at the size that is asked for. Of transformers, all models for semantic segmentation
(SegFormer, DPT, BEiT, UperNet, …), MaskFormer and Mask2Former, and all for depth (DPT, GLPN, Depth Anything, ZoeDepth,
Depth Pro, …) are taken. Each picture goes through the model's own processor alone, without a centre crop, and pictures that
come out equally large share a pass. Arithmetic is float32: half precision has three digits, too few for depth.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cutline.captions.huggingface import HfModel, loading
from cutline.errors import DataError
from cutline.record import hash_files
from cutline.train.device import device_of
from cutline.train.stream.maps import RELATIVE, aligned
from cutline.train.stream.transforms import Augmentation
from cutline.transfer.segment import Segmenter
from cutline.transfer.store import CONFIG, TASKS, WEIGHTS, describe, folder_of, load

Task = Literal["segment", "depth"]
Picture = NDArray[np.uint8]
HF = "hf:"
METRIC = {"glpn", "zoedepth", "depth_pro"}  # depth in metres; of Depth Anything the config says it


class Description(NamedTuple):
    """name: with a hash or revision; classes: by id; unit: of depth, "metres" or "relative"."""

    name: str
    classes: list[str]
    unit: str


class Expert(Protocol):
    """A loaded model."""

    def prepare(self, pictures: Sequence[Picture]) -> Any:
        """What needs no model; called in another thread."""

    def predict(self, prepared: Any, sizes: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        """Class ids, or depth float32, (h, w) of each picture."""


def describe_expert(model: str, task: Task) -> Description:
    """What is stored of it. Raises `DataError` for a model that is not there or does another task."""
    if model.startswith(HF):
        source = HfModel(model=model.removeprefix(HF))
        config = _config(source.model, task)
        names = dict(getattr(config, "id2label", None) or {})
        metric = config.model_type in METRIC or getattr(config, "depth_estimation_type", "") == "metric"
        unit = ("metres" if metric else RELATIVE) if task == "depth" else ""
        return Description(source.name(), [str(names[i]) for i in sorted(names)] if task == "segment" else [], unit)
    folder = folder_of(model)
    content = describe(folder)
    found = TASKS[content["kind"]]
    if found != task:
        raise DataError(f"{model!r} is a run of `cutline transfer {found}`, and --expert asks for {task}.")
    name = f"{Path(model).resolve().name} {hash_files([folder / CONFIG, folder / WEIGHTS])}"
    return Description(name, list(content["classes"]), "metres" if task == "depth" else "")


def load_expert(model: str, task: Task, device: str) -> Expert:
    """The expert of that name, on its device."""
    return HfExpert(model.removeprefix(HF), task, device) if model.startswith(HF) else OwnExpert(model, device)


class OwnExpert:
    """A transferred run: looks at whole pictures, as its config says."""

    def __init__(self, folder: str, device: str) -> None:
        self.model = load(folder, device_of(device))
        self.task: Task = "segment" if isinstance(self.model, Segmenter) else "depth"

    def prepare(self, pictures: Sequence[Picture]) -> Sequence[Picture]:
        return pictures

    def predict(self, prepared: Sequence[Picture], sizes: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        found = []
        for values, size in zip(self.model.predict(prepared), sizes, strict=True):
            h, w = values.shape
            found.append(aligned(values, self.task, Augmentation(0, 0, h, w, (h, w), False), size))
        return found


class HfExpert:
    """A model of transformers and its processor. Raises `DataError` where weights are missing."""

    def __init__(self, model: str, task: Task, device: str) -> None:
        import transformers

        auto: Any = transformers  # its Auto classes have no types
        self.task, self.device = task, device_of(device)
        kind = type(_config(model, task))
        with loading(model):
            self.processor = auto.AutoImageProcessor.from_pretrained(model)
            found, info = _auto_class(kind, task).from_pretrained(model, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise DataError(
                f"{model!r} does not hold all weights of a {type(found).__name__}: {len(missing)} are missing, such as "
                f"{missing[0]!r}. It may be a model without this head: choose one that was trained for {task}."
            )
        if hasattr(self.processor, "do_center_crop"):
            self.processor.do_center_crop = False  # the label would be of a part of the picture
        self.model = found.to(self.device).eval()

    def prepare(self, pictures: Sequence[Picture]) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        """Each picture's input (1, 3, h, w), and its own size."""
        with torch.no_grad():
            inputs = [self.processor(images=p, return_tensors="pt")["pixel_values"] for p in pictures]
        return [(x, (p.shape[0], p.shape[1])) for x, p in zip(inputs, pictures, strict=True)]

    @torch.inference_mode()
    def predict(
        self, prepared: list[tuple[torch.Tensor, tuple[int, int]]], sizes: Sequence[tuple[int, int]]
    ) -> list[NDArray[Any]]:
        found: dict[int, NDArray[Any]] = {}
        shapes: dict[Any, list[int]] = {}
        for i, (x, _) in enumerate(prepared):
            shapes.setdefault(x.shape, []).append(i)
        for rows in shapes.values():
            outputs = self.model(pixel_values=torch.cat([prepared[i][0] for i in rows]).to(self.device))
            maps = self._finished(outputs, [prepared[i][1] for i in rows], [sizes[i] for i in rows])
            found |= {i: m.reshape(sizes[i]).float().cpu().numpy() for i, m in zip(rows, maps, strict=True)}
        return [found[i].astype(np.int32) if self.task == "segment" else found[i] for i in range(len(prepared))]

    def _finished(
        self, outputs: Any, pictures: list[tuple[int, int]], sizes: list[tuple[int, int]]
    ) -> Sequence[torch.Tensor]:
        if self.task == "segment":
            maps: Sequence[torch.Tensor] = self.processor.post_process_semantic_segmentation(
                outputs, target_sizes=sizes
            )
            return maps
        post = self.processor.post_process_depth_estimation
        # ZoeDepth's processor pads, and cuts the padding off again where it knows how large the picture was.
        more = {"source_sizes": pictures} if "source_sizes" in inspect.signature(post).parameters else {}
        return [m["predicted_depth"] for m in post(outputs, target_sizes=sizes, **more)]


def _config(model: str, task: Task) -> Any:
    """Of a model of transformers; raises `DataError` where there is none, or one for another task."""
    import transformers

    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model)
    if _auto_class(type(config), task) is None:
        does = "semantic segmentation" if task == "segment" else "depth estimation"
        raise DataError(
            f"{model!r} is a {config.model_type!r} model, of which transformers does not know that it does {does}. Choose "
            f"one of the models for {does} of the Hub, such as "
            f"{'nvidia/segformer-b0-finetuned-ade-512-512' if task == 'segment' else 'Intel/dpt-large'}."
        )
    return config


def _auto_class(kind: type, task: Task) -> Any:
    """The class that loads a model with a config of this kind, None for one of another task."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if task == "depth":
        return transformers.AutoModelForDepthEstimation if kind in auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING else None
    if kind in auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        return transformers.AutoModelForSemanticSegmentation
    if kind in (transformers.MaskFormerConfig, transformers.Mask2FormerConfig):
        return transformers.AutoModelForUniversalSegmentation
    return None
