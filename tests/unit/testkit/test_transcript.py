"""Guides are rewritten block by block, prose left alone."""

from testkit.transcript import rewrite


def test_outputs_are_replaced_and_prose_is_kept():
    guide = "Prose.\n```console\n$ one\nstale\n$ two\n```\nMore $ prose.\n```yaml\n$ not a command\n```\n"
    expected = "Prose.\n```console\n$ one\nran one\n$ two\nran two\n```\nMore $ prose.\n```yaml\n$ not a command\n```\n"
    assert rewrite(guide, lambda command: f"ran {command}\n") == expected


def test_long_output_is_cut_and_says_so():
    shown = rewrite("```console\n$ x\n```", lambda _: "line\n" * 100)
    assert "... (61 more lines)" in shown
