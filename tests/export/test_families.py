"""The two encoders that transformers cannot load as they are published, against their published arithmetic.

`published_new` and `published_jina` compute the models from the published tensors and config in float64: written after
Alibaba-NLP/new-impl (modeling.py) and jinaai/xlm-roberta-flash-implementation (modeling_lora.py and its neighbors),
with LoRA beside the weights and neither transformers nor anything of jql_export in them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.nn.utils import parametrize

from jql_engine.errors import CheckpointError, ParityError
from jql_engine.sessions.base import run_in_order
from jql_engine.sessions.cpu import CpuSession
from jql_engine.tokenizer import Tokenizer
from jql_export import probes
from jql_export.bundle import Checkpoint, export_bundle
from jql_export.families.read import read_encoder
from jql_export.readouts.head_file import read_head
from jql_export.reference import Reference, load_encoder
from jql_export.tolerances import LONG_TOKENS, TOLERANCES
from tests.conftest import MAX_TOKENS, ON_CPU, write_tokenizer

FP32 = TOLERANCES["fp32"]
POOLING = {"new": "cls", "jina": "mean"}
ARCHITECTURE = {"new": "gte", "jina": "jina_embeddings_v3"}
TASKS = ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
each_family = pytest.mark.parametrize("family", POOLING)
each_variant = pytest.mark.parametrize("variant", ON_CPU)

# The published config.json files, at a smaller size.
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": MAX_TOKENS, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "pad_token_id": 1,
    "type_vocab_size": 1, "initializer_range": 0.02,
}  # fmt: skip
NEW_CODE, JINA_CODE = "Alibaba-NLP/new-impl", "jinaai/xlm-roberta-flash-implementation"
CONFIG = {
    "new": {
        "model_type": "new", "architectures": ["NewModel", "NewForTokenClassification"],
        "auto_map": {
            "AutoConfig": f"{NEW_CODE}--configuration.NewConfig", "AutoModel": f"{NEW_CODE}--modeling.NewModel",
        },
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False, "logn_attention_scale": False, "pack_qkv": True,
        "position_embedding_type": "rope", "rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000,
        "torch_dtype": "float16", "unpad_inputs": False, "use_memory_efficient_attention": False,
    },
    "jina": {
        "model_type": "xlm-roberta",
        "auto_map": {
            "AutoConfig": f"{JINA_CODE}--configuration_xlm_roberta.XLMRobertaFlashConfig",
            "AutoModel": f"{JINA_CODE}--modeling_lora.XLMRobertaLoRA",
        },
        "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "classifier_dropout": None, "eos_token_id": 2,
        "layer_norm_eps": 1e-05, "load_trained_adapters": True, "lora_adaptations": TASKS, "lora_alpha": 1,
        "lora_dropout_p": 0.0, "lora_main_params_trainable": False, "lora_rank": 4,
        "matryoshka_dimensions": [8, 16, 32], "position_embedding_type": "rotary", "rotary_emb_base": 20000.0,
        "task_instructions": {"retrieval.query": "Represent the query: ", "text-matching": ""},
        "torch_dtype": "bfloat16", "truncate_dim": None, "use_cache": True, "use_flash_attn": True,
    },
}  # fmt: skip
DTYPE = {"new": torch.float16, "jina": torch.bfloat16}


def rotated(x, inverse_frequencies):
    """[L, heads, d] with position l turned by l * frequency; the halves are the pairs."""
    angles = torch.arange(len(x))[:, None] * inverse_frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention(qkv, n_heads, inverse_frequencies):
    q, k, v = (part.unflatten(-1, (n_heads, -1)) for part in qkv.chunk(3, -1))
    q, k = rotated(q, inverse_frequencies), rotated(k, inverse_frequencies)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def published_new(state, config, ids):
    """Hidden states [L, D] of gte-multilingual-base."""

    def linear(name, x):
        return functional.linear(x, state[f"new.{name}.weight"], state.get(f"new.{name}.bias"))

    def norm(name, x):
        weight, bias = state[f"new.{name}.weight"], state[f"new.{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, config["layer_norm_eps"])

    head_size = config["hidden_size"] // config["num_attention_heads"]
    i = torch.arange(head_size // 2, dtype=torch.float64)
    factor = config["rope_scaling"]["factor"]
    frequencies = (config["rope_theta"] * factor) ** (-2 * i / head_size) / factor ** (2 / head_size)
    table = state["new.embeddings.word_embeddings.weight"]
    x = norm("embeddings.LayerNorm", table[ids] + state["new.embeddings.token_type_embeddings.weight"][0])
    for layer in (f"encoder.layer.{n}" for n in range(config["num_hidden_layers"])):
        context = attention(linear(f"{layer}.attention.qkv_proj", x), config["num_attention_heads"], frequencies)
        x = norm(f"{layer}.attn_ln", x + linear(f"{layer}.attention.o_proj", context))
        up, gate = linear(f"{layer}.mlp.up_gate_proj", x).chunk(2, -1)
        x = norm(f"{layer}.mlp_ln", x + linear(f"{layer}.mlp.down_proj", functional.gelu(gate) * up))
    return x


def published_jina(state, config, ids, task="text-matching"):
    """Hidden states [L, D] of jina-embeddings-v3 with the adapter of `task`, which is never merged."""
    index, scale = config["lora_adaptations"].index(task), config["lora_alpha"] / config["lora_rank"]

    def parts(name):
        name = f"roberta.{name}.parametrizations.weight"
        return state[f"{name}.original"], state[f"{name}.0.lora_A"][index], state[f"{name}.0.lora_B"][index]

    def linear(name, x):
        weight, a, b = parts(name)
        return functional.linear(x, weight, state[f"roberta.{name}.bias"]) + scale * ((x @ a.T) @ b.T)

    def embedding(name, rows):
        weight, a, b = parts(name)
        return weight[rows] + scale * (a[rows] @ b)

    def norm(name, x):
        weight, bias = state[f"roberta.{name}.weight"], state[f"roberta.{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, config["layer_norm_eps"])

    head_size = config["hidden_size"] // config["num_attention_heads"]
    i = torch.arange(head_size // 2, dtype=torch.float64)
    frequencies = config["rotary_emb_base"] ** (-2 * i / head_size)
    types = embedding("embeddings.token_type_embeddings", torch.zeros_like(ids))
    x = norm("emb_ln", embedding("embeddings.word_embeddings", ids) + types)
    for layer in (f"encoder.layers.{n}" for n in range(config["num_hidden_layers"])):
        context = attention(linear(f"{layer}.mixer.Wqkv", x), config["num_attention_heads"], frequencies)
        x = norm(f"{layer}.norm1", x + linear(f"{layer}.mixer.out_proj", context))
        inner = functional.gelu(linear(f"{layer}.mlp.fc1", x))
        x = norm(f"{layer}.norm2", x + linear(f"{layer}.mlp.fc2", inner))
    return x


PUBLISHED = {"new": published_new, "jina": published_jina}


def shapes_of_new(config):
    d, f = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "new.embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "new.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
        **norm_shapes("new.embeddings.LayerNorm", d),
        "classifier.weight": (1, d),
        "classifier.bias": (1,),
    }
    for layer in (f"new.encoder.layer.{n}" for n in range(config["num_hidden_layers"])):
        shapes |= linear_shapes(f"{layer}.attention.qkv_proj", d, 3 * d)
        shapes |= linear_shapes(f"{layer}.attention.o_proj", d, d)
        shapes |= {f"{layer}.mlp.up_gate_proj.weight": (2 * f, d)} | linear_shapes(f"{layer}.mlp.down_proj", f, d)
        shapes |= norm_shapes(f"{layer}.attn_ln", d) | norm_shapes(f"{layer}.mlp_ln", d)
    return shapes


def shapes_of_jina(config):
    d, f = config["hidden_size"], config["intermediate_size"]
    tasks, rank = len(config["lora_adaptations"]), config["lora_rank"]

    def table(name, rows):
        name = f"roberta.{name}.parametrizations.weight"
        return {
            f"{name}.original": (rows, d),
            f"{name}.0.lora_A": (tasks, rows, rank),
            f"{name}.0.lora_B": (tasks, rank, d),
        }

    def linear(name, n_in, n_out):
        inner = f"{name}.parametrizations.weight"
        factors = {f"{inner}.0.lora_A": (tasks, rank, n_in), f"{inner}.0.lora_B": (tasks, n_out, rank)}
        return {f"{name}.bias": (n_out,), f"{inner}.original": (n_out, n_in), **factors}

    shapes = table("embeddings.word_embeddings", config["vocab_size"])
    shapes |= table("embeddings.token_type_embeddings", config["type_vocab_size"])
    shapes |= norm_shapes("roberta.emb_ln", d) | linear("roberta.pooler.dense", d, d)
    for layer in (f"roberta.encoder.layers.{n}" for n in range(config["num_hidden_layers"])):
        shapes |= linear(f"{layer}.mixer.Wqkv", d, 3 * d) | linear(f"{layer}.mixer.out_proj", d, d)
        shapes |= linear(f"{layer}.mlp.fc1", d, f) | linear(f"{layer}.mlp.fc2", f, d)
        shapes |= norm_shapes(f"{layer}.norm1", d) | norm_shapes(f"{layer}.norm2", d)
    return shapes


def linear_shapes(name, n_in, n_out):
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def norm_shapes(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def write_published(folder, family, **settings):
    """A checkpoint as it lies on the hub, with random weights and all files that jql-export reads."""
    config = SHAPE | CONFIG[family] | {"vocab_size": write_tokenizer(folder)} | settings
    random = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in (shapes_of_new if family == "new" else shapes_of_jina)(config).items():
        is_norm_weight = name.endswith(".weight") and len(shape) == 1
        spread = 0.5 if "lora_" in name else 0.25
        value = torch.randn(shape, generator=random) * spread + is_norm_weight
        state[name] = value.to(DTYPE[family])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pooling = {"pooling_mode_cls_token": family == "new", "pooling_mode_mean_tokens": family == "jina"}
    transformer = "sentence_transformers.models.Transformer" if family == "new" else "custom_st.Transformer"
    (folder / "1_Pooling").mkdir()
    files = {
        "config.json": config,
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": transformer, "kwargs": ["task"]},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], **pooling},
        "tokenizer_config.json": {"model_max_length": 4 * config["max_position_embeddings"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {family: write_published(root / family, family) for family in POOLING}


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Copies the checkpoint of a family for a test to change."""
    return lambda family: shutil.copytree(checkpoints[family], tmp_path / family)


