"""Parse, print, map errors to the exit status: 0 done, 1 a difference found, 2 bad input or refusal."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

COMMANDS = {
    "demo": "forget people end to end on scikit-learn's digits, in two minutes",
    "info": "versions, processor features, devices, and which backend serves each op",
    "plan": "what a plan costs to train and how long it lasts, beside every other strategy",
    "simulate": "how long a plan lasts under a stream of requests, and what healing does to it",
    "fit": "make a store from a table and train it, or go on where a killed run stopped",
    "delete": "forget people: durable at once, out of every answer released from then on",
    "heal": "train what deletions took, on what is left of their slices, best first, while others serve",
    "erase": "erase now what requests left behind; search every file for what must be gone",
    "receipt": "show the receipt of a request, or verify one without its store",
    "rotate": "give the store a new store key; after it the old one opens nothing",
    "status": "depth of every shard, dirty slices, requests",
    "report": "write the state of a store as a page with figures, registered in the ledger",
    "backup": "copy a store while it serves",
    "restore": "bring a store back from a backup, and nobody who was deleted with it",
    "verify": "retrain from the table less the deleted, elsewhere, and compare bits",
    "audit": "attack the deletions by membership inference, beside a retrained oracle and planted canaries",
    "export": "give a live node away as a PEFT adapter, registered in the ledger",
    "unlearn": "an approximate method on a PEFT adapter outside any store, to compare with exact deletion",
    "predict": "answer from the live nodes of all shards",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """Build the parser of all commands; no command's own imports happen here."""
    top = Parser(prog="s3t", allow_abbrev=False, description="Exact machine unlearning with slice LoRA adapters.")
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, help_ in COMMANDS.items():
        sub = commands.add_parser(name, allow_abbrev=False, help=help_, description=help_[0].upper() + help_[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
        importlib.import_module(f"s3t_ext.cli.{name}").add(sub)
    return top


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; subjects of ``delete`` may follow options."""
    args, rest = parser().parse_known_args(words)
    if args.command == "delete" and not any(word.startswith("-") for word in rest):
        args.subjects += rest
    elif rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}; see `s3t {args.command or ''} --help`")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        args = parse(words)
        if args.version:
            return _print(_version())
        if not args.command:
            raise ValueError(f"expected a command: {', '.join(COMMANDS)}; see `s3t --help`")
        as_json = args.json
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"s3t: warning: {message}", file=sys.stderr)
            status, report, text = importlib.import_module(f"s3t_ext.cli.{args.command}").run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", as_json, 130)
    except Exception as error:
        return _fail(_one_line(error), as_json)
    return max(status, _print(json.dumps(report) if as_json else text))


def _print(text: str) -> int:
    """Print a result; return 2 where standard output does not take it (a reader that has gone away is fine)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, UnicodeError) as error:
        print(f"s3t: error: done, but the result could not be printed: {error}", file=sys.stderr)
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return 0


def _version() -> str:
    import s3t_ext

    return f"s3t {s3t_ext.__version__}"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'system'}: {error.strerror}"
    text = " ".join(str(error).split())
    kind = type(error).__name__
    expected = isinstance(error, (ValueError, NotImplementedError)) or type(error).__module__.startswith("s3t_ext")
    return text if text and expected else f"{kind}: {text or 'no message'}"


def _fail(message: str, as_json: bool, status: int = 2) -> int:
    if as_json:
        _print(json.dumps({"error": message}))
    print(f"s3t: error: {message}".encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
