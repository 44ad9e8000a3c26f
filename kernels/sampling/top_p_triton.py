"""Top-p in the last program of a row: its candidates, the search for the lowest kept logit, and the draw.

Candidates are the logits that top-p may keep, stored block by block in order of id. A token's mass is its probability
times the total mass of the row. These device functions serve the kernels in `sample.py`, which documents the formula.
"""

import triton
import triton.language as tl

INT32_MAX = tl.constexpr(2147483647)
# Margins for rounding: a share of the total mass, and a factor. Near top_p = 1 every token is a candidate.
CANDIDATE_SLACK = tl.constexpr(1e-5)
CANDIDATE_SHARE = tl.constexpr(0.999)
PER_THREAD = tl.constexpr(4)  # adjacent candidates that one thread holds: one 16-byte load
LOG2_E = tl.constexpr(1.4426950408889634)
# Keep 1 / temperature a finite, normal float32, so that 0 · inf cannot occur.
MIN_TEMPERATURE = tl.constexpr(1e-38)
MAX_TEMPERATURE = tl.constexpr(1e37)


@triton.jit
def load_scale(temperature_ptr, row):
    """log2(e) / temperature of a row."""
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / tl.minimum(tl.maximum(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
    return (inverse * LOG2_E).to(tl.float32)


@triton.jit
def random_number(seed_ptr, stream_ptr, call_ptr, position, row):
    """A row's random number in [0, 1), equal to `philox.uniform`."""
    stream, call = tl.load(stream_ptr + row).to(tl.uint32), tl.load(call_ptr + row).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr + row), position.to(tl.uint32), stream, call, tl.zeros((), tl.uint32))
    return (word >> 8).to(tl.float64) * (1.0 / 16777216)


@triton.jit
def _key_of(x, KEY_BITS: tl.constexpr):
    """Integers in the same order as the float32 values, equal for 0.0 and -0.0."""
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)


@triton.jit
def _logit_of(key, KEY_BITS: tl.constexpr):
    """The float32 value with this key."""
    EMPTY: tl.constexpr = 32 - KEY_BITS
    bits = key << EMPTY
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF >> EMPTY << EMPTY))).to(tl.float32, bitcast=True)


@triton.jit
def _floor(x):
    """x rounded down to an integer, for x of at least 0."""
    return x.to(tl.int32).to(x.dtype)


@triton.jit
def min_candidate_mass(top_p, mass, V):
    """The least mass of a kept token, less a margin for rounding."""
    return tl.maximum((1.0 - top_p) * CANDIDATE_SHARE - CANDIDATE_SLACK, 0.0).to(tl.float32) * (mass / V)


@triton.jit
def collect_candidates(
    logits_ptr, block, maximum, scale, min_mass, candidates_ptr, counts_ptr, lowest_ptr, slot, V, KEY_BITS, BLOCK_V
):
    """Store a block's logits with a mass of at least min_mass in its slot, with their number and smallest key."""
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    mass = tl.exp2((x - maximum) * scale)
    candidate = (mass > 0.0) & (mass >= min_mass)
    place = tl.cumsum(candidate.to(tl.int32), 0)
    tl.store(candidates_ptr + slot * BLOCK_V + place - 1, x, mask=candidate)
    tl.store(counts_ptr + slot, tl.max(place, 0))
    tl.store(lowest_ptr + slot, tl.min(tl.where(candidate, _key_of(x, KEY_BITS), INT32_MAX), 0))


