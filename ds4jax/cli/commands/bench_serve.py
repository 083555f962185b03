"""`ds4jax bench serve`: a server under load, and HTTP beside the engine itself."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from ds4jax import bounds
from ds4jax.bounds import Integers, Numbers
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands.bench_result import ended, notes
from ds4jax.errors import InputError

SLOTS = 8
DESCRIPTION = """\
Serve a model, by default the tiny one, and measure it; with --url measure a running ds4jax server.

Requests come at --rate a second at random times, whether or not earlier ones have ended. Their prompts are pieces of the held-out
text. Print percentiles of the time to the first token, of the time of a token after it, of the time between two pieces of text
and of tokens/s.

Without --url, the engine alone and the same engine through HTTP take turns with the same requests: the time to the first token of
one request, and tokens/s of --streams requests at once. Exit code 1 if a request fails, or if HTTP changes a bit."""

EXAMPLES = """\
examples:
  ds4jax bench serve
  ds4jax bench serve --model model.gguf --rate 4 --requests 200 --json serve.json --plot serve.png
  ds4jax bench serve --url http://127.0.0.1:8000 --rate 2"""

_COUNT = cli_options.integer(Integers(1, 100_000, "it must be 1 to 100000"))
_PAIRS = cli_options.integer(Integers(0, 1000, "it must be 0 to 1000"))
_RATE = cli_options.number(Numbers(0, 1e4, "it must be 0 to 10000 requests a second"))


def add_parser(targets: Any) -> None:
    """Declare the target."""
    parser = targets.add_parser("serve", help="a server under load", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--url", metavar="URL", help="measure the server at this address")
    parser.add_argument("--api-key-file", type=cli_options.existing_file, metavar="FILE", help="a file with that server's key")
    models.add_options(parser)
    models.add_groups(parser)
    models.add_strict(parser)
    models.add_chunk(parser)
    parser.add_argument(
        "--slots", type=cli_options.integer(bounds.SLOTS), default=SLOTS, metavar="N", help=f"slots of the engine ({SLOTS})"
    )
    parser.add_argument("--context", type=cli_options.token_count, default=2048, metavar="N", help="tokens of each slot (2048)")
    parser.add_argument("--rate", type=_RATE, default=1.0, metavar="R", help="requests a second; 0 for none (1)")
    parser.add_argument("--requests", type=_COUNT, default=20, metavar="N", help="their number (20)")
    parser.add_argument("--prompt", type=cli_options.token_count, default=64, metavar="N", help="tokens of each prompt (64)")
    parser.add_argument("--max-new-tokens", type=cli_options.token_count, default=64, metavar="N", help="of each reply (64)")
    parser.add_argument("--streams", type=_COUNT, default=8, metavar="N", help="requests at once of the comparison (8)")
    parser.add_argument("--pairs", type=_PAIRS, default=5, metavar="N", help="pairs of its runs; 0 for no comparison (5)")
    parser.add_argument("--seed", type=cli_options.seed, default=0, metavar="N", help="of prompts and times (0)")
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw it; needs matplotlib")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `bench serve`. Returns 0, or 1 if a request failed or HTTP changed a bit.

    Raises:
        InputError: options exclude each other, a package is missing, or the model or the address cannot be used.
    """
    if options.url and options.model:
        raise InputError("--url and --model exclude each other; give one")
    if options.prompt + options.max_new_tokens > options.context and not options.url:
        raise InputError(f"--prompt and --max-new-tokens: together more than --context {options.context}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")
    if not options.url and importlib.util.find_spec("starlette") is None:
        raise InputError("starlette: not installed; a server needs `pip install 'ds4jax[serve]'`")
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import environment, serve, serve_report

    asked = serve.Options(
        rate=options.rate,
        requests=options.requests,
        prompt=options.prompt,
        tokens=options.max_new_tokens,
        streams=options.streams,
        pairs=options.pairs,
        seed=options.seed,
    )
    where = environment.describe()
    if options.url:
        content = _of_url(options, asked)
    else:
        content = serve.bench_engine(_engine(options), asked, notes())
    content = {**where, **content}
    if options.plot:
        serve_report.plot(options.plot, content)
    return ended(options, content, serve_report.show, serve.good(content))


def _engine(options: argparse.Namespace) -> Any:
    model = models.open_model(options)
    from ds4jax.engine.engine import Engine

    # The pairs repeat their prompts, and both must compute them.
    how = {"strict": options.strict, "chunk": options.chunk, "prefix_bytes": 0}
    return Engine(model, slots=options.slots, context=min(options.context, model.config.max_context), **how)


def _of_url(options: argparse.Namespace, asked: Any) -> dict[str, Any]:
    import urllib.request

    from ds4jax.bench import serve
    from ds4jax.serve.settings import keys_of

    url, key = options.url.rstrip("/"), keys_of(options.api_key_file)[0] if options.api_key_file else ""

    def encode(text: str) -> list[int]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/tokenize", body, headers), timeout=60) as answer:
                ids: list[int] = json.load(answer)["tokens"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--url {url}: {error}; give the address of a running ds4jax server") from error
        return ids

    return serve.bench_url(url, key, encode, asked, notes())
