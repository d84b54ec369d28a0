"""The worlds that checks run in: fast to change, honest about failures, and nothing left behind.

Ratios are taken within one run; absolute limits are loose, since the machine is shared. `-s` prints the measurements.
"""

import contextlib
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shardproof.conformance import worlds
from shardproof.conformance.spread import group_of
from shardproof.conformance.worlds import (
    PRELOAD,
    PRELOAD_CLEAN,
    Clean,
    Layout,
    Pool,
    Pools,
    RankError,
    RankTimeout,
    WorldError,
    wire,
)
from shardproof.conformance.worlds.errors import died
from shardproof.conformance.worlds.launcher import borrow, lend, shared_server
from shardproof.conformance.worlds.workers import Workers

HERE = Path(__file__).resolve().parent
HOST = "shardproof.bridges.host:install"
TASKS = "test_worlds_tasks"
LAYOUTS = [
    {"tp": 2, "pp": 2, "vpp": 2},
    {"tp": 4},
    {"cp": 2, "tp": 2},
    {"ep": 4, "etp": 1},
    {"tp": 2, "ep": 2, "etp": 1},
    {"pp": 4},
]


@pytest.fixture(scope="module")
def pools():
    with Pools(host=HOST, limit=2) as live:
        live.get(4)  # so that the first start of four ranks is the one with a cold server, whichever test comes first
        yield live


def task(name):
    return f"{TASKS}:{name}"


# ---------------------------------------------------------------------------------------------------- sizes and layouts
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "".join(f"{k}{v}" for k, v in sizes.items()))
def test_parallel_state_has_the_sizes_asked(pools, layout):
    """parallel_state and the collectives of its groups agree with the layout, in every rank."""
    for rank, seen in enumerate(pools.run(4, task("sizes"), layout=layout)):
        wanted = Layout.of(layout)
        for name in ("tp", "pp", "vpp", "cp", "ep"):
            assert seen[name] == getattr(wanted, name), (name, seen)
        assert seen["etp"] == (wanted.etp or wanted.tp), seen
        assert (seen["rank"], seen["world"], seen["tp_sum"]) == (rank, 4, wanted.tp), seen
        assert seen["dp"] == seen["dp_sum"] == 4 // (wanted.tp * wanted.pp * wanted.cp), seen


def test_a_layout_change_costs_milliseconds(pools):
    """A layout seen before is set at least three times faster than ranks start from a server that is up (some 20 times, measured)."""
    for layout in LAYOUTS:
        pools.run(4, task("sizes"), layout=layout)
    changes = []
    for i in range(24):
        pools.run(4, task("echo"), layout=LAYOUTS[i % len(LAYOUTS)], args=(1,))
        changes.append(max(setup for setup, _ in pools.get(4).seconds))
    with Pool(4, host=HOST) as pool:
        warm = pool.start_seconds
    change = statistics.median(changes)
    print(
        f"\nlayout change {change * 1e3:.1f} ms (median of {len(changes)}); start of 4 ranks {warm * 1e3:.0f} ms; ratio {warm / change:.0f}"
    )
    assert change < warm / 3, (change, warm)


def test_many_layout_changes_leak_neither_threads_nor_descriptors(pools):
    """After a warm-up, 200 layout changes leave the same threads and file descriptors in every rank."""
    for layout in [*LAYOUTS, *LAYOUTS]:
        pools.run(4, task("sizes"), layout=layout)
    before = pools.run(4, task("usage"), layout=LAYOUTS[0])
    start = time.perf_counter()
    for i in range(200):
        pools.run(4, task("echo"), layout=LAYOUTS[(i + 1) % len(LAYOUTS)], args=(i,))
    spent = time.perf_counter() - start
    after = pools.run(4, task("usage"), layout=LAYOUTS[0])
    print(f"\n200 changes in {spent:.2f} s; (threads, descriptors) per rank {before} -> {after}")
    assert after == before


def test_no_layout_means_no_parallel_state(pools):
    """Without a layout a task sees no parallel_state, whatever ran before."""
    pools.run(4, task("sizes"), layout={"tp": 4})
    assert pools.run(4, task("no_parallel_state")) == [False] * 4


