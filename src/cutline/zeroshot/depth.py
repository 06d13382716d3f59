"""Depth from words: DepthCLIP without training, or words that are learned with both towers frozen. In Python:

    result = depth("runs/mine", "nyuv2:data", DepthClipConfig())                 # trains nothing
    result = depth("runs/mine", "folder:rooms", MirrorConfig(max_depth=5), out)  # trains, and keeps the model in out/model
    model = store.load(out)                                                      # then model.predict(images)

Data, crops, ranges and errors are those of the transfer depth task. Models that were trained are read by
`transfer.store.load` once this module is imported.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cutline import towers
from cutline.config import load as load_config
from cutline.errors import ConfigError, DataError
from cutline.objectives.gather import world
from cutline.record import Result
from cutline.towers.encoder import Encoder
from cutline.towers.pictures import weights_hash
from cutline.train.device import device_of, process_group
from cutline.transfer import depth as transfer
from cutline.transfer import store
from cutline.transfer.data import DenseData, open_data
from cutline.transfer.options import seeded
from cutline.transfer.predict import Predicted, predict_with
from cutline.transfer.predict import predict as predict_stored
from cutline.transfer.run import finished
from cutline.zeroshot.depthclip import DepthClip, DepthClipConfig, resolved
from cutline.zeroshot.embedded import EmbeddedText, framed, room
from cutline.zeroshot.mirror import Mirror, MirrorConfig
from cutline.zeroshot.texts import open_joint
from cutline.zeroshot.tokens import DepthTokens, TokensConfig

METHODS: dict[str, type[DepthClipConfig] | type[TokensConfig] | type[MirrorConfig]] = {
    "depthclip": DepthClipConfig,
    "tokens": TokensConfig,
    "mirror": MirrorConfig,
}
ROWS = 64  # of the mirror, in the paper


def config_for(overrides: Sequence[str]) -> DepthClipConfig | TokensConfig | MirrorConfig:
    """The config of the method that `method=` names, DepthCLIP's if none does. Raises `ConfigError`."""
    named = [o.split("=", 1)[1] for o in overrides if o.startswith("method=")]
    method = named[-1] if named else "depthclip"
    if method not in METHODS:
        raise ConfigError(f"method={method} is none of {', '.join(METHODS)}.")
    return load_config(METHODS[method], None, overrides)


def depth(
    model: towers.Model | str,
    data: str | DenseData,
    config: DepthClipConfig | TokensConfig | MirrorConfig,
    out: Path | None = None,
    resume: bool = False,
) -> Result:
    """Score depth from words by the method of the config, which tokens and mirror train first.

    model: one with a text tower, a run directory, or what `towers.load` takes. `out` gets result.json and samples.png, and of what
    was trained also the model, metrics.jsonl and checkpoints until it is done. resume: go on from the last of these.
    Raises `CutlineError`.
    """
    with seeded(config):
        loaded = open_joint(model)
    opened = open_data(data, "depth")
    if isinstance(config, DepthClipConfig):
        if resume:
            raise ConfigError("method=depthclip trains nothing: leave --resume out.")
        return _untrained(loaded, opened, config, out)
    if isinstance(config, MirrorConfig):
        config = config.model_copy(update={"tokens": config.tokens or min(ROWS, room(loaded))})
    ids, first = framed(loaded, config.learned)
    both = weights_hash(loaded)
    if resume and out is not None and (out / "result.json").exists():
        return finished(out, config, opened, both)

    def build(encoder: Encoder, config: Any) -> transfer.DepthModel:
        made: transfer.DepthModel = KINDS[config.method](encoder, config, EmbeddedText(loaded, ids, first))
        made.source_hash = both  # a run goes on with these towers alone
        return made

    return transfer.depth(towers.load_encoder(loaded), opened, config, out, resume, build)


def _untrained(model: towers.Model, data: DenseData, config: DepthClipConfig, out: Path | None) -> Result:
    begun = time.monotonic()
    with process_group(config.device):
        made = _words(model, config, data)
        result = transfer.score(made, data)
        metrics = {**result.metrics, "truncated": made.truncated}
        result = result.model_copy(update={"metrics": metrics, "seconds": time.monotonic() - begun})
        if out is not None and world()[0] == 0:
            transfer.draw(made, out / "samples.png", data)
            result.write(out)
    return result


def _words(model: towers.Model, config: DepthClipConfig, data: DenseData | None) -> DepthClip:
    """DepthCLIP on the config's device, its bins those of the data where the config says so."""
    ready, used, skipped = resolved(config, data)
    made = DepthClip(model, ready)
    made.labels, made.skipped, made.source_hash = used, skipped, weights_hash(model)
    made.notes["bins_from"] = "quantiles of training depth" if config.bins == "data" else "config"
    return made.to(device_of(config.device))


def predict(
    model: str, pictures: Sequence[str | Path], overrides: Sequence[str] = (), out: Path | None = None
) -> Predicted:
    """Depth of pictures (files, or folders of them) into `out`, as `transfer.predict` writes it: with a model that was trained
    (its folder), or with DepthCLIP on what `towers.load` takes. Raises `CutlineError`."""
    if not _trained(model):
        config = config_for(overrides)
        if not isinstance(config, DepthClipConfig):
            raise ConfigError(
                f"{model!r} holds no trained model of method={config.method}: train one with --data SPEC first, and give its "
                "folder as --model."
            )
        folder = out or Path("runs") / "pictures"
        return predict_with(lambda: _words(open_joint(model), config, None), "depth", pictures, folder)
    return predict_stored(model, pictures, out, overrides, "depth")


def _trained(model: str) -> bool:
    """Whether the folder holds a model of depth; one that holds another may be an adapted CLIP."""
    try:
        return store.TASKS.get(store.describe(store.folder_of(model))["kind"]) == "depth"
    except DataError:
        return False


def _load(content: dict[str, Any], tensors: dict[str, Tensor], overrides: Sequence[str]) -> transfer.DepthModel:
    """The model that a folder's transfer.json describes, its weights still to be read."""
    method = content["config"]["method"]
    model = store.tower_of(content)
    text = EmbeddedText(model, tensors["head.text.ids"], int(tensors["head.text.first"]))
    config: Any = store.config_of(METHODS[method], content, overrides)
    made: transfer.DepthModel = KINDS[method](towers.load_encoder(model), config, text)
    made.notes = content["notes"]
    return made


KINDS: dict[str, Any] = {"tokens": DepthTokens, "mirror": Mirror}
for _kind in KINDS.values():
    store.TASKS[_kind.__name__], store.LOADERS[_kind.__name__] = "depth", _load
