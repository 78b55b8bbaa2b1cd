"""Import every module of the installed package; those that need what is named by --without may fail for that alone.

A wheel silently leaves out packages that are not listed, so the folders of the repository are held against it.
"""

import argparse
import importlib
import pkgutil
from pathlib import Path

import redline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--without", default="", help="comma-separated packages that are not installed")
without = [name for name in parser.parse_args().without.split(",") if name]

root = Path(__file__).resolve().parent.parent
folders = {"core": "redline", **{name: f"redline.{name}" for name in ("monitors", "controllers", "integrations")}}
expected = {
    ".".join([package, *path.relative_to(root / folder).with_suffix("").parts]).removesuffix(".__init__")
    for folder, package in folders.items()
    for path in (root / folder).rglob("*.py")
}
found = {"redline", *(module.name for module in pkgutil.walk_packages(redline.__path__, "redline."))}
if missing := expected - found:
    raise SystemExit(f"not in the installed package: {', '.join(sorted(missing))}")

skipped = []
for name in sorted(found):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in without:
            raise
        skipped.append(name)
print(f"{len(found) - len(skipped)} modules imported; {len(skipped)} need {without}: {skipped}")
if without and not skipped:
    raise SystemExit(f"{without} seem to be installed after all")
