"""Settings files and overrides: what is refused, and what the refusal says."""

import dataclasses
from typing import Literal

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import (
    build_settings,
    given_values,
    parse_settings,
    read_yaml,
    setting,
    show_settings,
    write_settings,
)


@dataclasses.dataclass
class Settings:
    model: str = setting(help="folder")
    rate: float = setting(5e-6, help="rate")
    steps: int = setting(100, help="steps")
    kind: Literal["dpo", "none"] = setting("dpo", help="kind")
    limit: int | None = setting(None, help="limit")
    names: list[str] = setting(["a"], help="names")
    flag: bool = setting(False, help="flag")
    title: str | None = setting(None, help="title")


def parse(*argv: str) -> Settings:
    return parse_settings(Settings, argv, program="program.py", about="About.")


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_command_line_wins_over_the_file(config):
    settings = parse("--config", config("model: m\nrate: 1.0e-3\nsteps: 7"), "--steps", "9")
    assert (settings.model, settings.rate, settings.steps) == ("m", 1e-3, 9)


def test_dashes_are_underscores_in_names_only():
    @dataclasses.dataclass
    class Dashed:
        dry_run: bool = setting(False, help="flag")
        title: str = setting("", help="title")

    given = parse_settings(Dashed, ["--title=a-b", "--dry-run"], program="program.py", about="About.")
    assert given == Dashed(dry_run=True, title="a-b")


def test_a_token_is_neither_shown_nor_saved(tmp_path):
    @dataclasses.dataclass
    class WithToken:
        hub_token: str | None = setting(None, help="token")
        model: str = setting("m", help="folder")

    given = WithToken(hub_token="hf_secret")
    assert "hf_secret" not in show_settings(given, "title")
    write_settings(given, tmp_path / "settings.yaml")
    assert "hf_secret" not in (tmp_path / "settings.yaml").read_text()
    assert "model: m" in (tmp_path / "settings.yaml").read_text()


def test_yaml_text_5e_6_is_a_number(config):
    assert parse("--config", config("model: m\nrate: 5e-6")).rate == 5e-6  # YAML 1.1 reads 5e-6 as text


def test_none_is_a_choice_where_it_is_one_and_nothing_elsewhere():
    settings = parse("--model", "m", "--kind", "none", "--limit", "none", "--title", "none")
    assert (settings.kind, settings.limit, settings.title) == ("none", None, None)


def test_a_bare_flag_is_true_and_lists_take_commas():
    settings = parse("--model", "m", "--flag", "--names", "x, y")
    assert settings.flag is True
    assert settings.names == ["x", "y"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rate", "1"], "missing setting 'model'"),
        (["--model", "m", "--stepz", "1"], "unknown setting 'stepz'.*did you mean 'steps'"),
        (["--model", "m", "--steps", "many"], "'steps' is 'many'.*a whole number"),
        (["--model", "m", "--steps", "1.5"], "'steps' is '1.5'.*a whole number"),
        (["--model", "m", "--flag", "maybe"], "'flag' is 'maybe'.*true or false"),
        (["--model", "m", "--kind", "ppo"], "'kind' is 'ppo'.*one of dpo, none"),
        (["--model", "m", "--steps", "none"], "'steps' is 'none'"),
        (["--model", "m", "stray"], "unexpected argument 'stray'"),
        (["--config", "absent.yaml"], "cannot read config file absent.yaml"),
    ],
)
def test_a_refusal_names_the_offender(argv, words):
    with pytest.raises(BadInputError, match=words):
        parse(*argv)


def test_broken_yaml_is_named_with_its_line(config):
    with pytest.raises(BadInputError, match=r"run\.yaml, line 2 is not valid YAML"):
        read_yaml(config("model: m\n  rate: [1"))


def test_a_yaml_list_is_not_settings(config):
    with pytest.raises(BadInputError, match="must hold 'key: value' lines"):
        read_yaml(config("- model"))


def test_true_is_not_a_number():
    with pytest.raises(BadInputError, match="'steps' is True"):
        build_settings(Settings, {"model": "m", "steps": True})


def test_saved_settings_repeat_the_run(tmp_path):
    settings = parse("--model", "m", "--rate", "0.1", "--names", "x,y", "--kind", "none")
    write_settings(settings, tmp_path / "saved.yaml")
    assert parse("--config", str(tmp_path / "saved.yaml")) == settings


