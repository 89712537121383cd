from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from jql_engine.bundle import sha256_of
from jql_engine.errors import HeadError
from jql_export.readouts.base import check_readouts
from jql_export.readouts.head_file import read_head
from tests.conftest import write_head


def test_sizes_come_from_the_tensors_of_a_lightning_checkpoint(head_files):
    sizes = {
        name: (read_head(name, file).input_size, len(read_head(name, file).layers[0].linear.weight))
        for name, file in head_files.items()
    }
    assert sizes == {"edu": (32, 16), "prose": (32, 24)}
    assert read_head("edu", head_files["edu"]).sha256 == sha256_of(head_files["edu"])


def test_a_plain_state_dict_is_the_same_head(head_files, tmp_path):
    state = torch.load(head_files["edu"], weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "plain.pt")
    plain, head = read_head("edu", tmp_path / "plain.pt"), read_head("edu", head_files["edu"])
    np.testing.assert_array_equal(plain.layers[0].linear.weight, head.layers[0].linear.weight)
    np.testing.assert_array_equal(plain.layers[1].linear.weight, head.layers[1].linear.weight)
    assert (plain.layers[0].linear.bias.tolist(), plain.layers[1].linear.bias.tolist()) == (
        head.layers[0].linear.bias.tolist(),
        head.layers[1].linear.bias.tolist(),
    )


def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "head.ckpt"
    torch.save({"state_dict": tensors(), "hyper_parameters": RunsCommand(f"touch {marker}")}, file)
    with pytest.raises(
        HeadError, match=r"head\.ckpt holds more than .* could run code; refused\. Save its state_dict alone"
    ):
        read_head("edu", file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file would have run nothing: the test proves nothing"


def test_a_bare_pickle_that_runs_code_is_refused_and_runs_none(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "head.ckpt"
    content = pickle.dumps(RunsCommand(f"touch {marker}"), protocol=2)
    file.write_bytes(content)
    with pytest.raises(HeadError, match=r"head edu: .*head\.ckpt"):
        read_head("edu", file)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the file would have run nothing: the test proves nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer2.weight": None},
            r"lacks layer2\.weight; its state_dict holds layer1\.weight, layer1\.bias, layer2\.bias",
        ),
        ({"layer1.bias": 3}, r"lacks layer1\.bias"),
        ({"layer3.weight": torch.ones(1)}, r"holds layer3\.weight besides layer1\.weight"),
        ({"layer1.bias": torch.ones(15)}, r"layer1\.bias \[15\].*; expected \[K, D\], \[K\], \[1, K\], \[1\]"),
        ({"layer1.weight": torch.ones(16)}, r"layer1\.weight \[16\]"),
        ({"layer2.weight": torch.ones(1, 15)}, r"layer2\.weight \[1, 15\]"),
        ({"layer2.weight": torch.ones(2, 16), "layer2.bias": torch.ones(2)}, r"layer2\.weight \[2, 16\]"),
        ({5: torch.ones(1)}, r"holds 5 besides layer1\.weight"),
        ({"layer1.bias": torch.ones(16, dtype=torch.int8)}, r"layer1\.bias is a strided tensor of torch\.int8"),
        ({"layer1.bias": torch.ones(16).to_sparse()}, r"layer1\.bias is a sparse_coo tensor of torch\.float32"),
        ({"layer1.bias": torch.ones(16, device="meta")}, r"layer1\.bias is a meta tensor"),
        ({"layer1.bias": torch.full((16,), float("nan"))}, r"layer1\.bias holds NaN"),
        (
            {"layer1.bias": torch.full((16,), 1e300, dtype=torch.float64)},
            r"layer1\.bias holds NaN, or what is infinite",
        ),
    ],
)
def test_tensors_that_make_no_regression_head_are_named(tmp_path, change, message):
    state = {name: value for name, value in (tensors() | change).items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "head.ckpt")
    with pytest.raises(HeadError, match=rf"head edu: .*head\.ckpt.*{message}"):
        read_head("edu", tmp_path / "head.ckpt")


def test_a_weight_that_may_be_trained_on_is_read(tmp_path):
    torch.save({name: torch.nn.Parameter(value) for name, value in tensors().items()}, tmp_path / "head.ckpt")
    assert read_head("edu", tmp_path / "head.ckpt").input_size == 32


def test_a_file_that_holds_no_state_dict_is_an_error(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(HeadError, match=r"list\.pt holds a list, expected a state_dict"):
        read_head("edu", tmp_path / "list.pt")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error(head_files, tmp_path, share):
    content = head_files["edu"].read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(HeadError, match=r"head edu: .*cut\.ckpt (is no checkpoint that torch can read|cannot be read)"):
        read_head("edu", tmp_path / "cut.ckpt")


def test_weights_that_are_not_what_their_checksum_says_are_an_error(head_files, tmp_path):
    """torch reads them without a word."""
    content = bytearray(head_files["edu"].read_bytes())
    weight = torch.load(head_files["edu"], weights_only=True)["state_dict"]["layer1.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    with pytest.raises(HeadError, match=r"flipped\.ckpt is no .*data/\d+ is not what its checksum says"):
        read_head("edu", tmp_path / "flipped.ckpt")


def test_weights_that_are_marked_as_a_folder_are_an_error(head_files, tmp_path):
    """torch leaves the memory for them as it is."""
    with zipfile.ZipFile(head_files["edu"]) as old, zipfile.ZipFile(tmp_path / "marked.ckpt", "w") as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0x10 if name.endswith("/data/1") else 0
            new.writestr(info, old.read(name))
    with pytest.raises(HeadError, match=r"marked\.ckpt is no .*/data/1 is marked as a folder"):
        read_head("edu", tmp_path / "marked.ckpt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(HeadError, match=r"head edu: .*none\.ckpt cannot be read: No such file"):
        read_head("edu", tmp_path / "none.ckpt")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-edu", "bildung·", "a\n"])
def test_a_name_that_cannot_be_a_column_is_an_error(head_files, name):
    with pytest.raises(HeadError, match="cannot be a column name"):
        read_head(name, head_files["edu"])


def test_heads_that_fit_the_encoder_are_accepted(head_files):
    check_readouts(heads(head_files), 32)


def test_two_heads_of_one_name_are_an_error(head_files):
    with pytest.raises(HeadError, match="two heads are named edu"):
        check_readouts([read_head("edu", file) for file in head_files.values()], 32)


def test_a_head_of_another_encoder_is_an_error(head_files, tmp_path):
    wide = read_head("wide", write_head(tmp_path / "wide.ckpt", input_size=48))
    with pytest.raises(HeadError, match="head wide reads embeddings of size 48, the encoder gives 32"):
        check_readouts([*heads(head_files), wide], 32)


class RunsCommand:
    """Runs a shell command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def heads(files):
    return [read_head(name, file) for name, file in files.items()]


def tensors():
    shapes = {"layer1.weight": (16, 32), "layer1.bias": (16,), "layer2.weight": (1, 16), "layer2.bias": (1,)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def score(head, embeddings):
    hidden = np.maximum(embeddings @ head.layers[0].linear.weight.T + head.layers[0].linear.bias, 0)
    return hidden @ head.layers[1].linear.weight.T + head.layers[1].linear.bias
