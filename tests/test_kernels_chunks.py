"""kernels/chunks.py: chunks cover everything, keep to their limit, and are of few sizes."""

from hypothesis import given
from hypothesis import strategies as st

from cggr.kernels.chunks import MAX_LOGITS, PRODUCT_TILE, class_chunk, row_chunk

counts = st.integers(1, 1 << 20)


@given(counts, st.integers(2, 300_000))
def test_chunks_of_rows(n_rows, n_classes):
    size = row_chunk(n_rows, n_classes)
    assert size % PRODUCT_TILE == 0
    assert size * n_classes <= MAX_LOGITS or size == PRODUCT_TILE
    # As equal as tiles allow: no other number of as many chunks is smaller.
    chunks = -(-n_rows // size)
    assert chunks == 1 or (size - PRODUCT_TILE) * chunks < n_rows


@given(counts)
def test_chunks_of_classes(n_rows):
    size = class_chunk(n_rows)
    tiles = size // PRODUCT_TILE
    assert size == tiles * PRODUCT_TILE
    assert tiles & (tiles - 1) == 0
    assert size * n_rows <= MAX_LOGITS < 2 * size * n_rows or tiles == 1


def test_a_changing_selection_makes_few_sizes():
    assert len({class_chunk(n_rows) for n_rows in range(512, 16_385)}) <= 7
