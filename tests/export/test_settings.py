from __future__ import annotations

import json

import pytest

from jql_engine.errors import CheckpointError
from jql_export.settings import check_texts, max_tokens_of, pooling_of

POSITIONS = 512
MODULE = "sentence_transformers.models"


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def write_modules(folder, *kinds, pooling=None):
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"{MODULE}.{kind}"} for i, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    if pooling is not None:
        write(folder / "1_Pooling" / "config.json", pooling)
    return folder


def one_flag_a_mode(mode):
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    assert mode in modes
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{m}": m == mode for m in modes}, "include_prompt": True}


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        (one_flag_a_mode("cls_token"), "cls"),
        (one_flag_a_mode("mean_tokens"), "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ],
)
def test_pooling_is_read_from_both_generations_of_the_format(tmp_path, settings, pooling):
    write_modules(tmp_path, "Transformer", "Pooling", "Normalize", pooling=settings)
    assert pooling_of(tmp_path, None, print) == pooling


def test_modules_of_newer_packages_are_known_by_their_last_name(tmp_path):
    path = "sentence_transformers.sentence_transformer.modules"
    modules = [
        {"type": f"{path}.transformer.Transformer", "path": ""},
        {"type": f"{path}.pooling.Pooling", "path": "1_Pooling"},
    ]
    write(tmp_path / "modules.json", modules)
    write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    assert pooling_of(tmp_path, None, print) == "mean"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (one_flag_a_mode("max_tokens"), "max"),
        (one_flag_a_mode("mean_sqrt_len_tokens"), "mean_sqrt_len"),
        (one_flag_a_mode("cls_token") | {"pooling_mode_mean_tokens": True}, "cls, mean"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({}, "None"),
    ],
)
def test_pooling_that_the_graph_does_not_compute_is_an_error(tmp_path, settings, found):
    write_modules(tmp_path, "Transformer", "Pooling", pooling=settings)
    with pytest.raises(
        CheckpointError, match=rf"1_Pooling/config\.json asks for pooling {found}; supported are cls and mean"
    ):
        pooling_of(tmp_path, None, print)


@pytest.mark.parametrize("requested", [None, "cls"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Dense"),
    ],
)
def test_a_dense_module_is_an_error_whatever_is_requested(tmp_path, kinds, requested):
    write_modules(tmp_path, *kinds)
    write(tmp_path / f"{kinds.index('Pooling')}_Pooling" / "config.json", one_flag_a_mode("cls_token"))
    with pytest.raises(
        CheckpointError, match=r"modules\.json has a module 'Dense'.*supported are Transformer, Pooling, Normalize"
    ):
        pooling_of(tmp_path, requested, print)


@pytest.mark.parametrize("path", ["../1_Pooling", "/1_Pooling", "a/../1_Pooling"])
def test_a_module_outside_of_the_checkpoint_is_named(tmp_path, path):
    write(tmp_path / "1_Pooling" / "config.json", one_flag_a_mode("mean_tokens"))
    (tmp_path / "a").mkdir()
    write(tmp_path / "modules.json", [{"type": f"{MODULE}.Pooling", "path": path}])
    with pytest.raises(CheckpointError, match=rf"modules\.json has a module at '{path}'"):
        pooling_of(tmp_path, None, print)


SNOWFLAKE_PROMPTS = {"prompts": {"query": "query: "}, "default_prompt_name": None}  # as published
NO_DOCUMENT_PROMPT = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "document"}


@pytest.mark.parametrize("settings", [{}, {"prompts": None}, SNOWFLAKE_PROMPTS, NO_DOCUMENT_PROMPT])
@pytest.mark.parametrize("lower", [{}, {"do_lower_case": False}])
def test_a_checkpoint_that_leaves_texts_as_they_are_is_accepted(tmp_path, settings, lower):
    check_texts(tmp_path)
    write(tmp_path / "config_sentence_transformers.json", settings)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 128, **lower})
    check_texts(tmp_path)


