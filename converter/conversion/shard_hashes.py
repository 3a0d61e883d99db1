"""Hashes the source's shards in a thread beside the workers."""

from concurrent.futures import ThreadPoolExecutor

from converter.checkpoint.source import Checkpoint
from converter.journal.finished_work import FinishedWork


class ShardHashes:
    """Context that computes the sha256 of each shard in its own thread.

    The bytes that it reads ahead are in the page cache when the workers need them.
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
        """Wait and return shard name -> sha256 in hex; raise what hashing raised.

        The hashes are meaningless once the checkpoint is stopped.
        """
        return self._hashes.result()

    def _compute(self) -> dict[str, str]:
        return {
            name: recorded or self._checkpoint.shard_sha256(name, self._checkpoint.stop)
            for name, recorded in self._recorded.items()
        }
