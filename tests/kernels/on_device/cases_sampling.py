"""Gumbel sampling and the top-k, top-p, min-p filter against their twins."""

import pytest
import torch
import triton
import triton.language as tl
from octavo_kernels import (
    draw_tokens_reference,
    forbid_tokens_reference,
    gumbel,
    gumbel_sample_reference,
    gumbel_triton,
    tiles,
    top_k_top_p_min_p_reference,
)
from octavo_kernels.draw_triton import draw_tokens_triton
from octavo_kernels.filter_triton import top_k_top_p_min_p_triton
from octavo_kernels.forbid_triton import forbid_tokens_triton
from octavo_kernels.gumbel_triton import gumbel_sample_triton

INF = float("inf")


@triton.jit
def draw_kernel(seeds, positions, bits, noise, vocab, TILE: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, TILE)
    drawn = gumbel_triton.hash_bits(token, tl.load(seeds + row), tl.load(positions + row))
    tl.store(bits + row * vocab + token, drawn, mask=token < vocab)
    tl.store(noise + row * vocab + token, gumbel_triton.log_exponential(drawn), mask=token < vocab)


def test_the_hash_is_the_same_bits_and_the_noise_the_same_number(device) -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345], device=device)
    positions = torch.tensor([0, 5, 2**31, 2**32 - 1, 7, 2**33 + 1], device=device)
    bits = torch.empty(6, 3000, dtype=torch.int32, device=device)
    noise = torch.empty(6, 3000, device=device)
    draw_kernel[(6,)](seeds, positions, bits, noise, 3000, TILE=4096)
    words = gumbel._token_words(3000, device)
    expected = gumbel.hash_bits(words, *gumbel.row_keys(seeds, positions))
    assert torch.equal(bits, expected)
    torch.testing.assert_close(noise, gumbel.log_exponential(expected), atol=5e-6, rtol=5e-6)


def test_noise_at_the_ends_of_its_range(device) -> None:
    ends = torch.tensor([0, 1, 2, 2**27, 2**31 - 2**16, 2**31 - 1], dtype=torch.int32, device=device)

    noise = torch.empty(8, device=device)
    noise_kernel[(1,)](torch.cat([ends, ends[:2]]), noise, TILE=8)
    v = (ends.double() + 0.5) * gumbel.UNIT
    v[5] = 1 - 2**-24  # where the sum has rounded up to 2^31
    expected = torch.log(-torch.log1p(-v))
    torch.testing.assert_close(noise[:6].double(), expected, atol=2e-5, rtol=1e-5)
    assert torch.isfinite(noise).all()


@triton.jit
def noise_kernel(bits, noise, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    tl.store(noise + at, gumbel_triton.log_exponential(tl.load(bits + at)))


def scores_of(logits, temperature, seeds, positions) -> torch.Tensor:
    noise = gumbel.log_exponential(
        gumbel.hash_bits(gumbel._token_words(logits.shape[1], logits.device), *gumbel.row_keys(seeds, positions))
    )
    warm = (temperature > 0).unsqueeze(1)
    return torch.where(warm, logits.float() / temperature.clamp(min=1e-6).unsqueeze(1) - noise, logits.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(40, 1), (9, 100), (8, 8193), (3, 151936)])
