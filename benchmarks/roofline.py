"""What the operator's kernels move: bytes per output, and the share of peak bandwidth that their accesses allow.

    python benchmarks/roofline.py [--size 4096]

Counted, not timed. For the CUDA kernels loads count as the 32-byte sectors that the hardware moves, with the layout of
kernels.cu; the share is what a weight of `bits` bits and its scales need at least, divided by what the sectors hold.
Activations are left out: all warps read the same ones, from the caches.
"""

from __future__ import annotations

import argparse

SECTOR = 32


def stored(bits: int) -> int:
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def needed(cols: int, bits: int, block: int, scale: int) -> float:
    """Bytes of information in a row: codes, and a scale of `scale` bytes per block."""
    return cols * bits / 8 + -(-cols // block) * scale


def sector_bytes(size: int) -> int:
    """Bytes of the sectors that `size` contiguous bytes fill, from a sector's start."""
    return -(-size // SECTOR) * SECTOR


def row_reads(cols: int, bits: int, block: int, scale: int) -> int:
    """Bytes of the sectors that the CUDA kernels read of one row: whole quads of chunks, and the row's scales. Four
    lanes read 64 neighbouring bytes of codes at a time; a scale that is read again comes from the first cache."""
    quad = 512 // stored(bits)  # columns
    return -(-cols // quad) * 64 + sector_bytes(-(-cols // block) * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    size = parser.parse_args().size
    print("| kernel | bits | block | bytes per output | multiply-adds per byte, one row | share of peak bandwidth |")
    print("|---|---|---|---|---|---|")
    for bits in (2, 3, 4, 6, 8):
        for block in (32, 128):
            moved = row_reads(size, bits, block, 2)
            share = needed(size, bits, block, 2) / moved
            print(f"| CUDA linear_tiles, float16 | {bits} | {block} | {moved:,} | {size / moved:.2f} | {share:.0%} |")
    for bits in (2, 3, 4, 6, 8):
        moved = row_reads(size, bits, 32, 2)
        read, written = needed(size, bits, 32, 2), size * 2
        share = (read + written) / (moved + written)
        print(f"| CUDA dequantize, float16 | {bits} | 32 | {moved + written:,} | | {share:.0%} |")
    for bits in (2, 3, 4, 6, 8):
        for block in (32, 128):
            moved = size * stored(bits) // 8 + size // block * 4
            share = needed(size, bits, block, 4) / moved
            print(f"| CPU level 4 | {bits} | {block} | {moved:,} | {size / moved:.2f} | {share:.0%} |")


if __name__ == "__main__":
    main()
