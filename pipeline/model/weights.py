"""Read our and published weight files, and write ours.

Our checkpoint is one safetensors file whose metadata has everything that inference needs: model
config with mean and std, class names, palette, ignore_index. `load` detects other formats by names
and shapes. Code in a file is never run. Wherever a URI is accepted, so is `zoo:NAME`, a public
file of `zoo.FILES` that is downloaded on first use.
"""

import dataclasses
import hashlib
import json
import logging
from typing import Any

import safetensors.torch
import torch

from pipeline.data import storage
from pipeline.data.labels import CITYSCAPES, VOC, Classes
from pipeline.model import zoo
from pipeline.model.checkpoint_formats import State, detect_format
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3
from pipeline.model.formats import CheckpointError, TensorFile, parse
from pipeline.model.heads import initialize_logits
from pipeline.model.resnet import CASCADE_PREFIXES
from pipeline.text import first_line, first_names

__all__ = [
    "CheckpointError",
    "checkpoint_fingerprint",
    "checkpoint_sha256",
    "copy_weights",
    "is_backbone",
    "load",
    "load_backbone",
    "read",
    "to_bytes",
]

logger = logging.getLogger(__name__)

METADATA_KEY = "deeplab"
METADATA_VERSION = 1

IMAGENET_ONLY = ("fc.", "classifier.", "features.18.")
"""Prefixes of the weights in an ImageNet file that DeepLab does not use."""


def load(
    uri: str,
    *,
    num_classes: int | None = None,
    reset_classifier: bool = False,
    output_stride: int | None = None,
    atrous_rates: tuple[int, ...] | None = None,
    data: bytes | None = None,
) -> tuple[DeepLabV3, Classes]:
    """Return the network in `uri` (eval mode, fp32, on the CPU) and its classes.

    `data` holds the file's bytes if the caller has read them already. If the file does not have
    `num_classes` classes it is refused or, with `reset_classifier`, its last layers get fresh
    weights. `output_stride` and `atrous_rates` (at output stride 16) replace those of the file or
    of its format.

    Raises CheckpointError if the file is not a checkpoint or does not fit any network, ValueError
    if the arguments do not fit the network, StorageError if the file cannot be read.
    """
    data = read(uri) if data is None else data
    config, classes, state = _parse(data, uri, atrous_rates)
    if num_classes is not None and num_classes != config.num_classes:
        if not reset_classifier:
            raise CheckpointError(
                f"{uri} has {config.num_classes} classes, but num_classes is {num_classes}; "
                "reset_classifier=True gives the last layers fresh weights"
            )
        config = dataclasses.replace(config, num_classes=num_classes)
        state, classes = _reset_classifier(config, state), _default_classes(num_classes)
    model = _build(config, state, uri)
    if output_stride is not None:
        model.set_output_stride(output_stride)
    return model, classes


def load_backbone(model: DeepLabV3, uri: str) -> None:
    """Copy the weights of an ImageNet classifier (torchvision's names) to the model's backbone.

    The file's classifier is ignored. block5 to block7 of a cascade, which no such file has, keep
    their weights. Raises CheckpointError if the other weights do not fit.
    """
    tensors = parse(read(uri), name=uri).tensors
    kept = {k: v for k, v in model.backbone.state_dict().items() if k.startswith(CASCADE_PREFIXES)}
    state = {key: value for key, value in tensors.items() if not key.startswith(IMAGENET_ONLY)}
    state = _match(model.backbone, kept | state, uri)
    if model.config.style == "paper" and model.config.backbone != "mobilenet_v2":
        logger.warning(
            "%s: torchvision's networks have strides in each stage's first unit; style "
            "'torchvision' keeps its features, 'paper' has to relearn them",
            uri,
        )
    model.backbone.load_state_dict(state)


def is_backbone(data: bytes, *, name: str) -> bool:
    """Return whether the file `name` is a classifier, for `load_backbone`, not a DeepLab."""
    file = parse(data, name=name)
    return not file.npz and not any("backbone." in key for key in file.tensors)


def copy_weights(source: DeepLabV3, target: DeepLabV3, uri: str) -> None:
    """Copy the weights of `source`, which was loaded from `uri`, to `target`.

    Strides, rates and dropout may differ. Raises CheckpointError if the weights do not fit.
    """
    state = {key: value for key, value in source.state_dict().items() if _is_shared(key, target)}
    fresh = {k: v for k, v in target.state_dict().items() if k.startswith("aux_classifier.")}
    target.load_state_dict(_match(target, fresh | state, uri))


def _is_shared(key: str, target: DeepLabV3) -> bool:
    """Return whether `target` has such a weight; it may lack the source's auxiliary head."""
    return target.aux_classifier is not None or not key.startswith("aux_classifier.")


