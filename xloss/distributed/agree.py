"""Ranks that work together fail together: an error on one of them, or a difference, is raised on all and named.

A rank that raises, or that was told something else than the others, would leave them waiting in a collective until it
times out. So while ranks do something ``together`` they meet before each collective in one of fixed size, which says
whether a rank failed, what it is about to do, and what it was given. A small sum travels with it, and where nothing
else did they meet at the end: where all is well one exchange does. Where not, a second one brings the names, and every
rank raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from xloss.distributed.groups import (
    Ranks,
    all_gather_object,
    announced,
    default_device,
    groups_of,
    ranks_in,
    world_size,
)
from xloss.errors import MissingFieldError, OptionError, RankError

_ROOM = 48  # numbers that travel with a meeting
_BITS = 20  # of a word; the sum of its square over 8192 ranks is exact in float64
_END = "nothing more"


@dataclass(frozen=True)
class Terms:
    """What all ranks must have in common. ``None``: this rank has no data to tell it by.

    Args:
        options: name of each option, and its value.
        fields: names of the fields that this rank's data have.
    """

    options: dict[str, str] | None = None
    fields: frozenset[str] | None = None


@dataclass(frozen=True)
class _Report:
    error: str | None
    step: str
    terms: Terms


@contextmanager
def together(
    doing: str, terms: Callable[[], Terms], group: Ranks = None, *, may_fail_late: bool = False
) -> Iterator[Meeting]:
    """Everything inside, ``doing`` in a message, succeeds on all ranks of ``group`` or raises on all.

    The same collectives of ``xloss.distributed``, in the same order, are expected of every rank. It waits for the
    device. Where there is one rank nothing happens.

    Args:
        terms: of this rank.
        may_fail_late: meet at the end in any case: a rank may raise after the last collective, or the ranks have
            different numbers of them.

    Raises:
        Exception: what this rank raised, with a note of its rank.
        RankError: another rank raised, or ranks are about to do different things.
        OptionError, MissingFieldError: ``terms`` differ; all names that do, and who has what.
    """
    meeting = Meeting(doing, group)
    if world_size(group) == 1:
        yield meeting
        return
    token = announced.set(meeting)
    try:
        meeting.terms = terms()
        yield meeting
        if may_fail_late or not meeting.held:
            meeting.hold(_END)
    except Exception as error:
        meeting.fail(error)
        raise
    finally:
        announced.reset(token)


class Meeting:
    """The exchanges of one ``together``."""

    def __init__(self, doing: str, group: Ranks) -> None:
        self.doing, self.group = doing, group
        self.terms = Terms()
        self.held = False
        self._over = False  # all ranks know, or the group is broken: no further exchange

    def sum(self, value: Tensor, ranks: Ranks) -> Tensor | None:
        """The sum of ``value`` over the ranks, met and summed at once; ``None`` where it is too large or not theirs."""
        if value.numel() > _ROOM or not self._ours(ranks):
            return None
        found = self.hold(_step("all_reduce_sum", value), carried=value.detach())
        return found[: value.numel()].reshape(value.shape).to(value)

    @contextmanager
    def around(self, name: str, value: Tensor, ranks: Ranks) -> Iterator[None]:
        """Meet, then do a collective. One of some of the ranks only is their own, so it goes unannounced."""
        if not self._ours(ranks):
            yield
            return
        step = _step(name, value)
        self.hold(step)
        with self._unless_broken(step):
            yield

    def hold(self, step: str, error: Exception | None = None, carried: Tensor | None = None) -> Tensor:
        """Tell the others what comes next here; raise where it is not the same everywhere, or a rank failed.

        Returns the sum of what the ranks ``carried``, and zeros behind it.
        """
        options, fields = self.terms.options, self.terms.fields
        words = [
            None if error else digest(step),
            None if options is None else digest(sorted(options.items())),
            None if fields is None else digest(sorted(fields)),
        ]
        self.held = True
        with self._unless_broken(step):
            failed, differ, summed = _exchange(error is not None, words, carried, self.group)
        if failed or differ:
            self._over = True
            text = None if error is None else f"{type(error).__name__}: {error}"
            reports = all_gather_object(_Report(text, step, self.terms), self.group)
            if error is None:
                raise _verdict(self.doing, reports, self.group)
            if told := _differences(reports, self.group):
                error.add_note("; ".join(message for _, message in told))
        return summed

    def _ours(self, ranks: Ranks) -> bool:
        return ranks_in(ranks) == ranks_in(self.group)

    def fail(self, error: Exception) -> None:
        """Tell the others, unless they know."""
        if not self._over:
            self.hold("raise", error)
            error.add_note(f"raised on {_own_name()} while {self.doing}; the other ranks were told")

    @contextmanager
    def _unless_broken(self, step: str) -> Iterator[None]:
        """Names the rank in an error of the process group itself (a peer died, or the group's timeout is over)."""
        try:
            yield
        except Exception as error:
            self._over = True
            error.add_note(f"{_own_name()} waited for the others while {self.doing}; next here: {step}")
            raise


@contextmanager
def rank_named() -> Iterator[None]:
    """Adds the rank to an exception on its way out, where there are several."""
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            error.add_note(f"raised on {_own_name()}")
        raise


def digest(value: object) -> int:
    """48 bits of ``repr(value)``: exact in float64 and int64."""
    return int.from_bytes(sha256(repr(value).encode()).digest()[:6], "big")


def _step(name: str, value: Tensor) -> str:
    return f"{name} of {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _exchange(
    failed: bool, words: Sequence[int | None], carried: Tensor | None, group: Ranks
) -> tuple[bool, bool, Tensor]:
    """Whether a rank failed, whether two ranks' words differ, and the sum of what they carried: one all-reduce.

    A word goes as its two halves x with their squares: n ranks have the same one if and only if
    ``n sum(x^2) = sum(x)^2``.
    """
    row = torch.zeros(1 + 5 * len(words) + _ROOM, dtype=torch.float64, device=default_device(group))
    row[0] = failed
    for i, word in enumerate(words):
        if word is not None:
            low, high = word % 2**_BITS, word // 2**_BITS % 2**_BITS
            row[1 + 5 * i : 6 + 5 * i] = row.new_tensor([1, low, low**2, high, high**2])
    if carried is not None:
        row[-_ROOM:][: carried.numel()] = carried.reshape(-1).to(row)
    for each in groups_of(group):
        dist.all_reduce(row, op=dist.ReduceOp.SUM, group=each)
    failures, *told = map(int, row[:-_ROOM].tolist())
    differ = False
    for i in range(len(words)):
        count, low, low_squares, high, high_squares = told[5 * i : 5 * i + 5]
        differ |= count * low_squares != low**2 or count * high_squares != high**2
    return failures > 0, differ, row[-_ROOM:]


