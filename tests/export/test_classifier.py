"""Sequence classifiers: scores are the logits of transformers' own class, on any text and beside other readouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jql_engine import Engine, probe_texts
from jql_engine.bundle import Bundle
from jql_engine.data import DocumentBatch
from jql_engine.errors import CheckpointError, HeadError, ParityError
from jql_export.bundle import export_bundle
from jql_export.hub import Checkpoint
from jql_export.readouts.classifier import read_classifier
from jql_export.readouts.head_file import read_head
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, MAX_TOKENS, ON_CPU, write_head

CLASSES = {
    "gte": transformers.GteForSequenceClassification,
    "bert": transformers.BertForSequenceClassification,
    "xlm-roberta": transformers.XLMRobertaForSequenceClassification,
}
TEXTS = [*probe_texts.SENTENCES[:30], *probe_texts.ODDITIES[:20], "", " ".join(probe_texts.SENTENCES)]
LABELS = {1: {0: "LABEL_0"}, 3: {0: "Science & Tech.", 1: "News", 2: "Süß"}}


def write_classifier(folder: Path, encoder: Path, family: str, n_labels: int = 1) -> Path:
    """A tiny classifier around `encoder`, its head wide enough that every part of it matters."""
    shutil.copytree(encoder, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update({"num_labels": n_labels, "id2label": LABELS[n_labels]})
    torch.manual_seed(5)
    model = CLASSES[family](config)
    state = transformers.AutoModel.from_pretrained(folder).state_dict()
    own = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    missing, unexpected = model.base_model.load_state_dict(own, strict=False)
    assert not unexpected and all(name.startswith("pooler.") for name in missing)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "classifier" in name or "pooler" in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS}))
    return folder


@pytest.fixture(scope="module")
def classifiers(encoders, tmp_path_factory) -> dict[tuple[str, int], Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {(f, n): write_classifier(root / f"{f}-{n}", encoders[f], f, n) for f in FAMILIES for n in LABELS}


def export(folder: Path, *readouts, out: Path, variants=("cpu-fp32",), **options) -> Bundle:
    return export_bundle(Checkpoint(folder, folder.name, None), readouts, out, variants=variants, **options)


def with_config(source: Path, folder: Path, changes: dict[str, object]) -> Path:
    """A copy of a checkpoint with other fields in config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(folder: Path, texts: list[str]) -> np.ndarray:
    """By transformers alone, tokenizer included, one document at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=MAX_TOKENS, truncation=True
    )
    with torch.inference_mode():
        rows = [tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt") for text in texts]
        return torch.cat([model(input_ids=row["input_ids"]).logits for row in rows]).numpy()


@pytest.mark.parametrize("n_labels", LABELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_logits_of_transformers(classifiers, tmp_path, family, n_labels):
    folder = classifiers[family, n_labels]
    bundle = export(folder, read_classifier("topic", folder), out=tmp_path / "out", variants=ON_CPU)
    columns = ("topic",) if n_labels == 1 else ("topic_Science___Tech_", "topic_News", "topic_Süß")
    assert bundle.heads == columns and bundle.manifest.readouts[0].kind == "classifier"
    expected = logits(folder, TEXTS)
    assert expected.std() > 0.05, "the head says nothing"
    for variant in ON_CPU:
        scores = Engine(bundle.path, "cpu", variant).score(TEXTS)
        np.testing.assert_allclose(scores.values, expected, rtol=0, atol=TOLERANCES["fp32"].score)
    assert not [name for name in bundle.manifest.encoder.unused_tensors if "classifier" in name]


@pytest.mark.parametrize(("activation", "n_labels"), [("sigmoid", 1), ("softmax", 3)])
def test_an_activation_is_applied_where_it_is_asked_for_and_recorded(classifiers, tmp_path, activation, n_labels):
    folder = classifiers["bert", n_labels]
    bundle = export(folder, read_classifier("q", folder, activation), out=tmp_path / "out")
    assert bundle.manifest.readouts[0].layers[-1].activation == activation
    raw = torch.from_numpy(logits(folder, TEXTS))
    expected = raw.sigmoid() if activation == "sigmoid" else raw.softmax(1)
    np.testing.assert_allclose(Engine(bundle.path, "cpu").score(TEXTS).values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_and_heads_share_one_pass(classifiers, tmp_path, family):
    """Also with different poolings: the classifier reads first tokens, the heads the mean."""
    one, three = classifiers[family, 1], classifiers[family, 3]
    head = read_head("edu", write_head(tmp_path / "edu.ckpt"))
    hq = read_head("hq", write_fineweb2_hq(tmp_path / "deu.pt"))
    readouts = [head, read_classifier("a", one), hq, read_classifier("b", three)]
    bundle = export(one, *readouts, out=tmp_path / "out", variants=ON_CPU, pooling="mean")
    assert bundle.heads == ("edu", "a", "hq", "b_Science___Tech_", "b_News", "b_Süß")
    alone = [export(one, r, out=tmp_path / r.name, pooling="mean") for r in (head, hq)]
    expected = [Engine(b.path, "cpu").score(TEXTS).values for b in alone]
    expected = np.hstack([expected[0], logits(one, TEXTS), expected[1], logits(three, TEXTS)])
    for variant in ON_CPU:
        found = Engine(bundle.path, "cpu", variant).score(TEXTS).values
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * TOLERANCES["fp32"].score)


def write_fineweb2_hq(file: Path) -> Path:
    torch.manual_seed(3)
    shapes = {"0.weight": (16, 32), "0.bias": (16,), "3.weight": (1, 16), "3.bias": (1,)}
    torch.save({f"classifier.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}, file)
    return file


def test_a_head_of_fineweb2_hq_reads_the_mean_of_all_states(encoders, tmp_path):
    folder, head = encoders["xlm-roberta"], write_fineweb2_hq(tmp_path / "deu.pt")
    bundle = export(folder, read_head("hq", head), out=tmp_path / "out", max_tokens=MAX_TOKENS)
    assert bundle.manifest.pooling == "mean" and bundle.manifest.readouts[0].kind == "fineweb2-hq"
    engine = Engine(bundle.path, "cpu")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    state = {name: value.float() for name, value in torch.load(head, weights_only=True).items()}
    for text, found in zip(TEXTS, engine.score(TEXTS).values, strict=True):
        ids = engine.tokenizer.encode(DocumentBatch.of(pa.array([text], pa.large_string()))).ids.astype(np.int64)
        with torch.inference_mode():
            x = model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state.mean(1)
            hidden = torch.relu(x @ state["classifier.0.weight"].T + state["classifier.0.bias"])
            expected = torch.sigmoid(hidden @ state["classifier.3.weight"].T + state["classifier.3.bias"])
        assert abs(float(expected) - float(found[0])) < 1e-5


def test_a_published_gte_with_code_of_its_own_is_read_and_not_run(classifiers, tmp_path):
    """As WebOrganizer's: model_type `new`, keys `new.encoder.layer...`, an auto_map that nobody follows."""
    folder = Path(shutil.copytree(classifiers["gte", 3], tmp_path / "new"))
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("gte.", "new.", 1) if name.startswith("gte.") else name: t for name, t in state.items()}
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": "new", "architectures": ["NewForSequenceClassification"], "rope_theta": rope["rope_theta"],
        "auto_map": {"AutoModelForSequenceClassification": "some/where--modeling.NewForSequenceClassification"},
        "position_embedding_type": "rope", "pack_qkv": True, "logn_attention_scale": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    bundle = export(folder, read_classifier("topic", folder), out=tmp_path / "out")
    found = Engine(bundle.path, "cpu").score(TEXTS).values
    np.testing.assert_allclose(found, logits(classifiers["gte", 3], TEXTS), rtol=0, atol=1e-4)


