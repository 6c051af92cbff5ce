"""Files are whole, their tenant's own, bounded, and gone when their time is over."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, func, select

from serving.batches.file_store import UPLOAD_S, FileStore
from serving.batches.page import Page
from serving.batches.stored_file import MAX_FILES, Purpose, StoredFile, new_file
from serving.errors import InvalidRequestError, NotFoundError
from serving.tenants.database import reading
from serving.tenants.schema import FILE_CHUNKS

DAY_S = 86400.0


def write(store: FileStore, *chunks: bytes, tenant: str = "team", now_s: float = 1000.0) -> StoredFile:
    file = new_file(tenant, "in.jsonl", Purpose.BATCH, now_s, DAY_S)
    store.begin(file)
    for number, chunk in enumerate(chunks):
        store.append(file, number, chunk)
    return store.complete(file, now_s + DAY_S)


def num_chunks(engine: Engine) -> int:
    with reading(engine) as connection:
        return int(connection.execute(select(func.count()).select_from(FILE_CHUNKS)).scalar_one())


def test_a_file_is_its_tenants_and_has_its_chunks_in_order(engine: Engine) -> None:
    store = FileStore(engine, 100)
    file = write(store, b"ab", b"", b"c")
    assert (file.num_bytes, file.expires_s) == (3, 1000.0 + DAY_S) and store.get("team", file.file_id) == file
    assert store.chunks(file.file_id, 0, 2) == [(0, b"ab"), (1, b"")]
    assert store.chunks(file.file_id, 2, 9) == [(2, b"c")]
    for tenant, file_id in (("other", file.file_id), ("team", "file-\x00"), ("team", "\udc80")):
        with pytest.raises(NotFoundError, match="there is no file"):
            store.get(tenant, file_id)
    with pytest.raises(NotFoundError):
        store.delete("other", file.file_id)
    store.delete("team", file.file_id)
    with pytest.raises(NotFoundError):
        store.get("team", file.file_id)
    assert store.sweep(2000.0) == 3 and store.sweep(2000.0) == 0 and num_chunks(engine) == 0


def test_what_is_not_complete_is_not_there_and_is_given_up_one_day(engine: Engine) -> None:
    store = FileStore(engine, 100)
    file = new_file("team", "x", Purpose.BATCH, 1000.0, DAY_S)
    store.begin(file)
    store.append(file, 0, b"x")
    with pytest.raises(NotFoundError):
        store.get("team", file.file_id)
    assert store.list_page("team", Page(10)) == ([], False)
    assert store.sweep(1000.0 + UPLOAD_S) == 0 and store.sweep(1001.0 + UPLOAD_S) == 1
    with pytest.raises(InvalidRequestError, match="did not come within"):
        store.complete(file, 2000.0)


def test_an_expired_file_goes(engine: Engine) -> None:
    store = FileStore(engine, 100)
    file = write(store, b"x")
    assert store.sweep(file.expires_s - 1) == 0 and store.get("team", file.file_id) == file
    assert store.sweep(file.expires_s) == 1
    with pytest.raises(NotFoundError):
        store.get("team", file.file_id)


def test_a_tenants_bytes_and_files_are_bounded_and_others_are_not_concerned(engine: Engine,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(engine, 5)
    write(store, b"abc")
    file = new_file("team", "x", Purpose.BATCH, 1000.0, DAY_S)
    store.begin(file)
    with pytest.raises(InvalidRequestError, match="more than 5 bytes"):
        store.append(file, 0, b"abc")
    assert store.chunks(file.file_id, 0, 9) == []
    store.append(file, 0, b"ab")
    assert write(store, b"abc", tenant="other").num_bytes == 3
    assert MAX_FILES > 2
    monkeypatch.setattr("serving.batches.file_store.MAX_FILES", 2)
    with pytest.raises(InvalidRequestError, match="there are 2 files"):
        store.begin(new_file("team", "x", Purpose.BATCH, 1000.0, DAY_S))


def test_pages_of_a_list(engine: Engine) -> None:
    store = FileStore(engine, 100)
    files = [write(store, b"x", now_s=1000.0 + number // 2) for number in range(5)]
    in_order = sorted(files, key=lambda file: (file.created_s, file.file_id))
    assert store.list_page("team", Page(5)) == (in_order[::-1], False)
    assert store.list_page("team", Page(2, newest_first=False)) == (in_order[:2], True)
    assert store.list_page("team", Page(2, in_order[1].file_id, newest_first=False)) == (in_order[2:4], True)
    assert store.list_page("team", Page(2, in_order[2].file_id)) == (in_order[1::-1], False)
    assert store.list_page("team", Page(2), "batch_output") == ([], False)
    with pytest.raises(NotFoundError) as raised:
        store.list_page("team", Page(2, "file-none"))
    assert raised.value.param == "after"


def test_a_name_is_what_can_be_shown() -> None:
    assert new_file("", "a\x00b\n\u202e.jsonl", Purpose.BATCH, 0, 1).filename == "ab.jsonl"
    assert new_file("", "\x00", Purpose.BATCH, 0, 1).filename == "file"
    assert len(new_file("", "x" * 999, Purpose.BATCH, 0, 1).filename) == 255
