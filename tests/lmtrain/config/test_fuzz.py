"""Whatever is written, a user sees a ConfigError or gets a configuration that survives being saved."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.config import SECTIONS, ConfigError, load, save

pytestmark = pytest.mark.fault(15)

KEYS = [f"{section}.{name}" for section, of in SECTIONS.items() for name in of.__dataclass_fields__]
KEYS += ["model.mixers.near", "model.mixers.near.window", "model.mixers.x.kind", "train", "model", "nothing"]
WORDS = [
    "null",
    "~",
    "true",
    "on",
    "010",
    "1e3",
    "-1",
    "nan",
    "1e999",
    "12:30",
    "{}",
    "[]",
    "${",
    "${run.dir}",
    "???",
]
WORDS += [
    "{kind: local}",
    "{kind: [a]}",
    "[0.5, 0.9]",
    "${oc.env:HOME}",
    "${model.mixers}",
    "!!int 3",
    "&a",
    "near far",
]
WORDS += [
    "<<",
    "a+b",
    "++",
    "${..}",
    "${oc.select:a,b}",
    "{near: {kind: {a: 1}}}",
    "\\${x}",
    "${oc.decode:'{a: [1]}'}",
]

value = st.one_of(st.sampled_from(WORDS), st.text(max_size=12), st.integers(-3, 2000).map(str), st.floats().map(str))
override = st.one_of(st.builds("{}={}".format, st.sampled_from(KEYS), value), st.text(max_size=20))
line = st.builds(
    "{}{}: {}".format, st.sampled_from(["", "  ", "    "]), st.sampled_from([*SECTIONS, "dir", "near"]), value
)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def accepted_or_refused(path: Path | str, overrides: list[str], folder: Path) -> None:
    try:
        config = load(path, overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert len(lines) == len(error.problems) + 1 > 1  # noqa: PT017 - either outcome is right
        return
    save(config, folder / "saved.yaml")
    assert load(folder / "saved.yaml") == config


@quick
@given(overrides=st.lists(override, max_size=3))
def test_any_override(overrides: list[str], tmp_path: Path) -> None:
    accepted_or_refused("demo", overrides, tmp_path)


@quick
@given(text=st.one_of(st.text(max_size=60), st.lists(line, max_size=6).map("\n".join)))
def test_any_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    accepted_or_refused(path, ["model.mixers.a={kind: dense}", "model.pattern=a"], tmp_path)


@quick
@given(name=st.text(max_size=20))
def test_any_name(name: str, tmp_path: Path) -> None:
    accepted_or_refused(name, [], tmp_path)
