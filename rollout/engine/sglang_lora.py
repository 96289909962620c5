"""Adapters in a running SGLang engine, by version: new turns begin on the newest, running ones end on theirs.

Nothing is paused: SGLang computes turns with different adapters in one batch. A version's adapter is unloaded as soon as a
newer one is there and its last turn has ended. SGLang keys cached prefixes by adapter, so an episode's next turn on a
newer version computes its prefix once more.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rollout.engine.base import EngineError
from rollout.engine.hf_tensors import adapter_manifest
from rollout.engine.sglang_arguments import whole_groups
from rollout.engine.sglang_runtime import Runtime
from rollout.engine.sglang_weights import TIMEOUT, bucket_of, payloads
from rollout.wire import numpy_dtype
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.model.hf_files import CheckpointError
from sqlrl_jax.model.peft_config import WEIGHTS, adapter_config, require_adapter

_log = logging.getLogger(__name__)


@dataclass
class Adapter:
    """One version's adapters in SGLang. `name` "" is the model itself, before any were given."""

    name: str
    version: int
    turns: int = 0


class Adapters:
    """Loads, lends and unloads. Version 0 is `lora.path`, or without one the model of folder `base` alone.

    Raises CheckpointError when `lora.path` holds other adapters than `lora` asks for.
    """

    def __init__(self, runtime: Runtime, lora: LoraConfig, base: str, dtype: str, ranks: int) -> None:
        self._runtime, self._ranks = runtime, ranks
        whole = whole_groups(lora)
        self._config = adapter_config(whole, base)
        self._zeros = {
            spec.name: np.zeros(spec.shape, numpy_dtype(dtype))
            for spec in adapter_manifest(base, whole, dtype)
            if spec not in adapter_manifest(base, lora, dtype)
        }
        self._serial = itertools.count()
        self._lock = threading.Lock()  # guards what follows
        self._newest = Adapter("", 0)
        self._loaded: list[Adapter] = []
        if lora.path:
            self.load(_read(lora, dtype), 0)

    @property
    def count(self) -> int:
        """How many are in SGLang now."""
        return len(self._loaded)

    def load(self, tensors: Mapping[str, Any], version: int) -> None:
        """Makes `tensors` (numpy, by PEFT's names) the newest. Raises EngineError; nothing has changed then."""
        from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

        tensors = dict(tensors) | self._zeros
        [payload] = payloads(tensors, [bucket_of(tensors)], self._ranks)
        # A name of its own, also where a version is pushed a second time, by a learner that started again.
        adapter = Adapter(f"adapter-{next(self._serial)}@{version}", version)
        request = LoadLoRAAdapterFromTensorsReqInput(
            lora_name=adapter.name,
            config_dict=self._config,
            serialized_named_tensors=payload.serialized,
            load_format="flattened_bucket",
        )
        loading = payload.keep(self._runtime.manager.load_lora_adapter_from_tensors(request))
        self._add(adapter, self._runtime.call(loading, "load adapters", TIMEOUT))

    def take(self) -> Adapter:
        """The newest, for a turn that begins."""
        with self._lock:
            self._newest.turns += 1
            return self._newest

    def give_back(self, adapter: Adapter) -> None:
        """That turn has ended."""
        with self._lock:
            adapter.turns -= 1
        self._unload_unused()

    def _add(self, adapter: Adapter, answer: Any) -> None:
        if not answer.success:
            raise EngineError(f"SGLang refused the adapters of version {adapter.version}: {answer.error_message}")
        with self._lock:
            self._loaded.append(adapter)
            self._newest = adapter
        self._unload_unused()

    def _unload_unused(self) -> None:
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        with self._lock:
            unused = [adapter for adapter in self._loaded if adapter is not self._newest and not adapter.turns]
            self._loaded = [adapter for adapter in self._loaded if adapter not in unused]
        for adapter in unused if not self._runtime.failure else ():
            request = UnloadLoRAAdapterReqInput(lora_name=adapter.name)
            unloading = self._runtime.submit(self._runtime.manager.unload_lora_adapter(request))
            unloading.add_done_callback(partial(self._forget, adapter.name))

    def _forget(self, name: str, unloaded: Future[Any]) -> None:
        """In SGLang's loop: it would keep a reference to each name for ever."""
        self._runtime.manager.lora_ref_cache.pop(name, None)
        if not unloaded.cancelled() and (unloaded.exception() or not unloaded.result().success):
            _log.warning("%s was not unloaded: %s", name, unloaded.exception() or unloaded.result().error_message)


def _read(lora: LoraConfig, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of the PEFT folder `lora.path`. Raises CheckpointError."""
    require_adapter(lora.path, lora)
    file = Path(lora.path) / WEIGHTS
    try:
        with safe_open(file, framework="np") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name).astype(numpy_dtype(dtype)) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is missing, damaged or incomplete ({error}): copy it again") from error
