"""Configs: what is written is read back, and every mistake is named, all at once."""

from __future__ import annotations

import time
import types
import typing
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.commands.config_flags import resolve_config
from tinyagent_fast.config import (
    Config,
    DataConfig,
    TrainConfig,
    check_config,
    dump_config,
    parse_config,
    to_mapping,
    typed,
)
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.errors import ConfigError, UserError
from tinyagent_fast.presets import PRESETS, load_config, preset_config
from tinyagent_fast.runs import Run
from tinyagent_fast.strict_yaml import load_yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "yes",
        "1e5",
        "2024-01-01",
        "0x1",
        "- a",
        "a: b",
        "# c",
        "",
        " ",
        "%",
        "\ufeff",
        "\x85",
        "\u2028",
        "ä\u2029",
        "ä",
    ]
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Give any value that a field may have by its type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return st.sampled_from(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(kind) for kind in typing.get_args(hint)])
    if is_dataclass(hint):
        return configs(hint)  # type: ignore[arg-type]
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: TEXT,
        Path: TEXT.filter(lambda text: "\0" not in text).map(Path),
    }[hint]


def configs(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{item.name: values(hints[item.name]) for item in fields(kind)})


@given(configs(Config))
@settings(max_examples=60, deadline=None)
def test_a_config_that_is_written_is_read_back_equal(config: Config) -> None:
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    "name", ["a", "ä", "a\x85b", "\u2028", "a\u2029 ", "null", "2e-4", "'", ""]
)
def test_any_name_is_read_back_as_it_was_written(name: str) -> None:
    config = replace(Config(), name=name)
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_good_config_and_survives_its_file(name: str) -> None:
    config = preset_config(name)
    assert config.preset == name
    check_config(config)
    assert parse_config(dump_config(config), base=Config()) == config
    assert (PRESETS[name].__doc__ or "").strip()


def test_an_unknown_preset_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'") as caught:
        preset_config("papers")
    assert "auto, cpu, nano, smoke" in caught.value.fix


def test_keys_that_are_left_out_keep_the_values_of_the_base() -> None:
    base = preset_config("l4")
    config = parse_config("train: {batch: 7}\nlora: {rank: 64}", base)
    assert config == replace(
        base, train=replace(base.train, batch=7), lora=replace(base.lora, rank=64)
    )
    assert parse_config("", base) == base


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, source="my.yaml")
    assert "my.yaml" in caught.value.what
    return caught.value.why.split("\n       ")


def test_all_unknown_keys_and_wrong_values_are_reported_at_once() -> None:
    text = """
        trian: {batch: 1}
        train: {learning_rte: 2e-4, batch: two, epochs: [1]}
        model: {weights: nf5, backend: true, revision: 5}
        data: {limit_entries: 1.5, on-bad-entry: skip}
        lora: 16
        eval: {before_and_after: 1, sample: true}
    """
    wanted = {
        "trian": "'train'",
        "train.learning_rte": "'learning_rate'",
        "train.batch": "a whole number or auto",
        "train.epochs": "a number",
        "model.weights": "one of nf4, bf16, fp16, fp32",
        "model.backend": "one of auto, unsloth, transformers",
        "model.revision": "a text (put it in quotes) or null",
        "data.limit_entries": "a whole number or null",
        "lora": "a mapping",
        "eval.before_and_after": "true or false",
        "eval.sample": "a whole number",
    }
    problems = dict(problem.split(": ", 1) for problem in problems_of(text))
    assert list(problems) == list(wanted)
    for setting, what in wanted.items():
        assert what in problems[setting]


def test_an_unknown_key_that_is_like_no_other_lists_the_known_ones() -> None:
    (problem,) = problems_of("lora: {zzz: 1}")
    assert "rank, alpha, dropout, targets" in problem


@pytest.mark.parametrize("text", ["2e-4", "'2e-4'", "0.0002", "2.0e-4", "2.0E-4"])
def test_every_way_to_write_a_number_gives_that_number(text: str) -> None:
    assert parse_config(f"train: {{learning_rate: {text}}}").train.learning_rate == 2e-4


def test_a_whole_number_is_taken_for_a_fraction() -> None:
    epochs = parse_config("train: {epochs: 3}").train.epochs
    assert (epochs, type(epochs)) == (3.0, float)


@pytest.mark.parametrize("text", [".nan", ".inf", "nan", "-inf", "true", "null", "''", "{}"])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    (problem,) = problems_of(f"train: {{epochs: {text}}}")
    assert problem.endswith("is not a number")


