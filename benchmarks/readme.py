"""Where a benchmark's table goes: into README.md, between two comments that carry its name."""

from pathlib import Path

from lightning_mdc.run_folder import write_text

README = Path(__file__).resolve().parents[1] / "README.md"


def put(name: str, text: str) -> None:
    """Print `text`, and replace what README.md has between ``<!-- name:begin -->`` and ``<!-- name:end -->`` by it."""
    print(text)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    readme = README.read_text()
    if begin not in readme or end not in readme:
        print(f"({README} has no place for it: {begin} and {end})")
        return
    head, rest = readme.split(begin)
    write_text(README, f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")