def test_another_encoder_is_refused(classifiers, tmp_path):
    other = Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.bias"] += 1e-3
    save_file(state, other / "model.safetensors")
    first = classifiers["bert", 1]
    with pytest.raises(
        CheckpointError, match=r"classifier b: the encoder in .*other is not that in .*: layers differs"
    ):
        export(first, read_classifier("a", first), read_classifier("b", other), out=tmp_path / "out")


def test_a_classifier_without_the_tokenizer_is_refused(classifiers, tmp_path):
    other = Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    (other / "tokenizer.json").unlink()
    first = classifiers["bert", 1]
    with pytest.raises(CheckpointError, match=r"other/tokenizer\.json cannot be read: No such file"):
        export(first, read_classifier("a", first), read_classifier("b", other), out=tmp_path / "out")


def test_a_tokenizer_of_other_ids_is_refused_and_one_of_another_truncation_is_not(classifiers, tmp_path):
    first, other = classifiers["bert", 1], Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    readouts = [read_classifier("a", first), read_classifier("b", other)]
    said = json.loads((other / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(said | {"truncation": cut}, indent=1))
    export(first, *readouts, out=tmp_path / "out")
    (other / "tokenizer.json").write_text(json.dumps(said | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(CheckpointError, match=r"classifier b: .*other has no tokenizer\.json that equals that of"):
        export(first, *readouts, out=tmp_path / "other-out")


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side = 'left'"),
        ("tokenizer_config.json", {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}, "do_lower_case = True"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
            "to put 'query: ' before every text",
        ),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case = true"),
    ],
)
def test_texts_and_ids_of_every_classifier_are_checked(classifiers, tmp_path, file, settings, message):
    """Of the second one too, and of one beside an encoder of its own: all get the same ids of a text."""
    first, other = classifiers["bert", 1], Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    said = json.loads((other / file).read_text()) if (other / file).exists() else {}
    (other / file).write_text(json.dumps(said | settings))
    readouts = [read_classifier("a", first), read_classifier("b", other)]
    for chosen in (readouts, readouts[1:]):
        with pytest.raises(CheckpointError) as caught:
            export(first, *chosen, out=tmp_path / "out")
        assert message in str(caught.value) and str(other) in str(caught.value)


def test_classifiers_of_different_length_leave_the_choice_to_the_user(classifiers, tmp_path):
    first, other = classifiers["bert", 1], Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    (other / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))
    readouts = [read_classifier("a", first), read_classifier("b", other)]
    with pytest.raises(CheckpointError, match=rf"reads {MAX_TOKENS} tokens of a document, .*other 8; .*--max-tokens"):
        export(first, *readouts, out=tmp_path / "out")
    assert export(first, *readouts, out=tmp_path / "out", max_tokens=8).manifest.max_tokens == 8


