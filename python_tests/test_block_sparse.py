"""Block selection: the twin against its definition, the operator against the twin, attention with thresholds."""

import math

import pytest
import torch

import flux_ext
from flux_ext.operators import KeyValues, Routing, attend, reference, select_blocks
from flux_ext.operators.patterns import BlockSparse, dense_mask
from flux_ext.operators.testing import poisoned, relative_error


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def scores_by_definition(q, k, stride, width):
    """One sub-block at a time; q, k of one head, [S, D] and [T, D]."""
    q_len, kv_len, dim = len(q), len(k), q.shape[1]
    offset = kv_len - q_len
    rows, columns = -(-q_len // stride), -(-kv_len // stride)
    mass = torch.zeros(-(-q_len // 128), -(-kv_len // width))
    for i in range(rows):
        line = torch.full((columns,), -math.inf)
        for j in range(columns):
            if j * stride > min(offset + (i + 1) * stride, kv_len) - 1:
                continue
            pairs = [(i * stride + stride - 1 - a, j * stride + a) for a in range(stride)]
            line[j] = sum(float(q[x] @ k[y]) for x, y in pairs if x < q_len and y < kv_len) / (math.sqrt(dim) * stride)
        for j, p in enumerate(line.softmax(0)):
            mass[i * stride // 128, j * stride // width] += p
    return mass


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("lens", [(256, 256), (150, 150), (130, 300)], ids=str)
def test_scores(lens, width):
    q, k = torch.randn(lens[0], 2, 16), torch.randn(lens[1], 16)
    got = reference.antidiagonal_scores(q, k, 0.25, 16, width)
    want = sum(scores_by_definition(q[:, h], k, 16, width) for h in range(2))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
def test_smallest_set_that_reaches_the_threshold(threshold):
    scores = torch.rand(6, 6) ** 4
    kept = reference.keep_mass(scores, threshold, 700, 700, 128)
    for i in range(6):
        chosen = kept[i].nonzero()[:, 0].tolist()
        assert 0 in chosen and i in chosen and max(chosen) <= i
        share = scores[i, : i + 1] / scores[i, : i + 1].sum()
        assert share[chosen].sum() >= threshold - 1e-5
        extra = [n for n in chosen if n not in (0, i)]
        if extra and threshold < 1:  # without the least of them, the threshold is missed
            assert share[chosen].sum() - share[extra].min() < threshold


def test_of_equal_shares_the_earlier_is_kept():
    kept = reference.keep_mass(torch.ones(10, 10), 0.5, 1280, 1280, 128)
    assert kept[9].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 9]
    keys = torch.ones(1, 1280, 1, 16)
    pattern = select_blocks(BlockSparse(threshold=0.5), torch.zeros(1, 1280, 1, 16), keys)
    assert pattern.blocks[0, 0, 9, : pattern.counts[0, 0, 9]].tolist() == [
        0,
        1,
        2,
        3,
        4,
        9,
    ]


# ---- the operator against the twin ----


def expect_lists(pattern, q, k, **bounds):
    """Lists of the operator for these tensors, equal to the twin's for the same values in fp64."""
    got = select_blocks(pattern, q, k, **bounds)
    want = reference.select_blocks(pattern, q.double(), k.double(), **bounds)
    assert got.width == pattern.width and got.blocks.is_contiguous() and got.counts.is_contiguous()
    assert torch.equal(got.counts, want.counts)
    longest = max([1, *want.counts.flatten().tolist()])
    assert torch.equal(got.blocks, want.blocks[..., :longest])
    return got


def spread(*shape, dtype=torch.float32):
    """Normal numbers, large enough for masses to differ by more than rounding."""
    return (2 * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "lens",
    [(0, 0), (0, 9), (1, 1), (1, 300), (127, 127), (128, 128), (129, 129), (129, 500), (300, 129), (520, 520)],
    ids=str,
)
def test_lists(dtype, stride, width, lens):
    q, k = spread(2, lens[0], 6, 24, dtype=dtype), spread(2, lens[1], 2, 24, dtype=dtype)
    expect_lists(BlockSparse(threshold=0.7, stride=stride, width=width), q, k)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_read(side):
    lens, capacity = [1, 127, 300, 0], 310
    starts = [capacity - n if side == "left" else 0 for n in lens]
    q = torch.stack([poisoned(spread(n, 4, 16), capacity, s) for n, s in zip(lens, starts, strict=True)])
    k = torch.stack([poisoned(spread(n, 2, 16), capacity, s) for n, s in zip(lens, starts, strict=True)])
    begin, end = int32(starts), int32(starts) + int32(lens)
    got = expect_lists(BlockSparse(threshold=0.7), q, k, q_begin=begin, q_end=end, kv_begin=begin, kv_end=end)
    assert got.counts[:, :, 0].bool().tolist() == [[True, True], [True, True], [True, True], [False, False]]
    for b, (start, n) in enumerate(zip(starts, lens, strict=True)):  # the same as each alone
        rows = slice(start, start + n)
        alone = select_blocks(BlockSparse(threshold=0.7), q[b : b + 1, rows], k[b : b + 1, rows])
        blocks = alone.counts.shape[-1]
        assert torch.equal(got.counts[b, :, :blocks], alone.counts[0]) and not got.counts[b, :, blocks:].any()


def test_packed():
    bounds = int32([0, 5, 5, 205, 500])
    q, k = poisoned(spread(500, 4, 16), 520), poisoned(spread(500, 2, 16), 520)
    expect_lists(BlockSparse(threshold=0.7, width=64), q, k, q_begin=bounds, kv_begin=bounds)


def test_lists_of_packed_sequences_are_as_long_as_the_longest():
    """Not as long as all rows of all sequences: attention holds them until its backward pass."""
    q, k, bounds = torch.randn(4096, 2, 16), torch.randn(4096, 1, 16), int32(range(0, 4097, 256))
    pattern = select_blocks(BlockSparse(threshold=1.0), q, k, q_begin=bounds, kv_begin=bounds)
    assert pattern.blocks.shape == (16, 1, 32, 2) and pattern.blocks.untyped_storage().nbytes() == 16 * 32 * 2 * 4
    none = int32([0, 0])
    assert select_blocks(BlockSparse(threshold=0.5), q, k, q_begin=none, kv_begin=none).blocks.shape == (1, 1, 32, 1)


def test_a_chunk_over_a_cache():
    q, k = spread(3, 200, 4, 16), torch.stack([poisoned(spread(n, 2, 16), 700) for n in (700, 333, 200)])
    expect_lists(BlockSparse(threshold=0.7), q, k, kv_end=int32([700, 333, 200]))
    expect_lists(BlockSparse(threshold=0.7), q, k, kv_end=int32([[700, 650], [333, 12], [200, 150]]))


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("per_head", [False, True])
def test_pages(page_size, per_head):
    lens = int32([[333, 333], [150, 150]]) if not per_head else int32([[333, 20], [150, 222]])
    pages = -(-333 // page_size)
    table = torch.randperm(4 * pages, dtype=torch.int32)[: (4 if per_head else 2) * pages]
    k = spread(4 * pages, page_size, 1 if per_head else 2, 16)
    table = table.view(2, 2, pages) if per_head else table.view(2, pages)
    bounds = {"kv_end": lens if per_head else lens[:, 0].contiguous(), "page_table": table}
    expect_lists(BlockSparse(threshold=0.7), spread(2, 140, 4, 16), k, **bounds)


def test_strided_tensors():
    q = spread(2, 4, 300, 16).transpose(1, 2)
    k = spread(2, 300, 4, 2, 48)[:, :, 1, :, 16:32]
    expect_lists(BlockSparse(threshold=0.7), q, k)
    expect_lists(BlockSparse(threshold=0.7), q, k[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("scale", [0.02, 0.0, -0.3])
def test_scale(scale):
    expect_lists(BlockSparse(threshold=0.7), spread(1, 500, 2, 16), spread(1, 500, 1, 16), scale=scale)


@pytest.mark.parametrize("mode", [0, 1])
def test_lists_are_made_where_the_route_says(mode):
    q, k, route = spread(2, 300, 4, 16), spread(2, 300, 2, 16), int32([[0, 1], [1, 0]])
    got = expect_lists(BlockSparse(threshold=0.7), q, k, route=route, mode=mode)
    assert torch.equal(got.counts.bool().all(-1), route == mode)


def test_more_query_heads_than_a_tile_has_rows():
    expect_lists(BlockSparse(threshold=0.7, stride=8), spread(1, 200, 36, 8), spread(1, 200, 1, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["q", "k"])
def test_scores_that_are_not_finite_keep_every_block(bad, place):
    q, k = spread(1, 640, 2, 16), spread(1, 640, 1, 16)
    (q if place == "q" else k)[0, 300, 0, 3] = bad
    got = expect_lists(BlockSparse(threshold=0.5), q, k)
    if place == "q":
        assert got.counts[0, 0, 2] == 3  # its own query block
    assert got.counts[0, 0, 1] == 2 or place == "q"
    if math.isnan(bad) and place == "k":
        assert got.counts[0, 0].tolist() == [1, 2, 3, 4, 5]  # every query block that sees it


def test_rules():
    q, k = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 1, 16)
    select = torch.ops.flux_ext.select_blocks
    bounds = (None,) * 5
    good = [q, k, 0.5, 16, 128, 0.25, None, 1, *bounds]
    for place, value, message in [
        (2, 0.0, r"threshold must be in \(0, 1\], got 0"),
        (2, math.nan, r"threshold must be in \(0, 1\], got nan"),
        (3, 4, "stride must be 8 or 16, got 4"),
        (4, 32, "width must be 64 or 128, got 32"),
        (5, math.inf, "scale must be a finite number in 32 bits, got inf"),
        (6, int32([0, 1]), r"route must be \[1\] or \[1, 1\], got \[2\]"),
        (7, 2, r"mode must be 0 \(full\) or 1 \(sparse\), got 2"),
        (1, torch.randn(1, 8, 1, 24), r"k must have the head_dim of q \(16\), got 24"),
        (11, int32([9]), "kv_len must not exceed the 8 rows there are, got 9"),
        (12, int32([[0]]), "page_table needs kv_len"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            select(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError, match="pattern must be BlockSparse, got Full"):
        select_blocks(flux_ext.Full(), q, k)
    with pytest.raises(TypeError, match="k must be a tensor, got None"):
        select_blocks(BlockSparse(threshold=0.5), q, None)
    with pytest.raises(TypeError, match="scale must be a number, got str 'a'"):
        select_blocks(BlockSparse(threshold=0.5), q, k, "a")


def test_lists_come_back_as_they_are():
    pattern = BlockSparse(blocks=int32([[[[0]]]]))
    assert select_blocks(pattern, torch.randn(1, 8, 1, 8), torch.randn(1, 8, 1, 8)) is pattern


# ---- as torch sees it ----


@pytest.mark.parametrize("layout", ["batched", "packed"])
def test_opcheck(layout):
    q, k, bounds = torch.randn(2, 150, 4, 16), torch.randn(2, 150, 2, 16), None
    if layout == "packed":
        q, k, bounds = q.flatten(0, 1), k.flatten(0, 1), int32([0, 100, 300])
    arguments = (q, k, 0.5, 16, 128, 0.25, None, 1, bounds, None, bounds, None, None)
    torch.library.opcheck(torch.ops.flux_ext.select_blocks.default, arguments)


def test_compile_fullgraph():
    def sparse(q, k, v, route):
        return flux_ext.attention(q * 2, k, v, route, sparse=BlockSparse(threshold=0.7))

    q, k, v, route = spread(2, 300, 4, 16), spread(2, 300, 2, 16), spread(2, 300, 2, 16), int32([0, 1])
    torch.testing.assert_close(torch.compile(sparse, fullgraph=True)(q, k, v, route), sparse(q, k, v, route))


def test_vmap():
    q, k = spread(3, 1, 300, 2, 16), spread(3, 1, 300, 1, 16)
    each = [select_blocks(BlockSparse(threshold=0.7), a, b).counts for a, b in zip(q, k, strict=True)]
    together = torch.func.vmap(lambda a, b: select_blocks(BlockSparse(threshold=0.7), a, b).counts)(q, k)
    assert torch.equal(together, torch.stack(each))


# ---- attention ----


def test_a_threshold_of_one_is_full_attention():
    q, k, v = (torch.randn(2, 300, h, 16) for h in (4, 2, 2))
    out = flux_ext.attention(q, k, v, torch.ones(2, dtype=torch.int32), sparse=BlockSparse(threshold=1.0))
    torch.testing.assert_close(out, flux_ext.attention(q, k, v))


def test_selection_follows_the_attention():
    """Keys of one far block that match every query are found; the rest is dropped."""
    q = torch.randn(1, 1024, 1, 32) * 0.1
    k = torch.randn(1, 1024, 1, 32) * 0.1
    q[..., 0] = 6.0
    k[:, 384:512, :, 0] = 6.0
    pattern = select_blocks(BlockSparse(threshold=0.9), q, k)
    assert pattern.blocks[0, 0, 7, : pattern.counts[0, 0, 7]].tolist() == [0, 3, 7]
    mask = dense_mask(pattern, 1024, 1024)[0, 0]
    out = flux_ext.attention(q, k, k, full=pattern)
    scores = (q[0, :, 0] @ k[0, :, 0].T / math.sqrt(32)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out[0, :, 0], scores.softmax(-1) @ k[0, :, 0], atol=1e-5, rtol=1e-4)


FA_XA = {"sparse": BlockSparse(threshold=0.6)}
XA_SSA = {"full": BlockSparse(threshold=0.6, stride=8, width=64), "sparse": flux_ext.Streaming(16, 64)}


@pytest.mark.parametrize("patterns", [FA_XA, XA_SSA], ids=["fa-xa", "xa-ssa"])
@pytest.mark.parametrize("layout", ["batched", "left padding", "packed", "cache", "pages"])
def test_attention_with_a_threshold(layout, patterns):
    q, k, v = (spread(2, 640, h, 16) for h in (4, 2, 2))
    route, options = int32([[0, 1], [1, 0]]), {}
    if layout == "left padding":
        q, k, v = (torch.stack([x[0], poisoned(x[1, :500], 640, 140)]) for x in (q, k, v))
        options = {"seq_start": int32([0, 140])}
    elif layout == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options = {"cu_seqlens": int32([0, 700, 1280])}
    elif layout == "cache":
        q, options = q[:, :150], {"kv_len": int32([640, 470])}
    elif layout == "pages":
        q, k, v = q[:, :150], *(x.view(-1, 10, 2, 16) for x in (k, v))
        options = {"kv_len": int32([640, 470]), "page_table": torch.randperm(128, dtype=torch.int32).view(2, 64)}
    got = flux_ext.attention(q, k, v, route, **patterns, **options)
    want = reference.attention(q.double(), k.double(), v.double(), route, **patterns, **options)
    rows = ~want.isnan()
    assert relative_error(got[rows], want[rows]) < 1e-5
    dense = reference.attention(q.double(), k.double(), v.double(), **options)
    assert relative_error(got[rows], dense[rows]) > 1e-2  # something was left out


def test_attention_by_its_bounds():
    q, kv = spread(2, 200, 2, 16), KeyValues(spread(2, 400, 1, 16), spread(2, 400, 1, 16), None, int32([400, 220]))
    routing = Routing(int32([1, 1]), flux_ext.Full(), BlockSparse(threshold=0.6))
    got, _ = attend(q, kv, routing, 0.25)
    want, _ = reference.attend(q, kv, routing, 0.25)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_gradient_of_attention_with_a_threshold():
    q, k, v = (spread(1, 300, h, 16) / 2 for h in (2, 1, 1))
    grads = []
    for attention in (flux_ext.attention, reference.attention):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        attention(*x, int32([1]), sparse=BlockSparse(threshold=0.6)).square().sum().backward()
        grads.append([t.grad for t in x])
    for got, want in zip(*grads, strict=True):
        assert relative_error(got, want) < 1e-5
