"""What a request may say: its deadline, and whom a file names."""

from __future__ import annotations

from s3t_ext.cli.delete import subjects_in

from .test_cli import ask, call, refused


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


def test_a_dry_run_tells_what_is_held_of_each_and_what_is_not_covered(files, fit_words, capsys) -> None:
    told = (files / "table.jsonl").read_text().replace("person", "tester")
    (files / "test.jsonl").write_text(told)
    ask(capsys, *fit_words, "--evaluation", files / "test.jsonl")
    store, people = files / "store", ["person 1", "person 2", "tester 1", "nobody"]
    ask(capsys, "delete", store, "person 1")
    preview = ask(capsys, "delete", store, *people, "--dry-run")
    status, out, _ = call(capsys, "delete", store, *people, "--dry-run")
    assert status == 0
    assert out.startswith("nothing changed; depths [")
    wanted = ["already deleted", "deleted", "held in a declared part, not covered", "not held"]
    assert sorted(row["status"] for row in preview["subjects"]) == wanted
    assert sorted(line.split(maxsplit=1)[1].split(" (")[0] for line in out.splitlines()[1:]) == wanted
    assert "held in a declared part, not covered (evaluation)" in out
    assert ask(capsys, "delete", store, *people)["subjects"] == preview["subjects"], "as the receipt then says"
