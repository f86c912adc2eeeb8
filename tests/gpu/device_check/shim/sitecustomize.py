"""Let the project run on torch 2.11, whose DistributedDataParallel lacks `forward_sync_buffers`.

torch 2.13 renamed `broadcast_buffers` to that. Python imports this module when it starts, if its
folder is on PYTHONPATH; it patches the class as soon as its module is imported.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

MODULE = "torch.nn.parallel"


def _patch(module: ModuleType) -> None:
    ddp: Any = module.DistributedDataParallel
    init = ddp.__init__
    if "forward_sync_buffers" in inspect.signature(init).parameters:
        return

    @functools.wraps(init)
    def patched(
        self: Any, *args: Any, forward_sync_buffers: bool | None = None, **kwargs: Any
    ) -> None:
        if forward_sync_buffers is not None:
            kwargs["broadcast_buffers"] = forward_sync_buffers
        init(self, *args, **kwargs)

    ddp.__init__ = patched


class _PatchOnImport(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, _PatchOnImport())
