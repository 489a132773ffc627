"""How far RoPE bases reach: the first distance at which B(m) is negative, and the bases that a context needs.

python benchmarks/rope_bound.py
"""

from headwise.convert.positions.rope_bound import first_failure, smallest_base
from headwise.models.rope import base_frequencies

FAR = 1_000_000

print("| head dim | base | reaches |\n|---|---|---|")
for dim in (64, 128):
    for base in (10_000, 100_000, 500_000, 1_000_000, 5_000_000, 10_000_000):
        failure = first_failure(base_frequencies(base, dim), FAR)
        print(f"| {dim} | {base:,} | {FAR if failure is None else failure - 1:,} |")

print("\n| head dim | context | smallest base that holds | from here on all hold |\n|---|---|---|---|")
for dim in (64, 128):
    for context in (4096, 8192, 16_384, 32_768, 65_536, 131_072):
        found = smallest_base(dim, context)
        print(f"| {dim} | {context:,} | {found.smallest:.3g} | {found.always_from:.3g} |")
