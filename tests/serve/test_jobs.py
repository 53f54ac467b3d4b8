"""Jobs are accepted once, given out in their turn, and changed only by the attempt that holds them."""

import threading
import time

import pytest
from sqlalchemy import select

from sa3dist.errors import ConfigError
from sa3dist.serve import leases as leases_module
from sa3dist.serve.job_store import JobStore, QueueFull, Unfinished
from sa3dist.serve.leases import Leases
from sa3dist.serve.options import RunOptions
from sa3dist.serve.tables import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, DatabaseAway, deliveries
from sa3dist.serve.webhooks import Outbox

APP = "fal-ai/stable-audio-3-trainer"
REQUEST = {"audio_data_url": "https://example.org/clips.zip", "number_of_steps": 7}
RESULT = {"lora_file": {"url": "file:///lora.safetensors", "file_size": 3}}
ERROR = {"detail": "no room", "error_type": "runner_server_error"}


def submit(store, **words):
    return store.submit(REQUEST, **{"app": APP, "key": "k", **words})


def place(host="a", devices=(0,), **words):
    return RunOptions(**{"executor": "local", "devices": devices, "host": host, "work_dir": "", "locks": "", **words})


@pytest.fixture
def leases(store):
    return Leases(store)


def test_a_submitted_job_is_read_back_as_it_was_given(store):
    job = submit(store, priority=3, webhook="https://example.org/hook", settings={"model": "/base"})
    assert store.get(job.id) == job
    assert (job.state, job.request, job.settings) == (QUEUED, REQUEST, {"model": "/base"})
    assert (job.steps, job.step, job.attempts, job.cancel) == (7, 0, 0, False)
    assert abs(job.created - time.time()) < 5
    assert job.folder == store.folder / job.id
    assert store.get("0" * 32) is None


def test_jobs_are_given_out_by_priority_and_then_by_arrival(store, leases):
    wanted = [submit(store, priority=priority).id for priority in (10, 10, 20, 10, 5)]
    by_turn = [wanted[4], wanted[0], wanted[1], wanted[3], wanted[2]]
    assert [leases.claim(place(devices=range(9))).id for _ in wanted] == by_turn
    assert leases.claim(place(devices=range(9))) is None


def test_a_hundred_submits_at_once_are_all_accepted_and_alike_ones_once(store):
    found = []

    def send(number):
        found.append(submit(store, dedup="same" if number % 2 else f"own {number}").id)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    assert len(set(found)) == 51
    assert [job.state for job in store.list()] == [QUEUED] * 51


def test_a_replay_gets_the_first_job_until_that_has_ended(store, leases):
    first = submit(store, dedup="x")
    assert submit(store, dedup="x").id == first.id
    running = leases.claim(place())
    assert submit(store, dedup="x").id == first.id
    assert leases.succeed(running, RESULT)
    assert submit(store, dedup="x").id != first.id


def test_a_request_like_one_that_was_cancelled_gets_a_job_of_its_own(store, leases):
    first = submit(store, dedup="x")
    leases.claim(place())
    assert store.cancel(first.id).cancel
    second = submit(store, dedup="x")
    assert second.id != first.id
    assert submit(store, dedup="x").id == second.id
    assert store.cancel(second.id).state == CANCELLED
    assert submit(store, dedup="x").id != second.id


def test_a_full_queue_refuses_and_keeps_nothing(store):
    submit(store)
    submit(store, max_queue=1)
    with pytest.raises(QueueFull, match="2 requests are waiting, more than 1"):
        submit(store, max_queue=1)
    assert [job.state for job in store.list()] == [QUEUED] * 2


def test_jobs_share_out_the_devices_of_a_host_and_stay_within_the_limit(store, leases):
    for _ in range(6):
        submit(store)
    two = place("a", devices=range(4), gpus=True, devices_per_job=2, limit=3)
    assert [leases.claim(two).devices for _ in range(2)] == [[0, 1], [2, 3]]
    assert leases.claim(two) is None
    assert leases.claim(place("b", devices=(0, 1), limit=3)).devices == [0]
    # A device of b is free, but three run.
    assert leases.claim(place("b", devices=(0, 1), limit=3)) is None


def test_many_servers_that_claim_at_once_get_each_job_once(store, database_url, tmp_path):
    for _ in range(12):
        submit(store)
    claimed = []

    def serve(number):
        own = JobStore(database_url, tmp_path / "jobs")
        while (job := Leases(own).claim(place("a", devices=range(12)))) is not None:
            claimed.append((job.id, *job.devices))
        own.close()

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 12
    assert len({job_id for job_id, _ in claimed}) == 12
    assert {device for _, device in claimed} == set(range(12))


