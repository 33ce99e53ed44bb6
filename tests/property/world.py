"""One small optimizer step with everything that any loss may ask for, and every way to lay it out and run it.

Ten sequences, two for each of five prompts (a chosen and a rejected answer); one answer has no token of the loss, nor
has any of the last prompt. A `Layout` says which sequences make which micro-batch, packed or padded; results come back
in the order of the world whatever the layout was. Padding, and with `poison` every ignored token, holds it in every
per-token field and in the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xloss import BaseLossConfig, BaseLossContextInputItem, LossInfo, MTPLossConfig, finalize_metrics

VOCAB, HIDDEN, OTHER_HIDDEN, K = 11, 4, 5, 3
LENGTHS = (4, 1, 5, 3, 3, 2, 4, 3, 2, 1)
IGNORED = (5, 8, 9)
TOKENS = sum(LENGTHS)
OF_HEAD = ("hidden", "values", "ref_hidden_states", "teacher_hidden_states", "teacher_logits")  # in the working dtype


@dataclass(frozen=True)
class Layout:
    batches: tuple[tuple[int, ...], ...] = (tuple(range(len(LENGTHS))),)
    packed: bool = True


WHOLE = Layout()
LAYOUTS = {
    "padded": Layout(((7, 2, 9, 0, 4, 8, 3, 6, 5, 1),), packed=False),
    "cut": Layout(((2, 0, 1, 3), (8, 9), (4, 7, 6, 5))),
    "cut-padded": Layout(((4, 5, 0, 1), (8, 9), (3, 2), (7, 6)), packed=False),
}


@dataclass(frozen=True)
class Case:
    """A loss, what its batch holds, and what its forward takes beside.

    `by_rank`: it ranks or draws the tokens of a micro-batch, so a cut makes it another loss; `by_place`: places count
    too, so any other layout does.
    """

    make: Callable[..., BaseLossConfig]
    item: type[BaseLossContextInputItem]
    fields: tuple[str, ...] = ()
    forward: tuple[str, ...] = ()
    by_rank: bool = False
    by_place: bool = False


@dataclass
class Result:
    """Of one step: the sum of the losses and its gradients, those of tokens in the order of the world."""

    loss: Tensor
    grads: dict[str, Tensor]
    losses: list[Tensor]
    infos: list[LossInfo]
    contexts: list[Any]
    metrics: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = finalize_metrics([info.metrics for info in self.infos])


class World:
    """Every tensor by its name: per token `[TOKENS, ..]`, per sequence, or of the whole batch."""

    def __init__(self, seed: int = 0, drift: float = 0.5, tempered: bool = True) -> None:
        g = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64)

        self.bounds = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
        labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
        labels[0], labels[6] = VOCAB - 1, 0
        ignored = torch.zeros(TOKENS, dtype=torch.bool)
        ignored[[2, 7, 10, 19]] = True  # inside sequences
        for i in IGNORED:
            ignored[self.bounds[i] : self.bounds[i + 1]] = True
        self.live = ~ignored
        hidden, other = randn(TOKENS, HIDDEN), randn(TOKENS, OTHER_HIDDEN)
        self.head = {"weight": randn(VOCAB, HIDDEN), "bias": randn(VOCAB)}
        self.other_head = {"weight": randn(VOCAB, OTHER_HIDDEN), "bias": randn(VOCAB)}
        temperature = torch.rand(TOKENS, generator=g, dtype=torch.float64) + 0.7
        logits = hidden @ self.head["weight"].T + self.head["bias"]
        scaled = logits / temperature[:, None] if tempered else logits
        now = torch.log_softmax(scaled, -1).gather(1, labels[:, None])[:, 0]
        others = other @ self.other_head["weight"].T + self.other_head["bias"]
        best, ids = torch.log_softmax(others, -1).topk(K)
        ids[3, 2:] = -100
        sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        of_answer = randn(len(LENGTHS))
        self.by_token: dict[str, Tensor] = {
            "hidden": hidden,
            "values": randn(TOKENS),
            "upstream": randn(TOKENS),
            "shifted_labels": labels.masked_fill(ignored, -100),
            "temperature": temperature,
            "advantages": of_answer[sequence] + 0.3 * randn(TOKENS),
            "old_logprobs": now + drift * randn(TOKENS),
            "ref_logprobs": now + 0.5 * randn(TOKENS),
            "rollout_logprobs": now + drift * randn(TOKENS),
            "is_weights": torch.rand(TOKENS, generator=g, dtype=torch.float64) + 0.5,
            "group_ids": sequence // 2,
            "rewards": of_answer[sequence].sign(),
            "returns": randn(TOKENS),
            "old_values": randn(TOKENS),
            "ref_hidden_states": other,
            "token_weight": torch.rand(TOKENS, generator=g, dtype=torch.float64) + 0.1,
            "target_tokens": torch.randint(0, VOCAB, (TOKENS, K), generator=g),
            "target_weights": randn(TOKENS, K),
            "teacher_hidden_states": other,
            "teacher_logits": others,
            "teacher_topk_ids": ids,
            "teacher_topk_logprobs": best,
        }
        self.by_token["target_tokens"][5, 1] = -100
        for name, places in {"advantages": (3, 12), "is_weights": (9, 13), "token_weight": (5, 21)}.items():
            self.by_token[name][list(places)] = 0
        self.by_token["target_weights"][14] = 0
        numbers = torch.arange(len(LENGTHS))
        self.by_sequence = {"pair_ids": numbers // 2, "preferred": numbers % 2 == 0}
        self.of_batch = {
            "kl": randn(3).abs(),
            "reward_shift": torch.tensor(0.2, dtype=torch.float64),
            "class_weight": torch.rand(VOCAB, generator=g, dtype=torch.float64) + 0.5,
        }

    def rounded(self, dtype: torch.dtype) -> World:
        """The same with what models give rounded to `dtype`."""
        out = copy.deepcopy(self)
        out.by_token |= {n: out.by_token[n].to(dtype).double() for n in OF_HEAD}
        for head in (out.head, out.other_head):
            head |= {n: x.to(dtype).double() for n, x in head.items()}
        return out

    def rows(self, batch: Sequence[int]) -> list[Tensor]:
        """Places in the world of the tokens of each sequence of a micro-batch."""
        return [torch.arange(self.bounds[i], self.bounds[i + 1]) for i in batch]

    def live_hidden(self, cfg: BaseLossConfig) -> Tensor:
        """Tokens whose hidden state (and temperature) the loss reads: for MTP, some tokens before the label's own."""
        depth = cfg.mtp_depth if isinstance(cfg, MTPLossConfig) else 0
        out = torch.zeros_like(self.live)
        for row in self.rows(range(len(LENGTHS))):
            out[row[: max(len(row) - depth, 0)]] = self.live[row[depth:]]
        return out

    def lay_out(
        self, name: str, batch: Sequence[int], packed: bool, dtype: torch.dtype, poison: float | None, live: Tensor
    ) -> Tensor:
        """A per-token tensor in the shape of a micro-batch, poisoned where it is not `live`."""
        x = self.by_token[name].clone()
        fill: float = -100
        if name not in OF_HEAD:
            dtype = torch.promote_types(dtype, torch.float32)
        if x.dtype.is_floating_point:
            x, fill = x.to(dtype), torch.nan if poison is None else poison
        if name == "group_ids":
            fill = -7
        elif name in ("target_tokens", "teacher_topk_ids"):
            fill = VOCAB + 9
        if poison is not None and name not in ("shifted_labels", "upstream"):
            x[~live] = fill if not x.dtype.is_floating_point else poison
        rows = [x[r] for r in self.rows(batch)]
        if packed:
            return torch.cat([x[:0], *rows]).unsqueeze(0)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    def to_world(self, grads: Sequence[Tensor], layout: Layout) -> Tensor:
        """Gradients of the micro-batches' per-token tensors, in the order of the world."""
        out = grads[0].new_zeros(TOKENS, *grads[0].shape[2:])
        for grad, batch in zip(grads, layout.batches, strict=True):
            for row, places in enumerate(rows := self.rows(batch)):
                start = sum(len(r) for r in rows[:row])
                out[places] = grad[0, start : start + len(places)] if layout.packed else grad[row, : len(places)]
        return out

    def item(
        self, case: Case, batch: Sequence[int], packed: bool, dtype: torch.dtype, poison: float | None, live: Tensor
    ) -> Any:
        """The input item of a micro-batch, with the fields that the case gives."""
        given: dict[str, Any] = {}
        for name in ("shifted_labels", *case.fields):
            if name in self.by_token:
                mask = live if name == "temperature" else self.live
                given[name] = self.lay_out(name, batch, packed, dtype, poison, mask)
            elif name in self.by_sequence:
                given[name] = self.by_sequence[name][list(batch)]
            else:
                given[name] = self.of_batch[name].to(torch.promote_types(dtype, torch.float32))
        return case.item(**given)

    def build(
        self,
        case: Case,
        layout: Layout = WHOLE,
        dtype: torch.dtype = torch.float64,
        poison: float | None = None,
        **run: Any,
    ) -> list[Any]:
        """Calibrated contexts of all micro-batches."""
        cfg = case.make(**run)
        live = self.live_hidden(cfg)
        items = [self.item(case, b, layout.packed, dtype, poison, live) for b in layout.batches]
        cu = [torch.tensor([0, *(LENGTHS[i] for i in b)]).cumsum(0) for b in layout.batches] if layout.packed else None
        return [cfg.loss_ctx_cls(cfg, k) for k in cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg, cu)]

    def inputs(
        self,
        case: Case,
        layout: Layout = WHOLE,
        dtype: torch.dtype = torch.float64,
        poison: float | None = None,
        bias: bool = True,
    ) -> tuple[list[list[Tensor]], list[dict[str, Tensor]], dict[str, list[Tensor]]]:
        """Positional and keyword arguments of each micro-batch's forward, and the leaves among them by name."""
        head = {n: x.to(dtype).requires_grad_() for n, x in self.head.items() if bias or n == "weight"}
        other = {f"{kind}_head_{n}": x.to(dtype) for n, x in self.other_head.items() for kind in ("ref", "teacher")}
        leaves: dict[str, list[Tensor]] = {n: [x] for n, x in head.items()}
        positional, keywords, live = [], [], self.live_hidden(case.make())
        for batch in layout.batches:
            hidden = self.lay_out("hidden", batch, layout.packed, dtype, poison, live).requires_grad_()
            leaves.setdefault("hidden", []).append(hidden)
            given = {n: other[n] for n in case.forward if n in other}
            if "values" in case.forward:
                given["values"] = self.lay_out(
                    "values", batch, layout.packed, dtype, poison, self.live
                ).requires_grad_()
                leaves.setdefault("values", []).append(given["values"])
            positional.append([hidden, *head.values()])
            keywords.append(given)
        return positional, keywords, leaves

    def run(
        self,
        case: Case,
        layout: Layout = WHOLE,
        dtype: torch.dtype = torch.float64,
        poison: float | None = None,
        bias: bool = True,
        **run: Any,
    ) -> Result:
        """Every micro-batch forward, then the gradients of 1.7 times the sum of the losses."""
        contexts = self.build(case, layout, dtype, poison, **run)
        positional, keywords, leaves = self.inputs(case, layout, dtype, poison, bias)
        losses, infos = [], []
        for ctx, args, more, batch in zip(contexts, positional, keywords, layout.batches, strict=True):
            loss, info = ctx.forward(*args, **more)
            if loss.ndim:  # log-probs, not a loss
                upstream = self.lay_out("upstream", batch, layout.packed, loss.dtype, None, self.live).nan_to_num(0.0)
                loss = (loss * upstream).sum()
            losses.append(loss)
            infos.append(info)
        total = torch.stack(losses).sum()
        flat = [x for xs in leaves.values() for x in xs]
        found = iter(torch.autograd.grad(1.7 * total, flat, allow_unused=True, materialize_grads=True))
        grads: dict[str, Tensor] = {}
        for name, xs in leaves.items():
            of_leaf = [next(found) for _ in xs]
            grads[name] = of_leaf[0] if name in ("weight", "bias") else self.to_world(of_leaf, layout)
        return Result(total.detach(), grads, [x.detach() for x in losses], infos, contexts)


WORLD = World()


def ask(case: Case, layout: Layout = WHOLE, world: World = WORLD, **run: Any) -> Result:
    """`World.run`, in chunks if no mode is given."""
    return world.run(case, layout, **({"mode": "chunk"} | run))
