from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distaccum.config import instantiate as targets
from distaccum.errors import UserError

THIS = "targets_examples"


class Part:
    def __init__(self, size: int, inner: Any = None, *, scale: float = 1.0) -> None:
        if size < 0:
            raise ValueError(f"size is {size}")
        self.size = size
        self.inner = inner
        self.scale = scale

    @classmethod
    def doubled(cls, size: int) -> Part:
        return cls(2 * size)


class Filled:
    """Takes its arguments from the data, as far as it can."""

    def __init__(self, num_classes: int, width: int | None = None, depth: int = 3, **rest: Any) -> None:
        self.num_classes = num_classes
        self.width = width
        self.depth = depth
        self.rest = rest


def collecting(name: str, **rest: Any) -> Any:
    return name, rest


@dataclass
class Section:
    _target_: str = f"{THIS}.Part"
    size: int = 4
    scale: float = 0.5


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This module under a name that can be imported from anywhere, and a package with modules that can't."""
    monkeypatch.setitem(sys.modules, THIS, sys.modules[__name__])
    package = tmp_path / "targets_package"
    (package / "nested").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nested" / "__init__.py").write_text("")
    (package / "nested" / "fine.py").write_text("class Fine:\n    pass\n\nNUMBER = 3\n")
    (package / "raises.py").write_text("raise RuntimeError('no licence')\n")
    (package / "lacks.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("targets_package")]:
        del sys.modules[name]


def _message(section: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        targets.build(section, "model", **options)
    return str(refused.value)


# Finding


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("targets_package.nested.fine.Fine", "Fine"),
        (f"{THIS}.Part", "Part"),
        (f"{THIS}.Part.doubled", "doubled"),
        ("distaccum.Trainer", "Trainer"),  # by the package's own __getattr__
        ("os.path.join", "join"),
    ],
)
def test_locate_finds_classes_functions_and_methods(path: str, name: str) -> None:
    assert targets.locate(path, "model").__name__ == name


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.Net", "ModuleNotFoundError: No module named 'nowhere'"),
        ("targets_package.nowhere.Net", "AttributeError: module 'targets_package' has no attribute 'nowhere'"),
        (
            "targets_package.nested.fine.Coarse",
            "AttributeError: module 'targets_package.nested.fine' has no attribute 'Coarse'",
        ),
        ("targets_package.raises.Net", "RuntimeError: no licence"),
        # The reason is what is missing inside, not that the module is.
        ("targets_package.lacks.Net", "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
        ("", "ValueError: Empty module name"),
        ("torch..nn", "AttributeError: module 'torch' has no attribute ''"),
    ],
)
def test_what_does_not_import_is_named_with_the_reason(path: str, reason: str) -> None:
    assert _message({"_target_": path}) == (
        f"model._target_={path} cannot be imported: {reason}. Give the import path of a class or function that Python "
        "finds from here (PYTHONPATH helps)."
    )


@pytest.mark.parametrize(
    ("path", "kind"), [("targets_package.nested.fine", "module"), ("targets_package.nested.fine.NUMBER", "int")]
)
def test_what_is_not_callable_is_refused(path: str, kind: str) -> None:
    assert _message({"_target_": path}) == f"model._target_={path} is a {kind}, not a class or function."


@pytest.mark.parametrize("section", [None, 3, "a.B", {}, {"size": 3}, {"_target_": None}, {"_target_": 3}])
def test_a_section_without_a_target_is_refused(section: Any) -> None:
    assert _message(section) == (
        f"model must name a class or function by _target_; got {section!r}. For example "
        "model._target_=my_package.MyClass"
    )


# Building


def test_keys_become_arguments() -> None:
    part = targets.build({"_target_": f"{THIS}.Part", "size": 3, "scale": 0.1}, "model")
    assert (part.size, part.scale) == (3, 0.1)


