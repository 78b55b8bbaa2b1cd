"""Imports: which folder may import what, what ``import redline`` loads, and that what is listed is what is there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it where Python does not have it yet
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = SETTINGS["tool"]["setuptools"]["package-dir"]
PACKAGES: list[str] = SETTINGS["tool"]["setuptools"]["packages"]


# What is imported where -------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the repository's packages, by the name it is imported as."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Full names of all that a module imports, within functions and ``TYPE_CHECKING`` blocks too."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            # `from redline import metrics` imports a module, `from redline.step import Step` a name out of one.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found


def folder(module: str) -> str:
    """The package a module of Redline's belongs to: "redline", "redline.monitors", ..."""
    return max((package for package in PACKAGES if f"{module}.".startswith(f"{package}.")), key=len)


def of_redline(name: str) -> Iterator[str]:
    return (module for module in imports(name) if module.split(".")[0] == "redline")


def of_others(name: str) -> set[str]:
    tops = {module.split(".")[0] for module in imports(name)}
    return tops - set(sys.stdlib_module_names) - {"redline"}


# Packages of ours, and of others, that each folder may import. What core prints, it prints with rich.
MAY_IMPORT = {
    "redline": ({"redline", "redline.findings", "redline.numerics"}, {"torch", "numpy"}),
    "redline.findings": ({"redline", "redline.findings", "redline.numerics"}, set()),
    "redline.numerics": ({"redline.numerics"}, {"torch", "numpy"}),
    "redline.monitors": ({"redline", "redline.numerics"}, {"torch", "numpy"}),
    "redline.controllers": ({"redline", "redline.numerics"}, {"torch", "numpy"}),
}
BESIDES: dict[str, tuple[set[str], set[str]]] = {
    "redline": (
        {"redline.monitors", "redline.controllers", "redline.integrations", "redline.integrations.record"},
        set(),
    ),
    "redline.report_view": (set(), {"rich"}),
    "redline.scaling_view": (set(), {"rich"}),
}
ALLOWED_OUT_OF_CORE = {"redline.errors"}  # what numerics raises is a public name


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) in MAY_IMPORT])
def test_folders_import_only_what_lies_below_them(name: str) -> None:
    ours, others = MAY_IMPORT[folder(name)]
    more_of_ours, more_of_others = BESIDES.get(name, (set(), set()))
    own = {folder(name)} if MODULES[name].stem == "__init__" else set()
    forbidden = {
        module
        for module in of_redline(name)
        if folder(module) not in ours | more_of_ours | own and module not in ALLOWED_OUT_OF_CORE
    }
    assert forbidden == set(), "a folder above it"
    assert of_others(name) - others - more_of_others == set(), "packages it may not import"


@pytest.mark.parametrize("package", ["redline.monitors", "redline.controllers"])
def test_one_plugin_does_not_import_another(package: str) -> None:
    plugins = {name for name in MODULES if folder(name) == package and name != package}
    assert {name: plugins & imports(name) for name in plugins if plugins & imports(name)} == {}


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) == "redline" and name != "redline"])
def test_core_knows_no_plugin_by_name(name: str) -> None:
    above = ("redline.monitors", "redline.controllers", "redline.integrations")
    assert {module for module in of_redline(name) if folder(module).startswith(above)} == set()


def test_only_the_trainers_integrations_import_a_trainer() -> None:
    trainers = {"lightning", "pytorch_lightning", "lightning_fabric", "transformers", "accelerate"}
    importing = {name for name in MODULES if trainers & of_others(name)}
    assert {name for name in importing if not folder(name).startswith("redline.integrations")} == set()
    assert importing, "the Lightning callback does"


def test_what_is_imported_is_declared() -> None:
    declared = {"torch", "numpy", "rich", "prometheus_client"}
    optional = {"lightning", "sklearn", "transformers", "accelerate"}
    for name in MODULES:
        allowed = declared | (optional if folder(name).startswith("redline.integrations") else set())
        assert of_others(name) - allowed == set(), name
    requirements = {requirement.split(">")[0] for requirement in SETTINGS["project"]["dependencies"]}
    assert {requirement.replace("-", "_") for requirement in requirements} == declared


# What is installed ------------------------------------------------------------------------------------


def test_every_package_listed_is_there_and_every_one_there_is_listed() -> None:
    assert sorted(PACKAGES) == sorted(FOLDERS)
    for package in PACKAGES:
        assert (REPOSITORY / FOLDERS[package] / "__init__.py").is_file(), package
    tops = {Path(folder).parts[0] for folder in FOLDERS.values()}
    there = {
        path.parent.relative_to(REPOSITORY).as_posix() for top in tops for path in (REPOSITORY / top).rglob("*.py")
    }
    assert there == set(FOLDERS.values()), "a folder with modules that is not listed is not installed"


def test_type_information_is_installed() -> None:
    assert (REPOSITORY / "core" / "py.typed").is_file()
    assert "py.typed" in SETTINGS["tool"]["setuptools"]["package-data"]["redline"]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_is_the_repositorys(name: str) -> None:
    for optional in {"lightning", "sklearn", "transformers", "accelerate"} & of_others(name):
        pytest.importorskip(optional)
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).name == MODULES[name].name
    assert module.__doc__, "says what it is about"


def test_every_public_name_is_there() -> None:
    import redline
    import redline.controllers
    import redline.integrations
    import redline.monitors
    import redline.numerics

    for package in (redline, redline.monitors, redline.controllers, redline.numerics):
        assert sorted(set(package.__all__)) == sorted(package.__all__)
        assert [name for name in package.__all__ if not hasattr(package, name)] == []
    for package in (redline.monitors, redline.controllers):
        assert [name for name in package.__all__ if getattr(redline, name) is not getattr(package, name)] == []


# What importing does ----------------------------------------------------------------------------------


def in_fresh_python(code: str, tmp_path: Path) -> str:
    """Run in a process of its own, in another working directory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_redline_loads_no_trainer_and_disturbs_nothing(tmp_path: Path) -> None:
    code = """
import json, logging, random, signal, sys
import rich.console  # draws from Python's stream as it is loaded, whoever loads it
import numpy, torch
before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
handlers, interrupt = list(logging.root.handlers), signal.getsignal(signal.SIGINT)
import redline
after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
print(json.dumps({
    "loaded": sorted(name for name in sys.modules if "." not in name),
    "same random numbers": before == after,
    "same logging": handlers == logging.root.handlers,
    "same signals": interrupt is signal.getsignal(signal.SIGINT),
    "default dtype": str(torch.get_default_dtype()),
    "version": redline.__version__,
}))
"""
    found = json.loads(in_fresh_python(code, tmp_path))
    trainers = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "sklearn"}
    trainers |= {"transformers", "accelerate"}
    assert trainers & set(found.pop("loaded")) == set()
    assert found == {
        "same random numbers": True,
        "same logging": True,
        "same signals": True,
        "default dtype": "torch.float32",
        "version": SETTINGS["project"]["version"],
    }


def test_redline_works_where_no_trainer_is_installed(tmp_path: Path) -> None:
    code = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "transformers", "accelerate", "sklearn"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
import redline, torch
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with redline.attach(model, optimizer) as session:
    model(torch.ones(4, 3)).logsumexp(-1).sum().backward()
    optimizer.step()
print(session.latest.value("redline_steps_total"))
for name in ("lightning", "fabric", "huggingface", "accelerate"):
    try:
        __import__(f"redline.integrations.{name}")
    except ImportError as error:
        print(type(error).__name__)
"""
    assert in_fresh_python(code, tmp_path).split() == ["1.0"] + 4 * ["ModuleNotFoundError"]
