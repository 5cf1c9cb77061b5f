"""Sampling on the CPU, by what the processor has (on some, kernels of its own) and by the twins: quality of the noise,
the law of the draws, and the filters against a plain restatement."""

import pytest
import torch
from octavo_kernels import (
    gumbel,
    gumbel_sample,
    gumbel_sample_reference,
    top_k_top_p_min_p,
    top_k_top_p_min_p_reference,
)
from scipy import stats

INF = float("inf")


@pytest.fixture(params=[gumbel_sample, gumbel_sample_reference])
def draw(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(params=[top_k_top_p_min_p, top_k_top_p_min_p_reference])
def apply_filters(request: pytest.FixtureRequest):
    return request.param


def bits_of(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    return gumbel.hash_bits(gumbel._token_words(vocab, seeds.device), *gumbel.row_keys(seeds, positions))


def plain_hash(seed: int, position: int, token: int) -> int:
    """The recipe of the module's docstring in Python's integers."""
    full = 0xFFFFFFFF

    def mix(word: int) -> int:
        word = ((word ^ word >> 16) * gumbel.M1) & full
        word = ((word ^ word >> 13) * gumbel.M2) & full
        return word ^ word >> 16

    low, high, position = seed & full, seed >> 32 & full, position & full
    k0 = mix((mix((mix(low ^ gumbel.A) + high) & full) + position) & full)
    k1 = mix((mix((mix(high ^ gumbel.B) + low) & full)) ^ (position * gumbel.C & full))
    h = (token * gumbel.A & full) ^ k0
    h ^= h >> 16
    h = (h * gumbel.M1 + k1) & full
    h ^= h >> 13
    h = h * gumbel.M2 & full
    return (h ^ (h >> 16 | (0xFFFF0000 if h >> 31 else 0))) & 0x7FFFFFFF


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_hash_is_the_documented_one(seed) -> None:
    for position in (0, 77, 2**31, 2**33 + 5):
        bits = bits_of(torch.tensor([seed]), torch.tensor([position]), 200000)[0]
        for token in (0, 1, 151935, 199999):
            assert int(bits[token]) == plain_hash(seed, position, token)


# Keys as they come in practice: small neighbouring seeds, positions and tokens, one of them moving at a time.
STREAMS = {
    "tokens": lambda: bits_of(torch.tensor([42]), torch.tensor([17]), 1 << 18).flatten(),
    "positions": lambda: bits_of(torch.full((1 << 18,), 42), torch.arange(1 << 18), 1).flatten(),
    "seeds": lambda: bits_of(torch.arange(1 << 18), torch.full((1 << 18,), 17), 1).flatten(),
    "high seeds": lambda: bits_of(torch.arange(1 << 18) << 32, torch.zeros(1 << 18, dtype=torch.int64), 1).flatten(),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_bits_are_uniform_and_serially_independent(stream) -> None:
    """Each byte of the 31 bits over 256 cells, and pairs of neighbours over 64 x 64; p above 1e-6 in a fixed sample."""
    bits = STREAMS[stream]().long()
    for shift in (0, 8, 16, 23):
        cells = torch.bincount(bits >> shift & 255, minlength=256)
        assert stats.chisquare(cells.numpy()).pvalue > 1e-6, shift
    for shift in (0, 25):
        part = bits >> shift & 63
        for lag in (1, 2):
            cells = torch.bincount(part[:-lag] * 64 + part[lag:], minlength=4096)
            assert stats.chisquare(cells.numpy()).pvalue > 1e-6, (shift, lag)


def test_one_bit_of_the_key_turns_half_of_the_bits() -> None:
    seeds, positions = torch.arange(4096) * 7919, torch.arange(4096)
    base = bits_of(seeds, positions, 1).flatten()
    for bit in (0, 1, 15, 31, 32, 47, 63):
        flip = torch.tensor(1) << bit
        changed = base ^ bits_of(seeds ^ flip, positions, 1).flatten()
        ones = sum(int((changed >> i & 1).sum()) for i in range(31)) / (31 * 4096)
        assert abs(ones - 0.5) < 0.01, bit
    for bit in (0, 5, 20):
        changed = base ^ bits_of(seeds, positions ^ (1 << bit), 1).flatten()
        ones = sum(int((changed >> i & 1).sum()) for i in range(31)) / (31 * 4096)
        assert abs(ones - 0.5) < 0.01, bit


def test_no_row_is_a_shifted_window_of_another() -> None:
    rows = bits_of(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096)
    assert rows.flatten().unique().numel() > 64 * 4096 - 64  # chance alone repeats about 16 of them


def test_noise_is_a_gumbel_variable() -> None:
    noise = -gumbel.log_exponential(bits_of(torch.tensor([5]), torch.tensor([9]), 1 << 18)).flatten()
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-6
    ends = -gumbel.log_exponential(torch.tensor([0, 2**31 - 1], dtype=torch.int32))
    assert torch.isfinite(ends).all()
    assert ends[0] - ends[1] < gumbel.REACH


@pytest.mark.parametrize("over", ["positions", "seeds"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(over, temperature, draw) -> None:
    draws, vocab = 40000, 24
    logits = torch.linspace(-3, 2, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(1))]
    moving, fixed = torch.arange(draws), torch.full((draws,), 123)
    seeds, positions = (fixed, moving) if over == "positions" else (moving, fixed)
    tokens = draw(logits.expand(draws, -1), torch.full((draws,), temperature), seeds, positions)
    expected = (logits.double() / temperature).softmax(0) * draws
    counts = torch.bincount(tokens, minlength=vocab).double()
    kept = expected > 5
    seen = [*counts[kept].tolist(), float(counts[~kept].sum()) + 1e-9]
    wanted = [*expected[kept].tolist(), float(expected[~kept].sum()) + 1e-9]
    assert stats.chisquare(seen, wanted).pvalue > 1e-6
    # Draws at neighbouring keys are independent: their joint law is the product of the two.
    top = (tokens == int(logits.argmax())).long()
    table = torch.bincount(top[:-1] * 2 + top[1:], minlength=4).view(2, 2)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-6


def test_skipping_hopeless_tokens_changes_no_draw(draw) -> None:
    """Rows with a few live tokens take the gathered path; the draw is that of the full noise."""
    torch.manual_seed(0)
    logits = torch.randn(32, 5000) * 2
    logits[:, torch.randperm(5000)[:4500]] -= 60
    ones, seeds, positions = torch.ones(32), torch.arange(32) * 31, torch.arange(32)
    noise = gumbel.log_exponential(bits_of(seeds, positions, 5000))
    assert torch.equal(draw(logits, ones, seeds, positions), (logits - noise).argmax(dim=1))


def test_cold_rows_are_greedy_beside_warm_ones(draw) -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 300)
    logits[0, [40, 7]] = 9
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.7, 0.0, 1.0])
    seeds = torch.arange(6)
    out = torch.empty(6, dtype=torch.int64)
    tokens = draw(logits, temperature, seeds, seeds, out)
    assert tokens is out
    assert tokens[0] == 7
    assert torch.equal(tokens[[2, 4]], logits[[2, 4]].argmax(dim=1))
    for row in (1, 3, 5):
        part = slice(row, row + 1)
        assert draw(logits[part], temperature[part], seeds[part], seeds[part]) == tokens[row]


def plain_filter(logits, temperature, top_k, top_p, min_p):
    """The docstring of `top_k_top_p_min_p`, one row and one filter at a time, in fp64."""
    result = logits.clone()
    for b, row in enumerate(logits):
        if temperature[b] == 0 or row.max() == -INF:
            continue
        keep = row >= row.max() + temperature[b] * min_p[b].log()
        if 0 < top_k[b] < row.numel():
            keep &= row >= row.sort(descending=True).values[top_k[b] - 1]
        if top_p[b] < 1:
            mass = ((row - row.max()).double() / temperature[b]).exp() * keep
            order = row.sort(descending=True, stable=True).indices
            length = int((mass[order].cumsum(0) < top_p[b].double() * mass.sum()).sum()) + 1
            prefix = torch.zeros_like(keep)
            prefix[order[:length]] = True
            keep &= prefix
        result[b, ~keep] = -INF
    return result


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.4, 2.0, 6.0])
@pytest.mark.parametrize("vocab", [5, 100, 1024, 1025, 5000])
def test_filters_do_what_they_say(vocab, spread, ties, apply_filters) -> None:
    torch.manual_seed(vocab)
    logits = spread * torch.randn(24, vocab)
    if ties:
        logits = (logits * 2).round() / 2
    logits[1, 1:] = -INF
    logits[2] = -INF
    logits[3, ::2] = -INF
    temperature = torch.rand(24) + 0.3
    temperature[4] = 0
    top_k = torch.randint(0, 60, (24,), dtype=torch.int32)
    top_k[5:10] = torch.tensor([0, vocab, vocab + 7, max(1, vocab - 1), 1])
    top_k[10:14] = torch.tensor([0, 0, 1500, 2000])
    top_p = torch.rand(24)
    top_p[[0, 6, 12]] = 1.0
    top_p[[7, 11]] = 0.0
    top_p[10] = 0.999
    min_p = torch.rand(24) * 0.2 * (torch.rand(24) > 0.5)
    expected = plain_filter(logits, temperature, top_k, top_p, min_p)
    apply_filters(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(logits, expected)


def test_filter_keeps_a_token_of_every_row(apply_filters) -> None:
    logits = torch.zeros(3, 2000)
    apply_filters(
        logits, torch.ones(3), torch.tensor([0, 1, 0], dtype=torch.int32), torch.tensor([0.0, 1e-9, 1]), torch.ones(3)
    )
    assert (logits > -INF).sum(dim=1).tolist() == [1, 1, 2000]
    assert (logits[:2, 0] == 0).all()
