"""Writes every resolved version into pyproject.toml, as `constraint-dependencies` under [tool.uv].

    uv run scripts/update_pins.py            pins what is resolved now: new dependencies are added, others stay
    uv run scripts/update_pins.py --upgrade  resolves anew; only jax and jaxlib stay where they are

A lock file would record addresses of package indexes, so none is committed: these lines do its work. The resolution
runs in a temporary folder and leaves no lock file behind. Extras that conflict are resolved one after the other.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).parent.parent
KEPT = ("jax", "jaxlib")  # raised by hand, together with the code
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.+))?$")
LIST = re.compile(r'^constraint-dependencies = \[(?:"[^"\n]*"|#[^\n]*|[^\]"#])*\]', re.MULTILINE)


def pins(exports: Iterable[str]) -> list[str]:
    """["absl-py==2.5.1", ...], sorted, of the texts that `uv export` printed.

    One version a package stands without its marker: a constraint on what is not installed says nothing. Where a
    package is resolved to several versions, each keeps the marker that tells them apart.
    """
    found: dict[str, dict[str, str | None]] = {}
    for line in "\n".join(exports).splitlines():
        line = line.strip()
        if not line or line.startswith(("#", "-", ".", "/")):
            continue
        match = REQUIREMENT.match(line)
        if not match:
            raise ValueError(f"this line of uv export is not name==version: {line!r}")
        found.setdefault(match["name"], {}).setdefault(match["version"], match["marker"])
    lines = []
    for name, versions in sorted(found.items()):
        for version, marker in sorted(versions.items()):
            if len(versions) > 1 and not marker:
                raise ValueError(f"{name} is resolved to {', '.join(sorted(versions))}, and {version} has no marker")
            lines.append(f"{name}=={version}" + (f" ; {marker}" if len(versions) > 1 else ""))
    return lines


def rewritten(project: str, lines: Iterable[str]) -> str:
    """The text of pyproject.toml with `lines` as its `constraint-dependencies`, one a line; all else as it was."""
    if any('"' in line for line in lines):
        raise ValueError("a double quote can't stand in a pin")
    entries = "".join(f'  "{line}",\n' for line in lines)
    if len(LIST.findall(project)) != 1:
        raise ValueError("pyproject.toml must have exactly one list constraint-dependencies")
    return LIST.sub(lambda _: f"constraint-dependencies = [\n{entries}]", project)


def together(project: str) -> list[list[str]]:
    """The extras, in groups that resolve together: of those that conflict, each group has one."""
    parsed = tomllib.loads(project)
    extras = list(parsed["project"].get("optional-dependencies", {}))
    rivals = [entry["extra"] for conflict in parsed["tool"]["uv"].get("conflicts", []) for entry in conflict]
    free = [extra for extra in extras if extra not in rivals]
    return [[*free, rival] for rival in rivals] or [free]


def exported(project: str, lock: pathlib.Path | None) -> list[str]:
    """What `uv export` prints for each group of extras, starting from the versions of `lock` if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "pyproject.toml").write_text(project)
        if lock is not None and lock.is_file():
            shutil.copy(lock, folder)
        texts = []
        for extras in together(project):
            command = ["uv", "export", "--project", folder, "--all-groups", "--no-hashes", "--no-emit-project"]
            command += ["--no-header", "--no-annotate", *(f"--extra={extra}" for extra in extras)]
            texts.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="forget the pins, except those of jax and jaxlib")
    upgrade = parser.parse_args().upgrade
    path = ROOT / "pyproject.toml"
    project = path.read_text()
    if upgrade:
        stand = tomllib.loads(project)["tool"]["uv"]["constraint-dependencies"]
        kept = [pin for pin in stand if pin.partition("==")[0] in KEPT]
        texts = exported(rewritten(project, kept), None)
    else:
        texts = exported(project, ROOT / "uv.lock")
    lines = pins(texts)
    path.write_text(rewritten(path.read_text(), lines))
    print(f"{len(lines)} versions are pinned in {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
