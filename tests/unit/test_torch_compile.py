"""torch.compile of a step that holds an xloss loss.

Contract: a compiled training step gives the loss and gradients of the plain one to the last bit; the head itself stays
outside the graph. ``backend="eager"``: what is tested is the capture, not a code generator.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from xloss import CELossConfig, CELossContext, CELossContextInputItem, linear_logprobs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler's own


def test_compiled_step_is_the_plain_step() -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(8, 8), nn.Linear(8, 31)
    inputs, labels = torch.randn(1, 9, 8), torch.randint(0, 31, (1, 9))
    labels[0, 2] = -100
    config = CELossConfig()
    kwargs = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], config)
    context = CELossContext(config, kwargs[0])

    def trio(x: Tensor) -> Tensor:
        return context.forward(body(x), head.weight, head.bias)[0] * 2

    def primitive(x: Tensor) -> Tensor:
        stats = linear_logprobs(body(x), head.weight, labels, head.bias, return_entropy=True)
        assert stats.entropy is not None
        return (stats.logprobs * 2 + stats.entropy).sum()

    parameters = [*body.parameters(), *head.parameters()]

    def run(step: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = step(inputs)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    for step in (trio, primitive):
        for ours, plain in zip(run(torch.compile(step, backend="eager")), run(step), strict=True):
            assert torch.equal(ours, plain), step.__name__
