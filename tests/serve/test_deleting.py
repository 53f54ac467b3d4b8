"""What goes with a job: the uploads and the folder of work that it alone used, at once or by age; the base's stay."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
import urllib.request
from collections import namedtuple

import pytest
from starlette.testclient import TestClient

from sa3dist.serve import attempts
from sa3dist.serve.files import FileStore
from tests.helpers.endpoint import PATH, REQUEST, application, key_headers, listening
from tests.helpers.servers import s3_bucket

URL = {**REQUEST, "audio_data_url": "https://example.org/clips.zip"}


def end(store, *jobs) -> None:
    for job in jobs:
        store.cancel(job.id)


def submit(store, work, **words):
    return store.submit(URL, app="a", key="k", settings={"work_dir": str(work)}, **words)


@pytest.fixture
def work(store):
    """A folder of work with something in it."""
    folder = store.work_folder("k", "data")
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/shard-00000.tar").write_bytes(b"clips")
    return folder


def test_a_folder_of_work_goes_with_the_last_job_that_has_it(store, work):
    first, second = submit(store, work), submit(store, work)
    end(store, first)
    store.delete(first.id)
    # The second waits, and will want it.
    assert (work / "shards/shard-00000.tar").exists()
    end(store, second)
    store.delete(second.id)
    assert not work.exists()
    assert list(store.folder.iterdir()) == []


def test_retention_takes_the_folders_of_work_along_of_many_jobs(store, work, monkeypatch):
    monkeypatch.setattr("sa3dist.serve.job_store.MOST_DELETED", 2)
    other = store.work_folder("k", "other")
    other.mkdir()
    end(store, *(submit(store, work) for _ in range(5)))
    waiting = submit(store, other)
    time.sleep(0.05)
    assert store.delete_expired(days=0.04 / 86400) == 5
    assert (work.exists(), other.exists()) == (False, True)
    assert [job.id for job in store.list()] == [waiting.id]


def test_what_a_server_was_killed_over_is_swept(store, work):
    job = submit(store, work)
    end(store, job)
    # As ``delete`` leaves it before the folder is removed.
    job.folder.mkdir()
    os.replace(work, job.folder / "work")
    store.delete(job.id)
    job.folder.mkdir()
    (job.folder / "work").mkdir()
    store.sweep()
    assert not job.folder.exists()


def test_jobs_of_one_key_share_the_work_on_the_same_data_whatever_its_address(tmp_path):
    one, two = key_headers(tmp_path, "one"), key_headers(tmp_path, "two")
    with application(tmp_path, is_open=False) as (app, store), TestClient(app) as client:

        def work_of(request, headers, data=None):
            if data is not None:
                request = {
                    **request,
                    "audio_data_url": client.put("/files/a.zip", content=data, headers=headers).json()["url"],
                }
            made = client.post(PATH, json=request, headers=headers).json()
            return store.get(made["request_id"]).settings["work_dir"]

        same = {work_of({**REQUEST, "seed": seed}, one, b"clips") for seed in (1, 2)}
        different = {
            work_of(REQUEST, one, b"others"),
            work_of(REQUEST, two, b"clips"),
            work_of(URL, one),
            work_of(URL, two),
        }
        assert len(same) == 1
        assert len(same | different) == 5
        assert work_of({**URL, "seed": 1}, one) == work_of(URL, one)
        assert work_of(REQUEST, one) == work_of({**REQUEST, "seed": 1}, one)


def test_the_work_of_the_base_is_shared_by_all_data_and_stays(tmp_path):
    shared, work = tmp_path / "work", tmp_path / "work" / "0123"
    for _ in range(2):
        attempts.share_work_of_base(work, shared)
    (work / "digests" / "base.json").write_text("{}")
    os.replace(work, tmp_path / "moved")
    assert (shared / "digests" / "base.json").exists()
    attempts.share_work_of_base(shared, shared)
    assert not (shared / "digests").is_symlink()


def test_a_stream_ends_when_its_job_is_deleted(tmp_path, caplog):
    with application(tmp_path) as (app, store), listening(app) as port:

        def ask(method: str, path: str, data: bytes | None = None):
            address = f"http://127.0.0.1:{port}{PATH}{path}"
            return urllib.request.urlopen(urllib.request.Request(address, data, method=method), timeout=30)

        job = f"/requests/{json.load(ask('POST', '', json.dumps(URL).encode()))['request_id']}"
        with ask("GET", f"{job}/status/stream") as stream:
            assert b"IN_QUEUE" in stream.readline()
            for method, path in (("PUT", "/cancel"), ("DELETE", "")):
                ask(method, job + path).close()
            stream.read()
    assert not [entry for entry in caplog.records if entry.exc_info]


def aged(folder, file_id: str) -> None:
    for path in folder.glob(f"{file_id}.*"):
        os.utime(path, (1, 1))


def test_by_age_go_the_uploads_that_no_unfinished_job_needs(tmp_path):
    with application(tmp_path, keep_days=1) as (app, store), TestClient(app) as client:
        urls = [
            client.put(f"/files/{name}", content=name.encode()).json()["url"]
            for name in ("new", "old", "needed", "used")
        ]
        jobs = [
            store.get(client.post(PATH, json={**REQUEST, "audio_data_url": url}).json()["request_id"])
            for url in urls[2:]
        ]
        for url in urls[1:]:
            aged(tmp_path / "files", url.split("/")[-2])
        end(store, jobs[1])
        app.state.service.remove_expired_files()
        assert [client.get(url).status_code for url in urls] == [200, 404, 200, 404]
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_what_a_killed_server_has_left_of_uploads_goes_after_a_day(tmp_path):
    with application(tmp_path) as (app, _), TestClient(app) as client:
        made = client.post("/files/upload/multipart").json()
        client.put(f"{made['access_url']}/multipart/{made['uploadId']}/1", content=b"abc")
        kept = client.put("/files/a.zip", content=b"abc").json()["url"]
        files = tmp_path / "files"
        for name in (f"{'0' * 32}.data.01234567.tmp", f"{'1' * 32}.data"):
            (files / name).write_bytes(b"half")
        app.state.service.remove_expired_files()
        assert len(list(files.iterdir())) == 5
        for path in files.iterdir():
            os.utime(path, (1, 1))
        app.state.service.remove_expired_files()
        assert sorted(path.suffix for path in files.iterdir()) == [".data", ".json"]
        assert client.get(kept).content == b"abc"


def test_an_upload_that_two_jobs_read_goes_with_the_second(tmp_path):
    with application(tmp_path) as (app, store), TestClient(app) as client:
        url = client.put("/files/clips.zip", content=b"abc").json()["url"]
        made = [client.post(PATH, json={**REQUEST, "audio_data_url": url, "seed": seed}).json() for seed in (1, 2)]
        for job, status in zip(made, (200, 404), strict=True):
            client.put(job["cancel_url"])
            assert client.delete(job["response_url"]).status_code == 200
            assert client.get(url).status_code == status


def test_two_servers_share_files_in_an_object_store(monkeypatch):
    with s3_bucket(monkeypatch) as system:
        one, other = (FileStore("s3://clips/files") for _ in range(2))
        # Nothing is there yet, not even a folder; what is written later is seen all the same.
        other.sweep(set())
        whole, in_parts, begun = (dataclasses.replace(one.new("k", "a.zip", ""), created=1.0) for _ in range(3))
        with one.writing(whole.id) as out:
            out.write(b"abc")
        one.keep(whole, out)
        assert other.find(whole.id).size == 3
        assert other.address(whole.id) == f"s3://clips/files/{whole.id}.data"
        assert other.id_of(one.address(whole.id)) == whole.id
        assert other.id_of(f"s3://other/files/{whole.id}.data") is None
        for note in (in_parts, begun):
            one.begin_parts(note)
        with contextlib.suppress(ConnectionError), one.writing_part(in_parts.id, 1) as out:
            out.write(b"half")
            raise ConnectionError
        with one.writing_part(in_parts.id, 1) as out:
            out.write(b"de")
        assert other.parts_size(in_parts.id, without=2) == 2
        assert other.complete_parts(in_parts, [1]).size == 2
        assert one.open(in_parts.id).read() == b"de"
        one.sweep({in_parts.id}, keep_seconds=-10)
        assert sorted(system.find("clips")) == [f"clips/files/{in_parts.id}.{kind}" for kind in ("data", "json")]


def test_an_upload_whose_end_is_sent_again_is_there_and_stays_as_it_is(tmp_path):
    with application(tmp_path) as (app, _), TestClient(app) as client:
        made = client.post("/files/upload/multipart", headers={"X-Fal-File-Name": "a.zip"}).json()
        place = f"{made['access_url']}/multipart/{made['uploadId']}"
        client.put(f"{place}/1", content=b"abc")
        ends = [client.post(f"{place}/complete", json={"parts": [{"partNumber": 1}]}) for _ in range(2)]
        assert [end.json() for end in ends] == [ends[0].json()] * 2
        assert client.put(f"{place}/1", content=b"other").status_code == 409
        signed = client.post("/rest/storage/upload/initiate", json={"file_name": "a.zip"}).json()
        for content in (b"first", b"second"):
            assert client.put(signed["upload_url"], content=content).status_code == 200
        assert client.get(signed["file_url"]).content == b"first"
    assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == [".data", ".data", ".json", ".json"]


def test_uploads_that_are_completed_twice_at_once_are_complete(tmp_path, monkeypatch):
    with application(tmp_path) as (app, _), TestClient(app) as client:
        made = client.post("/files/upload/multipart", headers={"X-Fal-File-Name": "a.zip"}).json()
        place = f"{made['access_url']}/multipart/{made['uploadId']}"
        client.put(f"{place}/1", content=b"abc")
        files, end = app.state.service.files, {"json": {"parts": [{"partNumber": 1}]}}
        join, answers = files.complete_parts, []

        def join_after_another(*words):
            monkeypatch.setattr(files, "complete_parts", join)
            answers.append(client.post(f"{place}/complete", **end))
            return join(*words)

        monkeypatch.setattr(files, "complete_parts", join_after_another)
        answers.append(client.post(f"{place}/complete", **end))
        assert [answer.json().get("access_url") for answer in answers] == [made["access_url"]] * 2


def test_parts_are_joined_only_if_the_disk_has_room_for_both(tmp_path, monkeypatch):
    with application(tmp_path) as (app, _), TestClient(app) as client:
        made = client.post("/files/upload/multipart", headers={"X-Fal-File-Name": "a.zip"}).json()
        place = f"{made['access_url']}/multipart/{made['uploadId']}"
        client.put(f"{place}/1", content=b"a" * 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(999))
        assert client.post(f"{place}/complete", json={"parts": [{"partNumber": 1}]}).status_code == 507


def test_data_in_a_request_is_stored_once_and_only_for_a_job(tmp_path):
    def count():
        return len(list((tmp_path / "files").iterdir()))

    with application(tmp_path) as (app, _), TestClient(app) as client:
        assert len({client.post(PATH, json=REQUEST).json()["request_id"] for _ in range(3)}) == 1
        assert count() == 2
        full = client.post(PATH, json={**REQUEST, "seed": 1}, params={"fal_max_queue_length": 0})
        assert (full.status_code, count()) == (429, 2)
        damaged = client.post(PATH, json={**REQUEST, "seed": 2, "lora_checkpoint_url": "data:;base64,?"})
        assert (damaged.status_code, count()) == (422, 2)


def test_data_of_a_request_that_is_not_to_be_stored_goes_with_its_time(tmp_path, monkeypatch):
    with application(tmp_path) as (app, store), TestClient(app) as client:
        made = client.post(PATH, json=REQUEST, headers={"X-Fal-Store-IO": "0"}).json()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 2 * 3600)
        app.state.service.remove_expired_files()
        assert len(list((tmp_path / "files").iterdir())) == 2
        store.cancel(made["request_id"])
        app.state.service.remove_expired_files()
    assert list((tmp_path / "files").iterdir()) == []


def test_a_part_that_is_sent_again_is_not_lost_with_its_broken_first_try(tmp_path):
    files = FileStore(str(tmp_path))
    note = files.new("k", "a.zip", "")
    files.begin_parts(note)
    broken = files.writing_part(note.id, 1)
    broken.__enter__().write(b"ha")
    with files.writing_part(note.id, 1) as out:
        out.write(b"whole")
    broken.__exit__(ConnectionError, ConnectionError(), None)
    files.complete_parts(note, [1])
    assert files.open(note.id).read() == b"whole"
    assert files.find(note.id).size == 5
