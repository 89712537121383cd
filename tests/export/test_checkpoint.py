from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jql_engine.errors import CheckpointError
from jql_export.families.read import read_encoder
from jql_export.onnx_encoder import read_shape
from jql_export.readouts.classifier import read_classifier
from jql_export.reference import load_encoder
from tests.conftest import FAMILIES, MAX_TOKENS

QKV = "encoder.layer.0.attention.qkv_proj.weight"
WORD = "embeddings.word_embeddings.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def gte(encoders, tmp_path):
    """A GTE checkpoint that a test may change."""
    return shutil.copytree(encoders["gte"], tmp_path / "gte")


@pytest.fixture
def bert(encoders, tmp_path):
    """A BERT checkpoint that a test may change."""
    return shutil.copytree(encoders["bert"], tmp_path / "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_with_its_shape(encoders, family):
    weights = read_encoder(encoders[family])
    spec = weights.spec
    assert (spec.architecture, spec.n_layers, spec.hidden_size, spec.intermediate_size) == (family, 2, 32, 48)
    assert (spec.n_attention_heads, spec.head_size, spec.pad_id, len(weights.layers)) == (4, 8, 1, 2)
    assert (spec.positions, spec.mlp) == (("rope", "geglu") if family == "gte" else ("absolute", "gelu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_leaves_out_the_rows_up_to_the_pad_position(encoders, family):
    rows = json.loads((encoders[family] / "config.json").read_text())["max_position_embeddings"]
    assert rows == MAX_TOKENS + 2 * (family == "xlm-roberta")
    assert read_encoder(encoders[family]).spec.max_positions == MAX_TOKENS


def test_fused_gte_projections_are_split_in_the_published_order(gte):
    tensors, layer = load_file(gte / "model.safetensors"), read_encoder(gte).layers[0]
    qkv = np.concatenate([layer.query.weight, layer.key.weight, layer.value.weight])
    np.testing.assert_array_equal(qkv, tensors[QKV])
    up_gate = np.concatenate([layer.up.weight, layer.gate.weight])
    np.testing.assert_array_equal(up_gate, tensors["encoder.layer.0.mlp.up_gate_proj.weight"])


@pytest.mark.parametrize("prefix", ["new.", "gte."])
def test_a_prefix_before_all_tensors_changes_nothing(encoders, gte, prefix):
    change_tensors(gte, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    assert_same(read_encoder(gte), read_encoder(encoders["gte"]))


def test_sharded_safetensors_are_read(encoders, tmp_path):
    shard(encoders["gte"], tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(read_encoder(tmp_path), read_encoder(encoders["gte"]))


def test_pytorch_model_bin_is_read(encoders, bert):
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert_same(read_encoder(bert), read_encoder(encoders["bert"]))


def test_a_sharded_pytorch_model_bin_is_read(encoders, bert):
    tensors = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    for file, some in shards.items():
        torch.save({name: tensors[name] for name in some}, bert / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}}
    (bert / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(read_encoder(bert), read_encoder(encoders["bert"]))
    assert load_encoder(bert) is not None


def test_parameters_that_were_saved_as_such_are_read(encoders, bert):
    state = {name: torch.nn.Parameter(value) for name, value in load_file(bert / "model.safetensors").items()}
    torch.save(state, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert_same(read_encoder(bert), read_encoder(encoders["bert"]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is a NoneType, expected a tensor"),
        (torch.ones(2, 2).to_sparse(), "is a sparse_coo tensor of torch.float32, expected a strided one"),
        (torch.ones(2, 2, dtype=torch.int8), "is a strided tensor of torch.int8"),
        (torch.ones(2, 2, device="meta"), "is a meta tensor"),
        (torch.tensor(1.0), r"is \[\], expected 2 dimensions"),
    ],
)
def test_what_is_no_plain_tensor_is_named(bert, value, message):
    torch.save(load_file(bert / "model.safetensors") | {WORD: value}, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{WORD} {message}"):
        read_encoder(bert)


def test_buffers_of_older_releases_are_no_part_of_the_encoder(bert):
    extra = {f"embeddings.{name}_ids": torch.zeros(1, MAX_TOKENS).long() for name in ("position", "token_type")}
    change_tensors(bert, lambda tensors: tensors | extra)
    assert set(extra) <= set(read_encoder(bert).unused_tensors)


def test_chunks_of_the_feed_forward_layers_change_nothing(encoders, bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"chunk_size_feed_forward": 8}))
    ids = torch.arange(3, 10)[None]
    found, expected = (load_encoder(place)(input_ids=ids).last_hidden_state for place in (bert, encoders["bert"]))
    assert torch.equal(found, expected)


def test_bf16_weights_are_widened_without_change(encoders, gte, tmp_path):
    widened = shutil.copytree(gte, tmp_path / "widened")
    change_tensors(gte, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    change_tensors(widened, lambda tensors: {name: value.bfloat16().float() for name, value in tensors.items()})
    weights = read_encoder(gte)
    assert weights.word.dtype == np.float32
    assert_same(weights, read_encoder(widened))
    assert not np.array_equal(weights.word, read_encoder(encoders["gte"]).word)


def test_tensors_outside_of_the_encoder_are_named_as_unused(encoders, gte):
    pooler = ("pooler.dense.bias", "pooler.dense.weight")
    assert read_encoder(encoders["bert"]).unused_tensors == pooler
    assert read_encoder(encoders["gte"]).unused_tensors == ()
    change_tensors(
        gte, lambda tensors: {**{f"new.{k}": v for k, v in tensors.items()}, "classifier.bias": torch.ones(2)}
    )
    assert read_encoder(gte).unused_tensors == ("classifier.bias",)


def test_a_stored_position_ids_buffer_is_no_weight(bert):
    change_tensors(bert, lambda tensors: {**tensors, "embeddings.position_ids": torch.arange(MAX_TOKENS)[None]})
    assert "embeddings.position_ids" in read_encoder(bert).unused_tensors


def test_a_layer_beyond_those_of_the_config_is_an_error(gte):
    def third_layer(tensors):
        return tensors | {k.replace("layer.1", "layer.2"): v.clone() for k, v in tensors.items() if "layer.1" in k}

    change_tensors(gte, third_layer)
    message = r"gte: 11 tensors of the encoder have no place.*encoder\.layer\.2\.attention\.o_proj\.bias.* and 6 more"
    with pytest.raises(CheckpointError, match=message):
        read_encoder(gte)


def test_an_unknown_bias_within_a_layer_is_an_error(gte):
    change_tensors(gte, lambda tensors: {**tensors, "encoder.layer.0.mlp.up_gate_proj.bias": torch.ones(96)})
    with pytest.raises(
        CheckpointError, match=r"1 tensors of the encoder have no place.*layer\.0\.mlp\.up_gate_proj\.bias"
    ):
        read_encoder(gte)


def test_a_missing_tensor_is_named_with_what_is_there(gte):
    change_tensors(gte, lambda tensors: {name: value for name, value in tensors.items() if name != QKV})
    with pytest.raises(
        CheckpointError, match=r"tensor encoder\.layer\.0\.attention\.qkv_proj\.weight is missing; .*LayerNorm"
    ):
        read_encoder(gte)


@pytest.mark.parametrize("name", [QKV, "embeddings.word_embeddings.weight"])
def test_a_wrong_shape_is_named_with_the_expected_one(gte, name):
    change_tensors(gte, lambda tensors: tensors | {name: tensors[name][:, 1:].contiguous()})
    with pytest.raises(CheckpointError, match=rf"tensor {name} is \[\d+, 31\], config.json says \[\d+, 32\]"):
        read_encoder(gte)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(gte, value):
    """No probe document need have the token whose row it is."""

    def spoil(tensors):
        tensors[WORD] = tensors[WORD].double()
        tensors[WORD][442, 7] = value
        return tensors

    change_tensors(gte, spoil)
    with pytest.raises(CheckpointError, match=rf"tensor {WORD} holds NaN, or what is infinite in fp32"):
        read_encoder(gte)


def test_no_word_embeddings_are_an_error_that_names_what_is_there(gte):
    change_tensors(gte, lambda _: {"linear.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight.*found 0; the checkpoint holds linear\.weight"):
        read_encoder(gte)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gte", {"model_type": "t5"}, r"model_type 't5' is not supported; known are bert, "),
        ("gte", {"hidden_act": "relu"}, r"hidden_act = 'relu'; supported is 'gelu'"),
        ("bert", {"hidden_act": "gelu_new"}, r"hidden_act = 'gelu_new'; supported is 'gelu'"),
        ("gte", {"layer_norm_type": "rms_norm"}, r"layer_norm_type = 'rms_norm'; supported is 'layer_norm'"),
        ("bert", {"position_embedding_type": "relative_key"}, r"'relative_key'; supported is 'absolute'"),
        ("bert", {"is_decoder": True}, r"is_decoder = True; supported is False"),
        ("gte", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"RoPE type 'yarn'.*type 'default'"),
        ("gte", {"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 8}}, r"RoPE type 'ntk'.*'default'"),
        ("gte", {"rope_parameters": None}, r"RoPE type 'default' with theta None"),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 8}}, r"rope_scaling = \{.*\} beside rope_parameters"),
        ("gte", {"num_attention_heads": 5}, r"hidden_size 32 is no multiple of num_attention_heads 5"),
        ("gte", {"num_hidden_layers": "2"}, r"num_hidden_layers = '2', expected a positive integer"),
        ("bert", {"pad_token_id": None}, r"pad_token_id = None, expected a positive integer"),
        ("bert", {"pad_token_id": 1 << 20}, r"pad_token_id = 1048576, the vocabulary has \d+ ids"),
        ("gte", {"hidden_size": 1 << 40}, r"hidden_size = 1099511627776, expected a positive integer up to 16,777,216"),
        ("gte", {"model_type": ["gte"]}, r"model_type \['gte'\] is not supported"),
        ("gte", {"rope_parameters": True}, r"rope_parameters = True, expected an object"),
        ("gte", {"rope_parameters": None, "rope_scaling": "ntk"}, r"rope_scaling = 'ntk', expected an object"),
        ("gte", {"rope_parameters": {"rope_theta": "x"}}, r"rope_theta = 'x', expected a positive number"),
        ("gte", {"rope_parameters": {"rope_theta": 1e308}}, r"rope_theta = 1e\+308, expected a positive number"),
        ("bert", {"layer_norm_eps": "x"}, r"layer_norm_eps = 'x', expected a positive number"),
        ("bert", {"layer_norm_eps": float("nan")}, r"layer_norm_eps = nan, expected a positive number"),
    ],
)  # fmt: skip
def test_a_model_that_the_graph_cannot_express_is_an_error(request, family, settings, message):
    folder = request.getfixturevalue(family)
    change_config(folder, **settings)
    with pytest.raises(CheckpointError, match=rf"{folder}.*{message}"):
        read_encoder(folder)


def test_rope_theta_of_older_configs_is_read(encoders, gte):
    change_config(gte, rope_parameters=None, rope_theta=160000)
    assert_same(read_encoder(gte), read_encoder(encoders["gte"]))
    change_config(gte, rope_theta=10000)
    frequencies = read_encoder(gte).spec.inverse_frequencies
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(0, 8, 2) / 8), rtol=np.finfo(np.float32).eps)


@pytest.mark.parametrize("read", [read_encoder, load_encoder, partial(read_classifier, "q"), read_shape])
def test_an_adapter_beside_the_weights_is_refused_by_every_reader(bert, read):
    """As peft saves one, whose weights are in a file of their own: they would be left out."""
    (bert / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(CheckpointError, match=r"bert has an adapter \(adapter_config\.json\).*merge it first"):
        read(bert)


def test_a_missing_config_is_an_error(gte):
    (gte / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"gte/config\.json cannot be read: No such file"):
        read_encoder(gte)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds a list, expected an object"),
        (b"\xff", "is no JSON"),
    ],
)
def test_a_config_that_is_no_object_is_an_error(gte, content, message):
    (gte / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=rf"gte/config\.json {message}"):
        read_encoder(gte)


def test_a_directory_without_weights_is_an_error_that_names_the_known_files(gte):
    (gte / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"gte holds no weights: expected one of model\.safetensors, .*pytorch_model\.bin"
    ):
        read_encoder(gte)


def test_truncated_weights_are_an_error(gte):
    truncate(gte / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gte/model\.safetensors cannot be read"):
        read_encoder(gte)


def test_a_missing_shard_is_an_error_that_names_it(encoders, tmp_path):
    shard(encoders["gte"], tmp_path)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json cannot be read: .*{lost.name}"):
        read_encoder(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere/{}", "/{}", "sub/../{}", "./{}"])
def test_a_shard_outside_of_the_checkpoint_is_an_error_that_names_it(encoders, tmp_path, name):
    (tmp_path / "sub").mkdir()
    shard(encoders["gte"], tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    moved = {tensor: name.format(file) for tensor, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(CheckpointError, match="cannot be the name of a file inside a folder") as caught:
        read_encoder(tmp_path)
    assert repr(min(moved.values())) in str(caught.value)


def test_a_pytorch_file_that_runs_code_is_refused(bert, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"embeddings.word_embeddings.weight": CreatesFile(marker)}, bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        read_encoder(bert)
    assert not marker.exists()


class CreatesFile:
    """Creates a file when unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shard(source, target):
    """The checkpoint `source` as transformers itself shards one."""
    from transformers import AutoModel

    AutoModel.from_pretrained(source).save_pretrained(target, max_shard_size="40KB")
    assert (target / INDEX).is_file() and not (target / "model.safetensors").exists()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def assert_same(found, expected):
    np.testing.assert_equal(asdict(found), asdict(expected))