@pytest.mark.parametrize(
    ("text", "choice"),
    [("true", "true"), ("false", "false"), ("'true'", "true"), ("on", "true"), ("unsloth",) * 2],
)
def test_a_choice_that_yaml_takes_for_a_truth_value_is_understood(text: str, choice: str) -> None:
    config = parse_config(f"model: {{gradient_checkpointing: {text}}}")
    assert config.model.gradient_checkpointing == choice
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("off", ["off", "no", "false", "Off", "FALSE", "'off'"])
@pytest.mark.parametrize("on", ["on", "yes", "true", "ON", "True", '"on"'])
def test_choices_and_truth_values_are_understood_however_yaml_spells_them(
    off: str, on: str
) -> None:
    text = f"track: {off}\ntrain: {{qat: {off}, shared_prefix: {on}}}\n"
    config = parse_config(text + f"eval: {{before_and_after: {on}}}")
    assert (config.track, config.train.qat, config.train.shared_prefix) == ("off", "off", "on")
    assert config.eval.before_and_after is True
    assert parse_config(f"train: {{shared_prefix: {off}}}").train.shared_prefix == "off"
    assert parse_config(f"eval: {{before_and_after: {off}}}").eval.before_and_after is False
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("word", ["no", "on", "y", "N", "Off", "YES"])
def test_a_word_that_yaml_1_1_takes_for_a_truth_value_is_a_name(word: str) -> None:
    config = parse_config(f"name: {word}\nruns: {word}\ndata: {{train: {word}}}")
    assert (config.name, config.runs, config.data.train) == (word, Path(word), Path(word))
    assert load_yaml(f"{word}: {word}") == {word: word}


@pytest.mark.parametrize("text", ["train: {qat: on}", "track: yes", "train: {batch: on}"])
def test_a_truth_value_that_no_choice_says_is_refused(text: str) -> None:
    (problem,) = problems_of(text)
    assert " is not " in problem


@pytest.mark.parametrize(
    "value",
    [
        "!!timestamp x", "!!bool x", "!!int ''", "!!float x", "!!binary '='", "!!set x",
        "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!own x", "*missing",
        "9" * 5000, "? [a]\n: b", "!!omap x", "!!pairs [x]", "0o9", "1:99:99",
    ],
)  # fmt: skip
def test_odd_tags_and_values_are_the_users_error(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(f"train:\n  batch: {value}")
    with pytest.raises(ConfigError):
        parse_config(value)


@pytest.mark.parametrize("tag", ["!!int 5", "!!str x", "!!float 1.5", "!own x", "!!map {}"])
def test_a_tag_is_refused_also_where_its_value_fits(tag: str) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        load_yaml(f"a: {tag}")


@pytest.mark.parametrize("text", ["12:30", "1:1:1", "010", "9" * 4000, "0x" + "f" * 4000, "1.5:3"])
def test_what_is_a_number_to_yaml_1_1_only_or_a_gigantic_one_is_a_text(text: str) -> None:
    assert load_yaml(f"a: {text}") == {"a": text}


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("-7", -7), ("0x1F", 31), ("1_000", 1000)]
)
def test_whole_numbers_are_read_as_such(text: str, number: int) -> None:
    assert load_yaml(text) == number


@pytest.mark.parametrize("text", ["1: a\n0x1: b", "true: a\nTrue: b", "null: a\n~: b"])
def test_a_key_given_twice_in_other_words_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="twice, again in line 2"):
        load_yaml(text)


def test_aliases_cannot_make_a_document_larger_than_the_memory() -> None:
    lines = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise("abcdefghij")]
    with pytest.raises(ConfigError, match="aliases make it too large"):
        parse_config("\n".join(["a: &a [x, x]", *lines]))
    with pytest.raises(ConfigError, match="leads back to itself"):
        parse_config("train: &t {batch: *t}")
    assert load_yaml("a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_a_file_that_would_take_long_is_refused_at_once() -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="characters"):
        parse_config("- a\n" * 300_000)
    assert time.process_time() - started < 1


def test_of_a_gigantic_file_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # more than any memory; it takes no room on the disk
    for read in (load_config, lambda path: Run(path.parent).config(), load_catalogue):
        with pytest.raises(UserError, match="more than 250,000 characters"):
            read(path)


def test_a_message_does_not_repeat_a_gigantic_value() -> None:
    (problem,) = problems_of(f"train: {{batch: {'x' * 100_000}}}")
    assert len(problem) < 1000


@pytest.mark.parametrize(
    "text",
    ["train: {max_steps: 99999999999}", "train: {seed: -1}", "data: {seed: 4294967296}"],
)
def test_numbers_that_no_library_takes_are_refused_early(text: str) -> None:
    with pytest.raises(ConfigError, match="must be"):
        check_config(parse_config(text))


@pytest.mark.parametrize("name", ["epochs", "max_steps", "learning_rate", "seed"])
def test_a_number_beyond_all_floats_is_refused_as_others(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", ".")):
        check_config(parse_config(f"train: {{{name}: 1{'0' * 400}}}"))


def test_names_may_be_written_with_hyphens_as_on_the_command_line() -> None:
    assert parse_config("train: {learning-rate: 1e-3}").train.learning_rate == 1e-3
    (problem,) = problems_of("train: {learning-rate: 1e-3, learning_rate: 2e-3}")
    assert problem.startswith("train.learning_rate: given twice")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("train: {", "it is no valid YAML"),
        ("a: b: c", "it is no valid YAML"),
        ("\x00", "it is no valid YAML"),
        ("name: 2024-99-99", "it is no valid YAML: month must be in 1..12"),
        (
            "train: {batch: 1}\nlora: {}\ntrain: {batch: 2}",
            "`train` is given twice, again in line 3",
        ),
        ("train:\n  batch: 1\n  batch: 1", "`batch` is given twice, again in line 3"),
        ("[" * 1500, "nested too deeply"),
        ("- train", "the top level: must be a mapping, got ['train']"),
    ],
)
def test_a_text_that_is_no_config_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert why in caught.value.why


