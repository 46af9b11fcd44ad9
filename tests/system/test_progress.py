import io

import pytest
from rich.console import Console

from permprune.system import progress
from permprune.system.progress import bar, disable_progress_bars, enable_progress_bars, stage, stages, track, working


@pytest.fixture
def terminal(monkeypatch):
    """What a person at a terminal sees."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=80))
    return file


def test_yields_everything_in_order():
    assert list(track(range(5), "work")) == [0, 1, 2, 3, 4]


def test_names_the_work_and_counts(terminal):
    assert list(track(iter("abc"), "searching", total=3)) == ["a", "b", "c"]
    assert "searching" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_works_inside_another_bar(terminal):
    assert [list(track(range(2), "inner")) for _ in track(range(2), "outer")] == [[0, 1], [0, 1]]
    assert "inner" in terminal.getvalue()
    assert "outer" in terminal.getvalue()


def test_lazy(terminal):
    items = track((1 / n for n in (1, 0)), "dividing", total=2)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_nothing_on_stdout_or_in_a_log_file(capsys):
    list(track(range(3), "work"))
    with bar("searching", 3) as advance:
        advance(2, "searching")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_bars_can_be_turned_off(terminal):
    disable_progress_bars()
    try:
        assert list(track(range(2), "silent")) == [0, 1]
        with bar("silent", 3) as advance:
            advance(1, "silent still")
    finally:
        enable_progress_bars()
    assert "silent" not in terminal.getvalue()
    with bar("searching", 3, completed=1) as advance:
        advance(2, "searching: loss 1.5")
    assert "searching: loss 1.5" in terminal.getvalue() and "2/3" in terminal.getvalue()


def test_stages_are_shown_one_after_the_other(terminal):
    with stages("read", "search", "write"):
        stage("search")
        assert list(track(range(2), "rounds")) == [0, 1]
        stage("read")  # is over
        stage("write")
    text = terminal.getvalue()
    wanted = "stage 1 of 3: read", "stage 2 of 3: search", "rounds", "stage 3 of 3: write"
    at = [text.index(shown) for shown in wanted]
    assert at == sorted(at)
    stage("search")  # no run, no stage
    assert terminal.getvalue() == text


def test_a_run_inside_another_shows_only_stages_of_the_outer_one(terminal):
    with stages("prune", "pack"), stages("read", "pack", "write") as inner:
        stage("pack")
        stage("write")
    assert "stage 2 of 2: pack" in terminal.getvalue() and "write" not in terminal.getvalue()
    assert inner.names == ["read", "pack", "write"]


def test_what_is_printed_hides_the_line_until_a_stage_begins(terminal, capsys):
    with working("prune"), stages("read", "write"):
        print("a table")
        told = len(terminal.getvalue())
        stage("write")
    assert capsys.readouterr().out == "a table\n"
    assert "stage 1 of 2: read" in terminal.getvalue()[:told] and "stage 2 of 2" in terminal.getvalue()[told:]
    assert terminal.getvalue()[:told].endswith("\x1b[2K")  # erased before the table
