"""Log probabilities in the forms of OpenAI's interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds4jax.evaluation.logprobs import Scored
from ds4jax.serve.continuation import Token
from ds4jax.text.tokenizer import Tokenizer

# What OpenAI gives for a token that is all but impossible; JSON has no infinity.
LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {
        "content": [
            _token(tokenizer, one.id, one.logprob) | {"top_logprobs": [_token(tokenizer, *top) for top in one.top]}
            for one in scored
        ],
        "refusal": None,
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def text_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """The `logprobs` of a text's choice. Of two likely tokens with the same name, the more likely one counts.

    Args:
        tokens: those of the choice; the first one of a prompt has no probability.
        count: number of most likely tokens of each.
    """
    scored = [token.scored for token in tokens]
    return {
        "tokens": [_name(tokenizer, token.id) for token in tokens],
        "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in scored],
        "top_logprobs": [None if one is None or not count else _top(tokenizer, one) for one in scored],
        "text_offset": [token.offset for token in tokens],
    }


def _top(tokenizer: Tokenizer | None, one: Scored) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in one.top:
        found.setdefault(_name(tokenizer, token), max(logprob, LOWEST))
    return found


def _name(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text; for a part of a character its bytes, as OpenAI writes them."""
    if tokenizer is None:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