def test_gumbel_sample(device, rows, vocab, dtype) -> None:
    logits = (4 * torch.randn(rows, vocab + 3)).to(device, dtype)[:, :vocab]
    logits[1, vocab // 3 :] = -INF if vocab > 10 else 0
    temperature = torch.linspace(0, 1.7, rows).to(device)
    seeds = torch.randint(-(2**62), 2**62, (rows,)).to(device)
    positions = torch.arange(rows, device=device) * 1000
    drawn = gumbel_sample_triton(logits, temperature, seeds, positions)
    scores = scores_of(logits, temperature, seeds, positions)
    assert drawn[0] == logits[0].argmax()
    # A twin's logarithm may differ in its last bit: then both tokens are within a hair of the best.
    for token in (drawn, gumbel_sample_reference(logits, temperature, seeds, positions)):
        lost = scores.amax(dim=1) - scores.gather(1, token.unsqueeze(1)).squeeze(1)
        assert lost.max() < 1e-4
    alone = gumbel_sample_triton(logits[2:3], temperature[2:3], seeds[2:3], positions[2:3])
    assert alone == drawn[2]


@pytest.mark.parametrize("vocab", [1, 300, 8193, 49152])
@pytest.mark.parametrize("heat", [0.0, 0.9])
def test_a_broken_row_gives_a_token_that_is_broken(device, vocab, heat) -> None:
    """Of the vocabulary, so that whoever looks up its logit finds it, and finds that it is not finite."""
    logits = torch.randn(6, vocab).to(device)
    logits[0], logits[1], logits[2, vocab // 2], logits[3, -1] = float("nan"), INF, float("nan"), INF
    logits[4, : vocab // 2], logits[4, vocab // 2 :] = -INF, float("nan")
    temperature = torch.full((6,), heat, device=device)
    seeds, positions = torch.arange(6, device=device), torch.arange(6, device=device)
    for sample in (gumbel_sample_triton, gumbel_sample_reference):
        drawn = sample(logits, temperature, seeds, positions).cpu()
        assert ((drawn >= 0) & (drawn < vocab)).all(), (sample, drawn)
        found = logits.cpu().gather(1, drawn[:, None])[:, 0]
        assert found.isfinite().tolist() == [False] * 5 + [True], (sample, drawn)


def test_greedy_takes_the_lowest_of_equals_across_tiles(device) -> None:
    logits = torch.zeros(4, 3 * tiles.SAMPLE_TILE + 5, device=device)
    logits[1, [tiles.SAMPLE_TILE + 7, 2 * tiles.SAMPLE_TILE + 1]] = 1
    logits[2] = -INF
    logits[3, -1] = 2
    zero, key = torch.zeros(4, device=device), torch.arange(4, device=device)
    out = torch.empty(4, dtype=torch.int64, device=device)
    assert gumbel_sample_triton(logits, zero, key, key, out) is out
    assert out.tolist() == [0, tiles.SAMPLE_TILE + 7, 0, logits.shape[1] - 1]
    assert gumbel_sample_reference(logits, zero, key, key).tolist() == out.tolist()


def keys(device, rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    def column(value, dtype):
        value = value if isinstance(value, list) else [value] * rows
        return torch.tensor(value, dtype=dtype, device=device)

    return (
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
    )


def compare_filters(logits, settings, slack=0) -> torch.Tensor:
    """Both sides keep the same tokens, up to `slack` of them, and leave what they keep as it was."""
    expected, actual = logits.clone(), logits.clone()
    top_k_top_p_min_p_reference(expected, *settings)
    top_k_top_p_min_p_triton(actual, *settings)
    kept = actual > -INF
    assert torch.equal(actual[kept], logits[kept])
    differing = (kept != (expected > -INF)).sum(dim=1)
    assert differing.max() <= slack, differing
    return kept


@pytest.mark.parametrize(("vocab", "slack"), [(100, 0), (8193, 1), (151936, 3)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_of_all_kinds(device, vocab, slack, spread) -> None:
    """In rows of near-equal probabilities the last tokens of a top-p prefix hang on the rounding of the sum."""
    rows = 6
    logits = spread * torch.randn(rows, vocab, device=device)
    settings = keys(
        device, rows, [1.0, 0.6, 1.4, 1.0, 1.0, 0.0], [0, 50, vocab - 1, 0, 40, 5], [0.9, 1.0, 0.999, 0.5, 0.8, 0.5],
        [0.0, 0.0, 0.0, 0.05, 0.01, 0.5],
    )  # fmt: skip
    kept = compare_filters(logits, settings, slack)
    assert kept[1].sum() == 50
    assert kept[5].all()


def test_equal_logits(device) -> None:
    """Top-k keeps all that equal the k-th; top-p keeps the lowest ids of those it has no room for."""
    logits = (2 * torch.randn(5, 5000, device=device)).round() / 2
    logits[0] = 1.0
    logits[1] = -0.0
    logits[1, ::2] = 0.0
    settings = keys(device, 5, 1.0, [7, 0, 100, 0, 300], [1.0, 0.25, 1.0, 0.7, 0.5])
    kept = compare_filters(logits, settings)
    assert kept[0].all()
    assert kept[1].nonzero().flatten().tolist() == list(range(1250))


def test_ends_of_the_settings(device) -> None:
    logits = torch.randn(8, 3000, device=device)
    settings = keys(device, 8, 1.0, [1, 0, 0, 3000, 9999, 0, 2999, 0], [1, 0.0, 1e-6, 1, 1, 1, 1, 0.9999999],
                    [0, 0, 0, 0, 0, 1.0, 0, 0])  # fmt: skip
    kept = compare_filters(logits, settings, slack=1)
    assert kept.sum(dim=1)[:7].tolist() == [1, 1, 1, 3000, 3000, 1, 2999]


def test_excluded_tokens_stay_excluded(device) -> None:
    logits = torch.randn(5, 3000, device=device)
    logits[:, 100:] = -INF
    logits[3] = -INF
    logits[4, 1:] = -INF
    settings = keys(device, 5, 1.0, [0, 2000, 50, 5, 5], [0.9, 0.9, 1.0, 0.5, 0.5], 0.001)
    kept = compare_filters(logits, settings)
    assert not kept[:, 100:].any()
    assert not kept[3].any()
    assert kept[4].sum() == 1


def test_logits_of_every_size(device) -> None:
    """Thresholds among values from 1e-38 to 1e38, where only the search over integers ends in time."""
    logits = 10.0 ** torch.linspace(-37, 37, 400, device=device).repeat(2, 1)
    logits[1] *= -1
    compare_filters(logits, keys(device, 2, 1.0, [200, 250]))
    compare_filters(logits, keys(device, 2, [1e30, 1e-3], 0, 0.7))


def test_a_row_does_not_see_its_neighbours(device) -> None:
    logits = torch.randn(4, 9000, device=device)
    settings = keys(device, 4, [1.0, 0.5, 2.0, 1.0], [0, 20, 500, 0], [0.9, 0.95, 0.8, 0.99], [0, 0, 0, 0.01])
    together = logits.clone()
    top_k_top_p_min_p_triton(together, *settings)
    for row in range(4):
        alone = logits[row : row + 1].clone()
        top_k_top_p_min_p_triton(alone, *(setting[row : row + 1] for setting in settings))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [100, 8193])
def test_draw_tokens(device, vocab, dtype) -> None:
    """By rows of a table: the tokens of `gumbel_sample`, noted in their places and nowhere else."""
    size, table_rows = 9, 12
    logits = (4 * torch.randn(size, vocab + 3)).to(device, dtype)[:, :vocab]
    logits[4, 7], logits[5], logits[6, 1] = float("nan"), -INF, INF
    logits[7, vocab // 2 :] = -INF
    rows = torch.tensor([3, 0, 11, -1, 5, 6, 7, 9, -1], dtype=torch.int32, device=device)
    positions = torch.tensor([4, 0, 19, 2, 3, 7, 9, 10, 50], dtype=torch.int32, device=device)
    floats = torch.rand(table_rows, 6, device=device)
    floats[0, 2] = 0
    seeds = torch.randint(-(2**62), 2**62, (table_rows,)).to(device)
    notes = torch.full((table_rows, 20), 77777, dtype=torch.int32, device=device)
    found = draw_tokens_triton(logits, rows, positions, floats[:, 2], seeds, notes)
    others = notes.clone().fill_(77777)
    expected = draw_tokens_reference(logits, rows, positions, floats[:, 2], seeds, others)
    scores = scores_of(logits, floats[rows.clamp_min(0).long(), 2], seeds[rows.clamp_min(0).long()], positions.long())
    for i in range(size):
        if i in (3, 4, 5, 6, 8):
            assert found[i] == expected[i] == -1
        else:
            assert scores[i].max() - scores[i, found[i]] < 1e-4
            assert scores[i].max() - scores[i, expected[i]] < 1e-4
    for drawn, noted in ((found, notes), (expected, others)):
        wanted = torch.full_like(noted, 77777)
        for row, position, token in zip(rows.tolist(), positions.tolist(), drawn.tolist(), strict=True):
            if row >= 0:
                wanted[row, position] = max(token, 0)
        assert torch.equal(noted, wanted)


@pytest.mark.parametrize("vocab", [1, 31, 32, 100, 8193, 49152])
def test_a_mask_forbids_what_it_does_not_allow(device, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator).to(device)
    words = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32)), generator=generator).to(torch.int32).to(device)
    words[2] = 0  # nothing is allowed
    rows = torch.tensor([4, 0, 2], device=device)
    expected, found = logits.clone(), logits.clone()
    forbid_tokens_reference(expected, rows, words)
    forbid_tokens_triton(found, rows, words)
    assert torch.equal(found, expected)
    assert torch.equal(found[[1, 3]], logits[[1, 3]])
    bits = (words[0].cpu()[:, None] >> torch.arange(32) & 1).flatten()[:vocab].bool()
    assert torch.equal(found[4].cpu().isfinite(), bits)
    assert not found[2].isfinite().any()