@pytest.fixture(scope="module")
def heads(head_files):
    return [read_head(name, file) for name, file in head_files.items()]


@pytest.fixture(scope="module")
def exported(checkpoints, heads, tmp_path_factory):
    """Bundle and report of each family, exported with nothing but what its files say."""
    root, result = tmp_path_factory.mktemp("bundles"), {}
    for family, folder in checkpoints.items():
        lines = []
        result[family] = (export_to(root / family, folder, heads, report=lines.append), lines)
    return result


def export_to(out, folder, heads, **options):
    options = {"variants": tuple(ON_CPU)} | options
    return export_bundle(Checkpoint(folder, folder.name, None), heads, out, **options)


@pytest.fixture(scope="module")
def expected(checkpoints, exported, heads):
    """Probe documents of a family with the embeddings and scores of the published arithmetic."""
    result = {}
    for family, folder in checkpoints.items():
        tokens = probes.token_batch(Tokenizer.of(exported[family][0]))
        embeddings = embed(folder, family, tokens)
        result[family] = (tokens, embeddings, np.stack([score(head, embeddings) for head in heads], 1))
    return result


def embed(folder, family, tokens):
    config = json.loads((folder / "config.json").read_text())
    state = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    rows = []
    for ids in np.split(tokens.ids, tokens.offsets[1:-1]):
        hidden = PUBLISHED[family](state, config, torch.from_numpy(ids.astype(np.int64)))
        pooled = hidden[0] if family == "new" else hidden.mean(0)
        rows.append((pooled / pooled.norm()).numpy())
    return np.stack(rows)


