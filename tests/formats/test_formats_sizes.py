import pytest

from formats.sizes import format_size, parse_size, size_option


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (33_149_000, "33.1 MB"),
        (10**9 - 1, "1000.0 MB"),
        (15_300_000_000, "15.3 GB"),
        (2 * 10**12, "2000.0 GB"),
    ],
)
def test_size_is_shown_in_the_largest_decimal_unit_that_it_reaches(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(1, "1MiB"), (2**20, "1MiB"), (2**20 + 1, "2MiB"), (5 * 2**30, "5120MiB")]
)
def test_size_for_an_option_is_rounded_up_and_can_be_read_back(n_bytes: int, text: str) -> None:
    assert size_option(n_bytes) == text
    assert parse_size(text) >= n_bytes