def test_only_the_newest_attempt_changes_a_job(store, leases):
    submit(store)
    first = leases.claim(place(lease_seconds=0.05))
    assert leases.publish(first, stage="train", step=3)
    time.sleep(0.1)
    assert not leases.renew(first, 30)
    # Its number still counts: nobody else has begun, and its work is done.
    assert leases.publish(first, step=4)
    leases.end_overdue()
    assert store.get(first.id).state == QUEUED
    second = leases.claim(place("b"))
    assert (second.id, second.fence, second.attempts, second.failures) == (first.id, 2, 2, 1)
    assert second.started == first.started
    stale = [leases.renew(first, 30), leases.publish(first, step=5), leases.succeed(first, RESULT)]
    stale += [leases.fail(first, ERROR, 2), leases.cancel(first, None), leases.try_again(first, ERROR, 70, True)]
    assert stale == [False] * 6
    assert leases.cancelled(first) is None
    assert leases.renew(second, 30)
    assert leases.succeed(second, RESULT)
    assert not leases.succeed(second, RESULT)
    done = store.get(first.id)
    assert (done.state, done.step, done.result, done.exit_code) == (SUCCEEDED, 7, RESULT, 0)


def test_a_finish_needs_no_living_lease(store, leases):
    submit(store)
    job = leases.claim(place(lease_seconds=0.01))
    time.sleep(0.05)
    assert leases.succeed(job, RESULT)


def test_a_lost_attempt_and_a_failed_one_use_up_retries_and_a_preempted_one_does_not(store, leases, monkeypatch):
    monkeypatch.setattr(leases_module, "FIRST_PAUSE_SECONDS", 0.0)
    submit(store, retries=2)
    for _ in range(3):
        assert leases.try_again(leases.claim(place()), ERROR, 75, counts=False)
    assert leases.try_again(leases.claim(place()), ERROR, 70, counts=True)
    leases.claim(place(lease_seconds=0.01))
    time.sleep(0.05)
    leases.end_overdue()
    job = leases.claim(place())
    assert (job.state, job.failures, job.attempts) == (RUNNING, 2, 6)
    assert leases.try_again(job, ERROR, 70, counts=True)
    ended = store.get(job.id)
    assert (ended.state, ended.error, ended.exit_code) == (FAILED, ERROR, 70)


def test_a_failed_attempt_is_followed_after_a_pause_and_others_go_first(store, leases):
    first, second = submit(store), submit(store)
    assert leases.try_again(leases.claim(place()), ERROR, 70, counts=True)
    assert store.get(first.id).state == QUEUED
    assert leases.claim(place()).id == second.id
    assert leases.claim(place(devices=(0, 1))) is None


def test_cancel_ends_what_waits_and_asks_what_runs(store, leases):
    waiting, running = submit(store), submit(store, priority=1)
    job = leases.claim(place())
    assert leases.cancelled(job) is False
    assert store.cancel(waiting.id).state == CANCELLED
    asked = store.cancel(running.id)
    assert (asked.state, asked.cancel) == (RUNNING, True)
    assert leases.cancelled(job) is True
    assert leases.cancel(job, -15)
    ended = store.cancel(running.id)
    assert (ended.state, ended.error["error_type"]) == (CANCELLED, "client_cancelled")
    assert store.cancel("0" * 32) is None


def test_a_cancelled_job_whose_host_is_lost_is_not_run_again(store, leases):
    submit(store)
    job = leases.claim(place(lease_seconds=0.01))
    store.cancel(job.id)
    time.sleep(0.05)
    leases.end_overdue()
    assert store.get(job.id).state == CANCELLED


def test_what_may_still_be_on_a_cluster_is_claimed_once_more_to_be_cancelled(store, leases):
    submit(store)
    cluster = place(executor="slurm", lease_seconds=0.01)
    job = leases.claim(cluster)
    store.cancel(job.id)
    time.sleep(0.05)
    leases.end_overdue()
    full = place(executor="slurm", devices=())
    again = leases.claim(full)
    assert (again.id, again.cancel, again.devices) == (job.id, True, [])


def test_a_job_that_does_not_start_in_its_time_fails_and_one_that_did_start_does_not(store, leases):
    late, begun = submit(store, start_timeout=0.05), submit(store, start_timeout=0.05, priority=1)
    leases.try_again(leases.claim(place()), ERROR, 75, counts=False)
    time.sleep(0.1)
    leases.end_overdue()
    assert store.get(late.id).error["error_type"] == "startup_timeout"
    assert store.get(begun.id).state == QUEUED


def test_every_end_leaves_its_webhook_in_the_same_transaction(store, leases):
    hook = {"webhook": "https://example.org/hook"}
    outbox = Outbox(store.database)
    done, late, waiting = (submit(store, **hook, start_timeout=timeout) for timeout in (None, 0.01, None))
    assert leases.succeed(leases.claim(place()), RESULT)
    time.sleep(0.05)
    leases.end_overdue()
    store.cancel(waiting.id)
    submit(store)
    due = outbox.due(30)
    assert {delivery.job_id for delivery in due} == {done.id, late.id, waiting.id}
    assert {(delivery.url, delivery.tries) for delivery in due} == {(hook["webhook"], 1)}