def test_a_dataclass_is_a_section() -> None:
    part = targets.build(Section(), "model")
    assert (part.size, part.scale) == (4, 0.5)


def test_positional_arguments_come_first() -> None:
    assert targets.build({"_target_": f"{THIS}.Part", "scale": 2.0}, "model", 7).size == 7


def test_nested_targets_are_built_first() -> None:
    part = targets.build(
        {
            "_target_": f"{THIS}.Part",
            "size": 1,
            "inner": {
                "list": [{"_target_": f"{THIS}.Part", "size": 2}, 5],
                "plain": {"a": {"b": 1}},
                "deep": {"_target_": f"{THIS}.Part", "size": 3, "inner": {"_target_": f"{THIS}.Part", "size": 4}},
            },
        },
        "model",
    )
    assert part.inner["list"][0].size == 2
    assert part.inner["list"][1] == 5
    assert part.inner["plain"] == {"a": {"b": 1}}
    assert part.inner["deep"].inner.size == 4


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        ({"_target_": "nowhere.Net"}, "model.inner"),
        ([1, {"_target_": "nowhere.Net"}], "model.inner[1]"),
        ({"a": {"_target_": "nowhere.Net"}}, "model.inner.a"),
    ],
)
def test_an_error_inside_says_where(inner: Any, where: str) -> None:
    message = _message({"_target_": f"{THIS}.Part", "size": 1, "inner": inner})
    assert message.startswith(f"{where}._target_=nowhere.Net cannot be imported: ")


def test_the_section_is_left_as_it_was() -> None:
    section = {"_target_": f"{THIS}.Part", "size": 1, "inner": {"_target_": f"{THIS}.Part", "size": 2}}
    targets.build(section, "model")
    assert section == {"_target_": f"{THIS}.Part", "size": 1, "inner": {"_target_": f"{THIS}.Part", "size": 2}}


def test_an_unknown_argument_is_refused_with_those_there_are() -> None:
    assert _message({"_target_": f"{THIS}.Part", "size": 1, "sise": 2}) == (
        "model: Part cannot be called so: got an unexpected keyword argument 'sise'. It takes: size, inner, scale."
    )


def test_a_missing_argument_is_refused() -> None:
    assert _message({"_target_": f"{THIS}.Part", "scale": 1.0}) == (
        "model: Part cannot be called so: missing a required argument: 'size'. It takes: size, inner, scale."
    )


def test_what_the_component_raises_passes_through() -> None:
    with pytest.raises(ValueError, match=r"^size is -1$"):
        targets.build({"_target_": f"{THIS}.Part", "size": -1}, "model")


# Arguments that come from the data


def test_attributes_stand_in_for_arguments_that_are_missing_or_null() -> None:
    data = SimpleNamespace(num_classes=10, width=7, depth=99)
    built = targets.build({"_target_": f"{THIS}.Filled", "width": None}, "model", defaults_from=data)
    assert (built.num_classes, built.width) == (10, 7)
    assert built.depth == 3, "an argument with a default of its own keeps it"


def test_what_the_section_gives_stands() -> None:
    data = SimpleNamespace(num_classes=10, width=7)
    built = targets.build({"_target_": f"{THIS}.Filled", "num_classes": 2, "width": 1}, "model", defaults_from=data)
    assert (built.num_classes, built.width) == (2, 1)


def test_a_collecting_argument_takes_nothing_from_the_data() -> None:
    data = SimpleNamespace(num_classes=10, rest={"not": "meant"})
    assert targets.build({"_target_": f"{THIS}.Filled"}, "model", defaults_from=data).rest == {}


def test_a_required_argument_that_the_data_lacks_is_refused() -> None:
    message = _message({"_target_": f"{THIS}.Filled"}, defaults_from=SimpleNamespace(width=7))
    assert message.startswith("model: Filled cannot be called so: missing a required argument: 'num_classes'.")


def test_a_component_without_a_signature_is_called_as_it_is() -> None:
    assert targets.build({"_target_": "builtins.dict", "a": 1}, "model") == {"a": 1}


