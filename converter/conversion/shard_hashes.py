"""The sha256 of the source's shards, computed beside the work."""

from concurrent.futures import ThreadPoolExecutor

from converter.checkpoint.source import Checkpoint
from converter.journal.finished_work import FinishedWork


class ShardHashes:
    """Hashes shards in a thread of its own; what it reads ahead, the workers find in the page
    cache. A context.
    """

    def __init__(self, checkpoint: Checkpoint, work: FinishedWork) -> None:
        self._checkpoint = checkpoint
        self._recorded = {name: work.shard_sha256(name) for name in checkpoint.shards}
        self._executor = ThreadPoolExecutor(1)
        self._hashes = self._executor.submit(self._compute)

    def __enter__(self) -> "ShardHashes":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def result(self) -> dict[str, str]:
        """Waits; name -> sha256 in hex, worthless once the checkpoint is stopped. Raises what
        hashing raised.
        """
        return self._hashes.result()

    def _compute(self) -> dict[str, str]:
        return {
            name: recorded or self._checkpoint.shard_sha256(name, self._checkpoint.stop)
            for name, recorded in self._recorded.items()
        }
