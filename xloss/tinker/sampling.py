"""``SamplingClient``: samples and log-probs of a local model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from xloss.errors import OptionError, UnsupportedError
from xloss.head.linear_logprobs import linear_logprobs
from xloss.tinker.futures import Future, Ready
from xloss.tinker.model import LanguageModel
from xloss.tinker.types import Answers, SampledSequence, tokens_of

_NUMBERS = count()


class SamplingClient(Ready):
    """Samples from a ``LanguageModel``, with the log-probs that training starts from.

    Made for recipes to run on one machine: it keeps no cache of keys and values, so each token is a forward pass over
    its whole sequence. Made by ``TrainingClient.save_weights_and_get_sampling_client``.
    """

    def __init__(self, model: LanguageModel, answers: Answers) -> None:
        self.model = model
        self._answers = answers

    def sample(
        self, prompt: Any, num_samples: int, sampling_params: Any, include_prompt_logprobs: bool = False
    ) -> Future[Any]:
        """``num_samples`` continuations of ``prompt``.

        Args:
            prompt: a ``ModelInput`` or tokens.
            sampling_params: ``tinker.SamplingParams``, or any object with its ``max_tokens``, ``seed``, ``stop``,
                ``temperature``, ``top_k``, ``top_p``. ``stop``: strings or tokens, which stay at the end of the sample;
                ``None``: the model's end-of-sequence tokens; ``[]``: nothing. ``temperature=0`` takes the likeliest.
            include_prompt_logprobs: give ``prompt_logprobs`` too.

        Returns:
            ``Future`` of ``SampleResponse``. Log-probs are the model's own at temperature 1 without ``top_k`` and
            ``top_p``: those that ``forward_backward`` computes for the same weights.

        Raises:
            OptionError: a number is out of range. UnsupportedError: a stop string without a tokenizer.
        """
        if num_samples < 1:
            raise OptionError(f"num_samples must be at least 1; got {num_samples}")
        tokens = tokens_of(prompt).to(self.model.device)
        found = self._continued(tokens, num_samples, _Params.of(sampling_params, self.model))
        of_prompt = self._logprobs(tokens) if include_prompt_logprobs else None
        return Future(self._answers.samples(found, of_prompt))

    def compute_logprobs(self, prompt: Any) -> Future[list[float | None]]:
        """Log-prob of each token of ``prompt`` after those before it; ``None`` at the first."""
        return Future(self._logprobs(tokens_of(prompt).to(self.model.device)))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer. Raises ``OptionError`` where it has none."""
        return self.model.get_tokenizer()

    def get_base_model(self) -> str:
        """The model's name."""
        return self.model.name

    async def sample_async(self, *args: Any, **kwargs: Any) -> Any:
        """The result of ``sample``."""
        return await self.sample(*args, **kwargs)

    async def compute_logprobs_async(self, *args: Any, **kwargs: Any) -> list[float | None]:
        """The result of ``compute_logprobs``."""
        return await self.compute_logprobs(*args, **kwargs)

    @torch.no_grad()
    def _logprobs(self, tokens: Tensor) -> list[float | None]:
        if tokens.numel() == 1:
            return [None]
        hidden = self._hidden([tokens[:-1]])
        model = self.model
        found = linear_logprobs(
            hidden,
            model.head.weight,
            tokens[None, 1:],
            model.head.bias,
            softcap=model.softcap,
            logit_scale=model.logit_scale,
        ).logprobs
        return [None, *found[0].tolist()]

    def _hidden(self, sequences: list[Tensor]) -> Tensor:
        """Hidden states ``[1, T, H]`` of sequences packed."""
        device = sequences[0].device
        lengths = [len(s) for s in sequences]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])
        hidden: Tensor = self.model(torch.cat(sequences)[None], positions[None].to(device), bounds.to(device))
        return hidden

    @torch.no_grad()
    def _continued(self, prompt: Tensor, num_samples: int, params: _Params) -> list[SampledSequence]:
        training = self.model.training
        self.model.eval()
        try:
            generator = torch.Generator(prompt.device)
            generator.manual_seed(int(torch.randint(2**62, ())) if params.seed is None else params.seed)
            drafts = [_Draft(prompt) for _ in range(num_samples)]
            while running := [draft for draft in drafts if draft.stop_reason is None]:
                hidden = self._hidden([draft.tokens for draft in running])
                ends = torch.tensor([len(draft.tokens) for draft in running]).cumsum(0) - 1
                logits = self.model.logits(hidden[0, ends.to(prompt.device)])
                chosen = params.choose(logits, generator)
                logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
                for draft, token, logprob in zip(running, chosen, logprobs, strict=True):
                    draft.take(token, logprob, params)
            return [draft.sequence(len(prompt)) for draft in drafts]
        finally:
            self.model.train(training)


