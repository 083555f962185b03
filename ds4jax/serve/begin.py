"""Gives a conversation to the engine."""

from __future__ import annotations

from ds4jax.serve.conversation import Conversation, samplings
from ds4jax.serve.endpoint import Call
from ds4jax.serve.guidance import Guide, constraint
from ds4jax.serve.merging import SHORT, aside
from ds4jax.serve.reply import Reply


async def begin(call: Call, asked: Conversation) -> list[Reply]:
    """Submit a conversation. Returns its replies.

    Raises:
        ApiError, InputError, QueueFull, Closed: it cannot be replied to.
    """
    runner, tokenizer = call.runner, call.runner.tokenizer

    def prepared() -> tuple[list[int], list[Guide | None]]:
        vocabulary = runner.engine.model.config.vocab_size
        return asked.ids(runner), [constraint(asked, tokenizer, vocabulary) for _ in range(asked.count)]

    # A guide takes a while, too, the first one more than a second.
    size = SHORT if asked.tools or asked.response_format else len(call.body)
    ids, guides = await aside(size, prepared)
    limit = runner.engine.context if asked.max_new_tokens is None else asked.max_new_tokens
    replies: list[Reply] = []
    for sampling, guide in zip(samplings(asked.sampling, asked.count), guides, strict=True):
        job = call.submit(ids, max_new_tokens=limit, sampling=sampling, logprobs=asked.logprobs, constraint=guide)
        replies.append(Reply(job, asked, tokenizer, int(sampling.seed or 0)))
    return replies