def test_yaml_without_repeated_keys_is_read_as_usual() -> None:
    text = "a: &x {b: 1, c: [2, 3]}\nd: {<<: *x, b: 4}\n1: one\n"
    assert load_yaml(text) == yaml.safe_load(text)


def test_a_written_config_has_every_setting() -> None:
    def names(kind: type[Any]) -> dict[str, Any]:
        hints = typing.get_type_hints(kind)
        return {
            item.name: names(hints[item.name]) if is_dataclass(hints[item.name]) else None
            for item in fields(kind)
        }

    def keys(mapping: dict[str, Any]) -> dict[str, Any]:
        return {k: keys(v) if isinstance(v, dict) else None for k, v in mapping.items()}

    assert keys(to_mapping(Config())) == names(Config)
    assert keys(yaml.safe_load(dump_config(Config()))) == names(Config)


WRONG = [
    ("model", "max_length_tokens", 0),
    ("lora", "rank", 0),
    ("lora", "alpha", -1),
    ("lora", "dropout", 1.0),
    ("train", "batch", 0),
    ("train", "accumulation", 0),
    ("train", "learning_rate", 0.0),
    ("train", "learning_rate", 1.0),
    ("train", "warmup", 1.0),
    ("train", "epochs", 0.0),
    ("train", "max_grad_norm", 0.0),
    ("train", "weight_decay", -0.1),
    ("train", "max_steps", 0),
    ("train", "save_every_steps", 0),
    ("train", "early_stopping", 0),
    ("train", "threads", 0),
    ("train", "threads", 100_000),
    ("train", "evaluations", -1),
    ("eval", "batch", 0),
    ("eval", "max_new_tokens", 0),
    ("eval", "parity_prompts", -1),
    ("eval", "sample", -1),
    ("eval", "limit", 0),
    ("eval", "before_limit", 0),
    ("data", "generated_entries", 0),
    ("data", "own_passes", 0),
    ("data", "own_passes", 100_000),
    ("data", "limit_entries", 0),
    ("data", "validation_entries", -1),
]


def changed(config: Config, section: str, name: str, value: object) -> Config:
    part = replace(getattr(config, section), **{name: value})
    return replace(config, **{section: part})