class _Draft:
    """A sample in the making."""

    def __init__(self, prompt: Tensor) -> None:
        self.tokens, self.start = prompt, len(prompt)
        self.logprobs: list[float] = []
        self.stop_reason: Any = None

    def take(self, token: Tensor, logprob: float, params: _Params) -> None:
        self.tokens = torch.cat([self.tokens, token[None]])
        self.logprobs.append(logprob)
        if params.stops(self.tokens[self.start :].tolist()):
            self.stop_reason = "stop"
        elif len(self.logprobs) >= params.max_tokens:
            self.stop_reason = "length"

    def sequence(self, start: int) -> SampledSequence:
        return SampledSequence(
            self.tokens[start:].tolist(), self.logprobs, self.stop_reason, f"sample-{next(_NUMBERS)}"
        )


class _Params:
    """``SamplingParams``, checked."""

    def __init__(
        self,
        max_tokens: int,
        seed: int | None,
        temperature: float,
        top_k: int,
        top_p: float,
        stop_tokens: frozenset[int],
        stop_strings: tuple[str, ...],
        tokenizer: Any,
    ) -> None:
        self.max_tokens, self.seed, self.temperature, self.top_k, self.top_p = (
            max_tokens,
            seed,
            temperature,
            top_k,
            top_p,
        )
        self.stop_tokens, self.stop_strings, self.tokenizer = stop_tokens, stop_strings, tokenizer

    @classmethod
    def of(cls, given: Any, model: LanguageModel) -> _Params:
        max_tokens = getattr(given, "max_tokens", None)
        temperature, top_p = float(getattr(given, "temperature", 1.0)), float(getattr(given, "top_p", 1.0))
        top_k = int(getattr(given, "top_k", -1))
        if max_tokens is None or max_tokens < 1:
            raise OptionError(f"sampling_params.max_tokens must be at least 1; got {max_tokens}")
        if temperature < 0 or not 0 < top_p <= 1 or (top_k < 1 and top_k != -1):
            raise OptionError(
                "sampling_params must have temperature >= 0, 0 < top_p <= 1, and top_k >= 1 or -1; got "
                f"temperature={temperature}, top_p={top_p}, top_k={top_k}"
            )
        stop: str | Sequence[str | int] | None = getattr(given, "stop", None)
        stop = [stop] if isinstance(stop, str) else model.eos_token_ids if stop is None else stop
        strings = tuple(s for s in stop if isinstance(s, str))
        if strings and model.tokenizer is None:
            raise UnsupportedError("stop strings need a tokenizer; give the model one, or stop tokens")
        tokens = frozenset(s for s in stop if not isinstance(s, str))
        return cls(
            max_tokens, getattr(given, "seed", None), temperature, top_k, top_p, tokens, strings, model.tokenizer
        )

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token of each row of ``[B, V]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k != -1 and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        if self.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0)
        place = torch.multinomial(probs, 1, generator=generator)
        return order.gather(1, place)[:, 0]

    def stops(self, tokens: list[int]) -> bool:
        """Whether a sample ends with its last token."""
        if tokens[-1] in self.stop_tokens:
            return True
        return bool(self.stop_strings) and any(s in self.tokenizer.decode(tokens) for s in self.stop_strings)
