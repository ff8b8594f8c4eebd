"""Work spread over processes: the same bytes, whoever did it and whoever died, and one line where it cannot be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.cluster import workers
from swquant.cluster.workers import Team, Workers, WorkersError, team
from swquant.compress import remote
from swquant.compress.remote import check_workers
from swquant.progress import Progress

OPTIONS = {"prompt": PROMPT, "bits": 8, "outliers": 0.01, "shard_size": "1MB"}
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs swquant[ray]")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Before the work


@pytest.mark.parametrize(
    ("count", "address", "words"),
    [
        (0, None, "workers 0 is outside 1 to 1024"),
        (5000, None, "workers 5000 is outside"),
        (2, "host:6379", "--workers 2 are of this machine, --ray host:6379 has its own; use one"),
    ],
)
def test_who_cannot_work(count: int, address: str | None, words: str) -> None:
    with pytest.raises(swquant.SwquantError, match=words):
        Workers(count, address)


def test_one_worker_is_this_process() -> None:
    for one in (Workers(), Workers(1)):
        one.check()
        with team(one) as nobody:
            assert nobody is None


def test_without_ray_the_remedy_is_named_before_the_work(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(swquant.SwquantError, match=r"not installed: pip install .swquant\[ray\]"):
        swquant.compress(bf16_llama.folder, tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Somebody who answers so, or never."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            connection, _ = server.accept()
            kept.append(connection)
            if answer is not None:
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["nonsense", "host", "host:", ":6379", "host:99999", "host:port"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(swquant.SwquantError, match="not an address; give HOST:PORT"):
        workers._check_answers(address)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "does not answer"), (b"HTTP/1.1 400 Bad Request\r\n", "is not Ray"), (b"", "is not Ray|does not answer")],
)
def test_an_address_where_no_ray_is_is_one_line_within_seconds(
    answer: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SECONDS", 0.5)
    start = time.monotonic()
    with listener(answer) as address, pytest.raises(swquant.SwquantError, match=words):
        workers._check_answers(address)
    assert time.monotonic() - start < 5


def test_an_address_where_nobody_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(swquant.SwquantError, match="does not answer .*; give HOST:PORT of the head"):
        workers._check_answers(f"127.0.0.1:{port}")


# With Ray


@pytest.fixture(scope="module")
def whole(wide_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    swquant.compress(wide_llama.folder, out, **OPTIONS)  # type: ignore[arg-type]
    return tree(out)


@pytest.fixture(scope="module")
def two() -> Iterator[Team]:
    with team(Workers(2)) as made:
        assert made is not None
        yield made


@with_ray
@pytest.mark.slow
def test_results_come_in_order_and_not_too_many_are_under_way(two: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BYTES", 1)
    begun, most = 0, 0

    def tasks() -> Iterator[tuple[str]]:
        nonlocal begun
        for number in range(40):
            begun += 1
            yield (str(number),)

    results = []
    for task, result in two.in_order(os.path.join, "all", tasks(), lambda task: 10):
        results.append(result)
        assert result == f"all/{task[0]}"
        most = max(most, begun - len(results))
    assert results == [f"all/{number}" for number in range(40)]
    assert 1 <= most <= two.slots + 1


@with_ray
@pytest.mark.slow
def test_an_error_of_the_work_is_what_it_is(two: Team) -> None:
    with pytest.raises(ValueError, match="no path specified"):
        list(two.in_order(os.path.relpath, "", [("x",)], lambda task: 1))
    assert list(two.everywhere(os.path.join, "a", "b").values()) == ["a/b"]


@with_ray
@pytest.mark.slow
def test_workers_who_differ_or_cannot_see_the_model(
    two: Team, bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(bf16_llama.folder, tmp_path / "model"))
    with open_checkpoint(folder) as checkpoint:
        check_workers(two, checkpoint)
        with monkeypatch.context() as patch:
            patch.setattr(remote, "__version__", "9.9")
            with pytest.raises(WorkersError, match=r"a worker has swquant 0.*, this process 9.9; the same is needed"):
                check_workers(two, checkpoint)
        folder.rename(tmp_path / "elsewhere")
        checkpoint.fingerprint += " of another"  # not what a worker remembers
        with pytest.raises(WorkersError, match="a worker cannot see .*/model; put the model on storage that all"):
            check_workers(two, checkpoint)
        shutil.copytree(tmp_path / "elsewhere", folder)
        with pytest.raises(WorkersError, match="a worker sees another model at .*/model"):
            check_workers(two, checkpoint)


@with_ray
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_two_workers_give_the_bytes_of_one(wide_llama: Planted, two: Team, tmp_path: Path, preset: str) -> None:
    """`two` is running: compress joins it."""
    options = {**OPTIONS, "preset": preset, **({"texts": 2} if preset == "best" else {})}
    swquant.compress(wide_llama.folder, tmp_path / "one", **options)  # type: ignore[arg-type]
    swquant.compress(wide_llama.folder, tmp_path / "two", workers=2, **options)  # type: ignore[arg-type]
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@with_ray
@pytest.mark.slow
def test_a_tensor_that_cannot_be_rounded_is_one_line_from_a_worker_too(source: Path, two: Team, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(swquant.SwquantError, match="NaN") as caught:
        swquant.compress(source, tmp_path / "out", workers=2, prompt=PROMPT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Killing(Progress):
    """Takes a machine out of the cluster in the middle of the work."""

    def __init__(self, kill: object) -> None:
        self.kill, self.seen = kill, 0

    @contextmanager
    def bytes(self, text: str, total: int) -> Iterator[Killing]:
        yield self

    def advance(self, label: str, amount: int) -> None:
        self.seen += 1
        if self.seen == 6:
            self.kill()  # type: ignore[operator]


@with_ray
@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_in_the_middle_gives_the_same_bytes(
    wide_llama: Planted, whole: dict[str, bytes], tmp_path: Path
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of `two`
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first, *_ = [cluster.add_node(num_cpus=1) for _ in range(3)]
        cluster.wait_for_nodes()
        progress = Killing(lambda: cluster.remove_node(first, allow_graceful=False))
        swquant.compress(wide_llama.folder, tmp_path / "out", ray=cluster.address, progress=progress, **OPTIONS)  # type: ignore[arg-type]
        assert progress.seen > 6
        assert tree(tmp_path / "out") == whole
    finally:
        ray.shutdown()
        cluster.shutdown()
