"""How text is read: the traps of YAML 1.1, in a file and on the command line alike."""

from pathlib import Path

import pytest

from lmtrain.config import Config, ConfigError, load


def read(tmp_path: Path, key: str, text: str, by: str) -> Config:
    """The configuration with `key` written as `text`, in the file or on the command line."""
    section, name = key.split(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"{section}:\n  {name}: {text}\n" if by == "file" else "")
    written = [f"{key}={text}"] if by == "override" else []
    return load(path, ["model.mixers.a={kind: dense}", "model.pattern=a", *written])


both = pytest.mark.parametrize("by", ["file", "override"])


@both
@pytest.mark.parametrize("text", ["010", "on", "no", "1e3", "1_000", "12:30:00", "0x10", "1.0", "true", "a=b", "a b"])
def test_text_is_verbatim(text: str, by: str, tmp_path: Path) -> None:
    assert read(tmp_path, "run.dir", text, by).run.dir == text


@pytest.mark.parametrize("text", ["a: b", "{x}", "[x", "# x", "~", "'x'", '"x"', "a, b", "&a", "*a", "!a", "é", " x"])
def test_text_on_the_command_line_is_verbatim_whatever_yaml_would_make_of_it(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, "run.dir", text, "override").run.dir == text


@pytest.mark.parametrize(
    ("text", "value"), [('"null"', "null"), ("'~'", "~"), ('"x # y"', "x # y"), (">-\n    x", "x")]
)
def test_quoted_text_in_a_file(text: str, value: str, tmp_path: Path) -> None:
    assert read(tmp_path, "run.dir", text, "file").run.dir == value


def test_a_folded_pattern(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  mixers: {a: {kind: dense}}\n  pattern: >\n    a a\n    a a+a2\n")
    assert load(path, ["model.mixers.a2={kind: local}"]).model.pattern == "a a a a+a2"


@both
@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("1e3", 1000), ("1_000", 1000), ("1.5e1", 15), ("20.0", 20), ("+3", 3), ("'12'", 12)],
)
def test_whole_numbers(text: str, value: int, by: str, tmp_path: Path) -> None:
    if by == "override":
        text = text.strip("'")
    steps = read(tmp_path, "train.steps", text, by).train.steps
    assert steps == value
    assert type(steps) is int


@both
@pytest.mark.parametrize(
    "text",
    [
        *(
            "1.5",
            "1e-3",
            "010",
            "0o10",
            "0x10",
            "12:30:00",
            "on",
            "true",
            "abc",
            "1__0",
            "_1",
            "1e",
            "1 0",
            "٣",
        ),
        *(
            "1e99999999999999999999",
            "1e400",
            "1e-400",
            "2147483648",
            "inf",
            "nan",
            ".nan",
            "null",
            "[1]",
            "{a: 1}",
        ),
    ],
)
def test_what_is_no_whole_number(text: str, by: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps.*must be a whole number"):
        read(tmp_path, "train.steps", text, by)


def test_a_leading_zero_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="octal"):
        read(tmp_path, "train.steps", "010", "file")


@both
@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1", 1.0), (".5", 0.5), ("5.", 5.0), ("1E-3", 1e-3)])
def test_numbers(text: str, value: float, by: str, tmp_path: Path) -> None:
    lr = read(tmp_path, "optimizer.lr", text, by).optimizer.lr
    assert lr == value
    assert type(lr) is float


@both
@pytest.mark.parametrize(
    "text", ["nan", ".nan", "inf", "-.inf", "1e999", "yes", "1:30", "0.1.2", "1,5", "00.5x", "null"]
)
def test_what_is_no_number(text: str, by: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr.*must be a number"):
        read(tmp_path, "optimizer.lr", text, by)


@both
def test_true_and_false(by: str, tmp_path: Path) -> None:
    assert read(tmp_path, "model.tied", "true", by).model.tied is True
    assert read(tmp_path, "log.tensorboard", "false", by).log.tensorboard is False


@both
@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1", "0", "2", "True", "FALSE", "null", "[true]"])
def test_what_is_neither_true_nor_false(text: str, by: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.tied.*must be true or false"):
        read(tmp_path, "model.tied", text, by)


@both
def test_null_where_it_means_something(by: str, tmp_path: Path) -> None:
    assert read(tmp_path, "train.micro_batch", "null", by).train.micro_batch is None
    assert read(tmp_path, "data.cache", "null", by).data.cache is None
    assert read(tmp_path, "run.dir", "null", by).run.dir == "runs/config"
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*must be text, not null"):
        read(tmp_path, "data.tokenizer", "null", by)


def test_nothing_on_the_command_line_is_not_null(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        read(tmp_path, "train.micro_batch", "", "override")
    with pytest.raises(ConfigError, match="not empty"):
        read(tmp_path, "data.cache", "", "override")


def test_nothing_in_a_file_is_null(tmp_path: Path) -> None:
    assert read(tmp_path, "train.micro_batch", "", "file").train.micro_batch is None
    with pytest.raises(ConfigError, match=r"train\.steps=null: must be a whole number, not null"):
        read(tmp_path, "train.steps", "", "file")


def test_text_without_control_characters(tmp_path: Path) -> None:
    for text in ("a\nb", "a\tb", "a\x1b[31m"):
        with pytest.raises(ConfigError, match="control characters") as error:
            read(tmp_path, "run.dir", text, "override")
        assert text not in str(error.value)


@both
@pytest.mark.parametrize("text", ["[0.8, 0.9]", "[0.8,9e-1]"])
def test_lists(text: str, by: str, tmp_path: Path) -> None:
    assert read(tmp_path, "optimizer.betas", text, by).optimizer.betas == (0.8, 0.9)


@both
@pytest.mark.parametrize("text", ["0.9", "[0.9]", "[0.9, 0.9, 0.9]", "[0.9, x]", "[0.9, 1]", "{a: 1}", "[0.9, null]"])
def test_what_is_no_list_of_two_shares(text: str, by: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas.*must be"):
        read(tmp_path, "optimizer.betas", text, by)


@both
def test_choices(by: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be adamw or muon; did you mean adamw\?"):
        read(tmp_path, "optimizer.kind", "adam", by)


def test_numbers_of_mixers_are_read_by_their_type_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {mixers: {a: {kind: local, window: 1e2, rotary: 1_000}}, pattern: a}\n")
    assert load(path).model.mixers["a"]["window"] == 100
    assert load(path).model.mixers["a"]["rotary"] == 1000.0
    with pytest.raises(ConfigError, match=r"model\.mixers\.a\.window=1\.5: must be a whole number"):
        load(path, ["model.mixers.a.window=1.5"])