def test_a_task_does_not_leak_into_the_next(pools):
    """Virtual stage, default dtype, gradient mode and all random states are as new for every task."""
    layout = {"tp": 2, "pp": 2, "vpp": 2}
    first = pools.run(4, task("draw"), layout=layout)
    pools.run(4, task("spoil_parallel_state"), layout=layout)
    assert [seen["vpp_rank"] for seen in pools.run(4, task("sizes"), layout=layout)] == [0] * 4
    assert pools.run(4, task("torch_state"), layout=layout) == [("torch.float32", True, 1)] * 4
    again, other = pools.run(4, task("draw"), layout=layout), pools.run(4, task("draw"), layout=layout, seed=5)
    for a, b, c in zip(first, again, other, strict=True):
        assert a[:2] == b[:2] and a[2].equal(b[2]) and a[3].equal(b[3])
        assert a[:2] != c[:2] and not a[2].equal(c[2]) and not a[3].equal(c[3])
    assert first[0][3].equal(first[2][3]) and not first[0][3].equal(first[1][3]), "tensor parallel states follow the tp rank"


def test_layouts_come_from_mappings_and_objects():
    """Any object with the names of the sizes is a layout; what is not one is refused with the reason."""

    class Plan:
        tp, pp, vpp, cp, ep, etp = 2, 2, None, 1, 4, 1

    assert Layout.of(Plan()) == Layout.of({"tp": 2, "pp": 2, "ep": 4, "etp": 1}) == Layout(2, 2, None, 1, 4, 1)
    assert Layout.of({"tp": None, "ep": None}) == Layout() and Layout.of(None) is None
    assert (Layout.of(Plan()).ranks, Layout(tp=2, ep=2).ranks, Layout(tp=3, cp=2, ep=2, etp=1).ranks) == (8, 4, 6)
    for bad, words in [({"dp": 2}, "unknown keys"), ({"tp": 0}, "tp=0"), ({"tp": True}, "tp=True"), (object(), "neither")]:
        with pytest.raises(WorldError, match=words):
            Layout.of(bad)


def test_a_layout_that_does_not_fit_is_refused_before_any_rank_runs(pools):
    """The message names the ranks needed; the pool lives on."""
    pools.get(4)
    starts = len(pools.start_seconds[4])
    with pytest.raises(WorldError, match="multiple of 8 ranks and the world has 4"):
        pools.run(4, task("sizes"), layout={"tp": 8})
    with pytest.raises(WorldError, match="module:function"):
        pools.run(4, "no_colon")
    assert pools.run(4, task("echo"), args=(1,)) == [[1]] * 4 and len(pools.start_seconds[4]) == starts


# ------------------------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize(
    "how, type_name, words",
    [
        ("raise", "ValueError", "rank 1 of 4 raised ValueError: planted in rank 1"),
        ("exit", "ProcessDied", "rank 1 of 4 died with exit code 7"),
        ("kill", "ProcessDied", "rank 1 of 4 died with signal 9 (SIGKILL)"),
    ],
)
def test_the_failing_rank_is_named_while_its_peers_wait(pools, how, type_name, words):
    """The error tells the true cause, not the peers' lost connections, with the rank's output; the next run works."""
    pools.get(4)
    start = time.perf_counter()
    with pytest.raises(RankError) as caught:
        pools.run(4, task("fail"), kwargs={"rank": 1, "how": how})
    spent = time.perf_counter() - start
    error = caught.value
    assert (error.rank, error.type_name) == (1, type_name), error
    assert words in str(error) and "about to fail: " + how in error.output, error
    assert ("in fail" in error.traceback_text) == (how == "raise") and "worker.py" not in error.traceback_text, error
    assert spent < 10, spent
    assert pools.run(4, task("echo"), args=(how,), kwargs={"times": 2}) == [[how] * 2] * 4


def test_a_lost_peer_is_never_the_cause():
    """Peers often notice a death before its parent does: their lost connections come after every other failure."""
    lost = RankError(0, "RuntimeError", "[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.", world_size=3)
    death, raised = died(1, -9, "", 3), RankError(2, "ValueError", "planted", world_size=3)
    assert Workers._cause([(1.0, lost), (1.005, death)]) is death
    assert Workers._cause([(2.0, death), (1.0, lost), (1.5, raised)]) is raised
    assert Workers._cause([(1.0, lost)]) is lost
    for error in (lost, death, raised, RankTimeout("m:f", (0, 2), 3.0, {0: "s"}, {2: "o"})):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and vars(again) == vars(error), error


