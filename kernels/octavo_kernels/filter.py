"""Top-k, top-p and min-p as one in-place filter on logits. Called by the sampler in steps where a request asks for one.

Both sides reduce the three filters to two numbers a row, a threshold and how many tokens equal to it stay, and then
apply those. Neither moves the logits.
"""

from __future__ import annotations

import torch

from octavo_kernels import _checks as check
from octavo_kernels._dispatch import use_triton
from octavo_kernels.cpu.compiler import available

# Candidates looked at before a full sort: real distributions nearly always reach their top-p mass within these.
CANDIDATES = 1024


def top_k_top_p_min_p(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """Set the logits of excluded tokens to -inf, in place.

    With `s = logits / temperature` the filters apply in this order, each to what the one before left:

    1. min-p keeps tokens of at least `min_p` times the probability of the best: `s >= max(s) + log(min_p)`;
    2. top-k keeps the tokens not below the k-th best, all of them when several are equal to it;
    3. top-p keeps the shortest prefix, by falling probability and then rising token id, whose share of the remaining
       probability reaches `top_p`; at least one token.

    Rows of temperature 0 are left alone, since the best token passes every filter. So are rows without a finite logit.

    Args:
        logits: `[B, V]` fp32; -inf marks tokens which are excluded already.
        temperature: `[B]` fp32.
        top_k: `[B]` int32; 0 is off, and so is any number from `V` on.
        top_p: `[B]` fp32; 1 is off.
        min_p: `[B]` fp32; 0 is off.

    Raises:
        ValueError: a shape, a dtype or a stride is wrong.

    Source: Fan et al. (2018) for top-k; Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020) for
    top-p; Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024).
    """
    batch = logits.shape[0]
    check.shape("logits", logits, (-1, -1))
    check.dtype("logits", logits, torch.float32)
    check.unit_stride("logits", logits)
    check.vector("temperature", temperature, batch, torch.float32)
    check.vector("top_k", top_k, batch, torch.int32)
    check.vector("top_p", top_p, batch, torch.float32)
    check.vector("min_p", min_p, batch, torch.float32)
    if use_triton(logits):
        from octavo_kernels.filter_triton import top_k_top_p_min_p_triton

        top_k_top_p_min_p_triton(logits, temperature, top_k, top_p, min_p)
    elif logits.device.type == "cpu" and available():
        from octavo_kernels.cpu.filtering import filter_cpu

        filter_cpu(logits, temperature, top_k, top_p, min_p)
    else:
        top_k_top_p_min_p_reference(logits, temperature, top_k, top_p, min_p)


def top_k_top_p_min_p_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """The twin of `top_k_top_p_min_p`; same arguments, same result."""
    vocab = logits.shape[1]
    count = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()
    active = (temperature > 0) & ((count < vocab) | (top_p < 1) | (min_p > 0))
    rows = active.nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    everything = rows.numel() == logits.shape[0]
    part = logits if everything else logits[rows]
    done = _filter(part, temperature[rows], count[rows], top_p[rows], min_p[rows], min(CANDIDATES, vocab))
    left = (~done).nonzero().squeeze(1)
    if left.numel():
        again = part[left]
        chosen = rows[left]
        _filter(again, temperature[chosen], count[chosen], top_p[chosen], min_p[chosen], vocab)
        part[left] = again
    if not everything:
        logits[rows] = part


def _filter(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Filter rows in place by their `width` best tokens. Returns which rows were; the others need a larger width.

    Here `top_k` is `V` where it is off, and every temperature is above 0.
    """
    rows, vocab = logits.shape
    most = int(top_k.amax())
    if most < width:
        width = most + 1  # one more than any row can keep, to see whether the k-th has an equal
    full = width == vocab
    best = logits.sort(dim=-1, descending=True).values if full else logits.topk(width, dim=-1).values
    top = best[:, :1]
    threshold = top + (temperature * min_p.log()).unsqueeze(1)  # log(0) = -inf keeps everything
    kth = best.gather(1, (top_k.clamp(max=width) - 1).unsqueeze(1))
    threshold = torch.where((top_k < vocab) & (top_k <= width), torch.maximum(threshold, kth).T, threshold.T).T
    # Whether all survivors so far are among the candidates, and whether the threshold needs no further ones.
    covered = (best[:, -1:] < threshold).squeeze(1) | full
    done = covered | (top_k <= width) | (top_k == vocab)
    ties = torch.full((rows,), vocab, device=logits.device)  # how many of the tokens equal to the threshold stay

    cut = top_p < 1
    if bool(cut.any()):
        rate = 1 / temperature.unsqueeze(1)
        mass = ((best - top) * rate).exp_().masked_fill_(best < threshold, 0).double().cumsum_(dim=-1)
        total = mass[:, -1].clone()
        beyond = (cut & done & ~covered).nonzero().squeeze(1)
        if beyond.numel():  # tokens past the candidates count in the total, but only as a sum
            rest = logits[beyond]
            weight = ((rest - top[beyond]) * rate[beyond]).exp_().masked_fill_(rest < threshold[beyond], 0)
            total[beyond] = torch.maximum(weight.sum(dim=-1, dtype=torch.float64), total[beyond])
        needed = top_p.double() * total
        length = (mass < needed.unsqueeze(1)).sum(dim=-1) + 1  # the shortest prefix which reaches the mass
        done &= covered | ~cut | (length <= width)
        last = best.gather(1, length.clamp(max=width).unsqueeze(1) - 1)
        cut &= (last >= threshold).squeeze(1)
        ties = torch.where(cut, length - (best > last).sum(dim=-1), ties)
        threshold = torch.where(cut.unsqueeze(1), last, threshold)

    done |= ~torch.isfinite(top.squeeze(1))
    writable = done & torch.isfinite(top.squeeze(1))
    drop = (logits < threshold) & writable.unsqueeze(1)
    if bool((ties < vocab).any()):
        equal = logits == threshold
        for row in ((equal.sum(dim=-1) > ties) & writable).nonzero().squeeze(1).tolist():
            drop[row, equal[row].nonzero().squeeze(1)[int(ties[row]) :]] = True
    logits.masked_fill_(drop, -torch.inf)
    return done
