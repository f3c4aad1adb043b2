"""The command line: vitkern info, check, demo, bench."""

import argparse
import importlib.util
import sys
from pathlib import Path

import vitkern


def info() -> int:
    """Versions, instruction set, and the back-ends of every op with the reasons of those that are missing."""
    found = vitkern.info()
    ops = found.pop("ops")
    print(f"vitkern {vitkern.__version__}")
    for name, value in found.items():
        print(f"  {name}: {value}")
    for op, backends in ops.items():
        print(f"  {op}")
        for name, reason in backends.items():
            print(f"    {name}: {'yes' if reason is None else 'no: ' + reason}")
    return 0


def bench(arguments: list[str]) -> int:
    """Runs benchmarks/run.py, which lives in the repository and not in the wheel."""
    root = Path(__file__).parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        root = Path.cwd()
    if not (root / "benchmarks" / "run.py").exists():
        print(
            "vitkern bench: needs the repository: benchmarks/run.py is neither beside the package nor here",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    from benchmarks.run import main

    return main(arguments)


def demo(arguments: list[str]) -> int:
    if _missing("demo", "transformers", "sklearn", "matplotlib", "PIL", "rich", "jinja2"):
        return 2
    from vitkern.demo import main

    return main(arguments)


def check(arguments: list[str]) -> int:
    if _missing("check", "rich"):
        return 2
    from vitkern.check import main

    return main(arguments)


def _missing(command: str, *modules: str) -> bool:
    missing = [m for m in modules if not importlib.util.find_spec(m)]
    if missing:
        print(f"vitkern {command}: needs {', '.join(missing)}: pip install 'vitkern[demo]'", file=sys.stderr)
    return bool(missing)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own = {"bench": bench, "demo": demo, "check": check}
    if argv and argv[0] in own:
        return own[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(prog="vitkern", description="Fused attention kernels for vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction set, back-ends and why some are missing")
    commands.add_parser("check", help="a model patched and unpatched, layer by layer (vitkern check --help)")
    commands.add_parser("demo", help="models on photographs, patched and unpatched (vitkern demo --help)")
    commands.add_parser("bench", help="ops against every baseline (vitkern bench --help; needs the repository)")
    parser.parse_args(argv)
    return info()