def test_a_hung_rank_is_reported_with_stacks(pools):
    """After the timeout the ranks still running are named with their Python stacks; the next run works."""
    pools.get(4)
    start = time.perf_counter()
    with pytest.raises(RankTimeout) as caught:
        pools.run(4, task("fail"), kwargs={"rank": 2, "how": "hang"}, timeout=3)
    spent = time.perf_counter() - start
    error = caught.value
    assert error.ranks == (0, 1, 2, 3) and 3 <= spent < 10, (error.ranks, spent)
    assert "in _sleep_here" in error.stacks[2] and "all_reduce" in error.stacks[0], error.stacks
    assert "worker.py" not in error.stacks[2] and "still running after 3 s" in str(error)
    assert pools.run(4, task("echo"), args=(0,)) == [[0]] * 4


def test_a_result_that_cannot_travel_is_the_rank_s_error(pools):
    """An unpicklable result is an error of its rank, not a hang."""
    with pytest.raises(RankError, match="rank 3 of 4 raised .*pickle"):
        pools.run(4, task("fail"), kwargs={"rank": 3, "how": "unpicklable"})


def test_a_rank_that_died_between_runs_is_replaced_in_silence(pools):
    """Nobody asked anything of the pool when it died, so nobody is to blame."""
    victim = pools.get(4).pids[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not pools.get(4).pids.count(victim))
    assert pools.run(4, task("echo"), args=(3,)) == [[3]] * 4


def test_a_killed_fork_server_is_replaced_in_silence():
    """Pools outlives its fork server: ranks end with it, a new server takes over, the old folder goes."""
    with Pools(host=None, preload=("torch",)) as live:
        first = live.run(2, task("where"))
        server = shared_server(None, ("torch",))
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1, "a fork with live threads is unsafe"
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(runs(pid) for pid, _ in first))
        second = live.run(2, task("where"))
    assert {server.process.pid} == {parent for _, parent in first} and not {p for _, p in first} & {p for _, p in second}
    assert not os.path.exists(server.folder)


@pytest.mark.parametrize("lost", ("server", "ground"))
def test_a_world_with_a_host_is_forked_from_the_clean_one(lost):
    """What both import is imported once; the clean world does not see the rest, and the loss of either server is made good."""
    with Pools(host=HOST) as live, Clean() as clean:
        before = live.run(2, task("where"))
        servers = {"server": shared_server(HOST, PRELOAD), "ground": shared_server(None, PRELOAD_CLEAN)}
        assert {parent for _, parent in before} == {servers["server"].process.pid}
        assert clean.run("os:getppid") == servers["ground"].process.pid == _parent(servers["server"].process.pid)
        assert len(os.listdir(f"/proc/{servers['server'].process.pid}/task")) == 1, "a fork with live threads is unsafe"
        os.kill(servers[lost].process.pid, signal.SIGKILL)
        wait_until(lambda: not any(runs(pid) for pid, _ in before))
        after = live.run(2, task("where"))
        assert clean.run("os:getppid") == shared_server(None, PRELOAD_CLEAN).process.pid
    assert not {p for _, p in before} & {p for _, p in after} and not os.path.exists(servers["server"].folder)
    assert (shared_server(None, PRELOAD_CLEAN) is servers["ground"]) == (lost == "server")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_what_a_task_starts_ends_with_its_rank(pools):
    """A process left behind by a task is gone when the pool is."""
    with Pool(1, host=HOST) as pool:
        child = pool.run(task("leave_a_child"))[0]
        assert runs(child)
    wait_until(lambda: not runs(child))


def test_a_task_cannot_take_the_process_group_away(pools):
    """Groups of equal ranks are one group and survive destroy_process_group(group); without the world a rank is useless."""
    assert pools.run(4, task("group_twice")) == [True] * 4
    with pytest.raises(RankError, match="destroyed the process group of its world"):
        pools.run(2, task("destroy_world"))


def test_results_are_equal_after_a_pool_was_replaced(pools):
    """A new pool gives the same bits: a small GPT on the TE spec, TP 2."""
    before = pools.run(2, task("tiny_model"), layout={"tp": 2})
    old, starts = pools.get(2).pids, len(pools.start_seconds[2])
    with pytest.raises(RankError):
        pools.run(2, task("fail"), kwargs={"rank": 0, "how": "raise"})
    after = pools.run(2, task("tiny_model"), layout={"tp": 2})
    assert set(old).isdisjoint(pools.get(2).pids) and len(pools.start_seconds[2]) == starts + 1
    assert all(a.equal(b) for a, b in zip(before, after, strict=True)) and before[0].shape == (1, 12, 64)


