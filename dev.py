"""The six commands of development: python dev.py fix | check | test | matrix | bench | docs. Each prints what it runs."""

import shlex
import subprocess
import sys

PYTEST = ("python", "-m", "pytest")
COMMANDS = {  # name: (what it is for, plain commands)
    "fix": ("format and repair what a program can", (
        ("python", "-m", "ruff", "check", "--fix", "."),
        ("python", "-m", "ruff", "format", "."),
    )),
    "check": ("lint, types and the fast tests", (
        ("python", "-m", "ruff", "check", "."),
        ("python", "-m", "ruff", "format", "--check", "."),
        ("python", "-m", "mypy"),
        (*PYTEST, "-n", "2", "-m", "not slow"),
    )),
    "test": ("all tests", ((*PYTEST, "-n", "2"),)),
    "matrix": ("every method on every backbone", ((*PYTEST, "-n", "2", "tests/test_matrix.py"),)),
    "bench": ("speed, each file after a check against the reference", (("python", "benchmarks/scan.py"), ("python", "-m", "svp", "bench"))),
    "docs": ("tables of the documents, and every block in them", (
        ("python", "docs/tables.py"),
        (*PYTEST, "tests/test_docs.py"),
    )),
}  # fmt: skip


def main(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        print("\n".join(f"python dev.py {name:<7} {about}" for name, (about, _) in COMMANDS.items()))
        return 0 if words in ([], ["-h"], ["--help"]) else 2
    for command in COMMANDS[words[0]][1]:
        command = (*command, *words[1:]) if command == COMMANDS[words[0]][1][-1] else command
        print("$", shlex.join(command), flush=True)
        code = subprocess.run([sys.executable, *command[1:]]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