def test_a_delivery_is_tried_until_it_arrives_or_is_given_up(store, leases):
    outbox = Outbox(store.database)
    for _ in range(2):
        store.cancel(submit(store, webhook="https://example.org/hook").id)
    first, second = outbox.due(0.01)
    assert outbox.due(30, limit=0) == []
    time.sleep(0.05)
    # Its server was killed meanwhile: another one has its turn.
    first, second = outbox.due(30)
    assert outbox.due(30) == []
    outbox.delivered(first)
    outbox.failed(second, "connection refused", 0.0)
    (again,) = outbox.due(30)
    assert (again.id, again.tries) == (second.id, 3)
    outbox.failed(again, "404", None)
    with store.database.reading() as connection:
        rows = connection.execute(select(deliveries.c.next_try, deliveries.c.error)).all()
    assert sorted(rows, key=str) == [(None, "404"), (None, None)]


def test_changes_are_seen_once_each_and_none_is_missed(store, leases):
    first = submit(store)
    found, token = store.changed_since(None)
    assert [job.id for job in found] == [first.id]
    assert store.changed_since(token)[0] == []
    second = submit(store)
    job = leases.claim(place())
    found, token = store.changed_since(token)
    assert {(each.id, each.state) for each in found} == {(first.id, RUNNING), (second.id, QUEUED)}
    for step in (1, 2):
        leases.publish(job, step=step)
        found, token = store.changed_since(token)
        assert [(each.id, each.step) for each in found] == [(first.id, step)]
    leases.succeed(job, RESULT)
    store.delete(first.id)
    found, token = store.changed_since(token)
    assert [(each.id, each.state, each.request) for each in found] == [(first.id, "DELETED", {})]
    assert store.changed_since(token)[0] == []


def test_a_deleted_job_is_gone_with_its_files_and_one_that_runs_is_not_deleted(store, leases):
    job = submit(store, webhook="https://example.org/hook")
    with pytest.raises(Unfinished, match=f"{job.id}: is QUEUED; cancel it first"):
        store.delete(job.id)
    store.cancel(job.id)
    (job.folder / "attempt-1").mkdir(parents=True)
    assert store.delete(job.id)
    assert store.get(job.id) is None
    assert store.list() == []
    assert not job.folder.exists()
    assert Outbox(store.database).due(30) == []
    assert not store.delete(job.id)
    # A server that was killed between the row and the folder.
    job.folder.mkdir()
    store.sweep()
    assert not job.folder.exists()


def test_retention_deletes_what_ended_long_ago_alone(store):
    old, waits = submit(store), submit(store)
    store.cancel(old.id)
    old.folder.mkdir()
    assert store.delete_expired(days=1) == 0
    time.sleep(0.05)
    assert store.delete_expired(days=0.04 / 86400) == 1
    assert not old.folder.exists()
    assert [job.id for job in store.list()] == [waits.id]


@pytest.mark.parametrize("days", [None, 1])
def test_a_job_is_kept_no_longer_than_it_asked(store, days):
    short, long, silent = (submit(store, keep_seconds=seconds) for seconds in (0.04, 7e5, None))
    for job in (short, long, silent):
        store.cancel(job.id)
    time.sleep(0.05)
    assert store.delete_expired(days) == 1
    assert {job.id for job in store.list()} == {long.id, silent.id}


def test_jobs_find_their_files_when_the_folder_with_all_files_has_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    store = JobStore(f"sqlite:///{old / 'jobs.db'}")
    paths = {"audio_data_url": f"{old}/files/0.data", "lora_checkpoint_url": "s3://bucket/a", "work_dir": "/work"}
    made = submit(store, settings={**paths, "seed": 1})
    assert store.get(made.id).settings == made.settings == {**paths, "seed": 1}
    store.close()
    old.rename(new)
    store = JobStore(f"sqlite:///{new / 'jobs.db'}")
    paths["audio_data_url"] = f"{new}/files/0.data"
    assert (store.get(made.id).settings, store.used_paths()) == ({**paths, "seed": 1}, {*paths.values()})
    store.close()


def test_jobs_are_listed_newest_first_and_by_key(store):
    mine = [submit(store).id for _ in range(3)]
    other = submit(store, key="other")
    assert [job.id for job in store.list()] == [other.id, *reversed(mine)]
    listed = store.list(key="k", limit=2)
    assert [job.id for job in listed] == mine[:0:-1]
    assert [job.id for job in store.list(key="k", before=listed[-1].number)] == mine[:1]


@pytest.mark.parametrize("url", ["mysql://host/jobs", "sqlite://", "sqlite:///:memory:", "nothing"])
def test_an_address_that_is_none_is_refused_in_a_line(url, tmp_path):
    with pytest.raises(ConfigError, match="^database: "):
        JobStore(url, tmp_path)


def test_a_database_that_is_away_is_named(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(DatabaseAway, match="^database: "):
        JobStore(f"postgresql://nobody@/none?host={tmp_path}", tmp_path)


def test_a_damaged_database_file_is_named_with_what_to_do(tmp_path):
    (tmp_path / "jobs.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(DatabaseAway, match=r"^database: file is not a database; restore the file, or move it away"):
        JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path)