def test_a_failed_pool_says_that_it_ended(pools):
    """Without Pools nothing is replaced; the message says what to do, and close() may be called again."""
    with Pool(1, host=HOST) as pool:
        with pytest.raises(RankError, match="planted"):
            pool.run(task("fail"), kwargs={"rank": 0, "how": "raise"})
        assert not pool.alive
        with pytest.raises(WorldError, match="has ended .* Pools"):
            pool.run(task("whoami"))


@pytest.mark.parametrize("before", [(), PRELOAD], ids=("alone", "forked"))
def test_a_preload_that_fails_is_told_with_its_traceback(before):
    """The fork server's own failure reaches the caller, not a bare end of file."""
    with pytest.raises(WorldError, match="No module named 'no_such_module_here'"):
        Pool(1, host=HOST if before else None, preload=(*before, "no_such_module_here"))


# ----------------------------------------------------------------------------------------------------- start, end, size
def test_a_pool_starts_fast_while_the_server_is_up(pools):
    """Four ranks start within 0.5 s, in the best of three starts: a busy machine adds to all."""
    pools.get(4)
    starts = []
    for _ in range(3):
        with Pool(4, host=HOST) as pool:
            starts.append(pool.start_seconds)
    print(f"\nstart of 4 ranks, server up: {[round(s, 3) for s in starts]} s; server cold: {pools.start_seconds[4][0]:.2f} s")
    assert min(starts) <= 0.5, starts


def test_the_host_s_record_reaches_the_parent(pools):
    """Results can say which host ran."""
    assert isinstance(pools.get(4).host_record, dict) and pools.get(4).host_record, pools.get(4).host_record


def test_the_least_recently_used_pool_is_closed(pools):
    """At most `limit` pools live, and a world size of None means what the layout needs."""
    old = pools.get(4).pids
    pools.run(2, task("whoami"))
    assert len(pools.run(None, task("sizes"), layout={"tp": 1})) == 1
    assert pools.sizes == (2, 1)
    assert not any(map(runs, old))


@pytest.mark.parametrize("world", [(None, ("torch", "torch.distributed")), (HOST, PRELOAD)], ids=("alone", "forked"))
def test_no_process_and_no_folder_outlives_a_killed_parent(tmp_path, world):
    """SIGKILL of the parent, in the middle of a hung task: server, ranks and temporary folder are gone in seconds."""
    script = f"""if True:
        import sys, threading; sys.path.insert(0, {str(HERE)!r})
        from shardproof.conformance import worlds
        from shardproof.conformance.worlds.launcher import shared_server
        host, preload = {world!r}
        pool = worlds.Pool(2, host=host, preload=preload)
        server = shared_server(host, preload)
        print(server.process.pid, *pool.pids, server.folder, flush=True)
        pool.run({task("fail")!r}, kwargs=dict(rank=0, how="hang"))
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        *pids, folder = parent.stdout.readline().split()
        time.sleep(0.5)
        assert Path(folder).is_dir() and all(map(runs, pids)), (folder, pids)
        parent.kill()
    wait_until(lambda: not any(map(runs, pids)))
    wait_until(lambda: not list(tmp_path.glob("shardproof-*")))  # torch keeps a folder of caches beside


def test_shutdown_ends_everything():
    """After close and shutdown no process of a world runs and its folder is gone; a later use starts anew."""
    script = f"""if True:
        import sys, os; sys.path.insert(0, {str(HERE)!r})
        from shardproof.conformance import worlds
        from shardproof.conformance.worlds.launcher import shared_server
        pids = []
        for _ in range(2):
            pool = worlds.Pool(2, host=None, preload=("torch",))
            server = shared_server(None, ("torch",))
            pids += [server.process.pid, *pool.pids]
            pool.close()
            worlds.shutdown()
            assert not os.path.exists(server.folder)
        print(*pids)
    """
    pids = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert len(set(pids)) == 6 and not any(map(runs, pids)), pids


def test_ranks_write_nothing_to_the_terminal(pools, capfd):
    """What ranks print stays in their logs."""
    with contextlib.suppress(RankError):
        pools.run(2, task("fail"), kwargs={"rank": 0, "how": "raise"})
    captured = capfd.readouterr()
    assert captured.out == captured.err == "", captured


# ----------------------------------------------------------------------------------------------------------- transport
def test_tensors_travel_bit_for_bit(pools):
    """NaN payloads, -0.0, subnormals, half types, parameters and meta tensors arrive as they were; views stay small."""
    import torch

    got = pools.run(1, task("tensors"))[0]
    assert got["odd"].view(torch.int32).tolist() == [0x7FC00001, -(2**31), 1]
    assert got["half"].equal(torch.arange(4).to(torch.bfloat16)) and got["view"].equal(torch.zeros(1, 5))
    assert got["view"].untyped_storage().nbytes() == 20, "the storage behind a view must not travel"
    assert got["empty"].shape == (0, 3) and got["scalar"].item() == 3 and got["bool"].tolist() == [True, False]
    assert isinstance(got["parameter"], torch.nn.Parameter) and got["parameter"].requires_grad
    assert got["meta"].is_meta and got["meta"].shape == (5, 7) and got["graph"].grad_fn is None


def test_large_results_pass(pools):
    """Results far larger than a pipe's buffer come from all ranks at once, and go out as arguments too."""
    import torch

    assert [r.numel() for r in pools.run(2, task("large"), args=(16,))] == [2**22] * 2
    value = torch.randn(2**20)
    assert all(r[0].equal(value) for r in pools.run(2, task("echo"), args=(value,)))