@pytest.mark.parametrize("prompts", [{"passage": "passage: "}, {}, None])
def test_a_default_prompt_is_an_error_that_says_what_to_do(tmp_path, prompts):
    settings = {"prompts": prompts, "default_prompt_name": "passage"}
    write(tmp_path / "config_sentence_transformers.json", settings)
    with pytest.raises(CheckpointError, match=r"_transformers\.json.*'passage.*default_prompt_name to null"):
        check_texts(tmp_path)


@pytest.mark.parametrize("settings", [{"prompts": ["a"], "default_prompt_name": "a"}, {"default_prompt_name": ["a"]}])
def test_prompts_of_another_shape_are_refused_alike(tmp_path, settings):
    write(tmp_path / "config_sentence_transformers.json", settings)
    with pytest.raises(CheckpointError, match=r"_transformers\.json has default_prompt_name = "):
        check_texts(tmp_path)


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_lower_case_of_sentence_transformers_is_an_error_that_says_what_to_do(tmp_path, file):
    write(tmp_path / file, {"max_seq_length": 128, "do_lower_case": True})
    with pytest.raises(CheckpointError, match=rf"{file} has do_lower_case = true.*Lowercase"):
        check_texts(tmp_path)


def test_without_modules_the_request_decides(tmp_path):
    assert pooling_of(tmp_path, "cls", print) == "cls"
    assert pooling_of(tmp_path, "mean", print) == "mean"


def test_without_modules_and_request_the_error_asks_for_the_option(tmp_path):
    with pytest.raises(CheckpointError, match="give --pooling cls or --pooling mean"):
        pooling_of(tmp_path, None, print)


def test_an_unknown_request_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="pooling 'max' is unknown; known are cls, mean"):
        pooling_of(tmp_path, "max", print)


def test_modules_that_are_no_json_are_an_error(tmp_path):
    write(tmp_path / "modules.json", "[{")
    with pytest.raises(CheckpointError, match=r"modules\.json is no JSON"):
        pooling_of(tmp_path, None, print)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read: Is a directory"):
        max_tokens_of(tmp_path, POSITIONS, None)


@pytest.mark.parametrize(
    ("sentence_bert", "tokenizer", "expected"),
    [
        ({"max_seq_length": 128}, None, 128),
        (None, {"model_max_length": 256}, 256),
        ({"max_seq_length": 256}, {"model_max_length": 128}, 128),
        ({"max_seq_length": 128}, {"model_max_length": int(1e30)}, 128),
        ({"max_seq_length": 128}, {"model_max_length": 1e30}, 128),
        ({"max_seq_length": None}, {"model_max_length": 256.0}, 256),
        ({"max_seq_length": 8192}, {"model_max_length": 8194}, POSITIONS),
    ],
)
def test_the_smallest_limit_counts_and_positions_cap_it(tmp_path, sentence_bert, tokenizer, expected):
    write_limits(tmp_path, sentence_bert, tokenizer)
    assert max_tokens_of(tmp_path, POSITIONS, None) == expected


@pytest.mark.parametrize("tokenizer", [None, {}, {"model_max_length": 1e30}])
def test_without_a_limit_the_error_asks_for_the_option(tmp_path, tokenizer):
    write_limits(tmp_path, None, tokenizer)
    with pytest.raises(CheckpointError, match=f"give --max-tokens, at most {POSITIONS}"):
        max_tokens_of(tmp_path, POSITIONS, None)


def test_a_request_overrides_the_files(tmp_path):
    write_limits(tmp_path, {"max_seq_length": 128}, {"model_max_length": 128})
    assert max_tokens_of(tmp_path, POSITIONS, 300) == 300
    assert max_tokens_of(tmp_path, POSITIONS, POSITIONS) == POSITIONS


@pytest.mark.parametrize("requested", [POSITIONS + 1, 2, 0, -1])
def test_a_request_out_of_range_is_an_error(tmp_path, requested):
    with pytest.raises(CheckpointError, match=f"--max-tokens says {requested} tokens, expected 3 to {POSITIONS}"):
        max_tokens_of(tmp_path, POSITIONS, requested)


def write_limits(folder, sentence_bert, tokenizer):
    if sentence_bert is not None:
        write(folder / "sentence_bert_config.json", sentence_bert)
    if tokenizer is not None:
        write(folder / "tokenizer_config.json", tokenizer)