def score(head, embeddings):
    hidden = np.maximum(embeddings @ head.layers[0].linear.weight.T.astype(np.float64) + head.layers[0].linear.bias, 0)
    return (hidden @ head.layers[1].linear.weight.T + head.layers[1].linear.bias)[:, 0]


@each_family
def test_a_published_checkpoint_needs_no_option(exported, family):
    bundle, report = exported[family]
    manifest = bundle.manifest
    assert (manifest.encoder.architecture, manifest.encoder.layers) == (ARCHITECTURE[family], 2)
    assert (manifest.pooling, manifest.max_tokens) == (POOLING[family], MAX_TOKENS)
    merged = [line for line in report if "LoRA" in line]
    assert merged == (["LoRA adapter text-matching is merged into the weights"] if family == "jina" else [])


@each_family
def test_tensors_outside_of_the_encoder_are_named_as_unused(exported, family):
    inner = "roberta.pooler.dense.parametrizations.weight"
    jina = ["roberta.pooler.dense.bias", f"{inner}.0.lora_A", f"{inner}.0.lora_B", f"{inner}.original"]
    found = exported[family][0].manifest.encoder.unused_tensors
    assert found == (["classifier.bias", "classifier.weight"] if family == "new" else jina)


@each_variant
@each_family
def test_scores_equal_the_published_arithmetic(exported, expected, family, variant):
    tokens, embeddings, scores = expected[family]
    session = CpuSession(exported[family][0], variant)
    found = run_in_order(session, tokens)
    np.testing.assert_allclose(found.embeddings, embeddings, rtol=0, atol=FP32.embedding)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=FP32.score)
    figures = exported[family][0].manifest.variants[variant].parity
    assert figures["documents"] == len(tokens.rows) and figures["max_abs_embedding"] <= FP32.embedding


