"""Parse, print, map errors to the exit status: 0 done, 1 a difference found, 2 bad input or refusal."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "demo": "forget people end to end on scikit-learn's digits, in two minutes",
    "info": "versions, processor features, devices, and which backend serves each op",
    "plan": "what a plan costs to train and how long it lasts",
    "fit": "make a store from a table and train it, or go on where a killed run stopped",
    "delete": "forget people: durable at once, out of every answer released from then on",
    "status": "depth of every shard, dirty slices, requests",
    "verify": "retrain from the table less the deleted, elsewhere, and compare bits",
    "predict": "answer from the live nodes of all shards",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """Build the parser of all commands; no command's own imports happen here."""
    top = Parser(prog="s3t", description="Exact machine unlearning with slice LoRA adapters.")
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, help_ in COMMANDS.items():
        sub = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
        importlib.import_module(f"s3t_ext.cli.{name}").add(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        args = parser().parse_args(words)
        if args.version or not args.command:
            print(_version() if args.version else parser().format_help(), end="\n" if args.version else "")
            return 0 if args.version else 2
        status, report, text = importlib.import_module(f"s3t_ext.cli.{args.command}").run(args)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError, *_package_errors())):
            raise  # a defect of ours: show where
        return _fail(_one_line(error), as_json)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", as_json, 130)
    try:
        print(json.dumps(report) if as_json else text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _version() -> str:
    import s3t_ext

    return f"s3t {s3t_ext.__version__}"


def _package_errors() -> tuple[type[Exception], ...]:
    from s3t_ext.ledger import LedgerError
    from s3t_ext.store.files import StoreError

    return LedgerError, StoreError


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'system'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, as_json: bool, status: int = 2) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    print(f"s3t: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