@triton.jit
def _load_candidates(candidates_ptr, counts, begin, maximum, scale, BLOCK_V, KEY_BITS, CHUNK: tl.constexpr):
    """A chunk of each block's candidates -> (masses, keys), (BLOCKS, CHUNK) each; mass 0 where there is none."""
    index, left = tl.arange(0, CHUNK), counts - begin
    block_begin = tl.arange(0, counts.shape[0]) * BLOCK_V
    # Complete chunks are read, also past a block's last candidate, so that loads are 16 bytes wide.
    x = tl.load(
        candidates_ptr + block_begin[:, None] + (begin + index)[None, :],
        mask=(left > 0)[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    live = index[None, :] < left[:, None]
    return tl.where(live, tl.exp2((x - maximum) * scale), 0.0), _key_of(x, KEY_BITS)


@triton.jit
def _sum_per_thread(x):
    """Sum groups of PER_THREAD adjacent elements, which one thread holds."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // PER_THREAD, PER_THREAD)), 2)


@triton.jit
def _lowest_kept_key(candidates_ptr, counts, low, high, limit, maximum, scale, BLOCK_V, KEY_BITS, CHUNK: tl.constexpr):
    """The lowest key in [low, high] with at most `limit` of mass above it. No key is above `high`."""
    longest = tl.max(counts, 0)
    while low < high:  # at most KEY_BITS / 3 times: each pass leaves an eighth of the range
        step = (high - low) // 8 + 1
        above = (tl.zeros((counts.shape[0], CHUNK // PER_THREAD), tl.float32),) * 8
        for begin in range(0, longest, CHUNK):
            # fmt: off
            mass, key = _load_candidates(candidates_ptr, counts, begin, maximum, scale, BLOCK_V, KEY_BITS,
                                         CHUNK)
            # fmt: on
            more = ()
            end = low - 1
            for i in tl.static_range(8):
                end = tl.minimum(end + step, high)
                more = more + (above[i] + _sum_per_thread(tl.where(key > end.to(tl.int32), mass, 0.0)),)
            above = more
        pairs = tl.join(tl.join(above[0], above[1]), tl.join(above[2], above[3]))
        pairs_2 = tl.join(tl.join(above[4], above[5]), tl.join(above[6], above[7]))
        sums = tl.sum(tl.reshape(tl.join(pairs, pairs_2), (counts.shape[0] * CHUNK // PER_THREAD, 8)), 0)
        low += step * tl.sum((sums.to(tl.float64) > limit).to(tl.int64), 0)
        high = tl.minimum(high, low + step - 1)
    return low.to(tl.int32)


@triton.jit
def _first_exceeding(weights, until, goal, index):
    """The first index with a positive weight at which the running sum `until` exceeds the goal.

    The last index with a positive weight, if by rounding the sum never exceeds the goal.
    """
    last = tl.max(tl.where(weights > 0.0, index, 0), 0)
    return tl.minimum(tl.min(tl.where((weights > 0.0) & (until > goal), index, INT32_MAX), 0), last)


@triton.jit
def draw_token(
    logits_ptr, candidates_ptr, counts, low, limit, u, maximum, scale, V, BLOCK_V, KEY_BITS, CHUNK: tl.constexpr
):
    """The token that u in [0, 1) selects, and its logit. The pointers are those of the row."""
    # If everything is kept, there is nothing to search.
    high = tl.where(limit == float("inf"), low, _key_of(maximum, KEY_BITS).to(tl.int64))
    # fmt: off
    threshold = _lowest_kept_key(candidates_ptr, counts, low, high, limit, maximum, scale, BLOCK_V, KEY_BITS,
                                 CHUNK)
    # fmt: on
    BLOCKS: tl.constexpr = counts.shape[0]
    above_sums = tl.zeros((BLOCKS, CHUNK // PER_THREAD), tl.float32)
    tie_sums = tl.zeros((BLOCKS, CHUNK // PER_THREAD), tl.float32)
    for begin in range(0, tl.max(counts, 0), CHUNK):
        mass, key = _load_candidates(candidates_ptr, counts, begin, maximum, scale, BLOCK_V, KEY_BITS, CHUNK)
        above_sums += _sum_per_thread(tl.where(key > threshold, mass, 0.0))
        tie_sums += _sum_per_thread(tl.where((key == threshold) & (mass > 0.0), 1.0, 0.0))

    above, ties = tl.sum(above_sums, 1).to(tl.float64), tl.sum(tie_sums, 1).to(tl.float64)
    above_until, ties_until = tl.cumsum(above, 0), tl.cumsum(ties, 0)
    above_mass, last_tie = tl.max(above_until, 0), tl.max(ties_until, 0) - 1.0
    weight = tl.exp2((_logit_of(threshold, KEY_BITS) - maximum) * scale).to(tl.float64)
    # Index of the last kept tie: ties are kept while at most `limit` of mass is before them; the first always is.
    last_kept = _floor(tl.minimum(tl.maximum((limit - above_mass) / weight, 0.0), last_tie))
    goal = u * (above_mass + (last_kept + 1.0) * weight)
    is_tie = goal >= above_mass
    # Ties are selected by counting: the first tie whose count, itself included, exceeds its rank + 1/2.
    goal = tl.where(is_tie, _floor(tl.minimum((goal - above_mass) / weight, last_kept)) + 0.5, goal)
    inside = tl.where(is_tie, ties, above)
    until = tl.where(is_tie, ties_until, above_until)
    index = tl.arange(0, BLOCKS)
    block = _first_exceeding(inside, until, goal, index)
    rest = (goal - tl.sum(tl.where(index == block, until - inside, 0.0), 0)).to(tl.float32)

    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    mass, key = tl.exp2((x - maximum) * scale), _key_of(x, KEY_BITS)
    counted = tl.where(is_tie, tl.where(key == threshold, 1.0, 0.0), tl.where(key > threshold, mass, 0.0))
    token = _first_exceeding(counted, tl.cumsum(counted, 0), rest, ids)
    return token, tl.sum(tl.where(ids == token, x, 0.0), 0)