@each_family
def test_the_oracle_equals_the_published_arithmetic(checkpoints, expected, heads, family):
    tokens, embeddings, scores = expected[family]
    found = Reference(checkpoints[family], heads, POOLING[family]).run(tokens)
    np.testing.assert_allclose(found.embeddings, embeddings, rtol=0, atol=FP32.embedding / 2)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=FP32.score / 2)


@each_variant
@each_family
def test_long_documents_and_the_other_pooling_are_certified(heads, tmp_path, family, variant):
    longest = LONG_TOKENS + 88
    folder = write_published(tmp_path / family, family, max_position_embeddings=longest)
    other = {"cls": "mean", "mean": "cls"}[POOLING[family]]
    bundle = export_to(tmp_path / "bundle", folder, heads, pooling=other, variants=(variant,))
    figures = bundle.manifest.variants[variant].parity
    assert figures["longest"] == longest and 0 < figures["max_abs_embedding_long"] <= FP32.embedding_long


@each_family
def test_every_tensor_of_the_encoder_moves_the_oracle(copy, family):
    folder, ids = copy(family), torch.arange(3, 23)[None]
    state = load_file(folder / "model.safetensors")
    unused = read_encoder(folder).unused_tensors
    before = hidden_of(folder, ids)
    np.testing.assert_array_equal(hidden_of(folder, ids), before, err_msg="loaded twice")
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
        save_file(state | {name: value + noise}, folder / "model.safetensors", metadata={"format": "pt"})
        moved = np.abs(hidden_of(folder, ids) - before).max()
        assert (moved == 0) if name in unused else (moved > 1e-3), name


def hidden_of(folder, ids):
    with torch.inference_mode():
        return load_encoder(folder)(input_ids=ids).last_hidden_state.numpy()