def to_bytes(model: DeepLabV3, classes: Classes, *, half: bool = False) -> bytes:
    """Return the model as the bytes of a checkpoint; the same model gives the same bytes.

    `half` stores convolution weights as fp16. Vectors and buffers stay fp32, since running
    variances may be below fp16's range. Raises ValueError if classes and model do not match.
    """
    if len(classes.names) != model.config.num_classes:
        raise ValueError(
            f"classes has {len(classes.names)} names, but the model's num_classes is "
            f"{model.config.num_classes}; give the classes that the model was trained on"
        )
    content = {
        "version": METADATA_VERSION,
        "model": json.loads(model.config.to_json()),
        "classes": classes.to_dict(),
    }
    tensors = {
        key: _stored(tensor.detach(), half=half) for key, tensor in model.state_dict().items()
    }
    # A single entry, because the order of several differs between processes.
    metadata = {METADATA_KEY: json.dumps(content, sort_keys=True)}
    return safetensors.torch.save(tensors, metadata)


def _stored(tensor: torch.Tensor, *, half: bool) -> torch.Tensor:
    tensor = tensor.cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    small = tensor.half() if half and tensor.ndim == 4 else None
    # A weight beyond the range of fp16 would become infinity.
    return tensor.float() if small is None or not small.isfinite().all() else small


def read(uri: str) -> bytes:
    """Return the bytes of the file at `uri`: local, remote, or `zoo:NAME`."""
    return storage.read(storage.normalize(zoo.resolve(uri)))


def checkpoint_sha256(data: bytes) -> str:
    """Return the sha256 of a checkpoint's bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def checkpoint_fingerprint(data: bytes) -> str:
    """Return the first 16 digits of `checkpoint_sha256`: the `model` column of results."""
    return checkpoint_sha256(data)[:16]


def _parse(
    data: bytes, uri: str, atrous_rates: tuple[int, ...] | None
) -> tuple[ModelConfig, Classes, State]:
    file = parse(data, name=uri)
    if METADATA_KEY in file.metadata:
        config, classes = _read_metadata(file, uri)
        if atrous_rates is not None:
            config = dataclasses.replace(config, atrous_rates=atrous_rates)
        return config, classes, file.tensors
    config, state = detect_format(file, name=uri, atrous_rates=atrous_rates)
    classes = _default_classes(config.num_classes)
    logger.info(
        "%s does not state output stride, rates, mean, std and classes; assuming %s and %s, ...",
        uri,
        config,
        ", ".join(classes.names[:3]),
    )
    return config, classes, state


def _read_metadata(file: TensorFile, uri: str) -> tuple[ModelConfig, Classes]:
    try:
        content: Any = json.loads(file.metadata[METADATA_KEY])
        if content["version"] != METADATA_VERSION:
            raise ValueError(
                f"version {content['version']!r}; this program reads version {METADATA_VERSION}"
            )
        config = ModelConfig.from_json(json.dumps(content["model"]))
        classes = Classes.from_dict(content["classes"])
        if len(classes.names) != config.num_classes:
            raise ValueError(f"{len(classes.names)} names for {config.num_classes} classes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{uri} has invalid metadata: {first_line(error)}") from None
    return config, classes


def _default_classes(num_classes: int) -> Classes:
    # Published files are for the classes of these two.
    for known in (VOC, CITYSCAPES):
        if num_classes == len(known.names):
            return known
    return Classes.from_dict({"names": [f"class_{index}" for index in range(num_classes)]})


def _reset_classifier(config: ModelConfig, state: State) -> State:
    with torch.device("meta"):
        model = DeepLabV3(config)
    state = dict(state)
    for head, layers in (
        ("classifier", model.classifier),
        ("aux_classifier", model.aux_classifier),
    ):
        if layers is not None:
            *_, (name, last) = layers.named_modules(prefix=head)
            fresh = last.to_empty(device="cpu")
            initialize_logits(fresh)
            state |= {f"{name}.{key}": value for key, value in fresh.state_dict().items()}
    return state


def _build(config: ModelConfig, state: State, uri: str) -> DeepLabV3:
    # On the meta device nothing is allocated: every tensor is assigned from the file.
    with torch.device("meta"):
        model = DeepLabV3(config)
    model.load_state_dict(_match(model, state, uri), assign=True)
    return model.eval()


def _match(module: torch.nn.Module, state: State, uri: str) -> State:
    """Return the state in the module's types.

    Raises CheckpointError if names or shapes differ, or a weight is not finite.
    """
    expected = module.state_dict()
    # Files older than PyTorch 0.4.1 have no batch counters, which nothing here uses.
    counters = {k: torch.zeros_like(v, device="cpu") for k, v in expected.items() if v.ndim == 0}
    state = counters | state
    both = [key for key in expected if key in state]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in both
            if not _fits(state[key], expected[key])
        ],
    }
    if not any(problems.values()):
        problems["not finite"] = [key for key in both if not state[key].isfinite().all()]
    if any(problems.values()):
        found = "; ".join(f"{what}: {first_names(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{uri} does not fit the network: {found}")
    return {key: state[key].to(expected[key].dtype).contiguous() for key in expected}


def _fits(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    same_kind = tensor.is_floating_point() == expected.is_floating_point()
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return plain and same_kind and tensor.shape == expected.shape