def test_no_arguments_print_the_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_the_table_shows_every_value():
    table = show_settings(parse("--model", "m"), "title")
    assert table.splitlines()[0] == "title"
    assert "  limit  -" in table


# --- files and values of strangers: one short sentence ----------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: ü\n".encode("utf-16"), "is not UTF-8 text"),
        ("model: m\n".encode("utf-16-le"), "is not valid YAML"),
        ("model: ü\n".encode("latin-1"), "is not UTF-8 text .byte 7.; save it as UTF-8"),
        (b"model: " + b"[" * 1_000_000, "is nested too deep"),
        (b"model: " + b"{a: " * 1_000_000, "is nested too deep"),
        (b"- " * 100_000, "is nested too deep"),
        (b"model: &m [*m]", "within itself"),
        (b"steps: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"model: m\nsteps: 0x" + b"f" * 5000, "'steps' is a number of 6,000 digits"),
        (b"model: 2026-06-31", "is not valid YAML"),
        (b"model: m\nsteps: 1\nmodel: n", "line 3 is not valid YAML: key 'model' stands there twice"),
        (b"model: m\nnames: {b: 1, b: 2}", "line 2 is not valid YAML: key 'b' stands there twice"),
        (BOMB.encode(), "holds over 100,000 values with its aliases"),
    ],
)
def test_a_config_file_that_cannot_be_meant_gives_one_short_sentence(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=words) as refused:
        parse("--config", str(path))
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_aliases_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: &m m\ntitle: *m\nnames: [*m, *m]", encoding="utf-8-sig")
    settings = parse("--config", str(path))
    assert (settings.model, settings.title, settings.names) == ("m", "m", ["m", "m"])


@pytest.mark.parametrize("value", ["9" * 5000, "x" * 10_000_000, "[" * 100_000, "1e999", "nan"])
def test_a_refused_value_is_quoted_short(value):
    with pytest.raises(BadInputError, match="'steps' is") as refused:
        parse("--model", "m", "--steps", value)
    assert len(str(refused.value)) < 400


def test_a_large_whole_number_of_a_file_is_not_rounded(config):
    assert parse("--config", config(f"model: m\nsteps: {2**60 + 1}")).steps == 2**60 + 1


@dataclasses.dataclass
class Asking:
    base_url: list[str] = setting([], help="servers")
    data: str = setting("", help="file")


@pytest.mark.parametrize(
    "argv",
    [
        ["--base_url", "http://me:hunter2@host:8000/v1"],
        ["--base_url", "http://host:8000,https://hunter2@host"],
        ["--base_url", "me:hunter2@host:8000"],
        ["--base_url", "http://me:hunter2/with?slash@host"],
        ["--base_url", "http://me:hunter2,comma@host"],
        ["--base_url", "http://me:123/45hunter2@host"],  # begins like a port and a path
        ["--base_url", "http://me:pass@hunter2@host"],
        ["--base_url", "http://me:pa#hunter2@host"],
        ["--base_url", "http://me%3Ahunter2@host"],
        ["--base_url", "http://hunter2@[::1]:8000/v1"],
        ["--base_url", "http:/me:hunter2@host"],
        ["--base_url", "http:\\\\me:hunter2@host"],
        ["--data", "https://me:123/hunter2@host/file"],
        ["--data", "https://me:hunter2@[2001:db8::1]/file"],
        ["--data", "https://hunter2%40@host/file"],
        ["--data", "https://me:hunter2@host/file"],
        ["http://me:hunter2@host:8000/v1"],
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(argv):
    with pytest.raises(BadInputError, match="password") as refused:
        parse_settings(Asking, argv, program="program.py", about="About.")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://host:8000/v1", "host:8000", "http://a:1/v1,http://b:2", "http://[::1]:80/%40x"]
)
def test_an_address_without_a_password_is_taken(url):
    assert build_settings(Asking, {"base_url": url}).base_url == url.split(",")


@pytest.mark.parametrize("data", ["https://hub/owner/name@rev", "me@host:/data", "a@b.json", "hf://owner/name@main"])
def test_an_at_sign_outside_of_an_address_is_taken(data):
    assert build_settings(Asking, {"data": data}).data == data


def test_a_wrong_key_beside_a_config_file_is_not_blamed_on_the_file_alone(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("size: 3\n")
    assert given_values(["--config", str(config), "--betta", "1"])[1] == f"{config} and the command line"
    assert given_values(["--config", str(config)])[1] == str(config)
    assert given_values(["--betta", "1"])[1] == "command line"