def _verdict(doing: str, reports: Sequence[_Report], group: Ranks) -> Exception:
    """What a rank raises that did not itself fail."""
    told = _differences(reports, group)
    failed = {rank: r.error for rank, r in enumerate(reports) if r.error is not None}
    if failed:
        texts = dict.fromkeys(failed.values())
        who = [(ranks_text([k for k, v in failed.items() if v == text], group), text) for text in texts]
        causes = "; ".join(f"{ranks} raised {text}" for ranks, text in who)
        return RankError("; ".join([f"while {doing}, {causes}", *(message for _, message in told)]))
    if told:
        kind = told[0][0]
        return kind(f"{doing} needs the same on every rank: " + "; ".join(message for _, message in told))
    steps = by_rank([r.step for r in reports], group)
    return RankError(f"while {doing}, ranks go on with different collectives, whatever their data: {steps}")


def _differences(
    reports: Sequence[_Report], group: Ranks
) -> list[tuple[type[OptionError] | type[MissingFieldError], str]]:
    """Each option and field that differs, as the error it makes and its message."""
    found: list[tuple[type[OptionError] | type[MissingFieldError], str]] = []
    numbered = list(enumerate(reports))
    options = {rank: r.terms.options for rank, r in numbered if r.terms.options is not None}
    for name in dict.fromkeys(n for given in options.values() for n in given):
        values = {rank: given.get(name, "not there") for rank, given in options.items()}
        if len(set(values.values())) > 1:
            found.append((OptionError, f"{name} is {by_rank(values, group)}"))
    fields = {rank: r.terms.fields for rank, r in numbered if r.terms.fields is not None}
    for name in sorted({n for given in fields.values() for n in given}):
        values = {rank: "given" if name in given else "None" for rank, given in fields.items()}
        if len(set(values.values())) > 1:
            found.append((MissingFieldError, f"{name} is {by_rank(values, group)}"))
    return found


def by_rank(values: dict[int, str] | Sequence[str], group: Ranks = None) -> str:
    """Values with the ranks of ``group`` that have them: ``'token' on rank 0 and 'sample' on ranks 1, 2``."""
    numbered = values if isinstance(values, dict) else dict(enumerate(values))
    holders = {v: [rank for rank, other in numbered.items() if other == v] for v in dict.fromkeys(numbered.values())}
    return " and ".join(f"{value} on {ranks_text(ranks, group)}" for value, ranks in holders.items())


def ranks_text(ranks: Sequence[int], group: Ranks = None) -> str:
    """Positions in ``group`` as ranks of the job: ``rank 0``, ``ranks 1, 2``, ``ranks 4 to 7, 9``."""
    numbers = sorted(ranks) if group is None else sorted(ranks_in(group)[rank] for rank in ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(told)}"


def _own_name() -> str:
    return f"rank {dist.get_rank()} of {dist.get_world_size()}"
