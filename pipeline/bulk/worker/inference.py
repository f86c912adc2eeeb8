"""Inference on batches of images of one size; a batch that does not fit into memory is split."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.bulk.settings import Inference
from pipeline.bulk.worker.decode import Pixels
from pipeline.model import optimize, predict


class InferenceModel:
    """The model on its device, optimized for inference."""

    def __init__(self, model: Any, inference: Inference, *, gpu: bool) -> None:
        # not compiled: image sizes are unknown until the images are fetched
        self._model = optimize.optimize_for_inference(model, "cuda" if gpu else "cpu")
        if inference.output_stride is not None:
            self._model.set_output_stride(inference.output_stride)
        self._options: dict[str, Any] = {
            "scales": inference.scales,
            "flip": inference.flip,
            "window": predict.SlidingWindow(
                size=inference.window,
                overlap=inference.window_overlap,
                threshold_pixels=inference.window_above,
            ),
        }

    def segment(self, images: list[Pixels]) -> list[tuple[Any, Any] | None]:
        """Return (mask, confidence), (h, w) each, of images of one size; None if out of memory."""
        try:
            masks, confidences = predict.segment(self._model, np.stack(images), **self._options)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            # retried below: inside the handler, the traceback would keep the tensors alive
        else:
            return list(zip(masks.numpy(), confidences.numpy(), strict=True))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [None] if len(images) == 1 else [self.segment([image])[0] for image in images]


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # torch has a type of its own for GPUs only
