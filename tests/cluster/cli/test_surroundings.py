"""Neither the terminal nor the folder of the user gets in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import subprocess, sys
from cluster.cli.surroundings import console, notes, ready_process
ready_process()
question = input()
console.print(f"{question} é 日本 \\u2028 \\ud800")
notes.print("━ é")
print(subprocess.run([sys.executable, "-c", "import colorsys"]).returncode)
"""


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
                                       {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_no_letter_breaks_a_terminal_and_no_file_of_the_user_is_imported(
        tmp_path: Path, variables: dict[str, str]) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(7)", encoding="utf-8")
    root, program = str(Path(__file__).parents[3]), tmp_path / "bin" / "program.py"
    program.parent.mkdir()
    program.write_text(f"import sys; sys.path.append({root!r})\n{PROGRAM}", encoding="utf-8")
    done = subprocess.run([sys.executable, str(program)], input="schön\n".encode(), capture_output=True,
                          cwd=tmp_path, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"0"
