"""Numbers with their nouns, in messages and reports."""


def counted(number: int, noun: str) -> str:
    """Give a number and its noun: 1 node, 2 nodes, 1 slice-pass, 0 slice-passes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
