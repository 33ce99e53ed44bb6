"""A second, constant distribution over the same vocabulary, met chunk by chunk: a teacher's, or a reference policy's.

It is given by its hidden states and head, or by its logits. Its chunk of logits stands beside the student's in a buffer
of the same size, and is the only copy made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xloss.distributed.vocab import VocabPart
from xloss.errors import DeviceError, DtypeError, OptionError, ShapeError, UnsupportedError
from xloss.head import gemm
from xloss.head.memory import block_rows
from xloss.head.transform import transform_
from xloss.policy.divergence import FLOOR, Divergence

Places = Tensor | slice
LogitsFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TeacherHead:
    """``softcap(logit_scale * (h W^T + b))`` from ``hidden [T, H2]``, ``weight [V, H2]``, ``bias [V]`` or ``None``.

    ``part``: which rows of a vocabulary that ranks share these are. Where they share the student's, they share the
    teacher's, by the same rows; a whole head is cut.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    part: VocabPart | None = None

    def fill(self, places: Places, out: Tensor) -> None:
        """Logits of the tokens at ``places`` into ``out [C, V]``."""
        weight = self.weight.detach()
        if weight.dtype not in gemm.LOW_PRECISION or out.dtype == torch.float64:
            weight = weight.to(out.dtype)
        gemm.project(self.hidden.detach()[places].to(weight.dtype), weight, out)
        transform_(out, None if self.bias is None else self.bias.detach(), 1.0, self.logit_scale, self.softcap)

    def of_part(self, part: VocabPart | None) -> TeacherHead:
        """The rows that belong to the student's ``part``. Raises ``UnsupportedError`` for rows of another split."""
        if self.part is not None and (part is None or self.part.bounds != part.bounds):
            raise UnsupportedError(
                f"the teacher's head is split (rows by rank: {self.part.bounds}) and the student's is "
                f"{'not' if part is None else f'split otherwise ({part.bounds})'}; split both alike"
            )
        if part is None or self.part is not None or self.weight.shape[0] != part.vocab_size:
            return self  # what is too short is refused by check
        rows = slice(part.start, part.stop)
        return replace(self, weight=self.weight[rows], bias=None if self.bias is None else self.bias[rows], part=part)

    def check(self, num_tokens: int, vocab_size: int, device: torch.device) -> None:
        """Raise unless everything fits the student's tokens, vocabulary and device."""
        shapes = {
            "teacher hidden states": (self.hidden, (num_tokens, self.weight.shape[-1])),
            "teacher head weight": (self.weight, (vocab_size, self.weight.shape[-1])),
            "teacher head bias": (self.bias, (vocab_size,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"the {name} must be {shape} (tokens flattened); got {tuple(tensor.shape)}")
            _check_kind(f"the {name}", tensor, device)
        if self.hidden.dtype != self.weight.dtype:
            raise DtypeError(
                f"the teacher hidden states are {self.hidden.dtype} but its head weight is {self.weight.dtype}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the product it takes to make one logit."""
        return self.weight.shape[1]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


@dataclass(frozen=True)
class TeacherLogits:
    """``logits [T, V]``, or a function that gives the rows ``[C, V]`` of flat token numbers ``[C]`` (int64).

    Where ranks share the vocabulary V is that of this rank's part; a whole tensor is cut.
    """

    logits: Tensor | LogitsFn
    hidden_size: int = field(default=0, init=False)

    def fill(self, places: Places, out: Tensor) -> None:
        """Logits of the tokens at ``places`` into ``out [C, V]``."""
        if isinstance(self.logits, Tensor):
            _copy_rows(self.logits.detach(), places, out)
        else:
            if isinstance(places, slice):
                places = torch.arange(places.start, places.stop, device=out.device)
            given = self.logits(places)
            if not isinstance(given, Tensor) or given.shape != out.shape:
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ShapeError(f"teacher_logits_fn must return {tuple(out.shape)} for these tokens; got {shape}")
            _check_kind("what teacher_logits_fn returns", given, out.device)
            out.copy_(given)
        out.clamp_(min=FLOOR)

    def of_part(self, part: VocabPart | None) -> TeacherLogits:
        """The columns of whole logits that belong to ``part``."""
        if part is None or not isinstance(self.logits, Tensor) or self.logits.shape[-1] != part.vocab_size:
            return self
        return TeacherLogits(self.logits[..., part.start : part.stop])

    def check(self, num_tokens: int, vocab_size: int, device: torch.device) -> None:
        """Raise unless a tensor fits the student's tokens, vocabulary and device."""
        if isinstance(self.logits, Tensor):
            if tuple(self.logits.shape) != (num_tokens, vocab_size):
                raise ShapeError(
                    f"teacher_logits must be [T, V] = {(num_tokens, vocab_size)} (tokens flattened); "
                    f"got {tuple(self.logits.shape)}"
                )
            _check_kind("teacher_logits", self.logits, device)
        elif not callable(self.logits):
            raise DtypeError(f"teacher_logits_fn must be callable; got {type(self.logits).__name__}")

    def tensors(self) -> list[Tensor]:
        return [self.logits] if isinstance(self.logits, Tensor) else []


@dataclass(frozen=True)
class Teacher:
    """Where the second distribution comes from, and which divergence of the student from it is wanted.

    Args:
        source: its head or its logits.
        divergence: what ``TokenStats.divergence`` holds.
        temperature: divides its logits; a number or ``[T]``.
        student_temperature: divides the student's logits ``z`` once more, inside the divergence alone.
    """

    source: TeacherHead | TeacherLogits
    divergence: Divergence
    temperature: float | Tensor = 1.0
    student_temperature: float | Tensor = 1.0

    def rows(self, places: Places, out: Tensor) -> TeacherRows:
        """What row work needs of the tokens at ``places``, their logits written into ``out [C, V]``."""
        with torch.no_grad():
            self.source.fill(places, out)
            transform_(out, None, _at(self.temperature, places), 1.0, None)
        return TeacherRows(out, self.divergence, _at(self.student_temperature, places))

    def of_part(self, part: VocabPart | None) -> Teacher:
        """The teacher of that part of the vocabulary (``None``: of all of it)."""
        return replace(self, source=self.source.of_part(part))

    def check(self, num_tokens: int, vocab_size: int, device: torch.device) -> None:
        """Raise ``ShapeError``, ``DtypeError``, ``DeviceError`` or ``OptionError`` unless it fits the student."""
        self.source.check(num_tokens, vocab_size, device)
        for t in (self.temperature, self.student_temperature):
            if isinstance(t, Tensor) and t.shape != (num_tokens,):
                raise OptionError(f"the teacher's temperature must be a number or [{num_tokens}]; got {tuple(t.shape)}")


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's part of a chunk: logits ``[C, V]`` at temperature, divergence, what divides the student's again."""

    logits: Tensor
    divergence: Divergence
    student_temperature: float | Tensor

    def select(self, index: Tensor, logits: Tensor) -> TeacherRows:
        """Rows ``index`` of everything but the logits, which are given."""
        t = self.student_temperature
        return TeacherRows(logits, self.divergence, t.index_select(0, index) if isinstance(t, Tensor) else t)

    def student_column(self, span: slice) -> float | Tensor:
        """What divides the student's logits of rows ``span`` again, ready to meet ``[C, V]``."""
        t = self.student_temperature
        return t[span].unsqueeze(1) if isinstance(t, Tensor) else t


def _copy_rows(logits: Tensor, places: Places, out: Tensor) -> None:
    """``logits[places]`` into ``out``, a block at a time: picking rows makes a copy."""
    if isinstance(places, slice):
        out.copy_(logits[places])
        return
    step = block_rows(logits.shape[1] * logits.element_size(), logits.device.type)
    for start in range(0, places.numel(), step):
        out[start : start + step] = logits[places[start : start + step]]


def _at(temperature: float | Tensor, places: Places) -> float | Tensor:
    return temperature[places] if isinstance(temperature, Tensor) else temperature


def _check_kind(name: str, tensor: Tensor, device: torch.device) -> None:
    if not tensor.dtype.is_floating_point:
        raise DtypeError(f"{name} must be floating point; got {tensor.dtype}")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, the student on {device}")