def test_a_head_beside_a_classifier_does_not_take_over_its_pooling(classifiers, tmp_path):
    folder = classifiers["bert", 1]
    readouts = [read_head("edu", write_head(tmp_path / "edu.ckpt")), read_classifier("a", folder)]
    with pytest.raises(CheckpointError, match="give --pooling"):
        export(folder, *readouts, out=tmp_path / "out")


def test_unused_tensors_of_every_classifier_are_named(classifiers, tmp_path):
    first, other = classifiers["bert", 1], Path(shutil.copytree(classifiers["bert", 3], tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    save_file(state | {"second_head.weight": torch.ones(3, 3)}, other / "model.safetensors", {"format": "pt"})
    a, b = read_classifier("a", first), read_classifier("b", other)
    for readouts, expected in (([a, b], "unused tensor of classifier b: second_head.weight"), ([a], None)):
        lines = []
        export(first, *readouts, out=tmp_path / f"{len(readouts)}", report=lines.append)
        assert [line for line in lines if "unused" in line] == ([expected] if expected else [])


@pytest.mark.parametrize("labels", [{"id2label": None, "num_labels": 3}, {"id2label": {}, "num_labels": 3}])
def test_labels_that_are_not_named_are_numbered(classifiers, tmp_path, labels):
    folder = with_config(classifiers["bert", 3], tmp_path / "bert", labels)
    assert read_classifier("x", folder).outputs == ("x_LABEL_0", "x_LABEL_1", "x_LABEL_2")


def test_layer_norms_may_have_the_names_of_berts_time(classifiers, tmp_path):
    """gamma and beta, as bert-base-uncased has them."""
    folder = Path(shutil.copytree(classifiers["bert", 1], tmp_path / "bert"))
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = load_file(folder / "model.safetensors")
    for new, old in renamed.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    assert sum("gamma" in name for name in state) == 5
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    bundle = export(folder, read_classifier("a", folder), out=tmp_path / "out")
    expected = logits(classifiers["bert", 1], TEXTS)
    np.testing.assert_allclose(Engine(bundle.path, "cpu").score(TEXTS).values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 7}, "vocab_size = 7, the table of the words has"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ({"initializer_range": "wide"}, "transformers cannot load model_type 'bert', so there is no reference"),
    ],
)
def test_a_config_that_fits_no_model_is_an_error_of_one_line(classifiers, tmp_path, changes, message):
    folder = with_config(classifiers["bert", 1], tmp_path / "bert", changes)
    with pytest.raises(CheckpointError) as caught:
        export(folder, read_classifier("a", folder), out=tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_tokenizer_by_transformers_is_reported(classifiers, tmp_path):
    folder = Path(shutil.copytree(classifiers["bert", 1], tmp_path / "bert"))
    lines = []
    config = {"model_max_length": MAX_TOKENS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    export(folder, read_classifier("a", folder), out=tmp_path / "out", report=lines.append)
    assert not [line for line in lines if "AutoTokenizer" in line or "differ" in line]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "T5Tokenizer"}))
    export(folder, read_classifier("a", folder), out=tmp_path / "again", report=lines.append)
    assert [line for line in lines if "AutoTokenizer" in line or "their ids differ for" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["BertForTokenClassification"]},
            "is BertForTokenClassification of model_type bert; known are bert: BertForSeq",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "is LlamaForCausalLM of model_type bert; known"),
        ({"architectures": None}, "is None of model_type bert"),
        ({"architectures": []}, "is of no architecture of model_type bert"),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "is XLMRobertaForSequenceClassification of mod"),
        (
            {"architectures": ["RoPEBertForSequenceClassification"], "auto_map": {"AutoModel": "own.Model"}},
            "with code of its repository (auto_map), which is never run",
        ),
        ({"model_type": "deberta-v2"}, "model_type 'deberta-v2'; known are bert: "),
        ({"id2label": {"0": "a"}}, "3 outputs, config.json has num_labels = None and the labels a;"),
        ({"num_labels": "3", "id2label": None}, "num_labels = '3', expected an integer"),
        ({"num_labels": 2}, "3 outputs, config.json has num_labels = 2 and the labels Science"),
        ({"id2label": {"0": "a b", "1": "a-b", "2": "c"}}, "several labels become the column score_x_a_b"),
        ({"id2label": ["a", "b", "c"]}, "id2label = "),
        ({"model_type": ["bert"]}, "model_type ['bert']; known are bert: "),
        ({"problem_type": "ranking"}, "problem_type 'ranking'; known are regression"),
    ],
)
def test_what_is_no_known_classifier_is_named(classifiers, tmp_path, changes, message):
    folder = with_config(classifiers["bert", 3], tmp_path / "bert", changes)
    with pytest.raises(HeadError) as caught:
        read_classifier("x", folder)
    assert message in str(caught.value)