def test_an_argument_that_neither_the_section_nor_the_data_gives_is_named() -> None:
    with pytest.raises(UserError, match=r"model.size is null, and the data doesn't say it: SimpleNamespace has no"):
        targets.build({"_target_": f"{THIS}.Part", "size": None}, "model", defaults_from=SimpleNamespace())


def test_a_null_of_a_factory_that_collects_keywords_is_filled_too() -> None:
    """`timm.create_model` drops nulls without a word: they would be the 1000 classes of its own default."""
    data = SimpleNamespace(num_classes=3, rest={"not": "meant"})
    built = targets.build(
        {"_target_": f"{THIS}.collecting", "name": "net", "num_classes": None, "rest": None},
        "model",
        defaults_from=data,
    )
    assert built == ("net", {"num_classes": 3, "rest": {"not": "meant"}})
    assert targets.build({"_target_": f"{THIS}.collecting", "name": "net"}, "model", defaults_from=data)[1] == {}
    built = targets.build({"_target_": "builtins.dict", "num_classes": None}, "model", defaults_from=data)
    assert built == {"num_classes": 3}, "without a signature"


def test_a_null_of_such_a_factory_that_the_data_does_not_say_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model.other is null, and the data .* Set model.other=…, leave model.other out"
    ):
        targets.build({"_target_": f"{THIS}.collecting", "name": "net", "other": None}, "model", defaults_from=object())


# Hydra's own keys


def test_arguments_by_position_come_after_those_of_the_call() -> None:
    inner = {"_target_": f"{THIS}.Part", "_args_": [3]}
    assert targets.build({"_target_": f"{THIS}.Part", "_args_": [7, inner]}, "model").inner.size == 3
    built = targets.build({"_target_": f"{THIS}.Part", "_args_": [inner], "scale": 2.0}, "model", 7)
    assert (built.size, built.inner.size, built.scale) == (7, 3, 2.0)


def test_an_argument_by_position_is_not_taken_from_the_data() -> None:
    data = SimpleNamespace(num_classes=10, width=7)
    built = targets.build({"_target_": f"{THIS}.Filled", "_args_": [2]}, "model", defaults_from=data)
    assert (built.num_classes, built.width) == (2, 7)


def test_a_partial_is_completed_by_its_caller() -> None:
    section = {"_target_": f"{THIS}.Part", "_partial_": True, "scale": 2.0}
    assert targets.build({"_target_": f"{THIS}.Part", "size": 1, "inner": section}, "model").inner(5).size == 5
    made = targets.build(section | {"_args_": [4]}, "model")
    assert (made().size, made(scale=3.0).scale) == (4, 3.0)
    assert targets.build(section | {"_partial_": False, "size": 1}, "model").size == 1


def test_a_partial_with_an_unknown_argument_is_refused() -> None:
    assert _message({"_target_": f"{THIS}.Part", "_partial_": True, "sise": 2}) == (
        "model: Part cannot be called so: got an unexpected keyword argument 'sise'. It takes: size, inner, scale."
    )


@pytest.mark.parametrize("option", [{"_args_": "ab"}, {"_partial_": 1}, {"_recursive_": False}, {"_convert_": "all"}])
def test_other_uses_of_hydras_keys_are_refused(option: dict[str, Any]) -> None:
    assert _message({"_target_": f"{THIS}.Part", "size": 1} | option).startswith(
        "model: of Hydra's own keys there are _args_, a list, and _partial_, true or false. "
    )


def test_a_module_that_ends_the_process_says_so(tmp_path: Path) -> None:
    (tmp_path / "targets_package" / "ends.py").write_text("import sys\nsys.exit(0)\n")
    said = _message({"_target_": "targets_package.ends.Net"})
    assert said.startswith("model._target_=targets_package.ends.Net cannot be imported: SystemExit: 0. ")
