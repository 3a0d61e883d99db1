"""The header of a safetensors file on the Hub, read by ranges."""

from formats.hub.repo import HubRepo
from formats.safetensors_header import Header, header_from


def fetch_header(
    repo: HubRepo, name: str, max_bytes: int, *, first_bytes: int
) -> tuple[Header, bytes]:
    """Return the checked header of a file, and the bytes before its data section.

    first_bytes: size of the first request; a longer header takes a second one. Raises HubError and
    the errors of `header_from`.
    """
    file = repo.file(name)
    start = bytearray(repo.read(name, 0, min(file.size, first_bytes)))

    def read(offset: int, length: int) -> bytes:
        end = min(offset + length, file.size)
        if end > len(start):
            start.extend(repo.read(name, len(start), end))
        return bytes(start[offset:end])

    header = header_from(read, file.size, str(file), max_bytes)
    return header, bytes(start[: header.data_offset])