@pytest.mark.parametrize(("section", "name", "value"), WRONG)
def test_a_setting_out_of_range_is_refused_by_name(section: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(changed(Config(), section, name, value))
    flag = f"{section}.{name.replace('_', '-')}"
    assert any(line.strip().startswith(flag) for line in caught.value.why.splitlines())
    assert str(value) in caught.value.why


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        ({"with_generated": True, "prompts": "short"}, "data.train"),
        ({"with_generated": True, "train": Path("mine.json")}, "data.prompts"),
        ({"own_passes": 2, "train": Path("mine.json")}, "data.with-generated"),
    ],
)
def test_mixing_with_generated_rows_says_what_it_needs(data: dict[str, Any], needed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(Config(data=DataConfig(**data)))
    assert f"needs {needed}" in caught.value.why


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_setting_that_is_no_finite_number_is_refused(value: float) -> None:
    for section, name in (("train", "epochs"), ("train", "weight_decay"), ("lora", "dropout")):
        with pytest.raises(ConfigError) as caught:
            check_config(changed(Config(), section, name, value))
        flag = f"{section}.{name.replace('_', '-')}"
        assert f"{flag} must be a finite number, got {value}" in caught.value.why


def test_all_settings_out_of_range_are_listed_together() -> None:
    config = Config()
    wrong = {(section, name): value for section, name, value in WRONG}
    for (section, name), value in wrong.items():
        config = changed(config, section, name, value)
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    for section, name in wrong:
        assert f"{section}.{name.replace('_', '-')} " in caught.value.why
    assert caught.value.what.startswith(f"{len(caught.value.why.splitlines())} setting(s)")


@pytest.mark.parametrize(
    ("section", "name", "value"), [("eval", "sample", 0), ("data", "validation_entries", 0)]
)
def test_evaluations_without_anything_to_evaluate_are_refused(
    section: str, name: str, value: int
) -> None:
    config = changed(Config(), section, name, value)
    with pytest.raises(ConfigError, match=r"or set train\.evaluations to 0"):
        check_config(config)
    check_config(changed(config, "train", "evaluations", 0))


def resolve(*arguments: str, default: str = "cpu", start: Config | None = None) -> Config:
    return resolve_config("train", arguments, lambda: default, start=start)


@pytest.mark.parametrize("weights", ["nf4", "bf16", "fp16", "fp32"])
def test_unsloth_is_refused_in_fp32_which_it_does_not_compute_in(weights: str) -> None:
    model = replace(Config().model, backend="unsloth", weights=weights)
    config = replace(Config(), model=model)
    if weights == "fp32":
        with pytest.raises(ConfigError, match=r"fp32 needs model\.backend transformers"):
            check_config(config)
    else:
        check_config(config)


def test_flags_go_before_the_file_which_goes_before_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {batch: 3, epochs: 2}\nlora: {rank: 8}")
    config = resolve("--preset", "l4", "--config", str(path), "--train.batch", "5")
    assert (config.train.batch, config.train.epochs, config.lora.rank) == (5, 2.0, 8)
    assert config.train.accumulation == preset_config("l4").train.accumulation
    assert config.preset == "l4"


def test_the_machine_chooses_a_preset_only_if_nothing_names_one(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("preset: t4\ntrain: {batch: 3}")

    def fail() -> str:
        pytest.fail("a preset was named")

    assert resolve(default="smoke") == preset_config("smoke")
    assert resolve("--preset", "auto", default="smoke") == preset_config("smoke")
    for arguments in (["--config", str(path)], ["--preset", "auto", "--config", str(path)]):
        named = resolve_config("train", arguments, fail)
        assert named == changed(preset_config("t4"), "train", "batch", 3)
    assert resolve("--config", str(path), "--preset", "l4").preset == "l4"


def test_a_preset_named_in_a_file_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("preset: a10")
    with pytest.raises(ConfigError, match="did you mean 'a100'"):
        resolve("--config", str(path))


def test_a_resumed_run_keeps_its_config_and_takes_no_preset(tmp_path: Path) -> None:
    start = changed(preset_config("smoke"), "train", "batch", 9)
    assert resolve("--preset", "auto", start=start) == start
    assert resolve("--eval.limit", "3", start=start).train.batch == 9
    for arguments in (["--preset", "cpu"], ["--config", str(tmp_path / "x.yaml")]):
        with pytest.raises(ConfigError, match="--resume together with --preset or --config"):
            resolve(*arguments, start=start)


def test_a_config_file_that_cannot_be_read_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it cannot be read"):
        resolve("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it cannot be read"):
        resolve("--config", str(tmp_path / "binary.yaml"))


def test_the_batch_is_a_number_or_automatic_from_file_and_flag(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {batch: auto}")
    config = resolve("--config", str(path))
    assert config.train.batch == "auto"
    assert parse_config(dump_config(config)) == config
    assert resolve("--train.batch", "auto").train.batch == "auto"
    for wrong in ("null", "true", "Auto", "2.0"):
        (problem,) = problems_of(f"train: {{batch: {wrong}}}")
        assert "is not a whole number or auto" in problem
    with pytest.raises(AssertionError):
        assert config.train.rows_per_batch


def test_a_config_that_is_out_of_range_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {batch: 0}")
    with pytest.raises(ConfigError, match=r"train\.batch must be 1 or more, got 0"):
        resolve("--config", str(path))
    with pytest.raises(ConfigError, match=r"lora\.rank must be 1 or more, got -2"):
        resolve("--lora.rank", "-2")


def test_settings_of_python_code_get_their_types_or_are_refused_together() -> None:
    @typed
    def given(config: Config) -> Config:
        return config

    config = given(
        Config(
            runs="there",  # type: ignore[arg-type]
            data=DataConfig(train="a.json"),  # type: ignore[arg-type]
            train=TrainConfig(epochs=2),
        )
    )
    assert (config.runs, config.data.train) == (Path("there"), Path("a.json"))
    wrong = Config(
        track="trackoi",  # type: ignore[arg-type]
        train=TrainConfig(epochs="two", batch=True),  # type: ignore[arg-type]
        eval=None,  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError) as caught:
        given(wrong)
    for said in (
        "did you mean 'trackio'",
        "config.train.epochs: 'two' is not a number",
        "train.batch: True is not",
        "eval: None is not an object of the type EvalConfig",
    ):
        assert said in str(caught.value)
