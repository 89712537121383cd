from __future__ import annotations

import json

import pytest

from jql_engine.printing import redact

SHOWN = "https://b.s3.amazonaws.com/in/a.parquet?…"
SIGNED = "https://b.s3.amazonaws.com/in/a.parquet?X-Amz-Credential=AKIA%2F2024&X-Amz-Signature=5ecre7"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SIGNED, SHOWN),
        (f"403, message='Forbidden', url='{SIGNED}'", f"403, message='Forbidden', url='{SHOWN}'"),
        (f"URL('{SIGNED}'), {SIGNED} and {SIGNED}: no.", f"URL('{SHOWN}'), {SHOWN} and {SHOWN}: no."),
        ("HTTP://h/a?x=1#y", "HTTP://h/a?…"),
        ("http://h/a? b", "http://h/a? b"),
        ("ftp://me:pass@host/a.parquet", "ftp://…@host/a.parquet"),
        ("sftp://me:p@ss:w0rd@host:22/a", "sftp://…@host:22/a"),
        ("http://user:p/w@127.0.0.1:1/a.parquet cannot", "http://…@127.0.0.1:1/a.parquet cannot"),
        ("ftp://user:pa?ss#x@host/a", "ftp://…@host/a"),
        ("http://host:8080/a@b.parquet", "http://host:8080/a@b.parquet"),
        ("s3://AKIA:5e/cre7@bucket/x", "s3://…@bucket/x"),
        ("s3://arn:aws:s3:eu:1:accesspoint/a/data@2024/x", "s3://arn:aws:s3:eu:1:accesspoint/a/data@2024/x"),
        ("http://[::1]:9000/x@y", "http://[::1]:9000/x@y"),
        ("https://token@host/a?b", "https://…@host/a?…"),
        ("simplecache::https://u:p@h/a?b", "simplecache::https://…@h/a?…"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("hf://datasets/me/corpus@refs%2Fpr%2F1/a.parquet", "hf://datasets/me/corpus@refs%2Fpr%2F1/a.parquet"),
        ("s3://bucket/what?.parquet", "s3://bucket/what?.parquet"),
        ("/data/a@b?c.parquet", "/data/a@b?c.parquet"),
        ("caf\udce9", "caf\\udce9"),
    ],
)  # fmt: skip
def test_secrets_of_urls_are_not_shown(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown
    shown.encode()


def test_a_line_of_json_stays_one():
    said = {"file": SIGNED, "reason": f'"{SIGNED}" \n {SIGNED}\ncaf\udce9', "n": 1}
    line = redact(json.dumps(said, ensure_ascii=False))
    found = json.loads(line)
    assert found["file"] == SHOWN and found["n"] == 1
    assert "5ecre7" not in line and found["reason"].endswith("caf\udce9")
    line.encode()
