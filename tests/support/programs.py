"""Runs the programs as their users do."""

import subprocess


def run(program, *arguments, code=0, **options):
    """Must end with `code`, and never with an internal error."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "internal error" not in done.stderr
    return done
