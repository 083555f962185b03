"""`POST /v1/completions`: texts or token ids that go on. With `echo` and `logprobs`, the prompt's tokens are scored."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from ds4jax.decode.sampling import Sampling
from ds4jax.serve import conversation, shapes
from ds4jax.serve.continuation import Continuation, TextEnded, TextPart, forcing
from ds4jax.serve.endpoint import Answer, Call, event
from ds4jax.serve.errors import bad, too_long, unsupported
from ds4jax.serve.merging import aside, merged, together
from ds4jax.serve.probabilities import text_logprobs
from ds4jax.serve.runner import Runner

_UNSUPPORTED = ("logit_bias", "frequency_penalty", "presence_penalty", "suffix")
# OpenAI's default.
_LIMIT = 16
_MOST_PROMPTS = 256


class Prompt(NamedTuple):
    """A prompt: token ids, and its text."""

    ids: list[int]
    text: str


async def completions(call: Call) -> Answer:
    """Continue texts.

    Raises:
        ApiError, InputError: they cannot be continued.
    """
    asked = shapes.read(call.body, shapes.Completion)
    sampling = _checked(asked)
    if call.runner.settings.log_prompts:
        call.record.prompts = asked.prompt
    prompts = await aside(len(call.body), _prompts, call.runner, asked.prompt)
    count = conversation.count_of(asked.n)
    samplings = conversation.samplings(sampling, count)
    texts = [_begin(call, asked, prompt, one) for prompt in prompts for one in samplings]
    answer = _Answer(call, asked, int(sampling.seed or 0), sum(len(prompt.ids) for prompt in prompts))
    return answer.stream(texts) if asked.stream else await answer.whole(texts)


def _checked(asked: shapes.Completion) -> Sampling:
    shapes.refuse(asked, _UNSUPPORTED)
    if asked.repetition_penalty not in (None, 1):
        raise unsupported("repetition_penalty")
    if asked.best_of not in (None, asked.n or 1):
        raise unsupported("best_of", "must equal n; all replies are returned")
    if asked.logprobs is not None and not 0 <= asked.logprobs <= 20:
        raise bad(f"logprobs: is {asked.logprobs}; it must be 0 to 20", "logprobs")
    if asked.max_tokens is not None and asked.max_tokens < (0 if asked.echo else 1):
        raise bad(f"max_tokens: is {asked.max_tokens}; it must be at least 1, or 0 with echo", "max_tokens")
    return conversation.sampling_of(asked)


def _prompts(runner: Runner, given: str | list[Any]) -> list[Prompt]:
    """The prompts of a request: a text, token ids, or a list of either."""
    if isinstance(given, str) or (given and all(type(one) is int for one in given)):
        given = [given]
    if not 0 < len(given) <= _MOST_PROMPTS:
        raise bad(f"prompt: holds {len(given)} prompts; give 1 to {_MOST_PROMPTS}", "prompt")
    return [_prompt(runner, one, f"prompt[{i}]") for i, one in enumerate(given)]


def _prompt(runner: Runner, given: Any, where: str) -> Prompt:
    model = runner.engine.model
    if isinstance(given, str):
        tokenizer = runner.tokenizer
        if not given:
            raise bad(f"{where}: is empty; give at least one character", "prompt")
        return Prompt([tokenizer.bos_id, *tokenizer.encode(given)], given)
    if not (isinstance(given, list) and given and all(type(one) is int for one in given)):
        raise bad(f"{where}: must be a text or a list of token ids that is not empty", "prompt")
    outside = [one for one in given if not 0 <= one < model.config.vocab_size]
    if outside:
        raise bad(f"{where}: token id {outside[0]} is outside the vocabulary of {model.config.vocab_size}", "prompt")
    return Prompt(given, model.spell(given))


def _begin(call: Call, asked: shapes.Completion, prompt: Prompt, sampling: Sampling) -> Continuation:
    """Submit one text."""
    engine = call.runner.engine
    limit = _LIMIT if asked.max_tokens is None else asked.max_tokens
    stop = conversation.stops_of(asked.stop)
    eos_id = None if asked.ignore_eos else engine.model.config.eos_id
    scored = asked.logprobs is not None
    forced = bool(asked.echo) and scored
    ids, options, total = prompt.ids, {"ignore_eos": bool(asked.ignore_eos)}, limit
    if forced:
        if len(ids) >= engine.context:
            raise too_long(len(ids), engine.context)
        options = {"ignore_eos": True, "constraint": forcing(ids, engine.model.config.vocab_size)}  # type: ignore[dict-item]
        limit = min(limit, engine.context - len(ids))
        total = limit + len(ids) - 1
    first = ids[:1] if forced else ids
    job = call.submit(first, max_new_tokens=total, sampling=sampling, logprobs=asked.logprobs, **options) if total else None
    echo = prompt.text if asked.echo else None
    return Continuation(
        job, ids, engine.model.tokenizer, echo=echo, scored=scored, limit=limit, stop=stop, eos_id=eos_id
    )  # fmt: skip


class _Answer:
    """How an answer is put together."""

    def __init__(self, call: Call, asked: shapes.Completion, seed: int, prompt_tokens: int):
        self._call, self._asked, self._prompt_tokens = call, asked, prompt_tokens
        self._model = call.runner.engine.model
        self._fields = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": call.runner.settings.served_name,
            "system_fingerprint": call.runner.fingerprint,
            "seed": seed,
        }

    async def whole(self, texts: list[Continuation]) -> dict[str, Any]:
        """The answer at once."""
        ended = await together([text.whole() for text in texts])
        self._note(ended)
        choices = [self._choice(index, TextPart(one.text, one.tokens), one) for index, one in enumerate(ended)]
        return {**self._fields, "choices": choices, "usage": self._usage(ended)}

    async def stream(self, texts: list[Continuation]) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        options = self._asked.stream_options
        with_usage = bool(options and options.include_usage)
        no_usage: dict[str, Any] = {"usage": None} if with_usage else {}
        async with contextlib.aclosing(merged([text.parts() for text in texts])) as parts:
            async for index, part in parts:
                yield event({**self._fields, "choices": [self._choice(index, part, texts[index].ended)], **no_usage})
        ended = [text.ended for text in texts if text.ended]
        self._note(ended)
        if with_usage:
            yield event({**self._fields, "choices": [], "usage": self._usage(ended)})
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, part: TextPart, ended: TextEnded | None) -> dict[str, Any]:
        scored = self._asked.logprobs is not None
        choice = {
            "index": index,
            "text": part.text,
            "logprobs": text_logprobs(self._model.tokenizer, part.tokens, self._asked.logprobs or 0) if scored else None,
            "finish_reason": ended.finish if ended else None,
        }
        return choice | ({"fingerprint": ended.fingerprint} if ended else {})

    def _note(self, ended: Sequence[TextEnded]) -> None:
        for one in ended:
            if one.result:
                self._call.record.add(one.result, one.finish, one.count)
        if self._call.runner.settings.log_prompts:
            self._call.record.replies = [one.text for one in ended]

    def _usage(self, ended: Sequence[TextEnded]) -> dict[str, Any]:
        tokens = sum(one.count for one in ended)
        reused = sum(one.result.reused for one in ended if one.result)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
        }
