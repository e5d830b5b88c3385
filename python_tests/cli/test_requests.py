"""What a request may say: its deadline, and whom a file names."""

from __future__ import annotations

from s3t_ext.cli.delete import subjects_in

from .test_cli import ask, refused


def test_a_deadline_out_of_bounds_is_refused_before_it_is_fixed_for_ever(files, fit_words, capsys) -> None:
    wanted = "deadline_days: expected a whole number of 1 to 36500"
    for days in (0, 36501, 3000000):
        refused(capsys, *fit_words, "--deadline-days", days, says=wanted)
    assert not (files / "store").exists()
    ask(capsys, *fit_words, "--deadline-days", 36500)
    assert ask(capsys, "delete", files / "store", "person 3")["deadline"] > "2100"


def test_only_line_feeds_end_a_name_of_a_file() -> None:
    assert subjects_in("\ufeffanna\u2028smith\r\ncarl\x0bx\n\n bo\u0085b ".encode()) == [
        "anna\u2028smith",
        "carl\x0bx",
        " bo\u0085b ",
    ]
