"""Layouts of a single process: chunks, packs, micro-batches."""

from __future__ import annotations

from xloss.cli.verify.layouts import Site, Variants, cut_pairs, layout, sequences_of, whole
from xloss.cli.verify.problem import Kind
from xloss.cli.verify.step import Setup


@layout(
    "chunks",
    "the head in chunks of a few, of some and of all tokens",
    hint="loss_fn is called once a chunk and the results are added: a mean inside it is a mean of that chunk. With "
    "token_local=True each token's loss must depend on that token alone.",
)
def chunks(site: Site) -> Variants:
    """The sum over chunks must not notice where they end."""
    count = len(site.batch.ids)
    few = count // max(1, min(count, 64))
    for size in sorted({max(1, few), site.chunk_size(7) | 1, count}):
        yield f"chunks of {size}", Setup(site.model(), whole(site), options={"chunk_size": size})


@layout(
    "packing",
    "the pack in another order, padded rows",
    hint="sums over a sequence must follow cu_seq_lens of a pack, or the rows of a padded batch.",
)
def packing(site: Site) -> Variants:
    """A sequence's loss must not notice what it is packed with."""
    pairs = list(range(site.batch.num_pairs))
    yield "another order", Setup(site.model(), (sequences_of(pairs[::-1]),))
    yield "padded rows", Setup(site.model(), whole(site), packed=False)


@layout(
    "micro-batches",
    "2 and 3 uneven micro-batches, one a prompt, padded ones",
    hint="weights must hold the denominator of the whole optimizer step: calibrate() sees all micro-batches of it, and "
    "ranks.sum(...).divisor() adds over them and over the ranks.",
)
def micro_batches(site: Site) -> Variants:
    """Gradient accumulation."""
    pairs = list(range(site.batch.num_pairs))
    for count in (2, 3):
        yield f"{count} micro-batches", Setup(site.model(), cut_pairs(pairs, count))
    yield "a micro-batch for each prompt", Setup(site.model(), tuple(sequences_of([pair]) for pair in pairs))
    yield "3 padded micro-batches", Setup(site.model(), cut_pairs(pairs, 3), packed=False)


@layout("frozen-head", "an lm_head that takes no gradient")
def frozen_head(site: Site) -> Variants:
    """The gradients of everything below it stay."""
    model = site.model()
    model.lm_head.requires_grad_(False)
    yield "", Setup(model, whole(site))


@layout("bias", "an lm_head with a bias", kind=Kind(bias=True))
def bias(site: Site) -> Variants:
    """Its gradient is a sum over all tokens."""
    yield "", Setup(site.model(Kind(bias=True)), whole(site), options={"chunk_size": site.chunk_size(5)})


@layout(
    "eager",
    "all logits and plain autograd, against the chunks of the default",
    hint="token_loss must be differentiable by the statistics it reads, and give the same on live tokens as on all.",
)
def eager(site: Site) -> Variants:
    """The engine's own gradient and autograd's, in the working dtype."""
    yield "", Setup(site.model(), whole(site), options={"mode": "eager"})
