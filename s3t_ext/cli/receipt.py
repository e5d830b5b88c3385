"""``s3t receipt``: what a store signed for a request, and whether it did."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Add ``show`` and ``verify``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    show = actions.add_parser("show", allow_abbrev=False, help="print the receipt of a request, canonical JSON")
    show.add_argument("store", metavar="STORE")
    show.add_argument("request_id", metavar="REQUEST_ID")
    show.add_argument("--out", metavar="FILE", help="write it there instead")
    verify = actions.add_parser("verify", allow_abbrev=False, help="check a receipt's signature, without its store")
    verify.add_argument("file", metavar="FILE", help="the receipt")
    verify.add_argument("--public", metavar="FILE", required=True, help="public.json of the store")
    for action in (show, verify):  # --json is taken before and after the action
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")


def run(args: argparse.Namespace) -> tuple[int, dict, str]:
    """Show or verify a receipt; status 1 where it is not what the store signed."""
    return _show(args) if args.action == "show" else _verify(args)


def _show(args: argparse.Namespace) -> tuple[int, dict, str]:
    from s3t_ext.ledger import canonical_json
    from s3t_ext.store.files import atomic_write
    from s3t_ext.system.unlearn import receipt

    found = receipt(args.store, args.request_id)
    data = canonical_json(found)
    if args.out:
        atomic_write(args.out, data + b"\n")
        return 0, found, f"wrote {args.out}"
    return 0, found, data.decode()


def _verify(args: argparse.Namespace) -> tuple[int, dict, str]:
    from s3t_ext.ledger.receipts import FORMAT, head_after
    from s3t_ext.ledger.signature import fault, read_public, read_receipt

    receipt, public = read_receipt(args.file), read_public(args.public)
    reason = fault(receipt, public)
    if reason:
        return 1, {"valid": False, "reason": reason}, f"{args.file} is not valid: {reason}"
    if receipt["format"] != FORMAT:
        raise ValueError(
            f"{args.file}: expected a receipt of format {FORMAT}, got {receipt['format']!r}; use a newer s3t"
        )
    head, seq = head_after(receipt), receipt["ledger"]["seq"]
    report = {"valid": True, "request_id": receipt["request_id"], "seq": seq, "head": head}
    return 0, report, f"valid: request {receipt['request_id']!r}, ledger entry {seq}, chain head after it {head}"