def test_values_survive_the_wire_in_this_process():
    """The same for a round trip without processes, non-contiguous and conjugate tensors included."""
    import torch

    z = torch.complex(torch.randn(2, 3), torch.randn(2, 3))
    for t in (torch.arange(6).reshape(2, 3).t(), z.conj(), torch.zeros(0), torch.tensor(2.5)):
        back = wire.loads(wire.dumps({"t": t}))["t"]
        assert back.equal(t) and back.dtype == t.dtype and back.shape == t.shape


def test_suggested_workers_follow_cores_and_memory():
    """At least one, at most one a core, fewer where memory is short."""
    gib = 2**30
    assert worlds.suggested_workers(4, cpus=8, memory_bytes=100 * gib) == 8
    assert worlds.suggested_workers(4, cpus=8, memory_bytes=5 * gib) == 2
    assert worlds.suggested_workers(4, cpus=8, memory_bytes=1 * gib) == 1
    assert worlds.suggested_workers(4) >= 1


def test_processes_share_a_fork_server():
    """Law: a process that borrows a server has its workers from it, they end with that process, and the server goes on."""
    key, door = lend(None, ("torch",))
    code = f"""
from shardproof.conformance.worlds import Clean
from shardproof.conformance.worlds.launcher import borrow
borrow([({key!r}, {door!r})])
world = Clean(preload=("torch",))
print(world.run("os:getppid"), world.run("os:getpid"))
import os; os._exit(0)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    server, worker = map(int, said.stdout.split())
    with worlds.Clean(preload=("torch",)) as own:
        assert own.run("os:getppid") == server != os.getpid()
        wait_until(lambda: not runs(worker))
        assert own.run("os:getppid") == server


def test_a_borrowed_server_that_is_gone_is_replaced(tmp_path):
    """Law: where nobody answers any more, a process starts its own server."""
    borrow([((None, ("json", "torch"), None, False), str(tmp_path / "door"))])
    with worlds.Clean(preload=("json", "torch")) as own:
        assert own.run("os:getppid") == shared_server(None, ("json", "torch")).process.pid


def test_a_toys_cases_share_a_worker():
    """Law: cases of one toy have one group, laws that measure for themselves another; other tests have none."""
    at = "conformance/test_conformance.py::test_case[qwen3/Qwen3-8B+mqa/tp2,sp/fp32/both/{}]"
    assert group_of(at.format("names.coverage")) == group_of(at.format("grad.parameters")) == "qwen3/Qwen3-8B+mqa"
    assert group_of(at.format("io.crash")) == "qwen3/Qwen3-8B+mqa/apart" and group_of("tests/test_x.py::test_y[a/b]") is None


# --------------------------------------------------------------------------------------------------------------- tools
def runs(pid) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
