"""The network as a shard sees it: photos of one size in, masks out, memory permitting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.bulk.settings import Inference
from pipeline.bulk.worker.decode import Pixels
from pipeline.model import optimize, predict


class Network:
    """The model on its device, made fast."""

    def __init__(self, model: Any, inference: Inference, *, gpu: bool) -> None:
        # not compiled: nobody knows the photos' sizes before they are fetched
        self._model = optimize.optimize_for_inference(model, "cuda" if gpu else "cpu")
        if inference.output_stride is not None:
            self._model.set_output_stride(inference.output_stride)
        self._how: dict[str, Any] = {
            "scales": inference.scales,
            "flip": inference.flip,
            "window": predict.SlidingWindow(
                size=inference.window,
                overlap=inference.window_overlap,
                threshold_pixels=inference.window_above,
            ),
        }

    def segment(self, images: list[Pixels]) -> list[tuple[Any, Any] | None]:
        """(mask, confidence) of each image of one size; None where memory does not suffice."""
        try:
            masks, confidences = predict.segment(self._model, np.stack(images), **self._how)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            # below: outside of the handler, whose traceback holds the tensors
        else:
            return list(zip(masks.numpy(), confidences.numpy(), strict=True))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [None] if len(images) == 1 else [self.segment([image])[0] for image in images]


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # torch's own type exists for GPUs alone