def test_a_missing_or_misshapen_head_is_named(classifiers, tmp_path):
    folder = Path(shutil.copytree(classifiers["xlm-roberta", 1], tmp_path / "x"))
    state = load_file(folder / "model.safetensors")
    save_file(state | {"classifier.out_proj.weight": torch.ones(1, 5)}, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"classifier\.out_proj\.weight is \[1, 5\], expected \[\*, 32\]"):
        read_classifier("x", folder)
    save_file(state | {"classifier.dense.weight": torch.ones(32, 32).to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"classifier\.dense\.weight is a strided tensor of torch\.int8"):
        read_classifier("x", folder)
    save_file(state | {"classifier.dense.weight": torch.ones(())}, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"classifier\.dense\.weight is \[\], expected \[\*, \*\]"):
        read_classifier("x", folder)
    state.pop("classifier.dense.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"has no tensor classifier\.dense\.bias; xlm-roberta has one"):
        read_classifier("x", folder)


def test_names_and_activations_that_make_no_sense_are_refused(classifiers, tmp_path):
    folder = classifiers["bert", 1]
    with pytest.raises(HeadError, match="'a b' cannot be a column name"):
        read_classifier("a b", folder)
    with pytest.raises(HeadError, match="a softmax is always 1"):
        read_classifier("a", folder, "softmax")
    three = read_classifier("a", classifiers["bert", 3])
    with pytest.raises(HeadError, match="two outputs would be the column score_a_News"):
        head = read_head("a_News", write_head(tmp_path / "h.ckpt"))
        export(folder, head, three, out=tmp_path / "out", pooling="cls")


def test_a_reader_of_the_wrong_head_is_refused_by_transformers_own_class(classifiers, tmp_path, monkeypatch):
    """The certificate compares with the published class as a whole, not with what was read of it."""
    from jql_export.readouts import classifier

    real = classifier.Layer
    wrong = lambda linear, act=None: real(linear, "sigmoid" if act == "tanh" else act)  # noqa: E731
    monkeypatch.setattr(classifier, "Layer", wrong)
    folder = classifiers["bert", 1]
    with pytest.raises(ParityError, match="score differs"):
        export(folder, read_classifier("a", folder), out=tmp_path / "out")
