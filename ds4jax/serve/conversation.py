"""What all chat interfaces ask for: a conversation, checked, as requests of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.decode.sampling import Sampling
from ds4jax.serve.errors import bad
from ds4jax.serve.runner import Runner
from ds4jax.text import efforts
from ds4jax.text.encoder import chat_prompt

# Replies to one request.
MOST_REPLIES = 16
# A request that does not say has these, as OpenAI's and DeepSeek's interfaces do.
TEMPERATURE, TOP_P = 1.0, 1.0
_SEEDS = 2**64


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation that asks for a reply.

    Attributes:
        messages, tools, tool_choice, response_format, think, effort: as for `ds4jax.chat_prompt`.
        sampling: of the first reply; the seed of reply i is larger by i.
        max_new_tokens: maximum of new tokens; None for what the context holds.
        stop: texts that end the answer.
        logprobs: number of most likely tokens with each token; None for no probabilities.
        count: number of replies.
        parallel: whether a reply may have several calls.
    """

    messages: Sequence[Mapping[str, Any]]
    sampling: Sampling
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    think: bool = True
    effort: str = efforts.DEFAULT
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    count: int = 1
    parallel: bool = True

    def ids(self, runner: Runner) -> list[int]:
        """Token ids of the prompt.

        Raises:
            InputError: a message or an option cannot be used.
        """
        prompt = chat_prompt(
            self.messages,
            tokenizer=runner.tokenizer,
            tools=self.tools,
            tool_choice=self.tool_choice,
            response_format=self.response_format,
            think=self.think,
            effort=self.effort,
            revision=runner.settings.revision,
        )
        return list(prompt.ids)

    @property
    def thinks(self) -> bool:
        """Whether the prompt ends in the beginning of a reasoning."""
        return self.think and self.effort != efforts.NO_REASONING


def samplings(first: Sampling, count: int) -> list[Sampling]:
    """How the tokens of each of several replies are chosen: seed after seed."""
    seed, half = int(first.seed or 0), _SEEDS // 2
    return [dataclasses.replace(first, seed=(seed + i + half) % _SEEDS - half) for i in range(count)]


def sampling_of(request: Any) -> Sampling:
    """How tokens are chosen, by the fields of a request. A seed that is not given is drawn.

    Raises:
        InputError: a value is outside its range.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    given = {name: value for name in names if (value := getattr(request, name, None)) is not None}
    return Sampling(**({"temperature": TEMPERATURE, "top_p": TOP_P, "seed": None} | given))


def count_of(n: int | None, field: str = "n") -> int:
    """The number of replies.

    Raises:
        ApiError: it is outside its range.
    """
    if n is not None and not 1 <= n <= MOST_REPLIES:
        raise bad(f"{field}: is {n}; it must be 1 to {MOST_REPLIES}", field)
    return n or 1


def stops_of(stop: str | Sequence[str] | None, field: str = "stop") -> tuple[str, ...]:
    """The stop texts.

    Raises:
        ApiError: one is empty.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise bad(f"{field}: a stop text is empty; give at least one character", field)
    return stops


def limit_of(field: str, value: int | None) -> int | None:
    """The maximum number of new tokens.

    Raises:
        ApiError: it is below 1.
    """
    if value is not None and value < 1:
        raise bad(f"{field}: is {value}; it must be at least 1", field)
    return value
