"""A concurrent reader of the results: it must never see a partial file or a duplicate row."""

from __future__ import annotations

import io
import threading
from collections import Counter
from typing import Any

import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.data.storage import StorageError

_PAUSE_S = 0.2


class Watcher:
    """Reads every new file below `results` while the block runs; `wrong` lists violations.

    Files of `images/` are written once: a changed or deleted one is a violation too.
    """

    def __init__(self, results: str) -> None:
        self._results = results
        self._files: dict[str, str] = {}  # uri -> etag
        self._rows: Counter[tuple[str, str]] = Counter()  # (run_id, uri)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self.looks = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.look()  # once more at the end

    @property
    def files(self) -> int:
        """The number of files read."""
        return len(self._files)

    def _watch(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            try:
                self.look()
            except StorageError:  # the server is down
                continue

    def look(self) -> None:
        """Read the new files."""
        listed = {item.uri: item.etag for item in storage.list_objects(self._results)}
        self.looks += 1
        images = f"{self._results}/images/"
        for uri, etag in self._files.items():
            if uri.startswith(images) and listed.get(uri) != etag:
                self.wrong.append(f"{uri} was {etag}, is {listed.get(uri)}")
        for uri, etag in listed.items():
            if uri.endswith(".parquet") and self._files.get(uri) != etag:
                self._read(uri, etag, counted=uri.startswith(images))

    def _read(self, uri: str, etag: str, *, counted: bool) -> None:
        try:
            rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read(uri))).to_pylist()
        except StorageError as error:
            if error.kind == "vanished":  # a single-image file that was merged into its shard
                return
            raise
        except Exception as error:  # any error of the Parquet reader means a partial file
            self.wrong.append(f"{uri}: {error}")
            return
        known = uri in self._files
        self._files[uri] = etag
        if counted and not known:
            self._rows.update((row["run_id"], row["uri"]) for row in rows)
            twice = [key for key, count in self._rows.items() if count > 1]
            self.wrong += [f"{key} has two rows" for key in twice]