def test_the_oracle_names_a_tensor_that_is_missing_or_has_no_place(copy):
    folder = copy("new")
    change_tensors(folder, lambda state: without(state, "new.encoder.layer.1.mlp_ln.weight"))
    with pytest.raises(CheckpointError, match=r"no weights for \['layers\.1\.post_mlp_layernorm\.weight'\]"):
        load_encoder(folder)
    folder = copy("jina")
    change_tensors(folder, lambda state: state | {"roberta.encoder.layers.0.mlp.fc3.bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"JinaEmbeddingsV3Model has no place for layers\.0\.mlp\.fc3\.bias"):
        load_encoder(folder)


def test_ntk_frequencies_of_the_published_shape_equal_a_direct_computation(tmp_path):
    folder = write_published(tmp_path / "new", "new", hidden_size=64, num_attention_heads=1)
    found = read_encoder(folder).spec.inverse_frequencies
    i = np.arange(32)
    direct = 1 / (20000 * 8) ** (2 * i / 64) / 8 ** (2 / 64)
    np.testing.assert_allclose(found, direct, rtol=3e-7)
    assert found[0] == pytest.approx(0.9371, abs=1e-4), "the first frequency is scaled too"
    np.testing.assert_array_equal(found, load_encoder(folder).rotary_emb.inv_freq.numpy())


def test_without_a_scaling_the_frequencies_are_the_plain_ones(copy):
    folder = copy("new")
    change_config(folder, rope_scaling=None)
    found = read_encoder(folder).spec.inverse_frequencies
    np.testing.assert_allclose(found, 20000.0 ** (-np.arange(0, 8, 2) / 8), rtol=3e-7)
    np.testing.assert_array_equal(found, load_encoder(folder).rotary_emb.inv_freq.numpy())


def test_the_adapter_is_merged_into_weights_and_tables(checkpoints):
    folder = checkpoints["jina"]
    state, weights = load_file(folder / "model.safetensors"), read_encoder(folder)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer, name = weights.layers[1], "roberta.encoder.layers.1.mixer.Wqkv.parametrizations.weight"
    original, a, b = (state[f"{name}.{part}"].double() for part in ("original", "0.lora_A", "0.lora_B"))
    direct = x @ original.T + (1 / 4) * (x @ a[4].T) @ b[4].T
    found = np.concatenate([x.numpy() @ part.weight.T for part in (layer.query, layer.key, layer.value)], 1)
    np.testing.assert_allclose(found, direct, rtol=0, atol=1e-5)
    name = "roberta.embeddings.word_embeddings.parametrizations.weight"
    original, a, b = (state[f"{name}.{part}"].double() for part in ("original", "0.lora_A", "0.lora_B"))
    np.testing.assert_allclose(weights.word, original + (1 / 4) * a[4] @ b[4], rtol=0, atol=1e-6)
    assert weights.adapter == "text-matching"


def test_the_adapter_is_found_by_its_name_and_others_change_nothing(copy, checkpoints):
    before, ids = read_encoder(checkpoints["jina"]), torch.arange(3, 23)[None]
    folder, order = copy("jina"), [4, 0, 1, 2, 3]

    def turn(state):
        return {name: value[order].contiguous() if "lora_" in name else value for name, value in state.items()}

    change_tensors(folder, turn)
    change_config(folder, lora_adaptations=[TASKS[i] for i in order])
    np.testing.assert_equal(asdict(read_encoder(folder)), asdict(before))
    np.testing.assert_array_equal(hidden_of(folder, ids), hidden_of(checkpoints["jina"], ids))
    change_tensors(folder, lambda state: {n: zero_others(v) if "lora_" in n else v for n, v in state.items()})
    np.testing.assert_equal(asdict(read_encoder(folder)), asdict(before))
    np.testing.assert_array_equal(hidden_of(folder, ids), hidden_of(checkpoints["jina"], ids))


def zero_others(factor):
    return torch.cat([factor[:1], torch.zeros_like(factor[1:])])


def test_torch_parametrizations_have_the_names_of_this_layout():
    class Lora(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = (torch.nn.Parameter(torch.ones(5, 4, 4)) for _ in "AB")

        def forward(self, weight):
            return weight

    layer = torch.nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Lora())
    found = {f"roberta.pooler.dense.{name}" for name in layer.state_dict()}
    assert found == {name for name in shapes_of_jina(SHAPE | CONFIG["jina"] | {"vocab_size": 9}) if "pooler" in name}


def test_the_wrong_adapter_is_refused(checkpoints, heads, tmp_path, monkeypatch):
    monkeypatch.setattr("jql_export.families.jina_v3.LORA_TASK", "separation")
    with pytest.raises(ParityError, match="out of tolerance"):
        export_to(tmp_path / "bundle", checkpoints["jina"], heads)


def test_frequencies_without_the_scaling_are_refused(checkpoints, heads, tmp_path, monkeypatch):
    def misread(folder):
        weights = read_encoder(folder)
        plain = (20000.0 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)
        return replace(weights, spec=replace(weights.spec, inverse_frequencies=plain))

    monkeypatch.setattr("jql_export.graphs.read_encoder", misread)
    with pytest.raises(ParityError, match="out of tolerance"):
        export_to(tmp_path / "bundle", checkpoints["new"], heads)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("new", {"rope_scaling": {"type": "yarn", "factor": 8.0}}, r"RoPE type 'yarn' .* 'default' or 'ntk' with"),
        ("new", {"rope_theta": None}, r"RoPE type 'ntk' with theta None"),
        ("new", {"rope_scaling": {"type": "ntk"}}, r"factor = None, expected a positive number"),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 0.5}}, r"RoPE factor 0\.5, expected 1 or more"),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 8, "mixed_b": 0.6}}, r"mixed_b = 0\.6; supported is no"),
        ("new", {"position_embedding_type": "absolute"}, r"'absolute'; supported is 'rope'"),
        ("new", {"layer_norm_type": "rms_norm"}, r"'rms_norm'; supported is 'layer_norm'"),
        ("new", {"logn_attention_scale": True}, r"logn_attention_scale = True; supported is False"),
        ("new", {"pack_qkv": False}, r"pack_qkv = False; supported is True"),
        ("new", {"num_attention_heads": 5}, r"hidden_size 32 is no multiple of num_attention_heads 5"),
        ("jina", {"lora_adaptations": TASKS[:4]}, r"lora_adaptations = \['ret.*\], expected a list with 'text"),
        ("jina", {"lora_adaptations": None}, r"lora_adaptations = None, expected a list with 'text-matching'"),
        ("jina", {"lora_rank": None}, r"lora_rank = None, expected a positive integer"),
        ("jina", {"lora_alpha": 0}, r"lora_alpha = 0, expected a positive number"),
        ("jina", {"lora_rank": 8}, r"lora_A is \[5, \d+, 4\], config\.json says \[5, \d+, 8\]"),
        ("jina", {"task_instructions": {"text-matching": "Match: "}}, r"task_instructions\['text-matching'\] = 'Match"),
        ("jina", {"rotary_emb_base": None}, r"rotary_emb_base = None, expected a positive number"),
        ("jina", {"rotary_emb_scale_base": 512}, r"rotary_emb_scale_base = 512; supported is no such setting"),
        ("jina", {"rotary_emb_interleaved": True}, r"rotary_emb_interleaved = True; supported is False"),
        ("jina", {"hidden_act": "gelu_new"}, r"hidden_act = 'gelu_new'; supported is 'gelu'"),
        ("jina", {"position_embedding_type": "alibi"}, r"'alibi'; supported is 'absolute'"),
    ],
)  # fmt: skip
def test_a_config_that_the_graph_cannot_express_is_an_error(copy, family, settings, message):
    folder = copy(family)
    change_config(folder, **settings)
    with pytest.raises(CheckpointError, match=rf"{folder}.*{message}"):
        read_encoder(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("new", "new.embeddings.token_type_embeddings.weight"),
        ("new", "new.encoder.layer.1.mlp.up_gate_proj.weight"),
        ("new", "new.encoder.layer.0.attention.o_proj.bias"),
        ("jina", "roberta.emb_ln.bias"),
        ("jina", "roberta.encoder.layers.1.norm2.weight"),
        ("jina", "roberta.encoder.layers.0.mixer.out_proj.parametrizations.weight.original"),
        ("jina", "roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.0.lora_B"),
        ("jina", "roberta.embeddings.token_type_embeddings.parametrizations.weight.0.lora_A"),
    ],
)
def test_a_missing_tensor_is_named(copy, family, name):
    folder = copy(family)
    change_tensors(folder, lambda state: without(state, name))
    with pytest.raises(CheckpointError, match=rf"{family}: tensor {name} is missing; the checkpoint holds "):
        read_encoder(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("new", "new.encoder.layer.0.mlp.up_gate_proj.bias"),
        ("new", "new.encoder.layer.2.attn_ln.weight"),
        ("new", "new.embeddings.position_embeddings.weight"),
        ("jina", "roberta.emb_ln.scale"),
        ("jina", "roberta.encoder.layers.0.mlp.fc1.parametrizations.weight.1.lora_A"),
        ("jina", "roberta.encoder.layers.2.norm1.bias"),
    ],
)
def test_an_extra_tensor_of_the_encoder_is_an_error(copy, family, name):
    folder = copy(family)
    change_tensors(folder, lambda state: state | {name: torch.ones(4)})
    with pytest.raises(CheckpointError, match=rf"1 tensors of the encoder have no place.*{name}"):
        read_encoder(folder)


def test_a_checkpoint_whose_adapters_are_merged_already_is_an_error(copy):
    folder = copy("jina")
    change_tensors(
        folder, lambda state: {n.replace("parametrizations.weight.original", "weight"): v for n, v in state.items()}
    )
    message = r"expected one tensor named .*word_embeddings\.parametrizations\.weight\.original.*found 0"
    with pytest.raises(CheckpointError, match=message):
        read_encoder(folder)


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(state, name):
    assert name in state
    return {key: value for key, value in state.items() if key != name}
