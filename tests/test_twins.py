"""The scripts are twins: without their METHOD parts they are the same, byte for byte."""

import ast
import difflib
from pathlib import Path

from test_equivalence import SCRIPTS


def defined_name(node):
    """The name that a top-level statement defines; "" for none or several."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", "")
    return getattr(node, "name", "")


def first_and_last(node):
    """The lines of a top-level statement, its decorators included."""
    firsts = [node.lineno]
    for decorator in getattr(node, "decorator_list", []):
        firsts.append(decorator.lineno)
    return min(firsts), node.end_lineno


def find_line(lines, text):
    """The number of the first line that holds a text, from 1."""
    for number, line in enumerate(lines, 1):
        if text in line:
            return number
    raise LookupError(text)


def plumbing(path):
    """Banners and text of a script without its METHOD parts: header, method config, presets,
    METHOD, and the block of main.
    """
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    cuts = []
    for node in ast.parse(source).body:
        header = isinstance(node, ast.Expr) and node.lineno == 1
        if header or defined_name(node) in ("MethodConfig", "PRESETS"):
            cuts.append(first_and_last(node))
    numbers = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("# ---"):
            numbers[line.strip("# -\n")] = number
    banners = list(numbers)
    after = banners[banners.index("METHOD") + 1]
    cuts.append((numbers["METHOD"] + 1, numbers[after] - 1))
    cuts.append((find_line(lines, "# >>> METHOD"), find_line(lines, "# <<< METHOD")))
    skipped = set()
    for first, last in cuts:
        skipped.update(range(first, last + 1))
    kept = [line for number, line in enumerate(lines, 1) if number not in skipped]
    return banners, "".join(kept)


def test_twins_differ_in_their_methods_only():
    """vgrpo.py - METHOD = pave_grpo.py - METHOD, byte for byte."""
    script, twin = SCRIPTS
    banners, text = plumbing(Path(script.__file__))
    twin_banners, twin_text = plumbing(Path(twin.__file__))
    assert banners == twin_banners
    assert banners == [
        "config",
        "sigma grid and generators",
        "METHOD",
        "main",
        "command line",
        "model",
        "prompts and evaluation",
        "checkpoint and log",
        "distributed",
    ]
    lines, twin_lines = text.splitlines(), twin_text.splitlines()
    assert len(lines) > 400, "most of a script is plumbing"
    difference = difflib.unified_diff(lines, twin_lines, lineterm="", n=0)
    assert text == twin_text, "\n".join(difference)
